// The kernels that perform the stages of streams around their rotation, and all that append kernels do, in one
// launch: from q, k and v as a projection leaves them to rotated queries and a written cache.
//
// Stages are data. They are the same for all heads of a stream, and so are the branches on them, as all
// threads of a warp serve one stream at a time. Values are f32 from their load to their store.
#pragma once

#include "stages.cuh"
#include "streams.cuh"

namespace phasor {

// A code, as an element of a cache or of q's destination.
struct Code {
    static constexpr uint32_t kBytes = 1;
};

__device__ __forceinline__ const PhasorStages& stages_of(const PhasorFusion& fusion,
                                                         uint32_t stream) {
    // The three lie side by side.
    return (&fusion.q)[stream];
}

// What a token's streams are multiplied by, and whether it rotates, in shared memory.
struct SharedScales {
    static constexpr uint32_t kBytes = 16; // of a token

    uint32_t address; // of this thread's token

    __device__ __forceinline__ void put(const PhasorFusion& fusion, uint64_t position) const {
#pragma unroll 1
        for (uint32_t stream = 0; stream < 3; ++stream) {
            ptx::store_shared(address + 4 * stream,
                              scale_at(stages_of(fusion, stream).scale, position));
        }
    }
    __device__ __forceinline__ float of(uint32_t stream) const {
        float scale;
        ptx::load_shared(address + 4 * stream, scale);
        return scale;
    }

    __device__ __forceinline__ void put_rotates(bool rotates) const {
        ptx::store_shared(address + 12, rotates ? 1.0f : 0.0f);
    }
    __device__ __forceinline__ bool rotates() const { return of(3) != 0.0f; }
};

// The token of a thread.
struct ServedToken {
    Token token;
    bool exists;  // else it is padding, or past the last one
    SharedPlace place;
    bool outside = false; // this thread has to report its slot

    // What is shared of a token lies together, so that it is found by one address.
    static constexpr uint32_t kBytes = SharedPlace::kBytes + SharedScales::kBytes;

    __device__ __forceinline__ SharedScales scales() const {
        return {place.address + SharedPlace::kBytes};
    }

    // Where it ends in shared memory, of what begins at `places`.
    static __device__ __forceinline__ uint32_t end(uint32_t places) {
        return places + blockDim.z * kBytes;
    }
};

// Finds out what the threads of a block need to know of their tokens. `share` makes the share in the angles of
// so many pairs; `load` is called to read heads of a token that exists, and `weights` to read what stages need
// beside them, unless both have to wait for earlier work until this is done.
template <class Share, class Load, class Weights>
__device__ __forceinline__ ServedToken find_token(const PhasorCall& call, const PhasorFusion& fusion,
                                                  bool early, const ThreadToken& own,
                                                  uint32_t places, const Share& share,
                                                  const Load& load, const Weights& weights) {
    ServedToken served{Token(call, own.b, own.t), own.exists,
                       SharedPlace{places + threadIdx.z * ServedToken::kBytes}};
    const SharedPlace& place = served.place;
    Token& token = served.token;
    const bool ragged = is_ragged(call);
    TokenPositions positions(call.positions, token.id_batch, token.t, token.step);
    uint64_t position = 0;
    if (!ragged) position = positions.on_axis(call.positions, 0);
    if (!early) load(own.exists);
    if (!early || fusion.weights_before_wait) weights();

    const bool finds = own.exists && SharedPlace::is_found_here();
    if (ragged) {
        served.exists = place.find_sequence_of(call, own.exists, token, positions, position);
    }
    auto angle_share = share(served.exists && fusion.turns ? call.angles.pairs : 0);
    if (finds) {
        const Slot slot = Slot::of(call, token);
        place.put_slot(slot.page, slot.slot);
        served.outside = slot.outside && blockIdx.y == 0;
        served.scales().put(fusion, position);
    }
    const bool rotates = angle_share.form(call, positions, position);
    if (finds) served.scales().put_rotates(rotates);
    __syncthreads();
    return served;
}

// Does what had to wait for earlier work, if it was to be waited for after a token was found.
template <class Load, class Weights>
__device__ __forceinline__ void start(const PhasorCall& call, const PhasorFusion& fusion, bool early,
                                      const ServedToken& served, const Load& load,
                                      const Weights& weights) {
    if (early) {
        ptx::wait_for_earlier_work();
        load(served.exists);
        if (fusion.weights_before_wait == 0) weights();
    }
    if (served.outside) ptx::store_flag(call.slots.report, 1);
}

// Values in shared memory.
struct SharedRow {
    uint32_t address;

