//! The example `rotate`, end to end: what it prints, what it writes, and how it refuses.

// The program itself is a function of its arguments, so most tests call it here. Its `main` has
// no caller in this crate; `process_*` tests run the binary.
#[allow(dead_code)]
#[path = "../examples/rotate/main.rs"]
mod rotate;

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use phasor::half::{bf16, f16};
use phasor::{Element, Frequencies, Host, InOut, Layout, Pairing, Positions, Problem, Rope};
use safetensors::tensor::TensorView;
use safetensors::{Dtype as FileDtype, SafeTensors};

struct Ran {
    code: u8,
    stdout: String,
    stderr: String,
}

fn run<S: Into<OsString>>(args: impl IntoIterator<Item = S>) -> Ran {
    let (mut stdout, mut stderr) = (vec![], vec![]);
    let args = args.into_iter().map(Into::into);
    let code = rotate::run(args, &mut stdout, &mut stderr, None);
    Ran {
        code,
        stdout: String::from_utf8(stdout).unwrap(),
        stderr: String::from_utf8(stderr).unwrap(),
    }
}

/// Runs with arguments that must work, on the host and with one sample per timing.
fn report(args: &[&str]) -> String {
    let ran = run([args, &["--device", "host", "--repeat", "1"]].concat());
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""), "{args:?}");
    ran.stdout
}

/// Runs with arguments that must be refused, in one line that holds all of `words`.
#[track_caller]
fn refused<S: Into<OsString>>(args: impl IntoIterator<Item = S>, words: &[&str]) {
    let ran = run(args);
    assert_eq!(ran.code, 2, "{}", ran.stdout);
    assert_eq!(ran.stdout, "");
    assert!(ran.stderr.starts_with("rotate: "), "{}", ran.stderr);
    assert!(ran.stderr.ends_with('\n'), "{:?}", ran.stderr);
    assert_eq!(ran.stderr.lines().count(), 1, "{}", ran.stderr);
    for word in words {
        assert!(ran.stderr.contains(word), "no {word:?} in: {}", ran.stderr);
    }
}

/// The figures in the row of a report that starts with `label`.
#[track_caller]
fn figures(report: &str, label: &str) -> Vec<f64> {
    let row = report
        .lines()
        .find_map(|line| line.trim_start().strip_prefix(label));
    let row = row.unwrap_or_else(|| panic!("no row {label:?} in:\n{report}"));
    let cells = row.split_whitespace().filter(|&cell| cell != "GB/s");
    cells
        .map(|cell| cell.replace(',', "").parse().unwrap())
        .collect()
}

