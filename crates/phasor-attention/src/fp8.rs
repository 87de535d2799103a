//! Projections whose weights and activations are e4m3.

use crate::AttentionError;
use crate::codes::e4m3;
use crate::error::{agree, usable};
use crate::projection::{Projection, Weights, check_features, product, tokens_of};
use phasor::half::bf16;
use phasor::quantize::e4m3_from_f32;

use phasor::{Dtype, Element};
use std::ops::Range;

/// The largest value of e4m3.
const MOST: f32 = 448.0;

/// The scales of a weight: a value is its code times its scale.
#[derive(Clone, Debug, PartialEq)]
pub enum Fp8WeightScale {
    /// One for all.
    Tensor(f32),
    /// One a row, `[out_features]`.
    Rows(Vec<f32>),
    /// One a block, `[ceil(out_features / block[0]), ceil(in_features / block[1])]`.
    Blocks {
        /// Row-major.
        scales: Vec<f32>,
        /// Rows and columns of a block.
        block: [usize; 2],
    },
}

/// Weights of e4m3 with their scales. Values are products rounded to f32.
#[derive(Clone, Debug)]
pub struct Fp8Weights<S = Vec<u8>> {
    codes: S,
    scale: Fp8WeightScale,
    out_features: usize,
    in_features: usize,
}

impl<S: AsRef<[u8]>> Fp8Weights<S> {
    /// Their scales.
    pub fn scale(&self) -> &Fp8WeightScale {
        &self.scale
    }

    /// Their codes.
    pub fn codes(&self) -> &[u8] {
        self.codes.as_ref()
    }

    /// The scales as those of blocks, and rows and columns of a block.
    pub(crate) fn blocks(&self) -> (&[f32], [usize; 2]) {
        match &self.scale {
            Fp8WeightScale::Tensor(scale) => (
                std::slice::from_ref(scale),
                [self.out_features, self.in_features],
            ),
            Fp8WeightScale::Rows(scales) => (scales, [1, self.in_features]),
            Fp8WeightScale::Blocks { scales, block } => (scales, *block),
        }
    }

    /// Codes `[out_features, in_features]`.
    ///
    /// # Errors
    /// [`AttentionError::Mismatch`] for codes or scales of another count, [`AttentionError::Value`] for no
    /// rows, columns or dims of a block.
    pub fn new(
        codes: S,
        scale: Fp8WeightScale,
        out_features: usize,
        in_features: usize,
    ) -> Result<Self, AttentionError> {
        check_features(out_features, in_features)?;
        agree(
            "codes of a weight",
            out_features.saturating_mul(in_features),
            codes.as_ref().len(),
        )?;
        match &scale {
            Fp8WeightScale::Tensor(_) => {}
            Fp8WeightScale::Rows(scales) => agree("scales, one a row", out_features, scales.len())?,
            Fp8WeightScale::Blocks { scales, block } => {
                check_features(block[0], block[1])?;
                let blocks = out_features.div_ceil(block[0]) * in_features.div_ceil(block[1]);
                agree("scales, one a block", blocks, scales.len())?;
            }
        }
        Ok(Self {
            codes,
            scale,
            out_features,
            in_features,
        })
    }
}

impl Fp8Weights {
    /// The scale of the tensor, if it has one.
    pub(crate) fn tensor_scale(&self) -> Option<f32> {
        match self.scale {
            Fp8WeightScale::Tensor(scale) => Some(scale),
            _ => None,
        }
    }

    /// Codes of the same values by another scale of the tensor.
    pub(crate) fn rescale(&mut self, to: f32) {
        let Some(from) = self.tensor_scale().filter(|&from| from != to) else {
            return;
        };
        let inverse = 1.0 / to;
        for code in &mut self.codes {
            *code = e4m3_from_f32(e4m3(*code) * from * inverse);
        }
        self.scale = Fp8WeightScale::Tensor(to);
    }
}

impl<S: AsRef<[u8]> + Send + Sync> Weights for Fp8Weights<S> {
    fn in_features(&self) -> usize {
        self.in_features
    }

    fn out_features(&self) -> usize {
        self.out_features
    }

    fn read(&self, rows: Range<usize>, values: &mut [f32]) {
        let columns = self.in_features;
        let codes = &self.codes.as_ref()[rows.start * columns..rows.end * columns];
        let codes = codes.chunks_exact(columns);
        let (scales, [of_rows, run]) = self.blocks();
        let of_row = columns.div_ceil(run);
        for ((row, codes), values) in rows.zip(codes).zip(values.chunks_exact_mut(columns)) {
            let scales = &scales[row / of_rows * of_row..][..of_row];
            let runs = codes.chunks(run).zip(values.chunks_mut(run));
            for ((codes, values), scale) in runs.zip(scales) {
                for (value, &code) in values.iter_mut().zip(codes) {
                    *value = e4m3(code) * scale;
                }
            }
        }
    }
}

