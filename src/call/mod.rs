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
mod fill;
mod read;

pub use bindings::*;
pub(crate) use fill::template;

use crate::element::Dtype;
use crate::ids::{IdType, Ids};
use crate::positions::PositionsIn;
#[cfg(doc)]
use crate::{Angles, Plan};

/// A call: the element type of its streams, and all else as the kernels take it.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Call {
    /// The element type of q and k.
    pub dtype: Dtype,
    /// Everything else.
    pub params: PhasorCall,
}

impl PhasorCall {
    /// The bytes that a kernel takes by value.
    pub fn as_bytes(&self) -> &[u8] {
        // SAFETY: the header asserts that its structs have no padding, and the bindings that they are
        // laid out alike, so all bytes are initialised, and the slice borrows them.
        unsafe { std::slice::from_raw_parts((&raw const *self).cast(), size_of::<Self>()) }
    }

    /// q and k: what is read, and where it is written.
    pub(crate) fn streams(&self) -> [(&PhasorStream, &PhasorOutput); 2] {
        [(&self.q, &self.q_output), (&self.k, &self.k_output)]
    }

    /// Whether angles come from a table.
    pub(crate) fn has_table(&self) -> bool {
        self.angles.row_choice == PHASOR_ROW_AT_POSITION
    }

    /// Bytes of elements that the call reads and writes.
    pub(crate) fn bytes(&self, dtype: Dtype) -> u64 {
        let heads = |(stream, output): (&PhasorStream, &PhasorOutput)| {
            let dims = match output.in_place {
                0 => output.head_dim,
                _ => 2 * self.angles.pairs,
            };
            u64::from(stream.heads) * u64::from(dims)
        };
        let token: u64 = self.streams().map(heads).iter().sum();
        let tokens = u64::from(self.batch) * u64::from(self.tokens);
        2 * tokens * token * dtype.size() as u64
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
}

/// Positions and rows of frequencies by address.
pub type RawPositions = PositionsIn<u64>;

impl Ids<u64> {
    /// `len` values of a type at an address, which is a multiple of their size.
    pub fn at(address: u64, id_type: IdType, len: usize) -> Self {
        Self::new(address, id_type, len)
    }
}

/// All addresses of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// Ignored where the plan has no q.
    pub q: TensorAddresses,
    /// Ignored where the plan has no k.
    pub k: TensorAddresses,
    /// The angle source.
    pub angles: AngleAddresses,
    /// The positions and the rows of frequencies.
    pub positions: RawPositions,
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
