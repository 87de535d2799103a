//! Configs: spellings, priorities, defaults, layers without rotation, and everything that is
//! wrong with a config. What the right frequencies are is checked in `config_goldens.rs`.

use astro_float::{BigFloat, Consts, RoundingMode};
use phasor::config::{
    Axes, ConfigError, DynamicNtkScaling, GgmlMrope, LinearScaling, Llama3Scaling, LongRopeScaling,
    ModelConfig, NtkAlphaScaling, OutputOrder, PairingRule, ProportionalScaling, QwenNtkScaling,
    RopeConfig, Scaling, YarnScaling, row_for_call,
};
use phasor::{Angles, Direction, Frequencies, Pairing};
use proptest::prelude::*;
use serde_json::{Value, json};

fn model(config: Value) -> ModelConfig {
    ModelConfig::from_hf_config(&config.to_string()).unwrap_or_else(|e| panic!("{config}: {e}"))
}

fn rope(config: Value) -> RopeConfig {
    model(config).rope().unwrap().clone()
}

fn error(config: Value) -> ConfigError {
    match ModelConfig::from_hf_config(&config.to_string()) {
        Ok(model) => panic!("{config} is taken: {model:?}"),
        Err(error) => error,
    }
}

/// A Llama with the given keys put over it.
fn llama(over: Value) -> Value {
    let mut config = json!({
        "model_type": "llama", "hidden_size": 256, "num_attention_heads": 4,
        "num_hidden_layers": 4, "max_position_embeddings": 4096, "rope_theta": 10000.0,
    });
    put_over(&mut config, over);
    config
}

fn put_over(config: &mut Value, over: Value) {
    for (key, value) in over.as_object().unwrap() {
        config[key] = value.clone();
    }
}

fn frequencies(config: Value) -> Frequencies {
    rope(config).frequencies().unwrap()
}

#[track_caller]
fn names(error: &ConfigError, parts: &[&str]) {
    let text = error.to_string();
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
}

