// What a token of a call is, and which slot of the caches it is stored in. Every line here is one of
// src/call/read.rs; a change must be made in both. Whatever the ids are, nothing is read outside the
// tables of the call, and no slot is outside of the caches.
#pragma once

#include "angle.cuh"

namespace phasor {

// Page and sequence of what has none: there are fewer of both.
constexpr uint32_t kNone = 0xffffffffu;

// A token of a call.
struct Token {
    uint32_t b, t;
    uint32_t sequence; // kNone: padding
    uint32_t place;    // how many of this call's tokens come before it in its sequence
    uint32_t step;     // what positions count by
    uint32_t id_batch; // what ids of positions and rows are found by, beside t

    // Where sequences have no offsets.
    __device__ __forceinline__ Token(const PhasorCall& call, uint32_t b, uint32_t t)
        : b(b), t(t), sequence(call.sequences.each_token ? t : b),
          place(call.sequences.each_token ? 0 : t), step(t), id_batch(b) {}

    // In a ragged batch, where find_sequence has found this.
    __device__ __forceinline__ void set_sequence(uint2 found) {
        sequence = id_batch = found.x;
        place = step = found.y;
    }
};

// The sequence that token t of a ragged batch belongs to, and its place there.
__device__ __forceinline__ uint2 find_sequence(const PhasorSequences& sequences, uint32_t t) {
    const auto offset = [&](uint32_t sequence) {
        return static_cast<int64_t>(token_id(sequences.offsets, sequence, 0, 0));
    };
    // The first sequence that ends behind the token.
    uint32_t low = 0, high = sequences.count;
#pragma unroll 1
    while (low < high) {
        const uint32_t middle = (low + high) / 2;
        if (offset(middle + 1) <= static_cast<int64_t>(t)) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    if (low == sequences.count) return make_uint2(kNone, 0);
    const uint64_t first = static_cast<uint64_t>(offset(low));
    // As an unsigned number a negative offset is past the token too.
    if (first > t) return make_uint2(kNone, 0);
    return make_uint2(low, t - static_cast<uint32_t>(first));
}

__device__ __forceinline__ bool is_ragged(const PhasorCall& call) {
    return call.sequences.offsets.type != PHASOR_IDS_NONE;
}

// The slot of a token.
struct Slot {
    uint32_t page; // kNone: not stored
    uint32_t slot;
    bool outside; // not stored, as it is not in the caches

    static __device__ __forceinline__ Slot none() { return {kNone, 0, false}; }
    static __device__ __forceinline__ Slot out() { return {kNone, 0, true}; }

    static __device__ __forceinline__ Slot of(const PhasorCall& call, const Token& token) {
        const PhasorSlots& slots = call.slots;
        const uint32_t choice = slots.choice;
        if (choice == PHASOR_SLOT_NONE || token.sequence == kNone) return none();
        // By slot, or by token of the sequence.
        uint64_t n;
        if (choice == PHASOR_SLOT_IDS) {
            n = token_id(slots.ids, token.b, token.t, 0);
            if (static_cast<int64_t>(n) < 0) return none();
        } else {
            n = token.place;
            if (slots.lengths.type != PHASOR_IDS_NONE) {
                n += token_id(slots.lengths, token.sequence, 0, 0);
            }
            if (static_cast<int64_t>(n) < 0) return out();
        }
        const uint64_t column = n / slots.page_size;
        // What is left: one division is enough, and a call of a function.
        const uint32_t slot =
            static_cast<uint32_t>(n) - static_cast<uint32_t>(column) * slots.page_size;
        uint64_t page = column;
        if (choice == PHASOR_SLOT_PAGE_TABLE) {
            if (column >= slots.table_pages) return out();
            page = token_id(slots.ids, token.sequence, static_cast<uint32_t>(column), 0);
        } else if (choice == PHASOR_SLOT_PAGE_INDICES) {
            const auto offset = [&](uint32_t sequence) {
                return static_cast<int64_t>(token_id(slots.offsets, sequence, 0, 0));
            };
            const int64_t first = offset(token.sequence);
            const int64_t end = min(offset(token.sequence + 1), static_cast<int64_t>(slots.table_pages));
            const int64_t index = static_cast<int64_t>(static_cast<uint64_t>(first) + column);
            if (first < 0 || index < first || index >= end) return out();
            page = token_id(slots.ids, 0, static_cast<uint32_t>(index), 0);
        } else if (choice == PHASOR_SLOT_SEQUENCE) {
            if (column != 0) return out();
            page = token.sequence;
        }
        // As an unsigned number a negative page is past the last one too.
        if (page >= slots.pages) return out();
        return {static_cast<uint32_t>(page), slot, false};
    }
};

// What one thread of a token finds out for all of its threads, in shared memory.
struct SharedPlace {
    static constexpr uint32_t kBytes = 16; // of a token

    uint32_t address; // of this thread's token

    // The last thread, as it is the first to be without an angle to form.
    static __device__ __forceinline__ bool is_found_here() {
        return threadIdx.x + 1 == blockDim.x && threadIdx.y + 1 == blockDim.y;
    }

    __device__ __forceinline__ void put_sequence(uint2 found) const {
        ptx::store_shared(address, found);
    }
    __device__ __forceinline__ uint2 sequence() const {
        uint2 found;
        ptx::load_shared(address, found);
        return found;
    }
    // Finds the sequence of a token of a ragged batch, if there is such a token, and its position on the first
    // axis; tells whether it has any. All threads of the block come here.
    __device__ __forceinline__ bool find_sequence_of(const PhasorCall& call, bool exists, Token& token,
                                                     TokenPositions& positions,
                                                     uint64_t& position) const {
        if (exists && is_found_here()) put_sequence(find_sequence(call.sequences, token.t));
        __syncthreads();
        if (!exists) return false;
        token.set_sequence(sequence());
        if (token.sequence == kNone) return false;
        positions = TokenPositions(call.positions, token.id_batch, token.t, token.step);
        position = positions.on_axis(call.positions, 0);
        return true;
    }
    __device__ __forceinline__ void put_slot(uint32_t page, uint32_t slot) const {
        ptx::store_shared(address + 8, make_uint2(page, slot));
    }
    // Page and slot.
    __device__ __forceinline__ uint2 slot() const {
        uint2 slot;
        ptx::load_shared(address + 8, slot);
        return slot;
    }
};

} // namespace phasor
