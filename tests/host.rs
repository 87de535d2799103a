//! The host backend against the reference, and its variants against each other.

mod support;

use approx::{assert_abs_diff_eq, assert_relative_eq};
use phasor::half::{bf16, f16};
use phasor::{
    CosSinTable, Device, Direction, Dtype, Element, Error, Frequencies, Host, HostInOut, InOut,
    Isa, Layout, OutOfRange, Pairing, PositionKind, Positions, Problem, Rope, Threads,
};
use proptest::prelude::*;
use support::cases::{
    Angle, Case, Expected, Random, Tensor, TestElement, TestPositions, Values, cases, compare,
    config, expect, host, nested, one_buffer_cases, same_bits, untouched, variants,
};
use support::oracle::{Oracle, Place};

const BOTH: [Pairing; 2] = [Pairing::HalfSplit, Pairing::Interleaved];

/// Rotates the case, each tensor in buffers of its own, and compares every element of them.
fn check<T: TestElement>(
    case: &Case,
    rope: &Rope,
    angle: impl Fn(usize, i64) -> Option<Angle>,
) -> Result<(), TestCaseError> {
    let before = case.buffers(T::moderate);
    let mut after = before.clone();
    case.run(rope, case.host, &mut after)?;
    for (tensor, (before, after)) in case.tensors.iter().zip(before.iter().zip(&after)) {
        let Some(tensor) = tensor else { continue };
        let mut expected = untouched(&before[1]);
        expect(case, tensor, &before[0], &mut expected, &angle);
        compare(&after[1], &expected)?;
    }
    Ok(())
}

/// The same for tensors that share a buffer.
fn check_one_buffer<T: TestElement>(
    case: &Case,
    rope: &Rope,
    angle: impl Fn(usize, i64) -> Option<Angle>,
) -> Result<(), TestCaseError> {
    let mut random = Random(case.seed);
    let tensors = || case.tensors.iter().flatten();
    let len = tensors()
        .map(|t| t.source.len().max(t.destination.len()))
        .max()
        .unwrap_or(0);
    let before: Vec<T> = (0..len + 2).map(|_| T::moderate(&mut random)).collect();
    let mut after = before.clone();
    let rotator = case.host.rotator(rope);
    // Two elements may be another token.
    let plan = rotator.plan(&case.problem().one_buffer().longer_buffers())?;
    rotator.rotate_one_buffer(&plan, &mut after, case.positions.given())?;
    let mut expected = untouched(&before);
    for tensor in tensors() {
        expect(case, tensor, &before, &mut expected, &angle);
    }
    compare(&after, &expected)
}

/// A theta of any size, and no factor in half of the cases.
fn angles() -> impl Strategy<Value = (f64, f32)> {
    let factor = prop_oneof![Just(1.0f32), 0.25f32..2.0];
    (1.0f64..9.0, factor).prop_map(|(log, factor)| (10f64.powf(log), factor))
}

proptest! {
    #![proptest_config(config(1500))]

    /// Shapes, strides, types, pairings, positions, in place and out of place, with exact angles.
    #[test]
    fn rotation_is_that_of_the_definition(case in cases(), (theta, factor) in angles()) {
        let steps = Oracle::from_theta(theta, case.rotary_dim).steps();
        let frequencies = Frequencies::from_theta(theta, case.rotary_dim)?;
        let rope = case.rope(frequencies.with_attention_factor(factor)?);
        let angle = |pair: usize, p| Some(Angle::of_step(steps[pair], p, factor));
        for_dtype!(case.dtype, check(&case, &rope, angle))?;
    }

    /// Packed heads and other windows of one buffer.
    #[test]
    fn windows_of_one_buffer_rotate_alike(case in one_buffer_cases(), (theta, factor) in angles()) {
        let steps = Oracle::from_theta(theta, case.rotary_dim).steps();
        let frequencies = Frequencies::from_theta(theta, case.rotary_dim)?;
        let rope = case.rope(frequencies.with_attention_factor(factor)?);
        let angle = |pair: usize, p| Some(Angle::of_step(steps[pair], p, factor));
        for_dtype!(case.dtype, check_one_buffer(&case, &rope, angle))?;
    }

    /// A table's rows are used as they are, whatever they hold; outside its rows positions do what
    /// was chosen.
    #[test]
    fn tables_rotate_by_their_rows(
        case in cases(),
        rows in 1usize..2000,
        out_of_range in prop::sample::select(vec![
            OutOfRange::Error, OutOfRange::Clamp, OutOfRange::PassThrough,
        ]),
    ) {
        let mut random = Random(case.seed ^ 1);
        let pairs = case.rotary_dim / 2;
        // A start that an `Error` table rarely holds, brought back inside in half of the cases.
        let mut case = case;
        if case.seed % 2 == 0 {
            let bring_in = |p: i128| p.rem_euclid(rows as i128);
            match &mut case.positions.values {
                Values::I32(v) => v.iter_mut().for_each(|p| *p = bring_in((*p).into()) as i32),
                Values::I64(v) => v.iter_mut().for_each(|p| *p = bring_in((*p).into()) as i64),
                Values::U32(v) => v.iter_mut().for_each(|p| *p = bring_in((*p).into()) as u32),
            }
        }
        let mut column = || -> Vec<f32> {
            (0..rows * pairs).map(|_| (4.0 * random.unit() - 2.0) as f32).collect()
        };
        let (cos, sin) = (column(), column());
        let table = CosSinTable::new(cos.clone(), sin.clone(), pairs)?;
        let rope = case.rope(table.with_out_of_range(out_of_range));
        let row = |position: i64| usize::try_from(position).ok().filter(|&p| p < rows);

        // The tokens that rotate, in the order in which they are checked.
        let shape = case.tensors.iter().flatten().map(|t| t.source.shape).next();
        let [batch, sequence, ..] = shape.unwrap_or_default();
        let any_head = case.tensors.iter().flatten().any(|t| t.source.heads().count() > 0);
        let tokens = (0..batch).flat_map(|b| (0..sequence).map(move |s| (b, s)));
        let first_outside = tokens.filter(|_| any_head)
            .find(|&(b, s)| row(case.positions.at(b, s)).is_none());

        if let (OutOfRange::Error, Some((b, s))) = (out_of_range, first_outside) {
            let before = case.buffers(f32::anything);
            let mut after = before.clone();
            case.dtype = Dtype::F32;
            let error = case.run(&rope, case.host, &mut after).unwrap_err();
            let position = case.positions.at(b, s);
            prop_assert_eq!(
                error,
                Error::PositionOutOfRange { position, batch: b, token: s, rows }
            );
            for (before, after) in before.iter().flatten().zip(after.iter().flatten()) {
                same_bits(after, before)?;
            }
        } else {
            let angle = |pair: usize, position: i64| {
                let row = match out_of_range {
                    OutOfRange::Clamp => position.clamp(0, rows as i64 - 1) as usize,
                    _ => row(position)?,
                };
                let at = row * pairs + pair;
                Some(Angle { cos: cos[at].into(), sin: sin[at].into(), error: 0.0 })
            };
            for_dtype!(case.dtype, check(&case, &rope, angle))?;
        }
    }

}

