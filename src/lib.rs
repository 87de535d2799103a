//! Rotary position embedding (RoPE) for CUDA GPUs and the host: exact at any position, and the
//! same bits on every device.
//!
//! * **Exact angles.** A pair's frequency is a 64-bit fixed-point fraction of a turn per position,
//!   so `step * position mod 2^64` is the phase, in integers, for every `i64` position. There is no
//!   table to build, to outgrow or to keep in memory. See [`Frequencies`].
//! * **One definition.** Host and GPU go from the same phase through the same polynomial and the
//!   same order of fused multiply-adds to one rounding in f32, f16 or bf16, and give the same bits.
//! * **One launch.** q and k, each with a layout of its own, are rotated together, in place or out
//!   of place; positions may live on the GPU, so that a captured graph can be replayed. A launch may
//!   overlap the kernel before it ([`launch::LaunchMode`]).
//! * **No toolkit.** The `cuda` feature builds without CUDA installed; where nvcc is found it adds
//!   machine code.
//!
//! # The pieces
//!
//! [`Frequencies`] (on one axis of positions or several), [`FrequencyRows`] (for sequences whose
//! frequencies depend on their length) or a [`CosSinTable`] make a [`Rope`], with a [`Pairing`].
//! [`config`] makes them from a model's own files; [`multimodal`] numbers the tokens of images and video;
//! [`interfaces`] has the calls of MLX, MAX, ONNX, vLLM, llama.cpp and Hugging Face, for those who come
//! from there. [`Layout`]s make a [`Problem`], and a rotator
//! turns it into a checked [`Plan`] that serves any number of calls.
//! [`Host`] and `cuda::Cuda` are the backends; [`Device`] picks one of them. Both execute a
//! [`call`], which is plain data; [`launch`] is for those who launch the kernels by other means.
//!
//! ```
//! use phasor::{Dtype, Frequencies, Host, InOut, Layout, Pairing, Positions, Problem, Rope};
//! use phasor::half::bf16;
//!
//! # fn main() -> Result<(), phasor::Error> {
//! // Llama 3: theta 500,000, 32 query and 8 key heads of 128 dims, rotate-half pairing.
//! let rope = Rope::new(Frequencies::from_theta(500_000.0, 128)?, Pairing::HalfSplit);
//! let rotator = Host::new().rotator(&rope);
//! let plan = rotator.plan(
//!     &Problem::new(Dtype::Bf16)
//!         .q(Layout::tokens(5, 32, 128))
//!         .k(Layout::tokens(5, 8, 128)),
//! )?;
//!
//! let mut q = vec![bf16::ONE; 5 * 32 * 128];
//! let mut k = vec![bf16::ONE; 5 * 8 * 128];
//! let (q, k) = (InOut::InPlace(&mut q[..]), InOut::InPlace(&mut k[..]));
//! rotator.rotate(&plan, Some(q), Some(k), Positions::start(131_072))?;
//! # Ok(())
//! # }
//! ```
//!
//! # A worked example
//!
//! `x = [1, 0, 0, 1]` at position 1, interleaved, theta 10,000, head_dim 4. The two angles are 1 and
//! `10000^(-2/4) = 0.01` radians, so the pairs `(1, 0)` and `(0, 1)` become `(cos 1, sin 1)` and
//! `(-sin 0.01, cos 0.01)`: `[0.5403023, 0.8414710, -0.0099998, 0.9999500]`. (A well-known tutorial
//! prints `[0.540, 0.841, -1e-4, 1.0]` for this; its own code does not give that.)
//!
//! # Floating point
//!
//! Results are defined in the default floating-point environment: rounding to nearest even,
//! subnormals kept. NaN and infinities affect only their own pair; every NaN result is canonical
//! (`0x7fffffff`, `0x7fff`). Position 0 is not skipped: an infinity turns its partner into NaN.
//!
//! # Features
//!
//! `cuda` (default): the CUDA backend. `rayon` (default): threads for the host backend. `hf-config`
//! (default): reads Hugging Face configs. `bindgen`: regenerates the bindings of a [`call`] at build
//! time.

#![warn(missing_docs, unsafe_op_in_unsafe_fn)]

mod angle;
mod cache;
pub mod call;
mod codes;
pub mod config;
#[cfg(feature = "cuda")]
pub mod cuda;
mod device;
mod element;
mod error;
mod host;
mod ids;
pub mod interfaces;
pub mod launch;
mod layout;
pub mod multimodal;
pub mod norm;
mod plan;
mod positions;
pub mod quantize;
mod rope;
mod shift;
mod stages;
mod step;

pub use angle::{Angles, CosSinTable, Frequencies, FrequencyRows, OutOfRange};
pub use cache::{CacheLayout, KvCacheLayout, Slots, SlotsIn, Stored};
pub use codes::{ScaleLayout, StoredCodes};
#[cfg(feature = "cuda")]
pub use cudarc;
pub use device::{
    Buffer, Device, DeviceElement, DeviceInOut, DeviceMemory, DevicePositions, Rotator,
};
pub use element::{Dtype, Element};
pub use error::{Error, TensorName};
pub use half;
pub use host::{
    Host, HostAppended, HostBytes, HostDestination, HostInOut, HostKvCache, HostRotator, HostStep,
    HostWeights, Isa, Threads,
};
pub use ids::{Id, IdType, Ids};
pub use layout::Layout;
pub use plan::{Appended, InOut, Plan, Problem};
pub use positions::{FrequencyRowKind, PositionKind, Positions, PositionsIn};
pub use rope::{Direction, Pairing, Rope};
pub use shift::{KeyScales, KeyScalesIn, ShiftPlan, SlotRange};
pub use stages::Stages;
#[cfg(feature = "cuda")]
pub use step::CudaMemory;
pub use step::{HostMemory, Memory, StageWeights, Step};

/// The examples of the README and of the pages in `docs` are compiled and run with the documentation's.
#[cfg(all(doctest, feature = "cuda", feature = "hf-config"))]
mod readme {
    #[doc = include_str!("../README.md")]
    struct Readme;
    #[doc = include_str!("../docs/engines.md")]
    struct Engines;
    #[doc = include_str!("../docs/migration.md")]
    struct Migration;
    #[doc = include_str!("../docs/models.md")]
    struct Models;
    #[doc = include_str!("../docs/serving-step.md")]
    struct ServingStep;
}
