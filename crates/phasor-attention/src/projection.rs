//! The linear maps of a layer.

use crate::error::{agree, usable};
use crate::scalar::widen;
use crate::{AttentionError, dot};
use phasor::half::bf16;
use phasor::{Dtype, Element};
use rayon::prelude::*;
use std::marker::PhantomData;
use std::ops::Range;
use std::slice::from_raw_parts;
use std::sync::Arc;

/// A linear map of tokens. An engine may bring its own.
pub trait Projection<T>: Send + Sync {
    /// Elements of a token that comes in.
    fn in_features(&self) -> usize;

    /// Elements of a token that goes out.
    fn out_features(&self) -> usize;

    /// `out = x W^T`, `[tokens, out_features]` of `[tokens, in_features]`, each rounded to `T` once.
    ///
    /// # Errors
    /// [`AttentionError::Mismatch`] unless `x` and `out` are as many whole tokens; nothing is written then.
    fn forward(&self, x: &[T], out: &mut [T]) -> Result<(), AttentionError>;
}

/// Weights `[out_features, in_features]` in any form that has f32 values.
pub trait Weights: Send + Sync {
    /// Columns.
    fn in_features(&self) -> usize;

    /// Rows.
    fn out_features(&self) -> usize;

    /// The values of some rows, `[rows, in_features]`.
    fn read(&self, rows: Range<usize>, values: &mut [f32]);

    /// All values, if they are elements in memory, which spares copies.
    fn dense(&self) -> Option<DenseRows<'_>> {
        None
    }
}

/// Looks for a NaN or an infinity among the values of weights, which a layer does not: it reads all of them,
/// and is for the time when they are loaded.
///
/// # Errors
/// [`AttentionError::NotFinite`] for the first.
pub fn check_finite(weights: &dyn Weights) -> Result<(), AttentionError> {
    let columns = weights.in_features();
    let mut values = vec![0.0; columns];
    for row in 0..weights.out_features() {
        weights.read(row..row + 1, &mut values);
        if let Some(column) = values.iter().position(|value| !value.is_finite()) {
            return Err(AttentionError::NotFinite {
                row,
                column,
                value: values[column],
            });
        }
    }
    Ok(())
}

/// Row-major values in memory, `[out_features, in_features]`.
#[derive(Clone, Copy, Debug)]
pub enum DenseRows<'a> {
    /// f32.
    F32(&'a [f32]),
    /// bf16.
    Bf16(&'a [bf16]),
}

impl DenseRows<'_> {
    fn window(self, elements: Range<usize>) -> Self {
        match self {
            DenseRows::F32(all) => DenseRows::F32(&all[elements]),
            DenseRows::Bf16(all) => DenseRows::Bf16(&all[elements]),
        }
    }
}

/// The product with [`Weights`]: their values in f32, activations widened to f32, products added up in f32,
/// and one rounding to the element type.
///
/// Calls of up to 8 tokens have one order of sums on every processor: product `i` of a row is added to sum
/// `i % 64` by a fused multiply-add, and the 64 sums are folded in halves. Those of more are products of
/// the crate `gemm`, whose order is its own; or, where tokens and weights are bf16 and the processor has
/// AVX-512 BF16, of its instruction, which counts subnormal numbers as 0.
#[derive(Clone, Copy, Debug)]
pub struct Linear<W>(
    /// The weights.
    pub W,
);

impl<T: Element, W: Weights> Projection<T> for Linear<W> {
    fn in_features(&self) -> usize {
        self.0.in_features()
    }

    fn out_features(&self) -> usize {
        self.0.out_features()
    }

