//! Projections on a device.

use super::cublas::{ALIGNMENT, Product, WORKSPACE};
use super::{AttentionKernels, CublasLt, During, Kept, Precision};
use crate::error::{agree, at_least};
use crate::kernels::{
    Fp8Shape, GptqAddresses, GptqShape, KernelLaunch, PhasorDequantize, dequantize_fp8,
    dequantize_ggml, dequantize_gptq, round_fp8,
};
use crate::projection::check_features;
use crate::{
    AttentionError, Fp8Activation, Fp8Weights, GgmlType, GptqFormat, GptqTensors, GptqWeights,
    Weights,
};
use phasor::cudarc::driver::{
    CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr, DeviceSlice,
};
use phasor::half::f16;
use phasor::{Dtype, Element};
use std::collections::HashMap;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// Rows of weights are dequantised so many bytes at a time.
const PANEL: usize = 64 << 20;

/// Activations of a projection.
pub struct TokensInOut<'a, T> {
    /// How many tokens there are.
    pub tokens: usize,
    /// `[tokens, in_features]`, and perhaps more.
    pub x: CudaView<'a, T>,
    /// `[tokens, out_features]`, and perhaps more.
    pub out: CudaViewMut<'a, T>,
}

/// A matrix product of tokens on a device. An engine can implement it for weights of its own.
pub trait CudaProjection<T>: Send + Sync {
    /// Elements of a token that comes in.
    fn in_features(&self) -> usize;

    /// Elements of a token that goes out.
    fn out_features(&self) -> usize;

    /// Makes ready for calls of so many tokens, so that these allocate nothing and wait for nothing, and says
    /// how many bytes of workspace they need.
    ///
    /// # Errors
    /// Whatever prevents it.
    fn prepare(&self, tokens: usize) -> Result<usize, AttentionError>;

    /// Enqueues `out = x W^T`.
    ///
    /// # Errors
    /// [`AttentionError::Mismatch`] for buffers or a workspace that are too short, others of the device.
    fn forward(
        &self,
        stream: &CudaStream,
        tokens: TokensInOut<'_, T>,
        workspace: &mut CudaViewMut<'_, u8>,
    ) -> Result<(), AttentionError>;
}

/// The product by cublasLt with `[out_features, in_features]` elements, a panel of rows at a time.
struct Products {
    lt: CublasLt,
    precision: Precision,
    in_features: usize,
    out_features: usize,
    /// Rows of a panel.
    rows: usize,
    /// By tokens and rows.
    known: Mutex<HashMap<(usize, usize), Arc<Product>>>,
}

impl Products {
    fn new<T: Element>(
        lt: &CublasLt,
        precision: Precision,
        [out_features, in_features]: [usize; 2],
        rows: usize,
    ) -> Result<Self, AttentionError> {
        check_features(out_features, in_features)?;
        let in_access = ALIGNMENT as usize / size_of::<T>();
        for (what, value) in [("out_features", out_features), ("in_features", in_features)] {
            if !value.is_multiple_of(in_access) {
                return Err(AttentionError::Value {
                    what,
                    value,
                    remedy: "products need rows of whole 16 bytes",
                });
            }
        }
        Ok(Self {
            lt: lt.clone(),
            precision,
            in_features,
            out_features,
            rows,
            known: Mutex::default(),
        })
    }

    fn panels(&self) -> impl Iterator<Item = Range<usize>> {
        let (rows, all) = (self.rows, self.out_features);
        (0..all)
            .step_by(rows)
            .map(move |first| first..all.min(first + rows))
    }

    fn product<T: Element>(
        &self,
        tokens: usize,
        rows: usize,
    ) -> Result<Arc<Product>, AttentionError> {
        // What it holds is whole, whatever a thread that had it did.
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(product) = known.get(&(tokens, rows)) {
            return Ok(product.clone());
        }
        let shape = [tokens, rows, self.in_features];
        let product = self
            .lt
            .product(T::DTYPE, self.precision, shape, self.out_features)?;
        let product = Arc::new(product);
        known.insert((tokens, rows), product.clone());
        Ok(product)
    }

