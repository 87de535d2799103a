//! The functions of `candle_nn::rotary_emb`, with the same names, shapes and tables: a first try is one
//! changed import. Beside them, [`rope_exact`] and [`rope_thd_exact`] take a [`RotaryEmbedding`] and
//! positions where those take tables.
//!
//! A table is as exact as what made it: candle's models form angles in f32, and tables in the type of the
//! activations. Here, rotation by a table computes in f32 and rounds once, where candle-nn rounds each
//! product to the type of the elements; f64 gives the same bits. As there, no gradient flows through
//! `rope`, `rope_i` and `rope_thd`.
//!
//! Two things that candle-nn refuses are taken: tensors of any strides, and tables in f32 for tensors of
//! 16-bit types. Where a table has a batch and more rows than there are tokens, each sequence has its own
//! rows here; candle-nn counts them by tokens.

use crate::number::{Number, by_dtype};
use crate::storages::{Held, Request, Slot};
use crate::view::{DimOrder, Rank, View};
use crate::{Error, Positions, Result, RotaryEmbedding, host};
use candle_core::op::BackpropOp;
use candle_core::{DType, Storage, Tensor};
use phasor::call::{AngleAddresses, RawPositions, TensorAddresses};
use phasor::{CosSinTable, IdType, Ids, OutOfRange, Pairing, Rope};
use std::borrow::Cow;
use std::num::NonZeroU32;
use std::sync::{Mutex, PoisonError};

/// Rotates `xs`, `[batch, heads, tokens, head_dim]`, half-split, by tables `[rows, head_dim / 2]` or
/// `[batch, rows, head_dim / 2]`: token `t` by row `t`.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use phasor_candle::rotary_emb; // instead of candle_nn::rotary_emb
///
/// # fn main() -> candle_core::Result<()> {
/// let xs = Tensor::ones((1, 8, 5, 64), DType::F32, &Device::Cpu)?;
/// # let cos = Tensor::ones((512, 32), DType::F32, &Device::Cpu)?;
/// # let sin = Tensor::zeros((512, 32), DType::F32, &Device::Cpu)?;
/// let rotated = rotary_emb::rope(&xs, &cos.narrow(0, 100, 5)?, &sin.narrow(0, 100, 5)?)?;
/// # assert_eq!(rotated.dims(), xs.dims());
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// If shapes or element types do not fit.
pub fn rope(xs: &Tensor, cos: &Tensor, sin: &Tensor) -> candle_core::Result<Tensor> {
    Ok(by_tables(xs, cos, sin, Pairing::HalfSplit, DimOrder::Bhtd)?)
}

/// The same for adjacent pairs.
///
/// # Errors
/// If shapes or element types do not fit.
pub fn rope_i(xs: &Tensor, cos: &Tensor, sin: &Tensor) -> candle_core::Result<Tensor> {
    Ok(by_tables(
        xs,
        cos,
        sin,
        Pairing::Interleaved,
        DimOrder::Bhtd,
    )?)
}

/// As [`rope`], for `xs` of shape `[batch, tokens, heads, head_dim]`.
///
/// # Errors
/// If shapes or element types do not fit.
pub fn rope_thd(xs: &Tensor, cos: &Tensor, sin: &Tensor) -> candle_core::Result<Tensor> {
    Ok(by_tables(xs, cos, sin, Pairing::HalfSplit, DimOrder::Bthd)?)
}

/// Rotates `xs`, `[batch, heads, tokens, head_dim]`, by exact angles: [`RotaryEmbedding::apply`]. Pairs
/// are those of `rotary`, half-split or adjacent. Gradients flow back.
///
/// # Errors
/// As [`RotaryEmbedding::apply`].
pub fn rope_exact<'p>(
    xs: &Tensor,
    rotary: &RotaryEmbedding,
    positions: impl Into<Positions<'p>>,
) -> candle_core::Result<Tensor> {
    let rotary = rotary.clone().with_dim_order(DimOrder::Bhtd);
    Ok(rotary.apply(xs, positions)?)
}

/// The same for `xs` of shape `[batch, tokens, heads, head_dim]`.
///
/// # Errors
/// As [`RotaryEmbedding::apply`].
pub fn rope_thd_exact<'p>(
    xs: &Tensor,
    rotary: &RotaryEmbedding,
    positions: impl Into<Positions<'p>>,
) -> candle_core::Result<Tensor> {
    let rotary = rotary.clone().with_dim_order(DimOrder::Bthd);
    Ok(rotary.apply(xs, positions)?)
}

/// Rows of a table for each sequence, and whether each has rows of its own.
#[derive(Clone, Copy)]
struct Rows {
    of_sequence: usize,
    batched: bool,
}

