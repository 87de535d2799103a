#!/usr/bin/env python3
"""Make tests/goldens/torch-append/*: what caches of vLLM, SGLang, FlashInfer and mistral.rs hold after a step.

What
----
Layouts and slots are those of the engines, written as torch's indexing: a cache is a tensor of
the engine's shape, and each token's keys and values are assigned to cache[page, slot]. Codes
are torch's casts.

Rotations are by quarter turns, so that they are exact in every type: pair i turns i + 1
quarters per position, half-split, or interleaved where "pairing" in "case" says so. Everything
here is to be met bit for bit.

A batch is three files. <batch>_qkv has

    qkv             [tokens, (q heads + 2 kv heads) head_dim] bf16: q, k, v of each token

<batch>_rotated has q and k of all tokens, padding too, rotated: [tokens, heads, head_dim]; and
<batch>_ids

    position_ids    i64 [tokens], which have nothing to do with places in the cache
    cu_seqlens      i32 [sequences + 1]; tokens past the last are padding
    cache_lengths   i32 [sequences]: tokens in the cache before
    block_table     i32 [sequences, pages of the longest]; -1 past those of a sequence
    page_indptr, page_indices   i32: the same as FlashInfer has it
    slot_mapping    i64 [tokens]: -1 for padding

"serving" is prefills of 7, 130 and 1 tokens and two decodes, whose first page is shared;
"ragged" is small and has a sequence without tokens and padding; "dense" is [batch, tokens]
without padding, and its caches are contiguous.

Every other file is the caches of one layout after one of the batches: "batch", "layout" and
"slots" (mapping, page_table, page_indices, sequences, or mapping_with_skips: slot_mapping in
the file has -1 for some tokens more) in its "case". Where nothing was stored, elements are
"untouched", or bytes that.

    k, v            the caches, of the engine's shape; or kv where they share a tensor
    k_scales, v_scales  of codes: [1] or [heads] that are given, or what is stored
    q_codes, q_scale    the rotated queries as codes

and "codes", "form" (divide or multiply), "floor", "group", "scale_rounding" say how codes are
made; "inline" that scales lie behind the codes of each head. Latent caches have "latent_input" in
place of a batch: q [tokens, heads, 192] whose last 64 rotate, latent [tokens, 512], k_pe
[tokens, 64]; the first of them has q_rotated.

How to run
----------
    pip install -r scripts/goldens/requirements-transformers.txt
    python scripts/goldens/torch-append.py [--check]
"""

import sys

import numpy as np
import torch

# The shared file is beside this one; no cache folder is left there.
sys.dont_write_bytecode = True
from golden_files import golden, run, seeded

TORCH = "2.15.0"
UNTOUCHED = -2.5
UNTOUCHED_BYTE = 0xA5
FLT_MIN = torch.tensor(torch.finfo(torch.float32).tiny)


def draw(random, *shape):
    """bf16 of several magnitudes, and no zeros: those would show the signs of products."""
    size = np.exp(random.standard_normal((*shape[:-1], 1)))
    x = torch.from_numpy(random.standard_normal(shape) * size).bfloat16()
    assert (x != 0).all()
    return x


