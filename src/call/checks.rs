//! What a call says of itself, held to its plan.

use super::{
    Addresses, AngleAddresses, Call, PHASOR_ROW_BY_POSITION, PHASOR_ROW_IDS, PHASOR_ROW_OF_CALL,
    PhasorCall, PhasorFusion, PhasorIds, PhasorStages, RawPositions, TensorAddresses,
};
use crate::{
    CacheLayout, Dtype, Frequencies, InOut, KvCacheLayout, Layout, Pairing, Plan, Problem, Rope,
    Stages,
};
use std::mem::offset_of;

fn call(problem: &Problem, pairs: usize) -> (Plan, Call) {
    let frequencies = Frequencies::from_theta(1e4, 2 * pairs).unwrap();
    let rope = Rope::new(frequencies, Pairing::HalfSplit);
    let plan = Plan::new(&rope, problem).unwrap();
    let addresses = Addresses {
        q: TensorAddresses::default(),
        k: TensorAddresses::default(),
        v: TensorAddresses::default(),
        angles: AngleAddresses::Steps {
            steps: 4096,
            factors: 4096,
        },
        positions: RawPositions::start(3),
        cache: None,
        stages: Default::default(),
    };
    let call = plan.call(&addresses).unwrap().unwrap();
    (plan, call)
}

#[test]
fn bytes_and_places_are_those_of_the_plan() {
    let layout = |heads| Layout::bshd(2, 3, heads, 80);
    let in_place = |heads| InOut::from(layout(heads));
    let copied = |heads| InOut::from((layout(heads), layout(heads)));
    for dtype in Dtype::ALL {
        let plain = Problem::new(dtype);
        for (problem, all_in_place) in [
            (plain.q(in_place(5)), 1),
            (plain.k(in_place(5)), 1),
            (plain.q(copied(5)), 0),
            (plain.q(in_place(5)).k(in_place(7)), 1),
            (plain.q(in_place(5)).k(copied(7)), 0),
            (plain.q(copied(5)).k(in_place(7)), 0),
            (plain.q(copied(5)).k(copied(7)), 0),
        ] {
            let (plan, call) = call(&problem, 32);
            assert_eq!(call.bytes(4), plan.bytes(), "{problem:?}");
            assert_eq!(call.params.in_place, all_in_place, "{problem:?}");
        }
    }
}

#[test]
fn all_bytes_are_a_kernels() {
    let (_, call) = call(&Problem::new(Dtype::F32).q(Layout::bshd(2, 3, 5, 64)), 32);
    let params = &call.params;
    let bytes = params.as_bytes();
    assert_eq!(bytes.len(), size_of::<PhasorCall>());
    let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
    assert_eq!(word(offset_of!(PhasorCall, batch)), 2);
    assert_eq!(word(offset_of!(PhasorCall, tokens)), 3);
    let mut fusion = PhasorFusion::default();
    fusion.v.present = 7;
    let bytes = fusion.as_bytes();
    assert_eq!(bytes.len(), size_of::<PhasorFusion>());
    let at = offset_of!(PhasorFusion, v) + offset_of!(PhasorStages, present);
    assert_eq!(bytes[at..at + 4], 7u32.to_ne_bytes());
}

#[test]
fn rows_of_a_table_end() {
    let (_, call) = call(&Problem::new(Dtype::F32).q(Layout::tokens(1, 1, 64)), 32);
    let mut params = call.params;
    params.rows.count = 5;
    for (position, expected) in [
        (0, (0, true)),
        (1, (1, true)),
        (4, (4, true)),
        (5, (4, false)),
        (-1, (0, false)),
        (i64::MAX, (4, false)),
        (i64::MIN, (0, false)),
    ] {
        assert_eq!(params.table_row(position), expected, "{position}");
    }
}

/// Two sequences of three tokens, 5 heads of 80 dims, of which 64 rotate: 2 * 6 * 5 bytes of each dim and
/// byte of an element.
#[test]
fn bytes_are_those_of_dims_that_move() {
    let frequencies = Frequencies::from_theta(1e4, 64).unwrap();
    let rope = Rope::new(frequencies, Pairing::HalfSplit);
    let heads = Layout::bshd(2, 3, 5, 80);
    let problem = Problem::new(Dtype::F16).q(Layout::bshd(2, 3, 0, 80));
    let cache = CacheLayout::flat(6, 5, 80);
    let scale = Stages::new().scale(0.5);
    for (problem, dims) in [
        (problem.k(heads), 64),
        (problem.k((heads, heads)), 80),
        (problem.k(heads).cache(KvCacheLayout::k(cache)), 80),
        (problem.v(heads), 0),
        (problem.v(heads).cache(KvCacheLayout::v(cache)), 80),
        (problem.k(heads).k_stages(scale), 3 * 80),
    ] {
        let plan = Plan::new(&rope, &problem).unwrap();
        let mut call = plan.unfilled();
        call.fusion = plan.fusion;
        assert_eq!(call.bytes(3), 60 * dims * 2, "{problem:?}");
    }
}

/// Rows that a device finds are those that there are, as `rows_of_a_table_end` has it of tables.
#[test]
fn rows_of_frequencies_end() {
    let (_, call) = call(&Problem::new(Dtype::F32).q(Layout::tokens(1, 1, 64)), 32);
    let mut params = call.params;
    params.rows.count = 5;
    // SAFETY: the call has no ids but those that are given here.
    let row = |params: &PhasorCall, position| unsafe {
        params.row(&params.token(0, 0).unwrap(), position)
    };
    params.angles.row_choice = PHASOR_ROW_OF_CALL;
    for (given, expected) in [(0, 0), (4, 4), (5, 4), (u32::MAX, 4)] {
        params.rows.row = given;
        assert_eq!(row(&params, 0), expected);
    }
    params.angles.row_choice = PHASOR_ROW_IDS;
    for (given, expected) in [(0i64, 0), (4, 4), (5, 4), (-1, 4), (1 << 32, 4)] {
        params.rows.ids = PhasorIds::of(
            &crate::Ids::at(
                (&raw const given).expose_provenance() as u64,
                crate::IdType::I64,
                1,
            ),
            0,
            0,
        );
        assert_eq!(row(&params, 0), expected);
    }
    params.angles.row_choice = PHASOR_ROW_BY_POSITION;
    params.rows.boundary = 7;
    for (count, position, expected) in [(2, 6, 0), (2, 7, 1), (2, 8, 1), (1, 8, 0)] {
        params.rows.count = count;
        assert_eq!(row(&params, position), expected);
    }
}
