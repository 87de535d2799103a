//! Every error that the host can give, and what its message tells to change.

mod support;

use phasor::call::{Addresses, AngleAddresses, RawPositions, TensorAddresses};
use phasor::config::RopeConfig;
use phasor::launch::Target;
use phasor::{
    CosSinTable, Device, Dtype, Error, Frequencies, Host, HostRotator, IdType, Ids, InOut, Isa,
    Layout, OutOfRange, Pairing, Plan, PositionKind, Positions, Problem, Rope, TensorName,
};
use proptest::prelude::*;
use support::cases::config;

/// The error, whose message must hold every phrase.
#[track_caller]
fn fails<T>(result: Result<T, Error>, phrases: &[&str]) -> Error {
    let Err(error) = result else {
        panic!("no error; its message would hold {phrases:?}");
    };
    let message = error.to_string();
    for phrase in phrases {
        assert!(message.contains(phrase), "{phrase:?} is not in {message:?}");
    }
    error
}

fn rope(rotary_dim: usize) -> Rope {
    let frequencies = Frequencies::from_theta(10_000.0, rotary_dim).unwrap();
    Rope::new(frequencies, Pairing::HalfSplit)
}

fn rotator(rotary_dim: usize) -> HostRotator {
    Host::new().rotator(&rope(rotary_dim))
}

fn f32s() -> Problem {
    Problem::new(Dtype::F32)
}

#[test]
fn rotary_dims() {
    let phrases = &["must be even", "at least 2", "at most 2^22"];
    let most = 1 << 22;
    for rotary_dim in [0, 1, 3, 127, most + 1, most + 2, usize::MAX, usize::MAX - 1] {
        let error = fails(Frequencies::from_theta(1e4, rotary_dim), phrases);
        assert_eq!(error, Error::RotaryDim { rotary_dim });
    }
    let none = Error::RotaryDim { rotary_dim: 0 };
    assert_eq!(fails(Frequencies::from_inv_freq(&[]), phrases), none);
    assert_eq!(fails(Frequencies::from_steps(vec![]), phrases), none);
    for pairs in [0, most / 2 + 1, usize::MAX / 2 + 1, usize::MAX] {
        let error = fails(CosSinTable::new(vec![1.0], vec![0.0], pairs), phrases);
        let rotary_dim = pairs.saturating_mul(2);
        assert_eq!(error, Error::RotaryDim { rotary_dim });
    }
}

#[test]
fn thetas() {
    let below = 2f64.powi(-32).next_down();
    for theta in [
        0.0,
        -0.0,
        -1.0,
        -10_000.0,
        f64::INFINITY,
        f64::NEG_INFINITY,
        below,
        5e-324,
    ] {
        let error = fails(
            Frequencies::from_theta(theta, 8),
            &["must be finite", "10000 is usual"],
        );
        assert_eq!(error, Error::Theta { theta });
    }
    let error = fails(Frequencies::from_theta(f64::NAN, 8), &["theta is NaN"]);
    assert!(matches!(error, Error::Theta { theta } if theta.is_nan()));
    for theta in [2f64.powi(-32), 1.0, f64::MAX] {
        assert!(Frequencies::from_theta(theta, 8).is_ok());
    }
}

#[test]
fn thetas_that_stand_for_dims() {
    let exchanged = |theta, rotary_dim| Error::Exchanged { theta, rotary_dim };
    let phrases = &[
        "theta is 64 and rotary_dim is 10000",
        "look exchanged",
        "Frequencies::from_theta(10000.0, 64)",
        "Frequencies::from_inv_freq",
    ];
    let error = fails(Frequencies::from_theta(64.0, 10_000), phrases);
    assert_eq!(error, exchanged(64.0, 10_000));
    let error = fails(Frequencies::from_theta_scaled(64.0, 10_000, 0.5), phrases);
    assert_eq!(error, exchanged(64.0, 10_000));
    for (theta, rotary_dim) in [(2.0, 514), (512.0, 1_000_001), (128.0, usize::MAX)] {
        let result = Frequencies::from_theta(theta, rotary_dim);
        assert_eq!(result, Err(exchanged(theta, rotary_dim)));
    }
    // Every model's are far from that, and so is what cannot be a number of dims.
    for (theta, rotary_dim) in [
        (10_000.0, 64),
        (100.0, 72),
        (2.0, 512),
        (514.0, 10_000),
        (0.5, 514),
        (1.0, 514),
        (3.0, 514),
        (64.5, 514),
    ] {
        assert!(Frequencies::from_theta(theta, rotary_dim).is_ok());
        assert!(RopeConfig::new(theta, rotary_dim).is_ok());
    }
    let error = RopeConfig::new(64.0, 10_000).unwrap_err().to_string();
    assert!(error.contains("rope_theta is 64"), "{error}");
    assert!(error.contains("above head_dim, which is 10000: the two look exchanged"));
    // Before the limit of head_dim, which would not tell what is wrong.
    let error = RopeConfig::new(128.0, 500_000).unwrap_err().to_string();
    assert!(error.contains("look exchanged"), "{error}");
}

