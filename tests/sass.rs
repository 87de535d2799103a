//! What the assembler makes of the kernels: for every architecture no spills and no local memory,
//! 16-byte accesses on the wide paths, and the numbers of docs/kernel-sass.md, from which
//! docs/gpu-prediction.md follows. `PHASOR_WRITE_SASS_TABLE=1` writes both.
//!
//! Needs `ptxas` and `nvdisasm` (and `cuobjdump`, where the build made a fatbin) in PATH, and for
//! the numbers the version of ptxas in scripts/requirements-toolkit.txt; without them the tests say
//! so and pass, unless `PHASOR_REQUIRE_CUDA_TOOLS=1`.

#[path = "support/sass.rs"]
mod sass;

use phasor::launch::{
    Addresses, AngleAddresses, AngleKind, Kernel, Launch, PositionAddresses, PositionDtype,
    RowAddresses, TensorAddresses,
};
use phasor::{
    CosSinTable, Dtype, Frequencies, Layout, OutOfRange, Pairing, Plan, PositionKind,
    PositionMemory, Problem, Rope,
};
use sass::{Code, Counts, Way};
use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

const ARCHITECTURES: [&str; 7] = [
    "sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120",
];

/// (dtype, compute_75, compute_80)
const PREBUILT: [(&str, &str, &str); 3] = [
    (
        "f32",
        include_str!("../cuda/prebuilt/rope_f32.compute_75.ptx"),
        include_str!("../cuda/prebuilt/rope_f32.compute_80.ptx"),
    ),
    (
        "f16",
        include_str!("../cuda/prebuilt/rope_f16.compute_75.ptx"),
        include_str!("../cuda/prebuilt/rope_f16.compute_80.ptx"),
    ),
    (
        "bf16",
        include_str!("../cuda/prebuilt/rope_bf16.compute_75.ptx"),
        include_str!("../cuda/prebuilt/rope_bf16.compute_80.ptx"),
    ),
];

#[cfg(phasor_fatbin)]
const FATBINS: [(&str, &[u8]); 3] = [
    (
        "f32",
        include_bytes!(concat!(env!("OUT_DIR"), "/rope_f32.fatbin")),
    ),
    (
        "f16",
        include_bytes!(concat!(env!("OUT_DIR"), "/rope_f16.fatbin")),
    ),
    (
        "bf16",
        include_bytes!(concat!(env!("OUT_DIR"), "/rope_bf16.fatbin")),
    ),
];

/// Whether the tool runs; skipping is said, or refused.
fn has(tool: &str) -> bool {
    let found = Command::new(tool)
        .arg("--version")
        .output()
        .is_ok_and(|output| output.status.success());
    if !found {
        assert!(
            std::env::var("PHASOR_REQUIRE_CUDA_TOOLS").as_deref() != Ok("1"),
            "PHASOR_REQUIRE_CUDA_TOOLS=1, but {tool} is not in PATH"
        );
        skipped(&format!("{tool} is not in PATH"));
    }
    found
}

/// Straight to stderr, which the test harness does not swallow.
fn skipped(why: &str) {
    let _ = writeln!(std::io::stderr(), "skipped: {why}");
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {text}");
    text.into_owned()
}

fn write(folder: &Path, name: &str, contents: &[u8]) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, contents).unwrap();
    path
}

/// What ptxas reports of a module, and the machine code by function.
fn assemble(folder: &Path, architecture: &str, ptx: &str) -> (String, Vec<(String, String)>) {
    let ptx = write(folder, "kernels.ptx", ptx.as_bytes());
    let cubin = folder.join("kernels.cubin");
    let report = run(Command::new("ptxas")
        .args(["-v", "-arch", architecture, "-o"])
        .arg(&cubin)
        .arg(&ptx));
    let sass = run(Command::new("nvdisasm").arg("-c").arg(&cubin));
    (report, functions(&sass, ".section\t.text."))
}

