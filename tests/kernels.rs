//! The kernels' own PTX, executed on the host and held against the host backend bit for bit.
//!
//! The launch is the one that the driver would get: same kernel name, grid, block and parameter
//! bytes. Random cases print their seed; `PHASOR_TEST_SEED` repeats a run. `PHASOR_EXTRA_PTX` names
//! a folder of further PTX to hold to the same (`rope_f32.ptx` and so on, one file for each module).

#[path = "support/append_cases.rs"]
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod append_cases;
#[path = "support/append_checks.rs"]
mod append_checks;
#[path = "support/call_layout.rs"]
mod call_layout;
#[path = "support/fused_checks.rs"]
mod fused_checks;
#[path = "support/kernel_cases.rs"]
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod kernel_cases;
#[path = "support/ptx_backend.rs"]
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod ptx_backend;
#[path = "support/suite.rs"]
mod suite;

use append_cases::{AppendCase, AppendOutcome, AppendWish, Buffer, Goes, TestSlots, random_append};
use kernel_cases::{
    Case, Elements, Rng, TensorCase, TestPositions, Values, Wish, bytes, for_each_seed,
    random_case, random_elements,
};
use phasor::launch::{Family, Kernel, LaunchMode};
use phasor::{
    CacheLayout, CosSinTable, Dtype, Frequencies, IdType, InOut, Isa, KvCacheLayout, Layout,
    OutOfRange, Pairing, PositionKind, Problem, Rope,
};
use ptx_backend::{COMPUTE_75, COMPUTE_80, COMPUTE_90, Image, Run, modules, texts_of};
use std::collections::HashSet;
use std::sync::Mutex;
use suite::{Subject, checks};

fn check(image: &Image, case: &Case, seed: u64) -> Run {
    let expected = case.on_host(Isa::Scalar);
    match image.run(case) {
        Ok(run) => {
            assert_eq!(
                run.outcome,
                expected,
                "{}, seed {seed:#x}: {case:?}",
                image.name()
            );
            assert!(run.triggers, "{}, seed {seed:#x}", image.name());
            run
        }
        Err(fault) => panic!("{}, seed {seed:#x}: {fault}\n{case:?}", image.name()),
    }
}

#[test]
fn random_cases_equal_the_host_bit_for_bit() {
    let images = Image::all();
    for_each_seed(3000, |seed| {
        let case = random_case(&mut Rng(seed), Wish::default());
        for image in images {
            check(image, &case, seed);
        }
    });
}

#[test]
fn random_appends_equal_the_host_bit_for_bit() {
    let images = Image::all();
    let seen = Mutex::new(HashSet::new());
    for_each_seed(3000, |seed| {
        let case = random_append(&mut Rng(seed), AppendWish::default());
        let expected = case.on_host(Isa::Scalar).unwrap();
        for image in images {
            let run = case.on_image(image, false).unwrap_or_else(|fault| {
                panic!("{}, seed {seed:#x}: {fault}\n{case:?}", image.name())
            });
            assert!(
                run.outcome == expected,
                "{}, seed {seed:#x}: {case:?}",
                image.name()
            );
            assert!(run.triggers, "{}, seed {seed:#x}", image.name());
            seen.lock().unwrap().extend(run.kernel);
        }
    });
    let seen = seen.into_inner().unwrap();
    for kernel in Dtype::ALL
        .map(|dtype| Kernel::all(Family::Append, dtype))
        .concat()
    {
        assert!(seen.contains(&kernel), "no case has {}", kernel.name());
    }
}

/// A call that appends tokens of sequences of these lengths, and padding behind them.
struct Step {
    dtype: Dtype,
    pairing: Pairing,
    /// Tokens of each sequence, and how many it has before.
    sequences: Vec<(usize, i64)>,
    padding: usize,
    /// Heads and dims of q, k and v, the first rotated dim, and how many rotate.
    heads: [(usize, usize); 3],
    window: (usize, usize),
    cache: [CacheLayout; 2],
    /// Whether keys are written back too, and values elsewhere.
    back: bool,
}

