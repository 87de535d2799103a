//! The definition: one pair at a time, in plain Rust.

use super::run::HeadRun;
use crate::angle::phase;
use crate::element::Element;
use crate::rope::{Pairing, Pairings};

/// cos and sin at one position, each times its scale.
#[inline(always)]
pub(super) fn form_exact(
    steps: &[u64],
    position: i64,
    (cos_scale, sin_scale): (f32, f32),
    cos: &mut [f32],
    sin: &mut [f32],
) {
    for ((&step, cos), sin) in steps.iter().zip(cos).zip(sin) {
        let (c, s) = phase::cos_sin(step.wrapping_mul(position as u64));
        *cos = c * cos_scale;
        *sin = s * sin_scale;
    }
}

/// The rotation of one pair.
#[inline(always)]
pub(super) fn rotate_pair(a: f32, b: f32, cos: f32, sin: f32) -> (f32, f32) {
    (a.mul_add(cos, -(b * sin)), a.mul_add(sin, b * cos))
}

/// Elements of pair `pair`, counted from the first rotated dim.
#[inline(always)]
pub(super) fn members(pairing: Pairing, pair: usize, pairs: usize) -> (usize, usize) {
    match pairing {
        Pairing::HalfSplit => (pair, pairs + pair),
        Pairing::Interleaved => (2 * pair, 2 * pair + 1),
    }
}

/// Pairs `from..` of the run's block, in one head.
///
/// # Safety
/// `source` and `destination` start the rotated window of a head of the run.
#[inline(always)]
pub(super) unsafe fn rotate_rest<T: Element>(
    pairings: Pairings,
    run: &HeadRun<T>,
    (source, destination): (*const T, *mut T),
    from: usize,
    cos: &[f32],
    sin: &[f32],
) {
    for j in from..cos.len() {
        let (a, b) = members(pairings.source, run.first + j, run.pairs);
        let (to_a, to_b) = members(pairings.destination, run.first + j, run.pairs);
        // SAFETY: the members are inside the rotated window.
        unsafe {
            let (x, y) = ((*source.add(a)).widen(), (*source.add(b)).widen());
            let (x, y) = rotate_pair(x, y, cos[j], sin[j]);
            *destination.add(to_a) = T::narrow(x);
            *destination.add(to_b) = T::narrow(y);
        }
    }
}

/// Rotates all heads of a run.
///
/// # Safety
/// The run's pointers are valid for its heads.
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
