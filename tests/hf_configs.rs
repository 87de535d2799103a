//! Hugging Face configs as their files are written: numbers that only Python writes, keys that
//! transformers' config classes convert in their own code, and keys that mean another rotation.
//!
//! Values are what transformers 5.23.0 makes of the same configs (`scripts/goldens`
//! `/transformers-sweep.py` compares many more).

use phasor::config::{Axes, ConfigError, ModelConfig, RopeConfig, Scaling};
use phasor::{Frequencies, Pairing};
use serde_json::{Value, json};

fn read(config: &Value) -> Result<ModelConfig, ConfigError> {
    ModelConfig::from_hf_config(&config.to_string())
}

#[track_caller]
fn model(config: Value) -> ModelConfig {
    read(&config).unwrap_or_else(|error| panic!("{config}: {error}"))
}

#[track_caller]
fn error(config: Value) -> ConfigError {
    match read(&config) {
        Ok(model) => panic!("{config} is taken: {model:?}"),
        Err(error) => error,
    }
}

#[track_caller]
fn names(error: &ConfigError, parts: &[&str]) {
    let text = error.to_string();
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
}

fn put_over(mut config: Value, over: Value) -> Value {
    for (key, value) in over.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

/// Radians per position of the second pair and the last one.
fn second_and_last(frequencies: &Frequencies) -> (f64, f64) {
    let radians = frequencies.inv_freq();
    (radians[1], radians[frequencies.pairs() - 1])
}

#[track_caller]
fn turns(rope: &RopeConfig, pairs: usize, second: f64, last: f64) {
    let frequencies = rope.frequencies().unwrap();
    let ours = second_and_last(&frequencies);
    assert_eq!(frequencies.pairs(), pairs);
    for (ours, theirs) in [(ours.0, second), (ours.1, last)] {
        assert!((ours - theirs).abs() <= 1e-6 * theirs, "{ours} {theirs}");
    }
}

/// The kind of each layer, by its place in `layer_types`; `None` where it does not rotate.
fn layers(model: &ModelConfig, count: usize) -> Vec<Option<usize>> {
    let kind = |layer| {
        let rope = model.rope_of_layer(layer).unwrap()?;
        let names = model.layer_types();
        names
            .iter()
            .position(|name| model.rope_for(name).unwrap() == rope)
    };
    (0..count).map(kind).collect()
}

/// Falcon-H1, Bamba, Granite hybrid and Nemotron-H ship the first of these.
#[test]
fn numbers_as_python_writes_them() {
    let with = |extra: &str| {
        let json = format!(
            r#"{{"model_type": "falcon_h1", "hidden_size": 1024, "num_attention_heads": 8,
                "rope_theta": 100000000000.0, {extra}}}"#
        );
        ModelConfig::from_hf_config(&json)
    };
    for extra in [
        r#""time_step_limit": [0.0, Infinity]"#,
        r#""time_step_limit": [-Infinity, NaN]"#,
        r#""time_step_limit": {"__float__": "Infinity"}"#,
        r#""mup": {"nested": [1e400, -1e400, NaN]}, "text": "Infinity: \"NaN\"""#,
        r#""special": "\ud83d", "time_step_max": 1e999"#,
        r#""max_position_embeddings": 1e30"#,
        r#""max_position_embeddings": Infinity"#,
        r#""max_position_embeddings": -1"#,
        r#""max_position_embeddings": 2048.5"#,
    ] {
        let model = with(extra).unwrap_or_else(|error| panic!("{extra}: {error}"));
        let rope = model.rope().unwrap();
        assert_eq!((rope.head_dim(), rope.theta()), (128, 1e11), "{extra}");
        assert_eq!(rope.max_position_embeddings(), None);
    }
    // Where one is of a key that counts, the error names it.
    for (extra, part) in [
        (r#""rope_theta": Infinity"#, "rope_theta is Infinity"),
        (r#""rope_theta": {"__float__": "NaN"}"#, "rope_theta is NaN"),
        (r#""head_dim": 1e400"#, "head_dim is 1e400"),
        (r#""model_type": NaN"#, "model_type is NaN"),
        (
            r#""layer_types": ["full_attention", NaN]"#,
            "layer_types[1] is NaN",
        ),
        (
            r#""rope_scaling": {"type": "linear", "factor": Infinity}"#,
            "rope_scaling.factor is Infinity",
        ),
        (r#""rope_scaling": Infinity"#, "rope_scaling is Infinity"),
        (
            r#""rope_scaling": {"type": -Infinity, "factor": 2}"#,
            "rope_scaling.type is -Infinity",
        ),
        (
            r#""rope_scaling": {"type": "longrope", "short_factor": [NaN], "long_factor": [1]}"#,
            "rope_scaling.short_factor[0] is NaN",
        ),
        (
            r#""max_position_embeddings": 1e30, "rope_scaling": {"type": "dynamic", "factor": 2}"#,
            "max_position_embeddings is 1e+30",
        ),
        (
            r#""max_position_embeddings": "x""#,
            "max_position_embeddings is \"x\"",
        ),
    ] {
        names(&with(extra).unwrap_err(), &[part]);
    }
    // A table with other keys as well is one.
    let scaled = with(r#""rope_scaling": {"__float__": "NaN", "type": "linear", "factor": 2}"#);
    let scaled = scaled.unwrap();
    assert!(
        matches!(scaled.rope().unwrap().scaling(), Scaling::Linear(linear) if linear.factor == 2.0)
    );
    // Neither Python nor JSON.
    for number in ["nan", "Inf", "+1", "[NaN", "-.1e999", "-e999"] {
        let extra = &format!("\"a\": {number}");
        let error = with(extra).unwrap_err();
        assert!(matches!(error, ConfigError::NotJson { .. }), "{error}");
    }
}

#[test]
fn compress_ratios_of_deepseek_v4() {
    let config = json!({"model_type": "deepseek_v4", "num_hidden_layers": 5, "head_dim": 512,
        "qk_rope_head_dim": 64, "compress_ratios": [0, 0, 4, 128, 4, 0], "rope_theta": 10000,
        "compress_rope_theta": 160000, "rope_scaling": {"type": "yarn", "factor": 16,
            "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1}});
    let read = model(config.clone());
    assert_eq!(
        layers(&read, 5),
        [Some(0), Some(0), Some(1), Some(1), Some(1)]
    );
    assert!(matches!(
        read.rope_of_layer(5),
        Err(ConfigError::NoSuchLayer { .. })
    ));
    let (main, compress) = (
        read.rope_for("main").unwrap(),
        read.rope_for("compress").unwrap(),
    );
    assert_eq!((main.theta(), main.scaling()), (1e4, &Scaling::None));
    assert!(matches!(compress.scaling(), Scaling::Yarn(_)));
    for (rope, second, last) in [
        (main, 0.7498942017555237, 0.0001333521504420787),
        (compress, 0.687656044960022, 5.680529397977807e-07),
    ] {
        turns(rope, 32, second, last);
        assert_eq!((rope.head_dim(), rope.rotary_offset()), (512, 448));
        assert_eq!(rope.frequencies().unwrap().attention_factor(), 1.0);
    }
    // A flat table of the new spelling says the same, and theta in it nothing.
    let mut new = config.clone();
    new["rope_parameters"] = new["rope_scaling"].take();
    new["rope_parameters"]["rope_theta"] = json!(5.0);
    assert_eq!(layers(&model(new.clone()), 5), layers(&read, 5));
    assert_eq!(model(new).rope_for("compress"), read.rope_for("compress"));
    // Types of layers stand before ratios, and are cut as well.
    let types = json!({"layer_types": ["heavily_compressed_attention", "sliding_attention",
        "compressed_sparse_attention", "sliding_attention", "sliding_attention", "moe"]});
    let typed = model(put_over(config.clone(), types));
    assert_eq!(
        layers(&typed, 5),
        [Some(1), Some(0), Some(1), Some(0), Some(0)]
    );
    // Without either, all layers compress; without a number of layers, as many as there are ratios.
    let neither = model(put_over(config.clone(), json!({"compress_ratios": null})));
    assert_eq!(layers(&neither, 5), [Some(1); 5]);
    let all = model(put_over(config.clone(), json!({"num_hidden_layers": null})));
    assert_eq!(layers(&all, 6)[5], Some(0));
    for (over, parts) in [
        (
            json!({"compress_ratios": [0, 4]}),
            ["compress_ratios", "at least 5"],
        ),
        (
            json!({"compress_ratios": [0, "x"]}),
            ["compress_ratios[1] is \"x\"", "whole"],
        ),
        (
            json!({"rope_scaling": null, "rope_parameters": {"main": {"rope_theta": 1e4}}}),
            ["rope_parameters.compress is missing", "tables"],
        ),
        (
            json!({"rope_scaling": null, "rope_parameters": {"main": null, "compress": {}}}),
            ["rope_parameters.main is missing", "tables"],
        ),
        (
            json!({"rope_scaling": null, "rope_parameters": {"main": {}, "compress": {}}}),
            ["partial_rotary_factor is missing", "table"],
        ),
    ] {
        names(&error(put_over(config.clone(), over)), &parts);
    }
    // The part that rotates is a key of its own in newer files.
    let part = model(json!({"model_type": "deepseek_v4", "num_hidden_layers": 2,
        "qk_rope_head_dim": 32, "head_dim": 256}));
    turns(
        part.rope_for("main").unwrap(),
        16,
        0.5623413324356079,
        0.00017782794020604342,
    );
}

/// What other classes convert or fill in.
#[test]
fn layers_by_the_rules_of_config_classes() {
    let none = None;
    for (config, expected) in [
        (
            json!({"model_type": "muse_glimmer_text", "num_hidden_layers": 6}),
            vec![Some(0), none, Some(0), Some(0), Some(0), none],
        ),
        (
            json!({"model_type": "muse_spark_text", "num_hidden_layers": 5}),
            vec![none, Some(0), Some(0), Some(0), none],
        ),
        (
            json!({"model_type": "flint", "num_hidden_layers": 8}),
            vec![none, none, Some(0), Some(0), Some(0), none, Some(0), none],
        ),
        (
            json!({"model_type": "lfm3", "num_hidden_layers": 7}),
            vec![none, none, Some(1), none, Some(0), none, Some(1)],
        ),
        // Its class does not look at the pattern, and the last layer attends to everything.
        (
            json!({"model_type": "gemma4_text", "num_hidden_layers": 4, "sliding_window_pattern": 2}),
            vec![Some(0), Some(0), Some(0), Some(1)],
        ),
        (
            json!({"model_type": "gemma4_text", "layer_types": ["full_attention",
                "sliding_attention", "sliding_attention", "sliding_attention"]}),
            vec![Some(1), Some(0), Some(0), Some(1)],
        ),
        // Names that transformers has replaced.
        (
            json!({"model_type": "cohere2", "layer_types": ["sliding_attention", "attention",
                "mamba", "sliding_attention"]}),
            vec![Some(0), none, none, Some(0)],
        ),
        // Layers across to another input are listed apart from types.
        (
            json!({"model_type": "mllama_text_model", "num_hidden_layers": 3,
                "cross_attention_layers": [1], "layer_types": ["full_attention", "full_attention",
                "linear_attention"]}),
            vec![Some(0), none, Some(0)],
        ),
        // A table for its layers of full attention makes them rotate.
        (
            json!({"model_type": "beam", "num_hidden_layers": 6}),
            vec![Some(0), Some(0), Some(0), Some(0), Some(0), none],
        ),
        (
            json!({"model_type": "beam", "num_hidden_layers": 6, "rope_parameters": {
                "full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}}),
            vec![Some(1), Some(1), Some(1), Some(1), Some(1), Some(0)],
        ),
    ] {
        let read = model(config.clone());
        assert_eq!(layers(&read, expected.len()), expected, "{config}");
    }
    // Types without a name of their own in the config can be asked for.
    for (model_type, name) in [
        ("cwm", "sliding_attention"),
        ("gemma2", "full_attention"),
        ("gpt_oss", "sliding_attention"),
        ("deepseek_v32", "indexed_attention"),
        ("glm_moe_dsa", "indexed_attention"),
    ] {
        let read = model(json!({"model_type": model_type, "num_hidden_layers": 8}));
        assert_eq!(read.rope_for(name), read.rope(), "{model_type}");
    }
}

#[test]
fn lists_with_an_entry_per_layer() {
    let step = json!({"model_type": "step3p5", "num_hidden_layers": 4,
        "num_nextn_predict_layers": 2, "head_dim": 128, "layer_types": ["full_attention",
            "sliding_attention", "sliding_attention", "sliding_attention", "full_attention",
            "sliding_attention"],
        "rope_theta": [5e6, 1e4, 1e4, 1e4, 5e6, 1e4], "yarn_only_types": ["full_attention"],
        "partial_rotary_factors": [0.5, 1.0, 1.0, 1.0, 0.5, 1.0], "use_rope_layers": [],
        "rope_scaling": {"rope_type": "llama3", "factor": 2.0,
            "original_max_position_embeddings": 131072, "low_freq_factor": 1.0,
            "high_freq_factor": 32.0}});
    let read = model(step.clone());
    assert_eq!(layers(&read, 4), [Some(0), Some(1), Some(1), Some(1)]);
    let full = read.rope_for("full_attention").unwrap();
    turns(full, 32, 0.6175287365913391, 1.6193577323520003e-07);
    let sliding = read.rope_for("sliding_attention").unwrap();
    turns(sliding, 64, 0.8659643530845642, 0.00011547819303814322);
    assert_eq!(full.score_scale(), 128f64.sqrt().recip());
    // The table is about one type: what is beside it is not its, nor is the older name of its type.
    let beside = json!({"original_max_position_embeddings": 4096});
    let beside = model(put_over(step.clone(), beside));
    assert_eq!(beside.rope_for("full_attention").unwrap(), full);
    let older = json!({"rope_scaling": {"type": "linear", "factor": 2.0}});
    let older = model(put_over(step.clone(), older));
    let older = older.rope_for("full_attention").unwrap();
    assert_eq!(older.scaling(), &Scaling::None);
    let scaled = model(put_over(step.clone(), json!({"query_pre_attn_scalar": 64})));
    assert_eq!(
        scaled.rope_for("full_attention").unwrap().score_scale(),
        0.125
    );
    for (over, parts) in [
        (
            json!({"rope_theta": [5e6, 1e4, 1e4, 2e4]}),
            vec!["rope_theta is", "one number", "sliding_attention"],
        ),
        (
            json!({"rope_theta": [5e6, 1e4]}),
            vec!["rope_theta is", "a list of 4"],
        ),
        (
            json!({"rope_theta": [5e6, "x", 1e4, 1e4]}),
            vec!["rope_theta[1] is \"x\""],
        ),
        (
            json!({"partial_rotary_factors": [0.5]}),
            vec!["partial_rotary_factors"],
        ),
        (
            json!({"yarn_only_types": ["sliding_attention"]}),
            vec!["yarn_only_types"],
        ),
        (
            json!({"use_rope_layers": [true, false]}),
            vec!["use_rope_layers"],
        ),
        (
            json!({"layer_types": null, "num_hidden_layers": null}),
            vec!["num_hidden_layers is missing", "rope_theta"],
        ),
        (
            json!({"rope_parameters": {"rope_type": "default"}, "rope_scaling": null}),
            vec!["rope_parameters", "a table for each"],
        ),
    ] {
        names(&error(put_over(step.clone(), over)), &parts);
    }

    let ultrabert = model(
        json!({"model_type": "ultrabert", "num_hidden_layers": 4, "head_dim": 64,
        "attention_windows": [0, 128, 128, null], "rope_theta": [160000.0, 10000.0, 10000.0, 160000.0]}),
    );
    assert_eq!(layers(&ultrabert, 4), [Some(1), Some(0), Some(0), Some(1)]);
    let full = ultrabert.rope_for("full_attention").unwrap();
    turns(full, 32, 0.687656044960022, 9.088847036764491e-06);
}

/// Where types of layers are not listed, they are by a rule; here each type has a table.
#[test]
fn types_by_the_rules_of_config_classes() {
    let tables = json!({"full_attention": {"rope_type": "default", "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}});
    let (full, sliding) = (Some(5e5), Some(1e4));
    for (model_type, expected) in [
        (
            "granite_swa",
            [full, sliding, sliding, sliding, full, sliding],
        ),
        (
            "muse_glimmer_text",
            [sliding, None, sliding, sliding, sliding, None],
        ),
        ("gemma2", [sliding, full, sliding, full, sliding, full]),
    ] {
        let read = model(json!({"model_type": model_type, "num_hidden_layers": 6,
            "rope_parameters": tables}));
        let theta = |layer| read.rope_of_layer(layer).unwrap().map(RopeConfig::theta);
        assert_eq!([0, 1, 2, 3, 4, 5].map(theta), expected, "{model_type}");
    }
    // And where each layer has a theta, those of one theta are alike.
    let read = model(json!({"model_type": "granite_swa", "num_hidden_layers": 4,
        "layer_rope_theta": [1e4, 0, 500.0, 1e4]}));
    let theta = |layer| read.rope_of_layer(layer).unwrap().map(RopeConfig::theta);
    assert_eq!(
        [0, 1, 2, 3].map(theta),
        [sliding, None, Some(500.0), sliding]
    );
    // As many as any model has, and one more.
    let of = |kinds: usize| {
        let thetas: Vec<usize> = (0..kinds).map(|kind| 10_000 + kind).collect();
        json!({"model_type": "granite_swa", "num_hidden_layers": kinds, "layer_rope_theta": thetas})
    };
    assert!(model(of(64)).rope_of_layer(63).is_ok());
    names(
        &error(of(65)),
        &["layer_rope_theta", "at most 64 different numbers"],
    );
}

#[test]
fn sizes_and_defaults_of_config_classes() {
    for (config, name, pairs, second, last) in [
        (
            json!({"model_type": "nomic_bert", "hidden_size": 1024, "num_attention_heads": 8}),
            None,
            64,
            0.8976871371269226,
            0.0011139739071950316,
        ),
        // These derive the size of a head whatever the config says.
        (
            json!({"model_type": "deepseek_ocr2_text", "hidden_size": 1024,
                "num_attention_heads": 8, "head_dim": 64}),
            None,
            64,
            0.8659643530845642,
            0.00011547819303814322,
        ),
        (
            json!({"model_type": "mimo_v2_flash", "num_hidden_layers": 2, "partial_rotary_factor": 0.5}),
            Some("full_attention"),
            32,
            0.6175287365913391,
            3.2387154647040006e-07,
        ),
        // A table without theta is not the default table.
        (
            json!({"model_type": "ministral3", "rope_parameters": {"rope_type": "default"}}),
            None,
            64,
            0.8659643530845642,
            0.00011547819303814322,
        ),
        (
            json!({"model_type": "diffusion_gemma_text", "rope_parameters": {
                "sliding_attention": {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
                "full_attention": {"rope_theta": 1e6}}}),
            Some("sliding_attention"),
            64,
            0.8659643530845642,
            0.00011547819303814322,
        ),
        (
            json!({"model_type": "lfm3", "rope_parameters": {
                "sliding_attention": {"rope_type": "default"}, "full_attention": {"rope_type": "default"}}}),
            Some("sliding_attention"),
            64,
            0.8058422207832336,
            1.2409377632138785e-06,
        ),
    ] {
        let read = model(config.clone());
        let rope = match name {
            Some(name) => read.rope_for(name).unwrap(),
            None => read.rope().unwrap(),
        };
        println!("{config}");
        turns(rope, pairs, second, last);
    }
}

/// Not "does not rotate": transformers stops at such a config.
#[test]
fn a_table_for_only_one_of_two_kinds() {
    let types = json!(["full_attention", "sliding_attention"]);
    let one = json!({"full_attention": {"rope_type": "default", "rope_theta": 1e6}});
    for model_type in [
        "llama",
        "gemma4_text",
        "laguna",
        "mellum",
        "mimo_v2_flash",
        "made-up",
        "lfm3",
    ] {
        let mut config = json!({"model_type": model_type, "head_dim": 64, "num_hidden_layers": 2,
            "layer_types": types, "rope_parameters": one});
        if model_type == "mimo_v2_flash" {
            config["head_dim"] = json!(192);
        }
        if model_type == "gemma4_text" {
            config["layer_types"] = json!(["sliding_attention", "full_attention"]);
        }
        names(
            &error(config.clone()),
            &["rope_parameters.sliding_attention is missing", "null"],
        );
        // An explicit null says that those layers do not rotate.
        config["rope_parameters"]["sliding_attention"] = Value::Null;
        let read = model(config.clone());
        assert_eq!(layers(&read, 2).iter().flatten().count(), 1, "{config}");
        // Without a layer of that kind nothing is missing.
        config["rope_parameters"] = one.clone();
        config["layer_types"] = json!(["full_attention", "full_attention"]);
        assert_eq!(layers(&model(config), 2), [Some(0), Some(0)]);
    }
    // Classes that fill the other table in.
    for model_type in ["gemma3_text", "gemma3n_text", "olmo3", "modernbert"] {
        let read = model(
            json!({"model_type": model_type, "head_dim": 64, "num_hidden_layers": 2,
            "layer_types": types, "rope_parameters": one}),
        );
        assert_eq!(layers(&read, 2).iter().flatten().count(), 2, "{model_type}");
    }
    // A type of layer that the family does not have.
    for model_type in ["gemma3_text", "cohere2", "exaone4"] {
        let odd = json!({"model_type": model_type, "head_dim": 64, "layer_types":
            ["sliding_attention", "global_attention"]});
        names(&error(odd), &["layer_types[1] is \"global_attention\""]);
    }
}

fn unknown(over: Value) -> Value {
    let config = json!({"model_type": "made-up", "hidden_size": 1024, "num_attention_heads": 8,
        "rope_theta": 1e4, "num_hidden_layers": 4});
    put_over(config, over)
}

/// What such keys mean depends on the family: read as plain rotation they would be silently wrong.
#[test]
fn keys_of_unknown_families_that_bear_on_position() {
    for (key, value) in [
        ("use_dynamic_ntk", json!(true)),
        ("rope_scaling_factor", json!(2.0)),
        ("use_rope", json!(false)),
        ("position_embedding_type", json!("alibi")),
        ("position_embedding_type", json!("nope")),
        ("position_embedding_type", json!("absolute")),
        ("nope_layer_interval", json!(4)),
        ("use_rope_layers", json!([true, false])),
        ("rope_ratio", json!(50)),
        ("rope_local_base_freq", json!(1e4)),
        ("local_rope_theta", json!(1e4)),
        ("swa_rope_theta", json!(1e4)),
        ("swa_head_dim", json!(64)),
        ("global_head_dim", json!(512)),
        ("compress_ratios", json!([0, 4])),
        ("rotary_percentage", json!(0.5)),
        ("rotary_base", json!(1e6)),
        ("rotary_interleaved", json!(true)),
        ("rotary", json!({"base": 10000, "type": "dynamic"})),
        ("rope", json!(false)),
        ("ropeBase", json!(1e6)),
        ("RoPEBase", json!(1e6)),
        ("attnRopeScale", json!(2)),
        ("layer2RopeScale", json!(2)),
        ("v2Positions", json!(2)),
        ("theta", json!(1e6)),
        ("xrope_section", json!([1, 2, 3])),
        ("mrope_section", json!([16, 24, 24])),
        ("use_mrope", json!(true)),
        ("yarn_factor", json!(4)),
        ("ntk_alpha", json!(1000)),
        ("use_xpos", json!(true)),
        ("pos_emb", json!("alibi")),
        ("nope_layers", json!([3])),
        ("position_interpolation", json!(4)),
        ("full_attention_rope", json!(false)),
        ("layer_rope", json!([1, 0])),
    ] {
        let config = unknown(json!({key: value}));
        names(
            &error(config.clone()),
            &[key, "made-up", "from_hf_config_ignoring"],
        );
        // The caller may know better.
        let text = config.to_string();
        let read = ModelConfig::from_hf_config_ignoring(&text, &["other", key]).unwrap();
        assert_eq!(Ok(read.rope().unwrap()), model(unknown(json!({}))).rope());
        // Null is as if it were absent.
        model(unknown(json!({key: null})));
    }
    // In objects, and in the table of RoPE parameters.
    for (over, path) in [
        (
            json!({"attn_config": {"rope_theta": 1e6}}),
            "attn_config.rope_theta",
        ),
        (
            json!({"attention": {"rotary_dim": 32}}),
            "attention.rotary_dim",
        ),
        (json!({"rope_config": {"base": 1e6}}), "rope_config"),
        (
            json!({"rope_scaling": {"type": "linear", "factor": 2, "ramp": 3}}),
            "rope_scaling.ramp",
        ),
        (
            json!({"rope_parameters": {"full_attention": {"rope_theta": 1e4, "xdrope_section": [1]}}}),
            "rope_parameters.full_attention.xdrope_section",
        ),
    ] {
        let config = unknown(over);
        names(&error(config.clone()), &[path, "family"]);
        let read = ModelConfig::from_hf_config_ignoring(&config.to_string(), &[path]);
        assert!(read.is_ok(), "{path}");
    }
    // The part of a config that is not known, inside one that names itself.
    let inside = json!({"model_type": "llava", "text_config": unknown(json!({"use_rope": false}))});
    names(&error(inside.clone()), &["text_config.use_rope"]);
    let read = ModelConfig::from_hf_config_ignoring(&inside.to_string(), &["text_config.use_rope"]);
    assert!(read.is_ok());
    // A family that is known says itself what counts.
    model(json!({"model_type": "llama", "head_dim": 64, "use_dynamic_ntk": true}));
    for key in ["alibi", "use_alibi"] {
        let alibi = error(unknown(json!({key: true})));
        assert!(matches!(alibi, ConfigError::NoRotation { .. }), "{alibi}");
        names(&alibi, &[key]);
    }
}

/// Keys of published configs of families that are not known here, which leave the rotation as it is.
#[test]
fn keys_that_do_not_change_the_rotation() {
    let plain = model(unknown(json!({})));
    for over in [
        // LLaDA
        json!({"alibi": false, "rope": true, "rope_full_precision": true, "n_kv_heads": 8,
            "attention_layer_norm": false, "max_sequence_length": 4096}),
        // Dream, SDAR and other relatives of Qwen
        json!({"sliding_window": null, "use_sliding_window": false, "max_window_layers": 28,
            "use_mrope": false, "rope_scaling": null}),
        // StableLM's first
        json!({"rope_pct": 1.0, "rotary_scaling_factor": 1.0, "use_qkv_bias": true}),
        // GPT-J's relatives
        json!({"rotary": true, "scale_attn_weights": true}),
        // BERT's relatives with RoPE
        json!({"position_embedding_type": "rope", "type_vocab_size": 2}),
        json!({"position_embedding_type": "RoPE"}),
        // Qwen v1's relatives
        json!({"use_dynamic_ntk": false, "use_logn_attn": false}),
        // Others
        json!({"sliding_window": 4096, "swa_window_size": 128, "add_swa_attention_sink_bias": true,
            "max_positions": 2048, "use_rope": true, "use_nope": false}),
        json!({"europe": 1, "property": 2, "decomposition": 3, "dropout": 0.1, "purpose": "x",
            "scope": 1, "swap": 2, "metatheta_": null}),
        json!({"quantization_config": {"rotary": 1}, "vision_config": {"rope_theta": 1e2},
            "id2label": {"rope": "position"}, "auto_map": {"rope": "x"}}),
        // (Words that end with a capital.)
        json!({"someA": 1, "some2A": 1, "A": 1}),
        json!({"rope_scaling": {"type": "default", "finetuned": true, "factor": null}}),
    ] {
        let read = model(unknown(over.clone()));
        let (ours, plain) = (read.rope().unwrap(), plain.rope().unwrap());
        assert_eq!(ours.frequencies(), plain.frequencies(), "{over}");
        assert_eq!(ours.pairing(), Pairing::HalfSplit);
    }
}

#[test]
fn long_strings_are_cut() {
    let long = "x".repeat(50_000);
    for config in [
        json!({"model_type": long}),
        json!({"model_type": long, "head_dim": 64, "rope_theta": 1e4, "alibi": true}),
        json!({"model_type": long, "head_dim": 64, "rope_theta": 1e4, "no_rope_layers": [0]}),
        json!({"model_type": "llama", "rope_scaling": {"type": long}}),
        json!({"model_type": "llama", "layer_types": [long], "rope_parameters": {"a": {}, "b": {}}}),
        json!({"model_type": "gemma3_text", "layer_types": [long]}),
        json!({"model_type": "cohere2", "layer_types": [long]}),
        json!({"head_dim": 64, "rope_theta": 1e4, format!("rope_{long}"): 1}),
        json!({"head_dim": 64, "rope_parameters": {long.clone(): {"rope_theta": "x"}}}),
        json!({"head_dim": 64, "rope_theta": 1e4, long.clone(): {"rope": 1}}),
        json!({"head_dim": 64, "layer_types": [long, "a"], "rope_parameters": {"a": {"rope_theta": 1}}}),
        json!({"head_dim": 64, "rope_theta": 1e4, "layer_types": [long, "a"],
            "rope_parameters": {long.clone(): {"rope_theta": 10.0}, "a": {"rope_theta": 20.0}}}),
    ] {
        let said = match read(&config) {
            Ok(model) => model
                .rope()
                .map(|_| ())
                .and(model.rope_for(&long).map(|_| ())),
            Err(error) => Err(error),
        };
        if let Err(error) = said {
            let text = error.to_string();
            assert!(text.len() < 700, "{} {text}", text.len());
        }
    }
    let digits = format!(
        "{{\"model_type\": \"llama\", \"rope_theta\": 1{}}}",
        "0".repeat(5000)
    );
    let error = ModelConfig::from_hf_config(&digits).unwrap_err();
    assert!(error.to_string().len() < 200);
}

/// theta as in Qwen v1's code: 2^(ceil(log2(length / seq_length)) + 1) - 1 to the power d / (d - 2).
#[test]
fn the_first_qwen() {
    let qwen = |over: Value| {
        let config = json!({"model_type": "qwen", "hidden_size": 4096, "num_attention_heads": 32,
            "kv_channels": 128, "rotary_pct": 1.0, "rotary_emb_base": 10000, "seq_length": 8192,
            "use_dynamic_ntk": true, "use_logn_attn": true, "max_position_embeddings": 32768,
            "num_hidden_layers": 32});
        put_over(config, over)
    };
    let other = json!({"rotary_emb_base": 5e5, "kv_channels": 64});
    let other = model(qwen(other));
    let other = other.rope().unwrap();
    assert_eq!((other.theta(), other.head_dim()), (5e5, 64));
    let read = model(qwen(json!({})));
    let rope = read.rope().unwrap();
    assert_eq!(rope.pairing(), Pairing::HalfSplit);
    assert!(rope.depends_on_length());
    assert!(matches!(
        rope.rope(),
        Err(ConfigError::DependsOnLength { .. })
    ));
    for (length, theta) in [
        (1, 10_000.0),
        (8192, 10_000.0),
        (8193, 30_527.736_748_806_7),
        (16_384, 30_527.736_748_806_7),
        (16_385, 72_195.860_086_509_38),
        (32_768, 72_195.860_086_509_38),
    ] {
        let second = rope.frequencies_for_length(length).unwrap().inv_freq()[1];
        let theirs = f64::powf(theta, -1.0 / 64.0);
        assert!(
            (second / theirs - 1.0).abs() < 1e-9,
            "{length} {second} {theirs}"
        );
    }
    assert!(rope.frequencies_for_length(u64::MAX).is_ok());
    // A row for each length beyond the first.
    let rows = rope.rope_for_lengths(&[16_384, 100]).unwrap();
    assert_eq!(rows.row_for_length(8192).unwrap(), Some(0));
    assert_eq!(rows.row_for_length(8193).unwrap(), Some(1));
    let plain = model(qwen(json!({"use_dynamic_ntk": false, "seq_length": null})));
    assert_eq!(plain.rope().unwrap().scaling(), &Scaling::None);
    let part = model(qwen(json!({"rotary_pct": 0.5})));
    assert_eq!(part.rope().unwrap().rotary_dim(), 64);
    names(
        &error(qwen(json!({"seq_length": null}))),
        &["seq_length is missing", "use_dynamic_ntk"],
    );
}

/// With a plain layout the rotation would turn the wrong dims.
#[test]
fn trailing_dims_need_a_layout_that_skips_the_others() {
    let read = model(json!({"model_type": "deepseek_v4", "num_hidden_layers": 2}));
    for name in ["main", "compress"] {
        let config = read.rope_for(name).unwrap();
        for refused in [
            config.rope(),
            config.rope_for_length(100),
            config.rope_for_lengths(&[100]),
            config.rope_by_position(),
            config.clone().with_layout_offset(0).rope(),
            config.clone().with_layout_offset(64).rope(),
        ] {
            let error = refused.unwrap_err();
            names(
                &error,
                &[
                    "dims 448..512",
                    "with_rotary_offset(448)",
                    "with_layout_offset(448)",
                ],
            );
        }
        let stated = config.clone().with_layout_offset(448);
        assert_eq!(stated.rope().unwrap().rotary_dim(), 64);
        assert!(stated.rope_for_length(100).is_ok() && stated.rope_for_lengths(&[100]).is_ok());
        assert!(stated.rope_by_position().is_ok());
    }
    // Nor does a layout that skips dims go with a rotation of the first.
    let first = model(json!({"model_type": "llama"}))
        .rope()
        .unwrap()
        .clone();
    assert!(first.rope().is_ok());
    assert!(first.with_layout_offset(64).rope().is_err());
}

#[test]
fn dims_as_transformers_orders_them() {
    let v3 = model(json!({"model_type": "deepseek_v3", "qk_rope_head_dim": 8}));
    assert_eq!(
        v3.rope().unwrap().transformers_dims(),
        [0, 2, 4, 6, 1, 3, 5, 7]
    );
    let llama = model(json!({"model_type": "llama", "head_dim": 4}));
    assert_eq!(llama.rope().unwrap().transformers_dims(), [0, 1, 2, 3]);
    let v4 = model(json!({"model_type": "deepseek_v4", "head_dim": 32}));
    assert_eq!(
        v4.rope_for("main").unwrap().transformers_dims(),
        [28, 29, 30, 31]
    );
}

#[test]
fn towers_that_are_not_read() {
    let with = |model_type: &str, vision: Value| {
        let text = json!({"model_type": "llama", "head_dim": 64});
        model(json!({"model_type": model_type, "text_config": text, "vision_config": vision}))
    };
    for (outer, vision, part) in [
        (
            "llama4",
            json!({"model_type": "llama4_vision_model", "hidden_size": 1408}),
            "share a head",
        ),
        (
            "llama4",
            json!({"hidden_size": 1408, "rope_theta": 1e4}),
            "share a head",
        ),
        (
            "gemma4",
            json!({"model_type": "gemma4_vision"}),
            "each half",
        ),
        (
            "kimi_k25",
            json!({"model_type": "kimi_k25_vision"}),
            "share a head",
        ),
        ("kimi_vl", json!({"model_type": "moonvit"}), "share a head"),
        (
            "made-up",
            json!({"model_type": "other", "hidden_size": 64}),
            "not known here",
        ),
        ("made-up", json!({"hidden_size": 64}), "not known here"),
    ] {
        let error = with(outer, vision).vision().unwrap_err();
        assert!(matches!(error, ConfigError::Unsupported { .. }), "{error}");
        names(&error, &[part]);
    }
    for vision in [
        json!({"model_type": "siglip_vision_model"}),
        json!({"model_type": "clip_vision_model"}),
        json!({}),
        json!(null),
    ] {
        assert_eq!(with("llava", vision).vision(), Ok(None));
    }
    let qwen = with("qwen2_5_vl", json!({"hidden_size": 1280, "num_heads": 16}));
    assert_eq!(qwen.vision().unwrap().unwrap().head_dim(), 80);
}

#[test]
fn errors_say_where_was_looked() {
    let part = json!({"model_type": "llama", "hidden_size": 512, "num_attention_heads": 8});
    for (config, parts) in [
        (
            json!({"model_type": "dia", "encoder_config": part, "decoder_config": part}),
            [
                "looked in the config itself",
                "decoder_config, encoder_config",
            ],
        ),
        (
            json!({"model_type": "t5gemma", "encoder": part, "decoder": part}),
            ["looked in the config itself", "decoder, encoder"],
        ),
        (
            json!({"model_type": "blt", "global_config": part, "patcher_config": part}),
            [
                "looked in the config itself",
                "global_config, patcher_config",
            ],
        ),
        (
            json!({"model_type": "sam3", "detector_config": {"vision_config": part}}),
            ["looked in the config itself", "detector_config"],
        ),
        (
            json!({"model_type": "x", "text_config": {"model_type": "y", "decoder": part}}),
            [
                "looked in text_config, not in text_config.decoder",
                "by itself",
            ],
        ),
    ] {
        names(&error(config), &parts);
    }
    let colqwen2 = json!({"model_type": "colqwen2", "vlm_config": {"model_type": "qwen2_vl",
        "text_config": {"model_type": "qwen2_vl_text", "hidden_size": 1536, "num_attention_heads": 12}}});
    assert_eq!(model(colqwen2).rope().unwrap().head_dim(), 128);
    // The value that the config has.
    for (config, part) in [
        (
            json!({"model_type": "llama", "head_dim": 63}),
            "head_dim is 63: it must",
        ),
        (
            json!({"model_type": "llama", "hidden_size": 252, "num_attention_heads": 4}),
            "hidden_size is 252: it must",
        ),
        (
            json!({"model_type": "phi", "head_dim": 64, "partial_rotary_factor": 0.3}),
            "partial_rotary_factor is 0.3: it must",
        ),
    ] {
        let error = error(config);
        names(&error, &[part, "even number"]);
        assert!(!error.to_string().contains("is such that"));
    }
}

#[test]
fn what_was_assumed() {
    let assumed = |config: Value| -> Vec<(String, f64)> { model(config).assumed().to_vec() };
    let pair = |key: &str, value: f64| (key.to_string(), value);
    assert_eq!(
        assumed(json!({"model_type": "llama"})),
        [pair("head_dim", 128.0), pair("rope_theta", 1e4)]
    );
    assert_eq!(
        assumed(json!({"model_type": "llama", "hidden_size": 2048, "rope_theta": 5e5})),
        [pair("num_attention_heads", 32.0)]
    );
    assert_eq!(
        assumed(json!({"model_type": "llama", "num_attention_heads": 16,
            "rope_parameters": {"rope_theta": 5e5}})),
        [pair("hidden_size", 4096.0)]
    );
    let inside = json!({"model_type": "llava", "text_config": {"model_type": "llama"}});
    assert_eq!(
        assumed(inside),
        [
            pair("text_config.head_dim", 128.0),
            pair("text_config.rope_theta", 1e4)
        ]
    );
    for whole in [
        json!({"model_type": "llama", "head_dim": 64, "rope_theta": 1e4}),
        json!({"model_type": "llama", "hidden_size": 512, "num_attention_heads": 8, "rope_theta": 1e4}),
        json!({"model_type": "gpt_neox", "hidden_size": 512, "num_attention_heads": 8,
            "rotary_emb_base": 1e4}),
        json!({"model_type": "deepseek_v3", "qk_rope_head_dim": 64, "rope_theta": 1e4}),
    ] {
        assert_eq!(assumed(whole.clone()), [], "{whole}");
    }
}

#[test]
fn indexers() {
    // (transformers: half-split in DeepSeek-V3.2, interleaved in GLM-5, the first dims in both.)
    let read = |over: Value| {
        let config = json!({"model_type": "glm_moe_dsa", "qk_rope_head_dim": 64,
            "index_head_dim": 128, "rope_theta": 1e6});
        model(put_over(config, over))
    };
    for (over, pairing) in [
        (json!({}), Pairing::Interleaved),
        (
            json!({"indexer_rope_interleave": true}),
            Pairing::Interleaved,
        ),
        (
            json!({"indexer_rope_interleave": false}),
            Pairing::HalfSplit,
        ),
        (json!({"model_type": "deepseek_v32"}), Pairing::HalfSplit),
        (json!({"model_type": "axk2"}), Pairing::HalfSplit),
    ] {
        let read = read(over.clone());
        let (main, indexer) = (read.rope().unwrap(), read.indexer().unwrap().unwrap());
        assert_eq!(indexer.pairing(), pairing, "{over}");
        assert_eq!(main.pairing(), Pairing::Interleaved);
        assert_eq!(
            (
                indexer.head_dim(),
                indexer.rotary_dim(),
                indexer.rotary_offset()
            ),
            (128, 64, 0)
        );
        assert_eq!(indexer.frequencies(), main.frequencies());
        assert_eq!(indexer.score_scale(), 128f64.sqrt().recip());
        assert!(indexer.rope().is_ok());
    }
    let yarn = read(
        json!({"model_type": "deepseek_v32", "rope_scaling": {"type": "yarn",
        "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0,
        "mscale_all_dim": 1.0}}),
    );
    let indexer = yarn.indexer().unwrap().unwrap();
    assert_eq!(indexer.frequencies(), yarn.rope().unwrap().frequencies());
    let small = read(json!({"index_head_dim": 32}));
    names(
        &small.indexer().unwrap_err(),
        &["index_head_dim is 32", "64"],
    );
    assert_eq!(
        model(json!({"model_type": "deepseek_v3"})).indexer(),
        Ok(None)
    );
}

#[test]
fn talkers() {
    let omni = |talker: Value| {
        model(
            json!({"model_type": "qwen2_5_omni", "talker_config": talker, "thinker_config":
            {"model_type": "qwen2_5_omni_thinker", "text_config":
                {"model_type": "qwen2_5_omni_text", "hidden_size": 3584, "num_attention_heads": 28}}}),
        )
    };
    let read = omni(
        json!({"model_type": "qwen2_5_omni_talker", "head_dim": 64, "rope_theta": 1e6,
        "rope_scaling": {"type": "default", "mrope_section": [8, 12, 12]}}),
    );
    let talker = read.talker().unwrap().unwrap();
    assert_eq!(talker.model_type(), Some("qwen2_5_omni_talker"));
    assert_eq!(talker.rope().unwrap().head_dim(), 64);
    assert_eq!(read.rope().unwrap().head_dim(), 128);
    let broken = omni(json!({"model_type": "qwen2_5_omni_talker", "rope_theta": "x"}));
    names(
        &broken.talker().unwrap_err(),
        &["talker_config.rope_theta is \"x\""],
    );
    assert_eq!(omni(json!(null)).talker(), Ok(None));
    let qwen3 = model(
        json!({"model_type": "qwen3_omni_moe", "thinker_config": {"text_config":
            {"model_type": "qwen3_omni_moe_text", "head_dim": 128}},
        "talker_config": {"model_type": "qwen3_omni_moe_talker", "text_config": {"model_type":
            "qwen3_omni_moe_talker_text", "head_dim": 64, "hidden_size": 1024, "num_attention_heads": 16,
            "rope_scaling": {"mrope_section": [12, 10, 10], "interleaved": true, "rope_type": "default"}}}}),
    );
    assert_eq!(
        qwen3.talker().unwrap().unwrap().rope().unwrap().head_dim(),
        64
    );
}

/// Lists and counts of layers, with what is too many.
#[test]
fn lists_and_counts_of_layers() {
    // A list stands before a smaller number.
    let full = "full_attention";
    let listed = model(json!({"model_type": "qwen3", "num_hidden_layers": 2,
        "layer_types": [full, full, full]}));
    assert!(listed.rope_of_layer(2).unwrap().is_some());
    let layers = 3;
    assert_eq!(
        listed.rope_of_layer(3),
        Err(ConfigError::NoSuchLayer { index: 3, layers })
    );
    // The older key is one of hybrids, and of families that are not known.
    let blocks = json!({"layers_block_type": ["mamba", "attention"]});
    let hybrid = model(unknown(blocks.clone()));
    assert_eq!(self::layers(&hybrid, 2), [None, Some(0)]);
    let known = put_over(
        json!({"model_type": "llama", "num_hidden_layers": 2}),
        blocks,
    );
    assert_eq!(self::layers(&model(known), 2), [Some(0), Some(0)]);
    // Layers of a known family are alike whatever other families' keys say.
    let other = json!({"model_type": "llama", "num_hidden_layers": 2, "block_types": ["a"]});
    assert_eq!(self::layers(&model(other), 2), [Some(0), Some(0)]);
    assert_eq!(
        self::layers(&model(unknown(json!({}))), 2),
        [Some(0), Some(0)]
    );
    for off in [json!({}), json!({"use_mem_rope": false})] {
        let zamba = put_over(json!({"model_type": "zamba2", "num_hidden_layers": 4}), off);
        assert!(matches!(error(zamba), ConfigError::NoRotation { .. }));
    }
    // Kinds are named where layers of them rotate, each once.
    let types = |config: Value| -> Vec<String> {
        let read = model(config);
        read.layer_types().into_iter().map(String::from).collect()
    };
    for (config, expected) in [
        (json!({"model_type": "cohere2"}), vec!["sliding_attention"]),
        (
            json!({"model_type": "cohere2", "num_hidden_layers": 8}),
            vec!["sliding_attention"],
        ),
        (
            json!({"model_type": "gemma2", "num_hidden_layers": 8}),
            vec!["sliding_attention", "full_attention"],
        ),
        (json!({"model_type": "llama"}), vec!["full_attention"]),
        // (A table for its layers of full attention would make those rotate.)
        (
            json!({"model_type": "beam", "num_hidden_layers": 6, "rope_parameters": {
                "sliding_attention": {"rope_theta": 1e4}}}),
            vec!["sliding_attention"],
        ),
    ] {
        assert_eq!(types(config.clone()), expected, "{config}");
    }
    // Without types it is not known which layer has which table.
    let tables = json!({"model_type": "llama", "num_hidden_layers": 2, "rope_parameters": {
        "full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}});
    let tables = model(tables);
    names(
        &tables.rope_of_layer(0).unwrap_err(),
        &["layer_types is missing"],
    );
    // As many as any model has, and one more.
    let counted = |model_type: &str, layers: u64| json!({"model_type": model_type, "num_hidden_layers": layers});
    for model_type in ["smollm3", "cohere2", "cwm", "muse_glimmer_text"] {
        assert!(read(&counted(model_type, 1 << 16)).is_ok(), "{model_type}");
        let many = counted(model_type, (1 << 16) + 1);
        names(
            &error(many),
            &["num_hidden_layers is 65537", "at most 65536"],
        );
    }
    let many = put_over(
        counted("muse_glimmer_text", (1 << 16) + 1),
        json!({"layer_types": ["sliding_attention", full]}),
    );
    names(
        &error(many),
        &["num_hidden_layers is 65537", "at most 65536"],
    );
    let named = |count: usize| -> Vec<String> { (0..count).map(|i| format!("kind{i}")).collect() };
    let of_types = |count| json!({"model_type": "llama", "layer_types": named(count)});
    assert_eq!(types(of_types(64)), named(64));
    names(
        &error(of_types(65)),
        &["layer_types", "at most 64 different strings"],
    );
    let of_tables = |count| {
        let mut config = json!({"model_type": "llama", "rope_parameters": {}});
        for name in named(count) {
            config["rope_parameters"][name] = json!({"rope_theta": 1e4});
        }
        config
    };
    assert_eq!(types(of_tables(64)).len(), 64);
    names(
        &error(of_tables(65)),
        &["rope_parameters is an object of more", "at most 64 tables"],
    );
}

#[test]
fn dims_that_rotate() {
    let dims = |config: Value, name: &str| {
        let read = model(config);
        let rope = read.rope_for(name).unwrap();
        (rope.head_dim(), rope.rotary_dim())
    };
    let full = "full_attention";
    for (config, expected) in [
        // Dims that are there to rotate do so as a whole.
        (
            unknown(json!({"qk_rope_head_dim": 64, "partial_rotary_factor": 0.5})),
            (64, 64),
        ),
        // A key that its class does not have.
        (json!({"model_type": "phi3", "rotary_dim": 48}), (96, 96)),
        (
            json!({"model_type": "minimax_m2", "rotary_dim": 64}),
            (128, 64),
        ),
        // (Its class has the one under the name of the other.)
        (json!({"model_type": "jetmoe", "head_dim": 96}), (96, 96)),
        (
            json!({"model_type": "jetmoe", "head_dim": 96, "kv_channels": 64}),
            (64, 64),
        ),
        // Null asks for what the sizes give.
        (
            json!({"model_type": "qwen3", "head_dim": null, "hidden_size": 4096,
                "num_attention_heads": 64}),
            (64, 64),
        ),
        (
            json!({"model_type": "qwen3", "hidden_size": 4096, "num_attention_heads": 64}),
            (128, 128),
        ),
        // The dims of layers of full attention, under the key of today and that of before.
        (
            json!({"model_type": "gemma4_text", "num_hidden_layers": 6}),
            (512, 512),
        ),
        (
            json!({"model_type": "gemma4_text", "num_hidden_layers": 12,
                "per_layer_config": {"5": {"head_dim": 64}, "7": {}, "11": {"head_dim": 64}}}),
            (64, 64),
        ),
        (
            json!({"model_type": "gemma4_text", "num_hidden_layers": 6, "global_head_dim": 128,
                "per_layer_config": {"5": {"head_dim": 64}}}),
            (128, 128),
        ),
    ] {
        assert_eq!(dims(config.clone(), full), expected, "{config}");
    }
    let two = json!({"model_type": "gemma4_text", "num_hidden_layers": 12,
        "per_layer_config": {"5": {"head_dim": 64}, "11": {"head_dim": 32}}});
    names(
        &error(two),
        &[
            "per_layer_config.5.head_dim is 64",
            "per_layer_config.11.head_dim is 32",
        ],
    );
    // A part of a head that is none, and one that is all of an odd number of dims.
    let phi = |over: Value| put_over(json!({"model_type": "phi", "head_dim": 64}), over);
    names(
        &error(phi(json!({"partial_rotary_factor": 1.5}))),
        &["partial_rotary_factor is 1.5", "above 0 and at most 1"],
    );
    names(
        &error(phi(json!({"head_dim": 63, "partial_rotary_factor": 1.0}))),
        &["head_dim is 63"],
    );
    // DeepSeek-V4's tables have a say in it, but for one that is of all layers.
    let v4 = |over: Value| {
        put_over(
            json!({"model_type": "deepseek_v4", "num_hidden_layers": 2}),
            over,
        )
    };
    let yarn = json!({"type": "yarn", "factor": 16, "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": 65536});
    let flat = v4(json!({"rope_scaling": yarn}));
    assert_eq!(dims(flat.clone(), "main"), (512, 64));
    assert_eq!(dims(flat, "compress"), (512, 64));
    let tables = v4(json!({"rope_parameters": {
        "main": {"rope_theta": 1e4, "partial_rotary_factor": 0.25},
        "compress": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}}));
    assert_eq!(dims(tables.clone(), "main"), (512, 128));
    assert_eq!(dims(tables, "compress"), (512, 256));
}

/// Under which key an error is, where another part of the crate finds it.
#[test]
fn errors_of_what_is_computed_name_the_key() {
    let key_of = |config: Value| match error(config) {
        ConfigError::Invalid { key, .. } => key,
        other => panic!("{other}"),
    };
    let yarn = json!({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64});
    let llama = |over: Value| {
        put_over(
            json!({"model_type": "llama", "head_dim": 64, "max_position_embeddings": 64}),
            over,
        )
    };
    let beside = llama(json!({"rope_theta": 1.0, "rope_scaling": yarn}));
    assert_eq!(key_of(beside), "rope_theta");
    let mut inside = yarn.clone();
    inside["rope_theta"] = json!(1.0);
    let inside = llama(json!({"rope_parameters": inside}));
    assert_eq!(key_of(inside), "rope_parameters.rope_theta");
    let dynamic = json!({"rope_type": "dynamic", "factor": 2.0});
    let two = llama(json!({"head_dim": 2, "rope_scaling": dynamic}));
    assert_eq!(key_of(two), "head_dim");
    // Of a default table too.
    let original = "original_max_position_embeddings";
    let long = json!({"model_type": "gpt_oss", original: 1u64 << 63});
    assert_eq!(key_of(long), original);
    for scalar in [0.0, -1.0] {
        let config = json!({"model_type": "gemma2", "query_pre_attn_scalar": scalar});
        names(
            &error(config),
            &["query_pre_attn_scalar is", "a positive number"],
        );
    }
}

#[test]
fn theta_scores_and_axes_by_other_keys() {
    let theta = |config: Value| model(config).rope().unwrap().theta();
    assert_eq!(
        theta(json!({"model_type": "chatglm", "rope_ratio": 50})),
        5e5
    );
    assert_eq!(theta(json!({"model_type": "llama", "rope_ratio": 50})), 1e4);
    // Entries of this family's list are switches.
    let switches = json!({"model_type": "muse_glimmer_text", "rope_theta": 5e5,
        "layer_rope_theta": [3.0, 0.0, 2.0, 1.0]});
    let read = model(switches);
    let thetas = |layer| read.rope_of_layer(layer).unwrap().map(RopeConfig::theta);
    assert_eq!([0, 1, 2].map(thetas), [Some(5e5), None, Some(5e5)]);
    // Scores of latent attention grow with the square of YaRN's mscale.
    let latent = |all_dim: f64| {
        let config = unknown(json!({"qk_rope_head_dim": 64, "qk_nope_head_dim": 128,
            "rope_scaling": {"type": "yarn", "factor": 40.0, "mscale_all_dim": all_dim,
                "original_max_position_embeddings": 4096}}));
        model(config).rope().unwrap().score_scale() * 192f64.sqrt()
    };
    for all_dim in [0.0, 0.707, 1.0] {
        let expected = (0.1 * all_dim * 40f64.ln() + 1.0).powi(2);
        let got = latent(all_dim);
        assert!((got / expected - 1.0).abs() < 1e-14, "{got} {expected}");
    }
    // A default table heeds the original length beside it.
    let original = json!({"model_type": "gpt_oss", "original_max_position_embeddings": 8192});
    match model(original).rope().unwrap().scaling() {
        Scaling::Yarn(yarn) => assert_eq!(yarn.original_max_position_embeddings, 8192),
        other => panic!("{other:?}"),
    }
    // transformers looks for it beside tables of kinds of layers, not in one of them.
    let truncate = |model_type: &str| {
        let config = json!({"model_type": model_type, "num_hidden_layers": 6, "rope_scaling":
            {"rope_type": "yarn", "factor": 2.0, "truncate": false,
                "original_max_position_embeddings": 4096}});
        match model(config).rope_for("full_attention").unwrap().scaling() {
            Scaling::Yarn(yarn) => yarn.truncate,
            other => panic!("{other:?}"),
        }
    };
    assert!(truncate("gemma3_text"));
    // An attention factor settles what the lengths would tell.
    let settled = unknown(
        json!({"rope_scaling": {"type": "longrope", "attention_factor": 1.5,
        "short_factor": vec![1.0; 64], "long_factor": vec![2.0; 64],
        "original_max_position_embeddings": 4096}}),
    );
    let settled = model(settled).rope().unwrap().frequencies_for_length(1);
    assert_eq!(settled.unwrap().attention_factor(), 1.5);
    // The default table of Gemma 4's full attention has a part of its own: 64 of 256 pairs.
    let gemma4 = json!({"model_type": "gemma4_text", "partial_rotary_factor": 0.5});
    let gemma4 = model(gemma4)
        .rope_for("full_attention")
        .unwrap()
        .frequencies();
    let turning = gemma4
        .unwrap()
        .steps()
        .iter()
        .filter(|step| **step != 0)
        .count();
    assert_eq!(turning, 64);
    // Nor does it look beside such a table for the original length.
    let beside = json!({"model_type": "gemma3_text", "original_max_position_embeddings": 8192,
        "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096}});
    match model(beside).rope_for("full_attention").unwrap().scaling() {
        Scaling::Yarn(yarn) => assert_eq!(yarn.original_max_position_embeddings, 4096),
        other => panic!("{other:?}"),
    }
    assert!(!truncate("qwen3"));
    let long = json!({"model_type": "phimoe", "rope_scaling": {"type": "longrope",
        "short_factor": vec![1.0; 64], "long_factor": vec![2.0; 64], "short_mscale": 1.25,
        "long_mscale": 1.5, "original_max_position_embeddings": 4096}});
    let long = model(long);
    for (length, factor) in [(4096, 1.25), (4097, 1.5)] {
        let frequencies = long.rope().unwrap().frequencies_for_length(length);
        assert_eq!(frequencies.unwrap().attention_factor(), factor);
    }
    // How sections of axes lie.
    let axes = |config: Value| model(config).rope().unwrap().axes().cloned();
    for (interleaved, expected) in [
        (json!(true), Axes::MropeInterleaved([24, 20, 20])),
        (json!(false), Axes::MropeSections([24, 20, 20])),
        (json!(null), Axes::MropeSections([24, 20, 20])),
    ] {
        for model_type in ["qwen2_vl_text", "llama"] {
            let table = json!({"type": "mrope", "mrope_section": [24, 20, 20],
                "mrope_interleaved": interleaved});
            let config = json!({"model_type": model_type, "head_dim": 128, "rope_scaling": table});
            assert_eq!(axes(config), Some(expected.clone()), "{model_type}");
        }
    }
    let tower = json!({"model_type": "qwen2_vl", "vision_config": {"embed_dim": 1280, "num_heads": 16,
        "rope_parameters": {"rope_type": "axial", "rope_theta": 1e4}}});
    let tower = model(tower).vision().unwrap().cloned();
    assert_eq!(tower.unwrap().axes(), Some(&Axes::VisionHalves));
}

/// Where a class has a default table, theta beside it counts for nothing; nor do parts that it does not look for.
#[test]
fn keys_that_a_class_does_not_look_for() {
    let theta = |config: Value| {
        let read = model(config);
        let rope = read.rope_for(read.layer_types()[0]).unwrap();
        rope.theta()
    };
    for (model_type, expected) in [
        ("apertus", 12e6),
        ("cwm", 1e6),
        ("higgs_audio_v2", 5e5),
        ("ministral3", 1e6),
        ("nemotron3_5_transcribe_asr_audio", 1e4),
        ("nemotron3_5_transcribe_word_timestamp", 1e4),
        ("moonshine_streaming", 1e4),
        ("beam", 1e4),
        ("muse_spark_text", 5e5),
        ("mistral4", 1e4),
        ("cosmos3_edge_text", 1e8),
    ] {
        let lone =
            json!({"model_type": model_type, "num_hidden_layers": 8, "rope_theta": 7654321.0});
        assert_eq!(theta(lone), expected, "{model_type}");
    }
    assert_eq!(
        theta(json!({"model_type": "llama", "rope_theta": 7654321.0})),
        7654321.0
    );
    // Tables of both kinds have the one theta of the config.
    let table = json!({"partial_rotary_factor": 0.25});
    let v4 = model(
        json!({"model_type": "deepseek_v4", "num_hidden_layers": 2, "rope_theta": 2e4,
        "compress_rope_theta": 160000, "rope_parameters": {"main": table, "compress": table}}),
    );
    for name in ["main", "compress"] {
        turns(
            v4.rope_for(name).unwrap(),
            64,
            0.8566361665725708,
            1.0 / 2e4 / 0.8566361665725708,
        );
    }
    let bamba = model(json!({"model_type": "bamba", "partial_rotary_factor": 0.25}));
    let bamba = bamba.rope_for("full_attention").unwrap();
    assert_eq!((bamba.head_dim(), bamba.rotary_dim()), (128, 64));
    let fuyu = model(json!({"model_type": "fuyu"}));
    let fuyu = fuyu.rope().unwrap();
    assert_eq!(
        (fuyu.theta(), fuyu.head_dim(), fuyu.rotary_dim()),
        (25e3, 64, 32)
    );
    let esm = model(json!({"model_type": "esm", "position_embedding_type": "rotary"}));
    assert_eq!(esm.rope().unwrap().head_dim(), 64);
    for (over, scale) in [
        (json!({}), 128f64.sqrt().recip()),
        (json!({"attention_multiplier": 0.0625}), 0.0625),
    ] {
        let hyperclovax = model(put_over(json!({"model_type": "hyperclovax"}), over));
        assert_eq!(hyperclovax.rope().unwrap().score_scale(), scale);
    }
    let gemma = model(json!({"model_type": "gemma3_text", "query_pre_attn_scalar": 168}));
    let gemma = gemma.rope_for("full_attention").unwrap();
    assert_eq!(gemma.score_scale(), 168f64.sqrt().recip());
    // The last layer and every fourth before it attend to everything, also where the list makes them rotate.
    for model_type in ["muse_spark_text", "muse_glimmer_text"] {
        let read = model(json!({"model_type": model_type, "num_hidden_layers": 6,
            "layer_rope_theta": [1, 1, 1, 1, 1, 1], "rope_parameters": {
                "full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}}));
        let theta = |layer| read.rope_of_layer(layer).unwrap().unwrap().theta();
        let expected = [1e4, 1e6, 1e4, 1e4, 1e4, 1e6];
        assert_eq!([0, 1, 2, 3, 4, 5].map(theta), expected, "{model_type}");
    }
}

/// Kinds of layers whose tables are all that counts: theta, its part and older names beside them do not.
#[test]
fn kinds_by_their_tables_alone() {
    let (full, sliding) = ("full_attention", "sliding_attention");
    for (model_type, kinds) in [
        (
            "olmo3",
            [
                (full, 64, 0.7806186676025391),
                (sliding, 64, 0.8146172165870667),
            ],
        ),
        (
            "laguna",
            [
                (full, 32, 0.663601279258728),
                (sliding, 64, 0.8659643530845642),
            ],
        ),
        (
            "mellum",
            [
                (full, 64, 0.8146172165870667),
                (sliding, 64, 0.8659643530845642),
            ],
        ),
        (
            "mimo_v2_flash",
            [
                (full, 32, 0.6175287365913391),
                (sliding, 32, 0.7498942017555237),
            ],
        ),
        (
            "zaya",
            [
                ("hybrid", 32, 0.6175287365913391),
                ("hybrid_sliding", 32, 0.7498942017555237),
            ],
        ),
        (
            "lfm3",
            [
                (full, 64, 0.8058422207832336),
                (sliding, 64, 0.8659643530845642),
            ],
        ),
        (
            "gemma4_text",
            [
                (full, 256, 0.9474635124206543),
                (sliding, 128, 0.9305720329284668),
            ],
        ),
        (
            "gemma4_unified_text",
            [
                (full, 256, 0.9474635124206543),
                (sliding, 128, 0.9305720329284668),
            ],
        ),
        (
            "embedding_gemma2_text",
            [
                (full, 256, 0.9474635124206543),
                (sliding, 128, 0.9305720329284668),
            ],
        ),
        (
            "modernbert",
            [
                (full, 32, 0.687656044960022),
                (sliding, 32, 0.7498942017555237),
            ],
        ),
    ] {
        let types = kinds.map(|(name, _, _)| name);
        let config = json!({"model_type": model_type, "num_hidden_layers": 2, "layer_types": types,
            "rope_theta": 7654321.0, "rope_local_base_freq": 54321.0});
        let read = model(config.clone());
        for (name, pairs, second) in kinds {
            let frequencies = read.rope_for(name).unwrap().frequencies().unwrap();
            let ours = frequencies.inv_freq()[1];
            assert_eq!(frequencies.pairs(), pairs, "{model_type} {name}");
            assert!(
                (ours / second - 1.0).abs() < 1e-6,
                "{model_type} {name}: {ours}"
            );
        }
        // A table for all layers is none of one kind.
        let flat = put_over(
            config,
            json!({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        );
        match model_type {
            "olmo3" | "modernbert" => drop(model(flat)),
            _ => names(
                &error(flat),
                &["rope_scaling", "rope_parameters with a table for each of"],
            ),
        }
    }
    // Here the part of the whole head is all of it.
    let part = |model_type: &str| {
        let read = model(json!({"model_type": model_type, "num_hidden_layers": 6}));
        read.rope_for(full)
            .unwrap()
            .frequencies()
            .unwrap()
            .inv_freq()[255]
    };
    assert_eq!(part("gemma4_text"), 0.0);
    assert!((part("embedding_gemma2_text") * 1e6 - 1e6f64.powf(1.0 / 256.0)).abs() < 1e-9);
    let plain = model(json!({"model_type": "embedding_gemma2_text", "num_hidden_layers": 6}));
    assert_eq!(plain.rope_for(full).unwrap().scaling(), &Scaling::None);
    // UltraBERT's and Step 3.5's thetas are those of layers of a type.
    let theta = |config: Value, name: &str| model(config).rope_for(name).unwrap().theta();
    let ultra =
        json!({"model_type": "ultrabert", "num_hidden_layers": 3, "rope_local_base_freq": 5.0});
    assert_eq!(theta(ultra.clone(), full), 2_560_000.0);
    assert_eq!(theta(ultra, sliding), 1e4);
    // DeepSeek-V4's kinds have theta by keys of their own.
    let v4 = json!({"model_type": "deepseek_v4", "num_hidden_layers": 2, "rope_theta": 2e4,
        "compress_rope_theta": 3e5});
    assert_eq!(theta(v4.clone(), "main"), 2e4);
    assert_eq!(theta(v4, "compress"), 3e5);
    for (model_type, kind) in [
        ("deepseek_v32", "indexed_attention"),
        ("glm_moe_dsa", "indexed_attention"),
        ("axk2", "indexed_attention"),
        ("hy_v4", "indexed_attention"),
    ] {
        let read = model(json!({"model_type": model_type, "num_hidden_layers": 2}));
        assert_eq!(read.layer_types(), [kind], "{model_type}");
    }
    let none = json!({"model_type": "exaone4", "num_hidden_layers": 8, "sliding_window": null});
    assert_eq!(model(none).layer_types(), [full]);
    // Sizes that its class' defaults do not fit.
    for (model_type, heads, pairs, theta) in [
        ("qwen3_omni_moe_text", 32, 32, 1e6),
        ("qwen3_omni_moe_talker_text", 16, 64, 1e4),
    ] {
        let config = json!({"model_type": model_type, "hidden_size": 2048, "num_attention_heads": heads,
            "rope_scaling": {"mrope_section": [pairs - 20, 10, 10], "rope_type": "default"}});
        let rope = model(config).rope().unwrap().clone();
        assert_eq!(
            (rope.rotary_dim(), rope.theta()),
            (2 * pairs, theta),
            "{model_type}"
        );
    }
    let talker = model(
        json!({"model_type": "qwen3_omni_moe_talker_text", "rope_scaling":
        {"mrope_section": [12, 10, 10], "rope_type": "default"}}),
    );
    assert_eq!(talker.rope().unwrap().head_dim(), 64);
}

/// Sections of classes whose configs name none, and the sizes of towers.
#[test]
fn axes_and_towers_of_config_classes() {
    let (mrope, interleaved) = (Axes::MropeSections, Axes::MropeInterleaved);
    for (model_type, axes) in [
        ("qwen2_vl", mrope([16, 24, 24])),
        ("qwen2_5_vl_text", mrope([16, 24, 24])),
        ("qwen2_5_omni_text", mrope([16, 24, 24])),
        ("qwen2_5_omni_talker", mrope([16, 24, 24])),
        ("paddleocr_vl_text", mrope([16, 24, 24])),
        ("glm4v_text", mrope([8, 12, 12])),
        ("glm_ocr_text", mrope([8, 12, 12])),
        ("glm4v_moe_text", mrope([8, 12, 12])),
        ("glm_image_text", mrope([8, 12, 12])),
        ("qwen3_vl_text", interleaved([24, 20, 20])),
        ("qwen3_vl_moe_text", interleaved([24, 20, 20])),
        ("qwen3_omni_moe_text", interleaved([24, 20, 20])),
        ("qwen3_omni_moe_talker_text", interleaved([24, 20, 20])),
        ("cosmos3_edge_text", interleaved([24, 20, 20])),
        ("qwen3_5_text", interleaved([11, 11, 10])),
        ("qwen3_5_moe_text", interleaved([11, 11, 10])),
        ("ernie4_5_vl_moe_text", Axes::ErnieSections([22, 22, 20])),
    ] {
        // As many dims of a head as there are sections for.
        let sections: usize = match axes {
            Axes::MropeSections(s) | Axes::MropeInterleaved(s) | Axes::ErnieSections(s) => {
                s.iter().sum()
            }
            _ => unreachable!("all have sections"),
        };
        let mut config = json!({"model_type": model_type, "num_hidden_layers": 4,
            "head_dim": 2 * sections});
        if ["glm4v_text", "glm_ocr_text", "glm_image_text"].contains(&model_type) {
            config["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 1e4,
                "partial_rotary_factor": 1.0});
        }
        if ["glm4v_moe_text", "qwen3_5_text", "qwen3_5_moe_text"].contains(&model_type) {
            config["partial_rotary_factor"] = json!(1.0);
        }
        let read = model(config);
        let rope = read.rope_for("full_attention").unwrap();
        assert_eq!(rope.axes(), Some(&axes), "{model_type}");
    }
    let tower = |model_type: &str| {
        let tower = json!({"model_type": model_type, "hidden_size": 1536, "embed_dim": 768,
            "num_attention_heads": 16});
        let read = model(json!({"model_type": "llama", "head_dim": 64, "vision_config": tower}));
        read.vision().unwrap().unwrap().clone()
    };
    for (model_type, head_dim, theta, axes) in [
        ("qwen2_vl_vision", 48, 1e4, Axes::VisionHalves),
        ("qwen2_5_vl_vision", 96, 1e4, Axes::VisionHalves),
        ("lfm3_vl_vision", 96, 1e6, Axes::VisionHalves),
        ("pixtral", 96, 1e4, Axes::PixtralHalves),
        ("minimax_m3_vl_vision", 96, 1e4, Axes::Video([32; 3])),
    ] {
        let rope = tower(model_type);
        assert_eq!(
            (rope.head_dim(), rope.theta()),
            (head_dim, theta),
            "{model_type}"
        );
        assert_eq!(rope.axes(), Some(&axes), "{model_type}");
    }
    // The one has no other width.
    let wide = |model_type: &str| {
        let tower = json!({"model_type": model_type, "embed_dim": 768, "num_attention_heads": 16});
        let read = model(json!({"model_type": "llama", "head_dim": 64, "vision_config": tower}));
        read.vision().map(|tower| tower.unwrap().head_dim())
    };
    assert_eq!(wide("qwen2_vl_vision"), Ok(48));
    assert_eq!(wide("qwen2_5_vl_vision"), Ok(48));
    for model_type in ["lfm3_vl_vision", "pixtral", "minimax_m3_vl_vision"] {
        names(&wide(model_type).unwrap_err(), &["hidden_size"]);
    }
}
