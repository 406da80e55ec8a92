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
    /// The blocks are shared out evenly among so many nodes, in ascending order.
    nodes: usize,
    rng: ChaCha8Rng,
}

#[derive(Debug)]
struct Block {
    free: Vec<u16>,
}

impl Frames {
    /// `count` frames (whole blocks of 512) of `nodes` nodes, at least one, all free.
    pub fn new(count: u32, nodes: u32, rng: ChaCha8Rng) -> Self {
        let whole = || Block { free: (0..BLOCK as u16).collect() };
        let blocks: Vec<_> = (0..count as usize / BLOCK).map(|_| whole()).collect();
        Self { nodes: (nodes as usize).clamp(1, blocks.len().max(1)), blocks, rng }
    }

    pub fn nodes(&self) -> u32 {
        self.nodes as u32
    }

    /// The node that `frame` is of.
    pub fn node(&self, frame: u32) -> u32 {
        (frame as usize / BLOCK * self.nodes / self.blocks.len()) as u32
    }

    /// A free frame, of `node` if one is asked for, from a block that is broken already if there is one.
    pub fn take(&mut self, node: Option<u32>) -> Option<u32> {
        let broken = |block: &Block| !block.free.is_empty() && block.free.len() < BLOCK;
        let index = self.pick(node, broken).or_else(|| self.pick(node, |block| !block.free.is_empty()))?;
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

    /// The first of 512 contiguous, aligned free frames, likewise.
    pub fn take_huge(&mut self, node: Option<u32>) -> Option<u32> {
        let index = self.pick(node, |block| block.free.len() == BLOCK)?;
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

    /// A random block of `node`, or of any, that `fits`.
    fn pick(&mut self, node: Option<u32>, fits: impl Fn(&Block) -> bool) -> Option<usize> {
        let (blocks, nodes) = (&self.blocks, self.nodes);
        let of_node = |index: usize| node.is_none_or(|node| index * nodes / blocks.len() == node as usize);
        let fitting = || {
            let all = blocks.iter().enumerate();
            all.filter(|(index, block)| of_node(*index) && fits(block)).map(|(index, _)| index)
        };
        let count = fitting().count();
        if count == 0 {
            return None;
        }
        let nth = self.rng.random_range(0..count);
        fitting().nth(nth)
    }
}
