//! AVX2, FMA and F16C: eight pairs at a time, in the scalar definition's order of operations.
//!
//! Every function needs `avx2`, `fma` and `f16c`; [`super::Isa`] checks for them.

use std::arch::x86_64::*;
use std::marker::PhantomData;

use half::{bf16, f16};

use super::run::{AngleBlock, Phases};
use super::vector::{self, Careful, Float, PairVectors, PhaseVectors, Straight, loops};
use crate::angle::phase::Scale;

/// The variant for elements of every type.
pub struct Avx2;

/// What to keep of an f16 in the upper half of a word, shifted right by 3 bits with its sign: this is an
/// f32 then, of its value over [`F16_SCALE`], subnormals included.
pub(super) const F16_KEPT: i32 = 0x8fff_e000_u32 as i32;
pub(super) const F16_SCALE: f32 = f32::from_bits((127 + 112) << 23);

/// Where vector `i` of `lanes` elements begins, if the last one is to end with element `n`.
#[inline(always)]
pub(super) fn vector_at(i: usize, lanes: usize, n: usize) -> usize {
    (i * lanes).min(n - lanes)
}

/// An instruction set's own straight code for halves.
pub struct Halves<S>(PhantomData<S>);

/// An instruction set's own straight code for adjacent pairs.
pub struct Adjacent<S>(PhantomData<S>);

loops!(Avx2, "avx2,fma,f16c");

/// cos and sin of as many phases as there are steps, scaled.
///
/// # Safety
/// There are at most [`super::run::BLOCK`] steps; the processor has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn form(steps: &[u64], phases: Phases, scale: Scale, angles: &mut AngleBlock) {
    // SAFETY: the caller's.
    unsafe { vector::form::<Avx2>(steps, phases, scale, angles) }
}

impl Float for __m256 {
    const LANES: usize = 8;

    #[inline]
    #[target_feature(enable = "avx")]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's.
        unsafe { _mm256_loadu_ps(from) }
    }
    #[inline]
    #[target_feature(enable = "avx")]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's.
        unsafe { _mm256_storeu_ps(to, self) }
    }
    #[inline]
    #[target_feature(enable = "avx")]
    unsafe fn splat(x: f32) -> Self {
        _mm256_set1_ps(x)
    }
    #[inline]
    #[target_feature(enable = "avx")]
    unsafe fn mul(self, by: Self) -> Self {
        _mm256_mul_ps(self, by)
    }
    #[inline]
    #[target_feature(enable = "avx")]
    unsafe fn add(self, plus: Self) -> Self {
        _mm256_add_ps(self, plus)
    }
    #[inline]
    #[target_feature(enable = "avx")]
    unsafe fn sub(self, minus: Self) -> Self {
        _mm256_sub_ps(self, minus)
    }
    #[inline]
    #[target_feature(enable = "fma")]
    unsafe fn mul_add(self, by: Self, plus: Self) -> Self {
        _mm256_fmadd_ps(self, by, plus)
    }
    #[inline]
    #[target_feature(enable = "fma")]
    unsafe fn mul_sub(self, by: Self, minus: Self) -> Self {
        _mm256_fmsub_ps(self, by, minus)
    }
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn interleave(self, second: Self) -> [Self; 2] {
        adjacent(self, second).into()
    }
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn deinterleave([first, second]: [Self; 2]) -> (Self, Self) {
        (
            in_order(_mm256_shuffle_ps::<0b10_00_10_00>(first, second)),
            in_order(_mm256_shuffle_ps::<0b11_01_11_01>(first, second)),
        )
    }
    #[inline]
    #[target_feature(enable = "avx")]
    unsafe fn add_neighbours(self, second: Self) -> Self {
        let even = _mm256_shuffle_ps::<0b10_00_10_00>(self, second);
        _mm256_add_ps(even, _mm256_shuffle_ps::<0b11_01_11_01>(self, second))
    }
    #[inline]
    #[target_feature(enable = "avx")]
    unsafe fn fold_both(self, to: *mut [f32; 2]) {
        let upper = _mm256_extractf128_ps::<1>(self);
        let x = _mm_add_ps(_mm256_castps256_ps128(self), upper);
        let x = _mm_add_ps(x, _mm_movehdup_ps(x));
        let both = _mm_shuffle_ps::<0b10_00_10_00>(x, x);
        // SAFETY: the caller's.
        unsafe { _mm_storel_pd(to.cast(), _mm_castps_pd(both)) }
    }
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn reciprocal_root(self, by: Self, plus: Self) -> Self {
        let root = _mm256_sqrt_ps(_mm256_add_ps(_mm256_mul_ps(self, by), plus));
        _mm256_div_ps(_mm256_set1_ps(1.0), root)
    }
}

