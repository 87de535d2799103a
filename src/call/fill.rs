//! A plan and addresses make a call.

use super::{
    Addresses, AngleAddresses, Call, PHASOR_ANGLES_STEPS, PHASOR_ANGLES_TABLE, PHASOR_IDS_I32,
    PHASOR_IDS_I64, PHASOR_IDS_NONE, PHASOR_IDS_U32, PHASOR_OUT_OF_RANGE_CLAMP,
    PHASOR_OUT_OF_RANGE_PASS_THROUGH, PHASOR_ROW_BY_POSITION, PHASOR_ROW_IDS, PHASOR_ROW_OF_CALL,
    PHASOR_ROW_ONLY, PhasorAngles, PhasorCall, PhasorIds, PhasorPairing, PhasorPositions,
    PhasorRows, PhasorStream, PhasorView, RawPositions, TensorAddresses,
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
    pub(crate) unsafe fn call_on_host(&self, addresses: &Addresses) -> Result<Option<Call>, Error> {
        let call = self.call_unchecked(addresses)?;
        // Where there is nothing to rotate, rows must be right all the same.
        let rows = self.row_params(&addresses.positions)?;
        if rows.choice == PHASOR_ROW_IDS {
            let (batch, tokens) = match addresses.positions.frequency_row_kind() {
                FrequencyRowKind::PerSequence => (self.batch, 1),
                _ => (self.batch, self.tokens),
            };
            for b in 0..batch as u32 {
                for t in 0..tokens as u32 {
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
            // Those of the plan's sequences, which a call may have turned into tokens.
            let positions = self.position_params(&addresses.positions)?;
            // SAFETY: the caller's.
            self.check_in_table(table.rows(), |b, t| unsafe { positions.at(0, b, t) })?;
        }
        Ok(call)
    }

    fn call_unchecked(&self, addresses: &Addresses) -> Result<Option<Call>, Error> {
        let positions = self.position_params(&addresses.positions)?;
        let mut rows = self.row_params(&addresses.positions)?;
        let angles = self.angle_params(&addresses.angles)?;
        if let AngleAddresses::Steps { factors, .. } = addresses.angles {
            rows.factors = factors;
        }
        if self.is_empty() {
            return Ok(None);
        }
        let stream = |planned: &Option<PlannedTensor>, at: TensorAddresses| {
            planned
                .as_ref()
                .map_or(ABSENT, |planned| stream_params(planned, at, self.dtype))
        };
        let q = stream(&self.q, addresses.q);
        let k = stream(&self.k, addresses.k);
        let mut params = PhasorCall {
            angles,
            positions,
            // A plan counts no further.
            batch: self.batch as u32,
            tokens: self.tokens as u32,
            token_groups: 1,
            flags: 0,
            in_place: q.in_place & k.in_place,
            reserved: 0,
            q,
            k,
            rows,
            pairing: pairing_params(&self.rope),
        };
        if self.tokens == 1 {
            one_token_each(&mut params);
        }
        Ok(Some(Call {
            dtype: self.dtype,
            params,
        }))
    }

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
            PositionKind::Start | PositionKind::StartPerSequence => 1,
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
                (self.batch * self.tokens * ids.id_type().size()) as i64
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
            ids: id_params(given.ids(), batch, token),
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
            ids: id_params(given.frequency_row_ids(), batch, token),
            // Neither rows nor a table have more.
            count: count as u32,
            choice: match kind {
                FrequencyRowKind::None if boundary.is_some() => PHASOR_ROW_BY_POSITION,
                FrequencyRowKind::None => PHASOR_ROW_ONLY,
                FrequencyRowKind::Call => PHASOR_ROW_OF_CALL,
                FrequencyRowKind::PerSequence | FrequencyRowKind::PerToken => PHASOR_ROW_IDS,
            },
            row,
            reserved: 0,
        })
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

    fn angle_params(&self, addresses: &AngleAddresses) -> Result<PhasorAngles, Error> {
        let angles = self.rope.angles();
        let mut params = PhasorAngles {
            steps: 0,
            cos: 0,
            sin: 0,
            pairs: angles.pairs() as u32,
            axes: angles.axes() as u32,
            source: PHASOR_ANGLES_STEPS,
            out_of_range: PHASOR_OUT_OF_RANGE_CLAMP,
            factor: 1.0,
            inverse: u32::from(self.rope.direction() == Direction::Inverse),
        };
        match (angles, *addresses) {
            (Angles::Exact(frequencies), AngleAddresses::Steps { steps, .. }) => {
                params.steps = steps;
                params.factor = frequencies.attention_factor();
            }
            (Angles::Rows(_), AngleAddresses::Steps { steps, .. }) => params.steps = steps,
            (Angles::Table(table), AngleAddresses::Table { cos, sin }) => {
                params.source = PHASOR_ANGLES_TABLE;
                params.cos = cos;
                params.sin = sin;
                // Positions that must be in range have been checked by the host.
                if table.out_of_range() == OutOfRange::PassThrough {
                    params.out_of_range = PHASOR_OUT_OF_RANGE_PASS_THROUGH;
                }
            }
            _ => return Err(Error::PlanMismatch),
        }
        Ok(params)
    }
}

