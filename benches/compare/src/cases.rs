//! What is measured, and how: problems, samples and the rings of buffers they work on.

use crate::Failure;
use crate::report::Machine;
use phasor::half::{bf16, f16};
use phasor::{Dtype, Element, Pairing};
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

pub const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];
pub const PAIRINGS: [Pairing; 2] = [Pairing::HalfSplit, Pairing::Interleaved];
pub const THETA: f64 = 500_000.0;
const LINE: usize = 64;

/// Shape of q and k, and where they lie.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Case {
    pub name: String,
    /// More than one: sequences of one token each, at differing positions.
    pub sequences: usize,
    pub tokens: usize,
    pub q_heads: usize,
    pub k_heads: usize,
    pub head_dim: usize,
    pub rotary_dim: usize,
    pub in_place: bool,
    pub cold: bool,
}

impl Case {
    /// Tokens of Llama-3-8B's heads, in place and cold.
    pub fn llama(name: &str, tokens: usize) -> Self {
        Self {
            name: name.to_owned(),
            sequences: 1,
            tokens,
            q_heads: 32,
            k_heads: 8,
            head_dim: 128,
            rotary_dim: 128,
            in_place: true,
            cold: true,
        }
    }

    pub fn heads(mut self, q_heads: usize, k_heads: usize, head_dim: usize) -> Self {
        (self.q_heads, self.k_heads) = (q_heads, k_heads);
        (self.head_dim, self.rotary_dim) = (head_dim, head_dim);
        self
    }

    fn rotary(mut self, rotary_dim: usize) -> Self {
        self.rotary_dim = rotary_dim;
        self
    }

    fn out_of_place(mut self) -> Self {
        self.in_place = false;
        self
    }

    fn resident(mut self) -> Self {
        self.cold = false;
        self
    }

    fn decode(name: &str, sequences: usize) -> Self {
        Self {
            sequences,
            ..Self::llama(name, 1)
        }
    }

    pub fn q_len(&self) -> usize {
        self.sequences * self.tokens * self.q_heads * self.head_dim
    }

    pub fn k_len(&self) -> usize {
        self.sequences * self.tokens * self.k_heads * self.head_dim
    }

    /// One position for each sequence of a decode step, else the first position of the tokens.
    pub fn positions(&self) -> Vec<i64> {
        match self.sequences {
            1 => vec![1000],
            n => (0..n as i64).map(|i| i * 7919 % 8192).collect(),
        }
    }

    /// The memory that must be read and written.
    pub fn footprint(&self, dtype: Dtype) -> Footprint {
        let heads = self.sequences * self.tokens * (self.q_heads + self.k_heads);
        let head = self.head_dim * dtype.size();
        let touched = match self.in_place {
            true => self.rotary_dim * dtype.size(),
            false => head,
        };
        if touched < head && head.is_multiple_of(LINE) {
            Footprint {
                run: touched.div_ceil(LINE),
                stride: head / LINE,
                runs: heads,
            }
        } else {
            let lines = (heads * touched).div_ceil(LINE);
            Footprint {
                run: lines,
                stride: lines,
                runs: 1,
            }
        }
    }
}

/// Runs of cache lines: what rotated dims occupy if only they are touched. One run if that is all.
#[derive(Clone, Copy, Debug)]
pub struct Footprint {
    pub run: usize,
    pub stride: usize,
    pub runs: usize,
}

impl Footprint {
    /// Bytes read and bytes written, together.
    pub fn bytes(&self) -> usize {
        2 * self.runs * self.run * LINE
    }

    pub fn is_contiguous(&self) -> bool {
        self.runs == 1
    }
}

