//! Walks the tokens of a call, on one thread or many, and hands each to the variant in use.

use super::stages::{CacheSlot, HeadsAt, Room, TokenWork, Turns};
use super::variants::{self, VectorElement};
use super::{Host, Isa, cache};
#[cfg(feature = "rayon")]
use super::{Threads, threads};
use crate::Dtype;
use crate::angle::phase::Scale;
use crate::call::{
    Call, PHASOR_CODES_NONE, PHASOR_OUT_OF_RANGE_PASS_THROUGH, PHASOR_ROW_ONLY, PHASOR_SLOT_NONE,
    PhasorCache, PhasorCall, PhasorStages, PhasorView, Slot, Stream, Token,
};
use crate::rope::{Pairing, Pairings};
use crate::stages::temperature;
use half::{bf16, f16};
use std::mem::MaybeUninit;
use std::ops::{Range, RangeInclusive};
use std::ptr::{with_exposed_provenance, with_exposed_provenance_mut};
use std::slice::from_raw_parts;
use std::sync::atomic::{AtomicU32, Ordering};
#[cfg(feature = "rayon")]
use std::time::Duration;

/// Pairs whose cos and sin are formed at a time; they stay in the first-level cache.
pub(super) const BLOCK: usize = 128;

/// The fewest pairs that any instruction set has in a vector. Divides [`BLOCK`].
pub(super) const FEWEST_LANES: usize = 8;

/// The largest ordinary factor. Its inverse is the smallest, for the larger of cos and sin.
const LARGEST_ORDINARY: f32 = 4096.0;

/// Bytes that one thread reads and writes in a nanosecond where they are in its caches: what was measured
/// on a fast processor. On a slower one a call stays on one thread for longer than it would have to.
#[cfg(feature = "rayon")]
pub(super) fn bytes_per_nanosecond(isa: Isa, dtype: Dtype) -> u64 {
    let [f32, f16, bf16] = match isa {
        Isa::Scalar => [3, 1, 2],
        Isa::Neon | Isa::Avx2 => [100, 45, 55],
        Isa::Avx512 | Isa::Avx512Bf16 => [150, 90, 120],
    };
    match dtype {
        Dtype::F32 => f32,
        Dtype::F16 => f16,
        Dtype::Bf16 => bf16,
    }
}

/// How many times as long as a rotation all stages of a head take, about: a norm alone takes half of it.
#[cfg(feature = "rayon")]
const STAGES_TAKE: u64 = 4;

/// The angles of up to [`BLOCK`] pairs of a token. Those that were formed have a value, and so have the
/// others of the last [`FEWEST_LANES`] that vectors may read with them.
#[repr(align(64))]
pub struct AngleBlock {
    pub(super) phases: [MaybeUninit<u64>; BLOCK],
    pub(super) cos: [MaybeUninit<f32>; BLOCK],
    pub(super) sin: [MaybeUninit<f32>; BLOCK],
}

impl AngleBlock {
    // Zeros would be a twelfth of a call of one head.
    pub(super) fn new() -> Self {
        Self {
            phases: [MaybeUninit::uninit(); BLOCK],
            cos: [MaybeUninit::uninit(); BLOCK],
            sin: [MaybeUninit::uninit(); BLOCK],
        }
    }

    /// cos and sin of the first pairs.
    ///
    /// # Safety
    /// So many have been formed.
    pub(super) unsafe fn turns(&self, pairs: usize) -> [&[f32]; 2] {
        [&self.cos, &self.sin].map(|values| {
            let values = &values[..pairs];
            // SAFETY: the caller's: they have values.
            unsafe { from_raw_parts(values.as_ptr().cast(), values.len()) }
        })
    }
}

/// Which phases to form.
#[derive(Clone, Copy)]
pub(super) enum Phases {
    /// Those of a position.
    At(i64),
    /// One step beyond those of the block.
    Next,
}

/// The heads of one token that share cos and sin, from pair `first` on.
pub struct HeadRun<T> {
    /// First rotated dim of the first head.
    pub(super) source: *const T,
    pub(super) destination: *mut T,
    /// Elements from one head to the next.
    pub(super) source_stride: usize,
    pub(super) destination_stride: usize,
    pub(super) heads: usize,
    /// Pairs of a whole head, and the first of this run.
    pub(super) pairs: usize,
    pub(super) first: usize,
    /// Whether heads of the next token follow at the same distance.
    pub(super) continues: bool,
    /// Whether to write past the caches.
    pub(super) stream: bool,
    /// Whether no factor is above [`LARGEST_ORDINARY`], and one of each pair at least its inverse.
    pub(super) ordinary: bool,
}