    __device__ __forceinline__ float operator[](uint32_t i) const {
        float x;
        ptx::load_shared(address + 4 * i, x);
        return x;
    }
    __device__ __forceinline__ void put(uint32_t i, float x) const {
        ptx::store_shared(address + 4 * i, x);
    }
};

// Terms of a sum, with zeros up to a power of two, folded in halves by the lanes of a warp, the first of which
// has the sum then. `scratch` is of this warp, and has room for so many.
template <class Term>
__device__ __forceinline__ float folded(uint32_t count, SharedRow scratch, const Term& term) {
    const uint32_t lane = threadIdx.x;
    uint32_t left = count <= 1 ? 1 : 2u << (31 - __clz(count - 1));
    // Terms that are 32 apart are of one lane: few, and a power of two, of which compilers do not know either.
#pragma unroll 1
    for (uint32_t i = lane; i < left; i += 32) scratch.put(i, i < count ? term(i) : 0.0f);
#pragma unroll 1
    while (left > 32) {
        left /= 2;
#pragma unroll 1
        for (uint32_t i = lane; i < left; i += 32) {
            scratch.put(i, __fadd_rn(scratch[i], scratch[i + left]));
        }
    }
    float sum = lane < left ? scratch[lane] : 0.0f;
    while (left > 1) {
        left /= 2;
        sum = __fadd_rn(sum, __shfl_xor_sync(kAllLanes, sum, left));
    }
    return sum;
}

// What a norm found: the mean, and what is left without it is multiplied by.
struct Statistic {
    float mean, r;
};

// Where one head is written.
template <class Element>
struct HeadStores {
    bool goes_out, codes_go_out, is_stored;
    uint64_t destination;
    GroupCache cache;

    __device__ __forceinline__ HeadStores(const PhasorCall& call, const HeadGroup& head,
                                          const Token& token, uint2 slot, bool has_codes)
        : goes_out(!head.output(call).nowhere), codes_go_out(has_codes && head.is_q()),
          is_stored(GroupCache::takes(call, head, slot)),
          destination(
              head.at(call, head.output(call).destination, token, 0)),
          cache(call, head, slot) {}

    __device__ __forceinline__ bool is_anywhere() const { return goes_out || is_stored; }

    __device__ __forceinline__ void put_out(uint32_t dim, uint32_t bits) const {
        if (goes_out) Element::store_one(destination + dim * Element::kBytes, bits);
    }
    __device__ __forceinline__ void put(uint32_t dim, uint32_t bits) const {
        put_out(dim, bits);
        if (is_stored) {
            Element::store_one(cache.address + cache.bytes(dim, Element::kBytes), bits);
        }
    }
    __device__ __forceinline__ void put_code(uint32_t dim, uint32_t code) const {
        if (codes_go_out) {
            ptx::store_1(destination + dim, code);
        } else if (is_stored) {
            ptx::store_1(cache.address + cache.bytes(dim, Code::kBytes), code);
        }
    }
};

// The heads of one stream of a token that a block serves with all stages, one head to a warp. Of a head, a
// lane takes every 32nd dim, and sums every 32nd group.
template <class Element>
struct StagedStream {
    const PhasorCall& call;
    const PhasorStages& stages;
    const ServedToken& served;
    uint32_t stream;
    bool rotates;
    uint32_t heads, dims, rotary_offset;
    uint32_t first_dim, end_dim; // of those that are read and written
    SharedRow turned; // of this warp
    uint32_t rows;    // where heads begin in shared memory

    // Shared memory from `begin` on: for each warp a head that has been rotated; heads as they are; sums of
    // heads.
    __device__ __forceinline__ StagedStream(const PhasorCall& call, const PhasorStages& stages,
                                            const ServedToken& served, uint32_t stream,
                                            uint32_t begin)
        : call(call), stages(stages), served(served), stream(stream),
          rotates(served.scales().rotates() && stages.rotates != 0) {
        const HeadGroup of = group(0);
        heads = of.read(call).heads;
        dims = of.output(call).head_dim;
        rotary_offset = of.read(call).rotary_offset;
        first_dim = 0;
        end_dim = dims;
        if (stages.from_cache) {
            first_dim = rotary_offset;
            end_dim = rotary_offset + 2 * call.angles.pairs;
            if (stages.codes.dynamic) {
                const uint32_t group = stages.codes.group_dims;
                first_dim = first_dim / group * group;
                end_dim = (end_dim + group - 1) / group * group;
            }
        }
        turned.address = begin + threadIdx.y * dims * 4;
        rows = begin + blockDim.y * dims * 4;
    }

    __device__ __forceinline__ void serve() const {
        if (stages.norm.kind != PHASOR_NORM_NONE && stages.norm.across_heads) {
            serve_across();
            return;
        }
#pragma unroll 1
        for (uint32_t first = blockIdx.y * blockDim.y; first < heads;
             first += gridDim.y * blockDim.y) {
            const uint32_t head = first + threadIdx.y;
            const SharedRow row = row_at(threadIdx.y);
            const bool is_there = head < heads;
            // What rotates in a cache has no norm.
            if (is_there && stages.from_cache) {
                load_cached(head, row);
            } else if (is_there) {
                load(head, row);
            }
            __syncthreads();
            finish(head, is_there, row, false, Statistic{});
            __syncthreads();
        }
    }

  private:
    __device__ __forceinline__ HeadGroup group(uint32_t head) const {
        return HeadGroup(stream, head, 1);
    }
    __device__ __forceinline__ SharedRow row_at(uint32_t n) const {
        return {rows + n * dims * 4};
    }