#[test]
fn frequencies() {
    let above = 4294967296f64.next_up();
    for value in [above, -above, f64::INFINITY, f64::NEG_INFINITY, f64::MAX] {
        let frequencies = Frequencies::from_inv_freq(&[1.0, 0.5, value, f64::NAN]);
        let error = fails(
            frequencies,
            &["inv_freq[2]", "radians per position", "at most 2^32"],
        );
        assert_eq!(error, Error::InvFreq { pair: 2, value });
    }
    let error = fails(
        Frequencies::from_inv_freq(&[f64::NAN]),
        &["inv_freq[0] is NaN"],
    );
    assert!(matches!(error, Error::InvFreq { pair: 0, .. }));
    assert!(Frequencies::from_inv_freq(&[4294967296.0, -4294967296.0, 0.0]).is_ok());
}

#[test]
fn attention_factors() {
    let frequencies = Frequencies::from_theta(1e4, 8).unwrap();
    for factor in [0.0, -0.0, -1.0, f32::INFINITY, f32::NEG_INFINITY] {
        let error = fails(
            frequencies.clone().with_attention_factor(factor),
            &["attention_factor", "must be positive and finite"],
        );
        assert_eq!(error, Error::AttentionFactor { factor });
    }
    let error = fails(frequencies.with_attention_factor(f32::NAN), &["is NaN"]);
    assert!(matches!(error, Error::AttentionFactor { .. }));
}

#[test]
fn table_shapes() {
    for (cos, sin, pairs) in [
        (0, 0, 4),
        (4, 8, 4),
        (8, 4, 4),
        (6, 6, 4),
        (4, 0, 4),
        (2, 2, 4),
    ] {
        let table = CosSinTable::new(vec![1.0; cos], vec![0.0; sin], pairs);
        let error = fails(table, &["[rows, rotary_dim / 2]", "at least one row"]);
        assert_eq!(error, Error::TableShape { cos, sin, pairs });
    }
}

#[test]
fn tables_of_no_or_too_many_positions() {
    let frequencies = Frequencies::from_theta(1e4, 8).unwrap();
    let error = fails(frequencies.table([]), &["at least one row"]);
    let (cos, sin, pairs) = (0, 0, 4);
    assert_eq!(error, Error::TableShape { cos, sin, pairs });
    // Neither a count that overflows nor one that no memory holds, and at once.
    for end in [1 << 32, 1 << 50, i64::MAX] {
        let error = fails(
            frequencies.table(0..end),
            &["too large for memory", "give fewer positions"],
        );
        let rows = end as usize;
        assert_eq!(error, Error::TableTooLarge { rows, pairs });
    }
    fails(frequencies.table(0..), &["too large for memory"]);
}

#[test]
fn rotated_windows() {
    for (head_dim, rotary_offset) in [(6, 0), (0, 0), (8, 2), (9, 2), (16, 1), (16, 3), (16, 10)] {
        let layout = Layout::tokens(1, 1, head_dim).with_rotary_offset(rotary_offset);
        for (problem, tensor) in [
            (f32s().q(layout), TensorName::Q),
            (f32s().k(layout), TensorName::K),
            (f32s().k((layout, layout)), TensorName::K),
        ] {
            let error = fails(
                rotator(8).plan(&problem),
                &[
                    &format!("{tensor}: "),
                    "offset must be even",
                    "at most head_dim",
                ],
            );
            let expected = Error::RotaryWindow {
                tensor,
                rotary_offset,
                rotary_dim: 8,
                head_dim,
            };
            assert_eq!(error, expected);
        }
    }
    let layout = Layout::tokens(1, 1, 8).with_rotary_offset(usize::MAX - 1);
    fails(rotator(8).plan(&f32s().q(layout)), &["does not fit"]);
    let fits = Layout::tokens(1, 1, 17).with_rotary_offset(8);
    assert!(rotator(8).plan(&f32s().q(fits)).is_ok());
}

#[test]
fn shapes_that_must_agree() {
    let q = Layout::bshd(2, 3, 4, 8);
    for k in [
        Layout::bshd(1, 3, 4, 8),
        Layout::bshd(2, 4, 4, 8),
        Layout::bshd(3, 2, 4, 8),
    ] {
        let error = fails(
            rotator(8).plan(&f32s().q(q).k(k)),
            &[
                "q and k must agree in batch and tokens",
                &format!(
                    "[batch, tokens, heads, head_dim] is [2, 3, 4, 8] against {:?}",
                    k.shape()
                ),
            ],
        );
        assert!(matches!(error, Error::ShapeMismatch { .. }));
    }
    // Heads and head_dim need not agree.
    assert!(
        rotator(8)
            .plan(&f32s().q(q).k(Layout::bshd(2, 3, 1, 10)))
            .is_ok()
    );

    let wide = Layout::bshd(2, 3, 4, 10);
    for (source, destination) in [
        (q, Layout::bshd(2, 3, 3, 8)),
        (q, Layout::bshd(3, 2, 4, 8)),
        (q, wide),
    ] {
        let error = fails(
            rotator(8).plan(&f32s().k((source, destination))),
            &[
                "source and destination must agree in shape",
                "[batch, tokens, heads, head_dim] is [2, 3, 4, ",
            ],
        );
        assert!(matches!(error, Error::ShapeMismatch { .. }));
    }
    let error = fails(
        rotator(8).plan(&f32s().k((wide, wide.with_rotary_offset(2)))),
        &["rotary_offset is 0 in the source and 2 in the destination"],
    );
    assert!(matches!(error, Error::RotaryOffsetMismatch { .. }));
}

