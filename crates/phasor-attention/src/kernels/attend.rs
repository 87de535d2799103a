//! Attention over pages as launches.

use super::{KernelLaunch, PhasorAttend, count};
use crate::attend::{SPLIT, TILE};
use crate::cache::check_shapes;
use crate::codes::check_codes;
use crate::error::agree;
use crate::{Attend, AttentionError, AttentionMask};
use phasor::call::{
    PHASOR_CODES_NONE, PHASOR_SLOT_PAGE_TABLE, PhasorCache, PhasorCodes, PhasorIds,
};
use phasor::{CacheLayout, Dtype, Ids, Layout, StoredCodes};

// As cuda/attention_call.h has them.
const MASK_CAUSAL: u32 = 0;
const MASK_WINDOW: u32 = 1;
const MASK_CHUNKED: u32 = 2;
const MASK_NONE: u32 = 3;
/// Of f32, f16 and bf16: for values of the dims of keys, for others, and what joins the splits of either.
pub(crate) const KERNELS: [[&str; 3]; 3] = [
    ["attend_f32", "attend_latent_f32", "join_f32"],
    ["attend_f16", "attend_latent_f16", "join_f16"],
    ["attend_bf16", "attend_latent_bf16", "join_bf16"],
];
/// Those over caches of codes, which are none of a module of an element type.
pub(crate) const KERNELS_OF_CODES: [&str; 2] = ["attend_codes", "attend_latent_codes"];
const THREADS: u32 = 128;
/// Query heads of a block, at most.
const BLOCK_HEADS: usize = 8;
/// Dims of a head, at most.
const MOST_DIMS: usize = 256;
/// Those of keys and of values, at most, of the kernels for latent attention.
const MOST_LATENT_DIMS: [usize; 2] = [576, 512];
const CHUNK: usize = 16;
const STAGED: usize = TILE * (256 + CHUNK);
/// What a grid has room for in its first dimension, and in the second.
const GRID: [usize; 2] = [i32::MAX as usize, 65_535];

/// 8-bit codes that keys or values are kept as.
#[derive(Clone, Copy, Debug)]
pub struct CacheCodes {
    /// What they are, and where their scales are if these were written with them.
    pub codes: StoredCodes,
    /// Scales that are given: 1, or one for each head. 0 where they were written.
    pub given: usize,
}

/// What the memory of a call looks like.
#[derive(Clone, Copy, Debug)]
pub struct AttendShape {
    /// The queries, `[1, tokens, heads, head_dim]` or `[tokens, 1, heads, head_dim]` with any strides.
    pub q: Layout,
    /// The results, of the same shape but for the dims of a head, which are those of values.
    pub out: Layout,
    /// The keys' cache.
    pub k: CacheLayout,
    /// The values' cache, whose heads may have other dims. That of a latent (MLA) is the keys' with fewer
    /// dims, over the same buffer.
    pub v: CacheLayout,
    /// Keys' and values' codes; `None`: the caches have elements.
    pub codes: Option<[CacheCodes; 2]>,
    /// Sequences of the batch.
    pub sequences: usize,
    /// Pages of a row of the page table.
    pub table_pages: usize,
    /// Keys that a sequence has at most; tokens of longer ones have no result, and are reported. `None`: as
    /// many as its row of the page table has room for. The fewer, the smaller the workspace and the grid.
    pub most_keys: Option<usize>,
}

