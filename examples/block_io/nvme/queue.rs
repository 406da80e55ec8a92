//! A submission queue and its completion queue, in memory of ours that the controller reads and writes.

use super::Status;
use hw_model::addr::PAGE_SIZE;
use hw_model::sync::atomic::Ordering;
use hw_model::sync::fence;
use mr::dma::vfio::Bar;
use odp::space::process::{OwnedError, OwnedMemory};

const DOORBELLS: u64 = 0x1000;
const COMMAND: u64 = 64;
const COMPLETION: u64 = 16;

/// A pair of queues. One command at a time is in it.
pub struct Queue {
    number: u64,
    depth: u16,
    /// Where in the memory of all queues its commands begin; the completions are in the page after.
    pub offset: u64,
    /// Bytes from one doorbell to the next.
    stride: u64,
    tail: u16,
    head: u16,
    /// Of entries that the controller has not written yet in this round.
    old_phase: bool,
    next_id: u16,
}

impl Queue {
    /// Queue pair `number` of `depth` entries, the memory of which is zeroed.
    pub fn new(number: u64, depth: u16, offset: u64, stride: u64) -> Self {
        Self { number, depth, offset, stride, tail: 0, head: 0, old_phase: false, next_id: 1 }
    }

    fn ring(&self, bar: &Bar, completion: u64, value: u16) {
        // What was written to the queue comes before the doorbell.
        fence(Ordering::SeqCst);
        bar.write32(DOORBELLS + (2 * self.number + completion) * self.stride, u32::from(value));
    }

    /// Puts a command into the queue and tells the controller.
    pub fn submit(&mut self, bar: &Bar, memory: &OwnedMemory, mut entry: [u8; 64]) -> Result<(), OwnedError> {
        entry[2..4].copy_from_slice(&self.next_id.to_le_bytes());
        self.next_id = self.next_id.wrapping_add(1);
        memory.write_at(self.offset + u64::from(self.tail) * COMMAND, &entry)?;
        self.tail = (self.tail + 1) % self.depth;
        self.ring(bar, 0, self.tail);
        Ok(())
    }

    /// How the oldest command ended; `None` as long as it has not.
    pub fn complete(&mut self, bar: &Bar, memory: &OwnedMemory) -> Result<Option<Status>, OwnedError> {
        let at = self.offset + PAGE_SIZE + u64::from(self.head) * COMPLETION;
        let mut word = [0; 2];
        memory.read_at(at + 14, &mut word)?;
        // The phase and the status are one word of two bytes, which the controller writes last.
        let word = u16::from_le_bytes(word);
        if (word & 1 != 0) == self.old_phase {
            return Ok(None);
        }
        // What the command wrote is read after its completion.
        fence(Ordering::Acquire);
        self.head = (self.head + 1) % self.depth;
        if self.head == 0 {
            self.old_phase = !self.old_phase;
        }
        self.ring(bar, 1, self.head);
        Ok(Some(Status { kind: (word >> 9 & 7) as u8, code: (word >> 1 & 0xff) as u8 }))
    }
}
