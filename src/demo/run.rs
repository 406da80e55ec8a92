//! The demo's course of events.

use super::Args;
use super::mutate::{Changes, change};
use super::oracle::{Mismatch, Oracle};
use super::picture;
use super::plan::{SMALLEST, layout};
use super::report::{Report, table, tally};
use super::traffic::{Direction, Mover, TransferError};
use crate::machine::{End, Machine, MachineConfig};
use crate::mixed::{HUGE, Kind, MixedMemory};
use hw_model::addr::PAGE_SIZE;
use hw_model::hca::Entry;
use hw_model::sync::Arc;
use hw_model::sync::atomic::{AtomicBool, Ordering};
use indicatif::{ProgressBar, ProgressStyle};
use mr::{MapRun, Region, RegisterOptions};
use odp::fault::Want;
use odp::space::AddressSpace;
use odp::space::process::{BarMemory, DmabufMapping, Options, OwnedMemory, PeerPart, ProcessSpace};
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::time::Instant;

/// Bytes of one transfer.
const CHUNK: u64 = 256 << 10;

/// Why the demo did not run.
#[derive(Debug, thiserror::Error, miette::Diagnostic)]
pub enum DemoError {
    /// Too small to hold every kind.
    #[error("--size {size} is less than the {SMALLEST} bytes that hold every kind of page")]
    #[diagnostic(help("try --size 16M"))]
    TooSmall {
        /// Bytes asked for.
        size: u64,
    },
    /// Not whole pages.
    #[error("--size {size} is not a multiple of the 4096-byte page")]
    #[diagnostic(help("the next multiple is {}", size.next_multiple_of(PAGE_SIZE)))]
    NotPages {
        /// Bytes asked for.
        size: u64,
    },
    /// More than the machine can hold.
    #[error("--size {size} needs {needed} bytes of memory, {available} are available")]
    #[diagnostic(help("two regions of that size are populated; try a smaller --size"))]
    TooLarge {
        /// Bytes asked for.
        size: u64,
        /// Bytes needed for it.
        needed: u64,
        /// Bytes that the machine can give.
        available: u64,
    },
    /// The machine refused something that the demo cannot do without.
    #[error("{what}")]
    Setup {
        /// What was being done.
        what: &'static str,
        /// What came of it.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Data did not move.
    #[error("a transfer failed in round {round}")]
    Transfer {
        /// The round.
        round: u32,
        /// What happened.
        #[source]
        source: TransferError,
    },
}

impl DemoError {
    /// The process's exit status for this error.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::TooSmall { .. } | Self::NotPages { .. } | Self::TooLarge { .. } => 2,
            Self::Setup { .. } => 3,
            Self::Transfer { .. } => 1,
        }
    }
}

/// Names what was being done when an error came.
fn setup<E: Into<Box<dyn std::error::Error + Send + Sync>>>(what: &'static str) -> impl Fn(E) -> DemoError {
    move |error| DemoError::Setup { what, source: error.into() }
}

fn check_size(size: u64) -> Result<(), DemoError> {
    if size < SMALLEST {
        return Err(DemoError::TooSmall { size });
    }
    if !size.is_multiple_of(PAGE_SIZE) {
        return Err(DemoError::NotPages { size });
    }
    // The region, what is sent to it, the DMABUF's second place, and the file behind the file part.
    let needed = size.saturating_mul(5) / 2;
    let available = available_memory();
    if needed > available {
        return Err(DemoError::TooLarge { size, needed, available });
    }
    Ok(())
}

/// MemAvailable of /proc/meminfo (proc(5)); no limit where that cannot be read.
fn available_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())
        .map_or(u64::MAX, |kib| kib << 10)
}

/// Everything that takes part.
struct Stage {
    // Dropped in this order: who moves data, the regions, the devices, what lies in the mixed memory, that memory.
    /// Writes into the region and reads it back, as its peer.
    far: Mover,
    /// Reads into the region, as its owner.
    near: Mover,
    region: Arc<dyn Region>,
    machine: Machine,
    dmabuf: DmabufMapping,
    memory: Arc<MixedMemory>,
    /// What is sent to the region and what is read back from it.
    mirror: Arc<OwnedMemory>,
    space: Arc<ProcessSpace>,
    args: Args,
    oracle: Oracle,
    progress: ProgressBar,
    random: ChaCha8Rng,
    touched: BTreeSet<u64>,
    dropped: u64,
    moved: u64,
    verified: u64,
    wrong: u64,
    first_mismatch: Option<Mismatch>,
    seen: BTreeMap<&'static str, u64>,
}

