#![warn(missing_docs, unsafe_op_in_unsafe_fn)]
//! Attention layers with rotary position embedding over a paged cache.
pub mod attend;
mod cache;
mod error;
mod mask;
mod scalar;

pub use attend::Attend;
pub use cache::{KvCacheMut, KvCacheView, PagedKvCache, RaggedBatch};
pub use error::AttentionError;
pub use mask::AttentionMask;
pub use phasor;
