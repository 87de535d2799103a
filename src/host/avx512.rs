//! AVX-512 (F, BW, DQ, VL): sixteen pairs at a time, in the scalar definition's order of
//! operations. What is left of a head goes to the AVX2 variant.
//!
//! Every function needs `avx512f`, `avx512bw`, `avx512dq` and `avx512vl` beside what AVX2's
//! variant needs; [`super::Isa`] checks for them.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::avx2;
use super::run::HeadRun;
use super::scalar;
use crate::angle::phase;
use crate::element::Element;
use crate::rope::{Pairing, Pairings};

/// Pairs in a vector.
pub(super) const LANES: usize = 16;

/// [`avx2::Lanes`] of twice the width.
#[doc(hidden)]
pub trait Lanes: Sized {
    /// 16 consecutive elements.
    ///
    /// # Safety
    /// Readable for 16 elements; the processor has what this variant needs. The same holds below.
    unsafe fn load(from: *const Self) -> __m512;
    /// 16 consecutive elements.
    ///
    /// # Safety
    /// See [`load`](Self::load).
    unsafe fn store(to: *mut Self, x: __m512);
    /// 32 consecutive elements, those of even and those of odd index.
    ///
    /// # Safety
    /// See [`load`](Self::load).
    unsafe fn load_pairs(from: *const Self) -> (__m512, __m512);
    /// The reverse of [`load_pairs`](Self::load_pairs).
    ///
    /// # Safety
    /// See [`load`](Self::load).
    unsafe fn store_pairs(to: *mut Self, a: __m512, b: __m512);
}

/// Rotates all heads of a run.
///
/// # Safety
/// The run's pointers are valid for its heads; the processor has what this variant needs.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) unsafe fn rotate_heads<T: Element>(
    pairings: Pairings,
    run: &HeadRun<T>,
    cos: &[f32],
    sin: &[f32],
) {
    for h in 0..run.heads {
        // SAFETY: the caller vouches for every head of the run.
        unsafe {
            let source = run.source.add(h * run.source_stride);
            let destination = run.destination.add(h * run.destination_stride);
            rotate_rest(pairings, run, (source, destination), 0, cos, sin);
        }
    }
}

/// Pairs `from..` of the run's block, in one head.
///
/// # Safety
/// `source` and `destination` start the rotated window of a head of the run; the processor has what
/// this variant needs.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) unsafe fn rotate_rest<T: Element>(
    pairings: Pairings,
    run: &HeadRun<T>,
    (source, destination): (*const T, *mut T),
    mut from: usize,
    cos: &[f32],
    sin: &[f32],
) {
    // SAFETY: whole vectors of pairs are read and written inside the rotated window; cos and sin
    // are as long as the block.
    unsafe {
        while from + LANES <= cos.len() {
            let cos = _mm512_loadu_ps(cos.as_ptr().add(from));
            let sin = _mm512_loadu_ps(sin.as_ptr().add(from));
            let pair = run.first + from;
            let (a, b) = scalar::members(pairings.source, pair, run.pairs);
            let (x, y) = match pairings.source {
                Pairing::HalfSplit => (
                    <T as Lanes>::load(source.add(a)),
                    <T as Lanes>::load(source.add(b)),
                ),
                Pairing::Interleaved => <T as Lanes>::load_pairs(source.add(a)),
            };
            let (x, y) = rotate(x, y, cos, sin);
            let (a, b) = scalar::members(pairings.destination, pair, run.pairs);
            match pairings.destination {
                Pairing::HalfSplit => {
                    <T as Lanes>::store(destination.add(a), x);
                    <T as Lanes>::store(destination.add(b), y);
                }
                Pairing::Interleaved => <T as Lanes>::store_pairs(destination.add(a), x, y),
            }
            from += LANES;
        }
        avx2::rotate_rest(pairings, run, (source, destination), from, cos, sin);
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) fn rotate(a: __m512, b: __m512, cos: __m512, sin: __m512) -> (__m512, __m512) {
    (
        _mm512_fmsub_ps(a, cos, _mm512_mul_ps(b, sin)),
        _mm512_fmadd_ps(a, sin, _mm512_mul_ps(b, cos)),
    )
}

/// cos and sin at one position, each times its scale.
///
/// # Safety
/// The processor has what this variant needs.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) unsafe fn form_exact(
    steps: &[u64],
    position: i64,
    scales: (f32, f32),
    cos: &mut [f32],
    sin: &mut [f32],
) {
    let whole = steps.len() / LANES * LANES;
    let (cos_scale, sin_scale) = (_mm512_set1_ps(scales.0), _mm512_set1_ps(scales.1));
    let position_vector = _mm512_set1_epi64(position);
    for at in (0..whole).step_by(LANES) {
        // SAFETY: `at + 16` is within steps, and cos and sin are as long.
        unsafe {
            let phases = [at, at + 8].map(|at| {
                let steps = _mm512_loadu_si512(steps.as_ptr().add(at).cast());
                _mm512_mullo_epi64(steps, position_vector)
            });
            let (c, s) = cos_sin(phases);
            _mm512_storeu_ps(cos.as_mut_ptr().add(at), _mm512_mul_ps(c, cos_scale));
            _mm512_storeu_ps(sin.as_mut_ptr().add(at), _mm512_mul_ps(s, sin_scale));
        }
    }
    // SAFETY: AVX-512 includes what AVX2's variant needs.
    unsafe {
        avx2::form_exact(
            &steps[whole..],
            position,
            scales,
            &mut cos[whole..],
            &mut sin[whole..],
        );
    }
}

