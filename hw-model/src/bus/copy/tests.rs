use super::*;
use crate::addr::Iova;
use crate::bus::{Bus, DeviceSpec, RamMemory};
use crate::iommu::{Domain, DomainConfig, Prot};

const PAGES: u64 = 16;

/// Two devices over one memory, the first behind an IOMMU that reverses the order of pages.
fn two() -> (Arc<Bus>, DmaPort, DmaPort) {
    let bus = Bus::new(RamMemory::new(PAGES * PAGE_SIZE).expect("memory"));
    let domain = Domain::new(DomainConfig::default()).expect("the default is possible");
    for page in 0..PAGES {
        let frame = PhysAddr((PAGES - 1 - page) * PAGE_SIZE);
        domain.map(Iova(page * PAGE_SIZE), frame, PAGE_SIZE, Prot::READ_WRITE).expect("free");
    }
    let reversed = bus.attach(DeviceSpec::new("reversed").domain(&domain)).expect("room");
    let plain = bus.attach(DeviceSpec::new("plain")).expect("room");
    (bus, reversed, plain)
}

#[test]
fn pieces_that_do_not_go_on_land_each_in_its_place() {
    let (bus, reversed, plain) = two();
    let memory = bus.memory();
    for page in 0..PAGES / 2 {
        memory.write(PhysAddr(page * PAGE_SIZE + 7), &[page as u8 + 1; 9]).expect("in memory");
    }
    let mut copy = DmaCopy::new(&plain, &reversed);
    for page in 0..PAGES / 2 {
        copy.add(DmaAddr(page * PAGE_SIZE), DmaAddr(page * PAGE_SIZE), PAGE_SIZE as usize).expect("mapped");
    }
    copy.finish().expect("mapped");
    for page in 0..PAGES / 2 {
        let mut back = [0; 11];
        memory.read(PhysAddr((PAGES - 1 - page) * PAGE_SIZE + 6), &mut back).expect("in memory");
        let mut wanted = [page as u8 + 1; 11];
        (wanted[0], wanted[10]) = (0, 0);
        assert_eq!(back, wanted, "page {page}");
    }
}

#[test]
fn a_bar_is_copied_to_and_from() {
    let (bus, _, plain) = two();
    let bar = bus.add_ram_bar(plain.device(), 64 << 10).expect("room in the window");
    let at = PhysAddr(bar.base().0).to_dma_identity();
    bus.memory().write(PhysAddr(0), b"over there").expect("in memory");
    let nic = bus.attach(DeviceSpec::new("nic")).expect("room");
    for (from, to) in [(DmaAddr(0), at), (at, DmaAddr(0x5000))] {
        let mut copy = DmaCopy::new(&nic, &nic);
        copy.add(from, to, 10).expect("forwarded");
        copy.finish().expect("forwarded");
    }
    let mut back = [0; 10];
    bus.memory().read(PhysAddr(0x5000), &mut back).expect("in memory");
    assert_eq!(&back, b"over there");
    assert_eq!(bar.bursts_through_host_bridge(), 2, "a burst is counted once");
}

#[test]
fn an_error_says_which_end_and_how_far() {
    let (_, reversed, plain) = two();
    let end = PAGES * PAGE_SIZE;
    for (source, target, which) in
        [(&reversed, &plain, CopyEnd::Source), (&plain, &reversed, CopyEnd::Target)]
    {
        let mut copy = DmaCopy::new(source, target);
        copy.add(DmaAddr(0), DmaAddr(0), PAGE_SIZE as usize).expect("mapped");
        let error = copy.add(DmaAddr(end), DmaAddr(end), 5).unwrap_err();
        assert_eq!((error.end, error.done), (which, PAGE_SIZE));
        assert!(matches!(error.error, DmaError::Iommu { .. }));
    }
    // Without an IOMMU the memory refuses, when it is its turn.
    let mut copy = DmaCopy::new(&plain, &plain);
    copy.add(DmaAddr(0), DmaAddr(end - PAGE_SIZE), PAGE_SIZE as usize).expect("deferred");
    copy.add(DmaAddr(PAGE_SIZE), DmaAddr(end), 8).expect("deferred");
    let error = copy.finish().unwrap_err();
    assert_eq!((error.end, error.done), (CopyEnd::Target, PAGE_SIZE));
}
