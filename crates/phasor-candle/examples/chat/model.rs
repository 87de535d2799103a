//! A model of the llama architecture out of a GGUF file. Where it rotates is in [`Rotation`], and whose
//! attention it has in [`Attention`]; the rest is what every such model has.

use candle_core::quantized::{GgmlDType, QMatMul, QTensor, gguf_file};
use candle_core::{D, DType, Device, Module, Result, Tensor};
use candle_nn::RmsNorm;
use candle_nn::ops::{silu, softmax_last_dim};
use phasor_attention::phasor::Host;
use phasor_attention::{
    AttentionConfig, AttentionLayer, DenseWeights, GgmlLinear, GgmlType, GgmlWeights, Linear,
    PagedKvCache, Projection, QkvProjection, RaggedBatch, Workspace,
};
use phasor_candle::{CacheOrder, DimOrder, KvCache, RotaryEmbedding, Slots};
use std::io::{Read, Seek};
use std::sync::Arc;

/// Whose rotation a model uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rope {
    /// Exact angles.
    Phasor,
    /// candle-nn's `rope_i` by tables, whose angles are formed in f32 as in candle's models.
    Candle,
}

/// Whose attention a model uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attention {
    /// candle's products and softmax, with the rotation that is asked for.
    Candle,
    /// The layer of phasor-attention, on the host: projections, phasor's step, attention over pages.
    Phasor,
}

/// How a model is loaded.
pub struct Settings {
    pub rope: Rope,
    pub attention: Attention,
    /// The position of the first token.
    pub start: i64,
    /// Tokens that the cache has room for.
    pub capacity: usize,
    /// Whether weights are widened to f32. Candle's product with quantised weights rounds the activations
    /// to 8 bits, by which two rotations that differ in a last bit may end in other words.
    pub dequantise: bool,
    pub device: Device,
}

enum Rotation {
    Phasor(RotaryEmbedding),
    Candle {
        theta: f32,
        cos: Tensor,
        sin: Tensor,
    },
}

struct Layer {
    attention_norm: RmsNorm,
    attention: LayerAttention,
    feed_forward_norm: RmsNorm,
    gate: QMatMul,
    up: QMatMul,
    down: QMatMul,
}

enum LayerAttention {
    Candle(Box<CandleAttention>),
    Phasor(Box<AttentionLayer<f32>>),
}

struct CandleAttention {
    q: QMatMul,
    k: QMatMul,
    v: QMatMul,
    output: QMatMul,
    /// `[1, kv_heads, capacity, head_dim]`.
    k_cache: Tensor,
    v_cache: Tensor,
}

/// Tokens of a page of the cache of phasor-attention.
const PAGE_SIZE: usize = 16;

/// What layers of phasor-attention share: the cache of all of them, and memory between their steps.
struct Paged {
    cache: PagedKvCache<f32>,
    /// The pages of the one sequence.
    table: Vec<u32>,
    workspace: Workspace<f32>,
}

pub struct Model {
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: RmsNorm,
    output: QMatMul,
    rotation: Rotation,
    paged: Option<Paged>,
    settings: Settings,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    /// Tokens in the cache.
    length: usize,
}

