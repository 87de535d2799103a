//! MAX's float8 layers.

use super::{Arguments, AttentionWithRope, StateDict, take};
use crate::error::{agree, usable};
use crate::{
    AttentionError, Fp8Activation, Fp8WeightScale, Fp8Weights, LayerWeights, Weights,
    WindowOfWeights,
};
use phasor::{Dtype, Element, Host};
use std::ops::Range;
use std::sync::Arc;

/// What shares a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Float8ScaleGranularity {
    /// A whole tensor.
    Tensor,
    /// A row of a weight.
    Rowwise,
    /// A token.
    Colwise,
    /// A block.
    Block,
}

/// Where the scales of activations come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Float8ScaleOrigin {
    /// The checkpoint.
    Static,
    /// The activations.
    Dynamic,
}

/// Scales of activations.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Float8InputScaleSpec {
    /// What shares a scale.
    pub granularity: Float8ScaleGranularity,
    /// Where it comes from.
    pub origin: Float8ScaleOrigin,
    /// What the largest magnitude of a token counts as at most; 1200 in MAX's models.
    pub activation_scale_ub: Option<f32>,
    /// Tokens and inputs of a block; tokens are 1.
    pub block_size: Option<[usize; 2]>,
}

/// Scales of weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Float8WeightScaleSpec {
    /// What shares a scale.
    pub granularity: Float8ScaleGranularity,
    /// Their type in the checkpoint, which scales of tokens are rounded to.
    pub dtype: Dtype,
    /// Outputs and inputs of a block.
    pub block_size: Option<[usize; 2]>,
}

/// How a checkpoint was quantised: `float8_config` (25.7), of `quant_config` (26.7) the e4m3 part. Other
/// layers than this one are not its matter here.
///
/// | weights | activations |
/// |---|---|
/// | tensor | tensor, static |
/// | tensor | token (or tensor, which is the same here), dynamic |
/// | row | token, dynamic |
/// | block | block, dynamic |
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Float8Config {
    /// Of activations.
    pub input_scale: Float8InputScaleSpec,
    /// Of weights.
    pub weight_scale: Float8WeightScaleSpec,
}

/// A linear map of a checkpoint: `weight`, `weight_scale` and `input_scale`.
#[derive(Clone, Debug, PartialEq)]
pub struct Float8Tensors {
    /// e4m3, `[out_features, in_features]`.
    pub weight: Vec<u8>,
    /// One, one a row, or one a block, `[ceil(out / block[0]), ceil(in / block[1])]`.
    pub weight_scale: Vec<f32>,
    /// That of activations, where it is static.
    pub input_scale: Option<f32>,
}

/// Scales of q, k and v as the properties of a layer say them.
#[derive(Clone, Debug)]
pub(super) struct Scales {
    input: Option<f32>,
    parts: [Fp8WeightScale; 3],
    /// Rows of q, k and v.
    rows: [usize; 3],
    columns: usize,
}

impl Float8Config {
    fn weight_scale(
        &self,
        scales: Vec<f32>,
        [rows, columns]: [usize; 2],
    ) -> Result<Fp8WeightScale, AttentionError> {
        let spec = &self.weight_scale;
        for &scale in &scales {
            usable("weight_scale", f64::from(scale))?;
        }
        match (spec.granularity, spec.block_size) {
            (Float8ScaleGranularity::Tensor, _) => {
                agree("weight_scale, one for the tensor", 1, scales.len())?;
                Ok(Fp8WeightScale::Tensor(scales[0]))
            }
            (Float8ScaleGranularity::Rowwise, _) => {
                agree("weight_scale, one a row", rows, scales.len())?;
                Ok(Fp8WeightScale::Rows(scales))
            }
            (Float8ScaleGranularity::Block, Some(block)) if !block.contains(&0) => {
                let of_row = columns.div_ceil(block[1]);
                let blocks = rows.div_ceil(block[0]).saturating_mul(of_row);
                agree("weight_scale, one a block", blocks, scales.len())?;
                Ok(Fp8WeightScale::Blocks { scales, block })
            }
            _ => Err(AttentionError::Weights {
                what: "weight_scale",
                remedy: "its granularity is Tensor, Rowwise, or Block with a block_size above 0",
            }),
        }
    }

