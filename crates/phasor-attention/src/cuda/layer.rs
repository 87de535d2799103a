//! The layer on a device.

use super::{
    AttentionKernels, CublasLt, CudaAttend, CudaAttendOperands, CudaCacheView, CudaCodeScales,
    CudaCodes, CudaDense, CudaFp8Linear, CudaProjection, During, Kept, Precision, TokensInOut,
};
use crate::error::{agree, at_least};
use crate::kernels::{AttendShape, CacheCodes};
use crate::{AttentionConfig, AttentionError, LayerWeights, Weights};
use phasor::cuda::{
    CudaBytes, CudaIds, CudaPositions, CudaReport, CudaRotator, CudaStep, CudaWeights,
};
use phasor::cudarc::driver::{
    CudaSlice, CudaStream, CudaView, CudaViewMut, DeviceRepr, ValidAsZeroBits,
};
use phasor::{
    Appended, CacheLayout, Element, InOut, KvCacheLayout, Layout, Plan, Problem, Rope, SlotsIn,
};
use std::sync::Arc;

/// Queries, keys and values of a token; as [`QkvProjection`](crate::QkvProjection).
#[derive(Clone)]
pub enum CudaQkv<T> {
    /// Each by a projection of its own.
    Separate {
        /// `[heads * head_dim, hidden_size]`.
        q: Arc<dyn CudaProjection<T>>,
        /// `[kv_heads * head_dim, hidden_size]`.
        k: Arc<dyn CudaProjection<T>>,
        /// `[kv_heads * v_head_dim, hidden_size]`.
        v: Arc<dyn CudaProjection<T>>,
    },
    /// One of `[(heads + 2 * kv_heads) * head_dim, hidden_size]`: queries, then keys, then values.
    Stacked(Arc<dyn CudaProjection<T>>),
}

/// What the stages of queries, keys or values need, on the device: `[heads, head_dim]` or, but for a bias,
/// `[head_dim]`.
pub struct CudaHeadWeights<T> {
    /// What is added first, `[heads, head_dim]`.
    pub bias: Option<CudaSlice<T>>,
    /// What normed values are multiplied by.
    pub norm: Option<CudaSlice<T>>,
    /// What is added then.
    pub norm_bias: Option<CudaSlice<T>>,
}

impl<T> Default for CudaHeadWeights<T> {
    fn default() -> Self {
        Self {
            bias: None,
            norm: None,
            norm_bias: None,
        }
    }
}

/// The same, kept while work may read them.
struct StageWeights<T> {
    bias: Option<Kept<T>>,
    norm: Option<Kept<T>>,
    norm_bias: Option<Kept<T>>,
}

impl<T> From<CudaHeadWeights<T>> for StageWeights<T> {
    fn from(weights: CudaHeadWeights<T>) -> Self {
        Self {
            bias: weights.bias.map(Kept::new),
            norm: weights.norm.map(Kept::new),
            norm_bias: weights.norm_bias.map(Kept::new),
        }
    }
}

impl<T> StageWeights<T> {
    fn of_step(&self) -> CudaWeights<'_, T> {
        let mut weights = CudaWeights::new();
        if let Some(bias) = &self.bias {
            weights = weights.bias(bias.as_view());
        }
        if let Some(norm) = &self.norm {
            weights = weights.norm(norm.as_view());
        }
        if let Some(bias) = &self.norm_bias {
            weights = weights.norm_bias(bias.as_view());
        }
        weights
    }
}

