//! Configs against what other implementations computed from them: the files in `tests/goldens`.
//!
//! transformers forms angles in f32, so that its error grows with the position. The comparison is
//! with exact angles and allows for just that: see `Bounds`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use phasor::config::{
    Axes, ConfigError, GgmlMrope, ModelConfig, OutputOrder, RopeConfig, Scaling, YarnScaling,
};
use phasor::{Direction, Dtype, Frequencies, Host, InOut, Layout, Pairing, Positions, Problem};
use proptest::prelude::*;
use safetensors::{Dtype as FileDtype, SafeTensors};
use serde_json::{Value, json};

fn folder(peer: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/goldens")
        .join(peer)
}

struct Golden {
    name: String,
    metadata: BTreeMap<String, String>,
    bytes: Vec<u8>,
}

impl Golden {
    fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.bytes).unwrap()
    }

    fn f32s(&self, name: &str) -> (Vec<usize>, Vec<f32>) {
        let tensors = self.tensors();
        let tensor = tensors.tensor(name).unwrap();
        assert_eq!(tensor.dtype(), FileDtype::F32, "{name}");
        let values = tensor.data().chunks_exact(4);
        let values = values.map(|b| f32::from_le_bytes(b.try_into().unwrap()));
        (tensor.shape().to_vec(), values.collect())
    }

    fn i32s(&self, name: &str) -> Vec<i64> {
        let tensors = self.tensors();
        let tensor = tensors.tensor(name).unwrap();
        assert_eq!(tensor.dtype(), FileDtype::I32, "{name}");
        let values = tensor.data().chunks_exact(4);
        let value = |b: &[u8]| i64::from(i32::from_le_bytes(b.try_into().unwrap()));
        values.map(value).collect()
    }

    fn i64s(&self, name: &str) -> (Vec<usize>, Vec<i64>) {
        let tensors = self.tensors();
        let tensor = tensors.tensor(name).unwrap();
        assert_eq!(tensor.dtype(), FileDtype::I64, "{name}");
        let values = tensor.data().chunks_exact(8);
        let values = values.map(|b| i64::from_le_bytes(b.try_into().unwrap()));
        (tensor.shape().to_vec(), values.collect())
    }
}

fn goldens(peer: &str) -> Vec<Golden> {
    let mut paths: Vec<_> = std::fs::read_dir(folder(peer))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    paths.sort();
    assert!(!paths.is_empty(), "no goldens of {peer}");
    let read = |path: PathBuf| {
        let bytes = std::fs::read(&path).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let metadata = header.metadata().clone().unwrap_or_default();
        Golden {
            name: path.file_stem().unwrap().to_str().unwrap().to_string(),
            metadata: metadata.into_iter().collect(),
            bytes,
        }
    };
    paths.into_iter().map(read).collect()
}

/// How far transformers may be off, in units of what its arithmetic explains.
///
/// An angle is `fl(position) * fl(inv_freq)`: rounding inv_freq (`power` units of 2^-24, measured
/// below: it comes from a power and a division) and the product (1 unit) is relative to the angle.
/// Rounding cos and sin is absolute.
struct Bounds {
    /// Relative error of inv_freq, in units of 2^-24.
    power: f64,
    /// Absolute error of cos and sin, in units of 2^-24.
    trigonometry: f64,
    /// Error of rotated elements, in units of 2^-24 of the sum of the pair's magnitudes.
    rotated: f64,
}

/// Largest seen: inv_freq 7.98 units, cos and sin 1.78 and rotated elements 2.4 beside the angle's
/// error.
const BOUNDS: Bounds = Bounds {
    power: 10.0,
    trigonometry: 2.0,
    rotated: 3.0,
};

const UNIT: f64 = 1.0 / 16777216.0;

#[derive(Default, Debug)]
struct Worst {
    inv_freq: f64,
    trigonometry: f64,
    rotated: f64,
}

/// Radians per position, summed over the axes (of which one is not 0).
fn inv_freq(frequencies: &Frequencies) -> Vec<f64> {
    let radians = std::f64::consts::TAU / 2f64.powi(64);
    let step = |pair| frequencies.phase(pair, 1) as i64 as f64 * radians;
    (0..frequencies.pairs()).map(step).collect()
}

/// The frequencies of a call and what it says about the rest.
struct Call<'a> {
    golden: &'a Golden,
    name: &'a str,
    config: &'a RopeConfig,
    frequencies: Frequencies,
}

