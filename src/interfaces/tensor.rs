//! What a caller hands over, and the one way from there to a rotator.

use super::InterfaceError;
use crate::{
    Buffer, CosSinTable, Device, DeviceElement, DeviceInOut, Element, Error, Host, HostInOut,
    HostRotator, InOut, Layout, OutOfRange, Pairing, Positions, Problem, Rope, Rotator,
};

/// Where the elements of a [`Tensor`] are: host memory, or a buffer of a [`Device`].
///
/// Made from `&mut` of a slice, a vector or a [`Buffer`], which is rotated in place, or from a pair
/// `(source, destination)`.
#[derive(Debug)]
pub enum Memory<'a, T> {
    /// Slices; they are rotated on the host, whatever the device.
    Host(HostInOut<'a, T>),
    /// Buffers of the device that the interface was made for.
    Device(DeviceInOut<'a, T>),
}

impl<'a, T> From<&'a mut [T]> for Memory<'a, T> {
    fn from(elements: &'a mut [T]) -> Self {
        Memory::Host(InOut::InPlace(elements))
    }
}

impl<'a, T> From<&'a mut Vec<T>> for Memory<'a, T> {
    fn from(elements: &'a mut Vec<T>) -> Self {
        Memory::from(&mut elements[..])
    }
}

impl<'a, T, const N: usize> From<&'a mut [T; N]> for Memory<'a, T> {
    fn from(elements: &'a mut [T; N]) -> Self {
        Memory::from(&mut elements[..])
    }
}

impl<'a, T: Element> From<(&'a [T], &'a mut [T])> for Memory<'a, T> {
    fn from(pair: (&'a [T], &'a mut [T])) -> Self {
        Memory::Host(pair.into())
    }
}

impl<'a, T> From<&'a mut Buffer<T>> for Memory<'a, T> {
    fn from(elements: &'a mut Buffer<T>) -> Self {
        Memory::Device(InOut::InPlace(elements))
    }
}

impl<'a, T> From<(&'a Buffer<T>, &'a mut Buffer<T>)> for Memory<'a, T> {
    fn from((source, destination): (&'a Buffer<T>, &'a mut Buffer<T>)) -> Self {
        Memory::Device(InOut::OutOfPlace {
            source,
            destination,
        })
    }
}

impl<'a, T: DeviceElement> Memory<'a, T> {
    /// Elements of each buffer: one in place, two out of place.
    fn lengths(&self) -> [usize; 2] {
        match self {
            Memory::Host(InOut::InPlace(x)) => [x.len(); 2],
            Memory::Host(InOut::OutOfPlace {
                source,
                destination,
            }) => [source.len(), destination.len()],
            Memory::Device(InOut::InPlace(x)) => [x.len(); 2],
            Memory::Device(InOut::OutOfPlace {
                source,
                destination,
            }) => [source.len(), destination.len()],
        }
    }

    fn planned(&self, layout: Layout) -> InOut<Layout> {
        match self {
            Memory::Host(InOut::InPlace(_)) | Memory::Device(InOut::InPlace(_)) => layout.into(),
            _ => (layout, layout).into(),
        }
    }

    fn on_host(self, argument: &'static str) -> Result<HostInOut<'a, T>, InterfaceError> {
        match self {
            Memory::Host(operand) => Ok(operand),
            Memory::Device(_) => Err(InterfaceError::MixedMemory { argument }),
        }
    }

    fn on_device(self, argument: &'static str) -> Result<DeviceInOut<'a, T>, InterfaceError> {
        match self {
            Memory::Device(operand) => Ok(operand),
            Memory::Host(_) => Err(InterfaceError::MixedMemory { argument }),
        }
    }
}

/// A contiguous, row-major tensor that is to be rotated.
///
/// ```
/// use phasor::interfaces::Tensor;
///
/// let mut x = vec![0.5f32; 32 * 5 * 128];
/// let in_place = Tensor::new(&mut x, &[1, 32, 5, 128]);
///
/// let source = vec![0.5f32; 32 * 5 * 128];
/// let mut rotated = vec![0.0f32; 32 * 5 * 128];
/// let out_of_place = Tensor::new((&source[..], &mut rotated[..]), &[1, 32, 5, 128]);
/// ```
#[derive(Debug)]
pub struct Tensor<'a, T> {
    memory: Memory<'a, T>,
    shape: Vec<usize>,
}

impl<'a, T: DeviceElement> Tensor<'a, T> {
    /// Elements and their shape. Whether the two fit each other is checked by the call.
    pub fn new(memory: impl Into<Memory<'a, T>>, shape: &[usize]) -> Self {
        Self {
            memory: memory.into(),
            shape: shape.to_vec(),
        }
    }

