//! The storages of one call, each locked once and all in one order, so that calls on several threads
//! cannot wait for each other.
//!
//! Candle lends a storage for writing only inside of an in-place op, one at a time: the op of the first
//! tensor runs that of the next one, and the innermost has them all.

use crate::{Error, Result};
use candle_core::{CpuStorage, CudaStorage, InplaceOp1, Layout, Storage, Tensor};
use std::cell::Cell;

/// The most tensors that positions are in: ids, rows of frequencies and offsets.
pub(crate) const OF_POSITIONS: usize = 3;

/// The place of a storage in a request.
pub(crate) type Slot = usize;

/// Storages that a call needs, of up to `N` tensors.
pub(crate) struct Request<'t, const N: usize> {
    wanted: [Option<Wanted<'t>>; N],
    /// Slots by their storages' addresses.
    order: [Slot; N],
    len: usize,
}

#[derive(Clone, Copy)]
struct Wanted<'t> {
    tensor: &'t Tensor,
    storage: usize,
    written: bool,
}

impl<'t, const N: usize> Request<'t, N> {
    pub(crate) fn new() -> Self {
        Self {
            wanted: [None; N],
            order: [0; N],
            len: 0,
        }
    }

    /// The storage of `tensor`, to be read.
    pub(crate) fn read(&mut self, tensor: &'t Tensor) -> Slot {
        self.add(tensor, false)
    }

    /// The storage of `tensor`, to be written where the tensor's elements are. Tensors of one storage have
    /// one slot.
    pub(crate) fn write(&mut self, tensor: &'t Tensor) -> Slot {
        self.add(tensor, true)
    }

    fn add(&mut self, tensor: &'t Tensor, written: bool) -> Slot {
        let storage = storage_of(tensor);
        for (slot, wanted) in self.wanted[..self.len].iter_mut().enumerate() {
            if let Some(wanted) = wanted
                && wanted.storage == storage
            {
                if written && !wanted.written {
                    (wanted.tensor, wanted.written) = (tensor, true);
                }
                return slot;
            }
        }
        self.wanted[self.len] = Some(Wanted {
            tensor,
            storage,
            written,
        });
        let mut at = self.len;
        while at > 0 && self.storage(self.order[at - 1]) > storage {
            self.order[at] = self.order[at - 1];
            at -= 1;
        }
        self.order[at] = self.len;
        self.len += 1;
        self.len - 1
    }

    fn storage(&self, slot: Slot) -> usize {
        self.wanted[slot].map_or(0, |wanted| wanted.storage)
    }

    /// Locks them all and calls `f`.
    pub(crate) fn run<R>(&self, f: impl FnOnce(Held<'_, N>) -> Result<R>) -> Result<R> {
        let inner = Inner {
            f: Cell::new(Some(f)),
            result: Cell::new(None),
        };
        let order = &self.order[..self.len];
        self.enter(order, Held(std::array::from_fn(|_| None)), &inner)?;
        inner.result.into_inner().unwrap_or_else(|| {
            let what = "candle did not run an op on a tensor of its own";
            Err(candle_core::Error::msg(what).into())
        })
    }

    fn enter<R, F>(
        &self,
        order: &[Slot],
        held: Held<'_, N>,
        inner: &Inner<F, R>,
    ) -> candle_core::Result<()>
    where
        F: FnOnce(Held<'_, N>) -> Result<R>,
    {
        let Some((&slot, rest)) = order.split_first() else {
            if let Some(f) = inner.f.take() {
                inner.result.set(Some(f(held)));
            }
            return Ok(());
        };
        let Some(wanted) = &self.wanted[slot] else {
            return self.enter(rest, held, inner);
        };
        if !wanted.written {
            let (storage, _) = wanted.tensor.storage_and_layout();
            return self.enter(rest, held.with(slot, Lent::Read(&storage)), inner);
        }
        wanted.tensor.inplace_op1(&Nest {
            request: self,
            slot,
            rest,
            held: Cell::new(Some(held)),
            inner,
        })
    }
}

/// What is done once all storages are locked, and what came of it. It stays in one place: handed on from
/// each op to the next, it would be copied as often.
struct Inner<F, R> {
    f: Cell<Option<F>>,
    result: Cell<Option<Result<R>>>,
}

/// What tells storages apart: the address of one, which tensors that share it have in common.
fn storage_of(tensor: &Tensor) -> usize {
    let (storage, _) = tensor.storage_and_layout();
    std::ptr::from_ref::<Storage>(&storage).addr()
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
    #[inline(always)]
    fn with(mut self, slot: Slot, lent: Lent<'a>) -> Self {
        self.0[slot] = Some(lent);
        self
    }

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

/// The op that holds one storage while those after it are locked.
struct Nest<'r, 't, 'h, F, R, const N: usize> {
    request: &'r Request<'t, N>,
    slot: Slot,
    rest: &'r [Slot],
    held: Cell<Option<Held<'h, N>>>,
    inner: &'r Inner<F, R>,
}

impl<F, R, const N: usize> Nest<'_, '_, '_, F, R, N>
where
    F: FnOnce(Held<'_, N>) -> Result<R>,
{
    fn go_on(&self, lent: Lent<'_>) -> candle_core::Result<()> {
        match self.held.take() {
            Some(held) => self
                .request
                .enter(self.rest, held.with(self.slot, lent), self.inner),
            None => Ok(()),
        }
    }
}

impl<F, R, const N: usize> InplaceOp1 for Nest<'_, '_, '_, F, R, N>
where
    F: FnOnce(Held<'_, N>) -> Result<R>,
{
    fn name(&self) -> &'static str {
        "rotary-embedding"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> candle_core::Result<()> {
        self.go_on(Lent::WriteCpu(storage))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut CudaStorage, _: &Layout) -> candle_core::Result<()> {
        self.go_on(Lent::WriteCuda(storage))
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
