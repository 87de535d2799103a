//! AVX-512 (F, BW, DQ, VL): sixteen pairs at a time (bf16: 32), in the scalar definition's order of
//! operations. What is left of a head goes to AVX2's vectors.
//!
//! Every function needs `avx512f`, `avx512bw`, `avx512dq` and `avx512vl` beside what AVX2's
//! variant needs; [`super::Isa`] checks for them.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::avx2::{self, Adjacent, Avx2, F16_KEPT, F16_SCALE, Halves, vector_at};
use super::run::{AngleBlock, Phases};
use super::vector::{self, Careful, Float, PairVectors, PhaseVectors, Straight, loops};
use crate::angle::phase::Scale;

/// The variant for elements of every type.
pub struct Avx512;

loops!(Avx512, "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c");

/// cos and sin of as many phases as there are steps, scaled.
///
/// # Safety
/// There are at most [`super::run::BLOCK`] steps; the processor has what this variant needs.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) unsafe fn form(steps: &[u64], phases: Phases, scale: Scale, angles: &mut AngleBlock) {
    // SAFETY: the caller's.
    unsafe { vector::form::<Avx512>(steps, phases, scale, angles) }
}

impl Float for __m512 {
    const LANES: usize = 16;

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's.
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's.
        unsafe { _mm512_storeu_ps(to, self) }
    }
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn splat(x: f32) -> Self {
        _mm512_set1_ps(x)
    }
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn mul(self, by: Self) -> Self {
        _mm512_mul_ps(self, by)
    }
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn add(self, plus: Self) -> Self {
        _mm512_add_ps(self, plus)
    }
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn sub(self, minus: Self) -> Self {
        _mm512_sub_ps(self, minus)
    }
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn mul_add(self, by: Self, plus: Self) -> Self {
        _mm512_fmadd_ps(self, by, plus)
    }
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn mul_sub(self, by: Self, minus: Self) -> Self {
        _mm512_fmsub_ps(self, by, minus)
    }
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn interleave(self, second: Self) -> [Self; 2] {
        adjacent(self, second).into()
    }
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn deinterleave(x: [Self; 2]) -> (Self, Self) {
        let x = [_mm512_castps_si512(x[0]), _mm512_castps_si512(x[1])];
        (
            _mm512_castsi512_ps(lower_words(x)),
            _mm512_castsi512_ps(upper_words(x)),
        )
    }
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn add_neighbours(self, second: Self) -> Self {
        let even = _mm512_shuffle_ps::<0b10_00_10_00>(self, second);
        _mm512_add_ps(even, _mm512_shuffle_ps::<0b11_01_11_01>(self, second))
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq,avx2,fma")]
    unsafe fn fold_both(self, to: *mut [f32; 2]) {
        let upper = _mm512_extractf32x8_ps::<1>(self);
        // SAFETY: the caller's.
        unsafe { _mm256_add_ps(_mm512_castps512_ps256(self), upper).fold_both(to) }
    }
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn reciprocal_root(self, by: Self, plus: Self) -> Self {
        let root = _mm512_sqrt_ps(_mm512_add_ps(_mm512_mul_ps(self, by), plus));
        _mm512_div_ps(_mm512_set1_ps(1.0), root)
    }
}

const SIGN: i32 = i32::MIN;

/// The upper words of 16 values.
#[inline]
#[target_feature(enable = "avx512f")]
fn upper_words(x: [__m512i; 2]) -> __m512i {
    let odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    _mm512_permutex2var_epi32(x[0], odd, x[1])
}

/// The lower words of 16 values.
#[inline]
#[target_feature(enable = "avx512f")]
fn lower_words(x: [__m512i; 2]) -> __m512i {
    let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    _mm512_permutex2var_epi32(x[0], even, x[1])
}

/// Flips the sign of `x` where that of `by` is set.
#[inline]
#[target_feature(enable = "avx512f")]
fn flip(x: __m512, by: __m512i) -> __m512 {
    /// `a ^ (b & c)`.
    const XOR_AND: i32 = 0b0111_1000;
    let x = _mm512_castps_si512(x);
    let x = _mm512_ternarylogic_epi32::<XOR_AND>(x, by, _mm512_set1_epi32(SIGN));
    _mm512_castsi512_ps(x)
}