/// Scales of codes that a layer reads, and writes unless they are given.
pub enum CudaCodeScalesMut<'a> {
    /// Those of [`StoredCodes::given`](phasor::StoredCodes::given): one for all heads, or one for each.
    Given(CudaView<'a, f32>),
    /// In f32.
    F32(CudaViewMut<'a, f32>),
    /// As bytes of E8M0.
    E8m0(CudaViewMut<'a, u8>),
    /// Between the codes.
    Inline,
}

impl CudaCodeScalesMut<'_> {
    fn view(&self) -> CudaCodeScales<'_> {
        match self {
            Self::Given(scales) => CudaCodeScales::F32(scales.slice(..)),
            Self::F32(scales) => CudaCodeScales::F32(scales.as_view()),
            Self::E8m0(scales) => CudaCodeScales::E8m0(scales.as_view()),
            Self::Inline => CudaCodeScales::Inline,
        }
    }

    /// What the step is given, and where it writes.
    fn of_step(&mut self) -> (Option<CudaView<'_, f32>>, Option<CudaBytes<'_>>) {
        match self {
            Self::Given(scales) => (Some(scales.slice(..)), None),
            Self::F32(scales) => (None, Some(scales.into())),
            Self::E8m0(scales) => (None, Some(scales.into())),
            Self::Inline => (None, None),
        }
    }
}

/// The cache of one layer, in device memory.
pub enum CudaKvCache<'a, T> {
    /// Keys and values in buffers of their own.
    Separate {
        /// The keys.
        k: CudaViewMut<'a, T>,
        /// The values.
        v: CudaViewMut<'a, T>,
    },
    /// Both in one.
    OneBuffer(CudaViewMut<'a, T>),
    /// 8-bit codes of keys and of values, each with their scales, in buffers of their own.
    SeparateCodes {
        /// The keys.
        k: (CudaViewMut<'a, u8>, CudaCodeScalesMut<'a>),
        /// The values.
        v: (CudaViewMut<'a, u8>, CudaCodeScalesMut<'a>),
    },
    /// Codes of both in one.
    CodesInOneBuffer {
        /// Of keys and values.
        codes: CudaViewMut<'a, u8>,
        /// Of the keys.
        k_scales: CudaCodeScalesMut<'a>,
        /// Of the values.
        v_scales: CudaCodeScalesMut<'a>,
    },
}

impl<T> CudaKvCache<'_, T> {
    fn has_codes(&self) -> bool {
        match self {
            Self::Separate { .. } | Self::OneBuffer(_) => false,
            Self::SeparateCodes { .. } | Self::CodesInOneBuffer { .. } => true,
        }
    }

    /// What attention reads.
    fn view(&self) -> CudaCacheView<'_, T> {
        match self {
            Self::Separate { k, v } => CudaCacheView::Elements {
                k: k.as_view(),
                v: v.as_view(),
            },
            Self::OneBuffer(both) => CudaCacheView::Elements {
                k: both.as_view(),
                v: both.as_view(),
            },
            Self::SeparateCodes {
                k: (k, k_scales),
                v: (v, v_scales),
            } => CudaCacheView::Codes {
                k: CudaCodes {
                    codes: k.as_view(),
                    scales: k_scales.view(),
                },
                v: CudaCodes {
                    codes: v.as_view(),
                    scales: v_scales.view(),
                },
            },
            Self::CodesInOneBuffer {
                codes,
                k_scales,
                v_scales,
            } => CudaCacheView::Codes {
                k: CudaCodes {
                    codes: codes.as_view(),
                    scales: k_scales.view(),
                },
                v: CudaCodes {
                    codes: codes.as_view(),
                    scales: v_scales.view(),
                },
            },
        }
    }
}

/// What a plan is made for.
#[derive(Clone, Copy, Debug)]
pub struct CudaLayerShape {
    /// New tokens of a call.
    pub tokens: usize,
    /// Sequences of the batch.
    pub sequences: usize,
    /// Whether sequences have any number of new tokens, by `cu_seqlens`; else each token is a sequence, as in
    /// decode.
    pub ragged: bool,
    /// Pages of a row of the page table.
    pub table_pages: usize,
    /// Keys that a sequence has at most; `None`: what its row of the page table has room for.
    pub most_keys: Option<usize>,
    /// The keys' cache.
    pub k: CacheLayout,
    /// The values' cache.
    pub v: CacheLayout,
    /// Whether both caches are in one buffer.
    pub one_buffer: bool,
    /// Keys' and values' codes; `None`: the caches have elements.
    pub codes: Option<[CacheCodes; 2]>,
}

