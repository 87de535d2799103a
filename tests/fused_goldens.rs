//! What lies between projection and attention, against what other implementations computed:
//! `tests/goldens/torch-append` and `transformers-fused`.

use std::path::Path;

use phasor::half::bf16;
use phasor::{
    CacheLayout, Dtype, Frequencies, Host, HostKvCache, KvCacheLayout, Layout, Pairing, Positions,
    Problem, Rope, Slots, Stored,
};
use safetensors::{Dtype as FileDtype, SafeTensors};
use serde_json::Value;

/// A type of the files' tensors.
trait Stock: Copy + PartialEq + std::fmt::Debug {
    const DTYPE: FileDtype;
    fn of(bytes: &[u8]) -> Self;
}

macro_rules! stock {
    ($($type:ty: $dtype:ident),*) => {$(
        impl Stock for $type {
            const DTYPE: FileDtype = FileDtype::$dtype;
            fn of(bytes: &[u8]) -> Self {
                Self::from_le_bytes(bytes.try_into().unwrap())
            }
        }
    )*};
}
stock!(bf16: BF16, i32: I32, i64: I64);

struct Golden {
    case: Value,
    bytes: Vec<u8>,
}

impl Golden {
    fn read(folder: &str, name: &str) -> Self {
        let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens");
        let path = goldens.join(folder).join(format!("{name}.safetensors"));
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
        assert_eq!(tensor.dtype(), T::DTYPE, "{name}");
        let values = tensor.data().chunks_exact(size_of::<T>());
        Some(values.map(T::of).collect())
    }

    fn tensor<T: Stock>(&self, name: &str) -> Vec<T> {
        self.find(name).unwrap_or_else(|| panic!("{name}"))
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
