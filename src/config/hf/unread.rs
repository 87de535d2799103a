//! Keys of a family that is not known: those that nothing here reads and that may bear on position
//! are refused, so that no model is read as plain rotation that is something else.

use serde_json::Value;

use super::Model;
use super::section::{Section, as_text};
use crate::config::ConfigError;
use crate::config::error::shortened;

/// A key bears on position if one of its words is one of these,
static WORDS: &[&str] = &["alibi", "nope", "ntk", "pos", "swa", "xpos"];

/// begins with one of these,
static BEGINNINGS: &[&str] = &["position", "rope", "rotary", "sliding", "theta", "yarn"];

/// or ends with one of these.
static ENDS: &[&str] = &["rope", "rotary", "theta", "yarn"];

/// Words that only look so.
static OTHER_WORDS: &[&str] = &["europe"];

/// What is read of a family that is not known, and so needs no allowance.
static READ: &[&str] = &[
    "layer_rope_theta",
    "layer_types",
    "max_position_embeddings",
    "n_positions",
    "no_rope_layer_interval",
    "no_rope_layers",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "rope_embedding_base",
    "rope_interleave",
    "rope_parameters",
    "rope_pct",
    "rope_scaling",
    "rope_theta",
    "rotary_dim",
    "rotary_emb_base",
    "rotary_pct",
];

/// What matches the pattern and leaves the rotation as it is: lengths, and windows with their
/// switches.
static ALLOWED: &[&str] = &[
    "add_swa_attention_sink_bias",
    "max_n_positions",
    "max_position_embedding",
    "max_positions",
    "max_sliding_window",
    "rope_full_precision",
    "rope_max_length",
    "sliding_window",
    "sliding_window_attention",
    "sliding_window_layers",
    "sliding_window_pattern",
    "sliding_window_size",
    "swa_window",
    "swa_window_size",
    "use_sliding_window",
    "use_sliding_window_attention",
    "use_swa",
];

/// What does so with one of these values, which say that nothing is out of the ordinary.
static ALLOWED_VALUES: &[(&str, &[&str])] = &[
    ("alibi", &["false"]),
    ("mrope_interleaved", &["false"]),
    ("pos_emb", &["rope", "rotary"]),
    ("pos_embed_type", &["rope", "rotary"]),
    ("position_embedding", &["rope", "rotary"]),
    ("position_embedding_type", &["rope", "rotary"]),
    ("position_encoding", &["rope", "rotary"]),
    ("position_encoding_2d", &["false"]),
    ("positional_embedding_type", &["rope", "rotary"]),
    ("positional_encoding", &["rope", "rotary"]),
    ("rope", &["true"]),
    ("rope_scaling_factor", &["1"]),
    ("rope_scaling_type", &["default", "none"]),
    ("rope_traditional", &["false"]),
    ("rope_type", &["default"]),
    ("rotary", &["true"]),
    ("rotary_embedding", &["true"]),
    ("rotary_interleaved", &["false"]),
    ("rotary_scaling_factor", &["1"]),
    ("swa_layers", &[]),
    ("use_alibi", &["false"]),
    ("use_dynamic_ntk", &["false"]),
    ("use_mrope", &["false"]),
    ("use_nope", &["false"]),
    ("use_position_embeddings", &["false"]),
    ("use_positional_embedding", &["false"]),
    ("use_rope", &["true"]),
    ("use_rope_layers", &[]),
    ("use_rope_scaling", &["false"]),
    ("use_rotary", &["true"]),
    ("use_rotary_embedding", &["true"]),
    ("use_rotary_position_embeddings", &["true"]),
    ("use_xpos", &["false"]),
    ("use_yarn", &["false"]),
];

/// What is read of, or has no effect in, a table of RoPE parameters; there every other key counts.
static IN_TABLES: &[&str] = &[
    "alpha",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "factor",
    "finetuned",
    "high_freq_factor",
    "long_factor",
    "long_mscale",
    "low_freq_factor",
    "max_position_embeddings",
    "mrope_interleaved",
    "mrope_section",
    "mscale",
    "mscale_all_dim",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "rope_theta",
    "rope_type",
    "short_factor",
    "short_mscale",
    "truncate",
    "type",
];

/// Objects that are not about how the model attends, beside those whose names end with `_config`.
static OTHER_OBJECTS: &[&str] = &[
    "auto_map",
    "id2label",
    "label2id",
    "rope_parameters",
    "rope_scaling",
    "task_specific_params",
];

/// Objects about it all the same.
static ATTENTION_OBJECTS: &[&str] = &["attention_config", "attn_config", "rope_config"];

/// Keys of known families that change the rotation though their names do not tell.
static NEEDS_FAMILY: &[&str] = &["compress_ratios", "global_head_dim", "local_head_dim"];

