//! Quantised weights: values against the package gguf and torch (`tests/goldens`), products against sums
//! in f64, and what is refused.

use phasor_attention::phasor::Dtype;
use phasor_attention::phasor::half::{bf16, f16};
use phasor_attention::{
    AttentionError, DenseWeights, Fp8Activation, Fp8Linear, Fp8WeightScale, Fp8Weights, GgmlLinear,
    GgmlType, GgmlWeights, GptqFormat, GptqTensors, GptqWeights, Linear, Projection,
    StackedWeights, Weights, WindowOfWeights, check_finite,
};

mod support;
use support::{Golden, Random, narrowed, near, same, widened};

/// All values, read in uneven parts.
fn all(weights: &dyn Weights) -> Vec<f32> {
    let (rows, columns) = (weights.out_features(), weights.in_features());
    let mut values = vec![f32::NAN; rows * columns];
    let first = rows / 3;
    let (head, rest) = values.split_at_mut(first * columns);
    weights.read(0..first, head);
    weights.read(first..rows, rest);
    values
}

fn product(weights: &[f32], columns: usize, x: &[f32]) -> Vec<f32> {
    let mut out = Vec::new();
    for x in x.chunks(columns) {
        for row in weights.chunks(columns) {
            let sum: f64 = row
                .iter()
                .zip(x)
                .map(|(w, x)| f64::from(*w) * f64::from(*x))
                .sum();
            out.push(sum as f32);
        }
    }
    out
}

#[test]
fn gguf_blocks_have_the_values_of_gguf() {
    for ggml_type in GgmlType::ALL {
        let golden = Golden::read(&format!("gguf/{}", ggml_type.name()));
        let (blocks, expected) = (
            golden.tensor::<u8>("blocks"),
            golden.tensor::<f32>("values"),
        );
        let mut values = vec![0.0; expected.len()];
        ggml_type.dequantize(&blocks, &mut values).unwrap();
        same(&values, &expected);
        // As a matrix, and as part of a stack with another form.
        let rows = expected.len() / 256;
        let weights = GgmlWeights::new(ggml_type, blocks, rows, 256).unwrap();
        same(&all(&weights), &expected);
        let ones = Fp8Weights::new(vec![0x38; 3 * 256], Fp8WeightScale::Tensor(0.5), 3, 256);
        let parts: Vec<Box<dyn Weights>> = vec![Box::new(weights), Box::new(ones.unwrap())];
        let stacked = StackedWeights::new(parts).unwrap();
        same(&all(&stacked), &[expected, vec![0.5; 3 * 256]].concat());
    }
}

fn gptq_of(golden: &Golden) -> (GptqTensors, GptqFormat, Option<usize>, usize, usize) {
    let tensors = GptqTensors {
        qweight: golden.tensor("qweight"),
        scales: golden.tensor("scales"),
        qzeros: golden.tensor("qzeros"),
        g_idx: golden.find("g_idx").unwrap_or_default(),
    };
    let format = match golden.case["v2"].as_bool().unwrap() {
        true => GptqFormat::V2,
        false => GptqFormat::V1,
    };
    let group_size = Some(golden.number("group_size"));
    (
        tensors,
        format,
        group_size,
        golden.number("out_features"),
        golden.number("in_features"),
    )
}

#[test]
fn gptq_matrices_have_the_values_of_torch() {
    for name in ["symmetric", "zeros", "act_order", "v2_uneven"] {
        let golden = Golden::read(&format!("torch/gptq_{name}"));
        assert_eq!(golden.find::<i32>("g_idx").is_some(), name == "act_order");
        let (tensors, format, group_size, rows, columns) = gptq_of(&golden);
        let weights = GptqWeights::new(tensors, format, group_size, rows, columns).unwrap();
        same(&all(&weights), &golden.tensor::<f32>("values"));
    }
}