    // One statistic of all heads, which stay in shared memory until it is known.
    __device__ __forceinline__ void serve_across() const {
        const PhasorNorm& norm = stages.norm;
#pragma unroll 1
        for (uint32_t first = 0; first < heads; first += blockDim.y) {
            const uint32_t head = first + threadIdx.y;
            const SharedRow row = row_at(head);
            if (head < heads) load(head, row);
            __syncthreads();
            if (norm.after_rotation && rotates) {
                if (head < heads) rotate(row);
                __syncthreads();
                if (head < heads) {
                    for (uint32_t d = threadIdx.x; d < dims; d += 32) row.put(d, turned[d]);
                }
                __syncthreads();
            }
        }
        const float count = __uint2float_rn(heads * dims);
        float mean = 0.0f;
        if (norm.kind == PHASOR_NORM_LAYER) mean = __fdiv_rn(sum_across(true, 0.0f), count);
        const float squares = __fdiv_rn(sum_across(false, mean), count);
        const Statistic found{mean, inverse_deviation(norm, squares)};
#pragma unroll 1
        for (uint32_t first = 0; first < heads; first += blockDim.y) {
            const uint32_t head = first + threadIdx.y;
            finish(head, head < heads, row_at(head), true, found);
            __syncthreads();
        }
    }

    // The sum of all heads.
    __device__ __forceinline__ float sum_across(bool plain, float mean) const {
        const SharedRow sums = row_at(heads);
        for (uint32_t head = threadIdx.y; head < heads; head += blockDim.y) {
            const float sum = sum_of(row_at(head), turned, plain, mean);
            if (threadIdx.x == 0) sums.put(head, sum);
        }
        __syncthreads();
        if (threadIdx.y == 0) {
            // Each term is read by its lane alone.
            const float sum = folded(heads, sums, [&](uint32_t head) { return sums[head]; });
            if (threadIdx.x == 0) sums.put(0, sum);
        }
        __syncthreads();
        const float sum = sums[0];
        __syncthreads();
        return sum;
    }

    // Reads a head and adds its bias.
    __device__ __forceinline__ void load(uint32_t head, SharedRow row) const {
        const HeadGroup of = group(head);
        const uint64_t source =
            of.at(call, of.read(call).source, served.token, 0);
        const uint64_t bias = stages.bias + head * stages.bias_head;
#pragma unroll 4
        for (uint32_t d = threadIdx.x; d < dims; d += 32) {
            float x = value_at(source, d);
            if (stages.bias != 0) x = __fadd_rn(x, value_at(bias, d));
            row.put(d, x);
        }
    }

    // Reads a head from the token's slot, which it has: only what is in a cache rotates there.
    __device__ __forceinline__ void load_cached(uint32_t head, SharedRow row) const {
        const uint2 slot = served.place.slot();
        const GroupCache cache(call, group(head), slot);
        const PhasorCodes& codes = stages.codes;
        for (uint32_t d = first_dim + threadIdx.x; d < end_dim; d += 32) {
            if (codes.type == PHASOR_CODES_NONE) {
                // Heads that lie in one piece rotate as any others do.
                const uint64_t at = cache.address + cache.bytes_in_blocks(d, Element::kBytes);
                row.put(d, Element::widen(Element::load_one(at)));
                continue;
            }
            const float scale =
                codes.dynamic ? stored_scale(codes, slot, head, d / codes.group_dims)
                              : given_scale(codes, head);
            const uint64_t at = cache.address + cache.bytes(d, Code::kBytes);
            row.put(d, decoded(codes, scale, ptx::load_1(at)));
        }
    }

    static __device__ __forceinline__ float value_at(uint64_t address, uint32_t dim) {
        return Element::widen(Element::load_one(address + dim * Element::kBytes));
    }

    // The sum of a head, by way of its groups of 4 dims; the first lane has it.
    __device__ __forceinline__ float sum_of(SharedRow row, SharedRow scratch, bool plain,
                                            float mean) const {
        const auto pair = [&](uint32_t d) {
            if (d >= dims) return 0.0f;
            const float a = row[d], b = row[d + 1];
            return plain ? plain_pair(a, b) : square_pair(__fsub_rn(a, mean), __fsub_rn(b, mean));
        };
        return folded((dims + 3) / 4, scratch, [&](uint32_t group) {
            return __fadd_rn(pair(4 * group), pair(4 * group + 2));
        });
    }

    // What a norm finds of one head.
    __device__ __forceinline__ Statistic statistic_of(SharedRow row, SharedRow scratch) const {
        const float count = __uint2float_rn(dims);
        float mean = 0.0f;
        const auto sum = [&](bool plain) {
            return __shfl_sync(kAllLanes, sum_of(row, scratch, plain, mean), 0);
        };
        if (stages.norm.kind == PHASOR_NORM_LAYER) mean = __fdiv_rn(sum(true), count);
        const float squares = __fdiv_rn(sum(false), count);
        return {mean, inverse_deviation(stages.norm, squares)};
    }

