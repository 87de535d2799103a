//! MAX's layers: what their parameters mean, and the errors of their constructors. Layers over several
//! devices, against the whole.

use phasor_attention::max::{
    Arguments, AttentionWithRope, AttentionWithRopeNoOpaque, DataParallelAttentionWithRope,
    Float8Config, Float8InputScaleSpec, Float8ScaleGranularity, Float8ScaleOrigin, Float8Tensors,
    Float8WeightScaleSpec, GGUFQAttentionWithRope, GPTQAttentionWithRope, KVCacheParams,
    MHAMaskVariant, PagedCacheValues, QuantizationConfig, StateDict,
    TensorParallelAttentionWithRope, distribute_value,
};
use phasor_attention::phasor::half::f16;
use phasor_attention::phasor::norm::HeadNorm;
use phasor_attention::phasor::quantize::{e4m3_from_f32, e4m3_to_f32};
use phasor_attention::phasor::{CacheLayout, Dtype, Frequencies, Host, Pairing, Rope, Stages};
use phasor_attention::{
    AttentionConfig, AttentionError, AttentionLayer, DataParallelAttention, DeviceBatch,
    Fp8Activation, Fp8Linear, Fp8WeightScale, Fp8Weights, GgmlLinear, GgmlType, GgmlWeights,
    GptqFormat, GptqTensors, HeadWeights, KvCacheMut, LayerWeights, PagedKvCache, Projection,
    QkvProjection, RaggedBatch, ShardingStrategy, Workspace,
};
use std::sync::Arc;

mod support;
use support::{Golden, Random, near, same};

fn rope(head_dim: usize, pairing: Pairing) -> Rope {
    Rope::new(
        Frequencies::from_theta(10_000.0, head_dim).unwrap(),
        pairing,
    )
}

const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 16;
const HIDDEN: usize = 64;
/// A prompt of two sequences over 6 pages of 4 slots.
const OFFSETS: [u32; 3] = [0, 9, 14];
const LENGTHS: [u32; 2] = [0, 3];
const PAGES: [u32; 6] = [5, 0, 3, 1, 2, 4];
const TOKENS: usize = 14;

fn arguments(rope: &Rope) -> Arguments<'_> {
    let kv_params = KVCacheParams {
        page_size: 4,
        ..KVCacheParams::new(KV_HEADS, HEAD_DIM)
    };
    Arguments::new(rope, HEADS, KV_HEADS, HIDDEN, kv_params)
}

fn state() -> StateDict<Vec<f32>> {
    let mut random = Random::new(4);
    let (q, kv) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
    let mut state = StateDict::new();
    for (name, rows) in [("q", q), ("k", kv), ("v", kv), ("o", q)] {
        state.insert(
            format!("{name}_proj.weight"),
            random.values(rows * HIDDEN, 0.3),
        );
        state.insert(format!("{name}_proj.bias"), random.values(rows, 0.5));
        state.insert(format!("{name}_norm.weight"), random.values(HEAD_DIM, 1.5));
    }
    for part in ["weight", "bias"] {
        let parts = ["q", "k", "v"].map(|name| state[&format!("{name}_proj.{part}")].clone());
        state.insert(format!("qkv_proj.{part}"), parts.concat());
    }
    state
}

fn blocks(kv_heads: usize) -> Vec<f32> {
    Random::new(7).values(6 * 2 * 2 * 4 * kv_heads * HEAD_DIM, 1.0)
}

fn cache(blocks: &mut [f32], kv_heads: usize) -> PagedCacheValues<'_, f32> {
    PagedCacheValues {
        kv_blocks: blocks,
        shape: [6, 2, 2, 4, kv_heads, HEAD_DIM],
        cache_lengths: &LENGTHS,
        lookup_table: &PAGES,
    }
}

fn input() -> Vec<f32> {
    Random::new(5).values(TOKENS * HIDDEN, 1.0)
}

fn call(layer: &AttentionWithRope<f32>) -> Vec<f32> {
    let mut blocks = blocks(KV_HEADS);
    let mut out = vec![0.0; TOKENS * HIDDEN];
    layer
        .call(
            1,
            &input(),
            &mut cache(&mut blocks, KV_HEADS),
            &OFFSETS,
            &mut out,
        )
        .unwrap();
    out
}

#[test]
fn stacked_weights_are_the_same_layer() {
    let rope = rope(HEAD_DIM, Pairing::HalfSplit);
    let mut given = arguments(&rope);
    given.has_bias = true;
    given.use_qk_norm = true;
    let layer =
        |given: &Arguments<'_>| AttentionWithRope::new(given, &state(), &Host::new()).unwrap();
    let apart = layer(&given);
    given.stacked_qkv = true;
    let stacked = layer(&given);
    near(&call(&apart), &call(&stacked), 1e-6);
    same(&apart.wqkv(), &state()["qkv_proj.weight"]);
    same(&stacked.wqkv(), &state()["qkv_proj.weight"]);
    same(&apart.wqkv_bias().unwrap(), &state()["qkv_proj.bias"]);
    same(&stacked.wqkv_bias().unwrap(), &state()["qkv_proj.bias"]);
    (given.stacked_qkv, given.has_bias, given.clip_qkv) = (false, false, Some(0.1));
    let clipped = layer(&given);
    assert_eq!(clipped.wqkv_bias(), None);
    let expected: Vec<f32> = state()["qkv_proj.weight"]
        .iter()
        .map(|w| w.clamp(-0.1, 0.1))
        .collect();
    same(&clipped.wqkv(), &expected);
    given.clip_qkv = Some(0.0);
    same(&layer(&given).wqkv(), &state()["qkv_proj.weight"]);
}

