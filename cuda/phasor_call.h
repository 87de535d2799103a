// One call, as data: what the host backend, the kernels and the tests' interpreter all execute.
//
// The lists of fields below are the only ones. They make the structs, the check that no compiler
// pads them, the kernel that reports how a device compiler lays them out (call_layout.cu) and,
// through bindgen, the Rust structs.
//
// Addresses are integers, of host or of device memory; strides are in bytes, so that they are added
// as they are.
#ifndef PHASOR_CALL_H
#define PHASOR_CALL_H

#if defined(__CUDACC_RTC__)
// NVRTC ships no <stdint.h>.
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <stdint.h>
#endif

// PhasorIds::type
#define PHASOR_IDS_NONE 0u
#define PHASOR_IDS_I32 1u
#define PHASOR_IDS_I64 2u
#define PHASOR_IDS_U32 3u

// PhasorAngles::out_of_range
#define PHASOR_OUT_OF_RANGE_CLAMP 0u
#define PHASOR_OUT_OF_RANGE_PASS_THROUGH 1u

// PhasorAngles::row_choice
#define PHASOR_ROW_ONLY 0u
#define PHASOR_ROW_OF_CALL 1u
#define PHASOR_ROW_IDS 2u
#define PHASOR_ROW_BY_POSITION 3u
#define PHASOR_ROW_AT_POSITION 4u

// PhasorSlots::choice
#define PHASOR_SLOT_NONE 0u
#define PHASOR_SLOT_IDS 1u
#define PHASOR_SLOT_PAGE_TABLE 2u
#define PHASOR_SLOT_PAGE_INDICES 3u
#define PHASOR_SLOT_SEQUENCE 4u

// PhasorNorm::kind
#define PHASOR_NORM_NONE 0u
#define PHASOR_NORM_RMS 1u
#define PHASOR_NORM_LAYER 2u

// PhasorStages::flags: what kernels test for each head.
#define PHASOR_STAGE_PRESENT 0x1u
#define PHASOR_STAGE_ROTATES 0x2u
#define PHASOR_STAGE_BIAS 0x4u
#define PHASOR_STAGE_NORM 0x8u
#define PHASOR_STAGE_NORM_MEAN 0x10u /* takes the mean away */
#define PHASOR_STAGE_NORM_LATE 0x20u /* after the rotation */
#define PHASOR_STAGE_NORM_WEIGHT 0x40u
#define PHASOR_STAGE_NORM_BIAS 0x80u
#define PHASOR_STAGE_ROUND_BEFORE_WEIGHT 0x100u
#define PHASOR_STAGE_ROUND_AFTER_NORM 0x200u
#define PHASOR_STAGE_CODES 0x400u
#define PHASOR_STAGE_CODES_OUT 0x800u /* to the destination, not to a cache */
#define PHASOR_STAGE_ROUND_BEFORE_CODES 0x1000u
#define PHASOR_STAGE_DYNAMIC_SCALE 0x2000u
#define PHASOR_STAGE_OF_HEADS 0x4000u /* a bias, a weight or a given scale is a head's own */

// PhasorCodes::type
#define PHASOR_CODES_NONE 0u
#define PHASOR_CODES_E4M3 1u
#define PHASOR_CODES_INT8 2u
#define PHASOR_CODES_INT8_FULL 3u

// PhasorCodes::scale_rounding
#define PHASOR_SCALE_ANY 0u
#define PHASOR_SCALE_POWER_OF_TWO_UP 1u
#define PHASOR_SCALE_POWER_OF_TWO_DOWN 2u

// Where the elements of a stream are: [batch, tokens, heads, head_dim], contiguous in the innermost
// dimension.
#define PHASOR_FIELDS_PhasorView(field) \
    field(uint64_t, address) /* of dim 0 of head 0 of token 0 */ \
    field(int64_t, token) \
    field(int64_t, head) \
    field(int64_t, batch)

