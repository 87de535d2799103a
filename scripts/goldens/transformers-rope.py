#!/usr/bin/env python3
"""Make tests/goldens/transformers/*.safetensors: what transformers computes for real configs.

What
----
One file per case of transformers_cases.py. The config, spelled as the published
model spells it, is parsed by transformers; the family's own RotaryEmbedding makes
cos and sin for a few positions, and its own apply function rotates seeded normal
queries and keys. No model is built: the attention class is built without memory
(the meta device) only to read its score scale.

Metadata (strings)
------------------
config          config.json's text, what a parser of configs is given
peer            transformers and its version
model_type      of the config's top level
sub_config      the nested config that the tables belong to, or "" where its keys
                are on the top level
score_scale     the attention module's factor on q.k, repr of a float, or ""
calls           JSON list, one object per call of the RotaryEmbedding:
                name; layer_type (null if the family has one table); layout (bhsd or
                bshd, tensors are stored without the batch axis); pairing and
                direction, found by comparing the result with each candidate;
                rotates: "all", "leading" or "trailing" channels of the stored q and
                k, or "rope_part" where q and k hold only the rope part of a latent
                head; rotary_dim: channels that turn, at most; seq_len: largest
                position + 1; attention_factor: the gain on cos and sin

Tensors per call
----------------
<name>.inv_freq                 f32, as the module used it
<name>.position_ids             i64 [tokens], or [axes, tokens] (t, h, w; rows, columns)
<name>.cos, <name>.sin          f32, as the module returned them
<name>.q, <name>.k              f32 inputs
<name>.q_rotated, .k_rotated    f32 results, unrotated channels included

Every call has a module of its own, as one of type "dynamic" keeps the longest
table it has made.

Re-run
------
    python -m venv venv && . venv/bin/activate
    pip install -r scripts/goldens/requirements-transformers.txt
    python scripts/goldens/transformers-rope.py             # write
    python scripts/goldens/transformers-rope.py --check     # compare byte for byte
    python scripts/goldens/transformers-rope.py --measure   # how far f32 is from f64

The bytes are the same on every run with the pinned versions on one machine;
another kind of CPU may round a last bit of cos or sin differently.
"""

import os

# Before torch and transformers are imported: no hub, and one thread.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import argparse
import contextlib
import hashlib
import importlib
import inspect
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
import transformers

# The cases are beside this file; no cache folder is left there.
sys.dont_write_bytecode = True
from transformers_cases import CASES

DEFAULT_OUTPUT = Path(__file__).resolve().parents[2] / "tests/goldens/transformers"
MAX_FILE = 24 * 1024
MAX_FOLDER = 1024 * 1024


def check(holds, message):
    if not holds:
        sys.exit(f"error: {message}")


def parse(case):
    """The config as transformers reads it, and the nested one that the tables belong to."""
    text = json.dumps(case["config"], indent=2)
    values = json.loads(text)
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    return text, getattr(config, case["sub"]) if case["sub"] else config


def module_of(case):
    family = case["rotary"].split(".")[0]
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def score_scale(case, config):
    """The attention module's factor on q.k."""
    attention = getattr(module_of(case), case["attention"])
    parameters = inspect.signature(attention.__init__).parameters
    arguments = {"layer_idx": case.get("layer", 0)} if "layer_idx" in parameters else {}
    with torch.device("meta"):
        module = attention(config, **arguments)
    for name in ("scaling", "inv_norm_factor"):
        if isinstance(getattr(module, name, None), (int, float)):
            return repr(float(getattr(module, name)))
    if hasattr(module, "scale_attn"):
        # gptj and codegen divide by it.
        return repr(float(1 / module.scale_attn))
    if "scaling=self.head_dim**-0.5" in inspect.getsource(attention):
        return repr(float(module.head_dim**-0.5))
    return ""