#[test]
fn shards_sum_to_the_layer() {
    let rope = rope(HEAD_DIM, Pairing::Interleaved);
    for stacked in [false, true] {
        let mut given = arguments(&rope);
        (given.has_bias, given.use_qk_norm, given.stacked_qkv) = (true, true, stacked);
        given.mask_variant = MHAMaskVariant::SlidingWindowCausalMask;
        given.sliding_window = Some(5);
        let mut whole = AttentionWithRope::new(&given, &state(), &Host::new()).unwrap();
        let expected = call(&whole);
        assert!(matches!(whole.shard(), Err(AttentionError::Weights { .. })));
        whole.set_sharding_strategy(ShardingStrategy::Replicate(3));
        let replicas = whole.shard().unwrap();
        assert_eq!(replicas.len(), 3);
        same(&call(&replicas[2]), &expected);

        whole.set_sharding_strategy(ShardingStrategy::TensorParallel(2));
        let shards = whole.shard().unwrap();
        let mut sum = vec![0.0; TOKENS * HIDDEN];
        let all = blocks(KV_HEADS);
        for (device, shard) in shards.iter().enumerate() {
            assert_eq!(shard.layer().config().num_attention_heads, 2);
            let mut of_head: Vec<f32> = all
                .chunks(KV_HEADS * HEAD_DIM)
                .flat_map(|slot| slot[device * HEAD_DIM..][..HEAD_DIM].to_vec())
                .collect();
            let mut out = vec![0.0; TOKENS * HIDDEN];
            shard
                .call(1, &input(), &mut cache(&mut of_head, 1), &OFFSETS, &mut out)
                .unwrap();
            sum.iter_mut().zip(&out).for_each(|(sum, x)| *sum += x);
        }
        near(&sum, &expected, 1e-6);

        // The same in one call.
        let parallel = TensorParallelAttentionWithRope::new(&whole, 2).unwrap();
        let parts = [0, 1].map(|device| -> Vec<f32> {
            all.chunks(KV_HEADS * HEAD_DIM)
                .flat_map(|slot| slot[device * HEAD_DIM..][..HEAD_DIM].to_vec())
                .collect()
        });
        let [mut a, mut b] = parts.clone();
        let mut outs = [vec![0.0; TOKENS * HIDDEN], vec![0.0; TOKENS * HIDDEN]];
        let [first, second] = &mut outs;
        let mut caches = [cache(&mut a, 1), cache(&mut b, 1)];
        let mut slices = [&mut first[..], &mut second[..]];
        parallel
            .call(1, &input(), &mut caches, &OFFSETS, &mut slices)
            .unwrap();
        same(&outs[0], &outs[1]);
        same(&outs[0], &sum);
        // A device too few, or an output too short: nothing is written.
        let [mut a, mut b] = parts.clone();
        let [first, second] = &mut outs;
        first.fill(-7.5);
        second.fill(-7.5);
        let short = TOKENS * HIDDEN - 1;
        let mut slices = [&mut first[..], &mut second[..short]];
        let mut caches = [cache(&mut a, 1), cache(&mut b, 1)];
        assert!(
            parallel
                .call(1, &input(), &mut caches[..1], &OFFSETS, &mut slices)
                .is_err()
        );
        assert!(
            parallel
                .call(1, &input(), &mut caches, &OFFSETS, &mut slices)
                .is_err()
        );
        assert!(
            parallel
                .call(1, &input(), &mut [], &OFFSETS, &mut slices)
                .is_err()
        );
        assert!(outs.iter().flatten().all(|&x| x == -7.5));
        assert_eq!([a, b], parts);
    }
}

#[test]
fn heads_that_do_not_divide_are_refused() {
    let rope = rope(HEAD_DIM, Pairing::Interleaved);
    let whole = AttentionWithRope::new(&arguments(&rope), &state(), &Host::new()).unwrap();
    let with = |strategy| {
        let mut whole = whole.clone();
        whole.set_sharding_strategy(strategy);
        whole.shard().map(|shards| shards.len())
    };
    use AttentionError::*;
    assert_eq!(with(ShardingStrategy::TensorParallel(1)), Ok(1));
    assert!(matches!(
        with(ShardingStrategy::TensorParallel(3)),
        Err(Value {
            what: "num_attention_heads",
            value: 4,
            ..
        })
    ));
    assert!(matches!(
        with(ShardingStrategy::TensorParallel(4)),
        Err(Value {
            what: "num_key_value_heads",
            value: 2,
            ..
        })
    ));
    assert!(matches!(
        with(ShardingStrategy::TensorParallel(0)),
        Err(Value { .. })
    ));
    assert!(matches!(
        with(ShardingStrategy::Replicate(0)),
        Err(Value { .. })
    ));
    // A norm across heads is one of all heads.
    let mut config = AttentionConfig::new(4, 2, 2, 2);
    config.k_stages = Stages::new().norm(HeadNorm::rms(1e-6).across_heads());
    let weight = |_: usize| {
        let weights = phasor_attention::DenseWeights::new(vec![0.0f32; 16], 4, 4);
        Arc::new(weights.unwrap()) as Arc<dyn phasor_attention::Weights>
    };
    let weights: LayerWeights<f32> = LayerWeights {
        q: weight(0),
        k: weight(1),
        v: weight(2),
        o: weight(3),
        heads: Default::default(),
        activations: [None; 4],
    };
    assert!(
        weights
            .shard(&config, ShardingStrategy::Replicate(2))
            .is_ok()
    );
    assert!(matches!(
        weights
            .shard(&config, ShardingStrategy::TensorParallel(2))
            .map(|shards| shards.len()),
        Err(Weights { .. })
    ));
}

