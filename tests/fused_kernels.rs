//! The fused kernels' own PTX, executed on the host and held against the host backend bit for bit, as
//! tests/kernels.rs does for the others.

#[path = "support/append_cases.rs"]
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod append_cases;
#[path = "support/kernel_cases.rs"]
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod kernel_cases;
#[path = "support/ptx_backend.rs"]
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod ptx_backend;

use append_cases::{
    AppendCase, AppendRun, AppendWish, Buffer, Goes, Operands, TestSlots, random_append,
};
use kernel_cases::{Rng, TestPositions, Values, bytes, for_each_seed, random_elements};
use phasor::launch::{Family, LaunchMode};
use phasor::norm::HeadNorm;
use phasor::quantize::{Codes, ScaleForm, ScaleRounding};
use phasor::{
    CacheLayout, Dtype, Error, Frequencies, IdType, Isa, KvCacheLayout, Layout, Pairing,
    PositionKind, Problem, Rope, ScaleLayout, Stages, StoredCodes, TensorName,
};
use ptx_backend::Image;
use ptx_interpreter::Traffic;
use std::collections::HashMap;
use std::sync::Mutex;

/// What the host makes of a case, and every image too.
fn check<'a>(
    images: impl IntoIterator<Item = &'a Image>,
    case: &AppendCase,
    label: &str,
) -> Vec<AppendRun> {
    let expected = case.on_host(Isa::Scalar).unwrap();
    let run_on = |image: &Image| {
        let run = case
            .on_image(image, false)
            .unwrap_or_else(|fault| panic!("{}, {label}: {fault}\n{case:?}", image.name()));
        for (n, buffer) in case.buffers.iter().enumerate() {
            assert!(
                run.outcome.buffers[n] == expected.buffers[n],
                "{}, {label}, {}: {case:?}",
                image.name(),
                buffer.name
            );
        }
        assert_eq!(run.outcome.reported, expected.reported, "{label}");
        assert!(run.triggers, "{}, {label}", image.name());
        // Values stay in registers.
        assert_eq!(run.stats.local, Traffic::default(), "{label}");
        run
    };
    images.into_iter().map(run_on).collect()
}

#[test]
fn random_stages_equal_the_host_bit_for_bit() {
    let images = Image::all();
    let seen = Mutex::new(HashMap::<String, usize>::new());
    for_each_seed(600, |seed| {
        let mut rng = Rng(seed);
        let mut wish = AppendWish {
            staged: true,
            ..AppendWish::default()
        };
        if rng.chance(60) {
            wish.whole = Some(rng.pick(&[64, 64, 128, 256]));
            wish.aligned = Some(true);
        }
        let case = random_append(&mut rng, wish);
        for run in check(images, &case, &format!("seed {seed:#x}")) {
            if let Some(kernel) = run.kernel {
                *seen.lock().unwrap().entry(kernel.name()).or_insert(0) += 1;
            }
        }
    });
    // Each kernel has had its share.
    let seen = seen.into_inner().unwrap();
    for kernel in Dtype::ALL
        .map(|dtype| phasor::launch::Kernel::all(Family::Fused, dtype))
        .concat()
    {
        let times = seen.get(&kernel.name()).copied().unwrap_or(0);
        assert!(times >= 20, "{}: {times}", kernel.name());
    }
}

/// A step of three sequences from packed q, k and v: q in place, k elsewhere and to its cache, v to its cache.
struct Step {
    dtype: Dtype,
    pairing: Pairing,
    /// Heads of q, and of k and v.
    heads: [usize; 2],
    head_dim: usize,
    /// The first rotated dim, and how many rotate.
    window: (usize, usize),
    stages: [Stages; 3],
    /// Whether weights are those of each head.
    weights_per_head: bool,
    codes: Option<StoredCodes>,
    layout: fn(usize, usize, usize, usize) -> CacheLayout,
    multiprocessors: u32,
    mode: LaunchMode,
}

const NORM: HeadNorm = HeadNorm::rms(1e-6);

