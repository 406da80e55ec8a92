/*
 * What a real RDMA device answers to the verbs of objects, keys, windows, completion queues and queue-pair states: one JSON
 * line a case, {"case": ..., "answer": ...}. tests/compare asks the modelled device the same.
 *
 * The device is ANYPAGE_LAB_DEVICE (rxe0) with the GID index ANYPAGE_LAB_GID_INDEX (1). Every case has objects of its own.
 */
#include <errno.h>
#include <fcntl.h>
#include <infiniband/verbs.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define SIZE 16384
#define ALL                                                                                                                    \
    (IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC | IBV_ACCESS_MW_BIND)

static struct ibv_context *context;
static int gid_index;
static union ibv_gid gid;

struct queue {
    struct ibv_qp *qp;
    struct ibv_cq *cq;
};

struct bed {
    struct ibv_pd *pd;
    char *memory;
    struct ibv_mr *local, *remote;
    struct queue a, b;
};

static void say(const char *name, const char *answer) { printf("{\"case\":\"%s\",\"answer\":\"%s\"}\n", name, answer); fflush(stdout); }

static void *need(void *object, const char *what) {
    if (!object) {
        fprintf(stderr, "%s: %s\n", what, strerror(errno));
        exit(1);
    }
    return object;
}

static const char *outcome(int failed) { return failed ? "refused" : "ok"; }

static const char *status_name(int status) {
    switch (status) {
    case -1: return "nothing";
    case -2: return "not posted";
    case IBV_WC_SUCCESS: return "success";
    case IBV_WC_LOC_LEN_ERR: return "local length error";
    case IBV_WC_LOC_QP_OP_ERR: return "local queue pair operation error";
    case IBV_WC_LOC_PROT_ERR: return "local protection error";
    case IBV_WC_WR_FLUSH_ERR: return "flushed";
    case IBV_WC_MW_BIND_ERR: return "memory management error";
    case IBV_WC_BAD_RESP_ERR: return "bad response";
    case IBV_WC_LOC_ACCESS_ERR: return "local access error";
    case IBV_WC_REM_INV_REQ_ERR: return "remote invalid request";
    case IBV_WC_REM_ACCESS_ERR: return "remote access error";
    case IBV_WC_REM_OP_ERR: return "remote operation error";
    case IBV_WC_RETRY_EXC_ERR: return "retries exceeded";
    case IBV_WC_RNR_RETRY_EXC_ERR: return "RNR retries exceeded";
    default: return "another status";
    }
}

static struct ibv_qp *create_qp(struct ibv_pd *pd, struct ibv_cq *cq) {
    struct ibv_qp_init_attr attr = {.send_cq = cq, .recv_cq = cq, .qp_type = IBV_QPT_RC, .sq_sig_all = 1};
    attr.cap.max_send_wr = 16, attr.cap.max_recv_wr = 16, attr.cap.max_send_sge = 2, attr.cap.max_recv_sge = 2;
    return ibv_create_qp(pd, &attr);
}

static int to_init(struct ibv_qp *qp) {
    struct ibv_qp_attr attr = {.qp_state = IBV_QPS_INIT, .port_num = 1};
    attr.qp_access_flags = IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC | IBV_ACCESS_MW_BIND;
    return ibv_modify_qp(qp, &attr, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS);
}

static int to_rtr(struct ibv_qp *qp, uint32_t peer) {
    struct ibv_qp_attr attr = {.qp_state = IBV_QPS_RTR, .path_mtu = IBV_MTU_1024, .dest_qp_num = peer, .max_dest_rd_atomic = 4};
    attr.min_rnr_timer = 1;
    attr.ah_attr.is_global = 1, attr.ah_attr.port_num = 1;
    attr.ah_attr.grh.dgid = gid, attr.ah_attr.grh.sgid_index = gid_index, attr.ah_attr.grh.hop_limit = 1;
    return ibv_modify_qp(qp, &attr, IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
                                        IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER);
}

