//! Local memory of a request: its scatter-gather list, or the bytes that were taken when it was posted.

use crate::addr::RegionAddr;
use crate::hca::request::Sge;
use crate::hca::translate::Piece;
use crate::wire::Key;

/// Few entries lie in the request itself: posting them allocates nothing.
const INLINE_SGES: usize = 2;

/// A scatter-gather list.
#[derive(Clone, Debug)]
pub(super) enum SgeList {
    Few([Sge; INLINE_SGES], u8),
    Many(Box<[Sge]>),
}

impl SgeList {
    pub(super) fn new(list: &[Sge]) -> Self {
        if list.len() > INLINE_SGES {
            return Self::Many(list.into());
        }
        let mut few = [Sge { key: Key(0), address: RegionAddr(0), length: 0 }; INLINE_SGES];
        few[..list.len()].copy_from_slice(list);
        Self::Few(few, list.len() as u8)
    }

    fn entries(&self) -> &[Sge] {
        match self {
            Self::Few(list, len) => &list[..usize::from(*len)],
            Self::Many(list) => list,
        }
    }

    /// The parts of local memory that hold `now` bytes at `offset` of the message.
    pub(super) fn pieces(&self, mut offset: u32, mut now: u32, out: &mut Vec<Piece>) {
        out.clear();
        for sge in self.entries() {
            if now == 0 {
                return;
            }
            if offset >= sge.length {
                offset -= sge.length;
                continue;
            }
            let rest = sge.length - offset;
            let part = rest.min(now);
            let address = sge.address.offset(u64::from(offset));
            out.push(Piece { key: sge.key, address, now: part, rest: u64::from(rest) });
            offset = 0;
            now -= part;
        }
    }
}

/// Where the data of a send request is.
#[derive(Debug)]
pub(super) enum Data {
    /// In memory that keys name.
    List(SgeList),
    /// In the request (10.8.2, inline).
    Taken(Box<[u8]>),
}
