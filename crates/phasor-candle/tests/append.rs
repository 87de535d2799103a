//! Rotation and storing in caches, at once.

use candle_core::{DType, Device, StorageRef, Tensor, Var};
use phasor::{Frequencies, Pairing, Rope};
use phasor_candle::{
    CacheOrder, DimOrder, Error, KvCache, Positions, RotaryEmbedding, Slots, Stored,
};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// Counts what a thread allocates.
struct Counting;

thread_local! {
    static ALLOCATED: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: the system's allocator does it all; counting does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATED.set(ALLOCATED.get() + 1);
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const CPU: Device = Device::Cpu;
const DIM: usize = 8;

fn rotary(order: DimOrder) -> RotaryEmbedding {
    let rope = Rope::new(
        Frequencies::from_theta(1e4, DIM).unwrap(),
        Pairing::Interleaved,
    );
    RotaryEmbedding::new(&rope).with_dim_order(order)
}

fn tensor(first: usize, shape: &[usize], dtype: DType) -> Tensor {
    let len: usize = shape.iter().product();
    let values = (first..first + len).map(|n| ((n * 37 + n * n) % 101) as f32 / 16.0 - 3.0);
    let tensor = Tensor::from_iter(values, &CPU).unwrap();
    tensor.reshape(shape).unwrap().to_dtype(dtype).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    let wide = tensor.to_dtype(DType::F32).unwrap();
    wide.flatten_all().unwrap().to_vec1().unwrap()
}

fn copy(tensor: &Tensor) -> Tensor {
    tensor.copy().unwrap()
}

/// Heads `[batch, tokens, heads, dim]` in the order of a rotation.
fn ordered(tensor: &Tensor, order: DimOrder) -> Tensor {
    match order {
        DimOrder::Bhtd => tensor.transpose(1, 2).unwrap(),
        DimOrder::Bthd => tensor.clone(),
    }
}

/// What a cache holds, as `[slots, heads, dim]`.
fn slots_of(cache: &Tensor, order: CacheOrder, heads: usize) -> Vec<Vec<f32>> {
    let slots = match (order, cache.rank()) {
        (CacheOrder::Nhd, _) => cache.clone(),
        (CacheOrder::Hnd, _) => cache.transpose(1, 2).unwrap(),
        // [pages, heads, dim / x, page_size, x] and [pages, heads, dim, page_size].
        (_, 5) => cache.permute((0, 3, 1, 2, 4)).unwrap(),
        _ => cache.permute((0, 3, 1, 2)).unwrap(),
    };
    values(&slots)
        .chunks(heads * DIM)
        .map(<[f32]>::to_vec)
        .collect()
}

struct Step {
    q: Tensor,
    k: Tensor,
    v: Tensor,
}

/// `[batch, tokens, heads, dim]`, with 4 query and 2 key and value heads.
fn step(batch: usize, tokens: usize, dtype: DType) -> Step {
    let of = |first, heads| tensor(first, &[batch, tokens, heads, DIM], dtype);
    Step {
        q: of(0, 4),
        k: of(1000, 2),
        v: of(2000, 2),
    }
}

/// Appends, and checks q and the caches. `slot` has each token's, counted through, if it has one.
fn check(
    case: &str,
    (order, cache_order): (DimOrder, CacheOrder),
    [k_cache, v_cache]: [&Tensor; 2],
    step: &Step,
    positions: Positions<'_>,
    slots: Slots<'_>,
    slot: impl Fn(usize, usize) -> Option<usize>,
) -> Stored {
    let rotary = rotary(order);
    let before = [k_cache, v_cache].map(|cache| slots_of(cache, cache_order, 2));
    let [q, k, v] = [&step.q, &step.k, &step.v].map(|x| ordered(x, order));
    let rotated = rotary.apply(&q, positions.clone()).unwrap();
    let keys = rotary.apply(&k, positions.clone()).unwrap();
    let (k_before, v_before) = (values(&k), values(&v));

    let cache = KvCache::new(k_cache, v_cache, cache_order);
    let stored = rotary.append(&q, &k, &v, cache, positions, slots).unwrap();

    assert_eq!(values(&q), values(&rotated), "{case}: q");
    assert_eq!(
        (values(&k), values(&v)),
        (k_before, v_before),
        "{case}: k and v"
    );
    let (batch, tokens) = (step.q.dim(0).unwrap(), step.q.dim(1).unwrap());
    let after = [k_cache, v_cache].map(|cache| slots_of(cache, cache_order, 2));
    for (given, before, after) in [(&keys, &before[0], &after[0]), (&v, &before[1], &after[1])] {
        let mut expected = before.clone();
        for b in 0..batch {
            for t in 0..tokens {
                if let Some(slot) = slot(b, t) {
                    let token = given.narrow(0, b, 1).unwrap();
                    let dim = if order == DimOrder::Bhtd { 2 } else { 1 };
                    expected[slot] = values(&token.narrow(dim, t, 1).unwrap());
                }
            }
        }
        assert_eq!(*after, expected, "{case}");
    }
    stored
}

#[test]
fn contiguous_caches() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for order in [DimOrder::Bhtd, DimOrder::Bthd] {
            for (cache_order, shape) in [
                (CacheOrder::Hnd, [2, 2, 16, DIM]),
                (CacheOrder::Nhd, [2, 16, 2, DIM]),
            ] {
                let [k_cache, v_cache] = [3000, 4000].map(|first| tensor(first, &shape, dtype));
                let case = format!("{dtype:?} {order:?} {cache_order:?}");
                for (tokens, lengths) in [(5, [0u32, 3]), (1, [5, 8]), (1, [6, 9])] {
                    let starts = lengths.map(i64::from);
                    let stored = check(
                        &case,
                        (order, cache_order),
                        [&k_cache, &v_cache],
                        &step(2, tokens, dtype),
                        Positions::starts(&starts),
                        Slots::sequences(&lengths),
                        |b, t| Some(b * 16 + lengths[b] as usize + t),
                    );
                    assert_eq!(stored, Stored::All);
                }
            }
        }
    }
}

