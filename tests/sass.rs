//! What the assembler makes of the kernels: for every architecture no spills and no local memory,
//! accesses of q and k by the width that each element type was given, and behind the wait of a
//! dependent launch; and the numbers of docs/kernel-sass.md, from which docs/gpu-prediction.md
//! follows. `PHASOR_WRITE_SASS_TABLE=1` writes both.
//!
//! Needs `ptxas` and `nvdisasm` (and `cuobjdump`, where the build made a fatbin) in PATH, and for
//! the numbers the version of ptxas in scripts/requirements-toolkit.txt; without them the tests say
//! so and pass, unless `PHASOR_REQUIRE_CUDA_TOOLS=1`.

#[path = "support/executed.rs"]
mod executed;
#[path = "support/kernel_cases.rs"]
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod kernel_cases;
#[path = "support/ptx_backend.rs"]
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod ptx_backend;
#[path = "support/sass.rs"]
mod sass;

use executed::{HEAD_DIM, HEADS, Issued, PAGE_SIZE, StageSet, Step};
use phasor::call::{
    Addresses, AngleAddresses, CacheAddresses, PhasorCall, RawPositions, StageAddresses,
    TensorAddresses, VectorAddress,
};
use phasor::launch::{Family, Kernel, Launch, LaunchMode, Target};
use phasor::norm::HeadNorm;
use phasor::{
    CacheLayout, Dtype, Frequencies, IdType, Ids, KvCacheLayout, Layout, Pairing, Plan, Problem,
    Rope, SlotsIn, Stages,
};
use ptx_interpreter::Module;
use sass::{Accesses, Bank, Code, Effect, End};
use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Each with the prebuilt image that a driver takes there, by its place in `PREBUILT`.
const ARCHITECTURES: [(&str, usize); 7] = [
    ("sm_75", 0),
    ("sm_80", 1),
    ("sm_86", 1),
    ("sm_89", 1),
    ("sm_90", 2),
    ("sm_100", 2),
    ("sm_120", 2),
];

/// A module, and its images for compute_75, compute_80 and compute_90.
type Prebuilt = (Family, Dtype, [&'static str; 3]);

macro_rules! prebuilt {
    ($family:ident, $dtype:ident, $name:literal) => {
        (
            Family::$family,
            Dtype::$dtype,
            [
                include_str!(concat!("../cuda/prebuilt/", $name, ".compute_75.ptx")),
                include_str!(concat!("../cuda/prebuilt/", $name, ".compute_80.ptx")),
                include_str!(concat!("../cuda/prebuilt/", $name, ".compute_90.ptx")),
            ],
        )
    };
}

const PREBUILT: [Prebuilt; 9] = [
    prebuilt!(Rope, F32, "rope_f32"),
    prebuilt!(Rope, F16, "rope_f16"),
    prebuilt!(Rope, Bf16, "rope_bf16"),
    prebuilt!(Append, F32, "append_f32"),
    prebuilt!(Append, F16, "append_f16"),
    prebuilt!(Append, Bf16, "append_bf16"),
    prebuilt!(Fused, F32, "fused_f32"),
    prebuilt!(Fused, F16, "fused_f16"),
    prebuilt!(Fused, Bf16, "fused_bf16"),
];

#[cfg(phasor_fatbin)]
macro_rules! fatbin {
    ($family:ident, $dtype:ident, $name:literal) => {
        (
            Family::$family,
            Dtype::$dtype,
            include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".fatbin")),
        )
    };
}

#[cfg(phasor_fatbin)]
const FATBINS: [(Family, Dtype, &[u8]); 9] = [
    fatbin!(Rope, F32, "rope_f32"),
    fatbin!(Rope, F16, "rope_f16"),
    fatbin!(Rope, Bf16, "rope_bf16"),
    fatbin!(Append, F32, "append_f32"),
    fatbin!(Append, F16, "append_f16"),
    fatbin!(Append, Bf16, "append_bf16"),
    fatbin!(Fused, F32, "fused_f32"),
    fatbin!(Fused, F16, "fused_f16"),
    fatbin!(Fused, Bf16, "fused_bf16"),
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

/// What ptxas reports of a module, and the machine code by kernel.
fn assemble(
    folder: &Path,
    architecture: &str,
    module: (Family, Dtype),
    ptx: &str,
) -> (String, Vec<(Kernel, String)>) {
    let ptx = write(folder, "kernels.ptx", ptx.as_bytes());
    let cubin = folder.join("kernels.cubin");
    let report = run(Command::new("ptxas")
        .args(["-v", "-arch", architecture, "-o"])
        .arg(&cubin)
        .arg(&ptx));
    (report, disassemble(&cubin, module))
}

/// The listing of each kernel of a module.
fn disassemble(cubin: &Path, (family, dtype): (Family, Dtype)) -> Vec<(Kernel, String)> {
    let listing = run(Command::new("nvdisasm").arg("-c").arg(cubin));
    let listings: HashMap<&str, &str> = listing
        .split(".section\t.text.")
        .skip(1)
        .filter_map(|part| part.split_once(','))
        .collect();
    assert_eq!(listings.len(), Kernel::PER_MODULE, "{}", cubin.display());
    let listing = |kernel: Kernel| (kernel, listings[kernel.name().as_str()].to_string());
    Kernel::all(family, dtype).map(listing).to_vec()
}

fn code(kernel: Kernel, listing: &str) -> Code {
    let accesses = match kernel.pairing {
        Some(_) => Accesses::Vectors,
        None => Accesses::Elements(kernel.dtype.size()),
    };
    Code::parse(listing, accesses)
}

/// Of an architecture, as a number.
fn compute_capability(architecture: &str) -> u32 {
    architecture["sm_".len()..].parse().unwrap()
}

fn check(architecture: &str, kernel: Kernel, listing: &str) {
    let context = format!("{} {architecture}", kernel.name());
    for opcode in ["LDL", "STL"] {
        assert!(!listing.contains(opcode), "{context} uses local memory");
    }
    let code = code(kernel, listing);
    check_accesses(&context, kernel, &code);
    if compute_capability(architecture) >= 90 {
        check_waits(&context, architecture, &code);
    } else {
        assert!(!code.has("ACQBULK") && !code.has("PREEXIT"), "{context}");
    }
}

/// q, k and v are accessed by the kernel's width alone, and ids never through the non-coherent cache. Codes are
/// stored four at a time or, like scales of a byte, alone.
fn check_accesses(context: &str, kernel: Kernel, code: &Code) {
    let size = kernel.dtype.size();
    let width = kernel.vector() * size;
    let vectors = kernel.pairing.is_some();
    let has_codes = kernel.family == Family::Fused;
    let mut seen: HashMap<(Effect, usize), usize> = HashMap::new();
    for access in code.accesses() {
        if let Effect::Load | Effect::Store = access.effect {
            let element = (access.bytes, access.leaves_l1) == (width, vectors);
            let code = has_codes
                && access.effect == Effect::Store
                && matches!((access.bytes, access.leaves_l1), (1 | 4, false));
            assert!(element || code, "{context}: {}", access.text);
        }
        *seen.entry((access.effect, access.bytes)).or_default() += 1;
    }
    let angle = size_of::<f32>();
    // Heads that are loaded together and stored together, of two places each.
    let (loaded, stored) = match (has_codes, vectors) {
        (false, _) => (4, 4),
        (true, true) => (8 / size, 1),
        (true, false) => (1, 1),
    };
    for (effect, bytes, at_least) in [
        (Effect::Load, width, 2 * loaded),
        (Effect::Store, width, 2 * stored),
        // Positions and rows, of either width; some assemblers share a load.
        (Effect::LoadId, 4, 2),
        (Effect::LoadId, 8, 2),
        // Steps; a factor, and a cosine and a sine of a table.
        (Effect::LoadConstant, 8, 1),
        (Effect::LoadConstant, angle, 3),
    ] {
        let found = seen.get(&(effect, bytes)).copied().unwrap_or_default();
        assert!(
            found >= at_least,
            "{context}: {found} times {effect:?} of {bytes} bytes: {seen:?}"
        );
    }
    for what in ["STS", "BAR", "LDS"] {
        assert!(code.has(what), "{context} shares no angles: no {what}");
    }
}

/// On no way is anything read that earlier work may write, nor written, nor is there an end, before
/// the wait; with angles formed before it, ids are promised.
fn check_waits(context: &str, architecture: &str, code: &Code) {
    assert!(code.has("PREEXIT"), "{context} lets no dependents start");
    for early in [false, true] {
        let mut parameters = vec![None; size_of::<PhasorCall>()];
        for (n, byte) in u32::from(early).to_le_bytes().into_iter().enumerate() {
            parameters[std::mem::offset_of!(PhasorCall, angles_before_wait) + n] = Some(byte);
        }
        let bank = Bank::new(architecture, parameters);
        let wrong: Vec<_> = code
            .before_waiting(&bank)
            .into_iter()
            .filter(|(effect, _)| match effect {
                Some(Effect::Load | Effect::Store | Effect::StoreFlag) | None => true,
                Some(Effect::LoadId) => !early,
                Some(_) => false,
            })
            .collect();
        assert!(wrong.is_empty(), "{context}, early {early}: {wrong:?}");
    }
}

#[test]
fn prebuilt_ptx_assembles_without_spills() {
    if !has("ptxas") || !has("nvdisasm") {
        return;
    }
    let known = run(Command::new("ptxas").arg("--help"));
    let folder = tempfile::tempdir().unwrap();
    for (family, dtype, images) in PREBUILT {
        let module = (family, dtype);
        for (architecture, image) in ARCHITECTURES {
            if !known.contains(&format!("'{architecture}'")) {
                println!("skipped: this ptxas does not know {architecture}");
                continue;
            }
            let (report, kernels) = assemble(folder.path(), architecture, module, images[image]);
            let lines = |what| report.lines().filter(move |line| line.contains(what));
            assert_eq!(
                lines("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads").count(),
                Kernel::PER_MODULE,
                "{} {dtype} {architecture}: {report}",
                family.name()
            );
            // A barrier, and no shared memory but what the launch brings.
            assert_eq!(
                lines("used 1 barriers").count(),
                Kernel::PER_MODULE,
                "{report}"
            );
            assert_eq!(lines(" smem").count(), 0, "{report}");
            for (kernel, listing) in kernels {
                check(architecture, kernel, &listing);
            }
        }
    }
}

/// Only steps, and factors and tables, come through the non-coherent cache.
#[test]
fn ids_are_not_loaded_as_constants() {
    for (_, dtype, images) in PREBUILT {
        for ptx in images {
            let loads = ptx.lines().filter(|line| line.contains("ld.global.nc"));
            let mut count = 0;
            for load in loads {
                let step = load.contains("ld.global.nc.u64");
                let value = load.contains("ld.global.nc.f32");
                assert!(step || value, "{dtype}: {load}");
                count += 1;
            }
            assert!(count > 0, "{dtype}");
        }
    }
}

#[cfg(phasor_fatbin)]
#[test]
fn fatbins_hold_code_without_local_memory() {
    if !has("cuobjdump") || !has("nvdisasm") {
        return;
    }
    for (family, dtype, bytes) in FATBINS {
        let folder = tempfile::tempdir().unwrap();
        let fatbin = write(folder.path(), "kernels.fatbin", bytes);
        let usage = run(Command::new("cuobjdump").arg("-res-usage").arg(&fatbin));
        let lines: Vec<_> = usage.lines().filter(|line| line.contains("REG:")).collect();
        assert!(
            !lines.is_empty() && lines.len().is_multiple_of(Kernel::PER_MODULE),
            "{usage}"
        );
        for line in lines {
            assert!(
                line.contains("STACK:0") && line.contains("LOCAL:0"),
                "{dtype}: {line}"
            );
        }
        let ptx = run(Command::new("cuobjdump").arg("-lptx").arg(&fatbin));
        assert!(
            ptx.contains(".ptx"),
            "{dtype}: no PTX for newer GPUs: {ptx}"
        );
        run(Command::new("cuobjdump")
            .args(["-xelf", "all"])
            .arg(&fatbin)
            .current_dir(folder.path()));
        let mut found = 0;
        for entry in std::fs::read_dir(folder.path()).unwrap() {
            // Such as kernels.2.sm_90.cubin.
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            let Some(architecture) = name.split('.').find(|part| part.starts_with("sm_")) else {
                continue;
            };
            for (kernel, listing) in disassemble(&path, (family, dtype)) {
                check(architecture, kernel, &listing);
            }
            found += 1;
        }
        assert!(found > 0, "{dtype}: no machine code in the fatbin");
    }
}

/// Limits of a multiprocessor: CUDA C++ Programming Guide, "Technical Specifications per Compute
/// Capability".
struct Multiprocessor {
    architecture: &'static str,
    warps: u32,
    blocks: u32,
    shared_kib: u32,
}

const MULTIPROCESSORS: [Multiprocessor; 4] = [
    Multiprocessor {
        architecture: "sm_80",
        warps: 64,
        blocks: 32,
        shared_kib: 164,
    },
    Multiprocessor {
        architecture: "sm_90",
        warps: 64,
        blocks: 32,
        shared_kib: 228,
    },
    Multiprocessor {
        architecture: "sm_100",
        warps: 64,
        blocks: 32,
        shared_kib: 228,
    },
    Multiprocessor {
        architecture: "sm_120",
        warps: 48,
        blocks: 24,
        shared_kib: 100,
    },
];

impl Multiprocessor {
    /// Blocks that are resident together. It has four schedulers, each with 16,384 registers, which
    /// a warp takes in units of 256; a block takes shared memory in units of 128 bytes, and 1 KiB for
    /// the system.
    fn resident_blocks(&self, registers: u32, threads: u32, shared_bytes: u32) -> u32 {
        let warps_of_block = threads.div_ceil(32);
        let by_registers = 4 * (16_384 / (registers * 32).next_multiple_of(256));
        let by_shared = (self.shared_kib << 10) / (shared_bytes.next_multiple_of(128) + 1024);
        (self.warps.min(by_registers) / warps_of_block)
            .min(self.blocks)
            .min(by_shared)
    }
}

fn multiprocessor(architecture: &str) -> &'static Multiprocessor {
    let mut all = MULTIPROCESSORS.iter();
    all.find(|m| m.architecture == architecture).unwrap()
}

