//! The key table: looked up by engines inside the DMA epoch, changed by software.
//!
//! Rule for look-ups: an engine inside the epoch may hold up an invalidation, and the thread that frees memory may be
//! waiting for that invalidation. So a look-up neither allocates nor waits for anyone who might. It probes an array of
//! words without a lock and then takes the read side of one slot, whose write side is only ever held to move a pointer.
//!
//! A word is `key << 32 | slot + 1`; 0 ends a probe, [`TOMBSTONE`] does not. Tombstones that no probe needs are turned
//! back, so the array stays clean however often keys come and go.

use super::fast::{FastKey, FastKeySpec};
use super::window::{Bindings, Window};
use super::{CreateKeyError, DestroyKeyError, KeySpec, KeyViolation, ReregKeyError, Target, UnknownKey};
use crate::hca::page_list::PageList;
use crate::hca::pd::Pd;
use crate::prefetch::{self, Place};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Mutex, OnceLock, RwLock, zeroed_words};
use crate::wire::Key;
use hashbrown::HashMap;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha20Rng;
use std::collections::VecDeque;

const EMPTY: u64 = 0;
const TOMBSTONE: u64 = u32::MAX as u64;
/// Slots are made so many at a time.
const CHUNK: usize = 1024;

/// What a slot holds. A line of its own: looking up a key among many misses the cache once here.
#[cfg_attr(not(any(loom, shuttle)), repr(align(64)))]
struct SlotCell(RwLock<Option<(Key, Held)>>);

#[cfg(not(any(loom, shuttle)))]
const _: () = assert!(size_of::<SlotCell>() == 64);

/// What a key of the table is.
pub(super) enum Held {
    /// A key that covers one thing from its making to its end.
    Region(Target),
    /// A key for fast registration.
    Fast(Box<FastKey>),
    /// A memory window.
    Window(Box<Window>),
}

/// The part of a key that software cannot choose: the upper 24 bits.
pub(super) fn index(key: Key) -> u32 {
    key.0 >> KEY_BYTE_BITS
}

/// A key of that index: any serves to find what has it.
pub(super) fn of_index(index: u32) -> Key {
    Key(index << KEY_BYTE_BITS)
}

/// The lowest bits of a key for fast registration, or of a window's, are software's (IBTA volume 1, 10.6.3.3).
const KEY_BYTE_BITS: u32 = 8;

pub(in crate::hca) struct KeyTable {
    /// Changes so far: what a translation cache remembers of before the last is void.
    generation: AtomicU64,
    words: Box<[AtomicU64]>,
    chunks: Box<[OnceLock<Box<[SlotCell]>>]>,
    /// Of each slot, where the page list of its key lies, or lay: hints for [`KeyTable::expect_pages`].
    lists: Box<[AtomicU64]>,
    pub(super) writer: Mutex<Writer>,
    max: u32,
}

pub(super) struct Writer {
    random: ChaCha20Rng,
    free: Vec<u32>,
    made: u32,
    live: u32,
    /// Indices of keys that were destroyed, and how often each is in the queue.
    quarantine: VecDeque<u32>,
    quarantined: HashMap<u32, u32>,
    quarantine_max: usize,
    /// The slots of the keys whose lowest byte is software's, by index: no other key has such an index.
    indexed: HashMap<u32, u32>,
    pub(super) bindings: Bindings,
}

impl Writer {
    /// Keeps the index of `key` from being given again until as many others have been destroyed as the quarantine holds.
    fn set_aside(&mut self, key: Key) {
        if self.quarantine_max == 0 {
            return;
        }
        if self.quarantine.len() == self.quarantine_max
            && let Some(old) = self.quarantine.pop_front()
            && let Some(times) = self.quarantined.get_mut(&old)
        {
            *times -= 1;
            if *times == 0 {
                self.quarantined.remove(&old);
            }
        }
        self.quarantine.push_back(index(key));
        *self.quarantined.entry(index(key)).or_insert(0) += 1;
    }
}

fn zeroes(count: usize) -> Box<[AtomicU64]> {
    zeroed_words(count).unwrap_or_else(|| (0..count).map(|_| AtomicU64::new(EMPTY)).collect())
}