impl Step {
    fn case(&self, slots: TestSlots) -> AppendCase {
        let mut rng = Rng(11);
        let tokens = self.sequences.iter().map(|(n, _)| n).sum::<usize>() + self.padding;
        let mut ends = vec![0];
        for (n, _) in &self.sequences {
            ends.push(ends[ends.len() - 1] + *n as i64);
        }
        let before: Vec<_> = self.sequences.iter().map(|&(_, before)| before).collect();
        let layouts = self
            .heads
            .map(|(heads, dim)| Layout::tokens(tokens, heads, dim));
        let [q, k] = [0, 1].map(|n| layouts[n].with_rotary_offset(self.window.0));
        let v = layouts[2];
        let [k_cache, v_cache] = self.cache;
        let problem = Problem::new(self.dtype)
            .q(q)
            .cache(KvCacheLayout::separate(k_cache, v_cache));
        let problem = match self.back {
            true => problem.k(k).v((v, v)),
            false => problem.k_to_cache(k).v_to_cache(v),
        };
        let mut buffer = |name, len: usize, written| Buffer {
            name,
            bytes: bytes(self.dtype, &random_elements(&mut rng, self.dtype, len)),
            misalign: 0,
            written,
        };
        let len = |layout: Layout| layout.required_len().unwrap();
        let goes = match self.back {
            true => [Goes::InPlace, Goes::InPlaceAndCache, Goes::OutAndCache],
            false => [Goes::InPlace, Goes::ToCache, Goes::ToCache],
        };
        AppendCase {
            rope: theta(self.window.1, self.pairing),
            problem,
            streams: [0, 1, 2].map(|n| Some(([q, k, v][n], goes[n]))),
            buffers: vec![
                buffer("q", len(q), true),
                buffer("k", len(k), self.back),
                buffer("v", len(v), false),
                buffer("k_cache", k_cache.required_len().unwrap(), true),
                buffer("v_cache", v_cache.required_len().unwrap(), true),
                buffer("v_out", len(v), true),
            ],
            tensors: [[0, 0], [1, 1], [2, 5]],
            caches: Some([3, 4]),
            positions: TestPositions::of(PositionKind::StartPerSequence, IdType::I64, &before),
            cu_seqlens: Some(Values::new(IdType::I32, &ends)),
            slots: Some(slots),
            operands: Default::default(),
            multiprocessors: 1,
            mode: LaunchMode::DependentPositionsSettled,
        }
    }
}

/// Three sequences, in pages of 4.
fn step(dtype: Dtype, pairing: Pairing) -> Step {
    let (k, v) = ((2, 32), (2, 24));
    let cache = |(heads, dim)| CacheLayout::paged_nhd(9, 4, heads, dim);
    Step {
        dtype,
        pairing,
        sequences: vec![(5, 3), (1, 9), (2, 0)],
        padding: 2,
        heads: [(6, 32), k, v],
        window: (8, 16),
        cache: [cache(k), cache(v)],
        back: false,
    }
}

fn page_table() -> TestSlots {
    // The columns of each sequence; those that are written are of its own.
    let table = [0, 1, 7, 5, 5, 2, 8, 7, 7];
    TestSlots::PageTable(
        Values::new(IdType::I32, &table),
        Values::new(IdType::I32, &[3, 9, 0]),
    )
}

