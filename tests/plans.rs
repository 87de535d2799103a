//! What a plan serves: buffers of the length it was made for, and parts of itself.

mod support;

use phasor::{
    CacheLayout, Dtype, Error, Frequencies, Host, HostRotator, InOut, KvCacheLayout, Layout,
    Pairing, Plan, Positions, Problem, Rope,
};
use proptest::prelude::*;
use support::cases::{Case, cases, config};
use support::oracle::Place;

fn rotator(rotary_dim: usize) -> HostRotator {
    let frequencies = Frequencies::from_theta(1e4, rotary_dim).unwrap();
    Host::new().rotator(&Rope::new(frequencies, Pairing::HalfSplit))
}

fn f32s() -> Problem {
    Problem::new(Dtype::F32)
}

/// Values that differ from each other.
fn values(len: usize) -> Vec<f32> {
    (0..len).map(|i| 1.0 + i as f32).collect()
}

/// Rotates q in place in a buffer of `len` elements, from position 3 on.
fn in_place(rotator: &HostRotator, plan: &Plan, len: usize) -> Result<Vec<f32>, Error> {
    let mut q = values(len);
    let result = rotator.rotate(plan, Some((&mut q).into()), None, Positions::start(3));
    assert!(result.is_ok() || q == values(len), "a failed call wrote");
    result.map(|()| q)
}

/// The buffer has room for `more`; both lengths are told, and what to do.
#[track_caller]
fn has_room<T>(result: Result<T, Error>, what: &str, more: &str, needed: usize, got: usize) {
    let Err(error) = result else {
        panic!("{what} has room for another {more}");
    };
    let message = error.to_string();
    for phrase in [
        format!("{what}: the buffer has {got} elements"),
        format!("another {more} after the {needed}"),
        "Plan::first_tokens or first_sequences".into(),
        "Problem::longer_buffers".into(),
    ] {
        assert!(
            message.contains(&phrase),
            "{phrase:?} is not in {message:?}"
        );
    }
    assert!(matches!(error, Error::BufferHasRoom { .. }));
}

#[test]
fn plans_of_an_earlier_step_are_refused() {
    let rotator = rotator(8);
    // Tokens, heads inside and outside of tokens, sequences, sequences inside of tokens.
    for (layout, now, more) in [
        (Layout::tokens(5, 3, 8), Layout::tokens(45, 3, 8), "token"),
        (Layout::tokens(1, 3, 8), Layout::tokens(2, 3, 8), "token"),
        (Layout::bshd(2, 5, 3, 8), Layout::bshd(2, 6, 3, 8), "token"),
        (Layout::bhsd(2, 5, 3, 8), Layout::bhsd(2, 6, 3, 8), "token"),
        (Layout::bhsd(1, 1, 3, 8), Layout::bhsd(1, 2, 3, 8), "token"),
        (Layout::bshd(5, 1, 3, 8), Layout::bshd(6, 1, 3, 8), "token"),
        (
            Layout::bshd(2, 5, 3, 8).with_strides(24, 72, 8),
            Layout::bshd(3, 5, 3, 8).with_strides(24, 72, 8),
            "sequence",
        ),
    ] {
        let (needed, got) = [layout, now].map(|l| l.required_len().unwrap()).into();
        let plan = rotator.plan(&f32s().q(layout)).unwrap();
        assert!(in_place(&rotator, &plan, needed).is_ok());
        has_room(in_place(&rotator, &plan, got), "q", more, needed, got);
        let longer = rotator.plan(&f32s().q(layout).longer_buffers()).unwrap();
        let rotated = in_place(&rotator, &longer, got).unwrap();
        assert_eq!(rotated[needed..], values(got)[needed..]);
    }
    // Each buffer of a call.
    let (few, many) = (values(5 * 8), values(6 * 8));
    let layout = Layout::tokens(5, 1, 8);
    let problem = f32s().q((layout, layout)).k((layout, layout));
    let plan = rotator.plan(&problem).unwrap();
    for (long, what) in [
        "q's source",
        "q's destination",
        "k's source",
        "k's destination",
    ]
    .into_iter()
    .enumerate()
    {
        let buffer = |i| if i == long { many.clone() } else { few.clone() };
        let [from_q, mut to_q, from_k, mut to_k] = [0, 1, 2, 3].map(buffer);
        let q = Some((&from_q[..], &mut to_q).into());
        let k = Some((&from_k[..], &mut to_k).into());
        let result = rotator.rotate(&plan, q, k, Positions::start(3));
        has_room(result, what, "token", 40, 48);
        assert_eq!([to_q, to_k], [buffer(1), buffer(3)]);
    }
}

