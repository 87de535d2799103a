//! `get_rope`: a rotation from a dictionary of parameters.

use super::RotaryEmbedding;
use crate::Device;
use crate::angle::DoubleDouble;
use crate::config::{
    Axes, DynamicNtkScaling, LinearScaling, Llama3Scaling, LongRopeScaling, NtkAlphaScaling,
    ProportionalScaling, RopeConfig, Scaling, YarnScaling, mscale,
};
use crate::interfaces::InterfaceError;
use crate::interfaces::tensor::{check_rotary_dim, pairing};

/// A value of the dictionary `rope_parameters`. `None` of Python is a key left out.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Parameter<'a> {
    /// An integer or a float.
    Number(f64),
    /// A string.
    Text(&'a str),
    /// `True` or `False`.
    Flag(bool),
    /// A list of numbers.
    Numbers(&'a [f64]),
}

impl From<f64> for Parameter<'_> {
    fn from(number: f64) -> Self {
        Parameter::Number(number)
    }
}

impl From<i32> for Parameter<'_> {
    fn from(number: i32) -> Self {
        Parameter::Number(number.into())
    }
}

impl From<u32> for Parameter<'_> {
    fn from(number: u32) -> Self {
        Parameter::Number(number.into())
    }
}

impl From<bool> for Parameter<'_> {
    fn from(flag: bool) -> Self {
        Parameter::Flag(flag)
    }
}

impl<'a> From<&'a str> for Parameter<'a> {
    fn from(text: &'a str) -> Self {
        Parameter::Text(text)
    }
}

impl<'a> From<&'a [f64]> for Parameter<'a> {
    fn from(numbers: &'a [f64]) -> Self {
        Parameter::Numbers(numbers)
    }
}

impl<'a, const N: usize> From<&'a [f64; N]> for Parameter<'a> {
    fn from(numbers: &'a [f64; N]) -> Self {
        Parameter::Numbers(numbers)
    }
}

