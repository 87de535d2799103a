#!/usr/bin/env python3
"""Make tests/goldens/mlx/*.safetensors: what MLX's mx.fast.rope rotates on a CPU.

What
----
Each file is one call, either of mx.fast.rope or of the module that mlx-lm's
initialize_rope makes of a model's rope_scaling:

    x              [batch, heads, tokens, dim]  f32, f16 or bf16, the input
                   (one case: [batch, tokens, dim], one of rank 5)
    rotated        like x
    position_ids   [batch, tokens]  i32, offset + index, before `scale`
    freqs          [dims/2]  f32, where the call had them: PERIODS, infinity legal
    cos, sin       [batch, tokens, dims/2]  of x's type, the factors as applied,
                   read off by rotating (1, 0) in every pair; magnitudes that
                   mlx-lm multiplies into x beforehand are therefore in them

The metadata: "peer" names the versions, "case" is JSON with every argument
under MLX's name. Pairs: traditional (2i, 2i + 1), else (i, i + dims/2).

How to run
----------
    python3 -m venv goldens-venv
    . goldens-venv/bin/activate
    pip install --no-deps -r scripts/goldens/requirements-mlx.txt
    python scripts/goldens/mlx-rope.py            # write
    python scripts/goldens/mlx-rope.py --check    # recompute, compare the bytes

The inputs are seeded by the case's name. Another kind of CPU may round a last
bit differently.
"""

import importlib.util
from importlib.metadata import distribution, version

import mlx.core as mx
import numpy as np
from golden_files import golden, run, seeded

TYPES = {"f32": mx.float32, "f16": mx.float16, "bf16": mx.bfloat16}
OFFSETS = [0, 1, 7, 100, 4095, 100000]


def load_rope_utils():
    """mlx_lm.models.rope_utils by path: importing the package needs transformers."""
    path = distribution("mlx-lm").locate_file("mlx_lm/models/rope_utils.py")
    spec = importlib.util.spec_from_file_location("rope_utils", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rope_utils = load_rope_utils()


def longrope_factors(first, last, bend):
    """48 made-up factors of the shape that Phi-3.5's have: rising, two decimals."""
    steps = np.arange(48) / 47
    return np.round(first * (last / first) ** (steps**bend), 2).tolist()


def fast(shape, *, dims=None, dtype="f32", traditional=False, base=10000.0, scale=1.0,
         offset=OFFSETS, freqs=None):
    """A case that calls mx.fast.rope itself; a list as offset is an array of its shape."""
    return {
        "via": "mx.fast.rope",
        "dtype": dtype,
        "x_shape": list(shape),
        "dims": shape[-1] if dims is None else dims,
        "traditional": traditional,
        "base": None if freqs is not None else base,
        "scale": scale,
        "offset": offset,
    }, freqs


def model(shape, scaling_config, *, dims=None, dtype="f32", traditional=False, base=10000.0,
          offset=OFFSETS, max_position_embeddings=None):
    """A case that goes through mlx-lm's initialize_rope."""
    return {
        "via": "mlx_lm.models.rope_utils.initialize_rope",
        "dtype": dtype,
        "x_shape": list(shape),
        "dims": shape[-1] if dims is None else dims,
        "traditional": traditional,
        "base": base,
        "offset": offset,
        "scaling_config": scaling_config,
        "max_position_embeddings": max_position_embeddings,
    }, None


def cases():
    def llama3(factor):
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }

    longrope = {
        "rope_type": "longrope",
        "original_max_position_embeddings": 4096,
        "short_factor": longrope_factors(1.0, 2.8, 1.6),
        "long_factor": longrope_factors(1.08, 64.8, 0.8),
    }

    def yarn(factor, original, **more):
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
        } | more

    dynamic = {"rope_type": "dynamic", "factor": 2.0}
    # The periods of theta 10000, with what else a caller may legally put there:
    # no rotation at all, and a rotation the other way.
    periods = 10000.0 ** (np.arange(32) / 32)
    periods[[0, 9, 31]] = np.inf
    periods[20] *= -1

    plain = (6, 1, 1, 128)
    small = (6, 1, 1, 64)
    return {
        "half_f32": fast((6, 1, 2, 128)),
        "traditional_f32": fast((6, 1, 2, 128), traditional=True),
        "half_f16": fast(plain, dtype="f16"),
        "half_bf16": fast((6, 2, 2, 128), dtype="bf16"),
        "traditional_bf16": fast((6, 2, 2, 128), dtype="bf16", traditional=True),
        "half_16_of_64": fast(small, dims=16),
        "half_32_of_80_bf16": fast((6, 1, 1, 80), dims=32, dtype="bf16"),
        "traditional_64_of_128": fast(plain, dims=64, traditional=True),
        "offset_int": fast((2, 2, 5, 64), offset=100),
        "offset_int_negative": fast((1, 2, 5, 64), offset=-3),
        "offset_one_for_the_batch": fast((2, 2, 3, 64), offset=[4095]),
        "rank_3": fast((6, 2, 64), traditional=True),
        "rank_5": fast((2, 2, 2, 3, 32), offset=[7, 100000]),
        "scale_eighth": fast(plain, base=1e6, scale=0.125),
        "scale_negative": fast(small, scale=-1.0, traditional=True),
        "freqs_infinite_and_negative": fast(small, freqs=periods),
        "freqs_infinite_and_negative_traditional_bf16": fast(
            small, freqs=periods, traditional=True, dtype="bf16"
        ),
        "linear_gemma3_4b": model(plain, {"rope_type": "linear", "factor": 8.0}, base=1e6),
        "llama31_8b": model(plain, llama3(8.0), base=500000.0),
        "llama31_8b_bf16": model(plain, llama3(8.0), base=500000.0, dtype="bf16"),
        "llama32_1b": model(small, llama3(32.0), base=500000.0),
        "proportional_gemma4": model(
            (4, 1, 1, 512),
            {"rope_type": "proportional", "partial_rotary_factor": 0.25},
            base=1e6,
            offset=[0, 7, 4095, 100000],
        ),
        "longrope_phi35_mini": model((6, 1, 1, 96), longrope, max_position_embeddings=131072),
        "longrope_phi4_mini_96_of_128": model(
            plain, longrope, dims=96, max_position_embeddings=131072
        ),
        "yarn_qwen25": model(plain, yarn(4.0, 32768), base=1e6),
        "yarn_gpt_oss": model(
            small, yarn(32.0, 4096, beta_fast=32.0, beta_slow=1.0), base=150000.0
        ),
        "yarn_deepseek_v3": model(
            small,
            yarn(40, 4096, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0),
            traditional=True,
        ),
        "yarn_mscale_ratio_bf16": model(
            small,
            yarn(40, 4096, mscale=1.0, mscale_all_dim=0.5),
            traditional=True,
            dtype="bf16",
        ),
        # dynamic takes its base from the end of the sequence, so the offset is an int
        "dynamic_within": model(
            (1, 1, 4, 128), dynamic, base=1e6, offset=100, max_position_embeddings=32768
        ),
        "dynamic_beyond": model(
            (1, 1, 4, 128), dynamic, base=1e6, offset=40000, max_position_embeddings=32768
        ),
    }


