#!/usr/bin/env python3
"""Compare what phasor reads from configs with what transformers makes of them, layer by layer.

Every config class of transformers whose model has a RotaryEmbedding class is tried as it is by
default, as it is when saved, and with keys changed one at a time: theta, sizes, the part that
rotates, every type of scaling in the old and the new spelling, tables by kind of layer, patterns of
layers, and the legacy keys that config classes convert themselves. transformers' side is its own
config class and RotaryEmbedding; which layers rotate comes from the attention classes' own
conditions.

    pip install -r scripts/goldens/requirements-transformers.txt
    cargo build --release --example read_configs
    python scripts/goldens/transformers-sweep.py            # counts, and each difference
    python scripts/goldens/transformers-sweep.py llama ...  # some model types only

Outcomes: both read the config and agree on every layer (`agree`); phasor refuses it with an error
(`phasor refuses`); transformers does (`transformers refuses`), or both do; they read it differently
(`DIFFER`). The last must be empty but for what DIFFERENCES explains; the exit code says so.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import collections
import importlib.util
import inspect
import json
import logging
import re
import subprocess
import sys
import warnings
from pathlib import Path

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

ROOT = Path(__file__).resolve().parents[2]
READER = ROOT / "target/release/examples/read_configs"

spec = importlib.util.spec_from_file_location(
    "families", Path(__file__).with_name("transformers-families.py"))
families = importlib.util.module_from_spec(spec)
spec.loader.exec_module(families)

LAYERS = 8
# transformers' frequencies are f32, and YaRN's and Llama 3's blends subtract nearly equal ones.
TOLERANCE = 2e-6
LONG = 1 << 20

WITHOUT_ATTENTION = {"linear_attention", "conv", "moe", "mlp", "mamba"}

# Which layers get position embeddings, where the model and not the attention class decides.
BY_MODEL = {
    "beam": lambda c, i: c.rope_parameters[c.layer_types[i]] is not None,
    "granite_swa": lambda c, i: bool(c.layer_rope_theta[i]),
    "granitemoe_swa": lambda c, i: bool(c.layer_rope_theta[i]),
    "muse_glimmer_text": lambda c, i: bool(c.layer_rope_theta[i]),
    "muse_spark_text": lambda c, i: bool(c.layer_rope_theta[i]),
    "granitemoehybrid": lambda c, i: c.position_embedding_type == "rope",
    "zamba2": lambda c, i: c.use_mem_rope and c.layers_block_type[i] == "hybrid",
    "falcon": lambda c, i: not c.alibi,
    "esm": lambda c, i: c.position_embedding_type == "rotary",
    "llama4_text": lambda c, i: bool(c.no_rope_layers[i]),
    "smollm3": lambda c, i: bool(c.no_rope_layers[i]),
    "cohere2": lambda c, i: c.layer_types[i] == "sliding_attention",
    "afmoe": lambda c, i: c.layer_types[i] == "sliding_attention",
    "flint": lambda c, i: c.layer_types[i] == "sliding_attention",
    "cohere2_moe": lambda c, i: c.layer_types[i] == "sliding_attention" or (
        c.mlp_layer_types[i] == "dense" and c.prefix_dense_sliding_window_pattern == 1),
    **{key: lambda c, i: c.sliding_window is None or c.layer_types[i] == "sliding_attention"
       for key in ("exaone4", "exaone_moe", "kolibri1")},
}

# (model type, change): why phasor and transformers differ.
DIFFERENCES = [
    (".*", "layer_rope_theta .*", "a list that says which layers rotate is heeded in every family"),
    ("cohere2_moe", "(rope_scaling|rope_parameters).*|original length beside|longrope|su",
     "the class drops rope_scaling, and a part of the head beside a table"),
    ("minimax_m3_vl_text", "tables.*", "the class does not look for tables by kind of layer"),
    ("diffusion_gemma_text", "partial_rotary_factor",
     "its class leaves the key where the view of one layer finds it"),
    ("nomic_bert", "rotary_emb_base", "the files of the hub say it so, for code of their own"),
    ("glm4_moe_lite|jetmoe|glm4v_moe_text", "head_dim .*",
     "head_dim is another name of a key that has a default of its own"),
]


def pairs_of_classes():
    """(module, rotary class, config class) of everything but vision towers."""
    found = []
    for module in families.load_modules().values():
        classes = list(families.own_classes(module))
        for name, cls in classes:
            if not issubclass(cls, torch.nn.Module):
                continue
            if not re.search(r"(Rotary|Rope)\w*Embedding$", name):
                continue
            if "Vision" in name or name == "MLCDRotaryEmbedding":
                continue
            configs = families.configs_by_use(module, classes, cls)
            annotated = families.config_class_of(cls, module)
            configs += [CONFIG_MAPPING[key] for key in families.USED_WITH.get(name, [])]
            if annotated is not None and (families.fits(annotated) or not configs):
                configs = list(dict.fromkeys([annotated, *configs]))
            for config in configs:
                key = config.model_type
                if key and key in CONFIG_MAPPING and families.fits(config):
                    found.append((module, cls, config))
    return found


def changes(config_class):
    """(name, keys) of each case."""
    base = dict(families.COMPLETED.get(config_class.model_type, {}))
    config = config_class.from_dict(json.loads(json.dumps(base)))
    yield "default", {}
    saved = json.loads(config.to_json_string(use_diff=False))
    yield "saved", {"": saved}
    yield "saved difference", {"": json.loads(config.to_json_string())}

    few = {"num_hidden_layers": LAYERS}
    yield "few layers", few
    for key in families.THETA_KEYS:
        yield f"{key}", {**few, key: 7654321.0}
    yield "rope_theta whole", {**few, "rope_theta": 500000}
    for key in families.PART_KEYS:
        yield key, {**few, key: 32 if key == "rotary_dim" else 0.5}
    fields = {*config_class.__dataclass_fields__, *(config_class.attribute_map or {})}
    for key in families.SIZE_KEYS:
        # Another family's name of a size is not a spelling of this one's.
        if key not in fields | {"head_dim", "qk_rope_head_dim"}:
            continue
        value = families.read(config, key)
        value = value if isinstance(value, int) and value > 0 else 128
        yield f"{key} doubled", {**few, key: value * 2}
    yield "head_dim null", {**few, "head_dim": None}

    scalings = {
        "default": {},
        "linear": {"factor": 4.0},
        "dynamic": {"factor": 4.0},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 4096},
        "yarn without a length": {"factor": 4.0},
        "yarn in full": {
            "factor": 40.0, "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.707,
            "mscale_all_dim": 0.9, "truncate": False, "original_max_position_embeddings": 2048},
        "yarn with a factor": {
            "factor": 4.0, "attention_factor": 0.75, "original_max_position_embeddings": 4096},
        "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": 2048},
        "proportional": {"partial_rotary_factor": 0.5},
    }
    for name, table in scalings.items():
        kind = name.split()[0]
        for spelling in ("rope_type", "type"):
            said = {spelling: kind, **table}
            for where in ("rope_scaling", "rope_parameters"):
                yield f"{where} {spelling} {name}", {**few, where: said}
                yield f"{where} {spelling} {name}, theta beside", {
                    **few, "rope_theta": 7654321.0, where: said}
                yield f"{where} {spelling} {name}, part beside", {
                    **few, "partial_rotary_factor": 0.5, where: said}
            yield f"rope_scaling {spelling} {name}, theta inside", {
                **few, "rope_scaling": {**said, "rope_theta": 7654321.0}}
            yield f"rope_parameters {spelling} {name}, theta inside", {
                **few, "rope_parameters": {**said, "rope_theta": 7654321.0}}
    yield "original length beside", {
        **few, "original_max_position_embeddings": 1024,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    yield "longrope", {**few, "rope_scaling": "LONGROPE"}
    yield "su", {**few, "rope_scaling": "SU"}
    yield "rope_scaling empty", {**few, "rope_scaling": {}}
    yield "rope_scaling and rope_parameters", {
        **few, "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 5000.0}}

    types = list(dict.fromkeys(getattr(config, "layer_types", None) or []))
    labels = list(getattr(config, "_rope_type_labels", None) or types)
    known = list(dict.fromkeys([*labels, "full_attention", "sliding_attention"]))
    tables = {name: {"rope_type": "default", "rope_theta": 1000.0 * (i + 2)}
              for i, name in enumerate(known)}
    if labels:
        own = {name: tables[name] for name in labels}
        yield "tables", {**few, "rope_parameters": own}
        yield "tables of all types", {**few, "rope_parameters": tables}
        yield "tables without theta", {**few, "rope_parameters": {
            name: {"rope_type": "linear", "factor": 2.0} for name in labels}}
        yield "tables without theta, theta beside", {**few, "rope_theta": 7654321.0,
              "rope_parameters": {name: {"rope_type": "default"} for name in labels}}
        yield "tables, part beside", {**few, "partial_rotary_factor": 0.5, "rope_parameters": own}
        yield "tables with parts", {**few, "rope_parameters": {
            name: {**table, "partial_rotary_factor": 0.5} for name, table in own.items()}}
        yield "tables with yarn", {**few, "rope_parameters": {
            name: {**table, "rope_type": "yarn", "factor": 4.0,
                   "original_max_position_embeddings": 2048} for name, table in own.items()}}
        yield "tables, old table beside", {**few, "rope_parameters": own,
              "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
        for name in labels:
            yield f"tables but {name}", {**few, "rope_parameters": {
                k: v for k, v in own.items() if k != name}}
            yield f"tables, {name} null", {**few, "rope_parameters": {**own, name: None}}
    for names in (["full_attention", "sliding_attention"], ["sliding_attention", "full_attention"],
                  ["attention", "mamba"], ["full_attention", "linear_attention"],
                  ["full_attention"], ["sliding_attention"], *([types] if len(types) > 1 else []),
                  ["hybrid", "linear_attention"]):
        listed = (names * LAYERS)[:LAYERS]
        yield f"layer_types {' '.join(names)}", {**few, "layer_types": listed}
        yield f"layers_block_type {' '.join(names)}", {**few, "layers_block_type": listed}
    for key, value in {
        "sliding_window": None, "sliding_window_pattern": 3, "global_attn_every_n_layers": 2,
        "full_attention_interval": 3, "layer_group_size": 3, "no_rope_layer_interval": 3,
        "no_rope_layers": [1, 0, 1, 1, 0, 1, 1, 1], "attn_layer_indices": [1, 5],
        "full_attn_idxs": [2, 3], "block_types": ["attention", "recurrent"],
        "attn_type_list": [0, 1, 0, 1, 0, 1, 0, 1], "cross_attention_layers": [1, 4],
        "layer_rope_theta": [1e4, 0, 1e4, 1e4, 0, 1e4, 1e4, 0], "use_sliding_window": True,
        "compress_ratios": [0, 4, 128, 0, 4, 128, 0, 4], "attention_windows": [0, 64] * 4,
        "partial_rotary_factors": [0.5] * 8, "first_k_dense_replace": 2, "alibi": True,
        "position_embedding_type": "rope", "use_mem_rope": True, "qk_rope_head_dim": 32,
        "prefix_dense_sliding_window_pattern": 2, "use_bidirectional_attention": True,
        "max_position_embeddings": 4096, "sliding_window_size": 64, "rope_interleave": False,
        "rope_ratio": 2.0, "rope_scaling": None, "rope_parameters": None, "rope_theta": None,
    }.items():
        yield f"{key} {json.dumps(value)}", {**few, key: value}
    yield "compress_ratios, longer", {**few, "compress_ratios": [0, 4, 128] * 4}
    yield "layer_types, longer", {**few, "layer_types": ["full_attention"] * (LAYERS + 3)}
    yield "layer_types, padded", {
        **few, "layer_types": ["full_attention", "sliding_attention"] * 5,
        "num_nextn_predict_layers": 2, "rope_theta": [5e6, 1e4] * 5,
        "partial_rotary_factors": [0.5, 1.0] * 5,
        "rope_scaling": scalings["llama3"] | {"rope_type": "llama3"}}
    yield "rope_theta listed", {**few, "rope_theta": [5e6, 1e4] * 4}
    yield "rope_theta listed, types", {
        **few, "rope_theta": [5e6, 1e4] * 4,
        "layer_types": ["full_attention", "sliding_attention"] * 4}
    yield "windows and thetas listed", {
        **few, "rope_theta": [5e6, 1e4] * 4, "attention_windows": [0, 64] * 4}


def with_lists(keys, pairs):
    """LongRoPE's lists, of the right length."""
    table = keys.get("rope_scaling")
    if table in ("LONGROPE", "SU"):
        keys = dict(keys)
        keys["rope_scaling"] = {
            "rope_type" if table == "LONGROPE" else "type": "longrope" if table == "LONGROPE"
            else "su", "original_max_position_embeddings": 4096, "factor": 32.0,
            "short_factor": [1.0 + i / 64 for i in range(pairs)],
            "long_factor": [2.0 + i / 8 for i in range(pairs)]}
    return keys


