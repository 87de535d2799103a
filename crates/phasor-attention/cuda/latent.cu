#include "latent.cuh"

PHASOR_NORM_LATENT_KERNEL(f32, F32)
PHASOR_NORM_LATENT_KERNEL(f16, F16)
PHASOR_NORM_LATENT_KERNEL(bf16, Bf16)

extern "C" __global__ void __launch_bounds__(256)
    spread_latent(const __grid_constant__ PhasorLatentKeys call) {
    phasor::spread_latent(call);
}
