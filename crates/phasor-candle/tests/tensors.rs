//! Calls on tensors of any strides, positions of any kind, in place and into views.

use candle_core::{DType, Device, IndexOp, Tensor, Var};
use phasor::config::RopeConfig;
use phasor::{Frequencies, Pairing, Rope};
use phasor_candle::{DimOrder, Error, Positions, RotaryEmbedding};

const TYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
const CPU: Device = Device::Cpu;

fn rotary(rotary_dim: usize) -> RotaryEmbedding {
    let frequencies = Frequencies::from_theta(1e4, rotary_dim).unwrap();
    RotaryEmbedding::new(&Rope::new(frequencies, Pairing::HalfSplit))
}

/// Numbers that all differ from their neighbours, of a shape.
fn tensor(seed: u32, shape: &[usize], dtype: DType) -> Tensor {
    let len: usize = shape.iter().product();
    let mut state = seed.wrapping_mul(2_654_435_761);
    let values = (0..len).map(|_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    });
    let tensor = Tensor::from_iter(values, &CPU).unwrap();
    tensor.reshape(shape).unwrap().to_dtype(dtype).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    let wide = tensor.to_dtype(DType::F32).unwrap();
    wide.flatten_all().unwrap().to_vec1().unwrap()
}

#[track_caller]
fn assert_same(a: &Tensor, b: &Tensor) {
    assert_eq!(a.dims(), b.dims());
    assert_eq!(a.dtype(), b.dtype());
    assert_eq!(values(a), values(b));
}

fn copy(tensor: &Tensor) -> Tensor {
    tensor.copy().unwrap()
}

/// `[batch, heads, tokens, head_dim]` by way of phasor alone.
fn by_phasor(x: &Tensor, rope: &Rope, positions: phasor::Positions<'_>) -> Vec<f32> {
    let (b, h, t, d) = x.dims4().unwrap();
    let rotator = phasor::Host::new().rotator(rope);
    let layout = phasor::Layout::bhsd(b, t, h, d);
    let plan = rotator.plan(&phasor::Problem::new(phasor::Dtype::F32).q(layout));
    let mut x = values(x);
    rotator
        .rotate(&plan.unwrap(), Some((&mut x).into()), None, positions)
        .unwrap();
    x
}

// Shapes and strides.

#[test]
fn any_strides_give_what_a_copy_gives() {
    let rotary = rotary(8);
    let rope = rotary.rope().clone();
    // Which dim of the buffer each of batch, heads, tokens and head_dim is.
    let orders = [
        [0, 1, 2, 3],
        [0, 2, 1, 3],
        [1, 0, 2, 3],
        [2, 1, 0, 3],
        [0, 1, 3, 2],
        [3, 2, 1, 0],
    ];
    for dtype in TYPES {
        for order in orders {
            let mut shape = [0; 4];
            for (dim, size) in order.into_iter().zip([2, 3, 5, 8]) {
                shape[dim] = size + 2;
            }
            let buffer = tensor(1, &shape, dtype);
            let mut view = buffer.permute(order).unwrap();
            for (dim, (first, size)) in [(1, 2), (0, 3), (2, 5), (1, 8)].into_iter().enumerate() {
                view = view.narrow(dim, first, size).unwrap();
            }
            let before = copy(&view);
            let rotated = rotary.apply(&view, 7).unwrap();
            assert!(rotated.is_contiguous());
            assert_same(&view, &before);
            assert_same(&rotated, &rotary.apply(&before, 7).unwrap());
            if dtype == DType::F32 {
                let expected = by_phasor(&before, &rope, phasor::Positions::start(7));
                assert_eq!(values(&rotated), expected);
            }
            // The same tensor with tokens before heads.
            let thd = rotary.clone().with_dim_order(DimOrder::Bthd);
            assert_eq!(thd.dim_order(), DimOrder::Bthd);
            let other = thd.apply(&view.transpose(1, 2).unwrap(), 7).unwrap();
            assert!(other.is_contiguous());
            assert_same(&other.transpose(1, 2).unwrap(), &rotated);
            // In place, where heads are contiguous.
            let in_place = rotary.apply_inplace(&view, 7);
            if view.stride()[3] == 1 {
                in_place.unwrap();
                assert_same(&view, &rotated);
                // Around the view nothing changed.
                let outside = tensor(1, &shape, dtype).permute(order).unwrap();
                let now = buffer.permute(order).unwrap();
                for dim in 0..4 {
                    let edge = |tensor: &Tensor| tensor.narrow(dim, 0, [1, 0, 2, 1][dim]).unwrap();
                    assert_same(&edge(&now), &edge(&outside));
                }
            } else {
                assert!(matches!(in_place, Err(Error::Strided { .. })));
                assert_same(&view, &before);
            }
        }
    }
}