static int to_rts(struct ibv_qp *qp) {
    struct ibv_qp_attr attr = {.qp_state = IBV_QPS_RTS, .timeout = 17, .retry_cnt = 7, .rnr_retry = 0, .max_rd_atomic = 4};
    return ibv_modify_qp(qp, &attr, IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN |
                                        IBV_QP_MAX_QP_RD_ATOMIC);
}

static int to_plain(struct ibv_qp *qp, enum ibv_qp_state state) {
    struct ibv_qp_attr attr = {.qp_state = state};
    return ibv_modify_qp(qp, &attr, IBV_QP_STATE);
}

static int to(struct ibv_qp *qp, enum ibv_qp_state state) {
    switch (state) {
    case IBV_QPS_INIT: return to_init(qp);
    case IBV_QPS_RTR: return to_rtr(qp, qp->qp_num);
    case IBV_QPS_RTS: return to_rts(qp);
    default: return to_plain(qp, state);
    }
}

/* A queue pair in that state, connected to itself as far as it is. */
static struct ibv_qp *in_state(struct ibv_pd *pd, struct ibv_cq *cq, enum ibv_qp_state state) {
    struct ibv_qp *qp = need(create_qp(pd, cq), "ibv_create_qp");
    int failed = 0;
    if (state == IBV_QPS_ERR) failed = to(qp, IBV_QPS_INIT) || to(qp, IBV_QPS_ERR);
    if (state >= IBV_QPS_INIT && state <= IBV_QPS_RTS) failed |= to(qp, IBV_QPS_INIT);
    if (state >= IBV_QPS_RTR && state <= IBV_QPS_RTS) failed |= to(qp, IBV_QPS_RTR);
    if (state == IBV_QPS_RTS) failed |= to(qp, IBV_QPS_RTS);
    if (failed) need(NULL, "a queue pair's state");
    return qp;
}

static void connect_pair(struct queue *a, struct queue *b) {
    if (to_init(a->qp) || to_init(b->qp) || to_rtr(a->qp, b->qp->qp_num) || to_rtr(b->qp, a->qp->qp_num) || to_rts(a->qp) || to_rts(b->qp))
        need(NULL, "connecting");
}

static struct queue queue(struct ibv_pd *pd) {
    struct queue made = {.cq = need(ibv_create_cq(context, 64, NULL, NULL, 0), "ibv_create_cq")};
    made.qp = need(create_qp(pd, made.cq), "ibv_create_qp");
    return made;
}

static struct bed new_bed(void) {
    struct bed bed = {.pd = need(ibv_alloc_pd(context), "ibv_alloc_pd")};
    bed.memory = need(aligned_alloc(4096, 2 * SIZE), "memory");
    memset(bed.memory, 1, SIZE);
    memset(bed.memory + SIZE, 2, SIZE);
    bed.local = need(ibv_reg_mr(bed.pd, bed.memory, SIZE, ALL), "ibv_reg_mr");
    bed.remote = need(ibv_reg_mr(bed.pd, bed.memory + SIZE, SIZE, ALL), "ibv_reg_mr");
    bed.a = queue(bed.pd), bed.b = queue(bed.pd);
    connect_pair(&bed.a, &bed.b);
    return bed;
}

/* Objects are left to the end of the process: what refuses to go is no case's business but its own. */

static int completion(struct ibv_cq *cq, struct ibv_wc *wc) {
    for (time_t end = time(NULL) + 20; time(NULL) < end;)
        if (ibv_poll_cq(cq, 1, wc) > 0) return wc->status;
    return -1;
}

static int run(struct queue *queue, struct ibv_send_wr *wr) {
    struct ibv_send_wr *bad;
    struct ibv_wc wc;
    wr->send_flags |= IBV_SEND_SIGNALED;
    if (ibv_post_send(queue->qp, wr, &bad)) return -2;
    return completion(queue->cq, &wc);
}

static int rdma(struct queue *queue, enum ibv_wr_opcode opcode, uint64_t laddr, uint32_t length, uint32_t lkey, uint64_t raddr, uint32_t rkey) {
    struct ibv_sge sge = {laddr, length, lkey};
    struct ibv_send_wr wr = {.opcode = opcode, .sg_list = &sge, .num_sge = length ? 1 : 0};
    wr.wr.rdma.remote_addr = raddr, wr.wr.rdma.rkey = rkey;
    return run(queue, &wr);
}

