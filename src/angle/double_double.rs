//! Arithmetic with about 106 bits, as unevaluated sums of two `f64`.
//!
//! A 64-bit phase step needs more than the 53 bits of an `f64`. Only `+ - *`, `mul_add` and
//! exact scalings are used, never a platform's `exp` or `ln`, so every machine gets the same steps.
//! The algorithms are the error-free transformations of Dekker and Knuth.

/// The unevaluated sum `hi + lo`, with `|lo|` at most half a unit in the last place of `hi`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct DoubleDouble {
    hi: f64,
    lo: f64,
}

/// 1 / 2π
pub(crate) const INV_TAU: DoubleDouble =
    DoubleDouble::new(0.15915494309189535, -9.839338337591243e-18);
const LN_2: DoubleDouble = DoubleDouble::new(std::f64::consts::LN_2, 2.3190468138462996e-17);

impl DoubleDouble {
    pub(crate) const ZERO: Self = Self::new(0.0, 0.0);
    pub(crate) const ONE: Self = Self::new(1.0, 0.0);
    /// 2π
    pub(crate) const TAU: Self = Self::new(std::f64::consts::TAU, 2.4492935982947064e-16);

    const fn new(hi: f64, lo: f64) -> Self {
        Self { hi, lo }
    }

    /// `hi + lo` where `|hi| >= |lo|`.
    fn quick_sum(hi: f64, lo: f64) -> Self {
        let s = hi + lo;
        Self::new(s, lo - (s - hi))
    }

    fn sum(a: f64, b: f64) -> Self {
        let s = a + b;
        let t = s - a;
        Self::new(s, (a - (s - t)) + (b - t))
    }

    fn product(a: f64, b: f64) -> Self {
        let p = a * b;
        Self::new(p, a.mul_add(b, -p))
    }

    pub(crate) fn add(self, other: Self) -> Self {
        let s = Self::sum(self.hi, other.hi);
        let t = Self::sum(self.lo, other.lo);
        let s = Self::quick_sum(s.hi, s.lo + t.hi);
        Self::quick_sum(s.hi, s.lo + t.lo)
    }

    pub(crate) fn sub(self, other: Self) -> Self {
        self.add(other.negate())
    }

    fn negate(self) -> Self {
        Self::new(-self.hi, -self.lo)
    }

    pub(crate) fn min(self, other: Self) -> Self {
        if self <= other { self } else { other }
    }

    pub(crate) fn max(self, other: Self) -> Self {
        if self >= other { self } else { other }
    }

    /// The largest whole number that is not above.
    pub(crate) fn floor(self) -> Self {
        let whole = self.hi.floor();
        // Where the high part is whole itself, the low part decides.
        if whole == self.hi {
            Self::sum(whole, self.lo.floor())
        } else {
            Self::from(whole)
        }
    }

    /// The smallest whole number that is not below.
    pub(crate) fn ceil(self) -> Self {
        self.negate().floor().negate()
    }

    /// The square root of a number that is not negative.
    pub(crate) fn sqrt(self) -> Self {
        let root = self.hi.sqrt();
        if root == 0.0 {
            return Self::ZERO;
        }
        let rest = self.sub(Self::product(root, root));
        Self::quick_sum(root, rest.hi / (2.0 * root))
    }

    pub(crate) fn mul(self, other: Self) -> Self {
        let p = Self::product(self.hi, other.hi);
        Self::quick_sum(p.hi, p.lo + self.hi.mul_add(other.lo, self.lo * other.hi))
    }

    pub(crate) fn div(self, other: Self) -> Self {
        let q1 = self.hi / other.hi;
        let rest = self.add(other.mul(Self::from(q1)).negate());
        let q2 = rest.hi / other.hi;
        let rest = rest.add(other.mul(Self::from(q2)).negate());
        let q3 = rest.hi / other.hi;
        Self::quick_sum(q1, q2).add(Self::from(q3))
    }

    /// Multiplies by `2^n`; `n` is small enough here for the power to be a normal number.
    fn scale(self, n: i32) -> Self {
        let power = power_of_two(n);
        Self::new(self.hi * power, self.lo * power)
    }

    /// Natural logarithm of a positive, finite `f64`.
    pub(crate) fn ln(x: f64) -> Self {
        // x = m * 2^e with m in [sqrt(1/2), sqrt(2)); then ln m = 2 artanh((m - 1) / (m + 1)).
        let (subnormal_shift, x) = if x < f64::MIN_POSITIVE {
            (64, x * power_of_two(64))
        } else {
            (0, x)
        };
        let bits = x.to_bits();
        let mut exponent = (bits >> 52) as i32 - 1023;
        let mut m = f64::from_bits((bits & 0x000f_ffff_ffff_ffff) | (1023 << 52));
        if m > std::f64::consts::SQRT_2 {
            m /= 2.0;
            exponent += 1;
        }
        let z = Self::sum(m, -1.0).div(Self::sum(m, 1.0));
        let square = z.mul(z);
        // |z| <= 0.1716: 24 terms leave less than 2^-120.
        let mut series = Self::from(0.0);
        for k in (0..24).rev() {
            let term = Self::ONE.div(Self::from(f64::from(2 * k + 1)));
            series = series.mul(square).add(term);
        }
        let exponent = Self::from(f64::from(exponent - subnormal_shift));
        series.mul(z).scale(1).add(exponent.mul(LN_2))
    }

