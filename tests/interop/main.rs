//! anypage and a real RDMA device, rdma_rxe, with a cable between them: every operation, both ways, pages dropped meanwhile,
//! packets lost, every byte verified. `tests/lab/interop` runs this in the laboratory; elsewhere it is a skip.
//!
//! The other end is `rxe-end` of tests/lab/oracle. If this fails, what we send is not what a kernel takes, or what we take
//! is not what it sends.

mod far;
mod near;

use far::Far;
use hw_model::link::LossCounts;
use near::Near;
use std::net::{IpAddr, TcpStream};
use std::time::{Duration, Instant};

/// What one connection is made with.
#[derive(Clone, Copy, Debug)]
struct Scenario {
    mtu: u32,
    /// Of a thousand packets, each way.
    loss: u32,
    v6: bool,
    /// Our region is on demand, and its pages are dropped all the time.
    near_on_demand: bool,
    /// So is that of rxe.
    far_on_demand: bool,
}

/// Every connection, or for a short look two that have everything in them. **What is left out:** rxe on demand with anything but whole pages at a path MTU of a page. Its copy
/// forgets the offset in the page (tests/lab/README.md), so such bytes are not ours to verify.
fn scenarios() -> Vec<Scenario> {
    let base = Scenario { mtu: 4096, loss: 0, v6: false, near_on_demand: true, far_on_demand: false };
    if std::env::var_os("ANYPAGE_INTEROP_SHORT").is_some() {
        return vec![
            Scenario { far_on_demand: true, loss: 10, ..base },
            Scenario { v6: true, mtu: 1024, loss: 10, ..base },
        ];
    }
    vec![
        Scenario { near_on_demand: false, ..base },
        base,
        Scenario { mtu: 1024, ..base },
        Scenario { far_on_demand: true, ..base },
        Scenario { loss: 10, ..base },
        Scenario { loss: 10, mtu: 1024, ..base },
        Scenario { loss: 10, far_on_demand: true, ..base },
        Scenario { v6: true, ..base },
        Scenario { v6: true, mtu: 1024, loss: 10, ..base },
    ]
}

/// What was verified.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    operations: u64,
    bytes: u64,
}

/// Pages of a region.
const PAGES: u64 = 64;
const PAGE: u64 = 4096;