/// vLLM's `get_rope(head_size, max_position, is_neox_style, rope_parameters)`: the rotation of a
/// model, by the keys of its config. Frequencies are formed as the class does that vLLM chooses, but
/// exactly, and positions are those that its cache would have.
///
/// | `rope_type` | keys | positions |
/// |---|---|---|
/// | `default` | | `max_position` |
/// | `linear` | `factor` | `max_position * factor` |
/// | `llama3` | `factor`, `low_freq_factor`, `high_freq_factor`, `original_max_position_embeddings` | `max_position` |
/// | `dynamic` | `alpha`, or `factor` and `max_trained_positions` (`max_position` if absent): theta for a length of `max_position`, at every position | `max_position` |
/// | `proportional` | | `max_position` |
/// | `yarn` | `factor`, `original_max_position_embeddings`, `beta_fast`, `beta_slow`, `attention_factor`, `mscale`, `mscale_all_dim`, `truncate` | `original * factor` |
/// | `deepseek_yarn`, `deepseek_llama_scaling` | the same but `attention_factor` and `truncate`; `is_deepseek_v4` rotates the last dims of a head | `original * factor` |
/// | `longrope` | `short_factor`, `long_factor`, `original_max_position_embeddings`, `short_mscale`, `long_mscale` | `max_position`, or `original` with the short factors |
///
/// All take `rope_theta` (10000), `partial_rotary_factor` (1) and `rope_dim`, which comes before it.
/// `default` and `yarn` with `mrope_section` (and `mrope_interleaved`) take positions on three axes,
/// four times as many of them; vLLM then also places YaRN's ramp as for four times the original
/// length, and so does this. Other keys have no effect, as in vLLM. One key is not vLLM's:
/// `max_model_len`, the length of the engine, by which `longrope` chooses its factors for all sequences;
/// it is `max_position` if absent.
///
/// ```
/// use phasor::Device;
/// use phasor::interfaces::Tensor;
/// use phasor::interfaces::vllm::get_rope;
///
/// # fn main() -> Result<(), phasor::interfaces::InterfaceError> {
/// // rotary_emb = get_rope(64, max_position=163840, is_neox_style=False, rope_parameters={...})
/// let rope_parameters = [
///     ("rope_type", "deepseek_yarn".into()),
///     ("rope_theta", 10_000.0.into()),
///     ("factor", 40.into()),
///     ("original_max_position_embeddings", 4096.into()),
///     ("mscale", 1.0.into()),
///     ("mscale_all_dim", 1.0.into()),
/// ];
/// let rotary_emb = get_rope(&Device::host(), 64, 163_840, false, &rope_parameters)?;
/// let mut query = vec![0.5f32; 2 * 16 * 64];
/// rotary_emb.forward(&[0, 163_839], Tensor::new(&mut query, &[2, 16 * 64]), None)?;
///
/// // Qwen2-VL; positions are [3, tokens]: time, height, width.
/// let rope_parameters = [
///     ("rope_theta", 1_000_000.0.into()),
///     ("mrope_section", (&[16.0, 24.0, 24.0]).into()),
/// ];
/// let rotary_emb = get_rope(&Device::host(), 128, 32_768, true, &rope_parameters)?;
/// let mut query = vec![0.5f32; 2 * 12 * 128];
/// rotary_emb.forward(&[9, 9, 9, 10, 9, 9], Tensor::new(&mut query, &[2, 12 * 128]), None)?;
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// [`InterfaceError::Presence`] for a key that the type needs and that is absent;
/// [`InterfaceError::Value`] for one of another kind, for dims that are odd or outside the head, and
/// for types that are not listed above (`ntk`, `mllama4`, `bailing_mrope`, `openpangu`, `use_fope`);
/// [`InterfaceError::Config`] for parameters without meaning; [`InterfaceError::Rope`] if the device
/// has no room.
pub fn get_rope(
    device: &Device,
    head_size: usize,
    max_position: usize,
    is_neox_style: bool,
    rope_parameters: &[(&str, Parameter<'_>)],
) -> Result<RotaryEmbedding, InterfaceError> {
    let keys = Keys(rope_parameters);
    let rope_type = keys.text("rope_type")?.unwrap_or("default");
    let fraction = keys.number("partial_rotary_factor")?.unwrap_or(1.0);
    // Python takes a 0 for absent.
    let rotary_dim = match keys.count("rope_dim")?.filter(|&dim| dim > 0) {
        Some(dim) => usize::try_from(dim).unwrap_or(usize::MAX),
        None if fraction > 0.0 && fraction <= 1.0 => (head_size as f64 * fraction) as usize,
        None => {
            let expected = "above 0 and at most 1";
            return Err(InterfaceError::value(
                "partial_rotary_factor",
                fraction,
                expected,
            ));
        }
    };
    check_rotary_dim("rotary_dim", rotary_dim)?;
    super::check_fits(rotary_dim, head_size)?;
    if keys.flag("use_fope")?.unwrap_or(false) {
        let expected = "false: its frequencies are weights of the model";
        return Err(InterfaceError::value("use_fope", true, expected));
    }

    let theta = keys.number("rope_theta")?.unwrap_or(10_000.0);
    let config = RopeConfig::new(theta, head_size)?
        .with_rotary_dim(rotary_dim)?
        .with_pairing(pairing(!is_neox_style));
    let mut made = Made {
        config,
        length: None,
        rows: max_position,
    };
    let mut trailing = false;
    match rope_type {
        "default" => made = made.mrope(&keys, 4)?,
        "linear" => {
            let factor = keys.needed_number("factor")?;
            made = made.scaled(Scaling::Linear(LinearScaling { factor }))?;
            made.rows = times(max_position as u64, factor);
        }
        "llama3" => {
            made = made.scaled(Scaling::Llama3(Llama3Scaling::new(
                keys.needed_number("factor")?,
                keys.needed_number("low_freq_factor")?,
                keys.needed_number("high_freq_factor")?,
                keys.needed_count(ORIGINAL)?,
            )))?;
        }
        "dynamic" => made = made.dynamic(&keys, max_position as u64)?,
        "proportional" => {
            // Half a dim more makes up for the division's rounding.
            let rotated = ((rotary_dim as f64 + 0.5) / head_size as f64).min(1.0);
            let proportional = ProportionalScaling {
                rotated,
                factor: 1.0,
            };
            made.config = made.config.with_rotary_dim(head_size)?;
            made = made.scaled(Scaling::Proportional(proportional))?;
        }
        "yarn" => {
            let sections = keys.list("mrope_section")?.is_some();
            let (yarn, original) = keys.yarn(if sections { 4 } else { 1 })?;
            let factor = yarn.factor;
            made = made.scaled(Scaling::Yarn(YarnScaling {
                attention_factor: keys.number("attention_factor")?,
                mscale: keys.number("mscale")?,
                mscale_all_dim: keys.number("mscale_all_dim")?,
                truncate: keys.flag("truncate")?.unwrap_or(true),
                ..yarn
            }))?;
            made = made.mrope(&keys, 1)?;
            made.rows = times(original, factor);
        }
        "deepseek_yarn" | "deepseek_llama_scaling" => {
            let (yarn, original) = keys.yarn(1)?;
            let factor = yarn.factor;
            let gain = |key: &'static str, default: f64| -> Result<DoubleDouble, InterfaceError> {
                Ok(mscale(factor, keys.number(key)?.unwrap_or(default)))
            };
            let ratio = gain("mscale", 1.0)?.div(gain("mscale_all_dim", 0.0)?);
            made = made.scaled(Scaling::Yarn(YarnScaling {
                attention_factor: Some(ratio.to_f64()),
                ..yarn
            }))?;
            made.rows = times(original, factor);
            trailing = keys.flag("is_deepseek_v4")?.unwrap_or(false);
        }
        "longrope" if is_neox_style => made = made.long_rope(&keys, max_position as u64)?,
        "longrope" => {
            let expected = "true, for longrope pairs dims so";
            return Err(InterfaceError::value("is_neox_style", false, expected));
        }
        other => {
            let other: String = other.chars().take(40).collect();
            let expected = "default, linear, llama3, dynamic, proportional, yarn, deepseek_yarn, \
                            deepseek_llama_scaling or longrope";
            return Err(InterfaceError::value("rope_type", other, expected));
        }
    }

    let rope = match made.length {
        Some(length) => made.config.rope_for_length(length)?,
        None => made.config.rope()?,
    };
    let offset = if trailing { head_size - rotary_dim } else { 0 };
    if offset % 2 == 1 {
        let expected = "even, as the last dims rotate";
        return Err(InterfaceError::value("head_size", head_size, expected));
    }
    RotaryEmbedding::of_rope(device, rope, head_size, offset, made.rows)
}

const ORIGINAL: &str = "original_max_position_embeddings";

/// What the keys have said so far.
struct Made {
    config: RopeConfig,
    /// The length of sequence whose frequencies all sequences have, where they depend on it.
    length: Option<u64>,
    /// Positions of vLLM's cache.
    rows: usize,
}

impl Made {
    fn scaled(mut self, scaling: Scaling) -> Result<Self, InterfaceError> {
        self.config = self.config.with_scaling(scaling)?;
        Ok(self)
    }

    /// Axes, if there are sections, and then more positions.
    fn mrope(mut self, keys: &Keys<'_>, positions_factor: usize) -> Result<Self, InterfaceError> {
        let Some(sections) = keys.list("mrope_section")? else {
            return Ok(self);
        };
        let expected = "three whole numbers of pairs: time, height, width";
        let invalid = || InterfaceError::value("mrope_section", cut(sections), expected);
        let &[time, height, width] = sections else {
            return Err(invalid());
        };
        let whole = |pairs: f64| {
            let fits = pairs.fract() == 0.0 && (0.0..=65_536.0).contains(&pairs);
            fits.then_some(pairs as usize).ok_or_else(invalid)
        };
        let sections = [whole(time)?, whole(height)?, whole(width)?];
        let axes = match keys.flag("mrope_interleaved")?.unwrap_or(false) {
            true => Axes::MropeInterleaved(sections),
            false => Axes::MropeSections(sections),
        };
        self.config = self.config.with_axes(axes);
        self.rows = self.rows.saturating_mul(positions_factor);
        Ok(self)
    }

    fn dynamic(mut self, keys: &Keys<'_>, max_position: u64) -> Result<Self, InterfaceError> {
        if let Some(alpha) = keys.number("alpha")? {
            return self.scaled(Scaling::NtkAlpha(NtkAlphaScaling { alpha }));
        }
        let Some(factor) = keys.number("factor")? else {
            return Err(InterfaceError::Presence {
                argument: "factor",
                problem: "is missing: with rope_type dynamic give it, or alpha",
            });
        };
        let trained = keys.count("max_trained_positions")?.unwrap_or(max_position);
        if trained > max_position {
            let expected = format!("at most max_position, which is {max_position}");
            return Err(InterfaceError::value(
                "max_trained_positions",
                trained,
                expected,
            ));
        }
        self.length = Some(max_position);
        self.scaled(Scaling::DynamicNtk(DynamicNtkScaling {
            factor,
            max_position_embeddings: trained,
        }))
    }

    fn long_rope(mut self, keys: &Keys<'_>, max_position: u64) -> Result<Self, InterfaceError> {
        let original = keys.needed_count(ORIGINAL)?;
        let longest = keys.count("max_model_len")?.unwrap_or(max_position);
        let is_long = longest > original;
        self.length = Some(if is_long { u64::MAX } else { original });
        if !is_long {
            self.rows = usize::try_from(original).unwrap_or(usize::MAX);
        }
        // An original length of 0 is refused with the rest.
        let factor = max_position as f64 / original.max(1) as f64;
        self.scaled(Scaling::LongRope(LongRopeScaling {
            factor: Some(factor.max(1.0)),
            short_mscale: keys.number("short_mscale")?,
            long_mscale: keys.number("long_mscale")?,
            ..LongRopeScaling::new(
                keys.needed_list("short_factor")?.to_vec(),
                keys.needed_list("long_factor")?.to_vec(),
                original,
            )
        }))
    }
}

/// As many positions as `arange` has of this length.
fn times(positions: u64, factor: f64) -> usize {
    (positions as f64 * factor).ceil() as usize
}

/// A dictionary.
struct Keys<'a>(&'a [(&'a str, Parameter<'a>)]);

