//! Regions whose pages are kept in memory: locked, or pinned for long.

use crate::bed::{Bed, space};
use crate::checks::{Counts, PATIENCE, protocol_kept};
use crate::fail_nth::{Made, Stand, sweep_over};
use crate::remapped::Remapped;
use anypage::machine::MachineConfig;
use hw_model::addr::page_bytes;
use hw_model::hca::Status;
use hw_model::sync::{Arc, Mutex};
use mr::device::{RegisterError, ReregError};
use mr::{MapRegionError, PinKind, ProtectionDomain, Region, RegisterOptions, Rereg};
use odp::space::{PinError, UserRange};

const PAGES: u64 = 64;

/// These tests look at what the whole process has locked and pinned.
pub static ALONE: Mutex<()> = Mutex::new(());

/// Bytes that this process has locked and pinned.
fn kept() -> [u64; 2] {
    let text = std::fs::read_to_string("/proc/self/status").expect("a process has one");
    ["VmLck:", "VmPin:"].map(|name| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).expect("the kernel says so");
        line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).expect("a number") * 1024
    })
}

/// A region, or `None` where this machine refuses to keep pages so, which is said.
fn register(pd: &Arc<dyn ProtectionDomain>, memory: &UserRange, kind: PinKind) -> Option<Arc<dyn Region>> {
    match Arc::clone(pd).register(memory, RegisterOptions::pinned().with_pin(kind)) {
        Ok(region) => Some(region),
        Err(RegisterError::Map(MapRegionError::Pin(error)))
            if matches!(error, PinError::MemlockLimit { .. } | PinError::NoIoUring { .. }) =>
        {
            println!("SKIPPED pages that are {kind}: {error}");
            None
        }
        Err(error) => panic!("{kind}: {error}"),
    }
}

#[test]
fn regions_keep_their_pages_as_asked_through_reregistration_and_let_them_go() {
    let _alone = ALONE.lock();
    let space = space();
    let memory = Remapped::new(2 * PAGES);
    memory.use_small_pages();
    let whole = memory.user_range(Arc::clone(&space) as _);
    let half = |n| whole.part(n * page_bytes(PAGES), page_bytes(PAGES)).expect("in it");
    for kind in [PinKind::Populated, PinKind::Mlock, PinKind::RealPin] {
        let bed = Bed::new(&space, &half(0), RegisterOptions::on_demand(), &MachineConfig::default());
        let (before, counts) = (kept(), Counts::of(&bed.machine, &bed.space));
        let with = |pages| {
            let of = |one| if kind == one { page_bytes(pages) } else { 0 };
            [before[0] + of(PinKind::Mlock), before[1] + of(PinKind::RealPin)]
        };
        let Some(region) = register(&bed.near.pd, &half(0), kind) else { continue };
        assert_eq!((kept(), region.report().present), (with(PAGES), PAGES), "{kind}");
        // Over the same pages: the first to go lets nothing go that the second keeps.
        let again = register(&bed.near.pd, &half(0), kind).expect("once more");
        region.deregister();
        assert_eq!(kept(), with(PAGES), "{kind}");
        again.rereg(Rereg { memory: Some((half(1), None)), ..Rereg::default() }).expect("possible");
        assert_eq!((kept(), again.report().present), (with(PAGES), PAGES), "{kind}: the other half");
        // What cannot be changed keeps what there was.
        let nothing = whole.part(0, 0).expect("in it");
        let refused = again.rereg(Rereg { memory: Some((nothing, None)), ..Rereg::default() });
        assert_eq!(refused, Err(ReregError::Map(MapRegionError::Empty)));
        assert_eq!(kept(), with(PAGES), "{kind}");
        again.deregister();
        assert_eq!(kept(), before, "{kind}");
        counts.are_back(&bed.machine, &bed.space).expect("nothing is left");
    }
}

/// A pin keeps the page, not the mapping of it: the region follows the mapping, as every region does.
#[test]
fn a_page_dropped_under_a_real_pin_comes_back_as_the_program_sees_it() {
    let _alone = ALONE.lock();
    let space = space();
    let memory = Remapped::new(PAGES);
    let whole = memory.user_range(Arc::clone(&space) as _);
    let bed = Bed::new(&space, &whole, RegisterOptions::on_demand(), &MachineConfig::default());
    let Some(region) = register(&bed.near.pd, &whole, PinKind::RealPin) else { return };
    bed.mirror.write_at(0, &[5; 64]).expect("our own memory");
    memory.discard(0, 1);
    assert_eq!(bed.write(0, 64), Status::Success);
    assert_eq!(memory.word(0), u64::from_ne_bytes([5; 8]));
    region.deregister();
    protocol_kept(&bed.machine, &bed.space).expect("all in order");
}

#[test]
fn pages_that_come_and_go_are_not_locked() {
    let space = space();
    let memory = Remapped::new(1);
    let whole = memory.user_range(Arc::clone(&space) as _);
    let bed = Bed::new(&space, &whole, RegisterOptions::on_demand(), &MachineConfig::default());
    for options in [RegisterOptions::on_demand(), RegisterOptions::implicit()] {
        for kind in [PinKind::Mlock, PinKind::RealPin] {
            let refused = Arc::clone(&bed.near.pd).register(&whole, options.with_pin(kind)).map(drop);
            assert_eq!(refused, Err(RegisterError::NotPinned { kind }));
        }
    }
}

#[test]
fn whatever_step_fails_no_page_stays_locked_or_pinned() {
    let _alone = ALONE.lock();
    let stand = Stand::new(true);
    for (name, kind) in [("locked", PinKind::Mlock), ("pinned for long", PinKind::RealPin)] {
        let options = RegisterOptions::pinned().with_pin(kind);
        if register(&stand.bed.near.pd, &stand.present, kind).is_none() {
            continue;
        }
        let counts = || (kept(), Counts::of(&stand.bed.machine, &stand.bed.space));
        let row = sweep_over(&stand.plan, PATIENCE, counts, name, || {
            let region = Arc::clone(&stand.bed.near.pd).register(&stand.present, options);
            let region = region.map_err(|error| error.to_string())?;
            let half = stand.present.part(0, page_bytes(PAGES / 2)).expect("in it");
            let changed = region.rereg(Rereg { memory: Some((half, None)), ..Rereg::default() });
            changed.map_err(|error| error.to_string())?;
            Ok(Box::new(region) as Made)
        });
        let row = row.unwrap_or_else(|leak| panic!("{leak}"));
        assert!(row.points.contains(&odp::space::points::PIN), "{row:?}");
    }
}