/// What is known of a kernel on one architecture.
struct Figures {
    registers: u32,
    code: Code,
    /// What forming an angle ends with.
    formed: Vec<Effect>,
    /// The parameters of a call from a start, in place, with exact angles.
    ordinary: Bank,
    settled: Bank,
}

/// Heads that a kernel has in flight.
const HEADS_IN_FLIGHT: usize = 4;

/// Loads or stores of so many heads, of two places each.
fn places(effect: Effect, heads: usize) -> Vec<Effect> {
    vec![effect; 2 * heads]
}

impl Figures {
    fn new(architecture: &str, kernel: Kernel, registers: u32, listing: &str) -> Figures {
        let bank = |mode| {
            let launch = launch(kernel, 8192, &Target::new(100).with_mode(mode));
            let parameters = launch.params.as_bytes().iter().copied();
            Bank::new(architecture, parameters.map(Some).collect())
        };
        let code = code(kernel, listing);
        let stored = code
            .accesses()
            .find(|access| access.effect == Effect::StoreShared);
        let stores = 2 * size_of::<f32>() / stored.expect("angles are stored").bytes;
        Figures {
            registers,
            code,
            formed: vec![Effect::StoreShared; stores],
            ordinary: bank(LaunchMode::Ordinary),
            settled: bank(LaunchMode::DependentPositionsSettled),
        }
    }

    fn way(&self, bank: &Bank, effects: &[Effect], end: End) -> usize {
        let way = self.code.way(bank, effects, end);
        way.unwrap_or_else(|| panic!("no way with {effects:?}"))
    }

    /// What a thread does that forms so many angles and visits so many heads.
    fn effects(&self, heads: usize, angles: usize) -> Vec<Effect> {
        let in_flight = |done: usize| (heads - done).min(HEADS_IN_FLIGHT);
        let mut effects = places(Effect::Load, in_flight(0));
        effects.extend(self.formed.repeat(angles));
        for done in (0..heads).step_by(HEADS_IN_FLIGHT) {
            let rotated = in_flight(done);
            effects.extend(places(Effect::Store, rotated));
            effects.extend(places(Effect::Load, in_flight(done + rotated)));
        }
        effects
    }

    /// Instructions of a thread, from its start to its end.
    fn thread(&self, heads: usize, angles: usize) -> usize {
        self.way(&self.ordinary, &self.effects(heads, angles), End::Thread)
    }

    /// To its first load of q and k.
    fn first_load(&self) -> usize {
        self.way(&self.ordinary, &[Effect::Load], End::LastEffect)
    }

    /// To the barrier, with as many heads in flight as there can be.
    fn barrier(&self, angles: usize) -> usize {
        let mut effects = places(Effect::Load, HEADS_IN_FLIGHT);
        effects.extend(self.formed.repeat(angles));
        effects.push(Effect::Barrier);
        self.way(&self.ordinary, &effects, End::LastEffect)
    }

    /// One round more of the loop over heads.
    fn round(&self) -> usize {
        self.thread(2 * HEADS_IN_FLIGHT, 1) - self.thread(HEADS_IN_FLIGHT, 1)
    }

    /// Of a thread that has one angle and one head, from the wait on, where it has formed the angle
    /// before; `None` where kernels never wait.
    fn after_wait(&self) -> Option<usize> {
        let mut waited = self.formed.clone();
        waited.push(Effect::Wait);
        let before = self.code.way(&self.settled, &waited, End::LastEffect)?;
        waited.extend(places(Effect::Load, 1));
        waited.extend(places(Effect::Store, 1));
        Some(self.way(&self.settled, &waited, End::Thread) - before)
    }
}

/// Figures by architecture and kernel; none where the tools for them are not there.
fn measure_all() -> Option<HashMap<(&'static str, Kernel), Figures>> {
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
        let image = ARCHITECTURES.iter().find(|(a, _)| *a == architecture);
        let (_, image) = image.unwrap();
        for (family, dtype, images) in PREBUILT {
            let module = (family, dtype);
            let (report, kernels) = assemble(folder.path(), architecture, module, images[*image]);
            let registers = registers(&report);
            for (kernel, listing) in kernels {
                let registers = registers[&kernel.name()];
                let figures = Figures::new(architecture, kernel, registers, &listing);
                measured.insert((architecture, kernel), figures);
            }
        }
    }
    Some(measured)
}