    /// Natural logarithm of a positive, finite number.
    pub(crate) fn ln_extended(self) -> Self {
        // ln(hi + lo) = ln(hi) + ln(1 + lo / hi), and (lo / hi)^2 is below 2^-106.
        Self::ln(self.hi).add(Self::from(self.lo / self.hi))
    }

    /// `e^self` as a frequency: zero where it is far below what a phase step can hold, and a number
    /// above every limit where it is far above.
    pub(crate) fn exp_saturating(self) -> Self {
        const LIMIT: f64 = 100.0;
        if self.hi < -LIMIT {
            Self::ZERO
        } else {
            self.min(Self::from(LIMIT)).exp()
        }
    }

    /// `e^self`, for results that are normal numbers.
    pub(crate) fn exp(self) -> Self {
        let n = (self.hi / LN_2.hi).round_ties_even();
        let rest = self.add(LN_2.mul(Self::from(n)).negate());
        // e^r = (e^(r / 256))^256; |r / 256| < 0.0014, and 12 terms leave less than 2^-140.
        let r = rest.scale(-8);
        let mut series = Self::ONE;
        for k in (1..=12).rev() {
            series = series.mul(r).div(Self::from(f64::from(k))).add(Self::ONE);
        }
        for _ in 0..8 {
            series = series.mul(series);
        }
        // In two steps, so that neither power leaves the normal range.
        let n = n as i32;
        series.scale(n / 2).scale(n - n / 2)
    }

    /// The nearest `f64`.
    pub(crate) fn to_f64(self) -> f64 {
        self.hi
    }

    /// The nearest `f32`, rounded once from the exact sum: rounding to `f64` first could land on a
    /// tie that the low part decides.
    pub(crate) fn to_f32(self) -> f32 {
        let nearest = self.hi as f32;
        let rest = self.hi - f64::from(nearest);
        let neighbour = if rest > 0.0 {
            nearest.next_up()
        } else if rest < 0.0 {
            nearest.next_down()
        } else {
            return nearest;
        };
        let half = (f64::from(neighbour) - f64::from(nearest)) / 2.0;
        let beyond_tie = rest == half && self.lo != 0.0 && (self.lo > 0.0) == (rest > 0.0);
        if beyond_tie { neighbour } else { nearest }
    }

    /// A fraction of a turn in units of `2^-64`, above -1/2 and up to 1/2. Exact.
    pub(crate) fn from_turn_fraction(fraction: u64) -> Self {
        let signed = fraction as i64;
        let turns = Self::from(signed.unsigned_abs()).scale(-64);
        // Half a turn, which has one name as an integer, goes by the positive of its two.
        if signed < 0 && signed != i64::MIN {
            turns.negate()
        } else {
            turns
        }
    }

    /// `round(self * 2^64) mod 2^64`: the value as a fraction of a turn. `|self| <= 2^60`.
    pub(crate) fn to_turn_fraction(self) -> u64 {
        let scaled = self.scale(64);
        let whole = scaled.hi.floor();
        let rest = ((scaled.hi - whole) + scaled.lo).round_ties_even();
        (whole as i128).wrapping_add(rest as i128) as u64
    }
}

impl From<f64> for DoubleDouble {
    fn from(x: f64) -> Self {
        Self::new(x, 0.0)
    }
}

impl From<u64> for DoubleDouble {
    /// Exact.
    fn from(n: u64) -> Self {
        let (high, low) = (n >> 32, n & 0xffff_ffff);
        Self::quick_sum(high as f64 * 4294967296.0, low as f64)
    }
}

impl PartialOrd for DoubleDouble {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        match self.hi.partial_cmp(&other.hi)? {
            std::cmp::Ordering::Equal => self.lo.partial_cmp(&other.lo),
            unequal => Some(unequal),
        }
    }
}

fn power_of_two(n: i32) -> f64 {
    f64::from_bits(((1023 + n) as u64) << 52)
}

#[cfg(test)]
mod tests {
    use super::DoubleDouble;

