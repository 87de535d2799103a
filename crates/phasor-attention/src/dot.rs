//! Products of few tokens with rows of weights: each row is read from memory once, which is what bounds
//! them. The order of sums is that of [`Linear`](crate::Linear)'s documentation.

use crate::DenseRows;
use phasor::Element;

/// Sums of a dot product.
const LANES: usize = 64;

/// `results[token * stride + row] = x[token] . rows[row]`, for vectors of `len`.
pub(crate) fn rows(x: &[f32], rows: DenseRows<'_>, len: usize, stride: usize, results: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vl") {
            // SAFETY: the processor was asked just now.
            return unsafe { rows_avx512(x, rows, len, stride, results) };
        }
        if is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
        {
            // SAFETY: likewise.
            return unsafe { rows_avx2(x, rows, len, stride, results) };
        }
    }
    rows_in(x, rows, len, stride, results);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
fn rows_avx512(x: &[f32], rows: DenseRows<'_>, len: usize, stride: usize, results: &mut [f32]) {
    rows_in(x, rows, len, stride, results);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn rows_avx2(x: &[f32], rows: DenseRows<'_>, len: usize, stride: usize, results: &mut [f32]) {
    rows_in(x, rows, len, stride, results);
}

#[inline(always)]
fn rows_in(x: &[f32], rows: DenseRows<'_>, len: usize, stride: usize, results: &mut [f32]) {
    match rows {
        DenseRows::F32(rows) => rows_of(x, rows, len, stride, results),
        DenseRows::Bf16(rows) => rows_of(x, rows, len, stride, results),
    }
}

/// Two tokens at a time, by which a row that is in a cache is widened half as often.
#[inline(always)]
fn rows_of<W: Element>(x: &[f32], rows: &[W], len: usize, stride: usize, results: &mut [f32]) {
    let tokens = x.len() / len;
    for (at, row) in rows.chunks_exact(len).enumerate() {
        let mut token = 0;
        while token < tokens {
            let x = &x[token * len..];
            if token + 1 < tokens {
                let sums = dot::<2, W>([&x[..len], &x[len..2 * len]], row);
                results[token * stride + at] = sums[0];
                results[(token + 1) * stride + at] = sums[1];
                token += 2;
            } else {
                [results[token * stride + at]] = dot::<1, W>([&x[..len]], row);
                token += 1;
            }
        }
    }
}

#[inline(always)]
fn dot<const N: usize, W: Element>(x: [&[f32]; N], row: &[W]) -> [f32; N] {
    let mut sums = [[0.0f32; LANES]; N];
    let (whole, rest) = row.as_chunks::<LANES>();
    for (at, row) in whole.iter().enumerate() {
        for (sums, x) in sums.iter_mut().zip(x) {
            add(row, &x[at * LANES..][..LANES], sums);
        }
    }
    for (sums, x) in sums.iter_mut().zip(x) {
        add(rest, &x[whole.len() * LANES..], sums);
    }
    sums.map(|mut sums| {
        let mut half = LANES / 2;
        while half > 0 {
            for lane in 0..half {
                sums[lane] += sums[lane + half];
            }
            half /= 2;
        }
        sums[0]
    })
}

#[inline(always)]
fn add<W: Element>(row: &[W], x: &[f32], sums: &mut [f32; LANES]) {
    for ((sum, &w), &x) in sums.iter_mut().zip(row).zip(x) {
        *sum = w.widen().mul_add(x, *sum);
    }
}
