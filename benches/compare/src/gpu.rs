//! Results of GPUs as Markdown. What they are is written once, where they are measured.

#[path = "../../cuda/results.rs"]
pub mod results;

#[cfg(test)]
#[path = "../../cuda/schedule.rs"]
pub mod schedule;
#[cfg(test)]
#[path = "../../cuda/steps.rs"]
pub mod steps;

use crate::Failure;
use results::{
    Kind, Launch, Memory, PHASOR, Results, Row, Timed, digits, headlines, headlines_of_step,
    is_of_step, thousands,
};
use std::collections::BTreeSet;
use std::path::Path;

/// For every table and chart: what was measured where and when, and the peers.
pub fn conditions(results: &Results) -> [String; 2] {
    let meta = &results.meta;
    let image = meta.image.as_ref().map(|image| format!(" ({image})"));
    let versions: Vec<_> = meta
        .versions
        .iter()
        .map(|(name, version)| format!("{name} {version}"))
        .collect();
    let peers = match versions.is_empty() {
        true => "No peers".to_owned(),
        false => versions.join(", "),
    };
    [
        format!(
            "{}, driver {}, CUDA {}. {}. phasor {}{}.",
            meta.device,
            meta.driver,
            meta.cuda,
            meta.date,
            meta.phasor,
            image.unwrap_or_default()
        ),
        format!("{peers}."),
    ]
}

/// Which kernels were measured, in view of those in the tree.
pub fn age(results: &Results, kernels_now: u32) -> String {
    let commit = &results.meta.phasor;
    match results.meta.kernels {
        Some(then) if then == kernels_now => format!(
            "phasor was measured at commit {commit}, with the kernels that are in this tree."
        ),
        Some(_) => format!(
            "phasor was measured at commit {commit}. Its kernels have changed since: these are not \
             figures of the newest ones."
        ),
        None => format!(
            "phasor was measured at commit {commit}; whether its kernels have changed since is not \
             recorded."
        ),
    }
}

/// A number for the sources of the kernels in a folder: that of
/// `cat *.cu *.cuh *.h | cksum` there, in the C locale.
pub fn kernels(folder: &Path) -> Result<u32, Failure> {
    let named = |error: std::io::Error| format!("{}: {error}", folder.display());
    let mut sources = Vec::new();
    for extension in ["cu", "cuh", "h"] {
        let entries = std::fs::read_dir(folder).map_err(named)?;
        let paths = entries.map(|entry| Ok(entry?.path()));
        let mut paths = paths.collect::<Result<Vec<_>, _>>().map_err(named)?;
        paths.retain(|path| path.extension().is_some_and(|e| e == extension));
        paths.sort();
        for path in paths {
            sources.extend(std::fs::read(path).map_err(named)?);
        }
    }
    Ok(checksum(&sources))
}

/// The CRC of POSIX's `cksum`.
fn checksum(bytes: &[u8]) -> u32 {
    let length = bytes.len().to_le_bytes();
    let used = length.len() - bytes.len().leading_zeros() as usize / 8;
    let all = bytes.iter().chain(&length[..used]);
    !all.fold(0, |crc: u32, &byte| {
        (0..8).fold(crc ^ u32::from(byte) << 24, |crc, _| {
            crc << 1 ^ if crc >> 31 == 1 { 0x04c1_1db7 } else { 0 }
        })
    })
}

