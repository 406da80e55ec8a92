//! One transfer, or one piece of memory that a peer may use: prepared, posted, ended.

use super::endpoint::RwEndpoint;
use super::plan::{Piece, messages};
use super::pool::PooledKey;
use crate::dma::batch::Batch;
use crate::dma::page_size::DmaRange;
use hw_model::addr::{DmaAddr, RegionAddr};
use hw_model::hca::{Access, Operation, PostError, QueuePair, Remote, SendRequest, Sge};
use hw_model::sync::{Arc, thread};

/// Which way a transfer goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// RDMA read: the peer's memory to ours.
    Read,
    /// RDMA write: ours to the peer's.
    Write,
}

/// What a prepared transfer uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct RwCost {
    /// Ranges that the memory is to the device.
    pub ranges: usize,
    /// Regions of the pool.
    pub regions: usize,
    /// Work requests of a transfer: data, and two for each region.
    pub requests: usize,
    /// Entries that the device reads: of page lists, of indirect lists, or of scatter-gather lists.
    pub entries: u64,
}

/// Requests were refused. Those before them were posted: the queue pair must be given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{posted} of {all} requests were posted: {error}")]
pub struct RwPostError {
    /// Requests that were posted.
    pub posted: usize,
    /// Requests there were.
    pub all: usize,
    /// Why the next one was not.
    pub error: PostError,
}

/// A prepared transfer, or memory prepared for a peer.
///
/// After all that was posted has ended well, [`RwContext::finish`] gives regions and mapping back. A context that is
/// dropped after something was posted takes it that requests failed: the queue pair must be in error or gone; the regions
/// are replaced, and the memory is unmapped when no burst is under way any more, which is waited for.
pub struct RwContext {
    endpoint: Arc<RwEndpoint>,
    batch: Batch,
    regions: Vec<(PooledKey, Piece)>,
    /// Something was posted, and it is not known that it has ended well.
    posted: bool,
    /// Peers may be in the memory although all that was posted here has ended.
    exposed: bool,
}

impl RwContext {
    pub(super) fn new(endpoint: Arc<RwEndpoint>, batch: Batch, regions: Vec<(PooledKey, Piece)>) -> Self {
        Self { endpoint, batch, regions, posted: false, exposed: false }
    }

