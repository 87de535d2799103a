"""The configs behind tests/goldens/transformers: as the published models spell them.

Hyper-parameters are those of the named checkpoints; keys that have nothing to do
with attention are kept where a parser has to step over them. Where a list could
not be copied (Phi-3.5-MoE's 64 factors) or a combination is not published (the
yarn_* and llama_* variations), the case's name or comment says so.
"""

LLAMA2 = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": 32000,
}

LLAMA32_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}

# A small head keeps the variations of one rope type small.
SMALL = {
    "hidden_size": 2048,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
}

QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "vocab_size": 152064,
}

DEEPSEEK_SCALING = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}

PHI3_LONG = [
    1.0800000429153442, 1.1100000143051147, 1.1399999856948853, 1.340000033378601,
    1.5899999141693115, 1.600000023841858, 1.6200000047683716, 2.620000123977661,
    3.2300000190734863, 3.2300000190734863, 4.789999961853027, 7.400000095367432,
    7.700000286102295, 9.09000015258789, 12.199999809265137, 17.670000076293945,
    24.46000099182129, 28.57000160217285, 30.420001983642578, 30.840002059936523,
    32.590003967285156, 32.93000411987305, 42.320003509521484, 44.96000289916992,
    50.340003967285156, 50.45000457763672, 57.55000305175781, 57.93000411987305,
    58.21000289916992, 60.1400032043457, 62.61000442504883, 62.62000274658203,
    62.71000289916992, 63.1400032043457, 63.1400032043457, 63.77000427246094,
    63.93000411987305, 63.96000289916992, 63.970001220703125, 64.02999877929688,
    64.06999969482422, 64.08000183105469, 64.12000274658203, 64.41000366210938,
    64.4800033569336, 64.51000213623047, 64.52999877929688, 64.83999633789062,
]
PHI3_SHORT = [
    1.0, 1.0199999809265137, 1.0299999713897705, 1.0299999713897705,
    1.0499999523162842, 1.0499999523162842, 1.0499999523162842, 1.0499999523162842,
    1.0499999523162842, 1.0699999332427979, 1.0999999046325684, 1.1099998950958252,
    1.1599998474121094, 1.1599998474121094, 1.1699998378753662, 1.2899998426437378,
    1.339999794960022, 1.679999828338623, 1.7899998426437378, 1.8199998140335083,
    1.8499997854232788, 1.8799997568130493, 1.9099997282028198, 1.9399996995925903,
    1.9899996519088745, 2.0199997425079346, 2.0199997425079346, 2.0199997425079346,
    2.0199997425079346, 2.0199997425079346, 2.0199997425079346, 2.0299997329711914,
    2.0299997329711914, 2.0299997329711914, 2.0299997329711914, 2.0299997329711914,
    2.0299997329711914, 2.0299997329711914, 2.0299997329711914, 2.0299997329711914,
    2.0799996852874756, 2.0899996757507324, 2.189999580383301, 2.2199995517730713,
    2.5899994373321533, 2.729999542236328, 2.749999523162842, 2.8399994373321533,
]
PHI4_MINI_LONG = [
    1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817,
    2.187582649, 2.446418898, 2.735880826, 3.059592084, 3.421605075, 3.826451687,
    4.279200023, 4.785517845, 5.351743533, 5.984965424, 6.693110555, 7.485043894,
    8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252,
    16.37415215, 18.31155283, 20.47818807, 22.90118105, 25.61086418, 28.64115884,
    32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7, 32.71, 32.93, 32.97,
    33.28, 33.49, 33.5, 44.16, 47.77,
]
MINICPM3_FACTOR = [
    1.0591234137867171, 1.1241891283591912, 1.2596935748670968, 1.5380380402321725,
    2.093982484148734, 3.1446935121267696, 4.937952647693647, 7.524541999994549,
    10.475458000005451, 13.062047352306353, 14.85530648787323, 15.906017515851266,
    16.461961959767827, 16.740306425132907, 16.87581087164081, 16.940876586213285,
]
# Same length and range as the published lists of Phi-3.5-MoE, other values.
PHIMOE_SHORT = [round(1.0 + 3.0 * (i / 63) ** 2, 4) for i in range(64)]
PHIMOE_LONG = [round(1.0 + 63.8 * (i / 63) ** 0.75, 4) for i in range(64)]

# A few words of text, a 2 by 3 image grid, text again, as the models number them:
# the text after an image starts at the largest position so far plus one.
MROPE = [
    [0, 5, 6, 6, 9, 40000],
    [0, 5, 6, 7, 9, 40000],
    [0, 5, 8, 6, 9, 40000],
]
MROPE_SHORT = [axis[1:5] for axis in MROPE]
GRID = [[0, 0, 1, 17, 63], [0, 3, 2, 40, 63]]

FULL = [7, 4095, 100000]
TWO = [7, 65535]
HALF = [0, 7, 100, 4095, 100000]


def layer_pattern(count, period, other, last="full_attention"):
    return [last if (i + 1) % period == 0 else other for i in range(count)]


def case(name, config, rotary, attention, positions=None, *, calls=None, sub=None, **options):
    """One golden: `rotary` and `attention` are "module.Class"; `calls` {name: positions}."""
    return {
        "name": name,
        "config": config,
        "rotary": rotary,
        "attention": attention,
        "calls": calls or {"default": positions},
        "sub": sub,
        **options,
    }


def llama(name, config, positions=None, **options):
    return case(name, config, "llama.LlamaRotaryEmbedding", "LlamaAttention", positions, **options)


def small(name, positions=FULL, *, calls=None, **keys):
    """A 64-wide llama with the given keys: variations of one rope type."""
    return llama(name, {**SMALL, **keys}, positions, calls=calls)


