//! The attention layers of Modular's MAX (`max.nn.attention.attention_with_rope`), with its names,
//! parameters and defaults, over [`AttentionLayer`]. Those of 26.7 are here, and of 25.7 what 26.7 left out.
//!
//! | class | what it is here |
//! |---|---|
//! | [`AttentionWithRope`] | dense weights of f32, f16 or bf16; e4m3 with static scales, scales of tokens or of blocks |
//! | [`AttentionWithRopeNoOpaque`] | the same (25.7), without bias, clip, norm or mask |
//! | [`GGUFQAttentionWithRope`] | [`GgmlWeights`], each matrix in a form of its own; f32 |
//! | [`GPTQAttentionWithRope`] | [`GptqWeights`] |
//! | [`TensorParallelAttentionWithRope`] | [`TensorParallelAttention`] in this process |
//! | [`DataParallelAttentionWithRope`] | [`DataParallelAttention`] in this process |
//!
//! A constructor takes what MAX's takes, and the weights under the names that MAX loads them by. `devices`
//! is left out, and `linear_cls`; a layer of other linear maps is an [`AttentionLayer`]. A `float8_config`
//! (`quant_config` in 26.7) has a constructor of its own, [`AttentionWithRope::new_float8`].
//!
//! # Where it differs, on purpose
//!
//! | MAX | here |
//! |---|---|
//! | rotates by a table `freqs_cis` in the activations' type: in bf16 that costs 2e-3 | exact angles of the given [`Rope`]; for MAX's own table, give a `Rope` of a [`CosSinTable`](phasor::CosSinTable) |
//! | rounds after a bias, and after a norm, and after the rotation | rounds once, after the rotation |
//! | NoOpaque rotates interleaved pairs, whatever the rope says, and its attention is not implemented | the rope's pairing, and attention |
//! | the float8 path of 25.7 drops the bias | a bias is a stage of the layer |
//! | stacked float8 is refused where scales are static, and fails in `qkv_weight_scale` where not | it works, and has all properties |
//! | float8 weights with a scale of the tensor and dynamic activations: documented, refused by the kernel of 25.7 | they work; `qkv_weight_scale` is that of 26.7, a scale for each row |
//! | float8 results are bf16, whatever comes in | the layer's type |
//! | sharded float8 slices the block scales of o by elements | devices have whole blocks of it, or an error |
//! | stacked qkv has no bias in 25.7; in 26.7 it has, but for its `wqkv_bias`, which fails | it has one, there too |
//! | stacked qkv is sharded only without groups | with groups too |
//! | rows that devices do not divide are spread unevenly, and heads then are not | an error |
//! | Q5_K is a GGUF encoding that no kernel knows | it works, and Q8_0 too |
//! | GPTQ: groups of 128, symmetric, one permutation for q, k and v, scales cut to bf16 | any group, zero points, each matrix' own `g_idx`, exact scales |
//! | GGUF: activations are rounded to 8 bits | they are not; [`GgmlLinear`](crate::GgmlLinear) does as MAX does |
//! | `scale` ignores a rope's own | it does here too: give `scale` (see `RotaryEmbedding::compute_scale` in `phasor::interfaces::max`) |
//!
//! # What it is held to
//!
//! Results of MAX 26.7 on a CPU, in f32, of a second layer of the cache, prompts and decoding of several
//! sequences over the edges of pages: dense weights (separate, stacked, with bias, QK-norm, clipped with a
//! scale, interleaved, a window, data parallel), within 1e-6 of the largest result (2e-7 to 3e-7 were
//! measured); GGUF weights Q4_0, Q4_K and Q6_K, interleaved and half-split, within 1e-6 by
//! [`GgmlLinear`](crate::GgmlLinear), and within 1e-2 (5e-3 to 8e-3 were measured) without its rounding of
//! activations. All else is by MAX's source: of float8 and GPTQ it has no CPU kernel, it refuses tensor
//! parallel on a CPU, windows of fewer than 128 tokens do not compile for one ("SIMD width of sliding window
//! mask must be <= window size"), and its NoOpaque has no attention.

