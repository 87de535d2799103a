//! Whole steps on a device.

use std::array;

use cudarc::driver::{
    CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr, DeviceSlice,
    SyncOnDrop,
};

use super::driver::During;
use super::{Cuda, CudaRotator};
use crate::Error;
use crate::cache::Stored;
use crate::call::{RawPositions, TensorAddresses};
use crate::element::{Dtype, Element};
use crate::plan::Plan;
use crate::shift::KeyScalesIn;
use crate::step::{ByteSpan, CudaMemory, Memory, Resolve, Span, StageWeights, Step, resolve};

impl Memory for CudaMemory {
    type Read<'a, T: 'a> = CudaView<'a, T>;
    type Write<'a, T: 'a> = CudaViewMut<'a, T>;
    type Fill<'a, T: 'a> = CudaViewMut<'a, T>;
    type Bytes<'a> = CudaBytes<'a>;
    type Ids<'a> = CudaView<'a, u8>;
}

/// The operands of [`CudaRotator::step`].
pub type CudaStep<'a, T> = Step<'a, T, CudaMemory>;

/// What the stages of a tensor need, in device memory.
pub type CudaWeights<'a, T> = StageWeights<'a, T, CudaMemory>;

/// The scales of cached keys that are codes, in device memory.
pub type CudaKeyScales<'a> = KeyScalesIn<'a, CudaMemory>;

/// A cache, or room for codes or scales: elements, 8-bit codes, f32 scales, or bytes that may be any of
/// these. Made by `From` mutable slices and views.
#[derive(Debug)]
pub struct CudaBytes<'a> {
    pub(super) view: CudaViewMut<'a, u8>,
    /// Bytes of one value.
    pub(super) size: usize,
    pub(super) dtype: Option<Dtype>,
}

impl<'a> CudaBytes<'a> {
    fn of_slice<T: DeviceRepr>(values: &'a mut CudaSlice<T>, dtype: Option<Dtype>) -> Self {
        let (bytes, size) = (values.num_bytes(), size_of::<T>());
        // SAFETY: numbers have no padding, so their memory is bytes; whatever is written are numbers.
        let view = unsafe { values.transmute_mut::<u8>(bytes) };
        // As many bytes as there are always fit.
        let view = view.unwrap_or_else(|| unreachable!());
        Self { view, size, dtype }
    }

    fn of_view<T: DeviceRepr>(values: &'a mut CudaViewMut<'_, T>, dtype: Option<Dtype>) -> Self {
        let (bytes, size) = (values.num_bytes(), size_of::<T>());
        // SAFETY: as above.
        let view = unsafe { values.transmute_mut::<u8>(bytes) };
        let view = view.unwrap_or_else(|| unreachable!());
        Self { view, size, dtype }
    }
}

impl<'a, T: Element + DeviceRepr> From<&'a mut CudaSlice<T>> for CudaBytes<'a> {
    fn from(elements: &'a mut CudaSlice<T>) -> Self {
        Self::of_slice(elements, Some(T::DTYPE))
    }
}

impl<'a, T: Element + DeviceRepr> From<&'a mut CudaViewMut<'_, T>> for CudaBytes<'a> {
    fn from(elements: &'a mut CudaViewMut<'_, T>) -> Self {
        Self::of_view(elements, Some(T::DTYPE))
    }
}

impl<'a> From<&'a mut CudaSlice<u8>> for CudaBytes<'a> {
    fn from(bytes: &'a mut CudaSlice<u8>) -> Self {
        Self::of_slice(bytes, None)
    }
}

impl<'a> From<&'a mut CudaViewMut<'_, u8>> for CudaBytes<'a> {
    fn from(bytes: &'a mut CudaViewMut<'_, u8>) -> Self {
        Self::of_view(bytes, None)
    }
}

/// A word on the device that kernels set where a slot, a page or a sequence is outside of the caches.
///
/// It stays set until it is [cleared](Self::clear), whatever number of calls it has been given to, and so
/// does it over replays of a graph: clear it before those that it is to tell of, in the graph or before it.
#[derive(Debug)]
pub struct CudaReport {
    word: CudaSlice<u32>,
}

