//! The far end: rxe, which does what it is told over TCP.

use super::Scenario;
use hw_model::addr::RegionAddr;
use hw_model::hca::{Key, Psn, QpAddress, Qpn, Remote};
use hw_model::wire::gid_of;
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv6Addr, TcpStream};

/// What rxe said of its end.
#[derive(Clone, Copy, Debug)]
pub struct Told {
    pub qp: QpAddress,
    address: u64,
    key: u32,
}

impl Told {
    /// A place in its region.
    pub fn at(&self, offset: u64) -> Remote {
        Remote { key: Key(self.key), address: RegionAddr(self.address + offset) }
    }
}

/// The connection to the program that drives rxe.
pub struct Far {
    stream: TcpStream,
    answers: BufReader<TcpStream>,
}

impl Far {
    pub fn new(stream: TcpStream) -> Self {
        stream.set_nodelay(true).expect("a TCP option");
        let answers = BufReader::new(stream.try_clone().expect("a file number"));
        Self { stream, answers }
    }

    /// Says something and gives the answer.
    fn ask(&mut self, command: &str) -> String {
        writeln!(self.stream, "{command}").expect("rxe-end listens");
        let mut answer = String::new();
        self.answers.read_line(&mut answer).expect("rxe-end answers");
        answer.trim().to_owned()
    }

    /// Says something that must succeed; gives what comes after the `ok`.
    pub fn tell(&mut self, command: &str) -> String {
        let answer = self.ask(command);
        let rest = answer.strip_prefix("ok").unwrap_or_else(|| panic!("{command}: {answer}"));
        rest.trim().to_owned()
    }

    /// A queue pair and a region of its own, connected to ours.
    pub fn pair(&mut self, ours: QpAddress, peer: IpAddr, scenario: &Scenario) -> Told {
        let (own, near) = (Ipv6Addr::from(gid_of(peer).0), Ipv6Addr::from(ours.gid.0));
        let mode = if scenario.far_on_demand { "on-demand" } else { "pinned" };
        let (number, psn, mtu) = (ours.qpn.0, ours.psn.get(), scenario.mtu);
        let answer = self.tell(&format!("pair {own} {near} {number} {psn} {mtu} {mode}"));
        let numbers: Vec<u64> = answer.split(' ').map(|word| word.parse().expect("a number")).collect();
        let &[number, psn, address, key] = &numbers[..] else { panic!("four numbers: {answer}") };
        let qp = QpAddress { gid: gid_of(peer), qpn: Qpn(number as u32), psn: Psn::new(psn as u32) };
        Told { qp, address, key: key as u32 }
    }

    /// Makes its bytes those of `seed`.
    pub fn fill(&mut self, seed: u64, at: u64, length: u64) {
        self.tell(&format!("fill {seed} {at} {length}"));
    }

    /// A word of its region.
    pub fn word(&mut self, at: u64) -> u64 {
        self.ask(&format!("word {at}")).parse().expect("a number")
    }

    /// How many of its bytes are not those of `seed`.
    pub fn wrong(&mut self, seed: u64, at: u64, length: u64) -> u64 {
        self.ask(&format!("check {seed} {at} {length}")).parse().expect("a number")
    }
}
