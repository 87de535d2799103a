use crate::Result;
use candle_core::Device;
use candle_core::quantized::gguf_file::{Content, Value};
use phasor::config::{GgufValue, ModelConfig};
use std::io::{Read, Seek};

/// Tensors that say how frequencies are scaled.
const FACTORS: [&str; 3] = [
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
];

/// How the layers of a GGUF file's model rotate. `reader` is the file: a model may store factors of its
/// frequencies in a tensor.
///
/// # Errors
/// Those of [`ModelConfig::from_gguf`]; [`Error::Candle`](crate::Error::Candle) if such a tensor cannot be
/// read.
pub fn gguf_config<R: Read + Seek>(content: &Content, reader: &mut R) -> Result<ModelConfig> {
    let mut factors = Vec::new();
    for name in FACTORS {
        if content.tensor_infos.contains_key(name) {
            let tensor = content.tensor(reader, name, &Device::Cpu)?;
            let values = tensor.dequantize(&Device::Cpu)?.flatten_all()?;
            factors.push((name, values.to_vec1::<f32>()?));
        }
    }
    let lookup = |key: &str| match factors.iter().find(|(name, _)| *name == key) {
        Some((_, values)) => Some(values.into()),
        None => content.metadata.get(key).and_then(value),
    };
    Ok(ModelConfig::from_gguf(lookup)?)
}

fn value(value: &Value) -> Option<GgufValue<'_>> {
    Some(match value {
        Value::U8(number) => (*number).into(),
        Value::I8(number) => (*number).into(),
        Value::U16(number) => (*number).into(),
        Value::I16(number) => (*number).into(),
        Value::U32(number) => (*number).into(),
        Value::I32(number) => (*number).into(),
        Value::U64(number) => (*number).into(),
        Value::I64(number) => (*number).into(),
        Value::F32(number) => (*number).into(),
        Value::F64(number) => (*number).into(),
        Value::Bool(truth) => (*truth).into(),
        Value::String(text) => text.into(),
        Value::Array(values) => return array(values),
    })
}

/// An array of numbers or truth values, such as a number of heads for each layer.
fn array(values: &[Value]) -> Option<GgufValue<'static>> {
    fn all<T>(values: &[Value], of: impl Fn(&Value) -> Option<T>) -> Option<Vec<T>> {
        values.iter().map(of).collect()
    }
    Some(match values.first()? {
        Value::F32(_) => all(values, |value| match value {
            Value::F32(number) => Some(*number),
            _ => None,
        })?
        .into(),
        Value::Bool(_) => all(values, |value| match value {
            Value::Bool(truth) => Some(*truth),
            _ => None,
        })?
        .into(),
        Value::U8(_) | Value::U16(_) | Value::U32(_) | Value::U64(_) => {
            all(values, |value| match value {
                Value::U8(number) => Some((*number).into()),
                Value::U16(number) => Some((*number).into()),
                Value::U32(number) => Some(*number),
                Value::U64(number) => u32::try_from(*number).ok(),
                _ => None,
            })?
            .into()
        }
        _ => all(values, |value| match value {
            Value::I8(number) => Some((*number).into()),
            Value::I16(number) => Some((*number).into()),
            Value::I32(number) => Some(*number),
            Value::I64(number) => i32::try_from(*number).ok(),
            _ => None,
        })?
        .into(),
    })
}
