//! The storages of one call, each locked once and all in one order, so that calls on several threads
//! cannot wait for each other.
//!
//! The order is that of candle's own in-place ops: by the addresses of the locks.

use crate::{Error, Result};
use candle_core::{CpuStorage, CudaStorage, Storage, StorageMutRef, StorageRef, Tensor};

/// The most tensors that positions are in: ids, rows of frequencies and offsets.
pub(crate) const OF_POSITIONS: usize = 3;

/// The place of a storage in a request.
pub(crate) type Slot = usize;

/// Storages that a call needs, of up to `N` tensors.
pub(crate) struct Request<'t, const N: usize> {
    /// By slot.
    wanted: [Option<Wanted<'t>>; N],
    /// The addresses of storages' locks, ascending, and their slots.
    order: [(usize, Slot); N],
    len: usize,
}

#[derive(Clone, Copy)]
struct Wanted<'t> {
    tensor: &'t Tensor,
    written: bool,
}

impl<'t, const N: usize> Request<'t, N> {
    pub(crate) fn new() -> Self {
        Self {
            wanted: [None; N],
            order: [(0, 0); N],
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
        let lock = lock_of(tensor);
        let known = self.order[..self.len]
            .iter()
            .find(|(other, _)| *other == lock);
        if let Some(&(_, slot)) = known {
            if let Some(wanted) = &mut self.wanted[slot] {
                wanted.written |= written;
            }
            return slot;
        }
        let slot = self.len;
        let mut at = slot;
        while at > 0 && self.order[at - 1].0 > lock {
            self.order[at] = self.order[at - 1];
            at -= 1;
        }
        self.order[at] = (lock, slot);
        self.wanted[slot] = Some(Wanted { tensor, written });
        self.len += 1;
        slot
    }

    /// Locks them all and calls `f`.
    #[inline]
    pub(crate) fn run<R>(&self, f: impl FnOnce(Held<'_, N>) -> Result<R>) -> Result<R> {
        let mut guards = [const { None }; N];
        let order = &self.order[..self.len];
        for (guard, &(_, slot)) in guards.iter_mut().zip(order) {
            *guard = self.wanted[slot].map(Wanted::lock);
        }
        let mut held = Held([const { None }; N]);
        for (guard, &(_, slot)) in guards.iter_mut().zip(order) {
            held.0[slot] = guard.as_mut().map(Guard::lend);
        }
        f(held)
    }
}

impl<'t> Wanted<'t> {
    #[inline]
    fn lock(self) -> Guard<'t> {
        let (storage, _) = self.tensor.storage_and_layout();
        if !self.written {
            return Guard::Read(storage);
        }
        let lock = StorageRef::rwlock(&storage);
        drop(storage);
        Guard::Write(lock.write())
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

/// What tells storages apart: the address of one's lock, which tensors that share it have in common.
fn lock_of(tensor: &Tensor) -> usize {
    let (storage, _) = tensor.storage_and_layout();
    std::ptr::from_ref(StorageRef::rwlock(&storage)).addr()
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
