//! Attention layers with rotary position embedding, on the host and on CUDA: projections, the fused step of
//! [`phasor`] (bias, norms, rotation, append), attention over a paged cache, and the way out.
//!
//! * [`AttentionLayer`] is the layer: [`Projection`]s, a [`Rope`](phasor::Rope), an [`AttentionConfig`].
//! * Weights are dense ([`DenseWeights`]), of GGUF files ([`GgmlWeights`], [`GgmlLinear`]), of GPTQ
//!   checkpoints ([`GptqWeights`]), float8 ([`Fp8Weights`], [`Fp8Linear`]), or an engine's own: anything that
//!   implements [`Weights`] or [`Projection`]. [`LowRank`] and [`LatentKeys`] make latent attention of them.
//! * [`PagedKvCache`] owns a cache of all layers; [`KvCacheMut`] borrows an engine's, in any of phasor's
//!   layouts, of elements or of 8-bit codes ([`CodedCache`]). A [`RaggedBatch`] says which tokens and pages each sequence has. Lengths and pages are the
//!   caller's: a call changes neither.
//! * [`Attend`] is attention alone, for those who project and append by themselves. Its module,
//!   [`attend`], defines every result.
//! * [`LayerWeights::shard`] spreads a layer over devices, [`TensorParallelAttention`] and
//!   [`DataParallelAttention`] run it on them.
//! * `cuda`, with the feature of that name, has the layer on a device, or with `nccl` on several; [`kernels`] has what is launched there
//!   as data.
//! * [`max`] has the layers of Modular's MAX under their names.
//!
//! # Where bits are the same, and where not
//!
//! Rotation, append and attention have one definition: given the same queries, keys and values, results are
//! the same bits on any instruction set and any number of threads, for a prompt as for its tokens one by
//! one; the CUDA kernels of attention and of dequantisation make the same bits too. Projections on CUDA are
//! those of cublasLt; [`Linear`] products of more than 8 tokens are those of the crate `gemm` or of an
//! instruction for bf16. The order of their sums depends on the processor; so whole layers agree to rounding.
//! With a [`Projection`] whose sums have one order, as [`GgmlLinear`]'s, they are the same bits too.
//!
//! A call does not look for a NaN or an infinity: it shows in what depends on it. [`check_finite`] looks for
//! one among weights.

#![warn(missing_docs, unsafe_op_in_unsafe_fn)]

pub mod attend;
#[cfg(target_arch = "x86_64")]
mod bf16;
mod cache;
mod codes;
#[cfg(feature = "cuda")]
pub mod cuda;
mod dot;
mod error;
mod fp8;
mod ggml;
mod gptq;
pub mod kernels;
mod latent;
mod layer;
mod mask;
pub mod max;
mod projection;
mod scalar;
mod shard;

pub use attend::Attend;
pub use cache::{CodedCache, KvCacheMut, KvCacheView, PagedCodeCache, PagedKvCache, RaggedBatch};
pub use codes::CodeScales;
pub use error::AttentionError;
pub use fp8::{Fp8Activation, Fp8Linear, Fp8WeightScale, Fp8Weights};
pub use ggml::{GgmlLinear, GgmlType, GgmlWeights};
pub use gptq::{GptqFormat, GptqTensors, GptqWeights};
pub use latent::{LatentKeys, LowRank};
pub use layer::{AttentionConfig, AttentionLayer, HeadWeights, QkvProjection, Workspace};
pub use mask::AttentionMask;
pub use phasor;
pub use projection::{
    DenseRows, DenseWeights, Linear, Projection, StackedWeights, Weights, WindowOfWeights,
    check_finite,
};
pub use shard::{
    Collective, DataParallelAttention, DeviceBatch, LayerWeights, LocalCollective,
    ShardingStrategy, TensorParallelAttention,
};
