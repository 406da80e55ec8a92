//! The thread that reads userfaultfd events and makes invalidations of them.
//!
//! Reading an event is what lets the application's call go on: for a removal (MADV_DONTNEED, MADV_REMOVE, MADV_FREE) the
//! page is still there before, and may be gone right after. So all DMA is stopped first (the epoch is closed and
//! drained), then events are read, then the invalidations run and the frames are retired, then DMA may begin again, and
//! finds the entries hidden. Unmaps and moves are reported after the fact: DMA in between meets whatever is mapped there
//! then, or nothing.
//!
//! An application's munmap waits until this thread has read its event. So this thread must never do what could wait for
//! itself: it does not allocate, free, map or unmap, takes no lock that is held while doing so, and calls only notifier
//! callbacks, which promise the same. If a callback panics the process is aborted: without this thread the application
//! would hang in its next munmap.
//!
//! A move (mremap) is two changes: what was at the old place is gone, and what is at the new place is not what was there.
//! The kernel keeps the registration of a moved mapping; that costs its owner an event now and then, and means nothing
//! here until somebody watches the new place.

use super::bell::Bell;
use super::fork::{Birth, NotInChildren};
use super::memory::ProcessMemory;
use super::sys;
use crate::notifier::{Event, Notifiers};
use hw_model::addr::{VirtAddr, VirtRange};
use hw_model::bus::{DmaEpoch, HostMemory};
use hw_model::sync::atomic::{AtomicU64, Ordering};
use hw_model::sync::{Arc, OnceLock, thread};
use rustix::event::{PollFd, PollFlags};
use rustix::fd::AsFd;
use rustix::io::Errno;

/// Name of the thread, as `top -H` and gdb show it.
const NAME: &str = "anypage-monitor";
/// Events read in one go.
const BATCH: usize = 64;
/// Bytes of one event (struct uffd_msg).
const MESSAGE: usize = 32;

/// What happened, by kind of event.
#[derive(Debug, Default)]
pub(super) struct Events {
    pub(super) removed: AtomicU64,
    pub(super) unmapped: AtomicU64,
    pub(super) moved: AtomicU64,
    pub(super) protected: AtomicU64,
    pub(super) suspected: AtomicU64,
}

impl Events {
    /// Events after which another mapping may be where one was.
    pub(super) fn mapping_changes(&self) -> u64 {
        self.unmapped.load(Ordering::Acquire) + self.moved.load(Ordering::Acquire)
    }
}

/// What the thread works on.
pub(super) struct Watched {
    pub(super) userfault: Option<Arc<NotInChildren>>,
    pub(super) bell: Arc<Bell>,
    pub(super) memory: Arc<ProcessMemory>,
    pub(super) notifiers: Arc<Notifiers>,
    pub(super) events: Arc<Events>,
}

/// The thread. Whoever starts it stops it.
pub(super) struct Monitor {
    bell: Arc<Bell>,
    thread: Option<thread::JoinHandle<()>>,
    birth: Birth,
}

impl Monitor {
    pub(super) fn start(watched: Watched) -> Result<Self, Errno> {
        let bell = Arc::clone(&watched.bell);
        let begun = Arc::new(OnceLock::new());
        let begin = Arc::clone(&begun);
        let thread = thread::Builder::new().name(NAME.into()).spawn(move || {
            // A signal handler of the application on this thread could free memory.
            sys::block_signals();
            let guard = AbortOnPanic;
            let _ = begin.set(());
            drop(begin);
            watched.run();
            drop(guard);
        });
        let thread = thread.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::AGAIN))?;
        // A thread maps and protects memory on its way up, which on the exact rung waits for the supervisor. That may wait
        // for this thread to read an event, once there is something registered.
        begun.wait();
        Ok(Self { bell, thread: Some(thread), birth: Birth::now() })
    }

    /// Has the thread deal with what has happened so far, and waits for its end.
    pub(super) fn stop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        if !self.birth.is_here() {
            // A forked child has no such thread, and shares the bell with the parent.
            std::mem::forget(thread);
            return;
        }
        self.bell.stop();
        // In a callback that dropped the space this is the thread itself; it cannot wait for its own end.
        if thread.thread().id() != std::thread::current().id() {
            let _ = thread.join();
        }
    }
}

