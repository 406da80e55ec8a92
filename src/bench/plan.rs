//! Which rounds there are, and running them.

use super::devices::Registrar;
use super::host;
use super::report::Row;
use super::round::{Contender, Place, Seen};
use super::{Before, BenchError, How, Pages, RegisterArgs, setup};
use crate::mixed::{Kind, MixedMemory};
use crate::range;
use clap::ValueEnum;
use hw_model::addr::{PAGE_SIZE, page_bytes};
use hw_model::sync::atomic::{AtomicBool, Ordering};
use hw_model::sync::{Arc, Barrier, thread};
use indicatif::{ProgressBar, ProgressStyle};
use mr::{Region, RegisterOptions};
use odp::space::process::ProcessSpace;
use std::io;
use std::time::{Duration, Instant};

const SIZES: [u64; 6] = [4 << 10, 64 << 10, 1 << 20, 16 << 20, 64 << 20, 256 << 20];
const QUICK_SIZES: [u64; 3] = [4 << 10, 64 << 20, 256 << 20];
const QUICK_PAGES: [Pages; 2] = [Pages::Small, Pages::Thp];
/// Rounds before any that counts.
const WARM_UP: u32 = 2;
/// Rounds at least, and at most.
const LEAST: u32 = 5;
const MOST: u32 = 20_000;

/// What one set of rounds is about.
#[derive(Clone, Copy, Debug)]
pub(super) struct Group {
    pub pages: Pages,
    pub size: u64,
    pub before: Before,
    pub threads: usize,
    pub regions: u64,
}

/// All of them.
pub(super) struct Plan {
    groups: Vec<Group>,
    modes: Vec<How>,
    time: Duration,
}

fn given<T: Copy>(given: &[T], otherwise: &[T]) -> Vec<T> {
    if given.is_empty() { otherwise.to_vec() } else { given.to_vec() }
}

impl Plan {
    pub(super) fn of(args: &RegisterArgs) -> Result<Self, BenchError> {
        let available = host::memory("MemAvailable:").unwrap_or(u64::MAX);
        let every =
            |quick: &[Pages]| if args.quick { quick.to_vec() } else { Pages::value_variants().to_vec() };
        let sizes = given(&args.sizes, if args.quick { &QUICK_SIZES } else { &SIZES });
        let pages = given(&args.pages, &every(&QUICK_PAGES));
        let states = if args.quick { &[Before::Warm][..] } else { &[Before::Warm, Before::Cold] };
        let before = given(&args.before, states);
        for threads in &args.threads {
            range::count("threads", *threads as u64, 1, 1024)?;
        }
        for size in &sizes {
            let most = available / 2 / args.threads.iter().max().map_or(1, |most| *most as u64);
            range::count("sizes", *size, 1, most & !(PAGE_SIZE - 1))?;
        }
        for regions in args.regions.iter().chain(&args.crowd) {
            range::count("regions", *regions, 0, 1 << 24)?;
        }
        let time = args.time.unwrap_or(if args.quick { 0.2 } else { 1.0 });
        range::seconds("time", time, 3600)?;
        let mut groups = Vec::new();
        for &regions in &args.regions {
            for &threads in &args.threads {
                for &pages in &pages {
                    for &before in &before {
                        let sizes = sizes.iter().map(|size| size.next_multiple_of(PAGE_SIZE));
                        groups.extend(sizes.map(|size| Group { pages, size, before, threads, regions }));
                    }
                }
            }
        }
        Ok(Self { groups, modes: args.modes.clone(), time: Duration::from_secs_f64(time) })
    }

