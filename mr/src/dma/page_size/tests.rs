//! Page lists against the same thing done byte by byte.

use super::*;
use proptest::prelude::*;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn range(dma: u64, len: u64) -> DmaRange {
    DmaRange { dma: DmaAddr(dma), len }
}

fn at(address: u64) -> FirstByte {
    FirstByte::Address(RegionAddr(address))
}

/// Where every byte is.
fn bytes(ranges: &[DmaRange]) -> Vec<u64> {
    ranges.iter().flat_map(|range| range.dma.0..range.dma.0 + range.len).collect()
}

/// The entries of a list of pages of `size`, if one is possible: every byte says what its page must be.
fn byte_by_byte(ranges: &[DmaRange], first: u64, size: PageSize) -> Option<Vec<DmaAddr>> {
    let mut entries: Vec<(u64, DmaAddr)> = Vec::new();
    for (number, dma) in bytes(ranges).into_iter().enumerate() {
        let address = first + number as u64;
        let page = address / size.bytes();
        let base = dma.checked_sub(address % size.bytes())?;
        if base % size.bytes() != 0 {
            return None;
        }
        match entries.last() {
            Some((last, known)) if *last == page && known.0 != base => return None,
            Some((last, _)) if *last == page => {}
            _ => entries.push((page, DmaAddr(base))),
        }
    }
    Some(entries.into_iter().map(|(_, base)| base).collect())
}

fn some_ranges() -> impl Strategy<Value = Vec<DmaRange>> {
    // Aligned to something or to nothing, so that lists of every size come out, and none.
    let grain = prop_oneof![Just(1_u64), Just(16), Just(64), Just(256)];
    let one = (0_u64..64, 0_u64..6, any::<bool>());
    (grain, prop::collection::vec(one, 1..6), 0_u64..300, 0_u64..300).prop_map(
        |(grain, pieces, into, cut)| {
            let mut ranges: Vec<DmaRange> = Vec::new();
            for (place, len, goes_on) in pieces {
                let dma = match ranges.last() {
                    Some(last) if goes_on => last.dma.0 + last.len,
                    _ => 4096 + place * grain,
                };
                ranges.push(range(dma, len * grain));
            }
            // The first byte and the last may lie anywhere in their pages.
            let into = into.min(ranges[0].len);
            ranges[0] = range(ranges[0].dma.0 + into, ranges[0].len - into);
            if let Some(last) = ranges.last_mut() {
                last.len -= cut.min(last.len);
            }
            ranges
        },
    )
}

const SMALL: PageSizes = PageSizes::from_bitmap(1 << 4 | 1 << 6 | 1 << 8);

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn the_best_list_is_the_one_that_trying_every_size_byte_by_byte_finds(
        ranges in some_ranges(),
        aligned in any::<bool>(),
        address in 0_u64..2048,
        bitmap in prop_oneof![Just(SMALL), (0_u64..512).prop_map(PageSizes::from_bitmap)],
    ) {
        let dma = ranges.iter().find(|range| range.len > 0).map_or(0, |range| range.dma.0);
        // An address that agrees with the memory in its low bits, as an IOVA does, or any.
        let first = if aligned { address / 256 * 256 + dma % 256 } else { address };
        let plan = ListPlan::new(ranges.iter().copied(), at(first), bitmap);
        if bytes(&ranges).is_empty() {
            prop_assert_eq!(plan, Err(PageSizeError::Empty));
            return Ok(());
        }
        let possible: Vec<_> =
            bitmap.iter().filter_map(|size| Some((size, byte_by_byte(&ranges, first, size)?))).collect();
        let fewest = possible.iter().min_by_key(|(size, entries)| (entries.len(), *size));
        match (fewest, plan) {
            (None, Err(PageSizeError::NoSize { at, dma, fits, sizes })) => {
                prop_assert_eq!(bytes(&ranges).get(at as usize).copied(), Some(dma.0), "the place is in the memory");
                prop_assert!(sizes.iter().all(|size| size.bytes() > fits));
            }
            (Some((size, entries)), Ok(plan)) => {
                prop_assert_eq!((plan.page_size, plan.entries), (*size, entries.len() as u64));
                prop_assert_eq!(&plan.pages(ranges.iter().copied()).collect::<Vec<_>>(), entries);
                for (number, dma) in bytes(&ranges).into_iter().enumerate() {
                    let (entry, offset) = plan.locate(number as u64);
                    prop_assert_eq!(entries[entry as usize].0 + offset, dma);
                }
            }
            (expected, plan) => prop_assert!(false, "{plan:?} where {expected:?} is the best"),
        }
    }

    #[test]
    fn parts_lead_every_byte_to_where_it_is_and_never_need_more_entries(
        ranges in some_ranges(), longest in prop::option::of(1..6_u64),
    ) {
        let parts = match longest {
            Some(longest) => Parts::longest(ranges.iter().copied(), SMALL, longest),
            None => Parts::new(ranges.iter().copied(), SMALL),
        };
        let parts: Result<Vec<Part>, _> = parts.collect();
        let all = bytes(&ranges);
        // A part begins anywhere in its first page, but pages inside a list must be whole.
        let Ok(parts) = parts else { return Err(TestCaseError::fail("a run alone always has a list")) };
        let mut covered = 0;
        for part in &parts {
            prop_assert_eq!(part.at, covered);
            let mine: Vec<DmaRange> =
                all[covered as usize..][..part.list.len as usize].iter().map(|dma| range(*dma, 1)).collect();
            let entries: Vec<_> = part.list.pages(mine.iter().copied()).collect();
            prop_assert_eq!(entries.len() as u64, part.list.entries);
            for (number, byte) in mine.iter().enumerate() {
                let (entry, offset) = part.list.locate(number as u64);
                prop_assert_eq!(entries[entry as usize].0 + offset, byte.dma.0);
            }
            covered += part.list.len;
        }
        prop_assert_eq!(covered, all.len() as u64);
        if let Some(longest) = longest {
            prop_assert!(parts.iter().all(|part| part.list.entries <= longest));
            return Ok(());
        }
        if let Ok(one) = ListPlan::new(ranges.iter().copied(), FirstByte::ANY_OFFSET, SMALL) {
            let entries: u64 = parts.iter().map(|part| part.list.entries).sum();
            prop_assert!(entries <= one.entries, "{entries} entries in parts, {} in one list", one.entries);
        }
    }
}

