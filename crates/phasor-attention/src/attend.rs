//! Attention of new tokens over a paged cache.
//!
//! # Definition
//!
//! The numbers below are part of what a result is; the instruction set, the threads, the other sequences of
//! a batch and how a sequence was cut into calls are not. Elements are widened to f32 exactly, every
//! operation is one of f32 that rounds once, and `fma` is fused.
//!
//! A token at place `p` of its sequence (what its cache held before, plus the new tokens before it) sees
//! the keys `lo..hi` of its [`AttentionMask`]; others take no part, whatever they are. Keys lie in tiles
//! of 64 and in splits of 256, both counted from the sequence's first key. For each query head:
//!
//! 1. a split begins with `m = -inf`, `l = 0`, `o[d] = 0`, and goes through its tiles in order;
//! 2. of each visible key of a tile, `dot = fma(q[d], k[d], dot)` from 0, over the dims in order;
//! 3. `t = dot * c` with `c = scale * log2(e)`; with a soft cap,
//!    `t = tanh(dot * (scale / cap)) * (cap * log2(e))` (factors in parentheses are formed in f64, then
//!    rounded);
//! 4. `m' = max(m, t...)`, `a = exp2(m - m')`, `p[j] = exp2(t[j] - m')`, and 0 where key `j` of the tile is
//!    not seen;
//! 5. `l = fma(l, a, sum(p))`, the sum of all 64 folded in halves: `p[j] += p[j + 32]`, then 16, 8, 4, 2, 1;
//! 6. `o[d] = o[d] * a`, then `o[d] = fma(p[j], v[j][d], o[d])` over the visible keys in order.
//!
//! The splits of which a key is seen are joined in order. What is joined begins with `M = -inf`, `L = 0`,
//! `O[d] = 0`, or with a sink as `M = sink * log2(e)`, `L = 1`:
//!
//! ```text
//! M' = max(M, m)   a = exp2(M - M')   b = exp2(m - M')   L = fma(l, b, L * a)   O[d] = fma(o[d], b, O[d] * a)
//! ```
//!
//! The result is `O[d] / L`, rounded to the element type. `exp2` and `tanh` are polynomials of this crate
//! (`src/scalar.rs`), of fused multiply-adds in a fixed order. A NaN or an infinity that a token sees, or
//! has, is in its result; `max` leaves a NaN out.
//!
//! So a token's result is the same bits whether it was one of a prompt or decoded alone, and wherever its
//! pages are. Splits are work that blocks of a GPU can do apart.
//!
//! Sources: "FlashAttention" (Dao et al., 2022) and "Online normalizer calculation for softmax" (Milakov
//! and Gimelshein, 2018) for the running maximum, "Efficient Streaming Language Models with Attention
//! Sinks" (Xiao et al., 2023) and gpt-oss for sinks that are logits.

use crate::cache::{KvCacheView, RaggedBatch, Sequence};
use crate::error::{agree, usable};
use crate::scalar::{exp2, tanh};
use crate::{AttentionError, AttentionMask};
use phasor::{Element, Host, Isa, Threads};
use rayon::prelude::*;
use std::f64::consts::LOG2_E;
use std::ops::Range;

/// Keys that are scored before the running maximum is looked at.
pub const TILE: usize = 64;
/// Keys that are summed before they are joined to those before.
pub const SPLIT: usize = 256;

/// Rows (tokens of a group's heads) that share the keys of a tile while these are in cache. Results do not
/// depend on it.
const BLOCK_ROWS: usize = 128;
/// Columns that the narrowest loop has; scratch rows are padded to it.
const LANES: usize = 16;

/// What is to be computed.
#[derive(Clone, Copy, Debug)]
pub struct Attend<'a> {
    /// Query heads; query head `h` has key-value head `h / (heads / kv_heads)`.
    pub heads: usize,
    /// What scores are multiplied by, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// Which keys a token sees.
    pub mask: AttentionMask,
    /// `cap * tanh(score / cap)` in place of scores (Gemma 2, Grok).
    pub logits_soft_cap: Option<f32>,
    /// A logit for each head that takes part in the softmax and has no value (gpt-oss).
    pub sinks: Option<&'a [f32]>,
}

