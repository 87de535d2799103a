//! What runs once per step or per layer allocates nothing, and what allocates much says so where there is no
//! memory.

use phasor::call::{Addresses, AngleAddresses, RawPositions, TensorAddresses};
use phasor::interfaces::{InterfaceError, Tensor, ggml, max, tables};
use phasor::launch::Target;
use phasor::multimodal::{Grid, MultimodalError, vision_position_ids};
use phasor::{
    CosSinTable, Device, Dtype, Error, Frequencies, FrequencyRows, Host, Layout, Pairing,
    Positions, Problem, Rope, Threads,
};
use std::alloc::{GlobalAlloc, Layout as MemoryLayout, System};
use std::cell::Cell;

thread_local! {
    /// Those of this thread, as the test runner has others.
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
    /// How many large allocations of this thread have memory before one has none.
    static FIT: Cell<usize> = const { Cell::new(usize::MAX) };
}

/// Bytes from which on an allocation is large.
const LARGE: usize = 1 << 14;

struct Counting;

// SAFETY: hands everything on to the system's allocator or has no memory, and counts beside it without
// allocating.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: MemoryLayout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        if layout.size() >= LARGE {
            let fit = FIT.get();
            FIT.set(fit.wrapping_sub(1));
            if fit == 0 {
                return std::ptr::null_mut();
            }
        }
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

/// What an action gives where so many large allocations have memory, and the next one has none.
fn with_memory_for<T>(large: usize, action: impl FnOnce() -> T) -> T {
    FIT.set(large);
    let result = action();
    FIT.set(usize::MAX);
    result
}

#[test]
fn what_does_not_fit_memory_is_refused() {
    const ROWS: usize = 4096;
    // cos and sin each.
    let ids = vec![0i32; 4 * ROWS];
    let arguments = ggml::Arguments::new(16, ggml::Mode::Mrope, 1e4);
    let frequencies = Frequencies::from_theta(1e4, 16).unwrap();
    for large in [0, 1] {
        let name = |result: Result<CosSinTable, InterfaceError>| match result {
            Err(InterfaceError::Value { argument, .. }) => argument,
            other => panic!("{large}: {other:?}"),
        };
        let table = with_memory_for(large, || tables::llama_cpp(1e4, 16, 1.0, None, ROWS));
        assert_eq!(name(table), "rows");
        let of_ids = || ggml::table(&arguments, Some([8, 0, 0, 0]), None, &ids);
        assert_eq!(name(with_memory_for(large, of_ids)), "b");
        // Whether the number of positions is known before or not.
        let all = 0..ROWS as i64;
        let known = with_memory_for(large, || frequencies.table(all.clone()));
        let rows = ROWS;
        let pairs = 8;
        assert_eq!(known, Err(Error::TableTooLarge { rows, pairs }));
        let unknown = all.filter(|position| *position >= 0);
        let unknown = with_memory_for(large, || frequencies.table(unknown));
        assert!(matches!(unknown, Err(Error::TableTooLarge { .. })));
    }
    let tables = with_memory_for(2, || tables::llama_cpp(1e4, 16, 1.0, None, ROWS));
    assert!(tables.is_ok());

    let rope = ggml::Rope::multi(&Device::host(), None, [8, 0, 0, 0], &arguments).unwrap();
    let mut heads = vec![1.0f32; 2 * ROWS * 16];
    let call = |heads: &mut [f32]| rope.call(Tensor::new(heads, &[2, ROWS, 1, 16]), &ids);
    match with_memory_for(0, || call(&mut heads)) {
        Err(InterfaceError::Value { argument, .. }) => assert_eq!(argument, "a->ne[3]"),
        other => panic!("{other:?}"),
    }
    assert_eq!(heads, vec![1.0; heads.len()]);

    let arguments = max::Arguments::new(16, 1, 1e4, ROWS);
    let embedding = max::RotaryEmbedding::new(&Device::host(), &arguments).unwrap();
    match with_memory_for(0, || embedding.freqs_cis_base()) {
        Err(InterfaceError::Value { argument, .. }) => assert_eq!(argument, "max_seq_len"),
        other => panic!("{other:?}"),
    }

    let grid = Grid {
        time: 1,
        height: 64,
        width: 64,
    };
    let tokens = ROWS;
    assert_eq!(
        with_memory_for(0, || vision_position_ids(&[grid], 1)),
        Err(MultimodalError::OutOfMemory { tokens })
    );
    // What was reserved is all that is needed.
    let ids = with_memory_for(1, || vision_position_ids(&[grid], 1));
    assert_eq!(ids.map(|ids| ids.len()), Ok(2 * ROWS));
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

/// Heads of more pairs than cos and sin are formed of at a time.
#[test]
fn calls_of_wide_heads_allocate_nothing() {
    let rope = Rope::new(
        Frequencies::from_theta(1e4, 320).unwrap(),
        Pairing::HalfSplit,
    );
    let rotator = Host::new().with_threads(Threads::One).rotator(&rope);
    let problem = Problem::new(Dtype::F32).q(Layout::tokens(3, 2, 320));
    let plan = rotator.plan(&problem).unwrap();
    let mut queries = vec![1.0f32; 3 * 2 * 320];
    let mut rotate = || {
        let q = Some((&mut queries).into());
        allocations(|| rotator.rotate(&plan, q, None, Positions::start(7)))
    };
    // Whatever is found out once.
    assert_eq!(rotate().1, Ok(()));
    assert_eq!(rotate(), (0, Ok(())));
}