#[test]
fn an_aligned_gib_is_one_entry_and_half_a_page_off_it_is_pages() {
    let list = ListPlan::new([range(4 * GIB, GIB)], at(7 * GIB), PageSizes::X86).expect("aligned");
    assert_eq!((list.page_size.bytes(), list.entries, list.offset), (GIB, 1, 0));
    let pieces = (0..GIB / (2 * MIB)).map(|piece| range(4 * GIB + piece * 2 * MIB, 2 * MIB));
    assert_eq!(ListPlan::new(pieces, at(7 * GIB), PageSizes::X86), Ok(list), "pieces that go on are one");
    let list = ListPlan::new([range(4 * GIB, GIB)], at(7 * GIB + 4 * KIB), PageSizes::X86).expect("4 KiB");
    assert_eq!((list.page_size.bytes(), list.entries), (4 * KIB, GIB / (4 * KIB)));
}

#[test]
fn the_smallest_size_that_covers_is_taken_not_the_largest() {
    let list = ListPlan::new([range(4 * GIB, 2 * MIB)], at(4 * GIB), PageSizes::X86).expect("aligned");
    assert_eq!((list.page_size.bytes(), list.entries), (2 * MIB, 1), "1 GiB would also be one entry");
}

#[test]
fn a_zero_based_region_may_start_anywhere_in_a_page() {
    let into = 4 * KIB + 123;
    let ranges = [range(2 * MIB + into, 2 * MIB - into), range(8 * MIB, 5 * MIB)];
    let list = ListPlan::new(ranges, FirstByte::ANY_OFFSET, PageSizes::X86).expect("an offset is kept");
    assert_eq!((list.page_size.bytes(), list.offset, list.entries), (2 * MIB, into, 4));
    let addresses: Vec<_> = list.pages(ranges).map(|dma| dma.0 / MIB).collect();
    assert_eq!(addresses, [2, 8, 10, 12]);
    let refused = best_page_size(ranges, at(0), PageSizes::X86);
    let expected =
        PageSizeError::NoSize { at: 0, dma: DmaAddr(2 * MIB + into), fits: 1, sizes: PageSizes::X86 };
    assert_eq!(refused, Err(expected), "a device without an offset of its own takes it from the address");
    let first = FirstByte::Offset { mask: 0xfff };
    assert_eq!(best_page_size(ranges, first, PageSizes::X86).map(PageSize::bytes), Ok(4 * KIB));
}

