//! Attention layers on CUDA.
//!
//! * [`AttentionKernels`] are the kernels of this crate, over an opened [`Cuda`]: each module is loaded when
//!   it is first needed.
//! * [`CudaAttend`] is attention over a paged cache alone, of elements or of 8-bit codes.
//! * [`CudaProjection`]s are matrix products by cublasLt ([`CublasLt`]), with weights that are dense
//!   ([`CudaDense`]), of GGUF ([`CudaGgml`]), of GPTQ ([`CudaGptq`]) or of e4m3 ([`CudaFp8`], and
//!   [`CudaFp8Linear`] where activations are too); or an engine's own. [`CudaLowRank`] and [`CudaLatentKeys`]
//!   make latent attention (MLA) of them.
//! * [`CudaAttentionLayer`] is the layer; [`CudaTensorParallelAttention`] has it in parts on several devices,
//!   which a [`CudaCollective`] sums: `NcclCollective`, with the feature `nccl`, or an engine's own.
//!
//! # Where bits are the same, and where not
//!
//! Rotation, append, attention, dequantisation and the norm of latents equal the host bit for bit. Products of cublasLt do not:
//! their order of sums is the library's. So layers agree with those of the host to rounding. Weights are
//! rounded to the element type before the product, which those of GGUF, GPTQ and e4m3 on the host are not.
//! Activations become the codes of e4m3 that they become on the host; what these stand for is rounded to the
//! element type likewise.
//!
//! # Float8
//!
//! e4m3 is a form that weights and activations are kept or rounded in, not one of products here: these
//! multiply elements. Devices from compute capability 8.9 on have products of codes, whose sums are scaled;
//! they would differ from the host by that too, and are an engine's own [`CudaProjection`].
//!
//! # Latent attention
//!
//! As on the host, a layer's cache has the keys and values of every head. [`CudaAttend`] also reads a cache of
//! the latent alone, by one key-value head: keys of up to 576 dims, of which values are the first (up to 512),
//! over the same buffer. The products of queries and of results with the maps of keys and of values are an
//! engine's own there.
//!
//! # Prompts
//!
//! The kernel of attention reads all keys that a token sees for each token: right for decode, and slow for
//! long prompts. Engines with a prefill kernel of their own (FlashInfer, FlashAttention, cuDNN) call
//! [`CudaAttentionLayer::project_and_store`], that kernel on [`CudaWorkspace::q`], and
//! [`CudaAttentionLayer::project_out`].
//!
//! # Graphs
//!
//! Plans and workspaces are made beforehand. A call then allocates nothing on the device and waits for
//! nothing, so that it can be captured in a graph under the conditions of [`phasor::cuda`]; lengths and pages
//! in device memory may change between replays. What is dropped while its work may still run waits for that.
//!
//! None of this has run on a GPU in this crate's tests: kernels run in an interpreter of their PTX, and what
//! calls the driver, cublasLt and NCCL on libraries that stand in for them.

mod attend;
mod cublas;
mod latent;
mod layer;
mod library;
#[cfg(feature = "nccl")]
mod nccl;
mod projection;
mod shard;

pub use attend::{CudaAttend, CudaAttendOperands, CudaCacheView, CudaCodeScales, CudaCodes};
pub use cublas::{CublasLt, Precision};
pub use latent::{CudaLatentKeys, CudaLowRank};
pub use layer::{
    CudaAttentionLayer, CudaBatch, CudaCodeScalesMut, CudaHeadWeights, CudaKvCache, CudaLayerPlan,
    CudaLayerShape, CudaQkv, CudaWorkspace,
};
#[cfg(feature = "nccl")]
pub use nccl::{Nccl, NcclCollective, NcclUniqueId};
pub use projection::{
    CudaDense, CudaFp8, CudaFp8Linear, CudaGgml, CudaGptq, CudaProjection, CudaQuantized,
    TokensInOut,
};
pub use shard::{CudaCollective, CudaPart, CudaShardCall, CudaTensorParallelAttention};