    /// Bytes that products of so many tokens use.
    fn prepare<T: Element>(&self, tokens: usize) -> Result<usize, AttentionError> {
        let mut most = 0;
        if tokens > 0 {
            for panel in self.panels() {
                most = most.max(self.product::<T>(tokens, panel.len())?.workspace());
            }
        }
        debug_assert!(most <= WORKSPACE);
        Ok(most)
    }

    /// Bytes of a panel of elements, if weights are not elements already.
    fn panel_bytes<T: Element>(&self) -> usize {
        let rows = self.rows.min(self.out_features);
        (rows * self.in_features * size_of::<T>()).next_multiple_of(256)
    }

    /// Enqueues products with all panels, of each of which `weights` makes sure and says the address, given
    /// that of the panel's part of the workspace.
    fn forward<T: Element + DeviceRepr>(
        &self,
        stream: &CudaStream,
        tokens: TokensInOut<'_, T>,
        workspace: &mut CudaViewMut<'_, u8>,
        panel_bytes: usize,
        mut weights: impl FnMut(Range<usize>, u64) -> Result<u64, AttentionError>,
    ) -> Result<(), AttentionError> {
        let TokensInOut { tokens, x, mut out } = tokens;
        if tokens == 0 {
            return Ok(());
        }
        let kernels = self.lt.kernels();
        let needed = panel_bytes + self.prepare::<T>(tokens)?;
        for (what, needed, len) in [
            (
                "elements given to a projection at least",
                tokens.saturating_mul(self.in_features),
                x.len(),
            ),
            (
                "elements that a projection writes at least",
                tokens.saturating_mul(self.out_features),
                out.len(),
            ),
            ("bytes of the workspace at least", needed, workspace.len()),
        ] {
            at_least(what, needed, len)?;
        }
        kernels.expect_here("the stream", stream.context())?;
        kernels.expect_here("activations", x.stream().context())?;
        kernels.expect_here("activations", out.stream().context())?;
        kernels.expect_here("the workspace", workspace.stream().context())?;
        let (x, _x) = x.device_ptr(stream);
        let (out, _out) = out.device_ptr_mut(stream);
        let (workspace, _workspace) = workspace.device_ptr_mut(stream);
        for (what, address) in [
            ("the address of activations", x),
            ("the address of results", out),
            ("the address of the workspace", workspace),
        ] {
            if !address.is_multiple_of(u64::from(ALIGNMENT)) {
                return Err(AttentionError::Value {
                    what,
                    value: address as usize,
                    remedy: "products need it at a multiple of 16 bytes",
                });
            }
        }
        let context = kernels.cuda().context();
        context.bind_to_thread().during("binding the context")?;
        for panel in self.panels() {
            let product = self.product::<T>(tokens, panel.len())?;
            let to = out + (panel.start * size_of::<T>()) as u64;
            let w = weights(panel, workspace)?;
            let after = workspace + panel_bytes as u64;
            // SAFETY: lengths and alignment were compared just now, panels begin at whole 16 bytes; the
            // guards, dropped after this, order the work with other uses of the buffers.
            unsafe { product.enqueue(stream.cu_stream(), w, x, to, after)? };
        }
        Ok(())
    }
}

/// Dense weights, `[out_features, in_features]`, of the activations' element type. Dropping it waits for the
/// context's work.
pub struct CudaDense<T> {
    products: Products,
    weights: Kept<T>,
}

impl<T: Element + DeviceRepr> CudaDense<T> {
    /// Weights that are on the device already.
    ///
    /// # Errors
    /// [`AttentionError::Mismatch`] unless there are `out_features * in_features`,
    /// [`AttentionError::Value`] unless rows and columns are whole 16 bytes, [`AttentionError::Step`] for
    /// weights of another context.
    pub fn new(
        lt: &CublasLt,
        weights: CudaSlice<T>,
        [out_features, in_features]: [usize; 2],
        precision: Precision,
    ) -> Result<Self, AttentionError> {
        let products =
            Products::new::<T>(lt, precision, [out_features, in_features], out_features)?;
        let needed = out_features.saturating_mul(in_features);
        agree("elements of a weight", needed, weights.len())?;
        lt.kernels()
            .expect_here("weights", weights.stream().context())?;
        Ok(Self {
            products,
            weights: Kept::new(weights),
        })
    }

