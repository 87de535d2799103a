#include "rope.cuh"

PHASOR_ROPE_KERNELS(f16, F16)
