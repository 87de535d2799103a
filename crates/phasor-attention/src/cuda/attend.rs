//! Attention over pages on a device.

use super::{AttentionKernels, Kept};
use crate::error::{agree, at_least};
use crate::kernels::{AttendAddresses, AttendPlan, AttendShape, KERNELS_OF_CODES};
use crate::{Attend, AttentionError};
use phasor::cuda::{CudaIds, CudaReport};
use phasor::cudarc::driver::{
    CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr, DeviceSlice, SyncOnDrop,
};
use phasor::{Dtype, Element, Ids};
use std::sync::Arc;

/// 8-bit codes of keys or values, to be read.
pub struct CudaCodes<'a> {
    /// The buffer with the codes.
    pub codes: CudaView<'a, u8>,
    /// Their scales.
    pub scales: CudaCodeScales<'a>,
}

/// Scales of codes, to be read.
pub enum CudaCodeScales<'a> {
    /// Those that are given, or that were written in f32.
    F32(CudaView<'a, f32>),
    /// Those that were written as bytes of E8M0.
    E8m0(CudaView<'a, u8>),
    /// Between the codes.
    Inline,
}

impl CudaCodeScales<'_> {
    fn bytes(&self) -> usize {
        match self {
            Self::F32(scales) => scales.num_bytes(),
            Self::E8m0(scales) => scales.num_bytes(),
            Self::Inline => 0,
        }
    }

    /// The bytes of a scale; 0 where there is no buffer.
    fn size(&self) -> usize {
        match self {
            Self::F32(_) => 4,
            Self::E8m0(_) => 1,
            Self::Inline => 0,
        }
    }

    fn stream(&self) -> Option<&Arc<CudaStream>> {
        match self {
            Self::F32(scales) => Some(scales.stream()),
            Self::E8m0(scales) => Some(scales.stream()),
            Self::Inline => None,
        }
    }

    fn device_ptr<'b>(&'b self, stream: &'b CudaStream) -> (u64, Option<SyncOnDrop<'b>>) {
        let (address, guard) = match self {
            Self::F32(scales) => scales.device_ptr(stream),
            Self::E8m0(scales) => scales.device_ptr(stream),
            Self::Inline => return (0, None),
        };
        (address, Some(guard))
    }
}

/// The caches that attention reads. Buffers of keys and of values may be the same.
pub enum CudaCacheView<'a, T> {
    /// Elements.
    Elements {
        /// The buffer with the keys.
        k: CudaView<'a, T>,
        /// The buffer with the values.
        v: CudaView<'a, T>,
    },
    /// Codes.
    Codes {
        /// Of the keys.
        k: CudaCodes<'a>,
        /// Of the values.
        v: CudaCodes<'a>,
    },
}

/// What attention reads.
pub struct CudaAttendOperands<'a, T> {
    /// The buffer with the queries.
    pub q: CudaView<'a, T>,
    /// The keys' and values' caches, as the plan has them.
    pub cache: CudaCacheView<'a, T>,
    /// `[sequences, table_pages]` (block_table, lookup_table).
    pub page_table: CudaIds<'a>,
    /// `[sequences]`: keys in the cache before these tokens. Those of these tokens follow, and are there
    /// already.
    pub cache_lengths: CudaIds<'a>,
    /// `[sequences + 1]`: sequence `s` has the tokens from `cu_seqlens[s]` to `cu_seqlens[s + 1]`. `None`:
    /// each token is a sequence.
    pub cu_seqlens: Option<CudaIds<'a>>,
    /// Told of tokens that have no result.
    pub report: Option<&'a CudaReport>,
}

/// Attention of new tokens over a paged cache, planned for one shape: [`AttendPlan`] on a device. Dropping
/// it waits for the context's work if it has sinks, as that may read them.
#[derive(Debug)]
pub struct CudaAttend {
    kernels: AttentionKernels,
    plan: AttendPlan,
    sinks: Option<Kept<f32>>,
}

impl AttentionKernels {
    /// Checks a shape, loads the kernels of its element type, and copies sinks to the device.
    ///
    /// # Errors
    /// Those of [`AttendPlan::new`]; [`AttentionError::Step`] for those of the driver.
    pub fn attend(
        &self,
        dtype: Dtype,
        attend: &Attend<'_>,
        shape: &AttendShape,
    ) -> Result<CudaAttend, AttentionError> {
        let plan = AttendPlan::new(dtype, attend, shape)?;
        self.attend_functions(dtype)?;
        if plan.has_codes() {
            self.attend_codes_functions()?;
        }
        let sinks = plan.sinks().map(|sinks| self.upload(sinks)).transpose()?;
        Ok(CudaAttend {
            kernels: self.clone(),
            plan,
            sinks,
        })
    }
}

impl CudaAttend {
    /// What was planned.
    pub fn plan(&self) -> &AttendPlan {
        &self.plan
    }