/// Machine code by function: (name, text).
fn functions(sass: &str, marker: &str) -> Vec<(String, String)> {
    sass.split(marker)
        .skip(1)
        .map(|part| {
            let (head, body) = part.split_once('\n').unwrap();
            let end = head
                .find(|c: char| !(c.is_alphanumeric() || c == '_'))
                .unwrap_or(head.len());
            let name = head[..end].to_string();
            (name, body.to_string())
        })
        .filter(|(name, _)| name.starts_with("rope_"))
        .collect()
}

/// Loads and stores of q and k in one function.
fn check_accesses(context: &str, name: &str, body: &str) {
    assert!(
        !body.contains("LDL") && !body.contains("STL"),
        "{context} {name} uses local memory"
    );
    let count = |prefix: &str, suffix: &str| {
        body.lines()
            .filter(|line| {
                line.split_whitespace().any(|word| {
                    word.starts_with(prefix)
                        && word.split('.').any(|part| part == suffix)
                        && !word.contains("CONSTANT")
                })
            })
            .count()
    };
    let (loads, stores) = (count("LDG", "128"), count("STG", "128"));
    if name.ends_with("_narrow") {
        assert_eq!((loads, stores), (0, 0), "{context} {name}");
    } else {
        // Four heads in flight, two places each, and the copies of dims that do not rotate.
        assert!(loads >= 8, "{context} {name}: {loads} loads of 128 bits");
        assert!(stores >= 8, "{context} {name}: {stores} stores of 128 bits");
        let narrow = body
            .lines()
            .any(|line| line.contains("STG") && !line.contains(".128"));
        assert!(!narrow, "{context} {name} stores less than 128 bits");
    }
}

#[test]
fn prebuilt_ptx_assembles_without_spills() {
    if !has("ptxas") || !has("nvdisasm") {
        return;
    }
    let known = run(Command::new("ptxas").arg("--help"));
    let folder = tempfile::tempdir().unwrap();
    for (dtype, compute_75, compute_80) in PREBUILT {
        for architecture in ARCHITECTURES {
            if !known.contains(&format!("'{architecture}'")) {
                println!("skipped: this ptxas does not know {architecture}");
                continue;
            }
            let text = if architecture == "sm_75" {
                compute_75
            } else {
                compute_80
            };
            let context = format!("{dtype} {architecture}");
            let (report, functions) = assemble(folder.path(), architecture, text);
            let frames: Vec<_> = report
                .lines()
                .filter(|line| line.contains("bytes stack frame"))
                .collect();
            assert_eq!(frames.len(), Kernel::PER_DTYPE, "{context}: {report}");
            for frame in frames {
                assert_eq!(
                    frame.trim(),
                    "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads",
                    "{context}: {report}"
                );
            }
            assert_eq!(functions.len(), Kernel::PER_DTYPE, "{context}");
            for (name, body) in functions {
                check_accesses(&context, &name, &body);
            }
        }
    }
}

#[cfg(phasor_fatbin)]
#[test]
fn fatbins_hold_code_without_local_memory() {
    if !has("cuobjdump") || !has("nvdisasm") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for (dtype, bytes) in FATBINS {
        let fatbin = write(folder.path(), "kernels.fatbin", bytes);
        let usage = run(Command::new("cuobjdump").arg("-res-usage").arg(&fatbin));
        let lines: Vec<_> = usage.lines().filter(|line| line.contains("REG:")).collect();
        assert!(
            !lines.is_empty() && lines.len().is_multiple_of(Kernel::PER_DTYPE),
            "{usage}"
        );
        for line in lines {
            assert!(
                line.contains("STACK:0") && line.contains("LOCAL:0"),
                "{dtype}: {line}"
            );
        }
        let sass = run(Command::new("cuobjdump").arg("-sass").arg(&fatbin));
        let functions = functions(&sass, "Function : ");
        assert!(!functions.is_empty());
        for (name, body) in functions {
            check_accesses(&format!("{dtype} fatbin"), &name, &body);
        }
        let ptx = run(Command::new("cuobjdump").arg("-lptx").arg(&fatbin));
        assert!(
            ptx.contains(".ptx"),
            "{dtype}: no PTX for newer GPUs: {ptx}"
        );
    }
}

