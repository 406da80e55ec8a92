//! Which pages, and what they cost: 8, 13, 14.

use crate::bed::{Bed, hears_of_drops, space};
use crate::checks::{Verdict, until};
use crate::overlay::{Instead, Overlay};
use crate::remapped::Remapped;
use anypage::machine::{Machine, MachineConfig};
use hw_model::addr::{PAGE_SIZE, VirtRange, page_bytes};
use hw_model::bus::{Bus, DeviceSpec, RamStorage};
use hw_model::hca::{Backing, Path, Status};
use hw_model::iommu::{Domain, DomainConfig};
use hw_model::link::Fabric;
use hw_model::sync::Arc;
use mr::device::RegisterError;
use mr::device::model::{FaultPolicy, ModelConfig, ModelDevice};
use mr::dma::route::{Case, Target, Translation, route};
use mr::dma::{DmaConfig, Policy, Refusal};
use mr::{Device, MapRegionError, PublishError, RegisterOptions};
use odp::fault::FaultFailure;
use odp::prefetch::PrefetchPolicy;
use odp::space::AddressSpace;

/// Why registration of one page of `kind` on a device of `dma` was refused.
fn refusal(kind: Backing, dma: DmaConfig, iommu: bool) -> Refusal {
    let (space, memory) = (space(), Remapped::new(3));
    let overlay = Overlay::new(&space);
    let page = super::page_of(memory.range(), 1);
    overlay.say(page, Instead::Kind(kind));
    let bus = Bus::new(space.memory());
    let spec = DeviceSpec::new("hca0");
    let spec = match iommu {
        true => spec.domain(&Domain::new(DomainConfig::default()).expect("the default is possible")),
        false => spec,
    };
    let port = bus.attach(spec).expect("room on the bus");
    let config = ModelConfig { dma, ..ModelConfig::default() };
    let device = ModelDevice::stepped("hca0", port, Fabric::new().port(), config).expect("a device");
    let pd = Arc::clone(&device).alloc_pd().expect("a domain");
    let range = memory.user_range(overlay as _);
    let refused = pd.register(&range, RegisterOptions::pinned()).err().expect("a page has no way");
    let RegisterError::Map(MapRegionError::Pages(FaultFailure::Publish(PublishError::Refused {
        at,
        refusal,
    }))) = refused
    else {
        panic!("not refused by name: {refused}");
    };
    if kind != Backing::Anonymous {
        assert_eq!(at, page.start(), "the page is named");
    }
    assert_eq!(device.dma().iova_stats().live_ranges, 0, "and nothing is left");
    assert_eq!(device.hca().live_objects().keys, 0);
    refusal
}

/// Invariant 8: with this configuration no page of any kind is bounced.
fn never_bounces(policy: Policy) -> Verdict {
    for backing in Backing::ALL {
        for bits in 0..16_u8 {
            let case = Case {
                target: Target::of(backing, None),
                translation: if bits & 1 == 0 { Translation::Direct } else { Translation::Iommu },
                coherent_device: bits & 2 == 0,
                trusted_device: bits & 4 == 0,
                within_mask: bits & 8 == 0,
                granule_aligned: false,
                policy,
            };
            if route(&case) == Ok(Path::Bounce) {
                return Err(format!("bounced: {case:?}"));
            }
        }
    }
    Ok(())
}

#[test]
fn invariant_08_what_would_bounce_is_refused_by_name() {
    for iommu in [true, false] {
        let dma = DmaConfig::default();
        assert_eq!(refusal(Backing::EncryptedPrivate, dma.clone(), iommu), Refusal::Encrypted);
        assert_eq!(refusal(Backing::DevicePrivate, dma.clone(), iommu), Refusal::DevicePrivate);
        let dma = DmaConfig { coherent: false, ..dma };
        assert_eq!(refusal(Backing::Anonymous, dma, iommu), Refusal::NonCoherent);
        // Under the older policy the table says bounce; a region, which cannot, refuses.
        let dma = DmaConfig { policy: Policy::Legacy, ..DmaConfig::default() };
        assert_eq!(refusal(Backing::EncryptedPrivate, dma, iommu), Refusal::WouldBounce);
    }
    never_bounces(Policy::Coherent).expect("no case of the table does");
}

#[test]
fn invariant_08_can_fail() {
    never_bounces(Policy::Legacy).expect_err("the older policy does bounce, and it is seen");
}

/// What one relinking cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cost {
    entries_written: u64,
    entries_hidden: u64,
    leaves_mapped: u64,
    leaves_unmapped: u64,
    calls: [u64; 3],
    iotlb_commands: u64,
}

impl Cost {
    /// One list write and one hiding, one IOMMU entry each way, one call each of link, sync and unlink, one command after
    /// the unlink and one before the link may be used.
    const OF_ONE_PAGE: Self = Self {
        entries_written: 1,
        entries_hidden: 1,
        leaves_mapped: 1,
        leaves_unmapped: 1,
        calls: [1, 1, 1],
        iotlb_commands: 2,
    };

