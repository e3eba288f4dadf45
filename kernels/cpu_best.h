/* The best few of a row of logits, for a draft that wants a node's children: included by cpu.c. */

/* logits: [rows, vocab]; values, columns: [rows, count], best first, of equal ones the first; mass: [rows], the
 * logarithm of the sum of e^logit. count <= vocab. What is not a number counts as -inf. */
void haast_best(const float *logits, float *values, int64_t *columns, float *mass, int64_t rows, int64_t vocab,
                int64_t count) {
    for (int64_t row = 0; row < rows; row++, logits += vocab, values += count, columns += count) {
        int64_t found = 0;
        for (int64_t start = 0; start < vocab; start += BLOCK) {
            int64_t end = start + BLOCK < vocab ? start + BLOCK : vocab;
            if (found == count && end == start + BLOCK) {
                ivec better = {0};
                for (int64_t at = start; at < end; at += WIDTH) better |= load(logits + at) > values[count - 1];
                if (!any(better)) continue;
            }
            for (int64_t at = start; at < end; at++) {
                float value = logits[at] == logits[at] ? logits[at] : -INFINITY;
                if (found == count && !(value > values[count - 1])) continue;
                int64_t place = found < count ? found++ : count - 1;
                for (; place > 0 && values[place - 1] < value; place--) {
                    values[place] = values[place - 1];
                    columns[place] = columns[place - 1];
                }
                values[place] = value;
                columns[place] = at;
            }
        }
        float top = values[0];
        mass[row] = top > -INFINITY ? top + logf(mass_above(logits, vocab, 1, -INFINITY, top)) : top;
    }
}
