//! Latent attention (MLA): queries, keys and values by way of a vector of fewer dims.

use crate::error::{agree, usable};
use crate::projection::tokens_of;
use crate::{AttentionError, DenseRows, Projection, dot};
use phasor::Element;
use std::sync::Arc;

/// A linear map in two, with an RMS norm between: to fewer dims, and from there. The queries of DeepSeek-V2
/// and V3 (`q_a_proj`, `q_a_layernorm`, `q_b_proj`), and their values (the latent's rows of
/// `kv_a_proj_with_mqa`, `kv_a_layernorm`, the values' rows of `kv_b_proj`).
///
/// It rounds to the element type after each of the three. The mean square is a sum as
/// [`Linear`](crate::Linear)'s are of few tokens.
#[derive(Clone)]
pub struct LowRank<T> {
    down: Arc<dyn Projection<T>>,
    norm: Vec<f32>,
    eps: f32,
    up: Arc<dyn Projection<T>>,
}

impl<T: Element> LowRank<T> {
    /// `down`, then a norm by its weight, `[down.out_features]`, then `up`.
    ///
    /// # Errors
    /// [`AttentionError::Mismatch`] unless each has as many dims as the one before makes,
    /// [`AttentionError::Factor`] for an eps that is not positive.
    pub fn new(
        down: Arc<dyn Projection<T>>,
        norm: &[T],
        eps: f32,
        up: Arc<dyn Projection<T>>,
    ) -> Result<Self, AttentionError> {
        usable("eps", f64::from(eps))?;
        let rank = down.out_features();
        agree("elements of the weight of a norm", rank, norm.len())?;
        agree("in_features of the second map", rank, up.in_features())?;
        Ok(Self {
            down,
            norm: norm.iter().map(|x| x.widen()).collect(),
            eps,
            up,
        })
    }
}

impl<T: Element> Projection<T> for LowRank<T> {
    fn in_features(&self) -> usize {
        self.down.in_features()
    }

    fn out_features(&self) -> usize {
        self.up.out_features()
    }

    fn forward(&self, x: &[T], out: &mut [T]) -> Result<(), AttentionError> {
        let features = [self.in_features(), self.out_features()];
        let tokens = tokens_of(features, x.len(), out.len())?;
        let rank = self.norm.len();
        let mut low = vec![T::default(); tokens * rank];
        self.down.forward(x, &mut low)?;
        for low in low.chunks_exact_mut(rank) {
            let wide: Vec<f32> = low.iter().map(|x| x.widen()).collect();
            let mut squares = [0.0];
            dot::rows(&wide, DenseRows::F32(&wide), rank, 1, &mut squares);
            let factor = 1.0 / (squares[0] / rank as f32 + self.eps).sqrt();
            for ((low, x), weight) in low.iter_mut().zip(&wide).zip(&self.norm) {
                *low = T::narrow(x * factor * weight);
            }
        }
        self.up.forward(&low, out)
    }
}

/// The keys of latent attention: those of each head by way of the latent, followed by dims that rotate and
/// all heads share. With [`LowRank`] for queries and values, a layer of DeepSeek-V2 or V3 is an
/// [`AttentionLayer`](crate::AttentionLayer) whose `rotary_offset` is the first of these dims, and whose
/// cache has the keys and values of every head. (Their latent, from which both come, has fewer elements:
/// [`Attend`](crate::Attend) takes a cache of it, as keys of all its dims and values of the first, for
/// queries that an engine has multiplied by the keys' map.)
///
/// ```
/// use phasor_attention::{
///     DenseWeights, LatentKeys, Linear, LowRank, StackedWeights, WindowOfWeights,
/// };
/// use std::sync::Arc;
///
/// # fn main() -> Result<(), phasor_attention::AttentionError> {
/// // A checkpoint has rows of the latent and of what rotates in kv_a_proj_with_mqa, and rows of keys and
/// // values of each head in kv_b_proj.
/// let (hidden, heads, latent, nope, rope, v) = (64, 2, 32, 16, 8, 16);
/// let dense = |rows, columns| DenseWeights::new(vec![0.01f32; rows * columns], rows, columns);
/// let kv_a = Arc::new(dense(latent + rope, hidden)?);
/// let kv_b = Arc::new(dense(heads * (nope + v), latent)?);
/// let norm = vec![1.0f32; latent];
/// let down = |rows| WindowOfWeights::new(kv_a.clone(), rows, 0..hidden).map(|w| Arc::new(Linear(w)));
/// let up = |first: usize, rows: usize| {
///     let of_head = |head: usize| {
///         let first = head * (nope + v) + first;
///         WindowOfWeights::new(kv_b.clone(), first..first + rows, 0..latent)
///     };
///     let parts: Result<Vec<_>, _> = (0..heads).map(of_head).collect();
///     StackedWeights::new(parts?).map(|weights| Arc::new(Linear(weights)))
/// };
/// let low = down(0..latent)?;
/// let keys = LowRank::new(low.clone(), &norm, 1e-6, up(0, nope)?)?;
/// let keys = LatentKeys::new(keys, down(latent..latent + rope)?, heads)?;
/// let values = LowRank::new(low, &norm, 1e-6, up(nope, v)?)?;
/// # let _ = (keys, values);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct LatentKeys<T> {
    heads: LowRank<T>,
    shared: Arc<dyn Projection<T>>,
    count: usize,
}

/// Dims of each of so many heads.
pub(crate) fn own_dims(all: usize, count: usize) -> Result<usize, AttentionError> {
    match all.checked_div(count) {
        Some(own) if own * count == all => Ok(own),
        _ => Err(AttentionError::Value {
            what: "the number of heads of latent keys",
            value: count,
            remedy: "it must be above 0, and divide their dims",
        }),
    }
}

impl<T: Element> LatentKeys<T> {
    /// Dims of their own of so many heads, and those that they share.
    ///
    /// # Errors
    /// [`AttentionError::Value`] unless the first are those of so many heads,
    /// [`AttentionError::Mismatch`] if the two take other tokens.
    pub fn new(
        heads: LowRank<T>,
        shared: Arc<dyn Projection<T>>,
        count: usize,
    ) -> Result<Self, AttentionError> {
        own_dims(heads.out_features(), count)?;
        let from = heads.in_features();
        agree("in_features of shared dims", from, shared.in_features())?;
        Ok(Self {
            heads,
            shared,
            count,
        })
    }
}

impl<T: Element> Projection<T> for LatentKeys<T> {
    fn in_features(&self) -> usize {
        self.shared.in_features()
    }

    fn out_features(&self) -> usize {
        self.heads.out_features() + self.count * self.shared.out_features()
    }

    fn forward(&self, x: &[T], out: &mut [T]) -> Result<(), AttentionError> {
        let features = [self.in_features(), self.out_features()];
        let tokens = tokens_of(features, x.len(), out.len())?;
        let own = self.heads.out_features();
        let shared = self.shared.out_features();
        let mut of_heads = vec![T::default(); tokens * own];
        let mut of_all = vec![T::default(); tokens * shared];
        self.heads.forward(x, &mut of_heads)?;
        self.shared.forward(x, &mut of_all)?;
        let own = own / self.count;
        let heads = of_heads.chunks_exact(own);
        for (at, (head, out)) in heads.zip(out.chunks_exact_mut(own + shared)).enumerate() {
            out[..own].copy_from_slice(head);
            out[own..].copy_from_slice(&of_all[at / self.count * shared..][..shared]);
        }
        Ok(())
    }
}
