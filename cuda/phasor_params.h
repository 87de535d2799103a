// Parameters of every phasor kernel, shared by the kernels and by Rust (through bindgen).
//
// Only fixed-width types, ordered so that no compiler inserts padding. Addresses are device
// addresses as integers; strides are in bytes, so that a kernel adds them as they are.
#ifndef PHASOR_PARAMS_H
#define PHASOR_PARAMS_H

#if defined(__CUDACC_RTC__)
// NVRTC ships no <stdint.h>.
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <stdint.h>
#endif

// PhasorPositions::type
#define PHASOR_POSITION_NONE 0u
#define PHASOR_POSITION_I32 1u
#define PHASOR_POSITION_I64 2u
#define PHASOR_POSITION_U32 3u

// PhasorAngles::out_of_range
#define PHASOR_OUT_OF_RANGE_CLAMP 0u
#define PHASOR_OUT_OF_RANGE_PASS_THROUGH 1u

// PhasorRows::type
#define PHASOR_ROW_CALL 0u
#define PHASOR_ROW_IDS 1u
#define PHASOR_ROW_BY_POSITION 2u

// Values that the kernel phasor_params_layout reports.
#define PHASOR_LAYOUT_VALUES 55u

typedef struct PhasorStrides {
    int64_t batch;
    int64_t sequence;
    int64_t head;
} PhasorStrides;

// One tensor to rotate, [batch, sequence, heads, head_dim] with a contiguous innermost dimension.
// In place means that source and destination (addresses and strides) are equal; only the rotated
// dims are then touched. An absent tensor has no heads.
typedef struct PhasorTensor {
    uint64_t source;
    uint64_t destination;
    PhasorStrides source_strides;
    PhasorStrides destination_strides;
    uint32_t heads;
    uint32_t head_dim;
    uint32_t rotary_offset; // first rotated dim inside a head
    uint32_t reserved;
} PhasorTensor;

// Where cos and sin come from: either `steps`, 64-bit fractions of a turn per position of shape
// [rows, axes, pairs], with a factor per row; or f32 table rows of `pairs` values each. The kernels
// for one row and one axis read neither `factors` nor `axes`.
typedef struct PhasorAngles {
    uint64_t steps;
    uint64_t factors; // attention factors, f32[rows]
    uint64_t cos;
    uint64_t sin;
    uint64_t rows; // of steps or of the table
    uint32_t pairs;
    uint32_t axes;
    uint32_t out_of_range; // of a position outside the table's rows
    float cos_scale;       // the attention factor; not read where there are factors
    float sin_scale;       // the same, or 1 where there are factors; negative for the inverse
    uint32_t reserved;
} PhasorAngles;

// The position of token (b, s) on axis a is
//   start + s * advance +
//     (type == NONE ? 0 : ids[a * axis_stride + b * batch_stride + s * sequence_stride])
// in wrapping 64-bit arithmetic; the strides of ids are in bytes.
typedef struct PhasorPositions {
    uint64_t ids;
    int64_t start;
    int64_t advance;
    int64_t axis_stride;
    int64_t batch_stride;
    int64_t sequence_stride;
    uint32_t type;
    uint32_t reserved;
} PhasorPositions;

// The row of steps of token (b, s): `row`; or the u32 at ids[b * batch_stride + s *
// sequence_stride], strides in bytes; or 1 from position `boundary` on, else 0. A row past the last
// one is the last one.
typedef struct PhasorRows {
    uint64_t ids;
    int64_t batch_stride;
    int64_t sequence_stride;
    int64_t boundary;
    uint32_t type;
    uint32_t row;
} PhasorRows;

// Which two dims form a pair, in what is read and in what is written: dims from one pair to the next,
// and from a pair's first dim to its second. The kernels for one pairing do not read this.
typedef struct PhasorPairing {
    uint32_t source_step;
    uint32_t source_gap;
    uint32_t destination_step;
    uint32_t destination_gap;
} PhasorPairing;

typedef struct PhasorRopeParams {
    PhasorTensor q;
    PhasorTensor k;
    PhasorAngles angles;
    PhasorPositions positions;
    PhasorRows rows;
    PhasorPairing pairing;
    uint64_t batch;
    uint64_t sequence;
} PhasorRopeParams;

#endif
