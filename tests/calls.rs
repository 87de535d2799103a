//! Ways to give a call's operands and positions, which all lead to one rotation.

mod support;

use phasor::call::{AngleAddresses, RawPositions, TensorAddresses};
use phasor::{
    CosSinTable, Device, Dtype, Error, Frequencies, FrequencyRows, Host, HostDestination,
    HostInOut, HostRotator, IdType, Ids, Isa, Layout, OutOfRange, Pairing, Plan, PositionKind,
    Positions, Problem, Rope, Threads,
};
use proptest::prelude::*;
use std::mem::MaybeUninit;
use std::num::NonZeroU32;
use support::cases::{Case, TestElement, Values, cases, config, host, same_bits};

fn theta(rotary_dim: usize) -> Frequencies {
    Frequencies::from_theta(1e4, rotary_dim).unwrap()
}

fn rotator(angles: impl Into<phasor::Angles>) -> HostRotator {
    Host::new().rotator(&Rope::new(angles, Pairing::HalfSplit))
}

fn f32s(layout: Layout) -> Problem {
    Problem::new(Dtype::F32).q(layout)
}

/// Rotates ones.
fn rotated(
    rotator: &HostRotator,
    problem: &Problem,
    positions: Positions<'_>,
) -> Result<Vec<f32>, Error> {
    let plan = rotator.plan(problem).unwrap();
    let mut x = vec![1.0; plan.q_shape().unwrap().iter().product()];
    let result = rotator.rotate(&plan, Some((&mut x).into()), None, positions);
    assert!(
        result.is_ok() || x.iter().all(|&x| x == 1.0),
        "a failed call wrote"
    );
    result.map(|()| x)
}

// Positions.

#[test]
fn positions_that_sequences_share_are_those_of_each() {
    let problem = f32s(Layout::bshd(3, 4, 2, 8));
    let ids = [5i64, -3, 1 << 40, 5];
    let shared = Positions::per_token_shared(&ids);
    assert_eq!(shared.kind(), PositionKind::PerTokenShared);
    let each = ids.repeat(3);
    let on_axes = theta(8).with_axes(2, &[0, 1, 1, 0]).unwrap();
    let boundary = FrequencyRows::new(&[theta(8), Frequencies::from_theta(7.0, 8).unwrap()]);
    let by_position = boundary.unwrap().by_position(5).unwrap();
    for rotator in [rotator(theta(8)), rotator(on_axes), rotator(by_position)] {
        let got = rotated(&rotator, &problem, shared).unwrap();
        assert_eq!(
            got,
            rotated(&rotator, &problem, Positions::per_token(&each)).unwrap()
        );
        assert_ne!(got[..16], got[16..32]);
    }
    // One sequence, and one token of each, as kinds that differ elsewhere.
    for (layout, ids, same) in [
        (
            Layout::tokens(4, 2, 8),
            &ids[..],
            Positions::per_token(&ids),
        ),
        (
            Layout::bshd(4, 1, 2, 8),
            &ids[2..3],
            Positions::start(1 << 40),
        ),
    ] {
        let rotator = rotator(theta(8));
        let shared = Positions::per_token_shared(ids);
        assert_eq!(
            rotated(&rotator, &f32s(layout), shared),
            rotated(&rotator, &f32s(layout), same)
        );
    }
    // A table that refuses positions names the first token that has one.
    let table = rotator(theta(8).table(0..6).unwrap());
    let ids = [5, 0, 6, -1];
    let error = Error::PositionOutOfRange {
        position: 6,
        batch: 0,
        token: 2,
        rows: 6,
    };
    let shared = Positions::per_token_shared(&ids);
    assert_eq!(rotated(&table, &problem, shared), Err(error));

    // The facade does the same.
    let device = Device::host();
    let rope = Rope::new(theta(8), Pairing::HalfSplit);
    let on_device = device.rotator(&rope).unwrap();
    let plan = on_device.plan(&problem).unwrap();
    let mut q = device.upload(&[1.0f32; 3 * 4 * 16]).unwrap();
    let shared = Positions::per_token_shared(&[7u32, 9, 1, 7]);
    let positions = device.positions(shared).unwrap();
    let operand = Some(phasor::InOut::InPlace(&mut q));
    on_device.rotate(&plan, operand, None, &positions).unwrap();
    let expected = rotated(&Host::new().rotator(&rope), &problem, shared);
    assert_eq!(q.to_vec().unwrap(), expected.unwrap());
}

