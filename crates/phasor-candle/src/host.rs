//! Calls on host memory.

use crate::number::Number;
use crate::storages::{Lent, shared};
use crate::{Error, Result};
use candle_core::{CpuStorage, Storage};
use phasor::{HostRotator, InOut, Plan, Positions};

/// The elements of a storage from the first of a tensor on.
#[inline(always)]
pub(crate) fn read<T: Number>(storage: Option<&Storage>, start: usize) -> Result<&[T]> {
    match storage {
        Some(Storage::Cpu(storage)) => T::of(storage)
            .and_then(|elements| elements.get(start..))
            .ok_or_else(not_there),
        _ => Err(not_there()),
    }
}

/// The same, to be written.
#[inline(always)]
pub(crate) fn written<T: Number>(lent: Option<Lent<'_>>, start: usize) -> Result<&mut [T]> {
    match lent {
        Some(Lent::WriteCpu(storage)) => T::of_mut(storage)
            .and_then(|elements| elements.get_mut(start..))
            .ok_or_else(not_there),
        _ => Err(not_there()),
    }
}

/// What was asked for is there, unless tensors of unlike roles share a storage.
pub(crate) fn not_there() -> Error {
    shared("a tensor", "another of the call", "copy one of them")
}

/// Rotates to a new storage of `len` elements, all of which the plan writes unless the batch is ragged.
pub(crate) fn rotated<T: Number>(
    rotator: &HostRotator,
    plan: &Plan,
    source: &[T],
    len: usize,
    positions: Positions<'_>,
) -> Result<CpuStorage> {
    if positions.as_cu_seqlens().is_some() {
        let mut elements = vec![T::default(); len];
        let operand = (source, &mut elements[..]).into();
        rotator.rotate(plan, Some(operand), None, positions)?;
        return Ok(T::into_storage(elements));
    }
    let mut elements = Vec::with_capacity(len);
    let operand = (source, &mut elements.spare_capacity_mut()[..len]).into();
    rotator.rotate(plan, Some(operand), None, positions)?;
    // SAFETY: the destination's layout is contiguous and has `len` elements; without padding tokens all
    // of them were written.
    unsafe { elements.set_len(len) };
    Ok(T::into_storage(elements))
}

/// Rotates to a storage that is there.
pub(crate) fn rotate_into<T: Number>(
    rotator: &HostRotator,
    plan: &Plan,
    source: &[T],
    destination: &mut [T],
    positions: Positions<'_>,
) -> Result<()> {
    let operand = (source, destination).into();
    Ok(rotator.rotate(plan, Some(operand), None, positions)?)
}

/// Rotates where the elements are.
pub(crate) fn rotate<T: Number>(
    rotator: &HostRotator,
    plan: &Plan,
    q: &mut [T],
    k: Option<&mut [T]>,
    positions: Positions<'_>,
) -> Result<()> {
    let q = Some(InOut::InPlace(q));
    Ok(rotator.rotate(plan, q, k.map(InOut::InPlace), positions)?)
}
