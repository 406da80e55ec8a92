//! What every 64-bit word of the region may hold.
//!
//! A page is written by RDMA with a pattern that depends on the seed, the version of the write and the place, and dropped
//! by the application now and then, which brings back what lies behind it: zeroes, or the file. Where a write and a drop
//! of one page ran at the same time, each word may be any of what it was, what was written, and what lies behind.

use crate::mixed::{Kind, file_word};

/// What a word was last set by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// An RDMA write of this version.
    Written(u32),
    /// Nothing: what lies behind the page.
    Behind,
}

/// The possible contents of every page.
#[derive(Debug)]
pub struct Oracle {
    seed: u64,
    pages: Vec<Vec<Source>>,
    /// First word of the file part, and the kinds of pages.
    kinds: Vec<Kind>,
    file_start: u64,
}

/// A word that holds something it cannot hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, schemars::JsonSchema)]
pub struct Mismatch {
    /// Offset of the word in the region, in bytes.
    pub offset: u64,
    /// What it holds.
    pub found: u64,
    /// One of the values it may hold.
    pub expected: u64,
}

impl Oracle {
    /// Pages of the given kinds, never written.
    pub fn new(seed: u64, kinds: Vec<Kind>) -> Self {
        let file_start = kinds.iter().position(|kind| *kind == Kind::File).unwrap_or(0) as u64;
        Self { seed, pages: vec![vec![Source::Behind]; kinds.len()], kinds, file_start }
    }

    /// The word at `word` (counted from the start of the region) as version `version` writes it. Never 0, so that it
    /// differs from an untouched page.
    pub fn pattern(&self, version: u32, word: u64) -> u64 {
        let mixed =
            (word ^ self.seed.rotate_left(17) ^ u64::from(version) << 40).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (mixed ^ (mixed >> 29)) | 1 << 63
    }

    fn value(&self, source: Source, word: u64) -> u64 {
        let page = word / 512;
        match source {
            Source::Written(version) => self.pattern(version, word),
            Source::Behind if self.kinds[page as usize] == Kind::File => {
                file_word(word - self.file_start * 512)
            }
            Source::Behind => 0,
        }
    }

    /// Notes what a round did to `page`: whether a write of `version` covered it, and whether it was dropped.
    pub fn after_round(&mut self, page: u64, written: Option<u32>, dropped: bool) {
        let sources = &mut self.pages[page as usize];
        match (written, dropped) {
            (None, false) => {}
            (Some(version), false) => *sources = vec![Source::Written(version)],
            (None, true) => *sources = vec![Source::Behind],
            (Some(version), true) => {
                for source in [Source::Written(version), Source::Behind] {
                    if !sources.contains(&source) {
                        sources.push(source);
                    }
                }
            }
        }
    }

    /// Holds `bytes`, which were read at `offset` (both whole words), against what may be there. Gives how many words are
    /// wrong, and the first.
    pub fn check(&self, offset: u64, bytes: &[u8]) -> (u64, Option<Mismatch>) {
        let (mut wrong, mut first) = (0, None);
        for (index, chunk) in bytes.chunks_exact(8).enumerate() {
            let word = offset / 8 + index as u64;
            let found = u64::from_le_bytes(chunk.try_into().expect("eight bytes"));
            let sources = &self.pages[(word / 512) as usize];
            if !sources.iter().any(|&source| self.value(source, word) == found) {
                wrong += 1;
                first.get_or_insert(Mismatch {
                    offset: word * 8,
                    found,
                    expected: self.value(sources[0], word),
                });
            }
        }
        (wrong, first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(oracle: &Oracle, source: Source, page: u64) -> Vec<u8> {
        (page * 512..page * 512 + 512).flat_map(|word| oracle.value(source, word).to_le_bytes()).collect()
    }

    #[test]
    fn only_what_a_page_may_hold_is_accepted() {
        let mut oracle = Oracle::new(1, vec![Kind::Anonymous, Kind::File]);
        assert_eq!(oracle.check(0, &[0; 4096]), (0, None));
        assert_eq!(oracle.check(4096, &[0; 4096]).0, 512, "a file page is not zero");
        oracle.after_round(0, Some(3), false);
        assert_eq!(oracle.check(0, &[0; 4096]).0, 512, "a written page is no longer zero");
        assert_eq!(oracle.check(0, &bytes(&oracle, Source::Written(3), 0)).0, 0);
        oracle.after_round(0, Some(4), true);
        for source in [Source::Written(3), Source::Written(4), Source::Behind] {
            assert_eq!(oracle.check(0, &bytes(&oracle, source, 0)).0, 0, "{source:?}");
        }
        assert_eq!(oracle.check(0, &bytes(&oracle, Source::Written(5), 0)).0, 512);
    }

    #[test]
    fn a_page_of_another_place_is_a_mismatch() {
        let mut oracle = Oracle::new(9, vec![Kind::Anonymous; 2]);
        oracle.after_round(0, Some(1), false);
        oracle.after_round(1, Some(1), false);
        let other = bytes(&oracle, Source::Written(1), 1);
        let (wrong, first) = oracle.check(0, &other);
        assert_eq!((wrong, first.map(|first| first.offset)), (512, Some(0)), "page 1's bytes in page 0");
    }
}