/// Slack that no token fits in says nothing about another step.
#[test]
fn slack_without_room_for_a_token_is_fine() {
    let rotator = rotator(8);
    let plan = rotator.plan(&f32s().q(Layout::tokens(5, 3, 8))).unwrap();
    for slack in [1, 8, 23] {
        assert!(in_place(&rotator, &plan, 120 + slack).is_ok());
    }
    has_room(in_place(&rotator, &plan, 144), "q", "token", 120, 144);
    // Nothing of it is rotated, so that no step can be mistaken for another.
    let empty = rotator.plan(&f32s().q(Layout::tokens(0, 3, 8))).unwrap();
    assert!(empty.is_empty());
    assert_eq!(in_place(&rotator, &empty, 48), Ok(values(48)));
}

#[test]
fn windows_of_packed_buffers_have_no_room() {
    let rotator = rotator(8);
    let packed = |tokens, range| Layout::packed_heads(2, tokens, 12, 8, range);
    // q, k and v in each token; q, k and v in each head.
    let in_heads = Layout::tokens(10, 4, 8).with_strides(0, 96, 24);
    for (q, k) in [
        (packed(5, 0..8), packed(5, 8..10)),
        (in_heads, in_heads.with_offset(8)),
    ] {
        let plan = rotator.plan(&f32s().q(q).k(k).one_buffer()).unwrap();
        let mut buffer = values(2 * 5 * 12 * 8);
        let start = Positions::start(3);
        assert_eq!(rotator.rotate_one_buffer(&plan, &mut buffer, start), Ok(()));
        let mut longer = values((2 * 5 + 1) * 12 * 8);
        let needed = k.required_len().unwrap();
        let result = rotator.rotate_one_buffer(&plan, &mut longer, start);
        has_room(result, "k", "token", needed, longer.len());
        assert_eq!(longer, values(longer.len()));
        // Windows that are given by themselves.
        for window in [q, k] {
            let plan = rotator.plan(&f32s().q(window)).unwrap();
            assert!(in_place(&rotator, &plan, buffer.len()).is_ok());
        }
    }
}

#[test]
fn regions_of_one_buffer_have_each_others_room() {
    let rotator = rotator(8);
    let (q, k) = (Layout::tokens(5, 4, 8), Layout::tokens(5, 1, 8));
    let start = Positions::start(3);
    for (q, k, last) in [
        (q, k.with_offset(160), "k"),
        (q.with_offset(40), k, "q"),
        (q, k.with_offset(170), "k"),
    ] {
        let plan = rotator.plan(&f32s().q(q).k(k).one_buffer()).unwrap();
        let [in_q, in_k] = [q, k].map(|layout| layout.required_len().unwrap());
        let needed = in_q.max(in_k);
        let mut buffer = values(needed);
        assert_eq!(rotator.rotate_one_buffer(&plan, &mut buffer, start), Ok(()));
        let mut longer = values(needed + 32);
        let result = rotator.rotate_one_buffer(&plan, &mut longer, start);
        has_room(result, last, "token", needed, needed + 32);
    }
}