def frequencies(rotary):
    """{layer type or "": (inv_freq, attention factor)}"""
    found = {}
    for name, values in families.inverse_frequencies(rotary).items():
        scaling = getattr(rotary, f"{name}_attention_scaling" if name else "attention_scaling", 1.0)
        found[name] = (values.detach().double().tolist(), float(scaling))
    return found


def of_lengths(rotary):
    """The same for a short and for a long sequence."""
    short = frequencies(rotary)
    long = {}
    for name in short:
        kind = rotary.rope_type
        kind = kind.get(name, "") if isinstance(kind, dict) else kind
        if kind not in ("dynamic", "longrope"):
            long[name] = short[name]
            continue
        x, ids = torch.zeros(1, 1, 1), torch.tensor([[LONG - 1]])
        if getattr(rotary, "mrope_section", None) is not None:
            ids = ids[None].expand(3, -1, -1)
        rotary(x, ids, name) if name else rotary(x, ids)
        long[name] = frequencies(rotary)[name]
    return short, long


def of_transformers(rotary_class, config_class, keys):
    """(short, long, layers): frequencies by layer type, and the type of each layer or None."""
    config = config_class.from_dict(json.loads(json.dumps(keys)))
    by_theta = getattr(config, "layer_rope_theta", None)
    if by_theta and config.model_type.startswith("granite"):
        short, long = {}, {}
        for theta in sorted({theta for theta in by_theta if theta}):
            again = config_class.from_dict(json.loads(json.dumps(keys)))
            again.rope_parameters["rope_theta"] = theta
            plain, stretched = of_lengths(rotary_class(again))
            short[theta], long[theta] = plain[""], stretched[""]
    else:
        short, long = of_lengths(rotary_class(config))
    dims = getattr(config, "qk_rope_head_dim", None)
    if dims and config.model_type != "deepseek_v4" and any(
            2 * len(freqs) != dims for freqs, _ in short.values()):
        raise ValueError("the table does not fit the part that rotates")
    layers = []
    types = getattr(config, "layer_types", None)
    if types is None and hasattr(config_class, "layers_block_type"):
        types = config.layers_block_type
    if types is None and "layer_types" in type(config).__dataclass_fields__ and not by_theta:
        # Models without types of layers have no such field, or leave it None and do not look.
        source = inspect.getsource(sys.modules[rotary_class.__module__])
        if re.search(r"config\.layer_types\[", source):
            raise ValueError("layer_types is missing")
    count = getattr(config, "num_layers_per_stack", None) or config.num_hidden_layers
    if config.model_type == "mllama_text_model":
        types = ["cross" if i in config.cross_attention_layers else "full_attention"
                 for i in range(count)]
    for i in range(min(count, 2 * LAYERS)):
        kind = types[i] if types is not None and i < len(types) else None
        rotates = kind not in WITHOUT_ATTENTION and kind != "cross"
        if config.model_type in BY_MODEL:
            rotates = rotates and BY_MODEL[config.model_type](config, i)
        if not rotates:
            layers.append(None)
        elif by_theta and config.model_type.startswith("granite"):
            layers.append(by_theta[i])
        elif "" in short:
            layers.append("")
        elif config.model_type == "deepseek_v4":
            layers.append("main" if kind == "sliding_attention" else "compress")
        elif kind in short:
            layers.append(kind)
        else:
            raise KeyError(f"no frequencies for {kind}")
    return short, long, layers