#[test]
fn layouts_that_are_too_large() {
    let huge = usize::MAX;
    for layout in [
        Layout::bshd(huge, 1, 1, 8),
        Layout::bshd(1, huge, 1, 8),
        Layout::bshd(1, 1, huge, 8),
        Layout::bshd(1, 1, 1, huge),
        Layout::bshd(huge, huge, huge, huge),
        Layout::bhsd(huge, huge, huge, huge),
        Layout::tokens(1 << 31, 1, 8),
        Layout::bshd(1 << 16, 1 << 15, 1, 8),
        Layout::tokens(1, 1 << 28, 8),
        Layout::tokens(1, 1, 1 << 28),
        Layout::tokens(2, 1, 8).with_strides(0, huge, 0),
        Layout::tokens(2, 1, 8).with_strides(0, 1 << 62, 0),
        Layout::tokens(1, 1, 8).with_offset(huge),
        Layout::tokens(1, 1, 8).with_offset(huge - 8),
        Layout::packed_heads(1, 1, huge, 8, huge - 1..huge),
    ] {
        let error = fails(
            rotator(8).plan(&f32s().k(layout)),
            &[
                "k: the layout is too large",
                "below 2^63",
                "below 2^28",
                "tokens of the whole batch below 2^31",
            ],
        );
        assert_eq!(
            error,
            Error::LayoutTooLarge {
                tensor: TensorName::K
            }
        );
    }
    // A source may repeat elements, but the work is counted all the same.
    let many = Layout::bshd(1 << 15, 1 << 15, 1 << 27, 64);
    let source = many.with_strides(0, 0, 0);
    fails(
        rotator(8).plan(&f32s().q((source, source))),
        &["q: the layout is too large"],
    );
    // Just below each limit; nothing is allocated for a plan.
    for layout in [
        Layout::tokens(1, (1 << 28) - 1, 8),
        Layout::tokens(1, 1, (1 << 28) - 1),
        Layout::tokens((1 << 31) - 1, 1, 8),
        Layout::bshd((1 << 15) - 1, 1 << 16, 1, 8),
        Layout::tokens(2, 1, 8).with_strides(0, 1 << 60, 0),
    ] {
        assert!(rotator(8).plan(&f32s().q(layout)).is_ok());
    }
}

#[test]
fn layouts_that_overlap_themselves() {
    let layout = Layout::bshd(2, 3, 4, 8);
    for strides in [
        [96, 32, 7], // heads
        [96, 7, 8],  // tokens
        [0, 32, 8],  // sequences on top of each other
        [96, 32, 0], // heads on top of each other
    ] {
        let [batch, sequence, head] = strides;
        let overlapping = layout.with_strides(batch, sequence, head);
        for problem in [f32s().q(overlapping), f32s().q((layout, overlapping))] {
            let error = fails(
                rotator(8).plan(&problem),
                &[
                    "q: the layout writes some elements twice",
                    "make each stride",
                ],
            );
            assert_eq!(
                error,
                Error::SelfOverlap {
                    tensor: TensorName::Q
                }
            );
            // Nobody can vouch for what is certain.
            // SAFETY: nothing is rotated by a plan that is refused.
            let vouched = unsafe { problem.assume_disjoint() };
            assert_eq!(rotator(8).plan(&vouched).unwrap_err(), error);
        }
        // Reading twice is fine.
        assert!(rotator(8).plan(&f32s().q((overlapping, layout))).is_ok());
    }
    // In place only the rotated dims are written: heads may be closer than head_dim.
    let close = Layout::tokens(1, 4, 8).with_strides(0, 0, 4);
    assert!(rotator(4).plan(&f32s().q(close)).is_ok());
    fails(
        rotator(4).plan(&f32s().q((close, close))),
        &["q: the layout writes"],
    );
}

#[test]
fn windows_that_overlap() {
    let packed = |range| Layout::packed_heads(2, 5, 12, 8, range);
    let share = &["share elements of the buffer", "move one by its offset"];
    let (q, k) = (packed(0..8), packed(8..10));
    assert!(rotator(8).plan(&f32s().q(q).k(k).one_buffer()).is_ok());
    for k in [packed(7..9), packed(0..8), packed(4..5), k.with_offset(63)] {
        let error = fails(rotator(8).plan(&f32s().q(q).k(k).one_buffer()), share);
        assert_eq!(
            error,
            Error::Overlap {
                first: "q",
                second: "k"
            }
        );
        // Buffers of their own cannot overlap.
        assert!(rotator(8).plan(&f32s().q(q).k(k)).is_ok());
        // SAFETY: nothing is rotated by a plan that is refused.
        let vouched = unsafe { f32s().q(q).k(k).one_buffer().assume_disjoint() };
        assert_eq!(rotator(8).plan(&vouched).unwrap_err(), error);
    }
    // A source on its own destination is a case for in place.
    let error = fails(
        rotator(8).plan(&f32s().q((q, q)).one_buffer()),
        &["in place with equal"],
    );
    assert_eq!(
        error,
        Error::Overlap {
            first: "q's destination",
            second: "q's source"
        }
    );
    // What k reads must not be written by q, even in dims that do not rotate.
    let far = packed(0..2).with_offset(10_000);
    let problem = f32s().q(q).k((packed(6..8), far)).one_buffer();
    let error = fails(rotator(8).plan(&problem), share);
    assert_eq!(
        error,
        Error::Overlap {
            first: "q",
            second: "k's source"
        }
    );
    let problem = f32s()
        .q((q, q.with_offset(10_000)))
        .k(packed(1..2).with_offset(10_000))
        .one_buffer();
    let error = fails(rotator(8).plan(&problem), share);
    assert_eq!(
        error,
        Error::Overlap {
            first: "q's destination",
            second: "k"
        }
    );
    // Both may read the same.
    let problem = f32s()
        .q((q, q.with_offset(10_000)))
        .k((q, q.with_offset(20_000)));
    assert!(rotator(8).plan(&problem.one_buffer()).is_ok());
}

