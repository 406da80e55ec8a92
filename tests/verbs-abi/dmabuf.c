/* Memory that is known by a descriptor only: registered, written by a write and read by a read, and seen through the
   descriptor. A sealed memfd, or with /dev/udmabuf a DMABUF of it. Then what must be refused. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <infiniband/verbs.h>
#include <linux/udmabuf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096u
#define BYTES (16 * PAGE)
/* The region: pages 2 to 13 of the buffer, as if they were here. */
#define OFFSET (2 * PAGE)
#define LENGTH (12 * PAGE)
#define IOVA 0x700000000000u
#define RIGHTS (IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ)

static void check(int right, const char *what)
{
	if (!right) {
		fprintf(stderr, "%s: %s\n", what, strerror(errno));
		exit(1);
	}
}

static void refused(struct ibv_pd *pd, const char *what, int number, uint64_t offset, size_t length, uint64_t iova, int fd, int access)
{
	errno = 0;
	if (ibv_reg_dmabuf_mr(pd, offset, length, iova, fd, access) || errno != number) {
		fprintf(stderr, "%s: not refused with %s but: %s\n", what, strerror(number), strerror(errno));
		exit(1);
	}
}

/* What backs the pages, mapped at `*bytes`, and what stands for them: the same, or a DMABUF. */
static int buffer(unsigned char **bytes, const char **kind)
{
	int file = memfd_create("buffer", MFD_ALLOW_SEALING), device, made;
	struct udmabuf_create create = { .size = BYTES };

	check(file >= 0 && !ftruncate(file, BYTES), "memfd");
	*bytes = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	check(*bytes != MAP_FAILED, "mmap");
	check(!fcntl(file, F_ADD_SEALS, F_SEAL_SHRINK), "seal");
	device = open("/dev/udmabuf", O_RDWR);
	create.memfd = file;
	made = device < 0 ? -1 : ioctl(device, UDMABUF_CREATE, &create);
	*kind = made < 0 ? "a sealed memfd" : "a DMABUF";
	return made < 0 ? file : made;
}

static void transfer(struct ibv_qp *qp, struct ibv_cq *cq, enum ibv_wr_opcode opcode, struct ibv_sge *local, uint64_t at, uint32_t rkey)
{
	struct ibv_send_wr wr = { .sg_list = local, .num_sge = 1, .opcode = opcode, .send_flags = IBV_SEND_SIGNALED }, *bad;
	struct ibv_wc wc;
	int count;

	wr.wr.rdma.remote_addr = at;
	wr.wr.rdma.rkey = rkey;
	check(!ibv_post_send(qp, &wr, &bad), "post");
	do
		count = ibv_poll_cq(cq, 1, &wc);
	while (!count);
	if (count < 0 || wc.status) {
		fprintf(stderr, "opcode %d ended with %s\n", opcode, ibv_wc_status_str(wc.status));
		exit(1);
	}
}

/* A queue pair that is connected to itself. */
static struct ibv_qp *connected(struct ibv_context *context, struct ibv_pd *pd, struct ibv_cq *cq)
{
	struct ibv_qp_init_attr init = { .send_cq = cq, .recv_cq = cq, .qp_type = IBV_QPT_RC,
		.cap = { .max_send_wr = 4, .max_recv_wr = 1, .max_send_sge = 1, .max_recv_sge = 1 } };
	struct ibv_qp *qp = ibv_create_qp(pd, &init);
	struct ibv_qp_attr attr = { .qp_state = IBV_QPS_INIT, .port_num = 1, .qp_access_flags = RIGHTS };

	check(qp != NULL, "queue pair");
	check(!ibv_modify_qp(qp, &attr, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS), "init");
	attr = (struct ibv_qp_attr){ .qp_state = IBV_QPS_RTR, .path_mtu = IBV_MTU_1024, .dest_qp_num = qp->qp_num,
		.max_dest_rd_atomic = 1, .min_rnr_timer = 12, .ah_attr = { .is_global = 1, .port_num = 1, .grh = { .hop_limit = 1 } } };
	check(!ibv_query_gid(context, 1, 0, &attr.ah_attr.grh.dgid), "gid");
	check(!ibv_modify_qp(qp, &attr, IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
		IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER), "ready to receive");
	attr = (struct ibv_qp_attr){ .qp_state = IBV_QPS_RTS, .timeout = 14, .retry_cnt = 7, .rnr_retry = 7, .max_rd_atomic = 1 };
	check(!ibv_modify_qp(qp, &attr, IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN |
		IBV_QP_MAX_QP_RD_ATOMIC), "ready to send");
	return qp;
}