impl<T> HeadRun<T> {
    /// What the destination is aligned to, if it is to be written past the caches: heads and second
    /// members begin at multiples of 64 or of 16 bytes; else 0.
    pub(super) fn stream_alignment(&self) -> usize {
        if !self.stream {
            return 0;
        }
        // Where the first head, the next one and second members begin, in bytes.
        let elements = self.destination_stride | self.pairs | self.first;
        let begins = self.destination.addr() | elements.wrapping_mul(size_of::<T>());
        match 1usize << begins.trailing_zeros() {
            64.. => 64,
            16.. => 16,
            _ => 0,
        }
    }
}

/// Performs a call. `table_is_ordinary`: as [`is_ordinary`] for the table that it has, if any.
///
/// # Safety
/// All addresses of the call are of host memory, exposed, and reach as far as the call says; what is
/// written is not touched by others meanwhile, nor twice, nor by way of another stream.
pub(super) unsafe fn execute(host: Host, call: &Call, table_is_ordinary: bool) {
    let bytes = call.bytes(1);
    let work = Work {
        isa: host.isa,
        whole: call,
        call: &call.params,
        stream: bytes >= cache::last_level() as u64 / 2,
        table_is_ordinary,
    };
    let staged = call.fusion.is_some();
    // Without stages nothing of them is there at all: of a token of one head it would be a third of the
    // time.
    let share = match (call.dtype, staged) {
        (Dtype::F32, false) => Work::share::<f32, false>,
        (Dtype::F16, false) => Work::share::<f16, false>,
        (Dtype::Bf16, false) => Work::share::<bf16, false>,
        (Dtype::F32, true) => Work::share::<f32, true>,
        (Dtype::F16, true) => Work::share::<f16, true>,
        (Dtype::Bf16, true) => Work::share::<bf16, true>,
    };
    let tokens = call.params.batch as usize * call.params.tokens as usize;
    // Heads are split only where tokens do not suffice, as each part forms the angles of its tokens.
    // Where tokens are stored in slots, several may have the same one, and the last is to win: one thread
    // stores all of a head, in the order of tokens.
    let token_parts = |parts: usize| match call.params.slots.choice {
        PHASOR_SLOT_NONE => parts.min(tokens).max(1),
        _ => 1,
    };
    // A norm across heads takes all heads of a token.
    let across_heads = staged
        && (call.streams_and_stages().iter())
            .any(|(_, stages)| stages.is_some_and(|stages| stages.norm.across_heads == 1));
    let work_at = |part: usize, parts: usize| {
        let token_parts = token_parts(parts);
        let head_parts = match across_heads {
            true => 1,
            false => parts / token_parts,
        };
        if part >= token_parts * head_parts {
            return;
        }
        let part = Share {
            tokens: split(tokens, token_parts, part / head_parts),
            head_part: part % head_parts,
            head_parts,
        };
        // SAFETY: the caller's; the shares do not overlap.
        unsafe { share(&work, part) };
    };
    #[cfg(feature = "rayon")]
    if host.threads == Threads::Pool {
        let slower = match staged {
            true => call.bytes(STAGES_TAKE),
            false => bytes,
        };
        let alone = Duration::from_nanos(slower / bytes_per_nanosecond(host.isa, call.dtype));
        // As many parts of tokens as heads need.
        let whole = |parts: usize| parts.next_multiple_of(token_parts(parts));
        return threads::share(alone, whole, &work_at);
    }
    work_at(0, 1);
}

/// What all threads of a call share.
struct Work<'a> {
    isa: Isa,
    whole: &'a Call,
    call: &'a PhasorCall,
    /// Whether to write past the caches.
    stream: bool,
    table_is_ordinary: bool,
}

/// What one thread does: all heads, or a part of them, of some tokens.
struct Share {
    tokens: Range<usize>,
    head_part: usize,
    head_parts: usize,
}

