//! The host backend: a scalar definition, and variants for vector instruction sets that give the
//! same bits.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512bf16;
mod cache;
#[cfg(all(test, unix))]
mod guard_pages;
#[cfg(target_arch = "aarch64")]
mod neon;
mod run;
mod scalar;
mod shift;
mod stages;
mod step;
#[cfg(feature = "rayon")]
mod threads;
mod variants;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod vector;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod vector_stages;

pub use step::{HostBytes, HostStep, HostWeights};

use crate::cache::{Slots, Stored};
use crate::call::{
    Addresses, AngleAddresses, CacheAddresses, RawPositions, StageAddresses, TensorAddresses,
};
use crate::element::Element;
use crate::plan::{Appended, InOut, Plan, PlannedTensor, Problem};
use crate::positions::Positions;
use crate::step::Caches;
use crate::{Angles, Error, Rope};
use std::mem::MaybeUninit;

/// A variant of the host backend. All give the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Isa {
    /// Plain Rust: the definition of every result, and the only variant on processors without a
    /// faster one. Slow where the compiler's target has no fused multiply-add.
    Scalar,
    /// AArch64 with NEON, little endian.
    Neon,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL, beside what AVX2's variant needs.
    Avx512,
    /// x86-64 with AVX-512 BF16, beside what AVX-512's variant needs. Differs for bf16 only.
    Avx512Bf16,
}

impl Isa {
    /// All variants, slowest first.
    pub const ALL: [Isa; 5] = [
        Isa::Scalar,
        Isa::Neon,
        Isa::Avx2,
        Isa::Avx512,
        Isa::Avx512Bf16,
    ];

    /// Whether this processor can run it.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Scalar => true,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => {
                cfg!(target_endian = "little") && std::arch::is_aarch64_feature_detected!("neon")
            }
            #[cfg(not(target_arch = "aarch64"))]
            Isa::Neon => false,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                std::arch::is_x86_feature_detected!("avx2")
                    && std::arch::is_x86_feature_detected!("fma")
                    && std::arch::is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                Isa::Avx2.is_available()
                    && std::arch::is_x86_feature_detected!("avx512f")
                    && std::arch::is_x86_feature_detected!("avx512bw")
                    && std::arch::is_x86_feature_detected!("avx512dq")
                    && std::arch::is_x86_feature_detected!("avx512vl")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => {
                Isa::Avx512.is_available() && std::arch::is_x86_feature_detected!("avx512bf16")
            }
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 | Isa::Avx512 | Isa::Avx512Bf16 => false,
        }
    }

    /// The fastest variant that this processor can run.
    pub fn best() -> Self {
        Self::ALL
            .into_iter()
            .rfind(|isa| isa.is_available())
            .unwrap_or(Isa::Scalar)
    }

    /// `scalar`, `neon`, `avx2`, `avx512` or `avx512bf16`.
    pub const fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Neon => "neon",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Avx512Bf16 => "avx512bf16",
        }
    }
}

/// How many threads a call may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Threads {
    /// The calling thread only.
    One,
    /// The rayon pool that the call runs in (the global one, or the one whose `install` surrounds
    /// the call). The calling thread works too, and never waits for one that has not begun: a busy or
    /// blocked pool delays no call. Calls that others would not make shorter stay on the calling
    /// thread. Without the `rayon` feature this is [`Threads::One`].
    Pool,
}

/// The host backend.
///
/// ```
/// use phasor::{Dtype, Frequencies, Host, InOut, Layout, Pairing, Positions, Problem, Rope};
///
/// # fn main() -> Result<(), phasor::Error> {
/// let rope = Rope::new(Frequencies::from_theta(10_000.0, 4)?, Pairing::Interleaved);
/// let rotator = Host::new().rotator(&rope);
/// let plan = rotator.plan(&Problem::new(Dtype::F32).q(Layout::tokens(1, 1, 4)))?;
///
/// let mut q = [1.0f32, 0.0, 0.0, 1.0];
/// rotator.rotate(&plan, Some(InOut::InPlace(&mut q[..])), None, Positions::start(1))?;
/// // Angles 1 and 10000^(-2/4) = 0.01.
/// for (x, expected) in q.iter().zip([0.5403023, 0.8414710, -0.0099998, 0.9999500]) {
///     assert!((x - expected).abs() < 1e-7);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Host {
    isa: Isa,
    threads: Threads,
}

