//! What a call says of itself, held to its plan.

use super::{Addresses, AngleAddresses, Call, PhasorCall, RawPositions, TensorAddresses};
use crate::{Dtype, Frequencies, InOut, Layout, Pairing, Plan, Problem, Rope};
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