#[test]
fn data_parallel_devices_have_batches_of_their_own() {
    let rope = rope(HEAD_DIM, Pairing::HalfSplit);
    let whole = AttentionWithRope::new(&arguments(&rope), &state(), &Host::new()).unwrap();
    let layer = whole.layer();
    let parallel = DataParallelAttention::new(layer, 2).unwrap();
    assert!(DataParallelAttention::new(layer, 0).is_err());
    let x = input();
    let mut workspace = Workspace::default();
    let cache = || PagedKvCache::<f32>::new(3, 1, 4, KV_HEADS, HEAD_DIM).unwrap();
    // 5 tokens, and none.
    let (offsets, none, table) = ([0u32, 5], [0u32, 0], [2u32, 1, 0]);
    let lengths = [0u32];
    let mut expected = vec![0.0; 5 * HIDDEN];
    let batch = RaggedBatch::new(&offsets, &lengths, &table);
    let mut alone = cache();
    layer
        .forward(
            &x[..5 * HIDDEN],
            &mut alone.layer(0).unwrap(),
            &batch,
            &mut workspace,
            &mut expected,
        )
        .unwrap();
    let mut caches = [cache(), cache()];
    let [a, b] = &mut caches;
    let (mut a, mut b) = (a.layer(0).unwrap(), b.layer(0).unwrap());
    let mut out = vec![0.0; 5 * HIDDEN];
    let mut batches = [
        DeviceBatch {
            x: &x[..5 * HIDDEN],
            cache: &mut a,
            batch,
            out: &mut out,
        },
        DeviceBatch {
            x: &[],
            cache: &mut b,
            batch: RaggedBatch::new(&none, &lengths, &table),
            out: &mut [],
        },
    ];
    assert!(parallel.forward(&mut batches[..1], &mut workspace).is_err());
    parallel.forward(&mut batches, &mut workspace).unwrap();
    same(&out, &expected);
    same(caches[0].elements(), alone.elements());

    // By MAX's name, both with tokens.
    let parallel = DataParallelAttentionWithRope::new(&whole, 2).unwrap();
    assert!(DataParallelAttentionWithRope::new(&whole, 0).is_err());
    let mut turned = x.clone();
    turned.rotate_right(HIDDEN);
    let xs = [&x[..], &turned[..]];
    let mut memory = distribute_value(&blocks(KV_HEADS), 2);
    let mut outs = distribute_value(&vec![-7.5; TOKENS * HIDDEN], 2);
    let mut run = |layer_idx, xs: &[&[f32]], offsets: &[&[u32]], devices: usize| {
        let mut caches: Vec<_> = memory
            .iter_mut()
            .map(|blocks| self::cache(blocks, KV_HEADS))
            .collect();
        let mut outs: Vec<_> = outs.iter_mut().map(|out| &mut out[..]).collect();
        let result = parallel.call(
            layer_idx,
            xs,
            &mut caches[..devices],
            offsets,
            &mut outs[..],
        );
        (result, outs.concat())
    };
    let offsets = [&OFFSETS[..]; 2];
    for (result, out) in [
        run(1, &xs[..1], &offsets, 2),
        run(1, &xs, &offsets[..1], 2),
        run(1, &xs, &offsets, 1),
        run(2, &xs, &offsets, 2),
        run(1, &[&x[..], &turned[1..]], &offsets, 2),
    ] {
        assert!(result.is_err());
        assert!(out.iter().all(|&x| x == -7.5));
    }
    let (result, out) = run(1, &xs, &offsets, 2);
    result.unwrap();
    same(&out[..TOKENS * HIDDEN], &call(&whole));
    assert!(out[..TOKENS * HIDDEN] != out[TOKENS * HIDDEN..]);
}

