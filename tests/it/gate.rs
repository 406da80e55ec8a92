//! Holding a thread at a fault point until the test lets it go on.

use hw_model::fault_plan::Action;
use hw_model::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// Nobody waits longer than this: a test that fails should say so rather than hang.
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Default)]
struct State {
    arrived: u64,
    open: bool,
}

/// Shut until opened.
#[derive(Default)]
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

impl Gate {
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// What a fault plan does at a point where threads are to stop.
    pub fn action(self: &Arc<Self>) -> Action {
        let gate = Arc::clone(self);
        Action::Run(Arc::new(move |_| gate.pass()))
    }

    fn pass(&self) {
        let end = Instant::now() + PATIENCE;
        let mut state = self.state.lock();
        state.arrived += 1;
        self.changed.notify_all();
        while !state.open && Instant::now() < end {
            self.changed.wait_for(&mut state, Duration::from_millis(50));
        }
    }

    /// Waits until somebody stands before the gate.
    pub fn wait_for_arrival(&self) {
        let end = Instant::now() + PATIENCE;
        let mut state = self.state.lock();
        while state.arrived == 0 {
            assert!(Instant::now() < end, "nobody came to the gate");
            self.changed.wait_for(&mut state, Duration::from_millis(50));
        }
    }

    pub fn open(&self) {
        self.state.lock().open = true;
        self.changed.notify_all();
    }
}