/// The lower 32 bits of 16 values.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn low_words(x: [__m512i; 2]) -> __m512i {
    let low = _mm512_castsi256_si512(_mm512_cvtepi64_epi32(x[0]));
    _mm512_inserti64x4::<1>(low, _mm512_cvtepi64_epi32(x[1]))
}

/// [`phase::cos_sin`] of phases 0 to 7 and 8 to 15.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn cos_sin(phases: [__m512i; 2]) -> (__m512, __m512) {
    let rest = phases.map(|phase| _mm512_slli_epi64::<2>(phase));
    let magnitude = rest.map(|rest| _mm512_abs_epi64(rest));
    let top = low_words(magnitude.map(|m| _mm512_srli_epi64::<40>(m)));
    let bottom = _mm512_and_si512(
        low_words(magnitude.map(|m| _mm512_srli_epi64::<9>(m))),
        _mm512_set1_epi32(0x7fff_ffff),
    );
    let set = _mm512_set1_ps;
    let s = _mm512_fmadd_ps(
        _mm512_cvtepi32_ps(bottom),
        set(phase::LOW_UNIT),
        _mm512_mul_ps(_mm512_cvtepi32_ps(top), set(phase::HIGH_UNIT)),
    );
    let z = _mm512_mul_ps(s, s);

    let p = _mm512_fmadd_ps(z, set(phase::SIN[3]), set(phase::SIN[2]));
    let p = _mm512_fmadd_ps(z, p, set(phase::SIN[1]));
    let p = _mm512_fmadd_ps(z, p, set(phase::SIN[0]));
    let sine = _mm512_fmadd_ps(s, set(phase::SIN_1), _mm512_mul_ps(s, p));

    let c = _mm512_fmadd_ps(z, set(phase::COS[3]), set(phase::COS[2]));
    let c = _mm512_fmadd_ps(z, c, set(phase::COS[1]));
    let c = _mm512_fmadd_ps(z, c, set(phase::COS[0]));
    let cosine = _mm512_fmadd_ps(z, c, set(1.0));

    let sign_bit = _mm512_set1_epi32(i32::MIN);
    let high_words = |x: [__m512i; 2]| low_words(x.map(|x| _mm512_srli_epi64::<32>(x)));
    let rest_sign = _mm512_and_si512(high_words(rest), sign_bit);
    let sine = _mm512_xor_ps(sine, _mm512_castsi512_ps(rest_sign));
    let quarter = _mm512_srli_epi32::<30>(_mm512_add_epi32(
        high_words(phases),
        _mm512_set1_epi32(0x2000_0000),
    ));
    let odd = _mm512_test_epi32_mask(quarter, _mm512_set1_epi32(1));
    let sign =
        |quarter| _mm512_castsi512_ps(_mm512_and_si512(_mm512_slli_epi32::<30>(quarter), sign_bit));
    let cos_sign = sign(_mm512_add_epi32(quarter, _mm512_set1_epi32(1)));
    let sin_sign = sign(quarter);
    (
        _mm512_xor_ps(_mm512_mask_blend_ps(odd, cosine, sine), cos_sign),
        _mm512_xor_ps(_mm512_mask_blend_ps(odd, sine, cosine), sin_sign),
    )
}

