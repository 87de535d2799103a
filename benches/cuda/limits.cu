// What the GPU bench holds phasor against: kernels that move the bytes of a call and do nothing else, an
// empty one, and two that write before a rotation reads.
//
// From compute capability 9.0 on, all wait for the kernels before them, and all but one let the next kernel
// start at once. Both instructions do nothing unless a launch is dependent, so one kernel serves both kinds.

using Bytes16 = uint4;
using Bytes8 = uint2;
using Count = unsigned long long;

static __device__ __forceinline__ void let_dependents_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

static __device__ __forceinline__ void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Of the accesses of a thread, all are under way before the first is used.
template <int kAccesses, bool kUpdate>
static __device__ __forceinline__ void pass(Bytes16* to, const Bytes16* from, Count count) {
    let_dependents_start();
    wait_for_earlier_kernels();
    const Count first = Count(blockIdx.x) * blockDim.x * kAccesses + threadIdx.x;
    Bytes16 values[kAccesses];
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
        const Count at = first + i * blockDim.x;
        if (at < count) values[i] = from[at];
    }
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
        const Count at = first + i * blockDim.x;
        if (kUpdate) {
            // The lowest bit of four words: values stay ordinary however often this runs.
            values[i].x ^= 1;
            values[i].y ^= 1;
            values[i].z ^= 1;
            values[i].w ^= 1;
        }
        if (at < count) to[at] = values[i];
    }
}

// The first accesses are copied whole; of the others half of the bytes are written, as where values of 16 bits
// become codes.
template <int kAccesses>
static __device__ __forceinline__ void narrow(Bytes16* to, const Bytes16* from, Count count,
                                              Count whole) {
    let_dependents_start();
    wait_for_earlier_kernels();
    const Count first = Count(blockIdx.x) * blockDim.x * kAccesses + threadIdx.x;
    Bytes8* halves = reinterpret_cast<Bytes8*>(to + whole);
    Bytes16 values[kAccesses];
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
        const Count at = first + i * blockDim.x;
        if (at < count) values[i] = from[at];
    }
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
        const Count at = first + i * blockDim.x;
        if (at < whole) {
            to[at] = values[i];
        } else if (at < count) {
            // All that was read is needed.
            halves[at - whole] = Bytes8{values[i].x ^ values[i].y, values[i].z ^ values[i].w};
        }
    }
}

static __device__ __forceinline__ void write(Bytes16* to, Count count) {
    wait_for_earlier_kernels();
    const Count at = Count(blockIdx.x) * blockDim.x + threadIdx.x;
    // About 1 in bf16 and f32, 1.9 in f16.
    const unsigned word = 0x3f803f80;
    if (at < count) to[at] = Bytes16{word, word, word, word};
}

extern "C" {

__global__ void copy_1(Bytes16* to, const Bytes16* from, Count count) {
    pass<1, false>(to, from, count);
}
__global__ void copy_4(Bytes16* to, const Bytes16* from, Count count) {
    pass<4, false>(to, from, count);
}
__global__ void update_1(Bytes16* to, const Bytes16* from, Count count) {
    pass<1, true>(to, from, count);
}
__global__ void update_4(Bytes16* to, const Bytes16* from, Count count) {
    pass<4, true>(to, from, count);
}
__global__ void narrow_1(Bytes16* to, const Bytes16* from, Count count, Count whole) {
    narrow<1>(to, from, count, whole);
}
__global__ void narrow_4(Bytes16* to, const Bytes16* from, Count count, Count whole) {
    narrow<4>(to, from, count, whole);
}
__global__ void empty(Bytes16*, const Bytes16*, Count) {
    let_dependents_start();
    wait_for_earlier_kernels();
}
__global__ void write_only(Bytes16* to, const Bytes16*, Count count) { write(to, count); }
__global__ void write_and_trigger(Bytes16* to, const Bytes16*, Count count) {
    let_dependents_start();
    write(to, count);
}

}