    pub(super) fn run(
        &self,
        devices: &[Registrar],
        space: &Arc<ProcessSpace>,
        quiet: bool,
    ) -> Result<Vec<Row>, BenchError> {
        let mut contenders = vec![Contender::Floor, Contender::RealPin];
        for device in devices {
            let mut modes = self.modes.iter().filter(|how| device.has(**how)).peekable();
            if modes.peek().is_none() {
                let source = "the mode `empty` is the model's alone, and no other was asked for".into();
                return Err(BenchError::Device { device: device.name().to_owned(), source });
            }
            contenders.extend(modes.map(|how| Contender::Region(device, *how)));
        }
        let style = ProgressStyle::with_template("{wide_bar} {pos}/{len} {msg}").expect("a template");
        let bar = if quiet { ProgressBar::hidden() } else { ProgressBar::new(self.groups.len() as u64) };
        bar.set_style(style);
        let mut there = Vec::new();
        let mut rows = Vec::new();
        for group in &self.groups {
            bar.set_message(format!("{:?} pages, {} KiB", group.pages, group.size >> 10));
            crowd(&mut there, devices, space, group.regions)?;
            let (seen, huge) =
                self.rounds(*group, &contenders, space).map_err(setup("no memory to register"))?;
            rows.extend(Row::of_group(*group, &contenders, &seen, huge));
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok(rows)
    }

    /// The rounds of one group: what each contender did, and bytes in huge pages.
    fn rounds(
        &self,
        group: Group,
        contenders: &[Contender<'_>],
        space: &Arc<ProcessSpace>,
    ) -> io::Result<(Vec<Seen>, Option<u64>)> {
        let places = (0..group.threads).map(|_| Place::new(space, group)).collect::<io::Result<Vec<_>>>()?;
        let barrier = Barrier::new(group.threads);
        let over = AtomicBool::new(false);
        let run = |mut place: Place, leads: bool| -> io::Result<(Vec<Seen>, Option<u64>)> {
            place.warm();
            let huge = place.huge_bytes();
            let fresh = || contenders.iter().map(|_| Seen::new()).collect::<Vec<_>>();
            for _ in 0..WARM_UP {
                place.round(contenders, &mut fresh(), &barrier)?;
            }
            let mut seen = fresh();
            let start = Instant::now();
            for round in 0.. {
                if leads {
                    let late = start.elapsed() > self.time && round >= LEAST;
                    over.store(late || round >= MOST, Ordering::Relaxed);
                }
                barrier.wait();
                if over.load(Ordering::Relaxed) {
                    break;
                }
                place.round(contenders, &mut seen, &barrier)?;
            }
            Ok((seen, huge))
        };
        thread::scope(|scope| {
            let mut places = places.into_iter();
            let mine = places.next().expect("a thread at least");
            let others: Vec<_> = places.map(|place| scope.spawn(|| run(place, false))).collect();
            let (mut seen, huge) = run(mine, true)?;
            for other in others {
                let (theirs, _) = other.join().expect("a thread that measures does not panic")?;
                seen.iter_mut().zip(theirs).for_each(|(mine, theirs)| mine.merge(theirs));
            }
            Ok((seen, huge))
        })
    }
}

/// Sees to it that each device has `regions` regions of one page.
fn crowd(
    there: &mut Vec<Arc<dyn Region>>,
    devices: &[Registrar],
    space: &Arc<ProcessSpace>,
    regions: u64,
) -> Result<(), BenchError> {
    if there.len() as u64 == regions * devices.len() as u64 {
        return Ok(());
    }
    there.clear();
    if regions == 0 {
        return Ok(());
    }
    let refused = setup("no memory for the regions that are to be there already");
    let memory = MixedMemory::new(&[(Kind::Untouched, page_bytes(regions))]).map_err(refused)?;
    let all = Arc::new(memory).user_range(Arc::clone(space) as _);
    for device in devices {
        for page in 0..regions {
            let part = all.part(page_bytes(page), PAGE_SIZE).expect("a page of it");
            let region = device.register(&part, RegisterOptions::on_demand());
            there.push(region.map_err(setup("the regions that are to be there already were refused"))?);
        }
    }
    Ok(())
}