/// Where operands are on the device.
#[derive(Clone, Copy, Debug)]
pub struct AttendAddresses {
    /// Element 0 of the buffer with the queries.
    pub q: u64,
    /// Element 0 of the buffer for results.
    pub out: u64,
    /// Element 0 of the buffer with the keys' cache, or its first code.
    pub k: u64,
    /// Element 0 of the buffer with the values' cache, or its first code.
    pub v: u64,
    /// The buffer with the scales of the keys' codes, at a multiple of 4 bytes but for E8M0; 0 where they are
    /// between the codes, and for elements.
    pub k_scales: u64,
    /// Of the values' codes.
    pub v_scales: u64,
    /// `[sequences, table_pages]`.
    pub page_table: Ids<u64>,
    /// `[sequences]`: keys in the cache before these tokens.
    pub cache_lengths: Ids<u64>,
    /// `[sequences + 1]`; `None`: each token is a sequence.
    pub cu_seqlens: Option<Ids<u64>>,
    /// [`AttendPlan::sinks`]; 0 where there are none.
    pub sinks: u64,
    /// [`AttendPlan::workspace_len`] of f32, at a multiple of 8 bytes.
    pub workspace: u64,
    /// A word that is set to 1 where a token has no result; 0: none.
    pub report: u64,
}

