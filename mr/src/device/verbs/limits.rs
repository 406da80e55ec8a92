//! Limits that would end a registration, looked at before it: what is needed, what there is, how to raise it.
//!
//! The kernel charges pinned pages to RLIMIT_MEMLOCK by `VmPin` and lets CAP_IPC_LOCK pass (drivers/infiniband/core/umem.c,
//! `ib_umem_get`); it says ENOMEM, which is also what it says when there is no memory. Regions on demand pin nothing.

use super::error::VerbsError;
use hw_model::addr::{PAGE_SIZE, VirtAddr, VirtRange};
use rustix::process::{Resource, getrlimit};

/// CAP_IPC_LOCK (include/uapi/linux/capability.h).
const IPC_LOCK: u64 = 1 << 14;

/// What limits the pinning of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LockedMemory {
    /// RLIMIT_MEMLOCK; `None` is unlimited.
    pub limit: Option<u64>,
    /// Pinned already.
    pub pinned: u64,
    /// Whether the limit does not hold for this process.
    pub exempt: bool,
}

impl LockedMemory {
    /// As it is now.
    #[must_use]
    pub fn now() -> Self {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        Self::from_status(&status, getrlimit(Resource::Memlock).current)
    }

    pub(super) fn from_status(status: &str, limit: Option<u64>) -> Self {
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let pinned = field("VmPin:").and_then(|text| text.strip_suffix("kB")?.trim().parse::<u64>().ok());
        let capabilities = field("CapEff:").and_then(|text| u64::from_str_radix(text, 16).ok());
        Self {
            limit,
            pinned: pinned.unwrap_or(0) * 1024,
            exempt: capabilities.is_some_and(|capabilities| capabilities & IPC_LOCK != 0),
        }
    }

    /// Whether the pages of `range` can be pinned besides.
    ///
    /// # Errors
    /// [`VerbsError::MemoryLock`].
    pub fn allows(self, range: VirtRange) -> Result<(), VerbsError> {
        let needed = range.page_count().saturating_mul(PAGE_SIZE);
        match self.limit {
            Some(limit) if !self.exempt && self.pinned.saturating_add(needed) > limit => {
                Err(VerbsError::MemoryLock { needed, pinned: self.pinned, limit })
            }
            _ => Ok(()),
        }
    }
}

/// The first mapping in `range` whose pages the kernel gives to no driver by their addresses: memory of a device, or most
/// DMABUFs' (VM_PFNMAP and VM_IO; `check_vma_flags` in mm/gup.c, `hmm_vma_walk_test` in mm/hmm.c). Reads all mappings of the
/// process: for those who have been refused.
pub(super) fn without_pages(range: VirtRange) -> Option<VirtRange> {
    find_without_pages(&std::fs::read_to_string("/proc/self/smaps").ok()?, range)
}

/// The same in the text of /proc/PID/smaps.
pub(super) fn find_without_pages(smaps: &str, range: VirtRange) -> Option<VirtRange> {
    let mut mapping = None;
    smaps.lines().find_map(|line| {
        let Some(flags) = line.strip_prefix("VmFlags:") else {
            let bounds = line.split_once(' ').and_then(|(bounds, _)| bounds.split_once('-'));
            let number = |text| u64::from_str_radix(text, 16).ok();
            if let Some((Some(start), Some(end))) = bounds.map(|(start, end)| (number(start), number(end))) {
                mapping = VirtRange::new(VirtAddr(start), end.saturating_sub(start));
            }
            return None;
        };
        let without = flags.split_whitespace().any(|flag| matches!(flag, "pf" | "io"));
        mapping.filter(|mapping| without && mapping.overlaps(range))
    })
}
