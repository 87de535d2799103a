//! Walks the tokens of a plan, on one thread or many, and hands each to the variant in use.

#[cfg(feature = "rayon")]
use super::Threads;
use super::{Host, Isa, Pointers, cache, variants};
use crate::angle::phase::Scale;
use crate::angle::{Angles, CosSinTable, OutOfRange};
use crate::element::Element;
use crate::plan::{Plan, PlannedTensor};
use crate::positions::{Positions, Token};
use std::ops::{Range, RangeInclusive};

/// Pairs whose cos and sin are formed at a time; they stay in the first-level cache.
pub(super) const BLOCK: usize = 128;

/// The largest ordinary factor. Its inverse is the smallest, for the larger of cos and sin.
const LARGEST_ORDINARY: f32 = 4096.0;

/// Bytes below which a call stays on the calling thread: less than waking another costs.
#[cfg(feature = "rayon")]
const BYTES_WORTH_A_THREAD: u64 = 1 << 20;

/// The angles of up to [`BLOCK`] pairs of a token.
#[repr(align(64))]
pub struct AngleBlock {
    pub(super) phases: [u64; BLOCK],
    pub(super) cos: [f32; BLOCK],
    pub(super) sin: [f32; BLOCK],
}

impl AngleBlock {
    pub(super) fn new() -> Self {
        Self {
            phases: [0; BLOCK],
            cos: [0.0; BLOCK],
            sin: [0.0; BLOCK],
        }
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

/// Pointers of q and k that threads share.
struct Shared<T>([Pointers<T>; 2]);

// SAFETY: threads work on disjoint tokens and heads. The plan proved, or its maker vouched, that no
// written element occurs twice, and that none is read for another token or head.
unsafe impl<T: Send + Sync> Sync for Shared<T> {}

/// Performs a plan.
///
/// # Safety
/// `pointers` (of q, of k) start buffers that reach as far as the plan's layouts, alive and
/// unaliased for the call except as the plan allows. `positions` have been checked.
pub(super) unsafe fn execute<T: Element>(
    host: Host,
    plan: &Plan,
    pointers: [Pointers<T>; 2],
    positions: &Positions<'_>,
) {
    if plan.is_empty() {
        return;
    }
    let shared = &Shared(pointers);
    let tokens = plan.batch * plan.sequence;
    #[cfg(feature = "rayon")]
    if host.threads == Threads::Pool && plan.bytes() >= BYTES_WORTH_A_THREAD {
        let threads = rayon::current_num_threads();
        if threads > 1 {
            use rayon::prelude::*;
            // A few parts per thread even out their speeds; heads are split only where tokens do
            // not suffice, as each part forms the angles of its tokens.
            let parts = 4 * threads;
            let token_parts = parts.min(tokens);
            let head_parts = parts.div_ceil(token_parts);
            (0..token_parts * head_parts)
                .into_par_iter()
                .for_each(|part| {
                    let (token_part, head_part) = (part / head_parts, part % head_parts);
                    let share = Share {
                        tokens: split(tokens, token_parts, token_part),
                        head_part,
                        head_parts,
                    };
                    // SAFETY: the caller's; the shares do not overlap.
                    unsafe { execute_share(host.isa, plan, shared, positions, share) };
                });
            return;
        }
    }
    let share = Share {
        tokens: 0..tokens,
        head_part: 0,
        head_parts: 1,
    };
    // SAFETY: the caller's.
    unsafe { execute_share(host.isa, plan, shared, positions, share) };
}

/// What one thread does: all heads, or a part of them, of some tokens.
struct Share {
    tokens: Range<usize>,
    head_part: usize,
    head_parts: usize,
}

/// Part `part` of `parts` nearly equal parts of `0..n`.
fn split(n: usize, parts: usize, part: usize) -> Range<usize> {
    let bound = |i: usize| (n as u128 * i as u128 / parts as u128) as usize;
    bound(part)..bound(part + 1)
}

/// # Safety
/// That of [`execute`]; no other thread has the same tokens and heads.
unsafe fn execute_share<T: Element>(
    isa: Isa,
    plan: &Plan,
    shared: &Shared<T>,
    positions: &Positions<'_>,
    share: Share,
) {
    let mut angles = AngleBlock::new();
    let mut formed = None;
    let pairs = plan.rope.angles().pairs();
    let pairings = plan.rope.pairings();
    let stream = plan.bytes() >= cache::last_level() as u64 / 2;
    for token in share.tokens {
        let (b, s) = (token / plan.sequence, token % plan.sequence);
        let row = Row::at(plan, positions, plan.token(b, s));
        let heads_of = |planned: &PlannedTensor| {
            split(planned.source.shape()[2], share.head_parts, share.head_part)
        };
        for (planned, pointers) in [&plan.q, &plan.k].into_iter().zip(&shared.0) {
            let Some(planned) = planned else { continue };
            // Whole heads, though some dims are written again: fewer and longer copies.
            if planned.in_place || (row.is_some() && 2 * pairs == planned.source.shape()[3]) {
                continue;
            }
            // SAFETY: the indices are inside the layouts, which lie inside the buffers; source and
            // destination do not overlap, because the plan is out of place.
            unsafe { copy_heads(planned, pointers, (b, s), heads_of(planned)) };
        }
        for first in (0..pairs).step_by(BLOCK) {
            let Some(row) = &row else { break };
            let block = BLOCK.min(pairs - first);
            row.form(isa, first..first + block, &mut formed, &mut angles);
            for (planned, pointers) in [&plan.q, &plan.k].into_iter().zip(&shared.0) {
                let Some(planned) = planned else { continue };
                let heads = heads_of(planned);
                if heads.is_empty() {
                    continue;
                }
                let (source, destination) = (&planned.source, &planned.destination);
                let window = source.rotary_offset();
                // SAFETY: the indices are inside the layouts, which lie inside the buffers.
                let run = unsafe {
                    HeadRun {
                        source: pointers
                            .source
                            .add(source.index(b, s, heads.start) + window),
                        destination: pointers
                            .destination
                            .add(destination.index(b, s, heads.start) + window),
                        source_stride: source.strides()[2],
                        destination_stride: destination.strides()[2],
                        heads: heads.len(),
                        pairs,
                        first,
                        continues: source.strides()[1]
                            == source.strides()[2].wrapping_mul(source.shape()[2]),
                        // Lines that are written in part would be read before.
                        stream: stream && !planned.in_place && 2 * pairs == source.shape()[3],
                        ordinary: row.ordinary,
                    }
                };
                // SAFETY: as above; the variant was checked when it was chosen.
                unsafe { T::rotate_heads(isa, pairings, &run, &angles, block) };
            }
        }
    }
    if stream {
        variants::fence();
    }
}

/// Copies heads of a token.
///
/// # Safety
/// The token and the heads are inside the layouts, which lie inside the buffers, which do not overlap.
unsafe fn copy_heads<T>(
    planned: &PlannedTensor,
    pointers: &Pointers<T>,
    (b, s): (usize, usize),
    heads: Range<usize>,
) {
    let (source, destination) = (&planned.source, &planned.destination);
    let head_dim = source.shape()[3];
    let dense = source.strides()[2] == head_dim && destination.strides()[2] == head_dim;
    let (step, len) = match dense {
        true => (heads.len().max(1), heads.len() * head_dim),
        false => (1, head_dim),
    };
    for h in heads.step_by(step) {
        // SAFETY: the caller's.
        unsafe {
            std::ptr::copy_nonoverlapping(
                pointers.source.add(source.index(b, s, h)),
                pointers.destination.add(destination.index(b, s, h)),
                len,
            );
        }
    }
}

/// Whether factors are ordinary where the larger of each cos and sin is in this range. What that is
/// for: see `Straight` in vector.rs.
fn is_ordinary(magnitudes: RangeInclusive<f32>) -> bool {
    *magnitudes.start() >= 1.0 / LARGEST_ORDINARY && *magnitudes.end() <= LARGEST_ORDINARY
}

/// The angles of one token.
struct Row<'a> {
    source: Source<'a>,
    scale: Scale,
    /// As in [`HeadRun`].
    ordinary: bool,
}

enum Source<'a> {
    /// One step per pair.
    Exact {
        steps: &'a [u64],
        position: i64,
    },
    /// A step per axis and pair.
    Axes {
        steps: &'a [u64],
        pairs: usize,
        positions: &'a Positions<'a>,
        token: Token,
    },
    Table {
        cos: &'a [f32],
        sin: &'a [f32],
    },
}

