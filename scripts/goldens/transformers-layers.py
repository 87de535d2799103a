#!/usr/bin/env python3
"""Make tests/goldens/transformers/layers.json: how the layers of each config class rotate.

A part of what transformers-sweep.py tries, small enough to be a test: every config class that has
rotary embedding, as it is by default, and with keys changed one at a time. Which keys matter
differs between classes: a change is kept where a class' layers rotate otherwise with it.

transformers' own config class and RotaryEmbedding say what is expected. Cases on which
transformers-sweep.py reports a difference, or a refusal of either side, are left out: that script
explains them.

    python -m venv venv && . venv/bin/activate
    pip install -r scripts/goldens/requirements-transformers.txt
    cargo build --release --example read_configs
    python scripts/goldens/transformers-layers.py            # write
    python scripts/goldens/transformers-layers.py --check    # compute again, compare

The file
--------
"changes" has the keys of changes that several classes share. "classes" has for each model_type
"base", keys that every case has beside it, and "cases": the number of a change or keys, and the
number of a result, in turn. "results" are [kinds, layers]. A kind is [pairs, inv_freq of the second pair and
of the last one, attention factor] twice, for short and for long sequences; layers are numbers of
kinds, null where nothing rotates.
"""

import argparse
import importlib.util
import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path

spec = importlib.util.spec_from_file_location("sweep", Path(__file__).with_name("transformers-sweep.py"))
sweep = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sweep)
import torch  # noqa: E402
import transformers  # noqa: E402

FILE = sweep.ROOT / "tests/goldens/transformers/layers.json"
# What several lists of the sweep say again is enough once.
LEFT_OUT = (
    "saved", "rope_scaling type", "rope_parameters type", "rope_theta whole", "yarn in full", "yarn without",
    "yarn with a factor", "longrope", "su", "layers_block_type",
)


def described(theirs):
    short, long, layers = theirs
    names = list(dict.fromkeys(name for name in layers if name is not None))
    kinds = []
    for name in names:
        kind = []
        for freqs, factor in (short[name], long[name]):
            second = freqs[1] if len(freqs) > 1 else freqs[0]
            kind.append([len(freqs), *(float(f"{x:.8g}") for x in (second, freqs[-1], factor))])
        kinds.append(kind if kind[0] != kind[1] else kind[:1])
    return [kinds, [None if name is None else names.index(name) for name in layers]]


def tried():
    """(model type, base, name, keys, what transformers says)"""
    for _, rotary_class, config_class in sweep.pairs_of_classes():
        key = config_class.model_type
        base = dict(sweep.families.COMPLETED.get(key, {}))
        try:
            plain = sweep.of_transformers(rotary_class, config_class, {**base, "model_type": key})
            changes = list(sweep.changes(config_class))
        except Exception:  # noqa: BLE001 - the sweep names it
            continue
        if "Ernie" in rotary_class.__name__:
            # Its pairs are in an order of their own, of which the second is not the second.
            continue
        pairs = len(next(iter(plain[0].values()))[0]) if plain[0] else 0
        usual = None
        for name, keys in changes:
            if any(word in name for word in LEFT_OUT):
                continue
            keys = sweep.with_lists(keys, pairs)
            try:
                theirs = sweep.of_transformers(
                    rotary_class, config_class, {**base, **keys, "model_type": key})
                said = described(theirs)
            except Exception:  # noqa: BLE001
                continue
            if name == "few layers":
                usual = said
            elif name != "default" and said == usual and not name.startswith("tables"):
                continue
            yield key, base, name, keys, theirs, said


def made():
    cases = list(tried())
    lines = "".join(json.dumps({**base, **keys, "model_type": key}) + "\n" for key, base, _, keys, _, _ in cases)
    answers = subprocess.run([sweep.READER], input=lines, capture_output=True, text=True, check=True)
    by_name, agreed = {}, []
    for (key, base, name, keys, theirs, said), answer in zip(cases, answers.stdout.splitlines(), strict=True):
        ours = json.loads(answer)
        if "error" in ours or all(layer is None for layer in theirs[2]):
            continue
        if sweep.compare(ours, theirs, "num_hidden_layers" in keys):
            continue
        by_name.setdefault(name, []).append(keys)
        agreed.append((key, base, name, keys, said))
    # Keys that are the same for all classes are written once.
    shared = {name: all_[0] for name, all_ in by_name.items() if len(all_) > 1 and all(k == all_[0] for k in all_)}
    names = list(shared)
    classes, results = {}, {}
    for key, base, name, keys, said in agreed:
        number = results.setdefault(json.dumps(said), len(results))
        of_class = classes.setdefault(key, {"base": base, "cases": []})
        case = [names.index(name) if name in shared else keys, number]
        if case not in of_class["cases"]:
            of_class["cases"].append(case)
    for of_class in classes.values():
        of_class["cases"] = [part for case in of_class["cases"] for part in case]
    peer = f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]} (CPU)"
    short = {"separators": (",", ":")}
    text = '{"peer":' + json.dumps(peer) + ',\n"changes":[\n'
    text += ",\n".join(json.dumps(keys, **short) for keys in shared.values())
    text += '\n],\n"results":[\n'
    text += ",\n".join(json.dumps(json.loads(result), **short) for result in results)
    text += '\n],\n"classes":{\n'
    text += ",\n".join(f"{json.dumps(key)}:{json.dumps(of, **short)}" for key, of in sorted(classes.items()))
    return text + "\n}}\n"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    text = made()
    if not check:
        FILE.write_text(text)
    elif FILE.read_text() != text:
        sys.exit(f"{FILE} is not what this makes")
    print(len(text), "bytes")


if __name__ == "__main__":
    main()
