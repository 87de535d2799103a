//! A call as a kernel launch: which kernel, on what grid, with which parameter bytes.
//!
//! This is data. The CUDA backend hands it to the driver; tests execute the same data elsewhere.

use crate::Error;
use crate::angle::MAX_ROTARY_DIM;
use crate::call::{
    Call, PHASOR_CODES_NONE, PHASOR_IDS_NONE, PhasorCache, PhasorCall, PhasorFusion, PhasorStages,
    PhasorView, Stream,
};
use crate::element::Dtype;
use crate::error::TensorName;
use crate::rope::Pairing;

/// What kernels do. Each family has modules of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Family {
    /// Rotates q and k.
    Rope,
    /// Rotates q and k, carries v, stores keys and values in caches, and knows ragged batches.
    Append,
    /// Performs [stages](crate::Stages) around the rotation, and all that appends do.
    Fused,
}

impl Family {
    /// All families.
    pub const ALL: [Family; 3] = [Family::Rope, Family::Append, Family::Fused];

    /// Its name in those of modules and kernels.
    pub const fn name(self) -> &'static str {
        match self {
            Family::Rope => "rope",
            Family::Append => "append",
            Family::Fused => "fused",
        }
    }
}

/// One entry point of the kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Kernel {
    /// What it does.
    pub family: Family,
    /// Element type; each has a module of its own.
    pub dtype: Dtype,
    /// The pairing that it serves, by vectors of [`vector`](Self::vector) elements; `None` for any
    /// pairing, also one that differs in what is written, by single elements.
    pub pairing: Option<Pairing>,
}

impl Kernel {
    /// Kernels of one module: of a family and an element type.
    pub const PER_MODULE: usize = Self::PAIRINGS.len();

    const PAIRINGS: [Option<Pairing>; 3] =
        [Some(Pairing::HalfSplit), Some(Pairing::Interleaved), None];

    /// All kernels of a module, in the order of [`index`](Self::index).
    pub fn all(family: Family, dtype: Dtype) -> [Kernel; Self::PER_MODULE] {
        Self::PAIRINGS.map(|pairing| Kernel {
            family,
            dtype,
            pairing,
        })
    }

    /// Its place among the kernels of its module.
    pub fn index(self) -> usize {
        match self.pairing {
            Some(Pairing::HalfSplit) => 0,
            Some(Pairing::Interleaved) => 1,
            None => 2,
        }
    }

    /// Elements of q and k that it accesses at a time, and pairs that a thread rotates of a head.
    pub fn vector(self) -> usize {
        match self.pairing {
            Some(_) => VECTOR,
            None => 1,
        }
    }

    /// The entry's name: `<family>_<dtype>_<pairing>`, where the pairing is `half_split`, `interleaved` or
    /// `any`.
    pub fn name(self) -> String {
        let pairing = self.pairing.map_or("any", Pairing::name);
        format!("{}_{}_{pairing}", self.family.name(), self.dtype.name())
    }
}

/// Elements of a vector: 8 bytes of 16-bit types, 16 of f32. On an H200, with q and k of 32 and 8 heads
/// of 128, vectors of 8 bytes were as fast as those of 16 in bf16 or faster at every size, with half
/// the registers; in f32 those of 16 bytes were 1% faster at 32,768 tokens.
const VECTOR: usize = 4;

