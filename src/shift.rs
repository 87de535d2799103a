//! Cached keys that are moved to other positions where they are.

use crate::cache::{CacheLayout, KvCacheLayout};
use crate::call::{Addresses, AngleAddresses, Call, RawPositions, TensorAddresses};
use crate::codes::StoredCodes;
use crate::element::Dtype;
use crate::error::TensorName;
use crate::host::HostBytes;
use crate::layout::Layout;
use crate::plan::{self, Plan, Problem};
use crate::step::ByteSpan;
use crate::{Angles, Error, Rope};

/// Slots whose keys move by one distance.
///
/// Slots are numbered through, as in a slot mapping: slot `n` is slot `n % page_size` of page
/// `n / page_size`. So a sequence in pages is a range for each run of pages that follow each other.
///
/// The ranges of a call may come in any order. Those that share slots, as the pages of a common prefix are
/// named by every sequence that has it, must move them by the same distance and row, and then move them
/// once; otherwise the call is refused ([`Error::SlotRangesDiffer`]). A call cannot know of sequences that
/// it is not told of, to which a slot may belong too.
///
/// ```
/// use phasor::SlotRange;
///
/// // Two sequences drop 512 tokens. Pages of 16; page 7 is in both.
/// let pages = [[7, 3], [7, 12]];
/// let ranges = pages.as_flattened().iter().map(|page| SlotRange::new(16 * page..16 * (page + 1), -512));
/// # let _ = ranges;
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotRange<'a> {
    first: usize,
    end: usize,
    distance: Distance<'a>,
    row: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Distance<'a> {
    AllAxes(i64),
    PerAxis(&'a [i64]),
}

impl<'a> SlotRange<'a> {
    /// Moves by `distance = new position - old position`, the same on all axes of a position. By 0 nothing
    /// is done.
    pub const fn new(slots: std::ops::Range<usize>, distance: i64) -> Self {
        Self {
            first: slots.start,
            end: slots.end,
            distance: Distance::AllAxes(distance),
            row: None,
        }
    }

    /// Moves by a distance on each axis, `[axes]`.
    pub const fn per_axis(slots: std::ops::Range<usize>, distances: &'a [i64]) -> Self {
        let mut range = Self::new(slots, 0);
        range.distance = Distance::PerAxis(distances);
        range
    }

    /// The row of frequencies that the keys were rotated by, where the rotation has
    /// [rows](crate::FrequencyRows).
    pub const fn frequency_row(mut self, row: u32) -> Self {
        self.row = Some(row);
        self
    }

    pub(crate) fn distance_on(&self, axis: usize) -> i64 {
        match self.distance {
            Distance::AllAxes(distance) => distance,
            // There is one for each axis, as has been checked.
            Distance::PerAxis(distances) => distances[axis],
        }
    }
}

/// Slots without a gap that move alike, and move.
pub(crate) type Run<'a> = SlotRange<'a>;

impl Run<'_> {
    pub(crate) fn slots(&self) -> std::ops::Range<usize> {
        self.first..self.end
    }

    pub(crate) fn row(&self) -> usize {
        self.row.unwrap_or_default() as usize
    }
}

