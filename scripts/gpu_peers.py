"""Rotary embedding of the Python packages that this machine has, added to the results of phasor's GPU bench.

As benches/cuda does it: each call is captured many times in a CUDA graph over buffers that do not fit into
L2 together (or over one), and replays are timed between events. Every contender is first checked against a
computation in f64; what is missing or fails is listed with its reason. scripts/gpu-peers runs this with a
time limit.

With --dry-run nothing is measured and no GPU is needed: what would be is listed, and what would be skipped
with its reason; and what torch can compute without a GPU is checked.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Callable

HEAD_DIM = 128
THETA = 5e5
FIRST_POSITION = 1000
# Those of benches/cuda/schedule.rs.
REPLAY_US = 4000
MOST_CALLS, FEWEST_CALLS = 4096, 8
SAMPLING_SECONDS = 0.03
MOST_SAMPLES, FEWEST_SAMPLES = 15, 5
LLAMA, SHARE = (32, 8), (8, 1)
# Of a serving step, as benches/cuda/steps.rs has it: q, k and v heads, slots of a page, eps of the norms, and
# the scale that codes are divided by.
STEP_HEADS = (32, 8, 8)
STEP_TOKENS = (1, 32, 256, 2048, 8192)
PAGE = 16
EPS = 1e-6
SCALE = 0.01
SLOT_STRIDE = 5003

# Of values between -1 and 1. Tables in 16 bits and angles in f32 are meant to pass, at positions up to
# 34,000; a wrong pairing or position is not.
TOLERANCE = {"f32": 2e-2, "f16": 3e-2, "bf16": 6e-2}
# Of a value to its e4m3 code: a step of it, as values that differ in their last bit may go to either side.
STEP_OF_E4M3 = 1 / 8


class Missing(Exception):
    """What a contender needs is not there, or it does not do this at all."""


@dataclass(frozen=True)
class Case:
    heads: tuple[int, int]
    dtype: str
    pairing: str
    tokens: int

    @property
    def interleaved(self) -> bool:
        return self.pairing == "interleaved"

    @property
    def is_usual(self) -> bool:
        return (self.heads, self.dtype, self.pairing) == (LLAMA, "bf16", "half-split")

    @property
    def lengths(self) -> tuple[int, int]:
        q, k = (self.tokens * heads * HEAD_DIM for heads in self.heads)
        return q, k

    @property
    def bytes(self) -> int:
        return sum(self.lengths) * (4 if self.dtype == "f32" else 2)

    @property
    def moved(self) -> int:
        """Bytes that a call reads and writes."""
        return 2 * self.bytes

    @property
    def step(self) -> None:
        return None

    @property
    def shape(self) -> str:
        return f"{self.heads[0]}+{self.heads[1]} heads of {HEAD_DIM}"

    @property
    def memories(self) -> tuple[str, ...]:
        return ("cold", "l2") if self.tokens <= 256 else ("cold",)

    def __str__(self) -> str:
        return f"{self.shape}, {self.dtype} {self.pairing}, tokens: {self.tokens}"


@dataclass(frozen=True)
class StepCase:
    """A serving step: from packed qkv to rotated q and a written cache."""

    norms: bool
    codes: bool
    q_codes: bool
    tokens: int
    dtype: str = "bf16"
    pairing: str = "half-split"
    interleaved: bool = False
    memories: tuple[str, ...] = ("cold",)

    @property
    def step(self) -> str:
        norm = "norm, " if self.norms else ""
        cache = "an e4m3" if self.codes else "a bf16"
        q = ", q to e4m3" if self.q_codes else ""
        return f"{norm}rotate, append to {cache} cache{q}"

    @property
    def shape(self) -> str:
        return f"{'+'.join(map(str, STEP_HEADS))} heads of {HEAD_DIM}"

    @property
    def moved(self) -> int:
        q, kv = STEP_HEADS[0] * HEAD_DIM, sum(STEP_HEADS[1:]) * HEAD_DIM
        written = q * (1 if self.q_codes else 2) + kv * (1 if self.codes else 2)
        return self.tokens * (2 * (q + kv) + written)

    @property
    def qkv(self) -> int:
        """Elements that are read."""
        return self.tokens * sum(STEP_HEADS) * HEAD_DIM

    def __str__(self) -> str:
        return f"{self.step}: {self.shape}, {self.dtype}, tokens: {self.tokens}"


def step_cases() -> list[StepCase]:
    """In the order of benches/cuda/steps.rs."""
    kinds = (
        (False, False, False),
        (True, False, False),
        (True, True, False),
        (False, True, False),
        (False, True, True),
    )
    return [StepCase(*kind, tokens) for tokens in STEP_TOKENS for kind in kinds]


def cases() -> list[Case]:
    """Rotations of q and k, those first that say most, as time may run out."""
    sizes = (1, 32, 256, 2048, 8192, 32_768)
    order = [
        (LLAMA, "bf16", "half-split", sizes),
        (LLAMA, "bf16", "interleaved", sizes),
        (LLAMA, "f16", "half-split", sizes),
        (LLAMA, "f32", "half-split", sizes),
        (SHARE, "bf16", "half-split", (1, 256, 8192)),
        (SHARE, "bf16", "interleaved", (1, 256, 8192)),
        (LLAMA, "f16", "interleaved", sizes),
        (LLAMA, "f32", "interleaved", sizes),
    ]
    return [Case(*kind, tokens) for *kind, sizes in order for tokens in sizes]


def cold_buffers(size: int, l2: int) -> int:
    return min(max(-(-8 * l2 // size), 2), MOST_CALLS)


def calls(size: int, buffers: int, launches: int) -> int:
    """In a graph, which has no more nodes where a call is several launches. Fewer calls than buffers use
    each of them once a replay."""
    expected_us = 1 + 2 * size // 3_000_000
    most = min(max(REPLAY_US // expected_us, FEWEST_CALLS), MOST_CALLS)
    number = max(most // launches, FEWEST_CALLS)
    return number if number < buffers else -(-number // buffers) * buffers


# What every contender reads, on the device.


class Tables:
    """Positions, and cos and sin of their angles in f64, `[tokens, HEAD_DIM / 2]`."""

    def __init__(self, torch, tokens: int, device: str):
        self.torch = torch
        self.positions = torch.arange(FIRST_POSITION, FIRST_POSITION + tokens, device=device)
        self.cos, self.sin = self.of(self.positions)

    def of(self, positions):
        pairs = self.torch.arange(HEAD_DIM // 2, device=positions.device, dtype=self.torch.float64)
        angles = positions.double()[:, None] * THETA ** (-2 * pairs / HEAD_DIM)
        return angles.cos(), angles.sin()

    def cache(self, dtype):
        """cos, then sin, of every position up to the last."""
        last = FIRST_POSITION + len(self.positions)
        positions = self.torch.arange(last, device=self.positions.device)
        return self.torch.cat(self.of(positions), -1).to(dtype)

    def twice(self, dtype, interleaved: bool):
        """cos and sin for each dim of a head."""
        if interleaved:
            tables = (table.repeat_interleave(2, -1) for table in (self.cos, self.sin))
        else:
            tables = (self.torch.cat((table, table), -1) for table in (self.cos, self.sin))
        return tuple(table.to(dtype) for table in tables)


def expected(x, cos, sin, interleaved: bool):
    """The rotation of `[tokens, heads, HEAD_DIM]`, in f64."""
    x, cos, sin = x.double(), cos[:, None], sin[:, None]
    half = HEAD_DIM // 2
    first, second = (
        (slice(0, None, 2), slice(1, None, 2))
        if interleaved
        else (slice(0, half), slice(half, None))
    )
    y = x.clone()
    y[..., first] = x[..., first] * cos - x[..., second] * sin
    y[..., second] = x[..., first] * sin + x[..., second] * cos
    return y


# The contenders of rotations. Each is given a case and its tables, and gives a function of q and k, both
# [tokens, heads, HEAD_DIM] and contiguous, or of one tensor of all heads where they are packed. It rotates in
# place and returns None, or returns what it made.


def in_torch(torch, case: Case, tables: Tables) -> Callable:
    """As models spell it, on [1, heads, tokens, HEAD_DIM]."""
    dtype = torch_dtype(torch, case.dtype)
    cos, sin = tables.twice(dtype, case.interleaved)

    def turned(x):
        if case.interleaved:
            return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)

    def rotate(q, k):
        q, k = (x.transpose(0, 1)[None] for x in (q, k))
        q, k = q * cos + turned(q) * sin, k * cos + turned(k) * sin
        return q[0].transpose(0, 1), k[0].transpose(0, 1)

    return rotate


def torch_eager(torch, case: Case, tables: Tables) -> Callable:
    return in_torch(torch, case, tables)


def torch_compiled(torch, case: Case, tables: Tables) -> Callable:
    if not case.is_usual:
        raise Missing("compiled for bf16 half-split alone, as each shape takes seconds")
    # Without it, shapes seen before would turn this one into a dynamic shape.
    torch.compiler.reset()
    return torch.compile(in_torch(torch, case, tables), dynamic=False)


def flash_attn(torch, case: Case, tables: Tables) -> Callable:
    apply = flash_attn_function()
    dtype = torch_dtype(torch, case.dtype)
    cos, sin = tables.cos.to(dtype), tables.sin.to(dtype)

    def rotate(*tensors):
        for x in tensors:
            apply(x[None], cos, sin, interleaved=case.interleaved, inplace=True)

    return rotate


def flash_attn_function() -> Callable:
    from flash_attn.ops.triton.rotary import apply_rotary

    return apply_rotary


def liger(torch, case: Case, tables: Tables) -> Callable:
    from liger_kernel.ops.rope import rope_forward

    if case.interleaved:
        raise Missing("half-split only")
    cos, sin = (table[None] for table in tables.twice(torch_dtype(torch, case.dtype), False))

    def rotate(q, k):
        # Seen as a model has them; the kernel undoes it.
        q, k, _, _ = rope_forward(q[None].transpose(1, 2), k[None].transpose(1, 2), cos, sin)
        return q[0].transpose(0, 1), k[0].transpose(0, 1)

    return rotate


def vllm(torch, case: Case, tables: Tables) -> Callable:
    from vllm._custom_ops import rotary_embedding

    cache = tables.cache(torch_dtype(torch, case.dtype))

    def rotate(q, k):
        q, k = (x.view(case.tokens, -1) for x in (q, k))
        rotary_embedding(tables.positions, q, k, HEAD_DIM, cache, not case.interleaved)

    return rotate


def flashinfer_cache(torch, case: Case, tables: Tables) -> Callable:
    from flashinfer.rope import apply_rope_with_cos_sin_cache_inplace

    cache = tables.cache(torch.float32)

    def rotate(q, k):
        q, k = (x.view(case.tokens, -1) for x in (q, k))
        apply_rope_with_cos_sin_cache_inplace(
            tables.positions, q, k, HEAD_DIM, cache, is_neox=not case.interleaved
        )

    return rotate


def flashinfer_angles(torch, case: Case, tables: Tables) -> Callable:
    from flashinfer.rope import apply_rope_pos_ids_inplace

    positions = tables.positions.int()
    options = {"interleave": case.interleaved, "rope_theta": THETA}
    return lambda q, k: apply_rope_pos_ids_inplace(q, k, positions, **options)


def sglang_rope():
    """The module of its kernels, which has moved (0.5.23 has it in the first place)."""
    try:
        from sglang.kernels.ops.attention import rope
    except ImportError:
        from sglang.jit_kernel import rope
    return rope


def sglang(torch, case: Case, tables: Tables) -> Callable:
    apply_rope_with_cos_sin_cache_inplace = sglang_rope().apply_rope_with_cos_sin_cache_inplace
    cache = tables.cache(torch.float32)
    is_neox = not case.interleaved
    return lambda q, k: apply_rope_with_cos_sin_cache_inplace(
        q, k, cache, tables.positions, is_neox=is_neox
    )


@dataclass(frozen=True)
class Contender:
    name: str
    # Distributions whose version says what was measured.
    packages: tuple[str, ...]
    make: Callable
    # Kernels of a call, about.
    launches: int = 1
    packed: bool = False
    # From compute capability 9.0 on.
    dependent: bool = False
    # Also without a GPU.
    anywhere: bool = False


CONTENDERS = (
    Contender("torch, rotate_half, eager", ("torch",), torch_eager, launches=10, anywhere=True),
    Contender("flash-attn (Triton), two launches", ("flash-attn", "triton"), flash_attn, launches=2),
    Contender(
        "flash-attn (Triton), q and k packed", ("flash-attn", "triton"), flash_attn, packed=True
    ),
    Contender("Liger (Triton)", ("liger-kernel", "triton"), liger),
    Contender("vLLM", ("vllm",), vllm),
    Contender("FlashInfer, cos/sin cache", ("flashinfer-python",), flashinfer_cache),
    Contender("FlashInfer, angles in the kernel", ("flashinfer-python",), flashinfer_angles),
    Contender("SGLang", ("sglang",), sglang, dependent=True),
    # Last, as it takes longest to get ready.
    Contender("torch, rotate_half, compiled", ("torch",), torch_compiled),
)


# Those of serving steps. Each is given a case and what all layers share, and gives a function of a layer. It
# writes the caches, and either rotates q where it is and returns None, or returns what it made of q.


class Shared:
    """Positions, slots, tables and weights, on the device: the same in all layers, as in a model."""

    def __init__(self, torch, case: StepCase, device: str):
        self.tables = Tables(torch, case.tokens, device)
        self.positions = self.tables.positions
        self.pages = -(-case.tokens // PAGE)
        slots = torch.arange(case.tokens, device=device) * SLOT_STRIDE
        self.slots = slots % (self.pages * PAGE)
        dims = torch.arange(HEAD_DIM, device=device) / HEAD_DIM
        self.gamma = (0.5 + dims).to(torch.bfloat16)
        self.scale = torch.tensor([SCALE], device=device)


class Layer:
    """Packed qkv and the caches of a layer; codes are bytes."""

    def __init__(self, torch, case: StepCase, pages: int, qkv):
        dtype = torch.uint8 if case.codes else torch.bfloat16
        shape = (pages, PAGE, STEP_HEADS[1], HEAD_DIM)
        self.qkv = qkv
        self.q, self.k, self.v = (
            x.unflatten(-1, (-1, HEAD_DIM))
            for x in qkv.split([heads * HEAD_DIM for heads in STEP_HEADS], -1)
        )
        self.caches = [torch.zeros(shape, dtype=dtype, device=qkv.device) for _ in range(2)]
        self.k_cache, self.v_cache = self.caches

    def fp8_caches(self, torch):
        return [cache.view(torch.float8_e4m3fn) for cache in self.caches]


def only(condition: bool, what: str) -> None:
    if not condition:
        raise Missing(what)


def step_in_torch(torch, case: StepCase, shared: Shared) -> Callable:
    """As models and caches spell it."""
    cos, sin = (table[:, None] for table in shared.tables.twice(torch.bfloat16, False))

    def rotated(x):
        if case.norms:
            # As transformers' models do it.
            y = x.float()
            y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + EPS)
            x = shared.gamma * y.to(x.dtype)
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    def coded(x):
        x = (x.float() / shared.scale).clamp(-448, 448)
        return x.to(torch.float8_e4m3fn).view(torch.uint8)

    def step(qkv, k_cache, v_cache):
        q, k, v = (
            x.unflatten(-1, (-1, HEAD_DIM))
            for x in qkv.split([heads * HEAD_DIM for heads in STEP_HEADS], -1)
        )
        q, k = rotated(q), rotated(k)
        if case.codes:
            k, v = coded(k), coded(v)
        k_cache.flatten(0, 1)[shared.slots] = k
        v_cache.flatten(0, 1)[shared.slots] = v
        return coded(q) if case.q_codes else q

    return step


def torch_step_eager(torch, case: StepCase, shared: Shared) -> Callable:
    step = step_in_torch(torch, case, shared)
    return lambda layer: step(layer.qkv, *layer.caches)


def torch_step_compiled(torch, case: StepCase, shared: Shared) -> Callable:
    torch.compiler.reset()
    step = torch.compile(step_in_torch(torch, case, shared), dynamic=False)
    return lambda layer: step(layer.qkv, *layer.caches)


def vllm_step(torch, case: StepCase, shared: Shared) -> Callable:
    """Its interfaces as of 0.33.0 (vllm/_custom_ops.py)."""
    from vllm import _custom_ops as ops

    only(not case.q_codes, "q stays in bf16")
    table = shared.tables.cache(torch.bfloat16)
    kind = "fp8" if case.codes else "auto"

    def step(layer):
        if case.norms:
            heads, weights = STEP_HEADS, (shared.gamma, shared.gamma)
            ops.fused_qk_norm_rope(
                layer.qkv, *heads, HEAD_DIM, EPS, *weights, table, True, shared.positions
            )
        else:
            q, k = (x.flatten(1) for x in (layer.q, layer.k))
            ops.rotary_embedding(shared.positions, q, k, HEAD_DIM, table, True)
        scales = (shared.scale, shared.scale)
        ops.reshape_and_cache_flash(layer.k, layer.v, *layer.caches, shared.slots, kind, *scales)

    return step


def sglang_rope_store(torch, case: StepCase, shared: Shared) -> Callable:
    rope = sglang_rope()
    only(not case.norms and not case.codes, "no norms and no codes")
    table = shared.tables.cache(torch.float32)

    def step(layer):
        caches = (cache.view(-1, STEP_HEADS[1] * HEAD_DIM) for cache in layer.caches)
        rope.apply_rope_inplace_with_kvcache(
            layer.q, layer.k, layer.v, *caches, table, shared.positions, shared.slots, is_neox=True
        )

    return step


def sglang_step(torch, case: StepCase, shared: Shared) -> Callable:
    """Two launches, as of 0.5.23."""
    only(case.norms or case.codes, "it is one launch there")
    # Its kernel of q, k and v together has no scale for q.
    only(not case.q_codes, "codes of q have no scale")
    rope = sglang_rope()
    if case.norms:
        from sglang.kernels.ops.attention.fused_qknorm_rope import fused_qk_norm_rope
    if case.codes:
        from sglang.kernels.ops.kvcache.fused_fp8_qkv_kv_cache import fused_fp8_qkv_kv_cache
    else:
        from sglang.kernels.ops.kvcache.kvcache import store_cache
    table = shared.tables.cache(torch.float32)
    positions = shared.positions.int()
    row = STEP_HEADS[1] * HEAD_DIM

    def step(layer):
        if case.norms:
            weights, no_yarn = (shared.gamma, shared.gamma), (1.0, 0.0, 0.0, 1.0)
            fused_qk_norm_rope(
                layer.qkv, *STEP_HEADS, HEAD_DIM, EPS, *weights, THETA, True, positions, *no_yarn
            )
        else:
            q, k = layer.q, layer.k
            rope.apply_rope_inplace(q, k, table, shared.positions, is_neox=True)
        if case.codes:
            caches, scales = layer.fp8_caches(torch), (shared.scale, shared.scale)
            fused_fp8_qkv_kv_cache(None, layer.k, layer.v, *caches, shared.slots, *scales)
        else:
            kv = (x.flatten(1) for x in (layer.k, layer.v))
            caches = (cache.view(-1, row) for cache in layer.caches)
            # Slot 0 is a token's as any other.
            store_cache(*kv, *caches, shared.slots, reserved_skip_index=-1)

    return step


class FlashInferPages:
    """Any slot for any token: each is a request of one page."""

    def __init__(self, torch, case: StepCase, shared: Shared):
        ids = torch.arange(case.tokens + 1, device=shared.slots.device, dtype=torch.int32)
        self.batch_indices, self.indptr = ids[:-1].contiguous(), ids
        self.indices = (shared.slots // PAGE).int()
        self.positions = (shared.slots % PAGE).int()
        self.last_page_len = self.positions + 1


def flashinfer_step(torch, case: StepCase, shared: Shared) -> Callable:
    """As of 0.7.2."""
    from flashinfer.page import append_paged_kv_cache
    from flashinfer.rope import apply_rope_with_cos_sin_cache_inplace

    only(not case.norms and not case.codes, "no norms and no codes")
    table = shared.tables.cache(torch.float32)
    pages = FlashInferPages(torch, case, shared)

    def step(layer):
        q, k = (x.flatten(1) for x in (layer.q, layer.k))
        apply_rope_with_cos_sin_cache_inplace(shared.positions, q, k, HEAD_DIM, table, is_neox=True)
        append_paged_kv_cache(
            layer.k,
            layer.v,
            pages.batch_indices,
            pages.positions,
            tuple(layer.caches),
            pages.indices,
            pages.indptr,
            pages.last_page_len,
        )

    return step


def flashinfer_fused(torch, case: StepCase, shared: Shared, dependent: bool) -> Callable:
    """As of 0.7.2."""
    from flashinfer.rope import rope_quantize_fp8_append_paged_kv_cache

    only(case.q_codes and not case.norms, "q becomes e4m3 too, and nothing is normed")
    table = shared.tables.cache(torch.float32)
    pages = FlashInferPages(torch, case, shared)

    def step(layer):
        q, _ = rope_quantize_fp8_append_paged_kv_cache(
            layer.q,
            layer.k,
            None,
            None,
            layer.v,
            table,
            shared.positions,
            tuple(layer.fp8_caches(torch)),
            pages.indices,
            pages.indptr,
            pages.batch_indices,
            pages.positions,
            quant_scale_q=1 / SCALE,
            quant_scale_kv=1 / SCALE,
            page_size=PAGE,
            enable_pdl=dependent,
        )
        return q

    return step


STEP_CONTENDERS = (
    Contender("torch, eager", ("torch",), torch_step_eager, launches=20, anywhere=True),
    Contender("vLLM, two launches", ("vllm",), vllm_step, launches=2),
    Contender("SGLang, one launch", ("sglang",), sglang_rope_store, dependent=True),
    Contender("SGLang, two launches", ("sglang",), sglang_step, launches=2),
    Contender("FlashInfer, two launches", ("flashinfer-python",), flashinfer_step, launches=2),
    Contender(
        "FlashInfer, one launch", ("flashinfer-python",), partial(flashinfer_fused, dependent=False)
    ),
    Contender(
        "FlashInfer, one dependent launch",
        ("flashinfer-python",),
        partial(flashinfer_fused, dependent=True),
        dependent=True,
    ),
    Contender("torch, compiled", ("torch",), torch_step_compiled, launches=3),
)


def step_expected(torch, case: StepCase, layer: Layer, shared: Shared) -> list:
    """q, k and v of the layer after the step, in f64, as they are before codes."""
    gamma = shared.gamma.double()
    tensors = []
    for x in (layer.q, layer.k):
        x = x.double()
        if case.norms:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * gamma
        tensors.append(expected(x, shared.tables.cos, shared.tables.sin, False))
    return [*tensors, layer.v.double()]


def values_of(torch, x, is_coded: bool):
    """As f64, and what a code stands for."""
    return x.view(torch.float8_e4m3fn).double() * SCALE if is_coded else x.double()


def check_step(torch, case: StepCase, layer: Layer, shared: Shared, step: Callable) -> None:
    """That q and the caches are what they should be, and slots without a token as before."""
    wanted = step_expected(torch, case, layer, shared)
    q = step(layer)
    q = layer.q if q is None else q
    in_slots = [cache.flatten(0, 1)[shared.slots] for cache in layer.caches]
    for name, got, want, is_coded in zip(
        ("q", "k", "v"), (q, *in_slots), wanted, (case.q_codes, case.codes, case.codes)
    ):
        error = (values_of(torch, got.reshape(want.shape), is_coded) - want).abs()
        room = TOLERANCE["bf16"] * want.abs().clamp(min=1)
        if is_coded:
            room = room + STEP_OF_E4M3 * want.abs()
        elif name == "v":
            room = 0 * room
        if not bool((error <= room).all()):
            raise ValueError(f"{name} is wrong by {float(error.max()):.3g}")
    for cache in layer.caches:
        untouched = cache.flatten(0, 1).clone()
        untouched[shared.slots] = 0
        if bool(untouched.any()):
            raise ValueError("a slot without a token was written")


def torch_dtype(torch, name: str):
    return {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[name]


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else repr(error)


def inputs(case: Case, flat, packed: bool) -> tuple:
    """q and k of one buffer, or the same memory as one tensor of all heads."""
    if packed:
        return (flat.view(case.tokens, sum(case.heads), HEAD_DIM),)
    parts = flat.split(case.lengths)
    return tuple(x.view(case.tokens, heads, HEAD_DIM) for x, heads in zip(parts, case.heads))


def check(case: Case, tables: Tables, flat, rotate: Callable, packed: bool) -> None:
    """That the first and the last tokens are what they should be."""
    edge = [t for t in range(case.tokens) if t < 3 or t >= case.tokens - 3]
    tensors = inputs(case, flat, packed)
    wanted = [
        expected(x[edge], tables.cos[edge], tables.sin[edge], case.interleaved) for x in tensors
    ]
    got = rotate(*tensors) or tensors
    error = max(float((y[edge].double() - want).abs().max()) for y, want in zip(got, wanted))
    if not error < TOLERANCE[case.dtype]:
        raise ValueError(f"the result is wrong by {error:.3g}")


class Timer:
    """Microseconds of one call by replays of a graph."""

    def __init__(self, torch, l2: int):
        self.torch = torch
        self.sweep = torch.empty(2 * l2, dtype=torch.uint8, device="cuda")
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replayed(self, number: int, cold: bool, call: Callable[[int], Any]) -> float:
        torch = self.torch
        # Whatever happens once must not be captured.
        for n in range(3):
            call(n)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for n in range(number):
                call(n)
        self.sample(graph, cold)
        samples, began = [], time.monotonic()
        while len(samples) < MOST_SAMPLES and (
            len(samples) < FEWEST_SAMPLES or time.monotonic() - began < SAMPLING_SECONDS
        ):
            samples.append(self.sample(graph, cold))
        return statistics.median(samples) / number

    def sample(self, graph, cold: bool) -> float:
        if cold:
            self.sweep.zero_()
        self.start.record()
        graph.replay()
        self.end.record()
        self.torch.cuda.synchronize()
        return self.start.elapsed_time(self.end) * 1e3


def measured(torch, timer: Timer, case, contender: Contender, count: int, call: Callable) -> list[dict]:
    """Rows of a contender whose call takes the number of one of so many buffers."""
    is_dependent = contender.dependent and torch.cuda.get_device_capability() >= (9, 0)
    rows = []
    for memory in case.memories:
        used = count if memory == "cold" else 1
        # What is returned is kept as long, so that it does not lie in the same memory each time.
        kept: list[Any] = [None] * used

        def numbered(n: int) -> None:
            kept[n % used] = call(n % used)

        number = calls(case.moved // 2, used, contender.launches)
        us = timer.replayed(number, memory == "cold", numbered)
        row = {
            "contender": contender.name,
            "kind": "peer",
            "shape": case.shape,
            "dtype": case.dtype,
            "pairing": case.pairing,
            "step": case.step,
            "tokens": case.tokens,
            "bytes": case.moved,
            "memory": memory,
            "launch": "dependent" if is_dependent else "ordinary",
            "timed": "graph",
            "us": round(us, 4),
        }
        rows.append({name: value for name, value in row.items() if value is not None})
    return rows


class Rotations:
    """The buffers of a case, and what its contenders take."""

    contenders = CONTENDERS

    def __init__(self, torch, case: Case, l2: int, device: str = "cuda"):
        self.torch, self.case = torch, case
        self.count = cold_buffers(case.bytes, l2)
        self.tables = Tables(torch, case.tokens, device)
        pairs = torch.rand(self.count, sum(case.lengths), device=device, dtype=torch.float32)
        self.pairs = pairs.mul_(2).sub_(1).to(torch_dtype(torch, case.dtype))

    def made(self, contender: Contender) -> Callable:
        return contender.make(self.torch, self.case, self.tables)

    def check(self, contender: Contender, rotate: Callable) -> None:
        check(self.case, self.tables, self.pairs[0].clone(), rotate, contender.packed)

    def call(self, contender: Contender, rotate: Callable) -> Callable[[int], Any]:
        tensors = [inputs(self.case, flat, contender.packed) for flat in self.pairs]
        return lambda n: rotate(*tensors[n])


class Steps:
    """The layers of a case, and what its contenders take."""

    contenders = STEP_CONTENDERS

    def __init__(self, torch, case: StepCase, l2: int, device: str = "cuda"):
        self.torch, self.case = torch, case
        self.count = cold_buffers(2 * case.qkv, l2)
        self.shared = Shared(torch, case, device)
        qkv = torch.rand(self.count, case.tokens, case.qkv // case.tokens, device=device)
        qkv = qkv.mul_(2).sub_(1).to(torch.bfloat16)
        self.layers = [self.layer(x) for x in qkv]

    def layer(self, qkv) -> Layer:
        return Layer(self.torch, self.case, self.shared.pages, qkv)

    def made(self, contender: Contender) -> Callable:
        return contender.make(self.torch, self.case, self.shared)

    def check(self, contender: Contender, step: Callable) -> None:
        layer = self.layer(self.layers[0].qkv.clone())
        check_step(self.torch, self.case, layer, self.shared, step)

    def call(self, contender: Contender, step: Callable) -> Callable[[int], Any]:
        return lambda n: step(self.layers[n])


def work() -> list:
    """All cases, those first that say most: time may run out."""
    rotations = cases()
    usual = [case for case in rotations if case.is_usual]
    return usual + step_cases() + [case for case in rotations if not case.is_usual]


def buffers_of(torch, case, l2: int, device: str = "cuda"):
    return (Rotations if isinstance(case, Case) else Steps)(torch, case, l2, device)


def run(torch, path: Path, results: dict, deadline: float) -> int:
    """How many figures were added."""
    l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20)
    timer = Timer(torch, l2)
    rows: list[dict] = []
    versions: dict[str, str] = {}
    skipped: dict[str, None] = {}
    without: set[str] = set()
    for case in work():
        if time.monotonic() > deadline:
            skipped[f"peers, {case}: no time was left"] = None
            continue
        print(case, flush=True)
        buffers = buffers_of(torch, case, l2)
        for contender in buffers.contenders:
            if contender.name in without:
                continue
            if time.monotonic() > deadline:
                skipped[f"{contender.name}, {case}: no time was left"] = None
                continue
            try:
                function = buffers.made(contender)
                buffers.check(contender, function)
                call = buffers.call(contender, function)
                rows += measured(torch, timer, case, contender, buffers.count, call)
                found = {package: version(package) for package in contender.packages}
                versions |= {package: number for package, number in found.items() if number}
            except ImportError as error:
                skipped[f"{contender.name}: {reason(error)}"] = None
                without.add(contender.name)
            except Missing as error:
                skipped[f"{contender.name}: {reason(error)}"] = None
            # A package may fail in any way; the others go on.
            except Exception as error:
                skipped[f"{contender.name}, {case}: {reason(error)}"] = None
        del buffers
        torch.cuda.empty_cache()
        save(path, merged(results, rows, versions, list(skipped)))
    for line in skipped:
        print(f"not measured: {line}")
    return len(rows)


def dry_run(torch) -> int:
    """Lists what would be measured, without a GPU. Whether what torch computes there was right."""
    wrong = 0
    seen: set[tuple] = set()
    without: set[str] = set()
    for case in work():
        # Once for each kind of case, at a number of tokens that does not fill the last page.
        small = replace(case, tokens=35)
        for contender in CONTENDERS if isinstance(case, Case) else STEP_CONTENDERS:
            if contender.name in without or (small, contender.name) in seen:
                continue
            seen.add((small, contender.name))
            what = f"{contender.name}, {case.step or case.shape}, {case.dtype} {case.pairing}"
            try:
                buffers = buffers_of(torch, small, 1, "cpu")
                function = buffers.made(contender)
                found = (f"{package} {version(package)}" for package in contender.packages)
                line = f"would be measured: {what} ({', '.join(found)})"
                if contender.anywhere:
                    buffers.check(contender, function)
                    line += ", and is right here"
                print(line)
            except ImportError as error:
                without.add(contender.name)
                print(f"would be skipped: {contender.name}: {reason(error)}")
            except Missing as error:
                print(f"would be skipped: {what}: {reason(error)}")
            except Exception as error:
                print(f"would fail: {what}: {reason(error)}")
                wrong += contender.anywhere
    return 1 if wrong else 0


KEY = ("contender", "shape", "dtype", "pairing", "step", "tokens", "memory", "launch", "timed")


def merged(results: dict, rows: list[dict], versions: dict[str, str], skipped: list[str]) -> dict:
    """The results with what was measured now in the place of what was there of the same."""
    key = lambda row: tuple(row.get(name) for name in KEY)  # noqa: E731
    new = {key(row) for row in rows}
    meta = results["meta"]
    names = {contender.name for contender in CONTENDERS + STEP_CONTENDERS} | {"peers"}
    earlier = [line for line in meta["skipped"] if not any(line.startswith(n) for n in names)]
    return {
        "meta": meta
        | {
            "versions": dict(sorted((meta["versions"] | versions).items())),
            "skipped": earlier + skipped,
        },
        "rows": [row for row in results["rows"] if key(row) not in new] + rows,
    }


def save(path: Path, results: dict) -> None:
    """As benches/cuda/results.rs writes it, a line for each row; whole, or not at all."""
    meta = json.dumps(results["meta"], indent=2, ensure_ascii=False)
    rows = ",\n".join(
        json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in results["rows"]
    )
    beside = path.with_name(path.name + ".new")
    beside.write_text(f'{{\n"meta": {meta},\n"rows": [\n{rows}\n]\n}}\n')
    os.replace(beside, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="?", help="what the GPU bench has written")
    parser.add_argument("--seconds", type=float, default=220, help="begin nothing after so long")
    parser.add_argument("--dry-run", action="store_true", help="list what would be measured")
    arguments = parser.parse_args()
    if arguments.results is None and not arguments.dry_run:
        parser.error("which results?")
    deadline = time.monotonic() + arguments.seconds
    if not arguments.dry_run:
        try:
            results = json.loads(arguments.results.read_text())
        except (OSError, ValueError) as error:
            print(f"gpu-peers: {arguments.results}: {error}", file=sys.stderr)
            return 2
    try:
        import torch
    except ImportError as error:
        print(f"no peers can be measured: {error}")
        return 3
    if arguments.dry_run:
        return dry_run(torch)
    if not torch.cuda.is_available():
        print("no GPU: nothing to measure")
        return 3
    device = torch.cuda.get_device_name(0)
    if device != results["meta"]["device"]:
        there = results["meta"]["device"]
        print(f"gpu-peers: the results are of {there}, this is {device}", file=sys.stderr)
        return 2
    count = run(torch, arguments.results, results, deadline)
    print(f"{count} figures of peers are in {arguments.results}")
    return 0 if count else 1


if __name__ == "__main__":
    sys.exit(main())
