//! Atomics, atomic writes and flushes: once each, whatever the link does, and refused where they are not allowed.

use crate::world::{ALL, Pair, Region, config};
use hw_model::hca::{
    Access, FaultOutcome, FaultPolicy, Feth, HcaConfig, Operation, PathMtu, Placement, PostError, QpChange,
    QpState, Selectivity, SendRequest, Status,
};
use hw_model::link::{Fabric, FaultyLink, LossRates};

fn small_packets() -> HcaConfig {
    HcaConfig { path_mtu: PathMtu::new(256).expect("an MTU"), ..config() }
}

struct Scene {
    pair: Pair,
    near: Region,
    far: Region,
}

impl Scene {
    fn new(config: HcaConfig) -> Self {
        Self::over(Pair::new(config), ALL)
    }
    fn over(pair: Pair, access: Access) -> Self {
        let near = pair.a.region(8192);
        let far = pair.b.region_at(0x5000, 0, 8192, access, pair.b.pd);
        Self { pair, near, far }
    }
    fn add(&mut self, at: u64, add: u64) -> Status {
        let sges = [self.near.sge(8, 8)];
        self.pair.ask(&SendRequest::fetch_add(1, &sges, self.far.remote(at), add))
    }
    fn swap(&mut self, at: u64, compare: u64, swap: u64) -> Status {
        let sges = [self.near.sge(8, 8)];
        self.pair.ask(&SendRequest::compare_swap(1, &sges, self.far.remote(at), compare, swap))
    }
    fn before(&self) -> u64 {
        self.pair.a.word(&self.near, 8)
    }
}

fn flush(placement: Placement, selectivity: Selectivity, remote: hw_model::hca::Remote) -> Operation {
    Operation::Flush { remote, length: 100, how: Feth { placement, selectivity } }
}

#[test]
fn a_word_is_changed_once_and_its_value_before_comes_back() {
    let mut scene = Scene::new(small_packets());
    scene.pair.b.fill(&scene.far, 64, &(u64::MAX - 1).to_le_bytes());
    assert_eq!(scene.add(64, 5), Status::Success);
    assert_eq!((scene.before(), scene.pair.b.word(&scene.far, 64)), (u64::MAX - 1, 3), "it wraps");
    assert_eq!(scene.swap(64, 3, 77), Status::Success);
    assert_eq!((scene.before(), scene.pair.b.word(&scene.far, 64)), (3, 77));
    assert_eq!(scene.swap(64, 3, 99), Status::Success);
    assert_eq!((scene.before(), scene.pair.b.word(&scene.far, 64)), (77, 77), "it was not equal");
    assert_eq!(
        scene.pair.b.word(&scene.far, 56) | scene.pair.b.word(&scene.far, 72),
        0,
        "a neighbour changed"
    );
}

#[test]
fn over_a_link_that_loses_duplicates_and_reorders_every_addition_counts_once() {
    let mut replayed = 0;
    for seed in 0..12 {
        let fabric = Fabric::new();
        let rates = LossRates { drop: 150, duplicate: 100, reorder: 100, ..LossRates::default() };
        let ends = [fabric.port(), fabric.port()].map(|port| Box::new(FaultyLink::new(port, rates, seed)));
        let [a, b] = ends;
        let pair = Pair::over(HcaConfig { retry_count: 100, ..small_packets() }, a, b);
        let mut scene = Scene::over(pair, ALL);
        let mut results = Vec::new();
        for n in 0..100_u64 {
            let sges = [scene.near.sge(8 * n, 8)];
            let request = SendRequest::fetch_add(n, &sges, scene.far.remote(0), 1);
            scene.pair.qa.post_send(&request).expect("posted");
        }
        scene.pair.run_without_faults();
        assert!(scene.pair.a.take().iter().all(|c| c.status == Status::Success));
        results.extend((0..100).map(|n| scene.pair.a.word(&scene.near, 8 * n)));
        assert_eq!(
            results,
            (0..100).collect::<Vec<_>>(),
            "seed {seed}: an addition was lost or counted twice"
        );
        assert_eq!(scene.pair.b.word(&scene.far, 0), 100);
        replayed += scene.pair.b.hca.stats().duplicates;
    }
    assert!(replayed > 50, "{replayed}: the responder was hardly asked twice");
}

