//! How many machine instructions the warps of a launch issue: the PTX runs in the interpreter, which counts how
//! often each line is executed, and the assembler says which line each instruction was made of.

use crate::ptx_backend::run_counting;
use phasor::call::{
    Addresses, AngleAddresses, CacheAddresses, RawPositions, StageAddresses, TensorAddresses,
    VectorAddress,
};
use phasor::launch::{Launch, Target};
use phasor::norm::HeadNorm;
use phasor::quantize::{Codes, ScaleForm};
use phasor::{
    CacheLayout, Dtype, Frequencies, IdType, Ids, KvCacheLayout, Layout, Pairing, Plan, Problem,
    Rope, SlotsIn, Stages, StoredCodes,
};
use ptx_interpreter::{Memory, Module};
use std::collections::{BTreeMap, HashSet};

/// What is done to packed q, k and v beside the rotation, on the way to q in place and to k and v in a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StageSet {
    /// RMS norm of each head of q and k.
    pub norms: bool,
    /// Codes of e4m3 in the cache, by given scales.
    pub codes: bool,
}

/// Heads of q, of k and v, and their dims; slots of a page.
pub const HEADS: [usize; 2] = [32, 8];
pub const HEAD_DIM: usize = 128;
pub const PAGE_SIZE: usize = 16;

/// A step's launch, and memory in which its first blocks can run.
pub struct Step {
    pub launch: Launch,
    memory: Memory,
}

impl Step {
    /// Of so many tokens in bf16, half-split, each with its own position and slot.
    pub fn new(stages: StageSet, tokens: usize, target: &Target) -> Step {
        let dtype = Dtype::Bf16;
        let [q_heads, kv_heads] = HEADS;
        let all_heads = q_heads + 2 * kv_heads;
        let window = |first: usize, heads: usize| {
            Layout::packed_heads(1, tokens, all_heads, HEAD_DIM, first..first + heads)
        };
        let cache =
            CacheLayout::paged_nhd(tokens.div_ceil(PAGE_SIZE), PAGE_SIZE, kv_heads, HEAD_DIM);
        let mut caches = KvCacheLayout::separate(cache, cache);
        if stages.codes {
            caches = caches.with_codes(StoredCodes::given(Codes::E4m3, ScaleForm::Multiply));
        }
        let mut problem = Problem::new(dtype)
            .q(window(0, q_heads))
            .k_to_cache(window(q_heads, kv_heads))
            .v_to_cache(window(q_heads + kv_heads, kv_heads))
            .packed()
            .cache(caches);
        if stages.norms {
            let norm = Stages::new().norm(HeadNorm::rms(1e-6));
            problem = problem.q_stages(norm).k_stages(norm);
        }

        // What the first blocks read of the tokens is there.
        let mut memory = Memory::new();
        let row = all_heads * HEAD_DIM * dtype.size();
        let packed = memory.add_sparse("packed", (tokens * row) as u64, 0);
        let some = tokens.min(64);
        memory.write(packed, &[0x3f; 2].repeat(some * row / 2));
        let cache_bytes = cache.required_len().unwrap() as u64 * 2;
        let [k_cache, v_cache] = ["k", "v"].map(|name| memory.add_sparse(name, cache_bytes, 0));
        let ids: Vec<u8> = (0..tokens as i64).flat_map(i64::to_le_bytes).collect();
        let mut constant = |name, bytes: Vec<u8>| {
            let address = memory.add(name, bytes, 0);
            memory.set_constant(address);
            address
        };
        let positions = constant("positions", ids.clone());
        let slots = constant("slots", ids);
        let rope = Rope::new(
            Frequencies::from_theta(5e5, HEAD_DIM).unwrap(),
            Pairing::HalfSplit,
        );
        let phasor::Angles::Exact(frequencies) = rope.angles() else {
            panic!("exact angles")
        };
        let steps = frequencies.steps().iter().flat_map(|s| s.to_le_bytes());
        let steps = constant("steps", steps.collect());
        let vector = |address, len| Some(VectorAddress { address, len });
        let weight = constant("weight", [0x80, 0x3f].repeat(HEAD_DIM));
        let scale = constant("scale", 1.0f32.to_le_bytes().to_vec());
        let report = constant("report", vec![0; 4]);
        let norm_weight = if stages.norms {
            vector(weight, HEAD_DIM)
        } else {
            None
        };
        let scales = if stages.codes { vector(scale, 1) } else { None };
        let normed = StageAddresses {
            norm_weight,
            ..StageAddresses::default()
        };
        let stored = StageAddresses { scales, ..normed };
        let plain = StageAddresses {
            norm_weight: None,
            ..stored
        };
        let tensor = TensorAddresses {
            source: packed,
            destination: packed,
        };
        let ids = |address| Ids::at(address, IdType::I64, tokens);
        let addresses = Addresses {
            q: tensor,
            k: tensor,
            v: tensor,
            angles: AngleAddresses::Steps { steps, factors: 0 },
            positions: RawPositions::per_token(ids(positions)),
            cache: Some(CacheAddresses {
                k: k_cache,
                v: v_cache,
                slots: SlotsIn::mapping(ids(slots)),
                report,
            }),
            stages: Some([normed, stored, plain]),
        };
        let plan = Plan::new(&rope, &problem).unwrap();
        let call = plan.call(&addresses).unwrap().unwrap();
        Step {
            launch: call.launch(target),
            memory,
        }
    }