#[test]
fn sequences_that_are_one_in_memory_are_read_only() {
    let rotary = rotary(8);
    let one = tensor(2, &[1, 3, 5, 8], DType::F32);
    let many = one.broadcast_as((4, 3, 5, 8)).unwrap();
    let rotated = rotary.apply(&many, 3).unwrap();
    for b in 0..4 {
        assert_same(
            &rotated.narrow(0, b, 1).unwrap(),
            &rotary.apply(&one, 3).unwrap(),
        );
    }
    let before = values(&one);
    assert!(rotary.apply_inplace(&many, 3).is_err());
    assert_eq!(values(&one), before);
}

#[test]
fn some_dims_rotate() {
    let x = tensor(3, &[2, 3, 5, 12], DType::F32);
    let first = rotary(8).apply(&x, 9).unwrap();
    let last = rotary(8).with_rotary_offset(4).apply(&x, 9).unwrap();
    let dims = |tensor: &Tensor, from, len| tensor.narrow(3, from, len).unwrap();
    assert_same(&dims(&first, 8, 4), &dims(&x, 8, 4));
    assert_same(&dims(&last, 0, 4), &dims(&x, 0, 4));
    assert_same(
        &dims(&first, 0, 8),
        &rotary(8).apply(&dims(&x, 0, 8), 9).unwrap(),
    );
    assert_same(
        &dims(&last, 4, 8),
        &rotary(8).apply(&dims(&x, 4, 8), 9).unwrap(),
    );
    let wide = rotary(16).apply(&x, 9);
    assert!(matches!(
        wide,
        Err(Error::Phasor(phasor::Error::RotaryWindow { .. }))
    ));
}

#[test]
fn packed_tokens() {
    let x = tensor(4, &[7, 3, 8], DType::BF16);
    let rotated = rotary(8).apply_packed(&x, 11).unwrap();
    let thd = rotary(8).with_dim_order(DimOrder::Bthd);
    let batch = thd.apply(&x.unsqueeze(0).unwrap(), 11).unwrap();
    assert_same(&rotated, &batch.squeeze(0).unwrap());
    // Of three sequences, and two tokens of padding.
    let cu_seqlens = [0u32, 4, 4, 5];
    let starts = [100i64, 5, -3];
    let ragged = Positions::starts(&starts).cu_seqlens(&cu_seqlens);
    let rotated = rotary(8).apply_packed(&x, ragged.clone()).unwrap();
    let of =
        |from, len, start: i64| rotary(8).apply_packed(&x.narrow(0, from, len).unwrap(), start);
    assert_same(&rotated.narrow(0, 0, 4).unwrap(), &of(0, 4, 100).unwrap());
    assert_same(&rotated.narrow(0, 4, 1).unwrap(), &of(4, 1, -3).unwrap());
    assert_eq!(values(&rotated.narrow(0, 5, 2).unwrap()), [0.0; 48]);
    // In place it stays.
    let y = copy(&x);
    rotary(8).apply_inplace(&y, ragged).unwrap();
    assert_same(
        &y.narrow(0, 0, 5).unwrap(),
        &rotated.narrow(0, 0, 5).unwrap(),
    );
    assert_same(&y.narrow(0, 5, 2).unwrap(), &x.narrow(0, 5, 2).unwrap());
    for (x, call) in [
        (&x, "[batch, heads, tokens, head_dim]"),
        (&x.unsqueeze(0).unwrap(), "[tokens, "),
    ] {
        let error = match x.rank() {
            3 => rotary(8).apply(x, 0),
            _ => rotary(8).apply_packed(x, 0),
        };
        let message = error.unwrap_err().to_string();
        assert!(message.contains(call), "{message}");
    }
}

#[test]
fn nothing_to_rotate() {
    let rotary = rotary(8);
    for shape in [[0, 3, 5, 8], [2, 0, 5, 8], [2, 3, 0, 8]] {
        let x = Tensor::zeros(&shape, DType::F32, &CPU).unwrap();
        assert_eq!(rotary.apply(&x, 0).unwrap().dims(), shape);
        rotary.apply_inplace(&x, 0).unwrap();
        rotary.apply_qk_inplace(&x, &copy(&x), 0).unwrap();
        rotary.apply_into(&x, &copy(&x), 0).unwrap();
    }
}

