//! Sums over devices by the few functions of NCCL that they need, loaded when they are first used. The
//! numbers below are those of `nccl.h`, the same from 2.10 on.

use super::library::{self, functions};
use super::{CudaCollective, CudaPart, During, expect_context, wait_for};
use crate::AttentionError;
use crate::error::agree;
use phasor::cuda::Cuda;
use phasor::cudarc::driver::sys::CUstream;
use phasor::cudarc::driver::{DevicePtrMut, DeviceRepr, DeviceSlice};
use phasor::{Dtype, Element};
use std::ffi::{CStr, OsStr, c_char, c_int, c_void};
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, PoisonError};

/// The name that NVIDIA gives it, then that of a development package. There is none for Windows.
const LIBRARIES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
/// The first that has bf16, as `ncclGetVersion` counts.
const OLDEST: c_int = 2_10_00;

const FLOAT16: c_int = 6;
const FLOAT32: c_int = 7;
const BFLOAT16: c_int = 9;
const SUM: c_int = 0;
const IN_PROGRESS: Status = 7;

/// `ncclComm_t`.
type Handle = *mut c_void;
/// `ncclResult_t`.
type Status = c_int;

/// What the ranks of one communicator have in common: one process makes it and sends it to the others, as
/// bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NcclUniqueId([u8; 128]);

impl NcclUniqueId {
    /// What another process sent.
    pub const fn from_bytes(bytes: [u8; 128]) -> Self {
        Self(bytes)
    }

    /// What to send to another process.
    pub const fn to_bytes(self) -> [u8; 128] {
        self.0
    }
}

functions! {
    version: "ncclGetVersion" (*mut c_int) -> Status,
    error_string: "ncclGetErrorString" (Status) -> *const c_char,
    unique_id: "ncclGetUniqueId" (*mut NcclUniqueId) -> Status,
    init_rank: "ncclCommInitRank" (*mut Handle, c_int, NcclUniqueId, c_int) -> Status,
    async_error: "ncclCommGetAsyncError" (Handle, *mut Status) -> Status,
    destroy: "ncclCommDestroy" (Handle) -> Status,
    abort: "ncclCommAbort" (Handle) -> Status,
    all_reduce: "ncclAllReduce"
        (*const c_void, *mut c_void, usize, c_int, c_int, Handle, CUstream) -> Status,
    group_start: "ncclGroupStart" () -> Status,
    group_end: "ncclGroupEnd" () -> Status,
}

impl Functions {
    fn done(&self, operation: &'static str, status: Status) -> Result<(), AttentionError> {
        let reason = match status {
            0 => return Ok(()),
            IN_PROGRESS => "which is not waited for: NCCL_COMM_BLOCKING must not be 0".to_string(),
            _ => {
                // SAFETY: any number may be asked for; what is returned is null or a string of the library,
                // which stays loaded.
                let text = unsafe {
                    let text = (self.error_string)(status);
                    (!text.is_null()).then(|| CStr::from_ptr(text))
                };
                text.map_or_else(Default::default, |text| text.to_string_lossy().into())
            }
        };
        Err(AttentionError::Nccl {
            operation,
            status,
            reason,
        })
    }

    /// Calls of several communicators as one, which a thread that has several of them needs. What begins a
    /// group ends it, whatever the calls return.
    fn group(
        &self,
        operation: &'static str,
        calls: impl FnOnce() -> Result<(), AttentionError>,
    ) -> Result<(), AttentionError> {
        // SAFETY: these take no arguments, and count for this thread only.
        self.done(operation, unsafe { (self.group_start)() })?;
        let called = calls();
        // SAFETY: likewise.
        let ended = unsafe { (self.group_end)() };
        called?;
        self.done(operation, ended)
    }
}

/// NCCL, loaded. Cheap to clone.
#[derive(Clone)]
pub struct Nccl {
    functions: Arc<Functions>,
    version: c_int,
}

impl std::fmt::Debug for Nccl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [major, minor, patch] = self.version();
        write!(f, "NCCL {major}.{minor}.{patch}")
    }
}

/// Major, minor and patch of what `ncclGetVersion` says, which counted otherwise before 2.9.
fn parts(version: c_int) -> [u32; 3] {
    let version = version.unsigned_abs();
    let of_major = if version < 10_000 { 1000 } else { 10_000 };
    [version / of_major, version % of_major / 100, version % 100]
}

impl Nccl {
    /// Loads the library by its usual names.
    ///
    /// # Errors
    /// [`AttentionError::NoNccl`] if there is none, or an old one.
    pub fn new() -> Result<Self, AttentionError> {
        // SAFETY: what has these names is NCCL.
        unsafe { Self::load(&LIBRARIES) }
    }

    /// Loads the library at a path.
    ///
    /// # Safety
    /// What lies there is NCCL.
    ///
    /// # Errors
    /// [`AttentionError::NoNccl`].
    pub unsafe fn open(path: impl AsRef<OsStr>) -> Result<Self, AttentionError> {
        // SAFETY: the caller's promise.
        unsafe { Self::load(&[path]) }
    }