    #[test]
    fn the_low_part_decides_ties() {
        let tie = 1.0 + 2f64.powi(-24);
        for (low, expected) in [(0.0, 1.0), (-1e-30, 1.0), (1e-30, 1.0 + f32::EPSILON)] {
            assert_eq!(DoubleDouble::new(tie, low).to_f32(), expected, "{low}");
        }
        let tie = tie + 2f64.powi(-23);
        for (low, steps) in [(0.0, 2.0), (-1e-30, 1.0), (1e-30, 2.0)] {
            let expected = 1.0 + steps * f32::EPSILON;
            assert_eq!(DoubleDouble::new(tie, low).to_f32(), expected, "{low}");
        }
        for (low, floor, ceil) in [(0.0, 3.0, 3.0), (-1e-20, 2.0, 3.0), (1e-20, 3.0, 4.0)] {
            let near = DoubleDouble::new(3.0, low);
            assert_eq!((near.floor().to_f64(), near.ceil().to_f64()), (floor, ceil));
        }
    }

    /// Off by less than 2^-96 of what it must be, for powers of 256 lose 8 bits of 106.
    #[track_caller]
    fn near(got: DoubleDouble, expected: DoubleDouble) {
        let off = got.sub(expected).to_f64().abs();
        let most = expected.to_f64().abs() * 2f64.powi(-96);
        assert!(off <= most, "{got:?} and not {expected:?}: off by {off}");
    }

    #[test]
    fn sums_keep_what_is_left_of_both_low_parts() {
        let (low, lower) = (2f64.powi(-54), 1.5 * 2f64.powi(-107));
        let sum = DoubleDouble::new(1.0, low).add(DoubleDouble::new(-1.0, lower));
        let expected = DoubleDouble::new(low + 2f64.powi(-106), -(2f64.powi(-108)));
        assert_eq!(sum, expected);
    }

    /// Sizes far apart, so that each digit of the quotient must be right.
    #[test]
    fn quotients_times_divisors_are_dividends() {
        for a in [1.0, 3.0, 1e-10, 7.3e15] {
            for b in [3.0, 0.3, 1e-12, 1e10, 7.7e17] {
                let (a, b) = (
                    DoubleDouble::new(a, a * 2f64.powi(-55)),
                    DoubleDouble::from(b),
                );
                near(a.div(b).mul(b), a);
                near(b.div(a).mul(a), b);
            }
        }
    }

    #[test]
    fn logarithms_of_every_size() {
        // Powers of two, subnormal ones too, of which the logarithm is a product.
        for exponent in [-1074, -1073, -1023, -1022, -1021, -64, -1, 1, 64, 1023] {
            let power = 2f64.powi(exponent / 2) * 2f64.powi(exponent - exponent / 2);
            let expected = super::LN_2.mul(DoubleDouble::from(f64::from(exponent)));
            near(DoubleDouble::ln(power), expected);
        }
        // Numbers that are reduced to either side of 1.
        for x in [1.1, 1.4, 1.42, 1.5, 1.9, 1.99, 500_000.0, 1e30, 1e-30] {
            near(DoubleDouble::ln(x).exp(), DoubleDouble::from(x));
        }
    }

    #[test]
    fn exponentials_of_every_size() {
        for x in [1e-9, 0.3, 0.7, 5.0, 20.0, 60.0, 99.0] {
            let x = DoubleDouble::from(x);
            near(x.exp().mul(x.negate().exp()), DoubleDouble::ONE);
        }
        let saturating = |x: f64| DoubleDouble::from(x).exp_saturating();
        assert_eq!(saturating(-1e6), DoubleDouble::ZERO);
        assert_eq!(saturating(-100.5), DoubleDouble::ZERO);
        near(saturating(-100.0), DoubleDouble::from(-100.0).exp());
        assert_eq!(saturating(1e6), saturating(100.0));
        assert!(saturating(100.0).to_f64() > 2e43);
    }

    #[test]
    fn turns_have_their_signs() {
        let of = |fraction: u64| DoubleDouble::from_turn_fraction(fraction).to_f64();
        assert_eq!(of(0).to_bits(), 0.0f64.to_bits());
        assert_eq!(of(1), 2f64.powi(-64));
        assert_eq!(of(u64::MAX), -(2f64.powi(-64)));
        assert_eq!(
            (of(1 << 63), of((1 << 63) + (1 << 40))),
            (0.5, -0.5 + 2f64.powi(-24))
        );
    }

    #[test]
    fn integers_roots_and_order() {
        let largest = DoubleDouble::from(u64::MAX);
        assert_eq!(largest, DoubleDouble::new(2f64.powi(64), -1.0));
        let two = DoubleDouble::from(2.0);
        let off = two.sqrt().mul(two.sqrt()).sub(two).to_f64();
        assert!(off.abs() < 1e-30, "{off}");
        assert_eq!(DoubleDouble::ZERO.sqrt(), DoubleDouble::ZERO);
        let above = DoubleDouble::new(2.0, 1e-20);
        assert!(two < above && above.max(two) == above && above.min(two) == two);
    }
}