impl Model {
    /// Reads a file; `progress` is told what part has been read.
    pub fn load<R: Read + Seek>(
        content: &gguf_file::Content,
        reader: &mut R,
        settings: Settings,
        mut progress: impl FnMut(f64),
    ) -> Result<Self> {
        let value = |key: &str| match content.metadata.get(key) {
            Some(value) => Ok(value),
            None => candle_core::bail!("the model has no {key}"),
        };
        let count = |key: &str| Ok::<_, candle_core::Error>(value(key)?.to_u32()? as usize);
        let architecture = value("general.architecture")?.to_string()?;
        if architecture != "llama" {
            candle_core::bail!(
                "the model is of the architecture {architecture}, and not of llama's"
            );
        }
        let heads = count("llama.attention.head_count")?;
        let kv_heads = count("llama.attention.head_count_kv")?;
        let head_dim = count("llama.embedding_length")? / heads;
        let epsilon = value("llama.attention.layer_norm_rms_epsilon")?
            .to_f32()?
            .into();

        let rotary = RotaryEmbedding::from_gguf(content, reader)?;
        let rope = rotary.rope().clone();
        let of_phasor = settings.attention == Attention::Phasor;
        if of_phasor && (settings.rope != Rope::Phasor || !settings.device.is_cpu()) {
            candle_core::bail!("phasor's attention rotates as phasor does, and runs on the host");
        }
        let rotation = match settings.rope {
            Rope::Phasor => Rotation::Phasor(rotary.with_dim_order(DimOrder::Bthd)),
            Rope::Candle => {
                let theta = value("llama.rope.freq_base")?.to_f32()?;
                tables(&settings, theta, head_dim)?
            }
        };

        let device = settings.device.clone();
        let (mut read, all) = (0, content.tensor_infos.len());
        let mut tensor = |name: &str| {
            read += 1;
            progress(read as f64 / all as f64);
            content.tensor(reader, name, &device)
        };
        let embedding = tensor("token_embd.weight")?;
        let tied = !content.tensor_infos.contains_key("output.weight");
        let dequantise = settings.dequantise;
        let matrix = |weight: QTensor| match dequantise {
            true => Ok(QMatMul::Tensor(weight.dequantize(&weight.device())?)),
            false => QMatMul::from_qtensor(weight),
        };
        let wide = embedding.dequantize(&device)?;
        let output = match (tied, dequantise) {
            (true, true) => QMatMul::Tensor(wide.clone()),
            (true, false) => matrix(embedding)?,
            (false, _) => matrix(tensor("output.weight")?)?,
        };
        let cache = || {
            Tensor::zeros(
                (1, kv_heads, settings.capacity, head_dim),
                DType::F32,
                &device,
            )
        };
        let blocks = count("llama.block_count")?;
        let width = heads * head_dim;
        let paged = match of_phasor {
            false => None,
            true => {
                let pages = settings.capacity.div_ceil(PAGE_SIZE).max(1);
                Some(Paged {
                    cache: PagedKvCache::new(pages, blocks, PAGE_SIZE, kv_heads, head_dim)
                        .map_err(candle_core::Error::wrap)?,
                    table: (0..pages as u32).collect(),
                    workspace: Workspace::default(),
                })
            }
        };
        let mut layers = Vec::new();
        for layer in 0..blocks {
            let mut of = |name: &str| tensor(&format!("blk.{layer}.{name}.weight"));
            let attention_norm = RmsNorm::new(of("attn_norm")?.dequantize(&device)?, epsilon);
            let [q, k, v, output] = [
                of("attn_q")?,
                of("attn_k")?,
                of("attn_v")?,
                of("attn_output")?,
            ];
            let attention = if of_phasor {
                let projection = |weight| projection(weight, dequantise);
                let qkv = QkvProjection::Separate {
                    q: projection(q)?,
                    k: projection(k)?,
                    v: projection(v)?,
                };
                let config = AttentionConfig::new(width, heads, kv_heads, head_dim);
                let o = projection(output)?;
                let layer = AttentionLayer::new(config, &Host::new(), &rope, qkv, o);
                LayerAttention::Phasor(Box::new(layer.map_err(candle_core::Error::wrap)?))
            } else {
                LayerAttention::Candle(Box::new(CandleAttention {
                    q: matrix(q)?,
                    k: matrix(k)?,
                    v: matrix(v)?,
                    output: matrix(output)?,
                    k_cache: cache()?,
                    v_cache: cache()?,
                }))
            };
            layers.push(Layer {
                attention_norm,
                attention,
                feed_forward_norm: RmsNorm::new(of("ffn_norm")?.dequantize(&device)?, epsilon),
                gate: matrix(of("ffn_gate")?)?,
                up: matrix(of("ffn_up")?)?,
                down: matrix(of("ffn_down")?)?,
            });
        }
        let norm = RmsNorm::new(tensor("output_norm.weight")?.dequantize(&device)?, epsilon);
        Ok(Self {
            embedding: wide,
            layers,
            norm,
            output,
            rotation,
            paged,
            settings,
            heads,
            kv_heads,
            head_dim,
            length: 0,
        })
    }

    /// The logits of what follows these tokens, which follow those of earlier calls.
    pub fn forward(&mut self, tokens: &[u32]) -> Result<Tensor> {
        self.forward_with(tokens, |_| {})
    }

