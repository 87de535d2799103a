//! What llama.cpp knows about each architecture beside its file: how it pairs, which layers rotate
//! differently or not at all, and which keys count. Its own source says so in a table of types of
//! RoPE, in each architecture's loader and in each architecture's graph; `scripts/goldens/llama-cpp.py`
//! names the version and reads all three.

#[derive(Clone, Copy)]
pub(super) struct Architecture {
    pub names: &'static [&'static str],
    pub mode: Mode,
    pub window: Window,
    pub sliding: Sliding,
    pub rotates: Rotates,
    pub attention: Attention,
    pub switch: Switch,
    pub theta: Theta,
    pub head: Head,
    pub dims: Dims,
    pub yarn: Yarn,
    pub factors: Factors,
    pub score: Score,
}

#[derive(Clone, Copy, PartialEq)]
pub(super) enum Mode {
    /// Consecutive dims, to which the rows of the weights are permuted where need be.
    Interleaved,
    HalfSplit,
    /// Half-split on four axes.
    Mrope,
    /// Half-split on four axes in turn.
    Imrope,
    /// On four axes where the file gives sections, else interleaved.
    MropeOrInterleaved,
    /// On four axes where the file gives sections, else half-split.
    MropeOrHalfSplit,
    /// A draft model: on four axes where the file gives sections; as DeepSeek-V4's layers without
    /// compression where `hyper_connection.count` is above 0; else half-split.
    Draft,
    /// No rotation.
    None,
}

/// Which layers have a sliding window, as far as their rotation depends on it.
#[derive(Clone, Copy)]
pub(super) enum Window {
    /// It does not.
    Alike,
    By(Pattern),
    /// None unless `attention.sliding_window` is above 0.
    IfGiven(Pattern),
    /// None if `attention.sliding_window` is 0.
    UnlessZero(Pattern),
    /// None unless the model has so many layers.
    IfLayers(u64, Pattern),
    /// DeepSeek-V4: layers whose entry of `attention.compress_ratios` is 0 are of one kind, others
    /// of another, and both rotate the last dims of a head.
    Compressed,
}

/// Which layers have no sliding window, unless `attention.sliding_window_pattern` says so.
#[derive(Clone, Copy)]
pub(super) enum Pattern {
    /// The key must be there.
    Given,
    LastOf(u64),
    FirstOf(u64),
}

/// How layers with a sliding window rotate.
#[derive(Clone, Copy, PartialEq)]
pub(super) struct Sliding {
    pub theta: SlidingTheta,
    pub scaling: SlidingScaling,
}

#[derive(Clone, Copy, PartialEq)]
pub(super) enum SlidingTheta {
    /// `rope.freq_base_swa`, else 10,000.
    TenThousand,
    /// `rope.freq_base_swa`, else that of the other layers.
    Same,
    /// That of the other layers, whatever `rope.freq_base_swa` says.
    Shared,
}

#[derive(Clone, Copy, PartialEq)]
pub(super) enum SlidingScaling {
    /// As the other layers.
    Same,
    /// Their frequencies are not scaled, but the attention factor is that of the other layers, less
    /// what ggml multiplies into it for scaled frequencies.
    FrequenciesUnscaled,
    /// No scaling and no attention factor.
    Plain,
}

/// Which layers rotate.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Rotates {
    All,
    /// Those with a sliding window, and all of a model without.
    Sliding,
    /// Those with a sliding window, the first `leading_dense_block_count` and those that predict
    /// further tokens.
    SlidingOrLeading,
    /// Every so many layers, all but the last.
    AllButLastOf(u64),
    /// As `AllButLastOf`, but all layers except the very last in a model without windows: llama.cpp
    /// means all there, and its formula leaves out the last one.
    AllButLastOfBesideWindow(u64),
    /// Every so many layers, all but the first; all in a model without windows, and in one of just so
    /// many layers.
    AllButFirstOfBesideWindow(u64),
    /// All but the last `decision.block_count`.
    AllButDecision,
    /// Those with an entry other than 0 in `attention.rope_pattern`, and all without that key.
    Listed,
}

