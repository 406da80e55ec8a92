//! The two rows against a plain list of words.

use super::*;
use crate::addr::DmaAddr;
use crate::hca::page_list::{Backing, Path};
use proptest::prelude::*;

const PAGES: u64 = 4 * HUGE_PAGES;

fn huge_entry(number: u64, path: Path) -> Entry {
    Entry::present(DmaAddr((number + 1) << 21), path, Backing::TransparentHuge, true)
}

fn small_entry(index: u64) -> Entry {
    Entry::present(DmaAddr((1 << 40) + page_bytes(index)), Path::Iova, Backing::File, false)
}

/// What [`PageList::load`] is to say of every page.
struct Plain(Vec<Entry>);

impl Plain {
    fn holds(&self, list: &PageList) {
        for (index, expected) in self.0.iter().enumerate() {
            let found = list.load(index as u64).expect("in the list");
            assert_eq!(found.is_valid(), expected.is_valid(), "page {index}");
            assert_eq!(found.is_linked(), expected.is_linked(), "page {index}");
            if found.is_valid() || found.is_linked() {
                assert_eq!(found, *expected, "page {index}");
            }
        }
        assert_eq!(list.load(self.0.len() as u64), None);
    }

    fn set_huge(&mut self, slot: Slot, entry: Entry) {
        for page in 0..slot.pages() {
            let address = DmaAddr(entry.address().0 + page_bytes(page));
            let of_page = Entry::present(address, entry.path(), entry.backing(), entry.is_writable());
            let of_page = if page == 0 { of_page } else { of_page.continued() };
            self.0[(slot.first() + page) as usize] = of_page;
        }
    }
}

#[test]
fn a_huge_page_is_512_pages_that_follow_each_other() {
    for path in [Path::Direct, Path::Iova] {
        let list = PageList::mixed(PAGES, 3).expect("memory");
        let slot = list.huge_slot(3 + HUGE_PAGES + 7).expect("whole in the list");
        assert_eq!((slot.first(), slot.end(), slot.pages()), (515, 1027, HUGE_PAGES));
        list.store_slot(slot, huge_entry(5, path));
        let mut plain = Plain(vec![Entry::EMPTY; PAGES as usize]);
        plain.set_huge(slot, huge_entry(5, path));
        plain.holds(&list);
        list.split(slot);
        plain.holds(&list);
        assert!(!list.is_whole(slot) && !list.may_be_huge(slot), "its pages are there by themselves");
        list.store(520, list.load(520).expect("in the list").cleared().unlinked());
        assert!(list.load(521).expect("in the list").is_valid(), "and go their own way");
    }
}

#[test]
fn only_whole_huge_pages_have_a_word() {
    let list = PageList::mixed(PAGES, 3).expect("memory");
    let with_one: Vec<_> = (0..PAGES).filter(|index| list.huge_slot(*index).is_some()).collect();
    assert_eq!(with_one, (3..3 + 3 * HUGE_PAGES).collect::<Vec<_>>());
    assert_eq!(PageList::mixed(100, 500).expect("memory").huge_slot(99), None);
    assert_eq!(PageList::new(PAGES).expect("memory").huge_slot(0), None);
    let huge = PageList::huge(PAGES).expect("memory");
    assert_eq!((huge.words(), huge.len(), huge.entry_bytes()), (4, PAGES, 2 << 20));
    assert_eq!(huge.load(77), Some(Entry::EMPTY));
}

#[test]
#[should_panic(expected = "is not that of a huge page")]
fn an_address_inside_a_huge_page_is_none_for_a_huge_page() {
    let list = PageList::huge(HUGE_PAGES).expect("memory");
    let slot = list.huge_slot(0).expect("the only one");
    list.store_slot(slot, Entry::present(DmaAddr(0x20_1000), Path::Iova, Backing::Hugetlb, true));
}

#[test]
fn what_a_page_was_is_known_after_its_huge_page_went() {
    let list = PageList::mixed(HUGE_PAGES, 0).expect("memory");
    let slot = list.huge_slot(0).expect("the only one");
    list.store_slot(slot, huge_entry(0, Path::Iova));
    list.store_slot(slot, list.load_slot(slot).cleared().unlinked());
    let page = list.load(9).expect("in the list");
    assert!(page.was_seen() && !page.is_valid() && !page.is_linked());
    assert_eq!(page.backing(), Backing::TransparentHuge);
    list.store(9, small_entry(9));
    assert!(!list.may_be_huge(slot));
    assert!(list.load(10).expect("in the list").was_seen(), "its neighbours are known still");
    list.store(9, small_entry(9).cleared().unlinked());
    assert!(list.may_be_huge(slot), "nothing is there by itself any more");
}

proptest! {
    #[test]
    fn two_rows_say_what_one_would(lead in 0..HUGE_PAGES, steps in prop::collection::vec((0..5_u8, 0..PAGES), 1..60)) {
        let list = PageList::mixed(PAGES, lead).expect("memory");
        let mut plain = Plain(vec![Entry::EMPTY; PAGES as usize]);
        for (what, index) in steps {
            let slot = list.huge_slot(index);
            let whole = slot.filter(|slot| list.is_whole(*slot));
            match (what, slot, whole) {
                // The one page, which may have to leave its huge page for that.
                (0 | 1, _, whole) => {
                    if let Some(slot) = whole {
                        list.split(slot);
                    }
                    let entry = if what == 0 { small_entry(index) } else { Entry::EMPTY };
                    list.store(index, entry);
                    plain.0[index as usize] = entry;
                }
                (2, Some(slot), _) if list.may_be_huge(slot) => {
                    list.store_slot(slot, huge_entry(index / HUGE_PAGES, Path::Iova));
                    plain.set_huge(slot, huge_entry(index / HUGE_PAGES, Path::Iova));
                }
                (3, _, Some(slot)) => list.split(slot),
                // Away with what is there around the page.
                (4, ..) => {
                    for (slot, entry) in list.slots(index.saturating_sub(9)..(index + 9).min(PAGES)) {
                        list.store_slot(slot, entry.cleared().unlinked());
                        plain.0[slot.first() as usize..slot.end() as usize].fill(Entry::EMPTY);
                    }
                }
                _ => {}
            }
            if let Some(slot) = slot {
                let free = plain.0[slot.first() as usize..slot.end() as usize].iter().all(|entry| !entry.is_active());
                prop_assert_eq!(list.may_be_huge(slot), list.is_whole(slot) || free);
            }
        }
        plain.holds(&list);
        let covered: Vec<_> = list.slots(0..PAGES).flat_map(|(slot, _)| slot.first()..slot.end()).collect();
        prop_assert_eq!(covered, (0..PAGES).collect::<Vec<_>>());
    }
}
