//! The few functions of cublasLt that a dense product needs, loaded when they are first used. The numbers
//! below are those of `cublasLt.h`, the same from CUDA 11.4 to 13.

use super::AttentionKernels;
use super::library::{self, functions};
use crate::AttentionError;
use phasor::Dtype;
use phasor::cudarc::driver::sys::CUstream;
use std::ffi::{OsStr, c_int, c_void};
use std::ptr::null_mut;
use std::sync::Arc;

#[cfg(windows)]
const LIBRARIES: [&str; 3] = [
    "cublasLt64_13.dll",
    "cublasLt64_12.dll",
    "cublasLt64_11.dll",
];
#[cfg(not(windows))]
const LIBRARIES: [&str; 4] = [
    "libcublasLt.so.13",
    "libcublasLt.so.12",
    "libcublasLt.so.11",
    "libcublasLt.so",
];

const CUDA_R_32F: c_int = 0;
const CUDA_R_16F: c_int = 2;
const CUDA_R_16BF: c_int = 14;
const COMPUTE_32F: c_int = 68;
const COMPUTE_32F_FAST_TF32: c_int = 77;
const DESC_TRANSA: c_int = 3;
const OP_T: c_int = 1;
const PREF_MAX_WORKSPACE_BYTES: c_int = 1;
/// Of A, B, C and D.
const PREF_MIN_ALIGNMENTS: [c_int; 4] = [5, 6, 7, 8];

/// What addresses of a product are multiples of.
pub(super) const ALIGNMENT: u32 = 16;
/// What algorithms may use: 32 MiB, which NVIDIA advises for the largest GPUs.
pub(super) const WORKSPACE: usize = 32 << 20;

type Handle = *mut c_void;
type Status = c_int;

/// An algorithm: its words are cublasLt's.
#[repr(C)]
#[derive(Clone, Copy)]
struct Algorithm([u64; 8]);

#[repr(C)]
struct Heuristic {
    algorithm: Algorithm,
    workspace: usize,
    state: Status,
    waves: f32,
    reserved: [c_int; 4],
}

functions! {
    create: "cublasLtCreate" (*mut Handle) -> Status,
    destroy: "cublasLtDestroy" (Handle) -> Status,
    desc_create: "cublasLtMatmulDescCreate" (*mut Handle, c_int, c_int) -> Status,
    desc_set: "cublasLtMatmulDescSetAttribute" (Handle, c_int, *const c_void, usize) -> Status,
    desc_destroy: "cublasLtMatmulDescDestroy" (Handle) -> Status,
    layout_create: "cublasLtMatrixLayoutCreate" (*mut Handle, c_int, u64, u64, i64) -> Status,
    layout_destroy: "cublasLtMatrixLayoutDestroy" (Handle) -> Status,
    preference_create: "cublasLtMatmulPreferenceCreate" (*mut Handle) -> Status,
    preference_set: "cublasLtMatmulPreferenceSetAttribute" (Handle, c_int, *const c_void, usize) -> Status,
    preference_destroy: "cublasLtMatmulPreferenceDestroy" (Handle) -> Status,
    heuristic: "cublasLtMatmulAlgoGetHeuristic"
        (Handle, Handle, Handle, Handle, Handle, Handle, Handle, c_int, *mut Heuristic, *mut c_int) -> Status,
    matmul: "cublasLtMatmul"
        (Handle, Handle, *const c_void, *const c_void, Handle, *const c_void, Handle, *const c_void,
         *const c_void, Handle, *mut c_void, Handle, *const Algorithm, *mut c_void, usize, CUstream) -> Status,
}

/// How f32 products are computed. Those of f16 and bf16 are added up in f32 in either case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Precision {
    /// In f32.
    #[default]
    F32,
    /// With factors rounded to TF32: faster, and good to about three digits.
    Tf32,
}

/// cublasLt on one device. Cheap to clone.
#[derive(Clone)]
pub struct CublasLt {
    library: Arc<Loaded>,
    kernels: AttentionKernels,
}

struct Loaded {
    functions: Functions,
    handle: Handle,
}

// SAFETY: cublasLt's functions may be called from any thread, with one handle too.
unsafe impl Send for Loaded {}
// SAFETY: likewise.
unsafe impl Sync for Loaded {}

impl Drop for Loaded {
    fn drop(&mut self) {
        // SAFETY: it was created by this library, and nothing has it any more.
        unsafe { (self.functions.destroy)(self.handle) };
    }
}

