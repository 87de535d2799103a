//! Rotary position embedding for [candle](candle_core)'s tensors, by [phasor]: exact at any position, on
//! the device of the tensors.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use phasor_candle::RotaryEmbedding;
//!
//! # fn main() -> Result<(), phasor_candle::Error> {
//! // The text of a model's config.json; a GGUF file or a phasor::Rope does as well.
//! let config = r#"{"model_type": "llama", "head_dim": 64, "rope_theta": 10000.0}"#;
//! let rotary = RotaryEmbedding::from_hf_config(config)?;
//! let q = Tensor::ones((1, 8, 5, 64), DType::F32, &Device::Cpu)?; // [batch, heads, tokens, head_dim]
//! let k = Tensor::ones((1, 2, 5, 64), DType::F32, &Device::Cpu)?;
//! let rotated = rotary.apply(&q, 1_000_000)?; // a new tensor: tokens at 1,000,000 to 1,000,004
//! rotary.apply_qk_inplace(&q, &k, 1_000_000)?; // where they are, both at once
//! # let same = rotated.eq(&q)?.min_all()?.to_scalar::<u8>()?;
//! # assert_eq!(same, 1);
//! # Ok(())
//! # }
//! ```
//!
//! # What there is
//!
//! - [`RotaryEmbedding`]: from a model's config, a GGUF file or a [`phasor::Rope`]. `apply` and
//!   `apply_packed` give new tensors, through which gradients flow; `apply_inplace`, `apply_qk_inplace` and
//!   `apply_into` write where a tensor is; `append` rotates and fills a cache.
//! - [`Positions`]: a number, a slice, or a tensor that is read on its device.
//! - [`rotary_emb`]: candle-nn's functions by their names, with given tables, and exact ones beside them.
//!
//! Plans of the last shapes are kept, so that a decode step checks nothing anew.
//!
//! # Devices
//!
//! A tensor is rotated where it is. On a CUDA device (feature `cuda`, off by default; candle's own kernels
//! need nvcc to build), phasor's kernels run in the context and on the stream of candle's device. Each call
//! of `Device::new_cuda` makes a context of its own, and tensors of two contexts cannot meet in a call:
//! make the device once and clone it. Tensors on Metal are refused.
//!
//! # In place
//!
//! Candle's tensors share storages. A call locks each storage once, whatever tensors share it, and waits for
//! one only while it holds none: neither calls on several threads nor ops of candle beside them can end up
//! waiting for each other. A tensor that gradients are to flow through is not written.

#![warn(missing_docs, unsafe_op_in_unsafe_fn)]

mod append;
mod cache;
#[cfg(feature = "cuda")]
mod cuda;
mod error;
mod gguf;
mod host;
mod number;
mod plans;
mod positions;
mod rotary;
pub mod rotary_emb;
mod storages;
mod view;

pub use cache::{CacheOrder, KvCache, Slots};
pub use error::{Error, Result};
pub use gguf::gguf_config;
pub use phasor;
pub use phasor::Stored;
pub use positions::{Ids, Positions};
pub use rotary::RotaryEmbedding;
pub use view::DimOrder;

/// The README's examples are compiled and run with the documentation's.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
