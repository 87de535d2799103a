//! GGUF metadata: what llama.cpp makes of each architecture's keys, layer by layer, and everything
//! that is wrong with a file. Expected numbers follow from llama.cpp's rules by formulas of their
//! own; `gguf_goldens.rs` holds all architectures to llama.cpp's source.

use std::collections::BTreeMap;

use phasor::config::{
    Axes, ConfigError, GgmlMrope, GgufValue, ModelConfig, RopeConfig, Scaling, YarnScaling,
};
use phasor::{Angles, Pairing};
use proptest::prelude::*;

#[track_caller]
fn names(error: &ConfigError, parts: &[&str]) {
    let text = error.to_string();
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
}

/// A GGUF file's metadata.
#[derive(Clone, Default)]
struct Gguf {
    numbers: BTreeMap<String, f64>,
    counts: BTreeMap<String, u64>,
    texts: BTreeMap<String, String>,
    tensors: BTreeMap<String, Vec<f32>>,
    arrays: BTreeMap<String, Vec<u32>>,
    signed: BTreeMap<String, Vec<i32>>,
    flags: BTreeMap<String, bool>,
}

impl Gguf {
    fn new(architecture: &str) -> Self {
        let mut file = Self::default();
        file.texts
            .insert("general.architecture".into(), architecture.into());
        file.count("embedding_length", 4096)
            .count("attention.head_count", 32)
    }

    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.texts["general.architecture"])
    }

    fn count(mut self, name: &str, value: u64) -> Self {
        self.counts.insert(self.key(name), value);
        self
    }

    fn number(mut self, name: &str, value: f64) -> Self {
        self.numbers.insert(self.key(name), value);
        self
    }

    fn text(mut self, name: &str, value: &str) -> Self {
        self.texts.insert(self.key(name), value.into());
        self
    }

    fn tensor(mut self, name: &str, values: Vec<f32>) -> Self {
        self.tensors.insert(name.into(), values);
        self
    }

    fn flag(mut self, name: &str, value: bool) -> Self {
        self.flags.insert(self.key(name), value);
        self
    }

    fn array(mut self, name: &str, values: &[u32]) -> Self {
        self.arrays.insert(self.key(name), values.to_vec());
        self
    }

    fn signed(mut self, name: &str, values: &[i32]) -> Self {
        self.signed.insert(self.key(name), values.to_vec());
        self
    }

    fn read(&self) -> Result<ModelConfig, ConfigError> {
        ModelConfig::from_gguf(|key| {
            let number = self.numbers.get(key).map(|&n| n.into());
            let count = self.counts.get(key).map(|&n| n.into());
            let text = self.texts.get(key).map(GgufValue::from);
            let tensor = self.tensors.get(key).map(GgufValue::from);
            let array = self.arrays.get(key).map(GgufValue::from);
            let signed = self.signed.get(key).map(GgufValue::from);
            let flag = self.flags.get(key).map(|&flag| flag.into());
            let lists = tensor.or(array).or(signed);
            number.or(count).or(text).or(lists).or(flag)
        })
    }

    fn rope(&self) -> RopeConfig {
        self.read().unwrap().rope().unwrap().clone()
    }
}

#[test]
fn pairs_by_architecture() {
    for (architecture, pairing) in [
        ("llama", Pairing::Interleaved),
        ("command-r", Pairing::Interleaved),
        ("qwen2", Pairing::HalfSplit),
        ("gptneox", Pairing::HalfSplit),
        ("phi3", Pairing::HalfSplit),
        ("falcon", Pairing::HalfSplit),
        ("gemma", Pairing::HalfSplit),
    ] {
        let config = Gguf::new(architecture).rope();
        assert_eq!((config.head_dim(), config.theta()), (128, 10_000.0));
        assert_eq!(config.pairing(), pairing, "{architecture}");
        assert!(config.pairing_rule().to_string().contains(architecture));
    }
    names(
        &Gguf::new("made-up").read().unwrap_err(),
        &["\"made-up\"", "with_pairing"],
    );
    assert!(matches!(
        Gguf::new("gpt2").read(),
        Err(ConfigError::NoRotation { .. })
    ));
    let empty = ModelConfig::from_gguf(|_| None).unwrap_err();
    names(&empty, &["general.architecture is missing"]);
}

#[test]
fn scaling() {
    let dims = Gguf::new("qwen2")
        .count("attention.key_length", 64)
        .count("rope.dimension_count", 32);
    assert_eq!((dims.rope().head_dim(), dims.rope().rotary_dim()), (64, 32));

    let llama3 = Gguf::new("llama")
        .tensor("rope_freqs.weight", vec![2.0; 64])
        .rope();
    let linear = Gguf::new("llama")
        .text("rope.scaling.type", "linear")
        .number("rope.scaling.factor", 2.0);
    assert_eq!(llama3.frequencies(), linear.rope().frequencies());
    let old = Gguf::new("llama").number("rope.scale_linear", 2.0);
    assert_eq!(old.rope(), linear.rope());
    let none = linear.clone().text("rope.scaling.type", "none");
    assert_eq!(none.rope().scaling(), &Scaling::None);

    let yarn = Gguf::new("qwen2")
        .number("rope.freq_base", 1e6)
        .text("rope.scaling.type", "yarn")
        .number("rope.scaling.factor", 4.0)
        .count("rope.scaling.original_context_length", 32_768);
    let by_hand = RopeConfig::new(1e6, 128)
        .unwrap()
        .with_scaling(Scaling::Yarn(YarnScaling::new(4.0, 32_768)))
        .unwrap();
    assert_eq!(yarn.rope().frequencies(), by_hand.frequencies());

    let deepseek = Gguf::new("deepseek2")
        .count("attention.key_length", 576)
        .count("attention.key_length_mla", 192)
        .count("rope.dimension_count", 64)
        .text("rope.scaling.type", "yarn")
        .number("rope.scaling.factor", 40.0)
        .number("rope.scaling.yarn_log_multiplier", f64::from(0.1f32))
        .count("rope.scaling.original_context_length", 4096)
        .rope();
    let mscale = 0.1 * 40f64.ln() + 1.0;
    assert_eq!(
        (deepseek.head_dim(), deepseek.pairing()),
        (64, Pairing::Interleaved)
    );
    assert_eq!(deepseek.frequencies().unwrap().attention_factor(), 1.0);
    assert!((deepseek.score_scale() / (mscale * mscale / 192f64.sqrt()) - 1.0).abs() < 1e-15);

    // DeepSeek-V2-Lite: mscale and mscale_all_dim are 0.707.
    let lite = Gguf::new("deepseek2")
        .count("attention.key_length", 192)
        .count("rope.dimension_count", 64)
        .text("rope.scaling.type", "yarn")
        .number("rope.scaling.factor", 40.0)
        .number("rope.scaling.yarn_log_multiplier", f64::from(0.0707f32))
        .count("rope.scaling.original_context_length", 4096)
        .rope();
    assert_eq!(lite.frequencies().unwrap().attention_factor(), 1.0);

    let long = Gguf::new("phi3")
        .count("rope.scaling.original_context_length", 4096)
        .number("rope.scaling.attn_factor", f64::from(1.190_238_1f32))
        .tensor("rope_factors_short.weight", vec![1.0; 64])
        .tensor("rope_factors_long.weight", vec![8.0; 64])
        .rope();
    assert!(long.depends_on_length());
    let Angles::Rows(rows) = long.rope().unwrap().angles().clone() else {
        panic!()
    };
    assert_eq!(rows.attention_factors(), [1.190_238_1; 2]);

    let qwen = Gguf::new("qwen2vl")
        .array("rope.dimension_sections", &[16, 24, 24, 0])
        .rope();
    let axes = Axes::Ggml {
        mode: GgmlMrope::Mrope,
        sections: [16, 24, 24, 0],
    };
    assert_eq!(qwen.axes(), Some(&axes));
    let glm = Gguf::new("glm4").rope();
    assert_eq!((glm.pairing(), glm.axes()), (Pairing::Interleaved, None));
    let glm = Gguf::new("glm4")
        .array("rope.dimension_sections", &[16, 24, 24])
        .rope();
    assert_eq!(glm.pairing(), Pairing::HalfSplit);
    assert!(glm.axes().is_some());
}