/// How activations become e4m3.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fp8Activation {
    /// By one scale for all, known beforehand: `x * (1 / scale)`, the inverse rounded to f32.
    Static(f32),
    /// By the scale of each token, `min(amax, most_amax) / 448`, rounded to a type; then `x * (1 / scale)`.
    PerToken {
        /// What `amax` counts as at most (`activation_scale_ub`; 1200 is usual), or infinity.
        most_amax: f32,
        /// The type that a scale is rounded to: MAX takes that of the weight's scales.
        scale_dtype: Dtype,
    },
    /// By the scale of so many elements of a token, likewise and in f32.
    Blocks(usize),
}

impl Fp8Activation {
    /// What a token's elements become: the values of their codes, `code * scale` rounded to f32. `amax`
    /// leaves a NaN out; one among the elements stays.
    pub fn round(self, token: &mut [f32]) {
        match self {
            Fp8Activation::Static(scale) => round_by(scale, token),
            Fp8Activation::PerToken {
                most_amax,
                scale_dtype,
            } => {
                let scale = most(token).min(most_amax) / MOST;
                let scale = match scale_dtype {
                    Dtype::Bf16 => bf16::narrow(scale).widen(),
                    Dtype::F16 => phasor::half::f16::narrow(scale).widen(),
                    _ => scale,
                };
                round_by(scale, token);
            }
            Fp8Activation::Blocks(dims) => {
                // No block has no dims: of `Fp8Linear` that is refused.
                for block in token.chunks_mut(dims.max(1)) {
                    round_by(most(block) / MOST, block);
                }
            }
        }
    }
}

fn most(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |most, x| most.max(x.abs()))
}

/// A scale whose inverse is not finite makes zeros.
fn round_by(scale: f32, x: &mut [f32]) {
    let inverse = match 1.0 / scale {
        inverse if inverse.is_finite() => inverse,
        _ => 0.0,
    };
    for x in x {
        *x = e4m3(e4m3_from_f32(*x * inverse)) * scale;
    }
}

/// The product of e4m3 activations with e4m3 weights. Both have the values of their codes, times their
/// scales, in f32, and so has the product; a GPU that multiplies codes and scales the sum differs by that
/// rounding.
#[derive(Clone, Debug)]
pub struct Fp8Linear<W = Fp8Weights> {
    weights: W,
    activation: Fp8Activation,
}

impl<S: AsRef<[u8]> + Send + Sync> Fp8Linear<Fp8Weights<S>> {
    /// Weights, and how activations meet them: static with a scale of the tensor, per token with scales of
    /// the tensor or of rows, in blocks with blocks as wide.
    ///
    /// # Errors
    /// [`AttentionError::Weights`] for another combination, [`AttentionError::Factor`] for a scale that
    /// cannot be used.
    pub fn new(weights: Fp8Weights<S>, activation: Fp8Activation) -> Result<Self, AttentionError> {
        activation.check(&weights.scale)?;
        Ok(Self {
            weights,
            activation,
        })
    }
}

impl Fp8Activation {
    /// Whether it goes with weights of such scales.
    pub(crate) fn check(self, of_weights: &Fp8WeightScale) -> Result<(), AttentionError> {
        let fits = match (self, of_weights) {
            (Fp8Activation::Static(scale), Fp8WeightScale::Tensor(_)) => {
                usable("the scale of activations", f64::from(scale))?;
                true
            }
            (
                Fp8Activation::PerToken { most_amax, .. },
                Fp8WeightScale::Tensor(_) | Fp8WeightScale::Rows(_),
            ) => {
                if most_amax != f32::INFINITY {
                    usable("most_amax", f64::from(most_amax))?;
                }
                true
            }
            (Fp8Activation::Blocks(dims), Fp8WeightScale::Blocks { block, .. }) => dims == block[1],
            _ => false,
        };
        match fits {
            true => Ok(()),
            false => Err(AttentionError::Weights {
                what: "float8 scales of weights and activations",
                remedy: "give a static scale with one of the tensor, scales per token with those of the \
                         tensor or of rows, or blocks of equal width",
            }),
        }
    }
}

impl<W: Weights> Fp8Linear<W> {
    /// Activations are rounded as they were checked to be for all of the weights, of which these are a part.
    pub(crate) fn of_part(weights: W, activation: Fp8Activation) -> Self {
        Self {
            weights,
            activation,
        }
    }
}

impl<T: Element, W: Weights> Projection<T> for Fp8Linear<W> {
    fn in_features(&self) -> usize {
        self.weights.in_features()
    }

    fn out_features(&self) -> usize {
        self.weights.out_features()
    }

    fn forward(&self, x: &[T], out: &mut [T]) -> Result<(), AttentionError> {
        let features = [self.weights.in_features(), self.weights.out_features()];
        let tokens = tokens_of(features, x.len(), out.len())?;
        let mut x: Vec<f32> = x.iter().map(|x| x.widen()).collect();
        for token in x.chunks_exact_mut(self.weights.in_features()) {
            self.activation.round(token);
        }
        product(&x, tokens, &self.weights, out);
        Ok(())
    }
}
