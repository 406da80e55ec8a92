//! `anypage demo`: one region over real mixed memory, changed while data moves through it, every byte verified.
//!
//! The range holds pages of every kind that this machine has. It is registered as ONE on-demand region. In each round one
//! end of a connection writes into it, the other reads into it, and a third thread drops pages, splits huge pages and
//! moves a DMABUF's pages between a BAR and system memory. Then all of it is read back by RDMA and held against what each
//! word may be. At the end the page list is compared with what it was.

mod mutate;
mod oracle;
mod picture;
mod plan;
mod report;
mod run;
mod traffic;

pub use report::Report;
pub use run::{DemoError, run};

use clap::Args as ClapArgs;
use std::process::ExitCode;

/// The options of the demo.
#[derive(ClapArgs, Clone, Debug)]
pub struct Args {
    /// Bytes of the region: whole 4 KiB pages, 16M at least. Takes K, M and G.
    #[arg(long, default_value = "256M", value_parser = parse_size)]
    pub size: u64,
    /// What every random choice comes from.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Rounds of writing, changing and verifying.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rounds: u32,
    /// Print the result as JSON (docs/demo.schema.json) instead of pictures and tables.
    #[arg(long)]
    pub json: bool,
}

/// `268435456`, `256M`, `1G`.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.chars().last() {
        Some('K' | 'k') => (&text[..text.len() - 1], 10),
        Some('M' | 'm') => (&text[..text.len() - 1], 20),
        Some('G' | 'g') => (&text[..text.len() - 1], 30),
        Some('T' | 't') => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    let number: u64 =
        digits.parse().map_err(|_| format!("'{text}' is not a number of bytes such as 256M"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("'{text}' is more bytes than 64 bits can count"))
}

/// Runs the demo and prints its result. 0: all is well; 1: a byte was wrong; 2: bad input; 3: this machine cannot.
pub fn main(args: &Args) -> ExitCode {
    let (report, pictures) = match run(args) {
        Ok(outcome) => outcome,
        Err(error) => {
            let code = error.exit_code();
            eprintln!("{:?}", miette::Report::new(error));
            return ExitCode::from(code);
        }
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report).expect("the report is plain data"));
    } else {
        anstream::print!("{pictures}");
        println!("{}", report.verdict());
    }
    ExitCode::from(u8::from(!report.is_clean()))
}

#[cfg(test)]
mod tests {
    use super::parse_size;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("256M"), Ok(256 << 20));
        assert_eq!(parse_size("1g"), Ok(1 << 30));
        for bad in ["", "M", "-1", "1.5M", "12X", "99999999999T", "0x1000"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }
}