#[test]
fn a_table_refuses_ids_of_each_sequence() {
    // Of one token each, as in decoding, and of several.
    let table = rotator(theta(8).table(0..6).unwrap());
    for tokens in [1, 2] {
        let problem = f32s(Layout::bshd(3, tokens, 1, 8));
        let ids = [4i64, 0, 9];
        for positions in [
            Positions::start_per_sequence(&ids),
            Positions::per_sequence(&ids),
        ] {
            let error = Error::PositionOutOfRange {
                position: 9,
                batch: 2,
                token: 0,
                rows: 6,
            };
            assert_eq!(rotated(&table, &problem, positions), Err(error));
        }
    }
}

#[test]
fn ids_of_any_type_are_the_same_integers() {
    let rows = [theta(8), Frequencies::from_theta(7.0, 8).unwrap()];
    let rows = rotator(FrequencyRows::new(&rows).unwrap());
    let problem = f32s(Layout::bshd(2, 2, 1, 8));
    let (small, big) = ([3i32, 0, 7, 1], [3i64, 0, 7, 1]);
    let unsigned = [3u32, 0, 7, 1];
    let (row_i32, row_i64, row_u32) = ([1i32, 0, 0, 1], [1i64, 0, 0, 1], [1u32, 0, 0, 1]);
    let ids: [Ids<&[u8]>; 3] = [(&small).into(), (&big).into(), (&unsigned).into()];
    let row_ids: [Ids<&[u8]>; 3] = [(&row_i32).into(), (&row_i64).into(), (&row_u32).into()];
    let types = [IdType::I32, IdType::I64, IdType::U32];
    let mut results = Vec::new();
    for (ids, id_type) in ids.into_iter().zip(types) {
        assert_eq!((ids.len(), ids.is_empty()), (4, false));
        assert_eq!(ids.id_type(), id_type);
        assert_eq!((0..4).map(|i| ids.get(i)).collect::<Vec<_>>(), big);
        for rows_of_tokens in row_ids {
            let positions = Positions::per_token(ids).frequency_rows_per_token(rows_of_tokens);
            results.push(rotated(&rows, &problem, positions).unwrap());
        }
        let starts: Positions<'_> = match id_type {
            IdType::I32 => Positions::start_per_sequence(&small[..2]),
            IdType::I64 => Positions::start_per_sequence(&big[..2]),
            _ => Positions::start_per_sequence(&unsigned[..2]),
        };
        let per_token = Positions::per_token(&[3, 4, 0, 1]).frequency_rows_per_token(&[1, 1, 0, 0]);
        let expected = rotated(&rows, &problem, per_token).unwrap();
        for positions in [
            starts.frequency_rows_per_sequence(&row_i32[..2]),
            starts.frequency_rows_per_sequence(&row_i64[..2]),
            starts.frequency_rows_per_sequence(&row_u32[..2]),
        ] {
            assert_eq!(rotated(&rows, &problem, positions).unwrap(), expected);
        }
    }
    assert!(results.iter().all(|result| *result == results[0]));

    // The ends of each type, which no other one holds.
    let exact = rotator(theta(8));
    let problem = f32s(Layout::tokens(2, 1, 8));
    let at = |positions| rotated(&exact, &problem, positions).unwrap();
    assert_eq!(
        at(Positions::per_token(&[i32::MIN, i32::MAX])),
        at(Positions::per_token(&[-(1i64 << 31), (1 << 31) - 1]))
    );
    assert_eq!(
        at(Positions::per_token(&[u32::MAX, 1 << 31])),
        at(Positions::per_token(&[(1i64 << 32) - 1, 1 << 31]))
    );
}

