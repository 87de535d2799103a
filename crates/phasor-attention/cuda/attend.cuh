// Attention of new tokens over pages, in two kernels: one block for each split of a token's keys and each
// group of query heads, then one for each token and query head that joins the splits in order. The order of
// every sum is that of src/attend.rs, and so are the bits.
//
// Scores: a thread has a key and every other head of the group, and goes through the dims in order. Values:
// a thread has two dims and every other head, and goes through the keys in order. Keys and values come to
// both through shared memory, as they lie in the cache; those of 8-bit codes as the f32 that they stand for.
#pragma once

#include "attention_call.h"
#include "functions.cuh"
#include "stages.cuh"
#include "token.cuh"

namespace phasor {

constexpr uint32_t kTile = PHASOR_ATTEND_TILE;
constexpr uint32_t kSplit = PHASOR_ATTEND_SPLIT;
constexpr uint32_t kThreads = PHASOR_ATTEND_THREADS;
constexpr uint32_t kChunk = 16; // bytes of an access
// Threads of a block that share a key or two dims, and so have every so-manieth head.
constexpr uint32_t kShare = kThreads / kTile;
constexpr uint32_t kOwnHeads = PHASOR_ATTEND_HEADS / kShare;
static_assert(kSplit == 2 * kThreads, "a thread finds two keys");

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }

__device__ __forceinline__ uint32_t round_up(uint32_t n, uint32_t step) {
    return (n + step - 1) / step * step;
}

// The keys that a token sees.
struct Seen {
    uint32_t sequence;
    uint32_t begin, end; // end 0: no result
    bool outside;        // as its sequence is not in its pages

    static __device__ __forceinline__ Seen of(const PhasorAttend& call, uint32_t t) {
        uint2 found = make_uint2(t, 0);
        uint64_t count = 1;
        if (!call.sequences.each_token) {
            found = find_sequence(call.sequences, t);
            if (found.x == kNone) return {0, 0, 0, false};
            const uint64_t end = token_id(call.sequences.offsets, found.x + 1, 0, 0);
            count = end - t + found.y;
        }
        const Seen out = {found.x, 0, 0, true};
        const uint64_t cached = token_id(call.slots.lengths, found.x, 0, 0);
        // As an unsigned number a negative length is too long as well.
        if (cached > call.most_keys || count > call.most_keys) return out;
        const uint64_t place = cached + found.y;
        const uint64_t end = call.mask == PHASOR_MASK_NONE ? cached + count : place + 1;
        if (end > call.most_keys) return out;
        Seen seen = {found.x, 0, static_cast<uint32_t>(end), false};
        if (call.mask == PHASOR_MASK_WINDOW && seen.end > call.window) seen.begin = seen.end - call.window;
        if (call.mask == PHASOR_MASK_CHUNKED) {
            seen.begin = static_cast<uint32_t>(place) / call.window * call.window;
        }
        return seen.splits() > call.splits ? out : seen;
    }

    __device__ __forceinline__ uint32_t first_split() const { return begin / kSplit; }
    __device__ __forceinline__ uint32_t splits() const {
        return (end + kSplit - 1) / kSplit - first_split();
    }
};

// Where a split's parts lie in shared memory.
struct Shared {
    char* staged;
    float* q;      // [heads, dims], with zeros after the last
    float* p;      // scores, then weights, [heads, kTile]
    float* rescale; // [heads]
    uint2* slots;  // page and slot of each key, [kSplit]
    uint32_t* bad; // of each warp

    static __device__ __forceinline__ Shared of(uint32_t heads, uint32_t dims) {
        extern __shared__ __align__(16) char phasor_attend_shared[];
        Shared shared;
        shared.staged = phasor_attend_shared;
        shared.q = reinterpret_cast<float*>(shared.staged + PHASOR_ATTEND_STAGED);
        shared.p = shared.q + heads * dims;
        shared.slots = reinterpret_cast<uint2*>(shared.p + heads * kTile);
        shared.rescale = reinterpret_cast<float*>(shared.slots + kSplit);
        shared.bad = reinterpret_cast<uint32_t*>(shared.rescale + PHASOR_ATTEND_HEADS);
        return shared;
    }
};

