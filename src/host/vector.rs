//! The loops of the vector variants, written once. An instruction set brings its vectors: how pairs
//! of an element type are read and written, and how phases are formed and taken apart.
//!
//! All of this is inlined into functions that enable the set's features, and called from there only.
//! So the unsafe functions here have two conditions throughout: the processor has what the set needs,
//! and pointers are valid for the vectors that are read or written, which lie in the rotated windows of
//! a run's heads or in an [`AngleBlock`], whose angles have been formed. What else one needs, it says.

use super::run::{AngleBlock, BLOCK, FEWEST_LANES, HeadRun, Phases};
use super::stages::{Room, Rows, TokenWork};
#[cfg(doc)]
use super::vector_stages;
use super::vector_stages::Normed;
use crate::angle::phase::{self, Scale};
use crate::element::Element;
use crate::rope::{Pairing, Pairings};
use std::marker::PhantomData;
use std::ops::Range;

/// The most pairs that any set has in a vector.
pub(super) const MOST_LANES: usize = 32;

/// Vectors of a block.
const MOST_VECTORS: usize = BLOCK / FEWEST_LANES;

/// A vector of f32.
pub trait Float: Copy {
    const LANES: usize;

    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    unsafe fn splat(x: f32) -> Self;
    unsafe fn mul(self, by: Self) -> Self;
    unsafe fn add(self, plus: Self) -> Self;
    unsafe fn sub(self, minus: Self) -> Self;
    /// `self * by + plus`, rounded once.
    unsafe fn mul_add(self, by: Self, plus: Self) -> Self;
    /// `self * by - minus`, rounded once.
    unsafe fn mul_sub(self, by: Self, minus: Self) -> Self;
    /// The lanes of both, in turn.
    unsafe fn interleave(self, second: Self) -> [Self; 2];
    /// The reverse of [`interleave`](Self::interleave).
    unsafe fn deinterleave(both: [Self; 2]) -> (Self, Self);
    /// Each even lane plus the odd one after it, of both: in every four lanes two such sums of the first,
    /// then two of the second.
    unsafe fn add_neighbours(self, second: Self) -> Self;
    /// Folds sums of two, as [`add_neighbours`](Self::add_neighbours) leaves them, in halves: to one of
    /// each.
    unsafe fn fold_both(self, to: *mut [f32; 2]);
    /// `1 / sqrt(self * by + plus)`, each operation rounded.
    unsafe fn reciprocal_root(self, by: Self, plus: Self) -> Self;
}

/// Twice the width.
impl<F: Float> Float for [F; 2] {
    const LANES: usize = 2 * F::LANES;

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's.
        unsafe { [F::load(from), F::load(from.add(F::LANES))] }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's.
        unsafe {
            self[0].store(to);
            self[1].store(to.add(F::LANES));
        }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the caller's, here and below.
        unsafe { [F::splat(x), F::splat(x)] }
    }
    #[inline(always)]
    unsafe fn mul(self, by: Self) -> Self {
        // SAFETY: the caller's.
        unsafe { [self[0].mul(by[0]), self[1].mul(by[1])] }
    }
    #[inline(always)]
    unsafe fn add(self, plus: Self) -> Self {
        // SAFETY: the caller's.
        unsafe { [self[0].add(plus[0]), self[1].add(plus[1])] }
    }
    #[inline(always)]
    unsafe fn sub(self, minus: Self) -> Self {
        // SAFETY: the caller's.
        unsafe { [self[0].sub(minus[0]), self[1].sub(minus[1])] }
    }
    #[inline(always)]
    unsafe fn mul_add(self, by: Self, plus: Self) -> Self {
        let [a, b] = self;
        // SAFETY: the caller's.
        unsafe { [a.mul_add(by[0], plus[0]), b.mul_add(by[1], plus[1])] }
    }
    #[inline(always)]
    unsafe fn mul_sub(self, by: Self, minus: Self) -> Self {
        let [a, b] = self;
        // SAFETY: the caller's.
        unsafe { [a.mul_sub(by[0], minus[0]), b.mul_sub(by[1], minus[1])] }
    }
    #[inline(always)]
    unsafe fn interleave(self, second: Self) -> [Self; 2] {
        // SAFETY: the caller's.
        unsafe { [self[0].interleave(second[0]), self[1].interleave(second[1])] }
    }
    #[inline(always)]
    unsafe fn deinterleave([first, second]: [Self; 2]) -> (Self, Self) {
        // SAFETY: the caller's, here and below.
        unsafe {
            let (a0, b0) = F::deinterleave(first);
            let (a1, b1) = F::deinterleave(second);
            ([a0, a1], [b0, b1])
        }
    }
    #[inline(always)]
    unsafe fn add_neighbours(self, second: Self) -> Self {
        let [a, b] = self;
        // SAFETY: the caller's.
        unsafe { [a.add_neighbours(second[0]), b.add_neighbours(second[1])] }
    }
    #[inline(always)]
    unsafe fn fold_both(self, to: *mut [f32; 2]) {
        // SAFETY: the caller's.
        unsafe { self[0].add(self[1]).fold_both(to) }
    }
    #[inline(always)]
    unsafe fn reciprocal_root(self, by: Self, plus: Self) -> Self {
        let [a, b] = self;
        // SAFETY: the caller's.
        unsafe {
            [
                a.reciprocal_root(by[0], plus[0]),
                b.reciprocal_root(by[1], plus[1]),
            ]
        }
    }
}

