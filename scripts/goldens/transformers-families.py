#!/usr/bin/env python3
"""Make tests/goldens/transformers/families.json: how each model family in transformers rotates.

What
----
One JSON object per model_type, one per line, sorted. For a family with rotary
embedding it says which pairs its attention rotates, in which direction and
layout, which part of the head, with which frequencies, which config.json keys
change them, and how attention scores are scaled.

How
---
Nothing is read off names. The family's own RotaryEmbedding is built from the
config class's defaults, and the family's own apply function is given the unit
vectors of a head at position 1; the rotation matrix that comes out says which
channels are paired, the sign of the angle and the order of the frequencies.
Keys are found by setting each candidate and looking whether the frequencies
change. The score scale is read from the real attention module, built without
memory (the meta device). What cannot be found this way is left out and named in
"note", or, for the few families without a RotaryEmbedding class, written down by
hand and marked "by_hand".

Fields
------
rope            true, false, or "nested" (a composite config: see sub_configs)
pairing         half_split: channels i and i + r/2 (r = rotary_dim);
                half_split_of_head: i and i + head_dim/2 with r < head_dim;
                half_split_in_2_parts: half_split in each half of the head (one per axis);
                interleaved: 2i and 2i+1;
                interleaved_in_halves_out: pair 2i, 2i+1 is written to i and i + r/2
direction       "forward": a' = a*cos - b*sin; "inverse": the angle's sign is flipped
rotates         all, leading or trailing channels of the head, or separate_part
                where the attention splits [nope | rope] itself
frequency_order "descending", or the order in which pairs take theta^(-2i/r)
layout          bhsd or bshd (shd: without a batch axis, vision towers)
axes            for position ids of several axes, the axis that drives each pair
score_scale     of the attention module with default config, and the rule that fits
keys            config.json key -> what it changes ("inv_freq", "inv_freq[layer type]",
                "rotary_dim" or "scale"); a key that changes nothing is not listed
ignores         keys that a reader would expect to matter and that do not
nope            conditions that guard the rotation in the attention's source

Re-run
------
    python -m venv venv && . venv/bin/activate
    pip install -r scripts/goldens/requirements-transformers.txt
    python scripts/goldens/transformers-families.py

No weights and no model hub are used.
"""

import os

# Before torch and transformers are imported: no hub, and one thread.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import argparse
import ast
import importlib
import inspect
import json
import math
import re
import sys
import textwrap
import warnings
from pathlib import Path

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

DEFAULT_OUTPUT = (
    Path(__file__).resolve().parents[2] / "tests/goldens/transformers/families.json"
)
MAX_BYTES = 400 * 1024

APPLY_NAME = re.compile(
    r"^(vision_)?apply_(rotary_(pos_)?emb\w*|multidimensional_rope|rotary_time_emb)$"
)

# Keys that published configs use for the base, the rotated part and the head size.
THETA_KEYS = [
    "rope_theta", "rope_local_base_freq", "global_rope_theta", "local_rope_theta",
    "rotary_emb_base", "rotary_embedding_base", "rope_base", "rotary_base", "swa_rope_theta",
    "compress_rope_theta", "rope_ratio", "rope_local_theta",
]
SIZE_KEYS = [
    "head_dim", "attention_head_dim", "kv_channels", "head_size", "d_kv", "qk_rope_head_dim",
    "global_head_dim", "hidden_size", "n_embd", "d_model", "dim", "embed_dim",
    "num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads",
    "swa_head_dim", "swa_qk_rope_head_dim",
]
PART_KEYS = ["partial_rotary_factor", "rotary_pct", "rotary_percent", "rotary_dim", "rope_pct"]
SCALE_KEYS = [
    "query_pre_attn_scalar", "attention_multiplier", "qk_nope_head_dim", "head_dim",
    "scale_attn_weights", "attention_scale", "mup_attn_multiplier", "v_head_dim",
]