use crate::error::agree;
use crate::{
    AttentionConfig, AttentionError, AttentionLayer, AttentionMask, DataParallelAttention,
    DenseWeights, DeviceBatch, GgmlType, GgmlWeights, GptqFormat, GptqTensors, GptqWeights,
    HeadWeights, KvCacheMut, LayerWeights, LocalCollective, RaggedBatch, ShardingStrategy,
    TensorParallelAttention, Weights, WindowOfWeights, Workspace,
};
use phasor::norm::HeadNorm;
use phasor::{CacheLayout, Element, Host, Rope, Stages};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

mod float8;

pub use float8::{
    Float8Config, Float8InputScaleSpec, Float8ScaleGranularity, Float8ScaleOrigin, Float8Tensors,
    Float8WeightScaleSpec,
};

/// What a cache of keys and values is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KVCacheParams {
    /// Key-value heads.
    pub n_kv_heads: usize,
    /// Dims of a head.
    pub head_dim: usize,
    /// Slots of a page; 128 unless set.
    pub page_size: usize,
}

impl KVCacheParams {
    /// Pages of 128 slots.
    pub const fn new(n_kv_heads: usize, head_dim: usize) -> Self {
        Self {
            n_kv_heads,
            head_dim,
            page_size: 128,
        }
    }
}

/// Which keys a token sees; windows and chunks are of `sliding_window` tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MHAMaskVariant {
    /// Itself and all before.
    #[default]
    CausalMask,
    /// All of its sequence.
    NullMask,
    /// Those before it in its chunk, and itself.
    ChunkedCausalMask,
    /// Itself and `sliding_window - 1` before.
    SlidingWindowCausalMask,
}

/// The cache of a call: `PagedCacheValues`, or `PagedKVCacheTensorsNoOpaque`.
pub struct PagedCacheValues<'a, T> {
    /// `[pages, 2, layers, page_size, kv_heads, head_dim]`.
    pub kv_blocks: &'a mut [T],
    /// That shape.
    pub shape: [usize; 6],
    /// Tokens in the cache before the call, `[sequences]`.
    pub cache_lengths: &'a [u32],
    /// Pages of each sequence, `[sequences, pages of a sequence]`.
    pub lookup_table: &'a [u32],
}

impl<T: Element> PagedCacheValues<'_, T> {
    /// The cache of a layer, and the sequences of a call.
    fn of_call<'b>(
        &'b mut self,
        layer_idx: u32,
        params: &KVCacheParams,
        input_row_offsets: &'b [u32],
    ) -> Result<(KvCacheMut<'b, T>, RaggedBatch<'b>), AttentionError> {
        let [pages, two, layers, page_size, heads, head_dim] = self.shape;
        agree("the second dim of kv_blocks", 2, two)?;
        agree("page_size of kv_blocks", params.page_size, page_size)?;
        let layer = layer_idx as usize;
        if layer >= layers {
            return Err(AttentionError::Value {
                what: "layer_idx",
                value: layer,
                remedy: "it must be below the layers of kv_blocks",
            });
        }
        let layout = CacheLayout::paged_nhd(pages, page_size, heads, head_dim);
        let layouts = layout.of_layer(layers, layer).in_pairs_of_pages();
        let cache = KvCacheMut::one_buffer(layouts, self.kv_blocks)?;
        let batch = RaggedBatch::new(input_row_offsets, self.cache_lengths, self.lookup_table);
        Ok((cache, batch))
    }
}

/// What a layer of MAX is made from. [`new`](Self::new) has its defaults.
#[derive(Clone, Copy, Debug)]
pub struct Arguments<'a> {
    /// The rotation: that of `phasor::interfaces::max::RotaryEmbedding::rope`, say.
    pub rope: &'a Rope,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key-value heads.
    pub num_key_value_heads: usize,
    /// Elements of a token.
    pub hidden_size: usize,
    /// What the cache is like.
    pub kv_params: KVCacheParams,
    /// Whether q, k and v are one weight, `qkv_proj.weight`.
    pub stacked_qkv: bool,
    /// What scores are multiplied by; `None`: `sqrt(1 / head_dim)`.
    pub scale: Option<f64>,
    /// Whether q, k and v have a bias; o never has.
    pub has_bias: bool,
    /// Clamps the weights of q, k and v; `None` and 0 do not.
    pub clip_qkv: Option<f32>,
    /// Whether heads of q and k are normed, by `q_norm.weight` and `k_norm.weight`.
    pub use_qk_norm: bool,
    /// Added to a norm's mean square.
    pub rms_norm_eps: f32,
    /// Which keys a token sees.
    pub mask_variant: MHAMaskVariant,
    /// Of windows and chunks.
    pub sliding_window: Option<usize>,
    /// How [`AttentionWithRope::shard`] spreads the layer.
    pub sharding_strategy: Option<ShardingStrategy>,
}

