//! One program on one device.

use crate::bytes;
use crate::program::{KeyOf, May, Operation, PAGES, Place, SLOTS, Side, Step};
use crate::remapped::Remapped;
use crate::rig::{End, Pd, Queue, Rig};
use hw_model::addr::{PAGE_SIZE, RegionAddr};
use hw_model::hca::{Key, Operation as Posted, RecvRequest, Remote, SendRequest, Sge, Status};
use hw_model::sync::Arc;
use mr::{Mode, Region, RegisterOptions};
use rustix::mm::MprotectFlags;

pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// What a step came to, in words that mean the same on every device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub said: String,
    /// The bytes that it was to change, as they are now.
    pub bytes: Vec<u8>,
}

struct Own {
    pd: Pd,
    memory: Arc<Remapped>,
    regions: [Option<Held>; SLOTS],
    given_back: Option<Key>,
}

/// A region, and what the table of differences asks of one.
pub struct Held {
    region: Arc<dyn Region>,
    start: u64,
    pub mode: Mode,
    renamed: bool,
    /// Pages of it went since it was registered.
    pub changed: bool,
}

pub struct Player<'a> {
    rig: &'a Rig,
    own: [Own; 2],
    /// Responder and requester; new ones after a request that failed.
    queues: Option<(Queue, Queue)>,
}

impl<'a> Player<'a> {
    pub fn new(rig: &'a Rig) -> Result<Self, Error> {
        let own = |end, seed| -> Result<Own, Error> {
            let memory = Remapped::new(PAGES);
            bytes::write(memory.range().start().0, &bytes::pattern(seed, memory.range().len() as usize))?;
            Ok(Own { pd: rig.domain(end)?, memory, regions: Default::default(), given_back: None })
        };
        let own = [own(End::Requester, 0x90)?, own(End::Responder, 0x20)?];
        Ok(Self { rig, own, queues: None })
    }

    /// All of the memory of both ends, which the program may touch from now on.
    pub fn memory(&self) -> Result<Vec<u8>, Error> {
        let mut all = Vec::new();
        for own in &self.own {
            own.memory.protect(0, PAGES, flags(May::Write));
            all.extend(bytes::read(own.memory.range().start().0, own.memory.range().len() as usize)?);
        }
        Ok(all)
    }

    /// The region of a slot.
    pub fn held(&self, side: Side, slot: usize) -> Option<&Held> {
        self.own[side as usize].regions[slot].as_ref()
    }

    /// Where in its memory an offset of a region of a slot lies.
    pub fn in_memory(&self, side: Side, place: Place) -> Option<i64> {
        Some(self.held(side, place.slot)?.start as i64 + place.offset)
    }

    /// Whether a place is where an atomic may be, by the address that its region goes by.
    pub fn is_aligned(&self, side: Side, place: Place) -> bool {
        self.held(side, place.slot)
            .is_some_and(|held| held.region.address().0.wrapping_add_signed(place.offset).is_multiple_of(8))
    }

    pub fn step(&mut self, step: &Step) -> Result<Outcome, Error> {
        let nothing = |said: &str| Ok(Outcome { said: said.to_owned(), bytes: Vec::new() });
        match step {
            Step::Register { side, slot, mode, access, start, len, address } => {
                self.give_back(*side, *slot);
                let own = &mut self.own[*side as usize];
                let part = own.memory.user_range(Arc::clone(&self.rig.space) as _).part(*start, *len);
                let options = RegisterOptions {
                    access: *access,
                    mode: *mode,
                    address: address.map(RegionAddr),
                    ..RegisterOptions::pinned()
                };
                let registered = part.ok_or("no such part").map(|part| own.pd.register(&part, options));
                let Ok(Ok(region)) = registered else { return nothing("refused") };
                own.regions[*slot] = Some(Held {
                    region,
                    start: *start,
                    mode: *mode,
                    renamed: address.is_some(),
                    changed: false,
                });
                nothing("registered")
            }
            Step::Deregister { side, slot } => {
                self.give_back(*side, *slot);
                nothing("gone")
            }
            Step::Drop { side, page, pages }
            | Step::Replace { side, page, pages }
            | Step::Protect { side, page, pages, .. } => {
                let own = &mut self.own[*side as usize];
                if *pages > 0 {
                    match step {
                        Step::Drop { .. } => own.memory.discard(*page, *pages),
                        Step::Protect { may, .. } => own.memory.protect(*page, *pages, flags(*may)),
                        _ => own.memory.replace(*page, *pages),
                    }
                    own.regions.iter_mut().flatten().for_each(|held| held.changed = true);
                }
                nothing("done")
            }
            Step::Store { side, at, len, seed } => {
                let own = &self.own[*side as usize];
                let start = own.memory.range().start().0 + at;
                // Protected pages are no business of /proc/self/mem's on some kernels, whatever the device.
                let written = bytes::write(start, &bytes::pattern(*seed, *len as usize));
                nothing(if written.is_ok() { "done" } else { "not allowed" })
            }
            Step::Ask { operation, from, to, len } => self.ask(*operation, *from, *to, *len, 1),
            Step::AskMany { operation, from, to, len, count } => {
                self.ask(*operation, *from, *to, *len, *count)
            }
        }
    }

