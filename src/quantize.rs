//! Values as 8-bit codes and a scale, as caches of keys and values hold them.
//!
//! Every step is an operation of f32 that rounds once, or one on integers, so that the codes are the same
//! on every device:
//!
//! 1. the scale: given, or of the largest magnitude of the group (`amax`) over the largest code,
//!    `s = max(amax / most, floor)`, `most` being 448 or 127; perhaps rounded to a power of two;
//! 2. the value over the scale: `x / s` or `x * (1 / s)`, as [`ScaleForm`] says;
//! 3. the code: to nearest even, and to the largest code where there is no larger.
//!
//! A NaN is left out of `amax`, and so is an infinity, which has the largest code as its own. A NaN is
//! the NaN of e4m3 (`0x7f`), whatever its sign and payload were, and 0 in int8.
//!
//! ```
//! use phasor::quantize::{Codes, Quantization, Scale};
//!
//! # fn main() -> Result<(), phasor::Error> {
//! let head = [0.5f32, -3.0, 7.0, 0.01];
//! let quantization = Quantization::new(Codes::E4m3, Scale::dynamic(1e-6));
//! let mut codes = [0; 4];
//! let scale = quantization.quantize(&head, &mut codes)?;
//! assert_eq!(scale, 7.0 / 448.0);
//!
//! let mut back = [0.0f32; 4];
//! quantization.dequantize(&codes, scale, &mut back)?;
//! assert_eq!(back, [0.5, -3.0, 7.0, 0.009765625]);
//! # Ok(())
//! # }
//! ```
//!
//! Sources: "FP8 Formats for Deep Learning" (Micikevicius et al., 2022) for e4m3, the OCP Microscaling
//! Formats (MX) Specification 1.0 for E8M0.

use crate::{Element, Error};

/// The largest value of e4m3.
const E4M3_MOST: f32 = 448.0;
/// Its code.
const E4M3_MOST_CODE: u32 = 0x7e;
const E4M3_NAN: u8 = 0x7f;
/// 2^-127, the least scale of E8M0.
const E8M0_LEAST: f32 = f32::from_bits(0x0040_0000);
const INFINITY: u32 = f32::INFINITY.to_bits();

/// The nearest value of e4m3 (4 bits of exponent, 3 of significand, no infinities; `e4m3fn`): ties go to
/// even, what lies outside becomes ±448, and every NaN `0x7f`.
#[inline(always)]
pub const fn e4m3_from_f32(x: f32) -> u8 {
    // Without branches, so that loops become vectors.
    let bits = x.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    // 20 bits of the significand go, and the exponent's bias is 7 in place of 127.
    let rounded = magnitude + 0x7_ffff + ((magnitude >> 20) & 1);
    let normal = (rounded >> 20).wrapping_sub(120 << 3);
    // Below 2^-6 codes are multiples of 2^-9, as all numbers from 2^14 to 2^15 are.
    const UNITS: f32 = 16384.0;
    let small = (f32::from_bits(magnitude) + UNITS)
        .to_bits()
        .wrapping_sub(UNITS.to_bits());
    let code = if magnitude >= 121 << 23 {
        normal
    } else {
        small
    };
    let code = if code > E4M3_MOST_CODE {
        E4M3_MOST_CODE
    } else {
        code
    };
    let code = ((bits >> 24) as u8 & 0x80) | code as u8;
    if magnitude > INFINITY { E4M3_NAN } else { code }
}

/// The value of an e4m3 code, exactly. NaN is `0x7fffffff`.
pub const fn e4m3_to_f32(code: u8) -> f32 {
    let magnitude = (code & 0x7f) as u32;
    let value = match magnitude {
        0x7f => return f32::from_bits(0x7fff_ffff),
        // Multiples of 2^-9.
        0..8 => magnitude as f32 * (1.0 / 512.0),
        _ => f32::from_bits((magnitude << 20) + (120 << 23)),
    };
    match code & 0x80 {
        0 => value,
        _ => -value,
    }
}

