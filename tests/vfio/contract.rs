//! The contract of the two-step API, at an IOMMU that the kernel programs.

use crate::bed::{Bed, PAGE, mapping};
use crate::kernel;
use hw_model::addr::{Iova, VirtRange};
use hw_model::iommu::{Domain, DomainConfig, HostRefusal, LeafSize, MapError, Prot, UnmapError};
use hw_model::sync::Arc;
use libtest_mimic::Failed;
use mr::dma::{IoSpace, LinkError, Mapping};
use odp::space::{Access, AddressSpace};
use rustix::io::Errno;

const LARGE: u64 = 2 << 20;

/// If a window of interrupts could be mapped, a device's interrupt would be a write into memory.
pub fn interrupts(bed: &Bed) -> Result<(), Failed> {
    let container = bed.container()?;
    let msi = Iova(0xfee0_0000);
    let kept = container.reserved();
    assert!(kept.iter().any(|&(start, len)| start <= msi && msi.0 < start.0 + len), "{kept:?}");
    let (_memory, phys) = bed.memory(1);
    let refused = container.map(msi, phys, PAGE, Prot::READ_WRITE, LeafSize::Page);
    assert_eq!(refused, Err(MapError::Host { iova: msi, why: HostRefusal::Reserved }));
    assert_eq!(container.iova_to_phys(msi), None, "nothing of it stays");
    // The allocator works its way up from the bottom: what it gives never touches what is kept.
    let device = mr::dma::DmaDevice::over(Arc::clone(&container) as _, mr::dma::DmaConfig::default());
    let mut held = Vec::new();
    for _ in 0..8 {
        let mapping = Mapping::try_alloc(&device, 1 << 30, 0)?.expect("a container translates");
        for &(start, len) in &kept {
            let apart = mapping.iova().0 + mapping.len() <= start.0 || start.0 + len <= mapping.iova().0;
            assert!(apart, "{} meets {start}", mapping.iova());
        }
        held.push(mapping);
    }
    Ok(())
}

/// Runs the same illegal calls at `space`. The IOVAs are the same whatever the space.
fn break_contract(space: &dyn IoSpace, phys: hw_model::addr::PhysAddr) -> Vec<String> {
    let base = Iova(LARGE * 100);
    let map = |at: u64, page: u64, len: u64, largest| {
        space.map(base.offset(at), phys.offset(page), len, Prot::READ_WRITE, largest)
    };
    let mut said = Vec::new();
    map(PAGE, PAGE, PAGE, LeafSize::Page).expect("free");
    said.push(format!("{:?}", map(0, 0, 4 * PAGE, LeafSize::Page)));
    said.push(format!("{:?}", map(PAGE, 2 * PAGE, PAGE, LeafSize::Page)));
    said.push(format!("{:?}", map(0, 0, LARGE, LeafSize::Large)));
    said.push(format!("{:?}", map(1, 0, PAGE, LeafSize::Page)));
    said.push(format!("{:?}", map(0, 0, 0, LeafSize::Page)));
    said.push(format!("{:?}", space.map(base, phys, PAGE, Prot::empty(), LeafSize::Page)));
    said.push(format!("{:?}", space.unmap(base, PAGE).map(drop)));
    said.push(format!("{:?}", space.unmap(base, 2 * PAGE).map(drop)));
    said.push(format!("{:?}", space.unmap(base.offset(PAGE), 2 * PAGE).map(drop)));
    map(LARGE, 0, LARGE, LeafSize::Large).expect("free");
    said.push(format!("{:?}", space.unmap(base.offset(LARGE), PAGE).map(drop)));
    said.push(format!("{:?}", space.unmap(base.offset(LARGE + PAGE), LARGE - PAGE).map(drop)));
    said.push(format!("{:?}", map(LARGE + 5 * PAGE, 0, PAGE, LeafSize::Page)));
    let beyond = Iova(1 << space.width());
    said.push(format!("{:?}", space.map(beyond, phys, PAGE, Prot::READ_WRITE, LeafSize::Page)));
    said.push(format!("{:?}", space.unmap(beyond, PAGE).map(drop)));
    for at in [0, PAGE, 2 * PAGE, LARGE, LARGE + PAGE, 2 * LARGE] {
        let at = base.offset(at);
        said.push(format!("{at}: {:?} {:?}", space.iova_to_phys(at), space.leaf_at(at)));
    }
    space.unmap(base.offset(PAGE), PAGE).map(drop).expect("mapped");
    space.unmap(base.offset(LARGE), LARGE).map(drop).expect("mapped");
    said
}

/// If the two differed, a driver would meet on hardware what no test behind the model shows.
pub fn refusals(bed: &Bed) -> Result<(), Failed> {
    let container = bed.container()?;
    let config = DomainConfig { width: container.width(), iotlb: None, ..DomainConfig::default() };
    let model = Domain::new(config)?;
    let (_memory, phys) = bed.memory(2 * LARGE / PAGE);
    let ours = break_contract(&*container, phys);
    let modelled = break_contract(&*model, phys);
    assert_eq!(ours, modelled);
    assert!(ours.iter().take(14).all(|answer| answer.starts_with("Err")), "{ours:#?}");
    assert_eq!((container.surprises(), container.limits().entries), (0, 0));
    Ok(())
}