def same(kind, which, theirs):
    """What differs between the frequencies of a kind and (inv_freq, factor), or None."""
    ours = kind[which]
    if "error" in ours:
        return ours["error"]
    freqs, factor = theirs
    # ERNIE's pairs are in an order of their own.
    if "Ernie" in (kind["axes"] or ""):
        ours = {**ours, "inv_freq": sorted(ours["inv_freq"])}
        freqs = sorted(freqs)
    if len(ours["inv_freq"]) != len(freqs):
        return f"{len(ours['inv_freq'])} pairs, not {len(freqs)}"
    for i, (a, b) in enumerate(zip(ours["inv_freq"], freqs)):
        if abs(a - b) > TOLERANCE * abs(b):
            return f"inv_freq[{i}] {a:.7g}, not {b:.7g}"
    if abs(ours["attention_factor"] - factor) > 1e-6 * factor:
        return f"attention factor {ours['attention_factor']}, not {factor}"
    return None


def compare(ours, theirs, counted):
    """What differs, or None."""
    short, long, layers = theirs
    if ours["layers_unknown"] and not ours["layers"]:
        if counted:
            return f"layers: {ours['layers_unknown']}"
        # Without a number of layers, by kind.
        for name in sorted({name for name in layers if name is not None}):
            mine = name if name in ours["kinds"] else next(iter(ours["kinds"]))
            for which, table in (("short", short), ("long", long)):
                wrong = same(ours["kinds"][mine], which, table[name])
                if wrong:
                    return f"kind {name} ({which}): {wrong}"
        return None
    for i, name in enumerate(layers):
        if i >= len(ours["layers"]):
            return f"layer {i} is missing"
        mine = ours["layers"][i]
        if (mine is None) != (name is None):
            return f"layer {i}: {mine}, not {name}"
        if mine is None:
            continue
        for which, table in (("short", short), ("long", long)):
            wrong = same(ours["kinds"][mine], which, table[name])
            if wrong:
                return f"layer {i} ({mine}, {which}): {wrong}"
    return None


