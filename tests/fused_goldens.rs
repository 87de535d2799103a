//! Steps between projection and attention, against what other implementations computed:
//! `tests/goldens/torch-append`, `transformers-fused` and `max-append`. The scripts that made these say
//! what is in the files.

use std::path::{Path, PathBuf};

use phasor::config::{ModelConfig, RopeConfig};
use phasor::half::{bf16, f16};
use phasor::norm::HeadNorm;
use phasor::quantize::{Codes, ScaleForm, ScaleRounding};
use phasor::{
    CacheLayout, Dtype, Element, Frequencies, Host, HostStep, HostWeights, KvCacheLayout, Layout,
    Pairing, Positions, Problem, Rope, ScaleLayout, Slots, Stages, Stored, StoredCodes,
};
use safetensors::{Dtype as FileDtype, SafeTensors};
use serde_json::Value;

/// A type of the files' tensors.
trait Stock: Copy + PartialEq + std::fmt::Debug {
    const STORED: FileDtype;
    fn of(bytes: &[u8]) -> Self;
}

macro_rules! stock {
    ($($type:ty: $dtype:ident),*) => {$(
        impl Stock for $type {
            const STORED: FileDtype = FileDtype::$dtype;
            fn of(bytes: &[u8]) -> Self {
                Self::from_le_bytes(bytes.try_into().unwrap())
            }
        }
    )*};
}
stock!(f32: F32, f16: F16, bf16: BF16, i32: I32, i64: I64);

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/goldens")
        .join(name)
}

struct Golden {
    case: Value,
    bytes: Vec<u8>,
}

impl Golden {
    fn read(folder: &str, name: &str) -> Self {
        let path = self::folder(folder).join(format!("{name}.safetensors"));
        let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let case = &header.metadata().as_ref().unwrap()["case"];
        Self {
            case: serde_json::from_str(case).unwrap(),
            bytes,
        }
    }

    fn find<T: Stock>(&self, name: &str) -> Option<Vec<T>> {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let tensor = file.tensor(name).ok()?;
        assert_eq!(tensor.dtype(), T::STORED, "{name}");
        let values = tensor.data().chunks_exact(size_of::<T>());
        Some(values.map(T::of).collect())
    }

    fn tensor<T: Stock>(&self, name: &str) -> Vec<T> {
        self.find(name).unwrap_or_else(|| panic!("{name}"))
    }

    /// The bytes of a tensor of any type.
    fn data(&self, name: &str) -> Option<Vec<u8>> {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        Some(file.tensor(name).ok()?.data().to_vec())
    }

    /// Bytes like those of a tensor, where nothing was stored.
    fn untouched(&self, name: &str) -> Vec<u8> {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let tensor = file.tensor(name).unwrap();
        let value = || self.case["untouched"].as_f64().unwrap() as f32;
        let element = match tensor.dtype() {
            FileDtype::F32 => value().to_le_bytes().to_vec(),
            FileDtype::BF16 => bf16::from_f32(value()).to_le_bytes().to_vec(),
            FileDtype::U8 => vec![self.number("untouched_byte") as u8],
            other => panic!("{other:?}"),
        };
        element.repeat(tensor.data().len() / element.len())
    }

    fn has(&self, name: &str) -> bool {
        SafeTensors::deserialize(&self.bytes)
            .unwrap()
            .tensor(name)
            .is_ok()
    }

    fn shape(&self, name: &str) -> Vec<usize> {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        file.tensor(name).unwrap().shape().to_vec()
    }

    fn number(&self, key: &str) -> usize {
        self.case[key].as_u64().unwrap() as usize
    }

    fn text(&self, key: &str) -> &str {
        self.case[key].as_str().unwrap()
    }
}

/// Pair i turns i + 1 quarters per position, exactly.
fn quarter_turns(pairs: usize, pairing: &str) -> Rope {
    let steps = (1..=pairs as u64).map(|quarters| quarters << 62).collect();
    let pairing = match pairing {
        "half_split" => Pairing::HalfSplit,
        "interleaved" => Pairing::Interleaved,
        other => panic!("{other}"),
    };
    Rope::new(Frequencies::from_steps(steps).unwrap(), pairing)
}

/// Tokens of several sequences, and where they go.
struct Batch {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    pages: usize,
    page_size: usize,
    rope: Rope,
    qkv: Vec<bf16>,
    q_rotated: Vec<bf16>,
    position_ids: Vec<i64>,
    cu_seqlens: Vec<i32>,
    cache_lengths: Vec<i32>,
    block_table: Vec<i32>,
    page_indptr: Vec<i32>,
    page_indices: Vec<i32>,
    slot_mapping: Vec<i64>,
}

