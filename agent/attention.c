/* Attention in float32 on a CPU: `attend` for a step of decoding (agent/tree_attention.py), `causal` and its gradient for conversations that are
 * read (agent/packing.py). */

#include "vectors.h"

#include <math.h>
#include <string.h>

/* A product makes ROWS by WIDTH sums at once, as many as registers hold. Keys come TILE at a time. */
enum { ROWS = 4, VECTORS = LANES / 4, WIDTH = LANES * VECTORS, TILE = 64 };

/* out (ROWS, columns), rows `out_row` apart, becomes a b, or out + a b: a[r] + d * step for d < depth, and b (depth, columns), rows `b_row` apart. */
static inline void multiply(const float *const *a, int64_t step, const float *b, int64_t b_row, int64_t depth, int64_t columns, int add,
                            float *const *out) {
    for (int64_t from = 0; from < columns; from += WIDTH) {
        vector sums[ROWS][VECTORS] = {};
        if (add)
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < VECTORS; v++)
                    sums[r][v] = load(out[r] + from + v * LANES);
        const float *at = b + from;
        for (int64_t d = 0; d < depth; d++, at += b_row) {
            vector row[VECTORS];
            for (int v = 0; v < VECTORS; v++)
                row[v] = load(at + v * LANES);
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < VECTORS; v++)
                    sums[r][v] += a[r][d * step] * row[v];
        }
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECTORS; v++)
                store(out[r] + from + v * LANES, sums[r][v]);
    }
}

/* The same for any multiple of ROWS rows, a's `a_row` apart. */
static inline void product(const float *a, int64_t a_row, int64_t step, const float *b, int64_t b_row, int64_t depth, int64_t rows, int64_t columns,
                           int add, float *out, int64_t out_row) {
    for (int64_t first = 0; first < rows; first += ROWS) {
        const float *from[ROWS];
        float *to[ROWS];
        for (int r = 0; r < ROWS; r++) {
            from[r] = a + (first + r) * a_row;
            to[r] = out + (first + r) * out_row;
        }
        multiply(from, step, b, b_row, depth, columns, add, to);
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
    float top = greatest(tops);
    for (int64_t s = 0; s < to; s += LANES) {
        vector x = exponential(load(scores + s) - top);
        totals += x;
        store(scores + s, x);
    }
    float total = sum(totals);
    for (int64_t s = 0; s < to; s += LANES)
        store(scores + s, load(scores + s) / total);
    for (int64_t s = to; s < most; s++)
        scores[s] = 0;
    return top + logf(total);
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
                const float *query[ROWS], *weights[ROWS];
                float *scores[ROWS], *to[ROWS];
                for (int r = 0; r < ROWS; r++) {
                    int64_t row = first + r < firsts[block + 1] ? first + r : firsts[block + 1] - 1;
                    most = ends[row] > most ? ends[row] : most;
                    at[r] = head * rows + row;
                    query[r] = queries + at[r] * size;
                    weights[r] = room + r * count;
                    to[r] = out + at[r] * size;
                }
                for (int64_t tile = 0; tile < most; tile += TILE) {
                    for (int r = 0; r < ROWS; r++)
                        scores[r] = room + r * count + tile;
                    multiply(query, 1, keys + list + tile * size, TILE, size, TILE, 0, scores);
                }
                for (int r = 0; r < ROWS; r++)
                    sums[at[r]] = weigh(room + r * count, ends[at[r] - head * rows], most);
                multiply(weights, 1, values + list, size, most, size, 0, to);
            }
        }
}

/* What the cores share: a line of sequences that are read, each over itself and what it sees of the line's beginning.
 *
 * Sequence i has counts[i] tokens, its queries begin at row queries_from[i] and its keys at keys_from[i]; before its own keys it sees the first
 * before[i] of the line. Rows of queries, keys and values lie *_row apart, heads *_head.
 * out and of_queries: (tokens, heads, size), as is grad, what is given of out; sums: (heads, tokens), the logarithms of the sums of exponentials.
 * of_keys, of_values: (keys, kv, size), what comes from a sequence's own tokens; of_common: (sequences, 2, kv, common, size), what comes from it to
 * the keys and values of the line's beginning, common the greatest of before.
 * rooms: (threads, room). size is a multiple of TILE. */
