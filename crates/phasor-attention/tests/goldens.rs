//! Whole layers against transformers (`tests/goldens/transformers`). The script that made the files says
//! what is in them, and in which order weights are drawn.

use phasor_attention::phasor::half::bf16;
use phasor_attention::phasor::norm::HeadNorm;
use phasor_attention::phasor::{Element, Frequencies, Host, Pairing, Rope, Stages};
use phasor_attention::{
    AttentionConfig, AttentionLayer, AttentionMask, DenseWeights, HeadWeights, Linear,
    PagedKvCache, Projection, QkvProjection, RaggedBatch, Workspace,
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