/// A token stride of 0 repeats one token, however long the buffer is.
#[test]
fn what_is_repeated_takes_no_room() {
    let rotator = rotator(8);
    let once = Layout::bshd(2, 5, 1, 8).with_strides(0, 0, 8);
    let plan = rotator.plan(&f32s().q((once, Layout::bshd(2, 5, 1, 8))));
    let plan = plan.unwrap();
    let rotate = |source: &[f32], to: usize| {
        let mut destination = vec![0.0; to];
        let q = Some((source, &mut destination).into());
        let result = rotator.rotate(&plan, q, None, Positions::start(3));
        result.map(|()| destination)
    };
    let source = values(1000);
    assert_eq!(rotate(&source, 80), rotate(&source[..8], 80));
    let result = rotate(&source, 88);
    has_room(result, "q's destination", "token", 80, 88);
}

/// Keys of a step go to their places in a cache with room for many.
#[test]
fn caches_are_longer_on_purpose() {
    let rotator = rotator(8);
    // [2 sequences, 64 tokens, 1 head]: three of them, from token 10 on.
    let source = Layout::bshd(2, 3, 1, 8);
    let cache = source.with_strides(64 * 8, 8, 8).with_offset(10 * 8);
    let keys = values(2 * 3 * 8);
    let rotate = |plan: &Plan, len: usize| {
        let mut cache = vec![0.5f32; len];
        let k = Some((&keys[..], &mut cache).into());
        let result = rotator.rotate(plan, None, k, Positions::start(10));
        assert!(result.is_ok() || cache.iter().all(|&x| x == 0.5));
        result.map(|()| cache)
    };
    let problem = f32s().k((source, cache));
    let plan = rotator.plan(&problem).unwrap();
    let (needed, len) = (77 * 8, 2 * 64 * 8);
    has_room(rotate(&plan, len), "k's destination", "token", needed, len);

    let plan = rotator.plan(&problem.longer_buffers()).unwrap();
    let rotated = rotate(&plan, len).unwrap();
    let mut expected = keys.clone();
    let plain = rotator.plan(&f32s().k(source)).unwrap();
    let k = Some((&mut expected).into());
    rotator
        .rotate(&plain, None, k, Positions::start(10))
        .unwrap();
    for (sequence, expected) in expected.chunks(24).enumerate() {
        let start = sequence * 64 * 8;
        let (before, rest) = rotated[start..start + 64 * 8].split_at(80);
        assert_eq!(&rest[..24], expected);
        assert!(before.iter().chain(&rest[24..]).all(|&x| x == 0.5));
    }
    // That a cache is longer does not make it long enough.
    let error = rotate(&plan, needed - 1).unwrap_err();
    assert!(matches!(error, Error::BufferTooShort { .. }), "{error}");
}

/// A buffer of `len` elements holds the place with one more of a dim, which takes room.
fn another_fits(place: &Place, dim: usize, len: usize) -> bool {
    let mut more = place.clone();
    more.shape[dim] += 1;
    place.strides[dim] > 0 && more.len() <= len
}