/// Part `part` of `parts` nearly equal parts of `0..n`.
#[inline]
pub(super) fn split(n: usize, parts: usize, part: usize) -> Range<usize> {
    // Two divisions of 128 bits would be a tenth of a call of one head.
    if parts == 1 {
        return 0..n;
    }
    let bound = |i: usize| (n as u128 * i as u128 / parts as u128) as usize;
    bound(part)..bound(part + 1)
}

impl<'a> Work<'a> {
    /// # Safety
    /// That of [`execute`]; no other thread has the same tokens and heads.
    unsafe fn share<T: VectorElement, const STAGED: bool>(&self, share: Share) {
        let call = self.call;
        let mut angles = AngleBlock::new();
        let mut formed = None;
        let pairs = call.angles.pairs as usize;
        let pairings = Pairings {
            source: pairing(call.pairing.source_step),
            destination: pairing(call.pairing.destination_step),
        };
        let part = |(stream, stages): (Stream<'a>, Option<&'a PhasorStages>)| Part {
            heads: split(
                stream.read.heads as usize,
                share.head_parts,
                share.head_part,
            ),
            stream,
            stages,
        };
        let [q, k, v] = match STAGED {
            true => self.whole.streams_and_stages(),
            false => {
                let [q, k, v] = call.streams();
                [(q, None), (k, None), (v, None)]
            }
        };
        let parts = [part(q), part(k), part(v)];
        // What has stages is served apart.
        let is_plain = |part: &Part| !part.heads.is_empty() && (!STAGED || part.stages.is_none());
        let plain = || parts.iter().filter(|part| is_plain(part));
        let turns_plainly = !STAGED || plain().any(|part| part.stream.rotates);
        let mut room = None::<Room<T>>;
        // cos and sin of all pairs of a token, where those are more than a block.
        let mut more = Vec::new();
        if STAGED && pairs > BLOCK {
            more.resize(2 * pairs, 0.0);
        }
        let mut staged =
            STAGED.then(|| Staged::new(&parts, pairs, pairings, &mut room, &mut more[..]));
        // Where rotated keys are on their way to a cache that does not hold heads in one piece.
        let mut scratch = Vec::<MaybeUninit<T>>::new();
        for token in share.tokens.clone() {
            let (b, t) = match call.batch {
                1 => (0, token as u32),
                _ => (token as u32 / call.tokens, token as u32 % call.tokens),
            };
            // No option of a token: one that is handed on by way of memory costs as much as ten loads.
            let token = if call.is_ragged() {
                // SAFETY: the token is one of the call's.
                let Some(token) = (unsafe { call.ragged_token(b, t) }) else {
                    continue;
                };
                token
            } else {
                call.plain_token(b, t)
            };
            // SAFETY: the token is one of the call's.
            let (row, slot) = unsafe { (self.row(&token), self.slot(&token, &share)) };
            for first in (0..pairs).step_by(BLOCK) {
                let block = BLOCK.min(pairs - first);
                let row = row.as_ref().filter(|_| turns_plainly);
                if let Some(row) = row {
                    // SAFETY: the pairs are the call's.
                    unsafe {
                        row.form(self, &token, first..first + block, &mut formed, &mut angles)
                    };
                }
                for part in plain() {
                    let heads =
                        Heads::of::<T>(&part.stream, &part.heads, &token, slot, &mut scratch);
                    let Some(heads) = heads else { continue };
                    let whole = 2 * pairs == heads.head_dim;
                    let row = row.filter(|_| heads.rotate);
                    // Whole heads, though some dims are written again: fewer and longer copies.
                    if first == 0 && !heads.in_place && !(row.is_some() && whole) {
                        // SAFETY: the token and the heads are the stream's; source and destination do
                        // not overlap, because it is not in place.
                        unsafe {
                            copy_heads::<T>(
                                heads.source,
                                heads.destination,
                                heads.count,
                                heads.head_dim,
                            )
                        };
                    }
                    if let Some(row) = row {
                        let window = heads.rotary_offset * size_of::<T>();
                        let run = HeadRun {
                            source: with_exposed_provenance(heads.source.first + window),
                            destination: with_exposed_provenance_mut(
                                heads.destination.first + window,
                            ),
                            source_stride: elements::<T>(heads.source.stride),
                            destination_stride: elements::<T>(heads.destination.stride),
                            heads: heads.count,
                            pairs,
                            first,
                            continues: heads.continues,
                            // Lines that are written in part would be read before.
                            stream: self.stream && !heads.in_place && whole,
                            ordinary: row.ordinary,
                        };
                        // SAFETY: the run's heads are the stream's; the variant was checked when it was
                        // chosen.
                        unsafe { T::rotate_heads(self.isa, pairings, &run, &angles, block) };
                    }
                    if let Some(cached) = heads.cached.filter(|_| first + block == pairs) {
                        // SAFETY: the heads are the stream's, and the slot is in its cache.
                        unsafe {
                            store_heads::<T>(
                                heads.destination,
                                heads.count,
                                heads.head_dim,
                                &cached,
                            )
                        };
                    }
                }
            }
            if let Some(staged) = &mut staged {
                // What was formed for others, and is still there.
                let is_formed = turns_plainly && pairs <= BLOCK;
                if let Some(row) = row.as_ref().filter(|_| staged.turns && !is_formed) {
                    // SAFETY: the pairs are the call's.
                    unsafe { staged.form(self, &token, row, &mut formed, &mut angles) };
                }
                // SAFETY: the token is one of the call's, and so is its slot.
                unsafe { staged.token(self, &token, row.is_some(), slot, &angles) };
            }
        }
        if self.stream {
            variants::fence();
        }
    }

