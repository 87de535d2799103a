use super::error::shortened;
use super::{ConfigError, RopeConfig};

/// How a model rotates, kind of layer by kind of layer.
///
/// ```
/// # #[cfg(feature = "hf-config")]
/// # fn main() -> Result<(), phasor::config::ConfigError> {
/// use phasor::config::ModelConfig;
///
/// // Gemma 3: every sixth layer attends to everything, with a larger theta.
/// let model = ModelConfig::from_hf_config(
///     r#"{"model_type": "gemma3_text", "head_dim": 256, "num_hidden_layers": 26,
///         "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0}"#,
/// )?;
/// assert_eq!(model.layer_types(), ["sliding_attention", "full_attention"]);
/// assert_eq!(model.rope_for("sliding_attention")?.theta(), 10_000.0);
/// assert_eq!(model.rope_of_layer(5)?.unwrap().theta(), 1_000_000.0);
/// assert!(model.rope().is_err()); // there is not only one
/// # Ok(())
/// # }
/// # #[cfg(not(feature = "hf-config"))]
/// # fn main() {}
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    pub(super) model_type: Option<String>,
    /// Kinds of layers that rotate.
    pub(super) kinds: Vec<(String, RopeConfig)>,
    pub(super) layers: Layers,
    pub(super) vision: Option<Result<RopeConfig, ConfigError>>,
    pub(super) parts: Parts,
}

/// What else a config describes.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Parts {
    /// Keys that the config leaves out, with what the family has for them.
    pub assumed: Vec<(String, f64)>,
    pub indexer: Option<Result<RopeConfig, ConfigError>>,
    pub talker: Option<Box<Result<ModelConfig, ConfigError>>>,
}

/// Which kind each layer is.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Layers {
    /// How many there are, where the config says so.
    pub count: Option<u64>,
    pub rule: LayerRule,
}

/// `None` stands for a layer that does not rotate, a number for an index into the kinds.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum LayerRule {
    /// All layers are alike.
    All(usize),
    /// One entry per layer.
    Listed(Vec<Option<usize>>),
    /// The config names kinds, but not which layer is of which, or not which layers rotate: the key
    /// would say it.
    Unknown(String),
}

impl ModelConfig {
    /// The config's `model_type`, of its text model where it has several, or a GGUF file's
    /// `general.architecture`.
    pub fn model_type(&self) -> Option<&str> {
        self.model_type.as_deref()
    }

    /// The rotation, where all layers that rotate do so alike.
    ///
    /// # Errors
    /// [`ConfigError::SeveralKinds`] if they do not.
    pub fn rope(&self) -> Result<&RopeConfig, ConfigError> {
        match self.kinds.split_first() {
            Some(((_, first), others)) if others.iter().all(|(_, kind)| kind == first) => Ok(first),
            Some(_) => Err(ConfigError::SeveralKinds {
                layer_types: self.names(),
            }),
            None => Err(self.no_rotation()),
        }
    }

    /// The kinds of layers that rotate.
    pub fn layer_types(&self) -> Vec<&str> {
        self.kinds.iter().map(|(name, _)| name.as_str()).collect()
    }

    /// The rotation of one kind of layer, by a name from [`layer_types`](Self::layer_types).
    ///
    /// # Errors
    /// [`ConfigError::UnknownLayerType`] if no layer of that kind rotates.
    pub fn rope_for(&self, layer_type: &str) -> Result<&RopeConfig, ConfigError> {
        let found = self.kinds.iter().find(|(name, _)| name == layer_type);
        match found {
            Some((_, kind)) => Ok(kind),
            None => Err(ConfigError::UnknownLayerType {
                layer_type: shortened(layer_type),
                known: self.names(),
            }),
        }
    }

