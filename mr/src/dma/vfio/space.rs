//! A container as an I/O address space: a link is `VFIO_IOMMU_MAP_DMA`, an unlink `VFIO_IOMMU_UNMAP_DMA`.
//!
//! The kernel refuses to map over a mapping and to unmap a part of one. It takes the unmapping of a hole for done, and
//! says of nothing where it leads. A table beside the kernel's, a [`Domain`] that no device is translated by, knows both:
//! it is asked first, so that what is refused, and how, is the same here as behind the modelled IOMMU. One mapping of the
//! kernel is one leaf of that table, since the kernel unmaps as it mapped; how large the real leaves are it decides by
//! the memory it finds.
//!
//! Unmapping flushes before it returns, and pages are pinned from mapping to unmapping: nothing is left for a flush.

use super::container::VfioContainer;
use super::sys::{self, MapFlags};
use crate::dma::IoSpace;
use hw_model::addr::{Iova, PhysAddr, VirtAddr};
use hw_model::iommu::{Cookie, Domain, FlushMode, Gather, HostRefusal, LeafSize, MapError, Prot, UnmapError};
use hw_model::sync::atomic::Ordering;
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities};

/// How much is mapped, and how much can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VfioLimits {
    /// Bytes pinned by this container.
    pub pinned: u64,
    /// Most bytes that the process may pin, RLIMIT_MEMLOCK; `None` if there is no limit, or CAP_IPC_LOCK lifts it.
    pub memlock: Option<u64>,
    /// Mappings alive, one a leaf.
    pub entries: u64,
    /// Most mappings at a time, `dma_entry_limit` of the kernel module vfio_iommu_type1; `None` if the kernel does not
    /// say.
    pub most_entries: Option<u32>,
}

impl VfioLimits {
    /// Whether seven eighths of a limit are used: what follows is a refusal in the middle of work.
    #[must_use]
    pub fn are_near(&self) -> bool {
        let near = |used: u64, most: u64| u128::from(used) * 8 > u128::from(most) * 7;
        self.memlock.is_some_and(|most| near(self.pinned, most))
            || self.most_entries.is_some_and(|most| near(self.entries, most.into()))
    }
}

/// The limit of locked memory for this thread.
fn memlock() -> Option<u64> {
    let lifted = |sets: CapabilitySets| sets.effective.contains(CapabilitySet::IPC_LOCK);
    if capabilities(None).is_ok_and(lifted) { None } else { getrlimit(Resource::Memlock).current }
}

/// Bytes that this process has locked or pinned, by whatever means (VmLck in proc_pid_status(5)). 0 if that is not said.
fn locked() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmLck:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

impl VfioContainer {
    /// What is mapped beside the limits that mapping ends at. Other memory that the process has locked or pinned counts
    /// against the limit of locked memory too, and is not seen here.
    #[must_use]
    pub fn limits(&self) -> VfioLimits {
        let stats = self.table.stats();
        VfioLimits {
            pinned: stats.mapped_bytes,
            memlock: memlock(),
            entries: stats.leaves_mapped.iter().sum::<u64>() - stats.leaves_unmapped.iter().sum::<u64>(),
            most_entries: self.most_entries,
        }
    }

    /// Says once that a limit is near.
    fn warn_of_limits(&self) {
        if !self.warned.load(Ordering::Relaxed) && self.limits().are_near() {
            self.warned.store(true, Ordering::Relaxed);
            let limits = self.limits();
            tracing::warn!(
                ?limits,
                "few mappings or little memory are left: raise dma_entry_limit of vfio_iommu_type1 or RLIMIT_MEMLOCK, or \
                 link larger leaves"
            );
        }
    }

    /// Has the kernel map what the table says of `[iova, iova + len)`, leaf by leaf. On an error nothing of it stays.
    fn map_leaves(&self, iova: Iova, len: u64, prot: Prot) -> Result<(), MapError> {
        let mut done = 0;
        while done < len {
            let at = iova.offset(done);
            let leaf = self.leaf_at(at).expect("the table has just mapped it");
            let phys = self.table.iova_to_phys(at).expect("the table has just mapped it");
            if let Err(why) = self.map_leaf(at, phys, leaf, prot) {
                if done > 0 {
                    self.unmap_in_kernel(iova, done);
                }
                self.table.unmap(iova, len).map(drop).expect("the table has just mapped it");
                return Err(MapError::Host { iova: at, why });
            }
            done += leaf;
        }
        self.warn_of_limits();
        Ok(())
    }

