//! What a careless or hostile user can ask for: each a typed error or the completion status of the specification, and
//! nothing left behind.

use crate::bed::{Bed, hears_of_drops, space};
use crate::checks::{Counts, protocol_kept, until};
use crate::remapped::Remapped;
use anypage::machine::MachineConfig;
use hw_model::addr::{PAGE_SIZE, RegionAddr, VirtAddr, VirtRange, page_bytes};
use hw_model::hca::{
    Access, CreateCqError, CreateKeyError, CreateQpError, OperationCode, PostError, Remote, SendRequest, Sge,
    Status,
};
use hw_model::sync::Arc;
use mr::device::{AdviseError, QpError, RegisterError};
use mr::{Device, MapRegionError, Mode, RegisterOptions};
use odp::fault::{FaultFailure, Want};
use odp::space::{Access as PageAccess, AddressSpace, FaultError, UserRange, WatchError};

const PAGES: u64 = 8;

struct Scene {
    bed: Bed,
    memory: Arc<Remapped>,
    range: UserRange,
    before: Counts,
}

impl Scene {
    fn new(options: RegisterOptions) -> Self {
        Self::over(Remapped::new(PAGES), 0, page_bytes(PAGES), options)
    }

    fn over(memory: Arc<Remapped>, offset: u64, len: u64, options: RegisterOptions) -> Self {
        let space = space();
        let range = memory.user_range(Arc::clone(&space) as _).part(offset, len).expect("in it");
        let bed = Bed::new(&space, &range, options, &MachineConfig::default());
        let before = Counts::of(&bed.machine, &space);
        Self { bed, memory, range, before }
    }

    /// Registration of `range` fails with this, and leaves nothing.
    fn refuses(&self, range: &UserRange, options: RegisterOptions) -> RegisterError {
        let refused = Arc::clone(&self.bed.near.pd).register(range, options).err().expect("refused");
        self.nothing_leaked();
        refused
    }

    fn nothing_leaked(&self) {
        self.before.are_back(&self.bed.machine, &self.bed.space).expect("as before");
        protocol_kept(&self.bed.machine, &self.bed.space).expect("refused at the door");
    }

    fn remote(&self, offset: u64) -> Remote {
        Remote { key: self.bed.near.region.key(), address: self.bed.near.region.address().offset(offset) }
    }
}

#[test]
fn a_region_of_no_bytes_is_refused() {
    let scene = Scene::new(RegisterOptions::on_demand());
    let nothing = scene.range.part(100, 0).expect("an empty part");
    for options in [RegisterOptions::on_demand(), RegisterOptions::pinned()] {
        assert_eq!(scene.refuses(&nothing, options), RegisterError::Map(MapRegionError::Empty));
    }
}

#[test]
fn a_range_that_is_not_mapped_is_refused_by_its_first_missing_address() {
    let scene = Scene::new(RegisterOptions::on_demand());
    let low =
        crate::remapped::low_address(&(Arc::clone(&scene.bed.space) as Arc<dyn AddressSpace>), PAGE_SIZE);
    for options in [RegisterOptions::on_demand(), RegisterOptions::pinned()] {
        let error = scene.refuses(&low, options);
        let RegisterError::Map(MapRegionError::Watch(WatchError::NotMapped { range, at })) = &error else {
            panic!("{error}");
        };
        assert_eq!((*range, *at), (low.range(), low.range().start()));
        assert!(error.to_string().contains(&low.range().start().to_string()), "{error}");
    }
}

