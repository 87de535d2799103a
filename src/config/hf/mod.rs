//! Reads a Hugging Face `config.json`, of old and new spelling.

mod json;
mod layers;
mod parameters;
mod section;
mod unread;

use serde_json::Value;

use self::section::Section;
use super::error::shortened;
use super::families::{self, DefaultAxes, Family, TOWERS_WITHOUT_ROPE};
use super::model::{ModelConfig, Parts};
use super::pairing::{OutputOrder, PairingRule};
use super::{ConfigError, RopeConfig};
use crate::Pairing;

/// More parts than a message needs to name.
const MOST_PARTS: usize = 5;

/// Where multimodal configs keep their language model.
const NESTED: [&str; 6] = [
    "vlm_config",
    "text_config",
    "llm_config",
    "language_config",
    "thinker_config",
    "language_model_config",
];

impl ModelConfig {
    /// Reads a Hugging Face `config.json`.
    ///
    /// theta, head_dim, the part of a head that rotates, RoPE scaling, kinds of layers and layers
    /// that do not rotate are read under every name that Hugging Face transformers 5.23 reads them
    /// by: `rope_scaling` and `rope_parameters` (`rope_scaling` wins unless it is empty; beside tables
    /// per kind of layer it is laid over those that an old config's is about), `type` and
    /// `rope_type` (the latter wins), `rotary_pct`, `rotary_emb_base`, `rope_local_base_freq`, tables
    /// per kind of layer, configs inside `text_config` and the like. Where a key is absent (or
    /// null), the default of the model's family holds, which goes for its sizes too. A key twice in
    /// one object counts as its last occurrence.
    ///
    /// Numbers may be as Python writes them, `Infinity` and `NaN` included.
    ///
    /// The old key `type` has no effect where transformers lets a default `rope_type` win: in
    /// Gemma 3, Gemma 3n, T5Gemma 2, OLMo 3, ModernBERT and Step 3.5, which is plain RoPE then.
    ///
    /// Of a `model_type` that is not known the usual spellings are read. Any other key that may bear
    /// on position (a word of it is `rope`, `rotary`, `theta`, `yarn`, `ntk`, `position`, `nope`,
    /// `alibi`, `swa`, `sliding` or the like, lengths and windows apart) is an error that names it:
    /// see [`from_hf_config_ignoring`](Self::from_hf_config_ignoring).
    ///
    /// # Errors
    /// A [`ConfigError`] that names the key and what to change.
    pub fn from_hf_config(json: &str) -> Result<Self, ConfigError> {
        Self::from_hf_config_ignoring(json, &[])
    }

    /// The same as if some keys were absent, each with its path, as errors name it.
    ///
    /// ```
    /// use phasor::config::ModelConfig;
    ///
    /// # fn main() -> Result<(), phasor::config::ConfigError> {
    /// let json = r#"{"model_type": "mine", "head_dim": 64, "rope_theta": 10000.0,
    ///     "rope_kernel": "fused"}"#;
    /// // The family is not known, and the key may mean another rotation.
    /// assert!(ModelConfig::from_hf_config(json).is_err());
    /// let model = ModelConfig::from_hf_config_ignoring(json, &["rope_kernel"])?;
    /// assert_eq!(model.rope()?.head_dim(), 64);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`from_hf_config`](Self::from_hf_config).
    pub fn from_hf_config_ignoring(json: &str, keys: &[&str]) -> Result<Self, ConfigError> {
        let mut value = json::parse(json).map_err(|error| ConfigError::NotJson {
            reason: error.to_string(),
        })?;
        for key in keys {
            remove(&mut value, key);
        }
        let Value::Object(keys) = &value else {
            return Err(ConfigError::invalid(
                "the config",
                kind_of(&value),
                "a JSON object, as in a model's config.json",
            ));
        };
        let root = Section::root(keys);
        let vision = vision(&root);
        let talker = talker(&root);
        let mut model = read(root)?;
        model.vision = vision;
        model.parts.talker = talker.transpose().map(Box::new);
        Ok(model)
    }
}

/// The language model of a config.
fn read(root: Section<'_>) -> Result<ModelConfig, ConfigError> {
    let text = text(root)?;
    let (kinds, layers) = layers::read(&text).map_err(|error| with_parts(error, &text.section))?;
    let indexer = indexer(&text, &kinds).transpose();
    let assumed = parameters::assumed(&text, &kinds);
    Ok(ModelConfig {
        model_type: text.model_type.map(str::to_string),
        kinds,
        layers,
        vision: None,
        parts: Parts {
            assumed,
            indexer,
            talker: None,
        },
    })
}

