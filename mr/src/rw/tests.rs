//! Transfers over two devices: data, what each way costs, and what is left when something fails.

use super::plan::{List, messages, part, pieces};
use super::*;
use crate::dma::page_size::DmaRange;
use crate::dma::{DmaConfig, DmaDevice, Extent};
use hw_model::addr::{DmaAddr, PAGE_SIZE, RegionAddr, page_bytes};
use hw_model::bus::{Acs, Bar, Bus, DeviceSpec};
use hw_model::fault_plan::{FaultPlan, Points};
use hw_model::hca::{
    Access, Backing, CompletionQueue, Entry, Hca, HcaConfig, Key, KeySpec, LiveObjects, PageList, Path, Pd,
    QpSpec, QueuePair, Remote, SendRequest, Sge, Status,
};
use hw_model::iommu::{Domain, DomainConfig};
use hw_model::link::Fabric;
use hw_model::sync::Arc;
use odp::space::AddressSpace;
use odp::space::process::{Options, OwnedMemory, ProcessSpace};
use proptest::prelude::*;

const PAGE: u64 = PAGE_SIZE;
/// Pages of our memory, of the BAR, and of the peer's region.
const PAGES: u64 = 256;

/// A device of ours with memory and a GPU below its switch, and a peer with a region.
struct Bed {
    memory: Arc<OwnedMemory>,
    bar: Arc<Bar>,
    domain: Option<Arc<Domain>>,
    dma: Arc<DmaDevice>,
    hca: Arc<Hca>,
    pd: Pd,
    cq: Arc<CompletionQueue>,
    peer: Peer,
}

struct Peer {
    memory: Arc<OwnedMemory>,
    hca: Arc<Hca>,
    pd: Pd,
    cq: Arc<CompletionQueue>,
    region: Remote,
}

fn bed(iommu: bool, points: Points) -> Bed {
    let space = ProcessSpace::open(Options::default()).expect("this process can use its own memory");
    let bus = Bus::new(space.memory());
    let root = bus.add_root_port(bus.first_bridge(), Acs::Off).expect("a root port");
    let switch = bus.add_switch(root).expect("a switch");
    let below = [(); 2].map(|()| bus.add_downstream_port(switch, Acs::Off).expect("a port"));
    let domain = iommu.then(|| Domain::new(DomainConfig::default()).expect("the default is possible"));
    let spec = DeviceSpec::new("hca0").under(below[0]);
    let spec = match &domain {
        Some(domain) => spec.domain(domain),
        None => spec,
    };
    let port = bus.attach(spec).expect("room on the bus");
    let gpu = bus.attach(DeviceSpec::new("gpu0").under(below[1])).expect("room on the bus");
    let bar = bus.add_ram_bar(gpu.device(), page_bytes(PAGES)).expect("a BAR");
    let dma = DmaDevice::new(port.clone(), DmaConfig { points: points.clone(), ..DmaConfig::default() });
    let fabric = Fabric::new();
    let hca = Hca::with_points(HcaConfig::default(), port, Box::new(fabric.port()), points).expect("an HCA");
    let far = bus.attach(DeviceSpec::new("hca1")).expect("room on the bus");
    let far = Hca::new(HcaConfig { seed: 1, ..HcaConfig::default() }, far, Box::new(fabric.port()));
    let memory = || Arc::new(OwnedMemory::new(&space, page_bytes(PAGES)).expect("memory"));
    let (pd, cq) = (hca.alloc_pd().expect("a domain"), hca.create_cq(256).expect("a queue"));
    Bed { memory: memory(), bar, domain, dma, hca, pd, cq, peer: Peer::new(far.expect("an HCA"), memory()) }
}

impl Peer {
    fn new(hca: Arc<Hca>, memory: Arc<OwnedMemory>) -> Self {
        let (pd, cq) = (hca.alloc_pd().expect("a domain"), hca.create_cq(256).expect("a queue"));
        let pages = Arc::new(PageList::new(PAGES).expect("a list"));
        for page in 0..PAGES {
            let at = memory.physical_base().offset(page_bytes(page)).to_dma_identity();
            pages.store(page, Entry::present(at, Path::Direct, Backing::Shared, true));
        }
        let (access, length) = (Access::all(), page_bytes(PAGES));
        let spec = KeySpec { pd, access, address: RegionAddr(0), length, first_page_offset: 0, pages };
        let key = hca.create_key(spec).expect("a key");
        Self { memory, hca, pd, cq, region: Remote { key, address: RegionAddr(0) } }
    }
}