/// All rows as tables.
pub fn markdown(results: &Results, kernels_now: u32) -> String {
    let mut text = String::from("# Rotary embedding on a GPU\n\n");
    for line in conditions(results) {
        text += &format!("{line}\n");
    }
    text += &format!("\n{}\n", age(results, kernels_now));
    text += "\nMicroseconds of one call, in place unless it says otherwise: medians over replays of a CUDA graph of many calls, \
             between two events. Unless a column says in L2, buffers are taken in turn that do not fit \
             into L2 together. Limits move the bytes of a call, once read and once written. Peers read \
             tables of cos and sin that were made beforehand, unless the name says otherwise; phasor \
             forms its angles in each call. A dependent launch may start before the kernels before it \
             are done, and waits for them before it reads what they may have written; with settled \
             positions, angles are formed before that.\n\n";
    text += &headlines(&results.rows);
    text += &steps_section("##", results);
    for (shape, dtype, pairing) in cases(&results.rows) {
        let of = |timed: Timed| -> Vec<&Row> {
            let is_wanted = |row: &Row| row.timed == timed && is_of(row, (shape, dtype, pairing));
            by_kind(&results.rows, is_wanted)
        };
        text += &format!(
            "\n## {shape}, {dtype}, {pairing}\n\n{}",
            table(&of(Timed::Graph))
        );
        for (timed, title) in [
            (
                Timed::AddedAfterTrigger,
                "Added after a kernel that has just written the same q and k, and that lets the next one \
                 start at once",
            ),
            (
                Timed::AddedAfterNoTrigger,
                "Added after a kernel that has just written the same q and k, and that lets nothing \
                 start before its end",
            ),
            (
                Timed::Stream,
                "A stream of launches, no graph: the host's part shows where calls are short",
            ),
        ] {
            let rows = of(timed);
            if rows.iter().any(|row| row.kind != Kind::Limit) {
                text += &format!("\n### {title}\n\n{}", table(&rows));
            }
        }
    }
    if !results.meta.skipped.is_empty() {
        text += "\n## Not measured\n\n";
        for reason in &results.meta.skipped {
            text += &format!("- {reason}\n");
        }
    }
    text
}

/// What is wanted of the rows: limits, then phasor, then peers.
fn by_kind(rows: &[Row], is_wanted: impl Fn(&Row) -> bool) -> Vec<&Row> {
    let mut rows: Vec<_> = rows.iter().filter(|row| is_wanted(row)).collect();
    rows.sort_by_key(|row| match row.kind {
        Kind::Limit => 0,
        Kind::Phasor => 1,
        Kind::Peer => 2,
    });
    rows
}

/// Serving steps, if any were measured: a short table and one of all contenders for each, with titles of
/// this level.
pub fn steps_section(level: &str, results: &Results) -> String {
    let rows = &results.rows;
    let steps = results::steps(rows);
    let mut text = String::new();
    for step in steps {
        let of_step = by_kind(rows, is_of_step(rows, step));
        let own = of_step.iter().find(|row| row.step.is_some());
        let (shape, dtype) = own.map_or(("", ""), |row| (&row.shape, &row.dtype));
        text += &format!("\n{level} {step}: {shape}, {dtype}\n\n");
        if let Some(bytes) = own.and_then(|row| Some(row.bytes? / row.tokens)) {
            text += &format!(
                "From packed qkv; {} bytes a token, read and written together.\n\n",
                thousands(bytes)
            );
        }
        text += &format!("{}\n{}", headlines_of_step(rows, step), table(&of_step));
    }
    text
}

type CaseOf<'a> = (&'a str, &'a str, &'a str);

/// Rotations of q and k that have rows of their own besides limits, in the order of first occurrence.
fn cases(rows: &[Row]) -> Vec<CaseOf<'_>> {
    let mut cases = Vec::new();
    for row in rows.iter().filter(|row| row.step.is_none()) {
        if let Some(pairing) = &row.pairing {
            let case = (row.shape.as_str(), row.dtype.as_str(), pairing.as_str());
            if !cases.contains(&case) {
                cases.push(case);
            }
        }
    }
    cases
}

/// Limits are of every case with as many bytes.
fn is_of(row: &Row, (shape, dtype, pairing): CaseOf<'_>) -> bool {
    let is_wide = |dtype: &str| dtype == "f32";
    row.shape == shape
        && row.step.is_none()
        && match &row.pairing {
            Some(own) => (row.dtype.as_str(), own.as_str()) == (dtype, pairing),
            None => is_wide(&row.dtype) == is_wide(dtype),
        }
}

