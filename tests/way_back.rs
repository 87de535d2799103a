//! Output pairings, the backward pass and the shift of rotated keys, on the host; `kernels.rs` holds
//! the kernels to the host.

mod support;

use phasor::half::bf16;
use phasor::{
    CosSinTable, Direction, Dtype, Element, Error, Frequencies, FrequencyRows, Host, InOut, Isa,
    Layout, OutOfRange, Pairing, Positions, Problem, Rope, Threads,
};
use proptest::prelude::*;
use support::cases::{Random, TestElement, config, host, same_bits, variants};

const BOTH: [Pairing; 2] = [Pairing::HalfSplit, Pairing::Interleaved];

/// Rotates `[tokens, heads, head_dim]` out of place, tokens at positions from `start` on.
fn rotated<T: Element>(
    host: Host,
    rope: &Rope,
    layout: Layout,
    x: &[T],
    start: i64,
) -> Result<Vec<T>, Error> {
    let rotator = host.rotator(rope);
    let plan = rotator.plan(&Problem::new(T::DTYPE).q((layout, layout)))?;
    let mut destination = x.to_vec();
    let q = (x, &mut destination).into();
    rotator.rotate(&plan, Some(q), None, Positions::start(start))?;
    Ok(destination)
}

fn values<T: TestElement>(seed: u64, len: usize) -> Vec<T> {
    let mut random = Random(seed);
    (0..len).map(|_| T::anything(&mut random)).collect()
}

/// The dims of pair `i`.
fn dims(pairing: Pairing, i: usize, pairs: usize) -> [usize; 2] {
    match pairing {
        Pairing::HalfSplit => [i, pairs + i],
        Pairing::Interleaved => [2 * i, 2 * i + 1],
    }
}

