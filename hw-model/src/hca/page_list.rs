//! The hardware page list of one key: the MTT. One 64-bit word a page, all pages of one size, read by the engine at DMA time, written by
//! software, both without a lock.
//!
//! ```text
//!  63                                  12 11    8 7     5    4      3       2      1       0
//! |        DMA address of the page       |  kind | path  | SEEN | LINKED | UNIT | WRITE | VALID |
//! ```
//!
//! The HCA looks at the address, VALID and WRITE. The rest is software's, as in a CPU page table: LINKED (the page
//! occupies its slot of the IOVA range and must be unlinked there), UNIT (this page begins what was linked in one piece:
//! LINKED pages without it belong to the unit before them, and are unlinked with it), SEEN (the page was present once; path
//! and kind tell what it was last), path, and kind. They live in the same word so that
//! one store publishes all of it, and so that a region needs 8 bytes a page and no more.

use crate::addr::{DmaAddr, PAGE_SHIFT, page_bytes};
use std::fmt;

bitflags::bitflags! {
    /// The flag bits of an [`Entry`].
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Flags: u64 {
        /// The HCA may read through this entry.
        const VALID = 1;
        /// The HCA may write through this entry.
        const WRITE = 1 << 1;
        /// Software: the page begins a link unit, what was linked in one piece and is unlinked in one piece.
        const UNIT = 1 << 2;
        /// Software: the page is linked at its slot of the IOVA range. Survives clearing, so that the unlink that
        /// follows the drain knows what to unlink.
        const LINKED = 1 << 3;
        /// Software: the page was present at some time. Sticky.
        const SEEN = 1 << 4;
    }
}

/// How DMA reaches a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Path {
    /// No IOMMU: the DMA address is the physical address.
    Direct = 0,
    /// RAM, linked in the device's IOVA range.
    Iova = 1,
    /// A peer's BAR through the host bridge, linked in the IOVA range as MMIO.
    HostBridge = 2,
    /// A peer's BAR below the same switch, by its bus address. Never linked.
    BusAddress = 3,
    /// Through a bounce buffer.
    Bounce = 4,
}

impl Path {
    /// Every path, in the order of their codes.
    pub const ALL: [Self; 5] = [Self::Direct, Self::Iova, Self::HostBridge, Self::BusAddress, Self::Bounce];

    /// Whether a page on this path occupies its slot of the IOVA range.
    #[must_use]
    pub fn is_linked(self) -> bool {
        matches!(self, Self::Iova | Self::HostBridge | Self::Bounce)
    }

    /// Its name, as in tables and JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Iova => "iova",
            Self::HostBridge => "host_bridge",
            Self::BusAddress => "bus_address",
            Self::Bounce => "bounce",
        }
    }
}

/// What a page is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Backing {
    /// Anonymous memory in 4 KiB pages.
    Anonymous = 0,
    /// Anonymous memory in a transparent huge page.
    TransparentHuge = 1,
    /// hugetlbfs.
    Hugetlb = 2,
    /// A file's page cache, or a private copy of one.
    File = 3,
    /// shmem: memfd, shared anonymous, System V.
    Shared = 4,
    /// The shared page of zeroes.
    Zero = 5,
    /// A DMABUF page that is in system memory at the moment.
    DmabufSystem = 6,
    /// A DMABUF page that is in its exporter's BAR at the moment.
    DmabufPeer = 7,
    /// Device memory that the CPU cannot reach. Faulting migrates it back.
    DevicePrivate = 8,
    /// Device memory that the CPU can reach coherently.
    DeviceCoherent = 9,
    /// Encrypted memory that devices cannot read.
    EncryptedPrivate = 10,
    /// Memory of an encrypted guest that is shared with devices.
    EncryptedShared = 11,
}

impl Backing {
    /// Every kind, in the order of their codes.
    pub const ALL: [Self; 12] = [
        Self::Anonymous,
        Self::TransparentHuge,
        Self::Hugetlb,
        Self::File,
        Self::Shared,
        Self::Zero,
        Self::DmabufSystem,
        Self::DmabufPeer,
        Self::DevicePrivate,
        Self::DeviceCoherent,
        Self::EncryptedPrivate,
        Self::EncryptedShared,
    ];

