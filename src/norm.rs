//! Norms of the heads of q and k (QK-norm), as models apply them before or after the rotation.
//!
//! Values are taken as f32, and every operation below rounds once to f32, so that results are the same on
//! every device. The sum over the dims of a head has one order, which depends on head_dim alone:
//!
//! 1. two dims that follow each other, as they are stored, make a pair, `p = fma(x[2k + 1], x[2k + 1], x[2k] * x[2k])`;
//! 2. two pairs make a group of four dims, `g = p[2k] + p[2k + 1]`; dims past the last are 0;
//! 3. groups, with zeros up to a power of two, are folded in halves: `g[i] += g[i + n / 2]`, then `n / 4`,
//!    down to one.
//!
//! A norm across heads folds the sums of its heads in the same way. Then
//!
//! ```text
//! mean = sum / count        r = 1 / sqrt(mean + eps)        y = (x * r) * g
//! ```
//!
//! where `count` is how many dims were summed, and `g` is the weight, or the offset plus the weight. A
//! LayerNorm first takes the mean of `x` from it, by sums `p = x[2k] + x[2k + 1]` in the same order, and in
//! the end adds a bias. The result is rounded to the element type once; where
//! [`round_before_weight`](HeadNorm::round_before_weight) is set, `x * r` is rounded to it too.
//!
//! ```
//! use phasor::norm::HeadNorm;
//!
//! # fn main() -> Result<(), phasor::Error> {
//! let mut heads = [3.0f32, 4.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0];
//! HeadNorm::rms(0.0).apply(&mut heads, 4, None, None)?;
//! assert_eq!(heads, [1.2, 1.6, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]);
//! # Ok(())
//! # }
//! ```
//!
//! Sources: "Root Mean Square Layer Normalization" (Zhang and Sennrich, 2019), "Layer Normalization" (Ba
//! et al., 2016), "Scaling Vision Transformers to 22 Billion Parameters" (Dehghani et al., 2023) for norms
//! of q and k.

use crate::{Element, Error};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Rms,
    Layer,
}

/// A norm of heads.
///
/// ```
/// use phasor::Stages;
/// use phasor::norm::HeadNorm;
///
/// let qwen3 = HeadNorm::rms(1e-6).round_before_weight().round_after(); // as transformers rounds
/// let gemma3 = HeadNorm::rms(1e-6).with_weight_offset(1.0);
/// let olmo2 = HeadNorm::rms(1e-6).across_heads();
/// let cohere = HeadNorm::layer(1e-5);
/// // In a step, before the rotation or after it:
/// let llama4 = HeadNorm::rms(1e-5);
/// let stages = [Stages::new().norm(gemma3), Stages::new().norm_after_rotation(llama4)];
/// # let _ = (qwen3, olmo2, cohere, stages);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HeadNorm {
    pub(crate) kind: Kind,
    pub(crate) eps: f32,
    pub(crate) weight_offset: f32,
    pub(crate) round_before_weight: bool,
    pub(crate) round_after: bool,
    pub(crate) across_heads: bool,
}

impl HeadNorm {
    const fn new(kind: Kind, eps: f32) -> Self {
        Self {
            kind,
            eps,
            weight_offset: 0.0,
            round_before_weight: false,
            round_after: false,
            across_heads: false,
        }
    }

    /// The root mean square (Qwen3, Gemma 3, GLM-4-MoE and most others).
    pub const fn rms(eps: f32) -> Self {
        Self::new(Kind::Rms, eps)
    }

    /// LayerNorm (Cohere, StableLM, Phi, Persimmon).
    pub const fn layer(eps: f32) -> Self {
        Self::new(Kind::Layer, eps)
    }

    /// Added to weights: 1 in Gemma 1 to 3.
    pub const fn with_weight_offset(mut self, offset: f32) -> Self {
        self.weight_offset = offset;
        self
    }

    /// Rounds to the element type before weights are applied, as transformers does in its Llama and Qwen
    /// models. Otherwise results are rounded once (its Gemma and OLMo models, vLLM).
    pub const fn round_before_weight(mut self) -> Self {
        self.round_before_weight = true;
        self
    }

    /// Rounds to the element type before what follows in a call, as systems do that norm and rotate in
    /// steps of their own. Otherwise values stay f32 up to the last stage. ([`apply`](Self::apply) has no
    /// other stage, and rounds in any case.)
    pub const fn round_after(mut self) -> Self {
        self.round_after = true;
        self
    }

