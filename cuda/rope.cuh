// The rotation kernel. Element type, pairing, angle source and access width are separate template
// parameters; everything else (shapes, strides, positions, in or out of place) is data. Where
// accesses are narrow, so is the pairing.
//
// A block is (lanes, rows, tokens): a lane owns one chunk of pairs of every head it visits, rows
// visit different heads, the grid is (tokens, heads, batch). The angles of a lane's chunk are
// formed once per token and stay in registers over its heads. Both members of a pair belong to
// one thread, so every byte is read once and written once, and in place is safe.
#pragma once

#include "angle.cuh"
#include "element.cuh"

namespace phasor {

// Chunks of 16 bytes from each of two places in the head.
template <class Element>
struct Wide {
    static constexpr uint32_t kPairs = 16 / Element::kBytes;
    // Blocks of 256 threads that a multiprocessor must hold. Left alone, some versions of ptxas
    // aim for 64 registers and spill.
    static constexpr uint32_t kMinBlocks = 2;

    using Storage = ptx::Words4;
    static __device__ __forceinline__ Storage load(uint64_t address) {
        return ptx::load_16_once(address);
    }
    static __device__ __forceinline__ void store(uint64_t address, const Storage& v) {
        ptx::store_16_once(address, v);
    }
    static __device__ __forceinline__ void unpack(const Storage& v, float* x) {
#pragma unroll
        for (uint32_t i = 0; i < 4; ++i) Element::unpack(v.w[i], x + i * Element::kPerWord);
    }
    static __device__ __forceinline__ Storage pack(const float* x) {
        Storage v;
#pragma unroll
        for (uint32_t i = 0; i < 4; ++i) v.w[i] = Element::pack(x + i * Element::kPerWord);
        return v;
    }
};

// One element from each of two places: any alignment, any even rotary_dim.
template <class Element>
struct Narrow {
    static constexpr uint32_t kPairs = 1;
    // As above, with the registers that this path needs.
    static constexpr uint32_t kMinBlocks = 3;

    using Storage = uint32_t;
    static __device__ __forceinline__ Storage load(uint64_t address) {
        return Element::load_one(address);
    }
    static __device__ __forceinline__ void store(uint64_t address, Storage v) {
        Element::store_one(address, v);
    }
    static __device__ __forceinline__ void unpack(Storage v, float* x) { x[0] = Element::widen(v); }
    static __device__ __forceinline__ Storage pack(const float* x) { return Element::narrow(x[0]); }
};

// Where the two places of a chunk start, in elements from the first rotated dim.
struct Places {
    uint32_t first;
    uint32_t second;
};

// A pairing says where the two places of chunk `c` are in what is read and in what is written, which
// pairs they hold, and which two of the loaded values are pair `j`.
struct HalfSplit {
    template <uint32_t kPairs>
    static __device__ __forceinline__ Places source(const PhasorRopeParams& p, uint32_t c) {
        return {c * kPairs, p.angles.pairs + c * kPairs};
    }
    template <uint32_t kPairs>
    static __device__ __forceinline__ Places destination(const PhasorRopeParams& p, uint32_t c) {
        return source<kPairs>(p, c);
    }
    // Pair of local index j, which is even: pairs j and j + 1 are formed together.
    template <uint32_t kPairs>
    static __device__ __forceinline__ uint32_t pair(uint32_t c, uint32_t, uint32_t j) {
        return c * kPairs + j;
    }
    // Index of the members of pair j in the 2 * kPairs loaded values.
    template <uint32_t kPairs>
    static constexpr __device__ uint32_t a(uint32_t j) {
        return j;
    }
    template <uint32_t kPairs>
    static constexpr __device__ uint32_t b(uint32_t j) {
        return kPairs + j;
    }
};

struct Interleaved {
    // The two places lie half the rotated window apart, so that neighbouring lanes access
    // neighbouring 16 bytes.
    template <uint32_t kPairs>
    static __device__ __forceinline__ Places source(const PhasorRopeParams& p, uint32_t c) {
        return {c * kPairs, p.angles.pairs + c * kPairs};
    }
    template <uint32_t kPairs>
    static __device__ __forceinline__ Places destination(const PhasorRopeParams& p, uint32_t c) {
        return source<kPairs>(p, c);
    }
    template <uint32_t kPairs>
    static __device__ __forceinline__ uint32_t pair(uint32_t c, uint32_t pairs, uint32_t j) {
        constexpr uint32_t kHalf = kPairs / 2;
        return j < kHalf ? c * kHalf + j : (pairs + c * kPairs) / 2 + j - kHalf;
    }
    template <uint32_t kPairs>
    static constexpr __device__ uint32_t a(uint32_t j) {
        return 2 * j;
    }
    template <uint32_t kPairs>
    static constexpr __device__ uint32_t b(uint32_t j) {
        return 2 * j + 1;
    }
};

// Any pairing, also another in what is written than in what is read: one pair at a time.
struct AnyPairing {
    template <uint32_t kPairs>
    static __device__ __forceinline__ Places source(const PhasorRopeParams& p, uint32_t c) {
        const uint32_t first = c * p.pairing.source_step;
        return {first, first + p.pairing.source_gap};
    }
    template <uint32_t kPairs>
    static __device__ __forceinline__ Places destination(const PhasorRopeParams& p, uint32_t c) {
        const uint32_t first = c * p.pairing.destination_step;
        return {first, first + p.pairing.destination_gap};
    }
    template <uint32_t kPairs>
    static __device__ __forceinline__ uint32_t pair(uint32_t c, uint32_t, uint32_t) {
        static_assert(kPairs == 1, "one pair at a time");
        return c;
    }
    template <uint32_t kPairs>
    static constexpr __device__ uint32_t a(uint32_t) {
        return 0;
    }
    template <uint32_t kPairs>
    static constexpr __device__ uint32_t b(uint32_t) {
        return 1;
    }
};

// One thread's cos and sin for the pairs of its chunk, the attention factor multiplied in.
template <uint32_t kPairs>
struct ChunkAngles {
    float cos[kPairs];
    float sin[kPairs];

