//! What the assembler makes of the kernels: for every architecture no spills and no local memory,
//! and 16-byte accesses on the wide paths.
//!
//! Needs `ptxas` and `nvdisasm` (and `cuobjdump`, where the build made a fatbin) in PATH; without
//! them the tests say so and pass, unless `PHASOR_REQUIRE_CUDA_TOOLS=1`.

use phasor::launch::Kernel;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

const ARCHITECTURES: [&str; 7] = [
    "sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120",
];

/// (dtype, compute_75, compute_80)
const PREBUILT: [(&str, &str, &str); 3] = [
    (
        "f32",
        include_str!("../cuda/prebuilt/rope_f32.compute_75.ptx"),
        include_str!("../cuda/prebuilt/rope_f32.compute_80.ptx"),
    ),
    (
        "f16",
        include_str!("../cuda/prebuilt/rope_f16.compute_75.ptx"),
        include_str!("../cuda/prebuilt/rope_f16.compute_80.ptx"),
    ),
    (
        "bf16",
        include_str!("../cuda/prebuilt/rope_bf16.compute_75.ptx"),
        include_str!("../cuda/prebuilt/rope_bf16.compute_80.ptx"),
    ),
];

#[cfg(phasor_fatbin)]
const FATBINS: [(&str, &[u8]); 3] = [
    (
        "f32",
        include_bytes!(concat!(env!("OUT_DIR"), "/rope_f32.fatbin")),
    ),
    (
        "f16",
        include_bytes!(concat!(env!("OUT_DIR"), "/rope_f16.fatbin")),
    ),
    (
        "bf16",
        include_bytes!(concat!(env!("OUT_DIR"), "/rope_bf16.fatbin")),
    ),
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
        // Straight to stderr, which the test harness does not swallow.
        let _ = writeln!(std::io::stderr(), "skipped: {tool} is not in PATH");
    }
    found
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

/// Machine code by function: (name, text).
fn functions(sass: &str, marker: &str) -> Vec<(String, String)> {
    sass.split(marker)
        .skip(1)
        .map(|part| {
            let (head, body) = part.split_once('\n').unwrap();
            let end = head
                .find(|c: char| !(c.is_alphanumeric() || c == '_'))
                .unwrap_or(head.len());
            let name = head[..end].to_string();
            (name, body.to_string())
        })
        .filter(|(name, _)| name.starts_with("rope_"))
        .collect()
}

/// Loads and stores of q and k in one function.
fn check_accesses(context: &str, name: &str, body: &str) {
    assert!(
        !body.contains("LDL") && !body.contains("STL"),
        "{context} {name} uses local memory"
    );
    let count = |prefix: &str, suffix: &str| {
        body.lines()
            .filter(|line| {
                line.split_whitespace().any(|word| {
                    word.starts_with(prefix)
                        && word.split('.').any(|part| part == suffix)
                        && !word.contains("CONSTANT")
                })
            })
            .count()
    };
    let (loads, stores) = (count("LDG", "128"), count("STG", "128"));
    if name.ends_with("_narrow") {
        assert_eq!((loads, stores), (0, 0), "{context} {name}");
    } else {
        // Four heads in flight, two places each, and the copies of dims that do not rotate.
        assert!(loads >= 8, "{context} {name}: {loads} loads of 128 bits");
        assert!(stores >= 8, "{context} {name}: {stores} stores of 128 bits");
        let narrow = body
            .lines()
            .any(|line| line.contains("STG") && !line.contains(".128"));
        assert!(!narrow, "{context} {name} stores less than 128 bits");
    }
}

#[test]
fn prebuilt_ptx_assembles_without_spills() {
    if !has("ptxas") || !has("nvdisasm") {
        return;
    }
    let known = run(Command::new("ptxas").arg("--help"));
    let folder = tempfile::tempdir().unwrap();
    for (dtype, compute_75, compute_80) in PREBUILT {
        for architecture in ARCHITECTURES {
            if !known.contains(&format!("'{architecture}'")) {
                println!("skipped: this ptxas does not know {architecture}");
                continue;
            }
            let text = if architecture == "sm_75" {
                compute_75
            } else {
                compute_80
            };
            let context = format!("{dtype} {architecture}");
            let ptx = write(folder.path(), "kernels.ptx", text.as_bytes());
            let cubin = folder.path().join("kernels.cubin");
            let report = run(Command::new("ptxas")
                .args(["-v", "-arch", architecture, "-o"])
                .arg(&cubin)
                .arg(&ptx));
            let frames: Vec<_> = report
                .lines()
                .filter(|line| line.contains("bytes stack frame"))
                .collect();
            assert_eq!(frames.len(), Kernel::PER_DTYPE, "{context}: {report}");
            for frame in frames {
                assert_eq!(
                    frame.trim(),
                    "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads",
                    "{context}: {report}"
                );
            }
            let sass = run(Command::new("nvdisasm").arg("-c").arg(&cubin));
            let functions = functions(&sass, ".section\t.text.");
            assert_eq!(functions.len(), Kernel::PER_DTYPE, "{context}");
            for (name, body) in functions {
                check_accesses(&context, &name, &body);
            }
        }
    }
}

#[cfg(phasor_fatbin)]
#[test]
fn fatbins_hold_code_without_local_memory() {
    if !has("cuobjdump") || !has("nvdisasm") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for (dtype, bytes) in FATBINS {
        let fatbin = write(folder.path(), "kernels.fatbin", bytes);
        let usage = run(Command::new("cuobjdump").arg("-res-usage").arg(&fatbin));
        let lines: Vec<_> = usage.lines().filter(|line| line.contains("REG:")).collect();
        assert!(
            !lines.is_empty() && lines.len().is_multiple_of(Kernel::PER_DTYPE),
            "{usage}"
        );
        for line in lines {
            assert!(
                line.contains("STACK:0") && line.contains("LOCAL:0"),
                "{dtype}: {line}"
            );
        }
        let sass = run(Command::new("cuobjdump").arg("-sass").arg(&fatbin));
        let functions = functions(&sass, "Function : ");
        assert!(!functions.is_empty());
        for (name, body) in functions {
            check_accesses(&format!("{dtype} fatbin"), &name, &body);
        }
        let ptx = run(Command::new("cuobjdump").arg("-lptx").arg(&fatbin));
        assert!(
            ptx.contains(".ptx"),
            "{dtype}: no PTX for newer GPUs: {ptx}"
        );
    }
}