/// How an instruction set reads and writes pairs of elements `T`. Reading is exact; writing rounds
/// as [`Element::narrow`] does.
pub trait PairVectors<T>: Sized {
    /// First members, second members or factors, in any order that these share.
    type Vector: Float;
    /// Pairs at a time, [`FEWEST_LANES`] to [`MOST_LANES`]. Divides [`BLOCK`].
    const LANES: usize;
    /// For what is left of a head: [`FEWEST_LANES`] at a time.
    type Rest: PairVectors<T>;
    /// Halves of a multiple of this many pairs are worth vectors of `LANES`. Those of others lie across
    /// cache lines, and are left to `Rest`.
    const HALVES: usize = 1;
    /// For heads of common sizes that are halves, and remain so; and the same of adjacent pairs.
    type Halves: Straight<T>;
    type Adjacent: Straight<T>;

    /// Whether all of `COUNT` elements from `a` on, at least [`FEWEST_PAIRS`], and as many from `b` on
    /// are [ordinary](Straight).
    #[inline(always)]
    unsafe fn are_ordinary<const COUNT: usize>(_a: *const T, _b: *const T) -> bool {
        false
    }

    /// The squares of first and second members of adjacent pairs, added: `b.mul_add(b, a * a)`. Squares
    /// below 2^-126 may be taken for zeros, if [`may_lack`](Self::may_lack) tells of it.
    #[inline(always)]
    unsafe fn squares(from: *const T) -> Self::Vector {
        // SAFETY: the caller's.
        unsafe { squares::<Self, T>(from) }
    }

    /// Whether any of these sums of two neighbours among [`squares`](Self::squares) may be another than
    /// without such zeros.
    #[inline(always)]
    unsafe fn may_lack(_sums: &[Self::Vector]) -> bool {
        false
    }

    /// First members from `a` on, second members from `b` on.
    unsafe fn load_halves(a: *const T, b: *const T) -> (Self::Vector, Self::Vector);

    /// First members, each followed by its second.
    unsafe fn load_adjacent(from: *const T) -> (Self::Vector, Self::Vector);

    /// The reverse of [`load_halves`](Self::load_halves). Past the caches where `STREAM` is not 0: what
    /// is written begins at multiples of `STREAM` bytes, or of its own size if that is less.
    unsafe fn store_halves<const STREAM: usize>(
        a: *mut T,
        b: *mut T,
        members: (Self::Vector, Self::Vector),
    );

    /// The reverse of [`load_adjacent`](Self::load_adjacent).
    unsafe fn store_adjacent<const STREAM: usize>(
        to: *mut T,
        members: (Self::Vector, Self::Vector),
    );

    /// Stores a head of `COUNT` times [`LANES`](Self::LANES) pairs, halves or adjacent ones, unless a value
    /// would need care that straight code should not have: returns whether.
    #[inline(always)]
    unsafe fn store_head<const COUNT: usize, const HALVES: bool>(
        to: *mut T,
        members: [(Self::Vector, Self::Vector); COUNT],
    ) -> bool {
        // SAFETY: the caller's.
        unsafe { store_all::<Self, T, COUNT, HALVES>(to, members) };
        true
    }
}

/// [`PairVectors::squares`] without zeros for small ones.
#[inline(always)]
pub(super) unsafe fn squares<V: PairVectors<T>, T>(from: *const T) -> V::Vector {
    // SAFETY: the caller's, here and below.
    unsafe {
        let (a, b) = V::load_adjacent(from);
        b.mul_add(b, a.mul(a))
    }
}

/// Stores a head, whatever its values.
#[inline(always)]
pub(super) unsafe fn store_all<V: PairVectors<T>, T, const COUNT: usize, const HALVES: bool>(
    to: *mut T,
    members: [(V::Vector, V::Vector); COUNT],
) {
    let mut i = 0;
    while i < COUNT {
        let (a, b) = self::members::<HALVES>(i * V::LANES, COUNT * V::LANES);
        // SAFETY: the caller's.
        unsafe { store::<V, T, HALVES, 0>([to.add(a), to.add(b)], members[i]) };
        i += 1;
    }
}

