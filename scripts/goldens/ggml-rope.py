#!/usr/bin/env python3
"""Make tests/goldens/ggml/*.safetensors: what ggml's CPU backend rotates.

What
----
Each file is one call of ggml_rope_ext, ggml_rope_multi or the backward pass of one, run
on one thread:

    x               [tokens, heads, head_dim]         f32 or f16, the input
                    (one case: [batch, tokens, heads, head_dim])
    rotated         like x
    position_ids    [tokens], or [4, tokens] (t, h, w, e) of ggml_rope_multi   i32
    freq_factors    [n_dims/2]  f32, where the call had them (ggml's tensor c)
    cos, sin        [tokens, pairs]  f32, ggml's own factors with its magnitude
                    multiplied in, read off by rotating (1, 0) in every pair,
                    forward in every case

The metadata: "peer" is the library and its version, "case" is JSON with every
argument under ggml's name. Channels of pair i, as "pairs" in the case says:
"adjacent" (2i, 2i + 1), "half" (i, i + n_dims/2), "whole" (i, i + head_dim/2).
Channels that belong to no pair are passed through.

How to run
----------
    python3 -m venv goldens-venv
    . goldens-venv/bin/activate
    pip install --no-deps -r scripts/goldens/requirements-ggml.txt
    python scripts/goldens/ggml-rope.py            # write
    python scripts/goldens/ggml-rope.py --check    # recompute, compare the bytes

The inputs are seeded by the case's name. ggml takes cosf, sinf and powf from
the system's libm, so another libm may round a last bit differently.
"""

import ctypes
import math
import sys
from importlib.metadata import distribution

import numpy as np
from golden_files import golden, run, seeded

GGML_VERSION = "0.13.1"

NORMAL, NEOX, MROPE, VISION, IMROPE = 0, 2, 8, 24, 40
# enum ggml_type
F32, F16, I32 = 0, 1, 26
TYPES = {"f32": (F32, np.float32), "f16": (F16, np.float16)}

POSITIONS = [0, 1, 7, 100, 4095, 100000]
# Axes that differ from each other, so that a mixed-up axis shows.
AXES = [
    [0, 1, 7, 100, 4095, 100000],
    [0, 3, 5, 61, 2047, 50001],
    [0, 2, 11, 37, 1023, 25003],
    [0, 5, 2, 19, 511, 12007],
]
# A vision tower passes row, column, row, column, all of them small.
PATCHES = [
    [0, 0, 1, 7, 31, 100],
    [0, 1, 0, 3, 63, 99],
    [0, 0, 1, 7, 31, 100],
    [0, 1, 0, 3, 63, 99],
]


class InitParams(ctypes.Structure):
    """struct ggml_init_params"""

    _fields_ = [
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    ]


