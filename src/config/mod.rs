//! Rotations from models' configs: a Hugging Face `config.json` or the metadata of a GGUF file.
//!
//! Read a config into a [`ModelConfig`] and ask it for the [`Rope`](crate::Rope) of a layer. What
//! it found out (scaling, pairing and why, score scale, layers that do not rotate) can be asked
//! for, and everything it cannot make sense of is a [`ConfigError`] that names the key.
//!
//! ```
//! # #[cfg(feature = "hf-config")]
//! # fn main() -> Result<(), phasor::config::ConfigError> {
//! use phasor::Pairing;
//! use phasor::config::{ModelConfig, Scaling};
//!
//! let model = ModelConfig::from_hf_config(
//!     r#"{
//!         "model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32,
//!         "max_position_embeddings": 131072, "rope_theta": 500000.0,
//!         "rope_scaling": {
//!             "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
//!             "high_freq_factor": 4.0, "original_max_position_embeddings": 8192
//!         }
//!     }"#,
//! )?;
//! let config = model.rope()?;
//! assert_eq!((config.head_dim(), config.pairing()), (128, Pairing::HalfSplit));
//! assert!(matches!(config.scaling(), Scaling::Llama3(_)));
//! let rope = config.rope()?; // for Host, Cuda or Device
//! # Ok(())
//! # }
//! # #[cfg(not(feature = "hf-config"))]
//! # fn main() {}
//! ```
//!
//! # How it is put together
//!
//! A reader ([`ModelConfig::from_hf_config`], [`ModelConfig::from_gguf`]) looks the model up in a
//! table of families and fills a [`RopeConfig`] per kind of layer: theta, dims, pairing, a
//! [`Scaling`] and [`Axes`]. Its formulas run in extended precision and end in
//! [`Frequencies`](crate::Frequencies) or [`FrequencyRows`](crate::FrequencyRows).
//!
//! Numbers of a config are taken as the `f64` that JSON makes of them. Formulas follow Hugging Face
//! transformers and llama.cpp, but for their rounding.

mod axes;
mod error;
#[cfg(feature = "hf-config")]
mod families;
mod formulas;
mod gguf;
#[cfg(feature = "hf-config")]
mod hf;
mod model;
mod pairing;
mod rope_config;
mod scaling;

pub(crate) use formulas::{long_rope_gain, mscale};

pub use axes::{Axes, GgmlMrope};
pub use error::ConfigError;
pub use gguf::GgufValue;
pub use model::ModelConfig;
pub use pairing::{OutputOrder, PairingRule};
pub use rope_config::{RopeConfig, row_for_call};
pub use scaling::{
    DynamicNtkScaling, LinearScaling, Llama3Scaling, LongRopeScaling, NtkAlphaScaling,
    ProportionalScaling, QwenNtkScaling, Scaling, YarnScaling,
};
