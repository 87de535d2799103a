//! What memory allows: a copy, and a pass that reads, adds one and writes back.

use crate::cases::{Case, Contender, Line, Ring, Sampling, time};
use phasor::Dtype;
use rayon::prelude::*;
use std::cell::RefCell;
use std::hint::black_box;
use std::rc::Rc;

pub const MEMCPY: &str = "memcpy";
pub const UPDATE: &str = "update pass";

/// Waking a thread for less would be slower than doing without.
const BYTES_WORTH_A_THREAD: usize = 128 << 10;

/// The two limits of a case, in this order: [`MEMCPY`], [`UPDATE`].
pub fn contenders(case: &Case, dtype: Dtype, sampling: &Sampling) -> [Contender; 2] {
    match dtype {
        Dtype::F32 => limits::<4>(case, dtype, sampling),
        _ => limits::<2>(case, dtype, sampling),
    }
}

fn limits<const WIDTH: usize>(case: &Case, dtype: Dtype, sampling: &Sampling) -> [Contender; 2] {
    let footprint = case.footprint(dtype);
    let (run, stride) = (footprint.run, footprint.stride);
    // Buffers of their own: adding one to the bits of floats, over and over, would make subnormals
    // and infinities of what is rotated. Not zeros, which the system may keep in one shared page.
    let buffer = vec![Line([1; 64]); footprint.runs * stride];
    // The update pass walks through the first of each pair only.
    let count = sampling.buffers(case, size_of_val(&buffer[..]));
    // How many lines a thread gets: whole runs, or a part of the only one.
    let parts = rayon::current_num_threads().min(footprint.bytes() / BYTES_WORTH_A_THREAD);
    let part = match footprint.is_contiguous() {
        true => buffer.len().div_ceil(parts.max(1)),
        false => footprint.runs.div_ceil(parts.max(1)) * stride,
    };
    let ring = Ring::new(vec![(buffer.clone(), buffer); count]);
    let ring = Rc::new(RefCell::new(ring));
    let shared = Rc::clone(&ring);
    let copy = Contender {
        library: MEMCPY.to_owned(),
        run: Box::new(move |calls| {
            let mut ring = shared.borrow_mut();
            time(calls, || {
                let (from, to) = ring.next();
                let (from, to) = (black_box(&from[..]), black_box(&mut to[..]));
                if parts > 1 {
                    to.par_chunks_mut(part)
                        .zip(from.par_chunks(part))
                        .for_each(|(to, from)| copy_runs(from, to, run, stride));
                } else {
                    copy_runs(from, to, run, stride);
                }
            })
        }),
    };
    let update = Contender {
        library: UPDATE.to_owned(),
        run: Box::new(move |calls| {
            let mut ring = ring.borrow_mut();
            time(calls, || {
                let buffer = black_box(&mut ring.next().0[..]);
                if parts > 1 {
                    let parts = buffer.par_chunks_mut(part);
                    parts.for_each(|part| update_runs::<WIDTH>(part, run, stride));
                } else {
                    update_runs::<WIDTH>(buffer, run, stride);
                }
            })
        }),
    };
    [copy, update]
}

fn copy_runs(from: &[Line], to: &mut [Line], run: usize, stride: usize) {
    if run >= stride {
        return to.copy_from_slice(from);
    }
    // Calls for a line or two each would cost more than the lines.
    for (from, to) in from.chunks(stride).zip(to.chunks_mut(stride)) {
        for (from, to) in from.iter().zip(to).take(run) {
            *to = *from;
        }
    }
}