class Ggml:
    """The few functions of ggml that a one-node graph needs."""

    def __init__(self):
        files = distribution("pywhispercpp").files

        def load(stem):
            found = [f for f in files if f.parts[0] == "pywhispercpp.libs" and stem in f.name]
            return ctypes.CDLL(str(found[0].locate()))

        base, cpu = load("libggml-base-"), load("libggml-cpu-")
        pointer, integer, number = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
        yarn = [integer, integer] + [number] * 6

        def bind(library, name, result, *arguments):
            function = getattr(library, name)
            function.restype, function.argtypes = result, list(arguments)
            return function

        self.version = bind(base, "ggml_version", ctypes.c_char_p)().decode()
        self.init = bind(base, "ggml_init", pointer, InitParams)
        self.free = bind(base, "ggml_free", None, pointer)
        self.new_tensor = bind(
            base, "ggml_new_tensor", pointer, pointer, integer, integer, pointer
        )
        self.get_data = bind(base, "ggml_get_data", pointer, pointer)
        self.new_graph = bind(base, "ggml_new_graph", pointer, pointer)
        self.expand = bind(base, "ggml_build_forward_expand", None, pointer, pointer)
        self.rope_ext = bind(base, "ggml_rope_ext", pointer, *[pointer] * 4, integer, *yarn)
        self.rope_multi = bind(
            base, "ggml_rope_multi", pointer, *[pointer] * 4, integer, integer * 4, *yarn
        )
        self.rope_ext_back = bind(
            base, "ggml_rope_ext_back", pointer, *[pointer] * 4, integer, *yarn
        )
        self.rope_multi_back = bind(
            base, "ggml_rope_multi_back", pointer, *[pointer] * 4, integer, integer * 4, *yarn
        )
        self.compute = bind(
            cpu, "ggml_graph_compute_with_ctx", integer, pointer, pointer, integer
        )

    def rope(self, case, x, position_ids, freq_factors, back=False):
        """Run one call on `x`, [(batch,) tokens, heads, head_dim]."""
        context = self.init(InitParams(4 << 20, None, False))
        kinds = {np.dtype(t): n for n, t in TYPES.values()} | {np.dtype(np.int32): I32}

        def tensor(array):
            # ggml names the innermost dimension first.
            shape = (ctypes.c_int64 * array.ndim)(*array.shape[::-1])
            made = self.new_tensor(context, kinds[array.dtype], array.ndim, shape)
            ctypes.memmove(self.get_data(made), array.ctypes.data, array.nbytes)
            return made

        tensors = [
            context,
            tensor(x),
            tensor(position_ids.reshape(-1)),
            None if freq_factors is None else tensor(freq_factors),
        ]
        yarn = [case[name] for name in (
            "mode", "n_ctx_orig", "freq_base", "freq_scale", "ext_factor", "attn_factor",
            "beta_fast", "beta_slow",
        )]
        if "sections" in case:
            sections = (ctypes.c_int * 4)(*case["sections"])
            function = self.rope_multi_back if back else self.rope_multi
            node = function(*tensors, case["n_dims"], sections, *yarn)
        else:
            function = self.rope_ext_back if back else self.rope_ext
            node = function(*tensors, case["n_dims"], *yarn)
        graph = self.new_graph(context)
        self.expand(graph, node)
        if self.compute(context, graph, 1) != 0:
            sys.exit("error: ggml could not compute the graph")
        result = np.empty_like(x)
        ctypes.memmove(result.ctypes.data, self.get_data(node), result.nbytes)
        self.free(context)
        return result


def llama3_factors(head_dim, theta, factor, low, high, original):
    """Llama 3's scaling as the divisors that a GGUF file stores."""
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (original / wavelength - low) / (high - low)
    blended = 1 / ((1 - smooth) / factor + smooth)
    divisors = np.where(
        wavelength < original / high, 1.0, np.where(wavelength > original / low, factor, blended)
    )
    return divisors.astype(np.float32)


def longrope_factors(first, last, bend):
    """48 made-up divisors of the shape that Phi-3.5's have: rising, two decimals."""
    steps = np.arange(48) / 47
    return np.round(first * (last / first) ** (steps**bend), 2).astype(np.float32)


def call(head_dim, mode, *, n_dims=None, heads=1, batch=None, type="f32", position_ids=None,
         sections=None, freq_factors=None, back=False, **yarn):
    """A case: ggml's arguments, with the header's values for a plain rotation."""
    if position_ids is None:
        position_ids = POSITIONS if sections is None else AXES
    op = "ggml_rope_ext" if sections is None else "ggml_rope_multi"
    case = {
        "op": op + ("_back" if back else ""),
        "type": type,
        "batch": batch,
        "tokens": len(np.atleast_2d(position_ids)[0]),
        "heads": heads,
        "head_dim": head_dim,
        "n_dims": head_dim if n_dims is None else n_dims,
        "mode": mode,
        "pairs": {NORMAL: "adjacent", VISION: "whole"}.get(mode, "half"),
        "n_ctx_orig": 4096,
        "freq_base": 10000.0,
        "freq_scale": 1.0,
        "ext_factor": 0.0,
        "attn_factor": 1.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    } | yarn
    if sections is not None:
        case["sections"] = sections
    return case, np.array(position_ids, np.int32), freq_factors