// A part of a tile on its way to shared memory: some of its keys, and some of their dims.
struct Piece {
    uint32_t first, keys;          // of the split
    uint32_t first_dim, chunks;    // chunks of a row
    uint32_t row;                  // bytes from row to row in shared memory
    uint32_t seen_begin, seen_end; // keys of the split that are read; rows of others are zeros
};

template <uint32_t kBytes>
__device__ __forceinline__ uint64_t dim_offset(const PhasorCache& cache, uint32_t d) {
    if (cache.block == 0) return d * kBytes; // one block
    const uint32_t block = d / cache.block_dims;
    return static_cast<uint64_t>(block) * static_cast<uint64_t>(cache.block) +
           (d - block * cache.block_dims) * kBytes;
}

template <class Element, bool kInChunks>
__device__ __forceinline__ void stage_by(const PhasorCache& cache, uint32_t head_dim, uint64_t head,
                                         const Shared& shared, const Piece& piece) {
    constexpr uint32_t kElements = kChunk / Element::kBytes;
    constexpr uint32_t kInFlight = kInChunks ? 4 : 1;
    const uint32_t items = piece.keys * piece.chunks;
    const uint32_t step_keys = kThreads / piece.chunks;
    const uint32_t step_chunks = kThreads - step_keys * piece.chunks;
    uint32_t key = threadIdx.x / piece.chunks;
    uint32_t chunk = threadIdx.x - key * piece.chunks;
#pragma unroll 1
    for (uint32_t item = threadIdx.x; item < items; item += kInFlight * kThreads) {
        ptx::Words<4> words[kInFlight];
        uint32_t to[kInFlight];
#pragma unroll
        for (uint32_t u = 0; u < kInFlight; ++u) {
            words[u] = {{0, 0, 0, 0}};
            to[u] = key * piece.row + chunk * kChunk;
            const uint32_t of_split = piece.first + key;
            if (item + u * kThreads < items && of_split >= piece.seen_begin && of_split < piece.seen_end) {
                const uint2 slot = shared.slots[of_split];
                const uint64_t at = head + slot.x * static_cast<uint64_t>(cache.page) +
                                    slot.y * static_cast<uint64_t>(cache.slot);
                const uint32_t d = piece.first_dim + chunk * kElements;
                if (kInChunks) {
                    ptx::load_once(at + dim_offset<Element::kBytes>(cache, d), words[u]);
                } else {
#pragma unroll
                    for (uint32_t e = 0; e < kElements; ++e) {
                        if (d + e >= head_dim) break;
                        const uint32_t bits =
                            Element::load_one(at + dim_offset<Element::kBytes>(cache, d + e));
                        words[u].w[e / Element::kPerWord] |= bits << (e % Element::kPerWord * 16);
                    }
                }
            }
            key += step_keys;
            chunk += step_chunks;
            if (chunk >= piece.chunks) {
                chunk -= piece.chunks;
                ++key;
            }
        }
#pragma unroll
        for (uint32_t u = 0; u < kInFlight; ++u) {
            if (item + u * kThreads >= items) break;
            *reinterpret_cast<uint4*>(shared.staged + to[u]) =
                make_uint4(words[u].w[0], words[u].w[1], words[u].w[2], words[u].w[3]);
        }
    }
}

// Caches of elements, which are staged as they are.
template <class Element>
struct OfElements {
    using Staged = Element;

