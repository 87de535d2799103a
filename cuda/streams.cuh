// The heads of q, k and v of one token, as a thread visits them: what it reads of each head, and where that
// is written.
#pragma once

#include "heads.cuh"
#include "token.cuh"

namespace phasor {

// A thread's share in forming the angles of its token: each thread forms that of every blockDim.x *
// blockDim.y-th pair of the block.
template <class Pairing, uint32_t kPairs>
struct AngleShare {
    SharedAngles<kPairs> shared;
    uint32_t first_pair, end_pair;
    uint32_t i; // the next pair
    bool one_row;
    uint64_t step = 0; // its step, where there is but one row

    // Of the chunks from `first_chunk` on and `pairs` in all. Nothing waits for what is loaded.
    __device__ __forceinline__ AngleShare(const PhasorCall& call, uint32_t first_chunk, uint32_t pairs)
        : first_pair(first_chunk * kPairs), end_pair(min(first_pair + blockDim.x * kPairs, pairs)),
          i(first_pair + threadIdx.y * blockDim.x + threadIdx.x), one_row(OneRow::is_all(call)) {
        if (one_row && i < end_pair) step = OneRow::step(call, Pairing::pair(call, i));
    }

    // Of `pairs`, those of a whole head or none.
    __device__ __forceinline__ AngleShare(const PhasorCall& call, uint32_t pairs)
        : first_pair(0), end_pair(pairs), i(threadIdx.y * blockDim.x + threadIdx.x),
          one_row(OneRow::is_all(call)) {
        if (one_row && i < end_pair) step = OneRow::step(call, Pairing::pair(call, i));
    }

    // Forms them; whether the token rotates.
    __device__ __forceinline__ bool form(const PhasorCall& call, const TokenPositions& positions,
                                         uint64_t position) {
        if (one_row && i < end_pair) {
            shared.put(i - first_pair, OneRow::form(call, step, position));
            i += blockDim.x * blockDim.y;
        }
        bool rotates = true;
        if (!one_row || i < end_pair) {
            const TokenRow row(call, positions, position);
            rotates = row.rotates;
#pragma unroll 1
            for (; i < end_pair; i += blockDim.x * blockDim.y) {
                shared.put(i - first_pair, row.form(call, Pairing::pair(call, i)));
            }
        }
        return rotates;
    }
};

// Heads of one stream that a thread visits at once: up to 2^heads_log2 that follow each other. Groups are
// numbered through: those of k follow those of q, and those of v follow.
struct HeadGroup {
    bool is_q, is_v;
    uint32_t first; // head
    uint32_t heads;

    static __device__ __forceinline__ uint32_t count(const PhasorCall& call,
                                                     const PhasorStream& stream) {
        const uint32_t last = (1u << call.heads_log2) - 1;
        return (stream.heads + last) >> call.heads_log2;
    }
    static __device__ __forceinline__ uint32_t count(const PhasorCall& call) {
        return count(call, call.q) + count(call, call.k) + count(call, call.v);
    }

    // `heads` that follow `first`, of q, k or v, which are numbered 0 to 2.
    __device__ __forceinline__ HeadGroup(uint32_t stream, uint32_t first, uint32_t heads)
        : is_q(stream == 0), is_v(stream == 2), first(first), heads(heads) {}

    __device__ __forceinline__ HeadGroup(const PhasorCall& call, uint32_t group) {
        const uint32_t k_begins = count(call, call.q);
        const uint32_t v_begins = k_begins + count(call, call.k);
        is_q = group < k_begins;
        is_v = group >= v_begins;
        const uint32_t before = of<uint32_t>(0, k_begins, v_begins);
        first = (group - before) << call.heads_log2;
        heads = min(of(call.q.heads, call.k.heads, call.v.heads) - first, 1u << call.heads_log2);
    }

    // That of the group's stream.
    template <class T>
    __device__ __forceinline__ T of(T q, T k, T v) const {
        return is_q ? q : is_v ? v : k;
    }
    // The same of k or v.
    template <class T>
    __device__ __forceinline__ T cached_of(T k, T v) const {
        return is_v ? v : k;
    }