/// Sequences of a call, in device memory.
pub struct CudaBatch<'a> {
    /// `[sequences + 1]`, where the plan is ragged.
    pub cu_seqlens: Option<CudaIds<'a>>,
    /// `[sequences]`: tokens in the cache before this call. The caller advances them.
    pub cache_lengths: CudaIds<'a>,
    /// `[sequences, table_pages]`.
    pub page_table: CudaIds<'a>,
    /// Rotary positions other than the place in the cache, one for each token.
    pub position_ids: Option<CudaIds<'a>>,
    /// The row of frequencies of each sequence, where the rotation has rows by length (LongRoPE, dynamic
    /// NTK): lengths are on the device, so that the caller says which.
    pub frequency_rows: Option<CudaIds<'a>>,
}

/// A layer's calls of one shape: plans of the step and of attention, and algorithms of its products. It
/// serves any number of calls.
pub struct CudaLayerPlan {
    shape: CudaLayerShape,
    step: Plan,
    attend: CudaAttend,
    /// Bytes that projections use.
    projection_bytes: usize,
}

impl CudaLayerPlan {
    /// Attention's part.
    pub fn attend(&self) -> &CudaAttend {
        &self.attend
    }

    /// What it was made for.
    pub fn shape(&self) -> &CudaLayerShape {
        &self.shape
    }
}

/// Memory of calls between their steps, for plans of no more than it was made for.
pub struct CudaWorkspace<T> {
    projected: CudaSlice<T>,
    q: CudaSlice<T>,
    attended: CudaSlice<T>,
    partial: CudaSlice<f32>,
    bytes: CudaSlice<u8>,
}

impl<T> CudaWorkspace<T> {
    /// After [`CudaAttentionLayer::project_and_store`]: the queries, `[tokens, heads, head_dim]`, as
    /// attention takes them.
    pub fn q(&self) -> CudaView<'_, T> {
        self.q.as_view()
    }

    /// What [`CudaAttentionLayer::project_out`] takes, `[tokens, heads, v_head_dim]`.
    pub fn attended_mut(&mut self) -> CudaViewMut<'_, T> {
        self.attended.as_view_mut()
    }

    /// Bytes that it holds.
    pub fn bytes(&self) -> usize {
        self.projected.num_bytes()
            + self.q.num_bytes()
            + self.attended.num_bytes()
            + self.partial.num_bytes()
            + self.bytes.num_bytes()
    }
}

/// [`AttentionLayer`](crate::AttentionLayer) on a device: projections, the fused step, attention, and the way
/// out, with the same roundings. Dropping it waits for the context's work, as that may read its weights.
pub struct CudaAttentionLayer<T> {
    config: AttentionConfig,
    kernels: AttentionKernels,
    rotator: CudaRotator,
    qkv: CudaQkv<T>,
    o: Arc<dyn CudaProjection<T>>,
    /// Of q, k and v.
    weights: [StageWeights<T>; 3],
}

impl<T: Element + DeviceRepr + ValidAsZeroBits> CudaAttentionLayer<T> {
    /// Checks that all parts fit each other, and copies the rotation's angles to the device.
    ///
    /// # Errors
    /// Those of [`AttentionLayer::new`](crate::AttentionLayer::new); [`AttentionError::Step`] for errors of
    /// the driver.
    pub fn new(
        config: AttentionConfig,
        kernels: &AttentionKernels,
        rope: &Rope,
        qkv: CudaQkv<T>,
        o: Arc<dyn CudaProjection<T>>,
    ) -> Result<Self, AttentionError> {
        let sizes = |projection: &Arc<dyn CudaProjection<T>>| {
            [projection.in_features(), projection.out_features()]
        };
        match &qkv {
            CudaQkv::Separate { q, k, v } => {
                config.check([sizes(q), sizes(k), sizes(v)].as_slice(), sizes(&o))?;
            }
            CudaQkv::Stacked(qkv) => config.check(&[sizes(qkv)], sizes(&o))?,
        }
        Ok(Self {
            config,
            kernels: kernels.clone(),
            rotator: kernels.cuda().rotator(rope)?,
            qkv,
            o,
            weights: [(); 3].map(|()| CudaHeadWeights::default().into()),
        })
    }