#[test]
fn absurd_sizes_are_refused_and_allocate_nothing() {
    assert!(VirtRange::new(VirtAddr(4096), u64::MAX).is_none(), "past the top cannot even be said");
    let scene = Scene::new(RegisterOptions::on_demand());
    let space = Arc::clone(&scene.bed.space) as Arc<dyn AddressSpace>;
    let limit = scene.bed.machine.near.attributes().max_region;
    for len in [u64::MAX, u64::MAX - PAGE_SIZE, 1 << 63, limit + 1] {
        let absurd = crate::remapped::low_address(&space, len);
        for options in [RegisterOptions::on_demand(), RegisterOptions::pinned()] {
            let error = scene.refuses(&absurd, options);
            assert_eq!(error, RegisterError::Map(MapRegionError::TooLong { len, limit }));
        }
    }
    // Not too long, but beyond what is mapped, or beyond user memory altogether.
    for len in [limit, 1 << 40] {
        let error = scene.refuses(&crate::remapped::low_address(&space, len), RegisterOptions::on_demand());
        assert!(matches!(error, RegisterError::Map(MapRegionError::Watch(_))), "{error}");
    }
    let top = VirtRange::new(VirtAddr(u64::MAX - PAGE_SIZE + 1), PAGE_SIZE).expect("the last page");
    let error = scene.refuses(&crate::remapped::anywhere(&space, top), RegisterOptions::on_demand());
    assert!(
        matches!(error, RegisterError::Map(MapRegionError::Watch(WatchError::BadRange { .. }))),
        "{error}"
    );
}

#[test]
fn an_address_with_which_the_region_would_pass_the_top_is_refused() {
    let scene = Scene::new(RegisterOptions::on_demand());
    let address = RegionAddr(u64::MAX - 10);
    let options = RegisterOptions { address: Some(address), ..RegisterOptions::on_demand() };
    let length = page_bytes(PAGES);
    assert_eq!(
        scene.refuses(&scene.range, options),
        RegisterError::Key(CreateKeyError::PastTop { address, length })
    );
}

#[test]
fn remote_writing_without_local_writing_is_refused() {
    let scene = Scene::new(RegisterOptions::on_demand());
    for access in [Access::REMOTE_WRITE, Access::REMOTE_ATOMIC, Access::REMOTE_WRITE | Access::REMOTE_READ] {
        let options = RegisterOptions::on_demand().with_access(access);
        let error = scene.refuses(&scene.range, options);
        assert_eq!(error, RegisterError::Key(CreateKeyError::NeedsLocalWrite { access }));
    }
}

#[test]
fn pinning_memory_that_cannot_be_written_for_writing_names_the_page() {
    let scene = Scene::new(RegisterOptions::on_demand());
    scene.memory.protect(5, 1, false);
    let at = scene.range.range().start().offset(page_bytes(5));
    let error = scene.refuses(&scene.range, RegisterOptions::pinned());
    let permission = FaultError::Permission { at, access: PageAccess::Write };
    assert_eq!(error, RegisterError::Map(MapRegionError::Pages(FaultFailure::Space(permission))));
    let read_only = RegisterOptions::pinned().with_access(Access::REMOTE_READ);
    let region =
        Arc::clone(&scene.bed.near.pd).register(&scene.range, read_only).expect("reading is allowed");
    drop(region);
    scene.nothing_leaked();
}

#[test]
fn a_region_without_the_right_refuses_the_peer() {
    let options = RegisterOptions::on_demand();
    let cases = [
        (Access::LOCAL_WRITE | Access::REMOTE_READ, OperationCode::Write),
        (Access::LOCAL_WRITE | Access::REMOTE_WRITE, OperationCode::Read),
        (Access::empty(), OperationCode::Write),
    ];
    for (access, what) in cases {
        let mut scene = Scene::new(options.with_access(access));
        assert_eq!(
            scene.bed.far_does(what, 0, 8, scene.remote(0)),
            Status::RemoteAccessError,
            "{access:?} {what:?}"
        );
        assert_eq!(scene.bed.near.region.report().present, 0, "no page was even brought in");
        scene.bed.reconnect();
        // And the owner himself: reading always, writing only with the right.
        assert_eq!(scene.bed.near_does(OperationCode::Write, 0, 8), Status::Success, "{access:?}");
        let expected =
            if access.contains(Access::LOCAL_WRITE) { Status::Success } else { Status::LocalProtectionError };
        assert_eq!(scene.bed.near_does(OperationCode::Read, 0, 8), expected, "{access:?}");
    }
}