    static __device__ __forceinline__ float query(const PhasorAttend&, uint64_t head, uint32_t d) {
        return Element::widen(Element::load_one(head + d * Element::kBytes));
    }
    static __device__ __forceinline__ void stage(const PhasorCache& cache, const PhasorCodes&,
                                                 bool in_chunks, uint32_t head_dim, uint32_t,
                                                 uint64_t head, const Shared& shared,
                                                 const Piece& piece) {
        if (in_chunks) {
            stage_by<Element, true>(cache, head_dim, head, shared, piece);
        } else {
            stage_by<Element, false>(cache, head_dim, head, shared, piece);
        }
    }
};

// The values of four codes from dim `d` on, and zeros past the last dim.
__device__ __forceinline__ uint4 values_of_codes(const PhasorCodes& codes, uint2 slot, uint32_t kv_head,
                                                 uint32_t head_dim, uint32_t d, uint32_t word) {
    uint32_t group = d / codes.group_dims;
    uint32_t end = (group + 1) * codes.group_dims;
    const auto scale_of_group = [&] {
        return codes.dynamic ? stored_scale(codes, slot, kv_head, group) : given_scale(codes, kv_head);
    };
    float scale = scale_of_group();
    uint32_t x[4];
#pragma unroll
    for (uint32_t e = 0; e < 4; ++e) {
        x[e] = 0;
        if (d + e >= head_dim) continue;
        if (d + e == end) {
            ++group;
            end += codes.group_dims;
            scale = scale_of_group();
        }
        x[e] = __float_as_uint(decoded(codes, scale, word >> (8 * e) & 0xffu));
    }
    return make_uint4(x[0], x[1], x[2], x[3]);
}

// A thread has 16 codes at a time.
template <bool kInChunks>
__device__ __forceinline__ void stage_codes(const PhasorCache& cache, const PhasorCodes& codes,
                                            uint32_t head_dim, uint32_t kv_head, uint64_t head,
                                            const Shared& shared, const Piece& piece) {
    constexpr uint32_t kWords = kChunk / 4;
    const uint32_t chunks = (piece.chunks + kWords - 1) / kWords;
    const uint32_t items = piece.keys * chunks;
#pragma unroll 1
    for (uint32_t item = threadIdx.x; item < items; item += kThreads) {
        const uint32_t key = item / chunks, chunk = item - key * chunks;
        const uint32_t of_split = piece.first + key;
        const bool is_seen = of_split >= piece.seen_begin && of_split < piece.seen_end;
        const uint2 slot = shared.slots[of_split];
        const uint32_t first = piece.first_dim + chunk * kChunk;
        ptx::Words<4> words = {{0, 0, 0, 0}};
        if (is_seen) {
            const uint64_t at = head + slot.x * static_cast<uint64_t>(cache.page) +
                                slot.y * static_cast<uint64_t>(cache.slot);
            if (kInChunks) {
                ptx::load_once(at + dim_offset<1>(cache, first), words);
            } else {
#pragma unroll
                for (uint32_t e = 0; e < kChunk; ++e) {
                    if (first + e >= head_dim) break;
                    words.w[e / 4] |= ptx::load_1(at + dim_offset<1>(cache, first + e)) << (e % 4 * 8);
                }
            }
        }
#pragma unroll 1
        for (uint32_t w = 0; w < kWords; ++w) {
            const uint32_t of_row = chunk * kWords + w;
            if (of_row >= piece.chunks) break;
            const uint32_t low = w & 1 ? words.w[1] : words.w[0];
            const uint32_t high = w & 1 ? words.w[3] : words.w[2];
            uint4 values = make_uint4(0, 0, 0, 0);
            if (is_seen) {
                values = values_of_codes(codes, slot, kv_head, head_dim, first + 4 * w, w < 2 ? low : high);
            }
            *reinterpret_cast<uint4*>(shared.staged + key * piece.row + of_row * kChunk) = values;
        }
    }
}

// Caches of 8-bit codes, for queries of any element type.
struct OfCodes {
    using Staged = F32;