/// Caches of 4 pages of 8 slots, `[k, v]`.
fn paged(order: CacheOrder) -> [Tensor; 2] {
    let of = |first, shape: &[usize]| tensor(first, shape, DType::F32);
    match order {
        CacheOrder::Nhd => [3000, 4000].map(|first| of(first, &[4, 8, 2, DIM])),
        CacheOrder::Hnd => [3000, 4000].map(|first| of(first, &[4, 2, 8, DIM])),
        CacheOrder::Packed => [of(3000, &[4, 2, DIM / 4, 8, 4]), of(4000, &[4, 2, DIM, 8])],
    }
}

#[test]
fn paged_caches_by_every_kind_of_slot() {
    for order in [CacheOrder::Nhd, CacheOrder::Hnd, CacheOrder::Packed] {
        let [k_cache, v_cache] = paged(order);
        let caches = [&k_cache, &v_cache];
        // Sequences of 6 and 13 tokens, whose pages are 2, and 3 and 0; three more of each.
        let (lengths, pages) = ([6i64, 13], [2u32, 1, 3, 0]);
        let slot = |b: usize, t: usize| {
            let at = lengths[b] as usize + t;
            Some(pages[2 * b + at / 8] as usize * 8 + at % 8)
        };
        let mapping: Vec<i64> = (0..6).map(|n| slot(n / 3, n % 3).unwrap() as i64).collect();
        let mapped = Tensor::from_slice(&mapping, (2, 3), &CPU).unwrap();
        let [table, length] = [
            Tensor::from_slice(&pages, (2, 2), &CPU).unwrap(),
            Tensor::new(&lengths, &CPU).unwrap(),
        ];
        for (kind, slots) in [
            ("mapping", Slots::mapping(&mapping)),
            ("mapping in a tensor", Slots::mapping(&mapped)),
            ("page table", Slots::page_table(&pages, &lengths)),
            ("page table in a tensor", Slots::page_table(&table, &length)),
            (
                "page indices",
                Slots::page_indices(&[0u32, 2, 4], &pages, &lengths),
            ),
        ] {
            let stored = check(
                &format!("{order:?} {kind}"),
                (DimOrder::Bthd, order),
                caches,
                &step(2, 3, DType::F32),
                Positions::starts(&lengths),
                slots,
                slot,
            );
            assert_eq!(stored, Stored::All);
        }
        // A token that is not to be stored, and one whose slot is not in the caches.
        let stored = check(
            "none",
            (DimOrder::Bhtd, order),
            caches,
            &step(1, 3, DType::F32),
            Positions::from(7),
            Slots::mapping(&[5, -1, 6]),
            |_, t| [Some(5), None, Some(6)][t],
        );
        assert_eq!(stored, Stored::All);
        let stored = check(
            "outside",
            (DimOrder::Bhtd, order),
            caches,
            &step(1, 3, DType::F32),
            Positions::from(7),
            Slots::mapping(&[32, 1, 2]),
            |_, t| [None, Some(1), Some(2)][t],
        );
        assert_eq!(stored, Stored::NotAll);
    }
}

