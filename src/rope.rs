use std::sync::Arc;

use crate::angle::Angles;

/// Which two dims of the rotated window `x[0..rotary_dim]` form a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pairing {
    /// `(x[i], x[i + rotary_dim / 2])`: GPT-NeoX and most Hugging Face models (`rotate_half`),
    /// MLX `traditional=False`, llama.cpp's neox mode, vLLM `is_neox_style=True`.
    HalfSplit,
    /// `(x[2i], x[2i + 1])`: the RoFormer paper, GPT-J, Meta's Llama (complex form), GGUF files of
    /// the llama architecture, MLX `traditional=True`.
    Interleaved,
}

impl Pairing {
    /// The name that kernels carry: `half_split` or `interleaved`.
    pub const fn name(self) -> &'static str {
        match self {
            Pairing::HalfSplit => "half_split",
            Pairing::Interleaved => "interleaved",
        }
    }
}

/// Which way to turn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Direction {
    /// `a' = a cos - b sin`, `b' = a sin + b cos`.
    #[default]
    Forward,
    /// By the negative angle: `a' = a cos + b sin`, `b' = b cos - a sin`. This is the transposed
    /// map, and so the backward pass; an attention factor multiplies here too.
    Inverse,
}

/// A rotation: angles, pairing and direction. Cheap to clone.
///
/// For a pair `(a, b)` with the angle's `cos` and `sin`, in f32, in this order of operations:
/// `a' = fma(a, cos, -(b * sin))`, `b' = fma(a, sin, b * cos)`, then one rounding to the element
/// type. Results are the same bits on every backend, in the default floating-point environment
/// (nearest even, subnormals kept).
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    angles: Arc<Angles>,
    pairing: Pairing,
    direction: Direction,
}

impl Rope {
    /// A forward rotation by `angles`: [`Frequencies`](crate::Frequencies),
    /// [`FrequencyRows`](crate::FrequencyRows) or a [`CosSinTable`](crate::CosSinTable).
    pub fn new(angles: impl Into<Angles>, pairing: Pairing) -> Self {
        Self {
            angles: Arc::new(angles.into()),
            pairing,
            direction: Direction::Forward,
        }
    }

    /// The same rotation in the given direction.
    pub fn with_direction(mut self, direction: Direction) -> Self {
        self.direction = direction;
        self
    }

    /// The angle source.
    pub fn angles(&self) -> &Angles {
        &self.angles
    }

    /// Which dims form a pair.
    pub fn pairing(&self) -> Pairing {
        self.pairing
    }

    /// Which way it turns.
    pub fn direction(&self) -> Direction {
        self.direction
    }

    /// Dims that rotate in each head; always even.
    pub fn rotary_dim(&self) -> usize {
        2 * self.angles.pairs()
    }

    /// Whether both turn alike by one angle source (the same object, not equal values).
    pub(crate) fn is_same(&self, other: &Rope) -> bool {
        Arc::ptr_eq(&self.angles, &other.angles)
            && self.pairing == other.pairing
            && self.direction == other.direction
    }

    /// Factors for cos and sin where the attention factor is `factor`: negative for sin in the
    /// inverse.
    pub(crate) fn scales(&self, factor: f32) -> (f32, f32) {
        match self.direction {
            Direction::Forward => (factor, factor),
            Direction::Inverse => (factor, -factor),
        }
    }
}