/// Each byte that a token has is read once, and written once where it goes; slots, steps and sequences are
/// looked up once for all heads of a token.
#[test]
fn appends_move_every_byte_once() {
    for image in Image::all() {
        for dtype in Dtype::ALL {
            for (pairing, back, blocks) in [
                (Pairing::HalfSplit, false, false),
                (Pairing::Interleaved, true, false),
                (Pairing::HalfSplit, true, true),
            ] {
                let mut step = step(dtype, pairing);
                step.back = back;
                if blocks {
                    step.cache = [
                        CacheLayout::paged_packed(9, 4, 2, 32, 4),
                        CacheLayout::paged_packed(9, 4, 2, 24, 8),
                    ];
                }
                let case = step.case(page_table());
                let run = case.on_image(image, false).unwrap();
                assert_eq!(run.outcome, case.on_host(Isa::Scalar).unwrap());
                assert!(!run.outcome.reported && run.triggers);
                let size = dtype.size();
                let (real, all) = (8, 10);
                let counts =
                    |name: &str, wanted: &dyn Fn(usize, usize) -> (u32, u32), row: usize| {
                        for (at, &count) in run.counts[name].iter().enumerate() {
                            let element = at / size;
                            let expected = wanted(element / row, element % row);
                            assert_eq!(count, expected, "{name} byte {at}, {dtype}");
                        }
                    };
                let in_window = |dim: usize| (8..24).contains(&(dim % 32));
                // What is read of padding was on its way before that was known, where angles are formed last.
                let early = u32::from(run.stats.loads_before_wait > 0);
                let read = |token: usize| u32::from(token < real) | (1 - early);
                counts(
                    "q",
                    &|token, dim| match in_window(dim) {
                        true => (read(token), u32::from(token < real)),
                        false => (0, 0),
                    },
                    6 * 32,
                );
                counts(
                    "k",
                    &|token, dim| {
                        let written = back && token < real && in_window(dim);
                        (read(token), u32::from(written))
                    },
                    2 * 32,
                );
                counts("v", &|token, _| (read(token), 0), 2 * 24);
                let written = |token| (0, u32::from(back && token < real));
                counts("v_out", &|token, _| written(token), 2 * 24);
                for (name, dims) in [("k_cache", 64), ("v_cache", 48)] {
                    let of_cache = &run.counts[name];
                    assert!(
                        of_cache
                            .iter()
                            .all(|&(reads, writes)| reads == 0 && writes <= 1)
                    );
                    let written = of_cache.iter().filter(|&&(_, writes)| writes == 1).count();
                    assert_eq!(written, real * dims * size, "{name}");
                    // A vector at a time.
                    let traffic = run.stats.buffer(name).unwrap();
                    assert_eq!(
                        traffic.stores_of(4 * size) * 4 * size as u64,
                        traffic.stored_bytes()
                    );
                }
                // One block for each token, or one thread of it for each.
                let loads = |name: &str| run.stats.buffer(name).unwrap().loads.iter().sum::<u64>();
                assert_eq!(loads("steps"), real as u64 * 8);
                assert_eq!(loads("pages"), real as u64);
                assert_eq!(loads("lengths"), real as u64);
                // Two or three steps of the search, and the beginning.
                assert!(loads("cu_seqlens") <= all as u64 * 3);
            }
        }
    }
}

/// Ids that point anywhere store nothing outside of the caches, and read nothing outside of their tables: the
/// interpreter would stop. What the host accepts gives the same bits and the same report.
#[test]
fn no_slot_page_or_offset_leads_outside() {
    let hostile = [
        i64::MIN,
        i64::MIN + 1,
        -1,
        0,
        3,
        35,
        36,
        1 << 31,
        (1 << 32) - 1,
        1 << 32,
        (1 << 32) + 1,
        i64::MAX - 1,
        i64::MAX,
    ];
    let values = |ids: &[i64]| Values::new(IdType::I64, ids);
    let mut rng = Rng(5);
    for image in Image::all() {
        for mode in [LaunchMode::Ordinary, LaunchMode::DependentPositionsSettled] {
            for _ in 0..400 {
                let mut some = |n: usize| {
                    let ids: Vec<_> = (0..n).map(|_| rng.pick(&hostile)).collect();
                    values(&ids)
                };
                let slots = [
                    TestSlots::Mapping(some(10)),
                    TestSlots::PageTable(some(9), some(3)),
                    TestSlots::PageTable(some(9), values(&[3, 9, 0])),
                    TestSlots::PageIndices(some(4), some(5), some(3)),
                    TestSlots::PageIndices(values(&[0, 2, 5, 9]), some(9), values(&[3, 9, 0])),
                    TestSlots::PageIndices(some(4), some(9), values(&[3, 9, 0])),
                    TestSlots::Sequences(some(3)),
                ];
                let (offsets, sane) = (some(4), rng.chance(50));
                let slots = slots[rng.below(slots.len())].clone();
                let step = step(rng.pick(&Dtype::ALL), Pairing::HalfSplit);
                let mut case = step.case(slots);
                case.mode = mode;
                if !sane {
                    case.cu_seqlens = Some(offsets);
                }
                let run = case.on_image(image, true).unwrap_or_else(|fault| {
                    panic!(
                        "{}: {fault}\n{:?} {:?}",
                        image.name(),
                        case.slots,
                        case.cu_seqlens
                    )
                });
                assert!(run.triggers);
                match case.on_host(Isa::Scalar) {
                    Ok(expected) => {
                        assert_eq!(run.outcome.reported, expected.reported, "{:?}", case.slots);
                        // Where two tokens have one slot, one of them is stored.
                        for n in [0, 1, 2, 5] {
                            assert_eq!(run.outcome.buffers[n], expected.buffers[n]);
                        }
                    }
                    Err(error) => assert!(!sane, "{error}"),
                }
            }
        }
    }
}

