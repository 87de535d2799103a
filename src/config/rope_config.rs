use super::axes::PairSource;
use super::pairing::{OutputOrder, PairingRule};
use super::scaling::{Scaling, check_attention_factor, check_divisors};
use super::{Axes, ConfigError, formulas};
use crate::angle::{DoubleDouble, look_exchanged};
use crate::{Direction, Frequencies, FrequencyRows, Pairing, Rope};

/// How one kind of layer rotates its queries and keys: everything that a model's config says about
/// it, and the [`Rope`] that follows.
///
/// Made by [`ModelConfig`](super::ModelConfig), or by hand:
///
/// ```
/// use phasor::config::{RopeConfig, Scaling, YarnScaling};
/// use phasor::Pairing;
///
/// # fn main() -> Result<(), phasor::config::ConfigError> {
/// let config = RopeConfig::new(10_000.0, 128)?
///     .with_rotary_dim(64)?
///     .with_pairing(Pairing::Interleaved)
///     .with_scaling(Scaling::Yarn(YarnScaling::new(4.0, 32_768)))?;
/// let rope = config.rope()?;
/// assert_eq!((rope.rotary_dim(), rope.pairing()), (64, Pairing::Interleaved));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    theta: f64,
    head_dim: usize,
    rotary_dim: usize,
    rotary_offset: usize,
    layout_offset: Option<usize>,
    scaling: Scaling,
    divisors: Option<Vec<f64>>,
    attention_factor: Option<f64>,
    pairing: Pairing,
    pairing_rule: PairingRule,
    output_order: OutputOrder,
    direction: Direction,
    axes: Option<Axes>,
    score_scale: f64,
    max_position_embeddings: Option<u64>,
}

/// More dims than any head has: so many take some hundredths of a second, and a number from a broken
/// file must not take hours.
pub(super) const MAX_HEAD_DIM: usize = 1 << 14;

/// 2^-32: below it, frequencies are beyond what a phase step holds.
const SMALLEST_THETA: f64 = 1.0 / 4294967296.0;

impl RopeConfig {
    /// Plain RoPE on all dims of a head, half-split, with `1 / sqrt(head_dim)` as score scale.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] unless `theta` is finite and at least 2^-32, and `head_dim` is from
    /// 1 to 16,384; or if the two look exchanged, as with
    /// [`Frequencies::from_theta`](Frequencies::from_theta).
    pub fn new(theta: f64, head_dim: usize) -> Result<Self, ConfigError> {
        if look_exchanged(theta, head_dim) {
            return Err(ConfigError::invalid(
                "rope_theta",
                theta,
                format!(
                    "above head_dim, which is {head_dim}: the two look exchanged (RopeConfig::new \
                     takes theta first)"
                ),
            ));
        }
        if !(theta.is_finite() && theta >= SMALLEST_THETA) {
            return Err(ConfigError::invalid(
                "rope_theta",
                theta,
                "a finite number of at least 2^-32 (10000 is usual)",
            ));
        }
        if head_dim == 0 || head_dim > MAX_HEAD_DIM {
            return Err(ConfigError::invalid(
                "head_dim",
                head_dim,
                format!("from 1 to {MAX_HEAD_DIM}"),
            ));
        }
        Ok(Self {
            theta,
            head_dim,
            rotary_dim: head_dim,
            rotary_offset: 0,
            layout_offset: None,
            scaling: Scaling::None,
            divisors: None,
            attention_factor: None,
            pairing: Pairing::HalfSplit,
            pairing_rule: PairingRule::Given,
            output_order: OutputOrder::AsInput,
            direction: Direction::Forward,
            axes: None,
            score_scale: (head_dim as f64).sqrt().recip(),
            max_position_embeddings: None,
        })
    }

    /// Rotates the first `rotary_dim` dims of each head.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] unless it is even, at least 2 and at most head_dim.
    pub fn with_rotary_dim(mut self, rotary_dim: usize) -> Result<Self, ConfigError> {
        if rotary_dim == 0 || rotary_dim % 2 == 1 || rotary_dim > self.head_dim {
            return Err(ConfigError::invalid(
                "rotary_dim",
                rotary_dim,
                format!(
                    "even, at least 2 and at most head_dim, which is {}",
                    self.head_dim
                ),
            ));
        }
        self.rotary_dim = rotary_dim;
        self.rotary_offset = 0;
        Ok(self)
    }

