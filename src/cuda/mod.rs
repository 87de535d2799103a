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
mod image;

use std::ffi::c_void;
use std::mem::ManuallyDrop;
use std::sync::Arc;

use cudarc::driver::result;
use cudarc::driver::sys::{CUdevice_attribute, CUstream};
use cudarc::driver::{
    CudaContext, CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr,
    DeviceSlice, SyncOnDrop,
};

pub use image::KernelImage;

use crate::element::{Dtype, Element};
use crate::launch::{
    AngleAddresses, AngleKind, PositionAddresses, PositionDtype, RowAddresses, TensorAddresses,
};
use crate::plan::{InOut, Plan, PlannedTensor, PositionMemory, Problem};
use crate::positions::PositionsIn;
use crate::{Angles, Error, Rope, launch};
use driver::During;
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
#[derive(Clone, Debug)]
pub struct Cuda {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    context: Arc<CudaContext>,
    name: String,
    multiprocessors: u32,
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

    /// Copies the angles of a rotation to the device and waits for that.
    ///
    /// # Errors
    /// [`Error::Driver`] if memory cannot be allocated or copied.
    pub fn rotator(&self, rope: &Rope) -> Result<CudaRotator, Error> {
        let context = self.context();
        let stream = context.default_stream();
        let angles = match rope.angles() {
            Angles::Exact(frequencies) if AngleKind::of(rope.angles()) == AngleKind::Exact => {
                DeviceAngles::Exact {
                    steps: upload(&stream, frequencies.steps())?,
                }
            }
            Angles::Exact(frequencies) => DeviceAngles::Rows {
                steps: upload(&stream, frequencies.steps())?,
                factors: upload(&stream, &[frequencies.attention_factor()])?,
            },
            Angles::Rows(rows) => DeviceAngles::Rows {
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
    Exact {
        steps: CudaSlice<u64>,
    },
    Rows {
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
            DeviceAngles::Exact { steps } => AngleAddresses::Exact {
                steps: steps.device_ptr(stream).0,
            },
            DeviceAngles::Rows { steps, factors } => AngleAddresses::Rows {
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

/// Position values in device memory.
#[derive(Debug)]
pub enum CudaPositionIds<'a> {
    /// Signed 32-bit.
    I32(CudaView<'a, i32>),
    /// Signed 64-bit.
    I64(CudaView<'a, i64>),
    /// Unsigned 32-bit.
    U32(CudaView<'a, u32>),
}

impl<'a> From<&'a CudaSlice<i32>> for CudaPositionIds<'a> {
    fn from(ids: &'a CudaSlice<i32>) -> Self {
        CudaPositionIds::I32(ids.as_view())
    }
}

impl<'a> From<&'a CudaSlice<i64>> for CudaPositionIds<'a> {
    fn from(ids: &'a CudaSlice<i64>) -> Self {
        CudaPositionIds::I64(ids.as_view())
    }
}

impl<'a> From<&'a CudaSlice<u32>> for CudaPositionIds<'a> {
    fn from(ids: &'a CudaSlice<u32>) -> Self {
        CudaPositionIds::U32(ids.as_view())
    }
}

impl CudaPositionIds<'_> {
    fn len(&self) -> usize {
        match self {
            CudaPositionIds::I32(ids) => ids.len(),
            CudaPositionIds::I64(ids) => ids.len(),
            CudaPositionIds::U32(ids) => ids.len(),
        }
    }

    fn context(&self) -> &Arc<CudaContext> {
        match self {
            CudaPositionIds::I32(ids) => ids.stream().context(),
            CudaPositionIds::I64(ids) => ids.stream().context(),
            CudaPositionIds::U32(ids) => ids.stream().context(),
        }
    }

    fn address<'a>(&'a self, stream: &'a CudaStream) -> (PositionAddresses, SyncOnDrop<'a>) {
        let (dtype, (address, guard)) = match self {
            CudaPositionIds::I32(ids) => (PositionDtype::I32, ids.device_ptr(stream)),
            CudaPositionIds::I64(ids) => (PositionDtype::I64, ids.device_ptr(stream)),
            CudaPositionIds::U32(ids) => (PositionDtype::U32, ids.device_ptr(stream)),
        };
        (PositionAddresses::Ids { address, dtype }, guard)
    }
}

/// The positions of one call, and its rows of frequencies as `u32`. Those in device memory may change
/// between replays of a graph.
pub type CudaPositions<'a> = PositionsIn<CudaPositionIds<'a>, CudaView<'a, u32>>;

/// A tensor of a call in device memory.
pub type CudaInOut<'a, T> = InOut<CudaView<'a, T>, CudaViewMut<'a, T>>;

/// One [`Rope`] on a device.
///
/// Dropping the last clone waits for the context's work, as enqueued rotations read its angles.
#[derive(Clone, Debug)]
pub struct CudaRotator {
    inner: Arc<RotatorInner>,
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
    /// Checks a problem; the plan serves any number of calls.
    ///
    /// # Errors
    /// Those of [`Plan::new`]; [`Error::DtypeNotLoaded`].
    pub fn plan(&self, problem: &Problem) -> Result<Plan, Error> {
        let plan = Plan::new(&self.inner.rope, problem, PositionMemory::Device)?;
        self.loaded(plan.dtype())?;
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
    pub fn rotate<T: Element>(
        &self,
        stream: &CudaStream,
        plan: &Plan,
        mut q: Option<CudaInOut<'_, T>>,
        mut k: Option<CudaInOut<'_, T>>,
        positions: &CudaPositions<'_>,
    ) -> Result<(), Error> {
        self.check(stream, plan, T::DTYPE, positions)?;
        plan.check_operands(&q, &k)?;
        for (planned, operand) in [(&plan.q, &q), (&plan.k, &k)] {
            if let (Some(planned), Some(operand)) = (planned, operand) {
                self.check_operand(planned, operand)?;
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
    pub fn rotate_one_buffer<T: Element>(
        &self,
        stream: &CudaStream,
        plan: &Plan,
        mut buffer: CudaViewMut<'_, T>,
        positions: &CudaPositions<'_>,
    ) -> Result<(), Error> {
        self.check(stream, plan, T::DTYPE, positions)?;
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
    /// [`Plan::launch`].
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
    /// - `positions` and `rows` hold as many values as the plan's kinds need, aligned to their size.
    pub unsafe fn rotate_raw(
        &self,
        stream: CUstream,
        plan: &Plan,
        q: TensorAddresses,
        k: TensorAddresses,
        positions: PositionAddresses,
        rows: RowAddresses,
    ) -> Result<(), Error> {
        if !plan.rope.is_same(self.rope()) {
            return Err(Error::PlanMismatch);
        }
        // SAFETY: the caller's.
        unsafe { self.enqueue(stream, plan, [q, k], positions, rows) }
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
        let ids = positions.ids();
        if let Some(ids) = ids {
            self.cuda().expect_here("positions", ids.context())?;
        }
        plan.check_position_count(positions.kind(), ids.map_or(0, CudaPositionIds::len))?;
        let rows = positions.frequency_row_ids();
        if let Some(rows) = rows {
            self.cuda()
                .expect_here("frequency rows", rows.stream().context())?;
        }
        plan.check_row_count(
            positions.frequency_row_kind(),
            rows.map_or(0, DeviceSlice::len),
        )
    }

    fn check_operand<T>(
        &self,
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
        planned.check_lengths(source.map_or(length, DeviceSlice::len), length)
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
        let start = PositionAddresses::Start(positions.as_start().unwrap_or_default());
        let (ids, _ids_guard) = positions.ids().map_or((start, None), |ids| {
            let (addresses, guard) = ids.address(stream);
            (addresses, Some(guard))
        });
        let row = positions
            .as_frequency_row()
            .map_or(RowAddresses::None, RowAddresses::Call);
        let (rows, _rows_guard) = positions.frequency_row_ids().map_or((row, None), |rows| {
            let (address, guard) = rows.device_ptr(stream);
            (RowAddresses::Ids(address), Some(guard))
        });
        // SAFETY: the caller's.
        unsafe { self.enqueue(stream.cu_stream(), plan, [q, k], ids, rows) }
    }

    /// # Safety
    /// See [`rotate_raw`](Self::rotate_raw).
    unsafe fn enqueue(
        &self,
        stream: CUstream,
        plan: &Plan,
        [q, k]: [TensorAddresses; 2],
        positions: PositionAddresses,
        rows: RowAddresses,
    ) -> Result<(), Error> {
        let addresses = launch::Addresses {
            q,
            k,
            angles: self.inner.addresses,
            positions,
            rows,
        };
        let Some(mut launch) = plan.launch(&addresses, self.cuda().inner.multiprocessors)? else {
            return Ok(());
        };
        let function = self.loaded(launch.kernel.dtype)?.function(launch.kernel);
        self.cuda()
            .context()
            .bind_to_thread()
            .during("binding the context")?;
        let mut parameters: [*mut c_void; 1] = [(&raw mut launch.params).cast()];
        let [gx, gy, gz] = launch.grid;
        let [bx, by, bz] = launch.block;
        // SAFETY: the kernel takes this one struct by value, laid out by the same header; the
        // memory it addresses is the caller's promise.
        unsafe {
            result::launch_kernel(
                function.cu_function(),
                (gx, gy, gz),
                (bx, by, bz),
                0,
                stream,
                &mut parameters,
            )
        }
        .during("launching the kernel")
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