proptest! {
    #![proptest_config(config(3000))]

    /// For any strides: the first buffer in which one more token or sequence would fit is refused.
    #[test]
    fn room_is_that_of_another_token_or_sequence(
        case in cases(),
        slack in prop::array::uniform4(prop_oneof![3 => Just(0usize), 1 => 0usize..300]),
    ) {
        let case = Case { dtype: Dtype::F32, ..case };
        let rope = case.rope(Frequencies::from_theta(1e4, case.rotary_dim)?);
        let rotator = Host::new().rotator(&rope);
        let mut problem = f32s();
        let [q, k] = &case.tensors;
        if let Some(q) = q {
            problem = problem.q(q.layouts());
        }
        if let Some(k) = k {
            problem = problem.k(k.layouts());
        }
        let mut slack = slack.into_iter();
        let mut buffers = case.tensors.each_ref().map(|tensor| {
            let mut buffer = |place: &Place| vec![1.0f32; place.len() + slack.next().unwrap()];
            tensor.as_ref().map(|tensor| [buffer(&tensor.source), buffer(&tensor.destination)])
        });
        let mut expected = None;
        for (tensor, buffers) in case.tensors.iter().zip(&buffers) {
            let (Some(tensor), Some([source, destination])) = (tensor, buffers) else { continue };
            if tensor.source.heads().next().is_none() {
                continue;
            }
            let sides = match tensor.in_place {
                true => vec![(&tensor.destination, destination)],
                false => vec![(&tensor.source, source), (&tensor.destination, destination)],
            };
            for (place, buffer) in sides {
                let more = [(1, "token"), (0, "sequence")];
                let fits = |&(dim, _): &(usize, _)| another_fits(place, dim, buffer.len());
                let room = more.into_iter().find(fits);
                expected = expected.or(room.map(|(_, more)| (more, place.len(), buffer.len())));
            }
        }
        for longer in [false, true] {
            let problem = if longer { problem.longer_buffers() } else { problem };
            let plan = rotator.plan(&problem)?;
            let [q, k] = &mut buffers;
            let operands = [(&case.tensors[0], q), (&case.tensors[1], k)];
            let [q, k] = operands.map(|(tensor, buffers)| {
                let [source, destination] = buffers.as_mut()?;
                Some(match tensor.as_ref()?.in_place {
                    true => destination.into(),
                    false => (&source[..], destination).into(),
                })
            });
            match (rotator.rotate(&plan, q, k, case.positions.given()), expected) {
                (Err(Error::BufferHasRoom { more, needed, got, .. }), Some(room)) if !longer => {
                    prop_assert_eq!((more, needed, got), room);
                }
                (result, room) => {
                    prop_assert_eq!(result, Ok(()));
                    prop_assert!(longer || room.is_none(), "{:?}", room);
                }
            }
        }
    }
}

#[test]
fn parts_of_a_plan_rotate_as_plans_of_their_own() {
    let rotator = rotator(8);
    let (batch, tokens) = (4, 6);
    // The layouts of a part have the strides of the whole.
    let caches = [
        Layout::bshd(batch, tokens, 2, 8),
        Layout::bhsd(batch, tokens, 2, 8),
        Layout::bshd(batch, tokens, 2, 8).with_strides(16, batch * 16, 8),
    ];
    for layout in caches {
        let whole = rotator.plan(&f32s().q(layout)).unwrap();
        let len = layout.required_len().unwrap();
        for (b, t) in [(4, 6), (4, 5), (4, 1), (1, 6), (3, 1), (2, 2), (1, 1)] {
            let part = whole.first_tokens(t).unwrap().first_sequences(b).unwrap();
            let [x, y, z] = layout.strides();
            let fresh = Layout::bshd(b, t, 2, 8).with_strides(x, y, z);
            let fresh = rotator.plan(&f32s().q(fresh).longer_buffers()).unwrap();
            assert_eq!((part.batch(), part.tokens()), (b, t));
            assert_eq!(part.q_shape(), Some([b, t, 2, 8]));
            assert_eq!(part.k_shape(), None);
            assert_eq!(part.bytes(), fresh.bytes());
            assert!(!part.is_empty());
            let rotated = in_place(&rotator, &part, len).unwrap();
            assert_eq!(rotated, in_place(&rotator, &fresh, len).unwrap());
            let touched = rotated.iter().zip(values(len)).filter(|(a, b)| **a != *b);
            assert_eq!(touched.count(), b * t * 2 * 8);
            // Longer buffers are meant, shorter ones are not long enough.
            assert!(in_place(&rotator, &part, 3 * len).is_ok());
            let needed = (b - 1) * x + (t - 1) * y + z + 8;
            assert!(in_place(&rotator, &part, needed).is_ok());
            let error = in_place(&rotator, &part, needed - 1).unwrap_err();
            assert!(matches!(error, Error::BufferTooShort { .. }));
        }
    }
}

