use super::CosSinTable;
use super::double_double::{DoubleDouble, INV_TAU};
use super::phase::{self, Scale};
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
    /// `[axes, pairs]`
    steps: Vec<u64>,
    axes: usize,
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
    /// [`Error::RotaryDim`] if `rotary_dim` is zero, odd or above 2^22; [`Error::Theta`] if `theta`
    /// is not a finite number of at least 2^-32; [`Error::Exchanged`] if the two look exchanged:
    /// more than 512 dims, and for theta an even number of at most 512. No model has that; whoever
    /// means it gives the frequencies with [`from_inv_freq`](Self::from_inv_freq).
    pub fn from_theta(theta: f64, rotary_dim: usize) -> Result<Self, Error> {
        Self::from_extended(&powers(theta, rotary_dim)?)
    }

    /// [`from_theta`](Self::from_theta) with all positions multiplied by `scale`, which may be zero
    /// or negative (MLX's `scale`; `1 / factor` of linear scaling).
    ///
    /// ```
    /// use phasor::Frequencies;
    ///
    /// # fn main() -> Result<(), phasor::Error> {
    /// let plain = Frequencies::from_theta(10_000.0, 64)?;
    /// let scaled = Frequencies::from_theta_scaled(10_000.0, 64, 0.25)?;
    /// assert_eq!(scaled.cos_sin(3, 4000), plain.cos_sin(3, 1000));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Those of [`from_theta`](Self::from_theta); [`Error::InvFreq`] for a `scale` that is not finite
    /// or lets a pair turn by more than 2^32 radians per position.
    pub fn from_theta_scaled(theta: f64, rotary_dim: usize, scale: f64) -> Result<Self, Error> {
        let scale = DoubleDouble::from(scale);
        let inv_freq: Vec<_> = powers(theta, rotary_dim)?
            .into_iter()
            .map(|power| power.mul(scale))
            .collect();
        Self::from_extended(&inv_freq)
    }

    /// Pair `i` turns by `scale / periods[i]` radians per position: MLX's `freqs`, which are periods in
    /// positions per radian. Infinity stops a pair.
    ///
    /// # Errors
    /// [`Error::RotaryDim`] if the slice is empty or longer than 2^27; [`Error::InvFreq`] for a
    /// quotient that is not a number or above 2^32 in magnitude.
    pub fn from_periods(periods: &[f64], scale: f64) -> Result<Self, Error> {
        let scale = DoubleDouble::from(scale);
        let of_period = |&period: &f64| {
            if period.is_infinite() {
                DoubleDouble::from(0.0)
            } else {
                scale.div(DoubleDouble::from(period))
            }
        };
        let inv_freq: Vec<_> = periods.iter().map(of_period).collect();
        Self::from_extended(&inv_freq)
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
        let inv_freq: Vec<_> = inv_freq.iter().map(|&x| DoubleDouble::from(x)).collect();
        Self::from_extended(&inv_freq)
    }

    /// Frequencies as fractions of a turn per position, in units of `2^-64` turn.
    ///
    /// # Errors
    /// [`Error::RotaryDim`] if the vector is empty or longer than 2^27.
    pub fn from_steps(steps: Vec<u64>) -> Result<Self, Error> {
        Self::from_axis_steps(steps, 1)
    }

    /// Steps for positions on several axes (time, height, width), row-major `[axes, pairs]`. The
    /// phase of a pair is the sum over all axes of step times position; an axis that does not turn
    /// a pair has a step of 0 there.
    ///
    /// # Errors
    /// [`Error::AxisSteps`] if the vector does not hold one row of steps per axis;
    /// [`Error::RotaryDim`] if a row is empty or longer than 2^27.
    pub fn from_axis_steps(steps: Vec<u64>, axes: usize) -> Result<Self, Error> {
        if axes == 0 || axes > MAX_AXES || !steps.len().is_multiple_of(axes) {
            return Err(Error::AxisSteps {
                steps: steps.len(),
                axes,
            });
        }
        check_rotary_dim((steps.len() / axes).saturating_mul(2))?;
        Ok(Self {
            steps,
            axes,
            attention_factor: 1.0,
        })
    }

    /// The same frequencies, each pair turning with the position on one of `axes` axes:
    /// pair `i` on `axis_of_pair[i]`. An axis may have no pairs.
    ///
    /// Models that do this: Qwen2-VL and Qwen3-VL (time, height, width), vision towers (height,
    /// width), video models. Where they form each axis' frequencies apart, give the result of
    /// [`from_inv_freq`](Self::from_inv_freq) or build the steps yourself.
    ///
    /// ```
    /// use phasor::Frequencies;
    ///
    /// # fn main() -> Result<(), phasor::Error> {
    /// // 4 pairs: the first two turn with the row of a patch, the others with its column.
    /// let frequencies = Frequencies::from_theta(10_000.0, 8)?.with_axes(2, &[0, 0, 1, 1])?;
    /// assert_eq!(frequencies.cos_sin_at(1, &[5, 9]), frequencies.cos_sin(1, 5));
    /// assert_eq!(frequencies.cos_sin_at(2, &[5, 9]), frequencies.cos_sin(2, 9));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::AxisOfPair`] unless there is one entry per pair and each is below `axes`;
    /// [`Error::AxisSteps`] if `axes` is 0 or above 16, or the frequencies have several axes
    /// already.
    pub fn with_axes(self, axes: usize, axis_of_pair: &[usize]) -> Result<Self, Error> {
        let pairs = self.pairs();
        if self.axes != 1 || axes == 0 || axes > MAX_AXES {
            return Err(Error::AxisSteps {
                steps: self.steps.len(),
                axes,
            });
        }
        if axis_of_pair.len() != pairs || axis_of_pair.iter().any(|&axis| axis >= axes) {
            return Err(Error::AxisOfPair {
                given: axis_of_pair.len(),
                largest: axis_of_pair.iter().copied().max().unwrap_or(0),
                pairs,
                axes,
            });
        }
        let mut steps = vec![0; axes * pairs];
        for (pair, (&axis, &step)) in axis_of_pair.iter().zip(&self.steps).enumerate() {
            steps[axis * pairs + pair] = step;
        }
        Ok(Self {
            steps,
            axes,
            attention_factor: self.attention_factor,
        })
    }

    /// Multiplies cos and sin by `factor` (YaRN's and LongRoPE's attention factor). A score `q . k` of
    /// rotated dims then grows by its square; dims that do not rotate keep their scale.
    ///
    /// The product is formed before cos and sin are rounded, and is no less accurate than they are
    /// without it. Rotated f32 are within 2 units in the last place of their pair's magnitude,
    /// `factor * hypot(a, b)`: at most 1.95 in 6e8 random pairs, and below 2.3 for any that can be
    /// sought out. Tests show that for factors from 1/64 to 64. It holds for others as well, where
    /// results are finite and not subnormal; below 2^-100 cos and sin themselves may be subnormal, and
    /// off by 2^-147 more.
    ///
    /// All this is relative to the f32 given here. Where a model's factor is a decimal number or
    /// follows from a formula, as in [`config`](crate::config), rounding that to f32 comes before.
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

    /// The same frequencies with a factor of 1.
    pub(crate) fn without_attention_factor(&self) -> Self {
        Self {
            attention_factor: 1.0,
            ..self.clone()
        }
    }

    /// Pairs that rotate in each head: `rotary_dim / 2`.
    pub fn pairs(&self) -> usize {
        self.steps.len() / self.axes
    }

    /// Axes that a position has; 1 for text.
    pub fn axes(&self) -> usize {
        self.axes
    }

    /// Steps in units of `2^-64` turn per position, row-major `[axes, pairs]`: one per pair where
    /// there is one axis.
    pub fn steps(&self) -> &[u64] {
        &self.steps
    }

    /// Frequencies in radians per position, row-major `[axes, pairs]` as [`steps`](Self::steps) are,
    /// of which each is the `f64` nearest to what its step says.
    ///
    /// A step keeps no whole turns, so these are principal values, above -π and up to π: a frequency
    /// beyond half a turn per position comes back as the one that differs from it by whole turns and
    /// gives the same angles. They are within 2^-64 turn (3.4e-19) of the frequencies asked for,
    /// beside their own rounding. [`from_inv_freq`](Self::from_inv_freq) makes the same steps of
    /// those below 7.6e-4 in magnitude, and steps less than 2^-53 turn off of larger ones: to keep
    /// frequencies, keep their steps.
    ///
    /// ```
    /// use phasor::Frequencies;
    ///
    /// # fn main() -> Result<(), phasor::Error> {
    /// let inv_freq = Frequencies::from_theta(10_000.0, 8)?.inv_freq();
    /// for (got, expected) in inv_freq.iter().zip([1.0, 0.1, 0.01, 0.001]) {
    ///     assert!((got - expected).abs() <= 3.4e-19 + expected * f64::EPSILON);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn inv_freq(&self) -> Vec<f64> {
        let radians = |&step: &u64| {
            DoubleDouble::from_turn_fraction(step)
                .mul(DoubleDouble::TAU)
                .to_f64()
        };
        self.steps.iter().map(radians).collect()
    }

    /// The factor that multiplies cos and sin.
    pub fn attention_factor(&self) -> f32 {
        self.attention_factor
    }

    /// The phase of a pair, in units of `2^-64` turn, where all axes are at `position`.
    ///
    /// # Panics
    /// If `pair` is not below [`pairs`](Self::pairs), as indexing does.
    pub fn phase(&self, pair: usize, position: i64) -> u64 {
        self.sum_axes(pair, |_| position)
    }

    /// The phase of a pair, in units of `2^-64` turn, at a position per axis.
    ///
    /// # Panics
    /// If `pair` is not below [`pairs`](Self::pairs) or `positions` has fewer than
    /// [`axes`](Self::axes) entries, as indexing does.
    pub fn phase_at(&self, pair: usize, positions: &[i64]) -> u64 {
        self.sum_axes(pair, |axis| positions[axis])
    }

    fn sum_axes(&self, pair: usize, position: impl Fn(usize) -> i64) -> u64 {
        let pairs = self.pairs();
        let axis = |axis: usize| &self.steps[axis * pairs..(axis + 1) * pairs];
        (0..self.axes).fold(0, |phase: u64, a| {
            phase.wrapping_add(axis(a)[pair].wrapping_mul(position(a) as u64))
        })
    }

    /// cos and sin of a pair where all axes are at `position`, the attention factor included: the
    /// very values that every backend rotates with. For positions within ±2^31 the absolute error
    /// is below 2^-23 times the attention factor.
    ///
    /// # Panics
    /// If `pair` is not below [`pairs`](Self::pairs), as indexing does.
    pub fn cos_sin(&self, pair: usize, position: i64) -> (f32, f32) {
        self.scaled(self.phase(pair, position))
    }

    /// [`cos_sin`](Self::cos_sin) at a position per axis.
    ///
    /// # Panics
    /// As [`phase_at`](Self::phase_at).
    pub fn cos_sin_at(&self, pair: usize, positions: &[i64]) -> (f32, f32) {
        self.scaled(self.phase_at(pair, positions))
    }

    /// cos and sin of all pairs at each of `positions`, in their order: row `r` of the table holds
    /// the very values that [`cos_sin`](Self::cos_sin) gives, all axes there, at the `r`-th of them.
    ///
    /// For engines that hand cos and sin to kernels of their own ([`CosSinTable::cos`],
    /// [`CosSinTable::sin`]). The rotations of this crate need no table; one that is given this one
    /// looks rows up by their number, whatever position they were made for:
    ///
    /// * made for `0..n`, it rotates tokens at positions below `n` to the same bits as the
    ///   frequencies do;
    /// * made for the positions of a call's tokens, it has a row for each token, and
    ///   [`Positions::start(0)`](crate::Positions::start) takes them in order.
    ///
    /// ```
    /// use phasor::Frequencies;
    ///
    /// # fn main() -> Result<(), phasor::Error> {
    /// let frequencies = Frequencies::from_theta(10_000.0, 64)?;
    /// let cache = frequencies.table(0..4096)?;
    /// assert_eq!((cache.rows(), cache.pairs()), (4096, 32));
    /// let of_tokens = frequencies.table([17, 18, 19, 4095])?;
    /// assert_eq!(of_tokens.cos()[3 * 32..], cache.cos()[4095 * 32..]);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::TableShape`] if there is no position; [`Error::TableTooLarge`] if there is no memory
    /// for so many, or there are 2^32 or more.
    pub fn table(&self, positions: impl IntoIterator<Item = i64>) -> Result<CosSinTable, Error> {
        let positions = positions.into_iter();
        let pairs = self.pairs();
        let reserve = |values: &mut Vec<f32>, rows: usize| {
            let all = u32::try_from(rows)
                .ok()
                .and_then(|_| rows.checked_mul(pairs));
            let more = all.map(|all| all.saturating_sub(values.len()));
            match more.map(|more| values.try_reserve(more)) {
                Some(Ok(())) => Ok(()),
                _ => Err(Error::TableTooLarge { rows, pairs }),
            }
        };
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        // A range that is too long fails before any work.
        let (fewest, _) = positions.size_hint();
        reserve(&mut cos, fewest)?;
        reserve(&mut sin, fewest)?;
        for (row, position) in positions.enumerate() {
            reserve(&mut cos, row + 1)?;
            reserve(&mut sin, row + 1)?;
            for pair in 0..pairs {
                let (c, s) = self.cos_sin(pair, position);
                cos.push(c);
                sin.push(s);
            }
        }
        CosSinTable::new(cos, sin, pairs)
    }

    fn scaled(&self, phase: u64) -> (f32, f32) {
        phase::cos_sin(phase, Scale::new(self.attention_factor, false))
    }

    /// Frequencies in radians per position, with about 106 bits.
    pub(crate) fn from_extended(inv_freq: &[DoubleDouble]) -> Result<Self, Error> {
        let steps = inv_freq
            .iter()
            .enumerate()
            .map(|(pair, &value)| {
                if value.to_f64().abs() <= MAX_INV_FREQ {
                    Ok(value.mul(INV_TAU).to_turn_fraction())
                } else {
                    Err(Error::InvFreq {
                        pair,
                        value: value.to_f64(),
                    })
                }
            })
            .collect::<Result<_, _>>()?;
        Self::from_steps(steps)
    }
}

