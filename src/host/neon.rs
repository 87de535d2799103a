//! AArch64 NEON: eight pairs at a time in two registers, in the scalar definition's order of
//! operations.
//!
//! Every function needs `neon`, which has fused multiply-add; [`super::Isa`] checks for it, and for
//! little endian, on which the reinterpretation of lanes relies.

use std::arch::aarch64::*;
use std::arch::asm;

use half::{bf16, f16};

use super::run::{AngleBlock, Phases};
use super::vector::{self, Careful, Float, PairVectors, PhaseVectors, loops};
use crate::angle::phase::Scale;

/// The variant for elements of every type.
pub struct Neon;

/// 8 lanes.
type Eight = [float32x4_t; 2];

loops!(Neon, "neon");

/// cos and sin of as many phases as there are steps, scaled.
///
/// # Safety
/// There are at most [`super::run::BLOCK`] steps; the processor has NEON.
#[target_feature(enable = "neon")]
pub(super) unsafe fn form(steps: &[u64], phases: Phases, scale: Scale, angles: &mut AngleBlock) {
    // SAFETY: the caller's.
    unsafe { vector::form::<Neon>(steps, phases, scale, angles) }
}

impl Float for float32x4_t {
    const LANES: usize = 4;

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's.
        unsafe { vld1q_f32(from) }
    }
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's.
        unsafe { vst1q_f32(to, self) }
    }
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn splat(x: f32) -> Self {
        vdupq_n_f32(x)
    }
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn mul(self, by: Self) -> Self {
        vmulq_f32(self, by)
    }
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn add(self, plus: Self) -> Self {
        vaddq_f32(self, plus)
    }
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn sub(self, minus: Self) -> Self {
        vsubq_f32(self, minus)
    }
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn mul_add(self, by: Self, plus: Self) -> Self {
        vfmaq_f32(plus, self, by)
    }
    // The negation goes first: after a multiply-subtract it would turn +0 to -0.
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn mul_sub(self, by: Self, minus: Self) -> Self {
        vfmaq_f32(vnegq_f32(minus), self, by)
    }
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn interleave(self, second: Self) -> [Self; 2] {
        [vzip1q_f32(self, second), vzip2q_f32(self, second)]
    }
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn deinterleave([first, second]: [Self; 2]) -> (Self, Self) {
        (vuzp1q_f32(first, second), vuzp2q_f32(first, second))
    }
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn add_neighbours(self, second: Self) -> Self {
        vpaddq_f32(self, second)
    }
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn fold_both(self, to: *mut [f32; 2]) {
        let sums = vpadd_f32(vget_low_f32(self), vget_high_f32(self));
        // SAFETY: the caller's.
        unsafe { vst1_f32(to.cast(), sums) }
    }
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn reciprocal_root(self, by: Self, plus: Self) -> Self {
        let root = vsqrtq_f32(vaddq_f32(vmulq_f32(self, by), plus));
        vdivq_f32(vdupq_n_f32(1.0), root)
    }
}

/// The upper 32 bits of 4 values.
#[inline]
#[target_feature(enable = "neon")]
fn upper_words(a: uint64x2_t, b: uint64x2_t) -> uint32x4_t {
    vuzp2q_u32(vreinterpretq_u32_u64(a), vreinterpretq_u32_u64(b))
}

/// Flips the sign of `x` where that of `by` is set.
#[inline]
#[target_feature(enable = "neon")]
fn flip(x: float32x4_t, by: uint32x4_t) -> float32x4_t {
    let sign = vandq_u32(by, vdupq_n_u32(1 << 31));
    vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(x), sign))
}

/// The absolute value of the lower 62 bits, which carry a sign, times 4.
#[inline]
#[target_feature(enable = "neon")]
fn magnitude(phases: uint64x2_t) -> uint64x2_t {
    let rest = vreinterpretq_s64_u64(vshlq_n_u64::<2>(phases));
    vreinterpretq_u64_s64(vabsq_s64(rest))
}

/// The low 64 bits of each product.
#[inline]
#[target_feature(enable = "neon")]
fn mul_lo(a: uint64x2_t, b: uint64x2_t) -> uint64x2_t {
    // Each lower word times the other's upper one.
    let swapped = vrev64q_u32(vreinterpretq_u32_u64(b));
    let cross = vpaddlq_u32(vmulq_u32(vreinterpretq_u32_u64(a), swapped));
    vmlal_u32(vshlq_n_u64::<32>(cross), vmovn_u64(a), vmovn_u64(b))
}

