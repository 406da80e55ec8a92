//! What is mapped where: the mappings of one process.

use super::object::ObjectId;
use super::span::Span;
use crate::space::Access;
use hw_model::addr::VirtAddr;
use std::collections::BTreeMap;

/// What a mapping allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protection {
    /// PROT_NONE.
    None,
    /// PROT_READ.
    Read,
    /// PROT_READ and PROT_WRITE.
    ReadWrite,
}

impl Protection {
    /// Whether the mapping allows `access`.
    #[must_use]
    pub fn allows(self, access: Access) -> bool {
        match access {
            Access::Read => self != Self::None,
            Access::Write => self == Self::ReadWrite,
        }
    }
}

/// Whether the memory of a mapping is encrypted, in a guest whose memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Encryption {
    /// Not an encrypted guest.
    #[default]
    Plain,
    /// Private to the guest: no device reaches it.
    Private,
    /// Shared with devices.
    Shared,
}

/// Where the bytes of a mapping come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Zeroes, private.
    Anonymous,
    /// An object from page `first` on, written through.
    Shared {
        /// The object.
        object: ObjectId,
        /// Its page that the mapping begins with.
        first: u64,
    },
    /// An object from page `first` on; a page that is written becomes the process's own copy.
    Private {
        /// The object.
        object: ObjectId,
        /// Its page that the mapping begins with.
        first: u64,
    },
    /// Memory without pages (VM_PFNMAP): nothing can fault it in.
    Special,
}

impl Source {
    /// The same source `pages` further on.
    fn advanced(self, pages: u64) -> Self {
        match self {
            Self::Shared { object, first } => Self::Shared { object, first: first + pages },
            Self::Private { object, first } => Self::Private { object, first: first + pages },
            Self::Anonymous | Self::Special => self,
        }
    }
}

/// A mapping to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapRequest {
    /// Where exactly, replacing what is there (MAP_FIXED); `None` lets the host choose.
    pub at: Option<VirtAddr>,
    /// Its length in pages.
    pub pages: u64,
    /// What it maps.
    pub source: Source,
    /// What it allows.
    pub protection: Protection,
    /// Whether it may get huge pages when first touched. A place the host chooses is aligned for them then.
    pub huge: bool,
}

impl MapRequest {
    /// Private anonymous memory, readable and writable, in small pages, wherever there is room.
    #[must_use]
    pub fn anonymous(pages: u64) -> Self {
        Self { at: None, pages, source: Source::Anonymous, protection: Protection::ReadWrite, huge: false }
    }
    /// All the same, of another source.
    #[must_use]
    pub fn of(self, source: Source) -> Self {
        Self { source, ..self }
    }
    /// All the same, with huge pages.
    #[must_use]
    pub fn huge(self) -> Self {
        Self { huge: true, ..self }
    }
    /// All the same, with another protection.
    #[must_use]
    pub fn protected(self, protection: Protection) -> Self {
        Self { protection, ..self }
    }
    /// All the same, at exactly this place.
    #[must_use]
    pub fn fixed(self, at: VirtAddr) -> Self {
        Self { at: Some(at), ..self }
    }
}

/// One mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Vma {
    pub span: Span,
    pub source: Source,
    pub protection: Protection,
    pub huge: bool,
    pub encryption: Encryption,
}

impl Vma {
    /// The object and its page that `page` of the address space maps.
    pub fn object_page(&self, page: u64) -> Option<(ObjectId, u64)> {
        match self.source {
            Source::Shared { object, first } | Source::Private { object, first } => {
                Some((object, first + (page - self.span.first)))
            }
            Source::Anonymous | Source::Special => None,
        }
    }

    /// The pages of the address space that map pages `of` of `object`.
    pub fn mapping_of(&self, object: ObjectId, of: Span) -> Option<Span> {
        let (mapped, first) = self.object_page(self.span.first)?;
        if mapped != object {
            return None;
        }
        let part = Span::new(first, first + self.span.len()).intersection(of)?;
        let at = |page: u64| self.span.first + (page - first);
        Some(Span::new(at(part.first), at(part.end)))
    }

    pub fn is_shared(&self) -> bool {
        matches!(self.source, Source::Shared { .. })
    }

    /// The part of it in `span`.
    fn part(&self, span: Span) -> Option<Self> {
        let span = self.span.intersection(span)?;
        Some(Self { span, source: self.source.advanced(span.first - self.span.first), ..*self })
    }
}

/// The mappings of one process, by first page. They never overlap.
#[derive(Clone, Debug, Default)]
pub(super) struct Vmas(BTreeMap<u64, Vma>);

impl Vmas {
    pub fn at(&self, page: u64) -> Option<&Vma> {
        self.0.range(..=page).next_back().map(|(_, vma)| vma).filter(|vma| page < vma.span.end)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Vma> {
        self.0.values()
    }

    /// The mappings that overlap `span`, whole.
    pub fn overlapping(&self, span: Span) -> impl Iterator<Item = &Vma> {
        let from = self.at(span.first).map_or(span.first, |vma| vma.span.first);
        self.0.range(from..span.end.max(from)).map(|(_, vma)| vma)
    }

    /// First page of `span` that is not mapped.
    pub fn first_hole(&self, span: Span) -> Option<u64> {
        let mut page = span.first;
        while page < span.end {
            let Some(vma) = self.at(page) else { return Some(page) };
            page = vma.span.end;
        }
        None
    }

    /// Takes out what lies in `span`, cutting the mappings at its edges.
    pub fn cut(&mut self, span: Span) -> Vec<Vma> {
        let touched: Vec<Vma> = self.overlapping(span).copied().collect();
        let mut taken = Vec::new();
        for vma in touched {
            self.0.remove(&vma.span.first);
            let (before, after) = (Span::new(0, span.first), Span::new(span.end, u64::MAX));
            for rest in [vma.part(before), vma.part(after)].into_iter().flatten() {
                self.insert(rest);
            }
            taken.extend(vma.part(span));
        }
        taken
    }

    /// Puts `vma` where nothing is mapped.
    pub fn insert(&mut self, vma: Vma) {
        debug_assert!(self.overlapping(vma.span).next().is_none());
        self.0.insert(vma.span.first, vma);
    }
}
