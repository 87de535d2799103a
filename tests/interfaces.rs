//! The interfaces of other systems: against what those systems computed (the files in
//! `tests/goldens`), against the plain calls bit for bit, and what they refuse.

use std::collections::BTreeMap;
use std::path::Path;

use phasor::config::{
    Axes, GgmlMrope, LinearScaling, LongRopeScaling, RopeConfig, Scaling, YarnScaling,
};
use phasor::half::{bf16, f16};
use phasor::interfaces::hugging_face::{CosSin, Form, FreqsCis, apply_rotary_pos_emb};
use phasor::interfaces::onnx::{self, com_microsoft};
use phasor::interfaces::{Array, InterfaceError, Tensor, ggml, max, mlx, tables, vllm};
use phasor::{
    Angles, CosSinTable, Device, DeviceElement, Direction, Dtype, Element, Error, Frequencies,
    Host, InOut, Layout, Pairing, Positions, Problem, Rope,
};
use proptest::prelude::*;
use safetensors::{Dtype as FileDtype, SafeTensors};
use serde_json::Value;

// ---- files ----

struct Golden {
    name: String,
    case: Value,
    results: Value,
    bytes: Vec<u8>,
}

/// An element type as files hold it.
trait Stored: DeviceElement {
    const FILE: FileDtype;
    fn read(bytes: &[u8]) -> Self;
    fn bits(self) -> u32;
    /// Neighbours differ by 1.
    fn order(self) -> i64 {
        let sign = 1i64 << (8 * size_of::<Self>() - 1);
        let bits = i64::from(self.bits());
        if bits & sign == 0 { bits } else { sign - bits }
    }
}

impl Stored for f32 {
    const FILE: FileDtype = FileDtype::F32;
    fn read(bytes: &[u8]) -> Self {
        f32::from_le_bytes(bytes.try_into().unwrap())
    }
    fn bits(self) -> u32 {
        self.to_bits()
    }
}

impl Stored for f16 {
    const FILE: FileDtype = FileDtype::F16;
    fn read(bytes: &[u8]) -> Self {
        f16::from_le_bytes(bytes.try_into().unwrap())
    }
    fn bits(self) -> u32 {
        self.to_bits().into()
    }
}

impl Stored for bf16 {
    const FILE: FileDtype = FileDtype::BF16;
    fn read(bytes: &[u8]) -> Self {
        bf16::from_le_bytes(bytes.try_into().unwrap())
    }
    fn bits(self) -> u32 {
        self.to_bits().into()
    }
}

/// A tensor of a file.
#[derive(Clone)]
struct Data<T> {
    shape: Vec<usize>,
    values: Vec<T>,
}

impl<T: Element> Data<T> {
    fn array(&self) -> Array<'_, T> {
        Array::new(&self.values, &self.shape)
    }
}

impl Golden {
    fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let metadata = header.metadata().clone().unwrap_or_default();
        let json = |key| metadata.get(key).map_or("null", String::as_str);
        Self {
            name: path.file_stem().unwrap().to_str().unwrap().to_string(),
            case: serde_json::from_str(json("case")).unwrap(),
            results: serde_json::from_str(json("results")).unwrap(),
            bytes,
        }
    }

    fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.bytes).unwrap()
    }

    fn has(&self, name: &str) -> bool {
        self.tensors().tensor(name).is_ok()
    }

    fn raw<T>(&self, name: &str, dtype: FileDtype, read: impl Fn(&[u8]) -> T) -> Data<T> {
        let tensors = self.tensors();
        let tensor = tensors.tensor(name).unwrap();
        assert_eq!(tensor.dtype(), dtype, "{}: {name}", self.name);
        let size = tensor.data().len() / tensor.shape().iter().product::<usize>().max(1);
        Data {
            shape: tensor.shape().to_vec(),
            values: tensor.data().chunks_exact(size.max(1)).map(read).collect(),
        }
    }

    fn get<T: Stored>(&self, name: &str) -> Data<T> {
        self.raw(name, T::FILE, T::read)
    }

    fn integers(&self, name: &str) -> Data<i64> {
        self.raw(name, FileDtype::I64, |bytes| {
            i64::from_le_bytes(bytes.try_into().unwrap())
        })
    }

    fn dtype_of(&self, name: &str) -> FileDtype {
        self.tensors().tensor(name).unwrap().dtype()
    }

    fn usize(&self, key: &str) -> usize {
        self.case[key].as_u64().unwrap() as usize
    }
}

fn folder(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/goldens")
        .join(name)
}

/// The files of a folder whose names begin with `prefix`; there are some.
fn goldens(name: &str, prefix: &str) -> Vec<Golden> {
    let mut paths: Vec<_> = std::fs::read_dir(folder(name))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .filter(|path| {
            let file = path.file_name().unwrap().to_str().unwrap();
            file.starts_with(prefix)
        })
        .collect();
    paths.sort();
    assert!(!paths.is_empty(), "no goldens {name}/{prefix}*");
    paths.iter().map(|path| Golden::read(path)).collect()
}

fn refused(name: &str, file: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(folder(name).join(file)).unwrap();
    let list: Vec<Value> = serde_json::from_str(&text).unwrap();
    assert!(!list.is_empty());
    list
}

// ---- harness ----

fn host() -> Device {
    Device::host()
}

fn bits<T: Stored>(values: &[T]) -> Vec<u32> {
    values.iter().map(|value| value.bits()).collect()
}

