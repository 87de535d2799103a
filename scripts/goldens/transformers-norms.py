"""Golden norms of heads: what transformers' own modules make of random heads.

    pip install -r scripts/goldens/requirements-transformers.txt
    python scripts/goldens/transformers-norms.py [--check]
"""
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

FILE = Path(__file__).parents[2] / "tests/goldens/transformers-norms.safetensors"
TOKENS = 1


def main():
    torch.manual_seed(11)
    tensors = {}

    def add(name, dtype, module, shape, weights):
        heads, dim = shape
        x = (torch.randn(TOKENS, heads, dim) * torch.exp(2 * torch.randn(TOKENS, heads, 1))).to(dtype)
        weight = torch.randn(*weights).to(dtype) if weights else None
        bias = torch.randn(*weights).to(dtype) if name.startswith("layer_beta") else None
        with torch.no_grad():
            if weight is not None:
                module.weight.copy_(weight)
            if bias is not None:
                module.bias.copy_(bias)
            module = module.to(dtype)
            y = module(x.reshape(TOKENS, heads * dim)) if name.startswith("olmo2") else module(x)
        label = f"{name}.{str(dtype).removeprefix('torch.')}.{heads}.{dim}"
        tensors[f"{label}.x"], tensors[f"{label}.y"] = x, y.reshape(x.shape)
        if weight is not None:
            tensors[f"{label}.weight"] = weight
        if bias is not None:
            tensors[f"{label}.bias"] = bias

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for dim in (64, 80, 96, 128, 192, 256):
            add("qwen3", dtype, Qwen3RMSNorm(dim, 1e-6), (3, dim), (dim,))
            add("gemma3", dtype, Gemma3RMSNorm(dim, 1e-6), (3, dim), (dim,))
        add("glm4_moe", dtype, Glm4MoeRMSNorm(128, 1e-5), (5, 128), (128,))
        add("olmo2", dtype, Olmo2RMSNorm(5 * 128, 1e-6), (5, 128), (5 * 128,))
        add("cohere", dtype, CohereLayerNorm((5, 128), 1e-5), (5, 128), (5, 128))
        add("layer_beta", dtype, torch.nn.LayerNorm(80, 1e-5), (4, 80), (80,))

    # One entry: several are saved in no order.
    versions = {"peer": f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}"}
    made = save({name: tensor.contiguous() for name, tensor in tensors.items()}, versions)
    if "--check" in sys.argv:
        assert FILE.read_bytes() == made, f"{FILE} is not what {versions} compute"
        print("fresh")
    else:
        FILE.write_bytes(made)
        print(len(made), "bytes", versions)


if __name__ == "__main__":
    main()
