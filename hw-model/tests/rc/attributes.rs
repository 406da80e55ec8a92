//! What a device says of itself is what its configuration says and what its verbs do.

use crate::world::{ALL, Host, config};
use hw_model::hca::{
    AddressVector, Capabilities, CreateAhError, CreateCqError, CreateKeyError, CreateQpError, FastKeySpec,
    Gid, HcaConfig, KeySpec, Limits, OnDemandOperations, PKeyTable, PORT, PageList, PdError, QpSpec,
    TableError, WindowKind, WindowSpec,
};
use hw_model::link::Fabric;
use hw_model::sync::Arc;
use hw_model::wire::PKey;

fn host(config: HcaConfig) -> Host {
    Host::new(Box::new(Fabric::new().port()), config, 64)
}

/// Objects are made until one is refused: their number is the one that was reported.
#[test]
fn the_limits_that_are_reported_are_those_that_are_kept() {
    let limits = Limits { pds: 3, keys: 5, cqs: 4, qps: 2, ahs: 3, cq_entries: 4096, ..Limits::default() };
    let host = host(HcaConfig { limits, ..config() });
    let said = host.hca.attributes().limits;
    assert_eq!(said, limits);
    // The host has a domain and a queue already.
    let pds: Vec<_> = (1..said.pds).map(|_| host.hca.alloc_pd().expect("room")).collect();
    assert_eq!(host.hca.alloc_pd(), Err(PdError::TooMany { max: said.pds }));
    pds.into_iter().for_each(|pd| host.hca.dealloc_pd(pd).expect("empty"));
    let cqs: Vec<_> = (1..said.cqs).map(|_| host.hca.create_cq(1).expect("room")).collect();
    assert_eq!(host.hca.create_cq(1).expect_err("full"), CreateCqError::TooMany { max: said.cqs });
    drop(cqs);
    let size = CreateCqError::Size { entries: 4097, max: 4096 };
    assert_eq!(host.hca.create_cq(4097).expect_err("large"), size);
    let qps: Vec<_> = (0..said.qps).map(|_| host.qp()).collect();
    let spec = QpSpec::new(host.pd, &host.cq);
    assert_eq!(host.hca.create_qp(&spec).expect_err("full"), CreateQpError::TooMany { max: said.qps });
    drop(qps);
    let to = AddressVector::to(Gid(1));
    let ahs: Vec<_> = (0..said.ahs).map(|_| host.hca.create_ah(host.pd, to).expect("room")).collect();
    assert_eq!(host.hca.create_ah(host.pd, to).expect_err("full"), CreateAhError::TooMany { max: said.ahs });
    drop(ahs);
    // Keys of every sort count together.
    let window = WindowSpec { pd: host.pd, kind: WindowKind::One };
    let fast = FastKeySpec { pd: host.pd, max_entries: said.fast_entries };
    let pages = Arc::new(PageList::new(0).expect("an empty list"));
    let (pd, address) = (host.pd, hw_model::addr::RegionAddr(0));
    let spec = KeySpec { pd, access: ALL, address, length: 0, first_page_offset: 0, pages };
    let keys = [host.hca.alloc_window(window), host.hca.create_fast_key(fast)];
    let [window_key, fast_key] = keys.map(|key| key.expect("room"));
    let regions: Vec<_> = (2..said.keys).map(|_| host.hca.create_key(spec.clone()).expect("room")).collect();
    let full = CreateKeyError::TooMany { max: said.keys };
    assert_eq!(host.hca.create_key(spec), Err(full));
    assert_eq!(host.hca.alloc_window(window), Err(full));
    let (entries, max) = (said.fast_entries + 1, said.fast_entries);
    let large = CreateKeyError::TooManyEntries { entries, max };
    assert_eq!(host.hca.create_fast_key(FastKeySpec { max_entries: entries, ..fast }), Err(large));
    regions.into_iter().for_each(|key| drop(host.hca.destroy_key(key).expect("there")));
    host.hca.destroy_fast_key(fast_key).expect("there");
    host.hca.dealloc_window(window_key).expect("there");
    let live = host.hca.live_objects();
    assert_eq!((live.pds, live.keys, live.cqs, live.qps, live.ahs), (1, 0, 1, 0, 0));
    host.hca.dealloc_pd(host.pd).expect("nothing is left in it");
}

