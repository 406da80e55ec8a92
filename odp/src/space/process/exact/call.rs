//! What a supervised call is about to change.

use super::filter::DROPPING_ADVICE;
use hw_model::addr::{PAGE_SIZE, VirtAddr, VirtRange};

/// A system call as its caller made it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Call {
    pub(super) number: libc::c_long,
    pub(super) arguments: [u64; 6],
}

/// What the pages of a call suffer, as they are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::space::process) enum Kind {
    /// The mapping stays, its pages go.
    Removed,
    /// The mapping goes, or another takes its place.
    Unmapped,
    /// The mapping goes to another place.
    Moved,
    /// The mapping allows something else.
    Protected,
}

/// Which pages a call takes away, or may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::space::process) enum Affected {
    /// None.
    Nothing,
    /// Those of these ranges.
    Ranges(VirtRange, Option<VirtRange>),
    /// Those of the System V segment attached here.
    Segment(VirtAddr),
    /// Those that map these bytes of a file.
    File {
        /// Its inode; which file system it is on is not always told alike by stat(2) and /proc/self/maps.
        inode: u64,
        /// First byte.
        from: u64,
        /// Behind the last.
        to: u64,
    },
    /// Any.
    Everything,
}

/// What must be asked of the kernel to know.
pub(super) trait Ask {
    /// Where the heap ends.
    fn heap_end(&self) -> u64;
    /// The inode of an open file.
    fn inode(&self, fd: u64) -> Option<u64>;
    /// The inode of the file whose path is at this address.
    fn inode_of_path(&self, path: u64) -> Option<u64>;
}

/// Whole pages, as the kernel rounds. What passes the top of the address space the call itself will refuse.
fn pages(start: u64, len: u64) -> Affected {
    let first = start & !(PAGE_SIZE - 1);
    let end = start.checked_add(len).and_then(|end| end.checked_next_multiple_of(PAGE_SIZE));
    let range = end.filter(|end| *end > first).and_then(|end| VirtRange::new(VirtAddr(first), end - first));
    range.map_or(Affected::Nothing, |range| Affected::Ranges(range, None))
}

fn both(first: Affected, second: Affected) -> Affected {
    match (first, second) {
        (Affected::Ranges(first, None), Affected::Ranges(second, None)) => {
            Affected::Ranges(first, Some(second))
        }
        (Affected::Nothing, other) | (other, _) => other,
    }
}

fn file(inode: Option<u64>, from: u64, to: u64) -> Affected {
    // A call on what is no open file fails.
    inode.map_or(Affected::Nothing, |inode| Affected::File { inode, from: from & !(PAGE_SIZE - 1), to })
}

