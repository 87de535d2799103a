//! A plan: everything about a call that can be checked before there is memory to work on.

use crate::cache::{CacheLayout, KvCacheLayout};
use crate::call::{self, PhasorCall};
use crate::element::Dtype;
use crate::error::TensorName;
use crate::layout::{Layout, Overlap, Region};
use crate::{Angles, Error, OutOfRange, Rope};

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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Problem {
    dtype: Dtype,
    q: Option<InOut<Layout>>,
    k: Option<InOut<Layout>>,
    v: Option<InOut<Layout>>,
    /// Whether keys and values are but stored in their cache.
    only_cached: [bool; 2],
    cache: Option<KvCacheLayout>,
    one_buffer: bool,
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
            one_buffer: false,
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

    /// The values: a pair `(source, destination)`. They do not rotate: they are copied, and stored in their
    /// cache if they have one.
    pub fn v(mut self, source: Layout, destination: Layout) -> Self {
        self.v = Some((source, destination).into());
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

    /// All layouts are windows of one buffer, such as packed qkv. Overlap is then checked across
    /// tensors too. Otherwise every source and destination is a buffer of its own.
    pub const fn one_buffer(mut self) -> Self {
        self.one_buffer = true;
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

/// A tensor of a plan, its layouts checked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PlannedTensor {
    pub(crate) name: TensorName,
    pub(crate) source: Layout,
    pub(crate) destination: Layout,
    pub(crate) in_place: bool,
    /// Written to a cache only.
    pub(crate) nowhere: bool,
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
        } else if self.in_place {
            self.destination
                .region(self.destination.rotary_offset, rotary_dim)
        } else {
            self.destination.region(0, self.destination.head_dim)
        }
    }

    fn read(&self, rotary_dim: usize) -> Region {
        if self.in_place && !self.nowhere {
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
    one_buffer: bool,
    longer_buffers: bool,
    pub(crate) batch: usize,
    pub(crate) tokens: usize,
    /// What is known of its calls.
    pub(crate) template: PhasorCall,
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
        let mut k = checked(TensorName::K, &problem.k)?;
        let mut v = checked(TensorName::V, &problem.v)?;
        let Some(first) = q.or(k) else {
            return Err(Error::NothingToRotate);
        };
        for (tensor, nowhere) in [&mut k, &mut v].into_iter().zip(problem.only_cached) {
            if let Some(tensor) = tensor {
                tensor.nowhere = nowhere;
            }
        }
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
            one_buffer: problem.one_buffer,
            longer_buffers: problem.longer_buffers,
            batch,
            tokens,
            template: call::template(
                rope,
                problem.dtype,
                [&q, &k, &v],
                problem.cache.as_ref(),
                [batch, tokens],
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
                let dims = if tensor.in_place && !tensor.nowhere {
                    self.rope.rotary_dim()
                } else {
                    head_dim
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
        if self.v.is_some() || self.cache.is_some() {
            return Err(Error::AppendMismatch {
                planned: "has values or a cache",
                remedy: "call append",
            });
        }
        Ok(())
    }

    /// The caches reach as far as their layouts do: buffers of keys and of values, or one for both.
    pub(crate) fn check_cache_lengths(&self, lengths: [Option<usize>; 2]) -> Result<(), Error> {
        let none = KvCacheLayout {
            k: None,
            v: None,
            one_buffer: false,
        };
        let cache = self.cache.as_ref().unwrap_or(&none);
        for ((name, layout), got) in cache.parts().into_iter().zip(lengths) {
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
            let needed = layout.required_len().unwrap_or(usize::MAX);
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

    /// The plan is over one buffer, which reaches as far as its layouts do and, unless that is meant, has
    /// no room for another token or sequence.
    pub(crate) fn check_one_buffer(&self, len: usize) -> Result<(), Error> {
        if !self.one_buffer {
            return Err(Error::OneBufferMismatch {
                planned: "separate buffers",
                remedy: "call rotate, or plan with Problem::one_buffer",
            });
        }
        let mut furthest = None;
        for side in self.tensors().flat_map(PlannedTensor::sides) {
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
        for ((what, reach), len) in tensor.sides().into_iter().zip([source, destination]) {
            reach.check(what, len)?;
            if !self.longer_buffers {
                reach.check_room(what, len)?;
            }
        }
        Ok(())
    }

    /// Checks the forms of the operands of a call against the plan's: of the keys, if they are given.
    pub(crate) fn check_operands<S, D, O>(
        &self,
        q: &Option<InOut<S, D, O>>,
        k: Option<&Option<InOut<S, D, O>>>,
    ) -> Result<(), Error> {
        if self.one_buffer {
            return Err(Error::OneBufferMismatch {
                planned: "one buffer",
                remedy: "call rotate_one_buffer or append_one_buffer",
            });
        }
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

    /// The same for a call that appends.
    pub(crate) fn check_append_operands<S, D, O>(
        &self,
        q: &Option<InOut<S, D, O>>,
        kv: [&Option<Appended<S, D, O>>; 2],
    ) -> Result<(), Error> {
        self.check_operands(q, None)?;
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
    let tensor = PlannedTensor {
        name,
        source,
        destination,
        in_place,
        nowhere: false,
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
    if problem.one_buffer && !in_place {
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
    if problem.one_buffer {
        check_apart(a, b, rotary_dim, problem.assume_disjoint)?;
        check_apart(b, a, rotary_dim, problem.assume_disjoint)?;
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
        if cache.is_some_and(|cache| cache.one_buffer) && !k.is_empty() && !v.is_empty() {
            refuse_overlap(
                ("k's cache", &k.region()),
                ("v's cache", &v.region()),
                problem.assume_disjoint,
            )?;
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
    layout.check(tensor.name, problem.dtype.size())?;
    if layout.is_empty() {
        return Ok(());
    }
    match layout.region().self_overlap() {
        Overlap::Overlapping => Err(Error::SelfOverlap {
            tensor: tensor.name,
        }),
        Overlap::Unknown if !problem.assume_disjoint => Err(Error::OverlapUnknown {
            what: match tensor.name {
                TensorName::V => "v's cache",
                _ => "k's cache",
            },
        }),
        _ => Ok(()),
    }
}

/// Each pair has one place to be read from and another to be written to.
fn check_output_pairing(
    angles: &Angles,
    tensors: [&Option<PlannedTensor>; 2],
) -> Result<(), Error> {
    if let Some(tensor) = tensors.into_iter().flatten().find(|tensor| tensor.in_place) {
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
    assume_disjoint: bool,
) -> Result<(), Error> {
    if written.source.is_empty() || other.source.is_empty() {
        return Ok(());
    }
    let region = written.written(rotary_dim);
    let (label, _) = written.labels();
    let (other_written, other_read) = other.labels();
    refuse_overlap(
        (label, &region),
        (other_written, &other.written(rotary_dim)),
        assume_disjoint,
    )?;
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