#[test]
fn layers() {
    let gemma = Gguf::new("gemma3")
        .count("attention.sliding_window", 512)
        .count("block_count", 12)
        .number("rope.freq_base", 1e6)
        .text("rope.scaling.type", "linear")
        .number("rope.scaling.factor", 8.0)
        .read()
        .unwrap();
    assert_eq!(gemma.rope_for("sliding_attention").unwrap().theta(), 1e4);
    let full = gemma.rope_of_layer(5).unwrap().unwrap();
    assert_eq!((full.theta(), full.scaling().name()), (1e6, "linear"));
    let given = Gguf::new("gemma4")
        .count("attention.sliding_window", 512)
        .array("attention.sliding_window_pattern", &[1, 0])
        .count("attention.key_length", 512)
        .count("attention.key_length_swa", 256)
        .tensor("rope_freqs.weight", vec![1.0; 256])
        .read()
        .unwrap();
    assert_eq!(given.rope_of_layer(0).unwrap().unwrap().head_dim(), 256);
    assert_eq!(given.rope_of_layer(1).unwrap().unwrap().head_dim(), 512);
    let cohere = Gguf::new("cohere2").count("block_count", 8).read().unwrap();
    assert!(cohere.rope_of_layer(3).unwrap().is_none());
    assert!(cohere.rope().is_ok());
    // Only the model of 64 layers has windows.
    let exaone = |layers| Gguf::new("exaone4").count("block_count", layers);
    let rotates = |file: &Gguf| file.read().unwrap().rope_of_layer(3).unwrap().is_some();
    assert!(rotates(&exaone(30).count("attention.sliding_window", 4096)));
    assert!(!rotates(&exaone(64)));
    let smollm = Gguf::new("smollm3").count("block_count", 8).read().unwrap();
    assert!(
        smollm.rope_of_layer(3).unwrap().is_none() && smollm.rope_of_layer(4).unwrap().is_some()
    );
}

#[test]
fn switches_of_the_rotation() {
    let is_off = |file: Gguf| matches!(file.read(), Err(ConfigError::NoRotation { .. }));
    for architecture in ["granite", "granitemoe", "granitehybrid"] {
        let off = |off: bool| Gguf::new(architecture).flag("rope.scaling.finetuned", !off);
        assert!(off(false).read().is_ok() && is_off(off(true)));
        assert!(Gguf::new(architecture).read().is_ok());
    }
    // Elsewhere it is but a note.
    let llama = Gguf::new("llama").flag("rope.scaling.finetuned", false);
    assert!(llama.read().is_ok());
    let number = Gguf::new("granite").count("rope.scaling.finetuned", 1);
    names(
        &number.read().unwrap_err(),
        &["granite.rope.scaling.finetuned is 1", "true or false"],
    );

    for architecture in [
        "bert",
        "starcoder",
        "gpt2",
        "refact",
        "jina-bert-v2",
        "rwkv7",
    ] {
        assert!(is_off(Gguf::new(architecture)), "{architecture}");
    }
    for architecture in ["nomic-bert", "nomic-bert-moe", "jina-bert-v3", "starcoder2"] {
        assert!(Gguf::new(architecture).read().is_ok(), "{architecture}");
    }
    // llama.cpp has no code for it, but it does rotate.
    assert!(matches!(
        Gguf::new("gptj").read(),
        Err(ConfigError::UnknownArchitecture { .. })
    ));

    let baichuan = |layers| Gguf::new("baichuan").count("block_count", layers);
    assert_eq!(baichuan(32).rope().pairing(), Pairing::Interleaved);
    assert!(is_off(baichuan(40)));
    let unsaid = Gguf::new("baichuan").read().unwrap_err();
    names(&unsaid, &["baichuan.block_count is missing"]);
}

#[test]
fn layers_without_attention() {
    let rotates = |file: &Gguf, layers: usize| -> Vec<bool> {
        let model = file.read().unwrap();
        (0..layers)
            .map(|layer| model.rope_of_layer(layer).unwrap().is_some())
            .collect()
    };
    let llama4 = Gguf::new("llama4").count("block_count", 8);
    let every_fourth = [true, true, true, false, true, true, true, false];
    assert_eq!(rotates(&llama4, 8), every_fourth);
    let mut all_but_last = [true; 8];
    all_but_last[7] = false;
    let no_window = llama4.clone().count("attention.sliding_window", 0);
    assert_eq!(rotates(&no_window, 8), all_but_last);
    let window = llama4.count("attention.sliding_window", 8192);
    assert_eq!(rotates(&window, 8), every_fourth);

    let heads = [0, 8, 0, 0, 8];
    let some = [false, true, false, false, true];
    for architecture in ["lfm2", "lfm2moe", "granitehybrid", "plamo2", "deci"] {
        let file = Gguf::new(architecture).count("block_count", 5);
        let listed = file.clone().array("attention.head_count_kv", &heads);
        assert_eq!(rotates(&listed, 5), some, "{architecture}");
        let none = file.clone().array("attention.head_count_kv", &[0; 5]);
        assert!(matches!(none.read(), Err(ConfigError::NoRotation { .. })));
        let short = file.clone().array("attention.head_count_kv", &[8; 4]);
        names(
            &short.read().unwrap_err(),
            &["attention.head_count_kv", "5 layers"],
        );
        let one = file.clone().count("attention.head_count_kv", 8);
        assert_eq!(rotates(&one, 5), [true; 5], "{architecture}");
        if architecture != "deci" {
            let unsaid = file.read().unwrap();
            assert!(unsaid.rope().is_ok());
            let unsaid = unsaid.rope_of_layer(0).unwrap_err();
            names(&unsaid, &["attention.head_count_kv is missing", "rope_for"]);
        }
    }
    let deci = Gguf::new("deci").count("block_count", 3);
    let deci = deci.array("attention.head_count", &[0, 32, 32]);
    let mut deci = deci.array("attention.head_count_kv", &[0, 0, 8]);
    deci.counts.remove("deci.attention.head_count");
    assert_eq!(rotates(&deci, 3), [false, false, true]);
    assert_eq!(deci.rope().head_dim(), 128);

    for architecture in ["qwen3next", "qwen35", "qwen35moe"] {
        let file = Gguf::new(architecture).array("rope.dimension_sections", &[22, 21, 21, 0]);
        names(
            &file.read().unwrap().rope_of_layer(0).unwrap_err(),
            &["block_count is missing"],
        );
        let file = file.count("block_count", 5);
        assert_eq!(rotates(&file, 5), [false, false, false, true, false]);
        let by_two = file.clone().count("full_attention_interval", 2);
        assert_eq!(rotates(&by_two, 5), [false, true, false, true, false]);
        let further = by_two.count("nextn_predict_layers", 1);
        assert_eq!(rotates(&further, 5), [false, true, false, true, true]);
        let listed = file.array("attention.recurrent_layers", &[1, 0, 1, 1, 0]);
        assert_eq!(rotates(&listed, 5), some);
    }
    // Layers that may slide, of which some have no heads.
    let both = Gguf::new("gemma3")
        .count("attention.sliding_window", 512)
        .count("block_count", 6)
        .array("attention.head_count_kv", &[8, 0, 8, 8, 8, 8]);
    assert_eq!(rotates(&both, 6), [true, false, true, true, true, true]);
    let kinds = Gguf::new("gemma4").number("rope.freq_base", 1e6);
    let kinds = kinds.count("block_count", 6).read().unwrap();
    names(
        &kinds.rope_of_layer(0).unwrap_err(),
        &["gemma4.attention.sliding_window_pattern is missing"],
    );
}