/// The upper 32 bits of 8 values, in the order 0 1 4 5 2 3 6 7.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn upper_words([a, b]: [__m256i; 2]) -> __m256i {
    let (a, b) = (_mm256_castsi256_ps(a), _mm256_castsi256_ps(b));
    _mm256_castps_si256(_mm256_shuffle_ps::<0b11_01_11_01>(a, b))
}

/// The lower 32 bits of 8 values, in the same order.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn lower_words([a, b]: [__m256i; 2]) -> __m256i {
    let (a, b) = (_mm256_castsi256_ps(a), _mm256_castsi256_ps(b));
    _mm256_castps_si256(_mm256_shuffle_ps::<0b10_00_10_00>(a, b))
}

/// Puts the order 0 1 4 5 2 3 6 7 right.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn in_order(x: __m256) -> __m256 {
    _mm256_castpd_ps(_mm256_permute4x64_pd::<0b11_01_10_00>(_mm256_castps_pd(x)))
}

/// Flips the sign of `x` where that of `by` is set.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn flip(x: __m256, by: __m256i) -> __m256 {
    let sign = _mm256_and_si256(by, _mm256_set1_epi32(i32::MIN));
    _mm256_xor_ps(x, _mm256_castsi256_ps(sign))
}

/// The absolute value of the lower 62 bits, which carry a sign, times 4.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn magnitude(phases: __m256i) -> __m256i {
    let rest = _mm256_slli_epi64::<2>(phases);
    let sign = _mm256_cmpgt_epi64(_mm256_setzero_si256(), rest);
    _mm256_sub_epi64(_mm256_xor_si256(rest, sign), sign)
}

/// The low 64 bits of each product.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn mul_lo(a: __m256i, b: __m256i) -> __m256i {
    let cross = _mm256_add_epi64(
        _mm256_mul_epu32(_mm256_srli_epi64::<32>(a), b),
        _mm256_mul_epu32(a, _mm256_srli_epi64::<32>(b)),
    );
    _mm256_add_epi64(_mm256_mul_epu32(a, b), _mm256_slli_epi64::<32>(cross))
}

impl PhaseVectors for Avx2 {
    type Phases = [__m256i; 2];
    type Vector = __m256;
    const LANES: usize = 8;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load(from: *const u64) -> Self::Phases {
        // SAFETY: the caller's.
        unsafe {
            [
                _mm256_loadu_si256(from.cast()),
                _mm256_loadu_si256(from.add(4).cast()),
            ]
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn store(to: *mut u64, phases: Self::Phases) {
        // SAFETY: the caller's.
        unsafe {
            _mm256_storeu_si256(to.cast(), phases[0]);
            _mm256_storeu_si256(to.add(4).cast(), phases[1]);
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn add(a: Self::Phases, b: Self::Phases) -> Self::Phases {
        [_mm256_add_epi64(a[0], b[0]), _mm256_add_epi64(a[1], b[1])]
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn mul(steps: Self::Phases, position: u64) -> Self::Phases {
        let position = _mm256_set1_epi64x(position as i64);
        [mul_lo(steps[0], position), mul_lo(steps[1], position)]
    }

    // In the order of `upper_words`; `place` puts it right.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn distance([a, b]: Self::Phases) -> (__m256, __m256) {
        let (a, b) = (magnitude(a), magnitude(b));
        let high = _mm256_srli_epi32::<8>(upper_words([a, b]));
        let low = lower_words([_mm256_srli_epi64::<9>(a), _mm256_srli_epi64::<9>(b)]);
        let low = _mm256_and_si256(low, _mm256_set1_epi32(0x7fff_ffff));
        (_mm256_cvtepi32_ps(high), _mm256_cvtepi32_ps(low))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn place(
        phases: Self::Phases,
        cosine: __m256,
        sine: __m256,
        sin_flip: u32,
    ) -> (__m256, __m256) {
        let top = upper_words(phases);
        let sine = flip(sine, _mm256_slli_epi32::<2>(top));
        // The nearest quarter turn is in the upper two bits.
        let quarter = _mm256_add_epi32(top, _mm256_set1_epi32(0x2000_0000));
        let odd = _mm256_castsi256_ps(_mm256_slli_epi32::<1>(quarter));
        let next = _mm256_add_epi32(quarter, _mm256_set1_epi32(0x4000_0000));
        let sin_sign = _mm256_xor_si256(quarter, _mm256_set1_epi32(sin_flip as i32));
        (
            in_order(flip(_mm256_blendv_ps(cosine, sine, odd), next)),
            in_order(flip(_mm256_blendv_ps(sine, cosine, odd), sin_sign)),
        )
    }
}

/// Whether either holds a NaN in any place.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn has_nan((a, b): (__m256, __m256)) -> bool {
    _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_UNORD_Q>(a, b)) != 0
}

/// Every NaN becomes 0x7fffffff. NaNs are rare: kept out of the way of all else.
#[cold]
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c")]
fn canonical(x: __m256) -> __m256 {
    let nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fff_ffff));
    _mm256_blendv_ps(x, nan, _mm256_cmp_ps::<_CMP_UNORD_Q>(x, x))
}

/// [`canonical`] where there is any NaN.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn without_nan((a, b): (__m256, __m256)) -> (__m256, __m256) {
    if has_nan((a, b)) {
        (canonical(a), canonical(b))
    } else {
        (a, b)
    }
}

