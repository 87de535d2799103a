use crate::storages::{Held, Request, Slot};
use crate::{Error, Result};
use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use phasor::PositionsIn;
use std::borrow::Cow;
use std::convert::Infallible;

/// Where the tokens of a call are. Made by `From` a number, a slice or a tensor:
///
/// - a number: the position of the first token of every sequence; those after it follow;
/// - a slice or a tensor of u32, i64 or i32: a position per token, `[tokens]` for all sequences alike
///   or `[batch, tokens]`; a tensor also `[axes, batch, tokens]`, for models with several axes;
/// - [`starts`](Self::starts): the position of the first token of each sequence, `[batch]`.
///
/// Positions may be negative, and have no upper end. A tensor is read on its device, which must be that
/// of the rotated one; a slice is copied to it first.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use phasor_candle::Positions;
///
/// # fn main() -> candle_core::Result<()> {
/// let decode = Positions::from(1_000_000);
/// let batch = Positions::starts(&[17i64, 40_000]); // two sequences
/// let ids = Tensor::new(&[[0u32, 1, 2], [0, 0, 1]], &Device::Cpu)?;
/// let padded = Positions::from(&ids);
/// # let _ = (decode, batch, padded);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Positions<'a> {
    values: Values<'a>,
    row: Option<u32>,
    rows: Option<Ids<'a>>,
    cu_seqlens: Option<Ids<'a>>,
}

#[derive(Clone, Debug)]
enum Values<'a> {
    Start(i64),
    Starts(Ids<'a>),
    PerSequence(Ids<'a>),
    /// Per token, or per axis and token.
    PerToken(Ids<'a>),
}

impl<'a> Positions<'a> {
    fn new(values: Values<'a>) -> Self {
        Self {
            values,
            row: None,
            rows: None,
            cu_seqlens: None,
        }
    }

    /// The position of the first token of each sequence, `[batch]`; those after it follow.
    pub fn starts(starts: impl Into<Ids<'a>>) -> Self {
        Self::new(Values::Starts(starts.into()))
    }

    /// A position per sequence, `[batch]`, that all its tokens share: what
    /// [`Rope::shift`](phasor::Rope::shift) moves cached keys by.
    pub fn per_sequence(positions: impl Into<Ids<'a>>) -> Self {
        Self::new(Values::PerSequence(positions.into()))
    }

    /// The tokens are those of several sequences, one after the other (a ragged batch): sequence `s` has
    /// those from `cu_seqlens[s]` to `cu_seqlens[s + 1]`, `[sequences + 1]`. The rotated tensor has a
    /// batch of 1, or none; what is given per sequence is given for each of these. Tokens from the last
    /// offset on are padding: left as they are in place, and else 0.
    pub fn cu_seqlens(mut self, cu_seqlens: impl Into<Ids<'a>>) -> Self {
        self.cu_seqlens = Some(cu_seqlens.into());
        self
    }

    /// The row of frequencies of the whole call, for models that have several (LongRoPE):
    /// [`RotaryEmbedding::row_for_length`](crate::RotaryEmbedding::row_for_length) says which.
    pub fn frequency_row(mut self, row: u32) -> Self {
        self.row = Some(row);
        self
    }

    /// A row of frequencies per sequence, `[batch]`.
    pub fn frequency_rows(mut self, rows: impl Into<Ids<'a>>) -> Self {
        self.rows = Some(rows.into());
        self
    }

    /// With tensors contiguous and on `device`, and slices too where that is not the host.
    // In place: they are large, and mostly stay as they are.
    #[inline]
    pub(crate) fn place_on(&mut self, device: &Device) -> Result<()> {
        if device.is_cpu() && !self.ids().into_iter().flatten().any(Ids::is_tensor) {
            return Ok(());
        }
        *self = self.clone().placed_on(device)?;
        Ok(())
    }

    fn placed_on(self, device: &Device) -> Result<Self> {
        let place = |ids: Ids<'a>, what| ids.on(device, what);
        let values = match self.values {
            Values::Start(start) => Values::Start(start),
            Values::Starts(ids) => Values::Starts(place(ids, "positions")?),
            Values::PerSequence(ids) => Values::PerSequence(place(ids, "positions")?),
            Values::PerToken(ids) => Values::PerToken(place(ids, "positions")?),
        };
        let row_ids = |ids| place(ids, "frequency rows");
        let offsets = |ids| place(ids, "cu_seqlens");
        Ok(Self {
            values,
            row: self.row,
            rows: self.rows.map(row_ids).transpose()?,
            cu_seqlens: self.cu_seqlens.map(offsets).transpose()?,
        })
    }

    /// Nothing borrowed.
    pub(crate) fn into_owned(self) -> Positions<'static> {
        Positions {
            values: match self.values {
                Values::Start(start) => Values::Start(start),
                Values::Starts(ids) => Values::Starts(ids.into_owned()),
                Values::PerSequence(ids) => Values::PerSequence(ids.into_owned()),
                Values::PerToken(ids) => Values::PerToken(ids.into_owned()),
            },
            row: self.row,
            rows: self.rows.map(Ids::into_owned),
            cu_seqlens: self.cu_seqlens.map(Ids::into_owned),
        }
    }

    fn ids(&self) -> [Option<&Ids<'a>>; 3] {
        let values = match &self.values {
            Values::Start(_) => None,
            Values::Starts(ids) | Values::PerSequence(ids) | Values::PerToken(ids) => Some(ids),
        };
        [values, self.rows.as_ref(), self.cu_seqlens.as_ref()]
    }

    /// Adds what is in tensors to a request.
    pub(crate) fn request<'t, const N: usize>(&'t self, request: &mut Request<'t, N>) -> Asked<'t> {
        Asked {
            positions: self,
            slots: self
                .ids()
                .map(|ids| ids.and_then(|ids| ids.request(request))),
            per_token: PerToken::Shared,
        }
    }
}

/// Positions, and where their tensors are among the storages of a call.
pub(crate) struct Asked<'t> {
    positions: &'t Positions<'t>,
    slots: [Option<Slot>; 3],
    per_token: PerToken,
}