    /// The slot that a token is stored in, if any. One outside of the caches is reported.
    ///
    /// # Safety
    /// The token is one of the call's.
    unsafe fn slot(&self, token: &Token, share: &Share) -> Option<[u32; 2]> {
        let slots = &self.call.slots;
        if slots.choice == PHASOR_SLOT_NONE {
            return None;
        }
        // SAFETY: the caller's.
        match unsafe { self.call.slot(token) } {
            Slot::At { page, slot } => Some([page, slot]),
            Slot::None => None,
            Slot::Outside => {
                if share.head_part == 0 {
                    let report = with_exposed_provenance::<AtomicU32>(slots.report as usize);
                    // SAFETY: the caller's: a word that lives as long as the call.
                    unsafe { &*report }.store(1, Ordering::Relaxed);
                }
                None
            }
        }
    }

    /// Where the angles of a token come from; `None` where it passes through.
    ///
    /// # Safety
    /// The token is one of the call's.
    unsafe fn row(&self, token: &Token) -> Option<Row> {
        let call = self.call;
        let inverse = call.angles.inverse == 1;
        // SAFETY: the caller's.
        let position = unsafe { call.positions.at(0, token) };
        if call.has_table() {
            let (row, inside) = call.table_row(position);
            let passes = call.angles.out_of_range == PHASOR_OUT_OF_RANGE_PASS_THROUGH;
            return (inside || !passes).then_some(Row {
                source: Source::Table { row },
                scale: Scale::new(1.0, inverse),
                ordinary: self.table_is_ordinary,
            });
        }
        // SAFETY: the caller's; there is a factor for each row.
        let (row, factor) = unsafe {
            let row = call.row(token, position);
            let factors = with_exposed_provenance::<f32>(call.rows.factors as usize);
            let factor = match call.angles.row_choice {
                PHASOR_ROW_ONLY => call.angles.factor,
                _ => *factors.add(row as usize),
            };
            (row, factor)
        };
        // The larger of cos and sin is at least half of the square root of 2.
        let magnitudes = 0.7 * factor..=factor;
        Some(Row {
            source: Source::Steps { row, position },
            scale: Scale::new(factor, inverse),
            ordinary: is_ordinary(magnitudes),
        })
    }
}

/// What a thread serves of q, k or v: some heads, with their stages if they have any.
struct Part<'a> {
    stream: Stream<'a>,
    stages: Option<&'a PhasorStages>,
    heads: Range<usize>,
}

/// The parts that have stages, and what their heads need.
struct Staged<'a, T> {
    parts: &'a [Part<'a>; 3],
    pairings: Pairings,
    pairs: usize,
    /// Whether any of them rotates.
    turns: bool,
    /// cos and sin of all pairs of a token, where those are more than a block.
    more: &'a mut [f32],
    room: &'a mut Room<T>,
}

