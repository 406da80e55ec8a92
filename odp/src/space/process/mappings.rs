//! What is mapped where: /proc/self/maps, by query where the kernel has PROCMAP_QUERY (6.11), else by reading it.
//!
//! Which file system a file-backed mapping belongs to comes from its device number: the internal mounts behind memfd,
//! shared anonymous and System V memory, and hugetlb, are known from memfds made for the purpose, the mounted ones from
//! /proc/self/mountinfo. A tmpfs that is mounted only in another namespace is taken for a file.

use super::sys::{self, MapFlags};
use hw_model::addr::{PAGE_SIZE, VirtAddr, VirtRange};
use hw_model::sync::RwLock;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{MemfdFlags, Mode, OFlags};
use rustix::io::Errno;
use std::collections::BTreeMap;

/// One mapping of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mapping {
    pub(super) range: VirtRange,
    pub(super) readable: bool,
    pub(super) writable: bool,
    pub(super) shared: bool,
    pub(super) source: Source,
    /// Bytes of one page of it: more than 4 KiB only for hugetlb.
    pub(super) page_size: u64,
    pub(super) identity: Identity,
}

/// Where a mapping's pages come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    Anonymous,
    File,
    Shmem,
    Hugetlb,
}

/// What tells one mapping from another put in its place. Two anonymous mappings are alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    device: Device,
    inode: u64,
    /// File offset of address 0, were the mapping that long; 0 for anonymous memory, whose splits keep no offset.
    origin: u64,
    access: (bool, bool, bool),
}

type Device = (u32, u32);

/// Reads this process's mappings.
pub(super) struct Mappings {
    maps: OwnedFd,
    query: bool,
    kinds: RwLock<BTreeMap<Device, Source>>,
}