impl Batch {
    fn read(name: &str) -> Self {
        let [ids, qkv, rotated] = ["ids", "qkv", "rotated"]
            .map(|part| Golden::read("torch-append", &format!("{name}_{part}")));
        let head_dim = ids.number("head_dim");
        Self {
            heads: ids.number("heads"),
            kv_heads: ids.number("kv_heads"),
            head_dim,
            pages: ids.number("pages"),
            page_size: ids.number("page_size"),
            rope: quarter_turns(head_dim / 2, ids.text("pairing")),
            qkv: qkv.tensor("qkv"),
            q_rotated: rotated.tensor("q"),
            position_ids: ids.tensor("position_ids"),
            cu_seqlens: ids.tensor("cu_seqlens"),
            cache_lengths: ids.tensor("cache_lengths"),
            block_table: ids.tensor("block_table"),
            page_indptr: ids.tensor("page_indptr"),
            page_indices: ids.tensor("page_indices"),
            slot_mapping: ids.tensor("slot_mapping"),
        }
    }

    fn tokens(&self) -> usize {
        self.position_ids.len()
    }

    /// q, k and v of packed tokens, `batch` sequences of as many each.
    fn layouts(&self, batch: usize) -> [Layout; 3] {
        let total = self.heads + 2 * self.kv_heads;
        let k = self.heads + self.kv_heads;
        [0..self.heads, self.heads..k, k..total].map(|range| {
            Layout::packed_heads(batch, self.tokens() / batch, total, self.head_dim, range)
        })
    }

    fn cache(&self, case: &Value) -> KvCacheLayout {
        let [p, s, h, d] = [self.pages, self.page_size, self.kv_heads, self.head_dim];
        let nhd = CacheLayout::paged_nhd(p, s, h, d);
        let hnd = CacheLayout::paged_hnd(p, s, h, d);
        let both = |cache| KvCacheLayout::separate(cache, cache);
        let sequences = self.cache_lengths.len();
        let inline = case["inline"].as_bool() == Some(true);
        let cache = match case["layout"].as_str().unwrap() {
            // A scale behind the codes of each head.
            "nhd" if inline => both(nhd.with_strides(s * h * (d + 4), h * (d + 4), d + 4)),
            "nhd" => both(nhd),
            "hnd" => both(hnd),
            "nhd_in_turn" => KvCacheLayout::one_buffer(nhd.in_turn()),
            "hnd_in_pairs" => KvCacheLayout::one_buffer(hnd.in_pairs_of_pages()),
            "nhd_layer_1_of_2_in_pairs" => {
                KvCacheLayout::one_buffer(nhd.of_layer(2, 1).in_pairs_of_pages())
            }
            "packed_and_transposed" => KvCacheLayout::separate(
                CacheLayout::paged_packed(p, s, h, d, 8),
                CacheLayout::paged_transposed(p, s, h, d),
            ),
            "hnd_side_by_side" => KvCacheLayout::one_buffer(hnd.side_by_side()),
            "flat" => both(CacheLayout::flat(p * s, h, d)),
            "bshd" => both(CacheLayout::bshd(sequences, s, h, d)),
            "bhsd" => both(CacheLayout::bhsd(sequences, s, h, d)),
            other => panic!("{other}"),
        };
        let group = case["group"].as_u64().map_or(d, |dims| dims as usize);
        let scales = match inline {
            true => {
                let head = d / 4 + 1;
                ScaleLayout::strided(s * h * head, h * head, head, 1)
                    .with_offset(d / 4)
                    .inline()
            }
            false => ScaleLayout::tokens_heads(s, h, d / group),
        };
        match codes(case, scales) {
            Some(codes) => cache.with_codes(codes),
            None => cache,
        }
    }
}

fn codes(case: &Value, scales: ScaleLayout) -> Option<StoredCodes> {
    let codes = match case["codes"].as_str()? {
        "e4m3" => Codes::E4m3,
        "int8" => Codes::Int8,
        other => panic!("{other}"),
    };
    let form = match case["form"].as_str().unwrap() {
        "divide" => ScaleForm::Divide,
        "multiply" => ScaleForm::Multiply,
        other => panic!("{other}"),
    };
    let Some(floor) = case["floor"].as_f64() else {
        return Some(StoredCodes::given(codes, form));
    };
    let mut stored = StoredCodes::dynamic(codes, floor as f32, scales);
    if form == ScaleForm::Multiply {
        stored = stored.by_inverse();
    }
    if let Some(dims) = case["group"].as_u64() {
        stored = stored.groups_of(dims as usize);
    }
    let rounding = match case["scale_rounding"].as_str() {
        None => return Some(stored),
        Some("up") => ScaleRounding::PowerOfTwoUp,
        Some("down") => ScaleRounding::PowerOfTwoDown,
        Some(other) => panic!("{other}"),
    };
    Some(stored.rounded(rounding).e8m0())
}

