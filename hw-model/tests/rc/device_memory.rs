//! Device memory and the null key: memory that is the device's own, and memory that is none.

use crate::world::{ALL, Host, Pair, config, pattern};
use hw_model::addr::{PAGE_SIZE, RegionAddr};
use hw_model::hca::{
    AllocDeviceMemoryError, HcaConfig, Key, Limits, OutsideDeviceMemory, RegisterDeviceMemoryError, Remote,
    SendRequest, Sge, Status,
};
use hw_model::link::Fabric;

#[test]
fn device_memory_is_written_and_read_by_peers_within_its_bounds() {
    let mut pair = Pair::new(config());
    let memory = pair.b.hca.alloc_device_memory(3000, 0).expect("room");
    let region = memory.register(pair.b.pd, ALL, 100, 2000).expect("a region");
    let local = pair.a.region(PAGE_SIZE);
    pair.a.fill(&local, 0, &pattern(1, 2000));
    let at = |address| Remote { key: region.key(), address: RegionAddr(address) };
    let sges = [local.sge(0, 2000)];
    assert_eq!(pair.ask(&SendRequest::write(1, &sges, at(0))), Status::Success);
    let mut out = vec![0; 2000];
    memory.copy_from(100, &mut out).expect("in it");
    assert_eq!(out, pattern(1, 2000));
    let mut beside = [1; 100];
    memory.copy_from(0, &mut beside).expect("in it");
    assert_eq!(beside, [0; 100], "zero at first, and beside the region nothing was written");
    memory.copy_to(100, &pattern(2, 2000)).expect("in it");
    assert_eq!(pair.ask(&SendRequest::read(2, &sges, at(0))), Status::Success);
    assert_eq!(pair.a.bytes(&local, 0, 2000), pattern(2, 2000));
    assert_eq!(
        pair.ask(&SendRequest::write(3, &sges, at(1))),
        Status::RemoteAccessError,
        "one byte past its end"
    );
}

#[test]
fn device_memory_serves_as_local_memory() {
    let mut pair = Pair::new(config());
    let remote = pair.b.region(PAGE_SIZE);
    let memory = pair.a.hca.alloc_device_memory(512, 0).expect("room");
    let region = memory.register(pair.a.pd, ALL, 0, 512).expect("a region");
    memory.copy_to(0, &pattern(4, 512)).expect("in it");
    let sges = [Sge { key: region.key(), address: RegionAddr(0), length: 512 }];
    assert_eq!(pair.ask(&SendRequest::write(1, &sges, remote.remote(0))), Status::Success);
    assert_eq!(pair.b.bytes(&remote, 0, 512), pattern(4, 512));
}

#[test]
fn what_is_given_back_is_there_again_and_is_clean() {
    let limits = Limits { device_memory: 1 << 14, ..Limits::default() };
    let host = Host::new(Box::new(Fabric::new().port()), HcaConfig { limits, ..config() }, 16);
    let max = 1 << 14;
    for round in 0..100 {
        let pieces: Vec<_> =
            (0..4).map(|piece| host.hca.alloc_device_memory(max / 4 - piece, 6).expect("room")).collect();
        assert_eq!(host.hca.live_objects().device_memory, max, "in whole granules");
        let full = host.hca.alloc_device_memory(1, 0).expect_err("full");
        assert_eq!(full, AllocDeviceMemoryError::Full { length: 1, free: 0 });
        for piece in &pieces {
            let mut out = vec![1; piece.len() as usize];
            piece.copy_from(0, &mut out).expect("in it");
            assert!(out.iter().all(|byte| *byte == 0), "round {round}: the bytes of who had it before");
            piece.copy_to(0, &vec![7; piece.len() as usize]).expect("in it");
        }
        // In another order than they came.
        let mut pieces = pieces;
        while !pieces.is_empty() {
            drop(pieces.swap_remove(round % pieces.len()));
        }
        assert_eq!(host.hca.live_objects().device_memory, 0);
    }
    drop(host.hca.alloc_device_memory(max, 12).expect("all of it, in one piece"));
    let length = AllocDeviceMemoryError::Length { length: max + 1, max };
    assert_eq!(host.hca.alloc_device_memory(max + 1, 0).expect_err("too much"), length);
    assert_eq!(
        host.hca.alloc_device_memory(0, 0).expect_err("nothing"),
        AllocDeviceMemoryError::Length { length: 0, max }
    );
    assert_eq!(
        host.hca.alloc_device_memory(8, 13).expect_err("far"),
        AllocDeviceMemoryError::Alignment { shift: 13 }
    );
}

