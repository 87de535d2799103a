//! Calls on a CUDA device, in the context and on the stream that candle has for it.

use crate::number::Number;
use crate::positions::Asked;
use crate::rotary::Shared;
use crate::storages::{Held, Lent, Request, Slot};
use crate::view::{DimOrder, View};
use crate::{Result, Slots, host};
use candle_core::cuda_backend::{CudaStorageSlice, DeviceId};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Storage, Tensor};
use phasor::call::{AngleAddresses, RawPositions, TensorAddresses};
use phasor::cuda::{Cuda, CudaIds, CudaPositions, CudaReport, CudaRotator, CudaStep};
use phasor::cudarc::driver::{
    CudaSlice, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr, ValidAsZeroBits,
};
use phasor::half::{bf16, f16};
use phasor::launch::Family;
use phasor::{Appended, Dtype, IdType, Ids, InOut, Pairing, Plan, Rope, Stored};
use std::sync::{Arc, Mutex, PoisonError};

/// The kernels and angles of one rotation on the devices where it was used.
#[derive(Debug, Default)]
pub(crate) struct Rotators(Mutex<Vec<Loaded>>);

/// What a rotation has on one device for one element type.
#[derive(Clone, Debug)]
pub(crate) struct Loaded {
    device: DeviceId,
    dtype: Dtype,
    rotator: CudaRotator,
    /// Of tokens that were not stored since it was last asked.
    report: Arc<Mutex<CudaReport>>,
}

impl Rotators {
    pub(crate) fn get(&self, rope: &Rope, device: &CudaDevice, dtype: Dtype) -> Result<Loaded> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let here = (device.id(), dtype);
        if let Some(loaded) = known.iter().find(|of| (of.device, of.dtype) == here) {
            return Ok(loaded.clone());
        }
        let stream = device.cuda_stream();
        let rotator = Cuda::new(stream.context(), &[dtype])?.rotator(rope)?;
        let loaded = Loaded {
            device: device.id(),
            dtype,
            report: Arc::new(Mutex::new(rotator.cuda().report()?)),
            rotator,
        };
        known.push(loaded.clone());
        Ok(loaded)
    }

    /// The same, with the kernels that append too.
    pub(crate) fn load(&self, rope: &Rope, device: &CudaDevice, dtype: Dtype) -> Result<()> {
        let loaded = self.get(rope, device, dtype)?;
        let cuda = loaded.rotator.cuda();
        Ok(cuda.load_family(Family::Append, &[dtype])?)
    }

    /// Whether all was stored on a device since this was last asked. Waits for its stream.
    pub(crate) fn stored(&self, device: &CudaDevice) -> Result<Stored> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let stream = device.cuda_stream();
        let mut all = Stored::All;
        for loaded in known.iter().filter(|of| of.device == device.id()) {
            let mut report = loaded.report.lock().unwrap_or_else(PoisonError::into_inner);
            if report.stored(&stream)? == Stored::NotAll {
                all = Stored::NotAll;
                report.clear(&stream)?;
            }
        }
        Ok(all)
    }
}

/// Elements in candle's storage of a CUDA device.
pub(crate) trait InCudaStorage: Sized + DeviceRepr + ValidAsZeroBits {
    fn of_cuda(storage: &CudaStorage) -> Option<&CudaSlice<Self>>;
    fn of_cuda_mut(storage: &mut CudaStorage) -> Option<&mut CudaSlice<Self>>;
    fn into_cuda(elements: CudaSlice<Self>) -> CudaStorageSlice;
}

macro_rules! in_cuda_storage {
    ($($number:ty => $variant:ident),*) => {$(
        impl InCudaStorage for $number {
            fn of_cuda(storage: &CudaStorage) -> Option<&CudaSlice<Self>> {
                match &storage.slice {
                    CudaStorageSlice::$variant(elements) => Some(elements),
                    _ => None,
                }
            }

            fn of_cuda_mut(storage: &mut CudaStorage) -> Option<&mut CudaSlice<Self>> {
                match &mut storage.slice {
                    CudaStorageSlice::$variant(elements) => Some(elements),
                    _ => None,
                }
            }

            fn into_cuda(elements: CudaSlice<Self>) -> CudaStorageSlice {
                CudaStorageSlice::$variant(elements)
            }
        }
    )*};
}

