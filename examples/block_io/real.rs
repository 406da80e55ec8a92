//! `--device nvme`: the request carried out by a real controller behind an IOMMU that the kernel programs, over VFIO.
//!
//! The same builders make the PRP list and the SGL; the bytes go to a disk and back. Then pages change under the
//! controller's address: one is relinked between two commands, and one is unlinked and tried all the same. The first
//! blocks of the disk are overwritten.

mod kernel_log;
mod memory;

use crate::controller::DataPointer;
use crate::nvme::{Controller, Data, Direction, NvmeError};
use crate::report::{Moved, Run};
use crate::{Error, LIST_PAGES, ListMemory, pattern};
use hw_model::addr::{DmaAddr, PAGE_SIZE};
use hw_model::fault_plan::{FaultPlan, Point, Points};
use hw_model::iommu::LeafSize;
use hw_model::sync::Arc;
use kernel_log::KernelLog;
use memory::SystemMemory;
use mr::block::BlockRequest;
use mr::block::prp::ControllerPage;
use mr::dma::vfio::{PciAddress, VfioContainer, VfioGroup};
use mr::dma::{DmaConfig, DmaDevice, Mapping};
use odp::space::process::{OwnedMemory, ProcessSpace};
use serde::Serialize;
use std::fmt;

/// Most bytes of a command for a controller that has no limit.
const MAX_BYTES: u64 = 1 << 20;
/// What memory holds before a command that is not to write there.
const UNTOUCHED: u8 = 0xee;

/// What a controller did.
#[derive(Debug, Serialize)]
pub struct Report {
    pub controller: String,
    pub address: String,
    pub group: u32,
    pub run: Run,
    pub gaps: Gaps,
    pub changes: Vec<Change>,
    /// What the kernel logged of the access that was stopped; `None` if this user may not read its log.
    pub kernel_log: Option<Vec<String>>,
}

/// A request that PRP entries cannot say.
#[derive(Debug, Serialize)]
pub struct Gaps {
    /// Why not.
    pub prp_refused: String,
    /// Data blocks of its SGL, and segments that they fill.
    pub data_blocks: usize,
    pub segments: usize,
    pub correct: bool,
}

/// A change of a link between two commands, and whether memory shows it.
#[derive(Debug, Serialize)]
pub struct Change {
    pub what: &'static str,
    pub correct: bool,
}

impl Report {
    /// Whether every byte was right, and the kernel logged what was stopped.
    pub fn is_clean(&self) -> bool {
        let logged = self.kernel_log.as_ref().is_none_or(|lines| !lines.is_empty());
        logged && self.run.is_clean() && self.gaps.correct && self.changes.iter().all(|change| change.correct)
    }
}

/// The variable in which the laboratory says where its controller is.
const ADDRESS: &str = "ANYPAGE_LAB_NVME";

/// Carries the request out on the controller at `address`, or the laboratory's.
pub fn run(address: Option<PciAddress>) -> Result<Report, Error> {
    let address = match address {
        Some(address) => address,
        None => std::env::var(ADDRESS).map_err(|_| "--pci wants the address of a controller")?.parse()?,
    };
    let memory = SystemMemory::new()?;
    let group = VfioGroup::of(address).ok_or_else(|| format!("no IOMMU translates for {address}"))?;
    let container = VfioContainer::open(group, memory.space())?;
    let mut disk = Controller::start(&container, address, memory.space())?;
    // A plan without rules injects nothing and counts everything.
    let steps = FaultPlan::new(0, Vec::new());
    let config = DmaConfig { points: Points::with(&steps), ..DmaConfig::default() };
    let dma = DmaDevice::over(Arc::clone(&container) as _, config);
    let run = both_lists(&mut disk, &memory, &dma, &steps)?;
    let gaps = with_gaps(&mut disk, &memory, &dma)?;
    let mut log = KernelLog::from_now();
    let changes = change_links(&mut disk, memory.space(), &dma)?;
    let kernel_log = log.as_mut().map(|log| log.refusals_of(address));
    let controller = disk.identity().model.clone();
    Ok(Report { controller, address: address.to_string(), group: group.0, run, gaps, changes, kernel_log })
}

