#!/usr/bin/env python3
"""Make tests/goldens/interfaces/vllm_*: vLLM's rotary embedding, its formula run in torch.

What
----
vLLM itself is not installed: below is the arithmetic of version 0.33.0's
RotaryEmbedding.forward_native (rotary_embedding/base.py) and of the ApplyRotaryEmb
behind it, with the same operations in the same order and types. Each file:

    positions           i64 [tokens]
    cos_sin_cache       [max_position, rotary_dim] of the cache's type, cosines first;
                        with "cache_rows" "positions" only those rows, [tokens, ...]
    query, key          [tokens, heads * head_size], [tokens, kv_heads * head_size]
    query_rotated, key_rotated
                        like them: every operation rounds to their type
    query_rotated_f32, key_rotated_f32
                        like them, in 16-bit types: f32 inside and one rounding at
                        the end, which is enable_fp32_compute's way and the CUDA
                        kernel's

"case" is JSON with the arguments under vLLM's names. vllm_refused.json lists what
the operations refuse, with torch's messages.

How to run
----------
    python -m venv venv && . venv/bin/activate
    pip install -r scripts/goldens/requirements-transformers.txt
    python scripts/goldens/interfaces-vllm.py            # write
    python scripts/goldens/interfaces-vllm.py --check    # recompute, compare the bytes

Another kind of CPU may round a last bit differently.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import sys

import numpy as np
import torch

# The shared file is beside this one; no cache folder is left there.
sys.dont_write_bytecode = True
from golden_files import golden, listing, run, seeded

PEER = f"the formula of vLLM 0.33.0 in torch {torch.__version__.split('+')[0]} (CPU)"
TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def call(dtype, *, is_neox_style=True, head_size=32, rotary_dim=None, max_position=16,
         base=10000.0, positions=(0, 1, 7, 15, 7), cache_dtype=None, special=()):
    return {
        "head_size": head_size,
        "rotary_dim": head_size if rotary_dim is None else rotary_dim,
        "max_position": max_position,
        "cache_rows": "all" if max_position <= 64 else "positions",
        "base": base,
        "is_neox_style": is_neox_style,
        "dtype": dtype,
        "cache_dtype": cache_dtype or dtype,
        "positions": positions,
        "num_heads": 2,
        "num_kv_heads": 1,
        "special": special,
    }


def cases():
    made = {}
    for style, neox in (("neox", True), ("gptj", False)):
        for dtype in TYPES:
            made[f"{style}_{dtype}"] = call(dtype, is_neox_style=neox)
        for dtype in ("f32", "bf16"):
            made[f"{style}_partial_{dtype}"] = call(dtype, is_neox_style=neox, rotary_dim=12)
    special = [(0, 3, "nan"), (0, 6, "inf"), (1, 9, "-inf"), (1, 20, "nan"), (2, 31, "inf")]
    far = {"max_position": 131072, "base": 500000.0, "positions": (0, 4095, 131071)}
    return made | {
        "long_f32": call("f32", **far),
        "long_bf16": call("bf16", **far),
        # A cache that stays f32, for which the native way has no other rule than to
        # cast it to the query's type.
        "f32_cache_bf16": call("bf16", cache_dtype="f32"),
        "special_neox_f32": call("f32", special=special),
        "special_gptj_f32": call("f32", special=special, is_neox_style=False),
        "no_tokens": call("f32", positions=()),
    }


def trials():
    return {
        "position_beyond_the_cache": call("f32", positions=(0, 16)),
        "position_negative": call("f32", positions=(-1, 0)),
        "rotary_dim_odd": call("f32", rotary_dim=11),
        "rotary_dim_above_head_size": call("f32", rotary_dim=34),
    }


def cache(case):
    """The rows of the table, in f32 until the last step."""
    steps = torch.arange(0, case["rotary_dim"], 2, dtype=torch.float32)
    inv_freq = 1.0 / case["base"] ** (steps / case["rotary_dim"])
    rows = torch.arange(case["max_position"], dtype=torch.float32)
    angles = torch.einsum("i,j->ij", rows, inv_freq)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(TYPES[case["cache_dtype"]])


def rotate(case, x, cos_sin, in_f32=False):
    """`x` [tokens, heads * head_size] by the rows cos_sin [tokens, rotary_dim]."""
    width, dtype = case["rotary_dim"], torch.float32 if in_f32 else x.dtype
    heads = x.view(x.shape[0], x.shape[1] // case["head_size"], case["head_size"])
    turned, rest = heads[..., :width].to(dtype), heads[..., width:]
    cos, sin = (part[:, None].to(x.dtype).to(dtype) for part in cos_sin.chunk(2, dim=-1))
    if case["is_neox_style"]:
        a, b = turned.chunk(2, dim=-1)
    else:
        a, b = turned[..., ::2], turned[..., 1::2]
    pair = (a * cos - b * sin, b * cos + a * sin)
    if case["is_neox_style"]:
        turned = torch.cat(pair, dim=-1)
    else:
        turned = torch.stack(pair, dim=-1).flatten(-2)
    return torch.cat((turned.to(x.dtype), rest), dim=-1).reshape(x.shape)


def to_numpy(tensor):
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def make(name, case):
    random, dtype = seeded(name), TYPES[case["dtype"]]
    positions = torch.tensor(case["positions"], dtype=torch.int64)
    table = cache(case)
    rows = table.index_select(0, positions)
    tensors = {
        "positions": positions,
        "cos_sin_cache": table if case["cache_rows"] == "all" else rows,
    }
    for key, heads in (("query", case["num_heads"]), ("key", case["num_kv_heads"])):
        drawn = random.standard_normal((len(positions), heads * case["head_size"]))
        for token, channel, value in case["special"]:
            drawn[token, channel] = float(value)
        x = torch.from_numpy(drawn.astype(np.float32)).to(dtype)
        tensors[key] = x
        tensors[f"{key}_rotated"] = rotate(case, x, rows)
        if dtype != torch.float32:
            tensors[f"{key}_rotated_f32"] = rotate(case, x, rows, in_f32=True)
    return {key: to_numpy(tensor) for key, tensor in tensors.items()}


def compute():
    torch.set_num_threads(1)
    files = {
        f"vllm_{name}.safetensors": golden(
            name, make(name, case), peer=PEER, case=case, made_by="interfaces-vllm.py"
        )
        for name, case in cases().items()
    }
    refused = []
    for name, case in trials().items():
        try:
            make(name, case)
            sys.exit(f"error: {name} was taken")
        except Exception as error:
            message = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        refused.append({"name": name, "peer": PEER} | case | {"message": message})
    files["vllm_refused.json"] = listing(refused)
    return files


if __name__ == "__main__":
    run("Make vLLM's interface goldens; see the top of this file.", "interfaces", "vllm_",
        compute)
