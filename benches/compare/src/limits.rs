//! What memory allows: a copy, and a pass that reads, adds one and writes back.

use crate::cases::{Case, Contender, Footprint, Line, Plain, Ring, Sampling, time};
use crate::phasor::{Buffers, Entry, Tensor};
use ::phasor::Element;
use std::hint::black_box;
use std::rc::Rc;

pub const MEMCPY: &str = "memcpy";
pub const UPDATE: &str = "update pass";

/// Waking a thread for less would be slower than doing without.
const BYTES_WORTH_A_THREAD: usize = 128 << 10;

/// The two limits of a case, in this order: [`MEMCPY`], [`UPDATE`].
pub fn contenders<T: Element + Plain>(
    case: &Case,
    buffers: &Buffers<T>,
    sampling: &Sampling,
) -> [Contender; 2] {
    match size_of::<T>() {
        4 => limits::<T, 4>(case, buffers, sampling),
        _ => limits::<T, 2>(case, buffers, sampling),
    }
}

fn limits<T: Element + Plain, const WIDTH: usize>(
    case: &Case,
    buffers: &Buffers<T>,
    sampling: &Sampling,
) -> [Contender; 2] {
    let footprint = case.footprint(T::DTYPE);
    let parts = rayon::current_num_threads().min(footprint.bytes() / BYTES_WORTH_A_THREAD);
    let split = Split::new(parts.max(1), footprint);
    // In place there is no memory to copy to yet. Not zeros, which the system may keep in one
    // shared page.
    let bytes = (case.q_len() + case.k_len()) * size_of::<T>();
    let targets = (0..sampling.buffers(case, bytes)).map(|_| {
        [case.q_len(), case.k_len()].map(|len| {
            let lines = (len * size_of::<T>()).div_ceil(size_of::<Line>());
            vec![Line([1; 64]); if case.in_place { lines } else { 0 }]
        })
    });
    let mut targets = Ring::new(targets.collect());
    let ring = Rc::clone(buffers);
    let copy = Contender {
        library: MEMCPY.to_owned(),
        run: Box::new(move |calls| {
            let mut ring = ring.borrow_mut();
            Ok(time(calls, || {
                let Entry { q, k, .. } = ring.next();
                let [q_target, k_target] = targets.next();
                split.copy(black_box([
                    from_and_to(q, q_target),
                    from_and_to(k, k_target),
                ]));
            }))
        }),
    };
    let ring = Rc::clone(buffers);
    let update = Contender {
        library: UPDATE.to_owned(),
        run: Box::new(move |calls| {
            let mut ring = ring.borrow_mut();
            Ok(time(calls, || {
                let Entry { q, k, raised } = ring.next();
                let one = if *raised { -1 } else { 1 };
                *raised = !*raised;
                split.update::<WIDTH>(black_box([q.lines().0, k.lines().0]), one);
            }))
        }),
    };
    [copy, update]
}

type FromAndTo<'a> = (&'a [Line], &'a mut [Line]);

/// What a copy of a tensor reads, and where it goes: to `target` in place.
fn from_and_to<'a, T: Element + Plain>(
    tensor: &'a mut Tensor<T>,
    target: &'a mut [Line],
) -> FromAndTo<'a> {
    let (from, to) = tensor.lines();
    (from, to.unwrap_or(target))
}

/// Lines that threads share by cutting them in two again and again.
trait Cut: Send + Sized {
    fn lines(&self) -> usize;

    fn cut(self, at: usize) -> (Self, Self);
}

impl Cut for &mut [Line] {
    fn lines(&self) -> usize {
        self.len()
    }

    fn cut(self, at: usize) -> (Self, Self) {
        self.split_at_mut(at)
    }
}

impl Cut for FromAndTo<'_> {
    fn lines(&self) -> usize {
        self.0.len()
    }

    fn cut(self, at: usize) -> (Self, Self) {
        let (from, to) = (self.0.split_at(at), self.1.split_at_mut(at));
        ((from.0, to.0), (from.1, to.1))
    }
}

/// How threads share the lines of q and k: each part has some of both, so that a call forks once.
#[derive(Clone, Copy, Debug)]
struct Split {
    parts: usize,
    /// Lines that stay together: a run and what lies between it and the next.
    unit: usize,
    run: usize,
    stride: usize,
}

