//! What a measurement came to, for people and as JSON.

use comfy_table::{CellAlignment, Table, presets};
use hdrhistogram::Histogram;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The result of a measurement. The fields are the JSON of `--json`; docs/perf.schema.json describes them.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Report {
    /// `write`, `read`, `send` or `atomic`.
    pub operation: &'static str,
    /// Bytes of a message.
    pub size: u64,
    /// Queue pairs.
    pub qps: u32,
    /// Requests under way on each.
    pub depth: u32,
    /// Whether the regions were registered on demand.
    pub on_demand: bool,
    /// Bytes of memory of each end.
    pub memory: u64,
    /// Requests measured.
    pub messages: u64,
    /// Seconds that they took.
    pub seconds: f64,
    /// Requests a second.
    pub messages_per_second: f64,
    /// Bytes of messages a second.
    pub bytes_per_second: f64,
    /// Page faults of both HCAs, those of the first pass over the memory too, which is not measured.
    pub faults: u64,
    /// Page faults while it was measured.
    pub faults_measured: u64,
    /// From the post of a request to its completion in the hands of the poster.
    pub latency: Latency,
}

/// Latencies in nanoseconds.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Latency {
    /// The shortest.
    pub min_ns: u64,
    /// The mean.
    pub mean_ns: f64,
    /// Half of all were at most this.
    pub p50_ns: u64,
    /// 90 % of all.
    pub p90_ns: u64,
    /// 99 % of all.
    pub p99_ns: u64,
    /// 99.9 % of all.
    pub p99_9_ns: u64,
    /// The longest.
    pub max_ns: u64,
}

impl Latency {
    pub(crate) fn of(histogram: &Histogram<u64>) -> Self {
        Self {
            min_ns: histogram.min(),
            mean_ns: histogram.mean(),
            p50_ns: histogram.value_at_quantile(0.5),
            p90_ns: histogram.value_at_quantile(0.9),
            p99_ns: histogram.value_at_quantile(0.99),
            p99_9_ns: histogram.value_at_quantile(0.999),
            max_ns: histogram.max(),
        }
    }
}

impl Report {
    /// The table of the terminal.
    #[must_use]
    pub fn table(&self) -> String {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        let kind = if self.on_demand { "on demand" } else { "pinned" };
        table.set_header([format!("{} of {} bytes, {kind}", self.operation, self.size), String::new()]);
        let micros = |ns: u64| format!("{:.2} us", ns as f64 / 1e3);
        let rows = [
            ("queue pairs, requests on each", format!("{}, {}", self.qps, self.depth)),
            ("messages", self.messages.to_string()),
            ("seconds", format!("{:.3}", self.seconds)),
            ("messages a second", format!("{:.0}", self.messages_per_second)),
            ("GB a second", format!("{:.3}", self.bytes_per_second / 1e9)),
            ("page faults, of those measured", format!("{}, {}", self.faults, self.faults_measured)),
            ("latency, shortest", micros(self.latency.min_ns)),
            ("50 %", micros(self.latency.p50_ns)),
            ("90 %", micros(self.latency.p90_ns)),
            ("99 %", micros(self.latency.p99_ns)),
            ("99.9 %", micros(self.latency.p99_9_ns)),
            ("longest", micros(self.latency.max_ns)),
        ];
        for (name, value) in rows {
            table.add_row([name.to_owned(), value]);
        }
        if let Some(column) = table.column_mut(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        table.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::Report;

    #[test]
    fn the_documented_schema_is_the_real_one() {
        crate::schema::check("perf", &schemars::schema_for!(Report));
    }
}