#[test]
fn a_part_is_no_larger_than_its_plan() {
    let rotator = rotator(8);
    let plan = rotator.plan(&f32s().k(Layout::bshd(4, 6, 2, 8))).unwrap();
    let refused = |part: Result<Plan, Error>, planned: [usize; 2], asked: [usize; 2]| {
        let error = part.unwrap_err();
        let message = error.to_string();
        assert!(message.contains(&format!("the plan has {planned:?} [batch, tokens]")));
        assert!(message.contains(&format!("{asked:?} were asked for")));
        assert_eq!(error, Error::NotInPlan { planned, asked });
    };
    for more in [7, usize::MAX] {
        refused(plan.first_tokens(more), [4, 6], [4, more]);
        refused(plan.first_sequences(more), [4, 6], [more, 6]);
    }
    let part = plan.first_tokens(3).unwrap();
    refused(part.first_tokens(4), [4, 3], [4, 4]);
    refused(part.first_sequences(5), [4, 3], [5, 3]);
    // The plan is as it was.
    assert_eq!(plan.k_shape(), Some([4, 6, 2, 8]));
    assert_eq!(plan.first_tokens(6).unwrap().k_shape(), plan.k_shape());

    // None of it: a call then does nothing.
    for part in [plan.first_tokens(0), plan.first_sequences(0)] {
        let part = part.unwrap();
        assert!(part.is_empty());
        assert_eq!(part.bytes(), 0);
        let mut keys = values(4 * 6 * 16);
        let k = Some((&mut keys).into());
        assert_eq!(rotator.rotate(&part, None, k, Positions::start(3)), Ok(()));
        assert_eq!(keys, values(4 * 6 * 16));
    }
}

/// Decoding: a step is one token of each sequence, and there are fewer and more of them.
#[test]
fn steps_of_a_batch_that_shrinks_and_grows() {
    let rotator = rotator(8);
    let packed = |batch, range| Layout::packed_heads(batch, 1, 4, 8, range);
    let problem = |batch| {
        f32s()
            .q(packed(batch, 0..2))
            .k(packed(batch, 2..3))
            .one_buffer()
    };
    let most = rotator.plan(&problem(7)).unwrap();
    let starts = [900i64, 2, -7, 40, 0, 1 << 40, 8];
    for sequences in [7, 3, 1, 5] {
        let positions = Positions::start_per_sequence(&starts[..sequences]);
        let mut qkv = values(7 * 32);
        let step = most.first_sequences(sequences).unwrap();
        rotator
            .rotate_one_buffer(&step, &mut qkv, positions)
            .unwrap();
        let mut expected = values(7 * 32);
        let fresh = rotator.plan(&problem(sequences)).unwrap();
        let used = &mut expected[..sequences * 32];
        rotator.rotate_one_buffer(&fresh, used, positions).unwrap();
        assert_eq!(qkv, expected);
        // Positions are counted by the part.
        let result =
            rotator.rotate_one_buffer(&step, &mut qkv, Positions::start_per_sequence(&[0i64; 8]));
        assert!(matches!(result, Err(Error::PositionsLength { .. })));
        assert_eq!(qkv, expected);
    }
}

/// A prompt and the steps after it, by parts of one plan over one buffer.
#[test]
fn a_prompt_and_its_steps_are_parts_of_one_plan() {
    let rotator = rotator(8);
    let packed = |tokens, range| Layout::packed_heads(1, tokens, 4, 8, range);
    let problem = |tokens| {
        f32s()
            .q(packed(tokens, 0..2))
            .k(packed(tokens, 2..3))
            .one_buffer()
    };
    let most = rotator.plan(&problem(64)).unwrap();
    for (start, tokens) in [(0, 37), (37, 1), (38, 1), (39, 64)] {
        let mut qkv = values(64 * 32);
        let step = most.first_tokens(tokens).unwrap();
        let positions = Positions::start(start);
        rotator
            .rotate_one_buffer(&step, &mut qkv, positions)
            .unwrap();
        let mut expected = values(64 * 32);
        let fresh = rotator.plan(&problem(tokens)).unwrap();
        let used = &mut expected[..tokens * 32];
        rotator.rotate_one_buffer(&fresh, used, positions).unwrap();
        assert_eq!(qkv, expected);
    }
}

