//! Where a call goes to the variant that was chosen.

use super::run::{AngleBlock, HeadRun, Phases};
use super::{Isa, scalar};
use crate::element::Element;
use crate::rope::Pairings;

#[cfg(target_arch = "x86_64")]
use super::{
    avx2::{self, Avx2},
    avx512::{self, Avx512},
    avx512bf16::Converts,
    vector::{self, PairVectors},
};
#[cfg(target_arch = "aarch64")]
use super::{
    neon::{self, Neon},
    vector::{self, PairVectors},
};

/// An element type that every variant of this target can rotate.
pub trait VectorElement: Sized {
    /// Rotates all heads of a run by the first `pairs` angles.
    ///
    /// # Safety
    /// The run's pointers are valid for its heads and these pairs; the variant can run here.
    unsafe fn rotate_heads(
        isa: Isa,
        pairings: Pairings,
        run: &HeadRun<Self>,
        angles: &AngleBlock,
        pairs: usize,
    );
}

#[cfg(target_arch = "x86_64")]
impl<T: Element + Converts> VectorElement for T
where
    Avx2: PairVectors<T>,
    Avx512: PairVectors<T>,
{
    unsafe fn rotate_heads(
        isa: Isa,
        pairings: Pairings,
        run: &HeadRun<T>,
        angles: &AngleBlock,
        pairs: usize,
    ) {
        // SAFETY: the caller's.
        unsafe {
            match isa {
                Isa::Scalar | Isa::Neon => scalar::rotate_heads(pairings, run, angles, pairs),
                Isa::Avx2 => vector::rotate_heads::<Avx2, Avx2, T>(pairings, run, angles, pairs),
                Isa::Avx512 => {
                    vector::rotate_heads::<Avx512, Avx512, T>(pairings, run, angles, pairs)
                }
                Isa::Avx512Bf16 => T::rotate_converting(pairings, run, angles, pairs),
            }
        }
    }
}