#[test]
fn gptq_tensors_that_do_not_fit_are_refused() {
    let golden = Golden::read("torch/gptq_act_order");
    let with = |change: &dyn Fn(&mut GptqTensors), group_size, rows, columns| {
        let (mut tensors, format, ..) = gptq_of(&golden);
        change(&mut tensors);
        GptqWeights::new(tensors, format, group_size, rows, columns).map(|_| ())
    };
    use AttentionError::*;
    assert_eq!(with(&|_| {}, Some(32), 24, 64), Ok(()));
    let refused = |change: &dyn Fn(&mut GptqTensors)| with(change, Some(32), 24, 64).unwrap_err();
    assert!(matches!(
        refused(&|t| t.qweight.truncate(5)),
        Mismatch { got: 5, .. }
    ));
    assert!(matches!(
        refused(&|t| t.scales.truncate(5)),
        Mismatch { got: 5, .. }
    ));
    assert!(matches!(
        refused(&|t| t.qzeros.truncate(5)),
        Mismatch { got: 5, .. }
    ));
    assert!(matches!(
        refused(&|t| t.g_idx.truncate(5)),
        Mismatch { got: 5, .. }
    ));
    assert!(matches!(
        refused(&|t| t.g_idx[3] = 2),
        Weights { what: "g_idx", .. }
    ));
    assert!(matches!(
        refused(&|t| t.g_idx[3] = -1),
        Weights { what: "g_idx", .. }
    ));
    assert!(matches!(with(&|_| {}, Some(0), 24, 64), Err(Value { .. })));
    assert!(matches!(with(&|_| {}, None, 24, 64), Err(Mismatch { .. })));
    assert!(matches!(
        with(&|_| {}, Some(32), 20, 64),
        Err(Value { value: 20, .. })
    ));
    assert!(matches!(
        with(&|_| {}, Some(32), 24, 0),
        Err(Value { value: 0, .. })
    ));
}

#[test]
fn float8_projections_are_those_of_torch() {
    for name in ["static", "per_token", "blocks"] {
        let golden = Golden::read(&format!("torch/fp8_{name}"));
        let (rows, columns) = (golden.number("out_features"), golden.number("in_features"));
        let scales = golden.tensor::<f32>("weight_scales");
        let (activation, scale) = match name {
            "static" => {
                let scale = golden.case["scale"].as_f64().unwrap() as f32;
                (
                    Fp8Activation::Static(scale),
                    Fp8WeightScale::Tensor(scales[0]),
                )
            }
            "per_token" => (
                Fp8Activation::PerToken {
                    most_amax: 1200.0,
                    scale_dtype: Dtype::Bf16,
                },
                Fp8WeightScale::Rows(scales),
            ),
            _ => {
                let block = [0, 1].map(|at| golden.case["block"][at].as_u64().unwrap() as usize);
                (
                    Fp8Activation::Blocks(block[1]),
                    Fp8WeightScale::Blocks { scales, block },
                )
            }
        };
        let weights = Fp8Weights::new(golden.tensor("codes"), scale.clone(), rows, columns);
        let weights = weights.unwrap();
        same(&all(&weights), &golden.tensor::<f32>("weights"));
        let x = golden.tensor::<f32>("x");
        let mut out = vec![0.0; 3 * rows];
        Fp8Linear::new(weights, activation)
            .unwrap()
            .forward(&x, &mut out)
            .unwrap();
        near(&out, &golden.tensor::<f32>("y"), 1e-6);
        // What activations have become shows through an identity.
        let mut codes = vec![0; columns * columns];
        codes
            .iter_mut()
            .step_by(columns + 1)
            .for_each(|code| *code = 0x38);
        let scale = match scale {
            Fp8WeightScale::Tensor(_) => Fp8WeightScale::Tensor(1.0),
            Fp8WeightScale::Rows(_) => Fp8WeightScale::Rows(vec![1.0; columns]),
            Fp8WeightScale::Blocks { block, .. } => {
                let blocks = columns.div_ceil(block[0]) * columns.div_ceil(block[1]);
                Fp8WeightScale::Blocks {
                    scales: vec![1.0; blocks],
                    block,
                }
            }
        };
        let identity = Fp8Weights::new(codes, scale, columns, columns).unwrap();
        let mut back = vec![0.0; 3 * columns];
        Fp8Linear::new(identity, activation)
            .unwrap()
            .forward(&x, &mut back)
            .unwrap();
        assert_eq!(back, golden.tensor::<f32>("x_back"), "{name}");
    }
}

