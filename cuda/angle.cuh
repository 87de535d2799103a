// Angle sources, which are data: cos and sin of a pair at a position. The sequence of operations in
// `sincos_turn` is the one in src/angle/phase.rs, and what positions and rows mean is what
// src/call/read.rs says; every change must be made in both, or the bits part.
#pragma once

#include "ptx.cuh"

namespace phasor {

// cos and sin of `phase` / 2^64 turns, times `factor`; the sign bit of sin flipped by `sin_flip`.
//
// The phase is reduced to the nearest quarter turn on the integer; what is left, in units of an
// eighth of a turn, has |s| <= 1 and is rounded to f32 once. Two polynomials in s * s follow. A factor
// other than 1 multiplies cos and sin before they are rounded, in two words each.
__device__ __forceinline__ void sincos_turn(uint64_t phase, float factor, uint32_t sin_flip,
                                            float& cos_out, float& sin_out) {
    const float sin_1 = __uint_as_float(0x3f490fdbu);
    const float cos_0 = __uint_as_float(0xbe9de9e6u);
    const int64_t rest = static_cast<int64_t>(phase << 2);
    const uint64_t magnitude = static_cast<uint64_t>(rest < 0 ? -static_cast<uint64_t>(rest) : rest);
    const float high =
        __fmul_rn(__int2float_rn(static_cast<int32_t>(magnitude >> 40)), 0x1p-23f);
    const float low = __int2float_rn(static_cast<int32_t>((magnitude >> 9) & 0x7fffffffu));
    const float s = __fmaf_rn(low, 0x1p-54f, high);
    const float z = __fmul_rn(s, s);

    float p = __fmaf_rn(z, __uint_as_float(0xb8167e3au), __uint_as_float(0x3b232d34u));
    p = __fmaf_rn(z, p, __uint_as_float(0xbda55dd4u));
    p = __fmaf_rn(z, p, __uint_as_float(0xb30c7d7du));
    float c = __fmaf_rn(z, __uint_as_float(0x366a3a40u), __uint_as_float(0xb9aad89cu));
    c = __fmaf_rn(z, c, __uint_as_float(0x3c81e0d7u));

    float cosine, sine;
    if (factor == 1.0f) {
        cosine = __fmaf_rn(z, __fmaf_rn(z, c, cos_0), 1.0f);
        sine = __fmaf_rn(s, sin_1, __fmul_rn(s, p));
    } else {
        // The argument is high + low * 2^-54, its square z + z_rest, cos `one` + `r`.
        const float factor_sin_1 = __fmul_rn(factor, sin_1);
        const float sin_1_rest = __fmaf_rn(factor, sin_1, -factor_sin_1);
        const float z_rest =
            __fmaf_rn(high, __fmul_rn(low, 0x1p-53f), __fmaf_rn(high, high, -z));
        const float one = __fmaf_rn(z, cos_0, 1.0f);
        float r = __fmaf_rn(z, cos_0, __fsub_rn(1.0f, one));
        r = __fmaf_rn(z_rest, cos_0, r);
        r = __fmaf_rn(z, __fmul_rn(z, c), r);
        cosine = __fmaf_rn(factor, one, __fmul_rn(factor, r));
        p = __fmaf_rn(factor, p, sin_1_rest);
        sine = __fmaf_rn(high, factor_sin_1,
                         __fmaf_rn(s, p, __fmul_rn(__fmul_rn(low, 0x1p-54f), factor_sin_1)));
    }

    // Quarter turns: an odd one swaps the two, and each result takes its sign bit.
    const uint32_t top = static_cast<uint32_t>(phase >> 32);
    const uint32_t quarter = (top + 0x20000000u) >> 30;
    const uint32_t rest_sign = static_cast<uint32_t>(static_cast<uint64_t>(rest) >> 32) & 0x80000000u;
    const bool odd = (quarter & 1u) != 0;
    const uint32_t sine_bits = __float_as_uint(sine) ^ rest_sign;
    const uint32_t cosine_bits = __float_as_uint(cosine);
    const uint32_t cos_sign = ((quarter + 1u) << 30) & 0x80000000u;
    const uint32_t sin_sign = ((quarter << 30) & 0x80000000u) ^ sin_flip;
    cos_out = __uint_as_float((odd ? sine_bits : cosine_bits) ^ cos_sign);
    sin_out = __uint_as_float((odd ? cosine_bits : sine_bits) ^ sin_sign);
}

// The id of token (b, t). Earlier work may write ids, so that they are not read through the
// non-coherent cache.
__device__ __forceinline__ uint64_t token_id(const PhasorIds& ids, uint32_t b, uint32_t t,
                                             uint64_t further) {
    const uint64_t address = ids.address + further + b * ids.batch + t * ids.token;
    if (ids.type == PHASOR_IDS_I64) return ptx::load_8(address);
    const uint32_t word = ptx::load_4(address);
    if (ids.type == PHASOR_IDS_U32) return word;
    return static_cast<uint64_t>(static_cast<int64_t>(static_cast<int32_t>(word)));
}

// The positions of token (b, t), which count by `step`.
struct TokenPositions {
    uint32_t b, t;
    uint64_t start;