impl Default for Host {
    fn default() -> Self {
        Self::new()
    }
}

impl Host {
    /// The fastest variant of this processor, with the threads of the current rayon pool.
    pub fn new() -> Self {
        Self {
            isa: Isa::best(),
            threads: Threads::Pool,
        }
    }

    /// Forces a variant.
    ///
    /// # Errors
    /// [`Error::IsaUnavailable`] if this processor cannot run it.
    pub fn with_isa(mut self, isa: Isa) -> Result<Self, Error> {
        if !isa.is_available() {
            return Err(Error::IsaUnavailable { isa: isa.name() });
        }
        self.isa = isa;
        Ok(self)
    }

    /// Chooses how many threads a call may use.
    pub fn with_threads(mut self, threads: Threads) -> Self {
        self.threads = threads;
        self
    }

    /// The variant in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// The threads a call may use.
    pub fn threads(&self) -> Threads {
        self.threads
    }

    /// Prepares a rotation on the host.
    pub fn rotator(&self, rope: &Rope) -> HostRotator {
        HostRotator {
            host: *self,
            rope: rope.clone(),
        }
    }
}

/// A tensor of a call in host memory. Made by `From` a `&mut` slice or vector, which is rotated in place,
/// or a pair `(source, destination)`, whose destination may be uninitialised.
///
/// ```
/// use phasor::{Dtype, Frequencies, Host, Layout, Pairing, Positions, Problem, Rope};
///
/// # fn main() -> Result<(), phasor::Error> {
/// let rope = Rope::new(Frequencies::from_theta(10_000.0, 4)?, Pairing::Interleaved);
/// let rotator = Host::new().rotator(&rope);
/// let layout = Layout::tokens(1, 1, 4);
/// let plan = rotator.plan(&Problem::new(Dtype::F32).q((layout, layout)))?;
///
/// let q = [1.0f32, 0.0, 0.0, 1.0];
/// let mut rotated = Vec::with_capacity(4);
/// let operand = (&q[..], &mut rotated.spare_capacity_mut()[..4]).into();
/// rotator.rotate(&plan, Some(operand), None, Positions::start(1))?;
/// // SAFETY: the layout has all four elements, and all were written.
/// unsafe { rotated.set_len(4) };
/// assert_eq!(rotated[0], 1f32.cos());
/// # Ok(())
/// # }
/// ```
pub type HostInOut<'a, T> = InOut<&'a [T], &'a mut [T], HostDestination<'a, T>>;

/// Host memory that is written, and not read before: initialised or not.
#[derive(Debug)]
pub struct HostDestination<'a, T>(&'a mut [MaybeUninit<T>]);

impl<T> HostDestination<'_, T> {
    /// Elements.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<'a, T: Element> From<&'a mut [T]> for HostDestination<'a, T> {
    fn from(elements: &'a mut [T]) -> Self {
        let first = elements.as_mut_ptr().cast();
        // SAFETY: the same elements, borrowed for as long; only elements are ever written to them.
        Self(unsafe { std::slice::from_raw_parts_mut(first, elements.len()) })
    }
}

impl<'a, T: Element> From<&'a mut [MaybeUninit<T>]> for HostDestination<'a, T> {
    fn from(elements: &'a mut [MaybeUninit<T>]) -> Self {
        Self(elements)
    }
}

impl<'a, T: Element> From<&'a mut Vec<T>> for HostDestination<'a, T> {
    fn from(elements: &'a mut Vec<T>) -> Self {
        elements[..].as_mut().into()
    }
}

impl<'a, T> From<&'a mut [T]> for HostInOut<'a, T> {
    fn from(elements: &'a mut [T]) -> Self {
        InOut::InPlace(elements)
    }
}

impl<'a, T> From<&'a mut Vec<T>> for HostInOut<'a, T> {
    fn from(elements: &'a mut Vec<T>) -> Self {
        InOut::InPlace(elements)
    }
}

