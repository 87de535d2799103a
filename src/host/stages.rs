//! Heads with more stages than a rotation, one at a time, as f32 from the first stage to the last: the
//! definition, in plain loops over dims that have no order but that of sums, which is defined too
//! (src/norm.rs). Heads that are not whole vectors are served by it on every instruction set, which
//! compiles it with its features enabled; others by `vector_stages.rs`, with the same bits.
//!
//! Codes, and where heads are stored, are the same for both.

use crate::call::{
    PHASOR_CODES_E4M3, PHASOR_CODES_INT8, PHASOR_CODES_NONE, PHASOR_NORM_LAYER, PHASOR_NORM_NONE,
    PHASOR_SCALE_POWER_OF_TWO_DOWN, PHASOR_SCALE_POWER_OF_TWO_UP, PhasorCache, PhasorNorm,
    PhasorStages,
};
use crate::element::Element;
use crate::quantize::{Codes, Factor, ScaleForm, ScaleRounding, amax, e8m0_from_scale, scale_of};
use crate::rope::{Pairing, Pairings};
use half::f16;
use half::slice::HalfFloatSliceExt;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::ptr::{with_exposed_provenance, with_exposed_provenance_mut};

/// Dims of a head that need no memory beyond the stack.
pub(super) const USUAL_DIMS: usize = 512;

/// How an element type is turned into f32 and back, many at a time.
pub(super) trait Rows: Element {
    /// Exactly.
    #[inline(always)]
    fn widen_row(from: &[Self], to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = from.widen();
        }
    }

    /// As [`Element::narrow`] does. May change what it is given.
    #[inline(always)]
    fn narrow_row(from: &mut [f32], to: &mut [Self]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = Self::narrow(*from);
        }
    }
}

impl Rows for f32 {}
impl Rows for half::bf16 {}
impl Rows for f16 {
    // By the processor's own conversion, where it has one.
    fn widen_row(from: &[f16], to: &mut [f32]) {
        from.convert_to_f32_slice(&mut to[..from.len()]);
    }

    fn narrow_row(from: &mut [f32], to: &mut [f16]) {
        for x in from.iter_mut() {
            *x = f32::narrow(*x);
        }
        to.convert_from_f32_slice(&from[..to.len()]);
    }
}

/// cos and sin of all pairs of a head.
#[derive(Clone, Copy)]
pub(super) struct Turns<'a> {
    pub(super) cos: &'a [f32],
    pub(super) sin: &'a [f32],
    pub(super) pairings: Pairings,
    /// First rotated dim.
    pub(super) offset: usize,
}

/// Heads in memory: that of the first of all heads, and bytes from one to the next.
#[derive(Clone, Copy)]
pub(super) struct HeadsAt {
    pub(super) first: usize,
    pub(super) stride: i64,
}

impl HeadsAt {
    /// One place for every head.
    #[inline(always)]
    pub(super) fn one(first: usize) -> Self {
        Self { first, stride: 0 }
    }

    #[inline(always)]
    pub(super) fn head(&self, head: usize) -> usize {
        at_head(self.first as u64, self.stride, head)
    }
}

/// The slot of a cache that a token has.
#[derive(Clone, Copy)]
pub(super) struct CacheSlot<'a> {
    pub(super) cache: &'a PhasorCache,
    pub(super) page: u32,
    pub(super) slot: u32,
}

/// What a norm found of the heads that it takes together.
#[derive(Clone, Copy, Default)]
pub(super) struct Statistic {
    pub(super) mean: f32,
    pub(super) r: f32,
}

/// The heads of one token and stream that a thread serves.
pub(super) struct TokenWork<'a> {
    pub(super) source: HeadsAt,
    pub(super) heads: Range<usize>,
    pub(super) head_dim: usize,
    pub(super) stages: &'a PhasorStages,
    /// Where it rotates.
    pub(super) turns: Option<Turns<'a>>,
    /// What heads are multiplied by.
    pub(super) scale: f32,
    pub(super) destination: Option<HeadsAt>,
    /// Whether codes are written there.
    pub(super) destination_is_codes: bool,
    pub(super) cache: Option<CacheSlot<'a>>,
}

