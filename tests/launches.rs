//! Which kernel a call is launched with, and how the launch stands to earlier work.

use phasor::call::{
    Addresses, AngleAddresses, CacheAddresses, Call, RawPositions, RawSlots, StageAddresses,
    TensorAddresses, VectorAddress,
};
use phasor::launch::{Family, Kernel, LaunchMode, Target};
use phasor::norm::HeadNorm;
use phasor::quantize::{Codes, ScaleForm};
use phasor::{
    CacheLayout, Dtype, Error, Frequencies, FrequencyRows, IdType, Ids, InOut, KvCacheLayout,
    Layout, Pairing, Plan, Problem, Rope, Stages, StoredCodes,
};
use std::collections::HashSet;

/// All buffers at one address, and ids.
fn call(rope: &Rope, problem: &Problem, address: u64, positions: RawPositions) -> Call {
    let tensor = |destination| TensorAddresses {
        source: address,
        destination,
    };
    let addresses = Addresses {
        q: tensor(1 << 20),
        k: tensor(address),
        angles: AngleAddresses::Steps {
            steps: 4096,
            factors: 8192,
        },
        positions,
        v: TensorAddresses::default(),
        cache: None,
        stages: Default::default(),
    };
    let plan = Plan::new(rope, problem).unwrap();
    plan.call(&addresses).unwrap().unwrap()
}

fn rope(pairs: usize, pairing: Pairing) -> Rope {
    let frequencies = Frequencies::from_theta(1e4, 2 * pairs).unwrap();
    Rope::new(frequencies, pairing)
}

/// In elements: where the source of q lies, whose destination is at a multiple of all vectors.
#[track_caller]
fn chooses(rope: &Rope, q: impl Into<InOut<Layout>>, source: u64, expected: Option<Pairing>) {
    let q = q.into();
    for dtype in Dtype::ALL {
        // SAFETY: nothing is written at the addresses.
        let problem = unsafe { Problem::new(dtype).q(q).assume_disjoint() };
        let source = 4096 + source * dtype.size() as u64;
        let call = call(rope, &problem, source, RawPositions::start(5));
        let kernel = call.launch(&Target::new(132)).kernel;
        assert_eq!((kernel.dtype, kernel.pairing), (dtype, expected), "{q:?}");
    }
}

#[test]
fn vectors_serve_what_begins_at_their_multiples() {
    let plain = Layout::bshd(3, 5, 2, 128);
    for pairing in [Pairing::HalfSplit, Pairing::Interleaved] {
        let whole = rope(64, pairing);
        let (some, none) = (Some(pairing), None);
        chooses(&whole, (plain, plain), 0, some);
        chooses(&whole, (plain, plain), 4, some);
        chooses(&whole, plain, 0, some);
        // In place, what is said of the source is not used, nor of a tensor that is not there.
        chooses(&whole, plain, 1, some);
        for off in 1..4 {
            chooses(&whole, (plain, plain), off, none);
            let moved = plain.with_offset(off as usize);
            chooses(&whole, (plain, moved), 0, none);
            chooses(&whole, moved, 0, none);
            chooses(&whole, (moved, moved), 4 - off, none);
        }
        // Each stride, on either side, alone and with others that are off by as much.
        let strides = plain.strides();
        for off in 1..8usize {
            let [batch, token, head] = [0, 1, 2].map(|dim| strides[dim] + 2 * (off >> dim & 1));
            let gaps = plain.with_strides(batch, token, head);
            for (q, source) in [
                ((gaps, plain), 0),
                ((gaps, plain), 2),
                ((plain, gaps), 0),
                ((gaps, gaps), 2),
            ] {
                chooses(&whole, q, source, none);
            }
            chooses(&whole, gaps, 0, none);
        }
        let wide = plain.with_strides(2000, 400, 132);
        chooses(&whole, (plain, wide), 0, some);
        // Strides of one sequence, token and head are not walked.
        let one = Layout::bshd(1, 1, 1, 128).with_strides(1, 2, 3);
        chooses(&whole, (one, one), 0, some);
        // Vectors do not lie across an edge of the window, nor of a head that is copied.
        let part = rope(32, pairing);
        for (offset, expected) in [(0, some), (2, none), (4, some), (62, none), (64, some)] {
            let window = plain.with_rotary_offset(offset);
            chooses(&part, (window, window), 0, expected);
            chooses(&part, window, 0, expected);
        }
        let odd = Layout::tokens(5, 1, 66).with_strides(0, 80, 80);
        chooses(&part, odd, 0, some);
        chooses(&part, (odd, odd), 0, none);
        for (pairs, expected) in [(2, none), (4, some), (6, none), (30, none), (36, some)] {
            chooses(&rope(pairs, pairing), (plain, plain), 0, expected);
        }
    }
    let unlike = rope(64, Pairing::HalfSplit).with_output_pairing(Pairing::Interleaved);
    chooses(&unlike, (plain, plain), 0, None);
    let unlike = rope(64, Pairing::Interleaved).with_output_pairing(Pairing::HalfSplit);
    chooses(&unlike, (plain, plain), 0, None);
}

