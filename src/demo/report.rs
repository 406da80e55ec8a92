//! What the demo says at its end, for people and as JSON.

use super::oracle::Mismatch;
use comfy_table::{CellAlignment, Table, presets};
use mr::MapRun;
use schemars::JsonSchema;
use serde::Serialize;
use std::collections::BTreeMap;

/// The result of a run. The fields are the JSON of `--json`; docs/demo.schema.json describes them.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Report {
    /// Bytes of the region.
    pub region_bytes: u64,
    /// What every random choice came from.
    pub seed: u64,
    /// What the address space promises about the region's memory, and of its parts that are promised less.
    pub rung: String,
    /// Why parts of the region are on a weaker rung, if any are.
    pub weaker: Vec<String>,
    /// The region's key.
    pub key: u32,
    /// First IOVA of the region, as the page list has it.
    pub iova: u64,
    /// Whether key, IOVA and all entries of pages that were not touched stayed as they were.
    pub untouched_entries_unchanged: bool,
    /// Bytes that were read back by RDMA and held against what they may be.
    pub verified_bytes: u64,
    /// Words that were wrong, in bytes.
    pub mismatched_bytes: u64,
    /// The first wrong word.
    pub first_mismatch: Option<Mismatch>,
    /// Entries of the page list.
    pub entries_total: u64,
    /// Entries present at the end.
    pub entries_present: u64,
    /// Entries written again for pages that had been present before.
    pub entries_relinked: u64,
    /// Of those: pages that came back as another kind or by another path.
    pub entries_changed_kind: u64,
    /// Page-fault events of the HCA.
    pub faults: u64,
    /// Faults that lost a race with an invalidation and began again.
    pub fault_retries: u64,
    /// Invalidations that met the region.
    pub invalidations: u64,
    /// Pages that they hid.
    pub pages_invalidated: u64,
    /// Pages that the application dropped.
    pub pages_dropped: u64,
    /// Pages of the DMABUF that moved between BAR and system memory.
    pub pages_moved: u64,
    /// IOTLB flushes of the region's device.
    pub iotlb_flushes: u64,
    /// Times an engine met a translation that should have been gone. Always 0.
    pub stale_translations: u64,
    /// Pages by kind at the end.
    pub pages_by_kind: BTreeMap<&'static str, u64>,
    /// Pages by path at the end.
    pub pages_by_path: BTreeMap<&'static str, u64>,
    /// Pages of every kind that was present at any of the looks taken.
    pub pages_seen_by_kind: BTreeMap<&'static str, u64>,
    /// Seconds from registration to the last verified byte.
    pub seconds: f64,
}

impl Report {
    /// Whether every byte was right and nothing changed that should not have.
    pub fn is_clean(&self) -> bool {
        self.mismatched_bytes == 0 && self.untouched_entries_unchanged && self.stale_translations == 0
    }

    /// The last line of the demo.
    pub fn verdict(&self) -> String {
        if let Some(wrong) = &self.first_mismatch {
            return format!(
                "MISMATCH: {} bytes are wrong; the first word is at offset {:#x}: {:#018x}, expected {:#018x}. Replay: \
                 anypage demo --size {} --seed {}",
                self.mismatched_bytes,
                wrong.offset,
                wrong.found,
                wrong.expected,
                self.region_bytes,
                self.seed
            );
        }
        if !self.is_clean() {
            return format!(
                "FAILED: entries of untouched pages unchanged: {}; stale translations: {}",
                self.untouched_entries_unchanged, self.stale_translations
            );
        }
        format!(
            "Every byte compared equal. Key {:#010x}, IOVA {:#x} and all entries of untouched pages stayed as they were. \
             Rung in force: {}.",
            self.key, self.iova, self.rung
        )
    }
}

/// Pages by kind and path of a page list.
pub fn tally(map: &[MapRun]) -> BTreeMap<(&'static str, &'static str), u64> {
    let mut pages = BTreeMap::new();
    for run in map {
        if let Some(entry) = run.entry {
            *pages.entry((entry.backing.name(), entry.path.name())).or_insert(0) += run.pages;
        }
    }
    pages
}

/// The table of the terminal.
pub fn table(report: &Report, after: &[MapRun]) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["pages by kind and path", ""]);
    for ((kind, path), pages) in tally(after) {
        table.add_row([format!("{kind} by {path}"), pages.to_string()]);
    }
    let rows: [(&str, u64); 12] = [
        ("entries, present", report.entries_present),
        ("entries, total", report.entries_total),
        ("entries relinked", report.entries_relinked),
        ("entries that changed kind or path", report.entries_changed_kind),
        ("page faults", report.faults),
        ("fault retries", report.fault_retries),
        ("invalidations", report.invalidations),
        ("pages invalidated", report.pages_invalidated),
        ("pages dropped by the application", report.pages_dropped),
        ("DMABUF pages moved", report.pages_moved),
        ("IOTLB flushes", report.iotlb_flushes),
        ("bytes verified", report.verified_bytes),
    ];
    for (name, value) in rows {
        table.add_row([name.to_owned(), value.to_string()]);
    }
    if let Some(column) = table.column_mut(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_documented_schema_is_the_real_one() {
        crate::schema::check("demo", &schemars::schema_for!(super::Report));
    }
}
