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
pub enum KernelImage {
    /// Machine code (or PTX for other GPUs) that nvcc made when this build found one.
    Fatbin,
    /// The checked-in PTX of compute_75, compiled by the driver.
    PtxCompute75,
    /// The checked-in PTX of compute_80, compiled by the driver.
    PtxCompute80,
}

impl std::fmt::Display for KernelImage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            KernelImage::Fatbin => "fatbin",
            KernelImage::PtxCompute75 => "PTX compute_75",
            KernelImage::PtxCompute80 => "PTX compute_80",
        })
    }
}

struct Embedded {
    fatbin: Option<&'static [u8]>,
    compute_75: &'static str,
    compute_80: &'static str,
}

#[cfg(phasor_fatbin)]
const FATBINS: [Option<&[u8]>; 3] = [
    Some(include_bytes!(concat!(env!("OUT_DIR"), "/rope_f32.fatbin"))),
    Some(include_bytes!(concat!(env!("OUT_DIR"), "/rope_f16.fatbin"))),
    Some(include_bytes!(concat!(
        env!("OUT_DIR"),
        "/rope_bf16.fatbin"
    ))),
];
#[cfg(not(phasor_fatbin))]
const FATBINS: [Option<&[u8]>; 3] = [None; 3];

fn embedded(dtype: Dtype) -> Embedded {
    match dtype {
        Dtype::F32 => Embedded {
            fatbin: FATBINS[0],
            compute_75: include_str!("../../cuda/prebuilt/rope_f32.compute_75.ptx"),
            compute_80: include_str!("../../cuda/prebuilt/rope_f32.compute_80.ptx"),
        },
        Dtype::F16 => Embedded {
            fatbin: FATBINS[1],
            compute_75: include_str!("../../cuda/prebuilt/rope_f16.compute_75.ptx"),
            compute_80: include_str!("../../cuda/prebuilt/rope_f16.compute_80.ptx"),
        },
        Dtype::Bf16 => Embedded {
            fatbin: FATBINS[2],
            compute_75: include_str!("../../cuda/prebuilt/rope_bf16.compute_75.ptx"),
            compute_80: include_str!("../../cuda/prebuilt/rope_bf16.compute_80.ptx"),
        },
    }
}

/// The kernels of one element type on one device.
#[derive(Debug)]
pub(super) struct Kernels {
    pub(super) image: KernelImage,
    functions: [CudaFunction; Kernel::PER_DTYPE],
}

impl Kernels {
    /// Loads the first image that the device takes: the fatbin, then the PTX for its capability.
    pub(super) fn load(context: &Arc<CudaContext>, dtype: Dtype) -> Result<Self, Error> {
        let (major, minor) = context
            .compute_capability()
            .during("reading the compute capability")?;
        let embedded = embedded(dtype);
        let ptx = if (major, minor) >= (8, 0) {
            (KernelImage::PtxCompute80, embedded.compute_80)
        } else {
            (KernelImage::PtxCompute75, embedded.compute_75)
        };
        let fatbin = embedded
            .fatbin
            .map(|bytes| (KernelImage::Fatbin, Ptx::from_binary(bytes.to_vec())));
        let images = fatbin.into_iter().chain([(ptx.0, Ptx::from_src(ptx.1))]);

        let mut reasons = Vec::new();
        for (image, code_or_text) in images {
            match context.load_module(code_or_text) {
                Ok(module) => {
                    return Ok(Self {
                        image,
                        functions: functions(&module, dtype)?,
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
