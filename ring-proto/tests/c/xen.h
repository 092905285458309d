/*
 * Xen's own headers, as a guest of this machine sees them, or (with -DPACK4) as an i386 guest does:
 * there a uint64_t is aligned to 4 bytes. c_peer.rs has the i386 compiler confirm that.
 */
#include <stddef.h>
#include <stdint.h>
#include <xen/xen.h>
#include <xen/grant_table.h>

#define xen_mb()  __atomic_thread_fence(__ATOMIC_SEQ_CST)
#define xen_rmb() __atomic_thread_fence(__ATOMIC_ACQUIRE)
#define xen_wmb() __atomic_thread_fence(__ATOMIC_RELEASE)

#ifdef PACK4
#pragma pack(push, 4)
#endif
#include <xen/io/ring.h>
#include <xen/io/blkif.h>
#ifdef PACK4
#pragma pack(pop)
#endif