impl<'a> Arguments<'a> {
    /// MAX's defaults for all others.
    pub const fn new(
        rope: &'a Rope,
        num_attention_heads: usize,
        num_key_value_heads: usize,
        hidden_size: usize,
        kv_params: KVCacheParams,
    ) -> Self {
        Self {
            rope,
            num_attention_heads,
            num_key_value_heads,
            hidden_size,
            kv_params,
            stacked_qkv: false,
            scale: None,
            has_bias: false,
            clip_qkv: None,
            use_qk_norm: false,
            rms_norm_eps: 1e-6,
            mask_variant: MHAMaskVariant::CausalMask,
            sliding_window: None,
            sharding_strategy: None,
        }
    }

    fn config(&self) -> Result<AttentionConfig, AttentionError> {
        let mut config = AttentionConfig::new(
            self.hidden_size,
            self.num_attention_heads,
            self.num_key_value_heads,
            self.kv_params.head_dim,
        );
        config.scale = self.scale.map(|scale| scale as f32);
        let window = self.sliding_window.ok_or(AttentionError::Value {
            what: "sliding_window",
            value: 0,
            remedy: "this mask_variant needs one",
        });
        config.mask = match self.mask_variant {
            MHAMaskVariant::CausalMask => AttentionMask::Causal,
            MHAMaskVariant::NullMask => AttentionMask::None,
            MHAMaskVariant::ChunkedCausalMask => AttentionMask::Chunked(window?),
            MHAMaskVariant::SlidingWindowCausalMask => AttentionMask::SlidingWindow(window?),
        };
        let mut stages = Stages::new();
        if self.has_bias {
            stages = stages.bias();
            config.v_stages = stages;
        }
        if self.use_qk_norm {
            stages = stages.norm(HeadNorm::rms(self.rms_norm_eps));
        }
        (config.q_stages, config.k_stages) = (stages, stages);
        Ok(config)
    }

    /// Rows of q, and of k or v.
    fn dims(&self) -> [usize; 2] {
        let dim = self.kv_params.head_dim;
        [self.num_attention_heads, self.num_key_value_heads].map(|heads| heads.saturating_mul(dim))
    }

    /// Rows of q, k and v in a stacked weight.
    fn rows(&self) -> [Range<usize>; 3] {
        let [q, kv] = self.dims();
        let of_k = q.saturating_add(kv);
        [0..q, q..of_k, of_k..of_k.saturating_add(kv)]
    }

    fn clip(&self) -> Option<f32> {
        self.clip_qkv.filter(|&clip| clip != 0.0)
    }

    /// Biases, and weights of norms.
    fn heads<T: Element>(
        &self,
        state: &StateDict<Vec<T>>,
    ) -> Result<[HeadWeights<T>; 3], AttentionError> {
        let mut heads: [HeadWeights<T>; 3] = Default::default();
        if self.has_bias && self.stacked_qkv {
            let (bias, rows) = (take(state, "qkv_proj.bias")?, self.rows());
            agree("elements of qkv_proj.bias", rows[2].end, bias.len())?;
            for (heads, rows) in heads.iter_mut().zip(rows) {
                heads.bias = Some(bias[rows].to_vec());
            }
        } else if self.has_bias {
            for (heads, name) in heads.iter_mut().zip(["q", "k", "v"]) {
                heads.bias = Some(take(state, &format!("{name}_proj.bias"))?);
            }
        }
        if self.use_qk_norm {
            for (heads, name) in heads.iter_mut().zip(["q", "k"]) {
                heads.norm = Some(take(state, &format!("{name}_norm.weight"))?);
            }
        }
        Ok(heads)
    }
}

