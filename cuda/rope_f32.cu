#include "rope.cuh"

PHASOR_ROPE_KERNELS(f32, F32)
