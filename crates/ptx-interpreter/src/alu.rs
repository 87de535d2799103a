//! Arithmetic on register values. Registers are `u64`; a narrower value has its upper bits clear.

use crate::inst::{Class, Cmp, Convert, Round, Ty};

pub const NAN_F32: u32 = 0x7fff_ffff;

/// Sign-extends the low `bits` bits.
pub fn sign_extend(value: u64, bits: u32) -> i64 {
    let shift = 64 - bits;
    ((value << shift) as i64) >> shift
}

/// The value of a register as the integer its type says.
pub fn integer(value: u64, ty: Ty) -> i128 {
    if ty.signed() {
        i128::from(sign_extend(value, ty.bits()))
    } else {
        i128::from(value & ty.mask())
    }
}

/// The full product, whose halves are `mul.lo` and `mul.hi`.
pub fn product(a: u64, b: u64, ty: Ty) -> i128 {
    // Unsigned 64-bit products may pass i128::MAX; the bits are right all the same.
    integer(a, ty).wrapping_mul(integer(b, ty))
}

pub fn shl(a: u64, b: u64, ty: Ty) -> u64 {
    if b >= u64::from(ty.bits()) {
        0
    } else {
        (a << b) & ty.mask()
    }
}

pub fn shr(a: u64, b: u64, ty: Ty) -> u64 {
    let by = b.min(u64::from(ty.bits()) - u64::from(ty.signed()));
    if ty.signed() {
        (sign_extend(a, ty.bits()) >> by) as u64 & ty.mask()
    } else if by == u64::from(ty.bits()) {
        0
    } else {
        a >> by
    }
}

pub fn bfind(a: u64, ty: Ty, shift: bool) -> u64 {
    let bits = ty.bits();
    let significant = if ty.signed() && sign_extend(a, bits) < 0 {
        !a & ty.mask()
    } else {
        a
    };
    if significant == 0 {
        return 0xffff_ffff;
    }
    let at = 63 - u64::from(significant.leading_zeros());
    if shift { u64::from(bits) - 1 - at } else { at }
}

pub fn bfe(a: u64, position: u64, length: u64, ty: Ty) -> u64 {
    let (position, length) = (position & 0xff, length & 0xff);
    let top = u64::from(ty.bits()) - 1;
    if length == 0 {
        return 0;
    }
    let sign = ty.signed() && a >> (position + length - 1).min(top) & 1 == 1;
    let field = if position > top { 0 } else { a >> position };
    // Bits of the result that come from `a`: those inside the field and inside the register.
    let count = length.min((top + 1).saturating_sub(position)) as u32;
    let inside = if count == 0 {
        0
    } else {
        u64::MAX >> (64 - count)
    };
    let fill = if sign { ty.mask() & !inside } else { 0 };
    (field & inside) | fill
}

pub fn bfi(a: u64, b: u64, position: u64, length: u64, ty: Ty) -> u64 {
    let (position, length) = (position & 0xff, length & 0xff);
    if position >= u64::from(ty.bits()) || length == 0 {
        return b;
    }
    let ones = if length >= 64 {
        u64::MAX
    } else {
        (1 << length) - 1
    };
    let field = (ones << position) & ty.mask();
    (b & !field) | ((a << position) & field)
}

pub fn prmt(a: u64, b: u64, selector: u64) -> u64 {
    let bytes = (b << 32) | a;
    let mut result = 0;
    for i in 0..4 {
        let select = selector >> (4 * i) & 0xf;
        let mut byte = bytes >> (8 * (select & 7)) & 0xff;
        if select & 8 != 0 {
            byte = if byte & 0x80 != 0 { 0xff } else { 0 };
        }
        result |= byte << (8 * i);
    }
    result
}

pub fn shf(a: u64, b: u64, count: u64, left: bool, wrap: bool) -> u64 {
    let both = (b << 32) | a;
    let n = if wrap { count & 31 } else { count.min(32) };
    let shifted = if left { (both << n) >> 32 } else { both >> n };
    shifted & 0xffff_ffff
}