/// Runs the demo. Gives the report, and the pictures and tables as text.
pub fn run(args: &Args) -> Result<(Report, String), DemoError> {
    check_size(args.size)?;
    let mut stage = Stage::set(args)?;
    let began = Instant::now();
    stage.look_at_untouched()?;
    stage.round(0)?;
    let before = stage.settled_map()?;
    let entries_before = stage.region.raw_entries().expect("the model shows its list");
    stage.touched.clear();
    for round in 1..args.rounds.max(2) {
        stage.round(round)?;
    }
    let after = stage.settled_map()?;
    let unchanged = stage.untouched_unchanged(&entries_before);
    stage.progress.finish_and_clear();
    Ok(stage.finish(&before, &after, unchanged, began))
}

impl Stage {
    fn set(args: &Args) -> Result<Self, DemoError> {
        let space =
            ProcessSpace::open(Options::default()).map_err(setup("this process's memory cannot be used"))?;
        let mut memory = mixed(args.size)?;
        let hole = memory.lend(Kind::Hole).expect("the layout has one");
        let memory = Arc::new(memory);
        let bar_memory =
            BarMemory::new(&space, hole.range().len()).map_err(setup("no memory for the BAR"))?;
        let config = MachineConfig { seed: args.seed, ..MachineConfig::default() };
        let machine = Machine::new(space.memory(), Some(Arc::clone(&bar_memory) as _), &config)
            .map_err(setup("the modelled machine could not be built"))?;
        let bar = machine.bar.as_ref().expect("the machine was given a BAR");
        let peer = PeerPart::new(&bar_memory, bar, 0, hole.range().len());
        let dmabuf = peer.and_then(|peer| DmabufMapping::at(&space, hole, peer));
        let dmabuf = dmabuf.map_err(setup("no memory for the DMABUF"))?;
        let mirror = OwnedMemory::new(&space, args.size).map_err(setup("no memory for the second region"))?;
        let mirror = Arc::new(mirror);
        let refused = setup("the region could not be registered");
        let far_end =
            End::new(&machine.far, &mirror.user_range(), RegisterOptions::pinned()).map_err(&refused)?;
        let mixed = memory.user_range(Arc::clone(&space) as _);
        let near_end = End::new(&machine.near, &mixed, RegisterOptions::on_demand()).map_err(&refused)?;
        near_end.connect(&far_end).map_err(setup("the queue pairs did not connect"))?;
        let region = Arc::clone(&near_end.region);
        let kinds = (0..args.size / PAGE_SIZE).map(|page| memory.kind_at(page)).collect();
        let progress = progress(args);
        Ok(Self {
            args: args.clone(),
            oracle: Oracle::new(args.seed, kinds),
            far: mover(&far_end, &near_end),
            near: mover(&near_end, &far_end),
            random: ChaCha8Rng::seed_from_u64(args.seed),
            space,
            memory,
            dmabuf,
            machine,
            mirror,
            region,
            progress,
            touched: BTreeSet::new(),
            dropped: 0,
            moved: 0,
            verified: 0,
            wrong: 0,
            first_mismatch: None,
            seen: BTreeMap::new(),
        })
    }

    fn pages(&self) -> u64 {
        self.args.size / PAGE_SIZE
    }

    fn chunks(&self) -> Vec<(u64, u32)> {
        let size = self.args.size;
        let length = |offset: u64| u32::try_from(CHUNK.min(size - offset)).expect("a chunk is small");
        (0..size.div_ceil(CHUNK)).map(|index| (index * CHUNK, length(index * CHUNK))).collect()
    }

    /// Reads what nobody ever wrote, so that the page of zeroes is met, and verifies it.
    fn look_at_untouched(&mut self) -> Result<(), DemoError> {
        self.progress.set_message("reading untouched memory");
        self.read_back(0)?;
        self.note_kinds()
    }

    /// Brings the list up to date with what is present, without faulting anything in.
    fn settled_map(&self) -> Result<Vec<MapRun>, DemoError> {
        self.region
            .advise(0, self.args.size, Want::Snapshot)
            .map_err(setup("the region could not be looked at"))?;
        Ok(self.region.page_map().expect("the model shows its list"))
    }

    fn note_kinds(&mut self) -> Result<(), DemoError> {
        for ((kind, _), pages) in tally(&self.settled_map()?) {
            let most = self.seen.entry(kind).or_insert(0);
            *most = pages.max(*most);
        }
        Ok(())
    }

