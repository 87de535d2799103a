#!/usr/bin/env python3
"""Make crates/phasor-attention/tests/goldens/gguf/*: blocks of GGUF's formats, and their values.

What
----
    blocks  u8, random bytes but for the scales in f16, which are finite; the first block has a zero
            scale, and the second one that is subnormal
    values  f32, by dequantize of the package gguf

How to run
----------
    python3 -m venv goldens-venv
    . goldens-venv/bin/activate
    pip install -r scripts/goldens/requirements-gguf.txt
    python scripts/goldens/gguf-quants.py            # write
    python scripts/goldens/gguf-quants.py --check    # recompute, compare the bytes
"""

import sys
from importlib.metadata import version

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

sys.dont_write_bytecode = True
from golden_files import ATTENTION_GOLDENS, golden, run, seeded

PEER = f"gguf {version('gguf')}"
# Where the scales of a block are.
SCALES = {"Q4_0": [0], "Q8_0": [0], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}
ELEMENTS = 2048


def compute():
    files = {}
    for name, offsets in SCALES.items():
        kind = GGMLQuantizationType[name]
        elements, size = GGML_QUANT_SIZES[kind]
        count = ELEMENTS // elements
        random = seeded(name)
        blocks = random.integers(0, 256, (count, size), np.uint8)
        for at in offsets:
            scales = (random.standard_normal(count) / 10).astype(np.float16)
            scales[:2] = 0, 3e-7
            blocks[:, at:at + 2] = scales.view(np.uint8).reshape(count, 2)
        values = dequantize(blocks, kind).astype(np.float32)
        assert np.isfinite(values).all()
        files[f"{name}.safetensors"] = golden(
            name, {"blocks": blocks.reshape(-1), "values": values.reshape(-1)}, peer=PEER, case={},
            made_by="gguf-quants.py")
    return files


if __name__ == "__main__":
    run(__doc__.splitlines()[0], ATTENTION_GOLDENS / "gguf", "", compute)