/// What a call makes of a tensor: the same bits from slices and buffers, in and out of place.
fn rotated<T: Stored>(
    x: &Data<T>,
    call: impl Fn(Tensor<'_, T>) -> Result<(), InterfaceError>,
) -> Result<Vec<T>, InterfaceError> {
    let mut in_place = x.values.clone();
    call(Tensor::new(&mut in_place, &x.shape))?;
    let mut buffer = host().upload(&x.values)?;
    call(Tensor::new(&mut buffer, &x.shape))?;
    assert_eq!(bits(&in_place), bits(&buffer.to_vec()?));
    assert_eq!(bits(&in_place), bits(&rotated_apart(x, call)?));
    Ok(in_place)
}

/// The same for a call that has to be out of place.
fn rotated_apart<T: Stored>(
    x: &Data<T>,
    call: impl Fn(Tensor<'_, T>) -> Result<(), InterfaceError>,
) -> Result<Vec<T>, InterfaceError> {
    let device = host();
    let mut slice = vec![T::narrow(7.0); x.values.len()];
    call(Tensor::new((&x.values[..], &mut slice[..]), &x.shape))?;
    let source = device.upload(&x.values)?;
    let mut buffer = device.upload(&vec![T::narrow(7.0); x.values.len()])?;
    call(Tensor::new((&source, &mut buffer), &x.shape))?;
    assert_eq!(bits(&slice), bits(&buffer.to_vec()?));
    Ok(slice)
}

/// Largest differences, by what is compared.
#[derive(Default, Debug)]
struct Worst(BTreeMap<String, (f64, String)>);

impl Worst {
    fn see(&mut self, key: impl Into<String>, difference: f64, golden: &Golden) {
        let entry = self.0.entry(key.into()).or_default();
        if difference > entry.0 || entry.1.is_empty() {
            *entry = (difference, golden.name.clone());
        }
    }

    /// Everything that was seen has a bound, and keeps it.
    fn check(&self, bounds: &[(&str, f64)]) {
        let bounds: BTreeMap<_, _> = bounds.iter().copied().collect();
        let seen: Vec<_> = self.0.keys().map(String::as_str).collect();
        let bounded: Vec<_> = bounds.keys().copied().collect();
        assert_eq!(seen, bounded, "{self:#?}");
        for (key, (worst, _)) in &self.0 {
            assert!(*worst <= bounds[key.as_str()], "{key}: {self:#?}");
        }
    }
}

/// The largest difference; NaN and infinities must be at the same places.
fn difference<T: Stored>(ours: &[T], theirs: &[T], what: &str) -> f64 {
    assert_eq!(ours.len(), theirs.len(), "{what}");
    let mut worst = 0f64;
    for (i, (a, b)) in ours.iter().zip(theirs).enumerate() {
        let (a, b) = (f64::from(a.widen()), f64::from(b.widen()));
        if a.is_nan() || b.is_nan() || a.is_infinite() || b.is_infinite() {
            assert!(
                (a.is_nan() && b.is_nan()) || a == b,
                "{what}: {a} against {b} at {i}"
            );
        } else {
            worst = worst.max((a - b).abs());
        }
    }
    worst
}

fn file_dtype(dtype: FileDtype) -> Dtype {
    match dtype {
        FileDtype::F32 => Dtype::F32,
        FileDtype::F16 => Dtype::F16,
        FileDtype::BF16 => Dtype::Bf16,
        other => panic!("{other:?}"),
    }
}

/// The tests below take the files of this folder by the beginnings of their names.
#[test]
fn every_golden_is_of_an_interface() {
    let prefixes = ["hf_", "max_", "mlx_", "vllm_"];
    for golden in goldens("interfaces", "") {
        let known = prefixes
            .iter()
            .any(|prefix| golden.name.starts_with(prefix));
        assert!(known, "{}", golden.name);
    }
}

// ---- MLX ----

fn mlx_rope(case: &Value, freqs: Option<&[f32]>) -> Result<mlx::Rope, InterfaceError> {
    let spectrum = match freqs {
        Some(freqs) => mlx::Spectrum::Freqs(freqs),
        None => mlx::Spectrum::Base(case["base"].as_f64().unwrap()),
    };
    let dims = case["dims"].as_u64().unwrap() as usize;
    let traditional = case["traditional"].as_bool().unwrap();
    let scale = case["scale"].as_f64().unwrap_or(1.0);
    mlx::Rope::new(&host(), dims, traditional, spectrum, scale)
}

/// MLX's goldens in both folders: `x` and `rotated` by `mx.fast.rope`.
fn mlx_case<T: Stored>(golden: &Golden, worst: &mut Worst) {
    let case = &golden.case;
    let freqs = golden
        .has("freqs")
        .then(|| golden.get::<f32>("freqs").values);
    let rope = mlx_rope(case, freqs.as_deref()).unwrap();
    let offset: Vec<i64> = if golden.has("offset") {
        golden.integers("offset").values
    } else {
        match &case["offset"] {
            Value::Array(list) => list.iter().map(|n| n.as_i64().unwrap()).collect(),
            number => vec![number.as_i64().unwrap()],
        }
    };
    let x = golden.get::<T>("x");
    let tokens = x.shape[x.shape.len() - 2] as f64;
    let ours = rotated(&x, |a| rope.call(a, &offset[..])).unwrap();
    let theirs = golden.get::<T>("rotated").values;

    // An integer and an array of it are the same.
    if let [offset] = offset[..] {
        let again = rotated(&x, |a| rope.call(a, offset)).unwrap();
        assert_eq!(bits(&ours), bits(&again), "{}", golden.name);
    }
    // MLX rounds the angle, which grows with the position, and its own position to f32.
    let scale = case["scale"].as_f64().unwrap_or(1.0).abs();
    let farthest = offset
        .iter()
        .map(|&offset| (offset.unsigned_abs() as f64 + tokens) * scale)
        .fold(0.0, f64::max);
    let far = farthest > 16_000_000.0;
    let mut see = |what: &str, ours: &[T], theirs: &[T]| {
        let difference = difference(ours, theirs, &golden.name);
        let units = difference / (1.0 + farthest) * 16_777_216.0;
        match T::DTYPE {
            // Its positions have wrapped or been rounded there.
            _ if far => worst.see(format!("{what}, far"), 1.0 / difference, golden),
            Dtype::F32 => worst.see(format!("{what}, f32, units of 2^-24"), units, golden),
            dtype => {
                let angle = (1.0 + farthest) / 16_777_216.0;
                worst.see(format!("{what}, {dtype}"), difference - angle, golden);
            }
        }
    };
    see("rotated", &ours, &theirs);
    if golden.has("gradient") {
        let cotangent = golden.get::<T>("cotangent");
        let backward = rope.backward().unwrap();
        let ours = rotated(&cotangent, |a| backward.call(a, &offset[..])).unwrap();
        see("gradient", &ours, &golden.get::<T>("gradient").values);
    }
}

#[test]
fn mlx_agrees() {
    let mut worst = Worst::default();
    let mut by_mlx_lm = 0;
    for golden in goldens("interfaces", "mlx_")
        .iter()
        .chain(&goldens("mlx", ""))
    {
        let via = golden.case["via"].as_str().unwrap_or("mx.fast.rope");
        // mlx-lm's modules call mx.fast.rope with periods of their own; the configs' tests follow
        // them from the config.
        if via != "mx.fast.rope" {
            by_mlx_lm += 1;
            continue;
        }
        match file_dtype(golden.dtype_of("x")) {
            Dtype::F32 => mlx_case::<f32>(golden, &mut worst),
            Dtype::F16 => mlx_case::<f16>(golden, &mut worst),
            Dtype::Bf16 => mlx_case::<bf16>(golden, &mut worst),
            dtype => unreachable!("no case of {dtype}"),
        }
    }
    assert!(by_mlx_lm < goldens("mlx", "").len());
    // Inputs are normally distributed. Measured: f32 2.3 units; a 16-bit type an ulp of the largest
    // results, as MLX rounds every operation there.
    worst.check(&[
        ("gradient, bf16", 1.6e-2),
        ("gradient, f16", 2e-3),
        ("gradient, f32, units of 2^-24", 1.5),
        ("rotated, bf16", 1.6e-2),
        ("rotated, f16", 2e-3),
        ("rotated, f32, units of 2^-24", 3.0),
        // The reciprocal: off by more than 1.
        ("rotated, far", 1.0),
    ]);
}

// ---- MAX ----

fn max_arguments(case: &Value) -> max::Arguments {
    let whole = |key: &str| case[key].as_u64().map(|n| n as usize);
    max::Arguments {
        head_dim: whole("head_dim"),
        interleaved: case["interleaved"].as_bool().unwrap_or(true),
        ..max::Arguments::new(
            whole("dim").unwrap(),
            whole("n_heads").unwrap(),
            case["theta"].as_f64().unwrap(),
            whole("max_seq_len").unwrap(),
        )
    }
}

/// The class of a case; `None` for classes of models with several axes, which have no interface.
fn max_class(case: &Value) -> Option<Result<max::RotaryEmbedding, InterfaceError>> {
    let (device, arguments) = (host(), max_arguments(case));
    let params = &case["scaling_params"];
    let number = |key: &str| params[key].as_f64().unwrap();
    let tokens = |key: &str| params[key].as_u64().unwrap();
    let list = |key: &str| -> Vec<f64> {
        let list = params[key].as_array().unwrap();
        list.iter().map(|n| n.as_f64().unwrap()).collect()
    };
    let embedding = match case["class"].as_str().unwrap() {
        "RotaryEmbedding" => max::RotaryEmbedding::new(&device, &arguments),
        "Llama3RotaryEmbedding" if params.is_null() => {
            max::RotaryEmbedding::llama3(&device, &arguments, None)
        }
        "Llama3RotaryEmbedding" if number("low_freq_factor") == 1e38 => {
            max::RotaryEmbedding::linear(&device, &arguments, number("factor"))
        }
        "Llama3RotaryEmbedding" => {
            let params = max::Llama3RopeScalingParams {
                factor: number("factor"),
                low_freq_factor: number("low_freq_factor"),
                high_freq_factor: number("high_freq_factor"),
                orig_max_position: tokens("orig_max_position"),
            };
            max::RotaryEmbedding::llama3(&device, &arguments, Some(&params))
        }
        "DynamicRotaryEmbedding" => max::RotaryEmbedding::dynamic(&device, &arguments),
        "YarnRotaryEmbedding" => {
            let params = max::YarnScalingParams {
                factor: number("factor"),
                beta_fast: number("beta_fast"),
                beta_slow: number("beta_slow"),
                original_max_position_embeddings: tokens("original_max_position_embeddings"),
                truncate: params["truncate"].as_bool().unwrap(),
            };
            max::RotaryEmbedding::yarn(&device, &arguments, &params)
        }
        "DeepseekYarnRotaryEmbedding" => {
            let params = max::DeepseekYarnRopeScalingParams {
                scaling_factor: number("scaling_factor"),
                original_max_position_embeddings: tokens("original_max_position_embeddings"),
                beta_fast: number("beta_fast"),
                beta_slow: number("beta_slow"),
                mscale: number("mscale"),
                mscale_all_dim: number("mscale_all_dim"),
            };
            max::RotaryEmbedding::deepseek_yarn(&device, &arguments, &params)
        }
        "LongRoPERotaryEmbedding" => {
            let params = max::LongRoPEScalingParams {
                short_factor: list("short_factor"),
                long_factor: list("long_factor"),
                original_max_position: tokens("original_max_position"),
                max_position_embeddings: tokens("max_position_embeddings"),
            };
            max::RotaryEmbedding::longrope(&device, &arguments, &params)
        }
        _ => return None,
    };
    Some(embedding)
}

fn max_call<T: Stored>(golden: &Golden, x: &str, y: &str, start: i64, worst: &mut Worst) {
    let embedding = max_class(&golden.case).unwrap().unwrap();
    let (x, theirs) = (golden.get::<T>(x), golden.get::<T>(y).values);
    let ours = rotated(&x, |x| embedding.call(x, start)).unwrap();
    let difference = difference(&ours, &theirs, &golden.name);
    worst.see(format!("call, {}", T::DTYPE), difference, golden);
}

fn max_calls(golden: &Golden, x: &str, y: &str, worst: &mut Worst) {
    let start = golden.case["start_pos"].as_i64().unwrap_or(0);
    match file_dtype(golden.dtype_of(x)) {
        Dtype::F32 => max_call::<f32>(golden, x, y, start, worst),
        Dtype::F16 => max_call::<f16>(golden, x, y, start, worst),
        Dtype::Bf16 => max_call::<bf16>(golden, x, y, start, worst),
        dtype => unreachable!("no case of {dtype}"),
    }
}

/// Differences of a row of a table, per position, in units of 2^-24: MAX rounds frequency and angle.
fn see_row(golden: &Golden, position: usize, ours: &[f32], theirs: &[f32], worst: &mut Worst) {
    let difference = difference(ours, theirs, &golden.name);
    let units = difference / (1.0 + position as f64) * 16_777_216.0;
    let key = if position == 0 { "row 0" } else { "row" };
    let class = golden.case["class"].as_str().unwrap();
    worst.see(format!("{key}, {class}, units of 2^-24"), units, golden);
}

#[test]
fn max_agrees() {
    let mut worst = Worst::default();
    for golden in &goldens("interfaces", "max_") {
        let embedding = max_class(&golden.case).unwrap().unwrap();
        for pair in golden.case["compute_scale"].as_array().unwrap() {
            let ours = embedding.compute_scale(pair[0].as_f64());
            let theirs = pair[1].as_f64().unwrap();
            worst.see("compute_scale", (ours / theirs - 1.0).abs(), golden);
        }
        if golden.has("x") {
            max_calls(golden, "x", "rotated", &mut worst);
            continue;
        }
        let theirs = golden.get::<f32>("freqs_cis_base");
        let ours = embedding.freqs_cis_base().unwrap();
        let (rows, width) = (theirs.shape[0], theirs.shape[1] * 2);
        assert_eq!(embedding.rows(), rows, "{}", golden.name);
        assert_eq!(ours.len(), rows * width, "{}", golden.name);
        for (row, (ours, theirs)) in ours
            .chunks_exact(width)
            .zip(theirs.values.chunks_exact(width))
            .enumerate()
        {
            see_row(golden, row, ours, theirs, &mut worst);
        }
    }
    let mut without_interface = 0;
    for golden in &goldens("max", "") {
        // Cases of several axes record none.
        let one_axis = golden.results["rows_of_the_table"].is_number();
        let Some(embedding) = one_axis.then(|| max_class(&golden.case)).flatten() else {
            without_interface += 1;
            continue;
        };
        let mut embedding = embedding.unwrap();
        if let Some(growth) = golden.case["maybe_update_freqs"].as_str() {
            assert_eq!(growth, "position_ids of shape [5000]");
            embedding.maybe_update_freqs(5000);
        }
        let scale = embedding.compute_scale(golden.case["user_scale"].as_f64());
        let theirs = golden.results["compute_scale"].as_f64().unwrap();
        worst.see("compute_scale", (scale / theirs - 1.0).abs(), golden);
        let rows = golden.results["rows_of_the_table"].as_u64().unwrap() as usize;
        assert_eq!(embedding.rows(), rows, "{}", golden.name);

        let table = embedding.freqs_cis_base().unwrap();
        assert_eq!(table, embedding.freqs_cis().unwrap());
        let (cos, sin) = (golden.get::<f32>("cos"), golden.get::<f32>("sin"));
        let pairs = cos.shape[1];
        let positions = golden.raw("position_ids", FileDtype::I32, |bytes| {
            i32::from_le_bytes(bytes.try_into().unwrap()) as usize
        });
        for (i, &position) in positions.values.iter().enumerate() {
            let row = &table[position * 2 * pairs..][..2 * pairs];
            let theirs: Vec<f32> = (0..pairs)
                .flat_map(|pair| [cos.values[i * pairs + pair], sin.values[i * pairs + pair]])
                .collect();
            see_row(golden, position, row, &theirs, &mut worst);
        }
        if golden.has("x_call") {
            max_calls(golden, "x_call", "rotated_call", &mut worst);
        }
    }
    assert!(without_interface < goldens("max", "").len());
    // Measured: an ulp of the largest results in 16-bit types, where MAX rounds up to every operation;
    // a unit in tables (the angle is rounded twice).
    worst.check(&[
        ("call, bf16", 1.6e-2),
        ("call, f16", 2e-3),
        ("call, f32", 4e-6),
        ("compute_scale", 1e-15),
        ("row 0, DeepseekYarnRotaryEmbedding, units of 2^-24", 0.5),
        ("row 0, DynamicRotaryEmbedding, units of 2^-24", 0.0),
        ("row 0, Llama3RotaryEmbedding, units of 2^-24", 0.0),
        ("row 0, LongRoPERotaryEmbedding, units of 2^-24", 0.0),
        ("row 0, RotaryEmbedding, units of 2^-24", 0.0),
        ("row 0, YarnRotaryEmbedding, units of 2^-24", 0.5),
        ("row, DeepseekYarnRotaryEmbedding, units of 2^-24", 1.5),
        ("row, DynamicRotaryEmbedding, units of 2^-24", 1.5),
        ("row, Llama3RotaryEmbedding, units of 2^-24", 1.5),
        ("row, LongRoPERotaryEmbedding, units of 2^-24", 1.5),
        ("row, RotaryEmbedding, units of 2^-24", 1.5),
        ("row, YarnRotaryEmbedding, units of 2^-24", 1.5),
    ]);
}

/// A call on a ragged batch.
fn max_ragged_case<T: Stored>(golden: &Golden, worst: &mut Worst) {
    let case = &golden.case;
    let embedding = max::RotaryEmbedding::new(&host(), &max_arguments(&case["embedding"])).unwrap();
    let u32s = |key: &str| -> Vec<u32> {
        let values = golden.integers(key).values;
        values.iter().map(|&n| u32::try_from(n).unwrap()).collect()
    };
    let input = golden.get::<T>("input");
    let ours = match case["op"].as_str().unwrap() {
        "rope_ragged" => {
            let (offsets, starts) = (u32s("input_row_offsets"), u32s("start_pos"));
            let first = case["rope_first"] == true;
            rotated(&input, |x| {
                embedding.rope_ragged(x, &offsets, &starts, first)
            })
        }
        "rope_ragged_with_position_ids" => {
            let ids = u32s("position_ids");
            rotated(&input, |x| embedding.rope_ragged_with_position_ids(x, &ids))
        }
        other => panic!("{other}"),
    };
    let theirs = golden.get::<T>("rotated").values;
    let difference = difference(&ours.unwrap(), &theirs, &golden.name);
    worst.see(format!("ragged, {}", T::DTYPE), difference, golden);
}

#[test]
fn max_ragged_agrees() {
    let mut worst = Worst::default();
    for golden in &goldens("max-ragged", "") {
        match file_dtype(golden.dtype_of("input")) {
            Dtype::F32 => max_ragged_case::<f32>(golden, &mut worst),
            Dtype::Bf16 => max_ragged_case::<bf16>(golden, &mut worst),
            dtype => unreachable!("no case of {dtype}"),
        }
    }
    // The fused kernel has one section after the other; in Qwen3-VL's class they take turns.
    for (prefix, sections, interleaved) in [
        ("mrope_fused_qwen2_vl", [16, 24, 24], false),
        ("mrope_qwen3_vl.", [24, 20, 20], true),
    ] {
        let golden = goldens("max", prefix).remove(0);
        assert_eq!(golden.case["mrope_section"], serde_json::json!(sections));
        let axes = match interleaved {
            true => Axes::MropeInterleaved(sections),
            false => Axes::MropeSections(sections),
        };
        let arguments = max::Arguments {
            max_seq_len: 100_000,
            ..max_arguments(&golden.case)
        };
        let embedding = max::RotaryEmbedding::new(&host(), &arguments).unwrap();
        let embedding = embedding.with_axes(axes).unwrap();
        let ids = golden.raw("position_ids", FileDtype::I32, |bytes| {
            u32::from_le_bytes(bytes.try_into().unwrap())
        });
        let (x, theirs) = (golden.get::<f32>("x"), golden.get::<f32>("rotated").values);
        let call = |x: Tensor<'_, f32>| embedding.rope_ragged_with_position_ids(x, &ids.values);
        let ours = rotated(&x, call).unwrap();
        let tokens = x.shape[0];
        let per_token = ours.len() / tokens;
        let of_tokens = ours.chunks(per_token).zip(theirs.chunks(per_token));
        for (token, (ours, theirs)) in of_tokens.enumerate() {
            let at = ids.values.iter().skip(token).step_by(tokens);
            let units = difference(ours, theirs, &golden.name) * 16_777_216.0;
            let farthest = f64::from(*at.max().unwrap());
            worst.see(
                "mrope, units of 2^-24 per position",
                units / (1.0 + farthest),
                &golden,
            );
        }
    }
    worst.check(&[
        ("mrope, units of 2^-24 per position", 2.0), // 1.5
        ("ragged, bf16", 1.6e-2),                    // an ulp
        ("ragged, f32", 8e-6),                       // 6.2e-6, at position 127
    ]);
}

#[test]
fn max_ragged_refuses_what_has_no_meaning() {
    let embedding =
        max::RotaryEmbedding::new(&host(), &max::Arguments::new(16, 2, 1e4, 32)).unwrap();
    let ragged = |shape: &[usize], offsets: &[u32], starts: &[u32]| {
        rotated(&zeros(shape), |x| {
            embedding.rope_ragged(x, offsets, starts, false)
        })
    };
    assert!(ragged(&[3, 2, 8], &[0, 1, 3], &[0, 5]).is_ok());
    assert!(ragged(&[0, 2, 8], &[0], &[]).unwrap().is_empty());
    for offsets in [&[][..], &[0], &[0, 3], &[0, 1, 2, 3]] {
        names(
            "input_row_offsets has the shape",
            ragged(&[3, 2, 8], offsets, &[0, 5]),
            "length",
        );
    }
    for offsets in [[1, 2, 3], [0, 1, 2], [0, 1, 4], [0, 4, 3], [0, u32::MAX, 3]] {
        names(
            "input_row_offsets is from",
            ragged(&[3, 2, 8], &offsets, &[0, 5]),
            "order",
        );
    }
    names(
        "input has the shape [3, 16]",
        ragged(&[3, 16], &[0, 3], &[0]),
        "rank",
    );
    names(
        "input has the shape [3, 2, 6]",
        ragged(&[3, 2, 6], &[0, 3], &[0]),
        "narrow",
    );
    names(
        "input has the shape [3, 2, 11]",
        ragged(&[3, 2, 11], &[0, 3], &[0]),
        "odd",
    );
    names(
        "position 64 (token 2)",
        ragged(&[3, 2, 8], &[0, 3], &[62]),
        "outside",
    );
    names(
        "position 4294967295",
        ragged(&[1, 2, 8], &[0, 1], &[u32::MAX]),
        "outside",
    );
    // No memory is needed for tokens without heads.
    let shape = [u32::MAX as usize, 0, 8];
    let mut nothing: [f32; 0] = [];
    let call = embedding.rope_ragged(
        Tensor::new(&mut nothing, &shape),
        &[0, u32::MAX],
        &[0],
        true,
    );
    assert_eq!(call, Ok(()));

    let ids = |shape: &[usize], ids: &[u32]| {
        rotated(&zeros(shape), |x| {
            embedding.rope_ragged_with_position_ids(x, ids)
        })
    };
    assert!(ids(&[2, 1, 8], &[63, 0]).is_ok());
    names(
        "position_ids has the shape [3]",
        ids(&[2, 1, 8], &[0; 3]),
        "three",
    );
    names(
        "position 64 (token 1)",
        ids(&[2, 1, 8], &[0, 64]),
        "outside",
    );
    names(
        "input has the shape [2, 1, 10]",
        ids(&[2, 1, 10], &[0; 2]),
        "wide",
    );
    names("input has the shape []", ids(&[], &[]), "scalar");
    names("input has the shape [2, 8]", ids(&[2, 8], &[0; 2]), "rank");
    let sections = |sections| embedding.clone().with_axes(Axes::MropeSections(sections));
    names("mrope_section", sections([2, 1, 2]), "sum");
    let back = embedding
        .backward()
        .unwrap()
        .with_axes(Axes::MropeSections([2, 1, 1]))
        .unwrap();
    assert_eq!(back.rope().direction(), Direction::Inverse);
    let axes = rotated(&zeros(&[2, 1, 8]), |x| {
        back.rope_ragged_with_position_ids(x, &[0; 2])
    });
    names("position_ids has the shape [2]", axes, "one axis");
}

// ---- ONNX ----

fn attributes(case: &Value) -> onnx::Attributes {
    let attribute = |key: &str| case["attributes"][key].as_u64().unwrap_or(0) as usize;
    onnx::Attributes {
        interleaved: attribute("interleaved") == 1,
        num_heads: attribute("num_heads"),
        rotary_embedding_dim: attribute("rotary_embedding_dim"),
    }
}

fn onnx_call<T: Stored>(
    case: &Value,
    x: &Data<T>,
    cos: &Data<T>,
    sin: &Data<T>,
    ids: Option<&Data<i64>>,
) -> Result<Vec<T>, InterfaceError> {
    let (device, cos, sin) = (host(), cos.array(), sin.array());
    let ids = ids.map(|ids| Array::new(&ids.values[..], &ids.shape));
    if case["domain"] == "com.microsoft" {
        let node = com_microsoft::RotaryEmbedding::new(&device, cos, sin, attributes(case))?;
        rotated(x, |x| node.call(x, ids.unwrap()))
    } else {
        let node = onnx::RotaryEmbedding::new(&device, cos, sin, attributes(case))?;
        rotated(x, |x| node.call(x, ids))
    }
}

fn onnx_case<T: Stored>(golden: &Golden, worst: &mut Worst) {
    let ids = golden
        .has("position_ids")
        .then(|| golden.integers("position_ids"));
    let (cos, sin) = (golden.get("cos_cache"), golden.get("sin_cache"));
    let ours = onnx_call::<T>(&golden.case, &golden.get("X"), &cos, &sin, ids.as_ref()).unwrap();
    for peer in ["expected", "reference", "onnxruntime"] {
        if golden.has(peer) {
            let theirs = golden.get::<T>(peer).values;
            let difference = difference(&ours, &theirs, &golden.name);
            worst.see(format!("{peer}, {}", T::DTYPE), difference, golden);
        }
    }
}

#[test]
fn onnx_agrees() {
    let mut worst = Worst::default();
    for golden in &goldens("onnx", "") {
        match file_dtype(golden.dtype_of("X")) {
            Dtype::F32 => onnx_case::<f32>(golden, &mut worst),
            Dtype::F16 => onnx_case::<f16>(golden, &mut worst),
            Dtype::Bf16 => onnx_case::<bf16>(golden, &mut worst),
            dtype => unreachable!("no case of {dtype}"),
        }
    }
    // ONNX Runtime's f16 is f32 inside and one rounding: the same bits. The reference rounds every
    // operation.
    worst.check(&[
        ("expected, f32", 2.5e-7),
        ("onnxruntime, f16", 0.0),
        ("onnxruntime, f32", 2.5e-7),
        ("reference, bf16", 1.6e-2),
        ("reference, f16", 2e-3),
        ("reference, f32", 2.5e-7),
    ]);
}

// ---- llama.cpp ----

fn ggml_arguments(case: &Value) -> ggml::Arguments {
    let number = |key: &str| case[key].as_f64().unwrap() as f32;
    let mode = ggml::Mode::try_from(case["mode"].as_i64().unwrap() as i32).unwrap();
    let n_dims = case["n_dims"].as_u64().unwrap() as usize;
    ggml::Arguments {
        n_ctx_orig: case["n_ctx_orig"].as_u64().unwrap() as u32,
        freq_scale: number("freq_scale"),
        ext_factor: number("ext_factor"),
        attn_factor: number("attn_factor"),
        beta_fast: number("beta_fast"),
        beta_slow: number("beta_slow"),
        ..ggml::Arguments::new(n_dims, mode, number("freq_base"))
    }
}

/// One call of ggml: the exact one beside it, and the same rotation by a table with its roundings.
fn ggml_case<T: Stored>(golden: &Golden, worst: &mut Worst) {
    let case = &golden.case;
    let arguments = ggml_arguments(case);
    let b = golden.raw("position_ids", FileDtype::I32, |bytes| {
        i32::from_le_bytes(bytes.try_into().unwrap())
    });
    let c = golden
        .has("freq_factors")
        .then(|| golden.get::<f32>("freq_factors").values);
    let sections = case["sections"].as_array().map(|list| {
        let section = |axis: usize| list[axis].as_u64().unwrap() as usize;
        [0, 1, 2, 3].map(section)
    });
    let (x, theirs) = (golden.get::<T>("x"), golden.get::<T>("rotated").values);
    let call = |a: Tensor<'_, T>| {
        let (device, c, arguments) = (host(), c.as_deref(), &arguments);
        match (case["op"].as_str().unwrap(), sections) {
            ("ggml_rope_ext", None) => ggml::rope_ext(&device, a, &b.values, c, arguments),
            ("ggml_rope_ext_back", None) => {
                ggml::rope_ext_back(&device, a, &b.values, c, arguments)
            }
            ("ggml_rope_multi", Some(sections)) => {
                ggml::rope_multi(&device, a, &b.values, c, sections, arguments)
            }
            ("ggml_rope_multi_back", Some(sections)) => {
                ggml::rope_multi_back(&device, a, &b.values, c, sections, arguments)
            }
            other => panic!("{other:?}"),
        }
    };
    let ours = rotated(&x, call).unwrap();

    // By its own factors, read off by rotating (1, 0).
    let table = tables::ggml(&arguments, sections, c.as_deref(), &b.values).unwrap();
    let [cos, sin] = ["cos", "sin"].map(|name| golden.get::<f32>(name).values);
    let rows: Vec<usize> = (0..table.rows()).collect();
    see_table("llama_cpp", golden, &table, &rows, [&cos, &sin], worst);
    let pairing = match arguments.mode {
        ggml::Mode::Normal => Pairing::Interleaved,
        _ => Pairing::HalfSplit,
    };
    let rope = Rope::new(table, pairing);
    let rope = match case["op"].as_str().unwrap().ends_with("_back") {
        true => rope.backward(),
        false => rope,
    };
    let &[ref batch @ .., tokens, heads, head_dim] = &x.shape[..] else {
        unreachable!("of rank 3 or more");
    };
    let layout = Layout::bshd(batch.iter().product(), tokens, heads, head_dim);
    let by_table = plainly(rope, layout, &x.values, Positions::start(0));
    let key = format!("by its table, {}", T::DTYPE);
    worst.see(key, difference(&by_table, &theirs, &golden.name), golden);

    // Its angles are off by more for each position and each pair.
    let per_token = heads * head_dim;
    for (row, (ours, theirs)) in ours
        .chunks(per_token)
        .zip(theirs.chunks(per_token))
        .enumerate()
    {
        let token = row % tokens;
        let at = b.values.iter().skip(token).step_by(tokens);
        let farthest = at.map(|at| at.unsigned_abs()).max().unwrap();
        let difference = difference(ours, theirs, &golden.name);
        let units = difference * 16_777_216.0 / (1.0 + f64::from(farthest));
        let key = format!("rotated, {}, units of 2^-24 per position", T::DTYPE);
        match T::DTYPE {
            Dtype::F32 => worst.see(key, units, golden),
            dtype if farthest <= 100 => worst.see(format!("rotated, {dtype}"), difference, golden),
            _ => {}
        }
    }
}

#[test]
fn ggml_agrees() {
    let mut worst = Worst::default();
    let mut ops = std::collections::BTreeSet::new();
    for golden in &goldens("ggml", "") {
        ops.insert(golden.case["op"].as_str().unwrap().to_string());
        match file_dtype(golden.dtype_of("x")) {
            Dtype::F32 => ggml_case::<f32>(golden, &mut worst),
            Dtype::F16 => ggml_case::<f16>(golden, &mut worst),
            dtype => unreachable!("no case of {dtype}"),
        }
    }
    let both = [
        "ggml_rope_ext",
        "ggml_rope_ext_back",
        "ggml_rope_multi",
        "ggml_rope_multi_back",
    ];
    assert!(ops.iter().eq(both), "{ops:?}");
    worst.check(&[
        ("by its table, f16", 4e-3),   // 0, as the platform's powers and cos are
        ("by its table, f32", 2e-3),   // 0
        ("llama_cpp, absolute", 1e-3), // 0
        ("llama_cpp, part of a row", 0.5), // 0
        ("rotated, f16", 1e-3),        // 9.8e-4
        ("rotated, f32, units of 2^-24 per position", 5.0), // 4.6
    ]);
}

// ---- vLLM ----

fn vllm_case<T: Stored, C: Stored>(golden: &Golden, worst: &mut Worst) {
    let case = &golden.case;
    let cache = golden.get::<C>("cos_sin_cache");
    let positions = golden.integers("positions").values;
    let all = case["cache_rows"] == "all";
    // Files with the rows of their positions only have them in that order.
    let rows: Vec<i64> = (0..positions.len() as i64).collect();
    let head_size = golden.usize("head_size");
    let neox = case["is_neox_style"].as_bool().unwrap();
    let given = vllm::RotaryEmbedding::from_cache(&host(), head_size, cache.array(), neox).unwrap();
    let exact = vllm::RotaryEmbedding::new(
        &host(),
        head_size,
        golden.usize("rotary_dim"),
        golden.usize("max_position"),
        case["base"].as_f64().unwrap(),
        neox,
    )
    .unwrap();
    let ids = if all { &positions } else { &rows };
    let farthest = positions.iter().copied().max().unwrap_or(0) as f64;
    let cache_dtype = C::DTYPE;
    let (query, key) = (golden.get::<T>("query"), golden.get::<T>("key"));

    // Both at once are the same as each alone.
    let (mut q, mut k) = (query.values.clone(), key.values.clone());
    let (q_tensor, k_tensor) = (
        Tensor::new(&mut q, &query.shape),
        Tensor::new(&mut k, &key.shape),
    );
    given.forward(ids, q_tensor, Some(k_tensor)).unwrap();

    for (name, x, both) in [("query", &query, &q), ("key", &key, &k)] {
        let ours = rotated(x, |x| given.forward(ids, x, None)).unwrap();
        assert_eq!(bits(&ours), bits(both), "{}", golden.name);
        let theirs = golden.get::<T>(&format!("{name}_rotated")).values;
        let of_exact = rotated(x, |x| exact.forward(&positions, x, None)).unwrap();
        let native = difference(&ours, &theirs, &golden.name);
        worst.see(format!("native, {}", T::DTYPE), native, golden);
        let exact = difference(&of_exact, &theirs, &golden.name);
        if T::DTYPE == Dtype::F32 {
            let units = exact / (1.0 + farthest) * 16_777_216.0;
            worst.see("exact, f32, units of 2^-24", units, golden);
        } else {
            let angle = 4.0 * (1.0 + farthest) / 16_777_216.0;
            worst.see(format!("exact, {}", T::DTYPE), exact - angle, golden);
        }
        // Its CUDA kernel: f32 inside, one rounding, from a cache of the query's type.
        let in_f32 = format!("{name}_rotated_f32");
        if golden.has(&in_f32) && cache_dtype == T::DTYPE {
            let theirs = golden.get::<T>(&in_f32).values;
            assert_eq!(bits(&ours), bits(&theirs), "{}", golden.name);
        }
    }
}

#[test]
fn vllm_agrees() {
    let mut worst = Worst::default();
    for golden in &goldens("interfaces", "vllm_") {
        let (dtype, cache) = (golden.dtype_of("query"), golden.dtype_of("cos_sin_cache"));
        match (file_dtype(dtype), file_dtype(cache)) {
            (Dtype::F32, Dtype::F32) => vllm_case::<f32, f32>(golden, &mut worst),
            (Dtype::F16, Dtype::F16) => vllm_case::<f16, f16>(golden, &mut worst),
            (Dtype::Bf16, Dtype::Bf16) => vllm_case::<bf16, bf16>(golden, &mut worst),
            (Dtype::Bf16, Dtype::F32) => vllm_case::<bf16, f32>(golden, &mut worst),
            other => panic!("{}: {other:?}", golden.name),
        }
    }
    // The native code rounds every operation.
    worst.check(&[
        ("exact, bf16", 1.6e-2),
        ("exact, f16", 2e-3),
        ("exact, f32, units of 2^-24", 1.0),
        ("native, bf16", 1.6e-2),
        ("native, f16", 2e-3),
        ("native, f32", 5e-7),
    ]);
}

/// A dictionary as a case has it.
fn rope_parameters<'a>(
    case: &'a Value,
    lists: &'a BTreeMap<String, Vec<f64>>,
) -> Vec<(&'a str, vllm::Parameter<'a>)> {
    let parameters = case["rope_parameters"].as_object().unwrap();
    let parameter = |(key, value): (&'a String, &'a Value)| {
        let parameter = match value {
            Value::String(text) => text.as_str().into(),
            Value::Bool(flag) => (*flag).into(),
            Value::Number(number) => number.as_f64().unwrap().into(),
            _ => lists[key][..].into(),
        };
        (key.as_str(), parameter)
    };
    let engine = (
        "max_model_len",
        case["max_model_len"].as_f64().unwrap().into(),
    );
    parameters.iter().map(parameter).chain([engine]).collect()
}

