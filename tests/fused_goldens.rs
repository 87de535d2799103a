//! What lies between projection and attention, against what other implementations computed:
//! `tests/goldens/torch-append` and `transformers-fused`.

use std::path::{Path, PathBuf};

use phasor::config::{ModelConfig, RopeConfig};
use phasor::half::{bf16, f16};
use phasor::norm::HeadNorm;
use phasor::{
    CacheLayout, Dtype, Element, Frequencies, Host, HostKvCache, KvCacheLayout, Layout, Pairing,
    Positions, Problem, Rope, Slots, Stored,
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

    fn cache(&self, layout: &str) -> KvCacheLayout {
        let [p, s, h, d] = [self.pages, self.page_size, self.kv_heads, self.head_dim];
        let nhd = CacheLayout::paged_nhd(p, s, h, d);
        let hnd = CacheLayout::paged_hnd(p, s, h, d);
        let sequences = self.cache_lengths.len();
        match layout {
            "nhd" => KvCacheLayout::separate(nhd, nhd),
            "hnd" => KvCacheLayout::separate(hnd, hnd),
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
            "bshd" => {
                let cache = CacheLayout::bshd(sequences, s, h, d);
                KvCacheLayout::separate(cache, cache)
            }
            "bhsd" => {
                let cache = CacheLayout::bhsd(sequences, s, h, d);
                KvCacheLayout::separate(cache, cache)
            }
            other => panic!("{other}"),
        }
    }
}

/// Performs a step from packed qkv, and compares q and the caches, every bit of them.
fn check_caches(batch: &Batch, name: &str, cache: KvCacheLayout, parts: &[&Golden]) {
    let case = &parts[0].case;
    let slots = case["slots"].as_str().unwrap();
    let dense = slots == "sequences";
    let [q, k, v] = batch.layouts(if dense { batch.cache_lengths.len() } else { 1 });
    let rotator = Host::new().rotator(&batch.rope);
    let plan = rotator
        .plan(
            &Problem::new(Dtype::Bf16)
                .q(q)
                .k_to_cache(k)
                .v_to_cache(v)
                .cache(cache)
                .one_buffer(),
        )
        .unwrap();
    let expected: Vec<Vec<bf16>> = ["k", "v", "kv"]
        .iter()
        .filter_map(|tensor| parts.iter().find_map(|golden| golden.find(tensor)))
        .collect();
    let untouched = bf16::from_f64(case["untouched"].as_f64().unwrap());
    let mut caches: Vec<Vec<bf16>> = (expected.iter())
        .map(|cache| vec![untouched; cache.len()])
        .collect();
    let operand = match &mut caches[..] {
        [k, v] => HostKvCache::Separate {
            k: Some(k),
            v: Some(v),
        },
        [kv] => HostKvCache::OneBuffer(kv),
        _ => panic!("{name}"),
    };
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
    let mut buffer = batch.qkv.clone();
    let stored = rotator
        .append_one_buffer(&plan, &mut buffer, operand, positions, slots)
        .unwrap();
    assert_eq!(stored, Stored::All, "{name}");
    for (got, expected) in caches.iter().zip(&expected) {
        assert_bits(got, expected, name);
    }
    let mut expected = batch.qkv.clone();
    let row = batch.qkv.len() / batch.tokens();
    let width = batch.heads * batch.head_dim;
    for token in 0..rotated_tokens {
        let q = &batch.q_rotated[token * width..][..width];
        expected[token * row..][..width].copy_from_slice(q);
    }
    assert_bits(&buffer, &expected, name);
}

#[track_caller]
fn assert_bits(got: &[bf16], expected: &[bf16], name: &str) {
    assert_eq!(got.len(), expected.len(), "{name}");
    let differ = |(_, (got, expected)): &(_, (&bf16, &bf16))| got.to_bits() != expected.to_bits();
    if let Some((at, (got, expected))) = got.iter().zip(expected).enumerate().find(differ) {
        panic!("{name}: element {at} is {got}, not {expected}");
    }
}

#[test]
fn caches_are_those_of_engines() {
    let serving = Batch::read("serving");
    let [k, v] = ["k", "v"].map(|n| Golden::read("torch-append", &format!("serving_nhd_{n}")));
    check_caches(&serving, "serving", serving.cache("nhd"), &[&k, &v]);

    for (batch, names) in [
        (
            "ragged",
            &[
                "nhd",
                "hnd",
                "nhd_in_turn",
                "hnd_in_pairs",
                "nhd_layer_1_of_2_in_pairs",
                "packed_and_transposed",
                "hnd_side_by_side",
                "skips",
            ][..],
        ),
        ("dense", &["bshd", "bhsd"]),
    ] {
        let read = Batch::read(batch);
        for name in names {
            let golden = Golden::read("torch-append", &format!("{batch}_{name}"));
            let cache = read.cache(golden.text("layout"));
            check_caches(&read, name, cache, &[&golden]);
        }
    }
}

