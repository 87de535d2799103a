//! Time on the device, between events.
//!
//! Not criterion: it decides by itself how often to call, and asks for seconds each time; here a few
//! replays of a graph of thousands of calls are steady, and hundreds of figures must fit into a minute.

use super::Failure;
use super::results::Memory;
use super::schedule;
use phasor::cudarc::driver::sys::{
    CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode as CaptureMode,
};
use phasor::cudarc::driver::{CudaEvent, CudaGraph, CudaSlice, CudaStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub struct Timer {
    stream: Arc<CudaStream>,
    start: CudaEvent,
    end: CudaEvent,
    /// Displaces everything else from L2 when it is written.
    sweep: CudaSlice<u8>,
}

impl Timer {
    pub fn new(stream: &Arc<CudaStream>, l2: usize) -> Result<Self, Failure> {
        let event = || {
            stream
                .context()
                .new_event(Some(CUevent_flags::CU_EVENT_DEFAULT))
        };
        Ok(Self {
            start: event()?,
            end: event()?,
            sweep: stream.alloc_zeros(2 * l2)?,
            stream: stream.clone(),
        })
    }

    /// Keeps the device at work until its clocks are up.
    pub fn warm_up(&mut self) -> Result<(), Failure> {
        let began = Instant::now();
        while began.elapsed() < Duration::from_millis(300) {
            self.stream.memset_zeros(&mut self.sweep)?;
            self.stream.synchronize()?;
        }
        Ok(())
    }

    /// Microseconds of one call, by replays of a graph of `calls` of them. `enqueue` is given the
    /// stream and the number of each.
    pub fn replayed(
        &mut self,
        calls: usize,
        memory: Memory,
        enqueue: impl FnMut(&Arc<CudaStream>, usize) -> Result<(), Failure>,
    ) -> Result<f64, Failure> {
        let graph = self.captured(calls, enqueue)?;
        graph.upload()?;
        self.median(calls, memory, || Ok(graph.launch()?))
    }

    /// The same by enqueueing `calls` of them each time.
    pub fn streamed(
        &mut self,
        calls: usize,
        memory: Memory,
        mut enqueue: impl FnMut(&Arc<CudaStream>, usize) -> Result<(), Failure>,
    ) -> Result<f64, Failure> {
        let stream = self.stream.clone();
        self.median(calls, memory, || {
            (0..calls).try_for_each(|n| enqueue(&stream, n))
        })
    }

    fn captured(
        &self,
        calls: usize,
        mut enqueue: impl FnMut(&Arc<CudaStream>, usize) -> Result<(), Failure>,
    ) -> Result<CudaGraph, Failure> {
        self.stream.synchronize()?;
        self.stream
            .begin_capture(CaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
        let enqueued = (0..calls).try_for_each(|n| enqueue(&self.stream, n));
        // Also after a failure: until then the stream is of no use to others.
        let graph = self
            .stream
            .end_capture(CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH);
        enqueued?;
        graph?.ok_or_else(|| "nothing was captured".into())
    }

    fn median(
        &mut self,
        calls: usize,
        memory: Memory,
        mut run: impl FnMut() -> Result<(), Failure>,
    ) -> Result<f64, Failure> {
        self.sample(memory, &mut run)?;
        let (began, mut samples) = (Instant::now(), Vec::new());
        while !schedule::is_enough(samples.len(), began.elapsed()) {
            samples.push(self.sample(memory, &mut run)? / calls as f64);
        }
        Ok(schedule::median(&mut samples))
    }

    fn sample(
        &mut self,
        memory: Memory,
        run: &mut impl FnMut() -> Result<(), Failure>,
    ) -> Result<f64, Failure> {
        if memory == Memory::Cold {
            self.stream.memset_zeros(&mut self.sweep)?;
        }
        self.start.record(&self.stream)?;
        run()?;
        self.end.record(&self.stream)?;
        Ok(f64::from(self.start.elapsed_ms(&self.end)?) * 1e3)
    }
}
