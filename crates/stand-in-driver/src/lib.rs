//! What tests load in place of CUDA's driver, cublasLt and NCCL, where there is no GPU: one library with as
//! much of the three as phasor's crates call. Device memory is the interpreter's, which runs what is launched
//! and reports every access outside of a buffer, every read of what nothing wrote, and every race.
//!
//! Calls do their work before they return, whatever their stream; a capture keeps launches for its graph, and
//! all else that works on memory is refused until it ends. A launch that may begin early is run
//! as one: it must wait before it reads what launches before it wrote. Memory is never freed. `scripts/stand-in-driver` builds it and runs a command with it.
//!
//! An assertion that fails here ends the process, as it is called from C.

mod cublaslt;
mod driver;
mod nccl;

use ptx_interpreter::{Launch, Memory, Module};
use std::ffi::c_void;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

/// A handle, or an address of the host's.
type Pointer = *mut c_void;
/// 0, or what went wrong, in the numbers of the library that is stood in for.
type Status = i32;

/// PTX that was loaded.
struct LoadedModule {
    module: Module,
    text: String,
}

impl LoadedModule {
    /// What it was compiled for: 90 for `.target sm_90`.
    fn target(&self) -> i32 {
        let after = self.text.split_once(".target sm_");
        let target = after.and_then(|(_, after)| after.split(|c: char| !c.is_ascii_digit()).next());
        target.and_then(|target| target.parse().ok()).unwrap_or(0)
    }
}

/// A kernel of it.
struct Function {
    of: &'static LoadedModule,
    name: String,
    /// Bytes of its parameters.
    parameters: Vec<usize>,
}

struct KernelLaunch {
    function: &'static Function,
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: usize,
    /// Whether it may begin while what was launched before still runs. The interpreter tells what a kernel
    /// then does too early.
    dependent: bool,
    parameters: Vec<u8>,
}

struct Device {
    memory: Memory,
    /// The stream that is being captured, and its launches.
    capture: Option<(usize, Vec<KernelLaunch>)>,
    handles: usize,
}

static DEVICE: LazyLock<Mutex<Device>> = LazyLock::new(|| {
    Mutex::new(Device {
        memory: Memory::new(),
        capture: None,
        handles: 0,
    })
});

fn device() -> MutexGuard<'static, Device> {
    DEVICE.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Device {
    /// Memory, to work on when all work before has ended; or why that is refused.
    fn settled(&mut self) -> Result<&mut Memory, Status> {
        const CAPTURE_UNSUPPORTED: Status = 900;
        if self.capture.is_some() {
            return Err(CAPTURE_UNSUPPORTED);
        }
        self.memory.earlier_work_has_ended();
        Ok(&mut self.memory)
    }

    /// A handle of something that has no state.
    fn handle(&mut self) -> Pointer {
        self.handles += 1;
        std::ptr::without_provenance_mut(self.handles << 4)
    }

    fn run(&mut self, launch: &KernelLaunch) -> Status {
        const LAUNCH_FAILED: Status = 719;
        let KernelLaunch {
            function,
            grid,
            block,
            shared_bytes,
            dependent,
            ref parameters,
        } = *launch;
        let mut run = Launch::new(&function.name, grid, block, parameters);
        run.dynamic_shared = shared_bytes;
        run.dependent = dependent;
        match ptx_interpreter::run(&function.of.module, &mut self.memory, &run) {
            Ok(_) => {
                self.memory.last_launch_may_still_run(dependent);
                0
            }
            Err(fault) => {
                eprintln!("{}: {fault}", function.name);
                LAUNCH_FAILED
            }
        }
    }
}

/// Hands out what is never freed, as what it is for lives as long as a test.
fn leak<T>(value: T) -> Pointer {
    std::ptr::from_mut(Box::leak(Box::new(value))).cast()
}

/// Functions that do nothing, successfully.
macro_rules! nothing {
    ($($name:ident($($arg:ty),*)),* $(,)?) => {$(
        #[unsafe(no_mangle)]
        extern "C" fn $name($(_: $arg),*) -> $crate::Status {
            0
        }
    )*};
}
use nothing;
