//! 8-bit codes and their scales: against a model in f64 over all of f32, against torch, and what of NaN,
//! infinities and empty or uneven input.

use std::path::Path;

use phasor::half::{bf16, f16};
use phasor::quantize::{
    Codes, Quantization, Scale, ScaleForm, ScaleRounding, e4m3_from_f32, e4m3_to_f32,
    e8m0_from_scale, e8m0_to_scale,
};
use phasor::{Element, Error};
use proptest::prelude::*;
use safetensors::SafeTensors;

/// e4m3 by its definition: the multiple of the step of the value's binade that is nearest.
fn model(x: f32) -> u8 {
    if x.is_nan() {
        return 0x7f;
    }
    let sign = if x.is_sign_negative() { 0x80 } else { 0 };
    let magnitude = f64::from(x.abs());
    if magnitude >= 448.0 {
        return sign | 0x7e;
    }
    let binade = ((magnitude.to_bits() >> 52) as i64 - 1023).max(-6);
    let step = f64::from_bits(((binade - 3 + 1023) as u64) << 52);
    // Codes of a binade follow those of the one below.
    let nearest = (magnitude / step).round_ties_even() as i64;
    let code = (binade + 6) * 8 + nearest;
    sign | code.min(0x7e) as u8
}

/// Every f32 in release; in debug one in 4,099.
#[test]
fn the_cast_is_the_nearest_value_for_every_f32() {
    let step = if cfg!(debug_assertions) { 4099 } else { 1 };
    std::thread::scope(|scope| {
        for part in 0..8u32 {
            scope.spawn(move || {
                let (first, last) = (part << 29, (part << 29) + ((1 << 29) - 1));
                for bits in (first..=last).step_by(step) {
                    let x = f32::from_bits(bits);
                    let (got, expected) = (e4m3_from_f32(x), model(x));
                    assert!(
                        got == expected,
                        "{x:e} ({bits:#x}): {got:#x}, not {expected:#x}"
                    );
                }
            });
        }
    });
}

/// Whether `cvt.rn.satfinite.e4m3x2.f32`, as the interpreter of PTX has it, gives the code of the cast. Of a
/// NaN the PTX ISA does not say which one it becomes. Kernels bring the one that arithmetic makes.
#[track_caller]
fn check_the_instruction(bits: u32) {
    const CANONICAL_NAN: u32 = 0x7fff_ffff;
    let x = f32::from_bits(bits);
    let (cast, instruction) = (e4m3_from_f32(x), ptx_interpreter::e4m3(x));
    let agree = match x.is_nan() && bits != CANONICAL_NAN {
        true => cast == 0x7f && instruction & 0x7f == 0x7f,
        false => cast == instruction,
    };
    assert!(
        agree,
        "{x:e} ({bits:#x}): {cast:#x}, the instruction gives {instruction:#x}"
    );
}

/// Every change of the code, what is next to it, and one in 4,099 of all.
#[test]
fn the_instruction_gives_the_codes_of_the_cast() {
    let ends = [0, f32::INFINITY.to_bits(), 0x7fff_ffff];
    let codes = (0..0x7f).flat_map(|code| {
        let value = e4m3_to_f32(code);
        // Past the largest code too, where 480 would be.
        let next = if code < 0x7e {
            e4m3_to_f32(code + 1)
        } else {
            480.0
        };
        [value, (value + next) / 2.0, next].map(f32::to_bits)
    });
    for at in ends.into_iter().chain(codes) {
        for bits in at.saturating_sub(2)..=(at + 2).min(0x7fff_ffff) {
            check_the_instruction(bits);
            check_the_instruction(bits | 1 << 31);
        }
    }
    (0..=u32::MAX).step_by(4099).for_each(check_the_instruction);
}

#[test]
#[ignore = "takes a minute; the one above has every change of the code"]
fn the_instruction_gives_the_codes_of_the_cast_for_every_f32() {
    std::thread::scope(|scope| {
        for part in 0..8u32 {
            scope.spawn(move || {
                let first = part << 29;
                (first..=first + ((1 << 29) - 1)).for_each(check_the_instruction);
            });
        }
    });
}

#[test]
fn codes_come_back() {
    for code in 0..=255u8 {
        let value = e4m3_to_f32(code);
        match code & 0x7f {
            0x7f => assert_eq!(value.to_bits(), 0x7fff_ffff),
            _ => assert_eq!(e4m3_from_f32(value), code),
        }
        let scale = e8m0_to_scale(code);
        match code {
            255 => assert!(scale.is_nan()),
            _ => assert_eq!(scale, 2f64.powi(i32::from(code) - 127) as f32),
        }
        let back = Some(code).filter(|&code| code != 255);
        assert_eq!(e8m0_from_scale(scale), back);
    }
    for none in [0.0, -1.0, 3.0, f32::INFINITY, f32::from_bits(1), -0.0] {
        assert_eq!(e8m0_from_scale(none), None, "{none:e}");
    }
}

