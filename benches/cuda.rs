//! The CUDA backend: q and k of a Llama-3-8B layer, with a device-to-device copy of the same bytes
//! in the same run, and the time to load the kernels. Device time between events; throughput
//! counts the bytes of q and k read and written. Without a GPU it says so and ends.

use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use phasor::cuda::{Cuda, CudaPositions, device_count};
use phasor::cudarc::driver::sys::CUevent_flags;
use phasor::cudarc::driver::{CudaContext, CudaSlice, CudaStream};
use phasor::half::{bf16, f16};
use phasor::{DeviceElement, Dtype, Frequencies, InOut, Layout, Pairing, Problem, Rope};

const Q_HEADS: usize = 32;
const K_HEADS: usize = 8;
const HEAD_DIM: usize = 128;
/// Together past the last-level cache of any GPU.
const COLD_BYTES: usize = 1 << 30;

/// Device time of `iterations` calls of `enqueue`, each given its number.
fn device_time(
    context: &Arc<CudaContext>,
    stream: &Arc<CudaStream>,
    iterations: u64,
    mut enqueue: impl FnMut(usize),
) -> Duration {
    let event = || {
        context
            .new_event(Some(CUevent_flags::CU_EVENT_DEFAULT))
            .expect("an event")
    };
    let (start, end) = (event(), event());
    start.record(stream).expect("recording");
    for n in 0..iterations {
        enqueue(n as usize);
    }
    end.record(stream).expect("recording");
    let milliseconds = start.elapsed_ms(&end).expect("both events have passed");
    Duration::from_secs_f64(f64::from(milliseconds) / 1e3)
}

fn rotations<T: DeviceElement>(
    criterion: &mut Criterion,
    context: &Arc<CudaContext>,
    tokens: usize,
) {
    let dtype = T::DTYPE;
    let stream = context.default_stream();
    let cuda = Cuda::new(context, &[dtype]).expect("kernels load");
    let image = cuda.image(dtype).expect("just loaded");
    let mut group = criterion.benchmark_group(format!("{}, {image}, {tokens} tokens", cuda.name()));

    let lengths = [tokens * Q_HEADS * HEAD_DIM, tokens * K_HEADS * HEAD_DIM];
    let bytes = (lengths[0] + lengths[1]) * size_of::<T>();
    let copies = COLD_BYTES.div_ceil(bytes).min(4096);
    let random = |length: usize| -> CudaSlice<T> {
        let host: Vec<_> = (0..length)
            .map(|i| T::narrow((i % 251) as f32 / 251.0))
            .collect();
        stream.clone_htod(&host).expect("room on the device")
    };
    let mut buffers: Vec<_> = (0..copies)
        .map(|_| (random(lengths[0]), random(lengths[1])))
        .collect();

    let frequencies = Frequencies::from_theta(5e5, HEAD_DIM).expect("a valid theta");
    let axis_of_pair: Vec<_> = (0..HEAD_DIM / 2).map(|pair| pair % 3).collect();
    let on_axes = frequencies.clone().with_axes(3, &axis_of_pair);
    let on_axes = on_axes.expect("an axis for each pair");
    for (name, rope) in [
        (
            "half_split",
            Rope::new(frequencies.clone(), Pairing::HalfSplit),
        ),
        ("interleaved", Rope::new(frequencies, Pairing::Interleaved)),
        ("half_split, 3 axes", Rope::new(on_axes, Pairing::HalfSplit)),
    ] {
        let rotator = cuda.rotator(&rope).expect("room on the device");
        let problem = Problem::new(dtype)
            .q(Layout::tokens(tokens, Q_HEADS, HEAD_DIM))
            .k(Layout::tokens(tokens, K_HEADS, HEAD_DIM));
        let plan = rotator.plan(&problem).expect("a valid problem");
        group.throughput(Throughput::Bytes(plan.bytes()));
        group.bench_function(format!("{dtype} {name}"), |bencher| {
            bencher.iter_custom(|iterations| {
                device_time(context, &stream, iterations, |n| {
                    let (q, k) = &mut buffers[n % copies];
                    rotator
                        .rotate(
                            &stream,
                            &plan,
                            Some(InOut::InPlace(q.as_view_mut())),
                            Some(InOut::InPlace(k.as_view_mut())),
                            &CudaPositions::start(1000),
                        )
                        .expect("enqueued");
                })
            });
        });
    }
    let mut target = (random(lengths[0]), random(lengths[1]));
    group.bench_function(format!("{dtype} device-to-device copy"), |bencher| {
        bencher.iter_custom(|iterations| {
            device_time(context, &stream, iterations, |n| {
                let (q, k) = &buffers[n % copies];
                stream.memcpy_dtod(q, &mut target.0).expect("copied");
                stream.memcpy_dtod(k, &mut target.1).expect("copied");
            })
        });
    });
    group.finish();
}

fn cuda(criterion: &mut Criterion) {
    if !matches!(device_count(), Ok(1..)) {
        println!("no GPU: nothing to measure");
        return;
    }
    let context = CudaContext::new(0).expect("the first device opens");
    for tokens in [1, 32, 256, 2048, 8192, 32_768] {
        rotations::<f32>(criterion, &context, tokens);
        rotations::<f16>(criterion, &context, tokens);
        rotations::<bf16>(criterion, &context, tokens);
    }
    criterion.bench_function("load the kernels of one element type", |bencher| {
        bencher.iter(|| Cuda::new(&context, &[Dtype::Bf16]).expect("kernels load"));
    });
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20);
    targets = cuda
}
criterion_main!(benches);
