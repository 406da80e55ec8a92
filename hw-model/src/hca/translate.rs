//! From keys and addresses to what goes on the bus: the page list, read entry by entry.
//!
//! Everything here runs inside the DMA epoch, where nothing is allocated or freed and no lock is waited for that could be
//! held across such a thing: the thread that frees memory may be waiting for this burst to end.

use super::cache::Cache;
use super::key::{
    Access, BoundWindow, Caller, ImplicitKeySpec, IndirectKeySpec, IndirectTarget, KeySpec, KeyTable,
    KeyViolation, MIN_INDIRECT_ENTRY, NullKeySpec, SLOT_BYTES, SLOT_SHIFT, Target,
};
use crate::addr::{DmaAddr, PAGE_SIZE, RegionAddr};
use crate::bus::{AtomicOp, CopyEnd, CopyError, DmaCopy, DmaError, DmaPort, MemoryError};
use crate::wire::{Key, Payload};

/// A part of a message in one region.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub(super) key: Key,
    pub(super) address: RegionAddr,
    /// Bytes to move now.
    pub(super) now: u32,
    /// Bytes from `address` to the end of the message in this region: checked as a whole before any byte moves.
    pub(super) rest: u64,
}

impl Piece {
    /// No bytes.
    pub(super) const NONE: Self = Self { key: Key(0), address: RegionAddr(0), now: 0, rest: 0 };
}

/// Bytes that are together on the bus.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    address: DmaAddr,
    length: u32,
}

impl Span {
    /// The parts of it that lie in one host page each.
    fn pages(&self) -> impl Iterator<Item = Self> + use<> {
        let Self { mut address, length: mut left } = *self;
        std::iter::from_fn(move || {
            let length = left.min((PAGE_SIZE - address.page_offset()) as u32);
            let page = Self { address, length };
            (address, left) = (address.offset(u64::from(length)), left - length);
            (length > 0).then_some(page)
        })
    }
}

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// From memory to a payload.
    Gather,
    /// From a payload to memory.
    Scatter,
    /// One word of memory is changed, and what it was goes to the payload.
    Atomic(AtomicOp),
}

impl Direction {
    /// What it needs of a key that another key stands in front of: what the peer may do is for that one to say, and the one
    /// below is used as a local key.
    fn local(self) -> Access {
        match self {
            Self::Gather => Access::empty(),
            Self::Scatter | Self::Atomic(_) => Access::LOCAL_WRITE,
        }
    }
}

/// Why bytes cannot move.
#[derive(Clone, Copy, Debug)]
pub(super) enum Obstacle {
    /// The key does not allow it.
    Key(KeyViolation),
    /// The page of this piece is not there for this access.
    Page { key: Key, address: RegionAddr, rest: u64 },
    /// The bus refused: a mistake of the software above, never an ordinary event.
    Refused(DmaError),
    /// An atomic on a word that is not aligned in memory, whatever its address says.
    Misaligned,
    /// The bytes were lent, and are not where they were any more: their owner is to send them again.
    CalledIn,
}

/// Fills `spans` with where the bytes of `pieces` are. `spans` has room (see [`span_capacity`]): it does not grow.
pub(super) fn translate(
    keys: &KeyTable,
    cache: &mut Cache<'_>,
    (caller, need): (Caller, Access),
    direction: Direction,
    pieces: &[Piece],
    spans: &mut Vec<Span>,
) -> Result<(), Obstacle> {
    spans.clear();
    cache.begin(keys);
    for piece in pieces {
        cache.look_up(piece.key);
        let walked = keys.with(piece.key, |target| match target {
            Target::Pages(spec) => pages(cache, spec, (caller, need), direction, piece, spans),
            Target::Indirect(spec) => indirect((keys, cache), spec, (caller, need), direction, piece, spans),
            Target::Null(spec) => null(*spec, (caller, need), piece, spans),
            Target::Implicit(spec) => implicit((keys, cache), spec, (caller, need), direction, piece, spans),
            Target::Window(bound) => window((keys, cache), bound, (caller, need), direction, piece, spans),
        });
        walked.map_err(Obstacle::Key)??;
    }
    Ok(())
}

