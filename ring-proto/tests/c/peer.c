/*
 * The other end of the ring, made of nothing but ring.h and blkif.h.
 *
 *   peer front|back RING ORDER START COUNT
 *
 * RING is a file of 4096 << ORDER bytes, START the value of all indices, COUNT how many requests go
 * through. An event is a byte on standard input or output. Request k and its status follow from k
 * alone, in the way c_peer.rs has it too. Exits with a message when the other end breaks a rule.
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include "xen.h"

#define CHECK(what) do {                                                        \
    if (!(what)) {                                                              \
        fprintf(stderr, "peer.c:%d: not so: %s\n", __LINE__, #what);            \
        exit(1);                                                                \
    }                                                                           \
} while (0)

#define MAX_SLOTS 512
#define MAX_SEGMENTS 4096

static uint64_t mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
}

static uint64_t draw(uint64_t k, uint64_t n) { return mix(k << 16 | n); }

static uint64_t id_of(uint32_t k) { return draw(k, 0) << 32 | k; }

static int16_t status_of(uint32_t k) { return -(int16_t)(draw(k, 1) % 3); }

/* What request k asks for is an operation, or one of these. */
enum { EMPTY_FLUSH = BLKIF_OP_RESERVED_1, EMPTY_BARRIER = 7 };

/* What the response to request k carries: of an indirect request, the inner operation. */
static uint8_t response_operation_of(uint32_t k)
{
    uint64_t kind = draw(k, 2) % 8;

    return kind == EMPTY_FLUSH ? BLKIF_OP_FLUSH_DISKCACHE :
           kind == EMPTY_BARRIER ? BLKIF_OP_WRITE_BARRIER :
           kind == BLKIF_OP_INDIRECT ? draw(k, 3) % 2 : kind;
}

/* Writes request k, over whatever stood in the slot. */
static void write_request(struct blkif_request *slot, uint32_t k)
{
    uint64_t kind = draw(k, 2) % 8, sector = draw(k, 4) >> 2;
    struct blkif_request_discard *discard = (void *)slot;
    struct blkif_request_indirect *indirect = (void *)slot;

    switch (kind) {
    case BLKIF_OP_DISCARD:
        discard->operation = BLKIF_OP_DISCARD;
        discard->flag = draw(k, 3) % 2 ? BLKIF_DISCARD_SECURE : 0;
        discard->handle = draw(k, 5);
        discard->id = id_of(k);
        discard->sector_number = sector;
        discard->nr_sectors = draw(k, 6) >> 2;
        break;
    case BLKIF_OP_INDIRECT:
        indirect->operation = BLKIF_OP_INDIRECT;
        indirect->indirect_op = draw(k, 3) % 2 ? BLKIF_OP_WRITE : BLKIF_OP_READ;
        indirect->nr_segments = 1 + draw(k, 6) % MAX_SEGMENTS;
        indirect->id = id_of(k);
        indirect->sector_number = sector;
        indirect->handle = draw(k, 5);
        for (unsigned i = 0; i < (indirect->nr_segments + 511) / 512; i++)
            indirect->indirect_grefs[i] = draw(k, 16 + i);
        break;
    default:
        slot->operation = response_operation_of(k);
        slot->nr_segments = kind == EMPTY_FLUSH || kind == EMPTY_BARRIER ? 0 :
            1 + draw(k, 6) % BLKIF_MAX_SEGMENTS_PER_REQUEST;
        slot->handle = draw(k, 5);
        slot->id = id_of(k);
        slot->sector_number = slot->nr_segments ? sector : 0;
        for (unsigned i = 0; i < slot->nr_segments; i++) {
            slot->seg[i].gref = draw(k, 16 + i);
            slot->seg[i].first_sect = draw(k, 32 + i) % 8;
            slot->seg[i].last_sect =
                slot->seg[i].first_sect + draw(k, 48 + i) % (8 - slot->seg[i].first_sect);
        }
    }
}

/* Checks a copy of a request against request k; `handle` is the sender's own business. */
static void check_request(const struct blkif_request *got, uint32_t k)
{
    struct blkif_request want = { 0 };

    write_request(&want, k);
    CHECK(got->operation == want.operation);
    switch (want.operation) {
    case BLKIF_OP_DISCARD: {
        const struct blkif_request_discard *g = (void *)got, *w = (void *)&want;
        CHECK(g->flag == w->flag);
        CHECK(g->id == w->id);
        CHECK(g->sector_number == w->sector_number);
        CHECK(g->nr_sectors == w->nr_sectors);
        break;
    }
    case BLKIF_OP_INDIRECT: {
        const struct blkif_request_indirect *g = (void *)got, *w = (void *)&want;
        CHECK(g->indirect_op == w->indirect_op);
        CHECK(g->nr_segments == w->nr_segments);
        CHECK(g->id == w->id);
        CHECK(g->sector_number == w->sector_number);
        for (unsigned i = 0; i < (w->nr_segments + 511) / 512; i++)
            CHECK(g->indirect_grefs[i] == w->indirect_grefs[i]);
        break;
    }
    default:
        CHECK(got->nr_segments == want.nr_segments);
        CHECK(got->id == want.id);
        CHECK(got->sector_number == want.sector_number);
        for (unsigned i = 0; i < want.nr_segments; i++) {
            CHECK(got->seg[i].gref == want.seg[i].gref);
            CHECK(got->seg[i].first_sect == want.seg[i].first_sect);
            CHECK(got->seg[i].last_sect == want.seg[i].last_sect);
        }
    }
}

