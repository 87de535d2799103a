//! Against a library that stands in for NCCL, `tests/support/fake_nccl.c`, whose elements are in host memory.

use super::*;
use phasor::half::{bf16, f16};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Barrier;

const NOTHING: fn(usize) -> Result<(), AttentionError> = |_| Ok(());

/// A library of one test's own, so that its calls are too.
struct Fake {
    nccl: Nccl,
    library: libloading::Library,
}

fn build(test: &str, defines: &[&str]) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("phasor-nccl-{}-{test}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("libnccl.so.2");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/fake_nccl.c");
    let compiler = std::env::var("CC").unwrap_or("cc".into());
    let mut command = Command::new(compiler);
    command.args([
        "-Wall", "-Werror", "-O1", "-shared", "-fPIC", "-pthread", "-o",
    ]);
    command.arg(&path).arg(source).args(defines);
    let built = command
        .output()
        .expect("a C compiler, which Rust links with");
    assert!(
        built.status.success(),
        "{}",
        String::from_utf8_lossy(&built.stderr)
    );
    path
}

impl Fake {
    fn new(test: &str) -> Self {
        let path = build(test, &["-DVERSION=21005"]);
        // SAFETY: it has NCCL's functions, as far as they are called here, and two of its own.
        let fake = unsafe {
            Self {
                nccl: Nccl::open(&path).unwrap(),
                library: libloading::Library::new(&path).unwrap(),
            }
        };
        // It stays loaded without.
        std::fs::remove_dir_all(path.parent().unwrap()).unwrap();
        fake
    }

    /// All calls so far, without those that came before.
    fn calls(&self, before: usize) -> Vec<String> {
        // SAFETY: the text is the library's, and no other thread adds to it when it is asked for.
        let text = unsafe {
            let calls = self
                .library
                .get::<unsafe extern "C" fn() -> *const c_char>(b"fake_calls\0");
            CStr::from_ptr(calls.unwrap()()).to_str().unwrap()
        };
        text.lines().skip(before).map(str::to_string).collect()
    }

    fn answer(&self, name: &str, status: Status) {
        let name = std::ffi::CString::new(name).unwrap();
        // SAFETY: the string is copied.
        unsafe {
            let answer = self
                .library
                .get::<unsafe extern "C" fn(*const c_char, Status)>(b"fake_answer\0");
            answer.unwrap()(name.as_ptr(), status);
        }
    }

    fn join(&self, ranks: usize, of: &[usize]) -> Result<Communicators, AttentionError> {
        Communicators::join(&self.nccl, &self.nccl.unique_id()?, ranks, of, NOTHING)
    }
}

/// The sum of parts in host memory.
fn reduce<T: Element>(
    communicators: &Communicators,
    parts: &mut [Vec<T>],
) -> Result<(), AttentionError> {
    let len = parts[0].len();
    let addresses: Vec<_> = parts
        .iter_mut()
        .enumerate()
        .map(|(at, part)| {
            let stream = std::ptr::without_provenance_mut(70 + at);
            (part.as_mut_ptr().expose_provenance() as u64, stream)
        })
        .collect();
    // SAFETY: the stand-in sums host memory, of these lengths, before it returns.
    unsafe { communicators.all_reduce_sum(T::DTYPE, len, &addresses, NOTHING) }
}

/// What a rank adds: values whose sums all types have.
fn part<T: Element>(rank: usize) -> Vec<T> {
    (0..9)
        .map(|i| T::narrow((rank * 9 + i) as f32 * 0.25 - 3.0))
        .collect()
}

fn sum<T: Element>(ranks: usize) -> Vec<T> {
    let of = |i: usize| (0..ranks).map(|rank| part::<T>(rank)[i].widen()).sum();
    (0..9).map(|i| T::narrow(of(i))).collect()
}

/// Two threads, as processes are: one has a rank, the other two.
fn sums_of_threads<T: Element + PartialEq + std::fmt::Debug>(fake: &Fake) {
    let id = fake.nccl.unique_id().unwrap();
    let all_there = Barrier::new(2);
    std::thread::scope(|scope| {
        for of in [&[1][..], &[2, 0]] {
            let (all_there, id, nccl) = (&all_there, &id, &fake.nccl);
            scope.spawn(move || {
                let sent = NcclUniqueId::from_bytes(id.to_bytes());
                let communicators = Communicators::join(nccl, &sent, 3, of, NOTHING).unwrap();
                for _ in 0..2 {
                    let mut parts: Vec<Vec<T>> = of.iter().map(|&rank| part(rank)).collect();
                    reduce(&communicators, &mut parts).unwrap();
                    assert!(parts.iter().all(|part| *part == sum(3)), "{parts:?}");
                }
                communicators.check().unwrap();
                all_there.wait();
            });
        }
    });
}

