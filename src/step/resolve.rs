//! The operands of a step, checked against its plan and turned into addresses, whatever memory they are in.

use super::{Caches, Memory, StageWeights, Step, Stored, Tensor};
use crate::Error;
use crate::cache::{SlotChoice, SlotsIn};
use crate::call::{Addresses, CacheAddresses, StageAddresses, TensorAddresses, VectorAddress};
use crate::element::Dtype;
use crate::error::TensorName;
use crate::plan::{Appended, InOut, Plan, PlannedTensor};

/// Values at an address.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub(crate) address: u64,
    pub(crate) len: usize,
}

/// A cache, or room for codes or scales.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ByteSpan {
    pub(crate) address: u64,
    pub(crate) len: usize,
    /// Bytes of one of them; 1 may be anything.
    pub(crate) size: usize,
    /// The type of elements.
    pub(crate) dtype: Option<Dtype>,
}

impl ByteSpan {
    /// How many values of `size` bytes and of a type it has room for.
    pub(crate) fn room(
        &self,
        what: &'static str,
        size: usize,
        dtype: Option<Dtype>,
    ) -> Result<usize, Error> {
        if self.size != 1 && (self.size != size || dtype.is_some() && self.dtype != dtype) {
            return Err(Error::BufferType {
                what,
                expected: size,
            });
        }
        // Sizes are powers of two: no division, as this runs at every call.
        if self.address & (size as u64 - 1) != 0 {
            return Err(Error::BufferUnaligned { what, align: size });
        }
        Ok(match self.size == size {
            true => self.len,
            false => self.len * self.size / size,
        })
    }
}

/// How a backend finds out where operands are. It keeps what must outlast the call.
pub(crate) trait Resolve<'g, T, M: Memory> {
    fn read<U>(&mut self, view: &'g M::Read<'_, U>) -> Result<Span, Error>;
    fn write(&mut self, view: &'g mut M::Write<'_, T>) -> Result<Span, Error>;
    fn fill(&mut self, view: &'g mut M::Fill<'_, T>) -> Result<Span, Error>;
    fn bytes(&mut self, view: &'g mut M::Bytes<'_>) -> Result<ByteSpan, Error>;
    fn ids(&mut self, ids: &'g M::Ids<'_>) -> Result<u64, Error>;
}

const NAMES: [TensorName; 3] = [TensorName::Q, TensorName::K, TensorName::V];

