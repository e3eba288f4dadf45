/* Work shared by threads that never wait for one another's arrival: included by cpu.c.
 *
 * A job is a row of phases, each of them a number of items that do not depend on each other; what a phase reads, the
 * phase before has written. Threads claim items a few at a time, and whoever ends the last item of a phase opens the
 * next one. So a phase waits for work that somebody has begun, never for a thread that the machine has not let run
 * yet: one that comes late finds its first phases done and goes on with the one that is open. With a barrier between
 * phases a step takes as long as the slowest arrival at each of hundreds of them; on cores that others use too, those
 * are milliseconds each.
 *
 * Which thread does what changes no bit: an item is computed by the same instructions whoever claims it.
 */

#include <omp.h>
#include <sched.h>
#include <stdatomic.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define MANY_LOOKS 4000 /* at a phase that others still work on, before the core is offered to somebody else */

typedef struct {
    _Alignas(64) _Atomic int64_t next; /* the open phase << 32 | how many of its items are claimed */
    _Alignas(64) _Atomic int64_t done; /* how many are done */
} crew;

typedef struct {
    crew *crew;
    int64_t phase, held; /* held: claimed items that are being worked on */
} worker;

static inline void look_again(int64_t *looks) {
    if (++*looks % MANY_LOOKS == 0) {
        sched_yield();
        return;
    }
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* for (int64_t at, end; claim(&self, count, least, &at, &end);) { items at to end - 1 }
 *
 * All threads of a crew go through the same phases in the same order, with the same count > 0 of items. Claims
 * shrink from an even share's half to `least` items, of which they are multiples, so that threads end together.
 * Returns 0 when the phase is over.
 */
static int claim(worker *self, int64_t count, int64_t least, int64_t *at, int64_t *end) {
    crew *crew = self->crew;
    if (self->held) {
        int64_t done = atomic_fetch_add_explicit(&crew->done, self->held, memory_order_acq_rel) + self->held;
        self->held = 0;
        if (done == count) { /* nobody else has an item any more */
            atomic_store_explicit(&crew->done, 0, memory_order_relaxed);
            atomic_store_explicit(&crew->next, ++self->phase << 32, memory_order_release);
            return 0;
        }
    }
    const int64_t shares = 2 * omp_get_num_threads();
    int64_t looks = 0, next = atomic_load_explicit(&crew->next, memory_order_acquire);
    while (next >> 32 == self->phase) {
        int64_t first = next & 0xffffffff, size = (count - first) / shares;
        if (first == count) { /* others work on the last items */
            look_again(&looks);
            next = atomic_load_explicit(&crew->next, memory_order_acquire);
            continue;
        }
        size = size < least ? least : size - size % least;
        if (size > count - first) size = count - first;
        if (atomic_compare_exchange_weak_explicit(&crew->next, &next, next + size, memory_order_acq_rel,
                                                  memory_order_acquire)) {
            *at = first;
            *end = first + size;
            self->held = size;
            return 1;
        }
    }
    self->phase++;
    return 0;
}
