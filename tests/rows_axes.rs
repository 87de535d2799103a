//! Rows of frequencies and positions on several axes, on the host, against the reference. The
//! kernels are held to the host by `kernels.rs`.

mod support;

use phasor::{
    Device, Dtype, Error, Frequencies, FrequencyRowKind, FrequencyRows, Host, HostRotator, Ids,
    InOut, Layout, Pairing, PositionKind, Positions, Problem, Rope, Threads,
};
use proptest::prelude::*;
use support::cases::{Random, config, host, variants};
use support::oracle;

/// A call over f32 elements, `[batch, sequence, heads, head_dim]`, in place.
#[derive(Clone, Debug)]
struct Call {
    pairing: Pairing,
    pairs: usize,
    shape: [usize; 3],
    axes: usize,
    /// Steps `[axes, pairs]` and factor of each row.
    rows: Vec<(Vec<u64>, f32)>,
    kind: PositionKind,
    positions: Vec<i64>,
    row_kind: FrequencyRowKind,
    row_ids: Vec<u32>,
    boundary: Option<i64>,
}

prop_compose! {
    fn calls()(
        pairing in prop::sample::select(vec![Pairing::HalfSplit, Pairing::Interleaved]),
        pairs in prop_oneof![1usize..40, Just(600)],
        shape in [1usize..4, 1usize..5, 1usize..4],
        (axes, rows) in (1usize..5, 1usize..5),
        by_position in any::<bool>(),
        kind in prop::sample::select(vec![
            PositionKind::Start, PositionKind::StartPerSequence, PositionKind::PerToken,
            PositionKind::PerTokenShared, PositionKind::PerAxis, PositionKind::PerSequence,
        ]),
        row_kind in prop::sample::select(vec![
            FrequencyRowKind::Call, FrequencyRowKind::PerSequence, FrequencyRowKind::PerToken,
        ]),
        seed in any::<u64>(),
    ) -> Call {
        let mut random = Random(seed);
        let (axes, rows) = if by_position { (1, 2) } else { (axes, rows) };
        let row = |random: &mut Random| {
            let steps = (0..axes * pairs).map(|_| random.bits()).collect();
            (steps, 0.5 + random.unit() as f32)
        };
        let rows: Vec<_> = (0..rows).map(|_| row(&mut random)).collect();
        let [batch, sequence, _] = shape;
        let count = match kind {
            PositionKind::Start => 1,
            PositionKind::StartPerSequence | PositionKind::PerSequence => batch,
            PositionKind::PerTokenShared => sequence,
            PositionKind::PerAxis => axes * batch * sequence,
            _ => batch * sequence,
        };
        let near = random.bits() as i64;
        let positions = (0..count).map(|_| near.wrapping_add(random.below(7) as i64)).collect();
        let (row_kind, count) = match (by_position, row_kind) {
            (true, _) => (FrequencyRowKind::None, 0),
            (_, FrequencyRowKind::Call) => (row_kind, 1),
            (_, FrequencyRowKind::PerSequence) => (row_kind, batch),
            _ => (row_kind, batch * sequence),
        };
        let row_ids = (0..count).map(|_| random.below(rows.len()) as u32).collect();
        Call {
            pairing, pairs, shape, axes, rows, kind, positions, row_kind, row_ids,
            boundary: by_position.then(|| near.wrapping_add(3)),
        }
    }
}

impl Call {
    fn rope(&self) -> Rope {
        let rows: Vec<_> = self.rows.iter().map(|row| self.frequencies(row)).collect();
        let rows = FrequencyRows::new(&rows).unwrap();
        match self.boundary {
            Some(boundary) => Rope::new(rows.by_position(boundary).unwrap(), self.pairing),
            None => Rope::new(rows, self.pairing),
        }
    }

    fn frequencies(&self, (steps, factor): &(Vec<u64>, f32)) -> Frequencies {
        let frequencies = Frequencies::from_axis_steps(steps.clone(), self.axes).unwrap();
        frequencies.with_attention_factor(*factor).unwrap()
    }

    fn head_dim(&self) -> usize {
        2 * self.pairs
    }

    fn problem(&self) -> Problem {
        let [batch, sequence, heads] = self.shape;
        Problem::new(Dtype::F32).q(Layout::bshd(batch, sequence, heads, self.head_dim()))
    }