static void keys(void) {
    for (int read = 0; read < 2; read++) {
        enum ibv_wr_opcode opcode = read ? IBV_WR_RDMA_READ : IBV_WR_RDMA_WRITE;
        const char *names[] = {"good", "another key", "a key of nothing", "past the end", "before the start", "another local key",
                               "past the local end", "no permission", "a deregistered key", "a key of another domain", "no byte by another key",
                               "a remote address that wraps"};
        for (unsigned which = 0; which < sizeof names / sizeof *names; which++) {
            struct bed bed = new_bed();
            uint64_t laddr = (uintptr_t)bed.memory, raddr = laddr + SIZE;
            uint32_t lkey = bed.local->lkey, rkey = bed.remote->rkey, length = 100;
            int deny = read ? IBV_ACCESS_REMOTE_READ : IBV_ACCESS_REMOTE_WRITE;
            struct ibv_mr *other = NULL;
            switch (which) {
            case 1: rkey ^= 1; break;
            case 2: rkey = 0x00abcd00; break;
            case 3: raddr += SIZE - 99; break;
            case 4: raddr -= 1; break;
            case 5: lkey ^= 1; break;
            case 6: laddr += SIZE - 99; break;
            case 7: other = need(ibv_reg_mr(bed.pd, bed.memory + SIZE, SIZE, ALL & ~deny), "ibv_reg_mr"), rkey = other->rkey; break;
            case 8:
                other = need(ibv_reg_mr(bed.pd, bed.memory + SIZE, SIZE, ALL), "ibv_reg_mr"), rkey = other->rkey;
                ibv_dereg_mr(other);
                break;
            case 9:
                other = need(ibv_reg_mr(need(ibv_alloc_pd(context), "pd"), bed.memory + SIZE, SIZE, ALL), "ibv_reg_mr"), rkey = other->rkey;
                break;
            case 10: rkey ^= 1, length = 0; break;
            case 11: raddr = UINT64_MAX - 10; break;
            }
            char name[128];
            snprintf(name, sizeof name, "%s, %s", read ? "read" : "write", names[which]);
            say(name, status_name(rdma(&bed.a, opcode, laddr, length, lkey, raddr, rkey)));
        }
    }
}

/* The owner of the window is b, who binds it; a is its peer. */
struct window {
    struct bed bed;
    struct ibv_mw *mw;
    uint32_t rkey;
};

static struct window new_window(int type) {
    struct window window = {.bed = new_bed()};
    window.mw = need(ibv_alloc_mw(window.bed.pd, type == 1 ? IBV_MW_TYPE_1 : IBV_MW_TYPE_2), "ibv_alloc_mw");
    window.rkey = window.mw->rkey;
    return window;
}

#define WINDOW_AT 100
#define WINDOW_LENGTH 4096
#define WINDOW_ACCESS (IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ)

static int bind_to(struct window *window, struct queue *queue, struct ibv_mr *mr, uint64_t addr, uint64_t length, unsigned access) {
    struct ibv_wc wc;
    if (window->mw->type == IBV_MW_TYPE_1) {
        struct ibv_mw_bind bind = {.send_flags = IBV_SEND_SIGNALED, .bind_info = {mr, addr, length, access}};
        if (ibv_bind_mw(queue->qp, window->mw, &bind)) return -2;
        window->rkey = window->mw->rkey;
        return completion(queue->cq, &wc);
    }
    struct ibv_send_wr wr = {.opcode = IBV_WR_BIND_MW};
    wr.bind_mw.mw = window->mw;
    wr.bind_mw.rkey = ibv_inc_rkey(window->rkey);
    wr.bind_mw.bind_info = (struct ibv_mw_bind_info){mr, addr, length, access};
    int status = run(queue, &wr);
    if (status == IBV_WC_SUCCESS) window->mw->rkey = window->rkey = wr.bind_mw.rkey;
    return status;
}