    static __device__ __forceinline__ float query(const PhasorAttend& call, uint64_t head, uint32_t d) {
        if (call.q_type == PHASOR_ATTEND_F32) return F32::widen(F32::load_one(head + d * F32::kBytes));
        const uint32_t bits = ptx::load_2(head + d * F16::kBytes);
        return call.q_type == PHASOR_ATTEND_F16 ? F16::widen(bits) : Bf16::widen(bits);
    }
    static __device__ __forceinline__ void stage(const PhasorCache& cache, const PhasorCodes& codes,
                                                 bool in_chunks, uint32_t head_dim, uint32_t kv_head,
                                                 uint64_t head, const Shared& shared,
                                                 const Piece& piece) {
        if (in_chunks) {
            stage_codes<true>(cache, codes, head_dim, kv_head, head, shared, piece);
        } else {
            stage_codes<false>(cache, codes, head_dim, kv_head, head, shared, piece);
        }
    }
};

// Two dims of a row of values.
template <class Element>
__device__ __forceinline__ float2 two_dims(const char* row, uint32_t pair) {
    if (Element::kPerWord == 2) {
        float x[2];
        Element::unpack(reinterpret_cast<const uint32_t*>(row)[pair], x);
        return make_float2(x[0], x[1]);
    }
    return reinterpret_cast<const float2*>(row)[pair];
}