impl<'a> Row<'a> {
    /// `None` where the token passes through.
    fn at(plan: &'a Plan, positions: &'a Positions<'a>, token: Token) -> Option<Self> {
        let angles = plan.rope.angles();
        let position = positions.at(0, token);
        let (steps, factor) = match angles {
            Angles::Exact(frequencies) => (frequencies.steps(), frequencies.attention_factor()),
            Angles::Rows(rows) => {
                let row = match rows.boundary() {
                    Some(boundary) => usize::from(position >= boundary),
                    None => positions.frequency_row_at(token) as usize,
                };
                (rows.row_steps(row), rows.attention_factors()[row])
            }
            Angles::Table(table) => {
                let source = Self::in_table(table, position)?;
                return Some(Row {
                    source,
                    scale: plan.rope.scale(1.0),
                    ordinary: is_ordinary(table.magnitudes()),
                });
            }
        };
        let source = if angles.axes() == 1 {
            Source::Exact { steps, position }
        } else {
            Source::Axes {
                steps,
                pairs: angles.pairs(),
                positions,
                token,
            }
        };
        // The larger of cos and sin is at least half of the square root of 2.
        let magnitudes = 0.7 * factor..=factor;
        Some(Row {
            source,
            scale: plan.rope.scale(factor),
            ordinary: is_ordinary(magnitudes),
        })
    }