/// Limits of a multiprocessor: CUDA C++ Programming Guide, "Technical Specifications per Compute
/// Capability".
struct Multiprocessor {
    architecture: &'static str,
    warps: u32,
    blocks: u32,
}

const MULTIPROCESSORS: [Multiprocessor; 4] = [
    Multiprocessor {
        architecture: "sm_80",
        warps: 64,
        blocks: 32,
    },
    Multiprocessor {
        architecture: "sm_90",
        warps: 64,
        blocks: 32,
    },
    Multiprocessor {
        architecture: "sm_100",
        warps: 64,
        blocks: 32,
    },
    Multiprocessor {
        architecture: "sm_120",
        warps: 48,
        blocks: 24,
    },
];

impl Multiprocessor {
    /// Warps that are resident together. It has four schedulers, each with 16,384 registers, which
    /// a warp takes in units of 256.
    fn resident_warps(&self, registers: u32, threads: u32) -> u32 {
        let warps_of_block = threads.div_ceil(32);
        let by_registers = 4 * (16_384 / (registers * 32).next_multiple_of(256));
        let blocks = (self.warps.min(by_registers) / warps_of_block).min(self.blocks);
        blocks * warps_of_block
    }
}

/// What is known of a kernel on one architecture.
struct Measured {
    registers: u32,
    counts: Counts,
}