def rotate(case, freqs, x):
    """`x` rotated by the peer, and the periods that it used, if it had any."""
    offset = case["offset"]
    if isinstance(offset, list):
        offset = mx.array(offset, dtype=mx.int32)
    if case["via"] == "mx.fast.rope":
        if freqs is not None:
            freqs = mx.array(freqs, dtype=mx.float32)
        result = mx.fast.rope(
            x, case["dims"], traditional=case["traditional"], base=case["base"],
            scale=case["scale"], offset=offset, freqs=freqs,
        )
    else:
        rope = rope_utils.initialize_rope(
            case["dims"], case["base"], case["traditional"], case["scaling_config"],
            case["max_position_embeddings"],
        )
        result = rope(x, offset=offset)
        freqs = getattr(rope, "_freqs", None)
    return result, freqs


def unit_pairs(case):
    """x with (1, 0) in every pair, and where the pairs' channels are."""
    shape, half = case["x_shape"], case["dims"] // 2
    pair = np.arange(half)
    first, second = (2 * pair, 2 * pair + 1) if case["traditional"] else (pair, pair + half)
    x = np.zeros(shape, np.float32)
    x[..., first] = 1
    return x, first, second


def to_numpy(array):
    """An array of MLX as one of numpy, which knows no bf16 and has its bits."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def compute(name):
    case, freqs = cases()[name]
    dtype, shape = TYPES[case["dtype"]], case["x_shape"]
    x = mx.array(seeded(name).standard_normal(shape).astype(np.float32)).astype(dtype)
    rotated, used = rotate(case, freqs, x)

    unit, first, second = unit_pairs(case)
    factors, _ = rotate(case, freqs, mx.array(unit).astype(dtype))
    # All heads have the same factors.
    while factors.ndim > 3:
        factors = factors[:, 0]

    start = np.broadcast_to(np.array(case["offset"], np.int32), shape[0])
    tensors = {
        "x": x,
        "rotated": rotated,
        "position_ids": mx.array(start[:, None] + np.arange(shape[-2], dtype=np.int32)),
        "cos": factors[..., mx.array(first)],
        "sin": factors[..., mx.array(second)],
    }
    if used is not None:
        tensors["freqs"] = used
    return golden(
        name,
        {key: to_numpy(array) for key, array in tensors.items()},
        peer=f"mlx {mx.__version__} (CPU), mlx-lm {version('mlx-lm')}",
        case=case,
        made_by="mlx-rope.py",
    )


def every_case():
    # A GPU's rounding is another one.
    mx.set_default_device(mx.cpu)
    return {f"{name}.safetensors": compute(name) for name in cases()}


if __name__ == "__main__":
    run("Make MLX's golden files; see the top of this file.", "mlx", "", every_case)
