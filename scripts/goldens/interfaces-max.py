#!/usr/bin/env python3
"""Make tests/goldens/interfaces/max_*: Modular MAX's RotaryEmbedding as a caller meets it.

What
----
max_call_*.safetensors is one call of RotaryEmbedding on a batch:

    x, rotated      [batch, tokens, heads, head_dim]  f32, f16 or bf16
                    (one case without the batch, one with two axes for it)

The case's "special" lists what replaces drawn values: token and channel of the
first head, and the value.

max_table_*.safetensors holds the whole table of one class at a small max_seq_len:

    freqs_cis_base  [rows, head_dim/2, 2]  f32, cosine and sine of each pair; freqs_cis
                    is the same flattened to [rows, head_dim], which is checked here

"case" is JSON with every argument under MAX's name; null is an argument left out.
Its "compute_scale" lists [user_scale, the class's answer]. max_refused.json lists
calls that MAX does not take, with the beginning of what it says.

How to run
----------
    python3 -m venv goldens-venv
    . goldens-venv/bin/activate
    pip install --no-deps -r scripts/goldens/requirements-max.txt
    python scripts/goldens/interfaces-max.py            # write; minutes, to compile
    python scripts/goldens/interfaces-max.py --check    # recompute, compare the bytes

Another kind of CPU may round a last bit differently.
"""

import dataclasses
import re
import sys
from importlib.metadata import version

import numpy as np
from max.driver import CPU, Buffer
from max.dtype import DType
from max.engine import InferenceSession
from max.graph import DeviceRef, Dim, Graph, TensorType, ops
from max.nn import rotary_embedding as rope

# The shared file is beside this one; no cache folder is left there.
sys.dont_write_bytecode = True
from golden_files import from_bf16, golden, listing, run, seeded, to_bf16

PEER = f"Modular MAX {version('max')} (CPU)"
HOST = DeviceRef.CPU()
SHAPE = (2, 3, 2, 32)
ARGUMENTS = {
    "dim": 64, "n_heads": 2, "theta": 10000.0, "max_seq_len": 32, "head_dim": None,
    "interleaved": True,
}


def embedding(cls, scaling_params=None, **changed):
    """How to build `cls` later, inside a graph, and what to write down about it."""
    arguments = ARGUMENTS | changed
    case = {"class": cls.__name__} | arguments
    if scaling_params is not None:
        case["scaling_params"] = {
            "class": type(scaling_params).__name__
        } | dataclasses.asdict(scaling_params)
        arguments["scaling_params"] = scaling_params
    return case, lambda: cls(**arguments)


def calls():
    """(case, builder) of the calls; start_pos and seq_len are in the case."""
    def call(dtype, start_pos, seq_len=None, *, x_shape=SHAPE, special=(), **changed):
        case, build = embedding(rope.RotaryEmbedding, **changed)
        return case | {
            "x_shape": x_shape,
            "x_dtype": dtype,
            "start_pos": start_pos,
            "seq_len": seq_len,
            "special": special,
        }, build

    # The value of one channel of the first head, by token and channel.
    special = [(0, 3, "nan"), (0, 6, "inf"), (1, 9, "-inf"), (1, 20, "nan"), (2, 31, "inf")]

    return {
        "call_interleaved_f32": call("float32", 5),
        "call_half_f32": call("float32", 5, interleaved=False),
        "call_interleaved_bf16": call("bfloat16", 5),
        "call_half_bf16": call("bfloat16", 5, interleaved=False),
        "call_interleaved_f16": call("float16", 5),
        "call_start_pos_absent": call("float32", None, interleaved=False),
        # Rows beyond max_seq_len are in the table, which has twice as many.
        "call_last_rows": call("float32", 61, seq_len=3),
        "call_without_batch": call("float32", 5, x_shape=(3, 2, 32)),
        "call_rank_5": call("float32", 5, x_shape=(2, 2, 3, 1, 32)),
        "call_no_tokens": call("float32", 5, x_shape=(2, 0, 2, 32)),
        "call_no_batches": call("float32", 5, x_shape=(0, 3, 2, 32)),
        "call_special_interleaved": call("float32", 0, special=special),
        "call_special_half": call("float32", 0, special=special, interleaved=False),
    }


def tables():
    longrope = rope.LongRoPEScalingParams(
        short_factor=[1.0, 1.0, 1.05, 1.1, 1.2, 1.4, 1.7, 2.0, 2.2, 2.4, 2.5, 2.6, 2.7, 2.75,
                      2.8, 2.8],
        long_factor=[1.08, 1.1, 1.3, 1.9, 3.0, 5.5, 9.0, 14.0, 21.0, 28.0, 36.0, 44.0, 51.0,
                     57.0, 62.0, 64.8],
        original_max_position=20, max_position_embeddings=32,
    )
    deepseek = rope.DeepseekYarnRopeScalingParams(
        scaling_factor=4.0, original_max_position_embeddings=64, beta_fast=32, beta_slow=1,
        mscale=1.0, mscale_all_dim=0.5,
    )
    return {
        "table_default": embedding(rope.RotaryEmbedding),
        "table_head_dim_beside_dim": embedding(rope.RotaryEmbedding, head_dim=16),
        "table_llama3": embedding(
            rope.Llama3RotaryEmbedding,
            rope.Llama3RopeScalingParams(
                factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, orig_max_position=64
            ),
        ),
        "table_yarn": embedding(
            rope.YarnRotaryEmbedding,
            rope.YarnScalingParams(
                factor=4.0, beta_fast=32.0, beta_slow=1.0,
                original_max_position_embeddings=64, truncate=True,
            ),
        ),
        # For this class dim is the rotated width itself.
        "table_deepseek_yarn": embedding(
            rope.DeepseekYarnRotaryEmbedding, deepseek, dim=32, head_dim=32
        ),
        # The first row by the long factors is 20.
        "table_longrope": embedding(rope.LongRoPERotaryEmbedding, longrope),
        "table_longrope_not_longer": embedding(
            rope.LongRoPERotaryEmbedding,
            dataclasses.replace(longrope, max_position_embeddings=20),
        ),
    }