/// Weights by their names.
pub type StateDict<W> = HashMap<String, W>;

fn take<W: Clone>(state: &StateDict<W>, name: &str) -> Result<W, AttentionError> {
    state
        .get(name)
        .cloned()
        .ok_or_else(|| AttentionError::NoWeight { name: name.into() })
}

/// MAX's `AttentionWithRope`.
///
/// ```
/// use phasor_attention::max::{Arguments, AttentionWithRope, KVCacheParams, PagedCacheValues};
/// use phasor_attention::phasor::{Frequencies, Host, Pairing, Rope};
///
/// # fn main() -> Result<(), phasor_attention::AttentionError> {
/// let rope = Rope::new(Frequencies::from_theta(10_000.0, 8)?, Pairing::Interleaved);
/// let kv_params = KVCacheParams::new(1, 8);
/// let mut arguments = Arguments::new(&rope, 2, 1, 16, kv_params);
/// arguments.stacked_qkv = true;
/// let weights = [("qkv_proj.weight", (2 + 1 + 1) * 8 * 16), ("o_proj.weight", 16 * 16)];
/// let weights = weights.map(|(name, len)| (name.to_string(), vec![0.01f32; len]));
/// let layer = AttentionWithRope::new(&arguments, &weights.into(), &Host::new())?;
///
/// let mut blocks = vec![0.0; 2 * 2 * 1 * 128 * 8];
/// let mut cache = PagedCacheValues {
///     kv_blocks: &mut blocks,
///     shape: [2, 2, 1, 128, 1, 8],
///     cache_lengths: &[0],
///     lookup_table: &[1],
/// };
/// let mut out = vec![0.0; 5 * 16];
/// layer.call(0, &vec![1.0; 5 * 16], &mut cache, &[0, 5], &mut out)?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct AttentionWithRope<T> {
    config: AttentionConfig,
    kv_params: KVCacheParams,
    rope: Rope,
    host: Host,
    weights: LayerWeights<T>,
    sharding_strategy: Option<ShardingStrategy>,
    float8: Option<float8::Scales>,
    layer: AttentionLayer<T>,
}

impl<T: Element> AttentionWithRope<T> {
    /// Weights are `q_proj.weight`, `k_proj.weight`, `v_proj.weight`, or `qkv_proj.weight`, and
    /// `o_proj.weight`; biases `q_proj.bias` and so on, or `qkv_proj.bias`; `q_norm.weight` and
    /// `k_norm.weight`.
    ///
    /// # Errors
    /// [`AttentionError::NoWeight`]; [`AttentionError::Weights`] for clip_qkv with stacked_qkv, as in MAX;
    /// those of [`AttentionLayer::new`].
    pub fn new(
        arguments: &Arguments<'_>,
        state: &StateDict<Vec<T>>,
        host: &Host,
    ) -> Result<Self, AttentionError> {
        let [q_dims, kv_dims] = arguments.dims();
        let hidden = arguments.hidden_size;
        let dense = |name: &str, rows, columns| {
            DenseWeights::new(take(state, &format!("{name}_proj.weight"))?, rows, columns)
        };
        let rows = arguments.rows();
        let all_dims = rows[2].end;
        let [q, k, v]: [Arc<dyn Weights>; 3] = if arguments.stacked_qkv {
            if arguments.clip().is_some() {
                return Err(AttentionError::Weights {
                    what: "clip_qkv",
                    remedy: "it is not for stacked_qkv: clamp the weight itself",
                });
            }
            let all = Arc::new(dense("qkv", all_dims, hidden)?);
            let part = |rows| WindowOfWeights::new(all.clone(), rows, 0..hidden).map(Arc::new);
            let [q, k, v] = rows.map(part);
            [q?, k?, v?]
        } else {
            let clipped = |name, rows| {
                let weights = dense(name, rows, hidden)?;
                Ok::<_, AttentionError>(Arc::new(match arguments.clip() {
                    Some(clip) => weights.clip(clip)?,
                    None => weights,
                }))
            };
            [
                clipped("q", q_dims)?,
                clipped("k", kv_dims)?,
                clipped("v", kv_dims)?,
            ]
        };
        let o = Arc::new(dense("o", hidden, q_dims)?);
        let weights = LayerWeights {
            q,
            k,
            v,
            o,
            heads: arguments.heads(state)?,
            activations: [None; 4],
        };
        Self::of(arguments, weights, host)
    }