fn check_table(
    name: &'static str,
    table: &Tensor,
    xs: &Tensor,
    [batch, tokens, dim]: [usize; 3],
) -> Result<Rows> {
    crate::positions::same_device("xs", xs.device(), name, table.device())?;
    let (rows, pairs, batched) = match *table.dims() {
        [rows, pairs] => (rows, pairs, false),
        [b, rows, pairs] if b == batch => (rows, pairs, true),
        _ => (0, 0, false),
    };
    if pairs.checked_mul(2) != Some(dim) || rows < tokens {
        return Err(Error::Shape {
            tensor: name,
            expected: "[rows, head_dim / 2] or [batch, rows, head_dim / 2], with a row for each token",
            got: table.dims().to_vec(),
        });
    }
    let dtype = table.dtype();
    if dtype != xs.dtype() && dtype != DType::F32 {
        return Err(Error::DType {
            tensor: name,
            expected: "f32, or as xs",
            got: dtype,
        });
    }
    Ok(Rows {
        of_sequence: rows,
        batched,
    })
}

fn by_tables(
    xs: &Tensor,
    cos: &Tensor,
    sin: &Tensor,
    pairing: Pairing,
    order: DimOrder,
) -> Result<Tensor> {
    let contiguous = |tensor| -> Result<Cow<'_, Tensor>> {
        match Tensor::is_contiguous(tensor) {
            true => Ok(Cow::Borrowed(tensor)),
            false => Ok(Cow::Owned(tensor.contiguous()?)),
        }
    };
    let (dims, strides) = (xs.dims(), xs.stride());
    let (&[batch, second, third, dim], &[.., last]) = (dims, strides) else {
        return Err(Error::Shape {
            tensor: "xs",
            expected: match order {
                DimOrder::Bhtd => "[batch, heads, tokens, head_dim]",
                DimOrder::Bthd => "[batch, tokens, heads, head_dim]",
            },
            got: dims.to_vec(),
        });
    };
    let tokens = match order {
        DimOrder::Bhtd => third,
        DimOrder::Bthd => second,
    };
    let rows = check_table("cos", cos, xs, [batch, tokens, dim])?;
    let of_sin = check_table("sin", sin, xs, [batch, tokens, dim])?;
    if xs.elem_count() == 0 {
        return Ok(Tensor::zeros(xs.shape(), xs.dtype(), xs.device())?);
    }
    // The tables of candle-nn need not be as long; a call here has rows for both.
    let least = rows.of_sequence.min(of_sin.of_sequence);
    let cut = |table: &Tensor, rows: Rows| match rows.of_sequence == least {
        true => Ok(table.clone()),
        false => table.narrow(usize::from(rows.batched), 0, least),
    };
    let cut_tables;
    let (cos, sin) = match rows.of_sequence == of_sin.of_sequence {
        true => (cos, sin),
        false => {
            cut_tables = (cut(cos, rows)?, cut(sin, of_sin)?);
            (&cut_tables.0, &cut_tables.1)
        }
    };
    if rows.batched != of_sin.batched {
        return Err(Error::Shape {
            tensor: "sin",
            expected: "of as many dims as cos",
            got: sin.dims().to_vec(),
        });
    }
    let rows = Rows {
        of_sequence: least,
        ..rows
    };
    if xs.dtype() == DType::F64 && xs.device().is_cpu() {
        return rotated_f64(xs, cos, sin, rows, pairing, order);
    }
    let (cos, sin) = (contiguous(cos)?, contiguous(sin)?);
    let xs = match last == 1 || dim <= 1 {
        true => Cow::Borrowed(xs),
        false => Cow::Owned(xs.contiguous()?),
    };
    let view = View::new("xs", &xs, order, Rank::Batched, 0)?;
    let starts: Vec<i64> = match rows.batched && batch > 1 {
        true => (0..batch).map(|b| (b * least) as i64).collect(),
        false => Vec::new(),
    };
    #[cfg(feature = "cuda")]
    if xs.device().is_cuda() {
        return crate::cuda::rotated_by_tables(&view, order, pairing, [&cos, &sin], &starts);
    }
    let rotary = rotation(dim / 2, pairing)?;
    let plan = rotary.shared.plan(view.dtype, &view.anew(order))?;
    let mut request = Request::<3>::new();
    let slot = request.read(&xs);
    let (of_cos, of_sin) = (request.read(&cos), request.read(&sin));
    let storage = request.run(|held| {
        by_dtype!(view.dtype, T => {
            let source = host::read::<T>(held.read(slot), view.start)?;
            let cos = table_of::<T>(&cos, &held, of_cos)?;
            let sin = table_of::<T>(&sin, &held, of_sin)?;
            let len = xs.elem_count();
            let mut elements = Vec::<T>::with_capacity(len);
            let angles = AngleAddresses::TableOfCall {
                cos: cos.as_ptr().expose_provenance() as u64,
                sin: sin.as_ptr().expose_provenance() as u64,
                rows: row_count(cos.len(), dim / 2)?,
            };
            let operand = TensorAddresses {
                source: source.as_ptr().expose_provenance() as u64,
                destination: elements.as_mut_ptr().expose_provenance() as u64,
            };
            let none = TensorAddresses::default();
            let positions = match starts[..] {
                [] => RawPositions::start(0),
                _ => {
                    let address = starts.as_ptr().expose_provenance() as u64;
                    RawPositions::start_per_sequence(Ids::at(address, IdType::I64, starts.len()))
                }
            };
            // SAFETY: the source reaches as far as candle's layout of it; the destination has room for
            // as many elements, and is new; the tables have the rows that are counted, and there is a
            // start for each sequence.
            unsafe {
                let rotator = &rotary.shared.host;
                rotator.rotate_raw_by(&plan, angles, operand, none, positions)?;
                // The destination's layout is contiguous, so all of it was written.
                elements.set_len(len);
            }
            Ok(Storage::Cpu(<T as crate::number::InStorage>::into_storage(elements)))
        })
    })?;
    let shape = xs.shape().clone();
    Ok(Tensor::from_storage(
        storage,
        shape,
        BackpropOp::none(),
        false,
    ))
}

