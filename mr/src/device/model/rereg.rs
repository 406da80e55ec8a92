//! Reregistration: other rights, another domain or other memory behind a key that stays (IBTA volume 1, 10.6.3.5, 11.2.8.7;
//! ibv_rereg_mr(3)).
//!
//! Either all of it happens or the region is as it was. What is new is made beside what there is: another page list, IOVA
//! and interval, if the memory changes or whether it may be written does. Then the key is changed, in one go, and only then
//! does the old go, as in deregistration. Where nothing of the memory changes, bursts that began under the old rights are
//! waited for, so that none is left when the call returns. What is both in the old memory and in the new is locked or pinned
//! twice meanwhile: the limit must hold both.
//!
//! The key stays. The address stays too, unless the memory changes and none is given: then it is the memory's.

use super::ModelPd;
use super::region::{ModelRegion, Now, writing};
use crate::device::{Rereg, ReregError};
use crate::region::{Bringing, Core, How, Mapped, Teardown};
use hw_model::addr::RegionAddr;
use hw_model::bus::Drain;
use hw_model::hca::{KeyChange, KeyMemory};
use hw_model::sync::atomic::Ordering;
use hw_model::sync::{Arc, thread};
use odp::fault::Progress;
use std::any::Any;
use std::time::Duration;

#[cfg(all(test, shuttle))]
mod schedules;

/// A reregistration on its way. Dropping it before it is done leaves the region as it was, or as it was to be.
#[must_use = "a reregistration that is not polled changes nothing"]
pub struct Reregistration {
    region: Arc<ModelRegion>,
    next: Now,
    change: KeyChange,
    stage: Stage,
}

enum Stage {
    /// What is new, being brought in.
    Populating(Box<(Mapped, Bringing)>),
    /// Nothing of the memory changes.
    Ready,
    /// It has been done; what was before is going.
    Leaving(Leaving),
    /// It failed; what was made for it is going.
    Undoing(Box<Teardown>, ReregError),
    Over,
}

enum Leaving {
    Memory(Box<Teardown>),
    Bursts(Box<Drain>),
}

impl ModelRegion {
    /// Starts to change the region. For stepping; others call [`Region::rereg`](crate::Region::rereg).
    ///
    /// # Errors
    /// See [`ReregError`]. Nothing has changed then.
    pub fn begin_rereg(self: &Arc<Self>, change: Rereg) -> Result<Reregistration, ReregError> {
        if self.mapped.lock().is_none() {
            return Err(ReregError::Deregistered);
        }
        if self.changing.swap(true, Ordering::AcqRel) {
            return Err(ReregError::UnderWay);
        }
        let begun = self.prepare_rereg(change);
        if begun.is_err() {
            self.changing.store(false, Ordering::Release);
        }
        begun
    }

    fn prepare_rereg(self: &Arc<Self>, change: Rereg) -> Result<Reregistration, ReregError> {
        let Rereg { access, pd, memory } = change;
        let now = self.now();
        let mut next = now.clone();
        let mut of_key = KeyChange { access, ..KeyChange::default() };
        if let Some(pd) = pd {
            let pd: Arc<dyn Any + Send + Sync> = pd;
            let pd = pd.downcast::<ModelPd>().map_err(|_| ReregError::ForeignPd)?;
            if !Arc::ptr_eq(pd.device(), &self.device) {
                return Err(ReregError::ForeignPd);
            }
            of_key.pd = Some(pd.handle());
            next.pd = pd;
        }
        next.access = access.unwrap_or(now.access);
        let moves = memory.is_some();
        if let Some((memory, address)) = memory {
            next.address = address.unwrap_or(RegionAddr(memory.range().start().0));
            next.memory = memory;
        }
        let writable = writing(next.access);
        let Core { mode, snapshot, .. } = *now.core;
        let how = How { mode, pin: self.pin, snapshot, writable, hugetlb: now.core.list.is_huge() };
        let stage = if moves || writable != now.core.writable {
            let mapped = Mapped::unpopulated(self.device.dma(), &next.memory, how)?;
            (next.core, next.sequence) = (Arc::clone(&mapped.core), mapped.interval.sequence());
            of_key.memory = Some(KeyMemory {
                address: next.address,
                length: next.memory.range().len(),
                first_page_offset: mapped.core.offset_of(next.memory.range().start()),
                pages: Arc::clone(&mapped.core.list),
            });
            let bringing = mapped.populating();
            Stage::Populating(Box::new((mapped, bringing)))
        } else {
            Stage::Ready
        };
        Ok(Reregistration { region: Arc::clone(self), next, change: of_key, stage })
    }
}