    /// Of quantised matrices alone, which `matrix` makes by name, outputs and inputs.
    fn of_matrices<W: Weights + 'static>(
        arguments: &Arguments<'_>,
        host: &Host,
        matrix: impl Fn(&str, usize, usize) -> Result<W, AttentionError>,
    ) -> Result<Self, AttentionError> {
        refuse_options(arguments)?;
        let [q_dims, kv_dims] = arguments.dims();
        let hidden = arguments.hidden_size;
        let weights = LayerWeights {
            q: Arc::new(matrix("q", q_dims, hidden)?),
            k: Arc::new(matrix("k", kv_dims, hidden)?),
            v: Arc::new(matrix("v", kv_dims, hidden)?),
            o: Arc::new(matrix("o", hidden, q_dims)?),
            heads: Default::default(),
            activations: [None; 4],
        };
        Self::of(arguments, weights, host)
    }

    fn of(
        arguments: &Arguments<'_>,
        weights: LayerWeights<T>,
        host: &Host,
    ) -> Result<Self, AttentionError> {
        let config = arguments.config()?;
        Ok(Self {
            layer: weights.layer(config.clone(), host, arguments.rope)?,
            config,
            kv_params: arguments.kv_params,
            rope: arguments.rope.clone(),
            host: *host,
            weights,
            sharding_strategy: arguments.sharding_strategy,
            float8: None,
        })
    }

    /// `x` and `out` are `[tokens, hidden_size]`; sequence `s` has the tokens from `input_row_offsets[s]`
    /// on. The caller advances `cache_lengths`.
    ///
    /// # Errors
    /// Those of [`AttentionLayer::forward`]; nothing is written then.
    pub fn call(
        &self,
        layer_idx: u32,
        x: &[T],
        kv_collection: &mut PagedCacheValues<'_, T>,
        input_row_offsets: &[u32],
        out: &mut [T],
    ) -> Result<(), AttentionError> {
        let (mut cache, batch) =
            kv_collection.of_call(layer_idx, &self.kv_params, input_row_offsets)?;
        self.layer
            .forward(x, &mut cache, &batch, &mut Workspace::default(), out)
    }

    /// Puts keys and values of `hidden` in the cache, for drafts.
    ///
    /// # Errors
    /// Those of [`AttentionLayer::store`].
    pub fn materialize_kv_from_hidden(
        &self,
        layer_idx: u32,
        hidden: &[T],
        kv_collection: &mut PagedCacheValues<'_, T>,
        input_row_offsets: &[u32],
    ) -> Result<(), AttentionError> {
        let (mut cache, batch) =
            kv_collection.of_call(layer_idx, &self.kv_params, input_row_offsets)?;
        self.layer
            .store(hidden, &mut cache, &batch, &mut Workspace::default())
    }

    /// The values of q's, k's and v's weights, clamped, one below the other:
    /// `[(heads + 2 kv_heads) head_dim, hidden_size]`.
    pub fn wqkv(&self) -> Vec<f32> {
        let mut values = Vec::new();
        for weights in [&self.weights.q, &self.weights.k, &self.weights.v] {
            let (rows, first) = (weights.out_features(), values.len());
            values.resize(first + rows * weights.in_features(), 0.0);
            weights.read(0..rows, &mut values[first..]);
        }
        values
    }

    /// The three biases, one after the other, if there are some.
    pub fn wqkv_bias(&self) -> Option<Vec<T>> {
        let biases = self
            .weights
            .heads
            .each_ref()
            .map(|heads| heads.bias.as_deref());
        biases
            .into_iter()
            .collect::<Option<Vec<_>>>()
            .map(|biases| biases.concat())
    }

    /// How [`shard`](Self::shard) spreads the layer.
    pub fn sharding_strategy(&self) -> Option<ShardingStrategy> {
        self.sharding_strategy
    }

    /// Sets it.
    pub fn set_sharding_strategy(&mut self, strategy: ShardingStrategy) {
        self.sharding_strategy = Some(strategy);
    }

    /// The part of each device. (What they return is to be summed, if the strategy is tensor parallel.)
    ///
    /// # Errors
    /// [`AttentionError::Weights`] without a strategy; those of [`LayerWeights::shard`].
    pub fn shard(&self) -> Result<Vec<Self>, AttentionError> {
        let Some(strategy) = self.sharding_strategy else {
            return Err(AttentionError::Weights {
                what: "sharding_strategy",
                remedy: "there is none: set it first",
            });
        };
        let shards = self.weights.shard(&self.config, strategy)?.into_iter();
        let of = |(device, (config, weights)): (usize, (AttentionConfig, LayerWeights<T>))| {
            let kv_params = KVCacheParams {
                n_kv_heads: config.num_key_value_heads,
                ..self.kv_params
            };
            Ok(Self {
                layer: weights.layer(config.clone(), &self.host, &self.rope)?,
                config,
                kv_params,
                weights,
                rope: self.rope.clone(),
                host: self.host,
                sharding_strategy: None,
                float8: match (&self.float8, strategy) {
                    (Some(scales), ShardingStrategy::TensorParallel(devices)) => {
                        Some(scales.of_device(device, devices)?)
                    }
                    (scales, _) => scales.clone(),
                },
            })
        };
        shards.enumerate().map(of).collect()
    }

    /// The layer beneath.
    pub fn layer(&self) -> &AttentionLayer<T> {
        &self.layer
    }
}

