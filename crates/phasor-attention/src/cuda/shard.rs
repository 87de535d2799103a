//! A layer on several devices.

use super::{CudaAttentionLayer, CudaBatch, CudaKvCache, CudaLayerPlan, CudaWorkspace};
use crate::AttentionError;
use crate::error::agree;
use phasor::Element;
use phasor::cuda::CudaReport;
use phasor::cudarc::driver::{CudaStream, CudaView, CudaViewMut, DeviceRepr, ValidAsZeroBits};
use std::sync::Arc;

/// A device's part of a sum.
pub struct CudaPart<'a, T> {
    /// Where the sum is enqueued.
    pub stream: &'a Arc<CudaStream>,
    /// As many elements as every other part has.
    pub elements: CudaViewMut<'a, T>,
}

/// What devices do together, some of which are this process', as [`Collective`](crate::Collective) on
/// elements in device memory: `NcclCollective`, with the feature `nccl`, or an engine's own.
pub trait CudaCollective<T>: Send + Sync {
    /// How many of the devices are this process'.
    fn devices(&self) -> usize;

    /// Enqueues, on the stream of each of this process' devices, what replaces its part by the sum of the
    /// parts of all devices.
    ///
    /// # Errors
    /// [`AttentionError::Mismatch`] for parts that differ in length, or are not as many as this process'
    /// devices; others of the collective.
    fn all_reduce_sum(&self, parts: &mut [CudaPart<'_, T>]) -> Result<(), AttentionError>;
}

/// What a device of [`CudaTensorParallelAttention`] computes with: the arguments of
/// [`CudaAttentionLayer::forward`].
pub struct CudaShardCall<'a, 'c, T> {
    /// A stream of the device.
    pub stream: &'a Arc<CudaStream>,
    /// Of the device's part of the layer.
    pub plan: &'a CudaLayerPlan,
    /// `[tokens, hidden_size]`, the same on all devices.
    pub x: CudaView<'a, T>,
    /// The cache of the device's heads.
    pub cache: &'a mut CudaKvCache<'c, T>,
    /// The same sequences on all devices.
    pub batch: &'a CudaBatch<'a>,
    /// Of the device's part of the layer.
    pub workspace: &'a mut CudaWorkspace<T>,
    /// As `x`.
    pub out: CudaViewMut<'a, T>,
    /// Told of tokens that the device's cache has no room for.
    pub report: &'a CudaReport,
}

/// A layer whose heads are spread over devices, of which this process has some: all, one each of as many
/// processes, or anything between. All see the same tokens, and get the same result.
///
/// A part is made of a device's weights, as of
/// [`LayerWeights::shard`](crate::LayerWeights::shard) by [`CudaAttentionLayer::from_weights`].
pub struct CudaTensorParallelAttention<T, C> {
    shards: Vec<CudaAttentionLayer<T>>,
    collective: C,
}

impl<T, C> CudaTensorParallelAttention<T, C>
where
    T: Element + DeviceRepr + ValidAsZeroBits,
    C: CudaCollective<T>,
{
    /// The parts of this process' devices, in the order of the collective's.
    ///
    /// # Errors
    /// [`AttentionError::Mismatch`] for parts that are not as many as the collective's devices, or differ in
    /// `hidden_size`.
    pub fn new(shards: Vec<CudaAttentionLayer<T>>, collective: C) -> Result<Self, AttentionError> {
        agree("parts of the layer", collective.devices(), shards.len())?;
        if let Some((first, others)) = shards.split_first() {
            let hidden_size = first.config().hidden_size;
            for other in others {
                let other = other.config().hidden_size;
                agree("hidden_size of a part", hidden_size, other)?;
            }
        }
        Ok(Self { shards, collective })
    }

    /// The parts of the layer, which plan calls and make workspaces.
    pub fn shards(&self) -> &[CudaAttentionLayer<T>] {
        &self.shards
    }

    /// Enqueues the layer on all of this process' devices, and the sum over all devices after it.
    ///
    /// Each process calls this for the same tokens. One that does not, or whose call fails, has the others
    /// wait.
    ///
    /// # Errors
    /// Those of [`CudaAttentionLayer::forward`] and of the collective; [`AttentionError::Mismatch`] for calls
    /// that are not as many as devices or differ in their tokens, before anything is enqueued.
    pub fn forward(&self, calls: &mut [CudaShardCall<'_, '_, T>]) -> Result<(), AttentionError> {
        agree("calls, one a device", self.shards.len(), calls.len())?;
        let Some(first) = calls.first() else {
            return Ok(());
        };
        let tokens = first.plan.shape().tokens;
        let used = tokens.saturating_mul(self.shards[0].config().hidden_size);
        for call in calls.iter() {
            let planned = call.plan.shape().tokens;
            agree("tokens of a device, as of the first", tokens, planned)?;
            for (what, len) in [
                ("elements of x at least", call.x.len()),
                ("elements of the output at least", call.out.len()),
            ] {
                agree(what, used, len.min(used))?;
            }
        }
        for (shard, call) in self.shards.iter().zip(calls.iter_mut()) {
            shard.forward(
                call.stream,
                call.plan,
                call.x.slice(..),
                call.cache,
                call.batch,
                call.workspace,
                call.out.slice_mut(..),
                call.report,
            )?;
        }
        let mut parts: Vec<_> = calls
            .iter_mut()
            .map(|call| CudaPart {
                stream: call.stream,
                elements: call.out.slice_mut(..used),
            })
            .collect();
        self.collective.all_reduce_sum(&mut parts)
    }
}
