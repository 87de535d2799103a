//! Measures phasor's host backend, the limits of memory and other implementations in one run, and
//! turns committed results, those of GPUs too, into tables and charts.

mod accuracy;
mod candle;
mod cases;
mod gpu;
mod limits;
mod peers;
mod phasor;
mod publish;
mod report;
#[cfg(all(test, unix))]
mod scripts;
mod svg;

use crate::cases::{Case, Contender, DTYPES, PAIRINGS, Plain, Sampling, Seconds, measure};
use crate::peers::Session;
use crate::report::{Growth, Machine, Measurement, Report};
use ::phasor::half::{bf16, f16};
use ::phasor::{Dtype, Element, Isa, Pairing};
use candle_core::WithDType;
use rayon::{ThreadPool, ThreadPoolBuilder};
use std::collections::BTreeSet;
use std::error::Error;
use std::sync::{Arc, Mutex};

const USAGE: &str = "\
Options:
  --python PATH     a Python with some of the packages of requirements.txt; may be repeated
  --growth          also measure how cost grows with tokens, heads, head_dim and threads
  --filter TEXT     only cases whose name contains TEXT
  --quick           few samples on small buffers: shows that everything runs, and nothing else
  --markdown FILE   write tables there instead of printing them
  --svg FILE        draw charts: FILE, and beside it those for all threads, the usual cases, growth
  --json FILE       save the results
  --from FILE       measure nothing, take saved results

Instead of all that, and without measuring:
  --accuracy FILE   draw the error of cos and sin against position, and print some of it
  --publish FOLDER  make tables and charts of every host-*.json and gpu-*.json there, and draw the
                    accuracy
  --readme FILE     with --publish: replace the sections of this file that show them, and those of
                    docs/performance.md beside it
  --check           with --publish: write nothing, fail if a file is not what the results give";

#[derive(Default)]
struct Options {
    pythons: Vec<String>,
    growth: bool,
    filter: String,
    quick: bool,
    markdown: Option<String>,
    svg: Option<String>,
    json: Option<String>,
    from: Option<String>,
    accuracy: Option<String>,
    publish: Option<String>,
    readme: Option<String>,
    check: bool,
}

impl Options {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut options = Self::default();
        while let Some(argument) = arguments.next() {
            let mut value = || {
                let value = arguments.next();
                value.ok_or_else(|| format!("{argument} needs a value\n{USAGE}"))
            };
            match argument.as_str() {
                "--python" => options.pythons.push(value()?),
                "--growth" => options.growth = true,
                "--filter" => options.filter = value()?,
                "--quick" => options.quick = true,
                "--markdown" => options.markdown = Some(value()?),
                "--svg" => options.svg = Some(value()?),
                "--json" => options.json = Some(value()?),
                "--from" => options.from = Some(value()?),
                "--accuracy" => options.accuracy = Some(value()?),
                "--publish" => options.publish = Some(value()?),
                "--readme" => options.readme = Some(value()?),
                "--check" => options.check = true,
                _ => return Err(format!("{argument}?\n{USAGE}")),
            }
        }
        if options.publish.is_some() != options.readme.is_some() {
            return Err(format!("--publish and --readme need each other\n{USAGE}"));
        }
        if options.check && options.publish.is_none() {
            return Err(format!("--check needs --publish\n{USAGE}"));
        }
        Ok(options)
    }
}

/// A case with what varies.
#[derive(Clone)]
struct Setting {
    case: Case,
    dtype: Dtype,
    pairing: Pairing,
    threads: usize,
}

impl Setting {
    fn pairing_name(&self) -> String {
        self.pairing.name().replace('_', "-")
    }
}

impl std::fmt::Display for Setting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (name, dtype, pairing) = (&self.case.name, self.dtype, self.pairing_name());
        write!(f, "{name}, {dtype} {pairing}, threads: {}", self.threads)
    }
}

/// Seconds of each limit.
#[derive(Clone, Copy)]
struct Limits {
    memcpy: f64,
    update: f64,
}

fn main() {
    let options = Options::parse(std::env::args().skip(1)).unwrap_or_else(|message| {
        eprintln!("{message}");
        std::process::exit(2)
    });
    if let Err(error) = perform(&options) {
        eprintln!("{error}");
        std::process::exit(1)
    }
}

