//! Buffers that are taken back while devices use them.

use super::*;
use crate::checks::ended_once;
use anypage::machine::End;
use hw_model::hca::OperationCode;
use odp::space::Withdrawn;
use odp::space::dmabuf::BarExport;

const PAGES: u64 = 16;

/// A buffer that its exporter may take back.
fn revocable(config: &MachineConfig, place: PagePlace) -> Stand {
    Stand::new(PAGES, config, MigratingOptions { place, revokes: true, ..MigratingOptions::default() })
}

#[test]
fn a_revoked_region_keeps_its_key_and_refuses_every_access() {
    let kinds = [
        (ImportMode::Dynamic, RegisterOptions::on_demand()),
        (ImportMode::PinnedRevocable, RegisterOptions::pinned()),
    ];
    for (mode, options) in kinds {
        for (iommu, place) in [(true, PagePlace::Peer), (true, PagePlace::System), (false, PagePlace::Peer)] {
            let config = MachineConfig { iommu, ..MachineConfig::default() };
            let mut stand = revocable(&config, place);
            let before = Held::of(stand.buffer());
            let memory = stand.import(mode);
            let mut bed = stand.bed(&memory, options);
            let len = page_bytes(PAGES) as u32;
            bed.mirror.write_at(0, &pattern(1, u64::from(len))).expect("our own memory");
            assert_eq!(bed.write(0, len), Status::Success);
            let near = Arc::clone(&bed.machine.near);
            let (objects, iova) = (near.hca().live_objects(), near.dma().iova_stats().live_ranges);

            stand.buffer().revoke().expect("nobody has pinned it for good");
            // The exporter uses its memory for something else, and nobody changes a byte of it.
            let theirs = pattern(2, u64::from(len));
            stand.gpu.write_at(0, &theirs).expect("its own memory");
            let region = Arc::clone(&bed.near.region);
            assert_eq!(
                (region.report().present, region.report().linked),
                (0, 0),
                "unmapped when revoke returns"
            );
            for round in 0..3 {
                assert_eq!(bed.write(page_bytes(round), 100), Status::RemoteAccessError, "round {round}");
                bed.reconnect();
                assert_eq!(bed.read(5000 * round, 5000), Status::RemoteAccessError, "round {round}");
                bed.reconnect();
                let local = bed.near_does(OperationCode::Write, 0, 100);
                assert_eq!(local, Status::LocalProtectionError, "its own device is refused too");
                bed.reconnect();
            }
            let advice = region.advise(0, 4096, odp::fault::Want::Snapshot).unwrap_err();
            assert!(advice.to_string().contains("cannot be had"), "{advice}");
            let why = Withdrawn::Revoked;
            assert_eq!((stand.buffer().is_there(), stand.buffer().stats().withdrawn), (Err(why), Some(why)));
            let mut seen = vec![0; len as usize];
            stand.gpu.read_at(0, &mut seen).expect("its own memory");
            assert!(seen == theirs, "a byte landed in memory that was taken back");

            // The key stays taken, as does its IOVA, until it is given back.
            let now = near.hca().live_objects();
            assert_eq!((now.keys, near.dma().iova_stats().live_ranges), (objects.keys, iova));
            region.deregister();
            let now = near.hca().live_objects();
            assert_eq!(now.keys + 1, objects.keys);
            assert_eq!(near.dma().iova_stats().live_ranges, iova - u64::from(iommu));
            assert_eq!(bed.write(0, 100), Status::RemoteAccessError, "a key that is gone is refused as ever");
            protocol_kept(&bed.machine, &bed.space).expect("nothing was used that should not have been");
            drop((bed, memory, region));
            assert!(until(|| Held::of(stand.buffer()) == before), "{:?}", Held::of(stand.buffer()));
        }
    }
}

#[test]
fn a_buffer_is_revoked_under_traffic_and_every_request_ends_once() {
    for (round, iommu) in [true, false, true, false].into_iter().enumerate() {
        let config = MachineConfig { iommu, ..MachineConfig::default() };
        let mut stand = revocable(&config, PagePlace::Peer);
        let memory = stand.import(if round < 2 { ImportMode::Dynamic } else { ImportMode::PinnedRevocable });
        let mut bed = stand.bed(&memory, RegisterOptions::on_demand());
        let counts = Counts::of(&bed.machine, &bed.space);
        let second = import(stand.buffer(), ImportMode::Dynamic);
        let other =
            End::new(&bed.machine.far, &second, RegisterOptions::on_demand()).expect("a second region");
        let mut posted = Vec::new();
        let mut ended = Vec::new();
        let post = |bed: &Bed, posted: &mut Vec<u64>, count: u64| {
            for _ in 0..count {
                let id = posted.len() as u64;
                bed.post_write(id, 0, page_bytes(PAGES) as u32);
                posted.push(id);
            }
        };
        post(&bed, &mut posted, 40);
        // Some have ended, some are under way, some not begun.
        ended.extend(bed.far_ends(5 + round));
        let mut withdrawal = stand.buffer().begin_revoke().expect("who pinned is revocable");
        assert!(until(|| withdrawal.poll()), "bounded: bursts are");
        let theirs = pattern(3, page_bytes(PAGES));
        stand.gpu.write_at(0, &theirs).expect("its own memory");
        ended.extend(bed.far_ends(40 - ended.len()));
        let ids: Vec<u64> = ended.iter().map(|completion| completion.id.0).collect();
        ended_once(&posted, &ids).expect("every request ends once");
        let good = ended.iter().take_while(|completion| completion.status == Status::Success).count();
        let statuses: Vec<Status> = ended.iter().skip(good).map(|completion| completion.status).collect();
        assert!(good >= 5 + round, "what had ended before had ended well");
        assert!(
            statuses.first().is_none_or(|first| *first == Status::RemoteAccessError)
                && statuses.iter().skip(1).all(|status| *status == Status::FlushError),
            "refused once, and what was behind it flushed: {statuses:?}"
        );
        let mut seen = vec![0; theirs.len()];
        stand.gpu.read_at(0, &mut seen).expect("its own memory");
        assert!(seen == theirs, "a request under way wrote to memory that was taken back");
        bed.reconnect();
        assert_eq!(bed.write(0, 1), Status::RemoteAccessError);
        drop((other, second));
        bed.reconnect();
        calm(&bed.machine, &bed.space, &counts).expect("the second region has left nothing");
        drop(bed);
    }
}