/// Performs a step from packed qkv, and compares q, the caches and their scales, every bit of them. Parts of
/// a golden may be in several files.
fn check_caches(batch: &Batch, name: &str, case: &Value, parts: &[&Golden]) {
    let slots = case["slots"].as_str().unwrap();
    let find = |tensor: &str| parts.iter().find(|golden| golden.has(tensor));
    let q_codes = find("q_codes").map(|_| codes(case, ScaleLayout::tokens_heads(0, 0, 0)).unwrap());
    let sequences = match slots {
        "sequences" => batch.cache_lengths.len(),
        _ => 1,
    };
    let [q, k, v] = batch.layouts(sequences);
    let mut problem = Problem::new(Dtype::Bf16)
        .q(q)
        .k_to_cache(k)
        .v_to_cache(v)
        .cache(batch.cache(case))
        .packed();
    if let Some(codes) = q_codes {
        let elsewhere = Layout::tokens(batch.tokens(), batch.heads, batch.head_dim);
        problem = problem.q((q, elsewhere)).q_codes(codes);
    }
    let rotator = Host::new().rotator(&batch.rope);
    let plan = rotator.plan(&problem).unwrap();

    let skips = parts[0].find::<i64>("slot_mapping");
    let per_token = Positions::per_token(&batch.position_ids);
    let ragged = Positions::per_token(&batch.position_ids).cu_seqlens(&batch.cu_seqlens);
    let lengths = &batch.cache_lengths;
    let (positions, slots) = match slots {
        // Padding has no slot; it is rotated all the same.
        "mapping" => (per_token, Slots::mapping(&batch.slot_mapping)),
        "mapping_with_skips" => (per_token, Slots::mapping(skips.as_ref().unwrap())),
        "page_table" => (ragged, Slots::page_table(&batch.block_table, lengths)),
        "page_indices" => (
            ragged,
            Slots::page_indices(&batch.page_indptr, &batch.page_indices, lengths),
        ),
        "sequences" => (per_token, Slots::sequences(lengths)),
        other => panic!("{other}"),
    };
    let rotated_tokens = match positions.as_cu_seqlens() {
        Some(_) => *batch.cu_seqlens.last().unwrap() as usize,
        None => batch.tokens(),
    };

    // What is written, and what it is to be.
    let written = ["k", "v", "kv", "k_scales", "v_scales", "q_codes"];
    let given = case["codes"].is_string() && case["floor"].is_null();
    let mut expected = Vec::new();
    let [
        mut k,
        mut v,
        mut kv,
        mut k_scales,
        mut v_scales,
        mut q_codes,
    ] = written.map(|tensor| {
        let golden = find(tensor).filter(|_| !(given && tensor.ends_with("_scales")))?;
        expected.push((tensor, golden.data(tensor).unwrap()));
        Some(golden.untouched(tensor))
    });
    let weights = ["q_scale", "k_scales", "v_scales"].map(|tensor| {
        let golden = find(tensor).filter(|_| given)?;
        Some(golden.tensor::<f32>(tensor))
    });
    let [q_weights, k_weights, v_weights] = weights.each_ref().map(|scales| match scales {
        Some(scales) => HostWeights::new().scales(&scales[..]),
        None => HostWeights::new(),
    });
    let mut buffer = batch.qkv.clone();
    let mut step = HostStep::new(positions)
        .buffer(&mut buffer[..])
        .slots(slots)
        .q_weights(q_weights)
        .k_weights(k_weights)
        .v_weights(v_weights);
    if let Some(cache) = &mut k {
        step = step.k_cache(cache);
    }
    if let Some(cache) = &mut v {
        step = step.v_cache(cache);
    }
    if let Some(cache) = &mut kv {
        step = step.kv_cache(cache);
    }
    if let Some(scales) = &mut k_scales {
        step = step.k_scales(scales);
    }
    if let Some(scales) = &mut v_scales {
        step = step.v_scales(scales);
    }
    if let Some(codes) = &mut q_codes {
        step = step.q_codes(codes);
    }
    assert_eq!(rotator.step(&plan, step), Ok(Stored::All), "{name}");

    let coded = q_codes.is_some();
    let got = [k, v, kv, k_scales, v_scales, q_codes]
        .into_iter()
        .flatten();
    for (got, (tensor, expected)) in got.zip(expected) {
        assert_bytes(&got, &expected, &format!("{name}, {tensor}"));
    }
    let mut expected = batch.qkv.clone();
    let row = batch.qkv.len() / batch.tokens();
    let width = batch.heads * batch.head_dim;
    for token in 0..if coded { 0 } else { rotated_tokens } {
        let q = &batch.q_rotated[token * width..][..width];
        expected[token * row..][..width].copy_from_slice(q);
    }
    assert_bits(&buffer, &expected, name);
}

#[track_caller]
fn assert_bytes(got: &[u8], expected: &[u8], name: &str) {
    assert_eq!(got.len(), expected.len(), "{name}");
    let differ = |(_, (got, expected)): &(_, (&u8, &u8))| got != expected;
    if let Some((at, (got, expected))) = got.iter().zip(expected).enumerate().find(differ) {
        panic!("{name}: byte {at} is {got:#x}, not {expected:#x}");
    }
}

