use super::axes::{Axes, GgmlMrope};
use super::error::shortened;
use super::gguf_architectures::{
    Architecture, Attention, Mode, Pattern, Score, Sliding, SlidingTheta, Switch, architecture,
};
use super::model::{LayerRule, Layers, ModelConfig};
use super::pairing::PairingRule;
use super::scaling::{LinearScaling, LongRopeScaling, Scaling, YarnScaling};
use super::{ConfigError, RopeConfig, formulas};
use crate::Pairing;

/// A value of a GGUF file's metadata, or the values of one of its small tensors, as the caller's
/// reader has it. Integers of all widths are given as one of 64 bits.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum GgufValue<'a> {
    /// An unsigned integer.
    U64(u64),
    /// A signed integer.
    I64(i64),
    /// A floating-point number; an f32 is given as the f64 of the same value.
    F64(f64),
    /// A truth value.
    Bool(bool),
    /// A string.
    Str(&'a str),
    /// An array, or a tensor of type F32.
    F32Array(&'a [f32]),
    /// An array.
    U32Array(&'a [u32]),
    /// An array.
    I32Array(&'a [i32]),
    /// An array.
    BoolArray(&'a [bool]),
}

/// More layers than any model has.
const MAX_LAYERS: u64 = 1 << 16;

const FULL: &str = "full_attention";
const SLIDING: &str = "sliding_attention";

impl ModelConfig {
    /// Reads the metadata of a GGUF file through `lookup`, the caller's own reader: given a key such
    /// as `llama.rope.freq_base`, or the name of a tensor (`rope_freqs.weight`,
    /// `rope_factors_long.weight`, `rope_factors_short.weight`), it returns the value, or `None` if
    /// the file has none.
    ///
    /// Pairing is that of llama.cpp for the architecture, for which the file's weights are stored:
    /// a `llama` file pairs interleaved although its `config.json` would say half-split. YaRN's ramp
    /// begins and ends at whole pairs, as it does there, also for models whose `config.json` says
    /// `"truncate": false`.
    ///
    /// ```
    /// use phasor::Pairing;
    /// use phasor::config::{GgufValue, ModelConfig};
    ///
    /// # fn main() -> Result<(), phasor::config::ConfigError> {
    /// let model = ModelConfig::from_gguf(|key| match key {
    ///     "general.architecture" => Some(GgufValue::Str("llama")),
    ///     "llama.embedding_length" => Some(GgufValue::U64(4096)),
    ///     "llama.attention.head_count" => Some(GgufValue::U64(32)),
    ///     "llama.rope.freq_base" => Some(GgufValue::F64(500_000.0)),
    ///     _ => None,
    /// })?;
    /// let config = model.rope()?;
    /// assert_eq!((config.head_dim(), config.pairing()), (128, Pairing::Interleaved));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// A [`ConfigError`] that names the key and what to change;
    /// [`ConfigError::UnknownArchitecture`] for an architecture whose pairing is not known.
    pub fn from_gguf<'a>(
        lookup: impl Fn(&str) -> Option<GgufValue<'a>>,
    ) -> Result<Self, ConfigError> {
        let name = match lookup("general.architecture") {
            Some(GgufValue::Str(name)) => name,
            Some(other) => {
                return Err(ConfigError::invalid(
                    "general.architecture",
                    display(other),
                    "a string",
                ));
            }
            None => {
                return Err(ConfigError::missing(
                    "general.architecture",
                    "every GGUF file has it: check the reader",
                ));
            }
        };
        let Some(architecture) = architecture(name) else {
            return Err(ConfigError::UnknownArchitecture {
                architecture: format!("{:?}", shortened(name)),
            });
        };
        if architecture.mode == Mode::None {
            return Err(ConfigError::NoRotation {
                what: format!("architecture {name:?}"),
            });
        }
        let file = File {
            lookup: &lookup,
            name,
            architecture,
        };
        if !file.rotates_at_all()? {
            return Err(ConfigError::NoRotation {
                what: format!("architecture {name:?}, as it is configured here,"),
            });
        }
        let (kinds, mut layers) = file.kinds()?;
        file.leave_out_layers_without_attention(&mut layers)?;
        Ok(ModelConfig {
            model_type: Some(name.to_string()),
            kinds,
            layers,
            vision: None,
            parts: Default::default(),
        })
    }
}

/// Which layers are attention of the tokens among each other.
enum Attending {
    All,
    Listed(Vec<bool>),
    /// The key would say it.
    Unknown(String),
}

struct File<'f, 'a> {
    lookup: &'f dyn Fn(&str) -> Option<GgufValue<'a>>,
    name: &'a str,
    architecture: &'static Architecture,
}

impl<'a> File<'_, 'a> {
    fn kinds(&self) -> Result<(Vec<(String, RopeConfig)>, Layers), ConfigError> {
        let count = self.count("block_count")?;
        let all = |rule| Layers { count, rule };
        let full = || -> Result<_, ConfigError> { Ok((FULL.to_string(), self.rope(false)?)) };
        let sliding = || -> Result<_, ConfigError> { Ok((SLIDING.to_string(), self.rope(true)?)) };
        let unknown = match self.architecture.sliding {
            Sliding::Own {
                pattern: Pattern::Given,
                ..
            } => "attention.sliding_window_pattern",
            _ => "block_count",
        };
        let listed = |slides: Option<Vec<bool>>, full: Option<usize>, sliding: usize| match slides {
            None => all(LayerRule::Unknown(self.key(unknown))),
            Some(slides) => {
                let kind = |&slides: &bool| if slides { Some(sliding) } else { full };
                all(LayerRule::Listed(slides.iter().map(kind).collect()))
            }
        };
        Ok(match self.architecture.sliding {
            Sliding::Own { pattern, .. } if self.slides()? => (
                vec![sliding()?, full()?],
                listed(self.sliding_layers(pattern, count)?, Some(1), 0),
            ),
            Sliding::AloneIfGiven(_) if !self.slides()? => (vec![full()?], all(LayerRule::All(0))),
            Sliding::Alone(pattern) | Sliding::AloneIfGiven(pattern) => (
                vec![(SLIDING.to_string(), self.rope(false)?)],
                listed(self.sliding_layers(pattern, count)?, None, 0),
            ),
            Sliding::Skips(_) | Sliding::SkipsBesideWindow(_) => {
                (vec![full()?], listed(self.skipping(count)?, None, 0))
            }
            _ => (vec![full()?], all(LayerRule::All(0))),
        })
    }

    /// Which layers rotate where every so many do not.
    fn skipping(&self, count: Option<u64>) -> Result<Option<Vec<bool>>, ConfigError> {
        let Some(count) = count else {
            return Ok(None);
        };
        self.check_layers(count)?;
        let window = self.number("attention.sliding_window")?;
        let period = match self.architecture.sliding {
            // llama.cpp means none, and leaves out the last one by its formula.
            Sliding::SkipsBesideWindow(_) if window == Some(0.0) => count,
            Sliding::Skips(period) | Sliding::SkipsBesideWindow(period) => period,
            _ => return Ok(None),
        };
        Ok(Some(
            (0..count).map(|layer| (layer + 1) % period != 0).collect(),
        ))
    }

    fn rotates_at_all(&self) -> Result<bool, ConfigError> {
        Ok(match self.architecture.switch {
            Switch::Always => true,
            Switch::Finetuned => match self.get("rope.scaling.finetuned") {
                None => true,
                Some(GgufValue::Bool(rotates)) => rotates,
                Some(_) => return Err(self.invalid("rope.scaling.finetuned", "true or false")),
            },
            Switch::Layers(layers) => {
                let count = self.count("block_count")?.ok_or_else(|| {
                    ConfigError::missing(
                        self.key("block_count"),
                        "it tells models with positions in the rotation from those without",
                    )
                })?;
                count == layers
            }
        })
    }

    fn leave_out_layers_without_attention(&self, layers: &mut Layers) -> Result<(), ConfigError> {
        let attends = match self.attending(layers.count)? {
            Attending::All => return Ok(()),
            Attending::Unknown(key) => {
                layers.rule = LayerRule::Unknown(key);
                return Ok(());
            }
            Attending::Listed(attends) => attends,
        };
        let kinds: Vec<Option<usize>> = match &layers.rule {
            LayerRule::All(kind) => vec![Some(*kind); attends.len()],
            LayerRule::Listed(kinds) => kinds.clone(),
            LayerRule::Unknown(_) => return Ok(()),
        };
        let attends = attends.into_iter().chain(std::iter::repeat(true));
        let kinds: Vec<_> = kinds
            .into_iter()
            .zip(attends)
            .map(|(kind, attends)| kind.filter(|_| attends))
            .collect();
        if kinds.iter().all(Option::is_none) {
            return Err(ConfigError::NoRotation {
                what: format!("architecture {:?}, without heads in any layer,", self.name),
            });
        }
        layers.rule = LayerRule::Listed(kinds);
        Ok(())
    }

    /// Which layers are attention of the tokens among each other.
    fn attending(&self, count: Option<u64>) -> Result<Attending, ConfigError> {
        let key = "attention.head_count_kv";
        if let Attention::Interval = self.architecture.attention {
            return self.attending_by_interval(count);
        }
        let heads = [self.flags("attention.head_count")?, self.flags(key)?];
        let length = heads.iter().flatten().map(Vec::len).max();
        let Some(length) = length else {
            // One number is for all layers.
            let told = self.architecture.attention == Attention::All || self.get(key).is_some();
            return Ok(if told {
                Attending::All
            } else {
                Attending::Unknown(self.key(key))
            });
        };
        if let Some(count) = count
            && length as u64 != count
        {
            let key = match &heads[1] {
                Some(_) => key,
                None => "attention.head_count",
            };
            return Err(self.invalid(
                key,
                format!("an array with an entry for each of {count} layers"),
            ));
        }
        let has = |layer: usize| {
            let mut lists = heads.iter().flatten();
            lists.all(|list| list.get(layer) != Some(&false))
        };
        Ok(Attending::Listed((0..length).map(has).collect()))
    }

    fn attending_by_interval(&self, count: Option<u64>) -> Result<Attending, ConfigError> {
        if let Some(recurrent) = self.flags("attention.recurrent_layers")? {
            let attends = recurrent.into_iter().map(|recurrent| !recurrent).collect();
            return Ok(Attending::Listed(attends));
        }
        let period = self.count("full_attention_interval")?.unwrap_or(4);
        let Some(count) = count else {
            return Ok(Attending::Unknown(self.key("block_count")));
        };
        self.check_layers(count)?;
        // Layers that predict further tokens come last, and attend.
        let further = match self.number("nextn_predict_layers")? {
            None | Some(0.0) => 0,
            Some(_) => self.count("nextn_predict_layers")?.unwrap_or(0),
        };
        let first = count.saturating_sub(further);
        let attends = |layer| layer >= first || (layer + 1) % period == 0;
        Ok(Attending::Listed((0..count).map(attends).collect()))
    }

    /// An array, entry by entry, with anything but 0 for true; `None` if it is absent or no array.
    fn flags(&self, name: &str) -> Result<Option<Vec<bool>>, ConfigError> {
        let flags: Vec<bool> = match self.get(name) {
            Some(GgufValue::BoolArray(entries)) => entries.to_vec(),
            Some(GgufValue::U32Array(entries)) => entries.iter().map(|&n| n != 0).collect(),
            Some(GgufValue::I32Array(entries)) => entries.iter().map(|&n| n != 0).collect(),
            _ => return Ok(None),
        };
        if flags.len() as u64 > MAX_LAYERS {
            return Err(self.invalid(name, format!("an array of at most {MAX_LAYERS}")));
        }
        Ok(Some(flags))
    }

    /// Whether any layer has a sliding window.
    fn slides(&self) -> Result<bool, ConfigError> {
        let window = self.number("attention.sliding_window")?;
        Ok(window.is_some_and(|window| window > 0.0))
    }

    fn sliding_layers(
        &self,
        pattern: Pattern,
        count: Option<u64>,
    ) -> Result<Option<Vec<bool>>, ConfigError> {
        let key = "attention.sliding_window_pattern";
        let mut pattern = pattern;
        if let Some(slides) = self.flags(key)? {
            return Ok(Some(slides));
        }
        if let Some(period) = self.count(key)? {
            pattern = match pattern {
                Pattern::FirstOf(_) => Pattern::FirstOf(period),
                _ => Pattern::LastOf(period),
            };
        }
        let Some(count) = count else {
            return Ok(None);
        };
        self.check_layers(count)?;
        Ok(match pattern {
            Pattern::Given => None,
            Pattern::LastOf(period) => {
                Some((0..count).map(|layer| (layer + 1) % period != 0).collect())
            }
            Pattern::FirstOf(period) => Some((0..count).map(|layer| layer % period != 0).collect()),
        })
    }

    fn check_layers(&self, count: u64) -> Result<(), ConfigError> {
        if count <= MAX_LAYERS {
            return Ok(());
        }
        Err(self.invalid("block_count", format!("at most {MAX_LAYERS}")))
    }

    /// The rotation of layers with or without a sliding window of their own.
    fn rope(&self, sliding: bool) -> Result<RopeConfig, ConfigError> {
        let head_dim = self.head_dim(sliding)?;
        let config =
            RopeConfig::new(self.theta(sliding)?, head_dim).map_err(|error| self.named(error))?;
        let rotary_dim = match self.dims("rope.dimension_count", sliding)? {
            Some(dims) => dims,
            None => head_dim,
        };
        let mut config = config
            .with_rotary_dim(rotary_dim)
            .map_err(|error| self.named(error))?;
        let scaling = if sliding {
            Scaling::None
        } else {
            self.scaling()?
        };
        config = config
            .with_scaling(scaling)
            .map_err(|error| error.within(&self.key("rope.scaling")))?;
        if !sliding && let Some(divisors) = self.tensor("rope_freqs.weight")? {
            config = config
                .with_frequency_divisors(divisors)
                .map_err(tensor_error)?;
        }
        config = self.with_pairing(config)?;
        let scale = self.score_scale(head_dim, config.scaling())?;
        config = config.with_score_scale(scale)?;
        if let Some(tokens) = self.count("context_length")? {
            config = config.with_max_position_embeddings(tokens);
        }
        config.check_all().map_err(|error| self.named(error))
    }

    /// An error under the name that the file has for the value.
    fn named(&self, error: ConfigError) -> ConfigError {
        let names = [
            ("head_dim", "attention.key_length"),
            ("rope_theta", "rope.freq_base"),
            ("rotary_dim", "rope.dimension_count"),
            ("dimension_sections", "rope.dimension_sections"),
        ];
        names.iter().fold(tensor_error(error), |error, (from, to)| {
            error.renamed(from, &self.key(to))
        })
    }

    fn theta(&self, sliding: bool) -> Result<f64, ConfigError> {
        let full = self.number("rope.freq_base")?.unwrap_or(10_000.0);
        if !sliding {
            return Ok(full);
        }
        let default = match self.architecture.sliding {
            Sliding::Own {
                theta: SlidingTheta::TenThousand,
                ..
            } => 10_000.0,
            _ => full,
        };
        Ok(self.number("rope.freq_base_swa")?.unwrap_or(default))
    }

    /// Dims of a head; with latent attention those of its rotated part.
    fn head_dim(&self, sliding: bool) -> Result<usize, ConfigError> {
        if let Score::Latent { .. } = self.architecture.score {
            return self.dims("rope.dimension_count", sliding)?.ok_or_else(|| {
                ConfigError::missing(
                    self.key("rope.dimension_count"),
                    "latent attention needs it",
                )
            });
        }
        match self.dims("attention.key_length", sliding)? {
            Some(dims) => Ok(dims),
            None => self.derived_head_dim(),
        }
    }

    fn derived_head_dim(&self) -> Result<usize, ConfigError> {
        let needed = |name: &str| {
            self.count(name)?.ok_or_else(|| {
                ConfigError::missing(
                    self.key(name),
                    format!("give it, or {}", self.key("attention.key_length")),
                )
            })
        };
        let heads = match self.first_heads()? {
            Some(heads) => heads,
            None => needed("attention.head_count")?,
        };
        let embedding = needed("embedding_length")?;
        usize::try_from(embedding / heads)
            .map_err(|_| self.invalid("embedding_length", "far smaller"))
    }

    /// Heads of the first layer that has any, where each layer has a number of its own.
    fn first_heads(&self) -> Result<Option<u64>, ConfigError> {
        let key = "attention.head_count";
        let found = match self.get(key) {
            Some(GgufValue::U32Array(heads)) => {
                heads.iter().find(|&&heads| heads > 0).map(|&n| n.into())
            }
            Some(GgufValue::I32Array(heads)) => heads
                .iter()
                .find(|&&heads| heads > 0)
                .and_then(|&heads| u64::try_from(heads).ok()),
            _ => return Ok(None),
        };
        match found {
            Some(heads) => Ok(Some(heads)),
            None => Err(self.invalid(key, "an array with a positive number")),
        }
    }

    /// A count of dims; layers with a sliding window may have one of their own.
    fn dims(&self, name: &str, sliding: bool) -> Result<Option<usize>, ConfigError> {
        let own = format!("{name}_swa");
        let name = if sliding && self.get(&own).is_some() {
            &own
        } else {
            name
        };
        let fits = |count| usize::try_from(count).map_err(|_| self.invalid(name, "far smaller"));
        self.count(name)?.map(fits).transpose()
    }

    fn scaling(&self) -> Result<Scaling, ConfigError> {
        let key = "rope.scaling.type";
        let rope_type = match self.get(key) {
            None => "linear",
            Some(GgufValue::Str(name)) => name,
            Some(_) => return Err(self.invalid(key, "a string")),
        };
        if !["none", "linear", "yarn", "longrope"].contains(&rope_type) {
            return Err(ConfigError::UnknownRopeType {
                key: self.key(key),
                value: format!("{:?}", shortened(rope_type)),
                known: "none, linear, yarn and longrope",
            });
        }
        let factor = self.factor(rope_type)?;
        let attention = self.number("rope.scaling.attn_factor")?.unwrap_or(1.0);
        let short = self.tensor("rope_factors_short.weight")?;
        let long = self.tensor("rope_factors_long.weight")?;
        if let (Some(short), Some(long)) = (&short, &long) {
            let by_factor = |divisors: &[f64]| divisors.iter().map(|d| d * factor).collect();
            return Ok(Scaling::LongRope(LongRopeScaling {
                attention_factor: Some(attention),
                ..LongRopeScaling::new(by_factor(short), by_factor(long), self.original()?)
            }));
        }
        if short.is_some() != long.is_some() || rope_type == "longrope" {
            let missing = if short.is_none() { "short" } else { "long" };
            return Err(ConfigError::missing(
                format!("rope_factors_{missing}.weight"),
                "LongRoPE needs the short and the long factors: give the tensor's values",
            ));
        }
        let given = self
            .number("rope.scaling.yarn_ext_factor")?
            .filter(|&weight| weight >= 0.0);
        let weight = given.unwrap_or(if rope_type == "yarn" { 1.0 } else { 0.0 });
        if weight == 0.0 {
            let beside = self.number("rope.scaling.yarn_attn_factor")?.unwrap_or(1.0);
            return self.interpolated(factor, attention * beside);
        }
        let mscale = self.attention_factor(factor)?;
        Ok(Scaling::Yarn(YarnScaling {
            beta_fast: self.number("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
            beta_slow: self.number("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
            attention_factor: Some(mscale * attention),
            mscale_all_dim: self.log_multiplier()?,
            extrapolation_factor: weight,
            ..YarnScaling::new(factor, self.original()?)
        }))
    }

    /// Every pair divided by the factor.
    fn interpolated(&self, factor: f64, attention: f64) -> Result<Scaling, ConfigError> {
        if attention != 1.0 {
            return Ok(Scaling::Yarn(YarnScaling {
                attention_factor: Some(attention),
                extrapolation_factor: 0.0,
                ..YarnScaling::new(factor, self.original()?)
            }));
        }
        Ok(if factor == 1.0 {
            Scaling::None
        } else {
            Scaling::Linear(LinearScaling { factor })
        })
    }

    /// The factor of linear and YaRN scaling; 0 counts as absent.
    fn factor(&self, rope_type: &str) -> Result<f64, ConfigError> {
        if rope_type == "none" {
            return Ok(1.0);
        }
        let given = match self.number("rope.scaling.factor")? {
            Some(factor) => Some(factor),
            None => self.number("rope.scale_linear")?,
        };
        Ok(given.filter(|&factor| factor != 0.0).unwrap_or(1.0))
    }

    /// Tokens that the model was first trained on.
    fn original(&self) -> Result<u64, ConfigError> {
        let key = "rope.scaling.original_context_length";
        if let Some(tokens) = self.count(key)? {
            return Ok(tokens);
        }
        self.count("context_length")?.ok_or_else(|| {
            ConfigError::missing(
                self.key(key),
                format!("scaling needs it, or {}", self.key("context_length")),
            )
        })
    }

    /// YaRN's attention factor as llama.cpp has it since December 2025.
    fn attention_factor(&self, factor: f64) -> Result<f64, ConfigError> {
        let over = match (self.log_multiplier()?, self.architecture.score) {
            (None, _) => return Ok(formulas::mscale(factor, 1.0).to_f64()),
            // DeepSeek's mscale and mscale_all_dim are equal.
            (Some(_), Score::Latent { .. }) => return Ok(1.0),
            (Some(all_dim), _) => formulas::mscale(factor, all_dim),
        };
        Ok(formulas::mscale(factor, 1.0).div(over).to_f64())
    }

    /// `mscale_all_dim`; 0 counts as absent.
    fn log_multiplier(&self) -> Result<Option<f64>, ConfigError> {
        let unit = match self.architecture.score {
            Score::Latent {
                log_multiplier_unit,
            } => log_multiplier_unit,
            _ => 1.0,
        };
        let given = self.number("rope.scaling.yarn_log_multiplier")?;
        Ok(given
            .filter(|&multiplier| multiplier != 0.0)
            .map(|m| m / f64::from(unit)))
    }

    fn with_pairing(&self, config: RopeConfig) -> Result<RopeConfig, ConfigError> {
        let rule = PairingRule::GgufArchitecture(self.name.to_string());
        let sections = self.sections()?;
        let used = sections.filter(|sections| sections[0] > 0 && sections[1] > 0);
        let (pairing, mode) = match (self.architecture.mode, used) {
            (Mode::Mrope, _) => (Pairing::HalfSplit, Some(GgmlMrope::Mrope)),
            (Mode::Imrope, _) => (Pairing::HalfSplit, Some(GgmlMrope::Imrope)),
            (Mode::MropeOrInterleaved | Mode::MropeOrHalfSplit, Some(_)) => {
                (Pairing::HalfSplit, Some(GgmlMrope::Mrope))
            }
            (Mode::Interleaved | Mode::MropeOrInterleaved, _) => (Pairing::Interleaved, None),
            (Mode::HalfSplit | Mode::MropeOrHalfSplit | Mode::None, _) => {
                (Pairing::HalfSplit, None)
            }
        };
        let config = config.with_pairing_by(pairing, rule);
        match (mode, sections) {
            (None, _) => Ok(config),
            (Some(mode), Some(sections)) => Ok(config.with_axes(Axes::Ggml { mode, sections })),
            (Some(_), None) => Err(ConfigError::missing(
                self.key("rope.dimension_sections"),
                format!("architecture {:?} needs it", self.name),
            )),
        }
    }

    fn sections(&self) -> Result<Option<[usize; 4]>, ConfigError> {
        let key = "rope.dimension_sections";
        let entries: Vec<i64> = match self.get(key) {
            None => return Ok(None),
            Some(GgufValue::U32Array(entries)) => entries.iter().map(|&n| n.into()).collect(),
            Some(GgufValue::I32Array(entries)) => entries.iter().map(|&n| n.into()).collect(),
            Some(_) => return Err(self.invalid(key, "an array of integers")),
        };
        let mut sections = [0; 4];
        if entries.is_empty() || entries.len() > sections.len() {
            return Err(self.invalid(key, "an array of up to 4 integers"));
        }
        for (section, &entry) in sections.iter_mut().zip(&entries) {
            *section =
                usize::try_from(entry).map_err(|_| self.invalid(key, "integers of at least 0"))?;
        }
        Ok(Some(sections))
    }

    fn score_scale(&self, head_dim: usize, scaling: &Scaling) -> Result<f64, ConfigError> {
        if let Some(scale) = self
            .number("attention.scale")?
            .filter(|&scale| scale != 0.0)
        {
            if scale > 0.0 {
                return Ok(scale);
            }
            return Err(self.invalid("attention.scale", "a positive number"));
        }
        let of_dims = |dims: f64| dims.sqrt().recip();
        let head_dim = head_dim as f64;
        Ok(match self.architecture.score {
            Score::HeadDim => of_dims(head_dim),
            Score::One => 1.0,
            Score::HeadDimUnless(layers) if self.count("block_count")? == Some(layers) => {
                of_dims(self.derived_head_dim()? as f64)
            }
            Score::HeadDimUnless(_) => of_dims(head_dim),
            Score::Latent { .. } => {
                let dims = match self.count("attention.key_length_mla")? {
                    Some(dims) => dims,
                    None => self.count("attention.key_length")?.ok_or_else(|| {
                        ConfigError::missing(
                            self.key("attention.key_length_mla"),
                            "latent attention needs it",
                        )
                    })?,
                };
                let mscale = match scaling {
                    Scaling::Yarn(YarnScaling {
                        factor,
                        mscale_all_dim: Some(all_dim),
                        ..
                    }) => formulas::mscale(*factor, *all_dim).to_f64(),
                    _ => 1.0,
                };
                of_dims(dims as f64) * mscale * mscale
            }
        })
    }

    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.name)
    }

    fn get(&self, name: &str) -> Option<GgufValue<'a>> {
        (self.lookup)(&self.key(name))
    }

    fn invalid(&self, name: &str, expected: impl Into<String>) -> ConfigError {
        let value = self.get(name).map_or_else(|| "absent".to_string(), display);
        ConfigError::invalid(self.key(name), value, expected)
    }

    fn number(&self, name: &str) -> Result<Option<f64>, ConfigError> {
        match self.get(name) {
            None => Ok(None),
            Some(GgufValue::F64(number)) if number.is_finite() => Ok(Some(number)),
            Some(GgufValue::U64(number)) => Ok(Some(number as f64)),
            Some(GgufValue::I64(number)) => Ok(Some(number as f64)),
            Some(_) => Err(self.invalid(name, "a number")),
        }
    }

    /// A positive whole number.
    fn count(&self, name: &str) -> Result<Option<u64>, ConfigError> {
        let number = match self.get(name) {
            None => return Ok(None),
            Some(GgufValue::U64(number)) => number,
            Some(GgufValue::I64(number)) => u64::try_from(number).unwrap_or(0),
            Some(_) => 0,
        };
        if number == 0 {
            return Err(self.invalid(name, "a positive whole number"));
        }
        Ok(Some(number))
    }

    fn tensor(&self, name: &str) -> Result<Option<Vec<f64>>, ConfigError> {
        match (self.lookup)(name) {
            None => Ok(None),
            Some(GgufValue::F32Array(values)) => {
                Ok(Some(values.iter().map(|&value| f64::from(value)).collect()))
            }
            Some(other) => Err(ConfigError::invalid(
                name,
                display(other),
                "an array of f32",
            )),
        }
    }
}

/// Names the tensor that a list came from.
fn tensor_error(error: ConfigError) -> ConfigError {
    let tensor_of = |key: &str| {
        [
            ("divisors", "rope_freqs.weight"),
            ("short_factor", "rope_factors_short.weight"),
            ("long_factor", "rope_factors_long.weight"),
        ]
        .into_iter()
        .find_map(|(list, tensor)| {
            let rest = key.strip_prefix(list)?;
            Some(format!("{tensor}{rest}"))
        })
    };
    match error {
        ConfigError::Invalid {
            key,
            value,
            expected,
        } => ConfigError::Invalid {
            key: tensor_of(&key).unwrap_or(key),
            value,
            expected,
        },
        other => other,
    }
}

/// A value as it is named in messages.
fn display(value: GgufValue<'_>) -> String {
    match value {
        GgufValue::U64(number) => number.to_string(),
        GgufValue::I64(number) => number.to_string(),
        GgufValue::F64(number) => number.to_string(),
        GgufValue::Bool(flag) => flag.to_string(),
        GgufValue::Str(text) => format!("{:?}", shortened(text)),
        GgufValue::F32Array(values) => format!("an array of {}", values.len()),
        GgufValue::U32Array(values) => format!("an array of {}", values.len()),
        GgufValue::I32Array(values) => format!("an array of {}", values.len()),
        GgufValue::BoolArray(values) => format!("an array of {}", values.len()),
    }
}