    template <class Pairing, class Angles>
    __device__ __forceinline__ void fill(const PhasorRopeParams& p, const Angles& at, uint32_t c) {
        float cos_scale, sin_scale;
        form<Pairing, kPairs>(p, at, c, cos, sin, cos_scale, sin_scale);
#pragma unroll
        for (uint32_t j = 0; j < kPairs; ++j) {
            cos[j] = __fmul_rn(cos[j], cos_scale);
            sin[j] = __fmul_rn(sin[j], sin_scale);
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
            float& a = x[Pairing::template a<kPairs>(j)];
            float& b = x[Pairing::template b<kPairs>(j)];
            const float cos = angles.cos[j];
            const float sin = angles.sin[j];
            const float a_rotated = __fmaf_rn(a, cos, -__fmul_rn(b, sin));
            const float b_rotated = __fmaf_rn(a, sin, __fmul_rn(b, cos));
            a = a_rotated;
            b = b_rotated;
        }
        first = Access::pack(x);
        second = Access::pack(x + kPairs);
    }
};

// The rows of q and k that belong to one token: addresses of dim 0 of head 0.
struct TokenRows {
    uint64_t q_source, q_destination, k_source, k_destination;

    __device__ __forceinline__ TokenRows(const PhasorRopeParams& p, int64_t b, int64_t s)
        : q_source(p.q.source + b * p.q.source_strides.batch + s * p.q.source_strides.sequence),
          q_destination(p.q.destination + b * p.q.destination_strides.batch +
                        s * p.q.destination_strides.sequence),
          k_source(p.k.source + b * p.k.source_strides.batch + s * p.k.source_strides.sequence),
          k_destination(p.k.destination + b * p.k.destination_strides.batch +
                        s * p.k.destination_strides.sequence) {}
};

// Copies the dims of a head that do not rotate, for a destination that is not the source.
template <class Access, class Element>
__device__ __forceinline__ void copy_unrotated(const PhasorTensor& tensor, uint64_t source,
                                               uint64_t destination, uint32_t rotary_dim) {
    constexpr uint32_t kBytes = Access::kPairs * Element::kBytes;
    const uint32_t prefix = tensor.rotary_offset / Access::kPairs;
    const uint32_t rotated = rotary_dim / Access::kPairs;
    const uint32_t units = tensor.head_dim / Access::kPairs - rotated;
    for (uint32_t h = blockIdx.y * blockDim.y + threadIdx.y; h < tensor.heads;
         h += gridDim.y * blockDim.y) {
        const uint64_t from = source + h * tensor.source_strides.head;
        const uint64_t to = destination + h * tensor.destination_strides.head;
        for (uint32_t i = threadIdx.x; i < units; i += blockDim.x) {
            const uint64_t at = static_cast<uint64_t>(i < prefix ? i : i + rotated) * kBytes;
            Access::store(to + at, Access::load(from + at));
        }
    }
}

template <class Element, class Pairing, class Angles, template <class> class Width>
__device__ __forceinline__ void rope(const PhasorRopeParams& p) {
    using Access = Width<Element>;
    constexpr uint32_t kPairs = Access::kPairs;
    // Heads whose loads are in flight together. More of them do not fit in registers beside the
    // angles of a wide chunk.
    constexpr uint32_t kHeads = 4;

    const uint32_t pairs = p.angles.pairs;
    const uint32_t chunks = pairs / kPairs;
    const uint32_t heads = p.q.heads + p.k.heads;
    const uint32_t head_step = gridDim.y * blockDim.y;
    const int64_t batch = static_cast<int64_t>(p.batch);
    const int64_t sequence = static_cast<int64_t>(p.sequence);

    for (int64_t b = blockIdx.z; b < batch; b += gridDim.z) {
        for (int64_t s = static_cast<int64_t>(blockIdx.x) * blockDim.z + threadIdx.z; s < sequence;
             s += static_cast<int64_t>(gridDim.x) * blockDim.z) {
            const TokenRows rows(p, b, s);
            const Angles at(p, b, s);
            const bool rotates = at.rotates(p.angles);

            for (uint32_t c = threadIdx.x; c < chunks; c += blockDim.x) {
                const Places from = Pairing::template source<kPairs>(p, c);
                const Places to = Pairing::template destination<kPairs>(p, c);

                ChunkAngles<kPairs> angles;
                bool formed = false;
                for (uint32_t h0 = blockIdx.y * blockDim.y + threadIdx.y; h0 < heads;
                     h0 += kHeads * head_step) {
                    Fragment<Access> fragment[kHeads];
                    uint64_t destination[kHeads];
#pragma unroll
                    for (uint32_t u = 0; u < kHeads; ++u) {
                        const uint32_t h = h0 + u * head_step;
                        if (h >= heads) break;
                        const bool is_q = h < p.q.heads;
                        const int64_t i = is_q ? h : h - p.q.heads;
                        const uint64_t in_head =
                            static_cast<uint64_t>(is_q ? p.q.rotary_offset : p.k.rotary_offset) *
                            Element::kBytes;
                        const uint64_t source =
                            in_head + (is_q ? rows.q_source + i * p.q.source_strides.head
                                            : rows.k_source + i * p.k.source_strides.head);
                        destination[u] =
                            in_head +
                            (is_q ? rows.q_destination + i * p.q.destination_strides.head
                                  : rows.k_destination + i * p.k.destination_strides.head);
                        fragment[u].first = Access::load(source + from.first * Element::kBytes);
                        fragment[u].second = Access::load(source + from.second * Element::kBytes);
                    }
                    // After the first loads have been issued, so that they hide the arithmetic.
                    if (rotates && !formed) {
                        angles.template fill<Pairing>(p, at, c);
                        formed = true;
                    }
#pragma unroll
                    for (uint32_t u = 0; u < kHeads; ++u) {
                        if (h0 + u * head_step >= heads) break;
                        if (rotates) fragment[u].template rotate<Pairing>(angles);
                        Access::store(destination[u] + to.first * Element::kBytes,
                                      fragment[u].first);
                        Access::store(destination[u] + to.second * Element::kBytes,
                                      fragment[u].second);
                    }
                }
            }

            if (p.q.source != p.q.destination) {
                copy_unrotated<Access, Element>(p.q, rows.q_source, rows.q_destination, 2 * pairs);
            }
            if (p.k.source != p.k.destination) {
                copy_unrotated<Access, Element>(p.k, rows.k_source, rows.k_destination, 2 * pairs);
            }
        }
    }
}

// Blocks that a multiprocessor must hold, with what the angle source needs.
template <class Access, class Angles>
constexpr uint32_t kMinBlocks = Access::kMinBlocks;
template <class Access>
constexpr uint32_t kMinBlocks<Access, RowAngles> = 2;

} // namespace phasor

