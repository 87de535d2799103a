use super::ConfigError;

/// How a model's frequencies differ from `theta^(-2i / rotary_dim)`, so as to serve longer
/// sequences than it was first trained on.
///
/// In what follows `f[i] = theta^(-2i / rotary_dim)` is the plain frequency of pair `i`, and a pair
/// makes `turns[i] = L * f[i] / 2π` turns over `L = original_max_position_embeddings` tokens.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub enum Scaling {
    /// `f[i]` as it is (`"default"`).
    #[default]
    None,
    /// Position interpolation, see [`LinearScaling`] (`"linear"`).
    Linear(LinearScaling),
    /// theta grows with the length of the sequence, see [`DynamicNtkScaling`] (`"dynamic"`).
    DynamicNtk(DynamicNtkScaling),
    /// theta grows in steps with the length of the sequence, see [`QwenNtkScaling`] (the first Qwen's
    /// `use_dynamic_ntk`).
    QwenNtk(QwenNtkScaling),
    /// theta is larger by a constant, see [`NtkAlphaScaling`] (`"dynamic"` with an `alpha`).
    NtkAlpha(NtkAlphaScaling),
    /// Slow pairs are interpolated, fast ones are not, see [`YarnScaling`] (`"yarn"`).
    Yarn(YarnScaling),
    /// A divisor for each pair, others for long sequences, see [`LongRopeScaling`] (`"longrope"`).
    LongRope(LongRopeScaling),
    /// Slow pairs are interpolated, fast ones are not, see [`Llama3Scaling`] (`"llama3"`).
    Llama3(Llama3Scaling),
    /// Only the fast pairs of the whole head turn, see [`ProportionalScaling`] (`"proportional"`).
    Proportional(ProportionalScaling),
}

impl Scaling {
    /// The name in messages.
    pub fn name(&self) -> &'static str {
        match self {
            Scaling::None => "default",
            Scaling::Linear(_) => "linear",
            Scaling::DynamicNtk(_) => "dynamic NTK",
            Scaling::QwenNtk(_) => "Qwen's NTK",
            Scaling::NtkAlpha(_) => "NTK with a constant alpha",
            Scaling::Yarn(_) => "YaRN",
            Scaling::LongRope(_) => "LongRoPE",
            Scaling::Llama3(_) => "llama3",
            Scaling::Proportional(_) => "proportional",
        }
    }

    /// Whether each parameter has a meaning by itself.
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        match self {
            Scaling::None => Ok(()),
            Scaling::Linear(linear) => positive("factor", linear.factor),
            Scaling::DynamicNtk(dynamic) => {
                at_least_1("factor", dynamic.factor)?;
                length("max_position_embeddings", dynamic.max_position_embeddings)
            }
            Scaling::QwenNtk(ntk) => length("seq_length", ntk.seq_length),
            Scaling::NtkAlpha(ntk) => at_least_1("alpha", ntk.alpha),
            Scaling::Yarn(yarn) => yarn.check(),
            Scaling::LongRope(long_rope) => long_rope.check(),
            Scaling::Llama3(llama3) => llama3.check(),
            Scaling::Proportional(proportional) => {
                positive("factor", proportional.factor)?;
                fraction("partial_rotary_factor", proportional.rotated)
            }
        }
    }
}

/// `f[i] / factor`: all positions are squeezed into the trained range. Chen et al., "Extending
/// Context Window of Large Language Models via Positional Interpolation" (2023).
///
/// ```
/// use phasor::config::{LinearScaling, RopeConfig, Scaling};
///
/// # fn main() -> Result<(), phasor::config::ConfigError> {
/// let plain = RopeConfig::new(10_000.0, 128)?;
/// let scaled = plain.clone().with_scaling(Scaling::Linear(LinearScaling { factor: 4.0 }))?;
/// // Token 400 turns as token 100 did.
/// assert_eq!(scaled.frequencies()?.cos_sin(3, 400), plain.frequencies()?.cos_sin(3, 100));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct LinearScaling {
    /// Divides the frequencies.
    pub factor: f64,
}

/// theta grows once a sequence is longer than the model was trained on: for
/// `L = max(length, max_position_embeddings)` it is
/// `theta * (factor * L / max_position_embeddings - (factor - 1))^(d / (d - 2))` with
/// `d = rotary_dim`. Known from posts of the users bloc97 and emozilla (2023); formula of Hugging
/// Face transformers.
///
/// ```
/// use phasor::config::{DynamicNtkScaling, RopeConfig, Scaling};
///
/// # fn main() -> Result<(), phasor::config::ConfigError> {
/// let config = RopeConfig::new(10_000.0, 128)?.with_scaling(Scaling::DynamicNtk(
///     DynamicNtkScaling { factor: 2.0, max_position_embeddings: 4096 },
/// ))?;
/// assert!(config.depends_on_length());
/// assert!(config.rope().is_err());
/// // One row of frequencies up to 4096 tokens and one for each length.
/// let rope = config.rope_for_lengths(&[8192, 16_384])?;
/// assert_eq!(rope.rotary_dim(), 128);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct DynamicNtkScaling {
    /// How fast theta grows; at least 1.
    pub factor: f64,
    /// Tokens that the model was trained on; at most so many leave theta as it is.
    pub max_position_embeddings: u64,
}

