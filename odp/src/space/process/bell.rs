//! How the rest of the space speaks to the monitor thread: an eventfd, a flag to stop, and pages to look into.

use hw_model::addr::{VirtAddr, VirtRange};
use hw_model::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use rustix::event::EventfdFlags;
use rustix::fd::OwnedFd;
use rustix::io::Errno;

/// Pages that can wait to be looked into. One more is dropped: its user meets it again.
const MAX_SUSPECTS: usize = 64;
const NONE: u64 = u64::MAX;

/// Rung by engines and by whoever drops the space; waited on by the monitor. Ringing neither blocks nor allocates.
#[derive(Debug)]
pub(super) struct Bell {
    fd: OwnedFd,
    stop: AtomicBool,
    suspects: [AtomicU64; MAX_SUSPECTS],
}

impl Bell {
    pub(super) fn new() -> Result<Self, Errno> {
        let fd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let suspects = [const { AtomicU64::new(NONE) }; MAX_SUSPECTS];
        Ok(Self { fd, stop: AtomicBool::new(false), suspects })
    }

    pub(super) fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.ring();
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// The page that holds `at` is not what its frame was reported as.
    pub(super) fn suspect(&self, at: VirtAddr) {
        let page = at.page_number();
        for slot in &self.suspects {
            match slot.compare_exchange(NONE, page, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => break,
                Err(other) if other == page => break,
                Err(_) => {}
            }
        }
        self.ring();
    }

    /// Hands each suspected page to `each`, once.
    pub(super) fn take_suspects(&self, mut each: impl FnMut(VirtRange)) {
        for slot in &self.suspects {
            let page = slot.swap(NONE, Ordering::AcqRel);
            if page != NONE {
                let at = VirtAddr::from_page_number(page);
                each(VirtRange::new(at, hw_model::addr::PAGE_SIZE).expect("a page of user memory"));
            }
        }
    }

    /// Silences the bell. What was rung for before is to be looked at after.
    pub(super) fn silence(&self) {
        let mut count = [0; 8];
        // Nothing to read means that it was silent.
        let _ = rustix::io::read(&self.fd, &mut count);
    }

    fn ring(&self) {
        // Full means that it is ringing.
        let _ = rustix::io::write(&self.fd, &1_u64.to_ne_bytes());
    }
}