    fn given(&self) -> Positions<'_> {
        let ids = &self.positions[..];
        let positions = match self.kind {
            PositionKind::Start => Positions::start(ids[0]),
            PositionKind::StartPerSequence => Positions::start_per_sequence(ids),
            PositionKind::PerSequence => Positions::per_sequence(ids),
            PositionKind::PerToken => Positions::per_token(ids),
            PositionKind::PerTokenShared => Positions::per_token_shared(ids),
            PositionKind::PerAxis => Positions::per_axis(ids),
            kind => panic!("no call has {kind}"),
        };
        match self.row_kind {
            FrequencyRowKind::None => positions,
            FrequencyRowKind::Call => positions.frequency_row(self.row_ids[0]),
            FrequencyRowKind::PerSequence => positions.frequency_rows_per_sequence(&self.row_ids),
            FrequencyRowKind::PerToken => positions.frequency_rows_per_token(&self.row_ids),
            kind => panic!("no call has {kind}"),
        }
    }

    fn rotate(&self, host: Host, x: &mut [f32]) -> Result<(), Error> {
        let rotator = host.rotator(&self.rope());
        let plan = rotator.plan(&self.problem())?;
        rotator.rotate(&plan, Some(InOut::InPlace(x)), None, self.given())
    }

    /// As the documentation has it.
    fn position(&self, axis: usize, b: usize, s: usize) -> i64 {
        let [batch, sequence, _] = self.shape;
        let token = b * sequence + s;
        match self.kind {
            PositionKind::Start => self.positions[0].wrapping_add(s as i64),
            PositionKind::StartPerSequence => self.positions[b].wrapping_add(s as i64),
            PositionKind::PerSequence => self.positions[b],
            PositionKind::PerToken => self.positions[token],
            PositionKind::PerTokenShared => self.positions[s],
            PositionKind::PerAxis => self.positions[axis * batch * sequence + token],
            kind => panic!("no call has {kind}"),
        }
    }

    fn row(&self, b: usize, s: usize) -> usize {
        match (self.row_kind, self.boundary) {
            (_, Some(boundary)) => usize::from(self.position(0, b, s) >= boundary),
            (FrequencyRowKind::PerSequence, _) => self.row_ids[b] as usize,
            (FrequencyRowKind::PerToken, _) => self.row_ids[b * self.shape[1] + s] as usize,
            _ => self.row_ids[0] as usize,
        }
    }

    /// The largest distance from the reference, which forms each angle on its own.
    fn error(&self, before: &[f32], after: &[f32]) -> f64 {
        let [batch, sequence, heads] = self.shape;
        let mut worst = 0.0f64;
        for b in 0..batch {
            for s in 0..sequence {
                let (steps, factor) = &self.rows[self.row(b, s)];
                for pair in 0..self.pairs {
                    let radians: f64 = (0..self.axes)
                        .map(|axis| {
                            let step = steps[axis * self.pairs + pair];
                            oracle::step_radians(step, self.position(axis, b, s))
                        })
                        .sum();
                    let factor = f64::from(*factor);
                    let (cos, sin) = (factor * radians.cos(), factor * radians.sin());
                    let (i, j) = match self.pairing {
                        Pairing::HalfSplit => oracle::half_split(pair, self.pairs),
                        Pairing::Interleaved => oracle::interleaved(pair),
                    };
                    for h in 0..heads {
                        let start = ((b * sequence + s) * heads + h) * self.head_dim();
                        let x = |d: usize| f64::from(before[start + d]);
                        let (x, y) = oracle::rotate(x(i), x(j), cos, sin);
                        for (d, expected) in [(i, x), (j, y)] {
                            worst = worst.max((f64::from(after[start + d]) - expected).abs());
                        }
                    }
                }
            }
        }
        worst
    }
}

proptest! {
    #![proptest_config(config(1500))]

    #[test]
    fn rows_and_axes_are_those_of_the_definition(call in calls(), seed in any::<u64>()) {
        let mut random = Random(seed);
        let len = call.shape.iter().product::<usize>() * call.head_dim();
        let before: Vec<f32> = (0..len).map(|_| 2.0 * random.unit() as f32 - 1.0).collect();
        let mut scalar = before.clone();
        call.rotate(host(variants()[0], Threads::One), &mut scalar)?;
        // Elements and factors up to 1 and 1.5: cos and sin to 2^-23, two roundings to 2^-24 each.
        prop_assert!(call.error(&before, &scalar) < 1.5 * 2.0 * 2.0 * 2f64.powi(-23));
        for isa in variants() {
            for threads in [Threads::One, Threads::Pool] {
                let mut after = before.clone();
                call.rotate(host(isa, threads), &mut after)?;
                prop_assert_eq!(&after, &scalar, "{:?} {:?}", isa, threads);
            }
        }
    }
}

