#!/usr/bin/env python3
"""Make tests/goldens/llama-cpp/architectures.json: what llama.cpp's source makes of GGUF metadata.

What
----
For each architecture of llama.cpp and each of a list of cases (metadata and tensors) the loaders and
graphs of llama.cpp itself are run, by an interpreter of the C++ that they are written in
(cpp_subset.py): load_hparams, the architecture's load_arch_hparams and load_arch_tensors, the part of
llama_context that makes YaRN's factors, llama_model_rope_type, and the graph, whose calls of
ggml_rope_ext, ggml_rope_multi and ggml_rope_set_offset on queries and keys are noted, layer by layer.
Tensors are not computed. A call's arguments become frequencies and a magnitude by ggml's formulas.

The file holds, for each case, groups of architectures with the same result: "refused", where llama.cpp
does not load such a file ("unknown tensors") or a check fails that bears on rotation ("keys"), or the
layers' indices into a list of rotations, null for none. Layers that predict further tokens are left
out. A rotation is

    dims, offset   how many dims of a head rotate, and the first
    mode           norm, neox, mrope or imrope, and for these two the sections
    inv_freq       of pairs 0, 1, the middle and the last, in radians per position
    magnitude      what multiplies cos and sin
    long           the same two for sequences longer than the model was trained on, where they differ

How to run
----------
    python3 scripts/goldens/llama-cpp.py            # write
    python3 scripts/goldens/llama-cpp.py --check    # read the source again, compare

cargo fetches the source, in a folder of its own; --source takes one that is there already (the folder
with src/llama-arch.cpp). Needs nothing beside Python 3.9.
"""

import argparse
import collections
import copy
import json
import math
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import cpp_subset as cpp
from cpp_subset import UNKNOWN, Fields, Interpreter, Parser, Refused, Scope

CRATE, VERSION = "llama-cpp-sys-2", "0.1.161"
ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests/goldens/llama-cpp/architectures.json"
LAYERS = 512

# Rotations of other tensors than the queries and keys of attention: keys of an index, pooled keys.
OTHERS = re.compile(r"indexer|^i[qk]$|^comp$|^pooled|^out$")
# Methods of graphs that rotate nothing but those.
OTHER_METHODS = {"build_qsa_sel"}


def f32(x):
    return struct.unpack("f", struct.pack("f", x))[0]


class Source:
    """llama.cpp's source, parsed as far as it is asked for."""

    def __init__(self, folder):
        self.folder = folder / "src"
        self.texts = {}
        self.parsed = {}
        models = sorted((self.folder / "models").glob("*.cpp"))
        self.models = "\n".join(self.text(path) for path in models)
        self.headers = self.text(self.folder / "models/models.h")
        self.model = self.text(self.folder / "llama-model.cpp")
        self.arch = self.text(self.folder / "llama-arch.cpp")
        self.hparams = self.text(self.folder / "llama-hparams.cpp")
        self.hparams_header = self.text(self.folder / "llama-hparams.h")
        self.context = self.text(self.folder / "llama-context.cpp")
        self.graph = self.text(self.folder / "llama-graph.cpp")
        self.names = dict(
            re.findall(r'\{\s*(LLM_ARCH_\w+),\s*"([^"(]+)"\s*\}', self.arch)
        )
        self.keys = dict(re.findall(r'\{\s*(LLM_KV_\w+),\s*"([^"]*)"\s*\}', self.arch))
        self.tensors = dict(re.findall(r'\{\s*(LLM_TENSOR_ROPE_\w+),\s*"([^"]*)"\s*\}', self.arch))
        self.classes = {}
        labels = []
        for line in self.model.split("\n"):
            case = re.search(r"case (LLM_ARCH_\w+):", line)
            made = re.search(r"return new (llama_model_\w+)\(params\);", line)
            if case:
                labels.append(case[1])
            if made:
                self.classes.update(dict.fromkeys(labels, made[1]))
            if made or "return" in line or "break" in line:
                labels = []
        self.parents, self.graphs = {}, {}
        for match in re.finditer(
            r"struct (llama_model_\w+)\s*:\s*public (llama_model_\w+)\s*\{", self.headers
        ):
            self.parents[match[1]] = match[2]
            inside, _ = cpp.body(self.headers, match.start())
            self.graphs[match[1]] = dict(
                re.findall(r"using (\w+)\s*=\s*(llama_model_\w+::\w+)", inside)
            )
            self.graphs[match[1]].update(
                {
                    f"parent of {child}": parent
                    for child, parent in re.findall(
                        r"struct (graph\w*)\s*:\s*public (llama_model_\w+::graph\w*)", inside
                    )
                }
            )

    def text(self, path):
        if path not in self.texts:
            self.texts[path] = cpp.strip(path.read_text())
        return self.texts[path]

    def function(self, text, pattern):
        """The parameters' names and the parsed body of the function whose head matches."""
        key = (id(text), pattern)
        if key not in self.parsed:
            match = re.search(pattern + r"\s*\(", text)
            if not match:
                self.parsed[key] = None
            else:
                depth, place = 0, match.end() - 1
                while True:
                    depth += (text[place] == "(") - (text[place] == ")")
                    place += 1
                    if depth == 0:
                        break
                head = text[match.end() : place - 1]
                names = [part.split("=")[0].strip() for part in split_top(head)]
                names = [re.findall(r"\w+", part)[-1] for part in names if part]
                inside, _ = cpp.body(text, place)
                before = text[: match.start()].rstrip().split("\n")[-1]
                template = re.search(r"template\s*<\s*\w+\s+(\w+)\s*>", before + text[match.start() : match.end()])
                self.parsed[key] = (
                    names,
                    Parser(inside).program(),
                    template[1] if template else None,
                )
        return self.parsed[key]

    def method(self, klass, name):
        """A method of a class of models, or of the one that it inherits from."""
        while klass is not None:
            found = self.function(self.models, rf"\b{klass}::{name}")
            if found:
                return found
            klass = self.parents.get(klass)
        return None