struct Goldens(Vec<u8>);

impl Goldens {
    fn read() -> Self {
        let path =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/torch/casts.safetensors");
        Self(std::fs::read(path).unwrap())
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        file.tensor(name).unwrap().data().to_vec()
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        let bytes = self.bytes(name);
        let words = bytes.chunks_exact(4);
        words
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect()
    }
}

#[test]
fn casts_are_those_of_torch() {
    let goldens = Goldens::read();
    // torch keeps the sign of a NaN; ours has none.
    let canonical = |code: u8| if code & 0x7f == 0x7f { 0x7f } else { code };
    let expect = |name: &str, values: &mut dyn Iterator<Item = f32>| {
        let expected = goldens.bytes(name);
        let got: Vec<u8> = values.map(e4m3_from_f32).collect();
        assert_eq!(got.len(), expected.len());
        for (n, (&got, expected)) in got.iter().zip(expected).enumerate() {
            assert_eq!(got, canonical(expected), "{name} {n}");
        }
    };
    expect("x_e4m3", &mut goldens.floats("x").into_iter());
    expect(
        "bf16_e4m3",
        &mut (0..=u16::MAX).map(|bits| bf16::from_bits(bits).widen()),
    );
    expect(
        "f16_e4m3",
        &mut (0..=u16::MAX).map(|bits| f16::from_bits(bits).widen()),
    );
    let values = goldens.floats("e4m3_values");
    for (code, expected) in (0..=255u8).zip(values) {
        let got = e4m3_to_f32(code);
        assert!(got == expected || got.is_nan() && expected.is_nan());
    }
}

#[test]
fn dynamic_scales_are_those_of_vllm_deepseek_and_ocp() {
    let goldens = Goldens::read();
    let values: Vec<bf16> = (goldens.bytes("groups").chunks_exact(2))
        .map(|b| bf16::from_le_bytes(b.try_into().unwrap()))
        .collect();
    let dynamic = |floor, form, rounding| Scale::Dynamic {
        floor,
        form,
        rounding,
    };
    use ScaleForm::{Divide, Multiply};
    for (name, codes, scale) in [
        (
            "e4m3_multiply",
            Codes::E4m3,
            dynamic(1e-6, Multiply, ScaleRounding::None),
        ),
        (
            "int8_multiply",
            Codes::Int8,
            dynamic(1e-6, Multiply, ScaleRounding::None),
        ),
        (
            "e4m3_divide",
            Codes::E4m3,
            Scale::dynamic(f32::MIN_POSITIVE),
        ),
        (
            "up",
            Codes::E4m3,
            dynamic(1e-4 / 448.0, Divide, ScaleRounding::PowerOfTwoUp),
        ),
        (
            "down",
            Codes::E4m3,
            dynamic(0.0, Divide, ScaleRounding::PowerOfTwoDown),
        ),
    ] {
        let quantization = Quantization::new(codes, scale);
        let (expected, scales) = (
            goldens.bytes(name),
            goldens.floats(&format!("{name}_scale")),
        );
        for (n, group) in values.chunks_exact(128).enumerate() {
            let mut codes = [0; 128];
            let scale = quantization.quantize(group, &mut codes).unwrap();
            assert_eq!(scale.to_bits(), scales[n].to_bits(), "{name}, group {n}");
            assert_eq!(codes, expected[n * 128..][..128], "{name}, group {n}");
        }
    }
}

