//! A whole step of a layer, as operands: what lies between the projection and the attention.

use crate::cache::SlotsIn;
use crate::plan::{Appended, InOut};
use crate::positions::PositionsIn;
#[cfg(doc)]
use crate::{HostRotator, Problem, Stages, StoredCodes};

mod resolve;

pub(crate) use resolve::{ByteSpan, Resolve, Span, resolve};

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::HostMemory {}
    #[cfg(feature = "cuda")]
    impl Sealed for super::CudaMemory {}
}

/// Where the operands of a step are.
pub trait Memory: sealed::Sealed {
    /// Elements that are read.
    type Read<'a, T: 'a>;
    /// Elements that are read and written.
    type Write<'a, T: 'a>;
    /// Elements that are written.
    type Fill<'a, T: 'a>;
    /// A cache, or room for codes or scales.
    type Bytes<'a>;
    /// The memory of ids.
    type Ids<'a>;
}

/// Operands in host memory.
#[derive(Clone, Copy, Debug)]
pub enum HostMemory {}

/// Operands in device memory, as cudarc's views.
#[cfg(feature = "cuda")]
#[derive(Clone, Copy, Debug)]
pub enum CudaMemory {}

/// What the stages of a tensor need: `[heads, head_dim]` or, but for a bias, `[head_dim]` for all heads.
pub struct StageWeights<'a, T: 'a, M: Memory> {
    pub(crate) bias: Option<M::Read<'a, T>>,
    pub(crate) norm_weight: Option<M::Read<'a, T>>,
    pub(crate) norm_bias: Option<M::Read<'a, T>>,
    pub(crate) given_scales: Option<M::Read<'a, f32>>,
}

impl<T, M: Memory> Default for StageWeights<'_, T, M> {
    fn default() -> Self {
        Self::new()
    }
}

impl<'a, T, M: Memory> StageWeights<'a, T, M> {
    /// None.
    pub fn new() -> Self {
        Self {
            bias: None,
            norm_weight: None,
            norm_bias: None,
            given_scales: None,
        }
    }

    pub(crate) fn has_any(&self) -> bool {
        self.bias.is_some()
            || self.norm_weight.is_some()
            || self.norm_bias.is_some()
            || self.given_scales.is_some()
    }

    /// What is added first, `[heads, head_dim]`; planned with [`Stages::bias`].
    pub fn bias(mut self, bias: impl Into<M::Read<'a, T>>) -> Self {
        self.bias = Some(bias.into());
        self
    }

    /// What normed values are multiplied by: gamma.
    pub fn norm(mut self, weight: impl Into<M::Read<'a, T>>) -> Self {
        self.norm_weight = Some(weight.into());
        self
    }

    /// What is added to them then: beta.
    pub fn norm_bias(mut self, bias: impl Into<M::Read<'a, T>>) -> Self {
        self.norm_bias = Some(bias.into());
        self
    }

    /// The scales of [`StoredCodes::given`]: one for all heads, or one for each.
    pub fn scales(mut self, scales: impl Into<M::Read<'a, f32>>) -> Self {
        self.given_scales = Some(scales.into());
        self
    }
}

/// The caches of a step.
pub(crate) enum Caches<B> {
    None,
    Separate([Option<B>; 2]),
    OneBuffer(B),
}

/// A tensor of a step.
type Tensor<'a, T, M> =
    InOut<<M as Memory>::Read<'a, T>, <M as Memory>::Write<'a, T>, <M as Memory>::Fill<'a, T>>;
/// Keys or values of a step.
type Stored<'a, T, M> =
    Appended<<M as Memory>::Read<'a, T>, <M as Memory>::Write<'a, T>, <M as Memory>::Fill<'a, T>>;