def split_top(text):
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "(<[{") - (letter in ")>]}")
        if letter == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    return [*parts, text[start:]]


class File:
    """A GGUF file: metadata without the architecture's prefix, and lengths of tensors."""

    def __init__(self, metadata, tensors):
        self.metadata, self.tensors = metadata, tensors


class Model:
    """One architecture with one file."""

    def __init__(self, source, arch, file):
        self.source, self.arch, self.file = source, arch, file
        self.klass = source.classes[arch]
        self.run = Interpreter(self.constants(), MATTERS)
        self.used_tensors = set()
        self.calls = []
        self.hparams = self.default_hparams()
        names = {"hparams": self.hparams, "arch": arch, **dict.fromkeys(MEMBERS, UNKNOWN)}
        self.scope = Scope(None, names)
        self.loader = Fields(
            get_key=self.with_nodes(self.get_key),
            get_arr=self.with_nodes(self.get_arr),
            get_key_or_arr=self.with_nodes(self.get_key_or_arr),
            get_arr_n=self.with_nodes(self.get_arr_n),
            get_arch=lambda: arch,
            get_weight=lambda name: True,
        )

    @staticmethod
    def with_nodes(function):
        def call(interpreter, scope, nodes):
            return function(scope, nodes)
        call.with_nodes = True
        return call

    def constants(self):
        return {"LLAMA_MAX_LAYERS": LAYERS, "LLAMA_MAX_EXPERTS": 1 << 20, "LLAMA_MAX_SEQ": 256}

    def default_hparams(self):
        text = self.source.hparams_header
        fields = {}
        for match in re.finditer(
            r"^\s*(?:enum\s+)?([\w:]+)\s+(\w+)\s*(?:=\s*([^;]+))?;", text, re.MULTILINE
        ):
            kind, name, value = match.groups()
            if value is not None:
                fields[name] = self.run.value(Parser(value).expression(), Scope())
            elif kind in {"uint32_t", "int32_t", "int", "float", "bool"}:
                fields[name] = 0
        for kind, size, name in re.findall(r"std::array<(\w+), *(\w+)>\s+(\w+)", text):
            fields[name] = [0] * (int(size) if size.isdigit() else LAYERS)
        hparams = Fields(missing=UNKNOWN, **fields)
        scope = Scope(None, {})
        scope.names = hparams.fields
        for name in re.findall(r"llama_hparams::(\w+)\(", self.source.hparams):
            hparams.fields[name] = self.bound(self.source.hparams, rf"llama_hparams::{name}", scope)
        return hparams

    def bound(self, text, pattern, scope, extra=None):
        def call(*values):
            names, program, _ = self.source.function(text, pattern)
            given = dict(zip(names, values))
            if "il" in names and "il" not in given:
                given["il"] = 0
            return self.run.run(program, Scope(scope, {**(extra or {}), **given}))
        return call

    # The loader of metadata

    def key(self, scope, node):
        name = self.run.value(node, scope)
        return self.source.keys[name].replace("%s.", "")

    def get_key(self, scope, nodes):
        key = self.key(scope, nodes[0])
        required = True if len(nodes) < 3 else self.run.value(nodes[2], scope)
        found = self.file.metadata.get(key)
        if found is None or isinstance(found, list):
            if required and key in REQUIRED_HERE:
                raise Refused
            return False
        self.run.reference(nodes[1], scope).write(found)
        return True

    def get_arr(self, scope, nodes):
        key = self.key(scope, nodes[0])
        required = True if len(nodes) < 3 else self.run.value(nodes[2], scope)
        found = self.file.metadata.get(key)
        if not isinstance(found, list):
            if required and key in REQUIRED_HERE:
                raise Refused
            if key in INVENTED:
                return True
            return False
        target = self.run.reference(nodes[1], scope).read()
        if isinstance(target, list):
            target[: len(found)] = [int(entry) for entry in found]
        return True

    def get_key_or_arr(self, scope, nodes):
        key = self.key(scope, nodes[0])
        required = True if len(nodes) < 4 else self.run.value(nodes[3], scope)
        count = self.run.value(nodes[2], scope)
        found = self.file.metadata.get(key)
        if found is None:
            if required and key in REQUIRED_HERE:
                raise Refused
            return False
        target = self.run.reference(nodes[1], scope).read()
        if isinstance(found, list):
            if len(found) != count:
                raise Refused
            target[:count] = [int(entry) for entry in found]
        else:
            target[:count] = [found] * count
        return True

    def get_arr_n(self, scope, nodes):
        found = self.file.metadata.get(self.key(scope, nodes[0]))
        if not isinstance(found, list):
            return False
        self.run.reference(nodes[1], scope).write(len(found))
        return True

    # Loading

    def load(self):
        source = self.source
        base = self.bound(source.model, r"llama_model_base::load_hparams", self.scope)
        self.scope.names["load_arch_hparams"] = self.load_arch_hparams
        self.scope.names["load_swa_pattern"] = self.load_swa_pattern
        self.scope.names["this"] = UNKNOWN
        self.scope.names["classifier_labels"] = UNKNOWN
        self.scope.names["target_layer_ids"] = [0]
        self.scope.names["llama_model_rope_type"] = lambda _: UNKNOWN
        types = re.findall(r'\{\s*(LLAMA_ROPE_SCALING_TYPE_\w+),\s*"(\w+)"\s*\}', source.model)
        types = {name: scaling for scaling, name in types}
        unknown = "LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED"
        self.scope.names["llama_rope_scaling_type_from_string"] = (
            lambda name: types.get(name, unknown)
        )
        base(self.loader)
        model = Fields(arch=self.arch, hparams=self.hparams)
        rope_type = self.bound(source.model, r"llama_rope_type llama_model_rope_type", self.scope)
        self.hparams.rope_type = rope_type(model)
        self.load_context()
        self.load_tensors()

    def load_arch_hparams(self, loader, klass=None):
        klass = klass or self.klass
        names, program, _ = self.source.method(klass, "load_arch_hparams")
        scope = Scope(self.scope, dict(zip(names, [loader])))
        for parent in set(self.source.parents.values()):
            scope.names[f"{parent}::load_arch_hparams"] = (
                lambda loader, parent=parent: self.load_arch_hparams(loader, parent)
            )
        self.run.run(program, scope)

    def load_swa_pattern(self, loader, period, dense_first=False):
        names, program, _ = self.source.function(
            self.source.model, r"llama_model_base::load_swa_pattern"
        )
        values = dict(zip(names, [loader, period, dense_first]))
        self.run.run(program, Scope(self.scope, values))

    def load_context(self):
        text = self.source.context
        start = text.index("cparams.yarn_ext_factor         =")
        end = text.index("cparams.yarn_attn_factor *= hparams.rope_attn_factor;")
        program = Parser(text[start : text.index(";", end) + 1]).program()
        raw = (self.source.folder / "llama-context.cpp").read_text()
        defaults = re.findall(r"/\*\.(\w+)\s*=\*/\s*([^\n]+),", raw)
        params = Fields()
        for name, value in defaults:
            if name.startswith(("rope", "yarn", "n_ctx", "n_seq")):
                setattr(params, name, self.run.value(Parser(value).expression(), Scope()))
        params.ctx_other = True
        self.cparams = Fields(missing=UNKNOWN)
        model = Fields(arch=self.arch)
        names = {"params": params, "cparams": self.cparams, "model": model}
        # The body of a lambda is parsed with its parameters by name.
        self.run.run(program, Scope(self.scope, names))

    def load_tensors(self):
        count = max(self.hparams.n_layer_all, 1)
        layers = [
            Fields(rope_freqs=None, rope_long=None, rope_short=None) for _ in range(LAYERS)
        ]
        self.layers = layers
        members = self.graph_members()
        method = self.source.method(self.klass, "load_arch_tensors")
        if method is None:
            return
        names, program, _ = method
        scope = Scope(self.scope, dict(members))
        scope.names.update(
            layers=layers,
            n_layer_all=count,
            tn=lambda tensor, *rest: tensor,
            create_tensor=self.create_tensor,
        )
        for parent in set(self.source.parents.values()):
            scope.names[f"{parent}::load_arch_tensors"] = lambda _: None
        scope.names["ml"] = self.loader
        self.run.run(program, Scope(scope, dict(zip(names, [self.loader]))))

    def create_tensor(self, tensor, shape=UNKNOWN, flags=UNKNOWN):
        name = self.source.tensors.get(tensor) if isinstance(tensor, str) else None
        if name is None:
            return UNKNOWN
        self.used_tensors.add(name)
        length = self.file.tensors.get(name)
        return None if length is None else name

    # The graph

    def graph_members(self):
        """The members that every graph starts with."""
        head = self.source.graph.index("llm_graph_context::llm_graph_context(")
        text = self.source.graph[head : self.source.graph.index("{", head)]
        members = {"hparams": self.hparams, "cparams": self.cparams}
        scope = Scope(self.scope, members)
        params = Fields(hparams=self.hparams, cparams=self.cparams, arch=self.arch)
        scope.names["params"] = params
        for name, value in re.findall(r"(\w+)\s*\(([^\n]*)\)[,\s]", text):
            if name in {"hparams", "cparams", "llm_graph_context"}:
                continue
            try:
                found = self.run.value(Parser(value).expression(), scope)
            except cpp.Unparsed:
                found = UNKNOWN
            members[name] = found
        members.pop("params", None)
        return members

    def build(self, length):
        """The calls of each layer, in a context for sequences of so many tokens."""
        self.calls = []
        self.cparams.n_ctx_seq = length
        self.cparams.n_ctx = length
        members = self.graph_members()
        model = Fields(hparams=self.hparams, layers=self.layers, arch=self.arch, type=UNKNOWN)
        model.type = self.scope.get("type")
        scope = Scope(self.scope, {"cparams": self.cparams, "layers": self.layers})
        for name in ["get_rope_freq_base", "get_rope_freq_scale", "get_rope_factors"]:
            bound = self.bound(self.source.model, rf"llama_model::{name}", scope)
            setattr(model, name, bound)
        names, program, _ = self.source.method(self.klass, "build_arch_graph")
        params = Fields(gtype="LLM_GRAPH_TYPE_DEFAULT")
        made = self.run.run(program, Scope(self.scope, {"params": params}))
        for function in re.findall(r"^static float (\w+)\(", self.source.models, re.MULTILINE):
            pattern = rf"static float {function}"
            members[function] = self.bound(self.source.models, pattern, self.scope)
        graph_scope = Scope(
            self.scope,
            {
                **members,
                "model": model,
                "model_base": model,
                "params": UNKNOWN,
                "ggml_rope_ext": self.with_nodes(self.rope_ext),
                "ggml_rope_multi": self.with_nodes(self.rope_multi),
                "ggml_rope": self.with_nodes(self.rope),
                "ggml_rope_set_offset": self.set_offset,
            },
        )
        if made is not None:
            self.enter(self.klass, made, graph_scope)
        return self.calls

    def enter(self, klass, made, scope):
        """Runs the constructor of a graph, named as in make_unique."""
        match = re.fullmatch(r"((?:llama_model_\w+::)?)(\w+?)(?:<(\w+)>)?", made or "")
        if not match:
            raise cpp.Unparsed(f"{self.arch}: graph {made!r}")
        name, argument = match[2], match[3]
        holder = match[1].rstrip(":") or klass
        while True:
            own = self.source.graphs.get(holder, {})
            if name in own:
                holder, name = own[name].split("::")
            one = self.source.function(self.source.models, rf"{holder}::{name}<{argument}>::{name}")
            pattern = rf"{holder}::{name}(?:<\w+>)?::{name}"
            found = one or self.source.function(self.source.models, pattern)
            if found or holder not in self.source.parents:
                break
            holder = self.source.parents[holder]
        if not found:
            raise cpp.Unparsed(f"{self.arch}: constructor {pattern}")
        # Methods of the graph, and of the graph that it inherits from.
        chain = [(holder, name)]
        parent = self.source.graphs.get(holder, {}).get(f"parent of {name}")
        if parent:
            chain.append(tuple(parent.split("::")))
        for owner, graph in chain:
            pattern = rf"{owner}::{graph}(?:<\w+>)?::(\w+)\s*\("
            for method in set(re.findall(pattern, self.source.models)) - {graph}:
                if method in scope.names or method in OTHER_METHODS:
                    continue
                full = rf"{owner}::{graph}(?:<\w+>)?::{method}"
                scope.names[method] = self.bound(self.source.models, full, scope)
        _, program, template = found
        if template and argument:
            scope.names[template] = {"true": True, "false": False}.get(argument, UNKNOWN)
        self.run.run(program, scope)

    def note(self, scope, nodes, values):
        tensor = nodes[1][1] if nodes[1][0] == "name" else ""
        il = scope.get("il")
        if not isinstance(il, int):
            # In a lambda.
            il = self.run.layer
        if isinstance(scope.get("slot_base"), int):
            # In one of several stacks.
            il += scope.get("slot_base")
        if OTHERS.search(tensor) or not isinstance(il, int):
            return Fields(call=None)
        call = dict(il=il, offset=0, **values)
        self.calls.append(call)
        return Fields(call=call)

    def rope_ext(self, scope, nodes):
        names = ["factors", "dims", "mode", "n_ctx", "base", "scale", "ext", "attn", "fast", "slow"]
        values = [self.run.value(node, scope) for node in nodes[3:]]
        return self.note(scope, nodes, dict(zip(names, values), sections=None))

    def rope_multi(self, scope, nodes):
        names = [
            "factors", "dims", "sections", "mode", "n_ctx", "base", "scale", "ext", "attn", "fast",
            "slow",
        ]
        values = [self.run.value(node, scope) for node in nodes[3:]]
        return self.note(scope, nodes, dict(zip(names, values)))

    def rope(self, scope, nodes):
        dims, mode = (self.run.value(node, scope) for node in nodes[3:])
        plain = dict(factors=None, n_ctx=0, base=10000.0, scale=1.0, ext=0.0, attn=1.0, fast=0.0)
        return self.note(
            scope, nodes, dict(plain, slow=0.0, dims=dims, mode=mode, sections=None)
        )

    def set_offset(self, result, offset):
        if isinstance(result, Fields) and result.call:
            result.call["offset"] = offset
        return result