fn get_rope(case: &Value) -> Result<vllm::RotaryEmbedding, InterfaceError> {
    let mut lists = BTreeMap::new();
    for (key, value) in case["rope_parameters"].as_object().unwrap() {
        if let Some(list) = value.as_array() {
            let numbers = list.iter().map(|n| n.as_f64().unwrap()).collect();
            lists.insert(key.clone(), numbers);
        }
    }
    let count = |key: &str| case[key].as_u64().unwrap() as usize;
    vllm::get_rope(
        &host(),
        count("head_size"),
        count("max_position"),
        case["is_neox_style"].as_bool().unwrap(),
        &rope_parameters(case, &lists),
    )
}

#[test]
fn vllm_get_rope_agrees() {
    let mut worst = Worst::default();
    for golden in &goldens("vllm", "") {
        let embedding = get_rope(&golden.case).unwrap();
        assert_eq!(
            embedding.max_position(),
            golden.usize("rows"),
            "{}",
            golden.name
        );
        let positions = golden.integers("positions");
        let (query, key) = (golden.get::<f32>("query"), golden.get::<f32>("key"));
        let tokens = query.shape[0];
        let per_token = query.shape[1];
        let ours = rotated(&query, |query| {
            embedding.forward(&positions.values, query, None)
        })
        .unwrap();
        let theirs = golden.get::<f32>("query_rotated").values;
        for (token, (ours, theirs)) in ours
            .chunks(per_token)
            .zip(theirs.chunks(per_token))
            .enumerate()
        {
            let farthest = positions
                .values
                .iter()
                .skip(token)
                .step_by(tokens)
                .max()
                .unwrap();
            let difference = difference(ours, theirs, &golden.name);
            let units = difference * 16_777_216.0 / (1.0 + *farthest as f64);
            worst.see("query, units of 2^-24 per position", units, golden);
        }
        let mut both = (query.values.clone(), key.values.clone());
        embedding
            .forward(
                &positions.values,
                Tensor::new(&mut both.0, &query.shape),
                Some(Tensor::new(&mut both.1, &[tokens, 1, key.shape[1]])),
            )
            .unwrap();
        assert_eq!(bits(&both.0), bits(&ours), "{}", golden.name);
        let theirs = golden.get::<f32>("key_rotated").values;
        let farthest = positions.values.iter().max().unwrap();
        let units = difference(&both.1, &theirs, &golden.name) * 16_777_216.0;
        worst.see(
            "key, units of 2^-24 per position",
            units / (1.0 + *farthest as f64),
            golden,
        );
    }
    worst.check(&[
        ("key, units of 2^-24 per position", 2.5),   // 2.0
        ("query, units of 2^-24 per position", 4.5), // 4.0
    ]);
}

// ---- Hugging Face ----

enum Table {
    CosSin(CosSin),
    FreqsCis(FreqsCis),
}

impl Table {
    fn apply<T: DeviceElement>(
        &self,
        q: Tensor<'_, T>,
        k: Option<Tensor<'_, T>>,
        unsqueeze_dim: usize,
    ) -> Result<(), InterfaceError> {
        match self {
            Table::CosSin(table) => table.apply(q, k, unsqueeze_dim),
            Table::FreqsCis(table) => table.apply_rotary_emb(q, k, unsqueeze_dim),
        }
    }

    fn backward(&self) -> Self {
        match self {
            Table::CosSin(table) => Table::CosSin(table.backward().unwrap()),
            Table::FreqsCis(table) => Table::FreqsCis(table.backward().unwrap()),
        }
    }
}

fn hf_case<T: Stored, C: Stored>(golden: &Golden, worst: &mut Worst) {
    let case = &golden.case;
    let family = case["config"]["model_type"].as_str().unwrap();
    let apply = case["apply"].as_str().unwrap();
    let halves_out = apply == "apply_rotary_pos_emb_interleave";
    let table = if golden.has("freqs_cis") {
        let freqs_cis = golden.get::<f32>("freqs_cis");
        Table::FreqsCis(FreqsCis::new(&host(), freqs_cis.array()).unwrap())
    } else {
        let form = match family {
            "glm" => Form::Interleaved,
            "cohere" => Form::RepeatInterleave,
            _ if halves_out => Form::InterleavedToHalfSplit,
            _ => Form::RotateHalf,
        };
        let (cos, sin) = (golden.get::<C>("cos"), golden.get::<C>("sin"));
        Table::CosSin(CosSin::new(&host(), cos.array(), sin.array(), form).unwrap())
    };
    let unsqueeze_dim = if case["layout"] == "bhsd" { 1 } else { 2 };
    // "f32 inside, one rounding": the same bits. The others round every operation.
    let one_rounding = matches!(family, "cohere" | "olmo" | "deepseek_v2" | "llama4_text");
    let mut see = |what: &str, ours: &[T], theirs: &[T]| {
        let difference = difference(ours, theirs, &golden.name);
        let rule = match (T::DTYPE, one_rounding) {
            (Dtype::F32, _) | (_, false) => "every operation rounds",
            (_, true) => "one rounding",
        };
        worst.see(format!("{what}, {}, {rule}", T::DTYPE), difference, golden);
    };
    let (q, k) = (golden.get::<T>("q"), golden.get::<T>("k"));
    let (mut both_q, mut both_k) = (q.values.clone(), k.values.clone());
    let q_tensor = Tensor::new((&q.values[..], &mut both_q[..]), &q.shape);
    let k_tensor = Tensor::new((&k.values[..], &mut both_k[..]), &k.shape);
    table
        .apply(q_tensor, Some(k_tensor), unsqueeze_dim)
        .unwrap();
    let one = |table: &Table, x: &Data<T>| {
        let call = |x: Tensor<'_, T>| table.apply(x, None, unsqueeze_dim);
        if halves_out {
            rotated_apart(x, call).unwrap()
        } else {
            rotated(x, call).unwrap()
        }
    };
    for (name, x, both) in [("q", &q, &both_q), ("k", &k, &both_k)] {
        let ours = one(&table, x);
        assert_eq!(bits(&ours), bits(both), "{}", golden.name);
        let theirs = golden.get::<T>(&format!("{name}_rotated"));
        see("rotated", &ours, &theirs.values);
        if golden.has(&format!("{name}_gradient")) {
            let cotangent = golden.get::<T>(&format!("{name}_cotangent"));
            let ours = one(&table.backward(), &cotangent);
            let theirs = golden.get::<T>(&format!("{name}_gradient"));
            see("gradient", &ours, &theirs.values);
        }
    }
    if halves_out {
        let mut x = q.values.clone();
        let error = table.apply(Tensor::new(&mut x, &q.shape), None, unsqueeze_dim);
        assert!(error.unwrap_err().to_string().contains("out of place"));
    }
}