impl Attend<'_> {
    /// Numbers that can be used, for so many key-value heads.
    pub(crate) fn check(&self, kv_heads: usize) -> Result<(), AttentionError> {
        let heads = self.heads;
        if heads == 0 || kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            return Err(AttentionError::Heads { heads, kv_heads });
        }
        usable("scale", f64::from(self.scale))?;
        if let Some(cap) = self.logits_soft_cap {
            usable("logits_soft_cap", f64::from(cap))?;
        }
        if let Some(sinks) = self.sinks {
            agree("sinks, one for each query head", heads, sinks.len())?;
        }
        self.mask.check()
    }

    pub(crate) fn scores(&self) -> Scores {
        let scale = f64::from(self.scale);
        match self.logits_soft_cap.map(f64::from) {
            None => Scores {
                factor: (scale * LOG2_E) as f32,
                capped: None,
            },
            Some(cap) => Scores {
                factor: (scale / cap) as f32,
                capped: Some((cap * LOG2_E) as f32),
            },
        }
    }

    /// Attention of `q`, `[tokens, heads, head_dim]`, over caches that have the keys and values of these
    /// tokens already, into `out`, `[tokens, heads, v_head_dim]`: a head's dims of the values. `batch.cache_lengths` are those before these tokens.
    /// Tokens past the batch are left as they are.
    ///
    /// # Errors
    /// [`AttentionError`] where shapes disagree or a page is not in the cache; nothing is written then.
    pub fn run<T: Element>(
        &self,
        host: &Host,
        q: &[T],
        cache: KvCacheView<'_, T>,
        batch: &RaggedBatch<'_>,
        out: &mut [T],
    ) -> Result<(), AttentionError> {
        let [pages, page_size, kv_heads, head_dim] = cache.shape();
        self.check(kv_heads)?;
        let token = self.heads.saturating_mul(head_dim);
        if token == 0 || !q.len().is_multiple_of(token) {
            return Err(AttentionError::Mismatch {
                what: "elements of q, whole tokens",
                expected: q.len() / token.max(1) * token,
                got: q.len(),
            });
        }
        let tokens = q.len() / token;
        let of_token = self.heads.saturating_mul(cache.v_head_dim());
        agree(
            "elements of the output, heads of the values' dims",
            tokens.saturating_mul(of_token),
            out.len(),
        )?;
        let sequences = batch.check(tokens, [pages, page_size])?;
        self.run_checked(host, q, cache, batch, &sequences, out);
        Ok(())
    }

    pub(crate) fn run_checked<T: Element>(
        &self,
        host: &Host,
        q: &[T],
        cache: KvCacheView<'_, T>,
        batch: &RaggedBatch<'_>,
        sequences: &[Sequence],
        out: &mut [T],
    ) {
        let [_, page_size, kv_heads, head_dim] = cache.shape();
        let group = self.heads / kv_heads;
        let v_dim = cache.v_head_dim();
        let token = self.heads.saturating_mul(v_dim);
        if token == 0 {
            return;
        }
        let block = (BLOCK_ROWS / group).max(1);
        let call = Call {
            attend: self,
            scores: self.scores(),
            cache,
            page_size,
            group,
            head_dim,
            v_dim,
            q,
            batch,
        };
        // All heads of a block of tokens have their part of the output between them, one after the other.
        let mut results = vec![0.0f32; sequences.iter().map(|s| s.new).sum::<usize>() * token];
        let mut items = Vec::new();
        let mut rest = &mut results[..];
        for sequence in sequences {
            for start in (0..sequence.new).step_by(block) {
                let tokens = start..sequence.new.min(start + block);
                for kv_head in 0..kv_heads {
                    let len = tokens.len() * group * v_dim;
                    let (part, after) = std::mem::take(&mut rest).split_at_mut(len);
                    rest = after;
                    items.push(Item {
                        sequence: *sequence,
                        tokens: tokens.clone(),
                        kv_head,
                        out: part,
                    });
                }
            }
        }
        match host.threads() {
            Threads::Pool if items.len() > 1 => {
                items
                    .par_iter_mut()
                    .for_each_init(Scratch::default, |scratch, item| {
                        call.run(host.isa(), item, scratch);
                    });
            }
            _ => {
                let mut scratch = Scratch::default();
                for item in &mut items {
                    call.run(host.isa(), item, &mut scratch);
                }
            }
        }
        for item in &items {
            let first = item.sequence.first + item.tokens.start;
            let rows = item.out.chunks_exact(group * v_dim);
            for (row, to) in rows.zip(out[first * token..].chunks_exact_mut(token)) {
                let to = &mut to[item.kv_head * group * v_dim..];
                for (to, &x) in to.iter_mut().zip(row) {
                    *to = T::narrow(x);
                }
            }
        }
    }
}