/// Which layers are attention of the tokens among each other. (Layers without heads are not, in any
/// architecture.)
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Attention {
    All,
    /// Those with heads, and `attention.head_count_kv` lists the heads of each layer.
    WithHeads,
    /// Those that `attention.recurrent_layers` does not list, else the last of every
    /// `full_attention_interval` layers, by default so many.
    Interval(u64),
}

/// Whether the model rotates at all.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Switch {
    Always,
    /// `rope.scaling.finetuned` is not false.
    Finetuned,
    /// The model has so many layers; others have ALiBi.
    Layers(u64),
}

#[derive(Clone, Copy, PartialEq)]
pub(super) enum Theta {
    /// `rope.freq_base`, else 10,000.
    Given,
    /// As `Given`, and stretched where `rope.scaling.alpha` is above 0.
    Stretched,
    /// 10,000, and no key about scaling counts.
    Fixed,
}

/// How long a head is.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Head {
    /// `attention.key_length`, else `embedding_length / attention.head_count`.
    KeyLength,
    /// As long as its rotated part.
    Rotated,
    /// With latent attention the rotated part of a head is a tensor of its own.
    Latent,
}

/// Which layers `attention.key_length_swa` and `rope.dimension_count_swa` are for.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Dims {
    /// Those with a sliding window.
    PerLayer,
    /// The second for those with a sliding window; otherwise as in `AsFirst`.
    RotatedPerLayer,
    /// As `RotatedPerLayer`, and layers without a window rotate half of `rope.dimension_count`.
    RotatedHalfUnlessSliding,
    /// All layers, if the first one has a sliding window; otherwise none.
    AsFirst,
}

/// Which keys about YaRN count.
#[derive(Clone, Copy, PartialEq)]
pub(super) struct Yarn {
    /// `yarn_beta_fast` and `yarn_beta_slow`.
    pub betas: bool,
    /// `yarn_ext_factor` and `yarn_attn_factor`.
    pub factors: bool,
    /// Where `yarn_beta_fast` is not given, or does not count.
    pub beta_fast: f64,
    pub log_multiplier: LogMultiplier,
}

#[derive(Clone, Copy, PartialEq)]
pub(super) enum LogMultiplier {
    Unread,
    /// `yarn_log_multiplier` is this multiple of `mscale_all_dim`, and `mscale` is 1.
    AllDim(f32),
    /// `yarn_log_multiplier` is this multiple of `mscale_all_dim`, and of `mscale` too.
    Both(f32),
}

/// Which tensors with a number for each pair there are.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Factors {
    /// llama.cpp knows none, and does not load a file that has any.
    Unread,
    /// `rope_freqs`, which is loaded and not used.
    IgnoredFreqs,
    /// As `FreqsOrLong`, and not used either.
    IgnoredFreqsOrLong,
    /// `rope_freqs`
    Freqs,
    /// `rope_freqs`, for layers without a sliding window.
    FreqsUnlessSliding,
    /// `rope_factors_short` and `rope_factors_long`
    Long,
    /// `rope_freqs`; for the type longrope the others instead.
    FreqsOrLong,
    /// As `FreqsOrLong`, for layers without a sliding window; their first entries, where these rotate
    /// fewer pairs than others.
    FreqsOrLongUnlessSliding,
}

/// What multiplies the scores.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Score {
    /// `head_dim^(-1/2)`
    HeadDim,
    /// `attention.scale`, else as `HeadDim`.
    Given,
    One,
    /// As `HeadDim`, but `(embedding_length / head_count)^(-1/2)` in a model of so many layers.
    HeadDimUnless(u64),
    /// `attention.value_length^(-1/2)`, else as `HeadDim`.
    ValueLength,
    /// `attention.output_scale`, else this.
    Output(f64),
    /// `key_length_mla^(-1/2)`; for layers with a sliding window, of `key_length_mla_swa`.
    Latent,
    /// As `Latent`, times the square of YaRN's mscale.
    LatentScaled,
}