/// Adds one to each element of `WIDTH` bytes. By intrinsics, as compilers do not make vectors of
/// every such loop, and the limit has to be one.
fn update_runs<const WIDTH: usize>(lines: &mut [Line], run: usize, stride: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        if has!("avx512f") && has!("avx512bw") {
            // SAFETY: the processor has both.
            return unsafe { update_avx512::<WIDTH>(lines, run, stride) };
        }
        if has!("avx2") {
            // SAFETY: the processor has it.
            return unsafe { update_avx2::<WIDTH>(lines, run, stride) };
        }
    }
    for lines in lines.chunks_mut(stride) {
        for Line(bytes) in lines.iter_mut().take(run) {
            update_line::<WIDTH>(bytes);
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw")]
fn update_avx512<const WIDTH: usize>(lines: &mut [Line], run: usize, stride: usize) {
    use std::arch::x86_64::*;
    for lines in lines.chunks_mut(stride) {
        for Line(bytes) in lines.iter_mut().take(run) {
            let at = bytes.as_mut_ptr().cast();
            // SAFETY: a line is one aligned vector.
            unsafe {
                let x = _mm512_load_si512(at);
                let x = match WIDTH {
                    4 => _mm512_add_epi32(x, _mm512_set1_epi32(1)),
                    _ => _mm512_add_epi16(x, _mm512_set1_epi16(1)),
                };
                _mm512_store_si512(at, x);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn update_avx2<const WIDTH: usize>(lines: &mut [Line], run: usize, stride: usize) {
    use std::arch::x86_64::*;
    for lines in lines.chunks_mut(stride) {
        for Line(bytes) in lines.iter_mut().take(run) {
            for half in bytes.as_chunks_mut::<32>().0 {
                let at = half.as_mut_ptr().cast();
                // SAFETY: half a line is one aligned vector.
                unsafe {
                    let x = _mm256_load_si256(at);
                    let x = match WIDTH {
                        4 => _mm256_add_epi32(x, _mm256_set1_epi32(1)),
                        _ => _mm256_add_epi16(x, _mm256_set1_epi16(1)),
                    };
                    _mm256_store_si256(at, x);
                }
            }
        }
    }
}

#[cfg(target_arch = "aarch64")]
fn update_line<const WIDTH: usize>(bytes: &mut [u8; 64]) {
    use std::arch::aarch64::*;
    for quarter in bytes.as_chunks_mut::<16>().0 {
        let at = quarter.as_mut_ptr();
        // SAFETY: the vector is a quarter of a line, and every processor of this kind has these.
        unsafe {
            match WIDTH {
                4 => vst1q_u32(at.cast(), vaddq_u32(vld1q_u32(at.cast()), vdupq_n_u32(1))),
                _ => vst1q_u16(at.cast(), vaddq_u16(vld1q_u16(at.cast()), vdupq_n_u16(1))),
            }
        }
    }
}

#[cfg(not(target_arch = "aarch64"))]
fn update_line<const WIDTH: usize>(bytes: &mut [u8; 64]) {
    match WIDTH {
        4 => {
            for x in bytes.as_chunks_mut::<4>().0 {
                *x = u32::from_ne_bytes(*x).wrapping_add(1).to_ne_bytes();
            }
        }
        _ => {
            for x in bytes.as_chunks_mut::<2>().0 {
                *x = u16::from_ne_bytes(*x).wrapping_add(1).to_ne_bytes();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 10 lines in runs of 2 every 4; the last is cut off by the end.
    #[test]
    fn passes_touch_the_runs_only() {
        for update in [update_runs::<2>, update_runs::<4>] {
            let mut lines = vec![Line([0; 64]); 10];
            let mut copy = lines.clone();
            update(&mut lines, 2, 4);
            copy_runs(&lines, &mut copy, 2, 4);
            for (i, (line, copy)) in lines.iter().zip(&copy).enumerate() {
                assert_eq!(line.0.contains(&1), i % 4 < 2, "line {i}");
                assert_eq!(line.0, copy.0, "line {i}");
            }
        }
    }

    #[test]
    fn variants_add_one_to_each_element() {
        fn check<const WIDTH: usize>() {
            let start: [u8; 64] = std::array::from_fn(|i| if i < 32 { 0xff } else { i as u8 });
            let mut expected = start;
            for x in expected.chunks_mut(WIDTH) {
                let mut value = [0; 8];
                value[..WIDTH].copy_from_slice(x);
                let sum = (u64::from_le_bytes(value) + 1).to_le_bytes();
                x.copy_from_slice(&sum[..WIDTH]);
            }
            let mut lines = [Line(start)];
            update_runs::<WIDTH>(&mut lines, 1, 1);
            assert_eq!(lines[0].0, expected);
            let mut line = start;
            update_line::<WIDTH>(&mut line);
            assert_eq!(line, expected);
            #[cfg(target_arch = "x86_64")]
            if std::arch::is_x86_feature_detected!("avx2") {
                let mut lines = [Line(start)];
                // SAFETY: just detected.
                unsafe { update_avx2::<WIDTH>(&mut lines, 1, 1) };
                assert_eq!(lines[0].0, expected);
            }
        }
        check::<2>();
        check::<4>();
    }
}
