//! Operands of a step in host memory, checked and turned into addresses.

use super::{
    HostDestination, HostRotator, by_address, checked_addresses, checked_appended, expose,
    in_place, slots_by_address,
};
use crate::Error;
use crate::cache::Stored;
use crate::call::{CacheAddresses, StageAddresses, TensorAddresses, VectorAddress};
use crate::element::{Dtype, Element};
use crate::plan::{Plan, PlannedTensor};
use crate::step::{Caches, HostMemory, Memory, StageWeights, Step};
use std::marker::PhantomData;
use std::sync::atomic::AtomicU32;

impl Memory for HostMemory {
    type Read<'a, T: 'a> = &'a [T];
    type Write<'a, T: 'a> = &'a mut [T];
    type Fill<'a, T: 'a> = HostDestination<'a, T>;
    type Bytes<'a> = HostBytes<'a>;
    type Ids<'a> = &'a [u8];
}

/// The operands of [`HostRotator::step`].
pub type HostStep<'a, T> = Step<'a, T, HostMemory>;

/// What the stages of a tensor need, in host memory.
pub type HostWeights<'a, T> = StageWeights<'a, T, HostMemory>;

/// A cache, or room for codes or scales: elements, 8-bit codes, f32 scales, or bytes that may be any of
/// these. Made by `From` mutable slices and vectors.
#[derive(Debug)]
pub struct HostBytes<'a> {
    address: u64,
    len: usize,
    /// Bytes of one of them; 1 may be anything.
    size: usize,
    /// The type of elements.
    dtype: Option<Dtype>,
    borrowed: PhantomData<&'a mut [u8]>,
}

impl<'a> HostBytes<'a> {
    fn new<T>(values: &'a mut [T], dtype: Option<Dtype>) -> Self {
        Self {
            address: values.as_mut_ptr().expose_provenance() as u64,
            len: values.len(),
            size: size_of::<T>(),
            dtype,
            borrowed: PhantomData,
        }
    }

    /// How many values of `size` bytes and of a type it has room for.
    fn room(&self, what: &'static str, size: usize, dtype: Option<Dtype>) -> Result<usize, Error> {
        let bytes = self.size == 1;
        if !bytes && (self.size != size || dtype.is_some() && self.dtype != dtype) {
            return Err(Error::BufferType {
                what,
                expected: size,
            });
        }
        if !(self.address as usize).is_multiple_of(size) {
            return Err(Error::BufferUnaligned { what, align: size });
        }
        Ok(self.len * self.size / size)
    }
}

impl<'a, T: Element> From<&'a mut [T]> for HostBytes<'a> {
    fn from(elements: &'a mut [T]) -> Self {
        Self::new(elements, Some(T::DTYPE))
    }
}

impl<'a> From<&'a mut [u8]> for HostBytes<'a> {
    fn from(bytes: &'a mut [u8]) -> Self {
        Self::new(bytes, None)
    }
}

impl<'a> From<&'a mut [i8]> for HostBytes<'a> {
    fn from(bytes: &'a mut [i8]) -> Self {
        Self::new(bytes, None)
    }
}

impl<'a, T> From<&'a mut Vec<T>> for HostBytes<'a>
where
    HostBytes<'a>: From<&'a mut [T]>,
{
    fn from(values: &'a mut Vec<T>) -> Self {
        values.as_mut_slice().into()
    }
}

