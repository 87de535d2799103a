// The kernel that rotates q and k, carries v, and stores keys and values in caches, in one launch. It does
// all that the rotation kernel does, and finds out what a token is where sequences are ragged.
//
// The block is the rotation kernel's, and so are its angles. One thread of each token finds its sequence
// and its slot, for all of its heads. A lane owns a chunk of every head that it visits, of the rotated dims or
// of the others, and every byte is read once and written once where it goes.
#pragma once

#include "streams.cuh"

namespace phasor {

// A lane's chunk of a group of heads.
template <class Element, class Pairing>
struct Visit {
    HeadGroup group;
    Chunk<Pairing, Pairing::template Access<Element>::kPairs> chunk;
    uint64_t source; // of its first place in the first head
    uint32_t gap;    // bytes from there to its second place

    __device__ __forceinline__ Visit(const PhasorCall& call, const Token& token, uint32_t g,
                                     uint32_t c)
        : group(call, g), chunk(call, group, c),
          source(group.at(call, group.read(call).source, token, chunk.from.first * Element::kBytes)),
          gap((chunk.from.second - chunk.from.first) * Element::kBytes) {}

    // What is not written is not read. (There are no groups that are written nowhere.)
    __device__ __forceinline__ bool reads(const PhasorCall& call) const {
        return chunk.has_first &&
               (chunk.rotates || !group.output(call).in_place || group.is_cached(call));
    }
};

template <class Element, class Pairing>
__device__ __forceinline__ void append(const PhasorCall& call) {
    using Access = typename Pairing::template Access<Element>;
    constexpr uint32_t kPairs = Access::kPairs;
    // Heads whose loads are in flight together, at most.
    constexpr uint32_t kHeads = 4;

    const bool early = begin(call);
    const ThreadToken own(call);
    Token token(call, own.b, own.t);
    const bool ragged = is_ragged(call);
    TokenPositions positions(call.positions, token.id_batch, token.t, token.step);
    uint64_t position = 0;
    if (!ragged) position = positions.on_axis(call.positions, 0);

    const uint32_t first_chunk = blockIdx.z * blockDim.x;
    const uint32_t c = first_chunk + threadIdx.x;
    const uint32_t group_step = gridDim.y * blockDim.y;
    uint32_t groups = own.exists ? call.groups_end : 0;
    uint32_t g = blockIdx.y * blockDim.y + threadIdx.y;

    // What the thread visits, which is found before its loads have to wait.
    Visit<Element, Pairing> visit(call, token, g, c);
    Fragment<Access> fragment[kHeads];
    const auto load = [&]() {
        if (g >= groups || !visit.reads(call)) return;
        uint64_t source = visit.source;
        const int64_t head = visit.group.read(call).source.head;
#pragma unroll
        for (uint32_t u = 0; u < kHeads; ++u, source += head) {
            if (u > 0 && u >= visit.group.heads) break;
            Access::load(source, fragment[u].first);
            if (visit.chunk.has_second) Access::load(source + visit.gap, fragment[u].second);
        }
    };
    if (!early) load();

    const SharedPlace place{SharedAngles<kPairs>::end() + threadIdx.z * SharedPlace::kBytes};
    const bool finds = own.exists && SharedPlace::is_found_here();
    if (ragged && !place.find_sequence_of(call, own.exists, token, positions, position)) groups = 0;
    AngleShare<Pairing, kPairs> angle_share(call, first_chunk, groups > 0 ? call.angles.pairs : 0);
    bool outside = false;
    if (finds) {
        const Slot slot = Slot::of(call, token);
        place.put_slot(slot.page, slot.slot);
        outside = slot.outside && blockIdx.y == 0 && blockIdx.z == 0;
    }
    const bool token_rotates = groups > 0 && angle_share.form(call, positions, position);
    __syncthreads();
    uint2 slot = make_uint2(kNone, 0);
    GroupStores stores;
    const auto find_stores = [&]() {
        const bool rotates = visit.chunk.rotates && token_rotates;
        stores = GroupStores(call, visit.group, token, slot, visit.source, visit.chunk.to.first,
                           visit.group.goes_out(call, rotates), Element::kBytes, Element::kBytes);
    };
    if (groups > 0) {
        slot = place.slot();
        find_stores();
    }
    if (early) {
        ptx::wait_for_earlier_work();
        load();
    }
    if (outside) ptx::store_flag(call.slots.report, 1);
    if (g >= groups) return;

#pragma unroll 1
    for (;;) {
        const HeadGroup& group = visit.group;
        const Chunk<Pairing, kPairs>& chunk = visit.chunk;
        if (chunk.rotates && token_rotates) {
            const ChunkAngles<kPairs> angles = angle_share.shared.of_lane();
#pragma unroll
            for (uint32_t u = 0; u < kHeads; ++u) {
                if (u > 0 && u >= group.heads) break;
                fragment[u].template rotate<Pairing>(angles);
            }
        }
        const auto store = [&](uint64_t first, int64_t gap, int64_t head) {
#pragma unroll
            for (uint32_t u = 0; u < kHeads; ++u) {
                if (u > 0 && u >= group.heads) break;
                Access::store(first, fragment[u].first);
                if (chunk.has_second) Access::store(first + gap, fragment[u].second);
                first += head;
            }
        };
        if (chunk.has_first && stores.is_found()) {
            store(stores.first, static_cast<int64_t>((chunk.to.second - chunk.to.first) * Element::kBytes),
                  stores.step);
        }
        if (chunk.has_first && stores.is_found_late()) {
            const GroupCache cache(call, group, slot);
            const int64_t first = cache.bytes(chunk.to.first, Element::kBytes);
            store(cache.address + first, cache.bytes(chunk.to.second, Element::kBytes) - first,
                  cache.head);
        }
        g += group_step;
        if (g >= groups) return;
        visit = Visit<Element, Pairing>(call, token, g, c);
        load();
        find_stores();
    }
}

} // namespace phasor

// The entry points of one element type: append_<dtype>_<pairing>.
#define PHASOR_APPEND_KERNEL(name, element, pairing)                            \
    extern "C" __global__ void __launch_bounds__(256, phasor::kMinBlocks<phasor::element>) \
        name(const __grid_constant__ PhasorCall call) {                         \
        phasor::append<phasor::element, phasor::pairing>(call);                 \
    }

#define PHASOR_APPEND_KERNELS(dtype, element)                                   \
    PHASOR_APPEND_KERNEL(append_##dtype##_half_split, element, HalfSplit)       \
    PHASOR_APPEND_KERNEL(append_##dtype##_interleaved, element, Interleaved)    \
    PHASOR_APPEND_KERNEL(append_##dtype##_any, element, AnyPairing)
