// The rotation kernel. Element type and pairing are template parameters, as they change the inner
// stream of instructions; everything else (shapes, strides, positions, where angles come from, in or
// out of place) is data.
//
// A block is (lanes, rows, tokens): a lane owns one chunk of pairs of every head it visits, rows
// visit different heads, the grid is (tokens, heads, batch). A block forms the angles of its tokens
// once, in shared memory, while its first loads of q and k are in flight; a lane then keeps those of
// its chunk in registers over its heads. Both members of a pair belong to one thread, so every byte
// is read once and written once, and in place is safe.
#pragma once

#include "angle.cuh"
#include "element.cuh"

namespace phasor {

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

// A pairing says how elements are accessed, where the two places of chunk `c` are in what is read and
// in what is written, which pairs they hold, and which two of the loaded values are pair `j`.
struct HalfSplit {
    template <class Element>
    using Access = Vectors<Element>;

    static __device__ __forceinline__ Places source(const PhasorCall& call, uint32_t c) {
        return {4 * c, call.angles.pairs + 4 * c};
    }
    static __device__ __forceinline__ Places destination(const PhasorCall& call, uint32_t c) {
        return source(call, c);
    }
    static __device__ __forceinline__ uint32_t pair(const PhasorCall&, uint32_t c, uint32_t j) {
        return 4 * c + j;
    }
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
    static __device__ __forceinline__ uint32_t pair(const PhasorCall& call, uint32_t c, uint32_t j) {
        return 2 * c + (j < 2 ? j : call.angles.pairs / 2 + j - 2);
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
    static __device__ __forceinline__ uint32_t pair(const PhasorCall&, uint32_t c, uint32_t) {
        return c;
    }
    static constexpr __device__ uint32_t a(uint32_t) { return 0; }
    static constexpr __device__ uint32_t b(uint32_t) { return 1; }
};

// cos and sin of the pairs of a block: of each token, those of each lane's chunk, side by side.
template <uint32_t kPairs>
struct SharedAngles {
    float* cos; // of this thread's token
    float* sin;

    __device__ __forceinline__ SharedAngles() {
        extern __shared__ __align__(16) float phasor_shared[];
        const uint32_t pairs = blockDim.x * kPairs;
        cos = phasor_shared + threadIdx.z * 2 * pairs;
        sin = cos + pairs;
    }

    // The threads of a token form its angles: this one those of the pairs at `first`, and at every
    // blockDim.x * blockDim.y from there.
    static __device__ __forceinline__ uint32_t first() {
        return threadIdx.y * blockDim.x + threadIdx.x;
    }

    // `step`: that of the first of them, if `known`.
    template <class Pairing>
    __device__ __forceinline__ void form(const PhasorCall& call, const TokenAngles& token,
                                         uint32_t first_chunk, uint32_t end_chunk, bool known,
                                         uint64_t step) const {
#pragma unroll 1
        for (uint32_t i = first();; i += blockDim.x * blockDim.y) {
            const uint32_t c = first_chunk + i / kPairs;
            if (c >= end_chunk) break;
            const uint32_t pair = Pairing::pair(call, c, i % kPairs);
            if (!known && call.angles.source == PHASOR_ANGLES_STEPS) {
                step = token.first_step(call.angles, pair);
            }
            known = false;
            token.form(call, pair, step, cos[i], sin[i]);
        }
    }
};

// One thread's cos and sin for the pairs of its chunk.
template <uint32_t kPairs>
struct ChunkAngles {
    float cos[kPairs];
    float sin[kPairs];

    __device__ __forceinline__ explicit ChunkAngles(const SharedAngles<kPairs>& shared) {
        if constexpr (kPairs == 4) {
            const float4 c = reinterpret_cast<const float4*>(shared.cos)[threadIdx.x];
            const float4 s = reinterpret_cast<const float4*>(shared.sin)[threadIdx.x];
            cos[0] = c.x, cos[1] = c.y, cos[2] = c.z, cos[3] = c.w;
            sin[0] = s.x, sin[1] = s.y, sin[2] = s.z, sin[3] = s.w;
        } else {
            static_assert(kPairs == 1, "one value or a vector of four");
            cos[0] = shared.cos[threadIdx.x];
            sin[0] = shared.sin[threadIdx.x];
        }
    }
};

// What one thread holds of one head.
template <class Access>
struct Fragment {
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
            const float cos = angles.cos[j];
            const float sin = angles.sin[j];
            const float a_rotated = __fmaf_rn(a, cos, -__fmul_rn(b, sin));
            const float b_rotated = __fmaf_rn(a, sin, __fmul_rn(b, cos));
            a = a_rotated;
            b = b_rotated;
        }
        Access::pack(x, first);
        Access::pack(x + kPairs, second);
    }
};

