//! Operands of a step in host memory, checked and turned into addresses.

use super::{HostDestination, HostRotator, expose};
use crate::Error;
use crate::cache::Stored;
use crate::call::{RawPositions, TensorAddresses};
use crate::element::{Dtype, Element};
use crate::plan::Plan;
use crate::step::{ByteSpan, HostMemory, Memory, Resolve, Span, StageWeights, Step, resolve};
use std::marker::PhantomData;
use std::sync::atomic::AtomicU32;

impl Memory for HostMemory {
    type Read<'a, T: 'a> = &'a [T];
    type Write<'a, T: 'a> = &'a mut [T];
    type Fill<'a, T: 'a> = HostDestination<'a, T>;
    type Bytes<'a> = HostBytes<'a>;
    type Ids<'a> = &'a [u8];
}

/// The operands of [`HostRotator::step`].
pub type HostStep<'a, T> = Step<'a, T, HostMemory>;

/// What the stages of a tensor need, in host memory.
pub type HostWeights<'a, T> = StageWeights<'a, T, HostMemory>;

/// A cache, or room for codes or scales: elements, 8-bit codes, f32 scales, or bytes that may be any of
/// these. Made by `From` mutable slices and vectors.
#[derive(Debug)]
pub struct HostBytes<'a> {
    pub(super) span: ByteSpan,
    borrowed: PhantomData<&'a mut [u8]>,
}

impl<'a> HostBytes<'a> {
    fn new<T>(values: &'a mut [T], dtype: Option<Dtype>) -> Self {
        Self {
            span: ByteSpan {
                address: values.as_mut_ptr().expose_provenance() as u64,
                len: values.len(),
                size: size_of::<T>(),
                dtype,
            },
            borrowed: PhantomData,
        }
    }
}

impl<'a, T: Element> From<&'a mut [T]> for HostBytes<'a> {
    fn from(elements: &'a mut [T]) -> Self {
        Self::new(elements, Some(T::DTYPE))
    }
}

impl<'a> From<&'a mut [u8]> for HostBytes<'a> {
    fn from(bytes: &'a mut [u8]) -> Self {
        Self::new(bytes, None)
    }
}

impl<'a> From<&'a mut [i8]> for HostBytes<'a> {
    fn from(bytes: &'a mut [i8]) -> Self {
        Self::new(bytes, None)
    }
}

impl<'a, T> From<&'a mut Vec<T>> for HostBytes<'a>
where
    HostBytes<'a>: From<&'a mut [T]>,
{
    fn from(values: &'a mut Vec<T>) -> Self {
        values.as_mut_slice().into()
    }
}

impl HostRotator {
    /// Performs all that was planned: biases, norms, rotation, scales and codes of q, k and v, and stores
    /// k and v in their caches. Nothing is written if an error is returned.
    ///
    /// Where several tokens of a call have one slot, it holds the last of them.
    ///
    /// ```
    /// use phasor::norm::HeadNorm;
    /// use phasor::quantize::{Codes, ScaleForm};
    /// use phasor::{
    ///     CacheLayout, Dtype, Frequencies, Host, HostStep, HostWeights, KvCacheLayout, Layout, Pairing,
    ///     Positions, Problem, Rope, Slots, Stages, Stored, StoredCodes,
    /// };
    ///
    /// # fn main() -> Result<(), phasor::Error> {
    /// let rope = Rope::new(Frequencies::from_theta(10_000.0, 64)?, Pairing::HalfSplit);
    /// let rotator = Host::new().rotator(&rope);
    /// // Packed qkv of 4, 2 and 2 heads; norms of q and k; a cache of e4m3.
    /// let window = |range| Layout::packed_heads(1, 16, 8, 64, range);
    /// let norm = Stages::new().norm(HeadNorm::rms(1e-6));
    /// let cache = CacheLayout::paged_nhd(10, 16, 2, 64);
    /// let codes = StoredCodes::given(Codes::E4m3, ScaleForm::Divide);
    /// let problem = Problem::new(Dtype::F32)
    ///     .q(window(0..4))
    ///     .k_to_cache(window(4..6))
    ///     .v_to_cache(window(6..8))
    ///     .packed()
    ///     .q_stages(norm)
    ///     .k_stages(norm)
    ///     .cache(KvCacheLayout::separate(cache, cache).with_codes(codes));
    /// let plan = rotator.plan(&problem)?;
    ///
    /// let mut qkv = vec![1.0f32; 16 * 8 * 64];
    /// let (mut k_cache, mut v_cache) = (vec![0u8; 10 * 16 * 2 * 64], vec![0u8; 10 * 16 * 2 * 64]);
    /// let (q_norm, k_norm) = ([1.0f32; 64], [0.5f32; 64]);
    /// let (cu_seqlens, lengths, pages) = ([0, 7, 8], [0, 20], [3, -1, 5, 8]);
    /// let step = HostStep::new(Positions::start_per_sequence(&lengths).cu_seqlens(&cu_seqlens))
    ///     .buffer(&mut qkv[..])
    ///     .q_weights(HostWeights::new().norm(&q_norm[..]))
    ///     .k_weights(HostWeights::new().norm(&k_norm[..]).scales(&[0.25][..]))
    ///     .v_weights(HostWeights::new().scales(&[0.5][..]))
    ///     .k_cache(&mut k_cache)
    ///     .v_cache(&mut v_cache)
    ///     .slots(Slots::page_table(&pages, &lengths));
    /// assert_eq!(rotator.step(&plan, step)?, Stored::All);
    /// assert_eq!(v_cache[(8 * 16 + 4) * 2 * 64], 0x40); // 1.0 / 0.5
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Those of [`append`](Self::append), [`Error::Stages`], [`Error::StageLength`],
    /// [`Error::BufferType`] and [`Error::BufferUnaligned`].
    pub fn step<T: Element>(
        &self,
        plan: &Plan,
        mut step: HostStep<'_, T>,
    ) -> Result<Stored, Error> {
        self.check(plan, T::DTYPE)?;
        let report = AtomicU32::new(0);
        let told = Some(expose(&raw const report));
        let none = [TensorAddresses::default(); 3];
        let mut addresses = self.addresses(none, RawPositions::start(0), None, None);
        resolve(plan, &mut step, told, &mut InHost, &mut addresses)?;
        // SAFETY: the plan proved, or its maker vouched, that what is written does not overlap; the
        // borrows keep the buffers apart; their lengths have been checked.
        unsafe { self.perform(plan, &addresses)? };
        Ok(match report.into_inner() {
            0 => Stored::All,
            _ => Stored::NotAll,
        })
    }
}

/// Where operands in host memory are.
pub(super) struct InHost;

fn span<T>(address: *const T, len: usize) -> Result<Span, Error> {
    Ok(Span {
        address: expose(address),
        len,
    })
}

impl<'g, T> Resolve<'g, T, HostMemory> for InHost {
    fn read<U>(&mut self, view: &'g &[U]) -> Result<Span, Error> {
        span(view.as_ptr(), view.len())
    }

    fn write(&mut self, view: &'g mut &mut [T]) -> Result<Span, Error> {
        span(view.as_mut_ptr(), view.len())
    }

    fn fill(&mut self, view: &'g mut HostDestination<'_, T>) -> Result<Span, Error> {
        span(view.0.as_mut_ptr(), view.0.len())
    }

    fn bytes(&mut self, view: &'g mut HostBytes<'_>) -> Result<ByteSpan, Error> {
        Ok(view.span)
    }

    fn ids(&mut self, ids: &'g &[u8]) -> Result<u64, Error> {
        Ok(expose(ids.as_ptr()))
    }
}
