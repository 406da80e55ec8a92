//! Every decision of a run goes through here, so that a run can be written down, played again and cut shorter.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// What was decided in one run: while it was set up, and in each of its steps. Given back to a world it does the same
/// again; with steps left out, or numbers changed, it does something that is still a run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trace {
    /// Decisions of the set-up.
    pub setup: Vec<u32>,
    /// Decisions of each step.
    pub steps: Vec<Vec<u32>>,
}

/// Where decisions come from.
enum Source {
    Random(Box<ChaCha8Rng>),
    Given { trace: Trace, step: Option<usize>, next: usize },
}

/// The decisions of a run.
pub struct Choices {
    source: Source,
    made: Trace,
}

impl Choices {
    /// Decisions from a seed.
    #[must_use]
    pub fn random(seed: u64) -> Self {
        Self { source: Source::Random(Box::new(ChaCha8Rng::seed_from_u64(seed))), made: Trace::default() }
    }

    /// Decisions that were made before. Where they are not enough, the first possibility is taken.
    #[must_use]
    pub fn given(trace: Trace) -> Self {
        Self { source: Source::Given { trace, step: None, next: 0 }, made: Trace::default() }
    }

    /// The set-up is over, or a step is: what follows belongs to the next one.
    pub fn next_step(&mut self) {
        self.made.steps.push(Vec::new());
        if let Source::Given { step, next, .. } = &mut self.source {
            *step = Some(step.map_or(0, |step| step + 1));
            *next = 0;
        }
    }

    /// A number below `count`; 0 if that is 0.
    pub fn below(&mut self, count: u32) -> u32 {
        let count = count.max(1);
        let chosen = match &mut self.source {
            Source::Random(random) => random.random_range(0..count),
            Source::Given { trace, step, next } => {
                let decisions = match step {
                    None => Some(&trace.setup),
                    Some(step) => trace.steps.get(*step),
                };
                let given = decisions.and_then(|all| all.get(*next)).copied().unwrap_or(0);
                *next += 1;
                given % count
            }
        };
        match self.made.steps.last_mut() {
            Some(step) => step.push(chosen),
            None => self.made.setup.push(chosen),
        }
        chosen
    }

    /// A number from `low` to `high`, both possible.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        debug_assert!(low <= high && high - low < u64::from(u32::MAX));
        low + u64::from(self.below((high - low + 1) as u32))
    }

    /// True in so many of a thousand.
    pub fn chance(&mut self, of_thousand: u32) -> bool {
        // The first possibility is "no": a trace that has run out does not do what is rare.
        self.below(1000) >= 1000 - of_thousand.min(1000)
    }

    /// An index of something `len` long; `None` if it is empty.
    pub fn index(&mut self, len: usize) -> Option<usize> {
        (len > 0).then(|| self.below(len as u32) as usize)
    }

    /// One of `all`, which is not empty.
    pub fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u32) as usize]
    }

    /// What was decided so far.
    #[must_use]
    pub fn made(&self) -> &Trace {
        &self.made
    }
}