fn data(pointer: DataPointer) -> Data {
    match pointer {
        DataPointer::Prp(first, second) => Data::Prp(first, second),
        DataPointer::Sgl(descriptor) => Data::Sgl(descriptor),
    }
}

/// Maps the request, builds both lists, and has its data go to the disk and back by each of them.
fn both_lists(
    disk: &mut Controller,
    memory: &SystemMemory,
    dma: &Arc<DmaDevice>,
    steps: &FaultPlan,
) -> Result<Run, Error> {
    let most = disk.identity().most_bytes.unwrap_or(MAX_BYTES);
    if !disk.identity().sgl {
        return Err("the controller takes no scatter-gather lists".into());
    }
    let bvecs = memory.bvecs();
    let request = BlockRequest::map(dma, &bvecs)?;
    let visits = |point: Point| steps.visits().iter().find(|(met, _)| *met == point).map_or(0, |met| met.1);
    let mut run = Run::new(true, bvecs.len(), visits, &request);
    let lists = ListMemory::new(memory.space(), dma)?;
    let (for_prp, for_sgl) = lists.pages.split_at(LIST_PAGES as usize / 2);
    let prp_plan = request.prp(ControllerPage::SMALLEST, most)?;
    let prp = prp_plan.build(for_prp)?;
    let sgl_plan = request.sgl(most)?;
    let sgl = sgl_plan.build(for_sgl)?;
    lists.hold(&prp, &sgl)?;
    run.show((&prp, &prp_plan), (&sgl, &sgl_plan));

    let (by_prp, by_sgl) = (DataPointer::Prp(prp.prp1, prp.prp2), DataPointer::Sgl(sgl.first.to_bytes()));
    let blocks = request.bytes() / disk.identity().block;
    let rounds = [(by_prp, by_prp), (by_prp, by_sgl), (by_sgl, by_prp), (by_sgl, by_sgl)];
    for (round, (there, back)) in rounds.into_iter().enumerate() {
        let (first, count) = (round as u64 * blocks, u16::try_from(blocks)?);
        let expected = pattern(round as u64 + 1, request.bytes());
        memory.fill(UNTOUCHED)?;
        memory.put(&bvecs, &expected)?;
        disk.transfer(Direction::Write, first, count, data(there))?;
        memory.fill(UNTOUCHED)?;
        disk.transfer(Direction::Read, first, count, data(back))?;
        let correct = memory.get(&bvecs)? == expected && memory.is_untouched_around(&bvecs, UNTOUCHED)?;
        let what = format!("to the disk by {}, and back", there.name());
        run.moved.push(Moved::new(&what, back.name(), request.bytes(), correct));
    }
    Ok(run)
}

/// Has a request with gaps go to the disk and back.
fn with_gaps(disk: &mut Controller, memory: &SystemMemory, dma: &Arc<DmaDevice>) -> Result<Gaps, Error> {
    let bvecs = memory.gaps();
    let request = BlockRequest::map(dma, &bvecs)?;
    let prp_refused = match request.prp(ControllerPage::SMALLEST, MAX_BYTES) {
        Ok(_) => return Err("a request with gaps went into PRP entries".into()),
        Err(error) => error.to_string(),
    };
    let lists = ListMemory::new(memory.space(), dma)?;
    let plan = request.sgl(MAX_BYTES)?;
    let sgl = plan.build(&lists.pages)?;
    lists.hold_sgl(&sgl)?;
    let (expected, list) = (pattern(7, request.bytes()), Data::Sgl(sgl.first.to_bytes()));
    let count = u16::try_from(request.bytes() / disk.identity().block)?;
    memory.fill(UNTOUCHED)?;
    memory.put(&bvecs, &expected)?;
    disk.transfer(Direction::Write, 0, count, list)?;
    memory.fill(UNTOUCHED)?;
    disk.transfer(Direction::Read, 0, count, list)?;
    let correct = memory.get(&bvecs)? == expected && memory.is_untouched_around(&bvecs, UNTOUCHED)?;
    let (data_blocks, segments) = (plan.blocks().len(), sgl.segments.len());
    Ok(Gaps { prp_refused, data_blocks, segments, correct })
}