    fn forward(&self, x: &[T], out: &mut [T]) -> Result<(), AttentionError> {
        let features = [self.0.in_features(), self.0.out_features()];
        let tokens = tokens_of(features, x.len(), out.len())?;
        #[cfg(target_arch = "x86_64")]
        if let (Dtype::Bf16, Some(DenseRows::Bf16(weights))) = (T::DTYPE, self.0.dense())
            && tokens > FEW_TOKENS
            && features[0].is_multiple_of(2)
            && crate::bf16::is_there()
        {
            // SAFETY: `bf16` is the only element of this type, so that `T` is it.
            let (x, out) = unsafe {
                (
                    from_raw_parts(x.as_ptr().cast(), x.len()),
                    std::slice::from_raw_parts_mut(out.as_mut_ptr().cast(), out.len()),
                )
            };
            crate::bf16::product(x, weights, [tokens, features[0], features[1]], out);
            return Ok(());
        }
        let x: Vec<f32> = x.iter().map(|x| x.widen()).collect();
        product(&x, tokens, &self.0, out);
        Ok(())
    }
}

/// How many tokens there are in both.
pub(crate) fn tokens_of(
    [from, to]: [usize; 2],
    x: usize,
    out: usize,
) -> Result<usize, AttentionError> {
    let tokens = x.checked_div(from).unwrap_or(0);
    agree(
        "elements given to a projection, whole tokens",
        tokens.saturating_mul(from),
        x,
    )?;
    agree(
        "elements that a projection writes",
        tokens.saturating_mul(to),
        out,
    )?;
    Ok(tokens)
}

/// Up to so many tokens, each row of weights is read once, and multiplied with all of them.
const FEW_TOKENS: usize = 8;
/// Rows that a thread takes at a time then.
const FEW_ROWS: usize = 32;
/// Rows of weights that become f32 at a time otherwise: as many as are worth a product of their own.
const PANEL_ROWS: usize = 512;

/// `out = x W^T`.
pub(crate) fn product<T: Element>(x: &[f32], tokens: usize, weights: &dyn Weights, out: &mut [T]) {
    let (from, to) = (weights.in_features(), weights.out_features());
    if tokens == 0 {
        return;
    }
    let dense = weights.dense();
    let mut results = vec![0.0; tokens * to];
    if let (Some(DenseRows::F32(values)), true) = (dense, tokens > FEW_TOKENS) {
        let parallelism = match rayon::current_num_threads() {
            1 => gemm::Parallelism::None,
            _ => gemm::Parallelism::Rayon(0),
        };
        multiply([tokens, from, to], x, values, &mut results, parallelism);
        narrow(&results, out);
        return;
    }
    let rows = match tokens {
        0..=FEW_TOKENS => FEW_ROWS,
        _ => PANEL_ROWS,
    };
    results
        .par_chunks_mut(rows * tokens)
        .enumerate()
        .for_each_init(Vec::new, |panel, (at, results)| {
            let part = at * rows..to.min((at + 1) * rows);
            let sizes = [tokens, from, part.len()];
            if tokens > FEW_TOKENS {
                panel.resize(part.len() * from, 0.0);
                weights.read(part, panel);
                multiply(sizes, x, panel, results, gemm::Parallelism::None);
            } else if let Some(dense) = dense {
                let dense = dense.window(part.start * from..part.end * from);
                dot::rows(x, dense, from, part.len(), results);
            } else {
                panel.resize(from, 0.0);
                for (at, row) in part.clone().enumerate() {
                    weights.read(row..row + 1, panel);
                    dot::rows(
                        x,
                        DenseRows::F32(panel),
                        from,
                        part.len(),
                        &mut results[at..],
                    );
                }
            }
        });
    narrow_panels(&results, tokens, rows, out);
}

/// `[tokens, out_features]` of results whose panels, of so many rows, lie together, `[tokens, rows]` each.
pub(crate) fn narrow_panels<T: Element>(
    results: &[f32],
    tokens: usize,
    rows: usize,
    out: &mut [T],
) {
    let to = out.len() / tokens;
    for (at, results) in results.chunks(rows * tokens).enumerate() {
        let count = results.len() / tokens;
        for (token, results) in results.chunks_exact(count).enumerate() {
            narrow(results, &mut out[token * to + at * rows..][..count]);
        }
    }
}

fn narrow<T: Element>(values: &[f32], out: &mut [T]) {
    for (out, &x) in out.iter_mut().zip(values) {
        *out = T::narrow(x);
    }
}