#[test]
fn hugging_face_agrees() {
    let mut worst = Worst::default();
    for golden in &goldens("interfaces", "hf_") {
        let table = if golden.has("cos") {
            "cos"
        } else {
            "freqs_cis"
        };
        let (dtype, table) = (golden.dtype_of("q"), golden.dtype_of(table));
        match (file_dtype(dtype), file_dtype(table)) {
            (Dtype::F32, Dtype::F32) => hf_case::<f32, f32>(golden, &mut worst),
            (Dtype::F16, Dtype::F16) => hf_case::<f16, f16>(golden, &mut worst),
            (Dtype::F16, Dtype::F32) => hf_case::<f16, f32>(golden, &mut worst),
            (Dtype::Bf16, Dtype::Bf16) => hf_case::<bf16, bf16>(golden, &mut worst),
            (Dtype::Bf16, Dtype::F32) => hf_case::<bf16, f32>(golden, &mut worst),
            other => panic!("{}: {other:?}", golden.name),
        }
    }
    worst.check(&[
        ("gradient, bf16, every operation rounds", 1.6e-2),
        ("gradient, bf16, one rounding", 0.0),
        ("gradient, f16, every operation rounds", 2e-3),
        ("gradient, f32, every operation rounds", 2.5e-7),
        ("rotated, bf16, every operation rounds", 1.6e-2),
        ("rotated, bf16, one rounding", 0.0),
        ("rotated, f16, every operation rounds", 2e-3),
        ("rotated, f16, one rounding", 0.0),
        ("rotated, f32, every operation rounds", 2.5e-7),
    ]);
}

// ---- tables with the peers' own roundings ----

/// How far a table is from the peer's, and in how many of a row's values it differs at all.
fn see_table<T: Stored>(
    key: &str,
    golden: &Golden,
    ours: &CosSinTable,
    positions: &[usize],
    theirs: [&[T]; 2],
    worst: &mut Worst,
) {
    let pairs = ours.pairs();
    for (ours, theirs) in [ours.cos(), ours.sin()].into_iter().zip(theirs) {
        for (row, &position) in positions.iter().enumerate() {
            let ours = &ours[position * pairs..][..pairs];
            let theirs = &theirs[row * pairs..][..pairs];
            let differ = ours
                .iter()
                .zip(theirs)
                .filter(|(a, b)| **a != b.widen())
                .count();
            let ulps = ours
                .iter()
                .zip(theirs)
                .map(|(&a, &b)| T::narrow(a).order().abs_diff(b.order()))
                .max();
            // Where errors of the angle dominate, values near 0 are many ulps off.
            if !key.starts_with("mlx,") && key != "llama_cpp" {
                worst.see(format!("{key}, ulps"), ulps.unwrap() as f64, golden);
            }
            let theirs: Vec<f32> = theirs.iter().map(|x| x.widen()).collect();
            let difference = difference(ours, &theirs, &golden.name);
            worst.see(format!("{key}, absolute"), difference, golden);
            worst.see(
                format!("{key}, part of a row"),
                differ as f64 / pairs as f64,
                golden,
            );
        }
    }
}

/// The halves (or every other column) of rows of `dim`.
fn columns<T: Copy>(data: &Data<T>, interleaved: bool) -> Vec<T> {
    let dim = *data.shape.last().unwrap();
    let column = |pair| if interleaved { 2 * pair } else { pair };
    data.values
        .chunks_exact(dim)
        .flat_map(|row| (0..dim / 2).map(move |pair| row[column(pair)]))
        .collect()
}

fn hf_tables<T: Stored>(golden: &Golden, worst: &mut Worst) {
    let Data {
        values: inv_freq, ..
    } = golden.get::<f32>("inv_freq");
    let rope = &golden.case["config"]["rope_parameters"];
    if rope["rope_type"] == "default" {
        let ours = tables::inv_freq(10_000.0, 2 * inv_freq.len()).unwrap();
        let ulps = |(a, b): (&f32, &f32)| (a.to_bits() as i64 - b.to_bits() as i64).abs();
        let largest = ours.iter().zip(&inv_freq).map(ulps).max().unwrap();
        worst.see("inv_freq, ulps", largest as f64, golden);
    }
    let (cos, sin) = (golden.get::<T>("cos"), golden.get::<T>("sin"));
    let positions: Vec<_> = golden.integers("position_ids").values;
    let positions: Vec<_> = positions.iter().map(|&p| p as usize).collect();
    let Some(&last) = positions.iter().max() else {
        return;
    };
    let interleaved = golden.case["config"]["model_type"] == "cohere";
    let (cos, sin) = (columns(&cos, interleaved), columns(&sin, interleaved));
    // cos of position 0 is the attention scaling itself, rounded to the type.
    let scaling = match rope["rope_type"].as_str() {
        Some("yarn") => 0.1 * rope["factor"].as_f64().unwrap().ln() + 1.0,
        _ => 1.0,
    };
    let dtype = T::DTYPE;
    let ours = tables::hugging_face(&inv_freq, scaling as f32, last + 1, dtype).unwrap();
    let key = format!("hugging_face, {dtype}");
    see_table(&key, golden, &ours, &positions, [&cos, &sin], worst);
}

// Measured with glibc on x86-64, as noted: 5.96e-8 is an ulp of the larger values. Most are 0; the bounds
// leave room for another platform's cos and powers. Exact angles are off by 9.8e-3 (llama.cpp), 5.2e-3
// (MLX) and 4e-4 (MAX).

#[test]
fn hugging_face_tables_agree() {
    let mut worst = Worst::default();
    for golden in &goldens("interfaces", "hf_") {
        let cast = golden.case["cast_module"] == true;
        if !golden.has("cos") || cast {
            continue;
        }
        match file_dtype(golden.dtype_of("cos")) {
            Dtype::F32 => hf_tables::<f32>(golden, &mut worst),
            Dtype::F16 => hf_tables::<f16>(golden, &mut worst),
            Dtype::Bf16 => hf_tables::<bf16>(golden, &mut worst),
            dtype => unreachable!("no case of {dtype}"),
        }
    }
    worst.check(&[
        ("hugging_face, bf16, absolute", 4e-3),      // 0
        ("hugging_face, bf16, part of a row", 0.15), // 0
        ("hugging_face, bf16, ulps", 1.0),           // 0
        ("hugging_face, f16, absolute", 5e-4),       // 0
        ("hugging_face, f16, part of a row", 0.15),  // 0
        ("hugging_face, f16, ulps", 1.0),            // 0
        ("hugging_face, f32, absolute", 1.2e-7),     // 5.96e-8
        ("hugging_face, f32, part of a row", 0.5),   // 0.25
        ("hugging_face, f32, ulps", 2.0),            // 1
        ("inv_freq, ulps", 1.0),                     // 0
    ]);
}

#[test]
fn vllm_tables_agree() {
    let mut worst = Worst::default();
    for golden in &goldens("interfaces", "vllm_") {
        match file_dtype(golden.dtype_of("cos_sin_cache")) {
            Dtype::F32 => vllm_tables::<f32>(golden, &mut worst),
            Dtype::F16 => vllm_tables::<f16>(golden, &mut worst),
            Dtype::Bf16 => vllm_tables::<bf16>(golden, &mut worst),
            dtype => unreachable!("no case of {dtype}"),
        }
    }
    worst.check(&[
        ("vllm, bf16, absolute", 4e-3),      // 0
        ("vllm, bf16, part of a row", 0.15), // 0
        ("vllm, bf16, ulps", 1.0),           // 0
        ("vllm, f16, absolute", 5e-4),       // 0
        ("vllm, f16, part of a row", 0.15),  // 0
        ("vllm, f16, ulps", 1.0),            // 0
        ("vllm, f32, absolute", 1.2e-7),     // 5.96e-8
        ("vllm, f32, part of a row", 0.5),   // 0.33
        ("vllm, f32, ulps", 2.0),            // 1
    ]);
}

#[test]
fn max_tables_agree() {
    let mut worst = Worst::default();
    for golden in &goldens("max", "default_") {
        let head_dim = golden.usize("dim") / golden.usize("n_heads");
        let theta = golden.case["theta"].as_f64().unwrap();
        i32_rows("max", golden, &mut worst, |rows| {
            assert!(rows <= 2 * golden.usize("max_seq_len"));
            tables::max(theta, head_dim, rows, Dtype::F32)
        });
    }
    worst.check(&[
        ("max, absolute", 1.2e-7),   // 0
        ("max, part of a row", 0.5), // 0
        ("max, ulps", 2.0),          // 0
    ]);
}

#[test]
fn mlx_tables_agree() {
    let mut worst = Worst::default();
    for golden in &goldens("mlx", "") {
        if golden.case["via"] != "mx.fast.rope" {
            continue;
        }
        match file_dtype(golden.dtype_of("cos")) {
            Dtype::F32 => mlx_tables::<f32>(golden, &mut worst),
            Dtype::F16 => mlx_tables::<f16>(golden, &mut worst),
            Dtype::Bf16 => mlx_tables::<bf16>(golden, &mut worst),
            dtype => unreachable!("no case of {dtype}"),
        }
    }
    worst.check(&[
        ("mlx, bf16, absolute", 4e-3),           // 3.9e-3
        ("mlx, bf16, part of a row", 0.1),       // 0.063
        ("mlx, f16, absolute", 2e-3),            // 2.0e-3
        ("mlx, f16, part of a row", 0.1),        // 0.047
        ("mlx, f32, absolute", 2.5e-3),          // 1.9e-3
        ("mlx, f32, part of a row", 0.5),        // 0.375
        ("mlx_freqs, bf16, absolute", 4e-3),     // 0
        ("mlx_freqs, bf16, part of a row", 0.1), // 0
        ("mlx_freqs, bf16, ulps", 1.0),          // 0
        ("mlx_freqs, f32, absolute", 1.2e-7),    // 5.96e-8
        ("mlx_freqs, f32, part of a row", 0.5),  // 0.19
        ("mlx_freqs, f32, ulps", 2.0),           // 1
    ]);
}

#[test]
fn llama_cpp_tables_agree() {
    let mut worst = Worst::default();
    for golden in &goldens("ggml", "n") {
        let number = |key: &str| golden.case[key].as_f64().unwrap() as f32;
        // YaRN and attn_factor are not formed here; tables have no negative positions.
        let other = number("ext_factor") != 0.0 || number("attn_factor") != 1.0;
        if other || golden.name.contains("negative") || golden.name.contains("longrope") {
            continue;
        }
        let factors = golden
            .has("freq_factors")
            .then(|| golden.get::<f32>("freq_factors").values);
        let (base, n_dims) = (number("freq_base"), golden.usize("n_dims"));
        i32_rows("llama_cpp", golden, &mut worst, |rows| {
            tables::llama_cpp(base, n_dims, number("freq_scale"), factors.as_deref(), rows)
        });
    }
    worst.check(&[
        ("llama_cpp, absolute", 1e-3),     // 0
        ("llama_cpp, part of a row", 0.5), // 0
    ]);
}

fn vllm_tables<T: Stored>(golden: &Golden, worst: &mut Worst) {
    let cache = golden.get::<T>("cos_sin_cache");
    let pairs = cache.shape[1] / 2;
    let positions: Vec<usize> = if golden.case["cache_rows"] == "all" {
        (0..cache.shape[0]).collect()
    } else {
        golden
            .integers("positions")
            .values
            .iter()
            .map(|&p| p as usize)
            .collect()
    };
    let half = |first: usize| -> Vec<T> {
        let of_row = |row: &[T]| row[first..first + pairs].to_vec();
        cache
            .values
            .chunks_exact(2 * pairs)
            .flat_map(of_row)
            .collect()
    };
    let base = golden.case["base"].as_f64().unwrap() as f32;
    let rows = golden.usize("max_position");
    let ours = tables::vllm(base, 2 * pairs, rows, T::DTYPE).unwrap();
    let key = format!("vllm, {}", T::DTYPE);
    see_table(
        &key,
        golden,
        &ours,
        &positions,
        [&half(0), &half(pairs)],
        worst,
    );
}

fn mlx_tables<T: Stored>(golden: &Golden, worst: &mut Worst) {
    let (cos, sin) = (golden.get::<T>("cos").values, golden.get::<T>("sin").values);
    let positions = golden.raw("position_ids", FileDtype::I32, |bytes| {
        i32::from_le_bytes(bytes.try_into().unwrap())
    });
    let Ok(positions) = positions
        .values
        .into_iter()
        .map(usize::try_from)
        .collect::<Result<Vec<_>, _>>()
    else {
        return;
    };
    let scale = golden.case["scale"].as_f64().unwrap_or(1.0) as f32;
    let (rows, dtype) = (positions.iter().max().unwrap() + 1, T::DTYPE);
    let ours = if golden.has("freqs") {
        tables::mlx_freqs(&golden.get::<f32>("freqs").values, scale, rows, dtype)
    } else {
        let base = golden.case["base"].as_f64().unwrap() as f32;
        tables::mlx(base, golden.usize("dims"), scale, rows, dtype)
    };
    let key = if golden.has("freqs") {
        "mlx_freqs"
    } else {
        "mlx"
    };
    let key = format!("{key}, {dtype}");
    see_table(
        &key,
        golden,
        &ours.unwrap(),
        &positions,
        [&cos, &sin],
        worst,
    );
}

/// The rows of positions, from a table of so many as they need.
fn i32_rows(
    key: &str,
    golden: &Golden,
    worst: &mut Worst,
    table: impl Fn(usize) -> Result<CosSinTable, InterfaceError>,
) {
    let (cos, sin) = (
        golden.get::<f32>("cos").values,
        golden.get::<f32>("sin").values,
    );
    let positions = golden.raw("position_ids", FileDtype::I32, |bytes| {
        i32::from_le_bytes(bytes.try_into().unwrap()) as usize
    });
    let positions = positions.values;
    let ours = table(positions.iter().max().unwrap() + 1).unwrap();
    see_table(key, golden, &ours, &positions, [&cos, &sin], worst);
}

// ---- what is refused ----

fn usizes(value: &Value) -> Vec<usize> {
    let list = value.as_array().unwrap();
    list.iter().map(|n| n.as_u64().unwrap() as usize).collect()
}

fn zeros(shape: &[usize]) -> Data<f32> {
    Data {
        shape: shape.to_vec(),
        values: vec![0.0; shape.iter().product()],
    }
}

/// The call is refused, and the message names the argument.
fn names<T>(argument: &str, result: Result<T, InterfaceError>, what: &str) {
    let Err(error) = result else {
        panic!("{what} was taken");
    };
    let message = error.to_string();
    assert!(message.contains(argument), "{what}: {message}");
}

