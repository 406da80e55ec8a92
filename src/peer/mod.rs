//! `anypage perf`: moves data between two processes, or two hosts, over RoCEv2, measures it, and verifies every byte.
//!
//! One side listens, the other connects. They agree over TCP on what to do and on what each must know of the other (address,
//! queue pair, sequence number, region), then the data goes over the link: UDP, or memory that two processes of one host
//! share.

mod end;
mod network;
mod report;
mod run;

pub use report::{Measured, Report};
pub use run::run;

use crate::perf::Operation;
use clap::{Args as ClapArgs, ValueEnum};
use serde::{Deserialize, Serialize};
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;

/// What carries it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Via {
    /// RoCEv2 over UDP, port 4791.
    Udp,
    /// Memory that two processes of one host share.
    Shm,
}

/// What one side does.
#[derive(Clone, Debug)]
pub struct Args {
    /// What to do; the side that listens takes it from the other.
    pub operation: Operation,
    /// Bytes of a message.
    pub size: u32,
    /// Messages.
    pub iterations: u64,
    /// Queue pairs.
    pub qps: u32,
    /// Messages under way at a time on each.
    pub depth: u32,
    /// Print what was found as JSON.
    pub json: bool,
    /// Register this side's memory on demand.
    pub odp: bool,
    /// Where the other side is, and what lies between.
    pub sides: Sides,
}

/// The options of perf between two processes or hosts.
#[derive(ClapArgs, Clone, Debug)]
#[command(next_help_heading = "Between two processes or hosts")]
pub struct Sides {
    /// Wait at this address for the other side.
    #[arg(
        long,
        value_name = "ADDRESS",
        num_args = 0..=1,
        default_missing_value = "127.0.0.2",
        conflicts_with = "connect"
    )]
    pub listen: Option<IpAddr>,
    /// Connect to the side that listens there.
    #[arg(long, value_name = "ADDRESS")]
    pub connect: Option<IpAddr>,
    /// The own address; otherwise the one that leads to the peer, or the first free one of 127.0.0.0/8.
    #[arg(long)]
    pub address: Option<IpAddr>,
    /// TCP port over which the two sides agree.
    #[arg(long, default_value_t = 18515)]
    pub port: u16,
    /// What carries the packets.
    #[arg(long, value_enum, default_value = "udp")]
    pub via: Via,
    /// Payload of a full packet: a power of two from 256. Of UDP at most 4096, which is also the default.
    #[arg(long)]
    pub mtu: Option<u32>,
    /// Write what this side sends and receives to a file that Wireshark reads.
    #[arg(long, value_name = "FILE")]
    pub pcap: Option<PathBuf>,
    /// Lose so many packets of a hundred, on this side, each way.
    #[arg(long, value_name = "PERCENT", default_value_t = 0.0)]
    pub loss: f64,
}

impl Sides {
    /// Whether there is another side.
    #[must_use]
    pub fn are_two(&self) -> bool {
        self.listen.is_some() || self.connect.is_some()
    }
    /// The first option that means nothing without another side.
    #[must_use]
    pub fn idle_option(&self) -> Option<&'static str> {
        let given = [
            ("address", self.address.is_some()),
            ("mtu", self.mtu.is_some()),
            ("pcap", self.pcap.is_some()),
            ("loss", self.loss != 0.0),
        ];
        given.into_iter().find_map(|(name, given)| given.then_some(name))
    }
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error, miette::Diagnostic)]
pub enum PerfError {
    /// Not a path MTU.
    #[error("--mtu {mtu} is not a power of two from 256 to {max}")]
    #[diagnostic(help("leave it out to take the largest"))]
    Mtu {
        /// Asked for.
        mtu: u32,
        /// What the link carries.
        max: usize,
    },
    /// Not a share.
    #[error("--loss {percent} is not from 0 to 50 percent")]
    Loss {
        /// Asked for.
        percent: f64,
    },
    /// The two sides are of different versions, or one of them is something else.
    #[error("the other side does not speak as this one does: {said}")]
    #[diagnostic(help("run the same version of anypage on both sides"))]
    Peer {
        /// What it said.
        said: String,
    },
    /// The machine, or the network, refused something.
    #[error("{what}")]
    Setup {
        /// What was being done.
        what: String,
        /// What came of it.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A message did not arrive.
    #[error("message {message} ended with {status:?}")]
    Transfer {
        /// Its number.
        message: u64,
        /// How it ended.
        status: hw_model::hca::Status,
    },
    /// Nothing happened for long.
    #[error("no message has ended for {seconds} s, {ended} had before")]
    #[diagnostic(help("is UDP port 4791 open between the two sides?"))]
    Silence {
        /// So long.
        seconds: u64,
        /// Messages that had ended.
        ended: u64,
    },
}

impl PerfError {
    /// The process's exit status for this error.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Mtu { .. } | Self::Loss { .. } => 2,
            Self::Setup { .. } | Self::Peer { .. } => 3,
            Self::Transfer { .. } | Self::Silence { .. } => 1,
        }
    }
}

/// Names what was being done when an error came.
fn setup<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
    what: impl Into<String>,
) -> impl FnOnce(E) -> PerfError {
    let what = what.into();
    move |error| PerfError::Setup { what, source: error.into() }
}

/// Runs one side and prints what it found. 0: every byte was right; 1: one was not, or a message was lost; 2: bad input; 3:
/// this machine, or the other side, cannot.
pub fn main(args: &Args) -> ExitCode {
    match run(args) {
        Ok(report) => {
            if args.json {
                println!("{}", serde_json::to_string_pretty(&report).expect("the report is plain data"));
            } else {
                println!("{report}");
            }
            ExitCode::from(u8::from(report.wrong_bytes > 0))
        }
        Err(error) => {
            let code = error.exit_code();
            eprintln!("{:?}", miette::Report::new(error));
            ExitCode::from(code)
        }
    }
}