#[test]
fn memory_of_a_revoked_buffer_is_exported_anew_and_the_old_key_does_not_reach_it() {
    let mut stand = revocable(&MachineConfig::default(), PagePlace::Peer);
    let memory = stand.import(ImportMode::PinnedRevocable);
    let mut bed = stand.bed(&memory, RegisterOptions::pinned());
    assert_eq!(bed.write(0, 4096), Status::Success);
    stand.buffer().revoke().expect("who pinned is revocable");
    let bar = Arc::clone(bed.machine.bar.as_ref().expect("the GPU has one"));
    let part = BarPart::new(&bar, 0, page_bytes(PAGES)).expect("in the BAR");
    let anew = BarExport::export(part, bed.space.memory(), Points::OFF);
    let memory = import(&anew, ImportMode::PinnedRevocable);
    let region = Arc::clone(&bed.near.pd).register(&memory, RegisterOptions::pinned()).expect("a new region");
    assert_ne!(region.key(), bed.near.region.key(), "the old key is not given out again");
    bed.mirror.write_at(0, &[0xaa; 100]).expect("our own memory");
    assert_eq!(bed.write(0, 100), Status::RemoteAccessError);
    bed.reconnect();
    let remote = hw_model::hca::Remote { key: region.key(), address: region.address() };
    let mut seen = [0; 100];
    bar.storage().read(0, &mut seen).expect("in the BAR");
    assert_ne!(seen, [0xaa; 100], "the old key wrote to a page of the new buffer");
    assert_eq!(bed.far_does(OperationCode::Write, 0, 100, remote), Status::Success);
    bar.storage().read(0, &mut seen).expect("in the BAR");
    assert_eq!(seen, [0xaa; 100], "the new one does");
}

#[test]
fn a_device_that_goes_away_takes_its_pages_from_regions_that_pinned_them() {
    let mut stand = Stand::new(PAGES, &MachineConfig::default(), MigratingOptions::default());
    let memory = stand.import(ImportMode::Pinned);
    let mut bed = stand.bed(&memory, RegisterOptions::pinned());
    assert_eq!(bed.write(0, 4096), Status::Success);
    assert!(stand.buffer().revoke().is_err(), "whoever pinned it did not agree to that");
    let mut withdrawal = stand.buffer().begin_remove();
    assert!(until(|| withdrawal.poll()));
    assert_eq!(bed.write(0, 4096), Status::RemoteAccessError);
    bed.reconnect();
    let refused = Arc::clone(&bed.near.pd).register(&memory, RegisterOptions::on_demand());
    let error = refused.err().expect("nothing is there to register").to_string();
    assert!(error.contains("the exporter is gone"), "{error}");
}

#[test]
fn a_read_only_buffer_is_read_and_never_written() {
    let mut stand = Stand::new(
        PAGES,
        &MachineConfig::default(),
        MigratingOptions { writable: false, ..MigratingOptions::default() },
    );
    let bytes = pattern(4, page_bytes(PAGES));
    stand.gpu.write_at(0, &bytes).expect("the exporter may");
    let memory = stand.import(ImportMode::Dynamic);
    let mut bed = stand.bed(&memory, RegisterOptions::on_demand());
    assert_eq!(bed.read(0, bytes.len() as u32), Status::Success);
    assert!(bed.far_bytes(0, bytes.len()) == bytes);
    assert_eq!(bed.write(0, 10), Status::RemoteAccessError);
    bed.reconnect();
    stand.gpu.migrate(0..3, PagePlace::Peer).expect("nobody pins it");
    assert_eq!(bed.read(0, bytes.len() as u32), Status::Success);
    assert!(bed.far_bytes(0, bytes.len()) == bytes);
    let pinned = Arc::clone(&bed.near.pd).register(&memory, RegisterOptions::pinned());
    let error = format!("{:?}", pinned.err().expect("all pages would have to be writable"));
    assert!(error.contains("Permission"), "{error}");
}
