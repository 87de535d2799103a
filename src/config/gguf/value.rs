use std::borrow::Cow;

use crate::config::error::shortened;

/// A value of a GGUF file's metadata, or the values of one of its small tensors, as the caller's
/// reader has it: borrowed from the reader, or owned where the reader has it in another form.
/// Integers of all widths are given as one of 64 bits.
///
/// `From` makes them of numbers, text, slices and vectors:
///
/// ```
/// use phasor::config::GgufValue;
///
/// // A reader of its own kind of values, whose arrays are lists of values.
/// enum Value {
///     U32(u32),
///     F32(f32),
///     Text(String),
///     Array(Vec<Value>),
/// }
///
/// fn given(value: &Value) -> Option<GgufValue<'_>> {
///     Some(match value {
///         Value::U32(number) => (*number).into(),
///         Value::F32(number) => (*number).into(),
///         Value::Text(text) => text.into(),
///         Value::Array(entries) => {
///             let number = |entry: &Value| match entry {
///                 Value::U32(number) => Some(*number),
///                 _ => None,
///             };
///             entries.iter().map(number).collect::<Option<Vec<u32>>>()?.into()
///         }
///     })
/// }
///
/// let sections = Value::Array(vec![Value::U32(16), Value::U32(24), Value::U32(24)]);
/// assert_eq!(given(&sections), Some(GgufValue::from(&[16u32, 24, 24])));
/// ```
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum GgufValue<'a> {
    /// An unsigned integer.
    U64(u64),
    /// A signed integer.
    I64(i64),
    /// A floating-point number; an f32 is given as the f64 of the same value.
    F64(f64),
    /// A truth value.
    Bool(bool),
    /// A string.
    Str(Cow<'a, str>),
    /// An array, or a tensor of type F32.
    F32Array(Cow<'a, [f32]>),
    /// An array.
    U32Array(Cow<'a, [u32]>),
    /// An array.
    I32Array(Cow<'a, [i32]>),
    /// An array.
    BoolArray(Cow<'a, [bool]>),
}

macro_rules! from_numbers {
    ($($number:ty => $variant:ident),* $(,)?) => {
        $(impl From<$number> for GgufValue<'_> {
            fn from(number: $number) -> Self {
                GgufValue::$variant(number.into())
            }
        })*
    };
}

from_numbers! {
    u8 => U64, u16 => U64, u32 => U64, u64 => U64,
    i8 => I64, i16 => I64, i32 => I64, i64 => I64,
    f32 => F64, f64 => F64, bool => Bool,
}

macro_rules! from_arrays {
    ($($entry:ty => $variant:ident),* $(,)?) => {
        $(impl<'a> From<&'a [$entry]> for GgufValue<'a> {
            fn from(entries: &'a [$entry]) -> Self {
                GgufValue::$variant(Cow::Borrowed(entries))
            }
        }

        impl<'a, const N: usize> From<&'a [$entry; N]> for GgufValue<'a> {
            fn from(entries: &'a [$entry; N]) -> Self {
                GgufValue::$variant(Cow::Borrowed(entries))
            }
        }

        impl<'a> From<&'a Vec<$entry>> for GgufValue<'a> {
            fn from(entries: &'a Vec<$entry>) -> Self {
                GgufValue::$variant(Cow::Borrowed(entries))
            }
        }

        impl From<Vec<$entry>> for GgufValue<'_> {
            fn from(entries: Vec<$entry>) -> Self {
                GgufValue::$variant(Cow::Owned(entries))
            }
        })*
    };
}

from_arrays! { f32 => F32Array, u32 => U32Array, i32 => I32Array, bool => BoolArray }

impl<'a> From<&'a str> for GgufValue<'a> {
    fn from(text: &'a str) -> Self {
        GgufValue::Str(Cow::Borrowed(text))
    }
}

impl<'a> From<&'a String> for GgufValue<'a> {
    fn from(text: &'a String) -> Self {
        GgufValue::Str(Cow::Borrowed(text))
    }
}

impl From<String> for GgufValue<'_> {
    fn from(text: String) -> Self {
        GgufValue::Str(Cow::Owned(text))
    }
}

/// A value as it is named in messages.
pub(super) fn display(value: &GgufValue<'_>) -> String {
    match value {
        GgufValue::U64(number) => number.to_string(),
        GgufValue::I64(number) => number.to_string(),
        GgufValue::F64(number) => number.to_string(),
        GgufValue::Bool(flag) => flag.to_string(),
        GgufValue::Str(text) => format!("{:?}", shortened(text)),
        GgufValue::F32Array(values) => format!("an array of {}", values.len()),
        GgufValue::U32Array(values) => format!("an array of {}", values.len()),
        GgufValue::I32Array(values) => format!("an array of {}", values.len()),
        GgufValue::BoolArray(values) => format!("an array of {}", values.len()),
    }
}