/// `out[m, n] = a[m, k] b[n, k]^T`.
fn multiply(
    [m, k, n]: [usize; 3],
    a: &[f32],
    b: &[f32],
    out: &mut [f32],
    parallelism: gemm::Parallelism,
) {
    assert!(a.len() >= m * k && b.len() >= n * k && out.len() >= m * n);
    let (row, column) = (k as isize, n as isize);
    // SAFETY: the shapes were compared with the slices just now, and `out` is borrowed alone.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            column,
            false,
            a.as_ptr(),
            1,
            row,
            b.as_ptr(),
            row,
            1,
            0.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// Dense weights, f32, f16 or bf16, `[out_features, in_features]`. `S` holds them: a vector, a mapped file.
#[derive(Clone, Debug)]
pub struct DenseWeights<T, S = Vec<T>> {
    elements: S,
    out_features: usize,
    in_features: usize,
    clip: Option<f32>,
    of: PhantomData<T>,
}

impl<T: Element, S: AsRef<[T]>> DenseWeights<T, S> {
    /// Row-major weights.
    ///
    /// # Errors
    /// [`AttentionError::Mismatch`] unless there are `out_features * in_features` of them,
    /// [`AttentionError::Value`] if that is 0.
    pub fn new(
        elements: S,
        out_features: usize,
        in_features: usize,
    ) -> Result<Self, AttentionError> {
        check_features(out_features, in_features)?;
        let needed = out_features.saturating_mul(in_features);
        agree("elements of a weight", needed, elements.as_ref().len())?;
        Ok(Self {
            elements,
            out_features,
            in_features,
            clip: None,
            of: PhantomData,
        })
    }

    /// Clamps the weights to `-clip..=clip` as they are read (MPT's and MAX's clip_qkv); a bias is not.
    ///
    /// # Errors
    /// [`AttentionError::Factor`] unless it is positive and finite.
    pub fn clip(mut self, clip: f32) -> Result<Self, AttentionError> {
        usable("clip", f64::from(clip))?;
        self.clip = Some(clip);
        Ok(self)
    }
}

/// Both above 0.
pub(crate) fn check_features(
    out_features: usize,
    in_features: usize,
) -> Result<(), AttentionError> {
    for (what, value) in [("out_features", out_features), ("in_features", in_features)] {
        if value == 0 {
            return Err(AttentionError::Value {
                what,
                value,
                remedy: "a projection has rows and columns",
            });
        }
    }
    Ok(())
}

impl<T: Element, S: AsRef<[T]> + Send + Sync> Weights for DenseWeights<T, S> {
    fn in_features(&self) -> usize {
        self.in_features
    }

    fn out_features(&self) -> usize {
        self.out_features
    }

    fn read(&self, rows: Range<usize>, values: &mut [f32]) {
        let (start, end) = (rows.start * self.in_features, rows.end * self.in_features);
        let elements = &self.elements.as_ref()[start..end];
        match self.clip {
            None => {
                widen(elements, values);
            }
            Some(clip) => {
                for (value, x) in values.iter_mut().zip(elements) {
                    *value = x.widen().clamp(-clip, clip);
                }
            }
        }
    }

    fn dense(&self) -> Option<DenseRows<'_>> {
        if self.clip.is_some() {
            return None;
        }
        let elements = self.elements.as_ref();
        let (data, len) = (elements.as_ptr(), elements.len());
        // SAFETY: each `Dtype` is that of one type, so that `T` is the type it becomes.
        unsafe {
            match T::DTYPE {
                Dtype::F32 => Some(DenseRows::F32(from_raw_parts(data.cast(), len))),
                Dtype::Bf16 => Some(DenseRows::Bf16(from_raw_parts(data.cast(), len))),
                _ => None,
            }
        }
    }
}

/// Several weights, one below the other: stacked qkv of parts that were stored apart, in forms of their own.
#[derive(Clone, Debug)]
pub struct StackedWeights<W> {
    parts: Vec<W>,
    in_features: usize,
    out_features: usize,
}

