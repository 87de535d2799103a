//! The storages of one call, each locked once, whatever tensors share it.
//!
//! A call waits for a lock only while it holds none, so that it cannot be one of several that wait for each
//! other: neither with others of this crate nor with ops of candle, some of which hold one storage while they
//! wait for the next.

use crate::{Error, Result};
use candle_core::{CpuStorage, CudaStorage, Storage, StorageMutRef, StorageRef, Tensor};
use parking_lot::RwLock;

/// The most tensors that positions are in: ids, rows of frequencies and offsets.
pub(crate) const OF_POSITIONS: usize = 3;

/// The place of a storage in a request.
pub(crate) type Slot = usize;

/// Storages that a call needs, of up to `N` tensors, by slot.
pub(crate) struct Request<'t, const N: usize> {
    wanted: [Option<Wanted<'t>>; N],
    len: usize,
}

#[derive(Clone, Copy)]
struct Wanted<'t> {
    lock: &'t RwLock<Storage>,
    written: bool,
}

impl<'t, const N: usize> Request<'t, N> {
    pub(crate) fn new() -> Self {
        Self {
            wanted: [None; N],
            len: 0,
        }
    }

    /// The storage of `tensor`, to be read.
    pub(crate) fn read(&mut self, tensor: &'t Tensor) -> Slot {
        self.add(tensor, false)
    }

    /// The storage of `tensor`, to be written. Tensors of one storage have one slot.
    pub(crate) fn write(&mut self, tensor: &'t Tensor) -> Slot {
        self.add(tensor, true)
    }

    fn add(&mut self, tensor: &'t Tensor, written: bool) -> Slot {
        // Candle gives a storage's lock away only with the storage: nothing is held beyond this.
        let lock = StorageRef::rwlock(&tensor.storage_and_layout().0);
        let mut known = self.wanted[..self.len].iter().flatten();
        match known.position(|wanted| std::ptr::eq(wanted.lock, lock)) {
            Some(slot) => {
                if let Some(wanted) = &mut self.wanted[slot] {
                    wanted.written |= written;
                }
                slot
            }
            None => {
                let slot = self.len;
                self.wanted[slot] = Some(Wanted { lock, written });
                self.len += 1;
                slot
            }
        }
    }

    /// Locks them all and calls `f`.
    #[inline]
    pub(crate) fn run<R>(&self, f: impl FnOnce(Held<'_, N>) -> Result<R>) -> Result<R> {
        let mut guards = [const { None }; N];
        let wanted = &self.wanted[..self.len];
        while let Err(busy) = try_all(wanted, &mut guards) {
            // None is held here. The next attempt begins with the one that was waited for.
            guards = [const { None }; N];
            guards[busy] = wanted[busy].map(Wanted::wait);
        }
        let mut held = Held([const { None }; N]);
        for (lent, guard) in held.0.iter_mut().zip(&mut guards[..self.len]) {
            *lent = guard.as_mut().map(Guard::lend);
        }
        f(held)
    }
}

/// Locks all that are not locked yet, or says which one is in use.
#[inline]
fn try_all<'t>(
    wanted: &[Option<Wanted<'t>>],
    guards: &mut [Option<Guard<'t>>],
) -> std::result::Result<(), Slot> {
    for (slot, (wanted, guard)) in wanted.iter().zip(guards).enumerate() {
        if let (Some(wanted), None) = (wanted, &guard) {
            *guard = wanted.attempt();
            if guard.is_none() {
                return Err(slot);
            }
        }
    }
    Ok(())
}

impl<'t> Wanted<'t> {
    #[inline]
    fn attempt(&self) -> Option<Guard<'t>> {
        match self.written {
            true => self.lock.try_write().map(Guard::Write),
            false => self.lock.try_read().map(Guard::Read),
        }
    }

    fn wait(self) -> Guard<'t> {
        match self.written {
            true => Guard::Write(self.lock.write()),
            false => Guard::Read(self.lock.read()),
        }
    }
}

/// A lock that is held.
enum Guard<'t> {
    Read(StorageRef<'t>),
    Write(StorageMutRef<'t>),
}

impl Guard<'_> {
    #[inline]
    fn lend(&mut self) -> Lent<'_> {
        match self {
            Guard::Read(storage) => Lent::Read(storage),
            Guard::Write(storage) => match &mut **storage {
                Storage::Cpu(storage) => Lent::WriteCpu(storage),
                Storage::Cuda(storage) => Lent::WriteCuda(storage),
                // Refused before: no call takes a tensor on Metal.
                other @ Storage::Metal(_) => Lent::Read(other),
            },
        }
    }
}

/// A storage that is locked.
pub(crate) enum Lent<'a> {
    Read(&'a Storage),
    WriteCpu(&'a mut CpuStorage),
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "there is none"))]
    WriteCuda(&'a mut CudaStorage),
}

/// The storages of a request.
pub(crate) struct Held<'a, const N: usize>([Option<Lent<'a>>; N]);

impl<'a, const N: usize> Held<'a, N> {
    /// A storage, which then is no longer here.
    pub(crate) fn take(&mut self, slot: Slot) -> Option<Lent<'a>> {
        self.0[slot].take()
    }

    /// A storage that was to be read.
    pub(crate) fn read(&self, slot: Slot) -> Option<&'a Storage> {
        match self.0[slot] {
            Some(Lent::Read(storage)) => Some(storage),
            _ => None,
        }
    }
}

/// The refusal of tensors that share a storage in a way that calls do not take.
pub(crate) fn shared(first: &'static str, second: &'static str, remedy: &'static str) -> Error {
    Error::SharedStorage {
        first,
        second,
        remedy,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};

    #[test]
    fn a_storage_is_locked_once_and_written_if_any_tensor_of_it_is() {
        let [shared, other] = [0, 1].map(|_| Tensor::zeros(4, DType::F32, &Device::Cpu).unwrap());
        let window = shared.narrow(0, 1, 2).unwrap();
        let mut request = Request::<3>::new();
        let slots = [
            request.read(&shared),
            request.read(&other),
            request.write(&window),
        ];
        assert_eq!(slots, [0, 1, 0]);
        let lent = request.run(|mut held| {
            assert!(held.read(0).is_none() && held.read(1).is_some());
            Ok([0, 1, 2].map(|slot| match held.take(slot) {
                Some(Lent::Read(_)) => "to be read",
                Some(_) => "to be written",
                None => "none",
            }))
        });
        assert_eq!(lent.unwrap(), ["to be written", "to be read", "none"]);
    }
}