/// The byte of an E8M0 scale, which is a power of two from 2^-127 to 2^127, as [`Quantization::quantize`]
/// returns it where scales are [rounded to one](ScaleRounding). `None` if it is not.
pub const fn e8m0_from_scale(scale: f32) -> Option<u8> {
    let bits = scale.to_bits();
    if bits == E8M0_LEAST.to_bits() {
        return Some(0);
    }
    let exponent = bits >> 23;
    match bits & 0x7f_ffff {
        // An infinity has no byte; the sign is above the exponent.
        0 if exponent >= 1 && exponent < 255 => Some(exponent as u8),
        _ => None,
    }
}

/// The scale of an E8M0 byte; `255` is NaN.
pub const fn e8m0_to_scale(byte: u8) -> f32 {
    match byte {
        0 => E8M0_LEAST,
        255 => f32::from_bits(0x7fff_ffff),
        _ => f32::from_bits((byte as u32) << 23),
    }
}

/// What codes stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Codes {
    /// 8-bit floats up to 448 ([`e4m3_from_f32`]).
    E4m3,
    /// Integers from -127 to 127, as the bits of an `i8`.
    Int8,
    /// Integers from -128 to 127. Scales are those of [`Int8`](Self::Int8), so that -128 stands only for
    /// what a given scale does not reach.
    Int8Full,
}

impl Codes {
    /// The largest value.
    pub(crate) const fn most(self) -> f32 {
        match self {
            Codes::E4m3 => E4M3_MOST,
            Codes::Int8 | Codes::Int8Full => 127.0,
        }
    }

    #[inline(always)]
    pub(crate) fn of(self, x: f32) -> u8 {
        // From 2^23 to 2^24 all numbers are integers, so a sum is rounded to one, whose last bits it has.
        // With comparisons that are an instruction each, so that loops become vectors.
        const INTEGERS: f32 = 12_582_912.0;
        let integer = |least: f32| {
            let x = if x.is_nan() { 0.0 } else { x };
            let x = if x > least { x } else { least };
            let x = if x < 127.0 { x } else { 127.0 };
            (x + INTEGERS).to_bits() as u8
        };
        match self {
            Codes::E4m3 => e4m3_from_f32(x),
            Codes::Int8 => integer(-127.0),
            Codes::Int8Full => integer(-128.0),
        }
    }

    #[inline(always)]
    pub(crate) fn value(self, code: u8) -> f32 {
        match self {
            Codes::E4m3 => e4m3_to_f32(code),
            Codes::Int8 | Codes::Int8Full => f32::from(code as i8),
        }
    }
}

/// How a scale is applied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ScaleForm {
    /// `x / s`.
    #[default]
    Divide,
    /// `x * (1 / s)`, the inverse rounded to f32; of a given scale, which is that inverse, `x * s`.
    Multiply,
}

/// Which scales a group may have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ScaleRounding {
    /// Any f32.
    #[default]
    None,
    /// The least power of two that is not below it (DeepSeek): no value is beyond the largest code.
    PowerOfTwoUp,
    /// `amax` rounded down to a power of two, over the largest one that has a code (OCP MX): values of
    /// more than 7/8 of the next power of two become the largest code.
    PowerOfTwoDown,
}

/// Where the scale of a group comes from.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Scale {
    /// It is given. vLLM divides by it, FlashInfer and TensorRT-LLM multiply by its inverse.
    Static {
        /// The scale, or its inverse where the form is [`ScaleForm::Multiply`].
        scale: f32,
        /// How it is applied.
        form: ScaleForm,
    },
    /// It is that of the group's largest magnitude.
    Dynamic {
        /// The least scale: 1e-6 in vLLM's cache per token and head, [`f32::MIN_POSITIVE`] in its latent
        /// one. Less than that, or NaN, counts as [`f32::MIN_POSITIVE`], or as 2^-127 where scales are
        /// powers of two, so that zeros have the code 0.
        floor: f32,
        /// How it is applied.
        form: ScaleForm,
        /// Whether it is a power of two.
        rounding: ScaleRounding,
    },
}

impl Scale {
    /// A given scale, which values are divided by.
    pub const fn fixed(scale: f32) -> Self {
        Self::Static {
            scale,
            form: ScaleForm::Divide,
        }
    }

    /// The inverse of a scale, which values are multiplied by.
    pub const fn inverse(scale: f32) -> Self {
        Self::Static {
            scale,
            form: ScaleForm::Multiply,
        }
    }

