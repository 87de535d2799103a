#!/usr/bin/env python3
"""Make tests/goldens/interfaces/hf_*: the bits of transformers' tables and rotations.

What
----
Each file is one call of a family's RotaryEmbedding and of its apply function:

    position_ids          i64 [batch, tokens]
    inv_freq              [pairs], as the module holds it
    cos, sin              [batch, tokens, width] of the model's type, as returned; or
    freqs_cis             [batch, tokens, pairs, 2]  f32, the complex table's real and
                          imaginary parts
    q, k                  [batch, heads, tokens, head_dim], or [batch, tokens, heads,
                          head_dim] where "layout" is "bshd"
    q_rotated, k_rotated  like them
    q_cotangent, k_cotangent, q_gradient, k_gradient
                          like them, where the case asks for the gradient: autograd
                          through the apply function

"case" is JSON: the config, the functions' names, the model's type, and whether the
module went through .to(type) after it was made, which rounds its inv_freq (a model
that is loaded in a type keeps it in f32). "special" lists what replaces drawn values
of q's first head: token, channel and value.

How to run
----------
    python -m venv venv && . venv/bin/activate
    pip install -r scripts/goldens/requirements-transformers.txt
    python scripts/goldens/interfaces-hf.py            # write
    python scripts/goldens/interfaces-hf.py --check    # recompute, compare the bytes

Another kind of CPU may round a last bit differently.
"""

import os

# Before torch and transformers are imported: no hub, and one thread.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import importlib
import sys

import numpy as np
import torch
import transformers

# The shared file is beside this one; no cache folder is left there.
sys.dont_write_bytecode = True
from golden_files import golden, run, seeded

PEER = (
    f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]} (CPU)"
)
TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# Of each family: the class of the table, the apply function, and the layout.
FAMILIES = {
    "llama": ("LlamaRotaryEmbedding", "apply_rotary_pos_emb", "bhsd"),
    "glm": ("GlmRotaryEmbedding", "apply_rotary_pos_emb", "bhsd"),
    "cohere": ("CohereRotaryEmbedding", "apply_rotary_pos_emb", "bhsd"),
    "olmo": ("OlmoRotaryEmbedding", "apply_rotary_pos_emb", "bhsd"),
    "deepseek_v3": ("DeepseekV3RotaryEmbedding", "apply_rotary_pos_emb_interleave", "bhsd"),
    "deepseek_v2": ("DeepseekV2RotaryEmbedding", "apply_rotary_emb", "bhsd"),
    "llama4_text": ("Llama4TextRotaryEmbedding", "apply_rotary_emb", "bshd"),
}
SPECIAL = [(0, 3, "nan"), (0, 6, "inf"), (1, 9, "-inf"), (1, 12, "nan"), (2, 15, "inf")]


def call(family, dtype, *, layout=None, position_ids=((0, 1, 7), (100, 4095, 100000)),
         cast_module=False, gradient=False, special=(), **config):
    table, apply, usual = FAMILIES[family]
    head = {"qk_rope_head_dim": 16} if family.startswith("deepseek") else {"head_dim": 16}
    return {
        "config": {
            "model_type": family, "hidden_size": 32, "num_attention_heads": 2,
            "num_key_value_heads": 1, "max_position_embeddings": 131072,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        } | head | config,
        "table": table,
        "apply": apply,
        "layout": layout or usual,
        "dtype": dtype,
        "position_ids": position_ids,
        "cast_module": cast_module,
        "gradient": gradient,
        "special": special,
    }


