//! The DMA layer behind an IOMMU that the kernel programs, with a controller behind it that really moves bytes.
//!
//! Wants a device bound to vfio-pci: `ANYPAGE_LAB_NVME` names an NVMe controller whose disk may be overwritten, as
//! `tests/lab/vm --iommu` sets it. Without one every test is a skip that is counted. The group has one container at a
//! time, so the tests run one after the other.

#[path = "../../mr/tests/two_step/calls.rs"]
mod calls;
#[path = "../../examples/block_io/nvme/mod.rs"]
mod nvme;

mod bed;
mod change;
mod contract;
mod controller;
mod differences;
mod differential;
mod kernel;
mod limits;

use libtest_mimic::{Arguments, Failed, Trial};
use std::process::ExitCode;

type Test = fn(&bed::Bed) -> Result<(), Failed>;

const TESTS: [(&str, Test); 15] = [
    ("addresses_kept_for_interrupts_are_never_given_out", contract::interrupts),
    ("what_breaks_the_contract_is_refused_as_by_the_modelled_iommu", contract::refusals),
    ("the_kernel_alone_refuses_less", contract::kernel_alone),
    ("a_large_leaf_is_one_mapping_of_the_kernel", contract::large_leaf),
    ("a_frame_that_was_retired_is_not_linked", contract::retired),
    ("a_link_that_the_kernel_refuses_halfway_is_undone_whole", contract::unwinding),
    ("no_more_mappings_than_the_kernel_has_and_the_error_says_so", limits::entries),
    ("no_more_locked_memory_than_allowed_and_the_error_says_so", limits::locked),
    ("a_group_is_open_once_and_a_missing_one_says_what_to_do", limits::opening),
    ("the_disk_keeps_what_was_written_through_links", controller::round_trip),
    ("a_scatter_gather_list_reaches_what_it_names", controller::scattered_list),
    ("data_lands_in_the_page_that_was_linked_last", controller::relinked),
    ("nothing_lands_through_a_page_that_was_unlinked", controller::unlinked),
    ("pages_given_back_are_unlinked_and_those_in_their_place_are_linked", change::given_back),
    ("random_sequences_end_alike_on_both", differential::sequences),
];

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let mut trials = Vec::new();
    match bed::Bed::find() {
        Ok(bed) => {
            for (name, test) in TESTS {
                let bed = bed.clone();
                trials.push(Trial::test(name, move || test(&bed)));
            }
        }
        Err(reason) => TESTS.iter().for_each(|(name, _)| println!("SKIPPED vfio {name}: {reason}")),
    }
    trials.push(Trial::test("the_document_names_every_difference_and_its_test", || {
        differences::documented(&TESTS.map(|(name, _)| name))
    }));
    libtest_mimic::run(&arguments, trials).exit_code()
}
