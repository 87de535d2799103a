//! Heads with more stages than a rotation, in vectors: what `stages.rs` defines in plain loops, for heads
//! that consist of whole vectors.
//!
//! The heads of a token are walked twice where they have a norm of their own: for the sums, and for all
//! else. So neither walk waits: the first has no root or division in it, and the second depends on
//! nothing that was found shortly before. In the second, values stay in registers from the first stage
//! to the last, but for a norm after the rotation and for codes, which need all of a head first.
//!
//! Conditions of the unsafe functions are those of `vector.rs`, with rows of a head's dims in place of
//! windows.

use super::run::FEWEST_LANES;
use super::stages::{
    HeadsAt, Room, Rows, Statistic, Sum, TokenWork, Turns, USUAL_DIMS, at_head, fold,
};
use super::vector::{self, Float, Loops, MOST_LANES, PairVectors};
use crate::call::{PHASOR_CODES_NONE, PHASOR_NORM_LAYER, PHASOR_NORM_NONE, PHASOR_NORM_RMS};
use crate::rope::Pairing::{HalfSplit, Interleaved};
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::ptr::{null, with_exposed_provenance, with_exposed_provenance_mut};

/// Heads whose sums are found before the first of them is normed: whole vectors of any set.
const TOGETHER: usize = 32;

/// Vectors of a head's pairs.
const MOST_VECTORS: usize = USUAL_DIMS / 2 / FEWEST_LANES;

/// All stages of the heads of a token.
///
/// # Safety
/// That of [`TokenWork::perform`]; the processor has what `L` and `V` need.
pub(super) unsafe fn perform<L: Loops, V: PairVectors<T>, T: Rows>(
    work: &TokenWork<'_>,
    room: &mut Room<T>,
) {
    // SAFETY: the caller's.
    unsafe {
        if fits::<V, T>(work) {
            enter::<L, V, T>(work, room);
        } else if fits::<V::Rest, T>(work) {
            enter::<L, V::Rest, T>(work, room);
        } else {
            L::plain_stages(work, room);
        }
    }
}

/// Whether all rows are whole vectors.
fn fits<V: PairVectors<T>, T>(work: &TokenWork<'_>) -> bool {
    let whole = |dims: usize| dims.is_multiple_of(2 * V::LANES);
    let turns = |turns: &Turns| whole(turns.offset) && whole(2 * turns.cos.len());
    work.head_dim <= USUAL_DIMS && whole(work.head_dim) && work.turns.as_ref().is_none_or(turns)
}

/// Whether a head has no stages but those that most models have: an RMS norm with a weight for all heads,
/// if any, rotation and codes. The loop over its dims then has no branches for others.
fn is_lean(work: &TokenWork<'_>) -> bool {
    let stages = work.stages;
    let norm = &stages.norm;
    let weighted = norm.kind == PHASOR_NORM_RMS && norm.weight != 0 && norm.weight_head == 0;
    let other = norm.bias != 0 || norm.after_rotation == 1;
    stages.bias == 0 && work.scale == 1.0 && (norm.kind == PHASOR_NORM_NONE || weighted && !other)
}

/// # Safety
/// That of [`perform`]; all rows are whole vectors.
unsafe fn enter<L: Loops, V: PairVectors<T>, T: Rows>(work: &TokenWork<'_>, room: &mut Room<T>) {
    let pairings = match &work.turns {
        None => (HalfSplit, HalfSplit),
        Some(turns) => (turns.pairings.source, turns.pairings.destination),
    };
    let lean = is_lean(work);
    // SAFETY: the caller's, here and below.
    let done = unsafe {
        match pairings {
            (HalfSplit, HalfSplit) if lean => straight::<L, V, T, true, true>(work, room),
            (Interleaved, Interleaved) if lean => straight::<L, V, T, false, false>(work, room),
            _ => false,
        }
    };
    if done {
        return;
    }
    let heads = match (pairings, lean) {
        ((HalfSplit, HalfSplit), true) => L::stages::<V, T, true, true, true>,
        ((HalfSplit, HalfSplit), false) => L::stages::<V, T, true, true, false>,
        ((Interleaved, Interleaved), true) => L::stages::<V, T, false, false, true>,
        ((Interleaved, Interleaved), false) => L::stages::<V, T, false, false, false>,
        ((HalfSplit, Interleaved), _) => L::stages::<V, T, true, false, false>,
        ((Interleaved, HalfSplit), _) => L::stages::<V, T, false, true, false>,
    };
    unsafe { heads(work, room) }
}

