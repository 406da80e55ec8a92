//! Regions are changed under their key, one step at a time: other rights, other memory, or both.
//!
//! Addresses that requests were posted with before may come to the new memory. So that the oracle can follow them, the new
//! memory has its virtual addresses, and what lay at other addresses does not lie at these: each address means the same bytes
//! before and after, or none.

use super::Broken;
use super::world::{Place, World};
use hw_model::addr::{PAGE_SIZE, RegionAddr, VirtAddr};
use hw_model::hca::{Access as Rights, Key};
use hw_model::sync::Arc;
use mr::device::model::{ModelRegion, Reregistration};
use mr::{Region, Rereg};
use odp::fault::Progress;

/// What of a region its owner sees.
type Seen = (Key, RegionAddr, u64, Rights);

/// A region that is being changed.
pub struct Changing {
    region: Arc<ModelRegion>,
    old: Place,
    new: Place,
    before: Seen,
    op: Reregistration,
}

impl Changing {
    /// Where the memory is that the region has beside its own at the moment: on its way in, or on its way out.
    pub(super) fn beside(&self) -> Option<&Place> {
        let place = if self.op.is_committed() { &self.old } else { &self.new };
        self.op.has_memory_beside().then_some(place)
    }
}

fn seen(region: &ModelRegion) -> Seen {
    (region.key(), region.address(), region.len(), region.access())
}

impl World {
    pub(super) fn begin_rereg(&mut self) -> Result<(), Broken> {
        let Some(index) = self.choices.index(self.regions.len()) else { return Ok(()) };
        let old = self.regions[index].place;
        if self.is_probed(self.regions[index].region.key()) {
            return Ok(());
        }
        let rights = self.choices.chance(500).then(|| self.some_rights());
        let moves = rights.is_none() || self.choices.chance(500);
        let new = if moves { self.some_place_for(index) } else { Some(old) };
        let Some(new) = new else { return Ok(()) };
        let memory = if moves { self.user_range(&new) } else { None };
        if moves && memory.is_none() {
            return Ok(());
        }
        let region = Arc::clone(&self.regions[index].region);
        let before = seen(&region);
        let change = Rereg { access: rights, pd: None, memory: memory.map(|memory| (memory, None)) };
        let begun = region.begin_rereg(change);
        self.note(|| format!("rereg {:?} {rights:?} {new:?}: {:?}", before.0, begun.as_ref().map(|_| ())));
        match begun {
            Ok(op) => self.reregs.push(Changing { region, old, new, before, op }),
            Err(_) => self.counts.one("reregistrations that failed"),
        }
        Ok(())
    }

    /// Whether a region may become another under this key.
    pub(super) fn is_changing(&self, key: Key) -> bool {
        self.reregs.iter().any(|changing| changing.before.0 == key)
    }

    /// Whether a request is under way that must fail because of what this key leads to.
    fn is_probed(&self, key: Key) -> bool {
        self.requests.values().any(|request| !request.followed && request.keys.last() == Some(&key))
    }

    /// Memory that region `index` can have next.
    fn some_place_for(&mut self, index: usize) -> Option<Place> {
        let old = self.regions[index].place;
        let at_its_address = self.regions[index].region.address() == RegionAddr(old.at.0);
        let host = self.processes[old.process].host;
        let process = if self.choices.chance(300) { self.some_process(Some(host))? } else { old.process };
        let [from, to] = [old.process, process].map(|process| &self.processes[process]);
        // The child of a fork has its parent's addresses, and every buffer has the same.
        let apart = process == old.process || from.arena != to.arena;
        if !apart || to.has_ended() || to.buffer.is_some() && !at_its_address {
            return None;
        }
        let in_huge =
            (old.huge && self.choices.chance(800)).then(|| self.some_hugetlb_page(process)).flatten();
        let page = in_huge.or_else(|| self.some_page(process))?;
        let most = self.choices.between(1, 40);
        let mapped = (page..page + most).take_while(|page| self.memory.is_mapped(process, *page)).count();
        let skip = if self.choices.chance(300) { u64::from(self.choices.below(4095)) } else { 0 };
        let len = (mapped.max(1) as u64 * PAGE_SIZE - skip).max(1);
        Some(Place { process, at: VirtAddr::from_page_number(page).offset(skip), len, ..old })
    }

    pub(super) fn step_some_rereg(&mut self) -> Result<(), Broken> {
        match self.choices.index(self.reregs.len()) {
            Some(index) => self.step_rereg(index).map(drop),
            None => Ok(()),
        }
    }

    /// Whether it did something.
    pub(super) fn step_rereg(&mut self, index: usize) -> Result<bool, Broken> {
        let changing = &mut self.reregs[index];
        let was_committed = changing.op.is_committed();
        let progress = changing.op.poll();
        if !was_committed && changing.op.is_committed() {
            self.committed(index)?;
        }
        match progress {
            Progress::Blocked => Ok(false),
            Progress::Again => Ok(true),
            Progress::Done(outcome) => {
                let Changing { region, before, op, .. } = self.reregs.swap_remove(index);
                drop(op);
                self.note(|| format!("rereg of {:?} ended: {outcome:?}", before.0));
                if outcome.is_err() {
                    self.counts.one("reregistrations that failed");
                    if seen(&region) != before {
                        let detail = format!("{before:?} failed ({outcome:?}) and is {:?}", seen(&region));
                        return Err(Broken { rule: "what cannot be changed stays as it was", detail });
                    }
                }
                Ok(true)
            }
        }
    }

    /// From here on the key is what it is to be.
    fn committed(&mut self, index: usize) -> Result<(), Broken> {
        let Changing { region, old, new, before, .. } = &self.reregs[index];
        let (key, old, new, now) = (before.0, *old, *new, seen(region));
        let moved = (old.process, old.at, old.len) != (new.process, new.at, new.len);
        if now.0 != key || moved && (now.1, now.2) != (RegionAddr(new.at.0), new.len) {
            return Err(Broken { rule: "reregistration", detail: format!("{new:?}: {now:?}") });
        }
        self.counts.one(if moved { "regions moved to other memory" } else { "regions with other rights" });
        self.disturbances += 1;
        if let Some(slot) = self.regions.iter_mut().find(|slot| slot.region.key() == key) {
            slot.place = new;
        }
        self.excuse_key(key);
        self.lose_aliases_of(key);
        Ok(())
    }

    /// Requests that name `key` may find it gone, or another.
    pub(super) fn excuse_key(&mut self, key: Key) {
        let named = self.requests.iter().filter(|(_, request)| request.keys.contains(&key));
        let named: Vec<u64> = named.map(|(id, _)| *id).collect();
        named.into_iter().for_each(|id| self.memory.excuse(id));
    }
}
