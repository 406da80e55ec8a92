//! What a region can be over: all of the address space, a DMABUF, a mixture in one range; and what a limit says.

use super::world::{Case, Error, PAGE, World, ensure, everything};
use hw_model::addr::RegionAddr;
use hw_model::hca::Access;
use hw_model::sync::Arc;
use mr::device::verbs::{Capability, VerbsError};
use mr::{Mode, Region, RegisterOptions};
use odp::fault::Want;
use odp::space::Access as PageAccess;
use odp::space::process::{ContiguousMemory, OwnedMemory, Piece};
use rustix::fs::{MemfdFlags, SealFlags};
use std::os::fd::{AsFd, OwnedFd};

pub const CASES: &[Case] = &[
    Case { name: "an implicit region reaches what is mapped after it was registered", run: implicit },
    Case { name: "a region over a DMABUF reaches the buffer", run: dmabuf },
    Case { name: "a mixture in one range is one region", run: mixture },
    Case { name: "memory that is moved into the range is reached there", run: moved },
    Case { name: "a DMABUF's mapping in the range is reached, or refused by name", run: buffer_in_the_range },
    Case { name: "advice brings pages in", run: advice },
    Case { name: "limits are named before they bite", run: limits },
];

/// That `said` is a lack of `capability` by this device, told as such.
fn lacks<T>(world: &World, capability: Capability, said: Result<T, VerbsError>) -> Result<(), Error> {
    let name = world.device.name();
    match said {
        Err(error @ VerbsError::Lacks { .. }) => {
            let expected = VerbsError::Lacks { device: name.to_owned(), capability };
            ensure(error == expected, &format!("{error}"))?;
            println!("{error}: that is what was tested");
            Ok(())
        }
        Err(error) => Err(error.into()),
        Ok(_) => Err(format!("{name} did what it says it cannot").into()),
    }
}

/// A file of memory that cannot shrink, of pages of `byte`.
fn file(pages: u64, byte: u8) -> Result<OwnedFd, Error> {
    let file = rustix::fs::memfd_create("verbs", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let bytes = vec![byte; (pages * PAGE) as usize];
    let mut at = 0;
    while at < bytes.len() {
        at += rustix::io::pwrite(&file, &bytes[at..], at as u64)?;
    }
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK)?;
    Ok(file)
}

fn implicit(world: &World) -> Result<(), Error> {
    let all = everything(&world.space);
    let region = world.pd.register(&all, RegisterOptions::implicit());
    if !world.device.capabilities().has(Capability::Implicit) {
        return lacks(world, Capability::Implicit, region);
    }
    let region = region?;
    ensure(region.mode() == Mode::Implicit && region.address() == RegionAddr(0), "not over everything")?;
    for byte in 1..4 {
        let memory = Arc::new(OwnedMemory::new(&world.space, PAGE)?);
        memory.write_at(0, &[byte; PAGE as usize])?;
        world.expect("memory that came later", region.key(), RegionAddr(memory.range().start().0), byte)?;
    }
    let memory = Arc::new(OwnedMemory::new(&world.space, PAGE)?);
    let part = world.pd.register(&memory.user_range(), RegisterOptions::implicit());
    ensure(matches!(part, Err(VerbsError::NotEverything { .. })), &format!("{part:?}"))
}

fn dmabuf(world: &World) -> Result<(), Error> {
    let buffer = file(4, 0x2d)?;
    let rights = Access::LOCAL_WRITE | Access::REMOTE_READ | Access::REMOTE_WRITE;
    let register = |part, at| world.pd.register_dmabuf(buffer.as_fd(), part, RegionAddr(at), rights);
    if !world.device.capabilities().has(Capability::Dmabuf) {
        return lacks(world, Capability::Dmabuf, register((0, PAGE), 0));
    }
    // Pages 1 and 2 of it, called 0x10000 and up.
    let region = register((PAGE, 2 * PAGE), 0x10000)?;
    ensure(region.len() == 2 * PAGE && region.address() == RegionAddr(0x10000), "another part")?;
    world.expect("the buffer", region.key(), RegionAddr(0x10000), 0x2d)?;
    world.write(region.key(), RegionAddr(0x10000 + PAGE), 0x3d)?;
    let mut bytes = [0; 4 * PAGE as usize];
    let read = rustix::io::pread(&buffer, &mut bytes, 0)?;
    let pages: Vec<_> = bytes.chunks(PAGE as usize).map(|page| page[0]).collect();
    ensure(read == bytes.len() && pages == [0x2d, 0x2d, 0x3d, 0x2d], &format!("{pages:x?} in the buffer"))?;
    world.expect_refused("beyond the part", region.key(), RegionAddr(0x10000 + 2 * PAGE))?;
    let said = register((PAGE, PAGE), 0x10008);
    ensure(matches!(said, Err(VerbsError::DmabufAddress { .. })), &format!("{said:?}"))?;
    let said = register((8 * PAGE, PAGE), 0);
    ensure(matches!(said, Err(VerbsError::Refused { .. })), &format!("past the end: {said:?}"))
}

