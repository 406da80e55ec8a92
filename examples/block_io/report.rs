//! What is printed: tables for people, the same as JSON.

use comfy_table::{CellAlignment, Table, presets};
use hw_model::addr::PAGE_SIZE;
use hw_model::fault_plan::Point;
use mr::block::BlockRequest;
use mr::block::prp::{Prp, PrpPlan};
use mr::block::sgl::{Descriptor, DescriptorKind, Sgl, SglPlan};
use mr::dma::points;
use serde::Serialize;
use std::fmt;

/// Rows of a long list that are printed at either end.
const ENDS: usize = 4;

#[derive(Debug, Serialize)]
pub struct Report {
    pub runs: Vec<Run>,
}

/// One controller's view of the request.
#[derive(Debug, Serialize)]
pub struct Run {
    pub iommu: bool,
    pub bytes: u64,
    pub bvecs: usize,
    /// Bytes of IOVA, and how often the two-step API was called to reserve them, link memory, and make it usable.
    pub reserved_iova: u64,
    pub reserves: u64,
    pub links: u64,
    pub syncs: u64,
    pub ranges: Vec<Range>,
    pub prp: PrpView,
    pub sgl: SglView,
    pub moved: Vec<Moved>,
    pub bursts_to_peer: u64,
}

/// Bytes that lie together on the bus.
#[derive(Debug, Serialize)]
pub struct Range {
    pub at: u64,
    pub dma: u64,
    pub bytes: u64,
    pub path: String,
    pub first_byte_in: String,
}

/// The PRP entries of the command, and its list.
#[derive(Debug, Default, Serialize)]
pub struct PrpView {
    pub prp1: u64,
    pub prp2: u64,
    pub entries: usize,
    pub list: Vec<PrpPage>,
}

/// A page of the PRP list.
#[derive(Debug, Serialize)]
pub struct PrpPage {
    pub at: u64,
    pub words: Vec<u64>,
    pub leads_on: bool,
}

/// The SGL of the command.
#[derive(Debug, Default, Serialize)]
pub struct SglView {
    pub first: SglDescriptor,
    pub data_blocks: usize,
    pub segments: Vec<SglSegment>,
}

#[derive(Debug, Serialize)]
pub struct SglSegment {
    pub at: u64,
    pub descriptors: Vec<SglDescriptor>,
}

#[derive(Debug, Default, Serialize)]
pub struct SglDescriptor {
    pub kind: &'static str,
    pub dma: u64,
    pub bytes: u32,
}

/// One command, and whether every byte was right.
#[derive(Debug, Serialize)]
pub struct Moved {
    pub what: String,
    pub by: &'static str,
    pub bytes: u64,
    pub correct: bool,
}

impl Moved {
    pub fn new(what: &str, by: &'static str, bytes: u64, correct: bool) -> Self {
        Self { what: what.to_owned(), by, bytes, correct }
    }
}

impl From<&Descriptor> for SglDescriptor {
    fn from(descriptor: &Descriptor) -> Self {
        let kind = match descriptor.kind {
            DescriptorKind::DataBlock => "data block",
            DescriptorKind::Segment => "segment",
            DescriptorKind::LastSegment => "last segment",
        };
        Self { kind, dma: descriptor.dma.0, bytes: descriptor.length }
    }
}

impl Run {
    /// What the DMA layer made of the request of `bvecs` bvecs, and how often it came to a point so far.
    pub fn new(iommu: bool, bvecs: usize, steps: impl Fn(Point) -> u64, request: &BlockRequest) -> Self {
        let ranges = request.ranges().iter().map(|mapped| Range {
            at: mapped.at,
            dma: mapped.range.dma.0,
            bytes: mapped.range.len,
            path: format!("{:?}", mapped.path),
            first_byte_in: format!("{:?}", mapped.backing),
        });
        Self {
            iommu,
            bytes: request.bytes(),
            bvecs,
            reserved_iova: request.reserved(),
            reserves: steps(points::RESERVE),
            links: steps(points::LINK),
            syncs: steps(points::SYNC),
            ranges: ranges.collect(),
            prp: PrpView::default(),
            sgl: SglView::default(),
            moved: Vec::new(),
            bursts_to_peer: 0,
        }
    }

    /// Takes the lists.
    pub fn show(&mut self, (prp, prp_plan): (&Prp, &PrpPlan), (sgl, sgl_plan): (&Sgl, &SglPlan)) {
        let pages = prp.list.len();
        let list = prp.list.iter().enumerate().map(|(number, (at, words))| PrpPage {
            at: at.0,
            words: words.clone(),
            leads_on: number + 1 < pages,
        });
        let segments = sgl.segments.iter().map(|(at, descriptors)| SglSegment {
            at: at.0,
            descriptors: descriptors.iter().map(SglDescriptor::from).collect(),
        });
        let entries = prp_plan.entries().len();
        self.prp = PrpView { prp1: prp.prp1.0, prp2: prp.prp2.0, entries, list: list.collect() };
        self.sgl = SglView {
            first: SglDescriptor::from(&sgl.first),
            data_blocks: sgl_plan.blocks().len(),
            segments: segments.collect(),
        };
    }