#[track_caller]
fn assert_bits(got: &[bf16], expected: &[bf16], name: &str) {
    let bytes = |x: &[bf16]| -> Vec<u8> { x.iter().flat_map(|x| x.to_le_bytes()).collect() };
    assert_bytes(&bytes(got), &bytes(expected), name);
}

#[test]
fn caches_are_those_of_engines() {
    let serving = Batch::read("serving");
    let [k, v] = ["k", "v"].map(|n| Golden::read("torch-append", &format!("serving_nhd_{n}")));
    check_caches(&serving, "serving", &k.case, &[&k, &v]);

    let ragged = Batch::read("ragged");
    for name in [
        "nhd",
        "hnd",
        "nhd_in_turn",
        "hnd_in_pairs",
        "nhd_layer_1_of_2_in_pairs",
        "packed_and_transposed",
        "hnd_side_by_side",
        "skips",
    ] {
        let golden = Golden::read("torch-append", &format!("ragged_{name}"));
        check_caches(&ragged, name, &golden.case, &[&golden]);
        // SGLang's pool is the memory of the same slots in pages.
        if name == "skips" {
            let mut case = golden.case.clone();
            case["layout"] = "flat".into();
            check_caches(&ragged, "flat", &case, &[&golden]);
        }
    }
    let dense = Batch::read("dense");
    for name in ["bshd", "bhsd"] {
        let golden = Golden::read("torch-append", &format!("dense_{name}"));
        check_caches(&dense, name, &golden.case, &[&golden]);
    }
}

#[test]
fn caches_of_codes_are_those_of_engines() {
    let ragged = Batch::read("ragged");
    for name in [
        "e4m3_tensor",
        "e4m3_heads",
        "e4m3_inverse",
        "e4m3_token_head",
        "e4m3_token_head_inline",
        "int8_token_head",
        "e4m3_groups_f32",
        "e4m3_groups_e8m0_up",
        "e4m3_groups_e8m0_down",
    ] {
        let golden = Golden::read("torch-append", &format!("ragged_{name}"));
        check_caches(&ragged, name, &golden.case, &[&golden]);
    }
}

#[test]
fn latent_caches_are_those_of_deepseek() {
    let input = Golden::read("torch-append", "latent_input");
    let [pages, page_size] = ["pages", "page_size"].map(|key| input.number(key));
    let [k_pe, latent] = ["k_pe", "latent"].map(|name| input.tensor::<bf16>(name));
    let [position_ids, slots] =
        ["position_ids", "slot_mapping"].map(|name| input.tensor::<i64>(name));
    let tokens = position_ids.len();
    let q_rotated = Golden::read("torch-append", "latent").tensor("q_rotated");
    let rotator = Host::new().rotator(&quarter_turns(32, input.text("pairing")));
    for name in ["latent", "latent_e4m3", "latent_656"] {
        let golden = Golden::read("torch-append", name);
        let plain = KvCacheLayout::latent(pages, page_size, 512, 64);
        let given = golden.find::<f32>("k_scales");
        let cache = match name {
            "latent_656" => {
                let floor = golden.case["floor"].as_f64().unwrap() as f32;
                KvCacheLayout::latent_e4m3(pages, page_size, floor)
            }
            _ => match codes(&golden.case, ScaleLayout::tokens_heads(0, 0, 0)) {
                Some(codes) => plain.with_codes(codes),
                None => plain,
            },
        };
        let problem = Problem::new(Dtype::Bf16)
            .q(Layout::tokens(tokens, 2, 192).with_rotary_offset(128))
            .k_to_cache(Layout::tokens(tokens, 1, 64))
            .v_to_cache(Layout::tokens(tokens, 1, 512))
            .cache(cache);
        let plan = rotator.plan(&problem).unwrap();
        let mut q = input.tensor::<bf16>("q");
        let mut kv = golden.untouched("kv");
        let weights = || match &given {
            Some(scales) => HostWeights::new().scales(&scales[..]),
            None => HostWeights::new(),
        };
        let step = HostStep::new(Positions::per_token(&position_ids))
            .q(&mut q)
            .k(&k_pe)
            .v(&latent)
            .kv_cache(&mut kv)
            .slots(Slots::mapping(&slots))
            .k_weights(weights())
            .v_weights(weights());
        assert_eq!(rotator.step(&plan, step), Ok(Stored::All), "{name}");
        assert_bytes(&kv, &golden.data("kv").unwrap(), name);
        assert_bits(&q, &q_rotated, name);
    }
}

/// A norm of heads as a golden describes it.
#[derive(Clone, Copy, Debug)]
struct Norm {
    layer: bool,
    eps: f64,
    offset: f64,
    across: bool,
    round_before_weight: bool,
    after_rotation: bool,
}