#[test]
fn errors_name_the_key() {
    let llama = || Gguf::new("llama");
    for (file, parts) in [
        (
            llama().number("rope.freq_base", -1.0),
            vec!["llama.rope.freq_base is -1"],
        ),
        (
            llama().text("rope.freq_base", "x"),
            vec!["llama.rope.freq_base is \"x\""],
        ),
        (
            llama().count("rope.dimension_count", 7),
            vec!["llama.rope.dimension_count is 7"],
        ),
        (
            llama().count("rope.dimension_count", 130),
            vec!["llama.rope.dimension_count is 130"],
        ),
        (
            llama().count("attention.head_count", 0),
            vec!["llama.attention.head_count is 0"],
        ),
        (
            llama().count("attention.key_length", u64::MAX),
            vec!["llama.attention.key_length"],
        ),
        (
            llama().text("rope.scaling.type", "x"),
            vec!["llama.rope.scaling.type is \"x\""],
        ),
        (
            llama().number("rope.scaling.factor", -2.0),
            vec!["llama.rope.scaling.factor is -2"],
        ),
        (
            llama().tensor("rope_freqs.weight", vec![1.0; 3]),
            vec!["rope_freqs.weight", "a list of 3"],
        ),
        (
            llama().tensor("rope_freqs.weight", vec![0.0; 64]),
            vec!["rope_freqs.weight[0] is 0"],
        ),
        (
            llama()
                .text("rope.scaling.type", "longrope")
                .tensor("rope_factors_long.weight", vec![1.0; 64]),
            vec!["rope_factors_short.weight is missing"],
        ),
        (
            llama().text("rope.scaling.type", "yarn"),
            vec!["llama.rope.scaling.original_context_length"],
        ),
        (
            Gguf::new("qwen2vl"),
            vec!["qwen2vl.rope.dimension_sections is missing"],
        ),
        (
            Gguf::new("qwen2vl").array("rope.dimension_sections", &[0; 4]),
            vec!["qwen2vl.rope.dimension_sections"],
        ),
        (
            Gguf::new("qwen2vl").array("rope.dimension_sections", &[1; 9]),
            vec!["qwen2vl.rope.dimension_sections", "up to 4"],
        ),
    ] {
        names(&file.read().unwrap_err(), &parts);
    }
}

/// `base^(-2 pair / dims)`
fn inv_freq(base: f64, dims: f64, pair: f64) -> f64 {
    base.powf(-2.0 * pair / dims)
}

/// The angle of pair 1 for each layer, in radians per position; 0 for a layer that does not rotate.
#[track_caller]
fn check_layers(file: &Gguf, expected: &[f64]) {
    let model = file.read().unwrap();
    for (layer, expected) in expected.iter().enumerate() {
        let angle = match model.rope_of_layer(layer).unwrap() {
            Some(config) => config.frequencies().unwrap().inv_freq()[1],
            None => 0.0,
        };
        assert!(
            (angle - expected).abs() <= 1e-12 * expected.abs(),
            "layer {layer}: {angle}, expected {expected}"
        );
    }
    let beyond = model.rope_of_layer(expected.len());
    assert!(matches!(beyond, Err(ConfigError::NoSuchLayer { .. })));
}

#[test]
fn half_of_the_dims_without_a_window() {
    let step = Gguf::new("step35")
        .count("rope.dimension_count", 128)
        .number("rope.freq_base", 5e6)
        .count("block_count", 4)
        .array("attention.sliding_window_pattern", &[0, 1, 1, 1]);
    let full = inv_freq(5e6, 64.0, 1.0);
    assert!((full - 0.617529).abs() < 1e-6);
    let local = inv_freq(1e4, 128.0, 1.0);
    check_layers(&step, &[full, local, local, local]);
    let local = inv_freq(5e6, 128.0, 1.0);
    assert!((local - 0.785830).abs() < 1e-6);
    let named = step.clone().number("rope.freq_base_swa", 5e6);
    check_layers(&named, &[full, local, local, local]);
    // Half of a head that no key tells.
    let mut untold = named.clone();
    untold.counts.remove("step35.rope.dimension_count");
    check_layers(&untold, &[full, local, local, local]);
    let own = named.clone().count("rope.dimension_count_swa", 96);
    let shorter = inv_freq(5e6, 96.0, 1.0);
    check_layers(&own, &[full, shorter, shorter, shorter]);

    // The first 32 of 64 factors, for layers without a window alone.
    let divisors: Vec<f32> = (0..64u8).map(|pair| f32::from(pair) + 1.0).collect();
    let divided = named.tensor("rope_freqs.weight", divisors);
    check_layers(&divided, &[full / 2.0, local, local, local]);
    let config = divided.read().unwrap();
    let config = config.rope_of_layer(0).unwrap().unwrap();
    assert_eq!((config.head_dim(), config.rotary_dim()), (128, 64));
    let last = config.frequencies().unwrap().inv_freq()[31];
    assert!((last * 32.0 / inv_freq(5e6, 64.0, 31.0) - 1.0).abs() < 1e-9);
    let odd = Gguf::new("step35").count("rope.dimension_count", 70);
    names(&odd.read().unwrap_err(), &["rope.dimension_count"]);
}