/// The same error, with the parts of the config that were not looked at if it misses a key.
fn with_parts(error: ConfigError, section: &Section<'_>) -> ConfigError {
    const SIZES: [&str; 6] = [
        "model_type",
        "hidden_size",
        "d_model",
        "head_dim",
        "num_attention_heads",
        "num_hidden_layers",
    ];
    let has_sizes = |part: &Section<'_>| SIZES.iter().any(|key| part.has(key));
    let parts: Vec<_> = section
        .sections()
        .filter(|(_, part)| has_sizes(part) || part.sections().any(|(_, inner)| has_sizes(&inner)))
        .map(|(_, part)| part.path().to_string())
        .take(MOST_PARTS)
        .collect();
    match error {
        ConfigError::Missing { key, remedy } if !parts.is_empty() => ConfigError::Missing {
            key,
            remedy: format!(
                "{remedy}; looked in {}, not in {}, each of which can be read by itself",
                match section.path() {
                    "" => "the config itself",
                    path => path,
                },
                parts.join(", ")
            ),
        },
        error => error,
    }
}

/// The rotation of the indexer of sparse attention.
fn indexer(
    model: &Model<'_>,
    kinds: &[(String, RopeConfig)],
) -> Result<Option<RopeConfig>, ConfigError> {
    let (Some((pairing, key)), Some((_, rope))) = (model.family.indexer, kinds.first()) else {
        return Ok(None);
    };
    let section = &model.section;
    let size = "index_head_dim";
    let rope = rope.clone();
    let rope = rope
        .in_heads_of(section.count(size)?.unwrap_or(128))
        .map_err(|error| error.renamed("head_dim", &section.key(size)))?;
    let said = match key {
        Some(key) => section.flag(key)?.map(|value| (section.key(key), value)),
        None => None,
    };
    let order = |pairing| match pairing {
        Pairing::Interleaved => model.family.output_order,
        Pairing::HalfSplit => OutputOrder::AsInput,
    };
    let (pairing, rule) = match said {
        Some((key, true)) => (Pairing::Interleaved, PairingRule::Key { key, value: true }),
        Some((key, false)) => (Pairing::HalfSplit, PairingRule::Key { key, value: false }),
        None => {
            let name = model.known_as.unwrap_or_default().to_string();
            (pairing, PairingRule::ModelType(name))
        }
    };
    Ok(Some(
        rope.with_pairing_by(pairing, rule)
            .with_transformers_output_order(order(pairing)),
    ))
}

/// The part of a model that speaks.
fn talker(root: &Section<'_>) -> Result<Option<ModelConfig>, ConfigError> {
    match root
        .section("talker_config")?
        .filter(|part| !part.is_empty())
    {
        Some(part) => read(part).map(Some),
        None => Ok(None),
    }
}

impl RopeConfig {
    /// Reads a Hugging Face `config.json` of a model whose layers all rotate alike:
    /// [`ModelConfig::from_hf_config`] and [`ModelConfig::rope`] in one.
    ///
    /// ```
    /// use phasor::config::RopeConfig;
    ///
    /// # fn main() -> Result<(), phasor::config::ConfigError> {
    /// let config = RopeConfig::from_hf_config(
    ///     r#"{"model_type": "gpt_neox", "hidden_size": 6144, "num_attention_heads": 64,
    ///         "rotary_pct": 0.25, "rotary_emb_base": 10000}"#,
    /// )?;
    /// assert_eq!((config.head_dim(), config.rotary_dim()), (96, 24));
    /// assert_eq!(config.pairing_rule().to_string(), "rule of model_type \"gpt_neox\"");
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As those two.
    pub fn from_hf_config(json: &str) -> Result<Self, ConfigError> {
        Ok(ModelConfig::from_hf_config(json)?.rope()?.clone())
    }
}

/// The part of a config that describes one model, and its family.
struct Model<'a> {
    section: Section<'a>,
    model_type: Option<&'a str>,
    family: &'static Family,
    /// The name that the table has for it; `None` where the family is not known.
    known_as: Option<&'static str>,
}

impl<'a> Model<'a> {
    /// Looks the family up by the first name that the table has.
    fn new(
        section: Section<'a>,
        model_type: Option<&'a str>,
        names: &[String],
    ) -> Result<Self, ConfigError> {
        for name in names {
            check_supported(name)?;
            if let Some((mut family, known_as)) = lookup(name) {
                check_switches(&section, known_as)?;
                // DeepSeek-V2 without latent attention (DeepSeek-VL2-Tiny, DeepSeek-OCR) is as the
                // first DeepSeek.
                if known_as == "deepseek_v2" && section.flag("use_mla")? == Some(false) {
                    family = families::family("deepseek").unwrap_or(family);
                }
                return Ok(Self {
                    section,
                    model_type,
                    family,
                    known_as: Some(known_as),
                });
            }
        }
        Ok(Self {
            section,
            model_type,
            family: &families::UNKNOWN,
            known_as: None,
        })
    }