/// 32 bytes, past the caches if `STREAM` is the alignment, or a multiple.
///
/// # Safety
/// Writable for 32 bytes, and aligned; the processor has AVX2.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn store_half_line<const STREAM: usize>(to: *mut __m256i, x: __m256i) {
    // SAFETY: the caller's.
    unsafe {
        match STREAM {
            64 => _mm256_stream_si256(to, x),
            16 => {
                let to = to.cast::<__m128i>();
                _mm_stream_si128(to, _mm256_castsi256_si128(x));
                _mm_stream_si128(to.add(1), _mm256_extracti128_si256::<1>(x));
            }
            _ => _mm256_storeu_si256(to, x),
        }
    }
}

/// 16 bytes, past the caches if `STREAM` is the alignment, or a multiple.
///
/// # Safety
/// Writable for 16 bytes, and aligned.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn store_quarter_line<const STREAM: usize>(to: *mut __m128i, x: __m128i) {
    // SAFETY: the caller's.
    unsafe {
        match STREAM {
            0 => _mm_storeu_si128(to, x),
            _ => _mm_stream_si128(to, x),
        }
    }
}

impl PairVectors<f32> for Avx2 {
    type Vector = __m256;
    const LANES: usize = 8;
    type Rest = Avx2;
    type Halves = Careful<Self, true, true>;
    type Adjacent = Adjacent<Self>;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load_halves(a: *const f32, b: *const f32) -> (__m256, __m256) {
        // SAFETY: the caller's.
        unsafe { (_mm256_loadu_ps(a), _mm256_loadu_ps(b)) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load_adjacent(from: *const f32) -> (__m256, __m256) {
        // SAFETY: the caller's.
        unsafe { Float::deinterleave([Float::load(from), Float::load(from.add(8))]) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn store_halves<const STREAM: usize>(
        a: *mut f32,
        b: *mut f32,
        members: (__m256, __m256),
    ) {
        let (x, y) = without_nan(members);
        // SAFETY: the caller's.
        unsafe {
            store_half_line::<STREAM>(a.cast(), _mm256_castps_si256(x));
            store_half_line::<STREAM>(b.cast(), _mm256_castps_si256(y));
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn store_adjacent<const STREAM: usize>(to: *mut f32, members: (__m256, __m256)) {
        let (x, y) = without_nan(members);
        // SAFETY: the caller's.
        unsafe { store_two_half_lines::<STREAM>(to, adjacent(x, y)) }
    }
}

/// The members of 8 pairs, side by side.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn adjacent(x: __m256, y: __m256) -> (__m256, __m256) {
    let (x, y) = (in_order(x), in_order(y));
    (_mm256_unpacklo_ps(x, y), _mm256_unpackhi_ps(x, y))
}

/// # Safety
/// That of [`store_half_line`], for the next half of a line as well.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn store_two_half_lines<const STREAM: usize>(to: *mut f32, (a, b): (__m256, __m256)) {
    // SAFETY: the caller's.
    unsafe {
        store_half_line::<STREAM>(to.cast(), _mm256_castps_si256(a));
        store_half_line::<STREAM>(to.add(8).cast(), _mm256_castps_si256(b));
    }
}

/// 4 adjacent pairs stay where they are: even places get x cos - y sin, odd ones x sin + y cos.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn rotate_adjacent(pairs: __m256, [cos_sin, sin_cos]: [__m256; 2]) -> __m256 {
    let (x, y) = (_mm256_moveldup_ps(pairs), _mm256_movehdup_ps(pairs));
    _mm256_fmaddsub_ps(x, cos_sin, _mm256_mul_ps(y, sin_cos))
}

impl Straight<f32> for Adjacent<Avx2> {
    // Of 4 pairs each.
    type Factors = [[__m256; 2]; 2];
    const LANES: usize = 8;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn factors(cos: *const f32, sin: *const f32) -> Self::Factors {
        // SAFETY: the caller's.
        let (cos, sin) = unsafe { (__m256::load(cos), __m256::load(sin)) };
        let (cos_sin, sin_cos) = (adjacent(cos, sin), adjacent(sin, cos));
        [[cos_sin.0, sin_cos.0], [cos_sin.1, sin_cos.1]]
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn turn<const STREAM: usize>(
        [from, _]: [*const f32; 2],
        [to, _]: [*mut f32; 2],
        factors: Self::Factors,
    ) {
        // SAFETY: the caller's.
        unsafe {
            let (a, b) = (__m256::load(from), __m256::load(from.add(8)));
            let rotated = (
                rotate_adjacent(a, factors[0]),
                rotate_adjacent(b, factors[1]),
            );
            store_two_half_lines::<STREAM>(to, without_nan(rotated));
        }
    }
}

/// 8 halves, rounded to nearest even. NaN has been seen to.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn to_f16(x: __m256) -> __m128i {
    _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x)
}

impl PairVectors<f16> for Avx2 {
    type Vector = __m256;
    const LANES: usize = 8;
    type Rest = Avx2;
    type Halves = Halves<Self>;
    type Adjacent = Adjacent<Self>;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load_halves(a: *const f16, b: *const f16) -> (__m256, __m256) {
        // SAFETY: the caller's.
        unsafe {
            (
                _mm256_cvtph_ps(_mm_loadu_si128(a.cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(b.cast())),
            )
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load_adjacent(from: *const f16) -> (__m256, __m256) {
        // Even elements to the lower half of each 128-bit lane, odd ones to the upper, then lanes
        // to halves.
        #[rustfmt::skip]
        let split = _mm256_broadcastsi128_si256(_mm_setr_epi8(
            0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15,
        ));
        // SAFETY: the caller's.
        let x = unsafe { _mm256_loadu_si256(from.cast()) };
        let x = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_shuffle_epi8(x, split));
        (
            _mm256_cvtph_ps(_mm256_castsi256_si128(x)),
            _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(x)),
        )
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn store_halves<const STREAM: usize>(
        a: *mut f16,
        b: *mut f16,
        members: (__m256, __m256),
    ) {
        let (x, y) = without_nan(members);
        // SAFETY: the caller's.
        unsafe {
            store_quarter_line::<STREAM>(a.cast(), to_f16(x));
            store_quarter_line::<STREAM>(b.cast(), to_f16(y));
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn store_adjacent<const STREAM: usize>(to: *mut f16, members: (__m256, __m256)) {
        let (x, y) = without_nan(members);
        let (x, y) = (to_f16(x), to_f16(y));
        // SAFETY: the caller's.
        unsafe {
            store_quarter_line::<STREAM>(to.cast(), _mm_unpacklo_epi16(x, y));
            store_quarter_line::<STREAM>(to.add(8).cast(), _mm_unpackhi_epi16(x, y));
        }
    }

    // Whether all are finite.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn are_ordinary<const COUNT: usize>(a: *const f16, b: *const f16) -> bool {
        let exponent = _mm256_set1_epi16(0x7c00);
        let mut largest = _mm256_setzero_si256();
        let mut i = 0;
        while i < COUNT.div_ceil(16) {
            let at = vector_at(i, 16, COUNT);
            // SAFETY: the caller's.
            let (x, y) = unsafe {
                (
                    _mm256_loadu_si256(a.add(at).cast()),
                    _mm256_loadu_si256(b.add(at).cast()),
                )
            };
            largest = _mm256_max_epu16(largest, _mm256_and_si256(x, exponent));
            largest = _mm256_max_epu16(largest, _mm256_and_si256(y, exponent));
            i += 1;
        }
        _mm256_movemask_epi8(_mm256_cmpeq_epi16(largest, exponent)) == 0
    }
}

/// To nearest even in the upper half of each 32-bit lane; the lower half is anything. Not for NaN.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn rounded(x: __m256) -> __m256i {
    let bits = _mm256_castps_si256(x);
    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd)
}

/// [`rounded`], of any values.
#[cold]
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c")]
fn any_rounded(x: __m256) -> __m256i {
    let is_nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
    _mm256_blendv_epi8(rounded(x), _mm256_set1_epi32(0x7fff_0000), is_nan)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn both_rounded((a, b): (__m256, __m256)) -> (__m256i, __m256i) {
    if has_nan((a, b)) {
        (any_rounded(a), any_rounded(b))
    } else {
        (rounded(a), rounded(b))
    }
}

/// The upper halves of 8 lanes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn upper_halves(x: __m256i) -> __m128i {
    let x = _mm256_srli_epi32::<16>(x);
    _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x))
}

/// First and second members of 8 adjacent pairs.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn parted(x: __m256i) -> (__m256, __m256) {
    let upper = _mm256_set1_epi32(0xffff_0000_u32 as i32);
    (
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(x)),
        _mm256_castsi256_ps(_mm256_and_si256(x, upper)),
    )
}

