//! A plan: everything about a call that can be checked before there is memory to work on.

mod checks;
mod operands;
mod problem;
mod tensor;

pub(crate) use checks::{cache_len, check_keys};
pub use problem::{Appended, InOut, Problem};
pub(crate) use tensor::PlannedTensor;

use crate::cache::KvCacheLayout;
use crate::call::{self, PhasorCall, PhasorFusion};
use crate::codes::StoredCodes;
use crate::element::Dtype;
use crate::error::TensorName;
use crate::layout::Layout;
use crate::stages::Stages;
use crate::{Error, Rope};
use checks::{check_cache, check_output_pairing, check_pair, check_stages, check_tensor};
use problem::Sources;
use std::ops::Range;

/// A checked [`Problem`] for one [`Rope`], valid for any number of calls.
///
/// All that can be wrong with shapes, strides and overlap has been refused; a call checks that it
/// brings what was planned (rotation, element type, operands), buffer lengths and positions.
///
/// A plan takes 0.2 to 0.7 µs to make, and serves every layer: make one per step, not one per call, which
/// would double the time of a decode step on the host. Where the number of tokens changes from step to
/// step, plan once for the most, and take [`first_tokens`](Self::first_tokens) or
/// [`first_sequences`](Self::first_sequences) of it.
///
/// ```
/// # fn main() -> Result<(), phasor::Error> {
/// use phasor::{Dtype, Frequencies, Host, Layout, Pairing, Positions, Problem, Rope};
///
/// let rope = Rope::new(Frequencies::from_theta(10_000.0, 64)?, Pairing::HalfSplit);
/// let rotator = Host::new().rotator(&rope);
/// let plan = rotator.plan(&Problem::new(Dtype::F32).q(Layout::tokens(5, 4, 64)))?;
/// for mut q_of_layer in vec![vec![1.0f32; 5 * 4 * 64]; 3] {
///     rotator.rotate(&plan, Some((&mut q_of_layer).into()), None, Positions::start(40))?;
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Plan {
    pub(crate) rope: Rope,
    pub(crate) dtype: Dtype,
    pub(crate) q: Option<PlannedTensor>,
    pub(crate) k: Option<PlannedTensor>,
    pub(crate) v: Option<PlannedTensor>,
    pub(crate) cache: Option<KvCacheLayout>,
    pub(crate) stages: [Stages; 3],
    pub(crate) q_codes: Option<StoredCodes>,
    sources: Sources,
    longer_buffers: bool,
    /// Elements or codes that the caches of keys and of values reach. Known beforehand, as each call asks.
    cache_lengths: [Option<usize>; 2],
    /// Elements that one buffer for all may have; none where it is not planned.
    one_buffer_lengths: Range<usize>,
    pub(crate) batch: usize,
    pub(crate) tokens: usize,
    /// What is known of its calls.
    pub(crate) template: PhasorCall,
    /// What is known of their stages, if they have any.
    pub(crate) fusion: Option<PhasorFusion>,
}

impl Plan {
    /// Checks `problem` for `rope`. Backends call this through their own `plan`.
    ///
    /// # Errors
    /// [`Error::NothingToRotate`] for neither q nor k, [`Error::RotaryWindow`],
    /// [`Error::ShapeMismatch`], [`Error::RotaryOffsetMismatch`], [`Error::LayoutTooLarge`],
    /// [`Error::SelfOverlap`], [`Error::Overlap`], [`Error::OverlapUnknown`],
    /// [`Error::OutputPairingInPlace`] and [`Error::OutputPairingPassThrough`]; with caches,
    /// [`Error::CacheMissing`], [`Error::CacheMismatch`], [`Error::CacheBlocks`] and
    /// [`Error::CacheTooLarge`].
    pub fn new(rope: &Rope, problem: &Problem) -> Result<Self, Error> {
        let checked = |name, operand: &Option<InOut<Layout>>| {
            operand
                .as_ref()
                .map(|operand| check_tensor(name, operand, rope.rotary_dim(), problem))
                .transpose()
        };
        let q = checked(TensorName::Q, &problem.q)?;
        let k = checked(TensorName::K, &problem.k)?;
        let v = checked(TensorName::V, &problem.v)?;
        let Some(first) = q.or(k) else {
            return Err(Error::NothingToRotate);
        };
        check_stages(rope, problem, [&q, &k, &v])?;
        let tensors = [&q, &k, &v].map(Option::as_ref);
        for (at, a) in tensors.into_iter().enumerate() {
            for b in &tensors[at + 1..] {
                if let (Some(a), Some(b)) = (a, b) {
                    check_pair(a, b, rope.rotary_dim(), problem)?;
                }
            }
        }
        if rope.pairing() != rope.output_pairing() {
            check_output_pairing(rope.angles(), [&q, &k])?;
        }
        check_cache(problem, [&k, &v])?;
        let [batch, tokens, ..] = first.source.shape();
        let cache_lengths = problem.cache.as_ref().map_or([None; 2], |cache| {
            [0, 1].map(|at| {
                let (_, layout) = cache.parts()[at];
                // A planned cache has a length.
                layout
                    .map(|layout| cache_len(layout, cache.codes[at].as_ref()).unwrap_or(usize::MAX))
            })
        });
        let mut plan = Self {
            rope: rope.clone(),
            dtype: problem.dtype,
            q,
            k,
            v,
            cache: problem.cache,
            stages: problem.stages,
            q_codes: problem.q_codes,
            sources: problem.sources,
            longer_buffers: problem.longer_buffers,
            cache_lengths,
            one_buffer_lengths: 0..0,
            batch,
            tokens,
            template: call::template(
                rope,
                problem.dtype,
                [&q, &k, &v],
                problem.cache.as_ref(),
                problem.q_codes.is_some(),
                [batch, tokens],
            ),
            fusion: call::fusion(
                problem.dtype,
                [&q, &k, &v],
                &problem.stages,
                problem.cache.as_ref(),
                problem.q_codes.as_ref(),
            ),
        };
        plan.one_buffer_lengths = plan.find_one_buffer_lengths();
        Ok(plan)
    }