#[test]
fn both_tensors_must_suit_vectors() {
    let whole = rope(64, Pairing::HalfSplit);
    let good = Layout::tokens(5, 2, 128);
    let bad = good.with_offset(1);
    for (q, k, expected) in [
        (good, good, Some(Pairing::HalfSplit)),
        (good, bad, None),
        (bad, good, None),
    ] {
        let problem = Problem::new(Dtype::F16).q(q).k(k);
        let call = call(&whole, &problem, 4096, RawPositions::start(0));
        assert_eq!(call.launch(&Target::new(1)).kernel.pairing, expected);
    }
}

#[test]
fn angles_are_formed_before_the_wait_where_nothing_is_read_for_them() {
    let one = Frequencies::from_theta(1e4, 128).unwrap();
    let rows = FrequencyRows::new(&[one.clone(), one.clone()]).unwrap();
    let (plain, rows) = (
        Rope::new(one, Pairing::HalfSplit),
        Rope::new(rows, Pairing::HalfSplit),
    );
    let problem = Problem::new(Dtype::Bf16).q(Layout::bshd(2, 3, 1, 128));
    let ids = |len| Ids::at(1 << 16, IdType::I64, len);
    let start = RawPositions::start(9);
    for (rope, positions, has_ids) in [
        (&plain, start, false),
        (&plain, RawPositions::start_per_sequence(ids(2)), true),
        (&plain, RawPositions::per_token(ids(6)), true),
        (&rows, start.frequency_row(1), false),
        (&rows, start.frequency_rows_per_sequence(ids(2)), true),
        (
            &rows,
            RawPositions::per_token(ids(6)).frequency_row(0),
            true,
        ),
    ] {
        let call = call(rope, &problem, 4096, positions);
        for (mode, dependent, before_wait) in [
            (LaunchMode::Ordinary, false, false),
            (LaunchMode::Dependent, true, !has_ids),
            (LaunchMode::DependentPositionsSettled, true, true),
        ] {
            let launch = call.launch(&Target::new(132).with_mode(mode));
            assert_eq!(launch.dependent, dependent, "{mode:?}");
            let before = launch.params.angles_before_wait;
            assert_eq!(before, u32::from(before_wait), "{mode:?} {positions:?}");
        }
        assert!(!call.launch(&Target::new(132)).dependent);
    }
}

/// A call that appends at these addresses of k's cache.
fn appends(problem: &Problem, cache: u64, positions: RawPositions, slots: RawSlots) -> Call {
    try_to_append(problem, cache, positions, slots).unwrap()
}

fn try_to_append(
    problem: &Problem,
    cache: u64,
    positions: RawPositions,
    slots: RawSlots,
) -> Result<Call, Error> {
    let tensor = TensorAddresses {
        source: 4096,
        destination: 1 << 20,
    };
    let addresses = Addresses {
        q: tensor,
        k: tensor,
        v: tensor,
        angles: AngleAddresses::Steps {
            steps: 4096,
            factors: 8192,
        },
        positions,
        cache: Some(CacheAddresses {
            k: cache,
            v: 1 << 30,
            slots,
            report: 1 << 12,
        }),
        stages: Default::default(),
    };
    let plan = Plan::new(&rope(32, Pairing::HalfSplit), problem).unwrap();
    plan.call(&addresses).map(Option::unwrap)
}

fn mapping() -> RawSlots {
    RawSlots::mapping(Ids::at(1 << 16, IdType::I64, 5))
}