    /// Its name, as in tables and JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Anonymous => "anonymous",
            Self::TransparentHuge => "transparent_huge",
            Self::Hugetlb => "hugetlb",
            Self::File => "file",
            Self::Shared => "shared",
            Self::Zero => "zero",
            Self::DmabufSystem => "dmabuf_system",
            Self::DmabufPeer => "dmabuf_peer",
            Self::DevicePrivate => "device_private",
            Self::DeviceCoherent => "device_coherent",
            Self::EncryptedPrivate => "encrypted_private",
            Self::EncryptedShared => "encrypted_shared",
        }
    }
}

const PATH_SHIFT: u32 = 5;
const KIND_SHIFT: u32 = 8;
const ADDRESS_MASK: u64 = !((1 << PAGE_SHIFT) - 1);

/// One word of a page list.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Entry(u64);

impl Entry {
    /// Nothing known of the page: not present, but faultable.
    pub const EMPTY: Self = Self(0);

    /// A present entry.
    ///
    /// # Panics
    /// If `address` is not page aligned.
    #[must_use]
    pub fn present(address: DmaAddr, path: Path, backing: Backing, write: bool) -> Self {
        assert_eq!(address.page_offset(), 0, "page-list entries hold page-aligned addresses");
        let mut flags = Flags::VALID | Flags::SEEN;
        flags.set(Flags::WRITE, write);
        flags.set(Flags::LINKED | Flags::UNIT, path.is_linked());
        Self(address.0 | flags.bits() | (path as u64) << PATH_SHIFT | (backing as u64) << KIND_SHIFT)
    }
    /// The entry of a raw word.
    #[must_use]
    pub fn from_bits(bits: u64) -> Self {
        Self(bits)
    }
    /// The raw word.
    #[must_use]
    pub fn bits(self) -> u64 {
        self.0
    }
    /// The flag bits.
    #[must_use]
    pub fn flags(self) -> Flags {
        Flags::from_bits_truncate(self.0)
    }
    /// Whether the HCA may read through it.
    #[must_use]
    pub fn is_valid(self) -> bool {
        self.flags().contains(Flags::VALID)
    }
    /// Whether the HCA may write through it.
    #[must_use]
    pub fn is_writable(self) -> bool {
        self.flags().contains(Flags::VALID | Flags::WRITE)
    }
    /// Whether the page occupies its IOVA slot.
    #[must_use]
    pub fn is_linked(self) -> bool {
        self.flags().contains(Flags::LINKED)
    }
    /// Start of the page on the bus.
    #[must_use]
    pub fn address(self) -> DmaAddr {
        DmaAddr(self.0 & ADDRESS_MASK)
    }
    /// The page's path, meaningful while valid or linked.
    #[must_use]
    pub fn path(self) -> Path {
        Path::ALL[((self.0 >> PATH_SHIFT) & 0x7) as usize % Path::ALL.len()]
    }
    /// The page's kind, meaningful while valid or linked.
    #[must_use]
    pub fn backing(self) -> Backing {
        Backing::ALL[((self.0 >> KIND_SHIFT) & 0xf) as usize % Backing::ALL.len()]
    }
    /// The entry of page `number` of the huge page that this is the entry of.
    fn page_of_huge(self, number: u64) -> Self {
        let page = Self(self.0 + page_bytes(number));
        if number == 0 { page } else { page.continued() }
    }
    /// Whether the HCA sees it, or it occupies its IOVA slot.
    fn is_active(self) -> bool {
        self.0 & (Flags::VALID | Flags::LINKED).bits() != 0
    }
    /// The same entry as a further page of the unit that an earlier page begins.
    #[must_use]
    pub fn continued(self) -> Self {
        Self(self.0 & !Flags::UNIT.bits())
    }
    /// Whether the page begins a link unit.
    #[must_use]
    pub fn begins_unit(self) -> bool {
        self.flags().contains(Flags::LINKED | Flags::UNIT)
    }
    /// The same entry, no longer visible to the HCA. What was linked stays known.
    #[must_use]
    pub fn cleared(self) -> Self {
        Self(self.0 & !(Flags::VALID | Flags::WRITE).bits())
    }
    /// The same entry before it was ever visible: hidden, and not seen. For links that are not shown yet.
    #[must_use]
    pub fn fresh(self) -> Self {
        Self(self.cleared().0 & !Flags::SEEN.bits())
    }
    /// The same entry with its link gone: only what the page was last is left.
    #[must_use]
    pub fn unlinked(self) -> Self {
        Self(self.cleared().0 & !(Flags::LINKED | Flags::UNIT).bits() & !ADDRESS_MASK)
    }
    /// Whether the page was present at some time.
    #[must_use]
    pub fn was_seen(self) -> bool {
        self.flags().contains(Flags::SEEN)
    }
    /// A hidden entry made visible, with the address it has.
    #[must_use]
    pub fn shown(self, write: bool) -> Self {
        let mut flags = Flags::VALID | Flags::SEEN;
        flags.set(Flags::WRITE, write);
        Self(self.0 | flags.bits())
    }
    /// The same entry for a page that turned into `backing` where it is: a huge page split, a page of zeroes written.
    #[must_use]
    pub fn relabelled(self, backing: Backing) -> Self {
        Self(self.0 & !(0xf << KIND_SHIFT) | (backing as u64) << KIND_SHIFT)
    }
    /// The same entry with write permission: a permission upgrade keeps the DMA address (invariant 11).
    #[must_use]
    pub fn upgraded(self) -> Self {
        Self(self.0 | Flags::WRITE.bits())
    }
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::EMPTY {
            return f.write_str("Entry(empty)");
        }
        write!(f, "Entry({} {:?} {:?} {:?})", self.address(), self.path(), self.backing(), self.flags())
    }
}

