#include "attend.cuh"

PHASOR_ATTEND_SPLITS(codes, phasor::OfCodes)