    fn give_back(&mut self, side: Side, slot: usize) {
        let own = &mut self.own[side as usize];
        if let Some(held) = own.regions[slot].take() {
            own.given_back = Some(held.region.key());
        }
    }

    /// The key that is used for a place.
    fn key(&self, side: Side, place: Place) -> Option<Key> {
        let own = &self.own[side as usize];
        let region = own.regions[place.slot].as_ref()?.region.key();
        Some(match place.key {
            KeyOf::Region => region,
            // The other eight bits are where devices keep what they number.
            KeyOf::Nobody => Key(region.0 ^ 0xff),
            KeyOf::OtherEnd => self.own[1 - side as usize].regions.iter().flatten().next()?.region.key(),
            KeyOf::GivenBack => own.given_back?,
        })
    }

    fn ask(
        &mut self,
        operation: Operation,
        from: Place,
        to: Place,
        len: u64,
        count: u64,
    ) -> Result<Outcome, Error> {
        let (Some(local_key), Some(remote_key)) = (self.key(Side::Asking, from), self.key(Side::Peer, to))
        else {
            return Ok(Outcome { said: "nothing to ask of".to_owned(), bytes: Vec::new() });
        };
        // The kernel dies of it: docs/rxe.md.
        let deadly = |side, place: Place| {
            self.held(side, place.slot).is_some_and(|held| held.mode == Mode::OnDemand && held.renamed)
        };
        if deadly(Side::Asking, from) || deadly(Side::Peer, to) {
            return Ok(Outcome { said: "left out".to_owned(), bytes: Vec::new() });
        }
        let at = |side: Side, place: Place| {
            let region = &self.held(side, place.slot).expect("it has a key").region;
            RegionAddr(region.address().0.wrapping_add_signed(place.offset))
        };
        let piece = [Sge { key: local_key, address: at(Side::Asking, from), length: len as u32 }];
        let pieces = if len == 0 { &piece[..0] } else { &piece[..] };
        let remote = Remote { key: remote_key, address: at(Side::Peer, to) };
        let into = [Sge { key: remote_key, address: remote.address, length: len as u32 }];
        let posted = match operation {
            Operation::Write => Posted::Write(remote),
            Operation::Read => Posted::Read(remote),
            Operation::FetchAdd => Posted::FetchAdd { remote, add: 0x0101_0101_0101_0101 },
            Operation::CompareSwap => Posted::CompareSwap { remote, compare: 0, swap: 0x7777_7777_7777_7777 },
            Operation::Send => Posted::Send,
        };
        if self.queues.is_none() {
            self.queues = Some(self.rig.pair(&self.own[1].pd, &self.own[0].pd)?);
        }
        let (responder, requester) = self.queues.as_ref().expect("made above");
        if operation == Operation::Send {
            post_receive(responder, if len == 0 { &into[..0] } else { &into })?;
        }
        for id in 0..count {
            if requester.post(&SendRequest::new(id, posted, pieces)).is_err() {
                self.queues = None;
                return Ok(Outcome { said: "not posted".to_owned(), bytes: Vec::new() });
            }
        }
        let mut said = Vec::new();
        for _ in 0..count {
            said.push(requester.completion()?.status);
        }
        let went = said.iter().all(|status| *status == Status::Success);
        let mut said = format!("{said:?}");
        if operation == Operation::Send && went {
            let received = responder.completion()?;
            said += &format!(", received {} bytes, {:?}", received.bytes, received.status);
        }
        if !went {
            self.queues = None;
        }
        let changed = match operation {
            Operation::Read | Operation::FetchAdd | Operation::CompareSwap => {
                [(Side::Asking, from), (Side::Peer, to)]
            }
            Operation::Write | Operation::Send => [(Side::Peer, to), (Side::Peer, to)],
        };
        let mut bytes = Vec::new();
        for (side, place) in changed {
            bytes.extend(self.bytes(side, place, len)?);
        }
        Ok(Outcome { said, bytes })
    }

    /// What is at a place, as far as it lies in the memory, without the pages that the program may not read.
    fn bytes(&self, side: Side, place: Place, len: u64) -> Result<Vec<u8>, Error> {
        let all = (PAGES * PAGE_SIZE) as i64;
        let Some(start) = self.in_memory(side, place) else { return Ok(Vec::new()) };
        let (start, end) = (start.clamp(0, all), (start + len as i64).clamp(0, all));
        let base = self.own[side as usize].memory.range().start().0;
        let (mut at, end, mut all) = (start as u64, end as u64, Vec::new());
        while at < end {
            let next = end.min((at / PAGE_SIZE + 1) * PAGE_SIZE);
            all.extend(bytes::read(base + at, (next - at) as usize).unwrap_or_default());
            at = next;
        }
        Ok(all)
    }
}

fn post_receive(queue: &Queue, local: &[Sge]) -> Result<(), Error> {
    match queue {
        Queue::Model(qp, _) => qp.post_recv(&RecvRequest::new(7, local))?,
        #[cfg(feature = "verbs")]
        Queue::Verbs(qp, _) => qp.post_recv(&RecvRequest::new(7, local))?,
    }
    Ok(())
}

fn flags(may: May) -> MprotectFlags {
    match may {
        May::Nothing => MprotectFlags::empty(),
        May::Read => MprotectFlags::READ,
        May::Write => MprotectFlags::READ | MprotectFlags::WRITE,
    }
}
