//! Work requests: from the C structs, and from the calls that build them one by one.

use crate::abi::number::*;
use crate::errno::Errno;
use hw_model::addr::RegionAddr;
use hw_model::hca::{Destination, Operation, RequestId, SendRequest, Sge};
use hw_model::sync::{Condvar, Mutex, MutexGuard};
use std::ffi::c_uint;
use std::ops::Range;
use std::time::Duration;

/// A scatter-gather entry.
pub(crate) fn sge(addr: u64, length: u32, lkey: u32) -> Sge {
    Sge { key: hw_model::hca::Key(lkey), address: RegionAddr(addr), length }
}

/// A request with the words of `enum ibv_send_flags`.
pub(crate) fn request<'a>(
    id: u64,
    operation: Operation,
    flags: c_uint,
    (local, inline): (&'a [Sge], &'a [u8]),
) -> SendRequest<'a> {
    SendRequest {
        id: RequestId(id),
        operation,
        local,
        inline,
        destination: Destination::Connected,
        signaled: flags & IBV_SEND_SIGNALED != 0,
        fence: flags & IBV_SEND_FENCE != 0,
        solicited: flags & IBV_SEND_SOLICITED != 0,
    }
}

/// Requests that a program builds between `ibv_wr_start` and `ibv_wr_complete`: one thread at a time, others wait for the
/// end of it.
#[derive(Default)]
pub(crate) struct Building {
    state: Mutex<State>,
    free: Condvar,
}

#[derive(Default)]
struct State {
    busy: bool,
    batch: Batch,
}

/// What has been built.
#[derive(Default)]
pub(crate) struct Batch {
    built: Vec<Built>,
    sges: Vec<Sge>,
    inline: Vec<u8>,
    /// What was wrong first; nothing of the batch is posted then.
    wrong: Option<Errno>,
}

struct Built {
    id: u64,
    operation: Operation,
    flags: c_uint,
    destination: Destination,
    sges: Range<usize>,
    inline: Range<usize>,
}

impl Building {
    /// Begins a batch.
    pub(crate) fn start(&self) {
        let mut state = self.state.lock();
        while state.busy {
            // A wake that was missed costs a moment, not for ever.
            self.free.wait_for(&mut state, Duration::from_millis(100));
        }
        state.busy = true;
        state.batch.clear();
    }

    /// What is being built.
    pub(crate) fn batch(&self) -> impl std::ops::DerefMut<Target = Batch> + '_ {
        BatchGuard(self.state.lock())
    }

    /// Ends a batch, and has `post` look at it before the next begins.
    pub(crate) fn end<T>(&self, post: impl FnOnce(&Batch) -> T) -> T {
        let mut state = self.state.lock();
        let outcome = post(&state.batch);
        state.busy = false;
        drop(state);
        self.free.notify_one();
        outcome
    }
}

struct BatchGuard<'a>(MutexGuard<'a, State>);

impl std::ops::Deref for BatchGuard<'_> {
    type Target = Batch;
    fn deref(&self) -> &Batch {
        &self.0.batch
    }
}

impl std::ops::DerefMut for BatchGuard<'_> {
    fn deref_mut(&mut self) -> &mut Batch {
        &mut self.0.batch
    }
}

impl Batch {
    fn clear(&mut self) {
        self.built.clear();
        self.sges.clear();
        self.inline.clear();
        self.wrong = None;
    }

    /// Begins a request.
    pub(crate) fn begin(&mut self, id: u64, flags: c_uint, operation: Operation) {
        let (sges, inline) = (self.sges.len(), self.inline.len());
        let destination = Destination::Connected;
        self.built.push(Built {
            id,
            operation,
            flags,
            destination,
            sges: sges..sges,
            inline: inline..inline,
        });
    }

    /// Begins one that cannot be.
    pub(crate) fn fail(&mut self, errno: Errno) {
        self.wrong.get_or_insert(errno);
    }

    /// Sets the local memory of the request that was begun last.
    pub(crate) fn set_sges(&mut self, sges: impl Iterator<Item = Sge>) {
        let start = self.sges.len();
        self.sges.extend(sges);
        let end = self.sges.len();
        match self.built.last_mut() {
            Some(built) => built.sges = start..end,
            None => self.fail(Errno::INVAL),
        }
    }

    /// Adds data to carry inline with the request that was begun last.
    pub(crate) fn add_inline(&mut self, data: &[u8]) {
        self.inline.extend_from_slice(data);
        let end = self.inline.len();
        match self.built.last_mut() {
            Some(built) => built.inline.end = end,
            None => self.fail(Errno::INVAL),
        }
    }

    /// Sets to whom the request that was begun last goes.
    pub(crate) fn set_destination(&mut self, destination: Destination) {
        match self.built.last_mut() {
            Some(built) => built.destination = destination,
            None => self.fail(Errno::INVAL),
        }
    }

    /// The requests, unless one of them cannot be.
    pub(crate) fn requests(&self) -> Result<Vec<SendRequest<'_>>, Errno> {
        if let Some(wrong) = self.wrong {
            return Err(wrong);
        }
        let whole = |built: &Built| {
            let memory = (&self.sges[built.sges.clone()], &self.inline[built.inline.clone()]);
            let request = request(built.id, built.operation, built.flags, memory);
            request.with_destination(built.destination)
        };
        Ok(self.built.iter().map(whole).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_keeps_the_memory_of_each_request_apart() {
        let building = Building::default();
        building.start();
        {
            let mut batch = building.batch();
            batch.begin(1, IBV_SEND_SIGNALED, Operation::Send);
            batch.set_sges([sge(0x1000, 8, 7), sge(0x2000, 8, 7)].into_iter());
            batch.begin(2, IBV_SEND_FENCE, Operation::Send);
            batch.add_inline(b"ab");
            batch.add_inline(b"cd");
        }
        building.end(|batch| {
            let requests = batch.requests().expect("nothing is wrong");
            assert_eq!((requests[0].local.len(), requests[0].inline.len()), (2, 0));
            assert_eq!((requests[1].local.len(), requests[1].inline), (0, &b"abcd"[..]));
            assert!(requests[0].signaled && !requests[0].fence && !requests[1].signaled && requests[1].fence);
        });
    }

    #[test]
    fn a_wrong_request_spoils_its_batch_and_no_other() {
        let building = Building::default();
        building.start();
        building.batch().set_sges(std::iter::empty());
        assert_eq!(building.end(|batch| batch.requests().map(|requests| requests.len())), Err(Errno::INVAL));
        building.start();
        building.batch().begin(1, 0, Operation::Send);
        assert_eq!(building.end(|batch| batch.requests().map(|requests| requests.len())), Ok(1));
    }

    #[test]
    fn one_thread_builds_at_a_time() {
        let building = Building::default();
        hw_model::sync::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for id in 0..100 {
                        building.start();
                        building.batch().begin(id, 0, Operation::Send);
                        assert_eq!(
                            building.end(|batch| batch.requests().map(|requests| requests.len())),
                            Ok(1)
                        );
                    }
                });
            }
        });
    }
}