/// Attention of new tokens over a paged cache, by two kernels: the first computes splits of
/// [`SPLIT`](crate::attend::SPLIT) keys, each in a block for up to 8 query heads of a key-value head; the
/// second joins them. Results are those of [`attend`](crate::attend), bit for bit, but for which NaN a NaN
/// is inside of them.
///
/// Which part of a context a block has depends on the context alone. The grid has blocks for as many splits
/// as the longest sequence may have; those past a sequence's keys end at once. So a call that a graph
/// captured serves while sequences grow.
///
/// A token is skipped, its part of the output left as it is, and the report set, if its sequence is longer
/// than it may be, has a negative length, or has a page outside of the cache among the keys that the token
/// sees. Tokens past the last offset are skipped without a report.
///
/// Each token reads all keys that it sees, also where many tokens of a sequence are new. So decode is
/// limited by memory, and a long prompt takes a multiple of what kernels on tensor cores take: engines bring
/// their own for that.
#[derive(Clone, Debug)]
pub struct AttendPlan {
    dtype: Dtype,
    kernels: [&'static str; 2],
    template: PhasorAttend,
    /// Bytes from element 0 of q, the output, k and v.
    offsets: [u64; 4],
    /// `[attend, join]`.
    grids: [[u32; 3]; 2],
    shared_bytes: u32,
    /// Of partial results, then of their states.
    workspace: [usize; 2],
    sequences: usize,
    /// For `exp2`.
    sinks: Option<Vec<f32>>,
    /// Elements that the buffers of q, the output, k and v need.
    required: [usize; 4],
    /// Bytes of the scales of keys and values that have a buffer of their own.
    scale_bytes: [usize; 2],
}

impl AttendPlan {
    /// Checks all that does not depend on memory.
    ///
    /// # Errors
    /// [`AttentionError::Heads`], [`AttentionError::Factor`], [`AttentionError::Value`] for a number that
    /// kernels cannot take, such as a head_dim above 576; [`AttentionError::Mismatch`] where shapes disagree;
    /// [`AttentionError::Weights`] for codes that are not e4m3 or int8.
    pub fn new(
        dtype: Dtype,
        attend: &Attend<'_>,
        shape: &AttendShape,
    ) -> Result<Self, AttentionError> {
        let [pages, page_size, kv_heads, head_dim] = shape.k.shape();
        attend.check(kv_heads)?;
        let q_type = match dtype {
            Dtype::F32 => 0,
            Dtype::F16 => 1,
            Dtype::Bf16 => 2,
            _ => {
                return Err(AttentionError::Dtype {
                    dtype,
                    remedy: "kernels of attention take f32, f16 and bf16",
                });
            }
        };
        let (heads, group) = (attend.heads, attend.heads / kv_heads);
        let v_head_dim = shape.v.shape()[3];
        let dims_of_both = [
            ("head_dim", head_dim, MOST_LATENT_DIMS[0]),
            ("v_head_dim", v_head_dim, MOST_LATENT_DIMS[1]),
        ];
        for (what, value, most) in dims_of_both {
            if value == 0 || value > most {
                return Err(AttentionError::Value {
                    what,
                    value,
                    remedy: "the kernels take keys of 1 to 576 dims and values of 1 to 512",
                });
            }
        }
        check_shapes(&shape.k, &shape.v)?;
        let is_latent = usize::from(head_dim != v_head_dim || head_dim > MOST_DIMS);
        let [.., join] = KERNELS[q_type];
        let kernels = match shape.codes {
            Some(_) => [KERNELS_OF_CODES[is_latent], join],
            None => [KERNELS[q_type][is_latent], join],
        };
        let (tokens, q_strides) = strides(&shape.q, "tokens of q", dtype)?;
        let (out_tokens, out_strides) = strides(&shape.out, "tokens of the output", dtype)?;
        agree("tokens of the output", tokens, out_tokens)?;
        for (what, expected, got) in [
            ("heads of q", heads, shape.q.shape()[2]),
            ("heads of the output", heads, shape.out.shape()[2]),
            ("head_dim of q", head_dim, shape.q.shape()[3]),
            ("v_head_dim of the output", v_head_dim, shape.out.shape()[3]),
        ] {
            agree(what, expected, got)?;
        }
        let room = shape.table_pages.saturating_mul(page_size);
        let most_keys = shape.most_keys.unwrap_or(room);
        if most_keys > room {
            return Err(AttentionError::Value {
                what: "most_keys",
                value: most_keys,
                remedy: "a row of the page table has no room for so many: give it more pages",
            });
        }
        let all = most_keys.div_ceil(SPLIT);
        // Of a range of so many keys that begins anywhere.
        let of_range = |keys: usize| (keys.saturating_add(SPLIT - 2) / SPLIT + 1).min(all);
        let (mask, window, splits) = match attend.mask {
            AttentionMask::Causal => (MASK_CAUSAL, 0, all),
            AttentionMask::None => (MASK_NONE, 0, all),
            AttentionMask::SlidingWindow(window) => (MASK_WINDOW, window, of_range(window)),
            AttentionMask::Chunked(chunk) => (MASK_CHUNKED, chunk, of_range(chunk)),
        };
        let head_blocks = kv_heads.saturating_mul(group.div_ceil(BLOCK_HEADS));
        for (what, value, most, remedy) in [
            (
                "tokens times splits of their keys",
                tokens.saturating_mul(splits),
                GRID[0],
                "a grid has room for 2^31 - 1: give fewer tokens to a call",
            ),
            (
                "query heads",
                heads,
                GRID[1],
                "a grid has room for 65535 heads",
            ),
        ] {
            if value > most {
                return Err(AttentionError::Value {
                    what,
                    value,
                    remedy,
                });
            }
        }
        let rows = [tokens, heads, splits]
            .into_iter()
            .try_fold(1usize, usize::checked_mul);
        let workspace = rows
            .and_then(|rows| Some([rows.checked_mul(v_head_dim)?, rows.checked_mul(2)?]))
            .filter(|[partial, states]| {
                let all = partial.checked_add(1).and_then(|p| p.checked_add(*states));
                all.is_some_and(|all| all <= isize::MAX as usize / size_of::<f32>())
            })
            .ok_or(AttentionError::Value {
                what: "tokens of a call",
                value: tokens,
                remedy: "there is no memory for partial results of so many: give fewer to a call",
            })?;
        if !is_apart(&shape.out) {
            return Err(AttentionError::Value {
                what: "the token stride of the output",
                value: shape.out.strides()[1],
                remedy: "heads must not overlap: dims, heads and tokens each need a stride of their own",
            });
        }
        // Codes become f32 on their way to shared memory.
        let (cache_size, staged_size) = match shape.codes {
            Some(_) => (1, size_of::<f32>()),
            None => (dtype.size(), dtype.size()),
        };
        let mut required = [
            shape.q.required_len(),
            shape.out.required_len(),
            shape.k.required_len(),
            shape.v.required_len(),
        ]
        .map(|len| len.unwrap_or(usize::MAX));
        let scores = attend.scores();
        let mut template = PhasorAttend {
            q_token: q_strides[0],
            q_head: q_strides[1],
            out_token: out_strides[0],
            out_head: out_strides[1],
            k: cache(&shape.k, "elements of the keys' cache", cache_size)?,
            v: cache(&shape.v, "elements of the values' cache", cache_size)?,
            tokens: count("tokens", tokens)?,
            heads: count("heads", heads)?,
            group: count("heads of a group", group)?,
            head_dim: count("head_dim", head_dim)?,
            v_head_dim: count("v_head_dim", v_head_dim)?,
            splits: count("splits", splits)?,
            most_keys: count("most_keys", most_keys)?,
            mask,
            // No context has as many keys as fit in 32 bits.
            window: u32::try_from(window).unwrap_or(u32::MAX),
            factor: scores.factor,
            cap: scores.capped.unwrap_or(0.0),
            q_type: q_type as u32,
            ..PhasorAttend::default()
        };
        template.slots.choice = PHASOR_SLOT_PAGE_TABLE;
        template.slots.pages = count("pages", pages)?;
        template.slots.page_size = count("page_size", page_size)?;
        template.slots.table_pages = count("pages of a row of the page table", shape.table_pages)?;
        template.sequences.count = count("sequences", shape.sequences)?;
        let mut scale_bytes = [0; 2];
        if let Some(codes) = &shape.codes {
            for (at, (of, layout)) in codes.iter().zip([&shape.k, &shape.v]).enumerate() {
                let (params, own, inline) = code_params(of, layout)?;
                match at {
                    0 => template.k_codes = params,
                    _ => template.v_codes = params,
                }
                scale_bytes[at] = own;
                required[2 + at] = required[2 + at].max(inline);
            }
        }
        let dims = head_dim.next_multiple_of(CHUNK / staged_size);
        let block_heads = group.min(BLOCK_HEADS);
        let shared = STAGED + block_heads * (dims + TILE) * 4 + SPLIT * 8 + BLOCK_HEADS * 4 + 4 * 4;
        let blocks = |n: usize| n as u32; // Compared with the room of a grid above.
        Ok(Self {
            dtype,
            kernels,
            template,
            offsets: [
                (shape.q.offset(), dtype.size()),
                (shape.out.offset(), dtype.size()),
                (shape.k.offset(), cache_size),
                (shape.v.offset(), cache_size),
            ]
            .map(|(elements, size)| (elements * size) as u64),
            grids: [
                [blocks(tokens * splits), blocks(head_blocks), 1],
                [blocks(tokens), blocks(heads), 1],
            ],
            shared_bytes: shared as u32,
            workspace,
            sequences: shape.sequences,
            sinks: attend
                .sinks
                .map(|sinks| sinks.iter().copied().map(crate::attend::base_2).collect()),
            required,
            scale_bytes,
        })
    }

