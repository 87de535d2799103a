// What the projections of latent attention need beside products: the norm between the two maps of one, and keys
// of which heads share dims. The order of every sum is that of src/latent.rs.
#pragma once

#include "attention_call.h"
#include "element.cuh"

namespace phasor {

// Norms tokens where they are. A warp has a token; the square of element i is added to sum i % 64, of which a
// lane has two, and sums are folded in halves.
template <class Element>
__device__ __forceinline__ void norm_latent(const PhasorLatentNorm& call) {
    constexpr uint32_t kLanes = 32;
    const uint64_t token = static_cast<uint64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
    if (token >= call.tokens) return;
    const uint64_t row = call.x + token * call.dims * Element::kBytes;
    const auto load = [&](uint32_t d) {
        return Element::widen(Element::load_one(row + static_cast<uint64_t>(d) * Element::kBytes));
    };
    float low = 0.0f, high = 0.0f;
#pragma unroll 4
    for (uint32_t d = threadIdx.x; d < call.dims; d += 2 * kLanes) {
        const float x = load(d);
        low = __fmaf_rn(x, x, low);
        if (d + kLanes < call.dims) {
            const float y = load(d + kLanes);
            high = __fmaf_rn(y, y, high);
        }
    }
    float sum = __fadd_rn(low, high);
#pragma unroll
    for (uint32_t step = kLanes / 2; step > 0; step /= 2) {
        sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, step));
    }
    const float mean = __fdiv_rn(sum, __uint2float_rn(call.dims));
    const float factor = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, call.eps)));
#pragma unroll 4
    for (uint32_t d = threadIdx.x; d < call.dims; d += kLanes) {
        const float weight = __uint_as_float(ptx::load_4(call.weight + static_cast<uint64_t>(d) * 4));
        const float x = __fmul_rn(__fmul_rn(load(d), factor), weight);
        Element::store_one(row + static_cast<uint64_t>(d) * Element::kBytes, Element::narrow(x));
    }
}

// A thread has 16 bytes of a head of keys.
__device__ __forceinline__ void spread_latent(const PhasorLatentKeys& call) {
    const uint64_t item = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (item >= call.count) return;
    const uint64_t head = item / call.chunks;
    const uint32_t at = static_cast<uint32_t>(item - head * call.chunks);
    const uint64_t from = at < call.own
                              ? call.of_heads + (head * call.own + at) * 16
                              : call.of_all + (head / call.heads * call.shared + (at - call.own)) * 16;
    *reinterpret_cast<uint4*>(call.out + item * 16) = *reinterpret_cast<const uint4*>(from);
}

} // namespace phasor

// The entry point of one element type.
#define PHASOR_NORM_LATENT_KERNEL(dtype, element)                                     \
    extern "C" __global__ void __launch_bounds__(256)                                 \
        norm_latent_##dtype(const __grid_constant__ PhasorLatentNorm call) {          \
        phasor::norm_latent<phasor::element>(call);                                   \
    }
