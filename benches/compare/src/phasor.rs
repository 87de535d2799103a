//! phasor's host backend: the variant it chooses, and the others forced.

use crate::cases::{
    Aligned, Case, Contender, Line, Plain, Ring, Sampling, THETA, filled, time, time_rested,
};
use phasor::{
    Dtype, Element, Frequencies, Host, HostInOut, InOut, Isa, Layout, Pairing, Positions, Problem,
    Rope, Threads,
};
use std::cell::RefCell;
use std::hint::black_box;
use std::rc::Rc;

pub const PHASOR: &str = "phasor";

/// Source and, out of place, destination.
pub struct Tensor<T> {
    source: Aligned<T>,
    destination: Option<Aligned<T>>,
}

impl<T: Element + Plain> Tensor<T> {
    fn new(len: usize, in_place: bool) -> Self {
        let source = filled(len);
        let destination = (!in_place).then(|| filled(len));
        Self {
            source,
            destination,
        }
    }

    fn in_out(&mut self) -> HostInOut<'_, T> {
        match &mut self.destination {
            None => InOut::InPlace(self.source.as_mut_slice()),
            Some(destination) => (self.source.as_slice(), destination.as_mut_slice()).into(),
        }
    }

    /// What is read, and out of place what is written.
    pub fn lines(&mut self) -> (&mut [Line], Option<&mut [Line]>) {
        let destination = self.destination.as_mut();
        (self.source.lines_mut(), destination.map(Aligned::lines_mut))
    }
}

/// q and k. The limits work on the same memory: which pages it lies on makes a difference.
pub struct Entry<T> {
    pub q: Tensor<T>,
    pub k: Tensor<T>,
    /// Whether an update pass has added one that the next takes away, so that values stay finite.
    pub raised: bool,
}

pub type Buffers<T> = Rc<RefCell<Ring<Entry<T>>>>;

pub fn buffers<T: Element + Plain>(case: &Case, sampling: &Sampling) -> Buffers<T> {
    let tensors = 1 + usize::from(!case.in_place);
    let bytes = tensors * (case.q_len() + case.k_len()) * size_of::<T>();
    let entries = (0..sampling.buffers(case, bytes)).map(|_| Entry {
        q: Tensor::new(case.q_len(), case.in_place),
        k: Tensor::new(case.k_len(), case.in_place),
        raised: false,
    });
    Rc::new(RefCell::new(Ring::new(entries.collect())))
}

/// Variants that differ for this element type, slowest first.
pub fn variants(dtype: Dtype) -> Vec<Isa> {
    Isa::ALL
        .into_iter()
        .filter(|isa| isa.is_available() && (*isa != Isa::Avx512Bf16 || dtype == Dtype::Bf16))
        .collect()
}

/// The given variants; the last is called by phasor's name alone.
pub fn contenders<T: Element + Plain>(
    case: &Case,
    pairing: Pairing,
    variants: &[Isa],
    ring: &Buffers<T>,
) -> Result<Vec<Contender>, phasor::Error> {
    let threads = match rayon::current_num_threads() {
        1 => Threads::One,
        _ => Threads::Pool,
    };
    let contender = |(i, &isa): (usize, &Isa)| {
        let library = match i + 1 == variants.len() {
            true => PHASOR.to_owned(),
            false => format!("{PHASOR}, {}", isa.name()),
        };
        let host = Host::new().with_isa(isa)?.with_threads(threads);
        contender(library, host, Calls::InARow, case, pairing, ring)
    };
    variants.iter().enumerate().map(contender).collect()
}

/// Calls as engines make them, where there are threads to share them: from a thread that is not of the
/// pool, in a row or each after a rest, beside the same on one thread.
pub fn outside_of_pool<T: Element + Plain>(
    case: &Case,
    pairing: Pairing,
    ring: &Buffers<T>,
) -> Result<Vec<Contender>, phasor::Error> {
    if rayon::current_num_threads() == 1 {
        return Ok(Vec::new());
    }
    let mut contenders = Vec::new();
    for (calls, when) in [(Calls::Outside, ""), (Calls::Rested, ", after a rest")] {
        for (threads, who) in [
            (Threads::Pool, "outside of the pool"),
            (Threads::One, "alone"),
        ] {
            let library = format!("{PHASOR}, {who}{when}");
            let host = Host::new().with_threads(threads);
            contenders.push(contender(library, host, calls, case, pairing, ring)?);
        }
    }
    Ok(contenders)
}

/// Where calls come from, and when.
#[derive(Clone, Copy)]
enum Calls {
    /// One after the other, from where the contender is run.
    InARow,
    /// The same from a thread that is of no pool. The global one shares them.
    Outside,
    /// From such a thread, each when that has slept a while, as have those of the pool.
    Rested,
}

fn contender<T: Element + Plain>(
    library: String,
    host: Host,
    calls_come: Calls,
    case: &Case,
    pairing: Pairing,
    ring: &Buffers<T>,
) -> Result<Contender, phasor::Error> {
    let rope = Rope::new(Frequencies::from_theta(THETA, case.rotary_dim)?, pairing);
    let layout = |heads| -> InOut<Layout> {
        let layout = Layout::bshd(case.sequences, case.tokens, heads, case.head_dim);
        match case.in_place {
            true => layout.into(),
            false => (layout, layout).into(),
        }
    };
    let problem = Problem::new(T::DTYPE)
        .q(layout(case.q_heads))
        .k(layout(case.k_heads));
    let rotator = host.rotator(&rope);
    let plan = rotator.plan(&problem)?;
    let starts = case.positions();
    let ring = Rc::clone(ring);
    let run = move |calls| {
        let ring = &mut *ring.borrow_mut();
        let call = || {
            let positions = match starts[..] {
                [start] => Positions::start(start),
                _ => Positions::start_per_sequence(&starts),
            };
            let Entry { q, k, .. } = ring.next();
            let (q, k) = (Some(q.in_out()), Some(k.in_out()));
            rotator
                .rotate(&plan, q, k, black_box(positions))
                .expect("the buffers are as planned");
        };
        Ok(match calls_come {
            Calls::InARow => time(calls, call),
            Calls::Outside => elsewhere(|| time(calls, call)),
            Calls::Rested => elsewhere(|| time_rested(calls, call)),
        })
    };
    Ok(Contender {
        library,
        run: Box::new(run),
    })
}

/// What `work` returns on a thread of its own.
fn elsewhere<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    let joined = std::thread::scope(|scope| scope.spawn(work).join());
    joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
