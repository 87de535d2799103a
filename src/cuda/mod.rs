//! The CUDA backend, on [`cudarc`].
//!
//! [`Cuda`] holds loaded kernels, [`CudaRotator`] a rotation's angles on the device. Both are
//! immutable, cheap to clone, `Send` and `Sync`. Enqueueing a rotation allocates nothing and
//! synchronises nothing.
//!
//! # Graphs
//!
//! A rotation can be captured in a graph and replayed with new positions in device memory. As
//! with every launch through cudarc's slices, switch its event tracking off
//! (`CudaContext::disable_event_tracking`) before the buffers are allocated: its events are
//! recorded outside the capture, and waiting for them breaks it. [`CudaRotator::rotate_raw`] waits
//! for nothing. A graph holds addresses: keep the rotator and the buffers as long as the graph.

mod driver;
mod enqueue;
mod image;
mod shift;
mod step;

use std::mem::ManuallyDrop;
use std::sync::Arc;

use cudarc::driver::result;
use cudarc::driver::sys::{CUdevice_attribute, CUstream};
use cudarc::driver::{
    CudaContext, CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr,
    DeviceSlice, SyncOnDrop,
};

pub use crate::launch::{Family, LaunchMode};
pub use image::KernelImage;
pub use step::{CudaBytes, CudaKeyScales, CudaReport, CudaStep, CudaWeights};

use crate::call::{
    Addresses, AngleAddresses, CacheAddresses, Call, RawPositions, StageAddresses, TensorAddresses,
};
use crate::element::{Dtype, Element};
use crate::ids::{Id, Ids};
use crate::launch::Target;
use crate::plan::{InOut, Plan, PlannedTensor, Problem};
use crate::positions::PositionsIn;
use crate::{Angles, Error, Rope};
use driver::During;
use enqueue::Driver;
use image::Kernels;

/// Devices that the driver lists; 0 where there is a driver but no device.
///
/// # Errors
/// [`Error::NoDriver`], or [`Error::Driver`] if the driver does not start.
pub fn device_count() -> Result<usize, Error> {
    driver::device_count()
}

pub(crate) fn device_name(context: &CudaContext) -> String {
    context
        .name()
        .unwrap_or_else(|_| format!("CUDA device {}", context.ordinal()))
}

/// Kernels loaded on one device.
///
/// ```no_run
/// use phasor::cuda::Cuda;
/// use phasor::cudarc::driver::CudaContext;
/// use phasor::{Dtype, Frequencies, Pairing, Rope};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let context = CudaContext::new(0)?; // the engine's own; Cuda::open(0, ...) makes one
/// let cuda = Cuda::new(&context, &[Dtype::Bf16])?;
/// println!("{}: {:?}", cuda.name(), cuda.image(Dtype::Bf16));
/// let rope = Rope::new(Frequencies::from_theta(500_000.0, 128)?, Pairing::HalfSplit);
/// let rotator = cuda.rotator(&rope)?;
/// # let _ = rotator;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Cuda {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    context: Arc<CudaContext>,
    name: String,
    multiprocessors: u32,
    driver: Driver,
    /// In the order of [`Dtype::ALL`]; those asked for.
    kernels: [Option<Kernels>; 3],
}

impl Cuda {
    /// Opens a device by its ordinal (its primary context) and loads the kernels of `dtypes`.
    ///
    /// # Errors
    /// [`Error::NoDriver`], [`Error::NoDevice`], and those of [`Cuda::new`].
    pub fn open(ordinal: usize, dtypes: &[Dtype]) -> Result<Self, Error> {
        Self::new(&driver::open(ordinal)?, dtypes)
    }

    /// Loads the kernels of `dtypes` in a context that the caller has.
    ///
    /// # Errors
    /// [`Error::KernelImage`] if no embedded image runs on the device, [`Error::Driver`] for any
    /// other failed call.
    pub fn new(context: &Arc<CudaContext>, dtypes: &[Dtype]) -> Result<Self, Error> {
        Self::load(context, dtypes, None)
    }