    /// One statistic over all heads (OLMo 2, MiniMax-M2). Otherwise each head has its own.
    pub const fn across_heads(mut self) -> Self {
        self.across_heads = true;
        self
    }

    /// Norms the heads of one token, `[heads, head_dim]`, where they are. `weight` and `bias` are
    /// `[head_dim]`, for all heads, or `[heads, head_dim]`; without a weight, nothing is multiplied.
    ///
    /// # Errors
    /// [`Error::NormLength`] unless head_dim is even, above 0 and divides the elements, and weight and bias
    /// are as long as one head or all. Nothing is written then.
    pub fn apply<T: Element>(
        &self,
        heads: &mut [T],
        head_dim: usize,
        weight: Option<&[T]>,
        bias: Option<&[T]>,
    ) -> Result<(), Error> {
        let check = |what, len: usize, expected: bool| match expected {
            true => Ok(()),
            false => Err(Error::NormLength {
                what,
                len,
                head_dim,
            }),
        };
        let len = heads.len();
        let even = head_dim > 0 && head_dim.is_multiple_of(2);
        check("the heads", len, even && len.is_multiple_of(head_dim))?;
        for (what, of_dims) in [("the weight", weight), ("the bias", bias)] {
            let of_dims = of_dims.map_or(len, <[T]>::len);
            check(what, of_dims, of_dims == head_dim || of_dims == len)?;
        }
        let step = match self.across_heads {
            true => len.max(1),
            false => head_dim,
        };
        let one_or_all = |of_dims: Option<&[T]>, at: usize| {
            of_dims.map(|of_dims| of_dims[at % of_dims.len()].widen())
        };
        for first in (0..len).step_by(step) {
            let part = &mut heads[first..first + step];
            let (mean, r) = self.statistic(part, head_dim);
            for (at, x) in (first..).zip(part) {
                let mut y = (x.widen() - mean) * r;
                if self.round_before_weight {
                    y = T::narrow(y).widen();
                }
                if let Some(weight) = one_or_all(weight, at) {
                    y *= match self.weight_offset {
                        0.0 => weight,
                        offset => offset + weight,
                    };
                }
                if let Some(bias) = one_or_all(bias, at) {
                    y += bias;
                }
                *x = T::narrow(y);
            }
        }
        Ok(())
    }

    /// What is taken from each element, and what it is then multiplied by.
    fn statistic<T: Element>(&self, heads: &[T], head_dim: usize) -> (f32, f32) {
        // Exact up to 2^24 dims.
        let count = heads.len() as f32;
        let sum = |pair: &dyn Fn(f32, f32) -> f32| {
            folded(heads.len() / head_dim, &|head| {
                sum_of_head(&heads[head * head_dim..][..head_dim], pair)
            })
        };
        let mean = match self.kind {
            Kind::Rms => 0.0,
            Kind::Layer => sum(&|a, b| a + b) / count,
        };
        let squares = sum(&|a, b| {
            let (a, b) = (a - mean, b - mean);
            b.mul_add(b, a * a)
        });
        (mean, 1.0 / (squares / count + self.eps).sqrt())
    }
}

/// The sum of a head of an even number of dims, of which `pair` makes that of two.
fn sum_of_head<T: Element>(head: &[T], pair: &dyn Fn(f32, f32) -> f32) -> f32 {
    let pair = |dims: &[T]| match dims {
        [a, b, ..] => pair(a.widen(), b.widen()),
        _ => 0.0,
    };
    folded(head.len().div_ceil(4), &|group| {
        let dims = &head[4 * group..];
        pair(dims) + pair(dims.get(2..).unwrap_or_default())
    })
}

/// The sum of `count` terms, and of zeros up to a power of two, folded in halves.
fn folded(count: usize, term: &dyn Fn(usize) -> f32) -> f32 {
    /// What comes to be the term `at` when `left` terms are left.
    fn left_of(at: usize, left: usize, count: usize, term: &dyn Fn(usize) -> f32) -> f32 {
        if left < count {
            left_of(at, 2 * left, count, term) + left_of(at + left, 2 * left, count, term)
        } else if at < count {
            term(at)
        } else {
            0.0
        }
    }
    left_of(0, 1, count, term)
}