/// Checks a step against its plan, and fills in all addresses but those of the angles. `report` is the
/// address of its report, if there is one.
// What is filled in is too large to be handed on.
pub(crate) fn resolve<'g, T, M: Memory>(
    plan: &Plan,
    step: &'g mut Step<'_, T, M>,
    report: Option<u64>,
    memory: &mut impl Resolve<'g, T, M>,
    addresses: &mut Addresses,
) -> Result<(), Error> {
    let Step {
        buffer,
        q,
        kv,
        q_source,
        q_codes,
        elsewhere,
        cache,
        slots,
        positions,
        weights,
        scales,
    } = step;
    let codes = q_codes
        .as_mut()
        .map(|codes| memory.bytes(codes))
        .transpose()?;
    let codes = plan_codes(plan, codes)?;
    let mut tensors = match buffer {
        Some(buffer) => {
            if q.is_some() || q_source.is_some() || kv.iter().any(Option::is_some) {
                return Err(Error::OperandMismatch {
                    tensor: TensorName::Q,
                    planned: "in a buffer of all",
                    given: "by itself",
                });
            }
            let buffer = memory.write(buffer)?;
            plan.check_one_buffer(buffer.len)?;
            let mut all = [both(buffer.address); 3];
            if plan.is_packed() || elsewhere.iter().any(Option::is_some) {
                for (at, given) in elsewhere.iter_mut().enumerate() {
                    let given = given.as_mut().map(|given| memory.fill(given)).transpose()?;
                    let coded = at == 0 && codes.is_some();
                    if let Some(address) = destination(plan, at, given, coded)? {
                        all[at].destination = address;
                    }
                }
            }
            all
        }
        None => {
            plan.check_step_operands(q, q_source.is_some(), [&kv[0], &kv[1]])?;
            let [k, v] = kv;
            let of_q = match (&plan.q, q_source) {
                (Some(planned), Some(source)) => {
                    let source = memory.read(source)?;
                    plan.check_source_length(planned, source.len)?;
                    TensorAddresses {
                        source: source.address,
                        destination: 0,
                    }
                }
                _ => tensor(plan, plan.q.as_ref(), q.as_mut(), memory)?,
            };
            let of_k = appended(plan, plan.k.as_ref(), k.as_mut(), memory)?;
            let of_v = appended(plan, plan.v.as_ref(), v.as_mut(), memory)?;
            [of_q, of_k, of_v]
        }
    };
    if let Some(codes) = codes {
        tensors[0].destination = codes;
    }
    [addresses.q, addresses.k, addresses.v] = tensors;
    addresses.stages = None;
    for (at, weights) in weights.iter().enumerate() {
        let room = at > 0 && scales[at - 1].is_some();
        plan.check_scales(at, weights.given_scales.is_some(), room)?;
        if weights.has_any() {
            let stages = addresses.stages.get_or_insert_default();
            weight_addresses(weights, memory, &mut stages[at])?;
        }
    }
    for (at, room) in scales.iter_mut().enumerate() {
        if let Some(room) = room {
            let what = ["k's scales", "v's scales"][at];
            let room = memory.bytes(room)?;
            let stages = addresses.stages.get_or_insert_default();
            stages[at + 1].scales = Some(VectorAddress {
                address: room.address,
                len: room.room(what, plan.scale_size(at + 1), None)?,
            });
        }
    }
    let (planned, remedy) = match (cache_addresses(plan, cache, memory)?, &*slots, report) {
        (None, None, _) => {
            addresses.cache = None;
            return positions.try_map_to(&mut addresses.positions, |ids| memory.ids(ids));
        }
        (Some([k, v]), Some(slots), Some(report)) => {
            let none = SlotsIn {
                choice: SlotChoice::Sequences { lengths: None },
            };
            let cache = addresses.cache.insert(CacheAddresses {
                k,
                v,
                slots: none,
                report,
            });
            slots.try_map_to(&mut cache.slots, |ids| memory.ids(ids))?;
            return positions.try_map_to(&mut addresses.positions, |ids| memory.ids(ids));
        }
        (None, Some(_), _) => (
            "has no cache",
            "leave Step::slots out, or plan with Problem::cache",
        ),
        (Some(_), None, _) => (
            "has a cache",
            "say which slots tokens have, with Step::slots",
        ),
        (Some(_), _, None) => (
            "has a cache",
            "give a report, which is told of slots outside of it",
        ),
    };
    Err(Error::AppendMismatch { planned, remedy })
}

fn both(address: u64) -> TensorAddresses {
    TensorAddresses {
        source: address,
        destination: address,
    }
}

/// The address of q's codes, if they are planned.
#[inline(always)]
fn plan_codes(plan: &Plan, given: Option<ByteSpan>) -> Result<Option<u64>, Error> {
    let (Some(q), Some(_), Some(codes)) = (&plan.q, &plan.q_codes, given) else {
        return match (&plan.q_codes, given) {
            (None, None) => Ok(None),
            (_, given) => Err(Error::Stages {
                tensor: TensorName::Q,
                what: match given {
                    Some(_) => "no codes are planned for it: plan with Problem::q_codes",
                    None => "codes are planned for it: give room for them with Step::q_codes",
                },
            }),
        };
    };
    let what = "q's codes";
    let needed = q.destination.required_len().unwrap_or(usize::MAX);
    let got = codes.room(what, 1, None)?;
    if got < needed {
        return Err(Error::BufferTooShort { what, needed, got });
    }
    Ok(Some(codes.address))
}

/// Where a tensor of one buffer, or of packed sources, is written, if that is elsewhere.
fn destination(
    plan: &Plan,
    at: usize,
    given: Option<Span>,
    coded: bool,
) -> Result<Option<u64>, Error> {
    let Some(planned) = plan.all_tensors()[at] else {
        return match given {
            None => Ok(None),
            Some(_) => Err(Error::OperandMismatch {
                tensor: NAMES[at],
                planned: "absent",
                given: "out of place",
            }),
        };
    };
    let wanted = plan.is_packed() && !planned.in_place && !coded;
    match given {
        Some(given) if wanted => {
            plan.check_destination_length(planned, given.len)?;
            Ok(Some(given.address))
        }
        None if !wanted => Ok(None),
        given => Err(Error::OperandMismatch {
            tensor: planned.name,
            planned: planned.form().name(),
            given: match given {
                Some(_) => "out of place",
                None => "without a destination",
            },
        }),
    }
}

