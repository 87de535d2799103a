#include "append.cuh"

PHASOR_APPEND_KERNELS(bf16, Bf16)