    fn so_far(bed: &Bed) -> Self {
        let stats = bed.machine.near.dma().domain().expect("behind an IOMMU").stats();
        let counters = bed.near.region.counters();
        Self {
            entries_written: counters.entries_published,
            entries_hidden: counters.pages_invalidated,
            leaves_mapped: stats.leaves_mapped.iter().sum(),
            leaves_unmapped: stats.leaves_unmapped.iter().sum(),
            calls: [counters.links, counters.syncs, counters.unlinks],
            iotlb_commands: stats.iotlb.flushes,
        }
    }

    /// What dropping `pages` pages from `page` on and writing a byte of the first again costs.
    fn of_relinking(bed: &Bed, memory: &Remapped, page: u64, pages: u64) -> Self {
        let present = bed.near.region.report().present;
        let before = Self::so_far(bed);
        memory.discard(page, pages);
        assert!(until(|| bed.near.region.report().present == present - pages), "the pages go");
        assert!(until(|| bed.space.notifiers().stats().running == 0));
        assert_eq!(bed.write_to(page_bytes(page), 0, 1), Status::Success);
        let after = Self::so_far(bed);
        Self {
            entries_written: after.entries_written - before.entries_written,
            entries_hidden: after.entries_hidden - before.entries_hidden,
            leaves_mapped: after.leaves_mapped - before.leaves_mapped,
            leaves_unmapped: after.leaves_unmapped - before.leaves_unmapped,
            calls: std::array::from_fn(|index| after.calls[index] - before.calls[index]),
            iotlb_commands: after.iotlb_commands - before.iotlb_commands,
        }
    }
}

/// A region whose pages come one by one: a prefetch that is still on its way is counted as somebody else's relinking.
fn region_of(pages: u64) -> (Bed, Arc<Remapped>) {
    let (space, memory) = (space(), Remapped::new(pages));
    let range = memory.user_range(Arc::clone(&space) as _);
    let faults = FaultPolicy { neighbours: 0, prefetch: PrefetchPolicy::Off };
    let (options, config) =
        (RegisterOptions::on_demand(), MachineConfig { faults, ..MachineConfig::default() });
    (Bed::with_mirror(&space, &range, options, &config, PAGE_SIZE), memory)
}

#[test]
fn invariant_13_relinking_a_page_costs_the_same_in_a_region_of_any_size() {
    if !hears_of_drops("invariant_13_relinking_a_page_costs_the_same_in_a_region_of_any_size") {
        return;
    }
    for megabytes in [1_u64, 64, 1 << 10, 16 << 10] {
        let (bed, memory) = region_of(megabytes << 8);
        let last = (megabytes << 8) - 1;
        for page in [0, last / 2, last] {
            assert_eq!(bed.write_to(page_bytes(page), 0, 1), Status::Success);
        }
        for page in [last / 2, last, 0] {
            let cost = Cost::of_relinking(&bed, &memory, page, 1);
            assert_eq!(cost, Cost::OF_ONE_PAGE, "page {page} of {megabytes} MiB");
        }
    }
}

#[test]
fn invariant_13_can_fail() {
    if !hears_of_drops("invariant_13_can_fail") {
        return;
    }
    // Relinking that takes the neighbours along.
    let (bed, memory) = region_of(256);
    for page in 0..16 {
        assert_eq!(bed.write_to(page_bytes(page), 0, 1), Status::Success);
    }
    assert_ne!(Cost::of_relinking(&bed, &memory, 0, 16), Cost::OF_ONE_PAGE);
}

/// Questions about peer-to-peer routes that registering and using a region with `peer` pages in a BAR asks.
fn route_lookups(peer: u64) -> u64 {
    let space = space();
    let storage = RamStorage::new(1 << 20).expect("memory");
    let machine = Machine::new(space.memory(), Some(storage), &MachineConfig::default()).expect("a machine");
    let memory = Remapped::new(256);
    let overlay = Overlay::new(&space);
    if peer > 0 {
        let part = VirtRange::new(memory.range().start(), page_bytes(peer)).expect("in it");
        overlay.say(part, Instead::Peer(Arc::clone(machine.bar.as_ref().expect("asked for"))));
    }
    let range = memory.user_range(overlay as _);
    let bed = Bed::on(machine, &space, &range, RegisterOptions::pinned(), page_bytes(256));
    assert_eq!(bed.write(0, page_bytes(256) as u32), Status::Success);
    assert_eq!(bed.read(0, page_bytes(256) as u32), Status::Success);
    memory.discard(200, 8);
    assert!(until(|| bed.near.region.counters().pages_invalidated > 0));
    assert_eq!(bed.write(0, page_bytes(256) as u32), Status::Success);
    bed.machine.bus.route_lookups()
}

#[test]
fn invariant_14_a_region_without_peer_pages_asks_for_no_route() {
    if !hears_of_drops("invariant_14_a_region_without_peer_pages_asks_for_no_route") {
        return;
    }
    assert_eq!(route_lookups(0), 0);
}

#[test]
fn invariant_14_can_fail() {
    if !hears_of_drops("invariant_14_can_fail") {
        return;
    }
    let asked = route_lookups(64);
    assert!(asked > 0, "64 pages of one BAR: the count would show");
    assert!(asked < 64, "though the pages of one provider share their questions: {asked}");
}
