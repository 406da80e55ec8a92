//! Every operation of a reliable connection, in any order, over a link that loses, duplicates and reorders, with pages that
//! are missing and receives that come late, against a model that does one after the other to plain bytes.

use crate::world::{Host, Pair, Region, config, pattern};
use hw_model::hca::{
    FaultOutcome, FaultPolicy, Feth, HcaConfig, Immediate, Operation, OperationCode, PageFault, PathMtu,
    Placement, RecvRequest, Selectivity, SendRequest, Status,
};
use hw_model::link::{Fabric, FaultyLink, LossRates};
use proptest::prelude::*;

#[derive(Clone, Copy, Debug)]
enum Kind {
    Send { immediate: Option<u32> },
    Write { immediate: Option<u32> },
    Read,
    Swap { hit: bool, swap: u64 },
    Add(u64),
    AtomicWrite,
    Flush,
}

#[derive(Clone, Copy, Debug)]
struct Op {
    kind: Kind,
    at: u64,
    length: u64,
}

/// Bytes of the peer's memory that operations reach, and of one message.
const SIZE: u64 = 20_000;
const LONGEST: u64 = 3000;

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let immediate = prop::option::of(any::<u32>());
    let kind = prop_oneof![
        immediate.clone().prop_map(|immediate| Kind::Send { immediate }),
        immediate.prop_map(|immediate| Kind::Write { immediate }),
        Just(Kind::Read),
        (any::<bool>(), any::<u64>()).prop_map(|(hit, swap)| Kind::Swap { hit, swap }),
        any::<u64>().prop_map(Kind::Add),
        Just(Kind::AtomicWrite),
        Just(Kind::Flush),
    ];
    let op = (kind, 0..SIZE - LONGEST, 0..LONGEST).prop_map(|(kind, at, length)| match kind {
        Kind::Swap { .. } | Kind::Add(_) | Kind::AtomicWrite => Op { kind, at: at & !7, length: 8 },
        Kind::Flush => Op { kind, at, length: 0 },
        _ => Op { kind, at, length },
    });
    prop::collection::vec(op, 1..24)
}

/// What should be: the peer's memory, what comes back to each request, and what each receive gets.
struct Model {
    memory: Vec<u8>,
    returned: Vec<Option<Vec<u8>>>,
    received: Vec<(OperationCode, Vec<u8>, Option<u32>)>,
}

impl Model {
    fn word(&self, at: u64) -> u64 {
        u64::from_le_bytes(self.memory[at as usize..at as usize + 8].try_into().expect("eight"))
    }

    fn put(&mut self, at: u64, data: &[u8]) {
        self.memory[at as usize..at as usize + data.len()].copy_from_slice(data);
    }

    /// Carries out `op`, whose local bytes are `data`. Gives the operation to post.
    fn carry_out(&mut self, op: &Op, data: &[u8], remote: &Region) -> Operation {
        let target = remote.remote(op.at);
        let mut returned = None;
        let operation = match op.kind {
            Kind::Send { immediate } => {
                self.received.push((OperationCode::Receive, data.to_vec(), immediate));
                immediate.map_or(Operation::Send, |value| Operation::SendImmediate(Immediate(value)))
            }
            Kind::Write { immediate } => {
                self.put(op.at, data);
                if immediate.is_some() {
                    self.received.push((OperationCode::ReceiveWrite, data.to_vec(), immediate));
                }
                immediate.map_or(Operation::Write(target), |value| {
                    Operation::WriteImmediate(target, Immediate(value))
                })
            }
            Kind::Read => {
                returned = Some(self.memory[op.at as usize..(op.at + op.length) as usize].to_vec());
                Operation::Read(target)
            }
            Kind::Swap { hit, swap } => {
                let before = self.word(op.at);
                returned = Some(before.to_le_bytes().to_vec());
                if hit {
                    self.put(op.at, &swap.to_le_bytes());
                }
                let compare = if hit { before } else { !before };
                Operation::CompareSwap { remote: target, compare, swap }
            }
            Kind::Add(add) => {
                let before = self.word(op.at);
                returned = Some(before.to_le_bytes().to_vec());
                self.put(op.at, &before.wrapping_add(add).to_le_bytes());
                Operation::FetchAdd { remote: target, add }
            }
            Kind::AtomicWrite => {
                self.put(op.at, data);
                Operation::AtomicWrite(target)
            }
            Kind::Flush => {
                let how = Feth { placement: Placement::GLOBAL, selectivity: Selectivity::Range };
                Operation::Flush { remote: target, length: 64, how }
            }
        };
        self.returned.push(returned);
        operation
    }
}

