/* infer.h - what the two ways to multiply with a compressed matrix share, and the decoder layer that multiplies with
 * several. Included by infer.c, infer_int.c and layer.c only. */
#ifndef PLLM_INFER_H
#define PLLM_INFER_H

#include "kernel.h"

enum {
    WORK_PER_THREAD = 32768,
    INFER_TOGETHER = 3 /* the most matrices whose products are taken together */
};

/* y (n, out_features) = x (n, in_features) W' + bias, and what x and y are stored as. */
typedef struct {
    const pllm_matrix *w;
    const void *x;
    ptrdiff_t n;
    const float *bias; /* (out_features) or NULL */
    void *y;
    enum pllm_number number;
} pllm_product;

/* `count` values of a token from a column on: where they are, or widened into buffer. */
static inline const float *input_of(const pllm_product *p, ptrdiff_t token, ptrdiff_t column, ptrdiff_t count,
                                    float *buffer)
{
    const ptrdiff_t at = token * p->w->in_features + column;
    if (p->number == PLLM_FLOAT32)
        return (const float *)p->x + at;
    PLLM_SYM(pllm_widen)((const uint16_t *)p->x + at, count, buffer);
    return buffer;
}

/* The same of the columns that are stored from `first` on, times their factors. */
static inline const float *stored_input(const pllm_product *p, ptrdiff_t token, ptrdiff_t first, ptrdiff_t count,
                                        float *buffer)
{
    const pllm_trellis *const code = p->w->codec->trellis;
    if (!code || !(code->order || code->factor))
        return input_of(p, token, first, count, buffer);
    for (ptrdiff_t i = 0; i < count; i++) {
        float value;
        const float x = *input_of(p, token, code->order ? code->order[first + i] : first + i, 1, &value);
        buffer[i] = code->factor ? x * code->factor[first + i] : x;
    }
    return buffer;
}

/* `count` values of a token's product from a row on. */
static inline void put_output(const pllm_product *p, ptrdiff_t token, ptrdiff_t row, ptrdiff_t count,
                              const float *values)
{
    const ptrdiff_t at = token * p->w->out_features + row;
    if (p->number == PLLM_FLOAT32)
        memcpy((float *)p->y + at, values, (size_t)count * sizeof *values);
    else
        PLLM_SYM(pllm_narrow)(values, count, (uint16_t *)p->y + at);
}

/* One element of the product, from the dot product of the row's table values with the token. */
static inline float finish_product(const pllm_matrix *w, ptrdiff_t row, float factor, float dot,
                                   float x_sum, float bias)
{
    const float scaled = w->scale[row] * factor * dot;
    return (w->shift ? scaled + w->shift[row] * x_sum : scaled) + bias;
}

/* x_sum[t] = sum of token t's values; zeros without a row shift, which alone needs it. */
static inline void sum_tokens(const pllm_product *p, float *x_sum, int threads)
{
    enum { PART = 512 };
    const ptrdiff_t columns = p->w->shift ? p->w->in_features : 0;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && columns > 0)
    for (ptrdiff_t t = 0; t < p->n; t++) {
        double sum = 0.0;
        float buffer[PART];
        for (ptrdiff_t k = 0; k < columns; k += PART) {
            const ptrdiff_t part = smaller(PART, columns - k);
            const float *const x = input_of(p, t, k, part, buffer);
            for (ptrdiff_t i = 0; i < part; i++)
                sum += (double)x[i];
        }
        x_sum[t] = (float)sum;
    }
}

/* Up to INFER_TOGETHER products with activations as integers (infer_int.c); those of single tokens are one parallel loop.
 * Tables must be int8 and without decoder. in_tiles: whether the tile registers of AMX may be used, where the
 * instruction set knows them. */
int PLLM_SYM(infer_multiply_integer)(const pllm_product *p, int count, int in_tiles, int threads);

/* Several products, in whatever form (infer.c). */
int PLLM_SYM(infer_multiply)(const pllm_product *p, int count, enum pllm_activations activations, int threads);

#endif