    /// The same from one image only, to compare images or to rule one out.
    ///
    /// # Errors
    /// [`Error::KernelImage`] if that image is not in this build or does not run on the device,
    /// [`Error::Driver`] for any other failed call.
    pub fn with_image(
        context: &Arc<CudaContext>,
        dtypes: &[Dtype],
        image: KernelImage,
    ) -> Result<Self, Error> {
        Self::load(context, dtypes, Some(image))
    }

    fn load(
        context: &Arc<CudaContext>,
        dtypes: &[Dtype],
        only: Option<KernelImage>,
    ) -> Result<Self, Error> {
        let multiprocessors = context
            .attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
            .during("counting multiprocessors")?;
        let mut kernels = [None, None, None];
        for (dtype, slot) in Dtype::ALL.into_iter().zip(&mut kernels) {
            if dtypes.contains(&dtype) {
                *slot = Some(Kernels::load(context, dtype, only)?);
            }
        }
        Ok(Self {
            inner: Arc::new(Inner {
                context: context.clone(),
                name: device_name(context),
                multiprocessors: u32::try_from(multiprocessors).unwrap_or(1).max(1),
                driver: Driver::new()?,
                kernels,
            }),
        })
    }

    /// The context that the kernels live in.
    pub fn context(&self) -> &Arc<CudaContext> {
        &self.inner.context
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Which image the kernels of an element type came from; `None` if they are not loaded.
    pub fn image(&self, dtype: Dtype) -> Option<KernelImage> {
        self.kernels(dtype).map(|kernels| kernels.image)
    }

    /// Whether launches of an element type can be dependent: its kernels were compiled for compute
    /// capability 9.0 or later, and the driver (CUDA 11.8 or later) has the launch for it. Elsewhere, all
    /// are ordinary. With a driver older than CUDA 12.3, those that a graph captures are ordinary too.
    pub fn can_launch_dependently(&self, dtype: Dtype) -> bool {
        self.inner.driver.can_launch_dependently()
            && self
                .kernels(dtype)
                .is_some_and(|kernels| kernels.can_depend)
    }

    /// Loads the kernels of a family, of element types that this was opened for. Those that append or perform
    /// stages are else loaded when the first plan that needs them is made, or by the first call with
    /// `cu_seqlens`: load them before such a call is captured in a graph.
    ///
    /// # Errors
    /// [`Error::DtypeNotLoaded`], [`Error::KernelImage`], [`Error::Driver`].
    pub fn load_family(&self, family: Family, dtypes: &[Dtype]) -> Result<(), Error> {
        for &dtype in dtypes {
            let kernels = self.kernels(dtype).ok_or(Error::DtypeNotLoaded { dtype })?;
            self.context()
                .bind_to_thread()
                .during("binding the context")?;
            kernels.functions(family)?;
        }
        Ok(())
    }

    /// Copies the angles of a rotation to the device and waits for that.
    ///
    /// # Errors
    /// [`Error::Driver`] if memory cannot be allocated or copied.
    pub fn rotator(&self, rope: &Rope) -> Result<CudaRotator, Error> {
        let context = self.context();
        let stream = context.default_stream();
        let angles = match rope.angles() {
            Angles::Exact(frequencies) => DeviceAngles::Steps {
                steps: upload(&stream, frequencies.steps())?,
                factors: upload(&stream, &[])?,
            },
            Angles::Rows(rows) => DeviceAngles::Steps {
                steps: upload(&stream, rows.steps())?,
                factors: upload(&stream, rows.attention_factors())?,
            },
            Angles::Table(table) => DeviceAngles::Table {
                cos: upload(&stream, table.cos())?,
                sin: upload(&stream, table.sin())?,
            },
        };
        let addresses = angles.addresses(&stream);
        Ok(CudaRotator {
            mode: LaunchMode::Ordinary,
            inner: Arc::new(RotatorInner {
                cuda: self.clone(),
                rope: rope.clone(),
                addresses,
                angles: ManuallyDrop::new(angles),
            }),
        })
    }

    fn kernels(&self, dtype: Dtype) -> Option<&Kernels> {
        let index = Dtype::ALL.iter().position(|&d| d == dtype)?;
        self.inner.kernels[index].as_ref()
    }

    /// The very same object: two `CudaContext`s of one device are equal, but each orders only its
    /// own streams and buffers.
    fn expect_here(&self, what: &'static str, context: &Arc<CudaContext>) -> Result<(), Error> {
        if Arc::ptr_eq(context, self.context()) {
            return Ok(());
        }
        let describe = |context: &Arc<CudaContext>| {
            let object = Arc::as_ptr(context);
            format!("cuda:{} (CudaContext at {object:p})", context.ordinal())
        };
        Err(Error::DeviceMismatch {
            what,
            found: describe(context),
            expected: describe(self.context()),
        })
    }
}

#[derive(Debug)]
enum DeviceAngles {
    Steps {
        steps: CudaSlice<u64>,
        factors: CudaSlice<f32>,
    },
    Table {
        cos: CudaSlice<f32>,
        sin: CudaSlice<f32>,
    },
}

impl DeviceAngles {
    fn addresses(&self, stream: &CudaStream) -> AngleAddresses {
        match self {
            DeviceAngles::Steps { steps, factors } => AngleAddresses::Steps {
                steps: steps.device_ptr(stream).0,
                factors: factors.device_ptr(stream).0,
            },
            DeviceAngles::Table { cos, sin } => AngleAddresses::Table {
                cos: cos.device_ptr(stream).0,
                sin: sin.device_ptr(stream).0,
            },
        }
    }
}

/// Ids in device memory. Made by `From` slices and views of `i32`, `i64` or `u32`.
pub type CudaIds<'a> = Ids<CudaView<'a, u8>>;

impl<'a, T: Id + DeviceRepr> From<&'a CudaSlice<T>> for CudaIds<'a> {
    fn from(ids: &'a CudaSlice<T>) -> Self {
        ids.as_view().into()
    }
}

