//! Adaptive prefetch: a device that faults in a pattern has the pages that come next faulted in before it asks.
//!
//! A fault costs a round trip between the device and software, whatever it brings in; a stream that faults page by page
//! pays one a page. Each queue pair is watched for a few streams at a time: faults at equal distances, forwards or
//! backwards, of which the sequential stream is the one whose distance is its own length. The second fault that fits makes a
//! stream; from then on every fault of it asks for a window ahead, and the window doubles each time the stream catches up.
//! A fault that fits nothing is left alone, so random access costs what it cost.
//!
//! This is policy: it is told of faults and answers with ranges. It knows no pages, and reads no clock. The idea is that of
//! the kernel's readahead (mm/readahead.c), with the device's faults in place of page-cache misses.

use hashbrown::HashMap;
use hw_model::addr::{VirtAddr, VirtRange};
use std::hash::Hash;

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;

/// Streams remembered of one queue pair.
const STREAMS: usize = 4;
/// Queue pairs remembered. One more makes room by forgetting the one that faulted longest ago.
const SOURCES: usize = 1024;
/// Pieces of a strided window at most.
const MOST_PIECES: u64 = 256;

/// How far ahead pages are faulted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PrefetchPolicy {
    /// Not at all: a fault brings in what the device asked for.
    Off,
    /// A window of so many bytes behind every fault, whatever came before it.
    Fixed {
        /// Bytes.
        window: u64,
    },
    /// A window that grows while a stream goes on, from `first` bytes to `most`.
    Adaptive {
        /// Bytes of the first window.
        first: u64,
        /// Bytes of the largest.
        most: u64,
    },
}

impl PrefetchPolicy {
    /// From 256 KiB to 32 MiB.
    pub const ADAPTIVE: Self = Self::Adaptive { first: 256 << 10, most: 32 << 20 };
}

impl Default for PrefetchPolicy {
    fn default() -> Self {
        Self::ADAPTIVE
    }
}

/// What to fault in ahead: `count` pieces of `len` bytes, the first at `start`, each `stride` bytes from the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ahead {
    start: VirtAddr,
    len: u64,
    stride: i64,
    count: u64,
}

impl Ahead {
    /// The pieces, nearest first. They may pass the ends of the region that the fault was in.
    pub fn pieces(self) -> impl Iterator<Item = VirtRange> {
        let Self { start, len, stride, count } = self;
        (0..count as i64).map_while(move |n| {
            let at = start.0.checked_add_signed(stride.checked_mul(n)?)?;
            VirtRange::new(VirtAddr(at), len)
        })
    }

    /// From the first to the last of them, with what lies between.
    #[must_use]
    pub fn hull(self) -> Option<VirtRange> {
        self.pieces().reduce(VirtRange::hull)
    }

    /// Bytes of all pieces.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.len * self.count
    }
}

/// One stream of a queue pair.
#[derive(Clone, Copy, Debug)]
struct Stream {
    /// Where the last fault began.
    last: u64,
    /// Its bytes.
    len: u64,
    /// From one fault to the next, as far as is known.
    stride: Option<i64>,
    /// How many strides behind `last` were asked for ahead.
    asked: u64,
    /// Bytes of the last window.
    window: u64,
}

impl Stream {
    fn begun(fault: VirtRange) -> Self {
        Self { last: fault.start().0, len: fault.len(), stride: None, asked: 0, window: 0 }
    }

    /// Whether `fault` goes on with this stream: the first thing behind what was asked for, or anything in it that is late.
    fn goes_on(&self, fault: VirtRange) -> bool {
        let distance = fault.start().0.wrapping_sub(self.last) as i64;
        match self.stride {
            // The last fault again: it changed under the device, or was not brought in as a whole.
            _ if distance == 0 => true,
            None => false,
            Some(stride) if self.is_dense() => {
                let reach = stride.saturating_mul(self.asked as i64 + 1);
                distance.signum() == stride.signum() && distance.unsigned_abs() <= reach.unsigned_abs()
            }
            Some(stride) => {
                distance % stride == 0 && (1..=self.asked as i64 + 1).contains(&(distance / stride))
            }
        }
    }

    /// Whether there is nothing between its faults.
    fn is_dense(&self) -> bool {
        self.stride.is_some_and(|stride| stride.unsigned_abs() <= self.len)
    }
}

/// What one queue pair does.
#[derive(Debug)]
struct Source {
    streams: Vec<Stream>,
    /// When it faulted last.
    tick: u64,
}

/// The streams of a device, by who makes them: `S` names one side of one queue pair.
#[derive(Debug)]
pub struct Streams<S> {
    sources: HashMap<S, Source>,
    tick: u64,
}

impl<S> Default for Streams<S> {
    fn default() -> Self {
        Self { sources: HashMap::new(), tick: 0 }
    }
}

