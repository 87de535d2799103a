//! What ids, positions and rows of frequencies mean: cuda/angle.cuh in Rust.

use super::{
    PHASOR_IDS_I32, PHASOR_IDS_I64, PHASOR_IDS_NONE, PHASOR_ROW_BY_POSITION, PHASOR_ROW_IDS,
    PHASOR_ROW_OF_CALL, PhasorCall, PhasorIds, PhasorPositions,
};
use crate::ids::IdType;

impl PhasorIds {
    /// The id of token `t` of sequence `b`, `further` bytes on.
    ///
    /// # Safety
    /// There are ids, in host memory, for this sequence and token.
    pub(crate) unsafe fn at(&self, b: u32, t: u32, further: i64) -> i64 {
        let address = (self.address as i64)
            .wrapping_add(further)
            .wrapping_add(i64::from(b).wrapping_mul(self.batch))
            .wrapping_add(i64::from(t).wrapping_mul(self.token)) as usize;
        let id_type = match self.type_ {
            PHASOR_IDS_I32 => IdType::I32,
            PHASOR_IDS_I64 => IdType::I64,
            _ => IdType::U32,
        };
        // SAFETY: the caller's.
        unsafe { id_type.read(address) }
    }
}

impl PhasorPositions {
    /// The position of token `t` of sequence `b` on an axis.
    ///
    /// # Safety
    /// The ids are in host memory and reach as far as these.
    pub(crate) unsafe fn at(&self, axis: u32, b: u32, t: u32) -> i64 {
        let start = self
            .start
            .wrapping_add(i64::from(t).wrapping_mul(self.advance));
        if self.ids.type_ == PHASOR_IDS_NONE {
            return start;
        }
        let further = i64::from(axis).wrapping_mul(self.axis_stride);
        // SAFETY: the caller's.
        start.wrapping_add(unsafe { self.ids.at(b, t, further) })
    }
}

impl PhasorCall {
    /// The row of frequencies of a token that is at `position` on the first axis.
    ///
    /// # Safety
    /// The call's ids are in host memory and reach as far as its tokens.
    pub(crate) unsafe fn row(&self, b: u32, t: u32, position: i64) -> u32 {
        let rows = &self.rows;
        let last = rows.count - 1;
        match self.angles.row_choice {
            PHASOR_ROW_OF_CALL => rows.row.min(last),
            // SAFETY: the caller's.
            PHASOR_ROW_IDS => match u32::try_from(unsafe { rows.ids.at(b, t, 0) }) {
                Ok(row) => row.min(last),
                Err(_) => last,
            },
            PHASOR_ROW_BY_POSITION => u32::from(position >= rows.boundary).min(last),
            _ => 0,
        }
    }

    /// The row of the table for a position, and whether the position is inside.
    pub(crate) fn table_row(&self, position: i64) -> (u32, bool) {
        let last = self.rows.count - 1;
        let inside = (position as u64) < u64::from(self.rows.count);
        // A count fits an `i64`.
        (position.clamp(0, i64::from(last)) as u32, inside)
    }
}