def explanation(key, name):
    for of, change, why in DIFFERENCES:
        if re.fullmatch(of, key) and re.fullmatch(change, name):
            return f"explained: {why}"
    return None


def main():
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    wanted = set(sys.argv[1:])
    cases = []
    skipped = collections.Counter()
    for module, rotary_class, config_class in pairs_of_classes():
        key = config_class.model_type
        if wanted and key not in wanted:
            continue
        base = {**families.COMPLETED.get(key, {}), "model_type": key}
        try:
            plain = of_transformers(rotary_class, config_class, base)
            made = list(changes(config_class))
        except Exception as error:  # noqa: BLE001
            skipped[f"{key} {rotary_class.__name__}: {type(error).__name__}: {error}"[:150]] += 1
            continue
        pairs = len(next(iter(plain[0].values()))[0]) if plain[0] else 0
        for name, change in made:
            change = with_lists(change, pairs)
            config = {**base, **change}
            if "" in change:
                config = {**change[""], "model_type": key}
            try:
                theirs = of_transformers(rotary_class, config_class, config)
            except Exception as error:  # noqa: BLE001 - it refuses in any way it likes
                theirs = f"{type(error).__name__}: {str(error)[:100]}"
            cases.append((key, rotary_class.__name__, name, config, theirs))

    lines = "".join(json.dumps(config) + "\n" for _, _, _, config, _ in cases)
    read = subprocess.run([READER], input=lines, capture_output=True, text=True, check=True)
    counts = collections.Counter()
    per_type = collections.defaultdict(collections.Counter)
    differ = []
    refused = collections.Counter()
    answers = read.stdout.splitlines()
    for (key, rotary, name, config, theirs), said in zip(cases, answers, strict=True):
        ours = json.loads(said)
        if isinstance(theirs, str):
            outcome = "both refuse" if "error" in ours else "transformers refuses"
        elif not any(layer is not None for layer in theirs[2]):
            right = ours.get("kind") == "NoRotation" or not any(ours.get("layers", [1]))
            outcome = "agree" if right else "phasor refuses" if "error" in ours else (
                explanation(key, name) or "DIFFER")
            if outcome == "DIFFER":
                differ.append((key, rotary, name, "no layer rotates"))
        elif "error" in ours:
            outcome = "phasor refuses"
            refused[(key, re.sub(r"[0-9.]+", "#", ours["error"])[:110])] += 1
        else:
            wrong = compare(ours, theirs, "num_hidden_layers" in config)
            outcome = "agree"
            if wrong:
                outcome = explanation(key, name) or "DIFFER"
                if outcome == "DIFFER":
                    differ.append((key, rotary, name, wrong))
        counts[outcome] += 1
        per_type[key][outcome] += 1
    for line in differ:
        print("DIFFER", *line, sep=" | ")
    for (key, error), n in sorted(refused.items()):
        print(f"refused {n:3} {key}: {error}")
    for line in skipped:
        print("not tried:", line)
    print(f"{len(per_type)} config classes, {len(cases)} configs")
    for outcome, count in counts.most_common():
        print(f"{count:6} {outcome}")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