in_cuda_storage!(f32 => F32, f16 => F16, bf16 => BF16);

/// The elements of a storage from the first of a tensor on.
fn read<T: Number>(storage: &CudaStorage, start: usize) -> Result<CudaView<'_, T>> {
    T::of_cuda(storage)
        .and_then(|elements| elements.try_slice(start..))
        .ok_or_else(host::not_there)
}

/// The same, to be written.
fn written<T: Number>(storage: &mut CudaStorage, start: usize) -> Result<CudaViewMut<'_, T>> {
    T::of_cuda_mut(storage)
        .and_then(|elements| elements.try_slice_mut(start..))
        .ok_or_else(host::not_there)
}

/// A storage that was lent for writing, and its device.
fn lent(lent: Option<Lent<'_>>) -> Result<(&mut CudaStorage, CudaDevice)> {
    match lent {
        Some(Lent::WriteCuda(storage)) => {
            let device = storage.device.clone();
            Ok((storage, device))
        }
        _ => Err(host::not_there()),
    }
}

/// What all calls of a plan have in common.
pub(crate) struct Call<'s> {
    loaded: Loaded,
    device: CudaDevice,
    plan: &'s Plan,
    positions: CudaPositions<'s>,
}

impl<'s> Call<'s> {
    pub(crate) fn new<const N: usize>(
        shared: &Shared,
        plan: &'s Plan,
        storage: &CudaStorage,
        asked: &'s Asked<'_>,
        held: &Held<'s, N>,
    ) -> Result<Self> {
        Self::on(shared, plan, storage.device.clone(), asked, held)
    }

    fn on<const N: usize>(
        shared: &Shared,
        plan: &'s Plan,
        device: CudaDevice,
        asked: &'s Asked<'_>,
        held: &Held<'s, N>,
    ) -> Result<Self> {
        let loaded = shared.cuda.get(&shared.rope, &device, plan.dtype())?;
        let positions =
            asked.given(|ids, slot| ids_of(ids, slot.and_then(|slot| held.read(slot))))?;
        Ok(Self {
            loaded,
            device,
            plan,
            positions,
        })
    }

    /// Rotates to a new storage of `len` elements, all of which the plan writes unless the batch is ragged.
    pub(crate) fn rotated<T: Number>(
        &self,
        source: &CudaStorage,
        start: usize,
        len: usize,
    ) -> Result<Storage> {
        let mut elements = match self.positions.as_cu_seqlens().is_some() {
            true => self.device.alloc_zeros::<T>(len)?,
            // SAFETY: the kernel writes all of them before anything else of the stream reads them.
            false => unsafe { self.device.alloc::<T>(len)? },
        };
        self.rotate_to(read(source, start)?, elements.as_view_mut())?;
        Ok(Storage::Cuda(CudaStorage {
            slice: T::into_cuda(elements),
            device: self.device.clone(),
        }))
    }

