/* infer_gemm.h - decoded rows times activations: dot products for a few tokens, register tiles for
 * many. Included by infer.c only.
 *
 * Every product is accumulated in one fixed order that depends on its position in the row alone:
 * so no result depends on the instruction set, the thread count or how rows fall into tiles. */
#ifndef PLLM_INFER_GEMM_H
#define PLLM_INFER_GEMM_H

#include "infer_panels.h"

/* ---- a few tokens: sixteen partial sums per (row, token), positions mod 16 ------------------- */

enum { DOT_ROWS = 4, DOT_TOKENS = 4 /* the most tokens handled this way */ };

/* sum (rows, tokens, 16) += w (rows, k) * x (tokens, k), position by position mod 16.
 * k: multiple of 16. The row and token counts are compile-time constants. */
PLLM_INLINE void dot_tile(int rows, int tokens, const float *w, ptrdiff_t w_stride, const float *x,
                          ptrdiff_t x_stride, ptrdiff_t k, float *sum, ptrdiff_t sum_stride)
{
    vf16 s[DOT_ROWS][2];
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++)
            s[r][t] = vf16_load(sum + r * sum_stride + t * 16);
    for (ptrdiff_t i = 0; i < k; i += 16) {
        vf16 xs[2];
        for (int t = 0; t < tokens; t++)
            xs[t] = vf16_load(x + t * x_stride + i);
        for (int r = 0; r < rows; r++) {
            const vf16 ws = vf16_load(w + r * w_stride + i);
            for (int t = 0; t < tokens; t++)
                s[r][t] = vf16_fma(ws, xs[t], s[r][t]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++)
            vf16_store(sum + r * sum_stride + t * 16, s[r][t]);
}

/* sum (DOT_ROWS, tokens, 16) += w (DOT_ROWS, k) * x (tokens, k). */
static void dot_rows(const float *w, ptrdiff_t w_stride, const float *x, ptrdiff_t x_stride,
                     ptrdiff_t k, float *sum, int tokens)
{
    const ptrdiff_t stride = tokens * 16;
    int t = 0;
    for (; t + 2 <= tokens; t += 2)
        for (int r = 0; r < DOT_ROWS; r += 2)
            dot_tile(2, 2, w + r * w_stride, w_stride, x + t * x_stride, x_stride, k,
                     sum + r * stride + t * 16, stride);
    if (t < tokens)
        dot_tile(DOT_ROWS, 1, w, w_stride, x + t * x_stride, x_stride, k, sum + t * 16, stride);
}

/* ---- many tokens: panels of tokens in lanes, one chain of fma per product -------------------- */

/* c (rows, tokens) += w (rows, k) * x (k, tokens), k ascending, one fma each. */
PLLM_INLINE void micro_tile(int rows, int vectors, const float *w, ptrdiff_t w_stride,
                            const float *x, ptrdiff_t k, float *c)
{
    vf s[2 * MICRO_ROWS][MICRO_VECTORS];
    const int tokens = vectors * VF_WIDTH;
    PLLM_UNROLL
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++)
            s[r][v] = vf_load(c + r * tokens + v * VF_WIDTH);
    for (ptrdiff_t i = 0; i < k; i++, x += tokens) {
        vf xs[MICRO_VECTORS];
        PLLM_UNROLL
        for (int v = 0; v < vectors; v++)
            xs[v] = vf_load(x + v * VF_WIDTH);
        PLLM_UNROLL
        for (int r = 0; r < rows; r++) {
            const vf ws = vf_set1(w[r * w_stride + i]);
            for (int v = 0; v < vectors; v++)
                s[r][v] = vf_fma(ws, xs[v], s[r][v]);
        }
    }
    PLLM_UNROLL
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++)
            vf_store(c + r * tokens + v * VF_WIDTH, s[r][v]);
}

static void micro_wide(const float *w, ptrdiff_t w_stride, const float *x, ptrdiff_t k, float *c)
{
    micro_tile(MICRO_ROWS, MICRO_VECTORS, w, w_stride, x, k, c);
}

static void micro_narrow(const float *w, ptrdiff_t w_stride, const float *x, ptrdiff_t k, float *c)
{
    micro_tile(2 * MICRO_ROWS, MICRO_VECTORS / 2, w, w_stride, x, k, c);
}

/* target (length, width of panel i) = the panel's tokens, transposed, with zeros behind the columns and for missing
 * tokens. */
static void pack_panel(const pllm_product *o, const panels *p, ptrdiff_t i, ptrdiff_t length, float *target)
{
    const ptrdiff_t width = panel_width(p, i), first = i * WIDE, real = panel_tokens(p, i);
    const ptrdiff_t columns = o->w->in_features;
    if (real < width || columns < length)
        memset(target, 0, (size_t)(width * length) * sizeof(float));
    for (ptrdiff_t begin = 0; begin < columns; begin += 16) {
        const ptrdiff_t end = begin + 16 < columns ? begin + 16 : columns;
        for (ptrdiff_t t = 0; t < real; t++) {
            float buffer[16];
            const float *const source = stored_input(o, first + t, begin, end - begin, buffer);
            for (ptrdiff_t k = begin; k < end; k++)
                target[k * width + t] = source[k - begin];
        }
    }
}

/* c += w (TILE_ROWS, k) * panel (k, width). c is (TILE_ROWS, width) in pieces of one micro tile. */
static void multiply_panel(const float *w, ptrdiff_t w_stride, ptrdiff_t rows, const float *panel,
                           ptrdiff_t width, ptrdiff_t k, float *c)
{
    if (width == WIDE)
        for (ptrdiff_t r = 0; r < rows; r += MICRO_ROWS)
            micro_wide(w + r * w_stride, w_stride, panel, k, c + r * width);
    else
        for (ptrdiff_t r = 0; r < rows; r += 2 * MICRO_ROWS)
            micro_narrow(w + r * w_stride, w_stride, panel, k, c + r * width);
}

#endif
