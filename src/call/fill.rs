//! A plan and addresses make a call.

use super::{
    Addresses, AngleAddresses, Call, PHASOR_IDS_I32, PHASOR_IDS_I64, PHASOR_IDS_NONE,
    PHASOR_IDS_U32, PHASOR_OUT_OF_RANGE_CLAMP, PHASOR_OUT_OF_RANGE_PASS_THROUGH,
    PHASOR_ROW_AT_POSITION, PHASOR_ROW_BY_POSITION, PHASOR_ROW_IDS, PHASOR_ROW_OF_CALL,
    PHASOR_ROW_ONLY, PHASOR_SLOT_IDS, PHASOR_SLOT_PAGE_INDICES, PHASOR_SLOT_PAGE_TABLE,
    PHASOR_SLOT_SEQUENCE, PhasorAngles, PhasorCache, PhasorCall, PhasorIds, PhasorOutput,
    PhasorPairing, PhasorPositions, PhasorRows, PhasorSequences, PhasorStream, PhasorTable,
    PhasorView, RawPositions, Stream,
};
use crate::cache::{CacheLayout, KvCacheLayout, SlotChoice};
use crate::element::Dtype;
use crate::error::TensorName;
use crate::ids::{IdType, Ids};
use crate::launch::{self, MOST_CARRIED_DIMS};
use crate::layout::Layout;
use crate::plan::{Plan, PlannedTensor};
use crate::positions::{FrequencyRowKind, PositionKind};
use crate::rope::{Direction, Pairing, Rope};
use crate::{Angles, Error, OutOfRange};

impl Plan {
    /// The call that performs this plan on the given addresses; `None` if there is nothing to
    /// rotate. Allocates nothing, and reads nothing at the addresses.
    ///
    /// # Errors
    /// [`Error::PositionsLength`], [`Error::FrequencyRowsLength`], [`Error::FrequencyRows`] if rows are
    /// chosen where there are none or the other way round, [`Error::FrequencyRowOutOfRange`],
    /// [`Error::PositionOutOfRange`] for a start that a table with [`OutOfRange::Error`] refuses,
    /// [`Error::DevicePositionsUnchecked`] for ids with such a table, as they are not seen here, and
    /// [`Error::PlanMismatch`] if the angle addresses are not of the plan's angle source; for a call that
    /// appends, [`Error::LayoutTooLarge`] for heads of more than 8 million dims; for one with stages,
    /// [`Error::Stages`] and [`Error::StageLength`] if what they need is missing or of another length,
    /// [`Error::StagesTooLarge`] for heads that do not fit in the shared memory of a block, and
    /// [`Error::BufferUnaligned`] for scales that are not where an f32 can be.
    pub fn call(&self, addresses: &Addresses) -> Result<Option<Call>, Error> {
        let refuses = matches!(self.rope.angles(), Angles::Table(table)
            if table.out_of_range() == OutOfRange::Error);
        let positions = &addresses.positions;
        if refuses && (positions.ids().is_some() || positions.as_cu_seqlens().is_some()) {
            return Err(Error::DevicePositionsUnchecked);
        }
        let mut call = self.unfilled();
        if !self.fill(addresses, &mut call.params)? {
            return Ok(None);
        }
        self.fill_fusion(addresses, &mut call.fusion)?;
        if let Some(fusion) = &call.fusion {
            launch::check_stages(&call.params, fusion)?;
        } else if !call.params.rotates_only() {
            let streams = call.params.streams();
            let too_wide = |stream: &Stream| stream.output.head_dim > MOST_CARRIED_DIMS;
            if let Some(n) = streams.iter().position(too_wide) {
                let tensor = [TensorName::Q, TensorName::K, TensorName::V][n];
                return Err(Error::LayoutTooLarge { tensor });
            }
        }
        Ok(Some(call))
    }

    /// What the plan knows of its calls.
    pub(crate) fn unfilled(&self) -> Call {
        Call {
            dtype: self.dtype,
            params: self.template,
            fusion: None,
        }
    }