    /// The element type of queries and results, and of caches unless they have codes.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Tokens of a call.
    pub fn tokens(&self) -> usize {
        self.template.tokens as usize
    }

    /// Sequences of a call.
    pub fn sequences(&self) -> usize {
        self.sequences
    }

    /// Bytes that the scales of keys and of values have at least, where they have a buffer of their own; 0
    /// where they have none.
    pub fn scale_bytes(&self) -> [usize; 2] {
        self.scale_bytes
    }

    /// Bytes of a scale of keys and of values in a buffer of their own.
    #[cfg(feature = "cuda")]
    pub(crate) fn scale_sizes(&self) -> [usize; 2] {
        let of = |own: usize, e8m0| match (own, e8m0) {
            (0, _) => 0,
            (_, 0) => 4,
            _ => 1,
        };
        let [k, v] = self.scale_bytes;
        let PhasorAttend {
            k_codes, v_codes, ..
        } = &self.template;
        [of(k, k_codes.e8m0), of(v, v_codes.e8m0)]
    }

    /// Whether caches have codes.
    pub fn has_codes(&self) -> bool {
        self.template.k_codes.type_ != PHASOR_CODES_NONE
    }

    /// Elements that the buffers of q, of the output, of k and of v have at least; of codes, so many of
    /// these, and scales between them.
    pub fn required_lens(&self) -> [usize; 4] {
        self.required
    }

