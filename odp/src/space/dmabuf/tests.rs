//! Buffers by themselves: what importers are told and given, step by step. Regions over them are in tests/it.

use super::*;
use crate::fault::Progress;
use crate::notifier::{Notify, Raise};
use crate::page::{Backing, PageRun};
use crate::space::sim::{SimConfig, SimHost};
use crate::space::{Access, AddressSpace, FaultError, WatchError, Withdrawn};
use hw_model::addr::{PAGE_SIZE, PhysAddr, VirtAddr, VirtRange, page_bytes};
use hw_model::bus::{Bar, Bus, DeviceSpec, HostMemory};
use hw_model::fault_plan::{Action, FaultPlan, Points, Rule};
use hw_model::sync::atomic::{AtomicU64, Ordering};
use hw_model::sync::{Arc, Mutex};
use std::ops::Range;
use std::time::Duration;

const PAGES: u64 = 8;

struct World {
    host: Arc<SimHost>,
    bar: Arc<Bar>,
}

impl World {
    fn new() -> Self {
        let config = SimConfig { ram_pages: 512, ..SimConfig::default() };
        let host = SimHost::new(config).expect("memory");
        let bus = Bus::new(Arc::clone(&host) as Arc<dyn HostMemory>);
        let gpu = bus.attach(DeviceSpec::new("gpu")).expect("room");
        let bar = bus.add_ram_bar(gpu.device(), page_bytes(2 * PAGES)).expect("room");
        Self { host, bar }
    }

    fn part(&self) -> BarPart {
        BarPart::new(&self.bar, page_bytes(PAGES), page_bytes(PAGES)).expect("in the BAR")
    }

    fn export(&self, options: MigratingOptions) -> Arc<Migrating> {
        let system = self.host.system_pages(PAGES).expect("frames");
        Migrating::export(system, self.part(), options).expect("a buffer")
    }
}

fn stepped(buffer: &Arc<Dmabuf>, mode: ImportMode) -> Arc<DmabufSpace> {
    let options = ImportOptions::new(mode).with_patience(Duration::ZERO);
    buffer.attach(options).expect("it lives")
}

fn range(pages: Range<u64>) -> VirtRange {
    VirtRange::new(VirtAddr::from_page_number(pages.start), page_bytes(pages.end - pages.start))
        .expect("fits")
}

fn fault(space: &DmabufSpace, pages: Range<u64>, access: Access) -> Result<Vec<PageRun>, FaultError> {
    let mut runs = Vec::new();
    space.fault(range(pages), access, &mut runs).map(|()| runs)
}

fn kinds(runs: &[PageRun]) -> Vec<(u64, Backing)> {
    let mut kinds: Vec<(u64, Backing)> = Vec::new();
    for run in runs {
        match kinds.last_mut() {
            Some((pages, backing)) if *backing == run.backing => *pages += run.pages,
            _ => kinds.push((run.pages, run.backing)),
        }
    }
    kinds
}