impl<'a, T: Id + DeviceRepr> From<CudaView<'a, T>> for CudaIds<'a> {
    fn from(ids: CudaView<'a, T>) -> Self {
        let bytes = ids.len() * size_of::<T>();
        // SAFETY: integers have no padding, so their memory is bytes.
        let view = unsafe { ids.transmute::<u8>(bytes) };
        // As many bytes as there are always fit.
        Ids::new(view.unwrap_or_else(|| unreachable!()), T::TYPE, ids.len())
    }
}

impl<'a> CudaIds<'a> {
    /// The same ids, to be given once more: views of cudarc cannot be cloned.
    pub fn again(&self) -> Self {
        Ids::new(self.memory().slice(..), self.id_type(), self.len())
    }
}

/// The positions of one call, and its rows of frequencies. Those in device memory may change between
/// replays of a graph.
pub type CudaPositions<'a> = PositionsIn<CudaView<'a, u8>>;

/// A tensor of a call in device memory.
pub type CudaInOut<'a, T> = InOut<CudaView<'a, T>, CudaViewMut<'a, T>>;

/// One [`Rope`] on a device.
///
/// Dropping the last clone waits for the context's work, as enqueued rotations read its angles.
///
/// ```no_run
/// use phasor::cuda::{Cuda, CudaPositions};
/// use phasor::half::bf16;
/// use phasor::{Dtype, Frequencies, InOut, Layout, Pairing, Problem, Rope};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let cuda = Cuda::open(0, &[Dtype::Bf16])?;
/// let stream = cuda.context().default_stream();
/// let rope = Rope::new(Frequencies::from_theta(500_000.0, 128)?, Pairing::HalfSplit);
/// let rotator = cuda.rotator(&rope)?;
/// let (queries, keys) = (Layout::tokens(5, 32, 128), Layout::tokens(5, 8, 128));
/// let plan = rotator.plan(&Problem::new(Dtype::Bf16).q(queries).k(keys))?;
///
/// let mut q = stream.alloc_zeros::<bf16>(5 * 32 * 128)?;
/// let mut k = stream.alloc_zeros::<bf16>(5 * 8 * 128)?;
/// let (q, k) = (InOut::InPlace(q.as_view_mut()), InOut::InPlace(k.as_view_mut()));
/// rotator.rotate(&stream, &plan, Some(q), Some(k), &CudaPositions::start(131_072))?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct CudaRotator {
    inner: Arc<RotatorInner>,
    mode: LaunchMode,
}