def cases():
    llama31 = llama3_factors(128, 500000.0, 8.0, 1.0, 4.0, 8192)
    llama32 = llama3_factors(64, 500000.0, 32.0, 1.0, 4.0, 8192)
    short, long = longrope_factors(1.0, 2.8, 1.6), longrope_factors(1.08, 64.8, 0.8)
    # sqrt(1 + ln 32 / ln 4096), Phi-3.5-mini's and Phi-4-mini's
    phi_attention = math.sqrt(1 + math.log(32) / math.log(4096))
    # Takes back the 1 + 0.1 ln(factor) that ext_factor brings, as DeepSeek needs.
    deepseek_attention = 1 / (1 + 0.1 * math.log(40))
    qwen_yarn = {"n_ctx_orig": 32768, "freq_base": 1e6, "freq_scale": 0.25}
    return {
        "normal_f32": call(128, NORMAL, heads=2),
        "normal_f16": call(128, NORMAL, heads=2, type="f16"),
        "neox_f32": call(128, NEOX, heads=2),
        "neox_f16": call(128, NEOX, heads=2, type="f16"),
        "neox_batch_of_2": call(64, NEOX, batch=2),
        "normal_negative_positions": call(
            64, NORMAL, position_ids=[-1, -7, -100, -4095, -100000]
        ),
        "normal_partial_64_of_128": call(128, NORMAL, n_dims=64),
        "neox_partial_32_of_80": call(80, NEOX, n_dims=32),
        "neox_linear_8": call(128, NEOX, freq_base=1e6, freq_scale=0.125),
        "normal_llama31_8b": call(
            128, NORMAL, freq_base=500000.0, n_ctx_orig=131072, freq_factors=llama31
        ),
        "normal_llama32_1b": call(
            64, NORMAL, freq_base=500000.0, n_ctx_orig=131072, freq_factors=llama32
        ),
        "neox_longrope_short": call(
            96, NEOX, attn_factor=phi_attention, freq_factors=short
        ),
        "neox_longrope_long_96_of_128": call(
            128, NEOX, n_dims=96, attn_factor=phi_attention, freq_factors=long
        ),
        "neox_yarn_qwen25": call(128, NEOX, ext_factor=1.0, **qwen_yarn),
        "neox_yarn_half_ext": call(128, NEOX, ext_factor=0.5, **qwen_yarn),
        "neox_yarn_attn_factor": call(128, NEOX, ext_factor=1.0, attn_factor=0.75, **qwen_yarn),
        "neox_yarn_gpt_oss": call(
            64, NEOX, freq_base=150000.0, freq_scale=1 / 32, ext_factor=1.0
        ),
        "normal_yarn_deepseek_v3": call(
            64, NORMAL, freq_scale=1 / 40, ext_factor=1.0, attn_factor=deepseek_attention
        ),
        # Both limits of the ramp fall onto 0: a short original context.
        "neox_yarn_low_meets_high": call(
            64, NEOX, n_ctx_orig=5, freq_scale=0.25, ext_factor=1.0
        ),
        "neox_yarn_with_freq_factors": call(
            64, NEOX, freq_base=500000.0, freq_scale=0.5, ext_factor=1.0, n_ctx_orig=8192,
            freq_factors=llama32,
        ),
        "mrope_qwen2_vl": call(128, MROPE, freq_base=1e6, sections=[16, 24, 24, 0]),
        "mrope_four_axes_f16": call(128, MROPE, type="f16", sections=[20, 16, 16, 12]),
        # 24 of 64 pairs are named: the sections start over at pairs 24 and 48.
        "mrope_sections_wrap": call(128, MROPE, sections=[8, 10, 6, 0]),
        "mrope_yarn": call(128, MROPE, ext_factor=1.0, sections=[16, 24, 24, 0], **qwen_yarn),
        "imrope_qwen3_vl": call(128, IMROPE, freq_base=5e6, sections=[24, 20, 20, 0]),
        "imrope_qwen35_64_of_256": call(
            256, IMROPE, n_dims=64, freq_base=1e7, sections=[11, 11, 10, 0],
            position_ids=[axis[:5] for axis in AXES],
        ),
        # Pairs that no interleaved axis claims read the fourth one.
        "imrope_fourth_axis": call(128, IMROPE, sections=[16, 20, 12, 16]),
        "vision_qwen2_vl": call(
            80, VISION, n_dims=40, sections=[20, 20, 20, 20], position_ids=PATCHES,
            n_ctx_orig=32768,
        ),
        "vision_two_sections": call(
            64, VISION, n_dims=32, sections=[16, 16, 0, 0], position_ids=PATCHES
        ),
        "vision_four_sections": call(64, VISION, n_dims=32, sections=[8, 8, 8, 8]),
        "vision_uneven_f16": call(
            64, VISION, n_dims=32, sections=[4, 10, 12, 6], type="f16"
        ),
        "normal_back_f16": call(64, NORMAL, n_dims=48, heads=2, type="f16", back=True),
        "neox_back_yarn": call(64, NEOX, ext_factor=1.0, back=True, **qwen_yarn),
        "neox_back_llama32": call(
            64, NEOX, freq_base=500000.0, freq_factors=llama32, back=True
        ),
        "mrope_back": call(64, MROPE, sections=[8, 12, 12, 0], back=True),
        "mrope_batch_of_2": call(32, MROPE, sections=[4, 6, 6, 0], batch=2),
        "vision_back": call(
            64, VISION, n_dims=32, sections=[16, 16, 0, 0], position_ids=PATCHES, back=True
        ),
    }