    /// A layer, or a device's part of one ([`LayerWeights::shard`]), from its weights, which become dense
    /// elements on the device, whatever they are; activations become e4m3 where the weights say so.
    ///
    /// # Errors
    /// Those of [`new`](Self::new), of [`CudaDense::new`] and of [`round_fp8`](crate::kernels::round_fp8).
    pub fn from_weights(
        config: AttentionConfig,
        lt: &CublasLt,
        rope: &Rope,
        weights: &LayerWeights<T>,
        precision: Precision,
    ) -> Result<Self, AttentionError>
    where
        T: Send + Sync,
    {
        let dense = |of: &Arc<dyn Weights>, at: usize| -> Result<Arc<dyn CudaProjection<T>>, _> {
            let dense = CudaDense::<T>::of_weights(lt, &**of, precision)?;
            Ok::<_, AttentionError>(match weights.activations[at] {
                None => Arc::new(dense),
                Some(activation) => {
                    Arc::new(CudaFp8Linear::of_part(lt.kernels(), dense, activation)?)
                }
            })
        };
        let qkv = CudaQkv::Separate {
            q: dense(&weights.q, 0)?,
            k: dense(&weights.k, 1)?,
            v: dense(&weights.v, 2)?,
        };
        let o = dense(&weights.o, 3)?;
        let kernels = lt.kernels();
        let mut layer = Self::new(config, kernels, rope, qkv, o)?;
        for (to, from) in layer.weights.iter_mut().zip(&weights.heads) {
            let upload = |values: &Option<Vec<T>>| {
                let values = values.as_deref().filter(|values| !values.is_empty());
                values.map(|values| kernels.upload(values)).transpose()
            };
            *to = StageWeights {
                bias: upload(&from.bias)?,
                norm: upload(&from.norm)?,
                norm_bias: upload(&from.norm_bias)?,
            };
        }
        Ok(layer)
    }

    /// What the stages of queries, keys and values need, as far as their stages name it.
    pub fn with_head_weights(
        mut self,
        q: CudaHeadWeights<T>,
        k: CudaHeadWeights<T>,
        v: CudaHeadWeights<T>,
    ) -> Self {
        self.weights = [q, k, v].map(StageWeights::from);
        self
    }

    /// The numbers of the layer.
    pub fn config(&self) -> &AttentionConfig {
        &self.config
    }

