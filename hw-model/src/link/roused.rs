//! Engines of this process that packets were left for and that have not heard of it yet.
//!
//! Whoever sent decides how they hear: an engine's thread wakes them; a thread that posts or polls runs them itself, one
//! after the other, so that a request goes to its peer and its answer comes back within one call and nobody is woken.

use super::Ingress;
use crate::sync::Arc;
use std::time::Instant;

/// Engines remembered. A caller's packets go to one peer, and back.
const ROOM: usize = 4;

/// Engines that are to be run or woken.
#[derive(Default)]
pub struct Roused {
    engines: [Option<(Arc<dyn Ingress>, usize)>; ROOM],
    count: usize,
    /// When they are run. A caller reads the clock once, however many engines it runs.
    instant: Option<Instant>,
}

impl Roused {
    /// Remembers an engine, once. With no room left it is woken instead.
    pub fn add(&mut self, ingress: &Arc<dyn Ingress>, index: usize) {
        let known = self.engines[..self.count].iter().flatten();
        if known.into_iter().any(|(other, engine)| Arc::ptr_eq(other, ingress) && *engine == index) {
            return;
        }
        match self.engines.get_mut(self.count) {
            Some(place) => {
                *place = Some((Arc::clone(ingress), index));
                self.count += 1;
            }
            None => ingress.wake(index),
        }
    }

    /// Takes over what `other` remembers.
    pub fn take_from(&mut self, other: &mut Self) {
        if self.count == 0 {
            std::mem::swap(&mut self.engines, &mut other.engines);
            std::mem::swap(&mut self.count, &mut other.count);
            return;
        }
        while let Some((ingress, index)) = other.pop() {
            self.add(&ingress, index);
        }
    }

    /// The time for those that are run.
    pub fn instant(&mut self) -> Instant {
        *self.instant.get_or_insert_with(Instant::now)
    }

    /// Wakes all of them.
    pub fn wake(&mut self) {
        while let Some((ingress, index)) = self.pop() {
            ingress.wake(index);
        }
    }

    /// Runs them, and those that they rouse, for up to `steps` steps, and wakes those that are left.
    pub fn run(&mut self, steps: &mut usize) {
        while *steps > 0
            && let Some((ingress, index)) = self.pop()
        {
            ingress.run(index, steps, self);
        }
        self.wake();
    }

    fn pop(&mut self) -> Option<(Arc<dyn Ingress>, usize)> {
        self.count = self.count.checked_sub(1)?;
        self.engines[self.count].take()
    }
}

impl std::fmt::Debug for Roused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Roused").field("engines", &self.count).finish_non_exhaustive()
    }
}
