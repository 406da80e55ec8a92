//! Nodes of ranges in address order, and holes among them by size.
//!
//! Counted in IO pages. Two neighbouring nodes are never both free. A class holds sizes that differ by at most a
//! sixteenth: sizes below 16 have a class each, larger ones sixteen classes an octave.

/// The number of a node.
pub(super) type NodeId = u32;
/// No node.
const NIL: NodeId = NodeId::MAX;

const SUB_SHIFT: u32 = 4;
const SUBS: usize = 1 << SUB_SHIFT;
/// Octaves of 48 bits of pages.
const OCTAVES: usize = 49 - SUB_SHIFT as usize;

/// What a range has to be, in pages.
#[derive(Clone, Copy, Debug)]
pub(super) struct Want {
    pub(super) pages: u64,
    /// Its start is `phase` more than a multiple of `align`, a power of two.
    pub(super) align: u64,
    pub(super) phase: u64,
    /// It ends at or below this.
    pub(super) limit: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum State {
    /// The node stands for nothing and waits in the list of such.
    Unused = 0,
    Free = 1,
    Live = 2,
    Reserved = 3,
}

/// 32 bytes, two to a cache line: freeing touches a node and its neighbours, and that is what it costs.
#[derive(Clone, Copy, Debug)]
#[repr(align(32))]
struct Node {
    start: u64,
    /// Pages, and above [`STATE_SHIFT`] the state.
    extent: u64,
    /// Neighbours in address order, within the zone.
    below: NodeId,
    above: NodeId,
    /// Neighbours in the list of the class; of unused nodes, `next` alone.
    previous: NodeId,
    next: NodeId,
}

const STATE_SHIFT: u32 = 62;

impl Node {
    fn new(start: u64, pages: u64) -> Self {
        let mut node = Self { start, extent: pages, below: NIL, above: NIL, previous: NIL, next: NIL };
        node.set_state(State::Live);
        node
    }
    fn pages(&self) -> u64 {
        self.extent & ((1 << STATE_SHIFT) - 1)
    }
    fn end(&self) -> u64 {
        self.start + self.pages()
    }
    fn set_pages(&mut self, pages: u64) {
        self.extent = pages | (self.extent >> STATE_SHIFT << STATE_SHIFT);
    }
    fn is(&self, state: State) -> bool {
        self.extent >> STATE_SHIFT == state as u64
    }
    fn set_state(&mut self, state: State) {
        self.extent = self.pages() | (state as u64) << STATE_SHIFT;
    }
}

/// Holes of one zone by class.
#[derive(Debug)]
struct Index {
    octaves: u64,
    subs: [u16; OCTAVES],
    heads: [[NodeId; SUBS]; OCTAVES],
    /// The node with the lowest address.
    first: NodeId,
}

#[derive(Debug)]
pub(super) struct Holes {
    nodes: Vec<Node>,
    unused: NodeId,
    zones: [Index; 2],
    /// First page of the second zone.
    boundary: u64,
}

/// The class whose range of sizes holds `pages`.
fn class_of(pages: u64) -> (usize, usize) {
    if pages < SUBS as u64 {
        return (0, pages as usize);
    }
    let log = pages.ilog2();
    ((log - SUB_SHIFT + 1) as usize, (pages >> (log - SUB_SHIFT)) as usize & (SUBS - 1))
}

/// The first class all of whose holes have at least `pages`.
fn class_for(pages: u64) -> (usize, usize) {
    if pages < SUBS as u64 {
        return class_of(pages);
    }
    class_of(pages.saturating_add((1 << (pages.ilog2() - SUB_SHIFT)) - 1))
}

impl Index {
    fn new() -> Self {
        Self { octaves: 0, subs: [0; OCTAVES], heads: [[NIL; SUBS]; OCTAVES], first: NIL }
    }

    /// The head of the first class from `class` on that has a hole.
    fn first_from(&self, (octave, sub): (usize, usize)) -> NodeId {
        if octave >= OCTAVES {
            return NIL;
        }
        let subs = u32::from(self.subs[octave]) >> sub << sub;
        if subs != 0 {
            return self.heads[octave][subs.trailing_zeros() as usize];
        }
        let octaves = self.octaves & (u64::MAX << octave << 1);
        if octaves == 0 {
            return NIL;
        }
        let octave = octaves.trailing_zeros() as usize;
        self.heads[octave][self.subs[octave].trailing_zeros() as usize]
    }
}

impl Holes {
    /// Zones of pages `start..end`, all free. The second may be empty.
    pub(super) fn new(zones: [(u64, u64); 2]) -> Self {
        let mut holes = Self {
            nodes: Vec::new(),
            unused: NIL,
            zones: [Index::new(), Index::new()],
            boundary: zones[1].0,
        };
        for (zone, (start, end)) in zones.into_iter().enumerate() {
            if start < end {
                let node = holes.node(start, end - start);
                holes.zones[zone].first = node;
                holes.file(node);
            }
        }
        holes
    }