// `kIsLatent`: values may have other dims than keys, and both may have more.
template <class Source, bool kIsLatent>
__device__ __forceinline__ void attend_split(const PhasorAttend& call) {
    using Element = typename Source::Staged;
    constexpr uint32_t kElements = kChunk / Element::kBytes;
    constexpr uint32_t kRowChunks = PHASOR_ATTEND_ROW / kChunk;
    // Pairs of dims that a thread has.
    constexpr uint32_t kOwnPairs =
        (kIsLatent ? PHASOR_ATTEND_LATENT_DIMS : PHASOR_ATTEND_DIMS) / 2 / kTile;

    const uint32_t t = blockIdx.x / call.splits;
    const uint32_t nth = blockIdx.x - t * call.splits;
    const Seen seen = Seen::of(call, t);
    if (seen.outside && nth == 0 && threadIdx.x == 0 && call.slots.report != 0) {
        ptx::store_flag(call.slots.report, 1);
    }
    if (seen.end == 0 || nth >= seen.splits()) return;

    // The heads of this block.
    const uint32_t blocks = (call.group + PHASOR_ATTEND_HEADS - 1) / PHASOR_ATTEND_HEADS;
    const uint32_t kv_head = blockIdx.y / blocks;
    const uint32_t of_group = (blockIdx.y - kv_head * blocks) * PHASOR_ATTEND_HEADS;
    const uint32_t heads = min(call.group - of_group, static_cast<uint32_t>(PHASOR_ATTEND_HEADS));
    const uint32_t first_head = kv_head * call.group + of_group;
    const uint32_t head_dim = call.head_dim;
    const uint32_t dims = round_up(head_dim, kElements);
    const uint32_t v_head_dim = kIsLatent ? call.v_head_dim : head_dim;
    const uint32_t v_dims = kIsLatent ? round_up(v_head_dim, kElements) : dims;
    const Shared shared = Shared::of(heads, dims);

    // Its keys, of the split from here on.
    const uint32_t split = (seen.first_split() + nth) * kSplit;
    const uint32_t begin = max(seen.begin, split) - split;
    const uint32_t end = min(seen.end - split, kSplit);
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    bool bad = false;
#pragma unroll
    for (uint32_t u = 0; u < 2; ++u) {
        const uint32_t key = threadIdx.x + u * kThreads;
        uint2 slot = make_uint2(0, 0);
        if (key >= begin && key < end) {
            const uint32_t index = (split + key) / call.slots.page_size;
            const uint64_t page = token_id(call.slots.ids, seen.sequence, index, 0);
            // As an unsigned number a negative page is past the last one too.
            bad |= page >= call.slots.pages;
            slot = make_uint2(static_cast<uint32_t>(page), split + key - index * call.slots.page_size);
        }
        shared.slots[key] = slot;
    }
    bad = __any_sync(0xffffffffu, bad) != 0;
    if (lane == 0) shared.bad[warp] = bad;
    // Queries, widened.
    for (uint32_t at = threadIdx.x; at < heads * dims; at += kThreads) {
        const uint32_t head = at / dims, d = at - head * dims;
        float x = 0.0f;
        if (d < head_dim) {
            x = Source::query(call, call.q + t * static_cast<uint64_t>(call.q_token) +
                                        (first_head + head) * static_cast<uint64_t>(call.q_head), d);
        }
        shared.q[at] = x;
    }
    __syncthreads();

    const uint64_t row = (static_cast<uint64_t>(t) * call.heads + first_head) * call.splits + nth;
    const auto put_state = [&](uint32_t head, float m, float l) {
        float2* const states = reinterpret_cast<float2*>(call.states);
        states[row + static_cast<uint64_t>(head) * call.splits] = make_float2(m, l);
    };
    bad = false;
#pragma unroll
    for (uint32_t w = 0; w < kThreads / 32; ++w) bad |= shared.bad[w] != 0;
    if (bad) {
        if (threadIdx.x < heads) put_state(threadIdx.x, __uint_as_float(0x7fffffffu), 0.0f);
        if (threadIdx.x == 0 && call.slots.report != 0) ptx::store_flag(call.slots.report, 1);
        return;
    }

    const uint64_t k_head = call.k.address + kv_head * static_cast<uint64_t>(call.k.head);
    const uint64_t v_head = call.v.address + kv_head * static_cast<uint64_t>(call.v.head);
    const uint32_t own = threadIdx.x % kTile, share = threadIdx.x / kTile;
    // Of the heads of a warp.
    float m[kShare], l[kShare];
#pragma unroll
    for (uint32_t u = 0; u < kShare; ++u) m[u] = minus_infinity(), l[u] = 0.0f;
    float2 o[kOwnPairs][kOwnHeads];
#pragma unroll
    for (uint32_t pair = 0; pair < kOwnPairs; ++pair) {
#pragma unroll
        for (uint32_t h = 0; h < kOwnHeads; ++h) o[pair][h] = make_float2(0.0f, 0.0f);
    }
    // Rows of values that are staged at once.
    const uint32_t v_row = v_dims * Element::kBytes;
    uint32_t v_keys = kTile;
    while (v_keys * v_row > PHASOR_ATTEND_STAGED) v_keys /= 2;

#pragma unroll 1
    for (uint32_t tile = begin / kTile * kTile; tile < end; tile += kTile) {
        float dot[kOwnHeads];
#pragma unroll
        for (uint32_t h = 0; h < kOwnHeads; ++h) dot[h] = 0.0f;
#pragma unroll 1
        for (uint32_t first = 0; first < dims; first += kRowChunks * kElements) {
            Piece piece;
            piece.first = tile;
            piece.keys = kTile;
            piece.first_dim = first;
            piece.chunks = min((dims - first) / kElements, kRowChunks);
            // An odd number of chunks: threads of a key each then meet no bank twice.
            piece.row = (piece.chunks | 1u) * kChunk;
            piece.seen_begin = begin;
            piece.seen_end = end;
            Source::stage(call.k, call.k_codes, call.k_in_chunks != 0, head_dim, kv_head, k_head,
                          shared, piece);
            __syncthreads();
            const char* const keys = shared.staged + own * piece.row;
            const float* const q = shared.q + share * dims + first;
#pragma unroll 1
            for (uint32_t c = 0; c < piece.chunks; ++c) {
                const uint4 words = reinterpret_cast<const uint4*>(keys)[c];
                float k[kElements];
                Element::unpack(words.x, k);
                Element::unpack(words.y, k + Element::kPerWord);
                Element::unpack(words.z, k + 2 * Element::kPerWord);
                Element::unpack(words.w, k + 3 * Element::kPerWord);
#pragma unroll
                for (uint32_t h = 0; h < kOwnHeads; ++h) {
                    if (h * kShare + share >= heads) break;
                    const float4* const of_head =
                        reinterpret_cast<const float4*>(q + h * kShare * dims + c * kElements);
#pragma unroll
                    for (uint32_t e = 0; e < kElements; e += 4) {
                        const float4 x = of_head[e / 4];
                        dot[h] = __fmaf_rn(x.x, k[e], dot[h]);
                        dot[h] = __fmaf_rn(x.y, k[e + 1], dot[h]);
                        dot[h] = __fmaf_rn(x.z, k[e + 2], dot[h]);
                        dot[h] = __fmaf_rn(x.w, k[e + 3], dot[h]);
                    }
                }
            }
            __syncthreads();
        }
#pragma unroll
        for (uint32_t h = 0; h < kOwnHeads; ++h) {
            if (h * kShare + share >= heads) break;
            float score = __fmul_rn(dot[h], call.factor);
            if (call.cap != 0.0f) score = __fmul_rn(tanh_of(score), call.cap);
            const bool is_seen = tile + own >= begin && tile + own < end;
            shared.p[(h * kShare + share) * kTile + own] = is_seen ? score : minus_infinity();
        }
        __syncthreads();

        // A warp has every fourth head, a lane the keys that the sum folds first.
#pragma unroll
        for (uint32_t u = 0; u < kShare; ++u) {
            const uint32_t head = warp + u * (kThreads / 32);
            if (head >= heads) break;
            float* const p = shared.p + head * kTile;
            const float low = p[lane], high = p[lane + 32];
            float most = fmaxf(low, high);
#pragma unroll
            for (uint32_t step = 16; step > 0; step /= 2) {
                most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
            }
            // A NaN among scores is left out: there is always another number here.
            most = fmaxf(m[u], most);
            const float a = exp2_of(__fsub_rn(m[u], most));
            const auto weight = [&](uint32_t key, float score) {
                const bool is_seen = tile + key >= begin && tile + key < end;
                return is_seen ? exp2_of(__fsub_rn(score, most)) : 0.0f;
            };
            const float p_low = weight(lane, low), p_high = weight(lane + 32, high);
            float sum = __fadd_rn(p_low, p_high);
#pragma unroll
            for (uint32_t step = 16; step > 0; step /= 2) {
                sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, step));
            }
            m[u] = most;
            l[u] = __fmaf_rn(l[u], a, sum);
            p[lane] = p_low;
            p[lane + 32] = p_high;
            if (lane == 0) shared.rescale[head] = a;
        }
        __syncthreads();