impl<'a, T: VectorElement> Staged<'a, T> {
    #[inline(always)]
    fn new(
        parts: &'a [Part<'a>; 3],
        pairs: usize,
        pairings: Pairings,
        room: &'a mut Option<Room<T>>,
        more: &'a mut [f32],
    ) -> Self {
        // The most dims that a head has, and the most heads that a norm takes together.
        let (mut dims, mut across, mut turns) = (0, 0, false);
        for part in parts {
            let Some(stages) = part.stages else { continue };
            dims = dims.max(part.stream.output.head_dim as usize);
            turns |= stages.rotates == 1;
            if stages.norm.across_heads == 1 {
                across = across.max(part.heads.len());
            }
        }
        Self {
            parts,
            pairings,
            pairs,
            turns,
            more,
            room: room.insert(Room::new(dims, across)),
        }
    }

    /// Forms cos and sin of a token: in the block, if that has room for all.
    ///
    /// # Safety
    /// The row is one of the call's.
    unsafe fn form(
        &mut self,
        work: &Work<'_>,
        token: &Token,
        row: &Row,
        formed: &mut Option<(u32, i64)>,
        angles: &mut AngleBlock,
    ) {
        let (cos, sin) = self.more.split_at_mut(self.more.len() / 2);
        for first in (0..self.pairs).step_by(BLOCK) {
            let block = first..self.pairs.min(first + BLOCK);
            // SAFETY: the pairs are the call's.
            unsafe { row.form(work, token, block.clone(), formed, angles) };
            if self.pairs > BLOCK {
                // SAFETY: they have just been formed.
                let [of_cos, of_sin] = unsafe { angles.turns(block.len()) };
                cos[block.clone()].copy_from_slice(of_cos);
                sin[block.clone()].copy_from_slice(of_sin);
            }
        }
    }

    /// Serves one token, which rotates unless it passes through.
    ///
    /// # Safety
    /// The token is one of the call's, its cos and sin have been formed, and the slot is in the caches.
    unsafe fn token(
        &mut self,
        work: &Work<'_>,
        token: &Token,
        rotates: bool,
        slot: Option<[u32; 2]>,
        angles: &AngleBlock,
    ) {
        let [cos, sin] = match self.pairs <= BLOCK {
            // SAFETY: the caller's, where anything turns.
            true if rotates && self.turns => unsafe { angles.turns(self.pairs) },
            true => [&[][..], &[]],
            false => self.more.split_at(self.pairs).into(),
        };
        for Part {
            stream,
            stages,
            heads,
        } in self.parts
        {
            let Some(stages) = *stages else { continue };
            let codes = stages.codes.type_ != PHASOR_CODES_NONE;
            let cache = stream
                .cache
                .zip(slot)
                .map(|(cache, [page, slot])| CacheSlot { cache, page, slot });
            let output = stream.output;
            if heads.is_empty() || output.nowhere == 1 && cache.is_none() {
                continue;
            }
            let at = |view: &PhasorView| HeadsAt {
                first: (view.address as usize)
                    .wrapping_add(i64::from(token.b).wrapping_mul(view.batch) as usize)
                    .wrapping_add(i64::from(token.t).wrapping_mul(view.token) as usize),
                stride: view.head,
            };
            let scale = &stages.scale;
            let token_work = TokenWork {
                source: at(&stream.read.source),
                heads: heads.clone(),
                head_dim: output.head_dim as usize,
                stages,
                turns: (rotates && stages.rotates == 1).then_some(Turns {
                    cos,
                    sin,
                    pairings: self.pairings,
                    offset: stream.read.rotary_offset as usize,
                }),
                scale: match scale.interval {
                    0 => scale.factor,
                    interval => {
                        // SAFETY: the caller's.
                        let position = unsafe { work.call.positions.at(0, token) };
                        scale.factor * temperature(scale.slope, interval, position)
                    }
                },
                destination: (output.nowhere == 0).then(|| at(&output.destination)),
                // Keys and values have theirs in a cache.
                destination_is_codes: codes && stream.cache.is_none(),
                cache,
            };
            // SAFETY: the caller's; the variant was checked when it was chosen.
            unsafe { T::perform_stages(work.isa, &token_work, self.room) };
        }
    }
}

fn pairing(step: u32) -> Pairing {
    match step {
        1 => Pairing::HalfSplit,
        _ => Pairing::Interleaved,
    }
}

