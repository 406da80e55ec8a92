//! How often each address is covered by a set of ranges that come and go.

use hw_model::addr::{VirtAddr, VirtRange};
use std::collections::BTreeMap;

/// Counts of covers, as a step function: the count from each edge up to the next. Below the first edge it is 0, the last
/// edge's count is 0, and neighbouring counts differ.
#[derive(Debug, Default)]
pub(super) struct Coverage {
    edges: BTreeMap<u64, u64>,
}

impl Coverage {
    /// Covers `range` once more; hands the parts that were not covered before to `fresh`.
    pub(super) fn add(&mut self, range: VirtRange, mut fresh: impl FnMut(VirtRange)) {
        self.change(
            range,
            |count| {
                *count += 1;
                *count == 1
            },
            &mut fresh,
        );
    }

    /// Covers `range` once less; hands the parts that are not covered any more to `bare`.
    ///
    /// # Panics
    /// If part of it was not covered.
    pub(super) fn remove(&mut self, range: VirtRange, mut bare: impl FnMut(VirtRange)) {
        self.change(
            range,
            |count| {
                *count = count.checked_sub(1).expect("what is uncovered was covered");
                *count == 0
            },
            &mut bare,
        );
    }

    /// Places where the count changes.
    pub(super) fn edges(&self) -> usize {
        self.edges.len()
    }

    /// Hands the covered parts of `range` to `part`.
    pub(super) fn covered(&self, range: VirtRange, mut part: impl FnMut(VirtRange)) {
        let mut join = Join::new();
        let before = self.edges.range(..=range.start().0).next_back();
        let inside =
            self.edges.range(range.start().0..range.end().0).filter(|(at, _)| **at > range.start().0);
        let mut steps = before.into_iter().chain(inside).peekable();
        while let Some((&at, &count)) = steps.next() {
            let end = steps.peek().map_or(range.end().0, |(next, _)| **next);
            if count > 0 {
                join.push(at.max(range.start().0), end, &mut part);
            }
        }
        join.finish(&mut part);
    }

    fn change(
        &mut self,
        range: VirtRange,
        step: impl Fn(&mut u64) -> bool,
        crossed: &mut impl FnMut(VirtRange),
    ) {
        let (start, end) = (range.start().0, range.end().0);
        for edge in [start, end] {
            let count = self.edges.range(..=edge).next_back().map_or(0, |(_, count)| *count);
            self.edges.entry(edge).or_insert(count);
        }
        let mut join = Join::new();
        let mut steps = self.edges.range_mut(start..=end).peekable();
        while let Some((&at, count)) = steps.next() {
            if let Some(next) = steps.peek().map(|(next, _)| **next)
                && step(count)
            {
                join.push(at, next, crossed);
            }
        }
        join.finish(crossed);
        // Edges between equal counts are no edges.
        let mut count = self.edges.range(..start).next_back().map_or(0, |(_, count)| *count);
        let mut flat = Vec::new();
        for (&at, &here) in self.edges.range(start..=end) {
            if here == count {
                flat.push(at);
            }
            count = here;
        }
        for at in flat {
            self.edges.remove(&at);
        }
    }
}

/// Joins neighbouring parts into one.
struct Join {
    open: Option<(u64, u64)>,
}

impl Join {
    fn new() -> Self {
        Self { open: None }
    }

    fn push(&mut self, start: u64, end: u64, out: &mut impl FnMut(VirtRange)) {
        match &mut self.open {
            Some((_, last)) if *last == start => *last = end,
            _ => {
                self.finish(out);
                self.open = Some((start, end));
            }
        }
    }

    fn finish(&mut self, out: &mut impl FnMut(VirtRange)) {
        if let Some((start, end)) = self.open.take() {
            out(VirtRange::new(VirtAddr(start), end - start).expect("parts of a range"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn range(start: u64, len: u64) -> VirtRange {
        VirtRange::new(VirtAddr(start), len).expect("fits")
    }

    proptest! {
        /// Parts come out exactly where a count leaves or reaches zero, joined, and the covered parts are those above it.
        #[test]
        fn coverage_counts_as_an_array_does(ranges in prop::collection::vec((0u64..60, 1u64..20), 1..40)) {
            let mut coverage = Coverage::default();
            let mut counts = [0u32; 80];
            let bits = |parts: &[VirtRange]| {
                let mut bits = [false; 80];
                for part in parts {
                    (part.start().0..part.end().0).for_each(|at| bits[at as usize] = true);
                }
                bits
            };
            let steps = ranges.iter().map(|r| (*r, true)).chain(ranges.iter().map(|r| (*r, false)));
            for ((start, len), add) in steps {
                let mut parts = Vec::new();
                let mut expected = [false; 80];
                for at in start..start + len {
                    let count = &mut counts[at as usize];
                    if add { *count += 1 } else { *count -= 1 }
                    expected[at as usize] = *count == u32::from(add);
                }
                if add {
                    coverage.add(range(start, len), |part| parts.push(part));
                } else {
                    coverage.remove(range(start, len), |part| parts.push(part));
                }
                prop_assert_eq!(bits(&parts), expected);
                prop_assert!(parts.windows(2).all(|pair| pair[0].end() < pair[1].start()), "{:?}", parts);
                let mut covered = Vec::new();
                coverage.covered(range(0, 80), |part| covered.push(part));
                prop_assert_eq!(bits(&covered), counts.map(|count| count > 0));
            }
            prop_assert!(coverage.edges.is_empty());
        }
    }
}