/// A folder for the files of one test.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_string()
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> String {
        let path = self.path(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    /// Writes a safetensors file.
    fn tensors(&self, name: &str, tensors: &[(&str, Stored)]) -> String {
        self.write(name, file(tensors))
    }

    /// The names of all files in it.
    fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(self.0.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

/// A tensor as it lies in a file.
#[derive(Clone)]
struct Stored {
    dtype: FileDtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

fn file(tensors: &[(&str, Stored)]) -> Vec<u8> {
    let views = tensors.iter().map(|(name, t)| {
        let view = TensorView::new(t.dtype, t.shape.clone(), &t.bytes).unwrap();
        (*name, view)
    });
    safetensors::serialize(views, None).unwrap()
}

/// Types that go to files, with their bytes.
trait Bytes: Copy {
    const DTYPE: FileDtype;
    fn bytes(self) -> Vec<u8>;
}

macro_rules! bytes {
    ($($type:ty = $dtype:ident),*) => {$(
        impl Bytes for $type {
            const DTYPE: FileDtype = FileDtype::$dtype;
            fn bytes(self) -> Vec<u8> {
                self.to_le_bytes().to_vec()
            }
        }
    )*};
}
bytes!(
    f32 = F32,
    f16 = F16,
    bf16 = BF16,
    f64 = F64,
    i32 = I32,
    i64 = I64,
    u32 = U32,
    u8 = U8
);

fn stored<T: Bytes>(shape: &[usize], data: &[T]) -> Stored {
    Stored {
        dtype: T::DTYPE,
        shape: shape.to_vec(),
        bytes: data.iter().flat_map(|x| x.bytes()).collect(),
    }
}

/// Values of some variety, of a tensor of this shape.
fn values<T: Element>(shape: &[usize], seed: usize) -> Vec<T> {
    (0..shape.iter().product())
        .map(|i| T::narrow(((i * 37 + seed * 11) % 101) as f32 / 16.0 - 3.0))
        .collect()
}

fn ones(shape: &[usize]) -> Stored {
    stored(shape, &values::<f32>(shape, 1))
}

/// What the crate makes of a tensor that is a buffer of its own.
fn rotated<T: Element>(
    rope: &Rope,
    layout: Layout,
    mut data: Vec<T>,
    positions: Positions<'_>,
) -> Vec<T> {
    let rotator = Host::new().rotator(rope);
    let plan = rotator.plan(&Problem::new(T::DTYPE).q(layout)).unwrap();
    let q = Some(InOut::InPlace(&mut data[..]));
    rotator.rotate(&plan, q, None, positions).unwrap();
    data
}

fn rope(theta: f64, rotary_dim: usize, pairing: Pairing) -> Rope {
    Rope::new(Frequencies::from_theta(theta, rotary_dim).unwrap(), pairing)
}

/// The file holds this tensor, bit for bit.
#[track_caller]
fn assert_holds(path: &str, name: &str, expected: &Stored) {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = file.tensor(name).unwrap();
    assert_eq!(tensor.dtype(), expected.dtype, "{name}");
    assert_eq!(tensor.shape(), expected.shape, "{name}");
    assert!(tensor.data() == expected.bytes, "{name} has other values");
}

// The built-in tensors.

#[test]
fn the_tour_agrees_with_transformers() {
    let text = report(&[]);
    assert!(text.contains("The old lighthouse"), "{text}");
    assert!(text.contains("q [38, 9, 64], k [38, 3, 64]"), "{text}");
    assert!(text.contains("it was asked for"), "{text}");

    let rounding = figures(&text, "transformers' own, rounded to bf16")[0];
    assert!((1e-3..0.05).contains(&rounding));
    for pairing in ["half-split", "interleaved"] {
        let [in_f32, in_bf16] = figures(&text, pairing)[..] else {
            panic!("two figures in {pairing}:\n{text}");
        };
        assert!(in_f32 < 1e-5, "{text}");
        // Two roundings, of which one is on the way in and is then rotated.
        assert!(in_bf16 < 2.5 * rounding, "{text}");
        assert!(in_bf16 > 0.1 * rounding, "bf16 was not rounded:\n{text}");
    }
}

#[test]
fn scores_of_the_tour_depend_on_relative_position_alone() {
    for start in ["0", "-5000", "123456789"] {
        let text = report(&["--start-position", start]);
        let pairings = figures(&text, "half-split against interleaved, largest difference")[0];
        assert!(pairings < 1e-9, "{text}");
        let phasor = figures(&text, "phasor");
        assert!(phasor.iter().all(|&change| change < 2e-5), "{text}");
        let in_f32 = figures(&text, "angles in f32, as transformers forms them");
        if start == "0" {
            assert_eq!(phasor[0], 0.0);
            // The last bits depend on the platform's cos and sin.
            assert_eq!(in_f32[0], 0.0);
            assert!((5e-4..2e-3).contains(&in_f32[1]), "{text}");
            assert!((0.5..0.9).contains(&in_f32[2]), "{text}");
        } else {
            assert!(text.contains("Not compared with transformers"), "{text}");
            assert!(
                text.contains("Beside the scores at positions from 0 on"),
                "{text}"
            );
            assert!(in_f32.iter().all(|&change| change > 5e-4), "{text}");
        }
    }
}

#[test]
fn speeds_are_positive() {
    let text = report(&["--pairing", "interleaved"]);
    let tokens = if cfg!(debug_assertions) {
        "32"
    } else {
        "2,048"
    };
    let llama = format!("{tokens} tokens of Llama 3 8B, bf16");
    for label in [&llama, "this sentence, f32"] {
        let speeds = figures(&text, label);
        assert_eq!(speeds.len(), 3, "{text}");
        assert!(speeds.iter().all(|&speed| speed > 0.0), "{text}");
    }
}

#[test]
fn the_tour_runs_on_the_device_of_this_machine() {
    let ran = run(["--repeat", "1"]);
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
    let row = |label: &str| {
        let mut lines = ran.stdout.lines().map(str::trim_start);
        lines.any(|line| {
            line.strip_prefix(label)
                .is_some_and(|rest| !rest.trim().is_empty())
        })
    };
    assert!(row("device") && row("because"), "{}", ran.stdout);
}

#[test]
fn the_tour_writes_what_the_crate_computes() {
    let fixture = include_bytes!("../examples/data/smollm2-layer0.safetensors");
    let fixture = SafeTensors::deserialize(fixture).unwrap();
    let folder = Folder::new();
    for (option, pairing) in [
        ("half-split", Pairing::HalfSplit),
        ("interleaved", Pairing::Interleaved),
    ] {
        let output = folder.path(option);
        let args = [
            "--pairing",
            option,
            "--start-position",
            "-7",
            "--output",
            &output,
        ];
        assert!(report(&args).contains(&output));
        for (name, heads) in [("q", 9), ("k", 3)] {
            let tensor = fixture
                .tensor(&format!("{name}_{}", pairing.name()))
                .unwrap();
            let (data, _) = tensor.data().as_chunks();
            let data = data
                .iter()
                .map(|&bytes| f32::from_le_bytes(bytes))
                .collect();
            let rope = rope(100_000.0, 64, pairing);
            let layout = Layout::tokens(38, heads, 64);
            let expected = rotated(&rope, layout, data, Positions::start(-7));
            assert_holds(&output, name, &stored(&[38, heads, 64], &expected));
        }
    }
}

// Files.

fn check_file<T: Element + Bytes>(dtype: &str) {
    let folder = Folder::new();
    let (q_shape, k_shape) = ([2, 5, 4, 16], [2, 5, 2, 16]);
    let (q, k) = (values::<T>(&q_shape, 1), values::<T>(&k_shape, 2));
    let ids: Vec<i32> = (0..10).map(|i| i * 1000 - 3000).collect();
    let tensors = [
        ("q", stored(&q_shape, &q)),
        ("k", stored(&k_shape, &k)),
        ("position_ids", stored(&[2, 5], &ids)),
    ];
    let input = folder.tensors("in", &tensors);
    let output = folder.path("out");
    let text = report(&["--input", &input, "--output", &output]);
    for words in [
        &format!("q [2, 5, 4, 16], k [2, 5, 2, 16], {dtype}"),
        "theta 10000.0 (the default",
        "all 16 dims",
        "i32, -3,000 to 6,000",
        "memory copy",
    ] {
        assert!(text.contains(words), "no {words:?} in:\n{text}");
    }

    let rope = rope(10_000.0, 16, Pairing::HalfSplit);
    let positions = Positions::per_token(&ids[..]);
    let q = rotated(&rope, Layout::bshd(2, 5, 4, 16), q, positions);
    let k = rotated(&rope, Layout::bshd(2, 5, 2, 16), k, positions);
    assert_holds(&output, "q", &stored(&q_shape, &q));
    assert_holds(&output, "k", &stored(&k_shape, &k));
    assert_eq!(folder.names(), ["in", "out"]);
}

#[test]
fn a_file_of_each_element_type_comes_back_rotated() {
    check_file::<f32>("f32");
    check_file::<f16>("f16");
    check_file::<bf16>("bf16");
}

#[test]
fn q_or_k_may_be_absent() {
    let folder = Folder::new();
    let shape = [3, 2, 8];
    for name in ["q", "k"] {
        let data = values::<bf16>(&shape, 3);
        let input = folder.tensors("in", &[(name, stored(&shape, &data))]);
        let output = folder.path("out");
        let start = ["--start-position", "9000000000", "--pairing", "interleaved"];
        report(&[&["--input", &input, "--output", &output][..], &start].concat());
        let rope = rope(10_000.0, 8, Pairing::Interleaved);
        let start = Positions::start(9_000_000_000);
        let expected = rotated(&rope, Layout::tokens(3, 2, 8), data, start);
        assert_holds(&output, name, &stored(&shape, &expected));
        let written = std::fs::read(&output).unwrap();
        let written = SafeTensors::deserialize(&written).unwrap();
        assert_eq!(written.names(), [name]);
    }
}

#[test]
fn positions_may_be_of_each_type_and_shape() {
    let folder = Folder::new();
    let shape = [2, 3, 1, 4];
    let data = values::<f32>(&shape, 4);
    let rope = rope(10_000.0, 4, Pairing::HalfSplit);
    let layout = Layout::bshd(2, 3, 1, 4);
    let expected = |ids: &[i64]| {
        let rotated = rotated(&rope, layout, data.clone(), Positions::per_token(ids));
        stored(&shape, &rotated)
    };
    // Positions of one sequence serve both of the batch.
    let shared = expected(&[7, 0, 4_000_000_000, 7, 0, 4_000_000_000]);
    let each = expected(&[-1, 2, i64::MAX, 5, i64::MIN, 0]);
    for (ids, expected) in [
        (stored(&[3], &[7u32, 0, 4_000_000_000]), &shared),
        (stored(&[1, 3], &[7i64, 0, 4_000_000_000]), &shared),
        (
            stored(&[2, 3], &[-1i64, 2, i64::MAX, 5, i64::MIN, 0]),
            &each,
        ),
    ] {
        let q = stored(&shape, &data);
        let input = folder.tensors("in", &[("q", q), ("position_ids", ids)]);
        let output = folder.path("out");
        report(&["--input", &input, "--output", &output]);
        assert_holds(&output, "q", expected);
    }
}

#[test]
fn a_config_says_how_to_rotate() {
    let folder = Folder::new();
    let shape = [3, 2, 16];
    let data = values::<f32>(&shape, 5);
    let input = folder.tensors("in", &[("q", stored(&shape, &data))]);
    let output = folder.path("out");
    let half_split = Pairing::HalfSplit;
    for (json, theta, rotary_dim, pairing, words) in [
        (
            r#"{"rope_theta": 1e6, "head_dim": 16, "hidden_size": 999, "num_attention_heads": 7}"#,
            1e6,
            16,
            half_split,
            "half-split (assumed",
        ),
        (
            r#"{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}"#,
            10_000.0,
            16,
            half_split,
            "half-split (rule of model_type \"llama\"), all 16 dims of a head, theta 10000.0",
        ),
        (
            r#"{"model_type": "glm", "head_dim": 16, "rope_scaling": null}"#,
            10_000.0,
            8,
            Pairing::Interleaved,
            "interleaved (rule of model_type \"glm\"), the first 8 of 16 dims",
        ),
        (
            r#"{"model_type": "gpt_neox", "hidden_size": 32, "num_attention_heads": 2,
                "rotary_pct": 0.5, "rotary_emb_base": 2.5e5}"#,
            250_000.0,
            8,
            half_split,
            "theta 250000.0",
        ),
    ] {
        let config = folder.write("config", json);
        let args = ["--input", &input, "--config", &config, "--output", &output];
        let text = report(&args);
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(text.contains(words), "{text}");
        let rope = rope(theta, rotary_dim, pairing);
        let layout = Layout::tokens(3, 2, 16);
        let expected = rotated(&rope, layout, data.clone(), Positions::start(0));
        assert_holds(&output, "q", &stored(&shape, &expected));
    }
    // The command line has the last word.
    let config = folder.write("config", r#"{"rope_theta": 1e4, "head_dim": 16}"#);
    let args = ["--input", &input, "--config", &config, "--output", &output];
    let text = report(&[&args[..], &["--pairing", "interleaved"]].concat());
    assert!(text.contains("interleaved (chosen by --pairing)"), "{text}");
    let rope = rope(1e4, 16, Pairing::Interleaved);
    let expected = rotated(&rope, Layout::tokens(3, 2, 16), data, Positions::start(0));
    assert_holds(&output, "q", &stored(&shape, &expected));
}

/// A tensor of a golden file, `[heads, tokens, dims]` brought to `[tokens, heads, dims]`.
fn golden(file: &SafeTensors<'_>, name: &str, heads_first: bool) -> (Vec<usize>, Vec<f32>) {
    let tensor = file.tensor(name).unwrap();
    let (floats, _) = tensor.data().as_chunks::<4>();
    let floats: Vec<f32> = floats.iter().map(|&b| f32::from_le_bytes(b)).collect();
    let &[a, b, dims] = tensor.shape() else {
        panic!("{name} has three dims")
    };
    if !heads_first {
        return (vec![a, b, dims], floats);
    }
    let head = |token: usize, head: usize| &floats[(head * b + token) * dims..][..dims];
    let moved = (0..b).flat_map(|token| (0..a).flat_map(move |h| head(token, h)));
    (vec![b, a, dims], moved.copied().collect())
}

/// Configs as published, through the program, against what transformers computed: every way in
/// which a config changes a rotation. What is left is transformers' own rounding of angles, which
/// grows with the position; `config_goldens.rs` accounts for it pair by pair.
#[test]
fn configs_of_real_families_come_out_as_in_transformers() {
    let folder = Folder::new();
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/transformers");
    for (case, call, layer_type, bound) in [
        ("llama_llama3", "default", None, 0.02),
        ("llama_dynamic_type", "short", None, 1e-3),
        ("llama_dynamic_type", "long", None, 4e-3),
        ("qwen2_yarn", "default", None, 0.02),
        ("phi3_longrope", "short", None, 1e-3),
        ("phi3_longrope", "long", None, 0.02),
        ("phi4_mini", "long", None, 0.02),
        ("gpt_neox", "default", None, 1e-3),
        ("glm4", "default", None, 0.01),
        ("gemma3", "full_attention", Some("full_attention"), 0.02),
        (
            "gemma3",
            "sliding_attention",
            Some("sliding_attention"),
            1e-3,
        ),
        ("gemma4", "full_attention", Some("full_attention"), 0.05),
        ("deepseek_v4", "compress", Some("compress"), 0.02),
        ("qwen2_vl", "default", None, 1e-5),
        ("qwen3_vl", "default", None, 1e-5),
    ] {
        let bytes = std::fs::read(goldens.join(format!("{case}.safetensors"))).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let metadata = header.metadata().clone().unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let calls: serde_json::Value = serde_json::from_str(&metadata["calls"]).unwrap();
        let calls = calls.as_array().unwrap();
        let about = calls.iter().find(|about| about["name"] == call).unwrap();
        let heads_first = about["layout"] == "bhsd";
        let of_call = |name: &str| golden(&file, &format!("{call}.{name}"), heads_first);
        let ids = file.tensor(&format!("{call}.position_ids")).unwrap();
        let ids = Stored {
            dtype: FileDtype::I64,
            shape: ids.shape().to_vec(),
            bytes: ids.data().to_vec(),
        };
        let named = |name: &str| {
            let (shape, data) = of_call(name);
            stored(&shape, &data)
        };
        let tensors = [("q", named("q")), ("k", named("k")), ("position_ids", ids)];
        let input = folder.tensors("in", &tensors);
        let config = folder.write("config", &metadata["config"]);
        let output = folder.path("out");
        let mut args = vec!["--input", &input, "--config", &config, "--output", &output];
        if let Some(layer_type) = layer_type {
            args.extend(["--layer-type", layer_type]);
        }
        let text = report(&args);
        let score_scale = figures(&text, "score scale")[0];
        let expected: f64 = metadata["score_scale"].parse().unwrap();
        assert!((score_scale / expected - 1.0).abs() < 1e-12, "{case}");

        let bytes = std::fs::read(&output).unwrap();
        let got = SafeTensors::deserialize(&bytes).unwrap();
        for name in ["q", "k"] {
            let (_, expected) = of_call(&format!("{name}_rotated"));
            let (_, got) = golden(&got, name, false);
            let apart = got.iter().zip(&expected).map(|(x, y)| (x - y).abs());
            let apart = apart.fold(0.0, f32::max);
            assert!(apart < bound, "{case} {call} {name}: {apart}");
            assert!(got.iter().any(|&x| x != got[0]), "{case}: all alike");
        }
    }
}

/// Two sequences of a batch on either side of LongRoPE's limit: each by its own length, both by the
/// longer one, or each token by its position.
#[test]
fn rows_are_chosen_as_asked_for() {
    let folder = Folder::new();
    let json = r#"{"rope_theta": 1e4, "head_dim": 4, "max_position_embeddings": 64,
        "original_max_position_embeddings": 16,
        "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0, 1.0],
            "long_factor": [1.0, 32.0], "attention_factor": 1.0}}"#;
    let config = folder.write("config", json);
    let shape = [2, 3, 1, 4];
    let data = values::<f32>(&shape, 11);
    let ids = [0i64, 1, 2, 14, 15, 16];
    let tensors = [
        ("q", stored(&shape, &data)),
        ("position_ids", stored(&[2, 3], &ids)),
    ];
    let input = folder.tensors("in", &tensors);
    let output = folder.path("out");
    let rotate = |by: &[&str]| {
        let args = ["--input", &input, "--config", &config, "--output", &output];
        let text = report(&[&args[..], by].concat());
        (text, std::fs::read(&output).unwrap())
    };
    let expected = |long: [bool; 6]| {
        let mut data = data.clone();
        for (token, (&position, long)) in ids.iter().zip(long).enumerate() {
            let inv_freq = [1.0, if long { 0.01 / 32.0 } else { 0.01 }];
            let rope = Rope::new(
                Frequencies::from_inv_freq(&inv_freq).unwrap(),
                Pairing::HalfSplit,
            );
            let head = data[4 * token..4 * token + 4].to_vec();
            let head = rotated(
                &rope,
                Layout::tokens(1, 1, 4),
                head,
                Positions::start(position),
            );
            data[4 * token..4 * token + 4].copy_from_slice(&head);
        }
        data
    };
    let (t, f) = (true, false);
    for (by, words, long) in [
        (
            &[][..],
            "by the length of each sequence; lengths 3 to 17",
            [f, f, f, t, t, t],
        ),
        (
            &["--rows-by", "sequence"],
            "of each sequence",
            [f, f, f, t, t, t],
        ),
        (
            &["--rows-by", "call"],
            "by the longest sequence of the call",
            [t; 6],
        ),
        (
            &["--rows-by", "position"],
            "by the position of each token",
            [f, f, f, f, f, t],
        ),
    ] {
        let (text, bytes) = rotate(by);
        assert!(text.contains(words), "{text}");
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let got = file.tensor("q").unwrap();
        let (got, _) = got.data().as_chunks::<4>();
        for (got, expected) in got.iter().zip(expected(long)) {
            assert!((f32::from_le_bytes(*got) - expected).abs() < 1e-6, "{by:?}");
        }
    }
}

#[test]
fn odd_contents_are_rotated_all_the_same() {
    let folder = Folder::new();
    let output = folder.path("out");

    // Nothing to rotate.
    for shape in [[0, 4, 16], [3, 0, 16]] {
        let ids = stored(&[shape[0]], &vec![5i64; shape[0]]);
        let input = folder.tensors("in", &[("q", ones(&shape)), ("position_ids", ids)]);
        let text = report(&["--input", &input, "--output", &output]);
        assert!(text.contains("there are no elements"), "{text}");
        assert_holds(&output, "q", &ones(&shape));
    }
    // Broadcasting these positions would not fit any memory.
    let huge = [1 << 40, 3, 0, 16];
    let ids = stored(&[3], &[0i64, 1, 2]);
    let input = folder.tensors("in", &[("k", ones(&huge)), ("position_ids", ids)]);
    report(&["--input", &input]);

    // NaN and infinity stay in their pair.
    let data = [f32::NAN, 1.0, 2.0, 3.0, 4.0, f32::INFINITY, 5.0, 6.0];
    let input = folder.tensors("in", &[("q", stored(&[1, 1, 8], &data))]);
    report(&[
        "--input",
        &input,
        "--output",
        &output,
        "--start-position",
        "1",
    ]);
    let rope = rope(10_000.0, 8, Pairing::HalfSplit);
    let layout = Layout::tokens(1, 1, 8);
    let expected = rotated(&rope, layout, data.to_vec(), Positions::start(1));
    assert!(expected[2].is_finite() && expected[3].is_finite());
    assert_holds(&output, "q", &stored(&[1, 1, 8], &expected));
}

#[test]
fn an_output_replaces_what_was_there() {
    let folder = Folder::new();
    let shape = [2, 1, 4];
    let input = folder.tensors("in", &[("q", ones(&shape))]);
    report(&[
        "--input",
        &input,
        "--output",
        &input,
        "--start-position",
        "3",
    ]);
    let rope = rope(10_000.0, 4, Pairing::HalfSplit);
    let layout = Layout::tokens(2, 1, 4);
    let expected = rotated(&rope, layout, values::<f32>(&shape, 1), Positions::start(3));
    assert_holds(&input, "q", &stored(&shape, &expected));
    assert_eq!(folder.names(), ["in"]);

    #[cfg(unix)]
    {
        let link = folder.path("link");
        std::os::unix::fs::symlink(&input, &link).unwrap();
        report(&["--output", &link]);
        assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_holds_shape(&input, "q", &[38, 9, 64]);
    }
}

#[cfg(unix)]
fn assert_holds_shape(path: &str, name: &str, shape: &[usize]) {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.tensor(name).unwrap().shape(), shape);
}

// Refusals.

/// The part of a report that follows a heading.
#[track_caller]
fn after<'a>(report: &'a str, heading: &str) -> &'a str {
    let part = report.split_once(heading);
    part.unwrap_or_else(|| panic!("no {heading:?} in:\n{report}"))
        .1
}