impl Norm {
    fn read(case: &Value) -> Option<Self> {
        let flag = |key: &str| case[key].as_bool().unwrap();
        case.is_object().then(|| Self {
            layer: match case["kind"].as_str().unwrap() {
                "rms" => false,
                "layer" => true,
                other => panic!("{other}"),
            },
            eps: case["eps"].as_f64().unwrap(),
            offset: case["weight_offset"].as_f64().unwrap(),
            across: flag("across_heads"),
            round_before_weight: flag("round_before_weight"),
            after_rotation: flag("after_rotation"),
        })
    }

    /// Each of the peer's steps rounds to the type.
    fn stages(&self) -> Stages {
        let mut norm = match self.layer {
            true => HeadNorm::layer(self.eps as f32),
            false => HeadNorm::rms(self.eps as f32),
        }
        .with_weight_offset(self.offset as f32);
        if self.across {
            norm = norm.across_heads();
        }
        if self.round_before_weight {
            norm = norm.round_before_weight();
        }
        match self.after_rotation {
            true => Stages::new().norm_after_rotation(norm),
            false => Stages::new().norm(norm.round_after()),
        }
    }
}

/// One stream of a golden, `[tokens, heads, head_dim]`.
struct Stream<'a, T> {
    name: String,
    heads: usize,
    head_dim: usize,
    x: Vec<T>,
    expected: Vec<T>,
    bias: Option<Vec<T>>,
    norm: Option<Norm>,
    weight: Option<Vec<T>>,
    beta: Option<Vec<T>>,
    /// The first dim that rotates, if any do.
    rotates: Option<(&'a RopeConfig, usize)>,
    temperature: Option<(f64, f64)>,
    position_ids: &'a [i64],
}

impl<T: Element + Stock> Stream<'_, T> {
    fn stages(&self) -> Stages {
        let mut stages = self.norm.map_or(Stages::new(), |norm| norm.stages());
        if self.bias.is_some() {
            stages = stages.bias();
        }
        if let Some((slope, interval)) = self.temperature {
            stages = stages.temperature(slope as f32, interval as u32);
        }
        stages
    }

    fn weights(&self) -> HostWeights<'_, T> {
        let mut weights = HostWeights::new();
        if let Some(bias) = &self.bias {
            weights = weights.bias(&bias[..]);
        }
        if let Some(weight) = &self.weight {
            weights = weights.norm(&weight[..]);
        }
        if let Some(beta) = &self.beta {
            weights = weights.norm_bias(&beta[..]);
        }
        weights
    }

    /// What each element's error is a part of, in two: of the peer's roundings, and of its angles
    /// (transformers forms them in f32). By token, head and dim.
    fn sizes(&self) -> Vec<(f64, f64)> {
        let row = self.heads * self.head_dim;
        let wide = |x: &T| f64::from(x.widen());
        let mut sizes = Vec::new();
        for (token, &position) in self.x.chunks_exact(row).zip(self.position_ids) {
            let mut x: Vec<f64> = token.iter().map(wide).collect();
            if let Some(bias) = &self.bias {
                x.iter_mut().zip(bias).for_each(|(x, b)| *x += wide(b));
            }
            // The statistic is the same before the rotation and after it.
            let mut gain = vec![1.0; row];
            if let Some(norm) = self.norm {
                let part = if norm.across { row } else { self.head_dim };
                for (at, heads) in x.chunks_exact_mut(part).enumerate() {
                    let count = part as f64;
                    let mean = match norm.layer {
                        true => heads.iter().sum::<f64>() / count,
                        false => 0.0,
                    };
                    heads.iter_mut().for_each(|x| *x -= mean);
                    let variance = heads.iter().map(|x| x * x).sum::<f64>() / count;
                    gain[at * part..][..part].fill(1.0 / (variance + norm.eps).sqrt());
                }
                if let Some(weight) = &self.weight {
                    for (at, gain) in gain.iter_mut().enumerate() {
                        *gain *= norm.offset + wide(&weight[at % weight.len()]);
                    }
                }
            }
            let after = self.norm.is_some_and(|norm| norm.after_rotation);
            let layer = self.norm.is_some_and(|norm| norm.layer);
            let mut of_token: Vec<(f64, f64)> = (x.iter().zip(&gain))
                .map(|(x, gain)| match after {
                    true => (x.abs(), 0.0),
                    // What is left when a mean is taken off has the error of the whole.
                    false => (
                        (x * gain).abs() + f64::from(u8::from(layer)) * gain.abs(),
                        0.0,
                    ),
                })
                .collect();
            if let Some((config, first)) = self.rotates {
                let frequencies = config.frequencies().unwrap();
                let inv_freq = frequencies.inv_freq();
                let pairs = inv_freq.len();
                for head in of_token.chunks_exact_mut(self.head_dim) {
                    for (pair, inv_freq) in inv_freq.iter().enumerate() {
                        let (a, b) = match config.pairing() {
                            Pairing::HalfSplit => (pair, pair + pairs),
                            Pairing::Interleaved => (2 * pair, 2 * pair + 1),
                        };
                        let [a, b] = [first + a, first + b];
                        let both = head[a].0 + head[b].0;
                        // As measured in config_goldens.rs: inv_freq is off by up to 10 units, and the
                        // product is rounded.
                        let angle = position as f64 * inv_freq * 11.0 * 2f64.powi(-24);
                        head[a] = (both, both * angle);
                        head[b] = head[a];
                    }
                }
            }
            let factor = self.temperature.map_or(1.0, |(slope, interval)| {
                1.0 + slope * ((position + 1) as f64 / interval).floor().ln_1p()
            });
            sizes.extend(of_token.iter().zip(&gain).map(|(&(size, angle), gain)| {
                let gain = if after { gain.abs() } else { 1.0 } * factor;
                (size * gain, angle * gain)
            }));
        }
        sizes
    }

    /// The largest difference, beside that of the peer's angles, in roundings to the type; and how many
    /// values are equal, of how many.
    fn difference(&self, got: &[T]) -> (f64, [usize; 2]) {
        let rounding = match <T as Element>::DTYPE {
            Dtype::F32 => 2f64.powi(-24),
            Dtype::F16 => 2f64.powi(-11),
            _ => 2f64.powi(-8),
        };
        assert_eq!(got.len(), self.expected.len(), "{}", self.name);
        let sizes = self.sizes();
        let dims = self.peers_dims();
        let (mut worst, mut equal) = (0f64, 0);
        for (at, expected) in self.expected.iter().enumerate() {
            let at = at / self.head_dim * self.head_dim + dims[at % self.head_dim];
            let (size, angle) = sizes[at];
            let error = f64::from((got[at].widen() - expected.widen()).abs());
            worst = worst.max((error - angle) / (rounding * size));
            equal += usize::from(error == 0.0);
        }
        (worst, [equal, got.len()])
    }

    /// For each dim of a head as the peer has it, ours.
    fn peers_dims(&self) -> Vec<usize> {
        let mut dims: Vec<usize> = (0..self.head_dim).collect();
        if let Some((config, first)) = self.rotates {
            for (at, dim) in config.transformers_dims().into_iter().enumerate() {
                dims[first + at] = first + dim;
            }
        }
        dims
    }
}