/// What ids per token are of.
#[derive(Clone, Copy)]
enum PerToken {
    /// Of the tokens of every sequence.
    Shared,
    Each,
    Axes,
}

impl Asked<'_> {
    /// They are for so many sequences and tokens.
    pub(crate) fn fit(&mut self, [batch, tokens]: [usize; 2]) -> Result<()> {
        let Values::PerToken(ids) = &self.positions.values else {
            return Ok(());
        };
        self.per_token = match *ids.dims() {
            [n] | [1, n] if n == tokens => PerToken::Shared,
            [n] if Some(n) == batch.checked_mul(tokens) => PerToken::Each,
            [b, n] if [b, n] == [batch, tokens] => PerToken::Each,
            [_, b, n] if [b, n] == [batch, tokens] => PerToken::Axes,
            _ => {
                return Err(Error::PositionsShape {
                    got: ids.dims().to_vec(),
                    batch,
                    tokens,
                });
            }
        };
        Ok(())
    }

    /// As phasor takes them. `memory` has ids, whose storage is in the given slot.
    #[inline(always)]
    pub(crate) fn given<'s, M, E>(
        &'s self,
        mut memory: impl FnMut(&'s Ids<'s>, Option<Slot>) -> std::result::Result<phasor::Ids<M>, E>,
    ) -> std::result::Result<PositionsIn<M>, E> {
        let [values, rows, offsets] = self.slots;
        let mut given = match &self.positions.values {
            Values::Start(start) => PositionsIn::start(*start),
            Values::Starts(ids) => PositionsIn::start_per_sequence(memory(ids, values)?),
            Values::PerSequence(ids) => PositionsIn::per_sequence(memory(ids, values)?),
            Values::PerToken(ids) => {
                let at = memory(ids, values)?;
                match self.per_token {
                    PerToken::Shared => PositionsIn::per_token_shared(at),
                    PerToken::Each => PositionsIn::per_token(at),
                    PerToken::Axes => PositionsIn::per_axis(at),
                }
            }
        };
        if let Some(row) = self.positions.row {
            given = given.frequency_row(row);
        }
        if let Some(ids) = &self.positions.rows {
            given = given.frequency_rows_per_sequence(memory(ids, rows)?);
        }
        if let Some(ids) = &self.positions.cu_seqlens {
            given = given.cu_seqlens(memory(ids, offsets)?);
        }
        Ok(given)
    }

    /// In host memory.
    // Not as a result: handed on in one they would be copied as other words than they were written in, which
    // processors wait for.
    #[inline(never)]
    pub(crate) fn on_host<'s, const N: usize>(
        &'s self,
        held: &Held<'s, N>,
    ) -> phasor::Positions<'s> {
        let Ok(given) = self.given(|ids, slot| Ok::<_, Infallible>(ids.on_host(slot, held)));
        given
    }
}