use Dims::{AsFirst, PerLayer, RotatedHalfUnlessSliding, RotatedPerLayer};
use Factors::{
    Freqs, FreqsOrLong, FreqsOrLongUnlessSliding, FreqsUnlessSliding, IgnoredFreqs,
    IgnoredFreqsOrLong, Long, Unread,
};
use LogMultiplier::{AllDim, Both};
use Mode::{Draft, HalfSplit, Imrope, Interleaved, Mrope, MropeOrHalfSplit, MropeOrInterleaved};
use Pattern::{FirstOf, Given, LastOf};
use Rotates::{
    AllButDecision, AllButFirstOfBesideWindow, AllButLastOf, AllButLastOfBesideWindow, Listed,
    SlidingOrLeading,
};
use Window::{By, Compressed, IfGiven, IfLayers, UnlessZero};

const INTERLEAVED: Architecture = Architecture {
    names: &[],
    mode: Interleaved,
    window: Window::Alike,
    sliding: SAME,
    rotates: Rotates::All,
    attention: Attention::All,
    switch: Switch::Always,
    theta: Theta::Given,
    head: Head::KeyLength,
    dims: AsFirst,
    yarn: Yarn {
        betas: false,
        factors: false,
        beta_fast: 32.0,
        log_multiplier: LogMultiplier::Unread,
    },
    factors: Unread,
    score: Score::HeadDim,
};

const HALF: Architecture = Architecture {
    mode: HalfSplit,
    ..INTERLEAVED
};

const LATENT: Architecture = Architecture {
    head: Head::Latent,
    score: Score::Latent,
    ..INTERLEAVED
};

/// DeepSeek-V2 and its relatives. The number is as the converter writes it.
const LATENT_SCALED: Architecture = Architecture {
    yarn: Yarn {
        log_multiplier: AllDim(0.1),
        ..LATENT.yarn
    },
    score: Score::LatentScaled,
    ..LATENT
};

const SAME: Sliding = Sliding {
    theta: SlidingTheta::Same,
    scaling: SlidingScaling::Same,
};

const SHARED: Sliding = Sliding {
    theta: SlidingTheta::Shared,
    ..SAME
};

/// Gemma 3 and others whose loader leaves all to what llama.cpp starts with.
const LOCAL: Sliding = Sliding {
    theta: SlidingTheta::TenThousand,
    scaling: SlidingScaling::FrequenciesUnscaled,
};

const SAME_UNSCALED: Sliding = Sliding {
    theta: SlidingTheta::Same,
    ..LOCAL
};

/// OLMo 3
const SHARED_PLAIN: Sliding = Sliding {
    theta: SlidingTheta::Shared,
    scaling: SlidingScaling::Plain,
};

const SAME_PLAIN: Sliding = Sliding {
    theta: SlidingTheta::Same,
    scaling: SlidingScaling::Plain,
};