def draw(name, case):
    """x of a call, of values that its type holds."""
    x = seeded(name).standard_normal(case["x_shape"]).astype(np.float32)
    if case["x_dtype"] == "bfloat16":
        return from_bf16(to_bf16(x))
    for token, channel, value in case["special"]:
        x[0, token, 0, channel] = float(value)
    return x.astype(case["x_dtype"]).astype(np.float32)


def as_dim(value):
    return None if value is None else Dim(value)


def compute_all():
    """{case: (case, tensors)} of all cases, by one graph: compiling is what takes long."""
    chosen = {name: (*made, {}) for name, made in (calls() | tables()).items()}
    inputs = {name: draw(name, case) for name, (case, *_) in chosen.items() if "x_shape" in case}
    outputs = []

    def forward(*values):
        given, made = iter(values), []
        for name, (case, build, _) in chosen.items():
            rotary = build()
            case["compute_scale"] = [
                [scale, rotary.compute_scale(scale)] for scale in (None, 0.25)
            ]
            results = {}
            if name in inputs:
                x = ops.cast(next(given).tensor, DType[case["x_dtype"]])
                results["rotated"] = rotary(
                    x, start_pos=as_dim(case["start_pos"]), seq_len=as_dim(case["seq_len"])
                )
            else:
                results["freqs_cis_base"] = rotary.freqs_cis_base()
                results["freqs_cis"] = rotary.freqs_cis
            outputs.extend((name, key) for key in results)
            # numpy knows no bf16; f32 holds it exactly.
            made.extend(ops.cast(value, DType.float32) for value in results.values())
        return tuple(made)

    types = [TensorType(DType.float32, x.shape, HOST) for x in inputs.values()]
    model = InferenceSession(devices=[CPU()]).load(
        Graph("goldens", forward=forward, input_types=types)
    )
    values = model.execute(*[Buffer.from_numpy(x) for x in inputs.values()])
    for name, x in inputs.items():
        chosen[name][2]["x"] = x
    for (name, key), value in zip(outputs, values):
        chosen[name][2][key] = value.to_numpy()
    for name, (_, _, tensors) in chosen.items():
        flat = tensors.pop("freqs_cis", None)
        if flat is not None and flat.tobytes() != tensors["freqs_cis_base"].tobytes():
            sys.exit(f"error: {name}: freqs_cis is not freqs_cis_base flattened")
    return {name: (case, tensors) for name, (case, _, tensors) in chosen.items()}


def refusals():
    """Calls that fail while the graph is made, before anything is compiled."""
    def call(x_shape=SHAPE, start_pos=0, **changed):
        case, build = embedding(rope.RotaryEmbedding, **changed)
        case |= {"asked": "call", "x_shape": x_shape, "start_pos": start_pos}
        return case, lambda x: build()(x.tensor, start_pos=Dim(start_pos))

    def without_params(asked, graph):
        case, build = embedding(rope.DeepseekYarnRotaryEmbedding)
        return case | {"asked": asked}, lambda: graph(build())

    trials = {
        "x_wider_than_head_dim": call((2, 3, 2, 64)),
        "x_narrower_than_head_dim": call((2, 3, 2, 16)),
        "x_odd": call((2, 3, 2, 31), dim=62),
        "x_odd_half": call((2, 3, 2, 31), dim=62, interleaved=False),
        "rank_2": call((3, 32)),
        "start_pos_beyond_the_table": call(start_pos=64),
        "end_beyond_the_table": call(start_pos=62),
        "start_pos_negative": call(start_pos=-1),
        "deepseek_table_without_params": without_params(
            "freqs_cis_base()", lambda rotary: rotary.freqs_cis_base()
        ),
        "deepseek_scale_without_params": without_params(
            "compute_scale(None)",
            lambda rotary: ops.constant(rotary.compute_scale(None), DType.float32, HOST),
        ),
    }
    entries = []
    for name, (case, graph) in trials.items():
        types = []
        if "x_shape" in case:
            types = [TensorType(DType.float32, case["x_shape"], HOST)]
        try:
            Graph("refused", forward=graph, input_types=types)
            sys.exit(f"error: {name} was taken")
        except Exception as error:
            # Paths differ from machine to machine, and what follows them is a listing.
            text = " ".join(re.sub(r"(?<!\S)/\S+", "...", str(error)).split())[:300]
            message = f"{type(error).__name__}: {text}"
        entries.append({"name": name, "peer": PEER} | case | {"message": message})
    return entries


def compute():
    files = {"max_refused.json": listing(refusals())}
    for name, (case, tensors) in compute_all().items():
        for key in ("x", "rotated"):
            if key in tensors and case["x_dtype"] == "bfloat16":
                tensors[key] = to_bf16(tensors[key])
            elif key in tensors:
                tensors[key] = tensors[key].astype(case["x_dtype"])
        files[f"max_{name}.safetensors"] = golden(
            name, tensors, peer=PEER, case=case, made_by="interfaces-max.py"
        )
    return files


if __name__ == "__main__":
    run("Make MAX's interface goldens; see the top of this file.", "interfaces", "max_", compute)
