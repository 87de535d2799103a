#!/usr/bin/env python3
"""Make tests/goldens/transformers-fused/*: what models do to q, k and v between projection and attention.

What
----
Each file is one call of a model family's own attention module in transformers. Its
projections are stand-ins that return drawn values (and add a drawn bias, where the
model has one), so that what comes out depends on no matrix product. Norms and
rotation are the module's own, with drawn weights.

    q, k, v         [tokens, heads, head_dim]: as projected, without the bias
    position_ids    i64 [tokens]
    q_attention     [tokens, heads, head_dim]: as the attention function gets it
    k_cache, v_cache  [tokens, heads, head_dim]: as the cache gets them
    q_bias, k_bias, v_bias          [heads, head_dim]
    q_norm.weight, k_norm.weight    [head_dim] or [heads, head_dim]
    q_norm.bias, k_norm.bias        [head_dim]

Where nothing is done to v, it is left out.

DeepSeek-V3 has in place of k and v, and of what is cached,

    latent          [tokens, 576]: 512 values, then the part of k that is rotated
    latent_cache [tokens, 512], k_pe_cache [tokens, 64], latent_norm.weight [512]

and its rotated pairs come out in halves.

Tensors are f32, f16 or bf16, as "dtype" in "case" says. "case" is JSON; it also has

    config          as phasor is to read it: that of the published model, with fewer
                    heads and layers
    layer           the layer's index, and layer_type where the model has several
    q_norm, k_norm, v_norm, latent_norm
                    kind (rms or layer), eps, weight_offset, across_heads,
                    round_before_weight (the type rounds before weights are applied) and
                    after_rotation. The module says eps; the rest is of its class.
    v_from_k        v is k's projection
    rotates         false where the layer has no rotation
    temperature     of q by position, on such layers: attn_scale and floor_scale

How to run
----------
    python -m venv venv && . venv/bin/activate
    pip install -r scripts/goldens/requirements-transformers.txt
    python scripts/goldens/transformers-fused.py            # write
    python scripts/goldens/transformers-fused.py --check    # recompute, compare the bytes

No weights and no model hub are used. Another kind of CPU may round a last bit of a sum,
cos or sin differently.
"""

import os

# Before torch and transformers are imported: no hub, and one thread.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import copy
import importlib
import sys
import warnings

import numpy as np
import torch
import transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# The shared file is beside this one; no cache folder is left there.
sys.dont_write_bytecode = True
from golden_files import golden, run, seeded

PEER = f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}"
SHORT = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
ALL = (torch.float32, torch.float16, torch.bfloat16)
TWO = (torch.float32, torch.bfloat16)

# What a class does beside its eps and the shape of its weights.
NORMS = {
    "Qwen3RMSNorm": {"round_before_weight": True},
    "Gemma3RMSNorm": {"weight_offset": 1.0},
    "Gemma4RMSNorm": {},
    "Olmo2RMSNorm": {},
    "CohereLayerNorm": {"kind": "layer"},
    "StableLmLayerNormPerHead": {"kind": "layer"},
    "LayerNorm": {"kind": "layer"},
    "Llama4TextL2Norm": {"after_rotation": True},
    "Glm4MoeRMSNorm": {"round_before_weight": True},
    "HunYuanDenseV1RMSNorm": {"round_before_weight": True, "after_rotation": True},
    "MiniMaxM2RMSNorm": {"round_before_weight": True},
    "DeepseekV3RMSNorm": {"round_before_weight": True},
}


def case(family, prefix, config, *, dtypes=TWO, positions=(0, 3, 100), layer=0, layer_type=None,
         sub=None, past=None):
    """The classes are those of the family's module whose names begin with `prefix`."""
    return {
        "family": family, "prefix": prefix, "config": config, "dtypes": dtypes,
        "positions": positions, "layer": layer, "layer_type": layer_type, "sub": sub, "past": past,
    }


