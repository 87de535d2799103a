//! Runs `peers.py` in a Python that has some of the packages.

use crate::cases::{Sampling, THETA};
use crate::limits::{MEMCPY, UPDATE};
use crate::{Failure, Limits, Setting};
use serde::Deserialize;
use serde_json::json;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::{Command, ExitStatus, Stdio};

/// Below this, the call from Python would count as a part of its limits.
const LONG_ENOUGH: f64 = 1e-3;

/// A line of the script's output.
#[derive(Deserialize)]
#[serde(untagged)]
enum Answer {
    Versions {
        versions: BTreeMap<String, String>,
    },
    Trying {
        id: usize,
        trying: String,
    },
    Skipped {
        /// None if the package does not do it in any case.
        id: Option<usize>,
        library: String,
        skipped: String,
    },
    Measured {
        id: usize,
        seconds: BTreeMap<String, f64>,
    },
}

/// What came back.
#[derive(Default)]
pub struct Answers {
    pub versions: BTreeMap<String, String>,
    /// Index of the setting, if it depends on that, library and reason.
    pub skipped: Vec<(Option<usize>, String, String)>,
    /// Index of the setting, library, its seconds and the limits to hold it against.
    pub measured: Vec<(usize, String, f64, Limits)>,
}

/// Measures all settings, which agree in threads: how many threads a library uses is settled when
/// it is loaded. `limits` are those of this process.
pub fn run(
    python: &str,
    settings: &[Setting],
    limits: &[Limits],
    sampling: &Sampling,
) -> Result<Answers, Failure> {
    let mut answers = Answers::default();
    let mut remaining = 0..settings.len();
    let mut avoid: Vec<(usize, String)> = Vec::new();
    while !remaining.is_empty() {
        let problems = remaining.clone().map(|id| problem(id, &settings[id]));
        let request = json!({
            "threads": settings[remaining.start].threads,
            "samples": sampling.samples,
            "budget": sampling.budget.as_secs_f64(),
            "sample": sampling.sample.as_secs_f64(),
            "cold_bytes": sampling.cold_bytes,
            "problems": problems.collect::<Vec<_>>(),
            "avoid": avoid,
        });
        let mut last_try = None;
        let status = converse(python, &request, |answer| match answer {
            Answer::Versions { versions } => answers.versions = versions,
            Answer::Trying { id, trying } => last_try = Some((id, trying)),
            Answer::Skipped {
                id,
                library,
                skipped,
            } => answers.skipped.push((id, library, skipped)),
            Answer::Measured { id, mut seconds } => {
                eprintln!("{python}: {}", settings[id]);
                let limits = choose(&settings[id], &mut seconds, limits[id]);
                let libraries = seconds.into_iter();
                answers
                    .measured
                    .extend(libraries.map(|(library, taken)| (id, library, taken, limits)));
                remaining.start = id + 1;
            }
        })?;
        if status.success() {
            break;
        }
        // A library that takes the process down costs its own figure, not those of the others.
        match last_try {
            Some((id, library)) if status.code().is_none() => {
                let reason = format!("ended the process ({status})");
                answers.skipped.push((Some(id), library.clone(), reason));
                avoid.push((id, library));
            }
            // Nor is what has been measured worth less.
            _ => {
                let packages: Vec<_> = answers.versions.keys().cloned().collect();
                let reason = format!("the process ended early ({status})");
                answers.skipped.push((None, packages.join(", "), reason));
                break;
            }
        }
    }
    Ok(answers)
}

/// Whether the script runs at all, to be asked before anything is measured.
pub fn check(python: &str) -> Result<(), Failure> {
    let status = converse(python, &json!({ "threads": 1, "problems": [] }), |_| ())?;
    match status.success() {
        true => Ok(()),
        false => Err(format!("{python} cannot run peers.py: {status}").into()),
    }
}

/// Hands the script its request, and each of its answers to `receive`.
fn converse(
    python: &str,
    request: &serde_json::Value,
    mut receive: impl FnMut(Answer),
) -> Result<ExitStatus, Failure> {
    let mut child = Command::new(python)
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/peers.py"))
        // Pages as all others have them, or its limits would be higher than what torch can reach.
        .env("NUMPY_MADVISE_HUGEPAGE", "0")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| format!("{python}: {error}"))?;
    // Both ends are piped, so both are there. The script reads all before it writes; dropping the
    // input ends it.
    if let Some(input) = child.stdin.take() {
        serde_json::to_writer(input, request)?;
    }
    if let Some(output) = child.stdout.take() {
        for line in BufReader::new(output).lines() {
            receive(serde_json::from_str(&line?)?);
        }
    }
    Ok(child.wait()?)
}

/// The limits as measured beside the libraries, where numpy can reach them.
fn choose(setting: &Setting, seconds: &mut BTreeMap<String, f64>, here: Limits) -> Limits {
    let contiguous = setting.case.footprint(setting.dtype).is_contiguous();
    match (seconds.remove(MEMCPY), seconds.remove(UPDATE)) {
        (Some(memcpy), Some(update)) if contiguous && memcpy.min(update) >= LONG_ENOUGH => {
            Limits { memcpy, update }
        }
        _ => here,
    }
}

fn problem(id: usize, setting: &Setting) -> serde_json::Value {
    let case = &setting.case;
    json!({
        "id": id,
        "sequences": case.sequences,
        "tokens": case.tokens,
        "q_heads": case.q_heads,
        "k_heads": case.k_heads,
        "head_dim": case.head_dim,
        "rotary_dim": case.rotary_dim,
        "in_place": case.in_place,
        "cold": case.cold,
        "dtype": setting.dtype.name(),
        "pairing": setting.pairing.name(),
        "positions": case.positions(),
        "theta": THETA,
        "bytes": case.footprint(setting.dtype).bytes(),
    })
}
