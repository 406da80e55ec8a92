//! What a device and its port are (ibv_query_device(3), ibv_query_port(3), ibv_query_gid_ex(3)).
//!
//! Unsafe island. Invariant: every struct that is filled in is the program's, as long as it says.
#![allow(unsafe_code)]

use super::device::{chars, context};
use crate::abi::number::*;
use crate::abi::*;
use crate::errno::{Errno, code, minus_one};
use crate::handle::{write, write_part, zeros};
use crate::objects::{Context, mtu_number};
use crate::process::{device_guid, device_name, settings};
use hw_model::hca::{
    AtomicScope, Capabilities, DeviceAttributes, MOST_GROUPS, MOST_MEMBERS, PKey, PortState,
};
use std::ffi::{c_int, c_uint, c_void};

/// What `ibv_query_port` of old fills in: all but the newest fields.
const OLD_PORT_ATTR: usize = 48;
/// Entries of the GID table. The first is in use.
const GIDS: c_int = 4;
/// No IEEE vendor: `any` in ASCII.
const VENDOR: u32 = 0x61_6e_79;

fn number(value: u32) -> c_int {
    c_int::try_from(value).unwrap_or(c_int::MAX)
}

/// What the device can do, in the bits of `enum ibv_device_cap_flags`.
fn capability_flags(attributes: &DeviceAttributes) -> u64 {
    // Bit 31 is the kernel's own for on-demand paging; libibverbs says that in `odp_caps`.
    (attributes.capabilities - Capabilities::ON_DEMAND).bits()
}

fn attributes(context: &Context) -> IbvDeviceAttr {
    let known = context.device.hca().attributes();
    let limits = &known.limits;
    let zeros: IbvDeviceAttr = zeros();
    IbvDeviceAttr {
        fw_ver: chars(known.firmware),
        node_guid: device_guid(context.index).to_be(),
        sys_image_guid: device_guid(context.index).to_be(),
        max_mr_size: context.device.dma().max_region(),
        page_size_cap: known.page_sizes,
        vendor_id: VENDOR,
        vendor_part_id: 1,
        hw_ver: known.hardware,
        max_qp: number(limits.qps),
        max_qp_wr: number(limits.send_requests.min(limits.recv_requests)),
        // Of the 64 flags, those that fit.
        device_cap_flags: capability_flags(&known) as c_uint,
        max_sge: number(limits.sges),
        max_sge_rd: number(limits.sges),
        max_cq: number(limits.cqs),
        max_cqe: number(limits.cq_entries),
        max_mr: number(limits.keys),
        max_pd: number(limits.pds),
        max_qp_rd_atom: number(limits.reads),
        max_res_rd_atom: number(u32::try_from(known.max_reads_total).unwrap_or(u32::MAX)),
        max_qp_init_rd_atom: number(limits.reads),
        atomic_cap: match known.atomics {
            AtomicScope::None => 0,
            AtomicScope::Device => 1,
            AtomicScope::Global => 2,
        },
        max_mw: number(limits.keys),
        max_ah: number(limits.ahs),
        max_srq: number(limits.srqs),
        max_srq_wr: number(limits.recv_requests),
        max_srq_sge: number(limits.sges),
        max_mcast_grp: number(MOST_GROUPS),
        max_mcast_qp_attach: number(MOST_MEMBERS),
        max_total_mcast_qp_attach: number(MOST_GROUPS * MOST_MEMBERS),
        max_pkeys: known.max_pkeys,
        local_ca_ack_delay: known.ack_delay,
        phys_port_cnt: known.ports,
        ..zeros
    }
}

fn attributes_ex(context: &Context) -> IbvDeviceAttrEx {
    let known = context.device.hca().attributes();
    let on_demand = &known.on_demand;
    // Implicit regions are the work of `mr`, above what the HCA knows of itself.
    let general = [(on_demand.explicit, IBV_ODP_SUPPORT), (on_demand.implicit, IBV_ODP_SUPPORT_IMPLICIT)];
    let zeros: IbvDeviceAttrEx = zeros();
    IbvDeviceAttrEx {
        orig_attr: attributes(context),
        odp_caps: IbvOdpCaps {
            general_caps: general.iter().filter(|(can, _)| *can).map(|(_, flag)| flag).sum(),
            per_transport_caps: PerTransportCaps {
                rc_odp_caps: on_demand.rc.bits(),
                uc_odp_caps: on_demand.uc.bits(),
                ud_odp_caps: on_demand.ud.bits(),
            },
        },
        device_cap_flags_ex: capability_flags(&known),
        cq_mod_caps: IbvCqModerationCaps {
            max_cq_count: known.moderation.max_count,
            max_cq_period: known.moderation.max_period_us,
        },
        xrc_odp_caps: on_demand.xrc.bits(),
        max_dm_size: known.limits.device_memory,
        phys_port_cnt_ex: known.ports.into(),
        ..zeros
    }
}