#[test]
fn atomics_need_an_aligned_word_the_right_and_eight_bytes_to_come_back_to() {
    let mut scene = Scene::new(small_packets());
    assert_eq!(scene.add(4, 1), Status::RemoteInvalidRequestError);
    assert_eq!(scene.pair.b.hca.stats().naks_sent, 1);
    let mut scene = Scene::over(Pair::new(small_packets()), ALL - Access::REMOTE_ATOMIC);
    assert_eq!(scene.add(0, 1), Status::RemoteAccessError);
    let mut scene = Scene::new(small_packets());
    assert_eq!(scene.swap(8192, 0, 1), Status::RemoteAccessError, "beyond the region");
    let mut scene = Scene::new(small_packets());
    let closed = QpChange { access: Some(Access::REMOTE_READ), ..QpChange::to(QpState::ReadyToSend) };
    scene.pair.qb.modify(&closed).expect("rights can be changed later");
    assert_eq!(scene.add(0, 1), Status::RemoteInvalidRequestError, "the queue pair allows none");
    let scene = Scene::new(small_packets());
    let sges = [scene.near.sge(0, 7)];
    let refused = scene.pair.qa.post_send(&SendRequest::fetch_add(1, &sges, scene.far.remote(0), 1));
    assert!(matches!(refused, Err(PostError::NotAWord { bytes: 7, .. })), "{refused:?}");
}

#[test]
fn a_word_whose_address_is_aligned_and_whose_memory_is_not_is_refused() {
    let mut scene = Scene::new(small_packets());
    scene.far = scene.pair.b.region_at(0, 4, 4096, ALL, scene.pair.b.pd);
    assert_eq!(scene.add(0, 1), Status::RemoteInvalidRequestError);
    let mut scene = Scene::new(small_packets());
    // The first four bytes of this word are in one page, the rest in the next.
    scene.far = scene.pair.b.region_at(0, 4, 8192, ALL, scene.pair.b.pd);
    assert_eq!(scene.add(4088, 1), Status::RemoteInvalidRequestError);
}

#[test]
fn an_atomic_waits_for_its_page_and_is_done_once() {
    for policy in [FaultPolicy::NotReady, FaultPolicy::Wait] {
        let mut scene = Scene::new(HcaConfig { fault_policy: policy, ..small_packets() });
        scene.far.present(0, false);
        let sges = [scene.near.sge(0, 8)];
        let request = SendRequest::fetch_add(1, &sges, scene.far.remote(8), 3);
        scene.pair.qa.post_send(&request).expect("posted");
        let Scene { pair, far, .. } = &mut scene;
        let mut faults = 0;
        pair.run(|_, _| {
            faults += 1;
            far.present(0, true);
            FaultOutcome::Resolved
        });
        assert_eq!((faults, pair.a.take()[0].status), (1, Status::Success), "{policy:?}");
        assert_eq!(pair.b.word(far, 8), 3, "{policy:?}");
        far.absent(0);
        let request = SendRequest::fetch_add(2, &sges, far.remote(8), 3);
        pair.qa.post_send(&request).expect("posted");
        pair.run(|_, _| FaultOutcome::Failed);
        assert_eq!(pair.a.take()[0].status, Status::RemoteAccessError, "{policy:?}");
    }
}

