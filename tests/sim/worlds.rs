//! Whole runs.

use anypage::sim::runner::{run_all, run_seed, run_trace};
use anypage::sim::{Choices, Options, World};

const STEPS: usize = 1500;

#[test]
fn two_hundred_seeds_are_clean_and_everything_happens_in_them() {
    let tally = run_all(1..=200, 2, STEPS, &Options::default(), |_| {});
    assert!(tally.failed.is_none(), "replay with `anypage sim --steps {STEPS}`: {:?}", tally.failed);
    assert_eq!(tally.runs, 200);
    let happened = [
        "steps",
        "packets sent",
        "packets lost",
        "packets mangled",
        "packets delivered twice",
        "packets overtaken",
        "page faults",
        "invalidations",
        "invalidations of regions",
        "type changes",
        "entries relinked",
        "injected failures",
        "faults that waited for an invalidation",
        "faults that lost a race",
        "changes that waited for a burst",
        "changes given up",
        "requests: success",
        "requests: remote access error",
        "requests: flushed",
        "registrations that failed",
        "processes ended",
        "buffers revoked",
        "pages migrated",
        "changes: lent",
        "changes: moved to a node",
        "changes: device emptied",
        "changes: written back",
        "changes made at once",
        "changes that could not wait",
        "ranges pinned",
        "pages lost",
        "writes of a GPU",
        "writes of a GPU in its own memory",
        "migrations refused because of a pin",
        "bytes verified",
        "implicit regions registered",
        "implicit regions deregistered",
        "parts of implicit regions made",
        "empty parts taken away",
        "regions in hugetlb pages",
        "registrations of what is not hugetlb",
        "huge entries published",
        "huge entries relinked",
        "regions moved to other memory",
        "regions with other rights",
        "reregistrations that failed",
        "verbs: atomic write",
        "verbs: bind",
        "verbs: compare and swap",
        "verbs: datagram",
        "verbs: fast registration",
        "verbs: fetch and add",
        "verbs: flush",
        "verbs: local invalidate",
        "verbs: send with invalidate",
        "verbs: unreliable send",
        "verbs: unreliable write",
        "receives of unreliable services",
    ];
    let never: Vec<_> = happened.into_iter().filter(|what| tally.counts.get(what) == 0).collect();
    assert!(never.is_empty(), "these never happened, so nothing is known of them: {never:?}");
}

#[test]
fn the_same_seed_does_the_same_twice() {
    for seed in [3, 17] {
        let (first, second) =
            (run_seed(seed, STEPS, &Options::default()), run_seed(seed, STEPS, &Options::default()));
        assert_eq!(first.digest, second.digest, "seed {seed}");
        assert_eq!(first.counts, second.counts, "seed {seed}");
    }
    let others = [1, 2].map(|seed| run_seed(seed, STEPS, &Options::default()).digest);
    assert_ne!(others[0], others[1], "two seeds did the same: the digest sees nothing");
}

#[test]
fn a_trace_does_what_its_run_did() {
    let mut world = World::new(Choices::random(5), &Options::default()).expect("a world");
    for _ in 0..STEPS {
        world.step().expect("seed 5 is clean");
    }
    let trace = world.trace().clone();
    world.settle().expect("seed 5 is clean");
    let replayed = run_trace(&trace, &Options::default());
    assert!(replayed.failure.is_none(), "{:?}", replayed.failure);
    assert_eq!(replayed.counts.get("requests posted"), world.counts().get("requests posted"));
    assert_eq!(replayed.counts.get("entries relinked"), world.counts().get("entries relinked"));
}

#[test]
fn with_every_link_failing_nothing_is_left_behind() {
    let options = Options { plan: Some(vec![("dma.*".to_owned(), 0.5)]), log: false };
    let tally = run_all(1..=10, 2, STEPS, &options, |_| {});
    assert!(tally.failed.is_none(), "{:?}", tally.failed);
    assert!(tally.counts.get("injected failures") > 0);
}