    pub(super) fn start(&self, node: NodeId) -> u64 {
        self.nodes[node as usize].start
    }

    fn zone(&self, page: u64) -> usize {
        usize::from(page >= self.boundary)
    }

    fn node(&mut self, start: u64, pages: u64) -> NodeId {
        let fresh = Node::new(start, pages);
        if self.unused == NIL {
            self.nodes.push(fresh);
            return NodeId::try_from(self.nodes.len() - 1).expect("fewer than 2^32 ranges");
        }
        let node = self.unused;
        self.unused = self.nodes[node as usize].next;
        self.nodes[node as usize] = fresh;
        node
    }

    fn forget(&mut self, node: NodeId) {
        let unused = self.unused;
        let slot = &mut self.nodes[node as usize];
        slot.set_state(State::Unused);
        slot.next = unused;
        self.unused = node;
    }

    /// Puts a node in the list of its class.
    fn file(&mut self, node: NodeId) {
        let filed = self.nodes[node as usize];
        let (octave, sub) = class_of(filed.pages());
        let zone = self.zone(filed.start);
        let index = &mut self.zones[zone];
        let head = std::mem::replace(&mut index.heads[octave][sub], node);
        index.subs[octave] |= 1 << sub;
        index.octaves |= 1 << octave;
        if head != NIL {
            self.nodes[head as usize].previous = node;
        }
        let slot = &mut self.nodes[node as usize];
        slot.set_state(State::Free);
        slot.previous = NIL;
        slot.next = head;
    }

    /// Takes a free node out of the list of its class.
    fn unfile(&mut self, node: NodeId) {
        let filed = self.nodes[node as usize];
        let Node { previous, next, .. } = filed;
        if next != NIL {
            self.nodes[next as usize].previous = previous;
        }
        if previous != NIL {
            self.nodes[previous as usize].next = next;
            return;
        }
        let (octave, sub) = class_of(filed.pages());
        let zone = self.zone(filed.start);
        let index = &mut self.zones[zone];
        index.heads[octave][sub] = next;
        if next == NIL {
            index.subs[octave] &= !(1 << sub);
            if index.subs[octave] == 0 {
                index.octaves &= !(1 << octave);
            }
        }
    }

    /// Nodes that exist, those that stand for nothing included.
    pub(super) fn node_count(&self) -> NodeId {
        self.nodes.len() as NodeId
    }

    /// Where in the hole a range would begin.
    fn fit(&self, node: NodeId, want: Want) -> Option<u64> {
        let Want { pages, align, phase, limit } = want;
        let hole = &self.nodes[node as usize];
        // The lowest page from the hole's start on that is `phase` more than a multiple.
        let start = hole.start.checked_add(phase.wrapping_sub(hole.start) & (align - 1))?;
        let end = start.checked_add(pages)?;
        (end <= hole.end() && end <= limit).then_some(start)
    }

    /// Makes a live node in bounded time. `None` is not yet exhaustion: see [`Holes::search`].
    pub(super) fn take(&mut self, zone: usize, want: Want) -> Option<NodeId> {
        let index = &self.zones[zone];
        // A hole of about that size first: it was such a range, it fits, and large holes stay whole.
        let (octave, sub) = class_of(want.pages);
        let same = index.heads.get(octave).map_or(NIL, |heads| heads[sub]);
        let sure = || index.first_from(class_for(want.pages.saturating_add(want.align - 1)));
        let fit = |hole| if hole == NIL { None } else { self.fit(hole, want).map(|start| (hole, start)) };
        let (hole, start) = fit(same).or_else(|| fit(sure()))?;
        Some(self.occupy(hole, start, want.pages))
    }

    /// Makes a live node in the lowest hole that fits, looking at every hole.
    pub(super) fn search(&mut self, zone: usize, want: Want) -> Option<NodeId> {
        let (hole, start) = self
            .nodes_of(zone)
            .take_while(|node| self.start(*node) < want.limit)
            .filter(|node| self.nodes[*node as usize].is(State::Free))
            .find_map(|node| self.fit(node, want).map(|start| (node, start)))?;
        Some(self.occupy(hole, start, want.pages))
    }

