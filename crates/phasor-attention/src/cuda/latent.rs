//! The projections of latent attention on a device.

use super::projection::room;
use super::{AttentionKernels, CudaProjection, Kept, TokensInOut};
use crate::AttentionError;
use crate::error::{agree, at_least};
use crate::kernels::{norm_latent, spread_latent};
use phasor::Element;
use phasor::cudarc::driver::{
    CudaStream, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr, DeviceSlice,
};
use std::sync::Arc;

/// Room for the results of so many tokens, and in the workspace.
fn enough(
    [results, out]: [usize; 2],
    [bytes, workspace]: [usize; 2],
) -> Result<(), AttentionError> {
    let what = "elements that a projection writes at least";
    at_least(what, results, out)?;
    let what = "bytes of the workspace at least";
    at_least(what, bytes, workspace)
}

/// [`LowRank`](crate::LowRank) on a device: a map to fewer dims, an RMS norm by a kernel that equals the host's
/// bit for bit, and a map from there. Dropping it waits for the context's work, as that may read its weights.
pub struct CudaLowRank<T> {
    kernels: AttentionKernels,
    down: Arc<dyn CudaProjection<T>>,
    norm: Kept<f32>,
    eps: f32,
    up: Arc<dyn CudaProjection<T>>,
}

impl<T: Element + DeviceRepr> CudaLowRank<T> {
    /// `down`, then a norm by its weight, `[down.out_features]`, then `up`.
    ///
    /// # Errors
    /// Those of [`LowRank::new`](crate::LowRank::new); [`AttentionError::Step`] for errors of the driver.
    pub fn new(
        kernels: &AttentionKernels,
        down: Arc<dyn CudaProjection<T>>,
        norm: &[T],
        eps: f32,
        up: Arc<dyn CudaProjection<T>>,
    ) -> Result<Self, AttentionError> {
        let rank = down.out_features();
        // For its checks.
        norm_latent(T::DTYPE, [1, rank], 0, 0, eps)?;
        agree("elements of the weight of a norm", rank, norm.len())?;
        agree("in_features of the second map", rank, up.in_features())?;
        kernels.latent_functions()?;
        let norm: Vec<f32> = norm.iter().map(|x| x.widen()).collect();
        Ok(Self {
            kernels: kernels.clone(),
            down,
            norm: kernels.upload(&norm)?,
            eps,
            up,
        })
    }
}

impl<T> CudaProjection<T> for CudaLowRank<T>
where
    T: Element + DeviceRepr + Send + Sync,
{
    fn in_features(&self) -> usize {
        self.down.in_features()
    }

    fn out_features(&self) -> usize {
        self.up.out_features()
    }

    fn prepare(&self, tokens: usize) -> Result<usize, AttentionError> {
        let [_, bytes] = room::<T>(tokens, self.norm.len());
        let of_maps = self.down.prepare(tokens)?.max(self.up.prepare(tokens)?);
        Ok(bytes.saturating_add(of_maps))
    }

    fn forward(
        &self,
        stream: &CudaStream,
        tokens: TokensInOut<'_, T>,
        workspace: &mut CudaViewMut<'_, u8>,
    ) -> Result<(), AttentionError> {
        let TokensInOut { tokens, x, out } = tokens;
        let rank = self.norm.len();
        let [elements, bytes] = room::<T>(tokens, rank);
        let results = tokens.saturating_mul(self.out_features());
        enough([results, out.len()], [bytes, workspace.len()])?;
        let kernels = &self.kernels;
        kernels.expect_here("the stream", stream.context())?;
        kernels.expect_here("the workspace", workspace.stream().context())?;
        let (mut low, mut rest) = workspace.split_at_mut(bytes);
        // SAFETY: any bits are elements; the first map checks the address.
        let Some(mut low) = (unsafe { low.transmute_mut::<T>(elements) }) else {
            unreachable!("the workspace has room for them")
        };
        let operands = TokensInOut {
            tokens,
            x,
            out: low.slice_mut(..),
        };
        self.down.forward(stream, operands, &mut rest)?;
        {
            let (address, _low) = low.device_ptr_mut(stream);
            let (weight, _weight) = self.norm.device_ptr(stream);
            let launch = norm_latent(T::DTYPE, [tokens, rank], address, weight, self.eps)?;
            if let Some(launch) = launch {
                // SAFETY: the kernels of a norm take this struct by value, and both buffers have what it says;
                // the guards, dropped after this, order the work with other uses of them.
                unsafe { kernels.enqueue(stream, kernels.latent_functions()?, &launch)? };
            }
        }
        let operands = TokensInOut {
            tokens,
            x: low.as_view(),
            out,
        };
        self.up.forward(stream, operands, &mut rest)
    }
}