    /// Plans calls of one shape: loads kernels and chooses algorithms.
    ///
    /// # Errors
    /// Those of [`AttendPlan::new`](crate::kernels::AttendPlan::new), of the step's plan, and of the
    /// projections.
    pub fn plan(&self, shape: &CudaLayerShape) -> Result<CudaLayerPlan, AttentionError> {
        let AttentionConfig {
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            v_head_dim,
            rotary_offset,
            ..
        } = self.config;
        let CudaLayerShape {
            tokens,
            sequences,
            ragged,
            ..
        } = *shape;
        if !ragged {
            agree("sequences of decode, one a token", tokens, sequences)?;
        }
        agree("heads of the cache", kv_heads, shape.k.shape()[2])?;
        let [batch, of_each] = match ragged {
            true => [1, tokens],
            false => [tokens, 1],
        };
        let rows = |heads, dims| Layout::bshd(batch, of_each, heads, dims);
        let rotated = |layout: Layout| layout.with_rotary_offset(rotary_offset);
        let q_to = rotated(rows(heads, head_dim));
        let problem = Problem::new(T::DTYPE);
        let problem = match self.qkv {
            CudaQkv::Separate { .. } => problem
                .q((q_to, q_to))
                .k_to_cache(rotated(rows(kv_heads, head_dim)))
                .v_to_cache(rows(kv_heads, v_head_dim)),
            CudaQkv::Stacked(_) => {
                let all = heads + 2 * kv_heads;
                let window = |range| Layout::packed_heads(batch, of_each, all, head_dim, range);
                let k = heads + kv_heads;
                problem
                    .q((rotated(window(0..heads)), q_to))
                    .k_to_cache(rotated(window(heads..k)))
                    .v_to_cache(window(k..all))
                    .packed()
            }
        };
        let cache = match shape.one_buffer {
            true => KvCacheLayout::one_buffer((shape.k, shape.v)),
            false => KvCacheLayout::separate(shape.k, shape.v),
        };
        let cache = match &shape.codes {
            Some([k, v]) => cache.with_k_codes(k.codes).with_v_codes(v.codes),
            None => cache,
        };
        let problem = problem
            .q_stages(self.config.q_stages)
            .k_stages(self.config.k_stages)
            .v_stages(self.config.v_stages)
            .cache(cache);
        let step = self.rotator.plan(&problem)?;
        let attend = self.kernels.attend(
            T::DTYPE,
            &self.config.attend(),
            &AttendShape {
                q: rows(heads, head_dim),
                out: rows(heads, v_head_dim),
                k: shape.k,
                v: shape.v,
                codes: shape.codes,
                sequences,
                table_pages: shape.table_pages,
                most_keys: shape.most_keys,
            },
        )?;
        let mut projection_bytes = self.o.prepare(tokens)?;
        let projections: &[&Arc<dyn CudaProjection<T>>] = match &self.qkv {
            CudaQkv::Separate { q, k, v } => &[q, k, v],
            CudaQkv::Stacked(qkv) => &[qkv],
        };
        for projection in projections {
            projection_bytes = projection_bytes.max(projection.prepare(tokens)?);
        }
        Ok(CudaLayerPlan {
            shape: *shape,
            step,
            attend,
            projection_bytes,
        })
    }

    /// Allocates what calls of a plan need. One serves all layers of a model in turn.
    ///
    /// # Errors
    /// [`AttentionError::Step`] if there is no memory.
    pub fn workspace(
        &self,
        stream: &Arc<CudaStream>,
        plan: &CudaLayerPlan,
    ) -> Result<CudaWorkspace<T>, AttentionError> {
        let [q_dims, k_dims, v_dims, attended_dims] = self.dims();
        let tokens = plan.shape.tokens;
        let room = |dims: usize| {
            // cudarc makes no empty buffers.
            let len = tokens.saturating_mul(dims).max(1);
            stream
                .alloc_zeros::<T>(len)
                .during("allocating a workspace")
        };
        Ok(CudaWorkspace {
            projected: room(q_dims.saturating_add(k_dims).saturating_add(v_dims))?,
            q: room(q_dims)?,
            attended: room(attended_dims)?,
            partial: stream
                .alloc_zeros(plan.attend.plan().workspace_len().max(1))
                .during("allocating a workspace")?,
            bytes: stream
                .alloc_zeros(plan.projection_bytes.max(1))
                .during("allocating a workspace")?,
        })
    }

    /// Elements of a token's queries, of its keys, of its values, and of what attention makes.
    fn dims(&self) -> [usize; 4] {
        let AttentionConfig {
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            v_head_dim,
            ..
        } = self.config;
        [
            heads * head_dim,
            kv_heads * head_dim,
            kv_heads * v_head_dim,
            heads * v_head_dim,
        ]
    }

