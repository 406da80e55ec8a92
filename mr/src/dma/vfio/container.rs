//! A container: one I/O address space, and the group of devices that it translates for.

use super::address::{PciAddress, VfioGroup};
use super::device::{DeviceError, VfioDevice};
use super::info::{InfoError, IommuInfo};
use super::sys;
use hw_model::addr::Iova;
use hw_model::iommu::{ConfigError, Cookie, Domain, DomainConfig};
use hw_model::sync::Arc;
use hw_model::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use odp::space::process::ProcessSpace;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::ffi::CString;
use std::fmt;
use std::path::{Path, PathBuf};

/// The file that gives containers.
const CONTAINERS: &str = "/dev/vfio/vfio";
/// The only version of the interface that there ever was.
const API_VERSION: i32 = 0;
/// Bits of an IOVA that the allocator and the table beside the kernel's hold.
const MOST_BITS: u32 = 48;

/// A VFIO container of type 1, version 2, with one group in it.
///
/// What is mapped in it is this process's memory, as [`ProcessSpace`] reports it. The kernel pins every page for as long as
/// it is linked.
pub struct VfioContainer {
    pub(super) fd: OwnedFd,
    /// Kept open: the group leaves the container when it is closed.
    group: OwnedFd,
    number: VfioGroup,
    pub(super) memory: Arc<ProcessSpace>,
    /// What is mapped, as the kernel does not say it: see [`super::space`].
    pub(super) table: Arc<Domain>,
    pub(super) cookie: Cookie,
    pub(super) holes: Vec<(Iova, u64)>,
    /// Mappings that could be made when the container was opened.
    pub(super) most_entries: Option<u32>,
    pub(super) warned: AtomicBool,
    /// Answers of the kernel that the table did not expect.
    pub(super) surprises: AtomicU64,
}

/// Why a container cannot be had. Each says what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// No VFIO in this kernel, or not loaded.
    #[error("{path} is missing: load the kernel modules vfio, vfio_iommu_type1 and vfio-pci", path = CONTAINERS)]
    NoVfio,
    /// The group has no file.
    #[error("{} is missing: bind every device of group {group} to vfio-pci", group.path().display())]
    NoGroup {
        /// The group.
        group: VfioGroup,
    },
    /// A file may not be opened.
    #[error("{} may not be opened for reading and writing: make this user its owner", path.display())]
    Permission {
        /// The file.
        path: PathBuf,
    },
    /// Another process has it, or this one for the second time.
    #[error("group {group} is in use by another container")]
    Busy {
        /// The group.
        group: VfioGroup,
    },
    /// A device of the group is still in the hands of a driver of the host.
    #[error("group {group} is not viable: bind every device of it to vfio-pci, or to no driver")]
    NotViable {
        /// The group.
        group: VfioGroup,
    },
    /// The kernel has VFIO without what this needs of it.
    #[error("this kernel's VFIO has no IOMMU of type 1 version 2: load the kernel module vfio_iommu_type1")]
    NoType1,
    /// Another interface than the one known here.
    #[error("this kernel's VFIO has version {version} of its interface; {API_VERSION} is known")]
    Version {
        /// The kernel's.
        version: i32,
    },
    /// What the container says of itself does not parse.
    #[error("group {group}: the container describes its IOMMU as no other does: {reason}")]
    Info {
        /// The group.
        group: VfioGroup,
        /// How.
        reason: InfoError,
    },
    /// Its addresses or pages are of sizes that this does not work with.
    #[error("group {group}: {reason}")]
    Geometry {
        /// The group.
        group: VfioGroup,
        /// Which.
        reason: ConfigError,
    },
    /// Something else that the kernel said.
    #[error("group {group} cannot be opened: {step}: {reason}")]
    Kernel {
        /// The group.
        group: VfioGroup,
        /// What was asked.
        step: &'static str,
        /// What the kernel said.
        reason: Errno,
    },
}

fn open(path: &Path, missing: OpenError, group: VfioGroup) -> Result<OwnedFd, OpenError> {
    rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(|errno| match errno {
        Errno::NOENT | Errno::NODEV | Errno::NXIO => missing,
        Errno::ACCESS | Errno::PERM => OpenError::Permission { path: path.to_owned() },
        Errno::BUSY => OpenError::Busy { group },
        reason => OpenError::Kernel { group, step: "opening its file", reason },
    })
}

