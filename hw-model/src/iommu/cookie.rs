//! What the software that manages an I/O address space keeps with it.

use crate::sync::OnceLock;
use std::any::Any;

/// A place for one value of the software that manages an address space: `iova_cookie` of the kernel's
/// `struct iommu_domain`. All devices of the space find the same value there, the IOVA allocator for instance.
#[derive(Default)]
pub struct Cookie(OnceLock<Box<dyn Any + Send + Sync>>);

impl Cookie {
    /// The value, made by whoever comes first.
    ///
    /// # Panics
    /// If the place holds a value of another type: two kinds of software manage one space.
    pub fn get_or_init<T: Any + Clone + Send + Sync>(&self, make: impl FnOnce() -> T) -> T {
        let value = self.0.get_or_init(|| Box::new(make()));
        value.downcast_ref::<T>().expect("one kind of software manages this space").clone()
    }
}

impl std::fmt::Debug for Cookie {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Cookie").field(&self.0.get().is_some()).finish()
    }
}