impl Step {
    /// Heads of 128 that rotate as a whole, and Qwen3's norm.
    fn new(dtype: Dtype) -> Step {
        let stages = Stages::new().norm(NORM.round_before_weight().round_after());
        Step {
            dtype,
            pairing: Pairing::HalfSplit,
            heads: [6, 2],
            head_dim: 128,
            window: (0, 128),
            stages: [stages, stages, Stages::new()],
            weights_per_head: false,
            codes: None,
            layout: CacheLayout::paged_nhd,
            multiprocessors: 1,
            mode: LaunchMode::DependentPositionsSettled,
        }
    }

    fn head_dim(mut self, head_dim: usize, window: (usize, usize)) -> Step {
        (self.head_dim, self.window) = (head_dim, window);
        self
    }

    fn all_stages(mut self, stages: Stages) -> Step {
        self.stages = [stages, stages, stages];
        self
    }

    fn case(&self, slots: TestSlots) -> AppendCase {
        let mut rng = Rng(3);
        let dim = self.head_dim;
        let [q_heads, kv_heads] = self.heads;
        let all_heads = q_heads + 2 * kv_heads;
        let tokens = 10;
        let window = |first: usize, heads: usize| {
            Layout::packed_heads(1, tokens, all_heads, dim, first..first + heads)
        };
        let [q, k] = [window(0, q_heads), window(q_heads, kv_heads)]
            .map(|layout| layout.with_rotary_offset(self.window.0));
        let v = window(q_heads + kv_heads, kv_heads);
        let elsewhere = Layout::tokens(tokens, kv_heads, dim).with_rotary_offset(self.window.0);
        let cache = (self.layout)(9, 4, kv_heads, dim);
        let mut caches = KvCacheLayout::separate(cache, cache);
        if let Some(codes) = self.codes {
            caches = caches.with_codes(codes);
        }
        let problem = Problem::new(self.dtype)
            .q(q)
            .k((k, elsewhere))
            .v_to_cache(v)
            .packed()
            .longer_buffers()
            .q_stages(self.stages[0])
            .k_stages(self.stages[1])
            .v_stages(self.stages[2])
            .cache(caches);
        let mut elements =
            |len: usize| bytes(self.dtype, &random_elements(&mut rng, self.dtype, len));
        let buffer = |name, bytes: Vec<u8>, written| Buffer {
            name,
            bytes,
            misalign: 0,
            written,
        };
        let size = match self.codes {
            Some(_) => 1,
            None => self.dtype.size(),
        };
        let cache_bytes = cache.required_len().unwrap() * size;
        let groups = 4;
        let scales = 9 * 4 * kv_heads * groups;
        let buffers = vec![
            buffer("packed", elements(tokens * all_heads * dim), true),
            buffer("k_out", elements(tokens * kv_heads * dim), true),
            buffer("k_cache", vec![0xee; cache_bytes], true),
            buffer("v_cache", vec![0xee; cache_bytes], true),
            buffer("k_scales", vec![0xdd; 4 * scales], true),
            buffer("v_scales", vec![0xdd; 4 * scales], true),
        ];
        let operands = [0, 1, 2].map(|at| {
            let heads = self.heads[at.min(1)];
            let mut vector = |len: usize| Some((elements(len), len));
            let has = |what: &str| format!("{:?}", self.stages[at]).contains(what);
            let norms = has("HeadNorm");
            let weights = if self.weights_per_head {
                heads * dim
            } else {
                dim
            };
            let given = self
                .codes
                .filter(|codes| format!("{codes:?}").contains("dynamic: None"));
            Operands {
                bias: if has("bias: true") {
                    vector(heads * dim)
                } else {
                    None
                },
                norm_weight: if norms { vector(weights) } else { None },
                norm_bias: if norms && has("Layer") {
                    vector(weights)
                } else {
                    None
                },
                given_scales: given.filter(|_| at > 0).map(|_| {
                    let scales = [0.037f32, 0.05, 0.01, 1.0, 2.0, 3.0];
                    let scales = &scales[..heads];
                    (scales.iter().flat_map(|x| x.to_le_bytes()).collect(), heads)
                }),
                written_scales: self
                    .codes
                    .filter(|_| given.is_none() && at > 0)
                    .map(|_| (3 + at, scales)),
            }
        });
        AppendCase {
            rope: Rope::new(
                Frequencies::from_theta(1e4, self.window.1).unwrap(),
                self.pairing,
            ),
            problem,
            streams: [
                Some((q, Goes::InPlace)),
                Some((k, Goes::OutAndCache)),
                Some((v, Goes::ToCache)),
            ],
            buffers,
            tensors: [[0, 0], [0, 1], [0, 0]],
            caches: Some([2, 3]),
            positions: TestPositions::of(
                PositionKind::PerToken,
                IdType::I64,
                &[0, 7, 131_072, -3, 20_000, 1, 2, 3, 8_191, 5],
            ),
            cu_seqlens: Some(Values::new(IdType::I32, &[0, 5, 6, 8])),
            slots: Some(slots),
            operands,
            multiprocessors: self.multiprocessors,
            mode: self.mode,
        }
    }

