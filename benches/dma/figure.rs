//! One figure beside its target.

use criterion::Criterion;
use std::time::Duration;

/// What is measured.
pub struct Figure {
    /// What it belongs to.
    pub group: &'static str,
    /// What it is.
    pub name: &'static str,
    /// Nanoseconds that it may take; `None` if nothing was asked.
    pub target_ns: Option<f64>,
    /// How many of what is measured one round does.
    pub per: u64,
}

impl Figure {
    /// Measures `run`, which does a number of rounds and gives the time that counts, and prints what an undisturbed round
    /// takes beside the target. No assertion hangs on the clock.
    pub fn measure(self, c: &mut Criterion, mut run: impl FnMut(u64) -> Duration) {
        let Self { group, name, target_ns, per } = self;
        let mut samples = Vec::new();
        c.benchmark_group(group).bench_function(name, |bencher| {
            bencher.iter_custom(|rounds| {
                let elapsed = run(rounds);
                samples.push(elapsed.as_secs_f64() * 1e9 / (rounds * per) as f64);
                elapsed
            });
        });
        let Some(measured) = undisturbed(samples) else { return };
        match target_ns {
            Some(target) => {
                let word = if measured <= target { "reached" } else { "NOT reached" };
                println!("{group}, {name}: {target} ns target, {measured:.1} ns measured: {word}");
            }
            None => println!("{group}, {name}: {measured:.1} ns measured"),
        }
    }
}

/// The best tenth of the samples ends here: what the machine does when nothing else runs on it.
pub fn undisturbed(mut samples: Vec<f64>) -> Option<f64> {
    samples.sort_by(f64::total_cmp);
    samples.get(samples.len() / 10).copied()
}