fn mixture(world: &World) -> Result<(), Error> {
    let (shared, private) = (file(2, 0xa1)?, file(2, 0xa2)?);
    let memory = ContiguousMemory::new(
        &world.space,
        &[
            Piece::Anonymous(PAGE),
            Piece::Shared { file: shared.as_fd(), offset: PAGE, len: PAGE },
            Piece::Private { file: private.as_fd(), offset: 0, len: 2 * PAGE },
            Piece::Anonymous(PAGE),
        ],
    )?;
    drop(private);
    memory.write_at(0, &[0xa0; PAGE as usize])?;
    memory.write_at(4 * PAGE, &[0xa3; PAGE as usize])?;
    let region = world.pd.register(&memory.user_range(), world.best())?;
    let at = |page: u64| region.address().offset(page * PAGE);
    for (page, byte) in [0xa0, 0xa1, 0xa2, 0xa2, 0xa3].into_iter().enumerate() {
        world.expect(&format!("page {page}"), region.key(), at(page as u64), byte)?;
    }
    // What is written to the shared piece is in the file.
    world.write(region.key(), at(1), 0xb1)?;
    let mut byte = [0];
    rustix::io::pread(&shared, &mut byte, PAGE)?;
    ensure(byte == [0xb1], "the file does not have what was written")?;
    if !world.device.capabilities().has(Capability::OnDemand) {
        return Ok(());
    }
    // Pages that change kind are relinked by the device: the key stays.
    memory.replace(0, Piece::Shared { file: shared.as_fd(), offset: 0, len: PAGE })?;
    memory.replace(PAGE, Piece::Anonymous(PAGE))?;
    world.expect("a page that became the file's", region.key(), at(0), 0xa1)?;
    world.expect("a page that became private", region.key(), at(1), 0)
}

fn moved(world: &World) -> Result<(), Error> {
    let memory = ContiguousMemory::new(&world.space, &[Piece::Anonymous(3 * PAGE)])?;
    let elsewhere = super::world::mapped(0xc1)?;
    super::world::give(&memory, PAGE, elsewhere)?;
    let region = world.pd.register(&memory.user_range(), world.best())?;
    world.expect("before it", region.key(), region.address(), 0)?;
    world.expect("what was moved", region.key(), region.address().offset(PAGE), 0xc1)
}

fn buffer_in_the_range(world: &World) -> Result<(), Error> {
    let file = file(2, 0xd1)?;
    let Some(buffer) = super::world::udmabuf(&file, 2)? else {
        println!("SKIPPED a DMABUF's mapping in the range: there is no /dev/udmabuf");
        return Ok(());
    };
    let shared = |file| Piece::Shared { file, offset: 0, len: 2 * PAGE };
    let memory = ContiguousMemory::new(&world.space, &[Piece::Anonymous(PAGE), shared(buffer.as_fd())])?;
    let mut byte = [0];
    memory.read_at(PAGE, &mut byte)?;
    ensure(byte == [0xd1], "the program does not see the buffer")?;
    match world.pd.register(&memory.user_range(), RegisterOptions::pinned()) {
        // What rdma_rxe says: the mapping has no pages that it could be given.
        Err(VerbsError::WithoutPages { part, .. }) => {
            ensure(part.start() == memory.range().start().offset(PAGE), &format!("{part}"))?;
        }
        // What the drop-in library says, which copies by address.
        Ok(region) => world.expect("the buffer", region.key(), region.address().offset(PAGE), 0xd1)?,
        Err(error) => return Err(error.into()),
    }
    // The memory file that the buffer was made of has pages.
    memory.replace(PAGE, shared(file.as_fd()))?;
    let region = world.pd.register(&memory.user_range(), RegisterOptions::pinned())?;
    world.expect("its memory file", region.key(), region.address().offset(PAGE), 0xd1)
}

fn advice(world: &World) -> Result<(), Error> {
    let memory = ContiguousMemory::new(&world.space, &[Piece::Anonymous(8 * PAGE)])?;
    let region = world.pd.register(&memory.user_range(), world.best())?;
    region.advise(0, 8 * PAGE, Want::Fault(PageAccess::Write))?;
    region.advise(PAGE, PAGE, Want::Fault(PageAccess::Read))?;
    region.advise_later(0, 8 * PAGE, Want::Snapshot)?;
    ensure(region.advise(8 * PAGE, 1, Want::Snapshot).is_err(), "advice past the end")?;
    world.expect("what was brought in", region.key(), region.address().offset(7 * PAGE), 0)?;
    // Advice names memory as requests do.
    let options = RegisterOptions { address: Some(RegionAddr(0x7000)), ..world.best() };
    let renamed = world.pd.register(&memory.user_range(), options)?;
    renamed.advise(PAGE, 7 * PAGE, Want::Fault(PageAccess::Write))?;
    Ok(())
}

fn limits(world: &World) -> Result<(), Error> {
    let memory = ContiguousMemory::new(&world.space, &[Piece::Anonymous(PAGE)])?;
    let part = |len| memory.user_range().part(0, len).ok_or("inside");
    let said = world.pd.register(&part(0)?, world.best());
    ensure(matches!(said, Err(VerbsError::Empty)), &format!("{said:?}"))?;
    let huge = world.pd.register(&part(PAGE)?, world.best().with_hugetlb());
    ensure(matches!(huge, Err(VerbsError::HugePages { page: PAGE, .. })), &format!("{huge:?}"))?;
    let Some(more) = world.device.capabilities().max_region.checked_add(1) else { return Ok(()) };
    let all = everything(&world.space);
    let Some(too_long) = all.part(0, more) else { return Ok(()) };
    let said = world.pd.register(&too_long, RegisterOptions::pinned());
    ensure(matches!(said, Err(VerbsError::TooLong { .. })), &format!("{said:?}"))
}