int main(void)
{
	static unsigned char plain[LENGTH];
	struct ibv_device **devices = ibv_get_device_list(NULL);
	struct ibv_context *context = devices && devices[0] ? ibv_open_device(devices[0]) : NULL;
	struct ibv_pd *pd = context ? ibv_alloc_pd(context) : NULL;
	struct ibv_cq *cq = pd ? ibv_create_cq(context, 4, NULL, NULL, 0) : NULL;
	unsigned char *bytes;
	const char *kind;
	int fd = buffer(&bytes, &kind), open_to_cutting = memfd_create("open", MFD_ALLOW_SEALING);
	struct ibv_mr *mr, *local;
	struct ibv_qp *qp;

	check(cq != NULL, "device");
	qp = connected(context, pd, cq);
	local = ibv_reg_mr(pd, plain, LENGTH, RIGHTS);
	mr = ibv_reg_dmabuf_mr(pd, OFFSET, LENGTH, IOVA, fd, RIGHTS);
	check(local && mr, "region");

	for (unsigned i = 0; i < LENGTH; i++)
		plain[i] = i * 7 % 251;
	/* From inside a page, over page boundaries, to the last byte. */
	struct ibv_sge sge = { (uintptr_t)plain + 100, LENGTH - 100, local->lkey };
	transfer(qp, cq, IBV_WR_RDMA_WRITE, &sge, IOVA + 100, mr->rkey);
	for (unsigned i = 0; i < BYTES; i++) {
		unsigned char right = i >= OFFSET + 100 && i < OFFSET + LENGTH ? (i - OFFSET) * 7 % 251 : 0;
		if (bytes[i] != right) {
			fprintf(stderr, "byte %u is %u, not %u\n", i, bytes[i], right);
			return 1;
		}
	}
	memset(bytes + OFFSET, 5, LENGTH);
	transfer(qp, cq, IBV_WR_RDMA_READ, &sge, IOVA + 100, mr->rkey);
	for (unsigned i = 100; i < LENGTH; i++) {
		if (plain[i] != 5) {
			fprintf(stderr, "byte %u was read as %u\n", i, plain[i]);
			return 1;
		}
	}
	/* As the local end of a request, too. */
	sge = (struct ibv_sge){ IOVA + PAGE - 3, 6, mr->lkey };
	memcpy(bytes + OFFSET + PAGE - 3, "secret", 6);
	transfer(qp, cq, IBV_WR_RDMA_WRITE, &sge, (uintptr_t)plain, local->rkey);
	check(!memcmp(plain, "secret", 6), "a write from the buffer");

	refused(pd, "no descriptor", EBADF, 0, PAGE, IOVA, -1, RIGHTS);
	refused(pd, "past the end", EINVAL, 15 * PAGE, 2 * PAGE, IOVA, fd, RIGHTS);
	refused(pd, "an offset that wraps", EINVAL, UINT64_MAX - PAGE + 1, 2 * PAGE, IOVA, fd, RIGHTS);
	refused(pd, "nothing", EINVAL, 0, 0, IOVA, fd, RIGHTS);
	refused(pd, "another place in the page", EINVAL, 0, PAGE, IOVA + 1, fd, RIGHTS);
	refused(pd, "on demand", EINVAL, 0, PAGE, IOVA, fd, RIGHTS | IBV_ACCESS_ON_DEMAND);
	check(open_to_cutting >= 0 && !ftruncate(open_to_cutting, PAGE), "memfd");
	refused(pd, "a file that can be cut short", EINVAL, 0, PAGE, IOVA, open_to_cutting, RIGHTS);

	check(!ibv_dereg_mr(mr) && !ibv_dereg_mr(local), "deregistered");
	/* The registration kept the buffer, not the descriptor: it can be registered again. */
	mr = ibv_reg_dmabuf_mr(pd, 0, BYTES, 0, fd, RIGHTS);
	check(mr && !ibv_dereg_mr(mr), "once more");
	check(!ibv_destroy_qp(qp) && !ibv_destroy_cq(cq) && !ibv_dealloc_pd(pd) && !ibv_close_device(context), "closed");
	ibv_free_device_list(devices);
	printf("registered %s: every byte was right\n", kind);
	return 0;
}
