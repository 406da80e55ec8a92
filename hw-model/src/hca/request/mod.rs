//! Work requests and completions, as software sees them (IBTA volume 1, 11.4.1 and 11.4.2).

mod completion;
mod operation;
mod send;

pub use completion::{Attached, Completion, DatagramSource, Status};
pub use operation::{Operation, OperationCode, Remote, Sge, WindowBind};
pub use send::{AddressVector, Destination, PostError, RecvRequest, RequestId, SendRequest};
