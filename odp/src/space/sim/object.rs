//! What can be mapped by several processes: shared memory, files with their page cache, huge pages, DMABUFs.

use super::kernel::Place;
use super::store::DeviceMemoryId;
use std::collections::{BTreeMap, BTreeSet};

/// A shared memory object, file or DMABUF of one host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectId(pub u32);

/// Where pages of a DMABUF are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Residence {
    /// In system memory.
    System,
    /// In the exporter's BAR.
    Peer,
}

/// What an object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ObjectKind {
    /// memfd, shared anonymous, System V.
    Shmem,
    /// Pages of a file, written back and dropped.
    File,
    /// hugetlbfs: huge pages only.
    Hugetlb,
    /// An exporter's buffer: page `n` lives in page `first + n` of its BAR, or in system memory.
    Dmabuf { bar: DeviceMemoryId, first: u32 },
}

/// An object. The pages it holds are held whether mapped or not.
#[derive(Debug)]
pub(super) struct Object {
    pub kind: ObjectKind,
    pub pages: u64,
    /// The page cache.
    pub cache: BTreeMap<u64, Place>,
    /// Pages of a file that differ from its disk.
    pub dirty: BTreeSet<u64>,
    /// What was written back. Pages that never were are zero.
    pub disk: BTreeMap<u64, Box<[u8]>>,
}

impl Object {
    pub fn new(kind: ObjectKind, pages: u64) -> Self {
        Self { kind, pages, cache: BTreeMap::new(), dirty: BTreeSet::new(), disk: BTreeMap::new() }
    }
    pub fn is_file(&self) -> bool {
        self.kind == ObjectKind::File
    }
    pub fn is_dmabuf(&self) -> bool {
        matches!(self.kind, ObjectKind::Dmabuf { .. })
    }
}
