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
enum State {
    /// The node stands for nothing and waits in the list of such.
    Unused,
    Free,
    Live,
    Reserved,
}

#[derive(Clone, Copy, Debug)]
struct Node {
    start: u64,
    pages: u64,
    /// Neighbours in address order, within the zone.
    below: NodeId,
    above: NodeId,
    /// Neighbours in the list of the class; of unused nodes, `next` alone.
    previous: NodeId,
    next: NodeId,
    zone: u8,
    state: State,
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
        let mut holes = Self { nodes: Vec::new(), unused: NIL, zones: [Index::new(), Index::new()] };
        for (zone, (start, end)) in zones.into_iter().enumerate() {
            if start < end {
                let node = holes.node(start, end - start, zone as u8);
                holes.zones[zone].first = node;
                holes.file(node);
            }
        }
        holes
    }

    pub(super) fn start(&self, node: NodeId) -> u64 {
        self.nodes[node as usize].start
    }

    fn node(&mut self, start: u64, pages: u64, zone: u8) -> NodeId {
        let fresh =
            Node { start, pages, below: NIL, above: NIL, previous: NIL, next: NIL, zone, state: State::Live };
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
        slot.state = State::Unused;
        slot.next = unused;
        self.unused = node;
    }

    /// Puts a node in the list of its class.
    fn file(&mut self, node: NodeId) {
        let Node { pages, zone, .. } = self.nodes[node as usize];
        let (octave, sub) = class_of(pages);
        let index = &mut self.zones[zone as usize];
        let head = std::mem::replace(&mut index.heads[octave][sub], node);
        index.subs[octave] |= 1 << sub;
        index.octaves |= 1 << octave;
        if head != NIL {
            self.nodes[head as usize].previous = node;
        }
        let slot = &mut self.nodes[node as usize];
        slot.state = State::Free;
        slot.previous = NIL;
        slot.next = head;
    }

    /// Takes a free node out of the list of its class.
    fn unfile(&mut self, node: NodeId) {
        let Node { pages, zone, previous, next, .. } = self.nodes[node as usize];
        if next != NIL {
            self.nodes[next as usize].previous = previous;
        }
        if previous != NIL {
            self.nodes[previous as usize].next = next;
            return;
        }
        let (octave, sub) = class_of(pages);
        let index = &mut self.zones[zone as usize];
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
        (end <= hole.start + hole.pages && end <= limit).then_some(start)
    }

    /// Makes a live node.
    pub(super) fn take(&mut self, zone: usize, want: Want, full_searches: &mut u64) -> Option<NodeId> {
        let Want { pages, align, limit, .. } = want;
        let index = &self.zones[zone];
        // A hole of about that size first: it was such a range, it fits, and large holes stay whole.
        let (octave, sub) = class_of(pages);
        let same = index.heads.get(octave).map_or(NIL, |heads| heads[sub]);
        let mut found = None;
        if same != NIL {
            found = self.fit(same, want).map(|start| (same, start));
        }
        if found.is_none() {
            let sure = index.first_from(class_for(pages.saturating_add(align - 1)));
            if sure != NIL {
                found = self.fit(sure, want).map(|start| (sure, start));
            }
        }
        if found.is_none() && index.first != NIL {
            *full_searches += 1;
            found = self
                .nodes_of(zone)
                .filter(|node| self.nodes[*node as usize].state == State::Free)
                .take_while(|node| self.start(*node) < limit)
                .find_map(|node| self.fit(node, want).map(|start| (node, start)));
        }
        let (hole, start) = found?;
        self.unfile(hole);
        Some(self.carve(hole, start, pages, State::Live))
    }

    /// Cuts `start..start + pages` out of a node that is in no list, files the rest as holes, and gives the cut node.
    fn carve(&mut self, node: NodeId, start: u64, pages: u64, state: State) -> NodeId {
        let Node { start: first, pages: all, below, above, zone, .. } = self.nodes[node as usize];
        let end = first + all;
        if first < start {
            let front = self.node(first, start - first, zone);
            self.link(below, front, zone);
            self.link(front, node, zone);
            self.file(front);
        }
        if start + pages < end {
            let back = self.node(start + pages, end - start - pages, zone);
            self.link(back, above, zone);
            self.link(node, back, zone);
            self.file(back);
        }
        let slot = &mut self.nodes[node as usize];
        (slot.start, slot.pages, slot.state) = (start, pages, state);
        node
    }

    /// Makes two nodes neighbours; one may be the edge of the zone.
    fn link(&mut self, below: NodeId, above: NodeId, zone: u8) {
        match below {
            NIL => self.zones[zone as usize].first = above,
            _ => self.nodes[below as usize].above = above,
        }
        if above != NIL {
            self.nodes[above as usize].below = below;
        }
    }

    /// Frees a live node, if it is what the caller believes.
    pub(super) fn put(&mut self, node: NodeId, start: u64, pages: u64) -> bool {
        let known = self
            .nodes
            .get(node as usize)
            .is_some_and(|known| known.state == State::Live && known.start == start && known.pages == pages);
        if !known {
            return false;
        }
        let Node { below, above, .. } = self.nodes[node as usize];
        if above != NIL && self.nodes[above as usize].state == State::Free {
            self.unfile(above);
            self.absorb(node, above);
        }
        let mut hole = node;
        if below != NIL && self.nodes[below as usize].state == State::Free {
            self.unfile(below);
            self.absorb(below, node);
            hole = below;
        }
        self.file(hole);
        true
    }

    /// Adds the node above to the one below it.
    fn absorb(&mut self, below: NodeId, above: NodeId) {
        let Node { pages, above: next, zone, .. } = self.nodes[above as usize];
        self.nodes[below as usize].pages += pages;
        self.link(below, next, zone);
        self.forget(above);
    }

    /// Reserves what is free of pages `first..end`. Gives the pages taken, or the first page of a live range in the way.
    pub(super) fn reserve(&mut self, first: u64, end: u64) -> Result<u64, u64> {
        let overlapping: Vec<NodeId> = [0, 1]
            .into_iter()
            .flat_map(|zone| self.nodes_of(zone))
            .filter(|node| {
                let node = &self.nodes[*node as usize];
                node.start < end && first < node.start + node.pages
            })
            .collect();
        let live = overlapping.iter().find(|node| self.nodes[**node as usize].state == State::Live);
        if let Some(live) = live {
            return Err(self.start(*live));
        }
        let mut taken = 0;
        for node in overlapping {
            let Node { start, pages, state, .. } = self.nodes[node as usize];
            if state == State::Free {
                let (from, to) = (start.max(first), (start + pages).min(end));
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
        nodes.filter(move |node| node.state == state).map(|node| (node.start, node.pages))
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
