//! The frequencies of each type of scaling, in extended precision: every formula ends in a phase
//! step that is right to its last bits, on every platform alike.

use super::ConfigError;
use super::scaling::{Llama3Scaling, LongRopeScaling, ProportionalScaling, Scaling, YarnScaling};
use crate::angle::DoubleDouble;

/// The first `count` frequencies over `dim` dims, in radians per position, for sequences of
/// `length` tokens.
pub(super) fn inv_freq(
    theta: f64,
    dim: usize,
    count: usize,
    scaling: &Scaling,
    length: Option<u64>,
) -> Result<Vec<DoubleDouble>, ConfigError> {
    let ln_theta = DoubleDouble::ln(theta);
    let plain = powers(ln_theta, dim, count);
    Ok(match scaling {
        Scaling::None => plain,
        Scaling::Linear(linear) => divided(&plain, DoubleDouble::from(linear.factor)),
        Scaling::DynamicNtk(dynamic) => {
            let factor = DoubleDouble::from(dynamic.factor);
            let max = dynamic.max_position_embeddings;
            let length = length.unwrap_or(max).max(max);
            // factor * length / max - (factor - 1), which is 1 for length = max.
            let excess = DoubleDouble::from(length).sub(max.into());
            let stretch = factor.mul(excess).div(max.into()).add(DoubleDouble::ONE);
            powers(stretched(ln_theta, stretch, dim)?, dim, count)
        }
        Scaling::QwenNtk(ntk) => {
            let doublings = doublings(ntk.seq_length, length.unwrap_or(ntk.seq_length));
            let alpha = DoubleDouble::from(2f64.powi(doublings + 1)).sub(DoubleDouble::ONE);
            powers(stretched(ln_theta, alpha, dim)?, dim, count)
        }
        Scaling::NtkAlpha(ntk) => powers(
            stretched(ln_theta, DoubleDouble::from(ntk.alpha), dim)?,
            dim,
            count,
        ),
        Scaling::Yarn(yarn) => yarn_blend(&plain, ln_theta, dim, yarn),
        Scaling::LongRope(long_rope) => {
            let (key, divisors) = if is_long(long_rope, length) {
                ("long_factor", &long_rope.long_factor)
            } else {
                ("short_factor", &long_rope.short_factor)
            };
            divided_each(&plain, key, divisors)?
        }
        Scaling::Llama3(llama3) => plain.iter().map(|&f| llama3_blend(f, llama3)).collect(),
        Scaling::Proportional(proportional) => proportional_part(&plain, dim, proportional),
    })
}

/// What multiplies cos and sin, for sequences of up to `length` tokens.
pub(super) fn attention_factor(scaling: &Scaling, length: Option<u64>) -> f32 {
    let factor = match scaling {
        Scaling::Yarn(yarn) => yarn_attention_factor(yarn),
        Scaling::LongRope(long_rope) => long_rope_attention_factor(long_rope, length),
        _ => DoubleDouble::ONE,
    };
    factor.to_f32()
}

/// `0.1 mscale ln(factor) + 1`, and 1 for a factor of at most 1.
pub(crate) fn mscale(factor: f64, mscale: f64) -> DoubleDouble {
    // One that is not a number is refused with the rest of the parameters.
    let factor = factor.max(1.0);
    let tenth = DoubleDouble::ONE.div(DoubleDouble::from(10.0));
    tenth
        .mul(DoubleDouble::from(mscale))
        .mul(DoubleDouble::ln(factor))
        .add(DoubleDouble::ONE)
}

/// `theta^(-2i / dim)`
fn powers(ln_theta: DoubleDouble, dim: usize, count: usize) -> Vec<DoubleDouble> {
    let dim_extended = DoubleDouble::from(dim as f64);
    (0..count)
        .map(|i| {
            let exponent = DoubleDouble::from(-2.0 * i as f64).div(dim_extended);
            ln_theta.mul(exponent).exp_saturating()
        })
        .collect()
}

/// The logarithm of `theta * stretch^(dim / (dim - 2))`.
fn stretched(
    ln_theta: DoubleDouble,
    stretch: DoubleDouble,
    dim: usize,
) -> Result<DoubleDouble, ConfigError> {
    if dim <= 2 {
        return Err(ConfigError::invalid(
            "rotary_dim",
            dim,
            "at least 4, for NTK scaling has the exponent rotary_dim / (rotary_dim - 2)",
        ));
    }
    let exponent = DoubleDouble::from(dim as f64).div(DoubleDouble::from((dim - 2) as f64));
    Ok(ln_theta.add(stretch.ln_extended().mul(exponent)))
}

/// How often `length` has to be doubled to hold as many tokens as `wanted`.
fn doublings(length: u64, wanted: u64) -> i32 {
    let holds = |doublings: &i32| u128::from(length) << doublings >= u128::from(wanted);
    (0..64).find(holds).unwrap_or(64)
}

fn divided(plain: &[DoubleDouble], divisor: DoubleDouble) -> Vec<DoubleDouble> {
    plain.iter().map(|f| f.div(divisor)).collect()
}

/// Each frequency by a divisor of its own; infinity stops a pair.
pub(super) fn divided_each(
    plain: &[DoubleDouble],
    key: &'static str,
    divisors: &[f64],
) -> Result<Vec<DoubleDouble>, ConfigError> {
    if divisors.len() != plain.len() {
        return Err(ConfigError::invalid(
            key,
            format_args!("a list of {}", divisors.len()),
            format!("a list of {}, one number per rotated pair", plain.len()),
        ));
    }
    let divide = |(f, &divisor): (&DoubleDouble, &f64)| {
        if divisor.is_infinite() {
            DoubleDouble::ZERO
        } else {
            f.div(DoubleDouble::from(divisor))
        }
    };
    Ok(plain.iter().zip(divisors).map(divide).collect())
}