/// `(source, destination)`.
impl<'a, T, O: Into<HostDestination<'a, T>>> From<(&'a [T], O)> for HostInOut<'a, T> {
    fn from((source, destination): (&'a [T], O)) -> Self {
        InOut::OutOfPlace {
            source,
            destination: destination.into(),
        }
    }
}

/// Keys or values of a call of [`HostRotator::append`]. Made by `From` a slice, which is written to the
/// cache only, and whatever makes a [`HostInOut`].
pub type HostAppended<'a, T> = Appended<&'a [T], &'a mut [T], HostDestination<'a, T>>;

impl<'a, T> From<&'a [T]> for HostAppended<'a, T> {
    fn from(elements: &'a [T]) -> Self {
        Appended::ToCache(elements)
    }
}

impl<'a, T> From<&'a Vec<T>> for HostAppended<'a, T> {
    fn from(elements: &'a Vec<T>) -> Self {
        Appended::ToCache(elements)
    }
}

impl<'a, T> From<HostInOut<'a, T>> for HostAppended<'a, T> {
    fn from(operand: HostInOut<'a, T>) -> Self {
        Appended::InOut(operand)
    }
}

/// The caches of a call, in host memory.
#[derive(Debug)]
pub enum HostKvCache<'a, T> {
    /// Buffers of their own, as far as they are planned.
    Separate {
        /// The keys'.
        k: Option<&'a mut [T]>,
        /// The values'.
        v: Option<&'a mut [T]>,
    },
    /// One buffer for both.
    OneBuffer(&'a mut [T]),
}

impl<'a, T: Element> From<HostKvCache<'a, T>> for Caches<HostBytes<'a>> {
    fn from(cache: HostKvCache<'a, T>) -> Self {
        match cache {
            HostKvCache::Separate { k: None, v: None } => Caches::None,
            HostKvCache::Separate { k, v } => {
                Caches::Separate([k, v].map(|part| part.map(HostBytes::from)))
            }
            HostKvCache::OneBuffer(both) => Caches::OneBuffer(both.into()),
        }
    }
}

/// One [`Rope`] on the host backend.
///
/// Decoding with packed qkv, each sequence at its own position:
///
/// ```
/// use phasor::half::bf16;
/// use phasor::{
///     Dtype, Frequencies, Host, Layout, Pairing, Positions, Problem, Rope,
/// };
///
/// # fn main() -> Result<(), phasor::Error> {
/// let rope = Rope::new(Frequencies::from_theta(500_000.0, 128)?, Pairing::HalfSplit);
/// let rotator = Host::new().rotator(&rope);
/// // 5 sequences, one new token each; 8 query, 2 key and 2 value heads.
/// let problem = Problem::new(Dtype::Bf16)
///     .q(Layout::packed_heads(5, 1, 12, 128, 0..8))
///     .k(Layout::packed_heads(5, 1, 12, 128, 8..10))
///     .one_buffer();
/// let plan = rotator.plan(&problem)?;
///
/// let mut qkv = vec![bf16::ONE; 5 * 12 * 128];
/// let starts = [17i64, 4096, 3, 131_072, 1_000_000];
/// rotator.rotate_one_buffer(&plan, &mut qkv, Positions::start_per_sequence(&starts))?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct HostRotator {
    host: Host,
    rope: Rope,
}

impl HostRotator {
    /// Checks a problem; the plan serves any number of calls.
    ///
    /// # Errors
    /// Those of [`Plan::new`].
    pub fn plan(&self, problem: &Problem) -> Result<Plan, Error> {
        Plan::new(&self.rope, problem)
    }

    /// The rotation.
    pub fn rope(&self) -> &Rope {
        &self.rope
    }

    /// Rotates q and k, each a buffer of its own. Nothing is written if an error is returned.
    ///
    /// # Errors
    /// [`Error::PlanMismatch`], [`Error::DtypeMismatch`], [`Error::OperandMismatch`],
    /// [`Error::BufferTooShort`], [`Error::BufferHasRoom`], [`Error::PositionsLength`],
    /// [`Error::FrequencyRows`], [`Error::FrequencyRowsLength`],
    /// [`Error::FrequencyRowOutOfRange`], and [`Error::PositionOutOfRange`] for a table that asks for
    /// it.
    pub fn rotate<T: Element>(
        &self,
        plan: &Plan,
        q: Option<HostInOut<'_, T>>,
        k: Option<HostInOut<'_, T>>,
        positions: Positions<'_>,
    ) -> Result<(), Error> {
        self.check(plan, T::DTYPE)?;
        plan.check_rotates_only()?;
        plan.check_operands(&q, Some(&k))?;
        let q = checked_addresses(plan, plan.q.as_ref(), q)?;
        let k = checked_addresses(plan, plan.k.as_ref(), k)?;
        // SAFETY: the plan proved, or its maker vouched, that what is written does not overlap
        // inside a tensor; the borrows keep the buffers apart; their lengths have been checked.
        unsafe { self.execute(plan, [q, k], by_address(&positions)) }
    }