#pragma unroll
        for (uint32_t h = 0; h < kOwnHeads; ++h) {
            if (h * kShare + share >= heads) break;
            const float a = shared.rescale[h * kShare + share];
#pragma unroll
            for (uint32_t pair = 0; pair < kOwnPairs; ++pair) {
                o[pair][h].x = __fmul_rn(o[pair][h].x, a);
                o[pair][h].y = __fmul_rn(o[pair][h].y, a);
            }
        }
        const uint32_t tile_end = min(tile + kTile, end);
#pragma unroll 1
        for (uint32_t first = max(begin, tile) / v_keys * v_keys; first < tile_end; first += v_keys) {
            Piece piece;
            piece.first = first;
            piece.keys = v_keys;
            piece.first_dim = 0;
            piece.chunks = v_dims / kElements;
            piece.row = v_row;
            piece.seen_begin = begin;
            piece.seen_end = end;
            Source::stage(call.v, call.v_codes, call.v_in_chunks != 0, v_head_dim, kv_head, v_head,
                          shared, piece);
            __syncthreads();
            const uint32_t from = max(begin, first), to = min(end, first + v_keys);
#pragma unroll 1
            for (uint32_t four = from & ~3u; four < to; four += 4) {
                const bool whole = four >= from && four + 4 <= to;
#pragma unroll
                for (uint32_t pair = 0; pair < kOwnPairs; ++pair) {
                    const uint32_t at = own + pair * kTile;
                    if (2 * at >= v_dims) break;
                    float2 v[4];
#pragma unroll
                    for (uint32_t j = 0; j < 4; ++j) {
                        v[j] = two_dims<Element>(shared.staged + (four - first + j) * v_row, at);
                    }
#pragma unroll
                    for (uint32_t h = 0; h < kOwnHeads; ++h) {
                        if (h * kShare + share >= heads) break;
                        const float4 p = *reinterpret_cast<const float4*>(
                            shared.p + (h * kShare + share) * kTile + (four - tile));
                        const float weights[4] = {p.x, p.y, p.z, p.w};
                        float2& sum = o[pair][h];
#pragma unroll
                        for (uint32_t j = 0; j < 4; ++j) {
                            // What is not seen must not even turn a zero's sign.
                            if (!whole && (four + j < from || four + j >= to)) continue;
                            sum.x = __fmaf_rn(weights[j], v[j].x, sum.x);
                            sum.y = __fmaf_rn(weights[j], v[j].y, sum.y);
                        }
                    }
                }
            }
            __syncthreads();
        }
    }

    float* const partial = reinterpret_cast<float*>(call.partial);
