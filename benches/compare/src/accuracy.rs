//! How far cos and sin are off at each position, by how the angle is formed.
//!
//! The true angles are in 128-bit fixed point, made of integer operations alone: neither phasor's
//! arithmetic nor that of its tests' oracle is in them.

use crate::cases::THETA;
use phasor::half::bf16;
use phasor::{Error, Frequencies};
use std::f64::consts::TAU;
use std::fmt::Write;

pub const HEAD_DIM: usize = 128;
/// Each point of a curve is the worst of this many positions, so that curves are no noise.
pub const WINDOW: i64 = 64;
const PAIRS: usize = HEAD_DIM / 2;
/// Points in each doubling of the position, up to 2^31.
const POINTS: i32 = 4;

/// 2^128 / 2π.
const INVERSE_TAU: u128 = 0x28be_60db_9391_054a_7f09_d5f4_7d4d_3770;

/// The product of two fractions of 2^128, rounded down.
fn product(a: u128, b: u128) -> u128 {
    let halves = |x: u128| (x >> 64, x & u128::from(u64::MAX));
    let ((a1, a0), (b1, b0)) = (halves(a), halves(b));
    let ((x1, x0), (y1, y0)) = (halves(a1 * b0), halves(a0 * b1));
    let carry = (halves(a0 * b0).0 + x0 + y0) >> 64;
    a1 * b1 + x1 + y1 + carry
}

/// `x^PAIRS`, which is a power of two.
fn power(x: u128) -> u128 {
    (0..PAIRS.ilog2()).fold(x, |x, _| product(x, x))
}

/// `THETA^(-1 / PAIRS)`: the largest fraction whose power is not above `1 / THETA`.
fn root() -> u128 {
    let target = u128::MAX / THETA as u128;
    (0..128).rev().fold(0, |root, bit| {
        let larger = root | 1 << bit;
        if power(larger) <= target {
            larger
        } else {
            root
        }
    })
}

/// The angle of each pair at position 1, in units of 2^-128 turn. The root is right to 100 bits and
/// more, so that less than 2^-64 turn is lost at any position drawn.
fn turns() -> Vec<u128> {
    let root = root();
    let next = |turn: &u128| Some(product(*turn, root));
    std::iter::successors(Some(INVERSE_TAU), next)
        .take(PAIRS)
        .collect()
}

type CosSin = (f64, f64);

/// Whole turns drop out of the integer product; what is left has f64's precision.
fn exact(turn: u128, position: i64) -> CosSin {
    let turned = turn.wrapping_mul(position as u128) as i128;
    let (sin, cos) = (turned as f64 * (TAU * 2f64.powi(-128))).sin_cos();
    (cos, sin)
}

/// A way to form the angles of all pairs at a position.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scheme {
    Phases,
    F32,
    F32Chain,
    Bf16Table,
    Bf16,
}

impl Scheme {
    /// As the legend has them.
    pub const ALL: [Self; 5] = [
        Self::Phases,
        Self::F32,
        Self::F32Chain,
        Self::Bf16Table,
        Self::Bf16,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Phases => "phasor: exact phases",
            Self::F32 => "angles in f32: transformers, vLLM, MLX, MAX in f32",
            Self::F32Chain => "angles multiplied up pair by pair in f32: llama.cpp",
            Self::Bf16Table => "angles in f32, cos and sin in bf16: transformers, vLLM in bf16",
            Self::Bf16 => "angles in bf16: candle-transformers 0.11 (Qwen2, Gemma, Mixtral)",
        }
    }
}

/// cos and sin as the schemes form them. Each operation of a peer is rounded correctly, its cos
/// and sin as well: what it calls may be off by more.
struct Formed {
    frequencies: Frequencies,
    inv_freq: Vec<f32>,
    theta_scale: f32,
}

impl Formed {
    fn new() -> Result<Self, Error> {
        // f64 rounded once more is the correctly rounded f32, but for one case in 10^8.
        let power = |exponent: f64| THETA.powf(exponent) as f32;
        let pairs = 0..PAIRS;
        Ok(Self {
            frequencies: Frequencies::from_theta(THETA, HEAD_DIM)?,
            inv_freq: pairs
                .map(|i| 1.0 / power(i as f64 / PAIRS as f64))
                .collect(),
            theta_scale: power(-1.0 / PAIRS as f64),
        })
    }

    fn at(&self, scheme: Scheme, position: i64) -> Vec<CosSin> {
        let f32_of = |angle: f32| {
            let (sin, cos) = f64::from(angle).sin_cos();
            (cos as f32, sin as f32)
        };
        let narrow = |x: f32| bf16::from_f32(x).to_f32();
        let narrow_both = |(cos, sin)| (narrow(cos), narrow(sin));
        let start = position as f32;
        let all: Vec<(f32, f32)> = match scheme {
            Scheme::Phases => (0..PAIRS)
                .map(|pair| self.frequencies.cos_sin(pair, position))
                .collect(),
            Scheme::F32 => {
                let angles = self.inv_freq.iter().map(|f| start * f);
                angles.map(f32_of).collect()
            }
            Scheme::F32Chain => {
                let next = |angle: &f32| Some(angle * self.theta_scale);
                let angles = std::iter::successors(Some(start), next).take(PAIRS);
                angles.map(f32_of).collect()
            }
            Scheme::Bf16Table => {
                let angles = self.inv_freq.iter().map(|f| start * f);
                angles.map(f32_of).map(narrow_both).collect()
            }
            Scheme::Bf16 => {
                let angles = self.inv_freq.iter();
                let angles = angles.map(|&f| narrow(narrow(start) * narrow(f)));
                angles.map(f32_of).map(narrow_both).collect()
            }
        };
        let wide = |(cos, sin)| (f64::from(cos), f64::from(sin));
        all.into_iter().map(wide).collect()
    }
}