#[test]
fn strides_that_do_not_nest() {
    // Tokens 12 apart, heads 40 apart: nothing says that they miss each other.
    let crossing = Layout::tokens(5, 3, 8).with_strides(0, 12, 40);
    let cannot = &[
        "cannot prove",
        "order the strides",
        "Problem::assume_disjoint",
    ];
    let error = fails(rotator(8).plan(&f32s().q(crossing)), cannot);
    assert_eq!(error, Error::OverlapUnknown { what: "q" });
    let error = fails(rotator(8).plan(&f32s().k((crossing, crossing))), cannot);
    assert_eq!(
        error,
        Error::OverlapUnknown {
            what: "k's destination"
        }
    );
    // SAFETY: nothing is rotated here.
    let vouched = unsafe { f32s().q(crossing).assume_disjoint() };
    assert!(rotator(8).plan(&vouched).is_ok());
    // Reading needs no proof.
    assert!(
        rotator(8)
            .plan(&f32s().q((crossing, Layout::tokens(5, 3, 8))))
            .is_ok()
    );
    // Unless what is read may be written: in one buffer it is asked for again.
    let plain = Layout::tokens(5, 3, 8).with_offset(30);
    let error = fails(
        rotator(8).plan(&f32s().q((crossing, plain)).one_buffer()),
        cannot,
    );
    assert_eq!(error, Error::OverlapUnknown { what: "q's source" });
    let far = plain.with_offset(1000);
    assert!(
        rotator(8)
            .plan(&f32s().q((crossing, far)).one_buffer())
            .is_ok()
    );
}

/// Calls q and k in place, in buffers of the given lengths.
fn call(
    rotator: &HostRotator,
    plan: &Plan,
    q: Option<usize>,
    k: Option<usize>,
    positions: Positions<'_>,
) -> Result<(), Error> {
    let (mut q_data, mut k_data) = (vec![2.5f32; q.unwrap_or(0)], vec![2.5f32; k.unwrap_or(0)]);
    let result = rotator.rotate(
        plan,
        q.map(|_| InOut::InPlace(&mut q_data[..])),
        k.map(|_| InOut::InPlace(&mut k_data[..])),
        positions,
    );
    if result.is_err() {
        // Nothing is written, in q either where k is at fault.
        assert!(q_data.iter().chain(&k_data).all(|&x| x == 2.5));
    }
    result
}

#[test]
fn buffers_that_are_too_short() {
    let rotator = rotator(8);
    let (q, k) = (
        Layout::tokens(3, 2, 8),
        Layout::tokens(3, 1, 8).with_offset(5),
    );
    let plan = rotator.plan(&f32s().q(q).k(k)).unwrap();
    let start = Positions::start(1);
    assert_eq!(call(&rotator, &plan, Some(48), Some(29), start), Ok(()));
    assert_eq!(call(&rotator, &plan, Some(63), Some(36), start), Ok(()));
    for (q, k, what, needed, got) in [
        (47, 29, "q", 48, 47),
        (48, 28, "k", 29, 28),
        (0, 0, "q", 48, 0),
    ] {
        let result = call(&rotator, &plan, Some(q), Some(k), start);
        let phrase = format!("{what}: the buffer has {got} elements, the layout needs {needed}");
        let error = fails(result, &[&phrase]);
        assert_eq!(error, Error::BufferTooShort { what, needed, got });
    }

    let plan = rotator.plan(&f32s().k((q, q.with_offset(1)))).unwrap();
    for (from, to, what) in [(47, 49, "k's source"), (48, 48, "k's destination")] {
        let (source, mut destination) = (vec![1.0f32; from], vec![2.5f32; to]);
        let k = (&source[..], &mut destination).into();
        fails(
            rotator.rotate(&plan, None, Some(k), start),
            &[what, "the layout needs"],
        );
        assert!(destination.iter().all(|&x| x == 2.5));
    }

    let packed = |range| Layout::packed_heads(1, 2, 4, 8, range);
    let problem = f32s().q(packed(0..2)).k(packed(2..3)).one_buffer();
    let plan = rotator.plan(&problem).unwrap();
    let mut buffer = [2.5f32; 56];
    assert_eq!(rotator.rotate_one_buffer(&plan, &mut buffer, start), Ok(()));
    let mut buffer = [2.5f32; 55];
    let error = fails(
        rotator.rotate_one_buffer(&plan, &mut buffer, start),
        &["k: the buffer"],
    );
    assert!(matches!(
        error,
        Error::BufferTooShort {
            needed: 56,
            got: 55,
            ..
        }
    ));
    assert_eq!(buffer, [2.5; 55]);
}

