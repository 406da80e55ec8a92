//! Files of shared memory as buffers: what a memfd and a DMABUF of the kernel have in common.

use super::*;
use odp::space::process::{FileExport, FileExportError};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals};
use std::fs::File;
use std::os::unix::fs::FileExt;

fn memory_file(bytes: u64) -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(rustix::fs::memfd_create("buffer", flags).expect("a memory file"));
    file.set_len(bytes).expect("memory");
    file
}

#[test]
fn a_memfd_is_a_buffer_whose_bytes_are_the_files() {
    for (mode, options) in
        [(ImportMode::Dynamic, RegisterOptions::on_demand()), (ImportMode::Pinned, RegisterOptions::pinned())]
    {
        let space = space();
        let file = memory_file(page_bytes(8));
        fcntl_add_seals(&file, SealFlags::SHRINK).expect("a memory file");
        file.write_all_at(b"from the file", 5000).expect("memory");
        let buffer = FileExport::export(&space, &file, Points::OFF).expect("a shared file of whole pages");
        let memory = import(&buffer, mode);
        let bed = Bed::new(&space, &memory, options, &MachineConfig::default());
        assert_eq!(bed.read(5000, 13), Status::Success);
        assert_eq!(bed.far_bytes(5000, 13), b"from the file");
        bed.mirror.write_at(page_bytes(8) - 4, b"last").expect("our own memory");
        assert_eq!(bed.write(page_bytes(8) - 4, 4), Status::Success);
        let mut seen = [0; 4];
        file.read_exact_at(&mut seen, page_bytes(8) - 4).expect("in the file");
        assert_eq!(&seen, b"last");
        bed.view(&memory).check().expect("at rest");
        protocol_kept(&bed.machine, &bed.space).expect("on the way");
    }
}

#[test]
fn what_is_no_shared_memory_of_whole_pages_for_good_is_no_buffer() {
    let space = space();
    let refused = |file: &File| FileExport::export(&space, file, Points::OFF).unwrap_err();
    assert_eq!(refused(&memory_file(0)), FileExportError::NotWholePages { bytes: 0 });
    assert_eq!(refused(&memory_file(4097)), FileExportError::NotWholePages { bytes: 4097 });
    // Regression: writes to pages that were cut off were tried for ever.
    assert_eq!(refused(&memory_file(8192)), FileExportError::MayShrink);
    let null = File::open("/dev/null").expect("there is one");
    assert!(FileExport::export(&space, &null, Points::OFF).is_err());
}
