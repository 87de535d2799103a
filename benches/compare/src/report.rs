//! Results, and the Markdown made of them.

use crate::limits::{MEMCPY, UPDATE};
use crate::phasor::PHASOR;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::process::Command;

/// All of one run.
#[derive(Serialize, Deserialize)]
pub struct Report {
    pub date: String,
    pub machine: Machine,
    pub versions: BTreeMap<String, String>,
    /// The variant that phasor chooses.
    pub isa: String,
    /// Too few samples on too small buffers to say anything.
    pub quick: bool,
    pub measurements: Vec<Measurement>,
    pub growth: Vec<Growth>,
    /// What was not measured, and why.
    pub skipped: BTreeSet<String>,
}

/// What one library took for one case.
#[derive(Clone, Serialize, Deserialize)]
pub struct Measurement {
    pub case: String,
    pub dtype: String,
    pub pairing: String,
    pub threads: usize,
    pub library: String,
    /// Seconds of one call: the median of the samples, and their quartiles.
    pub seconds: f64,
    pub low: f64,
    pub high: f64,
    /// Median seconds of each limit.
    pub memcpy: f64,
    pub update: f64,
    /// Bytes of q and k that are read and written.
    pub bytes: usize,
}

impl Measurement {
    pub fn of_update(&self) -> f64 {
        self.update / self.seconds
    }

    pub fn of_memcpy(&self) -> f64 {
        self.memcpy / self.seconds
    }

    /// Whether the middle halves of the samples overlap.
    fn is_within_noise_of(&self, other: &Self) -> bool {
        self.low <= other.high && other.low <= self.high
    }

    fn gigabytes(&self, seconds: f64) -> f64 {
        self.bytes as f64 / seconds / 1e9
    }

    /// Everything but the library.
    fn row(&self) -> (&str, &str, &str) {
        (&self.case, &self.dtype, &self.pairing)
    }

    /// One of the usual cases in the usual type and pairing.
    pub fn is_usual(&self) -> bool {
        let prompt = self.case.starts_with("prefill");
        let in_place = self.case.contains("in place") && !self.case.starts_with("head_dim");
        (prompt || in_place) && self.dtype == "bf16" && self.pairing == "half-split"
    }

    /// Worth a row where space is short: the usual, and a prompt in every type and pairing.
    fn is_headline(&self) -> bool {
        self.is_usual() || self.case.starts_with("prefill") && self.case.contains("in place")
    }

    /// phasor with a variant that it would not choose.
    pub fn is_forced(&self) -> bool {
        self.library != PHASOR && self.library.starts_with(PHASOR)
    }
}

/// One point of how cost grows along an axis.
#[derive(Clone, Serialize, Deserialize)]
pub struct Growth {
    pub axis: String,
    pub x: usize,
    pub bytes: usize,
    /// Seconds of one call.
    pub phasor: f64,
    pub memcpy: f64,
    pub update: f64,
}

#[derive(Clone, Serialize, Deserialize)]
pub struct Machine {
    pub cpu: String,
    pub threads: usize,
    pub caches: Vec<String>,
    pub last_level_cache: usize,
    pub memory: Option<usize>,
}

/// Where the system does not tell.
const ASSUMED_CACHE: usize = 32 << 20;

impl Machine {
    pub fn read() -> Self {
        let cpu = field("/proc/cpuinfo", "model name")
            .or_else(|| output("sysctl", &["-n", "machdep.cpu.brand_string"]))
            .unwrap_or_else(|| format!("unknown {}", std::env::consts::ARCH));
        let mut caches = Vec::new();
        let mut last_level_cache = None;
        for index in 0.. {
            let read = |name: &str| {
                let path = format!("/sys/devices/system/cpu/cpu0/cache/index{index}/{name}");
                let text = std::fs::read_to_string(path).ok()?;
                Some(text.trim().to_owned())
            };
            let (Some(level), Some(kind), Some(size)) = (read("level"), read("type"), read("size"))
            else {
                break;
            };
            if kind != "Instruction" {
                // Levels ascend, so the last is the largest.
                last_level_cache = size
                    .trim_end_matches('K')
                    .parse()
                    .ok()
                    .map(|k: usize| k << 10);
                caches.push(format!("L{level} {} KiB", size.trim_end_matches('K')));
            }
        }
        if caches.is_empty() {
            caches.push(format!("unknown, taken as {} MiB", ASSUMED_CACHE >> 20));
        }
        Self {
            cpu,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            caches,
            last_level_cache: last_level_cache.unwrap_or(ASSUMED_CACHE),
            memory: field("/proc/meminfo", "MemTotal")
                .and_then(|size| size.trim_end_matches(" kB").parse::<usize>().ok())
                .map(|size| size << 10),
        }
    }
}

