//! Questions to the kernel past the DMA layer: what it says where the layer says no.
//!
//! Unsafe island. Invariant: only memory of [`OwnedMemory`] is mapped, which no Rust reference is made to, and each
//! request is handed the structure that include/uapi/linux/vfio.h has for it.
#![allow(unsafe_code)]

use hw_model::addr::Iova;
use mr::dma::vfio::VfioContainer;
use odp::space::process::OwnedMemory;
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

const MAP: Opcode = opcode::none(b';', 113);
const UNMAP: Opcode = opcode::none(b';', 114);

/// Has the kernel map `len` bytes of `memory` from `offset` on, for reading and writing.
pub fn map(
    container: &VfioContainer,
    iova: Iova,
    memory: &OwnedMemory,
    offset: u64,
    len: u64,
) -> Result<(), Errno> {
    #[repr(C)]
    struct Map(u32, u32, u64, u64, u64);
    assert!(offset + len <= memory.size());
    let mut map = Map(32, 3, memory.range().start().0 + offset, iova.0, len);
    // SAFETY: the request takes this structure.
    let request = unsafe { Updater::<MAP, Map>::new(&mut map) };
    // SAFETY: as above; the memory is as the invariant says.
    unsafe { ioctl(container, request) }
}

/// Has the kernel unmap a range. Gives the bytes it says it unmapped.
pub fn unmap(container: &VfioContainer, iova: Iova, len: u64) -> Result<u64, Errno> {
    #[repr(C)]
    struct Unmap(u32, u32, u64, u64);
    let mut unmap = Unmap(24, 0, iova.0, len);
    // SAFETY: the request takes this structure.
    let request = unsafe { Updater::<UNMAP, Unmap>::new(&mut unmap) };
    // SAFETY: as above.
    unsafe { ioctl(container, request) }?;
    Ok(unmap.3)
}