const OF_SCORES: &str = "Largest change of a score when all positions shift alike";
const OF_VALUES: &str = "Largest error of a rotated value";

/// Curves of a chart, as heights on the page.
fn curves(svg: &str) -> Vec<Vec<f64>> {
    let curves = svg.split("<polyline").skip(1).map(|curve| {
        let points = curve.split_once("points=\"").unwrap().1;
        let points = points.split_once('"').unwrap().0.split(' ');
        let height = |point: &str| point.split_once(',').unwrap().1.parse().unwrap();
        points.map(height).collect()
    });
    curves.collect()
}

#[test]
fn a_plot_shows_scores_and_errors_of_the_tensors() {
    let folder = Folder::new();
    let (q, k) = ([9, 4, 64], [9, 2, 64]);
    let tensors = [
        ("q", stored(&q, &values::<bf16>(&q, 3))),
        ("k", stored(&k, &values::<bf16>(&k, 8))),
        // They do not count here.
        ("position_ids", stored(&[9], &[5i64; 9])),
    ];
    let input = folder.tensors("in", &tensors);
    let plot = folder.path("plot.svg");
    let text = report(&["--input", &input, "--plot", &plot]);
    for heading in [OF_SCORES, OF_VALUES] {
        let part = after(&text, heading);
        assert_eq!(figures(part, "position"), [1024.0, 1048576.0, 16777216.0]);
        let [phasor, in_f32] = ["phasor", "angles in f32"].map(|row| figures(part, row));
        assert!(phasor.iter().all(|&x| x < 3e-5), "{text}");
        assert!(in_f32.is_sorted() && in_f32[2] > 0.3, "{text}");
    }
    assert!(text.contains("Of 9 tokens"), "{text}");
    assert!(text.contains(&format!("Wrote {plot}")), "{text}");

    let svg = std::fs::read_to_string(&plot).unwrap();
    assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
    assert_eq!(svg.matches("<text").count(), svg.matches("</text>").count());
    assert_eq!(svg.matches("<g ").count(), 2);
    let curves = curves(&svg);
    assert_eq!(curves.len(), 4);
    for pair in curves.chunks(2) {
        // Down the page is less.
        let (f32_angles, phasor) = (&pair[0], &pair[1]);
        assert_eq!(f32_angles.len(), phasor.len());
        assert!(f32_angles.last() < f32_angles.first());
        let wanders = |curve: &[f64]| {
            let highest = curve.iter().copied().fold(f64::INFINITY, f64::min);
            curve.iter().copied().fold(0.0, f64::max) - highest
        };
        assert!(wanders(phasor) < 0.3 * wanders(f32_angles), "{pair:?}");
    }
}