impl Bed {
    fn endpoint(&self, config: RwConfig) -> Arc<RwEndpoint> {
        RwEndpoint::new(&self.hca, &self.dma, self.pd, config).expect("keys")
    }

    fn connect(&self) -> (Arc<QueuePair>, Arc<QueuePair>) {
        let ours = self.hca.create_qp(&QpSpec::new(self.pd, &self.cq)).expect("a queue pair");
        let theirs =
            self.peer.hca.create_qp(&QpSpec::new(self.peer.pd, &self.peer.cq)).expect("a queue pair");
        ours.connect(theirs.address()).expect("it connects");
        theirs.connect(ours.address()).expect("it connects");
        (ours, theirs)
    }

    fn ends(&self) -> Status {
        self.ends_at(&self.cq)
    }

    /// Waits for the next completion of `cq`, and lets both devices work meanwhile.
    fn ends_at(&self, cq: &CompletionQueue) -> Status {
        let mut ended = Vec::new();
        while cq.poll(&mut ended, 1).expect("no overrun") == 0 {
            self.hca.progress();
            self.peer.hca.progress();
        }
        ended[0].status
    }

    fn system(&self, at: u64, offset: u64, len: u64) -> Extent {
        let phys = self.memory.physical_base().offset(offset);
        Extent { at, phys, len, backing: Backing::Shared, provider: None, writable: true }
    }

    fn peers(&self, at: u64, offset: u64, len: u64) -> Extent {
        let (phys, provider) = (self.bar.base().offset(offset), Some(self.bar.provider()));
        Extent { at, phys, len, backing: Backing::DmabufPeer, provider, writable: true }
    }

    /// Single pages of system memory that do not lie next to each other, all of them or from byte `from` on.
    fn scattered(&self, count: u64, from: u64) -> Vec<Extent> {
        let len = PAGE - from;
        (0..count).map(|n| self.system(n * len, page_bytes(n * 7 % PAGES) + from, len)).collect()
    }

    fn put(&self, extents: &[Extent], data: &[u8]) {
        for extent in extents {
            let data = &data[extent.at as usize..][..extent.len as usize];
            match extent.provider {
                Some(_) => {
                    let offset = extent.phys.0 - self.bar.base().0;
                    self.bar.storage().write(offset, data).expect("in the BAR");
                }
                None => {
                    let offset = extent.phys.0 - self.memory.physical_base().0;
                    self.memory.write_at(offset, data).expect("in the memory");
                }
            }
        }
    }

    fn get(&self, extents: &[Extent]) -> Vec<u8> {
        let mut all = Vec::new();
        for extent in extents {
            let mut bytes = vec![0; extent.len as usize];
            match extent.provider {
                Some(_) => {
                    let offset = extent.phys.0 - self.bar.base().0;
                    self.bar.storage().read(offset, &mut bytes).expect("in the BAR");
                }
                None => {
                    let offset = extent.phys.0 - self.memory.physical_base().0;
                    self.memory.read_at(offset, &mut bytes).expect("in the memory");
                }
            }
            all.append(&mut bytes);
        }
        all
    }

    fn peer_has(&self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.peer.memory.read_at(0, &mut bytes).expect("in the memory");
        bytes
    }

    /// What must be as before when all is over.
    fn counts(&self) -> (LiveObjects, u64, u64) {
        let mapped = self.domain.as_ref().map_or(0, |domain| domain.stats().mapped_bytes);
        (self.hca.live_objects(), mapped, self.dma.iova_stats().live_ranges)
    }
}

fn pattern(seed: u64, len: u64) -> Vec<u8> {
    (0..len).map(|at| ((at * 31 + at / 251 + seed * 97) % 255) as u8 + 1).collect()
}

fn bytes_of(extents: &[Extent]) -> u64 {
    extents.iter().map(|extent| extent.len).sum()
}