#[derive(Debug)]
struct RotatorInner {
    cuda: Cuda,
    rope: Rope,
    addresses: AngleAddresses,
    /// Owns the memory behind `addresses`.
    angles: ManuallyDrop<DeviceAngles>,
}

impl Drop for RotatorInner {
    fn drop(&mut self) {
        // Not through cudarc's context, which skips the wait if an earlier error is pending.
        // SAFETY: the context lives, as `cuda` holds it.
        let waited = unsafe { result::ctx::set_current(self.cuda.context().cu_ctx()) }
            .and_then(|()| result::ctx::synchronize());
        if waited.is_ok() {
            // SAFETY: dropped once, here, and not used again.
            unsafe { ManuallyDrop::drop(&mut self.angles) };
        } else {
            // A rotation may still read the angles: keep them, and the kernels, for good.
            std::mem::forget(self.cuda.clone());
        }
    }
}

impl CudaRotator {
    /// The same rotation, launched in another mode; see [`LaunchMode`] for when that pays. Cheap: the
    /// angles are shared. Where [`Cuda::can_launch_dependently`] says no, launches stay ordinary.
    ///
    /// A dependent launch overlaps only the kernel right before it in the stream. [`rotate`](Self::rotate)
    /// and [`rotate_one_buffer`](Self::rotate_one_buffer) go through cudarc's slices, which put events
    /// between the kernels while event tracking is on (after any `new_stream` of the context): nothing can
    /// overlap then. Switch it off (`CudaContext::disable_event_tracking`), or use
    /// [`rotate_raw`](Self::rotate_raw).
    pub fn with_launch_mode(&self, mode: LaunchMode) -> Self {
        Self {
            inner: self.inner.clone(),
            mode,
        }
    }

    /// How its launches stand to earlier work.
    pub fn launch_mode(&self) -> LaunchMode {
        self.mode
    }

    /// Checks a problem; the plan serves any number of calls.
    ///
    /// # Errors
    /// Those of [`Plan::new`] and of [`Cuda::load_family`].
    pub fn plan(&self, problem: &Problem) -> Result<Plan, Error> {
        let plan = Plan::new(&self.inner.rope, problem)?;
        self.loaded(plan.dtype())?;
        let family = match &plan.fusion {
            Some(_) => Some(Family::Fused),
            None if plan.template.rotates_only() => None,
            None => Some(Family::Append),
        };
        if let Some(family) = family {
            self.cuda().load_family(family, &[plan.dtype()])?;
        }
        Ok(plan)
    }

    /// The rotation.
    pub fn rope(&self) -> &Rope {
        &self.inner.rope
    }

    /// The device it is on.
    pub fn cuda(&self) -> &Cuda {
        &self.inner.cuda
    }