#[test]
fn theta_of_layers_with_a_window() {
    const BASE: f64 = 1e6;
    const SWA: f64 = 5e4;
    let file = |architecture: &str, layers: u64| {
        Gguf::new(architecture)
            .number("rope.freq_base", BASE)
            .count("attention.sliding_window", 512)
            .count("block_count", layers)
    };
    let theta_of = |mark: char, swa: f64| match mark {
        'f' => inv_freq(BASE, 128.0, 1.0),
        's' => inv_freq(swa, 128.0, 1.0),
        _ => 0.0,
    };
    // Layers without a window, with one and without rotation; theta of those with one without a key
    // and with it.
    for (architecture, layers, absent, given) in [
        ("afmoe", "sss.sss.", BASE, SWA),
        ("llama4", "sss.sss.", BASE, SWA),
        ("gemma2", "sfsfs", BASE, SWA),
        ("gpt-oss", "sfsfs", BASE, SWA),
        ("smallthinker", ".sss.s", BASE, SWA),
        ("laguna", "fsssfs", BASE, SWA),
        ("muse-glimmer", "sss.sss.", BASE, SWA),
        ("gemma3", "sssssfs", 1e4, SWA),
        ("gemma-embedding", "sssssfs", 1e4, SWA),
        ("gemma3n", "ssssfs", 1e4, SWA),
        ("modern-bert", "fssfss", 1e4, SWA),
        ("plamo3", "sssssssfs", 1e4, SWA),
        ("olmo2", "sssfsssf", BASE, BASE),
        ("mellum", "sssfsssf", BASE, BASE),
        ("cohere2", "sss.sss.", BASE, BASE),
        ("cohere2moe", ".sss.sss", BASE, BASE),
        ("exaone-moe", "sss.sss.", BASE, BASE),
    ] {
        let file = file(architecture, layers.len() as u64);
        let expected = |swa| -> Vec<f64> { layers.chars().map(|m| theta_of(m, swa)).collect() };
        check_layers(&file, &expected(absent));
        let named = file.clone().number("rope.freq_base_swa", SWA);
        check_layers(&named, &expected(given));
        // A number in place of the array is another period; 0 is a window everywhere.
        let everywhere = named.count("attention.sliding_window_pattern", 0);
        let first = everywhere.read().unwrap();
        let first = first.rope_of_layer(1).unwrap().unwrap();
        assert_eq!(first.theta(), given, "{architecture}");
    }
    // The array tells which layers have a window, and it alone may.
    for (architecture, absent, full) in [
        ("gemma4", 1e4, 'f'),
        ("gemma4-assistant", 1e4, 'f'),
        ("mimo2", 1e4, 'f'),
        ("spark2_5", BASE, 'f'),
        ("maple", BASE, '.'),
    ] {
        let file = file(architecture, 4);
        let listed = file
            .clone()
            .array("attention.sliding_window_pattern", &[1, 0, 1]);
        let expected = |swa| ['s', full, 's', full].map(|mark| theta_of(mark, swa));
        check_layers(&listed, &expected(absent));
        check_layers(&listed.number("rope.freq_base_swa", SWA), &expected(SWA));
        let period = file.count("attention.sliding_window_pattern", 2);
        names(
            &period.read().unwrap_err(),
            &["attention.sliding_window_pattern is 2", "an array"],
        );
    }
    // Without a window: all alike, but for layers that never rotate.
    for (architecture, layers) in [
        ("gemma3", "ffffff"),
        ("modern-bert", "ffffff"),
        ("plamo3", "ffffffff"),
        ("olmo2", "ffff"),
        ("laguna", "ffff"),
        ("smallthinker", "fffff"),
        ("afmoe", "fff.ff"),
        ("llama4", "fffff."),
    ] {
        let none = file(architecture, layers.len() as u64)
            .count("attention.sliding_window", 0)
            .number("rope.freq_base_swa", SWA);
        let expected: Vec<f64> = layers.chars().map(|mark| theta_of(mark, SWA)).collect();
        check_layers(&none, &expected);
    }
    // A draft of as many layers as the period rotates in all of them.
    let four = file("smallthinker", 4);
    let [full, local] = [theta_of('f', BASE), theta_of('s', BASE)];
    check_layers(&four, &[full, local, local, local]);
    // The last blocks of a decision head do not rotate.
    let decision = file("modern-bert", 6).count("decision.block_count", 2);
    let [full, local] = [theta_of('f', 1e4), theta_of('s', 1e4)];
    check_layers(&decision, &[full, local, local, full, 0.0, 0.0]);
    // Layers that predict further tokens have none.
    let further = file("gemma3", 4).count("nextn_predict_layers", 1);
    check_layers(&further, &[local, local, local, full]);
    let all = file("gemma3", 4).count("nextn_predict_layers", 5);
    names(
        &all.read().unwrap_err(),
        &["nextn_predict_layers is 5", "at most"],
    );
}

#[test]
fn scaling_of_layers_with_a_window() {
    let mscale = 0.1 * 8f64.ln() + 1.0;
    let yarn = |architecture: &str| {
        Gguf::new(architecture)
            .number("rope.freq_base", 1e6)
            .count("attention.sliding_window", 512)
            .count("block_count", 4)
            .array("attention.sliding_window_pattern", &[1, 0, 1, 0])
            .text("rope.scaling.type", "yarn")
            .number("rope.scaling.factor", 8.0)
            .number("rope.scaling.attn_factor", 1.5)
            .count("rope.scaling.original_context_length", 4096)
    };
    let of_layer = |file: &Gguf, layer: usize| {
        let model = file.read().unwrap();
        let frequencies = model.rope_of_layer(layer).unwrap().unwrap();
        let frequencies = frequencies.frequencies().unwrap();
        let last = frequencies.inv_freq()[63];
        (last, f64::from(frequencies.attention_factor()))
    };
    // The last pair is interpolated. Scaled by the base of its layers, with the attention factor of
    // scaled frequencies, that of others, or none.
    let plain = inv_freq(1e6, 128.0, 63.0);
    let local = inv_freq(1e4, 128.0, 63.0);
    for (architecture, last, attention) in [
        ("gpt-oss", plain / 8.0, 1.5 * mscale),
        ("gemma2", plain / 8.0, 1.5 * mscale),
        ("gemma3", local, 1.5),
        ("mimo2", local, 1.5),
        ("plamo3", local, 1.5),
        ("muse-glimmer", plain, 1.5),
        ("laguna", plain, 1.0),
        ("olmo2", plain, 1.0),
        ("mellum", plain, 1.0),
    ] {
        let (got, factor) = of_layer(&yarn(architecture), 0);
        assert!(
            (got / last - 1.0).abs() < 1e-12,
            "{architecture}: {got}, {last}"
        );
        assert!((factor / attention - 1.0).abs() < 1e-7, "{architecture}");
        if architecture != "muse-glimmer" {
            let (got, factor) = of_layer(&yarn(architecture), 1);
            assert!((got * 8.0 / plain - 1.0).abs() < 1e-12, "{architecture}");
            assert!(
                (factor / (1.5 * mscale) - 1.0).abs() < 1e-7,
                "{architecture}"
            );
        }
    }
    // Without YaRN the attention factor stands alone, and needs no length of training.
    let alone = Gguf::new("qwen2")
        .number("rope.scaling.attn_factor", 1.5)
        .rope();
    assert_eq!(alone.scaling(), &Scaling::None);
    assert_eq!(alone.frequencies().unwrap().attention_factor(), 1.5);
}

#[test]
fn layers_that_do_not_rotate() {
    let rotates = |file: &Gguf, expected: &str| {
        let model = file.read().unwrap();
        let of_layer = |layer| match model.rope_of_layer(layer).unwrap() {
            Some(_) => 'x',
            None => '.',
        };
        let got: String = (0..expected.len()).map(of_layer).collect();
        assert_eq!(got, expected);
    };
    let cohere = Gguf::new("cohere2moe").count("block_count", 6);
    rotates(&cohere, ".xxx.x");
    let cohere = cohere.count("leading_dense_block_count", 1);
    rotates(&cohere, "xxxx.x");
    let listed = cohere
        .clone()
        .array("attention.sliding_window_pattern", &[0, 0, 1]);
    rotates(&listed.count("nextn_predict_layers", 1), "x.x..x");

    let exaone = Gguf::new("exaone4").count("nextn_predict_layers", 1);
    rotates(
        &exaone.clone().count("block_count", 65),
        "xxx.xxx.xxx.xxx.xxx.",
    );
    rotates(&exaone.count("block_count", 64), "xxxxxxxx");
    let unsaid = Gguf::new("exaone4").read().unwrap();
    assert_eq!(unsaid.rope().unwrap().theta(), 1e4);
    names(
        &unsaid.rope_of_layer(0).unwrap_err(),
        &["exaone4.block_count is missing"],
    );

    let granite = Gguf::new("granite_swa").count("block_count", 4);
    let granite = granite.array("attention.sliding_window_pattern", &[1, 1, 0, 1]);
    rotates(&granite, "xxxx");
    let some = granite.clone().array("attention.rope_pattern", &[1, 0, 0]);
    rotates(&some, "x..x");
    let none = granite.clone().array("attention.rope_pattern", &[0; 4]);
    assert!(matches!(none.read(), Err(ConfigError::NoRotation { .. })));
    let number = granite.count("attention.rope_pattern", 1);
    names(
        &number.read().unwrap_err(),
        &["attention.rope_pattern is 1", "an array"],
    );

    let minimax = Gguf::new("minimax-01").count("block_count", 9);
    rotates(&minimax, ".......x.");
    let bailing = Gguf::new("bailingmoe3")
        .count("block_count", 4)
        .count("rope.dimension_count", 64)
        .count("attention.key_length_mla", 192)
        .array("attention.head_count_kv", &[0, 1, 0, 1]);
    rotates(&bailing, ".x.x");
}