/// The operands of one call that performs all that was planned: [`HostRotator::step`].
///
/// Which of them there are is as in the plan.
///
/// ```
/// # fn main() -> Result<(), phasor::Error> {
/// use phasor::{
///     Dtype, Frequencies, Host, HostStep, HostWeights, Layout, Pairing, Positions, Problem, Rope, Stages, Stored,
/// };
///
/// let rope = Rope::new(Frequencies::from_theta(10_000.0, 64)?, Pairing::HalfSplit);
/// let rotator = Host::new().rotator(&rope);
/// let problem = Problem::new(Dtype::F32).q(Layout::tokens(5, 2, 64)).q_stages(Stages::new().bias());
/// let plan = rotator.plan(&problem)?;
///
/// let (mut q, bias) = (vec![1.0f32; 5 * 2 * 64], vec![0.5f32; 2 * 64]);
/// let step = HostStep::new(Positions::start(0))
///     .q(&mut q[..])
///     .q_weights(HostWeights::new().bias(&bias[..]));
/// assert_eq!(rotator.step(&plan, step)?, Stored::All);
/// assert_eq!(q[0], 1.5); // position 0 turns nothing
/// # Ok(())
/// # }
/// ```
pub struct Step<'a, T: 'a, M: Memory> {
    pub(crate) buffer: Option<M::Write<'a, T>>,
    pub(crate) q: Option<Tensor<'a, T, M>>,
    pub(crate) kv: [Option<Stored<'a, T, M>>; 2],
    pub(crate) q_source: Option<M::Read<'a, T>>,
    pub(crate) q_codes: Option<M::Bytes<'a>>,
    /// Of a packed plan.
    pub(crate) elsewhere: [Option<M::Fill<'a, T>>; 3],
    pub(crate) cache: Caches<M::Bytes<'a>>,
    pub(crate) slots: Option<SlotsIn<M::Ids<'a>>>,
    pub(crate) positions: PositionsIn<M::Ids<'a>>,
    pub(crate) weights: [StageWeights<'a, T, M>; 3],
    pub(crate) scales: [Option<M::Bytes<'a>>; 2],
}

impl<'a, T, M: Memory> Step<'a, T, M> {
    /// A step at these positions.
    pub fn new(positions: PositionsIn<M::Ids<'a>>) -> Self {
        Self {
            buffer: None,
            q: None,
            kv: [None, None],
            q_source: None,
            q_codes: None,
            elsewhere: [None, None, None],
            cache: Caches::None,
            slots: None,
            positions,
            weights: Default::default(),
            scales: [None, None],
        }
    }

    /// The buffer of a plan with [`Problem::one_buffer`] or [`Problem::packed`].
    pub fn buffer(mut self, buffer: impl Into<M::Write<'a, T>>) -> Self {
        self.buffer = Some(buffer.into());
        self
    }

    /// The queries, in place or `(source, destination)`.
    pub fn q(
        mut self,
        q: impl Into<InOut<M::Read<'a, T>, M::Write<'a, T>, M::Fill<'a, T>>>,
    ) -> Self {
        self.q = Some(q.into());
        self
    }

    /// The keys, likewise, or where they are read if they go to their cache only.
    pub fn k(
        mut self,
        k: impl Into<Appended<M::Read<'a, T>, M::Write<'a, T>, M::Fill<'a, T>>>,
    ) -> Self {
        self.kv[0] = Some(k.into());
        self
    }

    /// The values, likewise.
    pub fn v(
        mut self,
        v: impl Into<Appended<M::Read<'a, T>, M::Write<'a, T>, M::Fill<'a, T>>>,
    ) -> Self {
        self.kv[1] = Some(v.into());
        self
    }

    /// The queries of a plan with [`Problem::q_codes`], where they are not in a packed buffer.
    pub fn q_source(mut self, q: impl Into<M::Read<'a, T>>) -> Self {
        self.q_source = Some(q.into());
        self
    }

    /// Where the codes of the queries are written.
    pub fn q_codes(mut self, codes: impl Into<M::Bytes<'a>>) -> Self {
        self.q_codes = Some(codes.into());
        self
    }

    /// Where the queries of a packed plan are written, if that is not in place.
    pub fn q_to(mut self, q: impl Into<M::Fill<'a, T>>) -> Self {
        self.elsewhere[0] = Some(q.into());
        self
    }

    /// Where the keys of a packed plan are written, if that is neither in place nor only in their cache.
    pub fn k_to(mut self, k: impl Into<M::Fill<'a, T>>) -> Self {
        self.elsewhere[1] = Some(k.into());
        self
    }

    /// Where the values of a packed plan are written, likewise.
    pub fn v_to(mut self, v: impl Into<M::Fill<'a, T>>) -> Self {
        self.elsewhere[2] = Some(v.into());
        self
    }

    /// The cache of the keys, of elements or of codes as planned.
    pub fn k_cache(mut self, cache: impl Into<M::Bytes<'a>>) -> Self {
        self.set_cache(0, cache.into());
        self
    }

    /// The cache of the values.
    pub fn v_cache(mut self, cache: impl Into<M::Bytes<'a>>) -> Self {
        self.set_cache(1, cache.into());
        self
    }

    fn set_cache(&mut self, at: usize, cache: M::Bytes<'a>) {
        let mut parts = match std::mem::replace(&mut self.cache, Caches::None) {
            Caches::Separate(parts) => parts,
            _ => [None, None],
        };
        parts[at] = Some(cache);
        self.cache = Caches::Separate(parts);
    }

    /// The one buffer that has both caches.
    pub fn kv_cache(mut self, cache: impl Into<M::Bytes<'a>>) -> Self {
        self.cache = Caches::OneBuffer(cache.into());
        self
    }

    /// Which slot of the caches each token has.
    pub fn slots(mut self, slots: SlotsIn<M::Ids<'a>>) -> Self {
        self.slots = Some(slots);
        self
    }

    /// What the stages of the queries need.
    pub fn q_weights(mut self, weights: StageWeights<'a, T, M>) -> Self {
        self.weights[0] = weights;
        self
    }

    /// What the stages of the keys need.
    pub fn k_weights(mut self, weights: StageWeights<'a, T, M>) -> Self {
        self.weights[1] = weights;
        self
    }

    /// What the stages of the values need.
    pub fn v_weights(mut self, weights: StageWeights<'a, T, M>) -> Self {
        self.weights[2] = weights;
        self
    }

    /// Where the scales of the keys' codes are written ([`StoredCodes::dynamic`]).
    pub fn k_scales(mut self, scales: impl Into<M::Bytes<'a>>) -> Self {
        self.scales[0] = Some(scales.into());
        self
    }

    /// Where the scales of the values' codes are written.
    pub fn v_scales(mut self, scales: impl Into<M::Bytes<'a>>) -> Self {
        self.scales[1] = Some(scales.into());
        self
    }
}