#[test]
fn mlx_refuses_what_mlx_refuses() {
    for case in refused("interfaces", "mlx_refused.json") {
        let name = case["name"].as_str().unwrap();
        let argument = match name {
            // The types leave no way to write these down.
            "base_and_freqs"
            | "neither_base_nor_freqs"
            | "dims_negative"
            | "dims_not_an_integer"
            | "x_i32"
            | "offset_float"
            | "offset_array_of_floats"
            | "offset_of_rank_2"
            | "freqs_of_rank_2" => continue,
            "rank_1" | "rank_2" | "dims_above_the_width" => "a has the shape",
            _ if name.starts_with("dims") => "dims",
            _ if name.starts_with("offset") => "offset",
            _ if name.starts_with("freqs") => "freqs",
            other => panic!("{other}"),
        };
        let list: Option<Vec<f32>> = case["freqs"]
            .as_array()
            .map(|list| list.iter().map(|n| n.as_f64().unwrap() as f32).collect());
        let x = zeros(&usizes(&case["x_shape"]));
        let call = || {
            let rope = mlx_rope(&case, list.as_deref())?;
            match &case["offset"] {
                Value::Array(list) => {
                    let offset: Vec<i64> = list.iter().map(|n| n.as_i64().unwrap()).collect();
                    rotated(&x, |a| rope.call(a, &offset[..]))
                }
                offset => rotated(&x, |a| rope.call(a, offset.as_i64().unwrap())),
            }
        };
        names(argument, call(), name);
    }
}

#[test]
fn mlx_takes_offsets_of_any_integer_type() {
    let rope = mlx::Rope::new(&host(), 4, true, mlx::Spectrum::Base(1e4), 1.0).unwrap();
    let x: Data<f32> = Data {
        shape: vec![2, 1, 1, 4],
        values: elements(8, 3),
    };
    let at = |offset: mlx::Offset<'_>| bits(&rotated(&x, |a| rope.call(a, offset)).unwrap());
    let expected = at(mlx::Offset::Int(7));
    assert_ne!(expected, at(mlx::Offset::Int(0)));
    for offset in [
        mlx::Offset::from(7i32),
        mlx::Offset::from(7i64),
        mlx::Offset::from(&[7i32][..]),
        mlx::Offset::from(&[7i64][..]),
        mlx::Offset::from(&[7u32][..]),
        mlx::Offset::from(&[7i32, 7][..]),
        mlx::Offset::from(&[7i64, 7][..]),
        mlx::Offset::from(&[7u32, 7][..]),
        mlx::Offset::from(phasor::Ids::from(&[7u32])),
    ] {
        assert_eq!(at(offset), expected, "{offset:?}");
    }
}

#[test]
fn mlx_refuses_what_has_no_meaning() {
    use mlx::Spectrum::{Base, Freqs};
    let new = |spectrum, scale| mlx::Rope::new(&host(), 4, false, spectrum, scale);
    names("freqs[1] is NaN", new(Freqs(&[1.0, f32::NAN]), 1.0), "NaN");
    names("freqs[0] is 0", new(Freqs(&[0.0, 1.0]), 1.0), "0");
    let least = 1.0 / 4294967296.0;
    assert!(new(Base(least), 1.0).is_ok());
    for base in [0.0, 0.5 * least, -1.0, f64::NAN, f64::INFINITY] {
        names("base", new(Base(base), 1.0), "base");
    }
    for scale in [f64::NAN, f64::INFINITY] {
        names("scale", new(Base(1e4), scale), "scale");
    }
    names("inv_freq[0]", new(Base(1e4), 1e300), "fast pairs");
    names("inv_freq[0]", new(Freqs(&[1e-30, 1.0]), 1.0), "fast pairs");
    let huge = mlx::Rope::new(&host(), 1 << 20, false, Base(1e4), 1.0);
    names("dims is 1048576", huge, "huge dims");
    let rope = new(Base(1e4), 1.0).unwrap();
    let mut x = [0.0f32; 7];
    let call = rope.call(Tensor::new(&mut x, &[1, 2, 4]), 0);
    names(
        "a has the shape [1, 2, 4], but its memory holds 7",
        call,
        "length",
    );
    let call = rope.call(Tensor::new(&mut x, &[usize::MAX, 2, usize::MAX, 4]), 0);
    names("memory holds 7", call, "overflow");
    let mut nothing: [f32; 0] = [];
    let shape = [0, usize::MAX, usize::MAX, 4];
    names(
        "too large",
        rope.call(Tensor::new(&mut nothing, &shape), 0),
        "heads",
    );
    rope.call(Tensor::new(&mut nothing, &[0, 8, usize::MAX, 4]), i64::MAX)
        .unwrap();
}

#[test]
fn max_refuses_what_max_refuses() {
    for case in refused("interfaces", "max_refused.json") {
        let name = case["name"].as_str().unwrap();
        // Parameters are not optional here.
        if name.starts_with("deepseek") {
            continue;
        }
        let call = || {
            let embedding = max_class(&case).unwrap()?;
            let start = case["start_pos"].as_i64().unwrap();
            rotated(&zeros(&usizes(&case["x_shape"])), |x| {
                embedding.call(x, start)
            })
        };
        let argument = match name {
            "x_odd" | "x_odd_half" => "head_dim is 31",
            "start_pos_negative" => "start_pos: position -1 (token 0)",
            "end_beyond_the_table" => "start_pos: position 64 (token 2)",
            "start_pos_beyond_the_table" => "start_pos: position 64 (token 0)",
            _ => "x has the shape",
        };
        names(argument, call(), name);
    }
    // MAX counts from the end of the table here, as a Python slice does.
    let embedding = max::RotaryEmbedding::new(&host(), &max::Arguments::new(64, 2, 1e4, 32));
    let x = zeros(&[1, 3, 2, 32]);
    let call = rotated(&x, |x| embedding.as_ref().unwrap().call(x, -5));
    names("start_pos: position -5", call, "negative start_pos");
}

#[test]
fn max_refuses_what_has_no_meaning() {
    let arguments = max::Arguments::new(64, 2, 1e4, 32);
    let new = |arguments| max::RotaryEmbedding::new(&host(), &arguments);
    names(
        "n_heads",
        new(max::Arguments {
            n_heads: 0,
            ..arguments
        }),
        "no heads",
    );
    names(
        "head_dim",
        new(max::Arguments {
            dim: 0,
            ..arguments
        }),
        "no dims",
    );
    names(
        "rope_theta",
        new(max::Arguments {
            theta: f64::NAN,
            ..arguments
        }),
        "theta",
    );
    let endless = new(max::Arguments {
        max_seq_len: usize::MAX,
        ..arguments
    })
    .unwrap();
    names("max_seq_len", endless.freqs_cis_base(), "endless table");
    let given = new(max::Arguments {
        n_heads: 0,
        head_dim: Some(32),
        ..arguments
    })
    .unwrap();
    assert_eq!(given.rope().rotary_dim(), 32);
    names(
        "factor",
        max::RotaryEmbedding::linear(&host(), &arguments, 0.0),
        "linear",
    );
    let params = max::LongRoPEScalingParams {
        short_factor: vec![1.0; 16],
        long_factor: vec![2.0; 15],
        original_max_position: 20,
        max_position_embeddings: 32,
    };
    let longrope = |params: &_| max::RotaryEmbedding::longrope(&host(), &arguments, params);
    names("long_factor", longrope(&params), "too few factors");
    let params = max::LongRoPEScalingParams {
        long_factor: vec![2.0; 16],
        original_max_position: 1,
        ..params
    };
    names("original_max_position", longrope(&params), "logarithm of 1");
    for (original_max_position, max_position_embeddings) in [(1, 1), (2, 4)] {
        let params = max::LongRoPEScalingParams {
            original_max_position,
            max_position_embeddings,
            ..params.clone()
        };
        assert!(
            longrope(&params).is_ok(),
            "the logarithm of 1 divides nothing"
        );
    }
    let params = max::DeepseekYarnRopeScalingParams {
        scaling_factor: f64::INFINITY,
        original_max_position_embeddings: 64,
        beta_fast: 32.0,
        beta_slow: 1.0,
        mscale: 1.0,
        mscale_all_dim: 1.0,
    };
    let deepseek = |params: &_| max::RotaryEmbedding::deepseek_yarn(&host(), &arguments, params);
    names("factor", deepseek(&params), "infinite factor");
    let params = max::DeepseekYarnRopeScalingParams {
        scaling_factor: 4.0,
        mscale: f64::NAN,
        ..params
    };
    names("attention_factor", deepseek(&params), "mscale");
}

/// The most pairs that sections of 8 dims have: twice the pairs of a head.
fn width_of_sections(mode: ggml::Mode) -> usize {
    if mode == ggml::Mode::Vision { 16 } else { 8 }
}

/// What tables and scales are in f64, for a head of 4 dims. The peers' own are in the goldens, of more
/// positions.
#[test]
fn small_tables_are_near_exact_ones() {
    #[track_caller]
    fn near(ours: &[f32], angles: [[f64; 2]; 6], factor: f64) {
        let exact = angles.into_iter().flatten();
        let exact = exact.flat_map(|angle| [factor * angle.cos(), factor * angle.sin()]);
        assert_eq!(ours.len(), 24);
        for (ours, exact) in ours.iter().zip(exact) {
            assert!((f64::from(*ours) - exact).abs() < 1e-6, "{ours} {exact}");
        }
    }
    /// Angles at six positions, in radians per position.
    fn of(position: impl Fn(f64) -> f64, inv_freq: [f64; 2]) -> [[f64; 2]; 6] {
        [0, 1, 2, 3, 4, 5].map(|i| inv_freq.map(|f| position(f64::from(i)) * f))
    }
    let plain = [1.0, 0.01];
    let halved = of(|position| 0.5 * position, plain);
    let f32 = Dtype::F32;
    for (table, angles) in [
        (tables::max(1e4, 4, 6, f32), of(|p| p, plain)),
        (tables::vllm(1e4, 4, 6, f32), of(|p| p, plain)),
        (tables::mlx(1e4, 4, 0.5, 6, f32), halved),
        (tables::mlx_freqs(&[1.0, 100.0], 0.5, 6, f32), halved),
        (tables::llama_cpp(1e4, 4, 0.5, None, 6), halved),
        (
            tables::llama_cpp(1e4, 4, 0.5, Some(&[2.0, 4.0]), 6),
            of(|p| 0.5 * p, [0.5, 0.0025]),
        ),
    ] {
        let table = table.unwrap();
        let pairs = table.cos().iter().zip(table.sin());
        let pairs: Vec<_> = pairs.flat_map(|(&cos, &sin)| [cos, sin]).collect();
        near(&pairs, angles, 1.0);
    }
    let scaled = tables::hugging_face(&[1.0, 0.01], 1.5, 6, f32).unwrap();
    assert!(scaled.cos().iter().all(|cos| cos.abs() <= 1.5));
    assert_eq!([scaled.cos()[0], scaled.sin()[0]], [1.5, 0.0]);

    // MAX has rows for twice as many positions as it is told of.
    let (device, arguments) = (host(), max::Arguments::new(4, 1, 1e4, 3));
    let scales = |embedding: &max::RotaryEmbedding, [default, of_1]: [f64; 2]| {
        assert!((embedding.compute_scale(None) - default).abs() < 1e-12);
        assert!((embedding.compute_scale(Some(3.0)) - 3.0 * of_1).abs() < 1e-12);
    };
    let mut embedding = max::RotaryEmbedding::new(&device, &arguments).unwrap();
    assert_eq!(embedding.rows(), 6);
    near(&embedding.freqs_cis_base().unwrap(), of(|p| p, plain), 1.0);
    near(&embedding.freqs_cis().unwrap(), of(|p| p, plain), 1.0);
    scales(&embedding, [0.5, 1.0]);
    embedding.maybe_update_freqs(4);
    assert_eq!(embedding.rows(), 6);
    let mut dynamic = max::RotaryEmbedding::dynamic(&device, &arguments).unwrap();
    for (seq_len, rows) in [(2, 6), (3, 6), (4, 8), (3, 8)] {
        dynamic.maybe_update_freqs(seq_len);
        assert_eq!(dynamic.rows(), rows);
    }
    let params = max::LongRoPEScalingParams {
        short_factor: vec![1.0; 2],
        long_factor: vec![2.0, 4.0],
        original_max_position: 2,
        max_position_embeddings: 4,
    };
    let long = max::RotaryEmbedding::longrope(&device, &arguments, &params).unwrap();
    let mut angles = of(|p| p, [0.5, 0.0025]);
    angles[1] = plain;
    near(&long.freqs_cis_base().unwrap(), angles, 1.0);
    scales(&long, [0.5 * 2f64.sqrt(), 1.0]);

    // YaRN's have as many as they are told of. Here both pairs keep their frequencies, or the first one.
    let arguments = max::Arguments::new(4, 1, 1e4, 6);
    let gain = 0.1 * 4f64.ln() + 1.0;
    for (beta_fast, beta_slow, inv_freq) in [(1e-3, 1e-4, plain), (1e4, 200.0, [1.0, 0.0025])] {
        let params = max::YarnScalingParams {
            factor: 4.0,
            beta_fast,
            beta_slow,
            original_max_position_embeddings: 100_000,
            truncate: true,
        };
        let yarn = max::RotaryEmbedding::yarn(&device, &arguments, &params).unwrap();
        let angles = of(|p| p, inv_freq);
        assert_eq!(yarn.rows(), 6);
        near(&yarn.freqs_cis_base().unwrap(), angles, gain);
        let params = max::DeepseekYarnRopeScalingParams {
            scaling_factor: 4.0,
            original_max_position_embeddings: 100_000,
            beta_fast,
            beta_slow,
            mscale: 2.0,
            mscale_all_dim: 1.0,
        };
        let deepseek = max::RotaryEmbedding::deepseek_yarn(&device, &arguments, &params).unwrap();
        let of_scores = 0.2 * 4f64.ln() + 1.0;
        near(
            &deepseek.freqs_cis_base().unwrap(),
            angles,
            of_scores / gain,
        );
        scales(&deepseek, [0.5 * of_scores.powi(2), of_scores.powi(2)]);
    }
}

/// A call that prepares what it needs is that of what was prepared.
#[test]
fn single_calls_are_those_of_what_is_prepared() {
    let x: Data<f32> = Data {
        shape: vec![1, 1, 3, 4],
        values: elements(12, 5),
    };
    let agree = |prepared: Result<Vec<f32>, _>, at_once: Result<Vec<f32>, _>| {
        assert_eq!(bits(&prepared.unwrap()), bits(&at_once.unwrap()));
    };
    let base = mlx::Spectrum::Base(1e4);
    let rope = mlx::Rope::new(&host(), 4, true, base, 0.5).unwrap();
    agree(
        rotated(&x, |x| rope.call(x, 7)),
        rotated(&x, |x| mlx::fast::rope(&host(), x, 4, true, base, 0.5, 7)),
    );

    let (cos, sin) = (
        [0.6f32, 0.28, 0.8, 0.96, 0.0, 1.0],
        [0.8f32, 0.96, 0.6, 0.28, 1.0, 0.0],
    );
    let caches = [&cos, &sin].map(|values| Array::new(values, &[3, 2]));
    let attributes = onnx::Attributes::default();
    let ids = Array::new(&[2, 0, 1], &[1, 3]);
    let node = onnx::RotaryEmbedding::new(&host(), caches[0], caches[1], attributes).unwrap();
    agree(
        rotated(&x, |x| node.call(x, Some(ids))),
        rotated(&x, |x| {
            onnx::rotary_embedding(&host(), x, caches[0], caches[1], Some(ids), attributes)
        }),
    );
    let node = com_microsoft::RotaryEmbedding::new(&host(), caches[0], caches[1], attributes);
    let node = node.unwrap();
    agree(
        rotated(&x, |x| node.call(x, ids)),
        rotated(&x, |x| {
            com_microsoft::rotary_embedding(&host(), x, ids, caches[0], caches[1], attributes)
        }),
    );

    let twice = |values: &[f32]| -> Vec<f32> {
        values
            .chunks(2)
            .flat_map(|row| [row, row].concat())
            .collect()
    };
    let (cos, sin) = (twice(&cos), twice(&sin));
    let (cos, sin) = (Array::new(&cos, &[1, 3, 4]), Array::new(&sin, &[1, 3, 4]));
    let prepared = CosSin::new(&host(), cos, sin, Form::RotateHalf).unwrap();
    agree(
        rotated(&x, |q| prepared.apply(q, None, 1)),
        rotated(&x, |q| apply_rotary_pos_emb(&host(), q, None, cos, sin, 1)),
    );
}