fn yarn_blend(
    plain: &[DoubleDouble],
    ln_theta: DoubleDouble,
    dim: usize,
    yarn: &YarnScaling,
) -> Vec<DoubleDouble> {
    let (low, high) = yarn_ramp(ln_theta, dim, yarn);
    let factor = DoubleDouble::from(yarn.factor);
    let weight = DoubleDouble::from(yarn.extrapolation_factor);
    let blend = |(i, f): (usize, &DoubleDouble)| {
        let ramp = DoubleDouble::from(i as f64)
            .sub(low)
            .div(high.sub(low))
            .max(DoubleDouble::ZERO)
            .min(DoubleDouble::ONE);
        let kept = DoubleDouble::ONE.sub(ramp).mul(weight);
        let interpolated = f.div(factor);
        interpolated
            .mul(DoubleDouble::ONE.sub(kept))
            .add(f.mul(kept))
    };
    plain.iter().enumerate().map(blend).collect()
}

/// The pairs, as real numbers, between which the ramp lies. The second is above the first.
fn yarn_ramp(
    ln_theta: DoubleDouble,
    dim: usize,
    yarn: &YarnScaling,
) -> (DoubleDouble, DoubleDouble) {
    let dim = DoubleDouble::from(dim as f64);
    // Where a pair makes so many turns: dim * ln(L / (turns * 2π)) / (2 ln theta)
    let pair_of_turns = |turns: f64| {
        DoubleDouble::from(yarn.original_max_position_embeddings)
            .div(DoubleDouble::from(turns).mul(DoubleDouble::TAU))
            .ln_extended()
            .mul(dim)
            .div(ln_theta.add(ln_theta))
    };
    let (mut low, mut high) = (pair_of_turns(yarn.beta_fast), pair_of_turns(yarn.beta_slow));
    if yarn.truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    low = low.max(DoubleDouble::ZERO);
    high = high.min(dim.sub(DoubleDouble::ONE));
    if low == high {
        high = high.add(DoubleDouble::from(0.001));
    }
    (low, high)
}

fn yarn_attention_factor(yarn: &YarnScaling) -> DoubleDouble {
    let given = |value: Option<f64>| value.filter(|&value| value != 0.0);
    match (
        yarn.attention_factor,
        given(yarn.mscale),
        given(yarn.mscale_all_dim),
    ) {
        (Some(factor), _, _) => DoubleDouble::from(factor),
        (None, Some(over), Some(under)) => {
            mscale(yarn.factor, over).div(mscale(yarn.factor, under))
        }
        _ => mscale(yarn.factor, 1.0),
    }
}

/// Whether the long factors are used; without a length the short ones are.
pub(super) fn is_long(long_rope: &LongRopeScaling, length: Option<u64>) -> bool {
    length.is_some_and(|length| length > long_rope.original_max_position_embeddings)
}

fn long_rope_attention_factor(long_rope: &LongRopeScaling, length: Option<u64>) -> DoubleDouble {
    let of_length = if is_long(long_rope, length) {
        long_rope.long_mscale
    } else {
        long_rope.short_mscale
    };
    if let Some(factor) = of_length.or(long_rope.attention_factor) {
        return DoubleDouble::from(factor);
    }
    match long_rope.factor {
        Some(factor) if factor > 1.0 => long_rope_gain(
            DoubleDouble::from(factor),
            long_rope.original_max_position_embeddings,
        ),
        _ => DoubleDouble::ONE,
    }
}

/// `sqrt(1 + ln(factor) / ln(original))`
pub(crate) fn long_rope_gain(factor: DoubleDouble, original: u64) -> DoubleDouble {
    let original = DoubleDouble::from(original).ln_extended();
    let growth = factor.ln_extended().div(original);
    growth.add(DoubleDouble::ONE).sqrt()
}

fn llama3_blend(f: DoubleDouble, llama3: &Llama3Scaling) -> DoubleDouble {
    let turns = f
        .mul(llama3.original_max_position_embeddings.into())
        .div(DoubleDouble::TAU);
    let low = DoubleDouble::from(llama3.low_freq_factor);
    let high = DoubleDouble::from(llama3.high_freq_factor);
    let interpolated = f.div(DoubleDouble::from(llama3.factor));
    if turns < low {
        interpolated
    } else if turns > high || low == high {
        f
    } else {
        let kept = turns.sub(low).div(high.sub(low));
        interpolated
            .mul(DoubleDouble::ONE.sub(kept))
            .add(f.mul(kept))
    }
}

fn proportional_part(
    plain: &[DoubleDouble],
    dim: usize,
    proportional: &ProportionalScaling,
) -> Vec<DoubleDouble> {
    let turning = (proportional.rotated * dim as f64 / 2.0) as usize;
    let factor = DoubleDouble::from(proportional.factor);
    let part = |(i, f): (usize, &DoubleDouble)| {
        if i < turning {
            f.div(factor)
        } else {
            DoubleDouble::ZERO
        }
    };
    plain.iter().enumerate().map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_factor_of_at_most_1_leaves_cos_and_sin() {
        for factor in [0.25, 1.0, f64::NAN] {
            assert_eq!(mscale(factor, 0.7), DoubleDouble::ONE, "{factor}");
        }
        let larger = mscale(4.0, 0.7).to_f64();
        assert!((larger - 1.0 - 0.07 * 4f64.ln()).abs() < 1e-15, "{larger}");
    }
}
