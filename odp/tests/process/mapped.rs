//! User memory for the tests of the process space, and an interval owner that writes down what it is told.
//!
//! Unsafe island. Invariant: a [`Mapped`] owns the address range that it mapped, whatever parts of it are unmapped or
//! replaced later, and no reference to its bytes is ever made.
#![allow(unsafe_code)]

use hw_model::addr::{PAGE_SIZE, VirtAddr, VirtRange};
use hw_model::sync::atomic::{AtomicU64, Ordering};
use hw_model::sync::{Arc, Mutex};
use odp::notifier::{Notify, Raise};
use odp::page::PageRun;
use odp::space::process::{LentRange, Options, ProcessSpace};
use odp::space::{Access, AddressSpace, FaultError};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::MemfdFlags;
use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags};
use std::ffi::c_void;

pub const RW: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);

/// A mapping of our own.
pub struct Mapped {
    at: u64,
    pages: u64,
}

impl Mapped {
    pub fn map(
        pages: u64,
        protection: ProtFlags,
        flags: MapFlags,
        file: Option<BorrowedFd<'_>>,
    ) -> std::io::Result<Self> {
        // Inaccessible pages on both sides: the kernel must not make one mapping of this and another test's.
        let none = MapFlags::PRIVATE | MapFlags::NORESERVE;
        let whole = Self::len(pages + 2);
        // SAFETY: a new mapping where the kernel finds room.
        let at =
            unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), whole, ProtFlags::empty(), none) }?;
        let at = at.expose_provenance() as u64 + PAGE_SIZE;
        let mapped = Self { at, pages };
        let (pointer, flags) = (mapped.pointer(0), flags | MapFlags::FIXED);
        match file {
            // SAFETY: the range was reserved just above.
            Some(file) => unsafe { rustix::mm::mmap(pointer, Self::len(pages), protection, flags, file, 0) },
            // SAFETY: as above.
            None => unsafe { rustix::mm::mmap_anonymous(pointer, Self::len(pages), protection, flags) },
        }?;
        Ok(mapped)
    }

    pub fn anonymous(pages: u64) -> Self {
        Self::map(pages, RW, MapFlags::PRIVATE, None).expect("anonymous memory")
    }

    pub fn shared_file(pages: u64, file: impl AsFd) -> Self {
        Self::map(pages, RW, MapFlags::SHARED, Some(file.as_fd())).expect("a shared mapping")
    }

    /// `pages` anonymous pages whose first lies on a multiple of `align` bytes.
    pub fn aligned(pages: u64, align: u64) -> Self {
        let mut whole = Self::anonymous(pages + align / PAGE_SIZE);
        let before = (whole.at.next_multiple_of(align) - whole.at) / PAGE_SIZE;
        let (at, all) = (whole.at, whole.pages);
        whole.unmap(0, before);
        whole.unmap(before + pages, all - before - pages);
        whole.pages = 0;
        Self { at: at + before * PAGE_SIZE, pages }
    }

    pub fn range(&self) -> VirtRange {
        self.part(0, self.pages)
    }

    pub fn part(&self, page: u64, pages: u64) -> VirtRange {
        VirtRange::new(VirtAddr(self.at + page * PAGE_SIZE), pages * PAGE_SIZE).expect("user memory")
    }

    fn pointer(&self, page: u64) -> *mut c_void {
        std::ptr::with_exposed_provenance_mut((self.at + page * PAGE_SIZE) as usize)
    }

    fn len(pages: u64) -> usize {
        (pages * PAGE_SIZE) as usize
    }

    /// Writes one byte at the start of each of the pages.
    pub fn touch(&self, page: u64, pages: u64, byte: u8) {
        for page in page..page + pages {
            // SAFETY: mapped and writable, or the test is wrong.
            unsafe { self.pointer(page).cast::<u8>().write_volatile(byte) };
        }
    }

    /// The byte at the start of a page.
    pub fn byte(&self, page: u64) -> u8 {
        // SAFETY: mapped and readable, or the test is wrong.
        unsafe { self.pointer(page).cast::<u8>().read_volatile() }
    }

    pub fn advise(&self, page: u64, pages: u64, advice: Advice) -> rustix::io::Result<()> {
        // SAFETY: nobody has references to this memory.
        unsafe { rustix::mm::madvise(self.pointer(page), Self::len(pages), advice) }
    }

    pub fn drop_pages(&self, page: u64, pages: u64) {
        self.advise(page, pages, Advice::LinuxDontNeed).expect("MADV_DONTNEED");
    }

    pub fn protect(&self, page: u64, pages: u64, protection: MprotectFlags) {
        // SAFETY: nobody has references to this memory.
        unsafe { rustix::mm::mprotect(self.pointer(page), Self::len(pages), protection) }.expect("mprotect");
    }

    pub fn unmap(&self, page: u64, pages: u64) {
        if pages > 0 {
            // SAFETY: ours, and nobody has references to it.
            unsafe { rustix::mm::munmap(self.pointer(page), Self::len(pages)) }.expect("munmap");
        }
    }

    /// Puts fresh anonymous memory in the place of pages.
    pub fn replace(&self, page: u64, pages: u64) {
        self.replace_with(page, pages, RW);
    }

    /// The same with a protection. Without access it is as good as an unmap, except that no other thread's memory can
    /// come to lie there.
    pub fn replace_with(&self, page: u64, pages: u64, protection: ProtFlags) {
        let (flags, len) = (MapFlags::PRIVATE | MapFlags::FIXED, Self::len(pages));
        // SAFETY: ours, and nobody has references to it.
        unsafe { rustix::mm::mmap_anonymous(self.pointer(page), len, protection, flags) }.expect("mmap");
    }

    /// Puts pages of a file in the place of pages.
    pub fn replace_by(&self, page: u64, pages: u64, file: impl AsFd, offset: u64) {
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: ours, and nobody has references to it.
        unsafe { rustix::mm::mmap(self.pointer(page), Self::len(pages), RW, flags, file, offset) }
            .expect("mmap");
    }

    /// Lends pages to have other memory put in their place.
    pub fn lend(&self, page: u64, pages: u64) -> LentRange {
        // SAFETY: ours; whatever takes them is dropped before this is.
        unsafe { LentRange::new(self.part(page, pages)) }
    }

    /// Moves pages onto those of another mapping.
    pub fn move_to(&self, page: u64, pages: u64, other: &Self, to: u64) {
        let flags = rustix::mm::MremapFlags::MAYMOVE;
        // SAFETY: both ranges are ours, and nobody has references to them.
        unsafe {
            let len = Self::len(pages);
            rustix::mm::mremap_fixed(self.pointer(page), len, len, flags, other.pointer(to))
        }
        .expect("mremap");
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        self.unmap(0, self.pages);
    }
}

