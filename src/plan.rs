//! A plan: everything about a call that can be checked before there is memory to work on.

use crate::cache::{CacheLayout, KvCacheLayout};
use crate::call::{self, PhasorCall, PhasorFusion};
use crate::codes::StoredCodes;
use crate::element::Dtype;
use crate::error::TensorName;
use crate::layout::{Layout, Overlap, Region};
use crate::stages::Stages;
use crate::{Angles, Direction, Error, OutOfRange, Rope};

/// One tensor of a call: written where it is read, or somewhere else.
///
/// Used for layouts (`InOut<Layout>`) when planning, and for buffers of each backend when
/// rotating.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InOut<S, D = S, O = D> {
    /// Rotated where it is. Dims that do not rotate are not touched.
    InPlace(D),
    /// Read from `source`, written to `destination`; dims that do not rotate are copied.
    OutOfPlace {
        /// Read only.
        source: S,
        /// Written in full, as far as its layout goes.
        destination: O,
    },
}

impl<S, D, O> InOut<S, D, O> {
    /// Turns each side into something else.
    pub(crate) fn try_map<S2, D2, O2, E>(
        self,
        source: impl FnOnce(S) -> Result<S2, E>,
        in_place: impl FnOnce(D) -> Result<D2, E>,
        destination: impl FnOnce(O) -> Result<O2, E>,
    ) -> Result<InOut<S2, D2, O2>, E> {
        Ok(match self {
            InOut::InPlace(buffer) => InOut::InPlace(in_place(buffer)?),
            InOut::OutOfPlace {
                source: from,
                destination: to,
            } => InOut::OutOfPlace {
                source: source(from)?,
                destination: destination(to)?,
            },
        })
    }
}

impl From<Layout> for InOut<Layout> {
    fn from(layout: Layout) -> Self {
        InOut::InPlace(layout)
    }
}

/// `(source, destination)`.
impl From<(Layout, Layout)> for InOut<Layout> {
    fn from((source, destination): (Layout, Layout)) -> Self {
        InOut::OutOfPlace {
            source,
            destination,
        }
    }
}

/// Keys or values of a call that stores them in a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Appended<S, D = S, O = D> {
    /// Read, and written to the cache only.
    ToCache(S),
    /// Written elsewhere too, or only there.
    InOut(InOut<S, D, O>),
}

/// What is to be rotated: element type, and the layouts of q and k. How positions are given is said by
/// the positions of each call.
///
/// ```
/// use phasor::{Dtype, Layout, Problem};
///
/// let problem = Problem::new(Dtype::Bf16)
///     .q(Layout::tokens(256, 32, 128))
///     .k(Layout::tokens(256, 8, 128));
/// # let _ = problem;
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Problem {
    dtype: Dtype,
    q: Option<InOut<Layout>>,
    k: Option<InOut<Layout>>,
    v: Option<InOut<Layout>>,
    /// Whether keys and values are but stored in their cache.
    only_cached: [bool; 2],
    cache: Option<KvCacheLayout>,
    /// Of q, k and v.
    stages: [Stages; 3],
    q_codes: Option<StoredCodes>,
    sources: Sources,
    longer_buffers: bool,
    assume_disjoint: bool,
}

impl Problem {
    /// An empty problem over elements of `dtype`.
    pub const fn new(dtype: Dtype) -> Self {
        Self {
            dtype,
            q: None,
            k: None,
            v: None,
            only_cached: [false; 2],
            cache: None,
            stages: [Stages::new(); 3],
            q_codes: None,
            sources: Sources::Apart,
            longer_buffers: false,
            assume_disjoint: false,
        }
    }

    /// The queries: a [`Layout`] in place, or a pair `(source, destination)`. Queries and keys agree
    /// in batch and sequence only; heads, head_dim and rotary_offset may differ.
    pub fn q(mut self, layout: impl Into<InOut<Layout>>) -> Self {
        self.q = Some(layout.into());
        self
    }

    /// The keys: a [`Layout`] in place, or a pair `(source, destination)`.
    pub fn k(mut self, layout: impl Into<InOut<Layout>>) -> Self {
        self.k = Some(layout.into());
        self
    }

    /// The keys are read here, and written to their cache only.
    pub fn k_to_cache(mut self, source: Layout) -> Self {
        self.k = Some(source.into());
        self.only_cached[0] = true;
        self
    }

    /// The values: a [`Layout`] in place, or a pair `(source, destination)`. They do not rotate: they go
    /// through their stages, if they have any, are copied, and stored in their cache if they have one.
    pub fn v(mut self, layout: impl Into<InOut<Layout>>) -> Self {
        self.v = Some(layout.into());
        self
    }