    // Norms a head, a lane its own dims.
    __device__ __forceinline__ void norm(uint32_t head, const Statistic& found, SharedRow row) const {
        const PhasorNorm& norm = stages.norm;
        const uint64_t weight = norm.weight + head * norm.weight_head;
        const uint64_t bias = norm.bias + head * norm.bias_head;
        for (uint32_t d = threadIdx.x; d < dims; d += 32) {
            float x[1] = {__fsub_rn(row[d], found.mean)};
            apply_norm<Element>(
                stages.flags, found.r, x,
                [&]() { x[0] = __fmul_rn(x[0], with_offset(norm, value_at(weight, d))); },
                [&]() { x[0] = __fadd_rn(x[0], value_at(bias, d)); });
            row.put(d, x[0]);
        }
    }

    // Rotates a head to the warp's other room, by lanes of pairs; the other dims are copied.
    __device__ __forceinline__ void rotate(SharedRow row) const {
        const PhasorPairing& pairing = call.pairing;
        const uint32_t pairs = call.angles.pairs;
        const uint32_t angles = ptx::shared_memory();
        for (uint32_t i = threadIdx.x; i < pairs; i += 32) {
            float2 turn;
            ptx::load_shared(angles + i * 8, turn);
            const uint32_t from = rotary_offset + i * pairing.source_step;
            const uint32_t to = rotary_offset + i * pairing.destination_step;
            const float a = row[from], b = row[from + pairing.source_gap];
            turned.put(to, __fmaf_rn(a, turn.x, -__fmul_rn(b, turn.y)));
            turned.put(to + pairing.destination_gap, __fmaf_rn(a, turn.y, __fmul_rn(b, turn.x)));
        }
        for (uint32_t i = threadIdx.x; i < dims - 2 * pairs; i += 32) {
            const uint32_t d = i < rotary_offset ? i : i + 2 * pairs;
            if (d >= first_dim && d < end_dim) turned.put(d, row[d]);
        }
    }

    // All stages from the norm on, of a head in a row. All threads of the block come here. `is_across`:
    // what the norm found is known, and if it stands after the rotation, that is done.
    __device__ __forceinline__ void finish(uint32_t head, bool is_there, SharedRow row,
                                           bool is_across, Statistic found) const {
        const bool norms = stages.norm.kind != PHASOR_NORM_NONE;
        const bool after = stages.norm.after_rotation != 0;
        SharedRow other = turned;
        if (norms && !after) {
            if (is_there && !is_across) found = statistic_of(row, other);
            // Others have read what is changed now.
            __syncthreads();
            if (is_there) norm(head, found, row);
            __syncthreads();
        }
        if (rotates && !(norms && after && is_across)) {
            if (is_there) rotate(row);
            __syncthreads();
            other = row;
            row = turned;
        }
        if (norms && after) {
            if (is_there && !is_across) found = statistic_of(row, other);
            __syncthreads();
            if (is_there) norm(head, found, row);
        }
        const PhasorCodes& codes = stages.codes;
        const bool has_codes = codes.type != PHASOR_CODES_NONE;
        const HeadStores<Element> stores(call, group(head), served.token, served.place.slot(), has_codes);
        const float scale = served.scales().of(stream);
        if (is_there) {
            for (uint32_t d = first_dim + threadIdx.x; d < end_dim; d += 32) {
                // A product has the canonical NaN, also by 1.
                float x = __fmul_rn(row[d], scale);
                if (!has_codes) {
                    stores.put(d, Element::narrow(x));
                    continue;
                }
                if (!stores.codes_go_out) stores.put_out(d, Element::narrow(x));
                row.put(d, codes.round_first ? rounded<Element>(x) : x);
            }
        }
        if (!has_codes) return;
        // A group is of all lanes.
        __syncthreads();
        if (is_there) encode_groups(head, row, stores);
    }