#[test]
fn a_port_has_the_tables_that_it_reports() {
    let pkeys = PKeyTable::new(&[PKey(0xffff), PKey(0x8001), PKey(0x0002)]).expect("three");
    let host = host(HcaConfig { pkeys, ..config() });
    let port = host.hca.port_attributes(PORT).expect("the port");
    assert_eq!((port.pkeys, port.gids), (3, 1));
    assert_eq!(host.hca.attributes().max_pkeys, 3);
    let keys: Vec<_> = (0..3).map(|index| host.hca.query_pkey(PORT, index).expect("in it").0).collect();
    assert_eq!(keys, [0xffff, 0x8001, 0x0002]);
    assert_eq!(host.hca.query_pkey(PORT, 3), Err(TableError::Index { index: 3, entries: 3 }));
    assert_eq!(host.hca.query_gid(PORT, 0), Ok(host.hca.gid()));
    assert_eq!(host.hca.query_gid(PORT, 1), Err(TableError::Index { index: 1, entries: 1 }));
    for port in [0, 2, 255] {
        assert_eq!(host.hca.port_attributes(port), Err(TableError::Port { port }));
        assert_eq!(host.hca.query_gid(port, 0), Err(TableError::Port { port }));
        assert_eq!(host.hca.query_pkey(port, 0), Err(TableError::Port { port }));
    }
    assert_eq!(PKeyTable::new(&[]), None);
    assert_eq!(PKeyTable::new(&[PKey::DEFAULT; PKeyTable::ENTRIES + 1]), None);
}

#[test]
fn a_device_claims_on_demand_what_its_engines_do() {
    let host = host(config());
    let said = host.hca.attributes();
    assert!(said.capabilities.contains(Capabilities::ON_DEMAND) && said.on_demand.explicit);
    let one_sided = OnDemandOperations::WRITE | OnDemandOperations::READ;
    assert!(said.on_demand.rc.contains(one_sided));
    // A datagram is sent and received, and nothing else; and no unreliable service reads.
    let datagrams =
        OnDemandOperations::SEND | OnDemandOperations::RECEIVE | OnDemandOperations::SHARED_RECEIVE;
    assert_eq!(said.on_demand.ud, datagrams);
    assert!(!said.on_demand.uc.intersects(OnDemandOperations::READ | OnDemandOperations::ATOMIC));
    assert_eq!(said.page_sizes & 0xfff, 0, "no page smaller than 4 KiB");
    assert_eq!(said.page_sizes & 0x1000, 0x1000);
    assert_eq!(said.node_guid, host.hca.gid().0 as u64);
}

#[test]
fn an_address_handle_is_of_its_domain_and_leads_where_it_says() {
    let host = host(config());
    let mut to = AddressVector::to(Gid(7));
    to.route.traffic_class = 9;
    let pd = host.hca.alloc_pd().expect("a domain");
    let handle = host.hca.create_ah(pd, to).expect("a handle");
    assert_eq!((handle.vector(), handle.pd()), (to, pd));
    assert_eq!(host.hca.dealloc_pd(pd), Err(PdError::InUse { pd, uses: 1 }));
    drop(handle);
    host.hca.dealloc_pd(pd).expect("empty");
    let refused = |vector| host.hca.create_ah(host.pd, vector).expect_err("impossible");
    let index = CreateAhError::SourceGid { index: 1, entries: 1 };
    assert_eq!(refused(AddressVector { source_gid_index: 1, ..to }), index);
    assert_eq!(refused(AddressVector { service_level: 16, ..to }), CreateAhError::ServiceLevel { level: 16 });
    to.route.flow_label = 1 << 20;
    assert_eq!(refused(to), CreateAhError::FlowLabel { label: 1 << 20 });
    to.route.flow_label = 1;
    let unknown = host.hca.create_ah(pd, to).expect_err("no such domain");
    assert_eq!(unknown, CreateAhError::Pd(PdError::Unknown { pd }));
    assert_eq!(host.hca.live_objects().ahs, 0);
}