/// What is right is formed in f64 beside the crate, so a wrong pair or dim would show as an error.
#[test]
fn a_plot_knows_every_rotation() {
    let folder = Folder::new();
    let shape = [2, 40, 3, 16];
    let input = folder.tensors("in", &[("k", stored(&shape, &values::<f32>(&shape, 4)))]);
    let plot = folder.path("plot.svg");
    for json in [
        r#"{"model_type": "glm", "head_dim": 16}"#,
        r#"{"model_type": "gpt_neox", "hidden_size": 32, "num_attention_heads": 2}"#,
        r#"{"rope_theta": 1e4, "head_dim": 16, "max_position_embeddings": 64,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}"#,
        r#"{"rope_theta": 1e4, "head_dim": 16, "max_position_embeddings": 64,
            "original_max_position_embeddings": 16, "rope_scaling": {"rope_type": "longrope",
            "short_factor": [1, 1, 1, 1, 1, 1, 1, 1], "long_factor": [1, 2, 3, 4, 5, 6, 7, 8]}}"#,
    ] {
        let config = folder.write("config", json);
        let text = report(&["--input", &input, "--config", &config, "--plot", &plot]);
        // There are no scores without q.
        assert!(!text.contains(OF_SCORES), "{text}");
        let part = after(&text, OF_VALUES);
        assert!(figures(part, "phasor").iter().all(|&x| x < 1e-5), "{text}");
        assert!(figures(part, "angles in f32")[2] > 0.1, "{text}");
        let svg = std::fs::read_to_string(&plot).unwrap();
        assert_eq!(curves(&svg).len(), 2);
    }
    // Of a long sequence some tokens are taken, of a short one all.
    let shape = [1000, 1, 16];
    let input = folder.tensors("in", &[("q", ones(&shape)), ("k", ones(&shape))]);
    let text = report(&["--input", &input, "--plot", &plot]);
    assert!(text.contains("Of 64 tokens"), "{text}");
    let shape = [1, 1, 16];
    let input = folder.tensors("in", &[("q", ones(&shape)), ("k", ones(&shape))]);
    let text = report(&["--input", &input, "--plot", &plot]);
    assert!(text.contains("Of 1 tokens"), "{text}");
}