/// MAX's `TensorParallelAttentionWithRope`, over devices of this process.
pub struct TensorParallelAttentionWithRope<T> {
    layer: TensorParallelAttention<T>,
    kv_params: KVCacheParams,
}

impl<T: Element> TensorParallelAttentionWithRope<T> {
    /// Spreads a layer over devices.
    ///
    /// # Errors
    /// Those of [`LayerWeights::shard`].
    pub fn new(whole: &AttentionWithRope<T>, devices: usize) -> Result<Self, AttentionError> {
        let AttentionWithRope {
            config,
            weights,
            host,
            rope,
            ..
        } = whole;
        let layer =
            TensorParallelAttention::new(config, weights, devices, host, rope, LocalCollective)?;
        Ok(Self {
            layer,
            kv_params: whole.kv_params,
        })
    }

    /// Every device sees the same `x`, has a cache of its own heads and an output, and gets the same
    /// result.
    ///
    /// # Errors
    /// Those of [`TensorParallelAttention::forward`].
    pub fn call(
        &self,
        layer_idx: u32,
        x: &[T],
        kv_collections: &mut [PagedCacheValues<'_, T>],
        input_row_offsets: &[u32],
        outs: &mut [&mut [T]],
    ) -> Result<(), AttentionError> {
        let Some(first) = kv_collections.first() else {
            return agree("caches, one a device", self.layer.shards().len(), 0);
        };
        let (lengths, pages) = (first.cache_lengths, first.lookup_table);
        let batch = RaggedBatch::new(input_row_offsets, lengths, pages);
        let mut caches = Vec::with_capacity(kv_collections.len());
        for cache in kv_collections {
            if cache.cache_lengths != lengths || cache.lookup_table != pages {
                return Err(AttentionError::Weights {
                    what: "kv_collections",
                    remedy: "give all devices the same cache_lengths and lookup_table",
                });
            }
            caches.push(
                cache
                    .of_call(layer_idx, &self.kv_params, input_row_offsets)?
                    .0,
            );
        }
        self.layer
            .forward(x, &mut caches, &batch, &mut Workspace::default(), outs)
    }
}

/// MAX's `DataParallelAttentionWithRope`, over devices of this process.
pub struct DataParallelAttentionWithRope<T> {
    layer: DataParallelAttention<T>,
    kv_params: KVCacheParams,
}

impl<T: Element> DataParallelAttentionWithRope<T> {
    /// A layer that each device has whole.
    ///
    /// # Errors
    /// [`AttentionError::Value`] for no devices.
    pub fn new(whole: &AttentionWithRope<T>, devices: usize) -> Result<Self, AttentionError> {
        Ok(Self {
            layer: DataParallelAttention::new(&whole.layer, devices)?,
            kv_params: whole.kv_params,
        })
    }

