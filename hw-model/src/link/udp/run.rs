//! Runs of datagrams that the kernel cuts: all as long as the first, but for the last, which may be shorter.

use std::ops::Range;

/// The most that the kernel takes in one run (UDP_MAX_SEGMENTS was 64 when UDP_SEGMENT came).
const MOST: usize = 64;
/// Bytes of the longest run: what an IP packet can hold.
const MOST_BYTES: usize = 65_000;

/// A run of datagrams.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// Which of the datagrams.
    pub(super) members: Range<usize>,
    /// Bytes of each but the last.
    pub(super) segment: usize,
}

/// Cuts datagrams, given by key and length, into runs of one key.
pub(super) fn runs<K: PartialEq>(datagrams: &[(K, usize)], offload: bool, out: &mut Vec<Run>) {
    out.clear();
    let mut at = 0;
    while let Some((key, segment)) = datagrams.get(at) {
        let mut end = at + 1;
        let mut bytes = *segment;
        while offload
            && end - at < MOST
            && let Some((next, length)) = datagrams.get(end)
            && next == key
            && length <= segment
            // A shorter one was the last.
            && datagrams[end - 1].1 == *segment
            && bytes + length <= MOST_BYTES
        {
            bytes += length;
            end += 1;
        }
        out.push(Run { members: at..end, segment: *segment });
        at = end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(lengths: &[(char, usize)], offload: bool) -> Vec<(usize, usize)> {
        let mut out = Vec::new();
        runs(lengths, offload, &mut out);
        out.into_iter().map(|run| (run.members.len(), run.segment)).collect()
    }

    #[test]
    fn only_the_last_of_a_run_is_shorter_and_none_is_longer() {
        let lengths = [('a', 30), ('a', 20), ('a', 20), ('a', 20), ('a', 5), ('a', 5), ('a', 6), ('b', 6)];
        assert_eq!(cut(&lengths, true), [(2, 30), (3, 20), (1, 5), (1, 6), (1, 6)]);
        assert_eq!(cut(&lengths, false).len(), lengths.len());
        assert_eq!(cut(&[], true), []);
    }

    #[test]
    fn no_run_is_longer_than_the_kernel_takes() {
        assert_eq!(cut(&[('a', 4112); 16], true), [(15, 4112), (1, 4112)]);
        assert_eq!(cut(&[('a', 20); 65], true), [(64, 20), (1, 20)]);
    }
}