// Operands.

#[test]
fn destinations_may_be_uninitialised() {
    fn check<T: TestElement>() {
        // Gaps between heads and tokens, and two dims that pass through.
        let source = Layout::bshd(2, 3, 2, 8).with_rotary_offset(2);
        let destination = source.with_strides(70, 20, 9).with_offset(1);
        let len = destination.required_len().unwrap();
        let rotator = rotator(theta(6));
        let problem = Problem::new(T::DTYPE).k((source, destination));
        let plan = rotator.plan(&problem).unwrap();
        let x: Vec<T> = (0..96).map(|i| T::nearest(i as f32 - 40.0)).collect();
        let start = Positions::start(7);
        let mark = T::nearest(0.25);
        let mut expected = vec![mark; len];
        let k = Some((&x[..], &mut expected).into());
        rotator.rotate(&plan, None, k, start).unwrap();

        let mut raw = vec![MaybeUninit::<T>::uninit(); len];
        // What lies between is not written.
        let mut written = vec![false; len];
        for (b, t, h) in (0..12).map(|i| (i / 6, i / 2 % 3, i % 2)) {
            let head = 1 + b * 70 + t * 20 + h * 9;
            written[head..head + 8].fill(true);
        }
        for (place, written) in raw.iter_mut().zip(&written) {
            if !written {
                place.write(mark);
            }
        }
        let given = HostDestination::from(&mut raw[..]);
        assert_eq!((given.len(), given.is_empty()), (len, false));
        let k = Some((&x[..], given).into());
        rotator.rotate(&plan, None, k, start).unwrap();
        // SAFETY: the call wrote all elements of the layout, and the others were written before.
        let raw: Vec<T> = raw
            .into_iter()
            .map(|x| unsafe { x.assume_init() })
            .collect();
        same_bits(&raw, &expected).unwrap();

        // A destination that is too short is refused as any other.
        let mut short = vec![MaybeUninit::<T>::uninit(); len - 1];
        let k = Some((&x[..], &mut short[..]).into());
        let error = rotator.rotate(&plan, None, k, start).unwrap_err();
        assert!(matches!(error, Error::BufferTooShort { .. }));
    }
    check::<f32>();
    check::<phasor::half::f16>();
    check::<phasor::half::bf16>();
    assert!(HostDestination::from(&mut Vec::<f32>::new()).is_empty());
}

#[test]
fn operands_are_made_of_slices_and_vectors() {
    let rotator = rotator(theta(8));
    let layout = Layout::tokens(1, 1, 8);
    let in_place = rotator.plan(&f32s(layout)).unwrap();
    let apart = Problem::new(Dtype::F32).q((layout, layout));
    let apart = rotator.plan(&apart).unwrap();
    let x = vec![1.0f32; 8];
    let rotate = |plan: &Plan, q: HostInOut<'_, f32>| {
        rotator
            .rotate(plan, Some(q), None, Positions::start(5))
            .unwrap();
    };
    let mut vector = x.clone();
    rotate(&in_place, (&mut vector).into());
    assert_ne!(vector, x);
    let mut slice = x.clone();
    rotate(&in_place, (&mut slice[..]).into());
    assert_eq!(slice, vector);
    let mut to_vector = vec![0.0; 8];
    rotate(&apart, (&x[..], &mut to_vector).into());
    assert_eq!(to_vector, vector);
    let mut to_slice = vec![0.0; 8];
    rotate(&apart, (&x[..], &mut to_slice[..]).into());
    assert_eq!(to_slice, vector);
    let mut to_side = vec![0.0; 8];
    let q = phasor::InOut::OutOfPlace {
        source: &x[..],
        destination: (&mut to_side[..]).into(),
    };
    rotate(&apart, q);
    assert_eq!(to_side, vector);
}