#[test]
fn operands_of_another_form() {
    let rotator = rotator(8);
    let layout = Layout::tokens(1, 1, 8);
    let start = Positions::start(1);
    let only_q = rotator.plan(&f32s().q(layout)).unwrap();
    let both = rotator.plan(&f32s().q(layout).k(layout)).unwrap();
    for (plan, q, k, phrase) in [
        (
            &only_q,
            None,
            None,
            "the plan has q in place, the call has it absent",
        ),
        (
            &only_q,
            Some(8),
            Some(8),
            "the plan has k absent, the call has it in place",
        ),
        (
            &only_q,
            None,
            Some(8),
            "the plan has q in place, the call has it absent",
        ),
        (
            &both,
            Some(8),
            None,
            "the plan has k in place, the call has it absent",
        ),
    ] {
        let error = fails(call(&rotator, plan, q, k, start), &[phrase]);
        assert!(matches!(error, Error::OperandMismatch { .. }));
    }
    let out_of_place = rotator.plan(&f32s().q((layout, layout))).unwrap();
    let result = call(&rotator, &out_of_place, Some(8), None, start);
    fails(result, &["has q out of place, the call has it in place"]);
    let (source, mut destination) = ([1.0f32; 8], [2.5f32; 8]);
    let q = (&source[..], &mut destination[..]).into();
    let result = rotator.rotate(&only_q, Some(q), None, start);
    fails(result, &["has q in place, the call has it out of place"]);

    let one_buffer = rotator.plan(&f32s().q(layout).one_buffer()).unwrap();
    let result = call(&rotator, &one_buffer, Some(8), None, start);
    fails(
        result,
        &["the plan is over one buffer", "call rotate_one_buffer"],
    );
    let result = rotator.rotate_one_buffer(&only_q, &mut destination, start);
    fails(
        result,
        &["the plan is over separate buffers", "Problem::one_buffer"],
    );
    assert_eq!(destination, [2.5; 8]);
}

#[test]
fn elements_of_another_type() {
    let rotator = rotator(8);
    let plan = rotator
        .plan(&Problem::new(Dtype::Bf16).q(Layout::tokens(1, 1, 8)))
        .unwrap();
    let result = call(&rotator, &plan, Some(8), None, Positions::start(0));
    let error = fails(result, &["made for bf16, the buffers hold f32"]);
    let (planned, given) = (Dtype::Bf16, Dtype::F32);
    assert_eq!(error, Error::DtypeMismatch { planned, given });
    let mut x = [phasor::half::f16::ONE; 8];
    let q = Some(InOut::InPlace(&mut x[..]));
    fails(
        rotator.rotate(&plan, q, None, Positions::start(0)),
        &["the buffers hold f16"],
    );
    let plan = rotator
        .plan(&f32s().q(Layout::tokens(1, 1, 8)).one_buffer())
        .unwrap();
    let result = rotator.rotate_one_buffer(&plan, &mut x, Positions::start(0));
    fails(
        result,
        &[
            "made for f32, the buffers hold f16",
            "Problem::new(Dtype::F16)",
        ],
    );
}

/// Tokens of several sequences that are packed as one, with a start or a shift for each of them.
#[test]
fn a_position_per_sequence_of_packed_sequences() {
    let rotator = rotator(8);
    let packed = Layout::tokens(6, 1, 8);
    let batch = Layout::bshd(2, 3, 1, 8);
    let advice = "packed as one, give the position of each token";
    let ids = [0i64, 5, 9];
    for (kind, given) in [
        (
            PositionKind::StartPerSequence,
            Positions::start_per_sequence(&ids),
        ),
        (PositionKind::PerSequence, Positions::per_sequence(&ids)),
    ] {
        let plan = rotator.plan(&f32s().q(packed)).unwrap();
        let result = call(&rotator, &plan, Some(48), None, given);
        let error = fails(
            result,
            &["3 positions given, give 1", advice, "Positions::per_token"],
        );
        let (expected, got) = (1, 3);
        assert_eq!(
            error,
            Error::PositionsLength {
                expected,
                got,
                kind
            }
        );
        // Where there are several sequences they are counted wrong, or there is no position at all.
        let plan = rotator.plan(&f32s().q(batch)).unwrap();
        let error = call(&rotator, &plan, Some(48), None, given).unwrap_err();
        assert!(!error.to_string().contains("packed"), "{error}");
    }
    let result = Error::PositionsLength {
        expected: 1,
        got: 0,
        kind: PositionKind::StartPerSequence,
    };
    assert!(!result.to_string().contains("packed"));
}