/// [`LatentKeys`](crate::LatentKeys) on a device: keys of each head by way of the latent, followed by dims that
/// all heads share. With [`CudaLowRank`] for queries and values, a layer of DeepSeek-V2 or V3 is a
/// [`CudaAttentionLayer`](super::CudaAttentionLayer) whose `rotary_offset` is the first of these dims.
pub struct CudaLatentKeys<T> {
    heads: CudaLowRank<T>,
    shared: Arc<dyn CudaProjection<T>>,
    count: usize,
}

impl<T: Element + DeviceRepr + Send + Sync> CudaLatentKeys<T> {
    /// Dims of their own of so many heads, and those that they share.
    ///
    /// # Errors
    /// Those of [`LatentKeys::new`](crate::LatentKeys::new); [`AttentionError::Value`] unless dims of either
    /// kind are whole 16 bytes.
    pub fn new(
        heads: CudaLowRank<T>,
        shared: Arc<dyn CudaProjection<T>>,
        count: usize,
    ) -> Result<Self, AttentionError> {
        let own = crate::latent::own_dims(heads.out_features(), count)?;
        let from = heads.in_features();
        agree("in_features of shared dims", from, shared.in_features())?;
        // For its checks.
        let dims = [own, shared.out_features()];
        spread_latent(T::DTYPE, [1, count], dims, [0; 2], 0)?;
        Ok(Self {
            heads,
            shared,
            count,
        })
    }
}

impl<T> CudaProjection<T> for CudaLatentKeys<T>
where
    T: Element + DeviceRepr + Send + Sync,
{
    fn in_features(&self) -> usize {
        self.shared.in_features()
    }

    fn out_features(&self) -> usize {
        self.heads.out_features() + self.count * self.shared.out_features()
    }

    fn prepare(&self, tokens: usize) -> Result<usize, AttentionError> {
        let [_, of_heads] = room::<T>(tokens, self.heads.out_features());
        let [_, of_all] = room::<T>(tokens, self.shared.out_features());
        let [own, shared] = [self.heads.prepare(tokens)?, self.shared.prepare(tokens)?];
        Ok(of_heads
            .saturating_add(of_all)
            .saturating_add(own.max(shared)))
    }

    fn forward(
        &self,
        stream: &CudaStream,
        tokens: TokensInOut<'_, T>,
        workspace: &mut CudaViewMut<'_, u8>,
    ) -> Result<(), AttentionError> {
        let TokensInOut { tokens, x, mut out } = tokens;
        let kernels = &self.heads.kernels;
        let dims = [self.heads.out_features(), self.shared.out_features()];
        let [[own, own_bytes], [shared, shared_bytes]] = dims.map(|dims| room::<T>(tokens, dims));
        let bytes = own_bytes.saturating_add(shared_bytes);
        let results = tokens.saturating_mul(self.out_features());
        enough([results, out.len()], [bytes, workspace.len()])?;
        kernels.expect_here("the stream", stream.context())?;
        kernels.expect_here("activations", out.stream().context())?;
        kernels.expect_here("the workspace", workspace.stream().context())?;
        let (mut of_heads, mut rest) = workspace.split_at_mut(own_bytes);
        let (mut of_all, mut rest) = rest.split_at_mut(shared_bytes);
        // SAFETY: any bits are elements; the maps check the addresses.
        let views = unsafe {
            (
                of_heads.transmute_mut::<T>(own),
                of_all.transmute_mut::<T>(shared),
            )
        };
        let (Some(mut of_heads), Some(mut of_all)) = views else {
            unreachable!("the workspace has room for them")
        };
        let operands = TokensInOut {
            tokens,
            x: x.slice(..),
            out: of_heads.slice_mut(..),
        };
        self.heads.forward(stream, operands, &mut rest)?;
        let operands = TokensInOut {
            tokens,
            x,
            out: of_all.slice_mut(..),
        };
        self.shared.forward(stream, operands, &mut rest)?;
        let (of_heads, _of_heads) = of_heads.device_ptr(stream);
        let (of_all, _of_all) = of_all.device_ptr(stream);
        let (out, _out) = out.device_ptr_mut(stream);
        let launch = spread_latent(
            T::DTYPE,
            [tokens, self.count],
            [dims[0] / self.count, dims[1]],
            [of_heads, of_all],
            out,
        )?;
        if let Some(launch) = launch {
            // SAFETY: this kernel takes this struct by value, and the buffers have what it says; the guards,
            // dropped after this, order the work with other uses of them.
            unsafe { kernels.enqueue(stream, kernels.latent_functions()?, &launch)? };
        }
        Ok(())
    }
}
