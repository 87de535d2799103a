#!/usr/bin/env python3
"""Make tests/goldens/onnx/*: ONNX's RotaryEmbedding, by its reference and by ONNX Runtime.

What
----
backend_*.safetensors are onnx's own backend test cases, whole; ai_*.safetensors are
more calls of ai.onnx's operator (opset 23), ms_*.safetensors of com.microsoft's. The
tensors have the operator's own names and shapes:

    X, cos_cache, sin_cache   f32, f16 or bf16
    position_ids              i64, where the case has them
    expected                  like X: the output that comes with the backend case
    reference                 like X: what onnx's reference evaluator makes of it
    onnxruntime               like X: what ONNX Runtime's CPU provider makes of it

A peer that has no such operator or type has no tensor: the reference knows ai.onnx
only, and ONNX Runtime has no bf16 on a CPU. "case" is JSON with the node's domain,
version and attributes; "special" lists what replaces drawn values of X's first head:
token, channel and value. Random caches are no points of the unit circle.

refused.json lists calls that are wrong, with what each peer says. A null message means
that this peer took the call nevertheless: the peers do not refuse the same things.
ONNX Runtime takes odd widths, for one, but leaves a channel of its output
uninitialized then.

How to run
----------
    python -m venv venv && . venv/bin/activate
    pip install --no-deps -r scripts/goldens/requirements-onnx.txt
    python scripts/goldens/onnx-rope.py            # write
    python scripts/goldens/onnx-rope.py --check    # recompute, compare the bytes

ONNX Runtime chooses its code by the CPU: the last bit depends on whether it has fused
multiply-adds.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import importlib
import re
import sys

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from onnx import helper
from onnx.backend.test.case import node as backend
from onnx.reference import ReferenceEvaluator

# The shared file is beside this one; no cache folder is left there.
sys.dont_write_bytecode = True
from golden_files import golden, listing, run, seeded

REFERENCE = f"onnx {onnx.__version__} (reference evaluator)"
RUNTIME = f"onnxruntime {onnxruntime.__version__} (CPU)"
TYPES = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
ORDER = {
    "": ["X", "cos_cache", "sin_cache", "position_ids"],
    "com.microsoft": ["X", "position_ids", "cos_cache", "sin_cache"],
}
OPSETS = {"": 23, "com.microsoft": 1}
ROWS = 12
GRID = [[0, 1, 11], [7, 3, 7]]
SPECIAL = [(0, 3, "nan"), (0, 6, "inf"), (1, 9, "-inf"), (1, 12, "nan"), (2, 15, "inf")]


def model(domain, attributes, inputs):
    """One node with the given inputs, in the operator's order."""
    names = [name for name in ORDER[domain] if name in inputs]
    types = {name: helper.np_dtype_to_tensor_dtype(inputs[name].dtype) for name in names}
    graph = helper.make_graph(
        [helper.make_node("RotaryEmbedding", names, ["Y"], domain=domain, **attributes)],
        "one_node",
        [helper.make_tensor_value_info(name, kind, None) for name, kind in types.items()],
        [helper.make_tensor_value_info("Y", types["X"], None)],
    )
    opsets = [helper.make_opsetid(*item) for item in OPSETS.items()]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def by_reference(domain, attributes, inputs):
    return ReferenceEvaluator(model(domain, attributes, inputs)).run(None, inputs)[0]


def by_runtime(domain, attributes, inputs):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model(domain, attributes, inputs).SerializeToString(), options,
        providers=["CPUExecutionProvider"],
    )
    return session.run(None, inputs)[0]


def call(domain="", *, shape=(2, 3, 3, 16), dtype="f32", width=16, position_ids=GRID,
         random_caches=False, special=(), **attributes):
    """A call; `width` is the rotated one, and the caches are 3-D without position_ids."""
    return {
        "domain": domain,
        "opset": OPSETS[domain],
        "attributes": attributes,
        "shape": shape,
        "dtype": dtype,
        "width": width,
        "position_ids": position_ids,
        "caches": "random" if random_caches else "cos and sin of row * 10000^(-2i/width)",
        "special": special,
    }