    /// The rotation of a layer, counted from 0; `None` for one that does not rotate, be it
    /// attention without positions (SmolLM3, Llama 4, Command R7B) or no attention at all.
    ///
    /// # Errors
    /// [`ConfigError::NoSuchLayer`] if the model has fewer layers; [`ConfigError::Missing`] if the
    /// config does not say of which kind a layer is.
    pub fn rope_of_layer(&self, index: usize) -> Result<Option<&RopeConfig>, ConfigError> {
        let number = index as u64;
        if let Some(layers) = self.layers.count
            && number >= layers
        {
            return Err(ConfigError::NoSuchLayer { index, layers });
        }
        let kind = match &self.layers.rule {
            LayerRule::All(kind) => Some(*kind),
            LayerRule::Listed(kinds) => *kinds.get(index).ok_or(ConfigError::NoSuchLayer {
                index,
                layers: kinds.len() as u64,
            })?,
            LayerRule::Unknown(key) => {
                return Err(ConfigError::missing(
                    key,
                    "without it the kind of each layer is not known; give it, or ask with rope_for",
                ));
            }
        };
        Ok(kind
            .and_then(|kind| self.kinds.get(kind))
            .map(|(_, kind)| kind))
    }

    /// Keys about the size of a head and theta that the config leaves out, each with the value of its
    /// family's default model, which is then used: a config without sizes may be of another model.
    ///
    /// ```
    /// # #[cfg(feature = "hf-config")]
    /// # fn main() -> Result<(), phasor::config::ConfigError> {
    /// use phasor::config::ModelConfig;
    ///
    /// let model = ModelConfig::from_hf_config(r#"{"model_type": "llama", "rope_theta": 500000.0}"#)?;
    /// assert_eq!(model.assumed(), [("head_dim".to_string(), 128.0)]);
    /// # Ok(())
    /// # }
    /// # #[cfg(not(feature = "hf-config"))]
    /// # fn main() {}
    /// ```
    pub fn assumed(&self) -> &[(String, f64)] {
        &self.parts.assumed
    }

    /// The rotation of the indexer's queries and keys in models with sparse attention (DeepSeek-V3.2,
    /// GLM-5, A.X K2), `None` for others: heads of `index_head_dim` dims, of which the first rotate,
    /// as the model's do but for their pairing.
    ///
    /// ```
    /// # #[cfg(feature = "hf-config")]
    /// # fn main() -> Result<(), phasor::config::ConfigError> {
    /// use phasor::Pairing;
    /// use phasor::config::ModelConfig;
    ///
    /// let model = ModelConfig::from_hf_config(r#"{"model_type": "deepseek_v32"}"#)?;
    /// let indexer = model.indexer()?.expect("it has one");
    /// assert_eq!((indexer.head_dim(), indexer.rotary_dim()), (128, 64));
    /// assert_eq!(indexer.pairing(), Pairing::HalfSplit); // the model itself: interleaved
    /// # Ok(())
    /// # }
    /// # #[cfg(not(feature = "hf-config"))]
    /// # fn main() {}
    /// ```
    ///
    /// # Errors
    /// What is wrong with its keys.
    pub fn indexer(&self) -> Result<Option<&RopeConfig>, ConfigError> {
        given(self.parts.indexer.as_ref())
    }

    /// The talker of models that speak (`talker_config` of Qwen2.5-Omni and Qwen3-Omni), `None` for
    /// others. The model itself is the thinker.
    ///
    /// # Errors
    /// What is wrong with that part of the config.
    pub fn talker(&self) -> Result<Option<&ModelConfig>, ConfigError> {
        given(self.parts.talker.as_deref())
    }

    /// The rotation of the vision tower; `None` if the config has no tower, or one that does not
    /// rotate.
    ///
    /// # Errors
    /// [`ConfigError::Unsupported`] for a tower that rotates in a way that is not described here, or
    /// of which it is not known; else what is wrong with that part of the config.
    pub fn vision(&self) -> Result<Option<&RopeConfig>, ConfigError> {
        given(self.vision.as_ref())
    }

    fn names(&self) -> Vec<String> {
        let names = self.kinds.iter();
        names.map(|(name, _)| shortened(name)).collect()
    }

    fn no_rotation(&self) -> ConfigError {
        ConfigError::NoRotation {
            what: match &self.model_type {
                Some(name) => {
                    format!(
                        "model_type {:?}, as it is configured here,",
                        shortened(name)
                    )
                }
                None => "this model".to_string(),
            },
        }
    }
}

fn given<T>(part: Option<&Result<T, ConfigError>>) -> Result<Option<&T>, ConfigError> {
    match part {
        None => Ok(None),
        Some(Ok(part)) => Ok(Some(part)),
        Some(Err(error)) => Err(error.clone()),
    }
}