/// The reverse of [`parted`], of rounded lanes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn merged((x, y): (__m256i, __m256i)) -> __m256i {
    _mm256_blend_epi16::<0b1010_1010>(_mm256_srli_epi32::<16>(x), y)
}

impl PairVectors<bf16> for Avx2 {
    type Vector = __m256;
    const LANES: usize = 8;
    type Rest = Avx2;
    type Halves = Halves<Self>;
    type Adjacent = Adjacent<Self>;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load_halves(a: *const bf16, b: *const bf16) -> (__m256, __m256) {
        // SAFETY: the caller's.
        let (a, b) = unsafe { (_mm_loadu_si128(a.cast()), _mm_loadu_si128(b.cast())) };
        let (a, b) = (_mm256_cvtepu16_epi32(a), _mm256_cvtepu16_epi32(b));
        (
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(a)),
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(b)),
        )
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load_adjacent(from: *const bf16) -> (__m256, __m256) {
        // SAFETY: the caller's.
        parted(unsafe { _mm256_loadu_si256(from.cast()) })
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn store_halves<const STREAM: usize>(
        a: *mut bf16,
        b: *mut bf16,
        members: (__m256, __m256),
    ) {
        let (x, y) = both_rounded(members);
        // SAFETY: the caller's.
        unsafe {
            store_quarter_line::<STREAM>(a.cast(), upper_halves(x));
            store_quarter_line::<STREAM>(b.cast(), upper_halves(y));
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn store_adjacent<const STREAM: usize>(to: *mut bf16, members: (__m256, __m256)) {
        // SAFETY: the caller's.
        unsafe { store_half_line::<STREAM>(to.cast(), merged(both_rounded(members))) }
    }

    // Whether the upper two bits of every exponent differ.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn are_ordinary<const COUNT: usize>(a: *const bf16, b: *const bf16) -> bool {
        // Where they do, this addition leaves the upper one set.
        let (lower, upper) = (_mm256_set1_epi16(0x2000), _mm256_set1_epi16(0x4000));
        let mut all = upper;
        let mut i = 0;
        while i < COUNT.div_ceil(16) {
            let at = vector_at(i, 16, COUNT);
            // SAFETY: the caller's.
            let (x, y) = unsafe {
                (
                    _mm256_loadu_si256(a.add(at).cast()),
                    _mm256_loadu_si256(b.add(at).cast()),
                )
            };
            all = _mm256_and_si256(all, _mm256_add_epi16(x, lower));
            all = _mm256_and_si256(all, _mm256_add_epi16(y, lower));
            i += 1;
        }
        _mm256_testc_si256(all, upper) != 0
    }
}

/// The reverse of [`parted`], of ordinary results.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn merged_ordinary(even: __m256, odd: __m256) -> __m256i {
    let even = _mm256_srli_epi32::<16>(_mm256_castps_si256(rounded_ordinary(even)));
    _mm256_or_si256(even, _mm256_castps_si256(rounded_ordinary(odd)))
}