/// A sink's logit for `exp2`.
pub(crate) fn base_2(sink: f32) -> f32 {
    (f64::from(sink) * LOG2_E) as f32
}

/// How a dot product becomes a score in base 2.
#[derive(Clone, Copy)]
pub(crate) struct Scores {
    pub(crate) factor: f32,
    pub(crate) capped: Option<f32>,
}

/// What all items of a call have in common.
struct Call<'a, T> {
    attend: &'a Attend<'a>,
    scores: Scores,
    cache: KvCacheView<'a, T>,
    page_size: usize,
    /// Query heads of a key-value head.
    group: usize,
    /// Of queries and keys.
    head_dim: usize,
    /// Of values.
    v_dim: usize,
    q: &'a [T],
    batch: &'a RaggedBatch<'a>,
}

/// The query heads of one key-value head, of a few tokens of a sequence.
struct Item<'a> {
    sequence: Sequence,
    tokens: Range<usize>,
    kv_head: usize,
    /// `[tokens, group, v_dim]`.
    out: &'a mut [f32],
}

/// Memory of a thread. A row is a query head of a token.
#[derive(Default)]
struct Scratch {
    /// `[rows, head_dim]`.
    q: Vec<f32>,
    /// A tile of keys as they are read, `[TILE, head_dim]`.
    rows: Vec<f32>,
    /// Then transposed, `[head_dim, TILE]`.
    k: Vec<f32>,
    /// A tile of values, `[TILE, padded]`.
    v: Vec<f32>,
    /// Scores, then weights, `[rows, TILE]`.
    p: Vec<f32>,
    /// Of a split, and of those joined, `[rows, padded]`.
    o: [Vec<f32>; 2],
    state: Vec<RowState>,
}

/// A row's keys, and its `m` and `l`: of a split, and of those joined.
#[derive(Clone)]
struct RowState {
    keys: Range<usize>,
    m: [f32; 2],
    l: [f32; 2],
}

impl RowState {
    /// The slots of a tile that it sees.
    #[inline(always)]
    fn seen(&self, tile: usize) -> Range<usize> {
        let start = self.keys.start.clamp(tile, tile + TILE) - tile;
        let end = self.keys.end.clamp(tile, tile + TILE) - tile;
        start..end
    }
}

