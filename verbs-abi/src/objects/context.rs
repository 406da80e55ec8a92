//! An open device.

use super::{Faces, FileName};
use crate::errno::Errno;
use crate::process::{Process, device_name};
use hw_model::sync::Arc;
use mr::device::model::ModelDevice;
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::fs::{MemfdFlags, memfd_create};
use std::ffi::c_int;
use std::io;

/// An open device. What is made from it holds it.
pub(crate) struct Context {
    pub(crate) process: Arc<Process>,
    pub(crate) device: Arc<ModelDevice>,
    pub(crate) index: usize,
    faces: Arc<Faces>,
    /// Programs may look at, duplicate and hand over the descriptor of a device; ours is good for nothing else.
    command: OwnedFd,
    /// Its descriptor is no other's: it was opened, not imported.
    is_own: bool,
}

impl Context {
    /// Opens a device by its number.
    pub(crate) fn open(index: usize) -> Result<Arc<Self>, Errno> {
        // A file like no other, by which the device can be imported.
        let command = memfd_create(device_name(index), MemfdFlags::CLOEXEC).map_err(io::Error::from)?;
        let context = Self::over(index, command, true)?;
        context.process.commands().insert(file_name(&context.command)?, index);
        Ok(context)
    }

    fn over(index: usize, command: OwnedFd, is_own: bool) -> Result<Arc<Self>, Errno> {
        let process = Process::get()?;
        let (device, faces) = process.device(index)?;
        Ok(Arc::new(Self { process, device, index, faces, command, is_own }))
    }

    /// The number of the device that this descriptor is of.
    pub(crate) fn index_of(command: BorrowedFd<'_>) -> Result<usize, Errno> {
        Process::get()?.commands().get(&file_name(command)?).copied().ok_or(Errno::INVAL)
    }

    /// Opens a device by a descriptor of one that is open.
    pub(crate) fn import(index: usize, command: OwnedFd) -> Result<Arc<Self>, Errno> {
        Self::over(index, command, false)
    }

    /// Whose the device's events are.
    pub(crate) fn event_faces(&self) -> &Arc<Faces> {
        &self.faces
    }

    /// Readable while asynchronous events wait.
    pub(crate) fn event_fd(&self) -> Result<c_int, Errno> {
        Ok(self.device.hca().events().descriptor()?.as_raw_fd())
    }

    pub(crate) fn command_fd(&self) -> c_int {
        self.command.as_raw_fd()
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if let (true, Ok(name)) = (self.is_own, file_name(&self.command)) {
            self.process.commands().remove(&name);
        }
    }
}

/// What a file is known by, whatever descriptor it is reached through.
pub(crate) fn file_name(file: impl AsFd) -> Result<FileName, Errno> {
    let status = rustix::fs::fstat(file).map_err(io::Error::from)?;
    Ok((status.st_dev, status.st_ino))
}