#[test]
fn deepseek_v4() {
    let file = Gguf::new("deepseek4")
        .count("block_count", 4)
        .count("attention.key_length", 512)
        .count("rope.dimension_count", 64)
        .number("attention.compress_rope_freq_base", 160_000.0)
        .text("rope.scaling.type", "yarn")
        .number("rope.scaling.factor", 16.0)
        .number("rope.scaling.attn_factor", 1.5)
        .count("rope.scaling.original_context_length", 65_536);
    let kinds = file.read().unwrap();
    assert_eq!(kinds.layer_types(), ["main", "compress"]);
    names(
        &kinds.rope_of_layer(0).unwrap_err(),
        &["deepseek4.attention.compress_ratios is missing"],
    );
    let ratios = file
        .clone()
        .array("attention.compress_ratios", &[0, 4, 128, 0, 0]);
    let model = ratios.read().unwrap();
    for (layer, theta, last) in [(0, 1e4, 1.0), (1, 160_000.0, 16.0), (2, 160_000.0, 16.0)] {
        let config = model.rope_of_layer(layer).unwrap().unwrap();
        assert_eq!(
            (config.theta(), config.pairing()),
            (theta, Pairing::Interleaved)
        );
        assert_eq!((config.rotary_offset(), config.rotary_dim()), (448, 64));
        let frequencies = config.frequencies().unwrap();
        assert_eq!(frequencies.attention_factor(), 1.0);
        let expected = inv_freq(theta, 64.0, 31.0) / last;
        assert!((frequencies.inv_freq()[31] / expected - 1.0).abs() < 1e-12);
        assert!((config.score_scale() - 512f64.powf(-0.5)).abs() < 1e-15);
    }
    let short = file.clone().array("attention.compress_ratios", &[0, 4]);
    names(
        &short.read().unwrap_err(),
        &["attention.compress_ratios", "4 layers"],
    );
    let mut unbased = file;
    unbased
        .numbers
        .remove("deepseek4.attention.compress_rope_freq_base");
    names(
        &unbased.read().unwrap_err(),
        &["attention.compress_rope_freq_base is missing"],
    );
}

#[test]
fn architectures_with_rules_of_their_own() {
    // theta * 1000^(128 / 126)
    let hunyuan = |architecture| Gguf::new(architecture).number("rope.scaling.alpha", 1000.0);
    for architecture in ["hunyuan_vl", "hunyuan-dense"] {
        let frequencies = hunyuan(architecture).rope().frequencies().unwrap();
        let base = 1e4 * 1000f64.powf(128.0 / 126.0);
        let expected = inv_freq(base, 128.0, 1.0);
        assert!((frequencies.inv_freq()[1] / expected - 1.0).abs() < 1e-12);
    }
    assert_eq!(hunyuan("hunyuan-moe").rope().scaling(), &Scaling::None);
    let both = hunyuan("hunyuan_vl").number("rope.scaling.factor", 2.0);
    names(
        &both.read().unwrap_err(),
        &["rope.scaling.alpha", "rope.scaling.factor"],
    );
    let vision = hunyuan("hunyuan_vl").array("rope.dimension_sections", &[16; 4]);
    assert!(vision.rope().axes().is_some());

    for architecture in ["deepseek2-ocr", "cogvlm"] {
        let file = Gguf::new(architecture).number("rope.scaling.factor", 4.0);
        let config = file.rope();
        assert_eq!(
            (config.pairing(), config.scaling()),
            (Pairing::HalfSplit, &Scaling::None)
        );
        let other = file.number("rope.freq_base", 5e5);
        names(
            &other.read().unwrap_err(),
            &["rope.freq_base is 500000", "10000"],
        );
    }

    // Heads as long as their rotated part.
    for architecture in ["bailingmoe", "gpt-oss"] {
        let config = Gguf::new(architecture)
            .count("rope.dimension_count", 64)
            .rope();
        assert_eq!((config.head_dim(), config.score_scale()), (64, 0.125));
    }

    let draft = Gguf::new("dflash")
        .text("rope.scaling.type", "yarn")
        .number("rope.scaling.factor", 4.0)
        .count("rope.scaling.original_context_length", 4096)
        .number("attention.scale", 0.25);
    let plain = draft.rope();
    assert_eq!(
        (plain.pairing(), plain.score_scale()),
        (Pairing::HalfSplit, 0.25)
    );
    assert_eq!(plain.scaling().name(), "YaRN");
    let divided = draft.clone().tensor("rope_freqs.weight", vec![2.0; 64]);
    assert!(divided.rope().frequency_divisors().is_some());
    let sections = divided
        .array("rope.dimension_sections", &[64, 0, 0, 0])
        .rope();
    assert_eq!(
        (sections.pairing(), sections.frequency_divisors()),
        (Pairing::HalfSplit, None)
    );
    let axes = Axes::Ggml {
        mode: GgmlMrope::Mrope,
        sections: [64, 0, 0, 0],
    };
    assert_eq!(sections.axes(), Some(&axes));
    let like_v4 = draft
        .count("hyper_connection.count", 4)
        .count("rope.dimension_count", 64);
    let like_v4 = like_v4.rope();
    assert_eq!(
        (like_v4.pairing(), like_v4.rotary_offset()),
        (Pairing::Interleaved, 64)
    );
    assert_eq!(like_v4.scaling(), &Scaling::None);

    let modern = Gguf::new("plamo2").count("attention.value_length", 64);
    assert_eq!(modern.rope().score_scale(), 0.125);
    let grok = Gguf::new("grok").count("attention.key_length", 64);
    assert_eq!(grok.rope().score_scale(), 0.08838834764831845);
    assert_eq!(
        grok.number("attention.output_scale", 0.5)
            .rope()
            .score_scale(),
        0.5
    );
    for (architecture, scale) in [("granite", 0.5), ("qwen2", 128f64.powf(-0.5))] {
        let config = Gguf::new(architecture)
            .number("attention.scale", 0.5)
            .rope();
        assert!(
            (config.score_scale() - scale).abs() < 1e-15,
            "{architecture}"
        );
    }
}