/// The table of cases.
pub fn all(quick: bool) -> Vec<Case> {
    let prefill = if quick { 64 } else { 2048 };
    let some = if quick { 16 } else { 128 };
    let name = |what: &str| format!("{what}, {prefill} tokens");
    let neox = || {
        Case::llama(&name("partial rotary 24 of 96"), prefill)
            .heads(64, 64, 96)
            .rotary(24)
    };
    let mut cases = vec![
        Case::llama(&name("prefill"), prefill),
        Case::llama(&name("prefill"), prefill).out_of_place(),
        Case::llama(&format!("{some} tokens"), some).resident(),
        Case::llama(&format!("{some} tokens"), some)
            .resident()
            .out_of_place(),
        Case::decode("decode, 1 sequence", 1).resident(),
        Case::decode("decode, 32 sequences", 32),
        Case::decode("decode, 256 sequences", 256),
        neox(),
        neox().out_of_place(),
        Case::llama(&name("head_dim 96"), prefill).heads(32, 32, 96),
        Case::llama(&name("head_dim 80"), prefill).heads(32, 32, 80),
        Case::llama(&name("head_dim 256"), prefill).heads(16, 8, 256),
    ];
    for case in &mut cases {
        let place = if case.in_place { "in" } else { "out of" };
        let memory = if case.cold { "cold" } else { "cache-resident" };
        case.name = format!("{}, {place} place, {memory}", case.name);
    }
    cases
}

/// How much is sampled.
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    pub samples: usize,
    /// A contender that has spent this much takes no more samples than [`FEWEST`](Self::FEWEST).
    pub budget: Duration,
    /// A sample repeats calls up to about this long, so that the clock's resolution does not show.
    pub sample: Duration,
    /// Bytes of each ring of cold buffers.
    pub cold_bytes: usize,
}

impl Sampling {
    const FEWEST: usize = 3;

    pub fn new(quick: bool, machine: &Machine) -> Self {
        if quick {
            return Self {
                samples: 3,
                budget: Duration::from_millis(20),
                sample: Duration::from_micros(20),
                cold_bytes: 4 << 20,
            };
        }
        Self {
            samples: 21,
            budget: Duration::from_millis(500),
            sample: Duration::from_micros(100),
            // Well past the cache, as neither its size nor its replacement is exactly known.
            cold_bytes: (4 * machine.last_level_cache).max(128 << 20),
        }
    }

    /// How many buffers of `bytes` a case needs.
    pub fn buffers(&self, case: &Case, bytes: usize) -> usize {
        match case.cold {
            true => self.cold_bytes.div_ceil(bytes),
            false => 1,
        }
    }
}

/// Buffers used in turn.
pub struct Ring<E> {
    entries: Vec<E>,
    next: usize,
}

impl<E> Ring<E> {
    pub fn new(entries: Vec<E>) -> Self {
        Self { entries, next: 0 }
    }

    pub fn next(&mut self) -> &mut E {
        self.next += 1;
        if self.next == self.entries.len() {
            self.next = 0;
        }
        &mut self.entries[self.next]
    }
}

/// How long a contender warms up before each sample, at least. What the others evicted comes back to
/// the cache, and sleeping threads wake; cold buffers stay cold.
pub const WARM_UP: Duration = Duration::from_millis(1);

/// Something measured: warms up, performs a number of calls and says how long they took.
pub struct Contender {
    pub library: String,
    pub run: Box<dyn FnMut(usize) -> Result<Duration, Failure>>,
}

/// A run of a contender of this process. It warms up with a quarter as many calls, or more if that
/// is not [`WARM_UP`].
pub fn time(calls: usize, mut call: impl FnMut()) -> Duration {
    let start = Instant::now();
    let mut done = 0;
    while done < calls.div_ceil(4) || start.elapsed() < WARM_UP {
        call();
        done += 1;
    }
    let start = Instant::now();
    for _ in 0..calls {
        call();
    }
    start.elapsed()
}

/// How long [`time_rested`] has a thread sleep before each call: threads of a pool fall asleep within less.
const REST: Duration = Duration::from_micros(500);

/// So many calls, each after a rest that does not count. Of many calls a few stand for all.
pub fn time_rested(calls: usize, mut call: impl FnMut()) -> Duration {
    let few = calls.clamp(1, 8);
    let mut spent = Duration::ZERO;
    for _ in 0..few {
        std::thread::sleep(REST);
        let start = Instant::now();
        call();
        spent += start.elapsed();
    }
    spent.mul_f64(calls as f64 / few as f64)
}