static uint64_t window_addr(struct window *window) { return (uintptr_t)window->bed.memory + SIZE + WINDOW_AT; }

static int bind_usual(struct window *window) {
    return bind_to(window, &window->bed.b, window->bed.remote, window_addr(window), WINDOW_LENGTH, WINDOW_ACCESS);
}

static int use(struct window *window, struct queue *queue, uint64_t addr, uint32_t length, uint32_t rkey) {
    return rdma(queue, IBV_WR_RDMA_WRITE, (uintptr_t)window->bed.memory, length, window->bed.local->lkey, addr, rkey);
}

static int invalidate(struct queue *queue, uint32_t rkey) {
    struct ibv_send_wr wr = {.opcode = IBV_WR_LOCAL_INV, .invalidate_rkey = rkey};
    return run(queue, &wr);
}

static void windows(void) {
    for (int type = 1; type <= 2; type++) {
        char name[128];
#define CASE(text) (snprintf(name, sizeof name, "window type %d, %s", type, text), name)
        struct window w = new_window(type);
        say(CASE("used before it is bound"), status_name(use(&w, &w.bed.a, window_addr(&w), 8, w.rkey)));
        w = new_window(type);
        say(CASE("bound"), status_name(bind_usual(&w)));
        say(CASE("used"), status_name(use(&w, &w.bed.a, window_addr(&w), WINDOW_LENGTH, w.rkey)));
        say(CASE("one byte past its end"), status_name(use(&w, &w.bed.a, window_addr(&w) + 1, WINDOW_LENGTH, w.rkey)));
        w = new_window(type), bind_usual(&w);
        say(CASE("one byte before its start"), status_name(use(&w, &w.bed.a, window_addr(&w) - 1, 8, w.rkey)));
        w = new_window(type);
        uint32_t old = w.rkey;
        bind_usual(&w);
        say(CASE("used by the key of before it was bound"), status_name(use(&w, &w.bed.a, window_addr(&w), 8, old)));
        w = new_window(type);
        bind_to(&w, &w.bed.b, w.bed.remote, window_addr(&w), WINDOW_LENGTH, IBV_ACCESS_REMOTE_READ);
        say(CASE("written without the right"), status_name(use(&w, &w.bed.a, window_addr(&w), 8, w.rkey)));
        w = new_window(type), bind_usual(&w);
        struct queue c = queue(w.bed.pd), d = queue(w.bed.pd);
        connect_pair(&c, &d);
        say(CASE("used through another queue pair of its domain"), status_name(use(&w, &c, window_addr(&w), 8, w.rkey)));
        w = new_window(type), bind_usual(&w);
        say(CASE("bound while it is bound"), status_name(bind_usual(&w)));
        w = new_window(type), bind_usual(&w);
        say(CASE("bound to nothing"), status_name(bind_to(&w, &w.bed.b, w.bed.remote, window_addr(&w), 0, WINDOW_ACCESS)));
        w = new_window(type);
        struct ibv_mr *mr = need(ibv_reg_mr(w.bed.pd, w.bed.memory + SIZE, SIZE, ALL & ~IBV_ACCESS_MW_BIND), "ibv_reg_mr");
        say(CASE("over a region without the right to bind"), status_name(bind_to(&w, &w.bed.b, mr, window_addr(&w), 8, WINDOW_ACCESS)));
        w = new_window(type);
        mr = need(ibv_reg_mr(w.bed.pd, w.bed.memory + SIZE, SIZE, IBV_ACCESS_MW_BIND), "ibv_reg_mr");
        say(CASE("for writing over a region that its owner may not write"), status_name(bind_to(&w, &w.bed.b, mr, window_addr(&w), 8, WINDOW_ACCESS)));
        w = new_window(type);
        say(CASE("past the end of its region"), status_name(bind_to(&w, &w.bed.b, w.bed.remote, window_addr(&w), SIZE - WINDOW_AT + 1, WINDOW_ACCESS)));
        w = new_window(type);
        say(CASE("before the start of its region"), status_name(bind_to(&w, &w.bed.b, w.bed.remote, window_addr(&w) - WINDOW_AT - 1, 8, WINDOW_ACCESS)));
        w = new_window(type);
        mr = need(ibv_reg_mr(need(ibv_alloc_pd(context), "pd"), w.bed.memory + SIZE, SIZE, ALL), "ibv_reg_mr");
        say(CASE("over a region of another domain"), status_name(bind_to(&w, &w.bed.b, mr, window_addr(&w), 8, WINDOW_ACCESS)));
        w = new_window(type);
        w.mw = need(ibv_alloc_mw(need(ibv_alloc_pd(context), "pd"), type == 1 ? IBV_MW_TYPE_1 : IBV_MW_TYPE_2), "ibv_alloc_mw"), w.rkey = w.mw->rkey;
        say(CASE("of another domain than its queue pair"), status_name(bind_usual(&w)));
        w = new_window(type);
        int status = bind_to(&w, &w.bed.b, w.bed.remote, window_addr(&w), 64, WINDOW_ACCESS | IBV_ACCESS_ZERO_BASED);
        say(CASE("zero based"), status_name(status));
        w = new_window(type), bind_usual(&w);
        say(CASE("invalidated"), status_name(invalidate(&w.bed.b, w.rkey)));
        /* Where the invalidation failed, the queue pair that answers is in error. */
        if (type == 2) say(CASE("used after that"), status_name(use(&w, &w.bed.a, window_addr(&w), 8, w.rkey)));
        w = new_window(type), bind_usual(&w);
        struct queue e = queue(w.bed.pd), f = queue(w.bed.pd);
        connect_pair(&e, &f);
        say(CASE("invalidated through another queue pair"), status_name(invalidate(&f, w.rkey)));
        w = new_window(type);
        /* rdma_rxe of 7.3 puts a queue pair that there is not (rxe_mw.c, rxe_invalidate_mw), and the kernel dies of it. */
        if (type == 1) say(CASE("invalidated while it is free"), status_name(invalidate(&w.bed.b, w.rkey)));
        w = new_window(type), bind_usual(&w);
        say(CASE("its region deregistered under it"), outcome(ibv_dereg_mr(w.bed.remote)));
        w = new_window(type), bind_usual(&w);
        say(CASE("deallocated while it is bound"), outcome(ibv_dealloc_mw(w.mw)));
#undef CASE
    }
    struct window w = new_window(2);
    bind_usual(&w), invalidate(&w.bed.b, w.rkey);
    say("window type 2, bound again after an invalidation", status_name(bind_usual(&w)));
    w = new_window(2);
    bind_to(&w, &w.bed.b, w.bed.remote, window_addr(&w), 64, WINDOW_ACCESS | IBV_ACCESS_ZERO_BASED);
    say("window type 2, zero based, used at address 0", status_name(use(&w, &w.bed.a, 0, 64, w.rkey)));
}

