//! `anypage sim`.

use super::choices::Trace;
use super::runner::{Failure, Shrunk, Tally, run_all, run_trace, shorten};
use super::{Broken, Counts, Options};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};
use std::fmt::Write as _;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::process::ExitCode;
use std::{env, fs, thread};

/// Lines of the shortened run that are printed; the last ones say how it broke.
const LINES: usize = 60;

/// Simulates whole worlds from seeds: hosts with processes, IOMMUs and HCAs, a network that loses and reorders, memory
/// that changes under the regions; one thread decides everything, and an oracle knows what every byte may be.
#[derive(Debug, Parser)]
#[command(
    after_help = "Exit status: 0 every run was clean, 1 a run broke a rule, 2 the command line or its input was wrong."
)]
pub struct Args {
    /// Seeds to run, both ends included: A..B, or one seed.
    #[arg(long, default_value = "1..100", value_parser = parse_seeds)]
    seeds: RangeInclusive<u64>,
    /// Threads, each with runs of its own.
    #[arg(long)]
    jobs: Option<usize>,
    /// Steps of each run, apart from its end, in which everything comes to rest.
    #[arg(long, default_value_t = 3000)]
    steps: usize,
    /// A bug put in on purpose; needs a build with `--features planted-bugs`.
    #[arg(long, value_name = "NAME")]
    bug: Option<String>,
    /// A fault point and the share of its visits that fail, instead of what the seed decides; `none` for no failures.
    /// Can be given several times. A name may end in `*`.
    #[arg(long, value_name = "POINT=SHARE", value_parser = parse_plan)]
    plan: Vec<PlanEntry>,
    /// Plays a trace that an earlier run has left, instead of seeds.
    #[arg(long, value_name = "FILE", conflicts_with = "seeds")]
    replay: Option<PathBuf>,
    /// Where the shortened trace of a run that broke is put [default: the directory for temporary files].
    #[arg(long, value_name = "DIR")]
    traces: Option<PathBuf>,
    /// Prints a JSON report (docs/sim.schema.json) instead of lines.
    #[arg(long)]
    json: bool,
}

/// One `--plan`; `None` is `none`.
type PlanEntry = Option<(String, f64)>;

/// What a trace file holds.
#[derive(Debug, Serialize, Deserialize)]
struct TraceFile {
    seed: u64,
    bug: Option<String>,
    plan: Option<Vec<(String, f64)>>,
    trace: Trace,
}

fn parse_seeds(text: &str) -> Result<RangeInclusive<u64>, String> {
    let number = |text: &str| text.trim().parse::<u64>().map_err(|_| format!("`{text}` is no seed"));
    let (first, last) = text.split_once("..").unwrap_or((text, text));
    let (first, last) = (number(first)?, number(last.trim_start_matches('='))?);
    if first > last {
        return Err(format!("{first}..{last} holds no seed"));
    }
    Ok(first..=last)
}

fn parse_plan(text: &str) -> Result<PlanEntry, String> {
    if text == "none" {
        return Ok(None);
    }
    let (point, share) = text.split_once('=').ok_or("POINT=SHARE, as in dma.link=0.05, or none")?;
    let share: f64 = share.parse().map_err(|_| format!("`{share}` is no share"))?;
    if point.is_empty() || !(0.0..=1.0).contains(&share) {
        return Err("a share is a number from 0 to 1".to_owned());
    }
    Ok(Some((point.to_owned(), share)))
}

/// Runs the command.
#[must_use]
pub fn main(args: &Args) -> ExitCode {
    match execute(args) {
        Ok(clean) => ExitCode::from(u8::from(!clean)),
        Err(message) => {
            anstream::eprintln!("error: {message}");
            ExitCode::from(2)
        }
    }
}

/// Whether everything was clean, or what is wrong with the input.
fn execute(args: &Args) -> Result<bool, String> {
    let plan = (!args.plan.is_empty()).then(|| args.plan.iter().flatten().cloned().collect());
    let mut options = Options { plan, log: false };
    if let Some(path) = &args.replay {
        let text = fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
        let file: TraceFile =
            serde_json::from_str(&text).map_err(|error| format!("{}: {error}", path.display()))?;
        plant(args.bug.as_deref().or(file.bug.as_deref()))?;
        options.plan = options.plan.or(file.plan);
        options.log = true;
        return Ok(replay(&file.trace, &options, args));
    }
    plant(args.bug.as_deref())?;
    let jobs = args.jobs.unwrap_or_else(|| thread::available_parallelism().map_or(1, usize::from));
    let bar = ProgressBar::new(args.seeds.end() - args.seeds.start() + 1);
    let style = ProgressStyle::with_template("{bar:40} {pos} of {len} runs, {per_sec}, {eta} left");
    bar.set_style(style.map_err(|error| error.to_string())?);
    let tally = run_all(args.seeds.clone(), jobs, args.steps, &options, |_| bar.inc(1));
    bar.finish_and_clear();
    let Some((seed, failure)) = &tally.failed else {
        report_clean(args, &tally);
        return Ok(true);
    };
    if !args.json {
        anstream::println!("seed {seed} broke after {} steps: {}", failure.steps, failure.broken);
        anstream::println!("cutting it shorter ...");
    }
    let shrunk = shorten(failure, &options);
    let left = TraceFile {
        seed: *seed,
        bug: args.bug.clone(),
        plan: options.plan.clone(),
        trace: shrunk.trace.clone(),
    };
    let directory = args.traces.clone().unwrap_or_else(env::temp_dir);
    let path = directory.join(format!("anypage-sim-{seed}.json"));
    let text = serde_json::to_string(&left).map_err(|error| error.to_string())?;
    fs::write(&path, text).map_err(|error| format!("{}: {error}", path.display()))?;
    report_failure(args, &tally, *seed, failure, &shrunk, &path);
    Ok(false)
}