impl Reregistration {
    /// One step; never waits. Not to be called again once it is done.
    ///
    /// # Panics
    /// If it was done before.
    pub fn poll(&mut self) -> Progress<Result<(), ReregError>> {
        match std::mem::replace(&mut self.stage, Stage::Over) {
            Stage::Populating(mut populating) => match populating.1.poll() {
                Ok(Progress::Done(())) => self.commit(Some(populating.0)),
                Ok(progress) => {
                    self.stage = Stage::Populating(populating);
                    if matches!(progress, Progress::Blocked) { Progress::Blocked } else { Progress::Again }
                }
                Err(failure) => self.undo(populating.0, ReregError::Map(failure.into())),
            },
            Stage::Ready => self.commit(None),
            Stage::Leaving(mut leaving) => {
                if leaving.poll(&self.next) {
                    self.over();
                    return Progress::Done(Ok(()));
                }
                self.stage = Stage::Leaving(leaving);
                Progress::Blocked
            }
            Stage::Undoing(mut teardown, error) => {
                if teardown.poll() {
                    self.over();
                    return Progress::Done(Err(error));
                }
                self.stage = Stage::Undoing(teardown, error);
                Progress::Blocked
            }
            Stage::Over => panic!("a reregistration is polled until it is done, and no further"),
        }
    }

    /// Whether the key is what it is to be: what is left is that what was before goes.
    #[must_use]
    pub fn is_committed(&self) -> bool {
        matches!(self.stage, Stage::Leaving(_))
    }

    /// Whether there is another page list, IOVA range and interval beside the region's own: the new ones on their way in, or
    /// the old ones, or those of a change that failed, on their way out.
    #[must_use]
    pub fn has_memory_beside(&self) -> bool {
        matches!(self.stage, Stage::Populating(_) | Stage::Undoing(..) | Stage::Leaving(Leaving::Memory(_)))
    }

    /// To the end, waiting where an invalidation or a burst is in the way.
    ///
    /// # Errors
    /// See [`ReregError`]. Nothing has changed then.
    pub fn wait(mut self) -> Result<(), ReregError> {
        if let Stage::Populating(populating) = &mut self.stage
            && let Err(failure) = populating.1.run()
            && let Stage::Populating(populating) = std::mem::replace(&mut self.stage, Stage::Over)
        {
            let _ = self.undo(populating.0, ReregError::Map(failure.into()));
        }
        let mut looks = 0_u32;
        loop {
            match self.poll() {
                Progress::Done(outcome) => return outcome,
                Progress::Again => {}
                Progress::Blocked if looks < 100 => {
                    looks += 1;
                    thread::yield_now();
                }
                Progress::Blocked => thread::sleep(Duration::from_micros(10)),
            }
        }
    }

    /// The change itself: from here on the key is what it is to be.
    fn commit(&mut self, new: Option<Mapped>) -> Progress<Result<(), ReregError>> {
        let region = Arc::clone(&self.region);
        let mut held = region.mapped.lock();
        let refused = if held.is_none() {
            Some(ReregError::Deregistered)
        } else {
            let change = std::mem::take(&mut self.change);
            region.device.change_key(region.key, change, self.next.target()).err().map(ReregError::Key)
        };
        if let Some(error) = refused {
            drop(held);
            return match new {
                Some(mapped) => self.undo(mapped, error),
                None => {
                    self.over();
                    Progress::Done(Err(error))
                }
            };
        }
        region.become_next(self.next.clone());
        let leaving = match new {
            Some(mapped) => {
                let old = held.replace(mapped).expect("looked at under the same lock");
                Leaving::Memory(Box::new(Teardown::begin(old)))
            }
            None => Leaving::Bursts(Box::new(self.next.core.space.memory().epoch().drain())),
        };
        drop(held);
        self.stage = Stage::Leaving(leaving);
        Progress::Again
    }

    fn undo(&mut self, mapped: Mapped, error: ReregError) -> Progress<Result<(), ReregError>> {
        self.stage = Stage::Undoing(Box::new(Teardown::begin(mapped)), error);
        Progress::Again
    }

    fn over(&self) {
        self.region.changing.store(false, Ordering::Release);
    }
}

impl Leaving {
    fn poll(&mut self, now: &Now) -> bool {
        match self {
            Self::Memory(teardown) => teardown.poll(),
            Self::Bursts(drain) => drain.poll(now.core.space.memory().epoch()),
        }
    }
}

impl Drop for Reregistration {
    fn drop(&mut self) {
        if let Stage::Populating(populating) = std::mem::replace(&mut self.stage, Stage::Over) {
            Teardown::begin(populating.0).wait();
        }
        self.over();
    }
}
