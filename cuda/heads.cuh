// What the kernels have in common: how elements of a head are accessed, which of them form a pair, and the
// angles of a block in shared memory.
#pragma once

#include "angle.cuh"
#include "element.cuh"

namespace phasor {

// Lets dependent kernels start, and waits for earlier work unless angles are formed before that; tells which.
// Every thread waits once, whatever it has to do: before it reads or writes heads and caches, before it reads
// ids and weights unless they are promised, and before it ends.
__device__ __forceinline__ bool begin(const PhasorCall& call) {
    ptx::launch_dependents();
    const bool early = ptx::kCanWait && call.angles_before_wait != 0;
    if (!early) ptx::wait_for_earlier_work();
    return early;
}

// The token of a thread: the grid goes through the tokens of each sequence of the batch.
struct ThreadToken {
    uint32_t b = 0, t;
    // Threads of tokens past the last one have nothing to do but to wait with the others.
    bool exists;

    explicit __device__ __forceinline__ ThreadToken(const PhasorCall& call) {
        uint32_t group = blockIdx.x;
        if (call.batch > 1) {
            b = group / call.token_groups;
            group -= b * call.token_groups;
        }
        const uint32_t own = group * blockDim.z + threadIdx.z;
        exists = own < call.tokens;
        t = exists ? own : 0;
    }
};

// Two vectors of `kPairs` elements each, from two places in the head: 8 bytes of 16-bit types, 16 of
// f32, which is what was fastest on an H200 (docs/kernel-launch.md).
template <class Element>
struct Vectors {
    static constexpr uint32_t kPairs = 4;
    static constexpr uint32_t kWords = kPairs / Element::kPerWord;

    using Storage = ptx::Words<kWords>;
    static __device__ __forceinline__ void load(uint64_t address, Storage& v) {
        ptx::load_once(address, v);
    }
    static __device__ __forceinline__ void store(uint64_t address, const Storage& v) {
        ptx::store_once(address, v);
    }
    static __device__ __forceinline__ void unpack(const Storage& v, float* x) {
#pragma unroll
        for (uint32_t i = 0; i < kWords; ++i) Element::unpack(v.w[i], x + i * Element::kPerWord);
    }
    static __device__ __forceinline__ void pack(const float* x, Storage& v) {
#pragma unroll
        for (uint32_t i = 0; i < kWords; ++i) v.w[i] = Element::pack(x + i * Element::kPerWord);
    }
};

// One element from each of two places: any alignment, any even rotary_dim.
template <class Element>
struct Scalars {
    static constexpr uint32_t kPairs = 1;

    using Storage = uint32_t;
    static __device__ __forceinline__ void load(uint64_t address, Storage& v) {
        v = Element::load_one(address);
    }
    static __device__ __forceinline__ void store(uint64_t address, Storage v) {
        Element::store_one(address, v);
    }
    static __device__ __forceinline__ void unpack(Storage v, float* x) { x[0] = Element::widen(v); }
    static __device__ __forceinline__ void pack(const float* x, Storage& v) {
        v = Element::narrow(x[0]);
    }
};

// Where the two places of a chunk start, in elements from the first rotated dim.
struct Places {
    uint32_t first;
    uint32_t second;
};

// A pairing says how elements are accessed, where the two places of chunk `c` are in what is read and in
// what is written, which pair is the i-th of those that chunks hold one after the other, and which two
// of the loaded values are pair `j` of a chunk.
struct HalfSplit {
    template <class Element>
    using Access = Vectors<Element>;

    static __device__ __forceinline__ Places source(const PhasorCall& call, uint32_t c) {
        return {4 * c, call.angles.pairs + 4 * c};
    }
    static __device__ __forceinline__ Places destination(const PhasorCall& call, uint32_t c) {
        return source(call, c);
    }
    static __device__ __forceinline__ uint32_t pair(const PhasorCall&, uint32_t i) { return i; }
    // Index of the members of pair j in the loaded values.
    static constexpr __device__ uint32_t a(uint32_t j) { return j; }
    static constexpr __device__ uint32_t b(uint32_t j) { return 4 + j; }
};

// The two places lie half the rotated window apart, so that neighbouring lanes access neighbouring
// vectors.
struct Interleaved {
    template <class Element>
    using Access = Vectors<Element>;