// Addresses.

fn expose<T>(values: &[T]) -> u64 {
    values.as_ptr().expose_provenance() as u64
}

fn expose_mut<T>(values: &mut [T]) -> u64 {
    values.as_mut_ptr().expose_provenance() as u64
}

fn at(values: &Values) -> Ids<u64> {
    match values {
        Values::I32(ids) => Ids::at(expose(ids), IdType::I32, ids.len()),
        Values::I64(ids) => Ids::at(expose(ids), IdType::I64, ids.len()),
        Values::U32(ids) => Ids::at(expose(ids), IdType::U32, ids.len()),
    }
}

/// The case's positions, by address.
fn raw_positions(case: &Case) -> RawPositions {
    let ids = at(&case.positions.values);
    match case.positions.kind {
        PositionKind::StartPerSequence => RawPositions::start_per_sequence(ids),
        PositionKind::PerSequence => RawPositions::per_sequence(ids),
        PositionKind::PerToken => RawPositions::per_token(ids),
        PositionKind::PerTokenShared => RawPositions::per_token_shared(ids),
        PositionKind::PerAxis => RawPositions::per_axis(ids),
        _ => {
            let start = case.positions.given().as_start();
            RawPositions::start(start.expect("no other kind is without ids"))
        }
    }
}

/// The same case by slices and by addresses.
fn alike<T: TestElement>(
    case: &Case,
    rope: &Rope,
    positions: RawPositions,
) -> Result<Result<(), Error>, TestCaseError> {
    let before = case.buffers(T::anything);
    let mut by_slice = before.clone();
    let expected = case.run(rope, case.host, &mut by_slice);

    let rotator = case.host.rotator(rope);
    let plan = rotator.plan(&case.problem())?;
    let mut by_address = before.clone();
    let [q, k] = by_address
        .each_mut()
        .map(|[source, destination]| TensorAddresses {
            source: expose(source),
            destination: expose_mut(destination),
        });
    // SAFETY: the buffers reach as far as the layouts, as those of the other call did; they and the
    // positions are apart, and hold what they say.
    let result = unsafe { rotator.rotate_raw(&plan, q, k, positions) };
    prop_assert_eq!(&result, &expected);
    for (got, expected) in by_address.iter().flatten().zip(by_slice.iter().flatten()) {
        same_bits(got, expected)?;
    }
    Ok(result)
}

