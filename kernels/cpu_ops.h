/* The operations themselves, for one type of element: included by cpu.c once per type, which defines ELEM, NAME,
 * GET, PUT and IS_FLOAT. */

/* One row: out = x / rms(x) * weight. */
static void NAME(normalise)(const ELEM *x, const ELEM *weight, ELEM *out, int64_t d, float eps) {
    vec low = {0}, high = {0};
    int64_t i = 0;
    for (; i + 2 * WIDTH <= d; i += 2 * WIDTH) {
        float wide[2 * WIDTH];
        for (int j = 0; j < 2 * WIDTH; j++) wide[j] = GET(x + i + j);
        vec a = load(wide), b = load(wide + WIDTH);
        low += a * a;
        high += b * b;
    }
    float rest = 0;
    for (; i < d; i++) rest += GET(x + i) * GET(x + i);
    float scale = 1.0f / sqrtf((sum(low + high) + rest) / (float)d + eps);
    for (i = 0; i < d; i++) PUT(out + i, GET(x + i) * scale * GET(weight + i));
}

/* x, out: [n, d]; weight: [d]. */
void NAME(rms_norm)(const ELEM *x, const ELEM *weight, ELEM *out, int64_t n, int64_t d, float eps) {
    for (int64_t row = 0; row < n; row++) NAME(normalise)(x + row * d, weight, out + row * d, d, eps);
}

/* total = x + delta, out = rms_norm(total). All [n, d]. */
void NAME(add_rms_norm)(const ELEM *x, const ELEM *delta, const ELEM *weight, ELEM *total, ELEM *out, int64_t n,
                        int64_t d, float eps) {
    for (int64_t row = 0; row < n; row++) {
        const ELEM *a = x + row * d, *b = delta + row * d;
        ELEM *t = total + row * d;
        for (int64_t i = 0; i < d; i++) PUT(t + i, GET(a + i) + GET(b + i));
        NAME(normalise)(t, weight, out + row * d, d, eps);
    }
}

/* out = silu(gate) * up, `count` elements, a multiple of the width; up lies `apart` elements behind gate. */
static void NAME(silu_mul_part)(const ELEM *gate, int64_t apart, ELEM *out, int64_t count) {
    const vec least = splat(-88.0f); /* e^88 is the largest that is asked for */
    for (int64_t i = 0; i < count; i += WIDTH) {
        float wide[WIDTH];
        for (int j = 0; j < WIDTH; j++) wide[j] = GET(gate + i + j);
        vec g = load(wide);
        vec clamped = (vec)(((ivec)g & (g > least)) | ((ivec)least & ~(g > least)));
        store(wide, g / (1.0f + expv(-clamped)));
        for (int j = 0; j < WIDTH; j++) PUT(out + i + j, wide[j] * GET(gate + apart + i + j));
    }
}

/* gate_up: [n, 2d], gate first; out: [n, d]. d is a multiple of the width. */
void NAME(silu_mul)(const ELEM *gate_up, ELEM *out, int64_t n, int64_t d) {
    for (int64_t row = 0; row < n; row++) NAME(silu_mul_part)(gate_up + row * 2 * d, d, out + row * d, d);
}

/* Rotate the query and key heads of n rows by halves; queries stay in place, keys and values go to their slots.
 *
 * heads: [n, num_heads + 2 num_kv_heads, d]; cos, sin: [n, d], the first half of sin negated; pools:
 * [num_kv_heads, num_slots, d]; slots: [n], or NULL where row i goes to first_slot + i. d is even. */
void NAME(rope_write)(ELEM *heads, const ELEM *cos, const ELEM *sin, ELEM *k_pool, ELEM *v_pool,
                      const int64_t *slots, int64_t first_slot, int64_t n, int64_t num_heads,
                      int64_t num_kv_heads, int64_t num_slots, int64_t d) {
    int64_t half = d / 2;
    for (int64_t row = 0; row < n; row++) {
        ELEM *own = heads + row * (num_heads + 2 * num_kv_heads) * d;
        const ELEM *c = cos + row * d, *s = sin + row * d;
        int64_t slot = slots ? slots[row] : first_slot + row;
        for (int64_t head = 0; head < num_heads + num_kv_heads; head++) {
            ELEM *x = own + head * d;
            ELEM *out = head < num_heads ? x : k_pool + ((head - num_heads) * num_slots + slot) * d;
            for (int64_t i = 0; i < half; i++) {
                float a = GET(x + i), b = GET(x + i + half);
                PUT(out + i, a * GET(c + i) + b * GET(s + i));
                PUT(out + i + half, b * GET(c + i + half) + a * GET(s + i + half));
            }
        }
        for (int64_t head = 0; head < num_kv_heads; head++)
            memcpy(v_pool + (head * num_slots + slot) * d,
                   own + (num_heads + num_kv_heads + head) * d, sizeof(ELEM) * d);
    }
}