    /// Enqueues the attention of the planned tokens into `out`. Allocates nothing and waits for nothing.
    ///
    /// # Errors
    /// [`AttentionError::Mismatch`] for buffers that are too short and ids of another number,
    /// [`AttentionError::Step`] for buffers of another context and errors of the driver. What ids in device
    /// memory hold is not looked at: see [`AttendPlan`].
    pub fn run<T: Element + DeviceRepr>(
        &self,
        stream: &CudaStream,
        operands: &CudaAttendOperands<'_, T>,
        workspace: &mut CudaViewMut<'_, f32>,
        out: &mut CudaViewMut<'_, T>,
    ) -> Result<(), AttentionError> {
        let CudaAttendOperands {
            q,
            cache,
            page_table,
            cache_lengths,
            cu_seqlens,
            report,
        } = operands;
        if T::DTYPE != self.plan.dtype() {
            return Err(AttentionError::Dtype {
                dtype: T::DTYPE,
                remedy: "attention was planned for another element type",
            });
        }
        let none = CudaCodeScales::Inline;
        let (lens, streams, scales) = match cache {
            CudaCacheView::Elements { k, v } => {
                ([k.len(), v.len()], [k.stream(), v.stream()], [&none; 2])
            }
            CudaCacheView::Codes { k, v } => (
                [k.codes.len(), v.codes.len()],
                [k.codes.stream(), v.codes.stream()],
                [&k.scales, &v.scales],
            ),
        };
        agree(
            "caches of codes, as planned",
            usize::from(self.plan.has_codes()),
            usize::from(matches!(cache, CudaCacheView::Codes { .. })),
        )?;
        let scale_sizes = self.plan.scale_sizes();
        let scale_bytes = self.plan.scale_bytes();
        for ((scales, size), bytes) in scales.into_iter().zip(scale_sizes).zip(scale_bytes) {
            agree("bytes of a scale, as planned", size, scales.size())?;
            let what = "bytes of the scales of codes at least";
            at_least(what, bytes, scales.bytes())?;
        }
        let required = self.plan.required_lens();
        for (what, needed, len) in [
            ("elements of q at least", required[0], q.len()),
            ("elements of the output at least", required[1], out.len()),
            ("elements of the keys' cache at least", required[2], lens[0]),
            (
                "elements of the values' cache at least",
                required[3],
                lens[1],
            ),
            (
                "f32 elements of the workspace at least",
                self.plan.workspace_len(),
                workspace.len(),
            ),
        ] {
            at_least(what, needed, len)?;
        }
        let here =
            |what, stream: &Arc<CudaStream>| self.kernels.expect_here(what, stream.context());
        self.kernels.expect_here("the stream", stream.context())?;
        for stream in [q.stream()].into_iter().chain(streams) {
            here("q or a cache", stream)?;
        }
        for stream in scales.iter().filter_map(|scales| scales.stream()) {
            here("scales of codes", stream)?;
        }
        here("the output", out.stream())?;
        here("the workspace", workspace.stream())?;
        let ids_given = [Some(page_table), Some(cache_lengths), cu_seqlens.as_ref()];
        for ids in ids_given.into_iter().flatten() {
            here("ids", ids.memory().stream())?;
        }
        if let Some(report) = report {
            here("the report", report.word().stream())?;
        }

        let (q, _q) = q.device_ptr(stream);
        let [(k, _k), (v, _v)] = match cache {
            CudaCacheView::Elements { k, v } => [k.device_ptr(stream), v.device_ptr(stream)],
            CudaCacheView::Codes { k, v } => {
                [k.codes.device_ptr(stream), v.codes.device_ptr(stream)]
            }
        };
        let [(k_scales, _k_scales), (v_scales, _v_scales)] =
            scales.map(|scales| scales.device_ptr(stream));
        let at = |ids: &CudaIds<'_>, address| Ids::at(address, ids.id_type(), ids.len());
        let (address, _table) = page_table.memory().device_ptr(stream);
        let page_table = at(page_table, address);
        let (address, _lengths) = cache_lengths.memory().device_ptr(stream);
        let cache_lengths = at(cache_lengths, address);
        let offsets = cu_seqlens
            .as_ref()
            .map(|ids| (ids, ids.memory().device_ptr(stream)));
        let sinks = self.sinks.as_ref().map(|sinks| sinks.device_ptr(stream));
        let word = report.map(|report| report.word().device_ptr(stream));
        let (workspace, _workspace) = workspace.device_ptr_mut(stream);
        let (out, _out) = out.device_ptr_mut(stream);
        let addresses = AttendAddresses {
            q,
            out,
            k,
            v,
            k_scales,
            v_scales,
            page_table,
            cache_lengths,
            cu_seqlens: offsets
                .as_ref()
                .map(|(ids, (address, _))| at(ids, *address)),
            sinks: sinks.as_ref().map_or(0, |(address, _)| *address),
            workspace,
            report: word.as_ref().map_or(0, |(address, _)| *address),
        };
        // SAFETY: the buffers are of this context and have what the plan needs, and the kernels touch nothing
        // else, whatever ids hold; the output's heads do not overlap. The guards, dropped after this, order
        // the launches with other uses of the buffers.
        unsafe { self.run_raw(stream, &addresses) }
    }

    /// The same on addresses.
    ///
    /// # Safety
    /// Each address is that of memory of this device with what [`AttendAddresses`] and
    /// [`AttendPlan::required_lens`] say, aligned to its type, until the work has run; nothing else writes
    /// what is read, or touches the output and the workspace, meanwhile. The output and the workspace
    /// overlap nothing else. The stream is of this context.
    ///
    /// # Errors
    /// [`AttentionError::Mismatch`] for ids of another number, [`AttentionError::Step`] for errors of the
    /// driver.
    pub unsafe fn run_raw(
        &self,
        stream: &CudaStream,
        addresses: &AttendAddresses,
    ) -> Result<(), AttentionError> {
        let of_elements = self.kernels.attend_functions(self.plan.dtype())?;
        for launch in self.plan.launches(addresses)?.into_iter().flatten() {
            let functions = match KERNELS_OF_CODES.contains(&launch.kernel) {
                true => self.kernels.attend_codes_functions()?,
                false => of_elements,
            };
            // SAFETY: all of these kernels take this struct by value; the rest is the caller's promise.
            unsafe { self.kernels.enqueue(stream, functions, &launch)? };
        }
        Ok(())
    }
}