mod list;

pub use list::{HUGE_PAGES, OutOfMemory, PageList, Slot};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_gives_back_what_was_put_in() {
        for path in Path::ALL {
            for backing in Backing::ALL {
                for write in [false, true] {
                    let entry = Entry::present(DmaAddr(0xffff_ffff_ffff_f000), path, backing, write);
                    assert_eq!(entry.address(), DmaAddr(0xffff_ffff_ffff_f000));
                    assert_eq!((entry.path(), entry.backing()), (path, backing));
                    assert_eq!((entry.is_valid(), entry.is_writable()), (true, write));
                    assert_eq!(entry.is_linked(), path.is_linked());
                }
            }
        }
    }

    #[test]
    fn clearing_hides_an_entry_and_remembers_its_link() {
        let linked = Entry::present(DmaAddr(0x5000), Path::Iova, Backing::File, true).cleared();
        assert!(!linked.is_valid() && !linked.is_writable() && linked.is_linked());
        let bus = Entry::present(DmaAddr(0x5000), Path::BusAddress, Backing::DmabufPeer, true).cleared();
        assert!(!bus.is_valid() && !bus.is_linked());
        assert_eq!(linked.unlinked().backing(), Backing::File, "what the page was last stays known");
        assert_eq!(linked.unlinked().address(), DmaAddr(0));
    }

    #[test]
    fn an_upgrade_keeps_the_address() {
        let entry = Entry::present(DmaAddr(0x7000), Path::Iova, Backing::Anonymous, false);
        assert_eq!(entry.upgraded().address(), entry.address());
        assert!(entry.upgraded().is_writable());
        let relabelled = entry.relabelled(Backing::Shared);
        assert_eq!((relabelled.address(), relabelled.backing()), (entry.address(), Backing::Shared));
        assert!(relabelled.is_valid() && relabelled.is_linked());
    }

    #[test]
    fn a_list_too_large_for_memory_is_an_error() {
        assert_eq!(PageList::new(u64::MAX).unwrap_err(), OutOfMemory { entries: u64::MAX });
        assert!(PageList::new(1 << 30).is_ok(), "8 GiB of entries, none touched");
    }
}
