//! The two functions of the definition that are no IEEE operations, written without branches so that loops
//! over them become vectors; and elements as f32.

use phasor::half::f16;
use phasor::half::slice::HalfFloatSliceExt;
use phasor::{Dtype, Element};
use std::f32::consts::LOG2_E;

/// Adding it to a number of magnitude below 2^22 rounds that to an integer, to nearest even, which is then
/// in the low bits.
const ROUND: f32 = 12_582_912.0;

/// `(2^f - 1) / f`, the lowest coefficient first; within 2^-28 of `2^f` for `f` from -1/2 to 1/2.
const EXP2: [u32; 6] = [
    0x3f31_7218,
    0x3e75_fdee,
    0x3d63_5774,
    0x3c1d_96a6,
    0x3aaf_9f2a,
    0x3920_fddd,
];

/// `(tanh(x) - x) / x^3` in `x^2`, up to `TANH_SMALL`.
const TANH: [u32; 5] = [
    0xbeaa_aa99,
    0x3e08_8393,
    0xbd5c_1e2d,
    0x3ca9_134f,
    0xbbba_f0ee,
];
const TANH_SMALL: f32 = 0.625;

/// Elements as f32, as many as both have.
#[inline(always)]
pub(crate) fn widen<T: Element>(from: &[T], to: &mut [f32]) {
    let len = from.len().min(to.len());
    if T::DTYPE == Dtype::F16 {
        // SAFETY: `f16` is the only element of this type.
        let from = unsafe { std::slice::from_raw_parts(from.as_ptr().cast::<f16>(), len) };
        // By itself, an element would ask the processor what it can.
        return from.convert_to_f32_slice(&mut to[..len]);
    }
    for (to, from) in to.iter_mut().zip(from) {
        *to = from.widen();
    }
}

/// By Horner's rule, a fused multiply-add for each coefficient.
#[inline(always)]
fn polynomial<const N: usize>(coefficients: &[u32; N], x: f32) -> f32 {
    let mut p = f32::from_bits(coefficients[N - 1]);
    for &c in coefficients[..N - 1].iter().rev() {
        p = p.mul_add(x, f32::from_bits(c));
    }
    p
}

/// `2^x` for `x <= 0`, within 1.5 ulp: `x = n + f` with the integer `n` nearest to `x`, and
/// `2^f = fma(p(f), f, 1)`. Below -125 it is 0. NaN stays NaN.
#[inline(always)]
pub(crate) fn exp2(x: f32) -> f32 {
    let rounded = x + ROUND;
    let f = x - (rounded - ROUND);
    let power = polynomial(&EXP2, f).mul_add(f, 1.0);
    // Only the low bits of the integer stay, which are added to the exponent.
    let y = f32::from_bits(power.to_bits().wrapping_add(rounded.to_bits() << 23));
    let y = if x < -125.0 { 0.0 } else { y };
    if x.is_nan() { x } else { y }
}

/// The hyperbolic tangent, within 2.5 ulp: up to 0.625 `x + x^3 p(x^2)`, as `fma(x * (x * x), p, x)`, and
/// beyond `(1 - e) / (1 + e)` with `e = 2^(-2 |x| log2(e))`.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let square = x * x;
    let small = (x * square).mul_add(polynomial(&TANH, square), x);
    let e = exp2(x.abs() * (-2.0 * LOG2_E));
    let large = ((1.0 - e) / (1.0 + e)).copysign(x);
    if x.abs() <= TANH_SMALL { small } else { large }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ulps(got: f32, exact: f64) -> f64 {
        let near = (exact.abs() as f32).max(f32::MIN_POSITIVE);
        (f64::from(got) - exact).abs() / f64::from(near.next_up() - near)
    }

    #[test]
    fn exp2_is_right() {
        let mut worst = 0.0f64;
        for n in 0..=4_000_000u32 {
            let x = -(n as f32) * (124.9 / 4_000_000.0);
            worst = worst.max(ulps(exp2(x), f64::from(x).exp2()));
        }
        assert!(worst < 1.5, "{worst}");
        assert_eq!(exp2(0.0), 1.0);
        assert_eq!(exp2(-0.0), 1.0);
        assert_eq!(exp2(-3.0), 0.125);
        assert_eq!(exp2(-125.0), 2f32.powi(-125));
        for x in [-125.00001, -1e30, f32::NEG_INFINITY] {
            assert_eq!(exp2(x), 0.0);
        }
        assert!(exp2(f32::NAN).is_nan());
    }

    #[test]
    fn tanh_is_right() {
        let mut worst = 0.0f64;
        for n in -2_000_000..=2_000_000i32 {
            let x = n as f32 * (12.0 / 2_000_000.0);
            worst = worst.max(ulps(tanh(x), f64::from(x).tanh()));
        }
        assert!(worst < 2.5, "{worst}");
        assert_eq!(tanh(0.0), 0.0);
        assert_eq!(tanh(1e-20), 1e-20);
        assert_eq!(tanh(f32::INFINITY), 1.0);
        assert_eq!(tanh(f32::NEG_INFINITY), -1.0);
        assert!(tanh(f32::NAN).is_nan());
    }
}
