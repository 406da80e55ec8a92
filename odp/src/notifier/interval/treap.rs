//! A treap of intervals. Heights are logarithmic with overwhelming probability: priorities are a hash of the id, ids are
//! counted, and no user chooses them.

use hw_model::addr::{VirtAddr, VirtRange};

/// Where an interval stands in the order: by start, then by age.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::notifier) struct Key {
    pub start: VirtAddr,
    pub id: u64,
}

/// An interval in, or not yet in, a [`Tree`].
#[derive(Debug)]
pub(in crate::notifier) struct Node<T> {
    key: Key,
    last: VirtAddr,
    /// The largest last address of this subtree.
    max_last: VirtAddr,
    priority: u64,
    left: Link<T>,
    right: Link<T>,
    pub value: T,
}

type Link<T> = Option<Box<Node<T>>>;

impl<T> Node<T> {
    /// A node for `range`, or `None` if it is empty. `id` must be unique in the tree.
    pub fn new(range: VirtRange, id: u64, value: T) -> Option<Box<Self>> {
        let last = range.last()?;
        let key = Key { start: range.start(), id };
        Some(Box::new(Self { key, last, max_last: last, priority: hash(id), left: None, right: None, value }))
    }
    pub fn key(&self) -> Key {
        self.key
    }
    fn update(&mut self) {
        let below = [&self.left, &self.right].into_iter().flatten().map(|node| node.max_last);
        self.max_last = below.fold(self.last, VirtAddr::max);
    }
}

/// The finaliser of splitmix64.
fn hash(id: u64) -> u64 {
    let mut word = id.wrapping_add(0x9e37_79b9_7f4a_7c15);
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// The intervals of one address space.
#[derive(Debug)]
pub(in crate::notifier) struct Tree<T> {
    root: Link<T>,
    len: usize,
    /// Nodes looked at by searches, for the test that they are few.
    #[cfg(test)]
    pub looked_at: std::cell::Cell<u64>,
}

impl<T> Tree<T> {
    pub fn new() -> Self {
        Self {
            root: None,
            len: 0,
            #[cfg(test)]
            looked_at: std::cell::Cell::new(0),
        }
    }
    pub fn len(&self) -> usize {
        self.len
    }

    /// Puts `node` in. Never allocates.
    pub fn insert(&mut self, node: Box<Node<T>>) {
        self.root = Some(insert(self.root.take(), node));
        self.len += 1;
    }

    /// Takes the node at `key` out, for the caller to free.
    pub fn remove(&mut self, key: Key) -> Option<Box<Node<T>>> {
        let (root, removed) = remove(self.root.take(), key);
        self.root = root;
        self.len -= usize::from(removed.is_some());
        removed
    }

    /// The first node after `cursor` that overlaps `range`. Looks at O(log n) nodes: a subtree that is searched in vain
    /// either ends before `range`, which its root says, or holds a node that starts after `range`, and then so does
    /// everything to the right of it.
    pub fn next_overlapping(&self, range: VirtRange, cursor: Option<Key>) -> Option<&Node<T>> {
        let last = range.last()?;
        self.next(self.root.as_deref(), range.start(), last, cursor)
    }

    fn next<'a>(
        &self,
        node: Option<&'a Node<T>>,
        first: VirtAddr,
        last: VirtAddr,
        cursor: Option<Key>,
    ) -> Option<&'a Node<T>> {
        let node = node?;
        #[cfg(test)]
        self.looked_at.set(self.looked_at.get() + 1);
        if node.max_last < first {
            return None;
        }
        if cursor.is_none_or(|cursor| node.key > cursor) {
            if let Some(found) = self.next(node.left.as_deref(), first, last, cursor) {
                return Some(found);
            }
            if node.key.start > last {
                return None;
            }
            if node.last >= first {
                return Some(node);
            }
        }
        self.next(node.right.as_deref(), first, last, cursor)
    }
}

fn insert<T>(root: Link<T>, mut new: Box<Node<T>>) -> Box<Node<T>> {
    let Some(mut node) = root else { return new };
    if new.priority > node.priority {
        (new.left, new.right) = split(Some(node), new.key);
        new.update();
        return new;
    }
    let side = if new.key < node.key { &mut node.left } else { &mut node.right };
    *side = Some(insert(side.take(), new));
    node.update();
    node
}

/// What is before `key`, and what is after it.
fn split<T>(root: Link<T>, key: Key) -> (Link<T>, Link<T>) {
    let Some(mut node) = root else { return (None, None) };
    if node.key < key {
        let (before, after) = split(node.right.take(), key);
        node.right = before;
        node.update();
        (Some(node), after)
    } else {
        let (before, after) = split(node.left.take(), key);
        node.left = after;
        node.update();
        (before, Some(node))
    }
}

/// One tree of two, all of `left` being before all of `right`.
fn merge<T>(left: Link<T>, right: Link<T>) -> Link<T> {
    match (left, right) {
        (None, tree) | (tree, None) => tree,
        (Some(mut left), Some(mut right)) => Some(if left.priority > right.priority {
            left.right = merge(left.right.take(), Some(right));
            left.update();
            left
        } else {
            right.left = merge(Some(left), right.left.take());
            right.update();
            right
        }),
    }
}

fn remove<T>(root: Link<T>, key: Key) -> (Link<T>, Link<T>) {
    let Some(mut node) = root else { return (None, None) };
    if node.key == key {
        let rest = merge(node.left.take(), node.right.take());
        return (rest, Some(node));
    }
    let side = if key < node.key { &mut node.left } else { &mut node.right };
    let (rest, removed) = remove(side.take(), key);
    *side = rest;
    node.update();
    (Some(node), removed)
}
