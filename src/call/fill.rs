//! A plan and addresses make a call.

use super::{
    Addresses, AngleAddresses, Call, PHASOR_IDS_I32, PHASOR_IDS_I64, PHASOR_IDS_NONE,
    PHASOR_IDS_U32, PHASOR_OUT_OF_RANGE_CLAMP, PHASOR_OUT_OF_RANGE_PASS_THROUGH,
    PHASOR_ROW_AT_POSITION, PHASOR_ROW_BY_POSITION, PHASOR_ROW_IDS, PHASOR_ROW_OF_CALL,
    PHASOR_ROW_ONLY, PhasorAngles, PhasorCall, PhasorIds, PhasorOutput, PhasorPairing,
    PhasorPositions, PhasorRows, PhasorStream, PhasorTable, PhasorView, RawPositions,
};
use crate::element::Dtype;
use crate::ids::{IdType, Ids};
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
    /// [`Error::PlanMismatch`] if the angle addresses are not of the plan's angle source.
    pub fn call(&self, addresses: &Addresses) -> Result<Option<Call>, Error> {
        let refuses = matches!(self.rope.angles(), Angles::Table(table)
            if table.out_of_range() == OutOfRange::Error);
        if refuses && addresses.positions.ids().is_some() {
            return Err(Error::DevicePositionsUnchecked);
        }
        self.call_unchecked(addresses)
    }

    /// The same where ids are in host memory, and checked.
    ///
    /// # Safety
    /// All ids are there.
    #[inline]
    pub(crate) unsafe fn call_on_host(&self, addresses: &Addresses) -> Result<Option<Call>, Error> {
        let call = self.call_unchecked(addresses)?;
        // Where there is nothing to rotate, rows must be right all the same.
        // No ids are those of no token, of however many sequences.
        if let Some(ids) = addresses.positions.frequency_row_ids()
            && !ids.is_empty()
        {
            let rows = self.row_params(&addresses.positions)?;
            let tokens = match addresses.positions.frequency_row_kind() {
                FrequencyRowKind::PerToken => self.tokens,
                _ => 1,
            };
            for b in 0..self.batch as u32 {
                for t in 0..tokens as u32 {
                    let (b, t) = self.in_call(b, t);
                    // SAFETY: the caller's; their number has been checked.
                    self.check_row(unsafe { rows.ids.at(b, t, 0) })?;
                }
            }
        }
        if !self.is_empty()
            && let Angles::Table(table) = self.rope.angles()
            && table.out_of_range() == OutOfRange::Error
            && addresses.positions.ids().is_some()
        {
            let positions = self.position_params(&addresses.positions)?;
            self.check_in_table(table.rows(), |b, t| {
                let (b, t) = self.in_call(b, t);
                // SAFETY: the caller's.
                unsafe { positions.at(0, b, t) }
            })?;
        }
        Ok(call)
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
    fn call_unchecked(&self, addresses: &Addresses) -> Result<Option<Call>, Error> {
        let mut params = self.template;
        params.positions = self.position_params(&addresses.positions)?;
        params.rows = self.row_params(&addresses.positions)?;
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
            _ => return Err(Error::PlanMismatch),
        }
        if self.is_empty() {
            return Ok(None);
        }
        for (stream, output, at) in [
            (&mut params.q, &mut params.q_output, addresses.q),
            (&mut params.k, &mut params.k_output, addresses.k),
        ] {
            let source = match output.in_place {
                0 => at.source,
                _ => at.destination,
            };
            stream.source.address = source.wrapping_add(stream.source.address);
            output.destination.address = at.destination.wrapping_add(output.destination.address);
        }
        Ok(Some(Call {
            dtype: self.dtype,
            params,
        }))
    }

    #[inline]
    fn position_params(&self, given: &RawPositions) -> Result<PhasorPositions, Error> {
        let kind = given.kind();
        let got = given.ids().map_or(0, Ids::len);
        let axes = self.rope.angles().axes();
        let expected = kind.expected_len(axes, self.batch, self.tokens);
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
            PositionKind::Start | PositionKind::StartPerSequence => i64::from(self.tokens != 1),
            _ => 0,
        };
        let (batch, token) = match kind {
            PositionKind::Start => (0, 0),
            PositionKind::StartPerSequence | PositionKind::PerSequence => (1, 0),
            PositionKind::PerToken | PositionKind::PerAxis => (self.tokens, 1),
            PositionKind::PerTokenShared => (0, 1),
        };
        let axis_stride = match (kind, given.ids()) {
            (PositionKind::PerAxis, Some(ids)) => {
                let tokens = self.batch.wrapping_mul(self.tokens);
                tokens.wrapping_mul(ids.id_type().size()) as i64
            }
            _ => 0,
        };
        if let Some(start) = given.as_start() {
            self.check_start(start)?;
        }
        Ok(PhasorPositions {
            start,
            advance,
            axis_stride,
            ids: self.id_params(given.ids(), batch, token),
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
        self.check_in_table(table.rows(), |_, t| start.wrapping_add(i64::from(t)))
    }

    fn check_in_table(&self, rows: usize, position: impl Fn(u32, u32) -> i64) -> Result<(), Error> {
        for batch in 0..self.batch {
            for token in 0..self.tokens {
                let position = position(batch as u32, token as u32);
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
        let expected = kind.expected_len(self.batch, self.tokens);
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
            FrequencyRowKind::PerToken => (self.tokens, 1),
            _ => (1, 0),
        };
        let row = given.as_frequency_row().unwrap_or_default();
        self.check_row(i64::from(row))?;
        Ok(PhasorRows {
            factors: 0,
            boundary: boundary.unwrap_or_default(),
            ids: self.id_params(given.frequency_row_ids(), batch, token),
            // Neither rows nor a table have more.
            count: count as u32,
            row,
        })
    }

    /// Strides are given in values, and are those of [`in_call`](Self::in_call).
    #[inline]
    fn id_params(&self, ids: Option<&Ids<u64>>, batch: usize, token: usize) -> PhasorIds {
        let Some(ids) = ids else {
            return PhasorIds {
                address: 0,
                batch: 0,
                token: 0,
                type_: PHASOR_IDS_NONE,
                reserved: 0,
            };
        };
        // A plan without elements, whose ids nothing reads, may have any shape.
        let bytes = |values: usize| values.wrapping_mul(ids.id_type().size()) as i64;
        let (batch, token) = match self.tokens {
            1 => (0, bytes(batch)),
            _ => (bytes(batch), bytes(token)),
        };
        PhasorIds {
            address: *ids.memory(),
            batch,
            token,
            type_: match ids.id_type() {
                IdType::I32 => PHASOR_IDS_I32,
                IdType::I64 => PHASOR_IDS_I64,
                IdType::U32 => PHASOR_IDS_U32,
            },
            reserved: 0,
        }
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

/// The part of a call that a plan knows: all but addresses, positions and chosen rows. Views have the offsets of
/// their layouts for addresses.
pub(crate) fn template(
    rope: &Rope,
    dtype: Dtype,
    [q, k]: [&Option<PlannedTensor>; 2],
    [batch, tokens]: [usize; 2],
) -> PhasorCall {
    let [(q, q_output), (k, k_output)] = [q, k].map(|planned| {
        planned
            .as_ref()
            .map_or(ABSENT, |planned| stream_params(planned, dtype))
    });
    // A plan counts no further.
    let (mut batch, mut tokens) = (batch as u32, tokens as u32);
    if tokens == 1 {
        (batch, tokens) = (1, batch);
    }
    PhasorCall {
        batch,
        tokens,
        angles_before_wait: 0,
        in_place: q_output.in_place & k_output.in_place,
        angles: angle_params(rope),
        positions: PhasorPositions::default(),
        q,
        k,
        q_output,
        k_output,
        table: PhasorTable::default(),
        rows: PhasorRows::default(),
        pairing: pairing_params(rope),
        token_groups: 1,
        reserved: 0,
    }
}

fn angle_params(rope: &Rope) -> PhasorAngles {
    let angles = rope.angles();
    let (row_choice, passes, factor) = match angles {
        Angles::Exact(frequencies) => (PHASOR_ROW_ONLY, false, frequencies.attention_factor()),
        Angles::Rows(rows) if rows.boundary().is_some() => (PHASOR_ROW_BY_POSITION, false, 1.0),
        // Each call says how they are chosen.
        Angles::Rows(_) => (PHASOR_ROW_OF_CALL, false, 1.0),
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
    },
);
const NOWHERE: PhasorView = PhasorView {
    address: 0,
    token: 0,
    head: 0,
    batch: 0,
};

fn stream_params(planned: &PlannedTensor, dtype: Dtype) -> (PhasorStream, PhasorOutput) {
    let [.., heads, head_dim] = planned.source.shape();
    if planned.source.is_empty() {
        return ABSENT;
    }
    let stream = PhasorStream {
        heads: heads as u32,
        rotary_offset: planned.source.rotary_offset() as u32,
        source: view_params(&planned.source, dtype),
    };
    let output = PhasorOutput {
        destination: view_params(&planned.destination, dtype),
        head_dim: head_dim as u32,
        in_place: u32::from(planned.in_place),
    };
    (stream, output)
}

fn view_params(layout: &Layout, dtype: Dtype) -> PhasorView {
    // The stride of a dimension of size 1 is never used; as 0 it cannot spoil alignment or overflow.
    let stride = |count: usize, stride: usize| match count {
        0 | 1 => 0,
        _ => (stride * dtype.size()) as i64,
    };
    let [batch, tokens, heads, _] = layout.shape();
    let [batch_stride, token_stride, head_stride] = layout.strides();
    let (batch_stride, token_stride) = match tokens {
        1 => (0, stride(batch, batch_stride)),
        _ => (stride(batch, batch_stride), stride(tokens, token_stride)),
    };
    PhasorView {
        address: (layout.offset() * dtype.size()) as u64,
        batch: batch_stride,
        token: token_stride,
        head: stride(heads, head_stride),
    }
}