impl Call<'_> {
    fn tensor(&self, name: &str) -> String {
        format!("{}.{name}", self.name)
    }

    /// `[axes, tokens]`
    fn positions(&self) -> Vec<Vec<i64>> {
        let (shape, values) = self.golden.i64s(&self.tensor("position_ids"));
        let tokens = *shape.last().unwrap();
        values.chunks(tokens).map(<[i64]>::to_vec).collect()
    }

    /// The positions of a token, one per axis of the frequencies.
    fn token(&self, positions: &[Vec<i64>], token: usize) -> Vec<i64> {
        let axes = self.frequencies.axes();
        (0..axes)
            .map(|axis| positions[axis.min(positions.len() - 1)][token])
            .collect()
    }

    fn check_inv_freq(&self, worst: &mut Worst) {
        let (_, expected) = self.golden.f32s(&self.tensor("inv_freq"));
        let ours = inv_freq(&self.frequencies);
        // The tables of vision towers hold one axis; ERNIE 4.5 VL's is permuted.
        if self.golden.name == "ernie4_5_vl_moe" {
            return;
        }
        let ours = &ours[..expected.len().min(ours.len())];
        assert_eq!(ours.len(), expected.len(), "{}", self.golden.name);
        for (pair, (ours, expected)) in ours.iter().zip(&expected).enumerate() {
            let expected = f64::from(*expected);
            if expected == 0.0 {
                assert_eq!(*ours, 0.0);
                continue;
            }
            let error = ((ours - expected) / expected).abs() / UNIT;
            assert!(
                error <= BOUNDS.power,
                "{} {}: inv_freq[{pair}] {ours:e}, {expected:e}: {error} units",
                self.golden.name,
                self.name,
            );
            worst.inv_freq = worst.inv_freq.max(error);
        }
    }

    /// What the angle's error may come to at a token, per pair.
    fn angle_bound(&self, pair: usize, at: &[i64]) -> f64 {
        largest_angle(&self.frequencies, pair, at) * (BOUNDS.power + 1.0) * UNIT
    }

    fn check_cos_sin(&self, worst: &mut Worst) {
        let (shape, cos) = self.golden.f32s(&self.tensor("cos"));
        let (_, sin) = self.golden.f32s(&self.tensor("sin"));
        let width = shape[1];
        let pairs = self.frequencies.pairs();
        // A table of full width holds each pair twice: side by side, or the whole row again.
        let side_by_side = cos.chunks(2).all(|two| two[0] == two[1]) && width > pairs;
        let factor = f64::from(self.frequencies.attention_factor());
        let positions = self.positions();
        for token in 0..shape[0] {
            let at = self.token(&positions, token);
            for column in 0..width {
                let pair = if side_by_side {
                    column / 2
                } else {
                    column % pairs
                };
                let (our_cos, our_sin) = self.frequencies.cos_sin_at(pair, &at);
                let index = token * width + column;
                let error = f64::from((our_cos - cos[index]).abs())
                    .max(f64::from((our_sin - sin[index]).abs()));
                let beyond = (error / factor - self.angle_bound(pair, &at)) / UNIT;
                assert!(
                    beyond <= BOUNDS.trigonometry,
                    "{} {}: pair {pair} at {at:?}: ({our_cos}, {our_sin}), ({}, {}): {beyond} units",
                    self.golden.name,
                    self.name,
                    cos[index],
                    sin[index],
                );
                worst.trigonometry = worst.trigonometry.max(beyond);
            }
        }
    }

    fn check_rotated(&self, bshd: bool, worst: &mut Worst) {
        for tensor in ["q", "k"] {
            let (shape, mut x) = self.golden.f32s(&self.tensor(tensor));
            let (_, expected) = self.golden.f32s(&self.tensor(&format!("{tensor}_rotated")));
            let before = x.clone();
            let head_dim = shape[2];
            let layout = if bshd {
                Layout::bshd(1, shape[0], shape[1], head_dim)
            } else {
                Layout::bhsd(1, shape[1], shape[0], head_dim)
            };
            let layout = layout.with_rotary_offset(self.config.rotary_offset());
            let positions = self.positions();
            let rope = phasor::Rope::new(self.frequencies.clone(), self.config.pairing())
                .with_direction(self.config.direction());
            let rotator = Host::new().rotator(&rope);
            let plan = rotator.plan(&Problem::new(Dtype::F32).q(layout)).unwrap();
            let flat: Vec<i64> = positions.concat();
            let given = match positions.len() {
                1 => Positions::per_token(&flat),
                _ => Positions::per_axis(&flat),
            };
            let in_place = Some(InOut::InPlace(&mut x[..]));
            rotator.rotate(&plan, in_place, None, given).unwrap();

            let rotary_dim = self.config.rotary_dim();
            let offset = self.config.rotary_offset();
            let pairs = rotary_dim / 2;
            for (row, ours) in x.chunks(head_dim).enumerate() {
                let token = if bshd { row / shape[1] } else { row % shape[1] };
                let at = self.token(&positions, token);
                let expected = &expected[row * head_dim..][..head_dim];
                let before = &before[row * head_dim..][..head_dim];
                for dim in 0..head_dim {
                    if dim < offset || dim >= offset + rotary_dim {
                        assert_eq!(ours[dim].to_bits(), expected[dim].to_bits());
                        continue;
                    }
                    let inside = dim - offset;
                    let (pair, second) = match self.config.pairing() {
                        Pairing::HalfSplit => (inside % pairs, inside / pairs),
                        Pairing::Interleaved => (inside / 2, inside % 2),
                    };
                    let theirs = match self.config.transformers_output_order() {
                        OutputOrder::AsInput => dim,
                        OutputOrder::HalfSplit => offset + pair + second * pairs,
                        other => unreachable!("{other:?}"),
                    };
                    let (a, b) = match self.config.pairing() {
                        Pairing::HalfSplit => (offset + pair, offset + pair + pairs),
                        Pairing::Interleaved => (offset + 2 * pair, offset + 2 * pair + 1),
                    };
                    let size = f64::from(before[a].abs() + before[b].abs())
                        * f64::from(self.frequencies.attention_factor());
                    let error = f64::from((ours[dim] - expected[theirs]).abs());
                    let beyond = (error / size - self.angle_bound(pair, &at)) / UNIT;
                    assert!(
                        beyond <= BOUNDS.rotated,
                        "{} {}: {tensor}, dim {dim} at {at:?}: {} and {}: {beyond} units",
                        self.golden.name,
                        self.name,
                        ours[dim],
                        expected[theirs],
                    );
                    worst.rotated = worst.rotated.max(beyond);
                }
            }
        }
    }
}

