//! NCCL of one rank, whose sums are what they are sums of. (Sums of several are in
//! `crates/phasor-attention/tests/support/fake_nccl.c`, over host memory.)

use crate::{Pointer, Status, device, nothing};
use std::ffi::{c_char, c_int};

nothing! {
    ncclGroupStart(),
    ncclGroupEnd(),
    ncclCommDestroy(Pointer),
    ncclCommAbort(Pointer),
}

/// `ncclUniqueId`.
#[repr(C)]
struct UniqueId([u8; 128]);

#[unsafe(no_mangle)]
extern "C" fn ncclGetErrorString(_: Status) -> *const c_char {
    c"an error".as_ptr()
}

/// # Safety
/// `to` is for an int.
#[unsafe(no_mangle)]
unsafe extern "C" fn ncclGetVersion(to: *mut c_int) -> Status {
    // SAFETY: the caller's promise.
    unsafe { to.write(2_27_03) };
    0
}

/// # Safety
/// `to` is for an id.
#[unsafe(no_mangle)]
unsafe extern "C" fn ncclGetUniqueId(to: *mut UniqueId) -> Status {
    // SAFETY: the caller's promise.
    unsafe { to.write(UniqueId([7; 128])) };
    0
}

/// # Safety
/// `to` is for a communicator.
#[unsafe(no_mangle)]
unsafe extern "C" fn ncclCommInitRank(
    to: *mut Pointer,
    ranks: c_int,
    id: UniqueId,
    rank: c_int,
) -> Status {
    assert_eq!((ranks, rank, id.0), (1, 0, [7; 128]));
    // SAFETY: the caller's promise.
    unsafe { to.write(device().handle()) };
    0
}

/// # Safety
/// `to` is for a status.
#[unsafe(no_mangle)]
unsafe extern "C" fn ncclCommGetAsyncError(_: Pointer, to: *mut Status) -> Status {
    // SAFETY: the caller's promise.
    unsafe { to.write(0) };
    0
}

#[unsafe(no_mangle)]
extern "C" fn ncclAllReduce(
    from: u64,
    to: u64,
    count: usize,
    element: c_int,
    operation: c_int,
    _: Pointer,
    _: Pointer,
) -> Status {
    let size = match element {
        7 => 4,
        6 | 9 => 2,
        _ => panic!("elements of type {element}"),
    };
    assert_eq!((from, operation), (to, 0));
    assert!(
        device().memory.read(from, count * size).is_some(),
        "elements that are there"
    );
    0
}