// Positions.

#[test]
fn positions_of_every_form() {
    let rotary = rotary(8);
    let rope = rotary.rope().clone();
    let x = tensor(5, &[2, 3, 4, 8], DType::F32);
    let apply = |positions: Positions| values(&rotary.apply(&x, positions).unwrap());
    let expect = |positions| by_phasor(&x, &rope, positions);

    let one = expect(phasor::Positions::start(40));
    assert_eq!(apply(40.into()), one);
    assert_eq!(apply(40usize.into()), one);
    assert_eq!(apply(40i64.into()), one);
    assert_eq!(apply(40u32.into()), one);
    assert_eq!(apply(40u64.into()), one);
    assert_eq!(apply((-40).into()), expect(phasor::Positions::start(-40)));
    let far = 3_000_000_000_000i64;
    assert_eq!(apply(far.into()), expect(phasor::Positions::start(far)));

    let starts = [17i64, 40_000];
    let expected = expect(phasor::Positions::start_per_sequence(&starts));
    assert_eq!(apply(Positions::starts(&starts)), expected);
    assert_eq!(
        apply(Positions::starts(&Tensor::new(&starts, &CPU).unwrap())),
        expected
    );
    assert_eq!(
        apply(Positions::starts(&starts.map(|n| n as u32))),
        expected
    );
    let expected = expect(phasor::Positions::per_sequence(&starts));
    assert_eq!(apply(Positions::per_sequence(&starts)), expected);

    let shared = [3u32, 0, 0, 9];
    let expected = expect(phasor::Positions::per_token_shared(&shared));
    assert_eq!(apply((&shared).into()), expected);
    assert_eq!(apply(shared[..].into()), expected);
    assert_eq!(apply((&shared.to_vec()).into()), expected);
    assert_eq!(apply((&shared.map(|n| n as i32)).into()), expected);
    let ids = Tensor::new(&shared, &CPU).unwrap();
    assert_eq!(apply((&ids).into()), expected);
    assert_eq!(apply((&ids.unsqueeze(0).unwrap()).into()), expected);
    assert_eq!(apply((&ids.to_dtype(DType::I64).unwrap()).into()), expected);

    let each = [3i64, 0, 0, 9, 1, 2, 3, 1 << 50];
    let expected = expect(phasor::Positions::per_token(&each));
    assert_eq!(apply((&each).into()), expected);
    let ids = Tensor::new(&each, &CPU).unwrap().reshape((2, 4)).unwrap();
    assert_eq!(apply((&ids).into()), expected);
    // A window of ids, which is not contiguous, and one that begins late.
    let columns = Tensor::stack(&[&ids, &ids], 2)
        .unwrap()
        .i((.., .., 1))
        .unwrap();
    assert!(!columns.is_contiguous());
    assert_eq!(apply((&columns).into()), expected);
    let late = Tensor::cat(&[&ids, &ids], 0)
        .unwrap()
        .narrow(0, 2, 2)
        .unwrap();
    assert_eq!(apply((&late).into()), expected);
}

#[test]
fn positions_on_axes_and_rows_of_frequencies() {
    let plain = Frequencies::from_theta(1e4, 8).unwrap();
    let axes = plain.clone().with_axes(3, &[0, 1, 2, 1]).unwrap();
    let rope = Rope::new(axes, Pairing::HalfSplit);
    let x = tensor(6, &[2, 1, 3, 8], DType::F32);
    let ids: Vec<u32> = (0..18).map(|n| n * n).collect();
    let tensor_of_ids = Tensor::from_slice(&ids, (3, 2, 3), &CPU).unwrap();
    let got = RotaryEmbedding::new(&rope)
        .apply(&x, &tensor_of_ids)
        .unwrap();
    let expected = by_phasor(&x, &rope, phasor::Positions::per_axis(&ids));
    assert_eq!(values(&got), expected);

    let other = Frequencies::from_theta(7.0, 8).unwrap();
    let rows = phasor::FrequencyRows::new(&[plain, other]).unwrap();
    let rope = Rope::new(rows.with_lengths(&[100, 200]).unwrap(), Pairing::HalfSplit);
    let rotary = RotaryEmbedding::new(&rope);
    assert_eq!(rotary.row_for_length(150).unwrap(), Some(1));
    assert!(rotary.row_for_length(201).is_err());
    let of_call = rotary
        .apply(&x, Positions::from(3).frequency_row(1))
        .unwrap();
    let expected = phasor::Positions::start(3).frequency_row(1);
    assert_eq!(values(&of_call), by_phasor(&x, &rope, expected));
    let of_each = rotary
        .apply(&x, Positions::from(3).frequency_rows(&[1u32, 0]))
        .unwrap();
    let expected = phasor::Positions::start(3).frequency_rows_per_sequence(&[1u32, 0]);
    assert_eq!(values(&of_each), by_phasor(&x, &rope, expected));
    assert!(rotary.apply(&x, 3).is_err());
}

