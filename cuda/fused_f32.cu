#include "fused.cuh"

PHASOR_FUSED_KERNELS(f32, F32)
