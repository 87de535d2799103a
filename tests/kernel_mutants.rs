//! Shows that the kernel suite would notice a wrong kernel: faults are seeded in the PTX, one at a
//! time, and the checks of `support/suite.rs` must catch every one.
//!
//! A plain run takes a few faults of each kind in three kernels. `scripts/kernel-mutants` takes all of
//! those that rotate and a share of the others (`PHASOR_MUTANTS=check`, or `write` to write
//! docs/kernel-mutants.md, and `PHASOR_MUTANTS_REPORT` for a copy of the report), or, with
//! `PHASOR_MUTANTS=append`, all of a family; with `append:20` every 20th of them.

#[path = "support/append_cases.rs"]
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod append_cases;
#[path = "support/append_checks.rs"]
mod append_checks;
#[path = "support/fused_checks.rs"]
mod fused_checks;
#[path = "support/kernel_cases.rs"]
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod kernel_cases;
#[path = "support/mutants.rs"]
mod mutants;
#[path = "support/ptx_backend.rs"]
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod ptx_backend;
#[path = "support/suite.rs"]
mod suite;

use mutants::{KernelText, Kind, Mutant, mutants};
use phasor::launch::{Family, Kernel};
use ptx_backend::{COMPUTE_75, COMPUTE_80, COMPUTE_90, Executed, Image, modules};
use std::collections::{BTreeMap, HashSet};
use std::fmt::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use suite::{CHECKS, Check, Failure, Subject, checks};

