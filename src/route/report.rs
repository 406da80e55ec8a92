//! The answers, for people and as JSON.

use comfy_table::{ContentArrangement, Table, TableStyle, presets};
use hw_model::hca::Path;
use mr::dma::Refusal;
use mr::dma::route::{Row, TABLE};
use schemars::JsonSchema;
use serde::Serialize;
use std::fmt;

/// What `--json` prints; docs/route.schema.json describes it. One of the two lists is empty.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Report {
    /// The whole table, if nothing was asked.
    pub table: Vec<RowReport>,
    /// One answer for each case asked for.
    pub cases: Vec<CaseReport>,
}

/// A row of the table of decisions.
#[derive(Debug, Serialize, JsonSchema)]
pub struct RowReport {
    /// Its name.
    pub row: &'static str,
    /// The path, if there is one.
    pub path: Option<&'static str>,
    /// Why there is none, if so.
    pub refusal: Option<String>,
    /// The reason for the rule.
    pub why: &'static str,
    /// Where the kernel has it.
    pub kernel: &'static str,
}

/// The answer for one device and one kind of memory.
#[derive(Debug, Serialize, JsonSchema)]
pub struct CaseReport {
    /// What the memory is made of.
    pub backing: &'static str,
    /// The device.
    pub device: String,
    /// What the device is.
    pub about: String,
    /// Physical address of the memory.
    pub phys: u64,
    /// Bytes of it.
    pub len: u64,
    /// What the topology says of the way to the memory's provider, for peer memory.
    pub peer: Option<&'static str>,
    /// The row that answers.
    pub answer: RowReport,
}

impl RowReport {
    /// The row as it is printed.
    pub fn of(row: &'static Row) -> Self {
        let Row { name, answer, why, source, .. } = row;
        Self {
            row: name,
            path: answer.ok().map(Path::name),
            refusal: answer.err().map(|refusal: Refusal| refusal.to_string()),
            why,
            kernel: source,
        }
    }

    fn outcome(&self) -> String {
        match (&self.path, &self.refusal) {
            (Some(path), _) => (*path).to_owned(),
            (None, Some(refusal)) => format!("refused: {refusal}"),
            (None, None) => unreachable!("a row answers with a path or a refusal"),
        }
    }
}

impl Report {
    /// All rows.
    pub fn table() -> Self {
        Self { table: TABLE.iter().map(RowReport::of).collect(), cases: Vec::new() }
    }
    /// Answers.
    pub fn cases(cases: Vec<CaseReport>) -> Self {
        Self { table: Vec::new(), cases }
    }
    /// Whether one case was asked for and there is no way.
    pub fn is_refusal(&self) -> bool {
        matches!(&self.cases[..], [only] if only.answer.path.is_none())
    }
}

/// Columns where the output is not a terminal.
const WIDTH: u16 = 120;

fn laid_out<const N: usize>(style: TableStyle, header: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_style(style).set_content_arrangement(ContentArrangement::Dynamic).set_header(header);
    if table.width().is_none() {
        table.set_width(WIDTH);
    }
    table
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = match &self.cases[..] {
            [] => laid_out(
                presets::UTF8_HORIZONTAL_ONLY,
                ["case", "answer", "why, and where the kernel has it"],
            ),
            [only] => return only.fmt(f),
            _ => laid_out(presets::NOTHING, ["memory", "device", "answer", "case"]),
        };
        for row in &self.table {
            table.add_row([row.row, &row.outcome(), &format!("{}\n({})", row.why, row.kernel)]);
        }
        for CaseReport { backing, device, answer, .. } in &self.cases {
            table.add_row([backing, device.as_str(), &answer.outcome(), answer.row]);
        }
        writeln!(f, "{table}")
    }
}

impl fmt::Display for CaseReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { backing, device, about, phys, len, peer, answer } = self;
        writeln!(f, "{len} bytes of {backing} at {phys:#x}, for {device}: {about}.")?;
        if let Some(peer) = peer {
            writeln!(f, "The topology's answer for the two: {peer}.")?;
        }
        writeln!(f, "\n{}\n\ncase    {}", answer.outcome(), answer.row)?;
        writeln!(f, "why     {}\nkernel  {}", answer.why, answer.kernel)
    }
}

#[cfg(test)]
mod tests {
    use super::Report;

    #[test]
    fn the_schema_is_documented() {
        crate::schema::check("route", &schemars::schema_for!(Report));
    }
}