/// The rows of docs/vfio.md where the kernel differs. If one of them changed, the table beside the kernel's could go.
pub fn kernel_alone(bed: &Bed) -> Result<(), Failed> {
    let container = bed.container()?;
    let (memory, _) = bed.memory(LARGE / PAGE);
    let base = Iova(LARGE * 100);
    kernel::map(&container, base, &memory, 0, 2 * PAGE)?;
    // Where it agrees: over a live mapping, a part of one.
    assert_eq!(kernel::map(&container, base.offset(PAGE), &memory, 0, PAGE), Err(Errno::EXIST));
    assert_eq!(kernel::unmap(&container, base, PAGE), Err(Errno::INVAL), "a part, at the front");
    assert_eq!(kernel::unmap(&container, base.offset(PAGE), PAGE), Err(Errno::INVAL), "a part, at the back");
    // Where it does not.
    assert_eq!(kernel::unmap(&container, base.offset(4 * PAGE), PAGE), Ok(0), "a hole is no error");
    assert_eq!(kernel::unmap(&container, base, 4 * PAGE), Ok(2 * PAGE), "a hole in the range is no error");
    // The table does not know of what went past it, and nothing is lost by it.
    kernel::map(&container, base, &memory, 0, PAGE)?;
    let over = container.map(base, memory.physical_base(), PAGE, Prot::READ_WRITE, LeafSize::Page);
    let exists = HostRefusal::Other { errno: Errno::EXIST.raw_os_error() };
    assert_eq!(over, Err(MapError::Host { iova: base, why: exists }));
    assert_eq!(container.surprises(), 1, "a disagreement is counted");
    kernel::unmap(&container, base, PAGE)?;
    container.map(base, memory.physical_base(), PAGE, Prot::READ_WRITE, LeafSize::Page)?;
    container.unmap(base, PAGE).map(drop)?;
    assert_eq!(container.surprises(), 1);
    Ok(())
}

/// If a large leaf were many mappings, a registration of a few hundred MiB would meet the limit of mappings.
pub fn large_leaf(bed: &Bed) -> Result<(), Failed> {
    let container = bed.container()?;
    let (_memory, phys) = bed.memory(2 * LARGE / PAGE);
    let mapping = mapping(&container, 2 * LARGE);
    let left = || container.info().map(|info| info.entries_left.expect("the kernel says it"));
    let before = left()?;
    mapping.link(0, phys, 2 * LARGE, LeafSize::Large)?;
    assert_eq!((container.limits().entries, before - left()?), (2, 2));
    assert_eq!(mapping.unit_at(PAGE), LARGE);
    mapping.unlink(LARGE, LARGE)?;
    assert_eq!(mapping.unit_at(LARGE), 0);
    mapping.unlink(0, LARGE)?;
    assert_eq!(left()?, before);
    Ok(())
}

/// If it were, the device would reach whatever lies at that address now.
pub fn retired(bed: &Bed) -> Result<(), Failed> {
    let container = bed.container()?;
    let mapping = mapping(&container, PAGE);
    let (memory, _) = bed.memory(1);
    let gone = memory.physical_base();
    drop(memory);
    let refused = mapping.link(0, gone, PAGE, LeafSize::Page);
    let expected = MapError::Host { iova: mapping.iova(), why: HostRefusal::Gone { phys: gone } };
    assert_eq!(refused, Err(LinkError::Map(expected)));
    assert_eq!((mapping.linked(), container.limits().entries), (0, 0));
    Ok(())
}

/// If a part stayed, the next link there would be refused, and the pages would stay pinned for ever.
pub fn unwinding(bed: &Bed) -> Result<(), Failed> {
    let container = bed.container()?;
    let mapping = mapping(&container, 4 * PAGE);
    let (memory, phys) = bed.memory(2);
    // The second half of this lies past the end of the memory.
    let refused = mapping.link(0, phys, 4 * PAGE, LeafSize::Page);
    let at = mapping.iova().offset(2 * PAGE);
    let why = HostRefusal::Gone { phys: phys.offset(2 * PAGE) };
    assert_eq!(refused, Err(LinkError::Map(MapError::Host { iova: at, why })));
    assert_eq!((mapping.linked(), container.limits().entries, container.surprises()), (0, 0, 0));
    mapping.link(0, phys, 2 * PAGE, LeafSize::Page)?;
    assert_eq!(mapping.unlink(0, 4 * PAGE).map_err(|error| error.to_string()), {
        let hole = UnmapError::Hole { iova: at };
        Err(hole.to_string())
    });
    mapping.unlink(0, 2 * PAGE)?;

    // Memory that cannot be written cannot be linked for writing either: the program's own code.
    let code = VirtRange::new(
        hw_model::addr::VirtAddr(unwinding as fn(&Bed) -> _ as usize as u64).page_start(),
        PAGE,
    )
    .expect("code lies in the address space");
    let mut runs = Vec::new();
    bed.space.fault(code, Access::Read, &mut runs)?;
    let phys = runs[0].phys;
    let refused = mapping.link(0, phys, PAGE, LeafSize::Page);
    let expected = MapError::Host { iova: mapping.iova(), why: HostRefusal::Unpinnable { phys } };
    assert_eq!(refused, Err(LinkError::Map(expected)));
    drop(memory);
    Ok(())
}
