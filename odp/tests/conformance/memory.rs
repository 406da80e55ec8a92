//! Real memory of this process, and the system calls that change it.
//!
//! Unsafe island. Invariant: the ranges that are changed here were mapped here, for the behaviour that changes them; no
//! reference to their bytes is ever made, and words are loaded and stored only where the behaviour has them mapped.
#![allow(unsafe_code)]

use crate::process::ProcessWorld;
use crate::world::{Allow, Area, Cpu, Kind, Skip, World};
use hw_model::addr::{PAGE_SIZE, VirtAddr, VirtRange};
use hw_model::sync::Mutex;
use odp::space::UserRange;
use rustix::fd::{AsFd, BorrowedFd};
use rustix::fs::MemfdFlags;
use rustix::mm::{Advice, MapFlags, MprotectFlags, MremapFlags, ProtFlags};
use std::ffi::c_void;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

const RW: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);
const HUGE: u64 = 2 << 20;

fn pointer(at: VirtAddr) -> *mut c_void {
    std::ptr::with_exposed_provenance_mut(at.0 as usize)
}

/// The files that areas map, by [`Area::object`].
#[derive(Default)]
pub struct Memory {
    files: Mutex<Vec<File>>,
}

impl Cpu for Memory {
    fn get(&self, at: VirtAddr) -> u64 {
        assert!(at.is_aligned(8));
        // SAFETY: an aligned word that the behaviour has mapped and readable.
        unsafe { pointer(at).cast::<u64>().read_volatile() }
    }
    fn put(&self, at: VirtAddr, word: u64) {
        assert!(at.is_aligned(8));
        // SAFETY: an aligned word that the behaviour has mapped and writable.
        unsafe { pointer(at).cast::<u64>().write_volatile(word) }
    }
}

impl Memory {
    /// Maps `pages` pages of a kind, inaccessible ones around them: the kernel makes no one mapping of this and another.
    pub fn map(&self, kind: Kind, pages: u64) -> Result<Area, Skip> {
        let wanted = |what| move |error: rustix::io::Errno| Skip(format!("{what}: {error}"));
        let slack = if matches!(kind, Kind::Huge | Kind::Hugetlb) { HUGE } else { 0 };
        let room = (pages + 2) * PAGE_SIZE + slack;
        let none = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping where the kernel finds room.
        let start = unsafe {
            rustix::mm::mmap_anonymous(std::ptr::null_mut(), room as usize, ProtFlags::empty(), none)
        };
        let start = start.map_err(wanted("address space"))?.expose_provenance() as u64 + PAGE_SIZE;
        let start = if slack > 0 { start.next_multiple_of(HUGE) } else { start };
        let range = VirtRange::new(VirtAddr(start), pages * PAGE_SIZE).expect("user memory");
        let file = match kind {
            Kind::Anonymous | Kind::Huge => None,
            Kind::Shared => Some(memory_file(MemfdFlags::empty()).map_err(wanted("a memory file"))?),
            Kind::Hugetlb => Some(memory_file(MemfdFlags::HUGETLB).map_err(wanted("a file of huge pages"))?),
            Kind::File | Kind::PrivateFile => Some(disk_file()),
        };
        let flags = match kind {
            Kind::Anonymous | Kind::Huge | Kind::PrivateFile => MapFlags::PRIVATE,
            Kind::Shared | Kind::Hugetlb | Kind::File => MapFlags::SHARED,
        };
        if let Some(file) = &file {
            rustix::fs::ftruncate(file, range.len()).map_err(wanted("the file"))?;
        }
        place(range, flags, file.as_ref().map(File::as_fd)).map_err(wanted("memory of this kind"))?;
        if kind == Kind::Huge {
            // SAFETY: mapped just now; advice changes no byte.
            let advised = unsafe {
                rustix::mm::madvise(pointer(range.start()), range.len() as usize, Advice::LinuxHugepage)
            };
            advised.map_err(wanted("MADV_HUGEPAGE"))?;
        }
        let mut files = self.files.lock();
        files.extend(file);
        Ok(Area { range, object: files.len().wrapping_sub(1) })
    }