#[test]
fn a_page_that_may_not_be_written_fails_the_write_and_stays() {
    let mut scene = Scene::new(RegisterOptions::on_demand());
    scene.bed.mirror.write_at(0, &[7; 4096]).expect("our own memory");
    assert_eq!(scene.bed.write(0, 4096), Status::Success);
    scene.memory.protect(1, 1, false);
    assert_eq!(scene.bed.write(page_bytes(1), 8), Status::RemoteAccessError, "the mapping does not allow it");
    scene.bed.reconnect();
    assert_eq!(scene.bed.read(page_bytes(1), 8), Status::Success, "reading is allowed");
    assert_eq!(scene.bed.write(0, 8), Status::Success, "and the rest is as it was");
    scene.memory.protect(1, 1, true);
    assert_eq!(scene.bed.write(page_bytes(1), 8), Status::Success, "allowed again");
}

#[test]
fn memory_that_was_taken_away_fails_the_access_until_it_is_back() {
    if !hears_of_drops("memory_that_was_taken_away_fails_the_access_until_it_is_back") {
        return;
    }
    for options in [RegisterOptions::on_demand(), RegisterOptions::pinned()] {
        let mut scene = Scene::new(options);
        assert_eq!(scene.bed.write(0, page_bytes(PAGES) as u32), Status::Success);
        scene.memory.replace(3, 2, false);
        let hidden = || scene.bed.near.region.report().present <= PAGES - 2;
        assert!(until(hidden), "what is not mapped is not shown");
        for what in [OperationCode::Write, OperationCode::Read] {
            let status = scene.bed.far_does(what, 0, 8, scene.remote(page_bytes(3)));
            assert_eq!(status, Status::RemoteAccessError, "{what:?}");
            scene.bed.reconnect();
        }
        scene.memory.replace(3, 2, true);
        assert_eq!(
            scene.bed.write(0, page_bytes(PAGES) as u32),
            Status::Success,
            "new pages in the same place"
        );
        assert_eq!(scene.bed.space.stats().retired_uses, 0);
    }
}

/// Bytes of the near region as its owner sees them.
fn near_bytes(scene: &Scene, offset: u64, length: u32) -> Vec<u8> {
    assert_eq!(scene.bed.near_does(OperationCode::Write, offset, length), Status::Success);
    scene.bed.far_bytes(offset, length as usize)
}

#[test]
fn one_byte_past_the_end_and_not_one_byte_lands() {
    // Ends inside a page, so that only the length can say no.
    let len = page_bytes(PAGES) - 1000;
    for options in [RegisterOptions::on_demand(), RegisterOptions::pinned()] {
        let mut scene = Scene::over(Remapped::new(PAGES), 0, len, options);
        scene.bed.mirror.write_at(0, &vec![1; len as usize]).expect("our own memory");
        assert_eq!(scene.bed.write(0, len as u32), Status::Success, "up to the end");
        scene.bed.mirror.write_at(0, &vec![2; page_bytes(PAGES) as usize]).expect("our own memory");
        let local = [Sge {
            key: scene.bed.far.region.key(),
            address: scene.bed.far.region.address(),
            length: len as u32,
        }];
        // The whole and one byte more; the last bytes and one more; nothing but the byte after the end.
        for (from, length) in [(1, len), (len - 5, 6), (len, 1)] {
            let local = [Sge { length: length as u32, ..local[0] }];
            let completion =
                crate::bed::post(&scene.bed.far, OperationCode::Write, &local, scene.remote(from));
            assert_eq!(completion.status, Status::RemoteAccessError, "{length} bytes at {from}");
            scene.bed.reconnect();
            let completion =
                crate::bed::post(&scene.bed.far, OperationCode::Read, &local, scene.remote(from));
            assert_eq!(completion.status, Status::RemoteAccessError, "reading {length} bytes at {from}");
            scene.bed.reconnect();
        }
        assert!(near_bytes(&scene, 0, len as u32).iter().all(|byte| *byte == 1), "an earlier byte landed");
        // One byte before the beginning.
        assert_eq!(
            scene.bed.far_does(OperationCode::Write, 0, 2, scene.remote(u64::MAX)),
            Status::RemoteAccessError
        );
        scene.bed.reconnect();
        // And locally: the near end's own list runs past its region.
        let past =
            [Sge { key: scene.bed.near.region.key(), address: scene.remote(1).address, length: len as u32 }];
        let remote = Remote { key: scene.bed.far.region.key(), address: scene.bed.far.region.address() };
        let completion = crate::bed::post(&scene.bed.near, OperationCode::Write, &past, remote);
        assert_eq!(completion.status, Status::LocalProtectionError);
    }
}