fn perform(options: &Options) -> Result<(), Failure> {
    if let Some(path) = &options.accuracy {
        std::fs::write(path, svg::accuracy(&accuracy::curves()?))?;
        print!("{}", accuracy::table()?);
        return Ok(());
    }
    if let (Some(folder), Some(readme)) = (&options.publish, &options.readme) {
        let act = if options.check {
            publish::check
        } else {
            publish::write
        };
        return act(folder.as_ref(), readme.as_ref());
    }
    let report = match &options.from {
        Some(path) => serde_json::from_str(&std::fs::read_to_string(path)?)?,
        None => run(options)?,
    };
    if let Some(path) = &options.json {
        std::fs::write(path, serde_json::to_string_pretty(&report)? + "\n")?;
    }
    match &options.markdown {
        Some(path) => std::fs::write(path, report.markdown())?,
        None => println!("{}", report.markdown()),
    }
    if let Some(path) = &options.svg {
        for (suffix, chart) in svg::charts(&report) {
            let stem = path.strip_suffix(".svg").unwrap_or(path);
            std::fs::write(format!("{stem}{suffix}.svg"), chart)?;
        }
    }
    Ok(())
}

fn run(options: &Options) -> Result<Report, Failure> {
    let machine = Machine::read();
    let sampling = Sampling::new(options.quick, &machine);
    let mut report = Report {
        date: gpu::results::today(),
        versions: report::own_versions(),
        isa: Isa::best().name().to_owned(),
        quick: options.quick,
        measurements: Vec::new(),
        growth: Vec::new(),
        skipped: BTreeSet::new(),
        machine,
    };
    // All are started before anything is measured: one that cannot run costs nothing then.
    let mut rounds = Vec::new();
    for threads in BTreeSet::from([1, report.machine.threads]) {
        let settings = settings(threads, options);
        if settings.is_empty() {
            continue;
        }
        let mut sessions = Vec::new();
        for python in &options.pythons {
            let session = Session::start(python, threads, &sampling)?;
            report.versions.extend(session.versions.clone());
            sessions.push(Arc::new(Mutex::new(session)));
        }
        rounds.push((threads, settings, sessions));
    }
    for (threads, settings, sessions) in rounds {
        let pool = pool(threads)?;
        for setting in &settings {
            eprintln!("{setting}");
            let (rows, skipped) =
                pool.install(|| measure_setting(setting, &sampling, &sessions))?;
            report.measurements.extend(rows);
            report.skipped.extend(skipped);
        }
    }
    if options.growth {
        report.growth = growth(options.quick, report.machine.threads, &sampling)?;
    }
    Ok(report)
}

fn settings(threads: usize, options: &Options) -> Vec<Setting> {
    let mut settings = Vec::new();
    for case in cases::all(options.quick) {
        if !case.name.contains(&options.filter) {
            continue;
        }
        for dtype in DTYPES {
            settings.extend(PAIRINGS.map(|pairing| Setting {
                case: case.clone(),
                dtype,
                pairing,
                threads,
            }));
        }
    }
    settings
}

fn pool(threads: usize) -> Result<ThreadPool, rayon::ThreadPoolBuildError> {
    ThreadPoolBuilder::new().num_threads(threads).build()
}

type Failure = Box<dyn Error + Send + Sync>;

/// The rows of a setting, and what was skipped. Runs inside the pool whose threads are used.
fn measure_setting(
    setting: &Setting,
    sampling: &Sampling,
    sessions: &[peers::Shared],
) -> Result<(Vec<Measurement>, Vec<String>), Failure> {
    fn of<T: Element + Plain + WithDType>(
        setting: &Setting,
        sampling: &Sampling,
    ) -> Result<Vec<Contender>, Failure> {
        let Setting { case, pairing, .. } = setting;
        let variants = phasor::variants(setting.dtype);
        let buffers = phasor::buffers::<T>(case, sampling);
        let mut contenders = Vec::from(limits::contenders(case, &buffers, sampling));
        contenders.extend(phasor::contenders(case, *pairing, &variants, &buffers)?);
        contenders.extend(phasor::outside_of_pool(case, *pairing, &buffers)?);
        contenders.push(candle::contender::<T>(case, *pairing, sampling)?);
        Ok(contenders)
    }
    let mut contenders = match setting.dtype {
        Dtype::F32 => of::<f32>(setting, sampling),
        Dtype::F16 => of::<f16>(setting, sampling),
        Dtype::Bf16 => of::<bf16>(setting, sampling),
        other => return Err(format!("{other} is not measured").into()),
    }?;
    let (peers, unprepared) = peers::contenders(sessions, setting);
    contenders.extend(peers);
    let (limits, measured) = beside_limits(contenders, sampling)?;
    let mut rows = Vec::new();
    let mut skipped: Vec<String> = unprepared
        .into_iter()
        .map(|skipped| match skipped.always {
            true => format!("{}: {}", skipped.library, skipped.reason),
            false => format!("{}, {setting}: {}", skipped.library, skipped.reason),
        })
        .collect();
    for (library, taken) in measured {
        match taken {
            Ok(seconds) => rows.push(row(setting, library, seconds, limits)),
            Err(reason) => skipped.push(format!("{library}, {setting}: {reason}")),
        }
    }
    Ok((rows, skipped))
}