impl<T: Element> Call<'_, T> {
    fn run(&self, isa: Isa, item: &mut Item<'_>, scratch: &mut Scratch) {
        match isa {
            // SAFETY: whoever has an `Isa` of a `Host` asked the processor for it.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Avx512Bf16 => unsafe { self.run_avx512(item, scratch) },
            // SAFETY: likewise.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { self.run_avx2(item, scratch) },
            _ => self.run_in::<4, 16>(item, scratch),
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn run_avx2(&self, item: &mut Item<'_>, scratch: &mut Scratch) {
        self.run_in::<4, 16>(item, scratch);
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    fn run_avx512(&self, item: &mut Item<'_>, scratch: &mut Scratch) {
        self.run_in::<4, 64>(item, scratch);
    }

    /// `R` rows and `N` columns are multiplied at a time.
    #[inline(always)]
    fn run_in<const R: usize, const N: usize>(&self, item: &mut Item<'_>, scratch: &mut Scratch) {
        let (head_dim, group) = (self.head_dim, self.group);
        let padded = self.v_dim.next_multiple_of(LANES);
        let rows = item.tokens.len() * group;
        let context = item.sequence.cached + item.sequence.new;
        scratch.q.resize(rows * head_dim, 0.0);
        scratch.rows.resize(TILE * head_dim, 0.0);
        scratch.k.resize(head_dim * TILE, 0.0);
        // Columns past v_dim are never written, and stay 0.
        scratch.v.clear();
        scratch.v.resize(TILE * padded, 0.0);
        scratch.p.resize(rows * TILE, 0.0);
        for o in &mut scratch.o {
            o.clear();
            o.resize(rows * padded, 0.0);
        }
        scratch.state.clear();
        for row in 0..rows {
            let (token, of_group) = (item.tokens.start + row / group, row % group);
            let head = item.kv_head * group + of_group;
            let at = ((item.sequence.first + token) * self.attend.heads + head) * head_dim;
            let to = &mut scratch.q[row * head_dim..][..head_dim];
            for (to, x) in to.iter_mut().zip(&self.q[at..]) {
                *to = x.widen();
            }
            let sink = self.attend.sinks.map(|sinks| sinks[head]);
            let (m, l) = match sink {
                None => (f32::NEG_INFINITY, 0.0),
                Some(sink) => (base_2(sink), 1.0),
            };
            scratch.state.push(RowState {
                keys: self.attend.mask.keys(item.sequence.cached + token, context),
                m: [0.0, m],
                l: [0.0, l],
            });
        }
        let begin = scratch
            .state
            .iter()
            .map(|row| row.keys.start)
            .min()
            .unwrap_or(0);
        let end = scratch
            .state
            .iter()
            .map(|row| row.keys.end)
            .max()
            .unwrap_or(0);
        for split in (begin / SPLIT * SPLIT..end).step_by(SPLIT) {
            for row in &mut scratch.state {
                (row.m[0], row.l[0]) = (f32::NEG_INFINITY, 0.0);
            }
            scratch.o[0].fill(0.0);
            let of_split = split.max(begin / TILE * TILE)..end.min(split + SPLIT);
            for tile in of_split.step_by(TILE) {
                let keys = tile.max(begin)..end.min(tile + TILE);
                self.read_tile(item, tile, keys, padded, scratch);
                self.tile::<R, N>(tile, rows, padded, scratch);
            }
            let [of_split, joined] = &mut scratch.o;
            let joined = joined.chunks_exact_mut(padded);
            let of_split = of_split.chunks_exact(padded);
            for ((row, to), from) in scratch.state.iter_mut().zip(joined).zip(of_split) {
                if row.keys.start < split + SPLIT && row.keys.end > split {
                    let m = maximum(row.m[1], row.m[0]);
                    let (a, b) = (exp2(row.m[1] - m), exp2(row.m[0] - m));
                    row.m[1] = m;
                    row.l[1] = row.l[0].mul_add(b, row.l[1] * a);
                    for (to, from) in to.iter_mut().zip(from) {
                        *to = from.mul_add(b, *to * a);
                    }
                }
            }
        }
        let joined = scratch.o[1].chunks_exact(padded);
        let out = item.out.chunks_exact_mut(self.v_dim);
        for ((row, from), to) in scratch.state.iter().zip(joined).zip(out) {
            for (to, from) in to.iter_mut().zip(from) {
                *to = from / row.l[1];
            }
        }
    }

    /// Reads the keys and values that any row sees of a tile.
    #[inline(always)]
    fn read_tile(
        &self,
        item: &Item<'_>,
        tile: usize,
        keys: Range<usize>,
        padded: usize,
        scratch: &mut Scratch,
    ) {
        let head_dim = self.head_dim;
        for key in keys {
            let (page, slot) = (key / self.page_size, key % self.page_size);
            // Checked: it is a page of the cache.
            let page = self.batch.page_table.get(item.sequence.pages + page) as usize;
            let at = key - tile;
            let k = &mut scratch.rows[at * head_dim..][..head_dim];
            self.cache.k.read(page, slot, item.kv_head, k);
            let v = &mut scratch.v[at * padded..][..self.v_dim];
            self.cache.v.read(page, slot, item.kv_head, v);
        }
        // What other tiles left in slots that no row sees is replaced once it is a score.
        transpose(&scratch.rows, head_dim, &mut scratch.k);
    }

    #[inline(always)]
    fn tile<const R: usize, const N: usize>(
        &self,
        tile: usize,
        rows: usize,
        padded: usize,
        scratch: &mut Scratch,
    ) {
        let head_dim = self.head_dim;
        let Scratch {
            q,
            k,
            v,
            p,
            o,
            state,
            ..
        } = scratch;
        p.fill(0.0);
        // Plain loops: a closure would be compiled for the least of processors.
        let mut first = 0;
        while first + R <= rows {
            let (q, p) = (&q[first * head_dim..], &mut p[first * TILE..]);
            multiply::<R, N>(q, head_dim, 0..head_dim, k, TILE, p);
            first += R;
        }
        while first < rows {
            let (q, p) = (&q[first * head_dim..], &mut p[first * TILE..]);
            multiply::<1, N>(q, head_dim, 0..head_dim, k, TILE, p);
            first += 1;
        }
        let o = &mut o[0];
        for ((row, p), o) in state
            .iter_mut()
            .zip(p.chunks_exact_mut(TILE))
            .zip(o.chunks_exact_mut(padded))
        {
            let seen = row.seen(tile);
            if let (false, Some(p)) = (seen.is_empty(), p.first_chunk_mut::<TILE>()) {
                softmax(self.scores, seen, p, row, o);
            }
        }
        let mut first = 0;
        while first < rows {
            let (p, o) = (&p[first * TILE..], &mut o[first * padded..]);
            let whole = first + R <= rows
                && state[first..first + R]
                    .iter()
                    .all(|row| row.seen(tile) == (0..TILE));
            if whole {
                multiply::<R, N>(p, TILE, 0..TILE, v, padded, o);
                first += R;
            } else {
                multiply::<1, N>(p, TILE, state[first].seen(tile), v, padded, o);
                first += 1;
            }
        }
    }
}

/// `max`, without a NaN on the right.
#[inline(always)]
fn maximum(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

/// Steps 3 to 5 for a row, and the first half of 6.
#[inline(always)]
fn softmax(
    scores: Scores,
    seen: Range<usize>,
    p: &mut [f32; TILE],
    row: &mut RowState,
    o: &mut [f32],
) {
    for x in p.iter_mut() {
        *x *= scores.factor;
    }
    if let Some(cap) = scores.capped {
        for x in p.iter_mut() {
            *x = tanh(*x) * cap;
        }
    }
    p[..seen.start].fill(f32::NEG_INFINITY);
    p[seen.end..].fill(f32::NEG_INFINITY);
    let mut most = [row.m[0]; LANES];
    for part in p.as_chunks::<LANES>().0 {
        for (most, &t) in most.iter_mut().zip(part) {
            *most = maximum(*most, t);
        }
    }
    let m = most.into_iter().fold(f32::NEG_INFINITY, maximum);
    let a = exp2(row.m[0] - m);
    for x in p.iter_mut() {
        *x = exp2(*x - m);
    }
    p[..seen.start].fill(0.0);
    p[seen.end..].fill(0.0);
    let mut sum = *p;
    let mut half = TILE / 2;
    while half > 0 {
        let (low, high) = sum.split_at_mut(half);
        for (low, high) in low.iter_mut().zip(high) {
            *low += *high;
        }
        half /= 2;
    }
    row.m[0] = m;
    row.l[0] = row.l[0].mul_add(a, sum[0]);
    for x in o.iter_mut() {
        *x *= a;
    }
}

/// `c[r][n] = fma(a[r][i], b[i][n], c[r][n])` over `i` in order, for `R` rows and all columns, `N` of them
/// at a time. Rows of `b` and `c` have `columns` elements, a multiple of `LANES`.
#[inline(always)]
fn multiply<const R: usize, const N: usize>(
    a: &[f32],
    a_stride: usize,
    over: Range<usize>,
    b: &[f32],
    columns: usize,
    c: &mut [f32],
) {
    let a: [&[f32]; R] = std::array::from_fn(|r| &a[r * a_stride..][over.clone()]);
    let b = &b[over.start * columns..over.end * columns];
    let mut at = 0;
    while at + N <= columns {
        multiply_block::<R, N>(&a, b, columns, at, c);
        at += N;
    }
    while at + LANES <= columns {
        multiply_block::<R, LANES>(&a, b, columns, at, c);
        at += LANES;
    }
}

#[inline(always)]
fn multiply_block<const R: usize, const N: usize>(
    a: &[&[f32]; R],
    b: &[f32],
    columns: usize,
    at: usize,
    c: &mut [f32],
) {
    let mut sums = [[0.0f32; N]; R];
    for (r, sums) in sums.iter_mut().enumerate() {
        sums.copy_from_slice(&c[r * columns + at..][..N]);
    }
    for (i, b) in b.chunks_exact(columns).enumerate() {
        let b = &b[at..at + N];
        for (a, sums) in a.iter().zip(&mut sums) {
            let a = a[i];
            for (sum, &b) in sums.iter_mut().zip(b) {
                *sum = a.mul_add(b, *sum);
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        c[r * columns + at..][..N].copy_from_slice(sums);
    }
}

/// `[TILE, columns]` to `[columns, TILE]`.
#[inline(always)]
fn transpose(rows: &[f32], columns: usize, to: &mut [f32]) {
    // A few rows and columns at a time, so that lines of both stay in cache.
    for first in (0..TILE).step_by(LANES) {
        for (d, to) in to.chunks_exact_mut(TILE).enumerate().take(columns) {
            let to = &mut to[first..first + LANES];
            for (j, to) in to.iter_mut().enumerate() {
                *to = rows[(first + j) * columns + d];
            }
        }
    }
}
