//! What several tests share.
#![allow(dead_code)] // Each test uses a part of it.

use phasor_attention::phasor::Element;

/// Numbers that depend on a seed only (SplitMix64).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From -`most` to `most`.
    pub fn values(&mut self, len: usize, most: f32) -> Vec<f32> {
        (0..len)
            .map(|_| ((self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0) * most)
            .collect()
    }

    pub fn permutation(&mut self, len: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..len).collect();
        for at in (1..len).rev() {
            order.swap(at, self.bits() as usize % (at + 1));
        }
        order
    }
}

pub fn narrowed<T: Element>(values: &[f32]) -> Vec<T> {
    values.iter().map(|&x| T::narrow(x)).collect()
}

pub fn widened<T: Element>(values: &[T]) -> Vec<f32> {
    values.iter().map(|x| x.widen()).collect()
}