/// How a launch stands to the work that was enqueued before it.
///
/// A dependent launch (programmatic dependent launch, compute capability 9.0 and later) may start while
/// the kernel before it still runs: it prepares itself, and waits until all earlier work has ended before
/// it reads or writes q and k. What that is worth, in µs that a rotation adds after another kernel that
/// has just written the same q and k (H200, bf16, half-split, 32 and 8 heads of 128; the figures are of a
/// prototype with these launch modes):
///
/// | tokens | the kernel before | ordinary | dependent | dependent, positions settled |
/// |--:|---|--:|--:|--:|
/// | 1 | lets dependents start at its beginning | 1.39 | 0.88 | 0.93 |
/// | 1 | does not | 1.39 | 1.40 | 1.57 |
/// | 32 | lets dependents start at its beginning | 1.51 | 0.95 | 0.72 |
/// | 32 | does not | 1.53 | 1.61 | 1.71 |
/// | 256 | lets dependents start at its beginning | 2.11 | 1.82 | 1.44 |
/// | 256 | does not | 2.10 | 2.26 | 2.18 |
/// | 2,048 | lets dependents start at its beginning | 8.38 | 7.89 | 7.79 |
/// | 2,048 | does not | 8.38 | 8.39 | 9.07 |
///
/// So it pays after a kernel that executes `griddepcontrol.launch_dependents`
/// (`cudaTriggerProgrammaticLaunchCompletion`), as these kernels do themselves, and costs a little after
/// one that does not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LaunchMode {
    /// After all earlier work of the stream.
    #[default]
    Ordinary,
    /// Dependent. With positions from a start, angles are formed before the wait; with those in device
    /// memory after it. What stages need (biases, weights and given scales) is read after it.
    Dependent,
    /// Dependent, and the caller promises that all that the call reads in device memory, but for q, k and v and
    /// what caches hold, is written by no work of the stream that may still be running when this kernel starts:
    ///
    /// - positions, and rows of frequencies;
    /// - what says which sequence and which slot a token has (`cu_seqlens`, slots, page tables and indices,
    ///   cache lengths);
    /// - what stages need: biases, weights and biases of norms, and given scales. Scales that a kernel of this
    ///   step computes are none that are settled.
    ///
    /// That is not just the kernel before: in a chain of dependent launches several are in flight. Ids that
    /// were uploaded before the chain began, or behind an event or an ordinary launch since, are settled, and
    /// so are weights that were loaded with the model. Before the wait, angles are then formed, slots looked
    /// up, and the weights of the first head that a thread serves read.
    ///
    /// A false promise gives angles of other positions, stores in other slots, and norms and codes by other
    /// weights and scales; never an access out of bounds.
    DependentPositionsSettled,
}

/// What calls are launched on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Target {
    /// Multiprocessors of the device. Their number shapes the grid, and never the result.
    pub multiprocessors: u32,
    /// How launches stand to earlier work. Only for images that were compiled for compute capability
    /// 9.0 or later is this another than ordinary.
    pub mode: LaunchMode,
}

impl Target {
    /// Ordinary launches on a device.
    pub const fn new(multiprocessors: u32) -> Self {
        Self {
            multiprocessors,
            mode: LaunchMode::Ordinary,
        }
    }

    /// In another mode.
    pub const fn with_mode(mut self, mode: LaunchMode) -> Self {
        self.mode = mode;
        self
    }
}

/// A kernel launch.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Launch {
    /// The kernel.
    pub kernel: Kernel,
    /// Blocks: tokens of all sequences, heads, dims of wide heads.
    pub grid: [u32; 3],
    /// Threads: lanes of a head, heads, tokens.
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub shared_bytes: u32,
    /// Whether it is launched dependently (`CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION`).
    pub dependent: bool,
    /// The kernel's first parameter, passed by value.
    pub params: PhasorCall,
    /// The second one, of kernels that perform stages.
    pub fusion: Option<PhasorFusion>,
}

/// Most threads of a block; the kernels' launch bounds allow no more.
const MOST_THREADS: u32 = 256;
/// Most lanes of a block that share a head; wider heads take several blocks.
const MOST_LANES: u32 = 64;
const MOST_GRID_YZ: u32 = 65_535;
/// A grid has room for all pairs of a head.
const _: () = assert!(MAX_ROTARY_DIM as u32 / 2 <= MOST_LANES * MOST_GRID_YZ);
/// Most dims of a head that an append kernel carries.
pub(crate) const MOST_CARRIED_DIMS: u32 = 2 * MOST_LANES * MOST_GRID_YZ;
/// The hardware's limit on `blockDim.z`.
const MOST_BLOCK_Z: u32 = 64;

/// How a call is cut into blocks, where there are so many tokens.
struct Rule {
    /// For fewer tokens than this many per multiprocessor.
    tokens_below: u32,
    /// Heads that a thread visits.
    heads_of_thread: u32,
    /// Threads that a block has, as far as heads and tokens allow.
    threads: u32,
    /// Whether a block takes all heads of its tokens, and so forms their angles once.
    all_heads: bool,
}