#[test]
fn what_more_than_rotates_is_launched_as_append() {
    let whole = rope(32, Pairing::HalfSplit);
    let heads = Layout::tokens(5, 2, 64);
    let offsets = RawPositions::start(0).cu_seqlens(Ids::at(1 << 16, IdType::I32, 3));
    let plain = Problem::new(Dtype::F16).q(heads).k(heads);
    let family = |problem: &Problem, positions| {
        let call = call(&whole, problem, 4096, positions);
        call.launch(&Target::new(132)).kernel.family
    };
    assert_eq!(family(&plain, RawPositions::start(0)), Family::Rope);
    assert_eq!(family(&plain, offsets), Family::Append);
    // Nothing is stored of keys without heads.
    let none = Layout::tokens(5, 0, 64);
    let empty = KvCacheLayout::k(CacheLayout::paged_nhd(3, 4, 0, 64));
    let problem = Problem::new(Dtype::F16).q(heads).k_to_cache(none);
    let call = appends(
        &problem.cache(empty),
        4096,
        RawPositions::start(0),
        mapping(),
    );
    assert_eq!(call.launch(&Target::new(132)).kernel.family, Family::Rope);
    let with_v = plain.v((heads, heads));
    assert_eq!(family(&with_v, RawPositions::start(0)), Family::Append);
    let cache = CacheLayout::paged_nhd(3, 4, 2, 64);
    for problem in [
        plain.cache(KvCacheLayout::k(cache)),
        Problem::new(Dtype::F16)
            .q(heads)
            .v_to_cache(heads)
            .cache(KvCacheLayout::v(cache)),
    ] {
        let call = appends(&problem, 4096, RawPositions::start(0), mapping());
        assert_eq!(call.launch(&Target::new(132)).kernel.family, Family::Append);
    }
}

#[test]
fn vectors_serve_caches_that_hold_them_whole() {
    let heads = Layout::tokens(5, 2, 64);
    let dense = CacheLayout::paged_nhd(3, 4, 2, 64);
    let packed = |x| CacheLayout::paged_packed(3, 4, 2, 64, x);
    let some = Some(Pairing::HalfSplit);
    for dtype in Dtype::ALL {
        let size = dtype.size() as u64;
        for (layout, at, expected) in [
            (dense, 0, some),
            (dense, 4, some),
            (dense, 1, None),
            (dense, 2, None),
            (dense.with_offset(2), 2, some),
            (dense.with_offset(2), 0, None),
            (CacheLayout::paged_hnd(3, 4, 2, 64), 0, some),
            (dense.with_strides(514, 128, 64), 0, None),
            (dense.with_strides(516 * 2, 130, 64), 0, None),
            (dense.with_strides(516 * 2, 132, 66), 0, None),
            (packed(16), 0, some),
            (packed(4), 0, some),
            (packed(2), 0, None),
            (CacheLayout::paged_transposed(3, 4, 2, 64), 0, None),
            (
                packed(4).with_blocks(4, 18).with_strides(8000, 4, 2000),
                0,
                None,
            ),
        ] {
            // SAFETY: nothing is written at the addresses.
            let problem = unsafe { Problem::new(dtype).q(heads).assume_disjoint() };
            let problem = problem.k_to_cache(heads).cache(KvCacheLayout::k(layout));
            let call = appends(
                &problem,
                4096 + at * size,
                RawPositions::start(0),
                mapping(),
            );
            let kernel = call.launch(&Target::new(132)).kernel;
            assert_eq!(kernel.pairing, expected, "{layout:?} {at}");
        }
    }
    // Strides of one page, slot and head are not walked.
    let one = CacheLayout::paged_nhd(1, 1, 1, 64).with_strides(1, 2, 3);
    let problem = Problem::new(Dtype::F16).k_to_cache(Layout::tokens(5, 1, 64));
    let problem = problem.cache(KvCacheLayout::k(one));
    let call = appends(&problem, 4096, RawPositions::start(0), mapping());
    assert_eq!(call.launch(&Target::new(132)).kernel.pairing, some);
    // A head is carried in whole vectors.
    let odd = Layout::tokens(5, 2, 66).with_strides(0, 160, 80);
    let cache = CacheLayout::paged_nhd(3, 4, 2, 66).with_strides(640, 160, 80);
    let problem = Problem::new(Dtype::F16).k(odd);
    let call = appends(
        &problem.cache(KvCacheLayout::k(cache)),
        4096,
        RawPositions::start(0),
        mapping(),
    );
    assert_eq!(call.launch(&Target::new(132)).kernel.pairing, None);
}

