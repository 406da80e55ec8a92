//! What a case begins with: two pieces of memory, a region over each, and a connection between them.

use crate::bytes;
use crate::remapped::Remapped;
use crate::rig::{End, Pd, Queue, Rig};
use crate::talk::Tries;
use hw_model::addr::{PAGE_SIZE, RegionAddr};
use hw_model::hca::{Access, Key, Operation, Remote, SendRequest, Sge, Status};
use hw_model::sync::Arc;
use mr::{Mode, Region, RegisterOptions};
use odp::space::UserRange;

pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// Pages of each piece of memory.
pub const PAGES: u64 = 16;
/// Where the regions lie in them: from a page's start to inside a page. Memory goes on beyond both ends, so that only the
/// key stands in the way.
pub const FIRST: u64 = PAGE_SIZE;
pub const LEN: u64 = (PAGES - 2) * PAGE_SIZE - 64;

/// A one-sided operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    Write,
    Read,
}

/// Memory, and a region over a part of it.
pub struct Side {
    pub pd: Pd,
    pub memory: Arc<Remapped>,
    pub region: Arc<dyn Region>,
    seed: u8,
}

pub fn everything() -> Access {
    Access::LOCAL_WRITE | Access::REMOTE_WRITE | Access::REMOTE_READ | Access::REMOTE_ATOMIC
}

impl Side {
    fn new(rig: &Rig, end: End, options: RegisterOptions, seed: u8) -> Result<Self, Error> {
        let pd = rig.domain(end)?;
        let memory = Remapped::new(PAGES);
        bytes::write(memory.range().start().0, &bytes::pattern(seed, memory.range().len() as usize))?;
        let region = pd.register(&Self::part(rig, &memory), options)?;
        Ok(Self { pd, memory, region, seed })
    }

    fn part(rig: &Rig, memory: &Arc<Remapped>) -> UserRange {
        memory.user_range(Arc::clone(&rig.space) as _).part(FIRST, LEN).expect("inside the memory")
    }

    /// Registers the same memory once more.
    pub fn another(&self, rig: &Rig, pd: &Pd, options: RegisterOptions) -> Result<Arc<dyn Region>, Error> {
        pd.register(&Self::part(rig, &self.memory), options)
    }

    /// Virtual address of byte `offset` of the region; it may lie outside.
    pub fn at(&self, offset: i64) -> u64 {
        (self.memory.range().start().0 + FIRST).wrapping_add_signed(offset)
    }

    pub fn read(&self, offset: i64, len: u64) -> Result<Vec<u8>, Error> {
        Ok(bytes::read(self.at(offset), len as usize)?)
    }

    /// What is there before anything happened.
    pub fn original(&self, offset: i64, len: u64) -> Vec<u8> {
        let start = (FIRST as i64 + offset) as usize;
        bytes::pattern(self.seed, (PAGES * PAGE_SIZE) as usize)[start..start + len as usize].to_vec()
    }
}

pub struct World {
    pub local: Side,
    pub remote: Side,
    /// The other end, which answers as long as it is there.
    pub responder: Queue,
    pub requester: Queue,
}

/// What is asked for: how many bytes from where to where, by which keys.
#[derive(Clone, Copy)]
pub struct Transfer {
    pub what: What,
    pub local: i64,
    pub remote: i64,
    pub len: u64,
    pub local_key: Key,
    pub remote_key: Key,
    /// What the peer calls the first byte of the region.
    pub base: u64,
}

impl World {
    pub fn new(rig: &Rig, mode: Mode) -> Result<Self, Error> {
        let options = RegisterOptions { access: everything(), mode, ..RegisterOptions::on_demand() };
        Self::with(rig, options, options)
    }

    /// With regions of their own options: the remote one's first.
    pub fn with(rig: &Rig, remote: RegisterOptions, local: RegisterOptions) -> Result<Self, Error> {
        let remote = Side::new(rig, End::Responder, remote, 0x20)?;
        let local = Side::new(rig, End::Requester, local, 0x90)?;
        let (responder, requester) = rig.pair(&remote.pd, &local.pd)?;
        Ok(Self { local, remote, responder, requester })
    }