    fn in_table(table: &'a CosSinTable, position: i64) -> Option<Source<'a>> {
        // A table has at least one row, and fits in memory.
        let last = table.rows() as i64 - 1;
        let row = position.clamp(0, last);
        if row != position && table.out_of_range() == OutOfRange::PassThrough {
            return None;
        }
        let start = row as usize * table.pairs();
        let range = start..start + table.pairs();
        Some(Source::Table {
            cos: &table.cos()[range.clone()],
            sin: &table.sin()[range],
        })
    }

    /// cos and sin of the pairs of `range`. `formed`: the steps and the position
    /// of the block's phases, if they are those of whole rows.
    fn form(
        &self,
        isa: Isa,
        range: Range<usize>,
        formed: &mut Option<(*const u64, i64)>,
        angles: &mut AngleBlock,
    ) {
        let pairs = range.len();
        // SAFETY: at most `BLOCK` steps; the variant was checked when it was chosen.
        let form = |steps: &[u64], phases, angles: &mut AngleBlock| unsafe {
            variants::form(isa, steps, phases, self.scale, angles);
        };
        match self.source {
            Source::Exact { steps, position } => {
                let phases = match *formed {
                    Some(before) if before == (steps.as_ptr(), position.wrapping_sub(1)) => {
                        Phases::Next
                    }
                    _ => Phases::At(position),
                };
                *formed = (pairs == steps.len()).then_some((steps.as_ptr(), position));
                form(&steps[range], phases, angles);
            }
            Source::Axes {
                steps,
                pairs: stride,
                positions,
                token,
            } => {
                let mut phases = [0u64; BLOCK];
                for (axis, steps) in steps.chunks_exact(stride).enumerate() {
                    let position = positions.at(axis, token) as u64;
                    for (phase, step) in phases.iter_mut().zip(&steps[range.clone()]) {
                        *phase = phase.wrapping_add(step.wrapping_mul(position));
                    }
                }
                // A phase is a step at position 1.
                form(&phases[..pairs], Phases::At(1), angles);
            }
            Source::Table { cos, sin } => {
                angles.cos[..pairs].copy_from_slice(&cos[range.clone()]);
                for (to, &from) in angles.sin.iter_mut().zip(&sin[range]) {
                    *to = self.scale.turned(from);
                }
            }
        }
    }
}
