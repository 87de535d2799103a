#!/usr/bin/env python3
"""Make tests/goldens/max-append/*: Modular MAX's rotation of packed qkv into its paged cache.

What
----
Each file is one call, of layer 1 of 2, of

    rope_split_store_ragged   rotates q and k of qkv, and stores k and v
    fused_qk_ragged_rope      rotates q, and the new keys where they are in the cache

both of max.nn.kernels:

    qkv             [tokens, (heads + 2 kv_heads) head_dim]  f32 or bf16; q alone for the other
    input_row_offsets   i32 [sequences + 1]
    cache_lengths       i32 [sequences]: tokens in the cache before
    lookup_table        i32 [sequences, pages of a sequence]
    position_ids        i32 [tokens], where the case has them; else those in the cache
    kv_blocks_before, kv_blocks  [pages, 2, layers, page_size, kv_heads, head_dim]; where the first
                    is left out, all of it was "untouched"
    q               [tokens, heads, head_dim], rotated

"case" is JSON. Its "angles" are those of a "theta", or quarter turns: pair i
turns i + 1 quarters per position. The latter are exact in every type, and met bit for bit.

What does not run on a CPU in this version
------------------------------------------
- rope_split_store_ragged with q_norm_weight: no kernel is registered for its op.
- fused_qk_ragged_rms_norm and fused_qk_rms_norm_rope_ragged: their kernels are launched on GPUs
  only, and do not compile for a CPU.
- rope_split_store_ragged and fused_qk_ragged_rope with mrope_section do not compile.
- rope_split_store_ragged reads a table that is narrower than the head as if it were as wide, and so
  takes other rows.

How to run
----------
    python3 -m venv goldens-venv
    . goldens-venv/bin/activate
    pip install --no-deps -r scripts/goldens/requirements-max.txt
    python scripts/goldens/max-append.py            # write; minutes, to compile
    python scripts/goldens/max-append.py --check    # recompute, compare the bytes

Another kind of CPU may round a last bit differently.
"""

import sys
from importlib.metadata import version

import numpy as np
from max.driver import CPU, Buffer
from max.dtype import DType
from max.engine import InferenceSession
from max.graph import BufferType, DeviceRef, Graph, TensorType, ops
from max.nn import kernels
from max.nn.kv_cache import MHAKVCacheParams, PagedCacheValues

# The shared file is beside this one; no cache folder is left there.
sys.dont_write_bytecode = True
from golden_files import from_bf16, golden, run, seeded, to_bf16

PEER = f"Modular MAX {version('max')} (CPU)"
HOST = DeviceRef.CPU()
HEADS, KV_HEADS, HEAD_DIM = 2, 2, 16
PAGES, PAGE_SIZE, LAYERS, LAYER = 6, 4, 2, 1
ROWS = 64
THETA = 10000.0
UNTOUCHED = -2.5
# Three sequences, the second without new tokens.
ROW_OFFSETS = [0, 3, 3, 8]
CACHE_LENGTHS = [0, 5, 2]
LOOKUP_TABLE = [[4, 1], [0, 2], [3, 5]]
POSITION_IDS = [7, 0, 40, 3, 3, 19, 63, 1]
TOKENS = ROW_OFFSETS[-1]


def call(op="rope_split_store_ragged", *, dtype="float32", interleaved=False, position_ids=False,
         both=False):
    """With `both`, by the angles of a theta too."""
    return {
        "op": op, "dtype": dtype, "interleaved": interleaved, "position_ids": position_ids,
        "angles": ["quarters", "theta"] if both else ["quarters"],
    }


CASES = {
    "store_half": call(both=True),
    "store_interleaved_bf16": call(dtype="bfloat16", interleaved=True, both=True),
    "store_position_ids_bf16": call(dtype="bfloat16", position_ids=True),
    "cached_keys_bf16": call("fused_qk_ragged_rope", dtype="bfloat16"),
}


def table(angles):
    """cos0 sin0 cos1 sin1 ... of each position, [rows, head_dim]."""
    pairs = HEAD_DIM // 2
    if angles == "quarters":
        quarters = np.arange(ROWS)[:, None] * np.arange(1, pairs + 1) % 4
        cos, sin = np.array([1, 0, -1, 0])[quarters], np.array([0, 1, 0, -1])[quarters]
    else:
        angle = np.arange(ROWS)[:, None] * THETA ** (-np.arange(pairs) / pairs)
        cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([cos, sin], -1).reshape(ROWS, HEAD_DIM).astype(np.float32)


def draw(random, *shape):
    """Values that every type here holds, and no zeros: those would show the signs of products."""
    x = from_bf16(to_bf16(random.standard_normal(shape).astype(np.float32)))
    assert (x != 0).all()
    return x