    /// Fills in the rest where ids are in host memory, and checked. Returns whether there is anything to do.
    ///
    /// # Safety
    /// All ids are there.
    pub(crate) unsafe fn fill_on_host(
        &self,
        addresses: &Addresses,
        call: &mut Call,
    ) -> Result<bool, Error> {
        let params = &mut call.params;
        let something = self.fill(addresses, params)?;
        self.fill_fusion(addresses, &mut call.fusion)?;
        let positions = &addresses.positions;
        // SAFETY: the caller's.
        let values = |ids: &Ids<u64>| {
            let at = PhasorIds::of(ids, 0, 1);
            (0..ids.len() as u32).map(move |n| unsafe { at.at(0, n, 0) })
        };
        if let Some(offsets) = positions.as_cu_seqlens() {
            check_offsets(values(offsets), self.tokens)?;
        }
        // Where there is nothing to rotate, rows must be right all the same.
        if let Some(rows) = positions.frequency_row_ids() {
            values(rows).try_for_each(|row| self.check_row(row))?;
        }
        if something
            && let Angles::Table(table) = self.rope.angles()
            && table.out_of_range() == OutOfRange::Error
            && (positions.ids().is_some() || positions.as_cu_seqlens().is_some())
        {
            let params = &*params;
            self.check_in_table(table.rows(), |b, t| {
                let (b, t) = self.in_call(b, t);
                // SAFETY: the caller's.
                unsafe {
                    let token = params.token(b, t)?;
                    Some(params.positions.at(0, &token))
                }
            })?;
        }
        Ok(something)
    }

    /// Tokens from one sequence to the next, where there is something for each token.
    fn tokens_apart(&self, given: &RawPositions) -> usize {
        match given.as_cu_seqlens() {
            Some(_) => 0,
            None => self.tokens,
        }
    }

    /// Tokens of the whole batch. A plan without elements may have any shape.
    fn all_tokens(&self) -> usize {
        self.batch.saturating_mul(self.tokens)
    }

    /// How many sequences there are: those of a ragged batch, or the plan's.
    fn sequences(&self, given: &RawPositions) -> Result<usize, Error> {
        let Some(offsets) = given.as_cu_seqlens() else {
            return Ok(self.batch);
        };
        if self.batch != 1 {
            return Err(Error::CuSeqlens {
                what: "a ragged batch is planned as one sequence of all its tokens",
            });
        }
        offsets.len().checked_sub(1).ok_or(Error::CuSeqlens {
            what: "there must be one more than sequences, and so at least one",
        })
    }

    fn sequence_params(&self, given: &RawPositions) -> Result<PhasorSequences, Error> {
        let Some(offsets) = given.as_cu_seqlens() else {
            return Ok(PhasorSequences {
                each_token: u32::from(self.tokens == 1),
                ..PhasorSequences::default()
            });
        };
        // Kernels count sequences as they do tokens.
        let Ok(count) = i32::try_from(self.sequences(given)?) else {
            return Err(Error::CuSeqlens {
                what: "there must be fewer than 2^31 sequences",
            });
        };
        Ok(PhasorSequences {
            offsets: PhasorIds::of(offsets, 1, 0),
            count: count as u32,
            each_token: 0,
        })
    }

    /// The sequence and token of a call that are those of this plan. Where each sequence has one token, as
    /// in decoding, a call has them as the tokens of one sequence.
    fn in_call(&self, b: u32, t: u32) -> (u32, u32) {
        match self.tokens {
            1 => (0, b),
            _ => (b, t),
        }
    }

    #[inline]
    fn fill(&self, addresses: &Addresses, params: &mut PhasorCall) -> Result<bool, Error> {
        params.positions = self.position_params(&addresses.positions)?;
        params.rows = self.row_params(&addresses.positions)?;
        params.sequences = self.sequence_params(&addresses.positions)?;
        match addresses.positions.frequency_row_kind() {
            // As the plan has it.
            FrequencyRowKind::None => {}
            FrequencyRowKind::Call => params.angles.row_choice = PHASOR_ROW_OF_CALL,
            FrequencyRowKind::PerSequence | FrequencyRowKind::PerToken => {
                params.angles.row_choice = PHASOR_ROW_IDS;
            }
        }
        match (self.rope.angles(), addresses.angles) {
            (Angles::Exact(_) | Angles::Rows(_), AngleAddresses::Steps { steps, factors }) => {
                params.angles.steps = steps;
                params.rows.factors = factors;
            }
            (Angles::Table(_), AngleAddresses::Table { cos, sin }) => {
                params.table = PhasorTable { cos, sin };
            }
            (Angles::Table(table), AngleAddresses::TableOfCall { cos, sin, rows })
                if table.out_of_range() != OutOfRange::Error =>
            {
                params.table = PhasorTable { cos, sin };
                params.rows.count = rows.get();
            }
            _ => return Err(Error::PlanMismatch),
        }
        // Without a sequence, all tokens are padding.
        if self.is_empty() || self.sequences(&addresses.positions)? == 0 {
            return Ok(false);
        }
        self.cache_params(addresses, params)?;
        for (stream, output, at) in [
            (&mut params.q, &mut params.q_output, addresses.q),
            (&mut params.k, &mut params.k_output, addresses.k),
            (&mut params.v, &mut params.v_output, addresses.v),
        ] {
            let source = match output.in_place {
                0 => at.source,
                _ => at.destination,
            };
            stream.source.address = source.wrapping_add(stream.source.address);
            output.destination.address = at.destination.wrapping_add(output.destination.address);
        }
        Ok(true)
    }