/// Where each sequence has one token, as in decoding, the sequences become the tokens of one.
fn one_token_each(params: &mut PhasorCall) {
    fn turn(batch: &mut i64, token: &mut i64) {
        *token = std::mem::take(batch);
    }
    params.tokens = std::mem::replace(&mut params.batch, 1);
    // Nothing advances along a sequence of one.
    params.positions.advance = 0;
    for stream in [&mut params.q, &mut params.k] {
        for view in [&mut stream.source, &mut stream.destination] {
            turn(&mut view.batch, &mut view.token);
        }
    }
    for ids in [&mut params.positions.ids, &mut params.rows.ids] {
        turn(&mut ids.batch, &mut ids.token);
    }
}

/// Strides are given in values.
fn id_params(ids: Option<&Ids<u64>>, batch: usize, token: usize) -> PhasorIds {
    let Some(ids) = ids else {
        return PhasorIds {
            address: 0,
            batch: 0,
            token: 0,
            type_: PHASOR_IDS_NONE,
            reserved: 0,
        };
    };
    let bytes = |values: usize| (values * ids.id_type().size()) as i64;
    PhasorIds {
        address: *ids.memory(),
        batch: bytes(batch),
        token: bytes(token),
        type_: match ids.id_type() {
            IdType::I32 => PHASOR_IDS_I32,
            IdType::I64 => PHASOR_IDS_I64,
            IdType::U32 => PHASOR_IDS_U32,
        },
        reserved: 0,
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

/// In place, so that it does not tell against the others.
const ABSENT: PhasorStream = PhasorStream {
    source: NOWHERE,
    destination: NOWHERE,
    heads: 0,
    head_dim: 0,
    rotary_offset: 0,
    in_place: 1,
};
const NOWHERE: PhasorView = PhasorView {
    address: 0,
    batch: 0,
    token: 0,
    head: 0,
};

fn stream_params(planned: &PlannedTensor, at: TensorAddresses, dtype: Dtype) -> PhasorStream {
    let [.., heads, head_dim] = planned.source.shape();
    if planned.source.is_empty() {
        return ABSENT;
    }
    let source = if planned.in_place {
        at.destination
    } else {
        at.source
    };
    PhasorStream {
        source: view_params(source, &planned.source, dtype),
        destination: view_params(at.destination, &planned.destination, dtype),
        heads: heads as u32,
        head_dim: head_dim as u32,
        rotary_offset: planned.source.rotary_offset() as u32,
        in_place: u32::from(planned.in_place),
    }
}

fn view_params(start: u64, layout: &Layout, dtype: Dtype) -> PhasorView {
    // The stride of a dimension of size 1 is never used; as 0 it cannot spoil alignment or overflow.
    let stride = |count: usize, stride: usize| match count {
        0 | 1 => 0,
        _ => (stride * dtype.size()) as i64,
    };
    let [batch, tokens, heads, _] = layout.shape();
    let [batch_stride, token_stride, head_stride] = layout.strides();
    PhasorView {
        address: start.wrapping_add((layout.offset() * dtype.size()) as u64),
        batch: stride(batch, batch_stride),
        token: stride(tokens, token_stride),
        head: stride(heads, head_stride),
    }
}