#[test]
fn positions_of_another_number() {
    use PositionKind::{PerAxis, PerSequence, PerToken, PerTokenShared, Start, StartPerSequence};
    let rotator = rotator(8);
    // One plan serves all kinds.
    let plan = rotator.plan(&f32s().q(Layout::bshd(2, 3, 1, 8))).unwrap();
    let ids = [1i64; 9];
    let given = |kind, n: usize| match kind {
        StartPerSequence => Positions::start_per_sequence(&ids[..n]),
        PerSequence => Positions::per_sequence(&ids[..n]),
        PerToken => Positions::per_token(&ids[..n]),
        PerTokenShared => Positions::per_token_shared(&ids[..n]),
        PerAxis => Positions::per_axis(&ids[..n]),
        _ => Positions::start(1),
    };
    for (kind, expected, phrase) in [
        (StartPerSequence, 2, "one start per sequence of the batch"),
        (PerSequence, 2, "one position per sequence of the batch"),
        (PerToken, 6, "one position per token"),
        (PerTokenShared, 3, "one position per token of a sequence"),
        (PerAxis, 6, "one position per axis and token"),
    ] {
        assert_eq!(given(kind, 0).kind(), kind);
        for got in 0..ids.len() {
            let result = call(&rotator, &plan, Some(48), None, given(kind, got));
            if got == expected {
                assert_eq!(result, Ok(()));
                continue;
            }
            let counts = format!("{got} positions given, give {expected}: {phrase}");
            let error = Error::PositionsLength {
                expected,
                got,
                kind,
            };
            assert_eq!(fails(result, &[&counts]), error);
        }
    }
    let start = given(Start, 0);
    assert_eq!(call(&rotator, &plan, Some(48), None, start), Ok(()));
}

#[test]
fn positions_outside_a_table() {
    let table = CosSinTable::new(vec![1.0; 4], vec![0.0; 4], 1).unwrap();
    assert_eq!(table.out_of_range(), OutOfRange::Error);
    let rope = Rope::new(table.clone(), Pairing::HalfSplit);
    let rotator = Host::new().rotator(&rope);
    let problem = f32s().q(Layout::bshd(2, 2, 1, 2));
    let plan = rotator.plan(&problem).unwrap();
    let result = call(
        &rotator,
        &plan,
        Some(8),
        None,
        Positions::per_token(&[0, 3, 4, -1][..]),
    );
    let error = fails(
        result,
        &[
            "position 4 (sequence 1, token 0)",
            "extend the table",
            "Clamp",
        ],
    );
    let expected = Error::PositionOutOfRange {
        position: 4,
        batch: 1,
        token: 0,
        rows: 4,
    };
    assert_eq!(error, expected);
    // A longer table would not help.
    let result = call(
        &rotator,
        &plan,
        Some(8),
        None,
        Positions::per_token(&[0, -3, 4, 1]),
    );
    let phrases = &[
        "position -3",
        "check the position ids",
        "OutOfRange::Clamp",
        "Frequencies",
    ];
    let error = fails(result, phrases);
    assert!(!error.to_string().contains("extend the table"), "{error}");

    // Ids at an address are not looked at; a start is.
    let at_addresses = |rope: &Rope, positions| {
        let addresses = Addresses {
            q: TensorAddresses::default(),
            k: TensorAddresses::default(),
            angles: AngleAddresses::Table { cos: 256, sin: 512 },
            positions,
            v: TensorAddresses::default(),
            cache: None,
            stages: Default::default(),
        };
        Plan::new(rope, &problem).unwrap().call(&addresses)
    };
    let ids = |len| Ids::at(1024, IdType::I32, len);
    for unseen in [
        RawPositions::per_token(ids(4)),
        RawPositions::start_per_sequence(ids(2)),
    ] {
        let error = fails(
            at_addresses(&rope, unseen),
            &["give the table OutOfRange::Clamp or PassThrough"],
        );
        assert_eq!(error, Error::DevicePositionsUnchecked);
        for choice in [OutOfRange::Clamp, OutOfRange::PassThrough] {
            let rope = Rope::new(table.clone().with_out_of_range(choice), Pairing::HalfSplit);
            assert!(at_addresses(&rope, unseen).unwrap().is_some());
        }
    }
    for start in [0, 2] {
        let call = at_addresses(&rope, RawPositions::start(start));
        assert!(call.unwrap().is_some());
    }
    for start in [-1, 3, 4, i64::MAX] {
        let result = at_addresses(&rope, RawPositions::start(start));
        assert!(matches!(result, Err(Error::PositionOutOfRange { .. })));
    }
}

#[test]
fn plans_of_another_rotator() {
    // Equal angles are not the same: a plan is tied to the source it was made for.
    let (ours, other) = (rotator(8), rotator(8));
    let plan = other.plan(&f32s().q(Layout::tokens(1, 1, 8))).unwrap();
    let result = call(&ours, &plan, Some(8), None, Positions::start(0));
    assert_eq!(
        fails(result, &["make it with this rotator's plan()"]),
        Error::PlanMismatch
    );
    let one_buffer = other
        .plan(&f32s().q(Layout::tokens(1, 1, 8)).one_buffer())
        .unwrap();
    let result = ours.rotate_one_buffer(&one_buffer, &mut [2.5f32; 8], Positions::start(0));
    assert_eq!(result, Err(Error::PlanMismatch));
    // Clones share it.
    let clone = Host::new().rotator(&other.rope().clone());
    assert_eq!(
        call(&clone, &plan, Some(8), None, Positions::start(0)),
        Ok(())
    );
    // So do all backward passes of one rope, but each shift has angles of its own.
    let serves = |made_for: &Rope, rope: &Rope| {
        let rotator = Host::new().rotator(made_for);
        let plan = rotator.plan(&f32s().q(Layout::tokens(1, 1, 8))).unwrap();
        let rotator = Host::new().rotator(rope);
        call(&rotator, &plan, Some(8), None, Positions::start(0))
    };
    let rope = ours.rope();
    assert_eq!(serves(&rope.backward(), &rope.backward()), Ok(()));
    assert_eq!(serves(rope, &rope.backward()), Err(Error::PlanMismatch));
    let (first, second) = (rope.shift().unwrap(), rope.shift().unwrap());
    assert_eq!(first, second);
    let error = fails(serves(&first, &second), &["one Rope or its clones"]);
    assert_eq!(error, Error::PlanMismatch);
}