    /// With a connection on its own terms.
    pub fn on(rig: &Rig, mode: Mode, tries: Tries) -> Result<Self, Error> {
        let (remote, local) = Self::sides(rig, mode)?;
        let responder = rig.queue(End::Responder, &remote.pd)?;
        let requester = rig.queue(End::Requester, &local.pd)?;
        Self::connected(rig, (remote, responder), (local, requester), tries)
    }

    /// Remote and local memory, with a region each that allows everything.
    pub fn sides(rig: &Rig, mode: Mode) -> Result<(Side, Side), Error> {
        let options = RegisterOptions { access: everything(), mode, ..RegisterOptions::on_demand() };
        Ok((Side::new(rig, End::Responder, options, 0x20)?, Side::new(rig, End::Requester, options, 0x90)?))
    }

    /// Of queue pairs that were made elsewhere.
    pub fn connected(
        rig: &Rig,
        (remote, responder): (Side, Queue),
        (local, requester): (Side, Queue),
        tries: Tries,
    ) -> Result<Self, Error> {
        rig.connect(End::Responder, &responder, &requester, tries)?;
        rig.connect(End::Requester, &requester, &responder, tries)?;
        Ok(Self { local, remote, responder, requester })
    }

    pub fn transfer(&self, what: What, offset: i64, len: u64) -> Transfer {
        Transfer {
            what,
            local: offset,
            remote: offset,
            len,
            local_key: self.local.region.key(),
            remote_key: self.remote.region.key(),
            base: self.remote.region.address().0,
        }
    }

    /// Posts it.
    pub fn post(&self, id: u64, transfer: Transfer) -> Result<(), Error> {
        let Transfer { what, local, remote, len, local_key, remote_key, base } = transfer;
        let piece = [Sge { key: local_key, address: RegionAddr(self.local.at(local)), length: len as u32 }];
        let pieces = if len == 0 { &piece[..0] } else { &piece };
        let remote = Remote { key: remote_key, address: RegionAddr(base.wrapping_add_signed(remote)) };
        let operation = match what {
            What::Write => Operation::Write(remote),
            What::Read => Operation::Read(remote),
        };
        self.requester.post(&SendRequest::new(id, operation, pieces))
    }

    pub fn ends(&self, transfer: Transfer) -> Result<Status, Error> {
        self.post(1, transfer)?;
        Ok(self.requester.completion()?.status)
    }

    /// Carries it out, and says how it ended and what became of the bytes that it was to change: `source` is what should have
    /// come there.
    pub fn runs(&self, transfer: Transfer, source: &[u8]) -> Result<String, Error> {
        let status = self.ends(transfer)?;
        Ok(format!("{status:?}, {}", self.became(transfer, source)?))
    }

    pub fn became(&self, transfer: Transfer, source: &[u8]) -> Result<&'static str, Error> {
        let (side, offset) = match transfer.what {
            What::Write => (&self.remote, transfer.remote),
            What::Read => (&self.local, transfer.local),
        };
        let len = transfer.len;
        let around =
            |offset: i64| -> Result<bool, Error> { Ok(side.read(offset, 8)? == side.original(offset, 8)) };
        let now = side.read(offset, len)?;
        let outside = around(offset - 8)? && around(offset + len as i64)?;
        Ok(match (now == source, now == side.original(offset, len), outside) {
            (_, _, false) => "bytes around it changed",
            (true, _, true) => "bytes moved",
            (false, true, true) => "bytes as before",
            (false, false, true) => "other bytes",
        })
    }

    /// What a transfer is to bring, nothing having changed since the beginning.
    pub fn source(&self, transfer: Transfer) -> Vec<u8> {
        match transfer.what {
            What::Write => self.local.original(transfer.local, transfer.len),
            What::Read => self.remote.original(transfer.remote, transfer.len),
        }
    }
}