impl HostRotator {
    /// Performs all that was planned: biases, norms, rotation, scales and codes of q, k and v, and stores
    /// k and v in their caches. Nothing is written if an error is returned.
    ///
    /// Where several tokens of a call have one slot, it holds the last of them.
    ///
    /// ```
    /// use phasor::norm::HeadNorm;
    /// use phasor::quantize::{Codes, ScaleForm};
    /// use phasor::{
    ///     CacheLayout, Dtype, Frequencies, Host, HostStep, HostWeights, KvCacheLayout, Layout, Pairing,
    ///     Positions, Problem, Rope, Slots, Stages, Stored, StoredCodes,
    /// };
    ///
    /// # fn main() -> Result<(), phasor::Error> {
    /// let rope = Rope::new(Frequencies::from_theta(10_000.0, 64)?, Pairing::HalfSplit);
    /// let rotator = Host::new().rotator(&rope);
    /// // Packed qkv of 4, 2 and 2 heads; norms of q and k; a cache of e4m3.
    /// let window = |range| Layout::packed_heads(1, 16, 8, 64, range);
    /// let norm = Stages::new().norm(HeadNorm::rms(1e-6));
    /// let cache = CacheLayout::paged_nhd(10, 16, 2, 64);
    /// let codes = StoredCodes::given(Codes::E4m3, ScaleForm::Divide);
    /// let problem = Problem::new(Dtype::F32)
    ///     .q(window(0..4))
    ///     .k_to_cache(window(4..6))
    ///     .v_to_cache(window(6..8))
    ///     .packed()
    ///     .q_stages(norm)
    ///     .k_stages(norm)
    ///     .cache(KvCacheLayout::separate(cache, cache).with_codes(codes));
    /// let plan = rotator.plan(&problem)?;
    ///
    /// let mut qkv = vec![1.0f32; 16 * 8 * 64];
    /// let (mut k_cache, mut v_cache) = (vec![0u8; 10 * 16 * 2 * 64], vec![0u8; 10 * 16 * 2 * 64]);
    /// let (q_norm, k_norm) = ([1.0f32; 64], [0.5f32; 64]);
    /// let (cu_seqlens, lengths, pages) = ([0, 7, 8], [0, 20], [3, -1, 5, 8]);
    /// let step = HostStep::new(Positions::start_per_sequence(&lengths).cu_seqlens(&cu_seqlens))
    ///     .buffer(&mut qkv[..])
    ///     .q_weights(HostWeights::new().norm(&q_norm[..]))
    ///     .k_weights(HostWeights::new().norm(&k_norm[..]).scales(&[0.25][..]))
    ///     .v_weights(HostWeights::new().scales(&[0.5][..]))
    ///     .k_cache(&mut k_cache)
    ///     .v_cache(&mut v_cache)
    ///     .slots(Slots::page_table(&pages, &lengths));
    /// assert_eq!(rotator.step(&plan, step)?, Stored::All);
    /// assert_eq!(v_cache[(8 * 16 + 4) * 2 * 64], 0x40); // 1.0 / 0.5
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Those of [`append`](Self::append), [`Error::Stages`], [`Error::StageLength`],
    /// [`Error::BufferType`] and [`Error::BufferUnaligned`].
    pub fn step<T: Element>(&self, plan: &Plan, step: HostStep<'_, T>) -> Result<Stored, Error> {
        self.check(plan, T::DTYPE)?;
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
        let codes_at = match (&plan.q, &q_codes) {
            (Some(q), Some(codes)) if plan.q_codes.is_some() => {
                let needed = q.destination.required_len().unwrap_or(usize::MAX);
                let got = codes.room("q's codes", 1, None)?;
                if got < needed {
                    return Err(Error::BufferTooShort {
                        what: "q's codes",
                        needed,
                        got,
                    });
                }
                Some(codes.address)
            }
            (_, None) if plan.q_codes.is_none() => None,
            _ => return Err(plan.q_codes_differ(q_codes.is_some())),
        };
        let mut tensors = match buffer {
            Some(buffer) => {
                if q.is_some() || q_source.is_some() || kv.iter().any(Option::is_some) {
                    return Err(Error::OperandMismatch {
                        tensor: crate::TensorName::Q,
                        planned: "in a buffer of all",
                        given: "by itself",
                    });
                }
                if plan.is_packed() {
                    plan.check_packed(buffer.len())?;
                } else {
                    plan.check_one_buffer(buffer.len())?;
                }
                let mut all = [in_place(buffer); 3];
                for ((at, planned), given) in all.iter_mut().zip(plan.all_tensors()).zip(elsewhere)
                {
                    at.destination = destination(plan, planned, given, at.destination, codes_at)?;
                }
                all
            }
            None => {
                if plan.q_codes.is_some() {
                    plan.check_coded_operands(&q, q_source.is_some(), [&kv[0], &kv[1]])?;
                } else {
                    plan.check_append_operands(&q, [&kv[0], &kv[1]])?;
                }
                let [k, v] = kv;
                let q = match (&plan.q, q_source) {
                    (Some(planned), Some(source)) => {
                        plan.check_source_length(planned, source.len())?;
                        TensorAddresses {
                            source: expose(source.as_ptr()),
                            destination: 0,
                        }
                    }
                    (planned, _) => checked_addresses(plan, planned.as_ref(), q)?,
                };
                [
                    q,
                    checked_appended(plan, plan.k.as_ref(), k)?,
                    checked_appended(plan, plan.v.as_ref(), v)?,
                ]
            }
        };
        if let Some(codes) = codes_at {
            tensors[0].destination = codes;
        }
        let stages = stage_addresses(plan, &weights, &scales)?;
        let report = AtomicU32::new(0);
        let addresses = cache_addresses(plan, cache)?;
        let addresses = match (addresses, slots) {
            (Some([k, v]), Some(slots)) => Some(CacheAddresses {
                k,
                v,
                slots: slots_by_address(&slots),
                report: expose(&raw const report),
            }),
            (None, None) => None,
            (Some(_), None) => {
                return Err(Error::AppendMismatch {
                    planned: "has a cache",
                    remedy: "say which slots tokens have, with Step::slots",
                });
            }
            (None, Some(_)) => {
                return Err(Error::AppendMismatch {
                    planned: "has no cache",
                    remedy: "leave Step::slots out, or plan with Problem::cache",
                });
            }
        };
        // SAFETY: the plan proved, or its maker vouched, that what is written does not overlap; the
        // borrows keep the buffers apart; their lengths have been checked.
        unsafe { self.perform(plan, tensors, by_address(&positions), addresses, stages)? };
        Ok(match report.into_inner() {
            0 => Stored::All,
            _ => Stored::NotAll,
        })
    }
}