#[test]
fn packed_qkv_of_a_ragged_batch() {
    let rotary = rotary(DimOrder::Bthd);
    let qkv = tensor(0, &[10, 8, DIM], DType::BF16);
    let heads = |tensor: &Tensor, first, heads| tensor.narrow(1, first, heads).unwrap();
    let (cu_seqlens, lengths) = ([0u32, 4, 5, 9], [0i64, 3, 8]);
    let positions = || Positions::starts(&lengths).cu_seqlens(&cu_seqlens);
    let slots: Vec<i64> = (0..10).map(|n| (n * 7) % 32).collect();
    let caches = || [5, 6].map(|first| tensor(first, &[4, 8, 2, DIM], DType::BF16));

    // By its parts.
    let [q, k, v] = [(0, 4), (4, 2), (6, 2)].map(|(first, n)| copy(&heads(&qkv, first, n)));
    let [k_cache, v_cache] = caches();
    let cache = KvCache::new(&k_cache, &v_cache, CacheOrder::Nhd);
    let stored = rotary.append(&q, &k, &v, cache, positions(), Slots::mapping(&slots));
    assert_eq!(stored.unwrap(), Stored::All);
    assert_eq!(
        values(&q.narrow(0, 9, 1).unwrap()),
        values(&heads(&qkv, 0, 4).narrow(0, 9, 1).unwrap())
    );

    // As windows, which begin late in their storage.
    let twice = Tensor::cat(&[&qkv, &qkv], 0).unwrap();
    let late = twice.narrow(0, 10, 10).unwrap();
    let windows = [(0, 4), (4, 2), (6, 2)].map(|(first, n)| heads(&late, first, n));
    let [k_packed, v_packed] = caches();
    let cache = KvCache::new(&k_packed, &v_packed, CacheOrder::Nhd);
    let [q_window, k_window, v_window] = &windows;
    let slots = Slots::mapping(&slots);
    let stored = rotary.append(q_window, k_window, v_window, cache, positions(), slots);
    assert_eq!(stored.unwrap(), Stored::All);
    assert_eq!(values(q_window), values(&q));
    assert_eq!(values(&heads(&late, 4, 4)), values(&heads(&qkv, 4, 4)));
    assert_eq!(values(&twice.narrow(0, 0, 10).unwrap()), values(&qkv));
    assert_eq!(values(&k_packed), values(&k_cache));
    assert_eq!(values(&v_packed), values(&v_cache));
}

#[test]
fn caches_that_are_windows_of_one() {
    let step = step(1, 3, DType::F32);
    // [2, pages, page_size, heads, dim], and one layer of it.
    let both = tensor(9, &[3, 2, 4, 8, 2, DIM], DType::F32);
    let before = copy(&both);
    let layer = both.get(1).unwrap();
    let [k_cache, v_cache] = [0, 1].map(|n| layer.get(n).unwrap());
    let slots = Slots::mapping(&[9, 30, 2]);
    let stored = check(
        "one storage",
        (DimOrder::Bhtd, CacheOrder::Nhd),
        [&k_cache, &v_cache],
        &step,
        Positions::from(3),
        slots,
        |_, t| Some([9, 30, 2][t]),
    );
    assert_eq!(stored, Stored::All);
    for other in [0, 2] {
        assert_eq!(
            values(&both.get(other).unwrap()),
            values(&before.get(other).unwrap())
        );
    }
    // k and v of one storage, which is only read.
    let kv = tensor(50, &[1, 3, 4, DIM], DType::F32);
    let [k, v] = [0, 2].map(|first| kv.narrow(2, first, 2).unwrap());
    let step = Step { q: step.q, k, v };
    let stored = check(
        "kv in one",
        (DimOrder::Bthd, CacheOrder::Nhd),
        [&k_cache, &v_cache],
        &step,
        Positions::from(3),
        Slots::mapping(&[0, 1, 8]),
        |_, t| Some([0, 1, 8][t]),
    );
    assert_eq!(stored, Stored::All);
}

