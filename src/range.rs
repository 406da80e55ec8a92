//! Options that are numbers, and what is said of one that is out of its range.

/// An option is out of its range.
#[derive(Debug, thiserror::Error, miette::Diagnostic)]
#[diagnostic(help("choose a value in that range"))]
pub enum OutOfRange {
    /// A count.
    #[error("--{option} {value} is not between {least} and {most}")]
    Count {
        /// The option.
        option: &'static str,
        /// Its value.
        value: u64,
        /// The least.
        least: u64,
        /// The most.
        most: u64,
    },
    /// A time in seconds.
    #[error("--{option} {value} is not above 0 and at most {most} seconds")]
    Seconds {
        /// The option.
        option: &'static str,
        /// Its value.
        value: f64,
        /// The most.
        most: u32,
    },
}

/// Whether `value` is one of `least` to `most`.
pub(crate) fn count(option: &'static str, value: u64, least: u64, most: u64) -> Result<(), OutOfRange> {
    let refused = OutOfRange::Count { option, value, least, most };
    if (least..=most).contains(&value) { Ok(()) } else { Err(refused) }
}

/// Whether `value` is a time above nothing and up to `most` seconds.
pub(crate) fn seconds(option: &'static str, value: f64, most: u32) -> Result<(), OutOfRange> {
    let refused = OutOfRange::Seconds { option, value, most };
    if value > 0.0 && value <= f64::from(most) { Ok(()) } else { Err(refused) }
}
