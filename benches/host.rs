//! The host backend: q and k of a Llama-3-8B layer, with a memory copy of the same bytes in the
//! same run. Throughput counts the bytes of q and k read and written.

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use phasor::half::{bf16, f16};
use phasor::norm::HeadNorm;
use phasor::quantize::{Codes, ScaleForm};
use phasor::{
    CacheLayout, Element, Frequencies, Host, HostBytes, HostStep, HostWeights, InOut, Isa,
    KvCacheLayout, Layout, Pairing, Positions, Problem, Rope, Slots, Stages, StoredCodes, Threads,
};
use std::hint::black_box;

const Q_HEADS: usize = 32;
const K_HEADS: usize = 8;
const HEAD_DIM: usize = 128;
/// Together past the last-level cache of most machines.
const COLD_BYTES: usize = 512 << 20;

/// q and k often enough that a round through all of them does not fit the cache; or once.
struct Buffers<T> {
    pairs: Vec<(Vec<T>, Vec<T>)>,
    next: usize,
}

impl<T: Element> Buffers<T> {
    fn new(tokens: usize, cold: bool) -> Self {
        let (q, k) = (tokens * Q_HEADS * HEAD_DIM, tokens * K_HEADS * HEAD_DIM);
        let bytes = (q + k) * size_of::<T>();
        let copies = if cold { COLD_BYTES.div_ceil(bytes) } else { 1 };
        let fill = |n: usize| {
            (0..n)
                .map(|i| T::narrow((i % 251) as f32 / 251.0))
                .collect()
        };
        Self {
            pairs: (0..copies).map(|_| (fill(q), fill(k))).collect(),
            next: 0,
        }
    }

    fn next(&mut self) -> &mut (Vec<T>, Vec<T>) {
        self.next = (self.next + 1) % self.pairs.len();
        &mut self.pairs[self.next]
    }
}

fn rotations<T: Element>(group: &mut BenchmarkGroup<'_, WallTime>, tokens: usize, cold: bool) {
    let mut buffers = Buffers::<T>::new(tokens, cold);
    let (q, k) = (
        Layout::tokens(tokens, Q_HEADS, HEAD_DIM),
        Layout::tokens(tokens, K_HEADS, HEAD_DIM),
    );
    let dtype = T::DTYPE;
    for pairing in [Pairing::HalfSplit, Pairing::Interleaved] {
        let frequencies = Frequencies::from_theta(5e5, HEAD_DIM).expect("a valid theta");
        let rope = Rope::new(frequencies, pairing);
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            for threads in [Threads::One, Threads::Pool] {
                // The definition is slow by design: one point is enough.
                if isa == Isa::Scalar && (threads == Threads::Pool || cold) {
                    continue;
                }
                let host = Host::new().with_isa(isa).expect("checked above");
                let rotator = host.with_threads(threads).rotator(&rope);
                let plan = rotator
                    .plan(&Problem::new(dtype).q(q).k(k))
                    .expect("a valid problem");
                group.throughput(Throughput::Bytes(plan.bytes()));
                let name = format!("{dtype} {} {} {threads:?}", pairing.name(), isa.name());
                group.bench_function(name, |bencher| {
                    bencher.iter(|| {
                        let (q, k) = buffers.next();
                        rotator
                            .rotate(
                                &plan,
                                Some(InOut::InPlace(&mut q[..])),
                                Some(InOut::InPlace(&mut k[..])),
                                black_box(Positions::start(1000)),
                            )
                            .expect("the buffers fit");
                    });
                });
            }
        }
    }
    let mut target = Buffers::<T>::new(tokens, false);
    group.bench_function(format!("{dtype} memory copy"), |bencher| {
        bencher.iter(|| {
            let (from_q, from_k) = buffers.next();
            let (to_q, to_k) = target.next();
            black_box(&mut *to_q).copy_from_slice(black_box(from_q));
            black_box(&mut *to_k).copy_from_slice(black_box(from_k));
        });
    });
}

