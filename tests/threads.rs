//! Threads give the bits of one thread, whatever the pool and wherever the call comes from.
#![cfg(feature = "rayon")]

use phasor::half::{bf16, f16};
use phasor::norm::HeadNorm;
use phasor::{
    Element, Frequencies, Host, HostRotator, HostStep, Isa, Layout, Pairing, Plan, Positions,
    Problem, Rope, Stages, Stored, Threads,
};
use rayon::{ThreadPool, ThreadPoolBuilder};
use std::sync::{Arc, Barrier};

/// Dims of a head, and heads of q and of k.
const HEAD_DIM: usize = 32;
const HEADS: [usize; 2] = [3, 1];

/// Bytes that a token reads and writes.
fn bytes_of_token<T>() -> usize {
    2 * HEADS.iter().sum::<usize>() * HEAD_DIM * size_of::<T>()
}

/// q and k of some tokens, out of place where `sources` has them.
struct Case<T> {
    tokens: usize,
    sources: Option<[Vec<T>; 2]>,
    start: [Vec<T>; 2],
    isa: Isa,
}

impl<T: Element> Case<T> {
    fn new(isa: Isa, tokens: usize, in_place: bool) -> Self {
        let values = |heads: usize| -> Vec<T> {
            let len = tokens * heads * HEAD_DIM;
            let value = |i: usize| T::narrow((i * 37 % 251) as f32 / 64.0 - 1.9);
            (0..len).map(value).collect()
        };
        let start = HEADS.map(values);
        Self {
            tokens,
            sources: (!in_place).then(|| start.clone()),
            start,
            isa,
        }
    }

    fn prepare(&self, threads: Threads) -> (HostRotator, Plan) {
        let frequencies = Frequencies::from_theta(10_000.0, HEAD_DIM).unwrap();
        let host = Host::new()
            .with_isa(self.isa)
            .unwrap()
            .with_threads(threads);
        let rotator = host.rotator(&Rope::new(frequencies, Pairing::HalfSplit));
        let [q, k] = HEADS.map(|heads| Layout::tokens(self.tokens, heads, HEAD_DIM));
        let problem = match self.sources {
            None => Problem::new(T::DTYPE).q(q).k(k),
            Some(_) => Problem::new(T::DTYPE).q((q, q)).k((k, k)),
        };
        let plan = rotator.plan(&problem).unwrap();
        (rotator, plan)
    }

    /// What so many calls on the same buffers leave there, in bits that compare.
    fn after(&self, threads: Threads, calls: usize) -> [Vec<u32>; 2] {
        let (rotator, plan) = self.prepare(threads);
        let [mut q, mut k] = self.start.clone();
        for call in 0..calls {
            let (q, k) = match &self.sources {
                None => ((&mut q).into(), (&mut k).into()),
                Some([from_q, from_k]) => {
                    ((&from_q[..], &mut q).into(), (&from_k[..], &mut k).into())
                }
            };
            let positions = Positions::start(1_000 + call as i64);
            rotator.rotate(&plan, Some(q), Some(k), positions).unwrap();
        }
        [q, k].map(|x| x.into_iter().map(|x| x.widen().to_bits()).collect())
    }

    fn check(&self, calls: usize) {
        let one = self.after(Threads::One, calls);
        let same = one == self.after(Threads::Pool, calls);
        let (tokens, isa, place) = (self.tokens, self.isa.name(), self.sources.is_none());
        let dtype = T::DTYPE;
        assert!(same, "{tokens} tokens of {dtype}, {isa}, in place: {place}");
    }
}

/// So many calls in a row: once some of them have taken a while, short calls are shared as well.
fn check_sizes<T: Element>(isa: Isa, bytes: &[usize], calls: &[usize]) {
    for bytes in bytes {
        for off in [-1, 0, 1] {
            let tokens = (bytes / bytes_of_token::<T>()).saturating_add_signed(off);
            for calls in calls {
                Case::<T>::new(isa, tokens.max(1), true).check(*calls);
                Case::<T>::new(isa, tokens.max(1), false).check(*calls);
            }
        }
    }
}

/// Around what calls of plain Rust need to be shared, in a row and one by one, and beyond: of all
/// variants it needs the fewest bytes for that.
fn check_all() {
    check_sizes::<f32>(Isa::Scalar, &[0, 24 << 10, 48 << 10], &[1, 130]);
    check_sizes::<f32>(Isa::Scalar, &[900_000, 3 << 20], &[1]);
    check_sizes::<f16>(Isa::Scalar, &[8 << 10], &[130]);
    check_sizes::<f16>(Isa::Scalar, &[300_000], &[1]);
    check_sizes::<bf16>(Isa::Scalar, &[16 << 10], &[130]);
    check_sizes::<bf16>(Isa::Scalar, &[600_000], &[1]);
}