    /// # Safety
    /// What has one of these names is NCCL.
    unsafe fn load<S: AsRef<OsStr>>(names: &[S]) -> Result<Self, AttentionError> {
        // SAFETY: the caller's promise; the signatures are those of nccl.h.
        let functions = unsafe { library::load(names, |library| Functions::of(library)) }
            .map_err(|reason| AttentionError::NoNccl { reason })?;
        let mut version = 0;
        // SAFETY: the number is written.
        functions.done("asking for its version", unsafe {
            (functions.version)(&mut version)
        })?;
        if version < OLDEST {
            let [major, minor, patch] = parts(version);
            return Err(AttentionError::NoNccl {
                reason: format!("version {major}.{minor}.{patch} is too old"),
            });
        }
        Ok(Self {
            functions: Arc::new(functions),
            version,
        })
    }

    /// Major, minor, patch.
    pub fn version(&self) -> [u32; 3] {
        parts(self.version)
    }

    /// What all ranks of one collective are given.
    ///
    /// # Errors
    /// [`AttentionError::Nccl`], for a host without a network interface, say.
    pub fn unique_id(&self) -> Result<NcclUniqueId, AttentionError> {
        let mut id = NcclUniqueId([0; 128]);
        // SAFETY: the id is written.
        self.functions.done("making an id", unsafe {
            (self.functions.unique_id)(&mut id)
        })?;
        Ok(id)
    }

    /// All devices of a collective, which this process has: each of them once.
    ///
    /// # Errors
    /// Those of [`join`](Self::join).
    pub fn of_process(&self, devices: &[&Cuda]) -> Result<NcclCollective, AttentionError> {
        let of: Vec<_> = devices.iter().copied().enumerate().collect();
        self.join(&self.unique_id()?, devices.len(), &of)
    }

    /// Some of `ranks` devices, by their ranks. Waits until the others have joined, in this process or
    /// others.
    ///
    /// # Errors
    /// [`AttentionError::Value`] for no devices, and ranks that are not below `ranks` or given twice;
    /// [`AttentionError::Nccl`], [`AttentionError::Step`] for errors of the driver.
    pub fn join(
        &self,
        id: &NcclUniqueId,
        ranks: usize,
        devices: &[(usize, &Cuda)],
    ) -> Result<NcclCollective, AttentionError> {
        let of: Vec<_> = devices.iter().map(|&(rank, _)| rank).collect();
        let devices: Vec<Cuda> = devices.iter().map(|&(_, cuda)| cuda.clone()).collect();
        Ok(NcclCollective {
            // NCCL takes the thread's device.
            communicators: Communicators::join(self, id, ranks, &of, |at| bind(&devices[at]))?,
            devices,
        })
    }
}

fn bind(cuda: &Cuda) -> Result<(), AttentionError> {
    let bound = cuda.context().bind_to_thread();
    bound.during("binding the context")
}

/// Communicators of some ranks, in host's terms: streams and elements are addresses.
struct Communicators {
    functions: Arc<Functions>,
    handles: Vec<Handle>,
    /// One communicator takes calls of one thread at a time.
    turn: Mutex<()>,
    /// Whether their work could not be waited for.
    lost: bool,
}

// SAFETY: communicators may be used from any thread, by one at a time, for which there is a lock.
unsafe impl Send for Communicators {}
// SAFETY: likewise.
unsafe impl Sync for Communicators {}

impl Communicators {
    /// `bind` makes the device of one of `of` the thread's.
    fn join(
        nccl: &Nccl,
        id: &NcclUniqueId,
        ranks: usize,
        of: &[usize],
        bind: impl Fn(usize) -> Result<(), AttentionError>,
    ) -> Result<Self, AttentionError> {
        let number = |what, value: usize, remedy| {
            c_int::try_from(value).map_err(|_| AttentionError::Value {
                what,
                value,
                remedy,
            })
        };
        if of.is_empty() {
            return Err(AttentionError::Value {
                what: "devices of this process",
                value: 0,
                remedy: "a process without any has no part in a sum",
            });
        }
        let all = number("ranks", ranks, "NCCL counts them in 32 bits")?;
        for (at, &rank) in of.iter().enumerate() {
            if rank >= ranks || of[..at].contains(&rank) {
                return Err(AttentionError::Value {
                    what: "the rank of a device",
                    value: rank,
                    remedy: "ranks are from 0 on, below their number, each once",
                });
            }
        }
        // In a group, one that did not join would have the others wait for it.
        (0..of.len()).try_for_each(&bind)?;
        let functions = &nccl.functions;
        let mut handles = vec![null_mut(); of.len()];
        // What NCCL made before an error it has freed, or not finished: there is nothing to destroy then.
        functions.group("joining", || {
            for (at, &rank) in of.iter().enumerate() {
                bind(at)?;
                // A rank is below a number that fits.
                let rank = rank as c_int;
                // SAFETY: the handle is written by the end of the group, until when it lies there.
                functions.done("joining", unsafe {
                    (functions.init_rank)(&mut handles[at], all, *id, rank)
                })?;
            }
            Ok(())
        })?;
        Ok(Self {
            functions: functions.clone(),
            handles,
            turn: Mutex::new(()),
            lost: false,
        })
    }

