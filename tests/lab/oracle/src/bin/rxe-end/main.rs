//! The end of a connection that a real RDMA device has: it does what it is told over TCP, a line a command, a line an answer,
//! and knows nothing of who is at the other end. tests/interop tells it what to do.
//!
//! The device is `ANYPAGE_LAB_DEVICE` (rxe0). It listens at the address given.

use oracle::memory::{Memory, PAGE};
use oracle::verbs::{
    Answer, Device, Domain, Operation, Peer, Queue, RNR_FOR_EVER, Region, Request, access, mtu,
};
use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv6Addr, TcpListener, TcpStream};
use std::rc::Rc;

/// Pages of the region.
const PAGES: usize = 64;

/// A connection with its region.
struct End {
    queue: Queue,
    region: Region,
    memory: Rc<Memory>,
}

fn main() -> Result<(), Box<dyn Error>> {
    let address = std::env::args().nth(1).ok_or("usage: rxe-end ADDRESS:PORT")?;
    let (stream, _) = TcpListener::bind(address)?.accept()?;
    serve(&stream)
}

fn serve(stream: &TcpStream) -> Result<(), Box<dyn Error>> {
    let mut out = stream;
    let mut end = None;
    for line in BufReader::new(stream).lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        let answer = match obey(&words, &mut end) {
            Ok(answer) => answer,
            Err(error) => format!("error {error}"),
        };
        writeln!(out, "{answer}")?;
    }
    Ok(())
}

fn obey(words: &[&str], end: &mut Option<End>) -> Result<String, Box<dyn Error>> {
    if let ["pair", own, peer, number, psn, bytes, mode] = words {
        // The old one goes first: its region must not outlive its queue pair's peer.
        *end = None;
        let (made, answer) = pair(own.parse()?, peer.parse()?, [number, psn, bytes], mode)?;
        *end = Some(made);
        return Ok(answer);
    }
    let End { queue, region, memory } = end.as_ref().ok_or("no connection yet")?;
    let number = |index: usize| -> Result<u64, Box<dyn Error>> {
        Ok(words.get(index).ok_or("too few words")?.parse()?)
    };
    let local = || -> Result<(u64, u32, u32), Box<dyn Error>> {
        Ok((region.address() + number(1)?, number(2)? as u32, region.lkey()))
    };
    let run = |operation, remote| -> Result<String, Box<dyn Error>> {
        Ok(said(queue.run(Request { operation, local: local()?, remote })))
    };
    match words[0] {
        "fill" => {
            let (seed, from, length) = (number(1)?, number(2)? as usize, number(3)? as usize);
            memory.write(from, &pattern(seed, from, length));
            Ok("ok".to_owned())
        }
        // How many bytes are not as the seed says.
        "check" => {
            let (seed, from, length) = (number(1)?, number(2)? as usize, number(3)? as usize);
            let found = memory.read(from..from + length);
            let wrong = found.iter().zip(pattern(seed, from, length)).filter(|(a, b)| **a != *b).count();
            Ok(wrong.to_string())
        }
        "word" => {
            let from = number(1)? as usize;
            let bytes: [u8; 8] = memory.read(from..from + 8).try_into().expect("eight bytes");
            Ok(u64::from_ne_bytes(bytes).to_string())
        }
        "drop" => {
            memory.drop_pages(0..memory.bytes())?;
            Ok("ok".to_owned())
        }
        "write" => run(Operation::Write, (number(3)?, number(4)? as u32)),
        "read" => run(Operation::Read, (number(3)?, number(4)? as u32)),
        "send" => run(Operation::Send, (0, 0)),
        "add" => run(Operation::FetchAdd(number(5)?), (number(3)?, number(4)? as u32)),
        "swap" => run(Operation::CompareSwap(number(5)?, number(6)?), (number(3)?, number(4)? as u32)),
        "receive" => {
            queue.receive(local()?)?;
            Ok("ok".to_owned())
        }
        "wait" => Ok(said(queue.completion())),
        other => Err(format!("no command {other}").into()),
    }
}

/// Makes and connects a queue pair from our address to that of a peer, with a region.
fn pair(
    own: Ipv6Addr,
    peer: Ipv6Addr,
    [number, psn, bytes]: [&str; 3],
    mode: &str,
) -> Result<(End, String), Box<dyn Error>> {
    let name = std::env::var("ANYPAGE_LAB_DEVICE").unwrap_or_else(|_| "rxe0".to_owned());
    let device = Device::open(&name, gid_index(&name, own)?)?;
    let domain = Domain::new(&device)?;
    let memory = Rc::new(Memory::shared(PAGES)?);
    let on_demand = if mode == "on-demand" { access::ON_DEMAND } else { 0 };
    let region = Region::new(&domain, &memory, 0..PAGES * PAGE, access::ALL | on_demand)?;
    let queue = Queue::new(&domain)?;
    let own_psn = queue.number().wrapping_mul(77) & 0xff_ffff;
    queue.connect(&Peer {
        gid: peer.octets(),
        number: number.parse()?,
        psn: psn.parse()?,
        own_psn,
        mtu: mtu(bytes.parse()?),
        rnr_retry: RNR_FOR_EVER,
    })?;
    let answer = format!("ok {} {own_psn} {} {}", queue.number(), region.address(), region.rkey());
    Ok((End { queue, region, memory }, answer))
}

/// The index of an address in the device's table.
fn gid_index(name: &str, address: Ipv6Addr) -> Result<u8, Box<dyn Error>> {
    for index in 0..=u8::MAX {
        let path = format!("/sys/class/infiniband/{name}/ports/1/gids/{index}");
        let found = std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<Ipv6Addr>().ok());
        if found == Some(address) {
            return Ok(index);
        }
    }
    Err(format!("{name} has no GID {address}").into())
}

fn said(answer: Answer) -> String {
    match answer {
        Answer::Completed(done) if done.status == 0 => format!("ok {}", done.byte_len),
        Answer::Completed(done) => format!("error status {}", done.status),
        Answer::Nothing => "error no completion".to_owned(),
        Answer::NotPosted(error) => format!("error not posted: {error}"),
    }
}

/// Bytes that differ from place to place and from seed to seed. tests/interop has the same.
fn pattern(seed: u64, from: usize, length: usize) -> Vec<u8> {
    (from..from + length).map(|at| ((at * 31 + at / 251 + seed as usize * 97) % 255) as u8 + 1).collect()
}