proptest! {
    #![proptest_config(config(6000))]

    /// The order of operations that the documentation promises, on any bits at all.
    #[test]
    fn every_bit_follows_from_the_documented_order(case in cases(), (theta, factor) in angles()) {
        let frequencies =
            Frequencies::from_theta(theta, case.rotary_dim)?.with_attention_factor(factor)?;
        let rope = case.rope(frequencies.clone());
        for_dtype!(case.dtype, documented(&case, &rope, &frequencies))?;
    }

    /// Every variant, on one thread or several, gives the bits of the scalar one.
    #[test]
    fn variants_agree_bit_for_bit(case in cases(), (theta, factor) in angles(), table in 0..4) {
        let rope = if table == 0 {
            let mut random = Random(case.seed ^ 2);
            let pairs = case.rotary_dim / 2;
            let mut column = || (0..20 * pairs).map(|_| f32::anything(&mut random)).collect();
            case.rope(
                CosSinTable::new(column(), column(), pairs)?
                    .with_out_of_range(OutOfRange::PassThrough),
            )
        } else {
            let frequencies = Frequencies::from_theta(theta, case.rotary_dim)?;
            case.rope(frequencies.with_attention_factor(factor)?)
        };
        for_dtype!(case.dtype, variants_agree(&case, &rope))?;
    }
}

fn documented<T: TestElement>(
    case: &Case,
    rope: &Rope,
    frequencies: &Frequencies,
) -> Result<(), TestCaseError> {
    let before = case.buffers(T::anything);
    let mut after = before.clone();
    case.run(rope, case.host, &mut after)?;
    for (tensor, (before, after)) in case.tensors.iter().zip(before.iter().zip(&after)) {
        let Some(tensor) = tensor else { continue };
        let mut expected = untouched(&before[1]);
        for (b, s, h) in tensor.source.heads() {
            let from = |d| before[0][tensor.source.index([b, s, h, d])];
            let to = |d| tensor.destination.index([b, s, h, d]);
            if !tensor.in_place {
                for d in 0..tensor.source.shape[3] {
                    expected[to(d)] = Expected::Bits(from(d).bits32());
                }
            }
            for pair in 0..case.rotary_dim / 2 {
                let (cos, sin) = frequencies.cos_sin(pair, case.positions.at(b, s));
                let sin = match case.direction {
                    Direction::Forward => sin,
                    Direction::Inverse => -sin,
                };
                let (i, j) = case.dims(pair);
                let (i, j) = (
                    tensor.source.rotary_offset + i,
                    tensor.source.rotary_offset + j,
                );
                let (x, y) = (from(i).exact() as f32, from(j).exact() as f32);
                for (d, result) in [
                    (i, x.mul_add(cos, -(y * sin))),
                    (j, x.mul_add(sin, y * cos)),
                ] {
                    let bits = match result.is_nan() {
                        true => T::NAN,
                        false => T::nearest(result).bits32(),
                    };
                    expected[to(d)] = Expected::Bits(bits);
                }
            }
        }
        compare(&after[1], &expected)?;
    }
    Ok(())
}

/// Runs `action` in pools of several sizes, where there are threads.
fn in_pools(
    mut action: impl FnMut() -> Result<(), TestCaseError> + Send,
) -> Result<(), TestCaseError> {
    #[cfg(feature = "rayon")]
    for threads in [2, 3, 5] {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(&mut action)?;
    }
    action()
}

fn variants_agree<T: TestElement>(case: &Case, rope: &Rope) -> Result<(), TestCaseError> {
    let buffers = case.buffers(T::anything);
    let run = |isa, threads| {
        let mut buffers = buffers.clone();
        case.run(rope, host(isa, threads), &mut buffers)?;
        Ok::<_, TestCaseError>(buffers)
    };
    let scalar = run(Isa::Scalar, Threads::One)?;
    for isa in variants() {
        for threads in [Threads::One, Threads::Pool] {
            let got = run(isa, threads)?;
            for (got, scalar) in got.iter().flatten().zip(scalar.iter().flatten()) {
                same_bits(got, scalar)?;
            }
        }
    }
    Ok(())
}

/// A case without gaps, in place or out of place.
fn plain(shape: [usize; 4], rotary_dim: usize, in_place: bool, positions: TestPositions) -> Case {
    let place = nested(shape, [2, 1, 0], [0; 3], 0);
    let tensor = Tensor {
        in_place,
        ..Tensor::in_place(place)
    };
    Case {
        dtype: Dtype::F32,
        pairing: Pairing::HalfSplit,
        direction: Direction::Forward,
        rotary_dim,
        tensors: [Some(tensor), None],
        positions,
        host: Host::new(),
        seed: 7,
    }
}

/// Calls that are large enough to be split, by tokens and by heads, evenly and not: every element
/// is compared with the scalar variant on one thread.
#[test]
fn large_calls_are_split_without_a_trace() {
    // 1 MiB read and written is where splitting begins; all of these are above it, also in 16 bits.
    // The first and the last have more pairs than are formed at a time, and few tokens.
    let shapes: [([usize; 4], usize); 4] = [
        ([1, 1, 530, 512], 510),
        ([1, 3, 300, 320], 320),
        ([1, 257, 9, 130], 128),
        ([2, 1, 140, 1030], 1026),
    ];
    for (shape, rotary_dim) in shapes {
        for pairing in BOTH {
            for dtype in Dtype::ALL {
                for in_place in [true, false] {
                    let [batch, sequence, heads, head_dim] = shape;
                    let starts = (0..batch as i64).map(|b| b * 1_000_003 - 5).collect();
                    let mut case = plain(
                        shape,
                        rotary_dim,
                        in_place,
                        TestPositions {
                            kind: PositionKind::StartPerSequence,
                            values: Values::I64(starts),
                            sequence,
                        },
                    );
                    // k with fewer heads than threads, so that some parts have none of it.
                    let k = [batch, sequence, 1 + heads / 40, head_dim];
                    case.tensors[1] = Some(Tensor::in_place(nested(k, [1, 2, 0], [3, 0, 1], 2)));
                    (case.pairing, case.dtype) = (pairing, dtype);
                    let rope = case.rope(Frequencies::from_theta(1e4, rotary_dim).unwrap());
                    in_pools(|| for_dtype!(dtype, variants_agree(&case, &rope)))
                        .unwrap_or_else(|e| panic!("{shape:?} {pairing:?} {dtype}: {e}"));
                }
            }
        }
    }
}

