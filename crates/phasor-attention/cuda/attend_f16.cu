#include "attend.cuh"

PHASOR_ATTEND_KERNELS(f16, F16)
