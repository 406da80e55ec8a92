"""Writes to its own memory, over a queue pair that is connected to itself, under the plan events.toml: what the program is told
of its port and its device, and how its requests end."""
import pyverbs.enums as e
from pyverbs.addr import AHAttr, GlobalRoute
from pyverbs.cq import CQ
from pyverbs.device import Context
from pyverbs.mr import MR
from pyverbs.pd import PD
from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr
from pyverbs.wr import SGE, SendWR

RIGHTS = e.IBV_ACCESS_LOCAL_WRITE | e.IBV_ACCESS_REMOTE_WRITE


def told(context):
    """The next asynchronous event."""
    event = context.get_async_event()
    event.ack()
    return event.event_type


def write(qp, cq, mr):
    """How one write ends."""
    request = SendWR(opcode=e.IBV_WR_RDMA_WRITE, num_sge=1, sg=[SGE(mr.buf, 64, mr.lkey)], send_flags=e.IBV_SEND_SIGNALED)
    request.set_wr_rdma(mr.rkey, mr.buf + 64)
    qp.post_send(request)
    while True:
        count, ended = cq.poll()
        if count:
            return ended[0].status


def main():
    context = Context(name='anypage0')
    pd, cq = PD(context), CQ(context, 16)
    mr = MR(pd, 4096, RIGHTS)
    attr = QPAttr(port_num=1)
    attr.qp_access_flags = RIGHTS
    qp = QP(pd, QPInitAttr(qp_type=e.IBV_QPT_RC, scq=cq, rcq=cq, cap=QPCap(max_send_wr=4)), attr)
    way = GlobalRoute(dgid=context.query_gid(1, 0), sgid_index=0)
    attr.ah_attr = AHAttr(port_num=1, is_global=True, gr=way)
    attr.dest_qp_num, attr.path_mtu, attr.max_rd_atomic, attr.max_dest_rd_atomic = qp.qp_num, e.IBV_MTU_1024, 1, 1
    attr.min_rnr_timer, attr.timeout, attr.retry_cnt, attr.rnr_retry = 12, 14, 7, 7
    qp.to_rts(attr)
    # The second packet takes the port down; the one that is sent again brings it back.
    assert [write(qp, cq, mr) for _ in range(2)] == [e.IBV_WC_SUCCESS] * 2
    assert [told(context) for _ in range(2)] == [e.IBV_EVENT_PORT_ERR, e.IBV_EVENT_PORT_ACTIVE]
    # Then the tables change, and at last the device fails.
    statuses = [write(qp, cq, mr) for _ in range(20)]
    assert [told(context) for _ in range(3)] == [e.IBV_EVENT_GID_CHANGE, e.IBV_EVENT_PKEY_CHANGE, e.IBV_EVENT_DEVICE_FATAL]
    assert set(statuses) == {e.IBV_WC_SUCCESS, e.IBV_WC_WR_FLUSH_ERR}, statuses
    assert statuses[-1] == e.IBV_WC_WR_FLUSH_ERR
    print('every event was told')


main()
