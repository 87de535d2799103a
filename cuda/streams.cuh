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

// Heads of one stream that a thread visits at once.
struct HeadGroup {
    uint32_t stream; // q, k, v: 0, 1, 2
    uint32_t first;  // head
    uint32_t heads;

    __device__ __forceinline__ HeadGroup(uint32_t stream, uint32_t first, uint32_t heads)
        : stream(stream), first(first), heads(heads) {}

    // Has no heads where a stream has more groups than its heads are enough for.
    __device__ __forceinline__ HeadGroup(const PhasorCall& call, uint32_t group) {
        stream = (group >= call.k_groups_begin ? 1 : 0) + (group >= call.v_groups_begin ? 1 : 0);
        first = (group - (&call.q_groups_begin)[stream]) << call.heads_log2;
        const uint32_t all = read(call).heads;
        heads = first < all ? min(all - first, 1u << call.heads_log2) : 0;
    }

    __device__ __forceinline__ bool is_q() const { return stream == 0; }
    __device__ __forceinline__ bool is_v() const { return stream == 2; }

    // The group's stream, of the three that lie side by side.
    __device__ __forceinline__ const PhasorStream& read(const PhasorCall& call) const {
        return (&call.q)[stream];
    }
    __device__ __forceinline__ const PhasorOutput& output(const PhasorCall& call) const {
        return (&call.q_output)[stream];
    }
    // Of k or v; k's for q, which has none.
    __device__ __forceinline__ const PhasorCache& cache(const PhasorCall& call) const {
        return (&call.k_cache)[stream >> 1];
    }
    __device__ __forceinline__ bool is_cached(const PhasorCall& call) const {
        return !is_q() && cache(call).present != 0;
    }
    // Whether dims are written elsewhere than in a cache, which rotate or not.
    __device__ __forceinline__ bool goes_out(const PhasorCall& call, bool rotates) const {
        const PhasorOutput& to = output(call);
        return to.nowhere == 0 && (to.in_place == 0 || rotates);
    }

    // Address of what lies `bytes` into the first head.
    __device__ __forceinline__ uint64_t at(const PhasorCall& call, const PhasorView& view,
                                           const Token& token, uint32_t bytes) const {
        uint64_t address = view.address + token.t * view.token + first * view.head + bytes;
        if (call.batch > 1) address += token.b * view.batch;
        return address;
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
        const uint32_t pairs = group.is_v() ? 0 : call.angles.pairs;
        const uint32_t window = pairs / kPairs;
        const uint32_t offset = group.read(call).rotary_offset;
        rotates = c < window;
        if (rotates) {
            const Places source = Pairing::source(call, c);
            const Places destination = Pairing::destination(call, c);
            from = {offset + source.first, offset + source.second};
            to = {offset + destination.first, offset + destination.second};
            has_first = has_second = true;
            return;
        }
        const uint32_t places = (group.output(call).head_dim - 2 * pairs) / kPairs;
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

// Where a group is in its cache, if it is stored there.
struct GroupCache {
    uint64_t address; // of the first head of a slot
    int64_t head, block;
    uint32_t block_dims, head_dim;

    // Page and slot of the token are `slot`.
    static __device__ __forceinline__ bool takes(const PhasorCall& call, const HeadGroup& group,
                                                 uint2 slot) {
        return slot.x != kNone && group.is_cached(call);
    }
    __device__ __forceinline__ GroupCache(const PhasorCall& call, const HeadGroup& group,
                                          uint2 slot) {
        const PhasorCache& cache = group.cache(call);
        head = cache.head;
        block = cache.block;
        block_dims = cache.block_dims;
        head_dim = group.output(call).head_dim;
        address = cache.address + slot.x * cache.page + slot.y * cache.slot + group.first * head;
    }

    // Bytes from dim 0 to another, of what has `size` bytes.
    __device__ __forceinline__ int64_t bytes(uint32_t dim, uint32_t size) const {
        if (block_dims >= head_dim) return dim * size;
        return bytes_in_blocks(dim, size);
    }
    // The same, whether there is one block or more.
    __device__ __forceinline__ int64_t bytes_in_blocks(uint32_t dim, uint32_t size) const {
        return dim / block_dims * block + dim % block_dims * size;
    }
};

// Where the heads of a group are written. Most go to one place, whose addresses are found once for the group; that
// in a cache is found for each head where it is the second one, or where a head lies in blocks.
struct GroupStores {
    static constexpr uint32_t kFound = 1, kFoundLate = 2, kCached = 4;

    uint32_t places = 0; // of these
    uint64_t first = 0;  // of the first head
    int64_t step = 0;    // bytes from one head to the next

    GroupStores() = default;

    // Of a dim, which has `out_bytes`, or `stored_bytes` in a cache. In place it is at `source`.
    __device__ __forceinline__ GroupStores(const PhasorCall& call, const HeadGroup& heads,
                                           const Token& token, uint2 slot, uint64_t source,
                                           uint32_t dim, bool goes_out, uint32_t out_bytes,
                                           uint32_t stored_bytes)
        : first(source), step(heads.read(call).source.head) {
        if (goes_out) {
            places = kFound;
            const PhasorOutput& output = heads.output(call);
            if (!output.in_place) {
                first = heads.at(call, output.destination, token, dim * out_bytes);
                step = output.destination.head;
            }
        }
        if (GroupCache::takes(call, heads, slot)) {
            const GroupCache cache(call, heads, slot);
            if (goes_out || cache.block_dims < cache.head_dim) {
                places |= kFoundLate | kCached;
            } else {
                places = kFound | kCached;
                first = cache.address + dim * stored_bytes;
                step = cache.head;
            }
        }
    }

    // Whether heads go to the place whose addresses are `first`; to one in a cache that is yet to be found.
    __device__ __forceinline__ bool is_found() const { return places & kFound; }
    __device__ __forceinline__ bool is_found_late() const { return places & kFoundLate; }
    __device__ __forceinline__ bool is_cached() const { return places & kCached; }
};

} // namespace phasor
