#!/usr/bin/env python3
"""Make tests/goldens/diffusers/wan.safetensors: the angles of Wan's video transformer.

What
----
The rows that diffusers' WanRotaryPosEmbed gives for a small video, one row a
patch, for head_dim 128 and 96 (Wan 2.1 has 128):

    head_<dim>.position_ids   [3, tokens]  i64: frame, row, column
    head_<dim>.cos, .sin      [tokens, dim / 2]  f32, one column a pair

Wan pairs interleaved, (2i, 2i + 1): its attention takes every second column of
cos and of sin, as is done here.

How to run
----------
    python3 -m venv goldens-venv
    . goldens-venv/bin/activate
    pip install -r scripts/goldens/requirements-diffusers.txt
    python scripts/goldens/diffusers-wan.py            # write
    python scripts/goldens/diffusers-wan.py --check    # recompute, compare the bytes
"""

import diffusers
import numpy as np
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

from golden_files import golden, run

PATCH = (1, 2, 2)
GRID = (2, 3, 3)
LENGTH = 1024


def compute():
    tensors = {}
    for dim in (128, 96):
        module = WanRotaryPosEmbed(dim, PATCH, LENGTH)
        frames, height, width = (n * p for n, p in zip(GRID, PATCH))
        cos, sin = module(torch.zeros(1, 1, frames, height, width))
        tensors[f"head_{dim}.cos"] = cos[0, :, 0, 0::2].float().numpy()
        tensors[f"head_{dim}.sin"] = sin[0, :, 0, 1::2].float().numpy()
        axes = np.meshgrid(*map(np.arange, GRID), indexing="ij")
        positions = np.stack([axis.reshape(-1) for axis in axes]).astype(np.int64)
        tensors[f"head_{dim}.position_ids"] = positions
    case = {"patch_size": PATCH, "grid": GRID, "max_seq_len": LENGTH, "theta": 10000.0}
    peer = f"diffusers {diffusers.__version__}"
    data = golden("wan", tensors, peer=peer, case=case, made_by="diffusers-wan.py")
    return {"wan.safetensors": data}


if __name__ == "__main__":
    torch.set_num_threads(1)
    run("Make Wan's golden file; see the top of this file.", "diffusers", "wan", compute)