    /// The values of any weights, rounded to elements and copied to the device.
    ///
    /// # Errors
    /// Those of [`new`](Self::new), and of the driver.
    pub fn of_weights(
        lt: &CublasLt,
        weights: &dyn Weights,
        precision: Precision,
    ) -> Result<Self, AttentionError> {
        let [rows, columns] = [weights.out_features(), weights.in_features()];
        let products = Products::new::<T>(lt, precision, [rows, columns], rows)?;
        // So many rows at a time become f32.
        let panel = (PANEL / size_of::<f32>() / columns).max(1);
        let mut elements = Vec::with_capacity(rows * columns);
        let mut values = Vec::new();
        for first in (0..rows).step_by(panel) {
            let rows = first..rows.min(first + panel);
            values.resize(rows.len() * columns, 0.0);
            weights.read(rows, &mut values);
            elements.extend(values.iter().map(|&value| T::narrow(value)));
        }
        Ok(Self {
            products,
            weights: lt.kernels().upload(&elements)?,
        })
    }
}

impl<T: Element + DeviceRepr + Send + Sync> CudaProjection<T> for CudaDense<T> {
    fn in_features(&self) -> usize {
        self.products.in_features
    }

    fn out_features(&self) -> usize {
        self.products.out_features
    }

    fn prepare(&self, tokens: usize) -> Result<usize, AttentionError> {
        self.products.prepare::<T>(tokens)
    }

    fn forward(
        &self,
        stream: &CudaStream,
        tokens: TokensInOut<'_, T>,
        workspace: &mut CudaViewMut<'_, u8>,
    ) -> Result<(), AttentionError> {
        let (address, _weights) = self.weights.device_ptr(stream);
        self.products
            .forward(stream, tokens, workspace, 0, |_, _| Ok(address))
    }
}

/// Quantised weights on a device, of which a kernel makes panels of elements.
pub trait Panels: Send + Sync {
    /// Enqueues the dequantisation of some rows of `in_features` to an address.
    ///
    /// # Errors
    /// Those of the launch.
    ///
    /// # Safety
    /// There is room for elements of this type of these rows, which nothing else uses.
    unsafe fn dequantize(
        &self,
        kernels: &AttentionKernels,
        stream: &CudaStream,
        dtype: Dtype,
        in_features: usize,
        rows: Range<usize>,
        to: u64,
    ) -> Result<(), AttentionError>;
}

/// A quantised matrix, dequantised to the activations' element type at each call, a panel of rows at a time.
/// Dropping it waits for the context's work.
pub struct CudaQuantized<T, W> {
    products: Products,
    weights: W,
    of: PhantomData<T>,
}

/// A matrix of a GGUF file.
pub type CudaGgml<T> = CudaQuantized<T, GgmlBlocks>;

/// A 4-bit GPTQ matrix.
pub type CudaGptq<T> = CudaQuantized<T, GptqOnDevice>;

/// A matrix of e4m3, for activations that are kept as they are; [`CudaFp8Linear`] rounds them.
pub type CudaFp8<T> = CudaQuantized<T, Fp8OnDevice>;

impl<T: Element + DeviceRepr, W: Panels> CudaQuantized<T, W> {
    /// `upload` copies the weights, which have been checked.
    fn with(
        lt: &CublasLt,
        [out_features, in_features]: [usize; 2],
        precision: Precision,
        upload: impl FnOnce(&AttentionKernels) -> Result<W, AttentionError>,
    ) -> Result<Self, AttentionError> {
        let rows = PANEL / in_features.saturating_mul(size_of::<T>()).max(1);
        // A multiple of what aligns the next panel.
        let rows = (rows / 64 * 64).max(64);
        let products = Products::new::<T>(lt, precision, [out_features, in_features], rows)?;
        lt.kernels().dequantize_functions()?;
        Ok(Self {
            products,
            weights: upload(lt.kernels())?,
            of: PhantomData,
        })
    }
}

