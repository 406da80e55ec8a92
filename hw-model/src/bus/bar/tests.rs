use super::*;
use proptest::prelude::*;

proptest! {
    /// Any sequence of writes reads back as from an array of bytes, whatever the alignment.
    #[test]
    fn ram_storage_is_an_array_of_bytes(writes in prop::collection::vec((0..256_u64, prop::collection::vec(any::<u8>(), 0..40)), 1..40)) {
        let storage = RamStorage::new(256).expect("256 bytes");
        let mut model = vec![0_u8; 256];
        for (offset, data) in writes {
            let end = offset as usize + data.len();
            let outcome = storage.write(offset, &data);
            if end <= 256 {
                prop_assert_eq!(outcome, Ok(()));
                model[offset as usize..end].copy_from_slice(&data);
            } else {
                prop_assert_eq!(outcome, Err(StorageError::OutOfRange { offset: 256, size: 256 }));
            }
            let mut all = vec![0; 256];
            storage.read(0, &mut all).expect("in range");
            prop_assert_eq!(&all, &model);
        }
    }
}

#[test]
fn a_partial_word_leaves_its_neighbours_to_others() {
    let storage = RamStorage::new(8).expect("a word");
    std::thread::scope(|scope| {
        for byte in 0..2_u64 {
            let storage = &storage;
            scope.spawn(move || {
                for value in 0..20_000_u32 {
                    let value = value as u8;
                    storage.write(byte, &[value]).expect("in range");
                    let mut back = [0];
                    storage.read(byte, &mut back).expect("in range");
                    assert_eq!(back[0], value, "a neighbour's write undid this one");
                }
            });
        }
    });
}

#[test]
fn atomics_give_the_value_before_and_refuse_what_is_misaligned_or_outside() {
    let storage = RamStorage::new(16).expect("two words");
    assert_eq!(storage.atomic(8, AtomicOp::FetchAdd(5)), Ok(0));
    assert_eq!(storage.atomic(8, AtomicOp::CompareSwap { compare: 4, swap: 9 }), Ok(5));
    assert_eq!(storage.atomic(8, AtomicOp::CompareSwap { compare: 5, swap: 9 }), Ok(5));
    assert_eq!(storage.atomic(8, AtomicOp::FetchAdd(u64::MAX)), Ok(9));
    assert_eq!(storage.atomic(8, AtomicOp::FetchAdd(0)), Ok(8), "additions wrap");
    assert_eq!(storage.atomic(4, AtomicOp::FetchAdd(1)), Err(StorageError::Misaligned { offset: 4 }));
    assert!(matches!(storage.atomic(16, AtomicOp::FetchAdd(1)), Err(StorageError::OutOfRange { .. })));
}
