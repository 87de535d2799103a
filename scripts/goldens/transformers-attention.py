#!/usr/bin/env python3
"""Make crates/phasor-attention/tests/goldens/transformers/*: attention layers of transformers.

What
----
Each file is what the attention module of a model returns (eager, f32, on a CPU) for one sequence, with
random weights:

    y   [tokens, hidden_size]  f32

Inputs and weights are no part of a file. They are drawn from SplitMix64 with the seed of the case: x from
-1 to 1, the weights of q, k, v and o to 0.3, biases of q, k and v to 0.5 where there are some, weights of
norms to 1.5 (their values are those of the file format: Gemma adds 1), and sinks to 2. A bias of o is 0.
"case" is JSON and says the rest; "bf16" cases ran in bf16, with weights and inputs rounded to it. Of latent
attention (deepseek_v3), weights are drawn in the order of q_a_proj, q_b_proj, kv_a_proj_with_mqa, kv_b_proj,
o_proj, q_a_layernorm, kv_a_layernorm.

How to run
----------
    python3 -m venv goldens-venv
    . goldens-venv/bin/activate
    pip install -r scripts/goldens/requirements-transformers.txt
    python scripts/goldens/transformers-attention.py            # write
    python scripts/goldens/transformers-attention.py --check    # recompute, compare the bytes
"""

import sys
from importlib.metadata import version

import torch
import transformers as tf
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek_v3
from transformers.models.gemma2 import modeling_gemma2 as gemma2
from transformers.models.gemma3 import modeling_gemma3 as gemma3
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

sys.dont_write_bytecode = True
from golden_files import ATTENTION_GOLDENS, Draw, golden, run

PEER = f"transformers {version('transformers')}, torch {version('torch')} (CPU)"
TOKENS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, WINDOW = 40, 4, 2, 16, 48, 9
THETA = 10000.0
PLAIN_ROPE = {"rope_type": "default", "rope_theta": THETA}
COMMON = dict(
    hidden_size=HIDDEN, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM,
    intermediate_size=64, num_hidden_layers=2, max_position_embeddings=256,
    rope_theta=THETA, attn_implementation="eager")


def case(seed, config, attention, rotary, *, layer=0, window=None, bf16=False, **says):
    return dict(
        seed=seed, config=config, attention=attention, rotary=rotary, layer=layer, bf16=bf16,
        says=dict(window=window, bf16=bf16, seed=seed, **says))


def cases():
    sliding, full = "sliding_attention", "full_attention"
    gemma = dict(COMMON, query_pre_attn_scalar=24, sliding_window=WINDOW, layer_types=[sliding, full])
    yield "llama", case(1, tf.LlamaConfig(**COMMON), llama.LlamaAttention, llama.LlamaRotaryEmbedding)
    yield "llama_bf16", case(
        2, tf.LlamaConfig(**COMMON), llama.LlamaAttention, llama.LlamaRotaryEmbedding, bf16=True)
    yield "qwen2", case(
        3, tf.Qwen2Config(**COMMON), qwen2.Qwen2Attention, qwen2.Qwen2RotaryEmbedding, bias=True)
    yield "qwen3", case(
        4, tf.Qwen3Config(**COMMON), qwen3.Qwen3Attention, qwen3.Qwen3RotaryEmbedding, norm=1e-6)
    yield "mistral", case(
        5, tf.MistralConfig(**COMMON, sliding_window=WINDOW), mistral.MistralAttention,
        mistral.MistralRotaryEmbedding, window=WINDOW)
    yield "gemma2", case(
        6, tf.Gemma2Config(**gemma, attn_logit_softcapping=5.0), gemma2.Gemma2Attention,
        gemma2.Gemma2RotaryEmbedding, layer=1, soft_cap=5.0, scale=24**-0.5)
    yield "gemma3_sliding", case(
        7, tf.Gemma3TextConfig(**gemma, rope_local_base_freq=THETA), gemma3.Gemma3Attention,
        gemma3.Gemma3RotaryEmbedding, window=WINDOW, norm=1e-6, norm_offset=1.0, scale=24**-0.5)
    yield "gemma3_full", case(
        8, tf.Gemma3TextConfig(**gemma), gemma3.Gemma3Attention, gemma3.Gemma3RotaryEmbedding,
        layer=1, norm=1e-6, norm_offset=1.0, scale=24**-0.5)
    yield "gpt_oss_sliding", case(
        9, tf.GptOssConfig(**COMMON, sliding_window=WINDOW, layer_types=[sliding, full],
                           attention_bias=True, rope_parameters=PLAIN_ROPE),
        gpt_oss.GptOssAttention, gpt_oss.GptOssRotaryEmbedding, window=WINDOW, bias=True, sinks=True)


