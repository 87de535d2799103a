//! What all tests on a GPU begin with.
//!
//! Without a GPU every test says so and passes, unless `PHASOR_REQUIRE_GPU=1`. `PHASOR_GPU_SHORT=1`
//! runs fewer cases, for tools that slow the device down.

use phasor::Dtype;
use phasor::cuda::{Cuda, KernelImage, device_count};
use phasor::cudarc::driver::CudaContext;
use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A context on the first GPU, for one test at a time: they share the device's primary context,
/// where one test's synchronising or allocating would disturb another's capture.
pub struct Turn {
    context: Arc<CudaContext>,
    _turn: MutexGuard<'static, ()>,
}

impl std::ops::Deref for Turn {
    type Target = Arc<CudaContext>;
    fn deref(&self) -> &Self::Target {
        &self.context
    }
}

/// `None`, said aloud, where there is no GPU.
pub fn context() -> Option<Turn> {
    static TURN: Mutex<()> = Mutex::new(());
    let found = match device_count() {
        Ok(0) => Err("the driver lists no device".to_string()),
        Ok(_) => Ok(()),
        Err(error) => Err(error.to_string()),
    };
    match found {
        Ok(()) => Some(Turn {
            // A test that failed has nothing that another needs.
            _turn: TURN.lock().unwrap_or_else(PoisonError::into_inner),
            context: CudaContext::new(0).expect("the first device opens"),
        }),
        Err(reason) => {
            assert!(
                std::env::var("PHASOR_REQUIRE_GPU").as_deref() != Ok("1"),
                "PHASOR_REQUIRE_GPU=1, but there is no GPU: {reason}"
            );
            // Straight to stderr, which the test harness does not swallow; once is enough.
            static SAID: std::sync::Once = std::sync::Once::new();
            SAID.call_once(|| {
                let _ = writeln!(std::io::stderr(), "GPU tests are skipped: {reason}");
            });
            None
        }
    }
}

pub fn short() -> bool {
    std::env::var("PHASOR_GPU_SHORT").as_deref() == Ok("1")
}

/// Every image that this build has for this device, with the kernels of some element types.
pub fn images(context: &Arc<CudaContext>, dtypes: &[Dtype]) -> Vec<(KernelImage, Cuda)> {
    let loaded: Vec<_> = KernelImage::ALL
        .into_iter()
        .filter_map(|image| {
            let cuda = Cuda::with_image(context, dtypes, image);
            if let Err(error) = &cuda {
                let reason = error.to_string();
                let is_absent = reason.contains("not in this build");
                assert!(image != KernelImage::Fatbin || is_absent, "{reason}");
                println!("{image} is left out: {reason}");
            }
            Some((image, cuda.ok()?))
        })
        .collect();
    assert!(
        loaded
            .iter()
            .any(|(image, _)| *image != KernelImage::Fatbin),
        "the prebuilt PTX loads on every supported GPU"
    );
    loaded
}