def unit_pairs(case, tokens):
    """x with (1, 0) in every pair, and where the pairs' channels are."""
    rotary = case["head_dim"] if case["pairs"] == "whole" else case["n_dims"]
    pair = np.arange(rotary // 2)
    if case["pairs"] == "adjacent":
        first, second = 2 * pair, 2 * pair + 1
    else:
        first, second = pair, pair + rotary // 2
    x = np.zeros((tokens, 1, case["head_dim"]), np.float32)
    x[..., first] = 1
    return x, first, second


def compute(ggml, name):
    case, position_ids, freq_factors = cases()[name]
    tokens = case["tokens"]
    shape = (tokens, case["heads"], case["head_dim"])
    if case["batch"] is not None:
        shape = (case["batch"], *shape)
    x = seeded(name).standard_normal(shape).astype(TYPES[case["type"]][1])
    unit, first, second = unit_pairs(case, tokens)
    factors = ggml.rope(case, unit, position_ids, freq_factors)[:, 0]
    tensors = {
        "x": x,
        "rotated": ggml.rope(
            case, x, position_ids, freq_factors, back=case["op"].endswith("_back")
        ),
        "position_ids": position_ids,
        "cos": factors[:, first],
        "sin": factors[:, second],
    }
    if freq_factors is not None:
        tensors["freq_factors"] = freq_factors
    return golden(
        name,
        tensors,
        peer=f"ggml {ggml.version} (CPU backend, in pywhispercpp "
        f"{distribution('pywhispercpp').version})",
        case=case,
        made_by="ggml-rope.py",
    )


def every_case():
    ggml = Ggml()
    if ggml.version != GGML_VERSION:
        sys.exit(f"error: this is ggml {ggml.version}, not {GGML_VERSION}")
    return {f"{name}.safetensors": compute(ggml, name) for name in cases()}


if __name__ == "__main__":
    run("Make ggml's golden files; see the top of this file.", "ggml", "", every_case)
