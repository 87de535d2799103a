//! Caches of 8-bit codes: where their scales are, and what they stand for.

use crate::AttentionError;
use crate::error::{agree, usable};
use phasor::quantize::{Codes, ScaleForm, e8m0_to_scale};
use phasor::{CacheLayout, HostBytes, ScaleLayout, StoredCodes};

/// Where the scales of codes are.
#[derive(Debug)]
pub enum CodeScales<'a> {
    /// Those of [`StoredCodes::given`]: one for all heads, or one for each.
    Given(&'a [f32]),
    /// Calls write them with the codes, in f32.
    F32(&'a mut [f32]),
    /// As bytes of E8M0.
    E8m0(&'a mut [u8]),
    /// Between the codes ([`ScaleLayout::inline`]).
    Inline,
}

/// What a step is given of them.
pub(crate) enum StepScales<'a> {
    Given(&'a [f32]),
    Written(HostBytes<'a>),
    Inline,
}

/// Codes that attention knows, of groups that a head is made of.
pub(crate) fn check_codes(codes: &StoredCodes, cache: &CacheLayout) -> Result<(), AttentionError> {
    if !matches!(codes.codes(), Codes::E4m3 | Codes::Int8 | Codes::Int8Full) {
        return Err(AttentionError::Weights {
            what: "codes of a cache",
            remedy: "they must be e4m3 or int8",
        });
    }
    let [.., head_dim] = cache.shape();
    let group = codes.group_dims(head_dim);
    if group == 0 || !head_dim.is_multiple_of(group) {
        return Err(AttentionError::Mismatch {
            what: "dims that share a scale, which must divide head_dim",
            expected: head_dim,
            got: group,
        });
    }
    Ok(())
}

impl CodeScales<'_> {
    /// Whether they are the scales of these codes, and as many as a cache has.
    pub(crate) fn check(
        &self,
        codes: &StoredCodes,
        cache: &CacheLayout,
        buffer: usize,
    ) -> Result<(), AttentionError> {
        check_codes(codes, cache)?;
        let refuse = |what, remedy| Err(AttentionError::Weights { what, remedy });
        let [_, _, heads, _] = cache.shape();
        let (bytes, unit) = match (self, codes.scale_layout()) {
            (CodeScales::Given(scales), None) => {
                if scales.len() != 1 {
                    agree("scales that are given, one a head", heads, scales.len())?;
                }
                return scales
                    .iter()
                    .try_for_each(|&scale| usable("a scale of codes", f64::from(scale)));
            }
            (_, None) => return refuse("scales of codes", "give those that values are divided by"),
            (CodeScales::F32(scales), Some(at)) if !at.is_inline() && !codes.scales_are_e8m0() => {
                (scales.len().saturating_mul(4), 4)
            }
            (CodeScales::E8m0(scales), Some(at)) if !at.is_inline() && codes.scales_are_e8m0() => {
                (scales.len(), 1)
            }
            (CodeScales::Inline, Some(at)) if at.is_inline() => (buffer, 1),
            _ => {
                return refuse(
                    "scales of codes",
                    "give room for what is written: f32, bytes of E8M0, or inline",
                );
            }
        };
        let needed = codes.scale_bytes(cache).unwrap_or(usize::MAX);
        match bytes < needed {
            true => Err(AttentionError::Mismatch {
                what: "scales of codes",
                expected: needed.div_ceil(unit),
                got: bytes / unit,
            }),
            false => Ok(()),
        }
    }

    pub(crate) fn of_step(&mut self) -> StepScales<'_> {
        match self {
            CodeScales::Given(scales) => StepScales::Given(scales),
            CodeScales::F32(scales) => StepScales::Written((&mut **scales).into()),
            CodeScales::E8m0(scales) => StepScales::Written((&mut **scales).into()),
            CodeScales::Inline => StepScales::Inline,
        }
    }

    /// The same, to be read; `codes` is the buffer of the cache.
    pub(crate) fn view<'b>(&'b self, codes: &'b [u8]) -> ScalesView<'b> {
        match self {
            CodeScales::Given(scales) => ScalesView::Given(scales),
            CodeScales::F32(scales) => ScalesView::F32(scales),
            CodeScales::E8m0(scales) => ScalesView::Bytes(scales),
            CodeScales::Inline => ScalesView::Bytes(codes),
        }
    }
}

#[derive(Clone, Copy)]
pub(crate) enum ScalesView<'a> {
    Given(&'a [f32]),
    F32(&'a [f32]),
    Bytes(&'a [u8]),
}

/// Codes of keys or values, which are checked to be what a cache needs.
#[derive(Clone, Copy)]
pub(crate) struct CodedValues<'a> {
    bytes: &'a [u8],
    codes: Codes,
    /// Whether the given scales are inverses.
    inverse: bool,
    /// Dims that share a scale; `None`: a head.
    group: Option<usize>,
    layout: ScaleLayout,
    e8m0: bool,
    scales: ScalesView<'a>,
}

impl<'a> CodedValues<'a> {
    pub(crate) fn new(codes: StoredCodes, bytes: &'a [u8], scales: ScalesView<'a>) -> Self {
        let of = codes.scale_layout();
        Self {
            bytes,
            codes: codes.codes(),
            inverse: of.is_none() && codes.form() == ScaleForm::Multiply,
            group: of.map(|_| codes.group_dims(usize::MAX)),
            layout: of.unwrap_or(ScaleLayout::strided(0, 0, 0, 0)),
            e8m0: codes.scales_are_e8m0(),
            scales,
        }
    }

    /// The values of codes, without their scale.
    #[inline(always)]
    pub(crate) fn read(&self, first: usize, row: &mut [f32]) {
        let codes = &self.bytes[first..first + row.len()];
        match self.codes {
            Codes::E4m3 => {
                for (value, &code) in row.iter_mut().zip(codes) {
                    *value = e4m3(code);
                }
            }
            _ => {
                for (value, &code) in row.iter_mut().zip(codes) {
                    *value = f32::from(code as i8);
                }
            }
        }
    }

    /// Multiplies values by their scales, or divides them by these where they are inverses.
    #[inline(always)]
    pub(crate) fn scale(&self, [page, slot, head]: [usize; 3], row: &mut [f32]) {
        let [pages, slots, heads, groups] = self.layout.strides();
        let first = self.layout.offset() + page * pages + slot * slots + head * heads;
        for (group, row) in row.chunks_mut(self.group.unwrap_or(usize::MAX)).enumerate() {
            let at = first + group * groups;
            let scale = match self.scales {
                ScalesView::Given([scale]) => *scale,
                ScalesView::Given(scales) => scales[head],
                ScalesView::F32(scales) => scales[at],
                ScalesView::Bytes(bytes) if self.e8m0 => e8m0_to_scale(bytes[at]),
                ScalesView::Bytes(bytes) => match bytes[4 * at..].first_chunk() {
                    Some(&bytes) => f32::from_ne_bytes(bytes),
                    None => f32::NAN,
                },
            };
            if self.inverse {
                row.iter_mut().for_each(|x| *x /= scale);
            } else {
                row.iter_mut().for_each(|x| *x *= scale);
            }
        }
    }
}

/// As `phasor::quantize::e4m3_to_f32`, without branches: the bits of a code are those of an f32 whose
/// exponent is 120 less, subnormal where the code is.
#[inline(always)]
pub(crate) fn e4m3(code: u8) -> f32 {
    const UP: f32 = f32::from_bits((120 + 127) << 23);
    let magnitude = u32::from(code & 0x7f);
    let value = f32::from_bits(magnitude << 20) * UP;
    let value = if magnitude == 0x7f { f32::NAN } else { value };
    f32::from_bits(value.to_bits() | u32::from(code & 0x80) << 24)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_of_e4m3_has_its_value() {
        for code in 0..=u8::MAX {
            let (got, expected) = (e4m3(code), phasor::quantize::e4m3_to_f32(code));
            assert!(
                got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan(),
                "{code}: {got} is not {expected}"
            );
        }
    }
}
