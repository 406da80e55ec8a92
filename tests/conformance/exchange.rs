//! One message: what is sent into which receive, and what both ends say of it.

use crate::bytes;
use crate::world::{Error, PAGES, Side, World};
use hw_model::addr::{PAGE_SIZE, RegionAddr};
use hw_model::hca::{Attached, Completion, Operation, RecvRequest, SendRequest, Sge, Status};
use rustix::mm::MprotectFlags;

/// Pieces of a region: offset and bytes of each.
pub type Pieces<'a> = &'a [(i64, u32)];

/// Names of the requests.
const SENT: u64 = 1;
const RECEIVED: u64 = 7;

#[derive(Clone, Copy)]
pub struct Exchange<'a> {
    pub operation: Operation,
    pub from: Pieces<'a>,
    /// The bytes are taken as the request is posted, and what is there is overwritten at once.
    pub inline: bool,
    /// The receive, posted before; none where there is none.
    pub into: Option<Pieces<'a>>,
    /// What happens when the receive is posted and the send is not.
    pub change: &'a dyn Fn(&World),
}

impl<'a> Exchange<'a> {
    pub fn new(operation: Operation, from: Pieces<'a>, into: Pieces<'a>) -> Self {
        Self { operation, from, inline: false, into: Some(into), change: &|_| {} }
    }

    /// Carries it out: how the send ended, how the receive did, and what became of the receiver's memory, to its last byte.
    pub fn runs(&self, world: &World) -> Result<String, Error> {
        if let Some(into) = self.into {
            world.responder.post_recv(&RecvRequest::new(RECEIVED, &world.remote.pieces(into)))?;
        }
        let earlier = whole(&world.remote)?;
        let (original, _) = (whole(&world.local)?, (self.change)(world));
        // What may not be looked at has not changed.
        let before = whole(&world.remote).unwrap_or(earlier);
        let message = gather(&whole(&world.local).unwrap_or(original), self.from);
        let pieces = world.local.pieces(self.from);
        let request = SendRequest::new(SENT, self.operation, if self.inline { &[] } else { &pieces });
        let request = if self.inline { request.with_inline(&message) } else { request };
        if world.requester.post(&request).is_err() {
            return Ok("not posted".to_owned());
        }
        if self.inline {
            for (offset, len) in self.from {
                bytes::write(world.local.at(*offset), &vec![0; *len as usize])?;
            }
        }
        let sent = world.requester.completion()?;
        let mut said = format!("{:?}", sent.status);
        if self.into.is_some() {
            if sent.status != Status::Success {
                // What has not been taken by now never will be.
                world.responder.fail()?;
            }
            said += &format!("; {}", told(&world.responder.completion()?));
        }
        Ok(format!("{said}, {}", self.placed(world, &before, &message)?))
    }

    fn placed(&self, world: &World, before: &[u8], message: &[u8]) -> Result<&'static str, Error> {
        world.remote.memory.protect(0, PAGES, MprotectFlags::READ | MprotectFlags::WRITE);
        let now = whole(&world.remote)?;
        let wanted = scatter(before, self.into.unwrap_or_default(), message);
        Ok(match (now == wanted, now == before) {
            (_, true) => "bytes as before",
            (true, false) => "bytes as sent",
            (false, false) => "other bytes",
        })
    }
}

/// What a receive ended with.
pub fn told(received: &Completion) -> String {
    if received.status != Status::Success {
        return format!("receive {:?}", received.status);
    }
    let beside = match received.attached {
        Attached::Nothing => String::new(),
        Attached::Immediate(data) => format!(" and {:#x}", data.0),
        Attached::Invalidated(_) => " and a key that is invalid now".to_owned(),
    };
    let named = if received.id.0 == RECEIVED { "" } else { " of another name" };
    format!("{:?}{named} of {} bytes{beside}", received.operation, received.bytes)
}

impl Side {
    /// A list of pieces by this side's own key.
    pub fn pieces(&self, pieces: Pieces<'_>) -> Vec<Sge> {
        let base = self.region.address().0;
        let piece = |(offset, length): &(i64, u32)| Sge {
            key: self.region.key(),
            address: RegionAddr(base.wrapping_add_signed(*offset)),
            length: *length,
        };
        pieces.iter().map(piece).collect()
    }
}

/// All memory of a side.
pub fn whole(side: &Side) -> Result<Vec<u8>, Error> {
    Ok(bytes::read(side.memory.range().start().0, (PAGES * PAGE_SIZE) as usize)?)
}

/// Where in all memory an offset of the region lies.
pub fn place(offset: i64) -> usize {
    (crate::world::FIRST as i64 + offset) as usize
}

fn gather(memory: &[u8], pieces: Pieces<'_>) -> Vec<u8> {
    let piece = |(offset, len): &(i64, u32)| memory[place(*offset)..].iter().copied().take(*len as usize);
    pieces.iter().flat_map(piece).collect()
}

fn scatter(memory: &[u8], pieces: Pieces<'_>, mut message: &[u8]) -> Vec<u8> {
    let mut after = memory.to_vec();
    for (offset, len) in pieces {
        let (here, rest) = message.split_at(message.len().min(*len as usize));
        after[place(*offset)..][..here.len()].copy_from_slice(here);
        message = rest;
    }
    after
}
