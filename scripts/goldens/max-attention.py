#!/usr/bin/env python3
"""Make crates/phasor-attention/tests/goldens/max/*: MAX's attention layers on a CPU.

What
----
Each file is two calls of one layer, index 1 of 2, over a paged cache: prompts of three sequences, then a
step in which each has one or two tokens more, over the edges of pages.

    prompt, step  [tokens, kept]  f32: what the calls return, of each token the first elements; of a second
                  device prompt1, step1, which has the tokens of the first turned by one: the last comes
                  first
    kv_blocks     [pages, 2, page_size, kv_heads, head_dim]  f32: the layer's cache after both, where it is
                  not too large; elements that were not written are "untouched"

Inputs and weights are no part of a file. They are drawn, in the order of `drawn` below, from
SplitMix64 with the seed of the case; "case" is JSON and says the rest.

What does not run, or is not made here
--------------------------------------
float8 and GPTQ layers need a GPU; the constructor of TensorParallelAttentionWithRope refuses a CPU. On a
CPU a window must be at least as wide as a vector of masks (128 in f32 with AVX-512), so that its case has
longer sequences.

How to run
----------
    python3 -m venv goldens-venv
    . goldens-venv/bin/activate
    pip install --no-deps -r scripts/goldens/requirements-max.txt
    python scripts/goldens/max-attention.py            # write; half an hour, to compile
    python scripts/goldens/max-attention.py --check    # recompute, compare the bytes

Another kind of CPU may round a last bit differently.
"""

import sys
from importlib.metadata import version

import numpy as np
from max.driver import CPU, Buffer
from max.dtype import DType
from max.engine import InferenceSession
from max.graph import BufferType, DeviceRef, Graph, TensorType, ops
from max.graph.quantization import QuantizationEncoding
from max.graph.weights import WeightData
from max.nn.attention.attention_with_rope import (
    AttentionWithRope, DataParallelAttentionWithRope, GGUFQAttentionWithRope)
from max.nn.attention.mask_config import MHAMaskVariant
from max.nn.kv_cache import MHAKVCacheParams, PagedCacheValues
from max.nn.rotary_embedding import RotaryEmbedding

sys.dont_write_bytecode = True
from golden_files import ATTENTION_GOLDENS, Draw, golden, run

PEER = f"Modular MAX {version('max')} (CPU)"
HOST = DeviceRef.CPU()
PAGES, PAGE_SIZE, LAYERS, LAYER = 7, 8, 2, 1
ROWS = 64
PAGE_TABLE = [[4, 1, 6], [0, 2, 2], [3, 5, 2]]
CALLS = {"prompt": ([0, 15, 16, 38], [0, 0, 0]), "step": ([0, 1, 3, 5], [15, 1, 22])}
# Of a window: one sequence is longer than that.
LONG_PAGE_SIZE, LONG_ROWS = 64, 192
LONG_CALLS = {"prompt": ([0, 150, 151, 173], [0, 0, 0]), "step": ([0, 1, 3, 5], [150, 1, 22])}
LONG_KEPT = 16
UNTOUCHED = -2.5
KEPT = 64
# Elements and bytes of a block, and where its f16 scales are, which make scores of a few units.
BLOCKS = {
    "Q4_0": (32, 18, {0: 2**-8}), "Q4_K": (256, 144, {0: 2**-12, 2: 2**-10}),
    "Q6_K": (256, 210, {208: 2**-14}),
}


