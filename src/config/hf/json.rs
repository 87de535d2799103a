//! JSON as Python's `json` writes it: beside what the standard has, `NaN`, `Infinity`, `-Infinity`,
//! numbers beyond f64 and halves of surrogate pairs.

use std::borrow::Cow;

use serde_json::Value;

/// What a number without a finite value is read as: a string that begins so, and goes on with what
/// the text says.
const NON_FINITE: &str = "\u{0}number ";

/// The key of the object that transformers saves such a number as.
const FLOAT_TAG: &str = "__float__";

/// Longer numbers are cut in messages.
const LONGEST_TOKEN: usize = 60;

pub(super) fn parse(text: &str) -> Result<Value, serde_json::Error> {
    // Most texts are of the standard, and are parsed once.
    match serde_json::from_str(text) {
        Ok(value) => Ok(value),
        Err(error) => match standard(text) {
            Cow::Borrowed(_) => Err(error),
            Cow::Owned(text) => serde_json::from_str(&text),
        },
    }
}

/// What the text says of a number that is not finite, if the value is one.
pub(super) fn non_finite(value: &Value) -> Option<&str> {
    match value {
        Value::String(text) => text.strip_prefix(NON_FINITE),
        Value::Object(keys) if keys.len() == 1 => keys.get(FLOAT_TAG)?.as_str(),
        _ => None,
    }
}

/// The same with those numbers as strings and those halves as U+FFFD.
fn standard(text: &str) -> Cow<'_, str> {
    let bytes = text.as_bytes();
    let mut out = String::new();
    // All before it is in `out`.
    let mut copied = 0;
    let mut at = 0;
    while at < bytes.len() {
        let (end, instead) = match bytes[at] {
            b'"' => {
                string(text, at, &mut copied, &mut out, &mut at);
                continue;
            }
            b'-' | b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' => {
                let end = token_end(bytes, at);
                (end, number_beyond(&text[at..end]))
            }
            _ => (at + 1, None),
        };
        if let Some(token) = instead {
            out.push_str(&text[copied..at]);
            out.push_str("\"\\u0000number ");
            out.push_str(token);
            out.push('"');
            copied = end;
        }
        at = end;
    }
    if copied == 0 {
        return Cow::Borrowed(text);
    }
    out.push_str(&text[copied..]);
    Cow::Owned(out)
}

/// Where a number or a word ends.
fn token_end(bytes: &[u8], start: usize) -> usize {
    let belongs = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'+' | b'.');
    let rest = &bytes[start..];
    start
        + rest
            .iter()
            .position(|byte| !belongs(byte))
            .unwrap_or(rest.len())
}

/// The token, cut to what fits a message, if it is a number that Python reads and f64 does not hold.
fn number_beyond(token: &str) -> Option<&str> {
    if matches!(token, "NaN" | "Infinity" | "-Infinity") {
        return Some(token);
    }
    let digits = token.strip_prefix('-').unwrap_or(token);
    let is_number = digits.starts_with(|first: char| first.is_ascii_digit())
        && digits
            .bytes()
            .all(|byte| byte.is_ascii_digit() || matches!(byte, b'.' | b'e' | b'E' | b'+' | b'-'));
    let infinite = is_number && token.parse::<f64>().is_ok_and(f64::is_infinite);
    infinite.then(|| &token[..token.len().min(LONGEST_TOKEN)])
}

/// Goes over the string that begins at `start` and replaces halves of surrogate pairs in it.
fn string(text: &str, start: usize, copied: &mut usize, out: &mut String, at: &mut usize) {
    let bytes = text.as_bytes();
    *at = start + 1;
    while let Some(&byte) = bytes.get(*at) {
        match byte {
            b'"' => {
                *at += 1;
                return;
            }
            b'\\' => match unit(bytes, *at) {
                Some(0xd800..0xdc00) if matches!(unit(bytes, *at + 6), Some(0xdc00..0xe000)) => {
                    *at += 12;
                }
                Some(0xd800..0xe000) => {
                    out.push_str(&text[*copied..*at]);
                    out.push_str("\\ufffd");
                    *at += 6;
                    *copied = *at;
                }
                // The character after it is not looked at: it may be a quote.
                _ => *at += 2,
            },
            _ => *at += 1,
        }
    }
}

/// The UTF-16 unit that an escape at this place stands for.
fn unit(bytes: &[u8], at: usize) -> Option<u32> {
    let digits = bytes.get(at..at + 6)?.strip_prefix(b"\\u")?;
    digits.iter().try_fold(0, |unit, &digit| {
        Some(16 * unit + char::from(digit).to_digit(16)?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_python_reads() {
        let text = r#"{"a": [0.0, Infinity], "b": -Infinity, "c": NaN, "d": 1e400, "e": -1E+999,
            "NaN": "Infinity, \" NaN", "f": 1e30, "g": "\ud800 \ud83d\ude00 \\ud800 \udc00"}"#;
        let value = parse(text).unwrap();
        assert_eq!(value["a"][0], 0.0);
        for (read, said) in [
            (&value["a"][1], "Infinity"),
            (&value["b"], "-Infinity"),
            (&value["c"], "NaN"),
            (&value["d"], "1e400"),
            (&value["e"], "-1E+999"),
        ] {
            assert_eq!(non_finite(read), Some(said));
        }
        assert_eq!(value["NaN"], "Infinity, \" NaN");
        assert_eq!(value["f"], 1e30);
        assert_eq!(value["g"], "\u{fffd} \u{1f600} \\ud800 \u{fffd}");
    }

    #[test]
    fn whole_numbers_of_any_length() {
        let digits = format!("{{\"a\": 1{}}}", "0".repeat(1000));
        let value = parse(&digits).unwrap();
        let said = non_finite(&value["a"]).unwrap();
        assert_eq!(said.len(), LONGEST_TOKEN);
        let digits = format!("{{\"a\": 1{}}}", "0".repeat(300));
        assert_eq!(parse(&digits).unwrap()["a"], 1e300);
    }

    #[test]
    fn what_transformers_saves_them_as() {
        let value = parse(r#"{"a": {"__float__": "Infinity"}}"#).unwrap();
        assert_eq!(non_finite(&value["a"]), Some("Infinity"));
    }

    #[test]
    fn other_errors_stay() {
        for text in [
            "{\"a\": Infinit}",
            "{\"a\": nan}",
            "{\"a\": +Infinity}",
            "{\"a\": NaN",
            "{\"a\": 'x'}",
            "\"\\u12",
            "\"\\",
            "\"",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
