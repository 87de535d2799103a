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

use append_cases::{AppendWish, random_append};
use kernel_cases::Rng;
use phasor::Isa;
use ptx_backend::Image;
use std::sync::atomic::{AtomicU64, Ordering};

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
fn random_stages_equal_the_host_bit_for_bit() {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    const CASES: u64 = 600;
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
                    let expected = case.on_host(Isa::Scalar).unwrap();
                    for image in &images {
                        let run = case.on_image(image, false).unwrap_or_else(|fault| {
                            panic!("{}, seed {seed:#x}: {fault}\n{case:?}", image.name())
                        });
                        for (n, buffer) in case.buffers.iter().enumerate() {
                            assert!(
                                run.outcome.buffers[n] == expected.buffers[n],
                                "{}, seed {seed:#x}, {}: {case:?}",
                                image.name(),
                                buffer.name
                            );
                        }
                        assert_eq!(run.outcome.reported, expected.reported, "seed {seed:#x}");
                        assert!(run.triggers, "{}, seed {seed:#x}", image.name());
                    }
                }
            });
        }
    });
}
