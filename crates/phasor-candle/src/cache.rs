use crate::number::by_dtype;
use crate::plans::Work;
use crate::positions::{Ids, same_device};
use crate::storages::{Lent, OF_POSITIONS, Request, Slot, shared};
use crate::view::{Rank, View, dtype_of};
use crate::{Error, Positions, Result, RotaryEmbedding, host};
use candle_core::{Device, Tensor};
use phasor::{CacheLayout, HostKvCache, SlotsIn, Stored};
use std::sync::atomic::Ordering;

/// The order of the dims of a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CacheOrder {
    /// `[pages, page_size, heads, head_dim]` (NHD), of any strides; contiguous caches `[batch, tokens,
    /// heads, head_dim]` too, where each sequence is a page.
    Nhd,
    /// `[pages, heads, page_size, head_dim]` (HND), of any strides; contiguous caches `[batch, heads,
    /// tokens, head_dim]` too, as candle-nn's `KvCache` has them.
    Hnd,
    /// Keys `[pages, heads, head_dim / x, page_size, x]` and values `[pages, heads, head_dim,
    /// page_size]`, both contiguous (mistral.rs, older vLLM).
    Packed,
}

/// Caches of keys and values, which are written.
#[derive(Clone, Copy, Debug)]
pub struct KvCache<'a> {
    k: &'a Tensor,
    v: &'a Tensor,
    order: CacheOrder,
}

impl<'a> KvCache<'a> {
    /// Two caches: tensors of their own, or windows of one.
    pub fn new(k: &'a Tensor, v: &'a Tensor, order: CacheOrder) -> Self {
        Self { k, v, order }
    }

    #[inline(always)]
    fn layouts(&self) -> Result<[CacheLayout; 2]> {
        match self.order {
            CacheOrder::Nhd | CacheOrder::Hnd => {
                let (k, v) = (("k's cache", self.k), ("v's cache", self.v));
                Ok([strided(k, self.order)?, strided(v, self.order)?])
            }
            CacheOrder::Packed => {
                let &[pages, heads, blocks, page_size, x] = self.k.dims() else {
                    let expected = "[pages, heads, head_dim / x, page_size, x]";
                    return Err(shape("k's cache", expected, self.k));
                };
                let &[v_pages, v_heads, dim, v_page_size] = self.v.dims() else {
                    let expected = "[pages, heads, head_dim, page_size]";
                    return Err(shape("v's cache", expected, self.v));
                };
                for (name, tensor) in [("k's cache", self.k), ("v's cache", self.v)] {
                    if !tensor.is_contiguous() {
                        return Err(shape(name, "contiguous in this order", tensor));
                    }
                }
                Ok([
                    CacheLayout::paged_packed(pages, page_size, heads, blocks * x, x),
                    CacheLayout::paged_transposed(v_pages, v_page_size, v_heads, dim),
                ])
            }
        }
    }
}

fn shape(tensor: &'static str, expected: &'static str, got: &Tensor) -> Error {
    Error::Shape {
        tensor,
        expected,
        got: got.dims().to_vec(),
    }
}

#[inline(always)]
fn strided((name, tensor): (&'static str, &Tensor), order: CacheOrder) -> Result<CacheLayout> {
    let (&[pages, second, third, dim], &[page, a, b, last]) = (tensor.dims(), tensor.stride())
    else {
        let expected = match order {
            CacheOrder::Nhd => "[pages, page_size, heads, head_dim]",
            _ => "[pages, heads, page_size, head_dim]",
        };
        return Err(shape(name, expected, tensor));
    };
    if last != 1 && dim > 1 {
        return Err(Error::Strided {
            tensor: name,
            stride: last,
        });
    }
    Ok(match order {
        CacheOrder::Nhd => {
            CacheLayout::paged_nhd(pages, second, third, dim).with_strides(page, a, b)
        }
        _ => CacheLayout::paged_hnd(pages, third, second, dim).with_strides(page, b, a),
    })
}

/// Which slot of the caches each token is stored in. No slot can make a call write outside of the caches:
/// what lies outside is not stored, and the call says so ([`Stored`]).
#[derive(Clone, Debug)]
pub struct Slots<'a>(Choice<'a>);