def tables(case, config, name, positions):
    """inv_freq, gain, and what the apply function is given, for positions [axes, tokens]."""
    module = module_of(case)
    if "." not in case["rotary"]:
        # gptj and codegen: rows of a fixed table, sines first.
        rows = module.create_sinusoidal_positions(config.n_positions, config.rotary_dim)
        sin, cos = rows[positions[0]][None].chunk(2, dim=-1)
        steps = torch.arange(0, config.rotary_dim, 2, dtype=torch.int64)
        return 1.0 / (10000 ** (steps / config.rotary_dim)), 1.0, (cos, sin)
    rotary = getattr(module, case["rotary"].split(".")[1])(config)
    x = torch.zeros(1, 1, 1, dtype=torch.get_default_dtype())
    layered = isinstance(getattr(rotary, "rope_type", None), dict)
    if case.get("part") == "vision":
        out = rotary(x, positions.T)
    else:
        ids = positions if positions.shape[0] == 1 else positions[:, None]
        out = rotary(x, ids, layer_type=name) if layered else rotary(x, ids)
    prefix = f"{name}_" if layered else ""
    inv_freq = getattr(rotary, f"{prefix}inv_freq")
    gain = float(getattr(rotary, f"{prefix}attention_scaling"))
    if config.model_type == "phimoe":
        # Its forward pass makes its own frequencies and its own gain, and leaves
        # those of the buffers unused.
        inv_freq, _ = rotary.rope_init_fn(config)
        parameters = config.rope_parameters
        long = positions.max() + 1 > parameters["original_max_position_embeddings"]
        gain = float(parameters["long_mscale" if long else "short_mscale"])
    return inv_freq, gain, out


def rotate(case, q, k, table):
    """q and k as the family's attention leaves them; a leading batch axis everywhere."""
    module = module_of(case)
    apply = getattr(module, case.get("apply", "apply_rotary_pos_emb"))
    parameters = list(inspect.signature(apply).parameters)
    if torch.is_tensor(table):
        return apply(q, k, table)
    cos, sin = table
    if parameters[:3] == ["tensor", "sin", "cos"]:
        width = 2 * cos.shape[-1]
        return tuple(
            torch.cat([apply(t[..., :width], sin, cos), t[..., width:]], dim=-1) for t in (q, k))
    if case.get("part") == "vision" and "unsqueeze" not in case:
        # The towers have no batch axis: [tokens, heads, dim].
        return tuple(t[None] for t in apply(q[0], k[0], cos, sin))
    if parameters[1] == "cos":
        keywords = {"unsqueeze_dim": 2} if layout_of(case) == "bshd" else {}
        return tuple(apply(t, cos, sin, **keywords) for t in (q, k))
    if case["attention"] in ("PhiAttention", "StableLmAttention", "PersimmonAttention"):
        # These split the head in the attention class.
        width = cos.shape[-1]
        turned = apply(q[..., :width], k[..., :width], cos, sin)
        return tuple(torch.cat([r, t[..., width:]], dim=-1) for r, t in zip(turned, (q, k)))
    keywords = {"unsqueeze_dim": case["unsqueeze"]} if "unsqueeze" in case else {}
    return apply(q, k, cos, sin, **keywords)


def layout_of(case):
    if "layout" in case:
        return case["layout"]
    family = case["rotary"].split(".")[0]
    vision = case.get("part") == "vision"
    return "bshd" if vision or family in ("gptj", "codegen", "gemma3n", "gemma4") else "bhsd"


def head_size(case, config, name):
    if case.get("part") == "mla":
        return config.qk_rope_head_dim
    if config.is_heterogeneous:
        return config.per_layer_config[name].head_dim
    head_dim = getattr(config, "head_dim", None)
    width = getattr(config, "embed_dim", None) or config.hidden_size
    heads = getattr(config, "num_attention_heads", None) or config.num_heads
    return head_dim or width // heads


def inputs(case, name, tokens, dim):
    """Seeded q [1, heads, tokens, dim] and k with one head, or in the bshd order."""
    seed = hashlib.sha256(f"{case['name']}.{name}".encode()).digest()[:8]
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(seed, "little")))
    both = []
    # One query head for wide heads, for the sake of the folder's size.
    for heads in (case.get("heads", 2 if dim < 128 else 1), 1):
        shape = (1, heads, tokens, dim) if layout_of(case) == "bhsd" else (1, tokens, heads, dim)
        both.append(torch.from_numpy(generator.standard_normal(shape, dtype=np.float32)))
    return both


