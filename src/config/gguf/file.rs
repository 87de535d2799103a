//! A file's keys and tensors, with their errors.

use super::architectures::Architecture;
use super::value::{GgufValue, display};
use crate::config::ConfigError;

/// More layers than any model has.
pub(super) const MAX_LAYERS: u64 = 1 << 16;

pub(super) struct File<'f, 'a> {
    pub lookup: &'f dyn Fn(&str) -> Option<GgufValue<'a>>,
    pub name: &'f str,
    pub architecture: &'static Architecture,
}

impl<'a> File<'_, 'a> {
    pub fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.name)
    }

    pub fn get(&self, name: &str) -> Option<GgufValue<'a>> {
        (self.lookup)(&self.key(name))
    }

    pub fn invalid(&self, name: &str, expected: impl Into<String>) -> ConfigError {
        let value = self.get(name).as_ref().map(display);
        let value = value.unwrap_or_else(|| "absent".to_string());
        ConfigError::invalid(self.key(name), value, expected)
    }

    pub fn missing(&self, name: &str, remedy: impl Into<String>) -> ConfigError {
        ConfigError::missing(self.key(name), remedy)
    }

    pub fn number(&self, name: &str) -> Result<Option<f64>, ConfigError> {
        match self.get(name) {
            None => Ok(None),
            Some(GgufValue::F64(number)) if number.is_finite() => Ok(Some(number)),
            Some(GgufValue::U64(number)) => Ok(Some(number as f64)),
            Some(GgufValue::I64(number)) => Ok(Some(number as f64)),
            Some(_) => Err(self.invalid(name, "a number")),
        }
    }

    /// A positive whole number.
    pub fn count(&self, name: &str) -> Result<Option<u64>, ConfigError> {
        match self.whole(name)? {
            Some(0) => Err(self.invalid(name, "a positive whole number")),
            number => Ok(number),
        }
    }

    /// A whole number.
    pub fn whole(&self, name: &str) -> Result<Option<u64>, ConfigError> {
        let number = match self.get(name) {
            None => return Ok(None),
            Some(GgufValue::U64(number)) => Some(number),
            Some(GgufValue::I64(number)) => u64::try_from(number).ok(),
            Some(_) => None,
        };
        match number {
            Some(number) => Ok(Some(number)),
            None => Err(self.invalid(name, "a whole number of at least 0")),
        }
    }

    /// An array, entry by entry, with anything but 0 for true; `None` if it is absent or no array.
    pub fn flags(&self, name: &str) -> Result<Option<Vec<bool>>, ConfigError> {
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

    pub fn sections(&self) -> Result<Option<[usize; 4]>, ConfigError> {
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

    pub fn tensor(&self, name: &str) -> Result<Option<Vec<f64>>, ConfigError> {
        match (self.lookup)(name) {
            None => Ok(None),
            Some(GgufValue::F32Array(values)) => {
                Ok(Some(values.iter().map(|&value| f64::from(value)).collect()))
            }
            Some(other) => Err(ConfigError::invalid(
                name,
                display(&other),
                "an array of f32",
            )),
        }
    }

    /// An error under the name that the file has for the value.
    pub fn named(&self, error: ConfigError) -> ConfigError {
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
}

/// Names the tensor that a list came from.
pub(super) fn tensor_error(error: ConfigError) -> ConfigError {
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