/// Where several tokens have one slot, what is stored there is of them.
#[test]
fn tokens_of_one_slot_do_not_mix_with_others() {
    for image in Image::all() {
        let step = step(Dtype::F32, Pairing::HalfSplit);
        let slots = |slots: &[i64]| TestSlots::Mapping(Values::new(IdType::I32, slots));
        let all = step.case(slots(&[3, 9, 3, 3, 9, 20, 3, 9, -1, -1]));
        let got = all.on_image(image, true).unwrap().outcome;
        let alone: Vec<_> = (0..8)
            .map(|token| {
                let mut only = [-1; 10];
                only[token] = [3, 9, 3, 3, 9, 20, 3, 9][token];
                step.case(slots(&only)).on_host(Isa::Scalar).unwrap()
            })
            .collect();
        let before = step.case(slots(&[-1; 10])).on_host(Isa::Scalar).unwrap();
        for cache in [3, 4] {
            let words = |outcome: &AppendOutcome| -> Vec<[u8; 4]> {
                let words = outcome.buffers[cache].chunks_exact(4);
                words.map(|word| word.try_into().unwrap()).collect()
            };
            let (got, before) = (words(&got), words(&before));
            let alone: Vec<_> = alone.iter().map(words).collect();
            for (n, word) in got.iter().enumerate() {
                let stored: Vec<_> = alone
                    .iter()
                    .map(|of| of[n])
                    .filter(|of| *of != before[n])
                    .collect();
                match stored.is_empty() {
                    true => assert_eq!(*word, before[n]),
                    false => assert!(stored.contains(word), "word {n} of cache {cache}"),
                }
            }
        }
    }
}

/// Every kernel with every kind of position and every form of call, in launch shapes and with
/// addresses that the plan would not choose, and at angles whose last bit is known to matter.
#[test]
fn every_kernel_passes_its_checks() {
    let prebuilt = [
        ("compute_75", COMPUTE_75),
        ("compute_80", COMPUTE_80),
        ("compute_90", COMPUTE_90),
    ];
    let mut targets: Vec<_> = prebuilt
        .into_iter()
        .map(|(name, texts)| {
            let texts: Vec<_> = texts.concat().into_iter().map(str::to_owned).collect();
            (name.to_owned(), texts)
        })
        .collect();
    if let Ok(folder) = std::env::var("PHASOR_EXTRA_PTX") {
        targets.push((folder.clone(), texts_of(&folder)));
    }
    // Those with stages have tests of their own.
    let checked = modules()
        .enumerate()
        .filter(|(_, (family, _))| *family != Family::Fused);
    for (n, module) in checked {
        let subjects: Vec<_> = targets
            .iter()
            .map(|(name, texts)| (name, Subject::new(name, module, &texts[n]).unwrap()))
            .collect();
        let check_all = |kernels: &[Kernel]| {
            for &kernel in kernels {
                for check in checks(kernel) {
                    for (target, subject) in &subjects {
                        let passed = check.run(subject);
                        assert_eq!(
                            passed,
                            Ok(()),
                            "{target}, {}, {}",
                            kernel.name(),
                            check.name
                        );
                    }
                }
            }
        };
        let kernels = Kernel::all(module.0, module.1);
        std::thread::scope(|scope| {
            let (first, second) = kernels.split_at(kernels.len() / 2);
            scope.spawn(|| check_all(second));
            check_all(first);
        });
    }
}