    /// The same without values and caches, from a position on: nothing tells what tokens are.
    fn without_ids(&self) -> AppendCase {
        let case = self.case(mapping());
        let without_scales = |operands: Operands| Operands {
            given_scales: None,
            ..operands
        };
        let [q, k, _] = case.streams;
        let (q, k) = (q.unwrap().0, k.unwrap().0);
        let problem = Problem::new(self.dtype)
            .q(q)
            .k(k)
            .one_buffer()
            .longer_buffers()
            .q_stages(self.stages[0])
            .k_stages(self.stages[1]);
        AppendCase {
            problem,
            streams: [Some((q, Goes::InPlace)), Some((k, Goes::InPlace)), None],
            tensors: [[0, 0]; 3],
            caches: None,
            positions: TestPositions::from(PositionKind::Start, 131_072),
            cu_seqlens: None,
            slots: None,
            operands: case.operands.map(without_scales),
            ..case
        }
    }
}

/// Slots of 9 pages of 4; one token has none, and the last two are padding.
fn mapping() -> TestSlots {
    TestSlots::Mapping(Values::new(
        IdType::I32,
        &[5, 0, -1, 11, 2, 35, 9, 22, 1, 3],
    ))
}

/// The stages of models, and heads of odd and of many dims.
#[test]
fn models_stages_equal_the_host() {
    let images = Image::all();
    for dtype in Dtype::ALL {
        let step = || Step::new(dtype);
        let layer = HeadNorm::layer(1e-5);
        let dynamic = |groups| {
            StoredCodes::dynamic(Codes::E4m3, 1e-6, ScaleLayout::tokens_heads(4, 2, groups))
        };
        let cases = [
            ("Qwen3", Some(Pairing::HalfSplit), step()),
            (
                "Gemma 3",
                Some(Pairing::HalfSplit),
                step()
                    .head_dim(256, (0, 256))
                    .all_stages(Stages::new().norm(NORM.with_weight_offset(1.0))),
            ),
            (
                "Llama 4",
                Some(Pairing::Interleaved),
                Step {
                    pairing: Pairing::Interleaved,
                    ..step().all_stages(Stages::new().norm_after_rotation(NORM))
                },
            ),
            (
                "Llama 4 without rotation",
                Some(Pairing::HalfSplit),
                step().all_stages(Stages::new().without_rotation().temperature(0.1, 8192)),
            ),
            (
                "OLMo 2",
                None,
                Step {
                    weights_per_head: true,
                    ..step().all_stages(Stages::new().norm(NORM.across_heads()))
                },
            ),
            (
                "all heads after the rotation",
                None,
                Step {
                    heads: [37, 3],
                    ..step()
                        .head_dim(16, (2, 8))
                        .all_stages(Stages::new().norm_after_rotation(layer.across_heads()))
                },
            ),
            (
                "Cohere",
                Some(Pairing::Interleaved),
                Step {
                    pairing: Pairing::Interleaved,
                    weights_per_head: true,
                    ..step().all_stages(Stages::new().norm(layer))
                },
            ),
            (
                "StableLM",
                None,
                step()
                    .head_dim(80, (0, 20))
                    .all_stages(Stages::new().norm(layer)),
            ),
            (
                "GLM-4-MoE",
                None,
                step()
                    .head_dim(128, (0, 64))
                    .all_stages(Stages::new().bias().norm(NORM)),
            ),
            ("192", None, step().head_dim(192, (128, 64))),
            ("96", None, step().head_dim(96, (0, 96))),
            ("2", None, step().head_dim(2, (0, 2))),
            ("6", None, step().head_dim(6, (2, 2))),
            ("514", None, step().head_dim(514, (2, 510))),
            ("1024", None, step().head_dim(1024, (0, 1024))),
            ("1026", None, step().head_dim(1026, (0, 1024))),
            (
                "groups",
                None,
                Step {
                    codes: Some(
                        dynamic(4)
                            .groups_of(128)
                            .rounded(ScaleRounding::PowerOfTwoUp)
                            .e8m0(),
                    ),
                    ..step().head_dim(512, (0, 64))
                },
            ),
            (
                "codes of heads",
                Some(Pairing::HalfSplit),
                Step {
                    codes: Some(dynamic(1)),
                    ..step()
                        .head_dim(64, (0, 64))
                        .all_stages(Stages::new().bias().norm(layer).scale(0.125))
                },
            ),
            (
                "x-packed codes",
                Some(Pairing::Interleaved),
                Step {
                    pairing: Pairing::Interleaved,
                    codes: Some(StoredCodes::given(Codes::Int8, ScaleForm::Multiply).round_first()),
                    layout: |pages, size, heads, dim| {
                        CacheLayout::paged_packed(pages, size, heads, dim, 16)
                    },
                    ..step()
                },
            ),
        ];
        for (name, pairing, step) in cases {
            // Heads of many dims take their time.
            if step.head_dim > 256 && dtype != Dtype::F16 {
                continue;
            }
            for run in check(images, &step.case(mapping()), name) {
                let kernel = run.kernel.unwrap();
                assert_eq!(
                    (kernel.family, kernel.pairing),
                    (Family::Fused, pairing),
                    "{name}"
                );
            }
        }
    }
}