    #[inline]
    fn position_params(&self, given: &RawPositions) -> Result<PhasorPositions, Error> {
        let kind = given.kind();
        let got = given.ids().map_or(0, Ids::len);
        let axes = self.rope.angles().axes();
        let sequences = self.sequences(given)?;
        let expected = kind.expected_len(axes, sequences, self.tokens, self.all_tokens());
        if got != expected {
            return Err(Error::PositionsLength {
                expected,
                got,
                kind,
            });
        }
        let start = given.as_start().unwrap_or_default();
        let advance = match kind {
            // Nothing advances along a sequence of one.
            PositionKind::Start | PositionKind::StartPerSequence => {
                i64::from(self.tokens != 1 || given.as_cu_seqlens().is_some())
            }
            _ => 0,
        };
        let tokens_apart = self.tokens_apart(given);
        let (batch, token) = match kind {
            PositionKind::Start => (0, 0),
            PositionKind::StartPerSequence | PositionKind::PerSequence => (1, 0),
            PositionKind::PerToken | PositionKind::PerAxis => (tokens_apart, 1),
            PositionKind::PerTokenShared => (0, 1),
        };
        let axis_stride = match (kind, given.ids()) {
            (PositionKind::PerAxis, Some(ids)) => {
                let tokens = self.batch.wrapping_mul(self.tokens);
                tokens.wrapping_mul(ids.id_type().size()) as i64
            }
            _ => 0,
        };
        if let (Some(start), None) = (given.as_start(), given.as_cu_seqlens()) {
            self.check_start(start)?;
        }
        Ok(PhasorPositions {
            start,
            advance,
            axis_stride,
            ids: self.id_params(given, given.ids(), batch, token),
        })
    }

    /// The positions from a start on are inside the table, where it refuses others.
    fn check_start(&self, start: i64) -> Result<(), Error> {
        let Angles::Table(table) = self.rope.angles() else {
            return Ok(());
        };
        if table.out_of_range() != OutOfRange::Error || self.is_empty() {
            return Ok(());
        }
        // The usual case at no cost: this runs at every call.
        let end = usize::try_from(start)
            .ok()
            .and_then(|start| start.checked_add(self.tokens));
        if end.is_some_and(|end| end <= table.rows()) {
            return Ok(());
        }
        self.check_in_table(table.rows(), |_, t| Some(start.wrapping_add(i64::from(t))))
    }

    /// Where a token has a position, the table has it.
    fn check_in_table(
        &self,
        rows: usize,
        position: impl Fn(u32, u32) -> Option<i64>,
    ) -> Result<(), Error> {
        for batch in 0..self.batch {
            for token in 0..self.tokens {
                let Some(position) = position(batch as u32, token as u32) else {
                    continue;
                };
                if position < 0 || position as u64 >= rows as u64 {
                    return Err(Error::PositionOutOfRange {
                        position,
                        batch,
                        token,
                        rows,
                    });
                }
            }
        }
        Ok(())
    }