def cases():
    llama3 = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }
    yarn = {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 32.0,
        "original_max_position_embeddings": 4096,
    }
    partial = {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5
    }
    at_the_start = ((0, 1, 2),)
    return {
        **{f"llama_{dtype}": call("llama", dtype, gradient=True) for dtype in TYPES},
        "llama_bf16_module_cast": call("llama", "bf16", cast_module=True),
        "llama_f16_module_cast": call("llama", "f16", cast_module=True),
        "llama_bf16_bshd": call("llama", "bf16", layout="bshd"),
        # A magnitude is multiplied into the table in f32, before it is cast.
        "llama_yarn_bf16": call("llama", "bf16", rope_parameters=yarn),
        "llama_yarn_f16": call("llama", "f16", rope_parameters=yarn),
        "llama_llama3_bf16": call("llama", "bf16", rope_parameters=llama3),
        "llama_special": call("llama", "f32", position_ids=at_the_start, special=SPECIAL),
        "llama_no_tokens": call("llama", "f32", position_ids=((), ())),
        "glm_partial_bf16": call("glm", "bf16", rope_parameters=partial),
        "cohere_bf16": call("cohere", "bf16"),
        "olmo_bf16": call("olmo", "bf16"),
        **{
            f"deepseek_v3_interleave_{dtype}": call("deepseek_v3", dtype, gradient=True)
            for dtype in TYPES
        },
        **{
            f"complex_{family}_{dtype}": call(family, dtype, gradient=dtype == "bf16")
            for family in ("deepseek_v2", "llama4_text")
            for dtype in TYPES
        },
        "complex_deepseek_v2_yarn": call("deepseek_v2", "f32", rope_parameters=yarn),
        "complex_special": call(
            "deepseek_v2", "f32", position_ids=at_the_start, special=SPECIAL
        ),
    }


def draw(random, shape, dtype):
    return torch.from_numpy(random.standard_normal(shape).astype(np.float32)).to(dtype)


def to_numpy(tensor):
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def make(name, case):
    random, dtype = seeded(name), TYPES[case["dtype"]]
    values = dict(case["config"])
    family = values.pop("model_type")
    config = transformers.AutoConfig.for_model(family, **values)
    folder = family.removesuffix("_text")
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    apply = getattr(module, case["apply"])

    rotary = getattr(module, case["table"])(config)
    if case["cast_module"]:
        rotary = rotary.to(dtype)
    batch, tokens = np.shape(case["position_ids"])
    position_ids = torch.tensor(case["position_ids"], dtype=torch.int64)
    tensors = {"position_ids": position_ids, "inv_freq": rotary.inv_freq}
    # It takes its type from x.
    table = rotary(torch.zeros(batch, tokens, 1, dtype=dtype), position_ids)
    if isinstance(table, tuple):
        tensors |= {"cos": table[0], "sin": table[1]}
    else:
        tensors["freqs_cis"] = torch.view_as_real(table)
        table = (table,)
    arguments = {"unsqueeze_dim": 2} if case["layout"] == "bshd" and len(table) == 2 else {}

    for key, heads in (("q", 2), ("k", 1)):
        x = draw(random, (batch, heads, tokens, 16), dtype)
        if key == "q":
            for token, channel, value in case["special"]:
                x[0, 0, token, channel] = float(value)
        tensors[key] = x.transpose(1, 2).contiguous() if case["layout"] == "bshd" else x
    q, k = (tensors[key].clone().requires_grad_(case["gradient"]) for key in "qk")
    rotated = apply(q, k, *table, **arguments)
    for key, x, made in zip("qk", (q, k), rotated):
        tensors[f"{key}_rotated"] = made.detach()
        if case["gradient"]:
            cotangent = draw(random, tuple(made.shape), dtype)
            tensors[f"{key}_cotangent"] = cotangent
            tensors[f"{key}_gradient"], = torch.autograd.grad(made, x, cotangent)
    return {key: to_numpy(tensor.contiguous()) for key, tensor in tensors.items()}


def compute():
    torch.set_num_threads(1)
    return {
        f"hf_{name}.safetensors": golden(
            name, make(name, case), peer=PEER, case=case, made_by="interfaces-hf.py"
        )
        for name, case in cases().items()
    }


if __name__ == "__main__":
    run("Make transformers' interface goldens; see the top of this file.", "interfaces", "hf_",
        compute)