/// What scores are multiplied with, by llama.cpp's rule for each architecture.
#[test]
fn score_scales() {
    let scale_of = |file: Gguf| {
        let read = file.read().unwrap();
        let layer = (0..4).find_map(|layer| read.rope_of_layer(layer).unwrap().cloned());
        layer.unwrap().score_scale()
    };
    let of = |architecture: &str| {
        let file = Gguf::new(architecture)
            .count("block_count", 4)
            .count("attention.key_length", 64)
            .count("attention.head_count_kv", 8)
            .count("rope.dimension_count", 64);
        file.array("attention.sliding_window_pattern", &[1, 0, 1, 0])
    };
    let dims = |dims: f64| dims.sqrt().recip();
    let given = |architecture: &str| of(architecture).number("attention.scale", 0.5);
    for (architecture, scale) in [
        ("granite", 0.5),
        ("granitemoe", 0.5),
        ("granitehybrid", 0.5),
        ("graniteswitch", 0.5),
        ("granite_swa", 0.5),
        ("dflash", 0.5),
        ("gemma3n", 1.0),
        ("gemma4", 1.0),
        ("gemma4-assistant", 1.0),
        ("llama", 0.125),
        ("gemma", 0.125),
    ] {
        assert_eq!(scale_of(given(architecture)), scale, "{architecture}");
        if scale == 0.5 {
            // 0 is as if it were absent.
            let zero = of(architecture).number("attention.scale", 0.0);
            assert_eq!(scale_of(zero), 0.125, "{architecture}");
            for (number, expected) in [(-0.5, "a positive number"), (f64::INFINITY, "a number")] {
                let wrong = of(architecture).number("attention.scale", number);
                let key = format!("{architecture}.attention.scale");
                names(&wrong.read().unwrap_err(), &[&key, expected]);
            }
        }
    }
    // The largest models of Gemma 2 and 3 have `query_pre_attn_scalar = hidden / heads`.
    for (architecture, layers) in [("gemma2", 46), ("gemma3", 62)] {
        for (count, scale) in [(layers, dims(4608.0 / 32.0)), (layers - 1, dims(64.0))] {
            let file = of(architecture)
                .count("block_count", count)
                .count("embedding_length", 4608);
            assert_eq!(scale_of(file), scale, "{architecture} {count}");
        }
    }
    // Latent attention, by the dims of both parts.
    for architecture in ["plm", "hy_v4", "bailingmoe3", "minicpm3", "deepseek2"] {
        let mla = of(architecture).count("attention.key_length_mla", 192);
        let mla = mla.number("attention.scale", 0.5);
        let scale = scale_of(mla) / dims(192.0);
        assert!((scale - 1.0).abs() < 1e-15, "{architecture}: {scale}");
    }
    let windows = of("dots3note")
        .count("attention.key_length_mla", 192)
        .count("attention.key_length_mla_swa", 96);
    let read = windows.read().unwrap();
    let scale = |layer| read.rope_of_layer(layer).unwrap().unwrap().score_scale();
    assert_eq!((scale(0), scale(1)), (dims(96.0), dims(192.0)));
    let without = of("dots3note").count("attention.key_length_mla", 192);
    names(
        &without.read().unwrap_err(),
        &["attention.key_length_mla_swa is missing"],
    );
    // Without YaRN llama.cpp's attention factor is 1 still, and grows with the factor all the same:
    // `mscale = (1 + 0.1 ln 4) (1 + 0.1 * 10 * 0.0707 ln 4)`, and scores take its square.
    let linear = of("deepseek32")
        .count("attention.key_length_mla", 192)
        .text("rope.scaling.type", "linear")
        .number("rope.scaling.factor", 4.0)
        .number("rope.scaling.yarn_log_multiplier", 0.0707);
    let mscale = (1.0 + 0.1 * 4f64.ln()) * (1.0 + 0.0707 * 4f64.ln());
    let expected = dims(192.0) * mscale * mscale;
    let scale = scale_of(linear);
    assert!((scale / expected - 1.0).abs() < 1e-7, "{scale} {expected}");
}

/// Arrays that a reader has as `i32`, as llama.cpp's converter writes them.
#[test]
fn arrays_with_a_sign() {
    let heads = |heads: &[i32]| {
        let mut file = Gguf::new("llama").signed("attention.head_count", heads);
        file.counts.remove("llama.attention.head_count");
        file
    };
    // The first layer that has heads tells how many dims one has.
    let read = heads(&[0, -2, 8, 4]).read().unwrap();
    assert_eq!(read.rope().unwrap().head_dim(), 512);
    assert_eq!(read.rope_of_layer(0).unwrap(), None);
    assert!(read.rope_of_layer(3).unwrap().is_some());
    for none in [&[0, 0][..], &[-1], &[]] {
        names(
            &heads(none).read().unwrap_err(),
            &[
                "llama.attention.head_count is an array",
                "a positive number",
            ],
        );
    }
    let pattern = |pattern: &[i32]| {
        Gguf::new("mimo2")
            .number("rope.freq_base", 5e6)
            .signed("attention.sliding_window_pattern", pattern)
    };
    let read = pattern(&[1, 0, 1]).read().unwrap();
    let theta = |layer| read.rope_of_layer(layer).unwrap().unwrap().theta();
    assert_eq!([theta(0), theta(1), theta(2)], [1e4, 5e6, 1e4]);
    // As many layers as any model has, and one more.
    assert!(pattern(&[1; 1 << 16]).read().is_ok());
    names(
        &pattern(&[1; (1 << 16) + 1]).read().unwrap_err(),
        &[
            "sliding_window_pattern is an array of 65537",
            "at most 65536",
        ],
    );
    let layers = |count| Gguf::new("smollm3").count("block_count", count).read();
    assert!(layers(1 << 16).is_ok());
    names(
        &layers((1 << 16) + 1).unwrap_err(),
        &["smollm3.block_count is 65537", "at most 65536"],
    );
}

#[test]
fn what_stretches_and_what_scales() {
    let hunyuan = |alpha: f64| Gguf::new("hunyuan-dense").number("rope.scaling.alpha", alpha);
    // 0 is as if it were absent.
    for absent in [0.0, -1.0] {
        assert_eq!(hunyuan(absent).rope().scaling(), &Scaling::None);
    }
    let yarn = |file: Gguf| {
        file.text("rope.scaling.type", "yarn")
            .number("rope.scaling.factor", 4.0)
            .count("rope.scaling.original_context_length", 4096)
    };
    assert_eq!(yarn(hunyuan(0.0)).rope().scaling().name(), "YaRN");
    names(
        &yarn(hunyuan(1000.0)).read().unwrap_err(),
        &["rope.scaling.alpha", "rope.scaling.factor"],
    );
    let factor = |factor: f64| Gguf::new("llama").number("rope.scaling.factor", factor);
    assert_eq!(factor(0.0).rope().scaling(), &Scaling::None);
    names(
        &factor(-2.0).read().unwrap_err(),
        &["llama.rope.scaling.factor is -2", "a positive number"],
    );
    let older = Gguf::new("llama").number("rope.scale_linear", -2.0);
    names(
        &older.read().unwrap_err(),
        &["llama.rope.scale_linear is -2", "a positive number"],
    );
    // Positions are divided by the factor, beside what each pair is divided by.
    let long = |factor: f64| {
        Gguf::new("phi3")
            .count("context_length", 4096)
            .text("rope.scaling.type", "longrope")
            .number("rope.scaling.factor", factor)
            .tensor("rope_factors_short.weight", vec![3.0; 64])
            .tensor("rope_factors_long.weight", vec![8.0; 64])
    };
    for (length, divisor) in [(4096, 3.0 * 4.0), (4097, 8.0 * 4.0)] {
        let frequencies = long(4.0).rope().frequencies_for_length(length).unwrap();
        let first = frequencies.inv_freq()[0] * divisor;
        assert!((first - 1.0).abs() < 1e-12, "{length}: {first}");
    }
    // A type that needs tensors, without them.
    for architecture in ["phi3", "llama"] {
        let file = Gguf::new(architecture).text("rope.scaling.type", "longrope");
        names(
            &file.count("context_length", 4096).read().unwrap_err(),
            &["rope_factors_short.weight is missing"],
        );
    }
    // The converter writes a tenth of `mscale_all_dim`, but for mistral3.
    for (architecture, all_dim) in [("deepseek2", 0.5), ("mistral3", 0.05), ("qwen2", 0.0)] {
        let file = yarn(Gguf::new(architecture))
            .number("rope.scaling.yarn_log_multiplier", 0.05)
            .count("rope.dimension_count", 64)
            .count("attention.key_length_mla", 192);
        match file.rope().scaling() {
            Scaling::Yarn(yarn) => {
                let got = yarn.mscale_all_dim.unwrap_or(0.0);
                assert!((got - all_dim).abs() < 1e-8, "{architecture}: {got}");
            }
            other => panic!("{architecture}: {other:?}"),
        }
    }
    // Sections of which only the first counts are none, but where axes are what there is.
    let sections = |sections: [u32; 4]| {
        let file = Gguf::new("glm4").array("rope.dimension_sections", &sections);
        let rope = file.rope();
        (rope.pairing(), rope.axes().is_some())
    };
    assert_eq!(sections([64, 0, 0, 0]), (Pairing::Interleaved, false));
    assert_eq!(sections([0, 32, 32, 0]), (Pairing::Interleaved, false));
    assert_eq!(sections([24, 20, 20, 0]), (Pairing::HalfSplit, true));
    let ling = |file: Gguf| {
        file.count("block_count", 2)
            .count("rope.dimension_count", 128)
            .count("attention.key_length_mla", 192)
    };
    let ling = || ling(Gguf::new("bailingmoe3"));
    let vision = ling()
        .count("attention.head_count_kv", 8)
        .array("rope.dimension_sections", &[24, 20, 20, 0]);
    assert!(vision.rope().axes().is_some());
    // Which of its layers attend is told by their heads.
    names(
        &ling().read().unwrap().rope_of_layer(0).unwrap_err(),
        &["attention.head_count_kv is missing"],
    );
    let windows = Gguf::new("granite_swa").array("attention.sliding_window_pattern", &[1, 0]);
    let windows = windows.count("block_count", 2).read().unwrap();
    assert_eq!(
        windows.layer_types(),
        ["sliding_attention", "full_attention"]
    );
}

