//! Sizes and offsets of the parameter structs, as the bindings have them.

use phasor::params::*;
use std::mem::offset_of;

/// In the order of cuda/params_layout.cu.
pub fn host_layout() -> Vec<u64> {
    let layout = [
        size_of::<PhasorStrides>(),
        offset_of!(PhasorStrides, batch),
        offset_of!(PhasorStrides, sequence),
        offset_of!(PhasorStrides, head),
        size_of::<PhasorTensor>(),
        offset_of!(PhasorTensor, source),
        offset_of!(PhasorTensor, destination),
        offset_of!(PhasorTensor, source_strides),
        offset_of!(PhasorTensor, destination_strides),
        offset_of!(PhasorTensor, heads),
        offset_of!(PhasorTensor, head_dim),
        offset_of!(PhasorTensor, rotary_offset),
        offset_of!(PhasorTensor, reserved),
        size_of::<PhasorAngles>(),
        offset_of!(PhasorAngles, steps),
        offset_of!(PhasorAngles, cos),
        offset_of!(PhasorAngles, sin),
        offset_of!(PhasorAngles, rows),
        offset_of!(PhasorAngles, pairs),
        offset_of!(PhasorAngles, out_of_range),
        offset_of!(PhasorAngles, cos_scale),
        offset_of!(PhasorAngles, sin_scale),
        size_of::<PhasorPositions>(),
        offset_of!(PhasorPositions, ids),
        offset_of!(PhasorPositions, start),
        offset_of!(PhasorPositions, advance),
        offset_of!(PhasorPositions, batch_stride),
        offset_of!(PhasorPositions, sequence_stride),
        offset_of!(PhasorPositions, type_),
        offset_of!(PhasorPositions, reserved),
        size_of::<PhasorRopeParams>(),
        offset_of!(PhasorRopeParams, q),
        offset_of!(PhasorRopeParams, k),
        offset_of!(PhasorRopeParams, angles),
        offset_of!(PhasorRopeParams, positions),
        offset_of!(PhasorRopeParams, batch),
        offset_of!(PhasorRopeParams, sequence),
    ];
    layout.map(|value| value as u64).to_vec()
}
