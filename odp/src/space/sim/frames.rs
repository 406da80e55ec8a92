//! Which frames of RAM are free. Frames are given out scattered, so that contiguity is never an accident; huge pages come
//! from blocks that are still whole, which the scattered ones break up one at a time.

use super::span::HUGE_PAGES;
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

const BLOCK: usize = HUGE_PAGES as usize;

/// The free frames.
#[derive(Debug)]
pub(super) struct Frames {
    blocks: Vec<Block>,
    rng: ChaCha8Rng,
}

#[derive(Debug)]
struct Block {
    free: Vec<u16>,
}

impl Frames {
    /// `count` frames (whole blocks of 512), all free.
    pub fn new(count: u32, rng: ChaCha8Rng) -> Self {
        let whole = || Block { free: (0..BLOCK as u16).collect() };
        Self { blocks: (0..count as usize / BLOCK).map(|_| whole()).collect(), rng }
    }

    /// A free frame, from a block that is broken already if there is one.
    pub fn take(&mut self) -> Option<u32> {
        let broken = |block: &Block| !block.free.is_empty() && block.free.len() < BLOCK;
        let index = self.pick(broken).or_else(|| self.pick(|block| !block.free.is_empty()))?;
        let free = &mut self.blocks[index].free;
        let within = free.swap_remove(self.rng.random_range(0..free.len()));
        Some((index * BLOCK) as u32 + u32::from(within))
    }

    /// This frame, if it is free.
    pub fn take_exactly(&mut self, frame: u32) -> bool {
        let free = &mut self.blocks[frame as usize / BLOCK].free;
        let within = frame as usize % BLOCK;
        let at = free.iter().position(|free| usize::from(*free) == within);
        at.map(|at| free.swap_remove(at)).is_some()
    }

    /// The first of 512 contiguous, aligned free frames.
    pub fn take_huge(&mut self) -> Option<u32> {
        let index = self.pick(|block| block.free.len() == BLOCK)?;
        self.blocks[index].free.clear();
        Some((index * BLOCK) as u32)
    }

    /// Takes `frame` back.
    pub fn put(&mut self, frame: u32) {
        self.blocks[frame as usize / BLOCK].free.push((frame as usize % BLOCK) as u16);
    }

    pub fn is_free(&self, frame: u32) -> bool {
        let within = (frame as usize % BLOCK) as u16;
        self.blocks[frame as usize / BLOCK].free.contains(&within)
    }

    /// Frames that are free.
    pub fn free(&self) -> u64 {
        self.blocks.iter().map(|block| block.free.len() as u64).sum()
    }

    /// A random block that `fits`.
    fn pick(&mut self, fits: impl Fn(&Block) -> bool) -> Option<usize> {
        let count = self.blocks.iter().filter(|block| fits(block)).count();
        if count == 0 {
            return None;
        }
        let nth = self.rng.random_range(0..count);
        self.blocks.iter().enumerate().filter(|(_, block)| fits(block)).nth(nth).map(|(index, _)| index)
    }
}