/// A System V segment of `pages` pages, attached; detached by the caller dropping the [`Mapped`] is munmap, which will do.
pub fn system_v(pages: u64) -> Option<Mapped> {
    // SAFETY: shmget takes integers.
    let id = unsafe { libc::shmget(libc::IPC_PRIVATE, Mapped::len(pages), libc::IPC_CREAT | 0o600) };
    if id < 0 {
        return None;
    }
    // SAFETY: attaches where the kernel finds room.
    let at = unsafe { libc::shmat(id, std::ptr::null(), 0) };
    // SAFETY: marks it to go with its last attachment; the structure is not needed for that.
    unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) };
    (at.addr() != usize::MAX).then(|| Mapped { at: at.expose_provenance() as u64, pages })
}

pub fn memory_file(pages: u64, flags: MemfdFlags) -> rustix::io::Result<OwnedFd> {
    let file = rustix::fs::memfd_create("anypage-test", flags | MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&file, pages * PAGE_SIZE)?;
    Ok(file)
}

/// A regular file of `pages` pages of `byte`, without a name.
pub fn disk_file(pages: u64, byte: u8) -> std::fs::File {
    let path = std::env::temp_dir().join(format!("anypage-{}-{:p}", std::process::id(), &raw const pages));
    std::fs::write(&path, vec![byte; Mapped::len(pages)]).expect("a file in the temporary directory");
    let file = std::fs::File::options().read(true).write(true).open(&path).expect("the file just made");
    std::fs::remove_file(&path).expect("the file just made");
    file
}

