//! Runs cases on the kernels' PTX, in the interpreter.

use crate::kernel_cases::{Case, Elements, Outcome, TensorCase, bytes, from_bytes};
use phasor::call::{Addresses, AngleAddresses, TensorAddresses};
use phasor::launch::{Family, Kernel, Launch as PlannedLaunch, LaunchMode, Target};
use phasor::{Angles, Dtype, Ids, InOut, Layout, Plan, Problem};
use ptx_interpreter::{Error, Fault, Launch, Memory, Module, Stats, run};
use std::collections::{BTreeSet, HashMap};
use std::sync::{LazyLock, Mutex, OnceLock};

/// The kernel modules of one target.
pub struct Image {
    name: String,
    /// Whether its kernels can be launched dependently.
    dependent: bool,
    modules: HashMap<(Family, Dtype), Source>,
    /// What its launches executed, where that is wanted.
    executed: Option<Mutex<Executed>>,
}

/// What launches executed of a module.
#[derive(Clone, Default)]
pub struct Executed {
    /// Lines of its text, from 1.
    pub lines: BTreeSet<u32>,
    /// By all warps.
    pub instructions: u64,
}

/// A module, which is parsed when it is first run: most tests run few of them.
struct Source {
    text: String,
    parsed: OnceLock<Module>,
}

/// A finished case.
pub struct Run {
    pub outcome: Outcome,
    pub stats: Stats,
    /// For each buffer of q and k, how often each byte was read and written.
    pub counts: HashMap<&'static str, Vec<(u32, u32)>>,
    /// `None` if there was nothing to launch.
    pub kernel: Option<String>,
    /// See [`triggers`].
    pub triggers: bool,
}