/* Attention of one block of query rows, from row `first` on, of those that share a KV head; see tree_attention. keys,
 * values: float32, the head's own; space: WIDTH * (len + 2 d) floats. A block that is not full repeats its last row. */
static void NAME(attend_block)(const ELEM *q, int64_t q_stride, const float *keys, const float *values,
                               const int64_t *slots, int64_t first_slot, const float *bias, int64_t bias_stride,
                               ELEM *out, float *space, int64_t n, int64_t num_heads, int64_t group, int64_t head,
                               int64_t first, int64_t len, int64_t d, float scale) {
    float *weights = space, *query = weights + WIDTH * len, *mixed = query + WIDTH * d;
    const float *row_bias[WIDTH];
    int count = group * n - first < WIDTH ? (int)(group * n - first) : WIDTH;
    for (int j = 0; j < WIDTH; j++) {
        int64_t row = first + (j < count ? j : count - 1);
        const ELEM *from = q + row / group * q_stride + (head * group + row % group) * d;
        for (int64_t c = 0; c < d; c++) query[c * WIDTH + j] = GET(from + c) * scale;
        row_bias[j] = bias ? bias + row / group * bias_stride : 0;
    }
    attend(query, keys, values, slots, first_slot, bias ? row_bias : 0, mixed, weights, len, d);
    for (int j = 0; j < count; j++) {
        int64_t row = first + j;
        ELEM *to = out + (row / group * num_heads + head * group + row % group) * d;
        for (int64_t c = 0; c < d; c++) PUT(to + c, mixed[c * WIDTH + j]);
    }
}

/* Attention of the nodes of one sequence over its rows of the pools.
 *
 * q: n rows of num_heads heads of d, q_stride elements from row to row; pools: [num_kv_heads, num_slots, d];
 * slots: [len], or NULL where key i lies at first_slot + i; bias: [n, bias_stride] float32 of 0 and -inf, or NULL;
 * out: [n, num_heads, d]; space: WIDTH * (len + 2 d) floats, and 2 len d more if ELEM is not float. d is a
 * multiple of the width.
 *
 * The query rows that share a KV head lie side by side in vectors, WIDTH at a time, so nothing is ever summed
 * across a vector. */
void NAME(tree_attention)(const ELEM *q, const ELEM *k_pool, const ELEM *v_pool, const int64_t *slots,
                          int64_t first_slot, const float *bias, ELEM *out, float *space, int64_t n,
                          int64_t q_stride, int64_t num_heads, int64_t num_kv_heads, int64_t num_slots,
                          int64_t len, int64_t bias_stride, int64_t d, float scale) {
    int64_t group = num_heads / num_kv_heads;
    for (int64_t head = 0; head < num_kv_heads; head++) {
        const ELEM *own_k = k_pool + head * num_slots * d, *own_v = v_pool + head * num_slots * d;
#if IS_FLOAT
        const float *keys = own_k, *values = own_v;
        const int64_t *listed = slots;
        int64_t start = first_slot;
#else /* widened and gathered once, for all query rows of the head */
        float *keys = space + WIDTH * (len + 2 * d), *values = keys + len * d;
        const int64_t *listed = 0;
        int64_t start = 0;
        for (int64_t i = 0; i < len; i++) {
            int64_t at = (slots ? slots[i] : first_slot + i) * d;
            for (int64_t c = 0; c < d; c++) {
                keys[i * d + c] = GET(own_k + at + c);
                values[i * d + c] = GET(own_v + at + c);
            }
        }
#endif
        for (int64_t first = 0; first < group * n; first += WIDTH)
            NAME(attend_block)(q, q_stride, keys, values, listed, start, bias, bias_stride, out, space, n, num_heads,
                               group, head, first, len, d, scale);
    }
}