/// A space on the events rung, or poll: also where the exact rung is installed.
pub fn open_below_exact(options: Options) -> Arc<ProcessSpace> {
    ProcessSpace::open(options).expect("a process space")
}

/// What an owner was told of changes of owned memory. On the exact rung they are bracketed twice, by whoever makes them and
/// by the supervisor of the calls that they are made of.
pub fn once(told: Vec<Told>) -> Vec<Told> {
    let mut pairs: Vec<&[Told]> = told.chunks(2).collect();
    if crate::exact::installed().is_some() {
        pairs.dedup();
    }
    pairs.concat()
}

/// A space on the rung that the machine offers, with the switches given.
pub fn open(options: Options) -> Arc<ProcessSpace> {
    let options = Options { exact: crate::exact::installed(), ..options };
    ProcessSpace::open(options).expect("a process space")
}

pub fn fault(space: &ProcessSpace, range: VirtRange, access: Access) -> Result<Vec<PageRun>, FaultError> {
    let mut out = Vec::new();
    space.fault(range, access, &mut out).map(|()| out)
}

pub fn snapshot(space: &ProcessSpace, range: VirtRange) -> Vec<PageRun> {
    let mut out = Vec::new();
    space.snapshot(range, &mut out).expect("mapped");
    out
}

/// What an interval was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    Clear(VirtRange),
    Unlink(VirtRange),
}

/// Writes down what it is told, without allocating.
pub struct Recorder {
    told: Mutex<Vec<Told>>,
    pub calls: AtomicU64,
}

impl Recorder {
    pub fn new() -> Arc<Self> {
        Arc::new(Self { told: Mutex::new(Vec::with_capacity(1 << 16)), calls: AtomicU64::new(0) })
    }

    pub fn take(&self) -> Vec<Told> {
        let mut told = self.told.lock();
        let taken = told.clone();
        told.clear();
        taken
    }

    pub fn told_nothing(&self) -> bool {
        self.told.lock().is_empty()
    }

    fn push(&self, told: Told) {
        let mut list = self.told.lock();
        if list.len() < list.capacity() {
            list.push(told);
        }
        self.calls.fetch_add(1, Ordering::Relaxed);
    }
}

impl Notify for Recorder {
    fn clear(&self, range: VirtRange, raise: Raise<'_>) {
        raise.raise();
        self.push(Told::Clear(range));
    }

    fn unlink(&self, range: VirtRange) {
        self.push(Told::Unlink(range));
    }
}

/// Waits until `condition` holds; fails after a minute.
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while !condition() {
        assert!(std::time::Instant::now() < deadline, "never happened: {what}");
        std::thread::sleep(std::time::Duration::from_micros(200));
    }
}

/// Mappings of this process at the moment.
pub fn mapping_count() -> usize {
    std::fs::read_to_string("/proc/self/maps").expect("maps").lines().count()
}

/// Runs `work` in a forked child; its exit status, or `None` if it did not end within a minute. `work` must not allocate
/// much: other threads' locks are frozen in the child.
pub fn in_child(work: impl FnOnce() -> i32) -> Option<i32> {
    // SAFETY: the child runs `work`, which keeps to what the doc says, and leaves by _exit.
    match unsafe { libc::fork() } {
        0 => {
            let code = work();
            // SAFETY: ends the child without running the parent's destructors.
            unsafe { libc::_exit(code) }
        }
        child => {
            assert!(child > 0, "fork failed");
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
            loop {
                let mut status = 0;
                // SAFETY: waits for our own child.
                let ended = unsafe { libc::waitpid(child, &raw mut status, libc::WNOHANG) };
                if ended == child {
                    return Some(if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { -status });
                }
                if std::time::Instant::now() > deadline {
                    // SAFETY: our own child, not yet waited for.
                    unsafe { libc::kill(child, libc::SIGKILL) };
                    return None;
                }
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
        }
    }
}