#[rustfmt::skip]
pub(super) static ARCHITECTURES: &[Architecture] = &[
    Architecture { names: &["xverse", "command-r", "olmo", "arctic", "deepseek", "chatglm", "chameleon", "neo-bert", "internlm2", "ernie4_5", "ernie4_5-moe", "maincoder", "pockettts"], ..INTERLEAVED },
    Architecture { names: &["llama", "llama-embed", "deci", "minicpm"], factors: FreqsOrLong, ..INTERLEAVED },
    Architecture { names: &["arcee", "eagle3", "nanbeige"], factors: Freqs, ..INTERLEAVED },
    Architecture { names: &["llada"], factors: IgnoredFreqs, ..INTERLEAVED },
    Architecture { names: &["mistral3"], factors: FreqsOrLong, yarn: Yarn { betas: true, log_multiplier: AllDim(1.0), ..INTERLEAVED.yarn }, ..INTERLEAVED },
    Architecture { names: &["bailingmoe"], head: Head::Rotated, ..INTERLEAVED },
    Architecture { names: &["baichuan"], switch: Switch::Layers(32), ..INTERLEAVED },
    // The loader of granitemoe no longer reads the switch that the converter writes for models without
    // positions; heeding it is what the others do.
    Architecture { names: &["granite", "granitemoe"], switch: Switch::Finetuned, factors: FreqsOrLong, score: Score::Given, ..INTERLEAVED },
    Architecture { names: &["granitehybrid"], switch: Switch::Finetuned, attention: Attention::WithHeads, factors: Freqs, score: Score::Given, ..INTERLEAVED },
    Architecture { names: &["graniteswitch"], switch: Switch::Finetuned, score: Score::Given, ..INTERLEAVED },
    Architecture { names: &["granite_swa"], window: By(Given), sliding: SHARED, rotates: Listed, factors: FreqsOrLong, score: Score::Given, ..INTERLEAVED },
    Architecture { names: &["cohere2"], window: By(LastOf(4)), sliding: SHARED, rotates: Rotates::Sliding, ..INTERLEAVED },
    Architecture { names: &["cohere2moe"], window: By(FirstOf(4)), sliding: SHARED, rotates: SlidingOrLeading, ..INTERLEAVED },
    Architecture { names: &["muse-glimmer"], window: By(LastOf(4)), sliding: SAME_UNSCALED, rotates: Rotates::Sliding, ..INTERLEAVED },
    Architecture { names: &["llama4"], window: UnlessZero(LastOf(4)), rotates: AllButLastOfBesideWindow(4), factors: Freqs, ..INTERLEAVED },
    Architecture { names: &["smollm3"], rotates: AllButLastOf(4), ..INTERLEAVED },
    Architecture { names: &["deepseek4"], window: Compressed, ..INTERLEAVED },
    Architecture { names: &["glm4"], mode: MropeOrInterleaved, ..INTERLEAVED },
    Architecture { names: &["plm", "hy_v4"], ..LATENT },
    Architecture { names: &["bailingmoe3"], mode: MropeOrInterleaved, attention: Attention::WithHeads, ..LATENT },
    Architecture { names: &["minicpm3"], mode: HalfSplit, factors: Long, ..LATENT },
    Architecture { names: &["dots3note"], window: By(Given), ..LATENT },
    Architecture { names: &["deepseek2"], yarn: Yarn { log_multiplier: Both(0.1), ..LATENT.yarn }, ..LATENT_SCALED },
    Architecture { names: &["deepseek32", "mistral4"], ..LATENT_SCALED },
    Architecture { names: &["glm-dsa"], yarn: LATENT.yarn, ..LATENT_SCALED },
    Architecture { names: &["falcon", "dbrx", "jina-bert-v3", "nomic-bert", "nomic-bert-moe", "eurobert", "stablelm", "bitnet", "qwen", "qwen2", "dream", "qwen2moe", "qwen3", "qwen3moe", "llada-moe", "rnd1", "olmoe", "phi2", "plamo", "gemma", "starcoder2", "openelm", "gptneox", "codeshell", "orion", "nemotron", "bailingmoe2", "dots1", "hunyuan-moe", "hy_v3", "jais2", "seed_oss", "grovemoe", "minimax-m2", "minimax-m3", "talkie", "hrm_text"], ..HALF },
    Architecture { names: &["falcon-h1"], factors: IgnoredFreqs, ..HALF },
    Architecture { names: &["pangu-embedded"], factors: IgnoredFreqsOrLong, ..HALF },
    Architecture { names: &["exaone"], factors: Freqs, ..HALF },
    Architecture { names: &["apertus"], factors: FreqsOrLong, ..HALF },
    Architecture { names: &["phi3", "phimoe"], factors: Long, ..HALF },
    Architecture { names: &["cogvlm"], theta: Theta::Fixed, factors: IgnoredFreqs, ..HALF },
    Architecture { names: &["deepseek2-ocr"], theta: Theta::Fixed, ..HALF },
    Architecture { names: &["hunyuan-dense"], theta: Theta::Stretched, ..HALF },
    Architecture { names: &["hunyuan_vl"], mode: MropeOrHalfSplit, theta: Theta::Stretched, ..HALF },
    Architecture { names: &["grok"], yarn: Yarn { betas: true, factors: true, beta_fast: 8.0, ..HALF.yarn }, score: Score::Output(0.088_388_347_648_318_45), ..HALF },
    Architecture { names: &["lfm2", "lfm2moe"], attention: Attention::WithHeads, ..HALF },
    Architecture { names: &["plamo2"], attention: Attention::WithHeads, score: Score::ValueLength, ..HALF },
    Architecture { names: &["qwen3next"], attention: Attention::Interval(4), ..HALF },
    Architecture { names: &["minimax-01"], attention: Attention::Interval(8), ..HALF },
    Architecture { names: &["gemma2"], window: By(LastOf(2)), score: Score::HeadDimUnless(46), ..HALF },
    Architecture { names: &["gemma3"], window: IfGiven(LastOf(6)), sliding: LOCAL, score: Score::HeadDimUnless(62), ..HALF },
    Architecture { names: &["gemma-embedding"], window: By(LastOf(6)), sliding: LOCAL, ..HALF },
    Architecture { names: &["gemma3n"], window: By(LastOf(5)), sliding: LOCAL, score: Score::One, ..HALF },
    Architecture { names: &["gemma4", "gemma4-assistant"], window: By(Given), sliding: LOCAL, dims: PerLayer, factors: FreqsUnlessSliding, score: Score::One, ..HALF },
    Architecture { names: &["modern-bert"], window: IfGiven(FirstOf(3)), sliding: LOCAL, rotates: AllButDecision, ..HALF },
    Architecture { names: &["plamo3"], window: IfGiven(LastOf(8)), sliding: LOCAL, ..HALF },
    Architecture { names: &["mimo2"], window: By(Given), sliding: LOCAL, ..HALF },
    Architecture { names: &["step35"], window: By(Given), sliding: LOCAL, dims: RotatedHalfUnlessSliding, factors: FreqsOrLongUnlessSliding, ..HALF },
    Architecture { names: &["olmo2", "mellum"], window: IfGiven(LastOf(4)), sliding: SHARED_PLAIN, ..HALF },
    Architecture { names: &["laguna"], window: IfGiven(FirstOf(4)), sliding: SAME_PLAIN, dims: RotatedPerLayer, ..HALF },
    Architecture { names: &["gpt-oss"], window: By(LastOf(2)), head: Head::Rotated, ..HALF },
    Architecture { names: &["spark2_5"], window: By(Given), dims: PerLayer, ..HALF },
    Architecture { names: &["maple"], window: By(Given), rotates: Rotates::Sliding, dims: RotatedPerLayer, ..HALF },
    Architecture { names: &["exaone4"], window: IfLayers(64, LastOf(4)), sliding: SHARED, rotates: Rotates::Sliding, factors: Freqs, ..HALF },
    Architecture { names: &["exaone-moe"], window: By(LastOf(4)), sliding: SHARED, rotates: Rotates::Sliding, factors: Freqs, ..HALF },
    Architecture { names: &["afmoe"], window: IfGiven(LastOf(4)), rotates: AllButLastOf(4), ..HALF },
    Architecture { names: &["smallthinker"], window: IfGiven(FirstOf(4)), rotates: AllButFirstOfBesideWindow(4), ..HALF },
    Architecture { names: &["qwen2vl", "paddleocr"], mode: Mrope, ..HALF },
    Architecture { names: &["qwen3vl", "qwen3vlmoe", "qwen3tts"], mode: Imrope, ..HALF },
    Architecture { names: &["qwen35", "qwen35moe", "clef", "qwen4exp"], mode: Imrope, attention: Attention::Interval(4), ..HALF },
    Architecture { names: &["glm4moe"], mode: MropeOrHalfSplit, ..HALF },
    Architecture { names: &["dflash"], mode: Draft, window: IfGiven(Given), sliding: SHARED, factors: Freqs, score: Score::Given, ..HALF },
    Architecture { names: &["clip", "gpt2", "bert", "starcoder", "mpt", "refact", "bloom", "mamba", "mamba2", "jamba", "jina-bert-v2", "t5", "t5encoder", "jais", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7", "wavtokenizer-dec", "nemotron_h", "nemotron_h_moe", "kimi-linear", "kimi-k3", "glm5-next"], mode: Mode::None, ..HALF },
];

/// What others call a model, and llama.cpp's architecture for it. Names that differ in case, `-`,
/// `_` and `.` alone are found without.
const OTHER_NAMES: &[(&str, &str)] = &[
    ("mistral", "llama"),
    ("mixtral", "llama"),
    ("ministral", "llama"),
    ("ministral3", "mistral3"),
    ("codellama", "llama"),
    ("tinyllama", "llama"),
    ("vicuna", "llama"),
    ("alpaca", "llama"),
    ("yi", "llama"),
    ("smollm", "llama"),
    ("smollm2", "llama"),
    ("internlm3", "llama"),
    ("llama2", "llama"),
    ("llama3", "llama"),
    ("llama4text", "llama4"),
    ("cohere", "command-r"),
    ("phi", "phi2"),
    ("phi4", "phi3"),
    ("phi3small", "phi3"),
    ("phi35moe", "phimoe"),
    ("pythia", "gptneox"),
    ("dolly", "gptneox"),
    ("qwen25", "qwen2"),
    ("qwen25vl", "qwen2vl"),
    ("qwen2vltext", "qwen2vl"),
    ("qwen3vltext", "qwen3vl"),
    ("qwen35text", "qwen35"),
    ("gemma3text", "gemma3"),
    ("gemma3ntext", "gemma3n"),
    ("gemma4text", "gemma4"),
    ("olmo3", "olmo2"),
    ("granitemoehybrid", "granitehybrid"),
    ("granitemoeshared", "granitemoe"),
    ("deepseekv2", "deepseek2"),
    ("deepseekv3", "deepseek2"),
    ("deepseek3", "deepseek2"),
    ("kimik2", "deepseek2"),
    ("deepseekv32", "deepseek32"),
    ("deepseekv4", "deepseek4"),
    ("glm", "chatglm"),
    ("glm4v", "glm4"),
    ("glm46v", "glm4moe"),
    ("glm4moelite", "deepseek2"),
    ("glmmoedsa", "glm-dsa"),
    ("exaone40", "exaone4"),
    ("hunyuanv1dense", "hunyuan-dense"),
    ("hunyuanv1moe", "hunyuan-moe"),
    ("stablelmepoch", "stablelm"),
    ("mimov2", "mimo2"),
    ("mimov2flash", "mimo2"),
    ("minimaxtext01", "minimax-01"),
    ("refinedweb", "falcon"),
    ("step3p5", "step35"),
];

/// The entry of an architecture.
pub(super) fn architecture(name: &str) -> Option<&'static Architecture> {
    ARCHITECTURES
        .iter()
        .find(|architecture| architecture.names.contains(&name))
}

/// The architecture that is meant by a name that llama.cpp does not have.
pub(super) fn meant(name: &str) -> Option<&'static str> {
    // Longer than any name.
    if name.len() > 40 {
        return None;
    }
    let bare = |name: &str| -> String {
        let kept = name.chars().filter(|c| !matches!(c, '-' | '_' | '.' | ' '));
        kept.collect::<String>().to_lowercase()
    };
    let sought = bare(name);
    let mut names = ARCHITECTURES.iter().flat_map(|entry| entry.names);
    let known = names.find(|known| bare(known) == sought).copied();
    known.or_else(|| {
        let mut others = OTHER_NAMES.iter();
        others
            .find(|(other, _)| *other == sought)
            .map(|(_, known)| *known)
    })
}
