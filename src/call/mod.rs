//! One call as data, which every backend executes: [`Plan::call`] fills it in, the host backend walks
//! it, the kernels take it by value.
//!
//! The structs are generated from `cuda/phasor_call.h`, where the fields are documented. The checked-in
//! bindings are used unless the `bindgen` feature regenerates them at build time.

#[allow(missing_docs, reason = "documented in the header")]
#[cfg(not(feature = "bindgen"))]
mod bindings;
#[allow(missing_docs, reason = "documented in the header")]
#[cfg(feature = "bindgen")]
mod bindings {
    include!(concat!(env!("OUT_DIR"), "/bindings.rs"));
}
#[cfg(test)]
mod checks;
mod fill;
mod fusion;
mod read;

pub use bindings::*;
pub(crate) use fill::template;
pub(crate) use fusion::fusion;
pub(crate) use read::{Slot, Token};

use crate::cache::SlotsIn;
use crate::element::Dtype;
use crate::ids::{IdType, Ids};
use crate::positions::PositionsIn;
#[cfg(doc)]
use crate::{Angles, Plan};
use std::num::NonZeroU32;

/// A call: the element type of its streams, and all else as the kernels take it.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Call {
    /// The element type of q and k.
    pub dtype: Dtype,
    /// Everything else, but for stages.
    pub params: PhasorCall,
    /// The stages, if there are any.
    pub fusion: Option<PhasorFusion>,
}

/// One of q, k and v: what is read, and where it is written.
#[derive(Clone, Copy)]
pub(crate) struct Stream<'a> {
    pub(crate) read: &'a PhasorStream,
    pub(crate) output: &'a PhasorOutput,
    pub(crate) cache: Option<&'a PhasorCache>,
    pub(crate) rotates: bool,
}

impl Call {
    /// q, k and v, with their stages if they have any.
    #[inline]
    pub(crate) fn streams_and_stages(&self) -> [(Stream<'_>, Option<&PhasorStages>); 3] {
        let [q, k, v] = self.params.streams();
        let Some(fusion) = &self.fusion else {
            return [(q, None), (k, None), (v, None)];
        };
        let present = |stages: &&PhasorStages| stages.present == 1;
        [
            (q, Some(&fusion.q).filter(present)),
            (k, Some(&fusion.k).filter(present)),
            (v, Some(&fusion.v).filter(present)),
        ]
    }

    /// Bytes of elements that the call reads and writes, where those of a stream with stages count
    /// `staged` times.
    pub(crate) fn bytes(&self, staged: u64) -> u64 {
        let call = &self.params;
        let heads = |(stream, stages): &(Stream<'_>, Option<&PhasorStages>)| {
            let whole = stages.is_some() || stream.cache.is_some() || stream.output.in_place == 0;
            let dims = match whole {
                true => stream.output.head_dim,
                false if !stream.rotates => 0,
                false => 2 * call.angles.pairs,
            };
            let times = if stages.is_some() { staged } else { 1 };
            times * u64::from(stream.read.heads) * u64::from(dims)
        };
        let token: u64 = self.streams_and_stages().iter().map(heads).sum();
        let tokens = u64::from(call.batch) * u64::from(call.tokens);
        2 * tokens * token * self.dtype.size() as u64
    }
}

impl Stream<'_> {
    /// Whether dims that do not rotate are written somewhere.
    pub(crate) fn copies(&self) -> bool {
        self.output.in_place == 0 || self.cache.is_some()
    }
}

impl PhasorFusion {
    /// The bytes that a kernel takes by value.
    pub fn as_bytes(&self) -> &[u8] {
        // SAFETY: as those of a call.
        unsafe { std::slice::from_raw_parts((&raw const *self).cast(), size_of::<Self>()) }
    }
}

impl PhasorCall {
    /// The bytes that a kernel takes by value.
    pub fn as_bytes(&self) -> &[u8] {
        // SAFETY: the header asserts that its structs have no padding, and the bindings that they are
        // laid out alike, so all bytes are initialised, and the slice borrows them.
        unsafe { std::slice::from_raw_parts((&raw const *self).cast(), size_of::<Self>()) }
    }

    /// q, k and v.
    #[inline]
    pub(crate) fn streams(&self) -> [Stream<'_>; 3] {
        [
            Stream {
                read: &self.q,
                output: &self.q_output,
                cache: None,
                rotates: true,
            },
            Stream {
                read: &self.k,
                output: &self.k_output,
                cache: Some(&self.k_cache).filter(|cache| cache.present == 1),
                rotates: true,
            },
            Stream {
                read: &self.v,
                output: &self.v_output,
                cache: Some(&self.v_cache).filter(|cache| cache.present == 1),
                rotates: false,
            },
        ]
    }