proptest! {
    #![proptest_config(config(2000))]

    /// Any ids, strides and types.
    #[test]
    fn addresses_rotate_as_slices_do(case in cases(), table in 0..4, inside in any::<bool>()) {
        let mut case = case;
        let pairs = case.rotary_dim / 2;
        let rope = match table {
            0 => {
                let choices = [OutOfRange::Error, OutOfRange::Clamp, OutOfRange::PassThrough];
                let choice = choices[case.seed as usize % 3];
                if inside {
                    match &mut case.positions.values {
                        Values::I32(ids) => ids.iter_mut().for_each(|id| *id &= 7),
                        Values::I64(ids) => ids.iter_mut().for_each(|id| *id &= 7),
                        Values::U32(ids) => ids.iter_mut().for_each(|id| *id &= 7),
                    }
                }
                let table = CosSinTable::new(vec![0.5; 20 * pairs], vec![0.75; 20 * pairs], pairs)?;
                case.rope(table.with_out_of_range(choice))
            }
            _ => case.rope(Frequencies::from_theta(1e4, case.rotary_dim)?),
        };
        let positions = raw_positions(&case);
        let result = match case.dtype {
            Dtype::F32 => alike::<f32>(&case, &rope, positions)?,
            Dtype::F16 => alike::<phasor::half::f16>(&case, &rope, positions)?,
            _ => alike::<phasor::half::bf16>(&case, &rope, positions)?,
        };
        prop_assert!(result.is_ok() || (table == 0 && !inside), "{:?}", result);
    }

    /// Rows of any type, and positions on axes.
    #[test]
    fn rows_by_address_are_those_of_slices(
        (batch, tokens) in (1usize..4, 1usize..4),
        axes in 1usize..3,
        positions in prop::collection::vec(any::<i64>(), 18),
        rows in prop::collection::vec(0i64..4, 9),
        (per_axis, per_token, id_type) in (any::<bool>(), any::<bool>(), 0..3),
    ) {
        let row = |step: u64| {
            let steps = (0..axes * 4).map(|i| (i as u64 + 1).wrapping_mul(step)).collect();
            Frequencies::from_axis_steps(steps, axes)
        };
        let odd = [0x9e37_79b9_7f4a_7c15u64, 0x1234_5678_9abc_def1, 3];
        let made = odd.map(row).into_iter().collect::<Result<Vec<_>, _>>()?;
        let rotator = rotator(FrequencyRows::new(&made)?);
        let problem = f32s(Layout::bshd(batch, tokens, 2, 8));
        let plan = rotator.plan(&problem)?;

        let ids = match per_axis {
            true => &positions[..axes * batch * tokens],
            false => &positions[..batch],
        };
        let count = if per_token { batch * tokens } else { batch };
        let rows = match id_type {
            0 => Values::I32(rows[..count].iter().map(|&row| row as i32).collect()),
            1 => Values::I64(rows[..count].to_vec()),
            _ => Values::U32(rows[..count].iter().map(|&row| row as u32).collect()),
        };
        let slices: Ids<&[u8]> = match &rows {
            Values::I32(rows) => rows.into(),
            Values::I64(rows) => rows.into(),
            Values::U32(rows) => rows.into(),
        };
        let positions = match per_axis {
            true => Positions::per_axis(ids),
            false => Positions::start_per_sequence(ids),
        };
        let raw = Ids::at(expose(ids), IdType::I64, ids.len());
        let raw = match per_axis {
            true => RawPositions::per_axis(raw),
            false => RawPositions::start_per_sequence(raw),
        };
        let (positions, raw) = match per_token {
            true => (
                positions.frequency_rows_per_token(slices),
                raw.frequency_rows_per_token(at(&rows)),
            ),
            false => (
                positions.frequency_rows_per_sequence(slices),
                raw.frequency_rows_per_sequence(at(&rows)),
            ),
        };
        let mut x = vec![1.0f32; batch * tokens * 16];
        let destination = expose_mut(&mut x);
        let q = TensorAddresses { source: 0, destination };
        // SAFETY: x is as long as its layout; ids and rows hold what they say.
        let result = unsafe { rotator.rotate_raw(&plan, q, TensorAddresses::default(), raw) };
        let expected = rotated(&rotator, &problem, positions);
        let outside = (0..slices.len()).any(|i| slices.get(i) == 3);
        prop_assert_eq!(result.is_err(), outside);
        match (result, expected) {
            (Ok(()), Ok(expected)) => prop_assert_eq!(x, expected),
            (result, expected) => prop_assert_eq!(result.err(), expected.err()),
        }
    }
}

#[test]
fn addresses_are_refused_where_slices_are() {
    let rotator = rotator(theta(8));
    let plan = rotator.plan(&f32s(Layout::tokens(2, 1, 8))).unwrap();
    let mut x = [1.0f32; 16];
    let destination = expose_mut(&mut x);
    let q = TensorAddresses {
        source: 0,
        destination,
    };
    let none = TensorAddresses::default();
    let ids = [0i64; 3];
    let three = Ids::at(expose(&ids), IdType::I64, 3);
    let start = RawPositions::start(1);
    let other = Host::new().rotator(&Rope::new(theta(8), Pairing::HalfSplit));
    // SAFETY: x is as long as its layout, and there are three ids.
    unsafe {
        let result = rotator.rotate_raw(&plan, q, none, RawPositions::per_token(three));
        assert!(matches!(result, Err(Error::PositionsLength { .. })));
        let rows = RawPositions::start(1).frequency_row(0);
        let result = rotator.rotate_raw(&plan, q, none, rows);
        assert!(matches!(result, Err(Error::FrequencyRows { .. })));
        assert_eq!(
            other.rotate_raw(&plan, q, none, start),
            Err(Error::PlanMismatch)
        );
    }
    assert_eq!(x, [1.0; 16]);
    // SAFETY: as above.
    unsafe { rotator.rotate_raw(&plan, q, none, start) }.unwrap();
    assert_ne!(x, [1.0; 16]);
}