#[test]
fn addresses_that_do_not_fit_the_plan() {
    let plan = rotator(8).plan(&f32s().q(Layout::tokens(1, 1, 8)));
    let plan = plan.unwrap();
    let exact = Addresses {
        q: TensorAddresses::default(),
        k: TensorAddresses::default(),
        angles: AngleAddresses::Steps {
            steps: 0,
            factors: 0,
        },
        positions: RawPositions::start(0),
        v: TensorAddresses::default(),
        cache: None,
        stages: Default::default(),
    };
    assert!(plan.call(&exact).unwrap().is_some());
    let table = Addresses {
        angles: AngleAddresses::Table { cos: 0, sin: 0 },
        ..exact
    };
    assert_eq!(plan.call(&table).unwrap_err(), Error::PlanMismatch);
    let ids = Addresses {
        positions: RawPositions::per_token(Ids::at(0, IdType::I32, 2)),
        ..exact
    };
    fails(plan.call(&ids), &["2 positions given, give 1"]);
}

#[test]
fn variants_that_the_processor_lacks() {
    for isa in Isa::ALL {
        let host = Host::new().with_isa(isa);
        if isa.is_available() {
            assert_eq!(host.unwrap().isa(), isa);
        } else {
            let error = fails(host, &["this processor cannot run", isa.name()]);
            assert_eq!(error, Error::IsaUnavailable { isa: isa.name() });
        }
    }
    assert!(Isa::Scalar.is_available() && Isa::best().is_available());
}

#[test]
fn device_names() {
    for name in [
        "",
        "gpu",
        "Host",
        "CUDA",
        "cuda:",
        "cuda:x",
        "cuda:-1",
        "cuda:+0",
        "cuda: 1",
        "cuda:1.0",
        " host",
        "cuda0",
        "cuda:99999999999999999999999",
        "cpu",
    ] {
        let result = Device::from_name(name, &[]);
        let error = fails(
            result,
            &["unknown device", "use auto, host, cuda or cuda:N"],
        );
        assert_eq!(error, Error::DeviceName { name: name.into() });
    }
    let host = Device::from_name("host", &Dtype::ALL).unwrap();
    assert!(host.is_host());
    assert_eq!(host.to_string(), format!("host ({})", Isa::best().name()));
    assert_eq!(host.reason(), "it was asked for");
}

/// Without a GPU, `auto` is the host and says why, and asking for CUDA is an error, not a panic.
#[test]
fn a_machine_without_a_gpu() {
    let auto = Device::auto(&Dtype::ALL);
    let named = Device::from_name("auto", &Dtype::ALL).unwrap();
    assert_eq!(named.is_host(), auto.is_host());
    assert!(!auto.reason().is_empty());
    if !auto.is_host() {
        println!("skipped: this machine has a GPU, {auto}");
        return;
    }
    for result in [
        Device::cuda(0, &Dtype::ALL),
        Device::from_name("cuda", &Dtype::ALL),
        Device::from_name("cuda:0", &Dtype::ALL),
        Device::from_name("cuda:18446744073709551615", &[]),
    ] {
        let Err(error) = result else {
            panic!("a CUDA device, where auto found none");
        };
        let message = error.to_string();
        let advice = match &error {
            Error::NoDriver { .. } => "install the driver",
            Error::NoDevice { .. } => "the driver lists",
            Error::CudaNotBuilt => "enable it in Cargo.toml",
            // A driver that cannot be used is another machine's trouble.
            _ => "",
        };
        assert!(message.contains(advice), "{message}");
        assert_eq!(cfg!(feature = "cuda"), error != Error::CudaNotBuilt);
        if !matches!(error, Error::NoDevice { .. }) {
            assert_eq!(auto.reason(), message);
        }
    }
}

/// Counts and strides where sums and products leave 32 or 64 bits.
fn sizes() -> impl Strategy<Value = usize> {
    let edges = [0, 1, 28, 29, 31, 32, 59, 60, 61, 62, 63].map(|k| 1usize << k);
    prop_oneof![
        6 => 0usize..4,
        2 => prop::sample::select(edges.to_vec()),
        1 => prop::sample::select(edges.map(|n| n - 1).to_vec()),
        1 => Just(usize::MAX),
        1 => any::<usize>(),
    ]
}

fn layouts() -> impl Strategy<Value = Layout> {
    let head_dim = prop_oneof![3 => 8usize..10, 1 => sizes()];
    let rotary_offset = prop_oneof![6 => Just(0), 1 => sizes()];
    (
        prop::array::uniform3(sizes()),
        prop::option::weighted(0.7, prop::array::uniform3(sizes())),
        (head_dim, sizes(), rotary_offset),
    )
        .prop_map(|([b, s, h], strides, (head_dim, offset, rotary_offset))| {
            let layout = Layout::bshd(b, s, h, head_dim).with_offset(offset);
            let layout = layout.with_rotary_offset(rotary_offset);
            strides.map_or(layout, |[b, s, h]| layout.with_strides(b, s, h))
        })
}