/// Memory for one head: rows of f32, and elements on their way.
// Without values, which would take a tenth of the time that a token takes.
#[repr(C, align(64))]
pub(super) struct Room<T> {
    pub(super) rows: [[MaybeUninit<f32>; USUAL_DIMS]; 3],
    pub(super) elements: [MaybeUninit<T>; USUAL_DIMS],
    /// Of heads of more dims.
    more: Vec<f32>,
    more_elements: Vec<T>,
    /// Sums of heads, where a norm takes them together.
    pub(super) heads: Vec<f32>,
}

impl<T: Element> Room<T> {
    /// For heads of up to so many dims, and so many that a norm takes together.
    #[inline(always)]
    pub(super) fn new(dims: usize, heads: usize) -> Self {
        let (mut more, mut more_elements) = (Vec::new(), Vec::new());
        if dims > USUAL_DIMS {
            more.resize(3 * dims.next_power_of_two(), 0.0);
            more_elements.resize(dims, T::default());
        }
        Self {
            rows: [const { [MaybeUninit::uninit(); USUAL_DIMS] }; 3],
            elements: [MaybeUninit::uninit(); USUAL_DIMS],
            more,
            more_elements,
            heads: match heads {
                0 => Vec::new(),
                _ => vec![0.0; heads.next_power_of_two()],
            },
        }
    }

    /// What is read, what has been rotated, the groups of a sum; elements; sums of heads.
    #[inline(always)]
    fn of(&mut self, dims: usize) -> ([&mut [f32]; 3], &mut [T], &mut [f32]) {
        if dims <= USUAL_DIMS {
            let rows = self.rows.each_mut().map(|row| filled(row, 0.0));
            let elements = filled(&mut self.elements, T::default());
            return (rows, elements, &mut self.heads);
        }
        let third = self.more.len() / 3;
        let (x, rest) = self.more.split_at_mut(third);
        let (y, sums) = rest.split_at_mut(x.len());
        ([x, y, sums], &mut self.more_elements, &mut self.heads)
    }
}

fn filled<T: Copy, const N: usize>(room: &mut [MaybeUninit<T>; N], with: T) -> &mut [T] {
    *room = [MaybeUninit::new(with); N];
    // SAFETY: all of them have a value now.
    unsafe { &mut *(&raw mut *room).cast::<[T; N]>() }
}

/// The dims of a head at an address, in the element type.
///
/// # Safety
/// So many elements are there for as long as the slice is used.
unsafe fn row<'a, T>(address: usize, dims: usize) -> &'a [T] {
    // SAFETY: the caller's.
    unsafe { std::slice::from_raw_parts(with_exposed_provenance(address), dims) }
}

