use serde_json::{Map, Value};

use super::json::non_finite;
use crate::config::ConfigError;
use crate::config::error::shortened;

/// More entries than any list of a config has.
const MAX_ENTRIES: usize = 1 << 16;

/// The config or an object in it, with its path for messages. A null counts as absent.
#[derive(Clone)]
pub(super) struct Section<'a> {
    path: String,
    keys: &'a Map<String, Value>,
    /// An object whose keys, also those that say null, stand before its own.
    over: Option<Box<Section<'a>>>,
}

impl<'a> Section<'a> {
    pub fn root(keys: &'a Map<String, Value>) -> Self {
        Self {
            path: String::new(),
            keys,
            over: None,
        }
    }

    /// The same with the keys of another object put over it.
    pub fn with_over(mut self, over: Section<'a>) -> Self {
        self.over = Some(Box::new(over));
        self
    }

    /// Whichever of the two objects a key counts in.
    fn holder(&self, key: &str) -> &Section<'a> {
        match &self.over {
            Some(over) if over.keys.contains_key(key) => over,
            _ => self,
        }
    }

    /// The path of a key in it.
    pub fn key(&self, key: &str) -> String {
        let holder = self.holder(key);
        if holder.path.is_empty() {
            key.to_string()
        } else {
            format!("{}.{key}", holder.path)
        }
    }

    pub fn path(&self) -> &str {
        &self.path
    }

    /// The keys that are there and do not say null.
    pub fn keys(&self) -> impl Iterator<Item = (&'a str, &'a Value)> {
        let there = self.keys.iter().filter(|(_, value)| !value.is_null());
        there.map(|(key, value)| (key.as_str(), value))
    }

    /// A key's value; dots lead into objects.
    fn get(&self, key: &str) -> Option<&'a Value> {
        let mut parts = key.split('.');
        let first = parts.next()?;
        let first = self.holder(first).keys.get(first);
        parts
            .fold(first, |value, part| value?.as_object()?.get(part))
            .filter(|value| !value.is_null())
    }

    /// The value under a path that [`key`](Self::key) gave, or one in an object in it, as it is named
    /// in messages.
    pub fn shown(&self, path: &str) -> Option<String> {
        let within = match self.path.as_str() {
            "" => path,
            own => path.strip_prefix(own)?.strip_prefix('.')?,
        };
        self.get(within).map(display)
    }

    pub fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    /// Whether the key is there and says null.
    pub fn is_null(&self, key: &str) -> bool {
        self.holder(key).keys.get(key).is_some_and(Value::is_null)
    }

    pub fn is_list(&self, key: &str) -> bool {
        self.get(key).is_some_and(Value::is_array)
    }

    pub fn is_empty(&self) -> bool {
        self.keys.is_empty() && self.over.is_none()
    }

    /// The objects in it, by key.
    pub fn sections(&self) -> impl Iterator<Item = (&'a str, Section<'a>)> {
        self.keys.iter().filter_map(|(key, value)| {
            let keys = value.as_object().filter(|_| non_finite(value).is_none())?;
            let path = self.key(&shortened(key));
            let over = None;
            Some((key.as_str(), Section { path, keys, over }))
        })
    }

    pub fn invalid(&self, key: &str, expected: impl Into<String>) -> ConfigError {
        let value = self.get(key).map_or_else(|| "null".to_string(), display);
        ConfigError::invalid(self.key(key), value, expected)
    }

    pub fn number(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match value.as_f64() {
            Some(number) => Ok(Some(number)),
            None => Err(self.invalid(key, "a number")),
        }
    }

    /// The first of several keys that is there, and its number.
    pub fn first_number(
        &self,
        keys: &[&'static str],
    ) -> Result<Option<(&'static str, f64)>, ConfigError> {
        for key in keys {
            if let Some(number) = self.number(key)? {
                return Ok(Some((key, number)));
            }
        }
        Ok(None)
    }

    /// A positive whole number, such as a count of dims.
    pub fn count(&self, key: &str) -> Result<Option<usize>, ConfigError> {
        let count = self.tokens(key)?;
        let fits = |count| usize::try_from(count).map_err(|_| self.invalid(key, "far smaller"));
        count.map(fits).transpose()
    }

    /// A positive whole number, such as a count of tokens.
    pub fn tokens(&self, key: &str) -> Result<Option<u64>, ConfigError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match whole(value) {
            Some(number) if number > 0 => Ok(Some(number)),
            _ => Err(self.invalid(key, "a positive whole number")),
        }
    }

    /// A count of tokens, where numbers that count none stand for no limit.
    pub fn limit(&self, key: &str) -> Result<Option<u64>, ConfigError> {
        match self.get(key) {
            Some(value) if value.is_number() || non_finite(value).is_some() => {
                Ok(whole(value).filter(|&tokens| tokens > 0))
            }
            _ => self.tokens(key),
        }
    }

    pub fn flag(&self, key: &str) -> Result<Option<bool>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(_) => Err(self.invalid(key, "true or false")),
        }
    }

    pub fn text(&self, key: &str) -> Result<Option<&'a str>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match as_text(value) {
                Some(text) => Ok(Some(text)),
                None => Err(self.invalid(key, "a string")),
            },
        }
    }

    pub fn section(&self, key: &str) -> Result<Option<Section<'a>>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match value.as_object().filter(|_| non_finite(value).is_none()) {
                Some(keys) => Ok(Some(Section {
                    path: self.key(key),
                    keys,
                    over: None,
                })),
                None => Err(self.invalid(key, "an object")),
            },
        }
    }

    /// A list, each entry of which `read` understands.
    pub fn list<T>(
        &self,
        key: &str,
        expected: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<Vec<T>>, ConfigError> {
        let entries = match self.get(key) {
            None => return Ok(None),
            Some(Value::Array(entries)) => entries,
            Some(_) => return Err(self.invalid(key, format!("a list of {expected}"))),
        };
        if entries.len() > MAX_ENTRIES {
            return Err(self.invalid(key, format!("a list of at most {MAX_ENTRIES}")));
        }
        let read = |(index, entry): (usize, &'a Value)| {
            read(entry).ok_or_else(|| {
                ConfigError::invalid(
                    format!("{}[{index}]", self.key(key)),
                    display(entry),
                    expected,
                )
            })
        };
        entries
            .iter()
            .enumerate()
            .map(read)
            .collect::<Result<_, _>>()
            .map(Some)
    }

    pub fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>, ConfigError> {
        self.list(key, "numbers", Value::as_f64)
    }

    /// Three sections of a head.
    pub fn three(&self, key: &str) -> Result<Option<[usize; 3]>, ConfigError> {
        let read = |value| whole(value).and_then(|n| usize::try_from(n).ok());
        let Some(sections) = self.list(key, "whole numbers", read)? else {
            return Ok(None);
        };
        match <[usize; 3]>::try_from(sections) {
            Ok(sections) => Ok(Some(sections)),
            Err(_) => Err(self.invalid(key, "a list of 3 whole numbers")),
        }
    }
}

/// 2^53: f64 holds every whole number below it.
const LARGEST_WHOLE: f64 = 9007199254740992.0;

/// A whole number, also where it is written as 4096.0.
pub(super) fn whole(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| {
        let number = value.as_f64()?;
        let fits = (0.0..LARGEST_WHOLE).contains(&number) && number.fract() == 0.0;
        fits.then_some(number as u64)
    })
}

/// The text of a value that is a string.
pub(super) fn as_text(value: &Value) -> Option<&str> {
    match non_finite(value) {
        Some(_) => None,
        None => value.as_str(),
    }
}

/// A value as it is named in messages.
fn display(value: &Value) -> String {
    if let Some(number) = non_finite(value) {
        return shortened(number);
    }
    match value {
        Value::Array(entries) if entries.len() > 8 => format!("a list of {}", entries.len()),
        Value::Object(keys) => format!("an object of {} keys", keys.len()),
        Value::String(text) => format!("{:?}", shortened(text)),
        other => shortened(&other.to_string()),
    }
}