#[test]
fn transformers_agrees() {
    let mut worst = Worst::default();
    let mut calls_checked = 0;
    for golden in &goldens("transformers") {
        let name = &golden.name;
        let model = ModelConfig::from_hf_config(&golden.metadata["config"])
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let calls: Value = serde_json::from_str(&golden.metadata["calls"]).unwrap();
        for call in calls.as_array().unwrap() {
            let call_name = call["name"].as_str().unwrap();
            let config = if golden.metadata["sub_config"] == "vision_config" {
                model.vision().unwrap().unwrap()
            } else {
                match call["layer_type"].as_str() {
                    Some(layer_type) => model.rope_for(layer_type).unwrap(),
                    None => model.rope().unwrap(),
                }
            };
            let pairing = call["pairing"].as_str().unwrap();
            let (expected_pairing, order) = match pairing {
                "half_split" | "half_split_of_head" => (Pairing::HalfSplit, OutputOrder::AsInput),
                "interleaved" => (Pairing::Interleaved, OutputOrder::AsInput),
                "interleaved_in_halves_out" => (Pairing::Interleaved, OutputOrder::HalfSplit),
                other => panic!("{name}: pairing {other}"),
            };
            assert_eq!(config.pairing(), expected_pairing, "{name}");
            assert_eq!(config.transformers_output_order(), order, "{name}");
            assert_eq!(
                config.direction() == Direction::Inverse,
                call["direction"] == "inverse",
                "{name}"
            );
            assert_eq!(config.rotary_dim() as u64, call["rotary_dim"], "{name}");
            let scale: f64 = golden.metadata["score_scale"].parse().unwrap();
            let off = (config.score_scale() / scale - 1.0).abs();
            assert!(off < 1e-14, "{name}: {} {scale}", config.score_scale());

            // transformers never uses Phi-3.5-MoE's long factors (5.23 passes no length on).
            let length = match (name.as_str(), call_name) {
                ("phimoe", "long") => 1,
                _ => call["seq_len"].as_u64().unwrap(),
            };
            let frequencies = config.frequencies_for_length(length).unwrap();
            let factor = call["attention_factor"].as_f64().unwrap() as f32;
            assert_eq!(frequencies.attention_factor(), factor, "{name}");
            let call = Call {
                golden,
                name: call_name,
                config,
                frequencies,
            };
            call.check_inv_freq(&mut worst);
            call.check_cos_sin(&mut worst);
            call.check_rotated(
                call_is_bshd(&golden.metadata["calls"], call_name),
                &mut worst,
            );
            calls_checked += 1;
        }
    }
    println!("{calls_checked} calls, largest errors beside the angle's, in 2^-24: {worst:?}");
}

fn call_is_bshd(calls: &str, name: &str) -> bool {
    let calls: Value = serde_json::from_str(calls).unwrap();
    let call = calls
        .as_array()
        .unwrap()
        .iter()
        .find(|call| call["name"] == name);
    call.unwrap()["layout"] == "bshd"
}

/// The smallest config of a family: its `model_type`, and for those in `NEED_MORE` what has no default
/// or switches the rotation on.
fn smallest(model_type: &str, family: &Value) -> Result<ModelConfig, ConfigError> {
    let mut config = json!({"model_type": model_type});
    if !NEED_MORE.contains(&model_type) {
        return ModelConfig::from_hf_config(&config.to_string());
    }
    let encoder = model_type == "esm";
    config["position_embedding_type"] = json!(if encoder { "rotary" } else { "rope" });
    config["use_mem_rope"] = json!(true);
    config["head_dim"] = match model_type {
        // Its hidden_size is the width of the language model.
        "qwen2_vl_vision" => json!(80),
        _ => family["head_dim"].clone(),
    };
    // Sections of 32 pairs need half of the head.
    config["partial_rotary_factor"] = match family["mrope_section_default"].as_array() {
        Some(_) => json!(0.5),
        None => Value::Null,
    };
    ModelConfig::from_hf_config(&config.to_string())
}

/// Families of which the `model_type` alone is not read: towers without default sizes, sections that do
/// not fit the default head, and what does not rotate by default.
const NEED_MORE: &[&str] = &[
    "codegen",
    "cohere_compass_vision",
    "ernie4_5_vl_moe_vision",
    "esm",
    "exaone4_5_vision",
    "glm4v_moe_vision",
    "glm4v_text",
    "glm4v_vision",
    "glm5_next_vision",
    "glm_image_text",
    "glm_ocr_text",
    "glm_ocr_vision",
    "gptj",
    "granitemoehybrid",
    "lfm3_vl_vision",
    "minimax_m3_vl_vision",
    "mlcd",
    "mlcd_vision_model",
    "muse_glimmer_vision",
    "muse_spark_vision",
    "paddleocr_vl_vision",
    "pixtral",
    "qwen2_5_omni_vision_encoder",
    "qwen2_5_vl_vision",
    "qwen2_vl_vision",
    "qwen3_5_moe_vision",
    "qwen3_5_vision",
    "qwen3_omni_moe_vision_encoder",
    "qwen3_vl_moe_vision",
    "qwen3_vl_vision",
    "qwen4_exp_vision",
    "video_llama_3_vision",
    "zamba2",
];