    /// That of each group, of at least `floor`, which values are divided by.
    pub const fn dynamic(floor: f32) -> Self {
        Self::Dynamic {
            floor,
            form: ScaleForm::Divide,
            rounding: ScaleRounding::None,
        }
    }
}

/// How the values of a group, such as the dims of a head, become codes that share a scale.
///
/// ```
/// # fn main() -> Result<(), phasor::Error> {
/// use phasor::quantize::{Codes, Quantization, Scale};
///
/// // int8 by a scale of 0.5 that is given.
/// let quantization = Quantization::new(Codes::Int8, Scale::fixed(0.5));
/// let mut codes = [0u8; 3];
/// quantization.quantize(&[1.0f32, -2.25, 1000.0], &mut codes)?;
/// assert_eq!(codes.map(|code| code as i8), [2, -4, 127]); // -4.5 goes to even, 2000 to the largest
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Quantization {
    codes: Codes,
    scale: Scale,
}

impl Quantization {
    /// Codes with a scale.
    pub const fn new(codes: Codes, scale: Scale) -> Self {
        Self { codes, scale }
    }

    /// Turns the values of one group into codes, and returns its scale: what codes are multiplied by to
    /// have the values back, or, where a given scale is an inverse, divided by.
    ///
    /// # Errors
    /// [`Error::CodesLength`] unless there is a code for each value.
    pub fn quantize<T: Element>(&self, values: &[T], codes: &mut [u8]) -> Result<f32, Error> {
        check(values.len(), codes.len())?;
        let (scale, factor) = match self.scale {
            Scale::Static { scale, form } => (scale, Factor::given(scale, form)),
            Scale::Dynamic {
                floor,
                form,
                rounding,
            } => {
                let least = least_scale(floor, rounding);
                let scale = scale_of(amax(values), self.codes.most(), least, rounding);
                (scale, Factor::of_group(scale, form))
            }
        };
        factor.encode(self.codes, values, codes, |byte, code| *byte = code);
        Ok(scale)
    }

    /// Turns codes back into values, by the scale that [`quantize`](Self::quantize) returned: the product
    /// (or quotient, where that is an inverse) rounded to f32, then to `T`.
    ///
    /// # Errors
    /// [`Error::CodesLength`] unless there is a code for each value.
    pub fn dequantize<T: Element>(
        &self,
        codes: &[u8],
        scale: f32,
        values: &mut [T],
    ) -> Result<(), Error> {
        check(values.len(), codes.len())?;
        let factor = match self.scale {
            Scale::Static { form, .. } => Factor::back_of_given(scale, form),
            Scale::Dynamic { .. } => Factor::Product(scale),
        };
        factor.decode(self.codes, codes, values);
        Ok(())
    }
}

/// What values are multiplied by or divided by on their way to codes, or codes on their way back.
#[derive(Clone, Copy)]
pub(crate) enum Factor {
    Product(f32),
    Quotient(f32),
}

impl Factor {
    /// Of values, whose scale (or its inverse) is given.
    #[inline(always)]
    pub(crate) fn given(scale: f32, form: ScaleForm) -> Self {
        match form {
            ScaleForm::Divide => Self::quotient(scale),
            ScaleForm::Multiply => Self::Product(scale),
        }
    }

    /// Of values, whose scale is that of their group.
    #[inline(always)]
    pub(crate) fn of_group(scale: f32, form: ScaleForm) -> Self {
        match form {
            ScaleForm::Divide => Self::quotient(scale),
            ScaleForm::Multiply => Self::Product(1.0 / scale),
        }
    }

    /// Of codes, whose scale (or its inverse) is given.
    #[inline(always)]
    pub(crate) fn back_of_given(scale: f32, form: ScaleForm) -> Self {
        match form {
            ScaleForm::Divide => Self::Product(scale),
            ScaleForm::Multiply => Self::Quotient(scale),
        }
    }

    /// Quotients by powers of two are the same products, which are faster, as their inverses are exact;
    /// unless one of the two is subnormal.
    #[inline(always)]
    fn quotient(scale: f32) -> Self {
        let bits = scale.to_bits();
        match bits & 0x7f_ffff == 0 && (1..254).contains(&(bits >> 23)) {
            true => Self::Product(1.0 / scale),
            false => Self::Quotient(scale),
        }
    }