def blocks_of(draw, encoding, rows, columns):
    """Bytes of a matrix."""
    elements, size, scales = BLOCKS[encoding]
    blocks = draw.bits(rows * columns // elements * size).astype(np.uint8).reshape(-1, size)
    for at, scale in scales.items():
        blocks[:, at:at + 2] = np.array([scale], np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def case(seed, **changes):
    plain = {
        "seed": seed, "heads": 4, "kv_heads": 2, "head_dim": 16, "hidden_size": 48,
        "interleaved": False, "stacked": False, "bias": False, "qk_norm": False, "clip": None,
        "window": None, "scale": None, "encoding": None, "theta": 10000.0, "devices": 1,
    }
    return plain | changes


CASES = {
    "dense": case(1),
    "interleaved": case(2, interleaved=True),
    "stacked_bias": case(3, stacked=True, bias=True),
    "bias": case(4, bias=True),
    "qk_norm": case(5, qk_norm=True),
    "clip_scale": case(6, clip=0.1, scale=0.5),
    "window": case(7, window=128),
    "gguf_q4_0": case(8, encoding="Q4_0", hidden_size=64),
    "gguf_q4_k": case(9, encoding="Q4_K", hidden_size=256, head_dim=64, interleaved=True),
    "gguf_q6_k": case(10, encoding="Q6_K", hidden_size=256, head_dim=64),
    "data_parallel": case(11, bias=True, devices=2),
}


def calls_of(c):
    return LONG_CALLS if c["window"] else CALLS


def page_size_of(c):
    return LONG_PAGE_SIZE if c["window"] else PAGE_SIZE


def kept_of(c):
    return min(LONG_KEPT if c["window"] else KEPT, c["hidden_size"])


def drawn(c):
    """Inputs of both calls, and the weights."""
    draw = Draw(c["seed"])
    tokens = [offsets[-1] for offsets, _ in calls_of(c).values()]
    inputs = [draw.values(1, n, c["hidden_size"]) for n in tokens]
    q, kv = c["heads"] * c["head_dim"], c["kv_heads"] * c["head_dim"]
    shapes = {
        "q_proj": (q, c["hidden_size"]), "k_proj": (kv, c["hidden_size"]),
        "v_proj": (kv, c["hidden_size"]), "o_proj": (c["hidden_size"], q),
    }
    if c["encoding"]:
        return inputs, {f"{n}.weight": blocks_of(draw, c["encoding"], *s) for n, s in shapes.items()}
    weights = {f"{name}.weight": draw.values(0.3, *shape) for name, shape in shapes.items()}
    if c["bias"]:
        for name in ("q_proj", "k_proj", "v_proj"):
            weights[f"{name}.bias"] = draw.values(0.5, shapes[name][0])
    if c["qk_norm"]:
        for name in ("q_norm", "k_norm"):
            weights[f"{name}.weight"] = draw.values(1.5, c["head_dim"])
    if c["stacked"]:
        for part in ("weight", "bias") if c["bias"] else ("weight",):
            weights[f"qkv_proj.{part}"] = np.concatenate(
                [weights.pop(f"{n}.{part}") for n in ("q_proj", "k_proj", "v_proj")])
    return inputs, weights


def layer_of(c, params):
    rope = RotaryEmbedding(
        dim=c["heads"] * c["head_dim"], n_heads=c["heads"], theta=c["theta"], max_seq_len=LONG_ROWS if c["window"] else ROWS,
        head_dim=c["head_dim"], interleaved=c["interleaved"])
    common = dict(
        rope=rope, num_attention_heads=c["heads"], num_key_value_heads=c["kv_heads"],
        hidden_size=c["hidden_size"], kv_params=params, scale=c["scale"])
    if c["encoding"]:
        encoding = QuantizationEncoding[c["encoding"]]
        return rope, GGUFQAttentionWithRope(
            **common, dtype=DType.uint8, quantization_encoding=encoding)
    window = {}
    if c["window"]:
        window = dict(
            mask_variant=MHAMaskVariant.SLIDING_WINDOW_CAUSAL_MASK, sliding_window=c["window"])
    if c["devices"] > 1:
        common["devices"] = [HOST] * c["devices"]
    layer = AttentionWithRope if c["devices"] == 1 else DataParallelAttentionWithRope
    return rope, layer(
        **common, stacked_qkv=c["stacked"], has_bias=c["bias"], clip_qkv=c["clip"],
        use_qk_norm=c["qk_norm"], **window)


def params_of(c):
    return MHAKVCacheParams(
        dtype=DType.float32, head_dim=c["head_dim"], num_layers=LAYERS, devices=[HOST],
        n_kv_heads=c["kv_heads"], page_size=page_size_of(c))


def blocks_shape(c):
    return PAGES, 2, LAYERS, page_size_of(c), c["kv_heads"], c["head_dim"]


def compute_case(name, c):
    rope, layer = layer_of(c, params_of(c))
    inputs, weights = drawn(c)
    state = {}
    for key, value in weights.items():
        state[key] = WeightData.from_numpy(value, key)
        if c["encoding"]:
            state[key].quantization_encoding = QuantizationEncoding[c["encoding"]]
    layer.load_state_dict(state)
    sequences, devices = len(PAGE_TABLE), c["devices"]

    def forward(*values):
        row_offsets, cache_lengths, lookup_table, prompt, cached = (v.tensor for v in values[:5])
        xs = [x.tensor for x in values[5::2]]
        caches = [
            PagedCacheValues(
                kv_blocks=blocks.buffer, cache_lengths=cache_lengths, lookup_table=lookup_table,
                max_prompt_length=prompt, max_cache_length=cached,
                page_stride=ops.constant(np.array([-1], np.int64), DType.int64, HOST),
                attention_dispatch_metadata=ops.constant(
                    np.array([sequences, 8, 1, 16], np.int64), DType.int64, HOST))
            for blocks in values[6::2]]
        layer_idx = ops.constant(LAYER, DType.uint32, HOST)
        if devices == 1:
            return layer(layer_idx, xs[0], caches[0], rope.freqs_cis, row_offsets)
        return layer(layer_idx, xs, caches, devices * [rope.freqs_cis], devices * [row_offsets])

    u32 = DType.uint32
    types = [
        TensorType(u32, (sequences + 1,), HOST), TensorType(u32, (sequences,), HOST),
        TensorType(u32, (sequences, len(PAGE_TABLE[0])), HOST),
        TensorType(u32, (1,), HOST), TensorType(u32, (1,), HOST),
    ] + devices * [
        TensorType(DType.float32, ("tokens", c["hidden_size"]), HOST),
        BufferType(DType.float32, blocks_shape(c), HOST),
    ]
    graph = Graph("golden", forward=forward, input_types=types)
    session = InferenceSession(devices=[CPU()])
    model = session.load(graph, weights_registry=layer.state_dict())
    caches = [
        Buffer.from_numpy(np.full(blocks_shape(c), UNTOUCHED, np.float32)) for _ in range(devices)]
    tensors = {}
    for x, (key, (offsets, lengths)) in zip(inputs, calls_of(c).items()):
        most = [[int(max(np.diff(offsets)))], [max(lengths)]]
        arrays = [offsets, lengths, PAGE_TABLE] + most
        arguments = [Buffer.from_numpy(np.array(array, np.uint32)) for array in arrays]
        for device, cache in enumerate(caches):
            arguments += [Buffer.from_numpy(np.ascontiguousarray(np.roll(x, device, 0))), cache]
        for device, out in enumerate(model.execute(*arguments)):
            out = out.to_numpy().reshape(-1, c["hidden_size"])[:, :kept_of(c)]
            tensors[key + (str(device) if device else "")] = out.copy()
    # Caches of GGUF's layers and of long sequences would be large, and are seen in what is returned.
    if not c["encoding"] and not c["window"]:
        blocks = caches[0].to_numpy()
        assert (np.delete(blocks, LAYER, 2) == UNTOUCHED).all()
        tensors["kv_blocks"] = blocks[:, :, LAYER].copy()
    return golden(
        name, tensors, peer=PEER, made_by="max-attention.py", case=c | {
            "pages": PAGES, "page_size": page_size_of(c), "layers": LAYERS, "layer": LAYER,
            "page_table": PAGE_TABLE, "untouched": UNTOUCHED,
            "kept": kept_of(c),
            "calls": [[key, *call] for key, call in calls_of(c).items()],
        })


def compute():
    # One by one: a graph of all would take memory and hours to compile.
    return {f"{name}.safetensors": compute_case(name, c) for name, c in CASES.items()}


if __name__ == "__main__":
    run(__doc__.splitlines()[0], ATTENTION_GOLDENS / "max", "", compute)