#[test]
fn positions_that_do_not_fit() {
    let rotary = rotary(8);
    let x = tensor(7, &[2, 3, 4, 8], DType::F32);
    let before = values(&x);
    let floats = Tensor::zeros(4, DType::F32, &CPU).unwrap();
    assert!(matches!(
        rotary.apply(&x, &floats),
        Err(Error::DType { .. })
    ));
    for shape in [
        &[][..],
        &[3],
        &[2],
        &[3, 4],
        &[2, 3],
        &[1, 1, 4],
        &[1, 1, 2, 4],
    ] {
        let ids = Tensor::zeros(shape, DType::U32, &CPU).unwrap();
        let error = rotary.apply_inplace(&x, &ids).unwrap_err();
        assert!(
            matches!(error, Error::PositionsShape { .. }),
            "{shape:?}: {error}"
        );
    }
    let axes = Tensor::zeros((2, 2, 4), DType::U32, &CPU).unwrap();
    assert!(matches!(rotary.apply(&x, &axes), Err(Error::Phasor(_))));
    let starts = Positions::starts(&[1i64, 2, 3]);
    assert!(matches!(
        rotary.apply_inplace(&x, starts),
        Err(Error::Phasor(_))
    ));
    assert_eq!(values(&x), before);
}

// In place.

#[test]
fn queries_and_keys_at_once() {
    for dtype in TYPES {
        let rotary = rotary(8).with_dim_order(DimOrder::Bthd);
        let qkv = tensor(8, &[2, 5, 7, 8], dtype);
        let window = |tensor: &Tensor, first, heads| tensor.narrow(2, first, heads).unwrap();
        let expected = |first, heads| {
            rotary
                .apply(&copy(&window(&qkv, first, heads)), 21)
                .unwrap()
        };
        let (q, k, v) = (expected(0, 4), expected(4, 2), copy(&window(&qkv, 6, 1)));
        // Of storages of their own, in either order of these.
        for swapped in [false, true] {
            let (a, b) = match swapped {
                false => {
                    let a = copy(&window(&qkv, 0, 4));
                    (a, copy(&window(&qkv, 4, 2)))
                }
                true => {
                    let b = copy(&window(&qkv, 4, 2));
                    (copy(&window(&qkv, 0, 4)), b)
                }
            };
            rotary.apply_qk_inplace(&a, &b, 21).unwrap();
            assert_same(&a, &q);
            assert_same(&b, &k);
        }
        // Windows of one.
        let packed = copy(&qkv);
        rotary
            .apply_qk_inplace(&window(&packed, 0, 4), &window(&packed, 4, 2), 21)
            .unwrap();
        assert_same(&packed, &Tensor::cat(&[&q, &k, &v], 2).unwrap());
        // Keys first, and the windows late in the storage.
        let twice = Tensor::cat(&[&qkv, &qkv], 0).unwrap();
        let late = twice.narrow(0, 2, 2).unwrap();
        rotary
            .apply_qk_inplace(&window(&late, 4, 2), &window(&late, 0, 4), 21)
            .unwrap();
        assert_same(&late, &packed);
        assert_same(&twice.narrow(0, 0, 2).unwrap(), &qkv);
        // As [tokens, heads, head_dim].
        let tokens = copy(&qkv.i(0).unwrap());
        let heads = |first, heads| tokens.narrow(1, first, heads).unwrap();
        rotary
            .apply_qk_inplace(&heads(0, 4), &heads(4, 2), 21)
            .unwrap();
        assert_same(&tokens, &packed.i(0).unwrap());
    }
}

