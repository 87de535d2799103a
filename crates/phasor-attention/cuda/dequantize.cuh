// Weights of GGUF files, of GPTQ checkpoints and of e4m3 to elements: the values of src/ggml.rs, src/gptq.rs
// and src/fp8.rs, in f32, rounded to the element type once; and activations to the values of their codes of
// e4m3, likewise. A thread makes eight values that lie together.
#pragma once

#include "attention_call.h"
#include "stages.cuh"

namespace phasor {

constexpr uint32_t kValues = 8;

template <class Element>
__device__ __forceinline__ void store_values(uint64_t address, const float (&values)[kValues]) {
    constexpr uint32_t kOfAccess = 4 * Element::kPerWord;
#pragma unroll
    for (uint32_t at = 0; at < kValues; at += kOfAccess) {
        ptx::Words<4> words;
#pragma unroll
        for (uint32_t w = 0; w < 4; ++w) {
            words.w[w] = Element::pack(values + at + w * Element::kPerWord);
        }
        *reinterpret_cast<uint4*>(address + at * Element::kBytes) =
            make_uint4(words.w[0], words.w[1], words.w[2], words.w[3]);
    }
}

template <class Element>
__device__ __forceinline__ void load_values(uint64_t address, float (&values)[kValues]) {
    constexpr uint32_t kOfAccess = 4 * Element::kPerWord;
#pragma unroll
    for (uint32_t at = 0; at < kValues; at += kOfAccess) {
        const uint4 words = *reinterpret_cast<const uint4*>(address + at * Element::kBytes);
        Element::unpack(words.x, values + at);
        Element::unpack(words.y, values + at + Element::kPerWord);
        Element::unpack(words.z, values + at + 2 * Element::kPerWord);
        Element::unpack(words.w, values + at + 3 * Element::kPerWord);
    }
}

// Eight bytes at a multiple of two.
__device__ __forceinline__ void load_bytes(uint64_t address, uint32_t (&bytes)[kValues]) {
#pragma unroll
    for (uint32_t at = 0; at < kValues; at += 2) {
        const uint32_t two = ptx::load_2(address + at);
        bytes[at] = two & 255u;
        bytes[at + 1] = two >> 8;
    }
}

__device__ __forceinline__ uint32_t load_byte(uint64_t address) {
    return ptx::load_2(address & ~uint64_t{1}) >> (address & 1) * 8 & 255u;
}

__device__ __forceinline__ float half_at(uint64_t address) {
    return ptx::f32_from_f16(ptx::load_2(address));
}

__device__ __forceinline__ float of_signed_byte(uint32_t byte) {
    return __int2float_rn(static_cast<int32_t>(byte << 24) >> 24);
}

// Element `at` of a block and the seven after it.
__device__ __forceinline__ void q4_0(uint64_t block, uint32_t at, float (&values)[kValues]) {
    const float d = half_at(block);
    uint32_t bytes[kValues];
    load_bytes(block + 2 + at % 16, bytes);
#pragma unroll
    for (uint32_t i = 0; i < kValues; ++i) {
        const uint32_t n = bytes[i] >> (at / 16 * 4) & 15u;
        values[i] = __fmul_rn(d, __int2float_rn(static_cast<int32_t>(n) - 8));
    }
}

__device__ __forceinline__ void q8_0(uint64_t block, uint32_t at, float (&values)[kValues]) {
    const float d = half_at(block);
    uint32_t bytes[kValues];
    load_bytes(block + 2 + at, bytes);
#pragma unroll
    for (uint32_t i = 0; i < kValues; ++i) values[i] = __fmul_rn(d, of_signed_byte(bytes[i]));
}

// Q4_K, and Q5_K where there are fifth bits.
__device__ __forceinline__ void q4_k_q5_k(uint64_t block, uint32_t at, bool has_fifth,
                                          float (&values)[kValues]) {
    const uint64_t packed = block + 4;
    const uint32_t group = at / 32, j = at % 32;
    uint32_t scale, minimum;
    if (group < 4) {
        scale = load_byte(packed + group) & 63u;
        minimum = load_byte(packed + group + 4) & 63u;
    } else {
        const uint32_t nibbles = load_byte(packed + group + 4);
        scale = (nibbles & 15u) | load_byte(packed + group - 4) >> 6 << 4;
        minimum = nibbles >> 4 | load_byte(packed + group) >> 6 << 4;
    }
    const float of_n = __fmul_rn(half_at(block), __uint2float_rn(scale));
    const float least = __fmul_rn(half_at(block + 2), __uint2float_rn(minimum));
    uint32_t bytes[kValues], fifth[kValues] = {};
    const uint64_t nibbles = block + (has_fifth ? 48 : 16);
    load_bytes(nibbles + group / 2 * 32 + j, bytes);
    if (has_fifth) load_bytes(block + 16 + j, fifth);
#pragma unroll
    for (uint32_t i = 0; i < kValues; ++i) {
        const uint32_t n = (bytes[i] >> (group % 2 * 4) & 15u) | (fifth[i] >> group & 1u) << 4;
        values[i] = __fsub_rn(__fmul_rn(of_n, __uint2float_rn(n)), least);
    }
}

__device__ __forceinline__ void q6_k(uint64_t block, uint32_t at, float (&values)[kValues]) {
    const uint32_t half = at / 128, of_half = at % 128;
    const uint32_t quarter = of_half / 32, j = of_half % 32;
    uint32_t low[kValues], high[kValues];
    load_bytes(block + half * 64 + quarter % 2 * 32 + j, low);
    load_bytes(block + 128 + half * 32 + j, high);
    const float scale = of_signed_byte(load_byte(block + 192 + half * 8 + of_half / 16));
    const float of_n = __fmul_rn(half_at(block + 208), scale);
#pragma unroll
    for (uint32_t i = 0; i < kValues; ++i) {
        const uint32_t n = (low[i] >> (quarter / 2 * 4) & 15u) | (high[i] >> (quarter * 2) & 3u) << 4;
        values[i] = __fmul_rn(of_n, __int2float_rn(static_cast<int32_t>(n) - 32));
    }
}

template <class Element>
__device__ __forceinline__ void dequantize_ggml(const PhasorDequantize& call) {
    const uint32_t type = call.type;
    const bool is_k = type >= PHASOR_GGML_Q4_K;
    const uint32_t elements = is_k ? 256 : 32;
    const uint64_t item = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const uint64_t n = item / (elements / kValues);
    if (n >= call.count) return;
    const uint32_t at = static_cast<uint32_t>(item % (elements / kValues)) * kValues;
    float values[kValues];
    if (type == PHASOR_GGML_Q4_0) {
        q4_0(call.blocks + n * 18, at, values);
    } else if (type == PHASOR_GGML_Q8_0) {
        q8_0(call.blocks + n * 34, at, values);
    } else if (type == PHASOR_GGML_Q6_K) {
        q6_k(call.blocks + n * 210, at, values);
    } else {
        const bool has_fifth = type == PHASOR_GGML_Q5_K;
        q4_k_q5_k(call.blocks + n * (has_fifth ? 176 : 144), at, has_fifth, values);
    }
    store_values<Element>(call.out + item * (kValues * Element::kBytes), values);
}

// Threads of x have rows, as their words lie together; those of y have words.
template <class Element>
__device__ __forceinline__ void dequantize_gptq(const PhasorDequantize& call) {
    const uint32_t of_call = blockIdx.x * blockDim.x + threadIdx.x;
    const uint32_t word = blockIdx.y * blockDim.y + threadIdx.y;
    if (of_call >= call.rows || word >= call.in_features / kValues) return;
    const uint32_t row = call.first_row + of_call;
    const uint64_t outputs = call.out_features;
    const uint32_t nibbles = ptx::load_4(call.blocks + (word * outputs + row) * 4);
    float values[kValues];
    uint32_t last = 0xffffffffu;
    int32_t zero = 0;
    float scale = 0.0f;
#pragma unroll
    for (uint32_t i = 0; i < kValues; ++i) {
        const uint32_t input = word * kValues + i;
        uint32_t group = call.groups_of_inputs != 0
                             ? ptx::load_4(call.groups_of_inputs + input * uint64_t{4})
                             : input / call.group_size;
        group = min(group, call.groups - 1);
        if (group != last) {
            last = group;
            const uint64_t at = group * outputs + row;
            const uint32_t zeros = ptx::load_4(call.zeros + at / kValues * 4);
            zero = static_cast<int32_t>((zeros >> (row % kValues * 4) & 15u) + call.zero_offset);
            scale = half_at(call.scales + at * 2);
        }
        const int32_t n = static_cast<int32_t>(nibbles >> (4 * i) & 15u);
        values[i] = __fmul_rn(__int2float_rn(n - zero), scale);
    }
    const uint64_t to = static_cast<uint64_t>(of_call) * call.in_features + word * kValues;
    store_values<Element>(call.out + to * Element::kBytes, values);
}

// Threads of x have eight columns each, as codes of a row lie together; those of y have rows.
template <class Element>
__device__ __forceinline__ void dequantize_fp8(const PhasorDequantize& call) {
    const uint32_t of_call = blockIdx.x * blockDim.y + threadIdx.y;
    const uint32_t column = (blockIdx.y * blockDim.x + threadIdx.x) * kValues;
    if (of_call >= call.rows || column >= call.in_features) return;
    const uint32_t row = call.first_row + of_call;
    const uint64_t group =
        row / call.group_rows * static_cast<uint64_t>(call.groups) + column / call.group_size;
    const float scale = __uint_as_float(ptx::load_4(call.scales + group * 4));
    const uint64_t codes =
        ptx::load_8(call.blocks + row * static_cast<uint64_t>(call.in_features) + column);
    float values[kValues];
#pragma unroll
    for (uint32_t i = 0; i < kValues; ++i) {
        const uint32_t code = static_cast<uint32_t>(codes >> (8 * i)) & 255u;
        values[i] = __fmul_rn(e4m3_to_f32(code), scale);
    }
    const uint64_t to = static_cast<uint64_t>(of_call) * call.in_features + column;
    store_values<Element>(call.out + to * Element::kBytes, values);
}

constexpr uint32_t kRoundingThreads = 256;

// The largest of the numbers that threads of x have. All threads of a block call it together.
__device__ __forceinline__ uint32_t most_of_x(uint32_t most) {
    __shared__ uint32_t of_warps[kRoundingThreads / 32];
    const uint32_t lanes = min(blockDim.x, 32u);
#pragma unroll 1
    for (uint32_t step = 1; step < lanes; step *= 2) {
        most = max(most, __shfl_xor_sync(kAllLanes, most, step));
    }
    if (blockDim.x <= 32) return most;
    const uint32_t warps = blockDim.x / 32, first = threadIdx.y * warps;
    if (threadIdx.x % 32 == 0) of_warps[first + threadIdx.x / 32] = most;
    __syncthreads();
#pragma unroll 1
    for (uint32_t warp = 0; warp < warps; ++warp) most = max(most, of_warps[first + warp]);
    return most;
}

// Activations. Threads of x, of which there is a power of two, share a group of a token; those of y have groups.
template <class Element>
__device__ __forceinline__ void round_fp8(const PhasorDequantize& call) {
    const uint32_t n = blockIdx.x * blockDim.y + threadIdx.y;
    const uint32_t row = n / call.groups;
    const uint32_t first = (n - row * call.groups) * call.group_size;
    // Those past the last group go along, as all lanes of a warp meet.
    const uint32_t columns = n < call.count ? min(call.group_size, call.in_features - first) : 0;
    const uint64_t at = (static_cast<uint64_t>(row) * call.in_features + first) * Element::kBytes;
    float values[kValues];
    float scale = call.scale;
    if (scale == 0.0f) {
        // Bits of magnitudes compare as these do. A NaN counts as nothing.
        uint32_t most = 0;
#pragma unroll 1
        for (uint32_t c = threadIdx.x * kValues; c < columns; c += blockDim.x * kValues) {
            load_values<Element>(call.blocks + at + c * Element::kBytes, values);
#pragma unroll
            for (uint32_t i = 0; i < kValues; ++i) {
                const uint32_t magnitude = __float_as_uint(values[i]) & 0x7fffffffu;
                if (magnitude <= 0x7f800000u) most = max(most, magnitude);
            }
        }
        most = most_of_x(most);
        scale = __fdiv_rn(fminf(__uint_as_float(most), call.most_amax), 448.0f);
        if (call.scale_type == PHASOR_ATTEND_F16) scale = rounded<F16>(scale);
        if (call.scale_type == PHASOR_ATTEND_BF16) scale = rounded<Bf16>(scale);
    }
    // What has no inverse makes zeros.
    float inverse = __fdiv_rn(1.0f, scale);
    if ((__float_as_uint(inverse) & 0x7fffffffu) >= 0x7f800000u) inverse = 0.0f;
#pragma unroll 1
    for (uint32_t c = threadIdx.x * kValues; c < columns; c += blockDim.x * kValues) {
        load_values<Element>(call.blocks + at + c * Element::kBytes, values);
#pragma unroll
        for (uint32_t i = 0; i < kValues; ++i) values[i] = __fmul_rn(values[i], inverse);
        uint32_t codes[kValues / 4];
        e4m3_words(values, codes);
#pragma unroll
        for (uint32_t i = 0; i < kValues; ++i) {
            values[i] = __fmul_rn(e4m3_to_f32(codes[i / 4] >> (i % 4 * 8) & 255u), scale);
        }
        store_values<Element>(call.out + at + c * Element::kBytes, values);
    }
}

} // namespace phasor

// The entry points of one element type.
#define PHASOR_DEQUANTIZE_KERNEL(name, element, kernel)                               \
    extern "C" __global__ void __launch_bounds__(256)                                 \
        name(const __grid_constant__ PhasorDequantize call) {                         \
        phasor::kernel<phasor::element>(call);                                        \
    }

#define PHASOR_DEQUANTIZE_KERNELS(dtype, element)                                     \
    PHASOR_DEQUANTIZE_KERNEL(dequantize_ggml_##dtype, element, dequantize_ggml)       \
    PHASOR_DEQUANTIZE_KERNEL(dequantize_gptq_##dtype, element, dequantize_gptq)       \
    PHASOR_DEQUANTIZE_KERNEL(dequantize_fp8_##dtype, element, dequantize_fp8)         \
    PHASOR_DEQUANTIZE_KERNEL(round_fp8_##dtype, element, round_fp8)
