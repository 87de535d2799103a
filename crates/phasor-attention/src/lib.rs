#![warn(missing_docs, unsafe_op_in_unsafe_fn)]
//! Attention layers with rotary position embedding over a paged cache.
pub mod attend;
mod cache;
mod error;
mod fp8;
mod ggml;
mod gptq;
mod layer;
mod mask;
mod projection;
mod scalar;

pub use attend::Attend;
pub use cache::{KvCacheMut, KvCacheView, PagedKvCache, RaggedBatch};
pub use error::AttentionError;
pub use fp8::{Fp8Activation, Fp8Linear, Fp8WeightScale, Fp8Weights};
pub use ggml::{GgmlType, GgmlWeights};
pub use gptq::{GptqFormat, GptqTensors, GptqWeights};
pub use layer::{AttentionConfig, AttentionLayer, HeadWeights, QkvProjection, Workspace};
pub use mask::AttentionMask;
pub use phasor;
pub use projection::{DenseWeights, Linear, Projection, StackedWeights, Weights};