// The heads of q, k or v, as they are read. A stream that is absent has no heads.
#define PHASOR_FIELDS_PhasorStream(field) \
    field(uint32_t, heads) \
    field(uint32_t, rotary_offset) /* first rotated dim inside a head */ \
    field(PhasorView, source)

// Where they are written. In place that is the source, and only rotated dims are touched. Nowhere, what
// is read is but stored in a cache.
#define PHASOR_FIELDS_PhasorOutput(field) \
    field(PhasorView, destination) \
    field(uint32_t, in_place) \
    field(uint32_t, head_dim) \
    field(uint32_t, nowhere) \
    field(uint32_t, reserved)

// A cache of keys or of values, [pages, slots of a page, heads, head_dim], whose dims lie in blocks of
// `block_dims` contiguous ones.
#define PHASOR_FIELDS_PhasorCache(field) \
    field(uint64_t, address) /* of dim 0 of head 0 of slot 0 of page 0 */ \
    field(int64_t, page) \
    field(int64_t, slot) \
    field(int64_t, head) \
    field(int64_t, block) \
    field(uint32_t, block_dims) \
    field(uint32_t, present)

// Integers, one per token: that of token (b, t) is at address + b * batch + t * token. Signed 64-bit
// once read.
#define PHASOR_FIELDS_PhasorIds(field) \
    field(uint64_t, address) \
    field(int64_t, token) \
    field(int64_t, batch) \
    field(uint32_t, type) \
    field(uint32_t, reserved)

// The sequences of a ragged batch, which lie one after the other: sequence s has the tokens from offset s
// to offset s + 1. Tokens past the last offset are padding: they belong to no sequence, and nothing of
// them is written. Without offsets, a token's sequence is its b; or its t, where each token is one.
#define PHASOR_FIELDS_PhasorSequences(field) \
    field(PhasorIds, offsets) /* that of sequence s at address + s * batch */ \
    field(uint32_t, count) \
    field(uint32_t, each_token)

// The slot of the caches that a token is stored in. Its id, which numbers the slots of all pages through:
// none if it is negative. Or slot n % page_size of a page, where n is what the cache holds of the
// token's sequence (nothing, where no lengths are given), plus the token's place in it: page n / page_size of the sequence's row of the page
// table; of the indices that are its own, which begin at its offset among all of them; or, where each
// sequence has a page, the one that its number says.
//
// A slot that is not in the caches is not stored, nor one whose page is not in the table, and a word at
// `report` is set to 1.
#define PHASOR_FIELDS_PhasorSlots(field) \
    field(PhasorIds, ids) /* slots by token; pages by sequence (batch) and page (token) */ \
    field(PhasorIds, lengths) /* by sequence (batch) */ \
    field(PhasorIds, offsets) /* by sequence (batch) */ \
    field(uint64_t, report) \
    field(uint32_t, choice) \
    field(uint32_t, pages) \
    field(uint32_t, page_size) \
    field(uint32_t, table_pages) /* of a row of the table, or indices in all */

// Where cos and sin come from: the row that `row_choice` gives a token. Of steps, 64-bit fractions of a
// turn per position of shape [rows, axes, pairs], it is the only one; `PhasorRows::row`; the token's id;
// or 1 from position `boundary` on, else 0. Of a table, it is the one at the token's position. A row past
// the last one is the last one.
#define PHASOR_FIELDS_PhasorAngles(field) \
    field(uint64_t, steps) \
    field(uint32_t, pairs) \
    field(uint32_t, axes) \
    field(uint32_t, row_choice) \
    field(float, factor) /* the attention factor, where there is but one row of steps */ \
    field(uint32_t, inverse) /* 1 turns the other way: sin changes its sign */ \
    field(uint32_t, out_of_range) /* of a position outside the table's rows */

// A table of f32, [rows, pairs] each.
#define PHASOR_FIELDS_PhasorTable(field) \
    field(uint64_t, cos) \
    field(uint64_t, sin)