/// Registers by kernel.
fn registers(report: &str) -> HashMap<String, u32> {
    let mut registers = HashMap::new();
    for part in report.split("Compiling entry function '").skip(1) {
        let (name, part) = part.split_once('\'').unwrap();
        let (_, used) = part.split_once("Used ").unwrap();
        let (count, _) = used.split_once(" registers").unwrap();
        registers.insert(name.to_string(), count.parse().unwrap());
    }
    registers
}

/// Heads that a kernel visits: those of q and k, and of v where it appends.
fn heads_of(family: Family) -> usize {
    let values = match family {
        Family::Rope => 0,
        _ => HEADS[1],
    };
    HEADS.iter().sum::<usize>() + values
}

/// How the library launches a kernel on q and k of Llama 3 8B, in place; one that appends on q in place, and
/// on k and v that go to a paged cache alone, by slots; one with stages so with the norm of q and k.
fn launch(kernel: Kernel, tokens: usize, target: &Target) -> Launch {
    let frequencies = Frequencies::from_theta(5e5, HEAD_DIM).unwrap();
    let rope = Rope::new(frequencies, kernel.pairing.unwrap_or(Pairing::HalfSplit));
    // Any address will do; one that is no multiple of a vector's size takes single elements.
    let aligned = 1 << 20;
    let address = match kernel.pairing {
        Some(_) => aligned,
        None => aligned + kernel.dtype.size() as u64,
    };
    let tensor = TensorAddresses {
        source: address,
        destination: address,
    };
    let [q, k] = HEADS.map(|heads| Layout::tokens(tokens, heads, HEAD_DIM));
    let appends = kernel.family != Family::Rope;
    let norms = kernel.family == Family::Fused;
    let problem = Problem::new(kernel.dtype).q(q);
    let problem = match appends {
        false => problem.k(k),
        true => {
            let cache = CacheLayout::paged_nhd(tokens, PAGE_SIZE, HEADS[1], HEAD_DIM);
            let caches = KvCacheLayout::separate(cache, cache);
            problem.k_to_cache(k).v_to_cache(k).cache(caches)
        }
    };
    let problem = match norms {
        false => problem,
        true => {
            let norm = Stages::new().norm(HeadNorm::rms(1e-6));
            problem.q_stages(norm).k_stages(norm)
        }
    };
    let weight = StageAddresses {
        norm_weight: Some(VectorAddress {
            address,
            len: HEAD_DIM,
        }),
        ..StageAddresses::default()
    };
    let cache = appends.then(|| CacheAddresses {
        k: address,
        v: address,
        slots: SlotsIn::mapping(Ids::at(aligned, IdType::I64, tokens)),
        report: aligned,
    });
    let addresses = Addresses {
        q: tensor,
        k: tensor,
        angles: AngleAddresses::Steps {
            steps: aligned,
            factors: aligned,
        },
        positions: RawPositions::start(0),
        v: match appends {
            true => tensor,
            false => TensorAddresses::default(),
        },
        cache,
        stages: norms.then_some([weight, weight, StageAddresses::default()]),
    };
    let plan = Plan::new(&rope, &problem).unwrap();
    let call = plan.call(&addresses).unwrap().unwrap();
    let launch = call.launch(target);
    assert_eq!(launch.kernel, kernel);
    launch
}

/// A launch in the terms of the tables.
struct Work {
    blocks: u32,
    threads_of_block: u32,
    shared_bytes: u32,
    heads_of_thread: usize,
    /// Of the thread that forms the most, for each warp of a block.
    angles_of_warps: Vec<usize>,
}

impl Work {
    fn of(launch: &Launch) -> Work {
        let [lanes, rows, tokens] = launch.block.map(|n| n as usize);
        let angles = lanes * launch.kernel.vector();
        let threads_of_token = lanes * rows;
        let of_thread = |thread: usize| {
            let rest = angles.saturating_sub(thread % threads_of_token);
            rest.div_ceil(threads_of_token)
        };
        let threads: Vec<usize> = (0..threads_of_token * tokens).collect();
        let of_warp = |warp: &[usize]| warp.iter().map(|&n| of_thread(n)).max().unwrap();
        let heads = heads_of(launch.kernel.family);
        Work {
            blocks: launch.grid.iter().product(),
            threads_of_block: threads.len() as u32,
            shared_bytes: launch.shared_bytes,
            heads_of_thread: heads.div_ceil(launch.grid[1] as usize * rows),
            angles_of_warps: threads.chunks(32).map(of_warp).collect(),
        }
    }

    /// Instructions that the warps of a block issue, given those of a thread that visits so many heads
    /// and forms so many angles.
    fn issued(&self, thread: impl Fn(usize, usize) -> usize) -> usize {
        let warps = self.angles_of_warps.iter();
        warps
            .map(|&angles| thread(self.heads_of_thread, angles))
            .sum()
    }
}

/// Bytes that a thread moves of so many heads: two places each, loaded and stored.
fn bytes_of_heads(kernel: Kernel, heads: usize) -> usize {
    heads * 2 * 2 * kernel.vector() * kernel.dtype.size()
}

fn kernel(dtype: Dtype, pairing: Pairing) -> Kernel {
    let mut all = Kernel::all(Family::Rope, dtype).into_iter();
    all.find(|kernel| kernel.pairing == Some(pairing)).unwrap()
}

/// A kernel of commit 1af16f0 on sm_90, from docs/kernel-sass.md of that commit. Each thread formed
/// the angles of its own pairs, and accessed 16 bytes at a time.
struct Earlier {
    dtype: Dtype,
    pairing: Pairing,
    registers: u32,
    code: usize,
    /// Outside the loop over heads.
    once: usize,
    /// To form all angles of a thread.
    angles: usize,
    /// A round of four heads, which moves 256 bytes.
    round: usize,
}

const EARLIER: [Earlier; 4] = [
    Earlier {
        dtype: Dtype::Bf16,
        pairing: Pairing::HalfSplit,
        registers: 120,
        code: 984,
        once: 184,
        angles: 339,
        round: 385,
    },
    Earlier {
        dtype: Dtype::Bf16,
        pairing: Pairing::Interleaved,
        registers: 120,
        code: 983,
        once: 183,
        angles: 339,
        round: 385,
    },
    Earlier {
        dtype: Dtype::F32,
        pairing: Pairing::HalfSplit,
        registers: 112,
        code: 671,
        once: 181,
        angles: 173,
        round: 242,
    },
    Earlier {
        dtype: Dtype::F32,
        pairing: Pairing::Interleaved,
        registers: 110,
        code: 688,
        once: 180,
        angles: 173,
        round: 259,
    },
];

impl Earlier {
    fn thread(&self, heads: usize) -> usize {
        self.once + self.angles + heads * self.round / 4
    }

    /// How it was launched for so many tokens on 132 multiprocessors.
    fn work(&self, tokens: usize) -> Work {
        // Grid, threads of a block, heads of a thread.
        let wide = self.dtype == Dtype::F32;
        let (blocks, threads, heads) = match (tokens, wide) {
            (..=32, false) => (2 * tokens, 256, 1),
            (..=32, true) => (3 * tokens, 256, 1),
            (..=256, _) => (2 * tokens, 256, if wide { 2 } else { 1 }),
            (_, false) => (tokens.div_ceil(6), 240, 8),
            (_, true) => (tokens.div_ceil(3), 240, 8),
        };
        Work {
            blocks: blocks as u32,
            threads_of_block: threads,
            shared_bytes: 0,
            heads_of_thread: heads,
            angles_of_warps: vec![1; 8],
        }
    }
}

/// What the assembler made on sm_90 of the prototype that the measurements are of, with this reader's
/// counts: the half-split kernel with exact angles formed once per block, no more options, in place;
/// 8 bytes an access in bf16, 16 in f32, four heads in flight.
struct Prototype {
    dtype: Dtype,
    registers: u32,
    code: usize,
    first_load: usize,
    angle: usize,
    barrier: usize,
    round: usize,
    one_token: usize,
    /// Of a thread that visits four heads: without an angle, and with one.
    four_heads: [usize; 2],
    /// Where the angles are formed before the wait.
    after_wait: usize,
    shared_bytes: u32,
}

const PROTOTYPES: [Prototype; 2] = [
    Prototype {
        dtype: Dtype::Bf16,
        registers: 51,
        code: 445,
        first_load: 59,
        angle: 92,
        barrier: 263,
        round: 305,
        one_token: 236,
        four_heads: [334, 426],
        after_wait: 86,
        shared_bytes: 8320,
    },
    Prototype {
        dtype: Dtype::F32,
        registers: 70,
        code: 413,
        first_load: 59,
        angle: 92,
        barrier: 263,
        round: 273,
        one_token: 228,
        four_heads: [302, 394],
        after_wait: 90,
        shared_bytes: 8320,
    },
];

impl Prototype {
    fn thread(&self, heads: usize, angles: usize) -> usize {
        match heads {
            1 => self.one_token,
            4 => self.four_heads[angles],
            _ => panic!("it is launched as the library launches its kernels, with 1 or 4 heads"),
        }
    }