/// The scales of cached keys that are codes, in host memory.
#[derive(Debug)]
pub enum KeyScales<'a> {
    /// There are none, or they lie in the cache.
    None,
    /// Those of [`StoredCodes::given`]: one for all heads, or one for each.
    Given(&'a [f32]),
    /// The buffer of those of [`StoredCodes::dynamic`], which are read and written.
    Written(HostBytes<'a>),
}

/// Cached keys that can be moved, checked once, for any number of calls: `HostRotator::shift_plan` and
/// `CudaRotator::shift_plan` make it.
#[derive(Clone, Debug)]
pub struct ShiftPlan {
    pub(crate) rope: Rope,
    pub(crate) dtype: Dtype,
    pub(crate) layout: CacheLayout,
    pub(crate) codes: Option<StoredCodes>,
    pub(crate) rotary_offset: usize,
    /// The rotation of all slots, of which kernels do windows; or why they do not.
    windows: Result<Plan, Error>,
}

impl ShiftPlan {
    /// Checks the keys of a cache for `rope`, which is one of [`Rope::shift`]. `dtype` is the type of
    /// elements, and what codes with [`StoredCodes::round_first`] round to. Backends call this through
    /// their own `shift_plan`.
    ///
    /// # Errors
    /// [`Error::Shift`] and [`Error::NotAShift`] for the rotation, [`Error::CacheMissing`] for a cache
    /// without keys, [`Error::RotaryWindow`]; and, as when it is planned for storing,
    /// [`Error::CacheBlocks`], [`Error::CacheTooLarge`], [`Error::CodeGroups`],
    /// [`Error::ScalesNotPowers`], [`Error::SelfOverlap`], [`Error::Overlap`] and
    /// [`Error::OverlapUnknown`].
    pub fn new(
        rope: &Rope,
        dtype: Dtype,
        cache: &KvCacheLayout,
        rotary_offset: usize,
    ) -> Result<Self, Error> {
        check_rope(rope)?;
        let Some(layout) = cache.k else {
            return Err(Error::CacheMissing {
                tensor: TensorName::K,
                what: "there are only values, which do not rotate: give the keys' layout",
            });
        };
        let [pages, page_size, heads, head_dim] = layout.shape();
        Layout::tokens(1, heads, head_dim)
            .with_rotary_offset(rotary_offset)
            .check_rotary(rope.rotary_dim(), TensorName::K)?;
        plan::check_keys(cache, dtype)?;
        let codes = cache.codes[0];
        let windows = || {
            let what = match (codes, layout.is_dense()) {
                (Some(_), _) => "8-bit codes",
                (_, false) => "heads in blocks",
                (None, true) => {
                    let (batch, tokens) = match is_flat(&layout) {
                        true => (1, pages * page_size),
                        false => (pages, page_size),
                    };
                    let slots = Layout::bshd(batch, tokens, heads, head_dim)
                        .with_strides(layout.page_stride, layout.slot_stride, layout.head_stride)
                        .with_offset(layout.offset)
                        .with_rotary_offset(rotary_offset);
                    return Plan::new(rope, &Problem::new(dtype).k(slots));
                }
            };
            Err(Error::ShiftOnHost { what })
        };
        Ok(Self {
            rope: rope.clone(),
            dtype,
            layout,
            codes,
            rotary_offset,
            windows: windows(),
        })
    }

    /// The rotation that this plan was made for.
    pub fn rope(&self) -> &Rope {
        &self.rope
    }

    /// Slots of the cache.
    pub fn slots(&self) -> usize {
        self.layout.pages * self.layout.page_size
    }

    /// The plan can be executed by kernels.
    ///
    /// # Errors
    /// [`Error::ShiftOnHost`] if it cannot, [`Error::LayoutTooLarge`] if the cache has too many slots.
    pub fn check_device(&self) -> Result<(), Error> {
        self.windows.as_ref().map(|_| ()).map_err(Clone::clone)
    }

    /// The calls that move the keys of a cache whose buffer is at an address, the layout's offset being
    /// added to it: plain rotations in place, in any order. A run of ranges without a gap takes one where
    /// pages follow each other like their slots, and at most three elsewhere.
    ///
    /// # Errors
    /// [`Error::SlotRange`], [`Error::SlotRangesDiffer`], [`Error::ShiftAxes`], [`Error::FrequencyRows`],
    /// [`Error::FrequencyRowOutOfRange`]; those of [`check_device`](Self::check_device), and
    /// [`Error::ShiftOnHost`] for distances that differ by axis.
    pub fn calls(
        &self,
        cache: u64,
        angles: AngleAddresses,
        ranges: &[SlotRange<'_>],
    ) -> Result<Vec<Call>, Error> {
        let runs = self.runs(ranges)?;
        let all = self.windows.as_ref().map_err(Clone::clone)?;
        let axes = self.rope.angles().axes();
        let mut calls = Vec::new();
        for run in &runs {
            let distance = run.distance_on(0);
            if (1..axes).any(|axis| run.distance_on(axis) != distance) {
                return Err(Error::ShiftOnHost {
                    what: "distances that differ by axis",
                });
            }
            let mut positions = RawPositions::start(distance);
            if let Some(row) = run.row {
                positions = positions.frequency_row(row);
            }
            for window in self.windows_of(run) {
                let offset = window.offset as u64 * self.dtype.size() as u64;
                let at = cache.wrapping_add(offset);
                let part = all
                    .first_sequences(window.pages)?
                    .first_tokens(window.slots)?;
                let call = part.call(&Addresses {
                    q: TensorAddresses::default(),
                    k: TensorAddresses {
                        source: at,
                        destination: at,
                    },
                    v: TensorAddresses::default(),
                    angles,
                    positions,
                    cache: None,
                    stages: Default::default(),
                })?;
                calls.extend(call.map(|mut call| {
                    // All slots move by the same distance.
                    call.params.positions.advance = 0;
                    call
                }));
            }
        }
        Ok(calls)
    }

    /// Ranges as runs in ascending order, each slot in one of them.
    pub(crate) fn runs<'a>(&self, ranges: &[SlotRange<'a>]) -> Result<Vec<Run<'a>>, Error> {
        let axes = self.rope.angles().axes();
        let alike = |a: &Run, b: &Run| {
            a.row == b.row && (0..axes).all(|axis| a.distance_on(axis) == b.distance_on(axis))
        };
        for range in ranges {
            self.check(range)?;
        }
        let some = ranges.iter().filter(|range| range.first < range.end);
        let mut sorted: Vec<Run> = some.copied().collect();
        sorted.sort_unstable_by_key(|range| range.first);
        let mut runs: Vec<Run> = Vec::with_capacity(sorted.len());
        for range in sorted {
            match runs.last_mut() {
                Some(last) if range.first <= last.end && alike(last, &range) => {
                    last.end = last.end.max(range.end);
                }
                Some(last) if range.first < last.end => {
                    return Err(Error::SlotRangesDiffer { slot: range.first });
                }
                _ => runs.push(range),
            }
        }
        runs.retain(|run| (0..axes).any(|axis| run.distance_on(axis) != 0));
        Ok(runs)
    }

    /// A buffer holds what was planned, and reaches as far: elements, or codes and scales between them.
    pub(crate) fn check_cache(&self, buffer: ByteSpan) -> Result<(), Error> {
        let what = "k's cache";
        let (size, dtype) = match &self.codes {
            Some(_) => (1, None),
            None => (self.dtype.size(), Some(self.dtype)),
        };
        let got = buffer.room(what, size, dtype)?;
        // A planned cache has a length.
        let needed = plan::cache_len(&self.layout, self.codes.as_ref()).unwrap_or(usize::MAX);
        match got < needed {
            true => Err(Error::BufferTooShort { what, needed, got }),
            false => Ok(()),
        }
    }

    fn check(&self, range: &SlotRange<'_>) -> Result<(), Error> {
        let SlotRange { first, end, .. } = *range;
        let slots = self.slots();
        if first > end || end > slots {
            return Err(Error::SlotRange { first, end, slots });
        }
        let angles = self.rope.angles();
        if let Distance::PerAxis(distances) = range.distance
            && distances.len() != angles.axes()
        {
            return Err(Error::ShiftAxes {
                axes: angles.axes(),
                got: distances.len(),
            });
        }
        let what = match (angles, range.row) {
            (Angles::Rows(rows), Some(row)) if row as usize >= rows.rows() => {
                return Err(Error::FrequencyRowOutOfRange {
                    row: row.into(),
                    rows: rows.rows(),
                });
            }
            (Angles::Rows(_), None) => "say which one keys have, with SlotRange::frequency_row",
            (Angles::Exact(_), Some(_)) => {
                "the rotation has none to choose among: give ranges without"
            }
            _ => return Ok(()),
        };
        Err(Error::FrequencyRows { what })
    }

    /// A run as part of a page, whole pages, and part of a page.
    fn windows_of(&self, run: &Run) -> impl Iterator<Item = Window> + use<> {
        let layout = self.layout;
        let (mut at, end) = (run.first, run.end);
        std::iter::from_fn(move || {
            if at == end {
                return None;
            }
            let page_size = match is_flat(&layout) {
                true => usize::MAX,
                false => layout.page_size,
            };
            let (page, slot) = (at / page_size, at % page_size);
            let whole = (end - at) / page_size;
            let (pages, slots) = match whole > 0 && slot == 0 {
                true => (whole, page_size),
                false => (1, (end - at).min(page_size - slot)),
            };
            at += pages * slots;
            Some(Window {
                offset: page * layout.page_stride + slot * layout.slot_stride,
                pages,
                slots,
            })
        })
    }
}

/// Slots that are a part of a layout.
struct Window {
    /// Elements from the first slot of all.
    offset: usize,
    pages: usize,
    slots: usize,
}

/// Whether slots of the next page follow at the same distance.
fn is_flat(layout: &CacheLayout) -> bool {
    let page = layout.page_size.checked_mul(layout.slot_stride);
    layout.pages <= 1 || page == Some(layout.page_stride)
}

/// A rotation of which the cached keys have everything but the shift.
fn check_rope(rope: &Rope) -> Result<(), Error> {
    let plain = match rope.angles() {
        Angles::Exact(frequencies) => frequencies.attention_factor() == 1.0,
        Angles::Rows(rows) if rows.boundary().is_none() => {
            rows.attention_factors().iter().all(|&factor| factor == 1.0)
        }
        Angles::Rows(_) | Angles::Table(_) => false,
    };
    match plain && rope.pairing() == rope.output_pairing() {
        true => Ok(()),
        // Where there is none, it says why.
        false => rope.shift().and(Err(Error::NotAShift)),
    }
}
