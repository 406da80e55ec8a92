//! The smallest whole use: memory of our own, registered on demand, written and read by a peer over RDMA.
//!
//! `cargo run --example register`

use anypage::machine::{End, Machine, MachineConfig};
use hw_model::hca::{Remote, SendRequest, Sge, Status};
use hw_model::sync::Arc;
use mr::RegisterOptions;
use odp::space::AddressSpace;
use odp::space::process::{Options, OwnedMemory, ProcessSpace};
use std::time::Duration;

fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    // The memory of this process, and two modelled HCAs that master it.
    let space = ProcessSpace::open(Options::default())?;
    let machine = Machine::new(space.memory(), None, &MachineConfig::default())?;

    // Memory that we own can be registered without an unsafe block.
    let ours = Arc::new(OwnedMemory::new(&space, 1 << 20)?);
    let theirs = Arc::new(OwnedMemory::new(&space, 1 << 20)?);
    let near = End::new(&machine.near, &ours.user_range(), RegisterOptions::on_demand())?;
    let far = End::new(&machine.far, &theirs.user_range(), RegisterOptions::pinned())?;
    near.connect(&far)?;

    // The peer writes into our region, whose pages nobody has touched yet.
    theirs.write_at(0, b"hello over RDMA")?;
    let local = [Sge { key: far.region.key(), address: far.region.address(), length: 15 }];
    let remote = Remote { key: near.region.key(), address: near.region.address().offset(4096) };
    far.qp.post_send(&SendRequest::write(1, &local, remote))?;

    let mut completions = Vec::new();
    while far.cq.poll(&mut completions, 1)? == 0 {
        far.cq.wait(Duration::from_secs(1));
    }
    assert_eq!(completions[0].status, Status::Success);

    let mut text = [0; 15];
    ours.read_at(4096, &mut text)?;
    let counters = near.region.counters();
    println!("{} ({} page fault)", String::from_utf8_lossy(&text), counters.page_faults);
    Ok(())
}
