//! The scripts that measure on a GPU, as far as they go without one.

use crate::gpu::results::{self, Memory, Results};
use crate::gpu::steps::{self, Queries, Step};
use crate::gpu::{schedule, tests::results};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const SCRIPTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../scripts");

/// A folder of a test's own, removed at its end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("compare-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What Python prints that has `gpu_peers` imported as `g`.
fn python(lines: &str, arguments: &[&Path]) -> String {
    let output = Command::new("python3")
        .args([
            "-B",
            "-c",
            &format!("import json, sys\nfrom pathlib import Path\nimport gpu_peers as g\n{lines}"),
        ])
        .args(arguments)
        .env("PYTHONPATH", SCRIPTS)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    text(&output.stdout)
}

#[test]
fn peers_are_added_to_what_the_bench_wrote() {
    let folder = Folder::new("peers");
    let mut before = results();
    before.meta.skipped = vec![
        "limits: none".to_owned(),
        "vLLM: was not there before".to_owned(),
    ];
    let path = folder.write("gpu-a.json", &before.to_string());
    // One row is measured again, one is new.
    python(
        "path = Path(sys.argv[1])\n\
         results = json.loads(path.read_text())\n\
         again = next(row for row in results['rows'] if row['kind'] == 'peer') | {'us': 9.25}\n\
         new = again | {'memory': 'l2', 'contender': 'flash-attn'}\n\
         g.save(path, g.merged(results, [again, new], {'torch': '2'}, ['SGLang: no module']))",
        &[&path],
    );
    let written = fs::read_to_string(&path).unwrap();
    let after: Results = written.parse().unwrap();
    assert_eq!(after.to_string(), written);
    assert_eq!(after.rows.len(), before.rows.len() + 1);
    let [.., again, new] = &after.rows[..] else {
        panic!("{written}")
    };
    assert_eq!((again.contender.as_str(), again.us), ("quick", 9.25));
    assert_eq!(
        (new.contender.as_str(), new.memory),
        ("flash-attn", Memory::L2)
    );
    let versions: Vec<_> = after.meta.versions.into_iter().collect();
    let own = |name: &str, version: &str| (name.to_owned(), version.to_owned());
    assert_eq!(versions, [own("quick", "1.0"), own("torch", "2")]);
    assert_eq!(after.meta.skipped, ["limits: none", "SGLang: no module"]);
    assert_eq!(after.meta.kernels, before.meta.kernels);
}

#[test]
fn peers_are_measured_where_phasor_is_and_as_often() {
    let l2 = 60 << 20;
    let printed = python(
        "for c in g.cases():\n\
         \x20   count = g.cold_buffers(c.bytes, 60 << 20)\n\
         \x20   for memory, count in zip(c.memories, (count, 1)):\n\
         \x20       calls = g.calls(c.bytes, count, 1)\n\
         \x20       print(c.shape, c.dtype, c.tokens, memory, count, max(calls, count), sep='|')",
        &[],
    );
    let mut ours = Vec::new();
    for group in schedule::groups() {
        let (shape, dtype, tokens) = (group.shape.name(), group.dtype, group.tokens);
        let bytes = group.bytes();
        for &memory in group.memories() {
            let (memory, count) = match memory {
                Memory::Cold => ("cold", schedule::cold_buffers(bytes, l2)),
                Memory::L2 => ("l2", 1),
            };
            let calls = schedule::calls(bytes, count);
            // Both pairings.
            for _ in 0..2 {
                ours.push(format!("{shape}|{dtype}|{tokens}|{memory}|{count}|{calls}"));
            }
        }
    }
    let mut theirs: Vec<&str> = printed.lines().collect();
    theirs.sort();
    ours.sort();
    assert_eq!(theirs, ours);
}