/// Strides are multiples of an element.
fn elements<T>(bytes: i64) -> usize {
    bytes as usize / size_of::<T>()
}

/// Heads in memory: the first one's address, and bytes from one to the next.
#[derive(Clone, Copy)]
struct Run {
    first: usize,
    stride: i64,
}

/// The heads of one token and stream that a thread serves.
struct Heads<'a> {
    source: Run,
    destination: Run,
    count: usize,
    head_dim: usize,
    rotary_offset: usize,
    rotate: bool,
    in_place: bool,
    /// Whether heads of the next token follow at the same distance.
    continues: bool,
    /// Where they are stored once more.
    cached: Option<Cached<'a>>,
}

/// Where so many elements can stay in between. The first token of a call makes the room.
#[cold]
#[inline(never)]
fn room_for<T>(elements: usize, scratch: &mut Vec<MaybeUninit<T>>) -> usize {
    if scratch.len() < elements {
        scratch.resize_with(elements, MaybeUninit::uninit);
    }
    scratch[..elements].as_mut_ptr().expose_provenance()
}

/// Heads in a cache.
struct Cached<'a> {
    heads: Run,
    cache: &'a PhasorCache,
}

impl<'a> Heads<'a> {
    /// `None` where nothing of them is written. `scratch` is where heads stay that are written to a cache
    /// only, in pieces.
    // At 128 tokens of one-token work, a call here is a tenth of the time.
    #[inline(always)]
    fn of<T>(
        stream: &Stream<'a>,
        heads: &Range<usize>,
        token: &Token,
        slot: Option<[u32; 2]>,
        scratch: &mut Vec<MaybeUninit<T>>,
    ) -> Option<Self> {
        let (read, output) = (stream.read, stream.output);
        let at = |view: &PhasorView| {
            let offset = i64::from(token.b)
                .wrapping_mul(view.batch)
                .wrapping_add(i64::from(token.t).wrapping_mul(view.token))
                .wrapping_add((heads.start as i64).wrapping_mul(view.head));
            Run {
                first: (view.address as usize).wrapping_add(offset as usize),
                stride: view.head,
            }
        };
        let cached = stream.cache.zip(slot).map(|(cache, [page, slot])| {
            let offset = i64::from(page)
                .wrapping_mul(cache.page)
                .wrapping_add(i64::from(slot).wrapping_mul(cache.slot))
                .wrapping_add((heads.start as i64).wrapping_mul(cache.head));
            let heads = Run {
                first: (cache.address as usize).wrapping_add(offset as usize),
                stride: cache.head,
            };
            Cached { heads, cache }
        });
        let head_dim = output.head_dim as usize;
        let source = at(&read.source);
        let (destination, cached) = match (output.nowhere, cached) {
            (0, cached) => (at(&output.destination), cached),
            (_, None) => return None,
            (_, Some(cached)) if cached.cache.block_dims as usize >= head_dim => {
                (cached.heads, None)
            }
            // What does not rotate needs no stop on its way.
            (_, Some(cached)) if !stream.rotates => (source, Some(cached)),
            (_, Some(cached)) => {
                let scratch = Run {
                    first: room_for(heads.len() * head_dim, scratch),
                    stride: (head_dim * size_of::<T>()) as i64,
                };
                (scratch, Some(cached))
            }
        };
        Some(Self {
            source,
            destination,
            count: heads.len(),
            head_dim,
            rotary_offset: read.rotary_offset as usize,
            rotate: stream.rotates,
            in_place: source.first == destination.first,
            continues: read.source.token == read.source.head.wrapping_mul(i64::from(read.heads)),
            cached,
        })
    }
}

/// Copies heads of a token.
///
/// # Safety
/// So many heads are at both, and do not overlap.
unsafe fn copy_heads<T>(source: Run, destination: Run, count: usize, head_dim: usize) {
    let bytes = (head_dim * size_of::<T>()) as i64;
    let dense = source.stride == bytes && destination.stride == bytes;
    let (step, len) = match dense {
        true => (count.max(1), count * head_dim),
        false => (1, head_dim),
    };
    for head in (0..count).step_by(step) {
        let [source, destination] = [source, destination].map(|heads| heads.at(head));
        // SAFETY: the caller's.
        unsafe {
            std::ptr::copy_nonoverlapping(
                with_exposed_provenance::<T>(source),
                with_exposed_provenance_mut(destination),
                len,
            );
        }
    }
}