/// How straight code for one pairing reads and writes. It may leave out what ordinary values do not
/// need, if it can tell them beforehand.
///
/// Ordinary factors are those of [`HeadRun::ordinary`]: F, the larger of |cos| and |sin|, is between
/// 2^-12 and 2^12. Ordinary elements are finite, and those of bf16 from 2^-63 to below 2^65. Then no
/// result is NaN. And with such bf16 none is subnormal, or -0. Take u = x cos - y sin, where y sin has
/// been rounded; x sin + y cos is alike. If the two products differ by at least half of the one with F,
/// |u| is above 2^-77. Otherwise both are above 2^-77: the rounded one, of 24 bits, is a multiple of
/// 2^-100; the exact one, of 32, is one of 2^-108. Their difference is +0, or at least 2^-108.
pub trait Straight<T> {
    /// cos and sin of as many pairs as are rotated at a time.
    type Factors: Copy;
    /// Pairs at a time, at least [`FEWEST_LANES`]. Divides [`BLOCK`].
    const LANES: usize;
    /// Whether it is right for ordinary values only.
    const ORDINARY: bool = false;

    /// From `LANES` consecutive cos and sin.
    unsafe fn factors(cos: *const f32, sin: *const f32) -> Self::Factors;

    /// Rotates `LANES` pairs. First members begin at the first pointers, second members at the second
    /// ones; adjacent pairs at the first. Past the caches as in [`PairVectors::store_halves`].
    unsafe fn turn<const STREAM: usize>(
        from: [*const T; 2],
        to: [*mut T; 2],
        factors: Self::Factors,
    );
}

/// The fewest pairs of straight code, of which the widest vectors have as many elements.
const FEWEST_PAIRS: usize = MOST_LANES;

/// [`PairVectors`] as straight code, for any values.
pub struct Careful<V, const FROM_HALVES: bool, const TO_HALVES: bool>(PhantomData<V>);

impl<T, V, const FROM_HALVES: bool, const TO_HALVES: bool> Straight<T>
    for Careful<V, FROM_HALVES, TO_HALVES>
where
    V: PairVectors<T>,
{
    type Factors = (V::Vector, V::Vector);
    const LANES: usize = V::LANES;

    #[inline(always)]
    unsafe fn factors(cos: *const f32, sin: *const f32) -> Self::Factors {
        // SAFETY: the caller's, here and below.
        unsafe { (V::Vector::load(cos), V::Vector::load(sin)) }
    }

    #[inline(always)]
    unsafe fn turn<const STREAM: usize>(
        from: [*const T; 2],
        to: [*mut T; 2],
        (cos, sin): Self::Factors,
    ) {
        // SAFETY: the caller's.
        unsafe {
            let members = rotate(load::<V, T, FROM_HALVES>(from), cos, sin);
            store::<V, T, TO_HALVES, STREAM>(to, members);
        }
    }
}

/// An instruction set: how it enters the loop over heads with its features enabled. A function for each
/// combination, so that each gets the registers for itself.
pub(super) trait Loops {
    /// [`heads`], inlined.
    unsafe fn heads<V, T, const FROM_HALVES: bool, const TO_HALVES: bool, const STREAM: usize>(
        run: &HeadRun<T>,
        angles: &AngleBlock,
        pairs: usize,
    ) where
        V: PairVectors<T>,
        T: Element;

    /// [`vector_stages::heads`], inlined.
    unsafe fn stages<V, T, const FROM_HALVES: bool, const TO_HALVES: bool, const LEAN: bool>(
        work: &TokenWork<'_>,
        room: &mut Room<T>,
    ) where
        V: PairVectors<T>,
        T: Rows;

