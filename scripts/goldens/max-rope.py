#!/usr/bin/env python3
"""Make tests/goldens/max/*.safetensors: Modular MAX's rotary embeddings on a CPU.

What
----
Each file is one of MAX's rotary embedding classes with a model's parameters:

    position_ids   [tokens] i32, or [3, tokens] (t, h, w) of the mrope cases,
                   [tokens, 2] of the two-dimensional one
    cos, sin       [tokens, pairs]  f32, those rows of its table, as it stores them
    inv_freq       [pairs]  f32, where the class computes one list of frequencies
    x, rotated     [tokens, heads, head_dim]  where the case rotates: what the op
                   that "rotated_by" names makes of x at position_ids
    x_call, rotated_call
                   [batch, tokens, heads, head_dim]  what the class, called with
                   the "start_pos" of the case, makes of x_call

The metadata: "peer" is the version, "case" is JSON with every argument under
MAX's name and the op's own arguments, "results" holds compute_scale(user_scale)
and the number of rows of the table. Pairs: interleaved (2i, 2i + 1), else
(i, i + head_dim/2); the vision case splits the head in two and pairs within each.

How to run
----------
    python3 -m venv goldens-venv
    . goldens-venv/bin/activate
    pip install --no-deps -r scripts/goldens/requirements-max.txt
    python scripts/goldens/max-rope.py            # write; minutes, to compile
    python scripts/goldens/max-rope.py --check    # recompute, compare the bytes

The inputs are seeded by the case's name. Another kind of CPU may round a last
bit differently.
"""

import dataclasses
import importlib.util
import json
import math
import sys
from importlib.metadata import distribution, version
from pathlib import Path

import numpy as np
from golden_files import from_bf16, run, seeded, serialize, to_bf16
from max.driver import CPU, Buffer
from max.dtype import DType
from max.engine import InferenceSession
from max.graph import BufferType, DeviceRef, Dim, Graph, TensorType, ops
from max.nn import kernels
from max.nn import rotary_embedding as rope
from max.nn.kv_cache import MHAKVCacheParams, PagedCacheValues

# Cases in one graph.
GROUP = 6
HOST = DeviceRef.CPU()
CACHE = MHAKVCacheParams(
    dtype=DType.float32, head_dim=128, num_layers=1, devices=[HOST], n_kv_heads=1, page_size=128
)
BLOCKS = (1, 2, 1, 128, 1, 128)

POSITIONS = [0, 1, 7, 100, 4095, 8191]
AXES = [
    [0, 1, 7, 100, 4095, 100000],
    [0, 3, 5, 61, 2047, 50001],
    [0, 2, 11, 37, 1023, 25003],
]
# Most classes make twice as many rows. Far more would take long to compile in, as
# MAX works constant tables out then.
ROWS = 4096


