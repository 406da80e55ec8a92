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

/// Cuts ranges into parts of one page size each, wherever the entries saved are worth an indirect entry more.
#[derive(Clone, Debug)]
pub struct Parts<I> {
    runs: Joined<I>,
    next: Option<DmaRange>,
    sizes: PageSizes,
    at: u64,
    failed: bool,
}

impl<I: Iterator<Item = DmaRange>> Parts<I> {
    /// The parts of `ranges` for a device that has `sizes`.
    #[must_use]
    pub fn new(ranges: impl IntoIterator<IntoIter = I>, sizes: PageSizes) -> Self {
        Self { runs: joined(ranges.into_iter()), next: None, sizes, at: 0, failed: false }
    }

    fn alone(&self, run: DmaRange) -> Result<(Fit, ListPlan), PageSizeError> {
        let fit = Fit::new(run, FirstByte::ANY_OFFSET).ok_or(PageSizeError::PastTop { at: self.at })?;
        Ok((fit, ListPlan::of(&fit, fit.best(self.sizes)?)))
    }

    fn take(&mut self, run: DmaRange) -> Result<Part, PageSizeError> {
        let (mut fit, mut list) = self.alone(run)?;
        for run in self.runs.by_ref() {
            let whole =
                fit.then(run).and_then(|fit| Some((fit, ListPlan::of(&fit, fit.best(self.sizes).ok()?))));
            let apart = Fit::new(run, FirstByte::ANY_OFFSET)
                .and_then(|fit| Some(ListPlan::of(&fit, fit.best(self.sizes).ok()?).entries))
                .unwrap_or(u64::MAX);
            match whole {
                Some((whole, plan))
                    if plan.entries.saturating_sub(list.entries) <= apart.saturating_add(INDIRECT_ENTRY) =>
                {
                    (fit, list) = (whole, plan);
                }
                _ => {
                    self.next = Some(run);
                    break;
                }
            }
        }
        let part = Part { at: self.at, list };
        self.at += list.len;
        Ok(part)
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