#[test]
fn a_region_of_device_memory_holds_it_and_ends_with_its_handle() {
    let mut pair = Pair::new(config());
    let memory = pair.b.hca.alloc_device_memory(64, 0).expect("room");
    let region = memory.register(pair.b.pd, ALL, 0, 64).expect("a region");
    let outside = OutsideDeviceMemory { offset: 60, length: 5, size: 64 };
    let error = RegisterDeviceMemoryError::Outside(outside);
    assert_eq!(memory.register(pair.b.pd, ALL, 60, 5).expect_err("past its end"), error);
    assert_eq!(memory.copy_to(60, &[0; 5]), Err(outside));
    let wraps = OutsideDeviceMemory { offset: u64::MAX, length: 5, size: 64 };
    assert_eq!(memory.copy_from(u64::MAX, &mut [0; 5]), Err(wraps));
    drop(memory);
    assert_eq!(pair.b.hca.live_objects().device_memory, 64, "the region holds it");
    let (key, keys) = (region.key(), pair.b.hca.live_objects().keys);
    drop(region);
    assert_eq!((pair.b.hca.live_objects().device_memory, pair.b.hca.live_objects().keys), (0, keys - 1));
    let local = pair.a.region(PAGE_SIZE);
    let sges = [local.sge(0, 8)];
    let remote = Remote { key, address: RegionAddr(0) };
    assert_eq!(pair.ask(&SendRequest::write(1, &sges, remote)), Status::RemoteAccessError);
}

#[test]
fn a_null_key_reads_as_zeroes_and_forgets_what_is_written() {
    let mut pair = Pair::new(config());
    let remote = pair.b.region(4 * PAGE_SIZE);
    let null = pair.a.hca.create_null_key(pair.a.pd).expect("a key");
    pair.b.fill(&remote, 0, &pattern(1, 4 * PAGE_SIZE));
    let local = pair.a.region(PAGE_SIZE);
    // Between real pieces, at any address, over any length.
    let nothing = |length| Sge { key: null, address: RegionAddr(0x1234_5678), length };
    let sges = [local.sge(0, 100), nothing(2 * PAGE_SIZE as u32 + 1), local.sge(100, 100)];
    assert_eq!(pair.ask(&SendRequest::read(1, &sges, remote.remote(0))), Status::Success);
    let all = pattern(1, 4 * PAGE_SIZE);
    let (skipped, end) = (2 * PAGE_SIZE as usize + 101, 2 * PAGE_SIZE as usize + 201);
    let expected = [&all[..100], &all[skipped..end]].concat();
    assert_eq!(pair.a.bytes(&local, 0, 200), expected, "what is scattered to nowhere is skipped");
    assert_eq!(pair.ask(&SendRequest::write(2, &sges, remote.remote(0))), Status::Success);
    let written = pair.b.bytes(&remote, 0, 4 * PAGE_SIZE);
    assert!(written[100..skipped].iter().all(|byte| *byte == 0), "it reads as zeroes");
    assert_eq!(written[skipped..end], expected[100..]);
}

#[test]
fn a_null_key_is_local_and_of_its_domain() {
    for (remote, other_domain) in [(true, false), (false, true)] {
        let mut pair = Pair::new(config());
        let pd = if other_domain { pair.a.hca.alloc_pd().expect("a domain") } else { pair.a.pd };
        let local_null = pair.a.hca.create_null_key(pd).expect("a key");
        let far_null = pair.b.hca.create_null_key(pair.b.pd).expect("a key");
        let (local, region) = (pair.a.region(64), pair.b.region(64));
        let sges = [if remote {
            local.sge(0, 8)
        } else {
            Sge { key: local_null, address: RegionAddr(0), length: 8 }
        }];
        let to = if remote { Remote { key: far_null, address: RegionAddr(0) } } else { region.remote(0) };
        let status = if remote { Status::RemoteAccessError } else { Status::LocalProtectionError };
        assert_eq!(pair.ask(&SendRequest::write(1, &sges, to)), status);
        pair.a.hca.destroy_null_key(local_null).expect("there");
        assert!(pair.a.hca.destroy_null_key(local_null).is_err());
        assert!(pair.a.hca.destroy_null_key(Key(region.key.0)).is_err(), "another sort of key");
    }
}

/// A counter in device memory that peers add to, that the host reads, and that a window can give away.
#[test]
fn atomics_on_device_memory_add_up() {
    let mut pair = Pair::new(config());
    let memory = pair.b.hca.alloc_device_memory(64, 0).expect("room");
    let region = memory.register(pair.b.pd, ALL, 0, 64).expect("a region");
    let local = pair.a.region(PAGE_SIZE);
    let at = |address| Remote { key: region.key(), address: RegionAddr(address) };
    let sges = [local.sge(0, 8)];
    for turn in 0..10_u64 {
        assert_eq!(pair.ask(&SendRequest::fetch_add(turn, &sges, at(8), 5)), Status::Success);
        assert_eq!(pair.a.bytes(&local, 0, 8), (turn * 5).to_le_bytes(), "what it was before");
    }
    assert_eq!(pair.ask(&SendRequest::compare_swap(10, &sges, at(8), 50, 7)), Status::Success);
    let mut word = [0; 8];
    memory.copy_from(8, &mut word).expect("in it");
    assert_eq!(u64::from_le_bytes(word), 7);
    // The answer may go nowhere.
    let null = pair.a.hca.create_null_key(pair.a.pd).expect("a key");
    let nowhere = [Sge { key: null, address: RegionAddr(0), length: 8 }];
    assert_eq!(pair.ask(&SendRequest::fetch_add(11, &nowhere, at(8), 1)), Status::Success);
    memory.copy_from(8, &mut word).expect("in it");
    assert_eq!(u64::from_le_bytes(word), 8);
    assert_eq!(
        pair.ask(&SendRequest::fetch_add(12, &sges, at(64), 1)),
        Status::RemoteAccessError,
        "past its end"
    );
}
