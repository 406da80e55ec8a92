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
    /// File offset of address 0, were the mapping that long; 0 for anonymous memory, where offsets mean nothing.
    origin: u64,
    flags: MapFlags,
}

type Device = (u32, u32);

impl Mapping {
    /// Whether both map the same file.
    pub(super) fn is_of_same_file(&self, other: &Self) -> bool {
        let [one, two] = [self, other].map(|mapping| (mapping.identity.device, mapping.identity.inode));
        self.identity.is_file() && one == two
    }

    /// Whether `other` could be more of the same mapping.
    fn is_like(&self, other: &Self) -> bool {
        (self.source, self.page_size, self.identity) == (other.source, other.page_size, other.identity)
    }

    /// The part that maps `[from, to)` of the file with this inode, if it is of that file, or may be: file systems without
    /// a device of their own (overlayfs, btrfs) do not say the same number everywhere.
    pub(super) fn part_of_file(&self, inode: u64, from: u64, to: u64) -> Option<VirtRange> {
        let Identity { device: (major, _), inode: mapped, origin, .. } = self.identity;
        if !self.identity.is_file() {
            return None;
        }
        if mapped != inode {
            let untold = self.source == Source::File && major == 0;
            return untold.then_some(self.range);
        }
        let place = |offset: u64| offset.saturating_sub(origin.wrapping_add(self.range.start().0));
        let start = place(from).min(self.range.len()) & !(PAGE_SIZE - 1);
        let end = place(to).min(self.range.len()).next_multiple_of(PAGE_SIZE);
        let part = VirtRange::new(self.range.start().offset(start), end.saturating_sub(start))?;
        (!part.is_empty()).then_some(part)
    }
}

impl Identity {
    fn new(device: Device, inode: u64, start: u64, offset: u64, flags: MapFlags) -> Self {
        let found = Self { device, inode, origin: offset.wrapping_sub(start), flags };
        if found.is_file() { found } else { Self { origin: 0, ..found } }
    }

    fn of_query(found: &sys::MapQuery) -> Self {
        let flags = MapFlags::from_bits_truncate(found.flags);
        Self::new((found.dev_major, found.dev_minor), found.inode, found.start, found.offset, flags)
    }

    fn is_file(&self) -> bool {
        self.device != (0, 0) || self.inode != 0
    }
}

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
            return Ok(sys::procmap_query(&self.maps, at.0)?.map(|found| self.queried(&found)));
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

    /// What is mapped at `at`, as far as it can be told apart from something else. Allocates nothing. `None` also where
    /// single mappings cannot be asked for.
    pub(super) fn identity_at(&self, at: VirtAddr) -> Option<Identity> {
        let found = if self.query { sys::procmap_query(&self.maps, at.0).ok()?? } else { return None };
        (found.start <= at.0).then(|| Identity::of_query(&found))
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

    /// The part of `within` that is mapped as the two ends of `range` are. Mappings that meet and are alike are one: watching
    /// cuts them.
    pub(super) fn alike(&self, range: VirtRange, within: VirtRange) -> VirtRange {
        let mut found = Vec::new();
        // A mapping that cannot be read is one of which nothing is known.
        if self.collect(within, &mut found).is_err() {
            return range;
        }
        let (mut low, mut high) = (range.start(), range.end());
        for run in found.chunk_by(|one, next| one.range.end() == next.range.start() && one.is_like(next)) {
            let (start, end) = (run[0].range.start(), run[run.len() - 1].range.end());
            if start <= range.start() && range.start() < end {
                low = start.max(within.start());
            }
            if start < range.end() && range.end() <= end {
                high = end.min(within.end());
            }
        }
        VirtRange::new(low, high.0 - low.0).expect("part of what it is in")
    }

    fn queried(&self, found: &sys::MapQuery) -> Mapping {
        self.mapping((found.start, found.end), Identity::of_query(found), found.page_size)
    }

    fn mapping(&self, (start, end): (u64, u64), identity: Identity, page_size: u64) -> Mapping {
        let source = match (identity.is_file(), page_size > PAGE_SIZE) {
            (_, true) => Source::Hugetlb,
            (true, _) => self.source(identity.device),
            (false, _) => Source::Anonymous,
        };
        Mapping {
            range: VirtRange::new(VirtAddr(start), end - start).expect("mappings lie in the address space"),
            readable: identity.flags.contains(MapFlags::READ),
            writable: identity.flags.contains(MapFlags::WRITE),
            shared: identity.flags.contains(MapFlags::SHARED),
            source,
            page_size: if source == Source::Hugetlb { page_size.max(HUGE_DEFAULT) } else { PAGE_SIZE },
            identity,
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
        let mut flags = MapFlags::empty();
        flags.set(MapFlags::READ, access.first()? == &b'r');
        flags.set(MapFlags::WRITE, access.get(1)? == &b'w');
        flags.set(MapFlags::SHARED, access.get(3)? == &b's');
        let offset = hex(fields.next()?)?;
        let (major, minor) = fields.next()?.split_once(':')?;
        let device = (hex(major)? as u32, hex(minor)? as u32);
        let inode = fields.next()?.parse().ok()?;
        Some(self.mapping((start, end), Identity::new(device, inode, start, offset, flags), PAGE_SIZE))
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