    /// How activations meet a weight, which has the scale of a static one.
    fn activation(
        &self,
        input_scale: Option<f32>,
        weight_scale: &Fp8WeightScale,
    ) -> Result<Fp8Activation, AttentionError> {
        use Float8ScaleGranularity::{Block, Colwise, Tensor};
        let spec = &self.input_scale;
        let activation = match (spec.origin, spec.granularity, spec.block_size) {
            (Float8ScaleOrigin::Static, Tensor, _) => match input_scale {
                Some(scale) => Fp8Activation::Static(scale),
                None => {
                    return Err(AttentionError::Weights {
                        what: "input_scale",
                        remedy: "a static scale is one of the checkpoint: give it",
                    });
                }
            },
            (Float8ScaleOrigin::Dynamic, Colwise | Tensor, _) => Fp8Activation::PerToken {
                most_amax: spec.activation_scale_ub.unwrap_or(f32::INFINITY),
                scale_dtype: self.weight_scale.dtype,
            },
            (Float8ScaleOrigin::Dynamic, Block, Some([1, inputs])) => Fp8Activation::Blocks(inputs),
            _ => {
                return Err(AttentionError::Weights {
                    what: "input_scale",
                    remedy: "it is Static for the Tensor, or Dynamic and Colwise, or Dynamic in a Block \
                             with a block_size of one token",
                });
            }
        };
        activation.check(weight_scale)?;
        Ok(activation)
    }
}

impl Scales {
    /// Scales of stacked qkv, whose parts are whole blocks where it has these.
    fn of(
        input: Option<f32>,
        whole: &Fp8WeightScale,
        rows: [Range<usize>; 3],
        columns: usize,
    ) -> Result<Self, AttentionError> {
        let lens = rows.each_ref().map(|rows| rows.len());
        let [q, k, v] = rows.map(|rows| scale_of_rows(whole, rows, columns));
        Ok(Self {
            input,
            parts: [q?, k?, v?],
            rows: lens,
            columns,
        })
    }

    /// The scales of a device's rows.
    pub(super) fn of_device(&self, device: usize, devices: usize) -> Result<Self, AttentionError> {
        let rows = self.rows.map(|rows| rows / devices);
        let of = |at: usize| {
            let rows = device * rows[at]..(device + 1) * rows[at];
            scale_of_rows(&self.parts[at], rows, self.columns)
        };
        Ok(Self {
            input: self.input,
            parts: [of(0)?, of(1)?, of(2)?],
            rows,
            columns: self.columns,
        })
    }

    fn all(&self) -> Fp8WeightScale {
        match &self.parts {
            [Fp8WeightScale::Tensor(scale), ..] if self.input.is_some() => {
                Fp8WeightScale::Tensor(*scale)
            }
            [Fp8WeightScale::Blocks { block, .. }, ..] => Fp8WeightScale::Blocks {
                scales: self.concatenated(),
                block: *block,
            },
            _ => Fp8WeightScale::Rows(self.concatenated()),
        }
    }

    /// Those of q, k and v; that of a tensor for each of its rows.
    fn concatenated(&self) -> Vec<f32> {
        let of_part = |(scale, &rows): (&Fp8WeightScale, &usize)| match scale {
            Fp8WeightScale::Tensor(scale) => vec![*scale; rows],
            Fp8WeightScale::Rows(scales) | Fp8WeightScale::Blocks { scales, .. } => scales.clone(),
        };
        self.parts
            .iter()
            .zip(&self.rows)
            .flat_map(of_part)
            .collect()
    }
}

/// The scales of some rows of a weight.
fn scale_of_rows(
    scale: &Fp8WeightScale,
    rows: Range<usize>,
    columns: usize,
) -> Result<Fp8WeightScale, AttentionError> {
    Ok(match scale {
        Fp8WeightScale::Tensor(scale) => Fp8WeightScale::Tensor(*scale),
        Fp8WeightScale::Rows(scales) => Fp8WeightScale::Rows(scales[rows].to_vec()),
        Fp8WeightScale::Blocks { scales, block } => {
            let [of_rows, of_columns] = *block;
            if !rows.start.is_multiple_of(of_rows) || !rows.end.is_multiple_of(of_rows) {
                return Err(AttentionError::Weights {
                    what: "blocks of float8 weights",
                    remedy: "the rows of q, of k, of v, and of each device must be whole blocks",
                });
            }
            let of_row = columns.div_ceil(of_columns);
            let blocks = rows.start / of_rows * of_row..rows.end / of_rows * of_row;
            Fp8WeightScale::Blocks {
                scales: scales[blocks].to_vec(),
                block: *block,
            }
        }
    })
}

