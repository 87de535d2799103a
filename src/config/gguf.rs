mod architectures;
mod file;
mod layers;
mod value;

use self::architectures::{
    Architecture, Dims, Factors, Head, LogMultiplier, Mode, Score, SlidingScaling, SlidingTheta,
    Theta, Window, architecture, meant,
};
use self::file::{File, tensor_error};
use self::value::display;
use super::axes::{Axes, GgmlMrope};
use super::error::shortened;
use super::model::ModelConfig;
use super::pairing::PairingRule;
use super::scaling::{LinearScaling, LongRopeScaling, NtkAlphaScaling, Scaling, YarnScaling};
use super::{ConfigError, RopeConfig, formulas};
use crate::Pairing;
use crate::angle::DoubleDouble;

pub use self::value::GgufValue;

const FREQS: &str = "rope_freqs.weight";
const SHORT: &str = "rope_factors_short.weight";
const LONG: &str = "rope_factors_long.weight";

/// A kind of layers that rotate alike.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Full,
    Sliding,
    /// DeepSeek-V4's layers without compression.
    Main,
    Compressed,
}

impl Kind {
    /// As configs of Hugging Face call it.
    fn name(self) -> &'static str {
        match self {
            Kind::Full => "full_attention",
            Kind::Sliding => "sliding_attention",
            Kind::Main => "main",
            Kind::Compressed => "compress",
        }
    }
}

/// What llama.cpp's context makes of the keys about scaling, for all layers.
struct Context {
    longrope: bool,
    /// By which frequencies are divided.
    factor: f64,
    /// How far YaRN's ramp applies: 0 for none.
    weight: f64,
    /// What multiplies cos and sin where frequencies are scaled.
    scaled: DoubleDouble,
    /// The same, with what ggml multiplies into it for scaled frequencies divided out.
    unscaled: DoubleDouble,
}

