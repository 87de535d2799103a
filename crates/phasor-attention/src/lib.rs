//! Attention layers with rotary position embedding, on the host and on CUDA: projections, the fused step of
//! [`phasor`] (bias, norms, rotation, append), attention over a paged cache, and the way out.
//!
//! * [`AttentionLayer`] is the layer: [`Projection`]s, a [`Rope`](phasor::Rope), an [`AttentionConfig`].
//! * Weights are dense ([`DenseWeights`]), of GGUF files ([`GgmlWeights`]), of GPTQ checkpoints
//!   ([`GptqWeights`]), float8 ([`Fp8Weights`], [`Fp8Linear`]), or an engine's own: anything that implements
//!   [`Weights`] or [`Projection`].
//! * [`PagedKvCache`] owns a cache of all layers; [`KvCacheMut`] borrows an engine's, in any of phasor's
//!   layouts. A [`RaggedBatch`] says which tokens and pages each sequence has. Lengths and pages are the
//!   caller's: a call changes neither.
//! * [`Attend`] is attention alone, for those who project and append by themselves. Its module,
//!   [`attend`], defines every result.
//! * [`LayerWeights::shard`] spreads a layer over devices, [`TensorParallelAttention`] and
//!   [`DataParallelAttention`] run it on them.
//! * `cuda`, with the feature of that name, has the layer on a device; [`kernels`] has what is launched there
//!   as data.
//! * [`max`] has the layers of Modular's MAX under their names.
//!
//! # Where bits are the same, and where not
//!
//! Rotation, append and attention have one definition: given the same queries, keys and values, results are
//! the same bits on any instruction set and any number of threads, for a prompt as for its tokens one by
//! one; the CUDA kernels of attention and of dequantisation make the same bits too. Projections are matrix
//! products, of the crate `gemm` on the host and of cublasLt on CUDA, whose order of sums depends on the
//! processor and on how many tokens there are; so whole layers agree to rounding. With a [`Projection`] whose
//! sums have one order, they are the same bits too.
//!
//! A NaN or an infinity is not looked for: it shows in what depends on it.

#![warn(missing_docs, unsafe_op_in_unsafe_fn)]

pub mod attend;
mod cache;
#[cfg(feature = "cuda")]
pub mod cuda;
mod error;
mod fp8;
mod ggml;
mod gptq;
pub mod kernels;
mod layer;
mod mask;
pub mod max;
mod projection;
mod scalar;
mod shard;

pub use attend::Attend;
pub use cache::{KvCacheMut, KvCacheView, PagedKvCache, RaggedBatch};
pub use error::AttentionError;
pub use fp8::{Fp8Activation, Fp8Linear, Fp8WeightScale, Fp8Weights};
pub use ggml::{GgmlType, GgmlWeights};
pub use gptq::{GptqFormat, GptqTensors, GptqWeights};
pub use layer::{AttentionConfig, AttentionLayer, HeadWeights, QkvProjection, Workspace};
pub use mask::AttentionMask;
pub use phasor;
pub use projection::{DenseWeights, Linear, Projection, StackedWeights, Weights, WindowOfWeights};
pub use shard::{
    Collective, DataParallelAttention, DeviceBatch, LayerWeights, LocalCollective,
    ShardingStrategy, TensorParallelAttention,
};
