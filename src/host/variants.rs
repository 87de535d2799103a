//! Where a call goes to the variant that was chosen.

use super::run::{AngleBlock, HeadRun, Phases};
use super::stages::{Room, Rows, TokenWork};
use super::{Isa, scalar};
use crate::angle::phase::Scale;
use crate::rope::Pairings;

#[cfg(target_arch = "x86_64")]
use super::{
    avx2::{self, Avx2},
    avx512::{self, Avx512},
    avx512bf16::Converts,
    vector::{self, PairVectors},
    vector_stages,
};
#[cfg(target_arch = "aarch64")]
use super::{
    neon::{self, Neon},
    vector::{self, PairVectors},
    vector_stages,
};

/// An element type that every variant of this target can rotate.
pub(super) trait VectorElement: Rows {
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

    /// All stages of the heads of a token.
    ///
    /// # Safety
    /// That of [`TokenWork::perform`]; the variant can run here.
    unsafe fn perform_stages(isa: Isa, work: &TokenWork<'_>, room: &mut Room<Self>);
}

#[cfg(target_arch = "x86_64")]
impl<T: Rows + Converts> VectorElement for T
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

    unsafe fn perform_stages(isa: Isa, work: &TokenWork<'_>, room: &mut Room<T>) {
        // SAFETY: the caller's.
        unsafe {
            match isa {
                Isa::Scalar | Isa::Neon => work.perform(room),
                Isa::Avx2 => vector_stages::perform::<Avx2, Avx2, T>(work, room),
                Isa::Avx512 => vector_stages::perform::<Avx512, Avx512, T>(work, room),
                Isa::Avx512Bf16 => T::stages_converting(work, room),
            }
        }
    }
}

