//! Cached keys that move to other positions, in host memory.

use super::run::{AngleBlock, BLOCK, HeadRun, Phases, split};
use super::step::{HostBytes, InHost};
use super::variants::{self, VectorElement};
use super::{HostRotator, Isa};
#[cfg(feature = "rayon")]
use super::{Threads, threads};
use crate::angle::phase::Scale;
use crate::cache::{CacheLayout, KvCacheLayout};
use crate::call::VectorAddress;
use crate::codes::{DynamicScales, StoredCodes};
use crate::element::{Dtype, Element};
use crate::quantize::{Factor, amax, e8m0_from_scale, e8m0_to_scale, least_scale, scale_of};
use crate::rope::Pairings;
use crate::shift::{KeyScales, Run, ShiftPlan, SlotRange};
use crate::{Angles, Direction, Error};
use half::{bf16, f16};
use std::ops::Range;
use std::ptr::{copy_nonoverlapping, with_exposed_provenance, with_exposed_provenance_mut};
#[cfg(feature = "rayon")]
use std::time::Duration;

/// Codes that one thread moves in a microsecond: what was measured on a fast processor.
#[cfg(feature = "rayon")]
const fn codes_per_microsecond(isa: Isa) -> u64 {
    match isa {
        Isa::Scalar => 160,
        _ => 1000,
    }
}

impl HostRotator {
    /// Checks the keys of a cache that are to be moved to other positions; the plan serves any number of
    /// calls of [`shift_cached`](Self::shift_cached). The rotator is one of
    /// [`Rope::shift`](crate::Rope::shift), `rotary_offset` the first rotated dim of a head, and `dtype`
    /// the type of elements.
    ///
    /// # Errors
    /// Those of [`ShiftPlan::new`].
    pub fn shift_plan(
        &self,
        dtype: Dtype,
        cache: &KvCacheLayout,
        rotary_offset: usize,
    ) -> Result<ShiftPlan, Error> {
        ShiftPlan::new(&self.rope, dtype, cache, rotary_offset)
    }

