use super::*;
use crate::addr::{Iova, PhysAddr};
use crate::bus::DeviceId;
use crate::iommu::{DmaAccess, Domain, DomainConfig, FlushMode, Prot};

#[test]
fn many_freed_ranges_cost_one_flush_and_stay_reachable_until_then() {
    let config = DomainConfig { mode: FlushMode::Lazy, audit: true, ..DomainConfig::default() };
    let domain = Domain::new(config).expect("possible");
    let mut queue = FlushQueue::new(4, 1000);
    let mut freed = Vec::new();
    for page in 0..4_u64 {
        let iova = Iova(0x1000 * (page + 1));
        domain.map(iova, PhysAddr(0x10_0000), 0x1000, Prot::READ).expect("free");
        domain.translate(DeviceId(0), iova, DmaAccess::Read).expect("mapped");
        let _gather = domain.unmap(iova, 0x1000).expect("mapped");
        let late = domain.translate(DeviceId(0), iova, DmaAccess::Read);
        assert_eq!(late, Ok(PhysAddr(0x10_0000)), "the window that lazy mode leaves open");
        assert_eq!(domain.stats().iotlb.flushes, 0);
        queue.push(iova, || domain.flush_all(), |iova| freed.push(iova));
    }
    assert_eq!(freed, [0x1000, 0x2000, 0x3000, 0x4000].map(Iova), "full: all come back, oldest first");
    let stats = domain.stats();
    assert_eq!((stats.iotlb.flushes, stats.iotlb.invalidated, stats.stale_hits), (1, 4, 4));
    assert!(domain.translate(DeviceId(0), Iova(0x1000), DmaAccess::Read).is_err());
}

#[test]
fn a_range_waits_no_longer_than_the_time_out() {
    let domain = Domain::new(DomainConfig::default()).expect("possible");
    let mut queue = FlushQueue::new(100, 1000);
    let mut freed = Vec::new();
    let flush = || domain.flush_all();
    assert!(!queue.poll(u64::MAX, flush, |()| ()), "nothing waits, nothing is flushed");
    queue.push((), flush, |()| freed.push(()));
    assert_eq!(queue.deadline_ns(), Some(0), "its time begins when it is first asked for");
    assert!(!queue.poll(500, flush, |()| freed.push(())));
    queue.push((), flush, |()| freed.push(()));
    assert_eq!(queue.deadline_ns(), Some(1500));
    assert!(!queue.poll(1499, flush, |()| freed.push(())));
    assert!(queue.poll(1500, flush, |()| freed.push(())));
    assert_eq!((freed.len(), queue.len(), queue.is_empty()), (2, 0, true));
    assert_eq!((queue.deadline_ns(), domain.stats().iotlb.flushes), (None, 1));
}
