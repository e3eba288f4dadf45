/* Products with a matrix in panels, for one kind of weight: included by cpu_product.h once per kind, which defines
 * WEIGHT, WIDEN, which reads WIDTH of them as floats, and WITH, which names the functions. */

#define LINE (int)(64 / sizeof(WEIGHT) / PANEL) /* inputs whose weights of a panel are a line of the cache */

/* What one input adds to the sums of a tile. */
static inline __attribute__((always_inline)) void WITH(tile_input)(const float *x, const WEIGHT *w, int64_t inputs,
                                                                   const int rows, const int panels,
                                                                   vec sums[][8]) {
    vec weights[8];
    for (int p = 0; p < panels; p++) {
        weights[2 * p] = WIDEN(w + p * inputs * PANEL);
        weights[2 * p + 1] = WIDEN(w + p * inputs * PANEL + WIDTH);
    }
    for (int r = 0; r < rows; r++) {
        vec input = splat(x[r * inputs]);
        for (int v = 0; v < 2 * panels; v++) sums[r][v] += input * weights[v];
    }
}

/* rows x inputs of x against `panels` panels from w on -> out[row][panels * PANEL]. Inlined with constants for rows
 * and panels, so that the sums are registers. */
static inline __attribute__((always_inline)) void WITH(tile)(const float *x, const WEIGHT *w, float *out,
                                                             int64_t out_stride, int64_t inputs, const int rows,
                                                             const int panels) {
    vec sums[MOST_ROWS][8];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < 2 * panels; v++) sums[r][v] = (vec){0};
    int64_t i = 0;
    for (; i + LINE <= inputs; i += LINE) {
        for (int p = 0; p < panels; p++) __builtin_prefetch(w + (p * inputs + i) * PANEL + AHEAD);
        for (int j = 0; j < LINE; j++) WITH(tile_input)(x + i + j, w + (i + j) * PANEL, inputs, rows, panels, sums);
    }
    for (; i < inputs; i++) WITH(tile_input)(x + i, w + i * PANEL, inputs, rows, panels, sums);
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < 2 * panels; v++) store(out + r * out_stride + v * WIDTH, sums[r][v]);
}

/* Up to MOST_ROWS rows against panels [first, last). */
static void WITH(few_rows)(const float *x, const WEIGHT *w, float *out, int64_t out_stride, int64_t inputs,
                           int64_t rows, int64_t first, int64_t last) {
#define TILES(R, P)                                                                            \
    for (; last - first >= P; first += P)                                                      \
        WITH(tile)(x, w + first * inputs * PANEL, out + first * PANEL, out_stride, inputs, R, P);
    switch (rows) {
    case 1: TILES(1, 4) TILES(1, 2) TILES(1, 1) break;
    case 2: TILES(2, 3) TILES(2, 1) break;
    case 3: TILES(3, 1) break;
    case 4: TILES(4, 1) break;
    case 5: TILES(5, 1) break;
    case 6: TILES(6, 1) break;
    }
#undef TILES
}

/* All rows against panels [first, last): a panel is read from memory once per ROWS_AT_ONCE rows. */
static void WITH(all_rows)(const float *x, const WEIGHT *w, float *out, int64_t out_stride, int64_t inputs,
                           int64_t rows, int64_t first, int64_t last) {
    if (rows <= MOST_ROWS) {
        WITH(few_rows)(x, w, out, out_stride, inputs, rows, first, last);
        return;
    }
    for (int64_t block = 0; block < rows; block += ROWS_AT_ONCE) {
        int64_t end = rows - block < ROWS_AT_ONCE ? rows : block + ROWS_AT_ONCE;
        for (int64_t panel = first; panel < last; panel++)
            for (int64_t row = block, count; row < end; row += count) {
                count = next_rows(end - row);
                WITH(few_rows)(x + row * inputs, w, out + row * out_stride, out_stride, inputs, count, panel,
                               panel + 1);
            }
    }
}

#undef LINE
