#!/usr/bin/env python3
"""Torch's scaled_dot_product_attention, and a layer around it, on the sizes of benches/llama3_8b.rs.

    pip install torch==2.15.0 && python benches/sdpa.py [threads]

Keys and values are contiguous, [1, kv_heads, context, head_dim], and q and out likewise.
"""
import sys
import time

import torch
import torch.nn.functional as F

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, CONTEXT = 32, 8, 128, 4096, 4096


def least(run):
    start, best, runs = time.perf_counter(), float("inf"), 0
    while runs < 3 or time.perf_counter() - start < 2:
        begin = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begin)
        runs += 1
    return best * 1e3


def main():
    if len(sys.argv) > 1:
        torch.set_num_threads(int(sys.argv[1]))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for dtype in torch.float32, torch.bfloat16:
        for what, context, new in ("prompt of 512", 512, 512), ("1 token at 4,096", CONTEXT, 1):
            q = torch.randn(1, HEADS, new, HEAD_DIM, dtype=dtype)
            k, v = (torch.randn(1, KV_HEADS, context, HEAD_DIM, dtype=dtype) for _ in range(2))
            wqkv = torch.randn((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN, dtype=dtype) / 64
            wo = torch.randn(HIDDEN, HEADS * HEAD_DIM, dtype=dtype) / 64
            x = torch.randn(new, HIDDEN, dtype=dtype)
            with torch.no_grad():
                attention = least(lambda: F.scaled_dot_product_attention(
                    q, k, v, is_causal=new > 1, enable_gqa=True))
                products = least(lambda: (F.linear(x, wqkv), F.linear(x, wo)))
            print(f"{dtype} {what:18} attention {attention:9.3f} ms, projections {products:9.3f} ms")


main()
