//! Weights of GGUF files.

use crate::AttentionError;
use crate::error::agree;
use crate::projection::{Projection, Weights, check_features, narrow_panels, tokens_of};
use phasor::Element;
use phasor::half::f16;
use rayon::prelude::*;
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
/// the product with these values by that rounding: [`GgmlLinear`] does as they do.
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
        let values = values.chunks_exact_mut(elements);
        let mut block = Block::default();
        for (packed, values) in blocks.chunks_exact(bytes).zip(values) {
            block.unpack(self, packed);
            let groups = values
                .chunks_exact_mut(GROUP)
                .zip(block.n.as_chunks::<GROUP>().0);
            for (at, (values, n)) in groups.enumerate() {
                let scale = block.d * f32::from(block.scales[at]);
                let minimum = block.least * f32::from(block.minima[at]);
                for (value, &n) in values.iter_mut().zip(n) {
                    *value = scale * f32::from(n) - minimum;
                }
            }
        }
    }
}

fn half(bytes: &[u8]) -> f32 {
    f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

/// Elements that have one scale in every format.
const GROUP: usize = 16;
/// Elements of the largest block.
const LARGEST: usize = 256;

/// A block as integers: element `i` is `d * scale * n - least * minimum` of its group, up to rounding.
struct Block {
    d: f32,
    least: f32,
    n: [i8; LARGEST],
    scales: [i8; LARGEST / GROUP],
    minima: [u8; LARGEST / GROUP],
}

impl Default for Block {
    fn default() -> Self {
        Self {
            d: 0.0,
            least: 0.0,
            n: [0; LARGEST],
            scales: [1; LARGEST / GROUP],
            minima: [0; LARGEST / GROUP],
        }
    }
}

impl Block {
    /// Always of one format, as some leave scales or minima as they were.
    #[inline(always)]
    fn unpack(&mut self, of: GgmlType, packed: &[u8]) {
        match of {
            GgmlType::Q4_0 => {
                self.d = half(packed);
                let (low, high) = self.n.split_at_mut(16);
                for ((&byte, low), high) in packed[2..18].iter().zip(low).zip(high) {
                    *low = (byte & 15) as i8 - 8;
                    *high = (byte >> 4) as i8 - 8;
                }
            }
            GgmlType::Q8_0 => {
                self.d = half(packed);
                for (&byte, n) in packed[2..34].iter().zip(&mut self.n) {
                    *n = byte as i8;
                }
            }
            GgmlType::Q4_K => self.unpack_k(packed, &[0; 32], &packed[16..]),
            GgmlType::Q5_K => self.unpack_k(packed, &packed[16..48], &packed[48..]),
            GgmlType::Q6_K => self.unpack_q6_k(packed),
        }
    }

    /// Each 32 bytes of nibbles have two groups of 32, the lower nibbles first; bit `g` of byte `j` of
    /// `fifth` is that of element `j` of group `g`.
    #[inline(always)]
    fn unpack_k(&mut self, packed: &[u8], fifth: &[u8], nibbles: &[u8]) {
        (self.d, self.least) = (half(packed), half(&packed[2..]));
        for (group, n) in self.n.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            let (scale, minimum) = scale_and_minimum(&packed[4..16], group);
            self.scales[2 * group..][..2].fill(scale as i8);
            self.minima[2 * group..][..2].fill(minimum);
            let nibbles = &nibbles[group / 2 * 32..][..32];
            for ((n, &byte), &fifth) in n.iter_mut().zip(nibbles).zip(fifth) {
                let low = byte >> (group % 2 * 4) & 15;
                *n = (low | (fifth >> group & 1) << 4) as i8;
            }
        }
    }

    #[inline(always)]
    fn unpack_q6_k(&mut self, packed: &[u8]) {
        let (low, rest) = packed.split_at(128);
        let (high, rest) = rest.split_at(64);
        let (scales, d) = rest.split_at(16);
        self.d = half(d);
        for (to, &scale) in self.scales.iter_mut().zip(scales) {
            *to = scale as i8;
        }
        for (at, n) in self.n.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            let (of_half, quarter) = (at / 4, at % 4);
            let low = &low[of_half * 64 + quarter % 2 * 32..][..32];
            let high = &high[of_half * 32..][..32];
            for ((n, &low), &high) in n.iter_mut().zip(low).zip(high) {
                let nibble = low >> (quarter / 2 * 4) & 15;
                let upper = high >> (quarter * 2) & 3;
                *n = (nibble | upper << 4) as i8 - 32;
            }
        }
    }
}