/// From sweeps over launch shapes of a prototype on an H200, with q and k of 32 and 8 heads of 128,
/// bf16, half-split: see docs/kernel-launch.md.
const RULES: [Rule; 2] = [
    // Up to 32 tokens, blocks of 64 to 160 threads with 4 to 8 heads each were the fastest.
    Rule {
        tokens_below: 1,
        heads_of_thread: 1,
        threads: 64,
        all_heads: false,
    },
    // From 256 tokens on, a block per token with all its heads and 80 to 224 threads was. Four heads of a
    // thread are in flight at once.
    Rule {
        tokens_below: u32::MAX,
        heads_of_thread: 4,
        threads: 160,
        all_heads: true,
    },
];

impl Rule {
    fn of(params: &PhasorCall, multiprocessors: u32) -> &'static Self {
        let tokens = u64::from(params.batch) * u64::from(params.tokens);
        let applies =
            |rule: &&Rule| tokens < u64::from(rule.tokens_below) * u64::from(multiprocessors);
        RULES.iter().find(applies).unwrap_or(&RULES[1])
    }
}

impl Call {
    /// The launch that performs this call. Allocates nothing.
    pub fn launch(&self, target: &Target) -> Launch {
        let mut params = self.params;
        let kernel = Kernel {
            family: match params.rotates_only() {
                _ if self.fusion.is_some() => Family::Fused,
                true => Family::Rope,
                false => Family::Append,
            },
            dtype: self.dtype,
            pairing: self.vector_pairing(),
        };
        let shape = match &self.fusion {
            None => Shape::new(&params, kernel, target.multiprocessors),
            Some(_) if kernel.pairing.is_some() => {
                Shape::fused(&params, self.dtype, target.multiprocessors)
            }
            Some(fusion) => Shape::staged(&params, fusion, target.multiprocessors),
        };
        params.token_groups = params.tokens.div_ceil(shape.block[2]);
        params.number_groups(shape.heads_log2, shape.warp_rows);
        let slots = &params.slots;
        let has_ids = [
            params.positions.ids,
            params.rows.ids,
            params.sequences.offsets,
            slots.ids,
            slots.lengths,
        ]
        .iter()
        .any(|ids| ids.type_ != PHASOR_IDS_NONE);
        let before_wait = match target.mode {
            LaunchMode::Ordinary => false,
            LaunchMode::Dependent => !has_ids,
            LaunchMode::DependentPositionsSettled => true,
        };
        params.angles_before_wait = u32::from(before_wait);
        let settled = target.mode == LaunchMode::DependentPositionsSettled;
        Launch {
            kernel,
            grid: shape.grid,
            block: shape.block,
            shared_bytes: shape.shared_bytes,
            dependent: target.mode != LaunchMode::Ordinary,
            params,
            fusion: self
                .fusion
                .map(|fusion| fusion.for_kernels(&self.params, settled)),
        }
    }

    /// The pairing, where vectors can serve it. They need every address they form to be a multiple of
    /// their size, vectors that do not straddle an edge of the rotated window, and one pairing.
    fn vector_pairing(&self) -> Option<Pairing> {
        let params = &self.params;
        let bytes = (VECTOR * self.dtype.size()) as u64;
        let view =
            |v: &PhasorView, bytes| are_multiples(bytes, v.address, &[v.batch, v.token, v.head]);
        let vectors = |dims: u32| dims.is_multiple_of(VECTOR as u32);
        let aligned = |(stream, stages): (Stream, Option<&PhasorStages>)| {
            let (read, output) = (stream.read, stream.output);
            // Codes are bytes: those of q's destination, of k's and v's caches.
            let coded = stages.is_some_and(|stages| stages.codes.type_ != PHASOR_CODES_NONE);
            let written = if coded { VECTOR as u64 } else { bytes };
            let out = match stream.cache {
                None => written,
                Some(_) => bytes,
            };
            let cache = |c: &PhasorCache| {
                let strides = [c.page, c.slot, c.head, c.block];
                are_multiples(written, c.address, &strides) && vectors(c.block_dims)
            };
            // The addresses of a tensor that is not there are anything, and so is what does not count.
            read.heads == 0
                || view(&read.source, bytes)
                    && (output.nowhere == 1 || view(&output.destination, out))
                    && (!stream.rotates || vectors(read.rotary_offset))
                    && (!stream.copies() || vectors(output.head_dim))
                    && stream.cache.is_none_or(cache)
        };
        let pairing = &params.pairing;
        let one_pairing = (pairing.source_step, pairing.source_gap)
            == (pairing.destination_step, pairing.destination_gap);
        let fits = params.angles.pairs.is_multiple_of(VECTOR as u32)
            && self.streams_and_stages().into_iter().all(aligned)
            && (self.fusion.is_none() || self.stages_fit_vectors(bytes));
        match pairing.source_step {
            _ if !(one_pairing && fits) => None,
            1 => Some(Pairing::HalfSplit),
            _ => Some(Pairing::Interleaved),
        }
    }
}

