//! A controller that moves bytes through links.

use crate::bed::{Bed, PAGE, mapping};
use crate::nvme::{Controller, Data, Direction, NvmeError, Status};
use hw_model::addr::DmaAddr;
use hw_model::iommu::LeafSize;
use libtest_mimic::Failed;
use mr::dma::Mapping;
use odp::space::process::OwnedMemory;

/// Blocks of a page.
fn blocks(controller: &Controller) -> u16 {
    (PAGE / controller.identity().block) as u16
}

fn page_of(memory: &OwnedMemory, page: u64) -> Vec<u8> {
    let mut bytes = vec![0; PAGE as usize];
    memory.read_at(page * PAGE, &mut bytes).expect("it is ours");
    bytes
}

/// What is written for block `seed`: no two pages alike, no two bytes beside each other equal.
fn pattern(seed: u64) -> Vec<u8> {
    (0..PAGE).map(|at| (at * 7 + at / 256 + seed * 31) as u8).collect()
}

fn prp(mapping: &Mapping, page: u64) -> Data {
    Data::Prp(mapping.dma_address(page * PAGE), DmaAddr(0))
}

/// If it did not, an address in a link, or the order of linking and use, would be wrong.
pub fn round_trip(bed: &Bed) -> Result<(), Failed> {
    let container = bed.container()?;
    let mut controller = Controller::start(&container, bed.address, &bed.space)?;
    let (memory, phys) = bed.memory(4);
    let mapping = mapping(&container, 4 * PAGE);
    // Scattered in memory, contiguous for the device.
    let order = [2, 0, 3, 1];
    for (slot, page) in order.into_iter().enumerate() {
        mapping.link(slot as u64 * PAGE, phys.offset(page * PAGE), PAGE, LeafSize::Page)?;
    }
    mapping.sync(0, 4 * PAGE)?;
    let step = blocks(&controller);
    for (slot, page) in order.into_iter().enumerate() {
        memory.write_at(page * PAGE, &pattern(slot as u64))?;
        let first = slot as u64 * u64::from(step);
        controller.transfer(Direction::Write, first, step, prp(&mapping, slot as u64))?;
    }
    memory.write_at(0, &[0; 4 * PAGE as usize])?;
    // Back in pairs: two pages of one command, PRP1 and PRP2.
    for pair in [0, 2] {
        let data = Data::Prp(mapping.dma_address(pair * PAGE), mapping.dma_address((pair + 1) * PAGE));
        controller.transfer(Direction::Read, pair * u64::from(step), 2 * step, data)?;
    }
    for (slot, page) in order.into_iter().enumerate() {
        assert_eq!(page_of(&memory, page), pattern(slot as u64), "page {page}");
    }
    mapping.unlink(0, 4 * PAGE)?;
    Ok(())
}

/// If it landed in the old one, the flush would be missing; if in both, memory given back would be written.
pub fn relinked(bed: &Bed) -> Result<(), Failed> {
    let container = bed.container()?;
    let mut controller = Controller::start(&container, bed.address, &bed.space)?;
    let (memory, phys) = bed.memory(3);
    let mapping = mapping(&container, PAGE);
    let step = blocks(&controller);
    memory.write_at(0, &pattern(40))?;
    mapping.link(0, phys, PAGE, LeafSize::Page)?;
    mapping.sync(0, PAGE)?;
    controller.transfer(Direction::Write, 64, step, prp(&mapping, 0))?;
    for page in [1, 2] {
        mapping.unlink(0, PAGE)?;
        mapping.link(0, phys.offset(page * PAGE), PAGE, LeafSize::Page)?;
        mapping.sync(0, PAGE)?;
        memory.write_at(0, &[0; 3 * PAGE as usize])?;
        controller.transfer(Direction::Read, 64, step, prp(&mapping, 0))?;
        for other in 0..3 {
            let expected = if other == page { pattern(40) } else { vec![0; PAGE as usize] };
            assert_eq!(page_of(&memory, other), expected, "page {other} with page {page} linked");
        }
    }
    mapping.unlink(0, PAGE)?;
    Ok(())
}

/// If anything landed, unlinking would be no end of access.
pub fn unlinked(bed: &Bed) -> Result<(), Failed> {
    let container = bed.container()?;
    let mut controller = Controller::start(&container, bed.address, &bed.space)?;
    let (memory, phys) = bed.memory(2);
    let mapping = mapping(&container, 2 * PAGE);
    let step = blocks(&controller);
    memory.write_at(0, &pattern(50))?;
    mapping.link(0, phys, 2 * PAGE, LeafSize::Page)?;
    mapping.sync(0, 2 * PAGE)?;
    controller.transfer(Direction::Write, 128, step, prp(&mapping, 0))?;
    mapping.unlink(0, PAGE)?;
    memory.write_at(0, &[0xee; 2 * PAGE as usize])?;
    // How it ends is the controller's affair: writes to memory are posted, so it need not learn that they were stopped
    // (the emulator's does not). What counts is the memory.
    match controller.transfer(Direction::Read, 128, step, prp(&mapping, 0)) {
        Ok(()) | Err(NvmeError::Command { opcode: 2, status: Status { kind: 0, .. } }) => {}
        Err(error) => return Err(error.into()),
    }
    assert_eq!(page_of(&memory, 0), [0xee; PAGE as usize], "no byte lands");
    // The neighbour in the same mapping is as good as before.
    controller.transfer(Direction::Read, 128, step, prp(&mapping, 1))?;
    assert_eq!(page_of(&memory, 1), pattern(50));
    mapping.unlink(PAGE, PAGE)?;
    Ok(())
}

/// If a list did not do what an address does, requests that no PRP list can describe would have no way.
pub fn scattered_list(bed: &Bed) -> Result<(), Failed> {
    let container = bed.container()?;
    let mut controller = Controller::start(&container, bed.address, &bed.space)?;
    assert!(controller.identity().sgl, "{:?} takes no scatter-gather lists", controller.identity());
    let (memory, phys) = bed.memory(2);
    let mapping = mapping(&container, 2 * PAGE);
    mapping.link(0, phys, 2 * PAGE, LeafSize::Page)?;
    mapping.sync(0, 2 * PAGE)?;
    let step = blocks(&controller);
    memory.write_at(0, &pattern(60))?;
    controller.transfer(Direction::Write, 192, step, prp(&mapping, 0))?;
    // A data block of a page that begins inside a page: no PRP entry but the first may do that.
    let mut descriptor = [0; 16];
    descriptor[..8].copy_from_slice(&mapping.dma_address(PAGE / 2).0.to_le_bytes());
    descriptor[8..12].copy_from_slice(&(PAGE as u32).to_le_bytes());
    controller.transfer(Direction::Read, 192, step, Data::Sgl(descriptor))?;
    let mut landed = vec![0; PAGE as usize];
    memory.read_at(PAGE / 2, &mut landed)?;
    assert_eq!(landed, pattern(60));
    mapping.unlink(0, 2 * PAGE)?;
    Ok(())
}