CASES = [
    # --- llama: every rope type, both spellings -------------------------------------------
    llama("llama_default", LLAMA2, FULL, heads=2),
    llama("llama_llama3", {
        **LLAMA32_1B, "head_dim": 128, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "tie_word_embeddings": False,
        "rope_scaling": {**LLAMA32_1B["rope_scaling"], "factor": 8.0},
    }, FULL),
    llama("llama_llama3_1b", LLAMA32_1B, HALF),
    llama("llama_linear_type", {
        **LLAMA2, "max_sequence_length": 16384, "rope_scaling": {"factor": 4.0, "type": "linear"},
    }, [7, 4095, 16383]),
    small("llama_linear_rope_parameters", max_position_embeddings=16384, rope_parameters={
        "factor": 4.0, "rope_theta": 10000.0, "rope_type": "linear"}),
    small("llama_dynamic_type", calls={"short": [100, 4095], "long": [100, 4096, 16383]},
          max_position_embeddings=4096, rope_scaling={"factor": 2.0, "type": "dynamic"}),
    llama("llama_yarn_type", {
        **LLAMA2, "max_position_embeddings": 131072, "rope_scaling": {
            "factor": 32.0, "finetuned": True, "original_max_position_embeddings": 4096,
            "type": "yarn"},
    }, FULL),
    small("yarn_mscale_both", max_position_embeddings=65536, rope_theta=10000.0, rope_scaling={
        "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096,
        "mscale": 1.0, "mscale_all_dim": 0.5}),
    small("yarn_mscale_only", max_position_embeddings=65536, rope_theta=10000.0, rope_scaling={
        "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096,
        "mscale": 0.707}),
    small("yarn_mscale_all_dim_zero", max_position_embeddings=65536, rope_theta=10000.0,
          rope_scaling={"rope_type": "yarn", "factor": 16.0, "mscale": 0.707,
                        "mscale_all_dim": 0.0, "original_max_position_embeddings": 4096}),
    small("yarn_beta_zero", max_position_embeddings=65536, rope_theta=10000.0, rope_scaling={
        "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096,
        "beta_fast": 0, "beta_slow": 0}),
    small("yarn_attention_factor", max_position_embeddings=65536, rope_theta=10000.0, rope_scaling={
        "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096,
        "attention_factor": 1.5, "mscale": 1.0, "mscale_all_dim": 0.5,
        "beta_fast": 24, "beta_slow": 2}),
    # No original_max_position_embeddings: max_position_embeddings takes its place.
    small("yarn_no_original", max_position_embeddings=4096, rope_theta=10000.0, rope_scaling={
        "rope_type": "yarn", "factor": 16.0}),
    small("longrope_factor", calls={"short": [100, 4095], "long": [100, 4096, 65535]},
          max_position_embeddings=65536, rope_theta=10000.0, rope_scaling={
              "rope_type": "longrope", "factor": 32.0, "original_max_position_embeddings": 4096,
              "short_factor": [round(1.0 + 0.02 * i, 2) for i in range(32)],
              "long_factor": [round(1.0 + 0.5 * i, 2) for i in range(32)]}),
    small("longrope_attention_factor", calls={"short": [0, 4095], "long": [0, 4096]},
          max_position_embeddings=65536, rope_theta=10000.0, rope_scaling={
              "rope_type": "longrope", "attention_factor": 1.25,
              "original_max_position_embeddings": 4096,
              "short_factor": [round(1.0 + 0.02 * i, 2) for i in range(32)],
              "long_factor": [round(1.0 + 0.5 * i, 2) for i in range(32)]}),
    # rope_type wins over type, and rope_scaling's own theta over the one beside it.
    small("llama_both_spellings", max_position_embeddings=8192, rope_theta=10000.0, rope_scaling={
        "type": "dynamic", "rope_type": "linear", "factor": 2.0, "rope_theta": 50000.0}),
    # A plain llama has no partial rotation; the key is there and does nothing.
    small("llama_partial_ignored", [0, 7, 4095], max_position_embeddings=4096,
          rope_theta=10000.0, partial_rotary_factor=0.5),

    # --- the llama-like -------------------------------------------------------------------
    case("mistral", {
        "architectures": ["MistralForCausalLM"], "head_dim": 128, "hidden_size": 5120,
        "intermediate_size": 14336, "max_position_embeddings": 131072, "model_type": "mistral",
        "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None,
        "vocab_size": 131072,
    }, "mistral.MistralRotaryEmbedding", "MistralAttention", FULL, heads=2),
    case("ministral3", {
        "architectures": ["Mistral3ForConditionalGeneration"], "image_token_index": 10,
        "model_type": "mistral3",
        "text_config": {
            "head_dim": 128, "hidden_size": 4096, "intermediate_size": 14336,
            "max_position_embeddings": 262144, "model_type": "ministral3",
            "num_attention_heads": 32, "num_hidden_layers": 34, "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_parameters": {
                "beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0,
                "llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 16384, "rope_theta": 1000000.0,
                "rope_type": "yarn", "type": "yarn",
            },
            "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 131072,
        },
        "vision_config": {
            "head_dim": 64, "hidden_size": 1024, "image_size": 1540, "model_type": "pixtral",
            "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        },
    }, "ministral3.Ministral3RotaryEmbedding", "Ministral3Attention", FULL, sub="text_config"),
    case("mixtral", {
        "architectures": ["MixtralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "num_local_experts": 8, "rope_theta": 1000000.0, "sliding_window": None,
    }, "mixtral.MixtralRotaryEmbedding", "MixtralAttention", [7, 4095, 32767]),
    case("qwen2", QWEN2, "qwen2.Qwen2RotaryEmbedding", "Qwen2Attention", [7, 4095, 32767]),
    case("qwen2_yarn", {
        **QWEN2, "hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    }, "qwen2.Qwen2RotaryEmbedding", "Qwen2Attention", HALF),
    case("qwen3", {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128,
        "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960,
        "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
        "num_key_value_heads": 8, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": None, "use_sliding_window": False,
    }, "qwen3.Qwen3RotaryEmbedding", "Qwen3Attention", [7, 4095, 40959]),
    case("qwen3_moe", {
        "architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 1, "head_dim": 128,
        "hidden_size": 2048, "max_position_embeddings": 262144, "model_type": "qwen3_moe",
        "num_attention_heads": 32, "num_experts": 128, "num_hidden_layers": 48,
        "num_key_value_heads": 4, "rope_scaling": None, "rope_theta": 10000000,
    }, "qwen3_moe.Qwen3MoeRotaryEmbedding", "Qwen3MoeAttention", [0, 4095, 262143]),
    case("qwen3_next", {
        "architectures": ["Qwen3NextForCausalLM"], "full_attention_interval": 4, "head_dim": 256,
        "hidden_size": 2048, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
        "linear_num_key_heads": 16, "max_position_embeddings": 262144, "model_type": "qwen3_next",
        "num_attention_heads": 16, "num_hidden_layers": 48, "num_key_value_heads": 2,
        "partial_rotary_factor": 0.25, "rope_scaling": None, "rope_theta": 10000000,
    }, "qwen3_next.Qwen3NextRotaryEmbedding", "Qwen3NextAttention", [4095, 262143], layer=3),
    case("starcoder2", {
        "architectures": ["Starcoder2ForCausalLM"], "hidden_size": 3072,
        "max_position_embeddings": 16384, "model_type": "starcoder2", "num_attention_heads": 24,
        "num_hidden_layers": 30, "num_key_value_heads": 2, "rope_theta": 999999.4420358813,
        "sliding_window": 4096, "use_bias": True,
    }, "starcoder2.Starcoder2RotaryEmbedding", "Starcoder2Attention", [7, 4095, 16383]),
    case("granite", {
        "architectures": ["GraniteForCausalLM"], "attention_multiplier": 0.0078125,
        "embedding_multiplier": 12.0, "hidden_size": 4096, "logits_scaling": 16.0,
        "max_position_embeddings": 131072, "model_type": "granite", "num_attention_heads": 32,
        "num_hidden_layers": 40, "num_key_value_heads": 8, "residual_multiplier": 0.22,
        "rope_scaling": None, "rope_theta": 10000000.0,
    }, "granite.GraniteRotaryEmbedding", "GraniteAttention", [7, 4095, 131071]),
    case("smollm3", {
        "architectures": ["SmolLM3ForCausalLM"], "hidden_size": 2048,
        "max_position_embeddings": 65536, "model_type": "smollm3",
        "no_rope_layer_interval": 4,
        "no_rope_layers": [0 if (i + 1) % 4 == 0 else 1 for i in range(36)],
        "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4,
        "rope_scaling": None, "rope_theta": 5000000.0, "use_sliding_window": False,
    }, "smollm3.SmolLM3RotaryEmbedding", "SmolLM3Attention", [7, 4095, 65535]),
    case("exaone4", {
        "architectures": ["Exaone4ForCausalLM"], "head_dim": 128, "hidden_size": 5120,
        "max_position_embeddings": 131072, "model_type": "exaone4", "num_attention_heads": 40,
        "num_hidden_layers": 64, "num_key_value_heads": 8,
        "layer_types": layer_pattern(64, 4, "sliding_attention"),
        "rope_scaling": {
            "factor": 16.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 1000000, "sliding_window": 4096, "sliding_window_pattern": "LLLG",
    }, "exaone4.Exaone4RotaryEmbedding", "Exaone4Attention", FULL),
    case("apertus", {
        "architectures": ["ApertusForCausalLM"], "hidden_act": "xielu", "hidden_size": 4096,
        "max_position_embeddings": 65536, "model_type": "apertus", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "qk_norm": True,
        "rope_scaling": {
            "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3", "type": "llama3"},
        "rope_theta": 12000000,
    }, "apertus.ApertusRotaryEmbedding", "ApertusAttention", [7, 4095, 65535]),
    case("olmo", {
        "architectures": ["OlmoForCausalLM"], "clip_qkv": None, "hidden_size": 4096,
        "max_position_embeddings": 2048, "model_type": "olmo", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "rope_scaling": None,
        "rope_theta": 10000.0,
    }, "olmo.OlmoRotaryEmbedding", "OlmoAttention", [0, 7, 2047]),
    case("olmo2", {
        "architectures": ["Olmo2ForCausalLM"], "hidden_size": 4096,
        "max_position_embeddings": 4096, "model_type": "olmo2", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "rope_scaling": None,
        "rope_theta": 500000,
    }, "olmo2.Olmo2RotaryEmbedding", "Olmo2Attention", [0, 7, 4095]),
    case("olmo3", {
        "architectures": ["Olmo3ForCausalLM"], "hidden_size": 4096,
        "layer_types": layer_pattern(32, 4, "sliding_attention"),
        "max_position_embeddings": 65536, "model_type": "olmo3", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32,
        "rope_scaling": {
            "attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0,
            "factor": 8.0, "original_max_position_embeddings": 8192, "rope_type": "yarn"},
        "rope_theta": 500000, "sliding_window": 4096,
    }, "olmo3.Olmo3RotaryEmbedding", "Olmo3Attention",
        calls={"full_attention": [7, 4095, 65535], "sliding_attention": [4095]}),
    case("ernie4_5", {
        "architectures": ["Ernie4_5ForCausalLM"], "head_dim": 128, "hidden_size": 1024,
        "max_position_embeddings": 131072, "model_type": "ernie4_5", "num_attention_heads": 16,
        "num_hidden_layers": 18, "num_key_value_heads": 2, "rope_scaling": None,
        "rope_theta": 500000,
    }, "ernie4_5.Ernie4_5RotaryEmbedding", "Ernie4_5Attention", FULL),
    case("nanochat", {
        "architectures": ["NanoChatForCausalLM"], "final_logit_softcapping": 15.0,
        "hidden_size": 1280, "max_position_embeddings": 2048, "model_type": "nanochat",
        "num_attention_heads": 10, "num_hidden_layers": 20, "num_key_value_heads": 10,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    }, "nanochat.NanoChatRotaryEmbedding", "NanoChatAttention", [1, 100, 2047]),
    case("hunyuan_v1_dense", {
        "architectures": ["HunYuanDenseV1ForCausalLM"], "attention_head_dim": 128,
        "head_dim": 128, "hidden_size": 2048, "max_position_embeddings": 262144,
        "model_type": "hunyuan_v1_dense", "num_attention_heads": 16, "num_hidden_layers": 32,
        "num_key_value_heads": 4, "rope_scaling": {
            "alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0,
            "mscale_all_dim": 1.0, "type": "dynamic"},
        "rope_theta": 10000.0, "use_qk_norm": True,
    }, "hunyuan_v1_dense.HunYuanDenseV1RotaryEmbedding", "HunYuanDenseV1Attention",
        [7, 4095, 100000]),

    # --- gemma ----------------------------------------------------------------------------
    case("gemma", {
        "architectures": ["GemmaForCausalLM"], "head_dim": 256, "hidden_size": 3072,
        "max_position_embeddings": 8192, "model_type": "gemma", "num_attention_heads": 16,
        "num_hidden_layers": 28, "num_key_value_heads": 16, "rope_scaling": None,
        "rope_theta": 10000.0,
    }, "gemma.GemmaRotaryEmbedding", "GemmaAttention", [7, 8191]),
    case("gemma2", {
        "architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0, "head_dim": 128, "hidden_size": 4608,
        "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 32,
        "num_hidden_layers": 46, "num_key_value_heads": 16, "query_pre_attn_scalar": 144,
        "rope_theta": 10000.0, "sliding_window": 4096,
    }, "gemma2.Gemma2RotaryEmbedding", "Gemma2Attention", [7, 4095, 8191]),
    # As published: head_dim, both thetas and the head count are the family's defaults.
    case("gemma3", {
        "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999,
        "eoi_token_index": 256000, "image_token_index": 262144, "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
            "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": {
            "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304,
            "model_type": "siglip_vision_model", "num_attention_heads": 16,
            "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
        },
    }, "gemma3.Gemma3RotaryEmbedding", "Gemma3Attention", sub="text_config",
        calls={"full_attention": [7, 131071], "sliding_attention": [4095]}),
    case("gemma3_text", {
        "architectures": ["Gemma3ForCausalLM"], "head_dim": 256, "hidden_size": 1152,
        "max_position_embeddings": 32768, "model_type": "gemma3_text", "num_attention_heads": 4,
        "num_hidden_layers": 26, "num_key_value_heads": 1, "query_pre_attn_scalar": 256,
        "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": 512, "sliding_window_pattern": 6,
    }, "gemma3.Gemma3RotaryEmbedding", "Gemma3Attention",
        calls={"full_attention": [32767], "sliding_attention": [511]}),
    case("gemma3n", {
        "architectures": ["Gemma3nForConditionalGeneration"], "model_type": "gemma3n",
        "text_config": {
            "altup_num_inputs": 4, "head_dim": 256, "hidden_size": 2048,
            "layer_types": layer_pattern(30, 5, "sliding_attention"),
            "max_position_embeddings": 32768, "model_type": "gemma3n_text",
            "num_attention_heads": 8, "num_hidden_layers": 30, "num_key_value_heads": 2,
            "num_kv_shared_layers": 10, "rope_local_base_freq": 10000.0, "rope_scaling": None,
            "rope_theta": 1000000.0, "sliding_window": 512,
        },
    }, "gemma3n.Gemma3nRotaryEmbedding", "Gemma3nTextAttention", sub="text_config",
        calls={"full_attention": [32767], "sliding_attention": [511]}),
    case("gemma4", {
        "architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4",
        "text_config": {
            "global_head_dim": 512, "head_dim": 256, "hidden_size": 2816,
            "layer_types": layer_pattern(30, 6, "sliding_attention"),
            "max_position_embeddings": 262144, "model_type": "gemma4_text",
            "num_attention_heads": 16, "num_global_key_value_heads": 2, "num_hidden_layers": 30,
            "num_key_value_heads": 8,
            "rope_parameters": {
                "full_attention": {
                    "partial_rotary_factor": 0.25, "rope_theta": 1000000.0,
                    "rope_type": "proportional"},
                "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
            },
            "sliding_window": 1024,
        },
    }, "gemma4.Gemma4TextRotaryEmbedding", "Gemma4TextAttention", sub="text_config",
        calls={"full_attention": [262143], "sliding_attention": [7]}),

    # --- phi ------------------------------------------------------------------------------
    case("phi", {
        "architectures": ["PhiForCausalLM"], "hidden_size": 2560,
        "max_position_embeddings": 2048, "model_type": "phi", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "partial_rotary_factor": 0.4,
        "qk_layernorm": False, "rope_scaling": None, "rope_theta": 10000.0,
    }, "phi.PhiRotaryEmbedding", "PhiAttention", [0, 1, 7, 100, 2047]),
    case("phi3_longrope", {
        "architectures": ["Phi3ForCausalLM"], "hidden_size": 3072,
        "max_position_embeddings": 131072, "model_type": "phi3", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {
            "long_factor": PHI3_LONG, "short_factor": PHI3_SHORT, "type": "longrope"},
        "rope_theta": 10000.0, "sliding_window": 262144,
    }, "phi3.Phi3RotaryEmbedding", "Phi3Attention",
        calls={"short": [0, 4095], "long": [100, 4096, 131071]}),
    case("phi4_mini", {
        "architectures": ["Phi3ForCausalLM"], "hidden_size": 3072,
        "max_position_embeddings": 131072, "model_type": "phi3", "num_attention_heads": 24,
        "num_hidden_layers": 32, "num_key_value_heads": 8,
        "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75,
        "rope_scaling": {
            "long_factor": PHI4_MINI_LONG, "short_factor": [1.0] * 48, "type": "longrope"},
        "rope_theta": 10000.0, "sliding_window": 262144,
    }, "phi3.Phi3RotaryEmbedding", "Phi3Attention",
        calls={"short": [0, 4095], "long": [100, 131071]}),
    case("phimoe", {
        "architectures": ["PhimoeForCausalLM"], "hidden_size": 4096,
        "max_position_embeddings": 131072, "model_type": "phimoe", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 16,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {
            "long_factor": PHIMOE_LONG, "long_mscale": 1.243163121016122,
            "original_max_position_embeddings": 4096, "short_factor": PHIMOE_SHORT,
            "short_mscale": 1.243163121016122, "type": "longrope"},
        "rope_theta": 10000.0, "sliding_window": 131072,
    }, "phimoe.PhimoeRotaryEmbedding", "PhimoeAttention",
        calls={"short": [0, 4095], "long": [100, 4096]}),

    # --- partial rotation in its spellings ------------------------------------------------
    case("gpt_neox", {
        "architectures": ["GPTNeoXForCausalLM"], "hidden_size": 6144,
        "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 64,
        "num_hidden_layers": 44, "rotary_emb_base": 10000, "rotary_pct": 0.25,
        "use_parallel_residual": True,
    }, "gpt_neox.GPTNeoXRotaryEmbedding", "GPTNeoXAttention", [0, 1, 7, 100, 2047]),
    case("gptj", {
        "architectures": ["GPTJForCausalLM"], "activation_function": "gelu_new",
        "model_type": "gptj", "n_embd": 4096, "n_head": 16, "n_inner": None, "n_layer": 28,
        "n_positions": 2048, "rotary": True, "rotary_dim": 64, "scale_attn_weights": True,
    }, "gptj", "GPTJAttention", [0, 7, 2047]),
    case("codegen", {
        "architectures": ["CodeGenForCausalLM"], "activation_function": "gelu_new",
        "model_type": "codegen", "n_ctx": 2048, "n_embd": 1024, "n_head": 16, "n_inner": None,
        "n_layer": 20, "n_positions": 2048, "rotary_dim": 32, "scale_attn_weights": True,
    }, "codegen", "CodeGenAttention", [0, 1, 7, 100, 2047]),
    # As first published: no rope_theta, the head size only by division.
    case("falcon", {
        "alibi": False, "architectures": ["FalconForCausalLM"], "bias": False,
        "hidden_size": 4544, "model_type": "falcon", "multi_query": True,
        "new_decoder_architecture": False, "num_attention_heads": 71, "num_hidden_layers": 32,
        "num_ln_in_parallel_attn": None, "parallel_attn": True,
    }, "falcon.FalconRotaryEmbedding", "FalconAttention", [0, 1, 7, 100, 2047]),
    case("stablelm", {
        "architectures": ["StableLmForCausalLM"], "hidden_size": 2560,
        "max_position_embeddings": 4096, "model_type": "stablelm", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "partial_rotary_factor": 0.25,
        "rope_theta": 10000, "use_qkv_bias": False,
    }, "stablelm.StableLmRotaryEmbedding", "StableLmAttention", [0, 1, 7, 100, 4095]),
    # partial_rotary_factor is absent: the family's default is 0.5.
    case("persimmon", {
        "architectures": ["PersimmonForCausalLM"], "hidden_act": "relu2", "hidden_size": 4096,
        "max_position_embeddings": 16384, "model_type": "persimmon", "num_attention_heads": 64,
        "num_hidden_layers": 36, "qk_layernorm": True, "rope_theta": 25000.0,
    }, "persimmon.PersimmonRotaryEmbedding", "PersimmonAttention", [0, 1, 7, 100, 16383]),
    case("nemotron", {
        "architectures": ["NemotronForCausalLM"], "head_dim": 128, "hidden_act": "relu2",
        "hidden_size": 3072, "max_position_embeddings": 4096, "model_type": "nemotron",
        "num_attention_heads": 24, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "partial_rotary_factor": 0.5, "rope_theta": 10000,
    }, "nemotron.NemotronRotaryEmbedding", "NemotronAttention", [0, 7, 4095]),
    case("minimax_m2", {
        "architectures": ["MiniMaxM2ForCausalLM"], "head_dim": 128, "hidden_size": 3072,
        "max_position_embeddings": 196608, "model_type": "minimax_m2",
        "num_attention_heads": 48, "num_hidden_layers": 62, "num_key_value_heads": 8,
        "rope_theta": 5000000, "rotary_dim": 64, "use_qk_norm": True,
    }, "minimax_m2.MiniMaxM2RotaryEmbedding", "MiniMaxM2Attention", [7, 4095, 196607]),

    # --- glm ------------------------------------------------------------------------------
    case("glm", {
        "architectures": ["GlmForCausalLM"], "attention_bias": True, "head_dim": 128,
        "hidden_size": 4096, "max_position_embeddings": 131072, "model_type": "glm",
        "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 2,
        "partial_rotary_factor": 0.5, "rope_theta": 5000000.0,
    }, "glm.GlmRotaryEmbedding", "GlmAttention", [7, 4095, 131071], heads=2),
    case("glm4", {
        "architectures": ["Glm4ForCausalLM"], "attention_bias": False, "head_dim": 128,
        "hidden_size": 4096, "max_position_embeddings": 32768, "model_type": "glm4",
        "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 2,
        "rope_theta": 10000.0,
    }, "glm4.Glm4RotaryEmbedding", "Glm4Attention", [0, 7, 32767]),
    case("glm4_moe", {
        "architectures": ["Glm4MoeForCausalLM"], "head_dim": 128, "hidden_size": 4096,
        "max_position_embeddings": 131072, "model_type": "glm4_moe", "num_attention_heads": 96,
        "num_hidden_layers": 46, "num_key_value_heads": 8, "partial_rotary_factor": 0.5,
        "rope_scaling": None, "rope_theta": 1000000,
    }, "glm4_moe.Glm4MoeRotaryEmbedding", "Glm4MoeAttention", [7, 4095, 131071]),
    case("glm4v", {
        "architectures": ["Glm4vForConditionalGeneration"], "model_type": "glm4v",
        "text_config": {
            "attention_bias": True, "head_dim": 128, "hidden_size": 4096,
            "max_position_embeddings": 65536, "model_type": "glm4v_text",
            "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 2,
            "partial_rotary_factor": 0.5,
            "rope_scaling": {"mrope_section": [8, 12, 12], "rope_type": "default"},
            "rope_theta": 10000.0,
        },
        "vision_config": {
            "depth": 24, "hidden_size": 1536, "image_size": 336, "model_type": "glm4v",
            "num_heads": 12, "patch_size": 14, "spatial_merge_size": 2,
        },
    }, "glm4v.Glm4vTextRotaryEmbedding", "Glm4vTextAttention", MROPE_SHORT, sub="text_config"),
    case("glm4_moe_lite", {
        "architectures": ["Glm4MoeLiteForCausalLM"], "hidden_size": 2048, "kv_lora_rank": 512,
        "max_position_embeddings": 202752, "model_type": "glm4_moe_lite",
        "num_attention_heads": 20, "num_hidden_layers": 47, "num_key_value_heads": 20,
        "partial_rotary_factor": 1.0, "q_lora_rank": 768, "qk_nope_head_dim": 192,
        "qk_rope_head_dim": 64, "rope_scaling": None, "rope_theta": 1000000, "v_head_dim": 256,
    }, "glm4_moe_lite.Glm4MoeLiteRotaryEmbedding", "Glm4MoeLiteAttention", HALF, part="mla",
        apply="apply_rotary_pos_emb_interleave"),

    # --- cohere ---------------------------------------------------------------------------
    case("cohere", {
        "architectures": ["CohereForCausalLM"], "hidden_size": 8192, "logit_scale": 0.0625,
        "max_position_embeddings": 8192, "model_type": "cohere", "num_attention_heads": 64,
        "num_hidden_layers": 40, "num_key_value_heads": 64, "rope_theta": 8000000.0,
        "use_qk_norm": False,
    }, "cohere.CohereRotaryEmbedding", "CohereAttention", [7, 4095, 8191], heads=2),
    case("cohere2", {
        "architectures": ["Cohere2ForCausalLM"], "head_dim": 128, "hidden_size": 4096,
        "max_position_embeddings": 8192, "model_type": "cohere2", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rope_scaling": None,
        "rope_theta": 50000, "sliding_window": 4096, "sliding_window_pattern": 4,
    }, "cohere2.Cohere2RotaryEmbedding", "Cohere2Attention", [7, 4095, 8191]),

    # --- latent attention: only the rope part of a head is rotated -------------------------
    case("deepseek_v2", {
        "architectures": ["DeepseekV2ForCausalLM"], "hidden_size": 2048, "kv_lora_rank": 512,
        "max_position_embeddings": 163840, "model_type": "deepseek_v2",
        "num_attention_heads": 16, "num_hidden_layers": 27, "num_key_value_heads": 16,
        "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "rope_scaling": {**DEEPSEEK_SCALING, "mscale": 0.707, "mscale_all_dim": 0.707},
        "rope_theta": 10000, "v_head_dim": 128,
    }, "deepseek_v2.DeepseekV2RotaryEmbedding", "DeepseekV2Attention", HALF, part="mla",
        apply="apply_rotary_emb"),
    case("deepseek_v3", {
        "architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 7168, "kv_lora_rank": 512,
        "max_position_embeddings": 163840, "model_type": "deepseek_v3",
        "num_attention_heads": 128, "num_hidden_layers": 61, "num_key_value_heads": 128,
        "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "rope_scaling": {**DEEPSEEK_SCALING, "mscale": 1.0, "mscale_all_dim": 1.0},
        "rope_theta": 10000, "v_head_dim": 128,
    }, "deepseek_v3.DeepseekV3RotaryEmbedding", "DeepseekV3Attention", HALF, part="mla",
        apply="apply_rotary_pos_emb_interleave"),
    case("minicpm3", {
        "architectures": ["MiniCPM3ForCausalLM"], "dim_model_base": 256, "hidden_size": 2560,
        "kv_lora_rank": 256, "max_position_embeddings": 32768, "model_type": "minicpm3",
        "num_attention_heads": 40, "num_hidden_layers": 62, "num_key_value_heads": 40,
        "q_lora_rank": 768, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32,
        "rope_scaling": {
            "long_factor": MINICPM3_FACTOR, "original_max_position_embeddings": 32768,
            "short_factor": MINICPM3_FACTOR, "type": "longrope"},
        "scale_depth": 1.4, "scale_emb": 12, "v_head_dim": 64,
    }, "minicpm3.MiniCPM3RotaryEmbedding", "MiniCPM3Attention", part="mla",
        calls={"short": [0, 1, 100, 32767], "long": [0, 1, 100, 40000]}),
    case("deepseek_v4", {
        "architectures": ["DeepseekV4ForCausalLM"], "compress_rope_theta": 160000,
        "head_dim": 512, "hidden_size": 4096, "max_position_embeddings": 1048576,
        "model_type": "deepseek_v4", "num_attention_heads": 64, "num_hidden_layers": 43,
        "num_key_value_heads": 1, "q_lora_rank": 1024, "qk_rope_head_dim": 64,
        "rope_scaling": {
            "beta_fast": 32, "beta_slow": 1, "factor": 16,
            "original_max_position_embeddings": 65536, "type": "yarn"},
        "rope_theta": 10000, "sliding_window": 128,
    }, "deepseek_v4.DeepseekV4RotaryEmbedding", "DeepseekV4Attention",
        calls={"main": [7], "compress": [100000]}),

    # --- several axes ---------------------------------------------------------------------
    case("qwen2_vl", {
        **{k: v for k, v in QWEN2.items() if k != "architectures"},
        "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl",
        "rope_scaling": {"mrope_section": [16, 24, 24], "type": "mrope"},
        "vision_config": {
            "depth": 32, "embed_dim": 1280, "hidden_size": 3584, "in_chans": 3, "mlp_ratio": 4,
            "model_type": "qwen2_vl", "num_heads": 16, "patch_size": 14, "spatial_merge_size": 2,
            "spatial_patch_size": 14, "temporal_patch_size": 2},
    }, "qwen2_vl.Qwen2VLRotaryEmbedding", "Qwen2VLAttention", MROPE_SHORT, sub="text_config"),
    case("qwen2_vl_vision", {
        **{k: v for k, v in QWEN2.items() if k != "architectures"},
        "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl",
        "rope_scaling": {"mrope_section": [16, 24, 24], "type": "mrope"},
        "vision_config": {
            "depth": 32, "embed_dim": 1280, "hidden_size": 3584, "in_chans": 3, "mlp_ratio": 4,
            "model_type": "qwen2_vl", "num_heads": 16, "patch_size": 14, "spatial_merge_size": 2,
            "spatial_patch_size": 14, "temporal_patch_size": 2},
    }, "qwen2_vl.Qwen2VLVisionRotaryEmbedding", "VisionAttention", GRID, sub="vision_config",
        apply="apply_rotary_pos_emb_vision", part="vision"),
    case("qwen2_5_vl", {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "hidden_size": 2048,
        "intermediate_size": 11008, "max_position_embeddings": 128000,
        "model_type": "qwen2_5_vl", "num_attention_heads": 16, "num_hidden_layers": 36,
        "num_key_value_heads": 2,
        "rope_scaling": {
            "mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
        "rope_theta": 1000000.0,
        "vision_config": {
            "depth": 32, "fullatt_block_indexes": [7, 15, 23, 31], "hidden_size": 1280,
            "model_type": "qwen2_5_vl", "num_heads": 16, "out_hidden_size": 2048,
            "patch_size": 14, "window_size": 112},
    }, "qwen2_5_vl.Qwen2_5_VLRotaryEmbedding", "Qwen2_5_VLAttention",
        [axis[2:] for axis in MROPE], sub="text_config"),
    case("qwen3_vl", {
        "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl",
        "text_config": {
            "head_dim": 128, "hidden_size": 4096, "max_position_embeddings": 262144,
            "model_type": "qwen3_vl_text", "num_attention_heads": 32, "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "rope_scaling": {
                "mrope_interleaved": True, "mrope_section": [24, 20, 20],
                "rope_type": "default"},
            "rope_theta": 5000000,
        },
        "vision_config": {
            "depth": 27, "hidden_size": 1152, "model_type": "qwen3_vl", "num_heads": 16,
            "patch_size": 16, "spatial_merge_size": 2},
    }, "qwen3_vl.Qwen3VLTextRotaryEmbedding", "Qwen3VLTextAttention", MROPE_SHORT,
        sub="text_config"),
    case("qwen3_vl_vision", {
        "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl",
        "text_config": {
            "head_dim": 128, "hidden_size": 4096, "model_type": "qwen3_vl_text",
            "num_attention_heads": 32, "num_hidden_layers": 36, "rope_theta": 5000000},
        "vision_config": {
            "depth": 27, "hidden_size": 1152, "model_type": "qwen3_vl", "num_heads": 16,
            "patch_size": 16, "spatial_merge_size": 2},
    }, "qwen3_vl.Qwen3VLVisionRotaryEmbedding", "Qwen3VLVisionAttention", GRID,
        sub="vision_config", apply="apply_rotary_pos_emb_vision", part="vision"),
    case("ernie4_5_vl_moe", {
        "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
        "model_type": "ernie4_5_vl_moe",
        "text_config": {
            "hidden_size": 2560, "max_position_embeddings": 131072,
            "model_type": "ernie4_5_vl_moe_text", "num_attention_heads": 20,
            "num_hidden_layers": 28, "num_key_value_heads": 4,
            "rope_parameters": {
                "mrope_section": [22, 22, 20], "rope_theta": 500000.0, "rope_type": "default"},
        },
    }, "ernie4_5_vl_moe.Ernie4_5_VLMoeTextRotaryEmbedding", "Ernie4_5_VLMoeTextAttention",
        MROPE_SHORT, sub="text_config"),
    case("pixtral_vision", {
        "architectures": ["LlavaForConditionalGeneration"], "image_token_index": 10,
        "model_type": "llava",
        "text_config": {
            "head_dim": 128, "hidden_size": 5120, "max_position_embeddings": 1024000,
            "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 40,
            "num_key_value_heads": 8, "rope_theta": 1000000000.0},
        "vision_config": {
            "head_dim": 64, "hidden_size": 1024, "image_size": 1024, "model_type": "pixtral",
            "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 16,
            "rope_theta": 10000.0},
    }, "pixtral.PixtralVisionRotaryEmbedding", "PixtralAttention", GRID, sub="vision_config",
        part="vision", unsqueeze=0, layout="bhsd"),

    # --- what a parser gets wrong: absent keys, keys that lose, keys that do nothing --------
    small("yarn_truncate_false", TWO, max_position_embeddings=65536, rope_theta=10000.0,
          rope_scaling={"rope_type": "yarn", "factor": 16.0, "truncate": False,
                        "original_max_position_embeddings": 4096}),
    # The top level's original_max_position_embeddings wins over rope_scaling's.
    small("yarn_original_on_top", TWO, max_position_embeddings=65536, rope_theta=10000.0,
          original_max_position_embeddings=8192, rope_scaling={
              "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096}),
    # rope_scaling wins over rope_parameters, as a whole.
    small("rope_scaling_over_parameters", TWO, max_position_embeddings=8192,
          rope_parameters={"rope_type": "linear", "factor": 8.0, "rope_theta": 50000.0},
          rope_scaling={"rope_type": "linear", "factor": 2.0}),
    small("llama_theta_in_parameters", TWO, max_position_embeddings=8192, rope_theta=10000.0,
          rope_parameters={"rope_type": "default", "rope_theta": 50000.0}),
    # Nothing about rope at all: the family's default is yarn, not truncated.
    case("gpt_oss_absent", {
        "hidden_size": 2880, "max_position_embeddings": 131072, "model_type": "gpt_oss",
        "num_attention_heads": 64, "num_hidden_layers": 24, "num_key_value_heads": 8,
    }, "gpt_oss.GptOssRotaryEmbedding", "GptOssAttention", TWO),
    # The family's default rope parameters carry a theta, so a lone rope_theta loses.
    case("apertus_lone_theta", {
        "hidden_size": 2048, "max_position_embeddings": 65536, "model_type": "apertus",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rope_theta": 10000.0,
    }, "apertus.ApertusRotaryEmbedding", "ApertusAttention", TWO),
    # "type" does not replace the "rope_type" that is already there: no scaling.
    case("gemma3_text_type_ignored", {
        "head_dim": 64, "hidden_size": 512, "max_position_embeddings": 32768,
        "model_type": "gemma3_text", "num_attention_heads": 8, "num_hidden_layers": 12,
        "num_key_value_heads": 4, "query_pre_attn_scalar": 64,
        "rope_scaling": {"factor": 8.0, "type": "linear"},
    }, "gemma3.Gemma3RotaryEmbedding", "Gemma3Attention",
        calls={"full_attention": TWO, "sliding_attention": [511]}),
    # rope_theta reaches the full_attention layers alone, and a nested truncate none.
    case("olmo3_theta_and_truncate", {
        "hidden_size": 1024, "max_position_embeddings": 65536, "model_type": "olmo3",
        "num_attention_heads": 16, "num_hidden_layers": 8, "num_key_value_heads": 16,
        "rope_scaling": {
            "factor": 8.0, "original_max_position_embeddings": 8192, "rope_type": "yarn",
            "truncate": False},
        "rope_theta": 10000.0,
    }, "olmo3.Olmo3RotaryEmbedding", "Olmo3Attention",
        calls={"full_attention": TWO, "sliding_attention": [511]}),
    case("gpt_neox_absent", {
        "hidden_size": 1024, "max_position_embeddings": 2048, "model_type": "gpt_neox",
        "num_attention_heads": 16, "num_hidden_layers": 24, "partial_rotary_factor": 1.0,
        "rope_theta": 50000.0,
    }, "gpt_neox.GPTNeoXRotaryEmbedding", "GPTNeoXAttention", [7, 2047]),
    # Scaled types take the partial factor into their dimension.
    case("stablelm_linear", {
        "hidden_size": 2048, "max_position_embeddings": 16384, "model_type": "stablelm",
        "num_attention_heads": 32, "num_hidden_layers": 24, "num_key_value_heads": 32,
        "rope_scaling": {"factor": 4.0, "type": "linear"}, "rope_theta": 10000,
    }, "stablelm.StableLmRotaryEmbedding", "StableLmAttention", [7, 4095, 16383]),
    case("glm4_yarn", {
        "head_dim": 128, "hidden_size": 4096, "max_position_embeddings": 131072,
        "model_type": "glm4", "num_attention_heads": 32, "num_hidden_layers": 40,
        "num_key_value_heads": 2, "partial_rotary_factor": 0.5, "rope_scaling": {
            "factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
        "rope_theta": 10000.0,
    }, "glm4.Glm4RotaryEmbedding", "Glm4Attention", [7, 131071]),
    case("qwen3_5", {
        "model_type": "qwen3_5_text", "head_dim": 256, "hidden_size": 4096,
        "max_position_embeddings": 262144, "num_attention_heads": 16, "num_hidden_layers": 32,
        "num_key_value_heads": 4, "rope_parameters": {
            "mrope_interleaved": True, "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25, "rope_theta": 10000000, "rope_type": "default"},
    }, "qwen3_5.Qwen3_5TextRotaryEmbedding", "Qwen3_5Attention",
        [axis[2:5] for axis in MROPE], layer=3),
    case("deepseek_v3_half_split", {
        "hidden_size": 2048, "max_position_embeddings": 163840, "model_type": "deepseek_v3",
        "num_attention_heads": 16, "num_hidden_layers": 12, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "rope_interleave": False, "rope_theta": 10000,
    }, "deepseek_v3.DeepseekV3RotaryEmbedding", "DeepseekV3Attention", TWO, part="mla"),
    case("phi3_su", {
        "hidden_size": 2048, "max_position_embeddings": 65536, "model_type": "phi3",
        "num_attention_heads": 32, "num_hidden_layers": 24, "num_key_value_heads": 32,
        "original_max_position_embeddings": 4096, "rope_scaling": {
            "long_factor": [round(1.0 + 0.5 * i, 2) for i in range(32)],
            "original_max_position_embeddings": 4096,
            "short_factor": [round(1.0 + 0.02 * i, 2) for i in range(32)], "type": "su"},
        "rope_theta": 10000.0,
    }, "phi3.Phi3RotaryEmbedding", "Phi3Attention", calls={"short": [4095], "long": [100, 65535]}),

    # --- the rest -------------------------------------------------------------------------
    case("gpt_oss", {
        "architectures": ["GptOssForCausalLM"], "head_dim": 64, "hidden_size": 2880,
        "initial_context_length": 4096,
        "layer_types": layer_pattern(24, 2, "sliding_attention"),
        "max_position_embeddings": 131072, "model_type": "gpt_oss", "num_attention_heads": 64,
        "num_hidden_layers": 24, "num_key_value_heads": 8,
        "rope_scaling": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
            "original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": False},
        "rope_theta": 150000, "sliding_window": 128,
    }, "gpt_oss.GptOssRotaryEmbedding", "GptOssAttention", HALF),
    case("llama4", {
        "architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4",
        "text_config": {
            "attn_scale": 0.1, "attn_temperature_tuning": True, "floor_scale": 8192,
            "head_dim": 128, "hidden_size": 5120, "max_position_embeddings": 10485760,
            "model_type": "llama4_text", "no_rope_layers": [], "num_attention_heads": 40,
            "num_hidden_layers": 48, "num_key_value_heads": 8,
            "rope_scaling": {
                "factor": 16.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3"},
            "rope_theta": 500000.0, "use_qk_norm": True,
        },
    }, "llama4.Llama4TextRotaryEmbedding", "Llama4TextAttention", FULL, sub="text_config",
        apply="apply_rotary_emb", layout="bshd"),
    case("modernbert", {
        "architectures": ["ModernBertForMaskedLM"], "global_attn_every_n_layers": 3,
        "global_rope_theta": 160000.0, "hidden_size": 768, "local_attention": 128,
        "local_rope_theta": 10000.0, "max_position_embeddings": 8192,
        "model_type": "modernbert", "num_attention_heads": 12, "num_hidden_layers": 22,
        "position_embedding_type": "absolute",
    }, "modernbert.ModernBertRotaryEmbedding", "ModernBertAttention",
        calls={"full_attention": [0, 100, 8191], "sliding_attention": [0, 100, 8191]}),
    case("mimo_v2_flash", {
        "architectures": ["MiMoV2FlashForCausalLM"], "head_dim": 192, "hidden_size": 4096,
        "max_position_embeddings": 262144, "model_type": "mimo_v2_flash",
        "num_attention_heads": 64, "num_hidden_layers": 48, "num_key_value_heads": 4,
        "v_head_dim": 128,
    }, "mimo_v2_flash.MiMoV2FlashRotaryEmbedding", "MiMoV2FlashAttention",
        calls={"full_attention": [7, 262143], "sliding_attention": [7, 4095]}),
]
