//! The layer: projections, the fused step between them and the cache, attention, and the way out.

use crate::cache::Sequence;
use crate::error::agree;
use crate::{Attend, AttentionError, AttentionMask, KvCacheMut, Projection, RaggedBatch};
use phasor::{
    CacheLayout, Element, Host, HostRotator, HostStep, HostWeights, KvCacheLayout, Layout,
    Positions, Problem, Rope, Slots, Stages, Stored,
};
use std::sync::Arc;

/// The numbers of a layer.
///
/// ```
/// use phasor_attention::phasor::{Stages, norm::HeadNorm};
/// use phasor_attention::{AttentionConfig, AttentionMask};
///
/// // Gemma 3's local layers: QK-norm, a window of 512, and a scale of their own.
/// let norm = Stages::new().norm(HeadNorm::rms(1e-6).with_weight_offset(1.0));
/// let mut config = AttentionConfig::new(1152, 4, 1, 256);
/// config.scale = Some(1.0 / 256f32.sqrt());
/// config.mask = AttentionMask::SlidingWindow(512);
/// config.q_stages = norm;
/// config.k_stages = norm;
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct AttentionConfig {
    /// Elements of a token.
    pub hidden_size: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key-value heads, which divide the query heads: each serves a group of these.
    pub num_key_value_heads: usize,
    /// Dims of a head, of queries and keys.
    pub head_dim: usize,
    /// Dims of a head of values, usually as many.
    pub v_head_dim: usize,
    /// The first dim of a head that rotates: 128 in DeepSeek-V3, whose heads of 192 end with 64 that do.
    pub rotary_offset: usize,
    /// What scores are multiplied by; `None`: `1 / sqrt(head_dim)`. A rotation that has a scale for scores
    /// (DeepSeek's Yarn) is not asked for it.
    pub scale: Option<f32>,
    /// Which keys a token sees.
    pub mask: AttentionMask,
    /// `cap * tanh(score / cap)` in place of scores.
    pub logits_soft_cap: Option<f32>,
    /// A logit for each query head that takes part in the softmax and has no value.
    pub sinks: Option<Vec<f32>>,
    /// Bias, norm, scale of the queries, and whether they rotate.
    pub q_stages: Stages,
    /// Of the keys.
    pub k_stages: Stages,
    /// Of the values, which do not rotate.
    pub v_stages: Stages,
}

impl AttentionConfig {
    /// A causal layer without bias, norm, cap or sinks.
    pub fn new(
        hidden_size: usize,
        num_attention_heads: usize,
        num_key_value_heads: usize,
        head_dim: usize,
    ) -> Self {
        Self {
            hidden_size,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            v_head_dim: head_dim,
            rotary_offset: 0,
            scale: None,
            mask: AttentionMask::Causal,
            logits_soft_cap: None,
            sinks: None,
            q_stages: Stages::new(),
            k_stages: Stages::new(),
            v_stages: Stages::new(),
        }
    }

    /// Numbers that can be used, and projections (`[in_features, out_features]`) that fit them: q, k and v, or
    /// one of all three.
    pub(crate) fn check(&self, qkv: &[[usize; 2]], o: [usize; 2]) -> Result<(), AttentionError> {
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
        let (hidden_size, head_dim) = (self.hidden_size, self.head_dim);
        let v_head_dim = self.v_head_dim;
        self.attend().check(kv_heads)?;
        for (what, value) in [
            ("hidden_size", hidden_size),
            ("head_dim", head_dim),
            ("v_head_dim", v_head_dim),
        ] {
            if value == 0 {
                return Err(AttentionError::Value {
                    what,
                    value,
                    remedy: "it must be above 0",
                });
            }
        }
        let [q_dims, k_dims] = [heads, kv_heads].map(|heads| heads.saturating_mul(head_dim));
        let [o_dims, v_dims] = [heads, kv_heads].map(|heads| heads.saturating_mul(v_head_dim));
        let all_dims = q_dims.saturating_add(k_dims).saturating_add(v_dims);
        let sizes = |[into, out]: [&'static str; 2], got: [usize; 2], needed: [usize; 2]| {
            agree(into, needed[0], got[0])?;
            agree(out, needed[1], got[1])
        };
        match *qkv {
            [all] => {
                let what = "v_head_dim of stacked qkv, as head_dim";
                agree(what, head_dim, v_head_dim)?;
                let what = ["in_features of qkv", "out_features of qkv"];
                sizes(what, all, [hidden_size, all_dims])?;
            }
            _ => {
                let what = [
                    ["in_features of q", "out_features of q"],
                    ["in_features of k", "out_features of k"],
                    ["in_features of v", "out_features of v"],
                ];
                let dims = [q_dims, k_dims, v_dims];
                for ((what, &got), dims) in what.into_iter().zip(qkv).zip(dims) {
                    sizes(what, got, [hidden_size, dims])?;
                }
            }
        }
        let what = ["in_features of o", "out_features of o"];
        sizes(what, o, [o_dims, hidden_size])
    }