    /// [`vector_stages::rs`], inlined.
    unsafe fn rs<V, T, const COUNT: usize>(normed: &mut Normed<'_>, heads: Range<usize>)
    where
        V: PairVectors<T>;

    /// [`vector_stages::normed`], inlined.
    unsafe fn normed<
        V,
        T,
        const FROM_HALVES: bool,
        const TO_HALVES: bool,
        const COUNT: usize,
        const WIDE: bool,
        const CARE: bool,
    >(
        normed: &Normed<'_>,
        heads: Range<usize>,
    ) -> usize
    where
        V: PairVectors<T>,
        T: Rows;

    /// [`TokenWork::store_codes`], inlined here alone: other stages have need of all registers.
    unsafe fn store_codes(work: &TokenWork<'_>, head: usize, x: &[f32], room: *mut u8);

    /// [`TokenWork::perform`], inlined.
    unsafe fn plain_stages<T: Rows>(work: &TokenWork<'_>, room: &mut Room<T>);
}

/// Implements [`Loops`] for a set, by functions that enable its features. A macro, as an attribute takes them
/// as a literal alone.
macro_rules! loops {
    ($set:ident, $features:literal) => {
        impl $crate::host::vector::Loops for $set {
            #[target_feature(enable = $features)]
            unsafe fn heads<
                V,
                T,
                const FROM_HALVES: bool,
                const TO_HALVES: bool,
                const STREAM: usize,
            >(
                run: &$crate::host::run::HeadRun<T>,
                angles: &$crate::host::run::AngleBlock,
                pairs: usize,
            ) where
                V: $crate::host::vector::PairVectors<T>,
                T: $crate::element::Element,
            {
                // SAFETY: the caller's.
                unsafe {
                    $crate::host::vector::heads::<V, T, FROM_HALVES, TO_HALVES, STREAM>(
                        run, angles, pairs,
                    )
                }
            }

            #[target_feature(enable = $features)]
            unsafe fn stages<
                V,
                T,
                const FROM_HALVES: bool,
                const TO_HALVES: bool,
                const LEAN: bool,
            >(
                work: &$crate::host::stages::TokenWork<'_>,
                room: &mut $crate::host::stages::Room<T>,
            ) where
                V: $crate::host::vector::PairVectors<T>,
                T: $crate::host::stages::Rows,
            {
                // SAFETY: the caller's.
                unsafe {
                    $crate::host::vector_stages::heads::<Self, V, T, FROM_HALVES, TO_HALVES, LEAN>(
                        work, room,
                    )
                }
            }

            #[target_feature(enable = $features)]
            unsafe fn rs<V, T, const COUNT: usize>(
                normed: &mut $crate::host::vector_stages::Normed<'_>,
                heads: ::std::ops::Range<usize>,
            ) where
                V: $crate::host::vector::PairVectors<T>,
            {
                // SAFETY: the caller's.
                unsafe { $crate::host::vector_stages::rs::<V, T, COUNT>(normed, heads) }
            }

            #[target_feature(enable = $features)]
            unsafe fn normed<
                V,
                T,
                const FROM_HALVES: bool,
                const TO_HALVES: bool,
                const COUNT: usize,
                const WIDE: bool,
                const CARE: bool,
            >(
                normed: &$crate::host::vector_stages::Normed<'_>,
                heads: ::std::ops::Range<usize>,
            ) -> usize
            where
                V: $crate::host::vector::PairVectors<T>,
                T: $crate::host::stages::Rows,
            {
                // SAFETY: the caller's.
                unsafe {
                    $crate::host::vector_stages::normed::<
                        Self,
                        V,
                        T,
                        FROM_HALVES,
                        TO_HALVES,
                        COUNT,
                        WIDE,
                        CARE,
                    >(normed, heads)
                }
            }

            #[inline(never)]
            #[target_feature(enable = $features)]
            unsafe fn store_codes(
                work: &$crate::host::stages::TokenWork<'_>,
                head: usize,
                x: &[f32],
                room: *mut u8,
            ) {
                // SAFETY: the caller's.
                unsafe { work.store_codes(head, x, room) }
            }

            #[target_feature(enable = $features)]
            unsafe fn plain_stages<T: $crate::host::stages::Rows>(
                work: &$crate::host::stages::TokenWork<'_>,
                room: &mut $crate::host::stages::Room<T>,
            ) {
                // SAFETY: the caller's.
                unsafe { work.perform(room) }
            }
        }
    };
}
pub(super) use loops;

/// Rotates all heads of a run by the first `pairs` angles.
///
/// # Safety
/// The run's pointers are valid for its heads and these pairs.
pub(super) unsafe fn rotate_heads<L: Loops, V: PairVectors<T>, T: Element>(
    pairings: Pairings,
    run: &HeadRun<T>,
    angles: &AngleBlock,
    pairs: usize,
) {
    use Pairing::{HalfSplit, Interleaved};
    let enter = match (
        pairings.source,
        pairings.destination,
        run.stream_alignment(),
    ) {
        (HalfSplit, HalfSplit, 64) => L::heads::<V, T, true, true, 64>,
        (HalfSplit, HalfSplit, 16) => L::heads::<V, T, true, true, 16>,
        (HalfSplit, HalfSplit, _) => L::heads::<V, T, true, true, 0>,
        (Interleaved, Interleaved, 64) => L::heads::<V, T, false, false, 64>,
        (Interleaved, Interleaved, 16) => L::heads::<V, T, false, false, 16>,
        (Interleaved, Interleaved, _) => L::heads::<V, T, false, false, 0>,
        (HalfSplit, Interleaved, _) => L::heads::<V, T, true, false, 0>,
        (Interleaved, HalfSplit, _) => L::heads::<V, T, false, true, 0>,
    };
    // SAFETY: the caller's.
    unsafe { enter(run, angles, pairs) }
}

/// # Safety
/// That of [`rotate_heads`].
#[inline(always)]
pub(super) unsafe fn heads<
    V,
    T,
    const FROM_HALVES: bool,
    const TO_HALVES: bool,
    const STREAM: usize,
>(
    run: &HeadRun<T>,
    angles: &AngleBlock,
    pairs: usize,
) where
    V: PairVectors<T>,
    T: Element,
{
    // SAFETY: the caller's.
    unsafe {
        if (FROM_HALVES || TO_HALVES) && !run.pairs.is_multiple_of(V::HALVES) {
            return heads_of::<V::Rest, T, FROM_HALVES, TO_HALVES, STREAM>(run, angles, pairs);
        }
        heads_of::<V, T, FROM_HALVES, TO_HALVES, STREAM>(run, angles, pairs)
    }
}

#[inline(always)]
unsafe fn heads_of<V, T, const FROM_HALVES: bool, const TO_HALVES: bool, const STREAM: usize>(
    run: &HeadRun<T>,
    angles: &AngleBlock,
    pairs: usize,
) where
    V: PairVectors<T>,
    T: Element,
{
    // SAFETY: the caller's.
    unsafe {
        match (FROM_HALVES, TO_HALVES) {
            (true, true) => common::<V::Halves, V, T, true, true, STREAM>(run, angles, pairs),
            (false, false) => {
                common::<V::Adjacent, V, T, false, false, STREAM>(run, angles, pairs);
            }
            _ => {
                common::<Careful<V, FROM_HALVES, TO_HALVES>, V, T, FROM_HALVES, TO_HALVES, STREAM>(
                    run, angles, pairs,
                )
            }
        }
    }
}

/// Sends the common sizes to straight code, where no branch is mispredicted and every load keeps its
/// distance from one head to the next, which prefetchers see; and what remains to [`any_heads`].
#[inline(always)]
unsafe fn common<S, V, T, const FROM_HALVES: bool, const TO_HALVES: bool, const STREAM: usize>(
    run: &HeadRun<T>,
    angles: &AngleBlock,
    pairs: usize,
) where
    S: Straight<T>,
    V: PairVectors<T>,
    T: Element,
{
    // SAFETY: the caller's.
    unsafe {
        let at = match pairs {
            _ if S::ORDINARY && !run.ordinary => 0,
            32 => straight_heads::<S, V, T, FROM_HALVES, TO_HALVES, STREAM, 32>(run, angles),
            40 => straight_heads::<S, V, T, FROM_HALVES, TO_HALVES, STREAM, 40>(run, angles),
            48 => straight_heads::<S, V, T, FROM_HALVES, TO_HALVES, STREAM, 48>(run, angles),
            64 => straight_heads::<S, V, T, FROM_HALVES, TO_HALVES, STREAM, 64>(run, angles),
            BLOCK => straight_heads::<S, V, T, FROM_HALVES, TO_HALVES, STREAM, BLOCK>(run, angles),
            _ => 0,
        };
        // No more straight code after this: the factors would not stay in registers if they had to
        // outlast it.
        any_heads::<V, T, FROM_HALVES, TO_HALVES, STREAM>(run, angles, pairs, at..run.heads);
    }
}

/// Rotates heads of `PAIRS` pairs, a multiple of the lanes of `V::Rest`, up to one that has other than
/// ordinary values: returns its index, or the number of heads. The factors stay in registers, as far as
/// there are enough.
#[inline(always)]
unsafe fn straight_heads<
    S,
    V,
    T,
    const FROM_HALVES: bool,
    const TO_HALVES: bool,
    const STREAM: usize,
    const PAIRS: usize,
>(
    run: &HeadRun<T>,
    angles: &AngleBlock,
) -> usize
where
    S: Straight<T>,
    V: PairVectors<T>,
{
    let rest = <V::Rest as PairVectors<T>>::LANES;
    const {
        assert!(PAIRS >= FEWEST_PAIRS);
        assert!((PAIRS % S::LANES).is_multiple_of(<V::Rest as PairVectors<T>>::LANES));
    }
    let (whole, parts) = (PAIRS / S::LANES, PAIRS % S::LANES / rest);
    // SAFETY: the caller vouches for every head of the run.
    unsafe {
        let (cos, sin) = (
            angles.cos.as_ptr().cast(),
            angles.sin.as_ptr().cast::<f32>(),
        );
        let mut factors = [S::factors(cos, sin); MOST_VECTORS];
        let mut i = 1;
        while i < whole {
            factors[i] = S::factors(cos.add(i * S::LANES), sin.add(i * S::LANES));
            i += 1;
        }
        for h in 0..run.heads {
            let head = run.head(h);
            fetch_ahead::<T, FROM_HALVES>(run, (h, &head), PAIRS);
            let [a, b] = head.group::<FROM_HALVES, TO_HALVES>(run, 0).source;
            let b = if FROM_HALVES { b } else { a.add(PAIRS) };
            if S::ORDINARY && !V::are_ordinary::<PAIRS>(a, b) {
                return h;
            }
            let mut i = 0;
            while i < whole {
                let group = head.group::<FROM_HALVES, TO_HALVES>(run, i * S::LANES);
                S::turn::<STREAM>(group.source, group.destination, factors[i]);
                i += 1;
            }
            let mut i = 0;
            while i < parts {
                let at = whole * S::LANES + i * rest;
                let group = head.group::<FROM_HALVES, TO_HALVES>(run, at);
                let members = turn::<V::Rest, T, FROM_HALVES>(&group, angles, at);
                store::<V::Rest, T, TO_HALVES, STREAM>(group.destination, members);
                i += 1;
            }
        }
    }
    run.heads
}

/// Asks early for what processors do not foresee.
#[inline(always)]
fn fetch_ahead<T, const FROM_HALVES: bool>(
    run: &HeadRun<T>,
    (h, head): (usize, &Head<T>),
    pairs: usize,
) {
    const LINE: usize = 64;
    /// Two halves that are so far apart look like no stream to a processor that watches a page for
    /// one, unless the first half is asked for in order.
    const FAR: usize = 512;
    /// Heads whose lines are on the way at a time, where only some lines of each are touched.
    const HEADS: usize = 20;
    let gap = run.source_stride.saturating_sub(2 * run.pairs);
    let (start, len) = if gap >= LINE / size_of::<T>() {
        if run.first > 0 || !(run.continues || h + HEADS < run.heads) {
            return;
        }
        let ahead = HEADS.wrapping_mul(run.source_stride);
        (head.source.wrapping_add(ahead), 2 * pairs)
    } else if FROM_HALVES && run.pairs * size_of::<T>() >= FAR {
        (head.source.wrapping_add(run.first), pairs)
    } else {
        return;
    };
    let mut at = 0;
    while at < len * size_of::<T>() {
        prefetch(start.cast::<i8>().wrapping_add(at));
        at += LINE;
    }
}

#[inline(always)]
fn prefetch(line: *const i8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint, which touches no memory that a program could see.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

/// Some heads, of any number of pairs and any values.
#[inline(always)]
unsafe fn any_heads<V, T, const FROM_HALVES: bool, const TO_HALVES: bool, const STREAM: usize>(
    run: &HeadRun<T>,
    angles: &AngleBlock,
    pairs: usize,
    heads: Range<usize>,
) where
    V: PairVectors<T>,
    T: Element,
{
    let rest = <V::Rest as PairVectors<T>>::LANES;
    // A part of a vector is rotated together with the whole one before it: the two overlap, so
    // both are read before either is written.
    let part = pairs % rest;
    let end = if part == 0 || pairs < rest {
        pairs - part
    } else {
        pairs - part - rest
    };
    for h in heads {
        // SAFETY: the caller vouches for every head of the run.
        unsafe {
            let head = run.head(h);
            fetch_ahead::<T, FROM_HALVES>(run, (h, &head), pairs);
            let mut at = 0;
            while at + V::LANES <= end {
                let group = head.group::<FROM_HALVES, TO_HALVES>(run, at);
                let members = turn::<V, T, FROM_HALVES>(&group, angles, at);
                store::<V, T, TO_HALVES, STREAM>(group.destination, members);
                at += V::LANES;
            }
            while at < end {
                let group = head.group::<FROM_HALVES, TO_HALVES>(run, at);
                let members = turn::<V::Rest, T, FROM_HALVES>(&group, angles, at);
                store::<V::Rest, T, TO_HALVES, STREAM>(group.destination, members);
                at += rest;
            }
            if part == 0 {
                continue;
            }
            let group = head.group::<FROM_HALVES, TO_HALVES>(run, at);
            if pairs < rest {
                turn_copies::<V::Rest, T, FROM_HALVES, TO_HALVES>(&group, angles, part);
                continue;
            }
            let last = head.group::<FROM_HALVES, TO_HALVES>(run, at + part);
            let members = turn::<V::Rest, T, FROM_HALVES>(&group, angles, at);
            let last_members = turn::<V::Rest, T, FROM_HALVES>(&last, angles, at + part);
            store::<V::Rest, T, TO_HALVES, 0>(group.destination, members);
            store::<V::Rest, T, TO_HALVES, 0>(last.destination, last_members);
        }
    }
}

/// Where the rotated window of a head begins.
struct Head<T> {
    source: *const T,
    destination: *mut T,
}

impl<T> HeadRun<T> {
    #[inline(always)]
    unsafe fn head(&self, h: usize) -> Head<T> {
        // SAFETY: the caller's.
        unsafe {
            Head {
                source: self.source.add(h * self.source_stride),
                destination: self.destination.add(h * self.destination_stride),
            }
        }
    }
}

/// Consecutive pairs of a head: where their first and their second members begin.
struct Group<T> {
    source: [*const T; 2],
    destination: [*mut T; 2],
}

impl<T> Head<T> {
    /// From pair `at` of the run's block on.
    #[inline(always)]
    unsafe fn group<const FROM_HALVES: bool, const TO_HALVES: bool>(
        &self,
        run: &HeadRun<T>,
        at: usize,
    ) -> Group<T> {
        let pair = run.first + at;
        let (a, b) = members::<FROM_HALVES>(pair, run.pairs);
        let (to_a, to_b) = members::<TO_HALVES>(pair, run.pairs);
        // SAFETY: the pair is inside the head's rotated window.
        unsafe {
            Group {
                source: [self.source.add(a), self.source.add(b)],
                destination: [self.destination.add(to_a), self.destination.add(to_b)],
            }
        }
    }
}

/// Elements of a pair, counted from the first rotated dim.
#[inline(always)]
pub(super) fn members<const HALVES: bool>(pair: usize, pairs: usize) -> (usize, usize) {
    if HALVES {
        (pair, pairs + pair)
    } else {
        (2 * pair, 2 * pair + 1)
    }
}

#[inline(always)]
pub(super) unsafe fn load<V: PairVectors<T>, T, const HALVES: bool>(
    [a, b]: [*const T; 2],
) -> (V::Vector, V::Vector) {
    // SAFETY: the caller's.
    unsafe {
        if HALVES {
            V::load_halves(a, b)
        } else {
            V::load_adjacent(a)
        }
    }
}

#[inline(always)]
pub(super) unsafe fn store<V: PairVectors<T>, T, const HALVES: bool, const STREAM: usize>(
    [a, b]: [*mut T; 2],
    members: (V::Vector, V::Vector),
) {
    // SAFETY: the caller's.
    unsafe {
        if HALVES {
            V::store_halves::<STREAM>(a, b, members);
        } else {
            V::store_adjacent::<STREAM>(a, members);
        }
    }
}

#[inline(always)]
pub(super) unsafe fn rotate<F: Float>((x, y): (F, F), cos: F, sin: F) -> (F, F) {
    // SAFETY: the caller's.
    unsafe { (x.mul_sub(cos, y.mul(sin)), x.mul_add(sin, y.mul(cos))) }
}

/// Reads a vector of pairs and rotates it by the angles from `at` on.
#[inline(always)]
unsafe fn turn<V: PairVectors<T>, T, const HALVES: bool>(
    group: &Group<T>,
    angles: &AngleBlock,
    at: usize,
) -> (V::Vector, V::Vector) {
    // SAFETY: the caller's.
    unsafe {
        let cos = V::Vector::load(angles.cos.as_ptr().add(at).cast());
        let sin = V::Vector::load(angles.sin.as_ptr().add(at).cast());
        rotate(load::<V, T, HALVES>(group.source), cos, sin)
    }
}

/// Rotates the only pairs of a block, which fill no vector, in copies that do. The block's other angles
/// are anything.
#[inline(always)]
unsafe fn turn_copies<V, T, const FROM_HALVES: bool, const TO_HALVES: bool>(
    group: &Group<T>,
    angles: &AngleBlock,
    pairs: usize,
) where
    V: PairVectors<T>,
    T: Element,
{
    let mut copies = [T::default(); 2 * MOST_LANES];
    // SAFETY: the caller's; fewer pairs are copied than a vector has.
    unsafe {
        let a = copies.as_mut_ptr();
        let b = a.add(V::LANES);
        let [from_a, from_b] = group.source;
        if FROM_HALVES {
            a.copy_from_nonoverlapping(from_a, pairs);
            b.copy_from_nonoverlapping(from_b, pairs);
        } else {
            a.copy_from_nonoverlapping(from_a, 2 * pairs);
        }
        let whole = Group {
            source: [a.cast_const(), b.cast_const()],
            destination: [a, b],
        };
        let members = turn::<V, T, FROM_HALVES>(&whole, angles, 0);
        store::<V, T, TO_HALVES, 0>(whole.destination, members);
        let [to_a, to_b] = group.destination;
        if TO_HALVES {
            to_a.copy_from_nonoverlapping(a, pairs);
            to_b.copy_from_nonoverlapping(b, pairs);
        } else {
            to_a.copy_from_nonoverlapping(a, 2 * pairs);
        }
    }
}

/// How an instruction set forms phases and takes them apart.
pub(super) trait PhaseVectors {
    type Phases: Copy;
    type Vector: Float;
    /// Phases at a time, at most [`MOST_LANES`]. Divides [`BLOCK`].
    const LANES: usize;

    unsafe fn load(from: *const u64) -> Self::Phases;
    unsafe fn store(to: *mut u64, phases: Self::Phases);
    /// The lower 64 bits of each sum.
    unsafe fn add(a: Self::Phases, b: Self::Phases) -> Self::Phases;
    /// The lower 64 bits of each product.
    unsafe fn mul(steps: Self::Phases, position: u64) -> Self::Phases;
    /// The distance to the nearest quarter turn, as the magnitude of `phase << 2`: bits 40 to 63, and
    /// bits 9 to 39.
    unsafe fn distance(phases: Self::Phases) -> (Self::Vector, Self::Vector);
    /// cos and sin from those of the distance: signs, and which is which. `sin_flip` as in [`Scale`].
    unsafe fn place(
        phases: Self::Phases,
        cosine: Self::Vector,
        sine: Self::Vector,
        sin_flip: u32,
    ) -> (Self::Vector, Self::Vector);
}

/// [`phase::cos_sin`] of as many phases as there are steps.
///
/// # Safety
/// There are at most [`BLOCK`] steps.
#[inline(always)]
pub(super) unsafe fn form<V: PhaseVectors>(
    steps: &[u64],
    phases: Phases,
    scale: Scale,
    angles: &mut AngleBlock,
) {
    let whole = steps.len() - steps.len() % V::LANES;
    // SAFETY: whole vectors lie inside the steps, or inside the block, as `LANES` divides it.
    unsafe {
        let mut at = 0;
        while at < whole {
            form_vector::<V>(steps.as_ptr().add(at), phases, scale, angles, at);
            at += V::LANES;
        }
        if whole < steps.len() {
            let mut copies = [0; MOST_LANES];
            copies[..steps.len() - whole].copy_from_slice(&steps[whole..]);
            form_vector::<V>(copies.as_ptr(), phases, scale, angles, whole);
        }
    }
}

#[inline(always)]
unsafe fn form_vector<V: PhaseVectors>(
    steps: *const u64,
    phases: Phases,
    scale: Scale,
    angles: &mut AngleBlock,
    at: usize,
) {
    // SAFETY: the caller's.
    unsafe {
        let kept = angles.phases.as_mut_ptr().add(at).cast();
        let phases = match phases {
            Phases::At(position) => V::mul(V::load(steps), position as u64),
            Phases::Next => V::add(V::load(kept), V::load(steps)),
        };
        V::store(kept, phases);
        let (high, low) = V::distance(phases);
        let high = high.mul(V::Vector::splat(phase::HIGH_UNIT));
        let s = low.mul_add(V::Vector::splat(phase::LOW_UNIT), high);
        let z = s.mul(s);
        let p = z.mul_add(
            V::Vector::splat(phase::SIN[3]),
            V::Vector::splat(phase::SIN[2]),
        );
        let p = z.mul_add(p, V::Vector::splat(phase::SIN[1]));
        let p = z.mul_add(p, V::Vector::splat(phase::SIN[0]));
        let c = z.mul_add(
            V::Vector::splat(phase::COS[3]),
            V::Vector::splat(phase::COS[2]),
        );
        let c = z.mul_add(c, V::Vector::splat(phase::COS[1]));
        let cos_0 = V::Vector::splat(phase::COS[0]);
        let one = V::Vector::splat(1.0);
        let (cosine, sine) = if scale.factor == 1.0 {
            let c = z.mul_add(c, cos_0);
            let cosine = z.mul_add(c, one);
            let sine = s.mul_add(V::Vector::splat(phase::SIN_1), s.mul(p));
            (cosine, sine)
        } else {
            let f = V::Vector::splat(scale.factor);
            let sin_1 = V::Vector::splat(scale.sin_1);
            let z_rest = high.mul_add(
                low.mul(V::Vector::splat(2.0 * phase::LOW_UNIT)),
                high.mul_sub(high, z),
            );
            let cosine = z.mul_add(cos_0, one);
            let rest = z.mul_add(cos_0, one.sub(cosine));
            let rest = z_rest.mul_add(cos_0, rest);
            let rest = z.mul_add(z.mul(c), rest);
            let p = f.mul_add(p, V::Vector::splat(scale.sin_1_rest));
            let s_rest = low.mul(V::Vector::splat(phase::LOW_UNIT));
            let sine = s.mul_add(p, s_rest.mul(sin_1));
            let cosine = f.mul_add(cosine, f.mul(rest));
            (cosine, high.mul_add(sin_1, sine))
        };
        let (cos, sin) = V::place(phases, cosine, sine, scale.sin_flip);
        cos.store(angles.cos.as_mut_ptr().add(at).cast());
        sin.store(angles.sin.as_mut_ptr().add(at).cast());
    }
}
