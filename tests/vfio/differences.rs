//! Where an IOMMU that the kernel programs differs from the modelled one, each with the reason and the test that shows it.
//! docs/vfio.md tells the same to people; that it does is checked. Random sequences meet none of these, as they map memory
//! that is there: whatever differs in one is a failure.

use libtest_mimic::Failed;

/// One difference.
pub struct Difference {
    /// As the document names it.
    pub name: &'static str,
    /// Why it is so.
    pub reason: &'static str,
    /// The test that shows it.
    pub test: &'static str,
}

/// All of them.
pub const DIFFERENCES: &[Difference] = &[
    Difference {
        name: "a frame without memory",
        reason: "the kernel pins what it maps, so a frame must be one that the address space still reports; a page table \
                 of the model takes any number",
        test: "a_frame_that_was_retired_is_not_linked",
    },
    Difference {
        name: "memory that cannot be pinned",
        reason: "both directions are linked, and the kernel does not pin for writing what the process may not write",
        test: "a_link_that_the_kernel_refuses_halfway_is_undone_whole",
    },
    Difference {
        name: "the limit of mappings",
        reason: "every leaf is a mapping of the kernel, of which a container has dma_entry_limit, 65535 by default",
        test: "no_more_mappings_than_the_kernel_has_and_the_error_says_so",
    },
    Difference {
        name: "the limit of locked memory",
        reason: "pinned memory counts as locked: RLIMIT_MEMLOCK holds, save for who has CAP_IPC_LOCK",
        test: "no_more_locked_memory_than_allowed_and_the_error_says_so",
    },
    Difference {
        name: "windows that must not be mapped",
        reason: "the kernel refuses to map them whoever asks; the model leaves that to the allocator",
        test: "addresses_kept_for_interrupts_are_never_given_out",
    },
    Difference {
        name: "holes",
        reason: "the kernel alone takes the unmapping of a hole for done; the table beside it refuses as the model does",
        test: "the_kernel_alone_refuses_less",
    },
    Difference {
        name: "stopped accesses",
        reason: "they are in the kernel's log, of which a program is not told, and not in a log of faults",
        test: "nothing_lands_through_a_page_that_was_unlinked",
    },
];

/// If the document named other differences than are tested, one of the two would be wrong.
pub fn documented(tests: &[&str]) -> Result<(), Failed> {
    let document = include_str!("../../docs/vfio.md");
    let rows = document.lines().filter(|line| line.starts_with("| ") && line.contains(" | `")).count();
    assert_eq!(rows, DIFFERENCES.len(), "rows of docs/vfio.md and differences in tests/vfio/differences.rs");
    for Difference { name, reason, test, .. } in DIFFERENCES {
        assert!(
            document.contains(&format!("| {name} | {reason} | `{test}` |")),
            "docs/vfio.md has no row {name:?}"
        );
        assert!(tests.contains(test), "no test is called {test}");
    }
    Ok(())
}