    /// Rotates the last dims of each head instead of the first.
    pub fn with_trailing_rotation(mut self) -> Self {
        self.rotary_offset = self.head_dim - self.rotary_dim;
        self
    }

    /// States how many dims of a head the layouts of the queries and keys skip
    /// ([`Layout::with_rotary_offset`](crate::Layout::with_rotary_offset)). Where other dims than
    /// the first rotate, no rotation is given without it, for with a plain layout it would turn the
    /// wrong ones.
    ///
    /// ```
    /// # #[cfg(feature = "hf-config")]
    /// # fn main() -> Result<(), phasor::config::ConfigError> {
    /// use phasor::Layout;
    /// use phasor::config::{ConfigError, ModelConfig};
    ///
    /// let model = ModelConfig::from_hf_config(
    ///     r#"{"model_type": "deepseek_v4", "head_dim": 512, "qk_rope_head_dim": 64}"#,
    /// )?;
    /// let config = model.rope_for("main")?;
    /// assert!(matches!(config.rope(), Err(ConfigError::RotaryOffset { .. })));
    /// let layout = Layout::tokens(7, 64, 512).with_rotary_offset(config.rotary_offset());
    /// let rope = config.clone().with_layout_offset(layout.rotary_offset()).rope()?;
    /// assert_eq!((layout.rotary_offset(), rope.rotary_dim()), (448, 64));
    /// # Ok(())
    /// # }
    /// # #[cfg(not(feature = "hf-config"))]
    /// # fn main() {}
    /// ```
    pub fn with_layout_offset(mut self, offset: usize) -> Self {
        self.layout_offset = Some(offset);
        self
    }

    /// The same rotation of the first dims of heads of another size, of scores scaled for that size.
    #[cfg(feature = "hf-config")]
    pub(super) fn in_heads_of(mut self, head_dim: usize) -> Result<Self, ConfigError> {
        if head_dim < self.rotary_dim || head_dim > MAX_HEAD_DIM {
            return Err(ConfigError::invalid(
                "head_dim",
                head_dim,
                format!("from {}, which rotate, to {MAX_HEAD_DIM}", self.rotary_dim),
            ));
        }
        self.head_dim = head_dim;
        self.score_scale = (head_dim as f64).sqrt().recip();
        Ok(self)
    }

    /// Scales the frequencies.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] for a parameter without meaning. Whether lists have an entry per
    /// pair is checked where frequencies are formed.
    pub fn with_scaling(mut self, scaling: Scaling) -> Result<Self, ConfigError> {
        scaling.check()?;
        self.scaling = scaling;
        Ok(self)
    }

    /// Divides the frequency of each pair, as scaled, by a number of its own: what a GGUF file holds
    /// for Llama 3.1 in `rope_freqs.weight`, and llama.cpp calls frequency factors. Infinity stops a
    /// pair.
    ///
    /// ```
    /// use phasor::config::RopeConfig;
    ///
    /// # fn main() -> Result<(), phasor::config::ConfigError> {
    /// let plain = RopeConfig::new(500_000.0, 4)?;
    /// let divided = plain.clone().with_frequency_divisors(vec![1.0, 8.0])?;
    /// assert_eq!(divided.frequencies()?.cos_sin(1, 8), plain.frequencies()?.cos_sin(1, 1));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] unless all are positive. Whether there is one per pair is checked
    /// where frequencies are formed.
    pub fn with_frequency_divisors(mut self, divisors: Vec<f64>) -> Result<Self, ConfigError> {
        check_divisors("divisors", &divisors)?;
        self.divisors = Some(divisors);
        Ok(self)
    }

