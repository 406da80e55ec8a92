//! The two calls of `verbs_context` that are needed here and that rdma-sys 0.3.0 never makes.
//!
//! libibverbs marks a context that has a `verbs_context` around it by an `abi_compat` of all ones (verbs.h,
//! `verbs_get_ctx`). rdma-sys compares it with the ones of 32 bits, so that on a machine of 64 bits every inline of it takes
//! its fallback: advice is always refused, and no device has ODP.
//!
//! Unsafe island. Invariant: a `verbs_context` is looked for only around a context that says that it has one, and a member of
//! it is read only if its size says that it is there.
#![allow(unsafe_code)]

use rdma_sys::{ibv_context, ibv_device_attr_ex, ibv_pd, ibv_query_device, ibv_sge, verbs_context};
use rustix::io::Errno;
use std::mem::offset_of;
use std::ptr;

/// The error number that a call gave back, positive by the manual and negative by some drivers; what is none is an error of
/// the driver.
pub(super) fn errno(code: i32) -> Errno {
    let number = code.unsigned_abs();
    if (1..4096).contains(&number) { Errno::from_raw_os_error(number as i32) } else { Errno::IO }
}

/// The `verbs_context` around a context, if there is one.
///
/// # Safety
/// `context` is open.
unsafe fn around(context: *mut ibv_context) -> Option<*mut verbs_context> {
    // SAFETY: the caller's context is there.
    let mark = unsafe { (*context).abi_compat } as usize;
    // SAFETY: libibverbs says by the mark that the context is a member of a `verbs_context`.
    (mark == usize::MAX).then(|| unsafe { context.byte_sub(offset_of!(verbs_context, context)).cast() })
}

/// Whether a `verbs_context` of `size` bytes has the member at `offset`. It grows at its beginning.
fn reaches(size: usize, offset: usize) -> bool {
    size >= size_of::<verbs_context>() - offset
}

/// `ibv_query_device_ex`, or what `ibv_query_device` says of it.
///
/// # Safety
/// `context` is open.
pub(super) unsafe fn query_device(context: *mut ibv_context) -> Result<ibv_device_attr_ex, Errno> {
    // SAFETY: all zeroes is a value of this C struct.
    let mut said: ibv_device_attr_ex = unsafe { std::mem::zeroed() };
    // SAFETY: the caller's context.
    if let Some(extended) = unsafe { around(context) } {
        // SAFETY: it is there as long as the context.
        let size = unsafe { (*extended).sz };
        if reaches(size, offset_of!(verbs_context, query_device_ex)) {
            // SAFETY: the size says that the member is there.
            let call = unsafe { (*extended).query_device_ex };
            if let Some(call) = call {
                // SAFETY: an open context, and room for what it says.
                let code = unsafe { call(context, ptr::null(), &raw mut said, size_of_val(&said)) };
                match errno(code) {
                    _ if code == 0 => return Ok(said),
                    Errno::OPNOTSUPP => {}
                    other => return Err(other),
                }
            }
        }
    }
    // SAFETY: an open context, and room for what it says.
    let code = unsafe { ibv_query_device(context, &raw mut said.orig_attr) };
    if code == 0 { Ok(said) } else { Err(errno(code)) }
}

/// `ibv_advise_mr` for `pieces`.
///
/// # Safety
/// `pd` is there.
pub(super) unsafe fn advise(
    pd: *mut ibv_pd,
    advice: u32,
    flags: u32,
    pieces: &mut [ibv_sge],
) -> Result<(), Errno> {
    // SAFETY: the caller's domain is there.
    let context = unsafe { (*pd).context };
    // SAFETY: and so is its context.
    let extended = unsafe { around(context) }.ok_or(Errno::OPNOTSUPP)?;
    // SAFETY: it is there as long as the context.
    let size = unsafe { (*extended).sz };
    if !reaches(size, offset_of!(verbs_context, advise_mr)) {
        return Err(Errno::OPNOTSUPP);
    }
    // SAFETY: the size says that the member is there.
    let call = unsafe { (*extended).advise_mr }.ok_or(Errno::OPNOTSUPP)?;
    let count = u32::try_from(pieces.len()).map_err(|_| Errno::INVAL)?;
    // SAFETY: a domain that is there, and pieces for as long as the call.
    let code = unsafe { call(pd, advice, flags, pieces.as_mut_ptr(), count) };
    if code == 0 { Ok(()) } else { Err(errno(code)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rdma_sys::ib_uverbs_advise_mr_advice as Advice;
    use std::os::raw::c_int;

    extern "C" fn count_pieces(
        _pd: *mut ibv_pd,
        _advice: Advice::Type,
        _flags: u32,
        _pieces: *mut ibv_sge,
        count: u32,
    ) -> c_int {
        // An answer that nobody else gives.
        1000 + count as c_int
    }

    /// A context that says of itself what libibverbs says of one, on this machine's word size.
    fn context(sz: usize) -> Box<verbs_context> {
        // SAFETY: all zeroes is a value of this C struct.
        let mut context: Box<verbs_context> = Box::new(unsafe { std::mem::zeroed() });
        context.context.abi_compat = usize::MAX as *mut _;
        context.sz = sz;
        context.advise_mr = Some(count_pieces);
        context
    }

    fn advise_both(context: &mut verbs_context) -> (Result<(), Errno>, c_int) {
        // SAFETY: all zeroes is a value of this C struct.
        let mut pd: ibv_pd = unsafe { std::mem::zeroed() };
        pd.context = &raw mut context.context;
        let mut piece = [ibv_sge { addr: 0, length: 1, lkey: 0 }];
        // SAFETY: the domain and its context are there; the call only counts.
        let ours = unsafe { advise(&raw mut pd, 0, 0, &mut piece) };
        // SAFETY: the same.
        let theirs = unsafe { rdma_sys::ibv_advise_mr(&raw mut pd, 0, 0, piece.as_mut_ptr(), 1) };
        (ours, theirs)
    }

    /// What rdma-sys 0.3.0 gets wrong: if it ever says what we say, our own two can go.
    #[test]
    fn an_extended_context_is_found_on_64_bits_where_rdma_sys_finds_none() {
        let (ours, theirs) = advise_both(&mut context(size_of::<verbs_context>()));
        assert_eq!(ours, Err(Errno::from_raw_os_error(1001)), "the driver's function was not called");
        assert_eq!(theirs, libc::EOPNOTSUPP, "rdma-sys is right now: use its inlines");
    }

    #[test]
    fn a_member_beyond_the_size_of_the_context_is_not_read() {
        let without = size_of::<verbs_context>() - offset_of!(verbs_context, advise_mr) - 1;
        assert_eq!(advise_both(&mut context(without)).0, Err(Errno::OPNOTSUPP));
    }

    #[test]
    fn a_context_that_does_not_say_that_it_is_extended_is_left_alone() {
        let mut plain = context(size_of::<verbs_context>());
        plain.context.abi_compat = std::ptr::null_mut();
        assert_eq!(advise_both(&mut plain).0, Err(Errno::OPNOTSUPP));
    }
}
