//! One call that picks a GPU where there is one and the host otherwise, and the same few
//! operations on either.

use std::borrow::Cow;

use crate::element::{Dtype, Element};
use crate::plan::{InOut, Plan, Problem};
use crate::positions::{Positions, PositionsIn};
use crate::{Error, Host, HostDestination, HostRotator, Rope};

#[cfg(feature = "cuda")]
use crate::cuda::{self, Cuda, CudaPositions, CudaRotator};
#[cfg(feature = "cuda")]
use cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut};
#[cfg(feature = "cuda")]
use std::sync::Arc;

/// A backend that was picked, and why.
///
/// Buffers are allocated on it explicitly; a rotation never copies between devices. Engines that
/// have their own buffers use [`Host`] or `cuda::Cuda` directly.
///
/// ```
/// use phasor::{Device, Dtype, Frequencies, InOut, Layout, Pairing, Positions, Problem, Rope};
///
/// # fn main() -> Result<(), phasor::Error> {
/// let device = Device::auto(&[Dtype::F32]);
/// println!("{device}: {}", device.reason());
///
/// let rope = Rope::new(Frequencies::from_theta(10_000.0, 64)?, Pairing::HalfSplit);
/// let rotator = device.rotator(&rope)?;
/// let plan = rotator.plan(&Problem::new(Dtype::F32).q(Layout::tokens(16, 4, 64)))?;
///
/// let mut q = device.upload(&vec![1.0f32; 16 * 4 * 64])?;
/// let positions = device.positions(Positions::start(0))?;
/// rotator.rotate(&plan, Some(InOut::InPlace(&mut q)), None, &positions)?;
/// assert_eq!(q.to_vec()?[..4], [1.0; 4]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Device {
    backend: Backend,
    reason: Cow<'static, str>,
}

#[derive(Clone, Debug)]
enum Backend {
    Host(Host),
    #[cfg(feature = "cuda")]
    Cuda {
        cuda: Cuda,
        stream: Arc<CudaStream>,
    },
}

impl Device {
    /// The first CUDA device if one can be opened and takes the kernels of `dtypes`, the host
    /// otherwise. [`reason`](Self::reason) says which it was and why.
    pub fn auto(dtypes: &[Dtype]) -> Self {
        match Self::cuda(0, dtypes) {
            Ok(device) => Self {
                reason: "it is the first GPU that the driver lists".into(),
                ..device
            },
            Err(error) => Self {
                reason: error.to_string().into(),
                ..Self::host()
            },
        }
    }

    /// The host.
    pub fn host() -> Self {
        Self {
            backend: Backend::Host(Host::new()),
            reason: "it was asked for".into(),
        }
    }

    /// A CUDA device, by its ordinal, with the kernels of `dtypes`.
    ///
    /// # Errors
    /// [`Error::CudaNotBuilt`] without the `cuda` feature, and those of `Cuda::open`.
    #[cfg(feature = "cuda")]
    pub fn cuda(ordinal: usize, dtypes: &[Dtype]) -> Result<Self, Error> {
        let cuda = Cuda::open(ordinal, dtypes)?;
        let stream = cuda.context().default_stream();
        Ok(Self {
            backend: Backend::Cuda { cuda, stream },
            reason: "it was asked for".into(),
        })
    }

    /// A CUDA device, by its ordinal, with the kernels of `dtypes`.
    ///
    /// # Errors
    /// [`Error::CudaNotBuilt`] without the `cuda` feature.
    #[cfg(not(feature = "cuda"))]
    pub fn cuda(_ordinal: usize, _dtypes: &[Dtype]) -> Result<Self, Error> {
        Err(Error::CudaNotBuilt)
    }

