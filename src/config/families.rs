//! What Hugging Face transformers 5.23 knows about each family of models, as data: pairing, names
//! of keys, defaults of keys that are absent, layers that do not rotate, and the score scale.
//! `tests/config_goldens.rs` holds it to what transformers was seen to do.

use super::pairing::OutputOrder;
use super::scaling::{Llama3Scaling, Scaling, YarnScaling};
use crate::{Direction, Pairing};

pub(super) struct Family {
    pub model_types: &'static [&'static str],
    pub pairing: Pairing,
    pub output_order: OutputOrder,
    pub direction: Direction,
    /// theta where the config does not give it.
    pub theta: Option<f64>,
    /// Keys of the config for theta, the first one present counts.
    pub theta_keys: &'static [&'static str],
    /// Whether those count where the config has no RoPE parameters beside them.
    pub lone_theta: bool,
    /// theta of a table that has none: keys beside it, the first one present counts, and the number.
    /// `None` where that is as if there were no table.
    pub table_theta: Option<(&'static [&'static str], f64)>,
    /// The part of a head that rotates where the config does not give it.
    pub partial: f64,
    pub partial_keys: &'static [&'static str],
    /// Whether that part and the keys for it count where the config has no RoPE parameters, and only
    /// there or in them.
    pub lone_partial: bool,
    /// Whether plain RoPE heeds that part; scaled RoPE always does.
    pub plain_heeds_partial: bool,
    /// Whether `rotary_dim` says it where nothing else does.
    pub heeds_rotary_dim: bool,
    /// Whether the rotated dims are the last ones of a head.
    pub trailing: bool,
    pub head_dim: HeadDim,
    /// Keys for the dims of all heads together; divided by the number of heads.
    pub hidden_keys: &'static [&'static str],
    /// Kinds of layers with defaults of their own; empty for one kind.
    pub kinds: &'static [Kind],
    /// Whether kinds are not types of layers: layers with a sliding window are then of the first,
    /// all others of the second.
    pub kinds_by_window: bool,
    /// Whether a kind without a table among given tables has its defaults; otherwise a layer of that
    /// kind needs one.
    pub fills_tables: bool,
    /// Whether theta and the part that rotates may be lists with an entry per layer, of which the
    /// first of each type counts.
    pub listed_per_layer: bool,
    /// Which kind a layer is where `layer_types` is absent.
    pub pattern: Pattern,
    pub nope: Nope,
    pub axes: DefaultAxes,
    pub score: Score,
    /// What stands in for RoPE parameters that are absent altogether.
    pub scaling: Scaling,
    /// How the indexer of sparse attention pairs the first dims of its heads, with the key that may
    /// say otherwise.
    pub indexer: Option<(Pairing, Option<&'static str>)>,
}

/// A kind of layer and its defaults.
pub(super) struct Kind {
    pub layer_type: &'static str,
    pub theta: f64,
    pub theta_keys: &'static [&'static str],
    pub partial: f64,
    pub proportional: bool,
    /// Whether an old config's `rope_scaling` is about it.
    pub scaled: bool,
    /// Whether YaRN leaves cos and sin as they are unless an attention factor is given.
    pub unit_attention: bool,
    /// Key and default of a head_dim of its own.
    pub head_dim: Option<(&'static str, usize)>,
}

