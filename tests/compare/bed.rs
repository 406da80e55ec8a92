//! One modelled device over plain memory, and the objects that a case of tests/lab/cases/cases.c begins with.

use hw_model::addr::{PAGE_SIZE, PhysAddr, RegionAddr, page_bytes};
use hw_model::bus::{DmaPort, RamMemory};
use hw_model::hca::{
    Access, Backing, CompletionQueue, CreateKeyError, Entry, Hca, HcaConfig, Key, KeySpec, PageList, Path,
    Pd, QpSpec, QueuePair, SendRequest, Status,
};
use hw_model::link::Fabric;
use hw_model::sync::Arc;
use std::time::Duration;

/// Bytes of a region.
pub const SIZE: u64 = 16384;

/// All rights that the cases give.
pub fn all() -> Access {
    Access::LOCAL_WRITE
        | Access::REMOTE_WRITE
        | Access::REMOTE_READ
        | Access::REMOTE_ATOMIC
        | Access::WINDOW_BIND
}

pub fn device() -> Arc<Hca> {
    let memory = RamMemory::new(2 * SIZE).expect("memory");
    let link = Box::new(Fabric::new().port());
    Hca::new(HcaConfig::default(), DmaPort::direct(memory), link).expect("a device")
}

pub struct Queue {
    pub qp: Arc<QueuePair>,
    pub cq: Arc<CompletionQueue>,
}

pub struct Bed {
    pub hca: Arc<Hca>,
    pub pd: Pd,
    pub local: Key,
    pub remote: Key,
    pub a: Queue,
    pub b: Queue,
}

/// A region over the `SIZE` bytes from `start`, whose addresses are those of the memory.
pub fn region(hca: &Hca, pd: Pd, start: u64, access: Access) -> Result<Key, CreateKeyError> {
    let pages = Arc::new(PageList::new(SIZE / PAGE_SIZE).expect("a list"));
    for page in 0..SIZE / PAGE_SIZE {
        let at = PhysAddr(start + page_bytes(page)).to_dma_identity();
        pages.store(page, Entry::present(at, Path::Direct, Backing::Anonymous, true));
    }
    let address = RegionAddr(start);
    hca.create_key(KeySpec { pd, access, address, length: SIZE, first_page_offset: 0, pages })
}

pub fn queue(hca: &Arc<Hca>, pd: Pd) -> Queue {
    let cq = hca.create_cq(64).expect("a queue");
    let qp = queue_pair(hca, pd, &cq);
    Queue { qp, cq }
}

pub fn queue_pair(hca: &Arc<Hca>, pd: Pd, cq: &Arc<CompletionQueue>) -> Arc<QueuePair> {
    let access = Access::REMOTE_WRITE | Access::REMOTE_READ | Access::REMOTE_ATOMIC;
    hca.create_qp(&QpSpec { access, ..QpSpec::new(pd, cq) }).expect("a queue pair")
}

pub fn connect(a: &Queue, b: &Queue) {
    a.qp.connect(b.qp.address()).expect("fresh");
    b.qp.connect(a.qp.address()).expect("fresh");
}

impl Bed {
    pub fn new(hca: &Arc<Hca>) -> Self {
        let pd = hca.alloc_pd().expect("a domain");
        let regions = [0, SIZE].map(|start| region(hca, pd, start, all()).expect("a region"));
        let (a, b) = (queue(hca, pd), queue(hca, pd));
        connect(&a, &b);
        Self { hca: Arc::clone(hca), pd, local: regions[0], remote: regions[1], a, b }
    }
}

impl Queue {
    /// How a request ends.
    pub fn run(&self, request: &SendRequest<'_>) -> &'static str {
        if self.qp.post_send(request).is_err() {
            return "not posted";
        }
        let mut ended = Vec::new();
        while self.cq.poll(&mut ended, 1).expect("no overrun") == 0 {
            if !self.cq.wait(Duration::from_secs(60)) {
                return "nothing";
            }
        }
        name(ended[0].status)
    }
}

/// As cases.c calls it.
pub fn name(status: Status) -> &'static str {
    match status {
        Status::Success => "success",
        Status::LocalLengthError => "local length error",
        Status::LocalQpOperationError => "local queue pair operation error",
        Status::LocalProtectionError => "local protection error",
        Status::FlushError => "flushed",
        Status::MemoryManagementError => "memory management error",
        Status::BadResponseError => "bad response",
        Status::LocalAccessError => "local access error",
        Status::RemoteInvalidRequestError => "remote invalid request",
        Status::RemoteAccessError => "remote access error",
        Status::RemoteOperationError => "remote operation error",
        Status::RetryExceeded => "retries exceeded",
        Status::RnrRetryExceeded => "RNR retries exceeded",
        Status::RemoteAbortedError => "another status",
    }
}
