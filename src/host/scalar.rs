//! The definition: one pair at a time, in plain Rust.

use super::run::{AngleBlock, HeadRun, Phases};
use crate::angle::phase::{self, Scale};
use crate::element::Element;
use crate::rope::{Pairing, Pairings};

/// cos and sin of as many phases as there are steps, scaled.
///
/// # Safety
/// Phases that follow others are of as many steps.
pub(super) unsafe fn form(steps: &[u64], phases: Phases, scale: Scale, angles: &mut AngleBlock) {
    for (i, &step) in steps.iter().enumerate() {
        let phase = match phases {
            Phases::At(position) => step.wrapping_mul(position as u64),
            // SAFETY: the caller's: the block has those before.
            Phases::Next => unsafe { angles.phases[i].assume_init() }.wrapping_add(step),
        };
        let (cos, sin) = phase::cos_sin(phase, scale);
        angles.phases[i].write(phase);
        angles.cos[i].write(cos);
        angles.sin[i].write(sin);
    }
}

/// The rotation of one pair.
fn rotate_pair(a: f32, b: f32, cos: f32, sin: f32) -> (f32, f32) {
    (a.mul_add(cos, -(b * sin)), a.mul_add(sin, b * cos))
}

/// Elements of pair `pair`, counted from the first rotated dim.
fn members(pairing: Pairing, pair: usize, pairs: usize) -> (usize, usize) {
    match pairing {
        Pairing::HalfSplit => (pair, pairs + pair),
        Pairing::Interleaved => (2 * pair, 2 * pair + 1),
    }
}

/// Rotates all heads of a run by the first `pairs` angles.
///
/// # Safety
/// The run's pointers are valid for its heads and these pairs, whose angles have been formed.
pub(super) unsafe fn rotate_heads<T: Element>(
    pairings: Pairings,
    run: &HeadRun<T>,
    angles: &AngleBlock,
    pairs: usize,
) {
    // SAFETY: the caller's.
    let [cos, sin] = unsafe { angles.turns(pairs) };
    for h in 0..run.heads {
        for (j, (&cos, &sin)) in cos.iter().zip(sin).enumerate() {
            let (a, b) = members(pairings.source, run.first + j, run.pairs);
            let (to_a, to_b) = members(pairings.destination, run.first + j, run.pairs);
            // SAFETY: the caller vouches for every head of the run; the members are inside its
            // rotated window.
            unsafe {
                let source = run.source.add(h * run.source_stride);
                let destination = run.destination.add(h * run.destination_stride);
                let (x, y) = ((*source.add(a)).widen(), (*source.add(b)).widen());
                let (x, y) = rotate_pair(x, y, cos, sin);
                *destination.add(to_a) = T::narrow(x);
                *destination.add(to_b) = T::narrow(y);
            }
        }
    }
}
