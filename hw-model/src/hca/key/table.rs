//! The key table: looked up by engines inside the DMA epoch, changed by software.
//!
//! Rule for look-ups: an engine inside the epoch may hold up an invalidation, and the thread that frees memory may be
//! waiting for that invalidation. So a look-up neither allocates nor waits for anyone who might. It probes an array of
//! words without a lock and then takes the read side of one slot, whose write side is only ever held to move a pointer.
//!
//! A word is `key << 32 | slot + 1`; 0 ends a probe, [`TOMBSTONE`] does not. Tombstones that no probe needs are turned
//! back, so the array stays clean however often keys come and go.

use super::{CreateKeyError, KeySpec, KeyViolation, UnknownKey};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Mutex, OnceLock, RwLock, zeroed_words};
use crate::wire::Key;
use hashbrown::HashSet;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha20Rng;
use std::collections::VecDeque;

const EMPTY: u64 = 0;
const TOMBSTONE: u64 = u32::MAX as u64;
/// Slots are made so many at a time.
const CHUNK: usize = 1024;

type SlotCell = RwLock<Option<(Key, KeySpec)>>;

pub(in crate::hca) struct KeyTable {
    words: Box<[AtomicU64]>,
    chunks: Box<[OnceLock<Box<[SlotCell]>>]>,
    writer: Mutex<Writer>,
    max: u32,
}

struct Writer {
    random: ChaCha20Rng,
    free: Vec<u32>,
    made: u32,
    live: u32,
    quarantine: VecDeque<Key>,
    quarantined: HashSet<Key>,
    quarantine_max: usize,
}

impl Writer {
    /// Keeps `key` from being given again until as many others have been destroyed as the quarantine holds.
    fn set_aside(&mut self, key: Key) {
        if self.quarantine_max == 0 {
            return;
        }
        if self.quarantine.len() == self.quarantine_max
            && let Some(old) = self.quarantine.pop_front()
        {
            self.quarantined.remove(&old);
        }
        self.quarantine.push_back(key);
        self.quarantined.insert(key);
    }
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
            quarantined: HashSet::new(),
            quarantine_max: quarantine as usize,
        };
        Self {
            words: zeroed_words(words).unwrap_or_else(|| (0..words).map(|_| AtomicU64::new(EMPTY)).collect()),
            chunks: (0..(max as usize).div_ceil(CHUNK)).map(|_| OnceLock::new()).collect(),
            writer: Mutex::new(writer),
            max,
        }
    }

    /// Makes `spec` reachable by a new random key. The store of the word is the last thing that happens.
    pub(in crate::hca) fn create(&self, spec: KeySpec) -> Result<Key, CreateKeyError> {
        spec.check()?;
        let mut writer = self.writer.lock();
        let slot = match writer.free.pop() {
            Some(slot) => slot,
            None if writer.made < self.max => {
                let slot = writer.made;
                let chunk = &self.chunks[slot as usize / CHUNK];
                chunk.get_or_init(|| (0..CHUNK).map(|_| RwLock::new(None)).collect());
                writer.made += 1;
                slot
            }
            None => return Err(CreateKeyError::TooMany { max: self.max }),
        };
        let key = loop {
            let key = Key(writer.random.next_u32());
            // 0 and all ones are what uninitialised memory looks like; no one should reach memory by those.
            let usable = key.0 != 0 && key.0 != u32::MAX && !writer.quarantined.contains(&key);
            if usable && self.probe(key).is_none() {
                break key;
            }
        };
        *self.slot(slot).write() = Some((key, spec));
        let mut at = self.home(key);
        while !matches!(self.words[at].load(Ordering::Relaxed), EMPTY | TOMBSTONE) {
            at = self.after(at);
        }
        self.words[at].store(u64::from(key.0) << 32 | u64::from(slot + 1), Ordering::Release);
        writer.live += 1;
        Ok(key)
    }

    /// Hides `key`: a look-up that begins after this returns does not find it.
    pub(in crate::hca) fn destroy(&self, key: Key) -> Result<KeySpec, UnknownKey> {
        let mut writer = self.writer.lock();
        let (at, slot) = self.probe(key).ok_or(UnknownKey { key })?;
        self.words[at].store(TOMBSTONE, Ordering::Release);
        self.sweep(at);
        let gone = self.slot(slot).write().take();
        writer.free.push(slot);
        writer.live -= 1;
        writer.set_aside(key);
        drop(writer);
        let (_, spec) = gone.expect("a key's slot is filled before its word and emptied after");
        Ok(spec)
    }

    /// Runs `use_it` on what `key` covers. Never allocates, never waits for more than a pointer move.
    pub(in crate::hca) fn with<R>(
        &self,
        key: Key,
        use_it: impl FnOnce(&KeySpec) -> R,
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
            Some((owner, spec)) if *owner == key => Ok(use_it(spec)),
            _ => Err(KeyViolation::Unknown),
        }
    }

    pub(in crate::hca) fn live(&self) -> u64 {
        u64::from(self.writer.lock().live)
    }

    #[cfg(test)]
    pub(super) fn set_aside(&self, key: Key) {
        self.writer.lock().set_aside(key);
    }

    #[cfg(test)]
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

    fn slot(&self, slot: u32) -> &SlotCell {
        let chunk =
            self.chunks[slot as usize / CHUNK].get().expect("a slot is made before its number is given");
        &chunk[slot as usize % CHUNK]
    }
}
