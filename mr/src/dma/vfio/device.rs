//! A device of a container: its registers, its configuration space, and whether it may master the bus.

use super::address::{PciAddress, VfioGroup};
use super::bar::Bar;
use super::container::VfioContainer;
use super::sys::{self, RegionFlags};
use hw_model::sync::Arc;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use std::fmt;

/// Region of the configuration space (VFIO_PCI_CONFIG_REGION_INDEX).
const CONFIG_REGION: u32 = 7;
/// BARs of a function.
const BARS: u32 = 6;
/// The command register and its bits (PCI Local Bus Specification 3.0, 6.2.2).
const COMMAND: u64 = 4;
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_MASTER: u16 = 1 << 2;

/// A PCI function in this process's hands.
pub struct VfioDevice {
    container: Arc<VfioContainer>,
    address: PciAddress,
    fd: OwnedFd,
}

/// Why a device, or a part of it, cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// The device belongs to another group, or there is none.
    #[error("{address} is no device of group {group}")]
    NotInGroup {
        /// The device.
        address: PciAddress,
        /// The container's group.
        group: VfioGroup,
    },
    /// Somebody has it.
    #[error("{address} is in use")]
    Busy {
        /// The device.
        address: PciAddress,
    },
    /// No such BAR, or one that cannot be mapped: ports, or registers that VFIO keeps for itself.
    #[error("{address} has no BAR {index} that can be mapped")]
    NoBar {
        /// The device.
        address: PciAddress,
        /// Which BAR was asked for; there are 0 to 5.
        index: u32,
    },
    /// Something else that the kernel said.
    #[error("{address}: {step}: {reason}")]
    Kernel {
        /// The device.
        address: PciAddress,
        /// What was asked.
        step: &'static str,
        /// What the kernel said.
        reason: Errno,
    },
}

impl VfioDevice {
    pub(super) fn new(container: Arc<VfioContainer>, address: PciAddress, fd: OwnedFd) -> Self {
        Self { container, address, fd }
    }

    /// Where it is.
    #[must_use]
    pub fn address(&self) -> PciAddress {
        self.address
    }

    /// The address space that its DMA is translated by.
    #[must_use]
    pub fn container(&self) -> &Arc<VfioContainer> {
        &self.container
    }

    fn failed(&self, step: &'static str) -> impl FnOnce(Errno) -> DeviceError {
        let address = self.address;
        move |reason| DeviceError::Kernel { address, step, reason }
    }

    /// Maps a BAR into this process.
    ///
    /// # Errors
    /// See [`DeviceError`].
    pub fn bar(&self, index: u32) -> Result<Bar, DeviceError> {
        let none = DeviceError::NoBar { address: self.address, index };
        if index >= BARS {
            return Err(none);
        }
        let info = sys::region_info(&self.fd, index).map_err(self.failed("asking for a BAR"))?;
        let usable = RegionFlags::READ | RegionFlags::WRITE | RegionFlags::MMAP;
        if info.size == 0 || !info.flags().contains(usable) {
            return Err(none);
        }
        Bar::map(&self.fd, info.offset, info.size).map_err(self.failed("mapping a BAR"))
    }

    /// Lets the device answer to its BARs and, if `on`, start DMA.
    ///
    /// # Errors
    /// See [`DeviceError`].
    pub fn set_bus_master(&self, on: bool) -> Result<(), DeviceError> {
        let config = sys::region_info(&self.fd, CONFIG_REGION).map_err(self.failed("asking for a region"))?;
        let at = config.offset + COMMAND;
        let mut command = [0; 2];
        rustix::io::pread(&self.fd, &mut command, at).map_err(self.failed("reading its configuration"))?;
        let command = u16::from_le_bytes(command) & !COMMAND_MASTER | COMMAND_MEMORY;
        let command = if on { command | COMMAND_MASTER } else { command };
        rustix::io::pwrite(&self.fd, &command.to_le_bytes(), at)
            .map_err(self.failed("writing its configuration"))?;
        Ok(())
    }

    /// Resets the function: whatever it was doing ends.
    ///
    /// # Errors
    /// See [`DeviceError`].
    pub fn reset(&self) -> Result<(), DeviceError> {
        sys::reset(&self.fd).map_err(self.failed("resetting it"))
    }
}

impl Drop for VfioDevice {
    /// The device no longer starts DMA: what it was told of is about to be somebody else's.
    fn drop(&mut self) {
        if let Err(error) = self.set_bus_master(false) {
            tracing::error!(%error, "a device that is given back may still master the bus");
        }
    }
}

impl fmt::Debug for VfioDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VfioDevice").field("address", &self.address).finish_non_exhaustive()
    }
}