    /// The values are read here, and copied to their cache only.
    pub fn v_to_cache(mut self, source: Layout) -> Self {
        self.v = Some(source.into());
        self.only_cached[1] = true;
        self
    }

    /// The caches that keys, once rotated, and values are stored in, besides where else they are written.
    /// Caches are buffers of their own; each call says which slot a token has ([`Slots`](crate::Slots)).
    pub const fn cache(mut self, cache: KvCacheLayout) -> Self {
        self.cache = Some(cache);
        self
    }

    /// What is done to the queries beside their rotation. In place, whole heads are then written.
    pub const fn q_stages(mut self, stages: Stages) -> Self {
        self.stages[0] = stages;
        self
    }

    /// What is done to the keys beside their rotation.
    pub const fn k_stages(mut self, stages: Stages) -> Self {
        self.stages[1] = stages;
        self
    }

    /// What is done to the values.
    pub const fn v_stages(mut self, stages: Stages) -> Self {
        self.stages[2] = stages;
        self
    }

    /// Writes the queries as codes, by scales that each call brings. Their destination is a buffer of
    /// bytes, and its layout counts these.
    pub const fn q_codes(mut self, codes: StoredCodes) -> Self {
        self.q_codes = Some(codes);
        self
    }

    /// All layouts are windows of one buffer, such as packed qkv. Overlap is then checked across
    /// tensors too. Otherwise every source and destination is a buffer of its own.
    pub const fn one_buffer(mut self) -> Self {
        self.sources = Sources::OneBuffer;
        self
    }

    /// All sources are windows of one buffer, such as packed qkv, and what is written elsewhere than in
    /// place has buffers of its own.
    pub const fn packed(mut self) -> Self {
        self.sources = Sources::Packed;
        self
    }

    /// Says that buffers may have room for more tokens or sequences than are rotated, such as a cache
    /// that is filled in part. Otherwise a call with such a buffer is refused
    /// ([`Error::BufferHasRoom`]), as it may be a plan of an earlier step.
    pub const fn longer_buffers(mut self) -> Self {
        self.longer_buffers = true;
        self
    }

    /// Accepts layouts whose strides do not nest, so that freedom of overlap cannot be decided.
    /// Overlap that is certain is refused all the same.
    ///
    /// # Safety
    /// No element that is written may occur twice in its layout or in another layout of the same
    /// buffer, except for source and destination of one tensor rotated in place.
    pub const unsafe fn assume_disjoint(mut self) -> Self {
        self.assume_disjoint = true;
        self
    }
}

/// Which layouts share a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sources {
    /// None.
    Apart,
    /// All of them.
    OneBuffer,
    /// All that are read.
    Packed,
}

/// A tensor of a plan, its layouts checked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PlannedTensor {
    pub(crate) name: TensorName,
    pub(crate) source: Layout,
    pub(crate) destination: Layout,
    pub(crate) in_place: bool,
    /// Written to a cache only.
    pub(crate) nowhere: bool,
    /// Stored in a cache.
    cached: bool,
    /// In place, all dims of a head are written; else those that rotate.
    whole_heads: bool,
    /// Of the source and of the destination.
    reach: [Reach; 2],
}

/// How long a buffer is for a layout. Known beforehand, as each call asks.
#[derive(Clone, Copy, Debug)]
struct Reach {
    /// Elements that the layout reaches.
    needed: usize,
    /// Elements at which there is room for another token, and for another sequence.
    with_another: [usize; 2],
}

impl Reach {
    fn of(layout: &Layout) -> Self {
        let len = |batch, tokens| layout.with_counts(batch, tokens).required_len();
        let with_another = |stride: usize, batch: Option<usize>, tokens: Option<usize>| {
            // A dim that is repeated takes no more room.
            let longer = match (batch, tokens) {
                (Some(batch), Some(tokens)) if stride > 0 && !layout.is_empty() => {
                    len(batch, tokens)
                }
                _ => None,
            };
            longer.unwrap_or(usize::MAX)
        };
        let (batch, tokens) = (layout.batch, layout.tokens);
        Self {
            // A planned layout has a length.
            needed: layout.required_len().unwrap_or(usize::MAX),
            with_another: [
                with_another(layout.token_stride, Some(batch), tokens.checked_add(1)),
                with_another(layout.batch_stride, batch.checked_add(1), Some(tokens)),
            ],
        }
    }

    /// A buffer of `got` elements reaches as far as the layout.
    fn check(&self, what: &'static str, got: usize) -> Result<(), Error> {
        let needed = self.needed;
        if got < needed {
            return Err(Error::BufferTooShort { what, needed, got });
        }
        Ok(())
    }

