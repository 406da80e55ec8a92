//! Random operations against a model that knows only bytes, everything stepped by one thread from one seed.

use super::world::{Counts, World};
use super::*;
use proptest::prelude::*;

fn run(seed: u64, steps: u32) -> Counts {
    let mut world = World::new(seed);
    world.run(steps);
    let (stats, counts) = world.tear_down();
    let fresh = machine(small(seed, FaultMode::Park)).host.stats();
    // The DMABUFs live on, in whichever place.
    assert!(stats.free_frames + 32 >= fresh.free_frames, "frames leaked: {stats:?}");
    assert_eq!(
        (stats.swap_slots, stats.free_device_pages, stats.processes, stats.parked),
        (fresh.swap_slots, fresh.free_device_pages, 0, 0)
    );
    counts
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, max_shrink_iters: 400, ..ProptestConfig::default() })]
    /// If this fails, a page shows wrong bytes to its process or to a device, or went away under a translation.
    #[test]
    fn program_and_device_see_the_bytes_of_the_model(seed in any::<u64>(), steps in 1_u32..600) {
        run(seed, steps);
    }
}

/// A model that never does a thing proves nothing of it.
#[test]
fn every_kind_of_change_and_of_access_happens() {
    let mut total = Counts::new();
    for seed in 0..40 {
        for (what, count) in run(seed, 600) {
            *total.entry(what).or_default() += count;
        }
    }
    println!("{total:#?}");
    for what in [
        "abandoned changes",
        "bursts across steps",
        "collapsed",
        "cpu accesses",
        "device accesses",
        "discarded",
        "dma from the zero page",
        "dma to anonymous",
        "dma to coherent device memory",
        "dma to dmabuf in system memory",
        "dma to dmabuf in the BAR",
        "dma to file",
        "dma to hugetlb",
        "dma to private encrypted memory",
        "dma to shared",
        "dma to shared encrypted memory",
        "dma to transparent huge",
        "encrypted",
        "ended processes",
        "evicted",
        "forked",
        "lent",
        "mapped",
        "migrated",
        "moved from a device",
        "moved mappings",
        "moved to a device",
        "moved to system memory",
        "moved to another node",
        "moved to the BAR",
        "pinned",
        "prefetches",
        "protected",
        "punched",
        "refused accesses",
        "refused changes",
        "removed",
        "split",
        "swapped out",
        "truncated",
        "unmapped",
        "waits for a burst",
        "written back",
    ] {
        assert!(total.contains_key(what), "{what} never happened");
    }
}