/// Every NaN becomes 0x7fffffff.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn canonical(x: __m512) -> __m512 {
    let nan = _mm512_castsi512_ps(_mm512_set1_epi32(0x7fff_ffff));
    _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x), x, nan)
}

impl Lanes for f32 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn load(from: *const Self) -> __m512 {
        // SAFETY: the caller's.
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn store(to: *mut Self, x: __m512) {
        // SAFETY: the caller's.
        unsafe { _mm512_storeu_ps(to, canonical(x)) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn load_pairs(from: *const Self) -> (__m512, __m512) {
        let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        let odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
        // SAFETY: the caller's.
        let (x, y) = unsafe { (_mm512_loadu_ps(from), _mm512_loadu_ps(from.add(16))) };
        (
            _mm512_permutex2var_ps(x, even, y),
            _mm512_permutex2var_ps(x, odd, y),
        )
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn store_pairs(to: *mut Self, a: __m512, b: __m512) {
        let first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        let second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
        let (a, b) = (canonical(a), canonical(b));
        // SAFETY: the caller's.
        unsafe {
            _mm512_storeu_ps(to, _mm512_permutex2var_ps(a, first, b));
            _mm512_storeu_ps(to.add(16), _mm512_permutex2var_ps(a, second, b));
        }
    }
}

/// 16 halves, rounded to nearest even; NaN becomes 0x7fff.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn to_f16(x: __m512) -> __m256i {
    _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(canonical(x))
}

impl Lanes for f16 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn load(from: *const Self) -> __m512 {
        // SAFETY: the caller's.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn store(to: *mut Self, x: __m512) {
        // SAFETY: the caller's.
        unsafe { _mm256_storeu_si256(to.cast(), to_f16(x)) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn load_pairs(from: *const Self) -> (__m512, __m512) {
        // SAFETY: the caller's.
        let x = unsafe { _mm512_loadu_si512(from.cast()) };
        // The 16 lower and the 16 upper halves of the 32-bit lanes.
        let even = _mm512_cvtepi32_epi16(x);
        let odd = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(x));
        (_mm512_cvtph_ps(even), _mm512_cvtph_ps(odd))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn store_pairs(to: *mut Self, a: __m512, b: __m512) {
        let even = _mm512_cvtepu16_epi32(to_f16(a));
        let odd = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(to_f16(b)));
        // SAFETY: the caller's.
        unsafe { _mm512_storeu_si512(to.cast(), _mm512_or_si512(even, odd)) }
    }
}

/// The rounded value in the upper half of each 32-bit lane; the lower half is anything.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) fn round_to_upper(x: __m512) -> __m512i {
    let bits = _mm512_castps_si512(x);
    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    let is_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
    _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fff_0000))
}

impl Lanes for bf16 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn load(from: *const Self) -> __m512 {
        // SAFETY: the caller's.
        let x = unsafe { _mm256_loadu_si256(from.cast()) };
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(x)))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn store(to: *mut Self, x: __m512) {
        let x = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(round_to_upper(x)));
        // SAFETY: the caller's.
        unsafe { _mm256_storeu_si256(to.cast(), x) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn load_pairs(from: *const Self) -> (__m512, __m512) {
        // SAFETY: the caller's.
        let x = unsafe { _mm512_loadu_si512(from.cast()) };
        let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
        (
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(x)),
            _mm512_castsi512_ps(_mm512_and_si512(x, upper)),
        )
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn store_pairs(to: *mut Self, a: __m512, b: __m512) {
        let even = _mm512_srli_epi32::<16>(round_to_upper(a));
        let x = _mm512_mask_blend_epi16(0xaaaa_aaaa, even, round_to_upper(b));
        // SAFETY: the caller's.
        unsafe { _mm512_storeu_si512(to.cast(), x) }
    }
}