    /// Rotates to a storage that is there.
    pub(crate) fn rotate_into<T: Number>(
        &self,
        source: &CudaStorage,
        start: usize,
        (to, to_start): (Option<Lent<'_>>, usize),
    ) -> Result<()> {
        let (to, _) = lent(to)?;
        self.rotate_to::<T>(read(source, start)?, written(to, to_start)?)
    }

    fn rotate_to<T: Number>(
        &self,
        source: CudaView<'_, T>,
        destination: CudaViewMut<'_, T>,
    ) -> Result<()> {
        let operand = InOut::OutOfPlace {
            source,
            destination,
        };
        let stream = self.device.cuda_stream();
        let (q, k) = (Some(operand), None);
        Ok(self
            .loaded
            .rotator
            .rotate(&stream, self.plan, q, k, &self.positions)?)
    }
}

/// Integers in device memory, which slices have been copied to by now.
fn ids_of<'s>(ids: &crate::Ids<'_>, storage: Option<&'s Storage>) -> Result<CudaIds<'s>> {
    let tensor = ids.as_tensor().ok_or_else(host::not_there)?;
    let Some(Storage::Cuda(storage)) = storage else {
        return Err(host::not_there());
    };
    let start = tensor.layout().start_offset();
    let range = start..start + tensor.elem_count();
    match &storage.slice {
        CudaStorageSlice::I32(ids) => ids.try_slice(range).map(CudaIds::from),
        CudaStorageSlice::I64(ids) => ids.try_slice(range).map(CudaIds::from),
        CudaStorageSlice::U32(ids) => ids.try_slice(range).map(CudaIds::from),
        _ => None,
    }
    .ok_or_else(host::not_there)
}

/// Rotates where the elements are.
pub(crate) fn rotate<T: Number, const N: usize>(
    shared: &Shared,
    plan: &Plan,
    (q, q_start): (Option<Lent<'_>>, usize),
    k: Option<(Option<Lent<'_>>, usize)>,
    asked: &Asked<'_>,
    held: &Held<'_, N>,
) -> Result<()> {
    let (q, device) = lent(q)?;
    let call = Call::on(shared, plan, device, asked, held)?;
    let q = InOut::InPlace(written::<T>(q, q_start)?);
    let k = match k {
        None => None,
        Some((k, start)) => Some(InOut::InPlace(written::<T>(lent(k)?.0, start)?)),
    };
    let stream = call.device.cuda_stream();
    Ok(call
        .loaded
        .rotator
        .rotate(&stream, plan, Some(q), k, &call.positions)?)
}

/// Performs a plan over one storage, which begins at `base`.
pub(crate) fn rotate_windows<T: Number, const N: usize>(
    shared: &Shared,
    plan: &Plan,
    (buffer, base): (Option<Lent<'_>>, usize),
    asked: &Asked<'_>,
    held: &Held<'_, N>,
) -> Result<()> {
    let (buffer, device) = lent(buffer)?;
    let call = Call::on(shared, plan, device, asked, held)?;
    let buffer = written::<T>(buffer, base)?;
    let stream = call.device.cuda_stream();
    Ok(call
        .loaded
        .rotator
        .rotate_one_buffer(&stream, plan, buffer, &call.positions)?)
}

/// The tensors of a step: storages, and where in them these begin.
pub(crate) struct StepTensors<'s> {
    /// The queries, or q, k and v in one.
    pub(crate) q: (Option<Lent<'s>>, usize),
    pub(crate) kv: Option<[(Option<&'s Storage>, usize); 2]>,
    /// Two caches, or one that has both.
    pub(crate) caches: [Option<Lent<'s>>; 2],
    pub(crate) cache_starts: [usize; 2],
}

/// Rotates, and stores keys and values in their caches. What is not stored is in the report.
pub(crate) fn append<T: Number, const N: usize>(
    shared: &Shared,
    plan: &Plan,
    tensors: StepTensors<'_>,
    asked: &Asked<'_>,
    (slots, slot_ids): (&Slots<'_>, [Option<Slot>; 3]),
    held: &Held<'_, N>,
) -> Result<()> {
    let (q, device) = lent(tensors.q.0)?;
    let Call {
        loaded,
        device,
        positions,
        ..
    } = Call::on(shared, plan, device, asked, held)?;
    let slots = slots.given(slot_ids, |ids, slot| {
        ids_of(ids, slot.and_then(|slot| held.read(slot)))
    })?;
    let q = written::<T>(q, tensors.q.1)?;
    let step = CudaStep::new(positions).slots(slots);
    let step = match tensors.kv {
        None => step.buffer(q),
        Some([k, v]) => step
            .q(InOut::InPlace(q))
            .k(Appended::ToCache(source::<T>(k)?))
            .v(Appended::ToCache(source::<T>(v)?)),
    };
    let [first, second] = tensors.caches;
    let [k_start, v_start] = tensors.cache_starts;
    let mut first = written::<T>(lent(first)?.0, k_start)?;
    let mut second = match second {
        None => None,
        second => Some(written::<T>(lent(second)?.0, v_start)?),
    };
    let step = match &mut second {
        None => step.kv_cache(&mut first),
        Some(second) => step.k_cache(&mut first).v_cache(second),
    };
    let report = loaded.report.lock().unwrap_or_else(PoisonError::into_inner);
    let stream = device.cuda_stream();
    Ok(loaded.rotator.step(&stream, plan, step, Some(&report))?)
}

/// Keys or values that are read.
fn source<T: Number>((storage, start): (Option<&Storage>, usize)) -> Result<CudaView<'_, T>> {
    match storage {
        Some(Storage::Cuda(storage)) => read(storage, start),
        _ => Err(host::not_there()),
    }
}

/// Rotates by tables of the call; `starts` has the first row of each sequence, if they differ.
pub(crate) fn rotated_by_tables(
    view: &View<'_>,
    order: DimOrder,
    pairing: Pairing,
    tables: [&Tensor; 2],
    starts: &[i64],
) -> Result<Tensor> {
    let [cos, sin] = tables.map(|table| table.to_dtype(DType::F32));
    let (cos, sin) = (cos?, sin?);
    let [.., dim] = view.layout.shape();
    let rotary = crate::rotary_emb::rotation(dim / 2, pairing)?;
    let plan = rotary.shared.plan(view.dtype, &view.anew(order))?;
    let starts = match starts {
        [] => None,
        _ => Some(Tensor::from_slice(
            starts,
            starts.len(),
            view.tensor.device(),
        )?),
    };
    let mut request = Request::<4>::new();
    let source = request.read(view.tensor);
    let slots = [request.read(&cos), request.read(&sin)];
    let start_slot = starts.as_ref().map(|starts| request.read(starts));
    let storage = request.run(|held| {
        let Some(Storage::Cuda(source)) = held.read(source) else {
            return Err(host::not_there());
        };
        let device = source.device.clone();
        let loaded = rotary.shared.cuda.get(rotary.rope(), &device, view.dtype)?;
        let rotator = &loaded.rotator;
        let stream = device.cuda_stream();
        let table = |tensor: &Tensor, slot: Slot| -> Result<CudaView<'_, f32>> {
            let Some(Storage::Cuda(storage)) = held.read(slot) else {
                return Err(host::not_there());
            };
            let start = tensor.layout().start_offset();
            let range = start..start + tensor.elem_count();
            let of_f32 = f32::of_cuda(storage);
            of_f32
                .and_then(|elements| elements.try_slice(range))
                .ok_or_else(host::not_there)
        };
        let (cos, sin) = (table(&cos, slots[0])?, table(&sin, slots[1])?);
        let rows = crate::rotary_emb::row_count(cos.len(), dim / 2)?;
        let (cos, _of_cos) = cos.device_ptr(&stream);
        let (sin, _of_sin) = sin.device_ptr(&stream);
        let first = match (&starts, start_slot) {
            (Some(starts), Some(slot)) => match held.read(slot) {
                Some(Storage::Cuda(CudaStorage {
                    slice: CudaStorageSlice::I64(ids),
                    ..
                })) => Some((ids.device_ptr(&stream), starts.elem_count())),
                _ => return Err(host::not_there()),
            },
            _ => None,
        };
        let positions = match &first {
            None => RawPositions::start(0),
            Some(((address, _), len)) => {
                RawPositions::start_per_sequence(Ids::at(*address, IdType::I64, *len))
            }
        };
        crate::number::by_dtype!(view.dtype, T => {
            let from = read::<T>(source, view.start)?;
            // SAFETY: the kernel writes all of them before anything else of the stream reads them.
            let mut elements = unsafe { device.alloc::<T>(view.tensor.elem_count())? };
            {
                let (source, _of_source) = from.device_ptr(&stream);
                let (destination, _of_destination) = elements.device_ptr_mut(&stream);
                let operand = TensorAddresses { source, destination };
                let angles = AngleAddresses::TableOfCall { cos, sin, rows };
                let none = TensorAddresses::default();
                // SAFETY: the stream is of the rotator's context, as the rotator was made for this
                // device; the source reaches as far as candle's layout of it; the destination has as
                // many elements, and is new; the tables have the rows that are counted, and there is
                // a start for each sequence. The guards order this launch with other uses of all of
                // them, and the rotator lives as long as the process, or waits when it is dropped.
                unsafe {
                    let stream = stream.cu_stream();
                    rotator.rotate_raw_by(stream, &plan, angles, operand, none, positions)?;
                }
            }
            Ok(Storage::Cuda(CudaStorage { slice: <T as InCudaStorage>::into_cuda(elements), device }))
        })
    })?;
    let shape = view.tensor.shape().clone();
    Ok(Tensor::from_storage(
        storage,
        shape,
        BackpropOp::none(),
        false,
    ))
}