#[test]
fn tensors_that_share_elements_are_refused() {
    let rotary = rotary(8);
    let x = tensor(9, &[1, 4, 5, 8], DType::F32);
    let before = values(&x);
    let heads = |first| x.narrow(1, first, 3).unwrap();
    for (q, k) in [(&x, &x.clone()), (&heads(0), &heads(1))] {
        let error = rotary.apply_qk_inplace(q, k, 3).unwrap_err();
        assert!(
            matches!(error, Error::Phasor(phasor::Error::Overlap { .. })),
            "{error}"
        );
        let error = rotary.apply_into(q, k, 3).unwrap_err();
        assert!(
            matches!(error, Error::Phasor(phasor::Error::Overlap { .. })),
            "{error}"
        );
    }
    // Positions in a tensor are no obstacle, though the storages are locked together.
    let ids = Tensor::new(&[1u32, 2, 3, 4, 5], &CPU).unwrap();
    rotary.apply_qk_inplace(&x, &copy(&x), &ids).unwrap();
    assert_ne!(values(&x), before);
}

#[test]
fn threads_that_exchange_queries_and_keys_go_on() {
    let rotary = rotary(8);
    let a = tensor(10, &[1, 2, 1, 8], DType::F32);
    let b = tensor(11, &[1, 2, 1, 8], DType::F32);
    let (by_both, by_one) = ([copy(&a), copy(&b)], [copy(&a), copy(&b)]);
    let start = Tensor::new(&[1u32], &CPU).unwrap();
    std::thread::scope(|scope| {
        for (q, k) in [(0, 1), (1, 0), (0, 1)] {
            let (rotary, tensors, start) = (&rotary, &by_both, &start);
            scope.spawn(move || {
                for _ in 0..1000 {
                    rotary
                        .apply_qk_inplace(&tensors[q], &tensors[k], start)
                        .unwrap();
                    rotary
                        .apply_into(&tensors[q].i(..).unwrap(), &copy(&tensors[k]), 1)
                        .unwrap();
                }
            });
        }
    });
    for _ in 0..3000 {
        rotary.apply_qk_inplace(&by_one[0], &by_one[1], 1).unwrap();
    }
    for (both, one) in by_both.iter().zip(&by_one) {
        assert_same(both, one);
    }
}

#[test]
fn into_a_cache() {
    let rotary = rotary(8);
    for dtype in TYPES {
        let cache = tensor(12, &[2, 3, 10, 8], dtype);
        let before = copy(&cache);
        let k = tensor(13, &[2, 3, 4, 8], dtype);
        rotary
            .apply_into(&k, &cache.narrow(2, 5, 4).unwrap(), 5)
            .unwrap();
        let tokens = |tensor: &Tensor, from, len| tensor.narrow(2, from, len).unwrap();
        assert_same(&tokens(&cache, 5, 4), &rotary.apply(&k, 5).unwrap());
        assert_same(&tokens(&cache, 0, 5), &tokens(&before, 0, 5));
        assert_same(&tokens(&cache, 9, 1), &tokens(&before, 9, 1));
        // From one place of a tensor to another.
        rotary
            .apply_into(&tokens(&cache, 0, 2), &tokens(&cache, 3, 2), 9)
            .unwrap();
        assert_same(
            &tokens(&cache, 3, 2),
            &rotary.apply(&tokens(&before, 0, 2), 9).unwrap(),
        );
        assert_same(&tokens(&cache, 0, 3), &tokens(&before, 0, 3));
        // Another shape or type.
        assert!(rotary.apply_into(&k, &tokens(&cache, 0, 3), 0).is_err());
        let other = if dtype == DType::F32 {
            DType::BF16
        } else {
            DType::F32
        };
        assert!(
            rotary
                .apply_into(&k, &k.to_dtype(other).unwrap(), 0)
                .is_err()
        );
    }
}

// Gradients.