impl TokenWork<'_> {
    /// All stages of all heads.
    ///
    /// # Safety
    /// The addresses are those of the heads, of what their stages need and of where they are written;
    /// nothing else touches what is written. The room is for as many dims.
    #[inline(always)]
    pub(super) unsafe fn perform<T: Rows>(&self, room: &mut Room<T>) {
        let (rows, out, heads) = room.of(self.head_dim);
        let [x, y, sums] = rows;
        let norm = &self.stages.norm;
        let mut across = None;
        if norm.kind != PHASOR_NORM_NONE && norm.across_heads == 1 {
            // SAFETY: the caller's, here and below.
            across = Some(unsafe { self.across::<T>([x, y, sums], heads) });
        }
        for head in self.heads.clone() {
            unsafe { self.head::<T>(head, across, [x, y, sums], out) };
        }
    }

    /// Reads a head and adds its bias.
    ///
    /// # Safety
    /// That of [`perform`](Self::perform).
    #[inline(always)]
    unsafe fn load<T: Rows>(&self, head: usize, x: &mut [f32], other: &mut [f32]) {
        let dims = self.head_dim;
        // SAFETY: the caller's.
        T::widen_row(unsafe { row(self.source.head(head), dims) }, &mut x[..dims]);
        if self.stages.bias != 0 {
            let bias = at_head(self.stages.bias, self.stages.bias_head, head);
            // SAFETY: the caller's.
            T::widen_row(unsafe { row(bias, dims) }, &mut other[..dims]);
            for (x, bias) in x[..dims].iter_mut().zip(&*other) {
                *x += bias;
            }
        }
    }

    /// What a norm finds of all heads.
    ///
    /// # Safety
    /// That of [`perform`](Self::perform).
    #[inline(always)]
    unsafe fn across<T: Rows>(
        &self,
        [x, y, sums]: [&mut [f32]; 3],
        heads: &mut [f32],
    ) -> Statistic {
        let norm = &self.stages.norm;
        let count = (self.heads.len() * self.head_dim) as f32;
        let mut mean = 0.0;
        if norm.kind == PHASOR_NORM_LAYER {
            // SAFETY: the caller's, here and below.
            let sum = unsafe { self.sum_across::<T>(Sum::Plain, [x, y, sums], heads) };
            mean = sum / count;
        }
        let sum = unsafe { self.sum_across::<T>(Sum::Squares(mean), [x, y, sums], heads) };
        Statistic::of(norm, mean, sum, count)
    }

    /// The sum of all heads.
    ///
    /// # Safety
    /// That of [`perform`](Self::perform).
    #[inline(always)]
    unsafe fn sum_across<T: Rows>(
        &self,
        sum: Sum,
        [x, y, sums]: [&mut [f32]; 3],
        heads: &mut [f32],
    ) -> f32 {
        let after_rotation = self.stages.norm.after_rotation == 1;
        let (x, y) = (&mut x[..self.head_dim], &mut y[..self.head_dim]);
        let heads = &mut heads[..self.heads.len().next_power_of_two()];
        for (head, of_head) in self.heads.clone().zip(&mut *heads) {
            // SAFETY: the caller's.
            unsafe { self.load::<T>(head, x, y) };
            let mut summed = &*x;
            if after_rotation && let Some(turns) = &self.turns {
                turns.rotate(x, y);
                summed = y;
            }
            *of_head = sum_of_head(sum, summed, sums);
        }
        heads[self.heads.len()..].fill(0.0);
        fold(heads)
    }

    /// Norms a head, given what the norm found of it.
    ///
    /// # Safety
    /// Weights and biases are where the norm says.
    #[inline(always)]
    unsafe fn norm<T: Rows>(
        &self,
        head: usize,
        found: Statistic,
        x: &mut [f32],
        other: &mut [f32],
    ) {
        let norm = &self.stages.norm;
        let other = &mut other[..x.len()];
        for x in x.iter_mut() {
            *x = (*x - found.mean) * found.r;
        }
        if norm.round_before_weight == 1 {
            round::<T>(x);
        }
        if norm.weight != 0 {
            let weight = at_head(norm.weight, norm.weight_head, head);
            // SAFETY: the caller's.
            T::widen_row(unsafe { row(weight, x.len()) }, other);
            let offset = norm.weight_offset;
            if offset == 0.0 {
                for (x, weight) in x.iter_mut().zip(&*other) {
                    *x *= weight;
                }
            } else {
                for (x, weight) in x.iter_mut().zip(&*other) {
                    *x *= offset + weight;
                }
            }
        }
        if norm.bias != 0 {
            let bias = at_head(norm.bias, norm.bias_head, head);
            // SAFETY: the caller's.
            T::widen_row(unsafe { row(bias, x.len()) }, other);
            for (x, bias) in x.iter_mut().zip(&*other) {
                *x += bias;
            }
        }
        if norm.round_after == 1 {
            round::<T>(x);
        }
    }

    /// All stages of one head.
    ///
    /// # Safety
    /// That of [`perform`](Self::perform).
    #[inline(always)]
    unsafe fn head<T: Rows>(
        &self,
        head: usize,
        across: Option<Statistic>,
        [x, y, sums]: [&mut [f32]; 3],
        out: &mut [T],
    ) {
        let dims = self.head_dim;
        let (mut x, mut y) = (&mut x[..dims], &mut y[..dims]);
        let norm = &self.stages.norm;
        // SAFETY: the caller's, here and below.
        unsafe { self.load::<T>(head, x, y) };
        for rotated in [false, true] {
            if rotated && let Some(turns) = &self.turns {
                turns.rotate(x, y);
                (x, y) = (y, x);
            }
            if norm.kind != PHASOR_NORM_NONE && (norm.after_rotation == 1) == rotated {
                // No closure, which would be compiled without the features of the set.
                let found = match across {
                    Some(found) => found,
                    None => statistic_of(norm, x, sums),
                };
                unsafe { self.norm::<T>(head, found, x, y) };
            }
        }
        if self.scale != 1.0 {
            for x in x.iter_mut() {
                *x *= self.scale;
            }
        }
        let codes = &self.stages.codes;
        let out = &mut out[..dims];
        let coded = codes.type_ != PHASOR_CODES_NONE;
        if !coded || codes.round_first == 1 || self.elements_at(head).is_some() {
            // Narrowing may change what it is given.
            y.copy_from_slice(x);
            T::narrow_row(y, out);
            if codes.round_first == 1 {
                T::widen_row(out, x);
            }
            unsafe { self.store_elements(head, out.as_ptr()) };
        }
        if coded {
            unsafe { self.store_codes(head, x, out.as_mut_ptr().cast()) };
        }
    }

    /// Where a head is written as elements, beside a cache.
    #[inline(always)]
    pub(super) fn elements_at(&self, head: usize) -> Option<usize> {
        match &self.destination {
            Some(destination) if !self.destination_is_codes => Some(destination.head(head)),
            _ => None,
        }
    }

    /// Where a head can be written first, in one piece, if it does not become codes.
    #[inline(always)]
    pub(super) fn place(&self, head: usize) -> Option<usize> {
        self.places().map(|places| places.head(head))
    }

    /// [`place`](Self::place) of all heads.
    #[inline(always)]
    pub(super) fn places(&self) -> Option<HeadsAt> {
        match (&self.destination, &self.cache) {
            (Some(destination), _) if !self.destination_is_codes => Some(*destination),
            (_, Some(slot)) => slot.whole(0, self.head_dim).map(|first| HeadsAt {
                first,
                stride: slot.cache.head,
            }),
            _ => None,
        }
    }

    /// Stores a head of elements wherever it is not yet: at its destination, and in a cache unless that
    /// has codes.
    ///
    /// # Safety
    /// That of [`perform`](Self::perform).
    #[inline(always)]
    pub(super) unsafe fn store_elements<T: Element>(&self, head: usize, from: *const T) {
        let (dims, size) = (self.head_dim, size_of::<T>());
        let is_elsewhere = |to: &usize| *to != from.addr();
        // SAFETY: the caller's.
        unsafe {
            if let Some(to) = self.elements_at(head).filter(is_elsewhere) {
                copy_bytes(from.cast(), to, dims * size);
            }
            if self.stages.codes.type_ == PHASOR_CODES_NONE
                && let Some(slot) = &self.cache
                && slot.whole(head, dims).is_none_or(|to| is_elsewhere(&to))
            {
                slot.store(head, from.cast(), dims, size);
            }
        }
    }

    /// Stores a head as codes, by way of the room where a cache does not have it in one piece.
    ///
    /// # Safety
    /// That of [`perform`](Self::perform); the room is for as many bytes.
    #[inline(always)]
    pub(super) unsafe fn store_codes(&self, head: usize, x: &[f32], room: *mut u8) {
        let codes = &self.stages.codes;
        let dims = x.len();
        let kind = match codes.type_ {
            PHASOR_CODES_E4M3 => Codes::E4m3,
            PHASOR_CODES_INT8 => Codes::Int8,
            _ => Codes::Int8Full,
        };
        let place = match (&self.cache, &self.destination) {
            (Some(slot), _) => slot.whole(head, dims),
            (None, Some(destination)) if self.destination_is_codes => Some(destination.head(head)),
            _ => None,
        };
        let to = place.map_or(room, with_exposed_provenance_mut);
        let group_dims = codes.group_dims as usize;
        let mut first = 0;
        while first < dims {
            let end = dims.min(first + group_dims);
            let x = &x[first..end];
            // SAFETY: the caller's: as many bytes are there, with or without values.
            let bytes = unsafe {
                std::slice::from_raw_parts_mut(to.add(first).cast::<MaybeUninit<u8>>(), x.len())
            };
            // SAFETY: the caller's: a scale is there, or room for one.
            let scale = unsafe { self.scale_of_group([head, first / group_dims], kind, x) };
            let form = match codes.multiply {
                1 => ScaleForm::Multiply,
                _ => ScaleForm::Divide,
            };
            let factor = match codes.dynamic {
                0 => Factor::given(scale, form),
                _ => Factor::of_group(scale, form),
            };
            factor.encode(kind, x, bytes, |byte, code| {
                byte.write(code);
            });
            first = end;
        }
        if let (Some(slot), None) = (&self.cache, place) {
            // SAFETY: the caller's.
            unsafe { slot.store(head, to, dims, 1) };
        }
    }

    /// The scale of a group: the one that is given, or its own, which is written.
    ///
    /// # Safety
    /// That of [`perform`](Self::perform).
    #[inline(always)]
    unsafe fn scale_of_group(&self, [head, group]: [usize; 2], kind: Codes, x: &[f32]) -> f32 {
        let codes = &self.stages.codes;
        if codes.dynamic == 0 {
            let scales = at_head(codes.scales, codes.head, head);
            // SAFETY: the caller's.
            return unsafe { with_exposed_provenance::<f32>(scales).read_unaligned() };
        }
        let rounding = match codes.scale_rounding {
            PHASOR_SCALE_POWER_OF_TWO_UP => ScaleRounding::PowerOfTwoUp,
            PHASOR_SCALE_POWER_OF_TWO_DOWN => ScaleRounding::PowerOfTwoDown,
            _ => ScaleRounding::None,
        };
        let scale = scale_of(amax(x), kind.most(), codes.floor, rounding);
        if let Some(place) = &self.cache {
            let along = |n: usize, stride: i64| (n as i64).wrapping_mul(stride) as usize;
            let at = (codes.scales as usize)
                .wrapping_add(along(place.page as usize, codes.page))
                .wrapping_add(along(place.slot as usize, codes.slot))
                .wrapping_add(along(head, codes.head))
                .wrapping_add(along(group, codes.group));
            // SAFETY: the caller's.
            unsafe {
                match codes.e8m0 {
                    // A scale that is rounded to a power of two has a byte.
                    1 => with_exposed_provenance_mut::<u8>(at)
                        .write(e8m0_from_scale(scale).unwrap_or(255)),
                    _ => with_exposed_provenance_mut::<f32>(at).write_unaligned(scale),
                }
            }
        }
        scale
    }
}