/// How many rows a table of the call has.
pub(crate) fn row_count(len: usize, pairs: usize) -> Result<NonZeroU32> {
    let rows = len / pairs.max(1);
    let counted = u32::try_from(rows).ok().and_then(NonZeroU32::new);
    Ok(counted.ok_or(phasor::Error::TableTooLarge { rows, pairs })?)
}

/// A table in f32: as it is, or widened, which is exact.
fn table_of<'s, T: Number>(
    table: &Tensor,
    held: &Held<'s, 3>,
    slot: Slot,
) -> Result<Cow<'s, [f32]>> {
    let (storage, start) = (held.read(slot), table.layout().start_offset());
    let len = table.elem_count();
    if table.dtype() == DType::F32 {
        return Ok(Cow::Borrowed(&host::read::<f32>(storage, start)?[..len]));
    }
    let values = &host::read::<T>(storage, start)?[..len];
    Ok(Cow::Owned(
        values.iter().map(|value| value.widen()).collect(),
    ))
}

/// A rotation by tables that calls bring along. There is one for each number of pairs, with the plans of
/// its shapes.
pub(crate) fn rotation(pairs: usize, pairing: Pairing) -> Result<RotaryEmbedding> {
    /// More than the sizes of heads in a process, unless it reads them from where it should not.
    const MOST: usize = 16;
    static KNOWN: Mutex<Vec<(usize, Pairing, RotaryEmbedding)>> = Mutex::new(Vec::new());

    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((.., rotary)) = known.iter().find(|of| (of.0, of.1) == (pairs, pairing)) {
        return Ok(rotary.clone());
    }
    // Positions are within the tables of a call, as these are checked.
    let table = CosSinTable::new(vec![1.0; pairs], vec![0.0; pairs], pairs)?
        .with_out_of_range(OutOfRange::Clamp);
    let rotary = RotaryEmbedding::new(&Rope::new(table, pairing));
    known.truncate(MOST - 1);
    known.insert(0, (pairs, pairing, rotary.clone()));
    Ok(rotary)
}

/// f64, which phasor does not have: candle-nn's arithmetic in the order that it has there.
fn rotated_f64(
    xs: &Tensor,
    cos: &Tensor,
    sin: &Tensor,
    rows: Rows,
    pairing: Pairing,
    order: DimOrder,
) -> Result<Tensor> {
    let (_, second, third, dim) = xs.dims4()?;
    let pairs = dim / 2;
    let values = |tensor: &Tensor| tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
    let (mut elements, cos, sin) = (values(xs)?, values(cos)?, values(sin)?);
    for (n, head) in elements.chunks_exact_mut(dim).enumerate() {
        let token = match order {
            DimOrder::Bhtd => n % third,
            DimOrder::Bthd => n / third % second,
        };
        let sequence = match rows.batched {
            true => n / (second * third),
            false => 0,
        };
        let row = (sequence * rows.of_sequence + token) * pairs;
        for pair in 0..pairs {
            let (i, j) = match pairing {
                Pairing::HalfSplit => (pair, pair + pairs),
                Pairing::Interleaved => (2 * pair, 2 * pair + 1),
            };
            let (a, b, cos, sin) = (head[i], head[j], cos[row + pair], sin[row + pair]);
            head[i] = a * cos - b * sin;
            head[j] = a * sin + b * cos;
        }
    }
    Ok(Tensor::from_vec(elements, xs.shape(), xs.device())?)
}