#[test]
fn a_region_that_starts_inside_a_page_covers_its_own_bytes_only() {
    for options in [RegisterOptions::on_demand(), RegisterOptions::pinned()] {
        let (offset, len) = (PAGE_SIZE + 123, 2 * PAGE_SIZE + 5);
        let mut scene = Scene::over(Remapped::new(PAGES), offset, len, options);
        let pattern: Vec<u8> = (0..len).map(|i| (i % 251) as u8 + 1).collect();
        scene.bed.mirror.write_at(0, &pattern).expect("our own memory");
        assert_eq!(scene.bed.write(0, len as u32), Status::Success);
        assert_eq!(scene.bed.near.region.report().entries, 3, "three pages are touched");
        // The neighbours in the first and the last page, seen through a region over all of it.
        let whole = scene.memory.user_range(Arc::clone(&scene.bed.space) as _);
        let whole =
            Arc::clone(&scene.bed.near.pd).register(&whole, RegisterOptions::on_demand()).expect("a region");
        let remote = Remote { key: whole.key(), address: whole.address() };
        let far = scene.bed.far.region.address();
        // The far region is as short as the near one: piece by piece.
        let mut seen = Vec::new();
        while (seen.len() as u64) < page_bytes(PAGES) {
            let length = (page_bytes(PAGES) - seen.len() as u64).min(PAGE_SIZE) as u32;
            let local = [Sge { key: scene.bed.far.region.key(), address: far, length }];
            let from = Remote { address: remote.address.offset(seen.len() as u64), ..remote };
            let completion = crate::bed::post(&scene.bed.far, OperationCode::Read, &local, from);
            assert_eq!(completion.status, Status::Success);
            seen.extend(scene.bed.far_bytes(0, length as usize));
        }
        let mut expected = vec![0; page_bytes(PAGES) as usize];
        expected[offset as usize..(offset + len) as usize].copy_from_slice(&pattern);
        assert!(seen == expected, "bytes landed beside the region, or not in it");
        assert_eq!(
            scene.bed.far_does(OperationCode::Write, 0, 1, scene.remote(u64::MAX)),
            Status::RemoteAccessError
        );
        scene.bed.reconnect();
    }
}