impl PhaseVectors for Avx512 {
    type Phases = [__m512i; 2];
    type Vector = __m512;
    const LANES: usize = 16;

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load(from: *const u64) -> Self::Phases {
        // SAFETY: the caller's.
        unsafe {
            [
                _mm512_loadu_si512(from.cast()),
                _mm512_loadu_si512(from.add(8).cast()),
            ]
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn store(to: *mut u64, phases: Self::Phases) {
        // SAFETY: the caller's.
        unsafe {
            _mm512_storeu_si512(to.cast(), phases[0]);
            _mm512_storeu_si512(to.add(8).cast(), phases[1]);
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn add(a: Self::Phases, b: Self::Phases) -> Self::Phases {
        [_mm512_add_epi64(a[0], b[0]), _mm512_add_epi64(a[1], b[1])]
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    unsafe fn mul(steps: Self::Phases, position: u64) -> Self::Phases {
        let position = _mm512_set1_epi64(position as i64);
        [
            _mm512_mullo_epi64(steps[0], position),
            _mm512_mullo_epi64(steps[1], position),
        ]
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn distance([a, b]: Self::Phases) -> (__m512, __m512) {
        let a = _mm512_abs_epi64(_mm512_slli_epi64::<2>(a));
        let b = _mm512_abs_epi64(_mm512_slli_epi64::<2>(b));
        let high = _mm512_srli_epi32::<8>(upper_words([a, b]));
        let low = lower_words([_mm512_srli_epi64::<9>(a), _mm512_srli_epi64::<9>(b)]);
        let low = _mm512_and_si512(low, _mm512_set1_epi32(0x7fff_ffff));
        (_mm512_cvtepi32_ps(high), _mm512_cvtepi32_ps(low))
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn place(
        phases: Self::Phases,
        cosine: __m512,
        sine: __m512,
        sin_flip: u32,
    ) -> (__m512, __m512) {
        let top = upper_words(phases);
        let sine = flip(sine, _mm512_slli_epi32::<2>(top));
        // The nearest quarter turn is in the upper two bits.
        let quarter = _mm512_add_epi32(top, _mm512_set1_epi32(0x2000_0000));
        let one = _mm512_set1_epi32(0x4000_0000);
        let odd = _mm512_test_epi32_mask(quarter, one);
        let sin_sign = _mm512_xor_si512(quarter, _mm512_set1_epi32(sin_flip as i32));
        (
            flip(
                _mm512_mask_blend_ps(odd, cosine, sine),
                _mm512_add_epi32(quarter, one),
            ),
            flip(_mm512_mask_blend_ps(odd, sine, cosine), sin_sign),
        )
    }
}

/// Every NaN becomes 0x7fffffff. NaNs are rare: kept out of the way of all else.
#[cold]
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn canonical(x: __m512) -> __m512 {
    let nan = _mm512_castsi512_ps(_mm512_set1_epi32(0x7fff_ffff));
    _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x), x, nan)
}

/// [`canonical`] where there is any NaN.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn without_nan((a, b): (__m512, __m512)) -> (__m512, __m512) {
    match _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(a, b) {
        0 => (a, b),
        _ => (canonical(a), canonical(b)),
    }
}

/// 64 bytes, past the caches if `STREAM` is 64 or 16: the alignment.
///
/// # Safety
/// Writable for 64 bytes, and aligned; the processor has AVX-512.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store_line<const STREAM: usize>(to: *mut __m512i, x: __m512i) {
    // SAFETY: the caller's.
    unsafe {
        match STREAM {
            64 => _mm512_stream_si512(to, x),
            16 => {
                let to = to.cast::<__m128i>();
                _mm_stream_si128(to, _mm512_extracti32x4_epi32::<0>(x));
                _mm_stream_si128(to.add(1), _mm512_extracti32x4_epi32::<1>(x));
                _mm_stream_si128(to.add(2), _mm512_extracti32x4_epi32::<2>(x));
                _mm_stream_si128(to.add(3), _mm512_extracti32x4_epi32::<3>(x));
            }
            _ => _mm512_storeu_si512(to, x),
        }
    }
}

impl PairVectors<f32> for Avx512 {
    type Vector = __m512;
    const LANES: usize = 16;
    type Rest = Avx2;
    // 64 bytes.
    const HALVES: usize = 16;
    type Halves = Careful<Self, true, true>;
    type Adjacent = Adjacent<Self>;

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load_halves(a: *const f32, b: *const f32) -> (__m512, __m512) {
        // SAFETY: the caller's.
        unsafe { (_mm512_loadu_ps(a), _mm512_loadu_ps(b)) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load_adjacent(from: *const f32) -> (__m512, __m512) {
        // SAFETY: the caller's.
        unsafe { Float::deinterleave([Float::load(from), Float::load(from.add(16))]) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn store_halves<const STREAM: usize>(
        a: *mut f32,
        b: *mut f32,
        members: (__m512, __m512),
    ) {
        let (x, y) = without_nan(members);
        // SAFETY: the caller's.
        unsafe {
            store_line::<STREAM>(a.cast(), _mm512_castps_si512(x));
            store_line::<STREAM>(b.cast(), _mm512_castps_si512(y));
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn store_adjacent<const STREAM: usize>(to: *mut f32, members: (__m512, __m512)) {
        let (x, y) = without_nan(members);
        // SAFETY: the caller's.
        unsafe { store_two_lines::<STREAM>(to, adjacent(x, y)) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn store_head<const COUNT: usize, const HALVES: bool>(
        to: *mut f32,
        members: [(__m512, __m512); COUNT],
    ) -> bool {
        let mut nans = 0;
        let mut i = 0;
        while i < COUNT {
            nans |= _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(members[i].0, members[i].1);
            i += 1;
        }
        if nans != 0 {
            return false;
        }
        let mut i = 0;
        while i < COUNT {
            let (a, b) = vector::members::<HALVES>(16 * i, 16 * COUNT);
            let (x, y) = members[i];
            let ((x, y), b) = match HALVES {
                true => ((x, y), b),
                false => (adjacent(x, y), a + 16),
            };
            // SAFETY: the caller's.
            unsafe {
                _mm512_storeu_ps(to.add(a), x);
                _mm512_storeu_ps(to.add(b), y);
            }
            i += 1;
        }
        true
    }
}

/// The members of 16 pairs, side by side.
#[inline]
#[target_feature(enable = "avx512f")]
fn adjacent(x: __m512, y: __m512) -> (__m512, __m512) {
    let first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    let second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    (
        _mm512_permutex2var_ps(x, first, y),
        _mm512_permutex2var_ps(x, second, y),
    )
}

/// # Safety
/// That of [`store_line`], for the next line as well.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store_two_lines<const STREAM: usize>(to: *mut f32, (a, b): (__m512, __m512)) {
    // SAFETY: the caller's.
    unsafe {
        store_line::<STREAM>(to.cast(), _mm512_castps_si512(a));
        store_line::<STREAM>(to.add(16).cast(), _mm512_castps_si512(b));
    }
}

/// 8 adjacent pairs stay where they are: even places get x cos - y sin, odd ones x sin + y cos.
#[inline]
#[target_feature(enable = "avx512f")]
fn rotate_adjacent(pairs: __m512, [cos_sin, sin_cos]: [__m512; 2]) -> __m512 {
    let (x, y) = (_mm512_moveldup_ps(pairs), _mm512_movehdup_ps(pairs));
    _mm512_fmaddsub_ps(x, cos_sin, _mm512_mul_ps(y, sin_cos))
}

impl Straight<f32> for Adjacent<Avx512> {
    // Of 8 pairs each.
    type Factors = [[__m512; 2]; 2];
    const LANES: usize = 16;

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn factors(cos: *const f32, sin: *const f32) -> Self::Factors {
        // SAFETY: the caller's.
        let (cos, sin) = unsafe { (__m512::load(cos), __m512::load(sin)) };
        let (cos_sin, sin_cos) = (adjacent(cos, sin), adjacent(sin, cos));
        [[cos_sin.0, sin_cos.0], [cos_sin.1, sin_cos.1]]
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn turn<const STREAM: usize>(
        [from, _]: [*const f32; 2],
        [to, _]: [*mut f32; 2],
        factors: Self::Factors,
    ) {
        // SAFETY: the caller's.
        unsafe {
            let (a, b) = (__m512::load(from), __m512::load(from.add(16)));
            let rotated = (
                rotate_adjacent(a, factors[0]),
                rotate_adjacent(b, factors[1]),
            );
            store_two_lines::<STREAM>(to, without_nan(rotated));
        }
    }
}

/// `x` with its elements in the order of `from`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn permuted(x: __m512i, from: &[u16; 32]) -> __m512i {
    // SAFETY: an array of 32 u16 is as large as a vector, and the load needs no alignment.
    let from = unsafe { _mm512_loadu_si512(from.as_ptr().cast()) };
    _mm512_permutexvar_epi16(from, x)
}

/// 0, 16, 1, 17, ...
pub(super) const MERGED: [u16; 32] = {
    let mut order = [0; 32];
    let mut i = 0;
    while i < 32 {
        order[i] = (i / 2 + 16 * (i % 2)) as u16;
        i += 1;
    }
    order
};

/// 0, 2, 4, ... 1, 3, 5, ...
const PARTED: [u16; 32] = {
    let mut order = [0; 32];
    let mut i = 0;
    while i < 32 {
        order[MERGED[i] as usize] = i as u16;
        i += 1;
    }
    order
};

/// 16 halves, rounded to nearest even. NaN has been seen to.
#[inline]
#[target_feature(enable = "avx512f")]
fn to_f16(x: __m512) -> __m256i {
    _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x)
}

impl PairVectors<f16> for Avx512 {
    type Vector = __m512;
    const LANES: usize = 16;
    type Rest = Avx2;
    type Halves = Halves<Self>;
    type Adjacent = Adjacent<Self>;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn load_halves(a: *const f16, b: *const f16) -> (__m512, __m512) {
        // SAFETY: the caller's.
        let (x, y) = unsafe { (_mm256_loadu_si256(a.cast()), _mm256_loadu_si256(b.cast())) };
        (_mm512_cvtph_ps(x), _mm512_cvtph_ps(y))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn load_adjacent(from: *const f16) -> (__m512, __m512) {
        // SAFETY: the caller's.
        let x = permuted(unsafe { _mm512_loadu_si512(from.cast()) }, &PARTED);
        (
            _mm512_cvtph_ps(_mm512_castsi512_si256(x)),
            _mm512_cvtph_ps(_mm512_extracti64x4_epi64::<1>(x)),
        )
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn store_halves<const STREAM: usize>(
        a: *mut f16,
        b: *mut f16,
        members: (__m512, __m512),
    ) {
        let (x, y) = without_nan(members);
        let (x, y) = (to_f16(x), to_f16(y));
        // SAFETY: the caller's.
        unsafe {
            avx2::store_half_line::<STREAM>(a.cast(), x);
            avx2::store_half_line::<STREAM>(b.cast(), y);
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn store_adjacent<const STREAM: usize>(to: *mut f16, members: (__m512, __m512)) {
        let (x, y) = without_nan(members);
        let x = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(to_f16(x)), to_f16(y));
        // SAFETY: the caller's.
        unsafe { store_line::<STREAM>(to.cast(), permuted(x, &MERGED)) }
    }

    // Whether all are finite.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn are_ordinary<const COUNT: usize>(a: *const f16, b: *const f16) -> bool {
        let exponent = _mm512_set1_epi16(0x7c00);
        let mut largest = _mm512_setzero_si512();
        let mut i = 0;
        while i < COUNT.div_ceil(32) {
            let at = vector_at(i, 32, COUNT);
            // SAFETY: the caller's.
            let (x, y) = unsafe {
                (
                    _mm512_loadu_si512(a.add(at).cast()),
                    _mm512_loadu_si512(b.add(at).cast()),
                )
            };
            largest = _mm512_max_epu16(largest, _mm512_and_si512(x, exponent));
            largest = _mm512_max_epu16(largest, _mm512_and_si512(y, exponent));
            i += 1;
        }
        _mm512_cmpeq_epi16_mask(largest, exponent) == 0
    }
}

/// How 32 values become bf16.
pub(super) trait NarrowBf16 {
    /// Whether [`joined`](Self::joined) and [`merged`](Self::merged) convert, and what is not ordinary
    /// stays so by that.
    const CONVERTS: bool = false;

    /// # Safety
    /// The processor has what the variant needs.
    unsafe fn narrow(low: __m512, high: __m512) -> __m512i;

    /// Of ordinary results: elements of even index, and those of odd.
    ///
    /// # Safety
    /// The processor has what the variant needs.
    unsafe fn merged(even: __m512, odd: __m512) -> __m512i;

    /// 32 elements, in an order of the variant's own.
    ///
    /// # Safety
    /// The processor has what the variant needs.
    #[inline(always)]
    unsafe fn split(x: __m512i) -> [__m512; 2] {
        // SAFETY: the caller's.
        unsafe { widened(x) }
    }

    /// [`PairVectors::squares`].
    ///
    /// # Safety
    /// Readable for 64 elements; the processor has what the variant needs.
    #[inline(always)]
    unsafe fn squares(from: *const bf16) -> [__m512; 2] {
        // SAFETY: the caller's.
        unsafe { vector::squares::<Avx512, bf16>(from) }
    }

    /// [`PairVectors::may_lack`].
    ///
    /// # Safety
    /// The processor has what the variant needs.
    #[inline(always)]
    unsafe fn may_lack(_sums: &[[__m512; 2]]) -> bool {
        false
    }

    /// The reverse of [`split`](Self::split), of ordinary results.
    ///
    /// # Safety
    /// The processor has what the variant needs.
    #[inline(always)]
    unsafe fn joined([even, odd]: [__m512; 2]) -> __m512i {
        // SAFETY: the caller's.
        unsafe { Self::merged(even, odd) }
    }

    /// 32 factors, in the order of [`split`](Self::split).
    ///
    /// # Safety
    /// Readable for 32 elements; the processor has what the variant needs.
    #[inline(always)]
    unsafe fn split_factors(from: *const f32) -> [__m512; 2] {
        // SAFETY: the caller's.
        unsafe { Avx512::load_adjacent(from).into() }
    }
}

/// Rounds on integers, as the scalar definition does.
impl NarrowBf16 for Avx512 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn narrow(low: __m512, high: __m512) -> __m512i {
        match _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(low, high) {
            0 => upper_halves(rounded(low), rounded(high)),
            _ => narrow_any(low, high),
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn merged(even: __m512, odd: __m512) -> __m512i {
        let even = _mm512_srli_epi32::<16>(_mm512_castps_si512(rounded_ordinary(even)));
        _mm512_or_si512(even, _mm512_castps_si512(rounded_ordinary(odd)))
    }
}

/// As in AVX2's variant.
#[inline]
#[target_feature(enable = "avx512f")]
fn rounded_ordinary(x: __m512) -> __m512 {
    let less = _mm512_mul_ps(x, _mm512_set1_ps(65535.0));
    _mm512_fmsub_ps(x, _mm512_set1_ps(65536.0), less)
}

/// The upper halves of the lanes of `low`, then those of `high`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn upper_halves(low: __m512i, high: __m512i) -> __m512i {
    let low = _mm512_srli_epi32::<16>(low);
    permuted(_mm512_mask_blend_epi16(0xaaaa_aaaa, low, high), &PARTED)
}

/// To nearest even in the upper half of each lane; the lower half is anything. Not for NaN.
#[inline]
#[target_feature(enable = "avx512f")]
fn rounded(x: __m512) -> __m512i {
    let bits = _mm512_castps_si512(x);
    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd)
}

/// Of any values. NaNs are rare: kept out of the way of all else.
#[cold]
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) fn narrow_any(low: __m512, high: __m512) -> __m512i {
    let nan = _mm512_set1_epi32(0x7fff_0000);
    let low_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(low, low);
    let high_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(high, high);
    upper_halves(
        _mm512_mask_mov_epi32(rounded(low), low_nan, nan),
        _mm512_mask_mov_epi32(rounded(high), high_nan, nan),
    )
}

/// The elements of even index, and those of odd.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn widened(x: __m512i) -> [__m512; 2] {
    let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
    [
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(x)),
        _mm512_castsi512_ps(_mm512_and_si512(x, upper)),
    ]
}

impl<N: NarrowBf16> PairVectors<bf16> for N {
    type Vector = [__m512; 2];
    const LANES: usize = 32;
    type Rest = Avx2;
    type Halves = Halves<Self>;
    type Adjacent = Adjacent<Self>;

    #[inline(always)]
    unsafe fn squares(from: *const bf16) -> Self::Vector {
        // SAFETY: the caller's.
        unsafe { N::squares(from) }
    }

    #[inline(always)]
    unsafe fn may_lack(sums: &[Self::Vector]) -> bool {
        // SAFETY: the caller's.
        unsafe { N::may_lack(sums) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn load_halves(a: *const bf16, b: *const bf16) -> (Self::Vector, Self::Vector) {
        // SAFETY: the caller's.
        unsafe {
            (
                widened(permuted(_mm512_loadu_si512(a.cast()), &MERGED)),
                widened(permuted(_mm512_loadu_si512(b.cast()), &MERGED)),
            )
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn load_adjacent(from: *const bf16) -> (Self::Vector, Self::Vector) {
        // SAFETY: the caller's.
        let x = unsafe {
            [
                _mm512_loadu_si512(from.cast()),
                _mm512_loadu_si512(from.add(32).cast()),
            ]
        };
        let ([a0, b0], [a1, b1]) = (widened(x[0]), widened(x[1]));
        ([a0, a1], [b0, b1])
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn store_halves<const STREAM: usize>(
        a: *mut bf16,
        b: *mut bf16,
        (x, y): (Self::Vector, Self::Vector),
    ) {
        // SAFETY: the caller's.
        unsafe {
            store_line::<STREAM>(a.cast(), N::narrow(x[0], x[1]));
            store_line::<STREAM>(b.cast(), N::narrow(y[0], y[1]));
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn store_adjacent<const STREAM: usize>(
        to: *mut bf16,
        (x, y): (Self::Vector, Self::Vector),
    ) {
        // SAFETY: the caller's.
        unsafe {
            let first = permuted(N::narrow(x[0], y[0]), &MERGED);
            store_line::<STREAM>(to.cast(), first);
            let second = permuted(N::narrow(x[1], y[1]), &MERGED);
            store_line::<STREAM>(to.add(32).cast(), second);
        }
    }

    // Converts would take subnormals for zeros, and keep NaNs as they are: both show in what is converted,
    // of which there are half as many vectors, and integers leave the units free that multiply.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn store_head<const COUNT: usize, const HALVES: bool>(
        to: *mut bf16,
        members: [(Self::Vector, Self::Vector); COUNT],
    ) -> bool {
        let mut converted = [[_mm512_setzero_si512(); 2]; COUNT];
        let mut all = _mm512_set1_epi16(UPPER);
        let mut i = 0;
        // SAFETY: the caller's, for all below.
        unsafe {
            if !N::CONVERTS {
                vector::store_all::<Self, bf16, COUNT, HALVES>(to, members);
                return true;
            }
            while i < COUNT {
                let (x, y) = members[i];
                converted[i] = match HALVES {
                    true => [N::joined(x), N::joined(y)],
                    false => [N::merged(x[0], y[0]), N::merged(x[1], y[1])],
                };
                all = marked(all, converted[i]);
                i += 1;
            }
            if !are_marked(all) {
                return false;
            }
            let mut i = 0;
            while i < COUNT {
                let (a, b) = vector::members::<HALVES>(i * Self::LANES, COUNT * Self::LANES);
                let b = if HALVES { b } else { a + Self::LANES };
                _mm512_storeu_si512(to.add(a).cast(), converted[i][0]);
                _mm512_storeu_si512(to.add(b).cast(), converted[i][1]);
                i += 1;
            }
        }
        true
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn are_ordinary<const COUNT: usize>(a: *const bf16, b: *const bf16) -> bool {
        let mut all = _mm512_set1_epi16(UPPER);
        let mut i = 0;
        while i < COUNT.div_ceil(32) {
            let at = vector_at(i, 32, COUNT);
            // SAFETY: the caller's.
            let (x, y) = unsafe {
                (
                    _mm512_loadu_si512(a.add(at).cast()),
                    _mm512_loadu_si512(b.add(at).cast()),
                )
            };
            all = marked(all, [x, y]);
            i += 1;
        }
        are_marked(all)
    }
}

/// The uppermost bit of a bf16's exponent.
const UPPER: i16 = 0x4000;

/// Keeps [`UPPER`] in `all` where the upper two bits of both exponents differ, as those of ordinary
/// elements do: then adding the lower one leaves the upper one set.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn marked(all: __m512i, [x, y]: [__m512i; 2]) -> __m512i {
    let lower = _mm512_set1_epi16(UPPER / 2);
    let (x, y) = (_mm512_add_epi16(x, lower), _mm512_add_epi16(y, lower));
    _mm512_and_si512(all, _mm512_and_si512(x, y))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn are_marked(all: __m512i) -> bool {
    _mm512_testn_epi16_mask(all, _mm512_set1_epi16(UPPER)) == 0
}

impl<N: NarrowBf16> Straight<bf16> for Halves<N> {
    type Factors = ([__m512; 2], [__m512; 2]);
    const LANES: usize = 32;
    const ORDINARY: bool = true;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn factors(cos: *const f32, sin: *const f32) -> Self::Factors {
        // SAFETY: the caller's.
        unsafe { (N::split_factors(cos), N::split_factors(sin)) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn turn<const STREAM: usize>(
        [a, b]: [*const bf16; 2],
        [to_a, to_b]: [*mut bf16; 2],
        (cos, sin): Self::Factors,
    ) {
        // SAFETY: the caller's.
        unsafe {
            let (a, b) = (_mm512_loadu_si512(a.cast()), _mm512_loadu_si512(b.cast()));
            let (x, y) = vector::rotate((N::split(a), N::split(b)), cos, sin);
            store_line::<STREAM>(to_a.cast(), N::joined(x));
            store_line::<STREAM>(to_b.cast(), N::joined(y));
        }
    }
}

impl<N: NarrowBf16> Straight<bf16> for Adjacent<N> {
    type Factors = (__m512, __m512);
    const LANES: usize = 16;
    const ORDINARY: bool = true;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn factors(cos: *const f32, sin: *const f32) -> Self::Factors {
        // SAFETY: the caller's.
        unsafe { (__m512::load(cos), __m512::load(sin)) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn turn<const STREAM: usize>(
        [from, _]: [*const bf16; 2],
        [to, _]: [*mut bf16; 2],
        (cos, sin): Self::Factors,
    ) {
        // SAFETY: the caller's.
        unsafe {
            let [x, y] = widened(_mm512_loadu_si512(from.cast()));
            let (x, y) = vector::rotate((x, y), cos, sin);
            store_line::<STREAM>(to.cast(), N::merged(x, y));
        }
    }
}

impl Straight<f16> for Halves<Avx512> {
    type Factors = (__m512, __m512);
    const LANES: usize = 16;
    const ORDINARY: bool = true;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn factors(cos: *const f32, sin: *const f32) -> Self::Factors {
        // SAFETY: the caller's.
        unsafe { (__m512::load(cos), __m512::load(sin)) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn turn<const STREAM: usize>(
        [a, b]: [*const f16; 2],
        [to_a, to_b]: [*mut f16; 2],
        (cos, sin): Self::Factors,
    ) {
        // SAFETY: the caller's.
        unsafe {
            let (x, y) = vector::rotate(Avx512::load_halves(a, b), cos, sin);
            avx2::store_half_line::<STREAM>(to_a.cast(), to_f16(x));
            avx2::store_half_line::<STREAM>(to_b.cast(), to_f16(y));
        }
    }
}

/// The upper half of each lane, over [`F16_SCALE`].
#[inline]
#[target_feature(enable = "avx512f")]
fn widened_f16(x: __m512i) -> __m512 {
    let kept = _mm512_set1_epi32(F16_KEPT);
    _mm512_castsi512_ps(_mm512_and_si512(_mm512_srai_epi32::<3>(x), kept))
}

impl Straight<f16> for Adjacent<Avx512> {
    type Factors = (__m512, __m512);
    const LANES: usize = 16;
    const ORDINARY: bool = true;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn factors(cos: *const f32, sin: *const f32) -> Self::Factors {
        // SAFETY: the caller's.
        unsafe {
            let scale = __m512::splat(F16_SCALE);
            (__m512::load(cos).mul(scale), __m512::load(sin).mul(scale))
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn turn<const STREAM: usize>(
        [from, _]: [*const f16; 2],
        [to, _]: [*mut f16; 2],
        (cos, sin): Self::Factors,
    ) {
        // SAFETY: the caller's.
        unsafe {
            let odd = _mm512_loadu_si512(from.cast());
            let even = _mm512_slli_epi32::<16>(odd);
            let (x, y) = vector::rotate((widened_f16(even), widened_f16(odd)), cos, sin);
            let x = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(to_f16(x)), to_f16(y));
            store_line::<STREAM>(to.cast(), permuted(x, &MERGED));
        }
    }
}