#[derive(Clone, Debug)]
enum Choice<'a> {
    Mapping(Ids<'a>),
    PageTable(Ids<'a>, Ids<'a>),
    PageIndices(Ids<'a>, Ids<'a>, Ids<'a>),
    Sequences(Ids<'a>),
}

impl Choice<'_> {
    fn placed_on(self, device: &Device) -> Result<Self> {
        Ok(match self {
            Choice::Mapping(slots) => Choice::Mapping(slots.on(device, "slots")?),
            Choice::PageTable(pages, lengths) => Choice::PageTable(
                pages.on(device, "pages")?,
                lengths.on(device, "cache lengths")?,
            ),
            Choice::PageIndices(indptr, indices, lengths) => Choice::PageIndices(
                indptr.on(device, "indptr")?,
                indices.on(device, "page indices")?,
                lengths.on(device, "cache lengths")?,
            ),
            Choice::Sequences(lengths) => Choice::Sequences(lengths.on(device, "cache lengths")?),
        })
    }
}

impl<'a> Slots<'a> {
    /// A slot for each token, `[batch, tokens]` (slot_mapping): slot `n` is slot `n % page_size` of page
    /// `n / page_size`. A token whose slot is negative is not stored; its q is rotated all the same.
    pub fn mapping(slots: impl Into<Ids<'a>>) -> Self {
        Self(Choice::Mapping(slots.into()))
    }

    /// The pages of each sequence, `[sequences, pages of a sequence]` (block_table), and how many tokens
    /// its cache holds before this call, `[sequences]`: the new ones follow.
    pub fn page_table(pages: impl Into<Ids<'a>>, lengths: impl Into<Ids<'a>>) -> Self {
        Self(Choice::PageTable(pages.into(), lengths.into()))
    }

    /// The same with the pages of all sequences one after the other: those of sequence `s` are
    /// `indices[indptr[s]..indptr[s + 1]]`; `indptr` has `sequences + 1` values.
    pub fn page_indices(
        indptr: impl Into<Ids<'a>>,
        indices: impl Into<Ids<'a>>,
        lengths: impl Into<Ids<'a>>,
    ) -> Self {
        Self(Choice::PageIndices(
            indptr.into(),
            indices.into(),
            lengths.into(),
        ))
    }

    /// Each sequence has a page of its own, that of its number, and holds so many tokens before this call,
    /// `[sequences]`: contiguous caches.
    pub fn sequences(lengths: impl Into<Ids<'a>>) -> Self {
        Self(Choice::Sequences(lengths.into()))
    }

    /// As `Positions::place_on`.
    #[inline]
    fn place_on(&mut self, device: &Device) -> Result<()> {
        if device.is_cpu() && !self.ids().into_iter().flatten().any(Ids::is_tensor) {
            return Ok(());
        }
        self.0 = self.0.clone().placed_on(device)?;
        Ok(())
    }

    fn ids(&self) -> [Option<&Ids<'a>>; 3] {
        match &self.0 {
            Choice::Mapping(ids) | Choice::Sequences(ids) => [Some(ids), None, None],
            Choice::PageTable(pages, lengths) => [Some(pages), Some(lengths), None],
            Choice::PageIndices(indptr, indices, lengths) => {
                [Some(indptr), Some(indices), Some(lengths)]
            }
        }
    }

    fn request<'t, const N: usize>(&'t self, request: &mut Request<'t, N>) -> [Option<Slot>; 3] {
        self.ids()
            .map(|ids| ids.and_then(|ids| ids.request(request)))
    }

    /// As phasor takes them; `memory` has ids, whose storage is in the given slot.
    #[inline(always)]
    pub(crate) fn given<'s, M>(
        &'s self,
        [first, second, third]: [Option<Slot>; 3],
        mut memory: impl FnMut(&'s Ids<'a>, Option<Slot>) -> Result<phasor::Ids<M>>,
    ) -> Result<SlotsIn<M>> {
        Ok(match &self.0 {
            Choice::Mapping(ids) => SlotsIn::mapping(memory(ids, first)?),
            Choice::PageTable(pages, lengths) => {
                SlotsIn::page_table(memory(pages, first)?, memory(lengths, second)?)
            }
            Choice::PageIndices(indptr, indices, lengths) => SlotsIn::page_indices(
                memory(indptr, first)?,
                memory(indices, second)?,
                memory(lengths, third)?,
            ),
            Choice::Sequences(lengths) => SlotsIn::sequences(memory(lengths, first)?),
        })
    }
}