impl<S: Copy + Eq + Hash> Streams<S> {
    /// Takes note of a fault of `source` on `fault`, whole pages, and says what to bring in ahead of the next.
    pub fn observe(&mut self, policy: PrefetchPolicy, source: S, fault: VirtRange) -> Option<Ahead> {
        let (first, most) = match policy {
            _ if fault.is_empty() => return None,
            PrefetchPolicy::Off => return None,
            PrefetchPolicy::Fixed { window } => {
                let len = window;
                return (len > 0).then_some(Ahead { start: fault.end(), len, stride: 0, count: 1 });
            }
            PrefetchPolicy::Adaptive { first, most } => (first, most.max(first)),
        };
        self.tick += 1;
        let tick = self.tick;
        if self.sources.len() >= SOURCES && !self.sources.contains_key(&source) {
            self.forget_oldest();
        }
        let known = self.sources.entry(source).or_insert_with(|| Source { streams: Vec::new(), tick });
        known.tick = tick;
        known.observe(first, most, fault)
    }

    /// Forgets what `source` did: it is gone.
    pub fn forget(&mut self, source: S) {
        self.sources.remove(&source);
    }

    fn forget_oldest(&mut self) {
        let oldest = self.sources.iter().min_by_key(|(_, source)| source.tick).map(|(source, _)| *source);
        if let Some(oldest) = oldest {
            self.sources.remove(&oldest);
        }
    }
}

impl Source {
    fn observe(&mut self, first: u64, most: u64, fault: VirtRange) -> Option<Ahead> {
        if let Some(index) = self.streams.iter().position(|stream| stream.goes_on(fault)) {
            // The one that was met last comes first, and the one at the end makes room for another.
            self.streams[..=index].rotate_right(1);
            return self.streams[0].go_on(first, most, fault);
        }
        // Nothing that is known goes on so: perhaps the last fault and this one are the beginning of it.
        let begun = self.streams.iter().position(|stream| stream.is_followed_by(most, fault));
        match begun {
            Some(index) => {
                self.streams[..=index].rotate_right(1);
                self.streams[0].begin(first, most, fault)
            }
            None => {
                self.streams.truncate(STREAMS - 1);
                self.streams.insert(0, Stream::begun(fault));
                None
            }
        }
    }
}

impl Stream {
    /// Whether `fault` could be the second of a stream, or the third that says at which distance it goes.
    fn is_followed_by(&self, most: u64, fault: VirtRange) -> bool {
        let distance = fault.start().0.wrapping_sub(self.last) as i64;
        // Farther apart than any window reaches is not a stride but two places.
        distance != 0 && distance.unsigned_abs() <= most && (self.window == 0 || self.asked == 0)
    }

    /// A distance was seen. A sequential stream is believed at once, any other when the distance comes again.
    fn begin(&mut self, first: u64, most: u64, fault: VirtRange) -> Option<Ahead> {
        let distance = fault.start().0.wrapping_sub(self.last) as i64;
        let is_next = distance == self.len as i64 || distance == -(fault.len() as i64);
        (self.last, self.len, self.asked) = (fault.start().0, fault.len(), 0);
        self.stride = Some(distance);
        if is_next {
            return self.ask(first, most);
        }
        None
    }

    fn go_on(&mut self, first: u64, most: u64, fault: VirtRange) -> Option<Ahead> {
        let distance = fault.start().0.wrapping_sub(self.last) as i64;
        let stride = self.stride.filter(|_| distance != 0)?;
        let steps = distance / stride;
        let was_late = self.asked > 0 && steps.unsigned_abs() <= self.asked / 2;
        if self.is_dense() {
            // Messages of a stream differ in length, and its faults begin where the last window ended.
            self.len = fault.len();
            self.stride = Some(stride.signum() * fault.len() as i64);
        }
        self.last = fault.start().0;
        self.asked = 0;
        // What comes from the middle of a window says that prefetch is slower than the device: a larger window would not
        // help.
        if !was_late {
            self.window = self.window.saturating_mul(2);
        }
        self.ask(first, most)
    }

    fn ask(&mut self, first: u64, most: u64) -> Option<Ahead> {
        let stride = self.stride?;
        self.window = self.window.clamp(first, most);
        let len = if self.is_dense() { stride.unsigned_abs() } else { self.len };
        if len == 0 {
            return None;
        }
        let pieces = self.window.div_ceil(len);
        let count = if self.is_dense() { pieces } else { pieces.min(MOST_PIECES) };
        self.asked = count;
        if self.is_dense() {
            // One piece; backwards it ends where the fault began.
            let bytes = len.checked_mul(count)?;
            let start =
                if stride > 0 { self.last.checked_add(self.len)? } else { self.last.saturating_sub(bytes) };
            let bytes = if stride > 0 { bytes } else { self.last - start };
            return (bytes > 0).then_some(Ahead { start: VirtAddr(start), len: bytes, stride: 0, count: 1 });
        }
        let start = VirtAddr(self.last.checked_add_signed(stride)?);
        Some(Ahead { start, len, stride, count })
    }
}
