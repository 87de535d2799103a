// A call of attention as data: what the kernels take by value. src/kernels/params.rs has the same struct.
//
// Addresses are in bytes, and so are strides. Nothing is read or written outside of what the counts
// declare, whatever page tables, lengths and offsets hold.
#ifndef PHASOR_ATTENTION_CALL_H
#define PHASOR_ATTENTION_CALL_H

// phasor's own (cuda/ of the workspace): caches, ids, sequences.
#include "phasor_call.h"

#define PHASOR_MASK_CAUSAL 0
#define PHASOR_MASK_WINDOW 1
#define PHASOR_MASK_CHUNKED 2
#define PHASOR_MASK_NONE 3

// PhasorAttend::q_type and PhasorDequantize::scale_type
#define PHASOR_ATTEND_F32 0
#define PHASOR_ATTEND_F16 1
#define PHASOR_ATTEND_BF16 2

// Keys that are scored before the running maximum is looked at, and those that are summed before they are
// joined to those before: TILE and SPLIT of src/attend.rs.
#define PHASOR_ATTEND_TILE 64
#define PHASOR_ATTEND_SPLIT 256
// Threads of a block of every kernel of attention.
#define PHASOR_ATTEND_THREADS 128
// Query heads of a group that a block has at most.
#define PHASOR_ATTEND_HEADS 8
// Dims of a head, at most.
#define PHASOR_ATTEND_DIMS 256
// Those of a head of values, at most, where these may be other than those of keys (MLA).
#define PHASOR_ATTEND_LATENT_DIMS 512
// Bytes of keys or of values that are staged in shared memory at once, and those of a row of keys.
#define PHASOR_ATTEND_ROW 256
#define PHASOR_ATTEND_STAGED (PHASOR_ATTEND_TILE * (PHASOR_ATTEND_ROW + 16))

// Attention of `tokens` tokens. Partial results of splits lie in `partial`, f32 [tokens, heads, splits,
// v_head_dim], and `states`, f32 [tokens, heads, splits, 2], which has m and l of each. A split that has a
// page outside of the caches has a NaN for m, which m is not otherwise.
#define PHASOR_FIELDS_PhasorAttend(field) \
    field(uint64_t, q) \
    field(uint64_t, out) \
    field(int64_t, q_token) \
    field(int64_t, q_head) \
    field(int64_t, out_token) \
    field(int64_t, out_head) \
    field(uint64_t, partial) \
    field(uint64_t, states) \
    field(uint64_t, sinks) /* f32 [heads], times log2(e); 0: none */ \
    field(PhasorCache, k) \
    field(PhasorCache, v) \
    field(PhasorSlots, slots) /* of a page table; lengths are those before these tokens */ \
    field(PhasorSequences, sequences) \
    field(uint32_t, tokens) \
    field(uint32_t, heads) \
    field(uint32_t, group) /* query heads of a key-value head */ \
    field(uint32_t, head_dim) /* of queries and keys */ \
    field(uint32_t, splits) /* of a token, at most */ \
    field(uint32_t, most_keys) /* of a sequence: what its row of the page table has room for, or less */ \
    field(uint32_t, mask) \
    field(uint32_t, window) /* or chunk */ \
    field(float, factor) \
    field(float, cap) /* 0: none */ \
    field(uint32_t, k_in_chunks) /* 1: all of k can be read 16 bytes at a time */ \
    field(uint32_t, v_in_chunks) \
    field(PhasorCodes, k_codes) /* for attend_codes alone, and so are those below */ \
    field(PhasorCodes, v_codes) \
    field(uint32_t, q_type) \
    field(uint32_t, v_head_dim) /* of values and results */

PHASOR_DECLARE_STRUCT(PhasorAttend)

#define PHASOR_GGML_Q4_0 0
#define PHASOR_GGML_Q8_0 1
#define PHASOR_GGML_Q4_K 2
#define PHASOR_GGML_Q5_K 3
#define PHASOR_GGML_Q6_K 4

// Blocks of a GGUF tensor, a GPTQ matrix or one of e4m3, and where the values of some rows go; or activations
// that become e4m3, and where their values go.
#define PHASOR_FIELDS_PhasorDequantize(field) \
    field(uint64_t, blocks) /* of the first row; qweight; codes; activations, [rows, in_features] */ \
    field(uint64_t, scales) /* GPTQ: f16 [groups, out_features]; e4m3: f32 [rows / group_rows, groups] */ \
    field(uint64_t, zeros) /* GPTQ: words [groups, out_features / 8] */ \
    field(uint64_t, groups_of_inputs) /* GPTQ: i32 [in_features]; 0: runs of group_size */ \
    field(uint64_t, out) /* [rows, in_features] */ \
    field(uint64_t, count) /* GGUF: blocks; activations: groups of all rows */ \
    field(uint32_t, first_row) /* GPTQ and e4m3 */ \
    field(uint32_t, rows) \
    field(uint32_t, in_features) \
    field(uint32_t, out_features) \
    field(uint32_t, groups) /* of a row */ \
    field(uint32_t, group_size) /* inputs that share a scale */ \
    field(uint32_t, zero_offset) /* what a stored zero point lacks */ \
    field(uint32_t, type) /* of GGUF's blocks */ \
    field(uint32_t, group_rows) /* e4m3: rows that share a scale */ \
    field(uint32_t, scale_type) /* activations: what the scale of a group is rounded to */ \
    field(float, scale) /* activations: of all; 0: each group has its own */ \
    field(float, most_amax) /* activations: what the largest magnitude of a group counts as at most */

PHASOR_DECLARE_STRUCT(PhasorDequantize)

// The norm of tokens where they are, each by the mean of its squares.
#define PHASOR_FIELDS_PhasorLatentNorm(field) \
    field(uint64_t, x) /* [tokens, dims] */ \
    field(uint64_t, weight) /* f32 [dims] */ \
    field(uint64_t, tokens) \
    field(uint32_t, dims) \
    field(float, eps)

PHASOR_DECLARE_STRUCT(PhasorLatentNorm)

// Heads of keys, of dims of their own and of dims that all heads of a token have. Dims are counted in 16 bytes.
#define PHASOR_FIELDS_PhasorLatentKeys(field) \
    field(uint64_t, of_heads) /* [tokens, heads, own] */ \
    field(uint64_t, of_all) /* [tokens, shared] */ \
    field(uint64_t, out) /* [tokens, heads, chunks] */ \
    field(uint64_t, count) /* of all of these */ \
    field(uint32_t, heads) \
    field(uint32_t, own) \
    field(uint32_t, shared) \
    field(uint32_t, chunks) /* own + shared */

PHASOR_DECLARE_STRUCT(PhasorLatentKeys)

#endif
