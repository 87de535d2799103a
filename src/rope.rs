use std::sync::Arc;

use crate::Error;
use crate::angle::Angles;

/// Which two dims of the rotated window `x[0..rotary_dim]` form a pair.
///
/// ```
/// # fn main() -> Result<(), phasor::Error> {
/// use phasor::{Dtype, Frequencies, Host, Layout, Pairing, Positions, Problem, Rope};
///
/// // One pair that turns by a quarter and one that stays: (1, 2) and (3, 4), wherever they lie.
/// let turned = |pairing, mut head: [f32; 4]| {
///     let quarter = Frequencies::from_inv_freq(&[std::f64::consts::FRAC_PI_2, 0.0])?;
///     let rotator = Host::new().rotator(&Rope::new(quarter, pairing));
///     let plan = rotator.plan(&Problem::new(Dtype::F32).q(Layout::tokens(1, 1, 4)))?;
///     rotator.rotate(&plan, Some((&mut head[..]).into()), None, Positions::start(1))?;
///     Ok::<_, phasor::Error>(head.map(f32::round))
/// };
/// assert_eq!(turned(Pairing::HalfSplit, [1.0, 3.0, 2.0, 4.0])?, [-2.0, 3.0, 1.0, 4.0]);
/// assert_eq!(turned(Pairing::Interleaved, [1.0, 2.0, 3.0, 4.0])?, [-2.0, 1.0, 3.0, 4.0]);
/// # Ok(())
/// # }
/// ```
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
///
/// # Plans belong to a rotation
///
/// A [`Plan`](crate::Plan) serves the rotation that it was made for, and every rotator of it: the
/// same object, its clones, and what has their angles and was given the same pairings and direction.
/// Equal values are not enough, for comparing whole tables would cost more than a call. So of two
/// ropes made by the same calls, say `config.rope()` once for each layer, or once for planning and
/// once for the rotator, each refuses the other's plans with [`Error::PlanMismatch`], although `==`
/// finds them equal: make the rope once and clone it. [`backward`](Self::backward) keeps the angles,
/// so that all backward passes of one rope share plans; [`shift`](Self::shift) makes angles of its
/// own at every call.
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
    /// sequence ([`PositionKind::PerSequence`](crate::PositionKind::PerSequence)), it turns the
    /// rest of the way. The attention factor is in the keys already and is not applied again; the
    /// result is off by one more rounding than a rotation of the original keys. With rows of
    /// frequencies each sequence has to keep its row.
    ///
    /// Keys in the slots of a cache, quantised ones too, are moved by
    /// [`HostRotator::shift_cached`](crate::HostRotator::shift_cached), of a rotator of what this returns;
    /// others by a plain plan:
    ///
    /// ```
    /// use phasor::{
    ///     Dtype, Frequencies, Host, InOut, Layout, Pairing, Positions, Problem, Rope,
    /// };
    ///
    /// # fn main() -> Result<(), phasor::Error> {
    /// let frequencies = Frequencies::from_theta(10_000.0, 64)?.with_attention_factor(1.2)?;
    /// let rope = Rope::new(frequencies, Pairing::HalfSplit);
    /// // Two sequences with 100 cached keys each: the first drops 512 tokens before them.
    /// let shift = Host::new().rotator(&rope.shift()?);
    /// let layout = Layout::bshd(2, 100, 8, 64);
    /// let problem = Problem::new(Dtype::F32).k(layout);
    /// let plan = shift.plan(&problem)?;
    /// let mut keys = vec![1.0f32; 2 * 100 * 8 * 64];
    /// let by = Positions::per_sequence(&[-512, 0]);
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

    /// The row of frequencies that a call has to give for a sequence of `length` tokens, those in its
    /// cache included; `None` where a call gives no row, as the rotation has none or its positions
    /// choose. So a caller needs not know which angles a model has:
    ///
    /// ```
    /// use phasor::config::{LongRopeScaling, RopeConfig, Scaling};
    /// use phasor::{Error, Positions};
    ///
    /// # fn main() -> Result<(), phasor::config::ConfigError> {
    /// # let plain = RopeConfig::new(10_000.0, 96)?;
    /// # let long_rope = LongRopeScaling::new(vec![1.0; 48], vec![4.0; 48], 4096);
    /// # let scaled = plain.clone().with_scaling(Scaling::LongRope(long_rope))?;
    /// # for (config, expected) in [(plain, None), (scaled, Some(vec![0, 1]))] {
    /// let rope = config.rope()?;
    /// // Sequences that each have a length of their own.
    /// let (starts, lengths) = ([70i64, 8999], [71, 9000]);
    /// let rows = lengths.iter().map(|&length| rope.row_for_length(length));
    /// let rows: Option<Vec<u32>> = rows.collect::<Result<_, Error>>()?;
    /// let mut positions = Positions::start_per_sequence(&starts);
    /// if let Some(rows) = &rows {
    ///     positions = positions.frequency_rows_per_sequence(rows);
    /// }
    /// # assert_eq!(positions.frequency_row_ids().is_some(), rows.is_some());
    /// # assert_eq!(rows, expected);
    /// # }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::NoRowForLength`] if the sequence is longer than any row serves, or the rows have no
    /// [lengths](crate::FrequencyRows::with_lengths).
    pub fn row_for_length(&self, length: u64) -> Result<Option<u32>, Error> {
        match &*self.angles {
            Angles::Rows(rows) if rows.boundary().is_none() => {
                rows.row_for_length(length).map(Some)
            }
            Angles::Exact(_) | Angles::Rows(_) | Angles::Table(_) => Ok(None),
        }
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

    /// Whether both turn alike by one angle source (the same object, not equal values).
    pub(crate) fn is_same(&self, other: &Rope) -> bool {
        Arc::ptr_eq(&self.angles, &other.angles)
            && self.pairing == other.pairing
            && self.output_pairing == other.output_pairing
            && self.direction == other.direction
    }
}