fn tensor<'g, T, M: Memory>(
    plan: &Plan,
    planned: Option<&PlannedTensor>,
    operand: Option<&'g mut Tensor<'_, T, M>>,
    memory: &mut impl Resolve<'g, T, M>,
) -> Result<TensorAddresses, Error> {
    let (Some(planned), Some(operand)) = (planned, operand) else {
        return Ok(TensorAddresses::default());
    };
    match operand {
        InOut::InPlace(buffer) => {
            let buffer = memory.write(buffer)?;
            plan.check_lengths(planned, buffer.len, buffer.len)?;
            Ok(both(buffer.address))
        }
        InOut::OutOfPlace {
            source,
            destination,
        } => {
            let (source, destination) = (memory.read(source)?, memory.fill(destination)?);
            plan.check_lengths(planned, source.len, destination.len)?;
            Ok(TensorAddresses {
                source: source.address,
                destination: destination.address,
            })
        }
    }
}

fn appended<'g, T, M: Memory>(
    plan: &Plan,
    planned: Option<&PlannedTensor>,
    operand: Option<&'g mut Stored<'_, T, M>>,
    memory: &mut impl Resolve<'g, T, M>,
) -> Result<TensorAddresses, Error> {
    match (planned, operand) {
        (Some(planned), Some(Appended::ToCache(source))) => {
            let source = memory.read(source)?;
            plan.check_source_length(planned, source.len)?;
            Ok(TensorAddresses {
                source: source.address,
                destination: 0,
            })
        }
        (planned, Some(Appended::InOut(operand))) => tensor(plan, planned, Some(operand), memory),
        (_, None) | (None, _) => Ok(TensorAddresses::default()),
    }
}

fn weight_addresses<'g, T, M: Memory>(
    weights: &'g StageWeights<'_, T, M>,
    memory: &mut impl Resolve<'g, T, M>,
    stages: &mut StageAddresses,
) -> Result<(), Error> {
    fn vector(span: Span) -> VectorAddress {
        VectorAddress {
            address: span.address,
            len: span.len,
        }
    }
    if let Some(bias) = &weights.bias {
        stages.bias = Some(vector(memory.read(bias)?));
    }
    if let Some(weight) = &weights.norm_weight {
        stages.norm_weight = Some(vector(memory.read(weight)?));
    }
    if let Some(bias) = &weights.norm_bias {
        stages.norm_bias = Some(vector(memory.read(bias)?));
    }
    if let Some(scales) = &weights.given_scales {
        stages.scales = Some(vector(memory.read(scales)?));
    }
    Ok(())
}

/// Where the caches of keys and of values are, if they are planned.
// Two addresses that are handed on by way of memory are written as two words and read as one.
#[inline(always)]
fn cache_addresses<'g, T, M: Memory>(
    plan: &Plan,
    cache: &'g mut Caches<M::Bytes<'_>>,
    memory: &mut impl Resolve<'g, T, M>,
) -> Result<Option<[u64; 2]>, Error> {
    let room = |at: usize, span: ByteSpan| {
        let (size, dtype) = plan.cache_type(at);
        span.room(["k's cache", "v's cache"][at], size, dtype)
    };
    let (mut lengths, mut addresses) = ([None; 2], [0; 2]);
    match cache {
        Caches::None => {}
        Caches::Separate(parts) => {
            plan.check_cache_form(false)?;
            for (at, part) in parts.iter_mut().enumerate() {
                if let Some(part) = part {
                    let span = memory.bytes(part)?;
                    lengths[at] = Some(room(at, span)?);
                    addresses[at] = span.address;
                }
            }
        }
        Caches::OneBuffer(buffer) => {
            plan.check_cache_form(true)?;
            let span = memory.bytes(buffer)?;
            lengths = [Some(room(0, span)?), Some(room(1, span)?)];
            addresses = [span.address; 2];
        }
    }
    plan.check_cache_lengths(&lengths)?;
    Ok(plan.cache.is_some().then_some(addresses))
}