// `count` rows of steps or of the table.
#define PHASOR_FIELDS_PhasorRows(field) \
    field(uint64_t, factors) /* attention factors, f32[count]; not read where there is one row */ \
    field(int64_t, boundary) \
    field(PhasorIds, ids) \
    field(uint32_t, count) \
    field(uint32_t, row)

// The position of token (b, t) on axis a is start + n * advance + its id, which lies a * axis_stride
// further, 0 where there are no ids; n is its place in its sequence. Arithmetic wraps.
#define PHASOR_FIELDS_PhasorPositions(field) \
    field(int64_t, start) \
    field(int64_t, advance) \
    field(PhasorIds, ids) \
    field(int64_t, axis_stride)

// Which two dims form a pair, in what is read and in what is written: dims from one pair to the next,
// and from a pair's first dim to its second.
#define PHASOR_FIELDS_PhasorPairing(field) \
    field(uint32_t, source_step) \
    field(uint32_t, source_gap) \
    field(uint32_t, destination_step) \
    field(uint32_t, destination_gap)

// What a rotation in place by one row of steps reads comes first and lies together, as a kernel fetches
// its parameters by lines of 64 bytes.
#define PHASOR_FIELDS_PhasorCall(field) \
    field(uint32_t, batch) \
    field(uint32_t, tokens) /* of each sequence of the batch */ \
    /* 1: positions and row ids are written by none of the earlier work that may still be running. \
     * Angles are then formed before the kernel waits for it. */ \
    field(uint32_t, angles_before_wait) \
    field(uint32_t, in_place) /* all streams are */ \
    field(PhasorAngles, angles) \
    field(PhasorPositions, positions) \
    /* Here and below, what kernels choose by the number of a stream lies side by side: q, k, v. */ \
    field(PhasorStream, q) \
    field(PhasorStream, k) \
    field(PhasorStream, v) \
    /* A thread visits a group of up to 2^heads_log2 heads of a stream at once. Groups are numbered through: \
     * here those of each stream begin, and end. */ \
    field(uint32_t, q_groups_begin) \
    field(uint32_t, k_groups_begin) \
    field(uint32_t, v_groups_begin) \
    field(uint32_t, groups_end) \
    field(PhasorOutput, q_output) \
    field(PhasorOutput, k_output) \
    field(PhasorOutput, v_output) \
    field(PhasorTable, table) \
    field(PhasorRows, rows) \
    field(PhasorPairing, pairing) \
    field(uint32_t, token_groups) /* blocks of a kernel that share a sequence's tokens */ \
    field(uint32_t, heads_log2) \
    field(PhasorCache, k_cache) \
    field(PhasorCache, v_cache) \
    field(PhasorSlots, slots) \
    field(PhasorSequences, sequences)

// A norm of heads: src/norm.rs says what it computes. Weights and biases are of the element type, dim by
// dim; where their address is 0 there are none.
#define PHASOR_FIELDS_PhasorNorm(field) \
    field(uint64_t, weight) \
    field(uint64_t, bias) \
    field(int64_t, weight_head) /* bytes from one head's to the next: 0 where heads share them */ \
    field(int64_t, bias_head) \
    field(uint32_t, kind) \
    field(float, eps) \
    field(float, weight_offset) \
    field(uint32_t, after_rotation) \
    field(uint32_t, round_before_weight) \
    field(uint32_t, round_after) \
    field(uint32_t, across_heads) \
    field(float, inverse_dims) /* 1 / head_dim, for kernels that have it as a power of two */

// What values are multiplied by once they are rotated and normed: `factor`; or, where `interval` is not
// 0, factor * (1 + slope * ln(1 + n)), where n is how often the interval goes into the token's position
// on the first axis, plus 1, and 0 where that is negative: src/stages.rs.
#define PHASOR_FIELDS_PhasorScale(field) \
    field(float, factor) \
    field(float, slope) \
    field(uint32_t, interval) \
    field(uint32_t, reserved)

