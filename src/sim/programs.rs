//! What the programs do with their memory themselves, and what they must see.

use super::Broken;
use super::memory::Piece;
use super::world::World;
use hw_model::addr::VirtAddr;
use odp::space::{Access, FaultError};

impl World {
    /// Part of a page or two.
    fn some_piece(&mut self) -> Option<Piece> {
        let process = if self.choices.chance(100) {
            let host = self.choices.below(self.hosts.len() as u32) as usize;
            self.exported(host)
        } else {
            self.some_process(None)?
        };
        let page = self.some_page(process)?;
        let start = u64::from(self.choices.below(4096));
        let len = 1 + self.choices.below(300) as usize;
        Some(Piece { process, at: VirtAddr::from_page_number(page).offset(start), len })
    }

    /// Whether the program may access all of the piece, told from what it asked for.
    fn may(&self, piece: Piece, access: Access) -> bool {
        let last = piece.at.offset(piece.len as u64 - 1).page_number();
        (piece.at.page_number()..=last).all(|page| self.memory.allows(piece.process, page, access))
    }

    pub(super) fn read_some(&mut self) -> Result<(), Broken> {
        match self.some_piece() {
            Some(piece) => self.read(piece),
            None => Ok(()),
        }
    }

    /// The program reads, and sees what it may.
    pub(super) fn read(&mut self, piece: Piece) -> Result<(), Broken> {
        let mut seen = vec![0; piece.len];
        let result = self.cpu_read(piece.process, piece.at, &mut seen);
        self.note(|| format!("cpu reads {piece:?}: {result:?}"));
        self.judge(piece, Access::Read, result)?;
        if result.is_ok() {
            self.counts.add("bytes verified", piece.len as u64);
            self.memory.read(piece.process, piece.at, &seen).map_err(|wrong| Broken::new("bytes", wrong))?;
        }
        Ok(())
    }

    pub(super) fn write_some(&mut self) -> Result<(), Broken> {
        let Some(piece) = self.some_piece() else { return Ok(()) };
        let data = self.fresh_bytes(piece.len);
        let result = self.cpu_write(piece.process, piece.at, &data);
        self.note(|| format!("cpu writes {piece:?}: {result:?}"));
        self.judge(piece, Access::Write, result)?;
        // The pages before the one that could not be had have been written.
        let written = match result {
            Ok(()) => piece.len,
            Err(
                FaultError::Busy { at }
                | FaultError::NoMapping { at }
                | FaultError::Permission { at, .. }
                | FaultError::OutOfMemory { at }
                | FaultError::Special { at }
                | FaultError::Withdrawn { at, .. },
            ) => at.0.saturating_sub(piece.at.0) as usize,
        };
        self.memory.write(piece.process, piece.at, &data[..written]);
        Ok(())
    }

    /// Whether an access of the program ended as it must.
    pub(super) fn judge(
        &mut self,
        piece: Piece,
        access: Access,
        result: Result<(), FaultError>,
    ) -> Result<(), Broken> {
        let expected = self.may(piece, access);
        let right = match result {
            Ok(()) => expected,
            Err(FaultError::Busy { .. }) => {
                self.counts.one("cpu accesses that had to come again");
                true
            }
            Err(FaultError::OutOfMemory { .. }) => {
                self.counts.one("cpu accesses without memory");
                true
            }
            Err(_) => {
                self.counts.one("cpu accesses that were refused");
                !expected
            }
        };
        if right {
            self.counts.one("cpu accesses");
            return Ok(());
        }
        let detail = format!("{access:?} of {piece:?} gave {result:?}; allowed: {expected}");
        Err(Broken { rule: "cpu access", detail })
    }
}
