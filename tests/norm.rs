//! Norms of heads: against f64, against transformers' modules, and the order of sums to the last bit.

use std::collections::BTreeSet;
use std::path::Path;

use phasor::half::{bf16, f16};
use phasor::norm::HeadNorm;
use phasor::{Dtype, Element, Error};
use proptest::prelude::*;
use safetensors::SafeTensors;

/// A norm as data, to be applied in f64 too.
#[derive(Clone, Copy, Debug)]
struct Case {
    layer: bool,
    eps: f32,
    offset: f32,
    across: bool,
    round_before_weight: bool,
}

impl Case {
    fn norm(&self) -> HeadNorm {
        let mut norm = match self.layer {
            true => HeadNorm::layer(self.eps),
            false => HeadNorm::rms(self.eps),
        }
        .with_weight_offset(self.offset);
        if self.across {
            norm = norm.across_heads();
        }
        if self.round_before_weight {
            norm = norm.round_before_weight();
        }
        norm
    }

    /// The mean that is taken off, and what follows is multiplied by, in f64.
    fn statistic(&self, heads: &[f64]) -> (f64, f64) {
        let count = heads.len() as f64;
        let mean = match self.layer {
            true => heads.iter().sum::<f64>() / count,
            false => 0.0,
        };
        let variance = heads.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / count;
        (mean, 1.0 / (variance + f64::from(self.eps)).sqrt())
    }
}

fn wide<T: Element>(values: &[T]) -> Vec<f64> {
    values.iter().map(|x| x.widen().into()).collect()
}

/// The relative error of one rounding to a type, and the smallest step of it.
fn rounding(dtype: Dtype) -> (f64, f64) {
    match dtype {
        Dtype::F32 => (2f64.powi(-24), 2f64.powi(-149)),
        Dtype::F16 => (2f64.powi(-11), 2f64.powi(-25)),
        _ => (2f64.powi(-8), 2f64.powi(-133)),
    }
}

/// Compares with f64, within roundings to the type and 12 of f32 of the largest that was added up.
fn check<T: Element>(
    case: &Case,
    x: &[f32],
    head_dim: usize,
    weight: Option<&[f32]>,
    bias: Option<&[f32]>,
) -> Result<(), TestCaseError> {
    let narrow = |values: &[f32]| values.iter().map(|&x| T::narrow(x)).collect::<Vec<T>>();
    let (x, weight, bias) = (narrow(x), weight.map(narrow), bias.map(narrow));
    let mut got = x.clone();
    case.norm()
        .apply(&mut got, head_dim, weight.as_deref(), bias.as_deref())?;
    let (weight, bias) = (weight.as_deref().map(wide), bias.as_deref().map(wide));
    let (x, got) = (wide(&x), wide(&got));
    let one_or_all = |values: &Option<Vec<f64>>, at| values.as_ref().map(|v| v[at % v.len()]);
    let (relative, least) = rounding(T::DTYPE);
    let roundings = if case.round_before_weight { 2.0 } else { 1.0 };
    let (of_f32, _) = rounding(Dtype::F32);
    let part = if case.across { x.len() } else { head_dim };
    for (n, heads) in x.chunks(part).enumerate() {
        let (mean, r) = case.statistic(heads);
        let largest = heads.iter().fold(0f64, |most, x| most.max(x.abs()));
        // A mean has the error of what was added up, and leaves it to every difference.
        let of_mean = if case.layer {
            8.0 * of_f32 * largest * r
        } else {
            0.0
        };
        for (at, x) in (n * part..).zip(heads) {
            let g = one_or_all(&weight, at).map_or(1.0, |w| f64::from(case.offset) + w);
            let unbiased = (x - mean) * r * g;
            let expected = unbiased + one_or_all(&bias, at).unwrap_or(0.0);
            let sizes = unbiased.abs() + expected.abs();
            let tolerance = (roundings * relative + 12.0 * of_f32) * sizes
                + of_mean * g.abs()
                + least * (1.0 + g.abs());
            let error = (got[at] - expected).abs();
            prop_assert!(
                error <= tolerance,
                "{} of {}: {} {}",
                at,
                expected,
                got[at],
                tolerance
            );
        }
    }
    Ok(())
}

