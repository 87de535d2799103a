//! Whole layers against transformers (`tests/goldens/transformers`). The script that made the files says
//! what is in them, and in which order weights are drawn.

use phasor_attention::phasor::half::bf16;
use phasor_attention::phasor::norm::HeadNorm;
use phasor_attention::phasor::{CacheLayout, Element, Frequencies, Host, Pairing, Rope, Stages};
use phasor_attention::{
    AttentionConfig, AttentionError, AttentionLayer, AttentionMask, DenseWeights, HeadWeights,
    KvCacheMut, LatentKeys, Linear, LowRank, PagedKvCache, Projection, QkvProjection, RaggedBatch,
    StackedWeights, WindowOfWeights, Workspace,
};
use std::sync::Arc;

mod support;
use support::{Golden, Random, narrowed, near, widened};

/// The layer of a file for its sequence, over pages of 8 slots; `steps`: the tokens of each call.
fn transformers<T: Element>(golden: &Golden, steps: &[usize]) -> Vec<f32> {
    let case = &golden.case;
    let [tokens, heads, kv_heads, head_dim, hidden] =
        ["tokens", "heads", "kv_heads", "head_dim", "hidden_size"].map(|key| golden.number(key));
    let number = |key: &str| case[key].as_f64();
    let mut random = Random::new(golden.number("seed") as u64);
    let mut drawn = |most, len| narrowed::<T>(&random.values(len, most));
    let x = drawn(1.0, tokens * hidden);
    let (q_dims, kv_dims) = (heads * head_dim, kv_heads * head_dim);
    let sizes = [
        (q_dims, hidden),
        (kv_dims, hidden),
        (kv_dims, hidden),
        (hidden, q_dims),
    ];
    let [q, k, v, o] = sizes.map(|(rows, columns)| -> Arc<dyn Projection<T>> {
        let weights = drawn(0.3, rows * columns);
        Arc::new(Linear(DenseWeights::new(weights, rows, columns).unwrap()))
    });
    let mut config = AttentionConfig::new(hidden, heads, kv_heads, head_dim);
    let mut weights: [HeadWeights<T>; 3] = Default::default();
    let mut stages = Stages::new();
    if case["bias"].as_bool() == Some(true) {
        stages = stages.bias();
        config.v_stages = stages;
        for (weights, len) in weights.iter_mut().zip([q_dims, kv_dims, kv_dims]) {
            weights.bias = Some(drawn(0.5, len));
        }
    }
    if let Some(eps) = number("norm") {
        // Its Llama-like models round before the weight, its Gemma models do not; f32 shows no difference.
        let offset = number("norm_offset").unwrap_or(0.0) as f32;
        stages = stages.norm(HeadNorm::rms(eps as f32).with_weight_offset(offset));
        for weights in &mut weights[..2] {
            weights.norm = Some(drawn(1.5, head_dim));
        }
    }
    (config.q_stages, config.k_stages) = (stages, stages);
    if case["sinks"].as_bool() == Some(true) {
        config.sinks = Some(widened(&drawn(2.0, heads)));
    }
    if let Some(window) = number("window") {
        config.mask = AttentionMask::SlidingWindow(window as usize);
    }
    config.scale = number("scale").map(|scale| scale as f32);
    config.logits_soft_cap = number("soft_cap").map(|cap| cap as f32);
    let frequencies = Frequencies::from_theta(number("theta").unwrap(), head_dim).unwrap();
    let rope = Rope::new(frequencies, Pairing::HalfSplit);
    let qkv = QkvProjection::Separate { q, k, v };
    let [q, k, v] = weights;
    let layer = AttentionLayer::new(config, &Host::new(), &rope, qkv, o)
        .unwrap()
        .with_head_weights(q, k, v);
    let mut cache = PagedKvCache::new(6, 2, 8, kv_heads, head_dim).unwrap();
    let mut out = vec![T::default(); x.len()];
    let mut workspace = Workspace::default();
    let mut at = 0;
    for &new in steps {
        let part = at * hidden..(at + new) * hidden;
        let (cu_seqlens, lengths) = ([0, new as i32], [at as i32]);
        let batch = RaggedBatch::new(&cu_seqlens, &lengths, &[5, 0, 3, 1, 4, 2]);
        let (x, out) = (&x[part.clone()], &mut out[part]);
        layer
            .forward(x, &mut cache.layer(1).unwrap(), &batch, &mut workspace, out)
            .unwrap();
        at += new;
    }
    assert_eq!(at, tokens);
    widened(&out)
}

