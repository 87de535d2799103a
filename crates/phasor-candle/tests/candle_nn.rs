//! What candle-nn computes, and how far from it this is.

use candle_core::{DType, Device, Result, Tensor};
use phasor::{Frequencies, Pairing, Rope};
use phasor_candle::{DimOrder, RotaryEmbedding, rotary_emb};

const TYPES: [DType; 4] = [DType::F32, DType::F16, DType::BF16, DType::F64];

/// Half a step of the values in [1, 2).
fn half_step(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 0.0, // the same arithmetic
        DType::F32 => 2f64.powi(-24),
        DType::F16 => 2f64.powi(-11),
        _ => 2f64.powi(-8),
    }
}

/// Numbers that look random, in [-2, 2).
fn numbers(seed: u64, len: usize) -> Vec<f64> {
    let mut state = seed;
    let next = |_| {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 33) as f64 / (1u64 << 29) as f64 - 2.0
    };
    (0..len).map(next).collect()
}

fn tensor(seed: u64, shape: &[usize], dtype: DType) -> Tensor {
    let values = numbers(seed, shape.iter().product());
    let tensor = Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
    tensor.to_dtype(dtype).unwrap()
}

/// Tables of angles that are formed in f64, then rounded.
fn tables(positions: &[f64], theta: f64, dim: usize, dtype: DType) -> [Tensor; 2] {
    let angle = |position: f64, pair: usize| position * theta.powf(-2.0 * pair as f64 / dim as f64);
    let of = |f: fn(f64) -> f64| {
        let rows = positions.iter().copied();
        let values = rows.flat_map(|p| (0..dim / 2).map(move |pair| f(angle(p, pair))));
        let values: Vec<_> = values.collect();
        let shape = (positions.len(), dim / 2);
        Tensor::from_vec(values, shape, &Device::Cpu)
            .unwrap()
            .to_dtype(dtype)
            .unwrap()
    };
    [of(f64::cos), of(f64::sin)]
}

fn values(tensor: &Tensor) -> Vec<f64> {
    let flat = tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap();
    flat.to_vec1().unwrap()
}

/// Where pair `i` of a head of `dim` has its members.
fn members(pairing: Pairing, i: usize, dim: usize) -> [usize; 2] {
    match pairing {
        Pairing::HalfSplit => [i, i + dim / 2],
        Pairing::Interleaved => [2 * i, 2 * i + 1],
    }
}

/// The largest difference, in units of half a step of a dot product's terms.
fn apart(x: &Tensor, a: &Tensor, b: &Tensor, pairing: Pairing, dtype: DType) -> f64 {
    assert_eq!((a.dims(), a.dtype()), (x.dims(), dtype));
    assert_eq!((b.dims(), b.dtype()), (x.dims(), dtype));
    let dim = *x.dims().last().unwrap();
    let (x, a, b) = (values(x), values(a), values(b));
    let mut largest = 0f64;
    for (at, head) in x.chunks(dim).enumerate() {
        for pair in 0..dim / 2 {
            let places = members(pairing, pair, dim);
            let size: f64 = places.iter().map(|&i| head[i].abs()).sum();
            for place in places {
                let difference = (a[at * dim + place] - b[at * dim + place]).abs();
                largest = largest.max(difference / size);
            }
        }
    }
    match half_step(dtype) {
        0.0 => largest * 1e300,
        step => largest / step,
    }
}

type Given = fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>;

const FUNCTIONS: [(&str, Given, Given, Pairing); 3] = [
    (
        "rope",
        rotary_emb::rope,
        candle_nn::rotary_emb::rope,
        Pairing::HalfSplit,
    ),
    (
        "rope_i",
        rotary_emb::rope_i,
        candle_nn::rotary_emb::rope_i,
        Pairing::Interleaved,
    ),
    (
        "rope_thd",
        rotary_emb::rope_thd,
        candle_nn::rotary_emb::rope_thd,
        Pairing::HalfSplit,
    ),
];

/// The dims of `[batch, heads, tokens, head_dim]` in the order of a function.
fn dims(name: &str, [b, h, t, d]: [usize; 4]) -> [usize; 4] {
    match name {
        "rope_thd" => [b, t, h, d],
        _ => [b, h, t, d],
    }
}

#[test]
fn given_tables_turn_as_in_candle_nn() {
    for (seed, [b, h, t, d]) in [
        [1, 1, 1, 2],
        [1, 9, 1, 64],
        [1, 3, 7, 64],
        [2, 4, 5, 128],
        [3, 2, 1, 80],
        [2, 1, 33, 6],
    ]
    .into_iter()
    .enumerate()
    {
        let positions: Vec<f64> = (100..100 + t).map(|p| p as f64).collect();
        for dtype in TYPES {
            let [cos, sin] = tables(&positions, 1e4, d, dtype);
            for (name, ours, theirs, pairing) in FUNCTIONS {
                let xs = tensor(seed as u64, &dims(name, [b, h, t, d]), dtype);
                let (ours, theirs) = (
                    ours(&xs, &cos, &sin).unwrap(),
                    theirs(&xs, &cos, &sin).unwrap(),
                );
                // Theirs rounds each product and the sum, ours the result.
                let apart = apart(&xs, &ours, &theirs, pairing, dtype);
                assert!(apart < 3.0, "{name} {dtype:?} {:?}: {apart}", xs.dims());
                assert!(ours.is_contiguous());
            }
        }
    }
}