/// Packed qkv of one token to rotated q and a cache, with ever more stages, beside the plain rotation.
fn steps<T: Element>(group: &mut BenchmarkGroup<'_, WallTime>)
where
    for<'a> HostBytes<'a>: From<&'a mut Vec<T>>,
{
    let dtype = T::DTYPE;
    let frequencies = Frequencies::from_theta(5e5, HEAD_DIM).expect("a valid theta");
    let rope = Rope::new(frequencies, Pairing::HalfSplit);
    let rotator = Host::new().with_threads(Threads::One).rotator(&rope);
    let heads = Q_HEADS + 2 * K_HEADS;
    let window = |range| Layout::packed_heads(1, 1, heads, HEAD_DIM, range);
    let (q, k, v) = (
        window(0..Q_HEADS),
        window(Q_HEADS..Q_HEADS + K_HEADS),
        window(Q_HEADS + K_HEADS..heads),
    );
    let mut qkv: Vec<T> = (0..heads * HEAD_DIM)
        .map(|i| T::narrow((i % 251) as f32 / 251.0))
        .collect();
    let positions = || black_box(Positions::start(1000));
    let plain = rotator
        .plan(&Problem::new(dtype).q(q).k(k).one_buffer())
        .expect("a valid problem");
    group.bench_function(format!("{dtype} rotation"), |bencher| {
        bencher.iter(|| rotator.rotate_one_buffer(&plain, &mut qkv, positions()));
    });
    let cache = CacheLayout::paged_nhd(4, 16, K_HEADS, HEAD_DIM);
    let caches = KvCacheLayout::separate(cache, cache);
    let codes = caches.with_codes(StoredCodes::given(Codes::E4m3, ScaleForm::Divide));
    let append = Problem::new(dtype)
        .q(q)
        .k_to_cache(k)
        .v_to_cache(v)
        .one_buffer();
    let norm = Stages::new().norm(HeadNorm::rms(1e-6));
    let normed = append.q_stages(norm).k_stages(norm);
    let gamma = [T::narrow(1.5); HEAD_DIM];
    let room = 4 * 16 * K_HEADS * HEAD_DIM;
    let mut elements = [vec![T::default(); room], vec![T::default(); room]];
    let mut bytes = [vec![0u8; room], vec![0u8; room]];
    for (name, problem, has_norm, has_codes) in [
        ("rotation, append", append.cache(caches), false, false),
        ("norm, rotation, append", normed.cache(caches), true, false),
        ("rotation, append e4m3", append.cache(codes), false, true),
        (
            "norm, rotation, append e4m3",
            normed.cache(codes),
            true,
            true,
        ),
    ] {
        let plan = rotator.plan(&problem).expect("a valid problem");
        group.bench_function(format!("{dtype} {name}"), |bencher| {
            bencher.iter(|| {
                let weights = |scales: bool| {
                    let weights = match has_norm {
                        true => HostWeights::new().norm(&gamma[..]),
                        false => HostWeights::new(),
                    };
                    match scales && has_codes {
                        true => weights.scales(&[0.5][..]),
                        false => weights,
                    }
                };
                let v_weights = match has_codes {
                    true => HostWeights::new().scales(&[0.5][..]),
                    false => HostWeights::new(),
                };
                let step = HostStep::new(positions())
                    .buffer(&mut qkv[..])
                    .q_weights(weights(false))
                    .k_weights(weights(true))
                    .v_weights(v_weights)
                    .slots(Slots::mapping(&[37]));
                let [k_elements, v_elements] = &mut elements;
                let [k_bytes, v_bytes] = &mut bytes;
                let step = match has_codes {
                    true => step.k_cache(k_bytes).v_cache(v_bytes),
                    false => step.k_cache(k_elements).v_cache(v_elements),
                };
                rotator.step(&plan, step).expect("the operands fit")
            });
        });
    }
}

fn host(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("step of 1 token");
    steps::<f32>(&mut group);
    steps::<f16>(&mut group);
    steps::<bf16>(&mut group);
    group.finish();
    for (name, tokens, cold) in [
        ("decode 1 token", 1, false),
        ("128 tokens", 128, false),
        ("prefill 2048 tokens, cold", 2048, true),
    ] {
        let mut group = criterion.benchmark_group(name);
        rotations::<f32>(&mut group, tokens, cold);
        rotations::<f16>(&mut group, tokens, cold);
        rotations::<bf16>(&mut group, tokens, cold);
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20);
    targets = host
}
criterion_main!(benches);