impl ModelConfig {
    /// Reads the metadata of a GGUF file through `lookup`, the caller's own reader: given a key such
    /// as `llama.rope.freq_base`, or the name of a tensor (`rope_freqs.weight`,
    /// `rope_factors_long.weight`, `rope_factors_short.weight`), it returns the value, or `None` if
    /// the file has none.
    ///
    /// Everything is as in llama.cpp, whose converters write these files: pairing goes by the
    /// architecture, for which the file's weights are stored (a `llama` file pairs interleaved
    /// although its `config.json` would say half-split), and so do windows, layers that do not
    /// rotate, and which keys count. YaRN's ramp begins and ends at whole pairs, also for models
    /// whose `config.json` says `"truncate": false`.
    ///
    /// ```
    /// use phasor::Pairing;
    /// use phasor::config::ModelConfig;
    ///
    /// # fn main() -> Result<(), phasor::config::ConfigError> {
    /// let model = ModelConfig::from_gguf(|key| match key {
    ///     "general.architecture" => Some("llama".into()),
    ///     "llama.embedding_length" => Some(4096u32.into()),
    ///     "llama.attention.head_count" => Some(32u32.into()),
    ///     "llama.rope.freq_base" => Some(500_000f32.into()),
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
    /// [`ConfigError::UnknownArchitecture`] for an architecture whose pairing is not known, with
    /// llama.cpp's name for it where the file has another;
    /// [`ConfigError::Unsupported`] for a file that llama.cpp would not load: one with
    /// `rope_freqs.weight` in an architecture that has no such tensor there.
    pub fn from_gguf<'a>(
        lookup: impl Fn(&str) -> Option<GgufValue<'a>>,
    ) -> Result<Self, ConfigError> {
        let name = match lookup("general.architecture") {
            Some(GgufValue::Str(name)) => name,
            Some(other) => {
                return Err(ConfigError::invalid(
                    "general.architecture",
                    display(&other),
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
        let Some(architecture) = architecture(&name) else {
            return Err(ConfigError::UnknownArchitecture {
                architecture: format!("{:?}", shortened(&name)),
                meant: meant(&name),
            });
        };
        if architecture.mode == Mode::None {
            return Err(ConfigError::NoRotation {
                what: format!("architecture {name:?}"),
            });
        }
        let file = File {
            lookup: &lookup,
            name: &name,
            architecture,
        };
        if !file.rotates_at_all()? {
            return Err(ConfigError::NoRotation {
                what: format!("architecture {name:?}, as it is configured here,"),
            });
        }
        file.refuse_unknown_factors()?;
        let (kinds, layers) = file.kinds()?;
        Ok(ModelConfig {
            model_type: Some(name.to_string()),
            kinds,
            layers,
            vision: None,
            parts: Default::default(),
        })
    }
}

impl Architecture {
    fn has_freqs(&self, longrope: bool) -> bool {
        match self.factors {
            Factors::Unread | Factors::Long => false,
            Factors::IgnoredFreqs | Factors::Freqs | Factors::FreqsUnlessSliding => true,
            Factors::IgnoredFreqsOrLong
            | Factors::FreqsOrLong
            | Factors::FreqsOrLongUnlessSliding => !longrope,
        }
    }

    fn has_long_factors(&self, longrope: bool) -> bool {
        match self.factors {
            Factors::Long => true,
            Factors::IgnoredFreqsOrLong
            | Factors::FreqsOrLong
            | Factors::FreqsOrLongUnlessSliding => longrope,
            _ => false,
        }
    }
}

impl File<'_, '_> {
    /// llama.cpp does not load files with tensors that it does not know.
    fn refuse_unknown_factors(&self) -> Result<(), ConfigError> {
        let longrope = self.rope_type()? == "longrope";
        let architecture = self.architecture;
        let unknown = [
            (FREQS, architecture.has_freqs(longrope)),
            (SHORT, architecture.has_long_factors(longrope)),
            (LONG, architecture.has_long_factors(longrope)),
        ];
        let mut unknown = unknown.into_iter().filter(|(_, known)| !known);
        let Some((tensor, _)) = unknown.find(|(tensor, _)| (self.lookup)(tensor).is_some()) else {
            return Ok(());
        };
        if tensor != FREQS && architecture.has_long_factors(true) {
            return Err(self.invalid(
                "rope.scaling.type",
                format!("\"longrope\", for the file has {tensor}"),
            ));
        }
        Err(ConfigError::Unsupported {
            what: format!("{tensor} in a file of architecture {:?}", self.name),
            why: "llama.cpp knows no such tensor there and does not load the file, so it is not \
                  known how it is meant"
                .to_string(),
        })
    }

    /// The rotation of a kind of layers.
    fn rope(&self, kind: Kind) -> Result<RopeConfig, ConfigError> {
        let head_dim = self.head_dim(kind)?;
        let theta = self.theta(kind)?;
        let config = RopeConfig::new(theta, head_dim).map_err(|error| self.named(error))?;
        let rotary_dim = match self.rotary_dim(kind)? {
            Some(dims) => dims,
            None => head_dim,
        };
        let mut config = config
            .with_rotary_dim(rotary_dim)
            .map_err(|error| self.named(error))?;
        if self.is_like_deepseek4()? {
            config = config.with_trailing_rotation();
        }
        let context = self.context()?;
        let (scaling, attention) = self.scaling(kind, &context)?;
        config = config
            .with_scaling(scaling)
            .map_err(|error| error.within(&self.key("rope.scaling")))?;
        if attention != 1.0 {
            let key = self.key("rope.scaling.attn_factor");
            config = config
                .with_attention_factor(attention)
                .map_err(|error| error.renamed("attention_factor", &key))?;
        }
        if let Some(divisors) = self.divisors(kind)? {
            config = config
                .with_frequency_divisors(divisors)
                .map_err(tensor_error)?;
        }
        config = self.with_pairing(config)?;
        let scale = self.score_scale(kind, head_dim, &context)?;
        config = config.with_score_scale(scale)?;
        if let Some(tokens) = self.count("context_length")? {
            config = config.with_max_position_embeddings(tokens);
        }
        config.check_all().map_err(|error| self.named(error))
    }

    fn theta(&self, kind: Kind) -> Result<f64, ConfigError> {
        const DEFAULT: f64 = 10_000.0;
        if kind == Kind::Compressed {
            let key = "attention.compress_rope_freq_base";
            let given = self.number(key)?;
            return given.ok_or_else(|| self.missing(key, "layers with compression need it"));
        }
        let full = self.number("rope.freq_base")?.unwrap_or(DEFAULT);
        if self.architecture.theta == Theta::Fixed && full != DEFAULT {
            return Err(self.invalid(
                "rope.freq_base",
                "10000, with which llama.cpp rotates this architecture always",
            ));
        }
        let default = match self.architecture.sliding.theta {
            _ if kind != Kind::Sliding => return Ok(full),
            SlidingTheta::Shared => return Ok(full),
            SlidingTheta::TenThousand => DEFAULT,
            SlidingTheta::Same => full,
        };
        Ok(self.number("rope.freq_base_swa")?.unwrap_or(default))
    }

    /// Dims of a head; with latent attention those of its rotated part.
    fn head_dim(&self, kind: Kind) -> Result<usize, ConfigError> {
        let needed = || self.missing("rope.dimension_count", "latent attention needs it");
        let of_key = || match self.dims("attention.key_length", self.has_own_head(kind)?)? {
            Some(dims) => Ok(dims),
            None => self.derived_head_dim(),
        };
        match (self.architecture.head, self.rotary_dim(kind)?) {
            (Head::Latent | Head::Rotated, Some(dims)) => Ok(dims),
            (Head::Latent, None) => Err(needed()),
            (Head::Rotated, None) | (Head::KeyLength, _) => of_key(),
        }
    }

    /// Dims that rotate, where the file says so or the architecture sets them apart from the head.
    fn rotary_dim(&self, kind: Kind) -> Result<Option<usize>, ConfigError> {
        let own = match self.architecture.dims {
            Dims::AsFirst => self.first_slides()?,
            Dims::RotatedPerLayer => kind == Kind::Sliding || self.first_slides()?,
            Dims::PerLayer | Dims::RotatedHalfUnlessSliding => kind == Kind::Sliding,
        };
        let given = self.dims("rope.dimension_count", own)?;
        if self.architecture.dims == Dims::RotatedHalfUnlessSliding && kind != Kind::Sliding {
            let whole = match given {
                Some(dims) => dims,
                None => self.derived_or_given_head_dim()?,
            };
            return Ok(Some(whole / 2));
        }
        Ok(given)
    }

    fn derived_or_given_head_dim(&self) -> Result<usize, ConfigError> {
        match self.dims("attention.key_length", false)? {
            Some(dims) => Ok(dims),
            None => self.derived_head_dim(),
        }
    }

    fn has_own_head(&self, kind: Kind) -> Result<bool, ConfigError> {
        match self.architecture.dims {
            Dims::PerLayer => Ok(kind == Kind::Sliding),
            _ => self.first_slides(),
        }
    }

    fn derived_head_dim(&self) -> Result<usize, ConfigError> {
        let needed = |name: &str| {
            self.count(name)?.ok_or_else(|| {
                self.missing(
                    name,
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

    /// A count of dims; layers with a sliding window may have one of their `own`.
    fn dims(&self, name: &str, own: bool) -> Result<Option<usize>, ConfigError> {
        let of_sliding = format!("{name}_swa");
        let name = if own && self.get(&of_sliding).is_some() {
            &of_sliding
        } else {
            name
        };
        let fits = |count| usize::try_from(count).map_err(|_| self.invalid(name, "far smaller"));
        self.count(name)?.map(fits).transpose()
    }

    /// What the last dims of a head rotate in, without scaling unless layers compress.
    fn is_like_deepseek4(&self) -> Result<bool, ConfigError> {
        Ok(match (self.architecture.window, self.architecture.mode) {
            (Window::Compressed, _) => true,
            (_, Mode::Draft) => {
                self.axes()?.is_none() && self.whole("hyper_connection.count")?.unwrap_or(0) > 0
            }
            _ => false,
        })
    }

    fn rope_type(&self) -> Result<String, ConfigError> {
        let key = "rope.scaling.type";
        let rope_type = match self.get(key) {
            None => return Ok("linear".to_string()),
            Some(GgufValue::Str(name)) => name,
            Some(_) => return Err(self.invalid(key, "a string")),
        };
        if !["none", "linear", "yarn", "longrope"].contains(&&*rope_type) {
            return Err(ConfigError::UnknownRopeType {
                key: self.key(key),
                value: format!("{:?}", shortened(&rope_type)),
                known: "none, linear, yarn and longrope",
            });
        }
        Ok(rope_type.into_owned())
    }

    fn context(&self) -> Result<Context, ConfigError> {
        let rope_type = self.rope_type()?;
        let factor = self.factor(&rope_type)?;
        let keys = self.architecture.yarn;
        let given = match keys.factors {
            true => self.number("rope.scaling.yarn_ext_factor")?,
            false => None,
        };
        let of_type = if rope_type == "yarn" { 1.0 } else { 0.0 };
        let weight = given.filter(|&weight| weight >= 0.0).unwrap_or(of_type);
        let attention = self.number("rope.scaling.attn_factor")?.unwrap_or(1.0);
        let beside = match keys.factors {
            true => self.number("rope.scaling.yarn_attn_factor")?.unwrap_or(1.0),
            false => 1.0,
        };
        let (scaled, unscaled) = if weight == 0.0 {
            (DoubleDouble::from(beside), DoubleDouble::from(beside))
        } else {
            let scaled = self.mscale_ratio(factor)?;
            (scaled, scaled.div(growth(factor, 1.0)))
        };
        Ok(Context {
            longrope: rope_type == "longrope",
            factor,
            weight,
            scaled: scaled.mul(attention.into()),
            unscaled: unscaled.mul(attention.into()),
        })
    }

    /// The scaling of a kind of layers, and what multiplies cos and sin beside it.
    fn scaling(&self, kind: Kind, context: &Context) -> Result<(Scaling, f64), ConfigError> {
        let plain = match (kind, self.architecture.sliding.scaling) {
            (Kind::Main, _) | (Kind::Sliding, SlidingScaling::Plain) => true,
            (Kind::Compressed, _) => false,
            _ => self.architecture.theta == Theta::Fixed || self.is_like_deepseek4()?,
        };
        if plain {
            return Ok((Scaling::None, 1.0));
        }
        let unscaled = self.architecture.sliding.scaling == SlidingScaling::FrequenciesUnscaled;
        if kind == Kind::Sliding && unscaled {
            return Ok((Scaling::None, context.unscaled.to_f64()));
        }
        // llama.cpp cancels it for DeepSeek-V4.
        let attention = match kind {
            Kind::Compressed => 1.0,
            _ => context.scaled.to_f64(),
        };
        if let Some(rows) = self.long_rope(kind, context, attention)? {
            return Ok((rows, 1.0));
        }
        if context.weight != 0.0 {
            return Ok((self.yarn(context, attention)?, 1.0));
        }
        let scaling = match (context.factor, self.stretch()?) {
            (1.0, None) => Scaling::None,
            (1.0, Some(alpha)) => Scaling::NtkAlpha(NtkAlphaScaling { alpha }),
            (factor, None) => Scaling::Linear(LinearScaling { factor }),
            (_, Some(_)) => return Err(self.stretched_and_scaled()),
        };
        Ok((scaling, attention))
    }

    fn yarn(&self, context: &Context, attention: f64) -> Result<Scaling, ConfigError> {
        if self.stretch()?.is_some() {
            return Err(self.stretched_and_scaled());
        }
        let keys = self.architecture.yarn;
        let turns = |name: &str, default: f64| -> Result<f64, ConfigError> {
            match keys.betas {
                true => Ok(self.number(name)?.unwrap_or(default)),
                false => Ok(default),
            }
        };
        Ok(Scaling::Yarn(YarnScaling {
            beta_fast: turns("rope.scaling.yarn_beta_fast", keys.beta_fast)?,
            beta_slow: turns("rope.scaling.yarn_beta_slow", 1.0)?,
            attention_factor: Some(attention),
            mscale_all_dim: self.mscale_all_dim()?,
            extrapolation_factor: context.weight,
            ..YarnScaling::new(context.factor, self.original()?)
        }))
    }

    fn long_rope(
        &self,
        kind: Kind,
        context: &Context,
        attention: f64,
    ) -> Result<Option<Scaling>, ConfigError> {
        let factors = self.architecture.factors;
        let read = match factors {
            Factors::Long => true,
            Factors::FreqsOrLong | Factors::FreqsOrLongUnlessSliding => context.longrope,
            _ => false,
        };
        if !read {
            return match context.longrope {
                true => Err(ConfigError::Unsupported {
                    what: format!("{}, which is \"longrope\",", self.key("rope.scaling.type")),
                    why: "llama.cpp has no factors for this architecture".to_string(),
                }),
                false => Ok(None),
            };
        }
        let sliding = kind == Kind::Sliding;
        if sliding && factors == Factors::FreqsOrLongUnlessSliding {
            return Ok(None);
        }
        let (short, long) = (self.tensor(SHORT)?, self.tensor(LONG)?);
        let (short, long) = match (short, long) {
            (Some(short), Some(long)) => (short, long),
            (None, None) if !context.longrope => return Ok(None),
            (short, _) => {
                let missing = if short.is_none() { SHORT } else { LONG };
                return Err(ConfigError::missing(
                    missing,
                    "LongRoPE needs the short and the long factors: give the tensor's values",
                ));
            }
        };
        if context.weight != 0.0 {
            return Err(self.invalid(
                "rope.scaling.type",
                format!("\"longrope\", for the file has {LONG}"),
            ));
        }
        let entries = self.entries(kind)?;
        let by_factor = |divisors: &[f64]| {
            let first = divisors.iter().take(entries);
            first.map(|d| d * context.factor).collect()
        };
        Ok(Some(Scaling::LongRope(LongRopeScaling {
            attention_factor: Some(attention),
            ..LongRopeScaling::new(by_factor(&short), by_factor(&long), self.original()?)
        })))
    }

    fn divisors(&self, kind: Kind) -> Result<Option<Vec<f64>>, ConfigError> {
        let read = match self.architecture.factors {
            Factors::Unread
            | Factors::IgnoredFreqs
            | Factors::IgnoredFreqsOrLong
            | Factors::Long => false,
            Factors::FreqsUnlessSliding | Factors::FreqsOrLongUnlessSliding => {
                kind != Kind::Sliding
            }
            Factors::Freqs | Factors::FreqsOrLong => true,
        };
        let draft = self.architecture.mode == Mode::Draft;
        if !read || draft && (self.axes()?.is_some() || self.is_like_deepseek4()?) {
            return Ok(None);
        }
        let mut divisors = self.tensor(FREQS)?;
        if let Some(divisors) = &mut divisors {
            divisors.truncate(self.entries(kind)?);
        }
        Ok(divisors)
    }

    /// How many entries of the tensors of factors count: of those that are for layers with more
    /// rotated pairs too, the first ones.
    fn entries(&self, kind: Kind) -> Result<usize, ConfigError> {
        match (self.architecture.dims, self.rotary_dim(kind)?) {
            (Dims::RotatedHalfUnlessSliding, Some(dims)) => Ok(dims / 2),
            _ => Ok(usize::MAX),
        }
    }

    /// By how much theta is stretched.
    fn stretch(&self) -> Result<Option<f64>, ConfigError> {
        if self.architecture.theta != Theta::Stretched {
            return Ok(None);
        }
        let alpha = self.number("rope.scaling.alpha")?;
        Ok(alpha.filter(|&alpha| alpha > 0.0))
    }

    fn stretched_and_scaled(&self) -> ConfigError {
        ConfigError::Unsupported {
            what: format!(
                "{} beside {}",
                self.key("rope.scaling.alpha"),
                self.key("rope.scaling.factor")
            ),
            why: "a RopeConfig has one scaling".to_string(),
        }
    }

    /// The factor of linear and YaRN scaling; 0 counts as absent.
    fn factor(&self, rope_type: &str) -> Result<f64, ConfigError> {
        if rope_type == "none" {
            return Ok(1.0);
        }
        let key = match self.get("rope.scaling.factor") {
            Some(_) => "rope.scaling.factor",
            None => "rope.scale_linear",
        };
        match self.number(key)? {
            None | Some(0.0) => Ok(1.0),
            Some(factor) if factor.is_sign_negative() => {
                Err(self.invalid(key, "a positive number"))
            }
            Some(factor) => Ok(factor),
        }
    }

    /// Tokens that the model was first trained on.
    fn original(&self) -> Result<u64, ConfigError> {
        let key = "rope.scaling.original_context_length";
        if let Some(tokens) = self.count(key)? {
            return Ok(tokens);
        }
        self.count("context_length")?.ok_or_else(|| {
            self.missing(
                key,
                format!("scaling needs it, or {}", self.key("context_length")),
            )
        })
    }

    /// YaRN's attention factor as llama.cpp has it since December 2025.
    fn mscale_ratio(&self, factor: f64) -> Result<DoubleDouble, ConfigError> {
        let over = match (
            self.mscale_all_dim()?,
            self.architecture.yarn.log_multiplier,
        ) {
            (Some(_), LogMultiplier::Both(_)) => return Ok(DoubleDouble::ONE),
            (Some(all_dim), _) => formulas::mscale(factor, all_dim),
            (None, _) => DoubleDouble::ONE,
        };
        Ok(formulas::mscale(factor, 1.0).div(over))
    }

    /// `mscale_all_dim`; 0 counts as absent.
    fn mscale_all_dim(&self) -> Result<Option<f64>, ConfigError> {
        let (LogMultiplier::AllDim(unit) | LogMultiplier::Both(unit)) =
            self.architecture.yarn.log_multiplier
        else {
            return Ok(None);
        };
        let given = self.number("rope.scaling.yarn_log_multiplier")?;
        Ok(given
            .filter(|&multiplier| multiplier != 0.0)
            .map(|m| m / f64::from(unit)))
    }

    /// The axes, for an architecture that has them where the file gives sections.
    fn axes(&self) -> Result<Option<Axes>, ConfigError> {
        let sections = self.sections()?;
        let used = sections.filter(|sections| sections[0] > 0 && sections[1] > 0);
        let (mode, sections) = match self.architecture.mode {
            Mode::Mrope => (GgmlMrope::Mrope, sections),
            Mode::Imrope => (GgmlMrope::Imrope, sections),
            Mode::MropeOrInterleaved | Mode::MropeOrHalfSplit if used.is_some() => {
                (GgmlMrope::Mrope, used)
            }
            Mode::Draft if sections.is_some_and(|sections| sections != [0; 4]) => {
                (GgmlMrope::Mrope, sections)
            }
            _ => return Ok(None),
        };
        match sections {
            Some(sections) => Ok(Some(Axes::Ggml { mode, sections })),
            None => Err(self.missing(
                "rope.dimension_sections",
                format!("architecture {:?} needs it", self.name),
            )),
        }
    }

    fn with_pairing(&self, config: RopeConfig) -> Result<RopeConfig, ConfigError> {
        let rule = PairingRule::GgufArchitecture(self.name.to_string());
        if let Some(axes) = self.axes()? {
            let config = config.with_pairing_by(Pairing::HalfSplit, rule);
            return Ok(config.with_axes(axes));
        }
        let pairing = match self.architecture.mode {
            Mode::Interleaved | Mode::MropeOrInterleaved => Pairing::Interleaved,
            Mode::Draft if self.is_like_deepseek4()? => Pairing::Interleaved,
            _ => Pairing::HalfSplit,
        };
        Ok(config.with_pairing_by(pairing, rule))
    }

    fn score_scale(
        &self,
        kind: Kind,
        head_dim: usize,
        context: &Context,
    ) -> Result<f64, ConfigError> {
        let of_dims = |dims: f64| dims.sqrt().recip();
        let of_head = of_dims(head_dim as f64);
        let given = |key: &str| -> Result<Option<f64>, ConfigError> {
            match self.number(key)? {
                Some(scale) if scale < 0.0 => Err(self.invalid(key, "a positive number")),
                scale => Ok(scale.filter(|&scale| scale != 0.0)),
            }
        };
        Ok(match self.architecture.score {
            Score::HeadDim => of_head,
            Score::Given => given("attention.scale")?.unwrap_or(of_head),
            Score::One => 1.0,
            Score::HeadDimUnless(layers) if self.count("block_count")? == Some(layers) => {
                of_dims(self.derived_head_dim()? as f64)
            }
            Score::HeadDimUnless(_) => of_head,
            Score::ValueLength => match self.count("attention.value_length")? {
                Some(dims) => of_dims(dims as f64),
                None => of_dims(self.derived_head_dim()? as f64),
            },
            Score::Output(default) => given("attention.output_scale")?.unwrap_or(default),
            Score::Latent => of_dims(self.latent_dims(kind)? as f64),
            Score::LatentScaled => {
                let scaled = match context.weight {
                    0.0 => context.scaled.mul(growth(context.factor, 1.0)),
                    _ => context.scaled,
                };
                let all_dim = self.mscale_all_dim()?.unwrap_or(0.0);
                let mscale = scaled.mul(growth(context.factor, all_dim)).to_f64();
                of_dims(self.latent_dims(kind)? as f64) * mscale * mscale
            }
        })
    }

    /// Dims of a head with latent attention, rotated or not.
    fn latent_dims(&self, kind: Kind) -> Result<u64, ConfigError> {
        let key = match kind {
            Kind::Sliding => "attention.key_length_mla_swa",
            _ => "attention.key_length_mla",
        };
        match (self.count(key)?, self.count("attention.key_length")?) {
            (Some(dims), _) => Ok(dims),
            (None, Some(dims)) if kind != Kind::Sliding => Ok(dims),
            _ => Err(self.missing(key, "latent attention needs it")),
        }
    }
}

/// `1 + 0.1 multiplier ln(factor)`
fn growth(factor: f64, multiplier: f64) -> DoubleDouble {
    let tenth = DoubleDouble::ONE.div(10.0.into());
    let logarithm = DoubleDouble::ln(factor).mul(multiplier.into());
    DoubleDouble::ONE.add(logarithm.mul(tenth))
}
