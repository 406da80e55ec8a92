//! From ranges to work requests and to regions: arithmetic only.

use super::endpoint::RwConfig;
use crate::dma::page_size::{DmaRange, FirstByte, ListPlan, PageSizeError, Parts};
use hw_model::hca::MIN_INDIRECT_ENTRY;

/// The memory of one region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// Offset of its first byte in what is mapped.
    pub(super) at: u64,
    /// Bytes.
    pub(super) len: u64,
    pub(super) list: List,
}

/// What the region is registered with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum List {
    /// A page list.
    Pages(ListPlan),
    /// An indirect list of so many entries.
    Gaps(usize),
}

impl Piece {
    pub(super) fn entries(&self) -> u64 {
        match &self.list {
            List::Pages(plan) => plan.entries,
            List::Gaps(entries) => *entries as u64,
        }
    }
}

/// The regions that `ranges` take: one page list if that is possible, else indirect lists if the device has them, else
/// as many page lists as it takes.
pub(super) fn pieces(ranges: &[DmaRange], config: &RwConfig) -> Result<Vec<Piece>, PageSizeError> {
    let (sizes, most) = (config.page_sizes, u64::from(config.entries));
    if config.gaps {
        match ListPlan::new(ranges.iter().copied(), FirstByte::ANY_OFFSET, sizes) {
            Ok(plan) if plan.entries <= most => {
                return Ok(vec![Piece { at: 0, len: plan.len, list: List::Pages(plan) }]);
            }
            _ => return Ok(with_gaps(ranges, config.entries as usize)),
        }
    }
    Parts::longest(ranges.iter().copied(), sizes, most)
        .map(|part| part.map(|part| Piece { at: part.at, len: part.list.len, list: List::Pages(part.list) }))
        .collect()
}

/// Indirect lists of at most `most` entries. One that is too short to have others on both sides ends its list.
fn with_gaps(ranges: &[DmaRange], most: usize) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    let mut at = 0;
    let mut open = false;
    for DmaRange { len, .. } in ranges {
        match pieces.last_mut() {
            Some(Piece { len: bytes, list: List::Gaps(entries), .. }) if open => {
                *bytes += len;
                *entries += 1;
                open = *entries < most && *len >= MIN_INDIRECT_ENTRY;
            }
            _ => {
                pieces.push(Piece { at, len: *len, list: List::Gaps(1) });
                open = most > 1;
            }
        }
        at += len;
    }
    pieces
}

/// The part of `ranges` from byte `at` on, `len` bytes long.
pub(super) fn part(ranges: &[DmaRange], at: u64, len: u64) -> impl Iterator<Item = DmaRange> + Clone {
    let mut start = 0;
    ranges.iter().filter_map(move |range| {
        let (from, to) = (at.max(start), (at + len).min(start + range.len));
        let dma = range.dma.offset(from.saturating_sub(start));
        start += range.len;
        (from < to).then(|| DmaRange { dma, len: to - from })
    })
}

/// The scatter-gather lists of work requests over `ranges`: at most `sges` entries and `message` bytes each.
pub(super) fn messages(
    ranges: impl IntoIterator<Item = DmaRange>,
    sges: usize,
    message: u32,
) -> Vec<Vec<DmaRange>> {
    let mut messages: Vec<Vec<DmaRange>> = Vec::new();
    let mut room = 0;
    for DmaRange { dma, len } in ranges {
        let mut done = 0;
        while done < len {
            if messages.last().is_none_or(|last| last.len() >= sges.max(1)) || room == 0 {
                messages.push(Vec::new());
                room = u64::from(message.max(1));
            }
            let now = room.min(len - done);
            let part = DmaRange { dma: dma.offset(done), len: now };
            messages.last_mut().expect("one is open").push(part);
            room -= now;
            done += now;
        }
    }
    messages
}