/// Relinks and unlinks a page between commands that use its address.
fn change_links(
    disk: &mut Controller,
    space: &Arc<ProcessSpace>,
    dma: &Arc<DmaDevice>,
) -> Result<Vec<Change>, Error> {
    let memory = OwnedMemory::new(space, 2 * PAGE_SIZE)?;
    let (first, second) = (memory.physical_base(), memory.physical_base().offset(PAGE_SIZE));
    let mapping = Mapping::try_alloc(dma, PAGE_SIZE, 0)?.ok_or("a container translates")?;
    let address = Data::Prp(mapping.dma_address(0), DmaAddr(0));
    let count = u16::try_from(PAGE_SIZE / disk.identity().block)?;
    let expected = pattern(99, PAGE_SIZE);
    let untouched = vec![UNTOUCHED; PAGE_SIZE as usize];
    let pages_are = |left: &[u8], right: &[u8]| {
        let mut bytes = vec![0; 2 * PAGE_SIZE as usize];
        memory.read_at(0, &mut bytes).map(|()| bytes == [left, right].concat())
    };
    let wipe = || memory.write_at(0, &[UNTOUCHED; 2 * PAGE_SIZE as usize]);
    let mut changes = Vec::new();

    mapping.link(0, first, PAGE_SIZE, LeafSize::Page)?;
    mapping.sync(0, PAGE_SIZE)?;
    memory.write_at(0, &expected)?;
    disk.transfer(Direction::Write, 0, count, address)?;
    wipe()?;
    disk.transfer(Direction::Read, 0, count, address)?;
    let correct = pages_are(&expected, &untouched)?;
    changes.push(Change { what: "a command writes into the page that is linked", correct });

    mapping.unlink(0, PAGE_SIZE)?;
    mapping.link(0, second, PAGE_SIZE, LeafSize::Page)?;
    mapping.sync(0, PAGE_SIZE)?;
    wipe()?;
    disk.transfer(Direction::Read, 0, count, address)?;
    let correct = pages_are(&untouched, &expected)?;
    changes.push(Change {
        what: "relinked: the same command writes into the other page, and only there",
        correct,
    });

    mapping.unlink(0, PAGE_SIZE)?;
    wipe()?;
    // Writes to memory are posted: a controller need not learn that they were stopped.
    match disk.transfer(Direction::Read, 0, count, address) {
        Ok(()) | Err(NvmeError::Command { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    let correct = pages_are(&untouched, &untouched)?;
    changes.push(Change { what: "unlinked: the same command writes nowhere", correct });
    Ok(changes)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { controller, address, group, run, gaps, changes, kernel_log } = self;
        writeln!(f, "{controller} at {address}, IOMMU group {group}\n\n{run}")?;
        let yes = |correct: bool| if correct { "yes" } else { "NO" };
        let Gaps { prp_refused, data_blocks, segments, correct } = gaps;
        writeln!(f, "a request with gaps has no PRP entries: {prp_refused}")?;
        let what = format!("it goes by an SGL of {data_blocks} data blocks in {segments} segment");
        writeln!(f, "{what}, and back, every byte right: {}\n", yes(*correct))?;
        for Change { what, correct } in changes {
            writeln!(f, "{what}: {}", yes(*correct))?;
        }
        match kernel_log.as_deref() {
            None => {
                writeln!(f, "the kernel's log, which this user may not read, has what was stopped: dmesg")
            }
            Some([]) => writeln!(f, "THE KERNEL LOGGED NOTHING"),
            Some(lines) => lines.iter().try_for_each(|line| writeln!(f, "kernel: {line}")),
        }
    }
}
