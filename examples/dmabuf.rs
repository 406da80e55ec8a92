//! A DMABUF in one region: imported, read and written by a peer over RDMA, and taken back by its exporter.
//!
//! `cargo run --example dmabuf` makes the buffer of a memory file; `cargo run --example dmabuf - <&FD` takes one of the
//! kernel (udmabuf, /dev/dma_heap, a driver) as standard input.

use anypage::machine::{End, Machine, MachineConfig};
use hw_model::fault_plan::Points;
use hw_model::hca::{Remote, SendRequest, Sge, Status};
use hw_model::sync::Arc;
use mr::RegisterOptions;
use odp::space::AddressSpace;
use odp::space::dmabuf::{ImportMode, ImportOptions};
use odp::space::process::{FileExport, Options, OwnedMemory, ProcessSpace};
use rustix::fs::{MemfdFlags, SealFlags};
use std::error::Error;
use std::time::Duration;

/// Where the peer writes: the second page.
const AT: u64 = 4096;
const TEXT: &[u8] = b"written over RDMA";

fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let space = ProcessSpace::open(Options::default())?;
    let machine = Machine::new(space.memory(), None, &MachineConfig::default())?;

    let buffer = if std::env::args().nth(1).as_deref() == Some("-") {
        FileExport::export(&space, std::io::stdin(), Points::OFF)?
    } else {
        let file = rustix::fs::memfd_create("buffer", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&file, 8 * 4096)?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK)?;
        rustix::io::pwrite(&file, b"from the file", 0)?;
        FileExport::export(&space, &file, Points::OFF)?
    };
    let importer = buffer.attach(ImportOptions::new(ImportMode::PinnedRevocable))?;
    let memory = importer.user_range().ok_or("nobody vouches for this exporter")?;

    let mirror = Arc::new(OwnedMemory::new(&space, memory.range().len())?);
    let near = End::new(&machine.near, &memory, RegisterOptions::pinned())?;
    let far = End::new(&machine.far, &mirror.user_range(), RegisterOptions::pinned())?;
    near.connect(&far)?;
    println!("{} pages imported, key {:?}", buffer.pages(), near.region.key());

    let mut first = [0; 32];
    done(ask(&near, &far, false, 0, first.len())?)?;
    mirror.read_at(0, &mut first)?;
    println!("read: {}", String::from_utf8_lossy(&first).trim_end_matches('\0'));
    mirror.write_at(AT, TEXT)?;
    done(ask(&near, &far, true, AT, TEXT.len())?)?;

    // Read back to another place.
    mirror.write_at(AT, &[0; TEXT.len()])?;
    done(ask(&near, &far, false, AT, TEXT.len())?)?;
    let mut back = [0; TEXT.len()];
    mirror.read_at(AT, &mut back)?;
    assert_eq!(back, TEXT);
    println!("wrote: {}", String::from_utf8_lossy(&back));

    buffer.revoke()?;
    let refused = ask(&near, &far, true, 0, 1)?;
    assert_eq!(refused, Status::RemoteAccessError);
    println!("revoked: {refused:?}; the key stays taken until the region is deregistered");
    Ok(())
}

fn done(status: Status) -> Result<(), String> {
    if status == Status::Success { Ok(()) } else { Err(format!("a request failed: {status:?}")) }
}

/// The far end writes `len` bytes at `offset` to the near region, or reads them from there.
fn ask(
    near: &End,
    far: &End,
    write: bool,
    offset: u64,
    len: usize,
) -> Result<Status, Box<dyn Error + Send + Sync>> {
    let address = far.region.address().offset(offset);
    let local = [Sge { key: far.region.key(), address, length: u32::try_from(len)? }];
    let remote = Remote { key: near.region.key(), address: near.region.address().offset(offset) };
    let request =
        if write { SendRequest::write(1, &local, remote) } else { SendRequest::read(1, &local, remote) };
    far.qp.post_send(&request)?;
    let mut completions = Vec::new();
    while far.cq.poll(&mut completions, 1)? == 0 {
        far.cq.wait(Duration::from_secs(1));
    }
    Ok(completions[0].status)
}