    pub(crate) fn attend(&self) -> Attend<'_> {
        Attend {
            heads: self.num_attention_heads,
            scale: self.scale.unwrap_or(1.0 / (self.head_dim as f32).sqrt()),
            mask: self.mask,
            logits_soft_cap: self.logits_soft_cap,
            sinks: self.sinks.as_deref(),
        }
    }
}

/// Queries, keys and values of a token.
#[derive(Clone)]
pub enum QkvProjection<T> {
    /// Each by a projection of its own.
    Separate {
        /// `[heads * head_dim, hidden_size]`.
        q: Arc<dyn Projection<T>>,
        /// `[kv_heads * head_dim, hidden_size]`.
        k: Arc<dyn Projection<T>>,
        /// `[kv_heads * v_head_dim, hidden_size]`.
        v: Arc<dyn Projection<T>>,
    },
    /// One of `[(heads + 2 * kv_heads) * head_dim, hidden_size]`: queries, then keys, then values, for
    /// grouped heads too.
    Stacked(Arc<dyn Projection<T>>),
}

/// What the stages of queries, keys or values need: `[heads, head_dim]` or, but for a bias, `[head_dim]`.
#[derive(Clone, Debug)]
pub struct HeadWeights<T> {
    /// What is added first, `[heads, head_dim]`.
    pub bias: Option<Vec<T>>,
    /// What normed values are multiplied by.
    pub norm: Option<Vec<T>>,
    /// What is added then.
    pub norm_bias: Option<Vec<T>>,
}

impl<T> Default for HeadWeights<T> {
    fn default() -> Self {
        Self {
            bias: None,
            norm: None,
            norm_bias: None,
        }
    }
}

impl<T: Element> HeadWeights<T> {
    fn of_step(&self) -> HostWeights<'_, T> {
        let mut weights = HostWeights::new();
        if let Some(bias) = &self.bias {
            weights = weights.bias(&bias[..]);
        }
        if let Some(norm) = &self.norm {
            weights = weights.norm(&norm[..]);
        }
        if let Some(bias) = &self.norm_bias {
            weights = weights.norm_bias(&bias[..]);
        }
        weights
    }
}

/// Memory that calls use between their steps, and keep for the next.
#[derive(Clone, Debug)]
pub struct Workspace<T> {
    /// Projections, one after the other or packed.
    projected: Vec<T>,
    q: Vec<T>,
    attended: Vec<T>,
}

impl<T> Default for Workspace<T> {
    fn default() -> Self {
        Self {
            projected: Vec::new(),
            q: Vec::new(),
            attended: Vec::new(),
        }
    }
}

/// An attention layer: projections, bias, norms, rotation, cache, attention, output projection.
///
/// A call rounds to the element type after the projections, after the fused step (which rounds once in
/// all, unless a norm asks for more), after attention, and after the output projection. Keys are cached
/// after norm and rotation, values as they were projected.
///
/// ```
/// use phasor_attention::phasor::{Frequencies, Host, Pairing, Rope};
/// use phasor_attention::{
///     AttentionConfig, AttentionLayer, DenseWeights, Linear, PagedKvCache, QkvProjection, RaggedBatch,
///     Workspace,
/// };
/// use std::sync::Arc;
///
/// # fn main() -> Result<(), phasor_attention::AttentionError> {
/// // 2 query heads and 1 key-value head of 8 dims.
/// let weight = |rows: usize| vec![0.01f32; rows * 16];
/// let qkv = DenseWeights::new(weight((2 + 2 * 1) * 8), 32, 16)?;
/// let o = DenseWeights::new(weight(16), 16, 16)?;
/// let rope = Rope::new(Frequencies::from_theta(10_000.0, 8)?, Pairing::HalfSplit);
/// let layer = AttentionLayer::new(
///     AttentionConfig::new(16, 2, 1, 8),
///     &Host::new(),
///     &rope,
///     QkvProjection::Stacked(Arc::new(Linear(qkv))),
///     Arc::new(Linear(o)),
/// )?;
///
/// // 4 pages of 16 slots, one layer; a prompt of 5 tokens, then one more token.
/// let mut cache = PagedKvCache::new(4, 1, 16, 1, 8)?;
/// let mut workspace = Workspace::default();
/// let page_table = [2, 0];
/// let (x, mut out) = (vec![1.0f32; 5 * 16], vec![0.0; 5 * 16]);
/// let prompt = RaggedBatch::new(&[0, 5], &[0], &page_table);
/// layer.forward(&x, &mut cache.layer(0)?, &prompt, &mut workspace, &mut out)?;
/// let next = RaggedBatch::new(&[0, 1], &[5], &page_table);
/// layer.forward(&x[..16], &mut cache.layer(0)?, &next, &mut workspace, &mut out[..16])?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct AttentionLayer<T> {
    config: AttentionConfig,
    host: Host,
    rotator: HostRotator,
    qkv: QkvProjection<T>,
    o: Arc<dyn Projection<T>>,
    /// Of q, k and v.
    weights: [HeadWeights<T>; 3],
}