#[test]
fn peers_do_the_steps_that_phasor_does_as_often() {
    let l2 = 60 << 20;
    let printed = python(
        "for c in g.step_cases():\n\
         \x20   count = g.cold_buffers(2 * c.qkv, 60 << 20)\n\
         \x20   calls = g.calls(c.moved // 2, count, 1)\n\
         \x20   print(c.step, c.shape, c.dtype, c.tokens, c.moved, count, max(calls, count), sep='|')\n\
         print(g.SLOT_STRIDE, g.SCALE, g.PAGE)",
        &[],
    );
    let mut ours = Vec::new();
    for tokens in steps::TOKENS {
        // Where q goes makes no other step of it.
        for step in Step::all().filter(|step| step.queries != Queries::Elsewhere) {
            let (name, shape, bytes) = (step.name(), steps::SHAPE, step.bytes(tokens));
            let layers = schedule::cold_buffers(2 * tokens * steps::QKV, l2);
            let calls = schedule::calls(bytes / 2, layers);
            ours.push(format!(
                "{name}|{shape}|bf16|{tokens}|{bytes}|{layers}|{calls}"
            ));
        }
    }
    let in_pages = Step::all().last().unwrap();
    ours.push(format!(
        "{} {} {}",
        steps::slots(8192)[1],
        1.0 / in_pages.scale(),
        steps::PAGE
    ));
    assert_eq!(printed.lines().collect::<Vec<_>>(), ours);
}

#[test]
fn what_is_measured_of_peers_can_be_read_and_shown() {
    let folder = Folder::new("measured");
    let path = folder.write("gpu-a.json", &results().to_string());
    python(
        "from types import SimpleNamespace as N\n\
         torch = N(cuda=N(get_device_capability=lambda: (9, 0)))\n\
         timer = N(replayed=lambda number, cold, call: (call(number), 2.5)[1])\n\
         by_name = lambda all, name: next(c for c in all if c.name == name)\n\
         path, rows = Path(sys.argv[1]), []\n\
         for case, contender in (\n\
         \x20   (g.cases()[0], by_name(g.CONTENDERS, 'vLLM')),\n\
         \x20   (g.step_cases()[0], by_name(g.STEP_CONTENDERS, 'SGLang, one launch')),\n\
         ):\n\
         \x20   rows += g.measured(torch, timer, case, contender, 4, lambda n: n)\n\
         g.save(path, g.merged(json.loads(path.read_text()), rows, {}, []))",
        &[&path],
    );
    let written = fs::read_to_string(&path).unwrap();
    let after: Results = written.parse().unwrap();
    assert_eq!(after.to_string(), written);
    let step = Step::all().next().unwrap().name();
    assert_eq!(results::steps(&after.rows), [&step]);
    let table = results::headlines_of_step(&after.rows, &step);
    assert!(
        table.ends_with("| dependent | 1 |  |  |  | SGLang, one launch | 2.50 |  |\n"),
        "{table}"
    );
    let vllm: Vec<_> = after
        .rows
        .iter()
        .filter(|row| row.contender == "vLLM")
        .collect();
    assert!(matches!(vllm[..], [cold, l2] if cold.is_headline() && l2.memory == Memory::L2));
    assert_eq!(vllm[0].bytes, Some(2 * 40 * 128 * 2));
}

/// `gpu-check` of a bundle whose programs are these.
fn check(folder: &Folder, tests: &str, bench: &str, seconds: &str) -> Output {
    let script = fs::read_to_string(format!("{SCRIPTS}/gpu-check")).unwrap();
    let script = folder.write("bundle/gpu-check", &script);
    folder.write("bundle/REVISION", "abc1234\n");
    folder.write("bundle/KERNELS", "77\n");
    folder.write("bundle/bin/gpu-tests", &format!("#!/bin/sh\n{tests}\n"));
    folder.write(
        "bundle/bin/gpu-step-tests",
        &format!("#!/bin/sh\n{tests}\n"),
    );
    folder.write("bundle/bin/gpu-bench", &format!("#!/bin/sh\n{bench}\n"));
    folder.write("path/nvidia-smi", "#!/bin/sh\necho 'NVIDIA Fake, 580.1'\n");
    let sanitizer = "#!/bin/sh\necho \"$*\" >>\"$(dirname \"$0\")/sanitized\"\n";
    folder.write("path/compute-sanitizer", sanitizer);
    let path = format!(
        "{}:{}",
        folder.0.join("path").display(),
        std::env::var("PATH").unwrap()
    );
    Command::new("bash")
        .arg(script)
        .args([
            "--json",
            "out.json",
            "--output",
            "out.md",
            "--seconds",
            seconds,
        ])
        .current_dir(&folder.0)
        .env("PATH", path)
        .output()
        .unwrap()
}

