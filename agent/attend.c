/* Attention of many rows to many lists of keys, each row to the first few of one of them; see agent/tree_attention.py. */

#include <math.h>
#include <stdint.h>
#include <string.h>

/* Four rows at once by four vectors of keys, or of numbers of a value, are sixteen sums: as many as registers hold. */
enum { LANES = 16, ROWS = 4, TILE = 64, VECTORS = TILE / LANES };

/* GCC and Clang make of it what the machine has. */
typedef float vector __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t integers __attribute__((vector_size(4 * LANES), aligned(4)));

static inline vector load(const float *at) { return *(const vector *)at; }

static inline void store(float *at, vector x) { *(vector *)at = x; }

static inline vector greater(vector a, vector b) {
    integers first = a > b;
    return (vector)((first & (integers)a) | (~first & (integers)b));
}

/* exp(x) for x <= 0, to 2e-7 of it: 2^n by the bits of a float, 2^f for |f| <= 1/2 by its Taylor series. */
static inline vector exponential(vector x) {
    x = greater(x * 1.44269504f, (vector){} - 126.f);
    vector shifted = x + 12582912.f; /* 1.5 * 2^23: nothing behind the point is left */
    vector f = x - (shifted - 12582912.f);
    vector series = (vector){} + 1.54035304e-4f;
    series = series * f + 1.33335581e-3f;
    series = series * f + 9.61812911e-3f;
    series = series * f + 5.55041087e-2f;
    series = series * f + 2.40226507e-1f;
    series = series * f + 6.93147181e-1f;
    series = series * f + 1.f;
    return (vector)((integers)series + (((integers)shifted - 0x4B400000) << 23));
}

/* scores: (ROWS, most) for rows of queries, over a multiple of TILE keys. */
static inline void score(const float *const *query, const float *keys, int64_t most, int64_t size, int64_t row, float *scores) {
    for (int64_t tile = 0; tile < most; tile += TILE) {
        vector sums[ROWS][VECTORS] = {};
        const float *key = keys + tile * size;
        for (int64_t d = 0; d < size; d++, key += TILE)
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < VECTORS; v++)
                    sums[r][v] += query[r][d] * load(key + v * LANES);
        for (int r = 0; r < ROWS; r++)
            memcpy(scores + r * row + tile, sums[r], sizeof sums[r]);
    }
}

/* The first `end` scores become weights, those up to `most` nothing; gives the logarithm of the sum of exponentials. */
static inline float weigh(float *scores, int64_t end, int64_t most) {
    int64_t to = (end + LANES - 1) / LANES * LANES;
    for (int64_t s = end; s < to; s++)
        scores[s] = -1e30f;
    vector tops = load(scores), totals = {};
    for (int64_t s = LANES; s < to; s += LANES)
        tops = greater(tops, load(scores + s));
    float top = tops[0], total = 0;
    for (int i = 1; i < LANES; i++)
        top = tops[i] > top ? tops[i] : top;
    for (int64_t s = 0; s < to; s += LANES) {
        vector x = exponential(load(scores + s) - top);
        totals += x;
        store(scores + s, x);
    }
    for (int i = 0; i < LANES; i++)
        total += totals[i];
    for (int64_t s = 0; s < to; s += LANES)
        store(scores + s, load(scores + s) / total);
    for (int64_t s = to; s < most; s++)
        scores[s] = 0;
    return top + logf(total);
}

/* Means of the first `most` values by weights (ROWS, most), TILE numbers of each. */
static inline void average(const float *weights, const float *values, int64_t most, int64_t size, int64_t row, vector means[ROWS][VECTORS]) {
    memset(means, 0, sizeof(vector) * ROWS * VECTORS);
    for (int64_t s = 0; s < most; s++, values += size)
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECTORS; v++)
                means[r][v] += weights[r * row + s] * load(values + v * LANES);
}

/* queries: (heads, rows, size), scaled.  keys: (lists, heads, count / TILE, size, TILE).  values: (lists, heads, count, size).
 * Rows firsts[b] up to firsts[b + 1] take list lists[b]; a row sees its first ends[row] >= 1 keys.
 * room: (ROWS, count).  out: as queries, and sums: (heads, rows), the logarithms of the sums of exponentials; other rows are left alone.
 * size and count are multiples of TILE. */
void attend(const float *queries, const float *keys, const float *values, const int64_t *lists, const int64_t *firsts, const int64_t *ends,
            int64_t blocks, int64_t heads, int64_t rows, int64_t size, int64_t count, float *room, float *out, float *sums) {
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t head = 0; head < heads; head++) {
            int64_t list = (lists[block] * heads + head) * count * size;
            for (int64_t first = firsts[block]; first < firsts[block + 1]; first += ROWS) {
                /* Of what is missing of the last four, the last is computed again. */
                int64_t at[ROWS], most = 0;
                const float *query[ROWS];
                for (int r = 0; r < ROWS; r++) {
                    int64_t row = first + r < firsts[block + 1] ? first + r : firsts[block + 1] - 1;
                    most = ends[row] > most ? ends[row] : most;
                    at[r] = head * rows + row;
                    query[r] = queries + at[r] * size;
                }
                score(query, keys + list, most, size, count, room);
                for (int r = 0; r < ROWS; r++)
                    sums[at[r]] = weigh(room + r * count, ends[at[r] - head * rows], most);
                for (int64_t from = 0; from < size; from += TILE) {
                    vector means[ROWS][VECTORS];
                    average(room, values + list + from, most, size, count, means);
                    for (int r = 0; r < ROWS; r++)
                        memcpy(out + at[r] * size + from, means[r], sizeof means[r]);
                }
            }
        }
}