impl<'a> Keys<'a> {
    fn get(&self, key: &str) -> Option<Parameter<'a>> {
        // The last one counts, as in a dictionary written out.
        let mut found = self.0.iter().rev().filter(|(name, _)| *name == key);
        found.next().map(|&(_, value)| value)
    }

    fn text(&self, key: &'static str) -> Result<Option<&'a str>, InterfaceError> {
        match self.get(key) {
            None => Ok(None),
            Some(Parameter::Text(text)) => Ok(Some(text)),
            Some(other) => Err(wrong_kind(key, other, "a string")),
        }
    }

    fn number(&self, key: &'static str) -> Result<Option<f64>, InterfaceError> {
        match self.get(key) {
            None => Ok(None),
            Some(Parameter::Number(number)) => Ok(Some(number)),
            Some(other) => Err(wrong_kind(key, other, "a number")),
        }
    }

    fn count(&self, key: &'static str) -> Result<Option<u64>, InterfaceError> {
        /// Whole numbers are exact in f64 up to here.
        const MOST: f64 = 9_007_199_254_740_992.0;
        match self.number(key)? {
            None => Ok(None),
            Some(number) if number.fract() == 0.0 && (0.0..=MOST).contains(&number) => {
                Ok(Some(number as u64))
            }
            Some(number) => Err(InterfaceError::value(
                key,
                number,
                "a whole number, from 0 to 2^53",
            )),
        }
    }

    fn flag(&self, key: &'static str) -> Result<Option<bool>, InterfaceError> {
        match self.get(key) {
            None => Ok(None),
            Some(Parameter::Flag(flag)) => Ok(Some(flag)),
            Some(other) => Err(wrong_kind(key, other, "true or false")),
        }
    }

    fn list(&self, key: &'static str) -> Result<Option<&'a [f64]>, InterfaceError> {
        match self.get(key) {
            None => Ok(None),
            Some(Parameter::Numbers(numbers)) => Ok(Some(numbers)),
            Some(other) => Err(wrong_kind(key, other, "a list of numbers")),
        }
    }

    fn needed_number(&self, key: &'static str) -> Result<f64, InterfaceError> {
        self.number(key)?.ok_or_else(|| missing(key))
    }

    fn needed_count(&self, key: &'static str) -> Result<u64, InterfaceError> {
        self.count(key)?.ok_or_else(|| missing(key))
    }

    fn needed_list(&self, key: &'static str) -> Result<&'a [f64], InterfaceError> {
        self.list(key)?.ok_or_else(|| missing(key))
    }

    /// What all forms of YaRN have in common, for a ramp as of so many times the original length, and
    /// that length, so many times.
    fn yarn(&self, times: u64) -> Result<(YarnScaling, u64), InterfaceError> {
        let original = self.needed_count(ORIGINAL)?.saturating_mul(times);
        let yarn = YarnScaling::new(self.needed_number("factor")?, original);
        let yarn = YarnScaling {
            beta_fast: self.number("beta_fast")?.unwrap_or(yarn.beta_fast),
            beta_slow: self.number("beta_slow")?.unwrap_or(yarn.beta_slow),
            ..yarn
        };
        Ok((yarn, original))
    }
}

fn missing(key: &'static str) -> InterfaceError {
    InterfaceError::Presence {
        argument: key,
        problem: "is missing: this rope_type needs it",
    }
}

fn wrong_kind(key: &'static str, value: Parameter<'_>, expected: &str) -> InterfaceError {
    let value = match value {
        Parameter::Number(number) => number.to_string(),
        Parameter::Text(text) => format!("{:?}", text.chars().take(40).collect::<String>()),
        Parameter::Flag(flag) => flag.to_string(),
        Parameter::Numbers(numbers) => cut(numbers),
    };
    InterfaceError::value(key, value, expected)
}

/// A list as a message shows it.
fn cut(numbers: &[f64]) -> String {
    match numbers.get(..8) {
        Some(first) if numbers.len() > 8 => format!("{first:?} and {} more", numbers.len() - 8),
        _ => format!("{numbers:?}"),
    }
}