#[test]
fn other_float8_combinations_are_refused() {
    let weights = |scale| Fp8Weights::new(vec![0u8; 6], scale, 2, 3);
    let blocks = |scales: usize, block| {
        weights(Fp8WeightScale::Blocks {
            scales: vec![1.0; scales],
            block,
        })
    };
    assert!(weights(Fp8WeightScale::Rows(vec![1.0; 3])).is_err());
    assert!(blocks(1, [2, 2]).is_err());
    assert!(blocks(2, [2, 0]).is_err());
    assert!(Fp8Weights::new(vec![0u8; 5], Fp8WeightScale::Tensor(1.0), 2, 3).is_err());
    let per_token = Fp8Activation::PerToken {
        most_amax: f32::INFINITY,
        scale_dtype: Dtype::F32,
    };
    for (scale, activation, good) in [
        (
            Fp8WeightScale::Tensor(1.0),
            Fp8Activation::Static(1.0),
            true,
        ),
        (
            Fp8WeightScale::Tensor(1.0),
            Fp8Activation::Static(0.0),
            false,
        ),
        (Fp8WeightScale::Tensor(1.0), per_token, true),
        (Fp8WeightScale::Tensor(1.0), Fp8Activation::Blocks(3), false),
        (Fp8WeightScale::Rows(vec![1.0; 2]), per_token, true),
        (
            Fp8WeightScale::Rows(vec![1.0; 2]),
            Fp8Activation::Static(1.0),
            false,
        ),
    ] {
        assert_eq!(
            Fp8Linear::new(weights(scale).unwrap(), activation).is_ok(),
            good
        );
    }
    let of_blocks = || blocks(2, [2, 2]).unwrap();
    assert!(Fp8Linear::new(of_blocks(), Fp8Activation::Blocks(2)).is_ok());
    assert!(Fp8Linear::new(of_blocks(), Fp8Activation::Blocks(1)).is_err());
    assert!(Fp8Linear::new(of_blocks(), per_token).is_err());
}

/// More rows than a panel, and every size of panel.
#[test]
fn products_are_those_of_the_values() {
    let mut random = Random::new(8);
    let (rows, columns) = (700, 256);
    let scale = f16::from_f32(0.01).to_le_bytes();
    let mut blocks: Vec<u8> = (0..rows * columns / 32 * 18)
        .map(|_| random.bits() as u8)
        .collect();
    blocks
        .chunks_mut(18)
        .for_each(|block| block[..2].copy_from_slice(&scale));
    let weights = GgmlWeights::new(GgmlType::Q4_0, blocks, rows, columns).unwrap();
    let values = all(&weights);
    let linear = Linear(weights);
    for tokens in [0, 1, 2, 16, 17, 130] {
        let x = widened(&narrowed::<bf16>(&random.values(tokens * columns, 1.0)));
        let expected = product(&values, columns, &x);
        let mut out = vec![0.0f32; tokens * rows];
        linear.forward(&x, &mut out).unwrap();
        near(&out, &expected, 1e-6);
        let mut out = vec![bf16::ZERO; tokens * rows];
        linear.forward(&narrowed::<bf16>(&x), &mut out).unwrap();
        near(&widened(&out), &expected, 4e-3);
    }
    let mut out = vec![-7.5f32; rows];
    for (x, y) in [
        (columns - 1, rows),
        (columns, rows - 1),
        (2 * columns, rows),
    ] {
        assert!(linear.forward(&vec![0.0; x], &mut out[..y]).is_err());
    }
    assert!(out.iter().all(|&x| x == -7.5));
}

/// What a product in integers makes of activations, in f64.
fn rounded(x: &[f32], block: usize) -> Vec<f64> {
    let of_block = |block: &[f32]| {
        let amax = block.iter().fold(0.0f32, |amax, x| amax.max(x.abs()));
        let (scale, up) = (amax / 127.0, 127.0 / amax);
        let round = move |&x: &f32| match amax {
            0.0 => 0.0,
            _ => f64::from((x * up).round_ties_even()) * f64::from(scale),
        };
        block.iter().map(round).collect::<Vec<_>>()
    };
    x.chunks(block).flat_map(of_block).collect()
}

