//! Every architecture of llama.cpp against what its own source makes of a file's metadata, layer by
//! layer: `tests/goldens/llama-cpp`, made by `scripts/goldens/llama-cpp.py`.

use std::collections::BTreeMap;

use phasor::Pairing;
use phasor::config::{Axes, ConfigError, GgmlMrope, GgufValue, ModelConfig, RopeConfig};
use serde_json::Value;

const GOLDEN: &str = include_str!("goldens/llama-cpp/architectures.json");

/// Where a reader of such files should not do as llama.cpp does, by architecture and case, and why.
/// Beside these, a file is asked for keys of latent attention (`ASKED_FOR`), and for
/// `attention.head_count_kv` in a model of which some layers have no heads; and a layer without heads
/// does not rotate, where llama.cpp's graph would rotate nothing.
const DIFFERENCES: &[(&str, &str, &str)] = &[
    (
        "granitemoe",
        "not finetuned",
        "its loader no longer reads the switch that the converter writes for models without positions",
    ),
    (
        "pangu-embedded",
        "factors by length, type longrope",
        "loads the factors and does not use them: other frequencies than the model's",
    ),
    (
        "cogvlm",
        "*",
        "rotates with theta 10,000 whatever rope.freq_base says: a file that says otherwise is refused",
    ),
    (
        "*",
        "type none",
        "layers with a window whose loader copies the factor are scaled, although the type is none",
    ),
];

const ASKED_FOR: [&str; 4] = [
    "rope.dimension_count",
    "attention.key_length_mla",
    "attention.key_length_mla_swa",
    "attention.head_count_kv",
];

fn value(value: &Value) -> GgufValue<'static> {
    match value {
        Value::Bool(flag) => (*flag).into(),
        Value::String(text) => text.clone().into(),
        Value::Number(number) => match number.as_u64() {
            Some(number) => number.into(),
            None => number.as_f64().unwrap().into(),
        },
        Value::Array(entries) => {
            let entry = |entry: &Value| u32::try_from(entry.as_u64().unwrap()).unwrap();
            entries.iter().map(entry).collect::<Vec<_>>().into()
        }
        other => panic!("{other}"),
    }
}

fn tensor(values: &Value) -> GgufValue<'static> {
    let values = values.as_array().unwrap().iter();
    let values: Vec<f32> = values.map(|v| v.as_f64().unwrap() as f32).collect();
    values.into()
}

fn read(architecture: &str, case: &Value) -> Result<ModelConfig, ConfigError> {
    let prefix = format!("{architecture}.");
    ModelConfig::from_gguf(|key| {
        if key == "general.architecture" {
            return Some(GgufValue::from(architecture.to_string()));
        }
        match key.strip_prefix(&prefix) {
            // All layers of an assistant predict further tokens.
            Some("nextn_predict_layers") if architecture == "gemma4-assistant" => {
                Some(value(&case["metadata"]["block_count"]))
            }
            Some(key) => case["metadata"].get(key).map(value),
            None => case["tensors"]
                .get(key.strip_suffix(".weight")?)
                .map(tensor),
        }
    })
}

fn has_no_heads(case: &Value, layer: usize) -> bool {
    let heads = case["metadata"].get("attention.head_count_kv");
    heads.is_some_and(|heads| heads[layer] == 0)
}

fn numbers(value: &Value) -> Vec<f64> {
    let values = value.as_array().unwrap().iter();
    values.map(|number| number.as_f64().unwrap()).collect()
}

/// What is different about frequencies and the factor of cos and sin.
fn compare_frequencies(config: &RopeConfig, length: u64, golden: &Value) -> Result<(), String> {
    let frequencies = config.frequencies_for_length(length);
    let frequencies = frequencies.map_err(|error| error.to_string())?;
    let all = frequencies.inv_freq();
    let pairs = all.len();
    let mut chosen = vec![0, 1.min(pairs - 1), pairs / 2, pairs - 1];
    chosen.dedup();
    let got: Vec<f64> = chosen.into_iter().map(|pair| all[pair]).collect();
    let expected = numbers(&golden["inv_freq"]);
    let near = |(got, expected): (&f64, &f64)| (got - expected).abs() <= 1e-7 * expected;
    if got.len() != expected.len() || !got.iter().zip(&expected).all(near) {
        return Err(format!("frequencies {got:?}, not {expected:?}"));
    }
    let factor = f64::from(frequencies.attention_factor());
    let expected = golden["magnitude"].as_f64().unwrap();
    if (factor - expected).abs() > 1e-6 * expected {
        return Err(format!("factor {factor}, not {expected}"));
    }
    Ok(())
}