/// The errors of one scheme.
pub struct Curve {
    pub scheme: Scheme,
    /// Position, and the largest error of cos and sin up to it.
    pub points: Vec<(i64, f64)>,
}

/// The curves of all schemes.
pub fn curves() -> Result<Vec<Curve>, Error> {
    let marks =
        (0..=31 * POINTS).map(|k| 2f64.powf(f64::from(k) / f64::from(POINTS)).round() as i64);
    let mut marks: Vec<i64> = marks.collect();
    marks.dedup();
    errors(&marks)
}

fn errors(marks: &[i64]) -> Result<Vec<Curve>, Error> {
    let (turns, formed) = (turns(), Formed::new()?);
    let mut curves: Vec<Curve> = Scheme::ALL
        .map(|scheme| Curve {
            scheme,
            points: Vec::new(),
        })
        .into();
    for &mark in marks {
        let mut worst = [0.0f64; Scheme::ALL.len()];
        for position in (mark - WINDOW + 1).max(0)..=mark {
            let exact: Vec<CosSin> = turns.iter().map(|&turn| exact(turn, position)).collect();
            for (worst, curve) in worst.iter_mut().zip(&curves) {
                for (is, should) in formed.at(curve.scheme, position).iter().zip(&exact) {
                    let error = (is.0 - should.0).abs().max((is.1 - should.1).abs());
                    *worst = worst.max(error);
                }
            }
        }
        for (curve, worst) in curves.iter_mut().zip(worst) {
            curve.points.push((mark, worst));
        }
    }
    Ok(curves)
}

/// The errors at a few positions, as text.
pub fn table() -> Result<String, Error> {
    let mut text =
        String::from("| largest error up to position | 10^3 | 10^6 | 10^9 |\n|---|---|---|---|\n");
    for curve in errors(&[1_000, 1_000_000, 1_000_000_000])? {
        let _ = write!(text, "| {} ", curve.scheme.name());
        for (_, error) in curve.points {
            let _ = write!(text, "| {error:.1e} ");
        }
        text += "|\n";
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_is_between_its_neighbours() {
        let (root, theta) = (root(), THETA as u128);
        assert!(power(root) <= u128::MAX / theta);
        assert!(power(root + 1) > u128::MAX / theta);
        // Each of the squarings drops less than a unit, which the next one doubles at most.
        let lost = u128::MAX / theta - power(root);
        assert!(lost < 1 << 8, "{lost} units of 2^-128");
    }

    /// Machin's formula, in units of 2^-120.
    #[test]
    fn the_constant_is_the_inverse_of_a_turn() {
        let arc_cotangent = |x: u128| {
            let (mut power, mut sum, mut odd) = ((1u128 << 120) / x, 0u128, 1);
            while power > 0 {
                let term = power / odd;
                sum = if odd % 4 == 1 { sum + term } else { sum - term };
                power /= x * x;
                odd += 2;
            }
            sum
        };
        let pi = 4 * (4 * arc_cotangent(5) - arc_cotangent(239));
        // (2^128 / 2π) (2^120 π) / 2^128 = 2^119.
        let half = product(INVERSE_TAU, pi);
        assert!(half.abs_diff(1 << 119) < 1 << 10, "{half:#x}");
    }

    #[test]
    fn the_true_angles_are_those_that_phasor_rounds() {
        let frequencies = Frequencies::from_theta(THETA, HEAD_DIM).unwrap();
        for (turn, &step) in turns().into_iter().zip(frequencies.steps()) {
            let error = (u128::from(step) << 64).abs_diff(turn) as f64 * 2f64.powi(-64);
            assert!(error < 0.5 + 1e-6, "{error} units of 2^-64 turn");
        }
    }

    /// What the picture is there to say.
    #[test]
    fn phases_stay_exact_where_f32_angles_do_not() {
        let curves = curves().unwrap();
        let [phases, f32_angles, chain, table, narrow] = &curves[..] else {
            panic!("five curves");
        };
        assert_eq!(phases.points.last().unwrap().0, 1 << 31);
        for (at, error) in &phases.points {
            assert!(*error < 2f64.powi(-23), "{error:e} at {at}");
        }
        let error = |curve: &Curve, mark: i64| {
            let point = curve.points.iter().find(|point| point.0 == mark);
            point.unwrap().1
        };
        assert!(error(f32_angles, 1 << 20) > 1e5 * error(phases, 1 << 20));
        assert!(error(chain, 1 << 20) > error(f32_angles, 1 << 20));
        // bf16 cannot hold cos and sin better than that, and what it does to angles is far worse.
        assert!(error(table, 4) > 2f64.powi(-10) && error(table, 4) < 2f64.powi(-8));
        assert!(error(narrow, 4096) > 100.0 * error(table, 4096));
        for curve in [f32_angles, chain, table, narrow] {
            assert!(error(curve, 1 << 30) > 1.0, "{:?}", curve.scheme);
        }
    }
}