    /// f32 elements that a call needs for the time of its two kernels.
    pub fn workspace_len(&self) -> usize {
        // States begin at a multiple of 8 bytes.
        self.workspace[0].next_multiple_of(2) + self.workspace[1]
    }

    /// What is to be at [`AttendAddresses::sinks`], `[heads]`.
    pub fn sinks(&self) -> Option<&[f32]> {
        self.sinks.as_deref()
    }

    /// The launches of a call, in their order: none if there are no tokens or keys.
    ///
    /// # Errors
    /// [`AttentionError::Mismatch`] where there are more or fewer ids than the plan has, or no sinks or scales
    /// where it has some; [`AttentionError::Value`] for scales that are not aligned.
    pub fn launches(
        &self,
        addresses: &AttendAddresses,
    ) -> Result<Option<[KernelLaunch<PhasorAttend>; 2]>, AttentionError> {
        let mut params = self.template;
        let table_pages = params.slots.table_pages as usize;
        agree(
            "entries of the page table",
            self.sequences.saturating_mul(table_pages),
            addresses.page_table.len(),
        )?;
        agree(
            "cache_lengths, one a sequence",
            self.sequences,
            addresses.cache_lengths.len(),
        )?;
        match &addresses.cu_seqlens {
            Some(offsets) => {
                agree(
                    "cu_seqlens, one more than sequences",
                    self.sequences + 1,
                    offsets.len(),
                )?;
                params.sequences.offsets = PhasorIds::of(offsets, 1, 0);
            }
            None => {
                agree(
                    "sequences of a batch without cu_seqlens, one a token",
                    self.tokens(),
                    self.sequences,
                )?;
                params.sequences.each_token = 1;
            }
        }
        agree(
            "addresses of sinks",
            usize::from(self.sinks.is_some()),
            usize::from(addresses.sinks != 0),
        )?;
        let [q, out, k, v] = self.offsets;
        params.q = addresses.q.wrapping_add(q);
        params.out = addresses.out.wrapping_add(out);
        params.k.address = addresses.k.wrapping_add(k);
        params.v.address = addresses.v.wrapping_add(v);
        params.partial = addresses.workspace;
        let states = self.workspace[0].next_multiple_of(2) * size_of::<f32>();
        params.states = addresses.workspace.wrapping_add(states as u64);
        params.sinks = addresses.sinks;
        params.slots.ids = PhasorIds::of(&addresses.page_table, table_pages, 1);
        params.slots.lengths = PhasorIds::of(&addresses.cache_lengths, 1, 0);
        params.slots.report = addresses.report;
        let size = if self.has_codes() {
            1
        } else {
            self.dtype.size()
        };
        params.k_in_chunks = in_chunks(&params.k, size);
        params.v_in_chunks = in_chunks(&params.v, size);
        if self.has_codes() {
            let scales = [
                (&mut params.k_codes, addresses.k_scales, addresses.k),
                (&mut params.v_codes, addresses.v_scales, addresses.v),
            ];
            for (own, (codes, scales, cache)) in self.scale_bytes.into_iter().zip(scales) {
                agree(
                    "buffers of scales, where these are not between the codes",
                    usize::from(own > 0),
                    usize::from(scales != 0),
                )?;
                let base = if own > 0 { scales } else { cache };
                if codes.e8m0 == 0 && !base.is_multiple_of(4) {
                    return Err(AttentionError::Value {
                        what: "the address of scales",
                        value: base as usize,
                        remedy: "f32 lie at multiples of 4 bytes",
                    });
                }
                codes.scales = base.wrapping_add(codes.scales);
            }
        }
        if self.grids.as_flattened().contains(&0) {
            return Ok(None);
        }
        let [attend, join] = self.kernels;
        let launch = |kernel, grid, shared_bytes| KernelLaunch {
            kernel,
            grid,
            block: [THREADS, 1, 1],
            shared_bytes,
            params,
        };
        Ok(Some([
            launch(attend, self.grids[0], self.shared_bytes),
            launch(join, self.grids[1], 0),
        ]))
    }
}

/// How many tokens there are, and bytes from token to token and from head to head.
fn strides(
    layout: &Layout,
    what: &'static str,
    dtype: Dtype,
) -> Result<(usize, [i64; 2]), AttentionError> {
    let [batch, sequence, ..] = layout.shape();
    let [batch_stride, token_stride, head_stride] = layout.strides();
    let (tokens, stride) = match (batch, sequence) {
        (1, tokens) => (tokens, token_stride),
        (tokens, 1) => (tokens, batch_stride),
        (batch, sequence) => {
            return Err(AttentionError::Mismatch {
                what,
                expected: batch.saturating_mul(sequence),
                got: sequence,
            });
        }
    };
    // Elements that memory has no room for are none of a slice either.
    let bytes = |elements: usize| elements.wrapping_mul(dtype.size()) as i64;
    Ok((tokens, [bytes(stride), bytes(head_stride)]))
}

/// Whether no two heads have an element in common, by strides that nest.
fn is_apart(layout: &Layout) -> bool {
    let [batch, sequence, heads, head_dim] = layout.shape();
    let [batch_stride, token_stride, head_stride] = layout.strides();
    let mut dims = [
        (batch_stride, batch),
        (token_stride, sequence),
        (head_stride, heads),
    ];
    dims.sort_unstable();
    let mut extent = Some(head_dim);
    for (stride, count) in dims {
        // A stride of a single one is not used.
        if count > 1 {
            if extent.is_none_or(|extent| stride < extent) {
                return false;
            }
            extent = stride.checked_mul(count);
        }
    }
    true
}

/// Once it is certain that all of it can be in memory: elements of `size` bytes.
fn cache(
    layout: &CacheLayout,
    what: &'static str,
    size: usize,
) -> Result<PhasorCache, AttentionError> {
    fits(what, layout.required_len(), size)?;
    Ok(PhasorCache::of(layout, size))
}

fn fits(what: &'static str, len: Option<usize>, size: usize) -> Result<usize, AttentionError> {
    let len = len.unwrap_or(usize::MAX);
    match len > isize::MAX as usize / size {
        true => Err(AttentionError::Value {
            what,
            value: len,
            remedy: "no memory has room for so many",
        }),
        false => Ok(len),
    }
}

/// Codes as kernels take them, the bytes of their scales' own buffer, and those of a buffer that has both.
fn code_params(
    of: &CacheCodes,
    layout: &CacheLayout,
) -> Result<(PhasorCodes, usize, usize), AttentionError> {
    let CacheCodes { codes, given } = of;
    check_codes(codes, layout)?;
    let Some(at) = codes.scale_layout() else {
        let [_, _, heads, _] = layout.shape();
        if *given != 1 {
            agree("scales that are given, one a head", heads, *given)?;
        }
        let params = PhasorCodes {
            head: if *given == 1 { 0 } else { 4 },
            ..PhasorCodes::of(codes, layout)
        };
        return Ok((params, given * size_of::<f32>(), 0));
    };
    agree(
        "scales that are given, of those that are written",
        0,
        *given,
    )?;
    let bytes = fits("bytes of scales", codes.scale_bytes(layout), 1)?;
    let params = PhasorCodes::of(codes, layout);
    Ok(match at.is_inline() {
        true => (params, 0, bytes),
        false => (params, bytes, 0),
    })
}

/// Whether each 16 bytes of a head's dims lie together, at a multiple of 16 bytes.
fn in_chunks(cache: &PhasorCache, size: usize) -> u32 {
    let PhasorCache {
        address,
        page,
        slot,
        head,
        block,
        block_dims,
        ..
    } = *cache;
    let dims = u64::from(block_dims) * size as u64;
    let all = [page, slot, head, block]
        .into_iter()
        .fold(address | dims, |all, stride| all | stride as u64);
    u32::from(all.is_multiple_of(CHUNK as u64))
}
