/* infer.h - what the two ways to multiply with a compressed matrix share. Included by infer.c and
 * infer_int.c only. */
#ifndef PLLM_INFER_H
#define PLLM_INFER_H

#include "kernel.h"

enum { WORK_PER_THREAD = 32768 };

static inline ptrdiff_t round_up(ptrdiff_t n, ptrdiff_t step) { return (n + step - 1) / step * step; }
static inline ptrdiff_t smaller(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }

/* One element of the product, from the dot product of the row's table values with the token. */
static inline float finish_product(const pllm_matrix *w, ptrdiff_t row, float factor, float dot,
                                   float x_sum, float bias)
{
    const float scaled = w->scale[row] * factor * dot;
    return (w->shift ? scaled + w->shift[row] * x_sum : scaled) + bias;
}

/* x_sum[t] = sum of token t's values; zeros without a row shift, which alone needs it. */
static inline void sum_tokens(const pllm_matrix *w, const float *x, ptrdiff_t n, float *x_sum)
{
    for (ptrdiff_t t = 0; t < n; t++) {
        double sum = 0.0;
        for (ptrdiff_t k = 0; w->shift && k < w->in_features; k++)
            sum += (double)x[t * w->in_features + k];
        x_sum[t] = (float)sum;
    }
}

/* The product with activations as integers (infer_int.c). The table must be int8 and without decoder.
 * in_tiles: whether the tile registers of AMX may be used, where the instruction set knows them. */
int PLLM_SYM(infer_multiply_integer)(const pllm_matrix *w, const float *x, ptrdiff_t n,
                                     const float *bias, float *y, int in_tiles, int threads);

#endif