    /// Enqueues the rotation of q and k on `stream`, each a buffer of its own, as one launch.
    ///
    /// # Errors
    /// As [`HostRotator::rotate`](crate::HostRotator::rotate), and [`Error::DeviceMismatch`] for a
    /// stream or buffer of another `CudaContext` object, [`Error::DevicePositionsUnchecked`],
    /// [`Error::DtypeNotLoaded`], [`Error::Driver`]. Positions and frequency rows in device memory
    /// are not looked at: outside a table, a position does what the table says; past the last row
    /// of frequencies, an index is the last row.
    pub fn rotate<T: Element + DeviceRepr>(
        &self,
        stream: &CudaStream,
        plan: &Plan,
        mut q: Option<CudaInOut<'_, T>>,
        mut k: Option<CudaInOut<'_, T>>,
        positions: &CudaPositions<'_>,
    ) -> Result<(), Error> {
        self.check(stream, plan, T::DTYPE, positions)?;
        plan.check_rotates_only()?;
        plan.check_operands(&q, Some(&k))?;
        for (planned, operand) in [(&plan.q, &q), (&plan.k, &k)] {
            if let (Some(planned), Some(operand)) = (planned, operand) {
                self.check_operand(plan, planned, operand)?;
            }
        }
        let (q, _q_guards) = addresses(&mut q, stream);
        let (k, _k_guards) = addresses(&mut k, stream);
        // SAFETY: lengths and contexts have been checked; the plan proved, or its maker vouched,
        // that the layouts are free of overlap; the guards order this launch with other uses of
        // the buffers.
        unsafe { self.enqueue_at(stream, plan, q, k, positions) }
    }

    /// Enqueues a plan made with [`Problem::one_buffer`], such as packed qkv in place.
    ///
    /// # Errors
    /// Those of [`rotate`](Self::rotate).
    pub fn rotate_one_buffer<T: Element + DeviceRepr>(
        &self,
        stream: &CudaStream,
        plan: &Plan,
        mut buffer: CudaViewMut<'_, T>,
        positions: &CudaPositions<'_>,
    ) -> Result<(), Error> {
        self.check(stream, plan, T::DTYPE, positions)?;
        plan.check_rotates_only()?;
        self.cuda()
            .expect_here("the buffer", buffer.stream().context())?;
        plan.check_one_buffer(buffer.len())?;
        let (address, _guard) = buffer.device_ptr_mut(stream);
        let both = TensorAddresses {
            source: address,
            destination: address,
        };
        // SAFETY: as in `rotate`, the windows' freedom of overlap included.
        unsafe { self.enqueue_at(stream, plan, both, both, positions) }
    }

    /// Enqueues on a raw stream and raw addresses, for engines with an allocator of their own.
    /// The addresses are those of the buffers; the layouts' offsets are added to them.
    ///
    /// # Errors
    /// [`Error::PlanMismatch`], [`Error::DtypeNotLoaded`], [`Error::Driver`], and those of
    /// [`Plan::call`].
    ///
    /// # Safety
    /// `stream` belongs to this rotator's context. From the call until the launch has run (for a
    /// captured launch, until no graph can replay it):
    /// - this rotator lives;
    /// - every buffer reaches as far as its layout and is aligned to its element; of a tensor in
    ///   place only `destination` is used;
    /// - the buffers of the call, positions and rows included, do not overlap, except those that the
    ///   plan was made for: windows of one buffer, given by the same address;
    /// - no other work writes what is read or touches what is written;
    /// - positions and rows hold as many values as they say, aligned to their size.
    pub unsafe fn rotate_raw(
        &self,
        stream: CUstream,
        plan: &Plan,
        q: TensorAddresses,
        k: TensorAddresses,
        positions: RawPositions,
    ) -> Result<(), Error> {
        // SAFETY: the caller's.
        unsafe { self.rotate_raw_by(stream, plan, self.inner.addresses, q, k, positions) }
    }

    /// The same by a table that each call brings along: [`AngleAddresses::TableOfCall`], for a rotation
    /// whose own table does no more than say how many pairs there are, and what becomes of positions
    /// outside.
    ///
    /// # Errors
    /// Those of [`rotate_raw`](Self::rotate_raw); [`Error::PlanMismatch`] also for angles of another kind
    /// than the rotation's.
    ///
    /// # Safety
    /// That of [`rotate_raw`](Self::rotate_raw), for the angles too.
    pub unsafe fn rotate_raw_by(
        &self,
        stream: CUstream,
        plan: &Plan,
        angles: AngleAddresses,
        q: TensorAddresses,
        k: TensorAddresses,
        positions: RawPositions,
    ) -> Result<(), Error> {
        if !plan.rope.is_same(self.rope()) {
            return Err(Error::PlanMismatch);
        }
        plan.check_rotates_only()?;
        let addresses = Addresses {
            angles,
            ..self.rotation(q, k, positions)
        };
        // SAFETY: the caller's.
        unsafe { self.enqueue(stream, plan, &addresses) }
    }

