#!/usr/bin/env python3
"""Make tests/goldens/interfaces/mlx_*: MLX's mx.fast.rope as a caller meets it, on a CPU.

What
----
Each mlx_*.safetensors is one call of mx.fast.rope:

    x, rotated      [batch, ..., tokens, width]  f32, f16 or bf16
    offset          i64 [] or [1] or [batch], where the call had an array
    freqs           [dims/2]  f32, where the call had them: PERIODS
    cotangent, gradient
                    like x, where the case asks for it: what mx.vjp makes of the
                    cotangent

"case" is JSON with every argument under MLX's name; an "offset" that is a list or an
"array" is given as an array of "offset_dtype". "special" lists what replaces drawn
values of the first sequence's first head: token, channel and value.
mlx_refused.json lists calls that MLX does not take, with what it says.

How to run
----------
    python3 -m venv goldens-venv
    . goldens-venv/bin/activate
    pip install --no-deps -r scripts/goldens/requirements-mlx.txt
    python scripts/goldens/interfaces-mlx.py            # write
    python scripts/goldens/interfaces-mlx.py --check    # recompute, compare the bytes

Another kind of CPU may round a last bit differently.
"""

import sys

import mlx.core as mx
import numpy as np

# The shared file is beside this one; no cache folder is left there.
sys.dont_write_bytecode = True
from golden_files import golden, listing, run, seeded

PEER = f"mlx {mx.__version__} (CPU)"
TYPES = {
    "f32": mx.float32,
    "f16": mx.float16,
    "bf16": mx.bfloat16,
    "i32": mx.int32,
    "i64": mx.int64,
    "u32": mx.uint32,
}
SHAPE = (2, 2, 3, 20)
# The periods of theta 10000, with what a caller may put there: no rotation, and a
# rotation the other way.
PERIODS = (10000.0 ** (np.arange(10) / 10)).tolist()
ODD_PERIODS = [float("inf"), *PERIODS[1:4], float("inf"), -PERIODS[5], *PERIODS[6:9],
               float("inf")]
SPECIAL = [(0, 3, "nan"), (0, 6, "inf"), (1, 9, "-inf"), (1, 13, "nan"), (2, 19, "inf")]


def call(x_shape=SHAPE, *, dtype="f32", dims=None, traditional=False, base=10000.0, scale=1.0,
         offset=100, offset_dtype="i32", freqs=None, freqs_dtype="f32", gradient=False,
         special=()):
    """The arguments of one call; a base given beside freqs stays, to be refused."""
    return {
        "x_shape": x_shape,
        "dtype": dtype,
        "dims": x_shape[-1] if dims is None else dims,
        "traditional": traditional,
        "base": base,
        "scale": scale,
        "offset": offset,
        "offset_dtype": offset_dtype,
        "freqs": freqs,
        "freqs_dtype": freqs_dtype,
        "gradient": gradient,
        "special": special,
    }


def both(name, *arguments, **named):
    """The case twice, for each way to pair."""
    return {
        f"{name}_half": call(*arguments, **named),
        f"{name}_traditional": call(*arguments, **named, traditional=True),
    }


def cases():
    periods = {"base": None, "freqs": PERIODS}
    odd = {"base": None, "freqs": ODD_PERIODS}
    return {
        **both("rank_3", (2, 3, 20)),
        **both("rank_4"),
        **both("rank_5", (2, 1, 2, 3, 20), offset=[5, 1000]),
        "rank_6": call((1, 2, 1, 2, 2, 20)),
        "offset_scalar_array": call(offset={"array": 100}),
        "offset_of_one": call(offset=[100]),
        "offset_of_the_batch": call(offset=[100, 4095]),
        "offset_i64": call(offset=[100, 4095], offset_dtype="i64"),
        "offset_u32": call(offset=[100, 4095], offset_dtype="u32"),
        "offset_negative": call(offset=-7),
        "offset_of_the_batch_negative": call(offset=[-7, 3]),
        "offset_of_one_for_one_token": call((2, 2, 1, 20), offset=[100]),
        "scale_zero": call(scale=0.0),
        "scale_negative": call(scale=-0.5),
        "scale_fraction": call(scale=0.3),
        "scale_fraction_negative_offset": call(scale=0.3, offset=-100),
        "scale_with_freqs": call(scale=0.25, **periods),
        **both("partial", dims=12),
        **both("partial_bf16", dims=12, dtype="bf16"),
        **both("f16", dtype="f16"),
        **both("bf16", dtype="bf16"),
        **both("freqs_infinite", **odd),
        **both("freqs_infinite_bf16", dtype="bf16", **odd),
        "freqs_bf16": call(**periods, freqs_dtype="bf16"),
        "freqs_partial": call(dims=10, base=None, freqs=PERIODS[::2], offset=[3, 1000]),
        "freqs_of_integers": call(base=None, freqs=list(range(1, 11)), freqs_dtype="i32"),
        "base_one": call(base=1.0),
        # An offset of 64 bits wraps to 32. It turns f32 before the index is added.
        "offset_wraps": call(offset=2**31 + 5),
        "offset_i64_wraps": call(offset=[2**32 + 7, 1], offset_dtype="i64"),
        "offset_u32_large": call(offset=[2**31 + 1024, 2**24 + 1], offset_dtype="u32"),
        "offset_above_24_bits": call(offset=2**24 + 1),
        "dims_2": call(dims=2),
        **both("gradient", gradient=True),
        "gradient_freqs": call(gradient=True, **odd),
        "gradient_partial": call(gradient=True, dims=12, scale=0.3, offset=[3, 1000]),
        **both("gradient_bf16", gradient=True, dtype="bf16"),
        "gradient_f16": call(gradient=True, dtype="f16"),
        **both("special", offset=0, special=SPECIAL),
        "special_f16": call(offset=0, special=SPECIAL, dtype="f16"),
        "no_batches": call((0, 2, 3, 20)),
        "no_heads": call((2, 0, 3, 20)),
        "no_tokens": call((2, 2, 0, 20)),
    }