#[test]
fn the_tour_can_be_drawn() {
    let folder = Folder::new();
    let plot = folder.path("plot.svg");
    for pairing in ["half-split", "interleaved"] {
        let text = report(&["--pairing", pairing, "--plot", &plot]);
        let part = after(&text, OF_VALUES);
        assert!(figures(part, "phasor").iter().all(|&x| x < 1e-5), "{text}");
        assert!(figures(part, "angles in f32")[2] > 0.3, "{text}");
        let svg = std::fs::read_to_string(&plot).unwrap();
        assert_eq!(curves(&svg).len(), 4);
    }
}

#[test]
fn plots_that_cannot_be_drawn_are_refused() {
    let folder = Folder::new();
    let plot = folder.path("plot.svg");
    let refuse = |input: &str, more: &[&str], words: &[&str]| {
        let args = [&["--input", input, "--plot", &plot], more].concat();
        refused(args, words);
        assert!(!Path::new(&plot).exists());
    };
    let input = folder.tensors("in", &[("q", ones(&[3, 2, 4]))]);
    refuse(&input, &["--output", &plot], &["the same file"]);
    let json = r#"{"rope_theta": 1e4, "head_dim": 4, "max_position_embeddings": 64,
        "original_max_position_embeddings": 16, "rope_scaling": {"rope_type": "longrope",
        "short_factor": [1, 1], "long_factor": [1, 32]}}"#;
    let config = folder.write("config", json);
    refuse(
        &input,
        &["--config", &config, "--rows-by", "position"],
        &["--plot", "--rows-by sequence"],
    );
    let empty = folder.tensors("empty", &[("q", ones(&[0, 2, 4]))]);
    refuse(&empty, &[], &["no elements"]);
    for odd in [f32::NAN, f32::INFINITY] {
        let tensor = stored(&[1, 1, 4], &[1.0, odd, 1.0, 1.0]);
        let input = folder.tensors("odd", &[("k", tensor)]);
        refuse(&input, &[], &["not finite"]);
    }
    refused(
        ["--repeat", "1", "--plot", folder.0.path().to_str().unwrap()],
        &["cannot write", "not a file"],
    );
}

