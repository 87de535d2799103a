// Angle sources: cos and sin of a pair at a position. The sequence of operations in `sincos_turn`
// is the one in src/angle/phase.rs; every change must be made in both, or the bits part.
#pragma once

#include "ptx.cuh"

namespace phasor {

// cos and sin of `phase` / 2^64 turns.
//
// The phase is reduced to the nearest quarter turn on the integer; what is left, in units of an
// eighth of a turn, has |s| <= 1 and is rounded to f32 once. Two polynomials in s * s follow.
__device__ __forceinline__ void sincos_turn(uint64_t phase, float& cos_out, float& sin_out) {
    const int64_t rest = static_cast<int64_t>(phase << 2);
    const uint64_t magnitude = static_cast<uint64_t>(rest < 0 ? -static_cast<uint64_t>(rest) : rest);
    const float high = __int2float_rn(static_cast<int32_t>(magnitude >> 40));
    const float low = __int2float_rn(static_cast<int32_t>((magnitude >> 9) & 0x7fffffffu));
    const float s = __fmaf_rn(low, 0x1p-54f, __fmul_rn(high, 0x1p-23f));
    const float z = __fmul_rn(s, s);

    float p = __fmaf_rn(z, __uint_as_float(0xb8167e3au), __uint_as_float(0x3b232d34u));
    p = __fmaf_rn(z, p, __uint_as_float(0xbda55dd4u));
    p = __fmaf_rn(z, p, __uint_as_float(0xb30c7d7du));
    const float sine = __fmaf_rn(s, __uint_as_float(0x3f490fdbu), __fmul_rn(s, p));

    float c = __fmaf_rn(z, __uint_as_float(0x366a3a40u), __uint_as_float(0xb9aad89cu));
    c = __fmaf_rn(z, c, __uint_as_float(0x3c81e0d7u));
    c = __fmaf_rn(z, c, __uint_as_float(0xbe9de9e6u));
    const float cosine = __fmaf_rn(z, c, 1.0f);

    // Quarter turns: an odd one swaps the two, and each result takes its sign bit.
    const uint32_t top = static_cast<uint32_t>(phase >> 32);
    const uint32_t quarter = (top + 0x20000000u) >> 30;
    const uint32_t rest_sign = static_cast<uint32_t>(static_cast<uint64_t>(rest) >> 32) & 0x80000000u;
    const bool odd = (quarter & 1u) != 0;
    const uint32_t sine_bits = __float_as_uint(sine) ^ rest_sign;
    const uint32_t cosine_bits = __float_as_uint(cosine);
    const uint32_t cos_sign = ((quarter + 1u) << 30) & 0x80000000u;
    const uint32_t sin_sign = (quarter << 30) & 0x80000000u;
    cos_out = __uint_as_float((odd ? sine_bits : cosine_bits) ^ cos_sign);
    sin_out = __uint_as_float((odd ? cosine_bits : sine_bits) ^ sin_sign);
}

// The position of token (b, s) on an axis.
__device__ __forceinline__ int64_t token_position(const PhasorPositions& p, uint32_t axis, int64_t b,
                                                  int64_t s) {
    const uint64_t base =
        static_cast<uint64_t>(p.start) + static_cast<uint64_t>(s) * static_cast<uint64_t>(p.advance);
    const uint64_t address =
        p.ids + axis * p.axis_stride + b * p.batch_stride + s * p.sequence_stride;
    uint64_t id = 0;
    if (p.type == PHASOR_POSITION_I64) {
        id = ptx::load_constant_8(address);
    } else if (p.type == PHASOR_POSITION_I32) {
        id = static_cast<uint64_t>(
            static_cast<int64_t>(static_cast<int32_t>(ptx::load_constant_4(address))));
    } else if (p.type == PHASOR_POSITION_U32) {
        id = ptx::load_constant_4(address);
    }
    return static_cast<int64_t>(base + id);
}

// Exact phases on one axis: step * position modulo one turn. Every position is in range.
struct ExactAngles {
    uint64_t position;

    __device__ __forceinline__ ExactAngles(const PhasorRopeParams& p, int64_t b, int64_t s)
        : position(static_cast<uint64_t>(token_position(p.positions, 0, b, s))) {}

    __device__ __forceinline__ bool rotates(const PhasorAngles&) const { return true; }

    __device__ __forceinline__ void one(const PhasorAngles& angles, uint32_t pair, float& cos_out,
                                        float& sin_out) const {
        sincos_turn(ptx::load_constant_8(angles.steps + 8ull * pair) * position, cos_out, sin_out);
    }

    // Pairs `pair` and `pair + 1`; `pair` is even.
    __device__ __forceinline__ void two(const PhasorAngles& angles, uint32_t pair, float* cos_out,
                                        float* sin_out) const {
        uint64_t a, b;
        ptx::load_constant_2x8(angles.steps + 8ull * pair, a, b);
        sincos_turn(a * position, cos_out[0], sin_out[0]);
        sincos_turn(b * position, cos_out[1], sin_out[1]);
    }
};

// Exact phases where each token has a row of steps, and a position on each of several axes: the
// phase is the sum over the axes of step * position, modulo one turn.
struct RowAngles {
    int64_t b, s;

