#include "fused.cuh"

PHASOR_FUSED_KERNELS(f16, F16)
