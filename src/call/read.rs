//! What ids, positions and rows of frequencies mean: cuda/angle.cuh in Rust.

use super::{
    PHASOR_IDS_I32, PHASOR_IDS_I64, PHASOR_IDS_NONE, PHASOR_ROW_BY_POSITION, PHASOR_ROW_IDS,
    PHASOR_ROW_OF_CALL, PHASOR_SLOT_IDS, PHASOR_SLOT_PAGE_INDICES, PHASOR_SLOT_PAGE_TABLE,
    PhasorCall, PhasorIds, PhasorPositions,
};
use crate::ids::IdType;

/// A token of a call.
#[derive(Clone, Copy)]
pub(crate) struct Token {
    pub(crate) b: u32,
    pub(crate) t: u32,
    /// Its sequence, and how many of this call's tokens come before it there.
    sequence: u32,
    place: i64,
    /// What positions count by: its place, or where each token is a sequence, its t.
    step: i64,
    /// What ids of positions and rows are found by, beside t.
    id_batch: u32,
}

/// Where a token is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Slot {
    /// Nowhere, as the caller wants it.
    None,
    /// Nowhere, as it is not in the caches.
    Outside,
    At {
        page: u32,
        slot: u32,
    },
}

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
    /// The position of a token on an axis.
    ///
    /// # Safety
    /// The ids are in host memory and reach as far as these.
    pub(crate) unsafe fn at(&self, axis: u32, token: &Token) -> i64 {
        let start = self
            .start
            .wrapping_add(token.step.wrapping_mul(self.advance));
        if self.ids.type_ == PHASOR_IDS_NONE {
            return start;
        }
        let further = i64::from(axis).wrapping_mul(self.axis_stride);
        // SAFETY: the caller's.
        start.wrapping_add(unsafe { self.ids.at(token.id_batch, token.t, further) })
    }
}

impl PhasorCall {
    /// Token `t` of sequence `b`; `None` for padding.
    ///
    /// # Safety
    /// The call's ids are in host memory and reach as far as its tokens.
    pub(crate) unsafe fn token(&self, b: u32, t: u32) -> Option<Token> {
        match self.is_ragged() {
            false => Some(self.plain_token(b, t)),
            // SAFETY: the caller's.
            true => unsafe { self.ragged_token(b, t) },
        }
    }

    /// Whether sequences lie one after the other.
    #[inline(always)]
    pub(crate) fn is_ragged(&self) -> bool {
        self.sequences.offsets.type_ != PHASOR_IDS_NONE
    }

    /// [`token`](Self::token) unless the batch is ragged.
    #[inline(always)]
    pub(crate) fn plain_token(&self, b: u32, t: u32) -> Token {
        let each_is_one = self.sequences.each_token == 1;
        Token {
            b,
            t,
            sequence: if each_is_one { t } else { b },
            place: if each_is_one { 0 } else { t.into() },
            step: t.into(),
            id_batch: b,
        }
    }