/// What became of a mutant.
#[derive(Clone, PartialEq, Eq)]
enum Fate {
    Caught {
        check: &'static str,
        how: How,
    },
    Exempt(&'static str),
    /// With whether any check comes to it.
    Survived {
        is_reached: bool,
    },
    /// The generator is wrong: no PTX.
    Unreadable(String),
    /// The generator is wrong: exempt, but caught by this check.
    NotEquivalent(&'static str, &'static str),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum How {
    Fault,
    Bits,
    Traffic,
}

struct Seeded {
    mutant: Mutant,
    fate: Fate,
}

/// A kernel of one target.
struct Target {
    name: String,
    text: KernelText,
}

/// Every kernel of a family for compute_90, and for the older targets those that differ from the next
/// newer one.
fn targets_of(family: Family) -> Vec<Target> {
    let mut targets = Vec::new();
    let texts = modules().zip(COMPUTE_90.concat().into_iter().enumerate());
    for ((_, dtype), (n, newest)) in texts.filter(|((of, _), _)| *of == family) {
        for kernel in Kernel::all(family, dtype) {
            let mut newer = KernelText::of(kernel, newest);
            let mut name = kernel.name();
            for (target, texts) in [("compute_80", COMPUTE_80), ("compute_75", COMPUTE_75)] {
                let text = KernelText::of(kernel, texts.concat()[n]);
                if !text.same_code(&newer) {
                    let older = format!("{}, {target}", kernel.name());
                    let name = std::mem::replace(&mut name, older);
                    let text = std::mem::replace(&mut newer, text);
                    targets.push(Target { name, text });
                }
            }
            targets.push(Target { name, text: newer });
        }
    }
    targets
}

/// Of which kernels each reason of exemption has been tried.
type Excused = Mutex<HashSet<(String, &'static str)>>;

/// The checks of a kernel, and what each executes of it.
struct Judge {
    checks: Vec<Check>,
    executed: Vec<Executed>,
    /// How many mutants each was held to, and how many it caught.
    record: Vec<[u64; 2]>,
}

impl Judge {
    /// All checks pass for the kernel without a fault.
    fn new(target: &Target) -> Judge {
        let kernel = target.text.kernel;
        let module = (kernel.family, kernel.dtype);
        let image = Image::of_module(&target.name, module, &target.text.text());
        let whole = Subject(image.unwrap().observed());
        let checks = checks(kernel);
        let executed: Vec<_> = (checks.iter())
            .map(|check| {
                let (name, check_name) = (&target.name, check.name);
                assert_eq!(
                    check.run(&whole),
                    Ok(()),
                    "{name} without a fault, {check_name}"
                );
                whole.image().take_executed()
            })
            .collect();
        Judge {
            record: vec![[0; 2]; checks.len()],
            checks,
            executed,
        }
    }

    /// Those that come to a fault, as what is never executed changes nothing: first those that are likely to
    /// catch it for what they cost.
    fn checks_of(&self, mutant: &Mutant) -> Vec<usize> {
        let comes_to_it = |&n: &usize| {
            let lines = &self.executed[n].lines;
            mutant.lines().any(|line| lines.contains(&line))
        };
        let mut all: Vec<_> = (0..self.checks.len()).filter(comes_to_it).collect();
        // Beside what a launch executes there is what makes and compares its memory.
        const LAUNCH: u64 = 2000;
        let cost = |n: usize| {
            let [held, caught] = self.record[n];
            let each = u128::from(self.executed[n].instructions + LAUNCH);
            // To compare quotients as integers.
            ((each * u128::from(held + 2)) << 20) / u128::from(caught + 1)
        };
        all.sort_by_key(|&n| cost(n));
        all
    }

    /// The first check that fails, and how; and the checks that it was held to.
    fn verdict(&self, mutant: &Mutant, subject: &Subject) -> (Option<(usize, How)>, Vec<usize>) {
        let mut held = Vec::new();
        for n in self.checks_of(mutant) {
            held.push(n);
            let how = match self.checks[n].run(subject) {
                Ok(()) => continue,
                Err(Failure::Fault(_)) => How::Fault,
                Err(Failure::Bits) => How::Bits,
                Err(Failure::Traffic) => How::Traffic,
            };
            return (Some((n, how)), held);
        }
        (None, held)
    }

    /// The same, to be heeded when later mutants are judged.
    fn recorded(&mut self, mutant: &Mutant, subject: &Subject) -> Option<(usize, How)> {
        let (failed, held) = self.verdict(mutant, subject);
        for n in held {
            self.record[n][0] += 1;
        }
        if let Some((n, _)) = failed {
            self.record[n][1] += 1;
        }
        failed
    }
}

/// Runs the checks on each mutant of a target.
fn seed(target: &Target, mutants: Vec<Mutant>, excused: &Excused) -> Vec<Seeded> {
    let kernel = target.text.kernel;
    let mut judge = Judge::new(target);
    // One of each reason for each kernel that rotates; for one kernel of the others, as their checks take longer.
    let of_reasons = match kernel.family {
        Family::Rope => target.name.as_str(),
        other => other.name(),
    };
    let mut fate = |mutant: &Mutant| {
        let text = target.text.apply(mutant);
        let subject = match Subject::new(&target.name, (kernel.family, kernel.dtype), &text) {
            Ok(subject) => subject,
            Err(error) => return Fate::Unreadable(error.to_string()),
        };
        let Some(reason) = mutant.equivalent else {
            return match judge.recorded(mutant, &subject) {
                Some((n, how)) => Fate::Caught {
                    check: judge.checks[n].name,
                    how,
                },
                None => Fate::Survived {
                    is_reached: !judge.checks_of(mutant).is_empty(),
                },
            };
        };
        // Every check must pass; one mutant for each reason shows it. Which one that is depends on threads, and so
        // it leaves no record.
        let key = (of_reasons.to_owned(), reason);
        let is_first = excused.lock().unwrap().insert(key);
        match is_first
            .then(|| judge.verdict(mutant, &subject).0)
            .flatten()
        {
            Some((n, _)) => Fate::NotEquivalent(reason, judge.checks[n].name),
            None => Fate::Exempt(reason),
        }
    };
    let with_fate = |mutant| Seeded {
        fate: fate(&mutant),
        mutant,
    };
    mutants.into_iter().map(with_fate).collect()
}

/// On two threads, the targets with most to do first. The result is in the order of the targets,
/// and does not depend on the threads.
fn seed_all(
    targets: &[Target],
    mutants: impl Fn(&Target) -> Vec<Mutant> + Sync,
) -> Vec<Vec<Seeded>> {
    let mut order: Vec<usize> = (0..targets.len()).collect();
    order.sort_by_key(|&n| std::cmp::Reverse(targets[n].text.text().len()));
    let next = AtomicUsize::new(0);
    let excused = Excused::default();
    let work = || {
        let mut done = Vec::new();
        while let Some(&n) = order.get(next.fetch_add(1, Ordering::Relaxed)) {
            let seeded = [seed(&targets[n], mutants(&targets[n]), &excused)];
            // Of a run that takes hours, what is known so far.
            let missed = missed(&targets[n..=n], &seeded);
            println!("{missed}{}, {}", targets[n].name, summary(&seeded));
            let [seeded] = seeded;
            done.push((n, seeded));
        }
        done
    };
    let mut done = std::thread::scope(|scope| {
        let other = scope.spawn(work);
        let mut done = work();
        done.extend(other.join().unwrap());
        done
    });
    done.sort_by_key(|&(n, _)| n);
    done.into_iter().map(|(_, seeded)| seeded).collect()
}

/// Up to three faults of each kind, far apart, that are not exempt.
fn some_mutants(target: &Target) -> Vec<Mutant> {
    let some = by_kind(target).into_iter().flat_map(|mutants| {
        let faults = mutants.into_iter().filter(|m| m.equivalent.is_none());
        let faults: Vec<_> = faults.collect();
        let apart = faults.len().div_ceil(3).max(1);
        faults.into_iter().step_by(apart)
    });
    some.collect()
}

/// Some faults of each kind.
#[derive(Clone, Copy)]
struct Share {
    /// Of so many that follow each other, one.
    apart: usize,
    /// The first is so many further on than it would be.
    further: usize,
}

/// Of each kind every so many-th fault, one at least, from one on that is another for each kernel; and those that
/// are exempt, if they are wanted.
fn every(share: Share, target: &Target, with_exempt: bool) -> Vec<Mutant> {
    let Share { apart, further } = share;
    let hash = |hash: usize, byte: u8| (hash ^ usize::from(byte)).wrapping_mul(0x0100_0193);
    let first = target.name.bytes().fold(0x811c_9dc5, hash) % apart + further;
    let some = by_kind(target).into_iter().flat_map(|mutants| {
        let (faults, exempt): (Vec<_>, Vec<_>) =
            (mutants.into_iter()).partition(|m| m.equivalent.is_none());
        let first = first % apart.min(faults.len()).max(1);
        let faults = faults.into_iter().skip(first).step_by(apart);
        faults.chain(exempt.into_iter().filter(|_| with_exempt))
    });
    some.collect()
}

/// The mutants of each kind.
fn by_kind(target: &Target) -> Vec<Vec<Mutant>> {
    let mut by_kind: Vec<Vec<Mutant>> = Kind::ALL.iter().map(|_| Vec::new()).collect();
    for mutant in mutants(&target.text) {
        let kind = Kind::ALL.iter().position(|&kind| kind == mutant.kind);
        by_kind[kind.expect("one of all")].push(mutant);
    }
    by_kind
}

/// What `PHASOR_MUTANTS` asks for.
enum Mode {
    /// Some faults of each kind in three kernels.
    Few,
    /// All of the kernels that rotate and a share of the others, as docs/kernel-mutants.md has it.
    Page { writes: bool },
    /// Those of one family, or of the targets whose names begin so; or a share of them.
    Family(Family, String, Share),
}

impl Mode {
    fn asked_for() -> Mode {
        let Ok(mode) = std::env::var("PHASOR_MUTANTS") else {
            return Mode::Few;
        };
        if let "check" | "write" = mode.as_str() {
            let writes = mode == "write";
            return Mode::Page { writes };
        }
        let (name, share) = mode.split_once(':').unwrap_or((&mode, "1"));
        let (apart, further) = share.split_once('+').unwrap_or((share, "0"));
        let family = (Family::ALL.into_iter()).find(|family| name.starts_with(family.name()));
        match (family, apart.parse(), further.parse()) {
            (Some(family), Ok(apart @ 1..), Ok(further)) => {
                Mode::Family(family, name.to_owned(), Share { apart, further })
            }
            _ => panic!(
                "PHASOR_MUTANTS is check, write, the begin of kernels' names, begin:apart or \
                 begin:apart+further, not {mode}"
            ),
        }
    }

    fn targets(&self) -> Vec<Target> {
        let mut targets = match self {
            Mode::Family(family, begin, _) => {
                let mut targets = targets_of(*family);
                targets.retain(|target| target.name.starts_with(begin));
                assert!(!targets.is_empty(), "no kernel is named {begin}");
                return targets;
            }
            Mode::Few | Mode::Page { .. } => targets_of(Family::Rope),
        };
        match self {
            Mode::Few => targets.retain(|target| FEW.contains(&target.name.as_str())),
            _ => targets.extend(
                (Family::ALL.into_iter().skip(1).flat_map(targets_of))
                    .filter(|target| SHARED.contains(&target.name.as_str())),
            ),
        }
        targets
    }

    fn mutants(&self, target: &Target) -> Vec<Mutant> {
        match self {
            Mode::Few => some_mutants(target),
            Mode::Page { .. } if target.text.kernel.family != Family::Rope => {
                let (apart, further) = (SHARE, 0);
                every(Share { apart, further }, target, true)
            }
            Mode::Page { .. } | Mode::Family(.., Share { apart: 1, .. }) => mutants(&target.text),
            Mode::Family(.., share) => every(*share, target, false),
        }
    }
}

/// Of each pairing one, of each element type and of each target.
const FEW: [&str; 3] = [
    "rope_f32_half_split",
    "rope_f16_any, compute_80",
    "rope_bf16_interleaved, compute_75",
];

/// Of the other families, for compute_90, where they do the most: the others are the same source with another
/// of the two.
const SHARED: [&str; 3] = [
    "append_bf16_half_split",
    "append_f32_interleaved",
    "append_f16_any",
];

/// One of so many of their faults is seeded.
const SHARE: usize = 25;

#[test]
fn every_seeded_fault_is_caught() {
    let mode = Mode::asked_for();
    let targets = mode.targets();
    let seeded = seed_all(&targets, |target| mode.mutants(target));
    if let Mode::Few = mode {
        let kinds = seeded.iter().flatten().map(|s| s.mutant.kind);
        let kinds: HashSet<_> = kinds.collect();
        // Rotations have no shuffles.
        let possible = Kind::ALL.iter().filter(|kind| **kind != Kind::Shuffle);
        let missing = possible.filter(|kind| !kinds.contains(kind));
        let missing: Vec<_> = missing.collect();
        assert!(missing.is_empty(), "not seeded: {missing:?}");
    }

    let report = report(&targets, &seeded);
    let missed = missed(&targets, &seeded);
    let summary = summary(&seeded);
    if let Ok(path) = std::env::var("PHASOR_MUTANTS_REPORT") {
        std::fs::write(path, format!("{report}\n{missed}{summary}\n")).unwrap();
    }
    assert!(missed.is_empty(), "{missed}{summary}");
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/kernel-mutants.md");
    match mode {
        Mode::Page { writes: true } => std::fs::write(path, report).unwrap(),
        Mode::Page { writes: false } => assert!(
            std::fs::read_to_string(path).is_ok_and(|written| written == report),
            "docs/kernel-mutants.md is not what this run found: scripts/kernel-mutants --write"
        ),
        Mode::Few | Mode::Family(..) => {}
    }
}

/// Survivors and what the generator got wrong, a line each.
fn missed(targets: &[Target], seeded: &[Vec<Seeded>]) -> String {
    let mut text = String::new();
    for (target, seeded) in targets.iter().zip(seeded) {
        for Seeded { mutant, fate } in seeded {
            let why = match fate {
                Fate::Survived { is_reached: true } => "survived".into(),
                Fate::Survived { is_reached: false } => "survived, as no check comes to it".into(),
                Fate::Unreadable(error) => format!("no PTX ({error})"),
                Fate::NotEquivalent(reason, check) => {
                    format!("caught by {check}, though exempt ({reason})")
                }
                Fate::Caught { .. } | Fate::Exempt(_) => continue,
            };
            let (kind, name) = (mutant.kind.describe(), &target.name);
            let (was, now) = (&mutant.was, &mutant.now);
            writeln!(text, "{why}: {name}, {kind}: `{was}` -> `{now}`").unwrap();
        }
    }
    text
}

/// Numbers of fates.
#[derive(Default)]
struct Counts {
    seeded: usize,
    fault: usize,
    bits: usize,
    traffic: usize,
    exempt: usize,
}

impl Counts {
    fn of<'a>(seeded: impl Iterator<Item = &'a Seeded>) -> Counts {
        let mut counts = Counts::default();
        for Seeded { fate, .. } in seeded {
            counts.seeded += 1;
            match fate {
                Fate::Caught { how, .. } => match how {
                    How::Fault => counts.fault += 1,
                    How::Bits => counts.bits += 1,
                    How::Traffic => counts.traffic += 1,
                },
                Fate::Exempt(_) => counts.exempt += 1,
                Fate::Survived { .. } | Fate::Unreadable(_) | Fate::NotEquivalent(..) => {}
            }
        }
        counts
    }

    fn caught(&self) -> usize {
        self.fault + self.bits + self.traffic
    }
}

fn summary(seeded: &[Vec<Seeded>]) -> String {
    let all = || seeded.iter().flatten();
    let counts = Counts::of(all());
    let survived = all()
        .filter(|s| matches!(s.fate, Fate::Survived { .. }))
        .count();
    let wrong = counts.seeded - counts.caught() - counts.exempt - survived;
    let mut summary = format!(
        "mutants: {} seeded, {} caught, {} exempt, {survived} survived",
        counts.seeded,
        counts.caught(),
        counts.exempt
    );
    if wrong > 0 {
        write!(summary, ", {wrong} seeded wrong").unwrap();
    }
    summary
}

/// docs/kernel-mutants.md
fn report(targets: &[Target], seeded: &[Vec<Seeded>]) -> String {
    let all = || seeded.iter().flatten();
    let mut text = String::from(INTRODUCTION);
    let mut line = |line: String| {
        text.push_str(&line);
        text.push('\n');
    };

    line("| fault | kernels | seeded | fault | bits | traffic | exempt |".into());
    line("| --- | ---: | ---: | ---: | ---: | ---: | ---: |".into());
    for kind in Kind::ALL {
        let of_kind = |s: &&Seeded| s.mutant.kind == kind;
        let kernels = seeded
            .iter()
            .filter(|s| s.iter().any(|s| of_kind(&s)))
            .count();
        let c = Counts::of(all().filter(of_kind));
        line(format!(
            "| {} | {kernels} | {} | {} | {} | {} | {} |",
            kind.describe(),
            c.seeded,
            c.fault,
            c.bits,
            c.traffic,
            c.exempt
        ));
    }

    line("\n## By check\n\n| check | what it is | caught |\n| --- | --- | ---: |".into());
    for (name, meaning) in CHECKS {
        let by = |s: &&Seeded| matches!(s.fate, Fate::Caught { check, .. } if check == name);
        line(format!(
            "| {name} | {meaning} | {} |",
            all().filter(by).count()
        ));
    }

    line("\n## By kernel\n\n| kernel | seeded | caught | exempt |".into());
    line("| --- | ---: | ---: | ---: |".into());
    for (target, seeded) in targets.iter().zip(seeded) {
        let c = Counts::of(seeded.iter());
        let name = &target.name;
        line(format!(
            "| {name} | {} | {} | {} |",
            c.seeded,
            c.caught(),
            c.exempt
        ));
    }

    line("\n## Exempt\n\nMutants that are the kernel still.\n".into());
    line("| fault | why nothing can tell | mutants | one of them |".into());
    line("| --- | --- | ---: | --- |".into());
    let mut exempt: BTreeMap<(&str, &str), Vec<&Mutant>> = BTreeMap::new();
    for Seeded { mutant, fate } in all() {
        if let Fate::Exempt(reason) = fate {
            let key = (mutant.kind.describe(), *reason);
            exempt.entry(key).or_default().push(mutant);
        }
    }
    for ((kind, reason), mutants) in exempt {
        let was = mutants[0].was.replace('\t', " ");
        let count = mutants.len();
        line(format!("| {kind} | {reason} | {count} | `{was}` |"));
    }
    line(format!("\n{}", summary(seeded)));
    text
}

const INTRODUCTION: &str = "\
# Faults seeded in the kernels

Written by `scripts/kernel-mutants --write`; CI runs `scripts/kernel-mutants`, which fails where a
fault goes unnoticed or this page is out of date.

A mutant is a kernel's PTX with one fault, at each place where the kind of fault applies: in the nine
kernels that rotate for compute_90, and in those for compute_80 and compute_75 whose code differs; and of
the kernels that append, at every 25th place of three, in which each pairing and each element type is. All
places of a family are `scripts/kernel-mutants append`, every 20th `append:20`. The checks are those of
`tests/support/suite.rs`, which `tests/kernels.rs` holds every kernel to. A mutant is caught where
the interpreter stops at a fault, where the result differs from the host backend's in any bit, or
where a byte is moved, or an angle loaded, more or less often than it must be. A mutant is held to the checks
that come to its place, first to those that are likely to catch it for what they cost, and the first that fails is
counted. Mutants that are exempt are all listed, and one of each reason is held to all checks.

Kernels with stages are not here. `scripts/kernel-mutants fused:120` seeds every 120th of their faults,
`fused:120+7` those that come 7 later, and `fused_f16_interleaved:400` those of kernels whose names begin so. Of all 23
kernels every 120th was seeded before the checks of today (`tests/support/fused_checks.rs`) were there: 751 of 865
were caught. With these checks, of every 60th, 129 of 132 were caught in `fused_f16_interleaved` (for compute_90 and
75), 47 of 50 in `fused_bf16_half_split` for compute_80, and 122 of 131 in `fused_f32_any` (for compute_90 and 80); of
every 30th in the latter for compute_80, each instruction of which some check executes, 101 of 107. Exemptions are told
for most of what was seen to survive before; the faults between those were not judged.

";