#[test]
fn ggml_refuses_what_has_no_meaning() {
    use ggml::{Arguments, Mode, Rope};
    let plain = Arguments::new(8, Mode::Neox, 1e4);
    let yarn = Arguments {
        n_ctx_orig: 4096,
        freq_scale: 0.25,
        ext_factor: 1.0,
        ..Arguments::new(64, Mode::Neox, 1e4)
    };
    assert!(Rope::ext(&host(), None, &plain).is_ok());
    assert!(Rope::ext(&host(), None, &yarn).is_ok());
    // The most dims, a factor of 1, and turns of one number: the ramp is a step.
    let most = Arguments::new(8192, Mode::Neox, 1e4);
    assert!(Rope::ext(&host(), None, &most).is_ok());
    let one = Arguments {
        freq_scale: 1.0,
        beta_fast: 4.0,
        beta_slow: 4.0,
        ..yarn
    };
    assert!(Rope::ext(&host(), None, &one).is_ok());
    let refused = |argument: &str, arguments: Arguments| {
        names(argument, Rope::ext(&host(), None, &arguments), argument);
        names(
            argument,
            tables::ggml(&arguments, None, None, &[0]),
            argument,
        );
    };
    for n_dims in [0, 7, 8194, usize::MAX, usize::MAX - 1] {
        refused("n_dims is", Arguments { n_dims, ..plain });
    }
    for value in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        refused(
            "freq_scale is",
            Arguments {
                freq_scale: value,
                ..plain
            },
        );
        refused(
            "attn_factor is",
            Arguments {
                attn_factor: value,
                ..plain
            },
        );
        refused(
            "beta_fast is",
            Arguments {
                beta_fast: value,
                ..yarn
            },
        );
        refused(
            "beta_fast is",
            Arguments {
                beta_slow: 1.0 - value,
                beta_fast: 0.5,
                ..yarn
            },
        );
        let base = Arguments {
            freq_base: value,
            ..plain
        };
        names("rope_theta", Rope::ext(&host(), None, &base), "freq_base");
    }
    for ext_factor in [-1.0, 1.5, f32::NAN] {
        refused(
            "ext_factor is",
            Arguments {
                ext_factor,
                ..plain
            },
        );
    }
    refused(
        "freq_scale is 2",
        Arguments {
            freq_scale: 2.0,
            ..yarn
        },
    );
    // Without YaRN it may be.
    assert!(
        Rope::ext(
            &host(),
            None,
            &Arguments {
                freq_scale: 2.0,
                ..plain
            }
        )
        .is_ok()
    );
    // The ramp lies before all pairs, or behind them.
    for n_ctx_orig in [0, 1, 6] {
        let slow = Arguments {
            n_ctx_orig,
            beta_slow: 4.0,
            ..yarn
        };
        refused("n_ctx_orig is", slow);
    }
    // It begins at the last pair that it may, and behind that.
    let ramp_from = |n_ctx_orig: u32| Arguments {
        n_ctx_orig,
        freq_base: 4.0,
        ..yarn
    };
    assert!(Rope::ext(&host(), None, &ramp_from(3210)).is_ok());
    refused("n_ctx_orig is", ramp_from(3217));
    refused(
        "n_ctx_orig is",
        Arguments {
            freq_base: 1.5,
            ..yarn
        },
    );
    // Without a base above 1 there is no ramp, wherever it would begin and end.
    refused(
        "n_ctx_orig is",
        Arguments {
            freq_base: 1.0,
            n_ctx_orig: 100,
            ..yarn
        },
    );
    refused(
        "beta_fast is 32",
        Arguments {
            beta_slow: 0.0,
            ..yarn
        },
    );
    refused(
        "n_ctx_orig is",
        Arguments {
            freq_base: 1.0,
            ..yarn
        },
    );

    let sections = [2, 1, 1, 0];
    for mode in [Mode::Mrope, Mode::Imrope, Mode::Vision] {
        let several = Arguments { mode, ..plain };
        names("mode is", Rope::ext(&host(), None, &several), "no sections");
        names(
            "sections",
            tables::ggml(&several, None, None, &[0]),
            "no sections",
        );
        let rope = Rope::multi(&host(), None, sections, &several).unwrap();
        names(
            "sections",
            Rope::multi(&host(), None, [0, 0, 0, 4], &several),
            "none",
        );
        let huge = [usize::MAX, 1, usize::MAX, 0];
        names(
            "dimension_sections",
            Rope::multi(&host(), None, huge, &several),
            "huge",
        );
        names(
            "sections",
            tables::ggml(&several, Some(huge), None, &[0; 4]),
            "huge",
        );
        names(
            "b has the shape [3]",
            tables::ggml(&several, Some(sections), None, &[0; 3]),
            "b",
        );
        let width = rope.rope().rotary_dim();
        let call =
            |count: usize| rotated(&zeros(&[2, 1, width]), |a| rope.call(a, &vec![0; count]));
        assert!(call(8).is_ok());
        let endless = [1 << 61, 2, 0, width];
        names(
            "a->ne[3] is",
            rotated(&zeros(&endless), |a| rope.call(a, &[0; 8])),
            "positions of a batch without end",
        );
        names("b has the shape [2]", call(2), "one axis");
        let wide = rotated(&zeros(&[2, 1, width + 2]), |a| rope.call(a, &[0; 8]));
        assert_eq!(wide.is_err(), mode == Mode::Vision);
        let narrow = rotated(&zeros(&[2, 1, width - 2]), |a| rope.call(a, &[0; 8]));
        let message = match mode {
            Mode::Vision => "16 along the last axis, twice n_dims",
            _ => "at least 8 along the last axis, n_offs + n_dims",
        };
        names(message, narrow, "narrow");
        // Sections of as many pairs as the head has dims, and of more.
        let table = |sections| tables::ggml(&several, Some(sections), None, &[0; 4]);
        let most = width_of_sections(mode);
        assert!(table([most, 0, 0, 0]).is_ok());
        names("sections", table([most, 1, 0, 0]), "one more");
        names("sections", table([most + 1, 0, 0, 0]), "one more");
        assert!(rope.clone().with_offset(0).is_ok());
        assert_eq!(rope.with_offset(2).is_err(), mode == Mode::Vision);
    }
    let vision = Arguments {
        mode: Mode::Vision,
        ..yarn
    };
    let yarn_of_vision = Rope::multi(&host(), None, [32, 32, 0, 0], &vision);
    names("ext_factor is 1", yarn_of_vision, "vision");
    for mode in [Mode::Normal, Mode::Neox] {
        let one = Arguments { mode, ..plain };
        names(
            "mode is",
            Rope::multi(&host(), None, sections, &one),
            "sections",
        );
        names(
            "mode is",
            tables::ggml(&one, Some(sections), None, &[0; 4]),
            "sections",
        );
    }
    for mode in [-1, 1, 3, 16, 41] {
        names("mode is", Mode::try_from(mode), "unknown mode");
    }

    let few = [1.0; 3];
    names(
        "c has the shape [3]",
        Rope::ext(&host(), Some(&few), &plain),
        "few factors",
    );
    names(
        "c has the shape [3]",
        tables::ggml(&plain, None, Some(&few), &[0]),
        "few factors",
    );
    names(
        "divisors[2]",
        Rope::ext(&host(), Some(&[1.0, 1.0, 0.0, 1.0]), &plain),
        "0",
    );
    assert!(tables::ggml(&plain, None, None, &[]).is_err());

    // The betas are the ramp's.
    let betas = Arguments {
        beta_fast: 16.0,
        beta_slow: 2.0,
        ..yarn
    };
    let scaling = YarnScaling {
        beta_fast: 16.0,
        beta_slow: 2.0,
        ..YarnScaling::new(4.0, 4096)
    };
    let config = RopeConfig::new(1e4, 64).unwrap();
    let config = config.with_scaling(Scaling::Yarn(scaling)).unwrap();
    let config = config.with_pairing(Pairing::HalfSplit);
    let rope = Rope::ext(&host(), None, &betas).unwrap();
    assert_eq!(rope.rope(), &config.rope().unwrap());

    let rope = Rope::ext(&host(), None, &plain).unwrap();
    let call = |shape: &[usize], b: &[i32]| rotated(&zeros(shape), |a| rope.call(a, b));
    names("a has the shape [3, 8]", call(&[3, 8], &[0; 3]), "rank");
    names(
        "a has the shape [3, 1, 6]",
        call(&[3, 1, 6], &[0; 3]),
        "narrow",
    );
    names(
        "b has the shape [2]",
        call(&[3, 1, 8], &[0; 2]),
        "positions",
    );
    names(
        "b has the shape [6]",
        call(&[2, 3, 1, 8], &[0; 6]),
        "shared by the batch",
    );
    names("n_offs is 3", rope.clone().with_offset(3), "odd");
    let far = rope.with_offset(usize::MAX - 1).unwrap();
    names(
        "a has the shape",
        rotated(&zeros(&[1, 1, 8]), |a| far.call(a, &[0])),
        "far",
    );
}

#[test]
fn onnx_refuses_what_onnx_runtime_refuses() {
    let mut taken = Vec::new();
    for case in refused("onnx", "refused.json") {
        let name = case["name"].as_str().unwrap();
        // The types leave no way to write these down.
        if name.ends_with("_i32") || name.ends_with("_negative") && name.contains("dim") {
            continue;
        }
        let shape = |key: &str| usizes(&case["shapes"][key]);
        fn flat(value: &Value, into: &mut Vec<i64>) {
            match value {
                Value::Array(list) => list.iter().for_each(|value| flat(value, into)),
                value => into.extend(value.as_i64()),
            }
        }
        let ids = case["shapes"]["position_ids"].is_array().then(|| {
            let mut values = Vec::new();
            flat(&case["position_ids"], &mut values);
            Data {
                shape: shape("position_ids"),
                values,
            }
        });
        let (cos, sin) = (zeros(&shape("cos_cache")), zeros(&shape("sin_cache")));
        let call = onnx_call(&case, &zeros(&shape("X")), &cos, &sin, ids.as_ref());
        match call {
            Ok(_) => taken.push(name.to_string()),
            Err(error) => {
                let arguments = [
                    "X",
                    "input",
                    "cos_cache",
                    "sin_cache",
                    "position_ids",
                    "num_heads",
                ];
                let message = error.to_string();
                assert!(
                    arguments.iter().any(|a| message.contains(a)),
                    "{name}: {message}"
                );
            }
        }
    }
    // Its positions are in the caches: is_packed_batching would make ONNX Runtime take it.
    assert_eq!(taken, ["ms_more_tokens_than_rows"]);

    // Heads that are not counted, and that none fit.
    let caches = [0.5f32; 8];
    let cache = Array::new(&caches, &[2, 4]);
    let attributes = onnx::Attributes::default();
    let node = onnx::RotaryEmbedding::new(&host(), cache, cache, attributes).unwrap();
    let ids = Array::new(&[0], &[1, 1]);
    names(
        "num_heads is needed for a 3-D X",
        rotated(&zeros(&[1, 1, 8]), |x| node.call(x, Some(ids))),
        "3-D",
    );
    let node = com_microsoft::RotaryEmbedding::new(&host(), cache, cache, attributes).unwrap();
    names(
        "input has the shape [1, 1, 4]",
        rotated(&zeros(&[1, 1, 4]), |x| node.call(x, ids)),
        "narrow",
    );
}

#[test]
fn onnx_passes_positions_outside_the_caches_through_if_told() {
    let (cos, sin) = (vec![0.6f32; 12 * 2], vec![0.8f32; 12 * 2]);
    let (cos, sin) = (Array::new(&cos, &[12, 2]), Array::new(&sin, &[12, 2]));
    let x = Data {
        shape: vec![1, 1, 4, 4],
        values: (0..16).map(|i| i as f32 - 7.5).collect::<Vec<f32>>(),
    };
    let attributes = onnx::Attributes::default();
    let node = onnx::RotaryEmbedding::new(&host(), cos, sin, attributes).unwrap();
    let ids = Array::new(&[-1, 11, 12, i64::MAX], &[1, 4]);
    names(
        "position_ids: position -1 (token 0)",
        rotated(&x, |x| node.call(x, Some(ids))),
        "outside",
    );
    // A longer table would help the last two alone.
    for (ids, remedy) in [
        ([-1, 0, 0, 0], "check them"),
        ([0, 0, 12, 0], "give a longer one"),
    ] {
        let ids = Array::new(&ids, &[1, 4]);
        names(remedy, rotated(&x, |x| node.call(x, Some(ids))), "remedy");
    }
    let node = node.pass_through_out_of_range();
    let y = rotated(&x, |x| node.call(x, Some(ids))).unwrap();
    for (token, inside) in [false, true, false, false].into_iter().enumerate() {
        let range = 4 * token..4 * token + 4;
        assert_eq!(y[range.clone()] == x.values[range], !inside, "{token}");
    }
    let node = com_microsoft::RotaryEmbedding::new(&host(), cos, sin, attributes).unwrap();
    let start = Array::new(&[10], &[1]);
    names(
        "position_ids: position 12 (token 2)",
        rotated(&x, |x| node.call(x, start)),
        "offset",
    );
    let node = node.pass_through_out_of_range();
    let y = rotated(&x, |x| node.call(x, start)).unwrap();
    assert_ne!(y[4..8], x.values[4..8]);
    assert_eq!(y[8..], x.values[8..]);
}

#[test]
fn vllm_refuses_what_vllm_refuses() {
    for case in refused("interfaces", "vllm_refused.json") {
        let name = case["name"].as_str().unwrap();
        let number = |key: &str| case[key].as_u64().unwrap() as usize;
        let (head_size, rotary_dim) = (number("head_size"), number("rotary_dim"));
        let max_position = number("max_position");
        let positions = case["positions"].as_array().unwrap();
        let positions: Vec<i64> = positions.iter().map(|n| n.as_i64().unwrap()).collect();
        let query = zeros(&[positions.len(), 2 * head_size]);
        let cache = zeros(&[max_position, rotary_dim]);
        let exact =
            vllm::RotaryEmbedding::new(&host(), head_size, rotary_dim, max_position, 1e4, true);
        let given = vllm::RotaryEmbedding::from_cache(&host(), head_size, cache.array(), true);
        let argument = if name.starts_with("position") {
            "positions"
        } else {
            "rotary_dim"
        };
        for embedding in [exact, given] {
            // What does not hang on the call is refused before it.
            assert_eq!(embedding.is_ok(), argument == "positions", "{name}");
            let call = || {
                let embedding = embedding?;
                rotated(&query, |x| embedding.forward(&positions, x, None))
            };
            names(argument, call(), name);
        }
    }
    let embedding = vllm::RotaryEmbedding::new(&host(), 4, 4, 16, 1e4, true).unwrap();
    let call = |shape: &[usize]| rotated(&zeros(shape), |x| embedding.forward(&[0, 1], x, None));
    names("query", call(&[3, 8]), "tokens");
    names("2 positions and head_size is 4", call(&[3, 8]), "one axis");
    names("query", call(&[2, 6]), "width");
    names("query", call(&[2, 2, 3]), "head_size");
    names("query", call(&[8]), "rank");
    assert!(call(&[2, 2, 4]).is_ok());
    let none = vllm::RotaryEmbedding::new(&host(), 0, 0, 16, 1e4, true);
    names("rotary_dim", none, "no dims");
}

#[test]
fn vllm_get_rope_refuses_what_vllm_refuses() {
    for case in refused("vllm", "refused.json") {
        let name = case["name"].as_str().unwrap();
        let key = match name {
            "unknown_type" => "rope_type is su",
            "partial_of_0" | "partial_above_1" => "partial_rotary_factor",
            "dynamic_without_factor" => "factor is missing",
            "linear_without_factor" => "factor is missing",
            "yarn_without_original" => "original_max_position_embeddings is missing",
            "llama3_without_low" => "low_freq_factor is missing",
            "longrope_without_long" => "long_factor is missing",
            "longrope_gptj" => "is_neox_style",
            "mrope_of_another_sum" => "mrope_section",
            other => panic!("{other}"),
        };
        names(key, get_rope(&case), name);
    }
}