/// The stride of a dim of one is never walked, however large it is.
#[test]
fn strides_that_lead_nowhere() {
    let rope = rope(1e4, 64, Pairing::HalfSplit);
    let mut expected = [1.0f32; 64];
    rotate_head(&rope, &mut expected, 7);
    for huge in [usize::MAX, usize::MAX / 2, 1 << 61] {
        let layout = Layout::tokens(1, 1, 64).with_strides(huge, huge, huge);
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            let rotator = Host::new().with_isa(isa).unwrap().rotator(&rope);
            let plan = rotator.plan(&Problem::new(Dtype::F32).q(layout)).unwrap();
            let mut head = [1.0f32; 64];
            rotator
                .rotate(
                    &plan,
                    Some(InOut::InPlace(&mut head[..])),
                    None,
                    Positions::start(7),
                )
                .unwrap();
            assert_eq!(head, expected, "{} {huge}", isa.name());
        }
    }
}

/// A large call against the definition, so that splitting is judged by more than itself.
#[test]
fn large_calls_are_those_of_the_definition() {
    for (shape, rotary_dim) in [
        ([1, 1, 520, 512], 512),
        ([3, 50, 15, 128], 64),
        ([1, 2, 130, 1100], 1090),
    ] {
        for dtype in Dtype::ALL {
            let mut case = plain(shape, rotary_dim, false, TestPositions::start(-20));
            case.dtype = dtype;
            case.tensors[1] = Some(Tensor::in_place(case.tensors[0].clone().unwrap().source));
            let rope = case.rope(Frequencies::from_theta(1e4, rotary_dim).unwrap());
            let steps = Oracle::from_theta(1e4, rotary_dim).steps();
            let angle = |pair: usize, p| Some(Angle::of_step(steps[pair], p, 1.0));
            in_pools(|| for_dtype!(dtype, check(&case, &rope, angle))).unwrap();
        }
    }
}

/// cos and sin of a quarter of a million phases at five positions, as each variant forms them: pairs (1, 0) turn into them.
#[test]
fn variants_form_the_same_cos_and_sin() {
    let mut random = Random(8);
    let eighths = (0..8u64).flat_map(|k| {
        let near = (0..62).flat_map(|bit| [1u64 << bit, (1u64 << bit).wrapping_neg()]);
        near.chain([0, 511, 512, 513])
            .map(move |d| (k << 61).wrapping_add(d))
    });
    let mut steps: Vec<u64> = eighths.collect();
    let count = if cfg!(debug_assertions) {
        1 << 14
    } else {
        1 << 18
    };
    steps.extend((0..count).map(|_| random.bits()));
    let pairs = steps.len();
    let frequencies = Frequencies::from_steps(steps).unwrap();
    let rope = Rope::new(frequencies.clone(), Pairing::HalfSplit);
    for isa in variants() {
        let rotator = host(isa, Threads::One).rotator(&rope);
        let problem = Problem::new(Dtype::F32).q(Layout::tokens(1, 1, 2 * pairs));
        let plan = rotator.plan(&problem).unwrap();
        for position in [1, -1, 0x1_0000_0001, i64::MIN, 0x7fff_ffff_ffff_ffff] {
            let mut x = vec![1.0f32; pairs];
            x.resize(2 * pairs, 0.0);
            let q = Some(InOut::InPlace(&mut x[..]));
            rotator
                .rotate(&plan, q, None, Positions::start(position))
                .unwrap();
            for pair in 0..pairs {
                let (cos, sin) = frequencies.cos_sin(pair, position);
                // fma(1, cos, -(0 * sin)) is cos but for the sign of zero, which + 0.0 drops.
                let got = [x[pair], x[pairs + pair]].map(|x| (x + 0.0).to_bits());
                let step = frequencies.steps()[pair];
                assert_eq!(
                    got,
                    [cos, sin].map(|x| (x + 0.0).to_bits()),
                    "{}, step {step:#x} at {position}",
                    isa.name()
                );
            }
        }
    }
}

/// Rotates one head at one position, by every variant.
fn rotate_head<T: TestElement>(rope: &Rope, head: &mut [T], position: i64) {
    let before = head.to_vec();
    for (i, isa) in variants().into_iter().enumerate() {
        let mut after = before.clone();
        let rotator = host(isa, Threads::One).rotator(rope);
        let problem = Problem::new(T::DTYPE).q(Layout::tokens(1, 1, head.len()));
        let plan = rotator.plan(&problem).unwrap();
        let q = Some(InOut::InPlace(&mut after[..]));
        rotator
            .rotate(&plan, q, None, Positions::start(position))
            .unwrap();
        if i == 0 {
            head.copy_from_slice(&after);
        }
        same_bits(&after, head).unwrap();
    }
}

fn rope(theta: f64, rotary_dim: usize, pairing: Pairing) -> Rope {
    Rope::new(Frequencies::from_theta(theta, rotary_dim).unwrap(), pairing)
}

#[test]
fn worked_example() {
    let mut x = [1.0f32, 0.0, 0.0, 1.0];
    rotate_head(&rope(10_000.0, 4, Pairing::Interleaved), &mut x, 1);
    // Pair 0 is (1, 0) turned by 1, pair 1 is (0, 1) turned by 10000^(-2/4) = 0.01. A widely read
    // tutorial prints [0.540, 0.841, -1e-4, 1.0] here; its own code gives what stands below, as
    // -sin(0.01) is -0.01, not -1e-4, and cos(0.01) is 0.99995.
    let expected = [0.540_302_3, 0.841_471, -0.009_999_8, 0.999_95f32];
    for (x, expected) in x.into_iter().zip(expected) {
        // Seven digits are given, and cos and sin are within 2^-23.
        assert_abs_diff_eq!(x, expected, epsilon = 1.7e-7);
    }

    // Half split, the same pairs are (x0, x2) and (x1, x3).
    let mut x = [1.0f32, 0.0, 0.0, 1.0];
    rotate_head(&rope(10_000.0, 4, Pairing::HalfSplit), &mut x, 1);
    let expected = [0.540_302_3, -0.009_999_8, 0.841_471, 0.999_95f32];
    for (x, expected) in x.into_iter().zip(expected) {
        assert_abs_diff_eq!(x, expected, epsilon = 1.7e-7);
    }
}