static void notify(void) { CHECK(write(1, "!", 1) == 1); }

static void wait_event(void)
{
    char events[4096];

    CHECK(read(0, events, sizeof events) > 0);
}

static void front(struct blkif_sring *sring, size_t bytes, uint32_t start, uint32_t count)
{
    static union blkif_sring_entry shadow[MAX_SLOTS];
    static uint8_t answered[1 << 20];
    blkif_front_ring_t ring;
    uint32_t sent = 0, done = 0;

    FRONT_RING_ATTACH(&ring, sring, start, bytes);
    CHECK(count <= sizeof answered);
    while (done < count) {
        uint32_t batch = 1 + draw(sent, done) % (2 * RING_SIZE(&ring));
        int wanted, more;

        while (batch-- && sent < count && !RING_FULL(&ring)) {
            struct blkif_request *slot = RING_GET_REQUEST(&ring, ring.req_prod_pvt);
            write_request(slot, sent++);
            memcpy(&shadow[ring.req_prod_pvt++ & (RING_SIZE(&ring) - 1)], slot, sizeof *shadow);
        }
        RING_PUSH_REQUESTS_AND_CHECK_NOTIFY(&ring, wanted);
        if (wanted)
            notify();
        for (;;) {
            RING_IDX prod = *(volatile RING_IDX *)&sring->rsp_prod;
            xen_rmb();
            CHECK(!RING_RESPONSE_PROD_OVERFLOW(&ring, prod));
            CHECK(prod - start <= sent);
            for (; ring.rsp_cons != prod; ring.rsp_cons++, done++) {
                size_t own = offsetof(struct blkif_response, status) + sizeof(int16_t);
                unsigned at = ring.rsp_cons & (RING_SIZE(&ring) - 1);
                struct blkif_response rsp;
                uint32_t k;

                RING_COPY_RESPONSE(&ring, ring.rsp_cons, &rsp);
                k = rsp.id;
                CHECK(k < sent && !answered[k]);
                answered[k] = 1;
                CHECK(rsp.id == id_of(k));
                CHECK(rsp.operation == response_operation_of(k));
                CHECK(rsp.status == status_of(k));
                /* Nothing but the response's own fields was written (XSA-216). */
                CHECK(!memcmp((char *)&sring->ring[at] + own, (char *)&shadow[at] + own,
                              sizeof *shadow - own));
            }
            if (sent < count && !RING_FULL(&ring))
                break;
            if (done == count)
                return;
            RING_FINAL_CHECK_FOR_RESPONSES(&ring, more);
            if (!more)
                wait_event();
        }
    }
}

static void back(struct blkif_sring *sring, size_t bytes, uint32_t start, uint32_t count)
{
    blkif_back_ring_t ring;
    uint32_t done = 0;

    BACK_RING_ATTACH(&ring, sring, start, bytes);
    while (done < count) {
        uint32_t first = done;
        RING_IDX prod = *(volatile RING_IDX *)&sring->req_prod;
        int wanted, more;

        xen_rmb();
        CHECK(!RING_REQUEST_PROD_OVERFLOW(&ring, prod));
        for (; ring.req_cons != prod && !RING_REQUEST_CONS_OVERFLOW(&ring, ring.req_cons); done++) {
            struct blkif_request req;
            RING_COPY_REQUEST(&ring, ring.req_cons++, &req);
            check_request(&req, done);
        }
        /* The last one first: a backend answers in any order. */
        for (uint32_t k = done; k-- > first;) {
            struct blkif_response *rsp = RING_GET_RESPONSE(&ring, ring.rsp_prod_pvt++);
            rsp->id = id_of(k);
            rsp->operation = response_operation_of(k);
            rsp->status = status_of(k);
        }
        RING_PUSH_RESPONSES_AND_CHECK_NOTIFY(&ring, wanted);
        if (wanted)
            notify();
        if (done == count)
            return;
        RING_FINAL_CHECK_FOR_REQUESTS(&ring, more);
        if (!more)
            wait_event();
    }
}

int main(int argc, char **argv)
{
    size_t bytes;
    int fd;
    struct blkif_sring *sring;

    CHECK(argc == 6);
    alarm(30); /* a lost event must not hang the test */
    bytes = (size_t)1 << XEN_PAGE_SHIFT << atoi(argv[3]);
    fd = open(argv[2], O_RDWR);
    CHECK(fd >= 0);
    sring = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(sring != MAP_FAILED);
    (argv[1][0] == 'f' ? front : back)(sring, bytes, strtoul(argv[4], NULL, 0),
                                       strtoul(argv[5], NULL, 0));
    return 0;
}
