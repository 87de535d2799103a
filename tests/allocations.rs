//! What runs once per step or per layer allocates nothing.

use phasor::call::{Addresses, AngleAddresses, RawPositions, TensorAddresses};
use phasor::launch::Target;
use phasor::{
    Dtype, Frequencies, FrequencyRows, Host, Layout, Pairing, Positions, Problem, Rope, Threads,
};
use std::alloc::{GlobalAlloc, Layout as MemoryLayout, System};
use std::cell::Cell;

thread_local! {
    /// Those of this thread, as the test runner has others.
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: hands everything on to the system's allocator, and counts beside it without allocating.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: MemoryLayout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: MemoryLayout) {
        // SAFETY: the caller's.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Allocations of an action, and what it gives.
fn allocations<T>(action: impl FnOnce() -> T) -> (usize, T) {
    let before = ALLOCATIONS.get();
    let result = action();
    (ALLOCATIONS.get() - before, result)
}

#[test]
fn allocations_are_counted() {
    let (count, values) = allocations(|| vec![1u8; 100]);
    assert_eq!((count, values.len()), (1, 100));
}

#[test]
fn plans_calls_and_launches_allocate_nothing() {
    let frequencies = Frequencies::from_theta(1e4, 64).unwrap();
    let rows = FrequencyRows::new(&[frequencies.clone(), frequencies.clone()]).unwrap();
    let [exact, rows] = [frequencies.into(), rows.into()]
        .map(|angles: phasor::Angles| Rope::new(angles, Pairing::HalfSplit));
    let starts = [3i64, 900];
    let plain = Positions::start_per_sequence(&starts);
    for (rope, positions, raw) in [
        (&exact, plain, RawPositions::start(1)),
        (
            &rows,
            plain.frequency_rows_per_sequence(&[0, 1]),
            RawPositions::start(1).frequency_row(1),
        ),
    ] {
        let rotator = Host::new().with_threads(Threads::One).rotator(rope);
        let (q, k) = (Layout::bshd(2, 3, 8, 64), Layout::bhsd(2, 3, 2, 64));
        let (count, plan) = allocations(|| {
            let problem = Problem::new(Dtype::F32).q(q).k((k, k.with_offset(5)));
            rotator.plan(&problem).unwrap()
        });
        assert_eq!(count, 0, "planning separate buffers");
        let (count, part) = allocations(|| {
            let part = plan.first_tokens(2).unwrap();
            part.first_sequences(2).unwrap()
        });
        assert_eq!(count, 0, "parts of a plan");

        let mut queries = vec![1.0f32; 2 * 3 * 8 * 64];
        let keys = vec![1.0f32; 2 * 3 * 2 * 64];
        let mut rotated = vec![1.0f32; 5 + keys.len()];
        for plan in [&plan, &part] {
            let (count, result) = allocations(|| {
                let q = Some((&mut queries).into());
                let k = Some((&keys[..], &mut rotated).into());
                rotator.rotate(plan, q, k, positions)
            });
            assert_eq!((count, result), (0, Ok(())), "a call on one thread");
            let addresses = Addresses {
                q: TensorAddresses::default(),
                k: TensorAddresses::default(),
                angles: AngleAddresses::Steps {
                    steps: 64,
                    factors: 128,
                },
                positions: raw,
                v: TensorAddresses::default(),
                cache: None,
                stages: Default::default(),
            };
            let (count, launch) = allocations(|| {
                let call = plan.call(&addresses).unwrap();
                call.map(|call| call.launch(&Target::new(132)))
            });
            assert_eq!((count, launch.is_some()), (0, true), "a launch");
        }
    }
}