    /// Launched as the library launches its own kernel, which is close to the best shapes found.
    fn work(&self, tokens: usize) -> Work {
        let kernel = kernel(self.dtype, Pairing::HalfSplit);
        Work {
            shared_bytes: self.shared_bytes,
            ..Work::of(&launch(kernel, tokens, &Target::new(132)))
        }
    }
}

/// docs/kernel-sass.md
fn table(measured: &HashMap<(&'static str, Kernel), Figures>) -> String {
    let mut page = String::from(TABLE_INTRODUCTION);
    comparison(measured, &mut page);
    for multiprocessor in &MULTIPROCESSORS {
        let architecture = multiprocessor.architecture;
        writeln!(page, "\n## {architecture}\n").unwrap();
        page.push_str(
            "| kernel | registers | threads | shared | heads | warps | code | first load | barrier | angle | round | bytes | round / 16 B | all / 16 B | one token | after the wait |\n\
             | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n",
        );
        for kernel in Dtype::ALL
            .into_iter()
            .flat_map(|dtype| Kernel::all(Family::Rope, dtype))
        {
            let figures = &measured[&(architecture, kernel)];
            let work = Work::of(&launch(kernel, 8192, &Target::new(100)));
            let (round, bytes) = (figures.round(), bytes_of_heads(kernel, HEADS_IN_FLIGHT));
            let after_wait = figures
                .after_wait()
                .map_or("-".to_string(), |n| n.to_string());
            writeln!(
                page,
                "| {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {round} | {bytes} | {:.1} | {:.1} | {} | {after_wait} |",
                kernel.name(),
                figures.registers,
                work.threads_of_block,
                work.shared_bytes,
                work.heads_of_thread,
                work.resident(multiprocessor, figures.registers),
                figures.code.len(),
                figures.first_load(),
                figures.barrier(1),
                figures.barrier(1) - figures.barrier(0),
                16.0 * round as f64 / bytes as f64,
                work.issued_by_16_bytes(kernel, |heads, angles| figures.thread(heads, angles)),
                figures.thread(1, 1),
            )
            .unwrap();
        }
    }
    appends(measured, &mut page);
    page
}

/// The kernels that append, and those with stages. Their ways are not followed: a thread's groups are of q, k or v,
/// and the reader does not know that no group is of two.
fn appends(measured: &HashMap<(&'static str, Kernel), Figures>, page: &mut String) {
    for (family, about) in [(Family::Append, APPENDS), (Family::Fused, WITH_STAGES)] {
        page.push_str(about);
        page.push_str(
            "| architecture | kernel | registers | threads | shared | heads | warps | code |\n\
             | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |\n",
        );
        for multiprocessor in &MULTIPROCESSORS {
            let architecture = multiprocessor.architecture;
            for kernel in Dtype::ALL.map(|dtype| Kernel::all(family, dtype)).concat() {
                let figures = &measured[&(architecture, kernel)];
                let work = Work::of(&launch(kernel, 8192, &Target::new(100)));
                writeln!(
                    page,
                    "| {architecture} | {} | {} | {} | {} | {} | {} | {} |",
                    kernel.name(),
                    figures.registers,
                    work.threads_of_block,
                    work.shared_bytes,
                    work.heads_of_thread,
                    work.resident(multiprocessor, figures.registers),
                    figures.code.len(),
                )
                .unwrap();
            }
        }
    }
}

const APPENDS: &str = "
## Kernels that append

Here q is in place, and k and v (8 heads of 128 each) go to a cache of pages of 16, by slot ids. Instructions
on a thread's way are not counted.

";

const WITH_STAGES: &str = "
## Kernels with stages

The same step with an RMS norm of q and k, by a weight of their heads. What its warps execute is counted in
[gpu-prediction.md](gpu-prediction.md).

";

impl Work {
    fn resident(&self, multiprocessor: &Multiprocessor, registers: u32) -> String {
        let blocks =
            multiprocessor.resident_blocks(registers, self.threads_of_block, self.shared_bytes);
        let warps = blocks * self.threads_of_block.div_ceil(32);
        format!("{warps} of {}", multiprocessor.warps)
    }

    /// Instructions of a warp's thread for each 16 bytes that it moves, on average.
    fn issued_by_16_bytes(&self, kernel: Kernel, thread: impl Fn(usize, usize) -> usize) -> f64 {
        let bytes = self.angles_of_warps.len() * bytes_of_heads(kernel, self.heads_of_thread);
        16.0 * self.issued(thread) as f64 / bytes as f64
    }
}

/// The kernels beside those that they took the place of, and beside the prototype.
fn comparison(measured: &HashMap<(&'static str, Kernel), Figures>, page: &mut String) {
    page.push_str(COMPARISON);
    let hopper = multiprocessor("sm_90");
    for earlier in &EARLIER {
        let kernel = kernel(earlier.dtype, earlier.pairing);
        let figures = &measured[&("sm_90", kernel)];
        let work = Work::of(&launch(kernel, 8192, &Target::new(132)));
        let mut line = |name: &str, cells: [String; 10]| {
            writeln!(page, "| {name} | {} |", cells.join(" | ")).unwrap();
        };
        line(
            &kernel.name(),
            [
                figures.registers.to_string(),
                work.resident(hopper, figures.registers),
                figures.code.len().to_string(),
                figures.first_load().to_string(),
                figures.barrier(1).to_string(),
                (figures.barrier(1) - figures.barrier(0)).to_string(),
                format!(
                    "{:.1}",
                    figures.round() as f64 * 16.0 / bytes_of_heads(kernel, HEADS_IN_FLIGHT) as f64
                ),
                format!(
                    "{:.1}",
                    work.issued_by_16_bytes(kernel, |h, a| figures.thread(h, a))
                ),
                figures.thread(1, 1).to_string(),
                figures.after_wait().unwrap().to_string(),
            ],
        );
        let prototype = PROTOTYPES
            .iter()
            .find(|prototype| prototype.dtype == earlier.dtype);
        if let Some(prototype) = prototype.filter(|_| earlier.pairing == Pairing::HalfSplit) {
            let work = prototype.work(8192);
            line(
                "prototype",
                [
                    prototype.registers.to_string(),
                    work.resident(hopper, prototype.registers),
                    prototype.code.to_string(),
                    prototype.first_load.to_string(),
                    prototype.barrier.to_string(),
                    prototype.angle.to_string(),
                    format!(
                        "{:.1}",
                        prototype.round as f64 * 16.0
                            / bytes_of_heads(kernel, HEADS_IN_FLIGHT) as f64
                    ),
                    format!(
                        "{:.1}",
                        work.issued_by_16_bytes(kernel, |h, a| prototype.thread(h, a))
                    ),
                    prototype.one_token.to_string(),
                    prototype.after_wait.to_string(),
                ],
            );
        }
        let work = earlier.work(8192);
        line(
            "1af16f0",
            [
                earlier.registers.to_string(),
                work.resident(hopper, earlier.registers),
                earlier.code.to_string(),
                "-".to_string(),
                "-".to_string(),
                earlier.angles.to_string(),
                format!("{:.1}", earlier.round as f64 * 16.0 / 256.0),
                format!("{:.1}", earlier.thread(8) as f64 * 16.0 / 512.0),
                earlier.thread(1).to_string(),
                "-".to_string(),
            ],
        );
    }
}

const COMPARISON: &str = "
## Beside the earlier kernels and the prototype

On sm_90. `1af16f0` is the last commit whose threads each formed the angles of their own pairs, and
accessed 16 bytes at a time; its figures are of this page at that commit. `prototype` is a half-split
kernel in place with nothing but exact angles, formed once per block, which was measured beside
others on an H200 ([kernel-launch.md](kernel-launch.md)): what these kernels have above it is what
their generality costs. **angles** are those of a thread: one, or at 1af16f0 those of all its pairs, 8
in bf16 and 4 in f32.

| kernel | registers | warps | code | first load | barrier | angles | round / 16 B | all / 16 B | one token | after the wait |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
";

const TABLE_INTRODUCTION: &str = "\
# The kernels' machine code

Written by `cargo test --test sass` with `PHASOR_WRITE_SASS_TABLE=1`; without it, that test fails
where a number here is not what it finds. It assembles the checked-in PTX (for compute_90, and for
compute_80 on sm_80) with the ptxas that `scripts/requirements-toolkit.txt` pins. Assembled so, no
kernel uses local memory or spills. What a driver's own assembler or nvcc makes of them may differ.

The case is q and k of Llama 3 8B (32 and 8 heads of 128) in place, with exact angles, from a start.
`any` kernels are launched so where an address is not a multiple of a vector's size.

- **registers**: of a thread.
- **threads**, **shared**: of a block, and its bytes of shared memory, as the library launches it for
  8,192 tokens.
- **heads**: that a thread of that launch visits.
- **warps**: resident on a multiprocessor, of the most it can hold, by registers, shared memory and
  blocks. Limits are those of the CUDA C++ Programming Guide, \"Technical Specifications per Compute
  Capability\": 65,536 registers; 164 KiB of shared memory (100 on sm_120, else 228), of which a block
  takes 1 KiB besides its own; 64 warps and 32 blocks (48 and 24 on sm_120). A warp gets registers in
  units of 256, from the quarter that belongs to its scheduler.
- **code**: instructions of the function.
- **first load**: instructions that a thread executes up to its first load of q and k.
- **barrier**: the same up to the block's barrier, with four heads in flight and one angle formed.
- **angle**: of those, what a thread that forms no angle does not execute.
- **round**: one round more of the loop over heads: it rotates and stores four heads, and loads four.
- **bytes**: of q and k that a thread moves in a round; **round / 16 B**: instructions for each 16 of
  them.
- **all / 16 B**: the same of whole threads of that launch, on average over the warps of a block, of
  which some form angles and some do not.
- **one token**: instructions of a thread that forms one angle and rotates one head, from its start to
  its end: the launch for one token.
- **after the wait**: of those, what is left after `griddepcontrol.wait` where the launch is dependent
  and the angle is formed before it.

A thread's way is the shortest that does what was said in the order of the kernel; branches that the
call's parameters decide are followed as they decide. Instructions whose predicate is false are
counted, as they take an issue slot. Instructions are issue slots: some of them hold their unit for
two cycles or more (64-bit multiply-adds, conversions, and on sm_80 all f32 arithmetic), so time
follows them only where issue is the limit.
";

/// Tokens of the measurements.
const TOKENS: [usize; 6] = [1, 32, 256, 2048, 8192, 32_768];

/// A GPU that a prediction is made for.
struct Gpu {
    name: &'static str,
    architecture: &'static str,
    multiprocessors: u32,
    /// GHz.
    clock: f64,
    /// TB/s.
    memory: f64,
}

const H200: Gpu = Gpu {
    name: "H200",
    architecture: "sm_90",
    multiprocessors: 132,
    clock: 1.98,
    memory: 4.8,
};

const OTHERS: [Gpu; 4] = [
    Gpu {
        name: "H100 SXM",
        memory: 3.35,
        ..H200
    },
    Gpu {
        name: "A100 SXM 80 GB",
        architecture: "sm_80",
        multiprocessors: 108,
        clock: 1.41,
        memory: 2.04,
    },
    Gpu {
        name: "RTX 5090",
        architecture: "sm_120",
        multiprocessors: 170,
        clock: 2.41,
        memory: 1.79,
    },
    Gpu {
        name: "B200",
        architecture: "sm_100",
        multiprocessors: 148,
        clock: 1.85,
        memory: 8.0,
    },
];

/// Microseconds, measured: from one empty kernel to the next in graph replay, and what less a dependent
/// launch takes (copy kernel, the mean of 1, 32 and 256 tokens).
const LAUNCH: f64 = 0.53;
const DEPENDENT: f64 = 0.26;
/// What a copy kernel takes besides launch and memory: with one token, and with more.
const LATENCY: [f64; 2] = [0.69, 0.91];
/// The share of a memory's bandwidth that was reached at 32,768 tokens.
const SHARE: f64 = 0.865;
/// Cycles for each instruction of a thread, of those beyond as many as a copy hides in its latency:
/// fitted to the earlier kernels and the prototype at one token.
const CYCLES: f64 = 5.3;
const HIDDEN: f64 = 80.0;

/// Microseconds of an H200 by tokens, in graph replay on cold buffers.
struct Run {
    name: &'static str,
    dtype: Dtype,
    mode: LaunchMode,
    times: [f64; 6],
}

const COPIES: [Run; 2] = [
    Run {
        name: "copy",
        dtype: Dtype::Bf16,
        mode: LaunchMode::Ordinary,
        times: [1.22, 1.57, 2.64, 11.34, 40.65, 157.4],
    },
    Run {
        name: "copy",
        dtype: Dtype::F32,
        mode: LaunchMode::Ordinary,
        times: [1.24, 1.67, 3.89, 21.15, 79.66, 313.6],
    },
];

const RUNS: [Run; 6] = [
    Run {
        name: "1af16f0",
        dtype: Dtype::Bf16,
        mode: LaunchMode::Ordinary,
        times: [2.60, 2.89, 5.64, 13.63, 44.18, 165.7],
    },
    Run {
        name: "1af16f0",
        dtype: Dtype::F32,
        mode: LaunchMode::Ordinary,
        times: [2.26, 2.76, 6.13, 23.13, 83.45, 324.7],
    },
    Run {
        name: "prototype",
        dtype: Dtype::Bf16,
        mode: LaunchMode::Ordinary,
        times: [1.57, 2.01, 3.13, 12.13, 42.56, 163.4],
    },
    Run {
        name: "prototype",
        dtype: Dtype::Bf16,
        mode: LaunchMode::Dependent,
        times: [1.16, 1.56, 2.78, 11.90, 42.29, 163.5],
    },
    Run {
        name: "prototype",
        dtype: Dtype::Bf16,
        mode: LaunchMode::DependentPositionsSettled,
        times: [0.94, 1.23, 2.33, 11.61, 41.90, 161.7],
    },
    Run {
        name: "prototype",
        dtype: Dtype::F32,
        mode: LaunchMode::Dependent,
        times: [1.40, 1.82, 3.91, 22.16, 82.55, 326.4],
    },
];

/// What the formula takes of a kernel.
struct Subject<'a> {
    dtype: Dtype,
    registers: u32,
    one_token: usize,
    after_wait: usize,
    /// Instructions of a thread with so many heads and angles.
    thread: &'a dyn Fn(usize, usize) -> usize,
}

/// Microseconds.
struct Prediction {
    memory: f64,
    issue: f64,
    thread: f64,
    all: f64,
}

type Part = fn(&Prediction) -> f64;

impl Subject<'_> {
    fn predict(&self, gpu: &Gpu, work: &Work, tokens: usize, mode: LaunchMode) -> Prediction {
        let elements = tokens * HEADS.iter().sum::<usize>() * HEAD_DIM;
        let burden = Burden {
            registers: self.registers,
            blocks: work.blocks,
            threads_of_block: work.threads_of_block,
            shared_bytes: work.shared_bytes,
            bytes: 2 * elements * self.dtype.size(),
            issued: f64::from(work.blocks) * work.issued(self.thread) as f64,
            thread: self.one_token as f64,
            after_wait: self.after_wait as f64,
        };
        burden.predict(gpu, tokens, mode)
    }
}

/// What the formula takes of a launch.
struct Burden {
    registers: u32,
    blocks: u32,
    threads_of_block: u32,
    shared_bytes: u32,
    /// Read and written.
    bytes: usize,
    /// Instructions of all warps.
    issued: f64,
    /// Of a thread that has one head of one token, and of those what is left after the wait where angles are formed
    /// before it.
    thread: f64,
    after_wait: f64,
}

impl Burden {
    fn predict(&self, gpu: &Gpu, tokens: usize, mode: LaunchMode) -> Prediction {
        let megabytes = self.bytes as f64 / 1e6;
        let multiprocessors = f64::from(gpu.multiprocessors);
        let cycles_per_us = gpu.clock * 1e3;
        let memory = megabytes / (gpu.memory * SHARE);
        let issue = self.issued / (4.0 * multiprocessors * cycles_per_us);
        let thread = |instructions: f64| (instructions - HIDDEN).max(0.0) * CYCLES / cycles_per_us;
        let resident = multiprocessor(gpu.architecture).resident_blocks(
            self.registers,
            self.threads_of_block,
            self.shared_bytes,
        );
        let waves = f64::from(self.blocks) / (f64::from(resident) * multiprocessors);
        let second_wave = (waves - 1.0).clamp(0.0, 1.0);
        let first_wave = match mode {
            LaunchMode::DependentPositionsSettled => self.after_wait,
            _ => self.thread,
        };
        let launch = match mode {
            LaunchMode::Ordinary => LAUNCH,
            _ => LAUNCH - DEPENDENT,
        };
        let latency = LATENCY[usize::from(tokens > 1)];
        let thread = thread(first_wave) + second_wave * thread(self.thread);
        Prediction {
            memory,
            issue,
            thread,
            all: launch + latency + (thread + memory).max(issue),
        }
    }
}

/// Of a run of the earlier kernels or of the prototype.
fn predict_run(run: &Run, tokens: usize) -> f64 {
    let prediction = if run.name == "prototype" {
        let prototype = PROTOTYPES.iter().find(|p| p.dtype == run.dtype).unwrap();
        let subject = Subject {
            dtype: run.dtype,
            registers: prototype.registers,
            one_token: prototype.one_token,
            after_wait: prototype.after_wait,
            thread: &|heads, angles| prototype.thread(heads, angles),
        };
        subject.predict(&H200, &prototype.work(tokens), tokens, run.mode)
    } else {
        let mut all = EARLIER.iter();
        let is_it = |e: &&Earlier| e.dtype == run.dtype && e.pairing == Pairing::HalfSplit;
        let earlier = all.find(is_it).unwrap();
        let subject = Subject {
            dtype: run.dtype,
            registers: earlier.registers,
            one_token: earlier.thread(1),
            after_wait: earlier.thread(1),
            thread: &|heads, _| earlier.thread(heads),
        };
        subject.predict(&H200, &earlier.work(tokens), tokens, run.mode)
    };
    prediction.all
}

const fn mode_name(mode: LaunchMode) -> &'static str {
    match mode {
        LaunchMode::Ordinary => "ordinary",
        LaunchMode::Dependent => "dependent",
        _ => "settled",
    }
}

