#!/usr/bin/env python3
"""Make tests/goldens/max-ragged/*: Modular MAX's rotations of ragged batches.

What
----
Each file is one call of rope_ragged or rope_ragged_with_position_ids (max.nn.kernels)
with the freqs_cis of a RotaryEmbedding:

    input, rotated      [tokens, heads, head_dim]  f32 or bf16
    input_row_offsets   i64 [batch + 1], start_pos i64 [batch]  of rope_ragged
    position_ids        i64 [tokens]  of the other (whose mrope_section does not
                        compile in this version; tests/goldens/max has mrope)

"case" is JSON with the arguments under MAX's names; "embedding" holds those of the
class. Where the embedding's heads are narrower than the input's, only so many dims
rotate.

How to run
----------
    python3 -m venv goldens-venv
    . goldens-venv/bin/activate
    pip install --no-deps -r scripts/goldens/requirements-max.txt
    python scripts/goldens/max-ragged.py            # write; a minute, to compile
    python scripts/goldens/max-ragged.py --check    # recompute, compare the bytes

Another kind of CPU may round a last bit differently.
"""

import sys
from importlib.metadata import version

import numpy as np
from max.driver import CPU, Buffer
from max.dtype import DType
from max.engine import InferenceSession
from max.graph import DeviceRef, Graph, TensorType, ops
from max.nn import kernels
from max.nn import rotary_embedding as rope

# The shared file is beside this one; no cache folder is left there.
sys.dont_write_bytecode = True
from golden_files import from_bf16, golden, run, seeded, to_bf16

PEER = f"Modular MAX {version('max')} (CPU)"
HOST = DeviceRef.CPU()
HEADS = 2


def call(op, *, dtype="float32", head_dim=32, interleaved=True, width=None, **more):
    return {
        "op": op,
        "embedding": {
            "dim": HEADS * head_dim, "n_heads": HEADS, "theta": 10000.0, "max_seq_len": 64,
            "head_dim": head_dim, "interleaved": interleaved,
        },
        "dtype": dtype,
        "width": head_dim if width is None else width,
    } | more


def cases():
    # Three sequences, the second without new tokens.
    ragged = {"input_row_offsets": [0, 3, 3, 8], "start_pos": [0, 17, 40]}
    ids = {"position_ids": [7, 0, 127, 3, 3]}
    with_ids = "rope_ragged_with_position_ids"
    return {
        "ragged_interleaved": call("rope_ragged", **ragged),
        "ragged_half": call("rope_ragged", interleaved=False, **ragged),
        "ragged_bf16": call("rope_ragged", dtype="bfloat16", **ragged),
        "ragged_last_row": call("rope_ragged", input_row_offsets=[0, 2], start_pos=[126]),
        "ragged_trailing": call("rope_ragged", width=48, **ragged),
        "ragged_leading": call("rope_ragged", width=48, rope_first=True, **ragged),
        "ids_interleaved": call(with_ids, **ids),
        "ids_half": call(with_ids, interleaved=False, **ids),
        "ids_bf16": call(with_ids, dtype="bfloat16", interleaved=False, **ids),
    }


def compute():
    chosen, inputs, names = cases(), {}, []
    for name, case in chosen.items():
        if "position_ids" in case:
            tokens = len(case["position_ids"])
        else:
            tokens = case["input_row_offsets"][-1]
        x = seeded(name).standard_normal((tokens, HEADS, case["width"])).astype(np.float32)
        inputs[name] = from_bf16(to_bf16(x)) if case["dtype"] == "bfloat16" else x

    def constant(values):
        return ops.constant(np.array(values, np.uint32), DType.uint32, HOST)

    def forward(*values):
        made = []
        for value, (name, case) in zip(values, chosen.items()):
            embedding = rope.RotaryEmbedding(**case["embedding"])
            x = ops.cast(value.tensor, DType[case["dtype"]])
            freqs_cis = ops.cast(embedding.freqs_cis, DType[case["dtype"]])
            interleaved = case["embedding"]["interleaved"]
            if case["op"] == "rope_ragged":
                rotated = kernels.rope_ragged(
                    x, constant(case["input_row_offsets"]), constant(case["start_pos"]),
                    freqs_cis, interleaved=interleaved,
                    rope_first=case.get("rope_first", False),
                )
            else:
                rotated = kernels.rope_ragged_with_position_ids(
                    x, freqs_cis, constant(case["position_ids"]), interleaved=interleaved
                )
            names.append(name)
            # numpy knows no bf16; f32 holds it exactly.
            made.append(ops.cast(rotated, DType.float32))
        return tuple(made)

    types = [TensorType(DType.float32, x.shape, HOST) for x in inputs.values()]
    model = InferenceSession(devices=[CPU()]).load(
        Graph("goldens", forward=forward, input_types=types)
    )
    values = model.execute(*[Buffer.from_numpy(x) for x in inputs.values()])
    files = {}
    for name, value in zip(names, values):
        case = chosen[name]
        tensors = {"input": inputs[name], "rotated": value.to_numpy()}
        if case["dtype"] == "bfloat16":
            tensors = {key: to_bf16(x) for key, x in tensors.items()}
        for key in ("input_row_offsets", "start_pos", "position_ids"):
            if key in case:
                tensors[key] = np.array(case[key], np.int64)
        files[f"{name}.safetensors"] = golden(
            name, tensors, peer=PEER, case=case, made_by="max-ragged.py"
        )
    return files


if __name__ == "__main__":
    run("Make MAX's goldens of ragged batches; see the top of this file.", "max-ragged", "",
        compute)
