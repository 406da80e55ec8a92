//! Transfers of the oracle: where they may land, what they may carry, how they end.

use super::bytes::{Layer, Says};
use super::memory::{Memory, Part, Piece, Transfer, meet, parts};
use hw_model::addr::VirtRange;

impl Memory {
    /// Whether a transfer could be followed: nothing that is under way writes its source or reads its target, and it does
    /// not read what it writes.
    #[must_use]
    pub fn can_follow(&mut self, source: &[Piece], target: &[Piece]) -> bool {
        let (source, target) = (parts(source), parts(target));
        let (reads, writes) = (self.places(&source), self.places(&target));
        let own = reads
            .iter()
            .any(|(a, x)| writes.iter().any(|(b, y)| a == b && meet((x.start, x.len), (y.start, y.len))));
        let written = reads.iter().any(|(id, part)| {
            let layers = &self.bytes[*id].layers;
            layers
                .iter()
                .any(|layer| layer.meets(part.start, part.len) && matches!(layer.says, Says::Transfer { .. }))
        });
        // Two pieces of one target at one place would be in an order that only the device knows.
        let twice = writes.iter().enumerate().any(|(n, (a, x))| {
            writes[n + 1..].iter().any(|(b, y)| a == b && meet((x.start, x.len), (y.start, y.len)))
        });
        let read = writes.iter().any(|(id, part)| !self.readers(*id, part.start, part.len).is_empty());
        !own && !written && !twice && !read
    }

    /// A transfer was posted.
    pub fn begin_transfer(&mut self, id: u64, source: &[Piece], target: &[Piece], excused: bool) {
        let (source, target) = (parts(source), parts(target));
        let transfer = Transfer {
            source,
            target: target.clone(),
            variants: Vec::new(),
            unknown: false,
            contended: false,
            excused,
        };
        self.transfers.insert(id, transfer);
        self.look_again(id);
        for part in target {
            self.attach(id, part);
        }
    }

    /// Something will be written at `target`, or not, and nobody knows what.
    pub fn begin_anything(&mut self, id: u64, target: &[Piece]) {
        let target = parts(target);
        let transfer = Transfer {
            source: Vec::new(),
            target: target.clone(),
            variants: Vec::new(),
            unknown: true,
            contended: false,
            excused: true,
        };
        self.transfers.insert(id, transfer);
        target.into_iter().for_each(|part| self.attach(id, part));
    }

    /// The transfer may land in what is at `part` now.
    fn attach(&mut self, id: u64, part: Part) {
        let Some(place) = self.resolve(part.process, part.page) else { return };
        let layer = Layer { start: part.start, len: part.len, says: Says::Transfer { id, from: part.from } };
        if self.bytes[place].layers.contains(&layer) {
            return;
        }
        for reader in self.readers(place, part.start, part.len) {
            if reader != id {
                self.transfers.get_mut(&reader).expect("it reads").unknown = true;
            }
        }
        let other = |layer: &&Layer| layer.meets(part.start, part.len);
        let others: Vec<u64> = self.bytes[place]
            .layers
            .iter()
            .filter(other)
            .filter_map(|layer| match layer.says {
                Says::Transfer { id, .. } => Some(id),
                _ => None,
            })
            .collect();
        if !others.is_empty() {
            for id in others.into_iter().chain([id]) {
                if let Some(transfer) = self.transfers.get_mut(&id) {
                    transfer.contended = true;
                }
            }
        }
        self.bytes[place].layers.push(layer);
    }

    /// The pages of `range` are others than before: transfers under way may meet both.
    pub(super) fn replaced(&mut self, process: usize, range: VirtRange) {
        self.excuse_pages(process, range);
        let first = range.start().page_number();
        let pages = first..first + range.page_count();
        let inside = |part: &&Part| part.process == process && pages.contains(&part.page);
        let ids: Vec<u64> = self.transfers.keys().copied().collect();
        for id in ids {
            let transfer = self.transfers.get_mut(&id).expect("listed above");
            let again: Vec<Part> = transfer.target.iter().filter(inside).copied().collect();
            transfer.contended |= !again.is_empty();
            if self.transfers[&id].source.iter().any(|part| inside(&part)) {
                self.look_again(id);
            }
            again.into_iter().for_each(|part| self.attach(id, part));
        }
    }

    /// Transfers that touch these pages may fail.
    pub(super) fn excuse_pages(&mut self, process: usize, range: VirtRange) {
        let first = range.start().page_number();
        let pages = first..first + range.page_count();
        let inside = |part: &Part| part.process == process && pages.contains(&part.page);
        for transfer in self.transfers.values_mut() {
            transfer.excused |= transfer.source.iter().chain(&transfer.target).any(inside);
        }
    }

    /// Something else happened that a transfer may fail for.
    pub fn excuse(&mut self, id: u64) {
        if let Some(transfer) = self.transfers.get_mut(&id) {
            transfer.excused = true;
        }
    }

    /// Whether the transfer may fail.
    #[must_use]
    pub fn is_excused(&self, id: u64) -> bool {
        self.transfers.get(&id).is_none_or(|transfer| transfer.excused)
    }

    /// Transfers under way.
    #[must_use]
    pub fn transfers(&self) -> usize {
        self.transfers.len()
    }

    /// The transfer is over: all of it landed, or it is unknown what did. Nothing of it lands any more.
    pub fn end_transfer(&mut self, id: u64, landed: bool) {
        let Some(transfer) = self.transfers.remove(&id) else { return };
        let mine = |layer: &Layer| matches!(layer.says, Says::Transfer { id: of, .. } if of == id);
        for place in 0..self.bytes.len() {
            if self.bytes[place].layers.is_empty() || !self.bytes[place].layers.iter().any(mine) {
                continue;
            }
            let (gone, kept) =
                std::mem::take(&mut self.bytes[place].layers).into_iter().partition::<Vec<_>, _>(mine);
            self.bytes[place].layers = kept;
            for layer in gone {
                let Says::Transfer { from, .. } = layer.says else { continue };
                let mut said =
                    transfer.variants.iter().map(|variant| variant[from..from + layer.len].to_vec());
                let bytes = &mut self.bytes[place];
                if landed
                    && !transfer.contended
                    && let Some(first) = said.next()
                {
                    bytes.set(layer.start, &first);
                }
                said.for_each(|data| bytes.maybe(layer.start, data));
                if transfer.unknown {
                    bytes.anything(layer.start, layer.len);
                }
                self.source_changed(place, layer.start, layer.len);
            }
        }
    }
}