fn operands() -> impl Strategy<Value = Option<InOut<Layout>>> {
    let strides = prop::array::uniform3(sizes());
    prop::option::weighted(
        0.8,
        (layouts(), prop::option::of((strides, sizes()))).prop_map(|(layout, other)| match other {
            None => layout.into(),
            // Of one shape, as others are refused at once.
            Some(([b, s, h], offset)) => {
                (layout, layout.with_strides(b, s, h).with_offset(offset)).into()
            }
        }),
    )
}

/// Of any kind, as many ids as there happen to be; nothing reads them.
fn any_positions() -> impl Strategy<Value = RawPositions> {
    let id_types = vec![IdType::I32, IdType::I64, IdType::U32];
    let ids = (prop::sample::select(id_types), sizes())
        .prop_map(|(id_type, len)| Ids::at(16, id_type, len));
    let kinds: Vec<fn(Ids<u64>) -> RawPositions> = vec![
        RawPositions::start_per_sequence,
        RawPositions::per_sequence,
        RawPositions::per_token,
        RawPositions::per_token_shared,
        RawPositions::per_axis,
    ];
    prop_oneof![
        any::<i64>().prop_map(RawPositions::start),
        (prop::sample::select(kinds), ids).prop_map(|(kind, ids)| kind(ids)),
    ]
}

proptest! {
    // As many without optimisation: it is there that arithmetic is checked.
    #![proptest_config(ProptestConfig { cases: 20_000, ..config(0) })]

    /// Whatever the sizes are, planning gives a plan or an error. Where arithmetic is checked, as
    /// in the test profile, an overflow would panic.
    #[test]
    fn no_size_panics(
        q in operands(),
        k in operands(),
        dtype in prop::sample::select(Dtype::ALL.to_vec()),
        positions in any_positions(),
        (one_buffer, disjoint, same_shape) in any::<(bool, bool, bool)>(),
        (tokens, sequences) in (sizes(), sizes()),
    ) {
        let mut problem = Problem::new(dtype);
        if let Some(q) = q {
            problem = problem.q(q);
        }
        if let Some(k) = if same_shape { q } else { k } {
            problem = problem.k(k);
        }
        if one_buffer {
            problem = problem.one_buffer();
        }
        if disjoint {
            // SAFETY: buffers are too short below, so that nothing is rotated.
            problem = unsafe { problem.assume_disjoint() };
        }
        let rotator = rotator(8);
        let Ok(plan) = rotator.plan(&problem) else { return Ok(()) };
        let first = plan.first_tokens(tokens);
        prop_assert_eq!(first.is_ok(), tokens <= plan.tokens());
        let sequence = plan.first_sequences(sequences);
        prop_assert_eq!(sequence.is_ok(), sequences <= plan.batch());
        let both = first.clone().and_then(|first| first.first_sequences(sequences));
        let parts = [first, sequence, both].into_iter().flatten();
        for plan in [plan].into_iter().chain(parts) {
            let (bytes, at) = (plan.bytes(), TensorAddresses::default());
            prop_assert_eq!(plan.is_empty(), bytes == 0);
            let angles = AngleAddresses::Steps { steps: 16, factors: 16 };
            let addresses = |positions| Addresses { q: at, k: at, angles, positions, v: TensorAddresses::default(), cache: None, stages: Default::default() };
            // Ids of any number are refused, or are as many as there are tokens.
            if let Ok(call) = plan.call(&addresses(positions)) {
                prop_assert_eq!(call.is_none(), bytes == 0);
            }
            let count = plan.batch().saturating_mul(plan.tokens());
            let ids = Ids::at(16, IdType::I64, count);
            let call = plan.call(&addresses(RawPositions::per_token(ids)))?;
            prop_assert_eq!(call.is_none(), bytes == 0);
            if let Some(call) = call {
                let launch = call.launch(&Target::new(132));
                prop_assert!(launch.grid.iter().chain(&launch.block).all(|&n| n >= 1));
            }
            if one_buffer {
                let result = rotator.rotate_one_buffer::<f32>(&plan, &mut [], Positions::start(3));
                prop_assert_eq!(result.is_ok(), bytes == 0 && dtype == Dtype::F32);
            }
        }
    }

    /// The length that a layout asks for is right or absent, never wrapped.
    #[test]
    fn required_len_does_not_wrap(layout in layouts(), offset in sizes()) {
        let layout = layout.with_offset(offset);
        let (shape, strides) = (layout.shape(), layout.strides());
        let exact = if shape.contains(&0) {
            Some(0u128)
        } else {
            let last = shape[..3].iter().zip(strides).try_fold(0u128, |sum, (&n, stride)| {
                (n as u128 - 1).checked_mul(stride as u128)?.checked_add(sum)
            });
            last.and_then(|last| last.checked_add(offset as u128 + shape[3] as u128))
        };
        let expected = exact.and_then(|len| usize::try_from(len).ok());
        prop_assert_eq!(layout.required_len(), expected);
    }
}