/// Stores heads, as they are where they were written, in a cache.
///
/// # Safety
/// So many heads are at both, and do not overlap.
unsafe fn store_heads<T>(written: Run, count: usize, head_dim: usize, cached: &Cached) {
    let block_dims = (cached.cache.block_dims as usize).min(head_dim);
    if block_dims == head_dim {
        // SAFETY: the caller's.
        unsafe { copy_heads::<T>(written, cached.heads, count, head_dim) };
        return;
    }
    for head in 0..count {
        let block = |first, stride| Run { first, stride };
        let from = block(written.at(head), (block_dims * size_of::<T>()) as i64);
        let to = block(cached.heads.at(head), cached.cache.block);
        // SAFETY: the caller's: blocks of a head are copied as heads are.
        unsafe { copy_heads::<T>(from, to, head_dim / block_dims, block_dims) };
    }
}

impl Run {
    fn at(&self, head: usize) -> usize {
        self.first
            .wrapping_add((head as i64).wrapping_mul(self.stride) as usize)
    }
}

/// Whether factors are ordinary where the larger of each cos and sin is in this range. What that is
/// for: see `Straight` in vector.rs.
pub(super) fn is_ordinary(magnitudes: RangeInclusive<f32>) -> bool {
    *magnitudes.start() >= 1.0 / LARGEST_ORDINARY && *magnitudes.end() <= LARGEST_ORDINARY
}

/// The angles of one token.
struct Row {
    source: Source,
    scale: Scale,
    /// As in [`HeadRun`].
    ordinary: bool,
}

enum Source {
    /// A step per axis and pair.
    Steps {
        row: u32,
        /// On the first axis.
        position: i64,
    },
    Table {
        row: u32,
    },
}