/// All stages of lean heads that have norms of their own and rotate as a whole, if they are of a usual size,
/// and become elements or nothing but codes; returns whether.
///
/// # Safety
/// That of [`enter`].
unsafe fn straight<L, V, T, const FROM_HALVES: bool, const TO_HALVES: bool>(
    work: &TokenWork<'_>,
    room: &mut Room<T>,
) -> bool
where
    L: Loops,
    V: PairVectors<T>,
    T: Rows,
{
    let (norm, codes) = (&work.stages.norm, &work.stages.codes);
    let is_whole = |turns: &Turns| 2 * turns.cos.len() == work.head_dim;
    if norm.kind == PHASOR_NORM_NONE
        || norm.across_heads == 1
        || !work.turns.as_ref().is_some_and(is_whole)
    {
        return false;
    }
    let wide = codes.type_ != PHASOR_CODES_NONE;
    if wide && (codes.round_first == 1 || work.elements_at(work.heads.start).is_some()) {
        return false;
    }
    let (rs, normed) = match work.head_dim / (2 * V::LANES) {
        1 => loops::<L, V, T, FROM_HALVES, TO_HALVES, 1>(wide),
        2 => loops::<L, V, T, FROM_HALVES, TO_HALVES, 2>(wide),
        4 => loops::<L, V, T, FROM_HALVES, TO_HALVES, 4>(wide),
        8 => loops::<L, V, T, FROM_HALVES, TO_HALVES, 8>(wide),
        _ => return false,
    };
    let rounds = norm.round_before_weight == 1 || norm.round_after == 1;
    let elements = room.elements.as_mut_ptr();
    // Where heads have no place of their own, they stop in the room one by one.
    let (to, most, done) = match work.places() {
        _ if wide => {
            let row = room.rows[0].as_mut_ptr().expose_provenance();
            (HeadsAt::one(row), TOGETHER, true)
        }
        Some(places) => {
            let done = work.cache.is_none() || work.destination.is_none();
            (places, TOGETHER, done)
        }
        None => (HeadsAt::one(elements.expose_provenance()), 1, false),
    };
    let mut first = work.heads.start;
    while first < work.heads.end {
        let mut heads = Normed {
            work,
            to,
            first,
            rs: [0.0; TOGETHER],
            codes: elements.cast(),
        };
        let end = work.heads.end.min(first + most);
        // SAFETY: the caller's, for all below.
        unsafe {
            rs(&mut heads, first..end);
            let mut next = first;
            if !rounds {
                next = normed[0](&heads, next..end);
            }
            if next < end {
                normed[1](&heads, next..end);
            }
            for head in (first..end).filter(|_| !done) {
                work.store_elements(head, with_exposed_provenance::<T>(to.head(head)));
            }
        }
        first = end;
    }
    true
}