impl Call {
    /// What it changes, and how that is counted.
    pub(super) fn effect(&self, ask: &dyn Ask) -> (Kind, Affected) {
        let [a, b, c, d, e, _] = self.arguments;
        match self.number {
            libc::SYS_munmap | libc::SYS_mmap => (Kind::Unmapped, pages(a, b)),
            libc::SYS_madvise => {
                let drops = DROPPING_ADVICE.contains(&(c as u32));
                (Kind::Removed, if drops { pages(a, b) } else { Affected::Nothing })
            }
            libc::SYS_mprotect | libc::SYS_pkey_mprotect => (Kind::Protected, pages(a, b)),
            libc::SYS_brk => {
                let end = ask.heap_end();
                let shrinks = a > 0 && a < end;
                let from = a.next_multiple_of(PAGE_SIZE);
                let gone = if shrinks { pages(from, end.saturating_sub(from)) } else { Affected::Nothing };
                (Kind::Unmapped, gone)
            }
            libc::SYS_mremap => {
                let fixed = d & libc::MREMAP_FIXED as u64 != 0;
                // An old length of 0 makes a second mapping of shared memory, and leaves the first as it is.
                let old = if b > 0 { pages(a, b) } else { Affected::Nothing };
                let new = if fixed { pages(e, c) } else { Affected::Nothing };
                (Kind::Moved, both(old, new))
            }
            libc::SYS_remap_file_pages => (Kind::Unmapped, pages(a, b)),
            libc::SYS_shmdt => (Kind::Unmapped, Affected::Segment(VirtAddr(a))),
            libc::SYS_ftruncate => (Kind::Removed, file(ask.inode(a), b, u64::MAX)),
            libc::SYS_truncate => (Kind::Removed, file(ask.inode_of_path(a), b, u64::MAX)),
            libc::SYS_fallocate => {
                let moves = libc::FALLOC_FL_COLLAPSE_RANGE | libc::FALLOC_FL_INSERT_RANGE;
                let end = if b as i32 & moves != 0 { u64::MAX } else { c.saturating_add(d) };
                (Kind::Removed, file(ask.inode(a), c, end))
            }
            // Advice, by a vector that only its caller's memory holds.
            libc::SYS_process_madvise => (Kind::Removed, Affected::Everything),
            // A segment put over what is there, and whatever else the filter may send here.
            _ => (Kind::Unmapped, Affected::Everything),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Told;

    impl Ask for Told {
        fn heap_end(&self) -> u64 {
            0x50_0123
        }
        fn inode(&self, fd: u64) -> Option<u64> {
            (fd == 3).then_some(77)
        }
        fn inode_of_path(&self, path: u64) -> Option<u64> {
            (path == 0x9000).then_some(78)
        }
    }

    fn effect(number: libc::c_long, arguments: [u64; 6]) -> Affected {
        Call { number, arguments }.effect(&Told).1
    }

    fn range(start: u64, len: u64) -> VirtRange {
        VirtRange::new(VirtAddr(start), len).expect("fits")
    }

    #[test]
    fn ranges_are_rounded_to_the_pages_that_hold_them() {
        let got = effect(libc::SYS_munmap, [0x1000, 1, 0, 0, 0, 0]);
        assert_eq!(got, Affected::Ranges(range(0x1000, 0x1000), None));
        let got = effect(libc::SYS_madvise, [0x1000, 0x1001, libc::MADV_DONTNEED as u64, 0, 0, 0]);
        assert_eq!(got, Affected::Ranges(range(0x1000, 0x2000), None));
        for (at, len) in [(0x1000, 0), (u64::MAX - 0xfff, 0x2000), (0x1000, u64::MAX)] {
            assert_eq!(
                effect(libc::SYS_munmap, [at, len, 0, 0, 0, 0]),
                Affected::Nothing,
                "{at:#x} {len:#x}"
            );
        }
    }

    #[test]
    fn a_move_takes_both_places_if_the_new_one_is_fixed() {
        let fixed = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
        let (old, new) = (range(0x1000, 0x1000), range(0x8000, 0x2000));
        let arguments = |flags| [0x1000, 0x1000, 0x2000, flags, 0x8000, 0];
        assert_eq!(effect(libc::SYS_mremap, arguments(fixed)), Affected::Ranges(old, Some(new)));
        let free = libc::MREMAP_MAYMOVE as u64;
        assert_eq!(effect(libc::SYS_mremap, arguments(free)), Affected::Ranges(old, None));
        let second = [0x1000, 0, 0x2000, fixed, 0x8000, 0];
        assert_eq!(effect(libc::SYS_mremap, second), Affected::Ranges(new, None), "the old place stays");
    }

    #[test]
    fn the_heap_loses_what_is_above_its_new_end() {
        let to = |end| effect(libc::SYS_brk, [end, 0, 0, 0, 0, 0]);
        assert_eq!(to(0), Affected::Nothing, "a question");
        assert_eq!(to(0x60_0000), Affected::Nothing, "it grows");
        assert_eq!(to(0x4f_f001), Affected::Ranges(range(0x50_0000, 0x1000), None));
        assert_eq!(to(0x50_0100), Affected::Nothing, "within its last page");
    }

    #[test]
    fn files_lose_pages_from_the_new_end_or_in_the_hole() {
        let truncated = effect(libc::SYS_ftruncate, [3, 0x1800, 0, 0, 0, 0]);
        assert_eq!(truncated, Affected::File { inode: 77, from: 0x1000, to: u64::MAX });
        assert_eq!(effect(libc::SYS_ftruncate, [4, 0, 0, 0, 0, 0]), Affected::Nothing, "not open");
        let by_path = effect(libc::SYS_truncate, [0x9000, 0, 0, 0, 0, 0]);
        assert_eq!(by_path, Affected::File { inode: 78, from: 0, to: u64::MAX });
        let punch = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE) as u64;
        let hole = effect(libc::SYS_fallocate, [3, punch, 0x2000, 0x1000, 0, 0]);
        assert_eq!(hole, Affected::File { inode: 77, from: 0x2000, to: 0x3000 });
        let collapse = libc::FALLOC_FL_COLLAPSE_RANGE as u64;
        let moved = effect(libc::SYS_fallocate, [3, collapse, 0x2000, 0x1000, 0, 0]);
        assert_eq!(moved, Affected::File { inode: 77, from: 0x2000, to: u64::MAX });
    }

    #[test]
    fn what_is_not_known_takes_everything() {
        assert_eq!(effect(libc::SYS_process_madvise, [0; 6]), Affected::Everything);
        assert_eq!(effect(libc::SYS_shmat, [0; 6]), Affected::Everything);
    }
}
