/* The small operations of a step on a CPU in float32, each one call where plain torch needs four to ten.
 *
 * kernels/cpu.py compiles this file once per machine and calls it; kernels/ref.py says what each function
 * computes. A row's result does not depend on how many rows a call has: sums run over the same lanes in the same
 * order, and keys that a row may not see add exact zeros. So a token scored alone and in a tree gets the same bits.
 *
 * Vectors are GCC's and Clang's generic ones, eight floats wide, whatever the machine's registers are. Fused
 * multiply-adds are left to the compiler (-ffp-contract=fast); nothing else may be reordered.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define WIDTH 8
#define KEYS 4 /* keys that are scored at once */

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

/* Sum of squares of d floats; d need not be a multiple of the width. */
static float sum_of_squares(const float *x, int64_t d) {
    vec low = {0}, high = {0};
    int64_t i = 0;
    for (; i + 2 * WIDTH <= d; i += 2 * WIDTH) {
        vec a = load(x + i), b = load(x + i + WIDTH);
        low += a * a;
        high += b * b;
    }
    float rest = 0;
    for (; i < d; i++) rest += x[i] * x[i];
    return sum(low + high) + rest;
}

static void normalise(const float *x, const float *weight, float *out, int64_t d, float eps) {
    float scale = 1.0f / sqrtf(sum_of_squares(x, d) / (float)d + eps);
    for (int64_t i = 0; i < d; i++) out[i] = x[i] * scale * weight[i];
}

/* x, out: [n, d]; weight: [d]. */
void haast_rms_norm(const float *x, const float *weight, float *out, int64_t n, int64_t d, float eps) {
    for (int64_t row = 0; row < n; row++) normalise(x + row * d, weight, out + row * d, d, eps);
}

/* total = x + delta, out = rms_norm(total). All [n, d]. */
void haast_add_rms_norm(const float *x, const float *delta, const float *weight, float *total, float *out,
                        int64_t n, int64_t d, float eps) {
    for (int64_t row = 0; row < n; row++) {
        const float *a = x + row * d, *b = delta + row * d;
        float *t = total + row * d;
        for (int64_t i = 0; i < d; i++) t[i] = a[i] + b[i];
        normalise(t, weight, out + row * d, d, eps);
    }
}

/* gate_up: [n, 2d], gate first; out: [n, d]. d is a multiple of the width. */
void haast_silu_mul(const float *gate_up, float *out, int64_t n, int64_t d) {
    for (int64_t row = 0; row < n; row++) {
        const float *gate = gate_up + row * 2 * d, *up = gate + d;
        for (int64_t i = 0; i < d; i += WIDTH) {
            vec g = load(gate + i);
            vec least = splat(-88.0f); /* e^88 is the largest that is asked for */
            vec clamped = (vec)(((ivec)g & (g > least)) | ((ivec)least & ~(g > least)));
            store(out + row * d + i, g / (1.0f + expv(-clamped)) * load(up + i));
        }
    }
}

/* Rotate the query and key heads of n rows by halves; queries stay in place, keys and values go to their slots.
 *
 * heads: [n, num_heads + 2 num_kv_heads, d]; cos, sin: [n, d], the first half of sin negated; pools:
 * [num_kv_heads, num_slots, d]; slots: [n], or NULL where row i goes to first_slot + i. d is even. */
void haast_rope_write(float *heads, const float *cos, const float *sin, float *k_pool, float *v_pool,
                      const int64_t *slots, int64_t first_slot, int64_t n, int64_t num_heads,
                      int64_t num_kv_heads, int64_t num_slots, int64_t d) {
    int64_t half = d / 2;
    for (int64_t row = 0; row < n; row++) {
        float *own = heads + row * (num_heads + 2 * num_kv_heads) * d;
        const float *c = cos + row * d, *s = sin + row * d;
        int64_t slot = slots ? slots[row] : first_slot + row;
        for (int64_t head = 0; head < num_heads + num_kv_heads; head++) {
            float *x = own + head * d;
            float *out = head < num_heads ? x : k_pool + ((head - num_heads) * num_slots + slot) * d;
            for (int64_t i = 0; i < half; i++) {
                float a = x[i], b = x[i + half];
                out[i] = a * c[i] + b * s[i];
                out[i + half] = b * c[i + half] + a * s[i + half];
            }
        }
        for (int64_t head = 0; head < num_kv_heads; head++)
            memcpy(v_pool + (head * num_slots + slot) * d,
                   own + (num_heads + num_kv_heads + head) * d, sizeof(float) * d);
    }
}