/// The property that RoPE is for: scores depend on the distance of positions alone.
#[test]
fn scores_depend_on_the_distance_alone() {
    let mut random = Random(9);
    let dim = 64;
    let head = |random: &mut Random| -> Vec<f32> {
        (0..dim)
            .map(|_| (2.0 * random.unit() - 1.0) as f32)
            .collect()
    };
    let (q, k) = (head(&mut random), head(&mut random));
    for pairing in BOTH {
        let rope = rope(10_000.0, dim, pairing);
        let score = |p: i64| {
            let (mut q, mut k) = (q.clone(), k.clone());
            rotate_head(&rope, &mut q, p + 17);
            rotate_head(&rope, &mut k, p);
            let products = q.iter().zip(&k).map(|(&q, &k)| f64::from(q) * f64::from(k));
            products.sum::<f64>()
        };
        let near = score(0);
        for p in [1, 1000, 131_072, 1 << 31, -(1 << 31), i64::MAX - 40] {
            // 64 products of elements below sqrt(2), each off by 2^-21 on either side at most.
            assert_abs_diff_eq!(score(p), near, epsilon = 64.0 * 4.0 * 2f64.powi(-21));
        }
    }
}

/// All values of a 16-bit type stay what they are at position 0; NaN becomes the canonical one.
fn identity_at_zero<T: TestElement>() {
    for pairing in BOTH {
        let all: Vec<T> = (0..1 << 16).map(T::from_bits32).collect();
        // Partners are finite, as inf * sin(0) is NaN. Their sign is the one that keeps a zero's:
        // x * 1 - y * 0 with y = 1, and y * 0 + x * 1 with y = -1.
        for (member, partner) in [(0, T::nearest(1.0)), (1, T::nearest(-1.0))] {
            let pairs = all.len();
            let mut x = vec![partner; 2 * pairs];
            let at = |i: usize| match pairing {
                Pairing::HalfSplit => i + member * pairs,
                Pairing::Interleaved => 2 * i + member,
            };
            for (i, &value) in all.iter().enumerate() {
                x[at(i)] = value;
            }
            for isa in variants() {
                let rope = Rope::new(Frequencies::from_steps(vec![1; pairs]).unwrap(), pairing);
                let rotator = host(isa, Threads::One).rotator(&rope);
                let problem = Problem::new(T::DTYPE).q(Layout::tokens(1, 1, 2 * pairs));
                let plan = rotator.plan(&problem).unwrap();
                let mut x = x.clone();
                let q = Some(InOut::InPlace(&mut x[..]));
                rotator.rotate(&plan, q, None, Positions::start(0)).unwrap();
                for (i, &value) in all.iter().enumerate() {
                    let expected = if value.is_nan() {
                        T::NAN
                    } else {
                        value.bits32()
                    };
                    assert_eq!(x[at(i)].bits32(), expected, "{} {i:#x}", isa.name());
                }
            }
        }
    }
}

/// One pair in heads of three dims, as few as there can be.
#[test]
fn a_dim_beside_the_only_pair_is_copied() {
    let heads = Layout::tokens(3, 2, 3);
    let source: Vec<f32> = (1..=18u8).map(f32::from).collect();
    for pairing in BOTH {
        let rope = rope(1e4, 2, pairing);
        for isa in variants() {
            let rotator = host(isa, Threads::One).rotator(&rope);
            let problem = Problem::new(Dtype::F32).q((heads, heads));
            let plan = rotator.plan(&problem).unwrap();
            let mut rotated = vec![0.0; source.len()];
            let q = Some((&source[..], &mut rotated).into());
            let positions = Positions::per_token_shared(&[0i64; 3]);
            rotator.rotate(&plan, q, None, positions).unwrap();
            assert_eq!(rotated, source, "{} {pairing:?}", isa.name());
        }
    }
}

#[test]
fn all_halves_stay_what_they_are_at_position_0() {
    identity_at_zero::<f16>();
    identity_at_zero::<bf16>();
}

#[test]
fn infinity_makes_its_partner_nan_even_at_position_0() {
    for infinity in [f32::INFINITY, f32::NEG_INFINITY] {
        // Enough pairs for every variant's vectors, and a rest.
        for pairs in [1, 11, 27] {
            let mut x = vec![2.0f32; 2 * pairs];
            x[0] = infinity;
            rotate_head(&rope(1e4, 2 * pairs, Pairing::Interleaved), &mut x, 0);
            assert_eq!(x[0], infinity);
            // inf * sin(0) is inf * 0, as IEEE 754 has it.
            assert_eq!(x[1].to_bits(), 0x7fff_ffff);
            assert!(x[2..].iter().all(|&x| x == 2.0));
        }
    }
}

#[test]
fn nan_is_canonical_in_rotated_dims_only() {
    fn check<T: TestElement>() {
        for isa in variants() {
            // Signalling, quiet, negative, with payloads.
            let payloads = [1, 2, T::NAN - T::INFINITY, (T::NAN - T::INFINITY) / 3];
            for payload in payloads {
                for sign in [0, T::SIGN] {
                    let nan = T::from_bits32(sign | T::INFINITY | payload);
                    assert!(nan.is_nan());
                    // 25 pairs: vectors of 16 and of 8 with a rest; two dims before, three after.
                    let head = vec![nan; 55];
                    let rope = rope(1e4, 50, Pairing::HalfSplit);
                    let rotator = host(isa, Threads::One).rotator(&rope);
                    let layout = Layout::tokens(1, 1, 55).with_rotary_offset(2);
                    for out_of_place in [false, true] {
                        let mut x = head.clone();
                        let problem = Problem::new(T::DTYPE);
                        let (problem, q) = if out_of_place {
                            let q = HostInOut::from((&head[..], &mut x));
                            (problem.q((layout, layout)), q)
                        } else {
                            (problem.q(layout), InOut::InPlace(&mut x[..]))
                        };
                        let plan = rotator.plan(&problem).unwrap();
                        rotator
                            .rotate(&plan, Some(q), None, Positions::start(3))
                            .unwrap();
                        for (d, x) in x.iter().enumerate() {
                            let rotated = (2..52).contains(&d);
                            let expected = if rotated { T::NAN } else { nan.bits32() };
                            assert_eq!(x.bits32(), expected, "{} dim {d}", isa.name());
                        }
                    }
                }
            }
        }
    }
    check::<f32>();
    check::<f16>();
    check::<bf16>();
}

