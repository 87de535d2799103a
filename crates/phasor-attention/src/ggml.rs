//! Weights of GGUF files.

use crate::AttentionError;
use crate::error::agree;
use crate::projection::{Weights, check_features};
use phasor::half::f16;
use std::ops::Range;

/// A block format of ggml. Values are those of its own dequantisation in f32, bit for bit: all products
/// are exact there, and of `Q4_K` and `Q5_K` the difference is rounded once.
///
/// | | elements | bytes | value of an element |
/// |---|---|---|---|
/// | `Q4_0` | 32 | 18: f16 `d`, 16 of nibbles | `d (n - 8)` |
/// | `Q8_0` | 32 | 34: f16 `d`, 32 of i8 | `d n` |
/// | `Q4_K` | 256 | 144: f16 `d`, f16 `dmin`, 12 of scales and minima, 128 of nibbles | `d s n - dmin m` |
/// | `Q5_K` | 256 | 176: as `Q4_K`, with 32 of fifth bits before the nibbles | `d s n - dmin m` |
/// | `Q6_K` | 256 | 210: 128 of nibbles, 64 of upper bits, 16 scales of i8, f16 `d` | `d s (n - 32)` |
///
/// Engines that multiply in integers (llama.cpp, MAX) round activations to 8 bits too, and so differ from
/// the product with these values by that rounding.
///
/// Files of the llama architecture have the rows of q and k in an order for
/// [`Pairing::Interleaved`](phasor::Pairing::Interleaved).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types)] // The names of the files.
#[non_exhaustive]
pub enum GgmlType {
    /// 4 bits, a scale for 32.
    Q4_0,
    /// 8 bits, a scale for 32.
    Q8_0,
    /// 4 bits, a scale and a minimum for 32.
    Q4_K,
    /// 5 bits, a scale and a minimum for 32.
    Q5_K,
    /// 6 bits, a scale for 16.
    Q6_K,
}

impl GgmlType {
    /// All of them.
    pub const ALL: [GgmlType; 5] = [
        GgmlType::Q4_0,
        GgmlType::Q8_0,
        GgmlType::Q4_K,
        GgmlType::Q5_K,
        GgmlType::Q6_K,
    ];

    /// Elements and bytes of a block.
    pub const fn block(self) -> (usize, usize) {
        match self {
            GgmlType::Q4_0 => (32, 18),
            GgmlType::Q8_0 => (32, 34),
            GgmlType::Q4_K => (256, 144),
            GgmlType::Q5_K => (256, 176),
            GgmlType::Q6_K => (256, 210),
        }
    }

    /// As in files: `Q4_K`.
    pub const fn name(self) -> &'static str {
        match self {
            GgmlType::Q4_0 => "Q4_0",
            GgmlType::Q8_0 => "Q8_0",
            GgmlType::Q4_K => "Q4_K",
            GgmlType::Q5_K => "Q5_K",
            GgmlType::Q6_K => "Q6_K",
        }
    }

    /// The values of whole blocks.
    ///
    /// # Errors
    /// [`AttentionError::Mismatch`] unless `blocks` are whole blocks, and `values` as many as they have.
    pub fn dequantize(self, blocks: &[u8], values: &mut [f32]) -> Result<(), AttentionError> {
        let (elements, bytes) = self.block();
        let count = blocks.len() / bytes;
        agree("bytes of whole blocks", count * bytes, blocks.len())?;
        agree("values of the blocks", count * elements, values.len())?;
        self.read(blocks, values);
        Ok(())
    }

    fn read(self, blocks: &[u8], values: &mut [f32]) {
        let (elements, bytes) = self.block();
        let of_block = match self {
            GgmlType::Q4_0 => q4_0,
            GgmlType::Q8_0 => q8_0,
            GgmlType::Q4_K => q4_k,
            GgmlType::Q5_K => q5_k,
            GgmlType::Q6_K => q6_k,
        };
        let values = values.chunks_exact_mut(elements);
        for (block, values) in blocks.chunks_exact(bytes).zip(values) {
            of_block(block, values);
        }
    }
}