/// theta is `theta * alpha^(d / (d - 2))` with `d = rotary_dim` and
/// `alpha = 2^(ceil(log2(length / seq_length)) + 1) - 1`, and as it is up to `seq_length` tokens. The
/// first Qwen (2023), in whose code the length is that of the prompt, also for the tokens after it.
///
/// ```
/// use phasor::config::{QwenNtkScaling, RopeConfig, Scaling};
///
/// # fn main() -> Result<(), phasor::config::ConfigError> {
/// let config = RopeConfig::new(10_000.0, 128)?
///     .with_scaling(Scaling::QwenNtk(QwenNtkScaling { seq_length: 8192 }))?;
/// // theta is 10,000 * 3^(128 / 126) = 30,527.7 then.
/// let twice = config.frequencies_for_length(16_384)?.inv_freq()[1];
/// assert!((twice / 30_527.74f64.powf(-1.0 / 64.0) - 1.0).abs() < 1e-8);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct QwenNtkScaling {
    /// Tokens that the model was trained on.
    pub seq_length: u64,
}

/// theta is `theta * alpha^(d / (d - 2))` with `d = rotary_dim`, at every length. HunYuan's configs
/// say so, under the type `"dynamic"`.
///
/// ```
/// use phasor::config::{NtkAlphaScaling, RopeConfig, Scaling};
///
/// # fn main() -> Result<(), phasor::config::ConfigError> {
/// let config = RopeConfig::new(10_000.0, 128)?
///     .with_scaling(Scaling::NtkAlpha(NtkAlphaScaling { alpha: 1000.0 }))?;
/// assert!(!config.depends_on_length());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct NtkAlphaScaling {
    /// At least 1.
    pub alpha: f64,
}

/// Pairs that make fewer than `beta_slow` turns are interpolated (`f[i] / factor`), those that make
/// more than `beta_fast` are not, and a linear ramp over the pair index lies between. cos and sin
/// are multiplied by an attention factor. Peng et al., "YaRN: Efficient Context Window Extension of
/// Large Language Models" (2023); ends of the ramp and attention factor as in Hugging Face
/// transformers.
///
/// ```
/// use phasor::config::{RopeConfig, Scaling, YarnScaling};
///
/// # fn main() -> Result<(), phasor::config::ConfigError> {
/// // gpt-oss
/// let yarn = YarnScaling { truncate: false, ..YarnScaling::new(32.0, 4096) };
/// let config = RopeConfig::new(150_000.0, 64)?.with_scaling(Scaling::Yarn(yarn))?;
/// // 0.1 ln 32 + 1
/// assert_eq!(config.frequencies()?.attention_factor(), 1.346_573_6);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct YarnScaling {
    /// How many times longer sequences may be; at least 1.
    pub factor: f64,
    /// Tokens that the model was first trained on.
    pub original_max_position_embeddings: u64,
    /// Turns above which a pair keeps its frequency; 32 unless given.
    pub beta_fast: f64,
    /// Turns below which a pair is interpolated; 1 unless given.
    pub beta_slow: f64,
    /// What multiplies cos and sin; derived from the following two and the factor unless given.
    pub attention_factor: Option<f64>,
    /// With `mscale_all_dim`, DeepSeek's form of the attention factor:
    /// `(0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1)`. It is used where both
    /// are given and not 0; otherwise the attention factor is `0.1 ln(factor) + 1`.
    pub mscale: Option<f64>,
    /// See `mscale`.
    pub mscale_all_dim: Option<f64>,
    /// Whether the ramp begins and ends at whole pairs; true unless given.
    pub truncate: bool,
    /// Weight of the uninterpolated part, llama.cpp's `ext_factor`; 1 unless given.
    pub extrapolation_factor: f64,
}

impl YarnScaling {
    /// The parameters that have no default.
    pub const fn new(factor: f64, original_max_position_embeddings: u64) -> Self {
        Self {
            factor,
            original_max_position_embeddings,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: None,
            mscale: None,
            mscale_all_dim: None,
            truncate: true,
            extrapolation_factor: 1.0,
        }
    }