def rotated(x, position_ids, pairing):
    """[tokens, heads, dims] by quarter turns."""
    pairs = x.shape[-1] // 2
    quarters = position_ids[:, None] * torch.arange(1, pairs + 1) % 4
    cos = torch.tensor([1, 0, -1, 0])[quarters][:, None].to(x.dtype)
    sin = torch.tensor([0, 1, 0, -1])[quarters][:, None].to(x.dtype)
    if pairing == "interleaved":
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    a, b = x[..., :pairs], x[..., pairs:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Batch:
    def __init__(self, name, *, new, cached, pages, page_size, shared, padding, heads, kv_heads,
                 head_dim, pairing="half_split"):
        self.name, self.page_size, self.pages = name, page_size, pages
        self.heads, self.kv_heads, self.head_dim, self.pairing = heads, kv_heads, head_dim, pairing
        random = seeded(name)
        self.tokens = sum(new) + padding
        self.qkv = draw(random, self.tokens, heads + 2 * kv_heads, head_dim)
        self.position_ids = torch.from_numpy(random.integers(0, 1000, self.tokens))
        self.cu_seqlens = torch.tensor([0, *np.cumsum(new)], dtype=torch.int32)
        self.cache_lengths = torch.tensor(cached, dtype=torch.int32)

        # Pages in no order; the first of the last sequence is that of another.
        free = random.permutation(pages).tolist()
        rows = [
            [free.pop() for _ in range(-(-(before + more) // page_size))]
            for before, more in zip(cached, new)
        ]
        if shared is not None:
            assert min(cached[shared], cached[-1]) >= page_size
            rows[-1][0] = rows[shared][0]
        most = max(map(len, rows))
        self.block_table = torch.tensor(
            [row + [-1] * (most - len(row)) for row in rows], dtype=torch.int32)
        self.page_indptr = torch.tensor([0, *np.cumsum([len(row) for row in rows])], dtype=torch.int32)
        self.page_indices = torch.tensor(sum(rows, []), dtype=torch.int32)

        self.sequence = torch.repeat_interleave(torch.arange(len(new)), torch.tensor(new))
        in_sequence = torch.arange(sum(new)) - self.cu_seqlens[self.sequence]
        self.place = self.cache_lengths[self.sequence].long() + in_sequence
        page = self.block_table[self.sequence, self.place // page_size].long()
        slot = page * page_size + self.place % page_size
        assert len(set(slot.tolist())) == len(slot)
        self.slot_mapping = torch.cat([slot, torch.full((padding,), -1)])

        q, k, self.v = self.qkv.split([heads, kv_heads, kv_heads], 1)
        self.q, self.k = (rotated(x, self.position_ids, pairing) for x in (q, k))

    def files(self):
        yield f"{self.name}_qkv", {"qkv": self.qkv.flatten(1)}, {}
        yield f"{self.name}_ids", {
            "position_ids": self.position_ids, "cu_seqlens": self.cu_seqlens,
            "cache_lengths": self.cache_lengths, "block_table": self.block_table,
            "page_indptr": self.page_indptr, "page_indices": self.page_indices,
            "slot_mapping": self.slot_mapping,
        }, {
            "heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim,
            "pages": self.pages, "page_size": self.page_size, "pairing": self.pairing,
        }
        yield f"{self.name}_rotated", {"q": self.q, "k": self.k}, {}


def untouched(*shape, dtype=torch.bfloat16):
    if dtype == torch.uint8:
        return torch.full(shape, UNTOUCHED_BYTE, dtype=dtype)
    return torch.full(shape, UNTOUCHED, dtype=dtype)


def e4m3(x):
    # Clamped, as vLLM does; clamp keeps NaN.
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)


def int8(x):
    return x.round().clamp(-127, 127).to(torch.int8).view(torch.uint8)


def dynamic(x, codes, most, floor, form="divide", rounding=None):
    """Codes and scales of the last dims, [..., 1]."""
    x = x.float()
    amax = x.abs().amax(-1, keepdim=True)
    if rounding == "down":
        # OCP MX: the exponent of amax less that of 448.
        scale = torch.exp2((torch.floor(torch.log2(amax.double())) - 8).clamp(-127, 127)).float()
    else:
        scale = torch.maximum(amax / most, floor)
        if rounding == "up":
            scale = torch.exp2(torch.ceil(torch.log2(scale.double()))).float()
    return codes(x * (1 / scale) if form == "multiply" else x / scale), scale


def e8m0(scale):
    return (torch.log2(scale.double()) + 127).to(torch.uint8)


def layouts(batch, slot_mapping):
    """{file: (tensors, case)}: bf16 caches of pages, as the engines have them."""
    keep = slot_mapping >= 0
    page, slot = slot_mapping[keep] // batch.page_size, slot_mapping[keep] % batch.page_size
    k, v = batch.k[keep], batch.v[keep]
    nb, bs, heads, dim = batch.pages, batch.page_size, batch.kv_heads, batch.head_dim

    # vLLM's flash layout, FlashInfer's NHD, and as bytes SGLang's pool, [slots, heads, head_dim].
    nhd = [untouched(nb, bs, heads, dim) for _ in "kv"]
    for cache, x in zip(nhd, (k, v)):
        cache[page, slot] = x
    # FlashInfer's HND.
    hnd = [untouched(nb, heads, bs, dim) for _ in "kv"]
    for cache, x in zip(hnd, (k, v)):
        cache[page, :, slot] = x
    # vLLM's two in one tensor.
    in_turn = untouched(2, nb, bs, heads, dim)
    # FlashInfer's two in one tensor.
    in_pairs = untouched(nb, 2, heads, bs, dim)
    # MAX's, of two layers.
    layers = untouched(nb, 2, 2, bs, heads, dim)
    for n, x in enumerate((k, v)):
        in_turn[n, page, slot] = x
        in_pairs[page, n, :, slot] = x
        layers[page, n, 1, slot] = x
    # Keys in packs of 16 bytes, values with slots last: mistral.rs and older vLLM.
    packed = untouched(nb, heads, dim // 8, bs, 8)
    packed[page, :, :, slot] = k.unflatten(-1, (dim // 8, 8))
    transposed = untouched(nb, heads, dim, bs)
    transposed[page, :, :, slot] = v
    # Keys and values of a head side by side: vLLM's MiniMax-M3.
    side_by_side = untouched(nb, heads, bs, 2 * dim)
    side_by_side[page, :, slot] = torch.cat([k, v], -1)
    return {
        "nhd": dict(zip("kv", nhd)),
        "hnd": dict(zip("kv", hnd)),
        "nhd_in_turn": {"kv": in_turn},
        "hnd_in_pairs": {"kv": in_pairs},
        "nhd_layer_1_of_2_in_pairs": {"kv": layers},
        "packed_and_transposed": {"k": packed, "v": transposed},
        "hnd_side_by_side": {"kv": side_by_side},
    }


def quantized(batch):
    """(file, tensors, case) of caches of codes."""
    keep = batch.slot_mapping >= 0
    page, slot = batch.slot_mapping[keep] // batch.page_size, batch.slot_mapping[keep] % batch.page_size
    k, v = batch.k[keep], batch.v[keep]
    nb, bs, heads, dim = batch.pages, batch.page_size, batch.kv_heads, batch.head_dim
    case = {
        "batch": batch.name, "slots": "mapping", "untouched": UNTOUCHED,
        "untouched_byte": UNTOUCHED_BYTE,
    }

    def stored(codes, layout="nhd"):
        if layout == "hnd":
            cache = untouched(nb, heads, bs, codes.shape[-1], dtype=torch.uint8)
            cache[page, :, slot] = codes
        else:
            cache = untouched(nb, bs, heads, codes.shape[-1], dtype=torch.uint8)
            cache[page, slot] = codes
        return cache

    # vLLM divides by the scale of the tensor, or of each head.
    k_scales, v_scales = torch.tensor([0.037]), torch.tensor([0.0123])
    yield "e4m3_tensor", {
        "k": stored(e4m3(k.float() / k_scales)), "v": stored(e4m3(v.float() / v_scales)),
        "k_scales": k_scales, "v_scales": v_scales,
    }, case | {"layout": "nhd", "codes": "e4m3", "form": "divide"}
    k_scales, v_scales = torch.tensor([0.037, 0.0029]), torch.tensor([0.0123, 0.19])
    yield "e4m3_heads", {
        "k": stored(e4m3(k.float() / k_scales[:, None]), "hnd"),
        "v": stored(e4m3(v.float() / v_scales[:, None]), "hnd"),
        "k_scales": k_scales, "v_scales": v_scales,
    }, case | {"layout": "hnd", "codes": "e4m3", "form": "divide"}
    # FlashInfer multiplies, q too.
    k_scales, v_scales, q_scale = torch.tensor([27.3]), torch.tensor([81.7]), torch.tensor([13.9])
    yield "e4m3_inverse", {
        "k": stored(e4m3(k.float() * k_scales)), "v": stored(e4m3(v.float() * v_scales)),
        "k_scales": k_scales, "v_scales": v_scales,
        "q_codes": e4m3(batch.q.float() * q_scale), "q_scale": q_scale,
    }, case | {"layout": "nhd", "codes": "e4m3", "form": "multiply"}

    # vLLM's of each token and head; the scales in a tensor, or behind the codes of each head.
    floor = torch.tensor(1e-6)
    for name, codes, most in (("e4m3", e4m3, 448), ("int8", int8, 127)):
        tensors, inline = {}, {}
        for stream, x in (("k", k), ("v", v)):
            made, scales = dynamic(x, codes, most, floor, "multiply")
            tensors[stream] = stored(made)
            tensors[f"{stream}_scales"] = untouched(nb, bs, heads, dtype=torch.float32)
            tensors[f"{stream}_scales"][page, slot] = scales[..., 0]
            inline[stream] = stored(torch.cat([made, scales.view(torch.uint8)], -1))
        settings = case | {"layout": "nhd", "codes": name, "form": "multiply", "floor": 1e-6}
        yield f"{name}_token_head", tensors, settings
        if codes is e4m3:
            yield f"{name}_token_head_inline", inline, settings | {"inline": True}

    # Groups of 16 dims, with scales of f32 or of E8M0.
    for name, rounding in (("f32", None), ("e8m0_up", "up"), ("e8m0_down", "down")):
        tensors = {}
        for stream, x in (("k", k), ("v", v)):
            made, scales = dynamic(x.unflatten(-1, (-1, 16)), e4m3, 448, FLT_MIN, rounding=rounding)
            tensors[stream] = stored(made.flatten(-2))
            dtype = torch.uint8 if rounding else torch.float32
            tensors[f"{stream}_scales"] = untouched(nb, bs, heads, dim // 16, dtype=dtype)
            scales = scales[..., 0]
            tensors[f"{stream}_scales"][page, slot] = e8m0(scales) if rounding else scales
        yield f"e4m3_groups_{name}", tensors, case | {
            "layout": "nhd", "codes": "e4m3", "form": "divide", "floor": FLT_MIN.item(), "group": 16,
            "scale_rounding": rounding,
        }


def dense():
    """Contiguous caches of [batch, tokens]."""
    batch = Batch(
        "dense", new=[2, 2, 2], cached=[0, 5, 9], pages=6, page_size=12, shared=None, padding=0,
        heads=2, kv_heads=2, head_dim=32, pairing="interleaved")
    yield from batch.files()
    shape = 3, 12, batch.kv_heads, batch.head_dim
    bshd = [untouched(*shape) for _ in "kv"]
    bhsd = [untouched(3, batch.kv_heads, 12, batch.head_dim) for _ in "kv"]
    for n, x in enumerate((batch.k, batch.v)):
        bshd[n][batch.sequence, batch.place] = x
        bhsd[n][batch.sequence, :, batch.place] = x
    for name, caches in (("bshd", bshd), ("bhsd", bhsd)):
        yield f"dense_{name}", dict(zip("kv", caches)), {
            "batch": "dense", "layout": name, "slots": "sequences", "untouched": UNTOUCHED}


def latent():
    """DeepSeek's cache: 576 values, or 656 bytes, of a token."""
    random = seeded("latent")
    tokens, pages, bs = 5, 3, 4
    q, c_kv, k_pe = (draw(random, tokens, *shape) for shape in ((2, 192), (512,), (64,)))
    # Groups of 0 have the least scale.
    c_kv[2, 128:256] = 0
    position_ids = torch.from_numpy(random.integers(0, 1000, tokens))
    slot_mapping = torch.tensor([9, 10, 2, -1, 5])
    q_rotated = torch.cat(
        [q[..., :128], rotated(q[..., 128:], position_ids, "interleaved")], -1)
    k_pe_rotated = rotated(k_pe[:, None], position_ids, "interleaved")[:, 0]
    yield "latent_input", {
        "q": q, "latent": c_kv, "k_pe": k_pe, "position_ids": position_ids,
        "slot_mapping": slot_mapping,
    }, {"pages": pages, "page_size": bs, "pairing": "interleaved"}
    keep = slot_mapping >= 0
    page, slot = slot_mapping[keep] // bs, slot_mapping[keep] % bs
    c_kv, k_pe_kept = c_kv[keep], k_pe_rotated[keep]
    case = {"slots": "mapping"}

    cache = untouched(pages, bs, 576)
    cache[page, slot] = torch.cat([c_kv, k_pe_kept], -1)
    yield "latent", {"kv": cache, "q_rotated": q_rotated}, case | {"untouched": UNTOUCHED}

    scales = torch.tensor([0.0173])
    cache = untouched(pages, bs, 576, dtype=torch.uint8)
    cache[page, slot] = e4m3(torch.cat([c_kv, k_pe_kept], -1).float() / scales)
    case = case | {"untouched_byte": UNTOUCHED_BYTE, "codes": "e4m3", "form": "divide"}
    yield "latent_e4m3", {"kv": cache, "k_scales": scales}, case

    # vLLM's fp8_ds_mla: 512 codes, the scales of their 4 groups, and what is rotated as it is.
    codes, scales = dynamic(c_kv.unflatten(-1, (4, 128)), e4m3, 448, FLT_MIN)
    cache = untouched(pages, bs, 656, dtype=torch.uint8)
    cache[page, slot] = torch.cat(
        [codes.flatten(1), scales[..., 0].view(torch.uint8), k_pe_kept.view(torch.uint8)], -1)
    yield "latent_656", {"kv": cache}, case | {"floor": FLT_MIN.item(), "group": 128}


def everything():
    serving = Batch(
        "serving", new=[7, 130, 1, 1, 1], cached=[0, 5, 0, 20, 23], pages=17, page_size=16, shared=3,
        padding=0, heads=1, kv_heads=2, head_dim=16)
    yield from serving.files()
    # One file for each, for the sake of their size.
    for stream, cache in layouts(serving, serving.slot_mapping)["nhd"].items():
        yield f"serving_nhd_{stream}", {stream: cache}, {
            "batch": "serving", "layout": "nhd", "slots": "page_table", "untouched": UNTOUCHED}

    ragged = Batch(
        "ragged", new=[7, 0, 3, 1, 1], cached=[0, 2, 5, 4, 9], pages=11, page_size=4, shared=3,
        padding=2, heads=2, kv_heads=2, head_dim=32)
    yield from ragged.files()
    for name, tensors in layouts(ragged, ragged.slot_mapping).items():
        slots = {"nhd": "page_indices", "hnd": "page_table", "hnd_in_pairs": "page_indices"}
        yield f"ragged_{name}", tensors, {
            "batch": "ragged", "layout": name, "slots": slots.get(name, "mapping"),
            "untouched": UNTOUCHED}
    skipping = ragged.slot_mapping.clone()
    skipping[[3, 10]] = -1
    yield "ragged_skips", layouts(ragged, skipping)["nhd"] | {"slot_mapping": skipping}, {
        "batch": "ragged", "layout": "nhd", "slots": "mapping_with_skips", "untouched": UNTOUCHED}
    for name, tensors, case in quantized(ragged):
        yield f"ragged_{name}", tensors, case

    yield from dense()
    yield from latent()


def array(tensor):
    tensor = tensor.contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def compute():
    assert torch.__version__.split("+")[0] == TORCH, torch.__version__
    return {
        f"{name}.safetensors": golden(
            name, {key: array(tensor) for key, tensor in tensors.items()},
            peer=f"the engines' layouts in torch {TORCH}", case=case, made_by="torch-append.py")
        for name, tensors, case in everything()
    }


if __name__ == "__main__":
    run("Make the goldens of caches; see the top of this file.", "torch-append", "", compute)