/// What of a family's entry the config has otherwise.
fn differences(
    model_type: &str,
    family: &Value,
    layer_type: &str,
    config: &RopeConfig,
) -> Vec<String> {
    let mut differences = Vec::new();
    let mut compare = |what: &str, ours: String, theirs: String| {
        if ours != theirs {
            differences.push(format!(
                "{model_type} {layer_type}: {what} is {ours}, not {theirs}"
            ));
        }
    };
    let (pairing, order) = match family["pairing"].as_str() {
        Some("interleaved") => (Pairing::Interleaved, OutputOrder::AsInput),
        Some("interleaved_in_halves_out") => (Pairing::Interleaved, OutputOrder::HalfSplit),
        _ => (Pairing::HalfSplit, OutputOrder::AsInput),
    };
    let ours = (config.pairing(), config.transformers_output_order());
    compare(
        "pairing",
        format!("{ours:?}"),
        format!("{:?}", (pairing, order)),
    );
    if let Some(direction) = family["direction"].as_str() {
        let ours = format!("{:?}", config.direction()).to_lowercase();
        compare("direction", ours, direction.to_string());
    }
    let all = &family["rope_parameters"];
    let parameters = if all[layer_type].is_object() {
        &all[layer_type]
    } else {
        all
    };
    if let Some(theta) = parameters["rope_theta"].as_f64() {
        compare("theta", config.theta().to_string(), theta.to_string());
    }
    // These scale q (and k) themselves before scores are formed, which comes to the same.
    let scaled_before = ["esm", "openai_privacy_filter"].contains(&model_type);
    if let Some(scale) = family["score_scale"]["value"].as_f64()
        && !scaled_before
    {
        let off = (config.score_scale() / scale - 1.0).abs();
        if off > 1e-14 {
            compare(
                "score scale",
                config.score_scale().to_string(),
                scale.to_string(),
            );
        }
    }
    let pairs = &family["pairs"];
    if let Some(pairs) = pairs[layer_type].as_u64().or(pairs["all"].as_u64()) {
        // A tower's table holds the frequencies of one axis.
        let axes = match config.axes() {
            Some(Axes::VisionHalves) => 2,
            Some(Axes::Video(_)) => 3,
            _ => 1,
        };
        let theirs = 2 * axes * pairs;
        compare(
            "rotary_dim",
            config.rotary_dim().to_string(),
            theirs.to_string(),
        );
    }
    differences
}

#[test]
fn families_agree() {
    let text = std::fs::read_to_string(folder("transformers").join("families.json")).unwrap();
    let file: Value = serde_json::from_str(&text).unwrap();
    let (mut checked, mut unread, mut wrong) = (0, Vec::new(), Vec::new());
    for (model_type, family) in file["families"].as_object().unwrap() {
        if family["rope"] != true || model_type.is_empty() {
            continue;
        }
        let model = match smallest(model_type, family) {
            Ok(model) => model,
            Err(ConfigError::Unsupported { .. }) => continue,
            Err(error) => {
                unread.push(format!("{model_type}: {error}"));
                continue;
            }
        };
        for layer_type in model.layer_types() {
            let config = model.rope_for(layer_type).unwrap();
            wrong.extend(differences(model_type, family, layer_type, config));
            checked += 1;
        }
    }
    println!("{checked} kinds of layers checked");
    // Classes without a model_type of their own, and numbers that no head has.
    let known = |text: &String| {
        UNREAD
            .iter()
            .any(|name| text.starts_with(&format!("{name}:")))
    };
    unread.retain(|text| !known(text));
    assert!(unread.is_empty(), "{unread:#?}");
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(checked >= 200, "{checked}");
}

/// Entries of families.json that no config file stands for: a class without a model_type, and
/// sizes in a class' defaults that its own sections do not fit.
const UNREAD: [&str; 4] = [
    "EvollaModel",
    "glm4_moe",
    "qwen3_omni_moe_talker_text",
    "qwen3_omni_moe_text",
];

/// Every config class, as it is and with keys changed one at a time, layer by layer.
#[test]
fn layers_agree() {
    let text = std::fs::read_to_string(folder("transformers").join("layers.json")).unwrap();
    let file: Value = serde_json::from_str(&text).unwrap();
    let (mut checked, mut wrong) = (0, Vec::new());
    for (model_type, class) in file["classes"].as_object().unwrap() {
        for case in class["cases"].as_array().unwrap().chunks_exact(2) {
            let keys = case[0]
                .as_u64()
                .map(|number| &file["changes"][number as usize]);
            let keys = keys.unwrap_or(&case[0]);
            let mut config = class["base"].clone();
            config["model_type"] = json!(model_type);
            for (key, value) in keys.as_object().unwrap() {
                config[key] = value.clone();
            }
            let expected = &file["results"][case[1].as_u64().unwrap() as usize];
            let counted = keys.get("num_hidden_layers").is_some();
            if let Err(what) = layers_are(&config.to_string(), expected, counted) {
                wrong.push(format!("{config}: {what}"));
            }
            checked += 1;
        }
    }
    println!("{checked} configs checked");
    assert!(wrong.is_empty(), "{} of {checked}: {wrong:#?}", wrong.len());
    assert!(checked >= 7000, "{checked}");
}