def in_type(x, dtype):
    """The buffer of MAX, which numpy does not see change."""
    x = np.ascontiguousarray(x, np.float32)
    if dtype == "float32":
        return Buffer.from_numpy(x.copy())
    return Buffer.from_numpy(to_bf16(x)).view(DType.bfloat16, x.shape)


def bits(buffer, shape, dtype):
    return (buffer if dtype == "float32" else buffer.view(DType.uint16, shape)).to_numpy().reshape(shape)


def model(case):
    """Compiles a call. Its inputs: qkv, the table, the blocks."""
    dtype = DType[case["dtype"]]
    streams = HEADS if case["op"] == "fused_qk_ragged_rope" else HEADS + 2 * KV_HEADS
    blocks = PAGES, 2, LAYERS, PAGE_SIZE, KV_HEADS, HEAD_DIM
    params = MHAKVCacheParams(
        dtype=dtype, head_dim=HEAD_DIM, num_layers=LAYERS, devices=[HOST], n_kv_heads=KV_HEADS,
        page_size=PAGE_SIZE)

    def constant(values):
        return ops.constant(np.array(values, np.uint32), DType.uint32, HOST)

    def forward(qkv, freqs_cis, blocks):
        cache = PagedCacheValues(
            kv_blocks=blocks.buffer, cache_lengths=constant(CACHE_LENGTHS),
            lookup_table=constant(LOOKUP_TABLE),
            max_prompt_length=constant([int(max(np.diff(ROW_OFFSETS)))]),
            max_cache_length=constant([max(CACHE_LENGTHS)]),
            # The pages follow each other.
            page_stride=ops.constant(np.array([-1], np.int64), DType.int64, HOST),
        )
        row_offsets = constant(ROW_OFFSETS)
        layer = ops.constant(LAYER, DType.uint32, HOST)
        if case["op"] == "fused_qk_ragged_rope":
            q = kernels.fused_qk_ragged_rope(
                params, qkv.tensor.reshape((TOKENS, HEADS, HEAD_DIM)), row_offsets, cache,
                freqs_cis.tensor, layer, interleaved=case["interleaved"])
        else:
            q = kernels.rope_split_store_ragged(
                params, qkv.tensor, row_offsets, freqs_cis.tensor, cache, layer, HEADS,
                interleaved=case["interleaved"],
                position_ids=constant([POSITION_IDS]) if case["position_ids"] else None)
        # numpy knows no bf16; f32 holds it exactly.
        return ops.cast(q, DType.float32)

    types = [
        TensorType(dtype, (TOKENS, streams * HEAD_DIM), HOST),
        TensorType(dtype, (ROWS, HEAD_DIM), HOST),
        BufferType(dtype, blocks, HOST),
    ]
    session = InferenceSession(devices=[CPU()])
    return session.load(Graph("golden", forward=forward, input_types=types)), types


def compute():
    files = {}
    for name, case in CASES.items():
        dtype = case["dtype"]
        compiled, types = model(case)
        tokens_shape, _, blocks_shape = (tuple(int(n) for n in t.shape) for t in types)
        random = seeded(name)
        qkv = draw(random, *tokens_shape)
        before = np.full(blocks_shape, UNTOUCHED, np.float32)
        cached_keys = case["op"] == "fused_qk_ragged_rope"
        if cached_keys:
            before = draw(random, *blocks_shape)
        for angles in case["angles"]:
            blocks = in_type(before, dtype)
            q = compiled.execute(
                in_type(qkv, dtype), in_type(table(angles), dtype), blocks)[0]
            narrow = to_bf16 if dtype == "bfloat16" else np.asarray
            tensors = {
                "qkv": narrow(qkv),
                "q": narrow(q.to_numpy().reshape(TOKENS, HEADS, HEAD_DIM)),
                "kv_blocks": bits(blocks, blocks_shape, dtype),
                "input_row_offsets": np.array(ROW_OFFSETS, np.int32),
                "cache_lengths": np.array(CACHE_LENGTHS, np.int32),
                "lookup_table": np.array(LOOKUP_TABLE, np.int32),
            }
            if cached_keys:
                tensors["kv_blocks_before"] = narrow(before)
            if case["position_ids"]:
                tensors["position_ids"] = np.array(POSITION_IDS, np.int32)
            file = f"{name}_{angles}"
            files[f"{file}.safetensors"] = golden(file, tensors, peer=PEER, case=case | {
                "angles": angles, "theta": THETA, "heads": HEADS, "kv_heads": KV_HEADS,
                "head_dim": HEAD_DIM, "layer": LAYER, "untouched": UNTOUCHED,
            }, made_by="max-append.py")
    return files


if __name__ == "__main__":
    run("Make MAX's goldens of its cache; see the top of this file.", "max-append", "", compute)
