/* What a layer computes for every number of every token, each in one pass over memory (agent/fused.py). Rows of `size` numbers, a multiple of LANES;
 * those of inputs that may be part of a wider matrix lie *_row apart. */

#include "vectors.h"

#include <math.h>

/* RMSNorm (Zhang and Sennrich 2019): out = x / sqrt(mean(x^2) + epsilon) * weight. inverse: (rows), 1 / that root. */
void norm(const float *x, const float *weight, float epsilon, int64_t rows, int64_t size, int64_t threads, float *inverse, float *out) {
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < rows; r++) {
        vector squares = {};
        for (int64_t i = r * size; i < (r + 1) * size; i += LANES)
            squares += load(x + i) * load(x + i);
        inverse[r] = 1 / sqrtf(sum(squares) / size + epsilon);
        for (int64_t i = 0; i < size; i += LANES)
            store(out + r * size + i, load(x + r * size + i) * inverse[r] * load(weight + i));
    }
}

void norm_back(const float *x, const float *weight, const float *inverse, const float *grad, int64_t rows, int64_t size, int64_t threads, float *of_x) {
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < rows; r++) {
        vector along = {};
        for (int64_t i = 0; i < size; i += LANES)
            along += load(grad + r * size + i) * load(weight + i) * load(x + r * size + i);
        float less = sum(along) * inverse[r] * inverse[r] / size;
        for (int64_t i = 0; i < size; i += LANES)
            store(of_x + r * size + i, (load(grad + r * size + i) * load(weight + i) - load(x + r * size + i) * less) * inverse[r]);
    }
}

/* 1 / (1 + exp(-x)) */
static inline vector sigmoid(vector x) { return 1 / (1 + exponential(-greater(x, (vector){} - 87.f))); }

/* SwiGLU (Shazeer 2020): out = gate * sigmoid(gate) * up. */
void gated(const float *gate, int64_t gate_row, const float *up, int64_t up_row, int64_t rows, int64_t size, int64_t threads, float *out) {
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < size; i += LANES) {
            vector x = load(gate + r * gate_row + i);
            store(out + r * size + i, x * sigmoid(x) * load(up + r * up_row + i));
        }
}

void gated_back(const float *gate, int64_t gate_row, const float *up, int64_t up_row, const float *grad, int64_t rows, int64_t size, int64_t threads,
                float *of_gate, float *of_up) {
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < size; i += LANES) {
            vector x = load(gate + r * gate_row + i), open = sigmoid(x), given = load(grad + r * size + i);
            store(of_up + r * size + i, given * x * open);
            store(of_gate + r * size + i, given * load(up + r * up_row + i) * open * (1 + x * (1 - open)));
        }
}

/* Rotary position embedding (Su et al. 2021): out = x cos + (minus x's second half, its first half) sin, or, for its gradient, what sine is times as
 * sin is negative. x: rows of heads, (heads, size); cos, sin: (rows, size), the same in both halves. */
void rotate(const float *x, int64_t x_row, const float *cos, const float *sin, int64_t rows, int64_t heads, int64_t size, float direction,
            int64_t threads, float *out) {
    int64_t half = size / 2;
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t head = 0; head < heads; head++) {
            const float *from = x + r * x_row + head * size;
            float *to = out + (r * heads + head) * size;
            for (int64_t i = 0; i < half; i += LANES) {
                vector first = load(from + i), second = load(from + half + i), c = load(cos + r * size + i), s = load(sin + r * size + i) * direction;
                store(to + i, first * c - second * s);
                store(to + half + i, second * c + first * s);
            }
        }
}