/// Performs the step of a golden in one call: q in place, the others to caches. Returns the difference of
/// each stream.
fn differences<T: Element + Stock>(golden: &Golden) -> Vec<(String, (f64, [usize; 2]))> {
    let case = &golden.case;
    let model = ModelConfig::from_hf_config(&case["config"].to_string()).unwrap();
    let rope = model.rope_of_layer(golden.number("layer")).unwrap();
    assert_eq!(rope.is_some(), case["rotates"].as_bool().unwrap());
    let position_ids = golden.tensor::<i64>("position_ids");
    let tokens = position_ids.len();
    let latent = golden.has("latent");
    let head_dim = *golden.shape("q").last().unwrap();

    // Dims of the heads of a tensor, and how they look in its layout.
    let stream = |name: &str, given: &str, expected: &str, dims: std::ops::Range<usize>| {
        let shape = golden.shape(given);
        let whole = *shape.last().unwrap();
        let x: Vec<T> = (golden.tensor(given).chunks_exact(whole))
            .flat_map(|head| head[dims.clone()].to_vec())
            .collect();
        let heads = x.len() / tokens / dims.len();
        let layout = Layout::tokens(tokens, heads, dims.len())
            .with_strides(0, heads * whole, whole)
            .with_offset(dims.start);
        let stream = Stream {
            name: format!("{} {name}", golden.text("name")),
            heads,
            head_dim: dims.len(),
            x,
            expected: golden.find(expected).unwrap_or_default(),
            bias: golden.find(&format!("{name}_bias")),
            norm: Norm::read(&case[format!("{name}_norm")]),
            weight: golden.find(&format!("{name}_norm.weight")),
            beta: golden.find(&format!("{name}_norm.bias")),
            rotates: None,
            temperature: None,
            position_ids: &position_ids,
        };
        (stream, layout)
    };
    let (mut q, q_layout) = stream("q", "q", "q_attention", 0..head_dim);
    let [(mut k, k_layout), (v, v_layout)] = match latent {
        false => {
            let from = if golden.has("v") { "v" } else { "k" };
            assert!(golden.has("v") || !golden.has("v_cache") || case["v_from_k"] == true);
            [
                stream("k", "k", "k_cache", 0..head_dim),
                stream("v", from, "v_cache", 0..head_dim),
            ]
        }
        true => {
            let rank = *golden.shape("latent_cache").last().unwrap();
            let whole = *golden.shape("latent").last().unwrap();
            [
                stream("k_pe", "latent", "k_pe_cache", rank..whole),
                stream("latent", "latent", "latent_cache", 0..rank),
            ]
        }
    };
    // In latent attention the last of q's dims rotate.
    let first = rope.map_or(0, |rope| match latent {
        true => head_dim - rope.rotary_dim(),
        false => 0,
    });
    q.rotates = rope.map(|rope| (rope, first));
    k.rotates = rope.map(|rope| (rope, 0));
    q.temperature = (case["temperature"].as_object())
        .map(|t| ["attn_scale", "floor_scale"].map(|key| t[key].as_f64().unwrap()))
        .map(|[slope, interval]| (slope, interval));
    let stages = |stream: &Stream<T>| match rope {
        Some(_) => stream.stages(),
        None => stream.stages().without_rotation(),
    };

    let cache = |stream: &Stream<T>| CacheLayout::flat(tokens, stream.heads, stream.head_dim);
    let problem = Problem::new(<T as Element>::DTYPE)
        .q(q_layout.with_rotary_offset(first))
        .k_to_cache(k_layout)
        .v_to_cache(v_layout)
        .q_stages(stages(&q))
        .k_stages(stages(&k))
        .v_stages(v.stages())
        .cache(KvCacheLayout::separate(cache(&k), cache(&v)))
        .longer_buffers();
    // A layer that does not rotate is in a model that does.
    let rope = rope.or(model.rope().ok()).unwrap();
    let rotator = Host::new().rotator(&rope.rope().unwrap());
    let plan = rotator.plan(&problem).unwrap();
    let mut q_now = golden.tensor::<T>("q");
    let k_source = golden.tensor::<T>(if latent { "latent" } else { "k" });
    let v_source = golden.find::<T>("v").unwrap_or(k_source.clone());
    let [mut k_cache, mut v_cache] = [&k, &v].map(|stream| vec![T::default(); stream.x.len()]);
    let slots: Vec<i64> = (0..tokens as i64).collect();
    let step = HostStep::new(Positions::per_token(&position_ids))
        .q(&mut q_now)
        .k(&k_source)
        .v(&v_source)
        .k_cache(&mut k_cache[..])
        .v_cache(&mut v_cache[..])
        .slots(Slots::mapping(&slots))
        .q_weights(q.weights())
        .k_weights(k.weights())
        .v_weights(v.weights());
    assert_eq!(rotator.step(&plan, step), Ok(Stored::All));
    [(q, q_now), (k, k_cache), (v, v_cache)]
        .into_iter()
        .filter(|(stream, _)| !stream.expected.is_empty())
        .map(|(stream, got)| (stream.name.clone(), stream.difference(&got)))
        .collect()
}

