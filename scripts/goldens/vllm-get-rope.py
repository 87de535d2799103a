#!/usr/bin/env python3
"""Make tests/goldens/vllm/*: what vLLM's own get_rope makes of parameter dictionaries.

What
----
Each file is one call of get_rope and one forward pass of what it returns, by vLLM's
native code in f32:

    positions       i64 [tokens], or [3, tokens] (time, height, width)
    query, key      f32 [tokens, heads * head_size], [tokens, kv_heads * head_size]
    query_rotated, key_rotated
                    like them

"case" is JSON with the arguments under vLLM's names; "rows" is the number of positions
in the cache (of the long one where the long factors of longrope are used), and
"max_model_len" that of vLLM's engine, which longrope asks for. refused.json lists
dictionaries that vLLM does not take, with what it says.

Of vLLM only the Python files of rotary_embedding run; what they import beside torch is
replaced below by as little as they need on a CPU.

How to run
----------
    python -m venv venv && . venv/bin/activate
    pip install -r scripts/goldens/requirements-transformers.txt
    pip install --no-deps -r scripts/goldens/requirements-vllm.txt
    python scripts/goldens/vllm-get-rope.py            # write
    python scripts/goldens/vllm-get-rope.py --check    # recompute, compare the bytes

Another kind of CPU may round a last bit differently.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import sys
import types
from importlib.metadata import distribution
from unittest.mock import MagicMock

import numpy as np
import torch

# The shared file is beside this one; no cache folder is left there.
sys.dont_write_bytecode = True
from golden_files import golden, listing, run, seeded

VLLM = distribution("vllm")
PEER = f"vLLM {VLLM.version}, native, in torch {torch.__version__.split('+')[0]} (CPU)"
HEADS, KV_HEADS = 2, 1


class CustomOp(torch.nn.Module):
    @classmethod
    def register(cls, name):
        return lambda registered: registered

    @classmethod
    def enabled(cls):
        return False

    def __init__(self, enforce_enable=False):
        super().__init__()


def vllm_rotary_embedding(max_model_len):
    """The package, without running what the packages around it do when they are imported."""
    root = VLLM.locate_file("vllm")
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        del sys.modules[name]
    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.layers"):
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    for name in ("vllm._aiter_ops", "vllm.config", "vllm.logger", "vllm.platforms", "vllm.triton_utils",
                 "vllm.utils", "vllm.utils.flashinfer", "vllm.utils.torch_utils",
                 "vllm.model_executor.custom_op", "vllm.distributed"):
        sys.modules[name] = MagicMock()
    sys.modules["vllm.model_executor.custom_op"].CustomOp = CustomOp
    sys.modules["vllm.triton_utils"].triton.jit = lambda function: function
    platform = sys.modules["vllm.platforms"].current_platform
    platform.is_cuda.return_value = False
    platform.is_cpu.return_value = True
    current = sys.modules["vllm.config"].get_current_vllm_config
    current.return_value.model_config.max_model_len = max_model_len
    from vllm.model_executor.layers import rotary_embedding

    return rotary_embedding


def call(head_size=32, max_position=4096, is_neox_style=True, positions=(0, 1, 7, 100, 4095),
         max_model_len=None, **rope_parameters):
    return {
        "head_size": head_size,
        "max_position": max_position,
        "is_neox_style": is_neox_style,
        "rope_parameters": rope_parameters,
        "positions": positions,
        "max_model_len": max_position if max_model_len is None else max_model_len,
    }


AXES = ((0, 1, 7, 100, 4095), (0, 3, 5, 61, 2047), (0, 2, 11, 37, 1023))
SHORT = [1.0, 1.0, 1.05, 1.1, 1.2, 1.4, 1.7, 2.0, 2.2, 2.4, 2.5, 2.6, 2.7, 2.75, 2.8, 2.8]
LONG = [1.08, 1.1, 1.3, 1.9, 3.0, 5.5, 9.0, 14.0, 21.0, 28.0, 36.0, 44.0, 51.0, 57.0, 62.0, 64.8]


def cases():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    deepseek = {
        "rope_type": "deepseek_yarn", "factor": 40.0, "original_max_position_embeddings": 4096,
        "beta_fast": 32, "beta_slow": 1,
    }
    longrope = {
        "rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG,
        "original_max_position_embeddings": 1024,
    }
    return {
        "nothing": call(),
        "default": call(rope_type="default", rope_theta=500000.0),
        "default_gptj": call(is_neox_style=False, rope_theta=1e6),
        "partial": call(head_size=80, partial_rotary_factor=0.4, rope_theta=10000),
        "partial_odd": call(head_size=30, partial_rotary_factor=0.75, positions=(0, 5, 63)),
        "rope_dim": call(head_size=64, rope_dim=16, partial_rotary_factor=0.9),
        "linear": call(rope_type="linear", factor=2.5, max_position=1639),
        "llama3": call(
            rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0,
            high_freq_factor=4.0, original_max_position_embeddings=8192,
        ),
        "dynamic_alpha": call(rope_type="dynamic", alpha=1000.0, factor=1.0),
        "dynamic_as_trained": call(rope_type="dynamic", factor=2.0),
        "dynamic": call(rope_type="dynamic", factor=2.0, max_trained_positions=1024),
        "proportional": call(
            head_size=64, rope_type="proportional", partial_rotary_factor=0.25, rope_theta=1e6
        ),
        "yarn": call(**yarn),
        "yarn_gptj": call(is_neox_style=False, **yarn),
        "yarn_attention_factor": call(**yarn, attention_factor=1.25, mscale=1.0, mscale_all_dim=0.5),
        "yarn_mscales": call(**yarn, mscale=1.0, mscale_all_dim=0.707),
        "yarn_one_mscale": call(**yarn, mscale=2.0, mscale_all_dim=0),
        "yarn_betas_untruncated": call(**yarn, beta_fast=16, beta_slow=2, truncate=False),
        "deepseek_yarn": call(64, is_neox_style=False, mscale=1.0, mscale_all_dim=1.0, **deepseek),
        "deepseek_yarn_v2": call(64, is_neox_style=False, mscale=0.707, mscale_all_dim=0.5, **deepseek),
        "deepseek_yarn_defaults": call(64, **deepseek),
        "deepseek_llama_scaling": call(64, **deepseek | {"rope_type": "deepseek_llama_scaling"}),
        "deepseek_v4": call(
            64, is_neox_style=False, rope_dim=32, is_deepseek_v4=True, **deepseek | {"factor": 16.0}
        ),
        "longrope_short": call(**longrope, positions=(0, 1, 7, 1023), max_model_len=1024),
        "longrope_long": call(**longrope),
        "longrope_mscales": call(**longrope, short_mscale=1.1, long_mscale=1.3),
        "longrope_not_longer": call(**longrope, max_position=1024, positions=(0, 1, 7, 1023)),
        "mrope": call(mrope_section=[4, 6, 6], positions=AXES, rope_theta=1e6),
        "mrope_of_text": call(mrope_section=[4, 6, 6], rope_theta=1e6, positions=(0, 1, 16383)),
        "mrope_interleaved": call(
            mrope_section=[6, 5, 5], mrope_interleaved=True, positions=AXES, rope_theta=5e6
        ),
        "mrope_interleaved_partial": call(
            head_size=64, partial_rotary_factor=0.25, mrope_section=[3, 3, 2],
            mrope_interleaved=True, positions=AXES,
        ),
        # The cache is four times as long, and so is the length that places the ramp.
        "mrope_yarn": call(mrope_section=[4, 6, 6], positions=AXES, **yarn),
    }


def trials():
    return {
        "unknown_type": call(rope_type="su"),
        "partial_of_0": call(partial_rotary_factor=0.0),
        "partial_above_1": call(partial_rotary_factor=1.5),
        "dynamic_without_factor": call(rope_type="dynamic"),
        "linear_without_factor": call(rope_type="linear"),
        "yarn_without_original": call(rope_type="yarn", factor=4.0),
        "llama3_without_low": call(rope_type="llama3", factor=4.0),
        "longrope_without_long": call(
            rope_type="longrope", short_factor=SHORT, original_max_position_embeddings=1024
        ),
        "longrope_gptj": call(
            rope_type="longrope", short_factor=SHORT, long_factor=LONG, is_neox_style=False,
            original_max_position_embeddings=1024,
        ),
        "mrope_of_another_sum": call(mrope_section=[4, 6, 5]),
    }


def make(name, case):
    package = vllm_rotary_embedding(case["max_model_len"])
    embedding = package.get_rope(
        case["head_size"], case["max_position"], case["is_neox_style"],
        dict(case["rope_parameters"]), torch.float32,
    )
    random = seeded(name)
    positions = torch.tensor(case["positions"], dtype=torch.int64)
    tokens = positions.shape[-1]
    drawn = {
        key: torch.from_numpy(
            random.standard_normal((tokens, heads * case["head_size"])).astype(np.float32)
        )
        for key, heads in (("query", HEADS), ("key", KV_HEADS))
    }
    given = {key: x.clone() for key, x in drawn.items()}
    # DeepSeek's classes take heads apart.
    if case["rope_parameters"].get("rope_type", "").startswith("deepseek"):
        given = {key: x.view(tokens, -1, case["head_size"]) for key, x in given.items()}
    forward = getattr(embedding, "forward_native", embedding.forward)
    rotated = forward(positions, given["query"], given["key"])
    if hasattr(embedding, "cos_sin_cache"):
        rows = embedding.cos_sin_cache.shape[0]
    else:
        original = embedding.original_max_position_embeddings
        rows = case["max_position"] if embedding.use_long_rope else original
    return case | {"class": type(embedding).__name__, "rows": rows}, {
        "positions": positions.numpy(),
        **{key: x.numpy() for key, x in drawn.items()},
        "query_rotated": rotated[0].reshape(tokens, -1).contiguous().numpy(),
        "key_rotated": rotated[1].reshape(tokens, -1).contiguous().numpy(),
    }


def compute():
    torch.set_num_threads(1)
    files = {}
    for name, case in cases().items():
        case, tensors = make(name, case)
        files[f"{name}.safetensors"] = golden(
            name, tensors, peer=PEER, case=case, made_by="vllm-get-rope.py"
        )
    refused = []
    for name, case in trials().items():
        try:
            make(name, case)
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            message = f"{type(error).__name__}: {reason}"
            refused.append({"name": name, "peer": PEER} | case | {"message": message})
            continue
        sys.exit(f"error: {name} was taken")
    files["refused.json"] = listing(refused)
    return files


if __name__ == "__main__":
    run("Make the goldens of vLLM's get_rope; see the top of this file.", "vllm", "", compute)