fn bring_in(regions: &[&Region], fault: &PageFault) -> FaultOutcome {
    let region = regions.iter().find(|region| region.key == fault.key).expect("a known key");
    region.present(region.page_of(fault), true);
    FaultOutcome::Resolved
}

fn post_receives(host: &Pair, place: &Region, ids: std::ops::Range<u64>) {
    for id in ids {
        let list = [place.sge(id * LONGEST, 100), place.sge(id * LONGEST + 100, LONGEST as u32 - 100)];
        host.qb.post_recv(&RecvRequest::new(id, &list)).expect("posted");
    }
}

fn end_of(host: &Host, place: &Region, id: u64, length: usize) -> Vec<u8> {
    host.bytes(place, id * LONGEST, length as u64)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_operation_does_what_it_would_alone_and_once(
        ops in ops(), seed: u64, drop in 0..120u32, duplicate in 0..120u32, reorder in 0..120u32,
        micro_steps: bool, faults: bool, wait: bool, late: bool,
    ) {
        let fabric = Fabric::new();
        let rates = LossRates { drop, duplicate, reorder, ..LossRates::default() };
        let ends = [fabric.port(), fabric.port()].map(|port| Box::new(FaultyLink::new(port, rates, seed)));
        let [a, b] = ends;
        let config = HcaConfig {
            micro_steps,
            retry_count: 100,
            path_mtu: PathMtu::new(256).expect("an MTU"),
            fault_policy: if wait { FaultPolicy::Wait } else { FaultPolicy::NotReady },
            ..config()
        };
        let mut pair = Pair::over(config, a, b);
        let remote = pair.b.region(SIZE);
        let receives = ops.len() as u64;
        let place = pair.b.region(receives * LONGEST);
        let mut model = Model { memory: pattern(1, SIZE), returned: Vec::new(), received: Vec::new() };
        pair.b.fill(&remote, 0, &model.memory);
        let sources: Vec<_> = ops.iter().map(|_| pair.a.region(LONGEST)).collect();
        let mut requests = Vec::new();
        for (n, (op, source)) in ops.iter().zip(&sources).enumerate() {
            let data = pattern(n as u64 + 2, op.length);
            pair.a.fill(source, 0, &data);
            requests.push(model.carry_out(op, &data, &remote));
        }
        if faults {
            (0..5).for_each(|page| remote.absent(page));
            (0..place.pages.len()).for_each(|page| place.absent(page));
            sources.iter().for_each(|source| source.absent(0));
        }
        let first = if late { receives / 2 } else { receives };
        post_receives(&pair, &place, 0..first);
        for (n, (operation, source)) in requests.iter().zip(&sources).enumerate() {
            let sges = [source.sge(0, ops[n].length as u32)];
            let local = if ops[n].length == 0 { &sges[..0] } else { &sges[..] };
            // What comes after a read or an atomic may overtake it, unless fenced.
            let request = SendRequest { fence: true, ..SendRequest::new(n as u64, *operation, local) };
            pair.qa.post_send(&request).expect("posted");
        }
        let mut regions: Vec<&Region> = sources.iter().collect();
        regions.extend([&remote, &place]);
        if late {
            (0..300).for_each(|_| { pair.step(); });
            post_receives(&pair, &place, first..receives);
        }
        pair.run(|_, fault| bring_in(&regions, fault));

        let ended: Vec<_> = pair.a.take().iter().map(|c| (c.id.0, c.status)).collect();
        let wanted: Vec<_> = (0..ops.len() as u64).map(|id| (id, Status::Success)).collect();
        prop_assert_eq!(ended, wanted);
        prop_assert!(pair.b.bytes(&remote, 0, SIZE) == model.memory, "the peer's memory differs");
        for (n, data) in model.returned.iter().enumerate() {
            if let Some(data) = data {
                let got = pair.a.bytes(&sources[n], 0, data.len() as u64);
                prop_assert!(&got == data, "request {} brought something else back", n);
            }
        }
        let received = pair.b.take();
        prop_assert_eq!(received.len(), model.received.len(), "a message was lost, or came twice");
        for (id, (completion, (operation, data, immediate))) in received.iter().zip(&model.received).enumerate() {
            let heard = completion.immediate().map(|value| value.0);
            prop_assert_eq!((completion.id.0, completion.status), (id as u64, Status::Success));
            prop_assert_eq!((completion.operation, heard), (*operation, *immediate));
            prop_assert_eq!(completion.bytes as usize, data.len());
            if *operation == OperationCode::Receive {
                let got = end_of(&pair.b, &place, id as u64, data.len());
                prop_assert!(&got == data, "message {} differs", id);
            }
        }
        prop_assert_eq!(pair.a.hca.stats().dma_refused + pair.b.hca.stats().dma_refused, 0);
    }
}
