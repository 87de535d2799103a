#!/usr/bin/env python3
"""Make crates/phasor-attention/tests/goldens/torch/*: GPTQ and float8 matrices, by torch's tensor code.

What
----
gptq_*: a 4-bit matrix as checkpoints have it, and its values, (nibble - zero) scale, in f32

    qweight [in / 8, out], qzeros [groups, out / 8]  i32;  scales [groups, out]  f16
    g_idx   [in]  i32, where the case has it
    values  [out, in]  f32

fp8_*: activations that become e4m3 and back, and weights likewise

    x       [tokens, in]   f32;  x_back  the same once they were codes
    codes   [out, in]  u8;  weight_scales  f32;  weights  [out, in]  their values
    y       [tokens, out]  f32: the product of x_back and weights, in f64, then rounded

How to run
----------
    python3 -m venv goldens-venv
    . goldens-venv/bin/activate
    pip install -r scripts/goldens/requirements-transformers.txt
    python scripts/goldens/torch-quants.py            # write
    python scripts/goldens/torch-quants.py --check    # recompute, compare the bytes
"""

import sys
from importlib.metadata import version

import numpy as np
import torch

sys.dont_write_bytecode = True
from golden_files import ATTENTION_GOLDENS, golden, run, seeded

PEER = f"torch {version('torch')} (CPU)"
E4M3 = torch.float8_e4m3fn


def packed(nibbles, dim):
    """Eight to a word along a dim, the first in the lowest bits."""
    shape = list(nibbles.shape)
    shape[dim:dim + 1] = [shape[dim] // 8, 8]
    shifts = torch.arange(8) * 4
    view = [1] * len(shape)
    view[dim + 1] = 8
    words = (nibbles.reshape(shape).long() << shifts.reshape(view)).sum(dim + 1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def gptq(name, *, inputs, outputs, group_size, act_order, v2, symmetric):
    random = seeded(name)
    groups = -(-inputs // group_size)
    nibbles = torch.from_numpy(random.integers(0, 16, (inputs, outputs)))
    zeros = torch.full((groups, outputs), 8)
    if not symmetric:
        zeros = torch.from_numpy(random.integers(1, 16, (groups, outputs)))
    scales = torch.from_numpy(random.standard_normal((groups, outputs)) / 50).half()
    g_idx = torch.arange(inputs) // group_size
    if act_order:
        g_idx = g_idx[torch.from_numpy(random.permutation(inputs))]
    values = scales.float()[g_idx] * (nibbles - zeros[g_idx]).float()
    tensors = {
        "qweight": packed(nibbles, 0).numpy(),
        "qzeros": packed(zeros - (0 if v2 else 1), 1).numpy(),
        "scales": scales.numpy(),
        "values": values.T.contiguous().numpy(),
    }
    if act_order:
        tensors["g_idx"] = g_idx.int().numpy()
    case = {"in_features": inputs, "out_features": outputs, "group_size": group_size, "v2": v2}
    return golden(name, tensors, peer=PEER, case=case, made_by="torch-quants.py")


def to_codes(x, scale):
    """By a multiplier, as MAX has it."""
    inverse = 1 / scale
    inverse = torch.where(torch.isfinite(inverse), inverse, torch.zeros(()))
    return (x * inverse).clamp(-448, 448).to(E4M3)


def blocks_of(scales, block, shape):
    scales = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return scales[:shape[0], :shape[1]]


def fp8(name, *, activation, weight, block=None):
    random = seeded(name)
    tokens, inputs, outputs = 3, 40, 24

    def draw(*shape):
        return torch.from_numpy(random.standard_normal(shape).astype(np.float32))

    x = draw(tokens, inputs) * 5
    x[1] = 0
    x[2, 7] = 3000
    w = draw(outputs, inputs) / 10
    case = {"in_features": inputs, "out_features": outputs, "activation": activation, "weight": weight}
    if activation == "static":
        scale = torch.tensor(0.03)
        case["scale"] = scale.item()
    elif activation == "per_token":
        scale = x.abs().amax(1, keepdim=True).clamp(max=1200) / 448
        scale = scale.bfloat16().float()
    else:
        parts = torch.nn.functional.pad(x, (0, -inputs % block[1])).reshape(tokens, -1, block[1])
        scale = blocks_of(parts.abs().amax(2) / 448, [1, block[1]], x.shape)
        case["block"] = block
    x_back = to_codes(x, scale).float() * scale
    if weight == "tensor":
        weight_scale = (w.abs().max() / 448).reshape(1)
        full = weight_scale
    elif weight == "rows":
        weight_scale = w.abs().amax(1) / 448
        full = weight_scale[:, None]
    else:
        rows, columns = (-(-n // b) for n, b in zip(w.shape, block))
        padded = torch.zeros(rows * block[0], columns * block[1])
        padded[:outputs, :inputs] = w
        weight_scale = padded.reshape(rows, block[0], columns, block[1]).abs().amax((1, 3)) / 448
        full = blocks_of(weight_scale, block, w.shape)
    codes = (w / full).clamp(-448, 448).to(E4M3)
    values = codes.float() * full
    y = (x_back.double() @ values.double().T).float()
    tensors = {
        "x": x, "x_back": x_back, "codes": codes.view(torch.uint8), "weight_scales": weight_scale,
        "weights": values, "y": y,
    }
    return golden(name, {key: tensor.numpy() for key, tensor in tensors.items()}, peer=PEER, case=case,
                  made_by="torch-quants.py")


def compute():
    plain = dict(inputs=64, outputs=24, group_size=32, act_order=False, v2=False, symmetric=True)
    cases = {
        "gptq_symmetric": gptq("gptq_symmetric", **plain),
        "gptq_zeros": gptq("gptq_zeros", **plain | {"symmetric": False}),
        "gptq_act_order": gptq("gptq_act_order", **plain | {"symmetric": False, "act_order": True}),
        "gptq_v2_uneven": gptq("gptq_v2_uneven", **plain | {
            "symmetric": False, "v2": True, "group_size": 48}),
        "fp8_static": fp8("fp8_static", activation="static", weight="tensor"),
        "fp8_per_token": fp8("fp8_per_token", activation="per_token", weight="rows"),
        "fp8_blocks": fp8("fp8_blocks", activation="blocks", weight="blocks", block=[16, 32]),
    }
    return {f"{name}.safetensors": data for name, data in cases.items()}


if __name__ == "__main__":
    run(__doc__.splitlines()[0], ATTENTION_GOLDENS / "torch", "", compute)
