//! What llama.cpp (August 2026) knows about each architecture: how it pairs, and which layers
//! rotate differently or not at all.

pub(super) struct Architecture {
    pub names: &'static [&'static str],
    pub mode: Mode,
    pub sliding: Sliding,
    pub attention: Attention,
    pub switch: Switch,
    pub score: Score,
}

/// Which layers are attention of the tokens among each other. (Layers without heads are not, in any
/// architecture.)
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Attention {
    All,
    /// Those with heads, and `attention.head_count_kv` lists the heads of each layer.
    WithHeads,
    /// Those that `attention.recurrent_layers` does not list, else the last of every
    /// `full_attention_interval` layers, by default 4.
    Interval,
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
    /// No rotation.
    None,
}

#[derive(Clone, Copy)]
pub(super) enum Sliding {
    /// All layers rotate alike.
    Alike,
    /// Layers with a sliding window have a theta of their own, and are not scaled, if the file gives
    /// a window; else all layers rotate alike.
    Own {
        theta: SlidingTheta,
        pattern: Pattern,
    },
    /// Only layers with a sliding window rotate.
    Alone(Pattern),
    /// Only layers with a sliding window rotate, if the file gives a window; else all do.
    AloneIfGiven(Pattern),
    /// Every so many layers, the last one does not rotate.
    Skips(u64),
    /// As `Skips`, but the very last layer alone if the file says that there is no window.
    SkipsBesideWindow(u64),
}

#[derive(Clone, Copy)]
pub(super) enum SlidingTheta {
    /// As given by `rope.freq_base_swa`, else 10,000.
    TenThousand,
    /// As given by `rope.freq_base_swa`, else that of the other layers.
    Same,
}

/// Which layers have no sliding window, unless `attention.sliding_window_pattern` says so.
#[derive(Clone, Copy)]
pub(super) enum Pattern {
    Given,
    LastOf(u64),
    FirstOf(u64),
}

#[derive(Clone, Copy)]
pub(super) enum Score {
    /// `attention.scale`, else `key_length^(-1/2)`.
    HeadDim,
    One,
    /// As `HeadDim`, but `(embedding_length / head_count)^(-1/2)` in a model of so many layers.
    HeadDimUnless(u64),
    /// `key_length_mla^(-1/2)`, times the square of YaRN's mscale; the rotated part of a head is a
    /// tensor of its own. The field is what `yarn_log_multiplier` is a multiple of.
    Latent {
        log_multiplier_unit: f32,
    },
}

use Mode::{HalfSplit, Imrope, Interleaved, Mrope, MropeOrHalfSplit, MropeOrInterleaved};
use Pattern::{FirstOf, Given, LastOf};
use Sliding::{Alone, AloneIfGiven, Own, Skips, SkipsBesideWindow};
use SlidingTheta::{Same, TenThousand};

const INTERLEAVED: Architecture = Architecture {
    names: &[],
    mode: Interleaved,
    sliding: Sliding::Alike,
    attention: Attention::All,
    switch: Switch::Always,
    score: Score::HeadDim,
};

const HALF: Architecture = Architecture {
    mode: HalfSplit,
    ..INTERLEAVED
};

const LATENT: Score = Score::Latent {
    log_multiplier_unit: 1.0,
};