/// [`PhaseVectors::distance`] of 4 phases.
#[inline]
#[target_feature(enable = "neon")]
fn distance(a: uint64x2_t, b: uint64x2_t) -> (float32x4_t, float32x4_t) {
    let (a, b) = (magnitude(a), magnitude(b));
    let high = vshrq_n_u32::<8>(upper_words(a, b));
    let low = vshrn_high_n_u64::<9>(vshrn_n_u64::<9>(a), b);
    let low = vandq_u32(low, vdupq_n_u32(0x7fff_ffff));
    (vcvtq_f32_u32(high), vcvtq_f32_u32(low))
}

/// [`PhaseVectors::place`] of 4 phases.
#[inline]
#[target_feature(enable = "neon")]
fn place(
    a: uint64x2_t,
    b: uint64x2_t,
    cosine: float32x4_t,
    sine: float32x4_t,
    sin_flip: u32,
) -> (float32x4_t, float32x4_t) {
    let top = upper_words(a, b);
    let sine = flip(sine, vshlq_n_u32::<2>(top));
    // The nearest quarter turn is in the upper two bits.
    let quarter = vaddq_u32(top, vdupq_n_u32(0x2000_0000));
    let odd = vtstq_u32(quarter, vdupq_n_u32(0x4000_0000));
    let next = vaddq_u32(quarter, vdupq_n_u32(0x4000_0000));
    let sin_sign = veorq_u32(quarter, vdupq_n_u32(sin_flip));
    (
        flip(vbslq_f32(odd, sine, cosine), next),
        flip(vbslq_f32(odd, cosine, sine), sin_sign),
    )
}