#[test]
fn vllm_get_rope_refuses_what_has_no_meaning() {
    use vllm::Parameter;
    let made =
        |parameters: &[(&str, Parameter<'_>)]| vllm::get_rope(&host(), 64, 4096, true, parameters);
    let refused = |key: &str, parameters: &[(&str, Parameter<'_>)]| {
        names(key, made(parameters), key);
    };
    assert!(made(&[]).is_ok());
    refused("rope_type is 3", &[("rope_type", 3.into())]);
    refused("rope_theta is \"1e4\"", &[("rope_theta", "1e4".into())]);
    refused("rope_theta is NaN", &[("rope_theta", f64::NAN.into())]);
    refused("rope_dim is 2.5", &[("rope_dim", 2.5.into())]);
    refused("rotary_dim is 7", &[("rope_dim", 7.into())]);
    refused("rotary_dim is 66", &[("rope_dim", 66.into())]);
    // As dims of this call, not as those of a config.
    for dim in [7, 66] {
        let error = made(&[("rope_dim", dim.into())]).err();
        assert!(matches!(error, Some(InterfaceError::Value { .. })));
    }
    // Python takes a 0 for absent.
    let absent = made(&[("rope_dim", 0.into())]).unwrap();
    assert_eq!(absent.rope().rotary_dim(), 64);
    refused("rotary_dim is 900", &[("rope_dim", 9e15.into())]);
    refused(
        "partial_rotary_factor is NaN",
        &[("partial_rotary_factor", f64::NAN.into())],
    );
    refused("use_fope is true", &[("use_fope", true.into())]);
    refused("mrope_section is true", &[("mrope_section", true.into())]);
    refused(
        "mrope_section is [16.0, 16.0]",
        &[("mrope_section", (&[16.0, 16.0]).into())],
    );
    refused(
        "mrope_section",
        &[("mrope_section", (&[-1.0, 16.0, 16.0]).into())],
    );
    refused(
        "mrope_section",
        &[("mrope_section", (&[16.5, 16.0, 0.0]).into())],
    );
    refused("and 92 more", &[("mrope_section", (&[1.0; 100]).into())]);
    refused(
        "mrope_section is [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]:",
        &[("mrope_section", (&[1.0; 8]).into())],
    );
    let long = "x".repeat(5000);
    let error = made(&[("rope_type", long.as_str().into())]).unwrap_err();
    assert!(error.to_string().len() < 300, "{error}");
    let error = made(&[("rope_theta", long.as_str().into())]).unwrap_err();
    assert!(error.to_string().len() < 300, "{error}");
    for unlisted in ["ntk", "mllama4", "bailing_mrope", "openpangu"] {
        refused("rope_type", &[("rope_type", unlisted.into())]);
    }
    let yarn = |factor: f64, original: f64| {
        made(&[
            ("rope_type", "yarn".into()),
            ("factor", factor.into()),
            ("original_max_position_embeddings", original.into()),
        ])
    };
    assert_eq!(yarn(2.5, 1025.0).unwrap().max_position(), 2563);
    names("factor is 0.5", yarn(0.5, 1024.0), "shrinking");
    names(
        "original_max_position_embeddings is -1",
        yarn(2.0, -1.0),
        "negative",
    );
    names(
        "original_max_position_embeddings is 0",
        yarn(2.0, 0.0),
        "no length",
    );
    // However many positions that is.
    assert_eq!(yarn(1e18, 9e15).unwrap().max_position(), usize::MAX);
    refused(
        "max_trained_positions is 5000",
        &[
            ("rope_type", "dynamic".into()),
            ("factor", 2.into()),
            ("max_trained_positions", 5000.into()),
        ],
    );
    refused(
        "short_factor",
        &[
            ("rope_type", "longrope".into()),
            ("short_factor", (&[1.0; 31]).into()),
            ("long_factor", (&[1.0; 32]).into()),
            ("original_max_position_embeddings", 4096.into()),
        ],
    );
    // Each length of sequence has a factor of its own, if they are given.
    for (original, factor) in [(4096.0, 1.5), (2048.0, 1.25)] {
        let longrope = made(&[
            ("rope_type", "longrope".into()),
            ("short_factor", (&[1.0; 32]).into()),
            ("long_factor", (&[1.0; 32]).into()),
            ("short_mscale", 1.5.into()),
            ("long_mscale", 1.25.into()),
            ("original_max_position_embeddings", original.into()),
        ]);
        let Angles::Exact(frequencies) = longrope.unwrap().rope().angles().clone() else {
            panic!("of one length")
        };
        assert_eq!(frequencies.attention_factor(), factor);
    }
    // The last of two counts, as in Python.
    let twice = [("rope_theta", f64::NAN.into()), ("rope_theta", 5e5.into())];
    assert!(made(&twice).is_ok());
    // The last dims rotate, which begin at an odd one here.
    let odd = vllm::get_rope(
        &host(),
        63,
        4096,
        true,
        &[
            ("rope_type", "deepseek_yarn".into()),
            ("is_deepseek_v4", true.into()),
            ("rope_dim", 32.into()),
            ("factor", 2.into()),
            ("original_max_position_embeddings", 4096.into()),
        ],
    );
    names("head_size is 63", odd, "odd");

    let mrope = made(&[("mrope_section", (&[8.0, 12.0, 12.0]).into())]).unwrap();
    assert_eq!(mrope.max_position(), 4 * 4096);
    let forward = |positions: &[i64]| {
        rotated(&zeros(&[2, 64]), |query| {
            mrope.forward(positions, query, None)
        })
    };
    assert!(forward(&[1, 2]).is_ok() && forward(&[1, 2, 3, 4, 5, 6]).is_ok());
    names("one for each axis and token", forward(&[1, 2, 3]), "three");
    names(
        "position 16384 (token 3)",
        forward(&[1, 2, 3, 16_384, 5, 6]),
        "outside",
    );
}

#[test]
fn hugging_face_refuses_tables_of_another_form() {
    let mut values = vec![0.5f32; 2 * 3 * 8];
    values[8 + 6] = 0.25; // batch 0, token 1, column 6
    let shape = [2, 3, 8];
    let (table, plain) = (Array::new(&values, &shape), vec![0.5f32; 2 * 3 * 8]);
    let plain = Array::new(&plain, &shape);
    let new = |cos, sin, form| CosSin::new(&host(), cos, sin, form);
    let halves = new(plain, table, Form::RotateHalf);
    names(
        "sin: row 1 has 0.5 in column 2 and 0.25 in column 6",
        halves,
        "halves",
    );
    let repeated = new(table, plain, Form::RepeatInterleave);
    names(
        "cos: row 1 has 0.25 in column 6 and 0.5 in column 7",
        repeated,
        "columns",
    );
    // NaN equals NaN here, and nothing else.
    for (left, right) in [(f32::NAN, 0.5), (0.5, f32::NAN), (f32::NAN, f32::NAN)] {
        let (cos, sin) = ([left, right], [0.0; 2]);
        let (cos, sin) = (Array::new(&cos, &[1, 2]), Array::new(&sin, &[1, 2]));
        let made = CosSin::new(&host(), cos, sin, Form::RotateHalf);
        assert_eq!(made.is_ok(), left.is_nan() && right.is_nan());
    }
    names(
        "cos",
        new(Array::new(&[1.0; 3], &[1, 3]), plain, Form::RotateHalf),
        "odd",
    );
    names(
        "cos",
        new(Array::new(&[1.0; 4], &[4]), plain, Form::RotateHalf),
        "rank",
    );
    names(
        "sin",
        new(plain, Array::new(&[1.0; 8], &[1, 8]), Form::RotateHalf),
        "shapes",
    );
    names(
        "sin",
        new(plain, Array::new(&[1.0; 8], &shape), Form::RotateHalf),
        "length",
    );
    names("freqs_cis", FreqsCis::new(&host(), plain), "no parts");

    let table = new(plain, plain, Form::RotateHalf).unwrap();
    let apply = |shape: &[usize], dim| rotated(&zeros(shape), |q| table.apply(q, None, dim));
    names("unsqueeze_dim", apply(&[2, 1, 3, 8], 3), "unsqueeze_dim");
    names(
        "q has the shape [3, 1, 3, 8]: it must be [2, heads, 3,",
        apply(&[3, 1, 3, 8], 1),
        "batch",
    );
    names("q", apply(&[2, 1, 4, 8], 1), "sequence");
    names("q", apply(&[2, 1, 3, 6], 1), "dims");
    names("q", apply(&[2, 3, 8], 1), "rank");
    assert!(apply(&[2, 3, 1, 10], 2).is_ok());
}

/// However large the axes beside the empty one are, and whatever the table.
#[test]
fn calls_without_elements_return_empty() {
    let none: Data<f32> = Data {
        shape: vec![1 << 50, 3, 0, 8],
        values: Vec::new(),
    };
    let shape = [1 << 50, 0, 8];
    let table: Array<'_, f16> = Array::new(&[], &shape);
    let embedding = CosSin::new(&host(), table, table, Form::RotateHalf).unwrap();
    assert!(
        rotated(&none, |q| embedding.apply(q, None, 1))
            .unwrap()
            .is_empty()
    );
    let shape = [1 << 50, 0, 4];
    let cache: Array<'_, f16> = Array::new(&[], &shape);
    let attributes = onnx::Attributes::default();
    let node = onnx::RotaryEmbedding::new(&host(), cache, cache, attributes).unwrap();
    assert!(rotated(&none, |x| node.call(x, None)).unwrap().is_empty());

    let shape = [0, usize::MAX];
    let wide: Array<'_, f16> = Array::new(&[], &shape);
    names(
        "rotary_dim",
        onnx::RotaryEmbedding::new(&host(), wide, wide, attributes),
        "wide",
    );

    let no_rows: Array<'_, f32> = Array::new(&[], &[0, 8]);
    let embedding = vllm::RotaryEmbedding::from_cache(&host(), 8, no_rows, true).unwrap();
    let none: Data<bf16> = Data {
        shape: vec![0, 24],
        values: Vec::new(),
    };
    assert!(
        rotated(&none, |q| embedding.forward(&[], q, None))
            .unwrap()
            .is_empty()
    );
    let one: Data<bf16> = Data {
        shape: vec![1, 8],
        values: vec![bf16::ONE; 8],
    };
    names(
        "positions",
        rotated(&one, |q| embedding.forward(&[0], q, None)),
        "no rows",
    );
}

#[test]
fn tensors_of_a_call_are_in_one_memory() {
    let embedding = vllm::RotaryEmbedding::new(&host(), 4, 4, 16, 1e4, true).unwrap();
    let (mut slice, mut buffer) = ([1.0f32; 4], host().upload(&[1.0f32; 4]).unwrap());
    let (query, key) = (
        Tensor::new(&mut slice, &[1, 4]),
        Tensor::new(&mut buffer, &[1, 4]),
    );
    let call = embedding.forward(&[3], query, Some(key));
    assert_eq!(call, Err(InterfaceError::MixedMemory { argument: "key" }));
    let (query, key) = (
        Tensor::new(&mut buffer, &[1, 4]),
        Tensor::new(&mut slice, &[1, 4]),
    );
    let call = embedding.forward(&[3], query, Some(key));
    assert_eq!(call, Err(InterfaceError::MixedMemory { argument: "key" }));
    assert_eq!((slice, buffer.to_vec().unwrap()), ([1.0; 4], vec![1.0; 4]));
}

#[test]
fn tables_are_refused_where_they_do_not_fit() {
    let inv_freq = tables::inv_freq(1e4, 8).unwrap();
    let endless = tables::hugging_face(&inv_freq, 1.0, usize::MAX, Dtype::F32);
    names("rows", endless, "endless table");
    let without = tables::hugging_face(&[], 1.0, 3, Dtype::F32);
    assert!(matches!(
        without,
        Err(InterfaceError::Rope(Error::RotaryDim { .. }))
    ));
    assert!(tables::hugging_face(&inv_freq, 1.0, 0, Dtype::F32).is_err());
    let factors = tables::llama_cpp(1e4, 8, 1.0, Some(&[1.0; 3]), 2);
    names("freq_factors", factors, "too few factors");
    // The most rows that any table has, if there were memory for so many of 2^21 pairs, and one more.
    let wide = vec![0.0; 1 << 21];
    let rows = |rows| tables::hugging_face(&wide, 1.0, rows, Dtype::F32);
    names(
        "rows is 33554432: it must be few enough",
        rows(1 << 25),
        "memory",
    );
    names(
        "rows is 33554433: it must be at most 33554432",
        rows((1 << 25) + 1),
        "rows",
    );
    let one_pair = tables::max(1e4, 2, (1 << 25) + 1, Dtype::F32);
    names(
        "rows is 33554433: it must be at most 33554432",
        one_pair,
        "rows",
    );
    let arguments = max::Arguments::new(2, 1, 1e4, (1 << 24) + 1);
    let embedding = max::RotaryEmbedding::new(&host(), &arguments).unwrap();
    names(
        "max_seq_len is 16777217",
        embedding.freqs_cis_base(),
        "rows",
    );

    // Dims of a head.
    assert_eq!(tables::inv_freq(1e4, 1 << 16).unwrap().len(), 1 << 15);
    for dims in [0, 7, (1 << 16) + 2] {
        let f32 = Dtype::F32;
        let refused = |argument: &str, table: Option<InterfaceError>| {
            let expected = format!("{argument} is {dims}: it must be even, from 2 to 65536");
            let message = table.map(|error| error.to_string()).unwrap_or_default();
            assert!(message.contains(&expected), "{message}");
        };
        refused("rotary_dim", tables::inv_freq(1e4, dims).err());
        refused("rotary_dim", tables::vllm(1e4, dims, 1, f32).err());
        refused("head_dim", tables::max(1e4, dims, 1, f32).err());
        refused("dims", tables::mlx(1e4, dims, 1.0, 1, f32).err());
        refused("n_dims", tables::llama_cpp(1e4, dims, 1.0, None, 1).err());
        let arguments = max::Arguments::new(dims, 1, 1e4, 4);
        refused(
            "head_dim",
            max::RotaryEmbedding::new(&host(), &arguments).err(),
        );
        refused(
            "head_dim",
            max::RotaryEmbedding::linear(&host(), &arguments, 2.0).err(),
        );
    }
    // Values are as many as the shape says.
    let short = [0.5f32; 7];
    let cache = Array::new(&short, &[2, 4]);
    let given = vllm::RotaryEmbedding::from_cache(&host(), 4, cache, true);
    names("its memory holds 7 elements", given, "short");
}

// ---- an interface is the plain call ----

/// Numbers of any kind: signs, subnormals, infinities, NaN.
fn elements<T: Stored>(count: usize, seed: u64) -> Vec<T> {
    let mut state = seed | 1;
    let mut next = || {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        state >> 33
    };
    (0..count)
        .map(|_| match next() % 40 {
            0 => T::narrow(f32::NAN),
            1 => T::narrow(f32::INFINITY),
            2 => T::narrow(-1e-40),
            _ => T::narrow((next() as f32 / 1e9 - 1.0) * 3.0),
        })
        .collect()
}

/// What the plain call makes of x.
fn plainly<T: Stored>(rope: Rope, layout: Layout, x: &[T], positions: Positions<'_>) -> Vec<T> {
    let rotator = Host::new().rotator(&rope);
    let plan = rotator.plan(&Problem::new(T::DTYPE).q(layout)).unwrap();
    let mut y = x.to_vec();
    rotator
        .rotate(&plan, Some(InOut::InPlace(&mut y[..])), None, positions)
        .unwrap();
    y
}

fn cell() -> impl Strategy<Value = (usize, usize, usize, usize, u64, bool)> {
    (
        0usize..4,
        0usize..5,
        0usize..4,
        1usize..6,
        any::<u64>(),
        any::<bool>(),
    )
}

fn check_all_types(check: impl Fn(Dtype)) {
    Dtype::ALL.into_iter().for_each(check);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn mlx_is_the_plain_call(
        (batch, sequence, heads, pairs, seed, interleaved) in cell(),
        tail in 0usize..4,
        start in any::<i64>(),
        halvings in 0i32..4,
    ) {
        fn check<T: Stored>(
            [batch, sequence, heads, pairs, tail]: [usize; 5],
            seed: u64, interleaved: bool, start: i64, halvings: i32,
        ) {
            let width = 2 * pairs + tail;
            let scale = 0.5f64.powi(halvings);
            let frequencies = RopeConfig::new(1e4, 2 * pairs).unwrap();
            let linear = LinearScaling { factor: scale.recip() };
            let frequencies = frequencies.with_scaling(Scaling::Linear(linear)).unwrap();
            let pairing = if interleaved { Pairing::Interleaved } else { Pairing::HalfSplit };
            let rope = Rope::new(frequencies.frequencies().unwrap(), pairing);
            let x = Data {
                shape: vec![batch, heads, 1, sequence, width],
                values: elements::<T>(batch * sequence * heads * width, seed),
            };
            let layout = Layout::bhsd(batch, sequence, heads, width);
            let base = mlx::Spectrum::Base(1e4);
            let ours = mlx::Rope::new(&host(), 2 * pairs, interleaved, base, scale).unwrap();
            assert_eq!(ours.rope(), &rope);
            let of_start = rotated(&x, |a| ours.call(a, start)).unwrap();
            let plain = plainly(rope.clone(), layout, &x.values, Positions::start(start));
            assert_eq!(bits(&of_start), bits(&plain));

            let starts: Vec<i64> = (0..batch as i64).map(|b| start.wrapping_mul(b + 1)).collect();
            let backward = ours.backward().unwrap();
            assert_eq!(backward.rope().direction(), Direction::Inverse);
            let of_starts = rotated(&x, |a| backward.call(a, &starts[..])).unwrap();
            let inverse = rope.with_direction(Direction::Inverse);
            let positions = Positions::start_per_sequence(&starts[..]);
            assert_eq!(bits(&of_starts), bits(&plainly(inverse, layout, &x.values, positions)));
        }
        let sizes = [batch, sequence, heads, pairs, tail];
        check_all_types(|dtype| match dtype {
            Dtype::F32 => check::<f32>(sizes, seed, interleaved, start, halvings),
            Dtype::F16 => check::<f16>(sizes, seed, interleaved, start, halvings),
            Dtype::Bf16 => check::<bf16>(sizes, seed, interleaved, start, halvings),
            dtype => unreachable!("no case of {dtype}"),
        });
    }

    #[test]
    fn mlx_periods_are_reciprocal_frequencies(
        exponents in prop::collection::vec((-8i32..24, any::<bool>()), 1..6),
        negative in any::<bool>(),
    ) {
        let periods: Vec<f32> = exponents.iter()
            .map(|&(e, back)| 2f32.powi(e) * if back { -1.0 } else { 1.0 })
            .chain([f32::INFINITY])
            .collect();
        let scale = if negative { -0.25 } else { 0.25 };
        let inv_freq: Vec<f64> = periods.iter().map(|&p| scale / f64::from(p)).collect();
        let plain = Frequencies::from_inv_freq(&inv_freq).unwrap();
        let dims = 2 * periods.len();
        let spectrum = mlx::Spectrum::Freqs(&periods);
        let ours = mlx::Rope::new(&host(), dims, true, spectrum, scale).unwrap();
        prop_assert_eq!(ours.rope(), &Rope::new(plain, Pairing::Interleaved));
    }

    #[test]
    fn max_is_the_plain_call(
        (batch, sequence, heads, pairs, seed, interleaved) in cell(),
        start in 0i64..60,
    ) {
        let arguments = max::Arguments {
            head_dim: Some(2 * pairs),
            interleaved,
            ..max::Arguments::new(7, 0, 5e5, 32)
        };
        let params = max::LongRoPEScalingParams {
            short_factor: vec![1.5; pairs],
            long_factor: vec![4.0; pairs],
            original_max_position: 31,
            max_position_embeddings: 31,
        };
        let ours = max::RotaryEmbedding::longrope(&host(), &arguments, &params).unwrap();
        let pairing = if interleaved { Pairing::Interleaved } else { Pairing::HalfSplit };
        let long_rope = LongRopeScaling {
            attention_factor: Some(1.0),
            ..LongRopeScaling::new(params.short_factor, params.long_factor, 31)
        };
        let rope = RopeConfig::new(5e5, 2 * pairs).unwrap()
            .with_scaling(Scaling::LongRope(long_rope)).unwrap()
            .with_pairing(pairing)
            .rope_by_position().unwrap();
        prop_assert_eq!(ours.rope(), &rope);
        let x = Data {
            shape: vec![batch, sequence, heads, 2 * pairs],
            values: elements::<bf16>(batch * sequence * heads * 2 * pairs, seed),
        };
        let layout = Layout::bshd(batch, sequence, heads, 2 * pairs);
        let plain = plainly(rope, layout, &x.values, Positions::start(start));
        prop_assert_eq!(bits(&rotated(&x, |x| ours.call(x, start)).unwrap()), bits(&plain));
    }

    /// More divisors than pairs may be given, and an offset moves the dims that rotate.
    #[test]
    fn ggml_is_the_plain_call(
        (batch, tokens, heads, pairs, seed, interleaved) in cell(),
        (tail, offset) in (0usize..4, 0usize..3),
        positions in prop::collection::vec(any::<i32>(), 16),
    ) {
        let width = 2 * (offset + pairs) + tail;
        let mode = if interleaved { ggml::Mode::Normal } else { ggml::Mode::Neox };
        let arguments = ggml::Arguments {
            freq_scale: 0.25,
            attn_factor: 1.5,
            ..ggml::Arguments::new(2 * pairs, mode, 5e5)
        };
        let c = [2.0f32, 1.0, 0.5, 8.0, f32::INFINITY, 7.0];
        let divisors = c[..pairs].iter().map(|&c| 4.0 * f64::from(c)).collect();
        let config = RopeConfig::new(5e5, 2 * pairs).unwrap()
            .with_frequency_divisors(divisors).unwrap()
            .with_attention_factor(1.5).unwrap();
        let x = Data {
            shape: vec![batch, tokens, heads, width],
            values: elements::<f16>(batch * tokens * heads * width, seed),
        };
        let layout = Layout::bshd(batch, tokens, heads, width).with_rotary_offset(2 * offset);
        let ours = ggml::Rope::ext(&host(), Some(&c), &arguments).unwrap()
            .with_offset(2 * offset).unwrap();
        let pairing = if interleaved { Pairing::Interleaved } else { Pairing::HalfSplit };
        let rope = config.clone().with_pairing(pairing).rope().unwrap();
        prop_assert_eq!(ours.rope(), &rope);
        let b = &positions[..tokens];
        let plain = plainly(rope, layout, &x.values, Positions::per_token_shared(b));
        prop_assert_eq!(bits(&rotated(&x, |a| ours.call(a, b)).unwrap()), bits(&plain));

        // With several axes the positions are repeated for each sequence.
        let sections = [1, 2, 1, 1];
        let mode = if interleaved { ggml::Mode::Imrope } else { ggml::Mode::Mrope };
        let ours = ggml::Rope::multi(&host(), Some(&c), sections, &ggml::Arguments { mode, ..arguments });
        let ours = ours.unwrap().with_offset(2 * offset).unwrap().backward().unwrap();
        let mode = if interleaved { GgmlMrope::Imrope } else { GgmlMrope::Mrope };
        let rope = config.with_axes(Axes::Ggml { mode, sections }).rope().unwrap().backward();
        let b: Vec<i32> = (0..4 * tokens).map(|i| positions[i % 16].wrapping_add(i as i32)).collect();
        let repeated: Vec<i32> = b.chunks(tokens.max(1))
            .flat_map(|axis| axis.repeat(batch))
            .collect();
        let plain = plainly(rope, layout, &x.values, Positions::per_axis(&repeated));
        prop_assert_eq!(bits(&rotated(&x, |a| ours.call(a, &b)).unwrap()), bits(&plain));
    }

    #[test]
    fn tables_of_callers_are_the_plain_call(
        (batch, sequence, heads, pairs, seed, interleaved) in cell(),
        tail in 0usize..4,
    ) {
        let tokens = batch * sequence;
        let rows = tokens.max(1);
        let width = 2 * pairs + tail;
        let (cos, sin) = (elements::<f16>(rows * pairs, seed), elements::<f16>(rows * pairs, !seed));
        let widened = |values: &[f16]| values.iter().map(|v| v.to_f32()).collect::<Vec<_>>();
        let table = CosSinTable::new(widened(&cos), widened(&sin), pairs).unwrap();
        let pairing = if interleaved { Pairing::Interleaved } else { Pairing::HalfSplit };
        let rope = Rope::new(table, pairing);
        let ids: Vec<i64> = (0..tokens as i64).rev().collect();
        let x = elements::<f32>(tokens * heads * width, seed ^ 5);

        // ONNX, [batch, heads, sequence, head_size].
        let attributes = onnx::Attributes {
            interleaved,
            rotary_embedding_dim: 2 * pairs,
            ..onnx::Attributes::default()
        };
        let cache_shape = [rows, pairs];
        let caches = [Array::new(&cos, &cache_shape), Array::new(&sin, &cache_shape)];
        let data = Data { shape: vec![batch, heads, sequence, width], values: x.clone() };
        let layout = Layout::bhsd(batch, sequence, heads, width);
        let plain = plainly(rope.clone(), layout, &x, Positions::per_token(&ids[..]));
        let node = onnx::RotaryEmbedding::new(&host(), caches[0], caches[1], attributes).unwrap();
        let ids_shape = [batch, sequence];
        let ids_array = Array::new(&ids, &ids_shape);
        let ours = rotated(&data, |x| node.call(x, Some(ids_array))).unwrap();
        prop_assert_eq!(bits(&ours), bits(&plain));

        // vLLM, [tokens, heads * head_size].
        let cache: Vec<f16> = (0..rows)
            .flat_map(|row| {
                let row = row * pairs..(row + 1) * pairs;
                [&cos[row.clone()], &sin[row]].concat()
            })
            .collect();
        let data = Data { shape: vec![tokens, heads * width], values: x.clone() };
        let layout = Layout::tokens(tokens, heads, width);
        let plain = plainly(rope.clone(), layout, &x, Positions::per_token(&ids[..]));
        let cache_shape = [rows, 2 * pairs];
        let cache = Array::new(&cache, &cache_shape);
        let ours = rotated(&data, |query| {
            vllm::rotary_embedding(&host(), &ids, query, None, width, cache, !interleaved)
        });
        prop_assert_eq!(bits(&ours.unwrap()), bits(&plain));

        // Hugging Face, [batch, sequence, heads, head_dim]: a row for each token.
        let repeated = |values: &[f16]| -> Vec<f16> {
            let of_row = |row: &[f16]| match interleaved {
                true => row.iter().flat_map(|&v| [v, v]).collect(),
                false => [row, row].concat(),
            };
            values[..tokens * pairs].chunks_exact(pairs).flat_map(of_row).collect()
        };
        let (cos, sin) = (repeated(&cos), repeated(&sin));
        let shape = [batch, sequence, 2 * pairs];
        let form = if interleaved { Form::RepeatInterleave } else { Form::RotateHalf };
        let (cos, sin) = (Array::new(&cos, &shape), Array::new(&sin, &shape));
        let embedding = CosSin::new(&host(), cos, sin, form).unwrap();
        let ascending: Vec<i64> = (0..tokens as i64).collect();
        let data = Data { shape: vec![batch, sequence, heads, width], values: x.clone() };
        let layout = Layout::bshd(batch, sequence, heads, width);
        let plain = plainly(rope, layout, &x, Positions::per_token(&ascending[..]));
        let ours = rotated(&data, |q| embedding.apply(q, None, 2)).unwrap();
        prop_assert_eq!(bits(&ours), bits(&plain));
    }
}

// ---- on a GPU ----

/// A buffer as the call leaves it.
#[cfg(feature = "cuda")]
fn left_by<T: Stored>(
    device: &Device,
    x: &Data<T>,
    call: impl FnOnce(&Device, Tensor<'_, T>) -> Result<(), InterfaceError>,
) -> Vec<u32> {
    let mut buffer = device.upload(&x.values).unwrap();
    call(device, Tensor::new(&mut buffer, &x.shape)).unwrap();
    bits(&buffer.to_vec().unwrap())
}

#[cfg(feature = "cuda")]
fn same<T: Stored>(
    gpu: &Device,
    x: &Data<T>,
    call: impl Fn(&Device, Tensor<'_, T>) -> Result<(), InterfaceError>,
) {
    assert_eq!(left_by(gpu, x, &call), left_by(&host(), x, &call));
}

#[cfg(feature = "cuda")]
fn same_on_gpu<T: Stored>(gpu: &Device) {
    let x = |shape: &[usize]| Data {
        shape: shape.to_vec(),
        values: elements::<T>(shape.iter().product(), 7),
    };
    same(gpu, &x(&[3, 4, 5, 20]), |device, a| {
        let spectrum = mlx::Spectrum::Base(1e4);
        let offset = &[-7i64, 1 << 40, 0][..];
        mlx::fast::rope(device, a, 16, true, spectrum, 0.3, offset)
    });
    let arguments = max::Arguments::new(64, 2, 1e4, 32);
    let params = max::LongRoPEScalingParams {
        short_factor: vec![1.0; 16],
        long_factor: vec![3.0; 16],
        original_max_position: 20,
        max_position_embeddings: 32,
    };
    same(gpu, &x(&[2, 9, 3, 32]), |device, x| {
        max::RotaryEmbedding::longrope(device, &arguments, &params)?.call(x, 15)
    });
    let (cos, sin) = (elements::<T>(12 * 4, 1), elements::<T>(12 * 4, 2));
    let shape = [12, 4];
    let (cos, sin) = (Array::new(&cos, &shape), Array::new(&sin, &shape));
    let attributes = onnx::Attributes {
        num_heads: 2,
        ..onnx::Attributes::default()
    };
    same(gpu, &x(&[2, 3, 16]), |device, x| {
        let ids = Array::new(&[0, -1, 11, 12, 3, 3], &[2, 3]);
        onnx::RotaryEmbedding::new(device, cos, sin, attributes)?
            .pass_through_out_of_range()
            .call(x, Some(ids))
    });
    same(gpu, &x(&[2, 3, 16]), |device, x| {
        let start = Array::new(&[9], &[]);
        com_microsoft::rotary_embedding(device, x, start, cos, sin, attributes)
    });
    same(gpu, &x(&[5, 24]), |device, query| {
        let embedding = vllm::RotaryEmbedding::new(device, 12, 8, 100, 1e4, true)?;
        embedding
            .backward()?
            .forward(&[3, 99, 0, 0, 7], query, None)
    });
    same(gpu, &x(&[2, 3, 2, 12]), |device, a| {
        let arguments = ggml::Arguments::new(8, ggml::Mode::Imrope, 1e4);
        let b = [0, 1, 2, 5, 6, 7, -1, 0, i32::MAX, 0, 0, 1];
        ggml::Rope::multi(device, None, [2, 1, 1, 0], &arguments)?
            .with_offset(2)?
            .call(a, &b)
    });
    let table = elements::<T>(2 * 3 * 4 * 2, 3);
    same(gpu, &x(&[2, 3, 5, 8]), |device, xq| {
        let factors = Array::new(&table, &[2, 3, 4, 2]);
        FreqsCis::new(device, factors)?.apply_rotary_emb(xq, None, 2)
    });
}

#[cfg(feature = "cuda")]
#[test]
fn a_gpu_gives_the_same_bits() {
    match Device::cuda(0, &Dtype::ALL) {
        Ok(gpu) => {
            same_on_gpu::<f32>(&gpu);
            same_on_gpu::<f16>(&gpu);
            same_on_gpu::<bf16>(&gpu);
        }
        Err(error) => assert!(
            std::env::var("PHASOR_REQUIRE_GPU").as_deref() != Ok("1"),
            "PHASOR_REQUIRE_GPU=1, but there is no GPU: {error}"
        ),
    }
}