static struct ibv_comp_channel *channel_of(void) {
    struct ibv_comp_channel *channel = need(ibv_create_comp_channel(context), "ibv_create_comp_channel");
    fcntl(channel->fd, F_SETFL, fcntl(channel->fd, F_GETFL) | O_NONBLOCK);
    return channel;
}

/* Events of a channel within a while. */
static int events(struct ibv_comp_channel *channel) {
    int count = 0;
    for (struct pollfd watched = {channel->fd, POLLIN, 0}; poll(&watched, 1, 500) > 0; count++) {
        struct ibv_cq *cq;
        void *cookie;
        if (ibv_get_cq_event(channel, &cq, &cookie)) break;
        ibv_ack_cq_events(cq, 1);
    }
    return count;
}

struct notified {
    struct bed bed;
    struct ibv_comp_channel *channel;
};

/* b completes to a queue with a channel. */
static struct notified new_notified(int entries) {
    struct notified made = {.bed = new_bed(), .channel = channel_of()};
    made.bed.b.cq = need(ibv_create_cq(context, entries, NULL, made.channel, 0), "ibv_create_cq");
    made.bed.b.qp = need(create_qp(made.bed.pd, made.bed.b.cq), "ibv_create_qp");
    made.bed.a = queue(made.bed.pd);
    connect_pair(&made.bed.a, &made.bed.b);
    return made;
}

