//! One tensor of a plan, and how long its buffers are.

use super::InOut;
use crate::Error;
use crate::error::TensorName;
use crate::layout::{Layout, Region};

/// A tensor of a plan, its layouts checked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PlannedTensor {
    pub(crate) name: TensorName,
    pub(crate) source: Layout,
    pub(crate) destination: Layout,
    pub(crate) in_place: bool,
    /// Written to a cache only.
    pub(crate) nowhere: bool,
    /// Stored in a cache.
    pub(super) cached: bool,
    /// In place, all dims of a head are written; else those that rotate.
    pub(super) whole_heads: bool,
    /// Of the source and of the destination.
    pub(super) reach: [Reach; 2],
}

/// How a tensor is planned, or given.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    Absent,
    InPlace,
    OutOfPlace,
    ToCache,
}

impl Form {
    /// For errors.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Form::Absent => "absent",
            Form::InPlace => "in place",
            Form::OutOfPlace => "out of place",
            Form::ToCache => "to the cache",
        }
    }

    pub(super) const fn of<S, D, O>(operand: &InOut<S, D, O>) -> Self {
        match operand {
            InOut::InPlace(_) => Form::InPlace,
            InOut::OutOfPlace { .. } => Form::OutOfPlace,
        }
    }
}

/// How long a buffer is for a layout. Known beforehand, as each call asks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reach {
    /// Elements that the layout reaches.
    pub(super) needed: usize,
    /// Elements at which there is room for another token, and for another sequence.
    with_another: [usize; 2],
}

impl Reach {
    pub(super) fn of(layout: &Layout) -> Self {
        let len = |batch, tokens| layout.with_counts(batch, tokens).required_len();
        let with_another = |stride: usize, batch: Option<usize>, tokens: Option<usize>| {
            // A dim that is repeated takes no more room.
            let longer = match (batch, tokens) {
                (Some(batch), Some(tokens)) if stride > 0 && !layout.is_empty() => {
                    len(batch, tokens)
                }
                _ => None,
            };
            longer.unwrap_or(usize::MAX)
        };
        let (batch, tokens) = (layout.batch, layout.tokens);
        Self {
            // A planned layout has a length.
            needed: layout.required_len().unwrap_or(usize::MAX),
            with_another: [
                with_another(layout.token_stride, Some(batch), tokens.checked_add(1)),
                with_another(layout.batch_stride, batch.checked_add(1), Some(tokens)),
            ],
        }
    }

    /// A buffer of `got` elements reaches as far as the layout.
    pub(super) fn check(&self, what: &'static str, got: usize) -> Result<(), Error> {
        let needed = self.needed;
        if got < needed {
            return Err(Error::BufferTooShort { what, needed, got });
        }
        Ok(())
    }

    /// It has no room for another token or sequence.
    pub(super) fn check_room(&self, what: &'static str, got: usize) -> Result<(), Error> {
        match got < self.with_room() {
            true => Ok(()),
            false => Err(self.room_error(what, got)),
        }
    }

    /// Elements at which there is room for another token or sequence.
    pub(super) fn with_room(&self) -> usize {
        let [token, sequence] = self.with_another;
        token.min(sequence)
    }

    pub(super) fn room_error(&self, what: &'static str, got: usize) -> Error {
        let [token, _] = self.with_another;
        Error::BufferHasRoom {
            what,
            more: if got >= token { "token" } else { "sequence" },
            needed: self.needed,
            got,
        }
    }
}

impl PlannedTensor {
    pub(crate) const fn form(&self) -> Form {
        if self.nowhere {
            Form::ToCache
        } else if self.in_place {
            Form::InPlace
        } else {
            Form::OutOfPlace
        }
    }

    /// What is read and what is written, with names for errors.
    pub(super) fn sides(&self) -> [(&'static str, Reach); 2] {
        let (written, read) = self.labels();
        let [of_source, of_destination] = self.reach;
        [(read, of_source), (written, of_destination)]
    }

    /// For other numbers of sequences and tokens.
    pub(super) fn with_counts(mut self, batch: usize, tokens: usize) -> Self {
        self.source = self.source.with_counts(batch, tokens);
        self.destination = self.destination.with_counts(batch, tokens);
        self.reach = [Reach::of(&self.source), Reach::of(&self.destination)];
        self
    }

    /// The elements that are written.
    pub(super) fn written(&self, rotary_dim: usize) -> Region {
        if self.nowhere {
            self.source.region(0, 0)
        } else if self.in_place && !self.whole_heads {
            let rotary_dim = match self.name {
                TensorName::V => 0,
                _ => rotary_dim,
            };
            self.destination
                .region(self.destination.rotary_offset, rotary_dim)
        } else {
            self.destination.region(0, self.destination.head_dim)
        }
    }

    /// The elements that are read: of a tensor in place that is not stored in a cache too, those that are
    /// written.
    pub(super) fn read(&self, rotary_dim: usize) -> Region {
        if self.in_place && !self.nowhere && !self.cached {
            self.written(rotary_dim)
        } else {
            self.source.region(0, self.source.head_dim)
        }
    }

    /// Names for errors: of what is written and of what is read.
    pub(super) const fn labels(&self) -> (&'static str, &'static str) {
        match (self.name, self.in_place) {
            (TensorName::Q, true) => ("q", "q"),
            (TensorName::K, true) => ("k", "k"),
            (TensorName::V, true) => ("v", "v"),
            (TensorName::V, false) => ("v's destination", "v's source"),
            (TensorName::Q, false) => ("q's destination", "q's source"),
            (TensorName::K, false) => ("k's destination", "k's source"),
        }
    }
}
