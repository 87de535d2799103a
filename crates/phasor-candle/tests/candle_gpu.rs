//! Tensors of a CUDA device: the same bits as on the CPU. Skipped where there is no device, unless
//! `PHASOR_REQUIRE_GPU=1` is set.

use candle_core::{DType, Device, Tensor, Var};
use phasor::{Frequencies, Pairing, Rope};
use phasor_candle::{
    CacheOrder, DimOrder, Error, KvCache, Positions, RotaryEmbedding, Slots, Stored, rotary_emb,
};

const CPU: Device = Device::Cpu;

fn device() -> Option<Device> {
    match Device::new_cuda(0) {
        Ok(device) => Some(device),
        Err(error) => {
            let required = std::env::var_os("PHASOR_REQUIRE_GPU").is_some_and(|set| set == "1");
            assert!(
                !required,
                "PHASOR_REQUIRE_GPU is set, and there is no device: {error}"
            );
            eprintln!("skipped, as there is no CUDA device: {error}");
            None
        }
    }
}

fn rotary(pairing: Pairing) -> RotaryEmbedding {
    let frequencies = Frequencies::from_theta(5e5, 64).unwrap();
    RotaryEmbedding::new(&Rope::new(frequencies, pairing))
}

fn tensor(seed: u32, shape: &[usize], dtype: DType) -> Tensor {
    let len: usize = shape.iter().product();
    let mut state = seed;
    let values = (0..len).map(|_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    });
    let tensor = Tensor::from_iter(values, &CPU).unwrap();
    tensor.reshape(shape).unwrap().to_dtype(dtype).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    let here = tensor
        .to_device(&CPU)
        .unwrap()
        .to_dtype(DType::F32)
        .unwrap();
    here.flatten_all().unwrap().to_vec1().unwrap()
}

#[track_caller]
fn assert_same(a: &Tensor, b: &Tensor) {
    assert_eq!((a.dims(), a.dtype()), (b.dims(), b.dtype()));
    assert_eq!(values(a), values(b));
}

const TYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
const PAIRINGS: [Pairing; 2] = [Pairing::HalfSplit, Pairing::Interleaved];

#[test]
fn the_same_bits_as_on_the_cpu() {
    let Some(gpu) = device() else { return };
    for dtype in TYPES {
        for pairing in PAIRINGS {
            let rotary = rotary(pairing);
            let here = tensor(1, &[2, 7, 5, 80], dtype);
            let there = here.to_device(&gpu).unwrap();
            let ids = [[3u32, 1, 4, 1, 5], [9, 2, 6, 1_000_000, 3]];
            let on = |device| Tensor::new(&ids, device).unwrap();
            let starts = [17i64, 1 << 40];
            for (positions, same) in [
                (Positions::from(1_000_000), Positions::from(1_000_000)),
                (Positions::starts(&starts), Positions::starts(&starts)),
                (Positions::from(&on(&CPU)), Positions::from(&on(&gpu))),
            ] {
                let expected = rotary.apply(&here, positions.clone()).unwrap();
                assert_same(&rotary.apply(&there, same.clone()).unwrap(), &expected);
                // A view of other strides.
                let thd = rotary.clone().with_dim_order(DimOrder::Bthd);
                let view = there.transpose(1, 2).unwrap();
                let rotated = thd.apply(&view, same.clone()).unwrap();
                assert!(rotated.is_contiguous());
                assert_same(&rotated.transpose(1, 2).unwrap(), &expected);
                // In place: two tensors, and windows of one.
                let (q, k) = (there.copy().unwrap(), there.copy().unwrap());
                rotary.apply_qk_inplace(&q, &k, same.clone()).unwrap();
                assert_same(&q, &expected);
                assert_same(&k, &expected);
                let packed = there.copy().unwrap();
                let [q, k] = [(0, 4), (4, 3)].map(|(first, n)| packed.narrow(1, first, n).unwrap());
                rotary.apply_qk_inplace(&q, &k, same.clone()).unwrap();
                assert_same(&packed, &expected);
                let alone = there.copy().unwrap();
                rotary.apply_inplace(&alone, same.clone()).unwrap();
                assert_same(&alone, &expected);
                // To a view of a cache.
                let cache = Tensor::zeros((2, 7, 9, 80), dtype, &gpu).unwrap();
                rotary
                    .apply_into(&there, &cache.narrow(2, 3, 5).unwrap(), same)
                    .unwrap();
                assert_same(&cache.narrow(2, 3, 5).unwrap(), &expected);
                assert_eq!(
                    values(&cache.narrow(2, 8, 1).unwrap()),
                    vec![0.0; 2 * 7 * 80]
                );
            }
            let packed = there.narrow(0, 0, 1).unwrap().squeeze(0).unwrap();
            let rotated = rotary.apply_packed(&packed, 5).unwrap();
            let expected = here.narrow(0, 0, 1).unwrap().squeeze(0).unwrap();
            assert_same(&rotated, &rotary.apply_packed(&expected, 5).unwrap());
        }
    }
}