LLAMA4 = {
    "model_type": "llama4",
    "text_config": {
        "attn_scale": 0.1, "attn_temperature_tuning": True, "floor_scale": 8192, "head_dim": 128,
        "hidden_size": 128, "max_position_embeddings": 10485760, "model_type": "llama4_text",
        "no_rope_layers": [1, 1, 1, 0], "num_attention_heads": 2, "num_hidden_layers": 4,
        "num_key_value_heads": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 16.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0, "use_qk_norm": True,
    },
}
GEMMA4 = {
    "model_type": "gemma4",
    "text_config": {
        "attention_k_eq_v": True, "global_head_dim": 512, "head_dim": 256, "hidden_size": 256,
        "layer_types": ["sliding_attention", "full_attention"],
        "max_position_embeddings": 262144, "model_type": "gemma4_text", "num_attention_heads": 1,
        "num_global_key_value_heads": 1, "num_hidden_layers": 2, "num_key_value_heads": 1,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "full_attention": {
                "partial_rotary_factor": 0.25, "rope_theta": 1000000.0,
                "rope_type": "proportional"},
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "sliding_window": 1024,
    },
}
STABLELM = {
    "layer_norm_eps": 1e-05, "max_position_embeddings": 4096, "model_type": "stablelm",
    "num_hidden_layers": 2, "partial_rotary_factor": 0.25, "qk_layernorm": True,
    "rope_theta": 10000, "use_qkv_bias": False,
}

CASES = {
    "qwen3": case("qwen3", "Qwen3", {
        "attention_bias": False, "head_dim": 128, "hidden_size": 256,
        "max_position_embeddings": 40960, "model_type": "qwen3", "num_attention_heads": 2,
        "num_hidden_layers": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 1000000,
    }, dtypes=ALL),
    "gemma3": case("gemma3", "Gemma3", {
        "head_dim": 256, "hidden_size": 256, "max_position_embeddings": 32768,
        "model_type": "gemma3_text", "num_attention_heads": 2, "num_hidden_layers": 6,
        "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": 512, "sliding_window_pattern": 6,
    }, layer_type="sliding_attention", positions=(3, 100), dtypes=ALL),
    "gemma4_sliding": case(
        "gemma4", "Gemma4Text", GEMMA4, layer_type="sliding_attention", sub="text_config"),
    "gemma4_full": case(
        "gemma4", "Gemma4Text", GEMMA4, layer=1, layer_type="full_attention", sub="text_config",
        positions=(100,)),
    "olmo2": case("olmo2", "Olmo2", {
        "hidden_size": 384, "max_position_embeddings": 4096, "model_type": "olmo2",
        "num_attention_heads": 3, "num_hidden_layers": 2, "num_key_value_heads": 3,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 500000,
    }, positions=(3, 100)),
    # Command R has no norm, Command R+ has one.
    "cohere_plus": case("cohere", "Cohere", {
        "hidden_size": 384, "layer_norm_eps": 1e-05, "logit_scale": 0.8333333333333334,
        "max_position_embeddings": 8192, "model_type": "cohere", "num_attention_heads": 3,
        "num_hidden_layers": 2, "num_key_value_heads": 1, "rope_theta": 75000000.0,
        "use_qk_norm": True,
    }, positions=(3, 100)),
    # The heads of the 12B.
    "stablelm": case("stablelm", "StableLm", STABLELM | {
        "hidden_size": 480, "num_attention_heads": 3, "num_key_value_heads": 1,
    }, positions=(3, 100)),
    # No published model has heads of 80, as the 3B has, with a norm and a bias.
    "stablelm_bias": case("stablelm", "StableLm", STABLELM | {
        "hidden_size": 240, "num_attention_heads": 3, "num_key_value_heads": 1,
        "use_qkv_bias": True,
    }),
    # The class can; the published models have no norm.
    "phi": case("phi", "Phi", {
        "hidden_size": 128, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048,
        "model_type": "phi", "num_attention_heads": 2, "num_hidden_layers": 2,
        "num_key_value_heads": 2, "partial_rotary_factor": 0.5, "qk_layernorm": True,
        "rope_scaling": None, "rope_theta": 10000.0,
    }),
    "llama4": case("llama4", "Llama4Text", LLAMA4, sub="text_config", dtypes=ALL),
    # Tokens before and after the first step of the temperature, and far beyond.
    "llama4_temperature": case(
        "llama4", "Llama4Text", LLAMA4, sub="text_config", layer=3, past=8190, dtypes=ALL,
        positions=(8190, 8191, 8192)),
    "llama4_temperature_far": case(
        "llama4", "Llama4Text", LLAMA4, sub="text_config", layer=3, past=10485757,
        positions=(10485757, 10485758)),
    "glm4_moe": case("glm4_moe", "Glm4Moe", {
        "attention_bias": True, "head_dim": 128, "hidden_size": 256,
        "max_position_embeddings": 131072, "model_type": "glm4_moe", "num_attention_heads": 2,
        "num_hidden_layers": 2, "num_key_value_heads": 1, "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000000, "use_qk_norm": True,
    }),
    "hunyuan_v1_dense": case("hunyuan_v1_dense", "HunYuanDenseV1", {
        "attention_head_dim": 128, "head_dim": 128, "hidden_size": 256,
        "max_position_embeddings": 262144, "model_type": "hunyuan_v1_dense",
        "num_attention_heads": 2, "num_hidden_layers": 2, "num_key_value_heads": 1,
        "rms_norm_eps": 1e-05, "rope_scaling": {
            "alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0,
            "mscale_all_dim": 1.0, "type": "dynamic"},
        "rope_theta": 10000.0, "use_qk_norm": True,
    }),
    "minimax_m2": case("minimax_m2", "MiniMaxM2", {
        "head_dim": 128, "hidden_size": 256, "max_position_embeddings": 196608,
        "model_type": "minimax_m2", "num_attention_heads": 4, "num_hidden_layers": 2,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 5000000, "rotary_dim": 64,
        "use_qk_norm": True,
    }, positions=(3, 100)),
    "deepseek_v3": case("deepseek_v3", "DeepseekV3", {
        "hidden_size": 256, "kv_lora_rank": 512, "max_position_embeddings": 163840,
        "model_type": "deepseek_v3", "num_attention_heads": 2, "num_hidden_layers": 2,
        "num_key_value_heads": 2, "q_lora_rank": None, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096, "type": "yarn"},
        "rope_theta": 10000, "v_head_dim": 128,
    }, positions=(3, 100)),
}