fn theta(rotary_dim: usize) -> Frequencies {
    Frequencies::from_theta(1e4, rotary_dim).unwrap()
}

fn f32s(layout: Layout) -> Problem {
    Problem::new(Dtype::F32).q(layout)
}

fn rotated(rotator: &HostRotator, problem: &Problem, positions: Positions<'_>) -> Vec<f32> {
    let plan = rotator.plan(problem).unwrap();
    let mut x = vec![1.0; 4 * 8];
    let q = Some(InOut::InPlace(&mut x[..]));
    rotator.rotate(&plan, q, None, positions).unwrap();
    x
}

/// The product of axes and shape is not formed where it would not fit.
#[test]
fn a_huge_shape_without_elements_has_no_positions_to_overflow() {
    let on_axes = theta(8).with_axes(16, &[0, 1, 2, 15]).unwrap();
    let rotator = Host::new().rotator(&Rope::new(on_axes, Pairing::HalfSplit));
    let huge = Layout::bshd(1 << 30, 1 << 30, 0, 8);
    let plan = rotator.plan(&f32s(huge)).unwrap();
    let q = Some(InOut::InPlace(&mut [0.0f32; 0][..]));
    let error = rotator.rotate(&plan, q, None, Positions::per_axis(&[0i64; 4]));
    assert!(matches!(error, Err(Error::PositionsLength { .. })));
}

/// Text in a model of images: where all axes agree, they are one.
#[test]
fn equal_positions_on_all_axes_are_one_axis() {
    let plain = Rope::new(theta(8), Pairing::HalfSplit);
    let on_axes = theta(8).with_axes(3, &[0, 1, 2, 0]).unwrap();
    let on_axes = Rope::new(on_axes, Pairing::HalfSplit);
    let plain = Host::new().rotator(&plain);
    let on_axes = Host::new().rotator(&on_axes);
    let problem = f32s(Layout::bshd(2, 2, 1, 8));
    let ids = [5i64, -3, 70_000, 9];
    let three: Vec<i64> = ids.repeat(3);
    let expected = rotated(&plain, &problem, Positions::per_token(&ids));
    assert_eq!(
        rotated(&on_axes, &problem, Positions::per_token(&ids)),
        expected
    );
    assert_eq!(
        rotated(&on_axes, &problem, Positions::per_axis(&three)),
        expected
    );
    assert_eq!(
        rotated(&on_axes, &problem, Positions::start(1000)),
        rotated(&plain, &problem, Positions::start(1000)),
    );
}

/// Two sequences of one batch, one of which has grown past its row: each turns as it would alone.
#[test]
fn sequences_of_a_batch_have_rows_of_their_own() {
    let short = theta(8).with_attention_factor(1.25).unwrap();
    let long = Frequencies::from_theta(5e5, 8).unwrap();
    let rows = FrequencyRows::new(&[short.clone(), long.clone()]).unwrap();
    let rows = rows.with_lengths(&[4096, u64::MAX]).unwrap();
    let of_length = |length| rows.row_for_length(length).unwrap();
    assert_eq!([0, 1, 4096, 4097].map(of_length), [0, 0, 0, 1]);
    let chosen = [of_length(9000), of_length(12)];
    assert_eq!(rows.row(0), Ok(short.clone()));
    assert_eq!(rows.row(1), Ok(long.clone()));

    let both = Host::new().rotator(&Rope::new(rows, Pairing::Interleaved));
    let problem = f32s(Layout::bshd(2, 2, 1, 8));
    let starts = [8998i64, 10];
    let positions = Positions::start_per_sequence(&starts);
    let got = rotated(
        &both,
        &problem,
        positions.frequency_rows_per_sequence(&chosen),
    );
    let [long, short] = [long, short].map(|row| {
        let rotator = Host::new().rotator(&Rope::new(row, Pairing::Interleaved));
        rotated(&rotator, &problem, positions)
    });
    assert_eq!(got[..16], long[..16]);
    assert_eq!(got[16..], short[16..]);

    // The facade does the same.
    let device = Device::host();
    let rotator = device.rotator(both.rope()).unwrap();
    let plan = rotator.plan(&problem).unwrap();
    let positions = device
        .positions(positions.frequency_rows_per_sequence(&chosen))
        .unwrap();
    let mut q = device.upload(&[1.0f32; 32]).unwrap();
    let operand = Some(InOut::InPlace(&mut q));
    rotator.rotate(&plan, operand, None, &positions).unwrap();
    assert_eq!(q.to_vec().unwrap(), got);
}