    __device__ __forceinline__ void encode_groups(uint32_t head, SharedRow row,
                                                  const HeadStores<Element>& stores) const {
        const PhasorCodes& codes = stages.codes;
        uint32_t index = first_dim / codes.group_dims;
        uint32_t first = first_dim;
#pragma unroll 1
        for (; first < end_dim; ++index) {
            // Dims that share a scale: but for a given one, of which there may be fewer, a group.
            const uint32_t end = min((index + 1) * codes.group_dims, end_dim);
            float scale;
            if (codes.dynamic) {
                uint32_t amax = 0;
                for (uint32_t d = first + threadIdx.x; d < end; d += 32) {
                    amax = max(amax, finite_magnitude(row[d]));
                }
#pragma unroll
                for (uint32_t by = 16; by > 0; by /= 2) {
                    amax = max(amax, __shfl_xor_sync(kAllLanes, amax, by));
                }
                scale = scale_of(codes, amax);
                if (threadIdx.x == 0 && stores.is_stored) {
                    put_scale(codes, served.place.slot(), head, index, scale);
                }
            } else {
                scale = given_scale(codes, head);
            }
            for (uint32_t d = first + threadIdx.x; d < end; d += 32) {
                const float x[1] = {row[d]};
                uint32_t code[1];
                encode(codes, scale, x, code);
                stores.put_code(d, code[0]);
            }
            first = end;
        }
    }
};

// The heads of one stream of a token that has no stages: they are rotated, or carried as they are.
template <class Element>
__device__ __forceinline__ void serve_plain(const PhasorCall& call, const ServedToken& served,
                                            uint32_t stream) {
    const HeadGroup of(stream, 0, 1);
    const uint32_t heads = of.read(call).heads;
    const uint32_t dims = of.output(call).head_dim;
    const uint32_t offset = of.read(call).rotary_offset;
    const PhasorPairing& pairing = call.pairing;
    const bool rotates = served.scales().rotates() && stream != 2;
    const uint32_t pairs = rotates ? call.angles.pairs : 0;
#pragma unroll 1
    for (uint32_t h = blockIdx.y * blockDim.y + threadIdx.y; h < heads;
         h += gridDim.y * blockDim.y) {
        const HeadGroup head(stream, h, 1);
        const uint64_t source =
            head.at(call, head.read(call).source, served.token, 0);
        HeadStores<Element> stores(call, head, served.token, served.place.slot(), false);
        const auto load = [&](uint32_t dim) {
            return Element::load_one(source + dim * Element::kBytes);
        };
        if (stores.is_anywhere()) {
            for (uint32_t i = threadIdx.x; i < pairs; i += 32) {
                float2 turn;
                ptx::load_shared(ptx::shared_memory() + i * 8, turn);
                const uint32_t from = offset + i * pairing.source_step;
                const uint32_t to = offset + i * pairing.destination_step;
                const float a = Element::widen(load(from));
                const float b = Element::widen(load(from + pairing.source_gap));
                stores.put(to, Element::narrow(__fmaf_rn(a, turn.x, -__fmul_rn(b, turn.y))));
                stores.put(to + pairing.destination_gap,
                           Element::narrow(__fmaf_rn(a, turn.y, __fmul_rn(b, turn.x))));
            }
        }
        // What stays as it is needs not be written where it is.
        stores.goes_out = stores.goes_out && !head.output(call).in_place;
        if (stores.is_anywhere()) {
            for (uint32_t i = threadIdx.x; i < dims - 2 * pairs; i += 32) {
                const uint32_t d = i < offset ? i : i + 2 * pairs;
                stores.put(d, load(d));
            }
        }
    }
}

// Brings near what the stages of this warp's heads need beside them: there may be more of it than there are
// registers.
template <class Element>
__device__ __forceinline__ void prefetch_weights(const PhasorCall& call, const PhasorFusion& fusion) {
    constexpr uint32_t kLine = 128;
#pragma unroll 1
    for (uint32_t stream = 0; stream < 3; ++stream) {
        const PhasorStages& stages = stages_of(fusion, stream);
        if (stages.present == 0) continue;
        const HeadGroup of(stream, 0, 1);
        const uint32_t heads = of.read(call).heads;
        const uint32_t row = Element::kBytes * of.output(call).head_dim;
        const uint32_t first = blockIdx.y * blockDim.y + threadIdx.y;
#pragma unroll 1
        for (uint32_t head = first; head < heads; head += gridDim.y * blockDim.y) {
            const auto bring = [&](uint64_t address, int64_t stride, uint32_t bytes) {
                if (address == 0 || (stride == 0 && head != first)) return;
                // Up to its last byte, as its first may be anywhere in a line. What is more than a warp
                // asks for at once is no head of a model.
                const uint32_t i = threadIdx.x * kLine;
                if (i < bytes + kLine - 1) ptx::prefetch(address + head * stride + min(i, bytes - 1));
            };
            bring(stages.bias, stages.bias_head, row);
            bring(stages.norm.weight, stages.norm.weight_head, row);
            bring(stages.norm.bias, stages.norm.bias_head, row);
            if (has_given_scale(stages.codes)) bring(stages.codes.scales, stages.codes.head, 4);
        }
    }
}

// Any heads, one element at a time. A block is (32 lanes, heads, 1), of one token, and the grid (tokens,
// heads). A head lies in shared memory from its load to its store.
template <class Element>
__device__ __forceinline__ void fused_any(const PhasorCall& call, const PhasorFusion& fusion) {
    const uint32_t places = ptx::shared_memory() + (call.angles.pairs * 8 + 15) / 16 * 16;
    const auto share = [&](uint32_t pairs) { return AngleShare<AnyPairing, 1>(call, pairs); };
    prefetch_weights<Element>(call, fusion);
    const bool early = begin(call);
    const auto nothing = [](bool) {};
    const ServedToken served =
        find_token(call, fusion, early, ThreadToken(call), places, share, nothing, []() {});
    start(call, fusion, early, served, nothing, []() {});
    if (!served.exists) return;
#pragma unroll 1
    for (uint32_t stream = 0; stream < 3; ++stream) {
        const PhasorStages& stages = stages_of(fusion, stream);
        if (stages.present == 0) {
            serve_plain<Element>(call, served, stream);
        } else {
            StagedStream<Element>(call, stages, served, stream, ServedToken::end(places)).serve();
        }
    }
}

// What a lane has of a head: two vectors of 4 dims, which lie half a head apart, and so two groups of a sum,
// the first two to be folded.
template <class Element, class Pairing>
struct HeadPart {
    using Access = Vectors<Element>;
    static constexpr uint32_t kValues = 8;