#[test]
fn given_tables() {
    let Some(gpu) = device() else { return };
    let angles = tensor(2, &[2, 5, 32], DType::F32);
    for dtype in TYPES {
        let here = tensor(3, &[2, 3, 5, 64], dtype);
        let table = |f: fn(&Tensor) -> candle_core::Result<Tensor>| {
            f(&angles).unwrap().to_dtype(dtype).unwrap()
        };
        let tables = [table(Tensor::cos), table(Tensor::sin)];
        let first = tables.each_ref().map(|table| table.get(1).unwrap());
        for [cos, sin] in [tables, first] {
            for function in [rotary_emb::rope, rotary_emb::rope_i] {
                let expected = function(&here, &cos, &sin).unwrap();
                let [there, cos, sin] = [&here, &cos, &sin].map(|x| x.to_device(&gpu).unwrap());
                assert_same(&function(&there, &cos, &sin).unwrap(), &expected);
            }
        }
    }
}

#[test]
fn gradients_flow_back() {
    let Some(gpu) = device() else { return };
    let rotary = rotary(Pairing::HalfSplit);
    let weights = tensor(4, &[1, 3, 5, 64], DType::F32);
    let gradient = |device: &Device| {
        let x = Var::from_tensor(
            &tensor(5, &[1, 3, 5, 64], DType::F32)
                .to_device(device)
                .unwrap(),
        );
        let (x, weights) = (x.unwrap(), weights.to_device(device).unwrap());
        let loss = (rotary.apply(&x, 77).unwrap() * weights)
            .unwrap()
            .sum_all()
            .unwrap();
        loss.backward().unwrap().get(&x).unwrap().clone()
    };
    assert_same(&gradient(&gpu), &gradient(&CPU));
}

#[test]
fn devices_do_not_mix() {
    let Some(gpu) = device() else { return };
    let Some(other) = device() else { return };
    let rotary = rotary(Pairing::HalfSplit);
    rotary.load(&gpu, DType::F32).unwrap();
    let x = |device: &Device| {
        tensor(6, &[1, 2, 3, 64], DType::F32)
            .to_device(device)
            .unwrap()
    };
    let ids = Tensor::new(&[1u32, 2, 3], &CPU).unwrap();
    for error in [
        rotary.apply_qk_inplace(&x(&gpu), &x(&CPU), 0).unwrap_err(),
        rotary.apply_into(&x(&CPU), &x(&gpu), 0).unwrap_err(),
        rotary.apply(&x(&gpu), &ids).unwrap_err(),
    ] {
        assert!(matches!(error, Error::Devices { .. }), "{error}");
    }
    // Two devices of candle on one GPU: each by itself, and not together.
    let error = rotary
        .apply_qk_inplace(&x(&gpu), &x(&other), 0)
        .unwrap_err();
    assert!(
        error.to_string().contains("make the device once"),
        "{error}"
    );
    let [here, there] = [&gpu, &other].map(|device| rotary.apply(&x(device), 9).unwrap());
    assert_same(&here, &there);
}

#[test]
fn caches_are_filled_as_on_the_cpu() {
    let Some(gpu) = device() else { return };
    let rotary = rotary(Pairing::Interleaved).with_dim_order(DimOrder::Bthd);
    let starts = [7i64, 1_000_000];
    // q and both caches after a step, and what was stored.
    let step = |dtype, packed: bool, device: &Device, slots: &[i64; 6]| {
        let qkv = tensor(7, &[2, 3, 8, 64], dtype).to_device(device).unwrap();
        let caches = Tensor::zeros((2, 4, 8, 2, 64), dtype, device).unwrap();
        // All in one tensor each, or each in its own.
        let alone = |window: Tensor| {
            if packed {
                window
            } else {
                window.copy().unwrap()
            }
        };
        let [q, k, v] =
            [(0, 4), (4, 2), (6, 2)].map(|(first, n)| alone(qkv.narrow(2, first, n).unwrap()));
        let [k_cache, v_cache] = [0, 1].map(|n| alone(caches.get(n).unwrap()));
        let cache = KvCache::new(&k_cache, &v_cache, CacheOrder::Nhd);
        let ids = Tensor::from_slice(slots, (2, 3), device).unwrap();
        let positions = Positions::starts(&starts);
        let stored = rotary.append(&q, &k, &v, cache, positions, Slots::mapping(&ids));
        // What was told is not told again.
        assert_eq!(rotary.stored(device).unwrap(), Stored::All);
        (stored.unwrap(), [q, k_cache, v_cache].map(|x| values(&x)))
    };
    for dtype in TYPES {
        for packed in [false, true] {
            for (slots, expected) in [
                ([4, 5, 6, 31, 30, 0], Stored::All),
                ([4, -1, 6, 32, 30, 0], Stored::NotAll),
            ] {
                let (stored, here) = step(dtype, packed, &CPU, &slots);
                assert_eq!(stored, expected);
                let (stored, there) = step(dtype, packed, &gpu, &slots);
                assert_eq!(stored, expected);
                assert!(there == here, "{dtype:?} {packed} {slots:?}");
            }
        }
    }
}