impl std::fmt::Debug for CublasLt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CublasLt").finish_non_exhaustive()
    }
}

fn load<S: AsRef<OsStr>>(names: &[S]) -> Result<Functions, AttentionError> {
    // SAFETY: what is so named is cublasLt, or is said to be by the caller; the signatures are those of
    // cublasLt.h.
    unsafe { library::load(names, |library| Functions::of(library)) }
        .map_err(|reason| AttentionError::NoCublasLt { reason })
}

impl CublasLt {
    /// Whether the library is there, without a device: what [`new`](Self::new) would say first.
    ///
    /// # Errors
    /// [`AttentionError::NoCublasLt`].
    pub fn probe() -> Result<(), AttentionError> {
        load(&LIBRARIES).map(|_| ())
    }

    /// Loads the library by its usual names.
    ///
    /// # Errors
    /// [`AttentionError::NoCublasLt`] if there is none, [`AttentionError::CublasLt`] if it does not start,
    /// [`AttentionError::Step`] for errors of the driver.
    pub fn new(kernels: &AttentionKernels) -> Result<Self, AttentionError> {
        Self::with(load(&LIBRARIES)?, kernels)
    }

    /// Loads the library at a path.
    ///
    /// # Safety
    /// What lies there is cublasLt of CUDA 11.4 or later.
    ///
    /// # Errors
    /// Those of [`new`](Self::new).
    pub unsafe fn open(
        path: impl AsRef<OsStr>,
        kernels: &AttentionKernels,
    ) -> Result<Self, AttentionError> {
        Self::with(load(&[path])?, kernels)
    }

    fn with(functions: Functions, kernels: &AttentionKernels) -> Result<Self, AttentionError> {
        use super::During;
        kernels
            .cuda()
            .context()
            .bind_to_thread()
            .during("binding the context")?;
        let mut handle = null_mut();
        // SAFETY: the handle is written; the context is bound.
        done("starting", unsafe { (functions.create)(&mut handle) })?;
        Ok(Self {
            library: Arc::new(Loaded { functions, handle }),
            kernels: kernels.clone(),
        })
    }

    pub(super) fn kernels(&self) -> &AttentionKernels {
        &self.kernels
    }

    /// Chooses an algorithm for `out[m, n] = x[m, k] w[n, k]^T`, where rows of `out` are `out_row` elements
    /// apart. Asks the host's side of the library only.
    pub(super) fn product(
        &self,
        dtype: Dtype,
        precision: Precision,
        [m, n, k]: [usize; 3],
        out_row: usize,
    ) -> Result<Product, AttentionError> {
        let element = match dtype {
            Dtype::F32 => CUDA_R_32F,
            Dtype::F16 => CUDA_R_16F,
            Dtype::Bf16 => CUDA_R_16BF,
            _ => {
                return Err(AttentionError::Dtype {
                    dtype,
                    remedy: "products take f32, f16 and bf16",
                });
            }
        };
        let compute = match (dtype, precision) {
            (Dtype::F32, Precision::Tf32) => COMPUTE_32F_FAST_TF32,
            _ => COMPUTE_32F,
        };
        let functions = &self.library.functions;
        // Attributes are read where they lie.
        let (transpose, most, aligned) = (OP_T, WORKSPACE, ALIGNMENT);
        let mut product = Product {
            library: self.library.clone(),
            desc: null_mut(),
            layouts: [null_mut(); 3],
            algorithm: Algorithm([0; 8]),
            workspace: 0,
        };
        // SAFETY: what is created is written into the product, whose drop destroys it; attributes are of the
        // sizes that they have.
        unsafe {
            let desc = (functions.desc_create)(&mut product.desc, compute, CUDA_R_32F);
            done("describing a product", desc)?;
            // The library counts columns first: our rows are its columns, w[n, k] its w[k, n].
            let transposed =
                (functions.desc_set)(product.desc, DESC_TRANSA, (&raw const transpose).cast(), 4);
            done("describing a product", transposed)?;
            let shapes = [(k, n, k), (k, m, k), (n, m, out_row)];
            for (layout, (rows, columns, stride)) in product.layouts.iter_mut().zip(shapes) {
                let created = (functions.layout_create)(
                    layout,
                    element,
                    rows as u64,
                    columns as u64,
                    stride as i64,
                );
                done("describing a matrix", created)?;
            }
            let mut preference = null_mut();
            let created = (functions.preference_create)(&mut preference);
            done("asking for an algorithm", created)?;
            let mut status = (functions.preference_set)(
                preference,
                PREF_MAX_WORKSPACE_BYTES,
                (&raw const most).cast(),
                size_of::<usize>(),
            );
            for which in PREF_MIN_ALIGNMENTS {
                if status == 0 {
                    let alignment = (&raw const aligned).cast();
                    status = (functions.preference_set)(preference, which, alignment, 4);
                }
            }
            let mut found = Heuristic {
                algorithm: Algorithm([0; 8]),
                workspace: 0,
                state: 0,
                waves: 0.0,
                reserved: [0; 4],
            };
            let mut count = 0;
            let [w, x, out] = product.layouts;
            if status == 0 {
                status = (functions.heuristic)(
                    self.library.handle,
                    product.desc,
                    w,
                    x,
                    out,
                    out,
                    preference,
                    1,
                    &mut found,
                    &mut count,
                );
            }
            (functions.preference_destroy)(preference);
            done("asking for an algorithm", status)?;
            if count < 1 {
                // CUBLAS_STATUS_NOT_SUPPORTED
                done("finding an algorithm", 15)?;
            }
            done("finding an algorithm", found.state)?;
            (product.algorithm, product.workspace) = (found.algorithm, found.workspace);
        }
        Ok(product)
    }
}

