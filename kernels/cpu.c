/* The small operations of a step on a CPU, each one call where plain torch needs four to ten.
 *
 * kernels/cpu.py compiles this file once per machine and calls it; kernels/ref.py says what each function
 * computes. Tensors are float32 or bfloat16 (cpu_ops.h is compiled for either), arithmetic is always float32,
 * rounded once at the end. cpu_choose.h chooses tokens, cpu_best.h a draft's candidates; cpu_product.h,
 * cpu_layer.h and cpu_head.h add products with float16 and byte matrices, and whole layers and drafts made of all
 * these. A row's result does not depend on how many rows a call has: sums run over the same lanes in the same order,
 * and keys that a row may not see add exact zeros. So a token scored alone and in a tree gets the same bits.
 *
 * Vectors are GCC's and Clang's generic ones, eight floats wide, whatever the machine's registers are. Fused
 * multiply-adds are left to the compiler (-ffp-contract=fast); nothing else may be reordered.
 */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define WIDTH 8
#define KEYS 8    /* keys that are scored at once: as many sums as it takes to keep the multipliers busy */
#define VALUES 32 /* values that are mixed at once */

typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef int32_t ivec __attribute__((vector_size(4 * WIDTH)));

static inline vec load(const float *p) { vec v; memcpy(&v, p, sizeof v); return v; }
static inline void store(float *p, vec v) { memcpy(p, &v, sizeof v); }
static inline vec splat(float x) { return x - (vec){0}; }