impl std::fmt::Display for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { cpu, threads, .. } = self;
        write!(f, "{cpu}, {threads} threads, {}", self.caches.join(", "))?;
        match self.memory {
            Some(bytes) => write!(f, ", {} GiB memory", bytes >> 30),
            None => Ok(()),
        }
    }
}

fn field(path: &str, name: &str) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .ok()
        .filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Versions of what is measured in this process, as its lock file has them.
pub fn own_versions() -> BTreeMap<String, String> {
    let mut versions = BTreeMap::new();
    for package in include_str!("../Cargo.lock").split("[[package]]") {
        let value = |key: &str| {
            let line = package.lines().find(|line| line.starts_with(key))?;
            Some(line.split('"').nth(1)?.to_owned())
        };
        if let (Some(name), Some(version)) = (value("name"), value("version"))
            && ["phasor", "candle-nn"].contains(&name.as_str())
        {
            versions.insert(name, version);
        }
    }
    if let Some(commit) = output("git", &["describe", "--always", "--dirty"]) {
        versions
            .entry(PHASOR.to_owned())
            .and_modify(|version| *version += &format!(" ({commit})"));
    }
    if let Some(rustc) = output("rustc", &["--version"]) {
        let version = rustc.split(' ').nth(1).unwrap_or(&rustc).to_owned();
        versions.insert("rustc".to_owned(), version);
    }
    versions
}

impl Report {
    /// Machine, date and versions, for every table and chart.
    pub fn conditions(&self) -> [String; 2] {
        let versions: Vec<_> = self
            .versions
            .iter()
            .map(|(name, v)| format!("{name} {v}"))
            .collect();
        let quick = if self.quick {
            " QUICK RUN: these numbers mean nothing."
        } else {
            ""
        };
        [
            format!("{}. {}.{quick}", self.machine, self.date),
            format!("{}; phasor uses {}.", versions.join(", "), self.isa),
        ]
    }

    /// What each library does by itself.
    pub fn chosen(&self) -> impl Iterator<Item = &Measurement> {
        self.measurements.iter().filter(|m| !m.is_forced())
    }

    pub fn thread_counts(&self) -> BTreeSet<usize> {
        self.measurements.iter().map(|m| m.threads).collect()
    }

    /// The rows that say most, as one table.
    pub fn headlines(&self) -> String {
        let mut text = format!(
            "| threads | case | type, pairing | phasor GB/s | of {UPDATE} | of {MEMCPY} \
             | fastest peer | its share of {UPDATE} | phasor is faster by |\n\
             |--:|---|---|--:|--:|--:|---|--:|--:|\n"
        );
        for ours in self
            .chosen()
            .filter(|m| m.library == PHASOR && m.is_headline())
        {
            let (case, dtype, pairing) = ours.row();
            let _ = write!(
                text,
                "| {} | {case} | {dtype} {pairing} | {:.1} | {:.2} | {:.2} ",
                ours.threads,
                ours.gigabytes(ours.seconds),
                ours.of_update(),
                ours.of_memcpy(),
            );
            text += &match fastest_peer(ours, self.chosen()) {
                Some(peer) => format!(
                    "| {} | {:.2} | {:.1}x |\n",
                    peer.library,
                    peer.of_update(),
                    peer.seconds / ours.seconds
                ),
                None => "| | | |\n".to_owned(),
            };
        }
        text
    }

    /// The few of them that stand first: one thread, bf16, fewer columns.
    pub fn first_lines(&self) -> String {
        let mut text = format!(
            "| case | pairing | phasor GB/s | of {UPDATE} | fastest peer | phasor is faster by |\n\
             |---|---|--:|--:|---|--:|\n"
        );
        for ours in self.chosen().filter(|m| {
            m.library == PHASOR && m.is_headline() && m.threads == 1 && m.dtype == "bf16"
        }) {
            let (case, _, pairing) = ours.row();
            let peer = fastest_peer(ours, self.chosen());
            let ratio = peer.map(|peer| format!("{:.1}x", peer.seconds / ours.seconds));
            let _ = writeln!(
                text,
                "| {case} | {pairing} | {:.1} | {:.2} | {} | {} |",
                ours.gigabytes(ours.seconds),
                ours.of_update(),
                peer.map_or("", |peer| &peer.library),
                ratio.unwrap_or_default()
            );
        }
        text
    }

    pub fn markdown(&self) -> String {
        let mut text = String::from("# Rotary embedding on the host\n\n");
        for line in self.conditions() {
            text += &format!("{line}\n");
        }
        text += "\nMedians; half of the samples lie in the middle half. GB/s counts the bytes of q and k \
                 read and written once. A share is the time of the limit over the time of the \
                 library: more is better.\n";
        for threads in self.thread_counts() {
            let rows: Vec<_> = self
                .measurements
                .iter()
                .filter(|m| m.threads == threads)
                .collect();
            summary(&mut text, threads, &rows);
            details(&mut text, threads, &rows);
        }
        if !self.growth.is_empty() {
            self.growth_tables(&mut text);
        }
        if !self.skipped.is_empty() {
            text += "\n## Not measured\n\n";
            for reason in &self.skipped {
                text += &format!("- {reason}\n");
            }
        }
        text
    }