/// A line for each contender and launch, a column for each number of tokens.
fn table(rows: &[&Row]) -> String {
    let columns: BTreeSet<(Memory, usize)> = rows.iter().map(|r| (r.memory, r.tokens)).collect();
    let has_cold = columns.iter().any(|(memory, _)| *memory == Memory::Cold);
    let heads = columns.iter().map(|&(memory, tokens)| {
        // Where all are in L2, the title says so.
        let suffix = if has_cold && memory == Memory::L2 {
            " in L2"
        } else {
            ""
        };
        format!("{}{suffix}", thousands(tokens))
    });
    let mut text = format!(
        "| | launch | {} |\n|---|---|{}\n",
        heads.collect::<Vec<_>>().join(" | "),
        "--:|".repeat(columns.len())
    );
    let mut lines: Vec<(&str, Launch)> = Vec::new();
    for row in rows {
        let line = (row.contender.as_str(), row.launch);
        if !lines.contains(&line) {
            lines.push(line);
        }
    }
    for (contender, launch) in lines {
        let cells = columns.iter().map(|&(memory, tokens)| {
            let mut of_line = rows
                .iter()
                .filter(|r| (r.contender.as_str(), r.launch) == (contender, launch));
            let found = of_line.find(|r| (r.memory, r.tokens) == (memory, tokens));
            found.map_or("-".to_owned(), |row| digits(row.us))
        });
        let name = match contender {
            PHASOR => format!("**{PHASOR}**"),
            other => other.to_owned(),
        };
        text += &format!(
            "| {name} | {launch} | {} |\n",
            cells.collect::<Vec<_>>().join(" | ")
        );
    }
    text
}

#[cfg(test)]
pub mod tests {
    use super::results::Meta;
    use super::*;
    use ::phasor::half;

    fn row(contender: &str, kind: Kind, launch: Launch, tokens: usize, us: f64) -> Row {
        let pairing = (kind != Kind::Limit).then(|| "half-split".to_owned());
        Row {
            contender: contender.to_owned(),
            kind,
            shape: results::LLAMA.to_owned(),
            dtype: "bf16".to_owned(),
            pairing,
            step: None,
            tokens,
            bytes: None,
            memory: Memory::Cold,
            launch,
            timed: Timed::Graph,
            us,
        }
    }

    pub fn results() -> Results {
        let (ordinary, dependent) = (Launch::Ordinary, Launch::Dependent);
        let mut rows = vec![
            row("copy kernel, slow", Kind::Limit, ordinary, 1, 1.5),
            row("copy kernel, fast", Kind::Limit, ordinary, 1, 1.2),
            row("copy kernel, fast", Kind::Limit, dependent, 1, 0.9),
            row("copy kernel, fast", Kind::Limit, ordinary, 2048, 11.0),
            row(PHASOR, Kind::Phasor, ordinary, 1, 2.4),
            row(PHASOR, Kind::Phasor, Launch::DependentSettled, 1, 0.95),
            row(PHASOR, Kind::Phasor, ordinary, 2048, 12.0),
            row("quick", Kind::Peer, ordinary, 1, 1.8),
            row("slow", Kind::Peer, ordinary, 1, 3.0),
            row("quick", Kind::Peer, dependent, 1, 1.14),
        ];
        // None of these is in the short table.
        for change in [
            |row: &mut Row| row.memory = Memory::L2,
            |row: &mut Row| row.timed = Timed::Stream,
            |row: &mut Row| row.dtype = "f16".to_owned(),
            |row: &mut Row| row.pairing = Some("interleaved".to_owned()),
            |row: &mut Row| row.shape = "another".to_owned(),
        ] {
            let mut other = row(PHASOR, Kind::Phasor, ordinary, 1, 0.01);
            change(&mut other);
            rows.push(other);
        }
        Results {
            meta: Meta {
                device: "a GPU".to_owned(),
                driver: "580".to_owned(),
                cuda: "13.0".to_owned(),
                date: "2026-01-01".to_owned(),
                phasor: "abc".to_owned(),
                kernels: Some(930_766_865),
                image: None,
                versions: [("quick".to_owned(), "1.0".to_owned())].into(),
                skipped: vec!["slow: no module".to_owned()],
            },
            rows,
        }
    }