/* b writes a few bytes, which ends with success, or with a key of nothing. */
static void b_writes(struct notified *n, int good) {
    struct ibv_sge sge = {(uintptr_t)n->bed.memory, 8, n->bed.local->lkey};
    struct ibv_send_wr *bad, wr = {.opcode = IBV_WR_RDMA_WRITE, .sg_list = &sge, .num_sge = 1, .send_flags = IBV_SEND_SIGNALED};
    wr.wr.rdma.remote_addr = (uintptr_t)n->bed.memory + SIZE, wr.wr.rdma.rkey = n->bed.remote->rkey ^ (good ? 0 : 1);
    if (ibv_post_send(n->bed.b.qp, &wr, &bad)) need(NULL, "ibv_post_send");
    usleep(300000);
}

static void count_case(const char *name, int count) {
    char text[32];
    snprintf(text, sizeof text, "%d", count);
    say(name, text);
}

static void completion_queues(void) {
    struct ibv_device_attr said;
    if (ibv_query_device(context, &said)) need(NULL, "ibv_query_device");
    say("completion queue, no entry", outcome(!ibv_create_cq(context, 0, NULL, NULL, 0)));
    say("completion queue, one entry more than the limit", outcome(!ibv_create_cq(context, said.max_cqe + 1, NULL, NULL, 0)));
    struct notified n = new_notified(16);
    b_writes(&n, 1);
    count_case("events, not armed", events(n.channel));
    ibv_req_notify_cq(n.bed.b.cq, 0);
    count_case("events, armed after the completion", events(n.channel));
    b_writes(&n, 1), b_writes(&n, 1);
    count_case("events, armed once and two completions", events(n.channel));
    n = new_notified(16);
    ibv_req_notify_cq(n.bed.b.cq, 1);
    b_writes(&n, 1);
    count_case("events, armed for solicited ones and one that is not", events(n.channel));
    b_writes(&n, 0);
    count_case("events, armed for solicited ones and a failure", events(n.channel));
    n = new_notified(16);
    ibv_req_notify_cq(n.bed.b.cq, 0), ibv_req_notify_cq(n.bed.b.cq, 1);
    b_writes(&n, 1);
    count_case("events, armed for any and then for solicited ones", events(n.channel));
    n = new_notified(16);
    ibv_req_notify_cq(n.bed.b.cq, 1), ibv_req_notify_cq(n.bed.b.cq, 0);
    b_writes(&n, 1);
    count_case("events, armed for solicited ones and then for any", events(n.channel));
    n = new_notified(16);
    for (int count = 0; count < 3; count++) b_writes(&n, 1);
    say("resized to less than it holds", outcome(ibv_resize_cq(n.bed.b.cq, 2)));
    say("resized to no entry", outcome(ibv_resize_cq(n.bed.b.cq, 0)));
    say("resized to more", outcome(ibv_resize_cq(n.bed.b.cq, 64)));
    struct ibv_wc wc[8];
    count_case("completions kept over that", ibv_poll_cq(n.bed.b.cq, 8, wc));
}

