//! The list of devices, opening and closing (ibv_get_device_list(3), ibv_open_device(3)).
//!
//! Unsafe island. Invariant: `struct ibv_device`s are made once a process and never freed, so every pointer to one stays
//! good; lists and contexts are given out and taken back once each, by the contract of libibverbs.
#![allow(unsafe_code)]

use crate::abi::number::*;
use crate::abi::*;
use crate::errno::{Errno, code, pointer, value};
use crate::handle::{behind, give, take, text, write};
use crate::objects::Context;
use crate::process::{device_guid, device_name, settings};
use hw_model::sync::{Arc, OnceLock};
use std::ffi::{c_char, c_int};
use std::mem::offset_of;

/// The devices of this process, for ever.
struct Devices(Vec<*mut IbvDevice>);

// SAFETY: the pointers are to memory that is never freed; what programs do with it is theirs to order.
unsafe impl Send for Devices {}
// SAFETY: as above.
unsafe impl Sync for Devices {}

fn devices() -> &'static [*mut IbvDevice] {
    static DEVICES: OnceLock<Devices> = OnceLock::new();
    let make =
        || Devices((0..settings().devices).map(|index| Box::into_raw(Box::new(describe(index)))).collect());
    &DEVICES.get_or_init(make).0
}

fn describe(index: usize) -> IbvDevice {
    let name = device_name(index);
    IbvDevice {
        _ops: [std::ptr::null_mut(); 2],
        node_type: IBV_NODE_CA,
        transport_type: IBV_TRANSPORT_IB,
        name: chars(&name),
        dev_name: chars(&format!("uverbs{index}")),
        dev_path: chars(&format!("/sys/class/infiniband_verbs/uverbs{index}")),
        ibdev_path: chars(&format!("/sys/class/infiniband/{name}")),
    }
}

/// A string in an array that ends with 0.
pub(super) fn chars<const N: usize>(text: &str) -> [c_char; N] {
    let mut array = [0; N];
    for (slot, byte) in array[..N - 1].iter_mut().zip(text.bytes()) {
        *slot = byte.cast_signed();
    }
    array
}

/// The number of a device of ours.
fn index_of(device: *mut IbvDevice) -> Result<usize, Errno> {
    devices().iter().position(|known| *known == device).ok_or(Errno::INVAL)
}

/// What is behind a context, which is the last member of the struct that we gave.
///
/// # Safety
/// NULL, or one that `ibv_open_device` gave.
pub(super) unsafe fn context<'a>(context: *mut IbvContext) -> Result<&'a Arc<Context>, Errno> {
    if context.is_null() {
        return Err(Errno::INVAL);
    }
    let whole = context.wrapping_byte_sub(offset_of!(VerbsContext, context)).cast::<VerbsContext>();
    // SAFETY: not NULL, so it is inside a struct that we gave.
    unsafe { behind(whole) }
}