    pub fn with_file<R>(&self, area: &Area, use_it: impl FnOnce(&File) -> R) -> R {
        use_it(&self.files.lock()[area.object])
    }

    pub fn in_file(&self, area: &Area, page: u64) -> u64 {
        let mut word = [0; 8];
        self.with_file(area, |file| file.read_exact_at(&mut word, page * PAGE_SIZE))
            .expect("within the file");
        u64::from_ne_bytes(word)
    }

    pub fn truncate(&self, area: &Area, pages: u64) {
        self.with_file(area, |file| rustix::fs::ftruncate(file, pages * PAGE_SIZE)).expect("ftruncate");
    }
}

fn place(range: VirtRange, flags: MapFlags, file: Option<BorrowedFd<'_>>) -> rustix::io::Result<()> {
    let (at, len, flags) = (pointer(range.start()), range.len() as usize, flags | MapFlags::FIXED);
    match file {
        // SAFETY: the range is ours, and nobody has references to it.
        Some(file) => unsafe { rustix::mm::mmap(at, len, RW, flags, file, 0) },
        // SAFETY: as above.
        None => unsafe { rustix::mm::mmap_anonymous(at, len, RW, flags) },
    }
    .map(drop)
}

fn memory_file(flags: MemfdFlags) -> rustix::io::Result<File> {
    rustix::fs::memfd_create("anypage-conformance", flags | MemfdFlags::CLOEXEC).map(File::from)
}

fn disk_file() -> File {
    tempfile::tempfile().expect("a file in the temporary directory")
}

pub fn protect(range: VirtRange, to: Allow) {
    let flags = match to {
        Allow::Nothing => MprotectFlags::empty(),
        Allow::Read => MprotectFlags::READ,
        Allow::ReadWrite => MprotectFlags::READ | MprotectFlags::WRITE,
    };
    // SAFETY: ours, and nobody has references to it.
    unsafe { rustix::mm::mprotect(pointer(range.start()), range.len() as usize, flags) }.expect("mprotect");
}

pub fn unmap(range: VirtRange) {
    // SAFETY: ours, and nobody has references to it.
    unsafe { rustix::mm::munmap(pointer(range.start()), range.len() as usize) }.expect("munmap");
}

pub fn discard(range: VirtRange) {
    // SAFETY: ours, and nobody has references to it.
    unsafe { rustix::mm::madvise(pointer(range.start()), range.len() as usize, Advice::LinuxDontNeed) }
        .expect("MADV_DONTNEED");
}

pub fn replace(range: VirtRange) {
    place(range, MapFlags::PRIVATE, None).expect("mmap");
}

pub fn remap(from: VirtRange, to: VirtAddr) {
    let (at, len) = (pointer(from.start()), from.len() as usize);
    // SAFETY: both places are ours, and nobody has references to them.
    unsafe { rustix::mm::mremap_fixed(at, len, len, MremapFlags::MAYMOVE, pointer(to)) }.expect("mremap");
}

/// mremap where it is, to another length; whether there was room.
pub fn resize(range: VirtRange, len: u64) -> bool {
    let (at, old) = (pointer(range.start()), range.len() as usize);
    // SAFETY: ours, with nothing of anybody's behind it, or the kernel refuses; nobody has references to it.
    unsafe { rustix::mm::mremap(at, old, len as usize, MremapFlags::empty()) }.is_ok()
}

pub fn write_back(range: VirtRange) {
    // SAFETY: writes what is there to the file; changes no byte.
    unsafe { rustix::mm::msync(pointer(range.start()), range.len() as usize, rustix::mm::MsyncFlags::SYNC) }
        .expect("msync");
}