/// theta of a kind of layer, which counts for nothing beside tables by kind of layer.
static NOT_BESIDE_TABLES: &[&str] = &[
    "compress_rope_theta",
    "global_rope_theta",
    "local_rope_theta",
    "rope_local_base_freq",
    "rope_ratio",
];

/// Refuses a config of a family that is not known for a key that may bear on position. `table` holds
/// its RoPE parameters.
pub(super) fn check(model: &Model<'_>, table: Option<&Section<'_>>) -> Result<(), ConfigError> {
    if model.known_as.is_some() {
        return Ok(());
    }
    let section = &model.section;
    let alibi = |key: &str| section.flag(key).is_ok_and(|flag| flag == Some(true));
    if let Some(key) = ["alibi", "use_alibi"].into_iter().find(|key| alibi(key)) {
        return Err(ConfigError::NoRotation {
            what: format!("{}, in which {} is true,", model.name(), section.key(key)),
        });
    }
    if let Some(table) = table {
        check_table(model, table)?;
        for (_, table) in table.sections() {
            check_table(model, &table)?;
        }
    }
    let tables = table.is_some_and(|table| table.sections().next().is_some());
    for (key, value) in section.keys() {
        let beside_tables = tables && NOT_BESIDE_TABLES.contains(&key);
        if READ.contains(&key) || beside_tables {
            continue;
        }
        if NEEDS_FAMILY.contains(&key) || bears_on_position(key) && !is_allowed(key, value) {
            return Err(refusal(model, section.key(&shortened(key))));
        }
    }
    for (name, object) in section.sections() {
        let is_part = name.ends_with("_config") && !ATTENTION_OBJECTS.contains(&name);
        if is_part || OTHER_OBJECTS.contains(&name) {
            continue;
        }
        for (key, value) in object.keys() {
            if bears_on_position(key) && !is_allowed(key, value) {
                return Err(refusal(model, object.key(&shortened(key))));
            }
        }
    }
    Ok(())
}

/// Refuses a table of RoPE parameters of such a family for a key that nothing here reads.
fn check_table(model: &Model<'_>, table: &Section<'_>) -> Result<(), ConfigError> {
    let unread = |(key, value): &(&str, &Value)| {
        !value.is_object() && !IN_TABLES.contains(key) && **value != Value::Bool(false)
    };
    match table.keys().find(unread) {
        None => Ok(()),
        Some((key, _)) => Err(refusal(model, table.key(&shortened(key)))),
    }
}

fn refusal(model: &Model<'_>, key: String) -> ConfigError {
    ConfigError::Unsupported {
        what: format!("{key} of {}", model.name()),
        why: format!(
            "what it means depends on the family, which is not known here: build a RopeConfig with \
             RopeConfig::new, or, if {key} does not change the rotation, name it to \
             ModelConfig::from_hf_config_ignoring"
        ),
    }
}

fn bears_on_position(key: &str) -> bool {
    words(key).any(|word| {
        let word = word.to_ascii_lowercase();
        if OTHER_WORDS.contains(&word.as_str()) {
            return false;
        }
        WORDS.contains(&word.as_str())
            || BEGINNINGS
                .iter()
                .any(|beginning| word.starts_with(beginning))
            || ENDS.iter().any(|end| word.ends_with(end))
    })
}

/// The words of a key, as in `rope_theta`, `rope-theta`, `ropeTheta` and `RoPETheta`.
fn words(key: &str) -> impl Iterator<Item = &str> {
    key.split(|c: char| !c.is_alphanumeric()).flat_map(|part| {
        let bytes = part.as_bytes();
        let starts = (1..bytes.len()).filter(|&at| {
            bytes[at].is_ascii_uppercase()
                && (bytes[at - 1].is_ascii_lowercase() || bytes[at - 1].is_ascii_digit())
        });
        let mut ends: Vec<usize> = starts.collect();
        ends.push(part.len());
        let mut start = 0;
        let words = ends.into_iter().map(move |end| {
            let word = &part[start..end];
            start = end;
            word
        });
        // Capitals in a word, as those of RoPE, do not begin another.
        words.chain([part])
    })
}

fn is_allowed(key: &str, value: &Value) -> bool {
    if ALLOWED.contains(&key) {
        return true;
    }
    let Some((_, allowed)) = ALLOWED_VALUES.iter().find(|(name, _)| *name == key) else {
        return false;
    };
    let said = match value {
        Value::Array(entries) => return entries.is_empty(),
        Value::Bool(flag) => flag.to_string(),
        Value::Number(number) => match number.as_f64() {
            Some(number) => number.to_string(),
            None => return false,
        },
        value => match as_text(value) {
            Some(text) => text.to_ascii_lowercase(),
            None => return false,
        },
    };
    allowed.contains(&said.as_str())
}