    /// A device by name: `auto`, `host`, `cuda` (the first) or `cuda:N`.
    ///
    /// # Errors
    /// [`Error::DeviceName`] for any other name; those of [`Device::cuda`].
    pub fn from_name(name: &str, dtypes: &[Dtype]) -> Result<Self, Error> {
        let unknown = || Error::DeviceName { name: name.into() };
        match name {
            "auto" => Ok(Self::auto(dtypes)),
            "host" => Ok(Self::host()),
            "cuda" => Self::cuda(0, dtypes),
            _ => {
                let digits = name.strip_prefix("cuda:").ok_or_else(unknown)?;
                // `parse` alone would take "+0".
                if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
                    return Err(unknown());
                }
                Self::cuda(digits.parse().map_err(|_| unknown())?, dtypes)
            }
        }
    }

    /// Why this device was picked.
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// Whether rotations run on the host.
    pub fn is_host(&self) -> bool {
        matches!(self.backend, Backend::Host(_))
    }

    /// The CUDA backend and the stream that rotations are enqueued on; `None` on the host.
    #[cfg(feature = "cuda")]
    pub fn as_cuda(&self) -> Option<(&Cuda, &Arc<CudaStream>)> {
        match &self.backend {
            Backend::Host(_) => None,
            Backend::Cuda { cuda, stream } => Some((cuda, stream)),
        }
    }

    /// Copies elements into a new buffer on this device.
    ///
    /// # Errors
    /// [`Error::Driver`] if the device has no room.
    pub fn upload<T: DeviceElement>(&self, data: &[T]) -> Result<Buffer<T>, Error> {
        Ok(Buffer(self.memory(data)?))
    }

    /// Puts the positions of a call where this device reads them.
    ///
    /// # Errors
    /// [`Error::Driver`] if the device has no room.
    pub fn positions(&self, positions: Positions<'_>) -> Result<DevicePositions, Error> {
        positions.try_map(|&ids| self.memory(ids).map(DeviceMemory))
    }

    fn memory<T: Stored>(&self, data: &[T]) -> Result<Memory<T>, Error> {
        Ok(match &self.backend {
            Backend::Host(_) => Memory::Host(data.to_vec()),
            #[cfg(feature = "cuda")]
            Backend::Cuda { stream, .. } => Memory::Cuda(cuda::upload(stream, data)?),
        })
    }

    /// Prepares a rotation on this device.
    ///
    /// # Errors
    /// [`Error::Driver`] if its angles cannot be copied there.
    pub fn rotator(&self, rope: &Rope) -> Result<Rotator, Error> {
        Ok(Rotator(match &self.backend {
            Backend::Host(host) => AnyRotator::Host(host.rotator(rope)),
            #[cfg(feature = "cuda")]
            Backend::Cuda { cuda, stream } => AnyRotator::Cuda {
                rotator: cuda.rotator(rope)?,
                stream: stream.clone(),
            },
        }))
    }

    /// Waits until all rotations enqueued so far are done. The host has nothing to wait for.
    ///
    /// # Errors
    /// [`Error::Driver`] if one of them failed.
    pub fn synchronize(&self) -> Result<(), Error> {
        match &self.backend {
            Backend::Host(_) => Ok(()),
            #[cfg(feature = "cuda")]
            Backend::Cuda { stream, .. } => cuda::synchronize(stream),
        }
    }
}

/// `host (avx2)`, or `cuda:0 (NVIDIA H100, fatbin)`.
impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.backend {
            Backend::Host(host) => write!(f, "host ({})", host.isa().name()),
            #[cfg(feature = "cuda")]
            Backend::Cuda { cuda, .. } => {
                write!(f, "cuda:{} ({}", cuda.context().ordinal(), cuda.name())?;
                let mut images: Vec<_> = Dtype::ALL.iter().filter_map(|&d| cuda.image(d)).collect();
                images.dedup();
                for image in images {
                    write!(f, ", {image}")?;
                }
                f.write_str(")")
            }
        }
    }
}

/// Elements on a [`Device`].
#[derive(Debug)]
pub struct Buffer<T>(Memory<T>);

#[derive(Debug)]
enum Memory<T> {
    Host(Vec<T>),
    #[cfg(feature = "cuda")]
    Cuda(CudaSlice<T>),
}

