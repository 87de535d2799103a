use candle_core::CpuStorage;
use phasor::half::{bf16, f16};

/// An element type that both candle and phasor have.
#[cfg(not(feature = "cuda"))]
pub(crate) trait Number: phasor::Element + InStorage {}
#[cfg(not(feature = "cuda"))]
impl<T: phasor::Element + InStorage> Number for T {}

#[cfg(feature = "cuda")]
pub(crate) trait Number: phasor::Element + InStorage + crate::cuda::InCudaStorage {}
#[cfg(feature = "cuda")]
impl<T: phasor::Element + InStorage + crate::cuda::InCudaStorage> Number for T {}

/// Elements in candle's storage of host memory.
pub(crate) trait InStorage: Sized {
    fn of(storage: &CpuStorage) -> Option<&[Self]>;
    fn of_mut(storage: &mut CpuStorage) -> Option<&mut [Self]>;
    fn into_storage(elements: Vec<Self>) -> CpuStorage;
}

macro_rules! in_storage {
    ($($number:ty => $variant:ident),*) => {$(
        impl InStorage for $number {
            fn of(storage: &CpuStorage) -> Option<&[Self]> {
                match storage {
                    CpuStorage::$variant(elements) => Some(elements),
                    _ => None,
                }
            }

            fn of_mut(storage: &mut CpuStorage) -> Option<&mut [Self]> {
                match storage {
                    CpuStorage::$variant(elements) => Some(elements),
                    _ => None,
                }
            }

            fn into_storage(elements: Vec<Self>) -> CpuStorage {
                CpuStorage::$variant(elements)
            }
        }
    )*};
}

in_storage!(f32 => F32, f16 => F16, bf16 => BF16);

/// Runs an expression with `$T` as the type of the elements.
macro_rules! by_dtype {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            phasor::Dtype::F16 => {
                type $T = phasor::half::f16;
                $body
            }
            phasor::Dtype::Bf16 => {
                type $T = phasor::half::bf16;
                $body
            }
            // There are three of them; phasor may add others, which candle's tensors then do not map to.
            _ => {
                type $T = f32;
                $body
            }
        }
    };
}
pub(crate) use by_dtype;