impl VfioContainer {
    /// A container for the devices of `group`, in which memory of `memory` is mapped.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(group: VfioGroup, memory: &Arc<ProcessSpace>) -> Result<Arc<Self>, OpenError> {
        let number = group;
        let kernel = |step| move |reason| OpenError::Kernel { group: number, step, reason };
        let fd = open(Path::new(CONTAINERS), OpenError::NoVfio, number)?;
        let version = sys::api_version(&fd).map_err(kernel("asking for the version"))?;
        if version != API_VERSION {
            return Err(OpenError::Version { version });
        }
        if !sys::has_type1_v2(&fd).map_err(kernel("asking for type 1"))? {
            return Err(OpenError::NoType1);
        }
        let group = open(&number.path(), OpenError::NoGroup { group: number }, number)?;
        if !sys::is_viable(&group).map_err(kernel("asking whether it is viable"))? {
            return Err(OpenError::NotViable { group: number });
        }
        sys::set_container(&group, &fd).map_err(|errno| match errno {
            Errno::BUSY | Errno::INVAL => OpenError::Busy { group: number },
            reason => kernel("putting it into a container")(reason),
        })?;
        sys::set_iommu(&fd).map_err(|errno| match errno {
            Errno::PERM => OpenError::NotViable { group: number },
            reason => kernel("choosing type 1")(reason),
        })?;
        let info = sys::iommu_info(&fd).map_err(kernel("asking for its IOMMU"))?;
        let info = IommuInfo::parse(&info).map_err(|reason| OpenError::Info { group: number, reason })?;
        let width = info.width(MOST_BITS);
        let config = DomainConfig {
            width,
            granule_shift: info.granule_shift(),
            iotlb: None,
            fault_log: 1,
            ..DomainConfig::default()
        };
        let table = Domain::new(config).map_err(|reason| OpenError::Geometry { group: number, reason })?;
        Ok(Arc::new(Self {
            fd,
            group,
            number,
            memory: Arc::clone(memory),
            table,
            cookie: Cookie::default(),
            holes: info.holes(width),
            most_entries: info.entries_left,
            warned: AtomicBool::new(false),
            surprises: AtomicU64::new(0),
        }))
    }

    /// The group in it.
    #[must_use]
    pub fn group(&self) -> VfioGroup {
        self.number
    }

    /// The device at `address`, which belongs to the group.
    ///
    /// # Errors
    /// See [`DeviceError`].
    pub fn device(self: &Arc<Self>, address: PciAddress) -> Result<VfioDevice, DeviceError> {
        let name = CString::new(address.to_string()).expect("an address has no zero byte");
        let fd = sys::device(&self.group, &name).map_err(|errno| match errno {
            Errno::NODEV | Errno::NOENT => DeviceError::NotInGroup { address, group: self.number },
            Errno::BUSY => DeviceError::Busy { address },
            reason => DeviceError::Kernel { address, step: "opening it", reason },
        })?;
        Ok(VfioDevice::new(Arc::clone(self), address, fd))
    }

    /// What the kernel says of its IOMMU at the moment.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn info(&self) -> Result<IommuInfo, OpenError> {
        let group = self.number;
        let info = sys::iommu_info(&self.fd).map_err(|reason| {
            let step = "asking for its IOMMU";
            OpenError::Kernel { group, step, reason }
        })?;
        IommuInfo::parse(&info).map_err(|reason| OpenError::Info { group, reason })
    }

    /// Times that the kernel answered otherwise than what is linked had us expect. 0, or there is a bug here.
    #[must_use]
    pub fn surprises(&self) -> u64 {
        self.surprises.load(Ordering::Relaxed)
    }
}

/// For what this does not offer. Whoever maps or unmaps through it finds [`VfioContainer::surprises`] counted.
impl AsFd for VfioContainer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl fmt::Debug for VfioContainer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VfioContainer").field("group", &self.number).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use odp::space::process::Options;

    #[test]
    fn a_machine_without_vfio_says_which_modules_to_load() {
        if Path::new(CONTAINERS).exists() {
            println!("SKIPPED a_machine_without_vfio: this one has it");
            return;
        }
        let memory = ProcessSpace::open(Options::default()).expect("this process can use its own memory");
        let error = VfioContainer::open(VfioGroup(0), &memory).map(drop);
        assert_eq!(error, Err(OpenError::NoVfio));
        assert!(OpenError::NoVfio.to_string().contains("vfio_iommu_type1"));
    }
}
