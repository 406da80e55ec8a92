//! The oracle: what every byte of every process may be, told from what was asked for, never from what the host did.
//!
//! It knows mappings, objects, copies of pages, and transfers. A transfer (an RDMA write or read) is under way from its
//! post to the poll of its completion: meanwhile each byte of its target is what it was or what its source is or was, and
//! afterwards what the source was at some moment between. It knows nothing of frames, page tables, faults or
//! invalidations, which is why it sees when those go wrong.

use super::bytes::{PAGE, PageBytes, Says};
use hw_model::addr::{VirtAddr, VirtRange};
use odp::space::Access;
use odp::space::sim::{ObjectId, Protection};
use std::collections::BTreeMap;

/// An object of one host.
pub type ObjectKey = (usize, ObjectId);
/// Number of a page's bytes.
pub(super) type BytesId = usize;

/// Possibilities of a source that are followed before it may be anything.
const MOST_VARIANTS: usize = 24;

/// Where the bytes of a page of a process are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holder {
    /// Its own. With an object: what it falls back to when it is discarded.
    Own(BytesId, Option<(ObjectKey, u64)>),
    /// A page of an object, whoever maps it.
    Object(ObjectKey, u64),
}

/// A page of a process.
#[derive(Clone, Copy, Debug)]
pub struct Page {
    holder: Holder,
    /// What the mapping allows.
    pub protection: Protection,
    /// Devices are refused.
    pub encrypted: bool,
    /// The memory of it failed: everybody is refused until it is discarded or something else is mapped there.
    pub lost: bool,
}

#[derive(Debug, Default)]
struct Object {
    pages: u64,
    bytes: BTreeMap<u64, BytesId>,
}

/// A piece of memory of one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The process.
    pub process: usize,
    /// First byte.
    pub at: VirtAddr,
    /// Bytes.
    pub len: usize,
}

/// What of a page a piece covers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    pub(super) process: usize,
    pub(super) page: u64,
    pub(super) start: usize,
    pub(super) len: usize,
    /// Byte of the message.
    pub(super) from: usize,
}

#[derive(Debug)]
pub(super) struct Transfer {
    pub(super) source: Vec<Part>,
    pub(super) target: Vec<Part>,
    /// What the source held at some moment; each byte may be that of any of them.
    pub(super) variants: Vec<Vec<u8>>,
    /// The source may have held anything.
    pub(super) unknown: bool,
    /// Somebody else has written the target meanwhile, so what it held may be what it holds.
    pub(super) contended: bool,
    /// Something happened that it may fail for.
    pub(super) excused: bool,
}

/// A byte that is not what it may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "process {process} at {at}: byte {found:#04x}, known {known:#04x}, and no transfer that may have changed it says so"
)]
pub struct WrongByte {
    /// The process.
    pub process: usize,
    /// The byte's address.
    pub at: VirtAddr,
    /// What was there.
    pub found: u8,
    /// What is known of it.
    pub known: u8,
}

/// What every byte may be.
#[derive(Debug, Default)]
pub struct Memory {
    processes: BTreeMap<usize, BTreeMap<u64, Page>>,
    objects: BTreeMap<ObjectKey, Object>,
    pub(super) bytes: Vec<PageBytes>,
    pub(super) transfers: BTreeMap<u64, Transfer>,
}

pub(super) fn parts(pieces: &[Piece]) -> Vec<Part> {
    let mut parts = Vec::new();
    let mut from = 0;
    for piece in pieces {
        let mut done = 0;
        while done < piece.len {
            let at = piece.at.offset(done as u64);
            let start = at.page_offset() as usize;
            let len = (piece.len - done).min(PAGE - start);
            parts.push(Part { process: piece.process, page: at.page_number(), start, len, from });
            done += len;
            from += len;
        }
    }
    parts
}

fn page_range(page: u64) -> VirtRange {
    VirtRange::new(VirtAddr::from_page_number(page), PAGE as u64).expect("a user page")
}

pub(super) fn meet(a: (usize, usize), b: (usize, usize)) -> bool {
    a.0 < b.0 + b.1 && b.0 < a.0 + a.1
}

impl Memory {
    /// A process without memory.
    pub fn add_process(&mut self, process: usize) {
        self.processes.insert(process, BTreeMap::new());
    }

    /// An object of `pages` pages, zero.
    pub fn add_object(&mut self, key: ObjectKey, pages: u64) {
        self.objects.insert(key, Object { pages, bytes: BTreeMap::new() });
    }

    fn new_bytes(&mut self, bytes: PageBytes) -> BytesId {
        self.bytes.push(bytes);
        self.bytes.len() - 1
    }

    fn object_bytes(&mut self, key: ObjectKey, index: u64) -> BytesId {
        if let Some(id) = self.objects.get(&key).and_then(|object| object.bytes.get(&index)) {
            return *id;
        }
        let id = self.new_bytes(PageBytes::default());
        self.objects.entry(key).or_default().bytes.insert(index, id);
        id
    }

