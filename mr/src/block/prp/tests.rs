//! PRP entries, followed as a controller does.

use super::*;
use proptest::prelude::*;

const PAGE: u64 = 4096;
const MAX: u64 = 1 << 30;

fn range(dma: u64, len: u64) -> DmaRange {
    DmaRange { dma: DmaAddr(dma), len }
}

fn plan(ranges: &[DmaRange]) -> Result<PrpPlan, PrpError> {
    PrpPlan::new(ranges.iter().copied(), ControllerPage::SMALLEST, MAX)
}

/// Pages for a list, not next to each other.
fn list_memory(pages: usize) -> Vec<DmaAddr> {
    (0..pages as u64).map(|page| DmaAddr((1 << 40) + page * 3 * PAGE)).collect()
}

/// What a controller moves, page by page, told nothing but the command, the bytes of the data and the list's memory.
fn follow(prp: &Prp, bytes: u64, page: u64) -> Vec<(u64, u64)> {
    let word = |at: u64| {
        let (_, words) =
            prp.list.iter().find(|(start, _)| start.0 == at / page * page).expect("a page of the list");
        words[(at % page / 8) as usize]
    };
    let first = bytes.min(page - prp.prp1.0 % page);
    let mut moved = vec![(prp.prp1.0, first)];
    let mut left = bytes - first;
    if left == 0 {
        assert_eq!(prp.prp2, DmaAddr(0), "PRP2 is reserved");
        return moved;
    }
    if left <= page {
        assert_eq!(prp.prp2.0 % page, 0, "the second entry has no offset");
        moved.push((prp.prp2.0, left));
        return moved;
    }
    let mut at = prp.prp2.0;
    while left > 0 {
        if at % page == page - 8 && left > page {
            at = word(at);
            assert_eq!(at % page, 0, "a further list begins with its page");
            continue;
        }
        let entry = word(at);
        assert_eq!(entry % page, 0, "entries of a list have no offset");
        moved.push((entry, left.min(page)));
        left -= left.min(page);
        at += 8;
    }
    moved
}

fn bytes_of(places: impl IntoIterator<Item = (u64, u64)>) -> Vec<u64> {
    places.into_iter().flat_map(|(at, len)| (at..at + len).step_by(4)).collect()
}

fn request() -> impl Strategy<Value = Vec<DmaRange>> {
    let pages = prop_oneof![8 => 1..4_u64, 2 => 100..700_u64];
    let runs = prop::collection::vec((0..1000_u64, pages), 1..6);
    (runs, 0..1024_u64, 0..1024_u64, 1..5_u64).prop_map(|(runs, into, short, cuts)| {
        let mut ranges: Vec<_> =
            runs.iter().map(|(place, pages)| range((1 << 30) + place * 1024 * PAGE, pages * PAGE)).collect();
        let into = into * 4;
        ranges[0] = range(ranges[0].dma.0 + into, ranges[0].len - into);
        let last = ranges.last_mut().expect("one at least");
        last.len -= (short * 4).min(last.len - 4);
        // Whatever cut it into pieces that continue each other changes nothing.
        let cut = move |run: DmaRange| {
            let piece = (run.len / cuts).max(4) / 4 * 4;
            let steps = run.len.div_ceil(piece);
            (0..steps).map(move |n| range(run.dma.0 + n * piece, piece.min(run.len - n * piece)))
        };
        ranges.into_iter().flat_map(cut).collect()
    })
}

proptest! {
    #[test]
    fn a_controller_moves_every_byte_in_order_and_no_other(ranges in request()) {
        let plan = plan(&ranges).expect("gaps are between pages only");
        let memory = list_memory(plan.list_pages());
        let prp = plan.build(&memory).expect("enough pages");
        prop_assert_eq!(prp.list.len(), plan.list_pages());
        let moved = follow(&prp, plan.bytes(), PAGE);
        prop_assert_eq!(moved.len(), plan.entries().len());
        let expected = bytes_of(ranges.iter().map(|range| (range.dma.0, range.len)));
        prop_assert!(bytes_of(moved) == expected);
        if let Some(short) = memory.len().checked_sub(1) {
            let error = PrpError::ListPages { needed: memory.len(), given: short };
            prop_assert_eq!(plan.build(&memory[..short]), Err(error));
        }
    }
}

