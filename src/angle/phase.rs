//! cos and sin of a phase: the definition that every backend reproduces bit for bit.

/// Coefficients for an argument `s` in units of an eighth of a turn, `z = s * s`:
/// `sin = s * SIN_1 + s * P(z)` and `cos = 1 + z * C(z)`. The first coefficient of `P` is what
/// rounding π/4 to `SIN_1` left over. Minimax on `0..=1`, the leading coefficients rounded first;
/// the polynomials are within 1.3e-9 of the functions.
pub(crate) const SIN_1: f32 = f32::from_bits(0x3f49_0fdb);
pub(crate) const SIN: [f32; 4] = [
    f32::from_bits(0xb30c_7d7d),
    f32::from_bits(0xbda5_5dd4),
    f32::from_bits(0x3b23_2d34),
    f32::from_bits(0xb816_7e3a),
];
pub(crate) const COS: [f32; 4] = [
    f32::from_bits(0xbe9d_e9e6),
    f32::from_bits(0x3c81_e0d7),
    f32::from_bits(0xb9aa_d89c),
    f32::from_bits(0x366a_3a40),
];
/// 2^-23 and 2^-54: the units of the two parts of the reduced argument.
pub(crate) const HIGH_UNIT: f32 = f32::from_bits((127 - 23) << 23);
pub(crate) const LOW_UNIT: f32 = f32::from_bits((127 - 54) << 23);

/// What multiplies cos and sin of phases, and which way they turn.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scale {
    pub(crate) factor: f32,
    /// The factor times [`SIN_1`], and what rounding that left over.
    pub(crate) sin_1: f32,
    pub(crate) sin_1_rest: f32,
    /// The sign bit if the sine is to be negated, else 0.
    pub(crate) sin_flip: u32,
}

impl Scale {
    /// The inverse turns by the negative angle.
    #[inline(always)]
    pub(crate) fn new(factor: f32, inverse: bool) -> Self {
        // The product and the difference are exact in f64. One `mul_add` would do as well, but this is
        // formed for every token, and the compiler's target may have none.
        let exact = f64::from(factor) * f64::from(SIN_1);
        let sin_1 = exact as f32;
        Self {
            factor,
            sin_1,
            sin_1_rest: (exact - f64::from(sin_1)) as f32,
            sin_flip: u32::from(inverse) << 31,
        }
    }

    /// A sine in the direction of the scale.
    #[inline(always)]
    pub(crate) fn turned(self, sine: f32) -> f32 {
        f32::from_bits(sine.to_bits() ^ self.sin_flip)
    }
}

/// Cosine and sine of `phase / 2^64` turns, in that order, scaled.
///
/// The phase is reduced to the nearest quarter turn on the integer. What is left is at most an
/// eighth of a turn; in units of that it is rounded to `f32` once, and two polynomials follow.
///
/// A factor other than 1 multiplies cos and sin before they are rounded, in two words each. Without
/// one they lie just below a power of two, where neighbours are nearest. With one they may lie just
/// above, where the last rounding weighs twice as much, and others beside it would be too many.
#[inline(always)]
pub(crate) fn cos_sin(phase: u64, scale: Scale) -> (f32, f32) {
    let rest = (phase << 2) as i64;
    let magnitude = rest.unsigned_abs();
    let high = (magnitude >> 40) as i32 as f32 * HIGH_UNIT;
    let low = ((magnitude >> 9) & 0x7fff_ffff) as i32 as f32;
    let s = low.mul_add(LOW_UNIT, high);
    let z = s * s;

    let p = z.mul_add(SIN[3], SIN[2]);
    let p = z.mul_add(p, SIN[1]);
    let p = z.mul_add(p, SIN[0]);
    let c = z.mul_add(COS[3], COS[2]);
    let c = z.mul_add(c, COS[1]);

    let f = scale.factor;
    let (cosine, sine) = if f == 1.0 {
        let c = z.mul_add(c, COS[0]);
        (z.mul_add(c, 1.0), s.mul_add(SIN_1, s * p))
    } else {
        // The argument is `high + low * LOW_UNIT`, its square `z + z_rest`, cos `cosine + rest`.
        let z_rest = high.mul_add(low * (2.0 * LOW_UNIT), high.mul_add(high, -z));
        let cosine = z.mul_add(COS[0], 1.0);
        let rest = z.mul_add(COS[0], 1.0 - cosine);
        let rest = z_rest.mul_add(COS[0], rest);
        let rest = z.mul_add(z * c, rest);
        let p = f.mul_add(p, scale.sin_1_rest);
        let sine = s.mul_add(p, low * LOW_UNIT * scale.sin_1);
        (f.mul_add(cosine, f * rest), high.mul_add(scale.sin_1, sine))
    };

    // Quarter turns: an odd one swaps the two, and each result takes its sign bit.
    let top = (phase >> 32) as u32;
    let quarter = top.wrapping_add(0x2000_0000) >> 30;
    let rest_sign = ((rest as u64) >> 32) as u32 & 0x8000_0000;
    let sine = sine.to_bits() ^ rest_sign;
    let cosine = cosine.to_bits();
    let (cosine, sine) = if quarter & 1 == 1 {
        (sine, cosine)
    } else {
        (cosine, sine)
    };
    (
        f32::from_bits(cosine ^ ((quarter + 1) << 30 & 0x8000_0000)),
        scale.turned(f32::from_bits(sine ^ (quarter << 30 & 0x8000_0000))),
    )
}