    fn check(&self) -> Result<(), ConfigError> {
        at_least_1("factor", self.factor)?;
        length(
            "original_max_position_embeddings",
            self.original_max_position_embeddings,
        )?;
        positive("beta_fast", self.beta_fast)?;
        positive("beta_slow", self.beta_slow)?;
        if self.beta_fast < self.beta_slow {
            return Err(ConfigError::invalid(
                "beta_fast",
                self.beta_fast,
                format!("at least beta_slow, which is {}", self.beta_slow),
            ));
        }
        check_attention_factor("attention_factor", self.attention_factor)?;
        for (key, value) in [
            ("mscale", self.mscale),
            ("mscale_all_dim", self.mscale_all_dim),
        ] {
            if let Some(value) = value
                && !(0.0..=LARGEST).contains(&value)
            {
                return Err(ConfigError::invalid(key, value, "at least 0 and finite"));
            }
        }
        if !(0.0..=1.0).contains(&self.extrapolation_factor) {
            return Err(ConfigError::invalid(
                "extrapolation_factor",
                self.extrapolation_factor,
                "from 0 to 1",
            ));
        }
        Ok(())
    }
}

/// `f[i] / short_factor[i]` up to `original_max_position_embeddings` tokens and
/// `f[i] / long_factor[i]` for longer sequences; cos and sin are multiplied by an attention factor.
/// Ding et al., "LongRoPE: Extending LLM Context Window Beyond 2 Million Tokens" (2024); Phi-3's
/// `"su"`.
///
/// ```
/// use phasor::config::{LongRopeScaling, RopeConfig, Scaling};
///
/// # fn main() -> Result<(), phasor::config::ConfigError> {
/// let long_rope = LongRopeScaling {
///     factor: Some(32.0), // 131,072 tokens instead of 4,096
///     ..LongRopeScaling::new(vec![1.0; 48], vec![4.0; 48], 4096)
/// };
/// let config = RopeConfig::new(10_000.0, 96)?.with_scaling(Scaling::LongRope(long_rope))?;
/// // Two rows of frequencies: each sequence uses one.
/// let rope = config.rope()?;
/// assert_eq!((rope.row_for_length(4096)?, rope.row_for_length(4097)?), (Some(0), Some(1)));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct LongRopeScaling {
    /// Divides the frequencies of short sequences, one entry per pair.
    pub short_factor: Vec<f64>,
    /// Divides those of long ones.
    pub long_factor: Vec<f64>,
    /// Tokens that the model was first trained on: the longest of the short sequences.
    pub original_max_position_embeddings: u64,
    /// How many times longer sequences may be; for the attention factor alone.
    pub factor: Option<f64>,
    /// What multiplies cos and sin, for short sequences too. Unless given,
    /// `sqrt(1 + ln(factor) / ln(original_max_position_embeddings))`, and 1 for a factor of at most
    /// 1 or none.
    pub attention_factor: Option<f64>,
    /// Takes the place of the attention factor for short sequences (Phi-3.5-MoE).
    pub short_mscale: Option<f64>,
    /// Takes the place of the attention factor for long sequences (Phi-3.5-MoE).
    pub long_mscale: Option<f64>,
}

impl LongRopeScaling {
    /// The parameters that have no default.
    pub fn new(
        short_factor: Vec<f64>,
        long_factor: Vec<f64>,
        original_max_position_embeddings: u64,
    ) -> Self {
        Self {
            short_factor,
            long_factor,
            original_max_position_embeddings,
            factor: None,
            attention_factor: None,
            short_mscale: None,
            long_mscale: None,
        }
    }

    fn check(&self) -> Result<(), ConfigError> {
        check_divisors("short_factor", &self.short_factor)?;
        check_divisors("long_factor", &self.long_factor)?;
        length(
            "original_max_position_embeddings",
            self.original_max_position_embeddings,
        )?;
        if let Some(factor) = self.factor {
            positive("factor", factor)?;
            if factor > 1.0
                && self.original_max_position_embeddings == 1
                && self.attention_factor.is_none()
            {
                return Err(ConfigError::invalid(
                    "original_max_position_embeddings",
                    1,
                    "at least 2, for the attention factor divides by its logarithm",
                ));
            }
        }
        check_attention_factor("attention_factor", self.attention_factor)?;
        check_attention_factor("short_mscale", self.short_mscale)?;
        check_attention_factor("long_mscale", self.long_mscale)
    }
}

