//! Which struct of the program's an asynchronous event is about.
//!
//! A device says what happened by number, and is shared by all who have it open: an event goes to whoever asks first.

use super::{Context, Handles, SharedDomains};
use crate::errno::Errno;
use hw_model::hca::{AsyncEvent, Cqn, Qpn, Srqn};
use hw_model::sync::Mutex;
use std::collections::HashMap;
use std::ffi::c_int;

/// The faces of a device's objects by number.
#[derive(Default)]
pub(crate) struct Faces {
    /// One that was opened several times has as many.
    qps: Mutex<HashMap<u32, Vec<usize>>>,
    cqs: Mutex<HashMap<u32, usize>>,
    srqs: Mutex<HashMap<u32, usize>>,
    pub(super) domains: SharedDomains,
    pub(crate) handles: Handles,
}

impl Faces {
    pub(crate) fn insert_qp(&self, number: Qpn, face: usize) {
        self.qps.lock().entry(number.0).or_default().push(face);
    }
    pub(crate) fn remove_qp(&self, number: Qpn, face: usize) {
        let mut qps = self.qps.lock();
        let Some(faces) = qps.get_mut(&number.0) else { return };
        faces.retain(|known| *known != face);
        if faces.is_empty() {
            qps.remove(&number.0);
        }
    }
    pub(crate) fn insert_cq(&self, number: Cqn, face: usize) {
        self.cqs.lock().insert(number.0, face);
    }
    pub(crate) fn remove_cq(&self, number: Cqn) {
        self.cqs.lock().remove(&number.0);
    }
    pub(crate) fn insert_srq(&self, number: Srqn, face: usize) {
        self.srqs.lock().insert(number.0, face);
    }
    pub(crate) fn remove_srq(&self, number: Srqn) {
        self.srqs.lock().remove(&number.0);
    }

    /// The number in `enum ibv_event_type`, and the element: a face, or the number of a port. `None` if the object is gone.
    fn event(&self, event: AsyncEvent) -> Option<(c_int, u64)> {
        let face =
            |map: &Mutex<HashMap<u32, usize>>, number: u32| map.lock().get(&number).map(|face| *face as u64);
        // Of several, the first hears of it.
        let of_qp = |number: Qpn| Some(*self.qps.lock().get(&number.0)?.first()? as u64);
        let (kind, element) = match event {
            AsyncEvent::CqError(number) => (0, face(&self.cqs, number.0)),
            AsyncEvent::QpFatal(number) => (1, of_qp(number)),
            AsyncEvent::QpRequestError(number) => (2, of_qp(number)),
            AsyncEvent::QpAccessError(number) => (3, of_qp(number)),
            AsyncEvent::CommunicationEstablished(number) => (4, of_qp(number)),
            AsyncEvent::SendQueueDrained(number) => (5, of_qp(number)),
            AsyncEvent::DeviceFatal => (8, Some(0)),
            AsyncEvent::PortActive(port) => (9, Some(port.into())),
            AsyncEvent::PortError(port) => (10, Some(port.into())),
            AsyncEvent::PKeyChange(port) => (12, Some(port.into())),
            AsyncEvent::SrqError(number) => (14, face(&self.srqs, number.0)),
            AsyncEvent::SrqLimitReached(number) => (15, face(&self.srqs, number.0)),
            AsyncEvent::LastWqeReached(number) => (16, of_qp(number)),
            AsyncEvent::GidChange(port) => (18, Some(port.into())),
            _ => return None,
        };
        element.map(|element| (kind, element))
    }
}

impl Context {
    /// The next asynchronous event of the device. Waits for one, unless the program made the descriptor non-blocking.
    pub(crate) fn next_event(&self) -> Result<(c_int, u64), Errno> {
        loop {
            let event = self.device.hca().events().next()?;
            if let Some(event) = self.event_faces().event(event) {
                return Ok(event);
            }
            self.device.hca().events().acknowledge(1);
        }
    }
}
