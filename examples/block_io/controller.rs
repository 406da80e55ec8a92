//! A modelled NVMe controller: it is told a command and has nothing but its port on the bus.
//!
//! It follows the lists as NVM Express Base Specification 2.1, 4.3 says, without any code of the builders.

use crate::Error;
use hw_model::addr::DmaAddr;
use hw_model::bus::{DmaPort, Slot};

/// Bytes of a logical block.
pub const LBA: u64 = 512;
/// Bytes of the controller's page (CC.MPS = 0).
const PAGE: u64 = 4096;
/// Blocks of its medium.
const BLOCKS: u64 = 16 << 10;

/// The data of a command.
#[derive(Clone, Copy, Debug)]
pub enum DataPointer {
    /// PRP1 and PRP2.
    Prp(DmaAddr, DmaAddr),
    /// The first descriptor.
    Sgl([u8; 16]),
}

impl DataPointer {
    /// As people call it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Prp(..) => "PRP",
            Self::Sgl(_) => "SGL",
        }
    }
}

/// Which way the data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    ToDisk,
    FromDisk,
}

/// A read or write command.
#[derive(Clone, Copy, Debug)]
pub struct Command {
    pub direction: Direction,
    /// First logical block.
    pub start: u64,
    /// Blocks.
    pub blocks: u64,
    pub data: DataPointer,
}

pub struct Controller {
    port: DmaPort,
    slot: Slot,
    medium: Vec<u8>,
}

impl Controller {
    pub fn new(port: DmaPort) -> Result<Self, Error> {
        let slot = port.epoch().register().ok_or("the memory has no room for another device")?;
        Ok(Self { port, slot, medium: vec![0; (BLOCKS * LBA) as usize] })
    }

    /// What the medium holds.
    pub fn media(&self, start: u64, blocks: u64) -> &[u8] {
        &self.medium[(start * LBA) as usize..((start + blocks) * LBA) as usize]
    }

    /// Carries a command out.
    pub fn execute(&mut self, command: &Command) -> Result<(), Error> {
        let Command { direction, start, blocks, data } = *command;
        if start + blocks > BLOCKS {
            return Err("LBA out of range".into());
        }
        let mut at = (start * LBA) as usize;
        let places = match data {
            DataPointer::Prp(prp1, prp2) => self.follow_prp(prp1, prp2, blocks * LBA)?,
            DataPointer::Sgl(first) => self.follow_sgl(first)?,
        };
        if places.iter().map(|(_, len)| len).sum::<u64>() != blocks * LBA {
            return Err("the data pointer has not as many bytes as the command".into());
        }
        let mut medium = std::mem::take(&mut self.medium);
        let mut result = Ok(());
        for (dma, len) in places {
            let bytes = &mut medium[at..at + len as usize];
            at += bytes.len();
            result = result.and_then(|()| self.burst(dma, bytes, direction));
        }
        self.medium = medium;
        result
    }

    /// Moves bytes, in bursts that end with pages.
    fn burst(&mut self, dma: DmaAddr, bytes: &mut [u8], direction: Direction) -> Result<(), Error> {
        let mut done = 0;
        while done < bytes.len() {
            let at = dma.offset(done as u64);
            let now = (bytes.len() - done).min((PAGE - at.page_offset()) as usize);
            let part = &mut bytes[done..done + now];
            let _busy = self.slot.enter().map_err(|_| "the DMA epoch is closed")?;
            match direction {
                Direction::ToDisk => self.port.read(at, part)?,
                Direction::FromDisk => self.port.write(at, part)?,
            }
            done += now;
        }
        Ok(())
    }

    fn fetch<const N: usize>(&mut self, at: DmaAddr) -> Result<[u8; N], Error> {
        let mut bytes = [0; N];
        self.burst(at, &mut bytes, Direction::ToDisk)?;
        Ok(bytes)
    }

    fn follow_prp(&mut self, prp1: DmaAddr, prp2: DmaAddr, bytes: u64) -> Result<Vec<(DmaAddr, u64)>, Error> {
        let first = bytes.min(PAGE - prp1.page_offset());
        let mut places = vec![(prp1, first)];
        let mut left = bytes - first;
        if left == 0 {
            return Ok(places);
        }
        if left <= PAGE {
            places.push((prp2, left));
            return Ok(places);
        }
        let mut at = prp2;
        while left > 0 {
            let entry = DmaAddr(u64::from_le_bytes(self.fetch(at)?));
            if at.page_offset() == PAGE - 8 && left > PAGE {
                at = entry;
                continue;
            }
            if entry.page_offset() != 0 {
                return Err("PRP offset invalid".into());
            }
            places.push((entry, left.min(PAGE)));
            left -= left.min(PAGE);
            at = at.offset(8);
        }
        Ok(places)
    }

    fn follow_sgl(&mut self, first: [u8; 16]) -> Result<Vec<(DmaAddr, u64)>, Error> {
        let mut places = Vec::new();
        let mut next = Some(first);
        while let Some(descriptor) = next.take() {
            let (kind, at, length) = read_descriptor(descriptor);
            match kind {
                0x00 => places.push((at, length)),
                0x20 | 0x30 => {
                    for number in 0..length / 16 {
                        let inner = self.fetch(at.offset(number * 16))?;
                        let (inner_kind, at, len) = read_descriptor(inner);
                        let is_last = number + 1 == length / 16;
                        match inner_kind {
                            0x00 => places.push((at, len)),
                            _ if is_last && kind == 0x20 => next = Some(inner),
                            _ => return Err("SGL descriptor type invalid".into()),
                        }
                    }
                }
                _ => return Err("SGL descriptor type invalid".into()),
            }
        }
        Ok(places)
    }
}

/// Type and sub type, address, length.
fn read_descriptor(bytes: [u8; 16]) -> (u8, DmaAddr, u64) {
    let mut word = [[0; 8]; 2];
    word[0].copy_from_slice(&bytes[..8]);
    word[1].copy_from_slice(&bytes[8..]);
    let [address, rest] = word.map(u64::from_le_bytes);
    (bytes[15], DmaAddr(address), rest & 0xffff_ffff)
}