impl<T: DeviceElement> Buffer<T> {
    /// Elements.
    pub fn len(&self) -> usize {
        match &self.0 {
            Memory::Host(data) => data.len(),
            #[cfg(feature = "cuda")]
            Memory::Cuda(data) => data.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies the elements to the host, after waiting for the rotations that write them.
    ///
    /// # Errors
    /// [`Error::Driver`] if the copy or an earlier rotation failed.
    pub fn to_vec(&self) -> Result<Vec<T>, Error> {
        match &self.0 {
            Memory::Host(data) => Ok(data.clone()),
            #[cfg(feature = "cuda")]
            Memory::Cuda(data) => cuda::download(data),
        }
    }
}

/// Positions on a [`Device`], made by [`Device::positions`].
pub type DevicePositions = PositionsIn<DeviceMemory>;

/// Bytes of ids on a [`Device`].
#[derive(Debug)]
pub struct DeviceMemory(Memory<u8>);

impl<T> Memory<T> {
    fn host(&self, _what: &'static str) -> Result<&[T], Error> {
        match self {
            Memory::Host(data) => Ok(data),
            #[cfg(feature = "cuda")]
            Memory::Cuda(data) => Err(not_on_host(_what, data)),
        }
    }

    fn host_mut(&mut self, _what: &'static str) -> Result<&mut [T], Error> {
        match self {
            Memory::Host(data) => Ok(data),
            #[cfg(feature = "cuda")]
            Memory::Cuda(data) => Err(not_on_host(_what, data)),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda(&self, what: &'static str) -> Result<CudaView<'_, T>, Error> {
        match self {
            Memory::Cuda(data) => Ok(data.as_view()),
            Memory::Host(_) => Err(mismatch(what, "the host", "a GPU")),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda_mut(&mut self, what: &'static str) -> Result<CudaViewMut<'_, T>, Error> {
        match self {
            Memory::Cuda(data) => Ok(data.as_view_mut()),
            Memory::Host(_) => Err(mismatch(what, "the host", "a GPU")),
        }
    }
}

#[cfg(feature = "cuda")]
fn mismatch(what: &'static str, found: impl Into<String>, expected: &str) -> Error {
    Error::DeviceMismatch {
        what,
        found: found.into(),
        expected: expected.into(),
    }
}

/// One [`Rope`] on a [`Device`].
///
/// ```
/// # fn main() -> Result<(), phasor::Error> {
/// use phasor::{Device, Dtype, Frequencies, InOut, Layout, Pairing, Positions, Problem, Rope};
///
/// let device = Device::auto(&[Dtype::F32]); // a GPU if there is one
/// let rope = Rope::new(Frequencies::from_theta(10_000.0, 64)?, Pairing::HalfSplit);
/// let rotator = device.rotator(&rope)?;
/// let plan = rotator.plan(&Problem::new(Dtype::F32).q(Layout::tokens(5, 4, 64)))?;
///
/// let mut q = device.upload(&vec![1.0f32; 5 * 4 * 64])?;
/// let positions = device.positions(Positions::start(0))?;
/// rotator.rotate(&plan, Some(InOut::InPlace(&mut q)), None, &positions)?;
/// assert_eq!(q.to_vec()?[0], 1.0); // position 0 turns nothing
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Rotator(AnyRotator);

#[derive(Clone, Debug)]
enum AnyRotator {
    Host(HostRotator),
    #[cfg(feature = "cuda")]
    Cuda {
        rotator: CudaRotator,
        stream: Arc<CudaStream>,
    },
}

/// A tensor of a call on a [`Device`].
pub type DeviceInOut<'a, T> = InOut<&'a Buffer<T>, &'a mut Buffer<T>>;

impl Rotator {
    /// Checks a problem; the plan serves any number of calls.
    ///
    /// # Errors
    /// Those of [`Plan::new`].
    pub fn plan(&self, problem: &Problem) -> Result<Plan, Error> {
        match &self.0 {
            AnyRotator::Host(rotator) => rotator.plan(problem),
            #[cfg(feature = "cuda")]
            AnyRotator::Cuda { rotator, .. } => rotator.plan(problem),
        }
    }

    /// Rotates q and k, each a buffer of its own. On a GPU this enqueues one launch on the
    /// device's stream and returns.
    ///
    /// # Errors
    /// Those of [`HostRotator::rotate`], and [`Error::DeviceMismatch`] for a buffer or positions
    /// elsewhere.
    pub fn rotate<T: DeviceElement>(
        &self,
        plan: &Plan,
        q: Option<DeviceInOut<'_, T>>,
        k: Option<DeviceInOut<'_, T>>,
        positions: &DevicePositions,
    ) -> Result<(), Error> {
        match &self.0 {
            AnyRotator::Host(rotator) => {
                let q = q
                    .map(|q| q.try_map(Buffer::host, Buffer::host_mut, Buffer::host_destination))
                    .transpose()?;
                let k = k
                    .map(|k| k.try_map(Buffer::host, Buffer::host_mut, Buffer::host_destination))
                    .transpose()?;
                rotator.rotate(plan, q, k, positions.on_host()?)
            }
            #[cfg(feature = "cuda")]
            AnyRotator::Cuda { rotator, stream } => {
                let q = q
                    .map(|q| q.try_map(Buffer::cuda, Buffer::cuda_mut, Buffer::cuda_mut))
                    .transpose()?;
                let k = k
                    .map(|k| k.try_map(Buffer::cuda, Buffer::cuda_mut, Buffer::cuda_mut))
                    .transpose()?;
                rotator.rotate(stream, plan, q, k, &positions.on_cuda()?)
            }
        }
    }

    /// Rotates a plan made with [`Problem::one_buffer`], such as packed qkv in place.
    ///
    /// # Errors
    /// Those of [`rotate`](Self::rotate).
    pub fn rotate_one_buffer<T: DeviceElement>(
        &self,
        plan: &Plan,
        buffer: &mut Buffer<T>,
        positions: &DevicePositions,
    ) -> Result<(), Error> {
        match &self.0 {
            AnyRotator::Host(rotator) => {
                rotator.rotate_one_buffer(plan, buffer.host_mut()?, positions.on_host()?)
            }
            #[cfg(feature = "cuda")]
            AnyRotator::Cuda { rotator, stream } => {
                rotator.rotate_one_buffer(stream, plan, buffer.cuda_mut()?, &positions.on_cuda()?)
            }
        }
    }
}

impl DevicePositions {
    fn on_host(&self) -> Result<Positions<'_>, Error> {
        self.try_map(|DeviceMemory(ids)| ids.host("positions"))
    }

    #[cfg(feature = "cuda")]
    fn on_cuda(&self) -> Result<CudaPositions<'_>, Error> {
        self.try_map(|DeviceMemory(ids)| ids.cuda("positions"))
    }
}

impl<T: DeviceElement> Buffer<T> {
    fn host(&self) -> Result<&[T], Error> {
        self.0.host("a tensor")
    }

    fn host_mut(&mut self) -> Result<&mut [T], Error> {
        self.0.host_mut("a tensor")
    }

    fn host_destination(&mut self) -> Result<HostDestination<'_, T>, Error> {
        Ok(self.host_mut()?.into())
    }

    #[cfg(feature = "cuda")]
    fn cuda(&self) -> Result<CudaView<'_, T>, Error> {
        self.0.cuda("a tensor")
    }

    #[cfg(feature = "cuda")]
    fn cuda_mut(&mut self) -> Result<CudaViewMut<'_, T>, Error> {
        self.0.cuda_mut("a tensor")
    }
}

/// An [`Element`] that a [`Device`] can hold: all of them.
#[cfg(feature = "cuda")]
pub trait DeviceElement: Element + cudarc::driver::DeviceRepr {}
#[cfg(feature = "cuda")]
impl<T: Element + cudarc::driver::DeviceRepr> DeviceElement for T {}
/// An [`Element`] that a [`Device`] can hold: all of them.
#[cfg(not(feature = "cuda"))]
pub trait DeviceElement: Element {}
#[cfg(not(feature = "cuda"))]
impl<T: Element> DeviceElement for T {}

/// What buffers hold.
#[cfg(feature = "cuda")]
trait Stored: Clone + cudarc::driver::DeviceRepr {}
#[cfg(feature = "cuda")]
impl<T: Clone + cudarc::driver::DeviceRepr> Stored for T {}
#[cfg(not(feature = "cuda"))]
trait Stored: Clone {}
#[cfg(not(feature = "cuda"))]
impl<T: Clone> Stored for T {}

#[cfg(feature = "cuda")]
fn not_on_host<T>(what: &'static str, data: &CudaSlice<T>) -> Error {
    mismatch(what, format!("cuda:{}", data.ordinal()), "the host")
}
