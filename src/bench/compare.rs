//! What has changed since another run.

use super::report::{Report, Row, micros};
use comfy_table::{CellAlignment, Table, presets};

/// The rows of both, by what the medians were and are.
pub(super) fn table(old: &Report, new: &Report) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["", "was", "is", "change", "of processor time"]);
    let mut missing = 0;
    for row in &new.rows {
        let Some(before) = old.rows.iter().find(|other| is_same(other, row)) else {
            missing += 1;
            continue;
        };
        let (Some(was), Some(is)) = (&before.latency, &row.latency) else { continue };
        let change = |was: u64, is: u64| match was {
            0 => "?".to_owned(),
            _ => format!("{:+.1} %", (is as f64 / was as f64 - 1.0) * 100.0),
        };
        table.add_row([
            row.name(),
            micros(was.p50_ns),
            micros(is.p50_ns),
            change(was.p50_ns, is.p50_ns),
            change(before.processor_ns, row.processor_ns),
        ]);
    }
    for column in 1..5 {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let mut said = table.to_string();
    if old.host.processor != new.host.processor || old.host.kernel != new.host.kernel {
        said += &format!("\nother machine: it was {} under {}", old.host.processor, old.host.kernel);
    }
    if missing > 0 {
        said += &format!("\n{missing} rows were not measured then");
    }
    said
}

fn is_same(one: &Row, other: &Row) -> bool {
    one.what == other.what && one.mode == other.mode && one.group_name() == other.group_name()
}