/// Pairs that make fewer than `low_freq_factor` turns are interpolated (`f[i] / factor`), those
/// that make more than `high_freq_factor` are not, and between them the two are blended by the
/// number of turns. Llama 3.1 (2024).
///
/// ```
/// use phasor::config::{Llama3Scaling, RopeConfig, Scaling};
///
/// # fn main() -> Result<(), phasor::config::ConfigError> {
/// let config = RopeConfig::new(500_000.0, 128)?
///     .with_scaling(Scaling::Llama3(Llama3Scaling::new(8.0, 1.0, 4.0, 8192)))?;
/// assert_eq!(config.frequencies()?.pairs(), 64);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Llama3Scaling {
    /// How many times longer sequences may be; at least 1.
    pub factor: f64,
    /// Turns below which a pair is interpolated.
    pub low_freq_factor: f64,
    /// Turns above which a pair keeps its frequency; at least `low_freq_factor`. Where both are
    /// equal, as in Llama 4, nothing is blended.
    pub high_freq_factor: f64,
    /// Tokens that the model was first trained on.
    pub original_max_position_embeddings: u64,
}

impl Llama3Scaling {
    /// All parameters: none has a default.
    pub const fn new(
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_position_embeddings: u64,
    ) -> Self {
        Self {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        }
    }

    fn check(&self) -> Result<(), ConfigError> {
        at_least_1("factor", self.factor)?;
        positive("low_freq_factor", self.low_freq_factor)?;
        positive("high_freq_factor", self.high_freq_factor)?;
        if self.high_freq_factor < self.low_freq_factor {
            return Err(ConfigError::invalid(
                "high_freq_factor",
                self.high_freq_factor,
                format!(
                    "at least low_freq_factor, which is {}",
                    self.low_freq_factor
                ),
            ));
        }
        length(
            "original_max_position_embeddings",
            self.original_max_position_embeddings,
        )
    }
}

/// The first pairs of the whole head turn with `f[i] / factor`, `f` taken over `head_dim`; the other
/// pairs do not turn at all. Gemma 4 and LFM3. Unlike partial rotary, the pairs span the whole head:
/// half-split pairs are `(i, i + head_dim / 2)`.
///
/// ```
/// use phasor::config::{ProportionalScaling, RopeConfig, Scaling};
///
/// # fn main() -> Result<(), phasor::config::ConfigError> {
/// let config = RopeConfig::new(1_000_000.0, 512)?.with_scaling(Scaling::Proportional(
///     ProportionalScaling { rotated: 0.25, factor: 1.0 },
/// ))?;
/// let frequencies = config.frequencies()?;
/// assert_eq!(frequencies.pairs(), 256);
/// assert_eq!(frequencies.steps()[64..], [0; 192]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct ProportionalScaling {
    /// The part of the pairs that turns, above 0 and at most 1.
    pub rotated: f64,
    /// Divides the frequencies.
    pub factor: f64,
}

/// Larger parameters have no use, and products of smaller ones stay finite.
const LARGEST: f64 = 1e18;

fn positive(key: &str, value: f64) -> Result<(), ConfigError> {
    if (LARGEST.recip()..=LARGEST).contains(&value) {
        Ok(())
    } else {
        Err(ConfigError::invalid(
            key,
            value,
            "a positive number, from 1e-18 to 1e18",
        ))
    }
}

fn at_least_1(key: &str, value: f64) -> Result<(), ConfigError> {
    if (1.0..=LARGEST).contains(&value) {
        Ok(())
    } else {
        Err(ConfigError::invalid(
            key,
            value,
            "at least 1 and at most 1e18",
        ))
    }
}

pub(super) fn fraction(key: &str, value: f64) -> Result<(), ConfigError> {
    if value > 0.0 && value <= 1.0 {
        Ok(())
    } else {
        Err(ConfigError::invalid(key, value, "above 0 and at most 1"))
    }
}

fn length(key: &str, value: u64) -> Result<(), ConfigError> {
    // Lengths are compared with positions, which are i64.
    if value > 0 && i64::try_from(value).is_ok() {
        Ok(())
    } else {
        Err(ConfigError::invalid(
            key,
            value,
            "a number of tokens from 1 to 2^63 - 1",
        ))
    }
}

pub(super) fn check_attention_factor(key: &str, value: Option<f64>) -> Result<(), ConfigError> {
    match value {
        // It is used as an f32, and must be one that is not 0.
        Some(factor) if !(1e-30..=1e30).contains(&factor) => Err(ConfigError::invalid(
            key,
            factor,
            "a positive number, from 1e-30 to 1e30",
        )),
        _ => Ok(()),
    }
}

pub(super) fn check_divisors(key: &str, divisors: &[f64]) -> Result<(), ConfigError> {
    match divisors
        .iter()
        .position(|&divisor| divisor.is_nan() || divisor < LARGEST.recip())
    {
        None => Ok(()),
        Some(index) => Err(ConfigError::invalid(
            format!("{key}[{index}]"),
            divisors[index],
            "a positive number",
        )),
    }
}
