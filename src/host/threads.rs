//! Threads of the current rayon pool that help with a call.
//!
//! The calling thread works too, and never waits for a helper that has not begun: parts of a call are
//! claimed one by one, and whoever comes late finds none left. So a call ends on a pool whose threads
//! are all busy, asleep or blocked, and costs little more than on one thread.
//!
//! Each calling thread has one [`Caller`], which its helpers share with it from call to call. A helper
//! that was asked for in one call and begins in the next helps there; so a thread never has more
//! helpers asked for than its largest call wanted, however many calls a busy pool lets pass.

use std::any::Any;
use std::cell::Cell;
use std::hint;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

// What these rest on: see `docs/host-performance.md`.

/// What a call has to take on one thread for each that works at it, where helpers are awake.
const AWAKE: Duration = Duration::from_micros(4);

/// The same where they have gone to sleep, from [`WORTH_WAKING`] on.
const ASLEEP: Duration = Duration::from_micros(50);

/// What a call has to take on one thread for waking helpers to be worth it. Waking one takes the caller
/// 3 to 11 us, and it begins after 15 to 35. But where the system has it wait for the caller's own core,
/// nobody helps, and even then the call shall hardly take longer than on one thread.
const WORTH_WAKING: Duration = Duration::from_micros(300);

/// How long shorter calls have to follow each other closely for the same: then more are likely to follow.
const SERIES: Duration = Duration::from_micros(500);

/// How long idle threads of a pool stay awake, at least.
const STAY_AWAKE: Duration = Duration::from_micros(10);

/// Parts of a call for each thread: more than one, as threads differ in speed and helpers begin late.
const PARTS: usize = 4;

/// How often a caller looks whether its helpers are done before it sleeps: for some microseconds.
const LOOKS: usize = 500;

/// Calls `work(part, parts)` for each part of `0..parts`, on this thread and, where that is worth it, on
/// others of the current pool. `alone`: how long all of it takes on one thread. `parts`: how many parts
/// there are if so many are asked for.
pub(super) fn share(
    alone: Duration,
    parts: impl FnOnce(usize) -> usize,
    work: &(dyn Fn(usize, usize) + Sync),
) {
    if alone < 2 * AWAKE {
        return work(0, 1);
    }
    let pool = Pool::current();
    if pool.at_once() == 1 {
        return work(0, 1);
    }
    let shared = LOCAL.try_with(|local| {
        let mut series = Series::at(Instant::now(), local.series.get());
        match series.threads(alone, pool) {
            0 | 1 => work(0, 1),
            threads => {
                let parts = parts(PARTS * threads);
                let share = |part| work(part, parts);
                series.helped |= local.caller.share(threads - 1, parts, &share);
            }
        }
        series.ended = Instant::now();
        local.series.set(Some(series));
    });
    // The thread is about to end.
    shared.unwrap_or_else(|_| work(0, 1));
}

#[derive(Clone, Copy, Debug)]
struct Pool {
    threads: usize,
    /// Those of the machine that this process may use.
    cores: usize,
}

impl Pool {
    fn current() -> Self {
        static CORES: OnceLock<usize> = OnceLock::new();
        // Asking reads files on some systems.
        let cores = CORES.get_or_init(|| thread::available_parallelism().map_or(1, usize::from));
        Self {
            // One core needs no pool, which asking would start.
            threads: if *cores == 1 {
                1
            } else {
                rayon::current_num_threads()
            },
            cores: *cores,
        }
    }

    /// How many of its threads can run at once.
    fn at_once(self) -> usize {
        self.threads.min(self.cores)
    }
}

thread_local! {
    static LOCAL: Local = Local {
        series: Cell::default(),
        caller: Arc::new(Caller::of_this_thread()),
    };
}

struct Local {
    series: Cell<Option<Series>>,
    caller: Arc<Caller>,
}

/// Calls of a thread that follow each other so closely that helpers stay awake. Those too short to be
/// shared are left out.
#[derive(Clone, Copy)]
struct Series {
    begun: Instant,
    /// When its last call ended.
    ended: Instant,
    /// Whether anybody helped.
    helped: bool,
}

impl Series {
    /// That of a call that begins now: the last one, or a new one.
    fn at(now: Instant, last: Option<Self>) -> Self {
        let new = Self {
            begun: now,
            ended: now,
            helped: false,
        };
        let goes_on = |last: &Self| now.saturating_duration_since(last.ended) < STAY_AWAKE;
        last.filter(goes_on).unwrap_or(new)
    }