fn main() {
    let (Ok(near), Ok(far)) =
        (std::env::var("ANYPAGE_LAB_PEER_ADDRESS"), std::env::var("ANYPAGE_LAB_ADDRESS"))
    else {
        println!("SKIPPED interop: not in the laboratory; tests/lab/interop runs it there");
        return;
    };
    let seconds: u64 =
        std::env::var("ANYPAGE_INTEROP_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    let address = |text: &str| -> IpAddr { text.parse().expect("the laboratory's address") };
    let v4 = (address(&near), address(&far));
    let v6 = (address("fd00::2"), address("fd00::1"));
    let mut far = Far::new(connect((v4.1, 4790)));
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut round = 0;
    let mut all = Counts::default();
    while round == 0 || Instant::now() < end {
        for scenario in scenarios() {
            let begun = Instant::now();
            let (own, peer) = if scenario.v6 { v6 } else { v4 };
            let mut near = Near::new(own, &scenario, round);
            let counts = exercise(&scenario, &mut near, &mut far, peer, round);
            let lost: LossCounts = near.lost();
            let udp = near.udp();
            assert_eq!(udp.malformed, 0, "{scenario:?}: rxe sent what we cannot read: {udp:?}");
            assert!(scenario.loss == 0 || lost.dropped > 0, "{scenario:?}: nothing was lost");
            println!(
                "ok {scenario:?}: {} operations, {} bytes verified, {} packets out and {} in ({} checked but for 16 bits), \
                 {} lost, {} of our pages faulted, {:.1} s",
                counts.operations,
                counts.bytes,
                udp.sent,
                udp.received,
                udp.checked_in_part,
                lost.dropped,
                near.faults(),
                begun.elapsed().as_secs_f64()
            );
            all.operations += counts.operations;
            all.bytes += counts.bytes;
        }
        round += 1;
    }
    println!("interop: {round} rounds, {} operations, {} bytes verified, 0 wrong", all.operations, all.bytes);
}

/// The other end may not listen yet.
fn connect(to: (IpAddr, u16)) -> TcpStream {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        match TcpStream::connect(to) {
            Ok(stream) => return stream,
            Err(error) => assert!(Instant::now() < end, "no rxe-end at {to:?}: {error}"),
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Every operation over one connection.
fn exercise(scenario: &Scenario, near: &mut Near, far: &mut Far, peer: IpAddr, round: u64) -> Counts {
    let mut counts = Counts::default();
    let remote = far.pair(near.address(), peer, scenario);
    near.connect(remote.qp);
    let seed = round * 1000;
    // Whole pages everywhere; odd lengths and offsets where rxe can do them.
    let mut pieces = vec![(0, PAGES * PAGE), (PAGE, PAGE), (8 * PAGE, 17 * PAGE)];
    if !scenario.far_on_demand {
        pieces.extend([(0, 1), (13, 4096), (PAGE - 3, 10_007), (77, 65_536), (5, 0)]);
    }
    for (index, (at, length)) in pieces.into_iter().enumerate() {
        let seed = seed + index as u64 * 10;
        let mut done = |bytes: u64| {
            counts.operations += 1;
            counts.bytes += bytes;
        };
        let drop_far = |far: &mut Far| {
            if scenario.far_on_demand {
                far.tell("drop");
            }
        };
        let ours = near.region(at);
        // We write to rxe.
        near.fill(seed, at, length);
        far.fill(seed + 9, at, length);
        drop_far(far);
        near.write(at, length, remote.at(at));
        assert_eq!(far.wrong(seed, at, length), 0, "{scenario:?}: we wrote {length} bytes at {at}");
        done(length);
        // We read from rxe.
        far.fill(seed + 1, at, length);
        drop_far(far);
        near.read(at, length, remote.at(at));
        near.verify(seed + 1, at, length, "we read");
        done(length);
        // rxe writes to us.
        far.fill(seed + 2, at, length);
        far.tell(&format!("write {at} {length} {} {}", ours.0, ours.1));
        near.verify(seed + 2, at, length, "rxe wrote");
        done(length);
        // rxe reads from us.
        near.fill(seed + 3, at, length);
        drop_far(far);
        far.tell(&format!("read {at} {length} {} {}", ours.0, ours.1));
        assert_eq!(far.wrong(seed + 3, at, length), 0, "{scenario:?}: rxe read {length} bytes at {at}");
        done(length);
        // We send to rxe.
        near.fill(seed + 4, at, length);
        far.tell(&format!("receive {at} {length}"));
        near.send(at, length);
        far.tell("wait");
        assert_eq!(far.wrong(seed + 4, at, length), 0, "{scenario:?}: we sent {length} bytes from {at}");
        done(length);
        // rxe sends to us.
        far.fill(seed + 5, at, length);
        drop_far(far);
        near.receive(at, length);
        far.tell(&format!("send {at} {length}"));
        near.received();
        near.verify(seed + 5, at, length, "rxe sent");
        done(length);
    }
    counts.operations += atomics(near, far, &remote, seed);
    counts
}

/// Words that both sides change, each in turn: what each was told, and what is left.
fn atomics(near: &Near, far: &mut Far, remote: &far::Told, seed: u64) -> u64 {
    /// A word of the region, and where what it was goes: rxe on demand puts it at the beginning of the page, wherever it is
    /// told to.
    const WORD: u64 = 3 * PAGE + 64;
    const WAS: u64 = 5 * PAGE;
    near.fill(seed, WORD, 8);
    far.fill(seed + 1, WORD, 8);
    let (mut ours, mut theirs) = (near.word(WORD), far.word(WORD));
    let (address, key) = near.region(WORD);
    let mut count = 0;
    for round in 1..=8_u64 {
        let add = round * 0x0101_0101_0101_0101;
        assert_eq!(near.fetch_add(WAS, remote.at(WORD), add), theirs, "what rxe's word was");
        theirs = theirs.wrapping_add(add);
        let unequal = theirs ^ 1;
        assert_eq!(near.compare_swap(WAS, remote.at(WORD), unequal, 7), theirs, "unequal");
        assert_eq!(near.compare_swap(WAS, remote.at(WORD), theirs, add), theirs, "equal");
        theirs = add;
        assert_eq!(far.word(WORD), theirs, "rxe's word");
        far.tell(&format!("add {WAS} 8 {address} {key} {add}"));
        assert_eq!(far.word(WAS), ours, "what our word was, as rxe was told");
        ours = ours.wrapping_add(add);
        far.tell(&format!("swap {WAS} 8 {address} {key} {} 7", ours ^ 1));
        assert_eq!(far.word(WAS), ours, "unequal");
        far.tell(&format!("swap {WAS} 8 {address} {key} {ours} {round}"));
        assert_eq!(far.word(WAS), ours, "equal");
        ours = round;
        assert_eq!(near.word(WORD), ours, "our word");
        count += 6;
    }
    count
}