/// Runs `child` in a forked process, once `meanwhile` has run here; whether it said yes.
pub fn fork(child: impl FnOnce() -> bool, meanwhile: &mut dyn FnMut()) -> bool {
    let (mut wait, go) = std::io::pipe().expect("a pipe");
    // SAFETY: the child calls `child`, which neither allocates nor takes a lock of another thread, and leaves by _exit.
    match unsafe { libc::fork() } {
        0 => {
            drop(go);
            // Ends when the parent has closed its end.
            let _ = wait.read(&mut [0]);
            let code = i32::from(!child());
            // SAFETY: ends the child without running the parent's destructors.
            unsafe { libc::_exit(code) }
        }
        process => {
            assert!(process > 0, "fork failed");
            drop(wait);
            meanwhile();
            drop(go);
            let mut status = 0;
            // SAFETY: waits for our own child.
            assert_eq!(unsafe { libc::waitpid(process, &raw mut status, 0) }, process);
            libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0
        }
    }
}

/// A range that a behaviour has mapped, as what regions are made of.
pub fn vouched(world: &ProcessWorld, range: VirtRange) -> UserRange {
    // SAFETY: nobody makes a reference to the memory of a behaviour.
    unsafe { UserRange::from_raw(world.space(), range) }
}

/// A System V segment of `pages` pages, attached.
pub fn attach(pages: u64) -> Result<VirtRange, Skip> {
    // SAFETY: shmget takes integers.
    let id =
        unsafe { libc::shmget(libc::IPC_PRIVATE, (pages * PAGE_SIZE) as usize, libc::IPC_CREAT | 0o600) };
    if id < 0 {
        return Err(Skip(format!("no System V segment: {}", std::io::Error::last_os_error())));
    }
    // SAFETY: attaches where the kernel finds room.
    let at = unsafe { libc::shmat(id, std::ptr::null(), 0) };
    // SAFETY: marks it to go with its last attachment; the structure is not needed for that.
    unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) };
    assert_ne!(at.addr(), usize::MAX, "{}", std::io::Error::last_os_error());
    Ok(VirtRange::new(VirtAddr(at.expose_provenance() as u64), pages * PAGE_SIZE).expect("user memory"))
}

pub fn detach(segment: VirtRange) {
    // SAFETY: attached there, and nobody has references to it.
    assert_eq!(unsafe { libc::shmdt(pointer(segment.start())) }, 0);
}

/// Calls `work` with pages of this thread's stack.
pub fn on_the_stack(work: impl FnOnce(VirtRange)) {
    let mut room = std::mem::MaybeUninit::<[u8; 6 * PAGE_SIZE as usize]>::uninit();
    let start = (room.as_mut_ptr().expose_provenance() as u64).next_multiple_of(PAGE_SIZE);
    work(VirtRange::new(VirtAddr(start), 4 * PAGE_SIZE).expect("user memory"));
    std::hint::black_box(&mut room);
}

/// Calls `work` with pages in the middle of an allocation of `bytes`.
pub fn on_the_heap(bytes: usize, work: impl FnOnce(VirtRange)) {
    // SAFETY: any size may be asked for.
    let block = unsafe { libc::malloc(bytes) };
    assert!(!block.is_null());
    let start = (block.expose_provenance() as u64).next_multiple_of(PAGE_SIZE);
    let pages = (bytes as u64 - (start - block.addr() as u64)) / PAGE_SIZE;
    work(VirtRange::new(VirtAddr(start), pages * PAGE_SIZE).expect("user memory"));
    // SAFETY: allocated above, and nobody has references to it.
    unsafe { libc::free(block) };
}

/// Pages of the heap that brk(2) adds above what the allocator has; taken away again after `work`.
pub fn above_the_heap(pages: u64, work: impl FnOnce(VirtRange, &dyn Fn())) {
    let set = |end: u64| {
        // SAFETY: the allocator asks for the end anew before it takes more, and was given none of what is above its own.
        unsafe { libc::brk(std::ptr::with_exposed_provenance_mut(end as usize)) }
    };
    // So that the allocator, which finds its heap at another end than it left it, need not ask for more meanwhile.
    // SAFETY: takes integers; from now on the allocator keeps what it is given back.
    assert_eq!(unsafe { libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX) }, 1);
    drop((0..32).map(|_| vec![0_u8; 100 << 10]).collect::<Vec<_>>());
    // SAFETY: asks where the heap ends.
    let end = (unsafe { libc::sbrk(0) }.addr() as u64).next_multiple_of(PAGE_SIZE);
    assert_eq!(set(end + pages * PAGE_SIZE), 0);
    let range = VirtRange::new(VirtAddr(end), pages * PAGE_SIZE).expect("user memory");
    work(range, &|| assert_eq!(set(end), 0));
}

