use super::*;
use crate::notifier::{Notify, Raise};
use crate::space::process::Options;
use hw_model::sync::Mutex;
use std::os::fd::AsFd;

const PAGES: u64 = 4;

fn space() -> Arc<ProcessSpace> {
    ProcessSpace::open(Options::default()).expect("this process can use its own memory")
}

fn file(byte: u8) -> rustix::fd::OwnedFd {
    let file = super::super::view::memory_file("layout", PAGES * PAGE_SIZE, false).expect("memory");
    let bytes = [byte; PAGE_SIZE as usize];
    for page in 0..PAGES {
        rustix::io::pwrite(&file, &bytes, page * PAGE_SIZE).expect("memory");
    }
    file
}

fn byte_at(memory: &ContiguousMemory, page: u64) -> u8 {
    let mut byte = [0];
    memory.read_at(page * PAGE_SIZE, &mut byte).expect("mapped");
    byte[0]
}

/// Ranges that were told to go.
#[derive(Default)]
struct Told(Mutex<Vec<VirtRange>>);

impl Notify for Told {
    fn clear(&self, range: VirtRange, raise: Raise<'_>) {
        self.0.lock().push(range);
        raise.raise();
    }
    fn unlink(&self, _range: VirtRange) {}
}

#[test]
fn pieces_lie_one_behind_the_other_and_hold_what_they_are_of() {
    let (shared, private) = (file(1), file(2));
    let memory = ContiguousMemory::new(
        &space(),
        &[
            Piece::Anonymous(PAGE_SIZE),
            Piece::Shared { file: shared.as_fd(), offset: PAGE_SIZE, len: 2 * PAGE_SIZE },
            Piece::Private { file: private.as_fd(), offset: 0, len: PAGE_SIZE },
        ],
    )
    .expect("laid out");
    assert_eq!(memory.range().len(), 4 * PAGE_SIZE);
    assert_eq!([0, 1, 2, 3].map(|page| byte_at(&memory, page)), [0, 1, 1, 2]);
    // Written where it is shared, and nowhere else.
    memory.write_at(PAGE_SIZE, &[9]).expect("mapped");
    memory.write_at(3 * PAGE_SIZE, &[9]).expect("mapped");
    let mut byte = [0];
    rustix::io::pread(&shared, &mut byte, PAGE_SIZE).expect("memory");
    assert_eq!(byte, [9], "not written to the file");
    rustix::io::pread(&private, &mut byte, 0).expect("memory");
    assert_eq!(byte, [2], "written to a file that is mapped privately");
}

#[test]
fn whoever_registered_is_told_before_a_piece_is_replaced_or_all_of_it_goes() {
    let space = space();
    let memory = ContiguousMemory::new(&space, &[Piece::Anonymous(PAGES * PAGE_SIZE)]).expect("laid out");
    let told = Arc::new(Told::default());
    let range = memory.range();
    let _interval = space.notifiers().register(range, Arc::clone(&told) as _);
    let shared = file(3);
    let piece = Piece::Shared { file: shared.as_fd(), offset: 0, len: PAGE_SIZE };
    memory.replace(PAGE_SIZE, piece).expect("replaced");
    let part = VirtRange::new(range.start().offset(PAGE_SIZE), PAGE_SIZE).expect("inside");
    assert_eq!(*told.0.lock(), [part]);
    assert_eq!([0, 1, 2].map(|page| byte_at(&memory, page)), [0, 3, 0]);
    drop(memory);
    assert_eq!(told.0.lock().last(), Some(&range));
}

#[test]
fn pages_that_are_moved_in_keep_what_they_hold() {
    use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
    let (protection, page) = (ProtFlags::READ | ProtFlags::WRITE, PAGE_SIZE as usize);
    // SAFETY: a new private mapping at an address that the kernel chooses replaces nothing.
    let at =
        unsafe { mmap_anonymous(std::ptr::null_mut(), page, protection, MapFlags::PRIVATE) }.expect("room");
    // SAFETY: our own mapping of a page.
    unsafe { at.cast::<u8>().write(7) };
    let memory = ContiguousMemory::new(&space(), &[Piece::Anonymous(PAGES * PAGE_SIZE)]).expect("laid out");
    let from = VirtRange::new(VirtAddr(at.expose_provenance() as u64), PAGE_SIZE).expect("a mapping");
    let odd = LayoutError::NotWholePages { offset: 1, len: PAGE_SIZE, page: PAGE_SIZE };
    // SAFETY: refused, so it stays where it is.
    assert_eq!(unsafe { memory.take(1, from) }, Err(odd));
    // SAFETY: our own mapping, and nobody refers to it.
    unsafe { memory.take(2 * PAGE_SIZE, from) }.expect("moved");
    assert_eq!([1, 2, 3].map(|page| byte_at(&memory, page)), [0, 7, 0]);
}

#[test]
fn what_is_no_layout_is_refused_by_name() {
    let space = space();
    let new = |pieces: &[Piece<'_>]| ContiguousMemory::new(&space, pieces).map(|memory| memory.range().len());
    assert_eq!(new(&[]), Err(LayoutError::Empty));
    assert_eq!(new(&[Piece::Anonymous(0)]), Err(LayoutError::Empty));
    let odd = LayoutError::NotWholePages { offset: PAGE_SIZE, len: 1, page: PAGE_SIZE };
    assert_eq!(new(&[Piece::Anonymous(PAGE_SIZE), Piece::Anonymous(1)]), Err(odd));
    let half = LayoutError::NotWholePages { offset: PAGE_SIZE, len: HUGE_PAGE, page: HUGE_PAGE };
    assert_eq!(new(&[Piece::Anonymous(PAGE_SIZE), Piece::Hugetlb(HUGE_PAGE)]), Err(half));
    assert!(half.to_string().contains("0x200000"), "{half}");
    let all = u64::MAX - PAGE_SIZE + 1;
    assert!(matches!(new(&[Piece::Anonymous(all)]), Err(LayoutError::Refused { reason: Errno::NOMEM, .. })));
    let twice = [Piece::Anonymous(all), Piece::Anonymous(PAGE_SIZE)];
    assert!(matches!(new(&twice), Err(LayoutError::Refused { .. })), "a sum passed the top");
    let memory = ContiguousMemory::new(&space, &[Piece::Anonymous(PAGE_SIZE)]).expect("laid out");
    let past = LayoutError::OutOfRange { offset: PAGE_SIZE, len: PAGE_SIZE, size: PAGE_SIZE };
    assert_eq!(memory.replace(PAGE_SIZE, Piece::Anonymous(PAGE_SIZE)), Err(past));
}

#[test]
fn the_limit_of_mappings_is_named_with_what_is_needed_and_how_to_raise_it() {
    let now = Mappings::now();
    assert!(now.used > 1 && now.limit.is_none_or(|limit| now.used <= limit), "{now:?}");
    let full = Mappings { used: 65_529, limit: Some(65_530) };
    assert_eq!(full.allow(1), Ok(()));
    let refused = full.allow(3).expect_err("two too many");
    assert_eq!(refused, LayoutError::TooManyMappings { needed: 3, used: 65_529, limit: 65_530 });
    let said = refused.to_string();
    assert!(said.contains("vm.max_map_count is 65530") && said.contains("at least 65532 (sysctl"), "{said}");
    assert_eq!(Mappings { limit: None, ..full }.allow(u64::MAX), Ok(()));
}