    fn occupy(&mut self, hole: NodeId, start: u64, pages: u64) -> NodeId {
        self.unfile(hole);
        self.carve(hole, start, pages, State::Live)
    }

    /// Cuts `start..start + pages` out of a node that is in no list, files the rest as holes, and gives the cut node.
    fn carve(&mut self, node: NodeId, start: u64, pages: u64, state: State) -> NodeId {
        let hole = self.nodes[node as usize];
        if hole.start < start {
            let front = self.node(hole.start, start - hole.start);
            self.link(hole.below, front, start);
            self.link(front, node, start);
            self.file(front);
        }
        if start + pages < hole.end() {
            let back = self.node(start + pages, hole.end() - start - pages);
            self.link(back, hole.above, start);
            self.link(node, back, start);
            self.file(back);
        }
        let slot = &mut self.nodes[node as usize];
        slot.start = start;
        slot.set_pages(pages);
        slot.set_state(state);
        node
    }

    /// Makes two nodes neighbours; one may be the edge of the zone that holds `page`.
    fn link(&mut self, below: NodeId, above: NodeId, page: u64) {
        match below {
            NIL => {
                let zone = self.zone(page);
                self.zones[zone].first = above;
            }
            _ => self.nodes[below as usize].above = above,
        }
        if above != NIL {
            self.nodes[above as usize].below = below;
        }
    }

    fn is_free(&self, node: NodeId) -> bool {
        node != NIL && self.nodes[node as usize].is(State::Free)
    }

    /// Frees a live node, if it is what the caller believes.
    pub(super) fn put(&mut self, node: NodeId, start: u64, pages: u64) -> bool {
        let Some(known) = self.nodes.get(node as usize) else { return false };
        if !known.is(State::Live) || known.start != start || known.pages() != pages {
            return false;
        }
        let Node { below, above, .. } = *known;
        if self.is_free(above) {
            self.unfile(above);
            self.absorb(node, above);
        }
        let mut hole = node;
        if self.is_free(below) {
            self.unfile(below);
            self.absorb(below, node);
            hole = below;
        }
        self.file(hole);
        true
    }

    /// Adds the node above to the one below it.
    fn absorb(&mut self, below: NodeId, above: NodeId) {
        let gone = self.nodes[above as usize];
        let slot = &mut self.nodes[below as usize];
        slot.set_pages(slot.pages() + gone.pages());
        self.link(below, gone.above, gone.start);
        self.forget(above);
    }

    /// Reserves what is free of pages `first..end`. Gives the pages taken, or the first page of a live range in the way.
    pub(super) fn reserve(&mut self, first: u64, end: u64) -> Result<u64, u64> {
        let overlapping: Vec<NodeId> = [0, 1]
            .into_iter()
            .flat_map(|zone| self.nodes_of(zone))
            .filter(|node| {
                let node = &self.nodes[*node as usize];
                node.start < end && first < node.end()
            })
            .collect();
        let live = overlapping.iter().find(|node| self.nodes[**node as usize].is(State::Live));
        if let Some(live) = live {
            return Err(self.start(*live));
        }
        let mut taken = 0;
        for node in overlapping {
            let found = self.nodes[node as usize];
            if found.is(State::Free) {
                let (from, to) = (found.start.max(first), found.end().min(end));
                self.unfile(node);
                self.carve(node, from, to - from, State::Reserved);
                taken += to - from;
            }
        }
        Ok(taken)
    }

    fn nodes_of(&self, zone: usize) -> impl Iterator<Item = NodeId> {
        let above = |node: NodeId| (node != NIL).then_some(node);
        std::iter::successors(above(self.zones[zone].first), move |node| {
            above(self.nodes[*node as usize].above)
        })
    }

    fn in_state(&self, state: State) -> impl Iterator<Item = (u64, u64)> {
        let nodes =
            [0, 1].into_iter().flat_map(|zone| self.nodes_of(zone)).map(|node| self.nodes[node as usize]);
        nodes.filter(move |node| node.is(state)).map(|node| (node.start, node.pages()))
    }

    /// Every hole, in address order: first page and pages.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, u64)> {
        self.in_state(State::Free)
    }

    /// Every allocated range, in address order.
    pub(super) fn live_ranges(&self) -> impl Iterator<Item = (u64, u64)> {
        self.in_state(State::Live)
    }
}