    /// Enqueues all that was planned: as [`HostRotator::step_raw`](crate::HostRotator::step_raw), on a
    /// raw stream and raw addresses of the device.
    ///
    /// Where several tokens of a call have one slot, what it holds is of those tokens, but which dim is of
    /// which one is not specified.
    ///
    /// # Errors
    /// [`Error::PlanMismatch`], [`Error::DtypeNotLoaded`], [`Error::KernelImage`], [`Error::Driver`], and
    /// those of [`Plan::call`].
    ///
    /// # Safety
    /// Those of [`rotate_raw`](Self::rotate_raw), for v, the caches, the slots and the report too, which is
    /// aligned to its size. Slots, pages, lengths and `cu_seqlens` may hold any values.
    pub unsafe fn step_raw(
        &self,
        stream: CUstream,
        plan: &Plan,
        [q, k, v]: [TensorAddresses; 3],
        cache: Option<CacheAddresses>,
        stages: [StageAddresses; 3],
        positions: RawPositions,
    ) -> Result<(), Error> {
        if !plan.rope.is_same(self.rope()) {
            return Err(Error::PlanMismatch);
        }
        // SAFETY: the caller's.
        let addresses = Addresses {
            v,
            cache,
            stages: Some(stages),
            ..self.rotation(q, k, positions)
        };
        unsafe { self.enqueue(stream, plan, &addresses) }
    }

    /// The addresses of a rotation of q and k.
    fn rotation(
        &self,
        q: TensorAddresses,
        k: TensorAddresses,
        positions: RawPositions,
    ) -> Addresses {
        Addresses {
            q,
            k,
            v: TensorAddresses::default(),
            angles: self.inner.addresses,
            positions,
            cache: None,
            stages: Default::default(),
        }
    }

    fn loaded(&self, dtype: Dtype) -> Result<&Kernels, Error> {
        self.cuda()
            .kernels(dtype)
            .ok_or(Error::DtypeNotLoaded { dtype })
    }

    fn check(
        &self,
        stream: &CudaStream,
        plan: &Plan,
        given: Dtype,
        positions: &CudaPositions<'_>,
    ) -> Result<(), Error> {
        if !plan.rope.is_same(self.rope()) {
            return Err(Error::PlanMismatch);
        }
        plan.check_dtype(given)?;
        self.cuda().expect_here("the stream", stream.context())?;
        for (what, ids) in [
            ("positions", positions.ids()),
            ("frequency rows", positions.frequency_row_ids()),
            ("cu_seqlens", positions.as_cu_seqlens()),
        ] {
            if let Some(ids) = ids {
                self.cuda()
                    .expect_here(what, ids.memory().stream().context())?;
            }
        }
        Ok(())
    }

    fn check_operand<T>(
        &self,
        plan: &Plan,
        planned: &PlannedTensor,
        operand: &CudaInOut<'_, T>,
    ) -> Result<(), Error> {
        let (source, destination) = match operand {
            InOut::InPlace(buffer) => (None, buffer),
            InOut::OutOfPlace {
                source,
                destination,
            } => (Some(source), destination),
        };
        for stream in source
            .map(DeviceSlice::stream)
            .into_iter()
            .chain([destination.stream()])
        {
            self.cuda().expect_here("a tensor", stream.context())?;
        }
        let length = destination.len();
        plan.check_lengths(planned, source.map_or(length, DeviceSlice::len), length)
    }