    /// Its shape.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub(super) fn operand(
        self,
        argument: &'static str,
        layout: Layout,
    ) -> Result<Operand<'a, T>, InterfaceError> {
        for got in self.memory.lengths() {
            check_length(argument, &self.shape, got)?;
        }
        Ok(Operand {
            argument,
            memory: self.memory,
            layout,
        })
    }
}

/// A contiguous, row-major array that is only read: a table or cache, in host memory. 16-bit values
/// are widened, which is exact.
#[derive(Clone, Copy, Debug)]
pub struct Array<'a, T> {
    values: &'a [T],
    shape: &'a [usize],
}

impl<'a, T> Array<'a, T> {
    /// Values and their shape. Whether the two fit each other is checked where it is used.
    pub const fn new(values: &'a [T], shape: &'a [usize]) -> Self {
        Self { values, shape }
    }

    /// Its shape.
    pub const fn shape(&self) -> &'a [usize] {
        self.shape
    }

    /// Its values, as many as the shape says.
    pub(super) fn checked(&self, argument: &'static str) -> Result<&'a [T], InterfaceError> {
        check_length(argument, self.shape, self.values.len())?;
        Ok(self.values)
    }
}

fn check_length(argument: &'static str, shape: &[usize], got: usize) -> Result<(), InterfaceError> {
    if product(shape) != Some(got) {
        return Err(InterfaceError::Length {
            argument,
            shape: shape.to_vec(),
            got,
        });
    }
    Ok(())
}

/// Elements of a shape; `None` past what memory holds. No element is no element, however large
/// the other axes are.
pub(super) fn product(shape: &[usize]) -> Option<usize> {
    if shape.contains(&0) {
        return Some(0);
    }
    shape
        .iter()
        .try_fold(1usize, |count, &axis| count.checked_mul(axis))
}

/// A tensor whose elements have been found to fill its layout.
pub(super) struct Operand<'a, T> {
    argument: &'static str,
    memory: Memory<'a, T>,
    layout: Layout,
}

/// One rotation, ready on a device and for slices in host memory.
#[derive(Clone, Debug)]
pub(super) struct Engine {
    rope: Rope,
    device: Device,
    on_device: Rotator,
    on_host: HostRotator,
}

impl Engine {
    pub(super) fn new(device: &Device, rope: Rope) -> Result<Self, Error> {
        Ok(Self {
            on_device: device.rotator(&rope)?,
            on_host: Host::new().rotator(&rope),
            device: device.clone(),
            rope,
        })
    }

    pub(super) fn rope(&self) -> &Rope {
        &self.rope
    }

    /// Another rotation on the same device.
    pub(super) fn with_rope(&self, rope: Rope) -> Result<Self, Error> {
        Self::new(&self.device, rope)
    }

    /// The backward pass.
    pub(super) fn backward(&self) -> Result<Self, Error> {
        Self::new(&self.device, self.rope.backward())
    }