class Projection(torch.nn.Module):
    """A projection whose products are known; the bias is added in their type."""

    def __init__(self, products, bias):
        super().__init__()
        self.products, self.bias = products, bias

    def forward(self, _hidden_states):
        return self.products if self.bias is None else self.products + self.bias


class RecordingCache:
    """Stands where a cache does, and keeps what it is given."""

    def __init__(self, past):
        self.past = past

    def get_seq_length(self, _layer):
        return self.past

    def update(self, k, v, _layer):
        self.k, self.v = k, v
        return k, v


def array(tensor):
    tensor = tensor.detach().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


class Golden:
    def __init__(self, name, chosen, dtype):
        self.random = seeded(name)
        self.dtype = dtype
        self.tensors = {}
        self.case = {
            "dtype": SHORT[dtype], "config": chosen["config"], "layer": chosen["layer"],
            "layer_type": chosen["layer_type"],
        }
        self.compute(chosen)

    def draw(self, *shape):
        return torch.from_numpy(self.random.standard_normal(shape, np.float32))

    def project(self, attention, projection, stream, heads, head_dim, tokens):
        """Puts a stand-in for the projection, and keeps what it returns."""
        size = torch.exp(self.draw(tokens, heads, 1))
        products = (self.draw(tokens, heads, head_dim) * size).to(self.dtype)
        self.tensors[stream] = array(products)
        bias = None
        if getattr(attention, projection).bias is not None:
            bias = self.draw(heads, head_dim).to(self.dtype)
            self.tensors[f"{stream}_bias"] = array(bias)
            bias = bias.reshape(-1)
        setattr(attention, projection, Projection(products.reshape(1, tokens, -1), bias))

    def norm(self, attention, module, stream, head_dim):
        """Draws the norm's weights, and says which norm it is."""
        norm = getattr(attention, module, None)
        if norm is None:
            return
        known = NORMS[type(norm).__name__]
        weights = []
        for name, parameter in norm.named_parameters():
            drawn = 0.3 * self.draw(*parameter.shape)
            if name == "bias":
                self.tensors[f"{stream}_norm.bias"] = array(drawn.to(self.dtype))
            else:
                weights.append(parameter)
                drawn = drawn if known.get("weight_offset") else torch.exp(drawn)
            parameter.data = drawn.to(self.dtype)
        inner = norm.norms[0] if hasattr(norm, "norms") else norm
        eps = inner.eps if hasattr(inner, "eps") else inner.variance_epsilon
        across = bool(weights) and weights[0].ndim == 1 and weights[0].numel() > head_dim
        self.case[f"{stream}_norm"] = {
            "kind": "rms", "eps": eps, "weight_offset": 0.0, "across_heads": across,
            "round_before_weight": False, "after_rotation": False,
        } | known
        if weights:
            whole = torch.cat([weight.reshape(-1) for weight in weights])
            whole = whole.reshape(-1, head_dim) if whole.numel() > head_dim else whole
            self.tensors[f"{stream}_norm.weight"] = array(whole)

    def compute(self, chosen):
        # A copy: the classes change what they are given.
        values = copy.deepcopy(chosen["config"])
        config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
        config = getattr(config, chosen["sub"]) if chosen["sub"] else config
        ALL_ATTENTION_FUNCTIONS.register("record", self.attend)
        config._attn_implementation = "record"
        module = importlib.import_module(
            f"transformers.models.{chosen['family']}.modeling_{chosen['family']}")
        prefix = chosen["prefix"]
        attention = getattr(module, f"{prefix}Attention")(config, chosen["layer"]).to(self.dtype)
        positions = torch.tensor([chosen["positions"]])
        tokens = positions.shape[1]
        self.tensors["position_ids"] = positions[0].numpy()

        latent = hasattr(attention, "kv_lora_rank")
        head_dim = attention.qk_head_dim if latent else attention.head_dim
        heads = config.num_attention_heads
        self.project(attention, "q_proj", "q", heads, head_dim, tokens)
        self.case["rotates"] = bool(getattr(attention, "use_rope", True))
        self.case["v_from_k"] = not latent and attention.v_proj is None
        if latent:
            width = attention.kv_lora_rank + attention.qk_rope_head_dim
            self.project(attention, "kv_a_proj_with_mqa", "latent", 1, width, tokens)
            self.tensors["latent"] = self.tensors["latent"].reshape(tokens, width)
            self.norm(attention, "kv_a_layernorm", "latent", attention.kv_lora_rank)
        else:
            kv_heads = heads // attention.num_key_value_groups
            for stream in "kv"[: 1 if self.case["v_from_k"] else 2]:
                self.project(attention, f"{stream}_proj", stream, kv_heads, head_dim, tokens)
            for stream in "qkv":
                for form in ("{}_norm", "{}_layernorm"):
                    self.norm(attention, form.format(stream), stream, head_dim)
            for stream, name in (("q", "query"), ("k", "key")):
                self.norm(attention, f"{name}_layernorm", stream, head_dim)
                # One module without weights, for both.
                self.norm(attention, "qk_norm", stream, head_dim)
        if not self.case["rotates"]:
            self.case["temperature"] = {
                "attn_scale": attention.attn_scale, "floor_scale": attention.floor_scale}

        rotary = getattr(module, f"{prefix}RotaryEmbedding")(config)
        hidden = torch.zeros(1, tokens, config.hidden_size, dtype=self.dtype)
        layered = isinstance(getattr(rotary, "rope_type", None), dict)
        named = {"layer_type": chosen["layer_type"]} if layered else {}
        table = rotary(hidden, positions, **named)

        cache = RecordingCache(chosen["past"] or 0)
        more = {"shared_kv_states": {}} if chosen["family"] == "gemma4" else {}
        attention(hidden, position_embeddings=table, attention_mask=None, past_key_values=cache,
                  **more)
        for name, cached in (("k", cache.k), ("v", cache.v)):
            cached = array(cached[0].transpose(0, 1))
            if latent:
                # The cache's k is the latent part, its v the rotated one.
                name = {"k": "latent", "v": "k_pe"}[name]
                cached = cached.reshape(tokens, -1)
            self.tensors[f"{name}_cache"] = cached
        given = self.tensors.get("v")
        if given is not None and np.array_equal(given, self.tensors["v_cache"]):
            del self.tensors["v"], self.tensors["v_cache"]

    def attend(self, _module, query, _key, value, *_arguments, **_named):
        self.tensors["q_attention"] = array(query[0].transpose(0, 1))
        heads, tokens = query.shape[1:3]
        return torch.zeros(1, tokens, heads, value.shape[-1], dtype=query.dtype), None


def compute():
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    warnings.simplefilter("ignore")
    files = {}
    for name, chosen in CASES.items():
        for dtype in chosen["dtypes"]:
            made = Golden(name, chosen, dtype)
            files[f"{name}_{SHORT[dtype]}.safetensors"] = golden(
                name, made.tensors, peer=PEER, case=made.case, made_by="transformers-fused.py")
    return files


if __name__ == "__main__":
    run("Make transformers' goldens of the fused step; see the top of this file.",
        "transformers-fused", "", compute)