    __device__ __forceinline__ RowAngles(const PhasorRopeParams&, int64_t b, int64_t s)
        : b(b), s(s) {}

    __device__ __forceinline__ bool rotates(const PhasorAngles&) const { return true; }

    // Never outside the steps, whatever the index.
    __device__ __forceinline__ uint64_t row(const PhasorRopeParams& p) const {
        uint64_t row = p.rows.row;
        if (p.rows.type == PHASOR_ROW_IDS) {
            row = ptx::load_constant_4(p.rows.ids + b * p.rows.batch_stride +
                                       s * p.rows.sequence_stride);
        } else if (p.rows.type == PHASOR_ROW_BY_POSITION) {
            row = token_position(p.positions, 0, b, s) >= p.rows.boundary ? 1 : 0;
        }
        return row < p.angles.rows ? row : p.angles.rows - 1;
    }
};

// Rows of a caller's table. A row outside it is never read: the position is clamped first, and
// whether the token then rotates at all is the caller's choice.
struct TableAngles {
    uint64_t row;
    bool inside;

    __device__ __forceinline__ TableAngles(const PhasorRopeParams& p, int64_t b, int64_t s) {
        const int64_t at = token_position(p.positions, 0, b, s);
        const int64_t last = static_cast<int64_t>(p.angles.rows) - 1;
        row = static_cast<uint64_t>(at < 0 ? 0 : (at > last ? last : at));
        inside = at >= 0 && at <= last;
    }

    __device__ __forceinline__ bool rotates(const PhasorAngles& angles) const {
        return inside || angles.out_of_range != PHASOR_OUT_OF_RANGE_PASS_THROUGH;
    }

    __device__ __forceinline__ void one(const PhasorAngles& angles, uint32_t pair, float& cos_out,
                                        float& sin_out) const {
        const uint64_t at = 4ull * (row * angles.pairs + pair);
        cos_out = ptx::load_constant_f(angles.cos + at);
        sin_out = ptx::load_constant_f(angles.sin + at);
    }

    __device__ __forceinline__ void two(const PhasorAngles& angles, uint32_t pair, float* cos_out,
                                        float* sin_out) const {
        const uint64_t at = 4ull * (row * angles.pairs + pair);
        ptx::load_constant_2f(angles.cos + at, cos_out[0], cos_out[1]);
        ptx::load_constant_2f(angles.sin + at, sin_out[0], sin_out[1]);
    }
};

// cos and sin of the pairs of chunk `c`, and the factors that are to be multiplied in.
template <class Pairing, uint32_t kPairs, class Angles>
__device__ __forceinline__ void form(const PhasorRopeParams& p, const Angles& at, uint32_t c,
                                     float* cos, float* sin, float& cos_scale, float& sin_scale) {
    const uint32_t pairs = p.angles.pairs;
    if constexpr (kPairs == 1) {
        at.one(p.angles, Pairing::template pair<kPairs>(c, pairs, 0), cos[0], sin[0]);
    } else {
#pragma unroll
        for (uint32_t j = 0; j < kPairs; j += 2) {
            at.two(p.angles, Pairing::template pair<kPairs>(c, pairs, j), cos + j, sin + j);
        }
    }
    cos_scale = p.angles.cos_scale;
    sin_scale = p.angles.sin_scale;
}

// The same with axes outermost, so that each position is read once for the whole chunk. The row is
// looked up here, after the first heads have been loaded.
template <class Pairing, uint32_t kPairs>
__device__ __forceinline__ void form(const PhasorRopeParams& p, const RowAngles& at, uint32_t c,
                                     float* cos, float* sin, float& cos_scale, float& sin_scale) {
    const uint32_t pairs = p.angles.pairs;
    const uint64_t row = at.row(p);
    uint64_t steps = p.angles.steps + 8ull * row * p.angles.axes * pairs;
    uint64_t phase[kPairs] = {};
    uint32_t axis = 0;
    // Unrolled, it would take more registers than there are.
#pragma unroll 1
    do {
        const uint64_t position =
            static_cast<uint64_t>(token_position(p.positions, axis, at.b, at.s));
        if constexpr (kPairs == 1) {
            const uint32_t pair = Pairing::template pair<kPairs>(c, pairs, 0);
            phase[0] += ptx::load_constant_8(steps + 8ull * pair) * position;
        } else {
#pragma unroll
            for (uint32_t j = 0; j < kPairs; j += 2) {
                uint64_t x, y;
                const uint32_t pair = Pairing::template pair<kPairs>(c, pairs, j);
                ptx::load_constant_2x8(steps + 8ull * pair, x, y);
                phase[j] += x * position;
                phase[j + 1] += y * position;
            }
        }
        steps += 8ull * pairs;
    } while (++axis < p.angles.axes);
#pragma unroll
    for (uint32_t j = 0; j < kPairs; ++j) sincos_turn(phase[j], cos[j], sin[j]);
    cos_scale = ptx::load_constant_f(p.angles.factors + 4ull * row);
    sin_scale = __fmul_rn(cos_scale, p.angles.sin_scale);
}

} // namespace phasor
