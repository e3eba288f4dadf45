/* A decoder layer of a Llama-style model in one call, for the few rows of a decode step: included by cpu.c.
 *
 * x + attention(norm x), then that + mlp(norm of that), with matrices of float16 or bytes and float32 everything
 * else. The phases are the functions of cpu_ops.h and cpu_product.h, so a layer has the same bits as its operations
 * one by one; what is saved is the way to each of them through the interpreter, and all cores work in every phase: a
 * phase is a number of items for cpu_crew.h.
 */

#define FEW_ROWS 4 /* the fewest that a thread claims at once where a row is a microsecond */

typedef struct {
    const float *input_norm, *post_norm;       /* [hidden]; input_norm may be NULL if its result is always given */
    matrix qkv, out, gate_up, down;            /* see cpu_product.h */
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

static inline int64_t num_blocks(int64_t group, const haast_part *part) {
    return (group * part->num_nodes + WIDTH - 1) / WIDTH;
}

/* Floats of scratch memory: LayerSizes.space. */
typedef struct {
    float *normed, *heads, *attended, *delta, *total, *gate_up, *gated, *attention;
} layer_space;

static layer_space space_of(const haast_layer *layer, const haast_rows *rows) {
    const int64_t n = rows->num_rows, hidden = layer->hidden, inner = layer->inner;
    const int64_t width = layer->num_heads * layer->head_dim;
    layer_space space = {.normed = rows->space};
    space.heads = space.normed + n * hidden;
    space.attended = space.heads + n * (width + 2 * layer->num_kv_heads * layer->head_dim);
    space.delta = space.attended + n * width;
    space.total = space.delta + n * hidden;
    space.gate_up = space.total + n * hidden;
    space.gated = space.gate_up + n * 2 * inner;
    space.attention = space.gated + n * inner;
    return space;
}

/* One thread's share of a layer. x, out: [rows, hidden]; given: [rows, qkv_inputs] what attention reads instead of
 * norm x, or NULL; pools: [num_kv_heads, num_slots, head_dim]. hidden, inner and the width of the query, key and
 * value heads together are multiples of PANEL, head_dim one of WIDTH. */
static void share_layer(worker *self, const haast_layer *layer, const haast_rows *rows, const float *x,
                        const float *given, float *out, float *k_pool, float *v_pool) {
    const int64_t n = rows->num_rows, hidden = layer->hidden, d = layer->head_dim, inner = layer->inner;
    const int64_t group = layer->num_heads / layer->num_kv_heads, width = layer->num_heads * d;
    const int64_t all_heads = layer->num_heads + 2 * layer->num_kv_heads;
    const int64_t panels = hidden / PANEL, *slots = rows->slots;
    const layer_space space = space_of(layer, rows);
    float *own_space = space.attention + omp_get_thread_num() * attention_space(layer, rows->longest);
    int64_t at, end, blocks = 0; /* of query rows that share a KV head, over all parts */
    for (int64_t part = 0; part < rows->num_parts; part++) blocks += num_blocks(group, rows->parts + part);
    while (!given && claim(self, n, FEW_ROWS, &at, &end))
        haast_rms_norm_float32(x + at * hidden, layer->input_norm, space.normed + at * hidden, end - at, hidden,
                               layer->eps);
    while (claim(self, all_heads * d / PANEL, FEW_PANELS, &at, &end))
        product(given ? given : space.normed, &layer->qkv, space.heads, all_heads * d, layer->qkv_inputs, n, at, end);
    while (claim(self, n, FEW_ROWS, &at, &end))
        haast_rope_write_float32(space.heads + at * all_heads * d, rows->cos + at * d, rows->sin + at * d, k_pool,
                                 v_pool, slots ? slots + at : 0, rows->first_slot + at, end - at, layer->num_heads,
                                 layer->num_kv_heads, rows->num_slots, d);
    while (claim(self, layer->num_kv_heads * blocks, 1, &at, &end))
        for (; at < end; at++) {
            int64_t head = at / blocks, block = at % blocks, pool = head * rows->num_slots * d, of_part;
            const haast_part *own = rows->parts;
            for (; block >= (of_part = num_blocks(group, own)); own++) block -= of_part;
            haast_attend_block_float32(space.heads + own->first_row * all_heads * d, all_heads * d, k_pool + pool,
                                       v_pool + pool, own->slots, own->first_slot, own->bias, own->bias_stride,
                                       space.attended + own->first_row * width, own_space, own->num_nodes,
                                       layer->num_heads, group, head, block * WIDTH, own->len, d, layer->scale);
        }
    while (claim(self, panels, FEW_PANELS, &at, &end))
        product(space.attended, &layer->out, space.delta, hidden, width, n, at, end);
    while (claim(self, n, FEW_ROWS, &at, &end))
        haast_add_rms_norm_float32(x + at * hidden, space.delta + at * hidden, layer->post_norm,
                                   space.total + at * hidden, space.normed + at * hidden, end - at, hidden,
                                   layer->eps);
    while (claim(self, 2 * inner / PANEL, FEW_PANELS, &at, &end))
        product(space.normed, &layer->gate_up, space.gate_up, 2 * inner, hidden, n, at, end);
    while (claim(self, n, 1, &at, &end))
        haast_silu_mul_float32(space.gate_up + at * 2 * inner, space.gated + at * inner, end - at, inner);
    while (claim(self, panels, FEW_PANELS, &at, &end))
        product(space.gated, &layer->down, space.delta, hidden, inner, n, at, end);
    while (claim(self, n, FEW_ROWS, &at, &end))
        for (int64_t i = at * hidden; i < end * hidden; i++) out[i] = space.total[i] + space.delta[i];
}

/* Where a layer's keys and values lie: see share_layer. */
typedef struct {
    float *keys, *values;
} haast_pool;

/* Layers behind one another, by all threads; given: what the first one's attention reads, or NULL. A layer is done
 * with x before it writes its output, so from the second one on they work in place. */
void haast_decoder_layers(const haast_layer *const *layers, const haast_pool *pools, int64_t count,
                          const haast_rows *rows, const float *x, const float *given, float *out) {
    crew crew = {0};
#pragma omp parallel num_threads((int)rows->threads)
    {
        worker self = {&crew, 0, 0};
        for (int64_t i = 0; i < count; i++)
            share_layer(&self, layers[i], rows, i ? out : x, i ? NULL : given, out, pools[i].keys, pools[i].values);
    }
}