impl Call {
    /// Whether the fused kernels for vectors can perform its stages: heads of 64, 128 or 256 dims that rotate
    /// as a whole, each with a statistic and a scale of its own, and operands at multiples of a vector.
    fn stages_fit_vectors(&self, bytes: u64) -> bool {
        let dims = 2 * self.params.angles.pairs;
        let fits = |(stream, stages): &(Stream, Option<&PhasorStages>)| {
            let operands = |stages: &PhasorStages| {
                let norm = &stages.norm;
                // (From head to head they lie as far apart as a head is long.)
                let mut begins = [stages.bias, norm.weight, norm.bias].into_iter();
                let codes = &stages.codes;
                stages.from_cache == 0
                    && begins.all(|address| address.is_multiple_of(bytes))
                    && norm.across_heads == 0
                    && (codes.type_ == PHASOR_CODES_NONE || codes.group_dims == dims)
            };
            stream.read.heads == 0 || stream.output.head_dim == dims && stages.is_none_or(operands)
        };
        [64, 128, 256].contains(&dims) && self.streams_and_stages().iter().all(fits)
    }
}

/// Whether what begins at an address, and again at strides from it, all in bytes, does so at multiples.
fn are_multiples(of: u64, address: u64, strides: &[i64]) -> bool {
    let mut strides = strides.iter();
    address.is_multiple_of(of) && strides.all(|&stride| (stride as u64).is_multiple_of(of))
}

/// Grid and block of a call, which has at least one token and one head. The kernels accept any that has
/// a place for every token.
struct Shape {
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    /// 2 to this are the heads of a stream that a thread of an append kernel visits at once.
    heads_log2: u32,
    /// Rows of a block that must visit the same stream.
    warp_rows: u32,
}

/// Bytes of shared memory in which an append kernel keeps the sequence and the slot of a token.
const PLACE_BYTES: u32 = 16;

impl Shape {
    fn new(params: &PhasorCall, kernel: Kernel, multiprocessors: u32) -> Self {
        let pairs_of_lane = kernel.vector() as u32;
        let append = kernel.family == Family::Append;
        // Where what does not rotate is carried too, it takes chunks of its own.
        let chunks_of = |stream: Stream| {
            let rotated = if stream.rotates {
                params.angles.pairs
            } else {
                0
            };
            let copied = match append && stream.read.heads > 0 && stream.copies() {
                true => (stream.output.head_dim - 2 * rotated).div_ceil(2 * pairs_of_lane),
                false => 0,
            };
            rotated / pairs_of_lane + copied
        };
        let chunks = params.streams().map(chunks_of).into_iter().max();
        let chunks = chunks.unwrap_or(1);
        // Lanes that divide the chunks evenly among the fewest blocks.
        let lanes = chunks.div_ceil(chunks.div_ceil(MOST_LANES));
        let rule = Rule::of(params, multiprocessors);
        let rows_of_heads = match append {
            // Threads do not go from one stream to the next on their way.
            true => params
                .groups(rule.heads_of_thread.ilog2(), 1)
                .iter()
                .sum::<u32>()
                .max(1),
            false => (params.q.heads + params.k.heads).div_ceil(rule.heads_of_thread),
        };
        let rows = match rule.all_heads {
            true => rows_of_heads,
            // As many threads as a lane has pairs, at least, so that each forms one angle.
            false => rows_of_heads.min((rule.threads / lanes).max(pairs_of_lane)),
        };
        let rows = rows.min(MOST_THREADS / lanes);
        let block_tokens =
            (rule.threads / (lanes * rows)).clamp(1, params.tokens.min(MOST_BLOCK_Z));
        let head_blocks = match rule.all_heads {
            true => 1,
            false => rows_of_heads.div_ceil(rows).min(MOST_GRID_YZ),
        };
        // A cosine and a sine for each pair of each token.
        let angle_bytes = 2 * size_of::<f32>() as u32 * lanes * pairs_of_lane;
        let token_bytes = angle_bytes + if append { PLACE_BYTES } else { 0 };
        Self {
            grid: [
                // A plan has fewer tokens than a grid has blocks.
                params.batch * params.tokens.div_ceil(block_tokens),
                head_blocks,
                chunks.div_ceil(lanes),
            ],
            block: [lanes, rows, block_tokens],
            shared_bytes: token_bytes * block_tokens,
            heads_log2: rule.heads_of_thread.ilog2(),
            warp_rows: 1,
        }
    }
}