// The entry points of one element type: rope_<pairing>_<dtype>[_rows|_table], and
// rope_<dtype>[_rows|_table]_narrow for any pairing.
#define PHASOR_ROPE_KERNEL(name, element, pairing, angles, width)                              \
    extern "C" __global__ void                                                                 \
    __launch_bounds__(256, phasor::kMinBlocks<phasor::width<phasor::element>, phasor::angles>) \
        name(const __grid_constant__ PhasorRopeParams params) {                                \
        phasor::rope<phasor::element, phasor::pairing, phasor::angles, phasor::width>(params); \
    }

#define PHASOR_ROPE_KERNEL_PAIRINGS(dtype, suffix, element, angles)                                   \
    PHASOR_ROPE_KERNEL(rope_half_split_##dtype##suffix, element, HalfSplit, angles, Wide)     \
    PHASOR_ROPE_KERNEL(rope_interleaved_##dtype##suffix, element, Interleaved, angles, Wide)  \
    PHASOR_ROPE_KERNEL(rope_##dtype##suffix##_narrow, element, AnyPairing, angles, Narrow)

#define PHASOR_ROPE_KERNELS(dtype, element)                          \
    PHASOR_ROPE_KERNEL_PAIRINGS(dtype, , element, ExactAngles)       \
    PHASOR_ROPE_KERNEL_PAIRINGS(dtype, _rows, element, RowAngles)    \
    PHASOR_ROPE_KERNEL_PAIRINGS(dtype, _table, element, TableAngles)