#[test]
fn slots_are_looked_up_before_the_wait_where_they_are_promised() {
    let heads = Layout::tokens(5, 2, 64);
    let cache = KvCacheLayout::k(CacheLayout::paged_nhd(3, 4, 2, 64));
    let problem = Problem::new(Dtype::F16).k_to_cache(heads).cache(cache);
    let ids = |len| Ids::at(1 << 16, IdType::I64, len);
    let start = RawPositions::start(9);
    for (positions, slots) in [
        (start, mapping()),
        (start, RawSlots::sequences(ids(1))),
        (start, RawSlots::page_table(ids(4), ids(1))),
        (
            start.cu_seqlens(ids(2)),
            RawSlots::page_indices(ids(2), ids(7), ids(1)),
        ),
    ] {
        let call = appends(&problem, 4096, positions, slots);
        for (mode, before_wait) in [
            (LaunchMode::Ordinary, 0),
            (LaunchMode::Dependent, 0),
            (LaunchMode::DependentPositionsSettled, 1),
        ] {
            let launch = call.launch(&Target::new(132).with_mode(mode));
            assert_eq!(launch.params.angles_before_wait, before_wait, "{mode:?}");
        }
    }
}

/// Angles may be formed before the wait without a promise, where positions are no ids; weights may not.
#[test]
fn weights_are_read_before_the_wait_where_they_are_promised() {
    let heads = Layout::tokens(5, 2, 64);
    let problem = Problem::new(Dtype::F16)
        .q(heads)
        .q_stages(Stages::new().scale(0.5));
    let rope = rope(32, Pairing::HalfSplit);
    let call = call(&rope, &problem, 4096, RawPositions::start(9));
    for (mode, angles, weights) in [
        (LaunchMode::Ordinary, 0, 0),
        (LaunchMode::Dependent, 1, 0),
        (LaunchMode::DependentPositionsSettled, 1, 1),
    ] {
        let launch = call.launch(&Target::new(132).with_mode(mode));
        assert_eq!(launch.params.angles_before_wait, angles, "{mode:?}");
        let fusion = launch.fusion.unwrap();
        assert_eq!(fusion.weights_before_wait, weights, "{mode:?}");
    }
}

/// Codes are bytes, so vectors of them begin at multiples of 4 bytes: those of values are wider.
#[test]
fn vectors_of_codes_begin_at_multiples_of_their_own() {
    let heads = Layout::tokens(5, 2, 64);
    let rope = rope(32, Pairing::HalfSplit);
    let staged = || {
        Problem::new(Dtype::F16)
            .q((heads, heads))
            .q_stages(Stages::new().scale(0.5))
    };
    let codes = StoredCodes::given(Codes::E4m3, ScaleForm::Divide);
    let coded = || staged().q_codes(codes);
    let scales = StageAddresses {
        scales: Some(VectorAddress {
            address: 1 << 16,
            len: 1,
        }),
        ..StageAddresses::default()
    };
    let pairing = |problem: &Problem, destination, scales| {
        let addresses = Addresses {
            q: TensorAddresses {
                source: 4096,
                destination,
            },
            k: TensorAddresses::default(),
            v: TensorAddresses::default(),
            angles: AngleAddresses::Steps {
                steps: 4096,
                factors: 8192,
            },
            positions: RawPositions::start(9),
            cache: None,
            stages: Some([scales, StageAddresses::default(), StageAddresses::default()]),
        };
        let plan = Plan::new(&rope, problem).unwrap();
        let call = plan.call(&addresses).unwrap().unwrap();
        call.launch(&Target::new(132)).kernel.pairing
    };
    let (some, none) = (Some(Pairing::HalfSplit), None);
    for (offset, of_values, of_codes) in [(0, some, some), (4, none, some), (2, none, none)] {
        let at = (1 << 20) + offset;
        let values = pairing(&staged(), at, StageAddresses::default());
        assert_eq!(values, of_values, "{offset}");
        assert_eq!(pairing(&coded(), at, scales), of_codes, "{offset}");
    }
}