    // Address of `dim` of the first head.
    template <class Element>
    __device__ __forceinline__ uint64_t at(const PhasorView& q, const PhasorView& k,
                                           const PhasorView& v, const Token& token,
                                           uint32_t dim) const {
        return of(q.address, k.address, v.address) + token.b * of(q.batch, k.batch, v.batch) +
               token.t * of(q.token, k.token, v.token) + first * of(q.head, k.head, v.head) +
               dim * Element::kBytes;
    }
};

// Two places of a head that a thread reads, each of so many dims as there are pairs in a chunk. The first
// chunks are those of the rotated window; those of the other dims follow, and have but one place at the
// end where there is an odd number of them.
template <class Pairing, uint32_t kPairs>
struct Chunk {
    bool rotates;
    bool has_first, has_second;
    Places from, to; // in dims of the head

    __device__ __forceinline__ Chunk(const PhasorCall& call, const HeadGroup& group, uint32_t c) {
        const uint32_t pairs = group.is_v ? 0 : call.angles.pairs;
        const uint32_t window = pairs / kPairs;
        const uint32_t offset =
            group.of(call.q.rotary_offset, call.k.rotary_offset, call.v.rotary_offset);
        rotates = c < window;
        if (rotates) {
            const Places source = Pairing::source(call, c);
            const Places destination = Pairing::destination(call, c);
            from = {offset + source.first, offset + source.second};
            to = {offset + destination.first, offset + destination.second};
            has_first = has_second = true;
            return;
        }
        const uint32_t head_dim =
            group.of(call.q_output.head_dim, call.k_output.head_dim, call.v_output.head_dim);
        const uint32_t places = (head_dim - 2 * pairs) / kPairs;
        const uint32_t half = (places + 1) / 2;
        const uint32_t i = c - window;
        const auto dim = [&](uint32_t place) {
            const uint32_t at = place * kPairs;
            return at < offset ? at : at + 2 * pairs;
        };
        has_first = i < half;
        has_second = i + half < places;
        from = to = {dim(i), dim(i + half)};
    }
};

// Where a group is written, besides in a cache.
struct GroupOutput {
    bool nowhere, in_place;

    __device__ __forceinline__ GroupOutput(const PhasorCall& call, const HeadGroup& group)
        : nowhere(group.of(call.q_output.nowhere, call.k_output.nowhere, call.v_output.nowhere)),
          in_place(
              group.of(call.q_output.in_place, call.k_output.in_place, call.v_output.in_place)) {}

    // Whether dims are written, which rotate or not.
    __device__ __forceinline__ bool takes(bool rotates) const {
        return !nowhere && (!in_place || rotates);
    }
};

// The cache of a group, if it has any.
struct GroupCache {
    bool present;
    uint64_t address; // of the first head of a slot
    int64_t head, block;
    uint32_t block_dims, head_dim;

    static __device__ __forceinline__ bool is_present(const PhasorCall& call,
                                                      const HeadGroup& group) {
        return !group.is_q && group.cached_of(call.k_cache.present, call.v_cache.present) != 0;
    }

    // Page and slot of the token are `slot`.
    __device__ __forceinline__ GroupCache(const PhasorCall& call, const HeadGroup& group, uint2 slot)
        : present(is_present(call, group) && slot.x != kNone) {
        const PhasorCache &k = call.k_cache, &v = call.v_cache;
        head = group.cached_of(k.head, v.head);
        block = group.cached_of(k.block, v.block);
        block_dims = group.cached_of(k.block_dims, v.block_dims);
        head_dim = group.cached_of(call.k_output.head_dim, call.v_output.head_dim);
        address = group.cached_of(k.address, v.address) + slot.x * group.cached_of(k.page, v.page) +
                  slot.y * group.cached_of(k.slot, v.slot) + group.first * head;
    }

    // Bytes from dim 0 to another.
    template <class Element>
    __device__ __forceinline__ int64_t bytes(uint32_t dim) const {
        if (block_dims >= head_dim) return dim * Element::kBytes;
        return dim / block_dims * block + dim % block_dims * Element::kBytes;
    }
};

} // namespace phasor