// The heads of q and k that belong to one token, numbered through: head h of k follows those of q.
struct TokenHeads {
    uint64_t q, k;
    int64_t q_stride, k_stride;

    // `at` elements into the rotated window.
    template <class Element>
    static __device__ __forceinline__ TokenHeads of(const PhasorCall& call, const PhasorView& q,
                                                    const PhasorView& k, uint32_t at, uint32_t b,
                                                    uint32_t t) {
        return TokenHeads{
            q.address + b * q.batch + t * q.token + (call.q.rotary_offset + at) * Element::kBytes,
            k.address + b * k.batch + t * k.token + (call.k.rotary_offset + at) * Element::kBytes -
                call.q.heads * k.head,
            q.head, k.head};
    }

    __device__ __forceinline__ uint64_t address(uint32_t h, bool is_q) const {
        return (is_q ? q : k) + h * (is_q ? q_stride : k_stride);
    }
};

// Copies the dims of a head that do not rotate, for a destination that is not the source.
template <class Access, class Element>
__device__ __forceinline__ void copy_unrotated(const PhasorStream& stream, uint32_t b, uint32_t t,
                                               uint32_t rotary_dim) {
    if (stream.in_place) return;
    constexpr uint32_t kBytes = Access::kPairs * Element::kBytes;
    const uint64_t source = stream.source.address + b * stream.source.batch + t * stream.source.token;
    const uint64_t destination =
        stream.destination.address + b * stream.destination.batch + t * stream.destination.token;
    const uint32_t prefix = stream.rotary_offset / Access::kPairs;
    const uint32_t rotated = rotary_dim / Access::kPairs;
    const uint32_t units = stream.head_dim / Access::kPairs - rotated;
#pragma unroll 1
    for (uint32_t h = blockIdx.y * blockDim.y + threadIdx.y; h < stream.heads;
         h += gridDim.y * blockDim.y) {
        const uint64_t from = source + h * stream.source.head;
        const uint64_t to = destination + h * stream.destination.head;
#pragma unroll 1
        for (uint32_t i = threadIdx.x; i < units; i += blockDim.x) {
            const uint64_t at = static_cast<uint64_t>(i < prefix ? i : i + rotated) * kBytes;
            typename Access::Storage v;
            Access::load(from + at, v);
            Access::store(to + at, v);
        }
    }
}