/// Through a page list.
fn pages(
    cache: &mut Cache<'_>,
    spec: &KeySpec,
    (caller, need): (Caller, Access),
    direction: Direction,
    piece: &Piece,
    spans: &mut Vec<Span>,
) -> Result<(), Obstacle> {
    let mut at = spec.authorize(caller.pd, need, piece.address, piece.rest).map_err(Obstacle::Key)?;
    let page = spec.pages.page_bytes();
    let mut done = 0;
    while done < piece.now {
        let write = direction != Direction::Gather;
        let (entry, run) = cache.load(piece.key, &spec.pages, at >> spec.pages.page_shift(), write);
        let usable = match direction {
            Direction::Gather => entry.is_valid(),
            Direction::Scatter | Direction::Atomic(_) => entry.is_writable(),
        };
        if !usable {
            return Err(missing(piece, done));
        }
        let offset = at & (page - 1);
        let length = u64::from(piece.now - done).min(page * run - offset) as u32;
        span(entry.address().offset(offset), length, spans);
        done += length;
        at += u64::from(length);
    }
    Ok(())
}

/// Through the page list of a key that another one stands in front of.
fn behind(
    (keys, cache): (&KeyTable, &mut Cache<'_>),
    caller: Caller,
    direction: Direction,
    piece: &Piece,
    spans: &mut Vec<Span>,
) -> Result<Result<(), Obstacle>, KeyViolation> {
    cache.look_up(piece.key);
    keys.with(piece.key, |target| match target {
        Target::Pages(spec) => pages(cache, spec, (caller, direction.local()), direction, piece, spans),
        _ => Err(Obstacle::Key(KeyViolation::Nested)),
    })
}

/// Through the entries of an indirect key, and through the keys that they name.
fn indirect(
    (keys, cache): (&KeyTable, &mut Cache<'_>),
    spec: &IndirectKeySpec,
    (caller, need): (Caller, Access),
    direction: Direction,
    piece: &Piece,
    spans: &mut Vec<Span>,
) -> Result<(), Obstacle> {
    let mut at = spec.authorize(caller.pd, need, piece.address, piece.rest).map_err(Obstacle::Key)?;
    let mut done = 0;
    while done < piece.now {
        let (entry, offset) = spec.list.locate(at);
        let left = entry.length - offset;
        let now = u64::from(piece.now - done).min(left) as u32;
        match entry.target {
            IndirectTarget::Dma(dma) => span(dma.offset(offset), now, spans),
            // Looking up the key that is being looked up could wait for itself.
            IndirectTarget::Key { key, .. } if key == piece.key => {
                return Err(Obstacle::Key(KeyViolation::Nested));
            }
            IndirectTarget::Key { key, address } => {
                let rest = left.min(piece.rest - u64::from(done));
                let inner = Piece { key, address: address.offset(offset), now, rest };
                let walked = behind((keys, cache), caller, direction, &inner, spans);
                walked.map_err(Obstacle::Key)??;
            }
        }
        done += now;
        at += u64::from(now);
    }
    Ok(())
}

/// To the page that stands for no memory, as often as it takes.
fn null(
    spec: NullKeySpec,
    (caller, need): (Caller, Access),
    piece: &Piece,
    spans: &mut Vec<Span>,
) -> Result<(), Obstacle> {
    spec.authorize(caller, need).map_err(Obstacle::Key)?;
    let mut left = piece.now;
    while left > 0 {
        let now = left.min(PAGE_SIZE as u32);
        span(spec.page, now, spans);
        left -= now;
    }
    Ok(())
}

/// Through the part of a region that a memory window is bound to (IBTA volume 1, 10.6.7.2): the rights are the window's.
fn window(
    (keys, cache): (&KeyTable, &mut Cache<'_>),
    bound: &BoundWindow,
    (caller, need): (Caller, Access),
    direction: Direction,
    piece: &Piece,
    spans: &mut Vec<Span>,
) -> Result<(), Obstacle> {
    let offset = bound.authorize(caller, need, piece.address, piece.rest).map_err(Obstacle::Key)?;
    let inner = Piece { key: bound.region, address: bound.in_region(offset), ..*piece };
    behind((keys, cache), caller, direction, &inner, spans).map_err(Obstacle::Key)?
}

/// Through the slots of an implicit key. What is missing there, page or slot, is missing of the implicit key.
fn implicit(
    (keys, cache): (&KeyTable, &mut Cache<'_>),
    spec: &ImplicitKeySpec,
    (caller, need): (Caller, Access),
    direction: Direction,
    piece: &Piece,
    spans: &mut Vec<Span>,
) -> Result<(), Obstacle> {
    let mut at = spec.authorize(caller.pd, need, piece.address, piece.rest).map_err(Obstacle::Key)?;
    let mut done = 0;
    while done < piece.now {
        let (slot, offset) = (at >> SLOT_SHIFT, at & (SLOT_BYTES - 1));
        let now = u64::from(piece.now - done).min(SLOT_BYTES - offset) as u32;
        let address = piece.address.offset(u64::from(done));
        let walked = spec.table.load(slot).filter(|key| *key != piece.key).map(|key| {
            let inner = Piece { key, address, now, rest: u64::from(now) };
            behind((keys, cache), caller, direction, &inner, spans)
        });
        match walked {
            // The slot's region went between the two looks.
            None | Some(Err(KeyViolation::Unknown)) => return Err(missing(piece, done)),
            Some(Err(violation)) => return Err(Obstacle::Key(violation)),
            Some(Ok(Err(Obstacle::Page { address, .. }))) => {
                return Err(missing(piece, (address.0 - piece.address.0) as u32));
            }
            Some(Ok(walked)) => walked?,
        }
        done += now;
        at += u64::from(now);
    }
    Ok(())
}

/// Bytes that are together on the bus, joined with those before them where they go on.
fn span(address: DmaAddr, length: u32, spans: &mut Vec<Span>) {
    if let Some(last) = spans.last_mut()
        && last.address.offset(u64::from(last.length)) == address
    {
        last.length += length;
        return;
    }
    debug_assert!(spans.len() < spans.capacity(), "growing would allocate inside the epoch");
    spans.push(Span { address, length });
}

/// Moves the bytes of `payload` and `spans`, which are as many, in increasing order.
pub(super) fn transfer(
    keys: &KeyTable,
    port: &DmaPort,
    direction: Direction,
    pieces: &[Piece],
    spans: &[Span],
    payload: &mut Payload,
) -> Result<(), Obstacle> {
    let mut done = 0;
    for Span { address, length } in spans.iter().flat_map(Span::pages) {
        let range = done..done + length as usize;
        let moved = match direction {
            Direction::Gather => match payload.outside() {
                Some(outside) => port.read_to(address, outside.part(range)),
                None => port.read(address, &mut payload[range]),
            },
            Direction::Scatter => match payload.outside() {
                Some(outside) => port.write_from(address, outside.part(range)),
                None => port.write(address, &payload[range]),
            },
            Direction::Atomic(_) if range.len() < payload.len() => return Err(Obstacle::Misaligned),
            Direction::Atomic(op) => {
                port.atomic(address, op).map(|before| payload[range].copy_from_slice(&before.to_le_bytes()))
            }
        };
        match moved {
            Err(DmaError::Memory(MemoryError::Misaligned { .. })) => return Err(Obstacle::Misaligned),
            Ok(()) => done += length as usize,
            // The page went away before its entry did. Its notification is on the way: ask for the page again.
            Err(DmaError::Memory(MemoryError::Vanished { .. })) => return Err(vanished(keys, pieces, done)),
            Err(refused) => return Err(Obstacle::Refused(refused)),
        }
    }
    Ok(())
}

/// Moves the bytes of `from`, which `source` reaches, to `spans`, which are as many, in increasing order.
pub(super) fn borrow(
    keys: &KeyTable,
    port: &DmaPort,
    pieces: &[Piece],
    spans: &[Span],
    (source, from): (&DmaPort, &[Span]),
) -> Result<(), Obstacle> {
    let mut copy = DmaCopy::new(source, port);
    let mut sources = from.iter();
    let mut source = Span { address: DmaAddr(0), length: 0 };
    let mut copied = Ok(());
    'spans: for span in spans {
        let Span { mut address, mut length } = *span;
        while length > 0 {
            if source.length == 0 {
                source = *sources.next().ok_or(Obstacle::CalledIn)?;
            }
            let now = length.min(source.length);
            copied = copy.add(source.address, address, now as usize);
            if copied.is_err() {
                break 'spans;
            }
            source = Span { address: source.address.offset(u64::from(now)), length: source.length - now };
            address = address.offset(u64::from(now));
            length -= now;
        }
    }
    match copied.and_then(|()| copy.finish()) {
        Ok(()) => Ok(()),
        // Whatever it is, the owner meets it when it gathers the bytes itself.
        Err(CopyError { end: CopyEnd::Source, .. }) => Err(Obstacle::CalledIn),
        Err(CopyError { done, error: DmaError::Memory(MemoryError::Vanished { .. }), .. }) => {
            Err(vanished(keys, pieces, done as usize))
        }
        Err(CopyError { error, .. }) => Err(Obstacle::Refused(error)),
    }
}

/// Spans that a payload of `payload` bytes in `pieces` pieces takes at most: cut at the ends of host pages, and at the ends
/// of indirect entries, of which the first and the last of a key may be of any length.
pub(super) fn span_capacity(payload: usize, pieces: usize) -> usize {
    payload / PAGE_SIZE as usize + payload / MIN_INDIRECT_ENTRY as usize + 4 * pieces + 2
}

fn missing(piece: &Piece, done: u32) -> Obstacle {
    let done = u64::from(done);
    Obstacle::Page { key: piece.key, address: piece.address.offset(done), rest: piece.rest - done }
}

fn vanished(keys: &KeyTable, pieces: &[Piece], mut done: usize) -> Obstacle {
    for piece in pieces {
        if done < piece.now as usize {
            return below(keys, piece, done as u32).unwrap_or(missing(piece, done as u32));
        }
        done -= piece.now as usize;
    }
    unreachable!("a span belongs to a piece")
}

/// The missing byte as the key below an indirect one, or a window's region, names it: that is the key that software knows
/// pages of.
fn below(keys: &KeyTable, piece: &Piece, done: u32) -> Option<Obstacle> {
    let named = keys.with(piece.key, |target| {
        let spec = match target {
            // What is missing behind an implicit key is missing of that key.
            Target::Pages(_) | Target::Null(_) | Target::Implicit(_) => return None,
            Target::Indirect(spec) => spec,
            Target::Window(bound) => {
                let offset = piece.address.0 - bound.base().0 + u64::from(done);
                let (key, address) = (bound.region, bound.in_region(offset));
                return Some(Obstacle::Page { key, address, rest: piece.rest - u64::from(done) });
            }
        };
        let (entry, offset) = spec.list.locate(piece.address.0 - spec.address.0 + u64::from(done));
        let IndirectTarget::Key { key, address } = entry.target else { return None };
        let rest = (entry.length - offset).min(piece.rest - u64::from(done));
        Some(Obstacle::Page { key, address: address.offset(offset), rest })
    });
    named.ok().flatten()
}