    __device__ __forceinline__ TokenPositions(const PhasorPositions& p, uint32_t b, uint32_t t,
                                              uint32_t step)
        : b(b), t(t), start(static_cast<uint64_t>(p.start) +
                            static_cast<uint64_t>(step) * static_cast<uint64_t>(p.advance)) {}

    __device__ __forceinline__ uint64_t on_axis(const PhasorPositions& p, uint32_t axis) const {
        if (p.ids.type == PHASOR_IDS_NONE) return start;
        return start + token_id(p.ids, b, t, axis * static_cast<uint64_t>(p.axis_stride));
    }
};

// cos and sin of a phase.
__device__ __forceinline__ float2 turn(const PhasorAngles& angles, uint64_t phase, float factor) {
    float2 turn;
    sincos_turn(phase, factor, angles.inverse << 31, turn.x, turn.y);
    return turn;
}

// What most calls have: one row of steps on one axis. Angles are the same as those of TokenRow, and need
// less.
struct OneRow {
    static __device__ __forceinline__ bool is_all(const PhasorCall& call) {
        return call.angles.row_choice == PHASOR_ROW_ONLY && call.angles.axes == 1;
    }
    static __device__ __forceinline__ uint64_t step(const PhasorCall& call, uint32_t pair) {
        return ptx::load_constant_8(call.angles.steps + pair * sizeof(uint64_t));
    }
    static __device__ __forceinline__ float2 form(const PhasorCall& call, uint64_t step,
                                                  uint64_t position) {
        return turn(call.angles, step * position, call.angles.factor);
    }
};

// The row of steps or of the table that a token has. Whatever the ids are, nothing is read outside the
// rows.
struct TokenRow {
    TokenPositions positions;
    uint64_t position; // on the first axis
    uint64_t row;      // of steps: the address of those on the first axis; of a table: bytes before it
    float factor;      // the attention factor
    bool rotates = true;

    __device__ __forceinline__ TokenRow(const PhasorCall& call, const TokenPositions& positions,
                                        uint64_t position)
        : positions(positions), position(position), row(call.angles.steps),
          factor(call.angles.factor) {
        const PhasorRows& rows = call.rows;
        const uint32_t choice = call.angles.row_choice;
        if (choice == PHASOR_ROW_ONLY) return;
        uint64_t wanted = 0;
        if (choice == PHASOR_ROW_AT_POSITION) {
            wanted = static_cast<int64_t>(position) < 0 ? 0 : position;
            // As an unsigned number a negative position is past the last row too.
            rotates = position < rows.count ||
                      call.angles.out_of_range != PHASOR_OUT_OF_RANGE_PASS_THROUGH;
        } else if (choice == PHASOR_ROW_OF_CALL) {
            wanted = rows.row;
        } else if (choice == PHASOR_ROW_IDS) {
            wanted = token_id(rows.ids, positions.b, positions.t, 0);
        } else {
            wanted = static_cast<int64_t>(position) >= rows.boundary ? 1 : 0;
        }
        const uint64_t index = wanted < rows.count ? wanted : rows.count - 1;
        if (choice == PHASOR_ROW_AT_POSITION) {
            row = index * call.angles.pairs * sizeof(float);
        } else {
            row += index * (call.angles.axes * call.angles.pairs) * sizeof(uint64_t);
            factor = ptx::load_constant_f(rows.factors + index * sizeof(float));
        }
    }

    // cos and sin of a pair.
    __device__ __forceinline__ float2 form(const PhasorCall& call, uint32_t pair) const {
        const PhasorAngles& angles = call.angles;
        if (angles.row_choice == PHASOR_ROW_AT_POSITION) {
            const uint64_t at = row + pair * sizeof(float);
            const float cos = ptx::load_constant_f(call.table.cos + at);
            const uint32_t sin = __float_as_uint(ptx::load_constant_f(call.table.sin + at));
            return make_float2(cos, __uint_as_float(sin ^ (angles.inverse << 31)));
        }
        uint64_t phase = step(pair) * position;
#pragma unroll 1
        for (uint32_t axis = 1; axis < angles.axes; ++axis) {
            phase += step(axis * angles.pairs + pair) * positions.on_axis(call.positions, axis);
        }
        return turn(angles, phase, factor);
    }

  private:
    __device__ __forceinline__ uint64_t step(uint32_t pair) const {
        return ptx::load_constant_8(row + pair * sizeof(uint64_t));
    }
};

} // namespace phasor