#[test]
fn gradients_flow_back() {
    for (rope, theirs) in [
        (
            Pairing::HalfSplit,
            candle_nn::rotary_emb::rope_slow as fn(&_, &_, &_) -> _,
        ),
        (Pairing::Interleaved, candle_nn::rotary_emb::rope_i_slow),
    ] {
        let rope = Rope::new(Frequencies::from_theta(1e4, 8).unwrap(), rope);
        let rotary = RotaryEmbedding::new(&rope);
        let x = Var::from_tensor(&tensor(14, &[1, 3, 5, 8], DType::F32)).unwrap();
        let weights = tensor(15, &[1, 3, 5, 8], DType::F32);
        let gradient = |rotated: Tensor| {
            let loss = (rotated.sqr().unwrap() * &weights)
                .unwrap()
                .sum_all()
                .unwrap();
            loss.backward().unwrap().get(&x).unwrap().clone()
        };
        let ours = gradient(rotary.apply(&x, 0).unwrap());
        let angles: Vec<f32> = (0..20)
            .map(|n| (n / 4) as f32 * 10f32.powi(-(n % 4)))
            .collect();
        let angles = Tensor::from_vec(angles, (5, 4), &CPU).unwrap();
        let (cos, sin) = (angles.cos().unwrap(), angles.sin().unwrap());
        let theirs: candle_core::Result<Tensor> = theirs(&x, &cos, &sin);
        let theirs = gradient(theirs.unwrap());
        let far = (ours - theirs).unwrap().abs().unwrap().max_all().unwrap();
        let far = far.to_scalar::<f32>().unwrap();
        assert!(far < 1e-5, "{far}");
    }
}

#[test]
fn gradients_of_views_and_of_every_kind_of_position() {
    let frequencies = Frequencies::from_theta(1e4, 8).unwrap();
    let frequencies = frequencies.with_attention_factor(1.5).unwrap();
    let rotary = RotaryEmbedding::new(&Rope::new(frequencies, Pairing::HalfSplit));
    let x = Var::from_tensor(&tensor(16, &[5, 2, 3, 12], DType::F32)).unwrap();
    let view = x.permute((1, 2, 0, 3)).unwrap().narrow(1, 1, 2).unwrap();
    let ids = Tensor::new(&[[3u32, 1, 4, 1, 5], [9, 2, 6, 5, 3]], &CPU).unwrap();
    let starts = [5i64, 1 << 40];
    for positions in [
        Positions::from(1_000_000),
        Positions::from(&ids),
        Positions::starts(&starts),
    ] {
        let rotated = rotary.apply(&view, positions.clone()).unwrap();
        assert!(rotated.track_op());
        let weights = tensor(17, &[2, 2, 5, 12], DType::F32);
        let loss = (&rotated * &weights).unwrap().sum_all().unwrap();
        let gradient = loss.backward().unwrap().get(&x).unwrap().clone();
        let of_view = gradient.permute((1, 2, 0, 3)).unwrap();
        let expected = rotary.backward().apply(&weights, positions).unwrap();
        assert_same(&of_view.narrow(1, 1, 2).unwrap(), &expected);
        assert_eq!(values(&of_view.narrow(1, 0, 1).unwrap()), [0.0; 120]);
        // With the factor, which multiplies on the way back too, a turn there and back is its square.
        let back = rotary.backward().backward();
        assert_eq!(back.rope(), rotary.rope());
    }
    let packed = Var::from_tensor(&tensor(18, &[5, 2, 8], DType::F32)).unwrap();
    let cu_seqlens = [0i64, 2, 4];
    let starts = [7i64, 9];
    let ragged = Positions::starts(&starts).cu_seqlens(&cu_seqlens);
    let rotated = rotary.apply_packed(&packed, ragged.clone()).unwrap();
    let gradients = rotated.sum_all().unwrap().backward().unwrap();
    let ones = packed.ones_like().unwrap();
    let expected = rotary.backward().apply_packed(&ones, ragged).unwrap();
    assert_same(gradients.get(&packed).unwrap(), &expected);
    assert_eq!(values(&expected.narrow(0, 4, 1).unwrap()), [0.0; 16]);
}

#[test]
fn what_has_a_gradient_is_not_written() {
    let rotary = rotary(8);
    let plain = || tensor(19, &[1, 2, 3, 8], DType::F32);
    let variable = Var::from_tensor(&plain()).unwrap();
    let tracked = (variable.as_tensor() * 1.0).unwrap();
    for x in [variable.as_tensor(), &tracked] {
        for result in [
            rotary.apply_inplace(x, 0),
            rotary.apply_qk_inplace(x, &plain(), 0),
            rotary.apply_qk_inplace(&plain(), x, 0),
            rotary.apply_into(x, &plain(), 0),
            rotary.apply_into(&plain(), x, 0),
        ] {
            assert!(matches!(result, Err(Error::Tracked { .. })));
        }
    }
    assert_same(&variable, &plain());
    rotary.apply_inplace(&tracked.detach(), 1).unwrap();
    assert_same(&tracked, &rotary.apply(&plain(), 1).unwrap());
}