fn pool(threads: usize) -> ThreadPool {
    let builder = ThreadPoolBuilder::new().num_threads(threads);
    builder.build().unwrap()
}

#[test]
fn outside_of_any_pool() {
    check_all();
}

#[test]
fn inside_of_pools_of_any_size() {
    for threads in [1, 2, 7, 64] {
        pool(threads).install(check_all);
    }
}

#[test]
fn inside_of_a_pool_within_another() {
    let (outer, inner) = (pool(2), pool(3));
    outer.install(|| {
        check_all();
        inner.install(check_all);
        check_all();
    });
}

#[test]
fn from_many_threads_at_once() {
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(check_all);
        }
    });
    pool(4).broadcast(|_| check_all());
}

/// The variant in use, around what it needs to be shared.
#[test]
fn with_the_fastest_variant() {
    let check = || {
        check_sizes::<f32>(Isa::best(), &[1 << 20, 5 << 18], &[1, 200]);
        check_sizes::<f32>(Isa::best(), &[45_000_000], &[1]);
        check_sizes::<bf16>(Isa::best(), &[960_000], &[1, 200]);
    };
    check();
    pool(2).install(check);
}

/// One token has heads only to share, and k fewer of them than there are parts; a few tokens have both.
#[test]
fn of_few_tokens() {
    for tokens in [1, 2, 3] {
        let heads = [3_000, 2];
        let layouts = heads.map(|heads| Layout::tokens(tokens, heads, HEAD_DIM));
        let rope = Rope::new(
            Frequencies::from_theta(10_000.0, HEAD_DIM).unwrap(),
            Pairing::Interleaved,
        );
        let run = |threads| {
            let host = Host::new().with_isa(Isa::Scalar).unwrap();
            let rotator = host.with_threads(threads).rotator(&rope);
            let [q, k] = layouts;
            let plan = rotator.plan(&Problem::new(f32::DTYPE).q(q).k(k)).unwrap();
            let [mut q, mut k] = heads.map(|heads| vec![0.75f32; tokens * heads * HEAD_DIM]);
            let positions = Positions::start(77);
            let (to_q, to_k) = ((&mut q).into(), (&mut k).into());
            rotator
                .rotate(&plan, Some(to_q), Some(to_k), positions)
                .unwrap();
            [q, k].map(|x| x.into_iter().map(f32::to_bits).collect::<Vec<_>>())
        };
        let one = run(Threads::One);
        for threads in [2, 7] {
            let pooled = pool(threads).install(|| run(Threads::Pool));
            assert!(pooled == one, "{tokens} tokens, {threads} threads");
        }
    }
}

/// All threads of the global pool, and all but the caller's of another, wait until the calls have ended.
#[test]
fn on_blocked_pools() {
    let global = rayon::current_num_threads();
    let block = |barriers: &[Arc<Barrier>; 2]| {
        for barrier in barriers {
            barrier.wait();
        }
    };
    let barriers = |threads| [(); 2].map(|()| Arc::new(Barrier::new(threads)));

    let all = barriers(global + 1);
    let of_helpers = all.clone();
    rayon::spawn_broadcast(move |_| block(&of_helpers));
    all[0].wait();
    check_all();
    all[1].wait();

    let (pool, all) = (pool(3), barriers(3));
    for _ in 0..2 {
        let of_helper = all.clone();
        pool.spawn(move || block(&of_helper));
    }
    pool.install(|| {
        all[0].wait();
        check_all();
        all[1].wait();
    });
}

/// A norm across heads takes all heads of a token, which are not shared among threads then.
#[test]
fn of_a_norm_across_heads() {
    let heads = 3_000;
    let layout = Layout::tokens(1, heads, HEAD_DIM);
    let rope = Rope::new(
        Frequencies::from_theta(10_000.0, HEAD_DIM).unwrap(),
        Pairing::HalfSplit,
    );
    let run = |threads| {
        let host = Host::new().with_isa(Isa::Scalar).unwrap();
        let rotator = host.with_threads(threads).rotator(&rope);
        let norm = HeadNorm::rms(1e-6).across_heads();
        let problem = Problem::new(f32::DTYPE)
            .q(layout)
            .q_stages(Stages::new().norm(norm));
        let plan = rotator.plan(&problem).unwrap();
        let mut q: Vec<f32> = (0..heads * HEAD_DIM).map(|i| (i % 1013) as f32).collect();
        let step = HostStep::new(Positions::start(77)).q(&mut q);
        assert_eq!(rotator.step(&plan, step), Ok(Stored::All));
        q.into_iter().map(f32::to_bits).collect::<Vec<_>>()
    };
    let one = run(Threads::One);
    for threads in [2, 7] {
        assert!(
            pool(threads).install(|| run(Threads::Pool)) == one,
            "{threads}"
        );
    }
}