def cases():
    made = {}
    ways = {"half": {}, "interleaved": {"interleaved": 1}}
    partial = {"width": 8, "rotary_embedding_dim": 8}
    three = {"shape": (2, 3, 48), "num_heads": 3}
    for way, pairs in ways.items():
        for dtype in ("f32", "f16"):
            common = pairs | {"dtype": dtype}
            absent = common | {"position_ids": None}
            made |= {
                f"ai_4d_{way}_{dtype}": call(**common),
                f"ai_3d_{way}_{dtype}": call(**three, **common),
                f"ai_partial_{way}_{dtype}": call(**partial, **common),
                f"ai_3d_partial_{way}_{dtype}": call(**partial, **three, **common),
                f"ai_no_positions_{way}_{dtype}": call(**absent),
                f"ai_no_positions_3d_partial_{way}_{dtype}": call(
                    **partial, **three, **absent
                ),
            }
            common |= {"domain": "com.microsoft"}
            made |= {
                f"ms_4d_{way}_{dtype}": call(**common),
                f"ms_offset_{way}_{dtype}": call(**common | {"position_ids": [5]}),
                f"ms_3d_{way}_{dtype}": call(**common, shape=(2, 3, 48)),
                f"ms_3d_partial_{way}_{dtype}": call(**partial, **three, **common),
            }
        made |= {
            f"ai_random_caches_{way}": call(**pairs, random_caches=True),
            f"ai_random_caches_no_positions_{way}": call(
                **pairs, random_caches=True, position_ids=None
            ),
            f"ai_{way}_bf16": call(**pairs, dtype="bf16"),
            f"ai_special_{way}": call(**pairs, position_ids=[[0, 1, 2]] * 2, special=SPECIAL),
            f"ms_special_{way}": call(
                "com.microsoft", **pairs, position_ids=[0], special=SPECIAL
            ),
            # Pairs beyond a multiple of what fits into a vector register.
            f"ai_width_of_22_{way}": call(**pairs, shape=(2, 1, 3, 22), width=22),
        }
    microsoft = {"domain": "com.microsoft"}
    long = [list(range(12)) + [3, 4]]
    return made | {
        "ai_num_heads_of_4d_ignored": call(num_heads=7),
        "ai_rotary_embedding_dim_of_the_head": call(rotary_embedding_dim=16),
        "ai_no_batches": call(shape=(0, 3, 3, 16), position_ids=[]),
        "ai_no_tokens": call(shape=(2, 3, 0, 16), position_ids=[[], []]),
        "ai_no_heads": call(shape=(2, 0, 3, 16)),
        "ai_no_tokens_no_positions": call(shape=(2, 3, 0, 16), position_ids=None),
        "ms_offset_of_rank_0": call(**microsoft, position_ids=5),
        "ms_offset_last_rows": call(**microsoft, position_ids=[9]),
        "ms_random_caches": call(**microsoft, random_caches=True),
        "ms_4d_partial": call(**microsoft, **partial, num_heads=3),
        "ms_3d_num_heads": call(**microsoft, shape=(2, 3, 48), num_heads=3),
        "ms_packed_batching_3d": call(
            **microsoft, shape=(1, 14, 48), num_heads=3, position_ids=long,
            is_packed_batching=1,
        ),
        "ms_packed_batching_4d": call(
            **microsoft, shape=(1, 3, 14, 16), position_ids=long, is_packed_batching=1
        ),
        "ms_scale": call(**microsoft, scale=0.5),
        "ms_no_batches": call(**microsoft, shape=(0, 3, 3, 16), position_ids=[5]),
        "ms_no_tokens": call(**microsoft, shape=(2, 3, 0, 16), position_ids=[5]),
    }