/// Conversion of one f32, judged by the `half` crate.
fn assert_narrows(bits: u32) {
    let x = f32::from_bits(bits);
    let (f, h, b) = (f32::narrow(x), f16::narrow(x), bf16::narrow(x));
    if x.is_nan() {
        assert_eq!(
            (f.to_bits(), h.to_bits(), b.to_bits()),
            (0x7fff_ffff, 0x7fff, 0x7fff)
        );
    } else {
        assert_eq!(f.to_bits(), bits);
        assert_eq!(h.to_bits(), f16::from_f32(x).to_bits(), "{bits:#x}");
        assert_eq!(b.to_bits(), bf16::from_f32(x).to_bits(), "{bits:#x}");
    }
}

#[test]
fn narrowing_is_to_nearest_even() {
    let samples = if cfg!(debug_assertions) {
        1 << 18
    } else {
        1 << 27
    };
    let step = u32::MAX / samples;
    for i in 0..samples {
        assert_narrows(i * step);
    }
    // Halfway between neighbours and next to it, for every value of either type.
    for bits in 0..=u16::MAX {
        for value in [
            f16::from_bits(bits).to_f32(),
            bf16::from_bits(bits).to_f32(),
        ] {
            for half in [0, 1 << 11, 1 << 12, 1 << 13, 1 << 15, 1 << 16] {
                for off in [-1, 0, 1] {
                    assert_narrows(value.to_bits().wrapping_add_signed(half + off));
                }
            }
        }
    }
}

/// Vectors take shortcuts where factors are of a usual size. A table may hold any, in any place, and so
/// may an attention factor be.
#[test]
fn factors_of_any_size() {
    fn check<T: TestElement>(rope: &Rope, rotary_dim: usize) {
        let run = |isa| {
            let rotator = host(isa, Threads::One).rotator(rope);
            let problem = Problem::new(T::DTYPE).q(Layout::tokens(1, 2, rotary_dim));
            let plan = rotator.plan(&problem).unwrap();
            let value = |i: usize| T::nearest((i % 13) as f32 * 1.37 - 6.1);
            let mut x: Vec<T> = (0..2 * rotary_dim).map(value).collect();
            let q = Some(InOut::InPlace(&mut x[..]));
            rotator.rotate(&plan, q, None, Positions::start(0)).unwrap();
            x.into_iter().map(T::bits32).collect::<Vec<_>>()
        };
        let scalar = run(Isa::Scalar);
        for isa in variants() {
            assert!(run(isa) == scalar, "{} {} {rope:?}", T::DTYPE, isa.name());
        }
    }
    let check = |rope: Rope, rotary_dim| {
        check::<f32>(&rope, rotary_dim);
        check::<f16>(&rope, rotary_dim);
        check::<bf16>(&rope, rotary_dim);
    };
    let sizes = [
        f32::NAN,
        f32::INFINITY,
        f32::MAX,
        1e30,
        4097.0,
        1.0,
        1e-5,
        1e-36,
        1e-40,
        0.0,
    ];
    for pairing in BOTH {
        for cos in sizes {
            for sin in sizes.into_iter().chain(sizes.map(|size| -size)) {
                for at in [0, 20, 31] {
                    let mut columns = [vec![0.6; 32], vec![0.8; 32]];
                    (columns[0][at], columns[1][at]) = (cos, sin);
                    let [cos, sin] = columns;
                    check(
                        Rope::new(CosSinTable::new(cos, sin, 32).unwrap(), pairing),
                        64,
                    );
                }
            }
        }
        for factor in [f32::MAX, 1e30, 4097.0, 1e-5, 1e-36, 1e-40] {
            let frequencies = Frequencies::from_theta(1e4, 128).unwrap();
            check(
                Rope::new(frequencies.with_attention_factor(factor).unwrap(), pairing),
                128,
            );
        }
    }
}

/// The shortcuts to their limits: elements and factors of every size that vectors take them for, products
/// that cancel, and a second factor that is tiny or zero.
#[test]
fn usual_sizes_to_their_limits() {
    /// A value of few bits, of every exponent but more often at the ends.
    fn sized(random: &mut Random, least: i32, most: i32) -> f32 {
        let exponent = match random.below(4) {
            0 => least,
            1 => most,
            2 => 0.clamp(least, most),
            _ => least + random.below((most - least + 1) as usize) as i32,
        };
        let size = (1.0 + random.below(128) as f32 / 128.0) * 2f32.powi(exponent);
        [size, -size][random.below(2)]
    }
    fn check<T: TestElement>(random: &mut Random, least: i32, most: i32) {
        let pairs = [32, 40, 48, 64, 128, 160, 256][random.below(7)];
        let (offset, behind) = ([0, 8, 24][random.below(3)], [0, 3, 16][random.below(3)]);
        let pairing = BOTH[random.below(2)];
        let (mut cos, mut sin) = (vec![], vec![]);
        for _ in 0..pairs {
            let larger = sized(random, -12, 11);
            let tiny = sized(random, -140, -13);
            let other = [0.0, -0.0, tiny, larger, 0.7 * larger][random.below(5)];
            let pair = [(larger, other), (other, larger)][random.below(2)];
            cos.push(pair.0);
            sin.push(pair.1);
        }
        let heads = 3;
        let head_dim = offset + 2 * pairs + behind;
        let mut x: Vec<T> = (0..heads * head_dim)
            .map(|_| T::nearest(sized(random, least, most)))
            .collect();
        for head in x.chunks_mut(head_dim) {
            for pair in (0..pairs).step_by(3) {
                let (i, j) = match pairing {
                    Pairing::HalfSplit => (pair, pairs + pair),
                    Pairing::Interleaved => (2 * pair, 2 * pair + 1),
                };
                // x cos and y sin are about the same.
                let y = head[offset + i].exact() as f32 * cos[pair] / sin[pair];
                if (2f32.powi(least)..2f32.powi(most)).contains(&y.abs()) {
                    head[offset + j] = T::nearest(y);
                }
            }
        }
        let rope = Rope::new(CosSinTable::new(cos, sin, pairs).unwrap(), pairing);
        let layout = Layout::tokens(1, heads, head_dim).with_rotary_offset(offset);
        let run = |isa| {
            let rotator = host(isa, Threads::One).rotator(&rope);
            let plan = rotator.plan(&Problem::new(T::DTYPE).q(layout)).unwrap();
            let mut x = x.clone();
            let q = Some(InOut::InPlace(&mut x[..]));
            rotator.rotate(&plan, q, None, Positions::start(0)).unwrap();
            x.into_iter().map(T::bits32).collect::<Vec<_>>()
        };
        let scalar = run(Isa::Scalar);
        for isa in variants() {
            let (dtype, name) = (T::DTYPE, isa.name());
            assert!(
                run(isa) == scalar,
                "{dtype} {name}, {pairs} pairs, {pairing:?}, {x:?}"
            );
        }
    }
    let mut random = Random(12);
    for _ in 0..300 {
        check::<f32>(&mut random, -126, 126);
        check::<f16>(&mut random, -24, 14);
        check::<bf16>(&mut random, -63, 64);
    }
}

