//! How fast rotations are, beside copying the same bytes.

use std::hint::black_box;
use std::time::{Duration, Instant};

use phasor::{Device, InOut};

use super::Result;
use super::options::Options;
use super::progress::Progress;
use super::report::{Report, thousands};
use super::tensors::{QueriesKeys, Rotation, Stored, Tensor};

/// Bytes read and written per second.
pub struct Speed {
    in_place: f64,
    out_of_place: f64,
    copy: f64,
}

pub fn measure<T: Stored>(
    options: &Options,
    device: &Device,
    tensors: &QueriesKeys<T>,
    rotation: &Rotation<'_>,
    progress: &mut Progress<'_>,
) -> Result<Speed> {
    let rotator = device.rotator(rotation.rope)?;
    let in_place = rotator.plan(&tensors.problem(rotation, InOut::InPlace))?;
    let elsewhere = |layout| (layout, layout).into();
    let out_of_place = rotator.plan(&tensors.problem(rotation, elsewhere))?;
    let positions = device.positions(rotation.positions)?;

    let upload = |tensor: &Tensor<T>| device.upload(&tensor.data);
    let source_q = tensors.q.as_ref().map(upload).transpose()?;
    let source_k = tensors.k.as_ref().map(upload).transpose()?;
    let mut q = tensors.q.as_ref().map(upload).transpose()?;
    let mut k = tensors.k.as_ref().map(upload).transpose()?;
    let wait = || Ok(device.synchronize()?);

    progress.begin("timing, in place", options.repeat().into());
    let in_place_time = median(options, progress, &wait, &mut || {
        let (q, k) = (q.as_mut(), k.as_mut());
        let (q, k) = (q.map(InOut::InPlace), k.map(InOut::InPlace));
        Ok(rotator.rotate(&in_place, q, k, &positions)?)
    })?;
    progress.begin("timing, out of place", options.repeat().into());
    let out_of_place_time = median(options, progress, &wait, &mut || {
        let pair = |(source, destination)| InOut::OutOfPlace {
            source,
            destination,
        };
        let q = source_q.as_ref().zip(q.as_mut()).map(pair);
        let k = source_k.as_ref().zip(k.as_mut()).map(pair);
        Ok(rotator.rotate(&out_of_place, q, k, &positions)?)
    })?;
    // A copy of n bytes reads n and writes n.
    let copied = out_of_place.bytes() / 2;
    progress.begin("timing, memory copy", options.repeat().into());
    let copy_time = time_device_copy(options, progress, device, copied as usize)?;
    Ok(Speed {
        in_place: in_place.bytes() as f64 / in_place_time,
        out_of_place: out_of_place.bytes() as f64 / out_of_place_time,
        copy: out_of_place.bytes() as f64 / copy_time,
    })
}

/// Seconds per call: the median of several samples, each of as many calls as take a while, so
/// that neither the clock nor waiting for the device counts for much.
fn median(
    options: &Options,
    progress: &mut Progress<'_>,
    wait: &dyn Fn() -> Result<()>,
    call: &mut dyn FnMut() -> Result<()>,
) -> Result<f64> {
    const SAMPLE: Duration = Duration::from_millis(2);
    let mut time = |calls: u32| -> Result<f64> {
        let start = Instant::now();
        for _ in 0..calls {
            call()?;
        }
        wait()?;
        // Never zero, whatever the clock's resolution.
        Ok(start.elapsed().as_secs_f64().max(1e-9) / f64::from(calls))
    };
    // The first call pays for what is set up once.
    time(1)?;
    let calls = (SAMPLE.as_secs_f64() / time(1)?).clamp(1.0, 1000.0) as u32;
    let samples = (0..options.repeat()).map(|_| {
        let sample = time(calls);
        progress.step();
        sample
    });
    let mut samples = samples.collect::<Result<Vec<_>>>()?;
    samples.sort_by(f64::total_cmp);
    Ok(samples[samples.len() / 2])
}

fn time_host_copy(options: &Options, progress: &mut Progress<'_>, bytes: usize) -> Result<f64> {
    let from = vec![1u8; bytes];
    let mut to = vec![0u8; bytes];
    median(options, progress, &|| Ok(()), &mut || {
        copy(black_box(&from), &mut to);
        black_box(&mut to);
        Ok(())
    })
}

/// A copy with the threads that a rotation has, or without where they would not pay.
fn copy(from: &[u8], to: &mut [u8]) {
    #[cfg(feature = "rayon")]
    {
        use rayon::prelude::*;
        const WORTH_A_THREAD: usize = 128 * 1024;
        let part = from.len().div_ceil(rayon::current_num_threads());
        let part = part.max(WORTH_A_THREAD);
        if part < from.len() {
            let parts = to.par_chunks_mut(part).zip(from.par_chunks(part));
            parts.for_each(|(to, from)| to.copy_from_slice(from));
            return;
        }
    }
    to.copy_from_slice(from);
}

#[cfg(feature = "cuda")]
fn time_device_copy(
    options: &Options,
    progress: &mut Progress<'_>,
    device: &Device,
    bytes: usize,
) -> Result<f64> {
    let Some((_, stream)) = device.as_cuda() else {
        return time_host_copy(options, progress, bytes);
    };
    let buffer = || stream.alloc_zeros::<u8>(bytes).or_else(driver_failure);
    let (from, mut to) = (buffer()?, buffer()?);
    let wait = || stream.synchronize().or_else(driver_failure);
    median(options, progress, &wait, &mut || {
        stream.memcpy_dtod(&from, &mut to).or_else(driver_failure)
    })
}

#[cfg(feature = "cuda")]
fn driver_failure<T>(error: phasor::cudarc::driver::DriverError) -> Result<T> {
    super::fail(format!("copying on the device failed: {:?}", error.0))
}

#[cfg(not(feature = "cuda"))]
fn time_device_copy(
    options: &Options,
    progress: &mut Progress<'_>,
    _: &Device,
    bytes: usize,
) -> Result<f64> {
    time_host_copy(options, progress, bytes)
}

pub fn report(report: &mut Report, options: &Options, device: &Device, rows: &[(&str, Speed)]) {
    report.heading("Speed: bytes of q and k read and written per second");
    let mut table = vec![["", "in place", "out of place", "memory copy"].map(String::from)];
    for (name, speed) in rows {
        table.push([
            name.to_string(),
            gigabytes(speed.in_place),
            gigabytes(speed.out_of_place),
            gigabytes(speed.copy),
        ]);
    }
    report.table(&table);
    let how = if device.is_host() {
        "the copy has as many threads as the rotation"
    } else {
        "the copy is from device memory to device memory, by the driver"
    };
    if cfg!(debug_assertions) {
        report.note("This is a debug build, many times slower than one with --release.");
    }
    report.note(&format!(
        "Medians of {}; each call is on the same buffers again, so caches help all three; {how}.",
        thousands(options.repeat())
    ));
}

fn gigabytes(rate: f64) -> String {
    let rate = rate / 1e9;
    if rate < 1.0 {
        format!("{rate:.3} GB/s")
    } else if rate < 100.0 {
        format!("{rate:.1} GB/s")
    } else {
        format!("{} GB/s", thousands(rate.round() as u64))
    }
}
