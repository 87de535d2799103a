//! What was measured on a GPU, as data. The bench writes it, `scripts/gpu-peers` adds rows to it, and
//! the publisher of `benches/compare`, which includes this file, shows it.

use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

pub const PHASOR: &str = "phasor";
/// How the names of all copy kernels begin: they differ in the accesses of a thread.
pub const COPY_KERNEL: &str = "copy kernel";
/// q and k of Llama-3-8B.
pub const LLAMA: &str = "32+8 heads of 128";

/// All of one run.
#[derive(Clone, Serialize, Deserialize)]
pub struct Results {
    pub meta: Meta,
    pub rows: Vec<Row>,
}

#[derive(Clone, Serialize, Deserialize)]
pub struct Meta {
    pub device: String,
    pub driver: String,
    /// The version that the driver supports.
    pub cuda: String,
    pub date: String,
    /// The commit.
    pub phasor: String,
    /// What `cat cuda/*.cu cuda/*.cuh cuda/*.h | cksum` gives there, which tells whether kernels have
    /// changed since.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernels: Option<u32>,
    /// The image that phasor's kernels came from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// Of the peers.
    pub versions: BTreeMap<String, String>,
    /// What was not measured, and why.
    pub skipped: Vec<String>,
}

/// What one contender took for one case.
#[derive(Clone, Serialize, Deserialize)]
pub struct Row {
    pub contender: String,
    pub kind: Kind,
    pub shape: String,
    pub dtype: String,
    /// Limits have none.
    pub pairing: Option<String>,
    /// What a serving step does, from packed qkv to a written cache. Otherwise q and k are rotated in place;
    /// and limits serve all steps that move as many bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<String>,
    pub tokens: usize,
    /// Bytes that a call has to read and to write, together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<usize>,
    pub memory: Memory,
    pub launch: Launch,
    pub timed: Timed,
    /// Microseconds of one call, the median.
    pub us: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    Phasor,
    /// Moves the same bytes, or nothing.
    Limit,
    Peer,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Memory {
    /// Buffers in turn that do not fit into L2 together.
    Cold,
    /// One buffer again and again, or one that a kernel has just written.
    L2,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Launch {
    Ordinary,
    /// A programmatic dependent launch, which reads nothing before the kernels before it are done.
    Dependent,
    /// The same where positions are promised to be settled, so that angles need not wait.
    DependentSettled,
}

impl Launch {
    pub const ALL: [Self; 3] = [Self::Ordinary, Self::Dependent, Self::DependentSettled];

    /// How others are launched that this is held against.
    fn of_others(self) -> Self {
        match self {
            Self::Ordinary => Self::Ordinary,
            Self::Dependent | Self::DependentSettled => Self::Dependent,
        }
    }
}

impl fmt::Display for Launch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ordinary => "ordinary",
            Self::Dependent => "dependent",
            Self::DependentSettled => "dependent, positions settled",
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Timed {
    /// Replays of a graph of many calls.
    Graph,
    /// Calls on a stream, one after another, so that the host's part can show.
    Stream,
    /// What a call adds, in a graph, after a kernel that has just written the same q and k, and that
    /// lets its dependents start at once.
    AddedAfterTrigger,
    /// The same after a kernel that does not let them.
    AddedAfterNoTrigger,
}

impl Row {
    /// By replays of a graph on buffers that do not fit into L2.
    pub fn is_cold_replay(&self) -> bool {
        self.memory == Memory::Cold && self.timed == Timed::Graph
    }

    /// Of the one case that stands where space is short.
    pub fn is_headline(&self) -> bool {
        let pairing = self.pairing.as_deref().unwrap_or("half-split");
        self.is_cold_replay()
            && self.step.is_none()
            && (self.shape.as_str(), self.dtype.as_str(), pairing) == (LLAMA, "bf16", "half-split")
    }
}

/// The short table: the copy kernel, phasor and the fastest peer by launch and tokens.
pub fn headlines(rows: &[Row]) -> String {
    headlines_of(rows, &Launch::ALL)
}

/// The same of some kinds of launches.
pub fn headlines_of(rows: &[Row], launches: &[Launch]) -> String {
    short_table(&filtered(rows, Row::is_headline), launches)
}

/// The same of a serving step.
pub fn headlines_of_step(rows: &[Row], step: &str) -> String {
    let is_of_step = is_of_step(rows, step);
    let rows = filtered(rows, |row| row.is_cold_replay() && is_of_step(row));
    short_table(&rows, &Launch::ALL)
}

/// All serving steps that were measured, in the order of first occurrence.
pub fn steps(rows: &[Row]) -> Vec<&str> {
    let mut steps = Vec::new();
    for step in rows.iter().filter_map(|row| row.step.as_deref()) {
        if !steps.contains(&step) {
            steps.push(step);
        }
    }
    steps
}

/// Which rows are of a step: its own, and limits that move as many bytes.
pub fn is_of_step<'a>(rows: &[Row], step: &'a str) -> impl Fn(&Row) -> bool + 'a + use<'a> {
    let moved = |row: &Row| Some((row.shape.clone(), row.tokens, row.bytes?));
    let own = filtered(rows, |row| row.step.as_deref() == Some(step));
    let own: BTreeSet<_> = own.into_iter().filter_map(moved).collect();
    move |row| match &row.step {
        Some(other) => other == step,
        None => row.kind == Kind::Limit && moved(row).is_some_and(|moved| own.contains(&moved)),
    }
}

fn filtered(rows: &[Row], wanted: impl Fn(&Row) -> bool) -> Vec<&Row> {
    rows.iter().filter(|row| wanted(row)).collect()
}

fn short_table(rows: &[&Row], launches: &[Launch]) -> String {
    let sizes: BTreeSet<usize> = rows.iter().map(|row| row.tokens).collect();
    let mut text = format!(
        "| launch | tokens | {COPY_KERNEL}, µs | phasor, µs | share of the copy's speed \
         | fastest peer | µs | phasor is faster by |\n\
         |---|--:|--:|--:|--:|---|--:|--:|\n"
    );
    for &launch in launches {
        for &tokens in &sizes {
            let fastest = |launch: Launch, wanted: &dyn Fn(&Row) -> bool| {
                rows.iter()
                    .filter(|row| row.tokens == tokens && row.launch == launch && wanted(row))
                    .min_by(|a, b| a.us.total_cmp(&b.us))
            };
            let ours = fastest(launch, &|row| row.contender == PHASOR);
            let peer = fastest(launch.of_others(), &|row| row.kind == Kind::Peer);
            let copy = fastest(launch.of_others(), &|row| {
                row.contender.starts_with(COPY_KERNEL)
            });
            // No peer has the last kind of launch.
            if ours.is_none() && (peer.is_none() || launch == Launch::DependentSettled) {
                continue;
            }
            let cell = |value: Option<String>| value.unwrap_or_default();
            let us = |row: Option<&&Row>| cell(row.map(|row| digits(row.us)));
            let of = |upper: Option<&&Row>, lower: Option<&&Row>, unit| {
                let ratio = upper.zip(lower).map(|(upper, lower)| upper.us / lower.us);
                cell(ratio.map(|ratio| format!("{ratio:.2}{unit}")))
            };
            let columns = [
                launch.to_string(),
                thousands(tokens),
                us(copy),
                us(ours),
                of(copy, ours, ""),
                cell(peer.map(|row| row.contender.clone())),
                us(peer),
                of(peer, ours, "x"),
            ];
            text += &format!("| {} |\n", columns.join(" | "));
        }
    }
    text
}

/// Three digits, four from a thousand on.
pub fn digits(us: f64) -> String {
    match us {
        us if us < 9.995 => format!("{us:.2}"),
        us if us < 99.95 => format!("{us:.1}"),
        us => format!("{us:.0}"),
    }
}

/// `32,768` of 32768.
pub fn thousands(value: usize) -> String {
    match value {
        ..1000 => value.to_string(),
        _ => format!("{},{:03}", thousands(value / 1000), value % 1000),
    }
}

impl FromStr for Results {
    type Err = serde_json::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        serde_json::from_str(text)
    }
}

/// JSON with a line for each row, so that changes can be read.
impl fmt::Display for Results {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let meta = serde_json::to_string_pretty(&self.meta).map_err(|_| fmt::Error)?;
        write!(f, "{{\n\"meta\": {meta},\n\"rows\": [")?;
        let mut end = "\n";
        for row in &self.rows {
            let row = serde_json::to_string(row).map_err(|_| fmt::Error)?;
            write!(f, "{end}{row}")?;
            end = ",\n";
        }
        write!(f, "\n]\n}}\n")
    }
}

/// Today in UTC.
pub fn today() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let mut days = now.map_or(0, |now| now.as_secs() / 86_400);
    let leap = |year: u64| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let february = 28 + u64::from(leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    format!("{year}-{month:02}-{:02}", days + 1)
}