/// `theta^(-2i / rotary_dim)` for each pair.
fn powers(theta: f64, rotary_dim: usize) -> Result<Vec<DoubleDouble>, Error> {
    if look_exchanged(theta, rotary_dim) {
        return Err(Error::Exchanged { theta, rotary_dim });
    }
    check_rotary_dim(rotary_dim)?;
    let smallest = MAX_INV_FREQ.recip();
    if !theta.is_finite() || theta < smallest {
        return Err(Error::Theta { theta });
    }
    let ln_theta = DoubleDouble::ln(theta);
    let dim = DoubleDouble::from(rotary_dim as f64);
    let power = |i| {
        let exponent = DoubleDouble::from(-2.0 * i as f64).div(dim);
        ln_theta.mul(exponent).exp()
    };
    Ok((0..rotary_dim / 2).map(power).collect())
}

/// Whether theta and dims stand in each other's place: more dims than a head has, and a theta that
/// could be the dims of one. Thetas as small as that exist (100), but not with as many dims.
pub(crate) fn look_exchanged(theta: f64, dims: usize) -> bool {
    const LARGEST_HEAD: usize = 512;
    let could_be_dims = (2.0..=LARGEST_HEAD as f64).contains(&theta) && theta % 2.0 == 0.0;
    could_be_dims && dims > LARGEST_HEAD
}

/// More than any model has; small enough for every count of steps to fit.
const MAX_AXES: usize = 16;

/// A grid of kernel blocks has room for the pairs of a head.
pub(crate) const MAX_ROTARY_DIM: usize = 1 << 22;

pub(super) fn check_rotary_dim(rotary_dim: usize) -> Result<(), Error> {
    if rotary_dim == 0 || rotary_dim % 2 == 1 || rotary_dim > MAX_ROTARY_DIM {
        return Err(Error::RotaryDim { rotary_dim });
    }
    Ok(())
}