def load_architecture(path):
    """A module of one model's code by path: its package needs a serving stack."""
    file = distribution("max").locate_file(f"max/pipelines/architectures/{path}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, file)
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their own module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


qwen3vl = load_architecture("qwen3vl_moe/nn/text_rotary.py").Qwen3VLTextRotaryEmbedding
qwen3_5 = load_architecture("qwen3_5/layers/text_rotary.py").Qwen3_5TextRotaryEmbedding
gemma4 = load_architecture("gemma4/layers/rotary_embedding.py")


def longrope_factors(first, last, bend):
    """48 made-up factors of the shape that Phi-3.5's have: rising, two decimals."""
    steps = np.arange(48) / 47
    return np.round(first * (last / first) ** (steps**bend), 2).tolist()


def offsets(values):
    return ops.constant(np.array(values, np.uint32), DType.uint32, HOST)


def empty_cache(blocks, tokens):
    """One page for one sequence; the fused op rotates the keys in it, here zeros, as well."""
    return PagedCacheValues(
        kv_blocks=blocks,
        cache_lengths=offsets([0]),
        lookup_table=offsets([[0]]),
        max_prompt_length=offsets([tokens]),
        max_cache_length=offsets([0]),
        page_stride=ops.constant(np.array([math.prod(BLOCKS)]), DType.int64, HOST),
    )


def make(cls, *, scaling_params=None, **arguments):
    """How to build `cls` later, inside a graph, and what to write down about it."""
    case = {"class": cls.__name__} | arguments
    built = dict(arguments)
    if scaling_params is not None:
        case["scaling_params"] = {
            "class": type(scaling_params).__name__
        } | dataclasses.asdict(scaling_params)
        built["scaling_params"] = scaling_params
    if "dtype" in built:
        built["dtype"] = DType[built["dtype"]]
    return case, lambda: cls(**built)


def table(made, *, rotate=None, position_ids=POSITIONS, user_scale=None, grow_to=None):
    """A case about a table of one row per position; `rotate` names the type of x."""
    case, build = made
    case["user_scale"] = user_scale
    if rotate is not None:
        case |= {"rotated_by": "rope_ragged", "heads": 2, "x_dtype": rotate, "start_pos": 7}
    if grow_to is not None:
        case["maybe_update_freqs"] = f"position_ids of shape [{grow_to}]"

    def graph(inputs):
        embedding = build()
        if grow_to is not None:
            embedding.maybe_update_freqs(ops.range(0, grow_to, device=HOST, dtype=DType.int64))
        base = embedding.freqs_cis_base()
        positions = inputs["position_ids"]
        result = {"rows": ops.gather(base, positions, 0)}
        yarn = getattr(embedding, "_compute_yarn_freqs", None)
        if yarn is not None:
            result["inv_freq"] = yarn()
        elif not isinstance(embedding, rope.LongRoPERotaryEmbedding):
            result["inv_freq"] = embedding._compute_inv_freqs()
        if rotate is not None:
            cast = {key: ops.cast(inputs[key], DType[rotate]) for key in ("x", "x_call")}
            # One sequence of one token for each position.
            result["rotated"] = kernels.rope_ragged(
                cast["x"],
                offsets(range(len(position_ids) + 1)),
                ops.cast(positions, DType.uint32),
                ops.cast(embedding.freqs_cis, DType[rotate]),
                interleaved=embedding.interleaved,
            )
            result["rotated_call"] = embedding(cast["x_call"], start_pos=Dim(7))
        return result, {
            "compute_scale": embedding.compute_scale(user_scale),
            "rows_of_the_table": int(base.shape[0]),
        }

    return case, position_ids, graph


def mrope(made, *, op, position_ids=AXES, mrope_section=None):
    """A case with a position for each of three axes."""
    case, build = made
    case |= {"rotated_by": op, "heads": 1, "x_dtype": "float32"}
    if mrope_section is not None:
        case["mrope_section"] = mrope_section

    def graph(inputs):
        embedding = build()
        axes = inputs["position_ids"]
        if op == "fused_qk_ragged_rope":
            rotated = kernels.fused_qk_ragged_rope(
                CACHE, inputs["x"], offsets([0, len(position_ids[0])]),
                empty_cache(inputs["kv_blocks"], len(position_ids[0])), embedding.freqs_cis,
                ops.constant(0, DType.uint32, HOST), interleaved=embedding.interleaved,
                position_ids=ops.cast(axes, DType.uint32), mrope_section=mrope_section,
            )
            result, frequencies = {"rotated": rotated}, embedding._compute_inv_freqs()
        else:
            flat = embedding.freqs_cis_position_ids(ops.cast(axes, DType.int64))
            count, width = int(flat.shape[0]), int(flat.shape[1])
            result = {
                "rows": ops.reshape(flat, [count, width // 2, 2]),
                # A table of one row per token is read by token index.
                "rotated": kernels.rope_ragged(
                    inputs["x"],
                    offsets([0, count]),
                    offsets([0]),
                    ops.cast(flat, DType.float32),
                    interleaved=embedding.interleaved,
                ),
            }
            # Qwen3-VL's rounds its frequencies to its dtype first.
            frequencies = getattr(embedding, "inv_freqs", None)
            if frequencies is None:
                frequencies = embedding._compute_inv_freqs()
        return result | {"inv_freq": frequencies}, {
            "compute_scale": embedding.compute_scale(None)
        }

    return case, position_ids, graph


def vision(*, head_dim, ndim, theta):
    """Gemma 4's vision tower: a part of the head for each axis, half-split within it."""
    patches = [[0, 0], [0, 1], [7, 3], [31, 63], [100, 99]]
    case = {
        "class": "compute_vision_freqs_cis",
        "head_dim": head_dim,
        "ndim": ndim,
        "theta": theta,
        "dtype": "float32",
        "rotated_by": "apply_multidimensional_rope",
        "heads": 1,
        "x_dtype": "float32",
    }

    def graph(inputs):
        rows = gemma4.compute_vision_freqs_cis(
            inputs["position_ids"], head_dim, ndim, theta, DType.float32, HOST
        )
        rotated = gemma4.apply_multidimensional_rope(inputs["x"], rows, ndim)
        return {"rows": rows, "rotated": rotated}, {}

    return case, patches, graph


def cases():
    llama31 = rope.Llama3RopeScalingParams(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, orig_max_position=8192
    )
    llama32 = dataclasses.replace(llama31, factor=32.0)
    # How MAX's Gemma 3 asks for linear scaling: all wavelengths are long ones.
    linear = rope.Llama3RopeScalingParams(
        factor=8.0, low_freq_factor=1e38, high_freq_factor=1e38, orig_max_position=131072
    )
    longrope = rope.LongRoPEScalingParams(
        short_factor=longrope_factors(1.0, 2.8, 1.6),
        long_factor=longrope_factors(1.08, 64.8, 0.8),
        original_max_position=4096,
        max_position_embeddings=131072,
    )
    seam = [0, 7, 4095, 4096, 4097, 8191]

    def yarn(factor, original, truncate=True):
        return rope.YarnScalingParams(
            factor=factor, beta_fast=32.0, beta_slow=1.0,
            original_max_position_embeddings=original, truncate=truncate,
        )

    deepseek = rope.DeepseekYarnRopeScalingParams(
        scaling_factor=40.0, original_max_position_embeddings=4096,
        beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0,
    )

    plain = {"dim": 4096, "n_heads": 32, "theta": 10000.0, "max_seq_len": ROWS}
    llama = plain | {"theta": 500000.0}
    llama_1b = {"dim": 2048, "n_heads": 32, "theta": 500000.0, "max_seq_len": ROWS}
    gpt_oss = {"dim": 2880, "n_heads": 64, "theta": 150000.0, "max_seq_len": 2 * ROWS,
               "head_dim": 64, "interleaved": False}
    deepseek_v3 = {"dim": 64, "n_heads": 128, "theta": 10000.0, "max_seq_len": 2 * ROWS,
                   "head_dim": 64}
    phi = {"dim": 3072, "n_heads": 32, "theta": 10000.0, "max_seq_len": ROWS,
           "interleaved": False}
    qwen = {"dim": 4096, "n_heads": 32, "theta": 5e6, "max_seq_len": ROWS, "head_dim": 128,
            "interleaved": False}
    return {
        "default_interleaved": table(make(rope.RotaryEmbedding, **plain), rotate="float32"),
        "default_half": table(
            make(rope.RotaryEmbedding, **plain, interleaved=False), rotate="float32"
        ),
        "default_interleaved_bf16": table(
            make(rope.RotaryEmbedding, **plain), rotate="bfloat16"
        ),
        "default_half_bf16": table(
            make(rope.RotaryEmbedding, **plain, interleaved=False), rotate="bfloat16"
        ),
        "linear_gemma3_4b": table(
            make(rope.Llama3RotaryEmbedding, dim=2560, n_heads=8, theta=1e6, max_seq_len=ROWS,
                 head_dim=256, interleaved=False, scaling_params=linear)
        ),
        "llama31_8b": table(make(rope.Llama3RotaryEmbedding, **llama, scaling_params=llama31)),
        "llama32_1b": table(
            make(rope.Llama3RotaryEmbedding, **llama_1b, scaling_params=llama32)
        ),
        "dynamic_grown": table(
            make(rope.DynamicRotaryEmbedding, dim=2048, n_heads=32, theta=10000.0,
                 max_seq_len=2048),
            position_ids=[0, 1, 7, 100, 4095, 9999], grow_to=5000,
        ),
        "yarn_qwen25": table(
            make(rope.YarnRotaryEmbedding, dim=3584, n_heads=28, theta=1e6,
                 max_seq_len=2 * ROWS, interleaved=False, scaling_params=yarn(4.0, 32768))
        ),
        "yarn_gpt_oss": table(
            make(rope.YarnRotaryEmbedding, **gpt_oss, scaling_params=yarn(32.0, 4096, False))
        ),
        "yarn_gpt_oss_truncate": table(
            make(rope.YarnRotaryEmbedding, **gpt_oss, scaling_params=yarn(32.0, 4096, True))
        ),
        # So short an original context that the upper limit of the ramp is negative.
        "yarn_negative_limit": table(
            make(rope.YarnRotaryEmbedding, **gpt_oss, scaling_params=yarn(4.0, 5))
        ),
        "deepseek_yarn_v3": table(
            make(rope.DeepseekYarnRotaryEmbedding, **deepseek_v3, scaling_params=deepseek),
            user_scale=math.sqrt(1 / 192),
        ),
        "deepseek_yarn_mscale_ratio": table(
            make(rope.DeepseekYarnRotaryEmbedding, **deepseek_v3,
                 scaling_params=dataclasses.replace(deepseek, mscale_all_dim=0.5)),
        ),
        "longrope_phi35_mini": table(
            make(rope.LongRoPERotaryEmbedding, **phi, scaling_params=longrope),
            position_ids=seam,
        ),
        "proportional_gemma4": table(
            make(gemma4.ProportionalRotaryEmbedding, dim=2816, n_heads=8, theta=1e6,
                 max_seq_len=ROWS, head_dim=512, interleaved=False,
                 scaling_params=gemma4.ProportionalScalingParams(partial_rotary_factor=0.25)),
        ),
        "mrope_qwen3_vl": mrope(
            make(qwen3vl, **qwen, dtype="float32", mrope_section=[24, 20, 20]),
            op="rope_ragged",
        ),
        "mrope_qwen3_vl_bf16_table": mrope(
            make(qwen3vl, **qwen, dtype="bfloat16", mrope_section=[24, 20, 20]),
            op="rope_ragged",
        ),
        "mrope_qwen35": mrope(
            make(qwen3_5, **qwen | {"theta": 1e7, "head_dim": 64},
                 mrope_section=[11, 11, 10]),
            op="rope_ragged",
        ),
        "mrope_fused_qwen2_vl": mrope(
            make(rope.RotaryEmbedding, **qwen | {"theta": 1e6, "max_seq_len": 65536}),
            op="fused_qk_ragged_rope",
            mrope_section=[16, 24, 24],
        ),
        "vision_gemma4": vision(head_dim=72, ndim=2, theta=100.0),
    }


def draw_inputs(name, case, position_ids):
    """The graph inputs of a case. x keeps to bf16's values where the case needs that."""
    random = seeded(name)
    position_ids = np.array(position_ids, np.int32)
    inputs = {"position_ids": position_ids}
    if "rotated_by" not in case:
        return inputs
    tokens = len(position_ids) if "ndim" in case else position_ids.shape[-1]
    width = case.get("head_dim") or case["dim"] // case["n_heads"]

    def draw(*shape):
        x = random.standard_normal(shape).astype(np.float32)
        return from_bf16(to_bf16(x)) if case["x_dtype"] == "bfloat16" else x

    inputs["x"] = draw(tokens, case["heads"], width)
    if "start_pos" in case:
        inputs["x_call"] = draw(1, 3, case["heads"], width)
    if case["rotated_by"] == "fused_qk_ragged_rope":
        inputs["kv_blocks"] = np.zeros(BLOCKS, np.float32)
    return inputs


def execute(session, chosen):
    """All tensors and results of the chosen cases, by one graph."""
    inputs = {
        name: draw_inputs(name, case, position_ids)
        for name, (case, position_ids, _) in chosen.items()
    }
    flat = [(key, array) for group in inputs.values() for key, array in group.items()]
    results, names = {}, []

    def forward(*values):
        given, outputs = iter(values), []
        for name, (_, _, graph) in chosen.items():
            group = {key: next(given) for key in inputs[name]}
            tensors, results[name] = graph({
                key: value.buffer if key == "kv_blocks" else value.tensor
                for key, value in group.items()
            })
            names.extend((name, key) for key in tensors)
            # numpy knows no bf16; f32 holds it exactly.
            outputs.extend(ops.cast(value, DType.float32) for value in tensors.values())
        return tuple(outputs)

    model = session.load(Graph(
        "goldens",
        forward=forward,
        input_types=[
            (BufferType if key == "kv_blocks" else TensorType)(
                DType.from_numpy(x.dtype), x.shape, HOST
            )
            for key, x in flat
        ],
    ))
    outputs = model.execute(*[Buffer.from_numpy(x) for _, x in flat])
    tensors = inputs
    for (name, key), output in zip(names, outputs):
        tensors[name][key] = output.to_numpy()
    return tensors, results


def golden(name, case, tensors, results):
    """The bytes of one file."""
    tensors.pop("kv_blocks", None)
    rows = tensors.pop("rows", None)
    if rows is not None:
        tensors["cos"], tensors["sin"] = rows[..., 0], rows[..., 1]
    if case.get("x_dtype") == "bfloat16":
        for key in ("x", "rotated", "x_call", "rotated_call"):
            tensors[key] = to_bf16(tensors[key])
    metadata = {
        "peer": f"Modular MAX {version('max')} (CPU)",
        "case": json.dumps({"name": name} | case),
        "results": json.dumps(results),
        "made_by": "scripts/goldens/max-rope.py",
    }
    return serialize(tensors, metadata)


def every_case():
    chosen = cases()
    session = InferenceSession(devices=[CPU()])
    tensors, results = {}, {}
    # A compilation takes long to begin with, and longer the more it has to fuse.
    for start in range(0, len(chosen), GROUP):
        made = execute(session, dict(list(chosen.items())[start : start + GROUP]))
        tensors |= made[0]
        results |= made[1]
        print(f"ran {len(results)} of {len(chosen)} cases", file=sys.stderr, flush=True)
    return {
        f"{name}.safetensors": golden(name, case, tensors[name], results[name])
        for name, (case, *_) in chosen.items()
    }


if __name__ == "__main__":
    run("Make MAX's golden files; see the top of this file.", "max", "", every_case)
