//! A layer on several devices.

use crate::cache::KvCacheMut;
use crate::error::agree;
use crate::projection::WindowOfWeights;
use crate::{
    AttentionConfig, AttentionError, AttentionLayer, Fp8Activation, Fp8Linear, HeadWeights, Linear,
    Projection, QkvProjection, RaggedBatch, Weights, Workspace,
};
use phasor::{Element, Host, Rope};
use std::ops::Range;
use std::sync::Arc;

/// How a layer is spread over devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ShardingStrategy {
    /// Each of so many devices has as many heads; what they return is summed.
    TensorParallel(usize),
    /// Each of so many devices has the whole layer, and sequences of its own.
    Replicate(usize),
}

/// A layer as weights, before it is one.
#[derive(Clone)]
pub struct LayerWeights<T> {
    /// `[heads * head_dim, hidden_size]`.
    pub q: Arc<dyn Weights>,
    /// `[kv_heads * head_dim, hidden_size]`.
    pub k: Arc<dyn Weights>,
    /// `[kv_heads * v_head_dim, hidden_size]`.
    pub v: Arc<dyn Weights>,
    /// `[hidden_size, heads * v_head_dim]`.
    pub o: Arc<dyn Weights>,
    /// What stages of q, k and v need.
    pub heads: [HeadWeights<T>; 3],
    /// How activations become e4m3 before they meet q, k, v and o; `None`: they do not.
    pub activations: [Option<Fp8Activation>; 4],
}

impl<T: Element> LayerWeights<T> {
    /// The layer.
    ///
    /// # Errors
    /// Those of [`AttentionLayer::new`].
    pub fn layer(
        &self,
        config: AttentionConfig,
        host: &Host,
        rope: &Rope,
    ) -> Result<AttentionLayer<T>, AttentionError> {
        let [q, k, v, o] = [&self.q, &self.k, &self.v, &self.o];
        let linear = |weights: &Arc<dyn Weights>, at: usize| -> Arc<dyn Projection<T>> {
            let weights = weights.clone();
            match self.activations[at] {
                None => Arc::new(Linear(weights)),
                Some(activation) => Arc::new(Fp8Linear::of_part(weights, activation)),
            }
        };
        let qkv = QkvProjection::Separate {
            q: linear(q, 0),
            k: linear(k, 1),
            v: linear(v, 2),
        };
        let o = linear(o, 3);
        let [q, k, v] = self.heads.clone();
        Ok(AttentionLayer::new(config, host, rope, qkv, o)?.with_head_weights(q, k, v))
    }

