//! Any bytes as an IP packet, and as the content of a datagram: parsed or refused, and what is parsed is written back the same.
#![no_main]

use hw_model::wire::{
    Content, Flow, GlobalRoute, Identification, PayloadPool, check_icrc, encode, gid_of, parse,
    parse_datagram,
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(datagram) = parse_datagram(bytes) {
        let _ = check_icrc(&datagram.flow, Identification::Likely(0), datagram.content);
        let _ = parse(&datagram.flow, datagram.route, datagram.content);
    }
    let gid = |last| gid_of([10, 0, 0, last].into());
    let flow = Flow::between(gid(1), gid(2), 4791).expect("one family");
    let _ = check_icrc(&flow, Identification::Likely(0), bytes);
    let Ok(Content::Packet { packet, data }) = parse(&flow, GlobalRoute::DEFAULT, bytes) else { return };
    let Ok(Some(packet)) = (Content::Packet { packet, data }).into_packet(&PayloadPool::new(1 << 16, 0))
    else {
        return;
    };
    let mut again = Vec::new();
    encode(&packet, &flow, 0, &mut again);
    let twice = parse(&flow, GlobalRoute::DEFAULT, &again).expect("what we wrote");
    let twice = twice.into_packet(&PayloadPool::new(1 << 16, 0)).expect("it fits").expect("a packet");
    assert_eq!(format!("{packet:?}"), format!("{twice:?}"));
    assert!(packet.payload[..] == twice.payload[..]);
});