/* weights[i]: scores of key i for the rows of a block -> e^(score + bias - the row's largest). Returns the sums. */
static vec exponentials(float *weights, const float *bias[WIDTH], int64_t len) {
    vec most = splat(-INFINITY);
    for (int64_t i = 0; i < len; i++) {
        vec w = load(weights + i * WIDTH);
        if (bias)
            for (int j = 0; j < WIDTH; j++) w[j] += bias[j][i];
        store(weights + i * WIDTH, w);
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

/* Scores of all keys for the rows of a block. query: [d][WIDTH], the rows side by side. The last keys repeat the
 * very last one, so that every score comes from the same instructions. */
static void scores(const float *query, const float *keys, const int64_t *slots, int64_t first_slot,
                   float *weights, int64_t len, int64_t d) {
    for (int64_t i = 0; i < len; i += KEYS) {
        const float *key[KEYS];
        vec sums[KEYS] = {{0}};
        for (int j = 0; j < KEYS; j++) {
            int64_t row = i + j < len ? i + j : len - 1;
            key[j] = keys + (slots ? slots[row] : first_slot + row) * d;
        }
        for (int64_t c = 0; c < d; c++) {
            vec q = load(query + c * WIDTH);
            for (int j = 0; j < KEYS; j++) sums[j] += key[j][c] * q;
        }
        for (int j = 0; j < KEYS && i + j < len; j++) store(weights + (i + j) * WIDTH, sums[j]);
    }
}

/* Attention of the nodes of one sequence over its rows of the pools.
 *
 * q: n rows of num_heads heads of d, q_stride floats from row to row; pools: [num_kv_heads, num_slots, d]; slots:
 * [len], or NULL where key i lies at first_slot + i; bias: [n, bias_stride] of 0 and -inf, or NULL; out: [n,
 * num_heads, d]; space: WIDTH * (len + d) floats. d is a multiple of the width.
 *
 * The query rows that share a KV head lie side by side in vectors, WIDTH at a time, so nothing is ever summed
 * across a vector. A block that is not full repeats its last row. */
void haast_tree_attention(const float *q, const float *k_pool, const float *v_pool, const int64_t *slots,
                          int64_t first_slot, const float *bias, float *out, float *space, int64_t n,
                          int64_t q_stride, int64_t num_heads, int64_t num_kv_heads, int64_t num_slots,
                          int64_t len, int64_t bias_stride, int64_t d, float scale) {
    int64_t group = num_heads / num_kv_heads, num_rows = group * n;
    float *weights = space, *query = space + WIDTH * len;
    for (int64_t head = 0; head < num_kv_heads; head++) {
        const float *keys = k_pool + head * num_slots * d, *values = v_pool + head * num_slots * d;
        for (int64_t first = 0; first < num_rows; first += WIDTH) {
            const float *row_bias[WIDTH];
            float *to[WIDTH];
            int count = num_rows - first < WIDTH ? (int)(num_rows - first) : WIDTH;
            for (int j = 0; j < WIDTH; j++) {
                int64_t row = first + (j < count ? j : count - 1), node = row / group;
                int64_t own = head * group + row % group;
                const float *from = q + node * q_stride + own * d;
                for (int64_t c = 0; c < d; c++) query[c * WIDTH + j] = from[c] * scale;
                row_bias[j] = bias ? bias + node * bias_stride : 0;
                to[j] = out + (node * num_heads + own) * d;
            }
            scores(query, keys, slots, first_slot, weights, len, d);
            vec total = exponentials(weights, bias ? row_bias : 0, len);
            ivec sees = total != 0.0f; /* NaN too: what is not a number shall not look like one */
            for (int64_t part = 0; part < d; part += WIDTH) {
                vec sums[WIDTH] = {{0}};
                for (int64_t i = 0; i < len; i++) {
                    const float *value = values + (slots ? slots[i] : first_slot + i) * d + part;
                    vec w = load(weights + i * WIDTH);
                    for (int c = 0; c < WIDTH; c++) sums[c] += value[c] * w;
                }
                for (int c = 0; c < WIDTH; c++) {
                    vec mean = (vec)((ivec)(sums[c] / total) & sees);
                    for (int j = 0; j < count; j++) to[j][part + c] = mean[j];
                }
            }
        }
    }
}