/// Bytes of shared memory in which a fused kernel keeps what a token's streams are multiplied by.
const SCALES_BYTES: u32 = 16;
/// Bytes of shared memory that any launch may have.
const MOST_SHARED_BYTES: u64 = 48 << 10;
/// Heads that a block of the fused kernel for any heads has at once, at most.
const STAGED_ROWS: u32 = 8;
/// Lanes of one of these heads.
const STAGED_LANES: u32 = 32;

/// Bytes of shared memory that a fused kernel for any heads has for a stream, in blocks of so many heads:
/// for each a head that has been rotated; heads as they are; sums of heads.
fn staged_bytes(stream: &Stream, stages: &PhasorStages, rows: u32) -> u64 {
    let [heads, dims] = [stream.read.heads, stream.output.head_dim].map(u64::from);
    let rows = u64::from(rows);
    let (at_once, sums) = match stages.norm.across_heads {
        1 => (heads, heads.next_power_of_two()),
        _ => (rows, 0),
    };
    size_of::<f32>() as u64 * ((rows + at_once) * dims + sums)
}

/// Bytes in front of those.
fn staged_bytes_before(params: &PhasorCall) -> u64 {
    let angles = 2 * size_of::<f32>() as u64 * u64::from(params.angles.pairs);
    angles.next_multiple_of(16) + u64::from(PLACE_BYTES + SCALES_BYTES)
}

fn staged_streams<'a>(
    params: &'a PhasorCall,
    fusion: &'a PhasorFusion,
) -> impl Iterator<Item = (TensorName, Stream<'a>, &'a PhasorStages)> {
    let names = [TensorName::Q, TensorName::K, TensorName::V];
    let stages = [&fusion.q, &fusion.k, &fusion.v];
    let all = names.into_iter().zip(params.streams()).zip(stages);
    all.map(|((name, stream), stages)| (name, stream, stages))
        .filter(|(_, stream, stages)| stream.read.heads > 0 && stages.present == 1)
}

/// Heads fit in a block, and scales are where a device can read and write them.
pub(crate) fn check_stages(params: &PhasorCall, fusion: &PhasorFusion) -> Result<(), Error> {
    for (tensor, stream, stages) in staged_streams(params, fusion) {
        let bytes = staged_bytes_before(params) + staged_bytes(&stream, stages, 1);
        if bytes > MOST_SHARED_BYTES {
            return Err(Error::StagesTooLarge {
                tensor,
                bytes,
                most: MOST_SHARED_BYTES,
            });
        }
        let codes = &stages.codes;
        let strides = [codes.page, codes.slot, codes.head, codes.group];
        let align = size_of::<f32>();
        if codes.type_ != PHASOR_CODES_NONE
            && codes.e8m0 == 0
            && !are_multiples(align as u64, codes.scales, &strides)
        {
            return Err(Error::BufferUnaligned {
                what: "a scale",
                align,
            });
        }
    }
    Ok(())
}