    /// Multiplies cos and sin by `factor`, in place of the factor that the scaling has or derives:
    /// that of YaRN, and that of both rows of LongRoPE. The other scalings have none. It does not
    /// matter which of the two is set first.
    ///
    /// ```
    /// use phasor::config::{LinearScaling, RopeConfig, Scaling, YarnScaling};
    ///
    /// # fn main() -> Result<(), phasor::config::ConfigError> {
    /// let config = RopeConfig::new(10_000.0, 128)?.with_attention_factor(1.25)?;
    /// let linear = config.clone().with_scaling(Scaling::Linear(LinearScaling { factor: 4.0 }))?;
    /// assert_eq!(linear.frequencies()?.attention_factor(), 1.25);
    /// // Not 0.1 ln 4 + 1, nor a product with it.
    /// let yarn = config.with_scaling(Scaling::Yarn(YarnScaling::new(4.0, 4096)))?;
    /// assert_eq!(yarn.frequencies()?.attention_factor(), 1.25);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] unless it is from 1e-30 to 1e30.
    pub fn with_attention_factor(mut self, factor: f64) -> Result<Self, ConfigError> {
        check_attention_factor("attention_factor", Some(factor))?;
        self.attention_factor = Some(factor);
        Ok(self)
    }

    /// Sets which dims form a pair.
    pub fn with_pairing(self, pairing: Pairing) -> Self {
        self.with_pairing_by(pairing, PairingRule::Given)
    }

    pub(super) fn with_pairing_by(mut self, pairing: Pairing, rule: PairingRule) -> Self {
        self.pairing = pairing;
        self.pairing_rule = rule;
        self
    }

    /// Notes in which order Hugging Face transformers returns the dims.
    pub fn with_transformers_output_order(mut self, order: OutputOrder) -> Self {
        self.output_order = order;
        self
    }

    /// Sets which way to turn.
    pub fn with_direction(mut self, direction: Direction) -> Self {
        self.direction = direction;
        self
    }

    /// Shares the pairs out among the axes of a position.
    pub fn with_axes(mut self, axes: Axes) -> Self {
        self.axes = Some(axes);
        self
    }

    /// The same for positions on one axis, as text alone needs it.
    pub fn without_axes(mut self) -> Self {
        self.axes = None;
        self
    }

    /// Sets what multiplies the scores `q . k`.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] unless it is positive and finite.
    pub fn with_score_scale(mut self, scale: f64) -> Result<Self, ConfigError> {
        if !(scale.is_finite() && scale > 0.0) {
            return Err(ConfigError::invalid(
                "score_scale",
                scale,
                "a positive, finite number",
            ));
        }
        self.score_scale = scale;
        Ok(self)
    }

    /// Sets the longest sequence that the model is meant for.
    pub fn with_max_position_embeddings(mut self, tokens: u64) -> Self {
        self.max_position_embeddings = Some(tokens);
        self
    }

    /// The base of the frequencies.
    pub fn theta(&self) -> f64 {
        self.theta
    }

    /// Dims of a head. With multi-head latent attention (DeepSeek) the dims of its rotated part,
    /// which is a tensor of its own there.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Dims that rotate in each head.
    pub fn rotary_dim(&self) -> usize {
        self.rotary_dim
    }

    /// The first of them: 0, unless the last dims rotate. For
    /// [`Layout::with_rotary_offset`](crate::Layout::with_rotary_offset).
    pub fn rotary_offset(&self) -> usize {
        self.rotary_offset
    }

    /// How the frequencies are scaled.
    pub fn scaling(&self) -> &Scaling {
        &self.scaling
    }

    /// What the frequency of each pair is divided by, beside its scaling.
    pub fn frequency_divisors(&self) -> Option<&[f64]> {
        self.divisors.as_deref()
    }

    /// What multiplies cos and sin, where that was
    /// [set apart from the scaling](Self::with_attention_factor). The factor in effect, whoever sets
    /// it, is [`Frequencies::attention_factor`].
    pub fn attention_factor(&self) -> Option<f64> {
        self.attention_factor
    }

    /// Which dims form a pair.
    pub fn pairing(&self) -> Pairing {
        self.pairing
    }

    /// Why that pairing.
    pub fn pairing_rule(&self) -> &PairingRule {
        &self.pairing_rule
    }

    /// The order of dims in which Hugging Face transformers returns what it has rotated. A
    /// [`Rope`] leaves every dim in its place: scores are the same, but keys that transformers has
    /// rotated do not go with queries that phasor has, until one of them is put in the other's order
    /// by [`transformers_dims`](Self::transformers_dims).
    pub fn transformers_output_order(&self) -> OutputOrder {
        self.output_order
    }