fn port(context: &Context) -> Result<IbvPortAttr, Errno> {
    let known = context.device.hca().port_attributes(1).map_err(|_| Errno::INVAL)?;
    let zeros: IbvPortAttr = zeros();
    Ok(IbvPortAttr {
        state: match known.state {
            PortState::Down => 1,
            PortState::Active => IBV_PORT_ACTIVE,
        },
        max_mtu: mtu_number(known.max_mtu),
        active_mtu: mtu_number(known.active_mtu),
        gid_tbl_len: GIDS,
        port_cap_flags: IBV_PORT_IP_BASED_GIDS,
        max_msg_sz: known.max_message,
        bad_pkey_cntr: u32::try_from(known.bad_pkeys).unwrap_or(u32::MAX),
        qkey_viol_cntr: u32::try_from(known.bad_qkeys).unwrap_or(u32::MAX),
        pkey_tbl_len: known.pkeys,
        max_vl_num: 1,
        // 4 lanes of 25 Gb/s, link up: what perftest and others print and compute with.
        active_width: 2,
        active_speed: 32,
        phys_state: if known.state == PortState::Active { 5 } else { 3 },
        link_layer: IBV_LINK_LAYER_ETHERNET,
        flags: IBV_QPF_GRH_REQUIRED,
        ..zeros
    })
}

fn one_port(number: u32) -> Result<(), Errno> {
    if number == 1 { Ok(()) } else { Err(Errno::INVAL) }
}

/// The GID at an index: zeros where none is.
fn gid(context: &Context, port: u32, index: u32) -> Result<IbvGid, Errno> {
    one_port(port)?;
    match context.device.hca().query_gid(1, index) {
        Ok(gid) => Ok(IbvGid { raw: gid.0.to_be_bytes() }),
        Err(_) if index < GIDS.cast_unsigned() => Ok(IbvGid { raw: [0; 16] }),
        Err(_) => Err(Errno::INVAL),
    }
}

