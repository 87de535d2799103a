//! The CUDA backend on the first GPU: q and k rotated in place, and serving steps from packed qkv to a
//! written cache, beside limits that move the same bytes in the same run. Without a GPU it says so and ends.
//!
//! Each call is captured many times in a graph, whose replays are timed: what a model's step takes, without
//! the host's part. The usual case is also timed as a stream of launches, and after another kernel. Before
//! a serving step is timed, what it writes is held against the host's result, bit for bit.
//!
//! ```sh
//! cargo bench --bench cuda -- --json FILE
//! ```
//!
//! `scripts/gpu-check` runs it with the rest, and tells it the commit.

mod buffers;
mod limits;
mod results;
mod rotation;
mod schedule;
mod serving;
mod steps;
mod timer;

use buffers::Buffers;
use limits::{Limits, Operands, Pass};
use phasor::cuda::{Cuda, device_count};
use phasor::cudarc::driver::sys::{self, CUdevice_attribute};
use phasor::cudarc::driver::{CudaContext, CudaStream};
use phasor::half::{bf16, f16};
use phasor::{DeviceElement, Dtype, Pairing};
use results::{Kind, Launch, Memory, Meta, PHASOR, Results, Row, Timed};
use rotation::Rotation;
use schedule::Group;
use serving::{Layers, Serving};
use std::collections::BTreeMap;
use std::error::Error;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::{Duration, Instant};
use steps::{Queries, Step};
use timer::Timer;

const USAGE: &str = "\
Options:
  --json FILE      save the results
  --seconds N      skip what is left after so long (default 90)
  --revision TEXT  the commit of phasor
  --kernels N      the checksum of its kernels' sources";

type Failure = Box<dyn Error>;

struct Options {
    json: Option<String>,
    limit: Duration,
    revision: String,
    kernels: Option<u32>,
}

impl Options {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut options = Self {
            json: None,
            limit: Duration::from_secs(90),
            revision: "unknown".to_owned(),
            kernels: None,
        };
        while let Some(argument) = arguments.next() {
            let mut value = || {
                let value = arguments.next();
                value.ok_or_else(|| format!("{argument} needs a value\n{USAGE}"))
            };
            let number = |text: String| {
                let number = text.parse::<u32>();
                number.map_err(|_| format!("{argument} needs a number, not {text}\n{USAGE}"))
            };
            match argument.as_str() {
                "--json" => options.json = Some(value()?),
                "--seconds" => options.limit = Duration::from_secs(number(value()?)?.into()),
                "--revision" => options.revision = value()?,
                "--kernels" => options.kernels = Some(number(value()?)?),
                // From cargo.
                "--bench" => {}
                _ => return Err(format!("{argument}?\n{USAGE}")),
            }
        }
        Ok(options)
    }
}

