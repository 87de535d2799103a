//! Rotation and storing in caches, at once.

use crate::cache::{CacheOrder, KvCache, Slots};
use crate::number::by_dtype;
use crate::positions::same_device;
use crate::storages::{Lent, OF_POSITIONS, Request, shared};
use crate::view::{DimOrder, Rank, dtype_of};
use crate::{Error, Positions, Result, RotaryEmbedding, host};
use candle_core::{DType, Device, Tensor};
use phasor::{HostKvCache, KvCacheLayout, Plan, Problem, Stored};
use std::sync::atomic::Ordering;

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
        let device = q.device();
        let tensors = [q, k, v, cache.k, cache.v];
        for (name, tensor) in NAMES.into_iter().zip(tensors) {
            same_device(NAMES[0], device, name, tensor.device())?;
            if tensor.track_op() {
                return Err(Error::Tracked { tensor: name });
            }
        }
        if device.is_metal() {
            return Err(Error::Metal { tensor: NAMES[0] });
        }
        positions.place_on(device)?;
        slots.place_on(device)?;
        let mut request = Request::<{ 5 + OF_POSITIONS + 3 }>::new();
        let to_k = request.write(cache.k);
        let to_v = request.write(cache.v);
        let of_q = request.write(q);
        let of_k = request.read(k);
        let of_v = request.read(v);
        let mut asked = positions.request(&mut request);
        let slot_ids = slots.request(&mut request);
        for (name, slot) in NAMES.into_iter().zip([of_q, of_k, of_v]) {
            if [to_k, to_v].contains(&slot) {
                let remedy = "copy it out of the cache's tensor";
                return Err(shared(name, "a cache", remedy));
            }
        }
        let one_buffer = [of_k, of_v] == [of_q; 2];
        if !one_buffer && [of_k, of_v].contains(&of_q) {
            let remedy = "give q, k and v in one tensor, or q in one of its own";
            return Err(shared("q", "k or v, but not both", remedy));
        }
        let one_cache = to_k == to_v;

        // Where each begins, as the plan has it: buffers that hold several begin with the first of them.
        let mut starts = tensors.map(|tensor| tensor.layout().start_offset());
        let mut offsets = [0; 5];
        let mut share = |which: std::ops::Range<usize>| {
            let base = starts[which.clone()].iter().copied().min().unwrap_or(0);
            for (start, offset) in starts[which.clone()].iter_mut().zip(&mut offsets[which]) {
                (*start, *offset) = (base, *start - base);
            }
        };
        if one_buffer {
            share(0..3);
        }
        if one_cache {
            share(3..5);
        }
        let step = Step {
            tensors,
            manner: Manner {
                one_buffer,
                one_cache,
                offsets,
                cache_order: cache.order,
                dim_order: self.order,
                rotary_offset: self.rotary_offset,
            },
        };
        let plans = &self.shared.appends;
        let plan = plans.get(|known| known.is(&step), || self.plan_of(&step))?;
        asked.fit([plan.batch(), plan.tokens()])?;
        if plan.is_empty() {
            return Ok(Some(Stored::All));
        }
        let [q_start, k_start, v_start, cache_starts @ ..] = starts;
        request.run(|mut held| {
            #[cfg(feature = "cuda")]
            if device.is_cuda() {
                let kv = [(held.read(of_k), k_start), (held.read(of_v), v_start)];
                let tensors = crate::cuda::StepTensors {
                    q: (held.take(of_q), q_start),
                    kv: (!one_buffer).then_some(kv),
                    caches: [held.take(to_k), held.take(to_v)],
                    cache_starts,
                };
                let slots = (&slots, slot_ids);
                return by_dtype!(plan.dtype(), T => {
                    crate::cuda::append::<T, _>(&self.shared, &plan, tensors, &asked, slots, &held)?;
                    Ok(None)
                });
            }
            by_dtype!(plan.dtype(), T => {
                let caches = written_caches::<T>([held.take(to_k), held.take(to_v)], cache_starts)?;
                let q = host::written::<T>(held.take(of_q), q_start)?;
                let rotator = &self.shared.host;
                if one_buffer {
                    let (at, slots) = (asked.on_host(&held), slots.on_host(slot_ids, &held));
                    let stored = rotator.append_one_buffer(&plan, q, caches, at, slots)?;
                    return Ok(Some(stored));
                }
                let k = host::read::<T>(held.read(of_k), k_start)?;
                let v = host::read::<T>(held.read(of_v), v_start)?;
                let (q, k, v) = (Some(q.into()), Some(k.into()), Some(v.into()));
                let stored = rotator.append(
                    &plan, q, k, v, caches, asked.on_host(&held), slots.on_host(slot_ids, &held))?;
                Ok(Some(stored))
            })
        })
    }

    /// What a step is planned as, and its plan. All that is checked here depends on what [`Known`] has.
    fn plan_of(&self, step: &Step<'_>) -> Result<(Known, Plan)> {
        let [q, k, v, k_cache, v_cache] = step.tensors;
        let manner = step.manner;
        let view = |name, tensor, offset| -> Result<_> {
            let view = self.view(name, tensor, Rank::Either)?;
            Ok((view.layout.with_offset(offset), view.dtype))
        };
        let [of_q, of_k, of_v, of_caches @ ..] = manner.offsets;
        let (q, planned) = view(NAMES[0], q, of_q)?;
        let (k, k_dtype) = view(NAMES[1], k, of_k)?;
        let (v, v_dtype) = view(NAMES[2], v, of_v)?;
        let cache_dtypes = [dtype_of(NAMES[3], k_cache)?, dtype_of(NAMES[4], v_cache)?];
        for given in [k_dtype, v_dtype].into_iter().chain(cache_dtypes) {
            if given != planned {
                return Err(phasor::Error::DtypeMismatch { planned, given }.into());
            }
        }
        let mut caches = KvCache::new(k_cache, v_cache, manner.cache_order).layouts()?;
        for (cache, offset) in caches.iter_mut().zip(of_caches) {
            *cache = cache.with_offset(offset);
        }
        let cache = match manner.one_cache {
            true => KvCacheLayout::one_buffer((caches[0], caches[1])),
            false => KvCacheLayout::separate(caches[0], caches[1]),
        };
        let problem = Problem::new(planned).longer_buffers();
        let problem = problem.q(q).k_to_cache(k).v_to_cache(v).cache(cache);
        let problem = match manner.one_buffer {
            true => problem.one_buffer(),
            false => problem,
        };
        let known = Known {
            tensors: step.tensors.map(Strided::of),
            manner,
        };
        Ok((known, Plan::new(&self.shared.rope, &problem)?))
    }
}

