//! RDMA write over the in-process link, pinned and on demand, beside memcpy of the same bytes.
//!
//! Expected: a message is copied once, on the thread that posts, by packets of 64 KiB. A packet costs about 1.2 us of
//! protocol both ways (some 40 cache lines, 20 uncontended locks) and two translations a page at 20 ns, so at 9 GB/s of
//! memcpy (7.3 us for 64 KiB) about 0.8 of memcpy at 64 KiB, and 0.9 at 1 MiB, where acknowledgements are shared.

use anypage::machine::{End, Machine, MachineConfig};
use anypage::mixed::{Kind, MixedMemory};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use hw_model::hca::{Remote, SendRequest, Sge, Status};
use hw_model::sync::Arc;
use mr::RegisterOptions;
use odp::space::AddressSpace;
use odp::space::process::{Options, OwnedMemory, ProcessSpace};
use std::hint::black_box;

/// Bytes of each region: more than the caches hold.
const REGION: u64 = 64 << 20;

fn rdma_write(c: &mut Criterion) {
    let space = ProcessSpace::open(Options::default()).expect("this process can use its own memory");
    let machine = Machine::new(space.memory(), None, &MachineConfig::default()).expect("a machine");
    let source = Arc::new(OwnedMemory::new(&space, REGION).expect("memory"));
    let target = Arc::new(MixedMemory::new(&[(Kind::Anonymous, REGION)]).expect("memory"));
    let target = target.user_range(Arc::clone(&space) as _);
    for (name, options) in
        [("pinned", RegisterOptions::pinned()), ("on_demand", RegisterOptions::on_demand())]
    {
        let far = End::new(&machine.far, &source.user_range(), RegisterOptions::pinned()).expect("a region");
        let near = End::new(&machine.near, &target, options).expect("a region");
        far.connect(&near).expect("fresh queue pairs connect");
        let mut group = c.benchmark_group("rdma_write");
        for size in [4 << 10, 64 << 10, 1 << 20] {
            group.throughput(Throughput::Bytes(size));
            let mut offset = 0;
            group.bench_function(BenchmarkId::new(name, size), |b| {
                b.iter(|| {
                    offset = (offset + size) % (REGION - size + 1) / 4096 * 4096;
                    write(&far, &near, offset, size as u32);
                });
            });
        }
        group.finish();
    }
}

/// One write and its completion.
fn write(far: &End, near: &End, offset: u64, length: u32) {
    let local = [Sge { key: far.region.key(), address: far.region.address().offset(offset), length }];
    let remote = Remote { key: near.region.key(), address: near.region.address().offset(offset) };
    far.qp.post_send(&SendRequest::write(0, &local, remote)).expect("the queue has room");
    let mut completions = Vec::with_capacity(1);
    while far.cq.poll(&mut completions, 1).expect("no overrun") == 0 {
        std::hint::spin_loop();
    }
    assert_eq!(completions[0].status, Status::Success);
}

fn memcpy(c: &mut Criterion) {
    let source = vec![1_u8; REGION as usize];
    let mut target = vec![0_u8; REGION as usize];
    let mut group = c.benchmark_group("rdma_write");
    for size in [4 << 10, 64 << 10, 1 << 20] {
        group.throughput(Throughput::Bytes(size as u64));
        let mut offset = 0;
        group.bench_function(BenchmarkId::new("memcpy", size), |b| {
            b.iter(|| {
                offset = (offset + size) % (REGION as usize - size + 1) / 4096 * 4096;
                target[offset..offset + size].copy_from_slice(&source[offset..offset + size]);
                black_box(&target[offset]);
            });
        });
    }
    group.finish();
}

criterion_group!(benches, rdma_write, memcpy);
criterion_main!(benches);
