//! Every variant over memory that ends at pages that nobody may touch. An address sanitizer does not
//! see stores past the caches; the processor sees them all.

use super::run::{AngleBlock, BLOCK, HeadRun, Phases};
use super::variants::{self, VectorElement};
use super::{Host, Isa, Threads, cache};
use crate::angle::phase::Scale;
use crate::rope::Pairing::{HalfSplit, Interleaved};
use crate::rope::Pairings;
use crate::{Frequencies, InOut, Layout, Positions, Problem, Rope};
use guarded::{EDGES, Edge, Guarded};
use half::{bf16, f16};

#[path = "../../tests/support/guarded.rs"]
mod guarded;

fn available() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.is_available())
}

const HEADS: usize = 3;

/// Heads of `2 * pairs` elements, the last of which ends where the slice does.
struct Heads {
    pairs: usize,
    /// From one to the next.
    stride: usize,
    pairings: Pairings,
    stream: bool,
    ordinary: bool,
}

impl Heads {
    fn len(&self) -> usize {
        (HEADS - 1) * self.stride + 2 * self.pairs
    }

    fn rotate<T: VectorElement>(&self, isa: Isa, source: *const T, destination: *mut T) {
        let mut memory = Guarded::new(self.pairs * size_of::<u64>());
        let steps: Vec<u64> = (1..=self.pairs as u64)
            .map(|i| u64::MAX / (7 * i))
            .collect();
        let steps = memory.filled(Edge::Last(0), &steps);
        let mut angles = AngleBlock::new();
        for first in (0..self.pairs).step_by(BLOCK) {
            let steps = &steps[first..self.pairs.min(first + BLOCK)];
            let run = HeadRun {
                source,
                destination,
                source_stride: self.stride,
                destination_stride: self.stride,
                heads: HEADS,
                pairs: self.pairs,
                first,
                continues: true,
                stream: self.stream,
                ordinary: self.ordinary,
            };
            // SAFETY: the variant is available, the pointers are those of all heads, and there are no
            // more steps than a block has.
            unsafe {
                let scale = Scale::new(1.0, false);
                variants::form(isa, steps, Phases::At(1234), scale, &mut angles);
                T::rotate_heads(isa, self.pairings, &run, &angles, steps.len());
            }
        }
        variants::fence();
    }
}

fn values<T: VectorElement>(len: usize) -> Vec<T> {
    let value = |i: usize| T::narrow((i % 61) as f32 / 16.0 - 2.03);
    (0..len).map(value).collect()
}

fn bits<T: VectorElement>(values: &[T]) -> Vec<u32> {
    values.iter().map(|x| x.widen().to_bits()).collect()
}

fn check_heads<T: VectorElement>(heads: &Heads, maps: &mut [Guarded; 2]) {
    let len = heads.len();
    let given = values::<T>(len);
    let mut expected = given.clone();
    let apart = heads.pairings.source != heads.pairings.destination || heads.stream;
    heads.rotate(Isa::Scalar, given.as_ptr(), expected.as_mut_ptr());
    let expected = bits(&expected);
    let [from, to] = maps;
    for isa in available() {
        for edge in EDGES {
            let check = |got: &[T]| {
                let &Heads {
                    pairs,
                    stride,
                    stream,
                    ..
                } = heads;
                assert!(
                    bits(got) == expected,
                    "{} {}, {pairs} pairs, {stride} apart, {edge:?}, stream {stream}",
                    T::DTYPE,
                    isa.name()
                );
            };
            // What is read ends at one page, what is written at the other, and both at the same.
            for source_edge in [Edge::First(0), Edge::Last(0)] {
                let source = from.filled(source_edge, &given).as_ptr();
                // What lies between heads is not written.
                let destination = to.filled(edge, &given);
                heads.rotate(isa, source, destination.as_mut_ptr());
                check(destination);
                from.check_rest::<T>(source_edge, len);
                to.check_rest::<T>(edge, len);
            }
            if !apart {
                let both = to.filled(edge, &given);
                let destination = both.as_mut_ptr();
                heads.rotate(isa, destination.cast_const(), destination);
                check(both);
                to.check_rest::<T>(edge, len);
            }
        }
    }
}