impl CudaReport {
    /// The word, for kernels of one's own: 0 until something is reported, then 1.
    pub fn word(&self) -> &CudaSlice<u32> {
        &self.word
    }

    /// Whether all was stored since it was last cleared. Waits for the work of `stream`.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn stored(&self, stream: &CudaStream) -> Result<Stored, Error> {
        let mut word = [0];
        let (address, _guard) = self.word.device_ptr(stream);
        // SAFETY: the word is there; the copy has ended before it is looked at.
        unsafe {
            cudarc::driver::result::memcpy_dtoh_async(&mut word, address, stream.cu_stream())
        }
        .during("reading a report")?;
        stream.synchronize().during("reading a report")?;
        Ok(match word {
            [0] => Stored::All,
            _ => Stored::NotAll,
        })
    }

    /// Clears it, in the order of `stream`.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn clear(&mut self, stream: &CudaStream) -> Result<(), Error> {
        let (address, _guard) = self.word.device_ptr_mut(stream);
        // SAFETY: the word is there, and the borrow keeps it for this.
        unsafe {
            cudarc::driver::result::memset_d8_async(
                address,
                0,
                size_of::<u32>(),
                stream.cu_stream(),
            )
        }
        .during("clearing a report")
    }
}

impl Cuda {
    /// A report, cleared.
    ///
    /// # Errors
    /// [`Error::Driver`] if memory cannot be allocated.
    pub fn report(&self) -> Result<CudaReport, Error> {
        let stream = self.context().default_stream();
        let word = super::upload(&stream, &[0u32])?;
        Ok(CudaReport { word })
    }
}

impl CudaRotator {
    /// Enqueues all that was planned, as [`HostRotator::step`](crate::HostRotator::step), as one launch.
    /// With a cache, `report` is told of slots outside of it; nothing is waited for.
    ///
    /// Where several tokens of a call have one slot, what it holds is of those tokens, but which dim is of
    /// which one is not specified.
    ///
    /// ```no_run
    /// use phasor::cuda::{Cuda, CudaStep};
    /// use phasor::half::bf16;
    /// use phasor::{
    ///     CacheLayout, Dtype, Frequencies, KvCacheLayout, Layout, Pairing, Positions, Problem, Rope, SlotsIn,
    ///     Stored,
    /// };
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let cuda = Cuda::open(0, &[Dtype::Bf16])?;
    /// let stream = cuda.context().default_stream();
    /// let rope = Rope::new(Frequencies::from_theta(500_000.0, 128)?, Pairing::HalfSplit);
    /// let rotator = cuda.rotator(&rope)?;
    /// // One new token of each of 5 sequences; 32 query, 8 key and 8 value heads; pages of 16.
    /// let window = |range| Layout::packed_heads(5, 1, 48, 128, range);
    /// let cache = CacheLayout::paged_nhd(1024, 16, 8, 128);
    /// let plan = rotator.plan(
    ///     &Problem::new(Dtype::Bf16)
    ///         .q(window(0..32))
    ///         .k_to_cache(window(32..40))
    ///         .v_to_cache(window(40..48))
    ///         .one_buffer()
    ///         .cache(KvCacheLayout::separate(cache, cache)),
    /// )?;
    /// let mut report = cuda.report()?;
    ///
    /// let mut qkv = stream.alloc_zeros::<bf16>(5 * 48 * 128)?;
    /// let mut k_cache = stream.alloc_zeros::<bf16>(1024 * 16 * 8 * 128)?;
    /// let mut v_cache = stream.alloc_zeros::<bf16>(1024 * 16 * 8 * 128)?;
    /// let lengths = stream.clone_htod(&[17i64, 4096, 3, 131_072, 40])?;
    /// let slots = stream.clone_htod(&[17i64, 96, 3, 72, 40])?;
    /// let step = CudaStep::new(phasor::cuda::CudaPositions::start_per_sequence(&lengths))
    ///     .buffer(qkv.as_view_mut())
    ///     .k_cache(&mut k_cache)
    ///     .v_cache(&mut v_cache)
    ///     .slots(SlotsIn::mapping(&slots));
    /// rotator.step(&stream, &plan, step, Some(&report))?;
    /// assert_eq!(report.stored(&stream)?, Stored::All);
    /// # let _ = &mut report;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`HostRotator::step`](crate::HostRotator::step) and [`rotate`](Self::rotate). Slots, pages and
    /// lengths in device memory are not looked at: what is outside of the caches is not stored, and
    /// reported.
    pub fn step<T: Element + DeviceRepr>(
        &self,
        stream: &CudaStream,
        plan: &Plan,
        mut step: CudaStep<'_, T>,
        report: Option<&CudaReport>,
    ) -> Result<(), Error> {
        if !plan.rope.is_same(self.rope()) {
            return Err(Error::PlanMismatch);
        }
        plan.check_dtype(T::DTYPE)?;
        self.loaded(T::DTYPE)?;
        self.cuda().expect_here("the stream", stream.context())?;
        let mut on_device = OnDevice::new(self.cuda(), stream);
        let report = report
            .map(|report| on_device.reads(&report.word))
            .transpose()?;
        let report = report.map(|word| word.address);
        let none = TensorAddresses::default();
        let mut addresses = self.rotation(none, none, RawPositions::start(0));
        resolve(plan, &mut step, report, &mut on_device, &mut addresses)?;
        // SAFETY: lengths and contexts have been checked; the plan proved, or its maker vouched, that the
        // layouts are free of overlap; the guards, dropped after this, order this launch with other uses
        // of the buffers.
        unsafe { self.enqueue(stream.cu_stream(), plan, &addresses) }
    }
}

