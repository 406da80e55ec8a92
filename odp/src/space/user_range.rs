//! A range of memory that may be given to devices.
//!
//! Unsafe island. Invariant: a [`UserRange`] exists only for memory that devices may read and write at any time without
//! breaking a Rust reference: memory we own and never lend (safe constructors), or memory for which somebody vouched in
//! [`UserRange::from_raw`].
#![allow(unsafe_code)]

use super::anchored::Anchored;
use super::sim::SimSpace;
use super::{AddressSpace, WatchError};
use hw_model::addr::VirtRange;
use hw_model::sync::Arc;
use std::any::Any;
use std::fmt;

/// A range of an address space that regions may be made of. Registration takes this, so that registering is safe: what
/// is unsafe, if anything, is saying that the memory may be used so.
#[derive(Clone)]
pub struct UserRange {
    space: Arc<dyn AddressSpace>,
    range: VirtRange,
    owner: Option<Arc<dyn Any + Send + Sync>>,
}

impl UserRange {
    /// Any range of `space`, mapped or not: what is not mapped is refused at registration or at the fault, and memory
    /// that is unmapped later is noticed.
    ///
    /// # Safety
    /// While a region over the range is registered, its bytes may change at any moment through another thread's raw
    /// pointers. No Rust reference may exist to any of them, and no allocator may own them as free memory, unless the
    /// region allows reading only and nothing else writes them.
    #[must_use]
    pub unsafe fn from_raw(space: Arc<dyn AddressSpace>, range: VirtRange) -> Self {
        Self { space, range, owner: None }
    }

    /// All memory of `space`, that which is mapped now and that which will be. For implicit regions.
    ///
    /// # Safety
    /// As [`UserRange::from_raw`], for every byte that a request of this process, or of a peer who knows the key, names.
    #[must_use]
    pub unsafe fn everything(space: Arc<dyn AddressSpace>) -> Self {
        let range = space.addresses();
        Self { space, range, owner: None }
    }

    /// A range of a simulated process. Its bytes are reached by copies only, so no Rust reference to them exists.
    #[must_use]
    pub fn simulated(space: &Arc<SimSpace>, range: VirtRange) -> Self {
        Self { space: Arc::clone(space) as Arc<dyn AddressSpace>, range, owner: None }
    }

    /// A range of memory that the address space allocated itself, or that an exporter of ours has, and lends out by copies and
    /// raw pointers only. `owner` keeps it there.
    pub(super) fn owned(
        space: Arc<dyn AddressSpace>,
        range: VirtRange,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        Self { space, range, owner: Some(owner) }
    }

    /// The same range, holding `owner` for as long as this value lives: the memory's mapping, say.
    #[must_use]
    pub fn keeping(self, owner: Arc<dyn Any + Send + Sync>) -> Self {
        Self { owner: Some(owner), ..self }
    }

    /// The same range for as long as it stays mapped as it is: a page that is unmapped, moved away, or has another mapping put
    /// in its place is refused from then on, and memory that is mapped there later is not reached through this. The range is
    /// grown to whole pages. How soon that is noticed is a matter of the rung: see `anchored.rs`.
    ///
    /// # Errors
    /// See [`WatchError`].
    pub fn anchored(&self) -> Result<Self, WatchError> {
        let space = Anchored::new(Arc::clone(&self.space), self.range.page_aligned())?;
        Ok(Self { space: Arc::new(space), ..self.clone() })
    }

    /// The part of `len` bytes from `offset` on; `None` if it is not inside.
    #[must_use]
    pub fn part(&self, offset: u64, len: u64) -> Option<Self> {
        let range = VirtRange::new(self.range.start().checked_add(offset)?, len)?;
        self.range.contains(range).then(|| Self { range, ..self.clone() })
    }

    /// The same range, holding nothing.
    ///
    /// # Safety
    /// The memory may go while this value lives. Whoever registers it is told of that before it goes, by a notifier that
    /// brackets the change, and has then made sure that no page becomes present in the region any more.
    #[must_use]
    pub unsafe fn without_owner(&self) -> Self {
        Self { owner: None, ..self.clone() }
    }

    /// Both ranges and nothing between them. `None` unless they lie in one space, are held by the same owner or by none, and
    /// touch or overlap.
    #[must_use]
    pub fn joined(&self, other: &Self) -> Option<Self> {
        let same_owner = match (&self.owner, &other.owner) {
            (None, None) => true,
            (Some(ours), Some(theirs)) => std::ptr::addr_eq(Arc::as_ptr(ours), Arc::as_ptr(theirs)),
            _ => false,
        };
        let same_space = std::ptr::addr_eq(Arc::as_ptr(&self.space), Arc::as_ptr(&other.space));
        let (ours, theirs) = (self.range, other.range);
        let follows = |a: VirtRange, b: VirtRange| {
            !b.is_empty() && a.last().and_then(|last| last.checked_add(1)) == Some(b.start())
        };
        let touch = ours.overlaps(theirs) || follows(ours, theirs) || follows(theirs, ours);
        if !(same_owner && same_space && touch) {
            return None;
        }
        let start = ours.start().min(theirs.start());
        let last = ours.last()?.max(theirs.last()?);
        let range = VirtRange::new(start, last.0 - start.0 + 1)?;
        Some(Self { range, ..self.clone() })
    }

    /// What keeps the memory there, if anything does.
    #[must_use]
    pub fn owner(&self) -> Option<&Arc<dyn Any + Send + Sync>> {
        self.owner.as_ref()
    }

    /// The address space.
    #[must_use]
    pub fn space(&self) -> &Arc<dyn AddressSpace> {
        &self.space
    }
    /// The addresses.
    #[must_use]
    pub fn range(&self) -> VirtRange {
        self.range
    }
    /// Whether the memory is kept mapped while this value lives.
    #[must_use]
    pub fn is_owned(&self) -> bool {
        self.owner.is_some()
    }
}

impl fmt::Debug for UserRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UserRange").field("range", &self.range).field("owned", &self.is_owned()).finish()
    }
}