    /// The same; `progress` is told what part of the layers is done.
    pub fn forward_with(
        &mut self,
        tokens: &[u32],
        mut progress: impl FnMut(f64),
    ) -> Result<Tensor> {
        let (count, room) = (tokens.len(), self.settings.capacity - self.length);
        if count > room {
            candle_core::bail!("{count} tokens for a cache that has room for {room}");
        }
        let ids = Tensor::new(tokens, &self.settings.device)?;
        let mut x = self.embedding.index_select(&ids, 0)?.unsqueeze(0)?;
        let mask = self.mask(count)?;
        // Taken, so that layers can be borrowed beside it.
        let mut paged = self.paged.take();
        let all = self.layers.len();
        for (at, layer) in self.layers.iter().enumerate() {
            let normed = layer.attention_norm.forward(&x)?;
            let attended = match (&layer.attention, &mut paged) {
                (LayerAttention::Candle(of), _) => self.attend(of, &normed, &mask),
                (LayerAttention::Phasor(of), Some(paged)) => {
                    paged.attend(of, at, &normed, self.settings.start, self.length)
                }
                (LayerAttention::Phasor(_), None) => candle_core::bail!("a call failed before"),
            }?;
            x = (x + attended)?;
            let normed = layer.feed_forward_norm.forward(&x)?;
            let gated = (silu(&layer.gate.forward(&normed)?)? * layer.up.forward(&normed)?)?;
            x = (x + layer.down.forward(&gated)?)?;
            progress((at + 1) as f64 / all as f64);
        }
        self.paged = paged;
        self.length += count;
        let last = x.narrow(1, count - 1, 1)?.contiguous()?;
        self.output
            .forward(&self.norm.forward(&last)?)?
            .flatten_all()
    }

    /// Rotates, stores keys and values, and attends to all that is stored. `x` is `[1, tokens, width]`.
    fn attend(&self, layer: &CandleAttention, x: &Tensor, mask: &Option<Tensor>) -> Result<Tensor> {
        let (_, tokens, _) = x.dims3()?;
        let split = |x: Tensor, heads| x.reshape((1, tokens, heads, self.head_dim));
        let q = split(layer.q.forward(x)?, self.heads)?;
        let k = split(layer.k.forward(x)?, self.kv_heads)?;
        let v = split(layer.v.forward(x)?, self.kv_heads)?;
        let q = self.rotate_and_store(layer, q, &k, &v)?;

        let stored = self.length + tokens;
        let of_cache = |cache: &Tensor| cache.squeeze(0)?.narrow(1, 0, stored);
        let (keys, values) = (of_cache(&layer.k_cache)?, of_cache(&layer.v_cache)?);
        // Query heads that share a key head, as rows of one product.
        let groups = self.heads / self.kv_heads;
        let rows = (self.kv_heads, groups * tokens, self.head_dim);
        let scores = q.contiguous()?.reshape(rows)?.matmul(&keys.t()?)?;
        let mut scores = (scores * (self.head_dim as f64).powf(-0.5))?;
        if let Some(mask) = mask {
            let apart = scores.reshape((self.kv_heads, groups, tokens, stored))?;
            scores = apart.broadcast_add(mask)?.reshape(scores.shape())?;
        }
        let attended = softmax_last_dim(&scores)?.matmul(&values.contiguous()?)?;
        let attended = attended.reshape((self.heads, tokens, self.head_dim))?;
        let attended = attended.transpose(0, 1)?.reshape((1, tokens, ()))?;
        layer.output.forward(&attended)
    }