    #[inline]
    fn row_params(&self, given: &RawPositions) -> Result<PhasorRows, Error> {
        let kind = given.frequency_row_kind();
        let angles = self.rope.angles();
        let to_choose = matches!(angles, Angles::Rows(rows) if rows.boundary().is_none());
        match (to_choose, kind) {
            (true, FrequencyRowKind::None) => {
                return Err(Error::FrequencyRows {
                    what: "say which ones a call uses, with Positions::frequency_row, \
                           frequency_rows_per_sequence or frequency_rows_per_token",
                });
            }
            (true, _) | (false, FrequencyRowKind::None) => {}
            (false, _) => {
                return Err(Error::FrequencyRows {
                    what: "the rotation has none that a call could choose among: give positions \
                           without frequency rows",
                });
            }
        }
        let got = given.frequency_row_ids().map_or(0, Ids::len);
        let expected = kind.expected_len(self.sequences(given)?, self.all_tokens());
        if got != expected {
            return Err(Error::FrequencyRowsLength {
                expected,
                got,
                kind,
            });
        }
        let (count, boundary) = match angles {
            Angles::Exact(_) => (1, None),
            Angles::Rows(rows) => (rows.rows(), rows.boundary()),
            Angles::Table(table) => (table.rows(), None),
        };
        let (batch, token) = match kind {
            FrequencyRowKind::PerToken => (self.tokens_apart(given), 1),
            _ => (1, 0),
        };
        let row = given.as_frequency_row().unwrap_or_default();
        self.check_row(i64::from(row))?;
        Ok(PhasorRows {
            factors: 0,
            boundary: boundary.unwrap_or_default(),
            ids: self.id_params(given, given.frequency_row_ids(), batch, token),
            // Neither rows nor a table have more.
            count: count as u32,
            row,
        })
    }

    /// Strides are given in values, and are those of [`in_call`](Self::in_call).
    #[inline]
    fn id_params(
        &self,
        given: &RawPositions,
        ids: Option<&Ids<u64>>,
        batch: usize,
        token: usize,
    ) -> PhasorIds {
        match (ids, self.tokens) {
            (None, _) => NO_IDS,
            (Some(ids), 1) if given.as_cu_seqlens().is_none() => PhasorIds::of(ids, 0, batch),
            (Some(ids), _) => PhasorIds::of(ids, batch, token),
        }
    }

    /// The caches and slots of a call.
    fn cache_params(&self, addresses: &Addresses, params: &mut PhasorCall) -> Result<(), Error> {
        let Some(layout) = &self.cache else {
            return match addresses.cache {
                None => Ok(()),
                Some(_) => Err(Error::AppendMismatch {
                    planned: "has no cache",
                    remedy: "call rotate, or plan with Problem::cache",
                }),
            };
        };
        let Some(given) = &addresses.cache else {
            return Err(Error::AppendMismatch {
                planned: "has a cache",
                remedy: "call append",
            });
        };
        for (cache, address) in [
            (&mut params.k_cache, given.k),
            (&mut params.v_cache, given.v),
        ] {
            cache.address = address.wrapping_add(cache.address);
        }
        let sequences = self.sequences(&addresses.positions)?;
        let tokens = self.all_tokens();
        let expect = |what, ids: &Ids<u64>, expected: usize| match ids.len() {
            got if got == expected => Ok(()),
            got => Err(Error::SlotsLength {
                what,
                expected,
                got,
            }),
        };
        let lengths_of = |lengths: &Ids<u64>| {
            expect("cache lengths, one per sequence", lengths, sequences)?;
            Ok(PhasorIds::of(lengths, 1, 0))
        };
        let slots = &mut params.slots;
        // A plan's cache has as many pages and slots as fit. Those without slots are no pages.
        let [pages, page_size] = match layout.counts() {
            [_, 0] => [0, 1],
            counts => counts.map(|n| n as u32),
        };
        (slots.pages, slots.page_size, slots.report) = (pages, page_size, given.report);
        match &given.slots.choice {
            SlotChoice::Mapping(ids) => {
                expect("slots, one per token", ids, tokens)?;
                slots.choice = PHASOR_SLOT_IDS;
                slots.ids = self.id_params(&addresses.positions, Some(ids), self.tokens, 1);
            }
            SlotChoice::PageTable { pages, lengths } => {
                let columns = pages.len().checked_div(sequences).unwrap_or(0);
                expect(
                    "pages of the table, as many for each sequence",
                    pages,
                    columns * sequences,
                )?;
                slots.choice = PHASOR_SLOT_PAGE_TABLE;
                slots.ids = PhasorIds::of(pages, columns, 1);
                slots.table_pages = index_count(columns)?;
                slots.lengths = lengths_of(lengths)?;
            }
            SlotChoice::PageIndices {
                indptr,
                indices,
                lengths,
            } => {
                expect(
                    "offsets of page indices, one more than sequences",
                    indptr,
                    sequences + 1,
                )?;
                slots.choice = PHASOR_SLOT_PAGE_INDICES;
                slots.ids = PhasorIds::of(indices, 0, 1);
                slots.table_pages = index_count(indices.len())?;
                slots.offsets = PhasorIds::of(indptr, 1, 0);
                slots.lengths = lengths_of(lengths)?;
            }
            SlotChoice::Sequences { lengths } => {
                slots.choice = PHASOR_SLOT_SEQUENCE;
                slots.lengths = lengths.as_ref().map_or(Ok(NO_IDS), lengths_of)?;
            }
        }
        Ok(())
    }