#[test]
fn what_is_refused() {
    let rotary = rotary(DimOrder::Bthd);
    let Step { q, k, v } = step(1, 3, DType::F32);
    let [k_cache, v_cache] = paged(CacheOrder::Nhd);
    let append = |q: &Tensor, k: &Tensor, v: &Tensor, k_cache: &Tensor, v_cache: &Tensor, order| {
        let cache = KvCache::new(k_cache, v_cache, order);
        rotary.append(q, k, v, cache, 3, Slots::mapping(&[0, 1, 2]))
    };
    let before = values(&q);
    let nhd = CacheOrder::Nhd;
    // The same cache twice.
    let error = append(&q, &k, &v, &k_cache, &k_cache, nhd).unwrap_err();
    assert!(
        matches!(error, Error::Phasor(phasor::Error::Overlap { .. })),
        "{error}"
    );
    // q and k in one tensor, and v in another.
    let qk = tensor(1, &[1, 3, 6, DIM], DType::F32);
    let [q_window, k_window] = [(0, 4), (4, 2)].map(|(first, n)| qk.narrow(2, first, n).unwrap());
    let error = append(&q_window, &k_window, &v, &k_cache, &v_cache, nhd).unwrap_err();
    assert!(matches!(error, Error::SharedStorage { .. }), "{error}");
    // Keys out of the cache that they are stored in.
    let cached = v_cache.narrow(0, 0, 1).unwrap().narrow(1, 0, 3).unwrap();
    let error = append(&q, &cached, &v, &k_cache, &v_cache, nhd).unwrap_err();
    assert!(matches!(error, Error::SharedStorage { .. }), "{error}");
    // Shapes, strides and types.
    let error = append(&q, &k, &v, &k_cache.get(0).unwrap(), &v_cache, nhd).unwrap_err();
    assert!(matches!(error, Error::Shape { .. }), "{error}");
    let columns = k_cache.transpose(2, 3).unwrap();
    let error = append(&q, &k, &v, &columns, &v_cache, nhd).unwrap_err();
    assert!(matches!(error, Error::Strided { .. }), "{error}");
    let error = append(&q, &k, &v, &k_cache, &v_cache, CacheOrder::Hnd).unwrap_err();
    assert!(
        matches!(error, Error::Phasor(phasor::Error::CacheMismatch { .. })),
        "{error}"
    );
    let half = k_cache.to_dtype(DType::F16).unwrap();
    let error = append(&q, &k, &v, &half, &v_cache, nhd).unwrap_err();
    assert!(
        matches!(error, Error::Phasor(phasor::Error::DtypeMismatch { .. })),
        "{error}"
    );
    for order in [CacheOrder::Packed, CacheOrder::Hnd] {
        let [k_cache, v_cache] = paged(CacheOrder::Packed);
        let k_cache = k_cache.narrow(3, 0, 4).unwrap();
        let error = append(&q, &k, &v, &k_cache, &v_cache, order).unwrap_err();
        assert!(matches!(error, Error::Shape { .. }), "{error}");
    }
    let variable = Var::from_tensor(&k_cache).unwrap();
    let error = append(&q, &k, &v, &variable, &v_cache, nhd).unwrap_err();
    assert!(matches!(error, Error::Tracked { .. }), "{error}");
    let error = append(&q, &k, &v, &k_cache, &v_cache.narrow(0, 0, 2).unwrap(), nhd);
    assert!(matches!(
        error,
        Err(Error::Phasor(phasor::Error::CacheMismatch { .. }))
    ));
    // Slots that are no integers, or too few.
    let cache = KvCache::new(&k_cache, &v_cache, nhd);
    let floats = Tensor::zeros((1, 3), DType::F32, &CPU).unwrap();
    let error = rotary
        .append(&q, &k, &v, cache, 3, Slots::mapping(&floats))
        .unwrap_err();
    assert!(matches!(error, Error::DType { .. }), "{error}");
    let error = rotary
        .append(&q, &k, &v, cache, 3, Slots::mapping(&[1, 2]))
        .unwrap_err();
    assert!(
        matches!(error, Error::Phasor(phasor::Error::SlotsLength { .. })),
        "{error}"
    );
    assert_eq!(values(&q), before);
    assert_eq!(values(&k_cache), values(&paged(nhd)[0]));
}