    /// Enqueues the layer for the planned tokens: `x` and `out` are `[tokens, hidden_size]`. Their keys and
    /// values are put in the cache. Tokens past the last of `cu_seqlens` are padding, whose results mean
    /// nothing. A token that the cache has no room for is not stored, has no result that means anything,
    /// and is reported.
    ///
    /// # Errors
    /// [`AttentionError::Mismatch`] for buffers that are too short and ids of another number,
    /// [`AttentionError::Step`] for those of other contexts and errors of the driver, and those of the
    /// projections.
    #[allow(clippy::too_many_arguments, reason = "what a layer has")]
    pub fn forward(
        &self,
        stream: &CudaStream,
        plan: &CudaLayerPlan,
        x: CudaView<'_, T>,
        cache: &mut CudaKvCache<'_, T>,
        batch: &CudaBatch<'_>,
        workspace: &mut CudaWorkspace<T>,
        out: CudaViewMut<'_, T>,
        report: &CudaReport,
    ) -> Result<(), AttentionError> {
        self.project_and_store(stream, plan, x, cache, batch, workspace, report)?;
        let operands = CudaAttendOperands {
            q: workspace.q.as_view(),
            cache: cache.view(),
            page_table: batch.page_table.again(),
            cache_lengths: batch.cache_lengths.again(),
            cu_seqlens: batch.cu_seqlens.as_ref().map(CudaIds::again),
            report: Some(report),
        };
        plan.attend.run(
            stream,
            &operands,
            &mut workspace.partial.as_view_mut(),
            &mut workspace.attended.as_view_mut(),
        )?;
        self.project_out(stream, plan, workspace, out)
    }

