//! MAX's layers: what their parameters mean, and the errors of their constructors. Layers over several
//! devices, against the whole.

use phasor_attention::max::{
    Arguments, AttentionWithRope, AttentionWithRopeNoOpaque, GGUFQAttentionWithRope,
    GPTQAttentionWithRope, KVCacheParams, MHAMaskVariant, PagedCacheValues, QuantizationConfig,
    StateDict, TensorParallelAttentionWithRope,
};
use phasor_attention::phasor::half::f16;
use phasor_attention::phasor::norm::HeadNorm;
use phasor_attention::phasor::{Frequencies, Host, Pairing, Rope, Stages};
use phasor_attention::{
    AttentionConfig, AttentionError, DataParallelAttention, DeviceBatch, GgmlType, GptqFormat,
    GptqTensors, LayerWeights, PagedKvCache, RaggedBatch, ShardingStrategy, Workspace,
};
use std::sync::Arc;

mod support;
use support::{Random, near, same};

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