impl Shape {
    /// That of the fused kernels for vectors. Blocks are of whole warps, of which each serves one stream.
    fn fused(params: &PhasorCall, dtype: Dtype, multiprocessors: u32) -> Self {
        let rule = Rule::of(params, multiprocessors);
        let lanes = params.angles.pairs / VECTOR as u32;
        let warp_rows = STAGED_LANES / lanes;
        // A thread loads 64 bytes at once.
        let most = 8 / dtype.size() as u32;
        let heads_of_thread = rule.heads_of_thread.min(most);
        let heads_log2 = heads_of_thread.ilog2();
        let groups: u32 = params.groups(heads_log2, warp_rows).iter().sum();
        let groups = groups.max(1);
        let rows = match rule.all_heads {
            true => groups.div_ceil(rule.heads_of_thread / heads_of_thread),
            false => groups.min((rule.threads / lanes).max(VECTOR as u32)),
        };
        let rows = rows.min(MOST_THREADS / lanes).next_multiple_of(warp_rows);
        let block_tokens =
            (rule.threads / (lanes * rows)).clamp(1, params.tokens.min(MOST_BLOCK_Z));
        let angle_bytes = 2 * size_of::<f32>() as u32 * params.angles.pairs;
        Self {
            grid: [
                params.batch * params.tokens.div_ceil(block_tokens),
                match rule.all_heads {
                    true => 1,
                    false => groups.div_ceil(rows).min(MOST_GRID_YZ),
                },
                1,
            ],
            block: [lanes, rows, block_tokens],
            shared_bytes: (angle_bytes + PLACE_BYTES + SCALES_BYTES) * block_tokens,
            heads_log2,
            warp_rows,
        }
    }

