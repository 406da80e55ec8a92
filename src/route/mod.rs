//! `anypage route`: which way DMA takes to a page, and by which rule of the kernel.
//!
//! Without a question it prints the whole table of decisions. A question names what the memory is made of, a device, or
//! both; the devices are those of one modelled machine, whose topology answers for peers.

mod machine;
mod report;

pub use report::Report;

use clap::Args as ClapArgs;
use hw_model::hca::Backing;
use machine::{DeviceName, Machine};
use mr::dma::Policy;
use std::error::Error;
use std::process::ExitCode;

/// Where the memory in question lies unless told otherwise: above 4 GiB, where most memory is.
const USUAL_PLACE: u64 = 5 << 30;

/// The question.
#[derive(ClapArgs, Clone, Debug)]
#[command(
    after_help = "Exit status: 0 there is a way, or more than one case was asked for; 1 the one case asked for is refused; 2 the command line was wrong."
)]
pub struct Args {
    /// What the memory is made of; all kinds if only the device is named.
    #[arg(long, value_name = "KIND", value_parser = parse_backing)]
    backing: Option<Backing>,
    /// Which device is to reach it; all devices if only the backing is named.
    #[arg(long, value_name = "DEVICE")]
    device: Option<DeviceName>,
    /// What is asked of coherence: `coherent` as kernels since about 7.0, `legacy` as before.
    #[arg(long, default_value = "coherent", value_parser = parse_policy)]
    policy: Policy,
    /// Physical address of the memory, or its offset in the provider's BAR for peer memory. Takes 0x.
    #[arg(long, value_name = "ADDRESS", value_parser = parse_number)]
    at: Option<u64>,
    /// Bytes of it.
    #[arg(long, value_name = "BYTES", default_value = "4096", value_parser = parse_number)]
    len: u64,
    /// Print JSON (docs/route.schema.json).
    #[arg(long)]
    json: bool,
}

fn parse_backing(text: &str) -> Result<Backing, String> {
    let wanted = text.replace('-', "_");
    Backing::ALL.into_iter().find(|backing| backing.name() == wanted).ok_or_else(|| {
        let names: Vec<&str> = Backing::ALL.iter().map(|backing| backing.name()).collect();
        format!("no kind `{text}`; there are {}", names.join(", "))
    })
}

fn parse_policy(text: &str) -> Result<Policy, String> {
    match text {
        "coherent" => Ok(Policy::Coherent),
        "legacy" => Ok(Policy::Legacy),
        _ => Err(format!("no policy `{text}`; there are coherent, legacy")),
    }
}

fn parse_number(text: &str) -> Result<u64, String> {
    let number = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    number.map_err(|_| format!("`{text}` is not a number such as 4096 or 0x1000"))
}

/// Answers the question. 0: there is a way; 1: there is none; 2: the question is wrong.
#[must_use]
pub fn main(args: &Args) -> ExitCode {
    let report = match answer(args) {
        Ok(report) => report,
        Err(error) => {
            anstream::eprintln!("error: {error}");
            return ExitCode::from(2);
        }
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report).expect("the report is plain data"));
    } else {
        print!("{report}");
    }
    ExitCode::from(u8::from(report.is_refusal()))
}

fn answer(args: &Args) -> Result<Report, Box<dyn Error>> {
    if args.backing.is_none() && args.device.is_none() {
        if let Some(at) = args.at {
            return Err(format!("a place, {at:#x}, and neither --backing nor --device to ask about").into());
        }
        return Ok(Report::table());
    }
    if args.len == 0 {
        return Err("a range of 0 bytes; the smallest is 1".into());
    }
    let machine = Machine::new()?;
    let backings = args.backing.map_or(Backing::ALL.to_vec(), |backing| vec![backing]);
    let devices = args.device.map_or(DeviceName::ALL.to_vec(), |device| vec![device]);
    let mut cases = Vec::new();
    for backing in backings {
        for device in &devices {
            cases.push(machine.ask(*device, backing, args.policy, args.at, args.len)?);
        }
    }
    Ok(Report::cases(cases))
}
