//! The children of one implicit region: made on the first fault, taken away when empty.

use crate::device::RegisterError;
use crate::dma::DmaDevice;
use crate::region::counters::Counters;
use crate::region::{Core, Emptied, MapRegionError, Mapped, RegionReport, Teardown};
use hw_model::addr::{RegionAddr, VirtAddr, VirtRange};
use hw_model::hca::{Access, Hca, ImplicitTable, Key, KeySpec, Pd, SLOT_BYTES, SLOT_SHIFT};
use hw_model::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use hw_model::sync::{Arc, Mutex};
use odp::notifier::Sequence;
use odp::space::AddressSpace;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

/// All there is of an implicit region, apart from its key.
pub(in crate::device::model) struct Children {
    hca: Arc<Hca>,
    device: Arc<DmaDevice>,
    pub(in crate::device::model) space: Arc<dyn AddressSpace>,
    pd: Pd,
    /// What the region covers.
    pub(in crate::device::model) range: VirtRange,
    pub(in crate::device::model) writable: bool,
    pub(super) table: Arc<ImplicitTable>,
    pub(in crate::device::model) counters: Arc<Counters>,
    emptied: Arc<Emptied>,
    slots: Mutex<Slots>,
    made: AtomicU64,
}

#[derive(Default)]
struct Slots {
    /// Deregistration has begun: no child is made any more.
    closing: bool,
    live: BTreeMap<u64, Child>,
    /// Children that were taken away, until nothing is left of them.
    going: Vec<Teardown>,
}

struct Child {
    key: Key,
    mapped: Mapped,
    users: Arc<AtomicU32>,
}

/// A hold on a child: it is not taken away for being empty. Dropped, it says if the child is.
pub(in crate::device::model) struct ChildUse {
    users: Arc<AtomicU32>,
    core: Arc<Core>,
    emptied: Arc<Emptied>,
}

impl Clone for ChildUse {
    fn clone(&self) -> Self {
        self.users.fetch_add(1, Ordering::AcqRel);
        Self {
            users: Arc::clone(&self.users),
            core: Arc::clone(&self.core),
            emptied: Arc::clone(&self.emptied),
        }
    }
}

impl Drop for ChildUse {
    fn drop(&mut self) {
        if self.users.fetch_sub(1, Ordering::AcqRel) == 1 && self.core.is_empty() {
            self.emptied.ring();
        }
    }
}

/// What a new implicit region is made of.
pub(super) struct Parts {
    pub(super) hca: Arc<Hca>,
    pub(super) device: Arc<DmaDevice>,
    pub(super) space: Arc<dyn AddressSpace>,
    pub(super) pd: Pd,
    pub(super) range: VirtRange,
    pub(super) writable: bool,
    pub(super) emptied: Arc<Emptied>,
}

impl Children {
    pub(super) fn new(parts: Parts) -> Arc<Self> {
        let Parts { hca, device, space, pd, range, writable, emptied } = parts;
        let first = range.start().0 >> SLOT_SHIFT;
        let last = range.last().map_or(first, |last| last.0 >> SLOT_SHIFT);
        Arc::new(Self {
            hca,
            device,
            space,
            pd,
            range,
            writable,
            table: Arc::new(ImplicitTable::new(last - first + 1)),
            counters: Arc::default(),
            emptied,
            slots: Mutex::new(Slots::default()),
            made: AtomicU64::new(0),
        })
    }

    fn slot(&self, at: VirtAddr) -> u64 {
        (at.0 >> SLOT_SHIFT) - (self.range.start().0 >> SLOT_SHIFT)
    }

    /// The part of the region in the slot that holds `at`.
    fn slot_range(&self, at: VirtAddr) -> VirtRange {
        let start = VirtAddr(at.0 & !(SLOT_BYTES - 1));
        let whole = VirtRange::new(start, SLOT_BYTES).expect("slots lie in the address space");
        whole.intersection(self.range).expect("the address is in the region")
    }