/// The six-bit scale and minimum of a group of 32. The first four have bytes of their own, whose upper two
/// bits are the upper ones of the last four.
#[inline(always)]
fn scale_and_minimum(packed: &[u8], group: usize) -> (u8, u8) {
    match group {
        0..4 => (packed[group] & 63, packed[group + 4] & 63),
        _ => {
            let nibbles = packed[group + 4];
            (
                nibbles & 15 | packed[group - 4] >> 6 << 4,
                nibbles >> 4 | packed[group] >> 6 << 4,
            )
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

/// The product with weights of a GGUF file in integers, as llama.cpp and MAX form it: it reads fewer bytes,
/// and differs from [`Linear`](crate::Linear)'s by the rounding of activations to 8 bits, by up to 1e-2 of the
/// largest result.
///
/// Of each block of a token, 32 elements or 256 as the weights', `s = amax / 127`, and an element is the
/// integer nearest to `x * (127 / amax)`, ties to even. (llama.cpp keeps `s` in f16 where blocks have 32, and
/// rounds ties away from 0.) Products of a block are added up in integers, which is exact; then
/// `sum = fma(d * s, total, sum)`, and `sum = fma(-dmin * s, minima, sum)` where there are minima, block by
/// block in order. So results are the same bits on every processor, for any number of tokens. A block with a
/// NaN or an infinity has a NaN as its sum.
#[derive(Clone, Debug)]
pub struct GgmlLinear<S = Vec<u8>>(
    /// The weights.
    pub GgmlWeights<S>,
);

/// Rows that a thread takes at a time.
const ROWS: usize = 32;

impl<T: Element, S: AsRef<[u8]> + Send + Sync> Projection<T> for GgmlLinear<S> {
    fn in_features(&self) -> usize {
        self.0.in_features
    }

    fn out_features(&self) -> usize {
        self.0.out_features
    }

    fn forward(&self, x: &[T], out: &mut [T]) -> Result<(), AttentionError> {
        let features = [self.0.in_features(), self.0.out_features()];
        let tokens = tokens_of(features, x.len(), out.len())?;
        if tokens == 0 {
            return Ok(());
        }
        let (elements, bytes) = self.0.ggml_type.block();
        let row = self.0.in_features / elements * bytes;
        let x = RoundedTokens::new(x, elements);
        let mut results = vec![0.0; tokens * self.0.out_features];
        let rows = self.0.bytes.as_ref().par_chunks(ROWS * row);
        let panels = results.par_chunks_mut(ROWS * tokens).zip(rows);
        panels.for_each(|(results, rows)| multiply(&x, self.0.ggml_type, rows, row, results));
        narrow_panels(&results, tokens, ROWS, out);
        Ok(())
    }
}

/// Tokens as integers, a scale for each block of as many elements as the weights' blocks have.
struct RoundedTokens {
    elements: usize,
    n: Vec<i8>,
    /// `[tokens, blocks]`.
    scales: Vec<f32>,
    /// The sum of each group, `[tokens, in_features / GROUP]`.
    sums: Vec<i32>,
}

impl RoundedTokens {
    fn new<T: Element>(x: &[T], elements: usize) -> Self {
        let mut n = Vec::with_capacity(x.len());
        let mut scales = Vec::with_capacity(x.len() / elements);
        for block in x.chunks_exact(elements) {
            let amax = block.iter().fold(0.0f32, |amax, x| {
                let x = x.widen().abs();
                // A NaN stays.
                if x > amax || x.is_nan() { x } else { amax }
            });
            // A block with what is no number becomes NaN, by its scale.
            let up = if amax == 0.0 { 0.0 } else { 127.0 / amax };
            let scale = amax / 127.0;
            scales.push(if amax.is_finite() { scale } else { f32::NAN });
            n.extend(
                block
                    .iter()
                    .map(|x| (x.widen() * up).round_ties_even() as i8),
            );
        }
        let sums = n.as_chunks::<GROUP>().0.iter();
        Self {
            elements,
            sums: sums
                .map(|group| group.iter().map(|&n| i32::from(n)).sum())
                .collect(),
            n,
            scales,
        }
    }
}

/// `results[token, row]` of as many rows as there are.
fn multiply(x: &RoundedTokens, of: GgmlType, rows: &[u8], row: usize, results: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: the processor was asked just now.
        return unsafe { multiply_avx2(x, of, rows, row, results) };
    }
    multiply_in(x, of, rows, row, results);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn multiply_avx2(x: &RoundedTokens, of: GgmlType, rows: &[u8], row: usize, results: &mut [f32]) {
    multiply_in(x, of, rows, row, results);
}

#[inline(always)]
fn multiply_in(x: &RoundedTokens, of: GgmlType, rows: &[u8], row: usize, results: &mut [f32]) {
    let (elements, bytes) = of.block();
    let (count, blocks) = (rows.len() / row, row / bytes);
    let groups = elements / GROUP;
    let mut block = Block::default();
    for (at, packed) in rows.chunks_exact(bytes).enumerate() {
        let (row, at) = (at / blocks, at % blocks);
        block.unpack(of, packed);
        for (token, results) in results.chunks_exact_mut(count).enumerate() {
            let at = token * blocks + at;
            let n = &x.n[at * x.elements..][..elements];
            let mut totals = [0i32; GROUP];
            let pairs = n
                .as_chunks::<GROUP>()
                .0
                .iter()
                .zip(block.n.as_chunks::<GROUP>().0);
            for ((a, b), &scale) in pairs.zip(&block.scales) {
                for ((total, &a), &b) in totals.iter_mut().zip(a).zip(b) {
                    *total += i32::from(i16::from(a) * i16::from(b)) * i32::from(scale);
                }
            }
            let total: i32 = totals.iter().sum();
            let minima: i32 = x.sums[at * groups..][..groups]
                .iter()
                .zip(&block.minima)
                .map(|(&sum, &minimum)| sum * i32::from(minimum))
                .sum();
            let scale = x.scales[at];
            let sum = (block.d * scale).mul_add(total as f32, results[row]);
            results[row] = match of {
                GgmlType::Q4_K | GgmlType::Q5_K => {
                    (-(block.least * scale)).mul_add(minima as f32, sum)
                }
                _ => sum,
            };
        }
    }
}
