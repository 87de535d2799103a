//! The kernels of `limits.cu`, and the launch that CUDA calls programmatic dependent.

use super::Failure;
use super::results::{COPY_KERNEL, Launch};
use libloading::Library;
use phasor::cudarc::driver::sys::{CUfunction, CUstream};
use phasor::cudarc::driver::{
    CudaFunction, CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceSlice, result,
};
use phasor::cudarc::nvrtc::Ptx;
use std::ffi::c_void;
use std::mem::size_of;
use std::sync::Arc;

const THREADS: u32 = 256;
const ACCESS_BYTES: usize = 16;

#[cfg(windows)]
const DRIVER: &str = "nvcuda.dll";
#[cfg(not(windows))]
const DRIVER: &str = "libcuda.so.1";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// With so many accesses a thread.
    Copy1,
    Copy4,
    Update1,
    Update4,
    /// Copies that write half as much of what comes last.
    Narrow1,
    Narrow4,
    Empty,
    Write,
    WriteAndTrigger,
}

impl Pass {
    const ALL: [Self; 9] = [
        Self::Copy1,
        Self::Copy4,
        Self::Update1,
        Self::Update4,
        Self::Narrow1,
        Self::Narrow4,
        Self::Empty,
        Self::Write,
        Self::WriteAndTrigger,
    ];
    /// Those that are limits of a rotation by themselves.
    pub const LIMITS: [Self; 5] = [
        Self::Copy1,
        Self::Copy4,
        Self::Update1,
        Self::Update4,
        Self::Empty,
    ];

    fn kernel(self) -> &'static str {
        match self {
            Self::Copy1 => "copy_1",
            Self::Copy4 => "copy_4",
            Self::Update1 => "update_1",
            Self::Update4 => "update_4",
            Self::Narrow1 => "narrow_1",
            Self::Narrow4 => "narrow_4",
            Self::Empty => "empty",
            Self::Write => "write_only",
            Self::WriteAndTrigger => "write_and_trigger",
        }
    }

    pub fn contender(self) -> String {
        match self {
            Self::Copy1 | Self::Narrow1 => format!("{COPY_KERNEL}, 1 access a thread"),
            Self::Copy4 | Self::Narrow4 => format!("{COPY_KERNEL}, 4 accesses a thread"),
            Self::Update1 => "update pass, 1 access a thread".to_owned(),
            Self::Update4 => "update pass, 4 accesses a thread".to_owned(),
            Self::Empty => "empty kernel".to_owned(),
            Self::Write | Self::WriteAndTrigger => "the kernel before, alone".to_owned(),
        }
    }

    pub fn is_copy(self) -> bool {
        matches!(self, Self::Copy1 | Self::Copy4) || self.is_narrowing()
    }

    fn is_narrowing(self) -> bool {
        matches!(self, Self::Narrow1 | Self::Narrow4)
    }

    fn accesses(self) -> u32 {
        match self {
            Self::Copy4 | Self::Update4 | Self::Narrow4 => 4,
            _ => 1,
        }
    }
}

/// What the passes do to memory: where they write, and what they read unless it is the same.
pub struct Operands<'a, T> {
    pub to: CudaViewMut<'a, T>,
    pub from: Option<CudaView<'a, T>>,
}

pub struct Limits {
    stream: Arc<CudaStream>,
    functions: [CudaFunction; Pass::ALL.len()],
    dependent: Result<LaunchEx, String>,
}