impl Split {
    fn new(parts: usize, footprint: Footprint) -> Self {
        let Footprint { run, stride, .. } = footprint;
        match footprint.is_contiguous() {
            // The only run goes as far as a tensor does, and may be cut anywhere.
            true => Self {
                parts,
                unit: 1,
                run: usize::MAX,
                stride: usize::MAX,
            },
            false => Self {
                parts,
                unit: stride,
                run,
                stride,
            },
        }
    }

    fn copy(&self, tensors: [FromAndTo; 2]) {
        self.share(tensors, &|(from, to)| {
            copy_runs(from, to, self.run, self.stride)
        });
    }

    fn update<const WIDTH: usize>(&self, tensors: [&mut [Line]; 2], one: i32) {
        self.share(tensors, &|lines: &mut [Line]| {
            update_runs::<WIDTH>(lines, self.run, self.stride, one)
        });
    }

    /// Hands each part of both tensors to `work`, each pair of parts on a thread.
    fn share<T: Cut>(&self, tensors: [T; 2], work: &(impl Fn(T) + Sync)) {
        if self.parts == 1 {
            return tensors.into_iter().for_each(work);
        }
        let left = self.parts / 2;
        let [q, k] = tensors.map(|tensor| {
            let units = tensor.lines().div_ceil(self.unit);
            let at = units * left / self.parts * self.unit;
            tensor.cut(at)
        });
        let with = |parts| Self { parts, ..*self };
        rayon::join(
            || with(left).share([q.0, k.0], work),
            || with(self.parts - left).share([q.1, k.1], work),
        );
    }
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

/// Adds `one` to each element of `WIDTH` bytes. By intrinsics, as compilers do not make vectors of
/// every such loop, and the limit has to be one.
fn update_runs<const WIDTH: usize>(lines: &mut [Line], run: usize, stride: usize, one: i32) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        if has!("avx512f") && has!("avx512bw") {
            // SAFETY: the processor has both.
            return unsafe { update_avx512::<WIDTH>(lines, run, stride, one) };
        }
        if has!("avx2") {
            // SAFETY: the processor has it.
            return unsafe { update_avx2::<WIDTH>(lines, run, stride, one) };
        }
    }
    for lines in lines.chunks_mut(stride) {
        for Line(bytes) in lines.iter_mut().take(run) {
            update_line::<WIDTH>(bytes, one);
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw")]
fn update_avx512<const WIDTH: usize>(lines: &mut [Line], run: usize, stride: usize, one: i32) {
    use std::arch::x86_64::*;
    for lines in lines.chunks_mut(stride) {
        for Line(bytes) in lines.iter_mut().take(run) {
            let at = bytes.as_mut_ptr().cast();
            // SAFETY: a line is one aligned vector.
            unsafe {
                let x = _mm512_load_si512(at);
                let x = match WIDTH {
                    4 => _mm512_add_epi32(x, _mm512_set1_epi32(one)),
                    _ => _mm512_add_epi16(x, _mm512_set1_epi16(one as i16)),
                };
                _mm512_store_si512(at, x);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn update_avx2<const WIDTH: usize>(lines: &mut [Line], run: usize, stride: usize, one: i32) {
    use std::arch::x86_64::*;
    for lines in lines.chunks_mut(stride) {
        for Line(bytes) in lines.iter_mut().take(run) {
            for half in bytes.as_chunks_mut::<32>().0 {
                let at = half.as_mut_ptr().cast();
                // SAFETY: half a line is one aligned vector.
                unsafe {
                    let x = _mm256_load_si256(at);
                    let x = match WIDTH {
                        4 => _mm256_add_epi32(x, _mm256_set1_epi32(one)),
                        _ => _mm256_add_epi16(x, _mm256_set1_epi16(one as i16)),
                    };
                    _mm256_store_si256(at, x);
                }
            }
        }
    }
}

#[cfg(target_arch = "aarch64")]
fn update_line<const WIDTH: usize>(bytes: &mut [u8; 64], one: i32) {
    use std::arch::aarch64::*;
    for quarter in bytes.as_chunks_mut::<16>().0 {
        let at = quarter.as_mut_ptr();
        // SAFETY: the vector is a quarter of a line, and every processor of this kind has these.
        unsafe {
            match WIDTH {
                4 => vst1q_u32(
                    at.cast(),
                    vaddq_u32(vld1q_u32(at.cast()), vdupq_n_u32(one as u32)),
                ),
                _ => vst1q_u16(
                    at.cast(),
                    vaddq_u16(vld1q_u16(at.cast()), vdupq_n_u16(one as u16)),
                ),
            }
        }
    }
}

#[cfg(not(target_arch = "aarch64"))]
fn update_line<const WIDTH: usize>(bytes: &mut [u8; 64], one: i32) {
    match WIDTH {
        4 => {
            for x in bytes.as_chunks_mut::<4>().0 {
                *x = u32::from_ne_bytes(*x)
                    .wrapping_add(one as u32)
                    .to_ne_bytes();
            }
        }
        _ => {
            for x in bytes.as_chunks_mut::<2>().0 {
                *x = u16::from_ne_bytes(*x)
                    .wrapping_add(one as u16)
                    .to_ne_bytes();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    /// 10 lines in runs of 2 every 4; the last is cut off by the end.
    #[test]
    fn passes_touch_the_runs_only() {
        for update in [update_runs::<2>, update_runs::<4>] {
            let mut lines = vec![Line([0; 64]); 10];
            let mut copy = lines.clone();
            update(&mut lines, 2, 4, 1);
            copy_runs(&lines, &mut copy, 2, 4);
            for (i, (line, copy)) in lines.iter().zip(&copy).enumerate() {
                assert_eq!(line.0.contains(&1), i % 4 < 2, "line {i}");
                assert_eq!(line.0, copy.0, "line {i}");
            }
        }
    }

    /// Each part is marked by its turn: every line of q and k once, in whole units, all parts used
    /// where there are units enough.
    #[test]
    fn parts_cover_every_line_once() {
        for lens in [[0, 0], [1, 0], [5, 3], [64, 7], [40, 10], [97, 31]] {
            for parts in [1, 2, 3, 4, 7, 8] {
                for (run, stride, runs) in [(1, 1, 1), (1, 3, 9), (2, 4, 9)] {
                    let split = Split::new(parts, Footprint { run, stride, runs });
                    let what = format!("{lens:?} in {parts} parts of {split:?}");
                    let [mut q, mut k] = lens.map(|len| vec![Line([0; 64]); len]);
                    let taken = Mutex::new(Vec::new());
                    split.share([&mut q[..], &mut k[..]], &|lines: &mut [Line]| {
                        lines.iter_mut().for_each(|line| line.0[0] += 1);
                        taken
                            .lock()
                            .unwrap()
                            .push((lines.as_ptr() as usize, lines.len()));
                    });
                    assert!(q.iter().chain(&k).all(|line| line.0[0] == 1), "{what}");
                    let taken = taken.into_inner().unwrap();
                    assert_eq!(taken.len(), 2 * parts, "{what}");
                    for tensor in [&q, &k] {
                        let range = tensor.as_ptr_range();
                        let (start, end) = (range.start as usize, range.end as usize);
                        let own = taken.iter().filter(|part| (start..end).contains(&part.0));
                        let filled = own.filter(|part| part.1 > 0).inspect(|(at, _)| {
                            assert_eq!((at - start) / size_of::<Line>() % split.unit, 0, "{what}");
                        });
                        let units = tensor.len().div_ceil(split.unit);
                        assert_eq!(filled.count(), parts.min(units), "{what}");
                    }
                }
            }
        }
    }

    /// With parts as without: only the runs, in both tensors.
    #[test]
    fn split_passes_do_the_same() {
        let footprint = Footprint {
            run: 2,
            stride: 4,
            runs: 9,
        };
        let split = Split::new(3, footprint);
        let [mut q, mut k] = [26, 10].map(|len| vec![Line([0; 64]); len]);
        let [mut q_copy, mut k_copy] = [q.clone(), k.clone()];
        split.update::<4>([&mut q, &mut k], 1);
        split.copy([(&q[..], &mut q_copy[..]), (&k[..], &mut k_copy[..])]);
        for (tensor, copy) in [(&q, &q_copy), (&k, &k_copy)] {
            for (i, (line, copy)) in tensor.iter().zip(copy).enumerate() {
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
            update_runs::<WIDTH>(&mut lines, 1, 1, 1);
            assert_eq!(lines[0].0, expected);
            let mut line = start;
            update_line::<WIDTH>(&mut line, 1);
            assert_eq!(line, expected);
            #[cfg(target_arch = "x86_64")]
            if std::arch::is_x86_feature_detected!("avx2") {
                let mut lines = [Line(start)];
                // SAFETY: just detected.
                unsafe { update_avx2::<WIDTH>(&mut lines, 1, 1, 1) };
                assert_eq!(lines[0].0, expected);
            }
        }
        check::<2>();
        check::<4>();
    }
}