pub fn lop3(a: u64, b: u64, c: u64, table: u8) -> u64 {
    let mut result = 0;
    for row in 0..8 {
        if table >> row & 1 == 1 {
            let pick = |value: u64, bit: u8| if row >> bit & 1 == 1 { value } else { !value };
            result |= pick(a, 2) & pick(b, 1) & pick(c, 0);
        }
    }
    result & 0xffff_ffff
}

/// Compares; NaN operands of floats are unordered, integers never are.
pub fn compare<T: PartialOrd>(cmp: Cmp, a: T, b: T) -> bool {
    let unordered = a.partial_cmp(&b).is_none();
    match cmp {
        Cmp::Eq => a == b,
        Cmp::Ne => a != b && !unordered,
        Cmp::Lt => a < b,
        Cmp::Le => a <= b,
        Cmp::Gt => a > b,
        Cmp::Ge => a >= b,
        Cmp::Equ => a == b || unordered,
        Cmp::Neu => a != b,
        Cmp::Ltu => a < b || unordered,
        Cmp::Leu => a <= b || unordered,
        Cmp::Gtu => a > b || unordered,
        Cmp::Geu => a >= b || unordered,
        Cmp::Num => !unordered,
        Cmp::Nan => unordered,
    }
}

// Floating point

pub fn f32_of(bits: u64) -> f32 {
    f32::from_bits(bits as u32)
}

/// The bits of an arithmetic result; a NaN is canonical.
pub fn bits_of(x: f32) -> u64 {
    u64::from(if x.is_nan() { NAN_F32 } else { x.to_bits() })
}

/// A binary format by its field widths.
#[derive(Clone, Copy)]
pub struct Format {
    exponent: u32,
    mantissa: u32,
    nan: u32,
}

pub const F32: Format = Format {
    exponent: 8,
    mantissa: 23,
    nan: NAN_F32,
};
pub const F16: Format = Format {
    exponent: 5,
    mantissa: 10,
    nan: 0x7fff,
};
pub const BF16: Format = Format {
    exponent: 8,
    mantissa: 7,
    nan: 0x7fff,
};

/// Rounds once to a narrower format, subnormals kept.
pub fn narrow(x: f64, format: Format, round: Round) -> u64 {
    if x.is_nan() {
        return u64::from(format.nan);
    }
    let negative = x.is_sign_negative();
    let sign = u64::from(negative) << (format.exponent + format.mantissa);
    let infinity = ((1u64 << format.exponent) - 1) << format.mantissa;
    let bits = x.to_bits();
    let field = (bits >> 52 & 0x7ff) as i32;
    if field == 0x7ff {
        return sign | infinity;
    }
    // |x| = significand * 2^(exponent - 52)
    let fraction = bits & ((1 << 52) - 1);
    let (significand, exponent) = if field == 0 {
        (fraction, -1022)
    } else {
        (fraction | 1 << 52, field - 1023)
    };
    let bias = (1i32 << (format.exponent - 1)) - 1;
    // Below the smallest normal exponent the spacing of the results stays the same.
    let target = exponent.max(1 - bias);
    let drop = (target - exponent + 52 - format.mantissa as i32).min(63) as u32;
    let kept = significand >> drop;
    let rest = significand & ((1 << drop) - 1);
    let half = 1u64 << (drop - 1);
    let up = match round {
        Round::Nearest => rest > half || (rest == half && kept & 1 == 1),
        Round::Zero => false,
        Round::Down => negative && rest != 0,
        Round::Up => !negative && rest != 0,
    };
    // A carry out of the significand moves on to the next exponent by itself.
    let magnitude = (((target + bias - 1) as u64) << format.mantissa) + kept + u64::from(up);
    if magnitude < infinity {
        return sign | magnitude;
    }
    let to_infinity = match round {
        Round::Nearest => true,
        Round::Zero => false,
        Round::Down => negative,
        Round::Up => !negative,
    };
    sign | (infinity - u64::from(!to_infinity))
}

