"""Golden codes and scales of 8-bit caches: torch's own casts, and the rules of vLLM, DeepSeek and OCP MX as
tensor code.

    pip install -r scripts/goldens/requirements-transformers.txt
    python scripts/goldens/torch-casts.py [--check]

Inputs of the casts are, for each two e4m3 values that follow each other, both, the middle and its
neighbours in f32; all bf16 and f16 values; and infinities and NaN.
"""
import sys
from pathlib import Path

import torch
from safetensors.torch import save

TORCH = "2.15.0"
FILE = Path(__file__).parents[2] / "tests/goldens/torch/casts.safetensors"


def inputs():
    codes = torch.arange(0, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    near = torch.cat([codes, middles, torch.tensor([464.0, 480.0, 3.4e38, 1e-45, float("inf"), float("nan")])])
    up, down = (torch.nextafter(near, torch.tensor(to)) for to in (float("inf"), float("-inf")))
    near = torch.cat([near, up, down])
    return torch.cat([near, -near])


def every(dtype):
    return torch.arange(0, 1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)


def e4m3(x):
    # Clamped, as vLLM does; clamp keeps NaN.
    return x.float().clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)


def main():
    assert torch.__version__.split("+")[0] == TORCH, torch.__version__
    torch.manual_seed(7)
    x = inputs()
    spread = torch.exp(torch.randn(64, 1) * 6)
    groups = (torch.randn(64, 128) * spread).bfloat16()
    groups[0] = 0
    groups[1] = torch.linspace(-1, 1, 128).bfloat16() * 1e-30
    values = groups.float()
    amax = values.abs().amax(1, keepdim=True)

    tensors = {
        "x": x,
        "x_e4m3": e4m3(x),
        "bf16_e4m3": e4m3(every(torch.bfloat16)),
        "f16_e4m3": e4m3(every(torch.float16)),
        "e4m3_values": torch.arange(0, 256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).float(),
        "groups": groups,
    }
    # vLLM, per token and head: at least 1e-6, and times the inverse.
    floor = torch.tensor(1e-6)
    scale = torch.maximum(amax / 448, floor)
    tensors["e4m3_multiply_scale"], tensors["e4m3_multiply"] = scale, e4m3(values * (1 / scale))
    scale = torch.maximum(amax / 127, floor)
    int8 = (values * (1 / scale)).round().clamp(-127, 127).to(torch.int8).view(torch.uint8)
    tensors["int8_multiply_scale"], tensors["int8_multiply"] = scale, int8
    # vLLM's latent cache: at least FLT_MIN, and divided by.
    scale = torch.maximum(amax / 448, torch.tensor(torch.finfo(torch.float32).tiny))
    tensors["e4m3_divide_scale"], tensors["e4m3_divide"] = scale, e4m3(values / scale)
    # DeepSeek: the exponent rounded up; 1e-4 is the least amax.
    scale = torch.exp2(torch.ceil(torch.log2(torch.maximum(amax, torch.tensor(1e-4)).double() / 448))).float()
    tensors["up_scale"], tensors["up"] = scale, e4m3(values / scale)
    # OCP MX: the exponent of amax less that of 448.
    exponent = torch.floor(torch.log2(amax.double())) - 8
    scale = torch.exp2(exponent.clamp(-127, 127)).float()
    tensors["down_scale"], tensors["down"] = scale, e4m3(values / scale)

    made = save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"torch": TORCH})
    if "--check" in sys.argv:
        assert FILE.read_bytes() == made, f"{FILE} is not what torch {TORCH} computes"
        print("fresh")
    else:
        FILE.parent.mkdir(parents=True, exist_ok=True)
        FILE.write_bytes(made)
        print(len(made), "bytes")


if __name__ == "__main__":
    main()