/// Whatever angles a rotation has, the row for a length is what its call takes.
#[test]
fn a_row_for_a_length_can_be_passed_on() {
    let rows = FrequencyRows::new(&[theta(8), Frequencies::from_theta(5e5, 8).unwrap()]).unwrap();
    let with_lengths = rows.clone().with_lengths(&[100, 1000]).unwrap();
    let by_position = with_lengths.clone().by_position(100).unwrap();
    let table = theta(8).table(0..8).unwrap();
    let rope = |angles: phasor::Angles| Rope::new(angles, Pairing::HalfSplit);
    let lengths = [0u64, 100, 101, 1000];
    for (rope, expected) in [
        (rope(theta(8).into()), [None; 4]),
        (rope(table.into()), [None; 4]),
        (rope(by_position.into()), [None; 4]),
        (rope(with_lengths.clone().into()), [0, 0, 1, 1].map(Some)),
    ] {
        let rotator = Host::new().rotator(&rope);
        for (length, expected) in lengths.into_iter().zip(expected) {
            let row = rope.row_for_length(length).unwrap();
            assert_eq!(row, expected, "{length}");
            let problem = f32s(Layout::bshd(2, 2, 1, 8));
            let positions = match row {
                Some(row) => Positions::start(3).frequency_row(row),
                None => Positions::start(3),
            };
            rotated(&rotator, &problem, positions);
        }
    }
    let too_long = rope(with_lengths.into()).row_for_length(1001);
    fails(too_long, "a sequence of 1001 tokens");
    let error = fails(rope(rows.into()).row_for_length(1), "with_lengths");
    let (length, longest) = (1, None);
    assert_eq!(error, Error::NoRowForLength { length, longest });
}

proptest! {
    #![proptest_config(config(300))]

    /// On any axes, at any positions in any order, from iterators that know their length or not.
    #[test]
    fn tables_hold_the_values_of_their_positions(
        (axes, pairs) in (1usize..4, 1usize..20),
        positions in prop::collection::vec(
            prop_oneof![any::<i64>(), -9i64..9, prop::sample::select(vec![i64::MIN, i64::MAX])],
            1..20,
        ),
        factor in prop_oneof![Just(1.0f32), 0.1f32..9.0],
        seed in any::<u64>(),
    ) {
        let mut random = Random(seed);
        let steps = (0..axes * pairs).map(|_| random.bits()).collect();
        let frequencies = Frequencies::from_axis_steps(steps, axes)?.with_attention_factor(factor)?;
        let table = frequencies.table(positions.iter().copied())?;
        prop_assert_eq!((table.rows(), table.pairs()), (positions.len(), pairs));
        for (row, &position) in positions.iter().enumerate() {
            for pair in 0..pairs {
                let at = row * pairs + pair;
                let (cos, sin) = frequencies.cos_sin_at(pair, &vec![position; axes]);
                prop_assert_eq!(table.cos()[at].to_bits(), cos.to_bits());
                prop_assert_eq!(table.sin()[at].to_bits(), sin.to_bits());
            }
        }
        // Many and few, where the count is not known before.
        let shown = positions.iter().copied().filter(|position| position % 2 == 0);
        if let Ok(even) = frequencies.table(shown.clone()) {
            prop_assert_eq!(even, frequencies.table(shown.collect::<Vec<_>>())?);
        }
    }

    /// A table of positions from 0 on rotates to the bits of the frequencies; one of a call's tokens
    /// does so with a start of 0.
    #[test]
    fn tables_rotate_as_their_frequencies_do(
        pairing in prop::sample::select(vec![Pairing::HalfSplit, Pairing::Interleaved]),
        factor in prop_oneof![Just(1.0f32), 0.1f32..9.0],
        ids in prop::array::uniform4(0i64..64),
        far in prop::array::uniform4(any::<i64>()),
    ) {
        let frequencies = theta(8).with_attention_factor(factor)?;
        let rotator = |angles: phasor::Angles| Host::new().rotator(&Rope::new(angles, pairing));
        let exact = rotator(frequencies.clone().into());
        let cache = rotator(frequencies.table(0..64)?.into());
        let per_token = f32s(Layout::bshd(2, 2, 1, 8));
        prop_assert_eq!(
            rotated(&cache, &per_token, Positions::per_token(&ids)),
            rotated(&exact, &per_token, Positions::per_token(&ids))
        );
        let of_tokens = rotator(frequencies.table(far)?.into());
        let in_order = f32s(Layout::tokens(4, 1, 8));
        prop_assert_eq!(
            rotated(&of_tokens, &in_order, Positions::start(0)),
            rotated(&exact, &per_token, Positions::per_token(&far))
        );
    }
}