    /// Whether every byte of every command was right.
    pub fn is_clean(&self) -> bool {
        self.moved.len() == 4 && self.moved.iter().all(|moved| moved.correct)
    }

    /// How the data at `dma` is reached.
    fn path_of(&self, dma: u64) -> &str {
        let range = self.ranges.iter().find(|range| (range.dma..range.dma + range.bytes).contains(&dma));
        range.map_or("", |range| &range.path)
    }
}

impl Report {
    /// Whether every byte of every command was right.
    pub fn is_clean(&self) -> bool {
        self.runs.iter().all(Run::is_clean)
    }
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(header);
    for (index, name) in header.iter().enumerate() {
        if matches!(*name, "at" | "bytes" | "#")
            && let Some(column) = table.column_mut(index)
        {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// The first and last few numbers below `len`, and `None` for what is left out between.
fn ends(len: usize) -> Vec<Option<usize>> {
    if len <= 2 * ENDS + 1 {
        return (0..len).map(Some).collect();
    }
    (0..ENDS).map(Some).chain([None]).chain((len - ENDS..len).map(Some)).collect()
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for run in &self.runs {
            writeln!(f, "{run}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let behind = if self.iommu { "behind an IOMMU" } else { "without an IOMMU" };
        writeln!(
            f,
            "Controller {behind}: {} bytes in {} bvecs become {} ranges\n\
             ({} bytes of IOVA; calls: {} reserve, {} link, {} sync)\n",
            self.bytes,
            self.bvecs,
            self.ranges.len(),
            self.reserved_iova,
            self.reserves,
            self.links,
            self.syncs
        )?;
        let mut ranges = table(&["at", "bytes", "DMA address", "path", "first byte in"]);
        for number in ends(self.ranges.len()) {
            match number.map(|number| &self.ranges[number]) {
                Some(range) => ranges.add_row([
                    format!("{:#x}", range.at),
                    range.bytes.to_string(),
                    format!("{:#x}", range.dma),
                    range.path.clone(),
                    range.first_byte_in.clone(),
                ]),
                None => ranges.add_row(["..."]),
            };
        }
        writeln!(f, "{ranges}\n")?;
        self.show_prp(f)?;
        self.show_sgl(f)?;
        for moved in &self.moved {
            let verdict = if moved.correct { "every byte right" } else { "WRONG BYTES" };
            writeln!(f, "{} by {}: {} bytes, {verdict}", moved.what, moved.by, moved.bytes)?;
        }
        writeln!(f, "bursts to the peer by bus address: {}", self.bursts_to_peer)
    }
}

impl Run {
    fn show_prp(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let PrpView { prp1, prp2, entries, list } = &self.prp;
        let what = if list.is_empty() { "the second page, if any" } else { "the list" };
        writeln!(
            f,
            "PRP1 {prp1:#x} (the first page, from byte {} on), PRP2 {prp2:#x} ({what})",
            prp1 % PAGE_SIZE
        )?;
        writeln!(f, "{entries} entries for pages of {PAGE_SIZE} bytes, {} list pages", list.len())?;
        for page in list {
            let mut words = table(&["#", "entry", "path"]);
            for number in ends(page.words.len()) {
                let Some(number) = number else {
                    words.add_row(["..."]);
                    continue;
                };
                let word = page.words[number];
                let is_pointer = page.leads_on && number + 1 == page.words.len();
                let path = if is_pointer { "the list goes on there" } else { self.path_of(word) };
                words.add_row([number.to_string(), format!("{word:#x}"), path.to_owned()]);
            }
            writeln!(f, "list page {:#x}:\n{words}", page.at)?;
        }
        writeln!(f)
    }

    fn show_sgl(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let SglView { first, data_blocks, segments } = &self.sgl;
        writeln!(f, "SGL in the command: {} {:#x}, {} bytes", first.kind, first.dma, first.bytes)?;
        writeln!(f, "{data_blocks} data blocks, {} segments", segments.len())?;
        for segment in segments {
            let mut rows = table(&["#", "descriptor", "address", "bytes", "path"]);
            for number in ends(segment.descriptors.len()) {
                let Some(number) = number else {
                    rows.add_row(["..."]);
                    continue;
                };
                let SglDescriptor { kind, dma, bytes } = &segment.descriptors[number];
                let path = if *kind == "data block" { self.path_of(*dma) } else { "" };
                rows.add_row([
                    number.to_string(),
                    (*kind).to_owned(),
                    format!("{dma:#x}"),
                    bytes.to_string(),
                    path.to_owned(),
                ]);
            }
            writeln!(f, "segment {:#x}:\n{rows}", segment.at)?;
        }
        writeln!(f)
    }
}