    /// Moves cached keys to other positions where they are (context shift), quantised ones too. Nothing is
    /// written if an error is returned.
    ///
    /// Elements are rotated in f32 and rounded once; dims that do not rotate are not touched. Codes become
    /// values ([`quantize`](crate::quantize)), are rotated in f32, and become codes again as the cache has
    /// them, with [`round_first`](StoredCodes::round_first) rounded to the element type before that. Where
    /// scales are given, they stay, and so do the codes of dims that do not rotate; a value that turns out
    /// too large for its scale becomes the largest code. Where scales are dynamic, a group with a dim that
    /// rotates gets a new scale, and all its codes are written; other groups are not touched.
    ///
    /// Each shift rounds once more, so that the error grows like the root of their number: prefer few long
    /// ones. Of random vectors of 128 dims that were moved by random distances, it is, relative to the
    /// vector, root of the mean of squares, in `tests/shift.rs`:
    ///
    /// | | stored | after 1 shift | after 100 |
    /// |---|---|---|---|
    /// | e4m3, dynamic scale | 0.026 | 0.037 | 0.26 |
    /// | e4m3, given scale (4.5 deviations) | 0.026 | 0.037 | 0.23 |
    /// | int8, dynamic scale | 0.0064 | 0.0091 | 0.065 |
    /// | int8, given scale (4.5 deviations) | 0.010 | 0.014 | 0.10 |
    ///
    /// Unlike a rotation, a call allocates memory.
    ///
    /// ```
    /// use phasor::quantize::Codes;
    /// use phasor::{
    ///     CacheLayout, Dtype, Frequencies, Host, KeyScales, KvCacheLayout, Pairing, Rope, ScaleLayout,
    ///     SlotRange, StoredCodes,
    /// };
    ///
    /// # fn main() -> Result<(), phasor::Error> {
    /// let rope = Rope::new(Frequencies::from_theta(10_000.0, 64)?, Pairing::HalfSplit);
    /// // 10 pages of 16 slots, 2 heads of 64 dims, in int8 with a scale for each slot and head.
    /// let codes = StoredCodes::dynamic(Codes::Int8, 1e-6, ScaleLayout::tokens_heads(16, 2, 1));
    /// let layout = KvCacheLayout::k(CacheLayout::paged_nhd(10, 16, 2, 64)).with_k_codes(codes);
    /// let (mut keys, mut scales) = (vec![1u8; 10 * 16 * 2 * 64], vec![0.5f32; 10 * 16 * 2]);
    ///
    /// let shift = Host::new().rotator(&rope.shift()?);
    /// let plan = shift.shift_plan(Dtype::Bf16, &layout, 0)?;
    /// // A sequence of 40 tokens in pages 3, 4 and 8 drops 16 tokens before them.
    /// let ranges = [SlotRange::new(3 * 16..5 * 16, -16), SlotRange::new(8 * 16..8 * 16 + 8, -16)];
    /// shift.shift_cached(&plan, &mut keys, KeyScales::Written((&mut scales).into()), &ranges)?;
    /// assert_eq!(keys[..3 * 16 * 2 * 64], [1; 3 * 16 * 2 * 64]);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::PlanMismatch`]; [`Error::SlotRange`], [`Error::SlotRangesDiffer`], [`Error::ShiftAxes`],
    /// [`Error::FrequencyRows`] and [`Error::FrequencyRowOutOfRange`] for ranges;
    /// [`Error::BufferType`], [`Error::BufferUnaligned`], [`Error::BufferTooShort`], [`Error::Stages`] and
    /// [`Error::StageLength`] for the cache and its scales.
    pub fn shift_cached<'a>(
        &self,
        plan: &ShiftPlan,
        cache: impl Into<HostBytes<'a>>,
        mut scales: KeyScales<'_>,
        ranges: &[SlotRange<'_>],
    ) -> Result<(), Error> {
        let cache = cache.into().span;
        plan.check_cache(cache)?;
        let scales = plan.scale_address(&mut scales, &mut InHost)?;
        // SAFETY: the lengths have been checked, and the borrows keep the buffers apart.
        unsafe { self.shift_cached_raw(plan, cache.address, scales, ranges) }
    }

    /// The same at addresses, for engines with an allocator of their own: those of the buffers, whose
    /// provenance is exposed, layouts' offsets being added to them. `scales` are those that are given, one
    /// or one for each head, or the buffer of those that are written.
    ///
    /// # Errors
    /// Those of [`shift_cached`](Self::shift_cached) that are not about buffers of the wrong type,
    /// alignment or length.
    ///
    /// # Safety
    /// For the call: the buffers reach as far as the layouts, the cache is aligned to its elements, and
    /// nothing else touches what is written, which is the keys and scales of the ranges.
    pub unsafe fn shift_cached_raw(
        &self,
        plan: &ShiftPlan,
        cache: u64,
        scales: Option<VectorAddress>,
        ranges: &[SlotRange<'_>],
    ) -> Result<(), Error> {
        if !plan.rope.is_same(&self.rope) {
            return Err(Error::PlanMismatch);
        }
        plan.check_scales(scales.is_some())?;
        let runs = plan.runs(ranges)?;
        if plan.layout.is_empty() || runs.is_empty() {
            return Ok(());
        }
        let work = Work::new(self.host.isa, plan, cache, scales, &runs);
        let share = match (plan.codes, plan.dtype) {
            (Some(_), _) => Work::codes,
            (None, Dtype::F32) => Work::elements::<f32>,
            (None, Dtype::F16) => Work::elements::<f16>,
            (None, Dtype::Bf16) => Work::elements::<bf16>,
        };
        let slots = runs.iter().map(|run| run.slots().len()).sum();
        let work_at = |part: usize, parts: usize| {
            // SAFETY: the caller's; the parts have slots of their own.
            unsafe { share(&work, split(slots, parts, part)) };
        };
        #[cfg(feature = "rayon")]
        if self.host.threads == Threads::Pool {
            let alone = work.time_of(slots as u64);
            threads::share(alone, |parts| parts.min(slots), &work_at);
            return Ok(());
        }
        work_at(0, 1);
        Ok(())
    }
}

/// What all threads of a call share.
struct Work<'a> {
    isa: Isa,
    plan: &'a ShiftPlan,
    layout: &'a CacheLayout,
    runs: &'a [Run<'a>],
    pairs: usize,
    pairings: Pairings,
    /// Of `[0, 0, 0, 0]`.
    cache: usize,
    /// Bytes of an element.
    size: usize,
    scales: usize,
    /// Scales that are given: whether each head has one.
    each: bool,
    /// The dims that are read and written: where codes share scales, whole groups.
    dims: Range<usize>,
}