#[test]
fn ranks_of_threads_have_the_sum_of_all() {
    let fake = Fake::new("threads");
    assert_eq!(format!("{:?}", fake.nccl), "NCCL 2.10.5");
    sums_of_threads::<f32>(&fake);
    sums_of_threads::<f16>(&fake);
    sums_of_threads::<bf16>(&fake);
    let calls = fake.calls(0);
    let count = |line: &str| calls.iter().filter(|call| call.starts_with(line)).count();
    for rank in 0..3 {
        assert_eq!(count(&format!("ncclCommDestroy {rank}")), 3);
        for element in [7, 6, 9] {
            let stream = if rank == 0 { 71 } else { 70 };
            let line = format!(
                "ncclAllReduce 9 of type {element} by 0, rank {rank}, stream {stream}, in place"
            );
            assert_eq!(count(&line), 2, "{line}: {calls:?}");
        }
    }
    assert_eq!(count("ncclCommAbort") + count("ended twice"), 0);
}

#[test]
fn a_thread_with_all_ranks_groups_its_calls() {
    let fake = Fake::new("group");
    let communicators = fake.join(2, &[0, 1]).unwrap();
    let mut parts = [part::<f32>(0), part(1)];
    reduce(&communicators, &mut parts).unwrap();
    assert_eq!(parts, [sum::<f32>(2), sum::<f32>(2)]);
    drop(communicators);
    assert_eq!(
        fake.calls(0),
        [
            "ncclGetUniqueId",
            "ncclGroupStart",
            "ncclCommInitRank 0 of 2, id 0 to 127",
            "ncclCommInitRank 1 of 2, id 0 to 127",
            "ncclGroupEnd",
            "ncclGroupStart",
            "ncclAllReduce 9 of type 7 by 0, rank 0, stream 70, in place",
            "ncclAllReduce 9 of type 7 by 0, rank 1, stream 71, in place",
            "ncclGroupEnd",
            "ncclCommDestroy 0",
            "ncclCommDestroy 1",
        ]
    );
}

#[test]
fn statuses_become_errors_and_groups_end() {
    let fake = Fake::new("statuses");
    let expect = |result: Result<(), AttentionError>, of: &str, number: Status, text: &str| {
        let error = result.unwrap_err();
        let AttentionError::Nccl {
            operation,
            status,
            ref reason,
        } = error
        else {
            panic!("{error}")
        };
        assert_eq!((operation, status, &reason[..]), (of, number, text));
    };
    fake.answer("ncclGetUniqueId", 5);
    expect(
        fake.nccl.unique_id().map(drop),
        "making an id",
        5,
        "invalid usage",
    );
    fake.answer("ncclGetUniqueId", 0);
    for name in ["ncclGroupStart", "ncclCommInitRank", "ncclGroupEnd"] {
        let before = fake.calls(0).len();
        fake.answer(name, 5);
        expect(
            fake.join(2, &[0, 1]).map(drop),
            "joining",
            5,
            "invalid usage",
        );
        fake.answer(name, 0);
        let calls = fake.calls(before);
        let ended = calls.iter().filter(|call| *call == "ncclGroupEnd").count();
        assert_eq!(ended, usize::from(name != "ncclGroupStart"));
        assert!(
            !calls
                .iter()
                .any(|call| call.contains("Destroy") || call.contains("Abort"))
        );
    }
    let communicators = fake.join(2, &[0, 1]).unwrap();
    let mut parts = [part::<f32>(0), part(1)];
    for (name, status, text) in [
        ("ncclAllReduce", 1, "a fake error"),
        ("ncclGroupStart", 3, "a fake error"),
        ("ncclGroupEnd", 99, ""),
        (
            "ncclAllReduce",
            7,
            "which is not waited for: NCCL_COMM_BLOCKING must not be 0",
        ),
    ] {
        fake.answer(name, status);
        expect(reduce(&communicators, &mut parts), "a sum", status, text);
        fake.answer(name, 0);
    }
    assert_eq!(parts, [part::<f32>(0), part::<f32>(1)]);
    // What failed has no part in what follows.
    reduce(&communicators, &mut parts).unwrap();
    assert_eq!(parts, [sum::<f32>(2), sum::<f32>(2)]);
}

#[test]
fn communicators_of_work_that_is_lost_are_given_up() {
    let fake = Fake::new("lost");
    let ends = |spoil: &dyn Fn(&mut Communicators)| {
        let mut communicators = fake.join(2, &[0, 1]).unwrap();
        let before = fake.calls(0).len();
        spoil(&mut communicators);
        drop(communicators);
        fake.calls(before)
    };
    let aborted = ["ncclCommAbort 0", "ncclCommAbort 1"];
    assert_eq!(ends(&|_| {}), ["ncclCommDestroy 0", "ncclCommDestroy 1"]);
    assert_eq!(ends(&|communicators| communicators.lost = true), aborted);
    for (name, operation) in [
        ("fake error of earlier work", "earlier work"),
        ("ncclCommGetAsyncError", "asking for errors"),
    ] {
        let calls = ends(&|communicators| {
            fake.answer(name, 6);
            assert!(matches!(
                communicators.check(),
                Err(AttentionError::Nccl { operation: of, status: 6, .. }) if of == operation
            ));
        });
        assert_eq!(calls, aborted);
        fake.answer(name, 0);
    }
}

