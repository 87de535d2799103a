//! The structs of `cuda/attention_call.h`, field by field.

use phasor::call::{PhasorCache, PhasorCodes, PhasorSequences, PhasorSlots};

/// A call of attention, as the kernels take it; `cuda/attention_call.h` says what its fields are.
#[allow(missing_docs, reason = "documented in the header")]
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct PhasorAttend {
    pub q: u64,
    pub out: u64,
    pub q_token: i64,
    pub q_head: i64,
    pub out_token: i64,
    pub out_head: i64,
    pub partial: u64,
    pub states: u64,
    pub sinks: u64,
    pub k: PhasorCache,
    pub v: PhasorCache,
    pub slots: PhasorSlots,
    pub sequences: PhasorSequences,
    pub tokens: u32,
    pub heads: u32,
    pub group: u32,
    pub head_dim: u32,
    pub splits: u32,
    pub most_keys: u32,
    pub mask: u32,
    pub window: u32,
    pub factor: f32,
    pub cap: f32,
    pub k_in_chunks: u32,
    pub v_in_chunks: u32,
    pub k_codes: PhasorCodes,
    pub v_codes: PhasorCodes,
    pub q_type: u32,
    pub v_head_dim: u32,
}

// As in the header: no padding, so that every byte is set.
const _: () =
    assert!(size_of::<PhasorAttend>() == 9 * 8 + 2 * 48 + 120 + 40 + 12 * 4 + 2 * 72 + 2 * 4);

/// Weights to be dequantised, or activations to be rounded; `cuda/attention_call.h` says what its fields are.
#[allow(missing_docs, reason = "documented in the header")]
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct PhasorDequantize {
    pub blocks: u64,
    pub scales: u64,
    pub zeros: u64,
    pub groups_of_inputs: u64,
    pub out: u64,
    pub count: u64,
    pub first_row: u32,
    pub rows: u32,
    pub in_features: u32,
    pub out_features: u32,
    pub groups: u32,
    pub group_size: u32,
    pub zero_offset: u32,
    pub type_: u32,
    pub group_rows: u32,
    pub scale_type: u32,
    pub scale: f32,
    pub most_amax: f32,
}

const _: () = assert!(size_of::<PhasorDequantize>() == 6 * 8 + 12 * 4);

/// Tokens to be normed; `cuda/attention_call.h` says what its fields are.
#[allow(missing_docs, reason = "documented in the header")]
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct PhasorLatentNorm {
    pub x: u64,
    pub weight: u64,
    pub tokens: u64,
    pub dims: u32,
    pub eps: f32,
}

const _: () = assert!(size_of::<PhasorLatentNorm>() == 3 * 8 + 2 * 4);

/// Keys of latent attention; `cuda/attention_call.h` says what its fields are.
#[allow(missing_docs, reason = "documented in the header")]
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct PhasorLatentKeys {
    pub of_heads: u64,
    pub of_all: u64,
    pub out: u64,
    pub count: u64,
    pub heads: u32,
    pub own: u32,
    pub shared: u32,
    pub chunks: u32,
}

const _: () = assert!(size_of::<PhasorLatentKeys>() == 4 * 8 + 4 * 4);

macro_rules! as_bytes {
    ($($params:ty),*) => {$(
        impl $params {
            /// Its bytes, as a launch takes them.
            pub fn as_bytes(&self) -> &[u8] {
                // SAFETY: integers and floats without padding, which an assertion above makes sure of.
                unsafe { std::slice::from_raw_parts((&raw const *self).cast(), size_of::<Self>()) }
            }
        }
    )*};
}
as_bytes!(
    PhasorAttend,
    PhasorDequantize,
    PhasorLatentNorm,
    PhasorLatentKeys
);