    /// The parts of a layer that devices have: heads in equal runs, with their rows of q, k and v, their
    /// columns of o, and their biases, sinks and weights of norms. Weights are not copied. Activations of o
    /// whose scales are those of tokens have the scales of a device's part of each token.
    ///
    /// # Errors
    /// [`AttentionError::Value`] for no devices, or heads of either kind that they do not divide;
    /// [`AttentionError::Weights`] for a norm across heads, and for blocks of o's activations that a device
    /// would have a part of; [`AttentionError::Heads`].
    pub fn shard(
        &self,
        config: &AttentionConfig,
        strategy: ShardingStrategy,
    ) -> Result<Vec<(AttentionConfig, Self)>, AttentionError> {
        let (ShardingStrategy::TensorParallel(devices) | ShardingStrategy::Replicate(devices)) =
            strategy;
        if devices == 0 {
            return Err(AttentionError::Value {
                what: "the number of devices",
                value: 0,
                remedy: "it must be above 0",
            });
        }
        if let ShardingStrategy::Replicate(devices) = strategy {
            return Ok(vec![(config.clone(), self.clone()); devices]);
        }
        let counts = [config.num_attention_heads, config.num_key_value_heads];
        let what = ["num_attention_heads", "num_key_value_heads"];
        for (what, value) in what.into_iter().zip(counts) {
            if value == 0 || !value.is_multiple_of(devices) {
                return Err(AttentionError::Value {
                    what,
                    value,
                    remedy: "the number of devices must divide it",
                });
            }
        }
        if config.q_stages.norms_across_heads() || config.k_stages.norms_across_heads() {
            return Err(AttentionError::Weights {
                what: "norms of q and k",
                remedy: "a norm across heads needs all of them: replicate the layer",
            });
        }
        let of_device = config.num_attention_heads / devices * config.v_head_dim;
        if let Some(Fp8Activation::Blocks(dims)) = self.activations[3]
            && (dims == 0 || !of_device.is_multiple_of(dims))
        {
            return Err(AttentionError::Weights {
                what: "blocks of o's activations",
                remedy: "the heads of a device must be whole blocks",
            });
        }
        let [dim, v_dim] = [config.head_dim, config.v_head_dim];
        let shard = |device: usize| {
            let [of_q, of_kv] = counts.map(|count| {
                let each = count / devices;
                device * each..(device + 1) * each
            });
            let dims = |heads: &Range<usize>, dim| heads.start * dim..heads.end * dim;
            let rows = |weights: &Arc<dyn Weights>,
                        heads,
                        dim|
             -> Result<Arc<dyn Weights>, AttentionError> {
                let columns = 0..weights.in_features();
                Ok(Arc::new(WindowOfWeights::new(
                    weights.clone(),
                    dims(heads, dim),
                    columns,
                )?))
            };
            let o =
                WindowOfWeights::new(self.o.clone(), 0..self.o.out_features(), dims(&of_q, v_dim))?;
            // `[heads, head_dim]` is split, `[head_dim]` is for all heads.
            let part = |weights: &Option<Vec<T>>, heads: &Range<usize>, dim: usize| {
                weights
                    .as_ref()
                    .map(|weights| match weights.get(dims(heads, dim)) {
                        Some(part) if weights.len() > dim => part.to_vec(),
                        _ => weights.clone(),
                    })
            };
            let heads =
                [(0, &of_q, dim), (1, &of_kv, dim), (2, &of_kv, v_dim)].map(|(at, heads, dim)| {
                    HeadWeights {
                        bias: part(&self.heads[at].bias, heads, dim),
                        norm: part(&self.heads[at].norm, heads, dim),
                        norm_bias: part(&self.heads[at].norm_bias, heads, dim),
                    }
                });
            let mut config = config.clone();
            config.sinks = match &config.sinks {
                Some(sinks) => {
                    agree("sinks, one for each query head", counts[0], sinks.len())?;
                    Some(sinks[of_q.clone()].to_vec())
                }
                None => None,
            };
            config.num_attention_heads = of_q.len();
            config.num_key_value_heads = of_kv.len();
            Ok((
                config,
                Self {
                    q: rows(&self.q, &of_q, dim)?,
                    k: rows(&self.k, &of_kv, dim)?,
                    v: rows(&self.v, &of_kv, v_dim)?,
                    o: Arc::new(o),
                    heads,
                    activations: self.activations,
                },
            ))
        };
        (0..devices).map(shard).collect()
    }
}

/// What devices do together.
pub trait Collective<T> {
    /// Replaces the part of every device by the sum of all parts.
    ///
    /// # Errors
    /// [`AttentionError::Mismatch`] if they differ in length; nothing is written then.
    fn all_reduce_sum(&self, parts: &mut [&mut [T]]) -> Result<(), AttentionError>;
}

/// Devices that share this process' memory: parts are added up in f32, from the first to the last, and
/// rounded once.
#[derive(Clone, Copy, Debug, Default)]
pub struct LocalCollective;

impl<T: Element> Collective<T> for LocalCollective {
    fn all_reduce_sum(&self, parts: &mut [&mut [T]]) -> Result<(), AttentionError> {
        let len = parts.first().map_or(0, |part| part.len());
        for part in parts.iter() {
            agree("elements of a device's part of a sum", len, part.len())?;
        }
        for at in 0..len {
            let sum = parts.iter().fold(0.0, |sum, part| sum + part[at].widen());
            for part in parts.iter_mut() {
                part[at] = T::narrow(sum);
            }
        }
        Ok(())
    }
}

/// A layer whose heads are spread over devices. All see the same tokens, and get the same result.
pub struct TensorParallelAttention<T, C = LocalCollective> {
    shards: Vec<AttentionLayer<T>>,
    collective: C,
}