/// Something of each head, as far as it is not shared.
#[inline(always)]
pub(super) fn at_head(address: u64, stride: i64, head: usize) -> usize {
    (address as usize).wrapping_add((head as i64).wrapping_mul(stride) as usize)
}

#[inline(always)]
fn round<T: Rows>(x: &mut [f32]) {
    for x in x.iter_mut() {
        *x = T::narrow(*x).widen();
    }
}

/// # Safety
/// So many bytes are at both, and do not overlap.
unsafe fn copy_bytes(from: *const u8, to: usize, bytes: usize) {
    // SAFETY: the caller's.
    unsafe { std::ptr::copy_nonoverlapping(from, with_exposed_provenance_mut(to), bytes) };
}

impl CacheSlot<'_> {
    fn at(n: usize, stride: i64) -> usize {
        (n as i64).wrapping_mul(stride) as usize
    }

    /// Where a head begins.
    #[inline(always)]
    fn head(&self, head: usize) -> usize {
        (self.cache.address as usize)
            .wrapping_add(Self::at(self.page as usize, self.cache.page))
            .wrapping_add(Self::at(self.slot as usize, self.cache.slot))
            .wrapping_add(Self::at(head, self.cache.head))
    }

    /// The same, if its dims lie in one piece.
    #[inline(always)]
    fn whole(&self, head: usize, dims: usize) -> Option<usize> {
        (self.cache.block_dims as usize >= dims).then(|| self.head(head))
    }

    /// Stores the dims of a head, `size` bytes each, in the blocks of the cache.
    ///
    /// # Safety
    /// The slot is one of the cache's, and so is the head.
    unsafe fn store(&self, head: usize, from: *const u8, dims: usize, size: usize) {
        let block_dims = (self.cache.block_dims as usize).min(dims).max(1);
        for block in 0..dims / block_dims {
            let to = self
                .head(head)
                .wrapping_add(Self::at(block, self.cache.block));
            let bytes = block_dims * size;
            // SAFETY: the caller's; the blocks are inside the head.
            unsafe { copy_bytes(from.add(block * bytes), to, bytes) };
        }
    }
}

