//! The memory of the request for a real controller: pages of this process, of many kinds.

use crate::Error;
use anypage::mixed::{HUGE, Kind, MixedMemory};
use hw_model::addr::{PAGE_SIZE, PhysAddr, VirtRange, page_bytes};
use hw_model::bus::HostMemory;
use hw_model::sync::Arc;
use mr::block::Bvec;
use odp::page::PageRun;
use odp::space::process::{Options, ProcessSpace};
use odp::space::{Access, AddressSpace, Watch};

/// Pages of anonymous memory, used in an order of their own.
const ANONYMOUS: u64 = 16;
/// Bytes of a huge page that the request uses, from this byte of it on.
const HUGE_USED: u64 = 256 << 10;
const HUGE_FROM: u64 = 1 << 20;
/// Bytes of file pages.
const FILE: u64 = 64 << 10;
/// Bytes of shared memory, and of them in the request.
const SHARED: u64 = 64 << 10;
const SHARED_USED: u64 = (40 << 10) + 1536;
/// Where in its page the first byte lies.
const HEAD: u64 = 512;
/// Bytes of a page that a request with gaps uses.
const GAPPED: u64 = 1024;

/// The request's memory, and what lies around it. Nothing here changes where its pages are.
pub struct SystemMemory {
    space: Arc<ProcessSpace>,
    host: Arc<dyn HostMemory>,
    range: VirtRange,
    runs: Vec<PageRun>,
    _watch: Watch,
    _memory: Arc<MixedMemory>,
}

impl SystemMemory {
    pub fn new() -> Result<Self, Error> {
        let space = ProcessSpace::open(Options::default())?;
        let parts = [
            (Kind::TransparentHuge, HUGE),
            (Kind::Anonymous, page_bytes(ANONYMOUS)),
            (Kind::File, FILE),
            (Kind::Shared, SHARED),
        ];
        let memory = Arc::new(MixedMemory::new(&parts)?);
        let range = memory.range();
        let watch = space.watch(range)?;
        let mut runs = Vec::new();
        space.fault(range, Access::Write, &mut runs)?;
        let host = space.memory();
        Ok(Self { space, host, range, runs, _watch: watch, _memory: memory })
    }

    pub fn space(&self) -> &Arc<ProcessSpace> {
        &self.space
    }

    /// The request's bvecs.
    pub fn bvecs(&self) -> Vec<Bvec> {
        let anonymous = |index: u64| {
            let (page, head) = (index * 7 % ANONYMOUS, if index == 0 { HEAD } else { 0 });
            (HUGE + page_bytes(page) + head, PAGE_SIZE - head)
        };
        let after = HUGE + page_bytes(ANONYMOUS);
        let rest = [(HUGE_FROM, HUGE_USED), (after, FILE), (after + FILE, SHARED_USED)];
        (0..ANONYMOUS).map(anonymous).chain(rest).flat_map(|(offset, len)| self.part(offset, len)).collect()
    }

    /// The bvecs of a part of the range.
    fn part(&self, offset: u64, len: u64) -> impl Iterator<Item = Bvec> {
        let part = VirtRange::new(self.range.start().offset(offset), len).expect("part of a mapping");
        self.runs.iter().filter_map(move |run| {
            let part = run.range().intersection(part)?;
            let phys = run.phys.offset(part.start().0 - run.start.0);
            Some(Bvec { phys, len: part.len(), backing: run.backing, provider: None })
        })
    }

    /// The bvecs of a request that leaves gaps: parts of pages, none of which goes on where another ends.
    pub fn gaps(&self) -> Vec<Bvec> {
        let part = |page: u64| self.part(HUGE + page_bytes(page) + HEAD, GAPPED);
        (0..ANONYMOUS / 2).flat_map(part).collect()
    }

    /// Writes `data` to the bytes of `bvecs`, in order.
    pub fn put(&self, bvecs: &[Bvec], mut data: &[u8]) -> Result<(), Error> {
        self.pieces(bvecs, |phys, len| {
            let now = data.split_off(..len).ok_or("more bytes than data")?;
            Ok(self.host.write(phys, now)?)
        })
    }

    /// The bytes of `bvecs`, in order.
    pub fn get(&self, bvecs: &[Bvec]) -> Result<Vec<u8>, Error> {
        let mut all = Vec::new();
        self.pieces(bvecs, |phys, len| {
            let from = all.len();
            all.resize(from + len, 0);
            Ok(self.host.read(phys, &mut all[from..])?)
        })?;
        Ok(all)
    }

    /// Writes `byte` everywhere, outside any request too.
    pub fn fill(&self, byte: u8) -> Result<(), Error> {
        let page = [byte; PAGE_SIZE as usize];
        self.pieces(&self.everything(), |phys, len| Ok(self.host.write(phys, &page[..len])?))
    }

    /// Whether every byte that is not in `bvecs` is `byte`.
    pub fn is_untouched_around(&self, bvecs: &[Bvec], byte: u8) -> Result<bool, Error> {
        let others = |bytes: &[u8]| bytes.iter().filter(|found| **found != byte).count();
        Ok(others(&self.get(&self.everything())?) == others(&self.get(bvecs)?))
    }

    fn everything(&self) -> Vec<Bvec> {
        self.part(0, self.range.len()).collect()
    }

    /// Goes over the pages of `bvecs` inside the DMA epoch, as whoever copies by physical address does.
    fn pieces(
        &self,
        bvecs: &[Bvec],
        mut copy: impl FnMut(PhysAddr, usize) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut slot = self.host.epoch().register().ok_or("the memory has no room for another copier")?;
        for bvec in bvecs {
            let mut done = 0;
            while done < bvec.len {
                let phys = bvec.phys.offset(done);
                let now = (bvec.len - done).min(PAGE_SIZE - phys.page_offset());
                let _busy = slot.enter().map_err(|_| "the DMA epoch is closed")?;
                copy(phys, now as usize)?;
                done += now;
            }
        }
        Ok(())
    }
}