#[unsafe(no_mangle)]
extern "C" fn ibv_get_device_list(count: *mut c_int) -> *mut *mut IbvDevice {
    pointer(|| {
        let devices = devices();
        // One more, of 0, ends it. It is the C library's memory, because its length is nowhere when it is freed.
        // SAFETY: calloc takes any numbers.
        let list: *mut *mut IbvDevice =
            unsafe { libc::calloc(devices.len() + 1, size_of::<*mut IbvDevice>()) }.cast();
        if list.is_null() {
            return Err(Errno::NOMEM);
        }
        // SAFETY: it has room for one more than that.
        unsafe { list.copy_from_nonoverlapping(devices.as_ptr(), devices.len()) };
        if !count.is_null() {
            let number = c_int::try_from(devices.len()).map_err(|_| Errno::NOMEM)?;
            // SAFETY: not NULL, so the program's integer.
            unsafe { write(count, number) }?;
        }
        Ok(list)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_free_device_list(list: *mut *mut IbvDevice) {
    // SAFETY: NULL, or what `ibv_get_device_list` gave, once.
    unsafe { libc::free(list.cast()) };
}

#[unsafe(no_mangle)]
extern "C" fn ibv_get_device_name(device: *mut IbvDevice) -> *const c_char {
    pointer(|| {
        let index = index_of(device)?;
        let device = devices()[index];
        // SAFETY: a device of ours, which is never freed.
        Ok(unsafe { &raw mut (*device).name }.cast::<c_char>())
    })
}

#[unsafe(no_mangle)]
extern "C" fn ibv_get_device_index(device: *mut IbvDevice) -> c_int {
    value(-1, || c_int::try_from(index_of(device)?).map_err(|_| Errno::INVAL))
}

#[unsafe(no_mangle)]
extern "C" fn ibv_get_device_guid(device: *mut IbvDevice) -> u64 {
    value(0, || Ok(device_guid(index_of(device)?).to_be()))
}

#[unsafe(no_mangle)]
extern "C" fn ibv_open_device(device: *mut IbvDevice) -> *mut IbvContext {
    pointer(|| give_context(Context::open(index_of(device)?)?))
}

/// Gives an open device to the program.
pub(super) fn give_context(context: Arc<Context>) -> Result<*mut IbvContext, Errno> {
    let device = devices().get(context.index).copied().ok_or(Errno::NODEV)?;
    let face = super::tables::context(device, &context)?;
    let whole = give::<VerbsContext>(face, context);
    Ok(whole.wrapping_byte_add(offset_of!(VerbsContext, context)).cast())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_close_device(context: *mut IbvContext) -> c_int {
    code(|| {
        // SAFETY: the contract of libibverbs.
        unsafe { self::context(context) }?;
        let whole = context.wrapping_byte_sub(offset_of!(VerbsContext, context)).cast::<VerbsContext>();
        // The kernel destroys what a program left open; here it holds the device on.
        // SAFETY: as above; it is not used any more.
        drop(unsafe { take(whole) });
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_read_sysfs_file(
    directory: *const c_char,
    file: *const c_char,
    buffer: *mut c_char,
    size: usize,
) -> c_int {
    crate::errno::minus_one(|| {
        // SAFETY: strings, by contract.
        let (directory, file) = (unsafe { text(directory) }?, unsafe { text(file) }?);
        let (directory, file) = (directory.to_string_lossy(), file.to_string_lossy());
        let contents = super::query::sysfs(&directory, &file)?;
        let contents = contents.trim_end();
        let Some(room) = size.checked_sub(1) else { return Err(Errno::INVAL) };
        let length = contents.len().min(room);
        if buffer.is_null() {
            return Err(Errno::INVAL);
        }
        // SAFETY: not NULL, so it has room for `size` bytes, and `length` is less.
        unsafe { buffer.copy_from_nonoverlapping(contents.as_ptr().cast(), length) };
        // SAFETY: as above.
        unsafe { write(buffer.wrapping_add(length), 0) }?;
        c_int::try_from(length).map_err(|_| Errno::INVAL)
    })
}

#[unsafe(no_mangle)]
extern "C" fn ibv_get_sysfs_path() -> *const c_char {
    c"/sys".as_ptr()
}

/// Pages that fork must not copy: our engines follow what fork does, so there is nothing to prepare.
#[unsafe(no_mangle)]
extern "C" fn ibv_fork_init() -> c_int {
    0
}

#[unsafe(no_mangle)]
extern "C" fn ibv_is_fork_initialized() -> c_int {
    IBV_FORK_UNNEEDED
}

#[unsafe(no_mangle)]
extern "C" fn ibv_dontfork_range(_start: *mut std::ffi::c_void, _size: usize) -> c_int {
    0
}

#[unsafe(no_mangle)]
extern "C" fn ibv_dofork_range(_start: *mut std::ffi::c_void, _size: usize) -> c_int {
    0
}
