//! The simulated world: several hosts, each with processes, an IOMMU and HCAs, and a network between them, all driven by
//! one thread from one seed, while an oracle knows what every byte may be.
//!
//! A run is a set-up and some thousand steps. Each step does one small thing: a micro-step of an engine, a packet, a step
//! of a page fault, of an invalidation, of a registration, an access of a program. Which, is drawn by weights that are
//! themselves drawn (swarm testing: Groce et al., ISSTA 2012), so that runs differ in kind. After each step invariants are
//! checked. Every decision is written down, so a run that broke can be played again and cut shorter.
//!
//! ```text
//! choices    every decision of a run           network   packets in virtual time
//! memory     the oracle; with transfers, and bytes: those of one page
//! setup      hosts, devices, processes         traffic, regions, changes, buffers, programs   what steps do;
//!            reregs, implicit, aliases (windows, fast registration), unreliable: parts of those
//! world      the state and the steps           checks, settle              what must hold, during and at the end
//! runner     many seeds on several threads     shrink    shorter traces    command   the command line
//! ```

mod aliases;
mod buffers;
mod bytes;
mod changes;
mod checks;
pub mod choices;
pub mod command;
mod counts;
mod faults;
mod gpus;
mod hugetlb;
mod implicit;
pub mod memory;
mod network;
mod programs;
mod regions;
mod reregs;
pub mod runner;
mod settle;
mod setup;
mod shrink;
mod traffic;
mod transfers;
mod unreliable;
mod verbs;
mod world;

pub use choices::{Choices, Trace};
pub use command::{Args, main};
pub use counts::Counts;
pub use world::{Options, World};

/// Something that is not as it must be: what a run ends with when it has found a bug.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{rule}: {detail}")]
pub struct Broken {
    /// What was broken, always in the same words.
    pub rule: &'static str,
    /// How.
    pub detail: String,
}

impl Broken {
    fn new(rule: &'static str, detail: impl ToString) -> Self {
        Self { rule, detail: detail.to_string() }
    }
}
