#include "fused.cuh"

PHASOR_FUSED_KERNELS(bf16, Bf16)