use crate::AttentionError;
use crate::kernels::KernelLaunch;
use phasor::cuda::Cuda;
use phasor::cudarc::driver::{
    CudaContext, CudaFunction, CudaSlice, CudaStream, DeviceRepr, DriverError, result,
};
use phasor::cudarc::nvrtc::Ptx;
use phasor::{Dtype, Error};
use std::ffi::c_void;
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::sync::{Arc, OnceLock};

macro_rules! images {
    ($name:literal) => {
        [
            include_str!(concat!("../../cuda/prebuilt/", $name, ".compute_75.ptx")),
            include_str!(concat!("../../cuda/prebuilt/", $name, ".compute_80.ptx")),
            include_str!(concat!("../../cuda/prebuilt/", $name, ".compute_90.ptx")),
        ]
    };
}

/// The PTX of a module, for compute_75, 80 and 90.
type Images = [&'static str; 3];
const ATTEND: [Images; 3] = [
    images!("attend_f32"),
    images!("attend_f16"),
    images!("attend_bf16"),
];
const ATTEND_CODES: Images = images!("attend_codes");
const DEQUANTIZE: Images = images!("dequantize");
const LATENT: Images = images!("latent");

/// A module's functions, by name.
type Functions = Vec<(&'static str, CudaFunction)>;

/// The kernels of this crate on one device. Cheap to clone.
#[derive(Clone, Debug)]
pub struct AttentionKernels {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    cuda: Cuda,
    /// In the order of [`Dtype::ALL`]; loaded when they are first asked for.
    attend: [OnceLock<Functions>; 3],
    attend_codes: OnceLock<Functions>,
    dequantize: OnceLock<Functions>,
    latent: OnceLock<Functions>,
}

impl AttentionKernels {
    /// Loads nothing yet. [`Cuda::open`] says whether there is a driver and a device.
    pub fn new(cuda: &Cuda) -> Self {
        Self {
            inner: Arc::new(Inner {
                cuda: cuda.clone(),
                attend: Default::default(),
                attend_codes: OnceLock::new(),
                dequantize: OnceLock::new(),
                latent: OnceLock::new(),
            }),
        }
    }

    /// The device that they are on.
    pub fn cuda(&self) -> &Cuda {
        &self.inner.cuda
    }

    fn attend_functions(&self, dtype: Dtype) -> Result<&Functions, AttentionError> {
        let at = Dtype::ALL.iter().position(|&d| d == dtype);
        let Some(at) = at else {
            return Err(AttentionError::Dtype {
                dtype,
                remedy: "kernels of attention take f32, f16 and bf16",
            });
        };
        self.load(
            &self.inner.attend[at],
            ATTEND[at],
            &crate::kernels::ATTEND_KERNELS[at],
        )
    }

    fn attend_codes_functions(&self) -> Result<&Functions, AttentionError> {
        let names = &crate::kernels::KERNELS_OF_CODES;
        self.load(&self.inner.attend_codes, ATTEND_CODES, names)
    }

    fn dequantize_functions(&self) -> Result<&Functions, AttentionError> {
        let names = crate::kernels::DEQUANTIZE_KERNELS.as_flattened();
        self.load(&self.inner.dequantize, DEQUANTIZE, names)
    }

    fn latent_functions(&self) -> Result<&Functions, AttentionError> {
        let names = &crate::kernels::LATENT_KERNELS;
        self.load(&self.inner.latent, LATENT, names)
    }

    fn load<'a>(
        &self,
        loaded: &'a OnceLock<Functions>,
        images: Images,
        names: &[&'static str],
    ) -> Result<&'a Functions, AttentionError> {
        if let Some(functions) = loaded.get() {
            return Ok(functions);
        }
        let context = self.inner.cuda.context();
        let (major, minor) = context
            .compute_capability()
            .during("reading the compute capability")?;
        let image = match major {
            9.. => images[2],
            8 => images[1],
            _ => images[0],
        };
        let module = context.load_module(Ptx::from_src(image)).map_err(|error| {
            AttentionError::Step(Error::KernelImage {
                device: self.inner.cuda.name().into(),
                major,
                minor,
                reason: format!("{:?}", error.0),
            })
        })?;
        let functions = names
            .iter()
            .map(|&name| {
                Ok((
                    name,
                    module.load_function(name).during("looking up a kernel")?,
                ))
            })
            .collect::<Result<Functions, AttentionError>>()?;
        Ok(loaded.get_or_init(|| functions))
    }

    /// # Safety
    /// The kernel is one of `functions` that takes `P` by value, and what `P` addresses is the caller's
    /// promise.
    unsafe fn enqueue<P: Copy>(
        &self,
        stream: &CudaStream,
        functions: &Functions,
        launch: &KernelLaunch<P>,
    ) -> Result<(), AttentionError> {
        let function = functions.iter().find(|(name, _)| *name == launch.kernel);
        let Some((_, function)) = function else {
            unreachable!("all kernels of a module are loaded together")
        };
        self.cuda()
            .context()
            .bind_to_thread()
            .during("binding the context")?;
        let mut params = launch.params;
        let mut parameters: [*mut c_void; 1] = [(&raw mut params).cast()];
        // SAFETY: the driver copies the parameter before it returns; the rest is the caller's promise.
        unsafe {
            result::launch_kernel(
                function.cu_function(),
                launch.grid.into(),
                launch.block.into(),
                launch.shared_bytes,
                stream.cu_stream(),
                &mut parameters,
            )
        }
        .during("launching a kernel")
    }

    fn expect_here(
        &self,
        what: &'static str,
        context: &Arc<CudaContext>,
    ) -> Result<(), AttentionError> {
        expect_context(what, context, self.cuda().context())
    }

    /// Copies to the device and waits for that.
    fn upload<T: DeviceRepr>(&self, data: &[T]) -> Result<Kept<T>, AttentionError> {
        let stream = self.cuda().context().default_stream();
        let copied = stream.clone_htod(data).during("copying to the device")?;
        stream.synchronize().during("copying to the device")?;
        Ok(Kept(ManuallyDrop::new(copied)))
    }
}

/// The very same context object, as phasor asks for.
fn expect_context(
    what: &'static str,
    context: &Arc<CudaContext>,
    expected: &Arc<CudaContext>,
) -> Result<(), AttentionError> {
    if Arc::ptr_eq(expected, context) {
        return Ok(());
    }
    let describe = |context: &Arc<CudaContext>| {
        let object = Arc::as_ptr(context);
        format!("cuda:{} (CudaContext at {object:p})", context.ordinal())
    };
    Err(AttentionError::Step(Error::DeviceMismatch {
        what,
        found: describe(context),
        expected: describe(expected),
    }))
}

/// Waits for all work of a context. Not through cudarc's, which skips the wait if an earlier error is
/// pending.
fn wait_for(context: &CudaContext) -> Result<(), DriverError> {
    // SAFETY: the context is alive as long as this reference.
    unsafe { result::ctx::set_current(context.cu_ctx()) }?;
    result::ctx::synchronize()
}

/// Turns cudarc's error into phasor's. It must not be formatted itself: that calls into the driver.
trait During<T> {
    fn during(self, operation: &'static str) -> Result<T, AttentionError>;
}

impl<T> During<T> for Result<T, DriverError> {
    fn during(self, operation: &'static str) -> Result<T, AttentionError> {
        self.map_err(|error| {
            AttentionError::Step(Error::Driver {
                operation,
                code: format!("{:?}", error.0),
            })
        })
    }
}

/// Memory that enqueued work may read when it is dropped: then that is waited for, and memory is kept for
/// good where it cannot be.
#[derive(Debug)]
struct Kept<T>(ManuallyDrop<CudaSlice<T>>);

impl<T> Kept<T> {
    fn new(slice: CudaSlice<T>) -> Self {
        Self(ManuallyDrop::new(slice))
    }
}

impl<T> Deref for Kept<T> {
    type Target = CudaSlice<T>;

    fn deref(&self) -> &CudaSlice<T> {
        &self.0
    }
}

impl<T> Drop for Kept<T> {
    fn drop(&mut self) {
        if wait_for(self.0.stream().context()).is_ok() {
            // SAFETY: dropped once, here, and not used again.
            unsafe { ManuallyDrop::drop(&mut self.0) };
        }
    }
}