    /// The pages of a process.
    pub fn pages(&self, process: usize) -> impl Iterator<Item = (u64, &Page)> {
        self.processes.get(&process).into_iter().flatten().map(|(number, page)| (*number, page))
    }

    fn page(&self, process: usize, page: u64) -> Option<&Page> {
        self.processes.get(&process)?.get(&page)
    }

    /// Whether the program may do this to the page.
    #[must_use]
    pub fn allows(&self, process: usize, page: u64, access: Access) -> bool {
        let Some(page) = self.page(process, page) else { return false };
        let within = match page.holder {
            Holder::Own(..) => true,
            Holder::Object(key, index) => self.objects.get(&key).is_some_and(|object| index < object.pages),
        };
        within && !page.lost && page.protection.allows(access)
    }

    /// Whether the page is the process's own, with no object behind it.
    #[must_use]
    pub fn is_anonymous(&self, process: usize, page: u64) -> bool {
        self.page(process, page).is_some_and(|page| matches!(page.holder, Holder::Own(_, None)))
    }

    /// Whether the page is one of the object `key`, whoever maps it.
    #[must_use]
    pub fn is_of(&self, process: usize, page: u64, key: ObjectKey) -> bool {
        self.page(process, page).is_some_and(|page| matches!(page.holder, Holder::Object(of, _) if of == key))
    }

    /// The memory of a page has failed.
    pub fn lose(&mut self, process: usize, page: u64) {
        self.each_page(process, page_range(page), |page| page.lost = true);
    }

    /// Whether the page is mapped, with whatever rights.
    #[must_use]
    pub fn is_mapped(&self, process: usize, page: u64) -> bool {
        self.page(process, page).is_some()
    }

    /// Whether a device may do this to all of the piece.
    #[must_use]
    pub fn allows_device(&self, piece: Piece, access: Access) -> bool {
        parts(&[piece]).iter().all(|part| {
            let clear = self.page(part.process, part.page).is_some_and(|page| !page.encrypted);
            clear && self.allows(part.process, part.page, access)
        })
    }

    pub(super) fn resolve(&mut self, process: usize, page: u64) -> Option<BytesId> {
        match self.page(process, page)?.holder {
            Holder::Own(id, _) => Some(id),
            Holder::Object(key, index) => Some(self.object_bytes(key, index)),
        }
    }

    /// Where the parts are, those that are mapped.
    pub(super) fn places(&mut self, parts: &[Part]) -> Vec<(BytesId, Part)> {
        parts.iter().filter_map(|part| Some((self.resolve(part.process, part.page)?, *part))).collect()
    }

    // Mappings.

    /// `pages` are mapped to an object, from its page `index` on. With `private` they are copies.
    pub fn map_object(
        &mut self,
        process: usize,
        range: VirtRange,
        (key, index): (ObjectKey, u64),
        private: bool,
        protection: Protection,
    ) {
        let first = range.start().page_number();
        for n in 0..range.page_count() {
            let holder = if private {
                let shared = self.object_bytes(key, index + n);
                let copy = self.bytes[shared].copy_of_known();
                Holder::Own(self.new_bytes(copy), Some((key, index + n)))
            } else {
                Holder::Object(key, index + n)
            };
            self.place(process, first + n, Page { holder, protection, encrypted: false, lost: false });
        }
        self.replaced(process, range);
    }

    /// `range` is mapped to zeroes.
    pub fn map_anonymous(&mut self, process: usize, range: VirtRange, protection: Protection) {
        let first = range.start().page_number();
        for page in first..first + range.page_count() {
            let holder = Holder::Own(self.new_bytes(PageBytes::default()), None);
            self.place(process, page, Page { holder, protection, encrypted: false, lost: false });
        }
        self.replaced(process, range);
    }

    fn place(&mut self, process: usize, page: u64, to: Page) {
        self.take(process, page);
        self.processes.entry(process).or_default().insert(page, to);
    }

    /// Takes a page out; what was its own is lost.
    fn take(&mut self, process: usize, page: u64) {
        let old = self.processes.get_mut(&process).and_then(|pages| pages.remove(&page));
        if let Some(Page { holder: Holder::Own(id, _), .. }) = old {
            self.bytes[id] = PageBytes::default();
        }
    }

    /// `range` is not mapped any more.
    pub fn unmap(&mut self, process: usize, range: VirtRange) {
        let first = range.start().page_number();
        for page in first..first + range.page_count() {
            self.take(process, page);
        }
        self.replaced(process, range);
    }

