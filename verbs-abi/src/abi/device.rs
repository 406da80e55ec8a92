//! Devices, ports, addresses.

use super::c_structs;
use std::ffi::{c_char, c_int, c_uint, c_void};

c_structs! {
    "struct ibv_device" = IbvDevice {
        _ops: [*mut c_void; 2],
        node_type: c_int,
        transport_type: c_int,
        name: [c_char; 64],
        dev_name: [c_char; 64],
        dev_path: [c_char; 256],
        ibdev_path: [c_char; 256],
    }
    "struct ibv_device_attr" = IbvDeviceAttr {
        fw_ver: [c_char; 64],
        node_guid: u64,
        sys_image_guid: u64,
        max_mr_size: u64,
        page_size_cap: u64,
        vendor_id: u32,
        vendor_part_id: u32,
        hw_ver: u32,
        max_qp: c_int,
        max_qp_wr: c_int,
        device_cap_flags: c_uint,
        max_sge: c_int,
        max_sge_rd: c_int,
        max_cq: c_int,
        max_cqe: c_int,
        max_mr: c_int,
        max_pd: c_int,
        max_qp_rd_atom: c_int,
        max_ee_rd_atom: c_int,
        max_res_rd_atom: c_int,
        max_qp_init_rd_atom: c_int,
        max_ee_init_rd_atom: c_int,
        atomic_cap: c_int,
        max_ee: c_int,
        max_rdd: c_int,
        max_mw: c_int,
        max_raw_ipv6_qp: c_int,
        max_raw_ethy_qp: c_int,
        max_mcast_grp: c_int,
        max_mcast_qp_attach: c_int,
        max_total_mcast_qp_attach: c_int,
        max_ah: c_int,
        max_fmr: c_int,
        max_map_per_fmr: c_int,
        max_srq: c_int,
        max_srq_wr: c_int,
        max_srq_sge: c_int,
        max_pkeys: u16,
        local_ca_ack_delay: u8,
        phys_port_cnt: u8,
    }
    "struct ibv_odp_caps" = IbvOdpCaps {
        general_caps: u64,
        per_transport_caps: PerTransportCaps,
    }
    "struct ibv_tso_caps" = IbvTsoCaps {
        max_tso: u32,
        supported_qpts: u32,
    }
    "struct ibv_rss_caps" = IbvRssCaps {
        supported_qpts: u32,
        max_rwq_indirection_tables: u32,
        max_rwq_indirection_table_size: u32,
        rx_hash_fields_mask: u64,
        rx_hash_function: u8,
    }
    "struct ibv_packet_pacing_caps" = IbvPacketPacingCaps {
        qp_rate_limit_min: u32,
        qp_rate_limit_max: u32,
        supported_qpts: u32,
    }
    "struct ibv_tm_caps" = IbvTmCaps {
        max_rndv_hdr_size: u32,
        max_num_tags: u32,
        flags: u32,
        max_ops: u32,
        max_sge: u32,
    }
    "struct ibv_cq_moderation_caps" = IbvCqModerationCaps {
        max_cq_count: u16,
        max_cq_period: u16,
    }
    "struct ibv_pci_atomic_caps" = IbvPciAtomicCaps {
        fetch_add: u16,
        swap: u16,
        compare_swap: u16,
    }
    "struct ibv_device_attr_ex" = IbvDeviceAttrEx {
        orig_attr: IbvDeviceAttr,
        comp_mask: u32,
        odp_caps: IbvOdpCaps,
        completion_timestamp_mask: u64,
        hca_core_clock: u64,
        device_cap_flags_ex: u64,
        tso_caps: IbvTsoCaps,
        rss_caps: IbvRssCaps,
        max_wq_type_rq: u32,
        packet_pacing_caps: IbvPacketPacingCaps,
        raw_packet_caps: u32,
        tm_caps: IbvTmCaps,
        cq_mod_caps: IbvCqModerationCaps,
        max_dm_size: u64,
        pci_atomic_caps: IbvPciAtomicCaps,
        xrc_odp_caps: u32,
        phys_port_cnt_ex: u32,
    }
    "struct ibv_port_attr" = IbvPortAttr {
        state: c_int,
        max_mtu: c_int,
        active_mtu: c_int,
        gid_tbl_len: c_int,
        port_cap_flags: u32,
        max_msg_sz: u32,
        bad_pkey_cntr: u32,
        qkey_viol_cntr: u32,
        pkey_tbl_len: u16,
        lid: u16,
        sm_lid: u16,
        lmc: u8,
        max_vl_num: u8,
        sm_sl: u8,
        subnet_timeout: u8,
        init_type_reply: u8,
        active_width: u8,
        active_speed: u8,
        phys_state: u8,
        link_layer: u8,
        flags: u8,
        port_cap_flags2: u16,
    }
    "struct ibv_gid_entry" = IbvGidEntry {
        gid: IbvGid,
        gid_index: u32,
        port_num: u32,
        gid_type: u32,
        ndev_ifindex: u32,
    }
    "struct ibv_global_route" = IbvGlobalRoute {
        dgid: IbvGid,
        flow_label: u32,
        sgid_index: u8,
        hop_limit: u8,
        traffic_class: u8,
    }
    "struct ibv_grh" = IbvGrh {
        version_tclass_flow: u32,
        paylen: u16,
        next_hdr: u8,
        hop_limit: u8,
        sgid: IbvGid,
        dgid: IbvGid,
    }
    "struct ibv_ah_attr" = IbvAhAttr {
        grh: IbvGlobalRoute,
        dlid: u16,
        sl: u8,
        src_path_bits: u8,
        static_rate: u8,
        is_global: u8,
        port_num: u8,
    }
    "struct ibv_values_ex" = IbvValuesEx {
        comp_mask: u32,
        raw_clock: libc::timespec,
    }
}

/// `per_transport_caps` of `struct ibv_odp_caps`, which has no name of its own.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct PerTransportCaps {
    pub rc_odp_caps: u32,
    pub uc_odp_caps: u32,
    pub ud_odp_caps: u32,
}

/// `union ibv_gid`, in network byte order. Its 64-bit halves give it its alignment.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IbvGid {
    pub raw: [u8; 16],
}