/// A panic ends the process: whoever waits for this thread would wait for ever.
pub(super) struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}

impl Watched {
    fn run(&self) {
        loop {
            let stopping = self.bell.is_stopping();
            if !stopping {
                self.wait();
            }
            self.bell.silence();
            while self.read_events() {}
            self.look_into_suspects();
            if stopping {
                return;
            }
        }
    }

    fn wait(&self) {
        let bell = PollFd::new(self.bell.fd(), PollFlags::IN);
        // An error is EINTR, or memory for a poll table that the next round may get.
        let _ = match &self.userfault {
            Some(userfault) => {
                let events = PollFd::from_borrowed_fd(userfault.fd().as_fd(), PollFlags::IN);
                rustix::event::poll(&mut [events, bell], None)
            }
            None => rustix::event::poll(&mut [bell], None),
        };
    }

    /// Reads what events there are, up to a batch, and deals with them; whether there were any.
    fn read_events(&self) -> bool {
        let Some(userfault) = &self.userfault else { return false };
        if !is_readable(userfault) {
            return false;
        }
        let mut buffer = [0; BATCH * MESSAGE];
        let stopped = Stopped::new(self.memory.epoch());
        let read = rustix::io::read(userfault.fd(), &mut buffer).unwrap_or(0);
        for message in buffer[..read].as_chunks::<MESSAGE>().0 {
            self.deal_with(message);
        }
        drop(stopped);
        read > 0
    }

    fn deal_with(&self, message: &[u8; MESSAGE]) {
        const REMAP: u8 = 0x14;
        const REMOVE: u8 = 0x15;
        const UNMAP: u8 = 0x16;
        let (words, _) = message.as_chunks::<8>();
        let argument = |index: usize| u64::from_ne_bytes(words[1 + index]);
        let between = |start: u64, end: u64| VirtRange::new(VirtAddr(start), end.wrapping_sub(start));
        let (counter, first, second) = match message[0] {
            REMOVE => (&self.events.removed, between(argument(0), argument(1)), None),
            UNMAP => (&self.events.unmapped, between(argument(0), argument(1)), None),
            REMAP => {
                let place = |index| VirtRange::new(VirtAddr(argument(index)), argument(2));
                (&self.events.moved, place(0), place(1))
            }
            _ => return,
        };
        counter.fetch_add(1, Ordering::AcqRel);
        let event = if message[0] == REMOVE { Event::Clear } else { Event::Unmap };
        for range in [first, second].into_iter().flatten() {
            self.invalidate(range, event);
        }
    }

    fn look_into_suspects(&self) {
        self.bell.take_suspects(|page| {
            self.events.suspected.fetch_add(1, Ordering::Relaxed);
            self.invalidate(page, Event::Clear);
        });
    }

    fn invalidate(&self, range: VirtRange, event: Event) {
        self.notifiers.invalidate_event(range, event, || self.memory.generations.retire(range));
    }
}

fn is_readable(userfault: &NotInChildren) -> bool {
    let mut polled = [PollFd::new(userfault.fd(), PollFlags::IN)];
    let at_once = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut polled, Some(&at_once)).is_ok_and(|ready| ready > 0)
}

/// No DMA while this lives.
pub(super) struct Stopped<'a>(&'a DmaEpoch);

impl<'a> Stopped<'a> {
    pub(super) fn new(epoch: &'a DmaEpoch) -> Self {
        epoch.close();
        let stopped = Self(epoch);
        let mut drain = epoch.drain();
        let mut looks = 0u32;
        while !drain.poll(epoch) {
            looks += 1;
            match looks {
                0..128 => std::hint::spin_loop(),
                128..256 => thread::yield_now(),
                _ => thread::sleep(std::time::Duration::from_micros(20)),
            }
        }
        stopped
    }
}

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        self.0.open();
    }
}
