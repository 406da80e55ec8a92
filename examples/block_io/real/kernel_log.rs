//! What the kernel says of accesses that the IOMMU stopped.

use mr::dma::vfio::PciAddress;
use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags, SeekFrom};
use rustix::io::Errno;
use std::time::{Duration, Instant};

/// How long a line may take to come: faults are logged by a thread of the kernel.
const PATIENCE: Duration = Duration::from_secs(5);
/// Bytes of the longest record (Documentation/ABI/testing/dev-kmsg).
const RECORD: usize = 8192;

/// The kernel's log from some moment on.
pub struct KernelLog {
    records: OwnedFd,
}

impl KernelLog {
    /// From now on; `None` if this user may not read it.
    pub fn from_now() -> Option<Self> {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let records = rustix::fs::open("/dev/kmsg", flags, Mode::empty()).ok()?;
        rustix::fs::seek(&records, SeekFrom::End(0)).ok()?;
        Some(Self { records })
    }

    /// The lines about accesses of `device` that were stopped. Waits for the first, but not for ever.
    pub fn refusals_of(&mut self, device: PciAddress) -> Vec<String> {
        let device = format!("[{device}]");
        let end = Instant::now() + PATIENCE;
        let mut lines = Vec::new();
        let mut record = [0; RECORD];
        loop {
            match rustix::io::read(&self.records, &mut record) {
                Ok(len) => {
                    let text = String::from_utf8_lossy(&record[..len]);
                    // Numbers, a semicolon, the message; lines that continue it follow.
                    let message = text.lines().next().and_then(|line| line.split_once(';'));
                    if let Some((_, message)) = message
                        && message.contains("fault addr")
                        && message.contains(&device)
                    {
                        lines.push(message.to_owned());
                    }
                }
                Err(Errno::AGAIN) if lines.is_empty() && Instant::now() < end => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                // Records that were overwritten before they were read are skipped.
                Err(Errno::PIPE | Errno::INTR) => {}
                Err(_) => return lines,
            }
        }
    }
}