    /// What NCCL noticed since, as when another rank ended.
    fn check(&self) -> Result<(), AttentionError> {
        for &handle in &self.handles {
            let mut status = 0;
            // SAFETY: the communicator is alive; the status is written.
            let asked = unsafe { (self.functions.async_error)(handle, &mut status) };
            self.functions.done("asking for errors", asked)?;
            self.functions.done("earlier work", status)?;
        }
        Ok(())
    }

    /// Enqueues the sum of `len` elements in place: an address and a stream of each device.
    ///
    /// # Safety
    /// The addresses are of so many elements of that type, of the devices, which nothing else touches until
    /// the work has run; the streams are of the devices.
    unsafe fn all_reduce_sum(
        &self,
        dtype: Dtype,
        len: usize,
        parts: &[(u64, CUstream)],
        bind: impl Fn(usize) -> Result<(), AttentionError>,
    ) -> Result<(), AttentionError> {
        let element = match dtype {
            Dtype::F32 => FLOAT32,
            Dtype::F16 => FLOAT16,
            Dtype::Bf16 => BFLOAT16,
            _ => {
                return Err(AttentionError::Dtype {
                    dtype,
                    remedy: "sums over devices take f32, f16 and bf16",
                });
            }
        };
        agree("parts of a sum", self.handles.len(), parts.len())?;
        (0..parts.len()).try_for_each(&bind)?;
        let functions = &self.functions;
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        functions.group("a sum", || {
            for (at, (&handle, &(address, stream))) in self.handles.iter().zip(parts).enumerate() {
                bind(at)?;
                let part = std::ptr::without_provenance_mut::<c_void>(address as usize);
                // SAFETY: the communicator is alive and this thread's meanwhile; the rest is the caller's
                // promise.
                functions.done("a sum", unsafe {
                    (functions.all_reduce)(part, part, len, element, SUM, handle, stream)
                })?;
            }
            Ok(())
        })
    }
}

impl Drop for Communicators {
    fn drop(&mut self) {
        // One that is destroyed may wait for other ranks, which is in vain after an error.
        let end = match self.lost || self.check().is_err() {
            true => self.functions.abort,
            false => self.functions.destroy,
        };
        for &handle in &self.handles {
            // SAFETY: NCCL made it, and nothing has it any more.
            unsafe { end(handle) };
        }
    }
}

/// Sums over devices by NCCL, of which this process has some. Parts are added up in their element type, in
/// NCCL's order: results are the same on all devices, and near [`LocalCollective`](crate::LocalCollective)'s.
///
/// A call can be captured in a graph. Dropping it waits for the devices' work; after an error that NCCL
/// noticed it gives the work up.
pub struct NcclCollective {
    communicators: Communicators,
    /// After the communicators, so that contexts outlive them.
    devices: Vec<Cuda>,
}

impl std::fmt::Debug for NcclCollective {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = f.debug_struct("NcclCollective");
        shown
            .field("devices", &self.devices)
            .finish_non_exhaustive()
    }
}

impl NcclCollective {
    /// What NCCL noticed of earlier work, as when another rank ended. Work in flight may never end then:
    /// drop this.
    ///
    /// # Errors
    /// [`AttentionError::Nccl`].
    pub fn check(&self) -> Result<(), AttentionError> {
        self.communicators.check()
    }
}

impl<T: Element + DeviceRepr> CudaCollective<T> for NcclCollective {
    fn devices(&self) -> usize {
        self.devices.len()
    }

    /// Its errors are also [`AttentionError::Step`] for streams and elements of other contexts, and
    /// [`AttentionError::Nccl`].
    fn all_reduce_sum(&self, parts: &mut [CudaPart<'_, T>]) -> Result<(), AttentionError> {
        agree("parts of a sum", self.devices.len(), parts.len())?;
        let len = parts.first().map_or(0, |part| part.elements.len());
        for (part, cuda) in parts.iter().zip(&self.devices) {
            let elements = &part.elements;
            agree("elements of a device's part of a sum", len, elements.len())?;
            expect_context("the stream", part.stream.context(), cuda.context())?;
            expect_context(
                "a part of a sum",
                elements.stream().context(),
                cuda.context(),
            )?;
        }
        if len == 0 {
            return Ok(());
        }
        let mut addresses = Vec::with_capacity(parts.len());
        let mut guards = Vec::with_capacity(parts.len());
        for part in parts {
            let (address, guard) = part.elements.device_ptr_mut(part.stream);
            addresses.push((address, part.stream.cu_stream()));
            guards.push(guard);
        }
        // SAFETY: lengths and contexts were compared just now; the guards, dropped after this, order the work
        // with other uses of the elements.
        unsafe {
            self.communicators
                .all_reduce_sum(T::DTYPE, len, &addresses, |at| bind(&self.devices[at]))
        }
    }
}

impl Drop for NcclCollective {
    fn drop(&mut self) {
        // What is in flight uses the communicators.
        self.communicators.lost = self.check().is_err()
            || self
                .devices
                .iter()
                .any(|cuda| wait_for(cuda.context()).is_err());
    }
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests;