impl<T, W> CudaProjection<T> for CudaQuantized<T, W>
where
    T: Element + DeviceRepr + Send + Sync,
    W: Panels,
{
    fn in_features(&self) -> usize {
        self.products.in_features
    }

    fn out_features(&self) -> usize {
        self.products.out_features
    }

    fn prepare(&self, tokens: usize) -> Result<usize, AttentionError> {
        Ok(self.products.panel_bytes::<T>() + self.products.prepare::<T>(tokens)?)
    }

    fn forward(
        &self,
        stream: &CudaStream,
        tokens: TokensInOut<'_, T>,
        workspace: &mut CudaViewMut<'_, u8>,
    ) -> Result<(), AttentionError> {
        let products = &self.products;
        let (kernels, panel_bytes) = (products.lt.kernels(), products.panel_bytes::<T>());
        products.forward(stream, tokens, workspace, panel_bytes, |rows, panel| {
            let in_features = products.in_features;
            // SAFETY: the workspace has room for a panel, which the products before have read by then.
            unsafe {
                self.weights
                    .dequantize(kernels, stream, T::DTYPE, in_features, rows, panel)?;
            }
            Ok(panel)
        })
    }
}

/// Enqueues a dequantisation.
///
/// # Safety
/// What the launch addresses is there, and its output overlaps nothing else in use.
unsafe fn enqueue(
    kernels: &AttentionKernels,
    stream: &CudaStream,
    launch: Option<KernelLaunch<PhasorDequantize>>,
) -> Result<(), AttentionError> {
    let functions = kernels.dequantize_functions()?;
    match launch {
        // SAFETY: the kernels take this struct by value; the rest is the caller's promise.
        Some(launch) => unsafe { kernels.enqueue(stream, functions, &launch) },
        None => Ok(()),
    }
}

/// The blocks of a tensor of a GGUF file.
pub struct GgmlBlocks {
    blocks: Kept<u8>,
    ggml_type: GgmlType,
}

impl Panels for GgmlBlocks {
    unsafe fn dequantize(
        &self,
        kernels: &AttentionKernels,
        stream: &CudaStream,
        dtype: Dtype,
        in_features: usize,
        rows: Range<usize>,
        to: u64,
    ) -> Result<(), AttentionError> {
        let (elements, bytes) = self.ggml_type.block();
        let row = in_features / elements * bytes;
        let (blocks, _blocks) = self.blocks.device_ptr(stream);
        let from = blocks + (rows.start * row) as u64;
        let launch = dequantize_ggml(self.ggml_type, dtype, [rows.len(), in_features], from, to)?;
        // SAFETY: the blocks of these rows are there; the rest is the caller's promise.
        unsafe { enqueue(kernels, stream, launch) }
    }
}

impl<T: Element + DeviceRepr> CudaGgml<T> {
    /// Copies the bytes of a tensor to the device, and loads the kernels.
    ///
    /// # Errors
    /// Those of [`GgmlWeights::new`](crate::GgmlWeights::new), [`AttentionError::Value`] unless rows and
    /// columns are whole 16 bytes, [`AttentionError::Step`] for errors of the driver.
    pub fn new(
        lt: &CublasLt,
        ggml_type: GgmlType,
        bytes: &[u8],
        [out_features, in_features]: [usize; 2],
        precision: Precision,
    ) -> Result<Self, AttentionError> {
        // For its checks.
        crate::GgmlWeights::new(ggml_type, bytes, out_features, in_features)?;
        Self::with(lt, [out_features, in_features], precision, |kernels| {
            Ok(GgmlBlocks {
                blocks: kernels.upload(bytes)?,
                ggml_type,
            })
        })
    }
}

/// The tensors of a 4-bit GPTQ matrix.
pub struct GptqOnDevice {
    qweight: Kept<i32>,
    scales: Kept<f16>,
    qzeros: Kept<i32>,
    g_idx: Option<Kept<i32>>,
    shape: GptqShape,
}

impl Panels for GptqOnDevice {
    unsafe fn dequantize(
        &self,
        kernels: &AttentionKernels,
        stream: &CudaStream,
        dtype: Dtype,
        _in_features: usize,
        rows: Range<usize>,
        to: u64,
    ) -> Result<(), AttentionError> {
        let (qweight, _qweight) = self.qweight.device_ptr(stream);
        let (scales, _scales) = self.scales.device_ptr(stream);
        let (qzeros, _qzeros) = self.qzeros.device_ptr(stream);
        let g_idx = self.g_idx.as_ref().map(|g_idx| g_idx.device_ptr(stream));
        let addresses = GptqAddresses {
            qweight,
            scales,
            qzeros,
            g_idx: g_idx.as_ref().map_or(0, |(address, _)| *address),
        };
        let launch = dequantize_gptq(&self.shape, dtype, rows, &addresses, to)?;
        // SAFETY: the tensors are there; the rest is the caller's promise.
        unsafe { enqueue(kernels, stream, launch) }
    }
}