impl Turns<'_> {
    /// Rotates one head elsewhere; dims that do not rotate are copied.
    #[inline(always)]
    fn rotate(&self, x: &[f32], y: &mut [f32]) {
        let pairs = self.cos.len();
        let window = self.offset..self.offset + 2 * pairs;
        y[..window.start].copy_from_slice(&x[..window.start]);
        y[window.end..x.len()].copy_from_slice(&x[window.end..]);
        let (x, y) = (&x[window.clone()], &mut y[window]);
        let factors = self.cos.iter().zip(self.sin);
        let turn = |a: f32, b: f32, cos: f32, sin: f32| {
            (a.mul_add(cos, -(b * sin)), a.mul_add(sin, b * cos))
        };
        match (self.pairings.source, self.pairings.destination) {
            (Pairing::HalfSplit, Pairing::HalfSplit) => {
                let (a, b) = x.split_at(pairs);
                let (to_a, to_b) = y.split_at_mut(pairs);
                let from = a.iter().zip(b);
                let to = to_a.iter_mut().zip(to_b);
                for (((&cos, &sin), (&a, &b)), (to_a, to_b)) in factors.zip(from).zip(to) {
                    (*to_a, *to_b) = turn(a, b, cos, sin);
                }
            }
            (Pairing::Interleaved, Pairing::Interleaved) => {
                let from = x.chunks_exact(2);
                for (((&cos, &sin), x), y) in factors.zip(from).zip(y.chunks_exact_mut(2)) {
                    (y[0], y[1]) = turn(x[0], x[1], cos, sin);
                }
            }
            (Pairing::HalfSplit, Pairing::Interleaved) => {
                let (a, b) = x.split_at(pairs);
                let from = a.iter().zip(b);
                for (((&cos, &sin), (&a, &b)), y) in factors.zip(from).zip(y.chunks_exact_mut(2)) {
                    (y[0], y[1]) = turn(a, b, cos, sin);
                }
            }
            (Pairing::Interleaved, Pairing::HalfSplit) => {
                let (to_a, to_b) = y.split_at_mut(pairs);
                let to = to_a.iter_mut().zip(to_b);
                for (((&cos, &sin), x), (to_a, to_b)) in factors.zip(x.chunks_exact(2)).zip(to) {
                    (*to_a, *to_b) = turn(x[0], x[1], cos, sin);
                }
            }
        }
    }
}