/// Windows of one buffer are given by one address; the layouts' offsets are added to it.
#[test]
fn windows_by_address() {
    let rope = Rope::new(theta(8), Pairing::Interleaved);
    let rotator = host(Isa::best(), Threads::One).rotator(&rope);
    let packed = |range| Layout::packed_heads(2, 3, 5, 8, range);
    let problem = f32s(packed(0..2)).k(packed(2..3)).one_buffer();
    let plan = rotator.plan(&problem).unwrap();
    let values = || (0..2 * 3 * 40).map(|i| i as f32).collect::<Vec<_>>();
    let (mut by_slice, mut by_address) = (values(), values());
    let start = Positions::start(11);
    rotator
        .rotate_one_buffer(&plan, &mut by_slice, start)
        .unwrap();
    let destination = expose_mut(&mut by_address);
    let both = TensorAddresses {
        source: destination,
        destination,
    };
    // SAFETY: the buffer is as long as the layouts reach.
    unsafe { rotator.rotate_raw(&plan, both, both, RawPositions::start(11)) }.unwrap();
    assert_eq!(by_address, by_slice);
    assert_ne!(by_slice, values());
}

/// A table of each call turns as a rotation that has it does, and only as far as it reaches.
#[test]
fn a_table_of_the_call() {
    let table = |theta: f64, first: i64, rows: i64| {
        let frequencies = Frequencies::from_theta(theta, 8).unwrap();
        let table = frequencies.table(first..first + rows).unwrap();
        table.with_out_of_range(OutOfRange::PassThrough)
    };
    let given = rotator(table(7.0, 0, 1));
    let layout = Layout::tokens(4, 1, 8);
    let plan = given.plan(&f32s(layout)).unwrap();
    let none = TensorAddresses::default();
    for rows in [6, 3] {
        let of_call = table(1e4, 11, rows);
        let angles = AngleAddresses::TableOfCall {
            cos: expose(of_call.cos()),
            sin: expose(of_call.sin()),
            rows: NonZeroU32::new(rows as u32).unwrap(),
        };
        let mut x = vec![1.0f32; 32];
        let q = TensorAddresses {
            source: 0,
            destination: expose_mut(&mut x),
        };
        let start = RawPositions::start(1);
        // SAFETY: x is as long as its layout, and the table is as long as it says.
        unsafe { given.rotate_raw_by(&plan, angles, q, none, start) }.unwrap();
        let expected = rotated(&rotator(of_call), &f32s(layout), Positions::start(1)).unwrap();
        assert_eq!(x, expected);
        // Four tokens from the second row on are more than three rows have.
        assert_eq!(x[24..] == [1.0; 8], rows == 3);
    }
    // Positions that the table does not serve cannot be refused here, and steps are no table.
    let strict = rotator(table(7.0, 0, 4).with_out_of_range(OutOfRange::Error));
    let plain = rotator(theta(8));
    let values = [0.0f32; 32];
    let angles = AngleAddresses::TableOfCall {
        cos: expose(&values),
        sin: expose(&values),
        rows: NonZeroU32::MIN,
    };
    for rotator in [strict, plain] {
        let plan = rotator.plan(&f32s(layout)).unwrap();
        let start = RawPositions::start(0);
        // SAFETY: nothing is rotated.
        let result = unsafe { rotator.rotate_raw_by(&plan, angles, none, none, start) };
        assert_eq!(result, Err(Error::PlanMismatch));
    }
}
