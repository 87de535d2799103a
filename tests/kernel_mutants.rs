//! Shows that the kernel suite would notice a wrong kernel: faults are seeded in the PTX, one at a
//! time, and the checks of `support/suite.rs` must catch every one.
//!
//! A plain run takes a few faults of each kind in three kernels. `scripts/kernel-mutants` takes all
//! of them (`PHASOR_MUTANTS=check`, or `write` to write docs/kernel-mutants.md, and
//! `PHASOR_MUTANTS_REPORT` for a copy of the report).

#[path = "support/append_cases.rs"]
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod append_cases;
#[path = "support/append_checks.rs"]
mod append_checks;
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
use phasor::Dtype;
use phasor::launch::{Family, Kernel};
use ptx_backend::{COMPUTE_75, COMPUTE_80, COMPUTE_90};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Write;
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
    Survived,
    /// The generator is wrong: no PTX.
    Unreadable(String),
    /// The generator is wrong: exempt, but caught.
    NotEquivalent(&'static str),
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

/// Every kernel for compute_90, and for the older targets those that differ from the next newer one.
fn targets() -> Vec<Target> {
    let mut targets = Vec::new();
    for (n, dtype) in Dtype::ALL.into_iter().enumerate() {
        for kernel in Kernel::all(Family::Rope, dtype) {
            let mut newer = KernelText::of(kernel, COMPUTE_90[0][n]);
            let mut name = kernel.name();
            for (target, texts) in [("compute_80", COMPUTE_80), ("compute_75", COMPUTE_75)] {
                let text = KernelText::of(kernel, texts[0][n]);
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

/// Runs the checks on each mutant of a target.
fn seed(target: &Target, mutants: Vec<Mutant>) -> Vec<Seeded> {
    let kernel = target.text.kernel;
    let checks = checks(kernel);
    let whole = Subject::new(
        &target.name,
        (kernel.family, kernel.dtype),
        &target.text.text(),
    )
    .unwrap();
    for check in &checks {
        assert_eq!(check.run(&whole), Ok(()), "{} without a fault", target.name);
    }
    // The check that caught the last fault of a kind is likely to catch the next one.
    let mut last: HashMap<Kind, usize> = HashMap::new();
    let mut excused = HashSet::new();
    let mut fate = |mutant: &Mutant| {
        let text = target.text.apply(mutant);
        let subject = match Subject::new(&target.name, (kernel.family, kernel.dtype), &text) {
            Ok(subject) => subject,
            Err(error) => return Fate::Unreadable(error.to_string()),
        };
        if let Some(reason) = mutant.equivalent {
            // Every check must pass; one mutant for each reason shows it.
            let first = excused.insert(reason);
            let passes = !first || checks.iter().all(|check| check.run(&subject).is_ok());
            return if passes {
                Fate::Exempt(reason)
            } else {
                Fate::NotEquivalent(reason)
            };
        }
        let likely = last.get(&mutant.kind).copied();
        for n in likely.into_iter().chain(0..checks.len()) {
            let Check { name: check, .. } = checks[n];
            let how = match checks[n].run(&subject) {
                Ok(()) => continue,
                Err(Failure::Fault(_)) => How::Fault,
                Err(Failure::Bits) => How::Bits,
                Err(Failure::Traffic) => How::Traffic,
            };
            last.insert(mutant.kind, n);
            return Fate::Caught { check, how };
        }
        Fate::Survived
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
    let work = || {
        let mut done = Vec::new();
        while let Some(&n) = order.get(next.fetch_add(1, Ordering::Relaxed)) {
            done.push((n, seed(&targets[n], mutants(&targets[n]))));
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
    let mut by_kind: HashMap<Kind, Vec<Mutant>> = HashMap::new();
    for mutant in mutants(&target.text) {
        if mutant.equivalent.is_none() {
            by_kind.entry(mutant.kind).or_default().push(mutant);
        }
    }
    let some = by_kind.into_values().flat_map(|mutants| {
        let apart = mutants.len().div_ceil(3);
        mutants.into_iter().step_by(apart)
    });
    some.collect()
}

#[test]
fn every_seeded_fault_is_caught() {
    let mode = std::env::var("PHASOR_MUTANTS").ok();
    let mut targets = targets();
    let seeded = match mode {
        Some(_) => seed_all(&targets, |target| mutants(&target.text)),
        None => {
            let some = [
                "rope_f32_half_split",
                "rope_f16_any, compute_80",
                "rope_bf16_interleaved, compute_75",
            ];
            targets.retain(|target| some.contains(&target.name.as_str()));
            let seeded = seed_all(&targets, some_mutants);
            let kinds = seeded.iter().flatten().map(|s| s.mutant.kind);
            let seeded_kinds: HashSet<_> = kinds.collect();
            let missing = Kind::ALL.iter().filter(|kind| !seeded_kinds.contains(kind));
            let missing: Vec<_> = missing.collect();
            assert!(missing.is_empty(), "not seeded: {missing:?}");
            seeded
        }
    };

    let report = report(&targets, &seeded);
    let missed = missed(&targets, &seeded);
    let summary = summary(&seeded);
    if let Ok(path) = std::env::var("PHASOR_MUTANTS_REPORT") {
        std::fs::write(path, format!("{report}\n{missed}{summary}\n")).unwrap();
    }
    assert!(missed.is_empty(), "{missed}{summary}");
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/kernel-mutants.md");
    match mode.as_deref() {
        Some("write") => std::fs::write(path, report).unwrap(),
        Some("check") => assert!(
            std::fs::read_to_string(path).is_ok_and(|written| written == report),
            "docs/kernel-mutants.md is not what this run found: scripts/kernel-mutants --write"
        ),
        Some(other) => panic!("PHASOR_MUTANTS is check or write, not {other}"),
        None => {}
    }
}

/// Survivors and what the generator got wrong, a line each.
fn missed(targets: &[Target], seeded: &[Vec<Seeded>]) -> String {
    let mut text = String::new();
    for (target, seeded) in targets.iter().zip(seeded) {
        for Seeded { mutant, fate } in seeded {
            let why = match fate {
                Fate::Survived => "survived".into(),
                Fate::Unreadable(error) => format!("no PTX ({error})"),
                Fate::NotEquivalent(reason) => format!("caught, though exempt ({reason})"),
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
                Fate::Survived | Fate::Unreadable(_) | Fate::NotEquivalent(_) => {}
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
    let survived = all().filter(|s| s.fate == Fate::Survived).count();
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
kernels for compute_90, and in those for compute_80 and compute_75 whose code differs. The checks are those of
`tests/support/suite.rs`, which `tests/kernels.rs` holds every kernel to. A mutant is caught where
the interpreter stops at a fault, where the result differs from the host backend's in any bit, or
where a byte is moved, or an angle loaded, more or less often than it must be; the first check that
fails is counted.

";