impl<T: Element> AttentionLayer<T> {
    /// Checks that all parts fit each other.
    ///
    /// # Errors
    /// [`AttentionError::Heads`], [`AttentionError::Factor`], [`AttentionError::Value`] for a number that
    /// cannot be used; [`AttentionError::Mismatch`] for projections of other sizes;
    /// [`AttentionError::Step`] for a rotation that does not fit a head.
    pub fn new(
        config: AttentionConfig,
        host: &Host,
        rope: &Rope,
        qkv: QkvProjection<T>,
        o: Arc<dyn Projection<T>>,
    ) -> Result<Self, AttentionError> {
        let sizes = |projection: &Arc<dyn Projection<T>>| {
            [projection.in_features(), projection.out_features()]
        };
        match &qkv {
            QkvProjection::Separate { q, k, v } => {
                config.check(&[sizes(q), sizes(k), sizes(v)], sizes(&o))?;
            }
            QkvProjection::Stacked(qkv) => config.check(&[sizes(qkv)], sizes(&o))?,
        }
        let AttentionConfig {
            num_key_value_heads: kv_heads,
            head_dim,
            v_head_dim,
            ..
        } = config;
        let layer = Self {
            config,
            host: *host,
            rotator: host.rotator(rope),
            qkv,
            o,
            weights: Default::default(),
        };
        let slot = |dims| CacheLayout::paged_nhd(1, 1, kv_heads, dims);
        let slots = KvCacheLayout::separate(slot(head_dim), slot(v_head_dim));
        layer.rotator.plan(&layer.problem(1, slots))?;
        Ok(layer)
    }

    /// What the stages of queries, keys and values need, as far as their stages name it.
    pub fn with_head_weights(
        mut self,
        q: HeadWeights<T>,
        k: HeadWeights<T>,
        v: HeadWeights<T>,
    ) -> Self {
        self.weights = [q, k, v];
        self
    }

    /// The numbers of the layer.
    pub fn config(&self) -> &AttentionConfig {
        &self.config
    }

    /// The layer for new tokens: `x` and `out` are `[tokens, hidden_size]`. Their keys and values are put in
    /// the cache; the caller then counts them in its lengths.
    ///
    /// # Errors
    /// [`AttentionError`] where shapes disagree, a sequence does not fit its pages, or stages lack a weight;
    /// nothing is written then. (An engine's own output projection that fails has the cache written.)
    pub fn forward(
        &self,
        x: &[T],
        cache: &mut KvCacheMut<'_, T>,
        batch: &RaggedBatch<'_>,
        workspace: &mut Workspace<T>,
        out: &mut [T],
    ) -> Result<(), AttentionError> {
        let sequences = self.check(x, cache, batch, out)?;
        self.project_and_store(x, cache, batch, &sequences, workspace)?;
        let used = sequences.last().map_or(0, |last| last.first + last.new);
        let Workspace { q, attended, .. } = workspace;
        let dims = self.config.num_attention_heads * self.config.v_head_dim;
        attended.resize(x.len() / self.config.hidden_size * dims, T::default());
        self.config
            .attend()
            .run_checked(&self.host, q, cache.view(), batch, &sequences, attended);
        self.o.forward(
            &attended[..used * dims],
            &mut out[..used * self.config.hidden_size],
        )
    }

    /// Puts keys and values of new tokens in the cache, and nothing else: for a draft's cache.
    ///
    /// # Errors
    /// Those of [`forward`](Self::forward).
    pub fn store(
        &self,
        x: &[T],
        cache: &mut KvCacheMut<'_, T>,
        batch: &RaggedBatch<'_>,
        workspace: &mut Workspace<T>,
    ) -> Result<(), AttentionError> {
        let sequences = self.check(x, cache, batch, x)?;
        self.project_and_store(x, cache, batch, &sequences, workspace)
    }

