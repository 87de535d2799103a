//! The CUDA kernels as data: what is launched, on which grid, with which parameters. For engines that launch
//! kernels themselves, and for tests that run them without a GPU; nothing here needs a driver.
//!
//! * [`AttendPlan`] is attention of new tokens over a paged cache, of elements or of 8-bit codes: two launches.
//! * [`dequantize_ggml`], [`dequantize_gptq`] and [`dequantize_fp8`] make elements of weights.
//! * [`norm_latent`] and [`spread_latent`] are what projections of latent attention need beside products.
//! * [`round_fp8`] makes activations what they are once they were codes of e4m3.
//! * The kernels' sources are in `cuda`, their PTX for compute_75, 80 and 90 in `cuda/prebuilt`. They include
//!   headers of phasor's own `cuda` folder, which is needed to compile them anew, not to use them.
//!
//! A kernel reads and writes nothing outside of what its plan declares, whatever page tables, lengths and
//! offsets hold in device memory.

mod attend;
mod dequantize;
mod latent;
mod params;

pub use attend::{AttendAddresses, AttendPlan, AttendShape, CacheCodes};
#[cfg(feature = "cuda")]
pub(crate) use attend::{KERNELS as ATTEND_KERNELS, KERNELS_OF_CODES};
#[cfg(feature = "cuda")]
pub(crate) use dequantize::KERNELS as DEQUANTIZE_KERNELS;
pub use dequantize::{
    Fp8Shape, GptqAddresses, GptqShape, dequantize_fp8, dequantize_ggml, dequantize_gptq, round_fp8,
};
#[cfg(feature = "cuda")]
pub(crate) use latent::KERNELS as LATENT_KERNELS;
pub use latent::{norm_latent, spread_latent};
pub use params::{PhasorAttend, PhasorDequantize, PhasorLatentKeys, PhasorLatentNorm};

use crate::AttentionError;

/// A kernel to be launched.
#[derive(Clone, Copy, Debug)]
pub struct KernelLaunch<P> {
    /// Its name in the PTX.
    pub kernel: &'static str,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    /// Its only parameter, by value.
    pub params: P,
}

/// Kernels count in 32 bits.
pub(crate) fn count(what: &'static str, value: usize) -> Result<u32, AttentionError> {
    u32::try_from(value).map_err(|_| AttentionError::Value {
        what,
        value,
        remedy: "kernels count in 32 bits: it must be below 2^32",
    })
}