#[test]
fn what_was_not_stored_is_told_later() {
    let rotary = rotary(DimOrder::Bthd);
    let clone = rotary.clone();
    let Step { q, k, v } = step(1, 3, DType::F32);
    let [k_cache, v_cache] = paged(CacheOrder::Nhd);
    let cache = KvCache::new(&k_cache, &v_cache, CacheOrder::Nhd);
    let later = |slots: &[i64]| rotary.append_later(&q, &k, &v, cache, 3, Slots::mapping(slots));
    later(&[1, 2, 3]).unwrap();
    assert_eq!(rotary.stored(&CPU).unwrap(), Stored::All);
    later(&[1, 32, 3]).unwrap();
    later(&[1, 2, 3]).unwrap();
    assert!(later(&[1, 2]).is_err());
    assert_eq!(clone.stored(&CPU).unwrap(), Stored::NotAll);
    assert_eq!(rotary.stored(&CPU).unwrap(), Stored::All);
    // What is told at once is not told again.
    let outside = Slots::mapping(&[1, 2, 99]);
    let stored = rotary.append(&q, &k, &v, cache, 3, outside).unwrap();
    assert_eq!(
        (stored, rotary.stored(&CPU).unwrap()),
        (Stored::NotAll, Stored::All)
    );
}

/// A call on tensors that differ from those of others in one thing, and what came of it.
fn outcome(case: usize, rotary: &RotaryEmbedding) -> String {
    let of = |first, dtype| tensor(first, &[1, 2, 2, DIM], dtype);
    let f32s = |first| of(first, DType::F32);
    let room = |shape: &[usize]| tensor(7000, shape, DType::F32);
    let [mut q, mut k, mut v] = [0, 1000, 2000].map(f32s);
    let [mut k_cache, mut v_cache] = [0, 1].map(|_| room(&[6, 2, 2, DIM]));
    let mut cache_order = CacheOrder::Nhd;
    let mut rotary = rotary.clone().with_dim_order(DimOrder::Bthd);
    let swapped = |x: &Tensor| x.transpose(1, 2).unwrap();
    match case {
        0 => cache_order = CacheOrder::Hnd,
        1 => rotary = rotary.with_dim_order(DimOrder::Bhtd),
        2 => rotary = rotary.with_rotary_offset(DIM / 2),
        3..=7 => {
            let tensors = [&mut q, &mut k, &mut v, &mut k_cache, &mut v_cache];
            *tensors[case - 3] = swapped(tensors[case - 3]);
        }
        8 | 9 => {
            let qkv = tensor(0, &[1, 2, 6, DIM], DType::F32);
            let at = [[0, 2, 4], [4, 0, 2]][case - 8];
            [q, k, v] = at.map(|first| qkv.narrow(2, first, 2).unwrap());
        }
        10 | 11 => {
            let both = room(&[2, 6, 2, 2, DIM]);
            let at = [[0, 1], [1, 0]][case - 10];
            [k_cache, v_cache] = at.map(|first| both.get(first).unwrap());
        }
        12 => [q, k, v] = [q, k, v].map(|x| x.squeeze(0).unwrap()),
        13 => [k_cache, v_cache] = [0, 1].map(|_| room(&[7, 2, 2, DIM])),
        14 => {
            [q, k, v] = [0, 1000, 2000].map(|first| of(first, DType::F16));
            [k_cache, v_cache] = [k_cache, v_cache].map(|x| x.to_dtype(DType::F16).unwrap());
        }
        15 => v = of(2000, DType::F16),
        16 => {
            k_cache = room(&[6, 2, DIM / 4, 2, 4]);
            v_cache = room(&[6, 2, DIM, 2]);
            cache_order = CacheOrder::Packed;
        }
        17 => k_cache = room(&[6, 2, DIM / 4, 2, 4]),
        _ => {}
    }
    let cache = KvCache::new(&k_cache, &v_cache, cache_order);
    let stored = rotary.append(&q, &k, &v, cache, 3, Slots::mapping(&[5, 10]));
    let [q, k_cache, v_cache] = [&q, &k_cache, &v_cache].map(values);
    format!("{stored:?} {q:?} {k_cache:?} {v_cache:?}")
}

#[test]
fn calls_that_differ_in_one_thing_share_no_plan() {
    let rope = Rope::new(
        Frequencies::from_theta(1e4, DIM / 2).unwrap(),
        Pairing::Interleaved,
    );
    let shared = RotaryEmbedding::new(&rope);
    // Whatever went before, and whether a plan is there already.
    for case in (0..19).chain((0..19).rev()) {
        let alone = outcome(case, &RotaryEmbedding::new(&rope));
        assert_eq!(outcome(case, &shared), alone, "{case}");
        assert_eq!(
            alone.starts_with("Ok(All)"),
            ![15, 17].contains(&case),
            "{alone}"
        );
    }
}

