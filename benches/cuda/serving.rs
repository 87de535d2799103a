//! What the bench asks of phasor for a serving step, and the buffers of that.

use super::buffers::Buffers;
use super::results::Launch;
use super::rotation::by_launch;
use super::steps::{self, Operands, Q, QKV, Queries, Step, Written};
use super::{Failure, schedule};
use phasor::cuda::{Cuda, CudaBytes, CudaPositions, CudaReport, CudaRotator};
use phasor::cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut, DeviceRepr};
use phasor::half::bf16;
use phasor::{Dtype, Plan, SlotsIn, Stored};
use std::ops::Range;
use std::sync::Arc;

/// The buffers of a step in each of so many layers that what a layer has is no longer in L2 when its turn
/// comes again. Positions and slots are the same in all of them, as in a model.
pub struct Layers {
    pub count: usize,
    tokens: usize,
    qkv: Buffers<bf16>,
    q: CudaSlice<bf16>,
    q_codes: CudaSlice<u8>,
    /// With room for elements.
    caches: [CudaSlice<u8>; 2],
    positions: CudaSlice<i64>,
    slots: CudaSlice<i64>,
    gamma: CudaSlice<bf16>,
}

impl Layers {
    pub fn new(stream: &Arc<CudaStream>, tokens: usize, l2: usize) -> Result<Self, Failure> {
        let count = schedule::cold_buffers(tokens * QKV * size_of::<bf16>(), l2);
        let of_elements = Step {
            norms: false,
            codes: false,
            queries: Queries::InPlace,
        };
        let cache = || stream.alloc_zeros(count * of_elements.cache_bytes(tokens));
        Ok(Self {
            count,
            tokens,
            qkv: Buffers::new(stream, tokens * QKV, count)?,
            q: stream.alloc_zeros(count * tokens * Q)?,
            q_codes: stream.alloc_zeros(count * tokens * Q)?,
            caches: [cache()?, cache()?],
            positions: stream.clone_htod(&steps::positions(tokens))?,
            slots: stream.clone_htod(&steps::slots(tokens))?,
            gamma: stream.clone_htod(&steps::gamma())?,
        })
    }

    /// What a kernel copies that moves the bytes of a step: all of qkv, and where to.
    pub fn copy(
        &mut self,
        step: Step,
        layer: usize,
    ) -> (CudaView<'_, bf16>, CudaViewMut<'_, bf16>) {
        let [_, written] = step.bytes_read_and_written(self.tokens);
        self.qkv.copy_to(layer, written / size_of::<bf16>())
    }

    /// Makes the first layer what it is before a step.
    fn reset(&mut self, stream: &Arc<CudaStream>, before: &Written) -> Result<(), Failure> {
        stream.memcpy_htod(&before.qkv, &mut self.qkv.pair(0))?;
        fill(stream, &mut self.q, &before.q)?;
        fill(stream, &mut self.q_codes, &before.q_codes)?;
        for (cache, before) in self.caches.iter_mut().zip(&before.caches) {
            fill(stream, cache, before)?;
        }
        Ok(())
    }

    /// What the first layer has of all that a step may write.
    fn written(&mut self, stream: &Arc<CudaStream>, before: &Written) -> Result<Written, Failure> {
        Ok(Written {
            qkv: stream.clone_dtoh(&self.qkv.pair(0))?,
            q: first(stream, &self.q, before.q.len())?,
            q_codes: first(stream, &self.q_codes, before.q_codes.len())?,
            caches: [
                first(stream, &self.caches[0], before.caches[0].len())?,
                first(stream, &self.caches[1], before.caches[1].len())?,
            ],
        })
    }
}

fn fill<T: DeviceRepr>(
    stream: &Arc<CudaStream>,
    to: &mut CudaSlice<T>,
    values: &[T],
) -> Result<(), Failure> {
    // The driver copies no empty range.
    match values.len() {
        0 => Ok(()),
        len => Ok(stream.memcpy_htod(values, &mut to.slice_mut(..len))?),
    }
}

fn first<T: DeviceRepr>(
    stream: &Arc<CudaStream>,
    from: &CudaSlice<T>,
    len: usize,
) -> Result<Vec<T>, Failure> {
    match len {
        0 => Ok(Vec::new()),
        _ => Ok(stream.clone_dtoh(&from.slice(..len))?),
    }
}

/// One way to perform a step, ready to be enqueued.
pub struct Serving {
    pub launch: Launch,
    step: Step,
    rotator: CudaRotator,
    plan: Plan,
    report: CudaReport,
    scale: CudaSlice<f32>,
}

impl Serving {
    /// By every kind of launch.
    pub fn all(
        cuda: &Cuda,
        stream: &Arc<CudaStream>,
        step: Step,
        tokens: usize,
    ) -> Result<Vec<Self>, Failure> {
        let rotator = cuda.rotator(&steps::rope()?)?;
        let mut all = Vec::new();
        for (launch, rotator) in by_launch(rotator, Dtype::Bf16) {
            all.push(Self {
                launch,
                step,
                plan: rotator.plan(&step.problem(tokens))?,
                rotator,
                report: cuda.report()?,
                scale: stream.clone_htod(&[step.scale()])?,
            });
        }
        Ok(all)
    }

    pub fn enqueue(
        &self,
        stream: &Arc<CudaStream>,
        layers: &mut Layers,
        layer: usize,
    ) -> Result<(), Failure> {
        let of_layer = |length: usize| -> Range<usize> { layer * length..(layer + 1) * length };
        let cache = of_layer(self.step.cache_bytes(layers.tokens));
        let q = of_layer(layers.tokens * Q);
        let mut q_codes = layers.q_codes.slice_mut(q.clone());
        let [k_cache, v_cache] = &mut layers.caches;
        let mut k_cache = k_cache.slice_mut(cache.clone());
        let mut v_cache = v_cache.slice_mut(cache);
        let given = Operands {
            positions: CudaPositions::per_token(&layers.positions),
            slots: SlotsIn::mapping(&layers.slots),
            qkv: layers.qkv.pair(layer),
            q: layers.q.slice_mut(q),
            q_codes: CudaBytes::from(&mut q_codes),
            k_cache: CudaBytes::from(&mut k_cache),
            v_cache: CudaBytes::from(&mut v_cache),
            gamma: [(); 2].map(|()| layers.gamma.as_view()),
            scales: [(); 3].map(|()| self.scale.as_view()),
        };
        let operands = self.step.operands(given);
        let (rotator, plan) = (&self.rotator, &self.plan);
        Ok(rotator.step(stream, plan, operands, Some(&self.report))?)
    }

    /// That the device makes of a call what the host made of it, bit for bit.
    pub fn check(
        &mut self,
        stream: &Arc<CudaStream>,
        layers: &mut Layers,
        before: &Written,
        expected: &Written,
    ) -> Result<(), Failure> {
        layers.reset(stream, before)?;
        self.report.clear(stream)?;
        self.enqueue(stream, layers, 0)?;
        if self.report.stored(stream)? != Stored::All {
            return Err("some token was not stored".into());
        }
        match expected.difference(&layers.written(stream, before)?) {
            Some(what) => Err(format!("{what}: other bits than the host's").into()),
            None => Ok(()),
        }
    }
}