/// `a + b` rounded to odd: the last bit tells that the sum was inexact, so that one more rounding
/// to a much narrower format gives what rounding the exact sum would.
fn add_to_odd(a: f64, b: f64) -> f64 {
    let sum = a + b;
    if !sum.is_finite() {
        return sum;
    }
    let b_part = sum - a;
    let error = (a - (sum - b_part)) + (b - b_part);
    if error == 0.0 || sum.to_bits() & 1 == 1 {
        return sum;
    }
    let outwards = (error > 0.0) == (sum > 0.0);
    f64::from_bits(if outwards {
        sum.to_bits() + 1
    } else {
        sum.to_bits() - 1
    })
}

/// `a * b + c` with one rounding.
pub fn fma(a: f32, b: f32, c: f32, round: Round) -> u64 {
    if round == Round::Nearest {
        return bits_of(a.mul_add(b, c));
    }
    // 24 + 24 bits: exact in f64.
    let product = f64::from(a) * f64::from(b);
    directed_sum(product, f64::from(c), round)
}

pub fn add(a: f32, b: f32, round: Round) -> u64 {
    if round == Round::Nearest {
        bits_of(a + b)
    } else {
        directed_sum(f64::from(a), f64::from(b), round)
    }
}

fn directed_sum(a: f64, b: f64, round: Round) -> u64 {
    let sum = add_to_odd(a, b);
    if sum == 0.0 && a.is_sign_negative() != b.is_sign_negative() {
        return if round == Round::Down { 0x8000_0000 } else { 0 };
    }
    narrow(sum, F32, round)
}

pub fn mul(a: f32, b: f32, round: Round) -> u64 {
    if round == Round::Nearest {
        bits_of(a * b)
    } else {
        narrow(f64::from(a) * f64::from(b), F32, round)
    }
}

/// `min` and `max`: a NaN loses against a number unless `nan`; -0 is below +0.
pub fn pick(a: f32, b: f32, nan: bool, max: bool) -> u64 {
    if a.is_nan() || b.is_nan() {
        let both = a.is_nan() && b.is_nan();
        return bits_of(if nan || both {
            f32::NAN
        } else if a.is_nan() {
            b
        } else {
            a
        });
    }
    let a_below = a < b || (a == b && a.is_sign_negative());
    bits_of(if a_below == max { b } else { a })
}

/// What `cvt.rn.satfinite.e4m3x2.f32` makes of one operand.
///
/// The PTX ISA says of `.e4m3` that it has 4 bits of exponent and 3 of mantissa, no infinity, and 0x7f and
/// 0xff as its only NaNs; of `.rn` that ties go to even; and of `.satfinite` that a NaN becomes a NaN and
/// what is larger than the largest number becomes that, with its sign (sections "Alternate Floating-Point
/// Data Formats" and "cvt"). Which of the two NaNs it does not say. Here it is the one with the operand's
/// sign, so that code which needs another one is found out.
pub fn e4m3(x: f32) -> u8 {
    let sign = u8::from(x.is_sign_negative()) << 7;
    if x.is_nan() {
        return sign | 0x7f;
    }
    let magnitude = f64::from(x.abs());
    // Above it the byte would be that of NaN or of none.
    const LARGEST: f64 = 448.0;
    if magnitude > LARGEST {
        return sign | 0x7e;
    }
    // Numbers of one exponent lie 2^-3 of its power of two apart; those below 2^-6 as those from there on.
    let exponent = ((magnitude.to_bits() >> 52) as i32 - 1023).max(-6);
    let steps = (magnitude / f64::from(exponent - 3).exp2()).round_ties_even() as i32;
    // Of 8 to 15 steps 8 are said by the exponent, which 16 bring to the next one.
    sign | ((exponent + 6) * 8 + steps) as u8
}

fn round_integral(x: f64, round: Round) -> f64 {
    match round {
        Round::Nearest => x.round_ties_even(),
        Round::Zero => x.trunc(),
        Round::Down => x.floor(),
        Round::Up => x.ceil(),
    }
}

fn clamp(value: i128, ty: Ty) -> i128 {
    let bits = ty.bits();
    let (low, high) = if ty.signed() {
        (-(1i128 << (bits - 1)), (1 << (bits - 1)) - 1)
    } else {
        (0, (1i128 << bits) - 1)
    };
    value.clamp(low, high)
}

