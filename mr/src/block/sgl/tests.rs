//! SGLs, followed as a controller does.

use super::*;
use proptest::prelude::*;

const MAX: u64 = 1 << 40;

fn range(dma: u64, len: u64) -> DmaRange {
    DmaRange { dma: DmaAddr(dma), len }
}

fn list_memory(pages: usize) -> Vec<DmaAddr> {
    (0..pages as u64).map(|page| DmaAddr((1 << 40) + page * 5 * 4096)).collect()
}

/// The blocks that a controller moves, told nothing but the command's descriptor and the memory of the segments.
fn follow(sgl: &Sgl) -> Vec<(u64, u64)> {
    let mut moved = Vec::new();
    let mut next = Some(sgl.first);
    let mut last_seen = false;
    while let Some(descriptor) = next.take() {
        match descriptor.kind {
            DescriptorKind::DataBlock => moved.push((descriptor.dma.0, u64::from(descriptor.length))),
            kind => {
                assert!(!last_seen, "nothing comes after the last segment");
                last_seen = kind == DescriptorKind::LastSegment;
                let (_, descriptors) =
                    sgl.segments.iter().find(|(at, _)| *at == descriptor.dma).expect("a segment is there");
                assert_eq!(descriptor.length as usize, descriptors.len() * DESCRIPTOR);
                assert!(descriptors.len() <= FULL, "a segment is longer than its page");
                let (end, blocks) = descriptors.split_last().expect("no segment is empty");
                for block in blocks {
                    assert_eq!(block.kind, DescriptorKind::DataBlock, "only the last one leads on");
                    moved.push((block.dma.0, u64::from(block.length)));
                }
                match last_seen {
                    true => moved.push((end.dma.0, u64::from(end.length))),
                    false => assert_ne!(end.kind, DescriptorKind::DataBlock, "there are more segments"),
                }
                next = (!last_seen).then_some(*end);
            }
        }
    }
    moved
}

proptest! {
    #[test]
    fn a_controller_moves_every_block_in_order_and_no_other(
        blocks in prop::collection::vec((0..1_u64 << 50, 0..10_000_u64), 1..1100),
    ) {
        let ranges: Vec<_> = blocks.iter().map(|(dma, len)| range(*dma, *len)).collect();
        let expected: Vec<_> = blocks.into_iter().filter(|(_, len)| *len > 0).collect();
        prop_assume!(!expected.is_empty());
        let plan = SglPlan::new(ranges, MAX).expect("blocks");
        let memory = list_memory(plan.segments());
        let sgl = plan.build(&memory).expect("enough");
        prop_assert_eq!(sgl.segments.len(), plan.segments());
        prop_assert_eq!(follow(&sgl), expected);
        if let Some(short) = memory.len().checked_sub(1) {
            let error = SglError::Segments { needed: memory.len(), given: short };
            prop_assert_eq!(plan.build(&memory[..short]), Err(error));
        }
    }

    #[test]
    fn a_descriptor_is_what_its_bytes_say(dma: u64, length: u32, kind in 0..3_usize, flip in 0..128_usize) {
        let kinds = [DescriptorKind::DataBlock, DescriptorKind::Segment, DescriptorKind::LastSegment];
        let descriptor = Descriptor { kind: kinds[kind], dma: DmaAddr(dma), length };
        let mut bytes = descriptor.to_bytes();
        prop_assert_eq!(Descriptor::from_bytes(bytes), Some(descriptor));
        bytes[flip / 8] ^= 1 << (flip % 8);
        prop_assert_ne!(Descriptor::from_bytes(bytes), Some(descriptor), "a bit means nothing");
        let reserved = (12..15).contains(&(flip / 8)) || (120..124).contains(&flip);
        prop_assert!(!reserved || Descriptor::from_bytes(bytes).is_none(), "a reserved bit was let through");
    }
}

#[test]
fn the_command_alone_says_one_block_and_segments_chain_only_when_full() {
    for (blocks, segments) in [(1, 0), (2, 1), (256, 1), (257, 2), (511, 2), (512, 3)] {
        let plan = SglPlan::new((0..blocks).map(|block| range(block * 8192, 100)), MAX).expect("blocks");
        assert_eq!(plan.segments(), segments, "{blocks} blocks");
        let sgl = plan.build(&list_memory(segments)).expect("enough");
        assert_eq!(follow(&sgl).len() as u64, blocks);
    }
}

#[test]
fn a_block_longer_than_a_descriptor_says_takes_several() {
    let plan = SglPlan::new([range(0, 5 << 30)], MAX).expect("blocks");
    let sgl = plan.build(&list_memory(1)).expect("enough");
    assert_eq!(follow(&sgl), [(0, 2 << 30), (2 << 30, 2 << 30), (4 << 30, 1 << 30)]);
}

#[test]
fn what_no_list_says_is_refused_by_name() {
    assert_eq!(SglPlan::new([], MAX), Err(SglError::Empty));
    assert_eq!(SglPlan::new([range(5, 0)], MAX), Err(SglError::Empty));
    let too_long = SglError::TooLong { bytes: 101, max: 100 };
    assert_eq!(SglPlan::new([range(0, 50), range(500, 51)], 100), Err(too_long));
    let crooked = SglPlan::new([range(0, 1), range(9, 1)], MAX).expect("blocks").build(&[DmaAddr(8)]);
    assert_eq!(crooked, Err(SglError::Segments { needed: 1, given: 0 }));
}