    /// What the warps of one token issue, in the blocks that share its heads. `listing` is the kernel's, with
    /// lines of the module's text.
    pub fn issued(&mut self, module: &Module, listing: &str) -> Issued {
        let mut first = self.launch;
        assert_eq!(first.block[2], 1, "a block is of one token");
        first.grid[0] = 1;
        let stats = run_counting(module, &mut self.memory, &first, true, true);
        let stats = stats.unwrap();
        let all = weighed(listing, &stats.lines);
        let after_wait = weighed(listing, &stats.lines_after_wait);
        let threads: u32 = first.block.iter().product();
        Issued {
            warps: threads.div_ceil(32) * first.grid[1] * first.grid[2],
            all,
            after_wait,
        }
    }
}

/// Machine instructions that warps issue.
pub struct Issued {
    pub warps: u32,
    pub all: u64,
    /// Of those, what they issue when they have waited for earlier work.
    pub after_wait: u64,
}

/// Each instruction as often as the line that it was made of was executed. Ways that are not taken share lines
/// with those that are, and are left out: of divisions and roots of numbers next to zero (what follows the last
/// end of a thread, and calls that lead there, with the return address before and what follows up to a branch),
/// and of shuffles in warps that have parted (from where `BRA.DIV` leads up to a branch).
fn weighed(listing: &str, lines: &BTreeMap<u32, u64>) -> u64 {
    let (common, _) = listing.rsplit_once(" EXIT ").expect("a thread ends");
    let mut line = 0;
    let mut issued = 0;
    let (mut last, mut is_rare) = (0, false);
    let labels = |text: &'_ str| {
        text.split_once("`(")?
            .1
            .split_once(')')
            .map(|(label, _)| label.to_owned())
    };
    let parted: HashSet<String> = common
        .lines()
        .filter(|text| text.contains(" BRA.DIV "))
        .filter_map(labels)
        .collect();
    for text in common.lines().map(str::trim) {
        if let Some(place) = text.strip_prefix("//## File") {
            let (_, number) = place.split_once("line ").expect("a line");
            let digits = number.find(|c: char| !c.is_ascii_digit());
            line = number[..digits.unwrap_or(number.len())].parse().unwrap();
        } else if let Some(label) = text.strip_suffix(':') {
            is_rare |= parted.contains(label);
        } else if text.starts_with("/*") && text.contains(';') {
            let times = lines.get(&line).copied().unwrap_or(0);
            if text.contains("CALL") && text.contains("slowpath") {
                issued -= last;
                is_rare = true;
            }
            if !is_rare {
                issued += times;
            }
            is_rare &= !text.contains(" BRA ");
            last = times;
        }
    }
    issued
}
