//! The kernels' own PTX, executed on the host and held against the host backend bit for bit.
//!
//! The launch is the one that the driver would get: same kernel name, grid, block and parameter
//! bytes. Random cases print their seed; `PHASOR_TEST_SEED` repeats a run. `PHASOR_EXTRA_PTX` names
//! a folder of further PTX to hold to the same (`rope_f32.ptx`, `rope_f16.ptx`, `rope_bf16.ptx`).

#[path = "support/append_cases.rs"]
mod append_cases;
#[path = "support/call_layout.rs"]
mod call_layout;
#[path = "support/kernel_cases.rs"]
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod kernel_cases;
#[path = "support/ptx_backend.rs"]
mod ptx_backend;
#[path = "support/suite.rs"]
mod suite;

use append_cases::{AppendWish, random_append};
use kernel_cases::{
    Case, Elements, Rng, TensorCase, TestPositions, Wish, random_case, random_elements,
};
use phasor::launch::{Kernel, LaunchMode};
use phasor::{
    CosSinTable, Dtype, Frequencies, IdType, InOut, Isa, Layout, OutOfRange, Pairing, PositionKind,
    Rope,
};
use ptx_backend::{COMPUTE_75, COMPUTE_80, COMPUTE_90, Image, Run, modules, texts_of};
use std::sync::atomic::{AtomicU64, Ordering};
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

/// A new seed each run, or the one asked for.
fn seed() -> u64 {
    match std::env::var("PHASOR_TEST_SEED") {
        Ok(seed) => {
            let digits = seed.trim_start_matches("0x");
            u64::from_str_radix(digits, 16).expect("PHASOR_TEST_SEED is hexadecimal")
        }
        Err(_) => std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap()
            .as_nanos() as u64,
    }
}

#[test]
fn random_cases_equal_the_host_bit_for_bit() {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    const CASES: u64 = 3000;
    let first = seed();
    println!("PHASOR_TEST_SEED={first:#x}");
    let images = Image::all();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let n = NEXT.fetch_add(1, Ordering::Relaxed);
                    if n >= CASES {
                        break;
                    }
                    let seed = first.wrapping_add(n);
                    let case = random_case(&mut Rng(seed), Wish::default());
                    for image in &images {
                        check(image, &case, seed);
                    }
                }
            });
        }
    });
}

#[test]
fn random_appends_equal_the_host_bit_for_bit() {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    const CASES: u64 = 3000;
    let first = seed();
    println!("PHASOR_TEST_SEED={first:#x}");
    let images = Image::all();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let n = NEXT.fetch_add(1, Ordering::Relaxed);
                    if n >= CASES {
                        break;
                    }
                    let seed = first.wrapping_add(n);
                    let case = random_append(&mut Rng(seed), AppendWish::default());
                    let expected = case.on_host(Isa::Scalar).unwrap();
                    for image in &images {
                        let run = case.on_image(image, false).unwrap_or_else(|fault| {
                            panic!("{}, seed {seed:#x}: {fault}\n{case:?}", image.name())
                        });
                        assert!(
                            run.outcome == expected,
                            "{}, seed {seed:#x}: {case:?}",
                            image.name()
                        );
                        assert!(run.triggers, "{}, seed {seed:#x}", image.name());
                    }
                }
            });
        }
    });
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
    for (n, module) in modules().enumerate().take(3) {
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
                let run = check(&image, &case, 0);
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
                let run = check(&image, &case, 0);
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
                check(&image, &case, 0);
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