prop_compose! {
    fn cases()(
        layer in any::<bool>(),
        across in any::<bool>(),
        round_before_weight in any::<bool>(),
        eps in prop::sample::select(vec![1e-6f32, 1e-5, 0.25]),
        offset in prop::sample::select(vec![0.0f32, 1.0]),
    ) -> Case {
        Case { layer, eps, offset, across, round_before_weight }
    }
}

proptest! {
    #[test]
    fn norms_are_those_of_f64(
        case in cases(),
        heads in 1usize..6,
        half_dim in 1usize..130,
        per_head in any::<[bool; 2]>(),
        given in any::<[bool; 2]>(),
        seed in any::<u64>(),
    ) {
        let head_dim = 2 * half_dim;
        let mut state = seed | 1;
        let mut values = |len: usize| -> Vec<f32> {
            (0..len).map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                // Bits of any of the types.
                let x = (state >> 40) as f32 / (1 << 23) as f32 - 1.0;
                bf16::from_f32(x).to_f32()
            }).collect()
        };
        let x = values(heads * head_dim);
        let [weight, bias] = [0, 1].map(|n| {
            let len = if per_head[n] { heads * head_dim } else { head_dim };
            given[n].then(|| values(len))
        });
        let (weight, bias) = (weight.as_deref(), bias.as_deref());
        check::<f32>(&case, &x, head_dim, weight, bias)?;
        check::<f16>(&case, &x, head_dim, weight, bias)?;
        check::<bf16>(&case, &x, head_dim, weight, bias)?;
    }
}

/// The sum of squares, written out for 12 dims: 3 groups and a fourth of zeros, folded in halves.
#[test]
fn sums_have_their_order() {
    // Each of the two is lost where it is added to more than 2^24.
    let x: [f32; 12] = [
        4096.0, 1.0, 0.5, 1.0, 4097.0, 1.25, 3.0, 0.75, 5000.0, 1.5, 2.0, 1.0,
    ];
    let pair = |k: usize| x[2 * k + 1].mul_add(x[2 * k + 1], x[2 * k] * x[2 * k]);
    let group = |k: usize| pair(2 * k) + pair(2 * k + 1);
    let sum = (group(0) + group(2)) + (group(1) + 0.0);
    let r = 1.0 / (sum / 12.0 + 1e-6).sqrt();
    let mut got = x;
    HeadNorm::rms(1e-6).apply(&mut got, 12, None, None).unwrap();
    assert_eq!(got, x.map(|x| x * r));
    // Other orders give other bits here.
    let one_by_one: f32 = x.iter().map(|x| x * x).sum();
    assert_ne!(one_by_one, sum);

    // Across heads: three heads of 4, and then as groups are.
    let mut across = x;
    HeadNorm::rms(1e-6)
        .across_heads()
        .apply(&mut across, 4, None, None)
        .unwrap();
    assert_eq!(across, got);
    // Of a head of 6 dims the second group has but one pair.
    let mut six: [f32; 6] = x[..6].try_into().unwrap();
    HeadNorm::rms(0.0).apply(&mut six, 6, None, None).unwrap();
    let r = 1.0 / ((group(0) + (pair(2) + 0.0)) / 6.0f32).sqrt();
    assert_eq!(six, [0, 1, 2, 3, 4, 5].map(|i| x[i] * r));
}

#[test]
fn norms_are_those_of_transformers() {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/transformers-norms.safetensors");
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let names: BTreeSet<String> = (file.names().iter())
        .filter_map(|name| name.strip_suffix(".x").map(str::to_string))
        .collect();
    assert!(names.len() > 40);
    // Equal values and all of them, in 32 and in 16 bits.
    let mut counts = [[0; 2]; 2];
    for name in names {
        let bits = match name.split('.').nth(1).unwrap() {
            "float32" => golden::<f32>(&file, &name, |b| f32::from_le_bytes(b.try_into().unwrap())),
            "float16" => golden::<f16>(&file, &name, |b| f16::from_le_bytes(b.try_into().unwrap())),
            _ => golden::<bf16>(&file, &name, |b| bf16::from_le_bytes(b.try_into().unwrap())),
        };
        let of_bits = &mut counts[usize::from(!name.contains("float32"))];
        *of_bits = [of_bits[0] + bits[0], of_bits[1] + bits[1]];
    }
    let share = counts.map(|[equal, all]| equal as f64 / all as f64);
    assert!(share[0] >= 0.7 && share[1] >= 0.999, "{share:?}");
}