/// Vectors serve stages whose operands begin at multiples of one, each of them.
#[test]
fn vectors_serve_operands_that_begin_at_their_multiples() {
    let heads = Layout::tokens(5, 2, 64);
    let rope = rope(32, Pairing::HalfSplit);
    let stages = Stages::new().bias().norm(HeadNorm::layer(1e-6));
    let problem = Problem::new(Dtype::F16).q(heads).q_stages(stages);
    let plan = Plan::new(&rope, &problem).unwrap();
    let pairing = |bias, weight, norm_bias| {
        let operand = |address, len| Some(VectorAddress { address, len });
        let of_q = StageAddresses {
            bias: operand(bias, 128),
            norm_weight: operand(weight, 64),
            norm_bias: operand(norm_bias, 64),
            scales: None,
        };
        let none = StageAddresses::default();
        let addresses = Addresses {
            q: TensorAddresses {
                source: 4096,
                destination: 4096,
            },
            k: TensorAddresses::default(),
            v: TensorAddresses::default(),
            angles: AngleAddresses::Steps {
                steps: 4096,
                factors: 8192,
            },
            positions: RawPositions::start(9),
            cache: None,
            stages: Some([of_q, none, none]),
        };
        let call = plan.call(&addresses).unwrap().unwrap();
        call.launch(&Target::new(132)).kernel.pairing
    };
    let at = 1 << 16;
    assert_eq!(pairing(at, at, at), Some(Pairing::HalfSplit));
    for [bias, weight, norm_bias] in [[4, 0, 0], [0, 4, 0], [0, 0, 4], [4, 4, 0], [4, 4, 4]] {
        let pairing = pairing(at + bias, at + weight, at + norm_bias);
        assert_eq!(pairing, None, "{bias} {weight} {norm_bias}");
    }
}

/// Also of a tensor without any stage, beside one that has some.
#[test]
fn operands_of_no_stage_are_refused() {
    let heads = Layout::tokens(5, 2, 64);
    let problem = Problem::new(Dtype::F16)
        .q(heads)
        .k(heads)
        .q_stages(Stages::new().scale(0.5));
    let plan = Plan::new(&rope(32, Pairing::HalfSplit), &problem).unwrap();
    let call = |of_k: StageAddresses| {
        let none = StageAddresses::default();
        let tensor = TensorAddresses {
            source: 4096,
            destination: 4096,
        };
        let addresses = Addresses {
            q: tensor,
            k: tensor,
            v: TensorAddresses::default(),
            angles: AngleAddresses::Steps {
                steps: 4096,
                factors: 8192,
            },
            positions: RawPositions::start(9),
            cache: None,
            stages: Some([none, of_k, none]),
        };
        plan.call(&addresses).map(|call| call.is_some())
    };
    assert_eq!(call(StageAddresses::default()), Ok(true));
    let operand = Some(VectorAddress {
        address: 1 << 16,
        len: 128,
    });
    let bias = StageAddresses {
        bias: operand,
        ..StageAddresses::default()
    };
    let weight = StageAddresses {
        norm_weight: operand,
        ..StageAddresses::default()
    };
    for (given, what) in [(bias, "no bias is planned"), (weight, "no norm is planned")] {
        let error = call(given).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    }
}