fn main() -> ExitCode {
    let options = match Options::parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(message) => {
            eprintln!("{message}");
            return ExitCode::from(2);
        }
    };
    if !matches!(device_count(), Ok(1..)) {
        println!("no GPU: nothing to measure");
        return ExitCode::SUCCESS;
    }
    match run(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether all of phasor's calls succeeded.
fn run(options: &Options) -> Result<bool, Failure> {
    let deadline = Instant::now() + options.limit;
    let context = CudaContext::new(0)?;
    // SAFETY: all work is on one stream, in order.
    unsafe { context.disable_event_tracking() };
    let stream = context.new_stream()?;
    let l2 = context.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?;
    let l2 = usize::try_from(l2)?;

    let began = Instant::now();
    let cuda = Cuda::new(&context, &[Dtype::Bf16])?;
    let loading = began.elapsed();
    let image = cuda.image(Dtype::Bf16).map(|image| image.to_string());
    let mut bench = Bench {
        timer: Timer::new(&stream, l2)?,
        stream,
        l2,
        cuda: Cuda::new(&context, &Dtype::ALL)?,
        limits: None,
        rows: Vec::new(),
        skipped: Vec::new(),
        deadline,
        failed: false,
    };
    match Limits::new(&bench.stream) {
        Ok(limits) => {
            if let Err(reason) = limits.dependent() {
                bench.skip(format!("dependent launches of limits: {reason}"));
            }
            bench.limits = Some(Arc::new(limits));
        }
        Err(error) => bench.skip(format!("limits: {error}")),
    }
    if !bench.cuda.can_launch_dependently(Dtype::Bf16) {
        bench.skip("dependent launches of phasor: compute capability 9.0 is needed".to_owned());
    }
    bench.timer.warm_up()?;
    // Those first that say most: time may run out.
    let (usual, others) = schedule::groups().into_iter().partition(Group::is_usual);
    bench.rotations(usual);
    bench.all_steps();
    bench.rotations(others);

    let results = Results {
        meta: Meta {
            device: cuda.name().to_owned(),
            driver: driver_version().unwrap_or_else(|| "unknown".to_owned()),
            cuda: cuda_version()?,
            date: results::today(),
            phasor: options.revision.clone(),
            kernels: options.kernels,
            image,
            versions: BTreeMap::new(),
            skipped: bench.skipped,
        },
        rows: bench.rows,
    };
    if let Some(path) = &options.json {
        std::fs::write(path, results.to_string()).map_err(|error| format!("{path}: {error}"))?;
    }
    println!("{}", summary(&results, loading));
    Ok(!bench.failed)
}

fn summary(results: &Results, loading: Duration) -> String {
    let Meta { device, image, .. } = &results.meta;
    let mut text = format!(
        "{device}, kernels of one element type loaded from {} in {:.1} ms.\n\n\
         Replays of a graph, on buffers that do not fit into L2 together.\n\n\
         ## q and k of {}, bf16, half-split, in place\n\n{}",
        image.as_deref().unwrap_or("nothing"),
        loading.as_secs_f64() * 1e3,
        results::LLAMA,
        results::headlines(&results.rows)
    );
    for step in results::steps(&results.rows) {
        let table = results::headlines_of_step(&results.rows, step);
        text += &format!("\n## {step}: {}, bf16, half-split\n\n{table}", steps::SHAPE);
    }
    for reason in &results.meta.skipped {
        text += &format!("\nnot measured: {reason}");
    }
    text
}

struct Bench {
    stream: Arc<CudaStream>,
    timer: Timer,
    l2: usize,
    cuda: Cuda,
    /// Where the device can run them.
    limits: Option<Arc<Limits>>,
    rows: Vec<Row>,
    skipped: Vec<String>,
    deadline: Instant,
    failed: bool,
}

impl Bench {
    fn skip(&mut self, reason: String) {
        if !self.skipped.contains(&reason) {
            self.skipped.push(reason);
        }
    }

    fn is_late(&self) -> bool {
        Instant::now() >= self.deadline
    }

    fn rotations(&mut self, groups: Vec<Group>) {
        for group in groups {
            if self.is_late() {
                self.skip(format!("{}: all, as time is over", group.name()));
                continue;
            }
            eprintln!("{}", group.name());
            let measured = match group.dtype {
                Dtype::F32 => self.measure::<f32>(group),
                Dtype::F16 => self.measure::<f16>(group),
                Dtype::Bf16 => self.measure::<bf16>(group),
                other => {
                    self.skip(format!("{other} is not measured"));
                    continue;
                }
            };
            if let Err(error) = measured {
                self.fail(format!("{}: {error}", group.name()));
            }
        }
    }

    fn all_steps(&mut self) {
        for tokens in steps::TOKENS {
            let name = format!("{}, bf16, tokens: {tokens}", steps::SHAPE);
            if self.is_late() {
                self.skip(format!("{name}: all steps, as time is over"));
                continue;
            }
            eprintln!("{name}");
            if let Err(error) = self.steps(tokens) {
                self.fail(format!("{name}: {error}"));
            }
        }
    }

    /// All serving steps of so many tokens, each after its limits.
    fn steps(&mut self, tokens: usize) -> Result<(), Failure> {
        let mut layers = Layers::new(&self.stream, tokens, self.l2)?;
        let mut limited = Vec::new();
        for step in Step::all() {
            if self.is_late() {
                self.skip(format!(
                    "{}, tokens: {tokens}: as time is over",
                    step.name()
                ));
                continue;
            }
            let bytes = step.bytes(tokens);
            let calls = schedule::calls(bytes / 2, layers.count);
            if !limited.contains(&bytes) {
                self.limits_of(step, tokens, calls, &mut layers);
                limited.push(bytes);
            }
            let before = step.unwritten(tokens);
            let expected = step.on_host(tokens, before.clone())?;
            for mut serving in Serving::all(&self.cuda, &self.stream, step, tokens)? {
                let contender = match step.queries {
                    Queries::Elsewhere => "phasor, q elsewhere",
                    Queries::InPlace | Queries::Codes => PHASOR,
                };
                let row = row_of_step(step, tokens, contender, Kind::Phasor, serving.launch);
                self.record(row, |bench| {
                    serving.check(&bench.stream, &mut layers, &before, &expected)?;
                    bench.timer.replayed(calls, Memory::Cold, |stream, n| {
                        let layer = n % layers.count;
                        serving.enqueue(stream, &mut layers, layer)
                    })
                });
            }
        }
        Ok(())
    }

    /// Copy kernels of as many bytes as a step reads and writes.
    fn limits_of(&mut self, step: Step, tokens: usize, calls: usize, layers: &mut Layers) {
        let Some(limits) = self.limits.clone() else {
            return;
        };
        let [read, written] = step.bytes_read_and_written(tokens);
        let passes = match read == written {
            true => [Pass::Copy1, Pass::Copy4],
            false => [Pass::Narrow1, Pass::Narrow4],
        };
        for launch in launches(&limits) {
            for pass in passes {
                let mut row = row_of_step(step, tokens, &pass.contender(), Kind::Limit, launch);
                (row.step, row.pairing) = (None, None);
                self.record(row, |bench| {
                    bench.timer.replayed(calls, Memory::Cold, |_, n| {
                        let layer = n % layers.count;
                        let (from, to) = layers.copy(step, layer);
                        let from = Some(from);
                        limits.enqueue(pass, launch, Operands { to, from })
                    })
                });
            }
        }
    }

    fn fail(&mut self, reason: String) {
        self.skip(reason);
        self.failed = true;
    }

    fn measure<T: DeviceElement>(&mut self, group: Group) -> Result<(), Failure> {
        let (length, bytes) = (group.length(), group.bytes());
        let count = schedule::cold_buffers(bytes, self.l2);
        let mut buffers = Buffers::<T>::new(&self.stream, length, count)?;
        let rotations = Rotation::all(&self.cuda, &self.stream, group)?;
        for &memory in group.memories() {
            let used = match memory {
                Memory::Cold => count,
                Memory::L2 => 1,
            };
            let case = Case {
                group,
                memory,
                buffers: used,
                calls: schedule::calls(bytes, used),
            };
            if group.has_limits() {
                self.limits(case, &mut buffers);
            }
            for rotation in &rotations {
                let row = case.row_of(rotation);
                self.record(row, |bench| {
                    bench.timer.replayed(case.calls, memory, |stream, n| {
                        rotation.enqueue(stream, buffers.pair(n % used))
                    })
                });
            }
            if memory == Memory::Cold && group.is_usual() {
                self.streams(case, &mut buffers, &rotations);
            }
            if memory == Memory::Cold && group.has_chain() {
                self.chains(case, &mut buffers, &rotations);
            }
        }
        Ok(())
    }

    /// What moves the same bytes, and the empty kernel.
    fn limits<T: DeviceElement>(&mut self, case: Case, buffers: &mut Buffers<T>) {
        let row = case.row("copy by the driver", Kind::Limit, None, Launch::Ordinary);
        self.record(row, |bench| {
            bench.timer.replayed(case.calls, case.memory, |stream, n| {
                let (from, mut to) = buffers.copy(n % case.buffers);
                Ok(stream.memcpy_dtod(&from, &mut to)?)
            })
        });
        let Some(limits) = self.limits.clone() else {
            return;
        };
        for launch in launches(&limits) {
            for pass in Pass::LIMITS {
                let row = case.row(&pass.contender(), Kind::Limit, None, launch);
                self.record(row, |bench| {
                    bench.timer.replayed(case.calls, case.memory, |_, n| {
                        limits.enqueue(pass, launch, operands(pass, buffers, n % case.buffers))
                    })
                });
            }
        }
    }

    /// Without a graph, so that the host must keep up.
    fn streams<T: DeviceElement>(
        &mut self,
        case: Case,
        buffers: &mut Buffers<T>,
        rotations: &[Rotation],
    ) {
        for rotation in rotations.iter().filter(|rotation| is_usual(rotation)) {
            let mut row = case.row_of(rotation);
            row.timed = Timed::Stream;
            self.record(row, |bench| {
                bench.timer.streamed(case.calls, case.memory, |stream, n| {
                    rotation.enqueue(stream, buffers.pair(n % case.buffers))
                })
            });
        }
        if let Some(limits) = self.limits.clone() {
            let mut row = case.row(
                &Pass::Empty.contender(),
                Kind::Limit,
                None,
                Launch::Ordinary,
            );
            row.timed = Timed::Stream;
            self.record(row, |bench| {
                bench.timer.streamed(case.calls, case.memory, |_, n| {
                    let operands = operands(Pass::Empty, buffers, n % case.buffers);
                    limits.enqueue(Pass::Empty, Launch::Ordinary, operands)
                })
            });
        }
    }

    /// What is added by a rotation, or by an update pass, to a kernel that writes the same q and k just
    /// before.
    fn chains<T: DeviceElement>(
        &mut self,
        case: Case,
        buffers: &mut Buffers<T>,
        rotations: &[Rotation],
    ) {
        let Some(limits) = self.limits.clone() else {
            return;
        };
        for (before, timed) in [
            (Pass::Write, Timed::AddedAfterNoTrigger),
            (Pass::WriteAndTrigger, Timed::AddedAfterTrigger),
        ] {
            let alone = self.pairs(case, buffers, &limits, before, After::Nothing);
            let alone = match alone {
                Ok(alone) => alone,
                Err(error) => {
                    self.skip(format!("{}: {error}", case.group.name()));
                    continue;
                }
            };
            let usual = rotations.iter().filter(|rotation| is_usual(rotation));
            let mut all: Vec<_> = usual
                .map(|rotation| (case.row_of(rotation), After::Rotation(rotation)))
                .collect();
            all.extend(launches(&limits).map(|launch| {
                let row = case.row(&Pass::Update1.contender(), Kind::Limit, None, launch);
                (row, After::Update(launch))
            }));
            for (mut row, after) in all {
                row.timed = timed;
                row.memory = Memory::L2;
                self.record(row, |bench| {
                    let both = bench.pairs(case, buffers, &limits, before, after)?;
                    Ok(both - alone)
                });
            }
        }
    }

    /// Microseconds of one kernel and what comes after it.
    fn pairs<T: DeviceElement>(
        &mut self,
        case: Case,
        buffers: &mut Buffers<T>,
        limits: &Limits,
        before: Pass,
        after: After<'_>,
    ) -> Result<f64, Failure> {
        self.timer.replayed(case.calls, case.memory, |stream, n| {
            let n = n % case.buffers;
            limits.enqueue(before, Launch::Ordinary, operands(before, buffers, n))?;
            match after {
                After::Nothing => Ok(()),
                After::Rotation(rotation) => rotation.enqueue(stream, buffers.pair(n)),
                After::Update(launch) => {
                    let operands = operands(Pass::Update1, buffers, n);
                    limits.enqueue(Pass::Update1, launch, operands)
                }
            }
        })
    }

    /// Keeps what `time` says, or why it says nothing.
    fn record(&mut self, mut row: Row, time: impl FnOnce(&mut Self) -> Result<f64, Failure>) {
        let Row {
            contender, launch, ..
        } = &row;
        let what = row.step.as_ref().unwrap_or(&row.shape);
        let case = format!("{what}, {}, tokens: {}", row.dtype, row.tokens);
        if self.is_late() {
            return self.skip(format!("{case}: the rest, as time is over"));
        }
        match time(self) {
            Ok(us) => {
                row.us = (us * 1e4).round() / 1e4;
                self.rows.push(row);
            }
            // The same wherever a limit is measured, if it is one of the device.
            Err(error) if row.kind == Kind::Limit => {
                self.skip(format!("{contender}, {launch} launch: {error}"));
            }
            Err(error) => {
                self.fail(format!("{contender}, {launch} launch, {case}: {error}"));
            }
        }
    }
}

/// What follows a kernel that has just written its buffers.
#[derive(Clone, Copy)]
enum After<'a> {
    Nothing,
    Rotation(&'a Rotation),
    Update(Launch),
}

/// A group's buffers in one state of L2.
#[derive(Clone, Copy)]
struct Case {
    group: Group,
    memory: Memory,
    /// How many of the group's are used in turn.
    buffers: usize,
    calls: usize,
}

impl Case {
    fn row(self, contender: &str, kind: Kind, pairing: Option<Pairing>, launch: Launch) -> Row {
        Row {
            contender: contender.to_owned(),
            kind,
            shape: self.group.shape.name(),
            dtype: self.group.dtype.to_string(),
            pairing: pairing.map(name_of),
            step: None,
            tokens: self.group.tokens,
            bytes: Some(2 * self.group.bytes()),
            memory: self.memory,
            launch,
            timed: Timed::Graph,
            us: 0.0,
        }
    }

    fn row_of(self, rotation: &Rotation) -> Row {
        let pairing = Some(rotation.pairing);
        self.row(rotation.contender, Kind::Phasor, pairing, rotation.launch)
    }
}

fn row_of_step(step: Step, tokens: usize, contender: &str, kind: Kind, launch: Launch) -> Row {
    Row {
        contender: contender.to_owned(),
        kind,
        shape: steps::SHAPE.to_owned(),
        dtype: Dtype::Bf16.to_string(),
        pairing: Some(name_of(Pairing::HalfSplit)),
        step: Some(step.name()),
        tokens,
        bytes: Some(step.bytes(tokens)),
        memory: Memory::Cold,
        launch,
        timed: Timed::Graph,
        us: 0.0,
    }
}

/// As results have it.
fn name_of(pairing: Pairing) -> String {
    pairing.name().replace('_', "-")
}

/// The kinds that limits have here.
fn launches(limits: &Limits) -> impl Iterator<Item = Launch> {
    let dependent = limits.dependent().is_ok().then_some(Launch::Dependent);
    std::iter::once(Launch::Ordinary).chain(dependent)
}

/// Of the cases that are measured in more than one way.
fn is_usual(rotation: &Rotation) -> bool {
    rotation.contender == PHASOR && rotation.pairing == Pairing::HalfSplit
}

fn operands<T: DeviceElement>(
    pass: Pass,
    buffers: &mut Buffers<T>,
    number: usize,
) -> Operands<'_, T> {
    match pass.is_copy() {
        true => {
            let (from, to) = buffers.copy(number);
            Operands {
                to,
                from: Some(from),
            }
        }
        false => Operands {
            to: buffers.pair(number),
            from: None,
        },
    }
}

/// `13.0` of the newest CUDA that the driver supports.
fn cuda_version() -> Result<String, Failure> {
    let mut version = 0;
    // SAFETY: the number is written to, and nothing else.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }.result()?;
    Ok(format!("{}.{}", version / 1000, version % 1000 / 10))
}

/// The driver's own, which its CUDA interface does not tell.
fn driver_version() -> Option<String> {
    let output = Command::new("nvidia-smi")
        .args([
            "--query-gpu=driver_version",
            "--format=csv,noheader",
            "-i",
            "0",
        ])
        .output()
        .ok()
        .filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