/// An error of the kind, whose message holds the phrase.
#[track_caller]
fn fails<T: std::fmt::Debug>(result: Result<T, Error>, phrase: &str) -> Error {
    let error = result.unwrap_err();
    let message = error.to_string();
    assert!(message.contains(phrase), "{message}");
    error
}

#[test]
fn frequencies_that_do_not_fit_their_axes() {
    for (axes, axis_of_pair) in [
        (2, &[0, 1, 2, 0][..]),
        (2, &[0, 1, 0]),
        (2, &[0, 1, 0, 1, 0]),
        (3, &[]),
        (1, &[usize::MAX; 4]),
    ] {
        let error = fails(
            theta(8).with_axes(axes, axis_of_pair),
            "one per pair, each below",
        );
        assert!(matches!(error, Error::AxisOfPair { pairs: 4, .. }));
    }
    for axes in [0, 17, usize::MAX] {
        fails(theta(8).with_axes(axes, &[0; 4]), "1 to 16 axes");
        fails(
            Frequencies::from_axis_steps(vec![1; 34], axes),
            "row-major steps of shape [axes, rotary_dim / 2]",
        );
    }
    let twice = theta(8).with_axes(2, &[0; 4]).unwrap();
    fails(twice.with_axes(2, &[0; 4]), "are not given axes again");
    fails(Frequencies::from_axis_steps(vec![1; 5], 2), "5 steps on 2");
    fails(Frequencies::from_axis_steps(vec![], 2), "rotary_dim is 0");
}

#[test]
fn rows_that_do_not_fit_together() {
    fails(FrequencyRows::new(&[]), "give at least one");
    fails(FrequencyRows::new(&[theta(8), theta(6)]), "differ in pairs");
    let on_axes = theta(8).with_axes(2, &[0; 4]).unwrap();
    fails(
        FrequencyRows::new(&[theta(8), on_axes.clone()]),
        "differ in pairs or axes",
    );
    let two = FrequencyRows::new(&[theta(8), theta(8)]).unwrap();
    for lengths in [&[1][..], &[1, 2, 3], &[2, 2], &[3, 1]] {
        fails(two.clone().with_lengths(lengths), "ascend, one per row");
    }
    let error = fails(two.row_for_length(1), "with_lengths");
    let none = Error::NoRowForLength {
        length: 1,
        longest: None,
    };
    assert_eq!(error, none);
    let upto = two.clone().with_lengths(&[10, 20]).unwrap();
    fails(upto.row_for_length(21), "a sequence of 21 tokens");
    fails(two.row(2), "frequency row 2 of 2");
    let one = FrequencyRows::new(&[theta(8)]).unwrap();
    fails(one.by_position(5), "between two rows on one axis");
    let two_on_axes = FrequencyRows::new(&[on_axes.clone(), on_axes]).unwrap();
    fails(two_on_axes.by_position(5), "between two rows on one axis");
}

#[test]
fn calls_that_choose_rows_where_there_are_none_or_none_where_there_are() {
    let rows = FrequencyRows::new(&[theta(8), theta(8)]).unwrap();
    let by_position = rows.clone().by_position(7).unwrap();
    let table = theta(8).table(0..9).unwrap();
    let call = |angles: phasor::Angles, positions: Positions<'_>| {
        let rope = Rope::new(angles, Pairing::HalfSplit);
        let rotator = Host::new().rotator(&rope);
        let plan = rotator.plan(&f32s(Layout::bshd(2, 2, 1, 8))).unwrap();
        let mut x = [1.0f32; 32];
        let result = rotator.rotate(&plan, Some((&mut x[..]).into()), None, positions);
        assert!(result.is_ok() || x == [1.0; 32], "a failed call wrote");
        result
    };
    let start = Positions::start(0);
    let error = fails(call(rows.into(), start), "with Positions::frequency_row");
    assert!(matches!(error, Error::FrequencyRows { .. }));
    for without in [theta(8).into(), by_position.into(), table.into()] {
        let without: phasor::Angles = without;
        assert_eq!(call(without.clone(), start), Ok(()));
        for positions in [
            start.frequency_row(0),
            start.frequency_rows_per_sequence(&[0, 0]),
            start.frequency_rows_per_token(&[0; 4]),
        ] {
            let error = fails(call(without.clone(), positions), "without frequency rows");
            assert!(matches!(error, Error::FrequencyRows { .. }));
        }
    }
}

