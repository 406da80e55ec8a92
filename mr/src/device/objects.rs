//! The objects of a device beside regions, queues and queue pairs. Not every device has all of them: what one has not, it
//! refuses by name.

use hw_model::hca::{AddressVector, AsyncEvent, CompletionEvent, Key, OutsideDeviceMemory, WindowKind};
use std::any::Any;
use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

/// Why a device gave no object.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ObjectError<E: std::error::Error + 'static> {
    /// This device has none of the kind.
    #[error("this device has no {object}")]
    Unsupported {
        /// The kind.
        object: &'static str,
    },
    /// It is another device's object that was given.
    #[error("the {object} belongs to another device")]
    Foreign {
        /// The kind.
        object: &'static str,
    },
    /// It refused.
    #[error(transparent)]
    Refused(#[from] E),
}

impl<E: std::error::Error> ObjectError<E> {
    pub(super) fn unsupported<T>(object: &'static str) -> Result<T, Self> {
        Err(Self::Unsupported { object })
    }
}

/// Where completion queues say that they have something (`ibv_create_comp_channel`).
pub trait CompletionChannel: Any + Send + Sync {
    /// The descriptor to poll: readable while there is an event. Only to be polled, and to be made non-blocking.
    fn descriptor(&self) -> BorrowedFd<'_>;
    /// The oldest event; sleeps until there is one, unless the descriptor was made non-blocking. To be acknowledged at its
    /// queue.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`].
    fn next(&self) -> io::Result<CompletionEvent>;
    /// The oldest event; `None` after `timeout`.
    fn next_within(&self, timeout: Duration) -> Option<CompletionEvent>;
}

/// What happens to the objects of a device without a request that could tell of it.
pub trait AsyncEventStream {
    /// The descriptor to poll: readable while there is an event.
    ///
    /// # Errors
    /// What the operating system says if it gives no descriptor.
    fn descriptor(&self) -> io::Result<BorrowedFd<'_>>;
    /// The oldest event; sleeps until there is one, unless the descriptor was made non-blocking.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`].
    fn next(&self) -> io::Result<AsyncEvent>;
    /// The oldest event; `None` after `timeout`.
    fn next_within(&self, timeout: Duration) -> Option<AsyncEvent>;
    /// Counts events as dealt with.
    fn acknowledge(&self, events: u64);
    /// Events that were taken and not acknowledged.
    fn unacknowledged(&self) -> u64;
}

/// A memory window. It reaches nothing until a work request binds it ([`Operation::Bind`](hw_model::hca::Operation::Bind)).
/// Dropping it ends what it is bound to.
pub trait Window: Any + Send + Sync {
    /// The key that it was made with. A bind may give it another lowest byte; the rest is its name.
    fn key(&self) -> Key;
    /// Its kind.
    fn kind(&self) -> WindowKind;
}

/// A way to a port, for datagrams.
pub trait AddressHandle: Any + Send + Sync {
    /// Where it leads.
    fn vector(&self) -> AddressVector;
}

/// Memory in the device.
pub trait DeviceMemory: Any + Send + Sync {
    /// Bytes.
    fn len(&self) -> u64;
    /// Whether it has none: never.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Copies `data` to `offset`.
    ///
    /// # Errors
    /// [`OutsideDeviceMemory`]; nothing was copied.
    fn copy_to(&self, offset: u64, data: &[u8]) -> Result<(), OutsideDeviceMemory>;
    /// Copies from `offset`.
    ///
    /// # Errors
    /// [`OutsideDeviceMemory`]; nothing was copied.
    fn copy_from(&self, offset: u64, out: &mut [u8]) -> Result<(), OutsideDeviceMemory>;
}

/// A key that stands for itself: of device memory, whose addresses count from 0, or of no memory at all. Dropping it ends
/// it.
pub trait KeyHandle: Any + Send + Sync {
    /// The key, local and, if it is a region's, remote.
    fn key(&self) -> Key;
    /// Bytes that it covers; all that there could be for a null key.
    fn len(&self) -> u64;
    /// Whether it covers none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