#[test]
fn every_head_dim_equals_the_host_bit_for_bit() {
    let images = Image::all();
    for (n, head_dim) in (2..=512).step_by(2).enumerate() {
        let n = n as u64;
        let wish = Wish {
            head_dim: Some(head_dim),
            aligned: Some(head_dim % 16 == 0),
            ..Wish::default()
        };
        let case = random_case(&mut Rng(n), wish);
        check(&images[n as usize % images.len()], &case, n);
    }
}

fn plain_case(dtype: Dtype, rope: Rope, q: InOut<Layout>, k: InOut<Layout>) -> Case {
    let mut rng = Rng(7);
    let mut tensor = |layout: InOut<Layout>| {
        let mut elements = |layout: Layout| -> Elements {
            random_elements(&mut rng, dtype, layout.required_len().unwrap())
        };
        let (source, destination) = match layout {
            InOut::InPlace(layout) => (elements(layout), None),
            InOut::OutOfPlace {
                source,
                destination,
            } => (elements(source), Some(elements(destination))),
        };
        TensorCase {
            layout,
            source,
            destination,
            misalign: 0,
        }
    };
    Case {
        dtype,
        rope,
        q: Some(tensor(q)),
        k: Some(tensor(k)),
        one_buffer: None,
        positions: TestPositions::of(
            PositionKind::PerToken,
            IdType::I32,
            &(0..q_tokens(q)).map(|t| t as i64 * 3).collect::<Vec<_>>(),
        ),
        multiprocessors: 1,
        mode: LaunchMode::DependentPositionsSettled,
    }
}

fn q_tokens(layout: InOut<Layout>) -> usize {
    let (InOut::InPlace(layout)
    | InOut::OutOfPlace {
        destination: layout,
        ..
    }) = layout;
    layout.shape()[0] * layout.shape()[1]
}

fn theta(rotary_dim: usize, pairing: Pairing) -> Rope {
    Rope::new(Frequencies::from_theta(1e4, rotary_dim).unwrap(), pairing)
}

/// In place, exactly the rotated dims are read once and written once, a vector at a time.
#[test]
fn in_place_touches_only_rotated_dims_and_each_once() {
    for image in Image::all() {
        for dtype in Dtype::ALL {
            for pairing in [Pairing::HalfSplit, Pairing::Interleaved] {
                let (head_dim, offset, rotary_dim) = (96, 16, 64);
                let q = Layout::tokens(7, 12, head_dim).with_rotary_offset(offset);
                let k = Layout::tokens(7, 4, head_dim).with_rotary_offset(offset);
                let case = plain_case(dtype, theta(rotary_dim, pairing), q.into(), k.into());
                let run = check(image, &case, 0);
                let size = dtype.size();
                for (name, heads) in [("q", 12), ("k", 4)] {
                    let traffic = run.stats.buffer(name).unwrap();
                    let vectors = (7 * heads * rotary_dim / 4) as u64;
                    let mut moved = [0; 5];
                    moved[(4 * size).trailing_zeros() as usize] = vectors;
                    assert_eq!(traffic.loads, moved, "{name} {dtype}");
                    assert_eq!(traffic.stores, moved, "{name} {dtype}");
                    for (at, &(reads, writes)) in run.counts[name].iter().enumerate() {
                        let dim = at / size % head_dim;
                        let rotates = u32::from((offset..offset + rotary_dim).contains(&dim));
                        assert_eq!((reads, writes), (rotates, rotates), "{name} byte {at}");
                    }
                }
                // Angles once for all heads of a token.
                assert!(run.stats.buffer("ids").unwrap().loaded_bytes() > 0);
                let steps = (7 * rotary_dim / 2) as u64;
                assert_eq!(
                    run.stats.buffer("steps").unwrap().loads,
                    [0, 0, 0, steps, 0]
                );
                assert_eq!(run.stats.buffer("steps").unwrap().stored_bytes(), 0);
            }
        }
    }
}