#[test]
fn old_and_new_spellings_agree() {
    let scaling = json!({"rope_type": "linear", "factor": 4.0});
    let expected = frequencies(llama(json!({"rope_scaling": scaling})));
    for over in [
        json!({"rope_scaling": {"type": "linear", "factor": 4}}),
        json!({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
        json!({"rope_parameters": {"type": "linear", "factor": 4.0}}),
        // rope_type wins over type, rope_scaling over rope_parameters unless it is empty.
        json!({"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 4.0}}),
        json!({"rope_scaling": scaling, "rope_parameters": {"rope_type": "banana"}}),
        json!({"rope_scaling": {}, "rope_parameters": scaling}),
        json!({"rope_scaling": null, "rope_parameters": scaling}),
        // theta in the table wins over the one beside it.
        json!({"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 4, "rope_theta": 1e4}}),
        json!({"rope_theta": 10000, "rope_scaling": scaling, "head_dim": null}),
    ] {
        assert_eq!(frequencies(llama(over.clone())), expected, "{over}");
    }
    assert_ne!(expected, frequencies(llama(json!({}))));
    // The last of equal keys counts, as in Python.
    let twice = r#"{"model_type": "llama", "head_dim": 64, "rope_theta": 5, "rope_theta": 10000}"#;
    assert_eq!(RopeConfig::from_hf_config(twice).unwrap().theta(), 10_000.0);
}

#[test]
fn original_length_beside_the_table_wins() {
    let yarn =
        json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024});
    let of = |over: Value| match rope(llama(over)).scaling().clone() {
        Scaling::Yarn(yarn) => yarn.original_max_position_embeddings,
        other => panic!("{other:?}"),
    };
    assert_eq!(of(json!({"rope_scaling": yarn})), 1024);
    let beside = json!({"rope_scaling": yarn, "original_max_position_embeddings": 2048});
    assert_eq!(of(beside), 2048);
    assert_eq!(
        of(json!({"rope_scaling": {"type": "yarn", "factor": 4.0}})),
        4096
    );
}

#[test]
fn every_type_is_read() {
    let ones = vec![1.0; 32];
    for (name, table) in [
        ("default", json!({"rope_type": "default"})),
        (
            "default",
            json!({"type": "mrope", "mrope_section": [8, 12, 12]}),
        ),
        ("linear", json!({"type": "linear", "factor": 2})),
        ("dynamic NTK", json!({"type": "dynamic", "factor": 2})),
        (
            "NTK with a constant alpha",
            json!({"type": "dynamic", "alpha": 1000.0, "factor": 1.0}),
        ),
        (
            "NTK with a constant alpha",
            json!({"type": "ntk_alpha", "alpha": 50}),
        ),
        ("YaRN", json!({"type": "yarn", "factor": 2})),
        (
            "LongRoPE",
            json!({"type": "longrope", "short_factor": ones, "long_factor": ones}),
        ),
        (
            "LongRoPE",
            json!({"type": "su", "short_factor": ones, "long_factor": ones}),
        ),
        (
            "llama3",
            json!({"type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}),
        ),
        (
            "proportional",
            json!({"type": "proportional", "partial_rotary_factor": 0.25}),
        ),
    ] {
        let config = rope(llama(json!({"rope_scaling": table})));
        assert_eq!(config.scaling().name(), name);
        assert_eq!(
            config.depends_on_length(),
            ["dynamic NTK", "LongRoPE"].contains(&name)
        );
    }
    // Early Phi-3 configs call it yarn.
    let phi3 = json!({
        "model_type": "phi3", "head_dim": 64, "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": "yarn", "short_factor": ones, "long_factor": ones},
    });
    let config = rope(phi3);
    assert_eq!(config.scaling().name(), "LongRoPE");
    // sqrt(1 + ln 32 / ln 4096)
    assert_eq!(
        config.frequencies_for_length(1).unwrap().attention_factor(),
        1.190_238_1
    );
    // Its relatives mean what they say.
    let phi = json!({"model_type": "phi", "head_dim": 64, "rope_scaling":
        {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2048}});
    assert_eq!(rope(phi).scaling().name(), "YaRN");
}

/// The length of training beside the table, in it, and by the family's default.
#[test]
fn where_the_original_length_comes_from() {
    let original = |config: Value, layer_type: Option<&str>| {
        let model = ModelConfig::from_hf_config(&config.to_string()).unwrap();
        let config = match layer_type {
            Some(layer_type) => model.rope_for(layer_type).unwrap(),
            None => model.rope().unwrap(),
        };
        match config.scaling() {
            Scaling::Llama3(llama3) => llama3.original_max_position_embeddings,
            Scaling::LongRope(long_rope) => long_rope.original_max_position_embeddings,
            other => panic!("{other:?}"),
        }
    };
    // It counts for a family's default table too.
    let apertus = json!({"model_type": "apertus", "head_dim": 128,
        "original_max_position_embeddings": 4096});
    assert_eq!(original(apertus, None), 4096);
    // Phi-3 has a default that stands before the table's.
    let ones = vec![1.0; 48];
    let phi3 = json!({"model_type": "phi3", "head_dim": 96, "max_position_embeddings": 131072,
        "rope_scaling": {"type": "longrope", "short_factor": ones, "long_factor": ones,
            "original_max_position_embeddings": 8192}});
    assert_eq!(original(phi3, None), 4096);
    // A table that is about one kind of layer is not touched by the key beside it.
    let olmo3 = json!({"model_type": "olmo3", "head_dim": 128, "num_hidden_layers": 4,
        "max_position_embeddings": 65536, "original_max_position_embeddings": 2048,
        "rope_scaling": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0}});
    assert_eq!(original(olmo3, Some("full_attention")), 65536);
}

#[test]
fn yarn_defaults() {
    let yarn = |over: Value| {
        let mut table = json!({"rope_type": "yarn", "factor": 40.0});
        put_over(&mut table, over);
        rope(llama(json!({"rope_scaling": table})))
    };
    let factor = |over: Value| yarn(over).frequencies().unwrap().attention_factor();
    let expected = YarnScaling::new(40.0, 4096);
    assert_eq!(yarn(json!({})).scaling(), &Scaling::Yarn(expected.clone()));
    // 0 and null stand for the defaults.
    let zeros = json!({"beta_fast": 0, "beta_slow": 0, "truncate": null, "mscale": null});
    assert_eq!(yarn(zeros).scaling(), &Scaling::Yarn(expected));
    assert_eq!(factor(json!({})), 1.368_887_9);
    assert_eq!(factor(json!({"factor": 1.5})), 1.040_546_5);
    assert_eq!(factor(json!({"factor": 1})), 1.0);
    assert_eq!(factor(json!({"mscale": 1.0})), 1.368_887_9);
    assert_eq!(factor(json!({"mscale": 1.0, "mscale_all_dim": 1.0})), 1.0);
    assert_eq!(
        factor(json!({"mscale": 0.707, "mscale_all_dim": 0.707})),
        1.0
    );
    assert_eq!(
        factor(json!({"attention_factor": 1.5, "mscale": 1, "mscale_all_dim": 1})),
        1.5
    );
    // The factor follows from the two lengths.
    let null = json!({"factor": null, "original_max_position_embeddings": 1024});
    let Scaling::Yarn(read) = yarn(null).scaling().clone() else {
        panic!()
    };
    assert_eq!(read.factor, 4.0);
}

#[test]
fn equal_limits_of_llama3_blend_nothing() {
    // Llama 4 has equal limits; at 100 the wavelength of a pair meets them exactly.
    for limit in [1.0, 4.0, 8192.0 / std::f64::consts::TAU] {
        let table = json!({
            "rope_type": "llama3", "factor": 16.0, "low_freq_factor": limit,
            "high_freq_factor": limit, "original_max_position_embeddings": 8192,
        });
        let config =
            llama(json!({"model_type": "llama4_text", "head_dim": 128, "rope_scaling": table}));
        let frequencies = frequencies(config);
        for pair in 0..64 {
            let (cos, sin) = frequencies.cos_sin(pair, 12_345);
            assert!(cos.is_finite() && sin.is_finite());
        }
    }
}

#[test]
fn families_name_and_default_things_their_own_way() {
    let neox = json!({"model_type": "gpt_neox", "hidden_size": 1024, "num_attention_heads": 16});
    let read = rope(neox.clone());
    assert_eq!(
        (read.theta(), read.head_dim(), read.rotary_dim()),
        (10_000.0, 64, 16)
    );
    let mut other = neox;
    put_over(
        &mut other,
        json!({"rotary_pct": 1.0, "rotary_emb_base": 500, "rope_theta": 9.0}),
    );
    let read = rope(other);
    assert_eq!((read.theta(), read.rotary_dim()), (500.0, 64));

    let gptj = json!({"model_type": "gptj", "n_embd": 4096, "n_head": 16, "rotary_dim": 64});
    let read = rope(gptj);
    assert_eq!((read.head_dim(), read.rotary_dim()), (256, 64));
    assert_eq!(read.pairing(), Pairing::Interleaved);

    for (config, head_dim, rotary_dim) in [
        (json!({"model_type": "persimmon"}), 64, 32),
        (
            json!({"model_type": "phi", "hidden_size": 2560, "num_attention_heads": 32}),
            80,
            40,
        ),
        (
            json!({"model_type": "phi", "head_dim": 80, "partial_rotary_factor": 0.4}),
            80,
            32,
        ),
        (json!({"model_type": "stablelm", "head_dim": 80}), 80, 20),
        (json!({"model_type": "glm4", "head_dim": 128}), 128, 64),
        (
            json!({"model_type": "falcon", "hidden_size": 4544, "num_attention_heads": 71}),
            64,
            64,
        ),
        (
            json!({"model_type": "minimax_m2", "head_dim": 128, "rotary_dim": 64}),
            128,
            64,
        ),
        (
            json!({"model_type": "jetmoe", "kv_channels": 96, "hidden_size": 64}),
            96,
            96,
        ),
        (
            json!({"model_type": "dbrx", "d_model": 6144, "n_heads": 48}),
            128,
            128,
        ),
        (
            json!({"model_type": "deepseek_v3", "qk_rope_head_dim": 32}),
            32,
            32,
        ),
        // Plain RoPE of these heeds no such key.
        (
            json!({"model_type": "llama", "head_dim": 64, "partial_rotary_factor": 0.5}),
            64,
            64,
        ),
        // An explicit null asks for the derived head_dim.
        (
            json!({"model_type": "qwen3", "hidden_size": 512, "num_attention_heads": 8}),
            128,
            128,
        ),
        (
            json!({"model_type": "qwen3", "hidden_size": 512, "num_attention_heads": 8, "head_dim": null}),
            64,
            64,
        ),
    ] {
        let read = rope(config.clone());
        assert_eq!(
            (read.head_dim(), read.rotary_dim()),
            (head_dim, rotary_dim),
            "{config}"
        );
    }
    assert_eq!(rope(json!({"model_type": "cohere"})).theta(), 500_000.0);
    assert_eq!(
        rope(json!({"model_type": "nanochat"})).direction(),
        Direction::Inverse
    );
    let dbrx = json!({"model_type": "dbrx", "attn_config": {"rope_theta": 5e5}});
    assert_eq!(rope(dbrx).theta(), 500_000.0);
    let nested = json!({"model_type": "dbrx", "attn_config": 5});
    assert_eq!(rope(nested).theta(), 10_000.0);
    let trailing = json!({"model_type": "deepseek_v4", "qk_rope_head_dim": 64, "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "compressed_sparse_attention"]});
    let trailing = model(trailing);
    let main = trailing.rope_of_layer(0).unwrap().unwrap();
    assert_eq!(
        (main.rotary_dim(), main.rotary_offset(), main.theta()),
        (64, 448, 1e4)
    );
    assert_eq!(
        trailing.rope_of_layer(1).unwrap().unwrap().theta(),
        160_000.0
    );
}

#[test]
fn pairing_says_why() {
    let config = rope(json!({"model_type": "glm", "head_dim": 128}));
    assert_eq!(config.pairing(), Pairing::Interleaved);
    assert_eq!(
        config.pairing_rule(),
        &PairingRule::ModelType("glm".to_string())
    );
    for config in [
        json!({"model_type": "made-up", "head_dim": 64, "rope_theta": 1e4}),
        json!({"head_dim": 64, "rope_theta": 1e4}),
    ] {
        let config = rope(config);
        assert_eq!(config.pairing(), Pairing::HalfSplit);
        assert_eq!(config.pairing_rule(), &PairingRule::Assumed);
        assert!(config.pairing_rule().to_string().contains("assumed"));
    }
    let deepseek = rope(json!({"model_type": "deepseek_v3"}));
    assert_eq!(deepseek.transformers_output_order(), OutputOrder::HalfSplit);
    let flagged = rope(json!({"model_type": "deepseek_v3", "rope_interleave": false}));
    assert_eq!(flagged.pairing(), Pairing::HalfSplit);
    assert_eq!(flagged.transformers_output_order(), OutputOrder::AsInput);
    assert_eq!(
        flagged.pairing_rule().to_string(),
        "rope_interleave is false"
    );
    let by_hand = RopeConfig::new(1e4, 64)
        .unwrap()
        .with_pairing(Pairing::Interleaved);
    assert_eq!(by_hand.pairing_rule(), &PairingRule::Given);
}

#[test]
fn score_scales() {
    let scale = |config: Value| {
        let model = model(config);
        let name = model.layer_types()[0].to_string();
        model.rope_for(&name).unwrap().score_scale()
    };
    assert_eq!(scale(json!({"model_type": "llama", "head_dim": 64})), 0.125);
    let gemma = json!({"model_type": "gemma2", "head_dim": 128, "query_pre_attn_scalar": 144});
    assert_eq!(scale(gemma), 1.0 / 12.0);
    let granite =
        json!({"model_type": "granite", "head_dim": 64, "attention_multiplier": 0.0078125});
    assert_eq!(scale(granite), 0.0078125);
    assert_eq!(scale(json!({"model_type": "gemma3n_text"})), 1.0);
    assert_eq!(
        scale(json!({"model_type": "deepseek_v3"})),
        192f64.sqrt().recip()
    );
    let yarn = json!({"model_type": "deepseek_v3", "max_position_embeddings": 163840,
        "rope_scaling": {"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096}});
    let mscale = 0.1 * 40f64.ln() + 1.0;
    assert!((scale(yarn) / (mscale * mscale / 192f64.sqrt()) - 1.0).abs() < 1e-15);
}

#[test]
fn configs_inside_configs() {
    let text = json!({"model_type": "llama", "head_dim": 64, "rope_theta": 5e5});
    for outer in [
        json!({"model_type": "llava", "text_config": text, "hidden_size": 7}),
        json!({"model_type": "internvl_chat", "llm_config": text}),
        json!({"model_type": "deepseek_vl_v2", "language_config": text}),
        json!({"model_type": "x", "thinker_config": {"text_config": text}}),
    ] {
        let model = model(outer);
        assert_eq!(model.model_type(), Some("llama"));
        assert_eq!(model.rope().unwrap().theta(), 500_000.0);
    }
    // A part without a name of its own is of the whole's kind.
    let qwen = model(json!({"model_type": "qwen3_vl", "text_config": {"hidden_size": 4096}}));
    let config = qwen.rope().unwrap();
    assert_eq!(config.axes(), Some(&Axes::MropeInterleaved([24, 20, 20])));
    // Its errors name the path.
    let broken = json!({"text_config": {"head_dim": 64, "rope_theta": 1e4,
        "rope_scaling": {"type": "linear", "factor": "4"}}});
    names(
        &error(broken),
        &["text_config.rope_scaling.factor", "\"4\"", "a number"],
    );
}

#[test]
fn kinds_of_layers() {
    let gemma = json!({
        "model_type": "gemma3_text", "head_dim": 64, "num_hidden_layers": 12,
        "rope_theta": 2e6, "rope_local_base_freq": 5e3, "max_position_embeddings": 8192,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    });
    let old = model(gemma);
    let full = old.rope_for("full_attention").unwrap();
    assert_eq!(full.theta(), 2e6);
    assert_eq!(full.scaling().name(), "linear");
    let sliding = old.rope_for("sliding_attention").unwrap();
    assert_eq!((sliding.theta(), sliding.scaling()), (5e3, &Scaling::None));
    for layer in 0..12 {
        let expected = if layer % 6 == 5 { full } else { sliding };
        assert_eq!(old.rope_of_layer(layer).unwrap(), Some(expected));
    }
    assert_eq!(
        old.rope_of_layer(12),
        Err(ConfigError::NoSuchLayer {
            index: 12,
            layers: 12
        })
    );
    names(
        &old.rope().unwrap_err(),
        &["sliding_attention, full_attention", "rope_for"],
    );
    names(
        &old.rope_for("conv").unwrap_err(),
        &["\"conv\"", "sliding_attention"],
    );

    let new = model(json!({
        "model_type": "gemma3_text", "head_dim": 64, "num_hidden_layers": 12,
        "max_position_embeddings": 8192,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
        },
    }));
    assert_eq!(new, old);

    // Tables by kind of layer are understood in any family.
    let made_up = model(json!({
        "head_dim": 64, "layer_types": ["a", "b", "a"],
        "rope_parameters": {"a": {"rope_theta": 100.0}, "b": {"rope_theta": 200}},
    }));
    assert_eq!(made_up.rope_of_layer(2).unwrap().unwrap().theta(), 100.0);
    assert_eq!(made_up.rope_of_layer(1).unwrap().unwrap().theta(), 200.0);

    let gemma4 = model(json!({"model_type": "gemma4_text", "num_hidden_layers": 8}));
    let full = gemma4.rope_for("full_attention").unwrap();
    assert_eq!((full.head_dim(), full.rotary_dim()), (512, 512));
    assert_eq!(full.scaling().name(), "proportional");
    assert_eq!(gemma4.rope_of_layer(7).unwrap(), Some(full));

    // A table replaces the kind's defaults as a whole.
    let all = model(json!({"model_type": "gemma4_text", "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}));
    let all = all
        .rope_for("full_attention")
        .unwrap()
        .frequencies()
        .unwrap();
    assert!(all.steps().iter().all(|&step| step > 0));

    let flat = json!({"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 5.0}});
    names(
        &error(flat),
        &["rope_parameters", "sliding_attention, full_attention"],
    );
    let mixed = json!({"model_type": "gemma4_text", "rope_scaling": {"rope_type": "linear"}});
    names(&error(mixed), &["rope_scaling", "a table for each"]);
}

#[test]
fn layers_that_do_not_rotate() {
    let rotates = |model: &ModelConfig, layers: usize| -> Vec<bool> {
        (0..layers)
            .map(|layer| model.rope_of_layer(layer).unwrap().is_some())
            .collect()
    };
    let every_fourth = [true, true, true, false, true, true, true, false];
    for config in [
        json!({"model_type": "smollm3", "num_hidden_layers": 8}),
        json!({"model_type": "smollm3", "no_rope_layers": [1, 1, 1, 0, 1, 1, 1, 0]}),
        json!({"model_type": "llama4_text", "num_hidden_layers": 8, "no_rope_layers": []}),
        json!({"model_type": "cohere2", "num_hidden_layers": 8, "sliding_window": 4096}),
        json!({"model_type": "exaone4", "num_hidden_layers": 8, "sliding_window": 4096}),
        json!({"model_type": "cohere2", "layer_types": [
            "sliding_attention", "sliding_attention", "sliding_attention", "full_attention",
            "sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]}),
        json!({"model_type": "muse_glimmer_text", "layer_rope_theta": [5, 5, 5, 0, 5, 5, 5, 0]}),
    ] {
        let model = model(config.clone());
        assert_eq!(rotates(&model, 8), every_fourth, "{config}");
        assert!(model.rope().is_ok(), "{config}");
    }
    let interval =
        json!({"model_type": "smollm3", "num_hidden_layers": 4, "no_rope_layer_interval": 2});
    assert_eq!(rotates(&model(interval), 4), [true, false, true, false]);
    let no_window =
        json!({"model_type": "exaone4", "num_hidden_layers": 4, "sliding_window": null});
    assert_eq!(rotates(&model(no_window), 4), [true; 4]);
    let hybrid =
        json!({"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"]});
    assert_eq!(rotates(&model(hybrid), 2), [false, true]);
    // Layers of a count that no pattern needs are not listed.
    let huge = model(llama(json!({"num_hidden_layers": 1_000_000_000_000u64})));
    assert!(huge.rope_of_layer(999_999_999).unwrap().is_some());
    // Without a number of layers, no pattern.
    let unknown = model(json!({"model_type": "cohere2"}));
    names(
        &unknown.rope_of_layer(0).unwrap_err(),
        &["layer_types", "rope_for"],
    );

    for config in [
        json!({"model_type": "gpt2", "hidden_size": 768}),
        json!({"model_type": "falcon", "alibi": true}),
        json!({"model_type": "granitemoehybrid", "position_embedding_type": "nope"}),
        json!({"model_type": "esm", "position_embedding_type": "absolute"}),
    ] {
        assert!(matches!(error(config), ConfigError::NoRotation { .. }));
    }
    let unlike = json!({"model_type": "dinov3_vit", "rope_theta": 100.0});
    assert!(matches!(error(unlike), ConfigError::Unsupported { .. }));
}

#[test]
fn layers_without_attention() {
    let rotates = |config: Value, layers: usize| -> Vec<bool> {
        let model = model(config);
        (0..layers)
            .map(|layer| model.rope_of_layer(layer).unwrap().is_some())
            .collect()
    };
    let at = |layers: usize, which: &[usize]| -> Vec<bool> {
        (0..layers).map(|layer| which.contains(&layer)).collect()
    };
    for (config, layers, which) in [
        (json!({"model_type": "qwen3_next"}), 9, vec![3, 7]),
        (
            json!({"model_type": "qwen3_5_text", "full_attention_interval": 3}),
            7,
            vec![2, 5],
        ),
        (json!({"model_type": "bailing_hybrid"}), 12, vec![5, 11]),
        (json!({"model_type": "olmo_hybrid"}), 8, vec![3, 7]),
        (json!({"model_type": "olmo_hybrid"}), 3, vec![2]),
        (json!({"model_type": "minimax"}), 4, vec![0, 2]),
        (json!({"model_type": "lfm2"}), 2, vec![0, 1]),
        (
            json!({"model_type": "lfm2", "full_attn_idxs": [1, 3]}),
            4,
            vec![1, 3],
        ),
        (
            json!({"model_type": "lfm2_moe", "full_attn_idxs": [2]}),
            4,
            vec![2],
        ),
        (
            json!({"model_type": "bamba", "attn_layer_indices": [0, 2]}),
            4,
            vec![0, 2],
        ),
        (json!({"model_type": "recurrent_gemma"}), 7, vec![2, 5]),
        (
            json!({"model_type": "recurrent_gemma", "block_types": ["attention", "recurrent"]}),
            4,
            vec![0, 2],
        ),
        (
            json!({"model_type": "mllama_text_model"}),
            5,
            vec![0, 1, 2, 4],
        ),
        (
            json!({"model_type": "mllama_text_model", "cross_attention_layers": [0]}),
            3,
            vec![1, 2],
        ),
        (
            json!({"model_type": "zamba2", "use_mem_rope": true,
                "layers_block_type": ["mamba", "hybrid", "mamba"]}),
            3,
            vec![1],
        ),
    ] {
        let mut config = config;
        config["num_hidden_layers"] = json!(layers);
        assert!(model(config.clone()).rope().is_ok(), "{config}");
        assert_eq!(
            rotates(config.clone(), layers),
            at(layers, &which),
            "{config}"
        );
    }
    // What says it is absent.
    for config in [
        json!({"model_type": "bamba", "num_hidden_layers": 4}),
        json!({"model_type": "lfm2_moe", "num_hidden_layers": 4}),
        json!({"model_type": "zamba2", "use_mem_rope": true, "num_hidden_layers": 4}),
        json!({"model_type": "granitemoehybrid", "position_embedding_type": "rope"}),
        json!({"model_type": "qwen3_next"}),
        json!({"head_dim": 64, "rope_theta": 1e4, "attn_layer_period": 8, "num_hidden_layers": 8}),
    ] {
        let model = model(config.clone());
        assert!(model.rope().is_ok(), "{config}");
        names(
            &model.rope_of_layer(0).unwrap_err(),
            &["layer_types is missing"],
        );
    }
    // Long lists take no long time.
    let long = vec![7; 65_536];
    let long = json!({"model_type": "lfm2", "num_hidden_layers": 65_536, "full_attn_idxs": long});
    assert!(model(long).rope_of_layer(7).unwrap().is_some());
}

/// Command A: layers that slide rotate, and the dense ones in front do so whatever their type.
#[test]
fn dense_layers_rotate() {
    let rotates = |over: Value| -> Vec<bool> {
        let mut config = json!({"model_type": "cohere2_moe", "num_hidden_layers": 6});
        put_over(&mut config, over);
        let model = model(config);
        assert!(model.rope().is_ok());
        (0..6)
            .map(|layer| model.rope_of_layer(layer).unwrap().is_some())
            .collect()
    };
    let (yes, no) = (true, false);
    assert_eq!(rotates(json!({})), [yes, yes, yes, no, yes, yes]);
    // Two dense layers, and the pattern counted anew behind them.
    let dense = json!({"first_k_dense_replace": 2});
    assert_eq!(rotates(dense), [yes, yes, yes, yes, yes, no]);
    let windows = json!({"first_k_dense_replace": 2, "prefix_dense_sliding_window_pattern": 2});
    assert_eq!(rotates(windows), [yes, no, yes, yes, yes, no]);
    let full = vec!["full_attention"; 6];
    let listed = json!({"layer_types": full, "mlp_layer_types":
        ["dense", "sparse", "dense", "sparse", "sparse", "sparse"]});
    assert_eq!(rotates(listed), [yes, no, yes, no, no, no]);
    let replaced = json!({"layer_types": full, "first_k_dense_replace": 1});
    assert_eq!(rotates(replaced), [yes, no, no, no, no, no]);
}

#[test]
fn kinds_without_rotating_layers_are_not_listed() {
    let types = ["chunked_attention", "chunked_attention", "full_attention"];
    let llama4 = model(json!({"model_type": "llama4_text", "layer_types": types,
        "no_rope_layers": [1, 1, 0]}));
    assert_eq!(llama4.layer_types(), ["chunked_attention"]);
    names(
        &llama4.rope_for("full_attention").unwrap_err(),
        &["full_attention", "chunked_attention"],
    );
    // Whichever kind goes, the others keep their numbers.
    let tables = json!({"model_type": "llama4_text", "no_rope_layers": [0, 1, 1],
        "layer_types": ["a", "b", "c"], "rope_parameters":
            {"a": {"rope_theta": 10.0}, "b": {"rope_theta": 20.0}, "c": {"rope_theta": 30.0}}});
    let tables = model(tables);
    assert_eq!(tables.layer_types(), ["b", "c"]);
    assert_eq!(tables.rope_of_layer(0), Ok(None));
    assert_eq!(tables.rope_of_layer(1).unwrap().unwrap().theta(), 20.0);
    assert_eq!(tables.rope_of_layer(2).unwrap().unwrap().theta(), 30.0);
    // The list of types counts the layers, too.
    let counted = model(json!({"model_type": "llama4_text", "layer_types": ["a", "a", "a", "b"]}));
    assert_eq!(counted.layer_types(), ["a"]);
    assert_eq!(counted.rope_of_layer(3), Ok(None));
    let none = json!({"model_type": "smollm3", "no_rope_layers": [0, 0]});
    assert!(matches!(error(none), ConfigError::NoRotation { .. }));
}

#[test]
fn an_old_table_beside_tables_by_kind() {
    let config = |over: Value| {
        let mut config = json!({
            "model_type": "gemma3_text", "head_dim": 64, "num_hidden_layers": 6,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 2e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
            },
        });
        put_over(&mut config, over);
        config
    };
    let merged = model(config(json!({})));
    let full = merged.rope_for("full_attention").unwrap();
    assert_eq!((full.theta(), full.scaling().name()), (2e6, "linear"));
    let sliding = merged.rope_for("sliding_attention").unwrap();
    assert_eq!((sliding.theta(), sliding.scaling()), (5e3, &Scaling::None));
    let theta = json!({"rope_scaling": {"rope_theta": 3e6}});
    let theta = model(config(theta));
    assert_eq!(theta.rope_for("full_attention").unwrap().theta(), 3e6);
    // Errors name the table that a key is in.
    let broken = json!({"rope_scaling": {"rope_type": "linear", "factor": "x"}});
    names(&error(config(broken)), &["rope_scaling.factor is \"x\""]);
    let theta = json!({"rope_parameters": {"full_attention": {"rope_theta": 0}}});
    names(
        &error(config(theta)),
        &["rope_parameters.full_attention.rope_theta is 0"],
    );
    // Kinds that are not types of layers are not merged.
    let v4 = json!({"model_type": "deepseek_v4", "rope_scaling": {"type": "linear", "factor": 2},
        "rope_parameters": {"main": {"rope_theta": 1e4}, "compress": {"rope_theta": 2e4}}});
    names(&error(v4), &["rope_scaling", "rope_parameters", "keep one"]);
    // Nor are those of a family without defaults of its own for them.
    let llama = llama(json!({"rope_scaling": {"type": "linear", "factor": 2},
        "rope_parameters": {"a": {"rope_theta": 1e4}}}));
    names(
        &error(llama),
        &["rope_scaling", "rope_parameters", "keep one"],
    );
    // Tables by names that no layer has are still there to be asked for.
    let labels = model(json!({"head_dim": 64, "layer_types": ["full_attention"],
        "rope_parameters": {"main": {"rope_theta": 1e4}, "compress": {"rope_theta": 2e4}}}));
    assert_eq!(labels.rope_for("compress").unwrap().theta(), 2e4);
    names(&labels.rope_of_layer(0).unwrap_err(), &["layer_types"]);
}

#[test]
fn spellings_of_families_that_are_not_known() {
    let unknown = |over: Value| {
        let mut config = json!({"model_type": "made-up", "hidden_size": 1024,
            "num_attention_heads": 8, "rope_theta": 1e4, "num_hidden_layers": 4});
        put_over(&mut config, over);
        config
    };
    for (over, head_dim, rotary_dim) in [
        (json!({}), 128, 128),
        (json!({"partial_rotary_factor": 0.5}), 128, 64),
        (json!({"rotary_pct": 0.25}), 128, 32),
        (json!({"rope_pct": 0.25}), 128, 32),
        (json!({"rotary_dim": 64}), 128, 64),
        (json!({"rotary_dim": 64, "rotary_pct": 0.5}), 128, 64),
        (json!({"qk_rope_head_dim": 64, "head_dim": 192}), 64, 64),
        (json!({"attention_head_dim": 96}), 96, 96),
        (json!({"kv_channels": 64}), 64, 64),
    ] {
        let read = rope(unknown(over.clone()));
        let dims = (read.head_dim(), read.rotary_dim());
        assert_eq!(dims, (head_dim, rotary_dim), "{over}");
    }
    let both = error(unknown(json!({"rotary_dim": 32, "rotary_pct": 0.5})));
    names(&both, &["rotary_pct is 0.5", "rotary_dim is 32"]);
    let latent = rope(unknown(
        json!({"qk_rope_head_dim": 64, "qk_nope_head_dim": 128}),
    ));
    assert_eq!(latent.score_scale(), 192f64.sqrt().recip());
    for key in ["rotary_emb_base", "rope_embedding_base"] {
        let read = rope(unknown(json!({"rope_theta": null, key: 500.0})));
        assert_eq!(read.theta(), 500.0);
    }
    let skips = model(unknown(json!({"no_rope_layers": [1, 1, 0, 1]})));
    assert_eq!(skips.rope_of_layer(2), Ok(None));
    assert!(skips.rope_of_layer(3).unwrap().is_some());
    let skips = model(unknown(json!({"no_rope_layer_interval": 2})));
    assert_eq!(skips.rope_of_layer(1), Ok(None));
    for (over, parts) in [
        (
            json!({"no_rope_layers": [1, 3]}),
            vec!["no_rope_layers[1] is 3"],
        ),
        (
            json!({"no_rope_layers": [0, 1]}),
            vec!["no_rope_layers", "each layer"],
        ),
        (
            json!({"rope_ratio": 50}),
            vec!["rope_ratio", "made-up", "family"],
        ),
        (
            json!({"rope_local_base_freq": 1e4}),
            vec!["rope_local_base_freq", "family"],
        ),
        (json!({"alibi": true}), vec!["alibi is true", "made-up"]),
        (json!({"kv_channels": "x"}), vec!["kv_channels is \"x\""]),
    ] {
        names(&error(unknown(over)), &parts);
    }
    assert!(ModelConfig::from_hf_config(&unknown(json!({"alibi": false})).to_string()).is_ok());
}

#[test]
fn switches_of_known_families() {
    let chatglm = json!({"model_type": "chatglm", "position_encoding_2d": true});
    assert!(
        matches!(&error(chatglm), ConfigError::Unsupported { what, .. }
        if what == "position_encoding_2d")
    );
    let flat = json!({"model_type": "chatglm", "position_encoding_2d": false});
    assert_eq!(rope(flat).rotary_dim(), 64);

    let theta = |over: Value| {
        let mut config = json!({"model_type": "nomic_bert"});
        put_over(&mut config, over);
        rope(config).theta()
    };
    assert_eq!(theta(json!({})), 1000.0);
    assert_eq!(theta(json!({"rotary_emb_base": 500.0})), 500.0);
    assert_eq!(
        theta(json!({"rotary_emb_base": 500.0, "rope_theta": 7.0})),
        7.0
    );

    // DeepSeek-VL2-Tiny and DeepSeek-OCR.
    let plain = rope(json!({"model_type": "deepseek_vl_v2", "language_config": {
        "model_type": "deepseek_v2", "use_mla": false, "hidden_size": 1280,
        "num_attention_heads": 10, "qk_nope_head_dim": 0, "qk_rope_head_dim": 0}}));
    assert_eq!(
        (plain.head_dim(), plain.pairing()),
        (128, Pairing::HalfSplit)
    );
    assert_eq!(plain.score_scale(), 128f64.sqrt().recip());
    assert_eq!(
        plain.pairing_rule(),
        &PairingRule::ModelType("deepseek_v2".to_string())
    );
    let latent = rope(json!({"model_type": "deepseek_v2", "use_mla": true}));
    assert_eq!(
        (latent.head_dim(), latent.pairing()),
        (64, Pairing::Interleaved)
    );
}

/// Sizes that a config leaves out are those of the family's default model.
#[test]
fn default_sizes() {
    let dim = |config: Value| rope(config).head_dim();
    for (model_type, of_hidden, of_heads) in [
        ("llama", 64, 256),
        ("mistral", 64, 256),
        ("mixtral", 64, 256),
        ("qwen2", 64, 256),
        ("qwen2_moe", 128, 128),
        ("phi", 64, 128),
        ("phi3", 64, 192),
        ("cohere", 32, 512),
    ] {
        let hidden = json!({"model_type": model_type, "hidden_size": 2048});
        assert_eq!(dim(hidden), of_hidden, "{model_type}");
        let heads = json!({"model_type": model_type, "num_attention_heads": 16});
        assert_eq!(dim(heads), of_heads, "{model_type}");
    }
    // A fixed head_dim stays, unless null asks for the derived one.
    for model_type in ["qwen3", "gemma", "gemma2"] {
        let fixed = rope(json!({"model_type": model_type})).head_dim();
        assert_eq!(
            dim(json!({"model_type": model_type, "hidden_size": 1024})),
            fixed
        );
    }
    let null = json!({"model_type": "qwen3", "hidden_size": 2048, "head_dim": null});
    assert_eq!(dim(null), 64);
    let llava = json!({"model_type": "llava", "text_config":
        {"model_type": "llama", "hidden_size": 5120}});
    assert_eq!(dim(llava), 160);
    names(
        &error(json!({"model_type": "llama", "hidden_size": 16})),
        &["hidden_size is 16", "num_attention_heads is 32"],
    );

    let max = |model_type: &str, table: Value| {
        let config = rope(json!({"model_type": model_type, "head_dim": 64, "rope_scaling": table}));
        match config.scaling() {
            Scaling::DynamicNtk(dynamic) => dynamic.max_position_embeddings,
            Scaling::Yarn(yarn) => yarn.original_max_position_embeddings,
            Scaling::Llama3(llama3) => llama3.original_max_position_embeddings,
            other => panic!("{other:?}"),
        }
    };
    for (model_type, tokens) in [
        ("llama", 2048),
        ("mistral", 131_072),
        ("qwen2", 32_768),
        ("qwen3", 32_768),
        ("gemma", 8192),
        ("starcoder2", 4096),
        ("falcon", 2048),
        ("glm4", 131_072),
        ("cohere", 8192),
        ("olmo2", 2048),
        ("granite", 2048),
        ("stablelm", 4096),
        ("gpt_neox", 2048),
    ] {
        for table in [
            json!({"rope_type": "dynamic", "factor": 2.0}),
            json!({"rope_type": "yarn", "factor": 2.0}),
            json!({"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0}),
        ] {
            assert_eq!(max(model_type, table), tokens, "{model_type}");
        }
    }
    // Nothing of the kind is known of a model without a name.
    let unknown = json!({"head_dim": 64, "rope_theta": 1e4,
        "rope_scaling": {"type": "dynamic", "factor": 2.0}});
    names(&error(unknown), &["max_position_embeddings is missing"]);
}

#[test]
fn vision_towers() {
    let qwen = model(json!({
        "model_type": "qwen2_vl", "hidden_size": 3584, "num_attention_heads": 28,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {"embed_dim": 1280, "num_heads": 16, "hidden_size": 3584},
    }));
    assert_eq!(
        qwen.rope().unwrap().axes(),
        Some(&Axes::MropeSections([16, 24, 24]))
    );
    let tower = qwen.vision().unwrap().unwrap();
    assert_eq!(
        (tower.head_dim(), tower.axes()),
        (80, Some(&Axes::VisionHalves))
    );
    assert_eq!(tower.frequencies().unwrap().axes(), 2);

    let none = model(llama(
        json!({"vision_config": {"model_type": "siglip_vision_model"}}),
    ));
    assert_eq!(none.vision(), Ok(None));
    for tower in [json!("none"), json!([1]), json!({"model_type": 5})] {
        let odd = model(llama(json!({"vision_config": tower})));
        assert!(odd.rope().is_ok());
        names(&odd.vision().unwrap_err(), &["vision_config"]);
    }
    // A broken tower does not keep the text from being read.
    let broken = model(json!({
        "model_type": "qwen2_vl", "hidden_size": 3584, "num_attention_heads": 28,
        "vision_config": {"embed_dim": "wide", "num_heads": 16},
    }));
    assert!(broken.rope().is_ok());
    names(
        &broken.vision().unwrap_err(),
        &["vision_config.embed_dim", "\"wide\""],
    );
}

#[test]
fn rows_for_lengths() {
    let dynamic = rope(llama(
        json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    ));
    for error in [
        dynamic.frequencies().unwrap_err(),
        dynamic.rope().unwrap_err(),
    ] {
        names(&error, &["dynamic NTK", "rope_for_lengths"]);
    }
    let rope = dynamic
        .rope_for_lengths(&[16_384, 100, 8192, 8192])
        .unwrap();
    let Angles::Rows(rows) = rope.angles() else {
        panic!()
    };
    assert_eq!(rows.rows(), 3);
    let plain = Frequencies::from_theta(10_000.0, 64).unwrap();
    assert_eq!(rows.row(0).unwrap(), plain);
    assert_eq!(
        rows.row(1).unwrap(),
        dynamic.frequencies_for_length(8192).unwrap()
    );
    assert_eq!(row_for_call(rows, 8191), Ok(1));
    assert_eq!(row_for_call(rows, 8192), Ok(2));
    assert_eq!(row_for_call(rows, -5), Ok(0));
    assert!(matches!(
        row_for_call(rows, 16_384),
        Err(ConfigError::Rope(_))
    ));

    let long_rope = LongRopeScaling::new(vec![1.0; 32], vec![2.0; 32], 4096);
    let config = RopeConfig::new(1e4, 64).unwrap();
    let config = config.with_scaling(Scaling::LongRope(long_rope)).unwrap();
    assert!(config.frequencies().is_err());
    let rope = config.rope().unwrap();
    let Angles::Rows(rows) = rope.angles() else {
        panic!()
    };
    assert_eq!((rows.rows(), rows.boundary()), (2, None));
    assert_eq!(rows.row(0).unwrap(), plain);
    assert_eq!(
        rows.row(1).unwrap(),
        config.frequencies_for_length(4097).unwrap()
    );
    let by_position = config.rope_by_position().unwrap();
    let Angles::Rows(rows) = by_position.angles() else {
        panic!()
    };
    assert_eq!(rows.boundary(), Some(4096));
    let on_axes = config.with_axes(Axes::MropeSections([8, 12, 12]));
    assert!(on_axes.rope().is_ok());
    assert!(matches!(
        on_axes.rope_by_position(),
        Err(ConfigError::Rope(_))
    ));
}

#[test]
fn axes_go_with_scaling_partial_rotary_and_both_pairings() {
    let yarn = Scaling::Yarn(YarnScaling::new(4.0, 4096));
    for pairing in [Pairing::HalfSplit, Pairing::Interleaved] {
        let text = RopeConfig::new(1e6, 128).unwrap().with_pairing(pairing);
        let text = text
            .with_rotary_dim(64)
            .unwrap()
            .with_scaling(yarn.clone())
            .unwrap();
        let plain = text.frequencies().unwrap();
        for axes in [
            Axes::MropeSections([8, 12, 12]),
            Axes::MropeInterleaved([12, 10, 10]),
            Axes::ErnieSections([11, 11, 10]),
            Axes::Ggml {
                mode: GgmlMrope::Mrope,
                sections: [8, 12, 12, 0],
            },
            Axes::Ggml {
                mode: GgmlMrope::Imrope,
                sections: [12, 10, 10, 0],
            },
        ] {
            let config = text.clone().with_axes(axes.clone());
            let split = config.frequencies().unwrap();
            assert_eq!(split.attention_factor(), plain.attention_factor());
            for pair in 0..32 {
                assert_eq!(split.cos_sin(pair, 77), plain.cos_sin(pair, 77), "{axes:?}");
            }
            assert_eq!(config.rope().unwrap().pairing(), pairing);
            assert_eq!(config.without_axes(), text);
        }
    }
    // Each axis of these has frequencies of its own, from 1 on.
    for (axes, first_pairs) in [
        (Axes::VisionHalves, vec![0, 16]),
        (Axes::Video([24, 20, 20]), vec![0, 12, 22]),
        (
            Axes::Ggml {
                mode: GgmlMrope::Vision,
                sections: [16, 16, 0, 0],
            },
            vec![0, 16],
        ),
    ] {
        let frequencies = axes.clone().frequencies(1e4, 64).unwrap();
        let plain = Frequencies::from_theta(1e4, 64).unwrap();
        for (axis, pair) in first_pairs.into_iter().enumerate() {
            let mut at = vec![0; frequencies.axes()];
            at[axis] = 9;
            assert_eq!(
                frequencies.cos_sin_at(pair, &at),
                plain.cos_sin(0, 9),
                "{axes:?}"
            );
        }
    }
}

#[test]
fn bad_values_are_named() {
    let linear =
        |factor: Value| llama(json!({"rope_scaling": {"type": "linear", "factor": factor}}));
    let long = |short: Value, long: Value| {
        llama(
            json!({"rope_scaling": {"type": "longrope", "short_factor": short, "long_factor": long}}),
        )
    };
    let table = |table: Value| llama(json!({"rope_scaling": table}));
    let ones = json!(vec![1.0; 32]);
    for (config, parts) in [
        (llama(json!({"rope_theta": 0})), vec!["rope_theta is 0"]),
        (
            llama(json!({"rope_theta": -1e4})),
            vec!["rope_theta is -10000"],
        ),
        (
            llama(json!({"rope_theta": "10000"})),
            vec!["rope_theta", "\"10000\"", "a number"],
        ),
        (
            llama(json!({"rope_theta": true})),
            vec!["rope_theta is true"],
        ),
        (
            llama(json!({"rope_theta": [1, 2]})),
            vec!["rope_theta is [1,2]"],
        ),
        (
            llama(json!({"rope_theta": [1, 2, 3, 4, 5, 6, 7, 8]})),
            vec!["rope_theta is [1,2,3,4,5,6,7,8]:"],
        ),
        (
            llama(json!({"rope_theta": [1, 2, 3, 4, 5, 6, 7, 8, 9]})),
            vec!["rope_theta is a list of 9:"],
        ),
        (
            llama(json!({"rope_parameters": {"rope_theta": 0}})),
            vec!["rope_parameters.rope_theta"],
        ),
        (llama(json!({"head_dim": 0})), vec!["head_dim is 0"]),
        (llama(json!({"head_dim": -64})), vec!["head_dim is -64"]),
        (llama(json!({"head_dim": 63})), vec!["head_dim", "63 of 63"]),
        (llama(json!({"head_dim": 1e18})), vec!["head_dim is 1e+18"]),
        (
            llama(json!({"head_dim": 16386})),
            vec!["head_dim is 16386", "16384"],
        ),
        (llama(json!({"head_dim": 64.5})), vec!["head_dim is 64.5"]),
        (
            llama(json!({"hidden_size": 2})),
            vec!["hidden_size is 2", "num_attention_heads is 4"],
        ),
        (llama(json!({"hidden_size": 1e17})), vec!["hidden_size"]),
        (linear(json!("2")), vec!["rope_scaling.factor"]),
        (linear(json!(0)), vec!["rope_scaling.factor is 0"]),
        (linear(json!(-2)), vec!["rope_scaling.factor is -2"]),
        (linear(json!(1e300)), vec!["rope_scaling.factor"]),
        (
            linear(json!(null)),
            vec!["rope_scaling.factor is missing", "linear"],
        ),
        (
            table(json!({"type": "dynamic", "factor": 0.5})),
            vec!["rope_scaling.factor is 0.5", "at least 1"],
        ),
        (
            table(json!({"type": "yarn", "factor": 0.5})),
            vec!["rope_scaling.factor is 0.5"],
        ),
        (
            table(json!({"type": "yarn", "factor": 2, "beta_fast": 1, "beta_slow": 32})),
            vec!["rope_scaling.beta_fast", "beta_slow"],
        ),
        (
            table(json!({"type": "yarn", "factor": 2, "truncate": 1})),
            vec!["rope_scaling.truncate is 1"],
        ),
        (
            table(json!({"type": "yarn", "factor": 2, "attention_factor": -1})),
            vec!["rope_scaling.attention_factor"],
        ),
        (
            table(json!({"type": "yarn", "factor": 2, "original_max_position_embeddings": 0})),
            vec!["rope_scaling.original_max_position_embeddings is 0"],
        ),
        (
            table(
                json!({"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}),
            ),
            vec!["rope_scaling.high_freq_factor is 1", "low_freq_factor"],
        ),
        (
            table(json!({"type": "llama3", "factor": 8})),
            vec!["rope_scaling.low_freq_factor is missing"],
        ),
        (
            table(json!({"type": "banana"})),
            vec!["rope_scaling.type is \"banana\"", "yarn"],
        ),
        (
            table(json!({"rope_type": 5})),
            vec!["rope_scaling.rope_type is 5", "a string"],
        ),
        (
            llama(json!({"rope_scaling": 5})),
            vec!["rope_scaling is 5", "an object"],
        ),
        (
            long(json!([1.0]), ones.clone()),
            vec!["rope_scaling.short_factor", "a list of 1", "a list of 32"],
        ),
        (
            long(ones.clone(), json!(vec![1.0; 33])),
            vec!["rope_scaling.long_factor", "a list of 33"],
        ),
        (
            long(ones.clone(), json!(vec![0.0; 32])),
            vec!["rope_scaling.long_factor[0] is 0"],
        ),
        (
            long(ones.clone(), json!(["a"])),
            vec!["rope_scaling.long_factor[0] is \"a\""],
        ),
        (
            long(ones.clone(), json!("a")),
            vec!["rope_scaling.long_factor is \"a\"", "a list"],
        ),
        (
            long(ones.clone(), json!(null)),
            vec!["rope_scaling.long_factor is missing"],
        ),
        (
            long(ones.clone(), json!(vec![1; 1_000_000])),
            vec![
                "rope_scaling.long_factor is a list of 1000000",
                "at most 65536",
            ],
        ),
        (
            table(json!({"type": "mrope", "mrope_section": [8, 8, 8]})),
            vec!["mrope_section is [8, 8, 8]", "32"],
        ),
        (
            table(json!({"type": "mrope", "mrope_section": [8, 8]})),
            vec!["rope_scaling.mrope_section", "3"],
        ),
        (
            table(json!({"type": "mrope", "mrope_section": [u64::MAX, u64::MAX, 2]})),
            vec!["mrope_section"],
        ),
        (
            json!({"model_type": "phi", "head_dim": 64, "partial_rotary_factor": 1.5}),
            vec!["partial_rotary_factor is 1.5"],
        ),
        (
            json!({"model_type": "phi", "head_dim": 64, "partial_rotary_factor": 0}),
            vec!["partial_rotary_factor is 0"],
        ),
        (
            json!({"model_type": "phi", "head_dim": 10, "partial_rotary_factor": 0.5}),
            vec!["partial_rotary_factor", "5 of 10"],
        ),
        (
            json!({"model_type": "gptj", "n_embd": 64, "n_head": 4, "rotary_dim": 64}),
            vec!["rotary_dim", "64 of 16"],
        ),
        (
            json!({"model_type": "gptj", "n_embd": 64, "n_head": 4, "rotary_dim": 7}),
            vec!["rotary_dim", "7 of 16"],
        ),
        (json!({"model_type": 5}), vec!["model_type is 5"]),
        (
            llama(json!({"rope_parameters": {"rope_type": "yarn", "a": {}}})),
            vec!["rope_parameters.rope_type", "table"],
        ),
        (
            json!({"model_type": "llama", "layer_types": "x"}),
            vec!["layer_types is \"x\""],
        ),
        (
            json!({"model_type": "smollm3", "num_hidden_layers": 1e15}),
            vec!["num_hidden_layers"],
        ),
        (
            json!({"model_type": "smollm3", "no_rope_layers": [1, "x"]}),
            vec!["no_rope_layers[1] is \"x\""],
        ),
        (json!({"head_dim": 64}), vec!["rope_theta is missing"]),
        (json!({"rope_theta": 1e4}), vec!["head_dim is missing"]),
        (
            json!({"rope_theta": 1e4, "hidden_size": 64}),
            vec!["head_dim is missing", "num_attention_heads"],
        ),
        (json!({}), vec!["is missing"]),
        (json!([1, 2]), vec!["the config is a list", "a JSON object"]),
        (json!(null), vec!["the config is null"]),
        (json!("x"), vec!["the config is a string"]),
    ] {
        names(&error(config), &parts);
    }
    // No path leads to a key of the config itself.
    for (key, value) in [("rope_theta", json!(0)), ("head_dim", json!(63))] {
        match error(llama(json!({key: value}))) {
            ConfigError::Invalid { key: named, .. } => assert_eq!(named, key),
            other => panic!("{key}: {other}"),
        }
    }
    for text in ["", "{", "{\"a\": nan}", "\u{0}", &"[".repeat(100_000)] {
        let error = ModelConfig::from_hf_config(text).unwrap_err();
        assert!(matches!(error, ConfigError::NotJson { .. }), "{error}");
    }
    // Values are cut, not repeated at length.
    let long = llama(json!({"rope_theta": "x".repeat(10_000)}));
    assert!(error(long).to_string().len() < 200);
}

/// Each parameter of a scaling by itself, and its name in the error.
#[test]
fn every_parameter_of_a_scaling_is_checked() {
    let config = RopeConfig::new(1e4, 64).unwrap();
    let refused = |scaling: Scaling, expected: &str| match config.clone().with_scaling(scaling) {
        Err(ConfigError::Invalid { key, .. }) => assert_eq!(key, expected),
        other => panic!("{expected}: {other:?}"),
    };
    let yarn = || YarnScaling::new(2.0, 4096);
    let long = || LongRopeScaling::new(vec![1.0; 32], vec![2.0; 32], 4096);
    let llama3 = |factor, low, high, original| {
        Scaling::Llama3(Llama3Scaling::new(factor, low, high, original))
    };
    for bad in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e19] {
        refused(Scaling::Linear(LinearScaling { factor: bad }), "factor");
        let rotated = 0.5;
        let part = ProportionalScaling {
            rotated,
            factor: bad,
        };
        refused(Scaling::Proportional(part), "factor");
        refused(llama3(bad, 1.0, 4.0, 8192), "factor");
        refused(llama3(8.0, bad, 4.0, 8192), "low_freq_factor");
        refused(llama3(8.0, 1.0, bad, 8192), "high_freq_factor");
        refused(Scaling::NtkAlpha(NtkAlphaScaling { alpha: bad }), "alpha");
        for (changed, key) in [
            (YarnScaling::new(bad, 4096), "factor"),
            (
                YarnScaling {
                    beta_fast: bad,
                    ..yarn()
                },
                "beta_fast",
            ),
            (
                YarnScaling {
                    beta_slow: bad,
                    ..yarn()
                },
                "beta_slow",
            ),
        ] {
            refused(Scaling::Yarn(changed), key);
        }
        let factor = LongRopeScaling {
            factor: Some(bad),
            ..long()
        };
        refused(Scaling::LongRope(factor), "factor");
    }
    for bad in [0.5, 0.999_999] {
        refused(Scaling::NtkAlpha(NtkAlphaScaling { alpha: bad }), "alpha");
        refused(llama3(bad, 1.0, 4.0, 8192), "factor");
        refused(Scaling::Yarn(YarnScaling::new(bad, 4096)), "factor");
        let ntk = DynamicNtkScaling {
            factor: bad,
            max_position_embeddings: 8,
        };
        refused(Scaling::DynamicNtk(ntk), "factor");
    }
    for bad in [0, 1 << 63, u64::MAX] {
        let original = "original_max_position_embeddings";
        refused(Scaling::Yarn(YarnScaling::new(2.0, bad)), original);
        refused(llama3(8.0, 1.0, 4.0, bad), original);
        let length = LongRopeScaling::new(vec![1.0; 32], vec![2.0; 32], bad);
        refused(Scaling::LongRope(length), original);
        let ntk = QwenNtkScaling { seq_length: bad };
        refused(Scaling::QwenNtk(ntk), "seq_length");
        let ntk = DynamicNtkScaling {
            factor: 2.0,
            max_position_embeddings: bad,
        };
        refused(Scaling::DynamicNtk(ntk), "max_position_embeddings");
    }
    for bad in [-1.0, f64::NAN, f64::INFINITY, 1e19] {
        let mscale = YarnScaling {
            mscale: Some(bad),
            ..yarn()
        };
        refused(Scaling::Yarn(mscale), "mscale");
        let all_dim = YarnScaling {
            mscale_all_dim: Some(bad),
            ..yarn()
        };
        refused(Scaling::Yarn(all_dim), "mscale_all_dim");
        let weight = YarnScaling {
            extrapolation_factor: bad,
            ..yarn()
        };
        refused(Scaling::Yarn(weight), "extrapolation_factor");
    }
    let weight = YarnScaling {
        extrapolation_factor: 1.000_001,
        ..yarn()
    };
    refused(Scaling::Yarn(weight), "extrapolation_factor");
    for bad in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e31] {
        for (changed, key) in [
            (
                LongRopeScaling {
                    attention_factor: Some(bad),
                    ..long()
                },
                "attention_factor",
            ),
            (
                LongRopeScaling {
                    short_mscale: Some(bad),
                    ..long()
                },
                "short_mscale",
            ),
            (
                LongRopeScaling {
                    long_mscale: Some(bad),
                    ..long()
                },
                "long_mscale",
            ),
        ] {
            refused(Scaling::LongRope(changed), key);
        }
        let factor = YarnScaling {
            attention_factor: Some(bad),
            ..yarn()
        };
        refused(Scaling::Yarn(factor), "attention_factor");
    }
    // (Infinity is a divisor, of a pair that does not turn.)
    for bad in [0.0, -1.0, f64::NAN] {
        let of = |short, long| {
            Scaling::LongRope(LongRopeScaling::new(vec![short; 32], vec![long; 32], 4096))
        };
        refused(of(bad, 1.0), "short_factor[0]");
        refused(of(1.0, bad), "long_factor[0]");
    }
}

/// The attention factor of LongRoPE divides by the logarithm of the original length.
#[test]
fn longrope_of_one_token() {
    let of = |factor: f64, original: u64| {
        let mut scaling =
            phasor::config::LongRopeScaling::new(vec![1.0; 32], vec![2.0; 32], original);
        scaling.factor = Some(factor);
        let config = RopeConfig::new(1e4, 64).unwrap();
        config.with_scaling(Scaling::LongRope(scaling))
    };
    names(
        &of(4.0, 1).unwrap_err(),
        &["original_max_position_embeddings is 1", "at least 2"],
    );
    for (factor, original) in [(0.5, 1), (1.0, 1), (0.5, 4096), (1.0, 4096)] {
        let frequencies = of(factor, original).unwrap().frequencies_for_length(1);
        assert_eq!(
            frequencies.unwrap().attention_factor(),
            1.0,
            "{factor} {original}"
        );
    }
    let stretched = of(4.0, 4096).unwrap().frequencies_for_length(1).unwrap();
    let expected = (1.0 + 4f64.ln() / 4096f64.ln()).sqrt();
    assert!((f64::from(stretched.attention_factor()) - expected).abs() < 1e-7);
}

#[test]
fn the_length_that_a_model_is_meant_for() {
    let length = |value: Value| rope(llama(json!({"max_position_embeddings": value})));
    assert_eq!(
        length(json!(12_345)).max_position_embeddings(),
        Some(12_345)
    );
    // None is no length.
    assert_eq!(length(json!(0)).max_position_embeddings(), None);
    let config = RopeConfig::new(1e4, 64).unwrap();
    assert_eq!(config.max_position_embeddings(), None);
}

/// An error that misses a key says where else there are sizes, if anywhere.
#[test]
fn errors_name_parts_only_where_there_are_some() {
    let plain = error(json!({"model_type": "gptj"})).to_string();
    assert!(
        plain.contains("head_dim") && !plain.contains("looked in"),
        "{plain}"
    );
    let nested = json!({"model_type": "gptj", "decoder": {"hidden_size": 4096}});
    names(
        &error(nested),
        &["looked in the config itself, not in decoder"],
    );
}

#[test]
fn as_many_names_as_fit_a_message_are_listed() {
    let listed = |count: usize| {
        let known = (0..count).map(|i| format!("kind{i}")).collect();
        let layer_type = "another".to_string();
        ConfigError::UnknownLayerType { layer_type, known }.to_string()
    };
    assert!(listed(16).ends_with("kind14, kind15"), "{}", listed(16));
    assert!(listed(17).ends_with("kind15, 1 more"), "{}", listed(17));
    assert!(listed(40).ends_with("kind15, 24 more"), "{}", listed(40));
}

#[test]
fn heads_of_the_indexer() {
    let of = |dims: Value| {
        let config = json!({"model_type": "deepseek_v32", "index_head_dim": dims});
        ModelConfig::from_hf_config(&config.to_string())
            .and_then(|model| Ok(model.indexer()?.unwrap().head_dim()))
    };
    // 64 dims rotate.
    for dims in [64, 66, 1 << 14] {
        assert_eq!(of(json!(dims)), Ok(dims));
    }
    for dims in [62, (1 << 14) + 1, 1 << 20] {
        names(
            &of(json!(dims)).unwrap_err(),
            &["index_head_dim is", "from 64"],
        );
    }
}

/// Only vision towers have RoPE of the type "axial", and only they are looked for in `vision_config`.
#[test]
fn what_belongs_to_towers_alone() {
    let axial = llama(json!({"rope_parameters": {"rope_type": "axial", "rope_theta": 1e4}}));
    names(&error(axial), &["axial"]);
    let text = json!({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4});
    let with_text_in_its_place = llama(json!({"vision_config": text}));
    let read = model(with_text_in_its_place);
    names(
        &read.vision().unwrap_err(),
        &["vision_config of type \"llama\""],
    );
}

#[test]
fn null_counts_as_absent() {
    let nulls = llama(json!({
        "rope_scaling": null, "rope_parameters": null, "partial_rotary_factor": null,
        "head_dim": null, "original_max_position_embeddings": null, "text_config": null,
        "layer_types": null, "rope_interleave": null, "vision_config": null,
    }));
    assert_eq!(model(nulls), model(llama(json!({}))));
}

#[test]
fn builders_refuse_what_has_no_meaning() {
    for theta in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-300] {
        names(&RopeConfig::new(theta, 64).unwrap_err(), &["rope_theta"]);
    }
    let config = RopeConfig::new(1e4, 64).unwrap();
    for dim in [0, 3, 66, usize::MAX] {
        names(
            &config.clone().with_rotary_dim(dim).unwrap_err(),
            &["rotary_dim"],
        );
    }
    for scale in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        assert!(config.clone().with_score_scale(scale).is_err());
    }
    for value in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e300] {
        let yarn = |yarn: YarnScaling| config.clone().with_scaling(Scaling::Yarn(yarn));
        assert!(yarn(YarnScaling::new(value, 4096)).is_err());
        assert!(
            yarn(YarnScaling {
                beta_fast: value,
                ..YarnScaling::new(2.0, 4096)
            })
            .is_err()
        );
        let factor = Some(value);
        assert!(
            yarn(YarnScaling {
                attention_factor: factor,
                ..YarnScaling::new(2.0, 4096)
            })
            .is_err()
        );
        if value != f64::INFINITY && value != 1e300 {
            let divisors = vec![value; 32];
            assert!(config.clone().with_frequency_divisors(divisors).is_err());
        }
    }
    for rotated in [0.0, -0.5, 1.000_001, f64::NAN] {
        let part = phasor::config::ProportionalScaling {
            rotated,
            factor: 1.0,
        };
        let error = config.clone().with_scaling(Scaling::Proportional(part));
        names(
            &error.unwrap_err(),
            &["partial_rotary_factor is ", "at most 1"],
        );
    }
    // Bounds are allowed themselves.
    let with = |scaling| config.clone().with_scaling(scaling).unwrap().frequencies();
    let equal = YarnScaling {
        beta_fast: 3.0,
        beta_slow: 3.0,
        ..YarnScaling::new(2.0, 4096)
    };
    assert!(with(Scaling::Yarn(equal)).is_ok());
    let least = config.clone().with_frequency_divisors(vec![1e-18; 32]);
    assert!(least.is_ok());
    let odd = RopeConfig::new(1e4, 63).unwrap().frequencies().unwrap_err();
    names(&odd, &["head_dim is 63", "even"]);
    // Extremes that are allowed give frequencies, not NaN.
    for theta in [2.4e-10, 1.0, 1.000_001, f64::MAX] {
        let config = RopeConfig::new(theta, 64).unwrap();
        assert!(config.frequencies().is_ok(), "{theta}");
        let yarn = Scaling::Yarn(YarnScaling::new(1e18, 1));
        let scaled = config.with_scaling(yarn).unwrap().frequencies();
        assert_eq!(scaled.is_ok(), theta > 1.0, "{theta}: {scaled:?}");
    }
    for factor in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-31, 1e31] {
        let error = config.clone().with_attention_factor(factor).unwrap_err();
        names(&error, &["attention_factor is ", "from 1e-30 to 1e30"]);
    }
    let two = RopeConfig::new(1e4, 2).unwrap();
    let ntk = phasor::config::DynamicNtkScaling {
        factor: 2.0,
        max_position_embeddings: 8,
    };
    let two = two.with_scaling(Scaling::DynamicNtk(ntk)).unwrap();
    names(
        &two.frequencies_for_length(9).unwrap_err(),
        &["rotary_dim is 2"],
    );
}

/// Realistic configs of every kind of rule.
fn realistic() -> Vec<Value> {
    let factors: Vec<f64> = (0..32).map(|i| 1.0 + f64::from(i)).collect();
    let nested = json!({
        "full_attention": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    });
    vec![
        llama(
            json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 1024}}),
        ),
        llama(
            json!({"rope_scaling": {"type": "yarn", "factor": 40, "mscale": 1.0,
            "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1, "truncate": true,
            "attention_factor": 1.0, "original_max_position_embeddings": 1024}}),
        ),
        llama(json!({"rope_scaling": {"type": "dynamic", "factor": 2.0, "alpha": 0}})),
        llama(
            json!({"model_type": "phi3", "original_max_position_embeddings": 1024,
            "partial_rotary_factor": 1.0, "rope_scaling": {"type": "longrope",
            "short_factor": factors, "long_factor": factors, "short_mscale": 1.1}}),
        ),
        json!({"model_type": "gemma3_text", "head_dim": 64, "num_hidden_layers": 6,
            "max_position_embeddings": 4096, "query_pre_attn_scalar": 64, "rope_parameters": nested,
            "sliding_window_pattern": 6}),
        json!({"model_type": "gemma4_text", "head_dim": 32, "global_head_dim": 64,
            "num_hidden_layers": 6, "per_layer_config": {"5": {"head_dim": 64}}}),
        json!({"model_type": "deepseek_v3", "qk_rope_head_dim": 64, "qk_nope_head_dim": 128,
            "rope_interleave": true, "rope_theta": 1e4, "max_position_embeddings": 4096,
            "rope_scaling": {"type": "yarn", "factor": 40, "mscale_all_dim": 1.0}}),
        json!({"model_type": "gpt_neox", "hidden_size": 256, "num_attention_heads": 4,
            "rotary_pct": 0.25, "rotary_emb_base": 10000}),
        json!({"model_type": "gptj", "n_embd": 256, "n_head": 4, "rotary_dim": 32}),
        json!({"model_type": "smollm3", "head_dim": 64, "num_hidden_layers": 4,
            "no_rope_layers": [1, 1, 1, 0], "no_rope_layer_interval": 4, "layer_types":
            ["full_attention", "full_attention", "full_attention", "full_attention"]}),
        json!({"model_type": "qwen2_vl", "text_config": {"head_dim": 64, "rope_scaling":
            {"type": "mrope", "mrope_section": [8, 12, 12], "mrope_interleaved": false}},
            "vision_config": {"embed_dim": 320, "num_heads": 4}}),
        json!({"model_type": "granite_swa", "head_dim": 64, "attention_multiplier": 0.1,
            "layer_rope_theta": [10000, 0, 500.0]}),
        json!({"model_type": "gemma3_text", "head_dim": 64, "num_hidden_layers": 6,
            "rope_parameters": nested, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
        json!({"model_type": "cohere2_moe", "num_hidden_layers": 6, "first_k_dense_replace": 2,
            "prefix_dense_sliding_window_pattern": 1, "mlp_layer_types": ["dense", "sparse"]}),
        json!({"model_type": "lfm2", "num_hidden_layers": 4, "full_attn_idxs": [1, 3]}),
        json!({"model_type": "recurrent_gemma", "num_hidden_layers": 4,
            "block_types": ["recurrent", "attention"]}),
        json!({"model_type": "mllama_text_model", "num_hidden_layers": 4,
            "cross_attention_layers": [1]}),
        json!({"model_type": "made-up", "hidden_size": 256, "num_attention_heads": 4,
            "rotary_pct": 0.5, "rotary_emb_base": 1e4, "num_hidden_layers": 4, "alibi": false,
            "no_rope_layers": [1, 1, 1, 0], "no_rope_layer_interval": 4, "rotary_dim": 32}),
    ]
}

fn any_json() -> impl Strategy<Value = Value> {
    let number = prop_oneof![
        any::<f64>().prop_map(|n| json!(n)),
        any::<i64>().prop_map(|n| json!(n)),
        any::<u64>().prop_map(|n| json!(n)),
        prop::sample::select(vec![
            json!(0),
            json!(-1),
            json!(1e18),
            json!(0.5),
            json!(1e-300),
            json!(3)
        ]),
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(|flag| json!(flag)),
        number.clone(),
        "[a-z_0-9]{0,12}".prop_map(|text| json!(text)),
        prop::sample::select(vec![
            "yarn", "linear", "longrope", "llama3", "default", "llama"
        ])
        .prop_map(|text| json!(text)),
        prop::collection::vec(number, 0..40).prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec(("[a-z_]{0,12}", inner), 0..4).prop_map(Value::from_iter),
        ]
    })
}

/// Every path to a value in a config.
fn paths(value: &Value) -> Vec<String> {
    let mut found = Vec::new();
    let children: Vec<(String, &Value)> = match value {
        Value::Object(keys) => keys.iter().map(|(key, v)| (key.clone(), v)).collect(),
        Value::Array(entries) => entries
            .iter()
            .enumerate()
            .map(|(i, v)| (i.to_string(), v))
            .collect(),
        _ => return found,
    };
    for (key, child) in children {
        found.push(format!("/{key}"));
        found.extend(paths(child).into_iter().map(|path| format!("/{key}{path}")));
    }
    found
}

/// Whatever is read can be used, and whatever is not says why.
fn use_all(read: Result<ModelConfig, ConfigError>) {
    let model = match read {
        Ok(model) => model,
        Err(error) => {
            let text = error.to_string();
            assert!(!text.is_empty() && text.len() < 1000, "{text}");
            return;
        }
    };
    let _ = (
        model.rope(),
        model.vision(),
        model.rope_of_layer(0),
        model.rope_of_layer(usize::MAX),
    );
    for name in model.layer_types() {
        let config = model.rope_for(name).unwrap();
        assert!(config.score_scale() > 0.0);
        for length in [0, 1, 5000, u64::MAX] {
            let Ok(frequencies) = config.frequencies_for_length(length) else {
                continue;
            };
            assert_eq!(2 * frequencies.pairs(), config.rotary_dim());
            let (cos, sin) = frequencies.cos_sin(0, 12_345);
            assert!(cos.is_finite() && sin.is_finite());
        }
        let _ = (
            config.rope_for_lengths(&[5000, 9000]),
            config.rope_by_position(),
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn no_value_of_any_key_panics(
        which in any::<prop::sample::Index>(),
        path in any::<prop::sample::Index>(),
        value in any_json(),
    ) {
        let configs = realistic();
        let mut config = configs[which.index(configs.len())].clone();
        let paths = paths(&config);
        let path = &paths[path.index(paths.len())];
        *config.pointer_mut(path).unwrap() = value;
        use_all(ModelConfig::from_hf_config(&config.to_string()));
    }

    #[test]
    fn no_text_panics(text in any::<String>(), value in any_json()) {
        use_all(ModelConfig::from_hf_config(&text));
        use_all(ModelConfig::from_hf_config(&value.to_string()));
    }
}

#[test]
fn realistic_configs_are_read() {
    for config in realistic() {
        use_all(Ok(model(config)));
    }
}

/// Formulas of the papers in arbitrary precision.
struct Exact {
    constants: Consts,
    theta: BigFloat,
    dim: f64,
}

const BITS: usize = 256;
const NEAREST: RoundingMode = RoundingMode::ToEven;

fn big(x: f64) -> BigFloat {
    BigFloat::from_f64(x, BITS)
}

fn mul(a: &BigFloat, b: &BigFloat) -> BigFloat {
    a.mul(b, BITS, NEAREST)
}

fn div(a: &BigFloat, b: &BigFloat) -> BigFloat {
    a.div(b, BITS, NEAREST)
}

fn sub(a: &BigFloat, b: &BigFloat) -> BigFloat {
    a.sub(b, BITS, NEAREST)
}

impl Exact {
    fn new(theta: f64, dim: f64) -> Self {
        let constants = Consts::new().unwrap();
        Self {
            constants,
            theta: big(theta),
            dim,
        }
    }

    fn tau(&mut self) -> BigFloat {
        mul(&big(2.0), &self.constants.pi(BITS, NEAREST))
    }

    fn ln(&mut self, x: &BigFloat) -> BigFloat {
        x.ln(BITS, NEAREST, &mut self.constants)
    }

    /// theta^(-2i / dim)
    fn plain(&mut self, i: usize) -> BigFloat {
        let exponent = div(&big(-2.0 * i as f64), &big(self.dim));
        self.theta
            .pow(&exponent, BITS, NEAREST, &mut self.constants)
    }

    /// theta becomes `theta * stretch^(dim / (dim - 2))`.
    fn stretched(mut self, stretch: &BigFloat) -> Self {
        let exponent = div(&big(self.dim), &big(self.dim - 2.0));
        let power = stretch.pow(&exponent, BITS, NEAREST, &mut self.constants);
        self.theta = mul(&self.theta, &power);
        self
    }

    fn llama3(&mut self, i: usize, [factor, low, high, original]: [f64; 4]) -> BigFloat {
        let f = self.plain(i);
        let turns = div(&mul(&f, &big(original)), &self.tau());
        let interpolated = div(&f, &big(factor));
        if turns < big(low) {
            return interpolated;
        }
        if turns > big(high) {
            return f;
        }
        let smooth = div(&sub(&turns, &big(low)), &big(high - low));
        let rest = mul(&sub(&big(1.0), &smooth), &interpolated);
        rest.add(&mul(&smooth, &f), BITS, NEAREST)
    }

    /// Where a pair makes so many turns, without truncation.
    fn pair_of_turns(&mut self, turns: f64, original: f64) -> BigFloat {
        let tau = self.tau();
        let theta = self.theta.clone();
        let ln_theta = self.ln(&theta);
        let ratio = div(&big(original), &mul(&big(turns), &tau));
        let ln = self.ln(&ratio);
        div(&mul(&big(self.dim), &ln), &mul(&big(2.0), &ln_theta))
    }

    /// Blended between two pairs.
    fn yarn(&mut self, i: usize, factor: f64, low: &BigFloat, high: &BigFloat) -> BigFloat {
        let ramp = div(&sub(&big(i as f64), low), &sub(high, low));
        let ramp = if ramp < big(0.0) {
            big(0.0)
        } else if ramp > big(1.0) {
            big(1.0)
        } else {
            ramp
        };
        let f = self.plain(i);
        let kept = mul(&sub(&big(1.0), &ramp), &f);
        kept.add(&mul(&ramp, &div(&f, &big(factor))), BITS, NEAREST)
    }
}

/// Steps are within 0.5001 units of 2^-64 turn of the formula.
#[track_caller]
fn steps_are_exact(frequencies: &Frequencies, mut exact: impl FnMut(usize) -> BigFloat) {
    let tau = mul(&big(2.0), &Consts::new().unwrap().pi(BITS, NEAREST));
    for (pair, &step) in frequencies.steps().iter().enumerate() {
        let turns = div(&exact(pair), &tau);
        let units = mul(&turns, &big(2f64.powi(64)));
        let (high, low) = (
            (step >> 32) as f64 * 4294967296.0,
            (step & 0xffff_ffff) as f64,
        );
        let off = sub(&sub(&units, &big(high)), &big(low)).abs();
        assert!(off < big(0.5001), "pair {pair}: {off}");
    }
}

/// It is the only factor, whatever the scaling, and takes the place of the scaling's own.
#[test]
fn an_attention_factor_replaces_that_of_the_scaling() {
    let ones = vec![1.0; 32];
    let long_rope = LongRopeScaling {
        factor: Some(32.0),
        short_mscale: Some(1.5),
        ..LongRopeScaling::new(ones.clone(), vec![2.0; 32], 4096)
    };
    let yarn = YarnScaling::new(8.0, 4096);
    let ntk = phasor::config::DynamicNtkScaling {
        factor: 2.0,
        max_position_embeddings: 4096,
    };
    for scaling in [
        Scaling::None,
        Scaling::Linear(phasor::config::LinearScaling { factor: 2.0 }),
        Scaling::DynamicNtk(ntk),
        Scaling::NtkAlpha(phasor::config::NtkAlphaScaling { alpha: 10.0 }),
        Scaling::Yarn(yarn.clone()),
        Scaling::Yarn(YarnScaling {
            attention_factor: Some(1.75),
            ..yarn
        }),
        Scaling::LongRope(long_rope),
        Scaling::Llama3(phasor::config::Llama3Scaling::new(8.0, 1.0, 4.0, 8192)),
        Scaling::Proportional(phasor::config::ProportionalScaling {
            rotated: 0.5,
            factor: 1.0,
        }),
    ] {
        let plain = RopeConfig::new(1e4, 64).unwrap();
        let scaled = plain.clone().with_scaling(scaling.clone()).unwrap();
        assert_eq!(scaled.attention_factor(), None);
        for factor in [1.1, 1.0] {
            let first = plain.clone().with_attention_factor(factor).unwrap();
            let first = first.with_scaling(scaling.clone()).unwrap();
            let last = scaled.clone().with_attention_factor(factor).unwrap();
            assert_eq!(first, last);
            assert_eq!(last.attention_factor(), Some(factor));
            assert_eq!(last.score_scale(), scaled.score_scale());
            for length in [1, 4096, 4097, 100_000] {
                let of = |config: &RopeConfig| config.frequencies_for_length(length).unwrap();
                let expected = of(&scaled).with_attention_factor(factor as f32).unwrap();
                assert_eq!(of(&last), expected, "{scaling:?}, {length}");
            }
            if let Angles::Rows(rows) = last.rope_for_lengths(&[8192]).unwrap().angles() {
                assert_eq!(rows.attention_factors(), [factor as f32; 2]);
            }
        }
    }
}

/// Of three neighbours, the nearest to the exact value.
#[track_caller]
fn is_nearest(value: f64, exact: &BigFloat) {
    let off = |value: f64| sub(exact, &big(value)).abs();
    assert!(off(value) <= off(value.next_up()), "{value:e}");
    assert!(off(value) <= off(value.next_down()), "{value:e}");
}

#[test]
fn inverse_frequencies_are_those_asked_for() {
    let tau = mul(&big(2.0), &Consts::new().unwrap().pi(BITS, NEAREST));
    let unit = div(&tau, &big(2f64.powi(64)));
    for (theta, dim) in [(1e4, 128), (5e5, 64), (100.0, 72), (1e6, 256), (1.0, 8)] {
        let frequencies = Frequencies::from_theta(theta, dim).unwrap();
        let inv_freq = frequencies.inv_freq();
        let mut exact = Exact::new(theta, dim as f64);
        assert_eq!(inv_freq.len(), dim / 2);
        for (i, (&value, &step)) in inv_freq.iter().zip(frequencies.steps()).enumerate() {
            // Half a unit of the step, and half an ulp.
            let off = sub(&exact.plain(i), &big(value)).abs();
            let ulp = big(value.next_up() - value);
            let most = mul(&big(0.5001), &unit.add(&ulp, BITS, NEAREST));
            assert!(off < most, "theta {theta}, pair {i}: {off}");
            is_nearest(value, &mul(&unit, &big_integer(step)));
        }
    }
    // Row-major by axis, as steps are.
    let frequencies = Frequencies::from_theta(1e4, 8).unwrap();
    let on_axes = frequencies.clone().with_axes(2, &[0, 1, 0, 1]).unwrap();
    let f = frequencies.inv_freq();
    let expected = [f[0], 0.0, f[2], 0.0, 0.0, f[1], 0.0, f[3]];
    assert_eq!(on_axes.inv_freq(), expected);
    // Principal values: half a turn is positive, and beyond it the other way round is shorter.
    let of = |steps: &[u64]| Frequencies::from_steps(steps.to_vec()).unwrap().inv_freq();
    let pi = std::f64::consts::PI;
    assert_eq!(
        of(&[1 << 63, 1 << 62, 3 << 62, 0]),
        [pi, pi / 2.0, -pi / 2.0, 0.0]
    );
    let beyond = Frequencies::from_inv_freq(&[4.0, -4.0, 7.0]).unwrap();
    let wrapped = [4.0 - 2.0 * pi, 2.0 * pi - 4.0, 7.0 - 2.0 * pi];
    for (got, expected) in beyond.inv_freq().iter().zip(wrapped) {
        assert!((got - expected).abs() < 1e-15, "{got}");
    }
}

fn big_integer(n: u64) -> BigFloat {
    let (high, low) = (n >> 32, n & 0xffff_ffff);
    let high = mul(&big(high as f64), &big(4294967296.0));
    high.add(&big(low as f64), BITS, NEAREST)
}

proptest! {
    /// Any step, over all magnitudes and both ways of turning.
    #[test]
    fn inverse_frequencies_lead_back_to_their_steps(
        bits in any::<u64>(), shift in 0u32..64, backward in any::<bool>(),
    ) {
        let magnitude = bits >> shift;
        let step = if backward { magnitude.wrapping_neg() } else { magnitude };
        let inv_freq = Frequencies::from_steps(vec![step]).unwrap().inv_freq();
        prop_assert!(inv_freq[0].abs() <= std::f64::consts::PI);
        let tau = mul(&big(2.0), &Consts::new().unwrap().pi(BITS, NEAREST));
        let turns = div(&big_integer((step as i64).unsigned_abs()), &big(2f64.powi(64)));
        is_nearest(inv_freq[0].abs(), &mul(&turns, &tau));
        let back = Frequencies::from_inv_freq(&inv_freq).unwrap().steps()[0];
        let off = (back.wrapping_sub(step) as i64).unsigned_abs();
        let small = (step as i64).unsigned_abs() < 1 << 51;
        prop_assert!(off <= if small { 0 } else { 1 << 11 }, "{step}: {off}");
    }
}

#[test]
fn formulas_are_exact_to_the_last_step() {
    let of = |theta: f64, dim: usize, scaling: Scaling| {
        RopeConfig::new(theta, dim)
            .unwrap()
            .with_scaling(scaling)
            .unwrap()
    };
    let llama3 = phasor::config::Llama3Scaling::new(8.0, 1.0, 4.0, 8192);
    let config = of(500_000.0, 128, Scaling::Llama3(llama3));
    let mut exact = Exact::new(500_000.0, 128.0);
    let parameters = [8.0, 1.0, 4.0, 8192.0];
    steps_are_exact(&config.frequencies().unwrap(), |i| {
        exact.llama3(i, parameters)
    });

    let yarn = YarnScaling {
        truncate: false,
        ..YarnScaling::new(32.0, 4096)
    };
    let config = of(150_000.0, 64, Scaling::Yarn(yarn));
    let mut exact = Exact::new(150_000.0, 64.0);
    let frequencies = config.frequencies().unwrap();
    let (low, high) = (
        exact.pair_of_turns(32.0, 4096.0),
        exact.pair_of_turns(1.0, 4096.0),
    );
    steps_are_exact(&frequencies, |i| exact.yarn(i, 32.0, &low, &high));

    // Truncated to 4 and 21, of which the latter is more than the 15 that transformers allows for
    // 16 dims.
    let yarn = YarnScaling {
        beta_fast: 10_000.0,
        ..YarnScaling::new(8.0, 1_000_000)
    };
    let config = of(100.0, 16, Scaling::Yarn(yarn));
    let mut exact = Exact::new(100.0, 16.0);
    let frequencies = config.frequencies().unwrap();
    steps_are_exact(&frequencies, |i| exact.yarn(i, 8.0, &big(4.0), &big(15.0)));

    let ntk = phasor::config::DynamicNtkScaling {
        factor: 2.0,
        max_position_embeddings: 4096,
    };
    let config = of(10_000.0, 128, Scaling::DynamicNtk(ntk));
    // 2 * 10000 / 4096 - 1
    let stretch = sub(&div(&big(20_000.0), &big(4096.0)), &big(1.0));
    let mut exact = Exact::new(10_000.0, 128.0).stretched(&stretch);
    steps_are_exact(&config.frequencies_for_length(10_000).unwrap(), |i| {
        exact.plain(i)
    });

    let alpha = phasor::config::NtkAlphaScaling { alpha: 1000.0 };
    let config = of(10_000.0, 128, Scaling::NtkAlpha(alpha));
    let mut exact = Exact::new(10_000.0, 128.0).stretched(&big(1000.0));
    steps_are_exact(&config.frequencies().unwrap(), |i| exact.plain(i));

    let divisors: Vec<f64> = (0..48).map(|i| 1.0 + 0.37 * f64::from(i)).collect();
    let long = LongRopeScaling::new(divisors.clone(), divisors.clone(), 4096);
    let config = of(10_000.0, 96, Scaling::LongRope(long));
    let mut exact = Exact::new(10_000.0, 96.0);
    let frequencies = config.frequencies_for_length(1).unwrap();
    steps_are_exact(&frequencies, |i| div(&exact.plain(i), &big(divisors[i])));
}