/// What rotating stores is rounded once, to nearest even, in every variant: at position 0 a pair
/// (x, 0) is multiplied by cos = 1, and with a table's row by any f32 at all.
#[test]
fn stores_round_to_nearest_even() {
    fn check<T: TestElement>(values: &[f32]) {
        let pairs = values.len();
        for pairing in BOTH {
            for isa in variants() {
                // (1, 0) turns into (cos, sin); both columns hold the values, in other order.
                let sin: Vec<f32> = values.iter().rev().copied().collect();
                let table = CosSinTable::new(values.to_vec(), sin.clone(), pairs).unwrap();
                let rope = Rope::new(table, pairing);
                let rotator = host(isa, Threads::One).rotator(&rope);
                let problem = Problem::new(T::DTYPE).q(Layout::tokens(1, 1, 2 * pairs));
                let plan = rotator.plan(&problem).unwrap();
                let at = |i: usize| match pairing {
                    Pairing::HalfSplit => (i, i + pairs),
                    Pairing::Interleaved => (2 * i, 2 * i + 1),
                };
                let mut x = vec![T::nearest(0.0); 2 * pairs];
                for i in 0..pairs {
                    x[at(i).0] = T::nearest(1.0);
                }
                let q = Some(InOut::InPlace(&mut x[..]));
                rotator.rotate(&plan, q, None, Positions::start(0)).unwrap();
                for i in 0..pairs {
                    for (got, value) in [(x[at(i).0], values[i]), (x[at(i).1], sin[i])] {
                        // The other product is a zero, whose sign may win over a zero's.
                        let unsigned_zero = |x: T| match x.exact() == 0.0 {
                            true => 0,
                            false => x.bits32(),
                        };
                        let (got, expected) =
                            (unsigned_zero(got), unsigned_zero(T::nearest(value)));
                        assert_eq!(got, expected, "{} {:#x}", isa.name(), value.to_bits());
                    }
                }
            }
        }
    }
    // Ties and their neighbours around values of both 16-bit types, normal and subnormal.
    let mut values = vec![];
    let mut random = Random(10);
    for _ in 0..if cfg!(debug_assertions) {
        1 << 10
    } else {
        1 << 14
    } {
        let bits = random.bits() as u16;
        for value in [
            f16::from_bits(bits).to_f32(),
            bf16::from_bits(bits).to_f32(),
        ] {
            for half in [0, 1 << 12, 1 << 15] {
                for off in [-1, 0, 1] {
                    values.push(f32::from_bits(
                        value.to_bits().wrapping_add_signed(half + off),
                    ));
                }
            }
        }
        values.push(f32::from_bits(random.bits() as u32));
    }
    // A product of infinity and 0 is NaN, in both members.
    values.retain(|x| x.is_finite());
    check::<f32>(&values);
    check::<f16>(&values);
    check::<bf16>(&values);
}

#[test]
fn the_inverse_undoes_the_rotation() {
    let mut random = Random(11);
    for pairing in BOTH {
        for rotary_dim in [2, 18, 64] {
            let forward = rope(1e4, rotary_dim, pairing);
            let inverse = forward.clone().with_direction(Direction::Inverse);
            for position in [1, -1, 4097, 1 << 40, i64::MIN] {
                let before: Vec<f32> = (0..rotary_dim)
                    .map(|_| f32::moderate(&mut random))
                    .collect();
                let mut x = before.clone();
                rotate_head(&forward, &mut x, position);
                // Half of all steps are even and turn by nothing at -2^63.
                assert!(x != before || position == i64::MIN);
                let turned = x.clone();
                rotate_head(&inverse, &mut x, position);
                // Two rotations, each off by at most 4 * 2^-23 times |a| + |b| <= 2 max.
                let largest = before.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                for (&x, &before) in x.iter().zip(&before) {
                    assert_abs_diff_eq!(x, before, epsilon = largest * 16.0 / 8_388_608.0);
                }
                // The inverse is the rotation by the negative position.
                let mut x = before;
                rotate_head(&inverse, &mut x, position.wrapping_neg());
                if position != i64::MIN {
                    assert_eq!(x, turned);
                }
            }
        }
    }
}

/// A plan is for one direction, and only a rotator of that direction takes it.
#[test]
fn a_plan_carries_its_direction() {
    let forward = rope(1e4, 2, Pairing::HalfSplit);
    let inverse = forward.clone().with_direction(Direction::Inverse);
    assert_eq!(inverse.direction(), Direction::Inverse);
    let problem = Problem::new(Dtype::F32).q(Layout::tokens(1, 1, 2));
    let plan = Host::new().rotator(&inverse).plan(&problem).unwrap();
    let mut x = [1.0f32, 0.0];
    let q = Some(InOut::InPlace(&mut x[..]));
    let rotator = Host::new().rotator(&inverse.clone());
    rotator.rotate(&plan, q, None, Positions::start(1)).unwrap();
    assert_relative_eq!(x[1], -(1f32.sin()), max_relative = 2e-7);
    let q = Some(InOut::InPlace(&mut x[..]));
    let rotator = Host::new().rotator(&forward);
    let error = rotator.rotate(&plan, q, None, Positions::start(1));
    assert_eq!(error, Err(Error::PlanMismatch));
}