def candidates(x, cos, sin, dim):
    """x turned in every known way; x, cos, sin in f64, [.., tokens, dim] and [tokens, pairs]."""
    rotary = 2 * cos.shape[-1]

    def turn(a, b, sign):
        return a * cos - sign * b * sin, b * cos + sign * a * sin

    for sign, direction in ((1, "forward"), (-1, "inverse")):
        for rotates, start in (("leading", 0), ("trailing", dim - rotary)):
            if rotates == "trailing" and start == 0:
                continue
            part = x[..., start : start + rotary]
            half = rotary // 2
            outs = {}
            outs["half_split"] = np.concatenate(
                turn(part[..., :half], part[..., half:], sign), axis=-1)
            outs["interleaved_in_halves_out"] = np.concatenate(
                turn(part[..., 0::2], part[..., 1::2], sign), axis=-1)
            outs["interleaved"] = np.stack(
                turn(part[..., 0::2], part[..., 1::2], sign), axis=-1).reshape(part.shape)
            for pairing, out in outs.items():
                whole = np.concatenate([x[..., :start], out, x[..., start + rotary :]], axis=-1)
                yield pairing, direction, rotates if rotary < dim else "all", whole


def find_form(case, q, q_rotated, cos, sin, inv_freq, dim):
    """(pairing, direction, rotates) of the one candidate that gives the stored result."""
    order = (lambda t: t) if layout_of(case) == "bhsd" else (lambda t: t.swapaxes(-2, -3))
    x, wanted = order(q.astype(np.float64)), order(q_rotated)
    pairs = len(inv_freq) * (2 if case.get("part") == "vision" else 1)
    if "pixtral" in case["rotary"]:
        pairs = len(inv_freq)
    c, s = cos.astype(np.float64), sin.astype(np.float64)
    if c.shape[-1] > pairs:
        # Written twice: halves side by side, or each value beside itself.
        tiled = np.array_equal(c[:, :pairs], c[:, pairs:])
        c, s = (t[:, :pairs] if tiled else t[:, 0::2] for t in (c, s))
    found = [
        form for *form, out in candidates(x, c, s, dim) if np.abs(out - wanted).max() < 1e-5
    ]
    check(len(found) == 1, f"{case['name']}: {len(found)} forms fit the result: {found}")
    return found[0]


def compute(case):
    """{call: (metadata, tensors)} of one case."""
    text, config = parse(case)
    calls = []
    tensors = {}
    for name, given in case["calls"].items():
        positions = torch.tensor(given, dtype=torch.int64)
        positions = positions[None] if positions.ndim == 1 else positions
        _, config = parse(case)
        inv_freq, gain, table = tables(case, config, name, positions)
        layered = len(case["calls"]) > 1 and name not in ("short", "long")
        dim = head_size(case, config, name)
        q, k = inputs(case, name, positions.shape[1], dim)
        q, k = q.to(torch.get_default_dtype()), k.to(torch.get_default_dtype())
        q_rotated, k_rotated = rotate(case, q, k, table)
        cos, sin = (table.real, table.imag) if torch.is_tensor(table) else table

        def plain(tensor):
            return np.ascontiguousarray(tensor.detach().numpy())

        cos, sin = (plain(t.reshape(positions.shape[1], -1)) for t in (cos, sin))
        parts = {
            "inv_freq": plain(inv_freq),
            "position_ids": plain(positions[0] if positions.shape[0] == 1 else positions),
            "cos": cos,
            "sin": sin,
            "q": plain(q[0]),
            "k": plain(k[0]),
            "q_rotated": plain(q_rotated[0]),
            "k_rotated": plain(k_rotated[0]),
        }
        tensors.update({f"{name}.{key}": value for key, value in parts.items()})
        pairing, direction, rotates = find_form(
            case, parts["q"], parts["q_rotated"], cos, sin, parts["inv_freq"], dim)
        calls.append({
            "name": name,
            "layer_type": name if layered else None,
            "layout": layout_of(case),
            "pairing": pairing,
            "direction": direction,
            "rotates": "rope_part" if case.get("part") == "mla" else rotates,
            "rotary_dim": 2 * len(parts["inv_freq"]) * (
                2 if case.get("part") == "vision" and "pixtral" not in case["rotary"] else 1),
            "seq_len": int(positions.max()) + 1,
            "attention_factor": gain,
        })
    return text, config, calls, tensors


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


