//! Fault plans in files: what is to go wrong, where, and how often, in TOML.
//!
//! ```toml
//! seed = 1                   # what probabilities draw from; 0 if it is not given
//!
//! [[rule]]
//! point = "mr.page_fault"    # or the beginning of names: "dma.*"
//! action = "fail"            # or "delay", with delay = "5ms"
//! skip = 6                   # visits that pass first
//! times = 1                  # how often at most; -1, and nothing, is for ever
//! direction = "receive"      # what the point must be about
//! ```
//!
//! The words are those of Linux fault injection (Documentation/fault-injection/fault-injection.rst: probability in percent,
//! interval, times) and of hfi1's (skip, opcode, direction). A plan that is wrong is refused as a whole, and [`PlanError`]
//! points at the word.

mod error;
mod rule;
mod table;

pub use error::{PlanError, Wrong};
pub use rule::WORDS;

use hw_model::fault_plan::{FaultPlan, Point, Rule};
use hw_model::sync::Arc;
use table::Table;

/// A plan as its file says it.
#[derive(Clone, Debug)]
pub struct Plan {
    seed: u64,
    rules: Vec<PlannedRule>,
}

/// A rule with what only its file knows.
#[derive(Clone, Debug)]
pub struct PlannedRule {
    /// What is to happen.
    pub rule: Rule,
    /// The program that it is for; every one if there is none.
    pub process: Option<String>,
    /// The line of the file where it begins; the first is 1.
    pub line: usize,
}

/// The part of a plan that is for one process.
#[derive(Clone, Debug)]
pub struct ProcessPlan {
    /// What its devices are given.
    pub faults: Arc<FaultPlan>,
    /// Which rules of the file those of `faults` are.
    numbers: Vec<usize>,
}

impl Plan {
    /// Reads a plan.
    ///
    /// # Errors
    /// See [`PlanError`]: the first thing that is wrong.
    pub fn read(text: &str) -> Result<Self, PlanError> {
        let parsed = table::parse(text)?;
        let mut file = Table::new(&parsed, 0..text.len().min(1));
        let seed = file.take_unsigned("seed")?.map_or(0, |(seed, _)| seed);
        let tables = file.take_tables("rule")?;
        file.nothing_else(&["seed", "rule"])?;
        if tables.is_empty() {
            return Err(PlanError { wrong: Wrong::NoRules, span: 0..0 });
        }
        let rules = tables.into_iter().map(|table| rule::read(text, table)).collect::<Result<_, _>>()?;
        Ok(Self { seed, rules })
    }

    /// Its rules, in the order of the file.
    #[must_use]
    pub fn rules(&self) -> &[PlannedRule] {
        &self.rules
    }

    /// What of it is for the program of this name.
    #[must_use]
    pub fn for_process(&self, name: &str) -> ProcessPlan {
        let mine = |rule: &PlannedRule| rule.process.as_ref().is_none_or(|process| process == name);
        let (numbers, rules) = self
            .rules
            .iter()
            .enumerate()
            .filter(|(_, rule)| mine(rule))
            .map(|(number, planned)| (number, planned.rule.clone()))
            .unzip();
        ProcessPlan { faults: FaultPlan::new(self.seed, rules), numbers }
    }
}

impl ProcessPlan {
    /// How often each rule has fired here, by its number in the file.
    #[must_use]
    pub fn fired(&self) -> Vec<(usize, u64)> {
        self.numbers.iter().copied().zip(self.faults.fired().into_iter().map(|(_, fired)| fired)).collect()
    }
}

/// Every fault point that a plan for a process can name.
#[must_use]
pub fn points() -> Vec<Point> {
    let parts: [&[Point]; 6] = [
        &hw_model::hca::points::ALL,
        &hw_model::hca::points::OCCASIONS,
        &hw_model::link::PLANNED_POINTS,
        &odp::space::points::ALL,
        &crate::points::ALL,
        &crate::dma::points::ALL,
    ];
    parts.concat()
}

#[cfg(test)]
mod tests;