#[test]
fn row_ids_are_counted_and_checked() {
    use FrequencyRowKind::{Call, PerSequence, PerToken};
    let rows = FrequencyRows::new(&[theta(8), theta(8)]).unwrap();
    let rotator = Host::new().rotator(&Rope::new(rows, Pairing::HalfSplit));
    let call = |shape: [usize; 2], positions: Positions<'_>| {
        let [batch, tokens] = shape;
        let plan = rotator.plan(&f32s(Layout::bshd(batch, tokens, 1, 8)));
        let mut x = vec![1.0f32; batch * tokens * 8];
        let result = rotator.rotate(&plan.unwrap(), Some((&mut x).into()), None, positions);
        assert!(
            result.is_ok() || x.iter().all(|&x| x == 1.0),
            "a failed call wrote"
        );
        result
    };
    fn given<'a>(kind: FrequencyRowKind, ids: impl Into<Ids<&'a [u8]>>) -> Positions<'a> {
        match kind {
            PerSequence => Positions::start(0).frequency_rows_per_sequence(ids),
            _ => Positions::start(0).frequency_rows_per_token(ids),
        }
    }

    for (kind, expected) in [(PerSequence, 2), (PerToken, 4)] {
        assert_eq!(given(kind, &[0; 1]).frequency_row_kind(), kind);
        let ids = [0u32, 1, 1, 0, 1];
        for got in 0..ids.len() {
            let result = call([2, 2], given(kind, &ids[..got]));
            if got == expected {
                assert_eq!(result, Ok(()));
            } else {
                let error = Error::FrequencyRowsLength {
                    expected,
                    got,
                    kind,
                };
                assert_eq!(fails(result, "row indices given"), error);
            }
        }
    }

    // Ids of any type; the last of them is outside.
    let outside = |result, row: i64| {
        let error = fails(result, &format!("frequency row {row} of 2"));
        assert_eq!(error, Error::FrequencyRowOutOfRange { row, rows: 2 });
    };
    for (kind, shape) in [
        (PerSequence, [2, 2]),
        (PerToken, [1, 2]),
        (PerToken, [2, 1]),
    ] {
        for last in [2, -1, i32::MAX, i32::MIN] {
            outside(call(shape, given(kind, &[1, last])), last.into());
        }
        for last in [2, -1, 1 << 32, i64::MAX, i64::MIN] {
            outside(call(shape, given(kind, &[1, last])), last);
        }
        for last in [2, u32::MAX] {
            outside(call(shape, given(kind, &[1, last])), last.into());
        }
    }
    assert_eq!(
        Positions::start(0).frequency_row(1).frequency_row_kind(),
        Call
    );
    assert_eq!(call([2, 2], Positions::start(0).frequency_row(1)), Ok(()));
    outside(call([2, 2], Positions::start(0).frequency_row(2)), 2);
    outside(
        call([2, 2], Positions::start(0).frequency_row(u32::MAX)),
        u32::MAX.into(),
    );
    // Where there is nothing to rotate, too.
    outside(call([2, 0], given(PerSequence, &[1, 2])), 2);
    outside(call([2, 0], Positions::start(0).frequency_row(2)), 2);
}

#[test]
fn positions_per_axis_are_counted() {
    let rope = theta(8).with_axes(3, &[0, 1, 2, 0]).unwrap();
    let rotator = Host::new().rotator(&Rope::new(rope, Pairing::HalfSplit));
    let plan = rotator.plan(&f32s(Layout::bshd(2, 2, 1, 8))).unwrap();
    let ids = [1i64; 13];
    for n in 0..ids.len() {
        let mut x = [1.0f32; 32];
        let q = Some(InOut::InPlace(&mut x[..]));
        let result = rotator.rotate(&plan, q, None, Positions::per_axis(&ids[..n]));
        if n == 12 {
            assert_eq!(result, Ok(()));
        } else {
            fails(result, "give 12: one position per axis and token");
        }
    }
}