/// Ids are as many as the sequences and tokens ask for, and no more than kernels count.
#[test]
fn ids_of_caches_are_counted() {
    let heads = Layout::tokens(5, 2, 64);
    let cache = KvCacheLayout::k(CacheLayout::paged_nhd(3, 4, 2, 64));
    let problem = Problem::new(Dtype::F16).k_to_cache(heads).cache(cache);
    let ids = |len| Ids::at(1 << 16, IdType::I64, len);
    // Two sequences.
    let ragged = RawPositions::start(0).cu_seqlens(ids(3));
    let counted = |slots| try_to_append(&problem, 4096, ragged, slots).map(|_| ());
    let fails = |slots, phrase: &str, numbers: [usize; 2]| match counted(slots) {
        Err(Error::SlotsLength {
            what,
            expected,
            got,
        }) => {
            assert!(what.contains(phrase), "{what}");
            assert_eq!([expected, got], numbers, "{what}");
        }
        other => panic!("{phrase}: {other:?}"),
    };
    assert_eq!(counted(mapping()), Ok(()));
    fails(RawSlots::mapping(ids(4)), "slots", [5, 4]);
    assert_eq!(counted(RawSlots::page_table(ids(6), ids(2))), Ok(()));
    fails(RawSlots::page_table(ids(7), ids(2)), "pages", [6, 7]);
    fails(RawSlots::page_table(ids(6), ids(3)), "lengths", [2, 3]);
    assert_eq!(
        counted(RawSlots::page_indices(ids(3), ids(9), ids(2))),
        Ok(())
    );
    fails(
        RawSlots::page_indices(ids(2), ids(9), ids(2)),
        "offsets",
        [3, 2],
    );
    fails(
        RawSlots::page_indices(ids(3), ids(9), ids(1)),
        "lengths",
        [2, 1],
    );
    assert_eq!(counted(RawSlots::sequences(ids(2))), Ok(()));
    fails(RawSlots::sequences(ids(5)), "lengths", [2, 5]);
    let most = u32::MAX as usize;
    for (indices, fits) in [(most, true), (most + 1, false)] {
        let table = RawSlots::page_table(ids(2 * indices), ids(2));
        let list = RawSlots::page_indices(ids(3), ids(indices), ids(2));
        for slots in [table, list] {
            match fits {
                true => assert_eq!(counted(slots), Ok(())),
                false => fails(slots, "2^32", [most, most + 1]),
            }
        }
    }
    // Sequences of a ragged batch, in 31 bits.
    let most = i32::MAX as usize;
    for (sequences, fits) in [(most, true), (most + 1, false)] {
        let positions = RawPositions::start(0).cu_seqlens(ids(sequences + 1));
        match try_to_append(&problem, 4096, positions, mapping()) {
            Ok(call) => {
                assert!(fits);
                assert_eq!(call.params.sequences.count as usize, sequences);
            }
            Err(error) => {
                assert!(!fits);
                assert!(error.to_string().contains("2^31"), "{error}");
            }
        }
    }
}

#[test]
fn heads_too_wide_for_a_grid_are_refused() {
    for (dims, fits) in [(2 * 64 * 65_535, true), (2 * 64 * 65_535 + 2, false)] {
        let heads = Layout::tokens(5, 1, dims);
        let problem = Problem::new(Dtype::F16).q(heads);
        let plan = Plan::new(&rope(32, Pairing::HalfSplit), &problem).unwrap();
        let addresses = Addresses {
            q: TensorAddresses {
                source: 4096,
                destination: 4096,
            },
            k: TensorAddresses::default(),
            v: TensorAddresses::default(),
            angles: AngleAddresses::Steps {
                steps: 4096,
                factors: 8192,
            },
            positions: RawPositions::start(0).cu_seqlens(Ids::at(1 << 16, IdType::I32, 2)),
            cache: None,
            stages: Default::default(),
        };
        match plan.call(&addresses) {
            Ok(call) => {
                assert!(fits);
                let grid = call.unwrap().launch(&Target::new(132)).grid;
                assert!(grid[2] <= 65_535);
            }
            Err(error) => {
                assert!(!fits);
                assert!(matches!(error, Error::LayoutTooLarge { .. }), "{error}");
            }
        }
    }
}

#[test]
fn kernels_have_names_and_vectors_of_their_own() {
    let mut names = HashSet::new();
    for (family, family_name) in Family::ALL.into_iter().zip(["rope", "append", "fused"]) {
        for dtype in Dtype::ALL {
            let kernels = Kernel::all(family, dtype);
            assert_eq!(kernels.len(), Kernel::PER_MODULE);
            for (index, kernel) in kernels.into_iter().enumerate() {
                assert_eq!((kernel.index(), kernel.dtype), (index, dtype));
                assert_eq!(kernel.family, family);
                let vector = if kernel.pairing.is_some() { 4 } else { 1 };
                assert_eq!(kernel.vector(), vector);
                let pairing = match kernel.pairing {
                    Some(Pairing::HalfSplit) => "half_split",
                    Some(Pairing::Interleaved) => "interleaved",
                    None => "any",
                };
                let name = kernel.name();
                assert_eq!(name, format!("{family_name}_{dtype}_{pairing}"));
                names.insert(name);
            }
        }
    }
    assert_eq!(names.len(), 27);
}