/// The tensors of a call, in this order.
const NAMES: [&str; 5] = ["q", "k", "v", "k's cache", "v's cache"];

/// A call, as far as its plan depends on it.
struct Step<'t> {
    tensors: [&'t Tensor; 5],
    manner: Manner,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Manner {
    /// q, k and v are windows of one tensor.
    one_buffer: bool,
    /// So are the caches.
    one_cache: bool,
    /// Where the tensors begin in such a buffer.
    offsets: [usize; 5],
    cache_order: CacheOrder,
    dim_order: DimOrder,
    rotary_offset: usize,
}

/// A call that there is a plan for. It is compared with calls' tensors as these are: made into layouts at
/// each call, they would cost more than the rest of what precedes a rotation.
#[derive(Debug)]
pub(crate) struct Known {
    tensors: [Strided; 5],
    manner: Manner,
}

impl Known {
    #[inline]
    fn is(&self, step: &Step<'_>) -> bool {
        let [q, k, v, k_cache, v_cache] = step.tensors;
        let known = &self.tensors;
        known[0].is(q)
            && known[1].is(k)
            && known[2].is(v)
            && known[3].is(k_cache)
            && known[4].is(v_cache)
            && self.manner == step.manner
    }
}

/// What a tensor is but for its place: of up to five dims, which the checks of a call see to.
#[derive(Debug)]
struct Strided {
    dtype: DType,
    dims: Words,
    strides: Words,
}

impl Strided {
    fn of(tensor: &Tensor) -> Self {
        Self {
            dtype: tensor.dtype(),
            dims: Words::of(tensor.dims()),
            strides: Words::of(tensor.stride()),
        }
    }

    #[inline]
    fn is(&self, tensor: &Tensor) -> bool {
        self.dtype == tensor.dtype()
            && self.dims.are(tensor.dims())
            && self.strides.are(tensor.stride())
    }
}

#[derive(Debug)]
struct Words {
    words: [usize; 5],
    len: usize,
}

impl Words {
    fn of(given: &[usize]) -> Self {
        let mut words = [0; 5];
        words
            .iter_mut()
            .zip(given)
            .for_each(|(to, word)| *to = *word);
        Self {
            words,
            len: given.len(),
        }
    }

    #[inline]
    fn are(&self, given: &[usize]) -> bool {
        match <&[usize; 4]>::try_from(given) {
            // Nearly always, and without a loop.
            Ok(four) => {
                let [a, b, c, d, _] = self.words;
                self.len == 4 && [a, b, c, d] == *four
            }
            Err(_) => self.words.get(..self.len) == Some(given),
        }
    }
}

/// The caches of a call: two storages, or one.
#[inline(always)]
fn written_caches<'s, T: crate::number::Number>(
    caches: [Option<Lent<'s>>; 2],
    [k, v]: [usize; 2],
) -> Result<HostKvCache<'s, T>> {
    Ok(match caches {
        [both, None] => HostKvCache::OneBuffer(host::written(both, k)?),
        [of_k, of_v] => HostKvCache::Separate {
            k: Some(host::written(of_k, k)?),
            v: Some(host::written(of_v, v)?),
        },
    })
}
