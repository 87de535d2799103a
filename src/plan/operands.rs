//! Whether a call brings what was planned.

use super::problem::Sources;
use super::tensor::{Form, PlannedTensor, Reach};
use super::{Appended, InOut, Plan};
use crate::Error;
use crate::element::Dtype;
use crate::error::TensorName;
use std::ops::Range;

impl Plan {
    /// The plan has neither values nor a cache.
    pub(crate) fn check_rotates_only(&self) -> Result<(), Error> {
        let more = if self.v.is_some() || self.cache.is_some() {
            "has values or a cache"
        } else if self.fusion.is_some() {
            "has stages beside the rotation"
        } else if self.sources == Sources::Packed {
            "has packed sources"
        } else {
            return Ok(());
        };
        Err(Error::AppendMismatch {
            planned: more,
            remedy: "call step",
        })
    }

    /// The caches reach as far as their layouts do: buffers of keys and of values, or one for both.
    pub(crate) fn check_cache_lengths(&self, lengths: &[Option<usize>; 2]) -> Result<(), Error> {
        for at in 0..2 {
            let what = match (self.cache_lengths[at], lengths[at]) {
                (None, None) => continue,
                (Some(needed), Some(got)) if got >= needed => continue,
                (Some(needed), Some(got)) => {
                    let what = ["k's cache", "v's cache"][at];
                    return Err(Error::BufferTooShort { what, needed, got });
                }
                (Some(_), None) => "the plan has a cache for it, and the call has none",
                (None, Some(_)) => "the call has a cache for it, and the plan has none",
            };
            return Err(Error::CacheMissing {
                tensor: [TensorName::K, TensorName::V][at],
                what,
            });
        }
        Ok(())
    }

    /// Whether keys and values are cached in one buffer.
    pub(crate) fn caches_are_one_buffer(&self) -> bool {
        self.cache.as_ref().is_some_and(|cache| cache.one_buffer)
    }

    pub(crate) fn all_tensors(&self) -> [Option<&PlannedTensor>; 3] {
        [self.q.as_ref(), self.k.as_ref(), self.v.as_ref()]
    }

    /// Bytes of an element of the cache of keys (0) or of values (1), and its type if it has one.
    pub(crate) fn cache_type(&self, at: usize) -> (usize, Option<Dtype>) {
        match &self.cache {
            Some(cache) if cache.codes[at].is_none() => (self.dtype.size(), Some(self.dtype)),
            _ => (1, None),
        }
    }

    /// Bytes of a scale that is written: of the keys' codes (1) or of the values' (2).
    pub(crate) fn scale_size(&self, at: usize) -> usize {
        let codes = self.cache.as_ref().and_then(|cache| cache.codes[at - 1]);
        let dynamic = codes.and_then(|codes| codes.dynamic);
        dynamic.map_or(1, |dynamic| dynamic.size())
    }

    /// Scales are given where they are to be, and have room where they are written.
    pub(crate) fn check_scales(&self, at: usize, given: bool, room: bool) -> Result<(), Error> {
        let codes = match at {
            0 => self.q_codes.as_ref(),
            _ => self
                .cache
                .as_ref()
                .and_then(|cache| cache.codes[at - 1].as_ref()),
        };
        let what = match codes {
            Some(codes) if codes.dynamic.is_some() && given => {
                "its scales are not given but written: use Step::k_scales or Step::v_scales"
            }
            Some(codes) if codes.dynamic.is_none() && room => {
                "its scales are not written but given: use StageWeights::scales"
            }
            None if given || room => "no codes are planned for these scales",
            _ => return Ok(()),
        };
        Err(Error::Stages {
            tensor: [TensorName::Q, TensorName::K, TensorName::V][at],
            what,
        })
    }

    /// Caches are in one buffer, or apart, as planned.
    pub(crate) fn check_cache_form(&self, one_buffer: bool) -> Result<(), Error> {
        if one_buffer != self.caches_are_one_buffer() {
            return Err(Error::AppendMismatch {
                planned: match one_buffer {
                    true => "has caches in buffers of their own",
                    false => "has both caches in one buffer",
                },
                remedy: "give the caches so, or plan them as they are given",
            });
        }
        Ok(())
    }

    /// The sources are windows of one buffer, and what is written elsewhere has buffers of its own.
    pub(crate) fn is_packed(&self) -> bool {
        self.sources == Sources::Packed
    }

    /// The plan is over one buffer, or its sources are. That one reaches as far as its layouts do and,
    /// unless that is meant, has no room for another token or sequence.
    #[inline]
    pub(crate) fn check_one_buffer(&self, len: usize) -> Result<(), Error> {
        // The usual case at no cost: this runs at every call.
        match self.one_buffer_lengths.contains(&len) {
            true => Ok(()),
            false => Err(self.one_buffer_error(len)),
        }
    }

    /// How long one buffer for all may be.
    pub(super) fn find_one_buffer_lengths(&self) -> Range<usize> {
        match self.furthest_of_one_buffer() {
            // Behind the others there is room, which is that one's.
            Some((_, reach)) if !self.longer_buffers => reach.needed..reach.with_room(),
            Some((_, reach)) => reach.needed..usize::MAX,
            None => 0..0,
        }
    }

    /// The layouts of one buffer, if it is planned.
    fn sides_of_one_buffer(&self) -> impl Iterator<Item = (&'static str, Reach)> {
        let sources = self.sources;
        self.tensors().flat_map(move |tensor| {
            let [read, written] = tensor.sides();
            [
                Some(read).filter(|_| sources != Sources::Apart),
                Some(written).filter(|_| sources == Sources::OneBuffer),
            ]
            .into_iter()
            .flatten()
        })
    }

