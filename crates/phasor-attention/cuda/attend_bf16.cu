#include "attend.cuh"

PHASOR_ATTEND_KERNELS(bf16, Bf16)
