//! Plans of the shapes that were seen last.

use phasor::{Dtype, Error, Layout, Plan, Problem, Rope};
use std::sync::{Arc, Mutex, PoisonError};

/// More than the kinds of calls that a model makes of one rotation while it decodes. Prompts of ever other
/// lengths push out what is oldest.
const MOST: usize = 32;

/// What a plan is made for, as far as calls here differ. There is less to compare than in a problem, which
/// is made only where there is no plan yet.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Work {
    /// A tensor to a new, contiguous one: heads before tokens, or after them.
    New { from: Layout, heads_first: bool },
    /// A tensor to another.
    Into {
        from: Layout,
        to: Layout,
        one_buffer: bool,
    },
    /// A tensor where it is.
    InPlace(Layout),
    /// Queries and keys where they are.
    Both {
        q: Layout,
        k: Layout,
        one_buffer: bool,
    },
}

impl Work {
    fn problem(&self, dtype: Dtype) -> Problem {
        let problem = Problem::new(dtype).longer_buffers();
        let (problem, one_buffer) = match *self {
            Work::New { from, heads_first } => {
                let [batch, tokens, heads, dim] = from.shape();
                let to = match heads_first {
                    true => Layout::bhsd(batch, tokens, heads, dim),
                    false => Layout::bshd(batch, tokens, heads, dim),
                };
                let to = to.with_rotary_offset(from.rotary_offset());
                (problem.q((from, to)), false)
            }
            Work::Into {
                from,
                to,
                one_buffer,
            } => (problem.q((from, to)), one_buffer),
            Work::InPlace(x) => (problem.q(x), false),
            Work::Both { q, k, one_buffer } => (problem.q(q).k(k), one_buffer),
        };
        match one_buffer {
            true => problem.one_buffer(),
            false => problem,
        }
    }
}

/// Plans by what they are of.
#[derive(Debug)]
pub(crate) struct Plans<W>(Mutex<Vec<Arc<Planned<W>>>>);

#[derive(Debug)]
pub(crate) struct Planned<W> {
    work: W,
    plan: Plan,
}

impl<W> std::ops::Deref for Planned<W> {
    type Target = Plan;

    fn deref(&self) -> &Plan {
        &self.plan
    }
}

impl<W> Default for Plans<W> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<W> Plans<W> {
    /// The plan of some work, made if there is none yet.
    #[inline]
    pub(crate) fn get<E>(
        &self,
        is_it: impl Fn(&W) -> bool,
        make: impl FnOnce() -> Result<(W, Plan), E>,
    ) -> Result<Arc<Planned<W>>, E> {
        // What a panic elsewhere left behind are plans all the same.
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = known.iter().position(|known| is_it(&known.work)) {
            let planned = known[at].clone();
            known[..=at].rotate_right(1);
            return Ok(planned);
        }
        let (work, plan) = make()?;
        let planned = Arc::new(Planned { work, plan });
        known.truncate(MOST - 1);
        known.insert(0, planned.clone());
        Ok(planned)
    }
}

impl Plans<(Dtype, Work)> {
    /// The plan of a rotation.
    pub(crate) fn of(&self, rope: &Rope, dtype: Dtype, work: &Work) -> Result<Rotation, Error> {
        self.get(
            |known| known.1 == *work && known.0 == dtype,
            || Ok(((dtype, *work), Plan::new(rope, &work.problem(dtype))?)),
        )
    }
}

pub(crate) type Rotation = Arc<Planned<(Dtype, Work)>>;

#[cfg(test)]
mod tests {
    use super::*;
    use phasor::{Frequencies, Pairing};

    #[test]
    fn the_latest_are_kept() {
        let rope = Rope::new(Frequencies::from_theta(1e4, 8).unwrap(), Pairing::HalfSplit);
        let work = |tokens, dim| Work::InPlace(Layout::tokens(tokens, 1, dim));
        let plans = Plans::default();
        let get = |tokens| plans.of(&rope, Dtype::F32, &work(tokens, 8)).unwrap();
        let first = get(0);
        for tokens in 1..100 {
            let planned = get(tokens);
            assert_eq!(planned.tokens(), tokens);
            assert!(Arc::ptr_eq(&planned, &get(tokens)));
            // In use, and so kept.
            assert!(Arc::ptr_eq(&first, &get(0)));
        }
        assert_eq!(plans.0.lock().unwrap().len(), MOST);
        assert!(plans.of(&rope, Dtype::F32, &work(1, 4)).is_err());
        let other = plans.of(&rope, Dtype::F16, &work(99, 8)).unwrap();
        assert!(!Arc::ptr_eq(&other, &get(99)));
    }
}