def rotation(call, tensors, arch):
    """ggml's frequencies and magnitude of a call."""
    wanted = {key: call[key] for key in call if key not in {"il", "factors", "sections", "mode"}}
    if any(not isinstance(value, (int, float)) for value in wanted.values()):
        raise cpp.Unparsed(f"{arch}: {wanted}")
    dims, base, scale = int(call["dims"]), float(call["base"]), float(call["scale"])
    ext, attn, n_ctx = float(call["ext"]), float(call["attn"]), call["n_ctx"]
    factors = tensors[call["factors"]] if isinstance(call["factors"], str) else None
    if dims <= 0 or dims % 2 or call["offset"] < 0:
        raise Refused
    pairs = dims // 2
    magnitude = attn
    ramp = None
    if ext != 0.0:
        def pair_of_turns(turns):
            return dims * math.log(n_ctx / (turns * 2 * math.pi)) / (2 * math.log(base))
        low = max(0.0, math.floor(pair_of_turns(call["fast"])))
        high = min(dims - 1.0, math.ceil(pair_of_turns(call["slow"])))
        def ramp(pair):
            y = (pair - low) / max(0.001, high - low)
            return (1 - min(1.0, max(0.0, y))) * ext
        magnitude *= 1.0 + 0.1 * math.log(1.0 / scale)
    def inv_freq(pair):
        extrapolated = base ** (-2.0 * pair / dims)
        if factors is not None:
            extrapolated /= factors[pair]
        interpolated = scale * extrapolated
        if ramp is None:
            return interpolated
        mix = ramp(pair)
        return interpolated * (1 - mix) + extrapolated * mix
    mode = call["mode"].replace("LLAMA_ROPE_TYPE_", "").lower()
    result = {
        "dims": dims,
        "offset": call["offset"],
        "mode": mode,
        "inv_freq": [round_(inv_freq(pair)) for pair in chosen(pairs)],
        "magnitude": round_(magnitude),
    }
    if mode in {"mrope", "imrope"}:
        result["sections"] = [int(section) for section in call["sections"]]
        if sum(result["sections"]) == 0:
            raise Refused
    return result