    /// Rotates a plan made with [`Problem::one_buffer`], such as packed qkv in place. Nothing is
    /// written if an error is returned.
    ///
    /// # Errors
    /// Those of [`rotate`](Self::rotate).
    pub fn rotate_one_buffer<T: Element>(
        &self,
        plan: &Plan,
        buffer: &mut [T],
        positions: Positions<'_>,
    ) -> Result<(), Error> {
        self.check(plan, T::DTYPE)?;
        plan.check_rotates_only()?;
        plan.check_one_buffer(buffer.len())?;
        let both = in_place(buffer);
        // SAFETY: the plan proved, or its maker vouched, that no two layouts of the buffer overlap
        // where one of them is written, and the buffer reaches as far as the layouts do.
        unsafe { self.execute(plan, [both, both], by_address(&positions)) }
    }

    /// Rotates at addresses, for engines with an allocator of their own: the same call that
    /// `CudaRotator::rotate_raw` takes, in host memory. The addresses are those of the buffers, whose
    /// provenance is exposed; the layouts' offsets are added to them. `positions` may be made
    /// [`at`](crate::Ids::at) addresses too.
    ///
    /// # Errors
    /// [`Error::PlanMismatch`] and those of [`rotate`](Self::rotate) about positions.
    ///
    /// # Safety
    /// For the call:
    /// - every buffer reaches as far as its layout and is aligned to its element; of a tensor in
    ///   place only `destination` is used;
    /// - the buffers, positions and rows included, do not overlap, except those that the plan was made
    ///   for: windows of one buffer, given by the same address;
    /// - no other thread writes what is read or touches what is written;
    /// - positions and rows hold as many values as they say.
    pub unsafe fn rotate_raw(
        &self,
        plan: &Plan,
        q: TensorAddresses,
        k: TensorAddresses,
        positions: RawPositions,
    ) -> Result<(), Error> {
        self.check(plan, plan.dtype())?;
        plan.check_rotates_only()?;
        // SAFETY: the caller's.
        unsafe { self.execute(plan, [q, k], positions) }
    }

    /// Rotates at addresses as [`rotate_raw`](Self::rotate_raw) does, by a table that each call brings
    /// along: [`AngleAddresses::TableOfCall`], for a rotation whose own table does no more than say how
    /// many pairs there are, and what becomes of positions outside.
    ///
    /// # Errors
    /// Those of [`rotate_raw`](Self::rotate_raw); [`Error::PlanMismatch`] also for angles of another kind
    /// than the rotation's.
    ///
    /// # Safety
    /// That of [`rotate_raw`](Self::rotate_raw), for the angles too.
    pub unsafe fn rotate_raw_by(
        &self,
        plan: &Plan,
        angles: AngleAddresses,
        q: TensorAddresses,
        k: TensorAddresses,
        positions: RawPositions,
    ) -> Result<(), Error> {
        self.check(plan, plan.dtype())?;
        plan.check_rotates_only()?;
        let v = TensorAddresses::default();
        let addresses = Addresses {
            q,
            k,
            v,
            angles,
            positions,
            cache: None,
            stages: Default::default(),
        };
        // SAFETY: the caller's. Of a table that is not known beforehand nothing is assumed.
        unsafe { self.run(plan, &addresses, false) }
    }

