//! An address space of two pages, for the tests under shuttle: frames are numbers, and which of them live is all there is.
//!
//! Unsafe island. Invariant: the addresses of this address space are numbers that nothing dereferences.
#![allow(unsafe_code)]

use crate::dma::DmaDevice;
use hw_model::addr::{PAGE_SIZE, PhysAddr, VirtAddr, VirtRange, page_bytes};
use hw_model::bus::{AtomicOp, Bus, DeviceSpec, DmaEpoch, DmaPort, HostMemory, MemoryError};
use hw_model::iommu::{Domain, DomainConfig, IotlbConfig};
use hw_model::sync::{Arc, Mutex};
use odp::notifier::Notifiers;
use odp::page::{Backing, PageRun};
use odp::space::{Access, AddressSpace, FaultError, Rung, UserRange, Watch, WatchError};

pub(crate) const FIRST: VirtAddr = VirtAddr(0x10_0000);
pub(crate) const PAGES: u64 = 2;

/// Frames are numbers that are used once; which of them live is all there is to memory.
pub(crate) struct Frames {
    live: Mutex<Vec<u64>>,
    epoch: Arc<DmaEpoch>,
}

impl HostMemory for Frames {
    fn read(&self, at: PhysAddr, _out: &mut [u8]) -> Result<(), MemoryError> {
        let live = self.live.lock().contains(&at.page_number());
        if live { Ok(()) } else { Err(MemoryError::Retired { at }) }
    }
    fn write(&self, at: PhysAddr, _data: &[u8]) -> Result<(), MemoryError> {
        self.read(at, &mut [])
    }
    fn atomic(&self, at: PhysAddr, _op: AtomicOp) -> Result<u64, MemoryError> {
        self.read(at, &mut []).map(|()| 0)
    }
    fn epoch(&self) -> &Arc<DmaEpoch> {
        &self.epoch
    }
}

#[derive(Default)]
struct Table {
    frames: [Option<u64>; PAGES as usize],
    used: u64,
}

/// Two pages that are faulted in on touch, and go when they are told to.
pub(crate) struct TwoPages {
    memory: Arc<Frames>,
    notifiers: Arc<Notifiers>,
    table: Mutex<Table>,
}

impl TwoPages {
    pub(crate) fn new() -> Arc<Self> {
        let epoch = DmaEpoch::new();
        Arc::new(Self {
            notifiers: Notifiers::new(Arc::clone(&epoch)),
            memory: Arc::new(Frames { live: Mutex::new(Vec::new()), epoch }),
            table: Mutex::new(Table::default()),
        })
    }

    /// The first page goes, as an invalidation takes it.
    pub(crate) fn drop_first(&self) {
        let range = VirtRange::new(FIRST, PAGE_SIZE).expect("a page");
        self.notifiers.invalidate(range, || {
            let gone = self.table.lock().frames[0].take();
            self.memory.live.lock().retain(|frame| Some(*frame) != gone);
        });
    }
}

impl AddressSpace for TwoPages {
    fn memory(&self) -> Arc<dyn HostMemory> {
        Arc::clone(&self.memory) as _
    }
    fn notifiers(&self) -> &Arc<Notifiers> {
        &self.notifiers
    }
    fn watch(&self, range: VirtRange) -> Result<Watch, WatchError> {
        Ok(Watch::new(range, || ()))
    }
    fn snapshot(&self, _range: VirtRange, _out: &mut Vec<PageRun>) -> Result<(), FaultError> {
        Ok(())
    }
    fn fault(&self, range: VirtRange, _access: Access, out: &mut Vec<PageRun>) -> Result<(), FaultError> {
        let mut table = self.table.lock();
        for n in 0..range.page_count() {
            let start = range.start().offset(page_bytes(n));
            let page = (start.page_number() - FIRST.page_number()) as usize;
            if table.frames[page].is_none() {
                table.used += 1;
                // Never neighbours, so that each page is a run of its own.
                let frame = table.used * 2;
                table.frames[page] = Some(frame);
                self.memory.live.lock().push(frame);
            }
            let phys = PhysAddr::from_page_number(table.frames[page].expect("it is there now"));
            let backing = Backing::Anonymous;
            let run =
                PageRun { start, pages: 1, phys, backing, writable: true, order_shift: 12, provider: None };
            PageRun::push(out, run);
        }
        Ok(())
    }
    fn rung(&self, _range: VirtRange) -> Rung {
        Rung::Exact
    }
}

impl TwoPages {
    /// Both pages.
    pub(crate) fn both(self: &Arc<Self>) -> UserRange {
        let range = VirtRange::new(FIRST, page_bytes(PAGES)).expect("user memory");
        // SAFETY: there is no memory at these addresses to which a reference could exist: frames are only counted.
        unsafe { UserRange::from_raw(Arc::clone(self) as Arc<dyn AddressSpace>, range) }
    }

    /// Calls `look` with the frame that the first page has, which it keeps meanwhile.
    pub(crate) fn with_first_frame<T>(&self, look: impl FnOnce(Option<u64>) -> T) -> T {
        look(self.table.lock().frames[0])
    }

    /// A device behind an IOMMU that remembers little.
    pub(crate) fn attach(self: &Arc<Self>) -> (DmaPort, Arc<Domain>) {
        let iotlb = IotlbConfig { sets: 1, ways: 2, caches_not_present: true };
        let config = DomainConfig { width: 32, iotlb: Some(iotlb), audit: true, ..DomainConfig::default() };
        let domain = Domain::new(config).expect("a small domain");
        let bus = Bus::new(Arc::clone(&self.memory) as Arc<dyn HostMemory>);
        let port = bus.attach(DeviceSpec::new("hca").domain(&domain)).expect("an empty bus has room");
        (port, domain)
    }

    /// Everything that used these pages is gone: asserts that it left nothing, and kept to the IOMMU's contract. Gives how
    /// many accesses went by a translation that was not there any more.
    pub(crate) fn check_nothing_is_left(&self, device: &DmaDevice, domain: &Domain) -> usize {
        assert_eq!(device.iova_stats().live_ranges, 0, "IOVA is left");
        let stats = domain.stats();
        assert_eq!(
            (stats.mapped_bytes, stats.violations),
            (0, 0),
            "the IOMMU's contract was broken: {stats:?}"
        );
        let notifiers = self.notifiers.stats();
        assert_eq!((notifiers.intervals, notifiers.running), (0, 0), "somebody is still told of changes");
        stats.stale_hits as usize
    }
}