fn compare(config: &RopeConfig, golden: &Value) -> Result<(), String> {
    let dims = [config.rotary_dim(), config.rotary_offset()].map(|dims| dims as u64);
    let expected = ["dims", "offset"].map(|key| golden[key].as_u64().unwrap_or(u64::MAX));
    if dims != expected {
        return Err(format!("dims and offset {dims:?}, not {expected:?}"));
    }
    let (pairing, axes) = match golden["mode"].as_str().unwrap() {
        "norm" => (Pairing::Interleaved, None),
        "neox" => (Pairing::HalfSplit, None),
        "mrope" => (Pairing::HalfSplit, Some(GgmlMrope::Mrope)),
        "imrope" => (Pairing::HalfSplit, Some(GgmlMrope::Imrope)),
        other => panic!("{other}"),
    };
    let axes = axes.map(|mode| {
        let sections = numbers(&golden["sections"]);
        let sections = sections.iter().map(|&n| n as usize).collect::<Vec<_>>();
        let sections = sections.try_into().unwrap();
        Axes::Ggml { mode, sections }
    });
    if (config.pairing(), config.axes()) != (pairing, axes.as_ref()) {
        let got = (config.pairing(), config.axes());
        return Err(format!("{got:?}, not {:?}", (pairing, axes)));
    }
    let config = config.clone().without_axes();
    compare_frequencies(&config, 1, golden)?;
    let long = golden.get("long").unwrap_or(golden);
    compare_frequencies(&config, 1 << 20, long)
}

/// What is different, if anything.
fn difference(architecture: &str, case: &Value, group: &Value) -> Result<(), String> {
    let read = read(architecture, case);
    if let Some(reason) = group.get("refused") {
        // A check of llama.cpp's that failed may be of no account here.
        return match read {
            Ok(_) if reason == "unknown tensors" => Err("read, where llama.cpp refuses".into()),
            _ => Ok(()),
        };
    }
    let layers = group["layers"].as_array().unwrap();
    if layers.iter().all(Value::is_null) {
        return match read {
            Err(ConfigError::NoRotation { .. }) => Ok(()),
            Ok(model) => Err(format!("{:?} rotate, where none does", model.layer_types())),
            Err(error) => Err(error.to_string()),
        };
    }
    let model = match read {
        Err(ConfigError::Missing { key, .. })
            if ASKED_FOR.iter().any(|&asked| key.ends_with(asked)) =>
        {
            return Ok(());
        }
        read => read.map_err(|error| error.to_string())?,
    };
    // Layers of one kind have one config, and forming frequencies takes the most time.
    let mut compared: Vec<(*const RopeConfig, u64)> = Vec::new();
    for (index, layer) in layers.iter().enumerate() {
        let config = match model.rope_of_layer(index) {
            Err(ConfigError::Missing { key, .. })
                if ASKED_FOR.iter().any(|&asked| key.ends_with(asked)) =>
            {
                return Ok(());
            }
            config => config.map_err(|error| error.to_string())?,
        };
        let result = match (config, layer.as_u64()) {
            (None, None) => Ok(()),
            (Some(config), Some(rotation)) if compared.contains(&(config, rotation)) => Ok(()),
            (Some(config), Some(rotation)) => {
                compared.push((config, rotation));
                compare(config, &group["rotations"][rotation as usize])
            }
            (None, Some(_)) if has_no_heads(case, index) => Ok(()),
            (None, Some(_)) => Err("does not rotate".into()),
            // Its graph has one layer, whatever the file says.
            (Some(_), None) if architecture == "eagle3" => Ok(()),
            (Some(_), None) => Err("rotates".into()),
        };
        result.map_err(|error| format!("layer {index} {error}"))?;
    }
    Ok(())
}

#[test]
fn every_architecture_is_read_as_by_llama_cpp() {
    let golden: Value = serde_json::from_str(GOLDEN).unwrap();
    let mut found = Vec::new();
    let mut results = BTreeMap::new();
    for case in golden["cases"].as_array().unwrap() {
        let name = case["case"].as_str().unwrap();
        for group in case["groups"].as_array().unwrap() {
            for architecture in group["architectures"].as_array().unwrap() {
                let architecture = architecture.as_str().unwrap();
                *results.entry(architecture).or_insert(0) += 1;
                let matches = |known: &str, name| known == "*" || known == name;
                let mut known = DIFFERENCES.iter();
                let known =
                    known.find(|known| matches(known.0, architecture) && matches(known.1, name));
                match difference(architecture, case, group) {
                    Ok(()) if known.is_some_and(|known| known.0 != "*" && known.1 != "*") => {
                        found.push(format!("{architecture}, {name}: no longer different"))
                    }
                    Err(error) if known.is_none() => {
                        found.push(format!("{architecture}, {name}: {error}"))
                    }
                    _ => {}
                }
            }
        }
    }
    assert!(
        found.is_empty(),
        "{} differences:\n{}",
        found.len(),
        found.join("\n")
    );
    // Every architecture in every case.
    let cases = golden["cases"].as_array().unwrap().len();
    assert!(results.len() > 130 && results.values().all(|&count| count == cases));
}

/// What llama.cpp has a name for and no code.
#[test]
fn architectures_without_code_are_unknown() {
    let golden: Value = serde_json::from_str(GOLDEN).unwrap();
    let without = golden["without_code"].as_array().unwrap();
    assert!(!without.is_empty());
    for architecture in without {
        let read = read(architecture.as_str().unwrap(), &golden["cases"][0]);
        assert!(matches!(read, Err(ConfigError::UnknownArchitecture { .. })));
    }
}