impl KeyTable {
    pub(in crate::hca) fn new(max: u32, quarantine: u32, seed: u64) -> Self {
        // At most half full, so that probes are short.
        let words = (max as usize * 2).next_power_of_two();
        let writer = Writer {
            random: ChaCha20Rng::seed_from_u64(seed),
            free: Vec::new(),
            made: 0,
            live: 0,
            quarantine: VecDeque::new(),
            quarantined: HashMap::new(),
            quarantine_max: quarantine as usize,
            indexed: HashMap::new(),
            bindings: Bindings::default(),
        };
        Self {
            generation: AtomicU64::new(0),
            words: zeroes(words),
            chunks: (0..(max as usize).div_ceil(CHUNK)).map(|_| OnceLock::new()).collect(),
            lists: zeroes(max as usize),
            writer: Mutex::new(writer),
            max,
        }
    }

    /// Makes `target` reachable by a new random key.
    pub(in crate::hca) fn create(&self, target: impl Into<Target>) -> Result<Key, CreateKeyError> {
        let target = target.into();
        target.check()?;
        self.insert(Held::Region(target))
    }

    /// A new random key for fast registration. It reaches nothing until then.
    pub(in crate::hca) fn create_fast(&self, spec: FastKeySpec) -> Result<Key, CreateKeyError> {
        self.insert(Held::Fast(Box::new(FastKey::new(spec))))
    }

    /// The store of the word is the last thing that happens.
    pub(super) fn insert(&self, held: Held) -> Result<Key, CreateKeyError> {
        let mut writer = self.writer.lock();
        let slot = match writer.free.pop() {
            Some(slot) => slot,
            None if writer.made < self.max => {
                let slot = writer.made;
                let chunk = &self.chunks[slot as usize / CHUNK];
                chunk.get_or_init(|| (0..CHUNK).map(|_| SlotCell(RwLock::new(None))).collect());
                writer.made += 1;
                slot
            }
            None => return Err(CreateKeyError::TooMany { max: self.max }),
        };
        let is_indexed = !matches!(held, Held::Region(_));
        let key = loop {
            let key = Key(writer.random.next_u32());
            // 0 and all ones are what uninitialised memory looks like; no one should reach memory by those.
            let plain = key.0 != 0 && key.0 != u32::MAX && !writer.quarantined.contains_key(&index(key));
            if plain && !writer.indexed.contains_key(&index(key)) && !self.is_taken(key, is_indexed) {
                break key;
            }
        };
        if is_indexed {
            writer.indexed.insert(index(key), slot);
        }
        self.note_list(slot, &held);
        *self.slot(slot).write() = Some((key, held));
        self.publish(key, slot);
        writer.live += 1;
        Ok(key)
    }

    /// Whether there is `key`, or with `any_key_byte` another of its index.
    fn is_taken(&self, key: Key, any_key_byte: bool) -> bool {
        if !any_key_byte {
            return self.probe(key).is_some();
        }
        (0..1 << KEY_BYTE_BITS).any(|byte| self.probe(Key(index(key) << KEY_BYTE_BITS | byte)).is_some())
    }

    fn publish(&self, key: Key, slot: u32) {
        let mut at = self.home(key);
        while !matches!(self.words[at].load(Ordering::Relaxed), EMPTY | TOMBSTONE) {
            at = self.after(at);
        }
        self.words[at].store(u64::from(key.0) << 32 | u64::from(slot + 1), Ordering::Release);
    }

    /// Hides `key`: a look-up that begins after this returns does not find it. `wanted` says which keys are meant. Windows
    /// that are bound over it end with it if `revoke`, and forbid it otherwise.
    pub(in crate::hca) fn destroy(
        &self,
        key: Key,
        revoke: bool,
        wanted: impl Fn(&Target) -> bool,
    ) -> Result<Target, DestroyKeyError> {
        let unknown = UnknownKey { key };
        let mut writer = self.writer.lock();
        let (_, slot) = self.probe(key).ok_or(unknown)?;
        let meant = match &*self.slot(slot).read() {
            Some((_, Held::Region(target))) => wanted(target),
            _ => false,
        };
        if !meant {
            return Err(unknown.into());
        }
        let windows = writer.bindings.over(key);
        if windows > 0 && !revoke {
            return Err(DestroyKeyError::WindowsBound { key, windows });
        }
        let gone = self.remove(&mut writer, key, slot);
        if windows > 0 {
            self.unbind_over(&mut writer, key);
        }
        drop(writer);
        match gone {
            Some((_, Held::Region(target))) => Ok(target),
            _ => unreachable!("looked at under the same lock"),
        }
    }

