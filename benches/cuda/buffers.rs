//! What calls read in device memory, often enough that a round through all of it does not fit into L2.

use super::Failure;
use phasor::DeviceElement;
use phasor::cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut};
use std::ops::Range;
use std::sync::Arc;

pub struct Buffers<T> {
    /// q and k (or q, k and v) of a call, then those of the next, and so on.
    pairs: CudaSlice<T>,
    /// Where each of these can be copied to.
    copies: CudaSlice<T>,
    /// Elements of a call.
    length: usize,
}

/// Elements that the host makes; the device copies them until all are filled.
const PATTERN: usize = 1 << 16;

impl<T: DeviceElement> Buffers<T> {
    pub fn new(stream: &Arc<CudaStream>, length: usize, count: usize) -> Result<Self, Failure> {
        let all = count * length;
        let pattern: Vec<_> = (0..PATTERN.min(all))
            .map(|i| T::narrow((i % 251) as f32 / 251.0))
            .collect();
        // SAFETY: the copies below write all of both before anything reads them.
        let (mut pairs, mut copies) = unsafe { (stream.alloc(all)?, stream.alloc(all)?) };
        let mut filled = pattern.len();
        stream.memcpy_htod(&pattern, &mut pairs.slice_mut(..filled))?;
        while filled < all {
            let more = filled.min(all - filled);
            let (from, mut to) = pairs.split_at_mut(filled);
            stream.memcpy_dtod(&from.slice(..more), &mut to.slice_mut(..more))?;
            filled += more;
        }
        stream.memcpy_dtod(&pairs, &mut copies)?;
        Ok(Self {
            pairs,
            copies,
            length,
        })
    }

    fn range(&self, number: usize) -> Range<usize> {
        number * self.length..(number + 1) * self.length
    }

    /// Those of a call as they lie, one after the other.
    pub fn pair(&mut self, number: usize) -> CudaViewMut<'_, T> {
        let range = self.range(number);
        self.pairs.slice_mut(range)
    }

    /// The same to read, and where to copy it.
    pub fn copy(&mut self, number: usize) -> (CudaView<'_, T>, CudaViewMut<'_, T>) {
        self.copy_to(number, self.length)
    }

    /// The same to read, and where to write so many elements.
    pub fn copy_to(
        &mut self,
        number: usize,
        written: usize,
    ) -> (CudaView<'_, T>, CudaViewMut<'_, T>) {
        let range = self.range(number);
        let to = range.start..range.start + written;
        (self.pairs.slice(range), self.copies.slice_mut(to))
    }
}
