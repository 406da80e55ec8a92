//! Extended domains, which programs share by a file.

use super::Context;
use crate::errno::Errno;
use hw_model::hca::ExtendedDomain;
use hw_model::sync::{Arc, Mutex, Weak};
use std::collections::HashMap;

/// An open extended domain.
pub(crate) struct Xrcd {
    pub(crate) context: Arc<Context>,
    pub(crate) domain: Arc<ExtendedDomain>,
}

/// Device and inode of the file that a domain is shared by.
pub(crate) type FileName = (u64, u64);

/// The domains of a device that have a file.
#[derive(Default)]
pub(crate) struct SharedDomains(Mutex<HashMap<FileName, Weak<ExtendedDomain>>>);

impl Xrcd {
    /// Opens the domain of a file, or one of its own. As the kernel has it (ib_uverbs_open_xrcd): one that is not there is made
    /// if `create`, one that is there is refused if `exclusive`.
    pub(crate) fn open(
        context: &Arc<Context>,
        file: Option<FileName>,
        (create, exclusive): (bool, bool),
    ) -> Result<Arc<Self>, Errno> {
        let new = || Ok::<_, Errno>(context.device.hca().open_domain()?);
        let domain = match file {
            None => new()?,
            Some(file) => {
                let mut known = context.event_faces().domains.0.lock();
                known.retain(|_, domain| domain.strong_count() > 0);
                match known.get(&file).and_then(Weak::upgrade) {
                    Some(_) if exclusive => return Err(Errno::INVAL),
                    Some(domain) => domain,
                    None if !create => return Err(Errno::AGAIN),
                    None => {
                        let domain = new()?;
                        known.insert(file, Arc::downgrade(&domain));
                        domain
                    }
                }
            }
        };
        Ok(Arc::new(Self { context: Arc::clone(context), domain }))
    }
}
