//! RDMA between two regions over one connection: requests in flight up to a window, every completion accounted for.

use hw_model::hca::{Completion, Overrun, PostError, Remote, SendRequest, Sge, Status};
use hw_model::sync::Arc;
use mr::{CompletionQueue, QueuePair, Region};
use std::time::Duration;

/// Requests in flight.
const WINDOW: usize = 16;
/// A completion that takes longer than this never comes.
const PATIENCE: Duration = Duration::from_secs(30);

/// One end of a connection, moving data between its own region and the peer's, at the same offset in both.
pub struct Mover {
    /// The queue pair that posts.
    pub qp: Arc<dyn QueuePair>,
    /// Where it completes.
    pub cq: Arc<dyn CompletionQueue>,
    /// Its own region.
    pub local: Arc<dyn Region>,
    /// The peer's region.
    pub remote: Arc<dyn Region>,
}

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the own region to the peer's.
    Write,
    /// From the peer's region to the own.
    Read,
}

/// What went wrong with a transfer.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// The queue pair took no more requests.
    #[error("posting failed")]
    Post(#[from] PostError),
    /// Completions were lost.
    #[error("the completion queue overran")]
    Overrun(#[from] Overrun),
    /// A request failed.
    #[error("request {id} completed with {status:?}")]
    Completed {
        /// Its number, in the order of posting.
        id: u64,
        /// How it ended.
        status: Status,
    },
    /// A request never ended.
    #[error("{outstanding} requests have not ended after {} s", PATIENCE.as_secs())]
    Lost {
        /// How many.
        outstanding: usize,
    },
}

impl Mover {
    /// Moves every `(offset, length)` of `chunks` and waits for all of them; `done` is told the bytes of each.
    pub fn transfer(
        &self,
        direction: Direction,
        chunks: &[(u64, u32)],
        mut done: impl FnMut(u64),
    ) -> Result<(), TransferError> {
        let mut outstanding = 0;
        let mut completions = Vec::with_capacity(WINDOW);
        for (id, &(offset, length)) in chunks.iter().enumerate() {
            if outstanding == WINDOW {
                outstanding -= self.reap(&mut completions, outstanding, &mut done)?;
            }
            let local = [Sge { key: self.local.key(), address: self.local.address().offset(offset), length }];
            let remote = Remote { key: self.remote.key(), address: self.remote.address().offset(offset) };
            let request = match direction {
                Direction::Write => SendRequest::write(id as u64, &local, remote),
                Direction::Read => SendRequest::read(id as u64, &local, remote),
            };
            self.qp.post_send(&request)?;
            outstanding += 1;
        }
        while outstanding > 0 {
            outstanding -= self.reap(&mut completions, outstanding, &mut done)?;
        }
        Ok(())
    }

    /// Takes the completions that are there, waiting for one; gives how many.
    fn reap(
        &self,
        completions: &mut Vec<Completion>,
        outstanding: usize,
        done: &mut impl FnMut(u64),
    ) -> Result<usize, TransferError> {
        completions.clear();
        while self.cq.poll(completions, outstanding)? == 0 {
            if !self.cq.wait(PATIENCE) {
                return Err(TransferError::Lost { outstanding });
            }
        }
        for completion in completions.iter() {
            if completion.status != Status::Success {
                return Err(TransferError::Completed { id: completion.id.0, status: completion.status });
            }
            done(u64::from(completion.bytes));
        }
        Ok(completions.len())
    }
}