    /// The codes of values, which `put` writes. A loop for each kind, so that none has a branch inside.
    #[inline(always)]
    pub(crate) fn encode<T: Element, B>(
        self,
        codes: Codes,
        values: &[T],
        bytes: &mut [B],
        put: impl Fn(&mut B, u8),
    ) {
        let pairs = values.iter().map(|value| value.widen()).zip(bytes);
        match (codes, self) {
            (Codes::E4m3, Self::Product(by)) => {
                pairs.for_each(|(x, byte)| put(byte, Codes::E4m3.of(x * by)));
            }
            (Codes::E4m3, Self::Quotient(by)) => {
                pairs.for_each(|(x, byte)| put(byte, Codes::E4m3.of(x / by)));
            }
            (_, Self::Product(by)) => pairs.for_each(|(x, byte)| put(byte, codes.of(x * by))),
            (_, Self::Quotient(by)) => pairs.for_each(|(x, byte)| put(byte, codes.of(x / by))),
        }
    }

    /// The values of codes, rounded to f32 and then to `T`.
    #[inline(always)]
    pub(crate) fn decode<T: Element>(self, codes: Codes, bytes: &[u8], values: &mut [T]) {
        let pairs = bytes.iter().zip(values);
        match (codes, self) {
            (Codes::E4m3, Self::Product(by)) => {
                pairs.for_each(|(&byte, x)| *x = T::narrow(Codes::E4m3.value(byte) * by));
            }
            (Codes::E4m3, Self::Quotient(by)) => {
                pairs.for_each(|(&byte, x)| *x = T::narrow(Codes::E4m3.value(byte) / by));
            }
            (_, Self::Product(by)) => {
                pairs.for_each(|(&byte, x)| *x = T::narrow(Codes::Int8.value(byte) * by));
            }
            (_, Self::Quotient(by)) => {
                pairs.for_each(|(&byte, x)| *x = T::narrow(Codes::Int8.value(byte) / by));
            }
        }
    }
}

/// The largest magnitude that is a number; 0 if there is none.
#[inline(always)]
pub(crate) fn amax<T: Element>(values: &[T]) -> f32 {
    // As bits, which are in the order of magnitudes, and can be compared in any order.
    let mut amax = 0;
    for value in values {
        let magnitude = (value.widen().to_bits() & 0x7fff_ffff) as i32;
        let counts = magnitude < INFINITY as i32;
        amax = amax.max(if counts { magnitude } else { 0 });
    }
    f32::from_bits(amax as u32)
}

/// The least scale that a floor stands for.
pub(crate) fn least_scale(floor: f32, rounding: ScaleRounding) -> f32 {
    // Neither NaN nor an infinity is a floor.
    let floor = match floor.is_nan() {
        true => 0.0,
        false => floor.clamp(0.0, f32::MAX),
    };
    match rounding {
        ScaleRounding::None => floor.max(f32::MIN_POSITIVE),
        ScaleRounding::PowerOfTwoUp => power_of_two_up(floor),
        ScaleRounding::PowerOfTwoDown => power_of_two_down(floor),
    }
}

/// The scale of a group, of which `amax` is the largest magnitude.
pub(crate) fn scale_of(amax: f32, most: f32, least: f32, rounding: ScaleRounding) -> f32 {
    match rounding {
        ScaleRounding::None => (amax / most).max(least),
        ScaleRounding::PowerOfTwoUp => power_of_two_up(amax / most).max(least),
        ScaleRounding::PowerOfTwoDown => {
            power_of_two_down(amax / power_of_two_down(most)).max(least)
        }
    }
}

/// The largest power of two of E8M0 that is not above `x`, or its least.
fn power_of_two_down(x: f32) -> f32 {
    match x < f32::MIN_POSITIVE {
        true => E8M0_LEAST,
        false => f32::from_bits(x.to_bits() & INFINITY),
    }
}

/// The least power of two of E8M0 that is not below `x`, or its largest.
fn power_of_two_up(x: f32) -> f32 {
    let below = power_of_two_down(x);
    match below < x && below < e8m0_to_scale(254) {
        true => 2.0 * below,
        false => below,
    }
}

fn check(values: usize, codes: usize) -> Result<(), Error> {
    match values == codes {
        true => Ok(()),
        false => Err(Error::CodesLength {
            expected: values,
            got: codes,
        }),
    }
}
