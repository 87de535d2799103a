"""What most scripts here share: seeds, the bytes of files, --check."""

import argparse
import json
import sys
import zlib
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
GOLDENS = ROOT / "tests/goldens"
ATTENTION_GOLDENS = ROOT / "crates/phasor-attention/tests/goldens"
MAX_FILE = 32 * 1024
MAX_FOLDER = 400 * 1024
# uint16 holds the bits of bf16, which numpy does not know.
NAMES = {
    "float32": "F32",
    "float16": "F16",
    "uint16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "uint8": "U8",
}


def seeded(name):
    """Random numbers that depend on the case's name only."""
    return np.random.default_rng(zlib.crc32(name.encode()))


class Draw:
    """SplitMix64: what is drawn depends on the seed and on what was drawn before. The Rust side draws the
    same, so that inputs need no file."""

    def __init__(self, seed):
        self.state = np.uint64(seed)

    def bits(self, count):
        with np.errstate(over="ignore"):
            z = self.state + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            self.state = z[-1]
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            return z ^ (z >> np.uint64(31))

    def values(self, most, *shape):
        """From -most to most."""
        count = int(np.prod(shape))
        unit = (self.bits(count) >> np.uint64(40)).astype(np.float32) / np.float32(1 << 23)
        return ((unit - np.float32(1)) * np.float32(most)).reshape(shape)


def to_bf16(x):
    """f32 as the bits of bf16, to nearest, ties to even; no NaN comes by here."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def golden(name, tensors, *, peer, case, made_by):
    """safetensors bytes of a case, and where they come from."""
    return serialize(tensors, {
        "peer": peer,
        "case": json.dumps({"name": name} | case),
        "made_by": f"scripts/goldens/{made_by}",
    })


def serialize(tensors, metadata):
    """safetensors bytes, in an order that depends on nothing but the names."""
    header, data = {"__metadata__": metadata}, b""
    # Wide types first keeps every tensor aligned.
    for key, array in sorted(tensors.items(), key=lambda t: (-t[1].itemsize, t[0])):
        start = len(data)
        data += np.ascontiguousarray(array).tobytes()
        header[key] = {
            "dtype": NAMES[array.dtype.name],
            "shape": array.shape,
            "data_offsets": [start, len(data)],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def listing(entries):
    """The bytes of a JSON list with one entry a line."""
    return ("[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n").encode()


def run(description, folder, prefix, compute):
    """Write what compute() returns, {file's name: bytes}, or compare it with --check.

    The script owns the files of `folder` whose names begin with `prefix`.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, default=GOLDENS / folder, help="where to write")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    args = parser.parse_args()

    files = compute()
    args.output.mkdir(parents=True, exist_ok=True)
    differ = []
    for name, data in files.items():
        if len(data) > MAX_FILE:
            sys.exit(f"error: {name} takes {len(data)} bytes")
        path = args.output / name
        if not args.check:
            path.write_bytes(data)
        elif not path.exists() or path.read_bytes() != data:
            differ.append(name)
    stale = {path.name for path in args.output.glob(f"{prefix}*")} - files.keys()
    if differ or stale:
        sys.exit(f"error: differ: {differ}, made by no case: {sorted(stale)}")
    whole = sum(path.stat().st_size for path in args.output.iterdir())
    if whole > MAX_FOLDER:
        sys.exit(f"error: {args.output.name} takes {whole} bytes")
    total = sum(map(len, files.values()))
    print(f"{len(files)} files, {total} bytes: {'the same' if args.check else 'written'}")
