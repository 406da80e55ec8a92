//! Pages that move: their bytes, their paths and their sizes, under regions of two devices.

use super::*;
use crate::bed::post;
use crate::races::Stop;
use anypage::machine::End;
use hw_model::bus::DmaEpoch;
use hw_model::fault_plan::{Action, Rule};
use hw_model::hca::{Entry, OperationCode, Remote, Sge};
use hw_model::sync::atomic::{AtomicBool, Ordering};
use odp::space::dmabuf::{MigrationError, MoveError};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::time::Duration;

const PAGES: u64 = 16;

/// The other device's end: its region over the same buffer, and a peer with memory of its own on the near device.
struct Second {
    end: End,
    peer: End,
    mirror: Arc<OwnedMemory>,
}

impl Second {
    fn new(bed: &Bed, memory: &UserRange, options: RegisterOptions) -> Self {
        let mirror = Arc::new(OwnedMemory::new(&bed.space, memory.range().len()).expect("memory"));
        let end = End::new(&bed.machine.far, memory, options).expect("a region through the host bridge");
        let peer =
            End::new(&bed.machine.near, &mirror.user_range(), RegisterOptions::pinned()).expect("its peer");
        end.connect(&peer).expect("fresh queue pairs connect");
        Self { end, peer, mirror }
    }

    fn does(&self, what: OperationCode, offset: u64, length: u32) -> Status {
        let address = self.peer.region.address().offset(offset);
        let local = [Sge { key: self.peer.region.key(), address, length }];
        let remote = Remote { key: self.end.region.key(), address: self.end.region.address().offset(offset) };
        post(&self.peer, what, &local, remote).status
    }

    fn bytes(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.mirror.read_at(offset, &mut bytes).expect("our own memory");
        bytes
    }
}

#[test]
fn pages_migrate_one_by_one_under_regions_of_a_switch_path_and_a_host_bridge_path() {
    for iommu in [true, false] {
        let config = MachineConfig { iommu, ..MachineConfig::default() };
        let mut stand = Stand::new(PAGES, &config, MigratingOptions::default());
        let memory = stand.import(ImportMode::Dynamic);
        let bed = stand.bed(&memory, RegisterOptions::on_demand());
        let (near_key, near_address) = (bed.near.region.key(), bed.near.region.address());
        let other = stand.import(ImportMode::Dynamic);
        let second = Second::new(&bed, &other, RegisterOptions::on_demand());
        assert_eq!(stand.buffer().stats().attachments, 2);
        let len = page_bytes(PAGES) as u32;
        // Without an IOMMU the host bridge is reached by physical addresses, as memory is.
        let system = if iommu { Path::Iova } else { Path::Direct };
        let epoch: Arc<DmaEpoch> = Arc::clone(bed.space.memory().epoch());
        // Odd pages first, so that kinds alternate.
        let order = (0..PAGES).map(|n| if n < PAGES / 2 { 2 * n + 1 } else { 2 * n - PAGES });
        for moved in order {
            // All of it is written through one device and read through the other, wherever its pages are.
            let bytes = pattern(moved, page_bytes(PAGES));
            bed.mirror.write_at(0, &bytes).expect("our own memory");
            assert_eq!(bed.write(0, len), Status::Success);
            assert_eq!(second.does(OperationCode::Read, 0, len), Status::Success);
            assert!(
                second.bytes(0, bytes.len()) == bytes,
                "page {moved}: what was written is not what is read"
            );
            let before = bed.near.region.raw_entries().expect("the model shows its list");
            let (drains, counters) = (epoch.drain_count(), bed.near.region.counters());

            assert_eq!(stand.gpu.migrate(moved..moved + 1, PagePlace::Peer), Ok(1));
            assert_eq!(epoch.drain_count(), drains + 1, "one drain for two regions of two devices");
            let after = bed.near.region.raw_entries().expect("the model shows its list");
            for (index, (before, after)) in before.iter().zip(&after).enumerate() {
                let visible = Entry::from_bits(*after).is_valid();
                assert_eq!(visible, index as u64 != moved, "page {index}: only what moves is hidden");
                assert!(
                    before == after || !visible,
                    "page {index}: the entries of the others stay as they are"
                );
            }
            let hidden = bed.near.region.counters() - counters;
            assert_eq!((hidden.pages_invalidated, hidden.page_invalidations), (1, 1));

            assert_eq!(bed.read(0, len), Status::Success);
            assert!(bed.far_bytes(0, bytes.len()) == bytes, "page {moved} came without its bytes");
            assert_eq!(second.does(OperationCode::Read, 0, len), Status::Success);
            assert!(second.bytes(0, bytes.len()) == bytes);
            bed.view(&memory).check().expect("what is published is what there is");
            for (index, (near, far)) in
                entries(&*bed.near.region).iter().zip(entries(&*second.end.region)).enumerate()
            {
                let (expected, other) = match stand.gpu.place(index as u64).expect("in the buffer") {
                    PagePlace::System => ((Backing::DmabufSystem, system), (Backing::DmabufSystem, system)),
                    PagePlace::Peer => (
                        (Backing::DmabufPeer, Path::BusAddress),
                        (Backing::DmabufPeer, if iommu { Path::HostBridge } else { Path::Direct }),
                    ),
                };
                assert_eq!((*near, far), (Some(expected), Some(other)), "page {index}");
            }
        }
        assert_eq!(stand.gpu.migrate(0..PAGES, PagePlace::Peer), Ok(0), "all are there");
        let bar = bed.machine.bar.as_ref().expect("the GPU has one");
        assert!(
            bar.bursts_by_bus_address() > 0 && bar.bursts_through_host_bridge() > 0,
            "both ways were gone"
        );
        // And back, all at once.
        let bytes = pattern(99, page_bytes(PAGES));
        bed.mirror.write_at(0, &bytes).expect("our own memory");
        assert_eq!(bed.write(0, len), Status::Success);
        assert_eq!(stand.gpu.migrate(0..PAGES, PagePlace::System), Ok(PAGES));
        assert_eq!(bed.read(0, len), Status::Success);
        assert!(bed.far_bytes(0, bytes.len()) == bytes);
        assert_eq!((bed.near.region.key(), bed.near.region.address()), (near_key, near_address));
        let counters = bed.near.region.counters();
        assert!(
            counters.entries_changed_kind >= 2 * PAGES,
            "each page became another kind twice: {counters:?}"
        );
        protocol_kept(&bed.machine, &bed.space).expect("no stale translation was used");
    }
}

