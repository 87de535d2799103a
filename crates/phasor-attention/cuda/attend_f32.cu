#include "attend.cuh"

PHASOR_ATTEND_KERNELS(f32, F32)