impl<W: Weights> StackedWeights<W> {
    /// The parts, from the top.
    ///
    /// # Errors
    /// [`AttentionError::Mismatch`] if they differ in in_features, [`AttentionError::Value`] if there are
    /// none.
    pub fn new(parts: Vec<W>) -> Result<Self, AttentionError> {
        let in_features = parts.first().map_or(0, |part| part.in_features());
        for part in &parts {
            agree(
                "in_features of stacked weights",
                in_features,
                part.in_features(),
            )?;
        }
        let out_features = parts.iter().map(|part| part.out_features()).sum();
        check_features(out_features, in_features)?;
        Ok(Self {
            parts,
            in_features,
            out_features,
        })
    }
}

impl<W: Weights> Weights for StackedWeights<W> {
    fn in_features(&self) -> usize {
        self.in_features
    }

    fn out_features(&self) -> usize {
        self.out_features
    }

    fn read(&self, rows: Range<usize>, mut values: &mut [f32]) {
        let mut first = 0;
        for part in &self.parts {
            let end = first + part.out_features();
            let (start, stop) = (rows.start.max(first), rows.end.min(end));
            if start < stop {
                let (head, rest) = values.split_at_mut((stop - start) * self.in_features);
                part.read(start - first..stop - first, head);
                values = rest;
            }
            first = end;
        }
    }
}

/// A window of weights, `rows` by `columns`: what a device has of them.
#[derive(Clone, Debug)]
pub struct WindowOfWeights<W> {
    weights: W,
    rows: Range<usize>,
    columns: Range<usize>,
}

impl<W: Weights> WindowOfWeights<W> {
    /// The window of some rows and columns.
    ///
    /// # Errors
    /// [`AttentionError::Value`] if it is empty or reaches past the weights.
    pub fn new(
        weights: W,
        rows: Range<usize>,
        columns: Range<usize>,
    ) -> Result<Self, AttentionError> {
        check_features(rows.len(), columns.len())?;
        for (what, end, most) in [
            ("the last row of a window", rows.end, weights.out_features()),
            (
                "the last column of a window",
                columns.end,
                weights.in_features(),
            ),
        ] {
            if end > most {
                return Err(AttentionError::Value {
                    what,
                    value: end,
                    remedy: "it must be inside the weights",
                });
            }
        }
        Ok(Self {
            weights,
            rows,
            columns,
        })
    }
}

impl<W: Weights> Weights for WindowOfWeights<W> {
    fn in_features(&self) -> usize {
        self.columns.len()
    }

    fn out_features(&self) -> usize {
        self.rows.len()
    }

    fn read(&self, rows: Range<usize>, values: &mut [f32]) {
        let rows = self.rows.start + rows.start..self.rows.start + rows.end;
        let all = self.weights.in_features();
        if self.columns.len() == all {
            return self.weights.read(rows, values);
        }
        let mut whole = vec![0.0; rows.len() * all];
        self.weights.read(rows, &mut whole);
        let of_rows = whole.chunks_exact(all);
        for (values, row) in values.chunks_exact_mut(self.columns.len()).zip(of_rows) {
            values.copy_from_slice(&row[self.columns.clone()]);
        }
    }

    fn dense(&self) -> Option<DenseRows<'_>> {
        let all = self.weights.in_features();
        if self.columns.len() != all {
            return None;
        }
        let elements = self.rows.start * all..self.rows.end * all;
        self.weights.dense().map(|dense| dense.window(elements))
    }
}

impl<W: Weights + ?Sized> Weights for Arc<W> {
    fn in_features(&self) -> usize {
        (**self).in_features()
    }

    fn out_features(&self) -> usize {
        (**self).out_features()
    }

    fn read(&self, rows: Range<usize>, values: &mut [f32]) {
        (**self).read(rows, values);
    }

    fn dense(&self) -> Option<DenseRows<'_>> {
        (**self).dense()
    }
}

impl<W: Weights + ?Sized> Weights for Box<W> {
    fn in_features(&self) -> usize {
        (**self).in_features()
    }

    fn out_features(&self) -> usize {
        (**self).out_features()
    }

    fn read(&self, rows: Range<usize>, values: &mut [f32]) {
        (**self).read(rows, values);
    }

    fn dense(&self) -> Option<DenseRows<'_>> {
        (**self).dense()
    }
}