#[test]
fn the_attention_factor_scales_rotated_dims_only() {
    let frequencies = Frequencies::from_theta(1e4, 4).unwrap();
    for direction in [Direction::Forward, Direction::Inverse] {
        let rope = Rope::new(
            frequencies.clone().with_attention_factor(2.0).unwrap(),
            Pairing::HalfSplit,
        )
        .with_direction(direction);
        let rotator = Host::new().rotator(&rope);
        let layout = Layout::tokens(1, 1, 9).with_rotary_offset(2);
        let plan = rotator.plan(&Problem::new(Dtype::F32).q(layout)).unwrap();
        let mut x = [1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0];
        let q = Some(InOut::InPlace(&mut x[..]));
        rotator.rotate(&plan, q, None, Positions::start(0)).unwrap();
        // At position 0 cos is 1 and sin 0, so the factor alone is left; doubling is exact.
        assert_eq!(x, [1.0, 2.0, 6.0, 8.0, 10.0, 12.0, 7.0, 8.0, 9.0]);
    }
}

#[test]
fn named_layouts_are_what_they_say() {
    let place = |order| nested([2, 3, 4, 8], order, [0; 3], 0).layout();
    assert_eq!(Layout::bshd(2, 3, 4, 8), place([2, 1, 0]));
    assert_eq!(Layout::bhsd(2, 3, 4, 8), place([1, 2, 0]));
    assert_eq!(
        Layout::tokens(3, 4, 8),
        nested([1, 3, 4, 8], [2, 1, 0], [0; 3], 0).layout()
    );
    let window = Place {
        shape: [2, 3, 2, 8],
        strides: [3 * 12 * 8, 12 * 8, 8],
        offset: 64,
        rotary_offset: 0,
    };
    assert_eq!(Layout::packed_heads(2, 3, 12, 8, 8..10), window.layout());
    assert_eq!(window.layout().required_len(), Some(window.len()));
    // Also where ranges are empty or backward.
    assert!(Layout::packed_heads(2, 3, 12, 8, 8..8).is_empty());
    #[expect(clippy::reversed_empty_ranges)]
    let backward = Layout::packed_heads(2, 3, 12, 8, 9..8);
    assert_eq!(backward.required_len(), Some(0));
}

proptest! {
    #![proptest_config(config(2000))]

    #[test]
    fn required_len_is_one_past_the_last_element(case in cases()) {
        for tensor in case.tensors.iter().flatten() {
            for place in [&tensor.source, &tensor.destination] {
                let layout = place.layout();
                prop_assert_eq!(layout.required_len(), Some(place.len()));
                prop_assert_eq!(layout.shape(), place.shape);
                prop_assert_eq!(layout.strides(), place.strides);
                prop_assert_eq!(layout.offset(), place.offset);
                prop_assert_eq!(layout.rotary_offset(), place.rotary_offset);
                prop_assert_eq!(layout.is_empty(), place.heads().next().is_none());
            }
        }
    }
}

/// Nothing to rotate is no error, and touches nothing.
#[test]
fn empty_problems() {
    let rope = rope(1e4, 4, Pairing::HalfSplit);
    let rotator = Host::new().rotator(&rope);
    let mut x = [1.0f32; 4];
    for layout in [
        Layout::bshd(0, 3, 2, 4),
        Layout::bshd(2, 0, 2, 4),
        Layout::bshd(2, 3, 0, 4),
        Layout::tokens(0, 0, 4).with_offset(usize::MAX),
    ] {
        let [batch, sequence, ..] = layout.shape();
        let (starts, ids) = (vec![1i32; batch], vec![1i32; batch * sequence]);
        for positions in [
            Positions::start(1),
            Positions::start_per_sequence(&starts[..]),
            Positions::per_token(&ids[..]),
        ] {
            let plan = rotator.plan(&Problem::new(Dtype::F32).q(layout)).unwrap();
            assert!(plan.is_empty());
            assert_eq!(plan.bytes(), 0);
            let q = Some(InOut::InPlace(&mut x[..0]));
            rotator.rotate(&plan, q, None, positions).unwrap();
        }
    }
    // An empty q beside a k that is not.
    let problem = Problem::new(Dtype::F32)
        .q(Layout::tokens(1, 0, 4).with_offset(usize::MAX))
        .k(Layout::tokens(1, 1, 4));
    let plan = rotator.plan(&problem).unwrap();
    assert!(!plan.is_empty());
    let (q, k) = (InOut::InPlace(&mut [][..]), InOut::InPlace(&mut x[..]));
    rotator
        .rotate(&plan, Some(q), Some(k), Positions::start(2))
        .unwrap();
    assert_abs_diff_eq!(x[0], 2f32.cos() - 2f32.sin(), epsilon = 1e-6);
}

#[test]
fn bytes_are_those_read_and_written() {
    let rotator = Host::new().rotator(&rope(1e4, 32, Pairing::HalfSplit));
    let q = Layout::bshd(2, 3, 4, 48);
    let bytes = |problem: Problem| rotator.plan(&problem).unwrap().bytes();
    let heads = 2 * 3 * 4;
    assert_eq!(bytes(Problem::new(Dtype::F32).q(q)), heads * 32 * 4 * 2);
    assert_eq!(
        bytes(Problem::new(Dtype::Bf16).q((q, q))),
        heads * 48 * 2 * 2
    );
    let k = Layout::bshd(2, 3, 1, 32);
    assert_eq!(
        bytes(Problem::new(Dtype::F16).q(q).k(k)),
        (heads + 6) * 32 * 2 * 2
    );
}