    /// Hides a key for fast registration, whatever its key byte and its state. Gives its protection domain.
    pub(in crate::hca) fn destroy_fast(&self, key: Key) -> Result<Pd, DestroyKeyError> {
        let mut writer = self.writer.lock();
        let look = |name: &mut Key, held: &mut Held| match held {
            Held::Fast(fast) => Some((*name, fast.pd())),
            _ => None,
        };
        let (name, pd) = self.with_index(&writer, key, look).ok_or(UnknownKey { key })?;
        let windows = writer.bindings.over(name);
        if windows > 0 {
            return Err(DestroyKeyError::WindowsBound { key, windows });
        }
        let gone = self.remove_index(&mut writer, key);
        drop(writer);
        drop(gone);
        Ok(pd)
    }

    /// Hides what has the index of `key`, which is there.
    pub(super) fn remove_index(&self, writer: &mut Writer, key: Key) -> Option<(Key, Held)> {
        let slot = writer.indexed.remove(&index(key))?;
        let name = self.slot(slot).read().as_ref().map_or(key, |(name, _)| *name);
        self.remove(writer, name, slot)
    }

    /// Puts what `becomes` makes of the region of `key` in its place. Gives what was there.
    pub(super) fn replace(
        &self,
        key: Key,
        becomes: impl FnOnce(&KeySpec) -> Result<KeySpec, ReregKeyError>,
    ) -> Result<KeySpec, ReregKeyError> {
        let unknown = UnknownKey { key };
        // Nothing but this lock's holder changes a slot, so what is read stays until it is written.
        let writer = self.writer.lock();
        let (_, slot) = self.probe(key).ok_or(unknown)?;
        let mut after = match &*self.slot(slot).read() {
            Some((_, Held::Region(Target::Pages(before)))) => becomes(before)?,
            _ => return Err(unknown.into()),
        };
        let windows = writer.bindings.over(key);
        if windows > 0 {
            return Err(ReregKeyError::WindowsBound { key, windows });
        }
        if let Some((_, Held::Region(Target::Pages(spec)))) = &mut *self.slot(slot).write() {
            std::mem::swap(spec, &mut after);
            self.note_pages(slot, &spec.pages);
        }
        self.flush();
        drop(writer);
        Ok(after)
    }

    fn remove(&self, writer: &mut Writer, key: Key, slot: u32) -> Option<(Key, Held)> {
        self.withdraw(key);
        let gone = self.slot(slot).write().take();
        self.flush();
        writer.free.push(slot);
        writer.live -= 1;
        writer.set_aside(key);
        gone
    }

    fn withdraw(&self, key: Key) {
        if let Some((at, _)) = self.probe(key) {
            self.words[at].store(TOMBSTONE, Ordering::Release);
            self.sweep(at);
        }
    }

    /// Runs `change` on the key for fast registration that has the index of `key`, and on its name, as
    /// [`KeyTable::with_index`].
    pub(super) fn with_fast<R>(
        &self,
        key: Key,
        change: impl FnOnce(&mut Key, &mut FastKey) -> R,
    ) -> Option<R> {
        let change = |name: &mut Key, held: &mut Held| match held {
            Held::Fast(fast) => Some(change(name, fast)),
            _ => None,
        };
        self.with_index(&self.writer.lock(), key, change)
    }

    /// Runs `change` on what has the index of `key`, a key whose lowest byte is software's, and on its name, which may
    /// change in that byte. `change` allocates and frees nothing: engines wait for it in the epoch.
    pub(super) fn with_index<R>(
        &self,
        writer: &Writer,
        key: Key,
        change: impl FnOnce(&mut Key, &mut Held) -> Option<R>,
    ) -> Option<R> {
        let slot = *writer.indexed.get(&index(key))?;
        let (before, after, result) = match &mut *self.slot(slot).write() {
            Some((name, held)) => {
                let before = *name;
                let result = change(name, held);
                (before, *name, result)
            }
            None => unreachable!("the slots of such keys are listed"),
        };
        if before != after {
            // In between neither name is found. Whoever has the old one is not the owner of the slot any more.
            self.withdraw(before);
            self.publish(after, slot);
        }
        self.flush();
        result
    }

    /// Voids what translation caches remember. After the change, so that who sees this sees that.
    pub(in crate::hca) fn flush(&self) {
        self.generation.fetch_add(1, Ordering::Release);
    }

