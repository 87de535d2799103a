// One call, as data: what the host backend, the kernels and the tests' interpreter all execute.
//
// The lists of fields below are the only ones. They make the structs, the check that no compiler
// pads them, the kernel that reports how a device compiler lays them out (call_layout.cu) and,
// through bindgen, the Rust structs.
//
// Addresses are integers, of host or of device memory; strides are in bytes, so that they are added
// as they are.
#ifndef PHASOR_CALL_H
#define PHASOR_CALL_H

#if defined(__CUDACC_RTC__)
// NVRTC ships no <stdint.h>.
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <stdint.h>
#endif

// PhasorIds::type
#define PHASOR_IDS_NONE 0u
#define PHASOR_IDS_I32 1u
#define PHASOR_IDS_I64 2u
#define PHASOR_IDS_U32 3u

// PhasorAngles::source
#define PHASOR_ANGLES_STEPS 0u
#define PHASOR_ANGLES_TABLE 1u

// PhasorAngles::out_of_range
#define PHASOR_OUT_OF_RANGE_CLAMP 0u
#define PHASOR_OUT_OF_RANGE_PASS_THROUGH 1u

// PhasorRows::choice
#define PHASOR_ROW_ONLY 0u
#define PHASOR_ROW_OF_CALL 1u
#define PHASOR_ROW_IDS 2u
#define PHASOR_ROW_BY_POSITION 3u

// PhasorCall::flags. Angles are formed before the kernel waits for earlier work: positions and row
// ids are written by none that may still be running.
#define PHASOR_ANGLES_BEFORE_WAIT 1u

// One side of a stream: [batch, tokens, heads, head_dim], contiguous in the innermost dimension.
#define PHASOR_FIELDS_PhasorView(field) \
    field(uint64_t, address) /* of dim 0 of head 0 of token 0 */ \
    field(int64_t, batch) \
    field(int64_t, token) \
    field(int64_t, head)

// The heads of q or of k. In place the two views are equal, and only rotated dims are touched. A
// stream that is absent has no heads.
#define PHASOR_FIELDS_PhasorStream(field) \
    field(PhasorView, source) \
    field(PhasorView, destination) \
    field(uint32_t, heads) \
    field(uint32_t, head_dim) \
    field(uint32_t, rotary_offset) /* first rotated dim inside a head */ \
    field(uint32_t, in_place)

// Integers, one per token: that of token (b, t) is at address + b * batch + t * token. Signed 64-bit
// once read.
#define PHASOR_FIELDS_PhasorIds(field) \
    field(uint64_t, address) \
    field(int64_t, batch) \
    field(int64_t, token) \
    field(uint32_t, type) \
    field(uint32_t, reserved)

// Where cos and sin come from: steps, 64-bit fractions of a turn per position of shape
// [rows, axes, pairs]; or a table of f32, [rows, pairs] each.
#define PHASOR_FIELDS_PhasorAngles(field) \
    field(uint64_t, steps) \
    field(uint64_t, cos) \
    field(uint64_t, sin) \
    field(uint32_t, pairs) \
    field(uint32_t, axes) \
    field(uint32_t, source) \
    field(uint32_t, out_of_range) /* of a position outside the table's rows */ \
    field(float, factor) /* the attention factor, where there is but one row of steps */ \
    field(uint32_t, inverse) /* 1 turns the other way: sin changes its sign */

// The position of token (b, t) on axis a is start + t * advance + its id, which lies a * axis_stride
// further; 0 where there are no ids. Arithmetic wraps.
#define PHASOR_FIELDS_PhasorPositions(field) \
    field(int64_t, start) \
    field(int64_t, advance) \
    field(int64_t, axis_stride) \
    field(PhasorIds, ids)

// Which of `count` rows of steps (or rows of the table, which positions number) a token has: the
// only one; `row`; its id; or 1 from position `boundary` on, else 0. A row past the last one is the
// last one.
#define PHASOR_FIELDS_PhasorRows(field) \
    field(uint64_t, factors) /* attention factors, f32[count]; not read where there is one row */ \
    field(int64_t, boundary) \
    field(PhasorIds, ids) \
    field(uint32_t, count) \
    field(uint32_t, choice) \
    field(uint32_t, row) \
    field(uint32_t, reserved)

// Which two dims form a pair, in what is read and in what is written: dims from one pair to the next,
// and from a pair's first dim to its second.
#define PHASOR_FIELDS_PhasorPairing(field) \
    field(uint32_t, source_step) \
    field(uint32_t, source_gap) \
    field(uint32_t, destination_step) \
    field(uint32_t, destination_gap)

// What a plain rotation reads comes first and lies together: a kernel fetches its parameters by lines
// of 64 bytes.
#define PHASOR_FIELDS_PhasorCall(field) \
    field(PhasorAngles, angles) \
    field(PhasorPositions, positions) \
    field(uint32_t, batch) \
    field(uint32_t, tokens) /* of each sequence of the batch */ \
    field(uint32_t, token_groups) /* blocks of a kernel that share a sequence's tokens */ \
    field(uint32_t, flags) \
    field(uint32_t, in_place) /* all streams are */ \
    field(uint32_t, reserved) \
    field(PhasorStream, q) \
    field(PhasorStream, k) \
    field(PhasorRows, rows) \
    field(PhasorPairing, pairing)

#define PHASOR_STRUCTS(of) \
    of(PhasorView) \
    of(PhasorStream) \
    of(PhasorIds) \
    of(PhasorAngles) \
    of(PhasorPositions) \
    of(PhasorRows) \
    of(PhasorPairing) \
    of(PhasorCall)

#if defined(__cplusplus)
#define PHASOR_STATIC_ASSERT static_assert
#else
#define PHASOR_STATIC_ASSERT _Static_assert
#endif

#define PHASOR_DECLARE_FIELD(type, name) type name;
#define PHASOR_SIZE_OF_FIELD(type, name) +sizeof(type)
#define PHASOR_DECLARE_STRUCT(name) \
    typedef struct name { \
        PHASOR_FIELDS_##name(PHASOR_DECLARE_FIELD) \
    } name; \
    PHASOR_STATIC_ASSERT(sizeof(name) == 0 PHASOR_FIELDS_##name(PHASOR_SIZE_OF_FIELD), \
                         "no padding: every byte of a call is set");

PHASOR_STRUCTS(PHASOR_DECLARE_STRUCT)

#endif