impl Limits {
    /// Loads the kernels, and checks that they do what they are for.
    pub fn new(stream: &Arc<CudaStream>) -> Result<Self, Failure> {
        let context = stream.context();
        let (major, minor) = context.compute_capability()?;
        let text = match major {
            9.. => include_str!("limits.compute_90.ptx"),
            8 => include_str!("limits.compute_80.ptx"),
            _ => {
                return Err(format!("compute capability {major}.{minor}: 8.0 is needed").into());
            }
        };
        let module = context.load_module(Ptx::from_src(text))?;
        let functions = Pass::ALL.map(|pass| module.load_function(pass.kernel()));
        let functions: Vec<_> = functions.into_iter().collect::<Result<_, _>>()?;
        let dependent = match major {
            9.. => LaunchEx::find(),
            _ => Err(format!("compute capability {major}.{minor}: 9.0 is needed")),
        };
        let limits = Self {
            stream: stream.clone(),
            functions: functions.try_into().map_err(|_| "a kernel is missing")?,
            dependent,
        };
        limits.check()?;
        Ok(limits)
    }

    /// Enqueues a pass over as many bytes as `to` has, a multiple of 16. One that narrows has more to read:
    /// half of the bytes are written of as many as that takes.
    pub fn enqueue<T>(
        &self,
        pass: Pass,
        launch: Launch,
        operands: Operands<'_, T>,
    ) -> Result<(), Failure> {
        let Operands { mut to, from } = operands;
        let written = to.num_bytes();
        let read = from.as_ref().map_or(written, DeviceSlice::num_bytes);
        let fits = match pass.is_narrowing() {
            true => (written..=2 * written).contains(&read),
            false => read == written,
        };
        let whole = (2 * written).saturating_sub(read);
        if !fits || read % ACCESS_BYTES != 0 || whole % ACCESS_BYTES != 0 {
            return Err(format!("{read} bytes to {written}: not what a pass does").into());
        }
        let (to, _to_guard) = to.device_ptr_mut(&self.stream);
        let (from, _from_guard) = match &from {
            Some(from) => {
                let (from, guard) = from.device_ptr(&self.stream);
                (from, Some(guard))
            }
            None => (to, None),
        };
        let [count, whole] = [read, whole].map(|bytes| (bytes / ACCESS_BYTES) as u64);
        let blocks = count.div_ceil(u64::from(THREADS * pass.accesses()));
        let blocks = u32::try_from(blocks)?;
        let mut values = [to, from, count, whole];
        let mut parameters = values.each_mut().map(|value| (&raw mut *value).cast());
        let function = self.functions[pass as usize].cu_function();
        let stream = self.stream.cu_stream();
        self.stream.context().bind_to_thread()?;
        match launch {
            Launch::Ordinary => {
                let (grid, block) = ((blocks, 1, 1), (THREADS, 1, 1));
                // SAFETY: every kernel takes two addresses and a count of 8 bytes each, and those that
                // narrow another count; within these both addresses are of views, which the stream's
                // order keeps until then.
                unsafe {
                    result::launch_kernel(function, grid, block, 0, stream, &mut parameters)?;
                }
            }
            Launch::Dependent | Launch::DependentSettled => {
                let dependent = self.dependent.as_ref().map_err(Clone::clone)?;
                // SAFETY: as above; what reads or writes waits for earlier kernels first.
                unsafe { dependent.launch(function, blocks, stream, &mut parameters)? };
            }
        }
        Ok(())
    }

    /// Whether this device and its driver have dependent launches, or why not.
    pub fn dependent(&self) -> Result<(), &str> {
        self.dependent.as_ref().map(|_| ()).map_err(String::as_str)
    }