    /// The index of a row that the host sees is one of the rotation's.
    fn check_row(&self, row: i64) -> Result<(), Error> {
        match self.rope.angles() {
            Angles::Rows(rows) if row < 0 || row as u64 >= rows.rows() as u64 => {
                Err(Error::FrequencyRowOutOfRange {
                    row,
                    rows: rows.rows(),
                })
            }
            _ => Ok(()),
        }
    }
}

/// Offsets begin at 0, do not fall, and end at the tokens or before.
fn check_offsets(offsets: impl Iterator<Item = i64>, tokens: usize) -> Result<(), Error> {
    let mut last = None;
    for offset in offsets {
        let what = match last {
            None if offset != 0 => "the first must be 0",
            Some(last) if offset < last => "each must be at least the one before",
            _ if offset as u64 > tokens as u64 => "none may be past the planned tokens",
            _ => {
                last = Some(offset);
                continue;
            }
        };
        return Err(Error::CuSeqlens { what });
    }
    Ok(())
}

impl PhasorIds {
    /// Ids at an address, with strides in values.
    pub fn of(ids: &Ids<u64>, batch: usize, token: usize) -> Self {
        // A plan without elements, whose ids nothing reads, may have any shape.
        let bytes = |values: usize| values.wrapping_mul(ids.id_type().size()) as i64;
        Self {
            address: *ids.memory(),
            token: bytes(token),
            batch: bytes(batch),
            type_: match ids.id_type() {
                IdType::I32 => PHASOR_IDS_I32,
                IdType::I64 => PHASOR_IDS_I64,
                IdType::U32 => PHASOR_IDS_U32,
            },
            reserved: 0,
        }
    }
}

const NO_IDS: PhasorIds = PhasorIds {
    address: 0,
    token: 0,
    batch: 0,
    type_: PHASOR_IDS_NONE,
    reserved: 0,
};

/// Kernels count page indices in 32 bits.
fn index_count(count: usize) -> Result<u32, Error> {
    u32::try_from(count).map_err(|_| Error::SlotsLength {
        what: "page indices, fewer than 2^32",
        expected: u32::MAX as usize,
        got: count,
    })
}

/// The part of a call that a plan knows: all but addresses, positions, chosen rows and slots. Views and
/// caches have the offsets of their layouts for addresses.
pub(crate) fn template(
    rope: &Rope,
    dtype: Dtype,
    tensors: [&Option<PlannedTensor>; 3],
    cache: Option<&KvCacheLayout>,
    q_is_codes: bool,
    [batch, tokens]: [usize; 2],
) -> PhasorCall {
    let size = dtype.size();
    let stream = |planned: &Option<PlannedTensor>, written: usize| {
        let planned = planned.as_ref();
        planned.map_or(ABSENT, |planned| stream_params(planned, [size, written]))
    };
    let [q, k, v] = tensors;
    let (q, q_output) = stream(q, if q_is_codes { 1 } else { size });
    let (k, k_output) = stream(k, size);
    let (v, v_output) = stream(v, size);
    let sizes = cache.map_or([0; 2], |cache| cache.element_sizes(dtype));
    let [k_cache, v_cache] = [
        (&k, cache.and_then(|cache| cache.k), sizes[0]),
        (&v, cache.and_then(|cache| cache.v), sizes[1]),
    ]
    .map(|(stream, layout, size)| match layout {
        // Nothing is stored in a cache of no tokens or no slots.
        Some(layout) if stream.heads > 0 => PhasorCache::of(&layout, size),
        _ => PhasorCache::default(),
    });
    // A plan counts no further.
    let (mut batch, mut tokens) = (batch as u32, tokens as u32);
    if tokens == 1 {
        (batch, tokens) = (1, batch);
    }
    PhasorCall {
        batch,
        tokens,
        in_place: q_output.in_place & k_output.in_place,
        angles: angle_params(rope),
        q,
        k,
        q_output,
        k_output,
        pairing: pairing_params(rope),
        v,
        v_output,
        k_cache,
        v_cache,
        ..PhasorCall::default()
    }
}