    /// Rotates one tensor, or two in one launch.
    pub(super) fn rotate<T: DeviceElement>(
        &self,
        q: Operand<'_, T>,
        k: Option<Operand<'_, T>>,
        positions: Positions<'_>,
    ) -> Result<(), InterfaceError> {
        let mut problem = Problem::new(T::DTYPE).q(q.memory.planned(q.layout));
        if let Some(k) = &k {
            problem = problem.k(k.memory.planned(k.layout));
        }
        if let Memory::Host(q) = q.memory {
            let plan = self.on_host.plan(&problem)?;
            let k = k.map(|k| k.memory.on_host(k.argument)).transpose()?;
            self.on_host.rotate(&plan, Some(q), k, positions)?;
        } else {
            let plan = self.on_device.plan(&problem)?;
            let q = q.memory.on_device(q.argument)?;
            let k = k.map(|k| k.memory.on_device(k.argument)).transpose()?;
            let positions = self.device.positions(positions)?;
            self.on_device.rotate(&plan, Some(q), k, &positions)?;
        }
        Ok(())
    }
}

pub(super) const fn pairing(interleaved: bool) -> Pairing {
    if interleaved {
        Pairing::Interleaved
    } else {
        Pairing::HalfSplit
    }
}

/// A table whose positions the caller checks, so that a GPU may read them; whatever they are, no
/// token reads outside it. Where there is no row, one that is never read takes its place, so that
/// an empty batch may bring an empty table.
pub(super) fn table<C: Element>(
    cos: &[C],
    sin: &[C],
    pairs: usize,
) -> Result<CosSinTable, InterfaceError> {
    check_rotary_dim("rotary_dim", pairs.saturating_mul(2))?;
    let widened = |values: &[C], of_none: f32| {
        if values.is_empty() {
            vec![of_none; pairs]
        } else {
            values.iter().map(|value| value.widen()).collect()
        }
    };
    let table = CosSinTable::new(widened(cos, 1.0), widened(sin, 0.0), pairs)?;
    Ok(table.with_out_of_range(OutOfRange::PassThrough))
}

/// Where the sequences of a call begin in a table that has a row for each of its tokens; a single
/// start where it is the same for all, or there is no token.
pub(super) fn starts_of_rows(batch: usize, sequence: usize) -> Vec<i64> {
    if sequence == 0 {
        return vec![0];
    }
    let start = |row: usize| row.wrapping_mul(sequence) as i64;
    (0..batch).map(start).collect()
}

/// The positions that begin at `starts`.
pub(super) fn from_starts(starts: &[i64]) -> Positions<'_> {
    match starts {
        &[start] => Positions::start(start),
        starts => Positions::start_per_sequence(starts),
    }
}

/// The positions of a call lie in a table of `rows` rows. Where `ids` may be read by a GPU this is
/// the only check of the kind, and it makes both backends refuse the same calls.
pub(super) fn check_in_table(
    argument: &'static str,
    ids: &[i64],
    rows: usize,
) -> Result<(), InterfaceError> {
    let outside = |&position: &i64| usize::try_from(position).map_or(true, |p| p >= rows);
    match ids.iter().position(outside) {
        None => Ok(()),
        Some(token) => Err(InterfaceError::OutOfTable {
            argument,
            position: ids[token],
            token,
            rows,
        }),
    }
}

/// The same for the positions `start..start + count`.
pub(super) fn check_run_in_table(
    argument: &'static str,
    start: i64,
    count: usize,
    rows: usize,
) -> Result<(), InterfaceError> {
    let first = usize::try_from(start).ok();
    let end = first.and_then(|first| first.checked_add(count));
    if end.is_some_and(|end| end <= rows) {
        return Ok(());
    }
    let inside = first.map_or(0, |first| rows.saturating_sub(first));
    Err(InterfaceError::OutOfTable {
        argument,
        position: start.saturating_add_unsigned(inside as u64),
        token: inside,
        rows,
    })
}

/// The number of dims of a head that rotate.
pub(super) fn check_rotary_dim(argument: &'static str, dim: usize) -> Result<(), InterfaceError> {
    /// Each pair takes a power in extended precision, and a number from a broken file must not take
    /// hours.
    const MOST: usize = 1 << 16;
    if dim == 0 || dim % 2 == 1 || dim > MOST {
        return Err(InterfaceError::value(
            argument,
            dim,
            format!("even, from 2 to {MOST}"),
        ));
    }
    Ok(())
}