impl<T: Element + DeviceRepr> CudaGptq<T> {
    /// Copies the tensors of a matrix to the device, and loads the kernels.
    ///
    /// # Errors
    /// Those of [`GptqWeights::new`], [`AttentionError::Value`] unless rows and columns are whole 16 bytes,
    /// [`AttentionError::Step`] for errors of the driver.
    pub fn new(
        lt: &CublasLt,
        tensors: &GptqTensors,
        format: GptqFormat,
        group_size: Option<usize>,
        [out_features, in_features]: [usize; 2],
        precision: Precision,
    ) -> Result<Self, AttentionError> {
        // For its checks.
        GptqWeights::new(
            tensors.clone(),
            format,
            group_size,
            out_features,
            in_features,
        )?;
        Self::with(lt, [out_features, in_features], precision, |kernels| {
            Ok(GptqOnDevice {
                qweight: kernels.upload(&tensors.qweight)?,
                scales: kernels.upload(&tensors.scales)?,
                qzeros: kernels.upload(&tensors.qzeros)?,
                g_idx: match &tensors.g_idx[..] {
                    [] => None,
                    g_idx => Some(kernels.upload(g_idx)?),
                },
                shape: GptqShape {
                    out_features,
                    in_features,
                    group_size: group_size.unwrap_or(in_features),
                    format,
                },
            })
        })
    }
}

/// The codes of a matrix of e4m3, and their scales.
pub struct Fp8OnDevice {
    codes: Kept<u8>,
    scales: Kept<f32>,
    shape: Fp8Shape,
}

impl Panels for Fp8OnDevice {
    unsafe fn dequantize(
        &self,
        kernels: &AttentionKernels,
        stream: &CudaStream,
        dtype: Dtype,
        _in_features: usize,
        rows: Range<usize>,
        to: u64,
    ) -> Result<(), AttentionError> {
        let (codes, _codes) = self.codes.device_ptr(stream);
        let (scales, _scales) = self.scales.device_ptr(stream);
        let launch = dequantize_fp8(&self.shape, dtype, rows, [codes, scales], to)?;
        // SAFETY: codes and scales are there, as many as the host's weights were checked to have; the rest is
        // the caller's promise.
        unsafe { enqueue(kernels, stream, launch) }
    }
}

impl<T: Element + DeviceRepr> CudaFp8<T> {
    /// Copies codes and scales to the device, and loads the kernels.
    ///
    /// # Errors
    /// [`AttentionError::Value`] unless rows and columns are whole 16 bytes, and columns, of a block too,
    /// multiples of 8 ([`CudaDense::of_weights`] takes others); [`AttentionError::Step`] for errors of the
    /// driver.
    pub fn new<S: AsRef<[u8]> + Send + Sync>(
        lt: &CublasLt,
        weights: &Fp8Weights<S>,
        precision: Precision,
    ) -> Result<Self, AttentionError> {
        let features = [weights.out_features(), weights.in_features()];
        let (scales, block) = weights.blocks();
        let shape = Fp8Shape {
            out_features: features[0],
            in_features: features[1],
            block,
        };
        // For its checks.
        dequantize_fp8(&shape, T::DTYPE, 0..features[0], [0; 2], 0)?;
        Self::with(lt, features, precision, |kernels| {
            Ok(Fp8OnDevice {
                codes: kernels.upload(weights.codes())?,
                scales: kernels.upload(scales)?,
                shape,
            })
        })
    }
}

/// [`Fp8Linear`](crate::Fp8Linear) on a device: activations become the values of codes of e4m3 in the
/// workspace, the same codes as on the host, and are multiplied by a projection with weights of e4m3, or with
/// others that have their values. Layers whose q, k and v are stacked round their activations once; others for
/// each of the three.
pub struct CudaFp8Linear<T, P = CudaFp8<T>> {
    projection: P,
    activation: Fp8Activation,
    kernels: AttentionKernels,
    of: PhantomData<T>,
}

