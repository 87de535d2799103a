//! Prefill and decode of an attention layer on CUDA, beside the same layer on the host.
//!
//!     cargo run --release -p phasor-attention --features cuda --example cuda_layer
//!
//! The prompt goes through the same kernel of attention as decode does, which is right, and slow for long
//! prompts: an engine has its own between `project_and_store` and `project_out`. Without a GPU or cublasLt
//! the example says what is missing.

use phasor_attention::cuda::{
    AttentionKernels, CublasLt, CudaAttentionLayer, CudaBatch, CudaDense, CudaKvCache,
    CudaLayerShape, CudaProjection, CudaQkv, Precision,
};
use phasor_attention::phasor::cuda::{Cuda, CudaIds};
use phasor_attention::phasor::half::bf16;
use phasor_attention::phasor::{CacheLayout, Dtype, Frequencies, Host, Pairing, Rope, Stored};
use phasor_attention::{
    AttentionConfig, AttentionError, AttentionLayer, DenseWeights, KvCacheMut, Linear,
    QkvProjection, RaggedBatch, Workspace,
};
use std::sync::Arc;
use std::time::Instant;

const HIDDEN: usize = 1024;
const HEADS: usize = 16;
const KV_HEADS: usize = 4;
const DIMS: usize = 64;
const ALL: usize = (HEADS + 2 * KV_HEADS) * DIMS;
const PAGE_SIZE: usize = 16;
const PROMPT: usize = 100;
const NEW: usize = 20;

/// Values of no meaning, the same in each run.
fn values(seed: u32, len: usize, most: f32) -> Vec<bf16> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        bf16::from_f32((state >> 8) as f32 * (2.0 * most / (1 << 24) as f32) - most)
    };
    (0..len).map(|_| next()).collect()
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let cuda = match Cuda::open(0, &[Dtype::Bf16]) {
        Ok(cuda) => cuda,
        Err(error) => {
            println!("{error}");
            return Ok(());
        }
    };
    let kernels = AttentionKernels::new(&cuda);
    let lt = match CublasLt::new(&kernels) {
        Ok(lt) => lt,
        Err(error @ AttentionError::NoCublasLt { .. }) => {
            println!("{error}");
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    };
    let stream = cuda.context().new_stream()?;

    let (qkv, o) = (
        values(1, ALL * HIDDEN, 0.05),
        values(2, HIDDEN * HEADS * DIMS, 0.05),
    );
    let rope = Rope::new(
        Frequencies::from_theta(500_000.0, DIMS)?,
        Pairing::HalfSplit,
    );
    let config = AttentionConfig::new(HIDDEN, HEADS, KV_HEADS, DIMS);
    let dense = |values: &[bf16],
                 features|
     -> Result<Arc<dyn CudaProjection<bf16>>, Box<dyn std::error::Error>> {
        let on_device = stream.clone_htod(values)?;
        Ok(Arc::new(CudaDense::new(
            &lt,
            on_device,
            features,
            Precision::F32,
        )?))
    };
    let layer = CudaAttentionLayer::new(
        config.clone(),
        &kernels,
        &rope,
        CudaQkv::Stacked(dense(&qkv, [ALL, HIDDEN])?),
        dense(&o, [HIDDEN, HEADS * DIMS])?,
    )?;
    let on_host = AttentionLayer::<bf16>::new(
        config,
        &Host::new(),
        &rope,
        QkvProjection::Stacked(Arc::new(Linear(DenseWeights::<bf16>::new(
            qkv, ALL, HIDDEN,
        )?))),
        Arc::new(Linear(DenseWeights::<bf16>::new(o, HIDDEN, HEADS * DIMS)?)),
    )?;

    // One sequence; the engine's allocator gave it these pages.
    let of_sequence = (PROMPT + NEW).div_ceil(PAGE_SIZE);
    let page_table: Vec<i32> = (0..of_sequence as i32).rev().collect();
    let cache = CacheLayout::paged_nhd(of_sequence, PAGE_SIZE, KV_HEADS, DIMS);
    let len = of_sequence * PAGE_SIZE * KV_HEADS * DIMS;
    let (mut k, mut v) = (
        stream.alloc_zeros::<bf16>(len)?,
        stream.alloc_zeros::<bf16>(len)?,
    );
    let (mut host_k, mut host_v) = (vec![bf16::ZERO; len], vec![bf16::ZERO; len]);
    let mut host_workspace = Workspace::default();

    let shape = |tokens, ragged| CudaLayerShape {
        tokens,
        sequences: 1,
        ragged,
        table_pages: of_sequence,
        most_keys: None,
        k: cache,
        v: cache,
        one_buffer: false,
        codes: None,
    };
    let (prefill, decode) = (
        layer.plan(&shape(PROMPT, true))?,
        layer.plan(&shape(1, false))?,
    );
    // The larger plan's workspace serves both.
    let mut workspace = layer.workspace(&stream, &prefill)?;
    println!("{}: {} bytes of workspace", cuda.name(), workspace.bytes());
    let report = cuda.report()?;
    let pages = stream.clone_htod(&page_table)?;
    let mut worst = 0.0f32;
    let mut cached = 0;
    while cached < PROMPT + NEW {
        let (plan, tokens) = match cached {
            0 => (&prefill, PROMPT),
            _ => (&decode, 1),
        };
        let x = values(cached as u32, tokens * HIDDEN, 1.0);
        let on_device = stream.clone_htod(&x)?;
        let mut out = stream.alloc_zeros::<bf16>(x.len())?;
        let lengths = stream.clone_htod(&[cached as i32])?;
        let offsets = stream.clone_htod(&[0, tokens as i32])?;
        let batch = CudaBatch {
            cu_seqlens: plan.shape().ragged.then(|| CudaIds::from(&offsets)),
            cache_lengths: CudaIds::from(&lengths),
            page_table: CudaIds::from(&pages),
            position_ids: None,
            frequency_rows: None,
        };
        stream.synchronize()?;
        let start = Instant::now();
        layer.forward(
            &stream,
            plan,
            on_device.as_view(),
            &mut CudaKvCache::Separate {
                k: k.as_view_mut(),
                v: v.as_view_mut(),
            },
            &batch,
            &mut workspace,
            out.as_view_mut(),
            &report,
        )?;
        stream.synchronize()?;
        let took = start.elapsed();
        assert_eq!(report.stored(&stream)?, Stored::All);

        let mut expected = vec![bf16::ZERO; x.len()];
        on_host.forward(
            &x,
            &mut KvCacheMut::separate((cache, &mut host_k), (cache, &mut host_v))?,
            &RaggedBatch::new(&[0, tokens as i32], &[cached as i32], &page_table),
            &mut host_workspace,
            &mut expected,
        )?;
        let got = stream.clone_dtoh(&out)?;
        for (got, expected) in got.iter().zip(&expected) {
            worst = worst.max((got.to_f32() - expected.to_f32()).abs());
        }
        if cached == 0 || cached + 1 == PROMPT + NEW {
            println!("{tokens} new tokens after {cached}: {took:?}");
        }
        cached += tokens;
    }
    println!("largest difference to the host: {worst}");
    Ok(())
}