    /// Numbers the groups of heads that threads of a kernel visit, of up to 2^`heads_log2` heads each: see the
    /// header. A stream has a multiple of `rows` groups, and none if it is written nowhere.
    pub fn number_groups(&mut self, heads_log2: u32, rows: u32) {
        let [q, k, v] = self.groups(heads_log2, rows);
        self.heads_log2 = heads_log2;
        (self.q_groups_begin, self.k_groups_begin) = (0, q);
        (self.v_groups_begin, self.groups_end) = (q + k, q + k + v);
    }

    /// How many groups each stream has.
    pub(crate) fn groups(&self, heads_log2: u32, rows: u32) -> [u32; 3] {
        self.streams().map(|stream| {
            if stream.output.nowhere == 1 && stream.cache.is_none() {
                return 0;
            }
            let groups = stream.read.heads.div_ceil(1 << heads_log2);
            groups.next_multiple_of(rows)
        })
    }

    /// Whether q and k are rotated, in sequences of as many tokens, and that is all.
    pub(crate) fn rotates_only(&self) -> bool {
        self.v.heads == 0 && self.k_cache.present == 0 && !self.is_ragged()
    }

    /// Whether angles come from a table.
    pub(crate) fn has_table(&self) -> bool {
        self.angles.row_choice == PHASOR_ROW_AT_POSITION
    }
}

/// Addresses of the buffers of one tensor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TensorAddresses {
    /// Start of the buffer that is read; the layout's offset is added to it. Not used in place.
    pub source: u64,
    /// Start of the buffer that is written.
    pub destination: u64,
}

/// Addresses of an angle source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AngleAddresses {
    /// For [`Angles::Exact`] and [`Angles::Rows`].
    Steps {
        /// `u64[rows, axes, pairs]`.
        steps: u64,
        /// Attention factors, `f32[rows]`. Not used where there is one row.
        factors: u64,
    },
    /// For [`Angles::Table`].
    Table {
        /// `f32[rows, pairs]`.
        cos: u64,
        /// `f32[rows, pairs]`.
        sin: u64,
    },
    /// For [`Angles::Table`]: another table than the rotation's, which serves this call only and has as
    /// many pairs. What the rotation's says of positions outside of it holds for this one;
    /// [`OutOfRange::Error`](crate::OutOfRange::Error) is refused.
    TableOfCall {
        /// `f32[rows, pairs]`.
        cos: u64,
        /// `f32[rows, pairs]`.
        sin: u64,
        /// Rows of the two.
        rows: NonZeroU32,
    },
}

/// Positions and rows of frequencies by address.
pub type RawPositions = PositionsIn<u64>;

/// Slots at addresses.
pub type RawSlots = SlotsIn<u64>;

impl Ids<u64> {
    /// `len` values of a type at an address, which is a multiple of their size.
    pub fn at(address: u64, id_type: IdType, len: usize) -> Self {
        Self::new(address, id_type, len)
    }
}

/// A vector of dims or scales.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VectorAddress {
    /// Of the first value.
    pub address: u64,
    /// How many values it has.
    pub len: usize,
}

/// What the stages of one tensor need.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StageAddresses {
    /// The bias, `[heads, head_dim]`.
    pub bias: Option<VectorAddress>,
    /// The norm's weight, `[head_dim]` or `[heads, head_dim]`.
    pub norm_weight: Option<VectorAddress>,
    /// The norm's bias, alike.
    pub norm_bias: Option<VectorAddress>,
    /// The scales that are given, one or one for each head; or the start of the buffer that has those that
    /// are written, to which the layout's offset is added. None where they lie in the cache.
    pub scales: Option<VectorAddress>,
}

/// All addresses of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// Ignored where the plan has no q.
    pub q: TensorAddresses,
    /// Ignored where the plan has no k.
    pub k: TensorAddresses,
    /// Ignored where the plan has no v.
    pub v: TensorAddresses,
    /// The angle source.
    pub angles: AngleAddresses,
    /// The positions and the rows of frequencies.
    pub positions: RawPositions,
    /// The caches, where the plan has any.
    pub cache: Option<CacheAddresses>,
    /// What the stages of q, k and v need, where they need anything.
    pub stages: Option<[StageAddresses; 3]>,
}

/// The caches of a call, and the slots in them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheAddresses {
    /// Start of the buffer that has the keys' cache; the layout's offset is added to it.
    pub k: u64,
    /// Start of the buffer that has the values' cache.
    pub v: u64,
    /// Which slot each token has.
    pub slots: RawSlots,
    /// A `u32` that is set to 1 where a slot is outside of the caches, and else not touched.
    pub report: u64,
}

#[cfg(all(test, feature = "bindgen"))]
mod tests {
    #[test]
    fn checked_in_bindings_are_fresh() {
        assert_eq!(
            include_str!("bindings.rs"),
            include_str!(concat!(env!("OUT_DIR"), "/bindings.rs")),
            "copy the generated bindings.rs to src/call/bindings.rs"
        );
    }
}