#[test]
fn the_error_names_the_place_and_what_the_device_has() {
    let ranges = [range(0x10_0000, 0x3000), range(0x50_0200, 0x1000), range(0x90_0000, 0x1000)];
    let error = best_page_size(ranges, at(0x10_0000), PageSizes::X86).expect_err("512-byte alignment");
    let place =
        PageSizeError::NoSize { at: 0x3000, dma: DmaAddr(0x50_0200), fits: 512, sizes: PageSizes::X86 };
    assert_eq!(error, place);
    let said =
        "0x3000 bytes in, at 0x500200, pages have at most 512 bytes, and the device has 4 KiB, 2 MiB, 1 GiB";
    assert_eq!(error.to_string(), said);
}

#[test]
fn a_list_may_end_at_the_top_of_the_address_space_and_not_beyond() {
    let top = u64::MAX - 4095;
    let list = ListPlan::new([range(top, 4096)], at(top), PageSizes::X86).expect("ends at the top");
    assert_eq!((list.entries, list.page_size.bytes()), (1, 4096));
    let past = PageSizeError::PastTop { at: 0 };
    assert_eq!(best_page_size([range(top, 4097)], at(0), PageSizes::X86), Err(past));
    assert_eq!(best_page_size([range(0, 4097)], at(top), PageSizes::X86), Err(past));
    let two = [range(0, 4096), range(8192, 4096)];
    assert_eq!(best_page_size(two, at(top), PageSizes::X86), Err(PageSizeError::PastTop { at: 4096 }));
}

#[test]
fn a_few_small_pieces_do_not_make_a_large_one_small() {
    let scattered = (0..512).map(|page| range(64 * GIB + page * 3 * 4 * KIB, 4 * KIB));
    let ranges: Vec<_> =
        [range(4 * GIB, GIB)].into_iter().chain(scattered).chain([range(8 * GIB, GIB)]).collect();
    let one = ListPlan::new(ranges.iter().copied(), FirstByte::ANY_OFFSET, PageSizes::X86).expect("4 KiB");
    assert_eq!(one.entries, 2 * GIB / (4 * KIB) + 512);
    let parts: Vec<Part> =
        Parts::new(ranges, PageSizes::X86).collect::<Result<_, _>>().expect("every run has a list");
    let entries: u64 = parts.iter().map(|part| part.list.entries).sum();
    assert_eq!((parts.len(), entries), (3, 514));
    assert_eq!(Part::fixed_size(&parts), None, "lengths differ: each entry says its own");
}

#[test]
fn a_list_ends_only_where_it_must() {
    let ranges = [range(4 * GIB, 6 * MIB), range(9 * GIB, 4 * MIB), range(12 * GIB + 512, 8 * KIB)];
    let parts = |longest| {
        let sizes = PageSizes::from_bitmap(1 << 12 | 1 << 21);
        let parts = Parts::longest(ranges, sizes, longest).map(|part| part.expect("a list"));
        parts.map(|part| (part.list.len, part.list.entries)).collect::<Vec<_>>()
    };
    assert_eq!(parts(8), [(10 * MIB, 5), (8 * KIB, 1)], "the third begins inside a page of any size");
    assert_eq!(parts(4), [(6 * MIB, 3), (4 * MIB, 2), (8 * KIB, 1)]);
    assert_eq!(parts(2), [(4 * MIB, 2), (2 * MIB, 1), (4 * MIB, 2), (8 * KIB, 1)]);
}

#[test]
fn parts_of_one_length_need_no_length_in_their_entries() {
    let ranges = [range(4 * GIB, GIB), range(9 * GIB + 4 * KIB, GIB), range(16 * GIB + 4 * MIB, 5 * MIB)];
    let parts: Vec<Part> = Parts::new(ranges, PageSizes::X86).collect::<Result<_, _>>().expect("lists");
    assert_eq!(parts.len(), 3);
    assert_eq!(Part::fixed_size(&parts), Some(GIB));
    assert_eq!(Part::fixed_size(&parts[1..]), Some(GIB));
    assert_eq!(Part::fixed_size(&parts[2..]), Some(8 * MIB), "one entry, and room behind it");
    assert_eq!(Part::fixed_size(&[]), None);
}

#[test]
fn sizes_are_said_in_units() {
    assert_eq!(PageSizes::X86.to_string(), "4 KiB, 2 MiB, 1 GiB");
    assert_eq!(PageSizes::from_bitmap(1 | 1 << 63).to_string(), "1 B, 8 EiB");
    assert_eq!(PageSizes::from_bitmap(0).to_string(), "no pages at all");
    assert!(best_page_size([range(0, 1)], at(0), PageSizes::from_bitmap(0)).is_err());
}
