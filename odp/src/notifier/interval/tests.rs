use super::*;
use hw_model::addr::{VirtAddr, VirtRange};
use proptest::prelude::*;

fn range(start: u64, len: u64) -> VirtRange {
    VirtRange::new(VirtAddr(start), len).expect("fits")
}

/// Every overlapping interval, by walking with a cursor.
fn walk(tree: &Tree<()>, range: VirtRange) -> Vec<Key> {
    let mut found = Vec::new();
    let mut cursor = None;
    while let Some(node) = tree.next_overlapping(range, cursor) {
        cursor = Some(node.key());
        found.push(node.key());
    }
    found
}

#[derive(Clone, Debug)]
enum Step {
    Insert(u64, u64),
    /// Removes the n-th of those present.
    Remove(usize),
    Walk(u64, u64),
}

fn any_range() -> impl Strategy<Value = (u64, u64)> {
    // Two crowded places: the bottom, and the very top of the address space.
    (0_u64..64, 1_u64..24, prop::bool::ANY).prop_map(|(start, len, top)| {
        if top { (u64::MAX - 63 + start, len.min(64 - start)) } else { (start, len) }
    })
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => any_range().prop_map(|(start, len)| Step::Insert(start, len)),
        2 => any::<usize>().prop_map(Step::Remove),
        3 => any_range().prop_map(|(start, len)| Step::Walk(start, len)),
    ]
}

proptest! {
    /// If this fails, an invalidation passes by an interval it should clear, or meets one twice.
    #[test]
    fn a_walk_finds_exactly_the_overlapping_intervals_in_order(steps in prop::collection::vec(any_step(), 1..200)) {
        let mut tree = Tree::new();
        let mut naive: Vec<(Key, VirtRange)> = Vec::new();
        for (id, step) in steps.into_iter().enumerate() {
            match step {
                Step::Insert(start, len) => {
                    let node = Node::new(range(start, len), id as u64, ()).expect("not empty");
                    naive.push((node.key(), range(start, len)));
                    tree.insert(node);
                }
                Step::Remove(n) if !naive.is_empty() => {
                    let (key, _) = naive.swap_remove(n % naive.len());
                    prop_assert_eq!(tree.remove(key).map(|node| node.key()), Some(key));
                    prop_assert!(tree.remove(key).is_none());
                }
                Step::Remove(_) => {}
                Step::Walk(start, len) => {
                    let wanted = range(start, len);
                    let mut expected: Vec<Key> =
                        naive.iter().filter(|(_, r)| r.overlaps(wanted)).map(|(key, _)| *key).collect();
                    expected.sort();
                    prop_assert_eq!(walk(&tree, wanted), expected);
                }
            }
            prop_assert_eq!(tree.len(), naive.len());
        }
    }
}

#[test]
fn an_empty_range_has_no_node_and_overlaps_none() {
    assert!(Node::new(range(4096, 0), 1, ()).is_none());
    let mut tree = Tree::new();
    tree.insert(Node::new(range(0, 8192), 1, ()).expect("not empty"));
    assert!(tree.next_overlapping(range(4096, 0), None).is_none());
}

/// If this fails, invalidating one page costs more the more regions there are.
#[test]
fn a_search_among_ten_thousand_looks_at_few_nodes() {
    const COUNT: u64 = 10_000;
    const LOG2: u64 = 14;
    let mut tree = Tree::new();
    for id in 0..COUNT {
        tree.insert(Node::new(range(id * 8192, 4096), id, ()).expect("not empty"));
    }
    let mut worst = 0;
    for id in 0..COUNT {
        for (page, hits) in [(id * 8192, 1), (id * 8192 + 4096, 0)] {
            tree.looked_at.set(0);
            assert_eq!(walk(&tree, range(page, 4096)).len(), hits);
            worst = worst.max(tree.looked_at.get());
        }
    }
    // A walk that finds one interval is two searches; a search goes down at most two paths of a treap, whose height is
    // about 2.5 log2 n.
    assert!(worst < 2 * 2 * 3 * LOG2, "{worst} nodes looked at");

    // One interval over all of them, that starts first, must not spoil the pruning.
    tree.insert(Node::new(range(0, COUNT * 8192), COUNT, ()).expect("not empty"));
    tree.looked_at.set(0);
    assert_eq!(walk(&tree, range(COUNT * 4096, 4096)).len(), 2);
    assert!(tree.looked_at.get() < 3 * 2 * 3 * LOG2, "{} nodes looked at", tree.looked_at.get());
}
