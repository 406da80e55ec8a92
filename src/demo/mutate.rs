//! The application's side: pages are dropped and moved while data moves through the region.

use crate::mixed::{Kind, MixedMemory};
use odp::space::dmabuf::PagePlace;
use odp::space::process::DmabufMapping;
use rand::{Rng, RngExt};
use std::io;

/// Most pages dropped by one call, and moved one after the other.
const LONGEST: u64 = 16;

/// What a stretch of changes did.
#[derive(Debug, Default)]
pub struct Changes {
    /// Pages that were dropped, each once.
    pub dropped: Vec<u64>,
    /// Pages of the DMABUF that moved, as pages of the range; one that moved twice is there twice.
    pub moved: Vec<u64>,
}

/// One change at random: a drop of a few pages anywhere but in the DMABUF, or moves of a few of its pages, one by one.
pub fn change(
    random: &mut impl Rng,
    memory: &MixedMemory,
    dmabuf: &DmabufMapping,
    changes: &mut Changes,
) -> io::Result<()> {
    let pages = memory.range().page_count();
    let page = random.random_range(0..pages);
    match memory.kind_at(page) {
        Kind::Hole => {
            let first = dmabuf.range().start().page_number() - memory.range().start().page_number();
            let inside = page - first;
            for inside in inside..(inside + random.random_range(1..=LONGEST)).min(dmabuf.pages()) {
                let moved = match dmabuf.place(inside) {
                    Some(PagePlace::Peer) => dmabuf.move_to_system(inside..inside + 1),
                    _ => dmabuf.move_to_peer(inside..inside + 1),
                };
                moved.map_err(io::Error::other)?;
                changes.moved.push(first + inside);
            }
        }
        // A page of the pool can only be dropped whole; the demo leaves it alone.
        Kind::Hugetlb => {}
        // Half of the huge pages stay whole, to be seen beside those that were split.
        Kind::TransparentHuge if memory.is_in_second_half(page) => {}
        kind => {
            let most =
                (1..=LONGEST).take_while(|n| page + n <= pages && memory.kind_at(page + n - 1) == kind);
            let count = random.random_range(1..=most.count() as u64);
            memory.discard(page, count)?;
            changes.dropped.extend(page..page + count);
        }
    }
    Ok(())
}
