//! Memory in hugetlb pages, and regions that are kept in them: page lists whose entries are of 2 MiB.
//!
//! Such a region takes whole hugetlb pages and nothing else. What lies at its addresses may become something else all the
//! same: then requests on it fail until there are hugetlb pages again.

use super::memory::Piece;
use super::setup::HUGE_AT;
use super::traffic::Chosen;
use super::world::{Place, World};
use hw_model::addr::{PAGE_SIZE, VirtAddr, VirtRange, page_bytes};
use mr::Region;
use odp::space::sim::{HUGE_PAGES, MapRequest, ObjectChange, Source};

/// Pages of the hugetlb file of a host: two of 2 MiB.
pub const HUGETLB_PAGES: u64 = 2 * HUGE_PAGES;
/// From the start of a process's memory to its hugetlb pages, in pages.
const HUGETLB_AT: u64 = HUGE_AT + HUGE_PAGES;
/// From the start of a process's memory to where huge pages may be moved, in pages.
const MOVED_AT: u64 = HUGETLB_AT + HUGETLB_PAGES;

impl Place {
    /// The whole pages that hold it, in the size that the region is kept in.
    pub(super) fn kept(&self) -> VirtRange {
        self.range().aligned_to(if self.huge { page_bytes(HUGE_PAGES) } else { PAGE_SIZE })
    }
}

impl World {
    fn is_hugetlb(&self, process: usize, page: u64) -> bool {
        let host = self.processes[process].host;
        self.memory.is_of(process, page, (host, self.hosts[host].hugetlb))
    }

    /// Whether all of `range` is hugetlb pages.
    pub(super) fn is_all_hugetlb(&self, process: usize, range: VirtRange) -> bool {
        let first = range.start().page_number();
        (first..first + range.page_count()).all(|page| self.is_hugetlb(process, page))
    }

    /// Whether the region that a piece is of takes the pages that are there.
    pub(super) fn is_taken(&self, chosen: &Chosen) -> bool {
        let Piece { process, at, len } = chosen.piece;
        let named = |key| self.regions.iter().find(|slot| slot.region.key() == key);
        let huge = chosen.keys().filter_map(named).any(|slot| slot.place.huge);
        let range = VirtRange::new(at, len as u64).expect("a range of user memory");
        !huge || self.is_all_hugetlb(process, range.aligned_to(page_bytes(HUGE_PAGES)))
    }

    /// A hugetlb page of a process.
    pub(super) fn some_hugetlb_page(&mut self, process: usize) -> Option<u64> {
        let all: Vec<u64> = self.memory.pages(process).map(|(page, _)| page).collect();
        let all: Vec<u64> = all.into_iter().filter(|page| self.is_hugetlb(process, *page)).collect();
        self.choices.index(all.len()).map(|index| all[index])
    }

    /// One hugetlb page, or both.
    fn some_hugetlb_part(&mut self) -> (u64, u64) {
        self.choices.of(&[(0, HUGE_PAGES), (HUGE_PAGES, HUGETLB_PAGES), (0, HUGETLB_PAGES)])
    }

    /// Hugetlb pages where a process has them, or, `else_too`, something else there.
    pub(super) fn some_huge_mapping(&mut self, process: usize, else_too: bool) -> MapRequest {
        let (host, arena) = (self.processes[process].host, self.processes[process].arena);
        let (first, end) = self.some_hugetlb_part();
        let source = Source::Shared { object: self.hosts[host].hugetlb, first };
        let anonymous = MapRequest::anonymous(end - first);
        let request = match else_too && self.choices.chance(400) {
            true => anonymous.huge(),
            false => anonymous.of(source),
        };
        let at = self.choices.of(&[first, 0, HUGE_PAGES]);
        request.fixed(VirtAddr::from_page_number(arena + HUGETLB_AT + at))
    }

    /// Where huge pages of a process could be moved.
    pub(super) fn some_place_for_huge(&mut self, process: usize) -> VirtAddr {
        let place = MOVED_AT + HUGE_PAGES * self.choices.between(0, 1);
        VirtAddr::from_page_number(self.processes[process].arena + place)
    }

    /// A change of the hugetlb file of a host.
    pub(super) fn some_hugetlb_change(&mut self, host: usize) -> ObjectChange {
        let object = self.hosts[host].hugetlb;
        let (first, end) = self.some_hugetlb_part();
        match self.choices.below(3) {
            0 => ObjectChange::Punch { object, first, end },
            1 => ObjectChange::Truncate { object, pages: first },
            _ => ObjectChange::Truncate { object, pages: HUGETLB_PAGES },
        }
    }
}