#[test]
fn elements_that_are_written_more_than_once_are_refused() {
    let rotary = rotary(DimOrder::Bthd);
    let Step { q, k, v } = step(2, 3, DType::F32);
    let [k_cache, v_cache] = paged(CacheOrder::Nhd);
    let repeated = |x: &Tensor, dim: usize| {
        let one = x.narrow(dim, 0, 1).unwrap();
        one.expand(x.shape()).unwrap()
    };
    for dim in 0..3 {
        for which in 0..3 {
            let mut written = [q.clone(), k_cache.clone(), v_cache.clone()];
            written[which] = repeated(&written[which], dim);
            let [q, k_cache, v_cache] = &written;
            let cache = KvCache::new(k_cache, v_cache, CacheOrder::Nhd);
            let slots = Slots::mapping(&[0, 1, 2, 3, 4, 5]);
            let error = rotary.append(q, &k, &v, cache, 3, slots).unwrap_err();
            assert!(
                matches!(error, Error::Phasor(phasor::Error::SelfOverlap { .. })),
                "{dim}, {which}: {error}"
            );
        }
        let error = rotary.apply_inplace(&repeated(&q, dim), 3).unwrap_err();
        assert!(
            matches!(error, Error::Phasor(phasor::Error::SelfOverlap { .. })),
            "{error}"
        );
        let error = rotary.apply_into(&q, &repeated(&q, dim), 3).unwrap_err();
        assert!(
            matches!(error, Error::Phasor(phasor::Error::SelfOverlap { .. })),
            "{error}"
        );
    }
}

#[test]
fn nothing_is_held_while_a_storage_is_waited_for() {
    let rotary = rotary(DimOrder::Bthd);
    let Step { q, k, v } = step(1, 3, DType::F32);
    let [k_cache, v_cache] = paged(CacheOrder::Nhd);
    let cache = KvCache::new(&k_cache, &v_cache, CacheOrder::Nhd);
    let tensors = [&q, &k_cache, &v_cache, &k, &v];
    let locks = tensors.map(|tensor| StorageRef::rwlock(&tensor.storage_and_layout().0));
    for busy in 0..3 {
        let before = values(&k_cache);
        let reader = locks[busy].read();
        let (free, stored) = std::thread::scope(|scope| {
            let stored = scope.spawn(|| {
                let slots = Slots::mapping(&[0, 1, 2]);
                rotary.append(&q, &k, &v, cache, 3, slots).unwrap()
            });
            // A writer that waits keeps further readers out.
            while locks[busy].try_read().is_some() {
                std::thread::yield_now();
            }
            let free = locks.map(|lock| lock.try_write().is_some());
            drop(reader);
            (free, stored.join().unwrap())
        });
        assert_eq!(free, [0, 1, 2, 3, 4].map(|lock| lock != busy));
        assert_eq!(stored, Stored::All);
        assert_ne!(values(&k_cache), before);
        k_cache.zero_set().unwrap();
    }
}

#[test]
fn a_step_like_an_earlier_one_allocates_nothing() {
    let rotary = rotary(DimOrder::Bthd);
    let Step { q, k, v } = step(1, 3, DType::F32);
    let [k_cache, v_cache] = paged(CacheOrder::Nhd);
    let cache = KvCache::new(&k_cache, &v_cache, CacheOrder::Nhd);
    let ids = Tensor::new(&[[4u32, 5, 6]], &CPU).unwrap();
    let mut allocated = [0; 3];
    for calls in &mut allocated {
        let before = ALLOCATED.get();
        let slots = Slots::mapping(&[0, 1, 2]);
        let by_slice = rotary.append(&q, &k, &v, cache, 3, slots).unwrap();
        let slots = Slots::mapping(&ids);
        let by_tensor = rotary.append(&q, &k, &v, cache, &ids, slots).unwrap();
        assert_eq!([by_slice, by_tensor], [Stored::All; 2]);
        rotary.apply_qk_inplace(&q, &k, 3).unwrap();
        *calls = ALLOCATED.get() - before;
    }
    assert!(allocated[0] > 0);
    assert_eq!(allocated[1..], [0, 0]);
}