    pub(in crate::hca) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Runs `use_it` on what `key` covers. Never allocates, never waits for more than a pointer move.
    pub(in crate::hca) fn with<R>(
        &self,
        key: Key,
        use_it: impl FnOnce(&Target) -> R,
    ) -> Result<R, KeyViolation> {
        let (_, slot) = self.probe(key).ok_or(KeyViolation::Unknown)?;
        let slot = self.slot(slot);
        let guard = loop {
            // Blocking in the lock could allocate a parking place; see the rule above.
            match slot.try_read() {
                Some(guard) => break guard,
                None => std::thread::yield_now(),
            }
        };
        match &*guard {
            Some((owner, Held::Region(target))) if *owner == key => Ok(use_it(target)),
            Some((owner, Held::Fast(fast))) if *owner == key => {
                fast.valid.as_ref().map(use_it).ok_or(KeyViolation::Free)
            }
            Some((owner, Held::Window(window))) if *owner == key => {
                window.valid.as_ref().map(use_it).ok_or(KeyViolation::Free)
            }
            _ => Err(KeyViolation::Unknown),
        }
    }

    /// Looking up `key` is near. Three hints, the answer to one of which the next needs: other work belongs between them.
    #[inline]
    pub(in crate::hca) fn expect(&self, key: Key) {
        prefetch::expect(&self.words[self.home(key)]);
    }

    /// The second: what the word named.
    #[inline]
    pub(in crate::hca) fn expect_slot(&self, key: Key) {
        if let Some((_, slot)) = self.probe(key) {
            prefetch::expect(self.cell(slot));
            prefetch::expect(&self.lists[slot as usize]);
        }
    }

    /// The third: its page list.
    #[inline]
    pub(in crate::hca) fn expect_pages(&self, key: Key) {
        if let Some((_, slot)) = self.probe(key) {
            prefetch::line(self.lists[slot as usize].load(Ordering::Relaxed) as usize);
        }
    }

    fn note_list(&self, slot: u32, held: &Held) {
        if let Held::Region(Target::Pages(spec)) = held {
            self.note_pages(slot, &spec.pages);
        }
    }

    fn note_pages(&self, slot: u32, pages: &PageList) {
        self.lists[slot as usize].store(Place::of(pages).address() as u64, Ordering::Relaxed);
    }

    pub(in crate::hca) fn live(&self) -> u64 {
        u64::from(self.writer.lock().live)
    }

    #[cfg(all(test, not(any(loom, shuttle))))]
    pub(super) fn set_aside(&self, key: Key) {
        self.writer.lock().set_aside(key);
    }

    #[cfg(all(test, not(any(loom, shuttle))))]
    pub(super) fn tombstones(&self) -> usize {
        self.words.iter().filter(|word| word.load(Ordering::Relaxed) == TOMBSTONE).count()
    }

    fn home(&self, key: Key) -> usize {
        // Keys are random already.
        key.0 as usize & (self.words.len() - 1)
    }

    fn after(&self, at: usize) -> usize {
        (at + 1) & (self.words.len() - 1)
    }

    fn before(&self, at: usize) -> usize {
        at.wrapping_sub(1) & (self.words.len() - 1)
    }

    fn probe(&self, key: Key) -> Option<(usize, u32)> {
        let mut at = self.home(key);
        for _ in 0..self.words.len() {
            let word = self.words[at].load(Ordering::Acquire);
            if word == EMPTY {
                return None;
            }
            if word >> 32 == u64::from(key.0) && word != TOMBSTONE {
                return Some((at, (word as u32) - 1));
            }
            at = self.after(at);
        }
        None
    }

    /// Turns the tombstone at `at` and those before it back to empty if no probe passes over them: the next is empty.
    fn sweep(&self, at: usize) {
        if self.words[self.after(at)].load(Ordering::Relaxed) != EMPTY {
            return;
        }
        let mut at = at;
        while self.words[at].load(Ordering::Relaxed) == TOMBSTONE {
            self.words[at].store(EMPTY, Ordering::Release);
            at = self.before(at);
        }
    }

    fn slot(&self, slot: u32) -> &RwLock<Option<(Key, Held)>> {
        &self.cell(slot).0
    }

    fn cell(&self, slot: u32) -> &SlotCell {
        let chunk =
            self.chunks[slot as usize / CHUNK].get().expect("a slot is made before its number is given");
        &chunk[slot as usize % CHUNK]
    }
}