fn check<T: VectorElement>() {
    let room = || Guarded::new(HEADS * 600 * size_of::<T>());
    let mut maps = [room(), room()];
    let sizes = [24, 32, 40, 44, 48, 60, 64, 80, 96, 127, BLOCK, 140, 256];
    for pairs in (1..=20).chain(sizes) {
        for (source, destination) in [
            (HalfSplit, HalfSplit),
            (Interleaved, Interleaved),
            (HalfSplit, Interleaved),
            (Interleaved, HalfSplit),
        ] {
            for gap in [0, 8, 32] {
                for (stream, ordinary) in
                    [(false, true), (false, false), (true, true), (true, false)]
                {
                    let heads = Heads {
                        pairs,
                        stride: 2 * pairs + gap,
                        pairings: Pairings {
                            source,
                            destination,
                        },
                        stream,
                        ordinary,
                    };
                    check_heads::<T>(&heads, &mut maps);
                }
            }
        }
    }
}

#[test]
fn f32_heads_at_the_edge_of_memory() {
    check::<f32>();
}

#[test]
fn f16_heads_at_the_edge_of_memory() {
    check::<f16>();
}

#[test]
fn bf16_heads_at_the_edge_of_memory() {
    check::<bf16>();
}

/// A call that is large enough to be written past the caches: one token's heads, repeated.
fn check_call<T: VectorElement>() {
    const SHAPE: [usize; 2] = [4, 64];
    let [heads, dim] = SHAPE;
    let token = heads * dim;
    // As many bytes are counted as read.
    let tokens = (cache::last_level() / 4).div_ceil(token * size_of::<T>()) + 1;
    let len = tokens * token;
    let given = values::<T>(token);
    let mut from = Guarded::new(token * size_of::<T>());
    let mut to = Guarded::new(len * size_of::<T>() + 64);
    for pairing in [HalfSplit, Interleaved] {
        let rope = Rope::new(Frequencies::from_theta(1e4, dim).unwrap(), pairing);
        let source = Layout::tokens(tokens, heads, dim).with_strides(0, 0, dim);
        let layouts = (source, Layout::tokens(tokens, heads, dim));
        let problem = Problem::new(T::DTYPE).q(layouts).longer_buffers();
        for isa in available() {
            for edge in [Edge::First(0), Edge::Last(0), Edge::Last(1)] {
                let host = Host::new()
                    .with_isa(isa)
                    .unwrap()
                    .with_threads(Threads::One);
                let rotator = host.rotator(&rope);
                let plan = rotator.plan(&problem).unwrap();
                let source = from.filled(Edge::Last(0), &given);
                let destination = to.slice::<T>(edge, len);
                let q = InOut::from((&*source, &mut *destination));
                rotator
                    .rotate(&plan, Some(q), None, Positions::start(0))
                    .unwrap();
                // At position 0 everything is what it was; the last token was written too.
                let name = isa.name();
                assert!(
                    bits(&destination[..token]) == bits(&given),
                    "{name} {edge:?}"
                );
                let mut last = given.clone();
                let one = rotator.plan(&Problem::new(T::DTYPE).q(Layout::tokens(1, heads, dim)));
                let at = Positions::start(tokens as i64 - 1);
                rotator
                    .rotate(&one.unwrap(), Some(InOut::InPlace(&mut last)), None, at)
                    .unwrap();
                assert!(
                    bits(&destination[len - token..]) == bits(&last),
                    "{name} {edge:?}"
                );
                to.check_rest::<T>(edge, len);
            }
        }
    }
}

#[test]
fn calls_past_the_caches_end_where_their_memory_ends() {
    check_call::<f32>();
    check_call::<f16>();
    check_call::<bf16>();
}