#[test]
fn tables_with_a_batch_and_tables_that_are_longer() {
    let [b, h, t, d] = [3, 2, 4, 16];
    let positions: Vec<f64> = (0..b * t).map(|p| (p * p) as f64).collect();
    for dtype in TYPES {
        let flat = tables(&positions, 1e4, d, dtype);
        let batched = [&flat[0], &flat[1]].map(|table| table.reshape((b, t, d / 2)).unwrap());
        for (name, ours, theirs, pairing) in FUNCTIONS {
            let xs = tensor(7, &dims(name, [b, h, t, d]), dtype);
            let check = |[cos, sin]: &[Tensor; 2]| {
                let (ours, theirs) = (ours(&xs, cos, sin).unwrap(), theirs(&xs, cos, sin).unwrap());
                let apart = apart(&xs, &ours, &theirs, pairing, dtype);
                assert!(apart < 3.0, "{name} {dtype:?}: {apart}");
                ours
            };
            let of_batch = check(&batched);
            let of_long = check(&flat);
            assert_ne!(values(&of_batch), values(&of_long));
            // Cut out of longer ones, so that rows begin elsewhere; each sequence has its own rows still.
            let longer = batched.each_ref().map(|table| {
                let more = Tensor::cat(&[table, table], 1).unwrap();
                assert_eq!(more.dims(), [b, 2 * t, d / 2]);
                more
            });
            let same = ours(&xs, &longer[0], &longer[1]).unwrap();
            assert_eq!(values(&same), values(&of_batch), "{name} {dtype:?}");
            // A view, also one whose rows are not contiguous.
            let views = longer
                .each_ref()
                .map(|table| table.narrow(1, t, t).unwrap());
            let same = ours(&xs, &views[0], &views[1]).unwrap();
            assert_eq!(values(&same), values(&of_batch), "{name} {dtype:?}");
            // Tables of unlike length.
            let same = ours(&xs, &views[0], &longer[1]).unwrap();
            assert_eq!(values(&same), values(&of_batch), "{name} {dtype:?}");
        }
    }
}

#[test]
fn strides_and_wider_tables_are_taken() {
    let positions: Vec<f64> = (0..5).map(f64::from).collect();
    for dtype in TYPES {
        let [cos, sin] = tables(&positions, 1e4, 8, dtype);
        let thd = tensor(3, &[2, 5, 3, 8], dtype);
        let view = thd.transpose(1, 2).unwrap();
        for (ours, pairing) in [
            (rotary_emb::rope as Given, Pairing::HalfSplit),
            (rotary_emb::rope_i, Pairing::Interleaved),
        ] {
            let of_view = ours(&view, &cos, &sin).unwrap();
            let of_copy = ours(&view.contiguous().unwrap(), &cos, &sin).unwrap();
            assert_eq!(values(&of_view), values(&of_copy));
            // Heads whose elements are apart.
            let columns = tensor(4, &[2, 3, 8, 5], dtype).transpose(2, 3).unwrap();
            let of_view = ours(&columns, &cos, &sin).unwrap();
            let of_copy = ours(&columns.contiguous().unwrap(), &cos, &sin).unwrap();
            assert_eq!(values(&of_view), values(&of_copy));
            if half_step(dtype) == 0.0 {
                continue;
            }
            // By a table in f32, 16-bit types round but once.
            let [cos, sin] = tables(&positions, 1e4, 8, DType::F32);
            let narrow = ours(&view, &cos, &sin).unwrap();
            let wide = ours(&view.to_dtype(DType::F32).unwrap(), &cos, &sin).unwrap();
            assert_eq!(values(&narrow), values(&wide.to_dtype(dtype).unwrap()));
            let apart = apart(
                &view,
                &narrow,
                &wide.to_dtype(dtype).unwrap(),
                pairing,
                dtype,
            );
            assert_eq!(apart, 0.0);
        }
    }
}