    fn furthest_of_one_buffer(&self) -> Option<(&'static str, Reach)> {
        let further = |most: (_, Reach), side: (_, Reach)| match side.1.needed > most.1.needed {
            true => side,
            false => most,
        };
        self.sides_of_one_buffer().reduce(further)
    }

    #[cold]
    fn one_buffer_error(&self, len: usize) -> Error {
        let short = self
            .sides_of_one_buffer()
            .find_map(|(what, reach)| reach.check(what, len).err());
        match (short, self.furthest_of_one_buffer()) {
            (Some(short), _) => short,
            (None, Some((what, reach))) => reach.room_error(what, len),
            (None, None) => Error::OneBufferMismatch {
                planned: "separate buffers",
                remedy: "give q, k and v by themselves, or plan with Problem::one_buffer or \
                         Problem::packed",
            },
        }
    }

    /// The buffers of an operand reach as far as its layouts do and, unless that is meant, have no room
    /// for another token or sequence.
    pub(crate) fn check_lengths(
        &self,
        tensor: &PlannedTensor,
        source: usize,
        destination: usize,
    ) -> Result<(), Error> {
        for (side, len) in tensor.sides().into_iter().zip([source, destination]) {
            self.check_side(side, len)?;
        }
        Ok(())
    }

    /// The same for what is read, where something else is written.
    pub(crate) fn check_source_length(
        &self,
        tensor: &PlannedTensor,
        len: usize,
    ) -> Result<(), Error> {
        self.check_side(tensor.sides()[0], len)
    }

    /// The same for what is written, where something else is read.
    pub(crate) fn check_destination_length(
        &self,
        tensor: &PlannedTensor,
        len: usize,
    ) -> Result<(), Error> {
        self.check_side(tensor.sides()[1], len)
    }

    fn check_side(&self, (what, reach): (&'static str, Reach), len: usize) -> Result<(), Error> {
        reach.check(what, len)?;
        match self.longer_buffers {
            true => Ok(()),
            false => reach.check_room(what, len),
        }
    }

    /// Checks the forms of the operands of a call against the plan's: of the keys, if they are given.
    pub(crate) fn check_operands<S, D, O>(
        &self,
        q: &Option<InOut<S, D, O>>,
        k: Option<&Option<InOut<S, D, O>>>,
    ) -> Result<(), Error> {
        self.check_apart()?;
        let form = |operand: &Option<InOut<S, D, O>>| match operand {
            None => Form::Absent,
            Some(operand) => Form::of(operand),
        };
        self.check_form(TensorName::Q, &self.q, form(q))?;
        match k {
            Some(k) => self.check_form(TensorName::K, &self.k, form(k)),
            None => Ok(()),
        }
    }

    fn check_apart(&self) -> Result<(), Error> {
        if self.sources != Sources::Apart {
            return Err(Error::OneBufferMismatch {
                planned: match self.sources {
                    Sources::Packed => "packed sources",
                    _ => "one buffer",
                },
                remedy: "call rotate_one_buffer or append_one_buffer, or step with Step::buffer",
            });
        }
        Ok(())
    }

    /// The same for a call that appends.
    pub(crate) fn check_append_operands<S, D, O>(
        &self,
        q: &Option<InOut<S, D, O>>,
        kv: [&Option<Appended<S, D, O>>; 2],
    ) -> Result<(), Error> {
        self.check_operands(q, None)?;
        self.check_kv_forms(kv)
    }

    /// The same for a step, where q may be written as codes.
    pub(crate) fn check_step_operands<S, D, O>(
        &self,
        q: &Option<InOut<S, D, O>>,
        has_source: bool,
        kv: [&Option<Appended<S, D, O>>; 2],
    ) -> Result<(), Error> {
        match (&self.q_codes, has_source) {
            (None, false) => return self.check_append_operands(q, kv),
            (Some(_), true) if q.is_none() => {}
            (planned, _) => {
                return Err(Error::Stages {
                    tensor: TensorName::Q,
                    what: match planned {
                        Some(_) => {
                            "codes are planned for it: give what is read with Step::q_source"
                        }
                        None => "no codes are planned for it: give it with Step::q",
                    },
                });
            }
        }
        self.check_apart()?;
        self.check_kv_forms(kv)
    }

    fn check_kv_forms<S, D, O>(&self, kv: [&Option<Appended<S, D, O>>; 2]) -> Result<(), Error> {
        let forms = kv.map(|operand| match operand {
            None => Form::Absent,
            Some(Appended::ToCache(_)) => Form::ToCache,
            Some(Appended::InOut(operand)) => Form::of(operand),
        });
        self.check_form(TensorName::K, &self.k, forms[0])?;
        self.check_form(TensorName::V, &self.v, forms[1])
    }

    fn check_form(
        &self,
        tensor: TensorName,
        planned: &Option<PlannedTensor>,
        given: Form,
    ) -> Result<(), Error> {
        let planned = planned.as_ref().map_or(Form::Absent, PlannedTensor::form);
        if planned != given {
            return Err(Error::OperandMismatch {
                tensor,
                planned: planned.name(),
                given: given.name(),
            });
        }
        Ok(())
    }

    /// The element type of a call is the plan's.
    pub(crate) fn check_dtype(&self, given: Dtype) -> Result<(), Error> {
        if given != self.dtype {
            return Err(Error::DtypeMismatch {
                planned: self.dtype,
                given,
            });
        }
        Ok(())
    }
}