#[test]
fn products_in_integers_are_those_of_rounded_activations() {
    let mut random = Random::new(12);
    for ggml_type in GgmlType::ALL {
        let golden = Golden::read(&format!("gguf/{}", ggml_type.name()));
        let (blocks, values) = (
            golden.tensor::<u8>("blocks"),
            golden.tensor::<f32>("values"),
        );
        // Rows of two of the larger blocks, and enough rows for several threads.
        let (columns, rows) = (512, 70);
        let of_file = values.len() / columns;
        let bytes = blocks.len() / of_file;
        let repeat = |at: usize| at % of_file;
        let blocks: Vec<u8> = (0..rows)
            .flat_map(|at| blocks[repeat(at) * bytes..][..bytes].to_vec())
            .collect();
        let weights = GgmlWeights::new(ggml_type, blocks, rows, columns).unwrap();
        let linear = GgmlLinear(weights.clone());
        let tokens = 5;
        let mut x = random.values(tokens * columns, 1.0);
        x[..256].fill(0.0);
        let mut got = vec![0.0f32; tokens * rows];
        linear.forward(&x, &mut got).unwrap();
        let (block, _) = ggml_type.block();
        let x_rounded = rounded(&x, block);
        let mut expected = Vec::new();
        for x in x_rounded.chunks(columns) {
            for row in 0..rows {
                let weights = &values[repeat(row) * columns..][..columns];
                let terms = weights.iter().zip(x).map(|(&w, x)| f64::from(w) * x);
                expected.push(terms.sum::<f64>() as f32);
            }
        }
        near(&got, &expected, 2e-6);
        // The product with activations as they are is near, and not the same.
        let mut exact = vec![0.0f32; tokens * rows];
        Linear(weights).forward(&x, &mut exact).unwrap();
        near(&got, &exact, 1e-2);
        assert!(
            got.iter()
                .zip(&exact)
                .any(|(a, b)| (a - b).abs() > 1e-5 * a.abs())
        );
        // Token by token: the same bits.
        for (x, got) in x.chunks(columns).zip(got.chunks(rows)) {
            let mut alone = vec![0.0f32; rows];
            linear.forward(x, &mut alone).unwrap();
            same(&alone, got);
        }
        // What is no number shows, in its token.
        for bad in [f32::NAN, f32::INFINITY] {
            x[columns + 3] = bad;
            let mut out = vec![0.0f32; tokens * rows];
            linear.forward(&x, &mut out).unwrap();
            for (token, (out, got)) in out.chunks(rows).zip(got.chunks(rows)).enumerate() {
                assert!(out.iter().all(|x| x.is_nan()) == (token == 1));
                assert!(token == 1 || out == got);
            }
        }
        let mut out = vec![-7.5f32; rows];
        assert!(linear.forward(&x[1..columns], &mut out).is_err());
        assert!(linear.forward(&x[..columns], &mut out[1..]).is_err());
        assert!(out.iter().all(|&x| x == -7.5));
    }
}

/// Sums of few tokens have the order that the documentation says: the same bits, whatever the weights are
/// kept as, for one token as for several.
#[test]
fn products_of_few_tokens_have_one_order_of_sums() {
    let mut random = Random::new(13);
    for columns in [40, 64, 200] {
        let rows = 75;
        let weights = narrowed::<bf16>(&random.values(rows * columns, 1.0));
        let x = random.values(8 * columns, 1.0);
        let mut expected = Vec::new();
        for x in x.chunks(columns) {
            for row in weights.chunks(columns) {
                let mut sums = [0.0f32; 64];
                for (i, (w, x)) in row.iter().zip(x).enumerate() {
                    sums[i % 64] = w.to_f32().mul_add(*x, sums[i % 64]);
                }
                let mut half = 32;
                while half > 0 {
                    (0..half).for_each(|i| sums[i] += sums[i + half]);
                    half /= 2;
                }
                expected.push(sums[0]);
            }
        }
        let wide = widened(&weights);
        let half: Vec<f16> = narrowed(&wide);
        let dense: [Box<dyn Projection<f32>>; 4] = [
            Box::new(Linear(DenseWeights::new(weights, rows, columns).unwrap())),
            Box::new(Linear(
                DenseWeights::new(wide.clone(), rows, columns).unwrap(),
            )),
            // Not as they lie in memory.
            Box::new(Linear(
                DenseWeights::new(wide.clone(), rows, columns)
                    .unwrap()
                    .clip(2.0)
                    .unwrap(),
            )),
            Box::new(Linear(
                WindowOfWeights::new(
                    DenseWeights::new([wide.clone(), wide].concat(), 2 * rows, columns).unwrap(),
                    rows..2 * rows,
                    0..columns,
                )
                .unwrap(),
            )),
        ];
        let of_f16 = DenseWeights::new(half.clone(), rows, columns).unwrap();
        same(&all(&of_f16), &widened(&half));
        for linear in dense {
            for tokens in [1, 2, 3, 8] {
                let mut out = vec![0.0; tokens * rows];
                linear.forward(&x[..tokens * columns], &mut out).unwrap();
                same(&out, &expected[..tokens * rows]);
            }
        }
    }
}

