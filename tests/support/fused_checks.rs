//! The fixed part of the suite for kernels with stages: random cases of every angle source and kind of
//! position, each with stages of its own.

use crate::append_cases::{AppendCase, AppendOutcome, AppendWish, random_append};
use crate::kernel_cases::{AngleKind, Rng};
use crate::ptx_backend::Image;
use crate::suite::{Counts, Failure, Subject};
use phasor::Isa;
use phasor::launch::Kernel;
use ptx_interpreter::Fault;

/// A call with stages, and what it must do.
pub struct FusedCheck {
    kernel: Kernel,
    case: AppendCase,
    expected: AppendOutcome,
    /// How often each byte is read and written where angles are formed after the loads, and where before: by the
    /// prebuilt kernels, which tests/fused_kernels.rs counts in cases of which that is known.
    counts: [Counts; 2],
}

impl FusedCheck {
    pub fn run(&self, subject: &Subject) -> Result<(), Failure> {
        let fault = |fault: Fault| Failure::Fault(fault.to_string());
        let run = self.case.on_image(subject.image(), false).map_err(fault)?;
        assert_eq!(run.kernel, Some(self.kernel));
        if run.outcome != self.expected {
            return Err(Failure::Bits);
        }
        let early = usize::from(run.stats.loads_before_wait > 0);
        match run.triggers && run.counts == self.counts[early] {
            true => Ok(()),
            false => Err(Failure::Traffic),
        }
    }
}

/// The checks of a kernel.
pub fn fused_checks(kernel: Kernel) -> Vec<FusedCheck> {
    const EACH: usize = 10;
    let [late, .., early] = Image::all() else {
        panic!("there are three targets")
    };
    let mut rng = Rng(kernel.index() as u64);
    let mut checks = Vec::new();
    for angles in AngleKind::ALL {
        for (n, &kind) in angles.position_kinds().iter().enumerate() {
            let mut found = 0;
            while found < EACH {
                let whole = match kernel.pairing {
                    Some(_) => Some([64, 64, 128, 256][found % 4]),
                    // Sums of more groups than a warp has lanes, and than it has twice.
                    None if n == 0 => [None, Some(6), Some(160), Some(514)][found % 4],
                    None => None,
                };
                let wish = AppendWish {
                    dtype: Some(kernel.dtype),
                    pairing: kernel.pairing,
                    angles: Some(angles),
                    kind: Some(kind),
                    aligned: Some(kernel.pairing.is_some()),
                    slots: Some(found),
                    staged: true,
                    whole,
                };
                let case = random_append(&mut rng, wish);
                // Others have nothing to do, or no stages.
                let first = case.on_image(late, false).unwrap();
                if first.kernel != Some(kernel) {
                    continue;
                }
                let second = case.on_image(early, false).unwrap();
                checks.push(FusedCheck {
                    kernel,
                    expected: case.on_host(Isa::Scalar).unwrap(),
                    counts: [first.counts, second.counts],
                    case,
                });
                found += 1;
            }
        }
    }
    checks
}
