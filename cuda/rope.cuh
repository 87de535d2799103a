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

#include "heads.cuh"

namespace phasor {

// The place in the heads of one token that a thread accesses. Heads are numbered through: head h of k
// follows those of q.
struct TokenHeads {
    uint64_t q, k; // in head 0

    // `at` elements into the rotated window.
    template <class Element>
    static __device__ __forceinline__ TokenHeads of(const PhasorCall& call, const PhasorView& q,
                                                    const PhasorView& k, uint32_t at, uint32_t b,
                                                    uint32_t t) {
        TokenHeads heads{q.address + t * q.token + (call.q.rotary_offset + at) * Element::kBytes,
                         k.address + t * k.token + (call.k.rotary_offset + at) * Element::kBytes};
        if (call.batch > 1) {
            heads.q += b * q.batch;
            heads.k += b * k.batch;
        }
        return heads;
    }

    __device__ __forceinline__ uint64_t address(const PhasorView& q_view, const PhasorView& k_view,
                                                uint32_t h, uint32_t q_heads) const {
        const bool is_q = h < q_heads;
        return (is_q ? q : k) + (is_q ? h : h - q_heads) * (is_q ? q_view.head : k_view.head);
    }
};

// Copies the dims of the heads of a token that do not rotate, for a destination that is not the source.
template <class Access, class Element>
__device__ __forceinline__ void copy_unrotated(const PhasorStream& stream,
                                               const PhasorOutput& output, uint32_t b, uint32_t t,
                                               uint32_t rotary_dim) {
    if (output.in_place) return;
    constexpr uint32_t kBytes = Access::kPairs * Element::kBytes;
    const uint64_t source = stream.source.address + b * stream.source.batch + t * stream.source.token;
    const uint64_t destination =
        output.destination.address + b * output.destination.batch + t * output.destination.token;
    const uint32_t prefix = stream.rotary_offset / Access::kPairs;
    const uint32_t rotated = rotary_dim / Access::kPairs;
    const uint32_t units = output.head_dim / Access::kPairs - rotated;
#pragma unroll 1
    for (uint32_t h = blockIdx.y * blockDim.y + threadIdx.y; h < stream.heads;
         h += gridDim.y * blockDim.y) {
        const uint64_t from = source + h * stream.source.head;
        const uint64_t to = destination + h * output.destination.head;
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

    const bool early = begin(call);
    const ThreadToken own(call);
    const bool has_token = own.exists;
    const uint32_t b = own.b, t = own.t;
    // First of all, as it is the longest way: from a position over the angles to the first store.
    const TokenPositions positions(call.positions, b, t, t);
    const uint64_t position = positions.on_axis(call.positions, 0);
    const uint32_t first_chunk = blockIdx.z * blockDim.x;
    const uint32_t c = first_chunk + threadIdx.x;
    const uint32_t q_heads = call.q.heads;
    const uint32_t pairs = has_token ? call.angles.pairs : 0;
    const uint32_t heads = c * kPairs < pairs ? q_heads + call.k.heads : 0;
    const uint32_t head_step = gridDim.y * blockDim.y;

    const Places from = Pairing::source(call, c);
    const uint32_t source_gap = (from.second - from.first) * Element::kBytes;
    Fragment<Access> fragment[kHeads];
    const auto load = [&](const TokenHeads& sources, uint32_t h) {
#pragma unroll
        for (uint32_t u = 0; u < kHeads; ++u, h += head_step) {
            if (h >= heads) break;
            const uint64_t source = sources.address(call.q.source, call.k.source, h, q_heads);
            Access::load(source, fragment[u].first);
            Access::load(source + source_gap, fragment[u].second);
            fragment[u].source = source;
        }
    };

    // The threads of a token form its angles: each that of every blockDim.x * blockDim.y-th pair of the
    // block. Nothing waits for a value before all loads are on their way.
    const SharedAngles<kPairs> shared;
    const uint32_t first_pair = first_chunk * kPairs;
    const uint32_t end_pair = min(first_pair + blockDim.x * kPairs, pairs);
    uint32_t i = first_pair + threadIdx.y * blockDim.x + threadIdx.x;
    const bool one_row = OneRow::is_all(call);
    uint64_t step = 0;
    if (one_row && i < end_pair) step = OneRow::step(call, Pairing::pair(call, i));
    const auto sources =
        TokenHeads::of<Element>(call, call.q.source, call.k.source, from.first, b, t);
    uint32_t h = blockIdx.y * blockDim.y + threadIdx.y;
    if (!early) load(sources, h);
    if (one_row && i < end_pair) {
        shared.put(i - first_pair, OneRow::form(call, step, position));
        i += blockDim.x * blockDim.y;
    }
    bool rotates = true;
    if (!one_row || i < end_pair) {
        const TokenRow row(call, positions, position);
        rotates = row.rotates;
        // Then there is nothing to store.
        if (!rotates) h = heads;
#pragma unroll 1
        for (; i < end_pair; i += blockDim.x * blockDim.y) {
            shared.put(i - first_pair, row.form(call, Pairing::pair(call, i)));
        }
    }
    if (early) {
        ptx::wait_for_earlier_work();
        load(sources, h);
    }
    if (!call.in_place && has_token && blockIdx.z == 0) {
        const uint32_t rotary_dim = rotates ? 2 * call.angles.pairs : 0;
        copy_unrotated<Access, Element>(call.q, call.q_output, b, t, rotary_dim);
        copy_unrotated<Access, Element>(call.k, call.k_output, b, t, rotary_dim);
    }
    __syncthreads();
    if (h >= heads) return;

    const ChunkAngles<kPairs> angles = shared.of_lane();
    TokenHeads destinations;
    uint32_t destination_gap = source_gap;
    if (!call.in_place) {
        const Places to = Pairing::destination(call, c);
        destinations = TokenHeads::of<Element>(call, call.q_output.destination,
                                               call.k_output.destination, to.first, b, t);
        destination_gap = (to.second - to.first) * Element::kBytes;
    }
#pragma unroll 1
    for (;;) {
#pragma unroll
        for (uint32_t u = 0; u < kHeads; ++u, h += head_step) {
            if (h >= heads) return;
            fragment[u].template rotate<Pairing>(angles);
            const uint64_t destination =
                call.in_place ? fragment[u].source
                              : destinations.address(call.q_output.destination,
                                                     call.k_output.destination, h, q_heads);
            Access::store(destination, fragment[u].first);
            Access::store(destination + destination_gap, fragment[u].second);
        }
        if (h >= heads) return;
        load(sources, h);
    }
}

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