def draw(name, case):
    """The inputs of a case, by the operator's names."""
    random, dtype = seeded(name), TYPES[case["dtype"]]
    x = random.standard_normal(case["shape"]).astype(np.float32)
    for token, channel, value in case["special"]:
        x[0, 0, token, channel] = float(value)
    inputs = {"X": x}
    half = case["width"] // 2
    if case["caches"] == "random":
        cos, sin = random.uniform(-1.5, 1.5, (2, ROWS, half))
    else:
        angles = np.outer(np.arange(ROWS), 10000.0 ** (-np.arange(half) / half))
        cos, sin = np.cos(angles), np.sin(angles)
    batch, tokens = case["shape"][0], case["shape"][-2]
    if case["position_ids"] is None:
        rows = random.integers(ROWS, size=(batch, tokens))
        cos, sin = cos[rows], sin[rows]
    else:
        positions = np.array(case["position_ids"], np.int64)
        # A list of no rows does not say how long they are.
        inputs["position_ids"] = positions if positions.size else positions.reshape(batch, tokens)
    inputs |= {"cos_cache": cos, "sin_cache": sin}
    return {
        key: array if key == "position_ids" else array.astype(np.float32).astype(dtype)
        for key, array in inputs.items()
    }


def backend_cases():
    """onnx's own cases: (case, inputs, expected output) by name."""
    importlib.import_module("onnx.backend.test.case.node.rotaryembedding")
    made = {}
    for test in backend._NodeTestCases:
        if test.name.endswith("_expanded"):
            continue
        node, (inputs, (expected,)) = test.model.graph.node[0], test.data_sets[0]
        case = {
            "domain": "",
            "opset": OPSETS[""],
            "attributes": {a.name: helper.get_attribute_value(a) for a in node.attribute},
            "onnx_name": test.name,
        }
        short = test.name.removeprefix("test_rotary_embedding").removeprefix("_") or "plain"
        made[f"backend_{short}"] = case, dict(zip(ORDER[""], inputs)), expected
    return made


def trials():
    """Wrong calls: domain, attributes, inputs."""
    def trial(domain="", *, x=(2, 3, 3, 8), cos=(ROWS, 4), sin=None, position_ids=GRID,
              kind=np.int64, **attributes):
        random = seeded("refused")
        inputs = {
            "X": random.standard_normal(x).astype(np.float32),
            "cos_cache": random.standard_normal(cos).astype(np.float32),
            "sin_cache": random.standard_normal(sin or cos).astype(np.float32),
        }
        if position_ids is not None:
            inputs["position_ids"] = np.array(position_ids, kind)
        return domain, attributes, inputs

    def common(domain):
        return {
            "position_beyond_the_cache": trial(domain, position_ids=[[0, 1, 12], [7, 3, 7]]),
            "position_negative": trial(domain, position_ids=[[0, 1, -1], [7, 3, 7]]),
            "position_ids_of_one_batch": trial(domain, position_ids=[[0, 1, 2]]),
            "position_ids_too_few": trial(domain, position_ids=[[0, 1], [2, 3]]),
            "position_ids_flat": trial(domain, position_ids=[0, 1, 2]),
            "position_ids_i32": trial(domain, kind=np.int32),
            "rank_2": trial(domain, x=(3, 8)),
            "rank_5": trial(domain, x=(1, 2, 3, 3, 8)),
            "hidden_not_divided_by_num_heads": trial(domain, x=(2, 3, 25), num_heads=3),
            "cos_and_sin_differ_in_rows": trial(domain, sin=(ROWS + 1, 4)),
            "cos_and_sin_differ_in_width": trial(domain, sin=(ROWS, 3)),
            "cache_too_narrow": trial(domain, cos=(ROWS, 3), num_heads=3),
            "cache_as_wide_as_the_head": trial(domain, cos=(ROWS, 8), num_heads=3),
            "cache_of_3_axes_with_positions": trial(domain, cos=(2, 3, 4)),
            "cache_of_the_head_for_partial": trial(
                domain, num_heads=3, rotary_embedding_dim=4
            ),
            "rotary_embedding_dim_above_the_head": trial(
                domain, cos=(ROWS, 5), num_heads=3, rotary_embedding_dim=10
            ),
            "rotary_embedding_dim_negative": trial(
                domain, num_heads=3, rotary_embedding_dim=-2
            ),
            "rotary_embedding_dim_odd": trial(
                domain, cos=(ROWS, 1), num_heads=3, rotary_embedding_dim=3
            ),
            "head_odd": trial(domain, x=(2, 3, 3, 7), cos=(ROWS, 3)),
        }

    microsoft = "com.microsoft"
    return {f"ai_{name}": made for name, made in common("").items()} | {
        "ai_3d_without_num_heads": trial(x=(2, 3, 24)),
        "ai_position_ids_of_one": trial(position_ids=[5]),
        "ai_no_positions_cache_of_2_axes": trial(position_ids=None),
        "ai_no_positions_cache_of_one_batch": trial(position_ids=None, cos=(1, 3, 4)),
        "ai_no_positions_cache_longer": trial(position_ids=None, cos=(2, 5, 4)),
        "ai_no_positions_cache_shorter": trial(position_ids=None, cos=(2, 2, 4)),
    } | {f"ms_{name}": made for name, made in common(microsoft).items()} | {
        "ms_offset_beyond_the_cache": trial(microsoft, position_ids=[10]),
        "ms_offset_negative": trial(microsoft, position_ids=[-1]),
        "ms_offset_of_shape_1_1": trial(microsoft, position_ids=[[5]]),
        "ms_offset_for_each_batch": trial(microsoft, position_ids=[5, 6]),
        "ms_partial_without_num_heads": trial(
            microsoft, cos=(ROWS, 2), rotary_embedding_dim=4
        ),
        "ms_more_tokens_than_rows": trial(
            microsoft, x=(1, 3, 14, 8), position_ids=[list(range(12)) + [0, 1]]
        ),
        "ms_packed_batching_position_beyond": trial(
            microsoft, x=(1, 3, 3, 8), position_ids=[[0, 1, 12]], is_packed_batching=1
        ),
    }