    /// The step of so many tokens.
    fn problem(&self, tokens: usize, cache: KvCacheLayout) -> Problem {
        let AttentionConfig {
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            v_head_dim,
            rotary_offset,
            q_stages,
            k_stages,
            v_stages,
            ..
        } = self.config;
        let rotated = |layout: Layout| layout.with_rotary_offset(rotary_offset);
        let q_to = rotated(Layout::tokens(tokens, heads, head_dim));
        let k = rotated(Layout::tokens(tokens, kv_heads, head_dim));
        let v = Layout::tokens(tokens, kv_heads, v_head_dim);
        let problem = Problem::new(T::DTYPE);
        let problem = match self.qkv {
            QkvProjection::Separate { .. } => problem.q((q_to, q_to)).k_to_cache(k).v_to_cache(v),
            QkvProjection::Stacked(_) => {
                let all = heads + 2 * kv_heads;
                let window = |range| Layout::packed_heads(1, tokens, all, head_dim, range);
                let k = heads + kv_heads;
                problem
                    .q((rotated(window(0..heads)), q_to))
                    .k_to_cache(rotated(window(heads..k)))
                    .v_to_cache(window(k..all))
                    .packed()
            }
        };
        problem
            .q_stages(q_stages)
            .k_stages(k_stages)
            .v_stages(v_stages)
            .cache(cache)
    }

    /// What a call would refuse: shapes, and sequences that are not all in the cache.
    pub(crate) fn check(
        &self,
        x: &[T],
        cache: &KvCacheMut<'_, T>,
        batch: &RaggedBatch<'_>,
        out: &[T],
    ) -> Result<Vec<Sequence>, AttentionError> {
        let AttentionConfig {
            hidden_size,
            num_key_value_heads: kv_heads,
            head_dim,
            v_head_dim,
            ..
        } = self.config;
        let tokens = x.len() / hidden_size;
        agree("elements of x, whole tokens", tokens * hidden_size, x.len())?;
        agree(
            "elements of the output, as many as of x",
            x.len(),
            out.len(),
        )?;
        let [pages, page_size, cache_heads, cache_dim] = cache.shape();
        agree("heads of the cache", kv_heads, cache_heads)?;
        agree("head_dim of the cache", head_dim, cache_dim)?;
        agree(
            "head_dim of the values' cache",
            v_head_dim,
            cache.v_head_dim(),
        )?;
        batch.check(tokens, [pages, page_size])
    }

    fn project_and_store(
        &self,
        x: &[T],
        cache: &mut KvCacheMut<'_, T>,
        batch: &RaggedBatch<'_>,
        sequences: &[Sequence],
        workspace: &mut Workspace<T>,
    ) -> Result<(), AttentionError> {
        let AttentionConfig {
            hidden_size,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            v_head_dim,
            ..
        } = self.config;
        let tokens = x.len() / hidden_size;
        let used = sequences.last().map_or(0, |last| last.first + last.new);
        let [q_dims, k_dims, v_dims] =
            [heads * head_dim, kv_heads * head_dim, kv_heads * v_head_dim];
        let all_dims = q_dims + k_dims + v_dims;
        let Workspace { projected, q, .. } = workspace;
        q.resize(tokens * q_dims, T::default());
        projected.resize(tokens * all_dims, T::default());
        if used == 0 {
            return Ok(());
        }
        let x = &x[..used * hidden_size];

        let rows = sequences
            .iter()
            .map(|s| {
                self.rotator
                    .rope()
                    .row_for_length((s.cached + s.new) as u64)
            })
            .collect::<Result<Option<Vec<u32>>, _>>()?;
        let mut positions = match batch.position_ids {
            None => Positions::start_per_sequence(batch.cache_lengths),
            Some(ids) if ids.len() == tokens => Positions::per_token(ids),
            Some(ids) => Positions::per_axis(ids),
        }
        .cu_seqlens(batch.cu_seqlens);
        if let Some(rows) = &rows {
            positions = positions.frequency_rows_per_sequence(rows);
        }
        let problem = self.problem(tokens, cache.layout());
        let [q_weights, k_weights, v_weights] = self.weights.each_ref().map(HeadWeights::of_step);
        let step = HostStep::new(positions)
            .q_weights(q_weights)
            .slots(Slots::page_table(batch.page_table, batch.cache_lengths));
        let step = cache.give_to(step, [k_weights, v_weights]);
        let step = match &self.qkv {
            QkvProjection::Stacked(qkv) => {
                qkv.forward(x, &mut projected[..used * all_dims])?;
                step.buffer(&mut projected[..]).q_to(&mut q[..])
            }
            QkvProjection::Separate {
                q: q_proj,
                k: k_proj,
                v: v_proj,
            } => {
                let (q_from, kv) = projected.split_at_mut(tokens * q_dims);
                let (k, v) = kv.split_at_mut(tokens * k_dims);
                q_proj.forward(x, &mut q_from[..used * q_dims])?;
                k_proj.forward(x, &mut k[..used * k_dims])?;
                v_proj.forward(x, &mut v[..used * v_dims])?;
                step.q((&*q_from, &mut q[..])).k(&*k).v(&*v)
            }
        };
        let plan = self.rotator.plan(&problem)?;
        let stored = self.rotator.step(&plan, step)?;
        debug_assert_eq!(stored, Stored::All, "the batch was checked");
        Ok(())
    }
}
