//! What a point is about, and what a rule asks of it.

use crate::wire::{Key, Qpn};
use std::ops::Range;

/// Which way a packet or a request goes, in the words of hfi1's fault injection (Documentation of its debugfs files).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Sent from here, or asked for by a work request of ours.
    Send,
    /// Received here, or asked for by a peer.
    Receive,
}

impl Direction {
    /// Its word in a plan.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Send => "send",
            Self::Receive => "receive",
        }
    }
}

/// What is happening at a point, as far as the code there knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Subject {
    /// The memory key.
    pub key: Option<Key>,
    /// The queue pair.
    pub qpn: Option<Qpn>,
    /// First address, and bytes from there on.
    pub memory: Option<(u64, u64)>,
    /// What the packet is: a word such as `write_first`.
    pub opcode: Option<&'static str>,
    /// Which way it goes.
    pub direction: Option<Direction>,
    /// What kind of page it is: a word such as `hugetlb` ([`Backing::name`](crate::hca::Backing::name)).
    pub page: Option<&'static str>,
}

/// What a rule asks of the subject. What the point does not know fulfils nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Only {
    /// This key.
    pub key: Option<Key>,
    /// This queue pair.
    pub qpn: Option<Qpn>,
    /// Some byte at one of these addresses.
    pub memory: Option<Range<u64>>,
    /// This opcode, or one that begins with it and an underscore: `write` is every packet of an RDMA write.
    pub opcode: Option<String>,
    /// This way.
    pub direction: Option<Direction>,
    /// This kind of page.
    pub page: Option<&'static str>,
}

impl Only {
    /// Whether `subject` is meant.
    #[must_use]
    pub fn admits(&self, subject: &Subject) -> bool {
        fn asked<T: PartialEq>(asked: Option<T>, known: Option<T>) -> bool {
            asked.is_none() || asked == known
        }
        let memory = self.memory.as_ref().is_none_or(|asked| {
            subject.memory.is_some_and(|(start, length)| {
                // The last byte, so that the top of the address space is not passed.
                let last = start.saturating_add(length.max(1) - 1);
                start < asked.end && last >= asked.start
            })
        });
        let opcode = self.opcode.as_ref().is_none_or(|asked| {
            subject
                .opcode
                .and_then(|known| known.strip_prefix(asked.as_str()))
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('_'))
        });
        let direction = asked(self.direction, subject.direction);
        let page = asked(self.page, subject.page);
        memory && opcode && direction && page && asked(self.key, subject.key) && asked(self.qpn, subject.qpn)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_that_asks_for_nothing_means_everything() {
        assert!(Only::default().admits(&Subject::default()));
        assert!(Only::default().admits(&Subject { key: Some(Key(1)), ..Subject::default() }));
    }

    #[test]
    fn what_a_point_does_not_know_fulfils_nothing() {
        let asks = [
            Only { key: Some(Key(1)), ..Only::default() },
            Only { qpn: Some(Qpn(2)), ..Only::default() },
            Only { memory: Some(0..u64::MAX), ..Only::default() },
            Only { opcode: Some("send".into()), ..Only::default() },
            Only { direction: Some(Direction::Send), ..Only::default() },
            Only { page: Some("file"), ..Only::default() },
        ];
        for only in asks {
            assert!(!only.admits(&Subject::default()), "{only:?}");
        }
    }

    #[test]
    fn memory_is_meant_if_one_byte_of_it_is() {
        let only = Only { memory: Some(0x1000..0x2000), ..Only::default() };
        let admits =
            |start, length| only.admits(&Subject { memory: Some((start, length)), ..Subject::default() });
        assert!(admits(0x1000, 1) && admits(0x1fff, 1) && admits(0xfff, 2) && admits(0, u64::MAX));
        assert!(!admits(0xfff, 1) && !admits(0x2000, 1) && !admits(0, 0) && !admits(u64::MAX, 8));
    }

    #[test]
    fn the_beginning_of_an_opcode_means_all_of_its_packets() {
        let only = Only { opcode: Some("write".into()), ..Only::default() };
        let admits = |opcode| only.admits(&Subject { opcode: Some(opcode), ..Subject::default() });
        assert!(admits("write_first") && admits("write"));
        assert!(!admits("writes") && !admits("send_first") && !admits("wri"));
    }
}