#[test]
fn an_atomic_write_stores_one_word_and_is_answered_as_a_read_is() {
    let mut scene = Scene::new(small_packets());
    scene.pair.a.fill(&scene.near, 0, &0x1122_3344_5566_7788_u64.to_le_bytes());
    let sges = [scene.near.sge(0, 8)];
    let to = |at| Operation::AtomicWrite(scene.far.remote(at));
    let [aligned, not] = [16, 20].map(to);
    let inline = SendRequest::new(2, to(24), &[]).with_inline(&[9; 8]);
    scene.pair.b.memory.writes.lock().replace(Vec::new());
    assert_eq!(scene.pair.ask(&SendRequest::new(1, aligned, &sges)), Status::Success);
    let writes = scene.pair.b.memory.writes.lock().take().expect("recorded");
    assert_eq!(writes, [(scene.far.phys(16), 8)], "one store of eight bytes");
    assert_eq!(scene.pair.ask(&inline), Status::Success);
    assert_eq!(scene.pair.b.word(&scene.far, 16), 0x1122_3344_5566_7788);
    assert_eq!(scene.pair.b.bytes(&scene.far, 24, 8), [9; 8]);
    assert_eq!(scene.pair.ask(&SendRequest::new(3, not, &sges)), Status::RemoteInvalidRequestError);
}

#[test]
fn a_flush_ends_after_what_was_written_before_and_needs_its_right() {
    let mut scene = Scene::new(small_packets());
    let sges = [scene.near.sge(0, 100)];
    for (placement, selectivity) in [
        (Placement::GLOBAL, Selectivity::Range),
        (Placement::PERSISTENT, Selectivity::Region),
        (Placement::GLOBAL | Placement::PERSISTENT, Selectivity::Range),
    ] {
        let write = SendRequest::write(1, &sges, scene.far.remote(0));
        scene.pair.qa.post_send(&write).expect("posted");
        let request = SendRequest::new(2, flush(placement, selectivity, scene.far.remote(0)), &[]);
        scene.pair.qa.post_send(&request).expect("posted");
        scene.pair.run_without_faults();
        let ends: Vec<_> = scene.pair.a.take().iter().map(|c| (c.id.0, c.status)).collect();
        assert_eq!(ends, [(1, Status::Success), (2, Status::Success)]);
    }
    let nowhere = flush(Placement::GLOBAL, Selectivity::Range, scene.far.remote(8100));
    assert_eq!(scene.pair.ask(&SendRequest::new(1, nowhere, &[])), Status::RemoteAccessError);
    let mut scene = Scene::new(small_packets());
    let anywhere = flush(Placement::GLOBAL, Selectivity::Region, scene.far.remote(8100));
    assert_eq!(scene.pair.ask(&SendRequest::new(1, anywhere, &[])), Status::Success, "the whole region");
    let mut scene = Scene::over(Pair::new(small_packets()), ALL - Access::FLUSH_PERSISTENT);
    let persistent = flush(Placement::PERSISTENT, Selectivity::Range, scene.far.remote(0));
    assert_eq!(scene.pair.ask(&SendRequest::new(1, persistent, &[])), Status::RemoteAccessError);
    let mut scene = Scene::new(small_packets());
    let nothing = flush(Placement::empty(), Selectivity::Range, scene.far.remote(0));
    assert_eq!(scene.pair.ask(&SendRequest::new(1, nothing, &[])), Status::RemoteInvalidRequestError);
}

#[test]
fn a_fence_holds_a_write_back_until_the_atomics_before_it_have_ended() {
    let mut scene = Scene::new(small_packets());
    let sges = [scene.near.sge(0, 8)];
    scene.pair.qa.post_send(&SendRequest::fetch_add(1, &sges, scene.far.remote(0), 7)).expect("posted");
    // What the atomic brings back is what the write sends.
    scene.pair.b.fill(&scene.far, 0, &40_u64.to_le_bytes());
    let write = SendRequest { fence: true, ..SendRequest::write(2, &sges, scene.far.remote(800)) };
    scene.pair.qa.post_send(&write).expect("posted");
    scene.pair.run_without_faults();
    assert_eq!(scene.pair.b.word(&scene.far, 800), 40);
}
