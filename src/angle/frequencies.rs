use super::double_double::{DoubleDouble, INV_TAU};
use super::phase;
use crate::Error;

/// Largest frequency accepted, in radians per position: far above any use, and small enough that its
/// whole turns leave more than 64 bits of the fraction.
const MAX_INV_FREQ: f64 = 4294967296.0;

/// One rotation frequency per pair, each a 64-bit fixed-point fraction of a turn per position.
///
/// Pair `i` at position `p` has the phase `steps[i] * p mod 2^64`, where `2^64` is one turn. This
/// is integer arithmetic: it has no rounding, no largest position, and negative positions wrap to
/// the right phase. The only error is that of the step itself, less than one unit of `2^-64` turn
/// per position.
///
/// ```
/// use phasor::Frequencies;
///
/// # fn main() -> Result<(), phasor::Error> {
/// let frequencies = Frequencies::from_theta(10_000.0, 128)?;
/// let (cos, sin) = frequencies.cos_sin(0, 1_000_000_007);
/// assert!((f64::from(cos) - 1_000_000_007f64.cos()).abs() < 1.2e-7);
/// assert!((f64::from(sin) - 1_000_000_007f64.sin()).abs() < 1.2e-7);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Frequencies {
    steps: Vec<u64>,
    attention_factor: f32,
}

impl Frequencies {
    /// The frequencies of the RoFormer paper (Su et al., 2021): pair `i` turns by
    /// `theta^(-2i / rotary_dim)` radians per position.
    ///
    /// Each pair takes a power in extended precision, a microsecond or two: once per model it does
    /// not matter, but check a `rotary_dim` that comes from a file against head_dim first.
    ///
    /// # Errors
    /// [`Error::RotaryDim`] if `rotary_dim` is zero, odd or above 2^28; [`Error::Theta`] if `theta`
    /// is not a finite number of at least 2^-32.
    pub fn from_theta(theta: f64, rotary_dim: usize) -> Result<Self, Error> {
        check_rotary_dim(rotary_dim)?;
        let smallest = MAX_INV_FREQ.recip();
        if !theta.is_finite() || theta < smallest {
            return Err(Error::Theta { theta });
        }
        let ln_theta = DoubleDouble::ln(theta);
        let dim = DoubleDouble::from(rotary_dim as f64);
        let steps = (0..rotary_dim / 2)
            .map(|i| {
                let exponent = DoubleDouble::from(-2.0 * i as f64).div(dim);
                ln_theta.mul(exponent).exp().mul(INV_TAU).to_turn_fraction()
            })
            .collect();
        Self::from_steps(steps)
    }

    /// Frequencies in radians per position, one per pair. Negative ones turn the other way.
    ///
    /// An `f64` holds 53 bits, so phases are off by up to `inv_freq * position * 2^-53` radians;
    /// where `inv_freq` follows from a theta, [`Frequencies::from_theta`] is exact.
    ///
    /// # Errors
    /// [`Error::RotaryDim`] if the slice is empty or longer than 2^27; [`Error::InvFreq`] for a value that is not
    /// finite or above 2^32 in magnitude.
    pub fn from_inv_freq(inv_freq: &[f64]) -> Result<Self, Error> {
        let steps = inv_freq
            .iter()
            .enumerate()
            .map(|(pair, &value)| {
                if value.abs() <= MAX_INV_FREQ {
                    Ok(DoubleDouble::from(value).mul(INV_TAU).to_turn_fraction())
                } else {
                    Err(Error::InvFreq { pair, value })
                }
            })
            .collect::<Result<_, _>>()?;
        Self::from_steps(steps)
    }

    /// Frequencies as fractions of a turn per position, in units of `2^-64` turn.
    ///
    /// # Errors
    /// [`Error::RotaryDim`] if the vector is empty or longer than 2^27.
    pub fn from_steps(steps: Vec<u64>) -> Result<Self, Error> {
        check_rotary_dim(steps.len().saturating_mul(2))?;
        Ok(Self {
            steps,
            attention_factor: 1.0,
        })
    }

    /// Multiplies cos and sin by `factor`, with one rounding each (YaRN's and LongRoPE's
    /// attention factor). A score `q . k` of rotated dims then grows by its square; dims that do
    /// not rotate keep their scale.
    ///
    /// # Errors
    /// [`Error::AttentionFactor`] unless `factor` is positive and finite.
    pub fn with_attention_factor(mut self, factor: f32) -> Result<Self, Error> {
        if !(factor.is_finite() && factor > 0.0) {
            return Err(Error::AttentionFactor { factor });
        }
        self.attention_factor = factor;
        Ok(self)
    }

    /// Pairs that rotate in each head: `rotary_dim / 2`.
    pub fn pairs(&self) -> usize {
        self.steps.len()
    }

    /// One step per pair, in units of `2^-64` turn per position.
    pub fn steps(&self) -> &[u64] {
        &self.steps
    }

    /// The factor that multiplies cos and sin.
    pub fn attention_factor(&self) -> f32 {
        self.attention_factor
    }

    /// The phase of a pair at a position, in units of `2^-64` turn.
    ///
    /// # Panics
    /// If `pair` is not below [`pairs`](Self::pairs), as indexing does.
    pub fn phase(&self, pair: usize, position: i64) -> u64 {
        self.steps[pair].wrapping_mul(position as u64)
    }

    /// cos and sin of a pair at a position, the attention factor included: the very values that
    /// every backend rotates with. For positions within ±2^31 the absolute error is below 2^-23
    /// without an attention factor; a factor scales it, and adds its own rounding.
    ///
    /// # Panics
    /// If `pair` is not below [`pairs`](Self::pairs), as indexing does.
    pub fn cos_sin(&self, pair: usize, position: i64) -> (f32, f32) {
        let (cos, sin) = phase::cos_sin(self.phase(pair, position));
        (cos * self.attention_factor, sin * self.attention_factor)
    }
}

/// Kernels count dims and bytes of a head in 32 bits.
const MAX_ROTARY_DIM: usize = 1 << 28;

pub(super) fn check_rotary_dim(rotary_dim: usize) -> Result<(), Error> {
    if rotary_dim == 0 || rotary_dim % 2 == 1 || rotary_dim > MAX_ROTARY_DIM {
        return Err(Error::RotaryDim { rotary_dim });
    }
    Ok(())
}