    /// Every device has tokens, a cache and sequences of its own, whose offsets begin at 0. One without
    /// tokens does nothing.
    ///
    /// # Errors
    /// [`AttentionError::Mismatch`] unless there are as many of each as devices; those of
    /// [`DataParallelAttention::forward`]. Nothing is written then.
    pub fn call(
        &self,
        layer_idx: u32,
        xs: &[&[T]],
        kv_collections: &mut [PagedCacheValues<'_, T>],
        input_row_offsets: &[&[u32]],
        outs: &mut [&mut [T]],
    ) -> Result<(), AttentionError> {
        let devices = self.layer.devices();
        agree("xs, one a device", devices, xs.len())?;
        agree(
            "kv_collections, one a device",
            devices,
            kv_collections.len(),
        )?;
        let offsets = input_row_offsets.len();
        agree("input_row_offsets, one a device", devices, offsets)?;
        agree("outs, one a device", devices, outs.len())?;
        let of_device = |(cache, offsets)| -> Result<_, AttentionError> {
            let cache: &mut PagedCacheValues<'_, T> = cache;
            cache.of_call(layer_idx, &self.kv_params, offsets)
        };
        let calls = kv_collections
            .iter_mut()
            .zip(input_row_offsets.iter().copied());
        let mut calls = calls.map(of_device).collect::<Result<Vec<_>, _>>()?;
        let calls = calls.iter_mut().zip(xs).zip(outs);
        let mut batches: Vec<_> = calls
            .map(|(((cache, batch), x), out)| DeviceBatch {
                x,
                cache,
                batch: *batch,
                out,
            })
            .collect();
        self.layer.forward(&mut batches, &mut Workspace::default())
    }
}

/// MAX's `distribute_value` (25.7): a copy for each device.
pub fn distribute_value<V: Clone>(value: &V, devices: usize) -> Vec<V> {
    vec![value.clone(); devices]
}

/// What MAX's other classes have no parameter for, or refuse.
fn refuse_options(arguments: &Arguments<'_>) -> Result<(), AttentionError> {
    for (what, given) in [
        ("clip_qkv", arguments.clip_qkv.is_some()),
        ("has_bias", arguments.has_bias),
        ("stacked_qkv", arguments.stacked_qkv),
        ("use_qk_norm", arguments.use_qk_norm),
    ] {
        if given {
            return Err(AttentionError::Weights {
                what,
                remedy: "this class does not support it: make an AttentionLayer",
            });
        }
    }
    Ok(())
}

/// MAX's `AttentionWithRopeNoOpaque` (25.7). Its pairing is the rope's, and it has an attention.
#[derive(Clone)]
pub struct AttentionWithRopeNoOpaque<T>(AttentionWithRope<T>);

impl<T: Element> AttentionWithRopeNoOpaque<T> {
    /// Weights are those of [`AttentionWithRope::new`].
    ///
    /// # Errors
    /// [`AttentionError::Mismatch`] unless the cache has as many key-value heads as the layer;
    /// [`AttentionError::Weights`] for has_bias, clip_qkv, stacked_qkv and use_qk_norm; those of
    /// [`AttentionWithRope::new`].
    pub fn new(
        arguments: &Arguments<'_>,
        state: &StateDict<Vec<T>>,
        host: &Host,
    ) -> Result<Self, AttentionError> {
        refuse_options(arguments)?;
        let of_cache = arguments.kv_params.n_kv_heads;
        agree(
            "num_key_value_heads, those of kv_params",
            of_cache,
            arguments.num_key_value_heads,
        )?;
        AttentionWithRope::new(arguments, state, host).map(Self)
    }

