//! The report: one JSON line a completion, or a refused call, with nothing in it that differs between two runs.

use oracle::verbs::{Answer, Operation};
use rdma_sys::{ibv_qp_state, ibv_wc_opcode, ibv_wc_status};
use serde::Serialize;
use std::io;

/// Where the record was made. Two records are compared without it.
#[derive(Serialize)]
pub struct Header<'a> {
    /// The kernel's release.
    pub kernel: &'a str,
    /// The device's name.
    pub device: &'a str,
}

/// One completion or one refused call.
#[derive(Default, Serialize)]
pub struct Line<'a> {
    /// What was tried.
    pub scenario: &'a str,
    /// The kind of region that it was tried on.
    pub region: &'a str,
    /// Whose completion: `requester` or `responder`; absent for a call.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub side: Option<&'a str>,
    /// The operation and its length in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub posted: Option<(&'static str, u32)>,
    /// `IBV_WC_*` without the prefix, `none` for no completion, or what a call failed with.
    pub status: String,
    /// `IBV_WC_*` without the prefix; of a success only, as otherwise it is undefined.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub opcode: Option<String>,
    /// As in the completion; of a success only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub byte_len: Option<u32>,
    /// What the bytes at the destination are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<&'static str>,
    /// The states of the requester's and the responder's queue pair afterwards, where that is the point.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub states: Option<(&'static str, &'static str)>,
}

impl Line<'_> {
    /// Fills in what a completion says, or that the request could not even be posted.
    pub fn complete(mut self, answer: Answer) -> Self {
        self.status = match answer {
            Answer::Completed(found) => status(found.status),
            Answer::Nothing => "none".into(),
            Answer::NotPosted(ref error) => format!("not posted: {}", self::error(error)),
        };
        if let Answer::Completed(found) = answer
            && found.status == ibv_wc_status::IBV_WC_SUCCESS
        {
            self.opcode = Some(opcode(found.opcode));
            self.byte_len = Some(found.byte_len);
        }
        self
    }

    /// Prints the line.
    pub fn print(&self) {
        println!("{}", serde_json::to_string(self).expect("strings and numbers only"));
    }
}

/// The operation's name.
pub fn operation(operation: Operation) -> &'static str {
    match operation {
        Operation::Write => "write",
        Operation::Read => "read",
        Operation::Send => "send",
        Operation::CompareSwap(..) => "compare and swap",
        Operation::FetchAdd(_) => "fetch and add",
    }
}

/// Which of the candidates `found` is: the first that fits, each given with what it means.
pub fn compare(found: &[u8], candidates: &[(&'static str, &[u8])]) -> &'static str {
    match candidates.iter().find(|(_, bytes)| *bytes == found) {
        Some((meaning, _)) => meaning,
        None if found.iter().all(|byte| *byte == 0) => "zeros",
        None => "something else",
    }
}

/// The name of an error of a call.
pub fn error(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EINVAL) => "EINVAL".into(),
        Some(libc::EFAULT) => "EFAULT".into(),
        Some(libc::ENOMEM) => "ENOMEM".into(),
        Some(libc::EPERM) => "EPERM".into(),
        Some(libc::EOPNOTSUPP) => "EOPNOTSUPP".into(),
        other => format!("error {other:?}"),
    }
}

fn status(value: u32) -> String {
    use ibv_wc_status::*;
    let name = match value {
        IBV_WC_SUCCESS => "SUCCESS",
        IBV_WC_LOC_LEN_ERR => "LOC_LEN_ERR",
        IBV_WC_LOC_QP_OP_ERR => "LOC_QP_OP_ERR",
        IBV_WC_LOC_PROT_ERR => "LOC_PROT_ERR",
        IBV_WC_WR_FLUSH_ERR => "WR_FLUSH_ERR",
        IBV_WC_LOC_ACCESS_ERR => "LOC_ACCESS_ERR",
        IBV_WC_REM_INV_REQ_ERR => "REM_INV_REQ_ERR",
        IBV_WC_REM_ACCESS_ERR => "REM_ACCESS_ERR",
        IBV_WC_REM_OP_ERR => "REM_OP_ERR",
        IBV_WC_RETRY_EXC_ERR => "RETRY_EXC_ERR",
        IBV_WC_RNR_RETRY_EXC_ERR => "RNR_RETRY_EXC_ERR",
        other => return format!("status {other}"),
    };
    name.into()
}

fn opcode(value: u32) -> String {
    use ibv_wc_opcode::*;
    let name = match value {
        IBV_WC_SEND => "SEND",
        IBV_WC_RDMA_WRITE => "RDMA_WRITE",
        IBV_WC_RDMA_READ => "RDMA_READ",
        IBV_WC_COMP_SWAP => "COMP_SWAP",
        IBV_WC_FETCH_ADD => "FETCH_ADD",
        IBV_WC_RECV => "RECV",
        other => return format!("opcode {other}"),
    };
    name.into()
}

/// The name of a queue pair's state.
pub fn state(value: u32) -> &'static str {
    match value {
        ibv_qp_state::IBV_QPS_RTS => "RTS",
        ibv_qp_state::IBV_QPS_ERR => "ERR",
        ibv_qp_state::IBV_QPS_SQE => "SQE",
        _ => "another",
    }
}