#[test]
fn what_is_not_a_number_has_a_code() {
    let infinity = f32::INFINITY;
    let group = [
        f32::NAN,
        -f32::NAN,
        infinity,
        -infinity,
        1.0,
        -2.0,
        0.0,
        -0.0,
    ];
    let quantize = |codes, scale| {
        let mut got = [0; 8];
        let scale = Quantization::new(codes, scale)
            .quantize(&group, &mut got)
            .unwrap();
        (scale, got)
    };
    // Neither NaN nor an infinity makes the scale, and 448 stands for -2.
    let expected = [0x7f, 0x7f, 0x7e, 0xfe, 0x76, 0xfe, 0, 0x80];
    assert_eq!(
        quantize(Codes::E4m3, Scale::dynamic(1e-6)),
        (2.0 / 448.0, expected)
    );
    let int = |x: i8| x as u8;
    let expected = [0, 0, 127, int(-127), 64, int(-127), 0, 0];
    assert_eq!(
        quantize(Codes::Int8, Scale::dynamic(1e-6)),
        (2.0 / 127.0, expected)
    );
    let expected = [0, 0, 127, int(-128), 64, int(-127), 0, 0];
    assert_eq!(quantize(Codes::Int8Full, Scale::dynamic(1e-6)).1, expected);
    // Given scales.
    let expected = [
        0x7f,
        0x7f,
        0x7e,
        0xfe,
        e4m3_from_f32(4.0),
        e4m3_from_f32(-8.0),
        0,
        0x80,
    ];
    assert_eq!(quantize(Codes::E4m3, Scale::fixed(0.25)), (0.25, expected));
    assert_eq!(quantize(Codes::E4m3, Scale::inverse(4.0)), (4.0, expected));
    // Zeros have a code whatever the floor, and a floor holds.
    for floor in [0.0, -1.0, f32::NAN, 1e-6, f32::MIN_POSITIVE] {
        for form in [ScaleForm::Divide, ScaleForm::Multiply] {
            for (rounding, least) in [
                (ScaleRounding::None, f32::MIN_POSITIVE),
                (ScaleRounding::PowerOfTwoUp, e8m0_to_scale(0)),
                (ScaleRounding::PowerOfTwoDown, e8m0_to_scale(0)),
            ] {
                let scale = Scale::Dynamic {
                    floor,
                    form,
                    rounding,
                };
                let mut codes = [1; 2];
                let zeros = [0.0f32, f32::NAN];
                let quantization = Quantization::new(Codes::Int8, scale);
                let scale = quantization.quantize(&zeros, &mut codes).unwrap();
                assert_eq!(codes, [0, 0]);
                assert!(scale >= least && scale < 2e-6, "{scale:e}");
                if floor == 1e-6 && rounding == ScaleRounding::None {
                    assert_eq!(scale, 1e-6);
                }
            }
        }
    }
    // The largest of all f32 has a scale of E8M0.
    let most = [f32::MAX];
    for rounding in [ScaleRounding::PowerOfTwoUp, ScaleRounding::PowerOfTwoDown] {
        let scale = Scale::Dynamic {
            floor: f32::MAX,
            form: ScaleForm::Divide,
            rounding,
        };
        let scale = Quantization::new(Codes::E4m3, scale)
            .quantize(&most, &mut [0])
            .unwrap();
        assert_eq!(e8m0_from_scale(scale), Some(254));
    }
}

#[test]
fn as_many_codes_as_values() {
    let quantization = Quantization::new(Codes::E4m3, Scale::dynamic(1e-6));
    let refused = Err(Error::CodesLength {
        expected: 3,
        got: 2,
    });
    assert_eq!(quantization.quantize(&[1.0f32; 3], &mut [0; 2]), refused);
    let refused = Err(Error::CodesLength {
        expected: 2,
        got: 3,
    });
    assert_eq!(
        quantization.dequantize(&[0; 3], 1.0, &mut [f16::ONE; 2]),
        refused
    );
    assert_eq!(quantization.quantize::<f32>(&[], &mut []), Ok(1e-6));
    let text = Error::CodesLength {
        expected: 2,
        got: 3,
    }
    .to_string();
    assert!(
        text.contains("3 codes") && text.contains("2 values"),
        "{text}"
    );
}

fn any_codes() -> impl Strategy<Value = (Codes, f32)> {
    // With the error of half a step at the largest magnitude.
    prop::sample::select(vec![
        (Codes::E4m3, 16.0 / 448.0),
        (Codes::Int8, 0.5 / 127.0),
        (Codes::Int8Full, 0.5 / 127.0),
    ])
}

proptest! {
    /// Values come back as near as the codes lie.
    #[test]
    fn values_come_back(
        (codes, step) in any_codes(),
        form in prop::sample::select(vec![ScaleForm::Divide, ScaleForm::Multiply]),
        rounding in prop::sample::select(vec![ScaleRounding::None, ScaleRounding::PowerOfTwoUp]),
        log in -20i32..20,
        values in prop::collection::vec(-1.0f32..1.0, 1..200),
    ) {
        let values: Vec<f32> = values.iter().map(|x| x * 2f32.powi(log)).collect();
        let amax = values.iter().fold(0f32, |amax, x| amax.max(x.abs()));
        let quantization = Quantization::new(codes, Scale::Dynamic { floor: 1e-30, form, rounding });
        let mut bytes = vec![0; values.len()];
        let scale = quantization.quantize(&values, &mut bytes)?;
        if rounding == ScaleRounding::PowerOfTwoUp {
            prop_assert!(e8m0_from_scale(scale).is_some());
        }
        let mut back = vec![0f32; values.len()];
        quantization.dequantize(&bytes, scale, &mut back)?;
        let coarser = if rounding == ScaleRounding::None { 1.001 } else { 2.0 };
        for (x, y) in values.iter().zip(&back) {
            prop_assert!((x - y).abs() <= coarser * step * amax, "{} {} {}", x, y, amax);
        }
        // The same with a scale that is given, either way.
        for given in [Scale::fixed(scale), Scale::inverse(1.0 / scale)] {
            let quantization = Quantization::new(codes, given);
            let given = quantization.quantize(&values, &mut bytes)?;
            quantization.dequantize(&bytes, given, &mut back)?;
            for (x, y) in values.iter().zip(&back) {
                prop_assert!((x - y).abs() <= coarser * step * amax, "{} {} {}", x, y, amax);
            }
        }
    }
}
