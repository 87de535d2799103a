//! CUDA's driver: one device of compute capability 9.0.

use crate::{Function, KernelLaunch, LoadedModule, Pointer, Status, device, leak, nothing};
use ptx_interpreter::{Memory, Module};
use std::cell::Cell;
use std::ffi::{CStr, c_char, c_int};
use std::ptr::{null, null_mut, without_provenance_mut};

const INVALID_VALUE: Status = 1;
const INVALID_PTX: Status = 218;
const NOT_FOUND: Status = 500;
const CAPABILITY: [c_int; 2] = [9, 0];

nothing! {
    cuInit(u32),
    cuDevicePrimaryCtxRelease_v2(c_int),
    cuCtxDestroy_v2(Pointer),
    cuStreamDestroy_v2(Pointer),
    cuStreamWaitEvent(Pointer, Pointer, u32),
    cuEventRecord(Pointer, Pointer),
    cuEventDestroy_v2(Pointer),
    cuModuleUnload(Pointer),
    cuGraphDestroy(Pointer),
    cuGraphExecDestroy(Pointer),
}

/// What waits for all work, which a capture refuses.
macro_rules! waiting {
    ($($name:ident($($arg:ty),*)),* $(,)?) => {$(
        #[unsafe(no_mangle)]
        extern "C" fn $name($(_: $arg),*) -> Status {
            with_memory(|_| 0)
        }
    )*};
}

waiting! {
    cuCtxSynchronize(),
    cuStreamSynchronize(Pointer),
    cuMemFree_v2(u64),
    cuMemFreeAsync(u64, Pointer),
}

/// Works on memory, which while a stream is captured would be a node beside kernels: it is refused instead.
fn with_memory(work: impl FnOnce(&mut Memory) -> Status) -> Status {
    device().settled().map_or_else(|refused| refused, work)
}

thread_local! {
    static CONTEXT: Cell<Pointer> = const { Cell::new(null_mut()) };
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSetCurrent(context: Pointer) -> Status {
    CONTEXT.set(context);
    0
}

/// # Safety
/// `to` is for one `T`.
unsafe fn give<T>(to: *mut T, value: T) -> Status {
    // SAFETY: the caller's promise.
    unsafe { to.write(value) };
    0
}

/// Functions that give a value.
macro_rules! giving {
    ($($name:ident($to:ty $(, $arg:ty)*) $value:expr;)*) => {$(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(to: *mut $to $(, _: $arg)*) -> Status {
            // SAFETY: as the driver's documentation has it.
            unsafe { give(to, $value) }
        }
    )*};
}

giving! {
    cuDriverGetVersion(c_int) 13_000;
    cuDeviceGetCount(c_int) 1;
    cuDeviceGet(c_int, c_int) 0;
    cuDevicePrimaryCtxRetain(Pointer, c_int) without_provenance_mut(8);
    cuCtxCreate_v4(Pointer, Pointer, u32, c_int) device().handle();
    cuCtxGetCurrent(Pointer) CONTEXT.get();
    cuStreamCreate(Pointer, u32) device().handle();
    cuEventCreate(Pointer, u32) device().handle();
}

/// # Safety
/// `to` is for an address.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuGetErrorName(_: c_int, to: *mut *const c_char) -> Status {
    // SAFETY: the caller's promise.
    unsafe { give(to, c"CUDA_ERROR".as_ptr()) }
}

