// Hand-written PTX: one function per instruction. Each comment gives the PTX form, the ISA version
// that brought it and the lowest SM that has it.
#pragma once

#include "phasor_call.h"

namespace phasor::ptx {

// What one access moves.
template <uint32_t kWords>
struct alignas(4 * kWords) Words {
    uint32_t w[kWords];
};

// ld.global.L1::no_allocate.v4.b32   PTX 7.4, sm_70
// q and k are read once: they must not displace steps and tables from L1.
__device__ __forceinline__ void load_once(uint64_t address, Words<4>& v) {
    asm volatile("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
                 : "l"(address)
                 : "memory");
}

// st.global.L1::no_allocate.v4.b32   PTX 7.4, sm_70
__device__ __forceinline__ void store_once(uint64_t address, const Words<4>& v) {
    asm volatile("st.global.L1::no_allocate.v4.b32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(address), "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]), "r"(v.w[3])
                 : "memory");
}

// ld.global.L1::no_allocate.v2.b32   PTX 7.4, sm_70
__device__ __forceinline__ void load_once(uint64_t address, Words<2>& v) {
    asm volatile("ld.global.L1::no_allocate.v2.b32 {%0, %1}, [%2];"
                 : "=r"(v.w[0]), "=r"(v.w[1])
                 : "l"(address)
                 : "memory");
}

// st.global.L1::no_allocate.v2.b32   PTX 7.4, sm_70
__device__ __forceinline__ void store_once(uint64_t address, const Words<2>& v) {
    asm volatile("st.global.L1::no_allocate.v2.b32 [%0], {%1, %2};"
                 :
                 : "l"(address), "r"(v.w[0]), "r"(v.w[1])
                 : "memory");
}

// ld.global.v4.b32   PTX 1.0
// What is the same for all tokens.
__device__ __forceinline__ void load_shared_by_tokens(uint64_t address, Words<4>& v) {
    asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
                 : "l"(address)
                 : "memory");
}

// ld.global.v2.b32   PTX 1.0
__device__ __forceinline__ void load_shared_by_tokens(uint64_t address, Words<2>& v) {
    asm volatile("ld.global.v2.b32 {%0, %1}, [%2];"
                 : "=r"(v.w[0]), "=r"(v.w[1])
                 : "l"(address)
                 : "memory");
}

// prefetch.global.L2   PTX 2.0, sm_20
// Brings the line of an address near.
__device__ __forceinline__ void prefetch(uint64_t address) {
    asm volatile("prefetch.global.L2 [%0];" : : "l"(address));
}

// ld.global.b64   PTX 1.0
__device__ __forceinline__ uint64_t load_8(uint64_t address) {
    uint64_t v;
    asm volatile("ld.global.b64 %0, [%1];" : "=l"(v) : "l"(address) : "memory");
    return v;
}

// ld.global.b32   PTX 1.0
__device__ __forceinline__ uint32_t load_4(uint64_t address) {
    uint32_t v;
    asm volatile("ld.global.b32 %0, [%1];" : "=r"(v) : "l"(address) : "memory");
    return v;
}

// st.global.b32   PTX 1.0
__device__ __forceinline__ void store_4(uint64_t address, uint32_t v) {
    asm volatile("st.global.b32 [%0], %1;" : : "l"(address), "r"(v) : "memory");
}

// st.relaxed.gpu.global.b32   PTX 6.0, sm_70
// A word that other threads store the same value in, with nothing to order them.
__device__ __forceinline__ void store_flag(uint64_t address, uint32_t v) {
    asm volatile("st.relaxed.gpu.global.b32 [%0], %1;" : : "l"(address), "r"(v) : "memory");
}

// ld.global.u16, zero-extended into a 32-bit register   PTX 1.0
__device__ __forceinline__ uint32_t load_2(uint64_t address) {
    uint32_t v;
    asm volatile("ld.global.u16 %0, [%1];" : "=r"(v) : "l"(address) : "memory");
    return v;
}

// ld.global.u8, zero-extended into a 32-bit register   PTX 1.0
__device__ __forceinline__ uint32_t load_1(uint64_t address) {
    uint32_t v;
    asm volatile("ld.global.u8 %0, [%1];" : "=r"(v) : "l"(address) : "memory");
    return v;
}

// st.global.u16, from the low half of a 32-bit register   PTX 1.0
__device__ __forceinline__ void store_2(uint64_t address, uint32_t v) {
    asm volatile("st.global.u16 [%0], %1;" : : "l"(address), "r"(v) : "memory");
}

// st.global.u8, from the low byte of a 32-bit register   PTX 1.0
__device__ __forceinline__ void store_1(uint64_t address, uint32_t v) {
    asm volatile("st.global.u8 [%0], %1;" : : "l"(address), "r"(v) : "memory");
}

// ld.global.nc.u64   PTX 3.1, sm_32
// Only for what no work on the device writes: steps, factors, tables. Volatile, as compilers otherwise
// take it for a computation that can be done in vain, where an address may be none.
__device__ __forceinline__ uint64_t load_constant_8(uint64_t address) {
    uint64_t v;
    asm volatile("ld.global.nc.u64 %0, [%1];" : "=l"(v) : "l"(address));
    return v;
}

// ld.global.nc.f32   PTX 3.1, sm_32
__device__ __forceinline__ float load_constant_f(uint64_t address) {
    float v;
    asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(v) : "l"(address));
    return v;
}

