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

use super::stages::{Room, Rows, Statistic, Sum, TokenWork, Turns, USUAL_DIMS, at_head, fold};
use super::run::FEWEST_LANES;
use super::vector::{self, Float, Loops, MOST_LANES, PairVectors};
use crate::call::{PHASOR_CODES_NONE, PHASOR_NORM_LAYER, PHASOR_NORM_NONE, PHASOR_NORM_RMS};
use crate::rope::Pairing::{HalfSplit, Interleaved};
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::ptr::{null, with_exposed_provenance, with_exposed_provenance_mut};

/// Heads whose sums are found before the first of them is normed: roots and divisions of as many are
/// vectors too.
const TOGETHER: usize = 16;

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
    let other = norm.bias != 0
        || norm.after_rotation == 1
        || norm.round_before_weight == 1
        || norm.round_after == 1;
    stages.bias == 0 && work.scale == 1.0 && (norm.kind == PHASOR_NORM_NONE || weighted && !other)
}

/// # Safety
/// That of [`perform`]; all rows are whole vectors.
unsafe fn enter<L: Loops, V: PairVectors<T>, T: Rows>(work: &TokenWork<'_>, room: &mut Room<T>) {
    let pairings = match &work.turns {
        None => (HalfSplit, HalfSplit),
        Some(turns) => (turns.pairings.source, turns.pairings.destination),
    };
    let heads = match (pairings, is_lean(work)) {
        ((HalfSplit, HalfSplit), true) => L::stages::<V, T, true, true, true>,
        ((HalfSplit, HalfSplit), false) => L::stages::<V, T, true, true, false>,
        ((Interleaved, Interleaved), true) => L::stages::<V, T, false, false, true>,
        ((Interleaved, Interleaved), false) => L::stages::<V, T, false, false, false>,
        ((HalfSplit, Interleaved), _) => L::stages::<V, T, true, false, false>,
        ((Interleaved, HalfSplit), _) => L::stages::<V, T, false, true, false>,
    };
    // SAFETY: the caller's.
    unsafe { heads(work, room) }
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
    let (mut means, mut rs) = ([0.0; TOGETHER], [1.0; TOGETHER]);
    let mut sums = [0.0; TOGETHER];
    let all = work.heads.clone();
    if normed {
        // SAFETY: the caller's.
        unsafe { walk.prepare(all.start, true) };
    }
    let mut first = all.start;
    while first < all.end {
        let together = first..all.end.min(first + TOGETHER);
        if normed && (!across || first == all.start) {
            // One place for both, as a sum is a lot of code.
            let heads = if across {
                all.clone()
            } else {
                together.clone()
            };
            for squares in [false, true] {
                if !squares && (LEAN || norm.kind != PHASOR_NORM_LAYER) {
                    continue;
                }
                for (at, head) in heads.clone().enumerate() {
                    let sum = match squares {
                        false => Sum::Plain,
                        true => Sum::Squares(means[at % TOGETHER]),
                    };
                    // SAFETY: the caller's.
                    let sum = unsafe { walk.sum(head, sum) };
                    match across {
                        true => room.heads[at] = sum,
                        false => sums[at] = sum,
                    }
                }
                let mut count = work.head_dim as f32;
                if across {
                    count = (heads.len() * work.head_dim) as f32;
                    let terms = &mut room.heads[..heads.len().next_power_of_two()];
                    terms[heads.len()..].fill(0.0);
                    sums = [fold(terms); TOGETHER];
                }
                for ((mean, r), sum) in means.iter_mut().zip(&mut rs).zip(&sums) {
                    match squares {
                        false => *mean = sum / count,
                        true => *r = Statistic::of(norm, *mean, *sum, count).r,
                    }
                }
            }
        }
        for (head, (mean, r)) in together.clone().zip(means.into_iter().zip(rs)) {
            // SAFETY: the caller's.
            unsafe {
                if normed && !LEAN {
                    walk.prepare(head, false);
                }
                walk.head(head, mean, r);
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
    /// Null where there is none.
    weight: *const f32,
    bias: *const f32,
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
                let (mut a, mut b) = self.load(from, &group);
                if offset != 0.0 {
                    let offset = V::Vector::splat(offset);
                    (a, b) = (a.add(offset), b.add(offset));
                }
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

    /// The sum of one head. Members of pairs meet first, then neighbours, then vectors in halves, then the
    /// halves of one: the defined order, but that all of it is vertical up to there.
    #[inline(always)]
    unsafe fn sum(&self, head: usize, sum: Sum) -> f32 {
        let after_rotation = self.after_rotation();
        let (from, bias) = self.source(head);
        // SAFETY: the caller's, for all below.
        unsafe {
            if after_rotation {
                self.pass::<true>(head, None, 1.0, self.row.cast());
            }
            let count = self.dims / Self::GROUP;
            // In registers where that is known and there are few.
            match count {
                1 => self.sum_groups::<1>(1, [from, bias], sum),
                2 => self.sum_groups::<2>(2, [from, bias], sum),
                4 => self.sum_groups::<4>(4, [from, bias], sum),
                8 => self.sum_groups::<8>(8, [from, bias], sum),
                _ => self.sum_groups::<MOST_VECTORS>(count, [from, bias], sum),
            }
        }
    }

    /// The sum of `count` groups, for which there is room.
    #[inline(always)]
    unsafe fn sum_groups<const ROOM: usize>(
        &self,
        count: usize,
        [from, bias]: [*const T; 2],
        sum: Sum,
    ) -> f32 {
        let after_rotation = self.after_rotation();
        let mut groups = [const { MaybeUninit::<V::Vector>::uninit() }; ROOM];
        // SAFETY: the caller's, for all below; groups have a value when they are read.
        unsafe {
            let mut i = 0;
            while i < count {
                let at = i * Self::GROUP;
                let (mut a, mut b) = if after_rotation {
                    let (first, second) = self.load_row(at);
                    V::Vector::deinterleave([first, second])
                } else {
                    V::load_adjacent(from.add(at))
                };
                if !after_rotation && !bias.is_null() {
                    let bias = V::load_adjacent(bias.add(at));
                    (a, b) = (a.add(bias.0), b.add(bias.1));
                }
                let pairs = match sum {
                    Sum::Plain => a.add(b),
                    Sum::Squares(_) if LEAN => b.mul_add(b, a.mul(a)),
                    Sum::Squares(mean) => {
                        let mean = V::Vector::splat(mean);
                        let (a, b) = (a.sub(mean), b.sub(mean));
                        b.mul_add(b, a.mul(a))
                    }
                };
                groups[i].write(pairs.add_neighbours());
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
            groups[0].assume_init().fold_to_neighbours()
        }
    }

    /// All stages of a head.
    #[inline(always)]
    unsafe fn head(&self, head: usize, mean: f32, r: f32) {
        let work = self.work;
        let coded = work.stages.codes.type_ != PHASOR_CODES_NONE;
        let params = &work.stages.norm;
        let row_or_null = |row: *mut f32, address| match address {
            0 => null(),
            _ => row.cast_const(),
        };
        // SAFETY: the caller's, for all below.
        unsafe {
            let mut norm = None;
            if params.kind != PHASOR_NORM_NONE {
                norm = Some(Norm {
                    mean: match params.kind {
                        PHASOR_NORM_LAYER if !LEAN => Some(V::Vector::splat(mean)),
                        _ => None,
                    },
                    r: V::Vector::splat(r),
                    weight: match LEAN {
                        true => self.weight,
                        false => row_or_null(self.weight, params.weight),
                    },
                    bias: row_or_null(self.bias, if LEAN { 0 } else { params.bias }),
                    round_before_weight: !LEAN && params.round_before_weight == 1,
                    round_after: !LEAN && params.round_after == 1,
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
                    x = norm.apply::<V, T, LEAN>(x, group.prepared);
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

    /// Consecutive dims of the row.
    #[inline(always)]
    unsafe fn load_row(&self, at: usize) -> (V::Vector, V::Vector) {
        // SAFETY: the caller's.
        unsafe {
            (
                V::Vector::load(self.row.add(at)),
                V::Vector::load(self.row.add(at + V::LANES)),
            )
        }
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
                    x = norm.apply::<V, T, false>(x, both);
                }
                put::<V, T, true, WIDE>(to, both, scaled(x, scale));
                at += Self::GROUP;
            }
        }
    }
}

impl<F: Float> Norm<F> {
    #[inline(always)]
    unsafe fn apply<V, T, const LEAN: bool>(
        &self,
        (mut a, mut b): (F, F),
        prepared: [usize; 2],
    ) -> (F, F)
    where
        V: PairVectors<T, Vector = F>,
    {
        // SAFETY: the caller's: rows have been prepared.
        unsafe {
            if let Some(mean) = self.mean {
                (a, b) = (a.sub(mean), b.sub(mean));
            }
            (a, b) = (a.mul(self.r), b.mul(self.r));
            if self.round_before_weight {
                (a, b) = rounded::<V, T>((a, b));
            }
            let row = |row: *const f32| prepared.map(|at| row.wrapping_add(at));
            // A lean norm has one.
            if LEAN || !self.weight.is_null() {
                let [of_a, of_b] = row(self.weight);
                (a, b) = (a.mul(F::load(of_a)), b.mul(F::load(of_b)));
            }
            if !self.bias.is_null() {
                let [of_a, of_b] = row(self.bias);
                (a, b) = (a.add(F::load(of_a)), b.add(F::load(of_b)));
            }
            if self.round_after {
                (a, b) = rounded::<V, T>((a, b));
            }
            (a, b)
        }
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