/// Our memory to the peer and other bytes back.
fn there_and_back(bed: &Bed, endpoint: &Arc<RwEndpoint>, extents: &[Extent]) -> RwCost {
    let (qp, _theirs) = bed.connect();
    let len = bytes_of(extents);
    bed.put(extents, &pattern(1, len));
    let mut context = endpoint.transfer(extents.iter().copied()).expect("prepared");
    let cost = context.cost();
    context.post(&qp, 1, bed.peer.region, Way::Write).expect("room");
    assert_eq!(bed.ends(), Status::Success);
    context.finish();
    assert!(bed.peer_has(len as usize) == pattern(1, len), "the peer has not what we wrote: {cost:?}");
    bed.peer.memory.write_at(0, &pattern(2, len)).expect("in the memory");
    let mut context = endpoint.transfer(extents.iter().copied()).expect("prepared");
    assert_eq!(context.cost(), cost);
    context.post(&qp, 2, bed.peer.region, Way::Read).expect("room");
    assert_eq!(bed.ends(), Status::Success);
    context.finish();
    assert!(bed.get(extents) == pattern(2, len), "we have not what the peer had: {cost:?}");
    cost
}

const NEVER: RwConfig = RwConfig {
    max_sges: 4,
    direct_ranges: usize::MAX,
    regions: 64,
    entries: 256,
    gaps: false,
    page_sizes: crate::dma::page_size::PageSizes::X86,
};