def render(case):
    text, config, calls, tensors = compute(case)
    for name, tensor in tensors.items():
        check(tensor.dtype in (np.float32, np.int64), f"{case['name']}: {name} is {tensor.dtype}")
        check(np.isfinite(tensor).all(), f"{case['name']}: {name} is not finite")
    metadata = {
        "config": text,
        "peer": f"transformers {transformers.__version__}",
        "model_type": case["config"]["model_type"],
        "sub_config": case["sub"] if case["sub"] in case["config"] else "",
        "score_scale": score_scale(case, config),
        "calls": json.dumps(calls),
    }
    data = serialize(tensors, metadata)
    loaded = safetensors.numpy.load(data)
    check(
        loaded.keys() == tensors.keys()
        and all(loaded[name].tobytes() == tensors[name].tobytes() for name in tensors),
        f"{case['name']} does not read back",
    )
    check(len(data) <= MAX_FILE, f"{case['name']}: {len(data)} bytes are too many")
    return data


@contextlib.contextmanager
def double_precision():
    """The library's own code in f64: what it calls float is double in here."""
    names = ("float", "float32")
    saved = {name: getattr(torch, name) for name in names}
    to_float = torch.Tensor.float
    for name in names:
        setattr(torch, name, torch.float64)
    torch.Tensor.float = torch.Tensor.double
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(saved["float32"])
        torch.Tensor.float = to_float
        for name in names:
            setattr(torch, name, saved[name])


def measure(cases):
    """Print how far the f32 results are from the same code run in f64."""
    bounds = [0, 100, 10_000, 200_000, 2_000_000]
    worst = {bound: (0.0, "") for bound in bounds}
    frequencies = (0.0, "")
    for case in cases:
        _, _, calls, single = compute(case)
        with double_precision():
            _, _, _, double = compute(case)
        for call in calls:
            name = call["name"]
            f32, f64 = (t[f"{name}.inv_freq"].astype(np.float64) for t in (single, double))
            moving = f64 != 0
            off = np.abs(f32[moving] / f64[moving] - 1).max()
            frequencies = max(frequencies, (float(off), f"{case['name']}.{name}"))
            positions = single[f"{name}.position_ids"].reshape(-1, single[f"{name}.cos"].shape[0])
            for which in ("q", "k"):
                off = np.abs(single[f"{name}.{which}_rotated"] - double[f"{name}.{which}_rotated"])
                off = off if call["layout"] == "bhsd" else off.swapaxes(0, 1)
                for token, position in enumerate(positions.max(axis=0)):
                    bound = next(b for b in bounds if position <= b)
                    size = float(off[:, token].max())
                    worst[bound] = max(worst[bound], (size, f"{case['name']}.{name}"))
    for bound, (size, where) in worst.items():
        print(f"positions up to {bound}: largest difference {size:.3e} ({where})")
    print(f"inv_freq: largest relative difference {frequencies[0]:.3e} ({frequencies[1]})")


def main():
    parser = argparse.ArgumentParser(description="Make the goldens; see the top of this file.")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--measure", action="store_true", help="compare f32 with f64")
    parser.add_argument("cases", nargs="*", help="names of cases (default: all)")
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    warnings.simplefilter("ignore")

    names = [case["name"] for case in CASES]
    check(len(set(names)) == len(names), "two cases have the same name")
    check(set(args.cases) <= set(names), f"no such case: {sorted(set(args.cases) - set(names))}")
    chosen = [case for case in CASES if not args.cases or case["name"] in args.cases]
    if args.measure:
        measure(chosen)
        return

    args.output.mkdir(parents=True, exist_ok=True)
    total = 0
    differing = []
    for case in chosen:
        data = render(case)
        total += len(data)
        path = args.output / f"{case['name']}.safetensors"
        if not args.check:
            path.write_bytes(data)
        elif not path.exists() or path.read_bytes() != data:
            differing.append(case["name"])
    check(total <= MAX_FOLDER, f"{total} bytes are too many")
    if not args.cases:
        files = {path.stem for path in args.output.glob("*.safetensors")}
        check(files == set(names), f"files without a case, or the reverse: {files ^ set(names)}")
    check(not differing, f"not what this run makes: {', '.join(differing)}")
    families = len({case["rotary"].split(".")[0] for case in chosen})
    verb = "checked" if args.check else "wrote"
    print(f"{verb} {len(chosen)} cases of {families} model types, {total} bytes")


if __name__ == "__main__":
    main()