/// Tokens outside a table, one kind of position after the other.
#[test]
fn tokens_outside_a_table() {
    // Row r turns (1, 0) into (r + 1, 10 * (r + 1)); nothing is assumed about cos² + sin².
    let rows = 3;
    let cos: Vec<f32> = (1..=rows).map(|r| r as f32).collect();
    let sin: Vec<f32> = (1..=rows).map(|r| 10.0 * r as f32).collect();
    let table = CosSinTable::new(cos, sin, 1).unwrap();
    assert_eq!((table.rows(), table.pairs()), (3, 1));
    let rotated = |row: f32| [row, 10.0 * row];
    let run = |choice, positions: Positions<'_>| {
        let rope = Rope::new(table.clone().with_out_of_range(choice), Pairing::HalfSplit);
        let rotator = Host::new().rotator(&rope);
        let problem = Problem::new(Dtype::F32).q(Layout::bshd(2, 3, 1, 2));
        let plan = rotator.plan(&problem).unwrap();
        let mut x = [[1.0f32, 0.0]; 6];
        let q = Some(InOut::InPlace(x.as_flattened_mut()));
        let result = rotator.rotate(&plan, q, None, positions);
        (result, x)
    };
    let same = [1.0, 0.0];
    let (r1, r2, r3) = (rotated(1.0), rotated(2.0), rotated(3.0));
    let outside = |position, batch, token| {
        Err(Error::PositionOutOfRange {
            position,
            batch,
            token,
            rows: 3,
        })
    };

    let ids = [0, 3, -1, 2, i64::MAX, i64::MIN];
    let per_token = Positions::per_token(&ids[..]);
    assert_eq!(
        run(OutOfRange::Clamp, per_token),
        (Ok(()), [r1, r3, r1, r3, r3, r1])
    );
    let passed = [r1, same, same, r3, same, same];
    assert_eq!(run(OutOfRange::PassThrough, per_token), (Ok(()), passed));
    assert_eq!(
        run(OutOfRange::Error, per_token),
        (outside(3, 0, 1), [same; 6])
    );

    let starts = Positions::start_per_sequence(&[0u32, u32::MAX][..]);
    assert_eq!(
        run(OutOfRange::Clamp, starts),
        (Ok(()), [r1, r2, r3, r3, r3, r3])
    );
    let error = outside(i64::from(u32::MAX), 1, 0);
    assert_eq!(run(OutOfRange::Error, starts), (error, [same; 6]));

    let start = Positions::start(-2);
    assert_eq!(
        run(OutOfRange::PassThrough, start),
        (Ok(()), [same, same, r1, same, same, r1])
    );
    assert_eq!(
        run(OutOfRange::Error, Positions::start(1)),
        (outside(3, 0, 2), [same; 6])
    );
    assert_eq!(
        run(OutOfRange::Error, Positions::start(0)),
        (Ok(()), [r1, r2, r3, r1, r2, r3])
    );
    // start + t wraps: after the largest position comes the smallest.
    let wrapping = Positions::start(i64::MAX - 1);
    assert_eq!(
        run(OutOfRange::Clamp, wrapping),
        (Ok(()), [r3, r3, r1, r3, r3, r1])
    );
}

/// Strides that do not nest can be vouched for.
#[test]
fn strides_that_are_vouched_for() {
    // Heads 6 apart and tokens 4 apart in runs of 2: windows at 0, 4, 6, 10, all disjoint.
    let place = Place {
        shape: [1, 2, 2, 2],
        strides: [0, 4, 6],
        offset: 0,
        rotary_offset: 0,
    };
    // 3 tokens by 2 heads do not nest: 0 4 8 and 6 10 14.
    let place = Place {
        shape: [1, 3, 2, 2],
        ..place
    };
    let rope = rope(1e4, 2, Pairing::HalfSplit);
    let rotator = Host::new().rotator(&rope);
    let problem = Problem::new(Dtype::F32).q(place.layout());
    assert!(matches!(
        rotator.plan(&problem),
        Err(Error::OverlapUnknown { .. })
    ));
    // SAFETY: the windows start at 0, 4, 6, 8, 10 and 14 and are 2 long.
    let plan = rotator.plan(&unsafe { problem.assume_disjoint() }).unwrap();
    let mut case = plain(place.shape, 2, true, TestPositions::start(5));
    case.tensors[0] = Some(Tensor::in_place(place.clone()));
    let before: Vec<f32> = (0..place.len()).map(|i| i as f32).collect();
    let mut x = before.clone();
    let q = Some(InOut::InPlace(&mut x[..]));
    rotator.rotate(&plan, q, None, Positions::start(5)).unwrap();
    let steps = Oracle::from_theta(1e4, 2).steps();
    let angle = |pair: usize, p| Some(Angle::of_step(steps[pair], p, 1.0));
    let mut expected = untouched(&before);
    expect(
        &case,
        case.tensors[0].as_ref().unwrap(),
        &before,
        &mut expected,
        &angle,
    );
    compare(&x, &expected).unwrap();
}

/// The facade runs the same rotation.
#[test]
fn the_device_facade_on_the_host() {
    let device = Device::host();
    assert!(device.is_host());
    let rope = rope(1e4, 6, Pairing::Interleaved);
    let rotator = device.rotator(&rope).unwrap();
    let layout = Layout::bshd(2, 2, 1, 6);
    let before: Vec<f32> = (0..24).map(|i| i as f32).collect();
    let (i32s, i64s, u32s) = ([1i32, -4], [1i64, -4], [5u32, 4_000_000_000]);
    let (tokens32, tokens64, tokens_u) =
        ([3i32, 1, -4, 1], [1i64 << 40, 2, 3, -4], [7u32, 8, 9, 1]);
    for positions in [
        Positions::start(9),
        Positions::start_per_sequence(&i32s[..]),
        Positions::start_per_sequence(&i64s[..]),
        Positions::start_per_sequence(&u32s[..]),
        Positions::per_token(&tokens32[..]),
        Positions::per_token(&tokens64[..]),
        Positions::per_token(&tokens_u[..]),
    ] {
        let problem = Problem::new(Dtype::F32).q(layout).k((layout, layout));
        let plan = rotator.plan(&problem).unwrap();
        let mut q = device.upload(&before).unwrap();
        let source = device.upload(&before).unwrap();
        let mut k = device.upload(&[0.0f32; 24]).unwrap();
        assert_eq!((k.len(), k.is_empty()), (24, false));
        let k_operand = InOut::OutOfPlace {
            source: &source,
            destination: &mut k,
        };
        let uploaded = device.positions(positions).unwrap();
        rotator
            .rotate(
                &plan,
                Some(InOut::InPlace(&mut q)),
                Some(k_operand),
                &uploaded,
            )
            .unwrap();
        device.synchronize().unwrap();

        let mut expected = before.clone();
        let direct = Host::new().rotator(&rope);
        let plan = direct.plan(&Problem::new(Dtype::F32).q(layout));
        let operand = Some(InOut::InPlace(&mut expected[..]));
        direct
            .rotate(&plan.unwrap(), operand, None, positions)
            .unwrap();
        assert_eq!(q.to_vec().unwrap(), expected);
        assert_eq!(k.to_vec().unwrap(), expected);
        assert_eq!(source.to_vec().unwrap(), before);
    }
    let layout = Layout::packed_heads(1, 2, 2, 6, 1..2);
    let plan = rotator
        .plan(&Problem::new(Dtype::F32).q(layout).one_buffer())
        .unwrap();
    let mut packed = device.upload(&before).unwrap();
    let start = device.positions(Positions::start(0)).unwrap();
    rotator
        .rotate_one_buffer(&plan, &mut packed, &start)
        .unwrap();
    let after = packed.to_vec().unwrap();
    assert_eq!(
        (&after[..18], after[18] != before[18]),
        (&before[..18], true)
    );
}
