//! Products of bf16 tokens with bf16 weights by the instruction for them, AVX-512 BF16: twice as many a
//! cycle as in f32, and no weight becomes f32.
//!
//! Lanes are tokens. Elements come in pairs along `in_features`; those of 64 tokens are packed side by side,
//! and a pair of a row of weights is multiplied with all of them.

use phasor::Element;
use phasor::half::bf16;
use rayon::prelude::*;
use std::arch::x86_64::{__m512, __m512bh, _mm512_dpbf16_ps};

const LANES: usize = 16;
/// Vectors of tokens, and rows of weights, that are multiplied at a time.
const VECTORS: usize = 4;
const ROWS: usize = 5;
/// Pairs that are multiplied before the next rows, so that tokens stay in the second cache.
const DEPTH: usize = 512;
/// Rows that a thread takes at a time.
const PANEL: usize = 80;

/// A pair for each token of a vector.
type Pairs = [u32; LANES];

/// Whether the processor has it.
pub(crate) fn is_there() -> bool {
    is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16")
}

/// `out = x W^T` of `[tokens, in_features, out_features]`, of which the second is even; the processor has
/// the instruction.
pub(crate) fn product(
    x: &[bf16],
    weights: &[bf16],
    [tokens, from, to]: [usize; 3],
    out: &mut [bf16],
) {
    let packed = pack(x, from);
    let padded = tokens.next_multiple_of(LANES);
    let mut results = vec![0.0f32; to * padded];
    results
        .par_chunks_mut(PANEL * padded)
        .zip(weights.par_chunks(PANEL * from))
        // SAFETY: the caller asked the processor.
        .for_each(|(results, rows)| unsafe { panel(&packed, rows, from / 2, results) });
    let out = out.par_chunks_mut(LANES * to).enumerate();
    out.for_each(|(at, out)| {
        for (row, results) in results.chunks_exact(padded).enumerate() {
            let results = &results[at * LANES..][..LANES];
            for (out, &x) in out.chunks_exact_mut(to).zip(results) {
                out[row] = bf16::narrow(x);
            }
        }
    });
}

fn pair(elements: &[bf16; 2]) -> u32 {
    u32::from(elements[0].to_bits()) | u32::from(elements[1].to_bits()) << 16
}

/// `[groups of vectors, pairs, vectors, LANES]`; tokens that are not there are 0.
fn pack(x: &[bf16], from: usize) -> Vec<Pairs> {
    let pairs = from / 2;
    let vectors = (x.len() / from).div_ceil(LANES);
    let mut packed = vec![[0; LANES]; vectors * pairs];
    let groups = packed.par_chunks_mut(VECTORS * pairs);
    groups
        .zip(x.par_chunks(VECTORS * LANES * from))
        .for_each(|(group, x)| {
            let vectors = group.len() / pairs;
            for (at, x) in x.chunks_exact(from).enumerate() {
                let (vector, lane) = (at / LANES, at % LANES);
                let to = group.iter_mut().skip(vector).step_by(vectors);
                for (to, elements) in to.zip(x.as_chunks::<2>().0) {
                    to[lane] = pair(elements);
                }
            }
        });
    packed
}

/// `results[row, token]` of a panel's rows.
#[target_feature(enable = "avx512f,avx512bf16")]
fn panel(packed: &[Pairs], rows: &[bf16], pairs: usize, results: &mut [f32]) {
    let count = rows.len() / (2 * pairs);
    let padded = results.len() / count;
    let rows = rows.as_chunks::<2>().0;
    for first in (0..pairs).step_by(DEPTH) {
        let depth = DEPTH.min(pairs - first);
        for (group, packed) in packed.chunks(VECTORS * pairs).enumerate() {
            let vectors = packed.len() / pairs;
            let x = &packed[first * vectors..][..depth * vectors];
            let token = group * VECTORS * LANES;
            let mut row = 0;
            while row < count {
                let b = &rows[row * pairs + first..];
                let c = &mut results[row * padded + token..];
                let step = if row + ROWS <= count { ROWS } else { 1 };
                match (vectors, step) {
                    (4, ROWS) => multiply::<4, ROWS>(x, b, pairs, c, padded),
                    (3, ROWS) => multiply::<3, ROWS>(x, b, pairs, c, padded),
                    (2, ROWS) => multiply::<2, ROWS>(x, b, pairs, c, padded),
                    (_, ROWS) => multiply::<1, ROWS>(x, b, pairs, c, padded),
                    (4, _) => multiply::<4, 1>(x, b, pairs, c, padded),
                    (3, _) => multiply::<3, 1>(x, b, pairs, c, padded),
                    (2, _) => multiply::<2, 1>(x, b, pairs, c, padded),
                    _ => multiply::<1, 1>(x, b, pairs, c, padded),
                }
                row += step;
            }
        }
    }
}

/// Adds the products of `R` rows with `V` vectors.
#[allow(clippy::needless_range_loop)] // As said inside.
#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
fn multiply<const V: usize, const R: usize>(
    x: &[Pairs],
    rows: &[[bf16; 2]],
    row_stride: usize,
    c: &mut [f32],
    c_stride: usize,
) {
    let (x, _) = x.as_chunks::<V>();
    let depth = x.len();
    let mut from = [&rows[..0]; R];
    for (r, from) in from.iter_mut().enumerate() {
        *from = &rows[r * row_stride..][..depth];
    }
    // Loops of constant lengths, so that sums stay in registers.
    let mut sums = [[vector([0.0; LANES]); V]; R];
    for r in 0..R {
        let c = &c[r * c_stride..][..V * LANES];
        for v in 0..V {
            if let Some(c) = c[v * LANES..].first_chunk() {
                sums[r][v] = vector(*c);
            }
        }
    }
    for at in 0..depth {
        let x = &x[at];
        for r in 0..R {
            let row = elements([pair(&from[r][at]); LANES]);
            for v in 0..V {
                sums[r][v] = _mm512_dpbf16_ps(sums[r][v], elements(x[v]), row);
            }
        }
    }
    for r in 0..R {
        let c = &mut c[r * c_stride..][..V * LANES];
        for v in 0..V {
            // SAFETY: both are 16 f32, and any bits are one.
            let sums = unsafe { std::mem::transmute::<__m512, [f32; LANES]>(sums[r][v]) };
            c[v * LANES..][..LANES].copy_from_slice(&sums);
        }
    }
}

#[inline(always)]
fn vector(values: [f32; LANES]) -> __m512 {
    // SAFETY: both are 16 f32, and any bits are one.
    unsafe { std::mem::transmute(values) }
}

#[inline(always)]
fn elements(pairs: Pairs) -> __m512bh {
    // SAFETY: both are 64 bytes, and any bits are bf16.
    unsafe { std::mem::transmute(pairs) }
}
