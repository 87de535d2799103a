//! candle-nn's rotary embedding on the CPU. Its tables are formed beforehand, outside the timing.

use crate::cases::{Case, Contender, Ring, Sampling, THETA, time, values};
use candle_core::{DType, Device, Result, Tensor, WithDType};
use candle_nn::rotary_emb::{rope, rope_i};
use phasor::{Element, Pairing};
use std::hint::black_box;

pub const CANDLE: &str = "candle-nn";

pub fn contender<T: Element + WithDType>(
    case: &Case,
    pairing: Pairing,
    sampling: &Sampling,
) -> Result<Contender> {
    let (cos, sin) = tables(case, <T as WithDType>::DTYPE)?;
    let bytes = (case.q_len() + case.k_len()) * size_of::<T>();
    let pairs = (0..sampling.buffers(case, bytes))
        .map(|_| {
            Ok((
                tensor::<T>(case, case.q_heads)?,
                tensor::<T>(case, case.k_heads)?,
            ))
        })
        .collect::<Result<Vec<_>>>()?;
    let rotary_dim = case.rotary_dim;
    // An error, if any, comes here and not while the clock runs.
    rotate(&pairs[0].0, &cos, &sin, rotary_dim, pairing)?;
    let mut ring = Ring::new(pairs);
    Ok(Contender {
        library: CANDLE.to_owned(),
        run: Box::new(move |calls| {
            Ok(time(calls, || {
                let (q, k) = ring.next();
                for x in [q, k] {
                    let rotated = rotate(x, &cos, &sin, rotary_dim, pairing);
                    black_box(rotated.expect("the same shapes worked before"));
                }
            }))
        }),
    })
}

/// As models built on candle rotate: the other dims are cut off and appended again.
fn rotate(
    x: &Tensor,
    cos: &Tensor,
    sin: &Tensor,
    rotary_dim: usize,
    pairing: Pairing,
) -> Result<Tensor> {
    let rope = match pairing {
        Pairing::HalfSplit => rope,
        Pairing::Interleaved => rope_i,
    };
    let head_dim = x.dim(3)?;
    if rotary_dim == head_dim {
        return rope(x, cos, sin);
    }
    let rotated = rope(&x.narrow(3, 0, rotary_dim)?.contiguous()?, cos, sin)?;
    let rest = x.narrow(3, rotary_dim, head_dim - rotary_dim)?;
    Tensor::cat(&[&rotated, &rest], 3)
}

/// `[batch, heads, sequence, dim]`, the only layout that `rope` takes.
fn tensor<T: Element + WithDType>(case: &Case, heads: usize) -> Result<Tensor> {
    let shape = (case.sequences, heads, case.tokens, case.head_dim);
    let len = shape.0 * shape.1 * shape.2 * shape.3;
    Tensor::from_vec(values::<T>(len).collect::<Vec<T>>(), shape, &Device::Cpu)
}

/// `[sequence, dim / 2]`, or with a leading batch where each sequence has a position of its own.
fn tables(case: &Case, dtype: DType) -> Result<(Tensor, Tensor)> {
    let half = case.rotary_dim / 2;
    let mut angles = Vec::new();
    for start in case.positions() {
        for token in 0..case.tokens {
            let position = (start + token as i64) as f64;
            let exponent = |i: usize| -2.0 * i as f64 / case.rotary_dim as f64;
            angles.extend((0..half).map(|i| position * THETA.powf(exponent(i))));
        }
    }
    let table = |f: fn(f64) -> f64| {
        let values: Vec<f32> = angles.iter().map(|&angle| f(angle) as f32).collect();
        let table = match case.sequences {
            1 => Tensor::from_vec(values, (case.tokens, half), &Device::Cpu)?,
            n => Tensor::from_vec(values, (n, case.tokens, half), &Device::Cpu)?,
        };
        table.to_dtype(dtype)
    };
    Ok((table(f64::cos)?, table(f64::sin)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases::PAIRINGS;
    use phasor::{Dtype, Frequencies, Host, InOut, Layout, Positions, Problem, Rope};

    /// What is compared does the same thing.
    #[test]
    fn candle_rotates_as_phasor_does() -> std::result::Result<(), Box<dyn std::error::Error>> {
        for (sequences, tokens, rotary_dim) in [(1, 5, 8), (3, 1, 8), (1, 5, 4)] {
            for pairing in PAIRINGS {
                let case = Case {
                    sequences,
                    rotary_dim,
                    ..Case::llama("", tokens).heads(2, 1, 8)
                };
                let starts = case.positions();
                let (cos, sin) = tables(&case, DType::F32)?;
                let x = tensor::<f32>(&case, 2)?;
                let got = rotate(&x, &cos, &sin, rotary_dim, pairing)?;

                let rope = Rope::new(Frequencies::from_theta(THETA, rotary_dim)?, pairing);
                let rotator = Host::new().rotator(&rope);
                let problem = Problem::new(Dtype::F32).q(Layout::bhsd(sequences, tokens, 2, 8));
                let mut expected: Vec<f32> = values(case.q_len()).collect();
                rotator.rotate(
                    &rotator.plan(&problem)?,
                    Some(InOut::InPlace(&mut expected[..])),
                    None,
                    Positions::start_per_sequence(&starts[..]),
                )?;
                for (a, b) in got.flatten_all()?.to_vec1::<f32>()?.iter().zip(&expected) {
                    assert!((a - b).abs() < 1e-5, "{a} {b}");
                }
            }
        }
        Ok(())
    }
}
