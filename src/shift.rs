//! Cached keys that are moved to other positions where they are.

use crate::cache::{CacheLayout, KvCacheLayout};
use crate::call::{
    Addresses, AngleAddresses, CacheAddresses, Call, RawPositions, RawSlots, StageAddresses,
    TensorAddresses, VectorAddress,
};
use crate::codes::StoredCodes;
use crate::element::Dtype;
use crate::error::TensorName;
use crate::layout::Layout;
use crate::plan::{self, Plan, Problem};
use crate::step::{ByteSpan, HostMemory, Memory, Resolve};
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

/// The scales of cached keys that are codes.
pub enum KeyScalesIn<'a, M: Memory> {
    /// There are none, or they lie in the cache.
    None,
    /// Those of [`StoredCodes::given`]: one for all heads, or one for each.
    Given(M::Read<'a, f32>),
    /// The buffer of those of [`StoredCodes::dynamic`], which are read and written.
    Written(M::Bytes<'a>),
}

/// Scales in host memory.
pub type KeyScales<'a> = KeyScalesIn<'a, HostMemory>;

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
    windows: Result<Windows, Error>,
}

/// How kernels reach all slots.
#[derive(Clone, Debug)]
struct Windows {
    plan: Plan,
    /// The cache, as one page where that can be.
    layout: CacheLayout,
    codes: Option<StoredCodes>,
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
        let [.., heads, head_dim] = layout.shape();
        Layout::tokens(1, heads, head_dim)
            .with_rotary_offset(rotary_offset)
            .check_rotary(rope.rotary_dim(), TensorName::K)?;
        plan::check_keys(cache, dtype)?;
        let codes = cache.codes[0];
        Ok(Self {
            rope: rope.clone(),
            dtype,
            layout,
            codes,
            rotary_offset,
            windows: Windows::new(rope, dtype, layout, codes, rotary_offset),
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
    /// [`Error::LayoutTooLarge`] if the cache has too many slots.
    pub fn check_device(&self) -> Result<(), Error> {
        self.windows.as_ref().map(|_| ()).map_err(Clone::clone)
    }

    /// Whether kernels move keys inside of the cache: codes, or heads in blocks. Others rotate as tensors do.
    #[cfg(feature = "cuda")]
    pub(crate) fn is_in_cache(&self) -> bool {
        self.codes.is_some() || !self.layout.is_dense()
    }

    /// The calls that move the keys of a cache whose buffer is at an address, the layout's offset being
    /// added to it, in any order. A run of ranges without a gap takes one where pages (and scales, if there
    /// are any) follow each other like their slots, and at most three elsewhere. `scales` are those that are
    /// given, one or one for each head, or the buffer of those that are written.
    ///
    /// # Errors
    /// [`Error::SlotRange`], [`Error::SlotRangesDiffer`], [`Error::ShiftAxes`], [`Error::FrequencyRows`],
    /// [`Error::FrequencyRowOutOfRange`]; those of [`check_device`](Self::check_device),
    /// [`Error::ShiftOnHost`] for distances that differ by axis, [`Error::Stages`] and
    /// [`Error::StageLength`] for scales, [`Error::BufferUnaligned`] for scales that are not where an f32
    /// can be, and [`Error::StagesTooLarge`] for heads that do not fit in the shared memory of a block.
    pub fn calls(
        &self,
        cache: u64,
        scales: Option<VectorAddress>,
        angles: AngleAddresses,
        ranges: &[SlotRange<'_>],
    ) -> Result<Vec<Call>, Error> {
        self.check_scales(scales.is_some())?;
        let runs = self.runs(ranges)?;
        let windows = self.windows.as_ref().map_err(Clone::clone)?;
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
            for window in windows.of(run) {
                calls.extend(windows.call(&window, cache, scales, angles, positions)?);
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

    /// Scales are there if and only if a call brings them.
    pub(crate) fn check_scales(&self, given: bool) -> Result<(), Error> {
        let what = match (&self.codes, given) {
            (None, true) => "no codes are planned for these scales",
            (Some(codes), true) if !codes.has_scale_buffer() => {
                "scales lie in the cache: give no buffer for them"
            }
            (Some(codes), false) if codes.has_scale_buffer() => match codes.dynamic {
                Some(_) => "codes are planned: give the buffer of their scales, KeyScales::Written",
                None => "codes are planned: give their scales, KeyScales::Given",
            },
            _ => return Ok(()),
        };
        Err(Error::Stages {
            tensor: TensorName::K,
            what,
        })
    }

    /// Where the scales of a call are.
    pub(crate) fn scale_address<'g, M: Memory>(
        &self,
        scales: &'g mut KeyScalesIn<'_, M>,
        memory: &mut impl Resolve<'g, f32, M>,
    ) -> Result<Option<VectorAddress>, Error> {
        self.check_scales(!matches!(scales, KeyScalesIn::None))?;
        let Some(codes) = &self.codes else {
            return Ok(None);
        };
        let tensor = TensorName::K;
        let length = |what, expected, or, got| {
            Err(Error::StageLength {
                tensor,
                what,
                expected,
                or,
                got,
            })
        };
        let what = match (scales, codes.dynamic) {
            (KeyScalesIn::None, _) => return Ok(None),
            (KeyScalesIn::Given(scales), None) => {
                let given = memory.read(scales)?;
                let heads = self.layout.heads;
                if given.len != heads && given.len != 1 {
                    return length("scales", heads, Some(1).filter(|_| heads != 1), given.len);
                }
                return Ok(Some(VectorAddress {
                    address: given.address,
                    len: given.len,
                }));
            }
            (KeyScalesIn::Written(room), Some(dynamic)) => {
                let room = memory.bytes(room)?;
                let len = room.room("k's scales", dynamic.size(), None)?;
                // A planned cache's scales have a length.
                let bytes = codes.scale_bytes(&self.layout).unwrap_or(usize::MAX);
                if len < bytes / dynamic.size() {
                    return length("buffer of scales", bytes / dynamic.size(), None, len);
                }
                return Ok(Some(VectorAddress {
                    address: room.address,
                    len,
                }));
            }
            (KeyScalesIn::Given(_), Some(_)) => {
                "its scales are not given but written: use KeyScales::Written"
            }
            (KeyScalesIn::Written(_), None) => {
                "its scales are not written but given: use KeyScales::Given"
            }
        };
        Err(Error::Stages { tensor, what })
    }
}

impl Windows {
    fn new(
        rope: &Rope,
        dtype: Dtype,
        layout: CacheLayout,
        codes: Option<StoredCodes>,
        rotary_offset: usize,
    ) -> Result<Self, Error> {
        let (layout, codes) = in_one_page(layout, codes);
        let [pages, page_size, heads, head_dim] = layout.shape();
        let slots = Layout::bshd(pages, page_size, heads, head_dim);
        let plan = if codes.is_none() && layout.is_dense() {
            let slots = slots
                .with_strides(layout.page_stride, layout.slot_stride, layout.head_stride)
                .with_offset(layout.offset);
            let problem = Problem::new(dtype).k(slots.with_rotary_offset(rotary_offset));
            Plan::new(rope, &problem)?
        } else {
            let mut cache = KvCacheLayout::k(layout);
            if let Some(codes) = codes {
                cache = cache.with_k_codes(codes);
            }
            let problem = Problem::new(dtype)
                .k_to_cache(slots.with_rotary_offset(rotary_offset))
                .cache(cache);
            let mut plan = Plan::new(rope, &problem)?;
            let fusion = plan.fusion.get_or_insert_default();
            fusion.k = fusion.k.in_cache();
            plan
        };
        Ok(Self {
            plan,
            layout,
            codes,
        })
    }

    /// The call that moves the keys of a window.
    fn call(
        &self,
        window: &Window,
        cache: u64,
        scales: Option<VectorAddress>,
        angles: AngleAddresses,
        positions: RawPositions,
    ) -> Result<Option<Call>, Error> {
        let part = (self.plan)
            .first_sequences(window.pages)?
            .first_tokens(window.slots)?;
        let in_cache = self.plan.fusion.is_some();
        let size = match self.codes {
            Some(_) => 1,
            None => self.plan.dtype.size(),
        };
        let offset = window.offset(self.layout.page_stride, self.layout.slot_stride, size);
        let at = cache.wrapping_add(offset);
        let keys = match in_cache {
            true => TensorAddresses::default(),
            false => TensorAddresses {
                source: at,
                destination: at,
            },
        };
        let addresses = Addresses {
            q: TensorAddresses::default(),
            k: keys,
            v: TensorAddresses::default(),
            angles,
            positions,
            cache: in_cache.then_some(CacheAddresses {
                k: cache,
                v: 0,
                // Each page is a sequence.
                slots: RawSlots::sequences_from_the_first(),
                // No slot of a window is outside.
                report: 0,
            }),
            stages: in_cache.then(|| {
                let of_k = StageAddresses {
                    scales,
                    ..StageAddresses::default()
                };
                [StageAddresses::default(), of_k, StageAddresses::default()]
            }),
        };
        let Some(mut call) = part.call(&addresses)? else {
            return Ok(None);
        };
        let params = &mut call.params;
        // All slots move by the same distance.
        params.positions.advance = 0;
        if let Some(fusion) = &mut call.fusion {
            params.k_cache.address = params.k_cache.address.wrapping_add(offset);
            // As many as fit in a plan.
            (params.slots.pages, params.slots.page_size) =
                (window.pages as u32, window.slots as u32);
            if let Some(dynamic) = self.codes.and_then(|codes| codes.dynamic) {
                let at = dynamic.layout;
                let offset = window.offset(at.page, at.slot, dynamic.size());
                fusion.k.codes.scales = fusion.k.codes.scales.wrapping_add(offset);
            }
        }
        Ok(Some(call))
    }

    /// A run as part of a page, whole pages, and part of a page.
    fn of(&self, run: &Run) -> impl Iterator<Item = Window> + use<> {
        let page_size = self.layout.page_size;
        let (mut at, end) = (run.first, run.end);
        std::iter::from_fn(move || {
            if at == end {
                return None;
            }
            let (page, slot) = (at / page_size, at % page_size);
            let whole = (end - at) / page_size;
            let (pages, slots) = match whole > 0 && slot == 0 {
                true => (whole, page_size),
                false => (1, (end - at).min(page_size - slot)),
            };
            at += pages * slots;
            Some(Window {
                first: [page, slot],
                pages,
                slots,
            })
        })
    }
}

/// Slots that are a part of a layout.
struct Window {
    /// The page and the slot of the first.
    first: [usize; 2],
    pages: usize,
    slots: usize,
}

impl Window {
    /// Bytes from what is of the first slot of all, where strides count values of `size` bytes. They are
    /// those of a planned cache, which fits in memory.
    fn offset(&self, page: usize, slot: usize, size: usize) -> u64 {
        let at = |n: usize, stride: usize| n.wrapping_mul(stride);
        (at(self.first[0], page).wrapping_add(at(self.first[1], slot))).wrapping_mul(size) as u64
    }
}

/// A cache as one page, where slots of the next page, and scales, follow at the same distance; else as it is.
fn in_one_page(
    layout: CacheLayout,
    codes: Option<StoredCodes>,
) -> (CacheLayout, Option<StoredCodes>) {
    let (mut joined, mut joined_codes) = (layout, codes);
    let [pages, page_size, ..] = layout.shape();
    // The distance of slots, if it is one.
    let distance = |page: usize, slot: usize| match page_size {
        _ if pages <= 1 => Some(slot),
        1 => Some(page),
        _ => (page_size.checked_mul(slot) == Some(page)).then_some(slot),
    };
    let Some(slot_stride) = distance(layout.page_stride, layout.slot_stride) else {
        return (layout, codes);
    };
    joined.slot_stride = slot_stride;
    if let Some(dynamic) = joined_codes
        .as_mut()
        .and_then(|codes| codes.dynamic.as_mut())
    {
        let Some(slot) = distance(dynamic.layout.page, dynamic.layout.slot) else {
            return (layout, codes);
        };
        dynamic.layout.slot = slot;
    }
    (joined.pages, joined.page_size) = (pages.min(1), pages * page_size);
    (joined, joined_codes)
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
