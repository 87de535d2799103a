//! What several tests share.
#![allow(dead_code)] // Each test uses a part of it.

use phasor_attention::phasor::Element;

/// Numbers that depend on a seed only (SplitMix64).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From -`most` to `most`.
    pub fn values(&mut self, len: usize, most: f32) -> Vec<f32> {
        (0..len)
            .map(|_| ((self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0) * most)
            .collect()
    }

    pub fn permutation(&mut self, len: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..len).collect();
        for at in (1..len).rev() {
            order.swap(at, self.bits() as usize % (at + 1));
        }
        order
    }
}

pub fn narrowed<T: Element>(values: &[f32]) -> Vec<T> {
    values.iter().map(|&x| T::narrow(x)).collect()
}

pub fn widened<T: Element>(values: &[T]) -> Vec<f32> {
    values.iter().map(|x| x.widen()).collect()
}

/// A file of `tests/goldens`: what another implementation computed.
pub struct Golden {
    bytes: Vec<u8>,
    pub case: serde_json::Value,
}

/// A type of the files' tensors.
pub trait Stock {
    const STORED: safetensors::Dtype;
    fn of(bytes: &[u8]) -> Self;
}

macro_rules! stock {
    ($($type:ty: $dtype:ident),*) => {$(
        impl Stock for $type {
            const STORED: safetensors::Dtype = safetensors::Dtype::$dtype;
            fn of(bytes: &[u8]) -> Self {
                Self::from_le_bytes(bytes.try_into().unwrap())
            }
        }
    )*};
}
stock!(f32: F32, phasor_attention::phasor::half::f16: F16, phasor_attention::phasor::half::bf16: BF16,
       i32: I32, u8: U8);

impl Golden {
    pub fn read(name: &str) -> Self {
        let path = format!(
            "{}/tests/goldens/{name}.safetensors",
            env!("CARGO_MANIFEST_DIR")
        );
        let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        let case = serde_json::from_str(&header.metadata().as_ref().unwrap()["case"]).unwrap();
        Self { bytes, case }
    }

    pub fn find<T: Stock>(&self, name: &str) -> Option<Vec<T>> {
        let file = safetensors::SafeTensors::deserialize(&self.bytes).unwrap();
        let tensor = file.tensor(name).ok()?;
        assert_eq!(tensor.dtype(), T::STORED, "{name}");
        Some(
            tensor
                .data()
                .chunks_exact(size_of::<T>())
                .map(T::of)
                .collect(),
        )
    }

    pub fn tensor<T: Stock>(&self, name: &str) -> Vec<T> {
        self.find(name).unwrap_or_else(|| panic!("no {name}"))
    }

    pub fn number(&self, key: &str) -> usize {
        self.case[key]
            .as_u64()
            .unwrap_or_else(|| panic!("no {key}")) as usize
    }
}

/// The same values, and the same signs of zeros.
pub fn same(got: &[f32], expected: &[f32]) {
    assert_eq!(got.len(), expected.len());
    for (at, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert_eq!(
            got.to_bits(),
            expected.to_bits(),
            "at {at}: {got} is not {expected}"
        );
    }
}

/// Within a part of the largest magnitude.
pub fn near(got: &[f32], expected: &[f32], bound: f32) {
    assert_eq!(got.len(), expected.len());
    let most = expected.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    for (at, (got, expected)) in got.iter().zip(expected).enumerate() {
        let error = (got - expected).abs() / most;
        assert!(
            error <= bound,
            "at {at}: {got} is not {expected}, of up to {most}"
        );
    }
}