def refused():
    entries = []
    for name, (domain, attributes, inputs) in trials().items():
        peers = {RUNTIME: by_runtime} if domain else {REFERENCE: by_reference,
                                                      RUNTIME: by_runtime}
        messages = []
        for peer, run_by in peers.items():
            try:
                run_by(domain, attributes, inputs)
                message = None
            except Exception as error:
                # What is before it and the paths of the peer's own sources say nothing.
                text = str(error).split("Status Message: ")[-1]
                text = " ".join(re.sub(r"(?<!\S)/\S+", "...", text).split())[:200]
                message = f"{type(error).__name__}: {text}"
            messages.append({"peer": peer, "message": message})
        positions = inputs.get("position_ids")
        entries.append({
            "name": name,
            "domain": domain,
            "attributes": attributes,
            "shapes": {key: array.shape for key, array in inputs.items()},
            "position_ids": None if positions is None else positions.tolist(),
            "position_ids_type": None if positions is None else positions.dtype.name,
            "peers": messages,
        })
    return entries


def outputs(case, inputs):
    """What the peers that have such an operator make of it."""
    made, dtype = {}, inputs["X"].dtype
    if not case["domain"]:
        made["reference"] = by_reference(case["domain"], case["attributes"], inputs)
    if dtype != TYPES["bf16"]:
        made["onnxruntime"] = by_runtime(case["domain"], case["attributes"], inputs)
    for key, array in made.items():
        if array.dtype != dtype:
            sys.exit(f"error: {key} returns {array.dtype} for {dtype}")
    return made


def file(name, case, tensors):
    tensors = {
        key: array.view(np.uint16) if array.dtype == TYPES["bf16"] else array
        for key, array in tensors.items()
    }
    return golden(name, tensors, peer=f"{REFERENCE}, {RUNTIME}", case=case,
                  made_by="onnx-rope.py")


def compute():
    # NaN and infinity are meant.
    np.seterr(invalid="ignore")
    files = {"refused.json": listing(refused())}
    for name, (case, inputs, expected) in backend_cases().items():
        tensors = inputs | {"expected": expected} | outputs(case, inputs)
        files[f"{name}.safetensors"] = file(name, case, tensors)
    for name, case in cases().items():
        inputs = draw(name, case)
        files[f"{name}.safetensors"] = file(name, case, inputs | outputs(case, inputs))
    return files


if __name__ == "__main__":
    run("Make ONNX's golden files; see the top of this file.", "onnx", "", compute)
