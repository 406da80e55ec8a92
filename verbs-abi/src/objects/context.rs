//! An open device.

use super::Faces;
use crate::errno::Errno;
use crate::process::Process;
use hw_model::sync::Arc;
use mr::device::model::ModelDevice;
use rustix::fd::{AsRawFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use std::ffi::c_int;

/// An open device. What is made from it holds it.
pub(crate) struct Context {
    pub(crate) process: Arc<Process>,
    pub(crate) device: Arc<ModelDevice>,
    pub(crate) index: usize,
    faces: Arc<Faces>,
    /// Programs may look at, duplicate and hand over the descriptor of a device; ours is good for nothing else.
    command: OwnedFd,
}

impl Context {
    /// Opens a device by its number.
    pub(crate) fn open(index: usize) -> Result<Arc<Self>, Errno> {
        let process = Process::get()?;
        let (device, faces) = process.device(index)?;
        let command = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
        let command = command.map_err(std::io::Error::from)?;
        Ok(Arc::new(Self { process, device, index, faces, command }))
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