#[test]
fn constructors_refuse_what_max_refuses() {
    let rope = rope(HEAD_DIM, Pairing::Interleaved);
    use AttentionError::*;
    let dense = |change: &dyn Fn(&mut Arguments<'_>)| {
        let mut given = arguments(&rope);
        change(&mut given);
        AttentionWithRope::new(&given, &state(), &Host::new()).map(|_| ())
    };
    assert_eq!(dense(&|_| {}), Ok(()));
    let both = |a: &mut Arguments<'_>| (a.stacked_qkv, a.clip_qkv) = (true, Some(1.0));
    assert!(matches!(
        dense(&|a| both(a)),
        Err(Weights {
            what: "clip_qkv",
            ..
        })
    ));
    let window = |a: &mut Arguments<'_>| a.mask_variant = MHAMaskVariant::SlidingWindowCausalMask;
    assert!(matches!(
        dense(&|a| window(a)),
        Err(Value {
            what: "sliding_window",
            ..
        })
    ));
    assert!(matches!(
        dense(&|a| a.hidden_size = 63),
        Err(Mismatch { .. })
    ));
    assert!(matches!(
        dense(&|a| a.num_attention_heads = 3),
        Err(Mismatch { .. })
    ));
    let mut without = state();
    without.remove("o_proj.weight");
    assert!(matches!(
        AttentionWithRope::new(&arguments(&rope), &without, &Host::new()).map(|_| ()),
        Err(NoWeight { name }) if name == "o_proj.weight"
    ));

    let no_opaque = |change: &dyn Fn(&mut Arguments<'_>)| {
        let mut given = arguments(&rope);
        change(&mut given);
        AttentionWithRopeNoOpaque::new(&given, &state(), &Host::new()).map(|_| ())
    };
    assert_eq!(no_opaque(&|_| {}), Ok(()));
    assert!(matches!(
        no_opaque(&|a| a.kv_params.n_kv_heads = 1),
        Err(Mismatch { .. })
    ));
    assert!(matches!(
        no_opaque(&|a| a.has_bias = true),
        Err(Weights {
            what: "has_bias",
            ..
        })
    ));

    let bytes = |rows: usize| (GgmlType::Q8_0, vec![0u8; rows * 2 * 34]);
    let names = [("q", 64), ("k", 32), ("v", 32), ("o", 64)];
    let gguf_state: StateDict<_> = names
        .map(|(name, rows)| (format!("{name}_proj.weight"), bytes(rows)))
        .into();
    let gguf = |change: &dyn Fn(&mut Arguments<'_>), state: &StateDict<_>| {
        let mut given = arguments(&rope);
        change(&mut given);
        GGUFQAttentionWithRope::new(&given, state, &Host::new()).map(|_| ())
    };
    assert_eq!(gguf(&|_| {}, &gguf_state), Ok(()));
    let refused = |change: &dyn Fn(&mut Arguments<'_>)| gguf(change, &gguf_state).unwrap_err();
    assert!(matches!(
        refused(&|a| a.has_bias = true),
        Weights {
            what: "has_bias",
            ..
        }
    ));
    assert!(matches!(
        refused(&|a| a.clip_qkv = Some(0.0)),
        Weights {
            what: "clip_qkv",
            ..
        }
    ));
    assert!(matches!(
        refused(&|a| a.use_qk_norm = true),
        Weights {
            what: "use_qk_norm",
            ..
        }
    ));
    let mut other = gguf_state.clone();
    other.get_mut("k_proj.weight").unwrap().0 = GgmlType::Q4_0;
    assert!(matches!(gguf(&|_| {}, &other), Err(Mismatch { .. })));

    let tensors = |out: usize| GptqTensors {
        qweight: vec![0; 8 * out],
        scales: vec![f16::ONE; 2 * out],
        qzeros: vec![0; 2 * out / 8],
        g_idx: vec![],
    };
    let gptq_state: StateDict<_> = names
        .map(|(name, rows)| (format!("{name}_proj"), tensors(rows)))
        .into();
    let good = QuantizationConfig {
        quant_method: "gptq".into(),
        bits: 4,
        group_size: Some(32),
        desc_act: false,
        sym: true,
        format: GptqFormat::V1,
    };
    let gptq = |config: &QuantizationConfig, change: &dyn Fn(&mut Arguments<'_>)| {
        let mut given = arguments(&rope);
        change(&mut given);
        GPTQAttentionWithRope::<f32>::new(config, &given, &gptq_state, &Host::new()).map(|_| ())
    };
    assert_eq!(gptq(&good, &|_| {}), Ok(()));
    assert!(matches!(
        gptq(&good, &|a| a.has_bias = true),
        Err(Weights { .. })
    ));
    let config = QuantizationConfig {
        bits: 8,
        ..good.clone()
    };
    assert!(matches!(
        gptq(&config, &|_| {}),
        Err(Value {
            what: "bits",
            value: 8,
            ..
        })
    ));
    let config = QuantizationConfig {
        quant_method: "awq".into(),
        ..good.clone()
    };
    assert!(matches!(
        gptq(&config, &|_| {}),
        Err(Weights {
            what: "quant_method",
            ..
        })
    ));
    let config = QuantizationConfig {
        group_size: Some(64),
        ..good
    };
    assert!(matches!(gptq(&config, &|_| {}), Err(Mismatch { .. })));
}

#[test]
fn calls_refuse_other_caches() {
    let rope = rope(HEAD_DIM, Pairing::Interleaved);
    let layer = AttentionWithRope::new(&arguments(&rope), &state(), &Host::new()).unwrap();
    let with = |layer_idx, change: &dyn Fn(&mut PagedCacheValues<'_, f32>)| {
        let before = blocks(KV_HEADS);
        let (mut blocks, mut out) = (before.clone(), vec![-7.5; TOKENS * HIDDEN]);
        let mut cache = cache(&mut blocks, KV_HEADS);
        change(&mut cache);
        let result = layer.call(layer_idx, &input(), &mut cache, &OFFSETS, &mut out);
        if result.is_err() {
            assert!(blocks == before && out.iter().all(|&x| x == -7.5));
        }
        result
    };
    assert_eq!(with(0, &|_| {}), Ok(()));
    assert!(with(2, &|_| {}).is_err());
    assert!(with(1, &|cache| cache.shape[1] = 1).is_err());
    assert!(with(1, &|cache| cache.shape[3] = 2).is_err());
    assert!(with(1, &|cache| cache.shape[4] = 1).is_err());
    assert!(with(1, &|cache| cache.shape[5] = 8).is_err());
    assert!(with(1, &|cache| cache.shape[0] = 7).is_err());
    assert!(with(1, &|cache| cache.cache_lengths = &[0, 99]).is_err());
    assert!(with(1, &|cache| cache.cache_lengths = &[0]).is_err());
    assert!(with(1, &|cache| cache.lookup_table = &[5, 0, 3, 1, 6, 4]).is_err());
}

/// Bytes of a matrix, with the scales that the script gives.
fn drawn_blocks(random: &mut Random, of: GgmlType, rows: usize, columns: usize) -> Vec<u8> {
    let (elements, size) = of.block();
    let scales: &[(usize, i32)] = match of {
        GgmlType::Q4_0 => &[(0, -8)],
        GgmlType::Q4_K => &[(0, -12), (2, -10)],
        GgmlType::Q6_K => &[(208, -14)],
        other => panic!("{other:?}"),
    };
    let mut bytes: Vec<u8> = (0..rows * columns / elements * size)
        .map(|_| random.bits() as u8)
        .collect();
    for block in bytes.chunks_mut(size) {
        for &(at, exponent) in scales {
            let scale = f16::from_f32(2f32.powi(exponent));
            block[at..at + 2].copy_from_slice(&scale.to_le_bytes());
        }
    }
    bytes
}

enum Made {
    Dense(AttentionWithRope<f32>),
    /// With activations as they are, and rounded to 8 bits.
    Ggufq(GGUFQAttentionWithRope),
    Integers(AttentionLayer<f32>),
    Parallel(DataParallelAttentionWithRope<f32>),
}

impl Made {
    /// A call with the same sequences on each device.
    fn call(
        &self,
        layer_idx: usize,
        xs: &[Vec<f32>],
        caches: &mut [PagedCacheValues<'_, f32>],
        offsets: &[u32],
        outs: &mut [Vec<f32>],
    ) {
        let at = layer_idx as u32;
        let (x, cache, out) = (&xs[0], &mut caches[0], &mut outs[0]);
        match self {
            Made::Dense(layer) => layer.call(at, x, cache, offsets, out),
            Made::Ggufq(layer) => layer.call(at, x, cache, offsets, out),
            Made::Integers(layer) => {
                let [pages, _, layers, page_size, heads, head_dim] = cache.shape;
                let slots = CacheLayout::paged_nhd(pages, page_size, heads, head_dim);
                let slots = slots.of_layer(layers, layer_idx).in_pairs_of_pages();
                let batch = RaggedBatch::new(offsets, cache.cache_lengths, cache.lookup_table);
                let mut cache = KvCacheMut::one_buffer(slots, cache.kv_blocks).unwrap();
                layer.forward(x, &mut cache, &batch, &mut Workspace::default(), out)
            }
            Made::Parallel(layer) => {
                let xs: Vec<_> = xs.iter().map(|x| &x[..]).collect();
                let mut outs: Vec<_> = outs.iter_mut().map(|out| &mut out[..]).collect();
                layer.call(at, &xs, caches, &vec![offsets; xs.len()], &mut outs)
            }
        }
        .unwrap();
    }
}

/// Both calls of a file of `scripts/goldens/max-attention.py`, held to what MAX returned: within `bound`, and
/// more than `beyond` apart somewhere.
fn holds_to_max(name: &str, integers: bool, [beyond, bound]: [f32; 2]) {
    let golden = Golden::read(&format!("max/{name}"));
    let case = &golden.case;
    let [
        heads,
        kv_heads,
        head_dim,
        hidden,
        pages,
        page_size,
        layers,
        layer,
    ] = [
        "heads",
        "kv_heads",
        "head_dim",
        "hidden_size",
        "pages",
        "page_size",
        "layers",
        "layer",
    ]
    .map(|key| golden.number(key));
    let flag = |key: &str| case[key].as_bool().unwrap();
    let calls: Vec<(String, Vec<u32>, Vec<u32>)> =
        serde_json::from_value(case["calls"].clone()).unwrap();
    let mut random = Random::new(golden.number("seed") as u64);
    let inputs: Vec<Vec<f32>> = calls
        .iter()
        .map(|(_, offsets, _)| random.values(*offsets.last().unwrap() as usize * hidden, 1.0))
        .collect();
    let (q, kv) = (heads * head_dim, kv_heads * head_dim);
    let pairing = match flag("interleaved") {
        true => Pairing::Interleaved,
        false => Pairing::HalfSplit,
    };
    let theta = case["theta"].as_f64().unwrap();
    let rope = Rope::new(Frequencies::from_theta(theta, head_dim).unwrap(), pairing);
    let kv_params = KVCacheParams {
        page_size,
        ..KVCacheParams::new(kv_heads, head_dim)
    };
    let mut given = Arguments::new(&rope, heads, kv_heads, hidden, kv_params);
    given.scale = case["scale"].as_f64();
    given.clip_qkv = case["clip"].as_f64().map(|clip| clip as f32);
    (given.stacked_qkv, given.has_bias) = (flag("stacked"), flag("bias"));
    given.use_qk_norm = flag("qk_norm");
    if let Some(window) = case["window"].as_u64() {
        given.mask_variant = MHAMaskVariant::SlidingWindowCausalMask;
        given.sliding_window = Some(window as usize);
    }
    let shapes = [
        ("q", q, hidden),
        ("k", kv, hidden),
        ("v", kv, hidden),
        ("o", hidden, q),
    ];
    let layer_of = match case["encoding"].as_str() {
        Some(encoding) => {
            let of = GgmlType::ALL
                .into_iter()
                .find(|of| of.name() == encoding)
                .unwrap();
            let state = shapes.map(|(name, rows, columns)| {
                let bytes = drawn_blocks(&mut random, of, rows, columns);
                (format!("{name}_proj.weight"), (of, bytes))
            });
            if integers {
                let mut shapes = shapes.into_iter();
                let [q, k, v, o] = state.map(|(_, (of, bytes))| {
                    let (_, rows, columns) = shapes.next().unwrap();
                    let weights = GgmlWeights::new(of, bytes, rows, columns).unwrap();
                    Arc::new(GgmlLinear(weights)) as Arc<dyn Projection<f32>>
                });
                let config = AttentionConfig::new(hidden, heads, kv_heads, head_dim);
                let qkv = QkvProjection::Separate { q, k, v };
                Made::Integers(AttentionLayer::new(config, &Host::new(), &rope, qkv, o).unwrap())
            } else {
                let layer = GGUFQAttentionWithRope::new(&given, &state.into(), &Host::new());
                Made::Ggufq(layer.unwrap())
            }
        }
        None => {
            let mut state = StateDict::new();
            for (name, rows, columns) in shapes {
                let weight = random.values(rows * columns, 0.3);
                state.insert(format!("{name}_proj.weight"), weight);
            }
            for (name, rows, _) in &shapes[..if given.has_bias { 3 } else { 0 }] {
                state.insert(format!("{name}_proj.bias"), random.values(*rows, 0.5));
            }
            for name in &["q_norm", "k_norm"][..if given.use_qk_norm { 2 } else { 0 }] {
                state.insert(format!("{name}.weight"), random.values(head_dim, 1.5));
            }
            for part in &["weight", "bias"][..1 + usize::from(given.has_bias)] {
                let parts =
                    ["q", "k", "v"].map(|name| state[&format!("{name}_proj.{part}")].clone());
                state.insert(format!("qkv_proj.{part}"), parts.concat());
            }
            let layer = AttentionWithRope::new(&given, &state, &Host::new()).unwrap();
            match golden.number("devices") {
                1 => Made::Dense(layer),
                devices => {
                    Made::Parallel(DataParallelAttentionWithRope::new(&layer, devices).unwrap())
                }
            }
        }
    };
    let table: Vec<Vec<u32>> = serde_json::from_value(case["page_table"].clone()).unwrap();
    let table = table.concat();
    let untouched = case["untouched"].as_f64().unwrap() as f32;
    let shape = [pages, 2, layers, page_size, kv_heads, head_dim];
    let untouched_blocks = vec![untouched; shape.iter().product()];
    let mut all = vec![untouched_blocks; golden.number("devices")];
    let mut worst = 0.0f32;
    for ((key, offsets, lengths), x) in calls.iter().zip(&inputs) {
        // A second device has the tokens of the first turned by one.
        let mut xs = vec![x.clone(); all.len()];
        for (device, x) in xs.iter_mut().enumerate() {
            x.rotate_right(device * hidden);
        }
        let mut caches: Vec<_> = all
            .iter_mut()
            .map(|blocks| PagedCacheValues {
                kv_blocks: blocks,
                shape,
                cache_lengths: lengths,
                lookup_table: &table,
            })
            .collect();
        let mut outs = vec![vec![0.0; x.len()]; xs.len()];
        layer_of.call(layer, &xs, &mut caches, offsets, &mut outs);
        for (device, out) in outs.iter().enumerate() {
            let key = match device {
                0 => key.clone(),
                _ => format!("{key}{device}"),
            };
            let expected = golden.tensor::<f32>(&key);
            let kept = golden.number("kept");
            let out: Vec<f32> = out
                .chunks(hidden)
                .flat_map(|out| out[..kept].to_vec())
                .collect();
            near(&out, &expected, bound);
            let most = expected.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            let errors = out.iter().zip(&expected).map(|(a, b)| (a - b).abs() / most);
            worst = errors.fold(worst, f32::max);
        }
    }
    assert!(worst >= beyond, "{name}: {worst}");
    let blocks = &all[0];
    let of_layer = page_size * kv_heads * head_dim;
    let (of_layer, other): (Vec<_>, Vec<_>) = blocks
        .chunks(of_layer)
        .enumerate()
        .partition(|(at, _)| at % layers == layer);
    assert!(
        other
            .iter()
            .all(|(_, elements)| elements.iter().all(|&x| x == untouched))
    );
    if let Some(expected) = golden.find::<f32>("kv_blocks") {
        let got: Vec<f32> = of_layer
            .iter()
            .flat_map(|(_, elements)| elements.iter().copied())
            .collect();
        near(&got, &expected, bound);
        for (got, expected) in got.iter().zip(&expected) {
            assert_eq!(*got == untouched, *expected == untouched);
        }
    }
}

#[test]
fn dense_layers_are_those_of_max() {
    for name in [
        "dense",
        "bias",
        "stacked_bias",
        "qk_norm",
        "interleaved",
        "clip_scale",
        "window",
        "data_parallel",
    ] {
        holds_to_max(name, false, [0.0, 1e-6]);
    }
}

/// MAX rounds activations to 8 bits, which [`GgmlLinear`] does too, and the class here does not.
#[test]
fn layers_of_gguf_weights_are_those_of_max() {
    for name in ["gguf_q4_0", "gguf_q4_k", "gguf_q6_k"] {
        holds_to_max(name, true, [0.0, 1e-6]);
        holds_to_max(name, false, [1e-3, 1e-2]);
    }
}

/// e4m3 codes of weights, drawn.
fn float8_tensors(
    random: &mut Random,
    rows: usize,
    columns: usize,
    scales: usize,
    input_scale: Option<f32>,
) -> Float8Tensors {
    let codes = random.values(rows * columns, 100.0);
    Float8Tensors {
        weight: codes.iter().map(|&x| e4m3_from_f32(x)).collect(),
        weight_scale: (0..scales)
            .map(|_| 0.002 + 0.002 * random.values(1, 0.5)[0].abs())
            .collect(),
        input_scale,
    }
}

const STATIC: Float8InputScaleSpec = Float8InputScaleSpec {
    granularity: Float8ScaleGranularity::Tensor,
    origin: Float8ScaleOrigin::Static,
    activation_scale_ub: None,
    block_size: None,
};
const PER_TOKEN: Float8InputScaleSpec = Float8InputScaleSpec {
    granularity: Float8ScaleGranularity::Colwise,
    origin: Float8ScaleOrigin::Dynamic,
    activation_scale_ub: Some(1200.0),
    block_size: None,
};
const BLOCKS: Float8InputScaleSpec = Float8InputScaleSpec {
    granularity: Float8ScaleGranularity::Block,
    origin: Float8ScaleOrigin::Dynamic,
    activation_scale_ub: None,
    block_size: Some([1, 16]),
};

fn float8_config(
    input_scale: Float8InputScaleSpec,
    granularity: Float8ScaleGranularity,
    block_size: Option<[usize; 2]>,
) -> Float8Config {
    Float8Config {
        input_scale,
        weight_scale: Float8WeightScaleSpec {
            granularity,
            dtype: Dtype::F32,
            block_size,
        },
    }
}

/// Tensors of q, k, v and o, and q, k and v as one, for which static scales are those of q.
fn float8_state(config: &Float8Config) -> StateDict<Float8Tensors> {
    let mut random = Random::new(31);
    let names = [("q", 64), ("k", 32), ("v", 32), ("o", 64)];
    let mut state = StateDict::new();
    for (at, (name, rows)) in names.into_iter().enumerate() {
        let scales = match (
            config.weight_scale.granularity,
            config.weight_scale.block_size,
        ) {
            (Float8ScaleGranularity::Rowwise, _) => rows,
            (Float8ScaleGranularity::Block, Some([a, b])) => (rows / a) * (64 / b),
            _ => 1,
        };
        let input = [0.004, 0.006, 0.003, 0.02][at];
        let input = (config.input_scale.origin == Float8ScaleOrigin::Static).then_some(input);
        let tensors = float8_tensors(&mut random, rows, 64, scales, input);
        state.insert(format!("{name}_proj"), tensors);
    }
    let parts = ["q_proj", "k_proj", "v_proj"].map(|name| state[name].clone());
    let mut all = parts[0].clone();
    all.weight = parts.each_ref().map(|part| &part.weight[..]).concat();
    if config.weight_scale.granularity != Float8ScaleGranularity::Tensor {
        all.weight_scale = parts.each_ref().map(|part| &part.weight_scale[..]).concat();
    }
    state.insert("qkv_proj".into(), all);
    state
}

fn new_float8(
    given: &Arguments<'_>,
    config: &Float8Config,
    tensors: &StateDict<Float8Tensors>,
) -> Result<AttentionWithRope<f32>, AttentionError> {
    AttentionWithRope::new_float8(given, config, tensors, &state(), &Host::new())
}

#[test]
fn float8_layers_have_the_scales_of_their_parts() {
    use Float8ScaleGranularity::{Block, Rowwise, Tensor};
    let rope = rope(HEAD_DIM, Pairing::HalfSplit);
    let mut given = arguments(&rope);
    (given.has_bias, given.use_qk_norm) = (true, true);
    let values = |codes: &[u8], scale: &dyn Fn(usize) -> f32| -> Vec<f32> {
        let codes = codes.iter().enumerate();
        codes
            .map(|(at, &code)| e4m3_to_f32(code) * scale(at))
            .collect()
    };
    let shape = |name: &str| {
        if ["q", "o"].contains(&name) {
            [64, 64]
        } else {
            [32, 64]
        }
    };

    // Static: one scale for all three of either kind, and codes by it.
    let config = float8_config(STATIC, Tensor, None);
    let tensors = float8_state(&config);
    let layer = new_float8(&given, &config, &tensors).unwrap();
    let scales = ["q", "k", "v"].map(|name| tensors[&format!("{name}_proj")].weight_scale[0]);
    let largest = scales.into_iter().fold(0.0, f32::max);
    assert_eq!(layer.qkv_input_scale(), Some(0.006));
    assert_eq!(
        layer.qkv_weight_scale(),
        Some(Fp8WeightScale::Tensor(largest))
    );
    let mut expected = Vec::new();
    let mut projections = Vec::new();
    for (name, scale) in ["q", "k", "v"].into_iter().zip(scales) {
        let weight = &tensors[&format!("{name}_proj")].weight;
        let again: Vec<u8> = match scale == largest {
            true => weight.clone(),
            false => values(weight, &|_| scale)
                .iter()
                .map(|x| e4m3_from_f32(x * (1.0 / largest)))
                .collect(),
        };
        expected.extend(values(&again, &|_| largest));
        let [rows, columns] = shape(name);
        let of = Fp8Weights::new(again, Fp8WeightScale::Tensor(largest), rows, columns).unwrap();
        let linear = Fp8Linear::new(of, Fp8Activation::Static(0.006)).unwrap();
        projections.push(Arc::new(linear) as Arc<dyn Projection<f32>>);
    }
    same(&layer.wqkv(), &expected);
    same(&layer.wqkv_bias().unwrap(), &state()["qkv_proj.bias"]);
    let of_o = &tensors["o_proj"];
    let o = Fp8WeightScale::Tensor(of_o.weight_scale[0]);
    let o = Fp8Weights::new(of_o.weight.clone(), o, 64, 64).unwrap();
    let o = Fp8Linear::new(o, Fp8Activation::Static(0.02)).unwrap();
    let [q, k, v] = projections.try_into().ok().unwrap();
    let by_hand = AttentionLayer::new(
        layer.layer().config().clone(),
        &Host::new(),
        &rope,
        QkvProjection::Separate { q, k, v },
        Arc::new(o),
    )
    .unwrap();
    let [q, k, v] = ["q", "k", "v"].map(|name| HeadWeights {
        bias: Some(state()[&format!("{name}_proj.bias")].clone()),
        norm: (name != "v").then(|| state()[&format!("{name}_norm.weight")].clone()),
        norm_bias: None,
    });
    let by_hand = by_hand.with_head_weights(q, k, v);
    let mut of_hand = vec![0.0; TOKENS * HIDDEN];
    let mut memory = blocks(KV_HEADS);
    let slots = CacheLayout::paged_nhd(6, 4, KV_HEADS, HEAD_DIM);
    let slots = slots.of_layer(2, 1).in_pairs_of_pages();
    by_hand
        .forward(
            &input(),
            &mut KvCacheMut::one_buffer(slots, &mut memory).unwrap(),
            &RaggedBatch::new(&OFFSETS, &LENGTHS, &PAGES),
            &mut Workspace::default(),
            &mut of_hand,
        )
        .unwrap();
    same(&call(&layer), &of_hand);

    // Rows and blocks: one below the other, of stacked weights too.
    let of_rows = float8_config(PER_TOKEN, Rowwise, None);
    let of_blocks = float8_config(BLOCKS, Block, Some([8, 16]));
    let of_tensors = float8_config(PER_TOKEN, Tensor, None);
    for config in [of_rows, of_blocks] {
        let tensors = float8_state(&config);
        given.stacked_qkv = false;
        let apart = new_float8(&given, &config, &tensors).unwrap();
        given.stacked_qkv = true;
        let stacked = new_float8(&given, &config, &tensors).unwrap();
        let scales = tensors["qkv_proj"].weight_scale.clone();
        for layer in [&apart, &stacked] {
            assert_eq!(layer.qkv_input_scale(), None);
            let expected = match config.weight_scale.block_size {
                None => Fp8WeightScale::Rows(scales.clone()),
                Some(block) => Fp8WeightScale::Blocks {
                    scales: scales.clone(),
                    block,
                },
            };
            assert_eq!(layer.qkv_weight_scale(), Some(expected));
            let scale = |at: usize| match config.weight_scale.block_size {
                None => scales[at / 64],
                Some(_) => scales[at / 64 / 8 * 4 + at % 64 / 16],
            };
            same(&layer.wqkv(), &values(&tensors["qkv_proj"].weight, &scale));
        }
        near(&call(&apart), &call(&stacked), 1e-6);
    }
    // Dynamic with scales of tensors: each for its rows.
    given.stacked_qkv = false;
    let tensors = float8_state(&of_tensors);
    let layer = new_float8(&given, &of_tensors, &tensors).unwrap();
    let scales = ["q", "k", "v"].map(|name| {
        let [rows, _] = shape(name);
        vec![tensors[&format!("{name}_proj")].weight_scale[0]; rows]
    });
    assert_eq!(
        layer.qkv_weight_scale(),
        Some(Fp8WeightScale::Rows(scales.concat()))
    );
    // No float8, no scales.
    let dense = AttentionWithRope::new(&given, &state(), &Host::new()).unwrap();
    assert_eq!(
        (dense.qkv_input_scale(), dense.qkv_weight_scale()),
        (None, None)
    );

    // Devices have the scales of their rows, and their sum is the layer where o's scales are static.
    for config in [float8_config(STATIC, Tensor, None), of_rows, of_blocks] {
        let tensors = float8_state(&config);
        let mut whole = new_float8(&given, &config, &tensors).unwrap();
        whole.set_sharding_strategy(ShardingStrategy::Replicate(2));
        let replicas = whole.shard().unwrap();
        assert_eq!(replicas[1].qkv_weight_scale(), whole.qkv_weight_scale());
        same(&call(&replicas[1]), &call(&whole));
        whole.set_sharding_strategy(ShardingStrategy::TensorParallel(2));
        let shards = whole.shard().unwrap();
        let mut sum = vec![0.0; TOKENS * HIDDEN];
        let all = blocks(KV_HEADS);
        for (device, shard) in shards.iter().enumerate() {
            assert_eq!(shard.qkv_input_scale(), whole.qkv_input_scale());
            let all_rows = match whole.qkv_weight_scale().unwrap() {
                Fp8WeightScale::Rows(scales) => scales,
                Fp8WeightScale::Blocks { scales, .. } => scales,
                Fp8WeightScale::Tensor(scale) => vec![scale; 128],
            };
            let each = all_rows.len() / 8;
            let half = |at: usize, len: usize| {
                let first = at * each + device * len / 2 * each;
                all_rows[first..first + len / 2 * each].to_vec()
            };
            let expected = [half(0, 4), half(4, 2), half(6, 2)].concat();
            match shard.qkv_weight_scale().unwrap() {
                Fp8WeightScale::Rows(scales) | Fp8WeightScale::Blocks { scales, .. } => {
                    assert_eq!(scales, expected);
                }
                Fp8WeightScale::Tensor(scale) => assert_eq!(scale, all_rows[0]),
            }
            let mut of_head: Vec<f32> = all
                .chunks(KV_HEADS * HEAD_DIM)
                .flat_map(|slot| slot[device * HEAD_DIM..][..HEAD_DIM].to_vec())
                .collect();
            let mut out = vec![0.0; TOKENS * HIDDEN];
            shard
                .call(1, &input(), &mut cache(&mut of_head, 1), &OFFSETS, &mut out)
                .unwrap();
            sum.iter_mut().zip(&out).for_each(|(sum, x)| *sum += x);
        }
        // Scales of tokens are those of a device's part of o's input; static ones and blocks are the same.
        let bound = match config == of_rows {
            true => 5e-2,
            false => 1e-6,
        };
        near(&sum, &call(&whole), bound);
    }
}

#[test]
fn float8_layers_refuse_what_does_not_fit() {
    use AttentionError::*;
    use Float8ScaleGranularity::{Block, Colwise, Rowwise, Tensor};
    let rope = rope(HEAD_DIM, Pairing::HalfSplit);
    let given = arguments(&rope);
    let good = float8_config(STATIC, Tensor, None);
    let tensors = float8_state(&good);
    assert!(new_float8(&given, &good, &tensors).is_ok());
    let refused = |config: &Float8Config, change: &dyn Fn(&mut StateDict<Float8Tensors>)| {
        let mut tensors = float8_state(config);
        change(&mut tensors);
        new_float8(&given, config, &tensors).err()
    };
    for config in [
        float8_config(STATIC, Rowwise, None),
        float8_config(PER_TOKEN, Block, Some([8, 16])),
        float8_config(BLOCKS, Tensor, None),
        float8_config(BLOCKS, Block, Some([8, 32])),
        float8_config(BLOCKS, Block, None),
        float8_config(BLOCKS, Colwise, None),
        // q's rows are no whole blocks.
        float8_config(BLOCKS, Block, Some([64, 16])),
    ] {
        assert!(matches!(
            refused(&config, &|_| {}),
            Some(Weights { .. }) | Some(Mismatch { .. })
        ));
    }
    let zero = float8_config(BLOCKS, Block, Some([0, 16]));
    assert!(matches!(
        new_float8(&given, &zero, &tensors).err(),
        Some(Weights { .. })
    ));
    let q = |tensors: &mut StateDict<Float8Tensors>, change: &dyn Fn(&mut Float8Tensors)| {
        change(tensors.get_mut("q_proj").unwrap());
    };
    let none = |of: &mut Float8Tensors| of.input_scale = None;
    assert!(matches!(
        refused(&good, &|tensors| q(tensors, &none)),
        Some(Weights {
            what: "input_scale",
            ..
        })
    ));
    for bad in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let input = |of: &mut Float8Tensors| of.input_scale = Some(bad);
        let weight = |of: &mut Float8Tensors| of.weight_scale = vec![bad];
        assert!(matches!(
            refused(&good, &|t| q(t, &input)),
            Some(Factor { .. })
        ));
        assert!(matches!(
            refused(&good, &|t| q(t, &weight)),
            Some(Factor { .. })
        ));
    }
    let short = |of: &mut Float8Tensors| of.weight.truncate(5);
    let more = |of: &mut Float8Tensors| of.weight_scale.push(1.0);
    assert!(matches!(
        refused(&good, &|t| q(t, &short)),
        Some(Mismatch { .. })
    ));
    assert!(matches!(
        refused(&good, &|t| q(t, &more)),
        Some(Mismatch { .. })
    ));
    let removed = |tensors: &mut StateDict<Float8Tensors>| drop(tensors.remove("o_proj"));
    assert!(matches!(refused(&good, &removed), Some(NoWeight { .. })));
    let mut clipped = given;
    clipped.clip_qkv = Some(1.0);
    assert!(matches!(
        new_float8(&clipped, &good, &tensors).err(),
        Some(Weights {
            what: "clip_qkv",
            ..
        })
    ));
    // Devices whose rows, or whose columns of o, are no whole blocks.
    let blocks = float8_config(BLOCKS, Block, Some([32, 16]));
    let mut layer = new_float8(&given, &blocks, &float8_state(&blocks)).unwrap();
    layer.set_sharding_strategy(ShardingStrategy::TensorParallel(2));
    assert!(matches!(layer.shard().map(|_| ()), Err(Weights { .. })));
}
