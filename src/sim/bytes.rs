//! What the bytes of one page may be: known, or one of several while something that writes them is under way.
//!
//! A page is its known bytes and layers over them. A byte is what is known, or what any layer that covers it says; each
//! byte for itself. A layer of a transfer says what the transfer's source says, which may still change; another says
//! fixed bytes that may or may not have landed; and one says nothing at all.

/// Bytes of a page.
pub const PAGE: usize = 4096;

/// What a layer says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Says {
    /// What the source of this transfer holds, from byte `from` of its message on.
    Transfer {
        /// The transfer.
        id: u64,
        /// Byte of its message.
        from: usize,
    },
    /// These bytes.
    Fixed(Vec<u8>),
    /// Whatever.
    Anything,
}

/// A possibility for some bytes of a page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// First byte in the page.
    pub start: usize,
    /// Bytes.
    pub len: usize,
    /// What they may be.
    pub says: Says,
}

impl Layer {
    /// Whether it covers any of the bytes.
    #[must_use]
    pub fn meets(&self, start: usize, len: usize) -> bool {
        self.start < start + len && start < self.start + self.len
    }

    /// The part of it from `start` up to `end`, if there is any.
    fn part(&self, start: usize, end: usize) -> Option<Self> {
        let (first, last) = (self.start.max(start), (self.start + self.len).min(end));
        if first >= last {
            return None;
        }
        let skipped = first - self.start;
        let says = match &self.says {
            Says::Transfer { id, from } => Says::Transfer { id: *id, from: from + skipped },
            Says::Fixed(bytes) => Says::Fixed(bytes[skipped..skipped + (last - first)].to_vec()),
            Says::Anything => Says::Anything,
        };
        Some(Self { start: first, len: last - first, says })
    }
}

/// The bytes of one page, wherever it is.
#[derive(Clone, Debug, Default)]
pub struct PageBytes {
    /// `None` is all zero.
    known: Option<Box<[u8]>>,
    /// Possibilities besides.
    pub layers: Vec<Layer>,
}

impl PageBytes {
    /// What is known of `[start, start + len)`.
    #[must_use]
    pub fn known(&self, start: usize, len: usize) -> Vec<u8> {
        match &self.known {
            Some(bytes) => bytes[start..start + len].to_vec(),
            None => vec![0; len],
        }
    }

    /// A copy of what is known.
    #[must_use]
    pub fn copy_of_known(&self) -> Self {
        Self { known: self.known.clone(), layers: Vec::new() }
    }

    /// From now on these bytes are `data`, whatever they were. Transfers that are under way may still change them.
    pub fn set(&mut self, start: usize, data: &[u8]) {
        self.forget_fixed(start, data.len());
        if self.known.is_none() && data.iter().all(|byte| *byte == 0) {
            return;
        }
        let known = self.known.get_or_insert_with(|| vec![0; PAGE].into_boxed_slice());
        known[start..start + data.len()].copy_from_slice(data);
    }

    /// From now on all of it is `content`; `None` is zero.
    pub fn reset(&mut self, content: Option<&[u8]>) {
        self.forget_fixed(0, PAGE);
        self.known = content.map(Box::from);
    }

    /// Takes away what else these bytes may be, apart from transfers that are under way.
    fn forget_fixed(&mut self, start: usize, len: usize) {
        let end = start + len;
        let touched = |layer: &Layer| layer.meets(start, len) && !matches!(layer.says, Says::Transfer { .. });
        if !self.layers.iter().any(touched) {
            return;
        }
        let mut kept = Vec::new();
        for layer in self.layers.drain(..) {
            if touched(&layer) {
                kept.extend([layer.part(0, start), layer.part(end, PAGE)].into_iter().flatten());
            } else {
                kept.push(layer);
            }
        }
        self.layers = kept;
    }

    /// Adds fixed bytes that may have landed, unless that says nothing new.
    pub fn maybe(&mut self, start: usize, data: Vec<u8>) {
        if data != self.known(start, data.len()) {
            let layer = Layer { start, len: data.len(), says: Says::Fixed(data) };
            if !self.layers.contains(&layer) {
                self.layers.push(layer);
            }
        }
    }

    /// These bytes may be anything.
    pub fn anything(&mut self, start: usize, len: usize) {
        self.layers.push(Layer { start, len, says: Says::Anything });
    }
}