impl<T: Element, C: Collective<T>> TensorParallelAttention<T, C> {
    /// A layer over so many devices.
    ///
    /// # Errors
    /// Those of [`LayerWeights::shard`] and [`AttentionLayer::new`].
    pub fn new(
        config: &AttentionConfig,
        weights: &LayerWeights<T>,
        devices: usize,
        host: &Host,
        rope: &Rope,
        collective: C,
    ) -> Result<Self, AttentionError> {
        let shards = weights.shard(config, ShardingStrategy::TensorParallel(devices))?;
        let shards = shards.into_iter();
        Ok(Self {
            shards: shards
                .map(|(config, weights)| weights.layer(config, host, rope))
                .collect::<Result<_, _>>()?,
            collective,
        })
    }

    /// The parts of the layer.
    pub fn shards(&self) -> &[AttentionLayer<T>] {
        &self.shards
    }

    /// The layer for new tokens, `[tokens, hidden_size]`; a cache, of its own heads, and an output for each
    /// device, which are equal in the end.
    ///
    /// # Errors
    /// Those of [`AttentionLayer::forward`], and [`AttentionError::Mismatch`] for caches or outputs that
    /// are not as many as devices, before anything is written; those of the collective.
    pub fn forward(
        &self,
        x: &[T],
        caches: &mut [KvCacheMut<'_, T>],
        batch: &RaggedBatch<'_>,
        workspace: &mut Workspace<T>,
        outs: &mut [&mut [T]],
    ) -> Result<(), AttentionError> {
        agree("caches, one a device", self.shards.len(), caches.len())?;
        agree("outputs, one a device", self.shards.len(), outs.len())?;
        // All of them, before any is written.
        for ((shard, cache), out) in self.shards.iter().zip(caches.iter()).zip(outs.iter()) {
            shard.check(x, cache, batch, out)?;
        }
        for ((shard, cache), out) in self.shards.iter().zip(caches).zip(outs.iter_mut()) {
            shard.forward(x, cache, batch, workspace, out)?;
        }
        let used = batch.tokens() * self.shards[0].config().hidden_size;
        let mut parts: Vec<&mut [T]> = outs.iter_mut().map(|out| &mut out[..used]).collect();
        self.collective.all_reduce_sum(&mut parts)
    }
}

/// What a device of [`DataParallelAttention`] computes: its tokens, cache, sequences and output.
pub struct DeviceBatch<'a, 'c, T> {
    /// `[tokens, hidden_size]`.
    pub x: &'a [T],
    /// Its cache.
    pub cache: &'a mut KvCacheMut<'c, T>,
    /// Its sequences, whose offsets begin at 0.
    pub batch: RaggedBatch<'a>,
    /// As `x`.
    pub out: &'a mut [T],
}

/// A layer that each device has whole, for sequences of its own.
pub struct DataParallelAttention<T> {
    replicas: Vec<AttentionLayer<T>>,
}

impl<T: Element> DataParallelAttention<T> {
    /// A replica a device. (They share their weights here.)
    ///
    /// # Errors
    /// [`AttentionError::Value`] for no devices.
    pub fn new(layer: &AttentionLayer<T>, devices: usize) -> Result<Self, AttentionError> {
        match devices {
            0 => Err(AttentionError::Value {
                what: "the number of devices",
                value: 0,
                remedy: "it must be above 0",
            }),
            _ => Ok(Self {
                replicas: vec![layer.clone(); devices],
            }),
        }
    }

    /// How many devices there are.
    pub fn devices(&self) -> usize {
        self.replicas.len()
    }

    /// The layer for the tokens of each device, in turn.
    ///
    /// # Errors
    /// Those of [`AttentionLayer::forward`], and [`AttentionError::Mismatch`] for batches that are not as
    /// many as devices, before anything is written.
    pub fn forward(
        &self,
        batches: &mut [DeviceBatch<'_, '_, T>],
        workspace: &mut Workspace<T>,
    ) -> Result<(), AttentionError> {
        agree("batches, one a device", self.replicas.len(), batches.len())?;
        for (layer, of) in self.replicas.iter().zip(batches.iter()) {
            layer.check(of.x, of.cache, &of.batch, of.out)?;
        }
        for (layer, of) in self.replicas.iter().zip(batches) {
            layer.forward(of.x, of.cache, &of.batch, workspace, of.out)?;
        }
        Ok(())
    }
}