    /// How many threads its next call is worth.
    fn threads(&self, alone: Duration, pool: Pool) -> usize {
        let each = if self.helped || self.ended - self.begun >= SERIES {
            // More threads than cores get in each other's way.
            match pool.threads > pool.cores {
                true => 2 * AWAKE,
                false => AWAKE,
            }
        } else if alone >= WORTH_WAKING {
            ASLEEP
        } else {
            return 1;
        };
        let worth = (alone.as_nanos() / each.as_nanos()) as usize;
        worth.min(pool.at_once())
    }
}

/// What a calling thread shares with its helpers.
struct Caller {
    /// Parts of the open call that nobody has claimed, a range as [`pack`] makes it.
    unclaimed: AtomicU64,
    /// [`DONE`] for each part that helpers have done, and [`WAITS`] while the caller sleeps.
    done: AtomicUsize,
    /// The open call.
    call: AtomicPtr<Call<'static>>,
    /// Helpers that were asked for and have not left.
    helpers: AtomicUsize,
    /// What a part that a helper worked at panicked with.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    thread: Thread,
}

const WAITS: usize = 1;
const DONE: usize = 2;

/// One call, on the caller's stack.
struct Call<'a> {
    work: &'a (dyn Fn(usize) + Sync),
    /// How many helpers may work at it.
    helpers: usize,
}

/// The end of the unclaimed parts that a thread takes from. Where the same buffers come again, each
/// thread finds much of what it left in its cache.
#[derive(Clone, Copy)]
enum End {
    Caller,
    Helper,
}

fn pack(first: u32, end: u32) -> u64 {
    u64::from(end) << 32 | u64::from(first)
}

fn unpack(range: u64) -> (u32, u32) {
    (range as u32, (range >> 32) as u32)
}

impl Caller {
    fn of_this_thread() -> Self {
        Self {
            unclaimed: AtomicU64::new(pack(0, 0)),
            done: AtomicUsize::new(0),
            call: AtomicPtr::default(),
            helpers: AtomicUsize::new(0),
            panic: Mutex::new(None),
            thread: thread::current(),
        }
    }

