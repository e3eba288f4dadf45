/* Products of float32 rows with a float16 matrix, for the few rows of a decode step: included by cpu.c.
 *
 * Few rows are bound by memory: the matrix is read once, in the order in which it lies. It is packed in panels of
 * PANEL outputs, [panel][input][PANEL]; a tile keeps the sums of some rows and panels in registers while it walks the
 * inputs. With one or two rows a tile reads several panels side by side, because a core that follows several streams
 * gets a third more out of the memory than with one. Weights are widened on their way into float32 multiply-adds.
 *
 * Every sum runs over the inputs in their order, in one register lane, whatever the tile: a row gets the same bits
 * alone and among others, and with any number of threads. OpenMP's threads are torch's own: kernels/cpu.py sees to it
 * that both use one runtime, so that no second pool of threads waits beside the first.
 */

#define PANEL (2 * WIDTH)
#define MOST_ROWS 6     /* of a tile: 12 sums, 2 weights and an input fit 16 registers */
#define ROWS_AT_ONCE 96 /* of a long product, whose inputs then stay in the second-level cache */
#define AHEAD 4096      /* elements by which a panel is fetched ahead */
#define FEW_PANELS 2    /* the fewest that a thread claims at once */

typedef uint16_t half; /* the bits */

static inline vec widen_half(const half *p) {
#if defined(__F16C__)
    return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
    __fp16 values[WIDTH];
    memcpy(values, p, sizeof values);
    vec wide;
    for (int i = 0; i < WIDTH; i++) wide[i] = (float)values[i];
    return wide;
#endif
}

/* What one input adds to the sums of a tile. */
static inline __attribute__((always_inline)) void tile_input(const float *x, const half *w, int64_t inputs,
                                                             const int rows, const int panels, vec sums[][8]) {
    vec weights[8];
    for (int p = 0; p < panels; p++) {
        weights[2 * p] = widen_half(w + p * inputs * PANEL);
        weights[2 * p + 1] = widen_half(w + p * inputs * PANEL + WIDTH);
    }
    for (int r = 0; r < rows; r++) {
        vec input = splat(x[r * inputs]);
        for (int v = 0; v < 2 * panels; v++) sums[r][v] += input * weights[v];
    }
}

/* rows x inputs of x against `panels` panels from w on -> out[row][panels * PANEL]. Inlined with constants for rows
 * and panels, so that the sums are registers. */
static inline __attribute__((always_inline)) void tile(const float *x, const half *w, float *out, int64_t out_stride,
                                                       int64_t inputs, const int rows, const int panels) {
    vec sums[MOST_ROWS][8];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < 2 * panels; v++) sums[r][v] = (vec){0};
    int64_t i = 0;
    for (; i + 2 <= inputs; i += 2) { /* two inputs' weights are a line of the cache */
        for (int p = 0; p < panels; p++) __builtin_prefetch(w + (p * inputs + i) * PANEL + AHEAD);
        tile_input(x + i, w + i * PANEL, inputs, rows, panels, sums);
        tile_input(x + i + 1, w + (i + 1) * PANEL, inputs, rows, panels, sums);
    }
    if (i < inputs) tile_input(x + i, w + i * PANEL, inputs, rows, panels, sums);
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < 2 * panels; v++) store(out + r * out_stride + v * WIDTH, sums[r][v]);
}

/* Up to MOST_ROWS rows against panels [first, last). */
static void few_rows(const float *x, const half *w, float *out, int64_t out_stride, int64_t inputs, int64_t rows,
                     int64_t first, int64_t last) {
#define TILES(R, P)                                                                            \
    for (; last - first >= P; first += P)                                                      \
        tile(x, w + first * inputs * PANEL, out + first * PANEL, out_stride, inputs, R, P);
    switch (rows) {
    case 1: TILES(1, 4) TILES(1, 1) break;
    case 2: TILES(2, 3) TILES(2, 1) break;
    case 3: TILES(3, 1) break;
    case 4: TILES(4, 1) break;
    case 5: TILES(5, 1) break;
    case 6: TILES(6, 1) break;
    }
#undef TILES
}

/* How many of so many rows the next tile takes: as even as possible, 8 as 4 and 4 rather than 6 and 2. */
static inline int64_t next_rows(int64_t rows) {
    int64_t tiles = (rows + MOST_ROWS - 1) / MOST_ROWS;
    return (rows + tiles - 1) / tiles;
}

/* All rows against panels [first, last): a panel is read from memory once per ROWS_AT_ONCE rows. */
static void all_rows(const float *x, const half *w, float *out, int64_t out_stride, int64_t inputs, int64_t rows,
                     int64_t first, int64_t last) {
    if (rows <= MOST_ROWS) {
        few_rows(x, w, out, out_stride, inputs, rows, first, last);
        return;
    }
    for (int64_t block = 0; block < rows; block += ROWS_AT_ONCE) {
        int64_t end = rows - block < ROWS_AT_ONCE ? rows : block + ROWS_AT_ONCE;
        for (int64_t panel = first; panel < last; panel++)
            for (int64_t row = block, count; row < end; row += count) {
                count = next_rows(end - row);
                few_rows(x + row * inputs, w, out + row * out_stride, out_stride, inputs, count, panel, panel + 1);
            }
    }
}

/* x: [rows, inputs] float32; w: [ceil(outputs / PANEL), inputs, PANEL] float16, padded with zeros; out: [rows,
 * outputs]; space: rows * PANEL floats, for the last panel where outputs is no multiple of it. */
void haast_half_linear(const float *x, const half *w, float *out, float *space, int64_t rows, int64_t inputs,
                       int64_t outputs, int64_t threads) {
    int64_t whole = outputs / PANEL, rest = outputs % PANEL, panels = whole + (rest > 0);
    crew crew = {0};
#pragma omp parallel num_threads((int)threads)
    {
        worker self = {&crew, 0, 0};
        for (int64_t at, end; claim(&self, panels, FEW_PANELS, &at, &end);) {
            all_rows(x, w, out, outputs, inputs, rows, at, end < whole ? end : whole);
            if (end == whole + 1) {
                all_rows(x, w + whole * inputs * PANEL, space, PANEL, inputs, rows, 0, 1);
                for (int64_t row = 0; row < rows; row++)
                    memcpy(out + row * outputs + whole * PANEL, space + row * PANEL, sizeof(float) * (size_t)rest);
            }
        }
    }
}