    /// Rotates q and k, and stores k and v in their caches: what lies between the projection and the
    /// attention of a layer. Each of q, k and v is a buffer of its own. Nothing is written if an error is
    /// returned.
    ///
    /// Where several tokens of a call have one slot, it holds the last of them.
    ///
    /// ```
    /// use phasor::{
    ///     CacheLayout, Dtype, Frequencies, Host, HostKvCache, KvCacheLayout, Layout, Pairing, Positions,
    ///     Problem, Rope, Slots, Stored,
    /// };
    ///
    /// # fn main() -> Result<(), phasor::Error> {
    /// let rope = Rope::new(Frequencies::from_theta(10_000.0, 64)?, Pairing::HalfSplit);
    /// let rotator = Host::new().rotator(&rope);
    /// // Up to 16 tokens a step, 4 query heads, 2 key and value heads; 10 pages of 16 slots.
    /// let (heads, cache) = (Layout::tokens(16, 2, 64), CacheLayout::paged_nhd(10, 16, 2, 64));
    /// let problem = Problem::new(Dtype::F32)
    ///     .q(Layout::tokens(16, 4, 64))
    ///     .k_to_cache(heads)
    ///     .v_to_cache(heads)
    ///     .cache(KvCacheLayout::separate(cache, cache));
    /// let plan = rotator.plan(&problem)?;
    ///
    /// let mut q = vec![1.0f32; 16 * 4 * 64];
    /// let (k, v) = (vec![1.0f32; 16 * 2 * 64], vec![2.0f32; 16 * 2 * 64]);
    /// let (mut k_cache, mut v_cache) = (vec![0.0f32; 10 * 16 * 2 * 64], vec![0.0f32; 10 * 16 * 2 * 64]);
    /// // A prompt of 7 tokens, and one token of a sequence of 20: in pages 3, and 5 and 8.
    /// let (cu_seqlens, lengths, pages) = ([0, 7, 8], [0, 20], [3, -1, 5, 8]);
    /// let stored = rotator.append(
    ///     &plan,
    ///     Some((&mut q).into()),
    ///     Some((&k).into()),
    ///     Some((&v).into()),
    ///     HostKvCache::Separate { k: Some(&mut k_cache), v: Some(&mut v_cache) },
    ///     Positions::start_per_sequence(&lengths).cu_seqlens(&cu_seqlens),
    ///     Slots::page_table(&pages, &lengths),
    /// )?;
    /// assert_eq!(stored, Stored::All);
    /// assert_eq!(v_cache[(8 * 16 + 4) * 2 * 64], 2.0);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Those of [`rotate`](Self::rotate); [`Error::CacheMissing`], [`Error::AppendMismatch`],
    /// [`Error::SlotsLength`], [`Error::CuSeqlens`].
    #[expect(
        clippy::too_many_arguments,
        reason = "one for each thing that a step has"
    )]
    pub fn append<T: Element>(
        &self,
        plan: &Plan,
        q: Option<HostInOut<'_, T>>,
        k: Option<HostAppended<'_, T>>,
        v: Option<HostAppended<'_, T>>,
        cache: HostKvCache<'_, T>,
        positions: Positions<'_>,
        slots: Slots<'_>,
    ) -> Result<Stored, Error> {
        let mut step = HostStep::new(positions);
        (step.q, step.kv, step.cache) = (q, [k, v], cache.into());
        step.slots = plan.cache.is_some().then_some(slots);
        self.step(plan, step)
    }

    /// The same for a plan made with [`Problem::one_buffer`], such as packed qkv: q is rotated in place, k
    /// and v are read from there. The caches are buffers of their own.
    ///
    /// # Errors
    /// Those of [`append`](Self::append).
    pub fn append_one_buffer<T: Element>(
        &self,
        plan: &Plan,
        buffer: &mut [T],
        cache: HostKvCache<'_, T>,
        positions: Positions<'_>,
        slots: Slots<'_>,
    ) -> Result<Stored, Error> {
        let mut step = HostStep::new(positions).buffer(buffer);
        step.cache = cache.into();
        step.slots = plan.cache.is_some().then_some(slots);
        self.step(plan, step)
    }

    /// Performs at addresses all that was planned, for engines with an allocator of their own. `stages` is
    /// what those of q, k and v need. `cache.report` is the address of a
    /// `u32` that is set to 1 where a slot is outside of the caches, and else not touched: clear it before
    /// the calls that it is to tell of.
    ///
    /// # Errors
    /// [`Error::PlanMismatch`] and those of [`step`](Self::step) about positions, slots and stages.
    ///
    /// # Safety
    /// Those of [`rotate_raw`](Self::rotate_raw), for v, the caches, the slots, the report and what stages
    /// need too.
    pub unsafe fn step_raw(
        &self,
        plan: &Plan,
        tensors: [TensorAddresses; 3],
        cache: Option<CacheAddresses>,
        stages: [StageAddresses; 3],
        positions: RawPositions,
    ) -> Result<(), Error> {
        self.check(plan, plan.dtype())?;
        let addresses = self.addresses(tensors, positions, cache, Some(stages));
        // SAFETY: the caller's.
        unsafe { self.perform(plan, &addresses) }
    }

    fn check(&self, plan: &Plan, given: crate::Dtype) -> Result<(), Error> {
        if !plan.rope.is_same(&self.rope) {
            return Err(Error::PlanMismatch);
        }
        plan.check_dtype(given)
    }

    /// # Safety
    /// That of [`rotate_raw`](Self::rotate_raw).
    unsafe fn execute(
        &self,
        plan: &Plan,
        [q, k]: [TensorAddresses; 2],
        positions: RawPositions,
    ) -> Result<(), Error> {
        let v = TensorAddresses::default();
        let addresses = self.addresses([q, k, v], positions, None, None);
        // SAFETY: the caller's.
        unsafe { self.perform(plan, &addresses) }
    }

    /// These addresses, and those of the rotation's angles.
    #[inline]
    fn addresses(
        &self,
        [q, k, v]: [TensorAddresses; 3],
        positions: RawPositions,
        cache: Option<CacheAddresses>,
        stages: Option<[StageAddresses; 3]>,
    ) -> Addresses {
        Addresses {
            q,
            k,
            v,
            angles: match self.rope.angles() {
                Angles::Exact(frequencies) => of_steps(frequencies.steps(), &[]),
                Angles::Rows(rows) => of_steps(rows.steps(), rows.attention_factors()),
                Angles::Table(table) => AngleAddresses::Table {
                    cos: expose(table.cos().as_ptr()),
                    sin: expose(table.sin().as_ptr()),
                },
            },
            positions,
            cache,
            stages,
        }
    }

    /// # Safety
    /// That of [`step_raw`](Self::step_raw), for the angles too.
    unsafe fn perform(&self, plan: &Plan, addresses: &Addresses) -> Result<(), Error> {
        let table_is_ordinary = match self.rope.angles() {
            Angles::Table(table) => run::is_ordinary(table.magnitudes()),
            _ => false,
        };
        // SAFETY: the caller's.
        unsafe { self.run(plan, addresses, table_is_ordinary) }
    }

    /// # Safety
    /// That of [`append_raw`](Self::append_raw), for the angles too.
    unsafe fn run(
        &self,
        plan: &Plan,
        addresses: &Addresses,
        table_is_ordinary: bool,
    ) -> Result<(), Error> {
        let mut call = plan.unfilled();
        // SAFETY: the caller's.
        unsafe {
            if plan.fill_on_host(addresses, &mut call)? {
                run::execute(self.host, &call, table_is_ordinary);
            }
        }
        Ok(())
    }
}