/// Rows and tokens that fill what is multiplied at a time, and such that do not.
#[test]
fn products_of_bf16_are_those_of_the_values() {
    let mut random = Random::new(14);
    for (rows, columns) in [(97, 40), (205, 1100), (5, 2), (13, 33)] {
        let weights = narrowed::<bf16>(&random.values(rows * columns, 1.0));
        let linear = Linear(DenseWeights::new(weights.clone(), rows, columns).unwrap());
        for tokens in [9, 16, 17, 40, 64, 130] {
            let x = narrowed::<bf16>(&random.values(tokens * columns, 1.0));
            let expected = product(&widened(&weights), columns, &widened(&x));
            let mut out = vec![bf16::NAN; tokens * rows];
            linear.forward(&x, &mut out).unwrap();
            // Each is rounded to bf16 once, of 8 bits.
            for (got, expected) in widened(&out).iter().zip(&expected) {
                let slack = 1e-5 * (columns as f32).sqrt();
                let error = (got - expected).abs();
                assert!(
                    error <= expected.abs() / 256.0 + slack,
                    "{got} is not {expected}"
                );
            }
        }
    }
}

#[test]
fn weights_that_are_no_numbers_are_found() {
    let mut values = vec![1.0f32; 6 * 40];
    let check = |values: &[f32]| {
        let weights = DenseWeights::<f32>::new(values.to_vec(), 6, 40).unwrap();
        check_finite(&weights)
    };
    assert_eq!(check(&values), Ok(()));
    for bad in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
        values[4 * 40 + 7] = bad;
        assert!(matches!(
            check(&values),
            Err(AttentionError::NotFinite { row: 4, column: 7, value }) if value.to_bits() == bad.to_bits()
        ));
    }
    // A scale that is none.
    let mut blocks = vec![0x55u8; 2 * 34];
    blocks[34..36].copy_from_slice(&f16::NAN.to_le_bytes());
    let weights = GgmlWeights::new(GgmlType::Q8_0, blocks, 2, 32).unwrap();
    assert!(matches!(
        check_finite(&weights),
        Err(AttentionError::NotFinite {
            row: 1,
            column: 0,
            ..
        })
    ));
}

#[test]
fn gguf_tensors_that_do_not_fit_are_refused() {
    let new = |bytes: usize, rows, columns| {
        GgmlWeights::new(GgmlType::Q4_K, vec![0; bytes], rows, columns).map(|_| ())
    };
    assert_eq!(new(288, 1, 512), Ok(()));
    assert!(new(287, 1, 512).is_err());
    assert!(new(288, 2, 512).is_err());
    assert!(new(144, 1, 255).is_err());
    assert!(new(0, 0, 256).is_err());
    let mut values = [0.0; 32];
    assert!(GgmlType::Q8_0.dequantize(&[0; 34], &mut values).is_ok());
    assert!(GgmlType::Q8_0.dequantize(&[0; 33], &mut values).is_err());
    assert!(
        GgmlType::Q8_0
            .dequantize(&[0; 34], &mut values[1..])
            .is_err()
    );
    let other = StackedWeights::new(vec![
        GgmlWeights::new(GgmlType::Q8_0, vec![0; 34], 1, 32).unwrap(),
        GgmlWeights::new(GgmlType::Q8_0, vec![0; 68], 1, 64).unwrap(),
    ]);
    assert!(other.is_err());
    assert!(StackedWeights::<GgmlWeights>::new(vec![]).is_err());
}