/// What a transfer costs with and without an IOMMU, side by side.
#[test]
fn without_an_iommu_every_piece_costs() {
    let always = RwConfig { direct_ranges: 0, ..NEVER };
    let gaps = RwConfig { gaps: true, ..always };
    let cost = |ranges, regions, requests, entries| RwCost { ranges, regions, requests, entries };
    // 64 scattered pages; and 32 pieces of 3584 bytes, each from byte 512 of its page on.
    let cases = [
        ("64 pages, work requests", NEVER, 0, cost(1, 0, 1, 1), cost(64, 0, 16, 64)),
        ("64 pages, registered", always, 0, cost(1, 1, 3, 1), cost(64, 1, 3, 64)),
        ("32 pieces, work requests", NEVER, 512, cost(32, 0, 8, 32), cost(32, 0, 8, 32)),
        ("32 pieces, registered", always, 512, cost(32, 32, 96, 32), cost(32, 32, 96, 32)),
        ("32 pieces, registered with gaps", gaps, 512, cost(32, 1, 3, 32), cost(32, 1, 3, 32)),
    ];
    println!("{:34}{:>40}   {:>40}", "ranges/regions/requests/entries", "behind an IOMMU", "without");
    for (what, config, from, with, without) in cases {
        let got = [true, false].map(|iommu| {
            let bed = bed(iommu, Points::OFF);
            let endpoint = bed.endpoint(config);
            there_and_back(&bed, &endpoint, &bed.scattered(if from == 0 { 64 } else { 32 }, from))
        });
        let words = got.map(|c| format!("{} / {} / {} / {}", c.ranges, c.regions, c.requests, c.entries));
        println!("{what:34}{:>40}   {:>40}", words[0], words[1]);
        assert_eq!(got, [with, without], "{what}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_way_moves_every_byte_and_leaves_nothing(
        bvecs in prop::collection::vec((0..200_u64, 0..4096_u64, 1..9000_u64, any::<bool>()), 1..12),
        aligned: bool, iommu: bool, gaps: bool, direct in prop_oneof![Just(0_usize), Just(4), Just(usize::MAX)],
        sges in 1..5_u32, entries in prop_oneof![Just(4_u32), Just(256)],
    ) {
        let bed = bed(iommu, Points::OFF);
        let mut at = 0;
        let mut used = [0; 2];
        let mut extents: Vec<Extent> = Vec::new();
        for (skip, into, len, ordinary) in bvecs {
            // No two overlap: what is read back into one must not change another.
            let place = &mut used[usize::from(ordinary)];
            let unit = if aligned { PAGE } else { 1 };
            let (offset, len) = ((*place + skip * 64 + into).next_multiple_of(unit), len.next_multiple_of(unit));
            if offset + len > page_bytes(PAGES) {
                continue;
            }
            *place = offset + len;
            extents.push(if ordinary { bed.system(at, offset, len) } else { bed.peers(at, offset, len) });
            at += len;
        }
        prop_assume!(!extents.is_empty());
        let before = bed.counts();
        let config = RwConfig { max_sges: sges, direct_ranges: direct, regions: 64, entries, gaps, ..NEVER };
        let endpoint = bed.endpoint(config);
        there_and_back(&bed, &endpoint, &extents);
        prop_assert_eq!(endpoint.free_regions(), 64);
        drop(endpoint);
        prop_assert_eq!(bed.counts(), before);
    }

    #[test]
    fn pieces_cover_everything_once_and_fit_a_region(
        lens in prop::collection::vec((0..1_u64 << 40, prop_oneof![1..200_u64, 1..1_u64 << 24]), 1..80),
        entries in 1..40_u32, gaps: bool, aligned: bool,
    ) {
        let unit = if aligned { PAGE } else { 1 };
        let range = |(dma, len): (u64, u64)| {
            DmaRange { dma: DmaAddr(dma / unit * unit), len: len.next_multiple_of(unit) }
        };
        let ranges: Vec<_> = lens.into_iter().map(range).collect();
        let config = RwConfig { entries, gaps, ..NEVER };
        let mut at = 0;
        for piece in pieces(&ranges, &config).expect("every run has a list") {
            prop_assert_eq!(piece.at, at);
            prop_assert!(piece.entries() <= u64::from(entries));
            let mine: Vec<_> = part(&ranges, piece.at, piece.len).collect();
            prop_assert_eq!(mine.iter().map(|range| range.len).sum::<u64>(), piece.len);
            if let List::Gaps(count) = piece.list {
                prop_assert_eq!(count, mine.len());
                let middle = mine.get(1..count - 1).unwrap_or_default();
                prop_assert!(middle.iter().all(|range| range.len >= hw_model::hca::MIN_INDIRECT_ENTRY));
            }
            at += piece.len;
        }
        prop_assert_eq!(at, ranges.iter().map(|range| range.len).sum::<u64>());
    }

    #[test]
    fn messages_hold_every_byte_in_order_within_their_limits(
        lens in prop::collection::vec(1..5000_u64, 0..40), sges in 1..6_usize, message in 1..6000_u32,
    ) {
        let ranges: Vec<_> = lens.iter().zip(0..).map(|(len, n)| DmaRange { dma: DmaAddr(n << 20), len: *len }).collect();
        let messages = messages(ranges.iter().copied(), sges, message);
        let flat: Vec<u64> = messages.iter().flatten().flat_map(|part| part.dma.0..part.dma.0 + part.len).collect();
        let expected: Vec<u64> = ranges.iter().flat_map(|range| range.dma.0..range.dma.0 + range.len).collect();
        prop_assert!(flat == expected);
        for one in &messages {
            prop_assert!((1..=sges).contains(&one.len()));
            prop_assert!(one.iter().map(|part| part.len).sum::<u64>() <= u64::from(message));
        }
        for two in messages.windows(2) {
            let full = two[0].iter().map(|part| part.len).sum::<u64>() == u64::from(message);
            prop_assert!(full || two[0].len() == sges, "a message ends though it has room");
        }
    }
}

#[test]
fn an_empty_pool_is_an_error_with_its_numbers_and_nothing_stays() {
    let bed = bed(false, Points::OFF);
    let endpoint = bed.endpoint(RwConfig { direct_ranges: 0, regions: 8, ..NEVER });
    let (five, six) = (bed.scattered(5, 512), bed.scattered(6, 512));
    let first = endpoint.transfer(five.iter().copied()).expect("eight are free");
    let before = bed.counts();
    let refused = endpoint.transfer(six.iter().copied()).map(|_| ()).expect_err("three are free");
    assert_eq!(refused, PoolEmpty { needed: 6, free: 3, size: 8 }.into());
    assert_eq!((bed.counts(), endpoint.free_regions()), (before, 3));
    drop(first);
    there_and_back(&bed, &endpoint, &six);
}

#[test]
fn the_regions_of_a_failed_transfer_are_replaced() {
    for iommu in [true, false] {
        let bed = bed(iommu, Points::OFF);
        let extents = bed.scattered(4, 512);
        let endpoint = bed.endpoint(RwConfig { direct_ranges: 0, regions: 4, ..NEVER });
        let before = bed.counts();
        let wrong = Remote { key: Key(bed.peer.region.key.0 ^ 1), ..bed.peer.region };
        for _ in 0..3 {
            let (qp, _theirs) = bed.connect();
            let mut context = endpoint.transfer(extents.iter().copied()).expect("four are free");
            context.post(&qp, 1, wrong, Way::Write).expect("room");
            assert_eq!(bed.ends(), Status::RemoteAccessError);
            drop(context);
            drop(qp);
            while !bed.cq.is_empty() {
                bed.ends();
            }
        }
        assert_eq!((bed.counts(), endpoint.free_regions()), (before, 4));
        there_and_back(&bed, &endpoint, &extents);
    }
}

#[test]
fn a_peer_reaches_what_it_was_granted_and_only_while_it_is() {
    for (iommu, gaps, remotes) in [(true, false, 1), (true, true, 1), (false, true, 1), (false, false, 6)] {
        let bed = bed(iommu, Points::OFF);
        let mut extents = bed.scattered(6, if iommu && !gaps { 0 } else { 512 });
        if gaps {
            extents.push(bed.peers(bytes_of(&extents), 100, 5000));
        }
        let endpoint = bed.endpoint(RwConfig { gaps, ..NEVER });
        let (ours, theirs) = bed.connect();
        let len = bytes_of(&extents);
        bed.put(&extents, &pattern(5, len));
        let mut context = endpoint.expose(extents.iter().copied()).expect("prepared");
        context.post_grant(&ours, 1, Access::REMOTE_READ).expect("room");
        assert_eq!(bed.ends(), Status::Success);
        let granted: Vec<(Remote, u64)> = context.remotes().collect();
        assert_eq!(granted.len(), remotes);
        let read = |at: u64, (remote, len): (Remote, u64)| {
            let local = [Sge { key: bed.peer.region.key, address: RegionAddr(at), length: len as u32 }];
            theirs.post_send(&SendRequest::read(9, &local, remote)).expect("room");
            bed.ends_at(&bed.peer.cq)
        };
        let mut at = 0;
        for piece in &granted {
            assert_eq!(read(at, *piece), Status::Success);
            at += piece.1;
        }
        assert!(bed.peer_has(len as usize) == pattern(5, len));
        context.post_revoke(&ours, 2).expect("room");
        assert_eq!(bed.ends(), Status::Success);
        context.finish();
        assert_eq!(read(0, granted[0]), Status::RemoteAccessError, "the peer still reaches the memory");
    }
}

#[test]
fn whatever_step_fails_nothing_stays() {
    for (iommu, config) in [
        (true, RwConfig { direct_ranges: 0, regions: 2, gaps: true, ..NEVER }),
        (true, RwConfig { regions: 2, ..NEVER }),
        (false, RwConfig { direct_ranges: 0, regions: 2, gaps: true, ..NEVER }),
    ] {
        let plan = FaultPlan::new(1, Vec::new());
        let bed = bed(iommu, Points::with(&plan));
        let extents = bed.scattered(6, 512);
        let before = bed.counts();
        let mut failed = Vec::new();
        for nth in 1.. {
            let (qp, theirs) = bed.connect();
            plan.fail_nth_from_now(nth);
            let outcome = (|| -> Result<Status, String> {
                let said = |error: &dyn std::fmt::Display| error.to_string();
                let endpoint = RwEndpoint::new(&bed.hca, &bed.dma, bed.pd, config).map_err(|e| said(&e))?;
                let mut context = endpoint.transfer(extents.iter().copied()).map_err(|e| said(&e))?;
                context.post(&qp, 1, bed.peer.region, Way::Write).map_err(|e| said(&e))?;
                let status = bed.ends();
                if status == Status::Success {
                    context.finish();
                }
                Ok(status)
            })();
            let at = plan.failed_at();
            plan.disarm();
            drop((qp, theirs));
            while !bed.cq.is_empty() {
                bed.ends();
            }
            assert_eq!(bed.counts(), before, "after {at:?}, {outcome:?}");
            let Some(at) = at else {
                assert_eq!(outcome, Ok(Status::Success));
                break;
            };
            assert_ne!(outcome, Ok(Status::Success), "{at:?} failed unnoticed");
            failed.push(at.name());
        }
        let registered = config.direct_ranges == 0;
        assert!(failed.contains(&"hca.create_key"), "{failed:?}");
        assert_eq!(failed.contains(&"hca.memory_management"), registered, "{failed:?}");
        assert_eq!(failed.contains(&"dma.sync"), iommu, "{failed:?}");
    }
}