#[test]
fn heads_are_those_of_transformers() {
    let mut seen = 0;
    for path in std::fs::read_dir(folder("transformers-fused")).unwrap() {
        let path = path.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap();
        let golden = Golden::read("transformers-fused", name);
        let differences = match golden.text("dtype") {
            "f32" => differences::<f32>(&golden),
            "f16" => differences::<f16>(&golden),
            "bf16" => differences::<bf16>(&golden),
            other => panic!("{other}"),
        };
        for (stream, (worst, equal)) in differences {
            println!(
                "{name} {stream}: {worst:.2} {:.3}",
                equal[0] as f64 / equal[1] as f64
            );
            // In f32: the order of sums, and 4 operations of the rotation and 2 of the norm that round.
            // In 16 bits each of these rounds in the peer, if it has the type; here the stages do.
            let most = if name.ends_with("_f32") { 6.0 } else { 4.0 };
            assert!(worst <= most, "{name}, {stream}: {worst} roundings");
            // Where the peer's tables are f32 and it rounds once after each stage, values are the same.
            let once = [
                "olmo2 q",
                "olmo2 k",
                "llama4_temperature q",
                "llama4_temperature_far q",
                "deepseek_v3 latent",
                "gemma4_sliding v",
                "gemma4_full v",
            ];
            if !name.ends_with("_f32") && once.contains(&&stream[..]) {
                assert!(
                    equal[0] as f64 >= 0.99 * equal[1] as f64,
                    "{name}, {stream}: {equal:?}"
                );
            }
        }
        seen += 1;
    }
    assert!(seen > 30);
}

/// MAX's rotation of packed qkv into pages of all layers, half of them keys and half values.
#[test]
fn a_paged_cache_of_all_layers_is_that_of_max() {
    for file in [
        "store_half_quarters",
        "store_half_theta",
        "store_interleaved_bf16_quarters",
        "store_interleaved_bf16_theta",
        "store_position_ids_bf16_quarters",
        "cached_keys_bf16_quarters",
    ] {
        let golden = Golden::read("max-append", file);
        match golden.text("dtype") {
            "float32" => check_max::<f32>(&golden, file),
            "bfloat16" => check_max::<bf16>(&golden, file),
            other => panic!("{other}"),
        }
    }
}