macro_rules! from_numbers {
    ($($number:ty),*) => {$(
        impl From<$number> for Positions<'_> {
            /// The position of the first token, modulo 2^64.
            fn from(start: $number) -> Self {
                Self::new(Values::Start(start as i64))
            }
        }
    )*};
}

from_numbers!(i32, i64, u32, u64, usize);

impl<'a, T> From<&'a T> for Positions<'a>
where
    &'a T: Into<Ids<'a>>,
    T: ?Sized,
{
    fn from(ids: &'a T) -> Self {
        Self::new(Values::PerToken(ids.into()))
    }
}

/// Integers for each token or sequence: a slice or a tensor of u32, i64 or i32. Made by `From` either.
#[derive(Clone, Debug)]
pub struct Ids<'a>(Memory<'a>);

#[derive(Clone, Debug)]
enum Memory<'a> {
    I32(Cow<'a, [i32]>, usize),
    I64(Cow<'a, [i64]>, usize),
    U32(Cow<'a, [u32]>, usize),
    Tensor(Cow<'a, Tensor>),
}

impl<'a> Ids<'a> {
    /// Their shape.
    fn dims(&self) -> &[usize] {
        match &self.0 {
            Memory::I32(_, len) | Memory::I64(_, len) | Memory::U32(_, len) => {
                std::slice::from_ref(len)
            }
            Memory::Tensor(tensor) => tensor.dims(),
        }
    }

    /// On a device, as [`Positions::on`].
    pub(crate) fn on(self, device: &Device, what: &'static str) -> Result<Self> {
        let upload = |tensor: candle_core::Result<Tensor>| -> Result<Self> {
            Ok(Ids(Memory::Tensor(Cow::Owned(tensor?))))
        };
        match &self.0 {
            Memory::Tensor(tensor) => {
                same_device("the rotated tensor", device, what, tensor.device())?;
                match tensor.dtype() {
                    DType::U32 | DType::I64 | DType::I32 => {}
                    got => {
                        return Err(Error::DType {
                            tensor: what,
                            expected: "u32, i64 or i32",
                            got,
                        });
                    }
                }
                match tensor.is_contiguous() {
                    true => Ok(self),
                    false => upload(tensor.contiguous()),
                }
            }
            _ if device.is_cpu() => Ok(self),
            Memory::I32(ids, len) => upload(Tensor::from_slice(ids, *len, device)),
            Memory::I64(ids, len) => upload(Tensor::from_slice(ids, *len, device)),
            Memory::U32(ids, len) => upload(Tensor::from_slice(ids, *len, device)),
        }
    }

    fn into_owned(self) -> Ids<'static> {
        Ids(match self.0 {
            Memory::I32(ids, len) => Memory::I32(Cow::Owned(ids.into_owned()), len),
            Memory::I64(ids, len) => Memory::I64(Cow::Owned(ids.into_owned()), len),
            Memory::U32(ids, len) => Memory::U32(Cow::Owned(ids.into_owned()), len),
            Memory::Tensor(tensor) => Memory::Tensor(Cow::Owned(tensor.into_owned())),
        })
    }

    pub(crate) fn request<'t, const N: usize>(
        &'t self,
        request: &mut Request<'t, N>,
    ) -> Option<Slot> {
        self.as_tensor().map(|tensor| request.read(tensor))
    }

    pub(crate) fn is_tensor(&self) -> bool {
        matches!(self.0, Memory::Tensor(_))
    }

    pub(crate) fn as_tensor(&self) -> Option<&Tensor> {
        match &self.0 {
            Memory::Tensor(tensor) => Some(tensor),
            _ => None,
        }
    }

    /// In host memory; a tensor's storage is in `slot` of what is held.
    #[inline(always)]
    pub(crate) fn on_host<'s, const N: usize>(
        &'s self,
        slot: Option<Slot>,
        held: &Held<'s, N>,
    ) -> phasor::Ids<&'s [u8]> {
        match &self.0 {
            Memory::I32(ids, _) => ids[..].into(),
            Memory::I64(ids, _) => ids[..].into(),
            Memory::U32(ids, _) => ids[..].into(),
            Memory::Tensor(tensor) => in_storage(tensor, slot.and_then(|slot| held.read(slot))),
        }
    }
}