    /// Bytes mapped.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.batch.bytes()
    }

    /// What a transfer of it uses.
    #[must_use]
    pub fn cost(&self) -> RwCost {
        let messages = self.messages();
        let entries = match self.regions.is_empty() {
            true => messages.iter().map(|sges| sges.len() as u64).sum(),
            false => self.regions.iter().map(|(_, piece)| piece.entries()).sum(),
        };
        RwCost {
            ranges: self.batch.ranges().len(),
            regions: self.regions.len(),
            requests: messages.len() + 2 * self.regions.len(),
            entries,
        }
    }

    /// The scatter-gather lists of the transfer, one a message.
    fn messages(&self) -> Vec<Vec<Sge>> {
        let (sges, most) = (self.endpoint.config().max_sges as usize, self.endpoint.message_bytes());
        let by = |key, messages: Vec<Vec<DmaRange>>| {
            let sge = move |range: DmaRange| Sge {
                key,
                address: RegionAddr(range.dma.0),
                length: range.len as u32,
            };
            messages.into_iter().map(move |message| message.into_iter().map(sge).collect())
        };
        if self.regions.is_empty() {
            return by(self.endpoint.bus_key(), messages(self.batch.dma_ranges(), sges, most)).collect();
        }
        let of_region = |(key, piece): &(PooledKey, Piece)| {
            // The addresses of a region are offsets in the whole.
            let whole = DmaRange { dma: DmaAddr(piece.at), len: piece.len };
            by(key.name, messages([whole], sges, most))
        };
        self.regions.iter().flat_map(of_region).collect()
    }

    /// Posts the transfer between the memory and `remote` on `qp`, all of it with one doorbell. Every request is named `id`;
    /// the last is signaled, and its success is the transfer's. If one fails, it and those after it complete.
    ///
    /// # Errors
    /// [`RwPostError`].
    pub fn post(&mut self, qp: &QueuePair, id: u64, remote: Remote, way: Way) -> Result<(), RwPostError> {
        let messages = self.messages();
        let mut requests = Vec::with_capacity(messages.len() + 2 * self.regions.len());
        requests.extend(self.registers(id, Access::LOCAL_WRITE));
        let mut address = remote.address;
        for sges in &messages {
            let remote = Remote { address, ..remote };
            let operation = match way {
                Way::Read => Operation::Read(remote),
                Way::Write => Operation::Write(remote),
            };
            requests.push(quiet(id, operation, sges));
            address = address.offset(sges.iter().map(|sge| u64::from(sge.length)).sum());
        }
        requests.extend(self.invalidates(id));
        let posted = post(qp, &mut requests);
        self.is_posted(true);
        posted
    }

    /// Posts what gives a peer `access` to the memory, all named `id`, the last signaled. Where the memory is then, is for
    /// [`RwContext::remotes`] to say.
    ///
    /// # Errors
    /// [`RwPostError`].
    pub fn post_grant(&mut self, qp: &QueuePair, id: u64, access: Access) -> Result<(), RwPostError> {
        let posted = post(qp, &mut self.registers(id, access).collect::<Vec<_>>());
        self.is_posted(true);
        self.exposed = true;
        posted
    }

    /// Posts what takes the access back, all named `id`, the last signaled.
    ///
    /// # Errors
    /// [`RwPostError`].
    pub fn post_revoke(&mut self, qp: &QueuePair, id: u64) -> Result<(), RwPostError> {
        post(qp, &mut self.invalidates(id).collect::<Vec<_>>())
    }

    /// Where a peer finds the memory that was granted: the pieces in order, with their bytes. One, if pages of one size or
    /// an indirect list could say it.
    pub fn remotes(&self) -> impl Iterator<Item = (Remote, u64)> {
        self.regions
            .iter()
            .map(|(key, piece)| (Remote { key: key.name, address: RegionAddr(piece.at) }, piece.len))
    }

    fn registers<'a>(&self, id: u64, access: Access) -> impl Iterator<Item = SendRequest<'a>> + use<'_, 'a> {
        let operation = move |key| Operation::Register { key, access };
        self.regions.iter().map(move |(key, _)| quiet(id, operation(key.name), &[]))
    }

    fn invalidates<'a>(&self, id: u64) -> impl Iterator<Item = SendRequest<'a>> + use<'_, 'a> {
        self.regions.iter().map(move |(key, _)| quiet(id, Operation::Invalidate { key: key.name }, &[]))
    }

    /// All that was posted has ended well, the invalidations too: gives everything back.
    pub fn finish(mut self) {
        self.is_posted(false);
    }

    fn is_posted(&mut self, posted: bool) {
        self.posted = posted;
        self.regions.iter_mut().for_each(|(key, _)| key.used = posted);
    }
}

impl Drop for RwContext {
    fn drop(&mut self) {
        self.regions.clear();
        // No key leads to the memory any more; bursts that were under way may still be in it.
        if (self.posted || self.exposed)
            && let Some(port) = self.endpoint.dma().port()
        {
            let mut drain = port.epoch().drain();
            while !drain.poll(port.epoch()) {
                thread::yield_now();
            }
        }
    }
}

fn quiet<'a>(id: u64, operation: Operation, local: &'a [Sge]) -> SendRequest<'a> {
    SendRequest { signaled: false, ..SendRequest::new(id, operation, local) }
}

fn post(qp: &QueuePair, requests: &mut [SendRequest<'_>]) -> Result<(), RwPostError> {
    if let Some(last) = requests.last_mut() {
        last.signaled = true;
    }
    qp.post_send_list(requests).map_err(|(posted, error)| RwPostError { posted, all: requests.len(), error })
}