impl PhaseVectors for Neon {
    type Phases = [uint64x2_t; 4];
    type Vector = Eight;
    const LANES: usize = 8;

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn load(from: *const u64) -> Self::Phases {
        // SAFETY: the caller's.
        unsafe {
            [
                vld1q_u64(from),
                vld1q_u64(from.add(2)),
                vld1q_u64(from.add(4)),
                vld1q_u64(from.add(6)),
            ]
        }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn store(to: *mut u64, [a, b, c, d]: Self::Phases) {
        // SAFETY: the caller's.
        unsafe {
            vst1q_u64(to, a);
            vst1q_u64(to.add(2), b);
            vst1q_u64(to.add(4), c);
            vst1q_u64(to.add(6), d);
        }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn add(a: Self::Phases, b: Self::Phases) -> Self::Phases {
        [
            vaddq_u64(a[0], b[0]),
            vaddq_u64(a[1], b[1]),
            vaddq_u64(a[2], b[2]),
            vaddq_u64(a[3], b[3]),
        ]
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn mul([a, b, c, d]: Self::Phases, position: u64) -> Self::Phases {
        let position = vdupq_n_u64(position);
        [
            mul_lo(a, position),
            mul_lo(b, position),
            mul_lo(c, position),
            mul_lo(d, position),
        ]
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn distance([a, b, c, d]: Self::Phases) -> (Eight, Eight) {
        let ((high0, low0), (high1, low1)) = (distance(a, b), distance(c, d));
        ([high0, high1], [low0, low1])
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn place(
        [a, b, c, d]: Self::Phases,
        cosine: Eight,
        sine: Eight,
        sin_flip: u32,
    ) -> (Eight, Eight) {
        let (cos0, sin0) = place(a, b, cosine[0], sine[0], sin_flip);
        let (cos1, sin1) = place(c, d, cosine[1], sine[1], sin_flip);
        ([cos0, cos1], [sin0, sin1])
    }
}

/// NaNs that narrow to the canonical one of f32, of f16 and of bf16. The last has nothing below what
/// is kept, lest rounding carry into the sign.
const NAN: u32 = 0x7fff_ffff;
const NAN_BF16: u32 = 0x7fff_0000;

/// Whether either holds a NaN in any place.
#[inline]
#[target_feature(enable = "neon")]
fn has_nan((a, b): (Eight, Eight)) -> bool {
    // The maximum of a NaN and anything is a NaN.
    vmaxvq_f32(vmaxq_f32(vmaxq_f32(a[0], a[1]), vmaxq_f32(b[0], b[1]))).is_nan()
}

/// Every NaN becomes that of `BITS`. NaNs are rare: kept out of the way of all else.
#[cold]
#[inline(never)]
#[target_feature(enable = "neon")]
fn canonical<const BITS: u32>([low, high]: Eight) -> Eight {
    let nan = vreinterpretq_f32_u32(vdupq_n_u32(BITS));
    [
        vbslq_f32(vceqq_f32(low, low), low, nan),
        vbslq_f32(vceqq_f32(high, high), high, nan),
    ]
}

/// [`canonical`] where there is any NaN.
#[inline]
#[target_feature(enable = "neon")]
fn without_nan<const BITS: u32>((a, b): (Eight, Eight)) -> (Eight, Eight) {
    if has_nan((a, b)) {
        (canonical::<BITS>(a), canonical::<BITS>(b))
    } else {
        (a, b)
    }
}

// Stores past the caches come in pairs of registers only, without an intrinsic: `STREAM` makes no
// difference here.

impl PairVectors<f32> for Neon {
    type Vector = Eight;
    const LANES: usize = 8;
    type Rest = Neon;
    type Halves = Careful<Self, true, true>;
    type Adjacent = Careful<Self, false, false>;

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn load_halves(a: *const f32, b: *const f32) -> (Eight, Eight) {
        // SAFETY: the caller's.
        unsafe { (Eight::load(a), Eight::load(b)) }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn load_adjacent(from: *const f32) -> (Eight, Eight) {
        // SAFETY: the caller's.
        let (first, second) = unsafe { (vld2q_f32(from), vld2q_f32(from.add(8))) };
        ([first.0, second.0], [first.1, second.1])
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn store_halves<const STREAM: usize>(a: *mut f32, b: *mut f32, members: (Eight, Eight)) {
        let (x, y) = without_nan::<NAN>(members);
        // SAFETY: the caller's.
        unsafe {
            x.store(a);
            y.store(b);
        }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn store_adjacent<const STREAM: usize>(to: *mut f32, members: (Eight, Eight)) {
        let (x, y) = without_nan::<NAN>(members);
        // SAFETY: the caller's.
        unsafe {
            vst2q_f32(to, float32x4x2_t(x[0], y[0]));
            vst2q_f32(to.add(8), float32x4x2_t(x[1], y[1]));
        }
    }
}

// The intrinsics of f16's converts are younger than the oldest compiler that phasor supports. The
// converts may set bits of the floating-point status register, so that flags are not preserved.

/// Exact, but for the payload of NaNs.
#[inline]
#[target_feature(enable = "neon")]
fn from_f16(x: uint16x8_t) -> Eight {
    let (low, high): (float32x4_t, float32x4_t);
    // SAFETY: NEON's instructions on registers alone.
    unsafe {
        asm!(
            "fcvtl {to:v}.4s, {from:v}.4h",
            from = in(vreg) x,
            to = lateout(vreg) low,
            options(pure, nomem, nostack),
        );
        asm!(
            "fcvtl2 {to:v}.4s, {from:v}.8h",
            from = in(vreg) x,
            to = lateout(vreg) high,
            options(pure, nomem, nostack),
        );
    }
    [low, high]
}

/// Rounded to nearest even. NaN has been seen to.
#[inline]
#[target_feature(enable = "neon")]
fn to_f16([low, high]: Eight) -> uint16x8_t {
    let halves: uint16x8_t;
    // SAFETY: NEON's instructions on registers alone.
    unsafe {
        asm!(
            "fcvtn {to:v}.4h, {low:v}.4s",
            "fcvtn2 {to:v}.8h, {high:v}.4s",
            low = in(vreg) low,
            high = in(vreg) high,
            to = out(vreg) halves,
            options(pure, nomem, nostack),
        );
    }
    halves
}

impl PairVectors<f16> for Neon {
    type Vector = Eight;
    const LANES: usize = 8;
    type Rest = Neon;
    type Halves = Careful<Self, true, true>;
    type Adjacent = Careful<Self, false, false>;

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn load_halves(a: *const f16, b: *const f16) -> (Eight, Eight) {
        // SAFETY: the caller's.
        let (a, b) = unsafe { (vld1q_u16(a.cast()), vld1q_u16(b.cast())) };
        (from_f16(a), from_f16(b))
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn load_adjacent(from: *const f16) -> (Eight, Eight) {
        // SAFETY: the caller's.
        let pairs = unsafe { vld2q_u16(from.cast()) };
        (from_f16(pairs.0), from_f16(pairs.1))
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn store_halves<const STREAM: usize>(a: *mut f16, b: *mut f16, members: (Eight, Eight)) {
        let (x, y) = without_nan::<NAN>(members);
        // SAFETY: the caller's.
        unsafe {
            vst1q_u16(a.cast(), to_f16(x));
            vst1q_u16(b.cast(), to_f16(y));
        }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn store_adjacent<const STREAM: usize>(to: *mut f16, members: (Eight, Eight)) {
        let (x, y) = without_nan::<NAN>(members);
        // SAFETY: the caller's.
        unsafe { vst2q_u16(to.cast(), uint16x8x2_t(to_f16(x), to_f16(y))) }
    }
}

/// 8 elements.
#[inline]
#[target_feature(enable = "neon")]
fn widened(x: uint16x8_t) -> Eight {
    let (low, high) = (vmovl_u16(vget_low_u16(x)), vmovl_high_u16(x));
    [
        vreinterpretq_f32_u32(vshlq_n_u32::<16>(low)),
        vreinterpretq_f32_u32(vshlq_n_u32::<16>(high)),
    ]
}

/// First and second members of 4 adjacent pairs.
#[inline]
#[target_feature(enable = "neon")]
fn parted(x: uint32x4_t) -> (float32x4_t, float32x4_t) {
    (
        vreinterpretq_f32_u32(vshlq_n_u32::<16>(x)),
        vreinterpretq_f32_u32(vandq_u32(x, vdupq_n_u32(0xffff_0000))),
    )
}

/// To nearest even in the upper half of each lane; the lower half is anything. NaN has been seen to.
#[inline]
#[target_feature(enable = "neon")]
fn rounded(x: float32x4_t) -> uint32x4_t {
    let bits = vreinterpretq_u32_f32(x);
    // Plus 1 where what is kept is odd: its lowest bit, shifted up to the top and down again.
    let bits = vsraq_n_u32::<31>(bits, vshlq_n_u32::<15>(bits));
    vaddq_u32(bits, vdupq_n_u32(0x7fff))
}

/// 8 elements. NaN has been seen to.
#[inline]
#[target_feature(enable = "neon")]
fn narrowed([low, high]: Eight) -> uint16x8_t {
    let (low, high) = (rounded(low), rounded(high));
    vuzp2q_u16(vreinterpretq_u16_u32(low), vreinterpretq_u16_u32(high))
}

/// The reverse of [`parted`]. NaN has been seen to.
#[inline]
#[target_feature(enable = "neon")]
fn merged(x: float32x4_t, y: float32x4_t) -> uint32x4_t {
    vsriq_n_u32::<16>(rounded(y), rounded(x))
}

impl PairVectors<bf16> for Neon {
    type Vector = Eight;
    const LANES: usize = 8;
    type Rest = Neon;
    type Halves = Careful<Self, true, true>;
    type Adjacent = Careful<Self, false, false>;

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn load_halves(a: *const bf16, b: *const bf16) -> (Eight, Eight) {
        // SAFETY: the caller's.
        let (a, b) = unsafe { (vld1q_u16(a.cast()), vld1q_u16(b.cast())) };
        (widened(a), widened(b))
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn load_adjacent(from: *const bf16) -> (Eight, Eight) {
        // By bytes, as elements need not be aligned as words are.
        let from = from.cast::<u8>();
        // SAFETY: the caller's.
        let (first, second) = unsafe { (vld1q_u8(from), vld1q_u8(from.add(16))) };
        let (x0, y0) = parted(vreinterpretq_u32_u8(first));
        let (x1, y1) = parted(vreinterpretq_u32_u8(second));
        ([x0, x1], [y0, y1])
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn store_halves<const STREAM: usize>(
        a: *mut bf16,
        b: *mut bf16,
        members: (Eight, Eight),
    ) {
        let (x, y) = without_nan::<NAN_BF16>(members);
        // SAFETY: the caller's.
        unsafe {
            vst1q_u16(a.cast(), narrowed(x));
            vst1q_u16(b.cast(), narrowed(y));
        }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn store_adjacent<const STREAM: usize>(to: *mut bf16, members: (Eight, Eight)) {
        let (x, y) = without_nan::<NAN_BF16>(members);
        let (first, second) = (merged(x[0], y[0]), merged(x[1], y[1]));
        let to = to.cast::<u8>();
        // SAFETY: the caller's.
        unsafe {
            vst1q_u8(to, vreinterpretq_u8_u32(first));
            vst1q_u8(to.add(16), vreinterpretq_u8_u32(second));
        }
    }
}