def trials():
    """Calls that are refused."""
    return {
        "base_and_freqs": call(freqs=PERIODS),
        "neither_base_nor_freqs": call(base=None),
        "dims_odd": call(dims=11),
        "dims_above_the_width": call(dims=22),
        "dims_zero": call(dims=0),
        "dims_negative": call(dims=-2),
        "dims_not_an_integer": call(dims=10.0),
        "rank_1": call((20,)),
        "rank_2": call((3, 20)),
        "x_i32": call(dtype="i32"),
        "offset_float": call(offset=1.5),
        "offset_array_of_floats": call(offset=[1.0, 2.0], offset_dtype="f32"),
        "offset_of_another_length": call(offset=[1, 2, 3]),
        "offset_of_rank_2": call(offset=[[1], [2]]),
        "freqs_too_short": call(base=None, freqs=PERIODS[:5]),
        "freqs_of_the_width": call(base=None, freqs=PERIODS + PERIODS),
        "freqs_of_rank_2": call(base=None, freqs=[PERIODS]),
    }


def to_numpy(array):
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def make(name, case):
    """The tensors of a case."""
    random, dtype = seeded(name), TYPES[case["dtype"]]
    drawn = random.standard_normal(case["x_shape"]).astype(np.float32)
    for token, channel, value in case["special"]:
        drawn[0, 0, token, channel] = float(value)
    tensors = {"x": mx.array(drawn).astype(dtype)}

    offset, freqs = case["offset"], case["freqs"]
    if isinstance(offset, dict):
        offset = offset["array"]
    if not isinstance(case["offset"], (int, float)):
        offset = mx.array(offset, dtype=TYPES[case["offset_dtype"]])
        tensors["offset"] = offset.astype(mx.int64)
    if freqs is not None:
        freqs = mx.array(freqs, dtype=mx.float32).astype(TYPES[case["freqs_dtype"]])
        tensors["freqs"] = freqs.astype(mx.float32)

    def rope(x):
        return mx.fast.rope(
            x, case["dims"], traditional=case["traditional"], base=case["base"],
            scale=case["scale"], offset=offset, freqs=freqs,
        )

    tensors["rotated"] = rope(tensors["x"])
    if case["gradient"]:
        cotangent = random.standard_normal(case["x_shape"]).astype(np.float32)
        tensors["cotangent"] = mx.array(cotangent).astype(dtype)
        tensors["gradient"] = mx.vjp(rope, [tensors["x"]], [tensors["cotangent"]])[1][0]
    return {key: to_numpy(array) for key, array in tensors.items()}


def readable(case):
    """JSON knows no infinity."""
    if case["freqs"] is None:
        return case
    return case | {"freqs": "in the file"}


def compute():
    # A GPU's rounding is another one.
    mx.set_default_device(mx.cpu)
    files = {
        f"mlx_{name}.safetensors": golden(
            name, make(name, case), peer=PEER, case=readable(case), made_by="interfaces-mlx.py"
        )
        for name, case in cases().items()
    }
    refused = []
    for name, case in trials().items():
        try:
            make(name, case)
            sys.exit(f"error: {name} was taken")
        except Exception as error:
            # Of the list of overloads after it, the types of the caller's objects vary.
            message = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        refused.append({"name": name, "peer": PEER} | case | {"message": message})
    files["mlx_refused.json"] = listing(refused)
    return files


if __name__ == "__main__":
    run("Make MLX's interface goldens; see the top of this file.", "interfaces", "mlx_", compute)