#[test]
fn what_cannot_be_joined_or_summed_is_refused_before_any_call() {
    let fake = Fake::new("refused");
    let communicators = fake.join(2, &[0, 1]).unwrap();
    let id = fake.nccl.unique_id().unwrap();
    let before = fake.calls(0).len();
    let join = |ranks, of: &[usize]| {
        let joined = Communicators::join(&fake.nccl, &id, ranks, of, NOTHING);
        joined.map(drop).unwrap_err()
    };
    for (ranks, of) in [
        (0, &[][..]),
        (2, &[]),
        (2, &[2]),
        (0, &[0]),
        (3, &[1, 1]),
        (1 << 31, &[0]),
    ] {
        let error = join(ranks, of);
        assert!(
            matches!(error, AttentionError::Value { .. }),
            "{ranks} {of:?}: {error}"
        );
    }
    let error = reduce(&communicators, &mut [vec![1.0f32]]).unwrap_err();
    assert!(
        matches!(
            error,
            AttentionError::Mismatch {
                expected: 2,
                got: 1,
                ..
            }
        ),
        "{error}"
    );
    // A device that cannot be bound would have the others wait.
    let unbound = |at| match at {
        0 => Ok(()),
        _ => Err(AttentionError::NoWeight {
            name: "a device".into(),
        }),
    };
    let joined = Communicators::join(&fake.nccl, &id, 2, &[0, 1], unbound);
    assert!(matches!(joined, Err(AttentionError::NoWeight { .. })));
    // SAFETY: refused.
    let error =
        unsafe { communicators.all_reduce_sum(Dtype::F32, 1, &[(0, null_mut()); 2], unbound) };
    assert!(matches!(error, Err(AttentionError::NoWeight { .. })));
    assert!(fake.calls(before).is_empty());
}

#[test]
fn libraries_that_do_not_fit_are_errors() {
    let reason = |path: &str| {
        // SAFETY: whatever lies there has no function of NCCL that is called.
        match unsafe { Nccl::open(path) } {
            Err(error @ AttentionError::NoNccl { .. }) => error.to_string(),
            other => panic!("{other:?}"),
        }
    };
    let absent = reason("/nowhere/libnccl.so.2");
    assert!(
        absent.contains("/nowhere") && absent.contains("Nccl::open"),
        "{absent}"
    );
    assert!(reason("libc.so.6").contains("ncclGetVersion"));
    for (defines, text) in [
        (
            &["-DVERSION=21005", "-DWITHOUT_ALL_REDUCE"][..],
            "ncclAllReduce",
        ),
        (&["-DVERSION=2804"], "version 2.8.4 is too old"),
        (&["-DVERSION=20908"], "version 2.9.8 is too old"),
    ] {
        let path = build(&format!("unfit{}", defines.concat()), defines);
        let said = reason(path.to_str().unwrap());
        assert!(said.contains(text), "{said}");
        std::fs::remove_dir_all(path.parent().unwrap()).unwrap();
    }
    // Nothing is promised of this machine but that there is an answer.
    match Nccl::new() {
        Ok(nccl) => assert!(nccl.version() >= [2, 10, 0]),
        Err(error) => assert!(matches!(error, AttentionError::NoNccl { .. }), "{error}"),
    }
}

/// With the library of the wheel `nvidia-nccl-cu12` or `-cu13`, say, at `PHASOR_NCCL`.
#[test]
#[ignore = "needs the path of libnccl.so.2 in PHASOR_NCCL"]
fn nccl_itself_is_what_is_called() {
    let path = std::env::var_os("PHASOR_NCCL").expect("PHASOR_NCCL is the path of libnccl.so.2");
    // SAFETY: the variable says that it is NCCL.
    let nccl = unsafe { Nccl::open(path) }.unwrap();
    assert!(nccl.version() >= [2, 10, 0]);
    let [a, b] = [(); 2].map(|()| nccl.unique_id().unwrap());
    assert!(a != b);
    // SAFETY: any status may be asked for; the string is the library's.
    let text = unsafe { CStr::from_ptr((nccl.functions.error_string)(5)) };
    assert_eq!(
        text.to_str().unwrap(),
        "invalid usage (run with NCCL_DEBUG=WARN for details)"
    );
    // Without a driver it refuses to join, and says why.
    if phasor::cuda::device_count().is_err() {
        match Communicators::join(&nccl, &a, 1, &[0], NOTHING).map(drop) {
            Err(error @ AttentionError::Nccl { .. }) => println!("{error}"),
            other => panic!("{other:?}"),
        }
    }
    println!("{nccl:?}");
}
