//! The structs that programs hold, with what is behind them.
//!
//! Unsafe island. Invariant: a pointer that a program has is one that [`give`] returned and [`take`] has not taken back;
//! that is the contract of libibverbs, and nothing here can check more of it than that the pointer is not NULL. The program
//! writes to the face, which is therefore never behind a Rust reference; what is behind the face is only read through
//! shared references, and guards itself.
#![allow(unsafe_code)]

use crate::abi::*;
use crate::errno::Errno;
use crate::objects;
use hw_model::sync::Arc;

/// A struct of the C header that something of ours is behind.
pub(crate) trait Face: Copy {
    /// What is behind it.
    type Inner: 'static;
}

macro_rules! faces {
    ($($face:ident: $inner:ty,)*) => {
        $(impl Face for $face {
            type Inner = $inner;
        })*
    };
}

faces! {
    VerbsContext: Arc<objects::Context>,
    IbvPd: Arc<objects::Pd>,
    IbvTd: Arc<objects::Td>,
    IbvMr: objects::Mr,
    IbvCompChannel: Arc<objects::Channel>,
    IbvCqEx: Arc<objects::Cq>,
    IbvQpEx: Arc<objects::Qp>,
    IbvSrq: Arc<objects::Srq>,
    IbvXrcd: Arc<objects::Xrcd>,
    IbvAh: objects::Ah,
    IbvMw: objects::Mw,
    IbvDm: objects::Dm,
}

/// One object: what the program sees, then what we have. The face is first, so that both have one address.
#[repr(C)]
struct Handle<F: Face> {
    face: F,
    inner: F::Inner,
}

/// Gives an object to the program.
pub(crate) fn give<F: Face>(face: F, inner: F::Inner) -> *mut F {
    Box::into_raw(Box::new(Handle { face, inner })).cast()
}

/// What is behind a face.
///
/// # Safety
/// NULL, or the invariant of this file holds for it until the last use of what is returned.
pub(crate) unsafe fn behind<'a, F: Face>(face: *mut F) -> Result<&'a F::Inner, Errno> {
    let handle: *mut Handle<F> = face.cast();
    if handle.is_null() {
        return Err(Errno::INVAL);
    }
    // SAFETY: `give` made it and `take` has not been called, so it is a whole handle; nobody writes to this part.
    Ok(unsafe { &(*handle).inner })
}

/// Takes an object back.
///
/// # Safety
/// The invariant of this file holds for it, and the program does not use it any more.
pub(crate) unsafe fn take<F: Face>(face: *mut F) -> F::Inner {
    // SAFETY: `give` made it from a box, and it is taken back once.
    let handle = unsafe { Box::from_raw(face.cast::<Handle<F>>()) };
    handle.inner
}

/// Copies a struct that the program has filled in.
///
/// # Safety
/// NULL, or points to such a struct.
pub(crate) unsafe fn read<T: Copy>(pointer: *const T) -> Result<T, Errno> {
    if pointer.is_null() {
        return Err(Errno::INVAL);
    }
    // SAFETY: not NULL, so it is what the caller says. A program may keep its structs at any alignment.
    Ok(unsafe { pointer.read_unaligned() })
}

/// Fills in a struct of the program's.
///
/// # Safety
/// NULL, or points to room for such a struct.
pub(crate) unsafe fn write<T: Copy>(pointer: *mut T, value: T) -> Result<(), Errno> {
    if pointer.is_null() {
        return Err(Errno::INVAL);
    }
    // SAFETY: not NULL, so it is what the caller says.
    unsafe { pointer.write_unaligned(value) };
    Ok(())
}

/// Fills in the first `len` bytes of a struct that is longer or shorter in the program's header than here. What we do not
/// know of it becomes 0.
///
/// # Safety
/// NULL, or points to `len` bytes of room.
pub(crate) unsafe fn write_part<T: Copy>(pointer: *mut T, len: usize, value: T) -> Result<(), Errno> {
    if pointer.is_null() {
        return Err(Errno::INVAL);
    }
    let ours = len.min(size_of::<T>());
    // SAFETY: the caller has room for `len` bytes, and `ours` is no more.
    unsafe { pointer.cast::<u8>().copy_from_nonoverlapping((&raw const value).cast(), ours) };
    // SAFETY: as above; the rest of the room.
    unsafe { pointer.cast::<u8>().wrapping_add(ours).write_bytes(0, len - ours) };
    Ok(())
}

/// The `count` elements of an array of the program's.
///
/// # Safety
/// `count` is 0, or `pointer` is NULL or points to so many elements, which nobody writes while the slice is used.
pub(crate) unsafe fn array<'a, T>(pointer: *const T, count: usize) -> Result<&'a [T], Errno> {
    if count == 0 {
        return Ok(&[]);
    }
    if pointer.is_null() || !pointer.is_aligned() {
        return Err(Errno::INVAL);
    }
    // SAFETY: not NULL and aligned, so it is what the caller says.
    Ok(unsafe { std::slice::from_raw_parts(pointer, count) })
}

/// A string of the program's.
///
/// # Safety
/// NULL, or points to a string that ends with 0.
pub(crate) unsafe fn text<'a>(pointer: *const std::ffi::c_char) -> Result<&'a std::ffi::CStr, Errno> {
    if pointer.is_null() {
        return Err(Errno::INVAL);
    }
    // SAFETY: not NULL, so it is what the caller says.
    Ok(unsafe { std::ffi::CStr::from_ptr(pointer) })
}

/// A struct of the C header with every field 0, NULL or empty.
pub(crate) fn zeros<T: crate::abi::Zero>() -> T {
    // SAFETY: the structs of `abi` are integers, raw pointers and optional function pointers, and zeros are values of all.
    unsafe { std::mem::zeroed() }
}