def chosen(pairs):
    return sorted({0, min(1, pairs - 1), pairs // 2, pairs - 1})


def round_(x):
    return float(f"{x:.12g}")


def layers_of(source, arch, file):
    """Rotations of the main layers, or why the file is refused."""
    try:
        model = Model(source, arch, file)
        model.load()
        if any(name not in model.used_tensors for name in file.tensors):
            return "unknown tensors"
        original = model.cparams.n_ctx_orig_yarn
        layers = by_layer(model, original, file, arch)
        longer = by_layer(model, original + 1, file, arch)
        for short, long in zip(layers, longer):
            if short != long:
                short["long"] = {key: long[key] for key in ("inv_freq", "magnitude")}
        return layers
    except Refused:
        return "keys"


def by_layer(model, length, file, arch):
    # All layers of an assistant predict further tokens.
    assistant = arch == "LLM_ARCH_GEMMA4_ASSISTANT"
    count = model.hparams.n_layer_all if assistant else model.hparams.n_layer()
    layers = [None] * count
    for call in model.build(length):
        found, il = rotation(call, file.tensors, arch), call["il"]
        heads = model.hparams.n_embd_head_k(il)
        if found["dims"] > heads and not model.hparams.is_mla():
            raise Refused
        other = layers[il] or found
        if other["offset"] != found["offset"]:
            # The part that rotates is a tensor of its own, of the keys at least.
            other = dict(other, offset=0)
            found = dict(found, offset=0)
        if other != found:
            raise cpp.Unparsed(f"{arch}: queries and keys of layer {il} differ")
        layers[il] = found
    return layers


# Names for which a failed assertion counts.
MATTERS = r"'(n_rot\w*|n_embd_head_rope|n_embd_head_qk_rope|n_compress_ratios|n_slot|freq_base|rope_\w+|n_layer_nextn)'"
# Members of models that loaders set and others read.
MEMBERS = ["type", "n_layer_phys", "n_loops"]
# Keys without which a file is refused. Others that loaders require have no bearing on rotation.
REQUIRED_HERE = {
    "attention.sliding_window_pattern",
    "attention.compress_ratios",
    "attention.compress_rope_freq_base",
    "rope.dimension_sections",
}
# Arrays that the cases leave out, taken as present.
INVENTED = {"target_layers"}

HEADS = {"embedding_length": 512, "attention.head_count": 8, "context_length": 4096}
# For the architectures that need them, and without a bearing on rotation.
OTHERS_NEED = {
    "hrm.layers_per_stack": 2,
    "hrm.h_cycles": 2,
    "hrm.l_cycles": 2,
    "attention.indexer.head_count": 4,
    "attention.indexer.key_length": 128,
}
BASE = {**HEADS, **OTHERS_NEED, "block_count": 12, "rope.freq_base": 1e6}
WINDOW = {**BASE, "attention.sliding_window": 512, "rope.freq_base_swa": 50000.0}
GIVEN = {"attention.sliding_window_pattern": [1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 0]}
LATENT = {
    "attention.key_length_mla": 96,
    "attention.value_length_mla": 64,
    "attention.kv_lora_rank": 64,
    "attention.key_length_mla_swa": 48,
    "attention.value_length_mla_swa": 32,
    "rope.dimension_count": 32,
}
YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 8.0,
    "rope.scaling.original_context_length": 2048,
}
COMPRESSED = {
    "attention.compress_ratios": [0, 4, 128, 0, 4, 128, 0, 4, 128, 0, 4, 128],
    "attention.compress_rope_freq_base": 160000.0,
}
SECTIONS = {"rope.dimension_sections": [12, 10, 10, 0]}
ALL = {**WINDOW, **GIVEN, **COMPRESSED, **SECTIONS}
DIVISORS = [round(1.0 + pair / 4, 2) for pair in range(32)]
SHORT = [round(1.0 + pair / 32, 5) for pair in range(32)]

# The name of a case, its metadata, its tensors.
CASES = [
    ("plain", BASE, {}),
    ("nothing but sizes", {**HEADS, "block_count": 12}, {}),
    ("sections", {**BASE, **SECTIONS}, {}),
    ("sections, first alone", {**BASE, "rope.dimension_sections": [32, 0, 0, 0]}, {}),
    ("window", {**WINDOW, **SECTIONS}, {}),
    ("window without theta", {k: v for k, v in WINDOW.items() if k != "rope.freq_base_swa"}, {}),
    ("window of 0", {**WINDOW, "attention.sliding_window": 0, **SECTIONS}, {}),
    ("window, array", {**ALL}, {}),
    ("window, short array", {**ALL, "attention.sliding_window_pattern": [1, 0, 1]}, {}),
    ("window, array, without theta", {k: v for k, v in ALL.items() if k != "rope.freq_base_swa"}, {}),
    ("window, period 3", {**WINDOW, "attention.sliding_window_pattern": 3}, {}),
    ("window, period 0", {**WINDOW, "attention.sliding_window_pattern": 0}, {}),
    ("linear", {**ALL, "rope.scaling.factor": 4.0}, {}),
    ("linear, window without array", {**WINDOW, **SECTIONS, "rope.scaling.factor": 4.0}, {}),
    ("old key of linear", {**ALL, "rope.scale_linear": 4.0}, {}),
    ("type none", {**ALL, "rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {}),
    ("attention factor", {**ALL, "rope.scaling.attn_factor": 1.25}, {}),
    ("yarn", {**ALL, **YARN}, {}),
    ("yarn, window without array", {**WINDOW, **SECTIONS, **YARN}, {}),
    ("yarn, attention factor", {**ALL, **YARN, "rope.scaling.attn_factor": 1.25}, {}),
    (
        "yarn, betas",
        {**ALL, **YARN, "rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0},
        {},
    ),
    ("yarn, multiplier", {**ALL, **YARN, "rope.scaling.yarn_log_multiplier": f32(0.0707)}, {}),
    ("yarn, multiplier 1", {**ALL, **YARN, "rope.scaling.yarn_log_multiplier": 1.0}, {}),
    ("yarn, ext factor 0", {**ALL, **YARN, "rope.scaling.yarn_ext_factor": 0.0}, {}),
    ("yarn, ext factor a half", {**ALL, **YARN, "rope.scaling.yarn_ext_factor": 0.5}, {}),
    (
        "yarn, ext factor 0, yarn_attn_factor",
        {
            **ALL, **YARN, "rope.scaling.yarn_ext_factor": 0.0,
            "rope.scaling.yarn_attn_factor": 0.5,
        },
        {},
    ),
    ("half of the dims", {**ALL, "rope.dimension_count": 32}, {}),
    ("dims of windows", {**ALL, "rope.dimension_count": 64, "rope.dimension_count_swa": 32}, {}),
    (
        "heads of windows",
        {**ALL, "attention.key_length": 96, "attention.key_length_swa": 48,
         "attention.value_length": 96, "attention.value_length_swa": 48},
        {},
    ),
    (
        "dims of windows, the first layer without",
        {**ALL, "attention.sliding_window_pattern": [0, 1] * 6, "rope.dimension_count_swa": 32},
        {},
    ),
    ("latent", {**ALL, **LATENT}, {}),
    ("latent, yarn", {**ALL, **LATENT, **YARN}, {}),
    ("latent, yarn, multiplier", {**ALL, **LATENT, **YARN, "rope.scaling.yarn_log_multiplier": f32(0.0707)}, {}),
    ("factors", {**ALL}, {"rope_freqs": DIVISORS}),
    ("factors, plain", {**BASE}, {"rope_freqs": DIVISORS}),
    (
        "factors by length",
        {**ALL, "rope.scaling.original_context_length": 2048, "rope.scaling.attn_factor": 1.25},
        {"rope_factors_long": DIVISORS, "rope_factors_short": SHORT},
    ),
    (
        "factors by length, type longrope",
        {**ALL, "rope.scaling.type": "longrope", "rope.scaling.original_context_length": 2048},
        {"rope_factors_long": DIVISORS, "rope_factors_short": SHORT},
    ),
    (
        "factors of all kinds",
        {**ALL, "rope.scaling.type": "longrope", "rope.scaling.original_context_length": 2048},
        {"rope_factors_long": DIVISORS, "rope_factors_short": SHORT, "rope_freqs": DIVISORS},
    ),
    ("alpha", {**BASE, "rope.scaling.alpha": 1000.0}, {}),
    ("not finetuned", {**ALL, "rope.scaling.finetuned": False}, {}),
    ("rope pattern", {**ALL, "attention.rope_pattern": [1, 0, 0, 1, 1, 0]}, {}),
    ("leading dense blocks", {**WINDOW, "leading_dense_block_count": 3}, {}),
    ("decision blocks", {**WINDOW, "decision.block_count": 2}, {}),
    ("hyper connections", {**WINDOW, "hyper_connection.count": 4, "rope.dimension_count": 32}, {}),
    ("further layers", {**WINDOW, **SECTIONS, "nextn_predict_layers": 2}, {}),
    ("further layers, latent", {**ALL, **LATENT, "nextn_predict_layers": 1}, {}),
    ("heads by layer", {**ALL, "attention.head_count_kv": [8, 0, 8, 8] * 3}, {}),
    ("interval 3", {**ALL, "full_attention_interval": 3}, {}),
    ("recurrent layers", {**ALL, "attention.recurrent_layers": [1, 0, 0, 1] * 3}, {}),
    ("4 layers", {**WINDOW, **SECTIONS, "block_count": 4}, {}),
    ("32 layers", {**WINDOW, **SECTIONS, "block_count": 32}, {}),
    ("40 layers", {**WINDOW, "block_count": 40}, {}),
    ("64 layers", {**WINDOW, **SECTIONS, "block_count": 64}, {}),
]


def fetch():
    """The source, through cargo."""
    folder = Path(tempfile.mkdtemp())
    (folder / "src").mkdir()
    (folder / "src/lib.rs").write_text("")
    (folder / "Cargo.toml").write_text(
        '[package]\nname = "source"\nversion = "0.0.0"\nedition = "2021"\n'
        f'[dependencies]\n{CRATE} = "={VERSION}"\n[workspace]\n'
    )
    subprocess.run(
        ["cargo", "vendor", "--quiet", "vendor"], cwd=folder, check=True, stdout=subprocess.DEVNULL
    )
    return folder / "vendor" / CRATE / "llama.cpp"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--source", type=Path, help="a copy of llama.cpp's source")
    parser.add_argument("--only", help="one architecture, printed")
    arguments = parser.parse_args()
    sys.setrecursionlimit(20_000)
    source = Source(arguments.source or fetch())
    architectures = {
        name: arch for arch, name in source.names.items() if arch in source.classes
    }
    cases, results = [], 0
    for case, metadata, tensors in CASES:
        groups = collections.defaultdict(list)
        for name, arch in architectures.items():
            if arguments.only and name != arguments.only:
                continue
            file = File(copy.deepcopy(metadata), tensors)
            if arch == "LLM_ARCH_GEMMA4_ASSISTANT":
                file.metadata["nextn_predict_layers"] = metadata["block_count"]
            layers = layers_of(source, arch, file)
            results += 1
            groups[json.dumps(grouped(layers))].append(name)
        cases.append(
            {
                "case": case,
                "metadata": metadata,
                "tensors": tensors,
                "groups": [
                    {"architectures": names, **json.loads(result)}
                    for result, names in groups.items()
                ],
            }
        )
    if arguments.only:
        print("\n".join(json.dumps(case) for case in cases))
        return
    without_code = sorted(set(source.names.values()) - set(architectures))
    golden = {
        "source": f"{CRATE} {VERSION}",
        "without_code": without_code,
        "cases": cases,
    }
    text = json.dumps(golden, indent=None, separators=(",", ":"))
    text = text.replace('{"case"', '\n{"case"').replace('{"architectures"', '\n {"architectures"')
    print(f"{len(architectures)} architectures, {len(CASES)} cases, {results} results")
    if arguments.check:
        if GOLDEN.read_text() != text + "\n":
            sys.exit(f"{GOLDEN} is not what {CRATE} {VERSION} gives")
        print("the golden is what the source gives")
        return
    GOLDEN.parent.mkdir(parents=True, exist_ok=True)
    GOLDEN.write_text(text + "\n")


def grouped(layers):
    if isinstance(layers, str):
        return {"refused": layers}
    distinct = []
    for layer in layers:
        if layer is not None and layer not in distinct:
            distinct.append(layer)
    index = [None if layer is None else distinct.index(layer) for layer in layers]
    return {"layers": index, "rotations": distinct}


if __name__ == "__main__":
    main()