/// A slot of the cache.
#[derive(Clone, Copy)]
struct Place {
    page: usize,
    slot: usize,
}

impl<'a> Work<'a> {
    fn new(
        isa: Isa,
        plan: &'a ShiftPlan,
        cache: u64,
        scales: Option<VectorAddress>,
        runs: &'a [Run<'a>],
    ) -> Self {
        let layout = &plan.layout;
        let size = match plan.codes {
            Some(_) => 1,
            None => plan.dtype.size(),
        };
        let pairs = plan.rope.angles().pairs();
        let mut dims = plan.rotary_offset..plan.rotary_offset + 2 * pairs;
        let dynamic = plan.codes.and_then(|codes| codes.dynamic);
        if let (Some(codes), Some(_)) = (&plan.codes, dynamic) {
            let group = codes.group_dims(layout.head_dim);
            dims = dims.start / group * group..dims.end.next_multiple_of(group);
        }
        // In the cache, or in a buffer of their own.
        let scales_at = scales.map_or(cache, |scales| scales.address) as usize;
        let offset = dynamic.map_or(0, |dynamic| dynamic.layout.offset * dynamic.size());
        Self {
            isa,
            plan,
            layout,
            runs,
            pairs,
            pairings: Pairings {
                source: plan.rope.pairing(),
                destination: plan.rope.pairing(),
            },
            cache: (cache as usize).wrapping_add(layout.offset * size),
            size,
            scales: scales_at.wrapping_add(offset),
            each: scales.is_some_and(|scales| scales.len > 1),
            dims,
        }
    }

    /// How long it takes on one thread, about.
    #[cfg(feature = "rayon")]
    fn time_of(&self, slots: u64) -> Duration {
        let [.., heads, _] = self.layout.shape();
        let dims = slots * (heads * self.dims.len()) as u64;
        match self.plan.codes {
            Some(_) => Duration::from_micros(dims / codes_per_microsecond(self.isa)),
            None => {
                let rate = super::run::bytes_per_nanosecond(self.isa, self.plan.dtype);
                Duration::from_nanos(2 * dims * self.size as u64 / rate)
            }
        }
    }

    /// The parts of runs that are slots `slots` of all that move.
    fn parts(&self, slots: Range<usize>) -> impl Iterator<Item = (&'a Run<'a>, Range<usize>)> {
        let mut before = 0;
        self.runs.iter().filter_map(move |run| {
            let all = run.slots();
            let part = |n: usize| n.saturating_sub(before).min(all.len()) + all.start;
            let part = part(slots.start)..part(slots.end);
            before += all.len();
            (!part.is_empty()).then_some((run, part))
        })
    }

    fn place(&self, slot: usize) -> Place {
        let page_size = self.layout.page_size;
        Place {
            page: slot / page_size,
            slot: slot % page_size,
        }
    }

    /// cos and sin of the angles that a run moves by.
    fn form(&self, run: &Run<'_>, angles: &mut [AngleBlock]) {
        let steps = match self.plan.rope.angles() {
            Angles::Exact(frequencies) => frequencies.steps(),
            Angles::Rows(rows) => rows.row_steps(run.row()),
            Angles::Table(_) => unreachable!("a plan has no table"),
        };
        let inverse = self.plan.rope.direction() == Direction::Inverse;
        for (at, block) in angles.iter_mut().enumerate() {
            let first = at * BLOCK;
            let mut phases = [0u64; BLOCK];
            let phases = &mut phases[..BLOCK.min(self.pairs - first)];
            for (axis, steps) in steps.chunks_exact(self.pairs).enumerate() {
                let distance = run.distance_on(axis) as u64;
                for (phase, step) in phases.iter_mut().zip(&steps[first..]) {
                    *phase = phase.wrapping_add(step.wrapping_mul(distance));
                }
            }
            // SAFETY: at most `BLOCK` steps; the variant was checked when it was chosen. A phase is a step
            // at position 1.
            unsafe {
                variants::form(
                    self.isa,
                    phases,
                    Phases::At(1),
                    Scale::new(1.0, inverse),
                    block,
                );
            }
        }
    }

    fn angles(&self) -> Vec<AngleBlock> {
        let mut angles = Vec::new();
        angles.resize_with(self.pairs.div_ceil(BLOCK), AngleBlock::new);
        angles
    }

    /// Rotates the heads of a slot where they are, `stride` elements apart.
    ///
    /// # Safety
    /// `first` is the first rotated dim of the first of them, and nothing else touches them.
    unsafe fn rotate<T: VectorElement>(
        &self,
        first: *mut T,
        stride: usize,
        continues: bool,
        angles: &[AngleBlock],
    ) {
        for (at, block) in angles.iter().enumerate() {
            let run = HeadRun {
                source: first.cast_const(),
                destination: first,
                source_stride: stride,
                destination_stride: stride,
                heads: self.layout.heads,
                pairs: self.pairs,
                first: at * BLOCK,
                continues,
                stream: false,
                ordinary: true,
            };
            let pairs = BLOCK.min(self.pairs - at * BLOCK);
            // SAFETY: the caller's; the variant was checked when it was chosen.
            unsafe { T::rotate_heads(self.isa, self.pairings, &run, block, pairs) };
        }
    }

    /// Moves elements.
    ///
    /// # Safety
    /// The addresses are those of the plan's cache and scales, and nothing else touches these slots.
    unsafe fn elements<T: VectorElement>(&self, slots: Range<usize>) {
        let layout = self.layout;
        let mut angles = self.angles();
        let row = self.dims.len();
        let mut room = match layout.is_dense() {
            true => Vec::new(),
            false => vec![T::default(); layout.heads * row],
        };
        for (run, part) in self.parts(slots) {
            self.form(run, &mut angles);
            for slot in part {
                let place = self.place(slot);
                // SAFETY: the caller's; the room is for as many heads of as many dims.
                unsafe {
                    if layout.is_dense() {
                        let first = self.head(place, 0) + self.dims.start * size_of::<T>();
                        let continues = layout.slot_stride == layout.heads * layout.head_stride;
                        let first = with_exposed_provenance_mut::<T>(first);
                        self.rotate(first, layout.head_stride, continues, &angles);
                        continue;
                    }
                    for head in 0..layout.heads {
                        self.load(place, head, room[head * row..].as_mut_ptr().cast());
                    }
                    self.rotate(room.as_mut_ptr(), row, true, &angles);
                    for head in 0..layout.heads {
                        self.store(place, head, room[head * row..].as_ptr().cast());
                    }
                }
            }
        }
    }

    /// Moves codes, in loops that are compiled for the variant.
    ///
    /// # Safety
    /// That of [`elements`](Self::elements).
    unsafe fn codes(&self, slots: Range<usize>) {
        match self.isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the caller's, here and below; the variant was checked when it was chosen.
            Isa::Avx2 => unsafe { codes_by_avx2(self, slots) },
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Avx512Bf16 => unsafe { codes_by_avx512(self, slots) },
            // NEON is what the compiler has anyway.
            _ => unsafe { self.plain_codes(slots) },
        }
    }

    /// The same as the compiler has it.
    ///
    /// # Safety
    /// That of [`elements`](Self::elements).
    #[inline(always)]
    unsafe fn plain_codes(&self, slots: Range<usize>) {
        let Some(codes) = self.plan.codes else { return };
        let mut angles = self.angles();
        let row = self.dims.len();
        let mut values = vec![0f32; self.layout.heads * row];
        let mut bytes = vec![0u8; self.layout.heads * row];
        for (run, part) in self.parts(slots) {
            self.form(run, &mut angles);
            for slot in part {
                let place = self.place(slot);
                // SAFETY: the caller's; the rows are for as many heads of as many dims.
                unsafe {
                    for head in 0..self.layout.heads {
                        self.load(place, head, bytes[head * row..].as_mut_ptr());
                    }
                    self.decode(&codes, place, &bytes, &mut values);
                    let first = values[self.plan.rotary_offset - self.dims.start..].as_mut_ptr();
                    self.rotate(first, row, true, &angles);
                    if codes.round_first {
                        round(self.plan.dtype, &mut values);
                    }
                    self.encode(&codes, place, &values, &mut bytes);
                    for head in 0..self.layout.heads {
                        self.store(place, head, bytes[head * row..].as_ptr());
                    }
                }
            }
        }
    }

    /// Dims that share a scale, of those of a row.
    fn group_dims(&self, codes: &StoredCodes) -> usize {
        match codes.dynamic {
            Some(_) => codes.group_dims(self.layout.head_dim),
            None => self.dims.len(),
        }
    }

    /// The values of the heads of a slot.
    ///
    /// # Safety
    /// That of [`elements`](Self::elements).
    #[inline(always)]
    unsafe fn decode(&self, codes: &StoredCodes, place: Place, bytes: &[u8], values: &mut [f32]) {
        let group_dims = self.group_dims(codes);
        let groups = bytes.chunks(group_dims).zip(values.chunks_mut(group_dims));
        for (n, (bytes, values)) in groups.enumerate() {
            let at = self.scale_at(codes, place, n);
            // SAFETY: the caller's.
            let scale = unsafe {
                match codes.dynamic {
                    Some(DynamicScales { e8m0: true, .. }) => {
                        e8m0_to_scale(with_exposed_provenance::<u8>(at).read())
                    }
                    _ => with_exposed_provenance::<f32>(at).read_unaligned(),
                }
            };
            let factor = match codes.dynamic {
                None => Factor::back_of_given(scale, codes.form),
                Some(_) => Factor::Product(scale),
            };
            factor.decode(codes.codes, bytes, values);
        }
    }

    /// The codes of the heads of a slot; scales that are dynamic are written.
    ///
    /// # Safety
    /// That of [`elements`](Self::elements).
    #[inline(always)]
    unsafe fn encode(&self, codes: &StoredCodes, place: Place, values: &[f32], bytes: &mut [u8]) {
        let group_dims = self.group_dims(codes);
        let groups = values.chunks(group_dims).zip(bytes.chunks_mut(group_dims));
        for (n, (values, bytes)) in groups.enumerate() {
            let at = self.scale_at(codes, place, n);
            // SAFETY: the caller's.
            let scale = unsafe {
                match &codes.dynamic {
                    None => with_exposed_provenance::<f32>(at).read_unaligned(),
                    Some(dynamic) => {
                        let (rounding, most) = (dynamic.rounding, codes.codes.most());
                        let least = least_scale(dynamic.floor, rounding);
                        let scale = scale_of(amax(values), most, least, rounding);
                        match dynamic.e8m0 {
                            // A scale that is rounded to a power of two has a byte.
                            true => with_exposed_provenance_mut::<u8>(at)
                                .write(e8m0_from_scale(scale).unwrap_or(255)),
                            false => with_exposed_provenance_mut::<f32>(at).write_unaligned(scale),
                        }
                        scale
                    }
                }
            };
            let factor = match codes.dynamic {
                None => Factor::given(scale, codes.form),
                Some(_) => Factor::of_group(scale, codes.form),
            };
            factor.encode(codes.codes, values, bytes, |byte, code| *byte = code);
        }
    }

    /// The scale of the `n`th group of the rows of a slot.
    fn scale_at(&self, codes: &StoredCodes, place: Place, n: usize) -> usize {
        let group_dims = self.group_dims(codes);
        let groups = self.dims.len() / group_dims;
        let (head, group) = (n / groups, n % groups);
        let Some(dynamic) = &codes.dynamic else {
            let head = if self.each { head } else { 0 };
            return self.scales.wrapping_add(head * size_of::<f32>());
        };
        let layout = &dynamic.layout;
        let at = (place.page.wrapping_mul(layout.page))
            .wrapping_add(place.slot.wrapping_mul(layout.slot))
            .wrapping_add(head.wrapping_mul(layout.head))
            .wrapping_add((self.dims.start / group_dims + group).wrapping_mul(layout.group));
        self.scales.wrapping_add(at.wrapping_mul(dynamic.size()))
    }

    fn head(&self, place: Place, head: usize) -> usize {
        let layout = self.layout;
        let at = (place.page.wrapping_mul(layout.page_stride))
            .wrapping_add(place.slot.wrapping_mul(layout.slot_stride))
            .wrapping_add(head.wrapping_mul(layout.head_stride));
        self.cache.wrapping_add(at.wrapping_mul(self.size))
    }

    /// The dims of a head as pieces that are contiguous in the cache: addresses there, and bytes from and
    /// to which they are in a row.
    fn pieces(&self, place: Place, head: usize) -> impl Iterator<Item = (usize, Range<usize>)> {
        let first = self.head(place, head);
        let (block_dims, block_stride) = match self.layout.is_dense() {
            true => (usize::MAX, 0),
            false => (self.layout.block_dims, self.layout.block_stride),
        };
        let (dims, size) = (self.dims.clone(), self.size);
        let mut dim = dims.start;
        std::iter::from_fn(move || {
            let from = dim;
            let (block, within) = (from / block_dims, from % block_dims);
            dim = dims.end.min(from.saturating_add(block_dims - within));
            let at = first.wrapping_add((block * block_stride + within) * size);
            (from < dims.end).then_some((at, (from - dims.start) * size..(dim - dims.start) * size))
        })
    }

    /// Copies the dims of a head to a row.
    ///
    /// # Safety
    /// The head is the cache's, and the row is for as many dims.
    unsafe fn load(&self, place: Place, head: usize, row: *mut u8) {
        for (at, range) in self.pieces(place, head) {
            let from = with_exposed_provenance::<u8>(at);
            // SAFETY: the caller's.
            unsafe { copy_nonoverlapping(from, row.add(range.start), range.len()) };
        }
    }

    /// Copies a row to the dims of a head.
    ///
    /// # Safety
    /// The head is the cache's, and the row has as many dims.
    unsafe fn store(&self, place: Place, head: usize, row: *const u8) {
        for (at, range) in self.pieces(place, head) {
            let to = with_exposed_provenance_mut::<u8>(at);
            // SAFETY: the caller's.
            unsafe { copy_nonoverlapping(row.add(range.start), to, range.len()) };
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn codes_by_avx2(work: &Work<'_>, slots: Range<usize>) {
    // SAFETY: the caller's.
    unsafe { work.plain_codes(slots) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn codes_by_avx512(work: &Work<'_>, slots: Range<usize>) {
    // SAFETY: the caller's.
    unsafe { work.plain_codes(slots) }
}

fn round(dtype: Dtype, values: &mut [f32]) {
    fn by<T: Element>(values: &mut [f32]) {
        for x in values {
            *x = T::narrow(*x).widen();
        }
    }
    match dtype {
        Dtype::F32 => by::<f32>(values),
        Dtype::F16 => by::<f16>(values),
        Dtype::Bf16 => by::<bf16>(values),
    }
}