/// # Safety
/// That of [`cuGetErrorName`].
#[unsafe(no_mangle)]
unsafe extern "C" fn cuGetErrorString(_: c_int, to: *mut *const c_char) -> Status {
    // SAFETY: the caller's promise.
    unsafe { give(to, c"an error".as_ptr()) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetName(to: *mut c_char, room: c_int, _: c_int) -> Status {
    let name = c"a stand-in".to_bytes_with_nul();
    if (room as usize) < name.len() {
        return INVALID_VALUE;
    }
    // SAFETY: there is as much room.
    unsafe { to.copy_from(name.as_ptr().cast(), name.len()) };
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetAttribute(to: *mut c_int, which: c_int, _: c_int) -> Status {
    const MULTIPROCESSORS: c_int = 16;
    const CAPABILITY_MAJOR: c_int = 75;
    const CAPABILITY_MINOR: c_int = 76;
    let value = match which {
        MULTIPROCESSORS => 132,
        CAPABILITY_MAJOR => CAPABILITY[0],
        CAPABILITY_MINOR => CAPABILITY[1],
        // No pools of memory either, so that it is allocated and freed at once.
        _ => 0,
    };
    // SAFETY: as the driver's documentation has it.
    unsafe { give(to, value) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemAlloc_v2(to: *mut u64, bytes: usize) -> Status {
    with_memory(|memory| {
        let address = memory.add_uninit("memory", bytes, 0);
        memory.set_constant(address);
        // SAFETY: as the driver's documentation has it.
        unsafe { give(to, address) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemAllocAsync(to: *mut u64, bytes: usize, _: Pointer) -> Status {
    // SAFETY: as there.
    unsafe { cuMemAlloc_v2(to, bytes) }
}

/// # Safety
/// `from` has so many bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyHtoDAsync_v2(
    to: u64,
    from: *const u8,
    bytes: usize,
    _: Pointer,
) -> Status {
    with_memory(|memory| {
        // SAFETY: the caller's promise.
        memory.write(to, unsafe { std::slice::from_raw_parts(from, bytes) });
        0
    })
}

/// # Safety
/// `to` has room for so many bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyDtoHAsync_v2(
    to: *mut u8,
    from: u64,
    bytes: usize,
    _: Pointer,
) -> Status {
    with_memory(|memory| match memory.read(from, bytes) {
        Some(read) => {
            // SAFETY: the caller's promise.
            unsafe { to.copy_from(read.as_ptr(), bytes) };
            0
        }
        None => INVALID_VALUE,
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemsetD8Async(to: u64, value: u8, bytes: usize, _: Pointer) -> Status {
    with_memory(|memory| {
        memory.write(to, &vec![value; bytes]);
        0
    })
}

/// # Safety
/// `to` is for an int, and `function` is one of [`cuModuleGetFunction`].
#[unsafe(no_mangle)]
unsafe extern "C" fn cuFuncGetAttribute(to: *mut c_int, which: c_int, function: Pointer) -> Status {
    const PTX_VERSION: c_int = 5;
    // SAFETY: the caller's promise; functions are never freed.
    let function: &'static Function = unsafe { &*function.cast() };
    let value = match which {
        PTX_VERSION => function.of.target(),
        _ => 0,
    };
    // SAFETY: the caller's promise.
    unsafe { give(to, value) }
}

/// # Safety
/// `text` ends with a 0.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleLoadData(to: *mut Pointer, text: *const c_char) -> Status {
    // SAFETY: the caller's promise.
    let text = unsafe { CStr::from_ptr(text) }
        .to_string_lossy()
        .into_owned();
    match Module::parse(&text) {
        // SAFETY: as the driver's documentation has it.
        Ok(module) => unsafe { give(to, leak(LoadedModule { module, text })) },
        Err(error) => {
            eprintln!("{error}");
            INVALID_PTX
        }
    }
}

/// # Safety
/// `module` was loaded, and `name` ends with a 0.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleGetFunction(
    to: *mut Pointer,
    module: Pointer,
    name: *const c_char,
) -> Status {
    // SAFETY: the caller's promise; what is loaded is never freed.
    let (of, name): (&'static LoadedModule, _) =
        unsafe { (&*module.cast::<LoadedModule>(), CStr::from_ptr(name)) };
    let name = name.to_string_lossy().into_owned();
    let after = of.text.split_once(&format!(".entry {name}("));
    let Some((declared, _)) = after.and_then(|(_, after)| after.split_once(')')) else {
        return NOT_FOUND;
    };
    // `.param .u64 name`, or a struct by value: `.param .align 8 .b8 name[bytes]`.
    let sizes = declared.split(',').map(|parameter| {
        if parameter.trim_start().starts_with(".param .u64") {
            return Some(size_of::<u64>());
        }
        let (_, size) = parameter.split_once('[')?;
        size.split_once(']')?.0.parse().ok()
    });
    let Some(parameters) = sizes.collect() else {
        return INVALID_PTX;
    };
    let function = Function {
        of,
        name,
        parameters,
    };
    // SAFETY: as the driver's documentation has it.
    unsafe { give(to, leak(function)) }
}

/// # Safety
/// `function` is one of [`cuModuleGetFunction`], and each of its parameters is at its address.
#[allow(clippy::too_many_arguments, reason = "as the driver has it")]
#[unsafe(no_mangle)]
unsafe extern "C" fn cuLaunchKernel(
    function: Pointer,
    grid_x: u32,
    grid_y: u32,
    grid_z: u32,
    block_x: u32,
    block_y: u32,
    block_z: u32,
    shared_bytes: u32,
    stream: Pointer,
    parameters: *const *const u8,
    extra: Pointer,
) -> Status {
    let config = LaunchConfig {
        grid: [grid_x, grid_y, grid_z],
        block: [block_x, block_y, block_z],
        shared_bytes,
        stream,
        attributes: null(),
        attribute_count: 0,
    };
    // SAFETY: the caller's promise.
    unsafe { cuLaunchKernelEx(&config, function, parameters, extra) }
}

/// `CUlaunchConfig`.
#[repr(C)]
struct LaunchConfig {
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    stream: Pointer,
    attributes: *const LaunchAttribute,
    attribute_count: u32,
}

/// `CUlaunchAttribute`, whose value is an int where it is
/// `CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION`.
#[repr(C, align(8))]
struct LaunchAttribute {
    id: u32,
    padding: [u8; 4],
    allowed: c_int,
    unused: [u8; 60],
}

const _: () = {
    // As cuda.h has them on 64-bit systems.
    assert!(size_of::<LaunchAttribute>() == 72);
    assert!(size_of::<LaunchConfig>() == 56);
};

/// # Safety
/// Those of [`cuLaunchKernel`], and `config` is one.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuLaunchKernelEx(
    config: *const LaunchConfig,
    function: Pointer,
    parameters: *const *const u8,
    _: Pointer,
) -> Status {
    const PROGRAMMATIC_STREAM_SERIALIZATION: u32 = 6;
    // SAFETY: the caller's promise; functions are never freed.
    let (config, function): (_, &'static Function) = unsafe { (&*config, &*function.cast()) };
    let mut dependent = false;
    for at in 0..config.attribute_count as usize {
        // SAFETY: the caller's promise.
        let attribute = unsafe { &*config.attributes.add(at) };
        if attribute.id != PROGRAMMATIC_STREAM_SERIALIZATION {
            return INVALID_VALUE;
        }
        dependent = attribute.allowed == 1;
    }
    let mut bytes = Vec::new();
    for (at, &size) in function.parameters.iter().enumerate() {
        bytes.resize(usize::next_multiple_of(bytes.len(), 8), 0);
        // SAFETY: the caller's promise.
        bytes.extend_from_slice(unsafe { std::slice::from_raw_parts(*parameters.add(at), size) });
    }
    let launch = KernelLaunch {
        function,
        grid: config.grid,
        block: config.block,
        shared_bytes: config.shared_bytes as usize,
        dependent,
        parameters: bytes,
    };
    let mut device = device();
    match &mut device.capture {
        Some((captured, launches)) if *captured == config.stream.addr() => {
            launches.push(launch);
            0
        }
        _ => device.run(&launch),
    }
}

/// # Safety
/// `to` is for an int.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamIsCapturing(stream: Pointer, to: *mut c_int) -> Status {
    let captured = device().capture.as_ref().map(|(stream, _)| *stream);
    // SAFETY: the caller's promise.
    unsafe { give(to, c_int::from(captured == Some(stream.addr()))) }
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamBeginCapture_v2(stream: Pointer, _: c_int) -> Status {
    device().capture = Some((stream.addr(), Vec::new()));
    0
}

/// # Safety
/// `to` is for a graph.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamEndCapture(_: Pointer, to: *mut Pointer) -> Status {
    match device().capture.take() {
        // SAFETY: the caller's promise.
        Some((_, launches)) => unsafe { give(to, leak(launches)) },
        None => INVALID_VALUE,
    }
}

/// # Safety
/// `to` is for what can be launched of a graph, which here is the graph.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuGraphInstantiateWithFlags(
    to: *mut Pointer,
    graph: Pointer,
    _: u64,
) -> Status {
    // SAFETY: the caller's promise.
    unsafe { give(to, graph) }
}

/// # Safety
/// `graph` is one of [`cuStreamEndCapture`], and `count` is for a number.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuGraphGetNodes(
    graph: Pointer,
    nodes: *mut Pointer,
    count: *mut usize,
) -> Status {
    if !nodes.is_null() {
        return INVALID_VALUE;
    }
    // SAFETY: the caller's promise; graphs are never freed.
    unsafe { give(count, (*graph.cast::<Vec<KernelLaunch>>()).len()) }
}

/// # Safety
/// `graph` is one of [`cuStreamEndCapture`].
#[unsafe(no_mangle)]
unsafe extern "C" fn cuGraphLaunch(graph: Pointer, _: Pointer) -> Status {
    // SAFETY: the caller's promise; graphs are never freed.
    let launches: &Vec<KernelLaunch> = unsafe { &*graph.cast() };
    let mut device = device();
    device.memory.earlier_work_has_ended();
    let failed = launches
        .iter()
        .map(|launch| device.run(launch))
        .find(|&status| status != 0);
    failed.unwrap_or(0)
}