/// Writes its arguments where the results belong, and prints as the bench does.
const BENCH: &str = "[ \"$1\" = --seconds ] && [ \"$3\" = --json ] && echo \"$5 $6 $7 $8\" >\"$4\"\n\
    echo '32+8 heads of 128, bf16, tokens: 1' >&2\n\
    echo 'NVIDIA Fake, kernels of one element type loaded from PTX compute_90 in 1.5 ms.'\n\
    echo '## q and k'; echo; echo '| launch | tokens |'; echo '|---|--:|'; echo '| ordinary | 1 |'\n\
    echo; echo '## a step'; echo; echo '| step | 1 |'\n\
    echo 'not measured: limits: too old'";

#[test]
fn the_check_of_a_gpu_sums_up_what_ran() {
    let folder = Folder::new("gpu-check");
    let own_libraries =
        "#!/bin/sh\ncase \"$LD_LIBRARY_PATH:\" in */toolkit/lib64:*) ;; *) exit 1 ;; esac\n";
    folder.write("bundle/bin/candle-tests", own_libraries);
    // Beside the nvcc that is found.
    folder.write("toolkit/lib64/libcublas.so.13", "");
    folder.write("toolkit/bin/nvcc", "#!/bin/sh\n");
    fs::create_dir_all(folder.0.join("path")).unwrap();
    symlink("../toolkit/bin/nvcc", folder.0.join("path/nvcc")).unwrap();
    let output = check(&folder, "[ \"$PHASOR_REQUIRE_GPU\" = 1 ]", BENCH, "60");
    let printed = text(&output.stdout);
    assert!(output.status.success(), "{printed}{}", text(&output.stderr));
    for line in [
        "| device | NVIDIA Fake |",
        "| driver | 580.1 |",
        "| kernels of one type loaded from | PTX compute_90 in 1.5 ms |",
        "| phasor | abc1234 |",
        "| GPU tests | pass |",
        "| GPU tests of steps | pass |",
        "| compute-sanitizer racecheck | pass |",
        "| compute-sanitizer racecheck of steps | pass |",
        "| bench | pass |",
        "| phasor-candle's GPU tests | pass |",
        "| ordinary | 1 |",
        "- not measured: limits: too old",
    ] {
        assert!(
            printed.lines().any(|found| found == line),
            "{line}\n{printed}"
        );
    }
    assert!(printed.contains("\n\n## q and k\n\n| launch | tokens |\n|---|--:|\n| ordinary | 1 |\n\n## a step\n\n| step | 1 |\n"));
    let summary = fs::read_to_string(folder.0.join("out.md")).unwrap();
    assert!(summary.starts_with("# NVIDIA Fake") && printed.contains(&summary));
    let json = fs::read_to_string(folder.0.join("out.json")).unwrap();
    assert_eq!(json, "--revision abc1234 --kernels 77\n");
    let sanitized = fs::read_to_string(folder.0.join("path/sanitized")).unwrap();
    assert_eq!(sanitized.lines().count(), 6);
}

#[test]
fn the_check_of_a_gpu_fails_where_a_step_does_or_does_not_end() {
    let folder = Folder::new("gpu-check-fails");
    let output = check(&folder, "echo 'a test failed'; exit 1", BENCH, "60");
    let printed = text(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{printed}");
    assert!(printed.contains("| GPU tests | **FAIL** |") && printed.contains("a test failed"));
    assert!(printed.contains("| bench | pass |"), "{printed}");
    assert!(!printed.contains("candle"), "{printed}");

    folder.write("bundle/bin/candle-tests", "#!/bin/sh\n");
    folder.write(
        "path/ldd",
        "#!/bin/sh\nprintf '\\tlibcublas.so.13 => not found\\n\\tlibc.so.6 => /lib/libc.so.6\\n'\n",
    );
    let output = check(&folder, "", BENCH, "60");
    let printed = text(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{printed}");
    let missing = "| phasor-candle's GPU tests | **FAIL**: not found: libcublas.so.13 |";
    assert!(printed.contains(missing), "{printed}");

    let output = check(&folder, "exec sleep 1000", BENCH, "4");
    let printed = text(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{printed}");
    assert!(
        printed.contains("| GPU tests | **FAIL**: over 4 s |"),
        "{printed}"
    );
    assert!(
        printed.contains("| bench | **FAIL**: no time was left |"),
        "{printed}"
    );
}
