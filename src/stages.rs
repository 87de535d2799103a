//! What a call does to a stream beside its rotation.

use crate::norm::HeadNorm;
#[cfg(doc)]
use crate::{Positions, Problem};

/// What a call does to q, k or v between reading and writing, in this order, each of it only if it is
/// asked for: a bias is added, heads are normed, rotated, normed, scaled, rounded, and stored (as
/// [codes](crate::StoredCodes) perhaps).
///
/// Values are f32 from the first stage to the last and are rounded to the element type once, unless a norm
/// asks for more. Biases and weights are operands of each call, of the element type.
///
/// ```
/// use phasor::norm::HeadNorm;
/// use phasor::Stages;
///
/// // Qwen3; and its queries where scores are not scaled elsewhere.
/// let k = Stages::new().norm(HeadNorm::rms(1e-6).round_before_weight().round_after());
/// let q = k.scale(1.0 / 128f32.sqrt());
/// # let _ = q;
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stages {
    pub(crate) bias: bool,
    pub(crate) norm: Option<HeadNorm>,
    pub(crate) norm_after_rotation: bool,
    pub(crate) scale: f32,
    pub(crate) temperature: Option<(f32, u32)>,
    pub(crate) rotates: bool,
}

impl Default for Stages {
    fn default() -> Self {
        Self::new()
    }
}

impl Stages {
    /// The rotation alone; of v, not even that.
    pub const fn new() -> Self {
        Self {
            bias: false,
            norm: None,
            norm_after_rotation: false,
            scale: 1.0,
            temperature: None,
            rotates: true,
        }
    }

    /// Adds a bias, `[heads, head_dim]`, before all else: that of the projection.
    pub const fn bias(mut self) -> Self {
        self.bias = true;
        self
    }

    /// Norms heads before they are rotated (Qwen3, Gemma 3, OLMo 2, Cohere, and most others). A stream has
    /// one norm, before or after.
    pub const fn norm(mut self, norm: HeadNorm) -> Self {
        self.norm = Some(norm);
        self.norm_after_rotation = false;
        self
    }

    /// Norms heads after they were rotated (Llama 4, HunYuan). All dims of a head count, those that do not
    /// rotate too.
    pub const fn norm_after_rotation(mut self, norm: HeadNorm) -> Self {
        self.norm = Some(norm);
        self.norm_after_rotation = true;
        self
    }

    /// Multiplies by a number, such as that of the scores.
    pub const fn scale(mut self, factor: f32) -> Self {
        self.scale = factor;
        self
    }

    /// Multiplies by `1 + slope * ln(1 + n)` as well, where `n` is how often `interval` goes into the
    /// position on the first axis plus 1, and 0 at negative ones. Llama 4 does so in its layers without
    /// rotation, with 0.1 (`attn_scale`) and 8,192 (`floor_scale`). An interval of 0 does nothing.
    pub const fn temperature(mut self, slope: f32, interval: u32) -> Self {
        self.temperature = match interval {
            0 => None,
            _ => Some((slope, interval)),
        };
        self
    }

    /// What a token at a position is multiplied by.
    pub fn factor_at(&self, position: i64) -> f32 {
        match self.temperature {
            None => self.scale,
            Some((slope, interval)) => self.scale * temperature(slope, interval, position),
        }
    }

    /// Leaves the rotation out, as in the layers of Llama 4, SmolLM3 or Cohere that have none.
    pub const fn without_rotation(mut self) -> Self {
        self.rotates = false;
        self
    }

    /// Whether its norm has one statistic over all heads, so that heads cannot be told apart.
    pub fn norms_across_heads(&self) -> bool {
        self.norm.is_some_and(|norm| norm.across_heads)
    }

    /// Whether it does more than to rotate what rotates.
    pub(crate) fn is_present(&self, rotates: bool) -> bool {
        *self
            != Self {
                rotates: self.rotates,
                ..Self::new()
            }
            || rotates && !self.rotates
    }
}

/// What a temperature multiplies by at a position. Every operation rounds once.
#[inline(always)]
pub(crate) fn temperature(slope: f32, interval: u32, position: i64) -> f32 {
    let position = position.wrapping_add(1);
    let n = match position {
        0.. => position as u64 / u64::from(interval),
        _ => 0,
    };
    slope.mul_add(ln((n + 1) as f32), 1.0)
}

/// The natural logarithm of a number from 1 on, within 1.5 ulp.
#[inline(always)]
fn ln(x: f32) -> f32 {
    // x is 2^e (1 + f), with 1 + f between the square roots of 1/2 and 2.
    const ROOT_OF_HALF: u32 = 0x3f35_04f3;
    let bits = x.to_bits().wrapping_sub(ROOT_OF_HALF);
    let e = (bits as i32 >> 23) as f32;
    let f = f32::from_bits((bits & 0x7f_ffff) + ROOT_OF_HALF) - 1.0;
    // ln(1 + f) = f - f^2 / 2 + f^3 p(f), p within 2^-27 of the result.
    let p = LN
        .iter()
        .rev()
        .fold(0.0, |p: f32, &c| p.mul_add(f, f32::from_bits(c)));
    let square = f * f;
    let rest = square.mul_add(-0.5, (f * square) * p);
    let rest = e.mul_add(f32::from_bits(LN_2[1]), rest);
    // The product is exact for an e of up to 12 bits.
    e.mul_add(f32::from_bits(LN_2[0]), f) + rest
}

/// The coefficients of p, the lowest first.
const LN: [u32; 8] = [
    0x3eaa_aaaa,
    0xbe80_0113,
    0x3e4c_d004,
    0xbe2a_3922,
    0x3e11_6d0e,
    0xbe06_c2a0,
    0x3e02_adb6,
    0xbd9c_5ac8,
];
/// The logarithm of 2 in two words.
const LN_2: [u32; 2] = [0x3f31_7218, 0xb102_e308];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logarithms_are_right() {
        let check = |x: f32| {
            let exact = f64::from(x).ln();
            let got = f64::from(ln(x));
            let ulp = f64::from((exact as f32).next_up()) - f64::from(exact as f32);
            assert!(
                (got - exact).abs() <= 1.5 * ulp,
                "ln({x}) is {got}, not {exact}"
            );
        };
        for n in 1..=1u64 << 20 {
            check(n as f32);
        }
        let mut n = 1u64 << 20;
        while n < 1 << 62 {
            check(n as f32);
            n += n / 1000;
        }
        assert_eq!(ln(1.0), 0.0);
    }

    #[test]
    fn temperatures_begin_at_the_interval() {
        let at = |position| temperature(0.1, 8192, position);
        for position in [i64::MIN, -8192, -1, 0, 8190] {
            assert_eq!(at(position), 1.0, "{position}");
        }
        assert!((at(8191) - (1.0 + 0.1 * 2f32.ln())).abs() < 1e-7);
        assert_eq!(at(8191), at(2 * 8192 - 2));
        assert!(at(2 * 8192 - 1) > at(8191));
        // i64::MAX + 1 wraps.
        assert_eq!(at(i64::MAX), 1.0);
    }
}