#[test]
fn long_work_says_how_far_it_is() {
    let at_once = |args: &[&str]| {
        let args = args.iter().map(OsString::from);
        let (mut stdout, mut stderr) = (vec![], vec![]);
        rotate::run(args, &mut stdout, &mut stderr, Some(Duration::ZERO));
        String::from_utf8(stderr).unwrap()
    };
    let folder = Folder::new();
    let plot = folder.path("plot.svg");
    let drawn = at_once(&["--device", "host", "--repeat", "2", "--plot", &plot]);
    for work in ["timing, in place", "timing, out of place", "drawing"] {
        assert!(drawn.contains(&format!("\r{work} ")), "{drawn:?}");
    }
    assert!(drawn.contains("100%\x1b[K"), "{drawn:?}");
    // One line, removed at the end.
    assert!(
        !drawn.contains('\n') && drawn.ends_with("\r\x1b[K"),
        "{drawn:?}"
    );
    // What is wrong stands on a line of its own.
    let drawn = at_once(&["--input", "/nowhere"]);
    let message = drawn.rsplit("\r\x1b[K").next().unwrap();
    assert!(
        message.starts_with("rotate: cannot read /nowhere"),
        "{drawn:?}"
    );
    assert_eq!(drawn.matches('\n').count(), 1);
    // Short work draws nothing.
    let mut stderr = vec![];
    let hour = Some(Duration::from_secs(3600));
    rotate::run(["--help".into()], &mut vec![], &mut stderr, hour);
    assert_eq!(stderr, b"");
}

#[test]
fn help_is_printed() {
    for args in [&["--help"][..], &["-h"], &["--repeat", "3", "--help"]] {
        let ran = run(args.iter().copied());
        assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
        for option in [
            "input",
            "config",
            "output",
            "plot",
            "device",
            "pairing",
            "start-position",
        ] {
            assert!(ran.stdout.contains(&format!("--{option} ")), "{option}");
        }
    }
}

#[test]
fn bad_arguments_are_refused() {
    refused(
        ["--frobnicate"],
        &["unknown argument \"--frobnicate\"", "--help"],
    );
    refused(["file.safetensors"], &["unknown argument"]);
    refused([""], &["unknown argument \"\""]);
    refused(["--new\nline"], &["unknown argument"]);
    for option in [
        "input",
        "config",
        "output",
        "device",
        "pairing",
        "start-position",
        "repeat",
    ] {
        let option = format!("--{option}");
        refused([&option], &[&option, "needs a value"]);
        refused([&option, "--help"], &[&option, "needs a value"]);
    }
    refused(
        ["--repeat", "3", "--repeat", "3"],
        &["--repeat is given twice"],
    );
    for bad in ["0", "-1", "x", "", "1.5", "65536"] {
        refused(["--repeat", bad], &["--repeat", "from 1"]);
    }
    for bad in ["x", "1e3", "", "9223372036854775808"] {
        refused(["--start-position", bad], &["--start-position", "64 bits"]);
    }
    refused(
        ["--pairing", "neox"],
        &["\"neox\"", "half-split or interleaved"],
    );
    refused(["--config", "config.json"], &["--config needs --input"]);
    for bad in ["gpu", "", "cuda:", "cuda:x", "cuda:-1", "CUDA", "host:0"] {
        refused(["--device", bad], &["unknown device", "cuda:N"]);
    }
    // No machine has so many.
    refused(["--device", "cuda:99999"], &[]);

    #[cfg(unix)]
    {
        use std::os::unix::ffi::OsStringExt;
        let not_text = || OsString::from_vec(vec![b'-', b'-', 0xff, 0xfe]);
        refused([not_text()], &["unknown argument"]);
        let not_text = || OsString::from_vec(vec![0xff, 0xfe]);
        for option in [
            "--device",
            "--pairing",
            "--start-position",
            "--repeat",
            "--input",
        ] {
            refused([option.into(), not_text()], &[]);
        }
    }
}