impl PhasorCache {
    /// A cache whose elements have `size` bytes. The address is that of its first element, counted from the
    /// start of its buffer.
    pub fn of(layout: &CacheLayout, size: usize) -> Self {
        let bytes = |elements: usize| elements.wrapping_mul(size) as i64;
        // The stride of a dimension of size 1 is never used; as 0 it cannot spoil alignment or overflow.
        let stride = |count: usize, stride: usize| match count {
            0 | 1 => 0,
            _ => bytes(stride),
        };
        let [page, slot, head] = layout.strides();
        let [pages, page_size, heads, head_dim] = layout.shape();
        Self {
            address: bytes(layout.offset()) as u64,
            page: stride(pages, page),
            slot: stride(page_size, slot),
            head: stride(heads, head),
            block: match layout.is_dense() {
                true => 0,
                false => bytes(layout.block_stride),
            },
            // A planned head has no more dims than fit.
            block_dims: layout.block_dims.min(head_dim) as u32,
            present: 1,
        }
    }
}

fn angle_params(rope: &Rope) -> PhasorAngles {
    let angles = rope.angles();
    let (row_choice, passes, factor) = match angles {
        Angles::Exact(frequencies) => (PHASOR_ROW_ONLY, false, frequencies.attention_factor()),
        // Where there is no boundary, each call says how they are chosen.
        Angles::Rows(_) => (PHASOR_ROW_BY_POSITION, false, 1.0),
        // Positions that must be in range are checked for each call.
        Angles::Table(table) => {
            let passes = table.out_of_range() == OutOfRange::PassThrough;
            (PHASOR_ROW_AT_POSITION, passes, 1.0)
        }
    };
    PhasorAngles {
        steps: 0,
        pairs: angles.pairs() as u32,
        axes: angles.axes() as u32,
        row_choice,
        factor,
        inverse: u32::from(rope.direction() == Direction::Inverse),
        out_of_range: match passes {
            true => PHASOR_OUT_OF_RANGE_PASS_THROUGH,
            false => PHASOR_OUT_OF_RANGE_CLAMP,
        },
    }
}

fn pairing_params(rope: &Rope) -> PhasorPairing {
    let steps = |pairing| match pairing {
        Pairing::HalfSplit => (1, rope.angles().pairs() as u32),
        Pairing::Interleaved => (2, 1),
    };
    let (source_step, source_gap) = steps(rope.pairing());
    let (destination_step, destination_gap) = steps(rope.output_pairing());
    PhasorPairing {
        source_step,
        source_gap,
        destination_step,
        destination_gap,
    }
}

/// In place, so that it does not tell against the other.
const ABSENT: (PhasorStream, PhasorOutput) = (
    PhasorStream {
        heads: 0,
        rotary_offset: 0,
        source: NOWHERE,
    },
    PhasorOutput {
        destination: NOWHERE,
        head_dim: 0,
        in_place: 1,
        nowhere: 0,
        reserved: 0,
    },
);
const NOWHERE: PhasorView = PhasorView {
    address: 0,
    token: 0,
    head: 0,
    batch: 0,
};

/// `sizes`: bytes of an element that is read, and of one that is written.
fn stream_params(planned: &PlannedTensor, sizes: [usize; 2]) -> (PhasorStream, PhasorOutput) {
    let [.., heads, head_dim] = planned.source.shape();
    if planned.source.is_empty() {
        return ABSENT;
    }
    let stream = PhasorStream {
        heads: heads as u32,
        rotary_offset: planned.source.rotary_offset() as u32,
        source: view_params(&planned.source, sizes[0]),
    };
    let output = PhasorOutput {
        destination: view_params(&planned.destination, sizes[1]),
        head_dim: head_dim as u32,
        in_place: u32::from(planned.in_place && !planned.nowhere),
        nowhere: u32::from(planned.nowhere),
        reserved: 0,
    };
    (stream, output)
}

fn view_params(layout: &Layout, size: usize) -> PhasorView {
    // The stride of a dimension of size 1 is never used; as 0 it cannot spoil alignment or overflow.
    let stride = |count: usize, stride: usize| match count {
        0 | 1 => 0,
        _ => (stride * size) as i64,
    };
    let [batch, tokens, heads, _] = layout.shape();
    let [batch_stride, token_stride, head_stride] = layout.strides();
    let (batch_stride, token_stride) = match tokens {
        1 => (0, stride(batch, batch_stride)),
        _ => (stride(batch, batch_stride), stride(tokens, token_stride)),
    };
    PhasorView {
        address: (layout.offset() * size) as u64,
        batch: batch_stride,
        token: token_stride,
        head: stride(heads, head_stride),
    }
}
