//! A link that writes down what passes, for Wireshark and its like: nanosecond pcap, raw IP packets.
//!
//! A packet is written as it would be on a cable, with the IP and UDP headers that it has there or, on a link inside a process,
//! would have. Where the kernel cuts datagrams and numbers them, the number here is 0 and the ICRC is right for that.

use super::{Ingress, Link};
use crate::sync::{Arc, Mutex};
use crate::wire::{Flow, Gid, Packet, Qpn, ROCE_PORT, encode, encode_datagram};
use pcap_file::pcap::{PcapHeader, PcapPacket, PcapWriter};
use pcap_file::{DataLink, TsResolution};
use std::io::{self, BufWriter, Write};
use std::time::{SystemTime, UNIX_EPOCH};

/// The largest payload written: with its headers it must fit into an IP packet.
const MAX_PAYLOAD: usize = 4096;
/// The longest packet that a reader must expect.
const SNAP: u32 = 1 << 16;

/// A wrapper of another link.
pub struct PcapLink<L> {
    inner: L,
    capture: Arc<Capture>,
}

/// The file, and packets written so far; the file is gone once writing has failed.
struct Capture(Mutex<(Option<Writer>, u64)>);

type Writer = PcapWriter<BufWriter<Box<dyn Write + Send>>>;

impl<L: Link> PcapLink<L> {
    /// Wraps `inner`, and writes what it sends and receives to `file`, to the end when the link is dropped.
    ///
    /// # Errors
    /// What writing the head of the file said.
    pub fn new(inner: L, file: impl Write + Send + 'static) -> io::Result<Self> {
        let header = PcapHeader {
            snaplen: SNAP,
            datalink: DataLink::RAW,
            ts_resolution: TsResolution::NanoSecond,
            ..PcapHeader::default()
        };
        let file: Box<dyn Write + Send> = Box::new(file);
        let writer = PcapWriter::with_header(BufWriter::new(file), header).map_err(io::Error::other)?;
        Ok(Self { inner, capture: Arc::new(Capture(Mutex::new((Some(writer), 0)))) })
    }

    /// Packets written so far.
    pub fn written(&self) -> u64 {
        self.capture.0.lock().1
    }
}

impl Capture {
    fn write(&self, packet: &Packet) {
        let Some(flow) = Flow::between(packet.source, packet.destination, ROCE_PORT) else { return };
        let (mut content, mut bytes) = (Vec::new(), Vec::new());
        encode(packet, &flow, 0, &mut content);
        encode_datagram(&flow, 0, packet.route, &content, &mut bytes);
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut capture = self.0.lock();
        let Some(writer) = &mut capture.0 else { return };
        match writer.write_packet(&PcapPacket::new(time, bytes.len() as u32, &bytes)) {
            Ok(_) => capture.1 += 1,
            Err(error) => {
                tracing::error!(%error, "the capture ends here");
                capture.0 = None;
            }
        }
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        let Some(writer) = self.0.lock().0.take() else { return };
        if let Err(error) = writer.into_writer().flush() {
            tracing::error!(%error, "the end of the capture is lost");
        }
    }
}

/// The receiving side behind the link.
struct CapturedIngress {
    inner: Arc<dyn Ingress>,
    capture: Arc<Capture>,
}

impl Ingress for CapturedIngress {
    fn deliver(&self, packet: Packet) {
        self.capture.write(&packet);
        self.inner.deliver(packet);
    }
    fn deliver_all(&self, packets: &mut Vec<Packet>) {
        packets.iter().for_each(|packet| self.capture.write(packet));
        self.inner.deliver_all(packets);
    }
}

impl<L: Link> Link for PcapLink<L> {
    fn address(&self) -> Gid {
        self.inner.address()
    }
    fn max_payload(&self) -> usize {
        self.inner.max_payload().min(MAX_PAYLOAD)
    }
    fn attach(&self, ingress: Arc<dyn Ingress>) {
        self.inner.attach(Arc::new(CapturedIngress { inner: ingress, capture: Arc::clone(&self.capture) }));
    }
    fn detach(&self) {
        self.inner.detach();
    }
    fn send(&self, packet: Packet) {
        self.capture.write(&packet);
        self.inner.send(packet);
    }
    fn join(&self, group: Gid) -> std::io::Result<()> {
        self.inner.join(group)
    }
    fn part(&self, group: Gid) {
        self.inner.part(group);
    }
    fn flush(&self) {
        self.inner.flush();
    }
    fn poll(&self) {
        self.inner.poll();
    }
    fn rest(&self) {
        self.inner.rest();
    }
    fn named_counts(&self) -> Vec<(&'static str, u64)> {
        self.inner.named_counts()
    }
    fn congested(&self, peer: Gid, qp: Qpn) {
        self.inner.congested(peer, qp);
    }
}

impl<L> std::fmt::Debug for PcapLink<L> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PcapLink").field("written", &self.capture.0.lock().1).finish_non_exhaustive()
    }
}
