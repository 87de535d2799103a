//! The calls of other systems, over this crate's rotation.
//!
//! Whoever comes with code written against one of them finds the call here, under its name, with its
//! arguments and their exact meaning:
//!
//! | module | original |
//! |---|---|
//! | [`mlx`] | `mx.fast.rope`, `mlx.nn.RoPE` |
//! | [`max`] | `max.nn.rotary_embedding.RotaryEmbedding` and its subclasses |
//! | [`onnx`] | the operator `RotaryEmbedding` of ai.onnx and com.microsoft |
//! | [`vllm`] | `RotaryEmbedding`, `ops.rotary_embedding` |
//! | [`ggml`] | llama.cpp's `ggml_rope_ext`, `ggml_rope_multi` and their backward passes |
//! | [`hugging_face`] | `apply_rotary_pos_emb`, `apply_rotary_emb` |
//! | [`tables`] | cos and sin tables with each system's own roundings |
//!
//! An interface only translates: it makes a [`Rope`](crate::Rope), layouts and positions, and a
//! rotator does the rest. Results are therefore the same bits as those of the plain calls, on host
//! and GPU alike, and differ from the original's by its roundings: exact angles, one rounding at the
//! end. NaN and infinities stay in their pair, and empty batches return empty.
//!
//! A type of an interface is prepared once for a [`Device`](crate::Device) and serves any number of
//! calls. It rotates [`Buffer`](crate::Buffer)s there, and slices on the host; see [`Memory`]. A call
//! checks shapes and makes a plan, and copies positions to the device where they are an array;
//! engines that count microseconds keep a [`Plan`](crate::Plan) of their own for the type's `rope()`.
//! (Where that has a table, it passes tokens outside through: it is the call that refuses them.)
//!
//! The backward pass of a rotation is the rotation the other way
//! ([`Direction::Inverse`](crate::Direction::Inverse)): `backward()` of each type is the same call for
//! gradients.
//!
//! ```
//! use phasor::Device;
//! use phasor::interfaces::Tensor;
//! use phasor::interfaces::mlx::{Rope, Spectrum};
//!
//! # fn main() -> Result<(), phasor::interfaces::InterfaceError> {
//! let rope = Rope::new(&Device::host(), 64, false, Spectrum::Base(10_000.0), 1.0)?;
//! let mut x = vec![1.0f32; 8 * 5 * 64];
//! rope.call(Tensor::new(&mut x, &[1, 8, 5, 64]), 100)?;
//! rope.backward()?.call(Tensor::new(&mut x, &[1, 8, 5, 64]), 100)?;
//! assert!(x.iter().all(|x| (x - 1.0).abs() < 1e-6));
//! # Ok(())
//! # }
//! ```

mod error;
pub mod ggml;
pub mod hugging_face;
pub mod max;
pub mod mlx;
pub mod onnx;
pub mod tables;
mod tensor;
pub mod vllm;

pub use error::InterfaceError;
pub use tensor::{Array, Memory, Tensor};

/// The guide's example is compiled with the documentation's.
#[cfg(doctest)]
#[doc = include_str!("../../docs/migration.md")]
struct Migration;
