//! What the memory alone costs: the lines of the cache that a write over many queue pairs and regions has to have, read in the
//! order in which one names the next, and nothing done with them. No device whose state takes as many lines does better.

/// A line of the cache.
#[derive(Clone)]
#[repr(align(64))]
struct Line([u64; 8]);

/// Elements that are found one behind the other: what is read of an element of one row names one of the next row. Its lines
/// are read together.
struct Chain(Vec<(usize, Vec<Line>)>);

impl Chain {
    /// So many elements in each row, of so many lines.
    fn new(count: usize, lines: &[usize]) -> Self {
        let row = |&lines: &usize| {
            let row = (0..count * lines).map(|line| Line([(line / lines) as u64, 0, 0, 0, 0, 0, 0, 0]));
            (lines, row.collect())
        };
        Self(lines.iter().map(row).collect())
    }

    /// Reads element `index` of each row. Gives 0, which only who has read it all knows.
    fn read(&self, mut index: usize) -> usize {
        let mut zero = 0;
        for (lines, row) in &self.0 {
            let element = &row[index * lines..(index + 1) * lines];
            zero |= element.iter().fold(0, |zero, line| zero | line.0[1]);
            index = element[0].0[0] as usize;
        }
        zero as usize
    }
}

/// The lines of both ends of the queue pairs, and of the regions at either.
pub struct Floor {
    queue_pairs: Chain,
    regions: [Chain; 2],
    counts: (usize, usize),
    turn: usize,
}

impl Floor {
    /// The handle names the state of both ends (500 bytes and 250 each), which name their rings. Of a region there is the
    /// word that finds its key, the key, and its page list.
    pub fn new(queue_pairs: usize, regions: usize) -> Self {
        Self {
            queue_pairs: Chain::new(queue_pairs, &[2, 24, 6]),
            regions: [(); 2].map(|()| Chain::new(regions, &[1, 1, 1])),
            counts: (queue_pairs, regions),
            turn: 0,
        }
    }

    /// What `writes` writes on one queue pair have to have read. One begins when the one before is over.
    pub fn read(&mut self, writes: usize) {
        let (queue_pairs, regions) = self.counts;
        let mut zero = self.queue_pairs.read(self.turn / writes % queue_pairs);
        for write in 0..writes {
            let region = (self.turn + write).wrapping_mul(7919) % regions;
            zero |= self.regions[0].read(region) | self.regions[1].read(region);
        }
        self.turn += writes + zero;
    }
}
