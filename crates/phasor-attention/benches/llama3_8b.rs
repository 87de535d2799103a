//! A Llama-3-8B layer: a prompt of 512 tokens, and a token at a context of 4,096. Beside it
//! `benches/sdpa.py` times torch. `cargo bench -p phasor-attention`; RAYON_NUM_THREADS says how many
//! threads.

use phasor_attention::phasor::half::bf16;
use phasor_attention::phasor::quantize::Codes;
use phasor_attention::phasor::{Element, Frequencies, Host, Pairing, Rope};
use phasor_attention::{
    Attend, AttentionConfig, AttentionLayer, AttentionMask, DenseWeights, GgmlLinear, GgmlType,
    GgmlWeights, Linear, PagedCodeCache, PagedKvCache, Projection, QkvProjection, RaggedBatch,
    Workspace,
};
use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

const HEADS: usize = 32;
const KV_HEADS: usize = 8;
const HEAD_DIM: usize = 128;
const HIDDEN: usize = 4096;
const PAGE_SIZE: usize = 16;
const CONTEXT: usize = 4096;

/// The least of several runs, in milliseconds.
fn least(mut run: impl FnMut()) -> f64 {
    let start = Instant::now();
    let mut least = f64::INFINITY;
    let mut runs = 0;
    while runs < 3 || start.elapsed().as_secs_f64() < 1.0 {
        let start = Instant::now();
        run();
        least = least.min(start.elapsed().as_secs_f64() * 1e3);
        runs += 1;
    }
    least
}

fn values<T: Element>(len: usize) -> Vec<T> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        T::narrow((state >> 8) as f32 / (1 << 23) as f32 - 1.0)
    };
    (0..len).map(|_| next()).collect()
}

