#include "attend.cuh"

PHASOR_ATTEND_KERNEL(attend_codes, OfCodes, attend_split)