#[test]
fn a_region_goes_by_the_address_that_it_was_given() {
    for address in [0, 0x1234_5678_9abc, u64::MAX - page_bytes(PAGES) + 1] {
        for mode in [Mode::OnDemand, Mode::Pinned] {
            let address = RegionAddr(address);
            let options = RegisterOptions { address: Some(address), mode, ..RegisterOptions::on_demand() };
            let mut scene = Scene::over(Remapped::new(PAGES), 77, page_bytes(PAGES) - 77, options);
            assert_eq!(scene.bed.near.region.address(), address);
            let len = scene.bed.near.region.len();
            let pattern: Vec<u8> = (0..len).map(|i| (i % 241) as u8 + 1).collect();
            scene.bed.mirror.write_at(0, &pattern).expect("our own memory");
            assert_eq!(scene.bed.write(0, len as u32), Status::Success, "at {address}");
            scene.bed.mirror.write_at(0, &vec![0; len as usize]).expect("our own memory");
            assert!(near_bytes(&scene, 0, len as u32) == pattern, "at {address}");
            // Its virtual address means nothing to it.
            let virt = Remote { address: RegionAddr(scene.range.range().start().0), ..scene.remote(0) };
            assert_eq!(scene.bed.far_does(OperationCode::Write, 0, 8, virt), Status::RemoteAccessError);
            scene.bed.reconnect();
        }
    }
}

#[test]
fn advice_outside_the_region_or_its_rights_or_its_life_is_refused() {
    let scene = Scene::new(RegisterOptions::on_demand().with_access(Access::REMOTE_READ));
    let region = &scene.bed.near.region;
    let whole = page_bytes(PAGES);
    for (offset, len) in [(0, whole + 1), (whole, 1), (u64::MAX, 1), (1, u64::MAX)] {
        let refused = region.advise(offset, len, Want::Snapshot);
        assert_eq!(refused, Err(AdviseError::OutOfRange { offset, len, region: whole }));
    }
    assert_eq!(region.advise(0, 8, Want::Fault(PageAccess::Write)), Err(AdviseError::NotWritable));
    assert_eq!(region.advise(5, 0, Want::Fault(PageAccess::Read)), Ok(()), "nothing is nothing");
    scene.nothing_leaked();
    region.deregister();
    region.deregister();
    assert_eq!(region.advise(0, 8, Want::Snapshot), Err(AdviseError::Deregistered));
}

#[test]
fn queues_of_impossible_sizes_and_of_other_devices_are_refused() {
    let scene = Scene::new(RegisterOptions::on_demand());
    let near = &scene.bed.machine.near;
    for entries in [0, u32::MAX] {
        let refused = Arc::clone(near).create_cq(entries).err();
        assert!(matches!(refused, Some(CreateCqError::Size { .. })), "{refused:?}");
    }
    let pd = &scene.bed.near.pd;
    for requests in [0, u32::MAX] {
        let refused = Arc::clone(pd).create_qp(Arc::clone(&scene.bed.near.cq), requests).err();
        assert!(matches!(refused, Some(QpError::Create(CreateQpError::SendRequests { .. }))), "{refused:?}");
    }
    let refused = Arc::clone(pd).create_qp(Arc::clone(&scene.bed.far.cq), 16).err();
    assert_eq!(refused, Some(QpError::Create(CreateQpError::OtherDevice)));
    scene.nothing_leaked();
    // Posting before connecting, and connecting twice.
    let qp = Arc::clone(pd).create_qp(Arc::clone(&scene.bed.near.cq), 16).expect("a queue pair");
    let refused = qp.post_send(&SendRequest::write(1, &[], scene.remote(0)));
    assert!(matches!(refused, Err(PostError::State { .. })), "{refused:?}");
    qp.connect(scene.bed.far.qp.endpoint()).expect("fresh");
    qp.connect(scene.bed.far.qp.endpoint()).expect_err("connected already");
    drop(qp);
    scene.nothing_leaked();
}

#[test]
fn a_second_registration_of_the_same_pages_is_its_own() {
    let scene = Scene::new(RegisterOptions::on_demand());
    let again = Arc::clone(&scene.bed.near.pd)
        .register(&scene.range, RegisterOptions::on_demand())
        .expect("a region");
    assert_ne!(again.key(), scene.bed.near.region.key());
    drop(again);
    scene.nothing_leaked();
    assert_eq!(scene.bed.write(0, page_bytes(PAGES) as u32), Status::Success, "the first lives on");
}