fn of_steps(steps: &[u64], factors: &[f32]) -> AngleAddresses {
    AngleAddresses::Steps {
        steps: expose(steps.as_ptr()),
        factors: expose(factors.as_ptr()),
    }
}

fn expose<T>(pointer: *const T) -> u64 {
    pointer.expose_provenance() as u64
}

fn by_address(positions: &Positions<'_>) -> RawPositions {
    let address = |ids: &&[u8]| Ok::<_, std::convert::Infallible>(expose(ids.as_ptr()));
    match positions.try_map(address) {
        Ok(positions) => positions,
        Err(never) => match never {},
    }
}

fn in_place<T>(buffer: &mut [T]) -> TensorAddresses {
    let address = buffer.as_mut_ptr().expose_provenance() as u64;
    TensorAddresses {
        source: address,
        destination: address,
    }
}

fn checked_addresses<T>(
    plan: &Plan,
    planned: Option<&PlannedTensor>,
    operand: Option<HostInOut<'_, T>>,
) -> Result<TensorAddresses, Error> {
    let (Some(planned), Some(operand)) = (planned, operand) else {
        return Ok(TensorAddresses::default());
    };
    match operand {
        InOut::InPlace(buffer) => {
            plan.check_lengths(planned, buffer.len(), buffer.len())?;
            Ok(in_place(buffer))
        }
        InOut::OutOfPlace {
            source,
            destination,
        } => {
            plan.check_lengths(planned, source.len(), destination.len())?;
            Ok(TensorAddresses {
                source: expose(source.as_ptr()),
                destination: destination.0.as_mut_ptr().expose_provenance() as u64,
            })
        }
    }
}