fn bench<T: Element>() {
    let pages = CONTEXT / PAGE_SIZE;
    let mut cache = PagedKvCache::<T>::new(pages, 1, PAGE_SIZE, KV_HEADS, HEAD_DIM).unwrap();
    let len = cache.elements().len();
    cache.elements_mut().copy_from_slice(&values(len));
    // Pages in no order.
    let table: Vec<i32> = (0..pages).map(|page| (page * 37 % pages) as i32).collect();
    let attend = Attend {
        heads: HEADS,
        scale: 1.0 / (HEAD_DIM as f32).sqrt(),
        mask: AttentionMask::Causal,
        logits_soft_cap: None,
        sinks: None,
    };
    let host = Host::new();
    let name = T::DTYPE.name();
    for (what, cached, new) in [
        ("prompt of 512", 0, 512),
        ("1 token at 4,096", CONTEXT - 1, 1),
    ] {
        let q = values::<T>(new * HEADS * HEAD_DIM);
        let mut out = vec![T::default(); q.len()];
        let (cu_seqlens, lengths) = ([0, new as i32], [cached as i32]);
        let batch = RaggedBatch::new(&cu_seqlens, &lengths, &table);
        let layer = cache.layer(0).unwrap();
        let time = least(|| {
            attend
                .run(&host, &q, layer.view(), &batch, &mut out)
                .unwrap();
            black_box(&out);
        });
        println!("{name:5} attention, {what:18} {time:9.3} ms");
    }

    let dense = |rows: usize, columns: usize| {
        Arc::new(Linear(
            DenseWeights::new(values::<T>(rows * columns), rows, columns).unwrap(),
        ))
    };
    let layer = AttentionLayer::new(
        AttentionConfig::new(HIDDEN, HEADS, KV_HEADS, HEAD_DIM),
        &host,
        &Rope::new(
            Frequencies::from_theta(500_000.0, HEAD_DIM).unwrap(),
            Pairing::HalfSplit,
        ),
        QkvProjection::Stacked(dense((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN)),
        dense(HIDDEN, HEADS * HEAD_DIM),
    )
    .unwrap();
    let mut workspace = Workspace::default();
    for (what, cached, new) in [
        ("prompt of 512", 0, 512),
        ("1 token at 4,096", CONTEXT - 1, 1),
    ] {
        let x = values::<T>(new * HIDDEN);
        let mut out = vec![T::default(); x.len()];
        let (cu_seqlens, lengths) = ([0, new as i32], [cached as i32]);
        let batch = RaggedBatch::new(&cu_seqlens, &lengths, &table);
        let mut cache = cache.layer(0).unwrap();
        let time = least(|| {
            layer
                .forward(&x, &mut cache, &batch, &mut workspace, &mut out)
                .unwrap();
            black_box(&out);
        });
        println!("{name:5} layer,     {what:18} {time:9.3} ms");
    }
}

/// Attention over a cache of int8 codes with a scale for each token and head; layers of Q4_K weights, by
/// their values and in integers.
fn bench_codes() {
    let pages = CONTEXT / PAGE_SIZE;
    let mut cache =
        PagedCodeCache::new(Codes::Int8, pages, 1, PAGE_SIZE, KV_HEADS, HEAD_DIM).unwrap();
    let table: Vec<i32> = (0..pages).map(|page| (page * 37 % pages) as i32).collect();
    let host = Host::new();
    let rope = Rope::new(
        Frequencies::from_theta(500_000.0, HEAD_DIM).unwrap(),
        Pairing::HalfSplit,
    );
    let q4_k = |rows: usize, columns: usize| {
        let mut blocks: Vec<u8> = (0..rows * columns / 256 * 144).map(|at| at as u8).collect();
        for block in blocks.chunks_mut(144) {
            // d and dmin of 2^-10.
            block[..4].copy_from_slice(&[0, 0x14, 0, 0x14]);
        }
        GgmlWeights::new(GgmlType::Q4_K, blocks, rows, columns).unwrap()
    };
    let qkv = q4_k((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN);
    let o = q4_k(HIDDEN, HEADS * HEAD_DIM);
    let config = AttentionConfig::new(HIDDEN, HEADS, KV_HEADS, HEAD_DIM);
    let layer = |qkv: Arc<dyn Projection<f32>>, o| {
        let qkv = QkvProjection::Stacked(qkv);
        AttentionLayer::new(config.clone(), &host, &rope, qkv, o).unwrap()
    };
    let by_values = layer(
        Arc::new(Linear(qkv.clone())),
        Arc::new(Linear(o.clone())) as Arc<dyn Projection<f32>>,
    );
    let in_integers = layer(Arc::new(GgmlLinear(qkv)), Arc::new(GgmlLinear(o)));
    let (cu_seqlens, lengths) = ([0, 1], [CONTEXT as i32 - 1]);
    let batch = RaggedBatch::new(&cu_seqlens, &lengths, &table);
    let x = values::<f32>(HIDDEN);
    let mut out = vec![0.0; HIDDEN];
    let attend = Attend {
        heads: HEADS,
        scale: 1.0 / (HEAD_DIM as f32).sqrt(),
        mask: AttentionMask::Causal,
        logits_soft_cap: None,
        sinks: None,
    };
    let mut cache = cache.layer(0).unwrap();
    let time = least(|| {
        attend
            .run(&host, &x, cache.view(), &batch, &mut out)
            .unwrap();
        black_box(&out);
    });
    println!("int8  attention, 1 token at 4,096   {time:9.3} ms");
    let mut workspace = Workspace::default();
    for (what, layer) in [("values", &by_values), ("integers", &in_integers)] {
        let time = least(|| {
            layer
                .forward(&x, &mut cache, &batch, &mut workspace, &mut out)
                .unwrap();
            black_box(&out);
        });
        println!("Q4_K in {what:8}, 1 token at 4,096 {time:9.3} ms");
    }
}

fn main() {
    // `cargo test` runs it too; then it does nothing.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    println!(
        "{} threads, {}",
        rayon::current_num_threads(),
        Host::new().isa().name()
    );
    bench::<f32>();
    bench::<bf16>();
    bench_codes();
}