    /// For each rotated dim, as transformers returns them, the dim of the head in which a [`Rope`]
    /// leaves it.
    ///
    /// ```
    /// use phasor::Pairing;
    /// use phasor::config::{OutputOrder, RopeConfig};
    ///
    /// # fn main() -> Result<(), phasor::config::ConfigError> {
    /// let config = RopeConfig::new(10_000.0, 6)?
    ///     .with_pairing(Pairing::Interleaved)
    ///     .with_transformers_output_order(OutputOrder::HalfSplit); // as DeepSeek-V3
    /// assert_eq!(config.transformers_dims(), [0, 2, 4, 1, 3, 5]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn transformers_dims(&self) -> Vec<usize> {
        let half = self.rotary_dim / 2;
        let source = |dim: usize| match (self.output_order, self.pairing) {
            (OutputOrder::HalfSplit, Pairing::Interleaved) if dim < half => 2 * dim,
            (OutputOrder::HalfSplit, Pairing::Interleaved) => 2 * (dim - half) + 1,
            _ => dim,
        };
        (0..self.rotary_dim)
            .map(|dim| self.rotary_offset + source(dim))
            .collect()
    }

    /// Which way to turn: forward, but for one family (NanoChat).
    pub fn direction(&self) -> Direction {
        self.direction
    }

    /// How the axes of a position share the pairs, for models of images and video.
    pub fn axes(&self) -> Option<&Axes> {
        self.axes.as_ref()
    }

    /// What the model multiplies its scores `q . k` with before the softmax. The attention factor
    /// of cos and sin is not part of it. Nor is a temperature that grows with the position, which
    /// some models multiply their queries with: `llama_4_scaling_beta` (Ministral 3),
    /// `attn_temperature_tuning` (Llama 4), `attention.temperature_scale` in GGUF files.
    pub fn score_scale(&self) -> f64 {
        self.score_scale
    }

    /// The longest sequence that the model is meant for, where the config says so.
    pub fn max_position_embeddings(&self) -> Option<u64> {
        self.max_position_embeddings
    }

    /// Whether longer sequences have other frequencies (dynamic NTK, Qwen's NTK, LongRoPE).
    pub fn depends_on_length(&self) -> bool {
        matches!(self.scaling, Scaling::LongRope(_)) || self.grows_from().is_some()
    }

    /// The length from which on theta grows.
    fn grows_from(&self) -> Option<u64> {
        match &self.scaling {
            Scaling::DynamicNtk(dynamic) => Some(dynamic.max_position_embeddings),
            Scaling::QwenNtk(ntk) => Some(ntk.seq_length),
            _ => None,
        }
    }

    /// The frequencies, where they are the same for every length.
    ///
    /// # Errors
    /// [`ConfigError::DependsOnLength`] if they are not; [`ConfigError::Invalid`] if a list does not
    /// fit the number of pairs.
    pub fn frequencies(&self) -> Result<Frequencies, ConfigError> {
        if self.depends_on_length() {
            return Err(self.depends_on_length_error());
        }
        self.frequencies_of(None)
    }

    /// The frequencies for a sequence of `length` tokens, those in its cache included. Hugging Face
    /// transformers takes the largest position of a call, plus 1, for all its sequences.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] if a list does not fit the number of pairs.
    pub fn frequencies_for_length(&self, length: u64) -> Result<Frequencies, ConfigError> {
        self.frequencies_of(Some(length))
    }

    /// The rotation for sequences of every length. For LongRoPE it has two rows of frequencies, of
    /// which each sequence uses one ([`Rope::row_for_length`], [`row_for_call`]).
    ///
    /// # Errors
    /// [`ConfigError::DependsOnLength`] for dynamic NTK: see
    /// [`rope_for_lengths`](Self::rope_for_lengths). [`ConfigError::RotaryOffset`] if other dims than
    /// the first rotate: see [`with_layout_offset`](Self::with_layout_offset).
    /// [`ConfigError::Invalid`] if a list does not fit the number of pairs.
    pub fn rope(&self) -> Result<Rope, ConfigError> {
        self.check_offset()?;
        self.rope_of_any_length()
    }

    fn rope_of_any_length(&self) -> Result<Rope, ConfigError> {
        if self.grows_from().is_some() {
            return Err(self.depends_on_length_error());
        }
        match &self.scaling {
            Scaling::LongRope(_) => {
                Ok(self.turned(Rope::new(self.long_rope_rows()?, self.pairing)))
            }
            _ => Ok(self.turned(Rope::new(self.frequencies_of(None)?, self.pairing))),
        }
    }

    /// Whether the layouts that the rotation is for skip the dims that it must.
    fn check_offset(&self) -> Result<(), ConfigError> {
        if self.layout_offset.unwrap_or(0) == self.rotary_offset {
            return Ok(());
        }
        Err(ConfigError::RotaryOffset {
            rotary_dim: self.rotary_dim,
            rotary_offset: self.rotary_offset,
        })
    }

    /// The rotation for sequences of `length` tokens, those in its cache included.
    ///
    /// # Errors
    /// As [`frequencies_for_length`](Self::frequencies_for_length), and
    /// [`ConfigError::RotaryOffset`] as [`rope`](Self::rope).
    pub fn rope_for_length(&self, length: u64) -> Result<Rope, ConfigError> {
        self.check_offset()?;
        Ok(self.turned(Rope::new(self.frequencies_of(Some(length))?, self.pairing)))
    }

    /// A rotation with a row of frequencies for each length, for scalings that depend on it. With
    /// dynamic NTK the first row serves sequences of up to `max_position_embeddings` tokens, and
    /// each of the following those up to one of `lengths`, with the frequencies of just that
    /// length. With LongRoPE, and where nothing depends on the length, this is
    /// [`rope`](Self::rope).
    ///
    /// Lengths may come in any order; those that the first row serves have no row of their own.
    ///
    /// # Errors
    /// As [`rope`](Self::rope).
    pub fn rope_for_lengths(&self, lengths: &[u64]) -> Result<Rope, ConfigError> {
        self.check_offset()?;
        self.rope_of_lengths(lengths)
    }

    fn rope_of_lengths(&self, lengths: &[u64]) -> Result<Rope, ConfigError> {
        let Some(first) = self.grows_from() else {
            return self.rope_of_any_length();
        };
        let mut ends = vec![first];
        // Shorter ones are as the first.
        ends.extend(lengths.iter().map(|&length| length.max(first)));
        ends.sort_unstable();
        ends.dedup();
        let rows = ends
            .iter()
            .map(|&length| self.frequencies_of(Some(length)))
            .collect::<Result<Vec<_>, _>>()?;
        let rows = FrequencyRows::new(&rows)?.with_lengths(&ends)?;
        Ok(self.turned(Rope::new(rows, self.pairing)))
    }

    /// LongRoPE with the row chosen by each token's own position, as Modular MAX does: the short
    /// factors below `original_max_position_embeddings`, the long ones from there on. (The models
    /// were trained with one row for a whole sequence.) Where nothing depends on the length, this
    /// is [`rope`](Self::rope).
    ///
    /// # Errors
    /// As [`rope`](Self::rope); [`ConfigError::Rope`] for positions on several axes.
    pub fn rope_by_position(&self) -> Result<Rope, ConfigError> {
        self.check_offset()?;
        let Scaling::LongRope(long_rope) = &self.scaling else {
            return self.rope_of_any_length();
        };
        let boundary =
            i64::try_from(long_rope.original_max_position_embeddings).unwrap_or(i64::MAX);
        let rows = self.long_rope_rows()?.by_position(boundary)?;
        Ok(self.turned(Rope::new(rows, self.pairing)))
    }

    fn turned(&self, rope: Rope) -> Rope {
        rope.with_direction(self.direction)
    }

    fn depends_on_length_error(&self) -> ConfigError {
        ConfigError::DependsOnLength {
            scaling: self.scaling.name(),
        }
    }

    fn long_rope_rows(&self) -> Result<FrequencyRows, ConfigError> {
        let Scaling::LongRope(long_rope) = &self.scaling else {
            return Err(self.depends_on_length_error());
        };
        let original = long_rope.original_max_position_embeddings;
        let rows = [
            self.frequencies_of(Some(original))?,
            self.frequencies_of(Some(u64::MAX))?,
        ];
        Ok(FrequencyRows::new(&rows)?.with_lengths(&[original, u64::MAX])?)
    }

    fn frequencies_of(&self, length: Option<u64>) -> Result<Frequencies, ConfigError> {
        self.check()?;
        let factor = match self.attention_factor {
            Some(factor) => factor as f32,
            None => formulas::attention_factor(&self.scaling, length),
        };
        let (inv_freq, axes) = match &self.axes {
            None => {
                let pairs = self.rotary_dim / 2;
                (self.spectrum(self.rotary_dim, pairs, length)?, None)
            }
            Some(axes) => {
                let sources = axes.sources(self.rotary_dim)?;
                let axis_of_pair: Vec<_> = sources.iter().map(|source| source.axis).collect();
                (
                    self.on_axes(&sources, length)?,
                    Some((axes.axes(), axis_of_pair)),
                )
            }
        };
        let inv_freq = match &self.divisors {
            None => inv_freq,
            Some(divisors) => formulas::divided_each(&inv_freq, "divisors", divisors)?,
        };
        let mut frequencies = Frequencies::from_extended(&inv_freq)?;
        if let Some((axes, axis_of_pair)) = axes {
            frequencies = frequencies.with_axes(axes, &axis_of_pair)?;
        }
        Ok(frequencies.with_attention_factor(factor)?)
    }

    fn on_axes(
        &self,
        sources: &[PairSource],
        length: Option<u64>,
    ) -> Result<Vec<DoubleDouble>, ConfigError> {
        let mut dims: Vec<usize> = sources.iter().map(|source| source.dim).collect();
        dims.sort_unstable();
        dims.dedup();
        let mut inv_freq = vec![DoubleDouble::ZERO; sources.len()];
        for dim in dims {
            let of_dim = || {
                let numbered = sources.iter().enumerate();
                numbered.filter(move |(_, source)| source.dim == dim)
            };
            let count = of_dim().map(|(_, source)| source.index + 1).max();
            let spectrum = self.spectrum(dim, count.unwrap_or(0), length)?;
            for (pair, source) in of_dim() {
                inv_freq[pair] = spectrum[source.index];
            }
        }
        Ok(inv_freq)
    }

    /// The first `count` frequencies over `dim` dims.
    fn spectrum(
        &self,
        dim: usize,
        count: usize,
        length: Option<u64>,
    ) -> Result<Vec<DoubleDouble>, ConfigError> {
        formulas::inv_freq(self.theta, dim, count, &self.scaling, length)
    }

    /// Whether the parts fit each other.
    fn check(&self) -> Result<(), ConfigError> {
        if self.rotary_dim % 2 == 1 {
            return Err(ConfigError::invalid(
                "head_dim",
                self.head_dim,
                "even, or rotary_dim set to an even number",
            ));
        }
        if matches!(self.scaling, Scaling::Yarn(_)) && self.theta <= 1.0 {
            return Err(ConfigError::invalid(
                "rope_theta",
                self.theta,
                "above 1, for YaRN divides by its logarithm",
            ));
        }
        Ok(())
    }

    /// [`check`](Self::check), and whether lists fit the number of pairs: so that a file's faults
    /// show when it is read.
    pub(super) fn check_all(self) -> Result<Self, ConfigError> {
        self.rope_of_lengths(&[])?;
        Ok(self)
    }
}

/// The row of frequencies that Hugging Face transformers would use for a whole call, of which
/// `largest_position` is the largest: that of a sequence of `largest_position + 1` tokens.
///
/// ```
/// use phasor::config::{LongRopeScaling, RopeConfig, Scaling, row_for_call};
/// use phasor::Angles;
///
/// # fn main() -> Result<(), phasor::config::ConfigError> {
/// let long_rope = LongRopeScaling::new(vec![1.0; 64], vec![2.0; 64], 4096);
/// let config = RopeConfig::new(10_000.0, 128)?.with_scaling(Scaling::LongRope(long_rope))?;
/// let Angles::Rows(rows) = config.rope()?.angles().clone() else { unreachable!() };
/// assert_eq!((row_for_call(&rows, 4095)?, row_for_call(&rows, 4096)?), (0, 1));
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// [`ConfigError::Rope`] if no row serves so long a sequence.
pub fn row_for_call(rows: &FrequencyRows, largest_position: i64) -> Result<u32, ConfigError> {
    let length = u64::try_from(largest_position).map_or(0, |position| position + 1);
    Ok(rows.row_for_length(length)?)
}
