//! The memory of this process, on one rung.

use crate::memory::{self, Memory};
use crate::refuse;
use crate::world::{Allow, Area, By, Cpu, Kind, Skip, World};
use hw_model::addr::{VirtAddr, VirtRange};
use hw_model::sync::{Arc, Mutex};
use odp::space::process::{Exact, Options, OwnedMemory, ProcessSpace, Support};
use odp::space::{AddressSpace, Rung};

/// The rung, and what it runs in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Where {
    Exact,
    Events,
    Owned,
    Poll,
    /// A process that is refused userfaultfd and seccomp, as in many containers, and takes what is left.
    Refused,
}

impl Where {
    pub const ALL: [Self; 5] = [Self::Exact, Self::Events, Self::Owned, Self::Poll, Self::Refused];

    pub fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Events => "events",
            Self::Owned => "owned",
            Self::Poll => "poll",
            Self::Refused => "refused",
        }
    }
}

pub struct ProcessWorld {
    place: Where,
    pub space: Arc<ProcessSpace>,
    pub memory: Memory,
    owned: Mutex<Vec<OwnedMemory>>,
}

impl ProcessWorld {
    /// In a process that has one thread.
    pub fn new(place: Where) -> Result<Self, Skip> {
        let mut options = Options::default();
        match place {
            Where::Exact => {
                options.exact = Some(Exact::install().map_err(|error| Skip(error.to_string()))?);
            }
            Where::Events | Where::Owned => options.strongest = Rung::Events,
            Where::Poll => options.strongest = Rung::Poll,
            Where::Refused => {
                refuse::userfaultfd_and_seccomp()
                    .map_err(|error| Skip(format!("not even a filter of our own: {error}")))?;
                assert!(Exact::install().is_err(), "seccomp was to be refused");
            }
        }
        let space = ProcessSpace::open(options).map_err(|error| Skip(error.to_string()))?;
        let found = space.capabilities();
        let expected = match place {
            Where::Exact => Rung::Exact,
            Where::Events => Rung::Events,
            Where::Owned => found.rung,
            Where::Poll | Where::Refused => Rung::Poll,
        };
        if found.rung != expected {
            return Err(Skip(format!("userfaultfd {}", found.userfaultfd)));
        }
        if place == Where::Refused {
            assert!(matches!(found.userfaultfd, Support::Refused(_)), "userfaultfd was to be refused");
        }
        Ok(Self { place, space, memory: Memory::default(), owned: Mutex::new(Vec::new()) })
    }

    fn changes_owned<R>(&self, range: VirtRange, change: impl FnOnce(&OwnedMemory, u64) -> R) -> R {
        let owned = self.owned.lock();
        let found = owned.iter().find(|memory| memory.range().contains(range)).expect("mapped here");
        change(found, range.start().0 - found.range().start().0)
    }
}

impl Cpu for ProcessWorld {
    fn get(&self, at: VirtAddr) -> u64 {
        self.memory.get(at)
    }
    fn put(&self, at: VirtAddr, word: u64) {
        self.memory.put(at, word);
    }
}

impl World for ProcessWorld {
    fn space(&self) -> Arc<dyn AddressSpace> {
        self.space.clone()
    }

    fn map(&self, kind: Kind, pages: u64) -> Result<Area, Skip> {
        if self.place != Where::Owned {
            return self.memory.map(kind, pages);
        }
        let bytes = pages * hw_model::addr::PAGE_SIZE;
        let made = match kind {
            Kind::Huge => OwnedMemory::huge(&self.space, bytes),
            _ => OwnedMemory::new(&self.space, bytes),
        };
        let made = made.map_err(|error| Skip(error.to_string()))?;
        let range = made.range();
        assert_eq!(self.space.rung(range), Rung::Owned);
        self.owned.lock().push(made);
        Ok(Area { range, object: 0 })
    }

    fn protect(&self, range: VirtRange, to: Allow) {
        memory::protect(range, to);
    }
    fn unmap(&self, range: VirtRange) {
        memory::unmap(range);
    }
    fn discard(&self, range: VirtRange) {
        if self.place == Where::Owned {
            let discard = |owned: &OwnedMemory, at| owned.discard(at, range.len());
            self.changes_owned(range, discard).expect("whole pages");
        } else {
            memory::discard(range);
        }
    }
    fn replace(&self, range: VirtRange) {
        memory::replace(range);
    }
    fn remap(&self, from: VirtRange, to: VirtAddr) {
        memory::remap(from, to);
    }
    fn fork(&self, child: &dyn Fn(&dyn Cpu) -> bool, meanwhile: &mut dyn FnMut()) -> bool {
        memory::fork(|| child(&self.memory), meanwhile)
    }
    fn truncate(&self, area: &Area, pages: u64, by: By) {
        match by {
            By::ThisProcess => self.memory.truncate(area, pages),
            By::AnotherProcess => {
                let truncate = || {
                    self.memory.truncate(area, pages);
                    true
                };
                assert!(memory::fork(truncate, &mut || ()));
            }
        }
    }
    fn write_back(&self, area: &Area) {
        memory::write_back(area.range);
    }
    fn in_file(&self, area: &Area, page: u64) -> u64 {
        self.memory.in_file(area, page)
    }
}