/// Where operands in device memory are.
pub(super) struct OnDevice<'g> {
    cuda: &'g Cuda,
    stream: &'g CudaStream,
    /// As many as a step has operands: a report, 9 tensors and 2 of codes, 12 of weights, 4 of caches and
    /// scales, 3 of positions and 3 of slots.
    guards: [Option<SyncOnDrop<'g>>; 34],
}

impl<'g> OnDevice<'g> {
    pub(super) fn new(cuda: &'g Cuda, stream: &'g CudaStream) -> Self {
        Self {
            cuda,
            stream,
            guards: array::from_fn(|_| None),
        }
    }

    fn keep(&mut self, guard: SyncOnDrop<'g>) {
        if let Some(free) = self.guards.iter_mut().find(|guard| guard.is_none()) {
            *free = Some(guard);
        }
    }

    fn reads<U, S: DevicePtr<U>>(&mut self, view: &'g S) -> Result<Span, Error> {
        let context = view.stream().context();
        self.cuda.expect_here("an operand", context)?;
        let (address, guard) = view.device_ptr(self.stream);
        self.keep(guard);
        Ok(Span {
            address,
            len: view.len(),
        })
    }

    fn writes<U, S: DevicePtrMut<U>>(&mut self, view: &'g mut S) -> Result<Span, Error> {
        let context = view.stream().context();
        self.cuda.expect_here("an operand", context)?;
        let len = view.len();
        let (address, guard) = view.device_ptr_mut(self.stream);
        self.keep(guard);
        Ok(Span { address, len })
    }
}

impl<'g, T> Resolve<'g, T, CudaMemory> for OnDevice<'g> {
    fn read<U>(&mut self, view: &'g CudaView<'_, U>) -> Result<Span, Error> {
        self.reads(view)
    }

    fn write(&mut self, view: &'g mut CudaViewMut<'_, T>) -> Result<Span, Error> {
        self.writes(view)
    }

    fn fill(&mut self, view: &'g mut CudaViewMut<'_, T>) -> Result<Span, Error> {
        self.writes(view)
    }

    fn bytes(&mut self, bytes: &'g mut CudaBytes<'_>) -> Result<ByteSpan, Error> {
        let (size, dtype) = (bytes.size, bytes.dtype);
        let span = self.writes(&mut bytes.view)?;
        Ok(ByteSpan {
            address: span.address,
            len: span.len / size,
            size,
            dtype,
        })
    }

    fn ids(&mut self, ids: &'g CudaView<'_, u8>) -> Result<u64, Error> {
        Ok(self.reads(ids)?.address)
    }
}