fn half(bytes: &[u8]) -> f32 {
    f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

fn q4_0(block: &[u8], values: &mut [f32]) {
    let d = half(block);
    let (low, high) = values.split_at_mut(16);
    for ((&byte, low), high) in block[2..].iter().zip(low).zip(high) {
        *low = d * f32::from((byte & 15) as i8 - 8);
        *high = d * f32::from((byte >> 4) as i8 - 8);
    }
}

fn q8_0(block: &[u8], values: &mut [f32]) {
    let d = half(block);
    for (&byte, value) in block[2..].iter().zip(values) {
        *value = d * f32::from(byte as i8);
    }
}

/// The six-bit scale and minimum of a group of 32. The first four have bytes of their own, whose upper two
/// bits are the upper ones of the last four.
fn scale_and_minimum(packed: &[u8], group: usize) -> (f32, f32) {
    let (scale, minimum) = match group {
        0..4 => (packed[group] & 63, packed[group + 4] & 63),
        _ => {
            let nibbles = packed[group + 4];
            (
                nibbles & 15 | packed[group - 4] >> 6 << 4,
                nibbles >> 4 | packed[group] >> 6 << 4,
            )
        }
    };
    (scale.into(), minimum.into())
}

fn q4_k(block: &[u8], values: &mut [f32]) {
    k_groups(block, &[0; 32], &block[16..], values);
}

fn q5_k(block: &[u8], values: &mut [f32]) {
    k_groups(block, &block[16..48], &block[48..], values);
}

/// Each 32 bytes of nibbles have two groups of 32, the lower nibbles first; bit `g` of byte `j` of `fifth`
/// is that of element `j` of group `g`.
fn k_groups(block: &[u8], fifth: &[u8], nibbles: &[u8], values: &mut [f32]) {
    let (d, least) = (half(block), half(&block[2..]));
    let packed = &block[4..16];
    for (group, values) in values.chunks_exact_mut(32).enumerate() {
        let (scale, minimum) = scale_and_minimum(packed, group);
        let (scale, minimum) = (d * scale, least * minimum);
        let nibbles = &nibbles[group / 2 * 32..];
        for ((value, &byte), &fifth) in values.iter_mut().zip(nibbles).zip(fifth) {
            let low = byte >> (group % 2 * 4) & 15;
            let n = low | (fifth >> group & 1) << 4;
            *value = scale * f32::from(n) - minimum;
        }
    }
}

fn q6_k(block: &[u8], values: &mut [f32]) {
    let (low, rest) = block.split_at(128);
    let (high, rest) = rest.split_at(64);
    let (scales, d) = rest.split_at(16);
    let d = half(d);
    for (half, values) in values.chunks_exact_mut(128).enumerate() {
        for (at, value) in values.iter_mut().enumerate() {
            let (quarter, j) = (at / 32, at % 32);
            let nibble = low[half * 64 + quarter % 2 * 32 + j] >> (quarter / 2 * 4) & 15;
            let upper = high[half * 32 + j] >> (quarter * 2) & 3;
            let scale = scales[half * 8 + at / 16] as i8;
            let n = (nibble | upper << 4) as i8 - 32;
            *value = d * f32::from(scale) * f32::from(n);
        }
    }
}

/// A matrix of a GGUF file, `[out_features, in_features]` in blocks along the rows. `S` holds its bytes: a
/// vector, a mapped file.
#[derive(Clone, Debug)]
pub struct GgmlWeights<S = Vec<u8>> {
    bytes: S,
    ggml_type: GgmlType,
    out_features: usize,
    in_features: usize,
}

impl<S: AsRef<[u8]>> GgmlWeights<S> {
    /// The bytes of a tensor. (A file has its sizes the other way round, `[in_features, out_features]`.)
    ///
    /// # Errors
    /// [`AttentionError::Mismatch`] unless rows are whole blocks, and the bytes as many as they have;
    /// [`AttentionError::Value`] for no rows or columns.
    pub fn new(
        ggml_type: GgmlType,
        bytes: S,
        out_features: usize,
        in_features: usize,
    ) -> Result<Self, AttentionError> {
        check_features(out_features, in_features)?;
        let (elements, of_block) = ggml_type.block();
        agree(
            "in_features, whole blocks",
            in_features / elements * elements,
            in_features,
        )?;
        let needed = out_features.saturating_mul(in_features / elements * of_block);
        agree("bytes of a GGUF tensor", needed, bytes.as_ref().len())?;
        Ok(Self {
            bytes,
            ggml_type,
            out_features,
            in_features,
        })
    }
}

impl<S: AsRef<[u8]> + Send + Sync> Weights for GgmlWeights<S> {
    fn in_features(&self) -> usize {
        self.in_features
    }

    fn out_features(&self) -> usize {
        self.out_features
    }

    fn read(&self, rows: Range<usize>, values: &mut [f32]) {
        let (elements, bytes) = self.ggml_type.block();
        let row = self.in_features / elements * bytes;
        let blocks = &self.bytes.as_ref()[rows.start * row..rows.end * row];
        self.ggml_type.read(blocks, values);
    }
}
