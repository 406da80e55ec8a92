//! Address handles (ibv_create_ah(3), ibv_create_ah_from_wc(3)).
//!
//! Unsafe island. Invariant: pointers to objects are ones that this library gave; the 40 bytes before a datagram are a
//! global route header, or hold an IPv4 header at their end.
#![allow(unsafe_code)]

use super::device::context;
use crate::abi::*;
use crate::errno::{Errno, code, minus_one, pointer};
use crate::handle::{behind, give, read, take, write, zeros};
use crate::objects::{Ah, vector};
use std::ffi::c_int;

/// Bytes before a received datagram.
const GRH: usize = 40;
const IBV_WC_GRH: u32 = 1;

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_create_ah(pd: *mut IbvPd, attr: *mut IbvAhAttr) -> *mut IbvAh {
    pointer(|| {
        // SAFETY: the contract of libibverbs.
        let (domain, face) = (unsafe { behind(pd) }?, unsafe { read(pd) }?);
        // SAFETY: as above.
        let ah = Ah::new(domain, vector(&unsafe { read(attr) }?)?)?;
        Ok(give(IbvAh { context: face.context, pd, handle: 0 }, ah))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_destroy_ah(ah: *mut IbvAh) -> c_int {
    code(|| {
        // SAFETY: the contract of libibverbs.
        unsafe { behind(ah) }?;
        // SAFETY: as above; it is not used any more.
        drop(unsafe { take(ah) });
        Ok(())
    })
}

/// The way back to whoever sent a datagram: of what stands before it, the source.
fn way_back(header: &[u8; GRH]) -> IbvAhAttr {
    let mut dgid = [0; 16];
    // An IPv4 header says 4 in its first half byte, and the 20 bytes before it are nothing.
    if header[20] >> 4 == 4 && header[0] >> 4 != 6 {
        dgid[10..12].fill(0xff);
        dgid[12..].copy_from_slice(&header[32..36]);
    } else {
        dgid.copy_from_slice(&header[8..24]);
    }
    let grh = IbvGlobalRoute { dgid: IbvGid { raw: dgid }, hop_limit: 0xff, ..zeros() };
    IbvAhAttr { grh, is_global: 1, port_num: 1, ..zeros() }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_init_ah_from_wc(
    of: *mut IbvContext,
    port: u8,
    completion: *mut IbvWc,
    header: *mut IbvGrh,
    into: *mut IbvAhAttr,
) -> c_int {
    minus_one(|| {
        // SAFETY: the contract of libibverbs.
        unsafe { context(of) }?;
        // SAFETY: as above.
        let completion = unsafe { read(completion) }?;
        // RoCE has no other way than by the header.
        if port != 1 || completion.wc_flags & IBV_WC_GRH == 0 {
            return Err(Errno::INVAL);
        }
        // SAFETY: as above; the struct has so many bytes.
        let header = unsafe { read(header.cast::<[u8; GRH]>()) }?;
        // SAFETY: as above.
        unsafe { write(into, way_back(&header)) }?;
        Ok(0)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_create_ah_from_wc(
    pd: *mut IbvPd,
    completion: *mut IbvWc,
    header: *mut IbvGrh,
    port: u8,
) -> *mut IbvAh {
    pointer(|| {
        // SAFETY: the contract of libibverbs.
        let of = unsafe { read(pd) }?.context;
        let mut attr: IbvAhAttr = zeros();
        // SAFETY: as above.
        if unsafe { ibv_init_ah_from_wc(of, port, completion, header, &raw mut attr) } != 0 {
            return Err(Errno::INVAL);
        }
        // SAFETY: as above.
        let made = unsafe { ibv_create_ah(pd, &raw mut attr) };
        if made.is_null() { Err(Errno::INVAL) } else { Ok(made) }
    })
}

/// Ours is no Ethernet: its link is the loopback, whose address is zeros and which has no VLAN.
#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_resolve_eth_l2_from_gid(
    _of: *mut IbvContext,
    _attr: *mut IbvAhAttr,
    mac: *mut [u8; 6],
    vlan: *mut u16,
) -> c_int {
    code(|| {
        // SAFETY: the contract of libibverbs.
        unsafe { write(mac, [0; 6]) }?;
        // SAFETY: as above. More than any VLAN is none.
        unsafe { write(vlan, 0xffff) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_back_is_the_source_of_either_header() {
        let mut header = [0; GRH];
        header[20] = 0x45;
        header[32..36].copy_from_slice(&[127, 0, 0, 2]);
        let dgid = way_back(&header).grh.dgid.raw;
        assert_eq!(dgid, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 127, 0, 0, 2]);
        let mut header = [7; GRH];
        header[0] = 0x60;
        header[8..24].copy_from_slice(&[9; 16]);
        assert_eq!(way_back(&header).grh.dgid.raw, [9; 16]);
    }
}
