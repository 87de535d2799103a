//! Checks of a plan that others would make up for in most problems, each where it alone refuses.

use phasor::{
    Dtype, Error, Frequencies, Host, HostRotator, Layout, Pairing, Positions, Problem, Rope,
};

fn rotator(rotary_dim: usize) -> HostRotator {
    let frequencies = Frequencies::from_theta(1e4, rotary_dim).unwrap();
    Host::new().rotator(&Rope::new(frequencies, Pairing::HalfSplit))
}

/// Three tokens of one head of 8, at an element of the buffer.
fn at(offset: usize) -> Layout {
    Layout::tokens(3, 1, 8).with_offset(offset)
}

#[test]
fn windows_of_one_buffer_that_overlap_in_one_way_only() {
    let rotator = rotator(8);
    let one_buffer = Problem::new(Dtype::F32).one_buffer();
    let refuses = |problem: Problem, first, second| {
        let overlap = Error::Overlap { first, second };
        assert_eq!(rotator.plan(&problem).err(), Some(overlap));
    };
    let apart = one_buffer.q((at(0), at(100))).k((at(200), at(300)));
    assert!(rotator.plan(&apart).is_ok());
    // What is read may be read twice.
    let shared = one_buffer.q((at(0), at(100))).k((at(0), at(300)));
    assert!(rotator.plan(&shared).is_ok());
    let written_twice = one_buffer.q((at(0), at(100))).k((at(200), at(123)));
    refuses(written_twice, "q's destination", "k's destination");
    let by_q = one_buffer.q((at(0), at(100))).k((at(123), at(300)));
    refuses(by_q, "q's destination", "k's source");
    let by_k = one_buffer.q((at(0), at(100))).k((at(200), at(23)));
    refuses(by_k, "k's destination", "q's source");
    refuses(one_buffer.q((at(0), at(100))).k(at(23)), "k", "q's source");
    refuses(one_buffer.q(at(23)).k((at(0), at(100))), "q", "k's source");
    refuses(one_buffer.q(at(23)).k(at(0)), "q", "k");
}

#[test]
fn what_does_not_nest_in_one_buffer_is_vouched_for() {
    // q's windows start at 0, 4, 6, 8, 10 and 14, k's at 2 and far away; all are 2 long.
    let q = Layout::tokens(3, 2, 2).with_strides(0, 4, 6);
    let k = Layout::tokens(3, 1, 2)
        .with_strides(0, 1000, 2)
        .with_offset(2);
    let rotator = rotator(2);
    for (q, k) in [(q, k), (k, q)] {
        let problem = Problem::new(Dtype::F32).q(q).k(k).one_buffer();
        let refused = rotator.plan(&problem);
        assert!(matches!(refused, Err(Error::OverlapUnknown { .. })));
        // SAFETY: none of the windows overlap.
        let vouched = rotator.plan(&unsafe { problem.assume_disjoint() });
        assert!(vouched.is_ok());
    }
    // What is certain is refused all the same.
    let problem = Problem::new(Dtype::F32).q(k).k(k).one_buffer();
    // SAFETY: the plan is refused.
    let certain = rotator.plan(&unsafe { problem.assume_disjoint() });
    assert!(matches!(certain, Err(Error::Overlap { .. })));
}

#[test]
fn room_is_that_of_the_first_that_reaches_the_end() {
    let rotator = rotator(8);
    let problem = Problem::new(Dtype::F32)
        .one_buffer()
        .q((at(100), at(0)))
        .k((at(100), at(50)));
    let plan = rotator.plan(&problem).unwrap();
    let rotate =
        |len: usize| rotator.rotate_one_buffer(&plan, &mut vec![1.0f32; len], Positions::start(0));
    assert_eq!(rotate(124), Ok(()));
    let what = "q's source";
    assert!(matches!(rotate(132), Err(Error::BufferHasRoom { what: got, .. }) if got == what));
    assert!(matches!(rotate(123), Err(Error::BufferTooShort { what: got, .. }) if got == what));
}

/// A source may repeat its elements, so that there are more of them than any buffer has; bytes are
/// counted as they are read and written.
#[test]
fn elements_are_counted_apart_from_buffers() {
    let rotator = rotator(8);
    let layouts = |tokens| {
        let all = Layout::tokens(tokens, 1 << 20, 1 << 10);
        (all.with_strides(0, 0, 0), all)
    };
    for (dtype, tokens, fits) in [
        (Dtype::F32, 1 << 29, true),
        (Dtype::F32, 1 << 30, false),
        (Dtype::Bf16, 1 << 30, true),
    ] {
        let plan = rotator.plan(&Problem::new(dtype).q(layouts(tokens)));
        match plan {
            Ok(plan) => {
                assert!(fits, "{dtype}");
                let elements = (tokens as u64) << 30;
                assert_eq!(plan.bytes(), 2 * dtype.size() as u64 * elements);
            }
            Err(error) => {
                assert!(!fits, "{dtype}");
                assert!(matches!(error, Error::LayoutTooLarge { .. }));
            }
        }
    }
}
