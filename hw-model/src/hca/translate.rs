//! From keys and addresses to what goes on the bus: the page list, read entry by entry.
//!
//! Everything here runs inside the DMA epoch, where nothing is allocated or freed and no lock is waited for that could be
//! held across such a thing: the thread that frees memory may be waiting for this burst to end.

use super::key::{Access, KeyTable, KeyViolation};
use super::pd::Pd;
use crate::addr::{DmaAddr, PAGE_SIZE, RegionAddr};
use crate::bus::{DmaError, DmaPort, MemoryError};
use crate::wire::Key;

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

/// Bytes on the bus, inside one page.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    address: DmaAddr,
    length: u32,
}

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// From memory to a payload.
    Gather,
    /// From a payload to memory.
    Scatter,
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
}

/// Fills `spans` with where the bytes of `pieces` are. `spans` has room (see [`span_capacity`]): it does not grow.
pub(super) fn translate(
    keys: &KeyTable,
    (pd, need): (Pd, Access),
    direction: Direction,
    pieces: &[Piece],
    spans: &mut Vec<Span>,
) -> Result<(), Obstacle> {
    spans.clear();
    for piece in pieces {
        let walked = keys.with(piece.key, |spec| {
            let mut at = spec.authorize(pd, need, piece.address, piece.rest).map_err(Obstacle::Key)?;
            let mut done = 0;
            while done < piece.now {
                let entry = spec.pages.load(at / PAGE_SIZE).unwrap_or_default();
                let usable = match direction {
                    Direction::Gather => entry.is_valid(),
                    Direction::Scatter => entry.is_writable(),
                };
                if !usable {
                    return Err(missing(piece, done));
                }
                let offset = at % PAGE_SIZE;
                let length = (piece.now - done).min((PAGE_SIZE - offset) as u32);
                debug_assert!(spans.len() < spans.capacity(), "growing would allocate inside the epoch");
                spans.push(Span { address: entry.address().offset(offset), length });
                done += length;
                at += u64::from(length);
            }
            Ok(())
        });
        walked.map_err(Obstacle::Key)??;
    }
    Ok(())
}

/// Moves the bytes of `payload` and `spans`, which are as many, in increasing order.
pub(super) fn transfer(
    port: &DmaPort,
    direction: Direction,
    pieces: &[Piece],
    spans: &[Span],
    payload: &mut [u8],
) -> Result<(), Obstacle> {
    let mut done = 0;
    for span in spans {
        let bytes = &mut payload[done..done + span.length as usize];
        let moved = match direction {
            Direction::Gather => port.read(span.address, bytes),
            Direction::Scatter => port.write(span.address, bytes),
        };
        match moved {
            Ok(()) => done += span.length as usize,
            // The page went away before its entry did. Its notification is on the way: ask for the page again.
            Err(DmaError::Memory(MemoryError::Vanished { .. })) => return Err(vanished(pieces, done)),
            Err(refused) => return Err(Obstacle::Refused(refused)),
        }
    }
    Ok(())
}

/// Spans that a payload of `payload` bytes in `pieces` pieces takes at most.
pub(super) fn span_capacity(payload: usize, pieces: usize) -> usize {
    payload / PAGE_SIZE as usize + 2 * pieces + 2
}

fn missing(piece: &Piece, done: u32) -> Obstacle {
    let done = u64::from(done);
    Obstacle::Page { key: piece.key, address: piece.address.offset(done), rest: piece.rest - done }
}

fn vanished(pieces: &[Piece], mut done: usize) -> Obstacle {
    for piece in pieces {
        if done < piece.now as usize {
            return missing(piece, done as u32);
        }
        done -= piece.now as usize;
    }
    unreachable!("a span belongs to a piece")
}