impl Mappings {
    /// `query` allows PROCMAP_QUERY.
    pub(super) fn open(query: bool) -> Result<Self, Errno> {
        let maps = rustix::fs::open("/proc/self/maps", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        let query = query && Self::probe(&maps).is_ok();
        let mut kinds = BTreeMap::new();
        let sizes = [MemfdFlags::HUGETLB, MemfdFlags::HUGETLB | MemfdFlags::HUGE_1GB];
        for (flags, source) in [(MemfdFlags::empty(), Source::Shmem)]
            .into_iter()
            .chain(sizes.map(|flags| (flags, Source::Hugetlb)))
        {
            if let Ok(file) = rustix::fs::memfd_create("anypage-probe", flags | MemfdFlags::CLOEXEC) {
                let device = rustix::fs::fstat(&file)?.st_dev;
                kinds.insert((rustix::fs::major(device), rustix::fs::minor(device)), source);
            }
        }
        Ok(Self { maps, query, kinds: RwLock::new(kinds) })
    }

    /// Whether the kernel answers PROCMAP_QUERY.
    pub(super) fn probe(maps: impl AsFd) -> Result<(), Errno> {
        sys::procmap_query(maps, 0).map(drop)
    }

    /// Whether single mappings can be asked for.
    pub(super) fn can_query(&self) -> bool {
        self.query
    }

    /// The mapping that holds `at`, or the next above it. Allocates nothing while [`Mappings::can_query`].
    pub(super) fn at_or_above(&self, at: VirtAddr) -> Result<Option<Mapping>, Errno> {
        if self.query {
            return Ok(sys::procmap_query(&self.maps, at.0)?.map(|found| self.from_query(&found)));
        }
        let mut found = None;
        self.parse(|mapping| {
            if mapping.range.last().is_some_and(|last| last >= at) {
                found = Some(mapping);
            }
            found.is_none()
        })?;
        Ok(found)
    }

    /// Appends the mappings that overlap `range`, in ascending order, as they are (not cut to it).
    pub(super) fn collect(&self, range: VirtRange, out: &mut Vec<Mapping>) -> Result<(), Errno> {
        let Some(last) = range.last() else { return Ok(()) };
        if !self.query {
            return self.parse(|mapping| {
                if mapping.range.overlaps(range) {
                    out.push(mapping);
                }
                mapping.range.start() <= last
            });
        }
        let mut at = range.start();
        while let Some(mapping) = self.at_or_above(at)? {
            if !mapping.range.overlaps(range) {
                break;
            }
            out.push(mapping);
            at = mapping.range.end();
            if at > last || at.0 == 0 {
                break;
            }
        }
        Ok(())
    }

    fn from_query(&self, found: &sys::MapQuery) -> Mapping {
        let flags = MapFlags::from_bits_truncate(found.flags);
        let access = (
            flags.contains(MapFlags::READ),
            flags.contains(MapFlags::WRITE),
            flags.contains(MapFlags::SHARED),
        );
        let device = (found.dev_major, found.dev_minor);
        self.mapping((found.start, found.end), access, device, found.inode, found.offset, found.page_size)
    }

    fn mapping(
        &self,
        (start, end): (u64, u64),
        access: (bool, bool, bool),
        device: Device,
        inode: u64,
        offset: u64,
        page_size: u64,
    ) -> Mapping {
        let file = device != (0, 0) || inode != 0;
        let source = match (file, page_size > PAGE_SIZE) {
            (_, true) => Source::Hugetlb,
            (true, _) => self.source(device),
            (false, _) => Source::Anonymous,
        };
        let origin = if file { offset.wrapping_sub(start) } else { 0 };
        Mapping {
            range: VirtRange::new(VirtAddr(start), end - start).expect("mappings lie in the address space"),
            readable: access.0,
            writable: access.1,
            shared: access.2,
            source,
            page_size: if source == Source::Hugetlb { page_size.max(HUGE_DEFAULT) } else { PAGE_SIZE },
            identity: Identity { device, inode, origin, access },
        }
    }

    fn source(&self, device: Device) -> Source {
        if let Some(known) = self.kinds.read().get(&device) {
            return *known;
        }
        let mut kinds = self.kinds.read().clone();
        for (mounted, source) in mounts() {
            kinds.entry(mounted).or_insert(source);
        }
        let source = *kinds.entry(device).or_insert(Source::File);
        *self.kinds.write() = kinds;
        source
    }

    /// Hands each mapping to `each` until it says false.
    fn parse(&self, mut each: impl FnMut(Mapping) -> bool) -> Result<(), Errno> {
        // Each line is true at one moment, the file as a whole is not: the notifier's sequence decides.
        let text = std::fs::read_to_string("/proc/self/maps")
            .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        for line in text.lines() {
            if let Some(mapping) = self.parse_line(line)
                && !each(mapping)
            {
                break;
            }
        }
        Ok(())
    }

    fn parse_line(&self, line: &str) -> Option<Mapping> {
        let mut fields = line.split_ascii_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let (start, end) = (hex(start)?, hex(end)?);
        let access = fields.next()?.as_bytes();
        let access = (access.first()? == &b'r', access.get(1)? == &b'w', access.get(3)? == &b's');
        let offset = hex(fields.next()?)?;
        let (major, minor) = fields.next()?.split_once(':')?;
        let device = (hex(major)? as u32, hex(minor)? as u32);
        let inode = fields.next()?.parse().ok()?;
        Some(self.mapping((start, end), access, device, inode, offset, PAGE_SIZE))
    }
}

/// The smallest huge page, for mappings whose page size the maps file does not tell.
const HUGE_DEFAULT: u64 = 2 << 20;

fn hex(text: &str) -> Option<u64> {
    u64::from_str_radix(text, 16).ok()
}

/// The file systems mounted in our namespace (Documentation/filesystems/proc.rst, 3.5).
fn mounts() -> Vec<(Device, Source)> {
    let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mount = |line: &str| {
        let (major, minor) = line.split_ascii_whitespace().nth(2)?.split_once(':')?;
        let kind = line.split_once(" - ")?.1.split_ascii_whitespace().next()?;
        let source = match kind {
            "tmpfs" | "devtmpfs" => Source::Shmem,
            "hugetlbfs" => Source::Hugetlb,
            _ => Source::File,
        };
        Some(((major.parse().ok()?, minor.parse().ok()?), source))
    };
    text.lines().filter_map(mount).collect()
}