#[test]
fn bad_files_are_refused() {
    let folder = Folder::new();
    let refuse = |input: &str, words: &[&str]| {
        let output = folder.path("out");
        refused(["--input", input, "--output", &output], words);
        assert!(!folder.names().contains(&"out".to_string()));
    };
    refuse(&folder.path("absent"), &["cannot read", "absent"]);
    refuse(&folder.path(""), &["cannot read"]);
    refuse("", &["cannot read"]);

    let good = file(&[("q", ones(&[3, 2, 8]))]);
    for length in 0..good.len() {
        refuse(
            &folder.write("in", &good[..length]),
            &["not a safetensors file"],
        );
    }
    for lie in [0, 1, good.len() as u64, 1 << 40, u64::MAX] {
        let mut bytes = good.clone();
        bytes[..8].copy_from_slice(&lie.to_le_bytes());
        refuse(&folder.write("in", bytes), &["not a safetensors file"]);
    }
    refuse(
        &folder.write("in", [good, vec![0]].concat()),
        &["not a safetensors file"],
    );
    refuse(
        &folder.write("in", [b'{'; 4096]),
        &["not a safetensors file"],
    );
}

#[test]
fn no_change_of_a_header_makes_it_panic() {
    let folder = Folder::new();
    let ids = stored(&[3], &[0i64, 1, 2]);
    let good = file(&[("q", ones(&[3, 2, 8])), ("position_ids", ids)]);
    let header = 8 + usize::try_from(u64::from_le_bytes(good[..8].try_into().unwrap())).unwrap();
    for at in 0..header {
        for change in [0x01, 0x10] {
            let mut bytes = good.clone();
            bytes[at] ^= change;
            let input = folder.write("in", bytes);
            let ran = run(["--input", &input, "--device", "host", "--repeat", "1"]);
            assert_eq!(ran.code == 0, ran.stderr.is_empty());
            assert_eq!(ran.code == 0, !ran.stdout.is_empty());
        }
    }
}

#[test]
fn bad_tensors_are_refused() {
    let folder = Folder::new();
    let refuse = |tensors: &[(&str, Stored)], words: &[&str]| {
        let input = folder.tensors("in", tensors);
        let output = folder.path("out");
        refused(
            ["--input", &input, "--output", &output, "--device", "host"],
            words,
        );
        assert_eq!(folder.names(), ["in"]);
    };
    let good = || ones(&[3, 2, 8]);
    refuse(&[], &["no tensor named q or k"]);
    refuse(&[("query", good())], &["no tensor named q or k"]);
    refuse(&[("q", stored(&[3, 2, 8], &[0u8; 48]))], &["U8", "BF16"]);
    refuse(&[("k", stored(&[1, 1, 2], &[0.0f64; 2]))], &["F64", "BF16"]);
    refuse(
        &[
            ("q", good()),
            ("k", stored(&[3, 2, 8], &values::<f16>(&[3, 2, 8], 1))),
        ],
        &["k is F16, expected F32"],
    );
    for shape in [&[][..], &[16], &[2, 8], &[1, 1, 1, 2, 8]] {
        refuse(
            &[("q", ones(shape))],
            &["q has shape", "[tokens, heads, head_dim]"],
        );
    }
    refuse(
        &[("q", good()), ("k", ones(&[1, 3, 2, 8]))],
        &["same number of dims"],
    );
    refuse(
        &[("q", good()), ("k", ones(&[4, 2, 8]))],
        &["batch and tokens"],
    );
    refuse(
        &[("q", good()), ("k", ones(&[3, 2, 16]))],
        &["differ in size"],
    );
    refuse(&[("q", ones(&[3, 2, 7]))], &["rotary_dim is 7", "even"]);
    refuse(&[("q", ones(&[3, 2, 0]))], &["head_dim is 0"]);
    refuse(&[("q", ones(&[0, 1, 1 << 28]))], &["it must be from 1 to"]);

    let ids = |ids: Stored| [("q", ones(&[2, 3, 1, 8])), ("position_ids", ids)];
    for shape in [&[][..], &[2], &[6], &[3, 2], &[3, 3], &[1, 2, 3]] {
        let tensor = stored(shape, &vec![1i64; shape.iter().product()]);
        refuse(&ids(tensor), &["position_ids has shape", "[3] or [2, 3]"]);
    }
    refuse(&ids(stored(&[3], &[0.0f32; 3])), &["position_ids is F32"]);
    let input = folder.tensors("in", &ids(stored(&[3], &[0i32; 3])));
    refused(
        ["--input", &input, "--start-position", "0"],
        &["position_ids", "--start-position"],
    );
}

#[test]
fn rows_that_could_be_axes_or_sequences_are_refused() {
    let folder = Folder::new();
    let config = folder.write(
        "config",
        r#"{"model_type": "qwen2_vl", "hidden_size": 32, "num_attention_heads": 2,
            "rope_theta": 1e4, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}"#,
    );
    let input = |shape: &[usize]| {
        let ids = stored(shape, &vec![1i64; shape.iter().product()]);
        folder.tensors("in", &[("q", ones(&[3, 2, 1, 16])), ("position_ids", ids)])
    };
    for shape in [&[2][..], &[1, 2], &[3, 3, 2]] {
        let input = input(shape);
        report(&["--input", &input, "--config", &config]);
    }
    refused(
        ["--input", &input(&[3, 2]), "--config", &config],
        &["axes or sequences", "give [3, 3, 2]"],
    );
}