// 8-bit codes that are written in place of elements: src/quantize.rs says what they are. Scales are f32,
// or bytes of E8M0. Where they are given, there is one for each head, and they are read at `scales` +
// h * `head`; else one for each `group_dims` dims of a head is written.
#define PHASOR_FIELDS_PhasorCodes(field) \
    field(uint64_t, scales) \
    field(int64_t, page) /* bytes from that of one page to the next, and so on */ \
    field(int64_t, slot) \
    field(int64_t, head) \
    field(int64_t, group) \
    field(uint32_t, type) \
    field(uint32_t, dynamic) \
    field(uint32_t, multiply) /* by the inverse of the scale (which a given one is) */ \
    field(uint32_t, scale_rounding) \
    field(uint32_t, group_dims) \
    field(uint32_t, e8m0) \
    field(uint32_t, round_first) /* to the element type */ \
    field(float, floor) /* least scale: a normal number, or 2^-127 */

// What is done to a stream between its loads and its stores, in the order of the fields; rotation stands
// before the norm or after it. Codes are those of q's destination, and of k's and v's caches.
#define PHASOR_FIELDS_PhasorStages(field) \
    field(uint64_t, bias) /* of the element type, added dim by dim; 0: none */ \
    field(int64_t, bias_head) /* bytes from one head's to the next */ \
    field(PhasorNorm, norm) \
    field(PhasorScale, scale) \
    field(PhasorCodes, codes) \
    field(uint32_t, rotates) \
    field(uint32_t, present) /* 0: the stream has no stage but its rotation */ \
    /* 1: what is read is what the cache has in the token's slot. The dims that rotate are written there, \
     * and with dynamic codes those that share a scale with one. */ \
    field(uint32_t, from_cache) \
    field(uint32_t, flags) /* what kernels test of all this, with that of norm and codes */

// The stages of a call's streams; a second parameter of the kernels that perform them.
#define PHASOR_FIELDS_PhasorFusion(field) \
    field(PhasorStages, q) \
    field(PhasorStages, k) \
    field(PhasorStages, v) \
    /* 1: biases, weights and given scales are written by none of the earlier work that may still be \
     * running. They are then read before the kernel waits for it. */ \
    field(uint32_t, weights_before_wait) \
    field(uint32_t, turns) /* whether q or k rotates at all */

#define PHASOR_STRUCTS(of) \
    of(PhasorView) \
    of(PhasorStream) \
    of(PhasorOutput) \
    of(PhasorCache) \
    of(PhasorIds) \
    of(PhasorSequences) \
    of(PhasorSlots) \
    of(PhasorAngles) \
    of(PhasorTable) \
    of(PhasorRows) \
    of(PhasorPositions) \
    of(PhasorPairing) \
    of(PhasorCall) \
    of(PhasorNorm) \
    of(PhasorScale) \
    of(PhasorCodes) \
    of(PhasorStages) \
    of(PhasorFusion)

#if defined(__cplusplus)
#define PHASOR_STATIC_ASSERT static_assert
#else
#define PHASOR_STATIC_ASSERT _Static_assert
#endif

#define PHASOR_DECLARE_FIELD(type, name) type name;
#define PHASOR_SIZE_OF_FIELD(type, name) +sizeof(type)
#define PHASOR_DECLARE_STRUCT(name) \
    typedef struct name { \
        PHASOR_FIELDS_##name(PHASOR_DECLARE_FIELD) \
    } name; \
    PHASOR_STATIC_ASSERT(sizeof(name) == 0 PHASOR_FIELDS_##name(PHASOR_SIZE_OF_FIELD), \
                         "no padding: every byte of a call is set");

PHASOR_STRUCTS(PHASOR_DECLARE_STRUCT)

#endif
