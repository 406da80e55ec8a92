//! Objects of a program that uses the crate `ibverbs`.
//!
//! That crate shows no pointer (0.9.2). A protection domain of it is two pointers and nothing else: to its context, whose
//! address the program can tell, and to the `struct ibv_pd`. So the second is whichever is not the first, in whatever order
//! the compiler has put them; the `ibv_pd` names its `ibv_context`. The manifest asks for that version exactly, and the
//! size is checked when this is compiled.
//!
//! Unsafe island. Invariant: what is read is a domain that the program lends, of two initialised pointers and no padding; the
//! domain and its context live as long as what is made of them here, because that holds them or because the caller
//! vouched for it.
#![allow(unsafe_code)]

use super::context::VerbsDevice;
use super::error::VerbsError;
use super::pd::VerbsPd;
use hw_model::sync::Arc;
use ibverbs::{Context, ProtectionDomain};
use rdma_sys::{ibv_context, ibv_pd};
use std::any::Any;
use std::ffi::c_void;
use std::ptr::{self, NonNull};

type Words = [*const c_void; 2];

const _: () = assert!(
    size_of::<ProtectionDomain<'static>>() == size_of::<Words>()
        && align_of::<ProtectionDomain<'static>>() == align_of::<Words>(),
    "ibverbs::ProtectionDomain is no longer a reference and a pointer"
);

/// The `ibv_pd` of `pd`, and its context; `None` unless `pd` was made from `context`.
fn behind(context: &Context, pd: &ProtectionDomain<'_>) -> Option<(NonNull<ibv_pd>, NonNull<ibv_context>)> {
    // SAFETY: two pointers and nothing between them, as the assertion above says; both are there while `pd` is borrowed.
    let words = unsafe { ptr::from_ref(pd).cast::<Words>().read() };
    let of = ptr::from_ref(context).cast::<c_void>();
    let at = words.iter().position(|word| ptr::eq(*word, of))?;
    let domain = NonNull::new(words[1 - at].cast_mut().cast::<ibv_pd>())?;
    // SAFETY: the program's own domain, live while `pd` is; the struct begins with its context in every version (verbs.h).
    let context = NonNull::new(unsafe { (*domain.as_ptr()).context })?;
    Some((domain, context))
}

fn foreign() -> VerbsError {
    VerbsError::Foreign { device: "the context that was handed over".to_owned() }
}

impl VerbsDevice {
    /// A context that the program has opened with the crate `ibverbs`. It is held as long as it is used here.
    ///
    /// # Errors
    /// What the device said to a question; [`VerbsError::Refused`] if it gives no protection domain.
    pub fn from_ibverbs(context: Arc<Context>) -> Result<Arc<Self>, VerbsError> {
        let made = context.alloc_pd();
        let pd = made.map_err(|_| VerbsError::NoDomain { context: "the crate ibverbs" })?;
        let (_, open) = behind(&context, &pd).ok_or_else(foreign)?;
        drop(pd);
        // SAFETY: open as long as the program's context, which is held from here on.
        unsafe { Self::from_context(open, context) }
    }
}

impl VerbsPd {
    /// A protection domain that the program has made of `context` with the crate `ibverbs`. It is held as long as it is used
    /// here. Regions and queue pairs made in it work together with the program's own.
    ///
    /// ```no_run
    /// # use mr::device::verbs::VerbsPd;
    /// # use hw_model::sync::Arc;
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let devices = ibverbs::devices()?;
    /// let context = devices.iter().next().ok_or("no device")?.open()?;
    /// let context: &'static ibverbs::Context = Box::leak(Box::new(context));
    /// let domain = Arc::new(context.alloc_pd()?);
    /// let pd = VerbsPd::from_ibverbs(context, Arc::clone(&domain))?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`VerbsError::Foreign`] if it is a domain of another context, and what the device said to a question.
    pub fn from_ibverbs(
        context: &'static Context,
        pd: Arc<ProtectionDomain<'static>>,
    ) -> Result<Arc<Self>, VerbsError> {
        let lent = Arc::clone(&pd);
        // SAFETY: the domain is held, and so is its context, which lives for ever.
        unsafe { Self::from_borrowed_ibverbs(context, &lent, pd) }
    }

    /// The same for a domain that does not live for ever. `keep` is held as long as it is used here.
    ///
    /// # Errors
    /// Those of [`VerbsPd::from_ibverbs`].
    ///
    /// # Safety
    /// `pd` lives until this domain and everything made in it is gone, or until `keep` is dropped.
    pub unsafe fn from_borrowed_ibverbs(
        context: &Context,
        pd: &ProtectionDomain<'_>,
        keep: Arc<dyn Any + Send + Sync>,
    ) -> Result<Arc<Self>, VerbsError> {
        let (domain, open) = behind(context, pd).ok_or_else(foreign)?;
        // SAFETY: open as long as the domain, by the caller's word.
        let device = unsafe { VerbsDevice::from_context(open, Arc::clone(&keep)) }?;
        // SAFETY: a domain of that context, by the caller's word.
        Ok(unsafe { Self::from_pd(&device, domain, keep) })
    }
}