    fn map_leaf(&self, iova: Iova, phys: PhysAddr, len: u64, prot: Prot) -> Result<(), HostRefusal> {
        let mut flags = MapFlags::empty();
        flags.set(MapFlags::READ, prot.contains(Prot::READ));
        flags.set(MapFlags::WRITE, prot.contains(Prot::WRITE));
        let map = |vaddr: VirtAddr| sys::map_dma(&self.fd, vaddr.0, iova.0, len, flags);
        match self.memory.with_address(phys, len, map) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(errno)) => Err(self.refusal(iova, phys, len, errno)),
            Err(_) => Err(HostRefusal::Gone { phys }),
        }
    }

    /// What the kernel meant.
    fn refusal(&self, iova: Iova, phys: PhysAddr, len: u64, errno: Errno) -> HostRefusal {
        let locked = locked();
        let hole = |&(start, bytes): &(Iova, u64)| iova.0 < start.0 + bytes && start.0 < iova.0 + len;
        match (errno, memlock(), self.most_entries) {
            (Errno::NOMEM, Some(limit), _) if locked + len > limit => {
                HostRefusal::LockedMemory { needed: len, locked, limit }
            }
            (Errno::NOSPC, _, Some(most)) => HostRefusal::TooManyMappings { most },
            (Errno::INVAL, ..) if self.holes.iter().any(hole) => HostRefusal::Reserved,
            (Errno::FAULT | Errno::OPNOTSUPP, ..) => HostRefusal::Unpinnable { phys },
            _ => {
                if errno == Errno::EXIST {
                    self.surprised(iova, len, "it has something mapped here");
                }
                HostRefusal::Other { errno: errno.raw_os_error() }
            }
        }
    }

    /// Has the kernel unmap what the table knows to be whole mappings.
    fn unmap_in_kernel(&self, iova: Iova, len: u64) {
        match sys::unmap_dma(&self.fd, iova.0, len) {
            Ok(unmapped) if unmapped == len => {}
            Ok(_) => self.surprised(iova, len, "it unmapped less"),
            Err(_) => self.surprised(iova, len, "it refused to unmap"),
        }
    }

    /// The kernel disagrees with the table. What it has mapped stays pinned, so no memory is given away to a device; the
    /// IOVA is lost, since the kernel refuses to map there again.
    #[cold]
    fn surprised(&self, iova: Iova, len: u64, how: &str) {
        self.surprises.fetch_add(1, Ordering::Relaxed);
        tracing::error!(%iova, len, how, "the kernel disagrees about what is mapped in a container");
    }
}

impl IoSpace for VfioContainer {
    fn width(&self) -> u32 {
        self.table.config().width
    }
    fn granule_shift(&self) -> u32 {
        self.table.config().granule_shift
    }
    fn reserved(&self) -> Vec<(Iova, u64)> {
        self.holes.clone()
    }
    fn cookie(&self) -> &Cookie {
        &self.cookie
    }
    fn flush_mode(&self) -> FlushMode {
        FlushMode::Strict
    }
    fn prepare(&self, iova: Iova, len: u64) -> Result<(), MapError> {
        self.table.prepare(iova, len)
    }
    fn map(
        &self,
        iova: Iova,
        phys: PhysAddr,
        len: u64,
        prot: Prot,
        largest: LeafSize,
    ) -> Result<(), MapError> {
        self.table.map_up_to(iova, phys, len, prot, largest)?;
        self.map_leaves(iova, len, prot)
    }
    fn map_scattered(
        &self,
        iova: Iova,
        frames: &mut dyn Iterator<Item = PhysAddr>,
        prot: Prot,
    ) -> Result<(), MapError> {
        let mut pages = 0;
        self.table.map_scattered(iova, frames.inspect(|_| pages += 1), prot)?;
        self.map_leaves(iova, pages << self.granule_shift(), prot)
    }
    fn sync_map(&self, _iova: Iova, _len: u64) {}
    fn unmap(&self, iova: Iova, len: u64) -> Result<Gather, UnmapError> {
        let _unused_by_devices = self.table.unmap(iova, len)?;
        self.unmap_in_kernel(iova, len);
        Ok(Gather::EMPTY)
    }
    fn flush(&self, _gather: Gather) {}
    fn flush_all(&self) {}
    fn leaf_at(&self, iova: Iova) -> Option<u64> {
        IoSpace::leaf_at(&*self.table, iova)
    }
    fn iova_to_phys(&self, iova: Iova) -> Option<PhysAddr> {
        Domain::iova_to_phys(&self.table, iova)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_near_from_seven_eighths_on_and_none_is_never_near() {
        let limits =
            |pinned, memlock, entries, most_entries| VfioLimits { pinned, memlock, entries, most_entries };
        assert!(!limits(u64::MAX, None, u64::MAX, None).are_near());
        assert!(!limits(7, Some(8), 7, Some(8)).are_near());
        assert!(limits(8, Some(8), 0, Some(8)).are_near());
        assert!(limits(0, Some(8), 8, Some(8)).are_near());
        assert!(limits(u64::MAX, Some(u64::MAX), 0, None).are_near());
    }
}