/// How many values are equal, of how many.
fn golden<T: Element>(file: &SafeTensors, name: &str, element: fn(&[u8]) -> T) -> [usize; 2] {
    let tensor = |part: &str| -> Option<Vec<T>> {
        let tensor = file.tensor(&format!("{name}.{part}")).ok()?;
        Some(
            tensor
                .data()
                .chunks_exact(size_of::<T>())
                .map(element)
                .collect(),
        )
    };
    let parts: Vec<&str> = name.split('.').collect();
    let [heads, head_dim] = [2, 3].map(|n| parts[n].parse::<usize>().unwrap());
    let norm = match parts[0] {
        "qwen3" => HeadNorm::rms(1e-6).round_before_weight(),
        "glm4_moe" => HeadNorm::rms(1e-5).round_before_weight(),
        "gemma3" => HeadNorm::rms(1e-6).with_weight_offset(1.0),
        "olmo2" => HeadNorm::rms(1e-6).across_heads(),
        "cohere" | "layer_beta" => HeadNorm::layer(1e-5),
        other => panic!("{other}"),
    };
    let layer = ["cohere", "layer_beta"].contains(&parts[0]);
    let (mut got, expected) = (tensor("x").unwrap(), tensor("y").unwrap());
    let (weight, bias) = (tensor("weight"), tensor("bias"));
    for token in got.chunks_mut(heads * head_dim) {
        norm.apply(token, head_dim, weight.as_deref(), bias.as_deref())
            .unwrap();
    }
    // Their sums have another order. What that moves in f32 is at times at the edge of a rounding to the
    // type: a step of it, or two where there are two roundings.
    let (relative, _) = rounding(T::DTYPE);
    let (mut equal, mut worst) = (0, 0f64);
    for (got, expected) in wide(&got).into_iter().zip(wide(&expected)) {
        equal += usize::from(got == expected);
        // Where a mean is taken off, what is left has the error of the whole.
        let scale = expected.abs().max(if layer { 1.0 } else { 1e-3 });
        worst = worst.max((got - expected).abs() / scale);
    }
    let most = if T::DTYPE == Dtype::F32 { 6.0 } else { 4.0 } * relative;
    assert!(worst <= most, "{name}: {worst:e}");
    [equal, got.len()]
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_written() {
    let norm = HeadNorm::rms(1e-6);
    let refused = |heads: usize, head_dim, weight: Option<usize>, bias: Option<usize>| {
        let mut x = vec![2.0f32; heads];
        let [weight, bias] = [weight, bias].map(|len| len.map(|len| vec![1.0f32; len]));
        let result = norm.apply(&mut x, head_dim, weight.as_deref(), bias.as_deref());
        let Err(Error::NormLength { what, .. }) = result else {
            panic!("{result:?}");
        };
        assert!(x.iter().all(|&x| x == 2.0));
        what
    };
    for (heads, head_dim) in [(8, 0), (8, 3), (9, 4), (0, 0)] {
        assert_eq!(refused(heads, head_dim, None, None), "the heads");
    }
    assert_eq!(refused(8, 4, Some(3), None), "the weight");
    assert_eq!(refused(8, 4, Some(0), None), "the weight");
    assert_eq!(refused(8, 4, Some(4), Some(12)), "the bias");
    let mut none: [f32; 0] = [];
    assert_eq!(norm.apply(&mut none, 4, Some(&[1.0; 4]), None), Ok(()));
    // A NaN stays in its head, as the canonical one; zeros stay zeros.
    let mut x = [f32::from_bits(0xffc0_0001), 1.0, 0.0, 0.0];
    norm.apply(&mut x, 2, None, None).unwrap();
    assert_eq!(x.map(f32::to_bits), [0x7fff_ffff, 0x7fff_ffff, 0, 0]);
}