def compute_case(name, c):
    config, draw = c["config"], Draw(c["seed"])
    attention = c["attention"](config, c["layer"]).eval()
    dtype = torch.bfloat16 if c["bf16"] else torch.float32

    def drawn(most, *shape):
        return torch.from_numpy(draw.values(most, *shape)).to(dtype)

    x = drawn(1, 1, TOKENS, HIDDEN)
    for projection in "q", "k", "v", "o":
        weight = getattr(attention, f"{projection}_proj").weight
        weight.data = drawn(0.3, *weight.shape)
    if c["says"].get("bias"):
        for projection in "q", "k", "v":
            bias = getattr(attention, f"{projection}_proj").bias
            bias.data = drawn(0.5, *bias.shape)
    if (bias := attention.o_proj.bias) is not None:
        bias.data.zero_()
    if c["says"].get("norm"):
        for norm in attention.q_norm, attention.k_norm:
            norm.weight.data = drawn(1.5, HEAD_DIM)
    if c["says"].get("sinks"):
        attention.sinks.data = drawn(2, HEADS)
    named = {key for key, _ in attention.named_parameters()}
    known = {f"{p}_proj.{part}" for p in "qkvo" for part in ("weight", "bias")}
    assert named <= known | {"q_norm.weight", "k_norm.weight", "sinks"}, named
    assert ("q_norm.weight" in named) == bool(c["says"].get("norm"))
    assert ("q_proj.bias" in named) == bool(c["says"].get("bias"))

    position_ids = torch.arange(TOKENS)[None]
    rotary = c["rotary"](config)
    kinds = getattr(config, "layer_types", None)
    by_kind = [kinds[c["layer"]]] if isinstance(rotary, gemma3.Gemma3RotaryEmbedding) else []
    embeddings = rotary(x, position_ids, *by_kind)
    angles = torch.arange(TOKENS)[:, None] * THETA ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    assert (embeddings[0][0, :, :HEAD_DIM // 2].float() - angles.cos()).abs().max() < 0.01, name
    make_mask = create_sliding_window_causal_mask if c["says"]["window"] else create_causal_mask
    mask = make_mask(config=config, inputs_embeds=x, attention_mask=None, past_key_values=None,
                     position_ids=position_ids)
    with torch.no_grad():
        y = attention(x, position_embeddings=embeddings, attention_mask=mask)[0]
    return golden(name, {"y": y[0].float().numpy()}, peer=PEER, made_by="transformers-attention.py", case={
        "tokens": TOKENS, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM,
        "hidden_size": HIDDEN, "theta": THETA} | c["says"])


def compute_latent(name, seed):
    sizes = dict(
        q_lora_rank=24, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12)
    config = tf.DeepseekV3Config(
        hidden_size=HIDDEN, num_attention_heads=HEADS, num_key_value_heads=HEADS, intermediate_size=64,
        num_hidden_layers=2, max_position_embeddings=256, rope_parameters=PLAIN_ROPE,
        attn_implementation="eager", **sizes)
    attention, draw = deepseek_v3.DeepseekV3Attention(config, 0).eval(), Draw(seed)
    x = torch.from_numpy(draw.values(1, 1, TOKENS, HIDDEN))
    matrices = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    norms = ["q_a_layernorm", "kv_a_layernorm"]
    for most, names in (0.3, matrices), (1.5, norms):
        for key in names:
            weight = getattr(attention, key).weight
            weight.data = torch.from_numpy(draw.values(most, *weight.shape))
    assert {key for key, _ in attention.named_parameters()} == {f"{n}.weight" for n in matrices + norms}
    position_ids = torch.arange(TOKENS)[None]
    embeddings = deepseek_v3.DeepseekV3RotaryEmbedding(config)(x, position_ids)
    mask = create_causal_mask(config=config, inputs_embeds=x, attention_mask=None, past_key_values=None,
                              position_ids=position_ids)
    with torch.no_grad():
        y = attention(x, position_embeddings=embeddings, attention_mask=mask)[0]
    return golden(name, {"y": y[0].numpy()}, peer=PEER, made_by="transformers-attention.py", case={
        "tokens": TOKENS, "heads": HEADS, "hidden_size": HIDDEN, "theta": THETA, "seed": seed,
        "norm": attention.q_a_layernorm.variance_epsilon} | sizes)


def compute():
    files = {f"{name}.safetensors": compute_case(name, c) for name, c in cases()}
    return files | {"deepseek_v3.safetensors": compute_latent("deepseek_v3", 10)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(__doc__.splitlines()[0], ATTENTION_GOLDENS / "transformers", "", compute)