impl<T: Element + DeviceRepr + Send + Sync> CudaFp8Linear<T> {
    /// Copies codes and scales to the device, and loads the kernels.
    ///
    /// # Errors
    /// Those of [`Fp8Linear::new`](crate::Fp8Linear::new) and of [`CudaFp8::new`].
    pub fn new<S: AsRef<[u8]> + Send + Sync>(
        lt: &CublasLt,
        weights: &Fp8Weights<S>,
        activation: Fp8Activation,
        precision: Precision,
    ) -> Result<Self, AttentionError> {
        activation.check(weights.scale())?;
        Self::of_part(
            lt.kernels(),
            CudaFp8::new(lt, weights, precision)?,
            activation,
        )
    }
}

impl<T: Element, P: CudaProjection<T>> CudaFp8Linear<T, P> {
    /// Activations are rounded as they were checked to be for all of the weights, of which the projection has a
    /// part.
    pub(super) fn of_part(
        kernels: &AttentionKernels,
        projection: P,
        activation: Fp8Activation,
    ) -> Result<Self, AttentionError> {
        // For its checks.
        round_fp8(activation, T::DTYPE, [1, projection.in_features()], 0, 0)?;
        kernels.dequantize_functions()?;
        Ok(Self {
            projection,
            activation,
            kernels: kernels.clone(),
            of: PhantomData,
        })
    }
}

/// Elements of tokens at the front of a workspace, and bytes of it that they have.
pub(super) fn room<T>(tokens: usize, features: usize) -> [usize; 2] {
    let elements = tokens.saturating_mul(features);
    let bytes = elements.saturating_mul(size_of::<T>());
    // What follows is aligned as the workspace is.
    [
        elements,
        bytes.checked_next_multiple_of(256).unwrap_or(bytes),
    ]
}

impl<T, P> CudaProjection<T> for CudaFp8Linear<T, P>
where
    T: Element + DeviceRepr + Send + Sync,
    P: CudaProjection<T>,
{
    fn in_features(&self) -> usize {
        self.projection.in_features()
    }

    fn out_features(&self) -> usize {
        self.projection.out_features()
    }

    fn prepare(&self, tokens: usize) -> Result<usize, AttentionError> {
        let [_, bytes] = room::<T>(tokens, self.in_features());
        Ok(bytes.saturating_add(self.projection.prepare(tokens)?))
    }

    fn forward(
        &self,
        stream: &CudaStream,
        tokens: TokensInOut<'_, T>,
        workspace: &mut CudaViewMut<'_, u8>,
    ) -> Result<(), AttentionError> {
        let TokensInOut { tokens, x, out } = tokens;
        let [elements, bytes] = room::<T>(tokens, self.in_features());
        for (what, needed, len) in [
            ("elements given to a projection at least", elements, x.len()),
            ("bytes of the workspace at least", bytes, workspace.len()),
        ] {
            at_least(what, needed, len)?;
        }
        let kernels = &self.kernels;
        kernels.expect_here("the stream", stream.context())?;
        kernels.expect_here("activations", x.stream().context())?;
        kernels.expect_here("the workspace", workspace.stream().context())?;
        let (mut rounded, mut rest) = workspace.split_at_mut(bytes);
        {
            let (from, _x) = x.device_ptr(stream);
            let (to, _rounded) = rounded.device_ptr_mut(stream);
            let shape = [tokens, self.in_features()];
            let launch = round_fp8(self.activation, T::DTYPE, shape, from, to)?;
            // SAFETY: lengths were compared just now; the guards, dropped after this, order the work with other
            // uses of the buffers.
            unsafe { enqueue(kernels, stream, launch)? };
        }
        // SAFETY: the kernel wrote so many elements, at an address that it was checked to be aligned to.
        let x = unsafe { rounded.as_view().transmute::<T>(elements) };
        let Some(x) = x else {
            unreachable!("the workspace has room for them")
        };
        let tokens = TokensInOut { tokens, x, out };
        self.projection.forward(stream, tokens, &mut rest)
    }
}