#[test]
fn layers_are_those_of_transformers() {
    for name in [
        "llama",
        "qwen2",
        "qwen3",
        "mistral",
        "gemma2",
        "gemma3_sliding",
        "gemma3_full",
        "gpt_oss_sliding",
    ] {
        let golden = Golden::read(&format!("transformers/{name}"));
        let expected = golden.tensor::<f32>("y");
        for steps in [&[40][..], &[17, 1, 22]] {
            // Its tables of cos and sin are rounded to f32, and so are its angles.
            near(&transformers::<f32>(&golden, steps), &expected, 5e-6);
        }
    }
    let golden = Golden::read("transformers/llama_bf16");
    let expected = golden.tensor::<f32>("y");
    near(&transformers::<bf16>(&golden, &[40]), &expected, 2e-2);
}

/// Latent attention, whose keys have other dims than values, and rotate in their last.
#[test]
fn latent_attention_is_that_of_transformers() {
    let golden = Golden::read("transformers/deepseek_v3");
    let keys = [
        "tokens",
        "heads",
        "hidden_size",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
    ];
    let [tokens, heads, hidden, q_rank, kv_rank, nope, rope, v_dim] =
        keys.map(|key| golden.number(key));
    let number = |key: &str| golden.case[key].as_f64().unwrap();
    let mut random = Random::new(golden.number("seed") as u64);
    let x = random.values(tokens * hidden, 1.0);
    let mut dense = |rows: usize, columns: usize| {
        let values = random.values(rows * columns, 0.3);
        Arc::new(DenseWeights::<f32>::new(values, rows, columns).unwrap())
    };
    let q_a = dense(q_rank, hidden);
    let q_b = dense(heads * (nope + rope), q_rank);
    let kv_a = dense(kv_rank + rope, hidden);
    let kv_b = dense(heads * (nope + v_dim), kv_rank);
    let o = dense(hidden, heads * v_dim);
    let [q_norm, kv_norm] = [q_rank, kv_rank].map(|len| random.values(len, 1.5));
    let eps = number("norm") as f32;
    let down = |rows| {
        let window = WindowOfWeights::new(kv_a.clone(), rows, 0..hidden).unwrap();
        Arc::new(Linear(window)) as Arc<dyn Projection<f32>>
    };
    let up = |first: usize, rows: usize| {
        let of_head = |head: usize| {
            let first = head * (nope + v_dim) + first;
            WindowOfWeights::new(kv_b.clone(), first..first + rows, 0..kv_rank).unwrap()
        };
        let weights = StackedWeights::new((0..heads).map(of_head).collect()).unwrap();
        Arc::new(Linear(weights)) as Arc<dyn Projection<f32>>
    };
    let low_rank = |first, rows| LowRank::new(down(0..kv_rank), &kv_norm, eps, up(first, rows));
    let q = LowRank::new(Arc::new(Linear(q_a)), &q_norm, eps, Arc::new(Linear(q_b))).unwrap();
    let k = low_rank(0, nope).unwrap();
    let k = LatentKeys::new(k, down(kv_rank..kv_rank + rope), heads).unwrap();
    let v = low_rank(nope, v_dim).unwrap();

    let mut config = AttentionConfig::new(hidden, heads, heads, nope + rope);
    (config.v_head_dim, config.rotary_offset) = (v_dim, nope);
    let qkv = QkvProjection::Separate {
        q: Arc::new(q.clone()),
        k: Arc::new(k.clone()),
        v: Arc::new(v.clone()),
    };
    let frequencies = Frequencies::from_theta(number("theta"), rope).unwrap();
    let rotation = Rope::new(frequencies, Pairing::Interleaved);
    let o = Arc::new(Linear(o));
    let new = |config: AttentionConfig| {
        AttentionLayer::new(config, &Host::new(), &rotation, qkv.clone(), o.clone())
    };
    let layer = new(config.clone()).unwrap();
    let slots = |dims| CacheLayout::paged_nhd(6, 8, heads, dims);
    let [k_slots, v_slots] = [nope + rope, v_dim].map(slots);
    for steps in [&[40][..], &[17, 1, 22]] {
        let mut keys = vec![f32::NAN; k_slots.required_len().unwrap()];
        let mut values = vec![f32::NAN; v_slots.required_len().unwrap()];
        let mut out = vec![0.0; x.len()];
        let mut at = 0;
        for &new in steps {
            let part = at * hidden..(at + new) * hidden;
            let (cu_seqlens, lengths) = ([0, new as i32], [at as i32]);
            let batch = RaggedBatch::new(&cu_seqlens, &lengths, &[5, 0, 3, 1, 4, 2]);
            let cache = KvCacheMut::separate((k_slots, &mut keys), (v_slots, &mut values));
            let (x, out) = (&x[part.clone()], &mut out[part]);
            layer
                .forward(
                    x,
                    &mut cache.unwrap(),
                    &batch,
                    &mut Workspace::default(),
                    out,
                )
                .unwrap();
            at += new;
        }
        near(&out, &golden.tensor::<f32>("y"), 5e-6);
    }

    // Parts that do not fit.
    use AttentionError::*;
    let refused = |change: &dyn Fn(&mut AttentionConfig)| {
        let mut config = config.clone();
        change(&mut config);
        new(config).err()
    };
    assert!(matches!(
        refused(&|c| c.v_head_dim = nope),
        Some(Mismatch { .. })
    ));
    assert!(matches!(refused(&|c| c.v_head_dim = 0), Some(Value { .. })));
    assert!(matches!(
        refused(&|c| c.rotary_offset = nope + 2),
        Some(Step(_))
    ));
    assert!(matches!(refused(&|c| c.rotary_offset = 1), Some(Step(_))));
    let shared = || down(kv_rank..kv_rank + rope);
    assert!(LatentKeys::new(low_rank(0, nope).unwrap(), shared(), 0).is_err());
    assert!(LatentKeys::new(low_rank(0, nope).unwrap(), shared(), 3).is_err());
    assert!(LatentKeys::new(low_rank(0, nope).unwrap(), up(0, nope), heads).is_err());
    assert!(LowRank::new(down(0..kv_rank), &kv_norm[1..], eps, up(0, nope)).is_err());
    assert!(LowRank::new(down(0..kv_rank), &kv_norm, 0.0, up(0, nope)).is_err());
    assert!(LowRank::new(down(0..rope), &kv_norm[..rope], eps, up(0, nope)).is_err());
    let mut out = vec![-7.5; heads * (nope + rope)];
    assert!(k.forward(&x[1..hidden], &mut out).is_err());
    assert!(k.forward(&x[..hidden], &mut out[1..]).is_err());
    assert!(v.forward(&x[..hidden], &mut out).is_err());
    assert!(out.iter().all(|&x| x == -7.5));
    // A cache whose values have other dims.
    let wrong = slots(v_dim + 1);
    let mut keys = vec![0.0; k_slots.required_len().unwrap()];
    let mut values = vec![0.0; wrong.required_len().unwrap()];
    let mut cache = KvCacheMut::separate((k_slots, &mut keys), (wrong, &mut values)).unwrap();
    let batch = RaggedBatch::new(&[0, 1], &[0], &[0]);
    let mut out = [-7.5; 48];
    let mut workspace = Workspace::default();
    let result = layer.forward(&x[..hidden], &mut cache, &batch, &mut workspace, &mut out);
    assert!(matches!(result, Err(Mismatch { .. })));
    assert!(out.iter().all(|&x| x == -7.5));
}