    /// The same plan for the first `tokens` tokens of each sequence: any part of a checked plan is
    /// checked. Takes a few nanoseconds and allocates nothing. Buffers may be as long as those of this
    /// plan, or longer.
    ///
    /// ```
    /// use phasor::{Dtype, Frequencies, Host, InOut, Layout, Pairing, Positions, Problem, Rope};
    ///
    /// # fn main() -> Result<(), phasor::Error> {
    /// let rope = Rope::new(Frequencies::from_theta(10_000.0, 64)?, Pairing::HalfSplit);
    /// let rotator = Host::new().rotator(&rope);
    /// let most = rotator.plan(&Problem::new(Dtype::F32).q(Layout::tokens(512, 4, 64)))?;
    /// let mut q = vec![1.0f32; 512 * 4 * 64];
    /// for (start, tokens) in [(0, 130), (130, 1), (131, 1)] {
    ///     let step = most.first_tokens(tokens)?;
    ///     rotator.rotate(&step, Some(InOut::from(&mut q[..])), None, Positions::start(start))?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::NotInPlan`] if there are fewer.
    pub fn first_tokens(&self, tokens: usize) -> Result<Self, Error> {
        self.part(self.batch, tokens)
    }

    /// The same plan for the first `sequences` of the batch, where a step is one token of each.
    ///
    /// # Errors
    /// [`Error::NotInPlan`] if there are fewer.
    pub fn first_sequences(&self, sequences: usize) -> Result<Self, Error> {
        self.part(sequences, self.tokens)
    }

    fn part(&self, batch: usize, tokens: usize) -> Result<Self, Error> {
        if batch > self.batch || tokens > self.tokens {
            return Err(Error::NotInPlan {
                planned: [self.batch, self.tokens],
                asked: [batch, tokens],
            });
        }
        let mut part = self.clone();
        (part.batch, part.tokens, part.longer_buffers) = (batch, tokens, true);
        for tensor in part.q.iter_mut().chain(&mut part.k).chain(&mut part.v) {
            *tensor = tensor.with_counts(batch, tokens);
        }
        part.one_buffer_lengths = part.find_one_buffer_lengths();
        part.template = call::template(
            &part.rope,
            part.dtype,
            [&part.q, &part.k, &part.v],
            part.cache.as_ref(),
            part.q_codes.is_some(),
            [batch, tokens],
        );
        Ok(part)
    }

    /// The rotation that this plan performs.
    pub fn rope(&self) -> &Rope {
        &self.rope
    }

    /// The element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Sequences of the batch.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Tokens of each sequence.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// `[batch, tokens, heads, head_dim]` of the queries, if there are any.
    pub fn q_shape(&self) -> Option<[usize; 4]> {
        self.q.map(|q| q.source.shape())
    }

    /// `[batch, tokens, heads, head_dim]` of the keys, if there are any.
    pub fn k_shape(&self) -> Option<[usize; 4]> {
        self.k.map(|k| k.source.shape())
    }

    /// Whether there is no head to rotate, as in a batch of no sequences: a call then does nothing.
    pub fn is_empty(&self) -> bool {
        let streams = self.template.streams();
        streams.iter().all(|stream| stream.read.heads == 0)
    }

    /// Bytes that a call reads and writes: in place the rotated dims, out of place all of them.
    /// Angles and positions are not counted.
    pub fn bytes(&self) -> u64 {
        self.tensors()
            .map(|tensor| {
                let [batch, tokens, heads, head_dim] = tensor.source.shape();
                let dims = match tensor.name {
                    _ if !tensor.in_place || tensor.nowhere || tensor.whole_heads => head_dim,
                    TensorName::V => 0,
                    _ => self.rope.rotary_dim(),
                };
                2 * (batch * tokens * heads * dims * self.dtype.size()) as u64
            })
            .sum()
    }

    pub(crate) fn tensors(&self) -> impl Iterator<Item = &PlannedTensor> {
        self.q.iter().chain(&self.k).chain(&self.v)
    }
}