    #[test]
    fn results_are_read_as_they_were_written_a_row_a_line() {
        let results = results();
        let text = results.to_string();
        let again: Results = text.parse().unwrap();
        assert_eq!(again.to_string(), text);
        let rows = text.lines().filter(|line| line.contains("\"contender\""));
        assert_eq!(rows.count(), results.rows.len());
        let first = text
            .lines()
            .find(|line| line.contains("contender"))
            .unwrap();
        assert_eq!(
            first,
            r#"{"contender":"copy kernel, slow","kind":"limit","shape":"32+8 heads of 128","dtype":"bf16","pairing":null,"tokens":1,"memory":"cold","launch":"ordinary","timed":"graph","us":1.5},"#
        );
        assert!(
            text.replace("\"cold\"", "\"warm\"")
                .parse::<Results>()
                .is_err()
        );
    }

    #[test]
    fn the_short_table_compares_what_is_launched_alike() {
        let table = headlines(&results().rows);
        let rows: Vec<&str> = table.lines().skip(2).collect();
        assert_eq!(
            rows,
            [
                "| ordinary | 1 | 1.20 | 2.40 | 0.50 | quick | 1.80 | 0.75x |",
                "| ordinary | 2,048 | 11.0 | 12.0 | 0.92 |  |  |  |",
                "| dependent | 1 | 0.90 |  |  | quick | 1.14 |  |",
                "| dependent, positions settled | 1 | 0.90 | 0.95 | 0.95 | quick | 1.14 | 1.20x |",
            ]
        );
    }

    #[test]
    fn tables_hold_the_limits_of_as_many_bytes() {
        let mut results = results();
        let text = markdown(&results, 0);
        let section = |title: &str| {
            let (_, rest) = text.split_once(title).expect(title);
            rest.split("\n## ").next().unwrap_or(rest).to_owned()
        };
        let f16 = section("## 32+8 heads of 128, f16, half-split\n");
        assert!(
            f16.contains("| copy kernel, fast | dependent | 0.90 | - |"),
            "{f16}"
        );
        assert!(
            f16.contains("| **phasor** | ordinary | 0.01 | - |"),
            "{f16}"
        );
        assert!(!f16.contains("quick"), "{f16}");
        let bf16 = section("## 32+8 heads of 128, bf16, half-split\n");
        assert!(
            bf16.contains("| | launch | 1 | 2,048 | 1 in L2 |"),
            "{bf16}"
        );
        assert!(
            bf16.contains("| **phasor** | ordinary | 2.40 | 12.0 | 0.01 |"),
            "{bf16}"
        );
        assert!(bf16.contains("### A stream of launches"), "{bf16}");
        assert!(!section("## another, bf16, half-split\n").contains("copy kernel"));
        assert!(text.contains("- slow: no module"));

        results.rows[0].dtype = "f32".to_owned();
        assert!(!markdown(&results, 0).contains("copy kernel, slow"));
    }

    #[test]
    fn what_is_cold_does_not_fit_into_l2_or_has_one_turn_a_replay() {
        let l2 = 50 << 20;
        for group in schedule::groups() {
            let bytes = group.bytes();
            let buffers = schedule::cold_buffers(bytes, l2);
            let calls = schedule::calls(bytes, buffers);
            let is_past_l2 = buffers > 1 && buffers * bytes > 4 * l2;
            assert!(is_past_l2 || calls == buffers, "{}", group.name());
            assert_eq!(calls % buffers, 0, "{}", group.name());
            assert!((8..=8192).contains(&calls), "{}: {calls}", group.name());
            // A limit is measured wherever there is something to hold against it.
            let has_bytes = |other: &&schedule::Group| {
                let is_wide = |group: &schedule::Group| group.dtype == phasor::Dtype::F32;
                other.has_limits()
                    && is_wide(other) == is_wide(&group)
                    && (other.shape, other.tokens) == (group.shape, group.tokens)
            };
            assert!(schedule::groups().iter().any(|other| has_bytes(&other)));
            if group.has_chain() {
                assert!(bytes < l2, "{}", group.name());
            }
        }
        assert_eq!(schedule::calls(10_240, 1), 4000);
        assert_eq!(schedule::calls(1 << 40, 2), 8);
    }