/// A product of one shape.
pub(super) struct Product {
    library: Arc<Loaded>,
    desc: Handle,
    /// Of w, x and out.
    layouts: [Handle; 3],
    algorithm: Algorithm,
    workspace: usize,
}

// SAFETY: descriptions are read only once they are made; the library may be called from any thread.
unsafe impl Send for Product {}
// SAFETY: likewise.
unsafe impl Sync for Product {}

impl Drop for Product {
    fn drop(&mut self) {
        let functions = &self.library.functions;
        // SAFETY: created by this library, each once; what failed to be is null.
        unsafe {
            for layout in self.layouts {
                if !layout.is_null() {
                    (functions.layout_destroy)(layout);
                }
            }
            if !self.desc.is_null() {
                (functions.desc_destroy)(self.desc);
            }
        }
    }
}

impl Product {
    /// Bytes that its algorithm uses.
    pub(super) fn workspace(&self) -> usize {
        self.workspace
    }

    /// Enqueues the product.
    ///
    /// # Safety
    /// The addresses are multiples of [`ALIGNMENT`], of matrices of the shape that was asked for, and of
    /// [`workspace`](Self::workspace) bytes; the stream is of the handle's context, which is bound.
    pub(super) unsafe fn enqueue(
        &self,
        stream: CUstream,
        w: u64,
        x: u64,
        out: u64,
        workspace: u64,
    ) -> Result<(), AttentionError> {
        let at = |address: u64| std::ptr::without_provenance_mut::<c_void>(address as usize);
        let (one, zero) = (1.0f32, 0.0f32);
        let [w_layout, x_layout, out_layout] = self.layouts;
        let workspace = match self.workspace {
            0 => null_mut(),
            _ => at(workspace),
        };
        // SAFETY: scalars are read before this returns; the rest is the caller's promise.
        let status = unsafe {
            (self.library.functions.matmul)(
                self.library.handle,
                self.desc,
                (&raw const one).cast(),
                at(w),
                w_layout,
                at(x),
                x_layout,
                (&raw const zero).cast(),
                at(out),
                out_layout,
                at(out),
                out_layout,
                &self.algorithm,
                workspace,
                self.workspace,
                stream,
            )
        };
        done("a product", status)
    }
}

fn done(operation: &'static str, status: Status) -> Result<(), AttentionError> {
    match status {
        0 => Ok(()),
        status => Err(AttentionError::CublasLt { operation, status }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_that_is_absent_is_an_error() {
        let error = load(&["/nowhere/libcublasLt.so.13"]).err().unwrap();
        let text = error.to_string();
        assert!(matches!(error, AttentionError::NoCublasLt { .. }));
        assert!(
            text.contains("/nowhere") && text.contains("CublasLt::open"),
            "{text}"
        );
        // Nothing is promised of this machine but that there is an answer.
        match CublasLt::probe() {
            Ok(()) => {}
            Err(error) => assert!(matches!(error, AttentionError::NoCublasLt { .. })),
        }
    }

    #[test]
    fn a_library_that_is_another_is_an_error() {
        // Part of every Linux, and without cublasLt's functions.
        if cfg!(target_os = "linux") {
            let error = load(&["libc.so.6"]).err().unwrap();
            assert!(error.to_string().contains("cublasLtCreate"), "{error}");
        }
    }
}