    /// # Safety
    /// See [`rotate_raw`](Self::rotate_raw).
    unsafe fn enqueue_at(
        &self,
        stream: &CudaStream,
        plan: &Plan,
        q: TensorAddresses,
        k: TensorAddresses,
        positions: &CudaPositions<'_>,
    ) -> Result<(), Error> {
        // Positions, rows and offsets; they are dropped after the launch.
        let mut guards = [None, None, None];
        let mut free = guards.iter_mut();
        let positions = positions.try_map(|ids| {
            let (address, guard) = ids.device_ptr(stream);
            if let Some(place) = free.next() {
                *place = Some(guard);
            }
            Ok(address)
        })?;
        // SAFETY: the caller's.
        unsafe { self.enqueue(stream.cu_stream(), plan, &self.rotation(q, k, positions)) }
    }

    /// # Safety
    /// See [`rotate_raw`](Self::rotate_raw).
    unsafe fn enqueue(
        &self,
        stream: CUstream,
        plan: &Plan,
        addresses: &Addresses,
    ) -> Result<(), Error> {
        match plan.call(addresses)? {
            // SAFETY: the caller's.
            Some(call) => unsafe { self.enqueue_call(stream, &call) },
            None => Ok(()),
        }
    }

    /// # Safety
    /// See [`rotate_raw`](Self::rotate_raw); the call's angles are this rotator's.
    unsafe fn enqueue_call(&self, stream: CUstream, call: &Call) -> Result<(), Error> {
        let cuda = &self.cuda().inner;
        let kernels = self.loaded(call.dtype)?;
        cuda.context
            .bind_to_thread()
            .during("binding the context")?;
        // SAFETY: the stream is the caller's promise.
        let mode = unsafe { cuda.driver.mode_on(stream, self.mode, kernels.can_depend)? };
        let launch = call.launch(&Target::new(cuda.multiprocessors).with_mode(mode));
        let function = kernels.function(launch.kernel)?.cu_function();
        // SAFETY: the kernel takes this one struct by value, laid out by the same header, and waits
        // for earlier work if the launch is dependent; the memory it addresses is the caller's promise.
        unsafe { cuda.driver.enqueue(function, &launch, stream) }
    }
}

/// Addresses of an operand, and guards that order its use; they are dropped after the launch.
fn addresses<'a, T>(
    operand: &'a mut Option<CudaInOut<'_, T>>,
    stream: &'a CudaStream,
) -> (TensorAddresses, [Option<SyncOnDrop<'a>>; 2]) {
    match operand {
        None => (TensorAddresses::default(), [None, None]),
        Some(InOut::InPlace(buffer)) => {
            let (address, guard) = buffer.device_ptr_mut(stream);
            let addresses = TensorAddresses {
                source: address,
                destination: address,
            };
            (addresses, [Some(guard), None])
        }
        Some(InOut::OutOfPlace {
            source,
            destination,
        }) => {
            let (source, read) = source.device_ptr(stream);
            let (destination, write) = destination.device_ptr_mut(stream);
            let addresses = TensorAddresses {
                source,
                destination,
            };
            (addresses, [Some(read), Some(write)])
        }
    }
}

/// Copies to a new buffer on the stream's device and waits for that.
pub(crate) fn upload<T: DeviceRepr>(
    stream: &Arc<CudaStream>,
    data: &[T],
) -> Result<CudaSlice<T>, Error> {
    if data.is_empty() {
        return stream.null().during("making an empty buffer");
    }
    let copied = stream.clone_htod(data).during("copying to the device")?;
    synchronize(stream)?;
    Ok(copied)
}

/// Waits for all work on the buffer's stream, then copies.
pub(crate) fn download<T: DeviceRepr>(data: &CudaSlice<T>) -> Result<Vec<T>, Error> {
    let stream = data.stream();
    if data.is_empty() {
        return Ok(Vec::new());
    }
    let copied = stream.clone_dtoh(data).during("copying to the host")?;
    synchronize(stream)?;
    Ok(copied)
}

pub(crate) fn synchronize(stream: &CudaStream) -> Result<(), Error> {
    stream.synchronize().during("waiting for the stream")
}