    /// `from` is at `to` now.
    pub fn remap(&mut self, process: usize, from: VirtRange, to: VirtRange) {
        let (first, target) = (from.start().page_number(), to.start().page_number());
        for n in 0..from.page_count() {
            self.take(process, target + n);
            let pages = self.processes.entry(process).or_default();
            if let Some(page) = pages.remove(&(first + n)) {
                pages.insert(target + n, page);
            }
        }
        self.replaced(process, from);
        self.replaced(process, to);
    }

    /// The mapping of `range` allows something else.
    pub fn protect(&mut self, process: usize, range: VirtRange, to: Protection) {
        self.each_page(process, range, |page| page.protection = to);
    }

    /// Devices may or may not see `range` in the clear.
    pub fn encrypt(&mut self, process: usize, range: VirtRange, encrypted: bool) {
        self.each_page(process, range, |page| page.encrypted = encrypted);
    }

    fn each_page(&mut self, process: usize, range: VirtRange, change: impl Fn(&mut Page)) {
        let first = range.start().page_number();
        let pages = self.processes.entry(process).or_default();
        pages.range_mut(first..first + range.page_count()).for_each(|(_, page)| change(page));
        self.excuse_pages(process, range);
    }

    /// What was private in `range` is lost.
    pub fn discard(&mut self, process: usize, range: VirtRange) {
        let first = range.start().page_number();
        for number in first..first + range.page_count() {
            let Some(Page { holder: Holder::Own(id, under), .. }) = self.page(process, number).copied()
            else {
                continue;
            };
            self.each_page(process, page_range(number), |page| page.lost = false);
            let content = under.map(|(key, index)| {
                let shared = self.object_bytes(key, index);
                self.bytes[shared].known(0, PAGE)
            });
            self.reset(id, content.as_deref());
        }
    }

    /// The objects mapped shared in `range` have a hole there.
    pub fn remove(&mut self, process: usize, range: VirtRange) {
        let first = range.start().page_number();
        for number in first..first + range.page_count() {
            if let Some(Page { holder: Holder::Object(key, index), .. }) = self.page(process, number).copied()
            {
                self.punch(key, index, index + 1);
            }
        }
    }

    /// Pages `first..end` of an object are zero.
    pub fn punch(&mut self, key: ObjectKey, first: u64, end: u64) {
        let Some(object) = self.objects.get(&key) else { return };
        let ids: Vec<BytesId> = object.bytes.range(first..end).map(|(_, id)| *id).collect();
        ids.into_iter().for_each(|id| self.reset(id, None));
    }

    /// An object has another length.
    pub fn truncate(&mut self, key: ObjectKey, pages: u64) {
        let Some(object) = self.objects.get_mut(&key) else { return };
        let before = std::mem::replace(&mut object.pages, pages);
        self.punch(key, pages.min(before), before.max(pages));
        let lost: Vec<(usize, u64)> = self
            .processes
            .iter()
            .flat_map(|(process, all)| all.iter().map(move |(number, page)| (*process, *number, page)))
            .filter(|(_, _, page)| matches!(page.holder, Holder::Object(k, index) if k == key && index >= pages.min(before)))
            .map(|(process, number, _)| (process, number))
            .collect();
        for (process, number) in lost {
            self.excuse_pages(process, page_range(number));
        }
    }

    /// `child` has copies of what `parent` has.
    pub fn fork(&mut self, parent: usize, child: usize) {
        let pages: Vec<(u64, Page)> = self.pages(parent).map(|(number, page)| (number, *page)).collect();
        self.add_process(child);
        for (number, page) in pages {
            let holder = match page.holder {
                Holder::Own(id, under) => Holder::Own(self.copy_of(id), under),
                shared @ Holder::Object(..) => shared,
            };
            self.place(child, number, Page { holder, ..page });
        }
    }

    /// A copy, made while transfers may be landing in the original and never in the copy.
    fn copy_of(&mut self, id: BytesId) -> BytesId {
        let mut copy = self.bytes[id].copy_of_known();
        for layer in self.bytes[id].layers.clone() {
            match &layer.says {
                Says::Transfer { id, from } => {
                    let transfer = &self.transfers[id];
                    for variant in &transfer.variants {
                        copy.maybe(layer.start, variant[*from..*from + layer.len].to_vec());
                    }
                    if transfer.unknown {
                        copy.anything(layer.start, layer.len);
                    }
                }
                Says::Fixed(_) | Says::Anything => copy.layers.push(layer),
            }
        }
        self.new_bytes(copy)
    }

    /// The process has ended.
    pub fn end_process(&mut self, process: usize) {
        let pages: Vec<u64> = self.pages(process).map(|(number, _)| number).collect();
        pages.into_iter().for_each(|page| self.take(process, page));
        self.processes.remove(&process);
    }

    // Bytes.

    fn reset(&mut self, id: BytesId, content: Option<&[u8]>) {
        self.bytes[id].reset(content);
        self.written(id, 0, PAGE);
    }