typedef struct {
    int64_t sequences, tokens, heads, kv, size, common, query_row, query_head, key_row, key_head, value_row, value_head;
    const int64_t *queries_from, *keys_from, *counts, *before;
    const float *queries, *keys, *values, *grad;
    float *out, *sums, *of_queries, *of_keys, *of_values, *of_common, *rooms;
    int64_t room, threads;
    float scale;
} Line;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static inline int64_t rounded(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

/* What sequence i sees of a head's keys or values, zeros behind it: as rows, (seen, size), and by tiles, (seen / TILE, size, TILE); either may be 0. */
static void gather(const Line *line, int64_t i, const float *head, int64_t row, float *rows, float *tiles) {
    int64_t before = line->before[i], seen = before + line->counts[i], size = line->size;
    for (int64_t s = 0; s < rounded(seen, TILE); s++) {
        const float *from = head + (s < before ? s : line->keys_from[i] + s - before) * row;
        for (int64_t d = 0; d < size; d++) {
            float x = s < seen ? from[d] : 0;
            if (rows)
                rows[s * size + d] = x;
            if (tiles)
                tiles[(s / TILE * size + d) * TILE + s % TILE] = x;
        }
    }
}

/* to: (TILE, size), `count` rows times scale, and zeros. */
static void take(const float *from, int64_t row, int64_t count, int64_t size, float scale, float *to) {
    for (int64_t r = 0; r < TILE; r++)
        for (int64_t d = 0; d < size; d++)
            to[r * size + d] = r < count ? from[r * row + d] * scale : 0;
}

/* Scores of a tile of keys, of which row r sees the first `seen` + r. */
static inline void hide(float *scores, int64_t rows, int64_t seen) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t s = seen + r < 0 ? 0 : seen + r; s < TILE; s++)
            scores[r * TILE + s] = -1e30f;
}

/* A row's scores of one more tile become exponentials; what was summed with another top score before is made less (online softmax; Milakov and
 * Gimelshein 2018). */
static inline void add_tile(float *scores, int first, float *top, vector *total, float *mean, int64_t size) {
    vector tops = load(scores);
    for (int64_t s = LANES; s < TILE; s += LANES)
        tops = greater(tops, load(scores + s));
    float highest = greatest(tops);
    if (first)
        *top = highest;
    else if (highest > *top) {
        float less = expf(*top - highest);
        *top = highest;
        *total *= less;
        for (int64_t d = 0; d < size; d += LANES)
            store(mean + d, load(mean + d) * less);
    }
    float now = *top;
    vector sums = *total;
    for (int64_t s = 0; s < TILE; s += LANES) {
        vector x = exponential(load(scores + s) - now);
        sums += x;
        store(scores + s, x);
    }
    *total = sums;
}

/* One head of one sequence. */
static void causal_one(const Line *line, int64_t task, float *room) {
    int64_t i = task / line->heads, head = task % line->heads, kv = head / (line->heads / line->kv);
    int64_t size = line->size, before = line->before[i], count = line->counts[i], all = rounded(before + count, TILE) * size;
    float *keys = room, *values = keys + all, *query = values + all, *mean = query + TILE * size, *scores = mean + TILE * size;
    gather(line, i, line->keys + kv * line->key_head, line->key_row, 0, keys);
    gather(line, i, line->values + kv * line->value_head, line->value_row, values, 0);
    for (int64_t first = 0; first < count; first += TILE) {
        int64_t rows = least(TILE, count - first), token = line->queries_from[i] + first;
        float tops[TILE];
        vector totals[TILE] = {};
        take(line->queries + head * line->query_head + token * line->query_row, line->query_row, rows, size, line->scale, query);
        memset(mean, 0, TILE * size * sizeof *mean);
        for (int64_t tile = 0; tile < before + first + rows; tile += TILE) {
            product(query, size, 1, keys + tile * size, TILE, size, rounded(rows, ROWS), TILE, 0, scores, TILE);
            hide(scores, rows, before + first + 1 - tile);
            for (int64_t r = 0; r < rows; r++)
                add_tile(scores + r * TILE, !tile, tops + r, totals + r, mean + r * size, size);
            product(scores, TILE, 1, values + tile * size, size, TILE, rounded(rows, ROWS), size, 1, mean, size);
        }
        for (int64_t r = 0; r < rows; r++) {
            float total = sum(totals[r]);
            for (int64_t d = 0; d < size; d += LANES)
                store(line->out + ((token + r) * line->heads + head) * size + d, load(mean + r * size + d) / total);
            line->sums[head * line->tokens + token + r] = tops[r] + logf(total);
        }
    }
}

