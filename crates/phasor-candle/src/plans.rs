//! Plans of the shapes that were seen last.

use phasor::{Error, Plan, Problem, Rope};
use std::sync::{Arc, Mutex, PoisonError};

/// More than the kinds of calls that a model makes of one rotation while it decodes. Prompts of ever other
/// lengths push out what is oldest.
const MOST: usize = 32;

#[derive(Debug, Default)]
pub(crate) struct Plans(Mutex<Vec<Arc<Planned>>>);

#[derive(Debug)]
pub(crate) struct Planned {
    problem: Problem,
    plan: Plan,
}

impl std::ops::Deref for Planned {
    type Target = Plan;

    fn deref(&self) -> &Plan {
        &self.plan
    }
}

impl Plans {
    /// The plan of a problem, made if there is none yet.
    pub(crate) fn get(&self, rope: &Rope, problem: &Problem) -> Result<Arc<Planned>, Error> {
        // What a panic elsewhere left behind are plans all the same.
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = known.iter().position(|known| known.problem == *problem) {
            let planned = known[at].clone();
            known[..=at].rotate_right(1);
            return Ok(planned);
        }
        let planned = Arc::new(Planned {
            problem: *problem,
            plan: Plan::new(rope, problem)?,
        });
        known.truncate(MOST - 1);
        known.insert(0, planned.clone());
        Ok(planned)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use phasor::{Dtype, Frequencies, Layout, Pairing};

    #[test]
    fn the_latest_are_kept() {
        let rope = Rope::new(Frequencies::from_theta(1e4, 8).unwrap(), Pairing::HalfSplit);
        let problem = |tokens| Problem::new(Dtype::F32).q(Layout::tokens(tokens, 1, 8));
        let plans = Plans::default();
        let get = |tokens| plans.get(&rope, &problem(tokens)).unwrap();
        let first = get(0);
        for tokens in 1..100 {
            let planned = get(tokens);
            assert_eq!(planned.tokens(), tokens);
            assert!(Arc::ptr_eq(&planned, &get(tokens)));
            // In use, and so kept.
            assert!(Arc::ptr_eq(&first, &get(0)));
        }
        assert_eq!(plans.0.lock().unwrap().len(), MOST);
        let narrow = Problem::new(Dtype::F32).q(Layout::tokens(1, 1, 4));
        assert!(plans.get(&rope, &narrow).is_err());
    }
}