#[test]
fn exact_angles_are_near_candle_nn_where_its_tables_are_good() {
    for (d, theta) in [(64, 1e4), (128, 5e5), (80, 1e6)] {
        let positions: Vec<f64> = (4096..4101).map(f64::from).collect();
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let [cos, sin] = tables(&positions, theta, d, dtype);
            for (name, _, theirs, pairing) in FUNCTIONS {
                let rope = Rope::new(Frequencies::from_theta(theta, d).unwrap(), pairing);
                let rotary = RotaryEmbedding::new(&rope);
                let xs = tensor(11, &dims(name, [2, 3, 5, d]), dtype);
                let ours = match name {
                    "rope_thd" => rotary_emb::rope_thd_exact(&xs, &rotary, 4096),
                    _ => rotary_emb::rope_exact(&xs, &rotary, 4096),
                };
                let ours = ours.unwrap();
                let theirs = theirs(&xs, &cos, &sin).unwrap();
                let near = apart(&xs, &ours, &theirs, pairing, dtype);
                assert!(near < 5.0, "{name} {dtype:?} {d}: {near}");
                // Against what f64 has, ours rounds once to 16 bits and theirs three times.
                let [cos, sin] = tables(&positions, theta, d, DType::F64);
                let wide = xs.to_dtype(DType::F64).unwrap();
                let truth = FUNCTIONS.into_iter().find(|of| of.0 == name).unwrap().1;
                let truth = truth(&wide, &cos, &sin).unwrap();
                let of = |got: &Tensor| {
                    let got = got.to_dtype(DType::F64).unwrap();
                    apart(&wide, &got, &truth, pairing, DType::F64) * 1e-300 / half_step(dtype)
                };
                let (ours, theirs) = (of(&ours), of(&theirs));
                assert!(
                    ours < 2.5 && (ours < theirs || dtype == DType::F32),
                    "{name} {dtype:?} {d}: {ours} {theirs}"
                );
            }
        }
    }
}

/// At a million, tables that are formed in f32 turn by other angles.
#[test]
fn exact_angles_stay_exact() {
    let (d, start) = (64, 1_000_000);
    let rope = Rope::new(Frequencies::from_theta(1e4, d).unwrap(), Pairing::HalfSplit);
    let rotary = RotaryEmbedding::new(&rope).with_dim_order(DimOrder::Bhtd);
    let xs = tensor(5, &[1, 2, 3, d], DType::F32);
    let ours = rotary.apply(&xs, start).unwrap();
    let positions: Vec<f64> = (0..3).map(|t| f64::from(start + t)).collect();
    let [cos, sin] = tables(&positions, 1e4, d, DType::F64);
    let wide = xs.to_dtype(DType::F64).unwrap();
    let truth = candle_nn::rotary_emb::rope(&wide, &cos, &sin).unwrap();
    let error = |got: &Tensor| {
        let got = values(got);
        let pairs = got.iter().zip(values(&truth));
        pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
    };
    // As candle's models do: inv_freq and positions in f32, and their product.
    let inv_freq: Vec<_> = (0..d / 2)
        .map(|i| 1f32 / 1e4f32.powf(2.0 * i as f32 / d as f32))
        .collect();
    let inv_freq = Tensor::from_vec(inv_freq, (1, d / 2), &Device::Cpu).unwrap();
    let rows: Vec<_> = positions.iter().map(|&p| p as f32).collect();
    let rows = Tensor::from_vec(rows, (3, 1), &Device::Cpu).unwrap();
    let angles = rows.matmul(&inv_freq).unwrap();
    let theirs = candle_nn::rotary_emb::rope(&xs, &angles.cos().unwrap(), &angles.sin().unwrap());
    let (ours, theirs) = (error(&ours), error(&theirs.unwrap()));
    assert!(ours < 1e-6, "{ours}");
    assert!(theirs > 1e-2, "{theirs}");
}

#[test]
fn what_does_not_fit_is_refused_as_there() {
    let f32s = |shape: &[usize]| tensor(1, shape, DType::F32);
    // As many heads as tokens, so that all three see four tokens.
    let xs = f32s(&[2, 4, 4, 8]);
    for (cos, sin) in [
        (f32s(&[4, 8]), f32s(&[4, 8])),
        (f32s(&[3, 4]), f32s(&[4, 4])),
        (f32s(&[4, 4]), f32s(&[3, 4])),
        (f32s(&[3, 4, 4]), f32s(&[3, 4, 4])),
        (f32s(&[16]), f32s(&[16])),
        (f32s(&[4, 4]).to_dtype(DType::F64).unwrap(), f32s(&[4, 4])),
    ] {
        for (name, ours, theirs, _) in FUNCTIONS {
            assert!(theirs(&xs, &cos, &sin).is_err(), "{name}");
            let message = ours(&xs, &cos, &sin).unwrap_err().to_string();
            assert!(
                message.starts_with("cos ") || message.starts_with("sin "),
                "{message}"
            );
        }
    }
    let table = f32s(&[4, 4]);
    let rank = rotary_emb::rope(&f32s(&[2, 4, 8]), &table, &table).unwrap_err();
    assert!(
        rank.to_string()
            .contains("[batch, heads, tokens, head_dim]"),
        "{rank}"
    );
    let batched = rotary_emb::rope(&xs, &f32s(&[2, 4, 4]), &table).unwrap_err();
    assert!(
        batched.to_string().contains("as many dims as cos"),
        "{batched}"
    );
    let bytes = xs.to_dtype(DType::U8).unwrap();
    let error = rotary_emb::rope(&bytes, &table, &table).unwrap_err();
    assert!(error.to_string().contains("f32, f16 or bf16"), "{error}");
    // No tokens: nothing to do.
    let empty = xs.narrow(2, 0, 0).unwrap();
    assert_eq!(
        rotary_emb::rope(&empty, &table, &table).unwrap().dims(),
        [2, 4, 0, 8]
    );
}
