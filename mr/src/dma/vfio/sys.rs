//! The ioctls of VFIO (include/uapi/linux/vfio.h), with safe faces.
//!
//! Unsafe island. Invariant: every call made here reads and writes one structure that its caller borrowed for the call.
//! The one that has an effect on other memory, [`map_dma`], is handed addresses by [`super::space`] alone, which has them
//! from the process space: of memory that the space has reported as what devices may be given.
#![allow(unsafe_code)]

use rustix::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use rustix::io::Errno;
use rustix::ioctl::{IntegerSetter, Ioctl, IoctlOutput, Opcode, Updater, ioctl, opcode};
use std::ffi::{CStr, c_int, c_void};

/// `_IO(VFIO_TYPE, VFIO_BASE + number)`.
const fn request(number: u8) -> Opcode {
    opcode::none(b';', 100 + number)
}

const GET_API_VERSION: Opcode = request(0);
const CHECK_EXTENSION: Opcode = request(1);
const SET_IOMMU: Opcode = request(2);
const GROUP_GET_STATUS: Opcode = request(3);
const GROUP_SET_CONTAINER: Opcode = request(4);
const GROUP_GET_DEVICE_FD: Opcode = request(6);
const DEVICE_GET_REGION_INFO: Opcode = request(8);
const DEVICE_RESET: Opcode = request(11);
const IOMMU_GET_INFO: Opcode = request(12);
const IOMMU_MAP_DMA: Opcode = request(13);
const IOMMU_UNMAP_DMA: Opcode = request(14);

/// VFIO_TYPE1v2_IOMMU: unmaps whole mappings only.
const TYPE1_V2: usize = 3;
/// Every device of the group is in hands that VFIO trusts.
const GROUP_VIABLE: u32 = 1;

bitflags::bitflags! {
    /// VFIO_DMA_MAP_FLAG_*.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct MapFlags: u32 {
        const READ = 1;
        const WRITE = 1 << 1;
    }

    /// VFIO_REGION_INFO_FLAG_*.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct RegionFlags: u32 {
        const READ = 1;
        const WRITE = 1 << 1;
        const MMAP = 1 << 2;
    }
}

/// A request with an integer or nothing for an argument, whose result is the answer.
struct Ask<const OPCODE: Opcode>(usize);

// SAFETY: the requests used with this type take the argument by value and write no memory; the result is an integer.
unsafe impl<const OPCODE: Opcode> Ioctl for Ask<OPCODE> {
    type Output = c_int;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        OPCODE
    }
    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::without_provenance_mut(self.0)
    }
    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut c_void) -> rustix::io::Result<c_int> {
        Ok(output)
    }
}

/// VFIO_GROUP_GET_DEVICE_FD: a name in, a descriptor out.
struct GetDevice<'a>(&'a CStr);

// SAFETY: the kernel reads a string at the pointer, which is borrowed; it writes nothing there, and gives a new
// descriptor as the result.
unsafe impl Ioctl for GetDevice<'_> {
    type Output = OwnedFd;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        GROUP_GET_DEVICE_FD
    }
    fn as_ptr(&mut self) -> *mut c_void {
        self.0.as_ptr().cast_mut().cast()
    }
    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut c_void) -> rustix::io::Result<OwnedFd> {
        // SAFETY: the request succeeded, so its result is a descriptor that nobody else has.
        Ok(unsafe { OwnedFd::from_raw_fd(output) })
    }
}

/// A request that reads and writes one structure `T`, which begins with its size.
fn update<const OPCODE: Opcode, T>(fd: impl AsFd, value: &mut T) -> Result<(), Errno> {
    // SAFETY: each use in this file names the structure that include/uapi/linux/vfio.h gives for the request.
    let updater = unsafe { Updater::<OPCODE, T>::new(value) };
    // SAFETY: the structure is borrowed for the call and says its own size; what it names is its caller's, see the
    // invariant.
    unsafe { ioctl(fd, updater) }
}

/// The version of the interface that the kernel has.
pub(super) fn api_version(container: impl AsFd) -> Result<c_int, Errno> {
    // SAFETY: the request takes nothing.
    unsafe { ioctl(container, Ask::<GET_API_VERSION>(0)) }
}

/// Whether the kernel has type 1 of version 2.
pub(super) fn has_type1_v2(container: impl AsFd) -> Result<bool, Errno> {
    // SAFETY: the request takes an integer.
    unsafe { ioctl(container, Ask::<CHECK_EXTENSION>(TYPE1_V2)) }.map(|answer| answer > 0)
}

