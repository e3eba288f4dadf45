/* What a draft head does for one level of a tree, in two calls: included by cpu.c.
 *
 * Between two levels a head computes next to nothing; its time goes into the way to its operations. So what lies
 * around its decoder layer is done by the threads that are there already: before it the embedding and the norms of
 * what the layer is given, behind it the last norm, the logits and the best of them. Bits as for cpu_layer.h.
 */

typedef struct {
    const float *embedding;                        /* [tokens, hidden] */
    const float *input_norm, *hidden_norm, *norm;  /* [hidden]: of embeddings, of features, before the logits */
    const float *cos, *sin;                        /* [positions, head_dim], the first half of sin negated */
    const int64_t *token_ids;                      /* [vocab]: what the logits stand for */
    matrix fc, logits;                             /* [hidden, num_features], [vocab, hidden]; vocab as hidden, */
    int64_t num_features, vocab;                   /* which is a multiple of PANEL */
    float eps;
} haast_head;

/* feature: [rows, hidden], the layer's input, or what fc makes that of: [rows, num_features] of the target's; which
 * says is_target. Attention reads [norm of the token's embedding, norm of the layer's input]. tokens, positions:
 * [rows]; out: [rows, hidden]; space: rows * (3 hidden + 2 head_dim) floats, besides the rows' own, whose cos and sin
 * nobody has to fill in. */
void haast_head_forward(const haast_head *head, const haast_layer *layer, const haast_rows *rows,
                        const int64_t *tokens, const int64_t *positions, const float *feature, int64_t is_target,
                        float *out, float *k_pool, float *v_pool, float *space) {
    const int64_t n = rows->num_rows, hidden = layer->hidden, d = layer->head_dim;
    float *given = space, *made = given + n * 2 * hidden, *cos = made + n * hidden, *sin = cos + n * d;
    const float *input = is_target ? made : feature;
    haast_rows own = *rows;
    own.cos = cos;
    own.sin = sin;
    crew crew = {0};
#pragma omp parallel num_threads((int)rows->threads)
    {
        worker self = {&crew, 0, 0};
        int64_t at, end;
        while (is_target && claim(&self, hidden / PANEL, FEW_PANELS, &at, &end))
            product(feature, &head->fc, made, hidden, head->num_features, n, at, end);
        while (claim(&self, n, FEW_ROWS, &at, &end))
            for (; at < end; at++) {
                float *to = given + at * 2 * hidden;
                haast_normalise_float32(head->embedding + tokens[at] * hidden, head->input_norm, to, hidden, head->eps);
                haast_normalise_float32(input + at * hidden, head->hidden_norm, to + hidden, hidden, head->eps);
                memcpy(cos + at * d, head->cos + positions[at] * d, sizeof(float) * (size_t)d);
                memcpy(sin + at * d, head->sin + positions[at] * d, sizeof(float) * (size_t)d);
            }
        share_layer(&self, layer, &own, input, given, out, k_pool, v_pool);
    }
}

/* The best children of nodes with features [rows, hidden]: their tokens and their shares of the logits' mass, 0 where
 * there is none, [rows, count]; space: rows * (hidden + vocab) floats. */
void haast_head_offers(const haast_head *head, const float *feature, float *space, int64_t *tokens, float *shares,
                       int64_t rows, int64_t hidden, int64_t count, int64_t threads) {
    const int64_t vocab = head->vocab;
    float *normed = space, *logits = normed + rows * hidden;
    crew crew = {0};
#pragma omp parallel num_threads((int)threads)
    {
        worker self = {&crew, 0, 0};
        int64_t at, end;
        while (claim(&self, rows, FEW_ROWS, &at, &end))
            haast_rms_norm_float32(feature + at * hidden, head->norm, normed + at * hidden, end - at, hidden,
                                   head->eps);
        while (claim(&self, vocab / PANEL, FEW_PANELS, &at, &end))
            product(normed, &head->logits, logits, vocab, hidden, rows, at, end);
        while (claim(&self, rows, 1, &at, &end))
            for (; at < end; at++) {
                int64_t *own = tokens + at * count;
                float *values = shares + at * count, mass;
                haast_best(logits + at * vocab, values, own, &mass, 1, vocab, count);
                for (int64_t i = 0; i < count; i++) {
                    own[i] = head->token_ids[own[i]];
                    values[i] = mass > -INFINITY ? expf(values[i] - mass) : 0.0f;
                }
            }
    }
}