    /// A limit that does less than it claims would be no limit.
    fn check(&self) -> Result<(), Failure> {
        // No multiple of what a block handles.
        const ACCESSES: usize = 5003;
        const WHOLE: usize = 2001;
        const WORDS: usize = ACCESS_BYTES / size_of::<u32>();
        let values: Vec<u32> = (0..(WORDS * ACCESSES) as u32)
            .map(|i| i.wrapping_mul(0x9e37_79b9))
            .collect();
        let (whole, rest) = values.split_at(WORDS * WHOLE);
        let halves = rest.chunks_exact(2).map(|words| words[0] ^ words[1]);
        let narrowed: Vec<u32> = whole.iter().copied().chain(halves).collect();
        let launches = match self.dependent {
            Ok(_) => &[Launch::Ordinary, Launch::Dependent][..],
            Err(_) => &[Launch::Ordinary],
        };
        for pass in Pass::ALL {
            for &launch in launches {
                let from = self.stream.clone_htod(&values)?;
                let expected: Vec<u32> = match pass {
                    Pass::Copy1 | Pass::Copy4 | Pass::Empty => values.clone(),
                    Pass::Narrow1 | Pass::Narrow4 => narrowed.clone(),
                    Pass::Update1 | Pass::Update4 => values.iter().map(|x| x ^ 1).collect(),
                    Pass::Write | Pass::WriteAndTrigger => vec![0x3f80_3f80; values.len()],
                };
                let mut to = match pass {
                    Pass::Update1 | Pass::Update4 | Pass::Empty => from.clone(),
                    _ => self.stream.alloc_zeros(expected.len())?,
                };
                let operands = Operands {
                    to: to.as_view_mut(),
                    from: pass.is_copy().then(|| from.as_view()),
                };
                self.enqueue(pass, launch, operands)?;
                if self.stream.clone_dtoh(&to)? != expected {
                    return Err(format!("the {} kernel is wrong", pass.kernel()).into());
                }
            }
        }
        Ok(())
    }
}

/// `cuLaunchKernelEx`, which cudarc has for some toolkits only.
struct LaunchEx {
    function: unsafe extern "system" fn(
        *const LaunchConfig,
        CUfunction,
        *mut *mut c_void,
        *mut *mut c_void,
    ) -> i32,
    _driver: Library,
}

/// `CUlaunchConfig` of CUDA 11.8 and later.
#[repr(C)]
struct LaunchConfig {
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    stream: CUstream,
    attributes: *const LaunchAttribute,
    attribute_count: u32,
}

/// `CUlaunchAttribute`, whose value has 64 bytes and the alignment of a pointer.
#[repr(C)]
struct LaunchAttribute {
    id: u32,
    value: LaunchValue,
}

#[repr(C, align(8))]
struct LaunchValue {
    allowed: i32,
    rest: [i32; 15],
}

const _: () = assert!(size_of::<LaunchConfig>() == 56 && size_of::<LaunchAttribute>() == 72);

/// `CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION`
const PROGRAMMATIC_STREAM_SERIALIZATION: u32 = 6;

impl LaunchEx {
    fn find() -> Result<Self, String> {
        // SAFETY: the driver is loaded already, so that no initialiser runs.
        let driver = unsafe { Library::new(DRIVER) }.map_err(|error| error.to_string())?;
        // SAFETY: the function has this signature in every driver that has it.
        let function = unsafe { driver.get(b"cuLaunchKernelEx\0") };
        let function = *function.map_err(|_| "a driver of CUDA 11.8 or later is needed")?;
        Ok(Self {
            function,
            _driver: driver,
        })
    }

    /// # Safety
    /// As for an ordinary launch; and the kernel waits for earlier ones before it reads or writes what
    /// they do.
    unsafe fn launch(
        &self,
        function: CUfunction,
        blocks: u32,
        stream: CUstream,
        parameters: &mut [*mut c_void; 4],
    ) -> Result<(), Failure> {
        let attribute = LaunchAttribute {
            id: PROGRAMMATIC_STREAM_SERIALIZATION,
            value: LaunchValue {
                allowed: 1,
                rest: [0; 15],
            },
        };
        let config = LaunchConfig {
            grid: [blocks, 1, 1],
            block: [THREADS, 1, 1],
            shared_bytes: 0,
            stream,
            attributes: &raw const attribute,
            attribute_count: 1,
        };
        // SAFETY: the configuration lives until the call returns; the rest is the caller's.
        let code = unsafe {
            (self.function)(
                &raw const config,
                function,
                parameters.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        match code {
            0 => Ok(()),
            code => Err(format!("a dependent launch: error {code}").into()),
        }
    }
}