fn check_max<T: Element + Stock>(golden: &Golden, name: &str) {
    let [kv_heads, head_dim] = ["kv_heads", "head_dim"].map(|key| golden.number(key));
    let pairing = match golden.case["interleaved"].as_bool().unwrap() {
        true => "interleaved",
        false => "half_split",
    };
    let quarters = golden.text("angles") == "quarters";
    let mut rope = quarter_turns(head_dim / 2, pairing);
    if !quarters {
        let theta = golden.case["theta"].as_f64().unwrap();
        let frequencies = Frequencies::from_theta(theta, head_dim).unwrap();
        rope = Rope::new(frequencies, rope.pairing());
    }
    let [pages, _, layers, page_size, ..] = golden.shape("kv_blocks")[..] else {
        panic!("{name}");
    };
    let cache = CacheLayout::paged_nhd(pages, page_size, kv_heads, head_dim)
        .of_layer(layers, golden.number("layer"))
        .in_pairs_of_pages();
    let [tokens, heads, _] = golden.shape("q")[..] else {
        panic!("{name}");
    };
    let [lengths, row_offsets, table] =
        ["cache_lengths", "input_row_offsets", "lookup_table"].map(|n| golden.tensor::<i32>(n));
    let position_ids = golden.find::<i32>("position_ids");
    let positions = match &position_ids {
        Some(ids) => Positions::per_token(ids),
        None => Positions::start_per_sequence(&lengths),
    };
    let expected = golden.tensor::<T>("kv_blocks");
    let elsewhere = Layout::tokens(tokens, heads, head_dim);
    let problem = Problem::new(<T as Element>::DTYPE);
    let rotator = Host::new().rotator(&rope);
    let qkv = golden.tensor::<T>("qkv");
    let mut q = vec![T::default(); tokens * heads * head_dim];
    let step = HostStep::new(positions.cu_seqlens(&row_offsets))
        .slots(Slots::page_table(&table, &lengths));
    let mut got;
    if let Some(before) = golden.find::<T>("kv_blocks_before") {
        // Keys that are in the cache already.
        let mut keys = Vec::new();
        for (sequence, ends) in row_offsets.windows(2).enumerate() {
            for place in 0..(ends[1] - ends[0]) as usize {
                let place = lengths[sequence] as usize + place;
                let columns = table.len() / lengths.len();
                let page = table[sequence * columns + place / page_size] as usize;
                let [page_stride, slot_stride, _] = cache.0.strides();
                let at = cache.0.offset() + page * page_stride + place % page_size * slot_stride;
                keys.extend_from_slice(&before[at..][..kv_heads * head_dim]);
            }
        }
        let problem = problem
            .q((elsewhere, elsewhere))
            .k_to_cache(Layout::tokens(tokens, kv_heads, head_dim))
            .cache(KvCacheLayout::k(cache.0))
            .longer_buffers();
        let plan = rotator.plan(&problem).unwrap();
        got = before;
        let step = step.q((&qkv[..], &mut q)).k(&keys).k_cache(&mut got[..]);
        assert_eq!(rotator.step(&plan, step), Ok(Stored::All), "{name}");
    } else {
        let total = heads + 2 * kv_heads;
        let k = heads + kv_heads;
        let [q_window, k, v] = [0..heads, heads..k, k..total]
            .map(|range| Layout::packed_heads(1, tokens, total, head_dim, range));
        let problem = problem
            .q((q_window, elsewhere))
            .k_to_cache(k)
            .v_to_cache(v)
            .cache(KvCacheLayout::one_buffer(cache))
            .packed();
        let plan = rotator.plan(&problem).unwrap();
        let untouched = T::narrow(golden.case["untouched"].as_f64().unwrap() as f32);
        got = vec![untouched; expected.len()];
        let mut buffer = qkv.clone();
        let step = step
            .buffer(&mut buffer[..])
            .q_to(&mut q)
            .kv_cache(&mut got[..]);
        assert_eq!(rotator.step(&plan, step), Ok(Stored::All), "{name}");
        assert!(buffer == qkv, "{name}");
    }
    got.extend_from_slice(&q);
    let expected = [expected, golden.tensor::<T>("q")].concat();
    assert_eq!(got.len(), expected.len());
    // MAX's tables have the type, and each operation rounds to it.
    let most = match (quarters, <T as Element>::DTYPE) {
        (true, _) => 0.0,
        (false, Dtype::F32) => 3.0 * 2f32.powi(-24),
        (false, _) => 3.0 * 2f32.powi(-8),
    };
    for (at, (got, expected)) in got.iter().zip(&expected).enumerate() {
        let (got, expected) = (got.widen(), expected.widen());
        let size = got.abs().max(expected.abs()).max(1.0);
        assert!(
            (got - expected).abs() <= most * size,
            "{name}, {at}: {got} {expected}"
        );
    }
}