    /// That of the fused kernel for any heads.
    fn staged(params: &PhasorCall, fusion: &PhasorFusion, multiprocessors: u32) -> Self {
        let heads = params.streams().map(|stream| stream.read.heads);
        let heads = heads.into_iter().max().unwrap_or(1);
        let shared = |rows: u32| {
            let streams = staged_streams(params, fusion);
            let most = streams.map(|(_, stream, stages)| staged_bytes(&stream, stages, rows));
            staged_bytes_before(params) + most.max().unwrap_or(0)
        };
        // A call was checked to fit with one.
        let rows = (2..=heads.min(STAGED_ROWS)).rev();
        let rows = rows
            .into_iter()
            .find(|&rows| shared(rows) <= MOST_SHARED_BYTES);
        let rows = rows.unwrap_or(1);
        let across =
            staged_streams(params, fusion).any(|(.., stages)| stages.norm.across_heads == 1);
        let all_heads = across || Rule::of(params, multiprocessors).all_heads;
        Self {
            // A plan has fewer tokens than a grid has blocks.
            grid: [
                params.batch * params.tokens,
                match all_heads {
                    true => 1,
                    false => heads.div_ceil(rows).min(MOST_GRID_YZ),
                },
                1,
            ],
            block: [STAGED_LANES, rows, 1],
            shared_bytes: shared(rows) as u32,
            heads_log2: 0,
            warp_rows: 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_numbered_in_order() {
        for dtype in Dtype::ALL {
            for family in Family::ALL {
                for (index, kernel) in Kernel::all(family, dtype).into_iter().enumerate() {
                    assert_eq!(kernel.index(), index, "{}", kernel.name());
                }
            }
        }
    }

    #[test]
    fn few_tokens_are_those_of_all_sequences_below_the_multiprocessors() {
        let mut params = PhasorCall::default();
        for (batch, tokens, all_heads) in [
            (1, 131, false),
            (131, 1, false),
            (12, 10, false),
            (3, 43, false),
            (1, 132, true),
            (132, 1, true),
            (12, 11, true),
            (70_000, 70_000, true),
        ] {
            (params.batch, params.tokens) = (batch, tokens);
            let rule = Rule::of(&params, 132);
            assert_eq!(rule.all_heads, all_heads, "{batch} {tokens}");
        }
    }

    /// A call of so many heads of q, k and v, all of as many dims, that rotate as a whole.
    fn heads_of(heads: [u32; 3], dims: u32, batch: u32, tokens: u32) -> PhasorCall {
        let mut params = PhasorCall::default();
        (params.batch, params.tokens) = (batch, tokens);
        params.angles.pairs = dims / 2;
        (params.q.heads, params.k.heads, params.v.heads) = heads.into();
        for output in [
            &mut params.q_output,
            &mut params.k_output,
            &mut params.v_output,
        ] {
            output.head_dim = dims;
        }
        params
    }

    /// By hand: lanes are a quarter of the pairs, a warp of 32 threads serves one stream, and a token has
    /// 8 bytes for each pair and 32 more.
    #[test]
    fn blocks_of_the_fused_kernels_for_vectors() {
        use Dtype::{F16, F32};
        let few = heads_of([32, 8, 8], 128, 1, 1);
        let many = heads_of([32, 8, 8], 128, 1, 1000);
        let small = heads_of([8, 2, 2], 64, 1, 1);
        let tall = heads_of([128, 8, 8], 128, 1, 1000);
        let short = heads_of([1, 1, 0], 64, 1, 1001);
        let alone = heads_of([1, 1, 0], 64, 200, 1);
        let wide = heads_of([3, 1, 0], 256, 5, 3);
        for (params, dtype, grid, block, bytes, heads_log2) in [
            // 48 heads, one a thread, 4 in a block of 64 threads.
            (few, F16, [1, 12, 1], [16, 4, 1], 544, 0),
            // Four heads a thread, or two where that many are 64 bytes.
            (many, F16, [1000, 1, 1], [16, 12, 1], 544, 2),
            (many, F32, [1000, 1, 1], [16, 12, 1], 544, 1),
            // Streams in whole warps of 4 heads: 16 of them, 8 in a block of 64 threads.
            (small, F16, [1, 2, 1], [8, 8, 1], 288, 0),
            // No more than 256 threads.
            (tall, F16, [1000, 1, 1], [16, 16, 1], 544, 2),
            // A warp of 4 heads for each stream, of which each has one; two tokens are 128 of 160 threads.
            (short, F16, [501, 1, 1], [8, 8, 2], 576, 2),
            (alone, F16, [200, 1, 1], [8, 8, 1], 288, 2),
            // A warp is a head.
            (wide, F32, [15, 1, 1], [32, 4, 1], 1056, 0),
        ] {
            let shape = Shape::fused(&params, dtype, 132);
            assert_eq!((shape.grid, shape.block), (grid, block));
            assert_eq!((shape.shared_bytes, shape.heads_log2), (bytes, heads_log2));
            assert_eq!(shape.warp_rows, 32 / block[0]);
        }
    }

    /// By hand: a block has up to 8 heads at once, each twice as f32, beside angles and 32 bytes.
    #[test]
    fn blocks_of_the_fused_kernel_for_any_heads() {
        let staged = |params: &PhasorCall, across: u32| {
            let mut fusion = PhasorFusion::default();
            fusion.q.present = 1;
            fusion.q.norm.across_heads = across;
            let shape = Shape::staged(params, &fusion, 132);
            assert_eq!(check_stages(params, &fusion), Ok(()));
            (shape.grid, shape.block, shape.shared_bytes)
        };
        for (heads, dims, batch, tokens, across, grid, rows, bytes) in [
            ([32, 8, 8], 128, 3, 2, 0, [6, 4, 1], 8, 512 + 32 + 8192),
            ([5, 1, 0], 128, 3, 2, 0, [6, 1, 1], 5, 512 + 32 + 5120),
            ([32, 8, 8], 128, 4, 100, 0, [400, 1, 1], 8, 512 + 32 + 8192),
            // All heads of q as they are, and a sum for each.
            (
                [32, 8, 8],
                128,
                3,
                2,
                1,
                [6, 1, 1],
                8,
                512 + 32 + 4 * (40 * 128 + 32),
            ),
            (
                [3, 8, 8],
                128,
                3,
                2,
                1,
                [6, 1, 1],
                8,
                512 + 32 + 4 * (11 * 128 + 4),
            ),
            // As many as fit 48 KiB.
            ([32, 8, 8], 2000, 3, 2, 0, [6, 16, 1], 2, 8000 + 32 + 32_000),
            (
                [32, 8, 8],
                3070,
                3,
                2,
                0,
                [6, 32, 1],
                1,
                12_288 + 32 + 24_560,
            ),
        ] {
            let params = heads_of(heads, dims, batch, tokens);
            let expected = (grid, [32, rows, 1], bytes);
            assert_eq!(
                staged(&params, across),
                expected,
                "{heads:?} {dims} {across}"
            );
        }
    }

    #[test]
    fn stages_fit_shared_memory_to_its_last_byte() {
        let mut params = heads_of([1, 1, 0], 4, 1, 1);
        let mut fusion = PhasorFusion::default();
        fusion.q.present = 1;
        // 16 bytes of angles and 32 more, and a head twice.
        params.q_output.head_dim = 6138;
        assert_eq!(check_stages(&params, &fusion), Ok(()));
        params.q_output.head_dim = 6139;
        let (tensor, most) = (TensorName::Q, 49_152);
        let bytes = 16 + 32 + 8 * 6139;
        let too_large = Error::StagesTooLarge {
            tensor,
            bytes,
            most,
        };
        assert_eq!(check_stages(&params, &fusion), Err(too_large));
        // What has no heads needs none, and what has no stages is not there.
        params.q.heads = 0;
        assert_eq!(check_stages(&params, &fusion), Ok(()));
        (params.q_output.head_dim, params.k_output.head_dim) = (64, 6139);
        params.q.heads = 1;
        assert_eq!(check_stages(&params, &fusion), Ok(()));
    }

    #[test]
    fn blocks_respect_the_hardware() {
        const MAX_PAIRS: u32 = MAX_ROTARY_DIM as u32 / 2;
        let mut params = PhasorCall::default();
        params.k_output.nowhere = 1;
        for (batch, tokens) in [
            (1, 1),
            (3, 2),
            (1, 100),
            (70_000, 2),
            (1, (1 << 31) - 1),
            (40_000, 50_000),
        ] {
            for heads in [1, 5, 40, 1000, (1 << 28) - 1] {
                for (pairs, head_dim) in [
                    (4, 8),
                    (8, 128),
                    (36, 72),
                    (256, 512),
                    (260, MOST_CARRIED_DIMS),
                    (MAX_PAIRS, 2 * MAX_PAIRS),
                ] {
                    for kernel in [Family::Rope, Family::Append]
                        .into_iter()
                        .flat_map(|family| Kernel::all(family, Dtype::F16))
                    {
                        for multiprocessors in [1, 132] {
                            (params.batch, params.tokens) = (batch, tokens);
                            let append = kernel.family == Family::Append;
                            let v_heads = if append { heads } else { 0 };
                            (params.q.heads, params.k.heads, params.v.heads) =
                                (heads, heads, v_heads);
                            params.angles.pairs = pairs;
                            for output in [
                                &mut params.q_output,
                                &mut params.k_output,
                                &mut params.v_output,
                            ] {
                                output.head_dim = head_dim;
                            }
                            let pairs_of_lane = kernel.vector() as u32;
                            let shape = Shape::new(&params, kernel, multiprocessors);
                            let ([gx, gy, gz], [x, y, z]) = (shape.grid, shape.block);
                            assert!(x >= 1 && y >= 1 && z >= 1 && x * y * z <= MOST_THREADS);
                            assert!(z <= 64 && z <= tokens);
                            let chunks = match append {
                                true => head_dim.div_ceil(2 * pairs_of_lane),
                                false => pairs / pairs_of_lane,
                            };
                            assert!(x <= chunks && x * gz >= chunks);
                            assert!(gx >= 1 && gy >= 1 && gz >= 1);
                            assert!(gy <= 65_535 && gz <= 65_535 && gx < 1 << 31);
                            // Every token has a place.
                            assert!(
                                u64::from(gx) >= u64::from(batch) * u64::from(tokens.div_ceil(z))
                            );
                            // The head loop goes 4 rounds of the grid's heads past the last one, and
                            // looks 3 further.
                            let step = u64::from(gy) * u64::from(y);
                            assert!(3 * u64::from(heads) + step * 7 < 1 << 32);
                            assert!(shape.shared_bytes <= 20 << 10);
                            let place = if append { PLACE_BYTES } else { 0 };
                            let token_bytes = 8 * x * pairs_of_lane + place;
                            assert_eq!(shape.shared_bytes, token_bytes * z);
                            // So many heads of a thread are in flight at most.
                            assert!(shape.heads_log2 <= 2);
                        }
                    }
                }
            }
        }
    }
}