# Families whose default config does not fit together; these keys make it do so.
COMPLETED = {
    "glm4v_text": {"partial_rotary_factor": 0.5},
    "glm4v_moe_text": {"head_dim": 128},
    "glm_image_text": {"partial_rotary_factor": 0.5},
    "glm_ocr_text": {"partial_rotary_factor": 0.5, "head_dim": 128},
    "hunyuan_vl_text": {
        "head_dim": 128, "rope_parameters": {"mrope_section": [16, 16, 16, 16]}},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {
        "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [24, 20, 20]}}},
}

# Rotary classes whose config is neither annotated nor visible where they are built.
USED_WITH = {"T5GemmaRotaryEmbedding": ["t5_gemma_module"]}

# Families that rotate without a RotaryEmbedding class of their own, read by eye.
BY_HAND = {
    "clvp_encoder": {
        "pairing": "half_split", "rotates": "leading",
        "note": "dim = max(projection_dim // (2 * num_attention_heads), 32), theta 10000; "
        "the values are rotated too",
    },
    "efficientloftr": {
        "pairing": "interleaved", "rotates": "all", "direction": "forward",
        "note": "2-D over feature maps, on vectors of hidden_size before they are split into "
        "heads (partial_rotary_factor 4.0 by default); no position ids",
    },
    "musicflamingo": {
        "pairing": "interleaved", "rotates": "leading", "direction": "forward",
        "note": "rotates audio embeddings by time in f64, not queries and keys",
    },
    **{f"{model}_{side}": {
        "pairing": "half_split", "rotates": "all", "direction": "forward", "layout": "bhsd",
        "note": f"the transformer inside {model}, which see",
    } for model in ("mimi", "pocket_tts_audio_tokenizer") for side in ("encoder", "decoder")},
    **{key: {
        "pairing": "half_split", "rotates": "all",
        "note": "2-D without position ids: angle = 2 pi * patch centre in [-1, 1] * "
        "theta^(-4i/head_dim), rows first, then columns, tiled to both halves; "
        "prefix tokens (class, registers) are not rotated",
    } for key in ("dinov3_vit", "eomt_dinov3", "sapiens2")},
    "llama4_vision_model": {
        "pairing": "interleaved", "rotates": "all", "layout": "bshd",
        "note": "2-D by patch index, from 1: pairs 0..d/4 turn by column + 1, the rest by "
        "row + 1, theta^(-2i/(d/2)); the class token (last) is not rotated",
    },
    "roformer": {
        "pairing": "interleaved", "rotates": "all",
        "note": "sinusoidal table [sin | cos], theta 10000, repeated per pair; "
        "rotary_value rotates the values too",
    },
    "seamless_m4t": {
        "pairing": "half_split", "rotates": "all",
        "note": "speech encoder, if position_embeddings_type is rotary; "
        "rotary_embedding_base; rotates the hidden states before the q and k projections",
    },
    "vjepa2": {
        "pairing": "interleaved", "rotates": "leading",
        "note": "three parts of 2*(head_dim//3//2) channels for frame, row and column; in each, "
        "cos and sin are tiled (omega_0 .. omega_n, omega_0 .. omega_n) but pairs are 2i, 2i+1, "
        "so the two channels of a pair turn by different angles: not a rotation",
    },
    "wav2vec2-bert": {"pairing": "half_split", "rotates": "all",
                      "note": "if position_embeddings_type is rotary; rotary_embedding_base; "
                      "rotates the hidden states before the q and k projections"},
    "wav2vec2-conformer": {"pairing": "half_split", "rotates": "all",
                           "note": "if position_embeddings_type is rotary; "
                           "rotary_embedding_base; "
                           "rotates the hidden states before the q and k projections"},
}


def load_modules():
    """Every modeling module of the library whose source speaks of rotation."""
    root = Path(transformers.__file__).parent / "models"
    modules = {}
    for path in sorted(root.glob("*/modeling_*.py")):
        if re.search(r"rotary|rope", path.read_text(), re.IGNORECASE):
            name = f"transformers.models.{path.parent.name}.{path.stem}"
            try:
                modules[name] = importlib.import_module(name)
            except ImportError:
                continue
    return modules


def own_classes(module):
    for name, value in sorted(vars(module).items()):
        if inspect.isclass(value) and value.__module__ == module.__name__:
            yield name, value


def config_class_of(cls, module):
    """The config class that `cls.__init__` says it takes, or None."""
    parameters = inspect.signature(cls.__init__).parameters
    parameter = parameters.get("config")
    if parameter is None:
        return None
    kind = parameter.annotation
    if isinstance(kind, str):
        kind = getattr(module, kind.strip("\"'"), None)
    if inspect.isclass(kind) and issubclass(kind, transformers.PreTrainedConfig):
        return kind if kind is not transformers.PreTrainedConfig else None
    return None


def source_tree(obj):
    return ast.parse(textwrap.dedent(inspect.getsource(obj)))


def apply_calls(cls):
    """(apply function's name, unsqueeze_dim, guards) for each call in a class."""
    calls = []

    def visit(node, guards):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if APPLY_NAME.match(node.func.id):
                unsqueeze = None
                for keyword in node.keywords:
                    if keyword.arg == "unsqueeze_dim" and isinstance(keyword.value, ast.Constant):
                        unsqueeze = keyword.value.value
                calls.append((node.func.id, unsqueeze, tuple(guards)))
        if isinstance(node, ast.If):
            test = ast.unparse(node.test)
            for child in node.body:
                visit(child, [*guards, test])
            for child in node.orelse:
                visit(child, [*guards, f"not ({test})"])
            return
        for child in ast.iter_child_nodes(node):
            visit(child, guards)

    visit(source_tree(cls), [])
    return calls


def inverse_frequencies(rotary):
    """{layer type or "": inv_freq} as the module holds them."""
    found = {}
    for name, value in vars(rotary).get("_buffers", {}).items():
        if name == "inv_freq":
            found[""] = value
        elif name.endswith("_inv_freq") and "original" not in name:
            found[name[: -len("_inv_freq")]] = value
    return found


def is_vision(rotary):
    return isinstance(getattr(rotary, "rope_type", None), str) and rotary.rope_type == "axial"


def table(rotary, layer_type, positions):
    """cos and sin [n, width] for positions [axes, n]; complex tables are split."""
    x = torch.zeros(1, 1, 1)
    if is_vision(rotary):
        per_token = positions.T
        shapes = [per_token, per_token[None]]
        if rotary.__class__.__name__.startswith("Gemma4"):
            shapes.reverse()
    elif positions.shape[0] == 1:
        shapes = [positions]
    else:
        shapes = [positions[:, None]]
    last = None
    for ids in shapes:
        try:
            out = rotary(x, ids, layer_type) if layer_type else rotary(x, ids)
            break
        except (TypeError, IndexError, RuntimeError, ValueError, AttributeError, KeyError) as e:
            last = e
    else:
        raise last
    if torch.is_tensor(out):
        return out.real, out.imag, out
    return *out, None


def rotation_matrix(apply, unsqueeze, cos, sin, both, dim, vision):
    """(matrix, layout): column j is what unit vector j becomes; all positions are equal."""
    parameters = list(inspect.signature(apply).parameters)
    for layout in ("shd", "bhsd", "bshd") if vision else ("bhsd", "bshd"):
        keywords = {}
        if unsqueeze is not None:
            keywords["unsqueeze_dim"] = unsqueeze
        # More heads than one, so that a wrong layout cannot broadcast.
        eye = torch.eye(dim)
        q = {
            "bhsd": eye[None, None].repeat(1, 3, 1, 1),
            "bshd": eye[None, :, None].repeat(1, 1, 3, 1),
            "shd": eye[:, None].repeat(1, 3, 1),
        }[layout]
        try:
            if both is not None:
                out = apply(q, q, both)
            elif parameters[:3] == ["tensor", "sin", "cos"]:
                out = apply(q, sin, cos)
            elif "position_ids" in parameters and "multi" in apply.__name__:
                out = apply(q, cos, sin, torch.ones(1, dim, 2))
            elif parameters[1] == "cos":
                out = apply(q, cos, sin, **keywords)
            else:
                out = apply(q, q, cos, sin, **keywords)
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            failure = error
            continue
        out = out if torch.is_tensor(out) else out[0]
        if out.shape != q.shape:
            continue
        rows = {"bhsd": lambda t: t[0, 1], "bshd": lambda t: t[0, :, 1], "shd": lambda t: t[:, 1]}
        return rows[layout](out).T.double(), layout
    raise RuntimeError(f"no layout fits: {failure}" if "failure" in locals() else "no layout fits")


def runs(values):
    """[0,0,0,1,1] -> "0*3 1*2"; a repeating pattern of one each is written as such."""
    parts = []
    for value in values:
        if parts and parts[-1][0] == value:
            parts[-1][1] += 1
        else:
            parts.append([value, 1])
    if len(parts) > 8:
        period = next(
            (p for p in range(2, 5)
             if all(values[i] == values[i - p] for i in range(p, 3 * p))), None)
        if period:
            n = period
            while n < len(values) and values[n] == values[n - period]:
                n += 1
            head = f"({' '.join(map(str, values[:period]))}) for {n}"
            return head if n == len(values) else f"{head}, then {runs(values[n:])}"
    return " ".join(f"{v}*{n}" for v, n in parts)


def classify(matrix, order_from):
    """Pairing, direction, channels and angles found in a rotation matrix."""
    dim = matrix.shape[0]
    columns = [set(torch.nonzero(matrix[:, j]).flatten().tolist()) for j in range(dim)]
    turned = [j for j in range(dim) if columns[j] != {j} or abs(matrix[j, j] - 1) > 1e-12]
    if not turned:
        return {"note": "nothing is rotated at position 1"}
    start, width = turned[0], turned[-1] - turned[0] + 1
    half = width // 2
    found = None
    candidates = {
        "half_split": [(start + i, start + i + half) * 2 for i in range(half)],
        "half_split_of_head": [(i, i + dim // 2) * 2 for i in range(dim // 2)],
        "half_split_in_2_parts": [
            (start + p * half + i, start + p * half + i + half // 2) * 2
            for p in (0, 1) for i in range(half // 2)
        ],
        "interleaved": [(start + 2 * i, start + 2 * i + 1) * 2 for i in range(half)],
        "interleaved_in_halves_out": [
            (start + 2 * i, start + 2 * i + 1, start + i, start + i + half) for i in range(half)
        ],
    }
    for name, quads in candidates.items():
        active = [q for q in quads if columns[q[0]] == {q[2], q[3]}]
        cover = {c for q in active for c in q[:2]}
        if active and cover == set(turned) and all(columns[q[1]] == {q[2], q[3]} for q in active):
            found = name
            break
    if found is None:
        return {"note": "the rotation matrix fits no known pairing"}
    angles, scales, proper = [], [], True
    for a, b, oa, ob in active:
        c, s = matrix[oa, a].item(), matrix[ob, a].item()
        proper &= math.isclose(matrix[oa, b].item(), -s, rel_tol=1e-5, abs_tol=1e-9)
        proper &= math.isclose(matrix[ob, b].item(), c, rel_tol=1e-5, abs_tol=1e-9)
        angles.append(math.atan2(s, c))
        scales.append(math.hypot(s, c))
    result = {
        "pairing": found,
        "direction": "forward" if all(a > 0 for a in angles)
        else "inverse" if all(a < 0 for a in angles) else "mixed",
        "rotary_dim": 2 * len(active),
    }
    if not proper:
        result["note"] = "not a rotation: the two channels of a pair turn differently"
    if max(scales) - 1 > 1e-5:
        result["gain"] = round(max(scales), 7)
    if found == "half_split_of_head":
        result["rotates"] = "all"
    elif len(turned) < dim:
        result["rotates"] = (
            "leading" if turned == list(range(len(turned)))
            else "trailing" if turned == list(range(dim - len(turned), dim)) else "scattered"
        )
    if order_from == "angles":
        size = [abs(a) for a in angles]
        if size == sorted(size, reverse=True):
            result["frequency_order"] = "descending"
        else:
            ranks = {v: r for r, v in enumerate(sorted(set(size), reverse=True))}
            result["frequency_order"] = "index of theta^(-2i/r) by pair: " + " ".join(
                str(ranks[v]) for v in size[:12]) + (" ..." if len(size) > 12 else "")
    return result


def axes_of(rotary, layer_type, count):
    """Which position axis moves each pair, found by moving one axis at a time."""
    base, _, _ = table(rotary, layer_type, torch.zeros(count, 1, dtype=torch.long))
    owner = None
    for axis in range(count):
        positions = torch.zeros(count, 1, dtype=torch.long)
        positions[axis] = 1
        _, sin, _ = table(rotary, layer_type, positions)
        moved = (sin.reshape(-1) != 0).tolist()
        if owner is None:
            owner = [None] * len(moved)
        for i, m in enumerate(moved):
            if m and owner[i] is None:
                owner[i] = axis
            elif m:
                owner[i] = "several"
    return owner


def with_keys(config_class, **keys):
    """A config from JSON-like keys; nothing that another call made may leak in."""
    keys = {**COMPLETED.get(config_class.model_type, {}), **keys}
    return config_class.from_dict(json.loads(json.dumps(keys)))


def frequencies_for(rotary_class, config_class, **keys):
    rotary = rotary_class(with_keys(config_class, **keys))
    return {k: v.clone() for k, v in inverse_frequencies(rotary).items()}


def key_effects(rotary_class, config_class, base):
    """Which keys change the frequencies, found by trying."""
    effects = {}
    config = with_keys(config_class)

    def attempt(label, **keys):
        try:
            found = frequencies_for(rotary_class, config_class, **keys)
        except Exception:  # noqa: BLE001 - a family may refuse a key in any way it likes
            return
        changed = []
        for layer_type, values in base.items():
            other = found.get(layer_type)
            if other is None:
                continue
            if other.shape != values.shape:
                changed.append(f"rotary_dim{f'[{layer_type}]' if layer_type else ''}")
            elif not torch.equal(other, values):
                changed.append(f"inv_freq{f'[{layer_type}]' if layer_type else ''}")
        if changed:
            effects[label] = changed[0] if len(changed) == 1 else changed

    for key in THETA_KEYS:
        attempt(key, **{key: 7654321.0})
    for key in PART_KEYS:
        attempt(key, **{key: 32 if key == "rotary_dim" else 0.75})
    for key in SIZE_KEYS:
        value = read(config, key)
        value = value if isinstance(value, int) and value > 0 else 128
        attempt(key, **{key: value * 2})
    attempt("rope_theta beside rope_scaling", rope_theta=7654321.0,
            rope_scaling={"rope_type": "default"})
    attempt("rope_scaling.type", rope_scaling={"type": "linear", "factor": 2.0})
    attempt("rope_scaling.rope_type", rope_scaling={"rope_type": "linear", "factor": 2.0})
    attempt("rope_scaling.rope_theta",
            rope_scaling={"rope_type": "default", "rope_theta": 7654321.0})
    attempt("rope_parameters.rope_theta",
            rope_parameters={"rope_type": "default", "rope_theta": 7654321.0})
    attempt("rope_parameters.partial_rotary_factor",
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0,
                             "partial_rotary_factor": 0.375})
    # A flat dict with the default base changes theta as well; that alone is no effect.
    plain = {}
    try:
        plain = frequencies_for(rotary_class, config_class, rope_parameters={
            "rope_type": "default", "rope_theta": 10000.0})
        part = frequencies_for(rotary_class, config_class, rope_parameters={
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.375})
        if all(plain[k].shape == part[k].shape for k in plain):
            effects.pop("rope_parameters.partial_rotary_factor", None)
    except Exception:  # noqa: BLE001
        pass
    return effects


def read(config, key):
    """An attribute or None; one that differs by layer raises its own kind of error."""
    try:
        return getattr(config, key, None)
    except Exception:  # noqa: BLE001
        return None


def head_dim_of(config):
    """(head size, how it came about) with default config."""
    if config.is_heterogeneous:
        return None, "differs by layer"
    value = getattr(config, "head_dim", None)
    heads = next((getattr(config, k) for k in ("num_attention_heads", "num_heads", "n_head")
                  if isinstance(getattr(config, k, None), int)), None)
    width = next((getattr(config, k) for k in ("hidden_size", "embed_dim", "n_embd", "d_model")
                  if isinstance(getattr(config, k, None), int)), None)
    quotient = width // heads if heads and width else None
    fields = getattr(type(config), "__dataclass_fields__", {})
    default = fields["head_dim"].default if "head_dim" in fields else None
    if isinstance(default, int):
        rule = f"default {default}, whatever hidden_size is"
    elif value is not None and value == getattr(config, "qk_rope_head_dim", None):
        rule = "qk_rope_head_dim"
    elif value is None or value == quotient:
        value, rule = quotient, "hidden_size // num_attention_heads"
    else:
        rule = "set by the config class"
    return value, rule


def score_scale(attention_class, config):
    """The attention module's factor on q.k with default config, and the rule that fits."""
    arguments = {}
    for name, parameter in inspect.signature(attention_class.__init__).parameters.items():
        if name in ("self", "config") or parameter.default is not inspect.Parameter.empty:
            if name != "layer_idx":
                continue
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        arguments[name] = 0
    arguments.pop("self", None)
    arguments.pop("config", None)
    with torch.device("meta"):
        module = attention_class(config, **arguments)
    for name in ("scaling", "softmax_scale", "scale", "scale_attn", "inv_norm_factor"):
        value = getattr(module, name, None)
        if isinstance(value, (int, float)):
            break
    else:
        if not re.search(r"scaling=self\.head_dim\*\*-0\.5", inspect.getsource(attention_class)):
            return None
        value = module.head_dim**-0.5
    value = float(value)
    if name == "scale_attn":
        return {"value": 1 / value, "rule": "divided by sqrt(head_dim)"}
    candidates = []
    for key in ("query_pre_attn_scalar", "head_dim", "qk_head_dim", "head_size"):
        number = getattr(module, key, None) or read(config, key)
        if isinstance(number, (int, float)) and number > 0:
            candidates.append((number**-0.5, f"{key} ** -0.5"))
            candidates.append((number**-0.25, f"{key} ** -0.25, on q and on k"))
            candidates.append(((number / 2) ** -0.5, f"({key} / 2) ** -0.5"))
    for key in ("attention_multiplier", "attention_scaling", "attention_scale"):
        number = read(config, key)
        if isinstance(number, (int, float)):
            candidates.append((number, key))
    parameters = read(config, "rope_parameters") or {}
    if parameters.get("mscale_all_dim") and parameters.get("factor", 0) > 1:
        gain = 0.1 * parameters["mscale_all_dim"] * math.log(parameters["factor"]) + 1
        candidates += [(v * gain**2, r) for v, r in candidates]
    candidates.append((1.0, "1 (q and k are normalised or scaled elsewhere)"))
    rule = next((r for v, r in candidates if math.isclose(v, value, rel_tol=1e-9)), "other")
    result = {"value": value, "rule": rule}
    source = inspect.getsource(attention_class)
    if "mscale" in source and "scaling" in source:
        result["rule"] += (
            "; with a rope factor and mscale_all_dim m (non-zero): "
            "times (0.1 * m * ln(factor) + 1) ** 2"
        )
    return result


def fits(config_class):
    """Whether a rotary class can be built from this config class itself."""
    fields = getattr(config_class, "__dataclass_fields__", {})
    return "rope_parameters" in fields or "rope_theta" in fields


def configs_by_use(module, classes, rotary_class):
    """Config classes of the modules that build `rotary_class`, by what they hand to it."""
    found = []
    for _, cls in classes:
        if not issubclass(cls, torch.nn.Module) or "__init__" not in vars(cls):
            continue
        for node in ast.walk(source_tree(cls.__init__)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
                    and node.func.id == rotary_class.__name__):
                continue
            given = node.args[0] if node.args else next(
                (k.value for k in node.keywords if k.arg == "config"), None)
            owner = config_class_of(cls, module)
            if given is None or owner is None:
                continue
            path = ast.unparse(given).removeprefix("self.").split(".")
            for step in path[1:]:
                spec = getattr(owner, "sub_configs_defaults", {}).get(step) if owner else None
                owner = spec.config_class if spec else None
            if owner is not None and getattr(owner, "model_type", "") and fits(owner):
                found.append(owner)
    return list(dict.fromkeys(found))


def describe(module, rotary_class, config_class, attention_classes):
    """Everything about one (RotaryEmbedding, config class)."""
    config = with_keys(config_class)
    head_dim, rule = head_dim_of(config)
    entry = {
        "rope": True,
        "rotary_class": rotary_class.__name__,
        "head_dim": head_dim,
        "head_dim_rule": rule,
    }
    notes = []
    rotary = rotary_class(config)
    frequencies = inverse_frequencies(rotary)
    layer_types = sorted(frequencies)
    parameters = getattr(config, "rope_parameters", None)
    if parameters:
        entry["rope_parameters"] = json.loads(json.dumps(parameters))
    entry["pairs"] = {k or "all": v.numel() for k, v in sorted(frequencies.items())}
    entry["default_theta"] = getattr(config_class, "default_theta", None)
    aliases = {
        k: v for k, v in sorted((config_class.attribute_map or {}).items())
        if re.search(r"head|hidden|dim|position|layer|rope|rotary|embd", k + v)
    }
    if aliases:
        entry["attribute_map"] = aliases

    calls = {}
    guards = set()
    for attention in attention_classes:
        for name, unsqueeze, conditions in apply_calls(attention):
            calls.setdefault((name, unsqueeze), []).append(conditions)
            guards.update(conditions)
    if calls:
        entry["attention_classes"] = [c.__name__ for c in attention_classes]
    if guards:
        kind = "guards" if any("rope_interleave" in g for g in guards) else "nope"
        entry[kind] = sorted(guards)
    chosen = list(calls)
    if any("interleave" in name for name, _ in calls) and len(calls) > 1:
        wanted = getattr(config, "rope_interleave", True)
        entry["rope_interleave_default"] = wanted
        chosen.sort(key=lambda c: ("interleave" in c[0]) != bool(wanted))

    first = layer_types[0] if layer_types else ""
    vision = is_vision(rotary)
    forms = {}
    for name, unsqueeze in chosen:
        apply = getattr(module, name)
        try:
            width = 2 * frequencies[first].numel()
            if vision:
                count = next((n for n in (2, 3) if _accepts(rotary, n)), 2)
                positions = torch.ones(count, 1, dtype=torch.long)
                tried, _, _ = table(rotary, first or None, positions)
                width = tried.shape[-1]
            else:
                positions = torch.ones(1, 1, dtype=torch.long)
            for size in dict.fromkeys(s for s in (head_dim, width) if s):
                try:
                    many = positions.expand(-1, size)
                    cos, sin, both = table(rotary, first or None, many)
                    matrix, layout = rotation_matrix(
                        apply, unsqueeze, cos, sin, both, size, vision)
                    break
                except Exception as error:  # noqa: BLE001 - the next size may fit
                    failure = error
            else:
                raise failure
            found = classify(matrix, "angles" if not vision else "none")
            found["layout"] = layout
            if "rotates" not in found and "pairing" in found:
                latent = read(config, "qk_rope_head_dim") and read(config, "qk_nope_head_dim")
                full = (head_dim is None or size == head_dim) and not latent
                found["rotates"] = "all" if full else "separate_part"
            forms[name] = found
        except Exception as error:  # noqa: BLE001 - said in the note
            notes.append(f"{name}: {type(error).__name__}: {str(error)[:90]}")
    for i, (name, found) in enumerate(forms.items()):
        note = found.pop("note", None)
        if note:
            notes.append(f"{name}: {note}")
        if i == 0:
            entry["apply"] = name
            entry.update(found)
        elif "pairing" in found:
            entry.setdefault("other_forms", {})[name] = {
                k: found[k] for k in ("pairing", "direction", "layout") if k in found}

    try:
        if vision:
            count = next((n for n in (2, 3) if _accepts(rotary, n)), 2)
            entry["axes"] = runs(axes_of(rotary, None, count))
            entry["axes_of"] = "channel"
        elif re.search(r"expand\((3|2|len)", inspect.getsource(rotary_class.forward)):
            count = 2 if "expand(2" in inspect.getsource(rotary_class.forward) else len(
                rotary.mrope_section if not isinstance(rotary.mrope_section, dict) else "thw")
            owner = axes_of(rotary, first or None, count)
            half = len(owner) // 2
            # By pair if both channels of every pair follow the same axis.
            interleaved = entry.get("pairing") == "interleaved"
            sides = (owner[::2], owner[1::2]) if interleaved else (owner[:half], owner[half:])
            same = sides[0] == sides[1]
            entry["axes"] = runs(sides[0] if same else owner)
            entry["axes_of"] = "pair" if same else "channel"
            if not same:
                notes.append("the two channels of a pair can follow different axes, "
                             "which is then no rotation")
            section = getattr(rotary, "mrope_section", None)
            if section is not None:
                entry["mrope_section_default"] = section
    except Exception as error:  # noqa: BLE001
        notes.append(f"axes: {type(error).__name__}: {str(error)[:90]}")

    effects = key_effects(rotary_class, config_class, frequencies)
    entry["keys"] = effects
    expected = ["rope_theta", "partial_rotary_factor", "rope_scaling.type",
                "rope_scaling.rope_type", "rope_parameters.partial_rotary_factor"]
    ignored = [k for k in expected if k not in effects]
    if ignored:
        entry["ignores"] = ignored

    for attention in attention_classes:
        try:
            found = score_scale(attention, config)
        except Exception as error:  # noqa: BLE001
            kind = f"{attention.__name__}: {type(error).__name__}"
            notes.append(f"scale of {kind}: {str(error)[:60]}")
            continue
        if found:
            entry["score_scale"] = found
            break
    if not attention_classes:
        notes.append("no attention class of this config calls an apply function directly")
    if notes:
        entry["note"] = "; ".join(notes)
    return {k: v for k, v in entry.items() if v is not None}


def _accepts(rotary, count):
    """Whether a vision table uses exactly `count` axes."""
    try:
        cos, _, _ = table(rotary, None, torch.ones(count, 4, dtype=torch.long))
    except Exception:  # noqa: BLE001
        return False
    head = getattr(rotary.config, "head_dim", None)
    if count == 3 and cos.shape[-1] > 2 * 3 * rotary.inv_freq.numel():
        return False
    return "MiniMaxM3" in type(rotary).__name__ if count == 3 else (
        "MiniMaxM3" not in type(rotary).__name__)


def functional(model_type):
    """gptj and codegen make their table with a function."""
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    config = CONFIG_MAPPING[model_type]()
    dim = config.rotary_dim
    sincos = module.create_sinusoidal_positions(2, dim)[1].expand(1, dim, dim)
    sin, cos = sincos.chunk(2, dim=-1)
    matrix, layout = rotation_matrix(module.apply_rotary_pos_emb, None, cos, sin, None, dim, False)
    head_dim = config.n_embd // config.n_head
    return {
        "rope": True,
        "head_dim": head_dim,
        "head_dim_rule": "n_embd // n_head",
        "pairs": {"all": dim // 2},
        "attribute_map": dict(sorted(config.attribute_map.items())),
        "apply": "apply_rotary_pos_emb",
        **classify(matrix, "angles"),
        "rotates": "leading",
        "layout": layout,
        "default_theta": 10000.0,
        "keys": {"rotary_dim": "rotary_dim"},
        "ignores": ["rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"],
        "score_scale": {"value": head_dim**-0.5, "rule": "head_dim ** -0.5"},
        "note": "theta is fixed; rotary_dim null means all of the embedding width (n_embd), "
        "which the head cannot hold",
    }


def sub_configs(config_class):
    found = {}
    for key, spec in sorted(getattr(config_class, "sub_configs_defaults", {}).items()):
        kind = spec.model_type if getattr(spec, "model_type", None) else getattr(
            spec.config_class, "model_type", "")
        if kind:
            found[key] = kind
    return found


def survey():
    modules = load_modules()
    families = {}
    described = {}
    for name, module in modules.items():
        classes = list(own_classes(module))
        attention = {}
        for class_name, cls in classes:
            if issubclass(cls, torch.nn.Module) and apply_calls(cls):
                attention.setdefault(config_class_of(cls, module), []).append(cls)
        for class_name, cls in classes:
            if not issubclass(cls, torch.nn.Module):
                continue
            if not re.search(r"(Rotary|Rope)\w*Embedding$", class_name):
                continue
            configs = configs_by_use(module, classes, cls)
            annotated = config_class_of(cls, module)
            configs += [CONFIG_MAPPING[key] for key in USED_WITH.get(class_name, [])]
            if annotated is not None and (fits(annotated) or not configs):
                configs = list(dict.fromkeys([annotated, *configs]))
            for config_class in configs:
                own = attention.get(config_class)
                if own is None:
                    # Some attention classes take their parent's config type, or none.
                    stem = re.sub(r"(Rotary|Rope).*$", "", class_name)
                    own = []
                    for prefix in (stem, re.sub(r"(Text|Vision)$", "", stem)):
                        own = own or [c for group in attention.values() for c in group
                                      if c.__name__.startswith(prefix)]
                try:
                    entry = describe(module, cls, config_class, own)
                except Exception as error:  # noqa: BLE001 - said in the note
                    entry = {"rope": True, "rotary_class": class_name,
                             "note": f"{type(error).__name__}: {str(error)[:160]}"}
                if config_class.model_type:
                    described.setdefault(config_class.model_type, []).append(entry)
    # Config classes that use another family's modeling file.
    for key in sorted(CONFIG_MAPPING.keys()):
        config_class = CONFIG_MAPPING[key]
        if key in described or not fits(config_class):
            continue
        model = MODEL_MAPPING.get(config_class, None)
        model = model[0] if isinstance(model, tuple) else model
        if model is None:
            continue
        module = sys.modules[model.__module__]
        for _, cls in own_classes(module):
            if re.search(rf"\b{cls.__name__}\(", inspect.getsource(model)) and re.search(
                    r"(Rotary|Rope)\w*Embedding$", cls.__name__):
                own = [c for _, c in own_classes(module)
                       if issubclass(c, torch.nn.Module) and apply_calls(c)]
                try:
                    entry = describe(module, cls, config_class, own)
                except Exception as error:  # noqa: BLE001 - said in the note
                    entry = {"rope": True, "rotary_class": cls.__name__,
                             "note": f"{type(error).__name__}: {str(error)[:160]}"}
                entry["modeling_of"] = module.__name__.split(".")[-2]
                described.setdefault(key, []).append(entry)
    for key in [k for k, entries in described.items()
                if all("pairs" not in e for e in entries)
                and sub_configs(CONFIG_MAPPING[k] if k in CONFIG_MAPPING else object)]:
        # A composite config that the rotary class merely names in its signature.
        del described[key]
    for key, entries in described.items():
        # Several rotary classes of one config: the fullest description, the rest by name.
        entries.sort(key=lambda e: -len(e))
        if len(entries) > 1:
            entries[0]["also"] = [e["rotary_class"] for e in entries[1:]]
        families[key] = entries[0]
    for key in ("gptj", "codegen"):
        families[key] = functional(key)
    for key, facts in BY_HAND.items():
        families[key] = {"rope": True, "by_hand": True, **facts}

    for key in sorted(CONFIG_MAPPING.keys()):
        config_class = CONFIG_MAPPING[key]
        nested = sub_configs(config_class)
        if key in families:
            if nested:
                families[key]["sub_configs"] = nested
            continue
        with_rope = {k: v for k, v in nested.items() if v in families}
        if nested and (with_rope or "text_config" in nested):
            families[key] = {"rope": "nested", "sub_configs": nested}
        else:
            has = "rope_parameters" in getattr(config_class, "__dataclass_fields__", {})
            families[key] = {"rope": False}
            if has:
                families[key] = {
                    "rope": "unknown", "note": "the config has rope_parameters, but no "
                    "RotaryEmbedding class takes this config class by annotation"}
    return families


def rope_types():
    """The rope types of the shared table, and those that modeling files add."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    special = set()
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/*.py")):
        text = path.read_text()
        special.update(re.findall(r"rope_type\w*\s*(?:==|!=)\s*[\"'](\w+)[\"']", text))
        special.update(re.findall(r"[\"']rope_type[\"']\]?\s*[:=]+\s*[\"'](\w+)[\"']", text))
        special.update(re.findall(r"compute_(\w+)_rope_parameters", text))
    return sorted(ROPE_INIT_FUNCTIONS), sorted(special - set(ROPE_INIT_FUNCTIONS))


def render(families):
    shared, special = rope_types()
    head = {
        "peer": f"transformers {transformers.__version__}",
        "rope_types": ["default", *shared],
        "rope_types_in_modeling_files": special,
    }
    lines = ["{"]
    for key, value in head.items():
        lines.append(f"{json.dumps(key)}:{json.dumps(value)},")
    lines.append('"families":{')
    body = [
        f"{json.dumps(key)}:{json.dumps(families[key], sort_keys=True, separators=(',', ':'))}"
        for key in sorted(families)
    ]
    lines.append(",\n".join(body))
    lines.append("}}")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(
        description="Survey RoPE in transformers; see the top of this file.")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    parser.add_argument(
        "--check", action="store_true", help="compare with the file instead of writing")
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    warnings.simplefilter("ignore")

    families = survey()
    text = render(families)
    json.loads(text)
    if len(text) > MAX_BYTES:
        sys.exit(f"error: {len(text)} bytes are too many")
    if args.check:
        if args.output.read_text() != text:
            sys.exit(f"error: {args.output.name} is not what this run makes")
        print(f"{args.output.name} is up to date")
        return
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(text)
    shared, special = rope_types()
    print(f"rope types: default {' '.join(shared)}; in modeling files: {' '.join(special)}")
    counts = {}
    for entry in families.values():
        kind = entry.get("pairing", str(entry["rope"]))
        counts[kind] = counts.get(kind, 0) + 1
    print(f"wrote {args.output.name}: {len(families)} model types, {len(text)} bytes: {counts}")


if __name__ == "__main__":
    main()
