//! The whole way once.

use crate::bed::{Bed, space};
use anypage::machine::MachineConfig;
use anypage::mixed::{HUGE, Kind, MixedMemory};
use hw_model::hca::{OperationCode, Status};
use hw_model::sync::Arc;
use mr::RegisterOptions;

#[test]
fn a_mixed_region_takes_a_write_and_gives_it_back() {
    for iommu in [true, false] {
        let space = space();
        let parts = [Kind::Anonymous, Kind::TransparentHuge, Kind::Shared, Kind::File, Kind::Untouched];
        let memory = Arc::new(MixedMemory::new(&parts.map(|kind| (kind, HUGE))).expect("memory"));
        let range = memory.user_range(Arc::clone(&space) as _);
        let config = MachineConfig { iommu, ..MachineConfig::default() };
        let bed = Bed::new(&space, &range, RegisterOptions::on_demand(), &config);
        let pattern: Vec<u8> = (0..5 * HUGE).map(|i| (i % 251) as u8 + 1).collect();
        bed.mirror.write_at(0, &pattern).expect("our own memory");
        assert_eq!(bed.write(0, 5 * HUGE as u32), Status::Success);
        bed.mirror.write_at(0, &vec![0; pattern.len()]).expect("our own memory");
        assert_eq!(bed.read(0, 5 * HUGE as u32), Status::Success);
        assert!(bed.far_bytes(0, pattern.len()) == pattern, "the bytes came back changed");
        assert_eq!(bed.near_does(OperationCode::Write, 0, 2 * HUGE as u32), Status::Success);
        assert_eq!(bed.near_does(OperationCode::Read, 0, 2 * HUGE as u32), Status::Success);
        let report = bed.near.region.report();
        assert_eq!(report.present, report.entries, "every page was written");
        assert!(report.counters.page_faults > 0);
        assert_eq!(bed.space.stats().retired_uses, 0, "a stale translation reached memory");
        let domain = bed.machine.near.dma().domain();
        assert_eq!(domain.is_some(), iommu);
        assert!(
            domain.is_none_or(|domain| domain.stats().violations == 0),
            "the IOMMU saw a broken contract"
        );
    }
}
