//! What the rungs cost the application: each call that changes its memory, a call that does not, and the first touch of a
//! page. `cargo bench --bench rungs`; the figures are in docs/rungs.md.
//!
//! Expected. Plain: 0.2 to 1 us a call. Events: memory that is not watched costs nothing more; a drop, unmap or move of
//! watched memory waits for the monitor thread to read its event, two thread switches, 5 to 20 us; first touch as before, since
//! write protection is asynchronous. Exact: every call that may take pages away goes to the supervisor and back, two thread
//! switches again, 3 to 10 us, whatever memory it is about, and a few more where a region is met and drained; other calls pay
//! for some thirty instructions of the filter; first touch nothing.
//!
//! A filter stays, so each row is measured in a process of its own, which is this program again. The least of several batches
//! counts.

mod memory;

use hw_model::addr::VirtRange;
use hw_model::sync::Arc;
use memory::{BATCH, Subject};
use odp::notifier::{Interval, Notify, Raise};
use odp::space::process::{Exact, Options, ProcessSpace};
use odp::space::{AddressSpace, Rung, Watch};
use std::process::{Command, ExitCode};
use std::time::Instant;

/// In a child: the row that it measures.
const ROW: &str = "ANYPAGE_BENCH_RUNG";
/// Set in a child that is only to show that it runs.
const QUICK: &str = "ANYPAGE_BENCH_QUICK";

/// Who hears of the memory that is measured.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Row {
    Plain,
    EventsElsewhere,
    EventsHere,
    ExactElsewhere,
    ExactHere,
    Poll,
}

impl Row {
    const ALL: [Self; 6] = [
        Self::Plain,
        Self::Poll,
        Self::EventsElsewhere,
        Self::EventsHere,
        Self::ExactElsewhere,
        Self::ExactHere,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Poll => "poll, registered",
            Self::EventsElsewhere => "events, other memory",
            Self::EventsHere => "events, registered",
            Self::ExactElsewhere => "exact, other memory",
            Self::ExactHere => "exact, registered",
        }
    }

    fn is_registered(self) -> bool {
        matches!(self, Self::Poll | Self::EventsHere | Self::ExactHere)
    }
}

fn main() -> ExitCode {
    if let Ok(row) = std::env::var(ROW) {
        let Some(row) = Row::ALL.into_iter().find(|known| known.name() == row) else {
            eprintln!("{ROW}={row} is no row");
            return ExitCode::from(2);
        };
        return match measure(row) {
            Ok(cells) => {
                println!("{}", cells.map(|ns| format!("{ns:.0}")).join(" "));
                ExitCode::SUCCESS
            }
            Err(reason) => {
                println!("SKIPPED rungs ({}): {reason}", row.name());
                ExitCode::SUCCESS
            }
        };
    }
    let quick = std::env::args().any(|argument| argument == "--test");
    print!("{:<22}", "ns a call");
    Subject::ALL.iter().for_each(|subject| print!("{:>16}", subject.name()));
    println!();
    for row in Row::ALL {
        let mut command = Command::new(std::env::current_exe().expect("a path"));
        command.env(ROW, row.name());
        if quick {
            command.env(QUICK, "1");
        }
        let output = command.output().expect("this program runs");
        let text = String::from_utf8_lossy(&output.stdout);
        if !output.status.success() {
            eprintln!("{}: {}\n{}", row.name(), output.status, String::from_utf8_lossy(&output.stderr));
            return ExitCode::FAILURE;
        }
        if text.starts_with("SKIPPED") {
            print!("{text}");
            continue;
        }
        print!("{:<22}", row.name());
        text.split_whitespace().for_each(|cell| print!("{cell:>16}"));
        println!();
    }
    ExitCode::SUCCESS
}

/// An owner that has nothing to take down.
struct Owner;

impl Notify for Owner {
    fn clear(&self, _range: VirtRange, raise: Raise<'_>) {
        raise.raise();
    }
    fn unlink(&self, _range: VirtRange) {}
}

/// Nanoseconds of each subject.
fn measure(row: Row) -> Result<[f64; Subject::ALL.len()], String> {
    let options = match row {
        Row::Plain => None,
        Row::Poll => Some((Options { strongest: Rung::Poll, ..Options::default() }, Rung::Poll)),
        Row::EventsElsewhere | Row::EventsHere => {
            Some((Options { strongest: Rung::Events, ..Options::default() }, Rung::Events))
        }
        Row::ExactElsewhere | Row::ExactHere => {
            let exact = Exact::install().map_err(|error| error.to_string())?;
            Some((Options { exact: Some(exact), ..Options::default() }, Rung::Exact))
        }
    };
    let mut space = None;
    if let Some((options, rung)) = options {
        let opened = ProcessSpace::open(options).map_err(|error| error.to_string())?;
        if opened.capabilities().rung != rung {
            return Err(format!("userfaultfd {}", opened.capabilities().userfaultfd));
        }
        space = Some(opened);
    }
    let registered = space.filter(|_| row.is_registered());
    let batches = if std::env::var_os(QUICK).is_some() { 1 } else { 40 };
    Ok(Subject::ALL.map(|subject| {
        let best =
            (0..batches).map(|_| one_mapping(subject, registered.as_ref())).fold(f64::INFINITY, f64::min);
        best / BATCH as f64
    }))
}

/// Nanoseconds of the quickest batch, on fresh memory.
fn one_mapping(subject: Subject, registered: Option<&Arc<ProcessSpace>>) -> f64 {
    let memory = memory::Memory::map();
    let hold = registered.map(|space| hold(space, memory.range()));
    subject.prepare(&memory);
    let timed = Subject::batches().map(|batch| {
        let started = Instant::now();
        subject.run(&memory, batch);
        started.elapsed().as_nanos() as f64
    });
    let best = timed.fold(f64::INFINITY, f64::min);
    drop(hold);
    best
}

fn hold(space: &Arc<ProcessSpace>, range: VirtRange) -> (Interval, Watch) {
    let watch = space.watch(range).expect("mapped");
    (space.notifiers().register(range, Arc::new(Owner)), watch)
}
