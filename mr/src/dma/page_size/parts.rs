//! Memory cut into lists of one page size each, for an indirect key over them.

use super::{DmaRange, FirstByte, Fit, Joined, ListPlan, PageSizeError, PageSizes, joined};

/// What an indirect entry costs beside the entries of its list, in words of a page list: key, address and length of its
/// own, and a look-up more at every access.
const INDIRECT_ENTRY: u64 = 4;

/// One list of several: what an indirect entry names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Bytes of the whole before it.
    pub at: u64,
    /// The list. It is zero-based: the device keeps the offset of the first byte.
    pub list: ListPlan,
}

impl Part {
    /// If every part but the last has the same length, a power of two, and the last is not longer: that length. Then an
    /// indirect list of entries of a fixed size will do (as mlx5 KSM), where the device computes the entry; else each
    /// entry has its own length (as KLM), and the device searches.
    #[must_use]
    pub fn fixed_size(parts: &[Self]) -> Option<u64> {
        let (last, before) = parts.split_last()?;
        let size = before.first().map_or(last.list.len.checked_next_power_of_two()?, |part| part.list.len);
        let uniform = size.is_power_of_two() && before.iter().all(|part| part.list.len == size);
        (uniform && last.list.len <= size).then_some(size)
    }
}

/// Cuts ranges into parts of one page size each.
#[derive(Clone, Debug)]
pub struct Parts<I> {
    runs: Joined<I>,
    next: Option<DmaRange>,
    sizes: PageSizes,
    /// Entries of one list at most.
    longest: Option<u64>,
    at: u64,
    failed: bool,
}

impl<I: Iterator<Item = DmaRange>> Parts<I> {
    /// The parts of `ranges` for a device that has `sizes`: cut wherever the entries saved are worth an indirect entry.
    #[must_use]
    pub fn new(ranges: impl IntoIterator<IntoIter = I>, sizes: PageSizes) -> Self {
        Self { runs: joined(ranges.into_iter()), next: None, sizes, longest: None, at: 0, failed: false }
    }

    /// As few parts as possible of at most `longest` entries each (at least 1): cut only where a list must end.
    #[must_use]
    pub fn longest(ranges: impl IntoIterator<IntoIter = I>, sizes: PageSizes, longest: u64) -> Self {
        Self { longest: Some(longest.max(1)), ..Self::new(ranges, sizes) }
    }

    fn alone(&self, run: DmaRange) -> Result<(Fit, ListPlan), PageSizeError> {
        let fit = Fit::new(run, FirstByte::ANY_OFFSET).ok_or(PageSizeError::PastTop { at: self.at })?;
        Ok((fit, ListPlan::of(&fit, fit.best(self.sizes)?)))
    }

    fn take(&mut self, run: DmaRange) -> Result<Part, PageSizeError> {
        let (mut fit, mut list) = self.alone(run)?;
        if let Some(longest) = self.longest.filter(|longest| list.entries > *longest) {
            // One run, too long for one list: the rest begins with a page of this list.
            let len = longest * list.page_size.bytes() - list.offset;
            self.next = Some(DmaRange { dma: run.dma.offset(len), len: run.len - len });
            (_, list) = self.alone(DmaRange { len, ..run })?;
        } else {
            while let Some(run) = self.runs.next() {
                match self.with(&fit, &list, run) {
                    Some(whole) => (fit, list) = whole,
                    None => {
                        self.next = Some(run);
                        break;
                    }
                }
            }
        }
        let part = Part { at: self.at, list };
        self.at += list.len;
        Ok(part)
    }

    /// The list with `run` at its end, if that is possible and better than another list.
    fn with(&self, fit: &Fit, list: &ListPlan, run: DmaRange) -> Option<(Fit, ListPlan)> {
        let whole = fit.then(run)?;
        let plan = ListPlan::of(&whole, whole.best(self.sizes).ok()?);
        let better = match self.longest {
            Some(longest) => plan.entries <= longest,
            None => {
                let alone = Fit::new(run, FirstByte::ANY_OFFSET)?;
                let apart = ListPlan::of(&alone, alone.best(self.sizes).ok()?).entries;
                plan.entries.saturating_sub(list.entries) <= apart.saturating_add(INDIRECT_ENTRY)
            }
        };
        better.then_some((whole, plan))
    }
}

impl<I: Iterator<Item = DmaRange>> Iterator for Parts<I> {
    /// A part, or what no list can hold; nothing comes after that.
    type Item = Result<Part, PageSizeError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let run = self.next.take().or_else(|| self.runs.next())?;
        let part = self.take(run);
        self.failed = part.is_err();
        Some(part)
    }
}
