//! What the bench asks of phasor.

use super::Failure;
use super::results::{Launch, PHASOR};
use super::schedule::{Group, HEAD_DIM};
use phasor::cuda::{Cuda, CudaPositions, CudaRotator};
use phasor::cudarc::driver::{CudaStream, CudaViewMut};
use phasor::{DeviceElement, Frequencies, InOut, Layout, Pairing, Plan, Problem, Rope};

/// One way to rotate q and k in place, ready to be enqueued.
pub struct Rotation {
    pub contender: &'static str,
    pub pairing: Pairing,
    pub launch: Launch,
    rotator: CudaRotator,
    plan: Plan,
    q_length: usize,
}

impl Rotation {
    /// Both pairings, and several axes where those are measured, by every kind of launch.
    pub fn all(cuda: &Cuda, group: Group) -> Result<Vec<Self>, phasor::Error> {
        let frequencies = Frequencies::from_theta(5e5, HEAD_DIM)?;
        let mut ropes = vec![
            (PHASOR, Pairing::HalfSplit, frequencies.clone()),
            (PHASOR, Pairing::Interleaved, frequencies.clone()),
        ];
        if group.is_usual() {
            let axis_of_pair: Vec<_> = (0..HEAD_DIM / 2).map(|pair| pair % 3).collect();
            let on_axes = frequencies.with_axes(3, &axis_of_pair)?;
            ropes.push(("phasor, 3 axes", Pairing::HalfSplit, on_axes));
        }
        let (shape, tokens) = (group.shape, group.tokens);
        let problem = Problem::new(group.dtype)
            .q(Layout::tokens(tokens, shape.q_heads, HEAD_DIM))
            .k(Layout::tokens(tokens, shape.k_heads, HEAD_DIM));
        let mut all = Vec::new();
        for (contender, pairing, frequencies) in ropes {
            let rotator = cuda.rotator(&Rope::new(frequencies, pairing))?;
            for (launch, rotator) in by_launch(rotator) {
                all.push(Self {
                    contender,
                    pairing,
                    launch,
                    plan: rotator.plan(&problem)?,
                    rotator,
                    q_length: shape.lengths(tokens)[0],
                });
            }
        }
        Ok(all)
    }

    /// Enqueues the rotation of q and k, which lie one after the other.
    pub fn enqueue<T: DeviceElement>(
        &self,
        stream: &CudaStream,
        mut pair: CudaViewMut<'_, T>,
    ) -> Result<(), Failure> {
        let (q, k) = pair.split_at_mut(self.q_length);
        let (q, k) = (InOut::InPlace(q), InOut::InPlace(k));
        let positions = CudaPositions::start(1000);
        let (rotator, plan) = (&self.rotator, &self.plan);
        Ok(rotator.rotate(stream, plan, Some(q), Some(k), &positions)?)
    }
}

/// The rotator for each kind of launch that it has.
fn by_launch(rotator: CudaRotator) -> Vec<(Launch, CudaRotator)> {
    vec![(Launch::Ordinary, rotator)]
}
