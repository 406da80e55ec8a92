//! Accesses by the CPU and moves of pages, one kind at a time.

use hw_model::sync::{Condvar, Mutex};

/// Who is at a buffer now.
#[derive(Debug, Default)]
pub(super) struct Turns {
    now: Mutex<Now>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Now {
    accesses: u64,
    moving: bool,
}

/// The CPU may access the buffer by pointer while this lives; no page moves. A thread may hold several.
#[derive(Debug)]
#[must_use = "pages may move when this is dropped"]
pub struct CpuAccess<'a>(&'a Turns);

/// Pages may move while this lives.
#[derive(Debug)]
pub(super) struct Moving<'a>(&'a Turns);

impl Turns {
    /// Waits for a move under way, not for one that waits itself: who holds an access gets another.
    pub(super) fn access(&self) -> CpuAccess<'_> {
        let mut now = self.now.lock();
        while now.moving {
            self.changed.wait(&mut now);
        }
        now.accesses += 1;
        CpuAccess(self)
    }

    /// Waits for accesses and moves under way.
    pub(super) fn moving(&self) -> Moving<'_> {
        let mut now = self.now.lock();
        while now.moving || now.accesses > 0 {
            self.changed.wait(&mut now);
        }
        now.moving = true;
        Moving(self)
    }
}

impl Drop for CpuAccess<'_> {
    fn drop(&mut self) {
        self.0.now.lock().accesses -= 1;
        self.0.changed.notify_all();
    }
}

impl Drop for Moving<'_> {
    fn drop(&mut self) {
        self.0.now.lock().moving = false;
        self.0.changed.notify_all();
    }
}
