use std::sync::Arc;

use crate::Error;
use crate::angle::Angles;
use crate::angle::phase::Scale;

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

/// The pairings of what is read and of what is written.
#[derive(Clone, Copy)]
pub struct Pairings {
    pub(crate) source: Pairing,
    pub(crate) destination: Pairing,
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
    output_pairing: Pairing,
    direction: Direction,
}

impl Rope {
    /// A forward rotation by `angles`: [`Frequencies`](crate::Frequencies),
    /// [`FrequencyRows`](crate::FrequencyRows) or a [`CosSinTable`](crate::CosSinTable).
    pub fn new(angles: impl Into<Angles>, pairing: Pairing) -> Self {
        Self {
            angles: Arc::new(angles.into()),
            pairing,
            output_pairing: pairing,
            direction: Direction::Forward,
        }
    }

    /// The same rotation, with the rotated pairs put where another pairing has them: pair `i` is
    /// read from its place in [`pairing`](Self::pairing) and written to its place in this one. Only
    /// out of place. (Hugging Face transformers does this for DeepSeek-V3 and its relatives:
    /// interleaved in, half-split out.)
    pub fn with_output_pairing(mut self, pairing: Pairing) -> Self {
        self.output_pairing = pairing;
        self
    }

    /// The backward pass: the transposed map, which takes the gradient of what this rotation writes
    /// to the gradient of what it reads. It turns the other way, with the same attention factor,
    /// and from the output pairing to the pairing.
    pub fn backward(&self) -> Self {
        Self {
            angles: self.angles.clone(),
            pairing: self.output_pairing,
            output_pairing: self.pairing,
            direction: match self.direction {
                Direction::Forward => Direction::Inverse,
                Direction::Inverse => Direction::Forward,
            },
        }
    }

    /// A rotation that moves what this one has rotated to other positions, in one pass (context
    /// shift of cached keys): at `position = new - old`, positive or negative and the same for all tokens of a
    /// sequence ([`PositionKind::PerRow`](crate::PositionKind::PerRow)), it turns the
    /// rest of the way. The attention factor is in the keys already and is not applied again; the
    /// result is off by one more rounding than a rotation of the original keys. With rows of
    /// frequencies each sequence has to keep its row.
    ///
    /// ```
    /// use phasor::{
    ///     Dtype, Frequencies, Host, InOut, Layout, Pairing, PositionKind, Positions, Problem, Rope,
    /// };
    ///
    /// # fn main() -> Result<(), phasor::Error> {
    /// let frequencies = Frequencies::from_theta(10_000.0, 64)?.with_attention_factor(1.2)?;
    /// let rope = Rope::new(frequencies, Pairing::HalfSplit);
    /// // Two sequences with 100 cached keys each: the first drops 512 tokens before them.
    /// let shift = Host::new().rotator(&rope.shift()?);
    /// let layout = Layout::bshd(2, 100, 8, 64);
    /// let problem = Problem::new(Dtype::F32).k(layout).positions(PositionKind::PerRow);
    /// let plan = shift.plan(&problem)?;
    /// let mut keys = vec![1.0f32; 2 * 100 * 8 * 64];
    /// let by = Positions::per_row(&[-512, 0]);
    /// shift.rotate(&plan, None, Some(InOut::InPlace(&mut keys[..])), by)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Shift`] where angles do not add up: for a table, and for rows that positions choose.
    pub fn shift(&self) -> Result<Self, Error> {
        let angles = match &*self.angles {
            Angles::Exact(frequencies) => frequencies.without_attention_factor().into(),
            Angles::Rows(rows) if rows.boundary().is_none() => {
                rows.without_attention_factors().into()
            }
            Angles::Rows(_) => {
                return Err(Error::Shift {
                    what: "rows that positions choose",
                });
            }
            Angles::Table(_) => {
                return Err(Error::Shift {
                    what: "a table of cos and sin",
                });
            }
        };
        Ok(Self {
            angles: Arc::new(angles),
            pairing: self.output_pairing,
            output_pairing: self.output_pairing,
            direction: self.direction,
        })
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

    /// Which dims form a pair in what is written; [`pairing`](Self::pairing) unless set.
    pub fn output_pairing(&self) -> Pairing {
        self.output_pairing
    }

    /// Which way it turns.
    pub fn direction(&self) -> Direction {
        self.direction
    }

    /// Dims that rotate in each head; always even.
    pub fn rotary_dim(&self) -> usize {
        2 * self.angles.pairs()
    }

    /// The pairings of what is read and of what is written.
    pub(crate) fn pairings(&self) -> Pairings {
        Pairings {
            source: self.pairing,
            destination: self.output_pairing,
        }
    }

    /// Whether both turn alike by one angle source (the same object, not equal values).
    pub(crate) fn is_same(&self, other: &Rope) -> bool {
        Arc::ptr_eq(&self.angles, &other.angles)
            && self.pairing == other.pairing
            && self.output_pairing == other.output_pairing
            && self.direction == other.direction
    }

    /// How cos and sin are formed where the attention factor is `factor`.
    pub(crate) fn scale(&self, factor: f32) -> Scale {
        Scale::new(factor, self.direction == Direction::Inverse)
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
