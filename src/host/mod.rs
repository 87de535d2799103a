//! The host backend: a scalar definition, and variants for vector instruction sets that give the
//! same bits.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512bf16;
mod cache;
#[cfg(target_arch = "aarch64")]
mod neon;
mod run;
mod scalar;
mod variants;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod vector;

use crate::element::Element;
use crate::plan::{InOut, Plan, PlannedTensor, PositionMemory, Problem};
use crate::positions::Positions;
use crate::{Error, Rope};
pub(crate) use variants::VectorElement;

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
    /// the call). Small calls stay on the calling thread. Without the `rayon` feature this is
    /// [`Threads::One`].
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

/// A tensor of a call in host memory.
pub type HostInOut<'a, T> = InOut<&'a [T], &'a mut [T]>;

/// One [`Rope`] on the host backend.
///
/// Decoding with packed qkv, each batch row at its own position:
///
/// ```
/// use phasor::half::bf16;
/// use phasor::{
///     Dtype, Frequencies, Host, Layout, Pairing, PositionKind, Positions, Problem, Rope,
/// };
///
/// # fn main() -> Result<(), phasor::Error> {
/// let rope = Rope::new(Frequencies::from_theta(500_000.0, 128)?, Pairing::HalfSplit);
/// let rotator = Host::new().rotator(&rope);
/// // 5 sequences, one new token each; 8 query, 2 key and 2 value heads.
/// let problem = Problem::new(Dtype::Bf16)
///     .q(Layout::packed_heads(5, 1, 12, 128, 0..8))
///     .k(Layout::packed_heads(5, 1, 12, 128, 8..10))
///     .one_buffer()
///     .positions(PositionKind::StartPerRow);
/// let plan = rotator.plan(&problem)?;
///
/// let mut qkv = vec![bf16::ONE; 5 * 12 * 128];
/// let starts = [17i64, 4096, 3, 131_072, 1_000_000];
/// rotator.rotate_one_buffer(&plan, &mut qkv, Positions::start_per_row(&starts))?;
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
        Plan::new(&self.rope, problem, PositionMemory::Host)
    }

    /// The rotation.
    pub fn rope(&self) -> &Rope {
        &self.rope
    }

    /// Rotates q and k, each a buffer of its own. Nothing is written if an error is returned.
    ///
    /// # Errors
    /// [`Error::PlanMismatch`], [`Error::DtypeMismatch`], [`Error::OperandMismatch`],
    /// [`Error::BufferTooShort`], [`Error::PositionKindMismatch`], [`Error::PositionsLength`],
    /// [`Error::FrequencyRowMismatch`], [`Error::FrequencyRowsLength`],
    /// [`Error::FrequencyRowOutOfRange`], and [`Error::PositionOutOfRange`] for a table that asks for
    /// it.
    pub fn rotate<T: Element>(
        &self,
        plan: &Plan,
        q: Option<HostInOut<'_, T>>,
        k: Option<HostInOut<'_, T>>,
        positions: Positions<'_>,
    ) -> Result<(), Error> {
        self.check(plan, T::DTYPE, &positions)?;
        plan.check_operands(&q, &k)?;
        let q = checked_pointers(plan.q.as_ref(), q)?;
        let k = checked_pointers(plan.k.as_ref(), k)?;
        // SAFETY: the plan proved, or its maker vouched, that what is written does not overlap
        // inside a tensor; the borrows keep the buffers apart; their lengths have been checked.
        unsafe { run::execute(self.host, plan, [q, k], &positions) };
        Ok(())
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
        self.check(plan, T::DTYPE, &positions)?;
        plan.check_one_buffer(buffer.len())?;
        let destination = buffer.as_mut_ptr();
        let pointers = Pointers {
            source: destination.cast_const(),
            destination,
        };
        // SAFETY: the plan proved, or its maker vouched, that no two layouts of the buffer overlap
        // where one of them is written, and the buffer reaches as far as the layouts do.
        unsafe { run::execute(self.host, plan, [pointers; 2], &positions) };
        Ok(())
    }

    fn check(
        &self,
        plan: &Plan,
        given: crate::Dtype,
        positions: &Positions<'_>,
    ) -> Result<(), Error> {
        if !plan.rope.is_same(&self.rope) {
            return Err(Error::PlanMismatch);
        }
        plan.check_dtype(given)?;
        plan.check_positions(positions)
    }
}

/// The start of the buffers of one tensor.
#[derive(Clone, Copy)]
pub(crate) struct Pointers<T> {
    source: *const T,
    destination: *mut T,
}

fn checked_pointers<T>(
    planned: Option<&PlannedTensor>,
    operand: Option<HostInOut<'_, T>>,
) -> Result<Pointers<T>, Error> {
    let mut pointers = Pointers {
        source: std::ptr::null(),
        destination: std::ptr::null_mut(),
    };
    if let (Some(planned), Some(operand)) = (planned, operand) {
        match operand {
            InOut::InPlace(buffer) => {
                planned.check_lengths(buffer.len(), buffer.len())?;
                pointers.destination = buffer.as_mut_ptr();
                pointers.source = pointers.destination.cast_const();
            }
            InOut::OutOfPlace {
                source,
                destination,
            } => {
                planned.check_lengths(source.len(), destination.len())?;
                pointers.source = source.as_ptr();
                pointers.destination = destination.as_mut_ptr();
            }
        }
    }
    Ok(pointers)
}