/// Makes the container one of type 1, version 2.
pub(super) fn set_iommu(container: impl AsFd) -> Result<(), Errno> {
    // SAFETY: the request takes an integer, and this is one it knows.
    let setter = unsafe { IntegerSetter::<SET_IOMMU>::new_usize(TYPE1_V2) };
    // SAFETY: as above; nothing is written.
    unsafe { ioctl(container, setter) }
}

#[repr(C)]
struct GroupStatus {
    size: u32,
    flags: u32,
}

/// Whether every device of the group can be used.
pub(super) fn is_viable(group: impl AsFd) -> Result<bool, Errno> {
    let mut status = GroupStatus { size: size_of::<GroupStatus>() as u32, flags: 0 };
    update::<GROUP_GET_STATUS, _>(group, &mut status)?;
    Ok(status.flags & GROUP_VIABLE != 0)
}

/// Puts the group into the container.
pub(super) fn set_container(group: impl AsFd, container: impl AsFd) -> Result<(), Errno> {
    let mut fd = container.as_fd().as_raw_fd();
    update::<GROUP_SET_CONTAINER, c_int>(group, &mut fd)
}

/// The device of this name in the group.
pub(super) fn device(group: impl AsFd, name: &CStr) -> Result<OwnedFd, Errno> {
    // SAFETY: the string is borrowed for the call.
    unsafe { ioctl(group, GetDevice(name)) }
}

/// Resets the device's function.
pub(super) fn reset(device: impl AsFd) -> Result<(), Errno> {
    // SAFETY: the request takes nothing. What the device was doing in memory ends by it.
    unsafe { ioctl(device, Ask::<DEVICE_RESET>(0)) }.map(drop)
}

/// struct vfio_region_info.
#[repr(C)]
pub(super) struct RegionInfo {
    size_of_this: u32,
    flags: u32,
    index: u32,
    cap_offset: u32,
    /// Bytes of the region.
    pub(super) size: u64,
    /// Where it begins in the device's file.
    pub(super) offset: u64,
}

impl RegionInfo {
    pub(super) fn flags(&self) -> RegionFlags {
        RegionFlags::from_bits_truncate(self.flags)
    }
}

/// What the device has at region `index`.
pub(super) fn region_info(device: impl AsFd, index: u32) -> Result<RegionInfo, Errno> {
    let size_of_this = size_of::<RegionInfo>() as u32;
    let mut info = RegionInfo { size_of_this, flags: 0, index, cap_offset: 0, size: 0, offset: 0 };
    update::<DEVICE_GET_REGION_INFO, _>(device, &mut info)?;
    Ok(info)
}

/// Bytes that are asked for of [`IOMMU_GET_INFO`]: room for some 250 ranges of addresses.
const INFO_BYTES: usize = 4096;

/// struct vfio_iommu_type1_info with the chain of capabilities behind it, as the kernel wrote them.
pub(super) fn iommu_info(container: impl AsFd) -> Result<Vec<u8>, Errno> {
    #[repr(C, align(8))]
    struct Buffer([u8; INFO_BYTES]);
    let mut buffer = Buffer([0; INFO_BYTES]);
    buffer.0[..4].copy_from_slice(&(INFO_BYTES as u32).to_ne_bytes());
    update::<IOMMU_GET_INFO, _>(container, &mut buffer)?;
    Ok(buffer.0.to_vec())
}

#[repr(C)]
struct DmaMap {
    size_of_this: u32,
    flags: u32,
    vaddr: u64,
    iova: u64,
    size: u64,
}

/// Pins `size` bytes of this process's memory at `vaddr` and lets devices reach them at `iova`. From here on a device
/// may read and write them at any time.
pub(super) fn map_dma(
    container: impl AsFd,
    vaddr: u64,
    iova: u64,
    size: u64,
    flags: MapFlags,
) -> Result<(), Errno> {
    let size_of_this = size_of::<DmaMap>() as u32;
    let mut map = DmaMap { size_of_this, flags: flags.bits(), vaddr, iova, size };
    update::<IOMMU_MAP_DMA, _>(container, &mut map)
}

#[repr(C)]
struct DmaUnmap {
    size_of_this: u32,
    flags: u32,
    iova: u64,
    size: u64,
}

/// Takes down what was mapped in the range, flushes, and unpins. Gives the bytes that were mapped.
pub(super) fn unmap_dma(container: impl AsFd, iova: u64, size: u64) -> Result<u64, Errno> {
    let size_of_this = size_of::<DmaUnmap>() as u32;
    let mut unmap = DmaUnmap { size_of_this, flags: 0, iova, size };
    update::<IOMMU_UNMAP_DMA, _>(container, &mut unmap)?;
    Ok(unmap.size)
}