/// Seconds per call: the median of the samples, and their quartiles.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Seconds {
    pub median: f64,
    pub low: f64,
    pub high: f64,
}

impl Seconds {
    fn of(mut samples: Vec<f64>) -> Self {
        samples.sort_by(f64::total_cmp);
        // Between two samples, on the line through them.
        let at = |share: f64| {
            let place = share * (samples.len() - 1) as f64;
            let (below, above) = (
                samples[place.floor() as usize],
                samples[place.ceil() as usize],
            );
            below + (above - below) * place.fract()
        };
        Self {
            median: at(0.5),
            low: at(0.25),
            high: at(0.75),
        }
    }
}

/// What each contender takes, or why it failed. They take their samples in turn, so that what else
/// the machine does hits all alike.
pub fn measure(contenders: &mut [Contender], sampling: &Sampling) -> Vec<Result<Seconds, Failure>> {
    struct Taken {
        calls: usize,
        spent: Duration,
        samples: Vec<f64>,
    }
    let mut all: Vec<Result<Taken, Failure>> = contenders
        .iter_mut()
        .map(|contender| {
            let one = (contender.run)(1)?.as_nanos().max(1);
            Ok(Taken {
                calls: (sampling.sample.as_nanos() / one).clamp(1, 10_000) as usize,
                spent: Duration::ZERO,
                samples: Vec::new(),
            })
        })
        .collect();
    for _ in 0..sampling.samples {
        for (contender, state) in contenders.iter_mut().zip(&mut all) {
            let Ok(taken) = state else { continue };
            if taken.spent > sampling.budget && taken.samples.len() >= Sampling::FEWEST {
                continue;
            }
            match (contender.run)(taken.calls) {
                Ok(time) => {
                    taken.spent += time;
                    taken.samples.push(time.as_secs_f64() / taken.calls as f64);
                }
                Err(failure) => *state = Err(failure),
            }
        }
    }
    let seconds = |state: Result<Taken, Failure>| Ok(Seconds::of(state?.samples));
    all.into_iter().map(seconds).collect()
}

/// Elements that start at a cache line, as allocators of inference engines align them.
pub struct Aligned<T> {
    lines: Vec<Line>,
    len: usize,
    element: std::marker::PhantomData<T>,
}

#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Line(pub [u8; LINE]);

/// Types that any bytes are a valid value of.
pub trait Plain: Copy {}
impl Plain for f32 {}
impl Plain for f16 {}
impl Plain for bf16 {}

impl<T: Plain> Aligned<T> {
    pub fn zeros(len: usize) -> Self {
        Self {
            lines: vec![Line([0; LINE]); (len * size_of::<T>()).div_ceil(LINE)],
            len,
            element: std::marker::PhantomData,
        }
    }

    pub fn lines_mut(&mut self) -> &mut [Line] {
        &mut self.lines
    }

    pub fn as_slice(&self) -> &[T] {
        // SAFETY: the lines hold this many elements, aligned, and any bytes are one.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }

    pub fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: as above, and the borrow is unique.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}

/// Values between -1 and 1 without a pattern that a rotation would notice. None is 0, as hardly any is
/// in q and k of a model.
pub fn values<T: Element>(len: usize) -> impl Iterator<Item = T> {
    (0..len).map(|i| T::narrow(((i * 37 % 251) as f32 + 0.25) / 125.5 - 1.0))
}

pub fn filled<T: Element + Plain>(len: usize) -> Aligned<T> {
    let mut buffer = Aligned::zeros(len);
    for (to, value) in buffer.as_mut_slice().iter_mut().zip(values(len)) {
        *to = value;
    }
    buffer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quartiles_lie_between_samples() {
        let seconds = |median, low, high| Seconds { median, low, high };
        assert_eq!(Seconds::of(vec![7.0]), seconds(7.0, 7.0, 7.0));
        assert_eq!(Seconds::of(vec![4.0, 2.0]), seconds(3.0, 2.5, 3.5));
        let samples = [9.0, 1.0, 5.0, 3.0, 7.0];
        assert_eq!(Seconds::of(samples.to_vec()), seconds(5.0, 3.0, 7.0));
    }
}