#[cfg(target_arch = "aarch64")]
impl<T: Element> VectorElement for T
where
    Neon: PairVectors<T>,
{
    unsafe fn rotate_heads(
        isa: Isa,
        pairings: Pairings,
        run: &HeadRun<T>,
        angles: &AngleBlock,
        pairs: usize,
    ) {
        // SAFETY: the caller's.
        unsafe {
            match isa {
                Isa::Neon => vector::rotate_heads::<Neon, Neon, T>(pairings, run, angles, pairs),
                _ => scalar::rotate_heads(pairings, run, angles, pairs),
            }
        }
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
impl<T: Element> VectorElement for T {
    unsafe fn rotate_heads(
        _isa: Isa,
        pairings: Pairings,
        run: &HeadRun<T>,
        angles: &AngleBlock,
        pairs: usize,
    ) {
        // SAFETY: the caller's.
        unsafe { scalar::rotate_heads(pairings, run, angles, pairs) }
    }
}

/// cos and sin of as many phases as there are steps, each times its scale.
///
/// # Safety
/// There are at most [`super::run::BLOCK`] steps; the variant can run here.
pub(super) unsafe fn form(
    isa: Isa,
    steps: &[u64],
    phases: Phases,
    scales: (f32, f32),
    angles: &mut AngleBlock,
) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the caller's.
        Isa::Avx2 => unsafe { avx2::form(steps, phases, scales, angles) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the caller's.
        Isa::Avx512 | Isa::Avx512Bf16 => unsafe { avx512::form(steps, phases, scales, angles) },
        #[cfg(target_arch = "aarch64")]
        // SAFETY: the caller's.
        Isa::Neon => unsafe { neon::form(steps, phases, scales, angles) },
        _ => scalar::form(steps, phases, scales, angles),
    }
}

/// Makes stores past the caches visible before whatever the thread stores next.
pub(super) fn fence() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 processor has it.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Element;
    use crate::host::run::BLOCK;
    use crate::rope::Pairing::{HalfSplit, Interleaved};
    use half::{bf16, f16};

    const HEADS: usize = 3;

    /// Where the heads lie.
    #[derive(Clone, Copy, Debug)]
    struct Place {
        /// Elements from a cache line to the destination.
        offset: usize,
        /// Elements between heads.
        gap: usize,
        stream: bool,
    }

    /// Rotates heads of `2 * pairs` elements; some values need care on the way out.
    fn rotated<T: Element>(
        isa: Isa,
        pairings: Pairings,
        pairs: usize,
        Place {
            offset,
            gap,
            stream,
        }: Place,
    ) -> Vec<u32> {
        let stride = 2 * pairs + gap;
        let len = HEADS * stride;
        let special = [f32::NAN, f32::INFINITY, 1e-39, -0.0, 3e38, 7e-8];
        let value = |i: usize| match i % 61 {
            at @ 0..6 if i > 61 => special[at],
            at => at as f32 / 16.0 - 2.0,
        };
        // The same values whatever lies between heads.
        let source: Vec<T> = (0..len)
            .map(|i| T::narrow(value(i / stride * 2 * pairs + i % stride)))
            .collect();
        let guard = T::narrow(0.5);
        let mut destination = vec![guard; len + offset + 64];
        let start = destination.as_ptr().align_offset(64) + offset;
        let mut angles = AngleBlock::new();
        let steps: Vec<u64> = (1..=pairs as u64).map(|i| u64::MAX / (7 * i)).collect();
        for first in (0..pairs).step_by(BLOCK) {
            let steps = &steps[first..pairs.min(first + BLOCK)];
            let run = HeadRun {
                source: source.as_ptr(),
                destination: destination[start..].as_mut_ptr(),
                source_stride: stride,
                destination_stride: stride,
                heads: HEADS,
                pairs,
                first,
                continues: true,
                stream,
            };
            // SAFETY: the variant is available, the buffers hold all heads, and no more steps than
            // a block has.
            unsafe {
                form(isa, steps, Phases::At(1234), (1.0, 1.0), &mut angles);
                T::rotate_heads(isa, pairings, &run, &angles, steps.len());
            }
        }
        fence();
        let mut bits = Vec::new();
        for (i, x) in destination.iter().enumerate() {
            let at = i.wrapping_sub(start);
            if at < len && at % stride < 2 * pairs {
                bits.push(x.widen().to_bits());
            } else {
                assert!(x.widen() == 0.5, "element {i} was not to be written");
            }
        }
        bits
    }

    fn check<T: Element>() {
        let plain = Place {
            offset: 0,
            gap: 0,
            stream: false,
        };
        let sizes = [
            24, 32, 40, 44, 48, 60, 64, 80, 96, 100, 127, BLOCK, 140, 256,
        ];
        for pairs in (1..=20).chain(sizes) {
            for (source, destination) in [
                (HalfSplit, HalfSplit),
                (Interleaved, Interleaved),
                (HalfSplit, Interleaved),
                (Interleaved, HalfSplit),
            ] {
                let pairings = Pairings {
                    source,
                    destination,
                };
                let expected = rotated::<T>(Isa::Scalar, pairings, pairs, plain);
                for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
                    for (offset, gap) in [(0, 0), (8, 0), (16, 64), (1, 0), (0, 32), (0, 8)] {
                        for stream in [false, true] {
                            let place = Place {
                                offset,
                                gap,
                                stream,
                            };
                            assert!(
                                rotated::<T>(isa, pairings, pairs, place) == expected,
                                "{} {}, {pairs} pairs, {source:?} to {destination:?}, {place:?}",
                                T::DTYPE,
                                isa.name(),
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn every_number_of_pairs_and_every_alignment_gives_the_scalar_bits() {
        check::<f32>();
        check::<f16>();
        check::<bf16>();
    }

    /// Forming the next phases by addition is forming those of the next position.
    #[test]
    fn next_is_at_the_next_position() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            for pairs in [1, 8, 13, 32, BLOCK] {
                let steps: Vec<u64> = (1..=pairs as u64).map(|i| u64::MAX / (3 * i)).collect();
                let formed = |at: &[Phases]| {
                    let mut angles = AngleBlock::new();
                    for &phases in at {
                        // SAFETY: the variant is available, and a block has as many pairs.
                        unsafe { form(isa, &steps, phases, (0.5, 2.0), &mut angles) };
                    }
                    let bits = |x: &[f32]| x[..pairs].iter().map(|x| x.to_bits()).collect();
                    let (cos, sin): (Vec<_>, Vec<_>) = (bits(&angles.cos), bits(&angles.sin));
                    (cos, sin)
                };
                let next = formed(&[Phases::At(-2), Phases::Next, Phases::Next, Phases::Next]);
                assert_eq!(next, formed(&[Phases::At(1)]), "{} {pairs}", isa.name());
            }
        }
    }
}
