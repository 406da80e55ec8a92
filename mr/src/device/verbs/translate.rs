//! What a device completes with, in the words of the model.

use hw_model::hca::{Attached, Completion, OperationCode, QpState, RequestId, Status};
use hw_model::wire::Qpn;
use rdma_sys::{ibv_qp_state as State, ibv_wc, ibv_wc_opcode as Opcode, ibv_wc_status as Code};

/// A status (IBTA volume 1, 11.6.2; `enum ibv_wc_status`). Those that the model has no word for are faults of the device.
pub(super) fn status(code: Code::Type) -> Status {
    match code {
        Code::IBV_WC_SUCCESS => Status::Success,
        Code::IBV_WC_LOC_LEN_ERR => Status::LocalLengthError,
        Code::IBV_WC_LOC_PROT_ERR => Status::LocalProtectionError,
        Code::IBV_WC_WR_FLUSH_ERR => Status::FlushError,
        Code::IBV_WC_MW_BIND_ERR => Status::MemoryManagementError,
        Code::IBV_WC_BAD_RESP_ERR => Status::BadResponseError,
        Code::IBV_WC_LOC_ACCESS_ERR => Status::LocalAccessError,
        Code::IBV_WC_REM_INV_REQ_ERR => Status::RemoteInvalidRequestError,
        Code::IBV_WC_REM_ACCESS_ERR => Status::RemoteAccessError,
        Code::IBV_WC_REM_OP_ERR => Status::RemoteOperationError,
        Code::IBV_WC_RETRY_EXC_ERR => Status::RetryExceeded,
        Code::IBV_WC_RNR_RETRY_EXC_ERR => Status::RnrRetryExceeded,
        Code::IBV_WC_REM_ABORT_ERR => Status::RemoteAbortedError,
        _ => Status::LocalQpOperationError,
    }
}

/// What ended. Of a failed request the opcode means nothing (11.4.2.1).
fn operation(opcode: Opcode::Type) -> OperationCode {
    match opcode {
        Opcode::IBV_WC_RDMA_WRITE => OperationCode::Write,
        Opcode::IBV_WC_RDMA_READ => OperationCode::Read,
        Opcode::IBV_WC_COMP_SWAP => OperationCode::CompareSwap,
        Opcode::IBV_WC_FETCH_ADD => OperationCode::FetchAdd,
        Opcode::IBV_WC_BIND_MW => OperationCode::Bind,
        Opcode::IBV_WC_LOCAL_INV => OperationCode::Invalidate,
        Opcode::IBV_WC_RECV => OperationCode::Receive,
        Opcode::IBV_WC_RECV_RDMA_WITH_IMM => OperationCode::ReceiveWrite,
        _ => OperationCode::Send,
    }
}

/// A completion. The bytes of one that is not a receive, a read or an atomic are what the device happened to leave there.
pub(super) fn completion(found: &ibv_wc, attached: Attached) -> Completion {
    let what = operation(found.opcode);
    let (id, qpn) = (RequestId(found.wr_id), Qpn(found.qp_num));
    let mut said = Completion::new(id, status(found.status), what, qpn, found.byte_len);
    said.attached = attached;
    said
}

/// A state of a queue pair (10.3.1; `enum ibv_qp_state`). What the model has no word for is a fault of the device.
pub(super) fn state(code: State::Type) -> QpState {
    match code {
        State::IBV_QPS_RESET => QpState::Reset,
        State::IBV_QPS_INIT => QpState::Init,
        State::IBV_QPS_RTR => QpState::ReadyToReceive,
        State::IBV_QPS_RTS => QpState::ReadyToSend,
        State::IBV_QPS_SQD => QpState::SendQueueDrain,
        State::IBV_QPS_SQE => QpState::SendQueueError,
        _ => QpState::Error,
    }
}