fn replay(trace: &Trace, options: &Options, args: &Args) -> bool {
    let outcome = run_trace(trace, options);
    let broken = outcome.failure.map(|failure| failure.broken);
    if args.json {
        print_json(&Report {
            runs: 1,
            failures: broken.iter().map(|broken| FailureReport::new(broken, None)).collect(),
            counts: &outcome.counts,
        });
    } else {
        outcome.log.iter().for_each(|line| anstream::println!("{line}"));
        match &broken {
            Some(broken) => anstream::println!("broke: {broken}"),
            None => anstream::println!("clean: {} steps", trace.steps.len()),
        }
    }
    broken.is_none()
}

/// What `--json` prints; docs/sim.schema.json describes it.
#[derive(Serialize, schemars::JsonSchema)]
struct Report<'a> {
    /// Runs that ended.
    runs: u64,
    /// At most one: the runner stops at the first.
    failures: Vec<FailureReport>,
    /// What happened, over all runs, by name.
    counts: &'a Counts,
}

/// A run that broke a rule.
#[derive(Serialize, schemars::JsonSchema)]
struct FailureReport {
    /// What was broken, always in the same words.
    rule: String,
    /// How.
    detail: String,
    /// The run's seed; none for a trace that was played.
    seed: Option<u64>,
    /// Steps up to the break.
    steps: Option<usize>,
    /// Steps of the shortened run.
    shrunk_steps: Option<usize>,
    /// The command line that plays the run again.
    replay: Option<String>,
    /// The command line that plays the shortened run.
    replay_shrunk: Option<String>,
}

impl FailureReport {
    fn new(broken: &Broken, seed: Option<u64>) -> Self {
        Self {
            rule: broken.rule.to_owned(),
            detail: broken.detail.clone(),
            seed,
            steps: None,
            shrunk_steps: None,
            replay: None,
            replay_shrunk: None,
        }
    }
}

fn print_json(report: &Report<'_>) {
    match serde_json::to_string_pretty(report) {
        Ok(text) => anstream::println!("{text}"),
        Err(error) => anstream::eprintln!("error: {error}"),
    }
}

fn report_clean(args: &Args, tally: &Tally) {
    if args.json {
        return print_json(&Report { runs: tally.runs, failures: Vec::new(), counts: &tally.counts });
    }
    print_counts(&tally.counts);
    anstream::println!(
        "clean: seeds {}..{}, {} runs of {} steps",
        args.seeds.start(),
        args.seeds.end(),
        tally.runs,
        args.steps
    );
}

fn print_counts(counts: &Counts) {
    for (what, count) in counts.iter() {
        anstream::println!("{count:>12}  {what}");
    }
}

/// What follows `anypage sim` so that the same happens again, apart from the seeds.
fn conditions(args: &Args) -> String {
    let mut text = String::new();
    if let Some(bug) = &args.bug {
        let _ = write!(text, " --bug {bug}");
    }
    for entry in &args.plan {
        let _ = match entry {
            Some((point, share)) => write!(text, " --plan '{point}={share}'"),
            None => write!(text, " --plan none"),
        };
    }
    text
}

fn report_failure(
    args: &Args,
    tally: &Tally,
    seed: u64,
    failure: &Failure,
    shrunk: &Shrunk,
    path: &std::path::Path,
) {
    let replay = format!("anypage sim --seeds {seed}..{seed} --steps {}{}", failure.steps, conditions(args));
    let replay_shrunk = format!("anypage sim --replay {}", path.display());
    if args.json {
        let report = FailureReport {
            steps: Some(failure.steps),
            shrunk_steps: Some(shrunk.trace.steps.len()),
            replay: Some(replay),
            replay_shrunk: Some(replay_shrunk),
            ..FailureReport::new(&failure.broken, Some(seed))
        };
        return print_json(&Report { runs: tally.runs, failures: vec![report], counts: &tally.counts });
    }
    anstream::println!(
        "{} of {} steps are enough (found in {} runs); the last of what happens in them:",
        shrunk.trace.steps.len(),
        failure.steps,
        shrunk.runs
    );
    let skipped = shrunk.log.len().saturating_sub(LINES);
    shrunk.log.iter().skip(skipped).for_each(|line| anstream::println!("  {line}"));
    anstream::println!("  broke: {}", shrunk.broken);
    print_counts(&tally.counts);
    anstream::println!("seed {seed}: {}", failure.broken);
    anstream::println!("replay:         {replay}");
    anstream::println!("replay shorter: {replay_shrunk}");
}

#[cfg(feature = "planted-bugs")]
fn plant(bug: Option<&str>) -> Result<(), String> {
    use hw_model::planted::{Bug, plant};
    let known = || Bug::ALL.map(Bug::name).join(", ");
    let bug = bug.map(|name| {
        Bug::ALL
            .into_iter()
            .find(|bug| bug.name() == name)
            .ok_or_else(|| format!("no bug `{name}`; there are {}", known()))
    });
    plant(bug.transpose()?);
    Ok(())
}

#[cfg(not(feature = "planted-bugs"))]
fn plant(bug: Option<&str>) -> Result<(), String> {
    match bug {
        None => Ok(()),
        Some(name) => Err(format!(
            "this build has no bug `{name}` to put in; build with `cargo run --release --features planted-bugs -- sim --bug \
             {name}`"
        )),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_documented_schema_is_the_real_one() {
        crate::schema::check("sim", &schemars::schema_for!(super::Report<'static>));
    }
}