/// Out of place, every byte of every head is read once and written once.
#[test]
fn out_of_place_moves_every_byte_once() {
    for image in Image::all() {
        for dtype in Dtype::ALL {
            for (head_dim, offset, rotary_dim, wide) in
                [(96, 16, 64, true), (128, 0, 128, true), (18, 4, 10, false)]
            {
                let q = Layout::tokens(5, 9, head_dim).with_rotary_offset(offset);
                let k = Layout::tokens(5, 2, head_dim).with_rotary_offset(offset);
                let rope = theta(rotary_dim, Pairing::HalfSplit);
                let case = plain_case(dtype, rope, (q, q).into(), (k, k).into());
                let run = check(image, &case, 0);
                for (name, written) in [("q", "q_out"), ("k", "k_out")] {
                    assert!(run.counts[name].iter().all(|&c| c == (1, 0)), "{name}");
                    assert!(
                        run.counts[written].iter().all(|&c| c == (0, 1)),
                        "{written}"
                    );
                }
                let width = if wide { 4 } else { 1 } * dtype.size();
                let written = run.stats.buffer("q_out").unwrap();
                assert_eq!(
                    written.stores_of(width) * width as u64,
                    written.stored_bytes()
                );
            }
        }
    }
}

/// A position outside the table reads no byte outside it: the interpreter would fault.
#[test]
fn no_position_reads_outside_the_table() {
    let positions = [i64::MIN, -1, 0, 2, 3, 4, i64::from(i32::MAX), i64::MAX];
    for image in Image::all() {
        for choice in [OutOfRange::Clamp, OutOfRange::PassThrough] {
            for rotary_dim in [32, 6] {
                let table = CosSinTable::new(
                    vec![0.25; 3 * rotary_dim / 2],
                    vec![0.5; 3 * rotary_dim / 2],
                    rotary_dim / 2,
                );
                let table = table.unwrap().with_out_of_range(choice);
                let rope = Rope::new(table, Pairing::Interleaved);
                let layout = Layout::tokens(positions.len(), 2, rotary_dim);
                let mut case = plain_case(Dtype::F16, rope, layout.into(), (layout, layout).into());
                case.positions = TestPositions::of(PositionKind::PerToken, IdType::I64, &positions);
                check(image, &case, 0);
            }
        }
    }
}

/// Byte offsets past 2^32, and element offsets past 2^32, in a buffer of which only the touched
/// pages exist.
#[test]
fn tensors_past_two_to_the_32_elements_are_addressed_right() {
    for image in Image::all() {
        for dtype in Dtype::ALL {
            let far = (1 << 33) + 64;
            let near = Layout::bshd(2, 3, 2, 64);
            let spread = near
                .with_strides(3 * far, far, 1 << 20)
                .with_offset(1 << 32);
            let rope = theta(64, Pairing::HalfSplit);
            let case = plain_case(dtype, rope, near.into(), near.into());
            let expected = case.on_host(Isa::Scalar);
            let got = image.run_spread(&case, spread, spread).unwrap();
            assert_eq!(got, expected, "{} {dtype}", image.name());
        }
    }
}

/// The device compiler lays the structs of a call out as the bindings do.
#[test]
fn call_layout_agrees_with_the_bindings() {
    let expected = call_layout::host_layout();
    // Eight structs and their fields: the list is not empty by a mistake in reading it.
    assert!(expected.len() > 50, "{expected:?}");
    for image in ptx_backend::layout_images() {
        assert_eq!(ptx_backend::device_layout(image, expected.len()), expected);
    }
}