/// Whether a config's layers rotate as they should; where it has no number of layers, its kinds.
fn layers_are(config: &str, expected: &Value, counted: bool) -> Result<(), String> {
    let model = ModelConfig::from_hf_config(config).map_err(|error| error.to_string())?;
    let (kinds, layers) = (&expected[0], expected[1].as_array().unwrap());
    // Layers of one kind have one config, and forming frequencies takes the most time.
    let mut checked: Vec<(*const RopeConfig, u64)> = Vec::new();
    for (layer, kind) in layers.iter().enumerate() {
        let config = match model.rope_of_layer(layer) {
            Ok(config) => config,
            // Without a number of layers, those of one kind.
            Err(ConfigError::Missing { .. }) if !counted && layer == 0 => {
                let of_kinds = kinds.as_array().unwrap();
                let all: Vec<_> = model.layer_types();
                return match of_kinds.iter().all(|kind| {
                    all.iter()
                        .any(|name| kind_is(model.rope_for(name).unwrap(), kind).is_ok())
                }) {
                    true => Ok(()),
                    false => Err(format!("kinds {all:?} are not {kinds}")),
                };
            }
            Err(error) => return Err(format!("layer {layer}: {error}")),
        };
        match (config, kind.as_u64()) {
            (None, None) => {}
            (Some(config), Some(kind)) if checked.contains(&(config, kind)) => {}
            (Some(config), Some(kind)) => {
                kind_is(config, &kinds[kind as usize])
                    .map_err(|what| format!("layer {layer}: {what}"))?;
                checked.push((config, kind));
            }
            (None, Some(_)) => return Err(format!("layer {layer} does not rotate")),
            (Some(_), None) => return Err(format!("layer {layer} rotates")),
        }
    }
    Ok(())
}

/// transformers' frequencies are f32, and some scalings subtract nearly equal ones.
fn kind_is(config: &RopeConfig, expected: &Value) -> Result<(), String> {
    for (index, length) in [1, 1 << 20].into_iter().enumerate() {
        // Once, where the length makes no difference.
        let expected = expected.get(index).unwrap_or(&expected[0]);
        let number = |index: usize| expected[index].as_f64().unwrap();
        let frequencies = config.frequencies_for_length(length);
        let frequencies = frequencies.map_err(|error| error.to_string())?;
        // Radians of each pair, on whichever axis it turns.
        let (by_axis, pairs) = (frequencies.inv_freq(), frequencies.pairs());
        let of_pair = |pair: usize| by_axis.iter().skip(pair).step_by(pairs).sum::<f64>();
        let ours = [
            of_pair(1.min(pairs - 1)),
            of_pair(pairs - 1),
            f64::from(frequencies.attention_factor()),
        ];
        let near = |(i, ours): (usize, &f64)| (ours - number(i + 1)).abs() <= 2e-6 * number(i + 1);
        if pairs as f64 != number(0) || !ours.iter().enumerate().all(near) {
            return Err(format!(
                "{pairs} pairs {ours:?}, not {expected}, at length {length}"
            ));
        }
    }
    Ok(())
}

/// The config that a case of ggml's `rope_ext` and `rope_multi` stands for.
fn ggml_config(golden: &Golden, case: &Value) -> RopeConfig {
    let number = |key: &str| case[key].as_f64().unwrap();
    let count = |key: &str| case[key].as_u64().unwrap() as usize;
    let mode = case["mode"].as_u64().unwrap();
    let mut config = RopeConfig::new(number("freq_base"), count("head_dim")).unwrap();
    // Mode 24 rotates the whole head, and takes half of it as n_dims.
    if mode != 24 {
        config = config.with_rotary_dim(count("n_dims")).unwrap();
    }
    let factor = 1.0 / number("freq_scale");
    let weight = number("ext_factor");
    let log_term = if weight == 0.0 {
        1.0
    } else {
        1.0 + 0.1 * factor.ln()
    };
    config = config
        .with_scaling(Scaling::Yarn(YarnScaling {
            attention_factor: Some(number("attn_factor") * log_term),
            beta_fast: number("beta_fast"),
            beta_slow: number("beta_slow"),
            extrapolation_factor: weight,
            ..YarnScaling::new(factor, count("n_ctx_orig") as u64)
        }))
        .unwrap();
    if golden.tensors().tensor("freq_factors").is_ok() {
        let (_, factors) = golden.f32s("freq_factors");
        let divisors = factors.iter().map(|&f| f64::from(f)).collect();
        config = config.with_frequency_divisors(divisors).unwrap();
    }
    if let Some(sections) = case["sections"].as_array() {
        let mode = match mode {
            8 => GgmlMrope::Mrope,
            40 => GgmlMrope::Imrope,
            24 => GgmlMrope::Vision,
            other => panic!("mode {other}"),
        };
        let section = |index: usize| sections[index].as_u64().unwrap() as usize;
        let sections = [section(0), section(1), section(2), section(3)];
        config = config.with_axes(Axes::Ggml { mode, sections });
    }
    config
}

/// ggml multiplies the angle by `theta^(-2 / n_dims)` from pair to pair, so that its error grows
/// with the pair: by this many units of 2^-24 of the angle for each. Beside that, it multiplies cos and
/// sin by the attention factor after they are rounded, which may make them the f32 next to ours: 1.87
/// units are the largest seen.
const GGML_PER_PAIR: f64 = 1.0;
const GGML_ABSOLUTE: f64 = 1.5;
const GGML_ABSOLUTE_WITH_FACTOR: f64 = 2.0;