    #[test]
    fn the_usual_case_of_the_bench_is_the_one_of_the_short_table() {
        let usual = schedule::groups()
            .into_iter()
            .filter(schedule::Group::is_usual);
        let mut sizes = Vec::new();
        for group in usual {
            let mut row = row(PHASOR, Kind::Phasor, Launch::Ordinary, group.tokens, 1.0);
            (row.shape, row.dtype) = (group.shape.name(), group.dtype.to_string());
            assert!(row.is_headline());
            assert_eq!(group.memories()[0], Memory::Cold);
            sizes.push(group.tokens);
        }
        assert_eq!(sizes, [1, 32, 256, 2048, 8192, 32_768]);
    }

    #[test]
    fn steps_are_shown_beside_limits_of_as_many_bytes() {
        let mut results = results();
        let step = |contender: &str, kind, launch, us| {
            let mut row = row(contender, kind, launch, 1, us);
            (row.shape, row.bytes) = (steps::SHAPE.to_owned(), Some(24_576));
            row.step = (kind != Kind::Limit).then(|| "a step".to_owned());
            row
        };
        let mut others = step(
            "copy kernel, other bytes",
            Kind::Limit,
            Launch::Ordinary,
            0.1,
        );
        others.bytes = Some(18_432);
        let mut another = step(PHASOR, Kind::Phasor, Launch::Ordinary, 0.2);
        another.step = Some("another step".to_owned());
        let before = markdown(&results, 0);
        results.rows.extend([
            step("copy kernel, slow", Kind::Limit, Launch::Ordinary, 1.5),
            step("copy kernel, fast", Kind::Limit, Launch::Ordinary, 1.25),
            others,
            step("phasor, q elsewhere", Kind::Phasor, Launch::Ordinary, 0.3),
            step(PHASOR, Kind::Phasor, Launch::Ordinary, 2.5),
            step("a peer", Kind::Peer, Launch::Ordinary, 5.0),
            another,
        ]);
        let text = markdown(&results, 0);
        assert_eq!(
            headlines(&results.rows),
            headlines(&super::tests::results().rows)
        );
        let (start, rest) = text
            .split_once("\n## a step: 32+8+8 heads of 128, bf16\n")
            .unwrap();
        assert!(before.starts_with(start));
        let (own, rest) = rest.split_once("\n## another step: ").unwrap();
        let (_, rest) = rest.split_once("\n## ").unwrap();
        assert!(
            before.ends_with(rest),
            "rotations are shown as before: {rest}"
        );
        assert!(own.contains("24,576 bytes a token"), "{own}");
        assert!(
            own.contains("| ordinary | 1 | 1.25 | 2.50 | 0.50 | a peer | 5.00 | 2.00x |"),
            "{own}"
        );
        assert!(
            own.contains("| phasor, q elsewhere | ordinary | 0.30 |"),
            "{own}"
        );
        assert!(!own.contains("other bytes"), "{own}");
        let again: Results = results.to_string().parse().unwrap();
        assert_eq!(markdown(&again, 0), text);
    }

    #[test]
    fn a_step_writes_as_many_bytes_as_are_counted() {
        for step in steps::Step::all() {
            // Not all slots of the last page have a token.
            for tokens in [1, 35] {
                let [read, written] = step.bytes_read_and_written(tokens);
                assert_eq!(read, 2 * tokens * steps::QKV);
                assert_eq!(step.bytes(tokens), read + written);
                let filled = |with: u8| {
                    let mut before = step.unwritten(tokens);
                    before
                        .q
                        .fill(half::bf16::from_bits(u16::from_ne_bytes([with; 2])));
                    before.q_codes.fill(with);
                    before.caches.iter_mut().for_each(|cache| cache.fill(with));
                    step.on_host(tokens, before).unwrap()
                };
                // What is written is the same, whatever was there.
                let [a, b] = [0x00, 0xff].map(filled);
                let same = |a: &[u8], b: &[u8]| a.iter().zip(b).filter(|(a, b)| a == b).count();
                let elements =
                    a.q.iter()
                        .zip(&b.q)
                        .filter(|(a, b)| a.to_bits() == b.to_bits());
                let elsewhere = 2 * elements.count()
                    + same(&a.q_codes, &b.q_codes)
                    + same(&a.caches[0], &b.caches[0])
                    + same(&a.caches[1], &b.caches[1]);
                let before = step.unwritten(tokens).qkv;
                let is_q = |i: usize| i % steps::QKV < steps::Q;
                let mut in_place = 0;
                for (i, (before, after)) in before.iter().zip(&a.qkv).enumerate() {
                    let is_written = is_q(i) && step.queries == steps::Queries::InPlace;
                    in_place += 2 * usize::from(is_written);
                    assert!(is_written || before.to_bits() == after.to_bits());
                }
                assert_eq!(elsewhere + in_place, written, "{}", step.name());
                let moved = before.iter().zip(&a.qkv).filter(|(a, b)| a != b).count();
                assert!(3 * moved >= in_place, "{}: {moved}", step.name());
            }
        }
    }