#[test]
fn traffic_goes_on_while_pages_migrate_and_no_byte_is_lost() {
    for (iommu, options) in [(true, RegisterOptions::on_demand()), (false, RegisterOptions::pinned())] {
        let config = MachineConfig { iommu, ..MachineConfig::default() };
        // Bytes take their time, so that somebody would see it if pages were given out before theirs have come.
        let slow = Action::Delay(Duration::from_micros(200));
        let plan = FaultPlan::new(0, vec![Rule::always("odp.dmabuf.copy", slow)]);
        let points = Points::with(&plan);
        let mut stand = Stand::new(64, &config, MigratingOptions { points, ..MigratingOptions::default() });
        let before = Held::of(stand.buffer());
        let memory = stand.import(ImportMode::Dynamic);
        let bed = stand.bed(&memory, options);
        let size = page_bytes(64);
        let mut oracle = vec![0_u8; size as usize];
        let over = AtomicBool::new(false);
        let mut random = ChaCha8Rng::seed_from_u64(5);
        std::thread::scope(|scope| {
            let _stop = Stop(&over);
            let (gpu, over) = (&stand.gpu, &over);
            scope.spawn(move || {
                let mut random = ChaCha8Rng::seed_from_u64(6);
                while !over.load(Ordering::Acquire) {
                    let first = random.random_range(0..64);
                    let end = random.random_range(first + 1..=(first + 9).min(64));
                    let to = if random.random() { PagePlace::Peer } else { PagePlace::System };
                    gpu.migrate(first..end, to).expect("nobody pins anything");
                    std::thread::sleep(Duration::from_micros(random.random_range(0..300)));
                }
            });
            // One request at a time: what it wrote is known when it has ended, whatever moved meanwhile.
            let mut round = 0;
            let enough =
                || stand.buffer().stats().moves >= 200 && bed.near.region.counters().page_faults >= 50;
            while (round < 300 || !enough()) && round < 20_000 {
                round += 1;
                let offset = random.random_range(0..size);
                let len = random.random_range(1..=(size - offset).min(40_000));
                if random.random() {
                    let bytes: Vec<u8> = (0..len).map(|_| random.random()).collect();
                    bed.mirror.write_at(offset, &bytes).expect("our own memory");
                    let status = bed.write(offset, len as u32);
                    assert_eq!(status, Status::Success, "round {round}: pages that move come back");
                    oracle[offset as usize..(offset + len) as usize].copy_from_slice(&bytes);
                } else {
                    assert_eq!(bed.read(offset, len as u32), Status::Success, "round {round}");
                    let wanted = &oracle[offset as usize..(offset + len) as usize];
                    assert!(
                        bed.far_bytes(offset, len as usize) == wanted,
                        "round {round}: wrong bytes at {offset}"
                    );
                }
            }
        });
        let mut seen = vec![0; size as usize];
        stand.gpu.read_at(0, &mut seen).expect("nothing is on its way");
        assert!(seen == oracle, "the exporter sees other bytes than the importers wrote");
        let stats = stand.buffer().stats();
        assert!(stats.moves >= 200, "there was little to fear: {stats:?}");
        protocol_kept(&bed.machine, &bed.space).expect("no stale translation was used");
        bed.view(&memory).check().expect("at rest");
        drop((bed, memory));
        assert!(until(|| Held::of(stand.buffer()) == before), "{:?}", Held::of(stand.buffer()));
    }
}