/// Which keys about YaRN count differs.
#[test]
fn keys_of_yarn() {
    let file = |architecture: &str| {
        Gguf::new(architecture)
            .count("rope.dimension_count", 128)
            .text("rope.scaling.type", "yarn")
            .number("rope.scaling.factor", 8.0)
            .count("rope.scaling.original_context_length", 4096)
    };
    let betas = |file: Gguf| match file.rope().scaling() {
        Scaling::Yarn(yarn) => (yarn.beta_fast, yarn.beta_slow),
        other => panic!("{other:?}"),
    };
    let given = |file: Gguf| {
        file.number("rope.scaling.yarn_beta_fast", 16.0)
            .number("rope.scaling.yarn_beta_slow", 2.0)
    };
    for (architecture, absent, with) in [
        ("grok", (8.0, 1.0), (16.0, 2.0)),
        ("mistral3", (32.0, 1.0), (16.0, 2.0)),
        ("qwen2", (32.0, 1.0), (32.0, 1.0)),
    ] {
        assert_eq!(betas(file(architecture)), absent, "{architecture}");
        assert_eq!(betas(given(file(architecture))), with, "{architecture}");
    }
    let off = |architecture| file(architecture).number("rope.scaling.yarn_ext_factor", 0.0);
    assert_eq!(off("grok").rope().scaling().name(), "linear");
    assert_eq!(off("qwen2").rope().scaling().name(), "YaRN");
    let beside = off("grok")
        .number("rope.scaling.yarn_attn_factor", 0.5)
        .rope();
    assert_eq!(beside.frequencies().unwrap().attention_factor(), 0.5);

    // mscale is 1 but for deepseek2, whose mscale and mscale_all_dim are equal. The converter writes
    // a tenth of it for all but mistral3.
    let growth = |m: f64| 0.1 * m * 8f64.ln() + 1.0;
    let scores = 192f64.powf(-0.5);
    for (architecture, multiplier, attention, score) in [
        ("deepseek2", 0.0707, 1.0, growth(0.707)),
        (
            "deepseek32",
            0.0707,
            growth(1.0) / growth(0.707),
            growth(1.0),
        ),
        ("mistral4", 0.0707, growth(1.0) / growth(0.707), growth(1.0)),
        ("deepseek2", 0.1, 1.0, growth(1.0)),
        ("deepseek32", 0.1, 1.0, growth(1.0)),
        ("glm-dsa", 0.0707, growth(1.0), growth(1.0)),
        ("deepseek2", 0.0, growth(1.0), growth(1.0)),
    ] {
        let config = file(architecture)
            .count("rope.dimension_count", 64)
            .count("attention.key_length_mla", 192)
            .number("rope.scaling.yarn_log_multiplier", multiplier)
            .rope();
        let got = f64::from(config.frequencies().unwrap().attention_factor());
        assert!(
            (got / attention - 1.0).abs() < 1e-7,
            "{architecture}: {got}, {attention}"
        );
        let score = scores * score * score;
        assert!(
            (config.score_scale() / score - 1.0).abs() < 1e-7,
            "{architecture}"
        );
    }
    let mistral = file("mistral3")
        .number("rope.scaling.yarn_log_multiplier", 1.0)
        .rope();
    assert_eq!(mistral.frequencies().unwrap().attention_factor(), 1.0);
    let plain = file("minicpm3").count("attention.key_length", 192).rope();
    assert!((plain.score_scale() - scores).abs() < 1e-15);
}

#[test]
fn tensors_that_count() {
    let freqs =
        |architecture: &str| Gguf::new(architecture).tensor("rope_freqs.weight", vec![2.0; 64]);
    for architecture in [
        "llama", "exaone", "nanbeige", "eagle3", "granite", "apertus",
    ] {
        assert!(freqs(architecture).rope().frequency_divisors().is_some());
    }
    // Loaded, and not used.
    for architecture in ["llada", "falcon-h1", "pangu-embedded", "cogvlm"] {
        assert!(freqs(architecture).rope().frequency_divisors().is_none());
    }
    for architecture in ["qwen2", "phi3", "gemma3", "deepseek4"] {
        names(
            &freqs(architecture).read().unwrap_err(),
            &["rope_freqs.weight", architecture, "llama.cpp"],
        );
    }
    let long = |architecture: &str| {
        Gguf::new(architecture)
            .count("context_length", 4096)
            .tensor("rope_factors_short.weight", vec![1.0; 64])
            .tensor("rope_factors_long.weight", vec![8.0; 64])
    };
    let longrope = |file: Gguf| file.text("rope.scaling.type", "longrope");
    for architecture in ["phi3", "phimoe"] {
        assert_eq!(long(architecture).rope().scaling().name(), "LongRoPE");
    }
    for architecture in ["llama", "minicpm", "mistral3", "granite_swa"] {
        assert_eq!(
            longrope(long(architecture)).rope().scaling().name(),
            "LongRoPE"
        );
        names(
            &long(architecture).read().unwrap_err(),
            &["rope.scaling.type is absent", "longrope"],
        );
    }
    // Of both kinds llama.cpp knows those of the type.
    let both = longrope(long("llama")).tensor("rope_freqs.weight", vec![2.0; 64]);
    names(
        &both.read().unwrap_err(),
        &["rope_freqs.weight", "llama.cpp"],
    );
    let step = longrope(long("step35")).array("attention.sliding_window_pattern", &[1, 0]);
    let step = step.count("block_count", 2).read().unwrap();
    let rows = |layer| step.rope_of_layer(layer).unwrap().unwrap().scaling().name();
    assert_eq!((rows(0), rows(1)), ("default", "LongRoPE"));
    for file in [
        long("qwen2"),
        longrope(Gguf::new("qwen2")),
        longrope(long("pangu-embedded")),
    ] {
        assert!(matches!(file.read(), Err(ConfigError::Unsupported { .. })));
    }
    let yarn = long("phi3").text("rope.scaling.type", "yarn");
    names(
        &yarn.read().unwrap_err(),
        &["rope.scaling.type is \"yarn\"", "longrope"],
    );
}

