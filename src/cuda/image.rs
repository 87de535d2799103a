//! The kernel images that are embedded, and loading the right one.

use std::sync::{Arc, OnceLock};

use cudarc::driver::{CudaContext, CudaFunction};
use cudarc::nvrtc::Ptx;

use super::driver::{During, code};
use crate::element::Dtype;
use crate::launch::{Family, Kernel};
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

/// What is included for a module: `$include` of the path that its name completes.
macro_rules! of_module {
    ($include:ident, $family:expr, $dtype:expr, [$($before:expr),*], $after:literal) => {
        match ($family, $dtype) {
            (Family::Rope, Dtype::F32) => $include!(concat!($($before,)* "/rope_f32", $after)),
            (Family::Rope, Dtype::F16) => $include!(concat!($($before,)* "/rope_f16", $after)),
            (Family::Rope, Dtype::Bf16) => $include!(concat!($($before,)* "/rope_bf16", $after)),
            (Family::Append, Dtype::F32) => $include!(concat!($($before,)* "/append_f32", $after)),
            (Family::Append, Dtype::F16) => $include!(concat!($($before,)* "/append_f16", $after)),
            (Family::Append, Dtype::Bf16) => {
                $include!(concat!($($before,)* "/append_bf16", $after))
            }
            (Family::Fused, Dtype::F32) => $include!(concat!($($before,)* "/fused_f32", $after)),
            (Family::Fused, Dtype::F16) => $include!(concat!($($before,)* "/fused_f16", $after)),
            (Family::Fused, Dtype::Bf16) => $include!(concat!($($before,)* "/fused_bf16", $after)),
        }
    };
}

/// An embedded image of a module; `None` if this build has none of that kind.
fn embedded(family: Family, dtype: Dtype, image: KernelImage) -> Option<Ptx> {
    macro_rules! prebuilt {
        ($after:literal) => {
            of_module!(include_str, family, dtype, ["../../cuda/prebuilt"], $after)
        };
    }
    Some(Ptx::from_src(match image {
        KernelImage::Fatbin => return fatbin(family, dtype),
        KernelImage::PtxCompute75 => prebuilt!(".compute_75.ptx"),
        KernelImage::PtxCompute80 => prebuilt!(".compute_80.ptx"),
        KernelImage::PtxCompute90 => prebuilt!(".compute_90.ptx"),
    }))
}

#[cfg(phasor_fatbin)]
fn fatbin(family: Family, dtype: Dtype) -> Option<Ptx> {
    let bytes: &[u8] = of_module!(include_bytes, family, dtype, [env!("OUT_DIR")], ".fatbin");
    Some(Ptx::from_binary(bytes.to_vec()))
}

#[cfg(not(phasor_fatbin))]
fn fatbin(_family: Family, _dtype: Dtype) -> Option<Ptx> {
    None
}

type Functions = [CudaFunction; Kernel::PER_MODULE];

/// The kernels of one element type on one device.
#[derive(Debug)]
pub(super) struct Kernels {
    pub(super) image: KernelImage,
    /// Whether they wait for earlier work by themselves: compiled for 9.0 or later.
    pub(super) can_depend: bool,
    context: Arc<CudaContext>,
    dtype: Dtype,
    rope: Functions,
    /// Loaded when they are first asked for.
    append: OnceLock<Functions>,
    fused: OnceLock<Functions>,
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
            match functions(context, Family::Rope, dtype, image)? {
                Ok(rope) => {
                    // A fatbin may hold code for older architectures only, from which the driver has
                    // compiled; only the function tells.
                    let compiled_for = rope[0]
                        .ptx_version()
                        .during("asking what a kernel was compiled for")?;
                    return Ok(Self {
                        image,
                        can_depend: compiled_for >= 90,
                        context: context.clone(),
                        dtype,
                        rope,
                        append: OnceLock::new(),
                        fused: OnceLock::new(),
                    });
                }
                Err(reason) => reasons.push(reason),
            }
        }
        Err(Error::KernelImage {
            device: device_name(context),
            major,
            minor,
            reason: reasons.join(", "),
        })
    }

    /// A kernel, whose module is loaded if it is not yet: from the same image as the others.
    pub(super) fn function(&self, kernel: Kernel) -> Result<&CudaFunction, Error> {
        Ok(&self.functions(kernel.family)?[kernel.index()])
    }

    /// The kernels of a family.
    pub(super) fn functions(&self, family: Family) -> Result<&Functions, Error> {
        let loaded = match family {
            Family::Rope => return Ok(&self.rope),
            Family::Append => &self.append,
            Family::Fused => &self.fused,
        };
        if let Some(functions) = loaded.get() {
            return Ok(functions);
        }
        match functions(&self.context, family, self.dtype, self.image)? {
            Ok(functions) => Ok(loaded.get_or_init(|| functions)),
            Err(reason) => {
                let (major, minor) = self
                    .context
                    .compute_capability()
                    .during("reading the compute capability")?;
                Err(Error::KernelImage {
                    device: device_name(&self.context),
                    major,
                    minor,
                    reason,
                })
            }
        }
    }
}

/// The kernels of a module; or why the device does not take this image of it.
fn functions(
    context: &Arc<CudaContext>,
    family: Family,
    dtype: Dtype,
    image: KernelImage,
) -> Result<Result<Functions, String>, Error> {
    let Some(code_or_text) = embedded(family, dtype, image) else {
        return Ok(Err(format!("{image}: not in this build")));
    };
    let module = match context.load_module(code_or_text) {
        Ok(module) => module,
        Err(error) => return Ok(Err(format!("{image}: {}", code(&error)))),
    };
    let loaded = Kernel::all(family, dtype)
        .iter()
        .map(|kernel| {
            module
                .load_function(&kernel.name())
                .during("looking up a kernel")
        })
        .collect::<Result<Vec<_>, _>>()?;
    match loaded.try_into() {
        Ok(functions) => Ok(Ok(functions)),
        Err(_) => unreachable!("one function was looked up per kernel"),
    }
}