    /// One round: write and read with a new version while pages change; then verify everything.
    fn round(&mut self, round: u32) -> Result<(), DemoError> {
        let version = round + 1;
        self.progress.set_message(format!("round {version}: filling"));
        self.fill(version);
        let mut chunks = self.chunks();
        let untouched = self.untouched_part();
        if round == 0 {
            // Half of the memory that nobody touched stays so.
            chunks.retain(|(offset, _)| {
                !(untouched.start + untouched.end) / 2 <= *offset || *offset < untouched.start
            });
        }
        chunks.shuffle(&mut self.random);
        let share = if round == 0 { chunks.len() } else { chunks.len() * 3 / 4 };
        chunks.truncate(share);
        let (by_write, by_read) = chunks.split_at(chunks.len() / 2);
        self.progress.set_message(format!("round {version}: moving data while pages change"));
        let changes = self.move_while_changing(round, by_write, by_read)?;
        self.settle(version, &chunks, &changes);
        self.progress.set_message(format!("round {version}: verifying"));
        self.read_back(round)?;
        self.note_kinds()
    }

    fn untouched_part(&self) -> std::ops::Range<u64> {
        let part =
            self.memory.parts().iter().find(|part| part.kind == Kind::Untouched).expect("the layout has one");
        part.offset..part.offset + part.len
    }

    /// Puts version `version` of everything into the second region.
    fn fill(&self, version: u32) {
        let mut block = vec![0_u8; CHUNK as usize];
        for (offset, length) in self.chunks() {
            let block = &mut block[..length as usize];
            for (word, bytes) in block.chunks_exact_mut(8).enumerate() {
                bytes.copy_from_slice(&self.oracle.pattern(version, offset / 8 + word as u64).to_le_bytes());
            }
            self.mirror.write_at(offset, block).expect("our own memory");
        }
    }

    fn move_while_changing(
        &mut self,
        round: u32,
        by_write: &[(u64, u32)],
        by_read: &[(u64, u32)],
    ) -> Result<Changes, DemoError> {
        let failed = |source| DemoError::Transfer { round, source };
        let quiet = AtomicBool::new(false);
        let mut random = ChaCha8Rng::seed_from_u64(self.random.random());
        let least = (self.pages() / 256).max(64);
        std::thread::scope(|scope| {
            let changer = scope.spawn(|| {
                let mut changes = Changes::default();
                let mut made = 0;
                // At least so many in every round, however fast data moves; and as many as fit in while it does.
                while round > 0 && (made < least || !quiet.load(Ordering::Acquire)) && made < least * 16 {
                    change(&mut random, &self.memory, &self.dmabuf, &mut changes)?;
                    made += 1;
                }
                Ok::<_, std::io::Error>(changes)
            });
            let reader =
                scope.spawn(|| self.near.transfer(Direction::Read, by_read, |n| self.progress.inc(n)));
            let wrote = self.far.transfer(Direction::Write, by_write, |n| self.progress.inc(n));
            let read = reader.join().expect("the reading thread does not panic");
            quiet.store(true, Ordering::Release);
            let changes = changer.join().expect("the changing thread does not panic");
            wrote.map_err(failed)?;
            read.map_err(failed)?;
            changes.map_err(setup("memory could not be changed"))
        })
    }

    /// Tells the oracle what the round did.
    fn settle(&mut self, version: u32, chunks: &[(u64, u32)], changes: &Changes) {
        let mut dropped = vec![false; self.pages() as usize];
        for &page in &changes.dropped {
            dropped[page as usize] = true;
        }
        let mut written = vec![false; self.pages() as usize];
        for &(offset, length) in chunks {
            for page in offset / PAGE_SIZE..(offset + u64::from(length)).div_ceil(PAGE_SIZE) {
                written[page as usize] = true;
            }
        }
        for page in 0..self.pages() {
            let (written, dropped) = (written[page as usize], dropped[page as usize]);
            self.oracle.after_round(page, written.then_some(version), dropped);
        }
        self.dropped += changes.dropped.len() as u64;
        self.moved += changes.moved.len() as u64;
        self.touched.extend(changes.dropped.iter().chain(&changes.moved));
    }

    /// Reads the whole region by RDMA into the second one, and holds every word against what it may be.
    fn read_back(&mut self, round: u32) -> Result<(), DemoError> {
        let chunks = self.chunks();
        let progress = &self.progress;
        let read = self.far.transfer(Direction::Read, &chunks, |n| progress.inc(n));
        read.map_err(|source| DemoError::Transfer { round, source })?;
        let mut block = vec![0_u8; CHUNK as usize];
        for (offset, length) in chunks {
            let block = &mut block[..length as usize];
            self.mirror.read_at(offset, block).expect("our own memory");
            self.verified += u64::from(length);
            let (wrong, first) = self.oracle.check(offset, block);
            self.wrong += wrong * 8;
            self.first_mismatch = self.first_mismatch.or(first);
        }
        Ok(())
    }