#[test]
fn names_that_others_use() {
    for (name, meant) in [
        ("mistral", "llama"),
        ("Mixtral", "llama"),
        ("Llama", "llama"),
        ("qwen2_vl", "qwen2vl"),
        ("gpt_neox", "gptneox"),
        ("gpt_oss", "gpt-oss"),
        ("deepseek_v3", "deepseek2"),
        ("deepseek_v32", "deepseek32"),
        ("gemma3_text", "gemma3"),
        ("cohere", "command-r"),
        ("olmo3", "olmo2"),
        ("step3p5", "step35"),
    ] {
        let error = Gguf::new(name).read().unwrap_err();
        names(&error, &[name, &format!("calls such models {meant:?}")]);
        // That name is read, or missing but keys.
        let renamed = Gguf::new(meant).read();
        assert!(!matches!(
            renamed,
            Err(ConfigError::UnknownArchitecture { .. })
        ));
    }
    // What it is compared without does not count, in names that are no longer than any.
    let apart = |dashes: usize| Gguf::new(&format!("q{}wen2", "-".repeat(dashes))).read();
    names(&apart(35).unwrap_err(), &["calls such models \"qwen2\""]);
    names(&apart(36).unwrap_err(), &["its pairing is not known here"]);
    for name in ["made-up", "gptj", "", &"x".repeat(10_000)] {
        let error = Gguf::new(name).read().unwrap_err();
        names(
            &error,
            &["general.architecture is", "its pairing is not known here"],
        );
        assert!(error.to_string().len() < 300);
    }
}

/// Values that a reader has in another form, as lists of values.
#[test]
fn owned_values() {
    enum Own {
        U32(u32),
        I32(i32),
        Bool(bool),
        F32(f32),
        Text(String),
        List(Vec<Own>),
    }
    fn collected<T>(entries: &[Own], entry: impl Fn(&Own) -> Option<T>) -> Option<Vec<T>> {
        entries.iter().map(entry).collect()
    }
    fn given(value: &Own) -> Option<GgufValue<'static>> {
        Some(match value {
            Own::U32(number) => (*number).into(),
            Own::I32(number) => (*number).into(),
            Own::Bool(flag) => (*flag).into(),
            Own::F32(number) => (*number).into(),
            Own::Text(text) => text.clone().into(),
            Own::List(list) => match list.first()? {
                Own::U32(_) => collected(list, |v| match v {
                    Own::U32(n) => Some(*n),
                    _ => None,
                })?
                .into(),
                Own::I32(_) => collected(list, |v| match v {
                    Own::I32(n) => Some(*n),
                    _ => None,
                })?
                .into(),
                Own::Bool(_) => collected(list, |v| match v {
                    Own::Bool(flag) => Some(*flag),
                    _ => None,
                })?
                .into(),
                _ => collected(list, |v| match v {
                    Own::F32(n) => Some(*n),
                    _ => None,
                })?
                .into(),
            },
        })
    }
    let windows = [true, false, true].map(Own::Bool);
    let file: BTreeMap<&str, Own> = BTreeMap::from([
        ("general.architecture", Own::Text("gemma4".into())),
        ("gemma4.block_count", Own::U32(3)),
        ("gemma4.attention.key_length", Own::I32(8)),
        ("gemma4.rope.freq_base", Own::F32(1e6)),
        (
            "gemma4.attention.sliding_window_pattern",
            Own::List(windows.into()),
        ),
        (
            "rope_freqs.weight",
            Own::List((0..4).map(|_| Own::F32(2.0)).collect()),
        ),
    ]);
    let model = ModelConfig::from_gguf(|key| file.get(key).and_then(given)).unwrap();
    let full = model.rope_of_layer(1).unwrap().unwrap();
    assert_eq!(full.frequency_divisors(), Some(&[2.0; 4][..]));
    assert_eq!(model.rope_of_layer(2).unwrap().unwrap().theta(), 1e4);
    let sections: [GgufValue; 2] = [vec![1u32, 2].into(), vec![1i32, 2].into()];
    for sections in sections {
        let model = ModelConfig::from_gguf(|key| match key {
            "general.architecture" => Some("qwen2vl".to_string().into()),
            "qwen2vl.attention.key_length" => Some(8u8.into()),
            "qwen2vl.rope.dimension_sections" => Some(sections.clone()),
            _ => None,
        });
        let axes = Axes::Ggml {
            mode: GgmlMrope::Mrope,
            sections: [1, 2, 0, 0],
        };
        assert_eq!(model.unwrap().rope().unwrap().axes(), Some(&axes));
    }
}

fn use_all(read: Result<ModelConfig, ConfigError>) {
    let model = match read {
        Ok(model) => model,
        Err(error) => {
            let text = error.to_string();
            assert!(!text.is_empty() && text.len() < 1000, "{text}");
            return;
        }
    };
    let _ = (model.rope(), model.rope_of_layer(usize::MAX));
    for name in model.layer_types() {
        let config = model.rope_for(name).unwrap();
        assert!(config.score_scale() > 0.0);
        for length in [0, 5000, u64::MAX] {
            let Ok(frequencies) = config.frequencies_for_length(length) else {
                continue;
            };
            assert_eq!(2 * frequencies.pairs(), config.rotary_dim());
            let (cos, sin) = frequencies.cos_sin(0, 12_345);
            assert!(cos.is_finite() && sin.is_finite());
        }
    }
}

proptest! {
    #[test]
    fn no_gguf_value_panics(
        architecture in prop::sample::select(vec![
            "llama", "deepseek2", "gemma3", "gemma4", "qwen2vl", "qwen3vl", "cohere2", "smollm3", "phi3",
            "llama4", "granitehybrid", "lfm2", "qwen35", "baichuan", "deci", "deepseek4", "step35",
            "dflash", "hunyuan_vl", "granite_swa", "cohere2moe", "smallthinker", "modern-bert", "grok",
            "exaone4", "minimax-01", "dots3note",
        ]),
        seeds in prop::collection::vec((any::<u8>(), any::<u64>(), any::<f64>()), 12),
        floats in prop::collection::vec(any::<f32>(), 0..70),
        counts in prop::collection::vec(any::<u32>(), 0..6),
    ) {
        use_all(ModelConfig::from_gguf(|key| {
            if key == "general.architecture" {
                return Some(architecture.into());
            }
            let hash = key.bytes().fold(7usize, |hash, byte| hash.wrapping_mul(31) ^ byte as usize);
            let (kind, integer, float) = seeds[hash % seeds.len()];
            match kind % 14 {
                0 => Some(GgufValue::U64(integer)),
                1 => Some(GgufValue::I64(integer as i64)),
                2 => Some(GgufValue::F64(float)),
                3 => Some(GgufValue::Bool(integer % 2 == 0)),
                4 => Some("yarn".into()),
                5 => Some(floats.clone().into()),
                6 => Some(GgufValue::from(&counts)),
                7 => Some(GgufValue::U64(64)),
                8 => Some(GgufValue::F64(2.0)),
                _ => None,
            }
        }));
    }
}
