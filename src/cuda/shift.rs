//! Cached keys that move to other positions, on a device.

use cudarc::driver::CudaStream;
use cudarc::driver::sys::CUstream;

use super::CudaRotator;
use super::step::{CudaBytes, CudaKeyScales, OnDevice};
use crate::Error;
use crate::cache::KvCacheLayout;
use crate::call::VectorAddress;
use crate::element::Dtype;
use crate::launch::Family;
use crate::shift::{ShiftPlan, SlotRange};
use crate::step::Resolve;

impl CudaRotator {
    /// Checks the keys of a cache that are to be moved to other positions, as
    /// [`HostRotator::shift_plan`](crate::HostRotator::shift_plan).
    ///
    /// # Errors
    /// Those of [`ShiftPlan::new`] and [`ShiftPlan::check_device`]; [`Error::DtypeNotLoaded`] and those of
    /// [`Cuda::load_family`](super::Cuda::load_family).
    pub fn shift_plan(
        &self,
        dtype: Dtype,
        cache: &KvCacheLayout,
        rotary_offset: usize,
    ) -> Result<ShiftPlan, Error> {
        let plan = ShiftPlan::new(self.rope(), dtype, cache, rotary_offset)?;
        plan.check_device()?;
        self.loaded(dtype)?;
        if plan.is_in_cache() {
            self.cuda().load_family(Family::Fused, &[dtype])?;
        }
        Ok(plan)
    }

    /// Enqueues launches that move cached keys to other positions where they are, as
    /// [`HostRotator::shift_cached`](crate::HostRotator::shift_cached), with the same bits: one for each run
    /// of ranges without a gap where pages follow each other like their slots, at most three elsewhere.
    /// Nothing is enqueued if ranges, the cache or its scales are wrong. Ranges and distances are the
    /// launches' own, so that a captured graph repeats them.
    ///
    /// ```no_run
    /// use phasor::cuda::{Cuda, CudaKeyScales};
    /// use phasor::half::bf16;
    /// use phasor::{CacheLayout, Dtype, Frequencies, KvCacheLayout, Pairing, Rope, SlotRange};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let rope = Rope::new(Frequencies::from_theta(500_000.0, 128)?, Pairing::HalfSplit);
    /// let cuda = Cuda::open(0, &[Dtype::Bf16])?;
    /// let stream = cuda.context().default_stream();
    /// let shift = cuda.rotator(&rope.shift()?)?;
    /// let layout = KvCacheLayout::k(CacheLayout::paged_nhd(1024, 16, 8, 128));
    /// let plan = shift.shift_plan(Dtype::Bf16, &layout, 0)?;
    /// let mut keys = stream.alloc_zeros::<bf16>(1024 * 16 * 8 * 128)?;
    /// // A sequence of 40 tokens in pages 3, 4 and 8 drops 16 tokens before them.
    /// let ranges = [SlotRange::new(3 * 16..5 * 16, -16), SlotRange::new(8 * 16..8 * 16 + 8, -16)];
    /// shift.shift_cached(&stream, &plan, &mut keys, CudaKeyScales::None, &ranges)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::PlanMismatch`], [`Error::DeviceMismatch`], [`Error::BufferType`],
    /// [`Error::BufferUnaligned`], [`Error::BufferTooShort`], [`Error::Driver`], and those of
    /// [`ShiftPlan::calls`].
    pub fn shift_cached<'a>(
        &self,
        stream: &CudaStream,
        plan: &ShiftPlan,
        cache: impl Into<CudaBytes<'a>>,
        mut scales: CudaKeyScales<'_>,
        ranges: &[SlotRange<'_>],
    ) -> Result<(), Error> {
        self.cuda().expect_here("the stream", stream.context())?;
        let mut cache = cache.into();
        let mut on_device = OnDevice::new(self.cuda(), stream);
        let cache = Resolve::<f32, _>::bytes(&mut on_device, &mut cache)?;
        plan.check_cache(cache)?;
        let scales = plan.scale_address(&mut scales, &mut on_device)?;
        // SAFETY: lengths and contexts have been checked; the guards, dropped after this, order the
        // launches with other uses of the buffers.
        unsafe { self.shift_cached_raw(stream.cu_stream(), plan, cache.address, scales, ranges) }
    }

    /// The same on a raw stream, for a cache whose buffer is at an address; the layout's offset is added to
    /// it. `scales` are those that are given, one or one for each head, or the buffer of those that are
    /// written.
    ///
    /// # Errors
    /// [`Error::PlanMismatch`], [`Error::Driver`], and those of [`ShiftPlan::calls`].
    ///
    /// # Safety
    /// Those of [`rotate_raw`](Self::rotate_raw) for the cache and the scales.
    pub unsafe fn shift_cached_raw(
        &self,
        stream: CUstream,
        plan: &ShiftPlan,
        cache: u64,
        scales: Option<VectorAddress>,
        ranges: &[SlotRange<'_>],
    ) -> Result<(), Error> {
        if !plan.rope.is_same(self.rope()) {
            return Err(Error::PlanMismatch);
        }
        for call in plan.calls(cache, scales, self.inner.addresses, ranges)? {
            // SAFETY: the caller's; the angles are this rotator's.
            unsafe { self.enqueue_call(stream, &call)? };
        }
        Ok(())
    }
}
