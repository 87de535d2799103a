//! What is asked for: layouts, stages and caches, not yet checked.

#[cfg(doc)]
use crate::Error;
use crate::cache::KvCacheLayout;
use crate::codes::StoredCodes;
use crate::element::Dtype;
use crate::layout::Layout;
use crate::stages::Stages;

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
    pub(super) dtype: Dtype,
    pub(super) q: Option<InOut<Layout>>,
    pub(super) k: Option<InOut<Layout>>,
    pub(super) v: Option<InOut<Layout>>,
    /// Whether keys and values are but stored in their cache.
    pub(super) only_cached: [bool; 2],
    pub(super) cache: Option<KvCacheLayout>,
    /// Of q, k and v.
    pub(super) stages: [Stages; 3],
    pub(super) q_codes: Option<StoredCodes>,
    pub(super) sources: Sources,
    pub(super) longer_buffers: bool,
    pub(super) assume_disjoint: bool,
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
pub(super) enum Sources {
    /// None.
    Apart,
    /// All of them.
    OneBuffer,
    /// All that are read.
    Packed,
}
