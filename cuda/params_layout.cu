// Reports how the device compiler laid out the parameter structs, so that the host can hold its
// own layout against it. `out` holds PHASOR_LAYOUT_VALUES values, in the order written here.
#if defined(__CUDACC_RTC__)
// NVRTC ships no <stddef.h>.
#define offsetof(type, member) ((uint64_t)&((type*)0)->member)
#else
#include <stddef.h>
#endif

#include "phasor_params.h"

extern "C" __global__ void phasor_params_layout(uint64_t* out) {
    const uint64_t values[] = {
        sizeof(PhasorStrides),
        offsetof(PhasorStrides, batch),
        offsetof(PhasorStrides, sequence),
        offsetof(PhasorStrides, head),
        sizeof(PhasorTensor),
        offsetof(PhasorTensor, source),
        offsetof(PhasorTensor, destination),
        offsetof(PhasorTensor, source_strides),
        offsetof(PhasorTensor, destination_strides),
        offsetof(PhasorTensor, heads),
        offsetof(PhasorTensor, head_dim),
        offsetof(PhasorTensor, rotary_offset),
        offsetof(PhasorTensor, reserved),
        sizeof(PhasorAngles),
        offsetof(PhasorAngles, steps),
        offsetof(PhasorAngles, factors),
        offsetof(PhasorAngles, cos),
        offsetof(PhasorAngles, sin),
        offsetof(PhasorAngles, rows),
        offsetof(PhasorAngles, pairs),
        offsetof(PhasorAngles, axes),
        offsetof(PhasorAngles, out_of_range),
        offsetof(PhasorAngles, cos_scale),
        offsetof(PhasorAngles, sin_scale),
        offsetof(PhasorAngles, reserved),
        sizeof(PhasorPositions),
        offsetof(PhasorPositions, ids),
        offsetof(PhasorPositions, start),
        offsetof(PhasorPositions, advance),
        offsetof(PhasorPositions, axis_stride),
        offsetof(PhasorPositions, batch_stride),
        offsetof(PhasorPositions, sequence_stride),
        offsetof(PhasorPositions, type),
        offsetof(PhasorPositions, reserved),
        sizeof(PhasorRows),
        offsetof(PhasorRows, ids),
        offsetof(PhasorRows, batch_stride),
        offsetof(PhasorRows, sequence_stride),
        offsetof(PhasorRows, boundary),
        offsetof(PhasorRows, type),
        offsetof(PhasorRows, row),
        sizeof(PhasorPairing),
        offsetof(PhasorPairing, source_step),
        offsetof(PhasorPairing, source_gap),
        offsetof(PhasorPairing, destination_step),
        offsetof(PhasorPairing, destination_gap),
        sizeof(PhasorRopeParams),
        offsetof(PhasorRopeParams, q),
        offsetof(PhasorRopeParams, k),
        offsetof(PhasorRopeParams, angles),
        offsetof(PhasorRopeParams, positions),
        offsetof(PhasorRopeParams, rows),
        offsetof(PhasorRopeParams, pairing),
        offsetof(PhasorRopeParams, batch),
        offsetof(PhasorRopeParams, sequence),
    };
    static_assert(sizeof(values) == PHASOR_LAYOUT_VALUES * sizeof(uint64_t), "count them again");
#pragma unroll
    for (uint32_t i = 0; i < PHASOR_LAYOUT_VALUES; ++i) out[i] = values[i];
}