/* One head of keys of one sequence, with all heads of queries that share it (Dao et al. 2022, "FlashAttention"). */
static void causal_back_one(const Line *line, int64_t task, float *room) {
    int64_t i = task / line->kv, kv = task % line->kv, group = line->heads / line->kv;
    int64_t size = line->size, before = line->before[i], count = line->counts[i], all = rounded(before + count, TILE) * size, few = TILE * size;
    float *keys = room, *key_tiles = keys + all, *value_tiles = key_tiles + all, *of_keys = value_tiles + all, *of_values = of_keys + all;
    float *query = of_values + all, *grad = query + few, *of_query = grad + few, *weights = of_query + few, *of_scores = weights + TILE * TILE;
    gather(line, i, line->keys + kv * line->key_head, line->key_row, keys, key_tiles);
    gather(line, i, line->values + kv * line->value_head, line->value_row, 0, value_tiles);
    memset(of_keys, 0, 2 * all * sizeof *of_keys);
    for (int64_t head = kv * group; head < (kv + 1) * group; head++)
        for (int64_t first = 0; first < count; first += TILE) {
            int64_t rows = least(TILE, count - first), token = line->queries_from[i] + first, out_row = line->heads * size;
            const float *out = line->out + token * out_row + head * size, *sums = line->sums + head * line->tokens + token;
            float means[TILE];
            take(line->queries + head * line->query_head + token * line->query_row, line->query_row, rows, size, line->scale, query);
            take(line->grad + token * out_row + head * size, out_row, rows, size, 1, grad);
            for (int64_t r = 0; r < rows; r++) {
                vector total = {};
                for (int64_t d = 0; d < size; d += LANES)
                    total += load(out + r * out_row + d) * load(grad + r * size + d);
                means[r] = sum(total);
            }
            memset(of_query, 0, few * sizeof *of_query);
            for (int64_t tile = 0; tile < before + first + rows; tile += TILE) {
                product(query, size, 1, key_tiles + tile * size, TILE, size, rounded(rows, ROWS), TILE, 0, weights, TILE);
                product(grad, size, 1, value_tiles + tile * size, TILE, size, rounded(rows, ROWS), TILE, 0, of_scores, TILE);
                hide(weights, rows, before + first + 1 - tile);
                for (int64_t at = 0; at < rows * TILE; at += LANES) {
                    vector weight = exponential(load(weights + at) - sums[at / TILE]);
                    store(weights + at, weight);
                    store(of_scores + at, weight * (load(of_scores + at) - means[at / TILE]));
                }
                product(of_scores, TILE, 1, keys + tile * size, size, TILE, rounded(rows, ROWS), size, 1, of_query, size);
                product(of_scores, 1, TILE, query, size, rows, TILE, size, 1, of_keys + tile * size, size);
                product(weights, 1, TILE, grad, size, rows, TILE, size, 1, of_values + tile * size, size);
            }
            for (int64_t r = 0; r < rows; r++)
                for (int64_t d = 0; d < size; d++)
                    line->of_queries[(token + r) * out_row + head * size + d] = of_query[r * size + d] * line->scale;
        }
    float *common = line->of_common + (2 * i * line->kv + kv) * line->common * size;
    memcpy(common, of_keys, before * size * sizeof *common);
    memcpy(common + line->kv * line->common * size, of_values, before * size * sizeof *common);
    for (int64_t s = 0; s < count; s++) {
        int64_t to = ((line->keys_from[i] + s) * line->kv + kv) * size;
        memcpy(line->of_keys + to, of_keys + (before + s) * size, size * sizeof *of_keys);
        memcpy(line->of_values + to, of_values + (before + s) * size, size * sizeof *of_values);
    }
}

/* Every core takes the next task, with a room of its own. */
static void share_out(const Line *line, int64_t tasks, void one(const Line *, int64_t, float *)) {
    int64_t next = 0;
#pragma omp parallel for schedule(static, 1) num_threads(line->threads)
    for (int64_t thread = 0; thread < line->threads; thread++)
        for (;;) {
            int64_t task;
#pragma omp atomic capture
            task = next++;
            if (task >= tasks)
                break;
            one(line, task, line->rooms + thread * line->room);
        }
}

void causal(const Line *line) { share_out(line, line->sequences * line->heads, causal_one); }

void causal_back(const Line *line) { share_out(line, line->sequences * line->kv, causal_back_one); }
