/*
 * The bare ring hop in C: what ring.h's macros, without any of our checks on the indices, can do.
 *   hop DEPTH ORDER NANOSECONDS   prints requests a second, there and back
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include "../tests/c/xen.h"

#define DEVICE_SECTORS (1ull << 30)
/* Requests between two looks at the clock. */
#define ROUND 100000

static struct blkif_sring *sring;
static size_t bytes;
static volatile int ready, over;

static void pin(int cpu)
{
    cpu_set_t set;

    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    sched_setaffinity(0, sizeof set, &set);
}

static void pause_cpu(void)
{
#ifdef __x86_64__
    __builtin_ia32_pause();
#endif
}

static int16_t validate(const struct blkif_request *req)
{
    uint64_t sectors = 0;

    if (req->operation != BLKIF_OP_READ || !req->nr_segments ||
        req->nr_segments > BLKIF_MAX_SEGMENTS_PER_REQUEST)
        return BLKIF_RSP_ERROR;
    for (int i = 0; i < req->nr_segments; i++) {
        if (req->seg[i].first_sect > req->seg[i].last_sect || req->seg[i].last_sect > 7)
            return BLKIF_RSP_ERROR;
        sectors += req->seg[i].last_sect - req->seg[i].first_sect + 1;
    }
    return req->sector_number + sectors <= DEVICE_SECTORS ? BLKIF_RSP_OKAY : BLKIF_RSP_ERROR;
}

static void *back(void *unused)
{
    blkif_back_ring_t ring;
    int notify;

    (void)unused;
    pin(1);
    BACK_RING_INIT(&ring, sring, bytes);
    ready = 1;
    while (!over) {
        RING_IDX prod = *(volatile RING_IDX *)&sring->req_prod;

        xen_rmb();
        if (prod == ring.req_cons) {
            pause_cpu();
            continue;
        }
        while (ring.req_cons != prod) {
            struct blkif_request req;
            struct blkif_response *rsp;

            RING_COPY_REQUEST(&ring, ring.req_cons++, &req);
            rsp = RING_GET_RESPONSE(&ring, ring.rsp_prod_pvt++);
            rsp->id = req.id;
            rsp->operation = req.operation;
            rsp->status = validate(&req);
        }
        RING_PUSH_RESPONSES_AND_CHECK_NOTIFY(&ring, notify);
        (void)notify;
    }
    return NULL;
}

static int64_t now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000ll + time.tv_nsec;
}

int main(int argc, char **argv)
{
    blkif_front_ring_t ring;
    uint64_t sent = 0, done = 0, faults = 0;
    int64_t from, taken;
    uint32_t depth;
    pthread_t other;
    int notify;

    if (argc != 4)
        return 2;
    depth = atoi(argv[1]);
    bytes = 4096ul << atoi(argv[2]);
    sring = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (sring == MAP_FAILED)
        return 2;
    SHARED_RING_INIT(sring);
    FRONT_RING_INIT(&ring, sring, bytes);
    pthread_create(&other, NULL, back, NULL);
    /* A thread starts where its maker may run: pinned before, it would wait for this CPU with the clock on. */
    while (!ready)
        sched_yield();
    pin(0);
    from = now();
    do {
        for (uint64_t end = done + ROUND; done < end;) {
            RING_IDX prod;

            for (; sent < end && sent - done < depth; sent++) {
                struct blkif_request *req = RING_GET_REQUEST(&ring, ring.req_prod_pvt++);

                req->operation = BLKIF_OP_READ;
                req->nr_segments = 1;
                req->handle = 0;
                req->id = sent;
                req->sector_number = sent * 8 % DEVICE_SECTORS;
                req->seg[0] = (struct blkif_request_segment){ sent, 0, 7 };
            }
            RING_PUSH_REQUESTS_AND_CHECK_NOTIFY(&ring, notify);
            (void)notify;
            while ((prod = *(volatile RING_IDX *)&sring->rsp_prod) == ring.rsp_cons)
                pause_cpu();
            xen_rmb();
            for (; ring.rsp_cons != prod; ring.rsp_cons++, done++) {
                struct blkif_response rsp;

                RING_COPY_RESPONSE(&ring, ring.rsp_cons, &rsp);
                faults += rsp.id != done || rsp.status != BLKIF_RSP_OKAY;
            }
        }
        taken = now() - from;
    } while (taken < atoll(argv[3]));
    over = 1;
    pthread_join(other, NULL);
    if (faults)
        return 1;
    printf("%.0f\n", done * 1e9 / taken);
    return 0;
}
