//! Implicit keys: what is in a slot is reached, what is in none is a page fault of the implicit key.

use crate::world::{ALL, Pair, config, pattern};
use hw_model::addr::RegionAddr;
use hw_model::hca::{
    Access, CreateKeyError, FaultOutcome, ImplicitKeySpec, ImplicitTable, Remote, SLOT_BYTES, SendRequest,
    Status,
};
use hw_model::sync::Arc;

const GIB: u64 = SLOT_BYTES;

#[test]
fn a_slot_that_is_unused_is_a_fault_of_the_implicit_key_and_one_that_is_used_leads_to_its_region() {
    let mut pair = Pair::new(config());
    let table = Arc::new(ImplicitTable::new(4));
    let spec = ImplicitKeySpec {
        pd: pair.b.pd,
        access: ALL,
        address: RegionAddr(GIB),
        length: 4 * GIB,
        table: Arc::clone(&table),
    };
    let key = pair.b.hca.create_implicit_key(spec).expect("a key");
    // The last pages of one slot and the first of the next.
    let low = pair.b.region_at(3 * GIB - 8192, 0, 8192, Access::LOCAL_WRITE, pair.b.pd);
    let high = pair.b.region_at(3 * GIB, 0, 8192, Access::LOCAL_WRITE, pair.b.pd);
    table.store(1, Some(low.key));
    let local = pair.a.region(16_384);
    pair.a.fill(&local, 0, &pattern(3, 10_000));
    let sges = [local.sge(0, 10_000)];
    let remote = Remote { key, address: RegionAddr(3 * GIB - 5000) };
    pair.qa.post_send(&SendRequest::write(1, &sges, remote)).expect("posted");
    let mut asked = Vec::new();
    pair.run(|_, fault| {
        asked.push((fault.key, fault.address.0));
        table.store(2, Some(high.key));
        FaultOutcome::Resolved
    });
    assert_eq!(asked, [(key, 3 * GIB)], "one fault, of the key that the peer knows, where the slot begins");
    assert_eq!(pair.a.take().iter().map(|done| done.status).collect::<Vec<_>>(), [Status::Success]);
    let got = [pair.b.bytes(&low, 8192 - 5000, 5000), pair.b.bytes(&high, 0, 5000)].concat();
    assert!(got == pattern(3, 10_000), "bytes on both sides of the slots' boundary");

    // A slot whose key is gone is as good as unused.
    pair.b.hca.destroy_key(low.key).expect("a key");
    let sges = [local.sge(0, 8)];
    pair.qa.post_send(&SendRequest::read(2, &sges, remote)).expect("posted");
    let mut asked = Vec::new();
    pair.run(|_, fault| {
        asked.push(fault.key);
        FaultOutcome::Failed
    });
    assert_eq!(asked, [key]);
    assert_eq!(pair.a.take().iter().map(|done| done.status).collect::<Vec<_>>(), [Status::RemoteAccessError]);
    pair.b.hca.destroy_implicit_key(key).expect("a key");
}

#[test]
fn an_implicit_key_is_checked_as_any_other() {
    let pair = Pair::new(config());
    let spec = |slots, address, length, access| ImplicitKeySpec {
        pd: pair.b.pd,
        access,
        address: RegionAddr(address),
        length,
        table: Arc::new(ImplicitTable::new(slots)),
    };
    let short = pair.b.hca.create_implicit_key(spec(1, GIB - 1, 2, ALL));
    assert_eq!(short, Err(CreateKeyError::ListTooShort { entries: 1, needed: 2 }));
    let needs = pair.b.hca.create_implicit_key(spec(1, 0, 1, Access::REMOTE_WRITE));
    assert!(matches!(needs, Err(CreateKeyError::NeedsLocalWrite { .. })), "{needs:?}");
    let (read, write) = (Access::REMOTE_READ, Access::empty());
    // No right to write, before it, past it.
    for (is_read, at, access) in
        [(false, GIB, read), (true, GIB - 1, read), (true, 2 * GIB - 8, read), (true, GIB, write)]
    {
        let mut pair = Pair::new(config());
        let spec = ImplicitKeySpec {
            pd: pair.b.pd,
            access,
            address: RegionAddr(GIB),
            length: GIB,
            table: Arc::new(ImplicitTable::new(1)),
        };
        let key = pair.b.hca.create_implicit_key(spec).expect("a key");
        let local = pair.a.region(4096);
        let (sges, remote) = ([local.sge(0, 16)], Remote { key, address: RegionAddr(at) });
        let request = match is_read {
            true => SendRequest::read(1, &sges, remote),
            false => SendRequest::write(1, &sges, remote),
        };
        assert_eq!(pair.ask(&request), Status::RemoteAccessError, "{is_read} at {at:#x}");
    }
}
