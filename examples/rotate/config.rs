//! The rotary part of a Hugging Face `config.json`.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_json::{Map, Value};

use super::{Failure, Result, fail};

/// What a config says; `None` where it says nothing.
#[derive(Debug, Default, PartialEq)]
pub struct Config {
    pub theta: Option<f64>,
    pub head_dim: Option<usize>,
    /// The part of each head that rotates.
    pub rotary_factor: Option<f64>,
}

/// A config is a few kilobytes; anything much larger is another file.
const MAX_BYTES: u64 = 1 << 24;

impl Config {
    pub fn read(path: &Path) -> Result<Self> {
        let mut json = Vec::new();
        File::open(path)
            .and_then(|file| file.take(MAX_BYTES + 1).read_to_end(&mut json))
            .map_err(|error| Failure(format!("cannot read {}: {error}", path.display())))?;
        let parsed = if json.len() as u64 > MAX_BYTES {
            fail("too large for a config")
        } else {
            Self::parse(&json)
        };
        parsed.map_err(|Failure(reason)| Failure(format!("{}: {reason}", path.display())))
    }

    fn parse(json: &[u8]) -> Result<Self> {
        let value = serde_json::from_slice(json)
            .map_err(|error| Failure(format!("not valid JSON: {error}")))?;
        let Value::Object(object) = value else {
            return fail("not a JSON object");
        };
        let top = Section {
            name: "",
            keys: &object,
        };
        top.refuse_other_spellings()?;
        let mut theta = top.number("rope_theta")?;
        let mut rotary_factor = top.number("partial_rotary_factor")?;
        // transformers 5 writes rope_parameters, earlier versions rope_scaling.
        for name in ["rope_parameters", "rope_scaling"] {
            let Some(section) = top.section(name)? else {
                continue;
            };
            section.check_default_type()?;
            section.merge("rope_theta", &mut theta)?;
            section.merge("partial_rotary_factor", &mut rotary_factor)?;
        }
        if let Some(factor) = rotary_factor
            && !(factor > 0.0 && factor <= 1.0)
        {
            return fail(format!(
                "partial_rotary_factor is {factor:?}: it must be above 0 and at most 1"
            ));
        }
        Ok(Self {
            theta,
            head_dim: head_dim(&top)?,
            rotary_factor,
        })
    }
}

fn head_dim(config: &Section<'_>) -> Result<Option<usize>> {
    if let Some(head_dim) = config.count("head_dim")? {
        return Ok(Some(head_dim));
    }
    let hidden_size = config.count("hidden_size")?;
    let heads = config.count("num_attention_heads")?;
    let (Some(hidden_size), Some(heads)) = (hidden_size, heads) else {
        return Ok(None);
    };
    if hidden_size % heads != 0 {
        return fail(format!(
            "hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}"
        ));
    }
    Ok(Some(hidden_size / heads))
}

/// The config, or an object in it.
struct Section<'a> {
    name: &'a str,
    keys: &'a Map<String, Value>,
}

impl<'a> Section<'a> {
    /// A key's value; null counts as absent.
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.keys.get(key).filter(|value| !value.is_null())
    }

    fn label(&self, key: &str) -> String {
        if self.name.is_empty() {
            key.to_string()
        } else {
            format!("{}.{key}", self.name)
        }
    }

    fn wrong<T>(&self, key: &str, value: &Value, expected: &str) -> Result<T> {
        fail(format!(
            "{} is {}: it must be {expected}",
            self.label(key),
            shortened(value)
        ))
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        self.get(key)
            .map(|value| match value.as_f64() {
                Some(number) => Ok(number),
                None => self.wrong(key, value, "a number"),
            })
            .transpose()
    }

    fn count(&self, key: &str) -> Result<Option<usize>> {
        self.get(key)
            .map(
                |value| match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
                    Some(n) if n > 0 => Ok(n),
                    _ => self.wrong(key, value, "a positive whole number"),
                },
            )
            .transpose()
    }

    fn section(&self, key: &'a str) -> Result<Option<Section<'a>>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(keys)) => Ok(Some(Section { name: key, keys })),
            Some(value) => self.wrong(key, value, "an object"),
        }
    }

    /// Refuses keys in which some families say what `rope_theta`, `head_dim` and
    /// `partial_rotary_factor` say in others: passing them over would rotate wrongly.
    fn refuse_other_spellings(&self) -> Result<()> {
        let unread = [
            "rotary_pct",
            "rotary_emb_base",
            "rotary_dim",
            "rope_ratio",
            "rope_local_base_freq",
            "qk_rope_head_dim",
            "text_config",
        ];
        match unread.into_iter().find(|key| self.get(key).is_some()) {
            None => Ok(()),
            Some(key) => fail(format!(
                "{} is not understood by this example: it reads rope_theta, head_dim and \
                 partial_rotary_factor",
                self.label(key)
            )),
        }
    }

    /// Refuses everything but plain RoPE: rotating by other angles than the model's would look
    /// right and be wrong.
    fn check_default_type(&self) -> Result<()> {
        for key in ["rope_type", "type"] {
            match self.get(key) {
                None => {}
                Some(Value::String(name)) if name == "default" => {}
                Some(Value::String(name)) => {
                    return fail(format!(
                        "{} is {name:?}: this example rotates by plain frequencies only \
                         (rope type \"default\")",
                        self.label(key)
                    ));
                }
                Some(value) => return self.wrong(key, value, "a string"),
            }
        }
        let understood = ["rope_type", "type", "rope_theta", "partial_rotary_factor"];
        match self
            .keys
            .keys()
            .find(|key| !understood.contains(&key.as_str()) && self.get(key).is_some())
        {
            None => Ok(()),
            Some(key) => fail(format!(
                "{} changes the rotation in a way that this example does not know",
                self.label(key)
            )),
        }
    }

    /// A number that may be here or have been given before, but not differently.
    fn merge(&self, key: &str, known: &mut Option<f64>) -> Result<()> {
        let Some(number) = self.number(key)? else {
            return Ok(());
        };
        match known.replace(number) {
            Some(before) if before != number => fail(format!(
                "{key} is {before:?}, but {} is {number:?}",
                self.label(key)
            )),
            _ => Ok(()),
        }
    }
}

/// A value as JSON, cut to what fits a message.
fn shortened(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= 40 {
        text
    } else {
        text.chars().take(40).chain("...".chars()).collect()
    }
}