    static __device__ __forceinline__ Places source(const PhasorCall& call, uint32_t c) {
        return HalfSplit::source(call, c);
    }
    static __device__ __forceinline__ Places destination(const PhasorCall& call, uint32_t c) {
        return HalfSplit::source(call, c);
    }
    static __device__ __forceinline__ uint32_t pair(const PhasorCall& call, uint32_t i) {
        return i / 4 * 2 + i % 2 + i / 2 % 2 * (call.angles.pairs / 2);
    }
    static constexpr __device__ uint32_t a(uint32_t j) { return 2 * j; }
    static constexpr __device__ uint32_t b(uint32_t j) { return 2 * j + 1; }
};

// Any pairing, also another in what is written than in what is read: one pair at a time.
struct AnyPairing {
    template <class Element>
    using Access = Scalars<Element>;

    static __device__ __forceinline__ Places source(const PhasorCall& call, uint32_t c) {
        const uint32_t first = c * call.pairing.source_step;
        return {first, first + call.pairing.source_gap};
    }
    static __device__ __forceinline__ Places destination(const PhasorCall& call, uint32_t c) {
        const uint32_t first = c * call.pairing.destination_step;
        return {first, first + call.pairing.destination_gap};
    }
    static __device__ __forceinline__ uint32_t pair(const PhasorCall&, uint32_t i) { return i; }
    static constexpr __device__ uint32_t a(uint32_t) { return 0; }
    static constexpr __device__ uint32_t b(uint32_t) { return 1; }
};

// One thread's cos and sin for the pairs of its chunk.
template <uint32_t kPairs>
struct ChunkAngles {
    float2 pair[kPairs];
};

// cos and sin of the pairs of a block, in shared memory: of each token, those of each lane's chunk, side
// by side.
template <uint32_t kPairs>
struct SharedAngles {
    uint32_t address; // of this thread's token

    __device__ __forceinline__ SharedAngles()
        : address(ptx::shared_memory() + threadIdx.z * blockDim.x * (kPairs * kBytes)) {}

    __device__ __forceinline__ void put(uint32_t i, float2 turn) const {
        ptx::store_shared(address + i * kBytes, turn);
    }

    __device__ __forceinline__ ChunkAngles<kPairs> of_lane() const {
        const uint32_t at = address + threadIdx.x * (kPairs * kBytes);
        ChunkAngles<kPairs> angles;
        if constexpr (kPairs == 1) {
            ptx::load_shared(at, angles.pair[0]);
        } else {
#pragma unroll
            for (uint32_t j = 0; j < kPairs; j += 2) {
                ptx::load_shared(at + j * kBytes, angles.pair[j], angles.pair[j + 1]);
            }
        }
        return angles;
    }

    // Where the angles of all tokens end.
    static __device__ __forceinline__ uint32_t end() {
        return ptx::shared_memory() + blockDim.z * blockDim.x * (kPairs * kBytes);
    }

  private:
    static constexpr uint32_t kBytes = sizeof(float2);
};

// What one thread holds of one head.
template <class Access>
struct Fragment {
    uint64_t source; // where it was loaded from
    typename Access::Storage first;
    typename Access::Storage second;

    template <class Pairing>
    __device__ __forceinline__ void rotate(const ChunkAngles<Access::kPairs>& angles) {
        constexpr uint32_t kPairs = Access::kPairs;
        float x[2 * kPairs];
        Access::unpack(first, x);
        Access::unpack(second, x + kPairs);
#pragma unroll
        for (uint32_t j = 0; j < kPairs; ++j) {
            float& a = x[Pairing::a(j)];
            float& b = x[Pairing::b(j)];
            const float cos = angles.pair[j].x;
            const float sin = angles.pair[j].y;
            const float a_rotated = __fmaf_rn(a, cos, -__fmul_rn(b, sin));
            const float b_rotated = __fmaf_rn(a, sin, __fmul_rn(b, cos));
            a = a_rotated;
            b = b_rotated;
        }
        Access::pack(x, first);
        Access::pack(x + kPairs, second);
    }
};

// Blocks of 256 threads that a multiprocessor must hold. Left alone, some versions of ptxas aim for
// fewer registers than the heads in flight take, and spill.
template <class Element>
constexpr uint32_t kMinBlocks = Element::kBytes == 4 ? 3 : 4;

} // namespace phasor
