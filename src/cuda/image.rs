//! The kernel images that are embedded, and loading the right one.

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaFunction, CudaModule};
use cudarc::nvrtc::Ptx;

use super::driver::{During, code};
use crate::element::Dtype;
use crate::launch::Kernel;
use crate::{Error, cuda::device_name};

/// Which embedded image the kernels came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum KernelImage {
    /// Machine code (or PTX for other GPUs) that nvcc made when this build found one.
    Fatbin,
    /// The checked-in PTX of compute_75, compiled by the driver.
    PtxCompute75,
    /// The checked-in PTX of compute_80, compiled by the driver.
    PtxCompute80,
    /// The checked-in PTX of compute_90, compiled by the driver.
    PtxCompute90,
}

impl KernelImage {
    /// All of them.
    pub const ALL: [KernelImage; 4] = [
        KernelImage::Fatbin,
        KernelImage::PtxCompute75,
        KernelImage::PtxCompute80,
        KernelImage::PtxCompute90,
    ];
}

impl std::fmt::Display for KernelImage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            KernelImage::Fatbin => "fatbin",
            KernelImage::PtxCompute75 => "PTX compute_75",
            KernelImage::PtxCompute80 => "PTX compute_80",
            KernelImage::PtxCompute90 => "PTX compute_90",
        })
    }
}

/// An embedded image; `None` if this build has none of that kind.
fn embedded(dtype: Dtype, image: KernelImage) -> Option<Ptx> {
    macro_rules! prebuilt {
        ($architecture:literal) => {
            match dtype {
                Dtype::F32 => include_str!(concat!(
                    "../../cuda/prebuilt/rope_f32.",
                    $architecture,
                    ".ptx"
                )),
                Dtype::F16 => include_str!(concat!(
                    "../../cuda/prebuilt/rope_f16.",
                    $architecture,
                    ".ptx"
                )),
                Dtype::Bf16 => include_str!(concat!(
                    "../../cuda/prebuilt/rope_bf16.",
                    $architecture,
                    ".ptx"
                )),
            }
        };
    }
    Some(Ptx::from_src(match image {
        KernelImage::Fatbin => return fatbin(dtype),
        KernelImage::PtxCompute75 => prebuilt!("compute_75"),
        KernelImage::PtxCompute80 => prebuilt!("compute_80"),
        KernelImage::PtxCompute90 => prebuilt!("compute_90"),
    }))
}

#[cfg(phasor_fatbin)]
fn fatbin(dtype: Dtype) -> Option<Ptx> {
    let bytes: &[u8] = match dtype {
        Dtype::F32 => include_bytes!(concat!(env!("OUT_DIR"), "/rope_f32.fatbin")),
        Dtype::F16 => include_bytes!(concat!(env!("OUT_DIR"), "/rope_f16.fatbin")),
        Dtype::Bf16 => include_bytes!(concat!(env!("OUT_DIR"), "/rope_bf16.fatbin")),
    };
    Some(Ptx::from_binary(bytes.to_vec()))
}

#[cfg(not(phasor_fatbin))]
fn fatbin(_dtype: Dtype) -> Option<Ptx> {
    None
}

/// The kernels of one element type on one device.
#[derive(Debug)]
pub(super) struct Kernels {
    pub(super) image: KernelImage,
    /// Whether they wait for earlier work by themselves: compiled for 9.0 or later.
    pub(super) can_depend: bool,
    functions: [CudaFunction; Kernel::PER_DTYPE],
}

impl Kernels {
    /// Loads the first image that the device takes: the fatbin, then the PTX for its capability.
    /// Or only the image that is asked for.
    pub(super) fn load(
        context: &Arc<CudaContext>,
        dtype: Dtype,
        only: Option<KernelImage>,
    ) -> Result<Self, Error> {
        let (major, minor) = context
            .compute_capability()
            .during("reading the compute capability")?;
        let portable = match (major, minor) {
            (9.., _) => KernelImage::PtxCompute90,
            (8, _) => KernelImage::PtxCompute80,
            _ => KernelImage::PtxCompute75,
        };
        let preferred = [KernelImage::Fatbin, portable];
        let images = only.as_ref().map_or(&preferred[..], std::slice::from_ref);

        let mut reasons = Vec::new();
        for &image in images {
            let Some(code_or_text) = embedded(dtype, image) else {
                reasons.push(format!("{image}: not in this build"));
                continue;
            };
            match context.load_module(code_or_text) {
                Ok(module) => {
                    let functions = functions(&module, dtype)?;
                    // A fatbin may hold code for older architectures only, from which the driver has
                    // compiled; only the function tells.
                    let compiled_for = functions[0]
                        .ptx_version()
                        .during("asking what a kernel was compiled for")?;
                    return Ok(Self {
                        image,
                        can_depend: compiled_for >= 90,
                        functions,
                    });
                }
                Err(error) => reasons.push(format!("{image}: {}", code(&error))),
            }
        }
        Err(Error::KernelImage {
            device: device_name(context),
            major,
            minor,
            reason: reasons.join(", "),
        })
    }

    pub(super) fn function(&self, kernel: Kernel) -> &CudaFunction {
        &self.functions[kernel.index()]
    }
}

fn functions(
    module: &Arc<CudaModule>,
    dtype: Dtype,
) -> Result<[CudaFunction; Kernel::PER_DTYPE], Error> {
    let loaded = Kernel::all(dtype)
        .iter()
        .map(|kernel| {
            module
                .load_function(&kernel.name())
                .during("looking up a kernel")
        })
        .collect::<Result<Vec<_>, _>>()?;
    match loaded.try_into() {
        Ok(functions) => Ok(functions),
        Err(_) => unreachable!("one function was looked up per kernel"),
    }
}