impl<T: Element> AttentionWithRope<T> {
    /// A layer with weights of e4m3: `tensors` are those of `q_proj`, `k_proj` and `v_proj`, or `qkv_proj`,
    /// and of `o_proj`; `state` has biases and weights of norms under the names that [`new`](Self::new) has.
    ///
    /// As in MAX, static scales of q, k and v become one each, the largest: activations are rounded once for
    /// all three, and codes by a lesser scale are made anew.
    ///
    /// # Errors
    /// [`AttentionError::Weights`] for clip_qkv, for scales that do not go together or are missing, and for
    /// q, k or v that are not whole blocks; [`AttentionError::Factor`] for a scale that cannot be used;
    /// [`AttentionError::Mismatch`] for codes or scales of another count; [`AttentionError::NoWeight`];
    /// those of [`AttentionLayer::new`](crate::AttentionLayer::new).
    pub fn new_float8(
        arguments: &Arguments<'_>,
        float8_config: &Float8Config,
        tensors: &StateDict<Float8Tensors>,
        state: &StateDict<Vec<T>>,
        host: &Host,
    ) -> Result<Self, AttentionError> {
        if arguments.clip().is_some() {
            return Err(AttentionError::Weights {
                what: "clip_qkv",
                remedy: "it is not for float8: clamp weights before they are quantised",
            });
        }
        let rows = arguments.rows();
        let hidden = arguments.hidden_size;
        let matrix = |name: &str, rows: usize, columns: usize| {
            let tensors = take(tensors, &format!("{name}_proj"))?;
            let scale = float8_config.weight_scale(tensors.weight_scale, [rows, columns])?;
            let activation = float8_config.activation(tensors.input_scale, &scale)?;
            let weights = Fp8Weights::new(tensors.weight, scale, rows, columns)?;
            Ok::<_, AttentionError>((weights, activation))
        };
        let of_static = |activation: Fp8Activation| match activation {
            Fp8Activation::Static(scale) => Some(scale),
            _ => None,
        };
        let (parts, activation, scales): ([Arc<dyn Weights>; 3], _, _) = if arguments.stacked_qkv {
            let (all, activation) = matrix("qkv", rows[2].end, hidden)?;
            let input = of_static(activation);
            let scales = Scales::of(input, all.scale(), rows.clone(), hidden)?;
            let all = Arc::new(all);
            let part = |rows| WindowOfWeights::new(all.clone(), rows, 0..hidden).map(Arc::new);
            let [q, k, v] = rows.map(part);
            ([q?, k?, v?], activation, scales)
        } else {
            let [q, k, v] = [("q", 0), ("k", 1), ("v", 2)]
                .map(|(name, at): (_, usize)| matrix(name, rows[at].len(), hidden));
            let mut weights = [q?, k?, v?];
            let mut activation = weights[0].1;
            if of_static(activation).is_some() {
                let largest =
                    |scales: [Option<f32>; 3]| scales.into_iter().flatten().fold(0.0, f32::max);
                let input = largest(weights.each_ref().map(|(_, of)| of_static(*of)));
                let scale = largest(weights.each_ref().map(|(of, _)| of.tensor_scale()));
                activation = Fp8Activation::Static(input);
                for (weights, _) in &mut weights {
                    weights.rescale(scale);
                }
            }
            let [q, k, v] = weights.map(|(weights, _)| weights);
            let parts = [&q, &k, &v]
                .map(|weights| scale_of_rows(weights.scale(), 0..weights.out_features(), hidden));
            let [of_q, of_k, of_v] = parts;
            let scales = Scales {
                input: of_static(activation),
                parts: [of_q?, of_k?, of_v?],
                rows: rows.map(|rows| rows.len()),
                columns: hidden,
            };
            ([Arc::new(q), Arc::new(k), Arc::new(v)], activation, scales)
        };
        let [q_dims, _] = arguments.dims();
        let (o, of_o) = matrix("o", hidden, q_dims)?;
        let [q, k, v] = parts;
        let weights = LayerWeights {
            q,
            k,
            v,
            o: Arc::new(o),
            heads: arguments.heads(state)?,
            activations: [
                Some(activation),
                Some(activation),
                Some(activation),
                Some(of_o),
            ],
        };
        let mut layer = Self::of(arguments, weights, host)?;
        layer.float8 = Some(scales);
        Ok(layer)
    }

    /// The static scale of the activations that meet q, k and v, the largest of the three; `None` where
    /// there is none.
    pub fn qkv_input_scale(&self) -> Option<f32> {
        self.float8.as_ref()?.input
    }

    /// The scales of q's, k's and v's weights: the largest of three static ones; those of rows or blocks, or
    /// that of each tensor for its rows, one below the other. `None` if weights are not float8.
    pub fn qkv_weight_scale(&self) -> Option<Fp8WeightScale> {
        self.float8.as_ref().map(Scales::all)
    }
}