#[rustfmt::skip]
pub(super) static ARCHITECTURES: &[Architecture] = &[
    Architecture { names: &["llama", "llada", "deci", "internlm2", "minicpm", "xverse", "command-r", "olmo", "arctic", "deepseek", "chatglm", "chameleon", "bailingmoe", "neo-bert", "arcee", "ernie4_5", "ernie4_5-moe", "mistral3", "eagle3", "llama-embed", "maincoder", "deepseek2-ocr"], ..INTERLEAVED },
    Architecture { names: &["baichuan"], switch: Switch::Layers(32), ..INTERLEAVED },
    Architecture { names: &["granite", "granitemoe"], switch: Switch::Finetuned, ..INTERLEAVED },
    Architecture { names: &["granitehybrid"], switch: Switch::Finetuned, attention: Attention::WithHeads, ..INTERLEAVED },
    Architecture { names: &["deepseek2"], score: Score::Latent { log_multiplier_unit: 0.1 }, ..INTERLEAVED },
    Architecture { names: &["plm", "glm-dsa", "mistral4"], score: LATENT, ..INTERLEAVED },
    Architecture { names: &["cohere2"], sliding: Alone(LastOf(4)), ..INTERLEAVED },
    Architecture { names: &["llama4"], sliding: SkipsBesideWindow(4), ..INTERLEAVED },
    Architecture { names: &["smollm3"], sliding: Skips(4), ..INTERLEAVED },
    Architecture { names: &["falcon", "falcon-h1", "grok", "dbrx", "jina-bert-v3", "nomic-bert", "nomic-bert-moe", "eurobert", "stablelm", "bitnet", "qwen", "qwen2", "dream", "qwen2moe", "qwen3", "qwen3moe", "llada-moe", "rnd1", "olmoe", "phi2", "phi3", "phimoe", "plamo", "plamo3", "gemma", "starcoder2", "openelm", "gptneox", "codeshell", "orion", "nemotron", "exaone", "bailingmoe2", "dots1", "hunyuan-moe", "hunyuan-dense", "jais2", "gpt-oss", "seed_oss", "grovemoe", "apertus", "minimax-m2", "cogvlm", "pangu-embedded"], ..HALF },
    Architecture { names: &["lfm2", "lfm2moe", "plamo2"], attention: Attention::WithHeads, ..HALF },
    Architecture { names: &["qwen3next"], attention: Attention::Interval, ..HALF },
    Architecture { names: &["minicpm3"], score: LATENT, ..HALF },
    Architecture { names: &["gemma2"], score: Score::HeadDimUnless(46), ..HALF },
    Architecture { names: &["gemma3"], sliding: Own { theta: TenThousand, pattern: LastOf(6) }, score: Score::HeadDimUnless(62), ..HALF },
    Architecture { names: &["gemma-embedding"], sliding: Own { theta: TenThousand, pattern: LastOf(6) }, ..HALF },
    Architecture { names: &["gemma3n"], sliding: Own { theta: TenThousand, pattern: LastOf(5) }, score: Score::One, ..HALF },
    Architecture { names: &["gemma4"], sliding: Own { theta: TenThousand, pattern: Given }, score: Score::One, ..HALF },
    Architecture { names: &["modern-bert"], sliding: Own { theta: TenThousand, pattern: FirstOf(3) }, ..HALF },
    Architecture { names: &["olmo2", "mellum"], sliding: Own { theta: Same, pattern: LastOf(4) }, ..HALF },
    Architecture { names: &["mimo2", "step35", "laguna"], sliding: Own { theta: Same, pattern: Given }, ..HALF },
    Architecture { names: &["exaone4", "exaone-moe", "afmoe"], sliding: AloneIfGiven(LastOf(4)), ..HALF },
    Architecture { names: &["qwen2vl", "paddleocr"], mode: Mrope, ..HALF },
    Architecture { names: &["qwen3vl", "qwen3vlmoe"], mode: Imrope, ..HALF },
    Architecture { names: &["qwen35", "qwen35moe"], mode: Imrope, attention: Attention::Interval, ..HALF },
    Architecture { names: &["glm4"], mode: MropeOrInterleaved, ..HALF },
    Architecture { names: &["glm4moe"], mode: MropeOrHalfSplit, ..HALF },
    Architecture { names: &["clip", "gpt2", "bert", "starcoder", "mpt", "refact", "bloom", "mamba", "mamba2", "jamba", "jina-bert-v2", "t5", "t5encoder", "jais", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7", "wavtokenizer-dec", "nemotron_h", "nemotron_h_moe", "kimi-linear"], mode: Mode::None, ..HALF },
];

/// The entry of an architecture.
pub(super) fn architecture(name: &str) -> Option<&'static Architecture> {
    ARCHITECTURES
        .iter()
        .find(|architecture| architecture.names.contains(&name))
}