#[test]
fn ggml_agrees() {
    let (mut cases, mut worst) = (0, 0f64);
    for golden in &goldens("ggml") {
        let name = &golden.name;
        let case: Value = serde_json::from_str(&golden.metadata["case"]).unwrap();
        let frequencies = ggml_config(golden, &case).frequencies().unwrap();
        let (shape, cos) = golden.f32s("cos");
        let (_, sin) = golden.f32s("sin");
        let (tokens, pairs) = (shape[0], shape[1]);
        assert_eq!(pairs, frequencies.pairs(), "{name}");
        let positions = golden.i32s("position_ids");
        let axes = frequencies.axes();
        let factor = f64::from(frequencies.attention_factor());
        let absolute = match factor {
            1.0 => GGML_ABSOLUTE,
            _ => GGML_ABSOLUTE_WITH_FACTOR,
        };
        for (index, (cos, sin)) in cos.iter().zip(&sin).enumerate() {
            let (token, pair) = (index / pairs, index % pairs);
            let at: Vec<i64> = (0..axes)
                .map(|axis| positions[axis * tokens + token])
                .collect();
            let (our_cos, our_sin) = frequencies.cos_sin_at(pair, &at);
            let error = f64::from((our_cos - cos).abs()).max(f64::from((our_sin - sin).abs()));
            let angle = largest_angle(&frequencies, pair, &at);
            let explained = angle * GGML_PER_PAIR * (pair + 2) as f64 * UNIT;
            let beyond = (error / factor - explained) / UNIT;
            assert!(
                beyond <= absolute,
                "{name}: pair {pair} at {at:?}: ({our_cos}, {our_sin}), ({cos}, {sin}): {beyond}",
            );
            worst = worst.max(beyond);
        }
        cases += 1;
    }
    println!("{cases} cases of ggml, largest error beside the angle's: {worst} units of 2^-24");
}

/// The sum over the axes of an angle's magnitudes, in radians.
fn largest_angle(frequencies: &Frequencies, pair: usize, at: &[i64]) -> f64 {
    let on_axis = |axis: usize| {
        let mut one = vec![0; at.len()];
        one[axis] = 1;
        let step = frequencies.phase_at(pair, &one) as i64 as f64;
        (step * std::f64::consts::TAU / 2f64.powi(64) * at[axis] as f64).abs()
    };
    (0..at.len()).map(on_axis).sum()
}

/// inv_freq against a peer's, to so many units of 2^-24.
fn check_inv_freq(name: &str, config: &RopeConfig, expected: &[f64], units: f64) -> f64 {
    // mlx-lm always takes LongRoPE's long factors.
    let frequencies = config.frequencies_for_length(u64::MAX).unwrap();
    let ours = inv_freq(&frequencies);
    assert_eq!(ours.len(), expected.len(), "{name}");
    let mut worst = 0f64;
    for (pair, (ours, expected)) in ours.iter().zip(expected).enumerate() {
        if *expected == 0.0 {
            assert_eq!(*ours, 0.0, "{name}");
            continue;
        }
        let error = ((ours - expected) / expected).abs() / UNIT;
        assert!(
            error <= units,
            "{name}: inv_freq[{pair}] {ours:e}, {expected:e}: {error} units"
        );
        worst = worst.max(error);
    }
    worst
}

fn plain_config(theta: &Value, head_dim: u64, max: &Value, table: Value) -> RopeConfig {
    let config = json!({
        "model_type": "llama",
        "rope_theta": theta,
        "head_dim": head_dim,
        "max_position_embeddings": max,
        "rope_scaling": table,
    });
    RopeConfig::from_hf_config(&config.to_string()).unwrap()
}

/// mlx-lm forms periods in f32. Largest seen: 4.6 units of 2^-24.
#[test]
fn mlx_lm_agrees() {
    let (mut cases, mut worst) = (0, 0f64);
    for golden in &goldens("mlx") {
        let case: Value = serde_json::from_str(&golden.metadata["case"]).unwrap();
        let table = &case["scaling_config"];
        if !table.is_object() || golden.tensors().tensor("freqs").is_err() {
            continue;
        }
        let dims = case["dims"].as_u64().unwrap();
        let max = &case["max_position_embeddings"];
        let max = if max.is_null() {
            json!(131_072)
        } else {
            max.clone()
        };
        let config = plain_config(&case["base"], dims, &max, table.clone());
        let (_, periods) = golden.f32s("freqs");
        let expected: Vec<f64> = periods.iter().map(|&p| 1.0 / f64::from(p)).collect();
        worst = worst.max(check_inv_freq(&golden.name, &config, &expected, 6.0));
        cases += 1;
    }
    println!("{cases} cases of mlx-lm, largest error of inv_freq: {worst} units of 2^-24");
    assert!(cases >= 8, "{cases}");
}