    struct Raw {
        typename Access::Storage first, second;
    };

    float x[kValues];

    static __device__ __forceinline__ uint32_t first_dim() { return 4 * threadIdx.x; }
    static __device__ __forceinline__ uint32_t second_dim() {
        return 4 * (blockDim.x + threadIdx.x);
    }

    explicit __device__ __forceinline__ HeadPart(const Raw& raw) {
        Access::unpack(raw.first, x);
        Access::unpack(raw.second, x + 4);
    }

    __device__ __forceinline__ Raw packed() const {
        Raw raw;
        Access::pack(x, raw.first);
        Access::pack(x + 4, raw.second);
        return raw;
    }

    // Weights, with what is added to each.
    __device__ __forceinline__ void offset(const PhasorNorm& norm) {
        if (norm.weight_offset == 0.0f) return;
#pragma unroll
        for (float& value : x) value = __fadd_rn(norm.weight_offset, value);
    }

    // What all tokens share: a weight or a bias.
    static __device__ __forceinline__ Raw shared_at(uint64_t address) {
        Raw raw;
        ptx::load_shared_by_tokens(address + first_dim() * Element::kBytes, raw.first);
        ptx::load_shared_by_tokens(address + second_dim() * Element::kBytes, raw.second);
        return raw;
    }

    __device__ __forceinline__ void add(const Raw& raw) {
        const HeadPart other(raw);
#pragma unroll
        for (uint32_t i = 0; i < kValues; ++i) x[i] = __fadd_rn(x[i], other.x[i]);
    }

    // The mean over the head of what is summed of two dims that follow each other.
    template <class Pair>
    __device__ __forceinline__ float mean_of(const PhasorNorm& norm, const Pair& pair) const {
        float sum = __fadd_rn(__fadd_rn(pair(x[0], x[1]), pair(x[2], x[3])),
                              __fadd_rn(pair(x[4], x[5]), pair(x[6], x[7])));
        // There are 8, 16 or 32 lanes.
        if (blockDim.x > 16) sum = __fadd_rn(sum, __shfl_xor_sync(kAllLanes, sum, 16));
        if (blockDim.x > 8) sum = __fadd_rn(sum, __shfl_xor_sync(kAllLanes, sum, 8));
#pragma unroll
        for (uint32_t by = 4; by > 0; by /= 2) {
            sum = __fadd_rn(sum, __shfl_xor_sync(kAllLanes, sum, by));
        }
        return __fmul_rn(sum, norm.inverse_dims);
    }

    // Weights and biases have been read.
    __device__ __forceinline__ void norm(uint32_t flags, const PhasorNorm& norm, const Raw& weight,
                                         const Raw& bias) {
        if (flags & PHASOR_STAGE_NORM_MEAN) {
            const float mean = mean_of(norm, plain_pair);
#pragma unroll
            for (float& value : x) value = __fsub_rn(value, mean);
        }
        const float r = inverse_deviation(norm, mean_of(norm, square_pair));
        apply_norm<Element>(
            flags, r, x,
            [&]() {
                HeadPart by(weight);
                by.offset(norm);
#pragma unroll
                for (uint32_t i = 0; i < kValues; ++i) x[i] = __fmul_rn(x[i], by.x[i]);
            },
            [&]() { add(bias); });
    }

    __device__ __forceinline__ void rotate() {
        const ChunkAngles<4> angles = SharedAngles<4>().of_lane();
#pragma unroll
        for (uint32_t j = 0; j < 4; ++j) {
            float& a = x[Pairing::a(j)];
            float& b = x[Pairing::b(j)];
            const float cos = angles.pair[j].x;
            const float sin = angles.pair[j].y;
            const float a_rotated = __fmaf_rn(a, cos, -__fmul_rn(b, sin));
            b = __fmaf_rn(a, sin, __fmul_rn(b, cos));
            a = a_rotated;
        }
    }

    __device__ __forceinline__ void multiply(float scale) {
        // A product has the canonical NaN, also by 1; 16-bit types have it when they are rounded to.
        if (Element::kBytes != 4 && scale == 1.0f) return;
#pragma unroll
        for (float& value : x) value = __fmul_rn(value, scale);
    }

    // The codes of both vectors. The scale of a head is `given`, or written for its slot, if it has one.
    __device__ __forceinline__ uint2 encoded(uint32_t flags, const PhasorCodes& codes, float given,
                                             uint32_t head, bool is_stored,
                                             const SharedPlace& place) {
        if (flags & PHASOR_STAGE_ROUND_BEFORE_CODES) {
#pragma unroll
            for (float& value : x) value = rounded<Element>(value);
        }
        float scale = given;
        if (flags & PHASOR_STAGE_DYNAMIC_SCALE) {
            uint32_t amax = 0;
#pragma unroll
            for (const float value : x) amax = max(amax, finite_magnitude(value));
#pragma unroll
            for (uint32_t by = 16; by > 0; by /= 2) {
                if (by < blockDim.x) amax = max(amax, __shfl_xor_sync(kAllLanes, amax, by));
            }
            scale = phasor::scale_of(codes, amax);
            if (is_stored && threadIdx.x == 0) put_scale(codes, place.slot(), head, 0, scale);
        }
        uint32_t words[2];
        encode(codes, scale, x, words);
        return make_uint2(words[0], words[1]);
    }
};

// What the stages of a head need beside it: a lane's part. Read before its values are there, so that nothing
// waits for it between a load and a store.
template <class Part>
struct HeadWeights {
    typename Part::Raw bias, norm_weight, norm_bias;
    float scale = 0.0f; // as where there is none it is handed on

