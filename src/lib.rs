//! Rotary position embedding (RoPE).
#![warn(missing_docs, unsafe_op_in_unsafe_fn)]

mod angle;
#[cfg(feature = "cuda")]
pub mod cuda;
mod device;
mod element;
mod error;
mod host;
pub mod launch;
mod layout;
pub mod params;
mod plan;
mod positions;
mod rope;

pub use angle::{Angles, CosSinTable, Frequencies, OutOfRange};
#[cfg(feature = "cuda")]
pub use cudarc;
pub use device::{Buffer, Device, DeviceInOut, DevicePositions, PositionBuffer, Rotator};
pub use element::{Dtype, Element};
pub use error::{Error, TensorName};
pub use half;
pub use host::{Host, HostRotator, Isa, Threads};
pub use layout::Layout;
pub use plan::{InOut, Plan, PositionMemory, Problem};
pub use positions::{PositionIds, PositionKind, Positions};
pub use rope::{Direction, Pairing, Rope};
