/* The choice of a token from a row of logits: included by cpu.c. kernels/ref.py says what is computed.
 *
 * Noise for a whole vocabulary is two logarithms a token, and nearly all of them are for nothing: a token that is
 * worth s wins only if its noise exceeds best - s. The bits behind the noise are a few integer operations, and they
 * bound it, so the logarithms are taken where the bound exceeds what has to be beaten: some thirty times a row.
 *
 * Filters keep the tokens from some value on. So the best of all tokens, if they keep it, is the best of those they
 * keep; if not, nothing as good or worse is kept, and the search starts again above it. Nothing is sorted.
 */

typedef uint32_t uvec __attribute__((vector_size(4 * WIDTH)));

#define GOLDEN 0x9E3779B9u
#define BLOCK (4 * WIDTH) /* tokens that are looked at together */
#define MIX(x, key)                                                                            \
    (x ^= x >> 16, x *= 0x21F0AAADu, x ^= (key) ^ (x >> 15), x *= 0x735A2D97u, x ^ x >> 16)

static inline uint32_t mix(uint32_t x, uint32_t key) { return MIX(x, key); }
static inline uvec mixv(uvec x, uvec key) { return MIX(x, key); }

typedef struct { uint32_t first, second; } dice; /* what the noise of a position is made of */

static dice dice_of(int64_t seed, int64_t position) {
    uint32_t key = mix((uint32_t)seed * GOLDEN, (uint32_t)((uint64_t)seed >> 32));
    uint32_t first = mix((uint32_t)position * GOLDEN + 1, key);
    return (dice){first, mix(first + GOLDEN, ~key)};
}

static float noise_of(dice d, int64_t token) {
    uint32_t bits = mix((uint32_t)token * GOLDEN + d.first, d.second);
    return -logf(-logf(((float)(bits >> 9) + 0.5f) * 0x1p-23f));
}

/* At least the noise: -log(-log u) <= -log(1 - u), and log2 f is at least what the bits of f say, read as a number
 * whose fraction is linear between powers of two. The last summand covers the roundings. */
static inline vec most_noise(uvec bits) {
    vec f = __builtin_convertvector((ivec)(~bits >> 9), vec) + 0.5f; /* (1 - u) 2^23 */
    return (150.0f - __builtin_convertvector((ivec)f, vec) * 0x1p-23f) * 0.693147181f + 1e-3f;
}

static inline int any(ivec v) {
    int64_t parts[WIDTH / 2];
    memcpy(parts, &v, sizeof parts);
    int64_t found = 0;
    for (int i = 0; i < WIDTH / 2; i++) found |= parts[i];
    return found != 0;
}

/* The first token whose logit / temperature + noise is the largest, of those whose logit / temperature is above
 * `floor`; 0 if there is none. Without noise temperature is 1. */
static inline __attribute__((always_inline)) int64_t best_token(const float *logits, int64_t vocab, float temperature,
                                                                float floor, dice d, const int noisy) {
    uvec ids;
    for (int j = 0; j < WIDTH; j++) ids[j] = (uint32_t)j * GOLDEN;
    float best = -INFINITY;
    int64_t token = 0;
    for (int64_t start = 0; start < vocab; start += BLOCK) {
        int64_t end = start + BLOCK < vocab ? start + BLOCK : vocab;
        if (end == start + BLOCK) {
            ivec can_win = {0};
            for (int64_t at = start; at < end; at += WIDTH) {
                vec worth = load(logits + at) / temperature, most = worth;
                if (noisy) most += most_noise(mixv(ids + (uint32_t)at * GOLDEN + d.first, (uvec){0} + d.second));
                can_win |= (worth > floor) & (most > best);
            }
            if (!any(can_win)) continue;
        }
        for (int64_t at = start; at < end; at++) {
            float worth = logits[at] / temperature;
            if (!(worth > floor)) continue;
            if (noisy) worth += noise_of(d, at);
            if (worth > best) {
                best = worth;
                token = at;
            }
        }
    }
    return token;
}

/* Sum of e^(logit / temperature - top) over tokens whose logit / temperature is above `floor`. */
static float mass_above(const float *logits, int64_t vocab, float temperature, float floor, float top) {
    vec sums[4] = {{0}};
    float rest = 0;
    int64_t at = 0;
    for (; at + BLOCK <= vocab; at += BLOCK)
        for (int j = 0; j < 4; j++) {
            vec worth = load(logits + at + j * WIDTH) / temperature;
            sums[j] += (vec)((ivec)expv(worth - top) & (worth > floor));
        }
    for (; at < vocab; at++) {
        float worth = logits[at] / temperature;
        if (worth > floor) rest += expv(splat(worth - top))[0];
    }
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

/* Whether the largest of a row is a number: not if one is NaN or infinity, or all are -infinity. */
static int is_choosable(const float *logits, int64_t vocab) {
    vec most = splat(-INFINITY);
    ivec strange = {0};
    int64_t at = 0;
    for (; at + WIDTH <= vocab; at += WIDTH) {
        vec row = load(logits + at);
        ivec larger = row > most;
        most = (vec)(((ivec)row & larger) | ((ivec)most & ~larger));
        strange |= ~(row <= FLT_MAX);
    }
    int numbers = any(most > -INFINITY);
    for (; at < vocab; at++) {
        if (!(logits[at] <= FLT_MAX)) return 0;
        numbers |= logits[at] > -INFINITY;
    }
    return numbers && !any(strange);
}

/* least: the smallest logit / temperature that is kept. -1: there is nothing to choose. */
static int64_t choose_row(const float *logits, int64_t vocab, float temperature, float top_p, float least, dice d) {
    if (!is_choosable(logits, vocab)) return -1;
    if (temperature == 0) return best_token(logits, vocab, 1, -INFINITY, d, 0);
    float floor = nextafterf(least, -INFINITY);
    int64_t token = best_token(logits, vocab, temperature, floor, d, 1);
    if (top_p >= 1) return token;
    float top = logits[best_token(logits, vocab, 1, -INFINITY, d, 0)] / temperature;
    float whole = mass_above(logits, vocab, temperature, floor, top);
    for (;;) { /* each time the floor rises, and nothing is better than the best */
        floor = logits[token] / temperature;
        float better = mass_above(logits, vocab, temperature, floor, top);
        if (better == 0 || better < top_p * whole) return token;
        token = best_token(logits, vocab, temperature, floor, d, 1);
    }
}

/* logits: [num_seqs, num_nodes, vocab]; temperature, top_p, seeds: [num_seqs]; floors: [num_seqs, num_nodes] or NULL;
 * positions, choice: [num_seqs, num_nodes]. */
void haast_choose(const float *logits, const float *temperature, const float *top_p, const float *floors,
                  const int64_t *seeds, const int64_t *positions, int64_t *choice, int64_t num_seqs,
                  int64_t num_nodes, int64_t vocab, int64_t threads) {
#pragma omp parallel for schedule(dynamic) num_threads((int)threads)
    for (int64_t row = 0; row < num_seqs * num_nodes; row++) {
        int64_t seq = row / num_nodes;
        choice[row] = choose_row(logits + row * vocab, vocab, temperature[seq], top_p[seq],
                                 floors ? floors[row] : -INFINITY, dice_of(seeds[seq], positions[row]));
    }
}