    __device__ __forceinline__ void read(uint32_t flags, const PhasorStages& stages, uint32_t head) {
        const PhasorNorm& norm = stages.norm;
        if (flags & PHASOR_STAGE_BIAS) {
            bias = Part::shared_at(stages.bias + head * stages.bias_head);
        }
        if (flags & PHASOR_STAGE_NORM_WEIGHT) {
            norm_weight = Part::shared_at(norm.weight + head * norm.weight_head);
        }
        if (flags & PHASOR_STAGE_NORM_BIAS) {
            norm_bias = Part::shared_at(norm.bias + head * norm.bias_head);
        }
        if (has_given_scale(stages.codes)) scale = given_scale(stages.codes, head);
    }
};

// Where a lane's vectors of a head are written. Elements or codes lie `second` bytes apart.
struct HeadVectors {
    uint64_t first;
    int64_t second;

    // In a cache, of what has `size` bytes.
    template <class Part>
    static __device__ __forceinline__ HeadVectors of(const GroupCache& cache, uint32_t size) {
        const int64_t first = cache.bytes(Part::first_dim(), size);
        return {cache.address + first, cache.bytes(Part::second_dim(), size) - first};
    }

    template <class Part>
    __device__ __forceinline__ void put(const typename Part::Raw& raw) const {
        Part::Access::store(first, raw.first);
        Part::Access::store(first + second, raw.second);
    }
    __device__ __forceinline__ void put(uint2 codes) const {
        ptx::store_4(first, codes.x);
        ptx::store_4(first + second, codes.y);
    }
};

// Of these flags, each that says that heads are not carried as they are.
constexpr uint32_t kChanges = PHASOR_STAGE_PRESENT | PHASOR_STAGE_ROTATES;

// As kMinBlocks, of what takes more registers: one too many for three blocks on 7.5.
#if __CUDA_ARCH__ == 750
template <class Element>
constexpr uint32_t kFusedBlocks = 2;
#else
template <class Element>
constexpr uint32_t kFusedBlocks = Element::kBytes == 4 ? 2 : 3;
#endif

// Heads of 64, 128 or 256 dims that rotate as a whole, by vectors. A block is (8 to 32 lanes, rows, tokens), of
// whole warps, and the grid (tokens, heads). Loads of all heads of a group are in flight together; then they
// are served one at a time, with what a thread keeps small.
template <class Element, class Pairing>
__device__ __forceinline__ void fused_vectors(const PhasorCall& call, const PhasorFusion& fusion) {
    using Part = HeadPart<Element, Pairing>;
    using Raw = typename Part::Raw;
    // Heads of a group, at most: 64 bytes of a thread are in flight.
    constexpr uint32_t kHeads = 8 / Element::kBytes;
    const bool early = begin(call);
    const ThreadToken own(call);
    const Token token(call, own.b, own.t);
    const uint32_t half = 4 * blockDim.x;
    uint32_t g = blockIdx.y * blockDim.y + threadIdx.y;

    // What the thread visits, which is found before its loads have to wait.
    HeadGroup heads(call, g);
    const auto source_of = [&]() {
        return heads.at(call, heads.read(call).source, token, Part::first_dim() * Element::kBytes);
    };
    uint64_t source = source_of();
    Raw raw[kHeads] = {};
    const auto load = [&](bool exists) {
        if (g >= call.groups_end || !exists) return;
        uint64_t from = source;
        const int64_t head = heads.read(call).source.head;
#pragma unroll
        for (uint32_t u = 0; u < kHeads; ++u, from += head) {
            if (u >= heads.heads) break;
            Part::Access::load(from, raw[u].first);
            Part::Access::load(from + half * Element::kBytes, raw[u].second);
        }
    };
    HeadWeights<Part> weights;
    // Lanes without a head read what their neighbours do.
    const auto read_weights = [&]() {
        if (g >= call.groups_end) return;
        const PhasorStages& stages = stages_of(fusion, heads.stream);
        weights.read(stages.flags, stages, heads.heads > 0 ? heads.first : 0);
    };
    const auto share = [&](uint32_t pairs) { return AngleShare<Pairing, 4>(call, 0, pairs); };
    const ServedToken served = find_token(call, fusion, early, own, SharedAngles<4>::end(), share,
                                          load, read_weights);
    uint32_t kept = 0, flags = 0;
    GroupStores stores;
    const auto goes_out = [&]() { return heads.goes_out(call, flags & kChanges); };
    const auto find_stores = [&]() {
        flags = stages_of(fusion, heads.stream).flags & kept;
        const uint32_t out_bytes = flags & PHASOR_STAGE_CODES_OUT ? Code::kBytes : Element::kBytes;
        const uint32_t stored_bytes = flags & PHASOR_STAGE_CODES ? Code::kBytes : Element::kBytes;
        stores = GroupStores(call, heads, token, served.place.slot(), source, Part::first_dim(),
                             goes_out(), out_bytes, stored_bytes);
    };
    if (served.exists) {
        kept = served.scales().rotates() ? ~0u : ~PHASOR_STAGE_ROTATES;
        find_stores();
    }
    start(call, fusion, early, served, load, read_weights);
    // A warp is of one token, and visits one stream at a time.
    if (!served.exists || g >= call.groups_end) return;
#pragma unroll 1
    for (;;) {
        const bool codes_first =
            (flags & PHASOR_STAGE_CODES_OUT) || ((flags & PHASOR_STAGE_CODES) && !goes_out());
        // The first row of a warp has the most heads. Lanes without one take part in sums all the same.
        const uint32_t rounds = __shfl_sync(kAllLanes, heads.heads, 0);
#pragma unroll 1
        for (uint32_t u = 0; u < rounds; ++u) {
            const bool is_there = u < heads.heads;
            // What few heads need is not to be kept in registers over all of them.
            const uint32_t stream = ptx::found_anew(heads.stream);
            const PhasorStages& stages = stages_of(fusion, stream);
            Raw& done = raw[0];
            uint2 codes = make_uint2(0, 0);
            if (flags & kChanges) {
                Part part(done);
                if (flags & PHASOR_STAGE_BIAS) part.add(weights.bias);
                const uint32_t turns = flags & (PHASOR_STAGE_ROTATES | PHASOR_STAGE_NORM_LATE);
                if (turns == (PHASOR_STAGE_ROTATES | PHASOR_STAGE_NORM_LATE)) part.rotate();
                if (flags & PHASOR_STAGE_NORM) {
                    part.norm(flags, stages.norm, weights.norm_weight, weights.norm_bias);
                }
                if (turns == PHASOR_STAGE_ROTATES) part.rotate();
                const float given = weights.scale;
                if ((flags & PHASOR_STAGE_OF_HEADS) && u + 1 < rounds) {
                    weights.read(flags, stages, u + 1 < heads.heads ? heads.first + u + 1 : 0);
                }
                if (flags & PHASOR_STAGE_PRESENT) part.multiply(served.scales().of(stream));
                if (!(flags & PHASOR_STAGE_CODES_OUT)) done = part.packed();
                if (flags & PHASOR_STAGE_CODES) {
                    codes = part.encoded(flags, stages.codes, given, heads.first + u,
                                         is_there && stores.is_cached(), served.place);
                }
            }
            const auto put = [&](const HeadVectors& to, bool codes_go) {
                if (codes_go) {
                    to.put(codes);
                } else {
                    to.template put<Part>(done);
                }
            };
            if (is_there && stores.is_found()) {
                const uint32_t size = codes_first ? Code::kBytes : Element::kBytes;
                put({stores.first, half * size}, codes_first);
            }
            stores.first += stores.step;
            if (is_there && stores.is_found_late()) {
                const GroupCache cache(call, HeadGroup(heads.stream, heads.first + u, 1),
                                       served.place.slot());
                const bool codes_go = flags & PHASOR_STAGE_CODES;
                const uint32_t size = codes_go ? Code::kBytes : Element::kBytes;
                put(HeadVectors::of<Part>(cache, size), codes_go);
            }
#pragma unroll
            for (uint32_t i = 1; i < kHeads; ++i) raw[i - 1] = raw[i];
        }
        g += gridDim.y * blockDim.y;
        if (g >= call.groups_end) return;
        heads = HeadGroup(call, g);
        source = source_of();
        load(true);
        read_weights();
        find_stores();
    }
}

} // namespace phasor

#define PHASOR_FUSED_KERNEL(name, element, pairing)                                      \
    extern "C" __global__ void __launch_bounds__(256, phasor::kFusedBlocks<phasor::element>) \
        name(const __grid_constant__ PhasorCall call,                                    \
             const __grid_constant__ PhasorFusion fusion) {                              \
        phasor::fused_vectors<phasor::element, phasor::pairing>(call, fusion);           \
    }
#define PHASOR_FUSED_ANY(name, element)                                                  \
    extern "C" __global__ void __launch_bounds__(256, 4)                                  \
        name(const __grid_constant__ PhasorCall call,                                    \
             const __grid_constant__ PhasorFusion fusion) {                              \
        phasor::fused_any<phasor::element>(call, fusion);                                \
    }

// The entry points of one element type: fused_<dtype>_<pairing>.
#define PHASOR_FUSED_KERNELS(dtype, element)                                             \
    PHASOR_FUSED_KERNEL(fused_##dtype##_half_split, element, HalfSplit)                  \
    PHASOR_FUSED_KERNEL(fused_##dtype##_interleaved, element, Interleaved)               \
    PHASOR_FUSED_ANY(fused_##dtype##_any, element)