    /// The layer up to attention: what an engine with an attention of its own calls first. The queries are in
    /// [`CudaWorkspace::q`] then.
    ///
    /// # Errors
    /// Those of [`forward`](Self::forward).
    #[allow(clippy::too_many_arguments, reason = "what a layer has")]
    pub fn project_and_store(
        &self,
        stream: &CudaStream,
        plan: &CudaLayerPlan,
        x: CudaView<'_, T>,
        cache: &mut CudaKvCache<'_, T>,
        batch: &CudaBatch<'_>,
        workspace: &mut CudaWorkspace<T>,
        report: &CudaReport,
    ) -> Result<(), AttentionError> {
        let tokens = plan.shape.tokens;
        if tokens == 0 {
            return Ok(());
        }
        agree(
            "batches with cu_seqlens, as planned",
            usize::from(plan.shape.ragged),
            usize::from(batch.cu_seqlens.is_some()),
        )?;
        agree(
            "caches of codes, as planned",
            usize::from(plan.shape.codes.is_some()),
            usize::from(cache.has_codes()),
        )?;
        if batch.frequency_rows.is_none()
            && !matches!(self.rotator.rope().row_for_length(1), Ok(None))
        {
            return Err(AttentionError::Weights {
                what: "frequency_rows of a batch",
                remedy: "the rotation has rows by length: say which row each sequence has",
            });
        }
        let [q_dims, k_dims, v_dims, _] = self.dims();
        let all_dims = q_dims + k_dims + v_dims;
        let CudaWorkspace {
            projected,
            q: q_to,
            bytes,
            ..
        } = workspace;
        for (what, needed, len) in [
            (
                "elements of x at least",
                tokens * self.config.hidden_size,
                x.len(),
            ),
            (
                "elements of the workspace at least",
                tokens * all_dims,
                projected.len(),
            ),
            (
                "queries of the workspace at least",
                tokens * q_dims,
                q_to.len(),
            ),
        ] {
            at_least(what, needed, len)?;
        }
        let mut bytes = bytes.as_view_mut();
        let mut project = |projection: &Arc<dyn CudaProjection<T>>,
                           out: CudaViewMut<'_, T>|
         -> Result<(), AttentionError> {
            let tokens = TokensInOut {
                tokens,
                x: x.slice(..),
                out,
            };
            projection.forward(stream, tokens, &mut bytes)
        };
        match &self.qkv {
            CudaQkv::Stacked(qkv) => project(qkv, projected.slice_mut(..tokens * all_dims))?,
            CudaQkv::Separate { q, k, v } => {
                let (k_at, v_at) = (tokens * q_dims, tokens * (q_dims + k_dims));
                project(q, projected.slice_mut(..k_at))?;
                project(k, projected.slice_mut(k_at..v_at))?;
                project(v, projected.slice_mut(v_at..tokens * all_dims))?;
            }
        }

        let positions = match &batch.position_ids {
            None => CudaPositions::start_per_sequence(batch.cache_lengths.again()),
            Some(ids) => CudaPositions::per_token(ids.again()),
        };
        let positions = match &batch.cu_seqlens {
            Some(offsets) => positions.cu_seqlens(offsets.again()),
            None => positions,
        };
        let positions = match &batch.frequency_rows {
            Some(rows) => positions.frequency_rows_per_sequence(rows.again()),
            None => positions,
        };
        let [q_weights, mut k_weights, mut v_weights] =
            self.weights.each_ref().map(|w| w.of_step());
        let step = CudaStep::new(positions)
            .q_weights(q_weights)
            .slots(SlotsIn::page_table(
                batch.page_table.again(),
                batch.cache_lengths.again(),
            ));
        let (mut step, scales) = match cache {
            CudaKvCache::Separate { k, v } => (step.k_cache(k).v_cache(v), None),
            CudaKvCache::OneBuffer(both) => (step.kv_cache(both), None),
            CudaKvCache::SeparateCodes { k, v } => {
                let step = step.k_cache(&mut k.0).v_cache(&mut v.0);
                (step, Some((&mut k.1, &mut v.1)))
            }
            CudaKvCache::CodesInOneBuffer {
                codes,
                k_scales,
                v_scales,
            } => (step.kv_cache(codes), Some((k_scales, v_scales))),
        };
        if let Some((k, v)) = scales {
            let ((k_given, k_written), (v_given, v_written)) = (k.of_step(), v.of_step());
            if let Some(scales) = k_given {
                k_weights = k_weights.scales(scales);
            }
            if let Some(scales) = v_given {
                v_weights = v_weights.scales(scales);
            }
            if let Some(scales) = k_written {
                step = step.k_scales(scales);
            }
            if let Some(scales) = v_written {
                step = step.v_scales(scales);
            }
        }
        let step = step.k_weights(k_weights).v_weights(v_weights);
        match &self.qkv {
            CudaQkv::Stacked(_) => {
                let step = step
                    .buffer(projected.as_view_mut())
                    .q_to(q_to.as_view_mut());
                self.rotator.step(stream, &plan.step, step, Some(report))?;
            }
            CudaQkv::Separate { .. } => {
                let (k_at, v_at) = (tokens * q_dims, tokens * (q_dims + k_dims));
                let step = step
                    .q(InOut::OutOfPlace {
                        source: projected.slice(..k_at),
                        destination: q_to.as_view_mut(),
                    })
                    .k(Appended::ToCache(projected.slice(k_at..v_at)))
                    .v(Appended::ToCache(projected.slice(v_at..tokens * all_dims)));
                self.rotator.step(stream, &plan.step, step, Some(report))?;
            }
        }
        Ok(())
    }

    /// The layer after attention: the output projection of [`CudaWorkspace::attended_mut`] into `out`.
    ///
    /// # Errors
    /// Those of the projection.
    pub fn project_out(
        &self,
        stream: &CudaStream,
        plan: &CudaLayerPlan,
        workspace: &mut CudaWorkspace<T>,
        out: CudaViewMut<'_, T>,
    ) -> Result<(), AttentionError> {
        let CudaWorkspace {
            attended, bytes, ..
        } = workspace;
        let tokens = TokensInOut {
            tokens: plan.shape.tokens,
            x: attended.as_view(),
            out,
        };
        self.o.forward(stream, tokens, &mut bytes.as_view_mut())
    }
}