#pragma unroll
    for (uint32_t h = 0; h < kOwnHeads; ++h) {
        const uint32_t head = h * kShare + share;
        if (head >= heads) break;
        float* const to = partial + (row + static_cast<uint64_t>(head) * call.splits) * v_head_dim;
#pragma unroll
        for (uint32_t pair = 0; pair < kOwnPairs; ++pair) {
            const uint32_t d = 2 * (own + pair * kTile);
            if (d < v_head_dim) to[d] = o[pair][h].x;
            if (d + 1 < v_head_dim) to[d + 1] = o[pair][h].y;
        }
    }
#pragma unroll
    for (uint32_t u = 0; u < kShare; ++u) {
        const uint32_t head = warp + u * (kThreads / 32);
        if (head < heads && lane == 0) put_state(head, m[u], l[u]);
    }
}

// Joins the splits of a token and query head.
template <class Element>
__device__ __forceinline__ void join_splits(const PhasorAttend& call) {
    constexpr uint32_t kWarps = kThreads / 32;
    constexpr uint32_t kOwnDims = PHASOR_ATTEND_LATENT_DIMS / kThreads;
    __shared__ float rescale[kThreads], weight[kThreads], sums[kThreads];
    __shared__ float warp_most[kWarps];
    __shared__ uint32_t warp_bad[kWarps];

    const uint32_t t = blockIdx.x, head = blockIdx.y;
    const Seen seen = Seen::of(call, t);
    if (seen.end == 0) return;
    const uint32_t splits = seen.splits();
    const uint64_t row = (static_cast<uint64_t>(t) * call.heads + head) * call.splits;
    const float2* const states = reinterpret_cast<const float2*>(call.states) + row;
    const float* const partial = reinterpret_cast<const float*>(call.partial) + row * call.v_head_dim;

    float most = minus_infinity(), all_l = 0.0f;
    if (call.sinks != 0) {
        most = ptx::load_constant_f(call.sinks + head * sizeof(float));
        all_l = 1.0f;
    }
    float all_o[kOwnDims];
#pragma unroll
    for (uint32_t u = 0; u < kOwnDims; ++u) all_o[u] = 0.0f;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
    for (uint32_t first = 0; first < splits; first += kThreads) {
        const uint32_t count = min(splits - first, kThreads);
        const bool has_split = threadIdx.x < count;
        float2 state = make_float2(minus_infinity(), 0.0f);
        if (has_split) state = states[first + threadIdx.x];
        const bool bad = __any_sync(0xffffffffu, state.x != state.x) != 0;
        // The largest of this split and those before it; each step is what a loop over them would have.
        float upto = state.x;
#pragma unroll
        for (uint32_t step = 1; step < 32; step *= 2) {
            const float before = __shfl_up_sync(0xffffffffu, upto, step);
            if (lane >= step) upto = fmaxf(upto, before);
        }
        float before = __shfl_up_sync(0xffffffffu, upto, 1);
        if (lane == 0) before = minus_infinity();
        if (lane == 31) warp_most[warp] = upto;
        if (lane == 0) warp_bad[warp] = bad;
        __syncthreads();
        bool any_bad = false;
        float all = most;
#pragma unroll
        for (uint32_t w = 0; w < kWarps; ++w) {
            any_bad |= warp_bad[w] != 0;
            if (w < warp) before = fmaxf(before, warp_most[w]);
            all = fmaxf(all, warp_most[w]);
        }
        // A token that would see a page outside of the caches has no result.
        if (any_bad) return;
        // A NaN stays, as a sink that is one is in all results.
        before = most != most ? most : fmaxf(most, before);
        const float next = before != before ? before : fmaxf(before, state.x);
        rescale[threadIdx.x] = exp2_of(__fsub_rn(before, next));
        weight[threadIdx.x] = exp2_of(__fsub_rn(state.x, next));
        sums[threadIdx.x] = state.y;
        most = most != most ? most : all;
        __syncthreads();
        const float* const of_chunk = partial + static_cast<uint64_t>(first) * call.v_head_dim;
#pragma unroll 4
        for (uint32_t split = 0; split < count; ++split) {
            const float a = rescale[split], b = weight[split];
            all_l = __fmaf_rn(sums[split], b, __fmul_rn(all_l, a));
#pragma unroll
            for (uint32_t u = 0; u < kOwnDims; ++u) {
                const uint32_t d = threadIdx.x + u * kThreads;
                if (d >= call.v_head_dim) break;
                const float o = of_chunk[static_cast<uint64_t>(split) * call.v_head_dim + d];
                all_o[u] = __fmaf_rn(o, b, __fmul_rn(all_o[u], a));
            }
        }
        __syncthreads();
    }
    const uint64_t out = call.out + t * static_cast<uint64_t>(call.out_token) +
                         head * static_cast<uint64_t>(call.out_head);
#pragma unroll
    for (uint32_t u = 0; u < kOwnDims; ++u) {
        const uint32_t d = threadIdx.x + u * kThreads;
        if (d >= call.v_head_dim) break;
        Element::store_one(out + d * Element::kBytes, Element::narrow(__fdiv_rn(all_o[u], all_l)));
    }
}

} // namespace phasor

// The entry points of one element type. (So many blocks at least: ptxas otherwise spills a few registers to
// have one more.)
#define PHASOR_ATTEND_KERNEL(name, blocks, ...)                                    \
    extern "C" __global__ void __launch_bounds__(PHASOR_ATTEND_THREADS, blocks)    \
        name(const __grid_constant__ PhasorAttend call) {                          \
        phasor::__VA_ARGS__(call);                                                 \
    }

// Those of splits.
#define PHASOR_ATTEND_SPLITS(name, source)                                         \
    PHASOR_ATTEND_KERNEL(attend_##name, 6, attend_split<source, false>)            \
    PHASOR_ATTEND_KERNEL(attend_latent_##name, 4, attend_split<source, true>)

#define PHASOR_ATTEND_KERNELS(dtype, element)                                      \
    PHASOR_ATTEND_SPLITS(dtype, phasor::OfElements<phasor::element>)               \
    PHASOR_ATTEND_KERNEL(join_##dtype, 6, join_splits<phasor::element>)
