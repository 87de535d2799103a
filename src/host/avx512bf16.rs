//! AVX-512 with the converts of its BF16 extension: bf16 elements, 32 pairs at a time. Other elements,
//! angles and what is left of a head go to the AVX-512 variant.
//!
//! The converts round to nearest even, but take subnormals for zero and keep a NaN's payload; two
//! vectors that hold either are rounded on integers.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::avx512;
use super::run::HeadRun;
use super::scalar;
use crate::element::Element;
use crate::rope::{Pairing, Pairings};

/// Pairs in two vectors.
const LANES: usize = 32;

/// An element type that this variant has its own way with, or leaves to AVX-512's.
#[doc(hidden)]
pub trait Converts: Sized {
    /// Rotates all heads of a run.
    ///
    /// # Safety
    /// The run's pointers are valid for its heads; the processor has what this variant needs.
    unsafe fn rotate_heads(pairings: Pairings, run: &HeadRun<Self>, cos: &[f32], sin: &[f32])
    where
        Self: Element,
    {
        // SAFETY: the caller's.
        unsafe { avx512::rotate_heads(pairings, run, cos, sin) }
    }
}

impl Converts for f32 {}
impl Converts for f16 {}
impl Converts for bf16 {
    unsafe fn rotate_heads(pairings: Pairings, run: &HeadRun<Self>, cos: &[f32], sin: &[f32]) {
        // SAFETY: the caller's.
        unsafe { rotate_heads(pairings, run, cos, sin) }
    }
}

/// # Safety
/// See [`Converts::rotate_heads`].
#[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn rotate_heads(pairings: Pairings, run: &HeadRun<bf16>, cos: &[f32], sin: &[f32]) {
    let vectors = cos.len() / LANES;
    for h in 0..run.heads {
        // SAFETY: the caller vouches for every head of the run; whole vectors of pairs are read
        // and written inside the rotated window, and cos and sin are as long as the block.
        unsafe {
            let source = run.source.add(h * run.source_stride);
            let destination = run.destination.add(h * run.destination_stride);
            for v in 0..vectors {
                let load = |from: &[f32], half: usize| {
                    _mm512_loadu_ps(from.as_ptr().add(v * LANES + half * 16))
                };
                let pair = run.first + v * LANES;
                let (a, b) = scalar::members(pairings.source, pair, run.pairs);
                let (x, y) = match pairings.source {
                    Pairing::HalfSplit => (widen(source.add(a)), widen(source.add(b))),
                    Pairing::Interleaved => widen_pairs(source.add(a)),
                };
                let [(x0, y0), (x1, y1)] = [0, 1]
                    .map(|half| avx512::rotate(x[half], y[half], load(cos, half), load(sin, half)));
                let (a, b) = scalar::members(pairings.destination, pair, run.pairs);
                match pairings.destination {
                    Pairing::HalfSplit => {
                        _mm512_storeu_si512(destination.add(a).cast(), narrow(x0, x1));
                        _mm512_storeu_si512(destination.add(b).cast(), narrow(y0, y1));
                    }
                    Pairing::Interleaved => {
                        let to = destination.add(a);
                        _mm512_storeu_si512(to.cast(), interleave(narrow(x0, y0)));
                        _mm512_storeu_si512(to.add(LANES).cast(), interleave(narrow(x1, y1)));
                    }
                }
            }
            let rest = vectors * LANES;
            avx512::rotate_rest(pairings, run, (source, destination), rest, cos, sin);
        }
    }
}

/// 32 consecutive elements.
///
/// # Safety
/// Readable for as many; the processor has AVX-512.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn widen(from: *const bf16) -> [__m512; 2] {
    // SAFETY: the caller's.
    unsafe { [0, 16].map(|at| <bf16 as avx512::Lanes>::load(from.add(at))) }
}

/// 64 consecutive elements, those of even and those of odd index.
///
/// # Safety
/// Readable for as many; the processor has AVX-512.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn widen_pairs(from: *const bf16) -> ([__m512; 2], [__m512; 2]) {
    // SAFETY: the caller's.
    let [(x0, y0), (x1, y1)] =
        unsafe { [0, LANES].map(|at| <bf16 as avx512::Lanes>::load_pairs(from.add(at))) };
    ([x0, x1], [y0, y1])
}

/// 32 elements, those of `low` first.
#[inline]
#[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn narrow(low: __m512, high: __m512) -> __m512i {
    /// Quiet NaN, subnormal, signalling NaN.
    const SPECIAL: i32 = 0x01 | 0x20 | 0x80;
    let special = _mm512_fpclass_ps_mask::<SPECIAL>(low) | _mm512_fpclass_ps_mask::<SPECIAL>(high);
    if special != 0 {
        return narrow_integers(low, high);
    }
    let rounded = _mm512_cvtne2ps_pbh(high, low);
    // SAFETY: both are 64 bytes of plain data.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(rounded) }
}

#[cold]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn narrow_integers(low: __m512, high: __m512) -> __m512i {
    let [low, high] = [low, high]
        .map(|x| _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(avx512::round_to_upper(x))));
    _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high)
}

/// 16 elements and 16 more as pairs of one of each.
#[inline]
#[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn interleave(x: __m512i) -> __m512i {
    // 0, 16, 1, 17, ...
    let from: [i16; LANES] = std::array::from_fn(|i| (i / 2 + 16 * (i % 2)) as i16);
    // SAFETY: an array of 32 i16 is as large as the vector, and the load needs no alignment.
    let from = unsafe { _mm512_loadu_si512(from.as_ptr().cast()) };
    _mm512_permutexvar_epi16(from, x)
}