fn output_pairing<T: TestElement>(
    pairs: usize,
    [before, after]: [usize; 2],
    heads: usize,
    seed: u64,
) -> Result<(), TestCaseError> {
    let head_dim = 2 * before + 2 * pairs + after;
    let layout = Layout::tokens(3, heads, head_dim).with_rotary_offset(2 * before);
    let x: Vec<T> = values(seed, 3 * heads * head_dim);
    let frequencies = Frequencies::from_theta(1e4, 2 * pairs)?;
    for from in BOTH {
        let plain = Rope::new(frequencies.clone(), from);
        let expected = rotated(host(Isa::Scalar, Threads::One), &plain, layout, &x, 70)?;
        for to in BOTH {
            let rope = plain.clone().with_output_pairing(to);
            for isa in variants() {
                let got = rotated(host(isa, Threads::Pool), &rope, layout, &x, 70)?;
                for head in 0..3 * heads {
                    let (got, expected) = (&got[head * head_dim..], &expected[head * head_dim..]);
                    let mut reordered = expected[..head_dim].to_vec();
                    for pair in 0..pairs {
                        let (from, to) = (dims(from, pair, pairs), dims(to, pair, pairs));
                        for (from, to) in from.into_iter().zip(to) {
                            reordered[2 * before + to] = expected[2 * before + from];
                        }
                    }
                    same_bits(&got[..head_dim], &reordered)?;
                }
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(config(400))]

    /// The bits of the plain rotation, each pair in its other place; what does not rotate stays.
    #[test]
    fn output_pairings_only_move_pairs(
        pairs in prop_oneof![1usize..70, Just(600)],
        unrotated in [0usize..3, 0usize..5],
        heads in 1usize..3,
        seed in any::<u64>(),
    ) {
        output_pairing::<f32>(pairs, unrotated, heads, seed)?;
        output_pairing::<phasor::half::f16>(pairs, unrotated, heads, seed)?;
        output_pairing::<bf16>(pairs, unrotated, heads, seed)?;
    }

    /// `<R x, y> = <x, R' y>` for the rotation R and its backward pass R', factor and dims that do
    /// not rotate included: that is what transposed means.
    #[test]
    fn the_backward_pass_is_the_transposed_map(
        pairs in 1usize..40,
        factor in 0.5f32..2.0,
        (from, to) in prop::sample::select(vec![(0, 0), (0, 1), (1, 0), (1, 1)]),
        inverse in any::<bool>(),
        start in any::<i64>(),
        seed in any::<u64>(),
    ) {
        let frequencies = Frequencies::from_theta(1e4, 2 * pairs)?.with_attention_factor(factor)?;
        let direction = if inverse { Direction::Inverse } else { Direction::Forward };
        let rope = Rope::new(frequencies, BOTH[from])
            .with_output_pairing(BOTH[to])
            .with_direction(direction);
        let layout = Layout::tokens(2, 1, 2 * pairs + 3);
        let mut random = Random(seed);
        let len = 2 * (2 * pairs + 3);
        let mut unit = || (0..len).map(|_| 2.0 * random.unit() as f32 - 1.0).collect::<Vec<_>>();
        let (x, y) = (unit(), unit());
        let forward = rotated(Host::new(), &rope, layout, &x, start)?;
        let backward = rotated(Host::new(), &rope.backward(), layout, &y, start)?;
        let dot = |a: &[f32], b: &[f32]| -> f64 {
            a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
        };
        let (left, right) = (dot(&forward, &y), dot(&x, &backward));
        prop_assert!((left - right).abs() < len as f64 * 1e-6, "{left} {right}");
        prop_assert_eq!(rope.backward().backward(), rope);
    }

    /// Keys rotated at one position and shifted are, up to rounding, keys rotated at the other.
    #[test]
    fn shifted_keys_are_those_of_the_other_position(
        pairs in 1usize..40,
        factor in 0.5f32..2.0,
        (from, to) in prop::sample::select(vec![(0, 0), (0, 1), (1, 0), (1, 1)]),
        start in any::<i64>(),
        shift in any::<i64>(),
        seed in any::<u64>(),
    ) {
        let frequencies = Frequencies::from_theta(1e4, 2 * pairs)?.with_attention_factor(factor)?;
        let rope = Rope::new(frequencies, BOTH[from]).with_output_pairing(BOTH[to]);
        let layout = Layout::tokens(2, 1, 2 * pairs + 3);
        let mut random = Random(seed);
        let x: Vec<f32> = (0..2 * (2 * pairs + 3)).map(|_| 2.0 * random.unit() as f32 - 1.0).collect();
        let keys = rotated(Host::new(), &rope, layout, &x, start)?;
        // Both tokens move by the same: no position advances.
        let mut moved = keys.clone();
        let rotator = Host::new().rotator(&rope.shift()?);
        let plan = rotator.plan(&Problem::new(Dtype::F32).k(layout))?;
        let by = Positions::per_sequence(std::slice::from_ref(&shift));
        rotator.rotate(&plan, None, Some(InOut::InPlace(&mut moved[..])), by)?;
        let expected = rotated(Host::new(), &rope, layout, &x, start.wrapping_add(shift))?;
        for (moved, expected) in moved.iter().zip(&expected) {
            prop_assert!((moved - expected).abs() < 3e-6, "{moved} {expected}");
        }
    }
}

/// Each sequence with a row of its own keeps its row; the factor is not applied again.
#[test]
fn keys_of_several_rows_shift_too() {
    let rows = [(1e4, 1.25), (5e5, 0.5)].map(|(theta, factor)| {
        let row = Frequencies::from_theta(theta, 8).unwrap();
        row.with_attention_factor(factor).unwrap()
    });
    let rope = Rope::new(FrequencyRows::new(&rows).unwrap(), Pairing::Interleaved);
    let layout = Layout::bshd(2, 1, 1, 8);
    let problem = Problem::new(Dtype::F32).k(layout);
    let rotate = |rope: &Rope, x: &mut [f32], starts: [i64; 2]| {
        let rotator = Host::new().rotator(rope);
        let plan = rotator.plan(&problem).unwrap();
        let positions =
            Positions::start_per_sequence(&starts[..]).frequency_rows_per_sequence(&[0, 1]);
        let k = Some(InOut::InPlace(x));
        rotator.rotate(&plan, None, k, positions).unwrap();
    };
    let mut moved = [1.0f32; 16];
    rotate(&rope, &mut moved, [900, 40]);
    rotate(&rope.shift().unwrap(), &mut moved, [-512, 2]);
    let mut expected = [1.0f32; 16];
    rotate(&rope, &mut expected, [388, 42]);
    for (moved, expected) in moved.iter().zip(&expected) {
        assert!((moved - expected).abs() < 1e-6, "{moved} {expected}");
    }
}

#[test]
fn what_cannot_shift_or_move_pairs_is_refused() {
    let table = |choice| {
        let table = CosSinTable::new(vec![1.0; 4], vec![0.0; 4], 4).unwrap();
        Rope::new(table.with_out_of_range(choice), Pairing::Interleaved)
    };
    let refused = |rope: Rope, phrase: &str| {
        let error = rope.shift().unwrap_err();
        assert!(matches!(error, Error::Shift { .. }));
        assert!(error.to_string().contains(phrase), "{error}");
    };
    refused(table(OutOfRange::Error), "a table of cos and sin");
    let frequencies = Frequencies::from_theta(1e4, 8).unwrap();
    let rows = FrequencyRows::new(&[frequencies.clone(), frequencies.clone()]).unwrap();
    let by_position = rows.by_position(9).unwrap();
    refused(
        Rope::new(by_position, Pairing::HalfSplit),
        "rows that positions choose",
    );

    let moving = Rope::new(frequencies, Pairing::Interleaved);
    let moving = moving.with_output_pairing(Pairing::HalfSplit);
    let layout = Layout::tokens(1, 1, 8);
    let rotator = Host::new().rotator(&moving);
    let error = rotator
        .plan(&Problem::new(Dtype::F32).k(layout))
        .unwrap_err();
    assert!(matches!(error, Error::OutputPairingInPlace { .. }));
    assert!(error.to_string().starts_with("k: "), "{error}");
    assert!(
        error.to_string().contains("plan it out of place"),
        "{error}"
    );
    let out_of_place = Problem::new(Dtype::F32).k((layout, layout));
    assert!(rotator.plan(&out_of_place).is_ok());
    for (choice, fine) in [
        (OutOfRange::Error, true),
        (OutOfRange::Clamp, true),
        (OutOfRange::PassThrough, false),
    ] {
        let rope = table(choice).with_output_pairing(Pairing::HalfSplit);
        let plan = Host::new().rotator(&rope).plan(&out_of_place);
        assert_eq!(plan.is_ok(), fine);
        if let Err(error) = plan {
            assert_eq!(error, Error::OutputPairingPassThrough);
        }
    }
}