#[test]
fn the_command_alone_says_one_page_or_two() {
    let prp = |ranges: &[DmaRange]| plan(ranges).expect("entries").build(&[]);
    let one = prp(&[range(0x5100, 0xf00)]).expect("no list");
    assert_eq!((one.prp1, one.prp2, one.list.len()), (DmaAddr(0x5100), DmaAddr(0), 0));
    let two = prp(&[range(0x5100, 0xf04)]).expect("no list");
    assert_eq!((two.prp1, two.prp2, two.list.len()), (DmaAddr(0x5100), DmaAddr(0x6000), 0));
    assert_eq!(prp(&[range(0x5100, 0x1f04)]), Err(PrpError::ListPages { needed: 1, given: 0 }));
}

#[test]
fn a_list_that_fills_its_page_goes_on_without_a_pointer_only_if_it_ends_there() {
    for (listed, pages) in [(511, 1), (512, 1), (513, 2), (1023, 2), (1024, 3)] {
        let plan = plan(&[range(1 << 30, (listed + 1) * PAGE)]).expect("aligned");
        assert_eq!(plan.list_pages(), pages, "{listed} entries");
        let prp = plan.build(&list_memory(pages)).expect("enough");
        assert_eq!(prp.list[0].1.len() as u64, listed.min(512));
        assert_eq!(follow(&prp, plan.bytes(), PAGE).len() as u64, listed + 1);
    }
}

#[test]
fn larger_pages_of_the_controller_take_fewer_entries() {
    let page = ControllerPage::new(16384).expect("a page");
    let plan = PrpPlan::new([range((1 << 30) + 512, 1 << 20)], page, MAX).expect("aligned");
    assert_eq!(plan.entries().len(), 65);
    let prp = plan.build(&[DmaAddr(1 << 20)]).expect("a page");
    assert_eq!(bytes_of(follow(&prp, 1 << 20, 16384)), bytes_of([((1 << 30) + 512, 1 << 20)]));
    assert_eq!((ControllerPage::new(2048), ControllerPage::new(5000)), (None, None));
}

#[test]
fn what_entries_cannot_say_is_refused_by_name() {
    assert_eq!(plan(&[]), Err(PrpError::Empty));
    assert_eq!(plan(&[range(0x5000, 0)]), Err(PrpError::Empty));
    assert_eq!(plan(&[range(0x5002, 512)]), Err(PrpError::NotOnDoubleWord { dma: DmaAddr(0x5002) }));
    let gap = |before, after| {
        Err(PrpError::Gap { at: 0x800, before: DmaAddr(before), after: DmaAddr(after), page: PAGE })
    };
    assert_eq!(
        plan(&[range(0x5000, 0x800), range(0x9000, 0x800)]),
        gap(0x5800, 0x9000),
        "ends inside a page"
    );
    assert_eq!(
        plan(&[range(0x5800, 0x800), range(0x9200, 0x800)]),
        gap(0x6000, 0x9200),
        "begins inside a page"
    );
    let too_long = PrpError::TooLong { bytes: 0x3000, max: 0x2000 };
    let long = PrpPlan::new([range(0, 0x1000), range(0x8000, 0x2000)], ControllerPage::SMALLEST, 0x2000);
    assert_eq!(long, Err(too_long));
    let crooked = plan(&[range(0, 0x4000)]).expect("aligned").build(&[DmaAddr(0x1008)]);
    assert_eq!(crooked, Err(PrpError::ListPages { needed: 1, given: 0 }));
}