/// Each byte of a token is read once, and written once where it goes, with every stage on.
#[test]
fn stages_move_every_byte_once() {
    let images = Image::all();
    for dtype in Dtype::ALL {
        let layer = HeadNorm::layer(1e-5).round_before_weight().round_after();
        let every = Stages::new()
            .bias()
            .norm(layer)
            .scale(0.125)
            .temperature(0.1, 3);
        for (dim, rotary_dim, across) in [
            (128, 128, false),
            (64, 64, false),
            (80, 20, false),
            (128, 128, true),
        ] {
            let stages = match across {
                true => Stages::new().bias().norm(layer.across_heads()).scale(0.125),
                false => every,
            };
            for coded in [false, true] {
                let mut step = Step::new(dtype)
                    .head_dim(dim, (0, rotary_dim))
                    .all_stages(stages);
                if coded {
                    let scales = ScaleLayout::tokens_heads(4, 2, 1);
                    step.codes = Some(StoredCodes::dynamic(Codes::E4m3, 1e-6, scales));
                }
                let case = step.case(mapping());
                for run in check(images, &case, "traffic") {
                    let (size, [q_heads, kv_heads]) = (dtype.size(), step.heads);
                    let row = (q_heads + 2 * kv_heads) * dim * size;
                    // What is read of padding was on its way before that was known, where vectors are loaded
                    // first; and what is then found to have no slot.
                    let vectors = run.kernel.unwrap().pairing.is_some();
                    let early = vectors && run.stats.loads_before_wait == 0;
                    for (at, &(reads, writes)) in run.counts["packed"].iter().enumerate() {
                        let (token, byte) = (at / row, at % row);
                        let is_q = byte < q_heads * dim * size;
                        let real = u32::from(token < 8);
                        assert!(
                            reads == real || early && reads == 1,
                            "token {token}, byte {byte}: {reads}"
                        );
                        assert_eq!(
                            writes,
                            if is_q { real } else { 0 },
                            "token {token}, byte {byte}"
                        );
                    }
                    for (at, &count) in run.counts["k_out"].iter().enumerate() {
                        let token = at / (kv_heads * dim * size);
                        assert_eq!(count, (0, u32::from(token < 8)));
                    }
                    // One of 8 tokens has no slot.
                    let stored = 7 * kv_heads;
                    let bytes = stored * dim * if coded { 1 } else { size };
                    for (name, bytes) in [
                        ("k_cache", bytes),
                        ("v_cache", bytes),
                        ("k_scales", if coded { 4 * stored } else { 0 }),
                        ("v_scales", if coded { 4 * stored } else { 0 }),
                    ] {
                        let counts = &run.counts[name];
                        assert!(
                            counts
                                .iter()
                                .all(|&(reads, writes)| reads == 0 && writes <= 1)
                        );
                        let written = counts.iter().filter(|&&(_, writes)| writes == 1).count();
                        assert_eq!(written, bytes, "{name}");
                    }
                }
            }
        }
    }
}

