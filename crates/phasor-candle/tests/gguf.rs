//! Rotations of GGUF files, which candle writes here and reads.

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use phasor::Pairing;
use phasor::config::{GgufValue, ModelConfig};
use phasor_candle::{RotaryEmbedding, gguf_config};
use std::io::Cursor;

/// A file with these values, and tensors of f32.
fn file(metadata: &[(&str, Value)], tensors: &[(&str, &[f32])]) -> Cursor<Vec<u8>> {
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let tensors: Vec<_> = tensors
        .iter()
        .map(|(name, values)| {
            let tensor = Tensor::new(*values, &Device::Cpu).unwrap();
            (*name, QTensor::quantize(&tensor, GgmlDType::F32).unwrap())
        })
        .collect();
    let tensors: Vec<_> = tensors
        .iter()
        .map(|(name, tensor)| (*name, tensor))
        .collect();
    let mut file = Cursor::new(Vec::new());
    gguf_file::write(&mut file, &metadata, &tensors).unwrap();
    file.set_position(0);
    file
}

fn config(mut file: Cursor<Vec<u8>>) -> phasor_candle::Result<ModelConfig> {
    let content = gguf_file::Content::read(&mut file).unwrap();
    gguf_config(&content, &mut file)
}

fn llama() -> Vec<(&'static str, Value)> {
    vec![
        ("general.architecture", Value::String("llama".into())),
        ("llama.embedding_length", Value::U32(64)),
        ("llama.attention.head_count", Value::U32(4)),
        ("llama.block_count", Value::U32(2)),
        ("llama.rope.freq_base", Value::F32(500_000.0)),
    ]
}

#[test]
fn values_and_factors_arrive() {
    let plain = config(file(&llama(), &[])).unwrap();
    let rope = plain.rope().unwrap();
    assert_eq!(
        (rope.head_dim(), rope.pairing()),
        (16, Pairing::Interleaved)
    );
    assert_eq!(rope.theta(), 5e5);

    // Llama 3.1 stores factors of its frequencies in a tensor.
    let factors = [1.0, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0];
    let mut scaled = file(&llama(), &[("rope_freqs.weight", &factors)]);
    let content = gguf_file::Content::read(&mut scaled).unwrap();
    let rotary = RotaryEmbedding::from_gguf(&content, &mut scaled).unwrap();
    let expected = ModelConfig::from_gguf(|key| match key {
        "general.architecture" => Some("llama".into()),
        "llama.embedding_length" => Some(64u32.into()),
        "llama.attention.head_count" => Some(4u32.into()),
        "llama.block_count" => Some(2u32.into()),
        "llama.rope.freq_base" => Some(500_000f32.into()),
        "rope_freqs.weight" => Some(GgufValue::from(&factors)),
        _ => None,
    });
    let expected = expected.unwrap().rope().unwrap().rope().unwrap();
    assert_eq!(*rotary.rope(), expected);
    assert_ne!(*rotary.rope(), rope.rope().unwrap());
}

#[test]
fn arrays_arrive_whatever_their_type() {
    let sections = [4i32, 2, 2, 0];
    let of = |number: fn(i32) -> Value| Value::Array(sections.iter().map(|&n| number(n)).collect());
    let expected = ModelConfig::from_gguf(|key| match key {
        "general.architecture" => Some("qwen2vl".into()),
        "qwen2vl.embedding_length" => Some(64u32.into()),
        "qwen2vl.attention.head_count" => Some(4u32.into()),
        "qwen2vl.rope.dimension_sections" => Some((&sections).into()),
        _ => None,
    })
    .unwrap();
    let with = |array| {
        let keys = [
            ("general.architecture", Value::String("qwen2vl".into())),
            ("qwen2vl.embedding_length", Value::U64(64)),
            ("qwen2vl.attention.head_count", Value::U16(4)),
            ("qwen2vl.rope.dimension_sections", array),
        ];
        config(file(&keys, &[]))
    };
    for array in [
        of(Value::I32),
        of(|n| Value::I8(n as i8)),
        of(|n| Value::I16(n as i16)),
        of(|n| Value::I64(n.into())),
        of(|n| Value::U8(n as u8)),
        of(|n| Value::U16(n as u16)),
        of(|n| Value::U32(n as u32)),
        of(|n| Value::U64(n as u64)),
    ] {
        assert_eq!(with(array).unwrap(), expected);
    }
    // What is no list of integers is refused by name, or not seen.
    for array in [of(|n| Value::F32(n as f32)), of(|n| Value::Bool(n > 0))] {
        let error = with(array).unwrap_err().to_string();
        assert!(error.contains("dimension_sections"), "{error}");
    }
    let texts = with(of(|n| Value::String(n.to_string())));
    assert_ne!(texts.ok(), Some(expected));
}

#[test]
fn what_a_file_lacks_is_named() {
    let error = config(file(&[], &[])).unwrap_err().to_string();
    assert!(error.contains("general.architecture"), "{error}");
    let several = [
        ("general.architecture", Value::String("gemma3".into())),
        ("gemma3.attention.key_length", Value::U32(16)),
        ("gemma3.block_count", Value::U32(6)),
        ("gemma3.embedding_length", Value::U32(64)),
        ("gemma3.attention.head_count", Value::U32(4)),
        ("gemma3.attention.sliding_window", Value::U32(512)),
        ("gemma3.rope.freq_base", Value::F32(1e6)),
    ];
    let mut gemma = file(&several, &[]);
    let content = gguf_file::Content::read(&mut gemma).unwrap();
    let error = RotaryEmbedding::from_gguf(&content, &mut gemma)
        .unwrap_err()
        .to_string();
    assert!(error.contains("rope_of_layer"), "{error}");
    let model = gguf_config(&content, &mut gemma).unwrap();
    let thetas = [0, 5].map(|layer| model.rope_of_layer(layer).unwrap().unwrap().theta());
    assert_eq!(thetas, [1e4, 1e6]);
    // A tensor that is named and cannot be read.
    let mut cut = file(&llama(), &[("rope_freqs.weight", &[1.0; 8])]);
    let content = gguf_file::Content::read(&mut cut).unwrap();
    let len = cut.get_ref().len();
    cut.get_mut().truncate(len - 16);
    assert!(gguf_config(&content, &mut cut).is_err());
}
