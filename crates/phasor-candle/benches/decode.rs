//! What a call costs on candle's tensors beside phasor's own call on slices, and beside candle-nn's rope.
//!
//! ```text
//! cargo bench -p phasor-candle --bench decode
//! ```
//!
//! Each number is the least of many rounds, in which all calls take turns: other work on the machine makes
//! a round longer, never shorter. Where phasor's call writes, it does so in the storages of the tensors that
//! phasor-candle is given: other memory takes up to 0.1 µs more or less, by where it happens to be.

use candle_core::{CpuStorage, DType, Device, Storage, StorageMutRef, StorageRef, Tensor};
use phasor::half::bf16;
use phasor::{
    CacheLayout, Element, Frequencies, Host, HostKvCache, KvCacheLayout, Layout, Pairing,
    Positions, Problem, Rope,
};
use phasor_candle::{CacheOrder, KvCache, RotaryEmbedding, Slots, rotary_emb};
use std::error::Error;
use std::hint::black_box;
use std::time::Instant;

const HEADS: usize = 32;
const KV_HEADS: usize = 8;
const DIM: usize = 128;
const CACHED: usize = 8192;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Calls by their name, of which so many are made.
type Calls<'a> = (&'static str, &'a mut dyn FnMut(usize) -> Result<()>);

/// Makes so many calls; the argument of one counts them.
fn each(mut call: impl FnMut(usize) -> Result<()>) -> impl FnMut(usize) -> Result<()> {
    move |calls| (0..calls).try_for_each(&mut call)
}

/// Elements in a tensor's storage.
trait Stored: Element {
    fn of(storage: &mut CpuStorage) -> Option<&mut [Self]>;
}

macro_rules! stored {
    ($($number:ty => $variant:ident),*) => {$(
        impl Stored for $number {
            fn of(storage: &mut CpuStorage) -> Option<&mut [Self]> {
                match storage {
                    CpuStorage::$variant(elements) => Some(elements),
                    _ => None,
                }
            }
        }
    )*};
}

stored!(f32 => F32, bf16 => BF16);

fn locked(tensor: &Tensor) -> StorageMutRef<'_> {
    let lock = StorageRef::rwlock(&tensor.storage_and_layout().0);
    lock.write()
}

fn elements<T: Stored>(storage: &mut Storage) -> Result<&mut [T]> {
    match storage {
        Storage::Cpu(storage) => Ok(T::of(storage).ok_or("of another type")?),
        _ => Err("not on the CPU".into()),
    }
}

