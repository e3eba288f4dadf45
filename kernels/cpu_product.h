/* Products of float32 rows with a matrix of float16 or of bytes, for the few rows of a decode step: included by
 * cpu.c.
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

#include <stddef.h>

#define PANEL (2 * WIDTH)
#define MOST_ROWS 6     /* of a tile: 12 sums, 2 weights and an input fit 16 registers */
#define ROWS_AT_ONCE 96 /* of a long product, whose inputs then stay in the second-level cache */
#define AHEAD 4096      /* elements by which a panel is fetched ahead */
#define FEW_PANELS 4    /* the fewest that a thread claims at once: a tile's */

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

/* Eight bytes as floats. */
static inline vec widen_bytes(const int8_t *p) {
#if defined(__AVX2__)
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    vec wide;
    for (int i = 0; i < WIDTH; i++) wide[i] = (float)p[i];
    return wide;
#endif
}

/* How many of so many rows the next tile takes: as even as possible, 8 as 4 and 4 rather than 6 and 2. */
static inline int64_t next_rows(int64_t rows) {
    int64_t tiles = (rows + MOST_ROWS - 1) / MOST_ROWS;
    return (rows + tiles - 1) / tiles;
}

#define WEIGHT half
#define WIDEN widen_half
#define WITH(name) name##_of_halves
#include "cpu_tiles.h"
#undef WEIGHT
#undef WIDEN
#undef WITH

#define WEIGHT int8_t
#define WIDEN widen_bytes
#define WITH(name) name##_of_bytes
#include "cpu_tiles.h"
#undef WEIGHT
#undef WIDEN
#undef WITH

/* Of float16 or, where there are scales, of bytes that stand for scale x byte, one scale an output; in panels, padded
 * with zeros: [ceil(outputs / PANEL), inputs, PANEL] and [ceil(outputs / PANEL) * PANEL]. */
typedef struct {
    const void *panels;
    const float *scales;
} matrix;

/* rows of x against panels [first, last) of a matrix. */
static void product(const float *x, const matrix *w, float *out, int64_t out_stride, int64_t inputs, int64_t rows,
                    int64_t first, int64_t last) {
    if (!w->scales) {
        all_rows_of_halves(x, w->panels, out, out_stride, inputs, rows, first, last);
        return;
    }
    all_rows_of_bytes(x, w->panels, out, out_stride, inputs, rows, first, last);
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = first * PANEL; i < last * PANEL; i++) out[row * out_stride + i] *= w->scales[i];
}

static inline matrix from_panel(const matrix *w, int64_t inputs, int64_t panel) {
    int64_t skipped = panel * PANEL * inputs;
    if (w->scales) return (matrix){(const int8_t *)w->panels + skipped, w->scales + panel * PANEL};
    return (matrix){(const half *)w->panels + skipped, NULL};
}

/* x: [rows, inputs] float32; out: [rows, outputs]; space: rows * PANEL floats, for the last panel where outputs is
 * no multiple of it. */
void haast_panel_linear(const float *x, const matrix *w, float *out, float *space, int64_t rows, int64_t inputs,
                        int64_t outputs, int64_t threads) {
    int64_t whole = outputs / PANEL, rest = outputs % PANEL, panels = whole + (rest > 0);
    crew crew = {0};
#pragma omp parallel num_threads((int)threads)
    {
        worker self = {&crew, 0, 0};
        for (int64_t at, end; claim(&self, panels, FEW_PANELS, &at, &end);) {
            product(x, w, out, outputs, inputs, rows, at, end < whole ? end : whole);
            if (end == whole + 1) {
                matrix last = from_panel(w, inputs, whole);
                product(x, &last, space, PANEL, inputs, rows, 0, 1);
                for (int64_t row = 0; row < rows; row++)
                    memcpy(out + row * outputs + whole * PANEL, space + row * PANEL, sizeof(float) * (size_t)rest);
            }
        }
    }
}
