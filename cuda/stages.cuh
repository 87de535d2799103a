// What is done to a value, or to the values of a head, beside its rotation. Every line here is one of
// src/norm.rs, src/quantize.rs and src/stages.rs, and src/host/stages.rs performs the same; a change must
// be made in all. Each operation rounds once.
#pragma once

#include "element.cuh"

namespace phasor {

constexpr uint32_t kAllLanes = 0xffffffffu;

// To the element type and back.
template <class Element>
__device__ __forceinline__ float rounded(float x) {
    return Element::widen(Element::narrow(x));
}

// The natural logarithm of a number from 1 on.
__device__ __forceinline__ float ln(float x) {
    const uint32_t root_of_half = 0x3f3504f3u;
    const uint32_t bits = __float_as_uint(x) - root_of_half;
    const float e = __int2float_rn(static_cast<int32_t>(bits) >> 23);
    const float f = __fsub_rn(__uint_as_float((bits & 0x7fffffu) + root_of_half), 1.0f);
    float p = __fmaf_rn(__uint_as_float(0xbd9c5ac8u), f, __uint_as_float(0x3e02adb6u));
    p = __fmaf_rn(p, f, __uint_as_float(0xbe06c2a0u));
    p = __fmaf_rn(p, f, __uint_as_float(0x3e116d0eu));
    p = __fmaf_rn(p, f, __uint_as_float(0xbe2a3922u));
    p = __fmaf_rn(p, f, __uint_as_float(0x3e4cd004u));
    p = __fmaf_rn(p, f, __uint_as_float(0xbe800113u));
    p = __fmaf_rn(p, f, __uint_as_float(0x3eaaaaaau));
    const float square = __fmul_rn(f, f);
    float rest = __fmaf_rn(square, -0.5f, __fmul_rn(__fmul_rn(f, square), p));
    rest = __fmaf_rn(e, __uint_as_float(0xb102e308u), rest);
    return __fadd_rn(__fmaf_rn(e, __uint_as_float(0x3f317218u), f), rest);
}

// What a stream's values are multiplied by at a position.
__device__ __forceinline__ float scale_at(const PhasorScale& scale, uint64_t position) {
    if (scale.interval == 0) return scale.factor;
    const uint64_t next = position + 1;
    const uint64_t n = static_cast<int64_t>(next) < 0 ? 0 : next / scale.interval;
    const float temperature = __fmaf_rn(scale.slope, ln(__ull2float_rn(n + 1)), 1.0f);
    return __fmul_rn(scale.factor, temperature);
}

// What is summed of a head, of two dims that follow each other: the values, or their squares.
__device__ __forceinline__ float plain_pair(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float square_pair(float a, float b) {
    return __fmaf_rn(b, b, __fmul_rn(a, a));
}

// What values without their mean are multiplied by, given the mean of their squares.
__device__ __forceinline__ float inverse_deviation(const PhasorNorm& norm, float mean_square) {
    return __frcp_rn(__fsqrt_rn(__fadd_rn(mean_square, norm.eps)));
}

// Norms values, which are without their mean: `weigh` and `add_bias` apply weights and biases, as far as
// there are any.
template <class Element, uint32_t kCount, class Weigh, class AddBias>
__device__ __forceinline__ void apply_norm(uint32_t flags, float r, float (&x)[kCount],
                                           const Weigh& weigh, const AddBias& add_bias) {
#pragma unroll
    for (float& value : x) value = __fmul_rn(value, r);
    if (flags & PHASOR_STAGE_ROUND_BEFORE_WEIGHT) {
#pragma unroll
        for (float& value : x) value = rounded<Element>(value);
    }
    if (flags & PHASOR_STAGE_NORM_WEIGHT) weigh();
    if (flags & PHASOR_STAGE_NORM_BIAS) add_bias();
    if (flags & PHASOR_STAGE_ROUND_AFTER_NORM) {
#pragma unroll
        for (float& value : x) value = rounded<Element>(value);
    }
}

// What a value is multiplied by for a weight.
__device__ __forceinline__ float with_offset(const PhasorNorm& norm, float weight) {
    const float offset = norm.weight_offset;
    return offset == 0.0f ? weight : __fadd_rn(offset, weight);
}

// Puts the i-th byte of some words, which is the first that is put of its word if its place is.
template <uint32_t kWords>
__device__ __forceinline__ void put_byte(uint32_t (&words)[kWords], uint32_t i, uint32_t byte) {
    words[i / 4] = i % 4 == 0 ? byte : words[i / 4] | byte << (i % 4 * 8);
}

// The nearest values of e4m3, as src/quantize.rs has them, of products and quotients: a NaN among these is
// canonical.
#ifdef PHASOR_CASTS_TO_E4M3
__device__ __forceinline__ void e4m3_words(const float (&x)[1], uint32_t (&words)[1]) {
    words[0] = ptx::e4m3_from_f32(x[0]);
}
__device__ __forceinline__ void e4m3_words(const float (&x)[8], uint32_t (&words)[2]) {
    words[0] = ptx::e4m3x4_from_f32(x[0], x[1], x[2], x[3]);
    words[1] = ptx::e4m3x4_from_f32(x[4], x[5], x[6], x[7]);
}
#else
__device__ __forceinline__ uint32_t e4m3_from_f32(float x) {
    const uint32_t bits = __float_as_uint(x);
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t exponent = magnitude >> 23;
    const uint32_t normal = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - (120u << 3);
    const uint32_t significand = (magnitude & 0x7fffffu) | 0x800000u;
    // From 1 to 31, also where it is of no use.
    const uint32_t shift = min(140u - exponent, 30u) + 1;
    const uint32_t half = (1u << (shift - 1)) - 1;
    const uint32_t small = (significand + half + ((significand >> shift) & 1u)) >> shift;
    const uint32_t code = min(exponent > 120u ? normal : small, 0x7eu);
    return magnitude > 0x7f800000u ? 0x7fu : code | ((bits >> 24) & 0x80u);
}
template <uint32_t kCount, uint32_t kWords>
__device__ __forceinline__ void e4m3_words(const float (&x)[kCount], uint32_t (&words)[kWords]) {
#pragma unroll
    for (uint32_t i = 0; i < kCount; ++i) put_byte(words, i, e4m3_from_f32(x[i]));
}
#endif

// The value of a code of e4m3.
__device__ __forceinline__ float e4m3_to_f32(uint32_t code) {
    const uint32_t magnitude = code & 0x7fu;
    // Its fields are those of an f32 whose exponent is 120 less, also where it is subnormal.
    const float value = __fmul_rn(__uint_as_float(magnitude << 20), 0x1p120f);
    const uint32_t bits = magnitude == 0x7fu ? 0x7fffffffu : __float_as_uint(value);
    return __uint_as_float(bits | (code & 0x80u) << 24);
}

// The nearest integer of 8 bits, from `least` on.
__device__ __forceinline__ uint32_t int8_from_f32(float x, int32_t least) {
    const int32_t code = max(min(__float2int_rn(x), 127), least);
    return x != x ? 0 : static_cast<uint32_t>(code) & 0xffu;
}

// The bits of a value's magnitude, which compare as magnitudes do; 0 of what is not finite.
__device__ __forceinline__ uint32_t finite_magnitude(float x) {
    const uint32_t magnitude = __float_as_uint(x) & 0x7fffffffu;
    return magnitude < 0x7f800000u ? magnitude : 0;
}

// The largest power of two of E8M0 that is not above `x`, or its least.
__device__ __forceinline__ float power_of_two_down(float x) {
    return __uint_as_float(x < 0x1p-126f ? 0x00400000u : __float_as_uint(x) & 0x7f800000u);
}

// The least power of two of E8M0 that is not below `x`, or its largest.
__device__ __forceinline__ float power_of_two_up(float x) {
    const float below = power_of_two_down(x);
    return below < x && below < 0x1p127f ? __fmul_rn(2.0f, below) : below;
}

// The scale of a group, of whose magnitudes these are the largest's bits.
__device__ __forceinline__ float scale_of(const PhasorCodes& codes, uint32_t amax_bits) {
    const float amax = __uint_as_float(amax_bits);
    const float most = codes.type == PHASOR_CODES_E4M3 ? 448.0f : 127.0f;
    float scale;
    if (codes.scale_rounding == PHASOR_SCALE_POWER_OF_TWO_DOWN) {
        scale = power_of_two_down(__fdiv_rn(amax, power_of_two_down(most)));
    } else {
        scale = __fdiv_rn(amax, most);
        if (codes.scale_rounding == PHASOR_SCALE_POWER_OF_TWO_UP) scale = power_of_two_up(scale);
    }
    return fmaxf(scale, codes.floor);
}

// Turns values of a group into codes, of which a word has four, from its lowest byte on.
template <uint32_t kCount>
__device__ __forceinline__ void encode(const PhasorCodes& codes, float scale,
                                       const float (&x)[kCount], uint32_t (&words)[(kCount + 3) / 4]) {
    float over[kCount];
    if (codes.multiply) {
        const float by = codes.dynamic ? __fdiv_rn(1.0f, scale) : scale;
#pragma unroll
        for (uint32_t i = 0; i < kCount; ++i) over[i] = __fmul_rn(x[i], by);
    } else {
#pragma unroll
        for (uint32_t i = 0; i < kCount; ++i) over[i] = __fdiv_rn(x[i], scale);
    }
    if (codes.type == PHASOR_CODES_E4M3) {
        e4m3_words(over, words);
    } else {
        const int32_t least = codes.type == PHASOR_CODES_INT8 ? -127 : -128;
#pragma unroll
        for (uint32_t i = 0; i < kCount; ++i) {
            put_byte(words, i, int8_from_f32(over[i], least));
        }
    }
}

// The value of a code.
__device__ __forceinline__ float decoded(const PhasorCodes& codes, float scale, uint32_t code) {
    const float value = codes.type == PHASOR_CODES_E4M3
                            ? e4m3_to_f32(code)
                            : __int2float_rn(static_cast<int32_t>(code << 24) >> 24);
    // By the inverse of the scale is how values became codes.
    return codes.multiply && !codes.dynamic ? __fdiv_rn(value, scale) : __fmul_rn(value, scale);
}

// Whether the call gives the scales.
__device__ __forceinline__ bool has_given_scale(const PhasorCodes& codes) {
    return codes.type != PHASOR_CODES_NONE && codes.dynamic == 0;
}

// The scale that it gives for a head.
__device__ __forceinline__ float given_scale(const PhasorCodes& codes, uint32_t head) {
    return __uint_as_float(ptx::load_4(codes.scales + head * codes.head));
}

// Where the scale of a group of a head in a slot is.
__device__ __forceinline__ uint64_t scale_address(const PhasorCodes& codes, uint2 slot, uint32_t head,
                                                  uint32_t group) {
    return codes.scales + slot.x * codes.page + slot.y * codes.slot + head * codes.head +
           group * codes.group;
}

// Reads it.
__device__ __forceinline__ float stored_scale(const PhasorCodes& codes, uint2 slot, uint32_t head,
                                              uint32_t group) {
    const uint64_t address = scale_address(codes, slot, head, group);
    if (!codes.e8m0) return __uint_as_float(ptx::load_4(address));
    const uint32_t exponent = ptx::load_1(address);
    // The first is 2^-127, the last NaN.
    const uint32_t bits = exponent == 0 ? 0x00400000u : exponent << 23;
    return __uint_as_float(exponent == 255 ? 0x7fffffffu : bits);
}

// Writes it.
__device__ __forceinline__ void put_scale(const PhasorCodes& codes, uint2 slot, uint32_t head,
                                          uint32_t group, float scale) {
    const uint64_t address = scale_address(codes, slot, head, group);
    const uint32_t bits = __float_as_uint(scale);
    if (codes.e8m0) {
        // That of 2^-127 is 0, as it has no exponent.
        ptx::store_1(address, bits >> 23);
    } else {
        ptx::store_4(address, bits);
    }
}

} // namespace phasor