/// MAX forms plain frequencies in f64 and blends them in f32. Largest seen: 8.0 units of 2^-24.
#[test]
fn max_agrees() {
    let (mut cases, mut worst) = (0, 0f64);
    for golden in &goldens("max") {
        let case: Value = serde_json::from_str(&golden.metadata["case"]).unwrap();
        let parameters = &case["scaling_params"];
        let given = |names: &[&str]| {
            let found = names
                .iter()
                .map(|name| &parameters[name])
                .find(|value| !value.is_null());
            found.cloned().unwrap_or(Value::Null)
        };
        let factor = given(&["factor", "scaling_factor"]);
        let original = given(&["original_max_position_embeddings", "orig_max_position"]);
        // A table rounded to bf16.
        if case["dtype"] == "bfloat16" {
            continue;
        }
        let table = match case["class"].as_str().unwrap() {
            "RotaryEmbedding" | "Qwen3_5TextRotaryEmbedding" | "Qwen3VLTextRotaryEmbedding" => {
                json!({"rope_type": "default"})
            }
            "Llama3RotaryEmbedding" if parameters["low_freq_factor"].as_f64() < Some(1e30) => {
                json!({
                    "rope_type": "llama3", "factor": factor,
                    "low_freq_factor": parameters["low_freq_factor"],
                    "high_freq_factor": parameters["high_freq_factor"],
                    "original_max_position_embeddings": original,
                })
            }
            // Limits that no pair reaches make it linear.
            "Llama3RotaryEmbedding" => json!({"rope_type": "linear", "factor": factor}),
            // MAX takes a truncate, and truncates all the same.
            "YarnRotaryEmbedding" | "DeepseekYarnRotaryEmbedding" => json!({
                "rope_type": "yarn", "factor": factor,
                "beta_fast": parameters["beta_fast"], "beta_slow": parameters["beta_slow"],
                "original_max_position_embeddings": original,
            }),
            "ProportionalRotaryEmbedding" => json!({
                "rope_type": "proportional",
                "partial_rotary_factor": parameters["partial_rotary_factor"],
            }),
            // LongRoPE's case holds no inv_freq, the dynamic one's base is not the usual formula's,
            // and Gemma 4's tower rotates halves of a head by themselves.
            _ => continue,
        };
        let head_dim = match case["head_dim"].as_u64() {
            Some(head_dim) => head_dim,
            None => case["dim"].as_u64().unwrap() / case["n_heads"].as_u64().unwrap(),
        };
        let config = plain_config(&case["theta"], head_dim, &case["max_seq_len"], table);
        let (_, expected) = golden.f32s("inv_freq");
        let expected: Vec<f64> = expected.iter().map(|&f| f64::from(f)).collect();
        worst = worst.max(check_inv_freq(&golden.name, &config, &expected, 10.0));
        cases += 1;
    }
    println!("{cases} cases of MAX, largest error of inv_freq: {worst} units of 2^-24");
    assert!(cases >= 12, "{cases}");
}

/// MAX chooses LongRoPE's factors by token, and keeps the attention factor out of the table.
#[test]
fn max_chooses_by_position() {
    let goldens = goldens("max");
    let golden = goldens
        .iter()
        .find(|golden| golden.name == "longrope_phi35_mini")
        .unwrap();
    let case: Value = serde_json::from_str(&golden.metadata["case"]).unwrap();
    let parameters = &case["scaling_params"];
    let config = plain_config(
        &case["theta"],
        96,
        &parameters["max_position_embeddings"],
        json!({
            "rope_type": "longrope",
            "short_factor": parameters["short_factor"],
            "long_factor": parameters["long_factor"],
            "original_max_position_embeddings": parameters["original_max_position"],
        }),
    );
    let rope = config.rope_by_position().unwrap();
    let phasor::Angles::Rows(rows) = rope.angles() else {
        panic!()
    };
    let boundary = rows.boundary().unwrap();
    let (shape, cos) = golden.f32s("cos");
    let (_, sin) = golden.f32s("sin");
    let positions = golden.i32s("position_ids");
    assert!(positions.iter().any(|&p| p < boundary) && positions.iter().any(|&p| p >= boundary));
    for (index, (cos, sin)) in cos.iter().zip(&sin).enumerate() {
        let (position, pair) = (positions[index / shape[1]], index % shape[1]);
        let row = rows.row(u32::from(position >= boundary)).unwrap();
        let row = row.with_attention_factor(1.0).unwrap();
        let (our_cos, our_sin) = row.cos_sin(pair, position);
        let error = f64::from((our_cos - cos).abs()).max(f64::from((our_sin - sin).abs()));
        let explained = largest_angle(&row, pair, &[position]) * 3.0 * UNIT;
        assert!(
            error <= explained + 2.0 * UNIT,
            "pair {pair} at {position}: {error}"
        );
    }
}

/// diffusers forms Wan's angles in f64, so cos and sin differ by rounding alone: 2^-24 and what ours
/// are off by.
#[test]
fn wan_agrees() {
    let goldens = goldens("diffusers");
    let [golden] = &goldens[..] else {
        panic!("one file")
    };
    let mut worst = 0.0f64;
    for head_dim in [128, 96] {
        let frequencies = Axes::wan(head_dim).frequencies(10_000.0, head_dim).unwrap();
        let (_, ids) = golden.i64s(&format!("head_{head_dim}.position_ids"));
        let (shape, cos) = golden.f32s(&format!("head_{head_dim}.cos"));
        let (_, sin) = golden.f32s(&format!("head_{head_dim}.sin"));
        let &[tokens, pairs] = &shape[..] else {
            panic!("two dims")
        };
        assert_eq!(frequencies.pairs(), pairs);
        for token in 0..tokens {
            let position = [0, 1, 2].map(|axis| ids[axis * tokens + token]);
            for pair in 0..pairs {
                let (c, s) = frequencies.cos_sin_at(pair, &position);
                let apart = |ours: f32, peer: f32| f64::from((ours - peer).abs());
                worst = worst.max(apart(c, cos[token * pairs + pair]));
                worst = worst.max(apart(s, sin[token * pairs + pair]));
            }
        }
    }
    assert!(worst > 0.0 && worst < 1.5e-7, "{worst}");
}