static void tables_and_lives(void) {
    uint16_t pkey = 0;
    union ibv_gid found;
    struct ibv_port_attr port;
    say("partition key 0", outcome(ibv_query_pkey(context, 1, 0, &pkey) != 0));
    say("partition key past the table", outcome(ibv_query_pkey(context, 1, 5000, &pkey) != 0));
    say("address past the table", outcome(ibv_query_gid(context, 1, 5000, &found) != 0));
    say("port 0", outcome(ibv_query_port(context, 0, &port) != 0));
    say("port 2", outcome(ibv_query_port(context, 2, &port) != 0));
    struct bed bed = new_bed();
    struct ibv_ah_attr to = {.is_global = 1, .port_num = 1, .grh = {.dgid = gid, .sgid_index = gid_index, .hop_limit = 1}};
    say("address handle", outcome(!ibv_create_ah(bed.pd, &to)));
    to.grh.sgid_index = 200;
    say("address handle from an address that there is not", outcome(!ibv_create_ah(bed.pd, &to)));
    struct ibv_pd *pd = need(ibv_alloc_pd(context), "pd");
    struct ibv_mr *mr = need(ibv_reg_mr(pd, bed.memory, SIZE, ALL), "ibv_reg_mr");
    say("domain given back with a region in it", outcome(ibv_dealloc_pd(pd)));
    ibv_dereg_mr(mr);
    say("domain given back when it is empty", outcome(ibv_dealloc_pd(pd)));
    pd = need(ibv_alloc_pd(context), "pd");
    struct queue q = queue(pd);
    say("domain given back with a queue pair in it", outcome(ibv_dealloc_pd(pd)));
    struct ibv_mw *mw = ibv_alloc_mw(pd, IBV_MW_TYPE_1);
    ibv_destroy_qp(q.qp);
    say("domain given back with a window in it", outcome(ibv_dealloc_pd(pd)));
    if (mw) ibv_dealloc_mw(mw);
    say("region, remote writing without local writing", outcome(!ibv_reg_mr(bed.pd, bed.memory, SIZE, IBV_ACCESS_REMOTE_WRITE)));
    say("region, remote atomics without local writing", outcome(!ibv_reg_mr(bed.pd, bed.memory, SIZE, IBV_ACCESS_REMOTE_ATOMIC)));
    say("region, remote reading alone", outcome(!ibv_reg_mr(bed.pd, bed.memory, SIZE, IBV_ACCESS_REMOTE_READ)));
    say("region, binding alone", outcome(!ibv_reg_mr(bed.pd, bed.memory, SIZE, IBV_ACCESS_MW_BIND)));
}

static void states(void) {
    struct bed bed = new_bed();
    enum ibv_qp_state all[] = {IBV_QPS_RESET, IBV_QPS_INIT, IBV_QPS_RTR, IBV_QPS_RTS, IBV_QPS_ERR};
    const char *names[] = {"reset", "init", "ready to receive", "ready to send", "error"};
    char name[128];
    for (int from = 0; from < 5; from++) {
        for (int next = 0; next < 5; next++) {
            struct ibv_qp *qp = in_state(bed.pd, bed.a.cq, all[from]);
            snprintf(name, sizeof name, "from %s to %s", names[from], names[next]);
            say(name, outcome(to(qp, all[next])));
            ibv_destroy_qp(qp);
        }
        struct ibv_qp *qp = in_state(bed.pd, bed.a.cq, all[from]);
        struct ibv_sge sge = {(uintptr_t)bed.memory, 8, bed.local->lkey};
        struct ibv_send_wr *bad, wr = {.opcode = IBV_WR_RDMA_WRITE, .sg_list = &sge, .num_sge = 1, .send_flags = IBV_SEND_SIGNALED};
        wr.wr.rdma.remote_addr = (uintptr_t)bed.memory + SIZE, wr.wr.rdma.rkey = bed.remote->rkey;
        snprintf(name, sizeof name, "request posted in %s", names[from]);
        say(name, outcome(ibv_post_send(qp, &wr, &bad)));
        ibv_destroy_qp(qp);
    }
}

int main(void) {
    const char *wanted = getenv("ANYPAGE_LAB_DEVICE") ?: "rxe0";
    gid_index = atoi(getenv("ANYPAGE_LAB_GID_INDEX") ?: "1");
    int count = 0;
    struct ibv_device **devices = need(ibv_get_device_list(&count), "ibv_get_device_list");
    for (int at = 0; at < count; at++)
        if (!strcmp(ibv_get_device_name(devices[at]), wanted)) context = ibv_open_device(devices[at]);
    need(context, wanted);
    if (ibv_query_gid(context, 1, gid_index, &gid)) need(NULL, "ibv_query_gid");
    keys();
    windows();
    completion_queues();
    tables_and_lives();
    states();
    return 0;
}