/// Prints the least time of each call.
fn compare(title: &str, tokens: usize, calls: &mut [Calls<'_>]) -> Result<()> {
    let per_round = (1_000 / tokens).max(1);
    let rounds = if tokens == 1 { 100 } else { 20 };
    let mut least = vec![f64::INFINITY; calls.len()];
    for _ in 0..rounds {
        for ((_, call), least) in calls.iter_mut().zip(&mut least) {
            let start = Instant::now();
            call(per_round)?;
            let each = start.elapsed().as_secs_f64() * 1e6 / per_round as f64;
            *least = least.min(each);
        }
    }
    println!("{title}");
    for ((name, _), least) in calls.iter().zip(least) {
        println!("  {name:<44}{least:>10.3} µs");
    }
    Ok(())
}

fn measure<T: Stored>(dtype: DType, tokens: usize) -> Result<()> {
    let rope = Rope::new(Frequencies::from_theta(500_000.0, DIM)?, Pairing::HalfSplit);
    let rotary = RotaryEmbedding::new(&rope);
    let rotator = Host::new().rotator(&rope);
    let layout = |heads| Layout::bhsd(1, tokens, heads, DIM);
    let of = |heads| Tensor::ones((1, heads, tokens, DIM), dtype, &Device::Cpu);
    let slice = |heads: usize| vec![T::narrow(1.0); heads * tokens * DIM];
    let start = |n: usize| 4096 + n as i64 % 512;
    let problem = Problem::new(T::DTYPE);

    // One tensor, to a new one.
    let plan = rotator.plan(&problem.q((layout(HEADS), layout(HEADS))))?;
    let (q, source) = (of(HEADS)?, slice(HEADS));
    let mut to_new = each(|n| {
        let mut rotated = Vec::with_capacity(source.len());
        let room = &mut rotated.spare_capacity_mut()[..source.len()];
        let operand = (&source[..], room).into();
        rotator.rotate(&plan, Some(operand), None, Positions::start(start(n)))?;
        // SAFETY: the plan writes all elements of its destination.
        unsafe { rotated.set_len(source.len()) };
        black_box(&rotated);
        Ok(())
    });
    let mut apply = each(|n| {
        black_box(rotary.apply(&q, start(n))?);
        Ok(())
    });
    let table = Tensor::ones((CACHED, DIM / 2), dtype, &Device::Cpu)?;
    let rows = |n| table.narrow(0, start(n) as usize, tokens);
    let mut drop_in = each(|n| {
        let rows = rows(n)?;
        black_box(rotary_emb::rope(&q, &rows, &rows)?);
        Ok(())
    });
    let mut theirs = each(|n| {
        let rows = rows(n)?;
        black_box(candle_nn::rotary_emb::rope(&q, &rows, &rows)?);
        Ok(())
    });
    compare(
        &format!("{dtype:?}, {tokens} tokens, q of {HEADS} heads to a new tensor"),
        tokens,
        &mut [
            ("phasor on slices", &mut to_new),
            ("phasor-candle, apply", &mut apply),
            ("phasor-candle, rotary_emb::rope by tables", &mut drop_in),
            ("candle-nn, rotary_emb::rope by tables", &mut theirs),
        ],
    )?;

    // Queries and keys where they are.
    let plan = rotator.plan(&problem.q(layout(HEADS)).k(layout(KV_HEADS)))?;
    let (q_own, k_own) = (of(HEADS)?, of(KV_HEADS)?);
    let mut by_slices = |calls| {
        let [mut q, mut k] = [&q_own, &k_own].map(locked);
        let (q, k) = (elements::<T>(&mut q)?, elements::<T>(&mut k)?);
        for n in 0..calls {
            let (q, k) = ((&mut *q).into(), (&mut *k).into());
            rotator.rotate(&plan, Some(q), Some(k), Positions::start(start(n)))?;
        }
        Ok(())
    };
    let k = of(KV_HEADS)?;
    let mut in_place = each(|n| Ok(rotary.apply_qk_inplace(&q_own, &k_own, start(n))?));
    let qk = of(HEADS + KV_HEADS)?;
    let (q_window, k_window) = (qk.narrow(1, 0, HEADS)?, qk.narrow(1, HEADS, KV_HEADS)?);
    let mut windows = each(|n| Ok(rotary.apply_qk_inplace(&q_window, &k_window, start(n))?));
    let mut theirs = each(|n| {
        let rows = rows(n)?;
        black_box(candle_nn::rotary_emb::rope(&q, &rows, &rows)?);
        black_box(candle_nn::rotary_emb::rope(&k, &rows, &rows)?);
        Ok(())
    });
    compare(
        &format!("{dtype:?}, {tokens} tokens, q of {HEADS} and k of {KV_HEADS} heads in place"),
        tokens,
        &mut [
            ("phasor on slices", &mut by_slices),
            ("phasor-candle, tensors of their own", &mut in_place),
            ("phasor-candle, windows of one", &mut windows),
            ("candle-nn, to new tensors, in two calls", &mut theirs),
        ],
    )?;

    // The same, and keys and values to a cache.
    let cache_layout = CacheLayout::bhsd(1, CACHED, KV_HEADS, DIM);
    let appended = problem
        .q(layout(HEADS))
        .k_to_cache(layout(KV_HEADS))
        .v_to_cache(layout(KV_HEADS))
        .cache(KvCacheLayout::separate(cache_layout, cache_layout));
    let plan = rotator.plan(&appended)?;
    let v = of(KV_HEADS)?;
    let cache = || Tensor::zeros((1, KV_HEADS, CACHED, DIM), dtype, &Device::Cpu);
    let (k_cache, v_cache) = (cache()?, cache()?);
    let mut by_slices = |calls| {
        let [mut q, mut k, mut v] = [&q_own, &k, &v].map(locked);
        let [mut to_k, mut to_v] = [&k_cache, &v_cache].map(locked);
        let q = elements::<T>(&mut q)?;
        let (k, v) = (&*elements::<T>(&mut k)?, &*elements::<T>(&mut v)?);
        let (to_k, to_v) = (elements::<T>(&mut to_k)?, elements::<T>(&mut to_v)?);
        for n in 0..calls {
            let length = [start(n)];
            let caches = HostKvCache::Separate {
                k: Some(&mut *to_k),
                v: Some(&mut *to_v),
            };
            let slots = phasor::Slots::sequences(&length);
            let (q, k, v) = (Some((&mut *q).into()), Some(k.into()), Some(v.into()));
            let at = Positions::start(start(n));
            let stored = rotator.append(&plan, q, k, v, caches, at, slots)?;
            assert_eq!(stored, phasor::Stored::All);
        }
        Ok(())
    };
    let caches = KvCache::new(&k_cache, &v_cache, CacheOrder::Hnd);
    let mut append = each(|n| {
        let length = [start(n)];
        let slots = Slots::sequences(&length);
        let stored = rotary.append(&q_own, &k, &v, caches, start(n), slots)?;
        assert_eq!(stored, phasor::Stored::All);
        Ok(())
    });
    let mut theirs = each(|n| {
        let rows = rows(n)?;
        black_box(candle_nn::rotary_emb::rope(&q, &rows, &rows)?);
        let rotated = candle_nn::rotary_emb::rope(&k, &rows, &rows)?;
        k_cache.slice_set(&rotated, 2, start(n) as usize)?;
        v_cache.slice_set(&v, 2, start(n) as usize)?;
        Ok(())
    });
    compare(
        &format!("{dtype:?}, {tokens} tokens, the same, and k and v to caches"),
        tokens,
        &mut [
            ("phasor on slices", &mut by_slices),
            ("phasor-candle, append", &mut append),
            ("candle-nn, and Tensor::slice_set", &mut theirs),
        ],
    )
}

fn main() -> Result<()> {
    // Cargo also asks benches for their tests, of which there are none here.
    if std::env::args().any(|argument| argument == "--test") {
        return Ok(());
    }
    for tokens in [1, 512] {
        measure::<f32>(DType::F32, tokens)?;
        measure::<bf16>(DType::BF16, tokens)?;
    }
    Ok(())
}