#[test]
fn bad_configs_are_refused() {
    let folder = Folder::new();
    let input = folder.tensors("in", &[("q", ones(&[3, 2, 16]))]);
    let refuse = |json: &str, words: &[&str]| {
        let config = folder.write("config", json);
        let output = folder.path("out");
        refused(
            ["--input", &input, "--config", &config, "--output", &output],
            words,
        );
        assert_eq!(folder.names(), ["config", "in"]);
    };
    refuse("", &["config", "not valid JSON"]);
    refuse("{\"rope_theta\": 1e4", &["not valid JSON"]);
    refuse(
        "{\"head_dim\": 16, \"rope_theta\": 1e999}",
        &["rope_theta is 1e999", "a number"],
    );
    refuse(&"[".repeat(1 << 16), &["not valid JSON"]);
    refuse(&" ".repeat((1 << 24) + 1), &["too large"]);
    refuse("[1]", &["must be a JSON object"]);
    // The library's own tests have the rest; this is how its errors arrive.
    refuse("{}", &["config: head_dim is missing"]);
    refuse(
        r#"{"head_dim": 16, "rope_theta": "10000"}"#,
        &["rope_theta is \"10000\""],
    );
    refuse(
        "{\"head_dim\": 16, \"rope_theta\": \"a\\u001b[2Jb\\n\"}",
        &["rope_theta"],
    );
    refuse(
        r#"{"head_dim": 64, "rope_theta": 1e4}"#,
        &["q [3, 2, 16]", "heads of 64"],
    );
    refuse(
        r#"{"head_dim": 16, "rope_theta": 1e4, "rope_scaling": {"rope_type": "banana"}}"#,
        &["rope_scaling.rope_type is \"banana\""],
    );
    let gemma = r#"{"model_type": "gemma3_text", "head_dim": 16, "num_hidden_layers": 6}"#;
    refuse(gemma, &["sliding_attention, full_attention"]);
    let config = folder.write("config", gemma);
    refused(
        [
            "--input",
            &input,
            "--config",
            &config,
            "--layer-type",
            "odd",
        ],
        &["\"odd\"", "sliding_attention"],
    );
    for option in ["--layer-type", "--rows-by"] {
        refused(
            ["--input", &input, option, "call"],
            &[option, "needs --config"],
        );
    }
    refused(
        ["--input", &input, "--config", &config, "--rows-by", "me"],
        &["use sequence, call or position"],
    );

    let absent = folder.path("absent");
    refused(
        ["--input", &input, "--config", &absent],
        &["cannot read", "absent"],
    );
    let directory = folder.path("");
    refused(
        ["--input", &input, "--config", &directory],
        &["cannot read"],
    );
}

#[test]
fn outputs_that_cannot_be_written_leave_nothing_behind() {
    let folder = Folder::new();
    let refuse = |output: &str, words: &[&str]| {
        refused(
            ["--device", "host", "--repeat", "1", "--output", output],
            words,
        );
    };
    std::fs::create_dir(folder.path("directory")).unwrap();
    refuse(&folder.path("directory"), &["cannot write", "directory"]);
    refuse(&folder.path("missing/out"), &["cannot write", "missing"]);
    refuse(&folder.path("directory/.."), &["cannot write"]);
    refuse("", &["cannot write"]);
    refuse("/", &["cannot write"]);
    let file = folder.write("file", "kept");
    refuse(&format!("{file}/out"), &["cannot write"]);
    // A name that the system refuses, after the rotated tensors were written beside it.
    refuse(&folder.path(&"x".repeat(300)), &["cannot write"]);
    #[cfg(unix)]
    {
        refuse("/dev/null", &["cannot write", "not a file"]);
        assert!(!std::fs::metadata("/dev/null").unwrap().is_file());
    }
    assert_eq!(folder.names(), ["directory", "file"]);
    assert_eq!(std::fs::read_to_string(file).unwrap(), "kept");
}

/// A stdout that fails.
struct Broken(io::ErrorKind);

impl Write for Broken {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(self.0.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_reader_that_stops_is_no_error_but_a_full_disk_is() {
    let folder = Folder::new();
    let output = folder.path("out");
    for (kind, code) in [
        (io::ErrorKind::BrokenPipe, 0),
        (io::ErrorKind::StorageFull, 2),
    ] {
        let args = ["--device", "host", "--repeat", "1", "--output", &output];
        let mut stderr = vec![];
        let args = args.map(OsString::from);
        let ran = rotate::run(args, &mut Broken(kind), &mut stderr, None);
        assert_eq!(ran, code);
        assert_eq!(stderr.is_empty(), code == 0);
        // Either way the tensors are there.
        assert!(Path::new(&output).exists());
    }
}

// The binary.

/// The built example. `cargo test` builds all examples, `cargo test --test rotate_example` none,
/// so it may have to be built here; with the same features and profile.
fn binary() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let profile_folder = test.parent().and_then(Path::parent).unwrap();
    let binary = profile_folder.join("examples").join("rotate");
    let binary = binary.with_extension(std::env::consts::EXE_EXTENSION);
    if !binary.exists()
        && let Some(cargo) = std::env::var_os("CARGO")
    {
        let profile = match profile_folder.file_name().unwrap().to_str().unwrap() {
            "debug" => "dev",
            name => name,
        };
        let features = [
            ("cuda", cfg!(feature = "cuda")),
            // The example needs it.
            ("hf-config", true),
            ("rayon", cfg!(feature = "rayon")),
        ];
        let features = features
            .into_iter()
            .filter(|(_, on)| *on)
            .map(|(name, _)| name);
        let status = Command::new(cargo)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .args([
                "build",
                "--quiet",
                "--example",
                "rotate",
                "--profile",
                profile,
            ])
            .args(["--no-default-features", "--features"])
            .arg(features.collect::<Vec<_>>().join(","))
            .arg("--target-dir")
            .arg(profile_folder.parent().unwrap())
            .status();
        assert!(status.unwrap().success(), "the example does not build");
    }
    assert!(
        binary.exists(),
        "{} is not built: run `cargo build --example rotate` first",
        binary.display()
    );
    binary
}

#[test]
fn process_reports_and_exits() {
    let binary = binary();
    let output = Command::new(&binary)
        .args(["--repeat", "1"])
        .output()
        .unwrap();
    assert!(output.status.success());
    assert!(output.stderr.is_empty());
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(figures(&text, "half-split")[0] < 1e-5, "{text}");

    let output = Command::new(&binary).arg("--device").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(output.stdout.is_empty());
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(text, "rotate: --device needs a value; see --help\n");
}

#[test]
fn process_survives_a_closed_pipe() {
    for args in [&["--help"][..], &["--repeat", "1"]] {
        let mut process = Command::new(binary())
            .args(args)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(process.stdout.take());
        let output = process.wait_with_output().unwrap();
        assert!(output.status.success());
        assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
    }
}