/// include/uapi/linux/fs.h `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct Scan {
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

/// Tells which pages of a range were written, as a program does that takes checkpoints of itself.
pub struct WriteTracker {
    range: VirtRange,
    pagemap: File,
    _userfault: OwnedFd,
}

impl WriteTracker {
    /// Puts `range` under asynchronous write protection.
    pub fn new(range: VirtRange) -> Result<Self, Skip> {
        const USER_MODE_ONLY: libc::c_int = 1;
        const API: libc::c_ulong = 0xc018_aa3f;
        const REGISTER: libc::c_ulong = 0xc020_aa00;
        /// UFFD_FEATURE_WP_HUGETLBFS_SHMEM, _WP_UNPOPULATED, _WP_ASYNC.
        const FEATURES: u64 = 1 << 12 | 1 << 13 | 1 << 15;
        const WRITE_PROTECT: u64 = 1 << 1;
        let refused = || Skip(format!("userfaultfd: {}", std::io::Error::last_os_error()));
        // SAFETY: takes an integer.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | USER_MODE_ONLY) };
        if fd < 0 {
            return Err(refused());
        }
        // SAFETY: opened just now, and nobody else's.
        let userfault = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        let mut api = [0xaa_u64, FEATURES, 0];
        // SAFETY: reads and writes one `struct uffdio_api` of three words.
        if unsafe { libc::ioctl(fd as i32, API, api.as_mut_ptr()) } != 0 {
            return Err(refused());
        }
        let mut register = [range.start().0, range.len(), WRITE_PROTECT, 0];
        // SAFETY: reads and writes one `struct uffdio_register` of four words; asynchronous protection changes no byte and
        // holds up nobody.
        if unsafe { libc::ioctl(fd as i32, REGISTER, register.as_mut_ptr()) } != 0 {
            return Err(refused());
        }
        let pagemap = File::open("/proc/self/pagemap").expect("pagemap");
        let tracker = Self { range, pagemap, _userfault: userfault };
        tracker.take();
        Ok(tracker)
    }

    /// Pages written since this was last asked.
    pub fn take(&self) -> Vec<u64> {
        const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
        /// PM_SCAN_WP_MATCHING, PM_SCAN_CHECK_WPASYNC.
        const PROTECT_AGAIN: u64 = 1 | 1 << 1;
        const WRITTEN: u64 = 1 << 1;
        let mut regions = [[0_u64; 3]; 64];
        let mut scan = Scan {
            size: size_of::<Scan>() as u64,
            flags: PROTECT_AGAIN,
            start: self.range.start().0,
            end: self.range.end().0,
            vec: regions.as_mut_ptr().expose_provenance() as u64,
            vec_len: regions.len() as u64,
            category_mask: WRITTEN,
            return_mask: WRITTEN,
            ..Scan::default()
        };
        // SAFETY: reads and writes one such structure, and writes as many regions of three words as it says there are.
        let found = unsafe { libc::ioctl(self.pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut scan) };
        assert!(found >= 0, "PAGEMAP_SCAN: {}", std::io::Error::last_os_error());
        let first = |at: u64| (at - self.range.start().0) / PAGE_SIZE;
        regions[..found as usize].iter().flat_map(|[start, end, _]| first(*start)..first(*end)).collect()
    }
}

/// Gives back what free memory the allocator keeps.
pub fn trim() {
    // SAFETY: touches only memory that nobody was given.
    unsafe { libc::malloc_trim(0) };
}