fn row(setting: &Setting, library: String, seconds: Seconds, limits: Limits) -> Measurement {
    Measurement {
        case: setting.case.name.clone(),
        dtype: setting.dtype.name().to_owned(),
        pairing: setting.pairing_name(),
        threads: setting.threads,
        library,
        seconds: seconds.median,
        low: seconds.low,
        high: seconds.high,
        memcpy: limits.memcpy,
        update: limits.update,
        bytes: setting.case.footprint(setting.dtype).bytes(),
    }
}

type Measured = Vec<(String, Result<Seconds, Failure>)>;

/// Of contenders whose first two are the limits.
fn beside_limits(
    mut contenders: Vec<Contender>,
    sampling: &Sampling,
) -> Result<(Limits, Measured), Failure> {
    let taken = measure(&mut contenders, sampling);
    let libraries = contenders.into_iter().map(|contender| contender.library);
    let mut measured = libraries.zip(taken);
    let mut limit = || {
        let (_, taken) = measured.next().expect("the limits come first");
        taken.map(|seconds| seconds.median)
    };
    let limits = Limits {
        memcpy: limit()?,
        update: limit()?,
    };
    Ok((limits, measured.collect()))
}

/// bf16, half-split, in place and cold, with all threads unless threads are the axis.
fn growth(quick: bool, threads: usize, sampling: &Sampling) -> Result<Vec<Growth>, Failure> {
    let most = |most: u32, few: u32| (0..=if quick { few } else { most }).map(|i| 1usize << i);
    let tokens = if quick { 16 } else { 512 };
    let mut points: Vec<(String, usize, usize, Case)> = Vec::new();
    // One of eight devices' share of Llama-3-8B's heads, so that a million tokens fit in memory.
    points.extend(most(20, 6).map(|x| {
        let axis = "tokens (4 + 1 heads of 128)".to_owned();
        (axis, x, threads, Case::llama("", x).heads(4, 1, 128))
    }));
    points.extend(most(7, 3).map(|x| {
        let axis = format!("query heads, a quarter as many key heads ({tokens} tokens of 128)");
        let case = Case::llama("", tokens).heads(x, x.div_ceil(4), 128);
        (axis, x, threads, case)
    }));
    points.extend([64, 80, 96, 128, 192, 256, 384, 512].map(|x| {
        let axis = format!("head_dim ({tokens} tokens, 32 + 8 heads)");
        (axis, x, threads, Case::llama("", tokens).heads(32, 8, x))
    }));
    points.extend((1..=threads).map(|x| {
        let axis = format!("threads ({} tokens, 32 + 8 heads of 128)", 4 * tokens);
        (axis, x, x, Case::llama("", 4 * tokens))
    }));
    let mut growth = Vec::new();
    for (axis, x, threads, case) in points {
        eprintln!("growth, {axis}: {x}");
        let (limits, mut measured) = pool(threads)?.install(|| {
            let pairing = Pairing::HalfSplit;
            let buffers = phasor::buffers::<bf16>(&case, sampling);
            let mut all = Vec::from(limits::contenders(&case, &buffers, sampling));
            all.extend(phasor::contenders(
                &case,
                pairing,
                &[Isa::best()],
                &buffers,
            )?);
            beside_limits(all, sampling)
        })?;
        let (_, taken) = measured.remove(0);
        growth.push(Growth {
            axis,
            x,
            bytes: case.footprint(Dtype::Bf16).bytes(),
            phasor: taken?.median,
            memcpy: limits.memcpy,
            update: limits.update,
        });
    }
    Ok(growth)
}
