//! Checks of a plan that others would make up for in most problems, each where it alone refuses.

use phasor::norm::HeadNorm;
use phasor::quantize::{Codes, ScaleForm};
use phasor::{
    CacheLayout, Dtype, Error, Frequencies, Host, HostRotator, HostStep, HostWeights,
    KvCacheLayout, Layout, Pairing, Plan, Positions, Problem, Rope, ScaleLayout, Slots, Stages,
    Stored, StoredCodes, TensorName,
};

fn rope(rotary_dim: usize) -> Rope {
    let frequencies = Frequencies::from_theta(1e4, rotary_dim).unwrap();
    Rope::new(frequencies, Pairing::HalfSplit)
}

fn rotator(rotary_dim: usize) -> HostRotator {
    Host::new().rotator(&rope(rotary_dim))
}

fn f32s() -> Problem {
    Problem::new(Dtype::F32)
}

/// The error, whose message holds the phrase.
#[track_caller]
fn refused<T>(result: Result<T, Error>, phrase: &str) -> Error {
    let Err(error) = result else {
        panic!("accepted, where {phrase:?} is wrong");
    };
    let message = error.to_string();
    assert!(message.contains(phrase), "{phrase:?} is not in {message:?}");
    error
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

#[test]
fn stages_are_those_that_a_stream_can_have() {
    let plan = |problem: &Problem| Plan::new(&rope(8), problem);
    let wrong = |result: Result<Plan, Error>, name, phrase| {
        let error = refused(result, phrase);
        assert!(matches!(error, Error::Stages { tensor, .. } if tensor == name));
    };
    let heads = |head_dim| Layout::tokens(3, 2, head_dim);
    // A norm of v alone, whose heads have another number of dims than those of q and k.
    let norm = Stages::new().norm(HeadNorm::rms(1e-6));
    let values = |head_dim| f32s().q(heads(8)).v(heads(head_dim)).v_stages(norm);
    assert!(plan(&values(6)).is_ok());
    wrong(plan(&values(7)), TensorName::V, "even head_dim");
    wrong(
        plan(&f32s().k(heads(9)).k_stages(norm)),
        TensorName::K,
        "even head_dim",
    );
    // Only one that comes before the rotation may be rounded after.
    let rounded = HeadNorm::rms(1e-6).round_after();
    let after = |norm| {
        f32s()
            .q(heads(8))
            .q_stages(Stages::new().norm_after_rotation(norm))
    };
    assert!(plan(&after(HeadNorm::rms(1e-6))).is_ok());
    wrong(plan(&after(rounded)), TensorName::Q, "before the rotation");
    let before = f32s().q(heads(8)).q_stages(Stages::new().norm(rounded));
    assert!(plan(&before).is_ok());

    // The way back has no gradients of a bias or a norm; values have no way back.
    let back = |problem: &Problem| Plan::new(&rope(8).backward(), problem);
    let bias = Stages::new().bias();
    for stages in [bias, norm] {
        let k = f32s().k(heads(8)).k_stages(stages);
        wrong(back(&k), TensorName::K, "the way back");
        assert!(plan(&k).is_ok());
        assert!(back(&f32s().q(heads(8)).v(heads(8)).v_stages(stages)).is_ok());
    }

    // Without a rotation pairs stay as they are.
    let repaired = rope(8).with_output_pairing(Pairing::Interleaved);
    let still = Stages::new().without_rotation();
    let copied = f32s().q((heads(8), heads(8))).v((heads(8), heads(8)));
    assert!(Plan::new(&repaired, &copied).is_ok());
    assert!(Plan::new(&repaired, &copied.v_stages(still.bias())).is_ok());
    wrong(
        Plan::new(&repaired, &copied.q_stages(still)),
        TensorName::Q,
        "no output pairing",
    );
    assert!(plan(&copied.q_stages(still)).is_ok());
}

#[test]
fn codes_of_queries_are_written_apart_by_given_scales() {
    let plan = |problem: &Problem| rotator(8).plan(problem);
    let given = StoredCodes::given(Codes::E4m3, ScaleForm::Divide);
    let written = StoredCodes::dynamic(Codes::E4m3, 0.0, ScaleLayout::tokens_heads(3, 1, 1));
    let apart = f32s().q((at(0), at(24)));
    assert!(plan(&apart.q_codes(given)).is_ok());
    assert!(plan(&apart.packed().q_codes(given)).is_ok());
    for (problem, phrase) in [
        (f32s().q(at(0)).q_codes(given), "elsewhere than in place"),
        (apart.q_codes(written), "StoredCodes::given"),
        (apart.one_buffer().q_codes(given), "Problem::packed"),
    ] {
        let error = refused(plan(&problem), phrase);
        assert!(matches!(error, Error::Stages { tensor, .. } if tensor == TensorName::Q));
    }
}

/// One problem for each thing in which a cache may differ from its tensor or from the other cache.
#[test]
fn caches_are_those_of_their_tensors() {
    let plan = |problem: &Problem| rotator(8).plan(problem);
    let heads = Layout::tokens(3, 2, 8);
    let cache = CacheLayout::paged_nhd(4, 2, 2, 8);
    let keys = f32s().k_to_cache(heads);
    let both = keys.v_to_cache(heads);
    let separate = |k, v| both.cache(KvCacheLayout::separate(k, v));
    assert!(plan(&separate(cache, cache)).is_ok());
    for (v, what, left, right) in [
        (CacheLayout::paged_nhd(5, 2, 2, 8), "pages", 4, 5),
        (CacheLayout::paged_nhd(4, 3, 2, 8), "page_size", 2, 3),
        (CacheLayout::paged_nhd(4, 2, 3, 8), "heads", 2, 3),
        (CacheLayout::paged_nhd(4, 2, 2, 4), "head_dim", 8, 4),
    ] {
        let error = refused(plan(&separate(cache, v)), what);
        let Error::CacheMismatch {
            tensor,
            left: l,
            right: r,
            ..
        } = error
        else {
            panic!("{error}");
        };
        assert_eq!((tensor, l, r), (TensorName::V, left, right), "{what}");
    }
    // A cache without a tensor, and a tensor that is to go to a cache and has none.
    let error = refused(
        plan(&keys.cache(KvCacheLayout::separate(cache, cache))),
        "no layout to be read from",
    );
    assert!(matches!(error, Error::CacheMissing { tensor, .. } if tensor == TensorName::V));
    let error = refused(plan(&both.cache(KvCacheLayout::k(cache))), "has none");
    assert!(matches!(error, Error::CacheMissing { tensor, .. } if tensor == TensorName::V));
    // One that is written elsewhere needs none.
    assert!(plan(&keys.v(heads).cache(KvCacheLayout::k(cache))).is_ok());

    // In one buffer: side by side they are apart, an element closer they are not.
    let one_buffer = |k, v| plan(&both.cache(KvCacheLayout::one_buffer((k, v))));
    let (k, v) = cache.side_by_side();
    assert!(one_buffer(k, v).is_ok());
    let error = refused(one_buffer(k, v.with_offset(7)), "v's cache");
    let (first, second) = ("k's cache", "v's cache");
    assert_eq!(error, Error::Overlap { first, second });
    // A cache that holds a slot twice.
    let twice = cache.with_strides(32, 15, 8);
    let error = refused(plan(&separate(cache, twice)), "twice");
    assert_eq!(
        error,
        Error::SelfOverlap {
            tensor: TensorName::V
        }
    );
}

/// Scales that a call writes are apart from each other and from all else in their buffer.
#[test]
fn written_scales_are_apart() {
    let heads = Layout::tokens(3, 1, 8);
    // Slots of 12 bytes: 8 codes and a scale.
    let cache = CacheLayout::flat(4, 1, 8).with_strides(48, 12, 8);
    let plan = |scales: ScaleLayout, v_offset: usize| {
        let codes = StoredCodes::dynamic(Codes::Int8, 0.0, scales);
        let v = cache.with_offset(v_offset);
        let caches = KvCacheLayout::one_buffer((cache, v)).with_codes(codes);
        rotator(8).plan(&f32s().k_to_cache(heads).v_to_cache(heads).cache(caches))
    };
    let own = ScaleLayout::tokens_heads(4, 1, 1);
    assert!(plan(own, 48).is_ok());
    // Behind the codes of each slot of k, in units of 4 bytes; v is far away, and so would its scales be.
    let inline = ScaleLayout::strided(12, 3, 3, 1).with_offset(2).inline();
    let k_only = |scales: ScaleLayout| {
        let codes = StoredCodes::dynamic(Codes::Int8, 0.0, scales);
        let caches = KvCacheLayout::k(cache).with_k_codes(codes);
        rotator(8).plan(&f32s().k_to_cache(heads).cache(caches))
    };
    assert!(k_only(inline).is_ok());
    let on_codes = refused(k_only(inline.with_offset(1)), "k's scales");
    let (first, second) = ("k's cache", "k's scales");
    assert_eq!(on_codes, Error::Overlap { first, second });
    // Both caches' scales at one place.
    let (first, second) = ("k's scales", "v's scales");
    let shared = plan(inline, 48);
    assert_eq!(shared.err(), Some(Error::Overlap { first, second }));
    // One scale for all slots.
    let all = ScaleLayout::strided(0, 0, 0, 0);
    let tensor = TensorName::K;
    assert_eq!(k_only(all).err(), Some(Error::SelfOverlap { tensor }));
}

/// Each buffer of a step is there if and only if it was planned, and in the form that was.
#[test]
fn steps_bring_what_was_planned() {
    let rotator = rotator(8);
    let plan = |problem: Problem| rotator.plan(&problem).unwrap();
    let heads = Layout::tokens(3, 1, 8);
    let cache = CacheLayout::flat(4, 1, 8);
    let (k, v) = cache.in_turn();
    let keys = f32s().k_to_cache(heads);
    let both = keys.v_to_cache(heads);
    let k_only = plan(keys.cache(KvCacheLayout::k(cache)));
    let separate = plan(both.cache(KvCacheLayout::separate(cache, cache)));
    let one_buffer = plan(both.cache(KvCacheLayout::one_buffer((k, v))));
    let x = [1.0f32; 24];
    let (mut a, mut b, mut all) = ([0.0f32; 32], [0.0f32; 32], [0.0f32; 64]);
    fn start<'a>() -> HostStep<'a, f32> {
        HostStep::new(Positions::start(0)).slots(Slots::mapping(&[0, 1, 2]))
    }
    let step = |plan: &Plan, step: HostStep<'_, f32>| rotator.step(plan, step);

    let given = step(&k_only, start().k(&x[..]).k_cache(&mut a[..]));
    assert_eq!(given, Ok(Stored::All));
    let given = start().k(&x[..]).k_cache(&mut a[..]).v_cache(&mut b[..]);
    refused(step(&k_only, given), "the plan has none");
    let given = start().k(&x[..]).v(&x[..]).k_cache(&mut a[..]);
    refused(step(&separate, given), "the call has none");
    let given = start().k(&x[..]).v(&x[..]).v_cache(&mut a[..]);
    let error = refused(step(&separate, given), "the call has none");
    assert!(matches!(error, Error::CacheMissing { tensor, .. } if tensor == TensorName::K));
    let given = start().k(&x[..]).v(&x[..]).kv_cache(&mut all[..]);
    refused(step(&separate, given), "in buffers of their own");
    let given = start().k(&x[..]).v(&x[..]);
    let given = given.k_cache(&mut a[..]).v_cache(&mut b[..]);
    refused(step(&one_buffer, given), "both caches in one buffer");
    let given = start().k(&x[..]).v(&x[..]).kv_cache(&mut all[..]);
    assert_eq!(step(&one_buffer, given), Ok(Stored::All));
    let given = start().k(&x[..]).v(&x[..]).kv_cache(&mut all[..63]);
    let error = refused(step(&one_buffer, given), "v's cache");
    assert!(matches!(
        error,
        Error::BufferTooShort {
            needed: 64,
            got: 63,
            ..
        }
    ));

    let given = start().k(&x[..23]).v(&x[..]);
    let given = given.k_cache(&mut a[..]).v_cache(&mut b[..]);
    refused(step(&separate, given), "k: the buffer has 23");

    // The forms of keys and of values.
    let given = start().v(&x[..]).k_cache(&mut a[..]).v_cache(&mut b[..]);
    let error = refused(step(&separate, given), "k to the cache");
    assert!(matches!(error, Error::OperandMismatch { tensor, .. } if tensor == TensorName::K));
    let given = start().k(&x[..]).k_cache(&mut a[..]).v_cache(&mut b[..]);
    let error = refused(step(&separate, given), "v to the cache");
    assert!(matches!(error, Error::OperandMismatch { tensor, .. } if tensor == TensorName::V));

    // What rotates only does no more.
    let rotate = |plan: &Plan| rotator.rotate::<f32>(plan, None, None, Positions::start(0));
    refused(rotate(&k_only), "values or a cache");
    refused(rotate(&plan(f32s().q(heads).v(heads))), "values or a cache");
    let scaled = f32s().q(heads).q_stages(Stages::new().scale(0.5));
    refused(rotate(&plan(scaled)), "stages beside the rotation");
    let packed = plan(f32s().q((heads, heads)).packed());
    refused(rotate(&packed), "packed sources");
    // Nor is what has buffers of its own given as one, or the other way round.
    let mut buffer = x;
    let given = start_without_slots().buffer(&mut buffer[..]);
    refused(step(&plan(f32s().q(heads)), given), "separate buffers");
    let mut to = [0.0f32; 24];
    let given = start_without_slots().q((&x[..], &mut to[..]));
    refused(step(&packed, given), "packed sources");
    let in_one = plan(f32s().q(heads).one_buffer());
    let given = start_without_slots().q(&mut to[..]);
    refused(step(&in_one, given), "over one buffer");
    refused(
        rotator.rotate_one_buffer(&plan(f32s().q(heads)), &mut to, Positions::start(0)),
        "separate buffers",
    );
    // Packed sources reach as far as they do, and have no room for more tokens; so do destinations.
    for (from, to, phrase) in [
        (23, 24, "q's source: the buffer has 23"),
        (32, 24, "another token"),
        (24, 23, "q's destination: the buffer has 23"),
    ] {
        let (mut from, mut to) = (vec![1.0f32; from], vec![0.0f32; to]);
        let given = start_without_slots().buffer(&mut from[..]);
        refused(step(&packed, given.q_to(&mut to[..])), phrase);
    }
    // Of one buffer that holds what is written too, nothing is elsewhere.
    let moved = plan(f32s().q((at(0), at(24))).one_buffer());
    let mut both = [1.0f32; 48];
    let given = start_without_slots().buffer(&mut both[..]);
    assert!(step(&moved, given).is_ok());
    // What becomes codes is read by itself, and by nothing else.
    let codes = f32s().q((heads, heads));
    let codes = codes.q_codes(StoredCodes::given(Codes::E4m3, ScaleForm::Divide));
    let mut room = [0u8; 24];
    fn coded<'a>(x: &'a [f32], room: &'a mut [u8]) -> HostStep<'a, f32> {
        let scale = HostWeights::new().scales(&[1.0][..]);
        start_without_slots()
            .q_source(x)
            .q_codes(room)
            .q_weights(scale)
    }
    assert!(step(&plan(codes), coded(&x, &mut room)).is_ok());
    let given = coded(&x, &mut room).q(&mut to[..]);
    refused(step(&plan(codes), given), "with Step::q_source");
    refused(
        step(&plan(codes.packed()), coded(&x, &mut room)),
        "packed sources",
    );
}

fn start_without_slots<'a>() -> HostStep<'a, f32> {
    HostStep::new(Positions::start(0))
}

/// Scales are given where they are to be, and have room where they are written.
#[test]
fn scales_are_given_or_written() {
    let rotator = rotator(8);
    let heads = Layout::tokens(3, 1, 8);
    let cache = CacheLayout::flat(4, 1, 8);
    let given = StoredCodes::given(Codes::Int8, ScaleForm::Divide);
    let written = StoredCodes::dynamic(Codes::Int8, 1e-6, ScaleLayout::tokens_heads(4, 1, 1));
    let keys = |codes: Option<StoredCodes>| {
        let caches = KvCacheLayout::k(cache);
        let caches = codes.map_or(caches, |codes| caches.with_k_codes(codes));
        let problem = f32s().k_to_cache(heads).cache(caches);
        rotator.plan(&problem).unwrap()
    };
    let values = |codes| {
        let caches = KvCacheLayout::separate(cache, cache).with_v_codes(codes);
        let problem = f32s().k_to_cache(heads).v_to_cache(heads);
        rotator.plan(&problem.cache(caches)).unwrap()
    };
    let x = [1.0f32; 24];
    let (mut bytes, mut elements) = ([0u8; 32], [0.0f32; 32]);
    let mut room = [0.0f32; 4];
    fn start<'a>() -> HostStep<'a, f32> {
        start_without_slots().slots(Slots::mapping(&[0, 1, 2]))
    }
    fn scale<'a>() -> HostWeights<'a, f32> {
        HostWeights::new().scales(&[1.0][..])
    }
    let wrong = |result: Result<Stored, Error>, name, phrase| {
        let error = refused(result, phrase);
        assert!(
            matches!(error, Error::Stages { tensor, .. } if tensor == name),
            "{error}"
        );
    };

    let step = start().k(&x[..]).k_cache(&mut bytes[..]).k_weights(scale());
    assert_eq!(rotator.step(&keys(Some(given)), step), Ok(Stored::All));
    let step = start()
        .k(&x[..])
        .k_cache(&mut bytes[..])
        .k_scales(&mut room[..]);
    assert_eq!(rotator.step(&keys(Some(written)), step), Ok(Stored::All));
    let step = start().k(&x[..]).k_cache(&mut bytes[..]).k_weights(scale());
    let not_given = rotator.step(&keys(Some(written)), step);
    wrong(not_given, TensorName::K, "not given but written");
    let step = start()
        .k(&x[..])
        .k_cache(&mut bytes[..])
        .k_scales(&mut room[..]);
    let not_written = rotator.step(&keys(Some(given)), step);
    wrong(not_written, TensorName::K, "not written but given");
    let step = start()
        .k(&x[..])
        .k_cache(&mut elements[..])
        .k_scales(&mut room[..]);
    wrong(
        rotator.step(&keys(None), step),
        TensorName::K,
        "no codes are planned",
    );
    let step = start()
        .k(&x[..])
        .k_cache(&mut elements[..])
        .k_weights(scale());
    wrong(
        rotator.step(&keys(None), step),
        TensorName::K,
        "no codes are planned",
    );
    let step = start().k(&x[..]).v(&x[..]).k_cache(&mut elements[..]);
    let step = step.v_cache(&mut bytes[..]).v_weights(scale());
    let values_given = rotator.step(&values(written), step);
    wrong(values_given, TensorName::V, "not given but written");
    // Those of a norm or of all heads are as many as there are.
    let (mut q, mut to) = (x, [0u8; 24]);
    let step = start_without_slots().q(&mut q[..]).q_weights(scale());
    let plain = rotator.plan(&f32s().q(heads)).unwrap();
    wrong(
        rotator.step(&plain, step),
        TensorName::Q,
        "no codes are planned",
    );

    // Weights of a norm that is not planned, beside another stage.
    let scaled = f32s().q(heads).q_stages(Stages::new().scale(0.5));
    let scaled = rotator.plan(&scaled).unwrap();
    let weights = [1.0f32; 8];
    for is_bias in [false, true] {
        let mut q = x;
        let given = match is_bias {
            false => HostWeights::new().norm(&weights[..]),
            true => HostWeights::new().norm_bias(&weights[..]),
        };
        let step = start_without_slots().q(&mut q[..]).q_weights(given);
        let unplanned = rotator.step(&scaled, step);
        wrong(unplanned, TensorName::Q, "no norm is planned");
    }

    // Queries as codes have a source of their own, and others have none.
    let coded = rotator
        .plan(&f32s().q((heads, heads)).q_codes(given))
        .unwrap();
    let step = start_without_slots()
        .q_source(&x[..])
        .q_codes(&mut to[..])
        .q_weights(scale());
    assert_eq!(rotator.step(&coded, step), Ok(Stored::All));
    // Their scales are not those of keys that are stored beside them.
    let caches = KvCacheLayout::k(cache).with_k_codes(written);
    let both = f32s().q((heads, heads)).q_codes(given).k_to_cache(heads);
    let both = rotator.plan(&both.cache(caches)).unwrap();
    let step = start().k(&x[..]).k_cache(&mut bytes[..]);
    let step = step.k_scales(&mut room[..]).q_source(&x[..]);
    let step = step.q_codes(&mut to[..]).q_weights(scale());
    assert_eq!(rotator.step(&both, step), Ok(Stored::All));
    let mut elsewhere = x;
    let step = start_without_slots()
        .q((&x[..], &mut elsewhere[..]))
        .q_codes(&mut to[..]);
    wrong(rotator.step(&coded, step), TensorName::Q, "Step::q_source");
    let step = start_without_slots().q_source(&x[..]);
    wrong(rotator.step(&plain, step), TensorName::Q, "Step::q");
    let step = start_without_slots()
        .q_source(&x[..23])
        .q_codes(&mut to[..])
        .q_weights(scale());
    refused(rotator.step(&coded, step), "q's source");
    let step = start_without_slots()
        .q_source(&x[..])
        .q_codes(&mut to[..23])
        .q_weights(scale());
    refused(rotator.step(&coded, step), "q's codes");
    let step = start_without_slots()
        .q_source(&x[..])
        .k(&x[..])
        .q_codes(&mut to[..]);
    let error = refused(rotator.step(&coded, step), "k absent");
    assert!(matches!(error, Error::OperandMismatch { tensor, .. } if tensor == TensorName::K));
}

/// Scales between the codes are part of the cache's buffer, and those apart are none.
#[test]
fn caches_reach_as_far_as_the_scales_in_them() {
    let rotator = rotator(8);
    let cache = CacheLayout::flat(4, 1, 8).with_strides(48, 12, 8);
    let store = |scales: ScaleLayout, len: usize| {
        let codes = StoredCodes::dynamic(Codes::Int8, 1e-6, scales);
        let caches = KvCacheLayout::k(cache).with_k_codes(codes);
        let problem = f32s().k_to_cache(Layout::tokens(1, 1, 8)).cache(caches);
        let (mut bytes, mut room) = (vec![0u32; 12], vec![0.0f32; 104]);
        // SAFETY: any bytes are bytes; those of a u32 are where an f32 can be.
        let bytes = unsafe { bytes.align_to_mut::<u8>().1 };
        let step = start_without_slots().k(&[1.0; 8][..]);
        let step = step.k_cache(&mut bytes[..len]).slots(Slots::mapping(&[3]));
        let step = match scales == scales.inline() {
            true => step,
            false => step.k_scales(&mut room[..]),
        };
        rotator.step(&rotator.plan(&problem).unwrap(), step)
    };
    // 8 codes and a scale of 4 bytes in each of 4 slots.
    let inline = ScaleLayout::strided(12, 3, 3, 1).with_offset(2).inline();
    assert_eq!(store(inline, 48), Ok(Stored::All));
    let (what, needed) = ("k's cache", 48);
    let short = Err(Error::BufferTooShort {
        what,
        needed,
        got: 47,
    });
    assert_eq!(store(inline, 47), short);
    // A buffer for scales is given if there is one.
    let codes = |scales| StoredCodes::dynamic(Codes::Int8, 1e-6, scales);
    let plan = |scales| {
        let caches = KvCacheLayout::k(cache).with_k_codes(codes(scales));
        let problem = f32s().k_to_cache(Layout::tokens(1, 1, 8)).cache(caches);
        rotator.plan(&problem).unwrap()
    };
    let (mut words, mut room) = ([0.0f32; 12], [0.0f32; 4]);
    // SAFETY: any bytes are bytes.
    let bytes = unsafe { words.align_to_mut::<u8>().1 };
    let step = start_without_slots().k(&[1.0; 8][..]);
    let step = step.k_cache(&mut bytes[..]).slots(Slots::mapping(&[3]));
    let step = step.k_scales(&mut room[..]);
    refused(rotator.step(&plan(inline), step), "scales lie in the cache");
    let step = start_without_slots().k(&[1.0; 8][..]);
    let step = step.k_cache(&mut bytes[..]).slots(Slots::mapping(&[3]));
    let apart = ScaleLayout::tokens_heads(4, 1, 1);
    refused(rotator.step(&plan(apart), step), "or a buffer for them");
    // The last slot's codes end at 44; scales are at 400 bytes and on, in another buffer.
    let apart = ScaleLayout::tokens_heads(4, 1, 1).with_offset(100);
    assert_eq!(store(apart, 44), Ok(Stored::All));
    let (what, needed) = ("k's cache", 44);
    let short = Err(Error::BufferTooShort {
        what,
        needed,
        got: 43,
    });
    assert_eq!(store(apart, 43), short);
}

/// Three tokens of one head of 12 dims, of which 8 rotate, at a place of the buffer.
fn wide(offset: usize) -> Layout {
    Layout::tokens(3, 1, 12)
        .with_strides(0, 100, 12)
        .with_offset(offset)
}

#[test]
fn regions_are_what_is_read_and_written() {
    let plan = |problem: Problem| rotator(8).plan(&problem).err();
    let overlap = |first, second| Some(Error::Overlap { first, second });
    let one_buffer = f32s().one_buffer();
    let cache = CacheLayout::flat(4, 1, 12);
    let (of_k, of_v) = (KvCacheLayout::k(cache), KvCacheLayout::v(cache));
    // In place, the dims that rotate.
    assert_eq!(plan(one_buffer.q(wide(8)).k(wide(0))), None);
    assert_eq!(plan(one_buffer.q(wide(7)).k(wide(0))), overlap("q", "k"));
    // What is stored is read in full, though not written.
    let stored = one_buffer.k(wide(0)).cache(of_k);
    assert_eq!(plan(stored.q(wide(8))), overlap("q", "k"));
    assert_eq!(plan(stored.q(wide(12))), None);
    let stored = one_buffer.k_to_cache(wide(0)).cache(of_k);
    assert_eq!(plan(stored.q(wide(8))), overlap("q", "k"));
    assert_eq!(plan(stored.q(wide(12))), None);
    let read_twice = one_buffer.q((wide(0), wide(50))).k_to_cache(wide(0));
    assert_eq!(plan(read_twice.cache(of_k)), None);
    // Stages write whole heads, and to leave the rotation out is one.
    let (scale, still) = (Stages::new().scale(0.5), Stages::new().without_rotation());
    for stages in [scale, still] {
        let staged = one_buffer.q(wide(0)).k(wide(8)).q_stages(stages);
        assert_eq!(plan(staged), overlap("q", "k"));
    }
    // Values in place are left alone, unless they are stored or have stages.
    let values = one_buffer.q(wide(0)).v(wide(0));
    assert_eq!(plan(values), None);
    assert_eq!(plan(values.cache(of_v)), overlap("q", "v"));
    assert_eq!(plan(values.v_stages(scale)), overlap("q", "v"));
    // A source of its own is read in full.
    let copied = one_buffer.q((wide(8), wide(50)));
    assert_eq!(plan(copied.k(wide(0))), None);
    assert_eq!(plan(copied.k(wide(1))), overlap("k", "q's source"));
    // A destination on its own source.
    let same = one_buffer.q((wide(0), wide(11)));
    assert_eq!(plan(same), overlap("q's destination", "q's source"));
    // Packed sources: what is written elsewhere is in no buffer of theirs.
    let packed = f32s().packed();
    assert_eq!(
        plan(packed.q((wide(0), wide(0))).k((wide(0), wide(0)))),
        None
    );
    assert_eq!(plan(packed.q(wide(8)).k((wide(40), wide(8)))), None);
    let read = packed.q(wide(8)).k((wide(0), wide(8)));
    assert_eq!(plan(read), overlap("q", "k's source"));
    assert_eq!(plan(packed.q(wide(7)).k(wide(0))), overlap("q", "k"));
    // Nothing is where there are no heads.
    let none = Layout::tokens(3, 0, 12);
    assert_eq!(plan(one_buffer.q(wide(0)).k(none)), None);
    assert_eq!(plan(one_buffer.q(none).k(wide(0))), None);
}

#[test]
fn batch_and_tokens_are_those_of_all() {
    let (three, four) = (Layout::tokens(3, 1, 8), Layout::tokens(4, 2, 8));
    for (problem, phrase) in [
        (f32s().q(three).k(four), "q and k must agree"),
        (f32s().q(three).v(four), "q and v must agree"),
        (f32s().k(three).v(four), "k and v must agree"),
    ] {
        let error = refused(rotator(8).plan(&problem), phrase);
        assert!(matches!(error, Error::ShapeMismatch { .. }));
    }
}

/// Caches and scales whose strides do not nest, though nothing of them overlaps.
#[test]
fn what_does_not_nest_in_caches_is_vouched_for() {
    let heads = Layout::tokens(3, 1, 2);
    let nests = CacheLayout::paged_nhd(2, 3, 1, 2);
    // Its slots begin at 0, 4, 8, 6, 10 and 14.
    let unlike = nests.with_strides(6, 4, 2);
    let both = f32s().k_to_cache(heads).v_to_cache(heads);
    let scales = |layout| StoredCodes::dynamic(Codes::Int8, 0.0, layout);
    let (own, scattered) = (
        scales(ScaleLayout::tokens_heads(3, 1, 1)),
        scales(ScaleLayout::strided(6, 4, 1, 1)),
    );
    let separate = KvCacheLayout::separate(nests, nests);
    for (caches, what) in [
        (KvCacheLayout::separate(unlike, nests), "k's cache"),
        (KvCacheLayout::separate(nests, unlike), "v's cache"),
        (
            separate.with_k_codes(scattered).with_v_codes(own),
            "k's scales",
        ),
        (
            separate.with_k_codes(own).with_v_codes(scattered),
            "v's scales",
        ),
    ] {
        let problem = both.cache(caches);
        let refused = rotator(2).plan(&problem);
        assert_eq!(refused.err(), Some(Error::OverlapUnknown { what }));
        // SAFETY: no slots of the layout overlap.
        let vouched = rotator(2).plan(&unsafe { problem.assume_disjoint() });
        assert!(vouched.is_ok(), "{what}");
    }
    // What is certain is refused all the same.
    let shared = scales(ScaleLayout::strided(0, 0, 0, 0));
    for caches in [
        KvCacheLayout::separate(nests.with_strides(3, 1, 2), nests),
        separate.with_k_codes(shared).with_v_codes(own),
    ] {
        // SAFETY: the plan is refused.
        let problem = unsafe { both.cache(caches).assume_disjoint() };
        let tensor = TensorName::K;
        assert_eq!(
            rotator(2).plan(&problem).err(),
            Some(Error::SelfOverlap { tensor })
        );
    }
}

/// Keys that are moved where they are cached: their cache alone counts.
#[test]
fn caches_of_keys_that_move_are_checked() {
    let shift = Host::new().rotator(&rope(8).shift().unwrap());
    let cache = CacheLayout::flat(4, 1, 8);
    let plan = |layout: KvCacheLayout| shift.shift_plan(Dtype::F32, &layout, 0).err();
    assert_eq!(plan(KvCacheLayout::k(cache)), None);
    assert_eq!(plan(KvCacheLayout::one_buffer((cache, cache))), None);
    let tensor = TensorName::K;
    let twice = KvCacheLayout::k(cache.with_strides(32, 7, 8));
    assert_eq!(plan(twice), Some(Error::SelfOverlap { tensor }));
    let scales = ScaleLayout::strided(12, 3, 3, 1).inline();
    let codes = StoredCodes::dynamic(Codes::Int8, 0.0, scales);
    let spaced = KvCacheLayout::k(cache.with_strides(48, 12, 8)).with_k_codes(codes);
    let (first, second) = ("k's cache", "k's scales");
    assert_eq!(plan(spaced), Some(Error::Overlap { first, second }));
}

/// 3 tokens of 2 heads of 12 dims, of which 8 rotate, read and written: 2 * 3 * 2 * 4 bytes for each dim.
#[test]
fn bytes_are_those_of_dims_that_are_read_and_written() {
    let layout = Layout::tokens(3, 2, 12);
    let cache = CacheLayout::flat(4, 2, 12);
    let (scale, still) = (Stages::new().scale(0.5), Stages::new().without_rotation());
    let plain = f32s().q(Layout::tokens(3, 0, 12));
    for (problem, dims) in [
        (plain.k(layout), 8),
        (plain.k((layout, layout)), 12),
        (plain.k_to_cache(layout).cache(KvCacheLayout::k(cache)), 12),
        (plain.k(layout).k_stages(scale), 12),
        (plain.k(layout).k_stages(still), 12),
        (plain.v(layout), 0),
        (plain.v(layout).v_stages(still), 0),
        (plain.v((layout, layout)), 12),
        (plain.v(layout).v_stages(scale), 12),
        (plain.k(layout).v((layout, layout)), 20),
    ] {
        let plan = rotator(8).plan(&problem).unwrap();
        assert_eq!(plan.bytes(), 48 * dims, "{problem:?}");
    }
}

/// The stride of a dimension of size 1 may be anything: none of its multiples is an address.
#[test]
fn strides_of_one_are_not_walked() {
    let (rotator, any) = (rotator(8), usize::MAX);
    let heads = Layout::tokens(1, 1, 8).with_strides(any, any, any);
    let cache = CacheLayout::flat(1, 1, 8).with_strides(any, any, any);
    let codes = StoredCodes::dynamic(Codes::Int8, 1e-6, ScaleLayout::strided(any, any, any, any));
    let caches = KvCacheLayout::separate(cache, cache).with_v_codes(codes);
    let problem = f32s().k_to_cache(heads).v_to_cache(heads).cache(caches);
    let x = [127.0f32; 8];
    let (mut keys, mut values, mut scale) = ([0.0f32; 8], [0u8; 8], [0.0f32]);
    let step = start_without_slots().slots(Slots::mapping(&[0]));
    let step = step.k(&x[..]).v(&x[..]).k_cache(&mut keys[..]);
    let step = step.v_cache(&mut values[..]).v_scales(&mut scale[..]);
    let plan = rotator.plan(&problem).unwrap();
    assert_eq!(rotator.step(&plan, step), Ok(Stored::All));
    assert_eq!((keys, values, scale), (x, [127; 8], [1.0]));
}