#[test]
fn plans_of_nothing() {
    let rotator = rotator(8);
    for problem in [f32s(), f32s().one_buffer(), f32s().longer_buffers()] {
        let error = rotator.plan(&problem).unwrap_err();
        assert_eq!(error, Error::NothingToRotate);
        assert!(error.to_string().contains("Problem::q or Problem::k"));
    }
    let some = Layout::bshd(2, 3, 1, 8);
    for none in [
        Layout::bshd(0, 3, 1, 8),
        Layout::bshd(2, 0, 1, 8),
        Layout::bshd(2, 3, 0, 8),
    ] {
        for operand in [InOut::from(none), (none, none).into()] {
            for problem in [f32s().q(operand), f32s().k(operand)] {
                let plan = rotator.plan(&problem).unwrap();
                assert!(plan.is_empty());
                assert_eq!(plan.bytes(), 0);
                let [batch, tokens, ..] = none.shape();
                assert_eq!((plan.batch(), plan.tokens()), (batch, tokens));
            }
        }
    }
    // Heads of one of the two are enough.
    let no_heads = Layout::bshd(2, 3, 0, 8);
    for problem in [f32s().q(no_heads).k(some), f32s().q(some).k(no_heads)] {
        assert!(!rotator.plan(&problem).unwrap().is_empty());
    }
    let plan = rotator.plan(&f32s().q(no_heads).k(some)).unwrap();
    assert_eq!(plan.q_shape(), Some([2, 3, 0, 8]));
    assert_eq!(plan.k_shape(), Some([2, 3, 1, 8]));
    assert_eq!(plan.dtype(), Dtype::F32);
}

/// Values do not rotate: their heads may have fewer dims than rotate, of keys and queries at no time.
#[test]
fn values_may_have_fewer_dims_than_rotate() {
    let rope = Rope::new(Frequencies::from_theta(1e4, 8).unwrap(), Pairing::HalfSplit);
    let (wide, narrow) = (Layout::tokens(3, 2, 8), Layout::tokens(3, 2, 5));
    let cached = |k, v| {
        let cache = |layout: Layout| {
            let [_, _, heads, head_dim] = layout.shape();
            CacheLayout::flat(9, heads, head_dim)
        };
        let cache = KvCacheLayout::separate(cache(k), cache(v));
        let problem = f32s().q(wide).k_to_cache(k).v_to_cache(v).cache(cache);
        Plan::new(&rope, &problem)
    };
    assert!(cached(wide, narrow).is_ok());
    for v in [InOut::from(narrow), (narrow, narrow).into()] {
        assert!(Plan::new(&rope, &f32s().q(wide).v(v)).is_ok());
    }
    let error = cached(narrow, wide).unwrap_err();
    assert!(matches!(error, Error::RotaryWindow { .. }), "{error}");
}

/// Keys that are only stored have another place to be written to than to be read from, so their pairs may
/// lie otherwise there; those in place may not, stored or not.
#[test]
fn only_keys_in_place_keep_their_pairing() {
    let frequencies = Frequencies::from_theta(1e4, 8).unwrap();
    let rope = Rope::new(frequencies, Pairing::Interleaved).with_output_pairing(Pairing::HalfSplit);
    let layout = Layout::tokens(3, 2, 8);
    let cache = KvCacheLayout::k(CacheLayout::flat(9, 2, 8));
    assert!(Plan::new(&rope, &f32s().k_to_cache(layout).cache(cache)).is_ok());
    assert!(Plan::new(&rope, &f32s().k((layout, layout)).cache(cache)).is_ok());
    let refused = [
        f32s().k(layout).cache(cache),
        f32s().q(layout).k_to_cache(layout).cache(cache),
    ];
    for problem in refused {
        let error = Plan::new(&rope, &problem).unwrap_err();
        assert!(
            matches!(error, Error::OutputPairingInPlace { .. }),
            "{error}"
        );
    }
}