/// An integer as an f64, rounded to odd where it has more than 53 bits.
fn integer_to_odd(value: i128) -> f64 {
    let magnitude = value.unsigned_abs() as u64;
    let excess = 11u32.saturating_sub(magnitude.leading_zeros());
    let lost = magnitude & ((1 << excess) - 1) != 0;
    let kept = (magnitude >> excess) | u64::from(lost);
    let x = kept as f64 * f64::from(1u32 << excess);
    if value < 0 { -x } else { x }
}

/// The value of a float register, exactly.
fn float(value: u64, ty: Ty) -> f64 {
    match ty {
        Ty::F16 => half::f16::from_bits(value as u16).to_f64(),
        Ty::Bf16 => half::bf16::from_bits(value as u16).to_f64(),
        _ => f64::from(f32_of(value)),
    }
}

pub fn format_of(ty: Ty) -> Format {
    match ty {
        Ty::F16 | Ty::F16x2 => F16,
        Ty::Bf16 | Ty::Bf16x2 => BF16,
        _ => F32,
    }
}

pub fn convert(value: u64, c: &Convert) -> u64 {
    let from_float = c.from.class() == Class::Float;
    if c.to.class() == Class::Float {
        let mut x = if from_float {
            float(value, c.from)
        } else {
            integer_to_odd(integer(value, c.from))
        };
        if c.integral {
            x = round_integral(x, c.round);
        }
        if c.saturate {
            // NaN becomes +0, and so does -0.
            x = if x > 0.0 { x.min(1.0) } else { 0.0 };
        }
        return narrow(x, format_of(c.to), c.round);
    }
    let bits = c.to.bits();
    let result = if from_float {
        let x = float(value, c.from);
        if x.is_nan() {
            return if bits == 64 { 1 << 63 } else { 0 };
        }
        clamp(round_integral(x, c.round) as i128, c.to)
    } else if c.saturate {
        clamp(integer(value, c.from), c.to)
    } else {
        integer(value, c.from)
    };
    extend(result as u64, c.to, c.register)
}

/// A value of type `ty` as a register of `register` bits holds it.
pub fn extend(value: u64, ty: Ty, register: u8) -> u64 {
    if ty.signed() {
        sign_extend(value, ty.bits()) as u64 & (u64::MAX >> (64 - u32::from(register)))
    } else {
        value & ty.mask()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A fixed sequence of bit patterns.
    fn patterns() -> impl Iterator<Item = u64> {
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        std::iter::repeat_with(move || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            state ^ (state >> 29)
        })
    }

    #[test]
    fn directed_roundings_enclose_the_nearest() {
        let mut bits = patterns();
        for _ in 0..100_000 {
            let [x, y, z] = [0; 3].map(|_: u32| f32_of(bits.next().unwrap_or(0) >> 32));
            let at = |round| f32_of(fma(x, y, z, round));
            let [nearest, zero, down, up] =
                [Round::Nearest, Round::Zero, Round::Down, Round::Up].map(at);
            if nearest.is_nan() {
                assert!(zero.is_nan() && down.is_nan() && up.is_nan());
                continue;
            }
            assert!(nearest == down || nearest == up, "{x:e} * {y:e} + {z:e}");
            assert!(up == down || up == down.next_up());
            assert_eq!(zero, if nearest.is_sign_negative() { up } else { down });
        }
    }

    #[test]
    fn narrowing_agrees_with_other_implementations() {
        for bits in patterns().take(200_000) {
            let wide = f64::from_bits(bits);
            if !wide.is_nan() {
                let expected = u64::from((wide as f32).to_bits());
                assert_eq!(narrow(wide, F32, Round::Nearest), expected);
            }
            // Exponents near the range of f16.
            let x = f32::from_bits((bits as u32 & 0x87ff_ffff) + 0x3400_0000);
            let (half, brain) = (
                half::f16::from_f32(x).to_bits(),
                half::bf16::from_f32(x).to_bits(),
            );
            assert_eq!(
                narrow(f64::from(x), F16, Round::Nearest),
                u64::from(half),
                "{x:e}"
            );
            assert_eq!(
                narrow(f64::from(x), BF16, Round::Nearest),
                u64::from(brain),
                "{x:e}"
            );
        }
    }
}
