/* A decoder layer of a Llama-style model in one call, for the few rows of a decode step: included by cpu.c.
 *
 * x + attention(norm x), then that + mlp(norm of that), with float16 matrices and float32 everything else. The phases
 * are the functions of cpu_ops.h and cpu_half.h, so a layer has the same bits as its operations one by one; what is
 * saved is the way to each of them through the interpreter, and all cores work in every phase. A phase is cut into
 * items that do not depend on each other; between phases the threads wait for one another.
 */

typedef struct {
    const float *input_norm, *post_norm;       /* [hidden]; input_norm may be NULL if its result is always given */
    const half *qkv, *out, *gate_up, *down;    /* in panels: see cpu_half.h */
    int64_t hidden, num_heads, num_kv_heads, head_dim, inner;
    int64_t qkv_inputs;                        /* hidden, unless what attention reads is given */
    float eps, scale;
} haast_layer;

/* The nodes of one sequence, and what they read: see tree_attention. */
typedef struct {
    int64_t first_row, num_nodes;
    const int64_t *slots;
    int64_t first_slot, len;
    const float *bias;
    int64_t bias_stride;
} haast_part;

typedef struct {
    int64_t num_rows, num_parts, longest, num_slots, threads;
    const haast_part *parts;
    const float *cos, *sin;     /* [rows, head_dim], the first half of sin negated */
    const int64_t *slots;       /* where the rows' keys and values go; NULL: to first_slot and behind */
    int64_t first_slot;
    float *space;               /* as many floats as LayerSizes.space says */
} haast_rows;

static inline int64_t attention_space(const haast_layer *layer, int64_t longest) {
    return WIDTH * (longest + 2 * layer->head_dim);
}

/* This thread's share of a product. */
static void product(const float *x, const half *w, float *out, int64_t rows, int64_t inputs, int64_t outputs) {
    int64_t panels = outputs / PANEL, thread = omp_get_thread_num(), count = omp_get_num_threads();
    all_rows(x, w, out, outputs, inputs, rows, panels * thread / count, panels * (thread + 1) / count);
}

/* x, out: [rows, hidden]; given: [rows, qkv_inputs] what attention reads instead of norm x, or NULL; pools:
 * [num_kv_heads, num_slots, head_dim]. hidden, inner and the width of the query, key and value heads together are
 * multiples of PANEL, head_dim one of WIDTH. */
void haast_decoder_layer(const haast_layer *layer, const haast_rows *rows, const float *x, const float *given,
                         float *out, float *k_pool, float *v_pool) {
    const int64_t n = rows->num_rows, hidden = layer->hidden, d = layer->head_dim, inner = layer->inner;
    const int64_t group = layer->num_heads / layer->num_kv_heads, width = layer->num_heads * d;
    const int64_t all_heads = layer->num_heads + 2 * layer->num_kv_heads;
    float *normed = rows->space, *heads = normed + n * hidden, *attended = heads + n * all_heads * d;
    float *delta = attended + n * width, *total = delta + n * hidden, *gate_up = total + n * hidden;
    float *gated = gate_up + n * 2 * inner, *attention = gated + n * inner;
#pragma omp parallel num_threads((int)rows->threads)
    {
        float *own_space = attention + omp_get_thread_num() * attention_space(layer, rows->longest);
        if (!given) {
#pragma omp for schedule(static)
            for (int64_t row = 0; row < n; row++)
                haast_rms_norm_float32(x + row * hidden, layer->input_norm, normed + row * hidden, 1, hidden,
                                       layer->eps);
        }
        product(given ? given : normed, layer->qkv, heads, n, layer->qkv_inputs, all_heads * d);
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t row = 0; row < n; row++)
            haast_rope_write_float32(heads + row * all_heads * d, rows->cos + row * d, rows->sin + row * d, k_pool,
                                     v_pool, rows->slots ? rows->slots + row : 0, rows->first_slot + row, 1,
                                     layer->num_heads, layer->num_kv_heads, rows->num_slots, d);
        for (int64_t part = 0; part < rows->num_parts; part++) {
            const haast_part *own = rows->parts + part;
            const int64_t blocks = (group * own->num_nodes + WIDTH - 1) / WIDTH;
#pragma omp for schedule(dynamic) nowait
            for (int64_t item = 0; item < layer->num_kv_heads * blocks; item++) {
                int64_t head = item / blocks, pool = head * rows->num_slots * d;
                haast_attend_block_float32(heads + own->first_row * all_heads * d, all_heads * d, k_pool + pool,
                                     v_pool + pool, own->slots, own->first_slot, own->bias, own->bias_stride,
                                     attended + own->first_row * width, own_space, own->num_nodes, layer->num_heads,
                                     group, head, item % blocks * WIDTH, own->len, d, layer->scale);
            }
        }
#pragma omp barrier
        product(attended, layer->out, delta, n, width, hidden);
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t row = 0; row < n; row++)
            haast_add_rms_norm_float32(x + row * hidden, delta + row * hidden, layer->post_norm, total + row * hidden,
                                       normed + row * hidden, 1, hidden, layer->eps);
        product(normed, layer->gate_up, gate_up, n, hidden, 2 * inner);
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t item = 0; item < n * (inner / PANEL); item++) {
            int64_t row = item / (inner / PANEL), at = item % (inner / PANEL) * PANEL;
            haast_silu_mul_part_float32(gate_up + row * 2 * inner + at, inner, gated + row * inner + at, PANEL);
        }
        product(gated, layer->down, delta, n, inner, hidden);
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t item = 0; item < n * hidden / PANEL; item++)
            for (int64_t i = item * PANEL; i < (item + 1) * PANEL; i++) out[i] = total[i] + delta[i];
    }
}
