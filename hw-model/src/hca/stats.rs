//! What an HCA counted. Counters only go up.

use super::request::Status;
use crate::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// What an HCA has counted since it was made.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct HcaStats {
            $($(#[$doc])* pub $name: u64,)*
            completions: [u64; Status::ALL.len()],
        }

        impl HcaStats {
            /// Every counter but that of completions, with its name.
            #[must_use]
            pub fn named(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name),)*]
            }
        }

        /// The counters of one engine.
        #[derive(Default)]
        pub(super) struct Counters {
            $(pub(super) $name: Counter,)*
            completions: [Counter; Status::ALL.len()],
        }

        impl Counters {
            pub(super) fn add_to(&self, stats: &mut HcaStats) {
                $(stats.$name += self.$name.get();)*
                for (sum, counter) in stats.completions.iter_mut().zip(&self.completions) {
                    *sum += counter.get();
                }
            }
        }
    };
}

counters! {
    /// Calls of an engine's step, idle ones too. Stands still while the device sleeps.
    steps,
    /// Packets sent, acknowledgements too.
    packets_sent,
    /// Packets received that belonged to a queue pair.
    packets_received,
    /// Packets dropped: no such queue pair, not its peer, not in a state to take it, out of place.
    packets_dropped,
    /// Payload bytes sent.
    bytes_sent,
    /// Packets that said where their bytes are, instead of holding them.
    loans,
    /// Of those received, such whose bytes were not there any more: the lender sent them again.
    loans_given_back,
    /// Payload bytes placed in memory.
    bytes_placed,
    /// Page faults of requesters that were posted as events.
    faults_by_work_request,
    /// Page faults of responders that were posted as events.
    faults_by_remote_access,
    /// Times that the event queue had no room for a fault.
    fault_queue_full,
    /// Answers to faults that nobody waited for any more.
    stale_answers,
    /// Page faults that were posted as events of a range of memory.
    faults_by_range,
    /// Page faults that waited for the answer to an event of another.
    faults_joined,
    /// Entries of page lists that a translation cache knew.
    page_cache_hits,
    /// Those that it did not.
    page_cache_misses,
    /// Keys that a key cache knew.
    key_cache_hits,
    /// Those that it did not.
    key_cache_misses,
    /// Times that a translation cache was emptied, as a key had changed or software wanted it.
    translation_flushes,
    /// RNR NAKs sent.
    rnr_naks_sent,
    /// RNR NAKs received.
    rnr_naks_received,
    /// Other NAKs sent.
    naks_sent,
    /// Other NAKs received.
    naks_received,
    /// Times that a requester went back and sent again, RNR aside.
    retries,
    /// Of those, because of the acknowledge timeout.
    timeouts,
    /// Requests that a responder saw again and answered again.
    duplicates,
    /// DMA that the bus refused for another reason than a page that went away: a stale translation, an IOMMU fault, an
    /// address that nobody answers to. Always a mistake of the software that filled the page list.
    dma_refused,
    /// Times that an engine found the DMA epoch closed.
    epoch_closed,
    /// Completions that found their queue full.
    cq_overruns,
}

impl HcaStats {
    /// Requests that ended with `status`, unsignaled ones too.
    #[must_use]
    pub fn completions(&self, status: Status) -> u64 {
        self.completions[status as usize]
    }
}

impl Counters {
    pub(super) fn completed(&self, status: Status) {
        self.completions[status as usize].add(1);
    }
}

/// A counter with one writer at a time (the holder of its engine), so counting takes no locked instruction.
#[derive(Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn add(&self, count: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(count), Ordering::Relaxed);
    }
    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Objects that exist at the moment: what a leak test compares before and after.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LiveObjects {
    /// Protection domains.
    pub pds: u64,
    /// Keys.
    pub keys: u64,
    /// Completion queues.
    pub cqs: u64,
    /// Queue pairs.
    pub qps: u64,
    /// Completion channels.
    pub channels: u64,
    /// Bytes of device memory.
    pub device_memory: u64,
    /// Address handles.
    pub ahs: u64,
    /// Shared receive queues.
    pub srqs: u64,
}
