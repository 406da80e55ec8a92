//! Registration by size and kind of page, beside the floor and the price of a real pin.
//!
//! Expected, before measuring: a resident 4 KiB page costs the floor (about 60 ns to populate, 20 to scan), and on top one
//! page-list store and one IOMMU entry, both sequential: some 10 ns. A page in a transparent huge page costs the kernel
//! next to nothing, so a pinned region has an entry for each huge page, and one on demand pays our own 10 ns a page.

use anypage::bench::{Floor, RealPin};
use anypage::machine::{Machine, MachineConfig};
use anypage::mixed::{Kind, MixedMemory};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use hw_model::sync::Arc;
use mr::{Device, RegisterOptions};
use odp::space::AddressSpace;
use odp::space::process::{Options, ProcessSpace};
use std::hint::black_box;

const SIZES: [u64; 3] = [2 << 20, 16 << 20, 64 << 20];

fn registration(c: &mut Criterion) {
    let space = ProcessSpace::open(Options::default()).expect("this process can use its own memory");
    let machine = Machine::new(space.memory(), None, &MachineConfig::default()).expect("a machine");
    let pd = Arc::clone(&machine.near).alloc_pd().expect("a protection domain");
    for kind in [Kind::Anonymous, Kind::TransparentHuge, Kind::Hugetlb, Kind::Shared, Kind::File] {
        for size in SIZES {
            let Ok(memory) = MixedMemory::new(&[(kind, size)]).map(Arc::new) else {
                println!("SKIPPED {kind:?} of {size} bytes: the host has no such pages to spare");
                continue;
            };
            let range = memory.user_range(Arc::clone(&space) as _);
            // Resident from here on: what is measured is registration, not first touch.
            drop(Arc::clone(&pd).register(&range, RegisterOptions::pinned()).expect("a region"));
            let mut group = c.benchmark_group(format!("registration/{kind:?}"));
            group.throughput(Throughput::Bytes(size)).sample_size(20);
            let options =
                [("pinned", RegisterOptions::pinned()), ("on_demand", RegisterOptions::on_demand())];
            let huge =
                (kind == Kind::Hugetlb).then(|| ("hugetlb", RegisterOptions::on_demand().with_hugetlb()));
            for (name, options) in options.into_iter().chain(huge) {
                group.bench_function(BenchmarkId::new(name, size), |b| {
                    b.iter(|| black_box(Arc::clone(&pd).register(&range, options).expect("a region")));
                });
            }
            if let Some(mut floor) = Floor::new(memory.range()) {
                group.bench_function(BenchmarkId::new("floor_populate_and_scan", size), |b| {
                    b.iter(|| {
                        floor.populate(memory.range());
                        black_box(floor.scan(memory.range()))
                    });
                });
            }
            if let Some(pin) = RealPin::new().filter(|pin| pin.pin(memory.range())) {
                group.bench_function(BenchmarkId::new("real_pin", size), |b| {
                    b.iter(|| pin.pin(memory.range()))
                });
            }
            group.finish();
        }
    }
}

criterion_group!(benches, registration);
criterion_main!(benches);