/// PTX texts of a target: of each family in the order of [`Family::ALL`], in that of [`Dtype::ALL`].
pub type Texts = [[&'static str; 3]; 3];

macro_rules! texts {
    ($target:literal) => {
        [
            [
                include_str!(concat!("../../cuda/prebuilt/rope_f32.", $target, ".ptx")),
                include_str!(concat!("../../cuda/prebuilt/rope_f16.", $target, ".ptx")),
                include_str!(concat!("../../cuda/prebuilt/rope_bf16.", $target, ".ptx")),
            ],
            [
                include_str!(concat!("../../cuda/prebuilt/append_f32.", $target, ".ptx")),
                include_str!(concat!("../../cuda/prebuilt/append_f16.", $target, ".ptx")),
                include_str!(concat!("../../cuda/prebuilt/append_bf16.", $target, ".ptx")),
            ],
            [
                include_str!(concat!("../../cuda/prebuilt/fused_f32.", $target, ".ptx")),
                include_str!(concat!("../../cuda/prebuilt/fused_f16.", $target, ".ptx")),
                include_str!(concat!("../../cuda/prebuilt/fused_bf16.", $target, ".ptx")),
            ],
        ]
    };
}

pub const COMPUTE_75: Texts = texts!("compute_75");
pub const COMPUTE_80: Texts = texts!("compute_80");
pub const COMPUTE_90: Texts = texts!("compute_90");

/// All modules, in the order of [`Texts`].
pub fn modules() -> impl Iterator<Item = (Family, Dtype)> {
    let of_family = |family| Dtype::ALL.map(|dtype| (family, dtype));
    Family::ALL.into_iter().flat_map(of_family)
}

/// The text of each module of a folder.
pub fn texts_of(folder: &str) -> Vec<String> {
    let read = |(family, dtype): (Family, Dtype)| {
        let path = format!("{folder}/{}_{dtype}.ptx", family.name());
        std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
    };
    modules().map(read).collect()
}

impl Image {
    /// The prebuilt images, and what `PHASOR_EXTRA_PTX` names.
    pub fn all() -> &'static [Image] {
        static ALL: LazyLock<Vec<Image>> = LazyLock::new(|| {
            let of = |name, texts: Texts| Image::new(name, modules().zip(texts.concat()));
            let mut images = vec![
                of("compute_75", COMPUTE_75),
                of("compute_80", COMPUTE_80),
                of("compute_90", COMPUTE_90),
            ];
            if let Ok(folder) = std::env::var("PHASOR_EXTRA_PTX") {
                let texts = texts_of(&folder);
                let texts = texts.iter().map(String::as_str);
                images.push(Image::new(&folder, modules().zip(texts)));
            }
            images
        });
        &ALL
    }

    /// From the texts of some modules.
    pub fn new<'a>(
        name: &str,
        texts: impl IntoIterator<Item = ((Family, Dtype), &'a str)>,
    ) -> Image {
        let source = |text: &str| Source {
            text: text.into(),
            parsed: OnceLock::new(),
        };
        let modules: HashMap<_, _> = (texts.into_iter())
            .map(|(module, text)| (module, source(text)))
            .collect();
        Image {
            name: name.into(),
            dependent: (modules.values()).any(|m| m.text.contains("griddepcontrol.wait")),
            modules,
            executed: None,
        }
    }

    /// Of one module, whose text may be none.
    pub fn of_module(name: &str, module: (Family, Dtype), text: &str) -> Result<Image, Error> {
        let mut image = Image::new(name, [(module, text)]);
        let source = image.modules.get_mut(&module).expect("it is there");
        source.parsed = Module::parse(text)?.into();
        Ok(image)
    }

    /// The same, which remembers what its launches execute.
    pub fn observed(mut self) -> Image {
        self.executed = Some(Mutex::default());
        self
    }

    /// What launches executed since it was asked last.
    pub fn take_executed(&self) -> Executed {
        let executed = self.executed.as_ref().expect("it is observed");
        std::mem::take(&mut executed.lock().unwrap())
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn dependent(&self) -> bool {
        self.dependent
    }

    pub fn module(&self, kernel: Kernel) -> &Module {
        let source = &self.modules[&(kernel.family, kernel.dtype)];
        source.parsed.get_or_init(|| {
            let parsed = Module::parse(&source.text);
            parsed.unwrap_or_else(|error| panic!("{}: {error}", self.name))
        })
    }

    /// Runs a case as the CUDA backend would.
    pub fn run(&self, case: &Case) -> Result<Run, Fault> {
        let mut memory = Memory::new();
        let mut named = Vec::new();
        let mut add = |memory: &mut Memory, name, elements: &Elements, misalign: usize| {
            let bytes = bytes(case.dtype, elements);
            let length = bytes.len();
            let address = memory.add(name, bytes, misalign * case.dtype.size());
            named.push((name, address, length));
            address
        };
        let shared = case
            .one_buffer
            .as_ref()
            .map(|buffer| add(&mut memory, "packed", buffer, misalign(&case.q)));
        let mut tensor = |tensor: &Option<TensorCase>, name, name_out| match (shared, tensor) {
            (Some(address), _) => TensorAddresses {
                source: address,
                destination: address,
            },
            (None, None) => TensorAddresses::default(),
            (None, Some(tensor)) => {
                let source = add(&mut memory, name, &tensor.source, tensor.misalign);
                let destination = match &tensor.destination {
                    Some(buffer) => {
                        memory.set_read_only(source);
                        add(&mut memory, name_out, buffer, tensor.misalign)
                    }
                    None => source,
                };
                TensorAddresses {
                    source,
                    destination,
                }
            }
        };
        let q = tensor(&case.q, "q", "q_out");
        let k = tensor(&case.k, "k", "k_out");
        let (kernel, stats, triggers) = self.launch(case, &case.problem(), &mut memory, q, k)?;

        let read = |address: u64| Elements::from(from_bytes(case.dtype, memory.bytes(address)));
        let outcome = match shared {
            Some(address) => vec![read(address)],
            None => [(&case.q, q), (&case.k, k)]
                .into_iter()
                .filter(|(tensor, _)| tensor.is_some())
                .map(|(_, addresses)| read(addresses.destination))
                .collect(),
        };
        let counts = named
            .iter()
            .filter(|&&(_, _, length)| length > 0)
            .map(|&(name, address, length)| (name, memory.counts(address, length)))
            .collect();
        Ok(Run {
            outcome: Outcome(outcome),
            stats,
            counts,
            kernel,
            triggers,
        })
    }

    /// Runs a case whose tensors are rotated in place, but spread over other layouts, in sparse
    /// buffers. The outcome is in the case's own layouts.
    pub fn run_spread(&self, case: &Case, q: Layout, k: Layout) -> Result<Outcome, Fault> {
        let mut memory = Memory::new();
        let size = case.dtype.size();
        let mut problem = Problem::new(case.dtype);
        let mut moved = Vec::new();
        for (tensor, layout) in case.tensors().zip([q, k]) {
            let InOut::InPlace(near) = tensor.layout else {
                panic!("in place only")
            };
            let length = (layout.required_len().unwrap() * size) as u64;
            let address = memory.add_sparse("spread", length, 0);
            let pairs: Vec<_> = heads(near).into_iter().zip(heads(layout)).collect();
            for &(from, to) in &pairs {
                let head = &tensor.source[from..from + near.shape()[3]];
                memory.write(address + (to * size) as u64, &bytes(case.dtype, head));
            }
            moved.push((address, near, pairs));
        }
        problem = problem.q(q).k(k);
        let at = |n: usize| TensorAddresses {
            source: moved[n].0,
            destination: moved[n].0,
        };
        let (q, k) = (at(0), at(1));
        self.launch(case, &problem, &mut memory, q, k)?;
        let outcome = case
            .tensors()
            .zip(&moved)
            .map(|(tensor, (address, near, pairs))| {
                let mut elements = tensor.source.clone();
                let head_dim = near.shape()[3];
                for &(to, from) in pairs {
                    let from = address + (from * size) as u64;
                    let head = memory.read(from, head_dim * size).expect("written before");
                    elements[to..to + head_dim].copy_from_slice(&from_bytes(case.dtype, &head));
                }
                elements
            })
            .collect();
        Ok(Outcome(outcome))
    }

    fn launch(
        &self,
        case: &Case,
        problem: &Problem,
        memory: &mut Memory,
        q: TensorAddresses,
        k: TensorAddresses,
    ) -> Result<(Option<String>, Stats, bool), Fault> {
        let plan = Plan::new(&case.rope, problem).unwrap();
        let mut placed = |name, bytes: Vec<u8>| constant(memory, name, bytes);
        let angles = constant_angles(case.rope.angles(), &mut placed);
        let positions = case.positions.placed(|name, values| {
            let address = ids(memory, name, values.bytes.clone(), case.mode);
            Ids::at(address, values.id_type, values.len())
        });
        let addresses = Addresses {
            q,
            k,
            angles,
            positions,
            v: TensorAddresses::default(),
            cache: None,
            stages: Default::default(),
        };
        let Some(call) = plan.call(&addresses).unwrap() else {
            return Ok((None, Stats::default(), true));
        };
        let launch = call.launch(&self.target(case.multiprocessors, case.mode));
        let name = launch.kernel.name();
        let stats = self.run_launch(memory, &launch)?;
        let triggers = triggers(&launch, &stats, self.dependent);
        Ok((Some(name), stats, triggers))
    }

    /// Runs a launch as planned, or with another grid and block. Where the kernels can be launched
    /// dependently they keep the rules of that in every launch.
    pub fn run_launch(&self, memory: &mut Memory, planned: &PlannedLaunch) -> Result<Stats, Fault> {
        let counts_lines = self.executed.is_some();
        let module = self.module(planned.kernel);
        let stats = run_counting(module, memory, planned, self.dependent, counts_lines)?;
        if let Some(executed) = &self.executed {
            let mut executed = executed.lock().unwrap();
            let lines = stats.lines.iter().filter(|&(_, &times)| times > 0);
            executed.lines.extend(lines.map(|(&line, _)| line));
            executed.instructions += stats.warp_instructions;
        }
        Ok(stats)
    }

    /// As the CUDA backend has it for this image.
    pub fn target(&self, multiprocessors: u32, mode: LaunchMode) -> Target {
        let mode = match self.dependent {
            true => mode,
            false => LaunchMode::Ordinary,
        };
        Target::new(multiprocessors).with_mode(mode)
    }
}

/// Memory that no work on the device writes.
pub fn constant(memory: &mut Memory, name: &'static str, bytes: Vec<u8>) -> u64 {
    let address = memory.add(name, bytes, 0);
    memory.set_read_only(address);
    memory.set_constant(address);
    address
}

/// Positions or rows, which earlier work may write unless the mode promises that it does not.
pub fn ids(memory: &mut Memory, name: &'static str, bytes: Vec<u8>, mode: LaunchMode) -> u64 {
    let address = memory.add(name, bytes, 0);
    settle_ids(memory, address, mode);
    address
}

pub fn settle_ids(memory: &mut Memory, address: u64, mode: LaunchMode) {
    memory.set_read_only(address);
    if mode == LaunchMode::DependentPositionsSettled {
        memory.set_promised(address);
    }
}

/// Runs a launch, and counts how often each line is executed if that is wanted. `dependent`: it keeps the rules
/// of a dependent launch.
pub fn run_counting(
    module: &Module,
    memory: &mut Memory,
    planned: &PlannedLaunch,
    dependent: bool,
    counts_lines: bool,
) -> Result<Stats, Fault> {
    let name = planned.kernel.name();
    let mut params = planned.params.as_bytes().to_vec();
    if let Some(fusion) = &planned.fusion {
        params.extend(fusion.as_bytes());
    }
    let mut launch = Launch::new(&name, planned.grid, planned.block, &params);
    launch.dynamic_shared = planned.shared_bytes as usize;
    launch.dependent = dependent;
    launch.counts_lines = counts_lines;
    run(module, memory, &launch)
}

/// Whether every thread, and so every block, lets the kernel after this one start, and angles are formed
/// before the wait where they shall be, if kernels can be launched dependently.
pub fn triggers(planned: &PlannedLaunch, stats: &Stats, dependent: bool) -> bool {
    let threads = |n: [u32; 3]| n.into_iter().map(u64::from).product::<u64>();
    let all = threads(planned.grid) * threads(planned.block);
    let early = dependent && planned.params.angles_before_wait == 1;
    // Stages may leave nothing to rotate.
    let turns = planned.fusion.is_none_or(|fusion| {
        let params = &planned.params;
        [(&params.q, &fusion.q), (&params.k, &fusion.k)]
            .iter()
            .any(|(stream, stages)| {
                stream.heads > 0 && (stages.present == 0 || stages.rotates == 1)
            })
    });
    let loads = stats.loads_before_wait > 0;
    stats.launched_dependents == if dependent { all } else { 0 }
        && (loads == early || early && !turns)
}

/// Puts an angle source in memory, as the CUDA backend does.
pub fn constant_angles(
    angles: &Angles,
    constant: &mut impl FnMut(&'static str, Vec<u8>) -> u64,
) -> AngleAddresses {
    let floats = |x: &[f32]| x.iter().flat_map(|x| x.to_le_bytes()).collect();
    let words = |x: &[u64]| x.iter().flat_map(|x| x.to_le_bytes()).collect();
    match angles {
        Angles::Exact(frequencies) => AngleAddresses::Steps {
            steps: constant("steps", words(frequencies.steps())),
            factors: 0,
        },
        Angles::Rows(rows) => AngleAddresses::Steps {
            steps: constant("steps", words(rows.steps())),
            factors: constant("factors", floats(rows.attention_factors())),
        },
        Angles::Table(table) => AngleAddresses::Table {
            cos: constant("cos", floats(table.cos())),
            sin: constant("sin", floats(table.sin())),
        },
        other => panic!("{other:?} is not covered"),
    }
}

fn misalign(tensor: &Option<TensorCase>) -> usize {
    tensor.as_ref().map_or(0, |tensor| tensor.misalign)
}

/// Where each head starts.
fn heads(layout: Layout) -> Vec<usize> {
    let [batch, sequence, heads, _] = layout.shape();
    let [batch_stride, sequence_stride, head_stride] = layout.strides();
    let offset = layout.offset();
    let mut starts = Vec::new();
    for b in 0..batch {
        for s in 0..sequence {
            for h in 0..heads {
                starts.push(offset + b * batch_stride + s * sequence_stride + h * head_stride);
            }
        }
    }
    starts
}

pub fn layout_images() -> [&'static str; 3] {
    [
        include_str!("../../cuda/prebuilt/call_layout.compute_75.ptx"),
        include_str!("../../cuda/prebuilt/call_layout.compute_80.ptx"),
        include_str!("../../cuda/prebuilt/call_layout.compute_90.ptx"),
    ]
}

/// The first `count` sizes and offsets that the kernel `phasor_call_layout` reports.
pub fn device_layout(text: &str, count: usize) -> Vec<u64> {
    let module = Module::parse(text).unwrap();
    let mut memory = Memory::new();
    let out = memory.add_uninit("out", count * 8, 0);
    let params = out.to_le_bytes();
    let launch = Launch::new("phasor_call_layout", [1; 3], [1; 3], &params);
    run(&module, &mut memory, &launch).unwrap();
    memory
        .bytes(out)
        .chunks(8)
        .map(|value| u64::from_le_bytes(value.try_into().unwrap()))
        .collect()
}