// What is refused otherwise.

#[test]
fn errors_say_what_to_change() {
    let rotary = rotary(8);
    let x = |dtype| Tensor::zeros((1, 2, 3, 8), dtype, &CPU).unwrap();
    for dtype in [DType::U8, DType::I64, DType::F64] {
        let error = rotary.apply(&x(dtype), 0).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("f32, f16 or bf16 (Tensor::to_dtype)"),
            "{error}"
        );
    }
    // Which shapes a call takes.
    let flat = Tensor::zeros(8, DType::F32, &CPU).unwrap();
    let [new, packed, in_place] = [
        rotary.apply(&flat, 0).unwrap_err(),
        rotary.apply_packed(&flat, 0).unwrap_err(),
        rotary.apply_inplace(&flat, 0).unwrap_err(),
    ]
    .map(|error| error.to_string());
    let (four, three) = (
        "[batch, heads, tokens, head_dim]",
        "[tokens, heads, head_dim]",
    );
    assert!(new.ends_with(&format!("must be {four}")), "{new}");
    assert!(packed.ends_with(&format!("must be {three}")), "{packed}");
    assert!(
        in_place.ends_with(&format!("must be {four} or {three}")),
        "{in_place}"
    );
    let mixed = rotary.apply_qk_inplace(&x(DType::F32), &x(DType::F16), 0);
    assert!(matches!(
        mixed,
        Err(Error::Phasor(phasor::Error::DtypeMismatch { .. }))
    ));
    let error = Error::Devices {
        first: "q",
        first_device: "cuda:0".into(),
        second: "k",
        second_device: "cuda:0".into(),
    };
    assert!(
        error
            .to_string()
            .contains("make the device once, and clone it")
    );
    // Into candle's error and out of its functions.
    fn layer(rotary: &RotaryEmbedding, x: &Tensor) -> candle_core::Result<Tensor> {
        Ok(rotary.apply(x, 0)?)
    }
    let error = layer(&rotary, &x(DType::U8)).unwrap_err();
    assert!(error.to_string().contains("it must be f32"), "{error}");
    let error: candle_core::Error =
        Error::Candle(candle_core::Error::Msg("as it is".into())).into();
    assert_eq!(error.to_string(), "as it is");
}

#[test]
fn loading_for_the_cpu_is_nothing() {
    rotary(8).load(&CPU, DType::BF16).unwrap();
    assert!(matches!(
        rotary(8).load(&CPU, DType::U8),
        Err(Error::DType { .. })
    ));
}

// Where rotations come from.

#[test]
fn from_a_config() {
    let text = r#"{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4,
        "rope_theta": 500000.0}"#;
    let rotary = RotaryEmbedding::from_hf_config(text).unwrap();
    let expected = Frequencies::from_theta(5e5, 16).unwrap();
    assert_eq!(*rotary.rope(), Rope::new(expected, Pairing::HalfSplit));
    let several =
        RotaryEmbedding::from_hf_config(r#"{"model_type": "gemma3_text", "head_dim": 256}"#);
    assert!(several.unwrap_err().to_string().contains("rope_of_layer"));
    assert!(RotaryEmbedding::from_hf_config("{").is_err());

    // The last dims of a head.
    let config = RopeConfig::new(1e4, 12).unwrap();
    let config = config.with_rotary_dim(8).unwrap().with_trailing_rotation();
    let rotary = RotaryEmbedding::from_config(&config).unwrap();
    assert_eq!(rotary.rotary_offset(), 4);
    let x = tensor(20, &[1, 1, 2, 12], DType::F32);
    let same = self::rotary(8).with_rotary_offset(4).apply(&x, 5).unwrap();
    assert_same(&rotary.apply(&x, 5).unwrap(), &same);
}

#[test]
fn with_other_threads_and_instructions() {
    let x = tensor(21, &[2, 3, 64, 128], DType::BF16);
    let expected = rotary(128).apply(&x, 3).unwrap();
    let scalar = phasor::Host::new().with_isa(phasor::Isa::Scalar).unwrap();
    let scalar = scalar.with_threads(phasor::Threads::One);
    let same = rotary(128).with_host(scalar).apply(&x, 3).unwrap();
    assert_same(&same, &expected);
    assert_eq!(
        RotaryEmbedding::from(rotary(8).rope()).rope(),
        rotary(8).rope()
    );
}