/// Where a tensor of one buffer, or of packed sources, is written.
fn destination<T: Element>(
    plan: &Plan,
    planned: Option<&PlannedTensor>,
    given: Option<HostDestination<'_, T>>,
    in_place: u64,
    codes: Option<u64>,
) -> Result<u64, Error> {
    let Some(planned) = planned else {
        return match given {
            None => Ok(in_place),
            Some(_) => Err(Error::AppendMismatch {
                planned: "lacks a tensor that the call has a destination for",
                remedy: "leave it out, or plan it",
            }),
        };
    };
    let coded = planned.name == crate::TensorName::Q && codes.is_some();
    let wanted = plan.is_packed() && !planned.in_place && !coded;
    match given {
        Some(given) if wanted => {
            plan.check_destination_length(planned, given.len())?;
            Ok(given.0.as_mut_ptr().expose_provenance() as u64)
        }
        None if !wanted => Ok(in_place),
        given => Err(Error::OperandMismatch {
            tensor: planned.name,
            planned: planned.form(),
            given: match given {
                Some(_) => "out of place",
                None => "without a destination",
            },
        }),
    }
}

fn vector<T>(values: &Option<&[T]>) -> Option<VectorAddress> {
    values.as_ref().map(|values| VectorAddress {
        address: expose(values.as_ptr()),
        len: values.len(),
    })
}

fn stage_addresses<T: Element>(
    plan: &Plan,
    weights: &[HostWeights<'_, T>; 3],
    scales: &[Option<HostBytes<'_>>; 2],
) -> Result<[StageAddresses; 3], Error> {
    let mut all = [StageAddresses::default(); 3];
    for (at, (stages, weights)) in all.iter_mut().zip(weights).enumerate() {
        *stages = StageAddresses {
            bias: vector(&weights.bias),
            norm_weight: vector(&weights.norm_weight),
            norm_bias: vector(&weights.norm_bias),
            scales: vector(&weights.given_scales),
        };
        let written = at.checked_sub(1).and_then(|at| scales[at].as_ref());
        plan.check_scales(at, stages.scales.is_some(), written.is_some())?;
        if let Some(scales) = written {
            let what = ["k's scales", "v's scales"][at - 1];
            let size = plan.scale_size(at);
            stages.scales = Some(VectorAddress {
                address: scales.address,
                len: scales.room(what, size, None)?,
            });
        }
    }
    Ok(all)
}

fn cache_addresses(plan: &Plan, cache: Caches<HostBytes<'_>>) -> Result<Option<[u64; 2]>, Error> {
    let one_buffer = matches!(cache, Caches::OneBuffer(_));
    if !matches!(cache, Caches::None) {
        plan.check_cache_form(one_buffer)?;
    }
    let types = plan.cache_types();
    let room = |at: usize, buffer: &HostBytes<'_>| {
        let (size, dtype) = types[at];
        buffer.room(["k's cache", "v's cache"][at], size, dtype)
    };
    let (lengths, addresses) = match &cache {
        Caches::None => ([None; 2], [0; 2]),
        Caches::Separate(parts) => {
            let mut lengths = [None; 2];
            for (at, part) in parts.iter().enumerate() {
                lengths[at] = part.as_ref().map(|part| room(at, part)).transpose()?;
            }
            (
                lengths,
                parts
                    .each_ref()
                    .map(|part| part.as_ref().map_or(0, |part| part.address)),
            )
        }
        Caches::OneBuffer(both) => (
            [Some(room(0, both)?), Some(room(1, both)?)],
            [both.address; 2],
        ),
    };
    plan.check_cache_lengths(lengths)?;
    Ok(plan.cache.is_some().then_some(addresses))
}
