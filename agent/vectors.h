/* Float32 numbers by the vector; GCC and Clang make of it what the machine has. */

#ifndef VECTORS_H
#define VECTORS_H

#include <stdint.h>

#ifdef __AVX512F__
enum { LANES = 16 };
#else
enum { LANES = 8 };
#endif
typedef float vector __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t integers __attribute__((vector_size(4 * LANES), aligned(4)));

static inline vector load(const float *at) { return *(const vector *)at; }

static inline void store(float *at, vector x) { *(vector *)at = x; }

static inline vector greater(vector a, vector b) {
    integers first = a > b;
    return (vector)((first & (integers)a) | (~first & (integers)b));
}

/* Of all numbers of a vector; by halves, as one after the other every number would wait for the last. */
static inline float greatest(vector x) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++)
            x[i] = x[i + half] > x[i] ? x[i + half] : x[i];
    return x[0];
}

static inline float sum(vector x) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++)
            x[i] += x[i + half];
    return x[0];
}

/* exp(x) for x up to 87, to 7e-7 of it from -10 to 0 and to 4e-6 elsewhere, and nothing below -88: 2^n by the bits of a float, 2^f for |f| <= 1/2
 * by its Taylor series. */
static inline vector exponential(vector x) {
    x = greater(x * 1.44269504f, (vector){} - 127.f);
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

#endif