/// To the nearest bf16, ties to even, of ordinary results. Let m, of 24 bits, be x in units of its last
/// place. Then `less` is 65536 times the integer (or, just above a power of two, the half) nearest to
/// m - m / 65536, and what is left of 65536 x is exact: 65536 times the integer nearest to m / 65536. In
/// a tie m is even, so the even one of both is chosen together.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn rounded_ordinary(x: __m256) -> __m256 {
    let less = _mm256_mul_ps(x, _mm256_set1_ps(65535.0));
    _mm256_fmsub_ps(x, _mm256_set1_ps(65536.0), less)
}

impl Straight<bf16> for Halves<Avx2> {
    type Factors = ([__m256; 2], [__m256; 2]);
    const LANES: usize = 16;
    const ORDINARY: bool = true;

    // Pairs of even indices, then those of odd ones.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn factors(cos: *const f32, sin: *const f32) -> Self::Factors {
        // SAFETY: the caller's.
        unsafe {
            (
                Avx2::load_adjacent(cos).into(),
                Avx2::load_adjacent(sin).into(),
            )
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn turn<const STREAM: usize>(
        [a, b]: [*const bf16; 2],
        [to_a, to_b]: [*mut bf16; 2],
        (cos, sin): Self::Factors,
    ) {
        // SAFETY: the caller's.
        unsafe {
            let (a, b) = (_mm256_loadu_si256(a.cast()), _mm256_loadu_si256(b.cast()));
            let ((a0, a1), (b0, b1)) = (parted(a), parted(b));
            let (x, y) = vector::rotate(([a0, a1], [b0, b1]), cos, sin);
            store_half_line::<STREAM>(to_a.cast(), merged_ordinary(x[0], x[1]));
            store_half_line::<STREAM>(to_b.cast(), merged_ordinary(y[0], y[1]));
        }
    }
}

impl Straight<bf16> for Adjacent<Avx2> {
    type Factors = (__m256, __m256);
    const LANES: usize = 8;
    const ORDINARY: bool = true;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn factors(cos: *const f32, sin: *const f32) -> Self::Factors {
        // SAFETY: the caller's.
        unsafe { (__m256::load(cos), __m256::load(sin)) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn turn<const STREAM: usize>(
        [from, _]: [*const bf16; 2],
        [to, _]: [*mut bf16; 2],
        (cos, sin): Self::Factors,
    ) {
        // SAFETY: the caller's.
        unsafe {
            let members = parted(_mm256_loadu_si256(from.cast()));
            let (x, y) = vector::rotate(members, cos, sin);
            store_half_line::<STREAM>(to.cast(), merged_ordinary(x, y));
        }
    }
}

impl Straight<f16> for Halves<Avx2> {
    type Factors = (__m256, __m256);
    const LANES: usize = 8;
    const ORDINARY: bool = true;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn factors(cos: *const f32, sin: *const f32) -> Self::Factors {
        // SAFETY: the caller's.
        unsafe { (__m256::load(cos), __m256::load(sin)) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn turn<const STREAM: usize>(
        [a, b]: [*const f16; 2],
        [to_a, to_b]: [*mut f16; 2],
        (cos, sin): Self::Factors,
    ) {
        // SAFETY: the caller's.
        unsafe {
            let (x, y) = vector::rotate(Avx2::load_halves(a, b), cos, sin);
            store_quarter_line::<STREAM>(to_a.cast(), to_f16(x));
            store_quarter_line::<STREAM>(to_b.cast(), to_f16(y));
        }
    }
}

/// The upper half of each lane, over [`F16_SCALE`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn widened_f16(x: __m256i) -> __m256 {
    let kept = _mm256_set1_epi32(F16_KEPT);
    _mm256_castsi256_ps(_mm256_and_si256(_mm256_srai_epi32::<3>(x), kept))
}

impl Straight<f16> for Adjacent<Avx2> {
    type Factors = (__m256, __m256);
    const LANES: usize = 8;
    const ORDINARY: bool = true;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn factors(cos: *const f32, sin: *const f32) -> Self::Factors {
        // SAFETY: the caller's.
        unsafe {
            let scale = __m256::splat(F16_SCALE);
            (__m256::load(cos).mul(scale), __m256::load(sin).mul(scale))
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn turn<const STREAM: usize>(
        [from, _]: [*const f16; 2],
        [to, _]: [*mut f16; 2],
        (cos, sin): Self::Factors,
    ) {
        // SAFETY: the caller's.
        unsafe {
            let odd = _mm256_loadu_si256(from.cast());
            let even = _mm256_slli_epi32::<16>(odd);
            let (x, y) = vector::rotate((widened_f16(even), widened_f16(odd)), cos, sin);
            let (x, y) = (to_f16(x), to_f16(y));
            store_quarter_line::<STREAM>(to.cast(), _mm_unpacklo_epi16(x, y));
            store_quarter_line::<STREAM>(to.add(8).cast(), _mm_unpackhi_epi16(x, y));
        }
    }
}
