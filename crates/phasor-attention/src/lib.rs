#![warn(missing_docs, unsafe_op_in_unsafe_fn)]
//! Attention layers with rotary position embedding over a paged cache.
pub mod attend;
mod cache;
mod error;
mod layer;
mod mask;
mod projection;
mod scalar;

pub use attend::Attend;
pub use cache::{KvCacheMut, KvCacheView, PagedKvCache, RaggedBatch};
pub use error::AttentionError;
pub use layer::{AttentionConfig, AttentionLayer, HeadWeights, QkvProjection, Workspace};
pub use mask::AttentionMask;
pub use phasor;
pub use projection::{DenseWeights, Linear, Projection, StackedWeights, Weights};