/// What stages need is read before the wait where it is promised to be settled, and only there; by kernels of
/// any heads it is asked for then. (What the promise does not cover may not even be read: the interpreter
/// would stop.)
#[test]
fn weights_and_scales_are_read_before_the_wait_where_that_is_promised() {
    let images: Vec<_> = Image::all()
        .iter()
        .filter(|image| image.dependent())
        .collect();
    assert!(!images.is_empty());
    let images = || images.iter().copied();
    let vectors = ["bias", "norm weight", "norm bias"];
    let all = ["bias", "norm weight", "norm bias", "given scales"];
    let of = |run: &AppendRun, name: &str| {
        let named = run.stats.buffers.iter().filter(|(n, _)| n == name);
        let traffic: Vec<_> = named.map(|(_, traffic)| *traffic).collect();
        let sum = |of: fn(&Traffic) -> u64| traffic.iter().map(of).sum::<u64>();
        let loads = sum(|t| t.loads.iter().sum());
        assert!(loads > 0, "{name}");
        (
            loads,
            sum(|t| t.loads_before_wait),
            (sum(|t| t.prefetches), sum(|t| t.prefetches_before_wait)),
        )
    };
    for (dtype, per_head, window) in [
        (Dtype::F32, false, (128, 128)),
        (Dtype::F16, true, (64, 64)),
        (Dtype::Bf16, false, (128, 128)),
        (Dtype::Bf16, true, (80, 20)),
    ] {
        let step = |mode, multiprocessors| Step {
            weights_per_head: per_head,
            codes: Some(StoredCodes::given(Codes::E4m3, ScaleForm::Divide)),
            mode,
            multiprocessors,
            ..Step::new(dtype)
                .head_dim(window.0, (0, window.1))
                .all_stages(Stages::new().bias().norm(HeadNorm::layer(1e-5)))
        };
        let by_vectors = window.0 == window.1;
        // Few tokens, so that a thread serves one head; and one that serves several.
        for multiprocessors in [132, 1] {
            let settled = step(LaunchMode::DependentPositionsSettled, multiprocessors);
            for run in check(images(), &settled.case(mapping()), "settled") {
                assert_eq!(run.kernel.unwrap().pairing.is_some(), by_vectors);
                for name in all {
                    let (loads, early, prefetches) = of(&run, name);
                    match (by_vectors, multiprocessors) {
                        // The first heads are those of queries, which have no codes.
                        (true, 1) => assert!(early > 0 || name == "given scales", "{name}"),
                        (true, _) => assert_eq!(early, loads, "{name}"),
                        (false, _) => assert_eq!(early, 0, "{name}"),
                    }
                    assert_eq!(prefetches.0 > 0, !by_vectors, "{name}");
                    assert_eq!(prefetches.0, prefetches.1, "{name}");
                }
            }
            // With positions in memory all is behind the wait; with those from a start but angles.
            for mode in [LaunchMode::Ordinary, LaunchMode::Dependent] {
                let step = step(mode, multiprocessors);
                let ids = check(images(), &step.case(mapping()), "not settled");
                let start = check(images(), &step.without_ids(), "from a start");
                for (runs, names, angles) in [
                    (ids, &all[..], false),
                    (start, &vectors[..], mode == LaunchMode::Dependent),
                ] {
                    for run in runs {
                        assert_eq!(run.stats.loads_before_wait > 0, angles, "{mode:?}");
                        assert!(names.iter().all(|name| of(&run, name).1 == 0), "{mode:?}");
                    }
                }
            }
        }
    }
}