    /// [`token`](Self::token) of a ragged batch.
    ///
    /// # Safety
    /// That of [`token`](Self::token).
    #[cold]
    pub(crate) unsafe fn ragged_token(&self, b: u32, t: u32) -> Option<Token> {
        let sequences = &self.sequences;
        // SAFETY: the caller's.
        let offset = |sequence| unsafe { sequences.offsets.at(sequence, 0, 0) };
        // The first sequence that ends behind the token.
        let (mut low, mut high) = (0, sequences.count);
        while low < high {
            let middle = (low + high) / 2;
            if offset(middle + 1) <= i64::from(t) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        if low == sequences.count {
            return None;
        }
        let first = offset(low);
        let place = i64::from(t).wrapping_sub(first);
        (0..=i64::from(t)).contains(&first).then_some(Token {
            b,
            t,
            sequence: low,
            place,
            step: place,
            id_batch: low,
        })
    }

    /// The row of frequencies of a token that is at `position` on the first axis.
    ///
    /// # Safety
    /// The call's ids are in host memory and reach as far as its tokens.
    pub(crate) unsafe fn row(&self, token: &Token, position: i64) -> u32 {
        let rows = &self.rows;
        let last = rows.count - 1;
        match self.angles.row_choice {
            PHASOR_ROW_OF_CALL => rows.row.min(last),
            // SAFETY: the caller's.
            PHASOR_ROW_IDS => {
                match u32::try_from(unsafe { rows.ids.at(token.id_batch, token.t, 0) }) {
                    Ok(row) => row.min(last),
                    Err(_) => last,
                }
            }
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

    /// The slot of a token.
    ///
    /// # Safety
    /// The call's ids are in host memory and reach as far as its tokens and sequences.
    // A slot that is handed on by way of memory is written as two words and read as one, which processors
    // wait for.
    #[inline(always)]
    pub(crate) unsafe fn slot(&self, token: &Token) -> Slot {
        let slots = &self.slots;
        let page_size = i64::from(slots.page_size);
        if slots.choice == PHASOR_SLOT_IDS {
            // SAFETY: the caller's.
            let id = unsafe { slots.ids.at(token.b, token.t, 0) };
            return match id {
                ..0 => Slot::None,
                _ => self.slot_at(id / page_size, id % page_size),
            };
        }
        let length = match slots.lengths.type_ {
            PHASOR_IDS_NONE => 0,
            // SAFETY: the caller's.
            _ => unsafe { slots.lengths.at(token.sequence, 0, 0) },
        };
        let n = length.wrapping_add(token.place);
        if n < 0 {
            return Slot::Outside;
        }
        let (column, slot) = (n / page_size, n % page_size);
        let columns = i64::from(slots.table_pages);
        match slots.choice {
            PHASOR_SLOT_PAGE_TABLE if column < columns => {
                // SAFETY: the caller's; the table has the column.
                let page = unsafe { slots.ids.at(token.sequence, column as u32, 0) };
                self.slot_at(page, slot)
            }
            PHASOR_SLOT_PAGE_INDICES => {
                // SAFETY: the caller's.
                let [first, end] =
                    [0, 1].map(|n| unsafe { slots.offsets.at(token.sequence + n, 0, 0) });
                let index = first.wrapping_add(column);
                if first < 0 || index < first || index >= end.min(columns) {
                    return Slot::Outside;
                }
                // SAFETY: the caller's; there is such an index.
                let page = unsafe { slots.ids.at(0, index as u32, 0) };
                self.slot_at(page, slot)
            }
            PHASOR_SLOT_PAGE_TABLE => Slot::Outside,
            _ if column == 0 => self.slot_at(token.sequence.into(), slot),
            _ => Slot::Outside,
        }
    }

    #[inline(always)]
    fn slot_at(&self, page: i64, slot: i64) -> Slot {
        match u32::try_from(page) {
            // A slot is below the page's size.
            Ok(page) if page < self.slots.pages => Slot::At {
                page,
                slot: slot as u32,
            },
            _ => Slot::Outside,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::PHASOR_SLOT_SEQUENCE;

    /// As for caches whose keys move to other slots.
    #[test]
    fn a_sequence_without_a_length_begins_at_its_first_slot() {
        let mut call = PhasorCall::default();
        (call.batch, call.tokens) = (3, 5);
        let slots = &mut call.slots;
        (slots.choice, slots.pages, slots.page_size) = (PHASOR_SLOT_SEQUENCE, 3, 4);
        // SAFETY: there are no ids.
        let slot = |b, t| unsafe { call.slot(&call.plain_token(b, t)) };
        assert_eq!(slot(0, 0), Slot::At { page: 0, slot: 0 });
        assert_eq!(slot(2, 3), Slot::At { page: 2, slot: 3 });
        assert_eq!(slot(1, 4), Slot::Outside);
    }
}