    /// Held against q and k that are rotated apart from any step.
    #[test]
    fn a_step_stores_rotated_keys_where_slots_say() {
        use ::phasor::{Host, InOut, Layout, Positions, Problem};
        let (tokens, head_dim) = (35, schedule::HEAD_DIM);
        let step = steps::Step::all().next().unwrap();
        let written = step.on_host(tokens, step.unwritten(tokens)).unwrap();
        let qkv = steps::qkv(tokens);
        let heads = |range: std::ops::Range<usize>| -> Vec<half::bf16> {
            let tokens = qkv.chunks_exact(steps::QKV);
            let dims = range.start * head_dim..range.end * head_dim;
            tokens
                .flat_map(|token| token[dims.clone()].to_vec())
                .collect()
        };
        let (mut q, mut k, v) = (heads(0..32), heads(32..40), heads(40..48));
        let rotator = Host::new().rotator(&steps::rope().unwrap());
        let problem = Problem::new(phasor::Dtype::Bf16)
            .q(Layout::tokens(tokens, 32, head_dim))
            .k(Layout::tokens(tokens, 8, head_dim));
        let plan = rotator.plan(&problem).unwrap();
        let (q_given, k_given) = (InOut::InPlace(&mut q[..]), InOut::InPlace(&mut k[..]));
        let start = Positions::start(1000);
        rotator
            .rotate(&plan, Some(q_given), Some(k_given), start)
            .unwrap();
        let bytes = |x: &[half::bf16]| -> Vec<u8> {
            x.iter().flat_map(|x| x.to_bits().to_ne_bytes()).collect()
        };
        let slots = steps::slots(tokens);
        let distinct: BTreeSet<_> = slots.iter().collect();
        assert_eq!(distinct.len(), tokens);
        for (t, &slot) in slots.iter().enumerate() {
            let own = &written.qkv[t * steps::QKV..][..steps::Q];
            assert_eq!(bytes(own), bytes(&q[t * steps::Q..][..steps::Q]));
            let slot = 2 * slot as usize * 8 * head_dim..2 * (slot as usize + 1) * 8 * head_dim;
            for (cache, rows) in written.caches.iter().zip([&k, &v]) {
                let row = &rows[t * 8 * head_dim..][..8 * head_dim];
                assert_eq!(cache[slot.clone()], bytes(row), "token {t}");
            }
        }
    }

