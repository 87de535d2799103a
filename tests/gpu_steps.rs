//! Random calls that append and that perform stages, on a real GPU: they leave the host's bits in every buffer,
//! and touch nothing else. As in `tests/gpu.rs`, which has the rest, without a GPU every test passes.

#[path = "support/append_cases.rs"]
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod append_cases;
#[path = "support/gpu.rs"]
mod gpu;
#[path = "support/kernel_cases.rs"]
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod kernel_cases;
#[path = "support/ptx_backend.rs"]
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod ptx_backend;

use append_cases::{AppendCase, AppendWish, RawOperands, random_append};
use gpu::{context, images, short};
use kernel_cases::Rng;
use phasor::cudarc::driver::DevicePtr;
use phasor::{Dtype, Isa};
use std::ops::Range;

/// Of the device's memory, for all that one call needs.
const ROOM: usize = 1 << 22;
/// Before the first of its parts, between them and after the last.
const GAP: usize = 64;
/// What no part of it is yet.
const UNTOUCHED: u8 = 0xa5;
/// Whole vectors of any kind begin at multiples of it.
const ALIGN: usize = 256;

/// Memory of a call, before it.
struct Arena {
    bytes: Vec<u8>,
}

/// Where the parts of a call are in it.
struct Placed {
    buffers: Vec<Range<usize>>,
    report: Range<usize>,
    operands: RawOperands,
}

impl Arena {
    fn add(&mut self, bytes: &[u8], misalign: usize) -> Range<usize> {
        let begin = (self.bytes.len() + GAP).next_multiple_of(ALIGN) + misalign;
        self.bytes.resize(begin, UNTOUCHED);
        self.bytes.extend(bytes);
        begin..self.bytes.len()
    }

    /// That of a case, if it begins at an address.
    fn of(case: &AppendCase, base: u64) -> (Arena, Placed) {
        let mut arena = Arena { bytes: Vec::new() };
        let address = |range: &Range<usize>| base + range.start as u64;
        let buffers = case.buffers.iter();
        let buffers: Vec<_> = buffers
            .map(|buffer| arena.add(&buffer.bytes, buffer.misalign))
            .collect();
        let at: Vec<_> = buffers.iter().map(address).collect();
        let report = arena.add(&[0; 4], 0);
        let hold = |bytes: &[u8]| address(&arena.add(bytes, 0));
        let operands = case.operands_at(&at, address(&report), hold);
        let end = arena.bytes.len() + GAP;
        arena.bytes.resize(end, UNTOUCHED);
        assert!(end <= ROOM, "{end} bytes");
        let placed = Placed {
            buffers,
            report,
            operands,
        };
        (arena, placed)
    }
}

/// Where bytes differ from what the host leaves there.
fn difference(case: &AppendCase, before: &Arena, placed: &Placed, got: &[u8]) -> Option<String> {
    let outcome = case.on_host(Isa::best()).unwrap();
    let mut expected = before.bytes.clone();
    for (range, bytes) in placed.buffers.iter().zip(&outcome.buffers) {
        expected[range.clone()].copy_from_slice(bytes);
    }
    let reported = u32::from(outcome.reported).to_ne_bytes();
    expected[placed.report.clone()].copy_from_slice(&reported);
    let first = got.iter().zip(&expected).position(|(a, b)| a != b)?;
    let mut names = case.buffers.iter().zip(&placed.buffers);
    let name = names.find(|(_, range)| range.contains(&first));
    Some(match name {
        Some((buffer, range)) => format!("{}, byte {}", buffer.name, first - range.start),
        None if placed.report.contains(&first) => "the report".to_owned(),
        None => format!("byte {first}, outside of all buffers that are written"),
    })
}

fn wishes(staged: bool, rng: &mut Rng) -> AppendWish {
    let mut wish = AppendWish {
        staged,
        ..AppendWish::default()
    };
    // Norms over whole heads in vectors, as models have them.
    if staged && rng.chance(60) {
        wish.whole = Some(rng.pick(&[64, 64, 128, 256]));
        wish.aligned = Some(true);
    }
    wish
}

fn case(staged: bool, seed: u64) -> AppendCase {
    let mut rng = Rng(seed);
    let wish = wishes(staged, &mut rng);
    random_append(&mut rng, wish)
}

fn on_gpu(staged: bool, count: u64) {
    let Some(context) = context() else { return };
    let stream = context.default_stream();
    let mut memory = stream.alloc_zeros::<u8>(ROOM).unwrap();
    let base = memory.device_ptr(&stream).0;
    assert!(base.is_multiple_of(ALIGN as u64));
    let count = if short() { count / 20 } else { count };
    for (image, cuda) in images(&context, &Dtype::ALL) {
        for seed in 0..count {
            let case = case(staged, seed);
            let (arena, placed) = Arena::of(&case, base);
            let rotator = cuda.rotator(&case.rope).unwrap();
            let rotator = rotator.with_launch_mode(case.mode);
            let plan = rotator.plan(&case.problem).unwrap();
            let mut used = memory.slice_mut(..arena.bytes.len());
            stream.memcpy_htod(&arena.bytes, &mut used).unwrap();
            let (tensors, cache, stages, positions) = placed.operands;
            // SAFETY: everything is in the arena, as long as its layout, and apart from the rest; the
            // copies before and behind the launch are on its stream.
            unsafe {
                rotator
                    .step_raw(stream.cu_stream(), &plan, tensors, cache, stages, positions)
                    .unwrap();
            }
            let got = stream.clone_dtoh(&used).unwrap();
            stream.synchronize().unwrap();
            if let Some(what) = difference(&case, &arena, &placed, &got) {
                panic!("{image}, seed {seed}, {what}: {case:?}");
            }
        }
    }
}

const APPENDS: u64 = 1000;
const STAGES: u64 = 2000;

#[test]
fn random_appends_equal_the_host_bit_for_bit() {
    on_gpu(false, APPENDS);
}

#[test]
fn random_stages_equal_the_host_bit_for_bit() {
    on_gpu(true, STAGES);
}

/// What needs no GPU: all cases have room, and what they leave is told from anything else.
#[test]
fn every_case_fits_and_every_byte_counts() {
    for (staged, count) in [(false, APPENDS), (true, STAGES)] {
        for seed in 0..count {
            let case = case(staged, seed);
            let (mut arena, placed) = Arena::of(&case, 1 << 40);
            if seed % 50 != 0 {
                continue;
            }
            let outcome = case.on_host(Isa::best()).unwrap();
            let before = arena.bytes.clone();
            for (range, bytes) in placed.buffers.iter().zip(&outcome.buffers) {
                arena.bytes[range.clone()].copy_from_slice(bytes);
            }
            arena.bytes[placed.report.start] = u8::from(outcome.reported);
            let mut got = std::mem::replace(&mut arena.bytes, before);
            assert_eq!(difference(&case, &arena, &placed, &got), None);
            let changed = seed as usize * 7919 % got.len();
            got[changed] ^= 0x10;
            assert!(difference(&case, &arena, &placed, &got).is_some());
        }
    }
}