impl Row {
    /// cos and sin of the pairs of `range`. `formed`: the row and the position of the block's phases,
    /// if they are those of whole rows.
    ///
    /// # Safety
    /// The row is one of `work`'s call, and the pairs are in it.
    unsafe fn form(
        &self,
        work: &Work<'_>,
        token: &Token,
        range: Range<usize>,
        formed: &mut Option<(u32, i64)>,
        angles: &mut AngleBlock,
    ) {
        let call = work.call;
        let (axes, pairs) = (call.angles.axes as usize, call.angles.pairs as usize);
        let values = |address: u64, row: usize| {
            let first = with_exposed_provenance::<f32>(address as usize);
            // SAFETY: the caller's.
            unsafe { from_raw_parts(first.add(row * pairs + range.start), range.len()) }
        };
        let steps = |row: u32, axis: usize| {
            let first = with_exposed_provenance::<u64>(call.angles.steps as usize);
            let at = (row as usize * axes + axis) * pairs + range.start;
            // SAFETY: the caller's.
            unsafe { from_raw_parts(first.add(at), range.len()) }
        };
        let form = |steps: &[u64], phases, angles: &mut AngleBlock| {
            // SAFETY: at most `BLOCK` steps; the variant was checked when it was chosen.
            unsafe { variants::form(work.isa, steps, phases, self.scale, angles) };
        };
        match self.source {
            Source::Steps { row, position } if axes == 1 => {
                let phases = match *formed {
                    Some(before) if before == (row, position.wrapping_sub(1)) => Phases::Next,
                    _ => Phases::At(position),
                };
                *formed = (range.len() == pairs).then_some((row, position));
                form(steps(row, 0), phases, angles);
            }
            Source::Steps { row, .. } => {
                let mut phases = [0u64; BLOCK];
                for axis in 0..axes {
                    // SAFETY: the caller's.
                    let position = unsafe { call.positions.at(axis as u32, token) } as u64;
                    for (phase, step) in phases.iter_mut().zip(steps(row, axis)) {
                        *phase = phase.wrapping_add(step.wrapping_mul(position));
                    }
                }
                // A phase is a step at position 1.
                form(&phases[..range.len()], Phases::At(1), angles);
            }
            Source::Table { row } => {
                let cos = values(call.table.cos, row as usize);
                let sin = values(call.table.sin, row as usize);
                for (to, &from) in angles.cos.iter_mut().zip(cos) {
                    to.write(from);
                }
                for (to, &from) in angles.sin.iter_mut().zip(sin) {
                    to.write(self.scale.turned(from));
                }
                let rest = cos.len()..cos.len().next_multiple_of(FEWEST_LANES);
                angles.cos[rest.clone()].fill(MaybeUninit::new(0.0));
                angles.sin[rest].fill(MaybeUninit::new(0.0));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ptr::without_provenance_mut;

    #[test]
    fn ordinary_factors_have_both_bounds() {
        let (least, most) = (1.0 / 4096.0, 4096.0f32);
        for (range, expected) in [
            (1.0..=1.0, true),
            (least..=most, true),
            (least.next_down()..=most, false),
            (least..=most.next_up(), false),
            (0.0..=1.0, false),
            (1.0..=f32::INFINITY, false),
            (f32::NAN..=f32::NAN, false),
        ] {
            assert_eq!(is_ordinary(range.clone()), expected, "{range:?}");
        }
    }

    #[test]
    fn parts_follow_each_other_and_are_nearly_equal() {
        for n in [0, 1, 7, 100, usize::MAX] {
            for parts in 1..9 {
                let mut end = 0;
                for part in 0..parts {
                    let range = split(n, parts, part);
                    assert_eq!(range.start, end);
                    assert!([n / parts, n.div_ceil(parts)].contains(&range.len()));
                    end = range.end;
                }
                assert_eq!(end, n);
            }
        }
    }

    fn alignment<T>(destination: usize, destination_stride: usize, pairs: usize) -> [usize; 3] {
        // The alignment of the source does not matter.
        let run = |stream, first| HeadRun::<T> {
            source: without_provenance_mut::<T>(2 * size_of::<T>()),
            destination: without_provenance_mut(destination),
            source_stride: 1,
            destination_stride,
            heads: 3,
            pairs,
            first,
            continues: true,
            stream,
            ordinary: true,
        };
        assert_eq!(run(false, 0).stream_alignment(), 0);
        [0, 4, BLOCK].map(|first| run(true, first).stream_alignment())
    }

    #[test]
    fn heads_are_streamed_where_lines_or_vectors_begin() {
        assert_eq!(alignment::<f32>(4096, 128, 64), [64, 16, 64]);
        assert_eq!(alignment::<bf16>(4096, 128, 64), [64, 0, 64]);
        // One of the three is off: where the first head begins, the next, or a second member.
        assert_eq!(alignment::<f32>(4096 + 32, 128, 64), [16, 16, 16]);
        assert_eq!(alignment::<f32>(4096 + 16, 128, 64), [16, 16, 16]);
        assert_eq!(alignment::<f32>(4096 + 8, 128, 64), [0; 3]);
        assert_eq!(alignment::<f16>(4096 + 16, 128, 64), [16, 0, 16]);
        assert_eq!(alignment::<f32>(4096, 128 + 4, 64), [16, 16, 16]);
        assert_eq!(alignment::<f32>(4096, 128 + 2, 64), [0; 3]);
        assert_eq!(alignment::<f32>(4096, 80, 40), [16, 16, 16]);
        assert_eq!(alignment::<f16>(4096, 80, 40), [16, 0, 16]);
        assert_eq!(alignment::<f16>(4096, 64, 32), [64, 0, 64]);
        assert_eq!(alignment::<f16>(4096, 72, 36), [0; 3]);
        assert_eq!(alignment::<f32>(4096, 36, 18), [0; 3]);
        // Two of them are off, by as much.
        assert_eq!(alignment::<f32>(4096, 24, 8), [16, 16, 16]);
        assert_eq!(alignment::<f32>(4096, 64, 4), [16, 16, 16]);
        assert_eq!(alignment::<f32>(4096 + 32, 8, 8), [16, 16, 16]);
    }

    #[cfg(feature = "rayon")]
    #[test]
    fn wider_vectors_are_thought_to_be_faster() {
        for dtype in Dtype::ALL {
            let [scalar, neon, avx2, avx512, avx512bf16] =
                Isa::ALL.map(|isa| bytes_per_nanosecond(isa, dtype));
            assert!(0 < scalar && scalar < avx2 && avx2 < avx512);
            assert_eq!((neon, avx512bf16), (avx2, avx512));
        }
    }
}
