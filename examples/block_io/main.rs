//! One block request over memory of many kinds, as an NVMe controller is told of it: system pages in any order, a peer's
//! BAR below the same switch, a huge page, file pages, with the first byte and the last inside a page.
//!
//! `cargo run --release --example block_io` prints the ranges that the DMA layer makes of it, the PRP list and the SGL,
//! behind an IOMMU and without one; a modelled controller then moves the data both ways by each list, and every byte is
//! compared. It ends with 1 if one was wrong.
//!
//! With the feature `vfio`, `--device nvme` has a real controller do it, behind an IOMMU that the kernel programs:
//! `cargo build --features vfio --example block_io`, then
//! `tests/lab/vm --iommu -- target/debug/examples/block_io --device nvme`.

mod controller;
mod memory;
#[cfg(feature = "vfio")]
mod nvme;
#[cfg(feature = "vfio")]
mod real;
mod report;

use clap::{Parser, ValueEnum};
use controller::{Command, Controller, DataPointer, Direction, LBA};
use hw_model::addr::{DmaAddr, PAGE_SIZE, page_bytes};
use hw_model::hca::Backing;
use hw_model::sync::Arc;
use memory::RequestMemory;
use mr::block::prp::{ControllerPage, Prp};
use mr::block::sgl::Sgl;
use mr::block::{BlockRequest, Bvec};
use mr::dma::DmaDevice;
use mr::dma::batch::Batch;
use odp::space::process::{OwnedMemory, ProcessSpace};
use report::{Report, Run};
use serde::Serialize;
use std::fmt::Display;
use std::process::ExitCode;

/// Anything that can go wrong.
type Error = Box<dyn std::error::Error + Send + Sync>;

/// Prints how a mixed block request reaches a controller, and moves its data.
#[derive(Parser, Debug)]
struct Args {
    /// The controller that carries the request out.
    #[arg(long, value_enum, default_value_t = DeviceKind::Model)]
    device: DeviceKind,
    /// Behind an IOMMU, without one, or one after the other.
    #[arg(long, value_enum, default_value_t = Translation::Both)]
    iommu: Translation,
    /// PCI address of the controller, for `--device nvme`. In the laboratory it need not be said.
    #[cfg(feature = "vfio")]
    #[arg(long)]
    pci: Option<mr::dma::vfio::PciAddress>,
    /// Prints one JSON object instead of tables.
    #[arg(long)]
    json: bool,
}

/// Which controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum DeviceKind {
    /// A model on a modelled bus, in this process.
    Model,
    /// A real one that is bound to vfio-pci. Its first blocks are overwritten.
    #[cfg(feature = "vfio")]
    Nvme,
}

/// What stands between the controller and memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Translation {
    /// An IOMMU.
    On,
    /// Nothing.
    Off,
    /// First an IOMMU, then nothing.
    Both,
}

/// Most bytes of one command (MDTS).
const MAX_BYTES: u64 = 4 << 20;
/// Memory for lists.
const LIST_PAGES: u64 = 8;

fn main() -> ExitCode {
    let args = Args::parse();
    match args.device {
        DeviceKind::Model => {
            let report = model(args.iommu);
            end(report.map(|report| (report.is_clean(), report)), args.json)
        }
        #[cfg(feature = "vfio")]
        DeviceKind::Nvme => {
            let report = real::run(args.pci);
            end(report.map(|report| (report.is_clean(), report)), args.json)
        }
    }
}

/// Has the modelled controller carry the request out.
fn model(iommu: Translation) -> Result<Report, Error> {
    let settings: &[bool] = match iommu {
        Translation::On => &[true],
        Translation::Off => &[false],
        Translation::Both => &[true, false],
    };
    let runs: Result<Vec<Run>, Error> = settings.iter().map(|iommu| run(*iommu)).collect();
    Ok(Report { runs: runs? })
}

/// Prints a report, which is clean or not.
fn end(report: Result<(bool, impl Serialize + Display), Error>, json: bool) -> ExitCode {
    let (is_clean, report) = match report {
        Ok(report) => report,
        Err(error) => {
            eprintln!("block_io: {error}");
            return ExitCode::from(3);
        }
    };
    if json {
        println!("{}", serde_json::to_string_pretty(&report).expect("the report is plain data"));
    } else {
        print!("{report}");
    }
    ExitCode::from(u8::from(!is_clean))
}