#[derive(Clone, Copy)]
pub(super) enum HeadDim {
    /// `head_dim`, else dims of all heads over the number of heads; the number stands in where the
    /// config has none of these keys.
    Derived(usize),
    /// `head_dim`, else the number, whatever the hidden size.
    Fixed(usize),
    /// The key, else the number.
    Key(&'static str, usize),
    /// Multi-head latent attention: `qk_rope_head_dim`, beside `qk_nope_head_dim` dims that do not
    /// rotate; with defaults.
    Latent { rope: usize, nope: usize },
    /// Derived as above, whatever `head_dim` says.
    AlwaysDerived(usize),
    /// Derived as above, of which `rotary_dim` dims rotate; with its default.
    RotaryDim(usize),
    /// Under any of the names that families have for it, the most special one first.
    AnyName,
}

#[derive(Clone, Copy)]
pub(super) enum Pattern {
    /// `layer_types` must say.
    Listed,
    /// `"full_attention"` for the last of every so many layers, and otherwise
    /// `"sliding_attention"`; the key may give another number.
    LastOf(&'static str, u64),
    /// As `LastOf`, and the very last layer.
    LastOfAndLast(&'static str, u64),
    /// `"full_attention"` for the first of every so many layers.
    FirstOf(&'static str, u64),
    /// As `LastOf`, and the very first layer.
    LastOfAndFirst(u64),
    /// All layers are of one type.
    All(&'static str),
    /// Attention in the last of every so many layers, and otherwise `"linear_attention"`; the key
    /// may give another number.
    AttentionLast(&'static str, u64),
    /// As `AttentionLast`, and in the very last layer if in no other.
    AttentionLastOrOnly(u64),
    /// Attention in the first of every so many layers.
    AttentionFirst(u64),
    /// Attention in the layers that the key lists; in all if it is absent and the flag is set.
    AttentionIn(&'static str, bool),
    /// Attention across to another input, without positions, in the layers that the key lists.
    CrossAttentionIn(&'static str, &'static [u64]),
    /// The key lists a cycle of `"attention"` and other types.
    Cycle(&'static str, &'static [&'static str]),
    /// Some layers attend, and `layer_types` must say which.
    Hybrid,
    /// The type of each layer, from its number and how many there are.
    By(fn(u64, u64) -> &'static str),
    /// As `LastOf`, and the very last layer whatever `layer_types` says.
    LastOfAndAlwaysLast(&'static str, u64),
    /// The key lists a ratio of compression per layer: 0 stands for a sliding window. Without it all
    /// layers compress.
    CompressRatios(&'static str),
    /// The key lists a window per layer, 0 or null for full attention; else as `LastOf`.
    Windows(&'static str, u64),
    /// `"sliding_attention"` and `"full_attention"` by one period for the dense layers in front,
    /// and by another, counted anew, for those behind.
    AfterDense,
}

#[derive(Clone, Copy)]
pub(super) enum Nope {
    Never,
    /// Layers of full attention.
    FullAttention,
    /// Layers of full attention, unless tables by kind of layer have one for them.
    FullAttentionWithoutTable,
    /// Layers of full attention, if there is a sliding window.
    FullAttentionBesideWindow,
    /// Layers of full attention, but not the dense ones in front, unless some of those slide.
    FullAttentionUnlessDense,
    /// By `no_rope_layers` (0 for no rotation), else every `no_rope_layer_interval`-th.
    Interval,
    /// As `Interval`, if the config has either key.
    IntervalIfGiven,
    /// Everywhere, unless the key has the value.
    Unless(&'static str, Switch),
    /// Everywhere, if the key is true.
    If(&'static str),
    /// Layers for which the key lists 0; without it every fourth one, counted from the last.
    Zeros(&'static str),
}

#[derive(Clone, Copy)]
pub(super) enum Switch {
    True,
    Text(&'static str),
}

#[derive(Clone, Copy)]
pub(super) enum DefaultAxes {
    None,
    MropeSections([usize; 3]),
    MropeInterleaved([usize; 3]),
    Ernie([usize; 3]),
    VisionHalves,
    Pixtral,
    /// Time, height and width with a third of the head each, in whole pairs.
    VisionThirds,
}

#[derive(Clone, Copy)]
pub(super) enum Score {
    /// `head_dim^(-1/2)`
    HeadDim,
    /// `(head_dim / 2)^(-1/2)`
    HalfHeadDim,
    /// 1: q and k are normalised or scaled elsewhere.
    One,
    /// `query_pre_attn_scalar^(-1/2)`, with its default.
    QueryPreAttnScalar(f64),
    /// The same, with `head_dim` as default.
    QueryPreAttnScalarOrHeadDim,
    /// `attention_multiplier`, with its default, which is `head_dim^(-1/2)` if none.
    AttentionMultiplier(Option<f64>),
    /// `(qk_nope_head_dim + qk_rope_head_dim)^(-1/2)`, times the square of YaRN's
    /// `0.1 mscale_all_dim ln(factor) + 1`.
    Latent,
}

const fn llama3(factor: f64, low: f64, high: f64, original: u64) -> Scaling {
    Scaling::Llama3(Llama3Scaling::new(factor, low, high, original))
}

const GPT_OSS_YARN: Scaling = Scaling::Yarn(YarnScaling {
    truncate: false,
    ..YarnScaling::new(32.0, 4096)
});

/// YaRN that leaves cos and sin as they are.
const fn mistral_yarn(factor: f64, original: u64) -> Scaling {
    Scaling::Yarn(YarnScaling {
        mscale: Some(1.0),
        mscale_all_dim: Some(1.0),
        ..YarnScaling::new(factor, original)
    })
}

use DefaultAxes::{MropeInterleaved, MropeSections, VisionHalves};
use HeadDim::{Derived, Fixed, Key, Latent, RotaryDim};
use Pairing::{HalfSplit, Interleaved};
use Pattern::{FirstOf, LastOf, LastOfAndFirst, LastOfAndLast, Listed};

/// Most models: pairs of halves, one kind of layer.
const HALF: Family = Family {
    model_types: &[],
    pairing: HalfSplit,
    output_order: OutputOrder::AsInput,
    direction: Direction::Forward,
    theta: Some(10_000.0),
    theta_keys: &["rope_theta"],
    lone_theta: true,
    table_theta: None,
    partial: 1.0,
    partial_keys: &["partial_rotary_factor"],
    lone_partial: true,
    plain_heeds_partial: false,
    heeds_rotary_dim: false,
    trailing: false,
    head_dim: Derived(0),
    hidden_keys: &["hidden_size", "d_model", "n_embd"],
    kinds: &[],
    kinds_by_window: false,
    fills_tables: false,
    listed_per_layer: false,
    pattern: Listed,
    nope: Nope::Never,
    axes: DefaultAxes::None,
    score: Score::HeadDim,
    scaling: Scaling::None,
    indexer: None,
};

/// Only some dims of a head rotate, as a part that the config gives.
const PARTIAL: Family = Family {
    plain_heeds_partial: true,
    ..HALF
};

const INTERLEAVED: Family = Family {
    pairing: Interleaved,
    ..HALF
};

/// DeepSeek-V3 and its relatives.
const LATENT: Family = Family {
    pairing: Interleaved,
    output_order: OutputOrder::HalfSplit,
    head_dim: Latent {
        rope: 64,
        nope: 128,
    },
    score: Score::Latent,
    ..HALF
};

/// Towers of patches with a row and a column. (`hidden_size` is the width of what comes out where
/// there is an `embed_dim` too.)
const VISION: Family = Family {
    axes: VisionHalves,
    hidden_keys: &["embed_dim", "hidden_size"],
    ..HALF
};

const SLIDING: Kind = Kind {
    layer_type: "sliding_attention",
    theta: 10_000.0,
    theta_keys: &["rope_local_base_freq"],
    partial: 1.0,
    proportional: false,
    scaled: false,
    unit_attention: false,
    head_dim: None,
};

const FULL: Kind = Kind {
    layer_type: "full_attention",
    theta: 1_000_000.0,
    theta_keys: &["rope_theta"],
    scaled: true,
    ..SLIDING
};

/// Its tables for each kind of layer are all that counts.
const GEMMA4_SLIDING: Kind = Kind {
    theta_keys: &[],
    ..SLIDING
};

const GEMMA4_FULL: Kind = Kind {
    theta_keys: &[],
    scaled: false,
    partial: 0.25,
    proportional: true,
    head_dim: Some(("global_head_dim", 512)),
    ..FULL
};

/// A model whose `model_type` is absent or not in the table: only what the config says.
pub(super) static UNKNOWN: Family = Family {
    theta: None,
    heeds_rotary_dim: true,
    theta_keys: &["rope_theta", "rotary_emb_base", "rope_embedding_base"],
    partial_keys: &["partial_rotary_factor", "rotary_pct", "rope_pct"],
    head_dim: HeadDim::AnyName,
    nope: Nope::IntervalIfGiven,
    ..PARTIAL
};

/// Keys that tell layers with attention from those without, in one family or another.
pub(super) static TELL_ATTENTION: &[&str] = &[
    "full_attention_interval",
    "full_attn_idxs",
    "attn_layer_indices",
    "attn_layer_period",
    "attn_type_list",
    "block_types",
    "cross_attention_layers",
    "hybrid_override_pattern",
    "linear_attn_config",
];

fn is_full(full: bool) -> &'static str {
    if full {
        "full_attention"
    } else {
        "sliding_attention"
    }
}

/// As usual, though the family's default for no table at all is another.
const BESIDE: Option<(&[&str], f64)> = Some((&["rope_theta"], 10_000.0));

const INDEXED: Pattern = Pattern::All("indexed_attention");
const EVERY_OTHER_FULL: Pattern = Pattern::By(|layer, _| is_full(layer % 2 == 1));
const FIRST_OF_4_FULL: Pattern = Pattern::By(|layer, _| is_full(layer % 4 == 0));
const LAST_OF_4_FROM_END_FULL: Pattern =
    Pattern::By(|layer, count| is_full((count - 1 - layer) % 4 == 0));
const FLINT: Pattern =
    Pattern::By(|layer, count| is_full(layer < 2 || layer % 4 == 1 || layer + 1 == count));
const LFM3: Pattern = Pattern::By(|layer, _| match layer % 4 {
    2 => "full_attention",
    0 if layer > 0 => "sliding_attention",
    _ => "conv",
});

/// One line per family: those with the same rules share it.
#[rustfmt::skip]
pub(super) static FAMILIES: &[Family] = &[
    // Half-split, the whole head.
    Family { model_types: &["llama", "mistral", "qwen2", "olmo", "olmo2", "hunyuan_v1_dense", "hunyuan_v1_moe", "aria_text", "chameleon", "deepseek_ocr2_encoder", "idefics", "doge", "jais2", "ministral", "moshi", "starcoder2", "voxtral_realtime_text", "qwen2_moe", "olmoe", "falcon_h1"], head_dim: Derived(128), ..HALF },
    Family { model_types: &["deepseek_ocr2_text", "unlimited_ocr_text"], head_dim: HeadDim::AlwaysDerived(128), ..HALF },
    Family { model_types: &["olmo_hybrid"], head_dim: Derived(128), pattern: Pattern::AttentionLastOrOnly(4), ..HALF },
    // (With modelling code of their own, beside their weights.)
    Family { model_types: &["qwen"], theta_keys: &["rotary_emb_base"], partial_keys: &["rotary_pct"], head_dim: Key("kv_channels", 128), ..PARTIAL },
    Family { model_types: &["internlm2", "minicpm", "deepseek", "xverse", "orion"], ..HALF },
    Family { model_types: &["diffllama", "esmc", "eurobert", "gradium_phonon_tts", "kyutai_speech_to_text", "lasr_encoder", "mimi", "mimi_encoder", "mimi_decoder", "pocket_tts", "pocket_tts_audio_tokenizer", "pocket_tts_audio_tokenizer_encoder", "pocket_tts_audio_tokenizer_decoder", "qwen3_moe"], head_dim: Derived(64), ..HALF },
    Family { model_types: &["dots1"], head_dim: Derived(144), ..HALF },
    Family { model_types: &["arcee"], head_dim: Derived(80), ..HALF },
    Family { model_types: &["timesfm2_5"], head_dim: Fixed(80), ..HALF },
    Family { model_types: &["qwen3", "hrm_text", "internlm3", "iquestcoder", "seed_oss", "qwen3_omni_moe_talker_code_predictor"], head_dim: Fixed(128), ..HALF },
    Family { model_types: &["neucodec", "xcodec2", "qwen2_5_omni_dit", "voxtral_realtime_encoder"], head_dim: Fixed(64), ..HALF },
    Family { model_types: &["gemma"], head_dim: Fixed(256), ..HALF },
    Family { model_types: &["gemma2", "vaultgemma", "t5_gemma_module"], pattern: EVERY_OTHER_FULL, head_dim: Fixed(256), score: Score::QueryPreAttnScalar(256.0), ..HALF },
    Family { model_types: &["mixtral", "phimoe", "emu3_text_model"], theta: Some(1e6), head_dim: Derived(128), ..HALF },
    Family { model_types: &["minimax"], theta: Some(1e6), head_dim: Derived(128), pattern: Pattern::AttentionFirst(2), ..HALF },
    Family { model_types: &["lfm2"], theta: Some(1e6), head_dim: Derived(80), pattern: Pattern::AttentionIn("full_attn_idxs", true), ..HALF },
    Family { model_types: &["lfm2_moe"], theta: Some(1e6), head_dim: Derived(64), pattern: Pattern::AttentionIn("full_attn_idxs", false), ..HALF },
    Family { model_types: &["bitnet", "evolla", "flex_olmo"], theta: Some(5e5), head_dim: Derived(128), ..HALF },
    Family { model_types: &["mllama_text_model"], theta: Some(5e5), head_dim: Derived(128), pattern: Pattern::CrossAttentionIn("cross_attention_layers", &[3, 8, 13, 18, 23, 28, 33, 38]), ..HALF },
    Family { model_types: &["csm"], theta: Some(5e5), head_dim: Derived(64), ..HALF },
    Family { model_types: &["csm_depth_decoder_model"], theta: Some(5e5), head_dim: Derived(128), ..HALF },
    Family { model_types: &["hy_v3"], theta: Some(11_158_840.0), head_dim: Fixed(128), ..HALF },
    Family { model_types: &["gte"], theta: Some(160_000.0), head_dim: Derived(64), ..HALF },
    Family { model_types: &["jina_embeddings_v3"], theta: Some(20_000.0), head_dim: Derived(64), ..HALF },
    Family { model_types: &["nomic_bert"], theta: Some(1000.0), theta_keys: &["rope_theta", "rotary_emb_base"], head_dim: Derived(64), ..HALF },
    Family { model_types: &["apertus"], lone_theta: false, theta: Some(12e6), head_dim: Derived(128), scaling: llama3(8.0, 1.0, 4.0, 8192), ..HALF },
    Family { model_types: &["cwm"], pattern: FIRST_OF_4_FULL, lone_theta: false, theta: Some(1e6), head_dim: Fixed(128), scaling: llama3(16.0, 1.0, 4.0, 8192), ..HALF },
    Family { model_types: &["higgs_audio_v2"], lone_theta: false, table_theta: BESIDE, theta: Some(5e5), head_dim: Fixed(128), scaling: llama3(32.0, 0.125, 0.5, 1024), ..HALF },
    Family { model_types: &["gpt_oss"], pattern: EVERY_OTHER_FULL, theta: Some(150_000.0), head_dim: Fixed(64), scaling: GPT_OSS_YARN, ..HALF },
    Family { model_types: &["ministral3"], lone_theta: false, table_theta: BESIDE, theta: Some(1e6), head_dim: Fixed(128), scaling: mistral_yarn(16.0, 16_384), ..HALF },
    Family { model_types: &["dbrx"], theta_keys: &["rope_theta", "attn_config.rope_theta"], head_dim: Derived(128), ..HALF },
    Family { model_types: &["jetmoe"], head_dim: Key("kv_channels", 128), ..HALF },
    Family { model_types: &["granite", "granitemoe", "granitemoeshared", "granite4_vision_text"], head_dim: Derived(128), score: Score::AttentionMultiplier(Some(1.0)), ..HALF },
    Family { model_types: &["granite_swa", "granitemoe_swa"], head_dim: Derived(128), score: Score::AttentionMultiplier(Some(1.0)), pattern: FIRST_OF_4_FULL, ..HALF },
    Family { model_types: &["granite_docling_text"], head_dim: Derived(64), score: Score::AttentionMultiplier(Some(0.015625)), ..HALF },
    Family { model_types: &["granitemoehybrid"], head_dim: Derived(128), score: Score::AttentionMultiplier(Some(1.0)), nope: Nope::Unless("position_embedding_type", Switch::Text("rope")), pattern: Pattern::Hybrid, ..HALF },
    Family { model_types: &["hyperclovax"], head_dim: Derived(128), score: Score::AttentionMultiplier(None), ..HALF },
    Family { model_types: &["falcon"], head_dim: Derived(64), nope: Nope::If("alibi"), ..HALF },
    Family { model_types: &["esm"], head_dim: Derived(64), nope: Nope::Unless("position_embedding_type", Switch::Text("rotary")), ..HALF },
    Family { model_types: &["zamba2"], head_dim: Key("attention_head_dim", 160), score: Score::HalfHeadDim, nope: Nope::Unless("use_mem_rope", Switch::True), pattern: Pattern::Hybrid, ..HALF },
    Family { model_types: &["dia_encoder", "dia_decoder"], head_dim: Fixed(128), score: Score::One, ..HALF },
    // The other way round.
    Family { model_types: &["nanochat"], head_dim: Derived(128), direction: Direction::Inverse, ..HALF },
    // Half-split, part of the head.
    Family { model_types: &["phi3", "phi4_multimodal"], head_dim: Derived(96), ..PARTIAL },
    Family { model_types: &["phi", "persimmon"], partial: 0.5, head_dim: Derived(64), ..PARTIAL },
    Family { model_types: &["fuyu"], theta: Some(25_000.0), partial: 0.5, head_dim: Derived(64), ..PARTIAL },
    Family { model_types: &["stablelm"], partial: 0.25, head_dim: Derived(80), ..PARTIAL },
    Family { model_types: &["nemotron"], partial: 0.5, head_dim: Derived(128), ..PARTIAL },
    Family { model_types: &["bamba"], partial: 0.5, partial_keys: &[], head_dim: Derived(128), pattern: Pattern::AttentionIn("attn_layer_indices", false), ..PARTIAL },
    Family { model_types: &["glm4_moe"], partial: 0.5, ..PARTIAL },
    Family { model_types: &["recurrent_gemma"], partial: 0.5, head_dim: Derived(256), pattern: Pattern::Cycle("block_types", &["recurrent", "recurrent", "attention"]), ..PARTIAL },
    Family { model_types: &["qwen3_next"], partial: 0.25, head_dim: Fixed(256), pattern: Pattern::AttentionLast("full_attention_interval", 4), ..PARTIAL },
    Family { model_types: &["solar_open"], theta: Some(1e6), head_dim: Fixed(128), ..PARTIAL },
    Family { model_types: &["minimax_m2"], theta: Some(5e6), head_dim: Fixed(128), heeds_rotary_dim: true, ..PARTIAL },
    Family { model_types: &["minimax_m3_vl_text"], theta: Some(5e6), head_dim: Fixed(128), ..PARTIAL },
    Family { model_types: &["glmasr_encoder"], partial: 0.5, head_dim: Derived(64), ..PARTIAL },
    Family { model_types: &["dots3_note_audio_encoder"], partial: 0.5, head_dim: HeadDim::AlwaysDerived(64), ..PARTIAL },
    Family { model_types: &["nemotron3_5_transcribe_asr_audio"], lone_theta: false, lone_partial: false, partial: 0.5, head_dim: Derived(128), ..PARTIAL },
    Family { model_types: &["nemotron3_5_transcribe_word_timestamp"], lone_theta: false, lone_partial: false, partial: 0.5, head_dim: Derived(80), ..PARTIAL },
    Family { model_types: &["nemotron3_diarization_audio"], head_dim: Derived(64), ..PARTIAL },
    Family { model_types: &["gpt_neox"], theta_keys: &["rotary_emb_base"], partial: 0.25, partial_keys: &["rotary_pct"], head_dim: Derived(96), ..PARTIAL },
    Family { model_types: &["gpt_neox_japanese"], theta_keys: &["rotary_emb_base"], partial_keys: &["rotary_pct"], head_dim: Derived(80), ..PARTIAL },
    // Interleaved.
    Family { model_types: &["gptj", "codegen"], head_dim: RotaryDim(64), ..INTERLEAVED },
    // (With modelling code of its own; `rope_ratio` multiplies theta.)
    Family { model_types: &["chatglm"], partial: 0.5, plain_heeds_partial: true, head_dim: Key("kv_channels", 128), ..INTERLEAVED },
    Family { model_types: &["glm", "glm4"], partial: 0.5, plain_heeds_partial: true, head_dim: Fixed(128), ..INTERLEAVED },
    Family { model_types: &["cohere"], theta: Some(5e5), head_dim: Derived(128), ..INTERLEAVED },
    Family { model_types: &["cohere2"], head_dim: Derived(128), pattern: LastOf("sliding_window_pattern", 4), nope: Nope::FullAttention, ..INTERLEAVED },
    Family { model_types: &["cohere2_moe"], head_dim: Fixed(128), pattern: Pattern::AfterDense, nope: Nope::FullAttentionUnlessDense, ..INTERLEAVED },
    Family { model_types: &["ernie4_5"], theta: Some(5e5), head_dim: Fixed(128), ..INTERLEAVED },
    Family { model_types: &["ernie4_5_moe"], theta: Some(5e5), head_dim: Derived(128), ..INTERLEAVED },
    Family { model_types: &["helium"], theta: Some(1e5), head_dim: Fixed(128), ..INTERLEAVED },
    Family { model_types: &["llama4_text", "llama4"], theta: Some(5e5), head_dim: Fixed(128), nope: Nope::Interval, ..INTERLEAVED },
    Family { model_types: &["moonshine"], partial: 0.9, plain_heeds_partial: true, head_dim: Derived(36), ..INTERLEAVED },
    Family { model_types: &["moonshine_streaming"], lone_theta: false, lone_partial: false, partial: 0.8, plain_heeds_partial: true, head_dim: Derived(40), ..INTERLEAVED },
    Family { model_types: &["openai_privacy_filter"], theta: Some(150_000.0), head_dim: Fixed(64), scaling: GPT_OSS_YARN, ..INTERLEAVED },
    Family { model_types: &["pe_audio_encoder", "pe_audio_video_encoder", "pe_video_encoder"], theta: Some(20_000.0), head_dim: Fixed(128), ..INTERLEAVED },
    Family { model_types: &["blt_global_transformer"], theta: Some(5e5), head_dim: Derived(128), ..INTERLEAVED },
    Family { model_types: &["blt_local_encoder", "blt_local_decoder"], theta: Some(5e5), head_dim: Derived(64), ..INTERLEAVED },
    Family { model_types: &["blt_patcher"], head_dim: Derived(64), ..INTERLEAVED },
    Family { model_types: &["deepseek_v2"], output_order: OutputOrder::AsInput, ..LATENT },
    Family { model_types: &["deepseek_v4"], table_theta: BESIDE, trailing: true, plain_heeds_partial: true, head_dim: Fixed(512), kinds: &[
        Kind { layer_type: "main", theta_keys: &["rope_theta"], partial: 0.125, ..SLIDING },
        Kind { layer_type: "compress", theta: 160_000.0, theta_keys: &["compress_rope_theta"], partial: 0.125, unit_attention: true, ..FULL }], kinds_by_window: true, pattern: Pattern::CompressRatios("compress_ratios"), ..INTERLEAVED },
    // Interleaved in, half-split out.
    Family { model_types: &["deepseek_v3", "axk1", "youtu", "kimi_k2"], ..LATENT },
    Family { model_types: &["deepseek_v32"], pattern: INDEXED, indexer: Some((HalfSplit, None)), ..LATENT },
    Family { model_types: &["axk2"], pattern: INDEXED, indexer: Some((HalfSplit, None)), head_dim: Latent { rope: 32, nope: 64 }, ..LATENT },
    Family { model_types: &["bailing_hybrid"], theta: Some(6e6), pattern: Pattern::AttentionLast("layer_group_size", 6), ..LATENT },
    Family { model_types: &["glm4_moe_lite"], head_dim: Latent { rope: 64, nope: 192 }, ..LATENT },
    Family { model_types: &["glm_moe_dsa"], pattern: INDEXED, indexer: Some((Interleaved, Some("indexer_rope_interleave"))), head_dim: Latent { rope: 64, nope: 192 }, ..LATENT },
    Family { model_types: &["longcat_flash"], theta: Some(1e7), ..LATENT },
    Family { model_types: &["mistral4"], lone_theta: false, head_dim: Latent { rope: 64, nope: 64 }, scaling: mistral_yarn(128.0, 8192), ..LATENT },
    // Latent attention with pairs of halves.
    Family { model_types: &["minicpm3"], pairing: HalfSplit, output_order: OutputOrder::AsInput, head_dim: Latent { rope: 32, nope: 64 }, ..LATENT },
    Family { model_types: &["hy_v4"], pattern: INDEXED, pairing: HalfSplit, output_order: OutputOrder::AsInput, head_dim: Latent { rope: 64, nope: 192 }, ..LATENT },
    // Layers that do not rotate.
    Family { model_types: &["smollm3"], theta: Some(2e6), head_dim: Derived(128), nope: Nope::Interval, ..HALF },
    Family { model_types: &["exaone4"], head_dim: Derived(128), pattern: LastOf("sliding_window_pattern", 4), nope: Nope::FullAttentionBesideWindow, ..HALF },
    Family { model_types: &["exaone_moe"], head_dim: Derived(128), pattern: LastOf("sliding_window_pattern", 4), nope: Nope::FullAttentionBesideWindow, ..HALF },
    Family { model_types: &["kolibri1"], head_dim: Fixed(128), pattern: LastOf("", 5), nope: Nope::FullAttentionBesideWindow, ..HALF },
    Family { model_types: &["afmoe"], head_dim: Fixed(128), pattern: LastOf("global_attn_every_n_layers", 4), nope: Nope::FullAttention, ..HALF },
    Family { model_types: &["flint"], head_dim: Fixed(128), pattern: FLINT, nope: Nope::FullAttention, ..HALF },
    Family { model_types: &["beam"], head_dim: Fixed(128), lone_theta: false, pattern: LastOfAndLast("", 6), nope: Nope::FullAttentionWithoutTable, ..HALF },
    Family { model_types: &["muse_glimmer_text"], head_dim: Fixed(128), pattern: LAST_OF_4_FROM_END_FULL, nope: Nope::Zeros("layer_rope_theta"), ..HALF },
    Family { model_types: &["muse_spark_text"], lone_theta: false, table_theta: BESIDE, theta: Some(5e5), head_dim: Fixed(64), pattern: LAST_OF_4_FROM_END_FULL, nope: Nope::Zeros("layer_rope_theta"), ..HALF },
    Family { model_types: &["muse_glimmer_assistant"], theta: Some(5e5), head_dim: Fixed(128), ..HALF },
    // Kinds of layers that rotate differently.
    Family { model_types: &["gemma3_text", "gemma3", "t5gemma2_text", "t5gemma2_decoder"], fills_tables: true, head_dim: Fixed(256), kinds: &[SLIDING, FULL], pattern: LastOf("sliding_window_pattern", 6), score: Score::QueryPreAttnScalar(256.0), ..HALF },
    Family { model_types: &["gemma3n_text", "gemma3n"], fills_tables: true, head_dim: Fixed(256), kinds: &[SLIDING, FULL], pattern: LastOf("", 5), score: Score::One, ..HALF },
    Family { model_types: &["diffusion_gemma_text"], partial_keys: &[], head_dim: Fixed(256), plain_heeds_partial: true, kinds: &[GEMMA4_SLIDING, GEMMA4_FULL], pattern: Pattern::LastOfAndAlwaysLast("", 6), score: Score::One, ..HALF },
    Family { model_types: &["gemma4_text", "gemma4_unified_text"], head_dim: Fixed(256), kinds: &[GEMMA4_SLIDING, GEMMA4_FULL], pattern: Pattern::LastOfAndAlwaysLast("", 6), score: Score::One, ..HALF },
    Family { model_types: &["embedding_gemma2_text"], head_dim: Fixed(256), kinds: &[GEMMA4_SLIDING, Kind { partial: 1.0, proportional: false, ..GEMMA4_FULL }], pattern: Pattern::LastOfAndAlwaysLast("sliding_window_pattern", 6), score: Score::One, ..HALF },
    Family { model_types: &["modernbert", "modernbert-decoder"], fills_tables: true, head_dim: Derived(64), kinds: &[
        Kind { theta_keys: &["local_rope_theta"], scaled: true, ..SLIDING },
        Kind { theta: 160_000.0, theta_keys: &["global_rope_theta"], ..FULL }], pattern: FirstOf("global_attn_every_n_layers", 3), ..HALF },
    Family { model_types: &["ultrabert"], table_theta: Some((&[], 1e4)), head_dim: Derived(128), kinds: &[Kind { theta_keys: &[], ..SLIDING }, Kind { theta: 2_560_000.0, theta_keys: &[], ..FULL }], pattern: Pattern::Windows("attention_windows", 3), listed_per_layer: true, ..HALF },
    Family { model_types: &["olmo3"], fills_tables: true, head_dim: Derived(128), kinds: &[
        Kind { theta: 5e5, theta_keys: &[], ..SLIDING },
        Kind { theta: 5e5, ..FULL }], pattern: LastOf("", 4), ..HALF },
    Family { model_types: &["laguna"], partial_keys: &[], head_dim: Fixed(128), plain_heeds_partial: true, kinds: &[
        Kind { theta: 5e5, theta_keys: &[], partial: 0.5, scaled: false, ..FULL },
        Kind { theta_keys: &[], ..SLIDING }], pattern: Pattern::All("full_attention"), ..HALF },
    Family { model_types: &["mellum"], partial_keys: &[], head_dim: Fixed(128), plain_heeds_partial: true, kinds: &[
        Kind { theta: 5e5, theta_keys: &[], scaled: false, ..FULL },
        Kind { theta_keys: &[], ..SLIDING }], pattern: Pattern::All("full_attention"), ..HALF },
    Family { model_types: &["mimo_v2_flash"], partial: 0.334, partial_keys: &[], head_dim: Fixed(192), plain_heeds_partial: true, kinds: &[
        Kind { theta: 5e6, theta_keys: &[], partial: 0.334, scaled: false, ..FULL },
        Kind { theta_keys: &[], partial: 0.334, ..SLIDING }], pattern: LastOfAndFirst(6), ..HALF },
    Family { model_types: &["zaya"], partial_keys: &[], head_dim: Fixed(128), plain_heeds_partial: true, kinds: &[
        Kind { layer_type: "hybrid", theta: 5e6, partial: 0.5, theta_keys: &[], scaled: false, ..FULL },
        Kind { layer_type: "hybrid_sliding", partial: 0.5, theta_keys: &[], ..SLIDING }], pattern: Pattern::All("hybrid"), ..HALF },
    Family { model_types: &["lfm3"], table_theta: Some((&["rope_theta"], 1e6)), head_dim: Fixed(128), kinds: &[
        Kind { theta_keys: &[], ..SLIDING },
        Kind { theta_keys: &[], partial: 0.5, proportional: true, scaled: false, ..FULL }], pattern: LFM3, ..HALF },
    Family { model_types: &["step3p5"], table_theta: Some((&[], 1e4)), head_dim: Fixed(128), pattern: Pattern::All("full_attention"), listed_per_layer: true, score: Score::QueryPreAttnScalarOrHeadDim, ..PARTIAL },
    // Text with images: time, height, width.
    Family { model_types: &["qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text", "qwen2_5_omni_text"], theta: Some(1e6), head_dim: Derived(128), axes: MropeSections([16, 24, 24]), ..HALF },
    Family { model_types: &["qwen2_5_omni_talker"], theta: Some(1e6), head_dim: Fixed(128), axes: MropeSections([16, 24, 24]), ..HALF },
    Family { model_types: &["paddleocr_vl_text", "paddleocr_vl"], theta: Some(5e5), head_dim: Fixed(128), axes: MropeSections([16, 24, 24]), ..HALF },
    Family { model_types: &["glm4v_text", "glm_ocr_text"], plain_heeds_partial: true, head_dim: Derived(128), axes: MropeSections([8, 12, 12]), ..INTERLEAVED },
    Family { model_types: &["glm4v_moe_text"], partial: 0.5, head_dim: Derived(128), axes: MropeSections([8, 12, 12]), ..PARTIAL },
    Family { model_types: &["glm_image_text"], head_dim: Derived(128), axes: MropeSections([8, 12, 12]), ..PARTIAL },
    Family { model_types: &["qwen3_vl_text", "qwen3_vl"], theta: Some(5e5), head_dim: Fixed(128), axes: MropeInterleaved([24, 20, 20]), ..HALF },
    Family { model_types: &["qwen3_vl_moe_text", "qwen3_vl_moe"], theta: Some(5e5), head_dim: Derived(128), axes: MropeInterleaved([24, 20, 20]), ..HALF },
    Family { model_types: &["qwen3_omni_moe_text"], theta: Some(1e6), axes: MropeInterleaved([24, 20, 20]), ..HALF },
    Family { model_types: &["qwen3_omni_moe_talker_text"], head_dim: Derived(64), axes: MropeInterleaved([24, 20, 20]), ..HALF },
    Family { model_types: &["cosmos3_edge_text"], lone_theta: false, theta: Some(1e8), head_dim: Fixed(128), axes: MropeInterleaved([24, 20, 20]), ..HALF },
    Family { model_types: &["qwen3_5_text", "qwen3_5_moe_text", "qwen3_5", "qwen3_5_moe"], partial: 0.25, head_dim: Fixed(256), axes: MropeInterleaved([11, 11, 10]), pattern: Pattern::AttentionLast("full_attention_interval", 4), ..PARTIAL },
    Family { model_types: &["ernie4_5_vl_moe_text", "ernie4_5_vl_moe"], theta: Some(5e5), head_dim: Derived(128), axes: DefaultAxes::Ernie([22, 22, 20]), ..INTERLEAVED },
    // Vision towers: row, column.
    Family { model_types: &["qwen2_vl_vision"], ..VISION },
    Family { model_types: &["qwen2_5_vl_vision", "qwen2_5_omni_vision_encoder", "exaone4_5_vision", "qwen3_vl_vision", "qwen3_vl_moe_vision", "qwen3_omni_moe_vision_encoder", "qwen3_5_vision", "qwen3_5_moe_vision", "qwen4_exp_vision", "glm4v_vision", "glm4v_moe_vision", "glm_ocr_vision", "glm5_next_vision", "paddleocr_vl_vision", "ernie4_5_vl_moe_vision", "mlcd_vision_model", "mlcd", "video_llama_3_vision", "muse_glimmer_vision", "muse_spark_vision", "cohere_compass_vision"], hidden_keys: &["hidden_size", "embed_dim"], ..VISION },
    Family { model_types: &["lfm3_vl_vision"], theta: Some(1e6), hidden_keys: &["hidden_size"], ..VISION },
    Family { model_types: &["pixtral"], axes: DefaultAxes::Pixtral, hidden_keys: &["hidden_size"], ..VISION },
    Family { model_types: &["minimax_m3_vl_vision"], axes: DefaultAxes::VisionThirds, hidden_keys: &["hidden_size"], ..VISION },
];

/// Sizes of a family's default model.
pub(super) struct Sizes {
    pub hidden_size: usize,
    pub num_attention_heads: usize,
    pub max_position_embeddings: Option<u64>,
}

const fn sizes(hidden: usize, heads: usize, tokens: u64) -> Sizes {
    Sizes {
        hidden_size: hidden,
        num_attention_heads: heads,
        max_position_embeddings: if tokens == 0 { None } else { Some(tokens) },
    }
}

/// What stands in for sizes that a config leaves out, as one does that was saved as the difference
/// to its class' defaults.
#[rustfmt::skip]
static SIZES: &[(&[&str], Sizes)] = &[
    (&["llama", "olmo", "olmo2", "hunyuan_v1_dense", "hunyuan_v1_moe", "aria_text", "deepseek_ocr2_text", "idefics", "granite", "granitemoe", "granitemoeshared", "granite4_vision_text", "granitemoe_swa", "granitemoehybrid", "hyperclovax", "deepseek_v2", "exaone4", "exaone_moe", "olmo3"], sizes(4096, 32, 2048)),
    (&["mistral", "ministral", "voxtral_realtime_text", "mixtral", "minimax", "phimoe", "mllama_text_model", "glm", "glm4", "glm_image_text"], sizes(4096, 32, 131072)),
    (&["qwen2", "deepseek_ocr2_encoder", "qwen3", "internlm3", "ultrabert", "glm4v_text"], sizes(4096, 32, 32768)),
    (&["chameleon", "flex_olmo"], sizes(4096, 32, 4096)),
    (&["doge"], sizes(1024, 8, 2048)),
    (&["jais2"], sizes(3328, 26, 8192)),
    (&["moshi"], sizes(4096, 32, 3000)),
    (&["starcoder2"], sizes(3072, 24, 4096)),
    (&["unlimited_ocr_text"], sizes(1280, 10, 32768)),
    (&["qwen2_moe", "qwen3_next", "smollm3", "qwen3_5_moe_text", "qwen3_5_moe"], sizes(2048, 16, 32768)),
    (&["olmoe", "blt_global_transformer"], sizes(2048, 16, 4096)),
    (&["falcon_h1", "evolla"], sizes(4096, 32, 8192)),
    (&["olmo_hybrid"], sizes(3840, 30, 65536)),
    (&["diffllama", "csm", "phi"], sizes(2048, 32, 2048)),
    (&["esmc"], sizes(2560, 40, 2048)),
    (&["eurobert", "gradium_phonon_tts", "gte", "blt_patcher", "modernbert", "modernbert-decoder"], sizes(768, 12, 8192)),
    (&["kyutai_speech_to_text"], sizes(2048, 32, 750)),
    (&["lasr_encoder"], sizes(512, 8, 10000)),
    (&["mimi", "mimi_encoder", "mimi_decoder", "pocket_tts_audio_tokenizer", "pocket_tts_audio_tokenizer_encoder", "pocket_tts_audio_tokenizer_decoder"], sizes(512, 8, 8000)),
    (&["pocket_tts"], sizes(1024, 16, 8192)),
    (&["qwen3_moe"], sizes(2048, 32, 32768)),
    (&["dots1"], sizes(4608, 32, 2048)),
    (&["arcee", "zamba2", "stablelm"], sizes(2560, 32, 4096)),
    (&["timesfm2_5"], sizes(1280, 16, 16384)),
    (&["hrm_text"], sizes(1536, 12, 2048)),
    (&["iquestcoder", "llama4_text", "llama4"], sizes(5120, 40, 131072)),
    (&["seed_oss"], sizes(4096, 80, 524288)),
    (&["qwen3_omni_moe_talker_code_predictor", "qwen2_5_omni_dit", "granite_docling_text", "qwen3_omni_moe_talker_text"], sizes(1024, 16, 32768)),
    (&["neucodec", "xcodec2"], sizes(1024, 16, 4096)),
    (&["voxtral_realtime_encoder"], sizes(1280, 32, 1500)),
    (&["gemma"], sizes(3072, 16, 8192)),
    (&["gemma2", "vaultgemma", "t5_gemma_module"], sizes(2304, 8, 8192)),
    (&["emu3_text_model"], sizes(4096, 32, 9216)),
    (&["lfm2"], sizes(2560, 32, 128000)),
    (&["lfm2_moe"], sizes(2048, 32, 128000)),
    (&["bitnet"], sizes(2560, 20, 2048)),
    (&["csm_depth_decoder_model"], sizes(1024, 8, 33)),
    (&["hy_v3", "solar_open", "mimo_v2_flash"], sizes(4096, 64, 131072)),
    (&["jina_embeddings_v3"], sizes(1024, 16, 8194)),
    (&["nomic_bert"], sizes(768, 12, 2048)),
    (&["apertus"], sizes(4096, 32, 65536)),
    (&["cwm"], sizes(6144, 48, 131072)),
    (&["higgs_audio_v2"], sizes(3072, 24, 2048)),
    (&["gpt_oss"], sizes(2880, 64, 131072)),
    (&["ministral3", "bamba"], sizes(4096, 32, 262144)),
    (&["dbrx"], sizes(2048, 16, 2048)),
    (&["jetmoe"], sizes(2048, 32, 4096)),
    (&["granite_swa"], sizes(2560, 20, 8192)),
    (&["falcon"], sizes(4544, 71, 2048)),
    (&["esm"], sizes(768, 12, 1026)),
    (&["dia_encoder"], sizes(1024, 16, 1024)),
    (&["dia_decoder"], sizes(2048, 16, 3072)),
    (&["nanochat"], sizes(768, 6, 2048)),
    (&["phi3"], sizes(3072, 32, 4096)),
    (&["phi4_multimodal"], sizes(3072, 32, 131072)),
    (&["persimmon"], sizes(4096, 64, 16384)),
    (&["nemotron"], sizes(6144, 48, 4096)),
    (&["glm4_moe"], sizes(4096, 96, 131072)),
    (&["recurrent_gemma"], sizes(2560, 10, 0)),
    (&["minimax_m2"], sizes(3072, 48, 196608)),
    (&["minimax_m3_vl_text"], sizes(6144, 64, 524288)),
    (&["glmasr_encoder"], sizes(1280, 20, 1500)),
    (&["dots3_note_audio_encoder"], sizes(1280, 20, 6000)),
    (&["nemotron3_5_transcribe_asr_audio"], sizes(1280, 10, 5000)),
    (&["nemotron3_5_transcribe_word_timestamp"], sizes(1280, 16, 5000)),
    (&["nemotron3_diarization_audio"], sizes(512, 8, 5000)),
    (&["gpt_neox"], sizes(6144, 64, 2048)),
    (&["gpt_neox_japanese"], sizes(2560, 32, 2048)),
    (&["gptj", "codegen"], sizes(4096, 16, 2048)),
    (&["cohere", "cohere2", "cohere2_moe"], sizes(8192, 64, 8192)),
    (&["ernie4_5", "paddleocr_vl_text", "paddleocr_vl", "glm_ocr_text"], sizes(1024, 16, 131072)),
    (&["ernie4_5_moe", "ernie4_5_vl_moe_text", "ernie4_5_vl_moe"], sizes(2560, 20, 131072)),
    (&["helium"], sizes(2560, 20, 4096)),
    (&["moonshine"], sizes(288, 8, 512)),
    (&["moonshine_streaming"], sizes(320, 8, 4096)),
    (&["openai_privacy_filter"], sizes(640, 14, 131072)),
    (&["pe_audio_encoder", "pe_audio_video_encoder", "pe_video_encoder"], sizes(1792, 14, 10000)),
    (&["blt_local_encoder", "blt_local_decoder"], sizes(1024, 16, 24576)),
    (&["deepseek_v4"], sizes(4096, 64, 1048576)),
    (&["deepseek_v3"], sizes(7168, 128, 4096)),
    (&["axk1"], sizes(7168, 64, 32768)),
    (&["youtu", "cosmos3_edge_text"], sizes(2048, 16, 131072)),
    (&["deepseek_v32"], sizes(7168, 128, 163840)),
    (&["axk2"], sizes(2048, 32, 131072)),
    (&["bailing_hybrid"], sizes(2560, 32, 262144)),
    (&["glm4_moe_lite"], sizes(2048, 20, 202752)),
    (&["glm_moe_dsa"], sizes(6144, 64, 202752)),
    (&["longcat_flash"], sizes(6144, 64, 131072)),
    (&["mistral4"], sizes(4096, 32, 1048576)),
    (&["minicpm3"], sizes(2560, 40, 32768)),
    (&["hy_v4"], sizes(2816, 32, 262144)),
    (&["kolibri1"], sizes(2560, 48, 262144)),
    (&["afmoe"], sizes(2048, 16, 16384)),
    (&["flint"], sizes(2048, 32, 262144)),
    (&["beam"], sizes(5120, 48, 8192)),
    (&["muse_glimmer_text", "muse_glimmer_assistant"], sizes(6656, 32, 131072)),
    (&["muse_spark_text"], sizes(8192, 128, 1048576)),
    (&["gemma3_text", "gemma3", "t5gemma2_text", "t5gemma2_decoder", "gemma4_text", "diffusion_gemma_text"], sizes(2304, 8, 131072)),
    (&["gemma3n_text", "gemma3n"], sizes(2048, 8, 32768)),
    (&["gemma4_unified_text"], sizes(2304, 8, 262144)),
    (&["embedding_gemma2_text"], sizes(512, 4, 262144)),
    (&["laguna"], sizes(2048, 48, 131072)),
    (&["mellum"], sizes(2304, 32, 131072)),
    (&["zaya"], sizes(2048, 8, 131072)),
    (&["lfm3", "qwen3_vl_moe_text", "qwen3_vl_moe"], sizes(2048, 16, 128000)),
    (&["qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text"], sizes(8192, 64, 32768)),
    (&["qwen2_5_omni_text", "qwen2_5_omni_talker"], sizes(3584, 28, 32768)),
    (&["glm4v_moe_text"], sizes(4096, 96, 65536)),
    (&["qwen3_vl_text", "qwen3_vl"], sizes(4096, 32, 128000)),
    (&["qwen3_omni_moe_text"], sizes(2048, 28, 32768)),
    (&["qwen3_5_text", "qwen3_5"], sizes(4096, 16, 32768)),
    (&["qwen3_omni_moe_vision_encoder"], sizes(1152, 16, 0)),
];

/// Models that rotate in ways which pairs and frequencies do not describe, and how.
#[rustfmt::skip]
pub(super) static UNSUPPORTED: &[(&[&str], &str)] = &[
    (&["dinov3_vit", "eomt_dinov3", "sapiens2"], "angles grow with the fraction of the image's height and width, not with an index"),
    (&["sam2_video", "sam3_tracker_video", "sam3_vit_model", "edgetam_video", "inkling2_vision", "step3p5_vision", "kimi_k25_vision", "moonvit", "efficientloftr", "lightglue", "llama4_vision_model", "llama4_vision", "vjepa2"], "its axes share a head in an order of their own"),
    (&["gemma4_vision"], "each half of a head is rotated by itself: plan two rotations, with rotary offsets"),
    (&["neomme", "musicflamingo", "cohere_compass_text", "cohere_compass", "dots3_note_text", "dots3_note_vision_encoder", "qwen4_exp_text", "esmfold2", "molmo2_text"], "layers of different shape or axes of their own are not described here"),
    (&["hunyuan_vl", "hunyuan_vl_text"], "the two dims of a pair may turn with different axes"),
    (&["mistral_large4", "mistral_large4_text"], "its frequencies are multiplied by a learned vector, which the config does not hold"),
    (&["roformer", "clvp_encoder", "seamless_m4t", "wav2vec2-bert", "wav2vec2-conformer"], "its table is formed by hand in its modelling code"),
];

/// Vision towers without RoPE, by the `model_type` of their section.
#[rustfmt::skip]
pub(super) static TOWERS_WITHOUT_ROPE: &[&str] = &[
    "aimv2_vision_model", "align_vision_model", "altclip_vision_model", "blip_2_vision_model", "blip_vision_model", "bridgetower_vision_model", "chinese_clip_vision_model", "clip", "clip_vision_model", "clipseg_vision_model", "cosmos3_edge_vision", "edgetam_vision_model", "florence_vision", "gemma3n_vision", "gemma4_unified_vision", "git_vision_model", "glm_image_vision", "got_ocr2_vision", "granite_docling_vision", "groupvit_vision_model", "hunyuan_vl_vision", "idefics2", "idefics2_vision", "idefics3", "idefics3_vision", "idefics_vision", "inkling_vision", "instructblip_vision_model", "instructblipvideo_vision_model", "internvl_vision", "janus_vision_model", "kosmos_2_5_vision_model", "kosmos_2_vision_model", "metaclip_2_vision_model", "minicpm_ocr_vision", "minicpmv4_6_vision", "minicpmv4_7_vision", "mllama_vision_model", "molmo2_vision", "ovis2_vision", "owlv2_vision_model", "owlvit_vision_model", "phi4_multimodal_vision", "pix2struct_vision_model", "pp_chart2table_vision", "pp_formulanet_vision", "qianfan_ocr_vision", "radio", "sam_hq_vision_model", "sam_vision_model", "siglip", "siglip2_vision_model", "siglip_vision_model", "slanext_vision", "smolvlm_vision", "timm_wrapper", "tipsv2_vision_model", "videoprism_vision_model", "vit", "xclip_vision_model",
];

/// Families of models without RoPE that users may well try.
#[rustfmt::skip]
pub(super) static WITHOUT_ROPE: &[&str] = &[
    "gpt2", "opt", "bloom", "mpt", "bert", "roberta", "xlm-roberta", "distilbert", "albert", "electra", "deberta", "deberta-v2", "t5", "mt5", "umt5", "bart", "mbart", "whisper", "clip", "siglip", "vit", "gpt_neo", "gpt_bigcode", "biogpt", "xglm", "mamba", "mamba2", "falcon_mamba", "rwkv", "jamba", "zamba", "nemotron_h", "kimi_linear", "glm5_next_text", "granite_speech",
];

/// The family of a `model_type`.
pub(super) fn family(model_type: &str) -> Option<&'static Family> {
    FAMILIES
        .iter()
        .find(|family| family.model_types.contains(&model_type))
}

/// The default sizes of the model that the table has by this name.
pub(super) fn default_sizes(known_as: &str) -> Option<&'static Sizes> {
    SIZES
        .iter()
        .find(|(names, _)| names.contains(&known_as))
        .map(|(_, sizes)| sizes)
}
