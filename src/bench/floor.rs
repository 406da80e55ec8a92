//! What registration and faults are held against: the least that the kernel can be asked to do for the same range; and the
//! clock of one thread.
//!
//! Unsafe island. Invariant: the calls here read memory of the range, or fault it in, and change no byte of it.
#![allow(unsafe_code)]

use hw_model::addr::{PAGE_SIZE, VirtRange};
use rustix::mm::Advice;
use std::ffi::c_void;
use std::fs::File;
use std::os::fd::AsRawFd;

/// One run of alike pages, as PAGEMAP_SCAN reports it (include/uapi/linux/fs.h `struct page_region`).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// include/uapi/linux/fs.h `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct ScanArgument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
/// All categories that the first kernels with the call know.
const EVERY_CATEGORY: u64 = 0x7f;
/// `PAGE_IS_HUGE`.
const HUGE: u64 = 1 << 6;

/// The processor time of this thread in nanoseconds: what other programs of the machine do not lengthen.
pub(super) fn thread_time_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: there is room for the time.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    (time.tv_sec * 1_000_000_000 + time.tv_nsec) as u64
}

/// Populating and scanning with nothing around it.
pub struct Floor {
    pagemap: File,
    regions: Vec<PageRegion>,
}

impl Floor {
    /// `None` where the kernel has no PAGEMAP_SCAN.
    pub fn new(probe: VirtRange) -> Option<Self> {
        let pagemap = File::open("/proc/self/pagemap").ok()?;
        let mut floor = Self { pagemap, regions: vec![PageRegion::default(); 4096] };
        floor.scan(probe)?;
        Some(floor)
    }

    /// MADV_POPULATE_WRITE.
    ///
    /// # Panics
    /// If the kernel cannot: no memory, or no mapping.
    pub fn populate(&self, range: VirtRange) {
        let at = range.start().0 as *mut c_void;
        // SAFETY: populating changes no byte, whatever refers to the range.
        let populated = unsafe { rustix::mm::madvise(at, range.len() as usize, Advice::LinuxPopulateWrite) };
        populated.expect("the range can be populated");
    }

    /// PAGEMAP_SCAN over the range, all categories; runs reported.
    pub fn scan(&mut self, range: VirtRange) -> Option<usize> {
        self.scanned(range, |_| ())
    }

    /// Bytes of the range that are in huge pages.
    pub fn huge_bytes(&mut self, range: VirtRange) -> Option<u64> {
        let mut bytes = 0;
        self.scanned(range, |runs| {
            let huge = runs.iter().filter(|run| run.categories & HUGE != 0);
            bytes += huge.map(|run| run.end - run.start).sum::<u64>();
        })?;
        Some(bytes)
    }

    fn scanned(&mut self, range: VirtRange, mut look: impl FnMut(&[PageRegion])) -> Option<usize> {
        // A run a page at most. The kernel allocates room for as many as it may report: half of what one page costs.
        let most = (range.len() / PAGE_SIZE).clamp(1, self.regions.len() as u64);
        let mut argument = ScanArgument {
            size: size_of::<ScanArgument>() as u64,
            start: range.start().0,
            end: range.end().0,
            vec: self.regions.as_mut_ptr() as u64,
            vec_len: most,
            return_mask: EVERY_CATEGORY,
            ..ScanArgument::default()
        };
        let mut runs = 0;
        while argument.start < argument.end {
            // SAFETY: the argument is laid out as the kernel expects, and its vector is ours and that long.
            let found = unsafe { libc::ioctl(self.pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut argument) };
            let found = usize::try_from(found).ok()?;
            look(&self.regions[..found]);
            runs += found;
            argument.start = argument.walk_end;
        }
        Some(runs)
    }
}