// The block's shared memory, as an address in it.
__device__ __forceinline__ uint32_t shared_memory() {
    extern __shared__ __align__(16) float4 phasor_shared[];
    auto address = static_cast<uint32_t>(__cvta_generic_to_shared(phasor_shared));
    // Keeps it in a register: compilers otherwise find it anew for each access.
    asm volatile("" : "+r"(address));
    return address;
}

// The same number, which compilers do not know to be: what depends on it is not brought out of a loop.
__device__ __forceinline__ uint32_t found_anew(uint32_t x) {
    asm volatile("" : "+r"(x));
    return x;
}

// st.shared.f32   PTX 1.0
__device__ __forceinline__ void store_shared(uint32_t address, float v) {
    asm volatile("st.shared.f32 [%0], %1;" : : "r"(address), "f"(v) : "memory");
}

// ld.shared.f32   PTX 1.0
__device__ __forceinline__ void load_shared(uint32_t address, float& v) {
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
}

// st.shared.v2.f32   PTX 1.0
__device__ __forceinline__ void store_shared(uint32_t address, float2 v) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" : : "r"(address), "f"(v.x), "f"(v.y) : "memory");
}

// ld.shared.v2.f32   PTX 1.0
__device__ __forceinline__ void load_shared(uint32_t address, float2& v) {
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                 : "=f"(v.x), "=f"(v.y)
                 : "r"(address)
                 : "memory");
}

// ld.shared.v4.f32   PTX 1.0
__device__ __forceinline__ void load_shared(uint32_t address, float2& v, float2& w) {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(w.x), "=f"(w.y)
                 : "r"(address)
                 : "memory");
}

// st.shared.v2.b32   PTX 1.0
__device__ __forceinline__ void store_shared(uint32_t address, uint2 v) {
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" : : "r"(address), "r"(v.x), "r"(v.y) : "memory");
}

// ld.shared.v2.b32   PTX 1.0
__device__ __forceinline__ void load_shared(uint32_t address, uint2& v) {
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
                 : "=r"(v.x), "=r"(v.y)
                 : "r"(address)
                 : "memory");
}

// Whether code can wait for earlier work by itself, in a dependent launch.
#if __CUDA_ARCH__ >= 900
constexpr bool kCanWait = true;
#else
constexpr bool kCanWait = false;
#endif

// griddepcontrol.launch_dependents   PTX 7.8, sm_90
// Lets a dependent kernel start while this one runs. It waits for this one's end by itself.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" : : : "memory");
#endif
}

// griddepcontrol.wait   PTX 7.8, sm_90
// Until all earlier work has ended and what it wrote can be read. Returns at once where the launch
// is no dependent one.
__device__ __forceinline__ void wait_for_earlier_work() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" : : : "memory");
#endif
}

// cvt.f32.f16   PTX 1.0
__device__ __forceinline__ float f32_from_f16(uint32_t low_half) {
    float v;
    asm("{\n\t"
        ".reg .b16 h, unused;\n\t"
        "mov.b32 {h, unused}, %1;\n\t"
        "cvt.f32.f16 %0, h;\n\t"
        "}"
        : "=f"(v)
        : "r"(low_half));
    return v;
}

// cvt.rn.f16.f32, zero-extended   PTX 1.0. NaN becomes 0x7fff.
__device__ __forceinline__ uint32_t f16_from_f32(float x) {
    uint32_t v;
    asm("{\n\t"
        ".reg .b16 h, zero;\n\t"
        "cvt.rn.f16.f32 h, %1;\n\t"
        "mov.b16 zero, 0;\n\t"
        "mov.b32 %0, {h, zero};\n\t"
        "}"
        : "=r"(v)
        : "f"(x));
    return v;
}

#if __CUDA_ARCH__ >= 800
// cvt.rn.f16x2.f32   PTX 7.0, sm_80. NaN becomes 0x7fff.
__device__ __forceinline__ uint32_t f16x2_from_f32(float low, float high) {
    uint32_t v;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
}

// cvt.rn.bf16x2.f32   PTX 7.0, sm_80. NaN becomes 0x7fff.
__device__ __forceinline__ uint32_t bf16x2_from_f32(float low, float high) {
    uint32_t v;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
}
#endif

#if __CUDA_ARCH__ >= 900 || \
    (__CUDA_ARCH__ == 890 && 100 * __CUDACC_VER_MAJOR__ + __CUDACC_VER_MINOR__ >= 1201)
#define PHASOR_CASTS_TO_E4M3
// cvt.rn.satfinite.e4m3x2.f32   PTX 7.8, sm_90; PTX 8.1 (CUDA 12.1), sm_89
// What is outside becomes +-448. A NaN becomes NaN, but whether with its sign is not said: callers bring the
// canonical one, which has none, and whose code is 0x7f.
__device__ __forceinline__ uint32_t e4m3_from_f32(float x) {
    uint32_t v;
    asm("{\n\t"
        ".reg .b16 both;\n\t"
        "cvt.rn.satfinite.e4m3x2.f32 both, 0f00000000, %1;\n\t"
        "cvt.u32.u16 %0, both;\n\t"
        "}"
        : "=r"(v)
        : "f"(x));
    return v;
}

// The same of four values, from the lowest byte on.
__device__ __forceinline__ uint32_t e4m3x4_from_f32(float a, float b, float c, float d) {
    uint32_t v;
    asm("{\n\t"
        ".reg .b16 low, high;\n\t"
        "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n\t"
        "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n\t"
        "mov.b32 %0, {low, high};\n\t"
        "}"
        : "=r"(v)
        : "f"(a), "f"(b), "f"(c), "f"(d));
    return v;
}
#endif

} // namespace phasor::ptx