    /// Calls `work` for each part of `0..parts`, with up to `helpers` helpers. To be called on the
    /// caller's thread. Whether anybody helped.
    fn share(
        self: &Arc<Self>,
        helpers: usize,
        parts: usize,
        work: &(dyn Fn(usize) + Sync),
    ) -> bool {
        let call = Call { work, helpers };
        self.open(&call, parts);
        let mut own = 0;
        // The call must be closed before it leaves the stack, come what may.
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            loop {
                self.ask(helpers);
                let Some(part) = self.claim(End::Caller) else {
                    break;
                };
                own += 1;
                work(part);
            }
        }));
        self.close(parts, own);
        let of_helper = self.panic.lock().map_or(None, |mut panic| panic.take());
        if let Some(panic) = outcome.err().or(of_helper) {
            resume_unwind(panic);
        }
        own < parts
    }

    /// Lets parts be claimed. No call is open before.
    fn open(&self, call: &Call<'_>, parts: usize) {
        // Nobody reads or writes these meanwhile: the parts of the call before are all done.
        self.done.store(0, Ordering::Relaxed);
        let call: *const Call<'_> = call;
        self.call.store(call.cast_mut().cast(), Ordering::Relaxed);
        // Release: whoever claims a part sees the above.
        let all = pack(0, parts as u32);
        self.unclaimed.store(all, Ordering::Release);
    }

    /// Waits until nobody works at the open call, of whose `parts` the caller claimed `own`. Parts that
    /// are left, as only a panic of the caller's leaves any, are taken back.
    fn close(&self, parts: usize, own: usize) {
        let (first, end) = unpack(self.unclaimed.swap(pack(0, 0), Ordering::Relaxed));
        let left = (end - first) as usize;
        let helped = (parts - own - left) * DONE;
        // Acquire: what each helper wrote, as they count by read-modify-writes.
        for _ in 0..LOOKS {
            if self.done.load(Ordering::Acquire) == helped {
                return;
            }
            hint::spin_loop();
        }
        let mut done = self.done.fetch_or(WAITS, Ordering::Acquire);
        while done & !WAITS != helped {
            thread::park();
            done = self.done.load(Ordering::Acquire);
        }
    }

    /// The next part of the open call, if one is left.
    fn claim(&self, from: End) -> Option<usize> {
        let mut part = 0;
        let claim = |unclaimed| {
            let (first, end) = unpack(unclaimed);
            let rest;
            (part, rest) = match from {
                End::Caller => (first, pack(first + 1, end)),
                End::Helper => (end.wrapping_sub(1), pack(first, end.wrapping_sub(1))),
            };
            (first < end).then_some(rest)
        };
        // Acquire: what the caller wrote before it opened the call. Others that claim in between do
        // not get in the way: theirs are read-modify-writes too.
        self.unclaimed
            .fetch_update(Ordering::Acquire, Ordering::Relaxed, claim)
            .ok()?;
        Some(part as usize)
    }

    /// Asks for one more helper, if parts are left and fewer than `most` have been asked for. Each thread
    /// asks before each of its parts: so no one thread has to wake all the others.
    fn ask(self: &Arc<Self>, most: usize) {
        let (first, end) = unpack(self.unclaimed.load(Ordering::Relaxed));
        let one_more = |helpers| (helpers < most).then_some(helpers + 1);
        let counter = &self.helpers;
        if first < end
            && counter
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more)
                .is_ok()
        {
            let caller = Arc::clone(self);
            rayon::spawn(move || caller.help());
        }
    }

    /// What a helper does: parts of the open call, until none is left.
    fn help(self: Arc<Self>) {
        while let Some(part) = self.claim(End::Helper) {
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                // SAFETY: the claim succeeded, so a call is open, and remains so until the part is
                // counted as done below: `close` waits for that before the call leaves the stack. The
                // claim has seen what was written before the call was opened, this pointer included,
                // and the next one is written only when this call has been closed.
                let call = unsafe { &*self.call.load(Ordering::Relaxed) };
                self.ask(call.helpers);
                (call.work)(part);
            }));
            if let (Err(panic), Ok(mut place)) = (outcome, self.panic.lock()) {
                *place = Some(panic);
            }
            // Release: the caller sees what the part wrote. Nothing of the call is touched from here on.
            if self.done.fetch_add(DONE, Ordering::Release) & WAITS != 0 {
                self.thread.unpark();
            }
        }
        self.helpers.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;
    use std::sync::atomic::AtomicBool;

    fn pool(threads: usize) -> rayon::ThreadPool {
        let builder = rayon::ThreadPoolBuilder::new().num_threads(threads);
        let named = builder.thread_name(|i| format!("helper {i}"));
        named.build().unwrap()
    }

    fn caller() -> Arc<Caller> {
        LOCAL.with(|local| Arc::clone(&local.caller))
    }

    fn wait_until(done: impl Fn() -> bool) {
        while !done() {
            thread::yield_now();
        }
    }

    /// Has another thread than the caller's do one of two parts at least, and gives what it did.
    fn with_help(caller: &Arc<Caller>, work: &(dyn Fn() + Sync)) {
        let (me, helped) = (thread::current().id(), AtomicBool::new(false));
        caller.share(1, 2, &|_| {
            if thread::current().id() == me {
                wait_until(|| helped.load(Ordering::Acquire));
            } else {
                helped.store(true, Ordering::Release);
                work();
            }
        });
    }

    /// Many short calls on buffers that live no longer than the call, with room for helpers to come.
    fn each_part_once(most: usize) {
        let caller = caller();
        for i in 0..1_000 {
            let (helpers, parts) = (i % (most + 1), i % 13);
            let taken: Vec<AtomicUsize> = (0..parts).map(|_| AtomicUsize::new(0)).collect();
            caller.share(helpers, parts, &|part| {
                taken[part].fetch_add(1, Ordering::Relaxed);
                thread::yield_now();
            });
            let taken: Vec<usize> = taken.into_iter().map(AtomicUsize::into_inner).collect();
            assert_eq!(taken, vec![1; parts], "{helpers} helpers");
        }
    }

    #[test]
    fn each_part_is_done_once_wherever_the_call_comes_from() {
        each_part_once(3);
        for threads in [1, 2, 7, 64] {
            let (outer, inner) = (pool(threads), pool(2));
            outer.install(|| each_part_once(threads));
            outer.install(|| inner.install(|| each_part_once(3)));
            // From all threads of the pool at once, and from threads outside.
            outer.broadcast(|_| each_part_once(3));
        }
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| each_part_once(3));
            }
        });
    }

    #[test]
    fn helpers_are_of_the_pool_that_surrounds_the_call() {
        pool(2).install(|| {
            with_help(&caller(), &|| {
                let name = thread::current().name().map(str::to_owned);
                assert!(name.is_some_and(|name| name.starts_with("helper ")));
            });
        });
    }

    /// The caller is done first, and long enough to fall asleep.
    #[test]
    fn the_caller_waits_for_parts_that_helpers_have_begun() {
        pool(2).install(|| {
            let done = AtomicBool::new(false);
            with_help(&caller(), &|| {
                thread::sleep(Duration::from_millis(50));
                done.store(true, Ordering::Relaxed);
            });
            assert!(done.load(Ordering::Relaxed));
        });
    }

    /// Neither waits for the threads that are blocked, nor asks for more of them in each call.
    #[test]
    fn calls_end_on_a_blocked_pool() {
        let (pool, blocked, end) = (
            pool(3),
            Arc::new(Barrier::new(3)),
            Arc::new(Barrier::new(3)),
        );
        for _ in 0..2 {
            let (blocked, end) = (Arc::clone(&blocked), Arc::clone(&end));
            pool.spawn(move || {
                blocked.wait();
                end.wait();
            });
        }
        let caller = pool.install(|| {
            blocked.wait();
            let (caller, me) = (caller(), thread::current().id());
            for _ in 0..1_000 {
                let by_others = caller.share(2, 8, &|_| assert_eq!(thread::current().id(), me));
                assert!(!by_others);
                assert_eq!(caller.helpers.load(Ordering::Relaxed), 2);
            }
            end.wait();
            caller
        });
        // They come in the end, and find nothing to do.
        wait_until(|| caller.helpers.load(Ordering::Relaxed) == 0);
    }

    fn panics_of(call: impl FnOnce()) -> &'static str {
        let panic = catch_unwind(AssertUnwindSafe(call)).unwrap_err();
        panic.downcast_ref::<&str>().copied().unwrap()
    }

    #[test]
    fn a_panic_ends_the_call_and_leaves_nobody_at_work() {
        pool(2).install(|| {
            let caller = caller();
            let call = || with_help(&caller, &|| std::panic::panic_any("a helper's"));
            assert_eq!(panics_of(call), "a helper's");

            // The caller's own, while a helper works, with parts left.
            let me = thread::current().id();
            let [begun, done] = [const { AtomicUsize::new(0) }; 2];
            let call = || {
                caller.share(1, 100, &|_| {
                    if thread::current().id() == me {
                        wait_until(|| begun.load(Ordering::Relaxed) > 0);
                        std::panic::panic_any("the caller's");
                    }
                    begun.fetch_add(1, Ordering::Relaxed);
                    thread::sleep(Duration::from_millis(20));
                    done.fetch_add(1, Ordering::Relaxed);
                });
            };
            assert_eq!(panics_of(call), "the caller's");
            assert_eq!(begun.into_inner(), done.into_inner());

            each_part_once(1);
        });
    }

    const MICROSECOND: Duration = Duration::from_micros(1);

    const TWO: Pool = Pool {
        threads: 2,
        cores: 2,
    };

    #[test]
    fn after_a_rest_only_long_calls_are_shared() {
        let threads = |alone, pool| Series::at(Instant::now(), None).threads(alone, pool);
        let many = Pool {
            threads: 64,
            cores: 64,
        };
        let shorter = WORTH_WAKING - MICROSECOND;
        for (alone, pool, expected) in [
            (shorter, TWO, 1),
            (shorter, many, 1),
            (WORTH_WAKING, TWO, 2),
            (WORTH_WAKING, many, 6),
            (100 * WORTH_WAKING, many, 64),
            (100 * WORTH_WAKING, Pool { cores: 2, ..many }, 2),
            (100 * WORTH_WAKING, Pool { threads: 3, ..many }, 3),
        ] {
            assert_eq!(threads(alone, pool), expected, "{alone:?} {pool:?}");
        }
    }

    /// Which of many calls of 10 us, each so long after the one before, is the first to be shared.
    fn first_shared(gap: Duration) -> Option<usize> {
        let alone = 10 * MICROSECOND;
        let (mut now, mut last) = (Instant::now(), None);
        (0..1_000).find(|_| {
            now += gap;
            let mut series = Series::at(now, last);
            now += alone;
            let shared = series.threads(alone, TWO) > 1;
            series.ended = now;
            last = Some(series);
            shared
        })
    }

    #[test]
    fn short_calls_are_shared_once_a_series_of_them_has_been_long() {
        let before = |gap: u32| (SERIES.as_micros() as u32 + gap).div_ceil(10 + gap) as usize;
        for gap in [0, 1, 9] {
            assert_eq!(first_shared(gap * MICROSECOND), Some(before(gap)), "{gap}");
        }
        assert_eq!(first_shared(STAY_AWAKE), None);
    }

    #[test]
    fn short_calls_are_shared_while_helpers_are_awake() {
        let now = Instant::now();
        let helped = Series {
            begun: now,
            ended: now,
            helped: true,
        };
        let threads =
            |after, alone, pool| Series::at(now + after, Some(helped)).threads(alone, pool);
        let crowded = Pool {
            threads: 64,
            cores: 2,
        };
        assert_eq!(threads(MICROSECOND, 2 * AWAKE, TWO), 2);
        assert_eq!(threads(MICROSECOND, 2 * AWAKE - MICROSECOND, TWO), 1);
        assert_eq!(threads(STAY_AWAKE, 2 * AWAKE, TWO), 1);
        assert_eq!(threads(MICROSECOND, 2 * AWAKE, crowded), 1);
        assert_eq!(threads(MICROSECOND, 4 * AWAKE, crowded), 2);
    }
}