#[cfg(target_arch = "aarch64")]
impl<T: Rows> VectorElement for T
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

    unsafe fn perform_stages(isa: Isa, work: &TokenWork<'_>, room: &mut Room<T>) {
        // SAFETY: the caller's.
        unsafe {
            match isa {
                Isa::Neon => vector_stages::perform::<Neon, Neon, T>(work, room),
                _ => work.perform(room),
            }
        }
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
impl<T: Rows> VectorElement for T {
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

    unsafe fn perform_stages(_isa: Isa, work: &TokenWork<'_>, room: &mut Room<T>) {
        // SAFETY: the caller's.
        unsafe { work.perform(room) }
    }
}

/// cos and sin of as many phases as there are steps, scaled.
///
/// # Safety
/// There are at most [`super::run::BLOCK`] steps; phases that follow others are of as many; the variant
/// can run here.
pub(super) unsafe fn form(
    isa: Isa,
    steps: &[u64],
    phases: Phases,
    scale: Scale,
    angles: &mut AngleBlock,
) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the caller's.
        Isa::Avx2 => unsafe { avx2::form(steps, phases, scale, angles) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the caller's.
        Isa::Avx512 | Isa::Avx512Bf16 => unsafe { avx512::form(steps, phases, scale, angles) },
        #[cfg(target_arch = "aarch64")]
        // SAFETY: the caller's.
        Isa::Neon => unsafe { neon::form(steps, phases, scale, angles) },
        // SAFETY: the caller's.
        _ => unsafe { scalar::form(steps, phases, scale, angles) },
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
    use crate::Dtype;
    use crate::host::run::BLOCK;
    use crate::rope::Pairing::{self, HalfSplit, Interleaved};
    use half::{bf16, f16};

    const HEADS: usize = 4;

    /// Where the heads lie.
    #[derive(Clone, Copy, Debug)]
    struct Place {
        /// Elements from a cache line to the destination.
        offset: usize,
        /// Elements between heads.
        gap: usize,
        stream: bool,
        /// What the variants are told about the factors, which are ordinary.
        ordinary: bool,
    }

    /// Rotates heads of `2 * pairs` elements; in all but two some values need care on the way out.
    fn rotated<T: VectorElement>(
        isa: Isa,
        pairings: Pairings,
        pairs: usize,
        Place {
            offset,
            gap,
            stream,
            ordinary,
        }: Place,
    ) -> Vec<u32> {
        let stride = 2 * pairs + gap;
        let len = HEADS * stride;
        let special = [f32::NAN, f32::INFINITY, 1e-39, -0.0, 3e38, 7e-8];
        let value = |i: usize| match i % 61 {
            at @ 0..6 if i >= 4 * pairs => special[at],
            at => at as f32 / 16.0 - 2.03,
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
                ordinary,
            };
            // SAFETY: the variant is available, the buffers hold all heads, and no more steps than
            // a block has.
            unsafe {
                form(
                    isa,
                    steps,
                    Phases::At(1234),
                    Scale::new(1.0, false),
                    &mut angles,
                );
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

    fn check<T: VectorElement>() {
        let plain = Place {
            offset: 0,
            gap: 0,
            stream: false,
            ordinary: false,
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
                        for (stream, ordinary) in [(false, true), (true, true), (false, false)] {
                            let place = Place {
                                offset,
                                gap,
                                stream,
                                ordinary,
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

    /// Rotates heads of half-split or adjacent pairs in place.
    fn rotate_ordinary<T: VectorElement>(
        isa: Isa,
        pairing: Pairing,
        pairs: usize,
        scale: Scale,
        heads: &mut [T],
    ) {
        let pairings = Pairings {
            source: pairing,
            destination: pairing,
        };
        // The first angle is 0, the second a tiny one.
        let steps: Vec<u64> = (0..pairs as u64)
            .map(|i| (i * i * i).wrapping_mul(0x1234_5678_9abc))
            .collect();
        let mut angles = AngleBlock::new();
        let run = HeadRun {
            source: heads.as_ptr(),
            destination: heads.as_mut_ptr(),
            source_stride: 2 * pairs,
            destination_stride: 2 * pairs,
            heads: heads.len() / (2 * pairs),
            pairs,
            first: 0,
            continues: true,
            stream: false,
            ordinary: true,
        };
        // SAFETY: the variant is available, the buffer holds all heads, and a block that many steps.
        unsafe {
            form(isa, &steps, Phases::At(987), scale, &mut angles);
            T::rotate_heads(isa, pairings, &run, &angles, pairs);
        }
    }

    /// Of every exponent that ordinary elements have, next to the ends more often.
    fn ordinary<T: VectorElement>(random: &mut u64) -> T {
        *random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        let bits = (*random >> 32) as u32;
        let (least, most) = match T::DTYPE {
            Dtype::F32 => (1, 254),
            Dtype::F16 => (127 - 24, 127 + 15),
            Dtype::Bf16 => (127 - 63, 127 + 64),
        };
        let exponent = match bits >> 28 & 7 {
            0 => least,
            1 => most,
            2 => least + (bits >> 20 & 0xff) % (most - least + 1),
            _ => 127,
        };
        let mantissa = bits & 0x7f_ffff;
        // Not beyond what f16 holds, nor up to the next exponent.
        let mantissa = mantissa.min(0x7f_e000)
            & if T::DTYPE == Dtype::Bf16 {
                0x7f_0000
            } else {
                u32::MAX
            };
        T::narrow(f32::from_bits(bits & 1 << 31 | exponent << 23 | mantissa))
    }

    fn for_ordinary(mut check: impl FnMut(Isa, Pairing, usize, Scale)) {
        for pairs in [32, 40, 48, 64, BLOCK] {
            for pairing in [HalfSplit, Interleaved] {
                for isa in Isa::ALL[1..]
                    .iter()
                    .copied()
                    .filter(|isa| isa.is_available())
                {
                    for (factor, inverse) in [
                        (1.0, true),
                        (1.3, false),
                        (1.0 / 2048.0, true),
                        (4096.0, true),
                    ] {
                        check(isa, pairing, pairs, Scale::new(factor, inverse));
                    }
                }
            }
        }
    }

    fn bits<T: VectorElement>(heads: &[T]) -> Vec<u32> {
        heads.iter().map(|x| x.widen().to_bits()).collect()
    }

    fn check_ordinary<T: VectorElement>() {
        let mut random = 1;
        for_ordinary(|isa, pairing, pairs, scale| {
            let heads: Vec<T> = (0..200 * pairs).map(|_| ordinary(&mut random)).collect();
            let (mut expected, mut got) = (heads.clone(), heads);
            rotate_ordinary(Isa::Scalar, pairing, pairs, scale, &mut expected);
            rotate_ordinary(isa, pairing, pairs, scale, &mut got);
            let name = T::DTYPE.name();
            assert!(
                bits(&got) == bits(&expected),
                "{name} {}, {pairs} pairs, {pairing:?}, {scale:?}",
                isa.name()
            );
        });
    }

    /// Heads that all take the straight code, to its limits.
    #[test]
    fn ordinary_heads_get_the_scalar_bits() {
        check_ordinary::<f32>();
        check_ordinary::<f16>();
        check_ordinary::<bf16>();
    }

    fn check_one<T: VectorElement>(special: &[u16]) {
        let mut random = 1;
        for_ordinary(|isa, pairing, pairs, scale| {
            let ordinary: Vec<T> = (0..6 * pairs).map(|_| ordinary(&mut random)).collect();
            for at in 0..pairs {
                let pair = match pairing {
                    HalfSplit => [at, pairs + at],
                    Interleaved => [2 * at, 2 * at + 1],
                };
                for (i, &special) in special.iter().enumerate() {
                    // One member, the other, both.
                    for members in [&pair[..1], &pair[1..], &pair[..]] {
                        let mut expected = ordinary.clone();
                        for member in members {
                            let head = 2 * pairs * (i % 2);
                            expected[head + member] = from_bits::<T>(special);
                        }
                        let mut got = expected.clone();
                        rotate_ordinary(Isa::Scalar, pairing, pairs, scale, &mut expected);
                        rotate_ordinary(isa, pairing, pairs, scale, &mut got);
                        assert!(
                            bits(&got) == bits(&expected),
                            "{} {}, {pairs} pairs, {pairing:?}, {scale:?}: {special:x} in {members:?}",
                            T::DTYPE,
                            isa.name(),
                        );
                    }
                }
            }
        });
    }

    fn from_bits<T: VectorElement>(bits: u16) -> T {
        T::narrow(match T::DTYPE {
            Dtype::F16 => f16::from_bits(bits).to_f32(),
            _ => bf16::from_bits(bits).to_f32(),
        })
    }

    /// Wherever it is. NaN, infinities, zeros; in bf16 also the smallest number, the largest, and those
    /// next to ordinary ones.
    #[test]
    fn one_value_that_is_not_ordinary_is_noticed() {
        check_one::<f16>(&[0x7e00, 0x7c00, 0xfc00, 0, 0x8000, 1]);
        check_one::<bf16>(&[0x7fc0, 0x7f80, 0xff80, 0, 0x8000, 1, 0x7f7f, 0x1fff, 0x6000]);
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
                        unsafe { form(isa, &steps, phases, Scale::new(1.3, true), &mut angles) };
                    }
                    // SAFETY: so many have been formed.
                    unsafe { angles.turns(pairs) }
                        .map(|x| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>())
                };
                let next = formed(&[Phases::At(-2), Phases::Next, Phases::Next, Phases::Next]);
                assert_eq!(next, formed(&[Phases::At(1)]), "{} {pairs}", isa.name());
            }
        }
    }
}