#[test]
fn a_move_may_change_the_page_size_and_back() {
    const HUGE: u64 = 512;
    let options = MigratingOptions { place: PagePlace::Peer, ..MigratingOptions::default() };
    let stand = Stand::new(2 * HUGE, &MachineConfig::default(), options);
    let machine = stand.machine.as_ref().expect("no bed was made");
    // The far HCA links BAR pages as MMIO in its IOMMU.
    let memory = stand.import(ImportMode::Dynamic);
    let end = End::new(&machine.far, &memory, RegisterOptions::pinned()).expect("a region");
    let domain = machine.far.dma().domain().expect("behind an IOMMU");
    assert_eq!(domain.stats().leaves_mapped, [0, 2, 0], "contiguous: two leaves of 2 MiB");
    let key = end.region.key();

    assert_eq!(stand.gpu.migrate(5..6, PagePlace::System), Ok(1));
    let report = end.region.report();
    assert_eq!((report.present, report.linked), (HUGE, HUGE), "the leaf that the page was in goes whole");
    assert_eq!((domain.stats().leaves_unmapped, domain.stats().violations), ([0, 1, 0], 0));
    let all = |want| end.region.advise(0, page_bytes(2 * HUGE), want).expect("all of it can be had");
    all(odp::fault::Want::Fault(odp::space::Access::Write));
    assert_eq!(domain.stats().leaves_mapped, [HUGE, 2, 0], "small pages around the one that left");
    let entries = entries(&*end.region);
    assert_eq!(entries[4], Some((Backing::DmabufPeer, Path::HostBridge)));
    assert_eq!(entries[5], Some((Backing::DmabufSystem, Path::Iova)));

    assert_eq!(stand.gpu.migrate(0..2 * HUGE, PagePlace::System), Ok(2 * HUGE - 1));
    all(odp::fault::Want::Fault(odp::space::Access::Write));
    assert_eq!(domain.stats().leaves_mapped, [3 * HUGE - 1, 2, 0], "scattered: every page by itself");
    assert_eq!(stand.gpu.migrate(0..2 * HUGE, PagePlace::Peer), Ok(2 * HUGE));
    all(odp::fault::Want::Fault(odp::space::Access::Write));
    assert_eq!(domain.stats().leaves_mapped, [3 * HUGE - 1, 4, 0], "contiguous again");
    assert_eq!((end.region.key(), domain.stats().violations), (key, 0));
}

#[test]
fn a_region_that_pins_makes_moves_fail_until_it_is_gone() {
    let mut stand = Stand::new(PAGES, &MachineConfig::default(), MigratingOptions::default());
    let memory = stand.import(ImportMode::Pinned);
    let part = memory.part(page_bytes(4) + 100, page_bytes(2)).expect("in the buffer");
    let bed = stand.bed(&part, RegisterOptions::pinned());
    let counters = bed.near.region.counters();
    let pinned = |pages: std::ops::Range<u64>, by| MigrationError::from(MoveError::Pinned { pages, by });
    assert_eq!(
        stand.gpu.migrate(6..7, PagePlace::Peer),
        Err(pinned(6..7, 1)),
        "pages 4 to 6 hold the region"
    );
    let again =
        Arc::clone(&bed.near.pd).register(&memory, RegisterOptions::on_demand()).expect("a second pin");
    assert_eq!(stand.gpu.migrate(5..6, PagePlace::Peer), Err(pinned(5..6, 2)));
    assert_eq!(bed.near.region.counters(), counters, "nobody was told of a move that did not happen");
    assert_eq!(bed.write(0, 5000), Status::Success);
    assert_eq!(bed.near.region.counters().page_faults, 0, "what is pinned is there");
    again.deregister();
    bed.near.region.deregister();
    assert_eq!(stand.buffer().stats().pins, 0);
    assert_eq!(stand.gpu.migrate(0..PAGES, PagePlace::Peer), Ok(PAGES));
}