    /// [`AttentionWithRope::call`].
    ///
    /// # Errors
    /// Those.
    pub fn call(
        &self,
        layer_idx: u32,
        x: &[T],
        kv_collection: &mut PagedCacheValues<'_, T>,
        input_row_offsets: &[u32],
        out: &mut [T],
    ) -> Result<(), AttentionError> {
        self.0
            .call(layer_idx, x, kv_collection, input_row_offsets, out)
    }
}

/// MAX's `GGUFQAttentionWithRope`.
#[derive(Clone)]
pub struct GGUFQAttentionWithRope(AttentionWithRope<f32>);

impl GGUFQAttentionWithRope {
    /// Weights are the bytes of `q_proj.weight`, `k_proj.weight`, `v_proj.weight` and `o_proj.weight`, each
    /// in an encoding of its own.
    ///
    /// # Errors
    /// [`AttentionError::Weights`] for has_bias, clip_qkv, stacked_qkv and use_qk_norm, which MAX refuses
    /// or lacks here; [`AttentionError::NoWeight`]; those of [`GgmlWeights::new`] and
    /// [`AttentionLayer::new`].
    pub fn new(
        arguments: &Arguments<'_>,
        state: &StateDict<(GgmlType, Vec<u8>)>,
        host: &Host,
    ) -> Result<Self, AttentionError> {
        AttentionWithRope::of_matrices(arguments, host, |name, rows, columns| {
            let (encoding, bytes) = take(state, &format!("{name}_proj.weight"))?;
            GgmlWeights::new(encoding, bytes, rows, columns)
        })
        .map(Self)
    }

    /// [`AttentionWithRope::call`].
    ///
    /// # Errors
    /// Those.
    pub fn call(
        &self,
        layer_idx: u32,
        x: &[f32],
        kv_collection: &mut PagedCacheValues<'_, f32>,
        input_row_offsets: &[u32],
        out: &mut [f32],
    ) -> Result<(), AttentionError> {
        self.0
            .call(layer_idx, x, kv_collection, input_row_offsets, out)
    }
}

/// How a GPTQ checkpoint was quantised: its `quantization_config`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuantizationConfig {
    /// `gptq`.
    pub quant_method: String,
    /// 4.
    pub bits: usize,
    /// Inputs of a group; `None` is -1 in the file.
    pub group_size: Option<usize>,
    /// Whether a matrix has a `g_idx`. What the tensors have counts.
    pub desc_act: bool,
    /// Whether all zero points are 8. What the tensors have counts.
    pub sym: bool,
    /// `checkpoint_format`: `gptq` or `gptq_v2`.
    pub format: GptqFormat,
}

/// MAX's `GPTQAttentionWithRope`. `T` is bf16 there.
#[derive(Clone)]
pub struct GPTQAttentionWithRope<T>(AttentionWithRope<T>);

impl<T: Element> GPTQAttentionWithRope<T> {
    /// Tensors are those of `q_proj`, `k_proj`, `v_proj` and `o_proj`.
    ///
    /// # Errors
    /// [`AttentionError::Weights`] for another method, or more than these; [`AttentionError::Value`] for
    /// other bits; [`AttentionError::NoWeight`]; those of [`GptqWeights::new`] and [`AttentionLayer::new`].
    pub fn new(
        quantization_config: &QuantizationConfig,
        arguments: &Arguments<'_>,
        state: &StateDict<GptqTensors>,
        host: &Host,
    ) -> Result<Self, AttentionError> {
        if quantization_config.quant_method != "gptq" {
            return Err(AttentionError::Weights {
                what: "quant_method",
                remedy: "only gptq is supported",
            });
        }
        if quantization_config.bits != 4 {
            return Err(AttentionError::Value {
                what: "bits",
                value: quantization_config.bits,
                remedy: "only 4 are supported",
            });
        }
        let QuantizationConfig {
            group_size, format, ..
        } = *quantization_config;
        AttentionWithRope::of_matrices(arguments, host, |name, rows, columns| {
            let tensors = take(state, &format!("{name}_proj"))?;
            GptqWeights::new(tensors, format, group_size, rows, columns)
        })
        .map(Self)
    }

    /// [`AttentionWithRope::call`].
    ///
    /// # Errors
    /// Those.
    pub fn call(
        &self,
        layer_idx: u32,
        x: &[T],
        kv_collection: &mut PagedCacheValues<'_, T>,
        input_row_offsets: &[u32],
        out: &mut [T],
    ) -> Result<(), AttentionError> {
        self.0
            .call(layer_idx, x, kv_collection, input_row_offsets, out)
    }
}