/// Slots that point anywhere store neither codes nor scales outside of the caches: the interpreter would
/// stop.
#[test]
fn no_slot_leads_outside() {
    let hostile = [i64::MIN, -1, 0, 3, 35, 36, 1 << 31, (1 << 32) + 1, i64::MAX];
    let mut rng = Rng(5);
    let scales = ScaleLayout::tokens_heads(4, 2, 1);
    for image in Image::all() {
        for _ in 0..60 {
            let slots: Vec<_> = (0..10).map(|_| rng.pick(&hostile)).collect();
            let mut step = Step::new(rng.pick(&Dtype::ALL));
            if rng.chance(50) {
                step = step.head_dim(80, (0, 20));
            }
            if rng.chance(70) {
                step.codes = Some(StoredCodes::dynamic(Codes::E4m3, 1e-6, scales));
            }
            let slots = TestSlots::Mapping(Values::new(IdType::I64, &slots));
            let mut case = step.case(slots);
            case.mode = rng.pick(&[LaunchMode::Ordinary, LaunchMode::DependentPositionsSettled]);
            let run = case
                .on_image(image, true)
                .unwrap_or_else(|fault| panic!("{}: {fault}\n{:?}", image.name(), case.slots));
            let expected = case.on_host(Isa::Scalar).unwrap();
            assert_eq!(run.outcome.reported, expected.reported, "{:?}", case.slots);
            // Where two tokens have one slot, one of them is stored.
            for n in [0, 1] {
                assert_eq!(run.outcome.buffers[n], expected.buffers[n]);
            }
        }
    }
}

/// Heads that do not fit in a block are refused, and so are scales where no f32 can be.
#[test]
fn what_kernels_cannot_do_is_refused() {
    let call = |case: &AppendCase| case.call_at(&[1 << 20; 6]).map(|_| ());
    let wide = Step::new(Dtype::F32).head_dim(8192, (0, 64));
    assert!(matches!(
        call(&wide.case(mapping())),
        Err(Error::StagesTooLarge {
            tensor: TensorName::Q,
            most: 49_152,
            ..
        })
    ));
    let mut across = Step::new(Dtype::F32).all_stages(Stages::new().norm(NORM.across_heads()));
    across.heads = [200, 2];
    assert!(matches!(
        call(&across.case(mapping())),
        Err(Error::StagesTooLarge { .. })
    ));
    across.heads = [64, 2];
    assert_eq!(call(&across.case(mapping())), Ok(()));
    let scales = ScaleLayout::tokens_heads(4, 2, 1);
    let mut coded = Step::new(Dtype::F32);
    coded.codes = Some(StoredCodes::dynamic(Codes::E4m3, 1e-6, scales));
    let at = [1 << 20, 1 << 20, 1 << 20, 1 << 20, (1 << 20) + 2, 1 << 20];
    assert_eq!(
        coded.case(mapping()).call_at(&at).map(|_| ()),
        Err(Error::BufferUnaligned {
            what: "a scale",
            align: 4
        })
    );
}