/// An importer that notes what it is told.
#[derive(Default)]
struct Importer(Mutex<Vec<(&'static str, VirtRange)>>);

impl Notify for Importer {
    fn clear(&self, range: VirtRange, raise: Raise<'_>) {
        raise.raise();
        self.0.lock().push(("clear", range));
    }
    fn unlink(&self, range: VirtRange) {
        self.0.lock().push(("unlink", range));
    }
}

impl Importer {
    fn told(&self) -> Vec<(&'static str, VirtRange)> {
        std::mem::take(&mut self.0.lock())
    }
}

#[test]
fn a_move_tells_importers_waits_for_dma_and_gives_the_pages_when_their_bytes_have_come() {
    let world = World::new();
    let gpu = world.export(MigratingOptions::default());
    gpu.write_at(page_bytes(2) + 5, &[0x77; 3]).expect("in the buffer");
    let space = stepped(gpu.buffer(), ImportMode::Dynamic);
    let importer = Arc::new(Importer::default());
    let interval = space.notifiers().register(range(0..PAGES), Arc::clone(&importer) as _);
    let stale = fault(&space, 2..3, Access::Write).expect("there")[0];
    assert_eq!((stale.backing, stale.provider), (Backing::DmabufSystem, None));

    let mut engine = world.host.epoch().register().expect("room");
    engine.begin().expect("open");
    let mut migration = gpu.begin_migration(2..4, PagePlace::Peer).expect("in the buffer");
    let in_flight = gpu.buffer().in_flight();
    assert_eq!(migration.poll(), Ok(Progress::Again));
    assert_eq!(importer.told(), [("clear", range(2..4))], "told, and only of what moves");
    assert_eq!(migration.poll(), Ok(Progress::Blocked));
    assert!(!in_flight.is_signalled() && importer.told().is_empty(), "a burst is under way");
    engine.end();
    assert!(in_flight.is_signalled());
    assert_eq!(migration.poll(), Ok(Progress::Again));
    assert_eq!(importer.told(), [("unlink", range(2..4))]);

    // At the new place, but without its bytes: nobody is given it, the pages beside it are there.
    let busy = FaultError::Busy { at: VirtAddr(page_bytes(2)) };
    assert_eq!(fault(&space, 0..PAGES, Access::Read), Err(busy));
    assert_eq!(kinds(&fault(&space, 4..6, Access::Read).expect("there")), [(2, Backing::DmabufSystem)]);
    let mut present = Vec::new();
    space.snapshot(range(0..PAGES), &mut present).expect("mapped");
    assert_eq!(present.iter().map(|run| run.pages).sum::<u64>(), PAGES - 2, "without the two on their way");
    assert_eq!(gpu.read_at(page_bytes(3), &mut [0]), Err(AccessError::Moving { page: 3 }));
    while migration.poll() == Ok(Progress::Again) {}
    assert_eq!(migration.poll(), Ok(Progress::Done(2)));

    let runs = fault(&space, 0..PAGES, Access::Write).expect("there");
    let expected = [(2, Backing::DmabufSystem), (2, Backing::DmabufPeer), (PAGES - 4, Backing::DmabufSystem)];
    assert_eq!(kinds(&runs), expected);
    let peer = runs.iter().find(|run| run.backing == Backing::DmabufPeer).expect("seen above");
    assert_eq!(
        (peer.phys, peer.provider),
        (world.bar.base().offset(page_bytes(PAGES + 2)), Some(world.bar.provider()))
    );
    let mut bytes = [0; 3];
    gpu.read_at(page_bytes(2) + 5, &mut bytes).expect("in the buffer");
    assert_eq!(bytes, [0x77; 3], "the bytes came along");
    world.host.read(stale.phys.offset(5), &mut bytes).expect("the driver has the frame still");
    assert_eq!(bytes, [0xdb; 3], "who goes to the old place sees that it is the wrong one");
    let stats = gpu.buffer().stats();
    assert_eq!((stats.moves, stats.pages_moved, stats.moving), (1, 2, 0));
    assert!(stats.waits >= 1);
    drop(interval);
}

#[test]
fn several_importers_cost_one_drain() {
    let world = World::new();
    let gpu = world.export(MigratingOptions::default());
    let importers: Vec<_> = (0..3)
        .map(|_| {
            let space = stepped(gpu.buffer(), ImportMode::Dynamic);
            let importer = Arc::new(Importer::default());
            let interval = space.notifiers().register(range(0..PAGES), Arc::clone(&importer) as _);
            (space, importer, interval)
        })
        .collect();
    let drains = world.host.epoch().drain_count();
    assert_eq!(gpu.migrate(1..2, PagePlace::Peer), Ok(1));
    assert_eq!(world.host.epoch().drain_count(), drains + 1);
    for (_, importer, _) in &importers {
        assert_eq!(importer.told(), [("clear", range(1..2)), ("unlink", range(1..2))]);
    }
    assert_eq!(gpu.buffer().stats().attachments, 3);
    assert_eq!(gpu.migrate(0..2, PagePlace::Peer), Ok(1), "the other is there");
    assert_eq!(importers[0].1.told(), [("clear", range(0..1)), ("unlink", range(0..1))]);
    drop(importers);
    assert_eq!(gpu.buffer().stats().attachments, 0);
}

#[test]
fn a_pin_keeps_its_pages_and_says_how_many_are_in_the_way() {
    let world = World::new();
    let gpu = world.export(MigratingOptions::default());
    let space = stepped(gpu.buffer(), ImportMode::Pinned);
    let first = space.watch(range(2..4)).expect("nothing moves");
    let second = space.watch(range(3..6)).expect("nothing moves");
    let refused = |pages: Range<u64>, by| MoveError::Pinned { pages, by }.into();
    assert_eq!(gpu.migrate(3..4, PagePlace::Peer), Err::<u64, MigrationError>(refused(3..4, 2)));
    assert_eq!(gpu.migrate(0..PAGES, PagePlace::Peer), Err(refused(0..PAGES, 2)));
    assert_eq!(gpu.migrate(6..PAGES, PagePlace::Peer), Ok(2), "what nobody pinned moves");
    drop(second);
    assert_eq!(gpu.migrate(2..3, PagePlace::Peer), Err(refused(2..3, 1)));
    assert_eq!(gpu.migrate(4..6, PagePlace::Peer), Ok(2));
    assert_eq!(gpu.buffer().begin_revoke().unwrap_err(), RevokeError::Pinned { by: 1 });
    drop(first);
    assert_eq!(gpu.migrate(0..PAGES, PagePlace::Peer), Ok(4));
    let stats = gpu.buffer().stats();
    assert_eq!((stats.pins, stats.watches, stats.moves_refused), (0, 0, 3));
    gpu.buffer().revoke().expect("nobody pins it any more");
}

#[test]
fn pages_that_are_being_moved_are_neither_pinned_nor_moved_again() {
    let world = World::new();
    let gpu = world.export(MigratingOptions::default());
    let space = stepped(gpu.buffer(), ImportMode::Pinned);
    let mut migration = gpu.begin_migration(0..2, PagePlace::Peer).expect("in the buffer");
    assert_eq!(migration.poll(), Ok(Progress::Again));
    assert_eq!(migration.under_way(), Some(0..2));
    assert_eq!(space.watch(range(1..3)).unwrap_err(), WatchError::Moving { range: range(1..3) });
    let again = gpu.buffer().begin_move(1..2).unwrap_err();
    assert_eq!(again, MoveError::Moving { pages: 1..2 });
    drop(migration);
    assert_eq!(gpu.place(0), Some(PagePlace::System), "given up: nothing has moved");
    assert_eq!(gpu.buffer().stats().moving, 0);
    let pin = space.watch(range(1..3)).expect("the move was given up");
    assert_eq!(gpu.buffer().stats().pins, 1);
    drop(pin);
    // Given up while bytes are on their way: they arrive all the same.
    gpu.write_at(page_bytes(1), &[9]).expect("in the buffer");
    let mut migration = gpu.begin_migration(0..2, PagePlace::Peer).expect("in the buffer");
    while migration.under_way() != Some(1..2) {
        assert_eq!(migration.poll(), Ok(Progress::Again));
    }
    drop(migration);
    assert_eq!((gpu.place(0), gpu.place(1)), (Some(PagePlace::Peer), Some(PagePlace::Peer)));
    let mut byte = [0];
    gpu.read_at(page_bytes(1), &mut byte).expect("it has arrived");
    assert_eq!(byte, [9]);
}

#[test]
fn a_copy_that_fails_leaves_the_page_where_its_bytes_are() {
    let world = World::new();
    let plan = FaultPlan::new(0, vec![Rule::nth("odp.dmabuf.copy", 2, Action::Fail)]);
    let gpu = world.export(MigratingOptions { points: Points::with(&plan), ..MigratingOptions::default() });
    for page in 0..PAGES {
        gpu.write_at(page_bytes(page), &[page as u8 + 1]).expect("in the buffer");
    }
    let failed = gpu.migrate(0..4, PagePlace::Peer).unwrap_err();
    assert!(matches!(failed, MigrationError::Copy { page: 1, .. }), "{failed}");
    let places: Vec<_> = (0..4).filter_map(|page| gpu.place(page)).collect();
    assert_eq!(places, [PagePlace::Peer, PagePlace::System, PagePlace::System, PagePlace::System]);
    let space = stepped(gpu.buffer(), ImportMode::Dynamic);
    assert_eq!(
        kinds(&fault(&space, 0..4, Access::Write).expect("nothing is on its way")),
        [(1, Backing::DmabufPeer), (3, Backing::DmabufSystem)]
    );
    assert_eq!(gpu.migrate(0..4, PagePlace::Peer), Ok(3), "and it can be tried again");
    for page in 0..PAGES {
        let mut byte = [0];
        gpu.read_at(page_bytes(page), &mut byte).expect("in the buffer");
        assert_eq!(byte, [page as u8 + 1], "page {page}");
    }
}

/// A second migration takes a page whose bytes the first is still bringing. The first fails and leaves the page where it was,
/// which is where the second was to bring it: there is nothing to copy, least of all what the page was to be.
#[test]
fn a_migration_behind_one_that_fails_copies_nothing_over_the_page() {
    let world = World::new();
    let plan = FaultPlan::new(0, vec![Rule::nth("odp.dmabuf.copy", 2, Action::Fail)]);
    let options = MigratingOptions {
        place: PagePlace::Peer,
        points: Points::with(&plan),
        ..MigratingOptions::default()
    };
    let exporter = world.export(options);
    exporter.write_at(page_bytes(2), b"second page").expect("in the buffer");
    let step = |migration: &mut Migration| migration.poll();
    let mut first = exporter.begin_migration(1..3, PagePlace::System).expect("in the buffer");
    while exporter.place(2) == Some(PagePlace::Peer) {
        let _ = step(&mut first).expect("nothing has failed yet");
    }
    let mut second = exporter.begin_migration(2..3, PagePlace::Peer).expect("in the buffer");
    assert_eq!(step(&mut second), Ok(Progress::Again), "it sees the page on its way to the other place");
    assert_eq!(step(&mut second), Ok(Progress::Blocked), "and waits for its bytes");
    let failed = loop {
        if let Err(error) = step(&mut first) {
            break error;
        }
    };
    assert!(matches!(failed, MigrationError::Copy { page: 2, .. }), "{failed:?}");
    let moved = loop {
        if let Progress::Done(moved) = step(&mut second).expect("nothing fails any more") {
            break moved;
        }
    };
    let mut bytes = [0; 11];
    exporter.read_at(page_bytes(2), &mut bytes).expect("in the buffer");
    assert_eq!((&bytes, moved, exporter.place(2)), (b"second page", 0, Some(PagePlace::Peer)));
}

#[test]
fn an_exporter_that_revokes_takes_no_importer_that_would_not_let_go() {
    let world = World::new();
    let memory = Arc::clone(&world.host) as Arc<dyn HostMemory>;
    let buffer = BarExport::export(world.part(), memory, Points::OFF);
    let pinned = buffer.attach(ImportOptions::new(ImportMode::Pinned)).unwrap_err();
    assert_eq!(pinned, AttachError::MustBeRevocable);
    let revocable = stepped(&buffer, ImportMode::PinnedRevocable);
    let dynamic = stepped(&buffer, ImportMode::Dynamic);
    let pin = revocable.watch(range(0..PAGES)).expect("nothing moves");
    assert_eq!(buffer.begin_move(0..1).unwrap_err(), MoveError::Pinned { pages: 0..1, by: 1 });
    let importer = Arc::new(Importer::default());
    let interval = revocable.notifiers().register(range(0..PAGES), Arc::clone(&importer) as _);

    let mut engine = world.host.epoch().register().expect("room");
    engine.begin().expect("open");
    let mut withdrawal = buffer.begin_revoke().expect("who pinned is revocable");
    assert_eq!(importer.told(), [("clear", range(0..PAGES))]);
    // From its beginning nothing is given, to whomever; DMA under way keeps what it has.
    let gone =
        |pages: Range<u64>| FaultError::Withdrawn { at: range(pages).start(), why: Withdrawn::Revoked };
    assert_eq!(fault(&dynamic, 0..1, Access::Read), Err(gone(0..1)));
    assert_eq!(revocable.snapshot(range(2..3), &mut Vec::new()), Err(gone(2..3)));
    assert!(!withdrawal.poll() && importer.told().is_empty());
    engine.end();
    assert!(withdrawal.poll());
    assert_eq!(importer.told(), [("unlink", range(0..PAGES))]);
    drop(withdrawal);

    let why = Withdrawn::Revoked;
    assert_eq!(buffer.begin_revoke().unwrap_err(), RevokeError::Withdrawn(why));
    assert_eq!(
        buffer.attach(ImportOptions::new(ImportMode::Dynamic)).unwrap_err(),
        AttachError::Withdrawn(why)
    );
    assert_eq!(buffer.begin_move(0..1).unwrap_err(), MoveError::Withdrawn(why));
    let watch = dynamic.watch(range(0..1)).unwrap_err();
    assert_eq!(watch, WatchError::Withdrawn { range: range(0..1), why });
    assert_eq!(buffer.stats().pins, 1, "the importer unpins when it is done");
    drop((pin, interval));
    assert_eq!((buffer.stats().pins, buffer.stats().faults_refused), (0, 2));
}

#[test]
fn a_device_that_is_gone_takes_its_memory_with_it_whoever_pinned_it() {
    let world = World::new();
    let gpu = world.export(MigratingOptions { place: PagePlace::Peer, ..MigratingOptions::default() });
    let space = stepped(gpu.buffer(), ImportMode::Pinned);
    let _pin = space.watch(range(0..PAGES)).expect("nothing moves");
    assert!(gpu.buffer().begin_revoke().is_err(), "asked, it stays");
    let mut withdrawal = gpu.buffer().begin_remove();
    assert!(withdrawal.poll());
    let gone = FaultError::Withdrawn { at: VirtAddr(0), why: Withdrawn::Removed };
    assert_eq!(fault(&space, 0..1, Access::Read), Err(gone));
}

#[test]
fn what_is_read_only_or_outside_or_failing_is_refused_by_name() {
    let world = World::new();
    let memory = Arc::clone(&world.host) as Arc<dyn HostMemory>;
    let buffer = BarExport::export_read_only(world.part(), memory, Points::OFF);
    let space = stepped(&buffer, ImportMode::Dynamic);
    let permission = FaultError::Permission { at: VirtAddr(page_bytes(1)), access: Access::Write };
    assert_eq!(fault(&space, 1..2, Access::Write), Err(permission));
    let runs = fault(&space, 0..PAGES, Access::Read).expect("to be read");
    assert_eq!((runs.len(), runs[0].pages, runs[0].writable), (1, PAGES, false));
    let end = VirtAddr(page_bytes(PAGES));
    assert_eq!(fault(&space, 1..PAGES + 1, Access::Read), Err(FaultError::NoMapping { at: end }));
    assert_eq!(
        space.snapshot(range(PAGES..PAGES + 1), &mut Vec::new()),
        Err(FaultError::NoMapping { at: end })
    );
    let beyond = range(PAGES - 1..PAGES + 1);
    assert_eq!(space.watch(beyond).unwrap_err(), WatchError::NotMapped { range: beyond, at: end });
    let odd = VirtRange::new(VirtAddr(1), PAGE_SIZE).expect("fits");
    assert_eq!(space.watch(odd).unwrap_err(), WatchError::BadRange { range: odd });
    let none = MoveError::NoSuchPages { pages: 1..1, size: PAGES };
    assert_eq!(buffer.begin_move(1..1).unwrap_err(), none);
    assert!(BarPart::new(&world.bar, page_bytes(2 * PAGES), PAGE_SIZE).is_err(), "past the BAR's end");
    assert!(BarPart::new(&world.bar, 1, PAGE_SIZE).is_err(), "not whole pages");
    let system = world.host.system_pages(1).expect("frames");
    let uneven = Migrating::export(system, world.part(), MigratingOptions::default()).unwrap_err();
    assert_eq!(uneven, ExportError::Uneven { system: 1, peer: PAGES });
}

/// An exporter that keeps count of its notices, and has no memory for page 3.
#[derive(Default)]
struct Counting {
    host: Option<Arc<SimHost>>,
    maps: AtomicU64,
    pins: AtomicU64,
    unpins: AtomicU64,
    withdrawn: AtomicU64,
}

impl Exporter for Counting {
    fn size(&self) -> u64 {
        page_bytes(4)
    }
    fn memory(&self) -> Arc<dyn HostMemory> {
        Arc::clone(self.host.as_ref().expect("set below")) as _
    }
    fn piece(&self, page: u64) -> Piece {
        let phys = PhysAddr::from_page_number(100 + page);
        Piece { phys, pages: 4 - page, backing: Backing::DmabufSystem, provider: None }
    }
    fn map(&self, pages: Range<u64>, _access: Access) -> Result<(), MapRefusal> {
        self.maps.fetch_add(1, Ordering::Relaxed);
        if pages.contains(&3) { Err(MapRefusal::OutOfMemory { page: 3 }) } else { Ok(()) }
    }
    fn pinned(&self, pages: Range<u64>) {
        self.pins.fetch_add(pages.end - pages.start, Ordering::Relaxed);
    }
    fn unpinned(&self, pages: Range<u64>) {
        self.unpins.fetch_add(pages.end - pages.start, Ordering::Relaxed);
    }
    fn withdrawn(&self) {
        self.withdrawn.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn an_exporter_gets_its_notices() {
    let world = World::new();
    let exporter = Arc::new(Counting { host: Some(Arc::clone(&world.host)), ..Counting::default() });
    let buffer = Dmabuf::new(Arc::clone(&exporter) as _, Points::OFF);
    let space = stepped(&buffer, ImportMode::PinnedRevocable);
    assert!(space.user_range().is_none(), "nobody vouches for an exporter from elsewhere");
    assert_eq!(fault(&space, 0..3, Access::Write).expect("there").len(), 1);
    let refused = FaultError::OutOfMemory { at: VirtAddr(page_bytes(3)) };
    assert_eq!(fault(&space, 2..4, Access::Read), Err(refused));
    let watch = space.watch(range(1..3)).expect("nothing moves");
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    assert_eq!((count(&exporter.maps), count(&exporter.pins), count(&exporter.unpins)), (2, 2, 0));
    drop(watch);
    assert_eq!(count(&exporter.unpins), 2);
    buffer.revoke().expect("nobody pins it");
    assert_eq!(count(&exporter.withdrawn), 1);
}

#[test]
fn a_fence_is_kept_even_by_who_forgets_it_and_waited_for_with_a_bound() {
    let (fence, signal) = Fence::new();
    let other = fence.clone();
    assert!(!fence.wait(Duration::from_millis(1)) && !other.is_signalled());
    drop(signal);
    assert!(fence.is_signalled() && other.wait(Duration::ZERO));
    let (fence, signal) = Fence::new();
    std::thread::scope(|scope| {
        scope.spawn(|| signal.signal());
        assert!(fence.wait(Duration::from_secs(20)), "signalled by another thread");
    });
}

#[test]
fn large_pages_are_reported_where_offset_and_place_allow() {
    const LARGE: u64 = 512;
    let config = SimConfig { ram_pages: 4096, ..SimConfig::default() };
    let host = SimHost::new(config).expect("memory");
    let bus = Bus::new(Arc::clone(&host) as Arc<dyn HostMemory>);
    let gpu = bus.attach(DeviceSpec::new("gpu")).expect("room");
    let bar = bus.add_ram_bar(gpu.device(), page_bytes(4 * LARGE)).expect("room");
    let part = BarPart::new(&bar, 0, page_bytes(2 * LARGE)).expect("in the BAR");
    let system = host.system_pages(2 * LARGE).expect("frames");
    let options = MigratingOptions { place: PagePlace::Peer, ..MigratingOptions::default() };
    let gpu = Migrating::export(system, part, options).expect("a buffer");
    let space = stepped(gpu.buffer(), ImportMode::Dynamic);
    let orders = |pages| {
        let runs = fault(&space, pages, Access::Read).expect("there");
        runs.iter().map(|run| (run.pages, run.order_shift)).collect::<Vec<_>>()
    };
    assert_eq!(orders(0..2 * LARGE), [(2 * LARGE, 21)]);
    assert_eq!(orders(1..2), [(1, 12)]);
    assert_eq!(gpu.migrate(LARGE + 7..LARGE + 8, PagePlace::System), Ok(1));
    assert_eq!(orders(0..2 * LARGE), [(LARGE + 7, 21), (1, 12), (LARGE - 8, 12)]);
}
