//! What one side found, for people and as JSON.

use super::Via;
use super::network::Plan;
use crate::perf::{Latency, Operation};
use schemars::JsonSchema;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;

/// What one side found. The fields are the JSON of `--json`; docs/perf-peer.schema.json describes them.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Report {
    /// What moved the data.
    pub operation: Operation,
    /// What carried it.
    pub via: Via,
    /// Bytes of a message.
    pub size: u32,
    /// Messages.
    pub iterations: u64,
    /// Queue pairs.
    pub qps: u32,
    /// Messages under way at a time on each.
    pub depth: u32,
    /// Payload of a full packet.
    pub mtu: u32,
    /// What the side that connects measured; the one that listens does not know.
    pub measured: Option<Measured>,
    /// Packets that this side sent.
    pub packets_sent: u64,
    /// Times that this side sent again.
    pub retries: u64,
    /// Page faults of this side's region.
    pub page_faults: u64,
    /// Bytes that were looked at, on the side that they went to.
    pub verified_bytes: u64,
    /// Of those, bytes that were not as they should be.
    pub wrong_bytes: u64,
    /// What this side's link counted and is not zero: packets dropped by reason among it.
    pub link: BTreeMap<&'static str, u64>,
}

/// Rate and latency.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Measured {
    /// Seconds from the first post to the last completion.
    pub seconds: f64,
    /// Messages a second.
    pub messages_per_second: f64,
    /// Bytes of messages a second.
    pub bytes_per_second: f64,
    /// From the post of a message to its completion in the hands of the poster.
    pub latency: Latency,
}

impl Report {
    pub(super) fn new(plan: &Plan) -> Self {
        let Plan { operation, via, size, iterations, qps, depth, mtu, .. } = *plan;
        Self {
            operation,
            via,
            size,
            iterations,
            qps,
            depth,
            mtu,
            measured: None,
            packets_sent: 0,
            retries: 0,
            page_faults: 0,
            verified_bytes: 0,
            wrong_bytes: 0,
            link: BTreeMap::new(),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { operation, via, size, iterations, qps, depth, mtu, .. } = self;
        let name = operation.name();
        let way = match via {
            Via::Udp => "UDP",
            Via::Shm => "shared memory",
        };
        writeln!(f, "{iterations} x {name} of {size} bytes over {way}, path MTU {mtu}")?;
        writeln!(f, "{qps} queue pairs, {depth} under way on each")?;
        if let Some(Measured { seconds, messages_per_second, bytes_per_second, latency }) = &self.measured {
            let rate = bytes_per_second / 1e6;
            writeln!(f, "{rate:.1} MB/s, {messages_per_second:.0} messages a second, {seconds:.3} s")?;
            let micros = |ns: u64| ns as f64 / 1e3;
            let [least, half, most] = [latency.min_ns, latency.p50_ns, latency.p99_ns].map(micros);
            writeln!(f, "a message took {least:.2} us at least, half of them {half:.2}, 99 % {most:.2}")?;
        }
        writeln!(
            f,
            "{} packets sent, {} times sent again, {} page faults",
            self.packets_sent, self.retries, self.page_faults
        )?;
        for (name, count) in self.link.iter().filter(|(name, _)| is_loss(name)) {
            writeln!(f, "{count} packets: {name}")?;
        }
        write!(f, "{} bytes verified, {} wrong", self.verified_bytes, self.wrong_bytes)
    }
}

/// Whether a counter of a link is of packets that came to nothing.
fn is_loss(name: &str) -> bool {
    ["malformed", "dropped", "refused"].iter().any(|word| name.contains(word))
}

#[cfg(test)]
mod tests {
    use super::Report;

    #[test]
    fn the_documented_schema_is_the_real_one() {
        crate::schema::check("perf-peer", &schemars::schema_for!(Report));
    }
}
