"""Rotary embedding of the Python packages that this machine has, added to the results of phasor's GPU bench.

As benches/cuda does it: each call is captured many times in a CUDA graph over buffers that do not fit into
L2 together (or over one), and replays are timed between events. Every contender is first checked against a
computation in f64; what is missing or fails is listed with its reason. scripts/gpu-peers runs this with a
time limit.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
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

# Of values between -1 and 1. Tables in 16 bits and angles in f32 are meant to pass, at positions up to
# 34,000; a wrong pairing or position is not.
TOLERANCE = {"f32": 2e-2, "f16": 3e-2, "bf16": 6e-2}


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
    def shape(self) -> str:
        return f"{self.heads[0]}+{self.heads[1]} heads of {HEAD_DIM}"

    @property
    def memories(self) -> tuple[str, ...]:
        return ("cold", "l2") if self.tokens <= 256 else ("cold",)

    def __str__(self) -> str:
        return f"{self.shape}, {self.dtype} {self.pairing}, tokens: {self.tokens}"


def cases() -> list[Case]:
    """Those first that say most, as time may run out."""
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


# The contenders. Each is given a case and its tables, and gives a function of q and k, both
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


def sglang(torch, case: Case, tables: Tables) -> Callable:
    from sglang.jit_kernel.rope import apply_rope_with_cos_sin_cache_inplace

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


CONTENDERS = (
    Contender("torch, rotate_half, eager", ("torch",), torch_eager, launches=10),
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


def measure(torch, timer: Timer, case: Case, tables: Tables, pairs, contender: Contender) -> list[dict]:
    rotate = contender.make(torch, case, tables)
    check(case, tables, pairs[0].clone(), rotate, contender.packed)
    tensors = [inputs(case, flat, contender.packed) for flat in pairs]
    is_dependent = contender.dependent and torch.cuda.get_device_capability() >= (9, 0)
    rows = []
    for memory in case.memories:
        used = tensors if memory == "cold" else tensors[:1]
        # What is returned is kept as long, so that it does not lie in the same memory each time.
        kept: list[Any] = [None] * len(used)

        def call(n: int) -> None:
            kept[n % len(used)] = rotate(*used[n % len(used)])

        number = calls(case.bytes, len(used), contender.launches)
        us = timer.replayed(number, memory == "cold", call)
        rows.append(
            {
                "contender": contender.name,
                "kind": "peer",
                "shape": case.shape,
                "dtype": case.dtype,
                "pairing": case.pairing,
                "tokens": case.tokens,
                "memory": memory,
                "launch": "dependent" if is_dependent else "ordinary",
                "timed": "graph",
                "us": round(us, 4),
            }
        )
    return rows


def run(torch, path: Path, results: dict, deadline: float) -> int:
    """How many figures were added."""
    l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20)
    timer = Timer(torch, l2)
    rows: list[dict] = []
    versions: dict[str, str] = {}
    skipped: dict[str, None] = {}
    without: set[str] = set()
    for case in cases():
        if time.monotonic() > deadline:
            skipped[f"peers, {case}: no time was left"] = None
            continue
        print(case, flush=True)
        tables = Tables(torch, case.tokens, "cuda")
        count = cold_buffers(case.bytes, l2)
        pairs = torch.rand(count, sum(case.lengths), device="cuda", dtype=torch.float32)
        pairs = pairs.mul_(2).sub_(1).to(torch_dtype(torch, case.dtype))
        for contender in CONTENDERS:
            if contender.name in without:
                continue
            if time.monotonic() > deadline:
                skipped[f"{contender.name}, {case}: no time was left"] = None
                continue
            try:
                rows += measure(torch, timer, case, tables, pairs, contender)
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
        del pairs
        torch.cuda.empty_cache()
        save(path, merged(results, rows, versions, list(skipped)))
    for line in skipped:
        print(f"not measured: {line}")
    return len(rows)


KEY = ("contender", "shape", "dtype", "pairing", "tokens", "memory", "launch", "timed")


def merged(results: dict, rows: list[dict], versions: dict[str, str], skipped: list[str]) -> dict:
    """The results with what was measured now in the place of what was there of the same."""
    key = lambda row: tuple(row[name] for name in KEY)  # noqa: E731
    new = {key(row) for row in rows}
    meta = results["meta"]
    names = {contender.name for contender in CONTENDERS} | {"peers"}
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
    parser.add_argument("results", type=Path, help="what the GPU bench has written")
    parser.add_argument("--seconds", type=float, default=220, help="begin nothing after so long")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
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