/// Maps the request, builds both lists, and moves its data both ways by each.
fn run(iommu: bool) -> Result<Run, Error> {
    let memory = RequestMemory::new(iommu)?;
    let mut disk = Controller::new(memory.disk().clone())?;
    let request = BlockRequest::map(memory.dma(), &memory.bvecs())?;
    let mut run = Run::new(iommu, memory.bvecs().len(), |point| memory.steps(point), &request);
    let lists = ListMemory::new(memory.space(), memory.dma())?;
    let prp = request.prp(ControllerPage::SMALLEST, MAX_BYTES)?;
    let prp = (prp.build(&lists.pages[..LIST_PAGES as usize / 2])?, prp);
    let sgl = request.sgl(MAX_BYTES)?;
    let sgl = (sgl.build(&lists.pages[LIST_PAGES as usize / 2..])?, sgl);
    lists.hold(&prp.0, &sgl.0)?;
    let (by_prp, by_sgl) =
        (DataPointer::Prp(prp.0.prp1, prp.0.prp2), DataPointer::Sgl(sgl.0.first.to_bytes()));
    run.show((&prp.0, &prp.1), (&sgl.0, &sgl.1));
    let blocks = request.bytes() / LBA;
    for (round, (there, back)) in [(by_prp, by_sgl), (by_sgl, by_prp)].into_iter().enumerate() {
        let start = round as u64 * blocks;
        let expected = pattern(round as u64 + 1, request.bytes());
        memory.fill(0xee)?;
        memory.put(&expected)?;
        let mut say = |what: &str, data: DataPointer, correct: bool| {
            run.moved.push(report::Moved::new(what, data.name(), request.bytes(), correct));
        };
        disk.execute(&Command { direction: Direction::ToDisk, start, blocks, data: there })?;
        say("memory to disk", there, disk.media(start, blocks) == expected);
        memory.fill(0xee)?;
        disk.execute(&Command { direction: Direction::FromDisk, start, blocks, data: back })?;
        say("disk to memory", back, memory.get()? == expected && memory.is_untouched_around(0xee)?);
    }
    run.bursts_to_peer = memory.bar().bursts_by_bus_address();
    Ok(run)
}

/// Bytes that differ from place to place.
fn pattern(seed: u64, bytes: u64) -> Vec<u8> {
    (0..bytes).map(|at| ((at / 512).wrapping_mul(seed * 97 + 31) ^ at ^ seed) as u8).collect()
}

/// Memory of lists, mapped for the controller like any other.
struct ListMemory {
    owned: Arc<OwnedMemory>,
    pages: Vec<DmaAddr>,
    _mapped: Batch,
}

impl ListMemory {
    fn new(space: &Arc<ProcessSpace>, dma: &Arc<DmaDevice>) -> Result<Self, Error> {
        let owned = Arc::new(OwnedMemory::new(space, page_bytes(LIST_PAGES))?);
        let (phys, len) = (owned.physical_base(), owned.size());
        let whole = [Bvec { phys, len, backing: Backing::Shared, provider: None }];
        let mapped = Batch::map(dma, Bvec::extents(&whole))?;
        let pages = mapped
            .dma_ranges()
            .flat_map(|range| (0..range.len / PAGE_SIZE).map(move |page| range.dma.offset(page_bytes(page))))
            .collect();
        Ok(Self { owned, pages, _mapped: mapped })
    }

    /// Writes the lists to where the controller looks for them.
    fn hold(&self, prp: &Prp, sgl: &Sgl) -> Result<(), Error> {
        for (at, words) in &prp.list {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            self.write(*at, &bytes)?;
        }
        self.hold_sgl(sgl)
    }

    fn hold_sgl(&self, sgl: &Sgl) -> Result<(), Error> {
        for (at, descriptors) in &sgl.segments {
            let bytes: Vec<u8> = descriptors.iter().flat_map(|one| one.to_bytes()).collect();
            self.write(*at, &bytes)?;
        }
        Ok(())
    }

    fn write(&self, at: DmaAddr, bytes: &[u8]) -> Result<(), Error> {
        let page = self.pages.iter().position(|page| *page == at).ok_or("a list outside its memory")?;
        Ok(self.owned.write_at(page_bytes(page as u64), bytes)?)
    }
}
