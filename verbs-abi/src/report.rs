//! What a process leaves for `anypage run` to tell: one file a process, written when it first opens a device and again when
//! it ends. A process that is killed leaves the first.
//!
//! ```text
//! program ib_write_bw
//! ended                        absent in the first
//! rung exact
//! rule 0 1                     number of the rule in the plan, times that it fired
//! count packets_sent 1234
//! ```

use crate::process::{Process, program_name, settings};
use hw_model::sync::atomic::{AtomicU32, Ordering};
use odp::space::process::ProcessSpace;
use std::fmt::Write;

/// The process that left a report before: the next one is its last.
static LEFT: AtomicU32 = AtomicU32::new(0);

/// Writes the report, if one is wanted.
pub(crate) fn leave(process: &Process) {
    let Some(directory) = &settings().report else { return };
    let id = std::process::id();
    let ended = LEFT.swap(id, Ordering::Relaxed) == id;
    // Nobody is there to hear of a failure: `anypage run` says whose report is missing.
    let _ = std::fs::write(directory.join(id.to_string()), text(process, ended));
}

fn text(process: &Process, ended: bool) -> String {
    let mut text = format!("program {}\n", program_name());
    let mut line = |words: std::fmt::Arguments<'_>| {
        // Writing to a string cannot fail.
        let _ = text.write_fmt(words);
    };
    if ended {
        line(format_args!("ended\n"));
    }
    let space: &ProcessSpace = &process.space;
    line(format_args!("rung {}\n", space.capabilities().rung));
    for (rule, fired) in process.plan().map(|plan| plan.fired()).unwrap_or_default() {
        line(format_args!("rule {rule} {fired}\n"));
    }
    for device in process.opened() {
        for (name, count) in device.hca().stats().named() {
            line(format_args!("count {name} {count}\n"));
        }
        for (name, count) in device.hca().link_counts() {
            line(format_args!("count {name} {count}\n"));
        }
    }
    let stats = space.stats();
    for (name, count) in [
        ("pages_removed", stats.removed),
        ("pages_unmapped", stats.unmapped),
        ("pages_moved", stats.moved),
        ("pages_suspected", stats.suspected),
        ("copies_vanished", stats.vanished),
        ("stale_translations", stats.retired_uses),
    ] {
        line(format_args!("count {name} {count}\n"));
    }
    text
}
