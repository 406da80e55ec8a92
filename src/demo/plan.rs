//! What the demo lays out, and what it changes.

use crate::mixed::{HUGE, Kind};

/// The smallest range that holds every kind of page.
pub const SMALLEST: u64 = 16 << 20;

/// The layout of `size` bytes: shares of each kind in whole huge pages, the rest never touched. With `hugetlb` one huge
/// page of the pool stands among them.
pub fn layout(size: u64, hugetlb: bool) -> Vec<(Kind, u64)> {
    let share = |eighths: u64| (size / 8 * eighths / HUGE * HUGE).max(HUGE);
    let mut parts = vec![
        (Kind::Anonymous, share(1)),
        (Kind::TransparentHuge, share(2)),
        (Kind::Shared, share(1)),
        (Kind::File, share(1)),
        (Kind::Hole, share(1)),
    ];
    if hugetlb {
        parts.push((Kind::Hugetlb, HUGE));
    }
    let used: u64 = parts.iter().map(|(_, len)| len).sum();
    parts.push((Kind::Untouched, size - used));
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_layout_fills_its_size_with_every_kind() {
        for size in [SMALLEST, SMALLEST + 4096, 100 << 20, 1 << 30] {
            for hugetlb in [false, true] {
                let parts = layout(size, hugetlb);
                assert_eq!(parts.iter().map(|(_, len)| len).sum::<u64>(), size);
                assert!(parts.iter().all(|(_, len)| *len > 0), "{size}: {parts:?}");
                let aligned = parts[..parts.len() - 1].iter().all(|(_, len)| len.is_multiple_of(HUGE));
                assert!(aligned, "parts begin on huge pages: {parts:?}");
            }
        }
    }
}