template <class Element, class Pairing>
__device__ __forceinline__ void rope(const PhasorCall& call) {
    using Access = typename Pairing::template Access<Element>;
    constexpr uint32_t kPairs = Access::kPairs;
    // Heads whose loads are in flight together.
    constexpr uint32_t kHeads = 4;

    ptx::launch_dependents();
    // Every thread waits once, whatever it has to do: before it reads or writes q and k, before it
    // reads ids unless they are promised, and before it ends.
    bool waits_later = ptx::kCanWait && (call.flags & PHASOR_ANGLES_BEFORE_WAIT) != 0;
    if (!waits_later) ptx::wait_for_earlier_work();

    uint32_t b = 0, group = blockIdx.x;
    if (call.batch > 1) {
        b = group / call.token_groups;
        group -= b * call.token_groups;
    }
    const uint32_t t = group * blockDim.z + threadIdx.z;
    const uint32_t chunks = call.angles.pairs / kPairs;
    const uint32_t heads = call.q.heads + call.k.heads;
    const uint32_t head_step = gridDim.y * blockDim.y;
    const uint32_t first_head = blockIdx.y * blockDim.y + threadIdx.y;
    const bool has_token = t < call.tokens;
    // Threads of tokens past the last one have nothing to do but to wait with the others.
    const uint32_t own_chunks = has_token ? chunks : 0;
    const SharedAngles<kPairs> shared;

    // Chunks that the lanes of a block hold at a time. The loop goes round as often for each thread of
    // the block, so that all meet at its barriers.
#pragma unroll 1
    for (uint32_t first_chunk = blockIdx.z * blockDim.x; first_chunk < chunks;
         first_chunk += gridDim.z * blockDim.x) {
        const uint32_t c = first_chunk + threadIdx.x;
        const bool has_work = c < own_chunks && first_head < heads;
        const Places from = Pairing::source(call, c);
        const auto sources =
            TokenHeads::of<Element>(call, call.q.source, call.k.source, from.first, b, t);
        const uint32_t source_gap = (from.second - from.first) * Element::kBytes;

        Fragment<Access> fragment[kHeads];
        const auto load = [&](uint32_t h0) {
#pragma unroll
            for (uint32_t u = 0; u < kHeads; ++u) {
                const uint32_t h = h0 + u * head_step;
                if (h >= heads) break;
                const uint64_t source = sources.address(h, h < call.q.heads);
                Access::load(source, fragment[u].first);
                Access::load(source + source_gap, fragment[u].second);
            }
        };

        // In this order, so that the longest way, from a position over the angles to the first
        // store, starts first, and nothing waits before all loads are on their way.
        const bool early = waits_later;
        const uint32_t end_chunk = min(own_chunks, first_chunk + blockDim.x);
        const uint32_t form_chunk = first_chunk + shared.first() / kPairs;
        TokenAngles token(call, b, has_token ? t : 0);
        uint64_t step = 0;
        const bool step_known = call.angles.source == PHASOR_ANGLES_STEPS &&
                                call.rows.choice == PHASOR_ROW_ONLY && form_chunk < end_chunk;
        if (step_known) {
            step = token.first_step(call.angles,
                                    Pairing::pair(call, form_chunk, shared.first() % kPairs));
        }
        if (has_work && !early) load(first_head);
        token.choose_row(call);
        shared.template form<Pairing>(call, token, first_chunk, end_chunk, step_known, step);
        if (early) {
            ptx::wait_for_earlier_work();
            waits_later = false;
            if (has_work) load(first_head);
        }
        __syncthreads();
        if (has_work) {
            const ChunkAngles<kPairs> angles(shared);
            auto destinations = sources;
            uint32_t destination_gap = source_gap;
            if (!call.in_place) {
                const Places to = Pairing::destination(call, c);
                destinations = TokenHeads::of<Element>(call, call.q.destination,
                                                       call.k.destination, to.first, b, t);
                destination_gap = (to.second - to.first) * Element::kBytes;
            }
#pragma unroll 1
            for (uint32_t h0 = first_head;;) {
#pragma unroll
                for (uint32_t u = 0; u < kHeads; ++u) {
                    const uint32_t h = h0 + u * head_step;
                    if (h >= heads) break;
                    if (token.rotates) fragment[u].template rotate<Pairing>(angles);
                    const uint64_t destination = destinations.address(h, h < call.q.heads);
                    Access::store(destination, fragment[u].first);
                    Access::store(destination + destination_gap, fragment[u].second);
                }
                h0 += kHeads * head_step;
                if (h0 >= heads) break;
                load(h0);
            }
        }
        // The next round writes the angles that this one reads.
        if (first_chunk + gridDim.z * blockDim.x < chunks) __syncthreads();
    }
    if (waits_later) ptx::wait_for_earlier_work();

    if (!has_token || blockIdx.z != 0) return;
    copy_unrotated<Access, Element>(call.q, b, t, 2 * call.angles.pairs);
    copy_unrotated<Access, Element>(call.k, b, t, 2 * call.angles.pairs);
}

// Blocks of 256 threads that a multiprocessor must hold. Left alone, some versions of ptxas aim for
// fewer registers than the heads in flight take, and spill.
template <class Element>
constexpr uint32_t kMinBlocks = Element::kBytes == 4 ? 3 : 4;

} // namespace phasor

// The entry points of one element type: rope_<dtype>_<pairing>.
#define PHASOR_ROPE_KERNEL(name, element, pairing)                              \
    extern "C" __global__ void __launch_bounds__(256, phasor::kMinBlocks<phasor::element>) \
        name(const __grid_constant__ PhasorCall call) {                         \
        phasor::rope<phasor::element, phasor::pairing>(call);                   \
    }

#define PHASOR_ROPE_KERNELS(dtype, element)                                     \
    PHASOR_ROPE_KERNEL(rope_##dtype##_half_split, element, HalfSplit)           \
    PHASOR_ROPE_KERNEL(rope_##dtype##_interleaved, element, Interleaved)        \
    PHASOR_ROPE_KERNEL(rope_##dtype##_any, element, AnyPairing)
