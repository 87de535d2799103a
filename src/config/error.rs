use crate::error::cut;

/// What is wrong with a config, and what to change about it. Keys are named with their path, as in
/// `rope_scaling.factor`. Messages cut whatever a file may hold at length; the fields have it whole.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The text is not JSON.
    #[error("the config is not valid JSON: {reason}")]
    NotJson {
        /// What the parser says, with line and column.
        reason: String,
    },
    /// A value is of the wrong kind or outside what has a meaning.
    #[error("{} is {value}: it must be {}", named(key), named(expected))]
    Invalid {
        /// The key, with its path.
        key: String,
        /// The value, shortened.
        value: String,
        /// What it must be.
        expected: String,
    },
    /// A key that is needed is absent (or null), and the model's family documents no default.
    #[error("{} is missing: {remedy}", named(key))]
    Missing {
        /// The key, with its path.
        key: String,
        /// What to add, or what would do instead.
        remedy: String,
    },
    /// Two keys contradict each other.
    #[error(
        "{} is {}, but {} is {}: {remedy}",
        named(first),
        named(first_value),
        named(second),
        named(second_value)
    )]
    Conflict {
        /// One key, with its path.
        first: String,
        /// Its value, shortened.
        first_value: String,
        /// The other.
        second: String,
        /// Its value, shortened.
        second_value: String,
        /// Which of them to change.
        remedy: String,
    },
    /// The type of RoPE scaling is not known.
    #[error("{} is {value}: the known types of RoPE are {known}", named(key))]
    UnknownRopeType {
        /// The key, with its path.
        key: String,
        /// The type.
        value: String,
        /// Those that are known.
        known: &'static str,
    },
    /// A GGUF file is of an architecture whose pairing is not known.
    #[error(
        "general.architecture is {architecture}: {}build a RopeConfig with RopeConfig::new and \
         with_pairing",
        match meant {
            Some(name) => format!("llama.cpp calls such models {name:?}; give that name, or "),
            None => "its pairing is not known here; ".to_string(),
        }
    )]
    UnknownArchitecture {
        /// The architecture.
        architecture: String,
        /// What llama.cpp calls such models, where the name is known as another's.
        meant: Option<&'static str>,
    },
    /// The model does not rotate queries and keys, or not in this kind of layer.
    #[error("{} does not rotate queries and keys", named(what))]
    NoRotation {
        /// The model or kind of layer.
        what: String,
    },
    /// The model rotates in a way that pairs and frequencies do not describe.
    #[error("{} is not supported: {why}", named(what))]
    Unsupported {
        /// The model or key.
        what: String,
        /// What is special about it.
        why: String,
    },
    /// Kinds of layers rotate differently, so there is no single rotation.
    #[error(
        "the layers rotate in different ways ({}): ask with rope_for or rope_of_layer",
        listed(layer_types)
    )]
    SeveralKinds {
        /// The kinds of layers.
        layer_types: Vec<String>,
    },
    /// No layer of the model is of this kind.
    #[error("no layer type {layer_type:?}: the model has {}", listed(known))]
    UnknownLayerType {
        /// The kind asked for.
        layer_type: String,
        /// The kinds there are.
        known: Vec<String>,
    },
    /// The model has fewer layers.
    #[error("layer {index} of {layers}: layers are numbered from 0")]
    NoSuchLayer {
        /// The layer asked for.
        index: usize,
        /// Layers there are.
        layers: u64,
    },
    /// The frequencies depend on the length of the sequence.
    #[error(
        "the frequencies of {scaling} depend on the length of the sequence: use rope_for_lengths, \
         rope_for_length or frequencies_for_length"
    )]
    DependsOnLength {
        /// The type of scaling.
        scaling: &'static str,
    },
    /// Other dims than the first rotate, and the layouts may not skip those before them.
    #[error(
        "dims {rotary_offset}..{} of a head rotate, not the first: give each layout \
         with_rotary_offset({rotary_offset}) and state it with \
         RopeConfig::with_layout_offset({rotary_offset})",
        rotary_offset + rotary_dim
    )]
    RotaryOffset {
        /// Dims that rotate.
        rotary_dim: usize,
        /// The first of them.
        rotary_offset: usize,
    },
    /// The rest of the crate refuses what the config asks for.
    #[error(transparent)]
    Rope(#[from] crate::Error),
}

impl ConfigError {
    pub(super) fn invalid(
        key: impl Into<String>,
        value: impl std::fmt::Display,
        expected: impl Into<String>,
    ) -> Self {
        ConfigError::Invalid {
            key: key.into(),
            value: shortened(&value.to_string()),
            expected: expected.into(),
        }
    }

    pub(super) fn missing(key: impl Into<String>, remedy: impl Into<String>) -> Self {
        ConfigError::Missing {
            key: key.into(),
            remedy: remedy.into(),
        }
    }

    /// The same error under the name that a config has for the value.
    pub(super) fn renamed(self, from: &str, to: &str) -> Self {
        match self {
            ConfigError::Invalid {
                key,
                value,
                expected,
            } if key == from => ConfigError::Invalid {
                key: to.to_string(),
                value,
                expected,
            },
            other => other,
        }
    }

    /// The same error about a key inside `section`.
    pub(super) fn within(self, section: &str) -> Self {
        match self {
            ConfigError::Invalid {
                key,
                value,
                expected,
            } if !section.is_empty() => ConfigError::Invalid {
                key: format!("{section}.{key}"),
                value,
                expected,
            },
            other => other,
        }
    }
}

/// A value cut to what fits a message.
pub(super) fn shortened(text: &str) -> String {
    cut(text, 60)
}

/// The same of a key with its path, or of a description with a name in it.
fn named(text: &str) -> String {
    cut(text, 240)
}

/// Names that a file may have given, as many as fit a message.
fn listed(names: &[String]) -> String {
    const MOST: usize = 16;
    let mut listed: Vec<_> = names
        .iter()
        .take(MOST)
        .map(|name| shortened(name))
        .collect();
    if names.len() > MOST {
        listed.push(format!("{} more", names.len() - MOST));
    }
    listed.join(", ")
}