fn in_storage<'s>(tensor: &Tensor, storage: Option<&'s Storage>) -> phasor::Ids<&'s [u8]> {
    let range = tensor.layout().start_offset()..;
    let len = tensor.elem_count();
    match storage {
        Some(Storage::Cpu(CpuStorage::I32(ids))) => ids[range][..len].into(),
        Some(Storage::Cpu(CpuStorage::I64(ids))) => ids[range][..len].into(),
        Some(Storage::Cpu(CpuStorage::U32(ids))) => ids[range][..len].into(),
        // Another type has been refused, and none of these is written. Phasor would refuse too few.
        _ => [0u32; 0][..].into(),
    }
}

macro_rules! from_slices {
    ($($id:ty => $memory:ident),*) => {$(
        impl<'a> From<&'a [$id]> for Ids<'a> {
            fn from(ids: &'a [$id]) -> Self {
                Self(Memory::$memory(Cow::Borrowed(ids), ids.len()))
            }
        }

        impl<'a> From<&'a Vec<$id>> for Ids<'a> {
            fn from(ids: &'a Vec<$id>) -> Self {
                ids[..].into()
            }
        }

        impl<'a, const N: usize> From<&'a [$id; N]> for Ids<'a> {
            fn from(ids: &'a [$id; N]) -> Self {
                ids[..].into()
            }
        }
    )*};
}

from_slices!(i32 => I32, i64 => I64, u32 => U32);

impl<'a> From<&'a Tensor> for Ids<'a> {
    fn from(ids: &'a Tensor) -> Self {
        Self(Memory::Tensor(Cow::Borrowed(ids)))
    }
}

/// Both are one device: for CUDA, of one `CudaDevice` and its clones.
#[inline]
pub(crate) fn same_device(
    first: &'static str,
    first_device: &Device,
    second: &'static str,
    second_device: &Device,
) -> Result<()> {
    match (first_device, second_device) {
        (Device::Cpu, Device::Cpu) => Ok(()),
        _ if first_device.same_device(second_device) => Ok(()),
        _ => Err(Error::Devices {
            first,
            first_device: name_of(first_device),
            second,
            second_device: name_of(second_device),
        }),
    }
}

#[cold]
fn name_of(device: &Device) -> String {
    match device.location() {
        candle_core::DeviceLocation::Cpu => "the CPU".to_string(),
        candle_core::DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
        candle_core::DeviceLocation::Metal { gpu_id } => format!("metal:{gpu_id}"),
    }
}
