//! The reference that results are judged by, written from the definition of the operation alone:
//! pair `i` of a head at position `p` turns by `p * theta^(-2i / rotary_dim)` radians.
//!
//! Angles are formed in arbitrary precision: `f64` is off by 1.9e-7 radians near position 2^31,
//! more than the error that is to be judged. The rotation itself is then done in `f64`.

use astro_float::{BigFloat, Consts, RoundingMode, Sign, WORD_BIT_SIZE};
use std::f64::consts::TAU;

/// Bits of every arbitrary-precision number here.
const BITS: usize = 256;
const NEAREST: RoundingMode = RoundingMode::ToEven;

/// The angle of each pair at position 1, in units of 2^-128 turn, whole turns left out.
pub struct Oracle {
    turns: Vec<u128>,
}

impl Oracle {
    pub fn from_theta(theta: f64, rotary_dim: usize) -> Self {
        let constants = &mut Consts::new().unwrap();
        let tau = tau(constants);
        let dim = BigFloat::from_f64(rotary_dim as f64, BITS);
        let theta = BigFloat::from_f64(theta, BITS);
        let turn = |i: usize| {
            let exponent = BigFloat::from_f64(2.0 * i as f64, BITS).div(&dim, BITS, NEAREST);
            let period = theta.pow(&exponent, BITS, NEAREST, constants);
            let period = period.mul(&tau, BITS, NEAREST);
            fixed_point(&BigFloat::from_f64(1.0, BITS).div(&period, BITS, NEAREST))
        };
        Self {
            turns: (0..rotary_dim / 2).map(turn).collect(),
        }
    }

    pub fn from_inv_freq(inv_freq: &[f64]) -> Self {
        let tau = tau(&mut Consts::new().unwrap());
        let turn = |&f: &f64| fixed_point(&BigFloat::from_f64(f, BITS).div(&tau, BITS, NEAREST));
        Self {
            turns: inv_freq.iter().map(turn).collect(),
        }
    }

    pub fn pairs(&self) -> usize {
        self.turns.len()
    }

    /// The angle of a pair at position 1, in units of 2^-128 turn.
    pub fn turn(&self, pair: usize) -> u128 {
        self.turns[pair]
    }

    /// The true angle, between -π and π. It is off by at most 1e-15: 2^-65 turn from the fixed
    /// point at the largest position, and three roundings to `f64`.
    pub fn radians(&self, pair: usize, position: i64) -> f64 {
        let turn = self.turns[pair].wrapping_mul(i128::from(position) as u128);
        turn as i128 as f64 * (TAU * 2f64.powi(-128))
    }

    /// The 64-bit steps of the definition: each turn rounded to a multiple of 2^-64.
    pub fn steps(&self) -> Vec<u64> {
        let step = |turn: &u128| (turn.wrapping_add(1 << 63) >> 64) as u64;
        self.turns.iter().map(step).collect()
    }
}

/// The angle that the definition gives a step at a position: `step * position mod 2^64`, where
/// 2^64 is a turn.
pub fn step_radians(step: u64, position: i64) -> f64 {
    let phase = (i128::from(step) * i128::from(position)).rem_euclid(1 << 64) as u64;
    phase as i64 as f64 * (TAU * 2f64.powi(-64))
}

/// `a' = a cos - b sin`, `b' = a sin + b cos`.
pub fn rotate(a: f64, b: f64, cos: f64, sin: f64) -> (f64, f64) {
    (a * cos - b * sin, a * sin + b * cos)
}

/// The dims of pair `i` of `pairs`, counted from the first rotated dim.
pub fn half_split(i: usize, pairs: usize) -> (usize, usize) {
    (i, i + pairs)
}

/// The dims of pair `i`, counted from the first rotated dim.
pub fn interleaved(i: usize) -> (usize, usize) {
    (2 * i, 2 * i + 1)
}

/// cos of `position * inv_freq` radians with nothing but arbitrary precision, and slow.
pub fn slow_cos(inv_freq: f64, position: i64) -> f64 {
    let constants = &mut Consts::new().unwrap();
    let position = BigFloat::from_i64(position, BITS);
    let angle = BigFloat::from_f64(inv_freq, BITS).mul(&position, BITS, NEAREST);
    to_f64(&angle.cos(BITS, NEAREST, constants))
}

fn tau(constants: &mut Consts) -> BigFloat {
    let pi = constants.pi(BITS, NEAREST);
    pi.add(&pi, BITS, NEAREST)
}

/// `floor(x * 2^128) mod 2^128` for positive `x`, the negative of that for negative `x`.
fn fixed_point(x: &BigFloat) -> u128 {
    let Some((words, _, sign, exponent, _)) = x.as_raw_parts() else {
        panic!("not a number: {x}");
    };
    // x = 0.m * 2^exponent, where the last word of m holds the bits behind the point.
    let mut sum = 0u128;
    for (j, &word) in words.iter().rev().enumerate() {
        let shift = 128 + i64::from(exponent) - (j as i64 + 1) * WORD_BIT_SIZE as i64;
        sum = sum.wrapping_add(match shift {
            128.. => 0,
            0.. => u128::from(word) << shift,
            -127.. => u128::from(word) >> -shift,
            _ => 0,
        });
    }
    if sign == Sign::Neg {
        sum.wrapping_neg()
    } else {
        sum
    }
}

/// For magnitudes of at most 1; off by 2^-126.
fn to_f64(x: &BigFloat) -> f64 {
    let quarter = BigFloat::from_f64(0.25, BITS);
    fixed_point(&x.mul(&quarter, BITS, NEAREST)) as i128 as f64 * 2f64.powi(-126)
}

/// Where the elements of one tensor are: any shape, any strides.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    /// Batch, tokens, heads, dims of a head.
    pub shape: [usize; 4],
    /// Elements from one sequence, token, head to the next.
    pub strides: [usize; 3],
    pub offset: usize,
    pub rotary_offset: usize,
}

impl Place {
    /// The element of dim `d` of head `h` of token `s` of sequence `b`.
    pub fn index(&self, [b, s, h, d]: [usize; 4]) -> usize {
        let [batch, sequence, head] = self.strides;
        self.offset + b * batch + s * sequence + h * head + d
    }

    /// All heads as (sequence, token, head).
    pub fn heads(&self) -> impl Iterator<Item = (usize, usize, usize)> + use<> {
        let [batch, sequence, heads, _] = self.shape;
        (0..batch)
            .flat_map(move |b| (0..sequence).flat_map(move |s| (0..heads).map(move |h| (b, s, h))))
    }

    /// Elements that a buffer needs.
    pub fn len(&self) -> usize {
        let last = self.shape[3] - 1;
        let ends = self
            .heads()
            .map(|(b, s, h)| self.index([b, s, h, last]) + 1);
        ends.max().unwrap_or(0)
    }

    pub fn layout(&self) -> phasor::Layout {
        let [batch, sequence, heads, head_dim] = self.shape;
        let [batch_stride, sequence_stride, head_stride] = self.strides;
        phasor::Layout::bshd(batch, sequence, heads, head_dim)
            .with_strides(batch_stride, sequence_stride, head_stride)
            .with_offset(self.offset)
            .with_rotary_offset(self.rotary_offset)
    }
}
