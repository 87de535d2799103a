// The two functions of attention's definition that are no IEEE operations. Every line is one of
// src/scalar.rs; a change must be made in both, or the bits part.
#pragma once

#include "element.cuh"

namespace phasor {

// 2^x for x <= 0. Below -125 it is 0. NaN stays NaN.
__device__ __forceinline__ float exp2_of(float x) {
    const float round = 12582912.0f;
    const float rounded = __fadd_rn(x, round);
    const float f = __fsub_rn(x, __fsub_rn(rounded, round));
    float p = __uint_as_float(0x3920fdddu);
    p = __fmaf_rn(p, f, __uint_as_float(0x3aaf9f2au));
    p = __fmaf_rn(p, f, __uint_as_float(0x3c1d96a6u));
    p = __fmaf_rn(p, f, __uint_as_float(0x3d635774u));
    p = __fmaf_rn(p, f, __uint_as_float(0x3e75fdeeu));
    p = __fmaf_rn(p, f, __uint_as_float(0x3f317218u));
    const float power = __fmaf_rn(p, f, 1.0f);
    const float y = __uint_as_float(__float_as_uint(power) + (__float_as_uint(rounded) << 23));
    if (x < -125.0f) return 0.0f;
    return x != x ? x : y;
}

__device__ __forceinline__ float tanh_of(float x) {
    const float square = __fmul_rn(x, x);
    float p = __uint_as_float(0xbbbaf0eeu);
    p = __fmaf_rn(p, square, __uint_as_float(0x3ca9134fu));
    p = __fmaf_rn(p, square, __uint_as_float(0xbd5c1e2du));
    p = __fmaf_rn(p, square, __uint_as_float(0x3e088393u));
    p = __fmaf_rn(p, square, __uint_as_float(0xbeaaaa99u));
    const float small = __fmaf_rn(__fmul_rn(x, square), p, x);
    const float magnitude = __uint_as_float(__float_as_uint(x) & 0x7fffffffu);
    // -2 log2(e)
    const float e = exp2_of(__fmul_rn(magnitude, __uint_as_float(0xc038aa3bu)));
    const float large = __fdiv_rn(__fsub_rn(1.0f, e), __fadd_rn(1.0f, e));
    const float signed_large =
        __uint_as_float((__float_as_uint(large) & 0x7fffffffu) | (__float_as_uint(x) & 0x80000000u));
    return magnitude <= 0.625f ? small : signed_large;
}

} // namespace phasor