    /// As the bench calls them: the shapes and addresses of every layer allow it.
    #[test]
    fn every_step_is_one_launch_of_a_kernel_for_vectors() {
        use ::phasor::call::{
            Addresses, AngleAddresses, CacheAddresses, RawPositions, StageAddresses,
            TensorAddresses, VectorAddress,
        };
        use ::phasor::launch::{Family, Target};
        use ::phasor::{IdType, Ids, Pairing, Plan, SlotsIn};
        for step in steps::Step::all() {
            for tokens in steps::TOKENS {
                let plan = Plan::new(&steps::rope().unwrap(), &step.problem(tokens)).unwrap();
                // Those of the second layer, where the driver's buffers begin at multiples of 256.
                let at = |buffer: u64, bytes: usize| (buffer << 40) + bytes as u64;
                let qkv = at(1, 2 * tokens * steps::QKV);
                let q = match step.queries {
                    steps::Queries::InPlace => qkv,
                    steps::Queries::Elsewhere => at(2, 2 * tokens * steps::Q),
                    steps::Queries::Codes => at(2, tokens * steps::Q),
                };
                let tensor = |destination| TensorAddresses {
                    source: qkv,
                    destination,
                };
                let vector = |is_there: bool, len| {
                    let address = at(3, 0);
                    is_there.then_some(VectorAddress { address, len })
                };
                let weights = |normed: bool, coded: bool| StageAddresses {
                    norm_weight: vector(normed && step.norms, schedule::HEAD_DIM),
                    scales: vector(coded, 1),
                    ..StageAddresses::default()
                };
                let q_coded = step.queries == steps::Queries::Codes;
                let ids = Ids::at(at(4, 0), IdType::I64, tokens);
                let call = plan.call(&Addresses {
                    q: tensor(q),
                    k: tensor(0),
                    v: tensor(0),
                    angles: AngleAddresses::Steps {
                        steps: at(5, 0),
                        factors: 0,
                    },
                    positions: RawPositions::per_token(ids),
                    cache: Some(CacheAddresses {
                        k: at(6, step.cache_bytes(tokens)),
                        v: at(7, step.cache_bytes(tokens)),
                        slots: SlotsIn::mapping(ids),
                        report: at(8, 0),
                    }),
                    stages: Some([
                        weights(true, q_coded),
                        weights(true, step.codes),
                        weights(false, step.codes),
                    ]),
                });
                let kernel = call.unwrap().unwrap().launch(&Target::new(132)).kernel;
                let family = match step.norms || step.codes {
                    true => Family::Fused,
                    false => Family::Append,
                };
                assert_eq!(kernel.family, family, "{}", step.name());
                assert_eq!(kernel.pairing, Some(Pairing::HalfSplit), "{}", step.name());
            }
        }
    }

    #[test]
    fn other_bits_of_a_step_are_noticed() {
        let step = steps::Step::all().last().unwrap();
        let written = step.on_host(2, step.unwritten(2)).unwrap();
        assert_eq!(written.difference(&written.clone()), None);
        let (mut a, mut b, mut c) = (written.clone(), written.clone(), written.clone());
        a.qkv[7] = -a.qkv[7];
        b.q_codes[2 * steps::Q - 1] ^= 1;
        c.caches[1][0] ^= 0x80;
        assert_eq!(written.difference(&a), Some("qkv"));
        assert_eq!(written.difference(&b), Some("the codes of q"));
        assert_eq!(written.difference(&c), Some("the cache of values"));
    }

    #[test]
    fn steps_are_cold_and_have_names_of_their_own() {
        let l2 = 50 << 20;
        let mut seen = Vec::new();
        for step in steps::Step::all() {
            let row = (step.name(), step.queries == steps::Queries::Elsewhere);
            assert!(!seen.contains(&row), "{row:?}");
            seen.push(row);
            for tokens in steps::TOKENS {
                let qkv = 2 * tokens * steps::QKV;
                let layers = schedule::cold_buffers(qkv, l2);
                let calls = schedule::calls(step.bytes(tokens) / 2, layers);
                assert!(layers * qkv > 4 * l2 || calls == layers, "{tokens} tokens");
                assert_eq!(calls % layers, 0, "{tokens} tokens");
            }
        }
    }

    #[test]
    fn there_are_enough_samples_when_time_is_over_or_many_are_there() {
        let is_enough = |samples, millis| {
            schedule::is_enough(samples, std::time::Duration::from_millis(millis))
        };
        assert!(!is_enough(4, 1000));
        assert!(is_enough(5, 1000));
        assert!(!is_enough(5, 1));
        assert!(is_enough(15, 1));
        assert_eq!(schedule::median(&mut [3.0, 1.0, 2.0]), 2.0);
        assert_eq!(schedule::median(&mut [4.0, 1.0, 2.0, 8.0]), 3.0);
        assert_eq!(schedule::median(&mut [7.0]), 7.0);
    }

    #[test]
    fn the_checksum_is_that_of_cksum() {
        assert_eq!(checksum(b""), 4_294_967_295);
        assert_eq!(checksum(b"123456789"), 930_766_865);
        // Its length takes two bytes.
        assert_eq!(checksum(&[b'a'; 300]), 1_664_553_091);
    }
}
