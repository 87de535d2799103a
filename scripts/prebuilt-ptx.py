#!/usr/bin/env python3
"""Compiles cuda/*.cu to the PTX that every build of phasor embeds (cuda/prebuilt/), the kernels of
crates/phasor-attention likewise, and those that the GPU bench measures beside phasor (benches/cuda/).

The oldest supported toolkit makes it, CUDA 12.0 through NVRTC (PTX ISA 8.0), so that every driver
from 525 on can load it. No GPU and no CUDA installation are needed, only two wheels:

    pip install -r scripts/requirements-prebuilt.txt
    python scripts/prebuilt-ptx.py            # writes all
    python scripts/prebuilt-ptx.py --check    # compares, exit code 1 on any difference

The bytes depend on the program names handed to NVRTC, so these are fixed: the file's own name.
"""

import argparse
import ctypes
import importlib.util
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
FAMILIES = ["rope", "append", "fused"]
SOURCES = [f"{family}_{dtype}" for family in FAMILIES for dtype in ("f32", "f16", "bf16")]
SOURCES.append("call_layout")
HEADERS = [
    "phasor_call.h",
    "ptx.cuh",
    "element.cuh",
    "angle.cuh",
    "heads.cuh",
    "token.cuh",
    "streams.cuh",
    "stages.cuh",
    "rope.cuh",
    "append.cuh",
    "fused.cuh",
]
ATTENTION = ROOT / "crates" / "phasor-attention" / "cuda"
ATTENTION_SOURCES = ["attend_f32", "attend_f16", "attend_bf16", "attend_codes", "dequantize", "latent"]
ATTENTION_HEADERS = ["attention_call.h", "functions.cuh", "attend.cuh", "dequantize.cuh", "latent.cuh"]
ARCHITECTURES = ["compute_75", "compute_80", "compute_90"]
BENCHES = ROOT / "benches" / "cuda"
BENCH_SOURCES = ["limits"]
BENCH_ARCHITECTURES = ["compute_80", "compute_90"]
NVRTC_VERSION = (12, 0)


def load_nvrtc():
    spec = importlib.util.find_spec("nvidia.cuda_nvrtc")
    if spec is None:
        sys.exit("NVRTC not found: pip install -r scripts/requirements-prebuilt.txt")
    folder = pathlib.Path(list(spec.submodule_search_locations)[0]) / "lib"
    # NVRTC opens its builtins by bare name; loading them first makes that succeed.
    ctypes.CDLL(str(folder / "libnvrtc-builtins.so.12.0"), mode=ctypes.RTLD_GLOBAL)
    nvrtc = ctypes.CDLL(str(folder / "libnvrtc.so.12"))
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    if (major.value, minor.value) != NVRTC_VERSION:
        sys.exit(f"NVRTC {major.value}.{minor.value} found, {NVRTC_VERSION} needed")
    return nvrtc


def outputs():
    """Each file of PTX, with its source and its architecture."""
    for folder, names in [(ROOT / "cuda", SOURCES), (ATTENTION, ATTENTION_SOURCES)]:
        for architecture in ARCHITECTURES:
            for name in names:
                path = folder / "prebuilt" / f"{name}.{architecture}.ptx"
                yield path, folder / f"{name}.cu", architecture
    for architecture in BENCH_ARCHITECTURES:
        for name in BENCH_SOURCES:
            yield BENCHES / f"{name}.{architecture}.ptx", BENCHES / f"{name}.cu", architecture


def compile_ptx(nvrtc, path, architecture):
    def strings(values):
        return (ctypes.c_char_p * len(values))(*values)

    source = path.read_bytes()
    # The other crate's headers include phasor's by name.
    paths = [ROOT / "cuda" / header for header in HEADERS]
    if path.parent == ATTENTION:
        paths += [ATTENTION / header for header in ATTENTION_HEADERS]
    headers = [header.read_bytes() for header in paths]
    program = ctypes.c_void_p()
    status = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program),
        source,
        path.name.encode(),
        len(headers),
        strings(headers),
        strings([header.name.encode() for header in paths]),
    )
    if status != 0:
        sys.exit(f"nvrtcCreateProgram: status {status}")
    options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17"]
    status = nvrtc.nvrtcCompileProgram(program, len(options), strings(options))
    size = ctypes.c_size_t()
    if status != 0:
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        sys.exit(f"{path.name} for {architecture}:\n{log.value.decode()}")
    nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size))
    ptx = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetPTX(program, ptx)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return ptx.value


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    arguments = parser.parse_args()

    nvrtc = load_nvrtc()
    files = list(outputs())
    stale = []
    for path, source, architecture in files:
        ptx = compile_ptx(nvrtc, source, architecture)
        path.parent.mkdir(exist_ok=True)
        if not arguments.check:
            path.write_bytes(ptx)
        elif not path.exists() or path.read_bytes() != ptx:
            stale.append(str(path.relative_to(ROOT)))
    if stale:
        sys.exit("stale: " + ", ".join(stale) + "; run scripts/prebuilt-ptx.py")
    print(f"{len(files)} files " + ("are fresh" if arguments.check else "written"))


if __name__ == "__main__":
    main()