/// What is summed of a head's dims.
#[derive(Clone, Copy)]
pub(super) enum Sum {
    Plain,
    /// Of the squares of what is left without the mean.
    Squares(f32),
}

impl Statistic {
    #[inline(always)]
    pub(super) fn of(norm: &PhasorNorm, mean: f32, squares: f32, count: f32) -> Self {
        Self {
            mean,
            r: 1.0 / (squares / count + norm.eps).sqrt(),
        }
    }
}

/// What a norm finds of one head.
#[inline(always)]
fn statistic_of(norm: &PhasorNorm, x: &[f32], sums: &mut [f32]) -> Statistic {
    let count = x.len() as f32;
    let mut mean = 0.0;
    if norm.kind == PHASOR_NORM_LAYER {
        mean = sum_of_head(Sum::Plain, x, sums) / count;
    }
    let squares = sum_of_head(Sum::Squares(mean), x, sums);
    Statistic::of(norm, mean, squares, count)
}

/// The sum of a head, by way of its groups of 4 dims.
#[inline(always)]
fn sum_of_head(sum: Sum, x: &[f32], groups: &mut [f32]) -> f32 {
    let count = x.len().div_ceil(4);
    let groups = &mut groups[..count.next_power_of_two()];
    let square = |a: f32, b: f32| b.mul_add(b, a * a);
    let (whole, rest) = x.as_chunks::<4>();
    match sum {
        Sum::Plain => {
            for (group, [a, b, c, d]) in groups.iter_mut().zip(whole) {
                *group = (a + b) + (c + d);
            }
            if let [a, b] = rest {
                groups[whole.len()] = (a + b) + 0.0;
            }
        }
        Sum::Squares(mean) => {
            for (group, [a, b, c, d]) in groups.iter_mut().zip(whole) {
                *group = square(a - mean, b - mean) + square(c - mean, d - mean);
            }
            if let [a, b] = rest {
                groups[whole.len()] = square(a - mean, b - mean);
            }
        }
    }
    groups[count..].fill(0.0);
    fold(groups)
}

/// The sum of as many terms as a power of two, in halves.
#[inline(always)]
pub(super) fn fold(terms: &mut [f32]) -> f32 {
    let mut left = terms.len() / 2;
    while left > 0 {
        let (a, b) = terms.split_at_mut(left);
        for (a, b) in a.iter_mut().zip(&b[..left]) {
            *a += b;
        }
        left /= 2;
    }
    terms[0]
}
