// Element types: how the 32-bit words that travel through memory become f32 values and back.
// Rounding is to nearest even; a NaN becomes the canonical one (0x7fffffff, 0x7fff).
#pragma once

#include "ptx.cuh"

namespace phasor {

struct F32 {
    static constexpr uint32_t kBytes = 4;
    static constexpr uint32_t kPerWord = 1;

    static __device__ __forceinline__ void unpack(uint32_t word, float* x) {
        x[0] = __uint_as_float(word);
    }
    static __device__ __forceinline__ uint32_t pack(const float* x) {
        return __float_as_uint(x[0]);
    }
    static __device__ __forceinline__ uint32_t load_one(uint64_t address) {
        return ptx::load_4(address);
    }
    static __device__ __forceinline__ void store_one(uint64_t address, uint32_t bits) {
        ptx::store_4(address, bits);
    }
    static __device__ __forceinline__ float widen(uint32_t bits) { return __uint_as_float(bits); }
    static __device__ __forceinline__ uint32_t narrow(float x) { return __float_as_uint(x); }
};

struct F16 {
    static constexpr uint32_t kBytes = 2;
    static constexpr uint32_t kPerWord = 2;

    static __device__ __forceinline__ void unpack(uint32_t word, float* x) {
        x[0] = ptx::f32_from_f16(word);
        x[1] = ptx::f32_from_f16(word >> 16);
    }
    static __device__ __forceinline__ uint32_t pack(const float* x) {
#if __CUDA_ARCH__ >= 800
        return ptx::f16x2_from_f32(x[0], x[1]);
#else
        return ptx::f16_from_f32(x[0]) | (ptx::f16_from_f32(x[1]) << 16);
#endif
    }
    static __device__ __forceinline__ uint32_t load_one(uint64_t address) {
        return ptx::load_2(address);
    }
    static __device__ __forceinline__ void store_one(uint64_t address, uint32_t bits) {
        ptx::store_2(address, bits);
    }
    static __device__ __forceinline__ float widen(uint32_t bits) { return ptx::f32_from_f16(bits); }
    static __device__ __forceinline__ uint32_t narrow(float x) { return ptx::f16_from_f32(x); }
};

struct Bf16 {
    static constexpr uint32_t kBytes = 2;
    static constexpr uint32_t kPerWord = 2;

    static __device__ __forceinline__ void unpack(uint32_t word, float* x) {
        x[0] = __uint_as_float(word << 16);
        x[1] = __uint_as_float(word & 0xffff0000u);
    }
    static __device__ __forceinline__ uint32_t pack(const float* x) {
#if __CUDA_ARCH__ >= 800
        return ptx::bf16x2_from_f32(x[0], x[1]);
#else
        return narrow(x[0]) | (narrow(x[1]) << 16);
#endif
    }
    static __device__ __forceinline__ uint32_t load_one(uint64_t address) {
        return ptx::load_2(address);
    }
    static __device__ __forceinline__ void store_one(uint64_t address, uint32_t bits) {
        ptx::store_2(address, bits);
    }
    static __device__ __forceinline__ float widen(uint32_t bits) {
        return __uint_as_float(bits << 16);
    }
    static __device__ __forceinline__ uint32_t narrow(float x) {
#if __CUDA_ARCH__ >= 800
        return ptx::bf16x2_from_f32(x, 0.0f);
#else
        // Nearest even on the integer: there is no bf16 conversion before sm_80.
        const uint32_t u = __float_as_uint(x);
        const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
        return (u & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : rounded;
#endif
    }
};

} // namespace phasor