    /// The child that holds the first byte of `memory`, made if there is none, and the part of `memory` that is in it.
    pub(in crate::device::model) fn place(
        &self,
        memory: VirtRange,
    ) -> Result<(Arc<Core>, Arc<Sequence>, VirtRange, ChildUse), RegisterError> {
        // Whoever probes addresses at which nothing is leaves empty children behind; they do not add up.
        self.reclaim();
        let slot_range = self.slot_range(memory.start());
        let part = memory.intersection(slot_range).expect("it begins there");
        let mut slots = self.slots.lock();
        let Slots { closing, live, going } = &mut *slots;
        if *closing {
            return Err(MapRegionError::Closing.into());
        }
        let slot = self.slot(memory.start());
        let child = match live.entry(slot) {
            Entry::Occupied(child) => child.into_mut(),
            Entry::Vacant(free) => free.insert(self.make(slot, slot_range, going)?),
        };
        child.users.fetch_add(1, Ordering::AcqRel);
        let core = Arc::clone(&child.mapped.core);
        let held = ChildUse {
            users: Arc::clone(&child.users),
            core: Arc::clone(&core),
            emptied: Arc::clone(&self.emptied),
        };
        Ok((core, child.mapped.interval.sequence(), part, held))
    }

    fn make(&self, slot: u64, range: VirtRange, going: &mut Vec<Teardown>) -> Result<Child, RegisterError> {
        let shared = (Arc::clone(&self.counters), Arc::clone(&self.emptied));
        let mapped = Mapped::part(&self.device, &self.space, range, self.writable, shared)?;
        let spec = KeySpec {
            pd: self.pd,
            // Used as a local key, through the implicit one, which says what the peer may do. Nobody is told of it.
            access: if self.writable { Access::LOCAL_WRITE } else { Access::empty() },
            address: RegionAddr(range.start().0),
            length: range.len(),
            first_page_offset: range.start().page_offset(),
            pages: Arc::clone(&mapped.core.list),
        };
        let key = match self.hca.create_key(spec) {
            Ok(key) => key,
            Err(error) => {
                // Not waited for: the lock is held, and a burst may be under way on whoever waits for this.
                going.push(Teardown::begin(mapped));
                return Err(error.into());
            }
        };
        self.table.store(slot, Some(key));
        self.made.fetch_add(1, Ordering::Relaxed);
        Ok(Child { key, mapped, users: Arc::default() })
    }

    /// Takes empty children away, as far as that goes without waiting. Whether something is left to be done.
    pub(in crate::device::model) fn reclaim(&self) -> bool {
        let mut slots = self.slots.lock();
        if self.emptied.take() {
            let empty = |child: &Child| {
                child.users.load(Ordering::Acquire) == 0 && child.mapped.core.close_if_empty()
            };
            let gone: Vec<u64> =
                slots.live.iter().filter(|(_, child)| empty(child)).map(|(slot, _)| *slot).collect();
            for slot in gone {
                let child = slots.live.remove(&slot).expect("found above");
                let teardown = self.begin_teardown(slot, child);
                slots.going.push(teardown);
            }
        }
        slots.going.retain_mut(|teardown| !teardown.poll());
        !slots.going.is_empty()
    }

    /// No burst that begins later finds the child.
    fn begin_teardown(&self, slot: u64, child: Child) -> Teardown {
        self.table.store(slot, None);
        let known = self.hca.revoke_key(child.key);
        debug_assert!(known.is_ok(), "a child's key is destroyed once");
        Teardown::begin(child.mapped)
    }

    /// Begins to take everything away. Faults that are being handled publish nothing from here on.
    pub(super) fn close(&self) -> Vec<Teardown> {
        let mut slots = self.slots.lock();
        slots.closing = true;
        let live = std::mem::take(&mut slots.live);
        let mut all = std::mem::take(&mut slots.going);
        all.extend(live.into_iter().map(|(slot, child)| self.begin_teardown(slot, child)));
        all
    }

    pub(super) fn is_closing(&self) -> bool {
        self.slots.lock().closing
    }

    /// Children made so far, those that are gone too.
    pub(super) fn made(&self) -> u64 {
        self.made.load(Ordering::Relaxed)
    }

    /// Children that were taken away, and are not gone yet.
    pub(super) fn going(&self) -> u64 {
        self.slots.lock().going.len() as u64
    }

    pub(super) fn report(&self) -> RegionReport {
        let slots = self.slots.lock();
        let mut report = RegionReport {
            entries: 0,
            present: 0,
            huge: 0,
            linked: 0,
            list_bytes: self.table.bytes(),
            children: slots.live.len() as u64,
            counters: self.counters.values(),
        };
        for child in slots.live.values() {
            let of = child.mapped.core.report();
            report.entries += of.entries;
            report.present += of.present;
            report.huge += of.huge;
            report.linked += of.linked;
            report.list_bytes += of.list_bytes;
        }
        report
    }

    /// Calls `each` with the first address and the page list of every child.
    pub(super) fn each_list(&self, mut each: impl FnMut(&Core)) {
        let slots = self.slots.lock();
        slots.live.values().for_each(|child| each(&child.mapped.core));
    }
}
