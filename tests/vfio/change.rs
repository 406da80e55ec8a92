//! The program gives pages back under links: the notifier has them unlinked, and what takes their place is linked.

use crate::bed::{Bed, PAGE, mapping};
use crate::nvme::{Controller, Data, Direction};
use anypage::mixed::{Kind, MixedMemory};
use hw_model::addr::{DmaAddr, PhysAddr, VirtAddr, VirtRange};
use hw_model::iommu::{HostRefusal, LeafSize, MapError};
use hw_model::sync::Arc;
use libtest_mimic::Failed;
use mr::dma::{LinkError, Mapping};
use odp::notifier::{Notify, Raise};
use odp::space::{Access, AddressSpace, Rung};
use std::time::{Duration, Instant};

/// Pages of the program.
const PAGES: u64 = 4;

/// What is linked of the program's memory, page by page.
struct Linked {
    mapping: Mapping,
    start: VirtAddr,
}

impl Notify for Linked {
    /// There is nothing to hide and nobody to wait for: the controller is told of an address only for one command, and
    /// no command is under way when the program gives pages back.
    fn clear(&self, _range: VirtRange, raise: Raise<'_>) {
        raise.raise();
    }

    fn unlink(&self, range: VirtRange) {
        for page in 0..PAGES {
            let at = VirtRange::new(self.start.offset(page * PAGE), PAGE).expect("a page of the program");
            if range.overlaps(at) && self.mapping.unit_at(page * PAGE) > 0 {
                self.mapping.unlink(page * PAGE, PAGE).expect("linked by the page");
            }
        }
    }
}

/// Where page `page` of the program is, and its bytes.
fn page_of(bed: &Bed, memory: &MixedMemory, page: u64) -> Result<(PhysAddr, Vec<u8>), Failed> {
    let at = VirtRange::new(memory.range().start().offset(page * PAGE), PAGE).ok_or("no such page")?;
    let mut runs = Vec::new();
    bed.space.fault(at, Access::Write, &mut runs)?;
    let mut bytes = vec![0; PAGE as usize];
    bed.space.memory().read(runs[0].phys, &mut bytes)?;
    Ok((runs[0].phys, bytes))
}

/// If the page stayed linked, the controller would write where the program no longer looks.
pub fn given_back(bed: &Bed) -> Result<(), Failed> {
    let container = bed.container()?;
    let mut disk = Controller::start(&container, bed.address, &bed.space)?;
    let count = (PAGE / disk.identity().block) as u16;
    let memory = MixedMemory::new(&[(Kind::Anonymous, PAGES * PAGE)])?;
    let _watch = bed.space.watch(memory.range())?;
    assert_eq!(bed.space.rung(memory.range()), Rung::Events, "{}", bed.space.capabilities());
    let owner =
        Arc::new(Linked { mapping: mapping(&container, PAGES * PAGE), start: memory.range().start() });
    let linked = &owner.mapping;
    let interval = bed.space.notifiers().register(memory.range(), Arc::clone(&owner) as _);
    let link = |page: u64| -> Result<PhysAddr, Failed> {
        let (phys, _) = page_of(bed, &memory, page)?;
        linked.link(page * PAGE, phys, PAGE, LeafSize::Page)?;
        linked.sync(page * PAGE, PAGE)?;
        Ok(phys)
    };
    let address = |page: u64| Data::Prp(linked.dma_address(page * PAGE), DmaAddr(0));
    let mark = vec![0x5a; PAGE as usize];
    let nothing = vec![0; PAGE as usize];
    let before = (0..PAGES).map(link).collect::<Result<Vec<_>, _>>()?;
    bed.space.memory().write(before[0], &mark)?;
    disk.transfer(Direction::Write, 0, count, address(0))?;
    disk.transfer(Direction::Read, 0, count, address(1))?;
    assert_eq!(page_of(bed, &memory, 1)?.1, mark);

    memory.discard(1, 1)?;
    let end = Instant::now() + Duration::from_secs(60);
    // What is linked is counted after the page is seen to be gone.
    while linked.unit_at(PAGE) > 0 || linked.linked() > 3 * PAGE {
        assert!(Instant::now() < end, "nobody unlinked the page");
        std::thread::yield_now();
    }
    assert_eq!(linked.linked(), 3 * PAGE, "its neighbours stay");
    // A look at the pages holds for nobody while an invalidation runs: until it has ended the old frame is the page's.
    while bed.space.notifiers().stats().running > 0 {
        assert!(Instant::now() < end, "the invalidation never ends");
        std::thread::yield_now();
    }
    let _ = disk.transfer(Direction::Read, 0, count, address(1));
    let (now, bytes) = page_of(bed, &memory, 1)?;
    assert_eq!(bytes, nothing, "nothing lands in the page that took its place");
    // The frame of before is another one, and linking it is refused by name.
    let stale = linked.link(PAGE, before[1], PAGE, LeafSize::Page);
    let why = HostRefusal::Gone { phys: before[1] };
    let expected = MapError::Host { iova: linked.iova().offset(PAGE), why };
    assert_eq!((stale, now == before[1]), (Err(LinkError::Map(expected)), false));
    link(1)?;
    disk.transfer(Direction::Read, 0, count, address(1))?;
    assert_eq!(page_of(bed, &memory, 1)?.1, mark, "the same address leads to the new page");
    disk.transfer(Direction::Read, 0, count, address(2))?;
    assert_eq!(page_of(bed, &memory, 2)?.1, mark, "the neighbours stayed linked");

    // With nobody to unlink it, the page is pinned and lost to the program: the device goes on writing to it.
    drop(interval);
    memory.discard(3, 1)?;
    disk.transfer(Direction::Read, 0, count, address(3))?;
    assert_eq!(page_of(bed, &memory, 3)?.1, nothing);
    linked.unlink(0, PAGES * PAGE)?;
    Ok(())
}
