//! A registration cache: the second request for memory costs a lookup, and memory may go whenever its owner likes.
//!
//! `cargo run --release --example cache`

use anypage::machine::{Machine, MachineConfig};
use hw_model::hca::Access;
use hw_model::sync::Arc;
use mr::{Cache, CacheConfig, Device};
use odp::space::AddressSpace;
use odp::space::process::{Options, OwnedMemory, ProcessSpace};
use std::time::Instant;

const BUFFER: u64 = 1 << 20;

fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let space = ProcessSpace::open(Options::default())?;
    let machine = Machine::new(space.memory(), None, &MachineConfig::default())?;
    let pd = Arc::clone(&machine.near).alloc_pd()?;
    let cache = Cache::new(pd, Arc::clone(&space) as _, CacheConfig::default());
    let rights = Access::LOCAL_WRITE | Access::REMOTE_WRITE;

    let memory = Arc::new(OwnedMemory::new(&space, BUFFER)?);
    memory.write_at(0, b"something to send")?;
    let buffer = memory.user_range();
    for request in ["first", "second"] {
        let start = Instant::now();
        let lease = cache.get_part(&buffer, 0, 64 << 10, rights)?;
        println!("{request} request: {:?}, key {:?}", start.elapsed(), lease.key());
    }

    // The cache does not hold the memory. What comes to the same addresses later is registered anew.
    drop((buffer, memory));
    let memory = Arc::new(OwnedMemory::new(&space, BUFFER)?);
    let lease = cache.get(&memory.user_range(), rights)?;
    println!("other memory: key {:?}", lease.key());
    println!("{:?}", cache.stats());
    Ok(())
}
