//! What the bench asks of phasor.

use super::Failure;
use super::results::{Launch, PHASOR};
use super::schedule::{Group, HEAD_DIM};
use phasor::cuda::{Cuda, CudaPositions, CudaRotator, LaunchMode};
use phasor::cudarc::driver::{CudaSlice, CudaStream, CudaViewMut};
use phasor::{DeviceElement, Dtype, Frequencies, InOut, Layout, Pairing, Plan, Problem, Rope};
use std::sync::Arc;

const FIRST_POSITION: i64 = 1000;
/// Its positions are known when it is enqueued.
const FROM_A_START: &str = "phasor, positions from a start";

/// One way to rotate q and k in place, ready to be enqueued.
pub struct Rotation {
    pub contender: &'static str,
    pub pairing: Pairing,
    pub launch: Launch,
    rotator: CudaRotator,
    plan: Plan,
    q_length: usize,
    /// In device memory, as those of peers; or there is a start.
    positions: Option<Arc<CudaSlice<i64>>>,
}

impl Rotation {
    /// Both pairings, and several axes and a start where those are measured, by every kind of launch.
    pub fn all(cuda: &Cuda, stream: &Arc<CudaStream>, group: Group) -> Result<Vec<Self>, Failure> {
        let frequencies = Frequencies::from_theta(5e5, HEAD_DIM)?;
        let mut ropes = vec![
            (PHASOR, Pairing::HalfSplit, frequencies.clone()),
            (PHASOR, Pairing::Interleaved, frequencies.clone()),
        ];
        if group.is_usual() {
            let axis_of_pair: Vec<_> = (0..HEAD_DIM / 2).map(|pair| pair % 3).collect();
            let on_axes = frequencies.clone().with_axes(3, &axis_of_pair)?;
            ropes.push(("phasor, 3 axes", Pairing::HalfSplit, on_axes));
            ropes.push((FROM_A_START, Pairing::HalfSplit, frequencies));
        }
        let (shape, tokens) = (group.shape, group.tokens);
        let positions: Vec<_> = (FIRST_POSITION..).take(tokens).collect();
        let positions = Arc::new(stream.clone_htod(&positions)?);
        let problem = Problem::new(group.dtype)
            .q(Layout::tokens(tokens, shape.q_heads, HEAD_DIM))
            .k(Layout::tokens(tokens, shape.k_heads, HEAD_DIM));
        let mut all = Vec::new();
        for (contender, pairing, frequencies) in ropes {
            let rotator = cuda.rotator(&Rope::new(frequencies, pairing))?;
            for (launch, rotator) in by_launch(rotator, group.dtype) {
                // A start is settled anyway.
                let from_a_start = contender == FROM_A_START;
                if from_a_start && launch == Launch::DependentSettled {
                    continue;
                }
                all.push(Self {
                    contender,
                    pairing,
                    launch,
                    plan: rotator.plan(&problem)?,
                    rotator,
                    q_length: shape.lengths(tokens)[0],
                    positions: (!from_a_start).then(|| positions.clone()),
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
        let positions = match &self.positions {
            Some(positions) => CudaPositions::per_token(&**positions),
            None => CudaPositions::start(FIRST_POSITION),
        };
        let (rotator, plan) = (&self.rotator, &self.plan);
        Ok(rotator.rotate(stream, plan, Some(q), Some(k), &positions)?)
    }
}

/// The rotator for each kind of launch that it has.
pub fn by_launch(rotator: CudaRotator, dtype: Dtype) -> Vec<(Launch, CudaRotator)> {
    let mut all = Vec::new();
    if rotator.cuda().can_launch_dependently(dtype) {
        all.extend(
            [
                (Launch::Dependent, LaunchMode::Dependent),
                (
                    Launch::DependentSettled,
                    LaunchMode::DependentPositionsSettled,
                ),
            ]
            .map(|(launch, mode)| (launch, rotator.with_launch_mode(mode))),
        );
    }
    all.insert(0, (Launch::Ordinary, rotator));
    all
}