    /// What to call it in messages.
    fn name(&self) -> String {
        match self.model_type {
            Some(name) => format!("model_type {:?}", shortened(name)),
            None => "this model".to_string(),
        }
    }
}

fn lookup(name: &str) -> Option<(&'static Family, &'static str)> {
    let family = families::family(name)?;
    let known_as = family.model_types.iter().find(|known| **known == name)?;
    Some((family, known_as))
}

fn check_supported(name: &str) -> Result<(), ConfigError> {
    if families::WITHOUT_ROPE.contains(&name) {
        return Err(ConfigError::NoRotation {
            what: format!("model_type {name:?}"),
        });
    }
    match families::UNSUPPORTED
        .iter()
        .find(|(names, _)| names.contains(&name))
    {
        None => Ok(()),
        Some((_, why)) => Err(ConfigError::Unsupported {
            what: format!("model_type {name:?}"),
            why: (*why).to_string(),
        }),
    }
}

/// Refuses what a key makes of a model that could be described otherwise.
fn check_switches(section: &Section<'_>, known_as: &str) -> Result<(), ConfigError> {
    let key = "position_encoding_2d";
    if known_as == "chatglm" && section.flag(key)? == Some(true) {
        return Err(ConfigError::Unsupported {
            what: section.key(key),
            why: "each half of a head is rotated by itself, by a position of its own".to_string(),
        });
    }
    Ok(())
}

/// The language model of a config.
fn text<'a>(root: Section<'a>) -> Result<Model<'a>, ConfigError> {
    let (mut section, mut outer) = (root, None);
    loop {
        let mut inner = None;
        for key in NESTED {
            inner = inner.or(section.section(key)?.filter(|inner| !inner.is_empty()));
        }
        let own = section.text("model_type")?;
        let Some(inner) = inner else {
            // A part that does not name itself is of the whole's kind.
            let names = match (own, outer) {
                (Some(own), _) => vec![own.to_string()],
                (None, Some(outer)) => vec![format!("{outer}_text"), format!("{outer}")],
                (None, None) => Vec::new(),
            };
            return Model::new(section, own.or(outer), &names);
        };
        outer = own.or(outer);
        section = inner;
    }
}

/// The vision tower of a config, where it rotates in a known way.
fn vision(root: &Section<'_>) -> Option<Result<RopeConfig, ConfigError>> {
    read_vision(root).transpose()
}

fn read_vision(root: &Section<'_>) -> Result<Option<RopeConfig>, ConfigError> {
    let mut sections = vec![root.clone()];
    sections.extend(root.section("thinker_config")?);
    for section in sections {
        let Some(vision) = section.section("vision_config")? else {
            continue;
        };
        let outer = section.text("model_type")?;
        let own = vision.text("model_type")?;
        let names = [
            own.map(|own| format!("{own}_vision")),
            own.map(str::to_string),
            outer.map(|outer| format!("{outer}_vision")),
        ];
        let names: Vec<String> = names.into_iter().flatten().collect();
        let is_tower = |name: &&String| lookup(name).is_some_and(|(family, _)| is_vision(family));
        if let Some(name) = names.iter().find(is_tower) {
            let model = Model::new(vision, own, std::slice::from_ref(name))?;
            return Ok(Some(parameters::read_flat(&model)?.check_all()?));
        }
        for name in &names {
            check_supported_tower(name)?;
        }
        if vision.is_empty() || own.is_some_and(|own| TOWERS_WITHOUT_ROPE.contains(&own)) {
            continue;
        }
        let own = own.or(outer).unwrap_or("unknown");
        return Err(ConfigError::Unsupported {
            what: format!("vision_config of type {:?}", shortened(own)),
            why: "whether this tower rotates, and how, is not known here".to_string(),
        });
    }
    Ok(None)
}

/// Refuses a tower that is known to rotate in a way which is not described here.
fn check_supported_tower(name: &str) -> Result<(), ConfigError> {
    check_supported(name).or_else(|error| match error {
        ConfigError::NoRotation { .. } => Ok(()),
        error => Err(error),
    })
}

fn is_vision(family: &Family) -> bool {
    matches!(
        family.axes,
        DefaultAxes::VisionHalves | DefaultAxes::Pixtral | DefaultAxes::VisionThirds
    )
}

/// Removes the value of a key with its path.
fn remove(value: &mut Value, path: &str) {
    let (outer, key) = match path.rsplit_once('.') {
        Some((outer, key)) => (outer.split('.').collect(), key),
        None => (Vec::new(), path),
    };
    let inner = outer
        .into_iter()
        .try_fold(value, |value, part| value.as_object_mut()?.get_mut(part));
    if let Some(Value::Object(keys)) = inner {
        keys.remove(key);
    }
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