/// A tensor of a call, and its storage.
type Placed<'t> = (View<'t>, Slot);

impl RotaryEmbedding {
    /// What lies between the projection and the attention of a layer, at once: rotates `q` where it is, and
    /// stores rotated `k` and `v` in their caches. `k` and `v` are only read, and have dims in the same
    /// order as `q`, or all three are `[tokens, heads, head_dim]`. q, k and v are windows of one tensor
    /// (packed qkv), or q is a tensor of its own.
    ///
    /// On a CUDA device this is one launch, and waits for it, to say what was stored;
    /// [`append_later`](Self::append_later) does not wait. Where several tokens of a call have one slot, it
    /// holds the last of them on the CPU, and parts of any of them on a CUDA device.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use phasor_candle::{CacheOrder, KvCache, Slots, Stored};
    ///
    /// # fn main() -> Result<(), phasor_candle::Error> {
    /// # let rope = phasor::Rope::new(
    /// #     phasor::Frequencies::from_theta(1e4, 64)?, phasor::Pairing::HalfSplit);
    /// # let rotary = phasor_candle::RotaryEmbedding::new(&rope);
    /// let ones = |heads| Tensor::ones((1, heads, 7, 64), DType::F32, &Device::Cpu);
    /// let (q, k, v) = (ones(8)?, ones(2)?, ones(2)?);
    /// let room = || Tensor::zeros((1, 2, 512, 64), DType::F32, &Device::Cpu);
    /// let (k_cache, v_cache) = (room()?, room()?);
    /// let cache = KvCache::new(&k_cache, &v_cache, CacheOrder::Hnd);
    /// let stored = rotary.append(&q, &k, &v, cache, 100, Slots::sequences(&[100u32]))?;
    /// assert_eq!(stored, Stored::All); // NotAll: some slot was outside of the caches
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error`]: each names what to change. Nothing is written then.
    pub fn append<'p>(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        cache: KvCache<'_>,
        positions: impl Into<Positions<'p>>,
        slots: Slots<'_>,
    ) -> Result<Stored> {
        match self.appended([q, k, v], cache, positions.into(), slots)? {
            Some(stored) => Ok(stored),
            None => self.stored(q.device()),
        }
    }

    /// The same without waiting for a device. Whether all was stored, [`stored`](Self::stored) tells.
    ///
    /// # Errors
    /// Those of [`append`](Self::append).
    pub fn append_later<'p>(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        cache: KvCache<'_>,
        positions: impl Into<Positions<'p>>,
        slots: Slots<'_>,
    ) -> Result<()> {
        if let Some(Stored::NotAll) = self.appended([q, k, v], cache, positions.into(), slots)? {
            self.shared.missed.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Whether all was stored by [`append_later`](Self::append_later) of this rotation and its clones on a
    /// device since this was last asked. Waits for the device.
    ///
    /// # Errors
    /// [`Error::Phasor`] if the device fails.
    pub fn stored(&self, device: &Device) -> Result<Stored> {
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = device {
            return self.shared.cuda.stored(device);
        }
        let missed = device.is_cpu() && self.shared.missed.swap(false, Ordering::Relaxed);
        Ok(match missed {
            true => Stored::NotAll,
            false => Stored::All,
        })
    }

    /// What was stored, where that is known at once.
    fn appended(
        &self,
        [q, k, v]: [&Tensor; 3],
        cache: KvCache<'_>,
        mut positions: Positions<'_>,
        mut slots: Slots<'_>,
    ) -> Result<Option<Stored>> {
        let q = self.view("q", q, Rank::Either)?;
        q.check_untracked()?;
        let k = self.view("k", k, Rank::Either)?;
        let v = self.view("v", v, Rank::Either)?;
        for view in [&k, &v] {
            view.check_untracked()?;
            view.check_beside(&q)?;
        }
        let device = q.tensor.device();
        let mut caches = [("k's cache", cache.k), ("v's cache", cache.v)].into_iter();
        caches.try_for_each(|(name, tensor)| {
            same_device(q.name, device, name, tensor.device())?;
            if tensor.track_op() {
                return Err(Error::Tracked { tensor: name });
            }
            let given = dtype_of(name, tensor)?;
            if given != q.dtype {
                let planned = q.dtype;
                return Err(phasor::Error::DtypeMismatch { planned, given }.into());
            }
            Ok(())
        })?;
        positions.place_on(device)?;
        slots.place_on(device)?;
        let mut request = Request::<{ 5 + OF_POSITIONS + 3 }>::new();
        let to_k = request.write(cache.k);
        let to_v = request.write(cache.v);
        let q = (q, request.write(q.tensor));
        let k = (k, request.read(k.tensor));
        let v = (v, request.read(v.tensor));
        let asked = positions.request(&mut request);
        let slot_ids = slots.request(&mut request);
        for (view, slot) in [&q, &k, &v] {
            if [to_k, to_v].contains(slot) {
                let remedy = "copy it out of the cache's tensor";
                return Err(shared(view.name, "a cache", remedy));
            }
        }
        let packed = [k.1, v.1] == [q.1; 2];
        if !packed && [k.1, v.1].contains(&q.1) {
            let remedy = "give q, k and v in one tensor, or q in one of its own";
            return Err(shared("q", "k or v, but not both", remedy));
        }

        let starts = [cache.k, cache.v].map(|tensor| tensor.layout().start_offset());
        let cache_base = starts[0].min(starts[1]);
        let one_cache = to_k == to_v;
        let mut caches = cache.layouts()?;
        if one_cache {
            let places = caches.iter_mut().zip(starts);
            places.for_each(|(cache, start)| *cache = cache.with_offset(start - cache_base));
        }
        let base = q.0.start.min(k.0.start).min(v.0.start);
        let at = |view: &View<'_>| match packed {
            true => view.from(base),
            false => view.layout,
        };
        let work = Work::Append {
            q: at(&q.0),
            k: at(&k.0),
            v: at(&v.0),
            one_buffer: packed,
            caches,
            one_cache,
        };
        let plan = self.shared.plan(q.0.dtype, &work)?;
        if plan.is_empty() {
            return Ok(Some(Stored::All));
        }
        request.run(|mut held| {
            #[cfg(feature = "cuda")]
            if device.is_cuda() {
                let kv = [&k, &v].map(|(view, slot)| (held.read(*slot), view.start));
                let tensors = crate::cuda::StepTensors {
                    q: (held.take(q.1), if packed { base } else { q.0.start }),
                    kv: (!packed).then_some(kv),
                    caches: [held.take(to_k), held.take(to_v)],
                    cache_starts: if one_cache { [cache_base; 2] } else { starts },
                };
                let slots = (&slots, slot_ids);
                return by_dtype!(q.0.dtype, T => {
                    crate::cuda::append::<T, _>(&self.shared, &plan, tensors, &asked, slots, &held)?;
                    Ok(None)
                });
            }
            let given = asked.on_host(q.0.counts(), &held)?;
            let slots = slots.given(slot_ids, |ids, slot| ids.on_host(slot, &held))?;
            by_dtype!(q.0.dtype, T => {
                let caches = (held.take(to_k), held.take(to_v));
                let caches = written_caches::<T>(caches, starts, cache_base)?;
                let rotator = &self.shared.host;
                if packed {
                    let buffer = host::written::<T>(held.take(q.1), base)?;
                    let stored = rotator.append_one_buffer(&plan, buffer, caches, given, slots)?;
                    return Ok(Some(stored));
                }
                let read = |(view, slot): &Placed<'_>| host::read::<T>(held.read(*slot), view.start);
                let (k, v) = (read(&k)?, read(&v)?);
                let to = host::written::<T>(held.take(q.1), q.0.start)?;
                let (to, k, v) = (Some(to.into()), Some(k.into()), Some(v.into()));
                let stored = rotator.append(&plan, to, k, v, caches, given, slots)?;
                Ok(Some(stored))
            })
        })
    }
}

/// The caches of a call: two storages, or one which begins at `base`.
fn written_caches<'s, T: crate::number::Number>(
    caches: (Option<Lent<'s>>, Option<Lent<'s>>),
    [k, v]: [usize; 2],
    base: usize,
) -> Result<HostKvCache<'s, T>> {
    Ok(match caches {
        (both, None) => HostKvCache::OneBuffer(host::written(both, base)?),
        (of_k, of_v) => HostKvCache::Separate {
            k: Some(host::written(of_k, k)?),
            v: Some(host::written(of_v, v)?),
        },
    })
}