    fn growth_tables(&self, text: &mut String) {
        for axis in axes(&self.growth) {
            let _ = write!(
                text,
                "\n## Growth: {axis}\n\n\
                 | | µs | GB/s | of {MEMCPY} | of {UPDATE} |\n|---|---|---|---|---|\n",
            );
            for point in self.growth.iter().filter(|point| point.axis == axis) {
                let _ = writeln!(
                    text,
                    "| {} | {} | {:.1} | {:.2} | {:.2} |",
                    point.x,
                    microseconds(point.phasor),
                    point.bytes as f64 / point.phasor / 1e9,
                    point.memcpy / point.phasor,
                    point.update / point.phasor
                );
            }
        }
    }
}

/// The axes, in the order in which they were measured.
pub fn axes(growth: &[Growth]) -> Vec<&str> {
    let mut axes: Vec<&str> = growth.iter().map(|point| point.axis.as_str()).collect();
    axes.dedup();
    axes
}

pub fn threads_name(threads: usize) -> String {
    match threads {
        1 => "1 thread".to_owned(),
        n => format!("{n} threads"),
    }
}

/// phasor beside the limits and the fastest peer of each row, and how often that is faster.
fn summary(text: &mut String, threads: usize, rows: &[&Measurement]) {
    let _ = write!(
        text,
        "\n## {}\n\n\
         | case | type | pairing | {MEMCPY} GB/s | {UPDATE} GB/s | phasor GB/s | of {MEMCPY} \
         | of {UPDATE} | fastest peer | of {UPDATE} | phasor is faster by |\n\
         |---|---|---|---|---|---|---|---|---|---|---|\n",
        threads_name(threads)
    );
    let (mut compared, mut slower, mut within_noise) = (0, 0, 0);
    for ours in rows.iter().filter(|m| m.library == PHASOR) {
        let (case, dtype, pairing) = ours.row();
        let peer = fastest_peer(ours, rows.iter().copied());
        if let Some(peer) = peer {
            compared += 1;
            if ours.seconds > peer.seconds {
                slower += 1;
                within_noise += usize::from(ours.is_within_noise_of(peer));
            }
        }
        let _ = write!(
            text,
            "| {case} | {dtype} | {pairing} | {:.1} | {:.1} | {:.1} | {:.2} | {:.2} ",
            ours.gigabytes(ours.memcpy),
            ours.gigabytes(ours.update),
            ours.gigabytes(ours.seconds),
            ours.of_memcpy(),
            ours.of_update(),
        );
        *text += &match peer {
            Some(peer) => format!(
                "| {} | {:.2} | {:.2}x |\n",
                peer.library,
                peer.of_update(),
                peer.seconds / ours.seconds
            ),
            None => "| | | |\n".to_owned(),
        };
    }
    let _ = write!(
        text,
        "\nSlower than the fastest peer: {slower} of {compared} rows"
    );
    *text += &match slower {
        0 => ".\n".to_owned(),
        _ => format!(
            ", of which {within_noise} within noise (the middle halves of the samples overlap).\n"
        ),
    };
}

fn fastest_peer<'a>(
    ours: &Measurement,
    rows: impl Iterator<Item = &'a Measurement>,
) -> Option<&'a Measurement> {
    rows.filter(|m| m.threads == ours.threads && m.row() == ours.row())
        .filter(|m| m.library != PHASOR && !m.is_forced())
        .min_by(|a, b| a.seconds.total_cmp(&b.seconds))
}

fn details(text: &mut String, threads: usize, rows: &[&Measurement]) {
    let _ = write!(
        text,
        "\n<details><summary>Every library, {}</summary>\n\n\
         | case | type | pairing | library | µs | middle half, µs | GB/s | of {MEMCPY} \
         | of {UPDATE} |\n\
         |---|---|---|---|---|---|---|---|---|\n",
        threads_name(threads)
    );
    for m in rows {
        let (case, dtype, pairing) = m.row();
        let _ = writeln!(
            text,
            "| {case} | {dtype} | {pairing} | {} | {} | {} to {} | {:.1} | {:.2} | {:.2} |",
            m.library,
            microseconds(m.seconds),
            microseconds(m.low),
            microseconds(m.high),
            m.gigabytes(m.seconds),
            m.of_memcpy(),
            m.of_update()
        );
    }
    *text += "\n</details>\n";
}

/// Three digits.
fn microseconds(seconds: f64) -> String {
    let value = seconds * 1e6;
    match value {
        v if v < 10.0 => format!("{v:.2}"),
        v if v < 100.0 => format!("{v:.1}"),
        v => format!("{v:.0}"),
    }
}
