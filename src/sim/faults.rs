//! Page faults are answered and pages brought in ahead of them, one step at a time.

use super::world::World;
use hw_model::hca::FaultOutcome;
use odp::fault::Progress;

impl World {
    pub(super) fn step_some_fault(&mut self) {
        let count = self.devices.len();
        let Some(device) = self.choices.index(count) else { return };
        // The busiest is helped first if the one that was picked has nothing to do.
        let device =
            (0..count).map(|n| (device + n) % count).find(|device| self.devices[*device].has_faults());
        let Some(device) = device else { return };
        let waiting = !self.devices[device].device.hca().faults().is_empty();
        let jobs = self.devices[device].jobs.len();
        if waiting && (jobs == 0 || jobs < 4 && self.choices.chance(500)) {
            self.take_fault(device);
        } else if let Some(job) = self.choices.index(jobs) {
            self.step_fault(device, job);
        }
    }

    pub(super) fn take_fault(&mut self, device: usize) -> bool {
        let Some(job) = self.devices[device].device.next_fault() else { return false };
        self.counts.one("page faults");
        self.note(|| format!("fault event at {device}: {:?}", job.event()));
        self.devices[device].jobs.push(job);
        true
    }

    /// Whether it did something.
    pub(super) fn step_fault(&mut self, device: usize, job: usize) -> bool {
        let progress = self.devices[device].jobs[job].poll();
        self.note(|| format!("fault {job} at {device}: {progress:?}"));
        match progress {
            Progress::Blocked => {
                self.counts.one("faults that waited for an invalidation");
                false
            }
            Progress::Again => true,
            Progress::Done(outcome) => {
                drop(self.devices[device].jobs.swap_remove(job));
                self.devices[device].asleep = None;
                if outcome == FaultOutcome::Failed {
                    self.counts.one("page faults that failed");
                }
                true
            }
        }
    }

    pub(super) fn step_some_prefetch(&mut self) {
        let count = self.devices.len();
        let Some(device) = self.choices.index(count) else { return };
        let jobs = self.devices[device].prefetches.len();
        if jobs == 0 || jobs < 3 && self.choices.chance(300) {
            self.take_prefetch(device);
        } else if let Some(job) = self.choices.index(jobs) {
            self.step_prefetch(device, job);
        }
    }

    pub(super) fn take_prefetch(&mut self, device: usize) -> bool {
        let Some(job) = self.devices[device].device.next_prefetch() else { return false };
        self.counts.one("prefetches");
        self.note(|| format!("prefetch begun at {device}"));
        self.devices[device].prefetches.push(job);
        true
    }

    /// Whether it did something.
    pub(super) fn step_prefetch(&mut self, device: usize, job: usize) -> bool {
        let progress = self.devices[device].prefetches[job].poll();
        self.note(|| format!("prefetch {job} at {device}: {progress:?}"));
        match progress {
            Progress::Blocked => false,
            Progress::Again => true,
            Progress::Done(()) => {
                drop(self.devices[device].prefetches.swap_remove(job));
                true
            }
        }
    }
}