    /// Whether the entry of every page that nobody dropped or moved is what it was: address, path, and still visible.
    fn untouched_unchanged(&self, before: &[u64]) -> bool {
        let after = self.region.raw_entries().expect("the model shows its list");
        let same = |(before, after): (&u64, &u64)| {
            let (before, after) = (Entry::from_bits(*before), Entry::from_bits(*after));
            !before.is_valid()
                || after.is_valid() && before.address() == after.address() && before.path() == after.path()
        };
        let pairs = before.iter().zip(&after).enumerate();
        pairs.filter(|(page, _)| !self.touched.contains(&(*page as u64))).all(|(_, pair)| same(pair))
    }

    fn finish(
        mut self,
        before: &[MapRun],
        after: &[MapRun],
        unchanged: bool,
        began: Instant,
    ) -> (Report, String) {
        let seconds = began.elapsed().as_secs_f64();
        let region = self.region.report();
        let domain = self.machine.near.dma().domain().map(|domain| domain.stats()).unwrap_or_default();
        let tallied = tally(after);
        let (mut kinds, mut paths) = (BTreeMap::new(), BTreeMap::new());
        for ((kind, path), pages) in &tallied {
            *kinds.entry(*kind).or_insert(0) += pages;
            *paths.entry(*path).or_insert(0) += pages;
        }
        let weaker = self.space.weaknesses(self.memory.range()).into_iter();
        let report = Report {
            region_bytes: self.args.size,
            seed: self.args.seed,
            rung: self.space.capabilities().rung.to_string(),
            weaker: weaker.map(|weak| format!("{} {}: {}", weak.range, weak.rung, weak.reason)).collect(),
            key: self.region.key().0,
            iova: self.machine.near.region_iova(self.region.key()).map_or(0, |iova| iova.0),
            untouched_entries_unchanged: unchanged,
            verified_bytes: self.verified,
            mismatched_bytes: self.wrong,
            first_mismatch: self.first_mismatch.take(),
            entries_total: region.entries,
            entries_present: region.present,
            entries_relinked: region.counters.entries_relinked,
            entries_changed_kind: region.counters.entries_changed_kind,
            faults: region.counters.page_faults,
            fault_retries: region.counters.fault_retries,
            invalidations: region.counters.page_invalidations,
            pages_invalidated: region.counters.pages_invalidated,
            pages_dropped: self.dropped,
            pages_moved: self.moved,
            iotlb_flushes: domain.iotlb.flushes,
            stale_translations: domain.stale_hits + self.space.stats().retired_uses,
            pages_by_kind: kinds,
            pages_by_path: paths,
            pages_seen_by_kind: std::mem::take(&mut self.seen),
            seconds,
        };
        let pages = self.pages();
        let mut text = String::new();
        let _ = writeln!(text, "before\n{}", picture::draw(before, pages));
        let _ = writeln!(text, "after\n{}", picture::draw(after, pages));
        let _ = writeln!(text, "{}\n", picture::legend([before, after], pages));
        let _ = writeln!(text, "{}\n", table(&report, after));
        (report, text)
    }
}

/// What moves data from `end`, with `peer` at the other.
fn mover(end: &End, peer: &End) -> Mover {
    let (qp, cq) = (Arc::clone(&end.qp), Arc::clone(&end.cq));
    Mover { qp, cq, local: Arc::clone(&end.region), remote: Arc::clone(&peer.region) }
}

/// The mixed memory, with a huge page of the pool if there is one.
fn mixed(size: u64) -> Result<MixedMemory, DemoError> {
    if size >= SMALLEST + HUGE
        && let Ok(memory) = MixedMemory::new(&layout(size, true))
    {
        return Ok(memory);
    }
    MixedMemory::new(&layout(size, false)).map_err(setup("the memory could not be laid out"))
}

fn progress(args: &Args) -> ProgressBar {
    if args.json {
        return ProgressBar::hidden();
    }
    let rounds = u64::from(args.rounds.max(2));
    let bar = ProgressBar::new(args.size * (1 + rounds) + args.size / 4 * 3 * rounds);
    let style = ProgressStyle::with_template("{wide_bar} {bytes}/{total_bytes} {msg}").expect("a template");
    bar.with_style(style)
}
