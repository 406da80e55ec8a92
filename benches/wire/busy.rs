//! How long each thread of this process has run. On a machine with other work the clock says little; what the busiest thread
//! needed for a byte says how fast it would go with a processor for each.

use std::collections::HashMap;
use std::time::Instant;

/// What went over in a measurement.
pub struct Flow {
    /// Bytes a second of the clock.
    pub rate: f64,
    /// Bytes a second of the thread that ran longest.
    pub possible: f64,
}

impl Flow {
    pub fn of(bytes: u64, begun: Instant, busy: &Busy) -> Self {
        let seconds = begun.elapsed().as_secs_f64();
        Self { rate: bytes as f64 / seconds, possible: bytes as f64 / busy.most().unwrap_or(seconds) }
    }
}

/// Nanoseconds that each thread had run, by its number.
pub struct Busy(HashMap<String, u64>);

impl Busy {
    pub fn now() -> Self {
        let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
        let ran = |path: std::path::PathBuf| -> Option<u64> {
            std::fs::read_to_string(path.join("schedstat")).ok()?.split(' ').next()?.parse().ok()
        };
        let of = |task: std::fs::DirEntry| {
            Some((task.file_name().to_string_lossy().into_owned(), ran(task.path())?))
        };
        Self(tasks.filter_map(of).collect())
    }

    /// Seconds that the thread ran which has run longest since; `None` where the kernel does not count them.
    fn most(&self) -> Option<f64> {
        let now = Self::now();
        let since = |(task, ran): (&String, &u64)| ran - self.0.get(task).copied().unwrap_or_default();
        let most = now.0.iter().map(since).max()?;
        (most > 0).then_some(most as f64 / 1e9)
    }
}