const MODES: [LaunchMode; 3] = [
    LaunchMode::Ordinary,
    LaunchMode::Dependent,
    LaunchMode::DependentPositionsSettled,
];

/// docs/gpu-prediction.md
fn prediction(measured: &HashMap<(&'static str, Kernel), Figures>) -> String {
    let predict = |gpu: &Gpu, dtype, tokens, mode| {
        let kernel = kernel(dtype, Pairing::HalfSplit);
        let figures = &measured[&(gpu.architecture, kernel)];
        let one_token = figures.thread(1, 1);
        let subject = Subject {
            dtype,
            registers: figures.registers,
            one_token,
            after_wait: figures.after_wait().unwrap_or(one_token),
            thread: &|heads, angles| figures.thread(heads, angles),
        };
        let work = Work::of(&launch(kernel, tokens, &Target::new(gpu.multiprocessors)));
        subject.predict(gpu, &work, tokens, mode)
    };
    let mut page = String::from(PREDICTION_INTRODUCTION);

    page.push_str(HOW_WELL);
    head::<6>(&mut page, "kernel | type | launch |");
    let mut worst = [0.0f64; 2];
    for run in &RUNS {
        let (name, dtype, mode) = (run.name, run.dtype, mode_name(run.mode));
        line(
            &mut page,
            &format!("{name} | {dtype} | {mode} | measured"),
            run.times.map(microseconds),
        );
        let predicted: [_; 6] = std::array::from_fn(|n| {
            let predicted = predict_run(run, TOKENS[n]);
            let off = 100.0 * (predicted / run.times[n] - 1.0);
            let worst = &mut worst[usize::from(name == "prototype")];
            *worst = worst.max(off.abs());
            format!("{} ({off:+.0}%)", microseconds(predicted))
        });
        line(&mut page, " | | | predicted", predicted);
    }
    let [earlier, prototype] = worst;
    writeln!(
        page,
        "\nThe earlier kernels, which the constants were fitted to, are off by {earlier:.0}% at most, the \
         prototype by {prototype:.0}%."
    )
    .unwrap();

    page.push_str(ON_AN_H200);
    head::<6>(&mut page, "type |");
    for run in &COPIES {
        let dtype = run.dtype;
        line(
            &mut page,
            &format!("{dtype} | copy kernel, measured"),
            run.times.map(microseconds),
        );
        let parts: [(&str, Part); 3] = [
            ("memory", |p| p.memory),
            ("issue", |p| p.issue),
            ("thread", |p| p.thread),
        ];
        for (name, part) in parts {
            let times =
                TOKENS.map(|tokens| part(&predict(&H200, dtype, tokens, LaunchMode::Ordinary)));
            line(
                &mut page,
                &format!("{dtype} | {name}"),
                times.map(microseconds),
            );
        }
        for mode in MODES {
            let times = TOKENS.map(|tokens| predict(&H200, dtype, tokens, mode).all);
            let times = times.map(|time| format!("**{}**", microseconds(time)));
            line(
                &mut page,
                &format!("{dtype} | **{}**", mode_name(mode)),
                times,
            );
        }
    }

    steps(measured, &mut page);
    page.push_str(ON_OTHERS);
    head::<6>(&mut page, "GPU | type |");
    for gpu in &OTHERS {
        let has_dependent = compute_capability(gpu.architecture) >= 90;
        for dtype in [Dtype::Bf16, Dtype::F32] {
            for mode in MODES.into_iter().take(if has_dependent { 3 } else { 1 }) {
                let times = TOKENS.map(|tokens| predict(gpu, dtype, tokens, mode).all);
                let of = format!("{} | {dtype} | {}", gpu.name, mode_name(mode));
                line(&mut page, &of, times.map(microseconds));
            }
        }
    }
    page
}

/// Tokens of the measurements of whole steps.
const STEP_TOKENS: [usize; 5] = [1, 32, 256, 2048, 8192];

/// From packed q, k and v to rotated q and a written cache: measured times of a prototype and of a copy kernel of
/// as many bytes, on an H200; and what the assembler made of the prototype, counted as the kernels are.
struct StepRun {
    stages: StageSet,
    name: &'static str,
    /// Ordinary, and dependent with angles and slots before the wait.
    prototype: [[f64; 5]; 2],
    /// Of a warp of the launch for one token, whose threads have one head: ordinary, and after the wait.
    one_token: [f64; 2],
    /// Of all warps of a token, whose threads have three heads.
    token: f64,
    registers: u32,
}

const STEP_RUNS: [StepRun; 3] = [
    StepRun {
        stages: StageSet {
            norms: false,
            codes: false,
        },
        name: "rotate, append",
        prototype: [
            [1.68, 2.08, 3.35, 14.6, 51.9],
            [1.09, 1.45, 2.81, 14.1, 51.4],
        ],
        one_token: [167.0, 119.0],
        token: 2357.0,
        registers: 57,
    },
    StepRun {
        stages: StageSet {
            norms: true,
            codes: false,
        },
        name: "norm, rotate, append",
        prototype: [
            [1.80, 2.24, 3.83, 16.9, 58.0],
            [1.24, 1.63, 3.13, 14.5, 52.1],
        ],
        one_token: [232.0, 167.0],
        token: 3547.0,
        registers: 86,
    },
    StepRun {
        stages: StageSet {
            norms: true,
            codes: true,
        },
        name: "norm, rotate, append e4m3",
        prototype: [
            [1.80, 2.23, 3.83, 16.3, 55.1],
            [1.22, 1.60, 3.09, 13.9, 48.4],
        ],
        one_token: [240.0, 172.0],
        token: 3755.0,
        registers: 86,
    },
];

const STEP_MODES: [LaunchMode; 2] = [LaunchMode::Ordinary, LaunchMode::DependentPositionsSettled];

impl StepRun {
    /// Copies of as many bytes, which norms do not change: ordinary, and dependent.
    fn copies(&self) -> [[f64; 5]; 2] {
        match self.stages.codes {
            false => [
                [1.25, 1.60, 2.89, 13.8, 49.9],
                [0.99, 1.27, 2.64, 13.4, 49.6],
            ],
            true => [
                [1.28, 1.63, 2.87, 12.8, 46.3],
                [1.02, 1.26, 2.62, 12.5, 46.0],
            ],
        }
    }

    /// Bytes that a step reads and writes: q in place, k and v to the caches.
    fn bytes(&self, tokens: usize) -> usize {
        let [q, kv] = HEADS;
        let stored = if self.stages.codes { 1 } else { 2 };
        tokens * HEAD_DIM * (2 * (q + 2 * kv) + 2 * q + stored * 2 * kv)
    }

    /// The prototype as it was launched, or close to it: blocks of 16 rows of 16 lanes, three for a token up to
    /// 32 tokens, and one else.
    fn prototype(&self, tokens: usize) -> Burden {
        let few = tokens <= 32;
        let token = if few {
            24.0 * self.one_token[0]
        } else {
            self.token
        };
        Burden {
            registers: self.registers,
            blocks: tokens as u32 * if few { 3 } else { 1 },
            threads_of_block: 256,
            shared_bytes: 8576,
            bytes: self.bytes(tokens),
            issued: tokens as f64 * token,
            thread: self.one_token[0],
            after_wait: self.one_token[1],
        }
    }
}

/// What our kernels issue for a step of so many tokens.
struct StepFigures {
    kernel: Kernel,
    launch: Launch,
    issued: Issued,
}

/// Steps in the prebuilt PTX, with the lines that machine code was made of.
struct StepCode {
    family: Family,
    module: Module,
    listings: HashMap<String, String>,
}

impl StepCode {
    fn assemble(folder: &Path, family: Family) -> StepCode {
        let is_it = |&&(f, dtype, _): &&Prebuilt| (f, dtype) == (family, Dtype::Bf16);
        let (_, _, [.., ptx]) = PREBUILT.iter().find(is_it).unwrap();
        let path = write(folder, "lines.ptx", ptx.as_bytes());
        let cubin = folder.join("lines.cubin");
        run(Command::new("ptxas")
            .args(["-lineinfo", "-arch", H200.architecture, "-o"])
            .arg(&cubin)
            .arg(&path));
        let listing = run(Command::new("nvdisasm").args(["-gp", "-c"]).arg(&cubin));
        let parts = listing.split(".section\t.text.").skip(1);
        let listings = parts.filter_map(|part| part.split_once(','));
        StepCode {
            family,
            module: Module::parse(ptx).unwrap(),
            listings: listings
                .map(|(name, listing)| (name.into(), listing.into()))
                .collect(),
        }
    }
}

impl StepFigures {
    fn new(codes: &[StepCode], stages: StageSet, tokens: usize, mode: LaunchMode) -> StepFigures {
        let target = Target::new(H200.multiprocessors).with_mode(mode);
        let mut step = Step::new(stages, tokens, &target);
        let kernel = step.launch.kernel;
        let code = codes
            .iter()
            .find(|code| code.family == kernel.family)
            .unwrap();
        let issued = step.issued(&code.module, &code.listings[&kernel.name()]);
        StepFigures {
            kernel,
            launch: step.launch,
            issued,
        }
    }

    /// Of a warp, on average.
    fn warp(&self, issued: u64) -> f64 {
        issued as f64 / f64::from(self.issued.warps)
    }
}

/// Whole steps on an H200.
fn steps(measured: &HashMap<(&'static str, Kernel), Figures>, page: &mut String) {
    let folder = tempfile::tempdir().unwrap();
    let codes =
        [Family::Append, Family::Fused].map(|family| StepCode::assemble(folder.path(), family));
    let figures = |stages, tokens, mode| StepFigures::new(&codes, stages, tokens, mode);
    let [ordinary, settled] = STEP_MODES;

    page.push_str(STEPS);
    for run in &STEP_RUNS {
        let (one, late, many) = (
            figures(run.stages, 1, ordinary),
            figures(run.stages, 1, settled),
            figures(run.stages, 8192, ordinary),
        );
        let registers = measured[&(H200.architecture, many.kernel)].registers;
        let heads = (HEADS[0] + 2 * HEADS[1]) as f64;
        writeln!(
            page,
            "| {} | {} | {registers} | {:.0} | {:.0} | {:.0} | {:.0} |\n\
             | | prototype | {} | {:.0} | {:.0} | {:.0} | {:.0} |",
            run.name,
            many.kernel.name(),
            one.warp(one.issued.all),
            late.warp(late.issued.after_wait),
            many.issued.all as f64,
            many.issued.all as f64 / heads,
            run.registers,
            run.one_token[0],
            run.one_token[1],
            run.token,
            run.token / heads,
        )
        .unwrap();
    }

    page.push_str(STEP_TIMES);
    head::<5>(page, "stages | kernel | launch |");
    for run in &STEP_RUNS {
        let name = run.name;
        for (n, mode) in STEP_MODES.into_iter().enumerate() {
            let launched = mode_name(mode);
            let copy = ["ordinary", "dependent"][n];
            line(
                page,
                &format!("{name} | copy kernel, measured | {copy}"),
                run.copies()[n].map(microseconds),
            );
            line(
                page,
                &format!("{name} | prototype, measured | {launched}"),
                run.prototype[n].map(microseconds),
            );
            let predicted: [_; 5] = std::array::from_fn(|size| {
                let tokens = STEP_TOKENS[size];
                let predicted = run.prototype(tokens).predict(&H200, tokens, mode).all;
                let off = 100.0 * (predicted / run.prototype[n][size] - 1.0);
                format!("{} ({off:+.0}%)", microseconds(predicted))
            });
            line(
                page,
                &format!("{name} | prototype, predicted | {launched}"),
                predicted,
            );
            let one = figures(run.stages, 1, mode);
            let times = STEP_TOKENS.map(|tokens| {
                let figures = figures(run.stages, tokens, mode);
                let launch = &figures.launch;
                let burden = Burden {
                    registers: measured[&(H200.architecture, figures.kernel)].registers,
                    blocks: launch.grid.iter().product(),
                    threads_of_block: launch.block.iter().product(),
                    shared_bytes: launch.shared_bytes,
                    bytes: run.bytes(tokens),
                    issued: tokens as f64 * figures.issued.all as f64,
                    thread: one.warp(one.issued.all),
                    after_wait: one.warp(one.issued.after_wait),
                };
                let prediction = burden.predict(&H200, tokens, mode);
                format!("**{}**", microseconds(prediction.all))
            });
            let kernel = one.kernel.name();
            line(page, &format!("{name} | **{kernel}** | {launched}"), times);
        }
    }
    page.push_str(ASSEMBLING);
}

/// The head of a table whose columns are these, one that says of what the times are, and the tokens.
fn head<const N: usize>(page: &mut String, first: &str) {
    let tokens = ["1", "32", "256", "2,048", "8,192", "32,768"];
    line(
        page,
        &format!("{first} µs"),
        std::array::from_fn::<_, N, _>(|n| tokens[n].into()),
    );
    let columns = first.matches('|').count() + 1;
    let numbers = " ---: |".repeat(N);
    writeln!(page, "|{}{numbers}", " --- |".repeat(columns)).unwrap();
}

fn line<const N: usize>(page: &mut String, first: &str, cells: [String; N]) {
    writeln!(page, "| {first} | {} |", cells.join(" | ")).unwrap();
}

/// To three digits or so.
fn microseconds(time: f64) -> String {
    let digits = match time {
        ..9.995 => 2,
        ..99.95 => 1,
        _ => 0,
    };
    format!("{time:.digits$}")
}

const PREDICTION_INTRODUCTION: &str = "\
# Times predicted from machine code

These kernels have not been measured yet. This page says what to expect of them, so that it can be
wrong. `tests/sass.rs` writes it, with `PHASOR_WRITE_SASS_TABLE=1`, from the formula below and the
instructions of [kernel-sass.md](kernel-sass.md), and fails where it is out of date. Measurements are
to be held against this page as it was for the kernels measured.

The case is that of measurements on an H200 (2026-11-27, driver 580.159.04, CUDA 13.0): q and k of
Llama 3 8B (32 and 8 heads of 128), half-split, exact angles, in place; a CUDA graph of many launches
is replayed, over buffers that are not in L2. Launches are **ordinary**, **dependent**, or dependent
with positions that are **settled**, so that angles are formed before the wait.

Time is launch + latency + the larger of thread + memory and issue:

- **launch**: 0.53 µs from one empty kernel to the next; 0.26 less where launches are dependent, which
  is what a copy kernel gains.
- **latency**: what a copy kernel takes besides launch and memory: 0.69 µs with one token, 0.91 with
  more.
- **thread**: 5.3 cycles (1.98 GHz) for each instruction of a thread that forms one angle and rotates
  one head, of those beyond 80, which a copy kernel executes too or hides. Where positions are
  settled, only those after the wait. If not all blocks fit at once, the time of a whole thread is
  added for the second wave, in part where that is not full; later ones overlap.
- **memory**: bytes read and written / 86.5% of the memory's bandwidth.
- **issue**: instructions of all warps / (multiprocessors * 4 schedulers * clock).

The constants are fitted, not derived: 5.3 and 80 to kernels of two kinds at one token, 86.5% to them
at 32,768.
";

const HOW_WELL: &str = "
## How well it fits what was measured

On the H200, by tokens. Commit 1af16f0 has the kernels before these. The prototype is described in
[kernel-launch.md](kernel-launch.md); the formula takes it as launched in the library's shapes, while it
ran in the best of a sweep.

";

const ON_AN_H200: &str = "
## H200

`memory`, `issue` and `thread` are of ordinary launches. At one token and 32 the prototype's dependent
launches were faster than predicted; these may be too. What would point at the kernels rather than at
this page: 1.15 times these times from 256 tokens on, or 1.25 times below.

";

const STEPS: &str = "
## Whole steps, not measured

From packed q, k and v in bf16 (32, 8 and 8 heads of 128, half-split) to q rotated in place and k and v in a
paged cache, each token with its own position and slot; with an RMS norm of q and k, and with codes of e4m3 by
given scales. `prototype` is a kernel for each of these sets and no more, which was measured on the H200 in the
best of a few shapes. Instructions are those that warps issue: the interpreter of the tests counts how often each
line of the PTX is executed, and the assembler says of which line each instruction was made. For the kernels that
rotate, this gives 3 to 8% fewer than the ways in [kernel-sass.md](kernel-sass.md).

- **a warp, one token**: of the launch for one token, whose threads have one head, on average.
- **after the wait**: of those, where angles are formed before it.
- **a token**: of all warps that serve one of 8,192 tokens; **a head**: a 48th of it.

| stages | kernel | registers | a warp, one token | after the wait | a token | a head |
| --- | --- | ---: | ---: | ---: | ---: | ---: |
";

const STEP_TIMES: &str = "
By the formula above, with an average warp of the launch for one token for its thread. The prototype's rows
show how far to trust it.

";

const ASSEMBLING: &str = "
### Loading, an estimate

A driver assembles the PTX of a module when it is first used on a GPU that no machine code was built for, and
keeps what it made. How long that takes is not measured; ptxas took these CPU seconds on an AMD EPYC core, for
sm_90, which stands in for the assembler in a driver.

| module | PTX, KB | instructions | seconds | µs an instruction |
| --- | ---: | ---: | ---: | ---: |
| rope_bf16 | 115 | 3,288 | 0.20 | 62 |
| append_bf16 | 187 | 5,056 | 0.33 | 66 |
| fused_bf16 | 389 | 12,568 | 0.96 | 76 |
";

const ON_OTHERS: &str = "
## Other GPUs, not measured

Scaled by memory bandwidth, multiprocessors and clock (as high as an H200's on H100 SXM; 1.41 GHz on
A100, 2.41 on RTX 5090, 1.85 on B200), with the code of each architecture. Launch and latency are the
H200's.

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

/// Loads a value before or after it forms an angle, as the lowest bit of a parameter says, and waits
/// before the load; then stores it as often as it likes.
const LISTING: &str = "
        /*0000*/    LDC R2, c[0x0][0x210] ;
        /*0010*/    S2R R0, SR_TID.X ;
        /*0020*/    LOP3.LUT R2, R2, 0x1, RZ, 0xc0, !PT ;
        /*0030*/    ISETP.NE.U32.AND P0, PT, R2, 0x1, PT ;
        /*0040*/    @!P0 BRA `(.L_x_1) ;
        /*0050*/    ACQBULK ;
.L_x_1:
        /*0060*/    @!P0 BRA `(.L_x_2) ;
        /*0070*/    LDG.E.NA.64 R6, desc[UR4][R8.64] ;
.L_x_2:
        /*0080*/    LDG.E.CONSTANT R4, desc[UR4][R4.64] ;
        /*0090*/    ISETP.GE.U32.AND P2, PT, R0, 0x20, PT ;
        /*00a0*/    @P2 BRA `(.L_x_3) ;
        /*00b0*/    FMUL R4, R4, R4 ;
.L_x_3:
        /*00c0*/    @P2 LDG.E R4, desc[UR4][R8.64] ;
        /*00d0*/    STS [R5], R4 ;
        /*00e0*/    @P0 BRA `(.L_x_4) ;
        /*00f0*/    ACQBULK ;
        /*0100*/    LDG.E.NA.64 R6, desc[UR4][R8.64] ;
.L_x_4:
        /*0110*/    BAR.SYNC.DEFER_BLOCKING 0x0 ;
.L_x_5:
        /*0120*/    STG.E.NA.64 desc[UR4][R8.64], R6 ;
        /*0130*/    BRA.U UP1, `(.L_x_5) ;
        /*0140*/    EXIT ;
.L_x_6:
        /*0150*/    BRA `(.L_x_6);
        /*0160*/    NOP;
";

/// A parameter of four bytes.
fn parameter(value: u32) -> Bank {
    Bank::new("sm_90", value.to_le_bytes().map(Some).to_vec())
}

#[test]
fn instructions_are_counted_on_the_way() {
    use Effect::{Barrier, Load, Store, StoreShared, Wait};
    let code = Code::parse(LISTING, Accesses::Vectors);
    assert_eq!(code.len(), 21);
    let ways = [
        // With the arithmetic, and once round the loop.
        (0, vec![Load, StoreShared, Barrier, Store], Some(19)),
        (0, vec![Load, StoreShared, Barrier, Store, Store], Some(21)),
        (0, vec![StoreShared, Load, Barrier, Store], None),
        (1, vec![StoreShared, Load, Barrier, Store], Some(19)),
        (1, vec![StoreShared, Wait, Load, Barrier, Store], Some(19)),
        (1, vec![Load, StoreShared, Barrier, Store], None),
    ];
    for (value, effects, expected) in ways {
        let found = code.way(&parameter(value), &effects, End::Thread);
        assert_eq!(found, expected, "{value} {effects:?}");
    }
    let first = code.way(&parameter(0), &[Load], End::LastEffect);
    assert_eq!(first, Some(8));
    let waited = code.way(&parameter(1), &[StoreShared, Wait], End::LastEffect);
    assert_eq!(waited, Some(14));
}

#[test]
fn what_happens_before_the_wait_is_found() {
    let matters = |listing: &str, value: u32| -> Vec<Option<Effect>> {
        let code = Code::parse(listing, Accesses::Vectors);
        let found = code.before_waiting(&parameter(value)).into_iter();
        let effects = found.map(|(effect, _)| effect);
        effects
            .filter(|effect| !matches!(effect, Some(Effect::LoadConstant | Effect::StoreShared)))
            .collect()
    };
    assert_eq!(matters(LISTING, 0), []);
    assert_eq!(matters(LISTING, 1), [Some(Effect::LoadId)]);
    let first = LISTING.replacen("ACQBULK", "NOP", 1);
    assert!(matters(&first, 0).contains(&Some(Effect::Load)));
    assert!(matters(&first, 0).contains(&Some(Effect::Store)));
    assert!(matters(&first, 0).contains(&None), "its end");
    assert_eq!(matters(&first, 1), [Some(Effect::LoadId)]);
    // A wait that may not take place is none.
    let guarded = LISTING.replacen("ACQBULK", "@P2 ACQBULK", 1);
    assert!(matters(&guarded, 0).contains(&Some(Effect::Load)));
    let later = "/*00f0*/    LDG.E.NA.64 R6, desc[UR4][R8.64] ;\n        /*0100*/    ACQBULK ;";
    let start = LISTING.find("/*00f0*/").unwrap();
    let end = LISTING.find(".L_x_4:").unwrap();
    let moved = format!("{}{later}\n{}", &LISTING[..start], &LISTING[end..]);
    assert_eq!(
        matters(&moved, 1),
        [Some(Effect::LoadId), Some(Effect::Load)]
    );
}

/// Each makes a predicate, from the parameter 0x0001fe05 where it needs one.
#[test]
fn predicates_are_known_where_they_can_be() {
    for (instructions, expected) in [
        ("ISETP.LT.U32.AND P0, PT, R0, 0x5, PT", None),
        ("ISETP.LT.U32.AND P0, PT, R0, 0x5, !PT", Some(false)),
        ("ISETP.LT.U32.OR P0, PT, R0, 0x5, PT", Some(true)),
        ("ISETP.LT.AND P0, PT, RZ, -0x1, PT", Some(false)),
        ("ISETP.LT.U32.AND P0, PT, RZ, -0x1, PT", Some(true)),
        ("ISETP.GE.U32.AND.EX P0, PT, RZ, RZ, PT, P1", None),
        (
            "LDC.U16 R1, c[0x0][0x210]; ISETP.EQ.AND P0, PT, R1, 0xfe05, PT",
            Some(true),
        ),
        (
            "LDC R1, c[0x0][0x214]; ISETP.EQ.AND P0, PT, R1, RZ, PT",
            None,
        ),
        (
            "IMAD.U32 R1, RZ, RZ, c[0x0][0x210]; ISETP.NE.AND P0, PT, R1, 0x1fe05, PT",
            Some(false),
        ),
        (
            "MOV R1, c[0x0][0x210]; @P3 MOV R1, RZ; ISETP.NE.AND P0, PT, R1, RZ, PT",
            None,
        ),
        (
            "MOV R1, c[0x0][0x210]; @P3 LDG.E R1, [R2]; ISETP.NE.AND P0, PT, R1, RZ, PT",
            None,
        ),
        (
            "MOV R1, 0x3; FFMA R1, R2, R2, R2; ISETP.EQ.AND P0, PT, R1, 0x3, PT",
            None,
        ),
        (
            "MOV R1, 0x3; IMAD.WIDE.U32 R0, R2, R2, R2; ISETP.EQ.AND P0, PT, R1, 0x3, PT",
            None,
        ),
        (
            "MOV R3, 0x3; UNHEARD.OF R0, R2; ISETP.EQ.AND P0, PT, R3, 0x3, PT",
            None,
        ),
        (
            "MOV R1, 0x3; IADD3 R1, PT, PT, R1, 0x1, RZ; ISETP.EQ.AND P0, PT, R1, 0x4, PT",
            Some(true),
        ),
        (
            "PLOP3.LUT P0, PT, PT, PT, PT, 0x80, 0x0; IADD3 R1, P0, R1, 0x1, RZ",
            None,
        ),
        (
            "MOV R1, 0x3; IADD3 R1, R1, -0x3, RZ; ISETP.EQ.AND P0, PT, R1, RZ, PT",
            Some(true),
        ),
        ("LOP3.LUT P0, RZ, R0, 0xff, RZ, 0xc0, !PT", None),
        ("LOP3.LUT P0, RZ, R0, 0xff, RZ, 0xfc, !PT", Some(true)),
        // The low half is known, and no more is asked for.
        (
            "PRMT R1, RZ, 0x7610, R0; LOP3.LUT P0, RZ, R1, 0xff, RZ, 0xc0, !PT",
            Some(false),
        ),
        (
            "PRMT R1, RZ, 0x7610, R0; ISETP.EQ.AND P0, PT, R1, RZ, PT",
            None,
        ),
        (
            "MOV R1, 0x80; PRMT R1, R1, 0x8880, RZ; ISETP.EQ.AND P0, PT, R1, -0x80, PT",
            Some(true),
        ),
        (
            "SEL R1, 0x1, RZ, P2; ISETP.LE.U32.AND P0, PT, R1, 0x1, PT",
            None,
        ),
        (
            "SEL R1, 0x1, RZ, !PT; ISETP.NE.AND P0, PT, R1, RZ, PT",
            Some(false),
        ),
        (
            "HFMA2.MMA R1, -RZ, RZ, 0, 5.9604644775390625e-08; ISETP.EQ.AND P0, PT, R1, 0x1, PT",
            Some(true),
        ),
        ("PLOP3.LUT P0, PT, P1, !PT, PT, 0xa8, 0x0", None),
        ("PLOP3.LUT P0, PT, PT, P1, PT, 0xa8, 0x0", Some(true)),
        ("PLOP3.LUT P0, PT, PT, PT, PT, 0x8, 0x0", Some(false)),
    ] {
        let listing: String = instructions
            .split(';')
            .chain(["@P0 EXIT", "STG.E.NA.64 [R8], R6", "EXIT"])
            .map(|instruction| format!("/*0000*/ {instruction} ;\n"))
            .collect();
        let code = Code::parse(&listing, Accesses::Vectors);
        let open = |effects: &[Effect]| {
            let way = code.way(&parameter(0x1fe05), effects, End::Thread);
            way.is_some()
        };
        let found = match (open(&[]), open(&[Effect::Store])) {
            (true, false) => Some(true),
            (false, true) => Some(false),
            _ => None,
        };
        assert_eq!(found, expected, "{instructions}");
    }
}