/// [`rs`], and [`normed`] without care and with it.
type NormLoops = (
    unsafe fn(&mut Normed<'_>, Range<usize>),
    [unsafe fn(&Normed<'_>, Range<usize>) -> usize; 2],
);

fn loops<L, V, T, const FROM_HALVES: bool, const TO_HALVES: bool, const COUNT: usize>(
    wide: bool,
) -> NormLoops
where
    L: Loops,
    V: PairVectors<T>,
    T: Rows,
{
    let normed: [unsafe fn(&Normed<'_>, Range<usize>) -> usize; 2] = match wide {
        false => [
            L::normed::<V, T, FROM_HALVES, TO_HALVES, COUNT, false, false>,
            L::normed::<V, T, FROM_HALVES, TO_HALVES, COUNT, false, true>,
        ],
        true => [
            L::normed::<V, T, FROM_HALVES, TO_HALVES, COUNT, true, false>,
            L::normed::<V, T, FROM_HALVES, TO_HALVES, COUNT, true, true>,
        ],
    };
    (L::rs::<V, T, COUNT>, normed)
}

/// Heads that [`straight`] has.
pub struct Normed<'a> {
    work: &'a TokenWork<'a>,
    /// Where they are written, each in one piece.
    to: HeadsAt,
    /// What they are multiplied by, from the head `first` on.
    first: usize,
    rs: [f32; TOGETHER],
    /// Room for the codes of one.
    codes: *mut u8,
}

impl Normed<'_> {
    #[inline(always)]
    fn source<T>(&self, head: usize) -> *const T {
        with_exposed_provenance(self.work.source.head(head))
    }
}

/// Vectors in which roots are found.
type Roots<V, T> = <<V as PairVectors<T>>::Rest as PairVectors<T>>::Vector;

/// Finds what heads of `COUNT` groups are multiplied by. Sums wait for themselves, and so do roots: first the
/// sums of all, then roots of many at a time.
///
/// # Safety
/// That of [`enter`]; the heads begin with `first`, and are no more than [`TOGETHER`].
#[inline(always)]
pub(super) unsafe fn rs<V, T, const COUNT: usize>(normed: &mut Normed<'_>, heads: Range<usize>)
where
    V: PairVectors<T>,
{
    let mut first = heads.start;
    // SAFETY: the caller's, for all below.
    unsafe {
        let mut at = 0;
        while first < heads.end {
            let second = (first + 1).min(heads.end - 1);
            let (a, b) = (normed.source(first), normed.source(second));
            let sums = normed.rs.as_mut_ptr().add(at).cast::<[f32; 2]>();
            if !two_sums::<V, T, COUNT, false>(a, b, sums) {
                two_sums::<V, T, COUNT, true>(a, b, sums);
            }
            (first, at) = (first + 2, at + 2);
        }
        // A power of two, so that this is exact.
        let over = Roots::<V, T>::splat(1.0 / (2 * COUNT * V::LANES) as f32);
        let eps = Roots::<V, T>::splat(normed.work.stages.norm.eps);
        let mut at = 0;
        while at < heads.len() {
            let sums = Roots::<V, T>::load(normed.rs.as_ptr().add(at));
            let roots = sums.reciprocal_root(over, eps);
            roots.store(normed.rs.as_mut_ptr().add(at));
            at += Roots::<V, T>::LANES;
        }
    }
}

/// Norms and rotates heads of `COUNT` groups, to elements, or to f32 and then to codes if `WIDE`. Returns the
/// first head that has a value which needs care and was not written, or the end: always that with `CARE`,
/// which norms that round to elements need for all heads.
///
/// A function of its own, so that weights and factors stay in registers, as far as there are enough; without
/// `CARE` it calls nothing that they would have to outlast.
///
/// # Safety
/// That of [`enter`]; [`rs`] found what the heads are multiplied by.
#[inline(always)]
pub(super) unsafe fn normed<
    L,
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
    L: Loops,
    V: PairVectors<T>,
    T: Rows,
{
    let work = normed.work;
    let params = &work.stages.norm;
    let Some(turns) = &work.turns else {
        return heads.start;
    };
    let pairs = COUNT * V::LANES;
    // SAFETY: the caller's, for all below.
    unsafe {
        let cos = vectors::<V::Vector, COUNT>(turns.cos.as_ptr());
        let sin = vectors::<V::Vector, COUNT>(turns.sin.as_ptr());
        let weight = with_exposed_provenance::<T>(params.weight as usize);
        let mut weights = [(cos[0], cos[0]); COUNT];
        let mut i = 0;
        while i < COUNT {
            let (a, b) = vector::members::<FROM_HALVES>(i * V::LANES, pairs);
            let weight = vector::load::<V, T, FROM_HALVES>([weight.add(a), weight.add(b)]);
            weights[i] = plus(weight, params.weight_offset);
            i += 1;
        }
        for head in heads.clone() {
            let from = normed.source::<T>(head);
            let norm = Norm {
                mean: None,
                r: V::Vector::splat(normed.rs[head - normed.first]),
                round_before_weight: CARE && params.round_before_weight == 1,
                round_after: CARE && params.round_after == 1,
            };
            let mut members = [(norm.r, norm.r); COUNT];
            let mut i = 0;
            while i < COUNT {
                let (a, b) = vector::members::<FROM_HALVES>(i * V::LANES, pairs);
                let x = vector::load::<V, T, FROM_HALVES>([from.add(a), from.add(b)]);
                let x = norm.apply::<V, T>(x, Some(weights[i]), None);
                members[i] = vector::rotate(x, cos[i], sin[i]);
                i += 1;
            }
            if !WIDE {
                let to = with_exposed_provenance_mut::<T>(normed.to.head(head));
                let stored = V::store_head::<COUNT, TO_HALVES>(to, members);
                if !stored && !CARE {
                    return head;
                }
                if !stored {
                    vector::store_all::<V, T, COUNT, TO_HALVES>(to, members);
                }
                continue;
            }
            let to = with_exposed_provenance_mut::<u8>(normed.to.head(head));
            let mut i = 0;
            while i < COUNT {
                let (a, b) = vector::members::<TO_HALVES>(i * V::LANES, pairs);
                put::<V, T, TO_HALVES, true>(to, [a, b], members[i]);
                i += 1;
            }
            let row = std::slice::from_raw_parts(to.cast_const().cast::<f32>(), 2 * pairs);
            L::store_codes(work, head, row, normed.codes);
        }
    }
    heads.end
}

/// The sums of squares of two heads of `COUNT` groups. Returns false where they may be others than those of
/// `EXACT` squares.
#[inline(always)]
unsafe fn two_sums<V: PairVectors<T>, T, const COUNT: usize, const EXACT: bool>(
    first: *const T,
    second: *const T,
    to: *mut [f32; 2],
) -> bool {
    // SAFETY: the caller's, for all below.
    unsafe {
        let mut groups = [V::Vector::splat(0.0); COUNT];
        let mut i = 0;
        while i < COUNT {
            let at = 2 * i * V::LANES;
            let [a, b] = match EXACT {
                false => [V::squares(first.add(at)), V::squares(second.add(at))],
                true => [
                    vector::squares::<V, T>(first.add(at)),
                    vector::squares::<V, T>(second.add(at)),
                ],
            };
            groups[i] = a.add_neighbours(b);
            i += 1;
        }
        if !EXACT && V::may_lack(&groups) {
            return false;
        }
        let mut left = COUNT;
        while left > 1 {
            left /= 2;
            let mut i = 0;
            while i < left {
                groups[i] = groups[i].add(groups[i + left]);
                i += 1;
            }
        }
        groups[0].fold_both(to);
    }
    true
}

/// # Safety
/// That of [`enter`].
#[inline(always)]
pub(super) unsafe fn heads<
    L,
    V,
    T,
    const FROM_HALVES: bool,
    const TO_HALVES: bool,
    const LEAN: bool,
>(
    work: &TokenWork<'_>,
    room: &mut Room<T>,
) where
    L: Loops,
    V: PairVectors<T>,
    T: Rows,
{
    let norm = &work.stages.norm;
    let normed = norm.kind != PHASOR_NORM_NONE;
    let [row, weight, bias] = room.rows.each_mut().map(|row| row.as_mut_ptr().cast());
    let walk = Walk::<L, V, T, FROM_HALVES, TO_HALVES, LEAN> {
        work,
        dims: work.head_dim,
        window: match &work.turns {
            None => work.head_dim..work.head_dim,
            Some(turns) => turns.offset..turns.offset + 2 * turns.cos.len(),
        },
        row,
        elements: room.elements.as_mut_ptr().cast(),
        weight,
        bias,
        set: PhantomData,
    };
    let across = normed && norm.across_heads == 1;
    let all = work.heads.clone();
    if normed {
        // SAFETY: the caller's.
        unsafe { walk.prepare(all.start, true) };
    }
    let mut found = [Statistic { mean: 0.0, r: 1.0 }; TOGETHER];
    let mut first = all.start;
    while first < all.end {
        let together = first..all.end.min(first + TOGETHER);
        if normed && !across {
            // SAFETY: the caller's.
            unsafe { walk.statistics(together.clone(), &mut found) };
        } else if across && first == all.start {
            // SAFETY: the caller's.
            found = [unsafe { walk.statistic_across(&mut room.heads) }; TOGETHER];
        }
        for (head, found) in together.clone().zip(found) {
            // SAFETY: the caller's.
            unsafe {
                if normed && !LEAN {
                    walk.prepare(head, false);
                }
                walk.head(head, found);
            }
        }
        first = together.end;
    }
}

/// A token's heads, and room for one.
struct Walk<'a, L, V, T, const FROM_HALVES: bool, const TO_HALVES: bool, const LEAN: bool> {
    work: &'a TokenWork<'a>,
    dims: usize,
    /// The dims that rotate.
    window: Range<usize>,
    row: *mut f32,
    elements: *mut T,
    /// Of the norm, with first members of all pairs before second ones where they meet those.
    weight: *mut f32,
    bias: *mut f32,
    set: PhantomData<(L, V)>,
}

/// Two vectors of a head: as many pairs, or consecutive dims that do not rotate.
struct Group {
    /// The first of the pairs.
    pair: Option<usize>,
    /// Where both begin: in the source, in the destination, in prepared rows.
    from: [usize; 2],
    to: [usize; 2],
    prepared: [usize; 2],
}

/// A norm of one head.
struct Norm<F> {
    mean: Option<F>,
    r: F,
    round_before_weight: bool,
    round_after: bool,
}

impl<L, V, T, const FROM_HALVES: bool, const TO_HALVES: bool, const LEAN: bool>
    Walk<'_, L, V, T, FROM_HALVES, TO_HALVES, LEAN>
where
    L: Loops,
    V: PairVectors<T>,
    T: Rows,
{
    /// Dims of a group.
    const GROUP: usize = 2 * V::LANES;

    #[inline(always)]
    fn straight(at: usize) -> Group {
        let both = [at, at + V::LANES];
        Group {
            pair: None,
            from: both,
            to: both,
            prepared: both,
        }
    }

    #[inline(always)]
    fn after_rotation(&self) -> bool {
        !LEAN && self.work.stages.norm.after_rotation == 1
    }

    /// The group that begins with dim `at`, if all are counted up to it.
    #[inline(always)]
    fn group(&self, at: usize) -> Group {
        if !self.window.contains(&at) {
            return Self::straight(at);
        }
        let offset = self.window.start;
        let (pair, pairs) = ((at - offset) / 2, self.window.len() / 2);
        let begins = |(a, b): (usize, usize)| [offset + a, offset + b];
        Group {
            pair: Some(pair),
            from: begins(vector::members::<FROM_HALVES>(pair, pairs)),
            to: begins(vector::members::<TO_HALVES>(pair, pairs)),
            prepared: begins(vector::members::<true>(pair, pairs)),
        }
    }

    /// The elements of a group.
    #[inline(always)]
    unsafe fn load(&self, from: *const T, group: &Group) -> (V::Vector, V::Vector) {
        // SAFETY: the caller's.
        unsafe {
            let both = [from.add(group.from[0]), from.add(group.from[1])];
            match group.pair {
                Some(_) if !FROM_HALVES => vector::load::<V, T, false>(both),
                _ => vector::load::<V, T, true>(both),
            }
        }
    }

    /// Makes rows of what the norm has for all heads (`shared`), or for this one.
    #[inline(always)]
    unsafe fn prepare(&self, head: usize, shared: bool) {
        let norm = &self.work.stages.norm;
        // SAFETY: the caller's: weights and biases are where the norm says.
        unsafe {
            if norm.weight != 0 && (norm.weight_head == 0) == shared {
                let weight = at_head(norm.weight, norm.weight_head, head);
                self.prepare_row(weight, norm.weight_offset, self.weight);
            }
            if norm.bias != 0 && (norm.bias_head == 0) == shared {
                let bias = at_head(norm.bias, norm.bias_head, head);
                self.prepare_row(bias, 0.0, self.bias);
            }
        }
    }

    #[inline(always)]
    unsafe fn prepare_row(&self, from: usize, offset: f32, to: *mut f32) {
        let from = with_exposed_provenance::<T>(from);
        // SAFETY: the caller's, for all of the loop.
        unsafe {
            let mut at = 0;
            while at < self.dims {
                let group = match self.after_rotation() {
                    true => Self::straight(at),
                    false => self.group(at),
                };
                let (a, b) = plus(self.load(from, &group), offset);
                a.store(to.add(group.prepared[0]));
                b.store(to.add(group.prepared[1]));
                at += Self::GROUP;
            }
        }
    }

    /// The dims of a head, and their bias if they have one.
    #[inline(always)]
    fn source(&self, head: usize) -> (*const T, *const T) {
        let bias = match self.work.stages.bias {
            _ if LEAN => null(),
            0 => null(),
            bias => with_exposed_provenance(at_head(bias, self.work.stages.bias_head, head)),
        };
        (with_exposed_provenance(self.work.source.head(head)), bias)
    }

    /// What a norm finds of each of up to [`TOGETHER`] heads.
    #[inline(always)]
    unsafe fn statistics(&self, heads: Range<usize>, found: &mut [Statistic; TOGETHER]) {
        let norm = &self.work.stages.norm;
        let count = self.dims as f32;
        // One place for both sums, as one is a lot of code.
        for squares in [false, true] {
            if !squares && (LEAN || norm.kind != PHASOR_NORM_LAYER) {
                continue;
            }
            for (head, found) in heads.clone().zip(&mut *found) {
                let sum = match squares {
                    false => Sum::Plain,
                    true => Sum::Squares(found.mean),
                };
                // SAFETY: the caller's.
                let sum = unsafe { self.sum(head, sum) };
                match squares {
                    false => found.mean = sum / count,
                    true => *found = Statistic::of(norm, found.mean, sum, count),
                }
            }
        }
    }

    /// What a norm finds of all heads. `sums` has room for theirs.
    #[inline(always)]
    unsafe fn statistic_across(&self, sums: &mut [f32]) -> Statistic {
        let (norm, heads) = (&self.work.stages.norm, self.work.heads.clone());
        let count = (heads.len() * self.dims) as f32;
        let sums = &mut sums[..heads.len().next_power_of_two()];
        let mut found = Statistic::default();
        for squares in [false, true] {
            if !squares && norm.kind != PHASOR_NORM_LAYER {
                continue;
            }
            for (head, of_head) in heads.clone().zip(&mut *sums) {
                let sum = match squares {
                    false => Sum::Plain,
                    true => Sum::Squares(found.mean),
                };
                // SAFETY: the caller's.
                *of_head = unsafe { self.sum(head, sum) };
            }
            sums[heads.len()..].fill(0.0);
            let sum = fold(sums);
            match squares {
                false => found.mean = sum / count,
                true => found = Statistic::of(norm, found.mean, sum, count),
            }
        }
        found
    }

    /// The sum of one head.
    #[inline(always)]
    unsafe fn sum(&self, head: usize, sum: Sum) -> f32 {
        // SAFETY: the caller's, for all below.
        unsafe {
            if self.after_rotation() {
                self.pass::<true>(head, None, 1.0, self.row.cast());
            }
            let count = self.dims / Self::GROUP;
            // In registers where that is known and there are few.
            let [sum, _] = match count {
                1 => self.sums::<1>(1, [head; 2], sum),
                2 => self.sums::<2>(2, [head; 2], sum),
                4 => self.sums::<4>(4, [head; 2], sum),
                8 => self.sums::<8>(8, [head; 2], sum),
                _ => self.sums::<MOST_VECTORS>(count, [head; 2], sum),
            };
            sum
        }
    }

    /// The sums of two heads, in `count` groups, for which there is room. Members of pairs meet first, then
    /// neighbours, then vectors in halves, then the halves of one: the defined order, but that all of it
    /// is vertical up to there.
    #[inline(always)]
    unsafe fn sums<const ROOM: usize>(
        &self,
        count: usize,
        heads: [usize; 2],
        sum: Sum,
    ) -> [f32; 2] {
        let mut groups = [const { MaybeUninit::<V::Vector>::uninit() }; ROOM];
        // SAFETY: the caller's, for all below; groups have a value when they are read.
        unsafe {
            let mut i = 0;
            while i < count {
                let first = self.sums_of_pairs(heads[0], i * Self::GROUP, sum);
                let second = match heads[0] == heads[1] {
                    true => first,
                    false => self.sums_of_pairs(heads[1], i * Self::GROUP, sum),
                };
                groups[i].write(first.add_neighbours(second));
                i += 1;
            }
            let mut left = count.next_power_of_two();
            while i < left {
                groups[i].write(V::Vector::splat(0.0));
                i += 1;
            }
            while left > 1 {
                left /= 2;
                let mut i = 0;
                while i < left {
                    let upper = groups[i + left].assume_init();
                    groups[i].write(groups[i].assume_init().add(upper));
                    i += 1;
                }
            }
            let mut both = [0.0; 2];
            groups[0].assume_init().fold_both(&mut both);
            both
        }
    }

    /// What is summed of each pair of a group.
    #[inline(always)]
    unsafe fn sums_of_pairs(&self, head: usize, at: usize, sum: Sum) -> V::Vector {
        // SAFETY: the caller's, for all below.
        unsafe {
            let (mut a, mut b);
            if self.after_rotation() {
                let (first, second) = self.load_row(at);
                (a, b) = V::Vector::deinterleave([first, second]);
            } else {
                let (from, bias) = self.source(head);
                (a, b) = V::load_adjacent(from.add(at));
                if !bias.is_null() {
                    let bias = V::load_adjacent(bias.add(at));
                    (a, b) = (a.add(bias.0), b.add(bias.1));
                }
            }
            match sum {
                Sum::Plain => a.add(b),
                Sum::Squares(_) if LEAN => b.mul_add(b, a.mul(a)),
                Sum::Squares(mean) => {
                    let mean = V::Vector::splat(mean);
                    let (a, b) = (a.sub(mean), b.sub(mean));
                    b.mul_add(b, a.mul(a))
                }
            }
        }
    }

    /// All stages of a head.
    #[inline(always)]
    unsafe fn head(&self, head: usize, found: Statistic) {
        let work = self.work;
        let coded = work.stages.codes.type_ != PHASOR_CODES_NONE;
        let params = &work.stages.norm;
        // SAFETY: the caller's, for all below.
        unsafe {
            let mut norm = None;
            if params.kind != PHASOR_NORM_NONE {
                norm = Some(Norm {
                    mean: match params.kind {
                        PHASOR_NORM_LAYER if !LEAN => Some(V::Vector::splat(found.mean)),
                        _ => None,
                    },
                    r: V::Vector::splat(found.r),
                    round_before_weight: params.round_before_weight == 1,
                    round_after: params.round_after == 1,
                });
            }
            let norm = norm.as_ref();
            let after_rotation = self.after_rotation();
            let place = work.place(head);
            let to = match place {
                Some(place) if !coded => with_exposed_provenance_mut(place),
                _ => self.elements,
            };
            let (now, scale) = match after_rotation {
                true => (None, 1.0),
                false => (norm, work.scale),
            };
            if coded || after_rotation {
                self.pass::<true>(head, now, scale, self.row.cast());
            } else {
                self.pass::<false>(head, now, scale, to.cast());
            }
            if after_rotation {
                match coded {
                    true => self.pass_row::<true>(norm, work.scale, self.row.cast()),
                    false => self.pass_row::<false>(norm, work.scale, to.cast()),
                }
            }
            if !coded {
                work.store_elements(head, to);
                return;
            }
            let rounds = work.stages.codes.round_first == 1;
            if rounds || work.elements_at(head).is_some() {
                self.pass_row::<false>(None, 1.0, to.cast());
                work.store_elements(head, to);
            }
            if rounds {
                let mut at = 0;
                while at < self.dims {
                    let (a, b) = V::load_halves(to.add(at), to.add(at + V::LANES));
                    a.store(self.row.add(at));
                    b.store(self.row.add(at + V::LANES));
                    at += Self::GROUP;
                }
            }
            let row = std::slice::from_raw_parts(self.row, self.dims);
            L::store_codes(work, head, row, self.elements.cast());
        }
    }

    /// From the source of a head to elements, or to f32 if `WIDE`: its bias, norm, rotation and scale.
    #[inline(always)]
    unsafe fn pass<const WIDE: bool>(
        &self,
        head: usize,
        norm: Option<&Norm<V::Vector>>,
        scale: f32,
        to: *mut u8,
    ) {
        let (from, bias) = self.source(head);
        // SAFETY: the caller's, for all of the loop.
        unsafe {
            let mut at = 0;
            while at < self.dims {
                let group = self.group(at);
                let mut x = self.load(from, &group);
                if !bias.is_null() {
                    let bias = self.load(bias, &group);
                    x = (x.0.add(bias.0), x.1.add(bias.1));
                }
                if let Some(norm) = norm {
                    let [weight, bias] = self.prepared(group.prepared);
                    x = norm.apply::<V, T>(x, weight, bias);
                }
                if let (Some(pair), Some(turns)) = (group.pair, &self.work.turns) {
                    let cos = V::Vector::load(turns.cos.as_ptr().add(pair));
                    let sin = V::Vector::load(turns.sin.as_ptr().add(pair));
                    x = vector::rotate(x, cos, sin);
                }
                if !LEAN {
                    x = scaled(x, scale);
                }
                if group.pair.is_some() {
                    put::<V, T, TO_HALVES, WIDE>(to, group.to, x);
                } else {
                    put::<V, T, true, WIDE>(to, group.to, x);
                }
                at += Self::GROUP;
            }
        }
    }

    /// The norm's weight and bias of a group, if it has them.
    #[inline(always)]
    unsafe fn prepared(&self, at: [usize; 2]) -> [Option<(V::Vector, V::Vector)>; 2] {
        let norm = &self.work.stages.norm;
        // SAFETY: the caller's: rows have been prepared.
        unsafe {
            [
                match norm.weight {
                    0 if !LEAN => None,
                    _ => Some(Self::load_both(self.weight, at)),
                },
                match norm.bias {
                    _ if LEAN => None,
                    0 => None,
                    _ => Some(Self::load_both(self.bias, at)),
                },
            ]
        }
    }

    #[inline(always)]
    unsafe fn load_both(row: *const f32, [a, b]: [usize; 2]) -> (V::Vector, V::Vector) {
        // SAFETY: the caller's.
        unsafe { (V::Vector::load(row.add(a)), V::Vector::load(row.add(b))) }
    }

    /// Consecutive dims of the row.
    #[inline(always)]
    unsafe fn load_row(&self, at: usize) -> (V::Vector, V::Vector) {
        // SAFETY: the caller's.
        unsafe { Self::load_both(self.row, [at, at + V::LANES]) }
    }

    /// [`pass`](Self::pass) from the row, without a rotation.
    #[inline(always)]
    unsafe fn pass_row<const WIDE: bool>(
        &self,
        norm: Option<&Norm<V::Vector>>,
        scale: f32,
        to: *mut u8,
    ) {
        // SAFETY: the caller's, for all of the loop.
        unsafe {
            let mut at = 0;
            while at < self.dims {
                let mut x = self.load_row(at);
                let both = [at, at + V::LANES];
                if let Some(norm) = norm {
                    let [weight, bias] = self.prepared(both);
                    x = norm.apply::<V, T>(x, weight, bias);
                }
                put::<V, T, true, WIDE>(to, both, scaled(x, scale));
                at += Self::GROUP;
            }
        }
    }
}

/// Consecutive vectors.
#[inline(always)]
unsafe fn vectors<F: Float, const COUNT: usize>(first: *const f32) -> [F; COUNT] {
    // SAFETY: the caller's, for all of the loop.
    unsafe {
        let mut vectors = [F::load(first); COUNT];
        let mut i = 1;
        while i < COUNT {
            vectors[i] = F::load(first.add(i * F::LANES));
            i += 1;
        }
        vectors
    }
}

impl<F: Float> Norm<F> {
    #[inline(always)]
    unsafe fn apply<V, T>(
        &self,
        (mut a, mut b): (F, F),
        weight: Option<(F, F)>,
        bias: Option<(F, F)>,
    ) -> (F, F)
    where
        V: PairVectors<T, Vector = F>,
    {
        // SAFETY: the caller's.
        unsafe {
            if let Some(mean) = self.mean {
                (a, b) = (a.sub(mean), b.sub(mean));
            }
            (a, b) = (a.mul(self.r), b.mul(self.r));
            if self.round_before_weight {
                (a, b) = rounded::<V, T>((a, b));
            }
            if let Some((of_a, of_b)) = weight {
                (a, b) = (a.mul(of_a), b.mul(of_b));
            }
            if let Some((of_a, of_b)) = bias {
                (a, b) = (a.add(of_a), b.add(of_b));
            }
            if self.round_after {
                (a, b) = rounded::<V, T>((a, b));
            }
            (a, b)
        }
    }
}

#[inline(always)]
unsafe fn plus<F: Float>((a, b): (F, F), offset: f32) -> (F, F) {
    if offset == 0.0 {
        return (a, b);
    }
    // SAFETY: the caller's.
    unsafe {
        let offset = F::splat(offset);
        (a.add(offset), b.add(offset))
    }
}

#[inline(always)]
unsafe fn scaled<F: Float>((a, b): (F, F), by: f32) -> (F, F) {
    if by == 1.0 {
        return (a, b);
    }
    // SAFETY: the caller's.
    unsafe {
        let by = F::splat(by);
        (a.mul(by), b.mul(by))
    }
}

/// Rounded to the element type.
#[inline(always)]
unsafe fn rounded<V: PairVectors<T>, T>(x: (V::Vector, V::Vector)) -> (V::Vector, V::Vector) {
    // The compiler sees through this room.
    let mut room = [const { MaybeUninit::<T>::uninit() }; 2 * MOST_LANES];
    // SAFETY: the caller's; there is room for two vectors of elements.
    unsafe {
        let a = room.as_mut_ptr().cast::<T>();
        let b = a.add(V::LANES);
        V::store_halves::<0>(a, b, x);
        V::load_halves(a, b)
    }
}

/// Writes two vectors to elements, or to f32 if `WIDE`.
#[inline(always)]
unsafe fn put<V: PairVectors<T>, T, const HALVES: bool, const WIDE: bool>(
    to: *mut u8,
    [at_a, at_b]: [usize; 2],
    (a, b): (V::Vector, V::Vector),
) {
    // SAFETY: the caller's.
    unsafe {
        if !WIDE {
            let to = to.cast::<T>();
            vector::store::<V, T, HALVES, 0>([to.add(at_a), to.add(at_b)], (a, b));
            return;
        }
        let to = to.cast::<f32>();
        if HALVES {
            a.store(to.add(at_a));
            b.store(to.add(at_b));
        } else {
            let [first, second] = a.interleave(b);
            first.store(to.add(at_a));
            second.store(to.add(at_a + V::LANES));
        }
    }
}
