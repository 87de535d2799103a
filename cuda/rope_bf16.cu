#include "rope.cuh"

PHASOR_ROPE_KERNELS(bf16, Bf16)