    /// It has no room for another token or sequence.
    fn check_room(&self, what: &'static str, got: usize) -> Result<(), Error> {
        let [token, sequence] = self.with_another;
        if got < token.min(sequence) {
            return Ok(());
        }
        Err(Error::BufferHasRoom {
            what,
            more: if got >= token { "token" } else { "sequence" },
            needed: self.needed,
            got,
        })
    }
}

impl PlannedTensor {
    pub(crate) const fn form(&self) -> &'static str {
        if self.nowhere {
            "to the cache"
        } else if self.in_place {
            "in place"
        } else {
            "out of place"
        }
    }

    /// What is read and what is written, with names for errors.
    fn sides(&self) -> [(&'static str, Reach); 2] {
        let (written, read) = self.labels();
        let [of_source, of_destination] = self.reach;
        [(read, of_source), (written, of_destination)]
    }

    /// For other numbers of sequences and tokens.
    fn with_counts(mut self, batch: usize, tokens: usize) -> Self {
        self.source = self.source.with_counts(batch, tokens);
        self.destination = self.destination.with_counts(batch, tokens);
        self.reach = [Reach::of(&self.source), Reach::of(&self.destination)];
        self
    }

    /// The elements that are written.
    fn written(&self, rotary_dim: usize) -> Region {
        if self.nowhere {
            self.source.region(0, 0)
        } else if self.in_place && !self.whole_heads {
            let rotary_dim = match self.name {
                TensorName::V => 0,
                _ => rotary_dim,
            };
            self.destination
                .region(self.destination.rotary_offset, rotary_dim)
        } else {
            self.destination.region(0, self.destination.head_dim)
        }
    }

    /// The elements that are read: of a tensor in place that is not stored in a cache too, those that are
    /// written.
    fn read(&self, rotary_dim: usize) -> Region {
        if self.in_place && !self.nowhere && !self.cached {
            self.written(rotary_dim)
        } else {
            self.source.region(0, self.source.head_dim)
        }
    }

    /// Names for errors: of what is written and of what is read.
    const fn labels(&self) -> (&'static str, &'static str) {
        match (self.name, self.in_place) {
            (TensorName::Q, true) => ("q", "q"),
            (TensorName::K, true) => ("k", "k"),
            (TensorName::V, true) => ("v", "v"),
            (TensorName::V, false) => ("v's destination", "v's source"),
            (TensorName::Q, false) => ("q's destination", "q's source"),
            (TensorName::K, false) => ("k's destination", "k's source"),
        }
    }
}

/// A checked [`Problem`] for one [`Rope`], valid for any number of calls.
///
/// All that can be wrong with shapes, strides and overlap has been refused; a call checks that it
/// brings what was planned (rotation, element type, operands), buffer lengths and positions.
///
/// A plan takes 0.2 to 0.7 µs to make, and serves every layer: make one per step, not one per call, which
/// would double the time of a decode step on the host. Where the number of tokens changes from step to
/// step, plan once for the most, and take [`first_tokens`](Self::first_tokens) or
/// [`first_sequences`](Self::first_sequences) of it.
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
    pub(crate) batch: usize,
    pub(crate) tokens: usize,
    /// What is known of its calls.
    pub(crate) template: PhasorCall,
    /// What is known of their stages, if they have any.
    pub(crate) fusion: Option<PhasorFusion>,
}

