#include "append.cuh"

PHASOR_APPEND_KERNELS(f32, F32)