/// Figures by architecture and kernel name; none where the tools for them are not there.
fn measure_all() -> Option<HashMap<(&'static str, String), Measured>> {
    if !has("ptxas") || !has("nvdisasm") {
        return None;
    }
    let version = run(Command::new("ptxas").arg("--version"));
    let pinned = include_str!("../scripts/requirements-toolkit.txt")
        .lines()
        .find_map(|line| line.strip_prefix("nvidia-cuda-nvcc=="))
        .unwrap();
    if !version.contains(&format!("V{pinned}\n")) {
        let why = format!("the tables are of ptxas {pinned}; the one in PATH is {version}");
        assert!(
            std::env::var("PHASOR_REQUIRE_CUDA_TOOLS").as_deref() != Ok("1"),
            "{why}"
        );
        skipped(&why);
        return None;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut measured = HashMap::new();
    for Multiprocessor { architecture, .. } in MULTIPROCESSORS {
        for (_, _, compute_80) in PREBUILT {
            let (report, functions) = assemble(folder.path(), architecture, compute_80);
            let registers = registers(&report);
            for (name, body) in functions {
                let figures = Measured {
                    registers: registers[&name],
                    counts: Code::parse(&body).counts(),
                };
                // Four heads, two places each, loaded and stored.
                assert_eq!(figures.counts.round.accesses, 16, "{architecture} {name}");
                measured.insert((architecture, name), figures);
            }
        }
    }
    Some(measured)
}

/// Registers by kernel, of kernels that use nothing else that limits occupancy.
fn registers(report: &str) -> HashMap<String, u32> {
    let mut registers = HashMap::new();
    for part in report.split("Compiling entry function '").skip(1) {
        let (name, part) = part.split_once('\'').unwrap();
        let (_, used) = part.split_once("Used ").unwrap();
        let (count, rest) = used.split_once(" registers").unwrap();
        let rest = rest.lines().next().unwrap();
        assert!(!rest.contains("smem"), "{name} uses shared memory: {rest}");
        registers.insert(name.to_string(), count.parse().unwrap());
    }
    registers
}

const HEADS: [usize; 2] = [32, 8];
const HEAD_DIM: usize = 128;

/// How the library launches a kernel on q and k of Llama 3 8B, in place.
fn launch(kernel: Kernel, tokens: usize, multiprocessors: u32) -> Launch {
    let frequencies = Frequencies::from_theta(5e5, HEAD_DIM).unwrap();
    let pairs = HEAD_DIM / 2;
    let pairing = kernel.pairing().unwrap_or(Pairing::HalfSplit);
    let rope = match kernel.angles {
        AngleKind::Exact => Rope::new(frequencies, pairing),
        AngleKind::Rows => {
            let axis_of_pair: Vec<_> = (0..pairs).map(|pair| pair % 2).collect();
            Rope::new(frequencies.with_axes(2, &axis_of_pair).unwrap(), pairing)
        }
        AngleKind::Table => {
            let table = CosSinTable::new(vec![1.0; pairs], vec![0.0; pairs], pairs).unwrap();
            Rope::new(table.with_out_of_range(OutOfRange::Clamp), pairing)
        }
    };
    // Any address will do; one that is no multiple of 16 bytes makes the narrow kernel needed.
    let aligned = 1 << 20;
    let address = aligned
        + if kernel.is_wide() {
            0
        } else {
            kernel.dtype.size() as u64
        };
    let tensor = TensorAddresses {
        source: address,
        destination: address,
    };
    let (kind, angles, positions) = match kernel.angles {
        AngleKind::Exact => (
            PositionKind::Start,
            AngleAddresses::Exact { steps: aligned },
            PositionAddresses::Start(0),
        ),
        AngleKind::Rows => (
            PositionKind::PerAxis,
            AngleAddresses::Rows {
                steps: aligned,
                factors: aligned,
            },
            PositionAddresses::Ids {
                address: aligned,
                dtype: PositionDtype::I64,
            },
        ),
        AngleKind::Table => (
            PositionKind::Start,
            AngleAddresses::Table {
                cos: aligned,
                sin: aligned,
            },
            PositionAddresses::Start(0),
        ),
    };
    let problem = Problem::new(kernel.dtype)
        .q(Layout::tokens(tokens, HEADS[0], HEAD_DIM))
        .k(Layout::tokens(tokens, HEADS[1], HEAD_DIM))
        .positions(kind);
    let plan = Plan::new(&rope, &problem, PositionMemory::Device).unwrap();
    let addresses = Addresses {
        q: tensor,
        k: tensor,
        angles,
        positions,
        rows: RowAddresses::None,
    };
    let launch = plan.launch(&addresses, multiprocessors).unwrap().unwrap();
    assert_eq!(launch.kernel, kernel);
    launch
}

/// A launch in the terms of the tables.
struct Work {
    threads_of_block: u32,
    warps: f64,
    heads_of_thread: u32,
}

impl Work {
    fn of(launch: &Launch) -> Work {
        let threads_of_block = launch.block.iter().product::<u32>();
        let blocks: f64 = launch.grid.iter().map(|&n| f64::from(n)).product();
        let heads = HEADS.iter().sum::<usize>() as u32;
        Work {
            threads_of_block,
            warps: blocks * f64::from(threads_of_block.div_ceil(32)),
            heads_of_thread: heads.div_ceil(launch.grid[1] * launch.block[1]),
        }
    }
}

impl Measured {
    /// Rounds of a thread that visits so many heads; a round that is not full counts in part.
    fn rounds(&self, heads: u32) -> f64 {
        // Two places of a head, each loaded and stored.
        f64::from(heads) / (self.counts.round.accesses / 4) as f64
    }

    /// Instructions of a thread that visits so many heads of one token.
    fn instructions(&self, heads: u32) -> f64 {
        let Counts {
            once,
            angles,
            round,
            ..
        } = self.counts;
        (once + angles) as f64 + self.rounds(heads) * round.instructions as f64
    }
}

/// docs/kernel-sass.md
fn table(measured: &HashMap<(&'static str, String), Measured>) -> String {
    let mut page = String::from(TABLE_INTRODUCTION);
    for multiprocessor in &MULTIPROCESSORS {
        let architecture = multiprocessor.architecture;
        writeln!(page, "\n## {architecture}\n").unwrap();
        page.push_str(
            "| kernel | registers | threads | heads | warps | code | once | angles | round | bytes | round / 16 B | all / 16 B |\n\
             | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n",
        );
        for kernel in Dtype::ALL.into_iter().flat_map(Kernel::all) {
            let name = kernel.name();
            let figures = &measured[&(architecture, name.clone())];
            let Measured { registers, counts } = *figures;
            let Way {
                bytes,
                instructions: round,
                ..
            } = counts.round;
            let work = Work::of(&launch(kernel, 8192, 100));
            let threads = work.threads_of_block;
            let resident = multiprocessor.resident_warps(registers, threads);
            let heads = work.heads_of_thread;
            let moved = figures.rounds(heads) * bytes as f64;
            writeln!(
                page,
                "| {name} | {registers} | {threads} | {heads} | {resident} of {} | {} | {} | {} | {round} | {bytes} | {:.1} | {:.1} |",
                multiprocessor.warps,
                counts.all,
                counts.once,
                counts.angles,
                round as f64 * 16.0 / bytes as f64,
                figures.instructions(heads) * 16.0 / moved,
            )
            .unwrap();
        }
    }
    page
}

const TABLE_INTRODUCTION: &str = "\
# The kernels' machine code

Written by `cargo test --test sass` with `PHASOR_WRITE_SASS_TABLE=1`; without it, that test fails
where a number here is not what it finds. It assembles the checked-in PTX for compute_80 with the
ptxas that `scripts/requirements-toolkit.txt` pins. What a driver's own assembler or nvcc makes of
the kernels may differ.

- **registers**: of a thread. No kernel uses local memory, spills or shared memory.
- **threads**: of a block, as the library launches it on q and k of Llama 3 8B (32 and 8 heads of
  128), 8,192 tokens. The narrow kernels are launched so where an address is not a multiple of 16
  bytes.
- **heads**: that a thread of that launch visits, for one token.
- **warps**: resident on a multiprocessor, of the most it can hold: the theoretical occupancy. Limits
  are those of the CUDA C++ Programming Guide, \"Technical Specifications per Compute Capability\":
  65,536 registers; 64 warps and 32 blocks, or 48 and 24 on sm_120. A warp gets registers in units of
  256, from the quarter that belongs to its scheduler.
- **code**: instructions of the function.
- **once**: executed by a thread outside the loop over heads: the longest way from the entry to the
  loop, and the shortest from the loop to the end, which is the way of a call in place.
- **angles**: executed to form the angles of a thread's dims, once per token, within the first round;
  with one axis. It is what the longest way round the loop has more than the one below.
- **round**: executed in one round of the loop over heads, which rotates four heads: the longest way
  round the loop without blocks that load angles (`LDG` with `CONSTANT`). Of the ways round, only
  those that miss no load or store of q and k count. Instructions whose predicate is false are
  counted, as they take an issue slot.
- **bytes**: of q and k that a thread loads and stores in a round.
- **round / 16 B**: instructions of a round for each 16 bytes that it loads or stores: the cost of
  moving and rotating. A wide kernel moves 16 bytes by one instruction; a narrow one 4 or 2.
- **all / 16 B**: the same with `once` and `angles`, for a thread that visits as many heads as said; a
  round of fewer than four counts in part. Where there is less work a thread visits fewer heads.

The loop over heads is the innermost loop that loads, multiplies and stores. Instructions are issue
slots: some of them hold their unit for two cycles or more (64-bit multiply-adds, conversions, and
on sm_80 all f32 arithmetic), so time follows them only where issue is the limit.
";

/// A GPU that a prediction is made for.
struct Gpu {
    name: &'static str,
    architecture: &'static str,
    multiprocessors: u32,
    /// GHz.
    clock: f64,
    /// TB/s, and the share of it that one stream read and one written get.
    memory: (f64, f64),
    /// TB/s, and the largest q and k in MB that stay in it.
    cache: (f64, f64),
    /// Microseconds from one launch to the next of a kernel that does next to nothing.
    launch: f64,
}

const GPUS: [Gpu; 4] = [
    Gpu {
        name: "H100 SXM",
        architecture: "sm_90",
        multiprocessors: 132,
        clock: 1.755,
        memory: (3.35, 0.88),
        cache: (6.3, 31.0),
        launch: 2.4,
    },
    Gpu {
        name: "A100 SXM 80 GB",
        architecture: "sm_80",
        multiprocessors: 108,
        clock: 1.41,
        memory: (2.04, 0.85),
        cache: (3.8, 23.0),
        launch: 2.6,
    },
    Gpu {
        name: "RTX 5090",
        architecture: "sm_120",
        multiprocessors: 170,
        clock: 2.41,
        memory: (1.79, 0.88),
        cache: (6.1, 80.0),
        launch: 1.7,
    },
    Gpu {
        name: "B200",
        architecture: "sm_100",
        multiprocessors: 148,
        clock: 1.85,
        memory: (8.0, 0.88),
        cache: (12.6, 62.0),
        launch: 2.4,
    },
];

const TOKENS: [usize; 7] = [1, 32, 256, 2048, 8192, 32_768, 65_536];
/// Cycles between two instructions of a warp that has its scheduler to itself.
const CYCLES_ALONE: f64 = 2.0;

/// Microseconds.
struct Prediction {
    megabytes: f64,
    memory: f64,
    /// `None` where q and k do not fit.
    cache: Option<f64>,
    issue: f64,
    thread: f64,
}

impl Prediction {
    fn new(gpu: &Gpu, figures: &Measured, kernel: Kernel, tokens: usize) -> Prediction {
        let work = Work::of(&launch(kernel, tokens, gpu.multiprocessors));
        let heads = HEADS.iter().sum::<usize>();
        let resident = (tokens * heads * HEAD_DIM * kernel.dtype.size()) as f64 / 1e6;
        let megabytes = 2.0 * resident;
        let instructions = figures.instructions(work.heads_of_thread);
        let (bandwidth, share) = gpu.memory;
        let (cache, fits) = gpu.cache;
        let slots_per_us = f64::from(gpu.multiprocessors) * 4.0 * gpu.clock * 1e3;
        Prediction {
            megabytes,
            memory: megabytes / (bandwidth * share),
            cache: (resident <= fits).then_some(megabytes / cache),
            issue: work.warps * instructions / slots_per_us,
            thread: instructions * CYCLES_ALONE / (gpu.clock * 1e3),
        }
    }

    /// The time if the launch were free, with what limits it.
    fn limit(&self, memory: f64, name: &'static str) -> (f64, &'static str) {
        [
            (memory, name),
            (self.issue, "issue"),
            (self.thread, "thread"),
        ]
        .into_iter()
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .unwrap()
    }
}

/// docs/gpu-prediction.md
fn prediction(measured: &HashMap<(&'static str, String), Measured>) -> String {
    let mut page = String::from(PREDICTION_INTRODUCTION);
    page.push_str(
        "\n## Assumed\n\n\
         | GPU | multiprocessors | clock, GHz | memory, TB/s | share | L2, TB/s | fits in L2, MB | launch, µs |\n\
         | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n",
    );
    for gpu in &GPUS {
        writeln!(
            page,
            "| {} | {} | {} | {} | {} | {} | {} | {} |",
            gpu.name,
            gpu.multiprocessors,
            gpu.clock,
            gpu.memory.0,
            gpu.memory.1,
            gpu.cache.0,
            gpu.cache.1,
            gpu.launch
        )
        .unwrap();
    }
    page.push_str(SOURCES);
    for gpu in &GPUS {
        writeln!(page, "\n## {}\n", gpu.name).unwrap();
        page.push_str(
            "| tokens | type | MB | memory | issue | thread | bound | predicted, µs | TB/s | in L2, µs |\n\
             | ---: | --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: |\n",
        );
        for tokens in TOKENS {
            for dtype in [Dtype::Bf16, Dtype::F32] {
                let kernel = Kernel::all(dtype)[0];
                let figures = &measured[&(gpu.architecture, kernel.name())];
                let p = Prediction::new(gpu, figures, kernel, tokens);
                let (limit, name) = p.limit(p.memory, "memory");
                let bound = if limit < gpu.launch { "launch" } else { name };
                let predicted = gpu.launch + limit;
                let in_cache = p.cache.map_or("-".to_string(), |cache| {
                    format!("{:.1}", gpu.launch + p.limit(cache, "L2").0)
                });
                writeln!(
                    page,
                    "| {tokens} | {dtype} | {:.2} | {:.1} | {:.1} | {:.1} | {bound} | {predicted:.1} | {:.2} | {in_cache} |",
                    p.megabytes,
                    p.memory,
                    p.issue,
                    p.thread,
                    p.megabytes / predicted,
                )
                .unwrap();
            }
        }
    }
    page
}

const PREDICTION_INTRODUCTION: &str = "\
# Times predicted before any measurement

No GPU has run these kernels yet. This page says what to expect of the first one, so that it can be
wrong. `tests/sass.rs` writes it, with `PHASOR_WRITE_SASS_TABLE=1`, from the formulas below and the
instructions of [kernel-sass.md](kernel-sass.md), and fails where it is out of date. Measurements go to
`benches/results`, and are to be held against this page as it was for the kernels measured.

The case is that of `benches/cuda.rs`: q and k of Llama 3 8B (32 and 8 heads of 128), half-split,
exact angles, in place, one launch after another on a stream, each on other buffers. Four limits:

- **memory**: bytes read and written / (memory bandwidth * share).
- **issue**: warps * instructions of a thread / (multiprocessors * 4 schedulers * clock).
  Instructions of a thread are `once + angles + heads / 4 * round` of kernel-sass.md, with the heads
  that it visits in this launch: 8 where there are enough tokens, else fewer.
- **thread**: instructions of one thread * 2 cycles / clock: what a warp needs that has its scheduler
  to itself.
- **launch**: from one launch to the next of a kernel that does next to nothing.

The prediction is launch + the largest of the other three: launches on one stream do not overlap,
and the sum is what fits kernels that scale an array, at every size (see below). `bound` is the
largest of the four. `in L2` takes the bandwidth of L2 for that of memory, where q and k fit: the
projection before may just have written them.
";

const SOURCES: &str = "
Memory, L2 and launch are recorded, for a kernel that reads one array and writes another, by
[gpu-benches](https://github.com/te42kyfo/gpu-benches) (`gpu-small-kernels`, `cuda-stream`): time is
launch + bytes / bandwidth, with 2.4 µs and 6.3 TB/s in L2 up to 31 MB on an H200; 2.6 µs, 3.8 TB/s
up to 23 MB and 85% of memory bandwidth on an A100 80 GB; 1.7 µs, 5.1 TB/s up to 80 MB and 88% on an
L40. An H100 PCIe got 84% by 8 bytes a load. What is not recorded is carried over: H100 SXM from H200,
RTX 5090 from L40 (L2 by multiprocessors), B200 from H200 (L2 twice, one for each die). 88% is
between that 84% and the 93% that others claim of a rotary kernel on a B200 (Liger-Kernel #1282). If
the driver gives a B200 7.7 TB/s, as some report, its memory column grows by 4%. Clocks are low
boost clocks; a GPU that holds a higher one has less issue and thread.

What would point at the kernels rather than at this page: from 2,048 tokens on, more than 1.15 times
the predicted time on H100, A100 or RTX 5090, or different times for bf16 and f32 at the same MB. On
B200 issue comes closest to memory, with few warps to overlap the two: there, up to the sum of both
columns would be no surprise.
";

#[test]
fn tables_are_those_of_the_code() {
    let Some(measured) = measure_all() else {
        return;
    };
    let write = std::env::var("PHASOR_WRITE_SASS_TABLE").as_deref() == Ok("1");
    let mut stale = String::new();
    for (name, page) in [
        ("kernel-sass.md", table(&measured)),
        ("gpu-prediction.md", prediction(&measured)),
    ] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("docs")
            .join(name);
        if write {
            std::fs::write(path, page).unwrap();
            continue;
        }
        let committed = std::fs::read_to_string(&path).unwrap_or_default();
        if committed != page {
            writeln!(stale, "docs/{name}:").unwrap();
            let (mut section, mut said) = ("", "");
            for (was, now) in committed.lines().zip(page.lines()) {
                if now.starts_with("## ") {
                    section = now;
                }
                if was != now {
                    if section != said {
                        writeln!(stale, "{section}").unwrap();
                        said = section;
                    }
                    writeln!(stale, "- {was}\n+ {now}").unwrap();
                }
            }
        }
    }
    assert!(
        stale.is_empty(),
        "{stale}The kernels' code is not what is written (-) but another (+). If that is meant, write it \
         with PHASOR_WRITE_SASS_TABLE=1 and say why in the commit."
    );
}

/// A loop over heads in which angles are formed, in a loop over tokens that ends with a loop that
/// copies; and the end of the listing, which nothing reaches.
const LISTING: &str = "
        /*0000*/    S2R R0, SR_TID.X ;
        /*0010*/    @P0 EXIT ;
.L_x_1:
        /*0020*/    LDG.E.64.CONSTANT R2, desc[UR4][R2.64] ;
.L_x_2:
        /*0030*/    LDG.E.NA.128 R4, desc[UR4][R2.64] ;
        /*0040*/    @P1 BRA `(.L_x_3) ;
        /*0050*/    LDG.E.128.CONSTANT R8, desc[UR4][R2.64] ;
        /*0060*/    FMUL R8, R8, R8 ;
        /*0070*/    FMUL R8, R8, R8 ;
.L_x_3:
        /*0080*/    BRA.U !UP0, `(.L_x_4) ;
        /*0090*/    FMUL R8, R8, R8 ;
.L_x_4:
        /*00a0*/    STG.E.NA.128 desc[UR4][R2.64], R4 ;
        /*00b0*/    @P1 BRA `(.L_x_2) ;
        /*00c0*/    @P2 BRA `(.L_x_6) ;
.L_x_5:
        /*00d0*/    LDG.E.NA.128 R4, desc[UR4][R2.64] ;
        /*00e0*/    STG.E.NA.128 desc[UR4][R2.64], R4 ;
        /*00f0*/    @P2 BRA `(.L_x_5) ;
.L_x_6:
        /*0100*/    @P2 CALL.REL.NOINC `(.L_x_7) ;
        /*0110*/    BRA `(.L_x_1) ;
.L_x_7:
        /*0120*/    EXIT ;
.L_x_8:
        /*0130*/    BRA `(.L_x_8);
        /*0140*/    NOP;
";

#[test]
fn instructions_are_counted_by_the_rule() {
    let expected = Counts {
        all: 19,
        // Three before the loop; the branch past the copies, the call, the end.
        once: 6,
        angles: 3,
        round: Way {
            bytes: 32,
            instructions: 6,
            accesses: 2,
        },
    };
    assert_eq!(Code::parse(LISTING).counts(), expected);
    // What is added to the round, and only that, is seen.
    let doubled = LISTING.replace(
        "STG.E.NA.128 desc[UR4][R2.64], R4 ;\n        /*00b0*/",
        "NOP ;\n        /*00a8*/    STG.E.NA.128 desc[UR4][R2.64], R4 ;\n        /*00b0*/",
    );
    let mut more = expected;
    more.all += 1;
    more.round.instructions += 1;
    assert_eq!(Code::parse(&doubled).counts(), more);
}
