#include "append.cuh"

PHASOR_APPEND_KERNELS(f16, F16)