/// SGLang's pool, `[slots, heads, head_dim]`, is the memory of the same slots in pages.
#[test]
fn a_pool_of_slots_is_one_page() {
    let batch = Batch::read("ragged");
    let golden = Golden::read("torch-append", "ragged_skips");
    let pool = CacheLayout::flat(
        batch.pages * batch.page_size,
        batch.kv_heads,
        batch.head_dim,
    );
    check_caches(
        &batch,
        "flat",
        KvCacheLayout::separate(pool, pool),
        &[&golden],
    );
}

#[test]
fn a_latent_cache_is_deepseeks() {
    let input = Golden::read("torch-append", "latent_input");
    let golden = Golden::read("torch-append", "latent");
    let tokens = input.tensor::<i64>("position_ids").len();
    let cache = CacheLayout::paged_nhd(
        input.number("pages"),
        input.number("page_size"),
        1,
        512 + 64,
    );
    let rotator = Host::new().rotator(&quarter_turns(32, input.text("pairing")));
    let plan = rotator
        .plan(
            &Problem::new(Dtype::Bf16)
                .q(Layout::tokens(tokens, 2, 192).with_rotary_offset(128))
                .k_to_cache(Layout::tokens(tokens, 1, 64))
                .v_to_cache(Layout::tokens(tokens, 1, 512))
                .cache(KvCacheLayout::one_buffer((
                    cache.dims(512..576),
                    cache.dims(0..512),
                ))),
        )
        .unwrap();
    let [mut q, k_pe, latent] = ["q", "k_pe", "latent"].map(|name| input.tensor::<bf16>(name));
    let expected = golden.tensor::<bf16>("kv");
    let untouched = bf16::from_f64(golden.case["untouched"].as_f64().unwrap());
    let mut kv = vec![untouched; expected.len()];
    let (positions, slots) = (
        input.tensor::<i64>("position_ids"),
        input.tensor::<i64>("slot_mapping"),
    );
    let stored = rotator
        .append(
            &plan,
            Some((&mut q).into()),
            Some((&k_pe).into()),
            Some((&latent).into()),
            HostKvCache::OneBuffer(&mut kv),
            Positions::per_token(&positions),
            Slots::mapping(&slots),
        )
        .unwrap();
    assert_eq!(stored, Stored::All);
    assert_bits(&kv, &expected, "the cache");
    assert_bits(&q, &golden.tensor("q_rotated"), "q");
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

    fn phasor(&self) -> HeadNorm {
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
        norm
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
    /// What the stages make of it, one after the other.
    fn stages(&self) -> Vec<T> {
        let row = self.heads * self.head_dim;
        let mut x = self.x.clone();
        for (at, x) in x.iter_mut().enumerate() {
            if let Some(bias) = &self.bias {
                *x = T::narrow(x.widen() + bias[at % row].widen());
            }
        }
        let norm = |x: &mut [T], after: bool| {
            let Some(norm) = self.norm.filter(|norm| norm.after_rotation == after) else {
                return;
            };
            for token in x.chunks_exact_mut(row) {
                (norm.phasor())
                    .apply(
                        token,
                        self.head_dim,
                        self.weight.as_deref(),
                        self.beta.as_deref(),
                    )
                    .unwrap();
            }
        };
        norm(&mut x, false);
        if let Some((config, first)) = self.rotates {
            let layout = Layout::tokens(self.position_ids.len(), self.heads, self.head_dim);
            let rotator = Host::new().rotator(&config.rope().unwrap());
            let plan = rotator
                .plan(&Problem::new(<T as Element>::DTYPE).q(layout.with_rotary_offset(first)))
                .unwrap();
            let positions = Positions::per_token(self.position_ids);
            rotator
                .rotate(&plan, Some((&mut x[..]).into()), None, positions)
                .unwrap();
        }
        norm(&mut x, true);
        if let Some((slope, interval)) = self.temperature {
            for (token, &position) in x.chunks_exact_mut(row).zip(self.position_ids) {
                let n = ((position + 1) as f64 / interval).floor();
                let factor = (1.0 + slope * n.ln_1p()) as f32;
                token
                    .iter_mut()
                    .for_each(|x| *x = T::narrow(x.widen() * factor));
            }
        }
        x
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
    fn difference(&self) -> (f64, [usize; 2]) {
        let rounding = match <T as Element>::DTYPE {
            Dtype::F32 => 2f64.powi(-24),
            Dtype::F16 => 2f64.powi(-11),
            _ => 2f64.powi(-8),
        };
        let got = self.stages();
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

/// The largest difference of each stream of a golden.
fn differences<T: Element + Stock>(golden: &Golden) -> Vec<(String, (f64, [usize; 2]))> {
    let case = &golden.case;
    let model = ModelConfig::from_hf_config(&case["config"].to_string()).unwrap();
    let rope = model.rope_of_layer(golden.number("layer")).unwrap();
    assert_eq!(rope.is_some(), case["rotates"].as_bool().unwrap());
    let position_ids = golden.tensor::<i64>("position_ids");
    let tokens = position_ids.len();
    let temperature = (case["temperature"].as_object()).map(|t| {
        (
            t["attn_scale"].as_f64().unwrap(),
            t["floor_scale"].as_f64().unwrap(),
        )
    });
    let v_from_k = case["v_from_k"].as_bool().unwrap();

    let stream = |name: &str, given: &str, expected: &str, dims: std::ops::Range<usize>| {
        // Parts of heads of one stream.
        let part = |x: Vec<T>, whole: usize| -> Vec<T> {
            let heads = x.chunks_exact(whole);
            heads
                .flat_map(|head| &head[dims.clone()])
                .copied()
                .collect()
        };
        let shape = golden.shape(given);
        let whole = *shape.last().unwrap();
        let x = part(golden.tensor(given), whole);
        Stream {
            name: format!("{} {name}", golden.text("name")),
            heads: x.len() / tokens / dims.len(),
            head_dim: dims.len(),
            x,
            expected: golden.tensor(expected),
            bias: golden.find(&format!("{name}_bias")),
            norm: Norm::read(&case[format!("{name}_norm")]),
            weight: golden.find(&format!("{name}_norm.weight")),
            beta: golden.find(&format!("{name}_norm.bias")),
            rotates: None,
            temperature: None,
            position_ids: &position_ids,
        }
    };
    let head_dim = *golden.shape("q").last().unwrap();
    let mut streams = vec![stream("q", "q", "q_attention", 0..head_dim)];
    // The rotated part of q's heads in latent attention is the last.
    let rotary_dim = rope.map_or(0, RopeConfig::rotary_dim);
    let latent = golden.has("latent");
    let first = if latent { head_dim - rotary_dim } else { 0 };
    streams[0].rotates = rope.map(|rope| (rope, first));
    streams[0].temperature = temperature;
    if latent {
        let rank = *golden.shape("latent_cache").last().unwrap();
        streams.push(stream("latent", "latent", "latent_cache", 0..rank));
        let mut k_pe = stream("k_pe", "latent", "k_pe_cache", rank..rank + rotary_dim);
        k_pe.rotates = rope.map(|rope| (rope, 0));
        streams.push(k_pe);
    } else {
        let mut k = stream("k", "k", "k_cache", 0..head_dim);
        k.rotates = rope.map(|rope| (rope, first));
        streams.push(k);
        if golden.has("v_cache") {
            let from = if v_from_k { "k" } else { "v" };
            streams.push(stream("v", from, "v_cache", 0..head_dim));
        }
    }
    (streams.iter())
        .map(|stream| (stream.name.clone(), stream.difference()))
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
            // In f32: the order of sums, and 4 operations of the rotation and 2 of the norm that round.
            // In 16 bits each of these rounds in the peer, if it has the type; here the stages do.
            let most = if name.ends_with("_f32") { 6.0 } else { 4.0 };
            assert!(worst <= most, "{name}, {stream}: {worst} roundings");
            // Where the peer's tables are f32 and it rounds once after each stage, values are the same.
            let once = [
                "olmo2 q",
                "olmo2 k",
                "llama4 q",
                "llama4 k",
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
    let [heads, kv_heads, head_dim] =
        ["heads", "kv_heads", "head_dim"].map(|key| golden.number(key));
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
    let [tokens, ..] = golden.shape("qkv")[..] else {
        panic!("{name}");
    };
    let total = heads + 2 * kv_heads;
    let k = heads + kv_heads;
    let [q, k, v] = [0..heads, heads..k, k..total]
        .map(|range| Layout::packed_heads(1, tokens, total, head_dim, range));
    let problem = Problem::new(<T as Element>::DTYPE)
        .q(q)
        .k_to_cache(k)
        .v_to_cache(v)
        .cache(KvCacheLayout::one_buffer(cache))
        .one_buffer();
    let rotator = Host::new().rotator(&rope);
    let plan = rotator.plan(&problem).unwrap();

    let [lengths, row_offsets, table] =
        ["cache_lengths", "input_row_offsets", "lookup_table"].map(|n| golden.tensor::<i32>(n));
    let position_ids = golden.find::<i32>("position_ids");
    let positions = match &position_ids {
        Some(ids) => Positions::per_token(ids),
        None => Positions::start_per_sequence(&lengths),
    };
    let expected = golden.tensor::<T>("kv_blocks");
    let untouched = T::narrow(golden.case["untouched"].as_f64().unwrap() as f32);
    let mut got = vec![untouched; expected.len()];
    let mut buffer = golden.tensor::<T>("qkv");
    let stored = rotator
        .append_one_buffer(
            &plan,
            &mut buffer,
            HostKvCache::OneBuffer(&mut got),
            positions.cu_seqlens(&row_offsets),
            Slots::page_table(&table, &lengths),
        )
        .unwrap();
    assert_eq!(stored, Stored::All, "{name}");
    for row in buffer.chunks_exact(total * head_dim) {
        got.extend_from_slice(&row[..heads * head_dim]);
    }
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