    /// Queries `[1, heads, tokens, head_dim]` that are rotated; keys, rotated too, and values are in their
    /// caches then.
    fn rotate_and_store(
        &self,
        layer: &CandleAttention,
        q: Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> Result<Tensor> {
        let heads_first = |x: &Tensor| x.transpose(1, 2)?.contiguous();
        let (k_cache, v_cache) = (&layer.k_cache, &layer.v_cache);
        match &self.rotation {
            Rotation::Phasor(rotary) => {
                let start = self.settings.start.wrapping_add(self.length as i64);
                let cache = KvCache::new(k_cache, v_cache, CacheOrder::Hnd);
                let slots = [self.length as i64];
                // There is room, so that all is stored.
                rotary.append_later(&q, k, v, cache, start, Slots::sequences(&slots))?;
                q.transpose(1, 2)
            }
            Rotation::Candle { cos, sin, .. } => {
                let tokens = q.dim(1)?;
                let rows = |table: &Tensor| table.narrow(0, self.length, tokens);
                let (cos, sin) = (rows(cos)?, rows(sin)?);
                let k = candle_nn::rotary_emb::rope_i(&heads_first(k)?, &cos, &sin)?;
                k_cache.slice_set(&k, 2, self.length)?;
                v_cache.slice_set(&heads_first(v)?, 2, self.length)?;
                candle_nn::rotary_emb::rope_i(&heads_first(&q)?, &cos, &sin)
            }
        }
    }

    /// What hides later tokens from earlier ones, `[tokens, stored]`; one token sees all.
    fn mask(&self, tokens: usize) -> Result<Option<Tensor>> {
        if tokens == 1 {
            return Ok(None);
        }
        let stored = self.length + tokens;
        let hidden = |row: usize, column: usize| match column > self.length + row {
            true => f32::NEG_INFINITY,
            false => 0.0,
        };
        let values = (0..tokens).flat_map(|row| (0..stored).map(move |column| hidden(row, column)));
        let values: Vec<f32> = values.collect();
        Tensor::from_vec(values, (tokens, stored), &self.settings.device).map(Some)
    }

    /// Forgets all tokens, and puts the next one at another position.
    pub fn begin_at(&mut self, start: i64) -> Result<()> {
        self.length = 0;
        self.settings.start = start;
        if let Rotation::Candle { theta, .. } = self.rotation {
            self.rotation = tables(&self.settings, theta, self.head_dim)?;
        }
        Ok(())
    }
}

impl Paged {
    /// A layer for tokens that follow `length` in its cache. `x` is `[1, tokens, width]`.
    fn attend(
        &mut self,
        layer: &AttentionLayer<f32>,
        at: usize,
        x: &Tensor,
        start: i64,
        length: usize,
    ) -> Result<Tensor> {
        let (_, tokens, _) = x.dims3()?;
        let values = x.flatten_all()?.to_vec1::<f32>()?;
        let mut out = vec![0.0; values.len()];
        let first = start.wrapping_add(length as i64);
        let positions: Vec<i64> = (0..tokens as i64).map(|t| first.wrapping_add(t)).collect();
        let (cu_seqlens, lengths) = ([0, tokens as u32], [length as u32]);
        let batch = RaggedBatch::new(&cu_seqlens, &lengths, &self.table).position_ids(&positions);
        let cache = self.cache.layer(at);
        cache
            .and_then(|mut cache| {
                layer.forward(&values, &mut cache, &batch, &mut self.workspace, &mut out)
            })
            .map_err(candle_core::Error::wrap)?;
        Tensor::from_vec(out, x.shape(), x.device())
    }
}

/// A projection of phasor-attention: widened to f32, or in the file's form where it is one of its own.
fn projection(weight: QTensor, dequantise: bool) -> Result<Arc<dyn Projection<f32>>> {
    let (rows, columns) = weight.shape().dims2()?;
    let of_file = match weight.dtype() {
        GgmlDType::Q4_0 => Some(GgmlType::Q4_0),
        GgmlDType::Q8_0 => Some(GgmlType::Q8_0),
        GgmlDType::Q4K => Some(GgmlType::Q4_K),
        GgmlDType::Q5K => Some(GgmlType::Q5_K),
        GgmlDType::Q6K => Some(GgmlType::Q6_K),
        _ => None,
    };
    let projection: Arc<dyn Projection<f32>> = match of_file.filter(|_| !dequantise) {
        Some(of) => {
            let weights = GgmlWeights::new(of, weight.data()?.into_owned(), rows, columns);
            Arc::new(GgmlLinear(weights.map_err(candle_core::Error::wrap)?))
        }
        None => {
            let values = weight.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1()?;
            let weights = DenseWeights::<f32>::new(values, rows, columns);
            Arc::new(Linear(weights.map_err(candle_core::Error::wrap)?))
        }
    };
    Ok(projection)
}

/// As candle's models make them: `inv_freq` in f32, positions in f32, and their product too.
fn tables(settings: &Settings, theta: f32, head_dim: usize) -> Result<Rotation> {
    let pairs = (0..head_dim).step_by(2);
    let inv_freq: Vec<_> = pairs
        .map(|dim| 1f32 / theta.powf(dim as f32 / head_dim as f32))
        .collect();
    let inv_freq = Tensor::from_vec(inv_freq, (1, head_dim / 2), &settings.device)?;
    let positions = (0..settings.capacity as i64).map(|t| settings.start.wrapping_add(t) as f32);
    let positions = Tensor::from_iter(positions, &settings.device)?.unsqueeze(D::Minus1)?;
    let angles = positions.matmul(&inv_freq)?;
    Ok(Rotation::Candle {
        theta,
        cos: angles.cos()?,
        sin: angles.sin()?,
    })
}