    /// These bytes were written by somebody who is no transfer.
    fn written(&mut self, id: BytesId, start: usize, len: usize) {
        let layers = &self.bytes[id].layers;
        for layer in layers.iter().filter(|layer| layer.meets(start, len)) {
            if let Says::Transfer { id, .. } = layer.says
                && let Some(transfer) = self.transfers.get_mut(&id)
            {
                transfer.contended = true;
            }
        }
        self.source_changed(id, start, len);
    }

    /// Transfers that read these bytes may see what is there now.
    pub(super) fn source_changed(&mut self, id: BytesId, start: usize, len: usize) {
        let readers: Vec<u64> = self.readers(id, start, len);
        readers.into_iter().for_each(|reader| self.look_again(reader));
    }

    pub(super) fn readers(&mut self, id: BytesId, start: usize, len: usize) -> Vec<u64> {
        let ids: Vec<u64> = self.transfers.keys().copied().collect();
        let reads = |memory: &mut Self, reader: &u64| {
            let source = memory.transfers[reader].source.clone();
            let places = memory.places(&source);
            places.iter().any(|(place, part)| *place == id && meet((part.start, part.len), (start, len)))
        };
        ids.into_iter().filter(|reader| reads(self, reader)).collect()
    }

    /// Notes what the source of a transfer may hold now.
    pub(super) fn look_again(&mut self, id: u64) {
        let source = self.transfers[&id].source.clone();
        let len = source.iter().map(|part| part.len).sum();
        let mut known = vec![0; len];
        let mut others: Vec<(usize, Vec<u8>)> = Vec::new();
        let mut unknown = false;
        for (place, part) in self.places(&source) {
            let bytes = &self.bytes[place];
            known[part.from..part.from + part.len].copy_from_slice(&bytes.known(part.start, part.len));
            for layer in bytes.layers.iter().filter(|layer| layer.meets(part.start, part.len)) {
                match &layer.says {
                    Says::Fixed(fixed) => {
                        let first = layer.start.max(part.start);
                        let end = (layer.start + layer.len).min(part.start + part.len);
                        let data = fixed[first - layer.start..end - layer.start].to_vec();
                        others.push((part.from + first - part.start, data));
                    }
                    Says::Anything | Says::Transfer { .. } => unknown = true,
                }
            }
        }
        let transfer = self.transfers.get_mut(&id).expect("looked at above");
        transfer.unknown |= unknown;
        let variants = others.into_iter().map(|(from, data)| {
            let mut variant = known.clone();
            variant[from..from + data.len()].copy_from_slice(&data);
            variant
        });
        let variants: Vec<_> = std::iter::once(known.clone()).chain(variants).collect();
        for variant in variants {
            if transfer.variants.len() >= MOST_VARIANTS {
                transfer.unknown = true;
            } else if !transfer.variants.contains(&variant) {
                transfer.variants.push(variant);
            }
        }
    }

    /// The program wrote `data`.
    pub fn write(&mut self, process: usize, at: VirtAddr, data: &[u8]) {
        let parts = parts(&[Piece { process, at, len: data.len() }]);
        for (id, part) in self.places(&parts) {
            self.bytes[id].set(part.start, &data[part.from..part.from + part.len]);
            self.written(id, part.start, part.len);
        }
    }

    /// The program read `data`. What it saw is what is there from now on, but for transfers under way.
    ///
    /// # Errors
    /// [`WrongByte`], the first.
    pub fn read(&mut self, process: usize, at: VirtAddr, data: &[u8]) -> Result<(), WrongByte> {
        let parts = parts(&[Piece { process, at, len: data.len() }]);
        for (id, part) in self.places(&parts) {
            let seen = &data[part.from..part.from + part.len];
            let known = self.bytes[id].known(part.start, part.len);
            if seen != known {
                let wrong = (0..part.len)
                    .find(|n| seen[*n] != known[*n] && !self.explained(id, part.start + n, seen[*n]));
                if let Some(n) = wrong {
                    let at = VirtAddr::from_page_number(part.page).offset((part.start + n) as u64);
                    return Err(WrongByte { process, at, found: seen[n], known: known[n] });
                }
            }
            self.bytes[id].set(part.start, seen);
        }
        Ok(())
    }

    /// Whether some layer says that this byte may be `value`.
    fn explained(&self, id: BytesId, at: usize, value: u8) -> bool {
        let mut layers = self.bytes[id].layers.iter().filter(|layer| layer.meets(at, 1));
        layers.any(|layer| match &layer.says {
            Says::Anything => true,
            Says::Fixed(bytes) => bytes[at - layer.start] == value,
            Says::Transfer { id, from } => self.transfers.get(id).is_some_and(|transfer| {
                let byte = from + (at - layer.start);
                transfer.unknown || transfer.variants.iter().any(|variant| variant[byte] == value)
            }),
        })
    }
}