static inline float sum(vec v) {
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

/* e^x to about 1e-7, and exactly 0 from -87 down, where e^x leaves the normal numbers. x <= 88; NaN stays NaN. */
static inline vec expv(vec x) {
    const ivec vanishes = x <= -87.0f;
    x = (vec)((ivec)x & ~vanishes); /* or n would not fit its place in the exponent */
    const vec magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to a whole number */
    vec n = (x * 1.44269504f + magic) - magic;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f; /* x - n ln 2, ln 2 in two parts */
    vec p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    ivec bits = (ivec)p + (__builtin_convertvector(n, ivec) << 23);
    return (vec)(bits & ~vanishes);
}

typedef uint16_t bf16;

static inline float widen(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* To the nearest, ties to even; a NaN stays one. */
static inline bf16 narrow(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (bf16)(x != x ? bits >> 16 | 0x40 : rounded);
}

/* The first key that a row of a block may not see: nearly all before it are committed, and seen by all. */
static int64_t first_masked(const float *bias[WIDTH], int64_t len) {
    int64_t first = len;
    for (int j = 0; j < WIDTH; j++) {
        int64_t i = 0;
        for (; i + WIDTH <= first; i += WIDTH) {
            ivec differs = load(bias[j] + i) != 0.0f;
            int64_t halves[WIDTH / 2];
            memcpy(halves, &differs, sizeof halves);
            if (halves[0] | halves[1] | halves[2] | halves[3]) break;
        }
        for (; i < first && bias[j][i] == 0.0f; i++) {}
        first = i;
    }
    return first;
}

/* weights[i]: scores of key i for the rows of a block -> e^(score + bias - the row's largest). Returns the sums. */
static vec exponentials(float *weights, const float *bias[WIDTH], int64_t len) {
    vec most = splat(-INFINITY);
    for (int64_t i = bias ? first_masked(bias, len) : len; i < len; i++)
        for (int j = 0; j < WIDTH; j++) weights[i * WIDTH + j] += bias[j][i];
    for (int64_t i = 0; i < len; i++) {
        vec w = load(weights + i * WIDTH);
        ivec larger = w > most;
        most = (vec)(((ivec)w & larger) | ((ivec)most & ~larger));
    }
    ivec sees = most > -INFINITY; /* a row that sees nothing gets weights of 0 */
    most = (vec)((ivec)most & sees);
    vec total = {0};
    for (int64_t i = 0; i < len; i++) {
        vec e = expv(load(weights + i * WIDTH) - most);
        store(weights + i * WIDTH, e);
        total += e;
    }
    return total;
}

static inline int64_t slot_of(const int64_t *slots, int64_t first_slot, int64_t row) {
    return slots ? slots[row] : first_slot + row;
}

/* Ask for the row of key or value i, d floats, ahead of its use: rows of a page lie together, pages anywhere. */
static inline void fetch_row(const float *rows, const int64_t *slots, int64_t first_slot, int64_t i, int64_t len,
                             int64_t d) {
    if (i >= len) return;
    const float *row = rows + slot_of(slots, first_slot, i) * d;
    for (int64_t c = 0; c < d; c += 16) __builtin_prefetch(row + c);
}

/* Scores of all keys for the rows of a block. query: [d][WIDTH], the rows side by side. The last keys repeat the
 * very last one, so that every score comes from the same instructions. */
static void scores(const float *query, const float *keys, const int64_t *slots, int64_t first_slot,
                   float *weights, int64_t len, int64_t d) {
    for (int64_t i = 0; i < len; i += KEYS) {
        const float *key[KEYS];
        vec sums[KEYS] = {{0}};
        for (int j = 0; j < KEYS; j++) {
            fetch_row(keys, slots, first_slot, i + 2 * KEYS + j, len, d);
            key[j] = keys + slot_of(slots, first_slot, i + j < len ? i + j : len - 1) * d;
        }
        for (int64_t c = 0; c < d; c++) {
            vec q = load(query + c * WIDTH);
            for (int j = 0; j < KEYS; j++) sums[j] += key[j][c] * q;
        }
        for (int j = 0; j < KEYS && i + j < len; j++) store(weights + (i + j) * WIDTH, sums[j]);
    }
}

/* mixed: [d][WIDTH] sums of weights times values. So many values at a time that they stay in the first-level cache
 * while each WIDTH of their columns is summed in registers. */
static void mix_values(const float *weights, const float *values, const int64_t *slots, int64_t first_slot,
                       float *mixed, int64_t len, int64_t d) {
    memset(mixed, 0, sizeof(float) * (size_t)(d * WIDTH));
    for (int64_t block = 0; block < len; block += VALUES) {
        const int64_t count = len - block < VALUES ? len - block : VALUES;
        const float *value[VALUES];
        for (int64_t i = 0; i < count; i++) {
            fetch_row(values, slots, first_slot, block + VALUES + i, len, d);
            value[i] = values + slot_of(slots, first_slot, block + i) * d;
        }
        for (int64_t part = 0; part < d; part += WIDTH) {
            vec sums[WIDTH];
            for (int c = 0; c < WIDTH; c++) sums[c] = load(mixed + (part + c) * WIDTH);
            for (int64_t i = 0; i < count; i++) {
                vec w = load(weights + (block + i) * WIDTH);
                for (int c = 0; c < WIDTH; c++) sums[c] += value[i][part + c] * w;
            }
            for (int c = 0; c < WIDTH; c++) store(mixed + (part + c) * WIDTH, sums[c]);
        }
    }
}

/* Attention of up to WIDTH query rows that share a KV head; mixed: [d][WIDTH], their outputs side by side. */
static void attend(const float *query, const float *keys, const float *values, const int64_t *slots,
                   int64_t first_slot, const float *bias[WIDTH], float *mixed, float *weights, int64_t len,
                   int64_t d) {
    scores(query, keys, slots, first_slot, weights, len, d);
    vec total = exponentials(weights, bias, len);
    ivec sees = total != 0.0f; /* NaN too: what is not a number shall not look like one */
    mix_values(weights, values, slots, first_slot, mixed, len, d);
    for (int64_t c = 0; c < d; c++) store(mixed + c * WIDTH, (vec)((ivec)(load(mixed + c * WIDTH) / total) & sees));
}

#define ELEM float
#define NAME(op) haast_##op##_float32
#define GET(p) (*(p))
#define PUT(p, x) (*(p) = (x))
#define IS_FLOAT 1
#include "cpu_ops.h"
#undef ELEM
#undef NAME
#undef GET
#undef PUT
#undef IS_FLOAT

#define ELEM bf16
#define NAME(op) haast_##op##_bfloat16
#define GET(p) widen(*(p))
#define PUT(p, x) (*(p) = narrow(x))
#define IS_FLOAT 0
#include "cpu_ops.h"
#include "cpu_choose.h"
#include "cpu_best.h"

#if defined(_OPENMP) && (defined(__F16C__) || defined(__aarch64__))
#include "cpu_crew.h"
#include "cpu_product.h"
#include "cpu_layer.h"
#include "cpu_head.h"
#endif