/// Paths of a config as JSON pointers.
fn pointers(value: &Value, at: &str, found: &mut Vec<String>) {
    let children: Vec<(String, &Value)> = match value {
        Value::Object(keys) => keys
            .iter()
            .map(|(key, child)| (key.clone(), child))
            .collect(),
        Value::Array(entries) => (entries.iter().enumerate())
            .map(|(index, child)| (index.to_string(), child))
            .collect(),
        _ => return,
    };
    for (key, child) in children {
        let path = format!("{at}/{key}");
        pointers(child, &path, found);
        found.push(path);
    }
}

/// A change of a config at a place in it.
#[derive(Clone, Debug)]
enum Change {
    Remove,
    /// Puts the value of another place there.
    Copy(prop::sample::Index),
    /// Moves the value to the name of another place's key.
    Rename(prop::sample::Index),
    Put(Value),
    /// Puts text there that only Python reads.
    PutText(&'static str),
}

fn change() -> impl Strategy<Value = Change> {
    let odd = vec![
        json!(null),
        json!(0),
        json!(-1),
        json!(1),
        json!(3),
        json!(7.5),
        json!(1e-300),
        json!(1e300),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(true),
        json!(false),
        json!(""),
        json!("yarn"),
        json!("longrope"),
        json!("full_attention"),
        json!([]),
        json!([0, 1]),
        json!({}),
        json!({"rope_type": "yarn", "factor": 4.0}),
        json!("x".repeat(5000)),
        json!([null, "x"]),
    ];
    prop_oneof![
        Just(Change::Remove),
        any::<prop::sample::Index>().prop_map(Change::Copy),
        any::<prop::sample::Index>().prop_map(Change::Rename),
        prop::sample::select(odd).prop_map(Change::Put),
        prop::sample::select(vec![
            "NaN",
            "Infinity",
            "-Infinity",
            "1e400",
            "1e30",
            "nan",
            "\"\\ud800\""
        ])
        .prop_map(Change::PutText),
    ]
}

/// Stands for text that is put into a config until it is written.
const PLACE: &str = "place of a text";

fn changed(
    config: &mut Value,
    place: prop::sample::Index,
    change: Change,
    text: &mut &'static str,
) {
    let mut found = Vec::new();
    pointers(config, "", &mut found);
    if found.is_empty() {
        return;
    }
    let path = found[place.index(found.len())].clone();
    let (outer, key) = path.rsplit_once('/').unwrap();
    let taken = config.pointer(&path).unwrap().clone();
    match &change {
        Change::Put(value) => *config.pointer_mut(&path).unwrap() = value.clone(),
        Change::PutText(instead) => {
            *text = instead;
            *config.pointer_mut(&path).unwrap() = json!(PLACE);
        }
        Change::Copy(from) => {
            let value = config
                .pointer(&found[from.index(found.len())])
                .unwrap()
                .clone();
            *config.pointer_mut(&path).unwrap() = value;
        }
        Change::Remove | Change::Rename(_) => {
            if let Some(Value::Object(keys)) = config.pointer_mut(outer) {
                keys.remove(key);
            }
        }
    }
    if let Change::Rename(to) = change {
        let to = &found[to.index(found.len())];
        let (_, name) = to.rsplit_once('/').unwrap();
        if let Some(Value::Object(keys)) = config.pointer_mut(outer) {
            keys.insert(name.to_string(), taken);
        }
    }
}

/// Whatever is read can be used, and whatever is not says why in a few lines.
fn use_all(model: Result<ModelConfig, ConfigError>) {
    let short = |error: ConfigError| {
        let text = error.to_string();
        assert!(
            !text.is_empty() && text.len() < 1500,
            "{} {text}",
            text.len()
        );
    };
    let model = match model {
        Ok(model) => model,
        Err(error) => return short(error),
    };
    for layer in [0, 1, 61, usize::MAX] {
        let _ = model.rope_of_layer(layer).map_err(short);
    }
    let parts = [model.vision(), model.indexer(), model.rope().map(Some)];
    let kinds = (model.layer_types().into_iter()).map(|name| model.rope_for(name).map(Some));
    for config in parts.into_iter().chain(kinds) {
        let Some(config) = config.map_err(short).ok().flatten() else {
            continue;
        };
        assert!(config.score_scale() > 0.0 && config.rotary_dim() <= config.head_dim());
        assert_eq!(config.transformers_dims().len(), config.rotary_dim());
        for length in [1, 5000, u64::MAX] {
            let frequencies = config.frequencies_for_length(length).unwrap();
            let (cos, sin) = frequencies.cos_sin(0, 12_345);
            assert!(cos.is_finite() && sin.is_finite());
        }
        let stated = config.clone().with_layout_offset(config.rotary_offset());
        assert!(stated.rope_for_lengths(&[5000]).is_ok());
    }
    let _ = model.talker().map_err(short);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn mutated_real_configs(
        which in any::<prop::sample::Index>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), change()), 1..5),
    ) {
        let configs = real_configs();
        let mut config: Value = serde_json::from_str(&configs[which.index(configs.len())]).unwrap();
        let mut text = "null";
        for (place, change) in changes {
            changed(&mut config, place, change, &mut text);
        }
        let json = config.to_string().replace(&format!("\"{PLACE}\""), text);
        use_all(ModelConfig::from_hf_config(&json));
    }
}

/// The configs of the goldens, as they are published.
fn real_configs() -> &'static [String] {
    static CONFIGS: std::sync::OnceLock<Vec<String>> = std::sync::OnceLock::new();
    CONFIGS.get_or_init(|| {
        let goldens = goldens("transformers");
        goldens
            .iter()
            .map(|golden| golden.metadata["config"].clone())
            .collect()
    })
}