/// A file of sysfs as our device would have it; other devices' are read.
pub(super) fn sysfs(directory: &str, file: &str) -> Result<String, Errno> {
    let ours = (0..settings().devices).find(|index| {
        let (name, verbs) = (device_name(*index), format!("/sys/class/infiniband_verbs/uverbs{index}"));
        directory == format!("/sys/class/infiniband/{name}") || directory == verbs
    });
    let Some(index) = ours else { return Ok(std::fs::read_to_string(format!("{directory}/{file}"))?) };
    let guid = device_guid(index).to_be_bytes();
    let guid: Vec<String> = guid.chunks(2).map(|pair| format!("{:02x}{:02x}", pair[0], pair[1])).collect();
    match file {
        "board_id" | "hca_type" => Ok("anypage".to_owned()),
        "fw_ver" => Ok(env!("CARGO_PKG_VERSION").to_owned()),
        "node_guid" | "sys_image_guid" => Ok(guid.join(":")),
        "node_type" => Ok("1: CA".to_owned()),
        "ibdev" => Ok(device_name(index)),
        "abi_version" => Ok("1".to_owned()),
        "ports/1/gid_attrs/types/0" => Ok("RoCE v2".to_owned()),
        "ports/1/link_layer" => Ok("Ethernet".to_owned()),
        _ => Err(Errno::NOENT),
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_query_device(of: *mut IbvContext, attr: *mut IbvDeviceAttr) -> c_int {
    code(|| {
        // SAFETY: the contract of libibverbs.
        let context = unsafe { context(of) }?;
        // SAFETY: as above.
        unsafe { write(attr, attributes(context)) }
    })
}

pub(super) unsafe extern "C" fn query_device_ex(
    of: *mut IbvContext,
    input: *const c_void,
    attr: *mut IbvDeviceAttrEx,
    size: usize,
) -> c_int {
    code(|| {
        // `struct ibv_query_device_ex_input` is one mask, of which nothing is defined.
        // SAFETY: NULL or that struct.
        if !input.is_null() && unsafe { crate::handle::read(input.cast::<u32>()) }? != 0 {
            return Err(Errno::INVAL);
        }
        if size < size_of::<IbvDeviceAttr>() {
            return Err(Errno::INVAL);
        }
        // SAFETY: the contract of libibverbs.
        let context = unsafe { context(of) }?;
        // SAFETY: as above.
        unsafe { write_part(attr, size, attributes_ex(context)) }
    })
}

pub(super) unsafe extern "C" fn query_port(
    of: *mut IbvContext,
    port_number: u8,
    attr: *mut IbvPortAttr,
    size: usize,
) -> c_int {
    code(|| {
        one_port(port_number.into())?;
        // SAFETY: the contract of libibverbs.
        let context = unsafe { context(of) }?;
        // SAFETY: as above.
        unsafe { write_part(attr, size, port(context)?) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_query_port(of: *mut IbvContext, port_number: u8, attr: *mut IbvPortAttr) -> c_int {
    // SAFETY: the contract of libibverbs; the old struct has so many bytes.
    unsafe { query_port(of, port_number, attr, OLD_PORT_ATTR) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_query_gid(
    of: *mut IbvContext,
    port_number: u8,
    index: c_int,
    into: *mut IbvGid,
) -> c_int {
    minus_one(|| {
        let index = u32::try_from(index).map_err(|_| Errno::INVAL)?;
        // SAFETY: the contract of libibverbs.
        let context = unsafe { context(of) }?;
        // SAFETY: as above.
        unsafe { write(into, gid(context, port_number.into(), index)?) }?;
        Ok(0)
    })
}

fn entry(context: &Context, port: u32, index: u32) -> Result<IbvGidEntry, Errno> {
    let gid = gid(context, port, index)?;
    if gid.raw == [0; 16] {
        return Err(Errno::NODATA);
    }
    let gid_type = IBV_GID_TYPE_ROCE_V2;
    Ok(IbvGidEntry { gid, gid_index: index, port_num: port, gid_type, ndev_ifindex: LOOPBACK })
}

/// The index of the loopback interface on Linux.
const LOOPBACK: u32 = 1;

#[unsafe(no_mangle)]
unsafe extern "C" fn _ibv_query_gid_ex(
    of: *mut IbvContext,
    port_number: u32,
    index: u32,
    into: *mut IbvGidEntry,
    flags: u32,
    size: usize,
) -> c_int {
    code(|| {
        if flags != 0 {
            return Err(Errno::INVAL);
        }
        // SAFETY: the contract of libibverbs.
        let entry = entry(unsafe { context(of) }?, port_number, index)?;
        // SAFETY: as above.
        unsafe { write_part(into, size, entry) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn _ibv_query_gid_table(
    of: *mut IbvContext,
    into: *mut IbvGidEntry,
    room: usize,
    flags: u32,
    size: usize,
) -> isize {
    let failed = |error: Errno| -(error.0 as isize);
    let mut entries = 0;
    let outcome = code(|| {
        if flags != 0 || room == 0 {
            return Err(Errno::INVAL);
        }
        // SAFETY: the contract of libibverbs.
        let entry = entry(unsafe { context(of) }?, 1, 0)?;
        // SAFETY: as above; there is room for one.
        unsafe { write_part(into, size, entry) }?;
        entries = 1;
        Ok(())
    });
    if outcome == 0 { entries } else { failed(Errno(outcome)) }
}

/// Private, but `ibv_devinfo` and pyverbs use it.
#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_query_gid_type(
    of: *mut IbvContext,
    port_number: u8,
    index: c_uint,
    into: *mut c_uint,
) -> c_int {
    minus_one(|| {
        // SAFETY: the contract of libibverbs.
        gid(unsafe { context(of) }?, port_number.into(), index)?;
        // SAFETY: as above.
        unsafe { write(into, IBV_GID_TYPE_SYSFS_ROCE_V2) }?;
        Ok(0)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_query_pkey(
    of: *mut IbvContext,
    port_number: u8,
    index: c_int,
    into: *mut u16,
) -> c_int {
    minus_one(|| {
        let index = u16::try_from(index).map_err(|_| Errno::INVAL)?;
        // SAFETY: the contract of libibverbs.
        let hca = unsafe { context(of) }?.device.hca();
        let PKey(pkey) = hca.query_pkey(port_number, index).map_err(|_| Errno::INVAL)?;
        // SAFETY: as above.
        unsafe { write(into, pkey.to_be()) }?;
        Ok(0)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_get_pkey_index(of: *mut IbvContext, port_number: u8, pkey: u16) -> c_int {
    minus_one(|| {
        // SAFETY: the contract of libibverbs.
        let hca = unsafe { context(of) }?.device.hca();
        let mut entries = (0..).map_while(|index| hca.query_pkey(port_number, index).ok());
        let at = entries.position(|entry| entry == PKey(u16::from_be(pkey))).ok_or(Errno::INVAL)?;
        c_int::try_from(at).map_err(|_| Errno::INVAL)
    })
}
