//! What is measured, and how often: decided without a GPU.

use super::results::Memory;
use ::phasor::Dtype;
use std::time::Duration;

pub const HEAD_DIM: usize = 128;
/// Of one replay: so long that what the events add to it does not show.
const REPLAY_US: usize = 4_000;
/// A graph of more takes longer to build than to replay.
const MOST_CALLS: usize = 4096;
const FEWEST_CALLS: usize = 8;
/// All samples of one measurement together, unless there are too few by then, or enough before.
const SAMPLING: Duration = Duration::from_millis(30);
const FEWEST_SAMPLES: usize = 5;
const MOST_SAMPLES: usize = 15;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub q_heads: usize,
    pub k_heads: usize,
}

/// Llama-3-8B.
pub const LLAMA: Shape = Shape {
    q_heads: 32,
    k_heads: 8,
};
/// What one of several GPUs has of a model.
pub const SHARE: Shape = Shape {
    q_heads: 8,
    k_heads: 1,
};

impl Shape {
    pub fn name(self) -> String {
        format!("{}+{} heads of {HEAD_DIM}", self.q_heads, self.k_heads)
    }

    /// Elements of q and of k.
    pub fn lengths(self, tokens: usize) -> [usize; 2] {
        [self.q_heads, self.k_heads].map(|heads| tokens * heads * HEAD_DIM)
    }
}

/// What is measured one after the other on the same buffers.
#[derive(Clone, Copy, Debug)]
pub struct Group {
    pub shape: Shape,
    pub dtype: Dtype,
    pub tokens: usize,
}

impl Group {
    pub fn name(self) -> String {
        let (shape, dtype, tokens) = (self.shape.name(), self.dtype, self.tokens);
        format!("{shape}, {dtype}, tokens: {tokens}")
    }

    /// Elements of q and k.
    pub fn length(self) -> usize {
        self.shape.lengths(self.tokens).iter().sum()
    }

    /// Their bytes.
    pub fn bytes(self) -> usize {
        self.length() * self.dtype.size()
    }

    /// What fits into L2 even of small GPUs is measured there too.
    pub fn memories(self) -> &'static [Memory] {
        match self.tokens {
            ..=256 => &[Memory::Cold, Memory::L2],
            _ => &[Memory::Cold],
        }
    }

    /// f16 moves the bytes of bf16.
    pub fn has_limits(self) -> bool {
        self.dtype != Dtype::F16
    }

    /// Whether calls are also measured on a stream, and on several axes.
    pub fn is_usual(&self) -> bool {
        self.shape == LLAMA && self.dtype == Dtype::Bf16
    }

    /// Whether the buffers are still in L2 when the next kernel comes.
    pub fn has_chain(self) -> bool {
        self.is_usual() && self.tokens <= 2048
    }
}

/// All groups of rotations, those first that say most.
pub fn groups() -> Vec<Group> {
    let all = [1, 32, 256, 2048, 8192, 32_768];
    let mut groups = Vec::new();
    for (shape, dtype, sizes) in [
        (LLAMA, Dtype::Bf16, &all[..]),
        (LLAMA, Dtype::F32, &all[..]),
        (LLAMA, Dtype::F16, &all[..]),
        (SHARE, Dtype::Bf16, &[1, 256, 8192]),
    ] {
        groups.extend(sizes.iter().map(|&tokens| Group {
            shape,
            dtype,
            tokens,
        }));
    }
    groups
}

/// Buffers of so many bytes that are cold when their turn comes again: together many times L2, whose
/// replacement need not be by age. Small ones are fewer, and have one turn a replay.
pub fn cold_buffers(bytes: usize, l2: usize) -> usize {
    (8 * l2).div_ceil(bytes).clamp(2, MOST_CALLS)
}

/// Calls in a graph: whole rounds through the buffers.
pub fn calls(bytes: usize, buffers: usize) -> usize {
    // As many read as written, at 3 TB/s, and 1 µs for the launch.
    let expected_us = 1 + 2 * bytes / 3_000_000;
    (REPLAY_US / expected_us)
        .clamp(FEWEST_CALLS, MOST_CALLS)
        .next_multiple_of(buffers)
}

/// Whether no more samples are needed.
pub fn is_enough(samples: usize, elapsed: Duration) -> bool {
    samples >= MOST_SAMPLES || samples >= FEWEST_SAMPLES && elapsed >= SAMPLING
}

/// Of samples, which are sorted for it; there is one at least.
pub fn median(samples: &mut [f64]) -> f64 {
    samples.sort_by(f64::total_cmp);
    let middle = samples.len() / 2;
    match samples.len() % 2 {
        1 => samples[middle],
        _ => (samples[middle - 1] + samples[middle]) / 2.0,
    }
}