/// Kernels count heads and dims in 32 bits, with room to step past the end.
const MAX_COUNT: usize = 1 << 28;
/// Blocks of a grid are counted in 31 bits, and one has a token at least.
const MAX_TOKENS: usize = (1 << 31) - 1;

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
        Ok(Self {
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
        })
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

    /// The plan has neither values nor a cache.
    pub(crate) fn check_rotates_only(&self) -> Result<(), Error> {
        let more = if self.v.is_some() || self.cache.is_some() {
            "has values or a cache"
        } else if self.fusion.is_some() {
            "has stages beside the rotation"
        } else if self.sources == Sources::Packed {
            "has packed sources"
        } else {
            return Ok(());
        };
        Err(Error::AppendMismatch {
            planned: more,
            remedy: "call step",
        })
    }

    /// The caches reach as far as their layouts do: buffers of keys and of values, or one for both.
    pub(crate) fn check_cache_lengths(&self, lengths: [Option<usize>; 2]) -> Result<(), Error> {
        let parts = match &self.cache {
            Some(cache) => cache.parts(),
            None => [(TensorName::K, None), (TensorName::V, None)],
        };
        let codes = self.cache.as_ref().map_or([None; 2], |cache| cache.codes);
        for (((name, layout), codes), got) in parts.into_iter().zip(&codes).zip(lengths) {
            let (Some(layout), Some(got)) = (layout, got) else {
                if layout.is_some() != got.is_some() {
                    return Err(Error::CacheMissing {
                        tensor: name,
                        what: match layout {
                            Some(_) => "the plan has a cache for it, and the call has none",
                            None => "the call has a cache for it, and the plan has none",
                        },
                    });
                }
                continue;
            };
            // A planned cache has a length.
            let needed = cache_len(layout, codes.as_ref()).unwrap_or(usize::MAX);
            if got < needed {
                let what = match name {
                    TensorName::V => "v's cache",
                    _ => "k's cache",
                };
                return Err(Error::BufferTooShort { what, needed, got });
            }
        }
        Ok(())
    }

    /// Whether keys and values are cached in one buffer.
    pub(crate) fn caches_are_one_buffer(&self) -> bool {
        self.cache.is_some_and(|cache| cache.one_buffer)
    }

    pub(crate) fn all_tensors(&self) -> [Option<&PlannedTensor>; 3] {
        [self.q.as_ref(), self.k.as_ref(), self.v.as_ref()]
    }

    /// Bytes of an element of the caches of keys and of values, and its type if it has one.
    pub(crate) fn cache_types(&self) -> [(usize, Option<Dtype>); 2] {
        match &self.cache {
            None => [(1, None); 2],
            Some(cache) => cache.codes.map(|codes| match codes {
                Some(_) => (1, None),
                None => (self.dtype.size(), Some(self.dtype)),
            }),
        }
    }

    /// Bytes of a scale that is written: of the keys' codes (1) or of the values' (2).
    pub(crate) fn scale_size(&self, at: usize) -> usize {
        let codes = self.cache.as_ref().and_then(|cache| cache.codes[at - 1]);
        let dynamic = codes.and_then(|codes| codes.dynamic);
        dynamic.map_or(1, |dynamic| dynamic.size())
    }

    /// Scales are given where they are to be, and have room where they are written.
    pub(crate) fn check_scales(&self, at: usize, given: bool, room: bool) -> Result<(), Error> {
        let codes = match at {
            0 => self.q_codes,
            _ => self.cache.as_ref().and_then(|cache| cache.codes[at - 1]),
        };
        let what = match codes {
            Some(codes) if codes.dynamic.is_some() && given => {
                "its scales are not given but written: use Step::k_scales or Step::v_scales"
            }
            Some(codes) if codes.dynamic.is_none() && room => {
                "its scales are not written but given: use StageWeights::scales"
            }
            None if given || room => "no codes are planned for these scales",
            _ => return Ok(()),
        };
        Err(Error::Stages {
            tensor: [TensorName::Q, TensorName::K, TensorName::V][at],
            what,
        })
    }

    /// Caches are in one buffer, or apart, as planned.
    pub(crate) fn check_cache_form(&self, one_buffer: bool) -> Result<(), Error> {
        if one_buffer != self.caches_are_one_buffer() {
            return Err(Error::AppendMismatch {
                planned: match one_buffer {
                    true => "has caches in buffers of their own",
                    false => "has both caches in one buffer",
                },
                remedy: "give the caches so, or plan them as they are given",
            });
        }
        Ok(())
    }

    /// The sources are windows of one buffer, and what is written elsewhere has buffers of its own.
    pub(crate) fn is_packed(&self) -> bool {
        self.sources == Sources::Packed
    }

    /// The buffer of packed sources reaches as far as they do.
    pub(crate) fn check_packed(&self, len: usize) -> Result<(), Error> {
        if !self.is_packed() {
            return Err(Error::OneBufferMismatch {
                planned: "separate buffers",
                remedy: "give q, k and v, or plan with Problem::packed or Problem::one_buffer",
            });
        }
        self.check_shared(len, |tensor| [tensor.sides()[0]])
    }

    /// The plan is over one buffer, which reaches as far as its layouts do and, unless that is meant, has
    /// no room for another token or sequence.
    pub(crate) fn check_one_buffer(&self, len: usize) -> Result<(), Error> {
        if self.sources != Sources::OneBuffer {
            return Err(Error::OneBufferMismatch {
                planned: match self.sources {
                    Sources::Packed => "packed sources",
                    _ => "separate buffers",
                },
                remedy: "call rotate or step, or plan with Problem::one_buffer",
            });
        }
        self.check_shared(len, PlannedTensor::sides)
    }

    /// The layouts of one buffer that `sides` has of each tensor.
    fn check_shared<const N: usize>(
        &self,
        len: usize,
        sides: impl Fn(&PlannedTensor) -> [(&'static str, Reach); N],
    ) -> Result<(), Error> {
        let mut furthest = None;
        for side in self.tensors().flat_map(sides) {
            let (what, reach) = side;
            reach.check(what, len)?;
            if furthest.is_none_or(|(_, most): (_, Reach)| reach.needed > most.needed) {
                furthest = Some(side);
            }
        }
        // Behind the others there is room, which is that one's.
        match furthest {
            Some((what, reach)) if !self.longer_buffers => reach.check_room(what, len),
            _ => Ok(()),
        }
    }

    /// The buffers of an operand reach as far as its layouts do and, unless that is meant, have no room
    /// for another token or sequence.
    pub(crate) fn check_lengths(
        &self,
        tensor: &PlannedTensor,
        source: usize,
        destination: usize,
    ) -> Result<(), Error> {
        for (side, len) in tensor.sides().into_iter().zip([source, destination]) {
            self.check_side(side, len)?;
        }
        Ok(())
    }

    /// The same for what is read, where something else is written.
    pub(crate) fn check_source_length(
        &self,
        tensor: &PlannedTensor,
        len: usize,
    ) -> Result<(), Error> {
        self.check_side(tensor.sides()[0], len)
    }

    /// The same for what is written, where something else is read.
    pub(crate) fn check_destination_length(
        &self,
        tensor: &PlannedTensor,
        len: usize,
    ) -> Result<(), Error> {
        self.check_side(tensor.sides()[1], len)
    }

    fn check_side(&self, (what, reach): (&'static str, Reach), len: usize) -> Result<(), Error> {
        reach.check(what, len)?;
        match self.longer_buffers {
            true => Ok(()),
            false => reach.check_room(what, len),
        }
    }

    /// Checks the forms of the operands of a call against the plan's: of the keys, if they are given.
    pub(crate) fn check_operands<S, D, O>(
        &self,
        q: &Option<InOut<S, D, O>>,
        k: Option<&Option<InOut<S, D, O>>>,
    ) -> Result<(), Error> {
        self.check_apart()?;
        let form = |operand: &Option<InOut<S, D, O>>| match operand {
            None => "absent",
            Some(InOut::InPlace(_)) => "in place",
            Some(InOut::OutOfPlace { .. }) => "out of place",
        };
        self.check_form(TensorName::Q, &self.q, form(q))?;
        match k {
            Some(k) => self.check_form(TensorName::K, &self.k, form(k)),
            None => Ok(()),
        }
    }

    fn check_apart(&self) -> Result<(), Error> {
        if self.sources != Sources::Apart {
            return Err(Error::OneBufferMismatch {
                planned: match self.sources {
                    Sources::Packed => "packed sources",
                    _ => "one buffer",
                },
                remedy: "call rotate_one_buffer or append_one_buffer, or step with Step::buffer",
            });
        }
        Ok(())
    }

    /// The same for a call that appends.
    pub(crate) fn check_append_operands<S, D, O>(
        &self,
        q: &Option<InOut<S, D, O>>,
        kv: [&Option<Appended<S, D, O>>; 2],
    ) -> Result<(), Error> {
        self.check_operands(q, None)?;
        self.check_kv_forms(kv)
    }

    /// The same for a step, where q may be written as codes.
    pub(crate) fn check_step_operands<S, D, O>(
        &self,
        q: &Option<InOut<S, D, O>>,
        has_source: bool,
        kv: [&Option<Appended<S, D, O>>; 2],
    ) -> Result<(), Error> {
        match (&self.q_codes, has_source) {
            (None, false) => return self.check_append_operands(q, kv),
            (Some(_), true) if q.is_none() => {}
            (planned, _) => {
                return Err(Error::Stages {
                    tensor: TensorName::Q,
                    what: match planned {
                        Some(_) => {
                            "codes are planned for it: give what is read with Step::q_source"
                        }
                        None => "no codes are planned for it: give it with Step::q",
                    },
                });
            }
        }
        self.check_apart()?;
        self.check_kv_forms(kv)
    }

    fn check_kv_forms<S, D, O>(&self, kv: [&Option<Appended<S, D, O>>; 2]) -> Result<(), Error> {
        let forms = kv.map(|operand| match operand {
            None => "absent",
            Some(Appended::ToCache(_)) => "to the cache",
            Some(Appended::InOut(InOut::InPlace(_))) => "in place",
            Some(Appended::InOut(InOut::OutOfPlace { .. })) => "out of place",
        });
        self.check_form(TensorName::K, &self.k, forms[0])?;
        self.check_form(TensorName::V, &self.v, forms[1])
    }

    fn check_form(
        &self,
        tensor: TensorName,
        planned: &Option<PlannedTensor>,
        given: &'static str,
    ) -> Result<(), Error> {
        let planned = planned.as_ref().map_or("absent", PlannedTensor::form);
        if planned != given {
            return Err(Error::OperandMismatch {
                tensor,
                planned,
                given,
            });
        }
        Ok(())
    }

    /// The element type of a call is the plan's.
    pub(crate) fn check_dtype(&self, given: Dtype) -> Result<(), Error> {
        if given != self.dtype {
            return Err(Error::DtypeMismatch {
                planned: self.dtype,
                given,
            });
        }
        Ok(())
    }
}

fn check_tensor(
    name: TensorName,
    operand: &InOut<Layout>,
    rotary_dim: usize,
    problem: &Problem,
) -> Result<PlannedTensor, Error> {
    let (source, destination, in_place) = match *operand {
        InOut::InPlace(layout) => (layout, layout, true),
        InOut::OutOfPlace {
            source,
            destination,
        } => (source, destination, false),
    };
    let (index, cache) = match name {
        TensorName::Q => (0, None),
        TensorName::K => (1, problem.cache.and_then(|cache| cache.k)),
        TensorName::V => (2, problem.cache.and_then(|cache| cache.v)),
    };
    let tensor = PlannedTensor {
        name,
        source,
        destination,
        in_place,
        nowhere: index > 0 && problem.only_cached[index - 1],
        cached: cache.is_some(),
        whole_heads: problem.stages[index].is_present(name != TensorName::V),
        reach: [Reach::of(&source), Reach::of(&destination)],
    };
    if source.shape() != destination.shape() {
        return Err(Error::ShapeMismatch {
            what: "source and destination must agree in shape",
            left: source.shape(),
            right: destination.shape(),
        });
    }
    if source.rotary_offset != destination.rotary_offset {
        return Err(Error::RotaryOffsetMismatch {
            tensor: name,
            source_offset: source.rotary_offset,
            destination_offset: destination.rotary_offset,
        });
    }
    if name != TensorName::V {
        source.check_rotary(rotary_dim, name)?;
    }
    for layout in [&source, &destination] {
        let bytes = layout
            .required_len()
            .and_then(|len| len.checked_mul(problem.dtype.size()));
        // A source may repeat elements, so its count is bounded apart from its length.
        let count = layout
            .shape()
            .iter()
            .try_fold(2 * problem.dtype.size(), |n, &dim| n.checked_mul(dim));
        let fits = |n: Option<usize>| n.is_some_and(|n| i64::try_from(n).is_ok());
        let tokens = layout.batch.checked_mul(layout.tokens);
        if !fits(bytes)
            || !fits(count)
            || layout.heads >= MAX_COUNT
            || layout.head_dim >= MAX_COUNT
            || !layout.is_empty() && tokens.is_none_or(|tokens| tokens > MAX_TOKENS)
        {
            return Err(Error::LayoutTooLarge { tensor: name });
        }
    }
    if source.is_empty() {
        return Ok(tensor);
    }
    let (written, read) = tensor.labels();
    let verdict = tensor.written(rotary_dim).self_overlap();
    match verdict {
        Overlap::Overlapping => return Err(Error::SelfOverlap { tensor: name }),
        Overlap::Unknown if !problem.assume_disjoint => {
            return Err(Error::OverlapUnknown { what: written });
        }
        _ => {}
    }
    if problem.sources == Sources::OneBuffer && !in_place {
        refuse_overlap(
            (written, &tensor.written(rotary_dim)),
            (read, &tensor.read(rotary_dim)),
            problem.assume_disjoint,
        )?;
    }
    Ok(tensor)
}

/// Two tensors of a problem agree in what they share, and are apart in one buffer.
fn check_pair(
    a: &PlannedTensor,
    b: &PlannedTensor,
    rotary_dim: usize,
    problem: &Problem,
) -> Result<(), Error> {
    let (left, right) = (a.source.shape(), b.source.shape());
    if left[..2] != right[..2] {
        return Err(Error::ShapeMismatch {
            what: match (a.name, b.name) {
                (TensorName::Q, TensorName::K) => "q and k must agree in batch and tokens",
                (TensorName::Q, _) => "q and v must agree in batch and tokens",
                _ => "k and v must agree in batch and tokens",
            },
            left,
            right,
        });
    }
    match problem.sources {
        Sources::Apart => return Ok(()),
        // Only what is written in place is in the buffer.
        Sources::Packed if !(a.in_place || b.in_place) => return Ok(()),
        _ => {}
    }
    check_apart(a, b, rotary_dim, problem)?;
    check_apart(b, a, rotary_dim, problem)
}

/// Stages fit the streams that they are for.
fn check_stages(
    rope: &Rope,
    problem: &Problem,
    tensors: [&Option<PlannedTensor>; 3],
) -> Result<(), Error> {
    for (tensor, stages) in tensors.into_iter().zip(&problem.stages) {
        let Some(tensor) = tensor else { continue };
        let [.., head_dim] = tensor.source.shape();
        let wrong = |what| {
            Err(Error::Stages {
                tensor: tensor.name,
                what,
            })
        };
        if stages.norm.is_some() && !head_dim.is_multiple_of(2) {
            return wrong("a norm needs an even head_dim");
        }
        if stages.norm.is_some_and(|norm| norm.round_after) && stages.norm_after_rotation {
            // Nothing but a scale follows, and that one is not rounded to.
            return wrong(
                "round_after is for a norm before the rotation: one after it is the last to write",
            );
        }
        let more = stages.bias || stages.norm.is_some();
        if rope.direction() == Direction::Inverse && more && tensor.name != TensorName::V {
            return wrong(
                "the way back is that of the rotation alone: gradients of a bias or a norm are not \
                 formed, so plan it without",
            );
        }
        if !stages.rotates
            && tensor.name != TensorName::V
            && rope.pairing() != rope.output_pairing()
        {
            return wrong("without a rotation there is no output pairing: plan a plain Rope");
        }
    }
    if let (Some(codes), Some(q)) = (&problem.q_codes, tensors[0]) {
        let wrong = |what| {
            Err(Error::Stages {
                tensor: TensorName::Q,
                what,
            })
        };
        if q.in_place {
            return wrong("codes are written elsewhere than in place: plan (source, destination)");
        }
        if codes.dynamic.is_some() {
            return wrong("scales of codes that no cache holds are given: use StoredCodes::given");
        }
        if problem.sources == Sources::OneBuffer {
            return wrong("codes have a buffer of their own: plan with Problem::packed");
        }
    }
    Ok(())
}

/// Keys and values fit their caches, and these each other.
fn check_cache(problem: &Problem, [k, v]: [&Option<PlannedTensor>; 2]) -> Result<(), Error> {
    let cache = problem.cache.as_ref();
    for (name, tensor, layout) in [
        (TensorName::K, k, cache.and_then(|cache| cache.k)),
        (TensorName::V, v, cache.and_then(|cache| cache.v)),
    ] {
        let missing = |what| Err(Error::CacheMissing { tensor: name, what });
        match (tensor, layout) {
            (None, Some(_)) => return missing("it has a cache, and no layout to be read from"),
            (Some(tensor), None) if tensor.nowhere => {
                return missing(
                    "it is to be written to its cache, and has none: use Problem::cache",
                );
            }
            (Some(tensor), Some(layout)) => check_cache_of(tensor, &layout, problem)?,
            (_, None) => {}
        }
    }
    if let Some((k, v)) = cache.and_then(|cache| cache.k.zip(cache.v)) {
        let agree = |what, left, right| match left == right {
            true => Ok(()),
            false => Err(Error::CacheMismatch {
                tensor: TensorName::V,
                what,
                left,
                right,
            }),
        };
        agree("k's and v's must agree in pages", k.pages, v.pages)?;
        agree(
            "k's and v's must agree in page_size",
            k.page_size,
            v.page_size,
        )?;
    }
    match cache {
        Some(cache) => check_apart_in_cache(cache, problem),
        None => Ok(()),
    }
}

/// What is written of one buffer of caches is written once: codes, scales between them, and the other cache.
fn check_apart_in_cache(cache: &KvCacheLayout, problem: &Problem) -> Result<(), Error> {
    let sizes = cache.element_sizes(problem.dtype);
    let labels = [("k's cache", "k's scales"), ("v's cache", "v's scales")];
    let mut written: Vec<(usize, &'static str, Region)> = Vec::new();
    for (at, (_, layout)) in cache.parts().into_iter().enumerate() {
        let Some(layout) = layout.filter(|layout| !layout.is_empty()) else {
            continue;
        };
        let buffer = match cache.one_buffer {
            true => 0,
            false => at,
        };
        written.push((buffer, labels[at].0, layout.region(sizes[at])));
        let Some(codes) = &cache.codes[at] else {
            continue;
        };
        if let Some(scales) = codes.written_scales(layout) {
            match scales.self_overlap() {
                Overlap::Overlapping => {
                    return Err(Error::SelfOverlap {
                        tensor: [TensorName::K, TensorName::V][at],
                    });
                }
                Overlap::Unknown if !problem.assume_disjoint => {
                    return Err(Error::OverlapUnknown { what: labels[at].1 });
                }
                _ => {}
            }
            if !codes.has_scale_buffer() {
                written.push((buffer, labels[at].1, scales));
            }
        }
    }
    for (at, (buffer, first, a)) in written.iter().enumerate() {
        for (other, second, b) in &written[at + 1..] {
            if buffer == other {
                refuse_overlap((first, a), (second, b), problem.assume_disjoint)?;
            }
        }
    }
    Ok(())
}

fn check_cache_of(
    tensor: &PlannedTensor,
    layout: &CacheLayout,
    problem: &Problem,
) -> Result<(), Error> {
    let [.., heads, head_dim] = tensor.source.shape();
    for (what, left, right) in [
        ("heads must be those of the tensor", heads, layout.heads),
        (
            "head_dim must be that of the tensor",
            head_dim,
            layout.head_dim,
        ),
    ] {
        if left != right {
            return Err(Error::CacheMismatch {
                tensor: tensor.name,
                what,
                left,
                right,
            });
        }
    }
    let at = usize::from(tensor.name == TensorName::V);
    let cache = problem.cache.as_ref();
    let size = cache.map_or(1, |cache| cache.element_sizes(problem.dtype)[at]);
    let codes = cache.and_then(|cache| cache.codes[at]);
    check_cache_layout(tensor.name, layout, size, codes, problem.assume_disjoint)
}

/// A cache is a layout that can be written, of heads that its codes fit.
fn check_cache_layout(
    tensor: TensorName,
    layout: &CacheLayout,
    size: usize,
    codes: Option<StoredCodes>,
    assume_disjoint: bool,
) -> Result<(), Error> {
    layout.check(tensor, size)?;
    if let Some(codes) = codes {
        codes.check(tensor, layout)?;
    }
    if layout.is_empty() {
        return Ok(());
    }
    match layout.region(1).self_overlap() {
        Overlap::Overlapping => Err(Error::SelfOverlap { tensor }),
        Overlap::Unknown if !assume_disjoint => Err(Error::OverlapUnknown {
            what: match tensor {
                TensorName::V => "v's cache",
                _ => "k's cache",
            },
        }),
        _ => Ok(()),
    }
}

/// Elements that a cache's buffer must have: bytes of codes, and of scales between them. `None` past
/// `usize`.
pub(crate) fn cache_len(layout: &CacheLayout, codes: Option<&StoredCodes>) -> Option<usize> {
    let scales = match codes {
        Some(codes) if !codes.has_scale_buffer() => codes.scale_bytes(layout)?,
        _ => 0,
    };
    Some(layout.required_len()?.max(scales))
}

/// The keys of a cache can be written where they are.
pub(crate) fn check_keys(cache: &KvCacheLayout, dtype: Dtype) -> Result<(), Error> {
    if let Some(layout) = &cache.k {
        let [size, _] = cache.element_sizes(dtype);
        check_cache_layout(TensorName::K, layout, size, cache.codes[0], false)?;
    }
    let keys = KvCacheLayout { v: None, ..*cache };
    check_apart_in_cache(&keys, &Problem::new(dtype))
}

/// Each pair has one place to be read from and another to be written to.
fn check_output_pairing(
    angles: &Angles,
    tensors: [&Option<PlannedTensor>; 2],
) -> Result<(), Error> {
    let in_place = |tensor: &&PlannedTensor| tensor.in_place && !tensor.nowhere;
    if let Some(tensor) = tensors.into_iter().flatten().find(in_place) {
        return Err(Error::OutputPairingInPlace {
            tensor: tensor.name,
        });
    }
    match angles {
        Angles::Table(table) if table.out_of_range() == OutOfRange::PassThrough => {
            Err(Error::OutputPairingPassThrough)
        }
        _ => Ok(()),
    }
}

/// What `written` writes is neither read nor written by `other`.
fn check_apart(
    written: &PlannedTensor,
    other: &PlannedTensor,
    rotary_dim: usize,
    problem: &Problem,
) -> Result<(), Error> {
    let assume_disjoint = problem.assume_disjoint;
    if written.source.is_empty() || other.source.is_empty() {
        return Ok(());
    }
    let in_buffer =
        |tensor: &PlannedTensor| problem.sources == Sources::OneBuffer || tensor.in_place;
    if !in_buffer(written) {
        return Ok(());
    }
    let region = written.written(rotary_dim);
    let (label, _) = written.labels();
    let (other_written, other_read) = other.labels();
    if in_buffer(other) {
        refuse_overlap(
            (label, &region),
            (other_written, &other.written(rotary_dim)),
            assume_disjoint,
        )?;
    }
    refuse_overlap(
        (label, &region),
        (other_read, &other.read(rotary_dim)),
        assume_disjoint,
    )
}

fn refuse_overlap(
    (first, a): (&'static str, &Region),
    (second, b): (&'static str, &Region),
    assume_disjoint: bool,
) -> Result<(), Error> {
    match a.overlap(b) {
        Overlap::Overlapping => Err(Error::Overlap { first, second }),
        Overlap::Unknown if !assume_disjoint => {
            let nests = b.self_overlap() == Overlap::Disjoint;
            let what = if nests { first } else { second };
            Err(Error::OverlapUnknown { what })
        }
        _ => Ok(()),
    }
}
