//! cos and sin with ggml's own roundings.

use super::{Arguments, Mode, check_multi, factors_of_pairs};
use crate::CosSinTable;
use crate::interfaces::InterfaceError;
use crate::interfaces::tensor::product;

/// llama.cpp with all its arguments (ggml's CPU backend): a row of cos and sin for each token of a
/// call, the magnitude multiplied in. `sections` are those of `ggml_rope_multi`, and `b` its positions,
/// four of each token; without them this is `ggml_rope_ext`, and `b` has one of each.
///
/// [`Positions::start(0)`](crate::Positions::start) takes the rows in order. For a table of the positions
/// from 0 on, give those.
///
/// ```
/// use phasor::interfaces::ggml::{Arguments, Mode};
/// use phasor::interfaces::tables;
/// use phasor::{Pairing, Rope};
///
/// # fn main() -> Result<(), phasor::interfaces::InterfaceError> {
/// let arguments = Arguments::new(128, Mode::Neox, 10_000.0);
/// let table = tables::ggml(&arguments, None, None, &[0, 1, 2, 4095])?;
/// assert_eq!(table.rows(), 4);
/// let rope = Rope::new(table, Pairing::HalfSplit);
/// # let _ = rope;
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// Those of [`Rope::ext`](super::Rope::ext) and [`Rope::multi`](super::Rope::multi), but that
/// `freq_base` and divisors are taken as they are; [`InterfaceError::Presence`] without sections where
/// the mode needs them; [`InterfaceError::Shape`] unless there are four positions of each token where
/// there are sections; [`InterfaceError::Value`] for sections of more pairs than the head has dims, or
/// if there is no memory for so many rows; [`InterfaceError::Rope`] without rows.
pub fn table(
    arguments: &Arguments,
    sections: Option<[usize; 4]>,
    freq_factors: Option<&[f32]>,
    b: &[i32],
) -> Result<CosSinTable, InterfaceError> {
    arguments.check()?;
    let pairs = arguments.pairs();
    let tokens = match sections {
        None if matches!(arguments.mode, Mode::Normal | Mode::Neox) => b.len(),
        None => {
            return Err(InterfaceError::Presence {
                argument: "sections",
                problem: "must be given in this mode, which has several axes",
            });
        }
        Some(sections) => {
            check_multi(arguments.mode, sections)?;
            check_sections(sections, pairs)?;
            if !b.len().is_multiple_of(4) {
                let expected = "[4 * tokens], one for each axis and token";
                return Err(InterfaceError::shape("b", &[b.len()], expected));
            }
            b.len() / 4
        }
    };
    let factors = freq_factors
        .map(|factors| factors_of_pairs(factors, pairs))
        .transpose()?;
    let (mut cos, mut sin) = (Vec::new(), Vec::new());
    let fits = product(&[tokens, pairs])
        .is_some_and(|n| cos.try_reserve_exact(n).is_ok() && sin.try_reserve_exact(n).is_ok());
    if !fits {
        return Err(InterfaceError::value(
            "b",
            format_args!("{tokens} positions"),
            "few enough for the table to fit memory",
        ));
    }
    let chain = Chain::new(arguments);
    for token in 0..tokens {
        let at = match sections {
            None => [b[token] as f32; 4],
            Some(_) => [0, 1, 2, 3].map(|axis| b[axis * tokens + token] as f32),
        };
        let mut theta = at;
        for pair in 0..pairs {
            let axis = sections.map_or(0, |sections| {
                let (axis, start) = place(arguments.mode, sections, pair);
                if let (Mode::Vision, Some(axis)) = (arguments.mode, start) {
                    theta[axis] = at[axis];
                }
                axis
            });
            let divisor = factors.map_or(1.0, |factors| factors[pair]);
            let (c, s) = chain.cos_sin(theta[axis] / divisor, pair);
            cos.push(c);
            sin.push(s);
            theta.iter_mut().for_each(|theta| *theta *= chain.step);
        }
    }
    Ok(CosSinTable::new(cos, sin, pairs)?)
}

/// The axis of a pair, and that whose section begins there.
fn place(mode: Mode, sections: [usize; 4], pair: usize) -> (usize, Option<usize>) {
    let ends = [
        sections[0],
        sections[0] + sections[1],
        sections[0] + sections[1] + sections[2],
    ];
    let sector = pair % (ends[2] + sections[3]);
    let starts = [0, ends[0], ends[1], ends[2]];
    let start = starts.iter().position(|&start| sector == start);
    if mode == Mode::Imrope {
        let turn = sector % 3;
        let claimed = sector < 3 * sections[turn];
        return (if claimed { turn } else { 3 }, start);
    }
    (ends.iter().filter(|&&end| sector >= end).count(), start)
}

/// Sums of sections stay far from overflow.
fn check_sections(sections: [usize; 4], pairs: usize) -> Result<(), InterfaceError> {
    let most = 2 * pairs;
    if sections.iter().any(|&section| section > most) || sections.iter().sum::<usize>() > most {
        return Err(InterfaceError::value(
            "sections",
            format_args!("{sections:?}"),
            format!("of a sum of at most {most}, the dims of the head"),
        ));
    }
    Ok(())
}

/// What does not change from token to token.
struct Chain {
    step: f32,
    scale: f32,
    weight: f32,
    ramp: [f32; 2],
    magnitude: f32,
}

impl Chain {
    fn new(arguments: &Arguments) -> Self {
        let (n_dims, base) = (arguments.n_dims as f32, arguments.freq_base);
        let pair_of_turns = |turns: f32| {
            let context = arguments.n_ctx_orig as f32 / (turns * 2.0 * std::f32::consts::PI);
            n_dims * context.ln() / (2.0 * base.ln())
        };
        let growth = match arguments.ext_factor {
            0.0 => 1.0,
            _ => 1.0 + 0.1 * (1.0 / arguments.freq_scale).ln(),
        };
        Self {
            step: base.powf(-2.0 / n_dims),
            scale: arguments.freq_scale,
            weight: arguments.ext_factor,
            ramp: [
                pair_of_turns(arguments.beta_fast).floor().max(0.0),
                pair_of_turns(arguments.beta_slow).ceil().min(n_dims - 1.0),
            ],
            magnitude: arguments.attn_factor * growth,
        }
    }

    fn cos_sin(&self, unscaled: f32, pair: usize) -> (f32, f32) {
        let mut angle = self.scale * unscaled;
        if self.weight != 0.0 {
            let [low, high] = self.ramp;
            let along = (pair as f32 - low) / (high - low).max(0.001);
            let kept = (1.0 - along.clamp(0.0, 1.0)) * self.weight;
            // Fused, as it is compiled for CPUs that can.
            angle = angle.mul_add(1.0 - kept, unscaled * kept);
        }
        (angle.cos() * self.magnitude, angle.sin() * self.magnitude)
    }
}
