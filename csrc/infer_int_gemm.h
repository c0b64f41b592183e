/* infer_int_gemm.h - decoded rows of int16 times activations of int16, exact in int32: dot products for
 * a few tokens, register tiles for many. Included by infer_int.c only. */
#ifndef PLLM_INFER_INT_GEMM_H
#define PLLM_INFER_INT_GEMM_H

#include "infer_panels.h"
#include "micro_int16.h"

enum {
    DOT_ROWS = 4,  /* sums in registers, few tokens: rows */
    DOT_TOKENS = 2 /* times tokens */
};

/* ---- a few tokens ---------------------------------------------------------------------------- */

/* dot (tokens, rows) += scale (tokens, spans) * w (DOT_ROWS, width) x (tokens, spans, width)', each of the first
 * span. tokens: 1 or 2, a constant. */
PLLM_INLINE void dot_tile(int tokens, const int16_t *w, ptrdiff_t width, const int16_t *x, const float *scale,
                          ptrdiff_t spans, float *dot, ptrdiff_t rows)
{
    vi s[DOT_TOKENS][DOT_ROWS];
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < DOT_ROWS; r++)
            s[t][r] = vi_set1(0);
    for (ptrdiff_t i = 0; i < width; i += VS_WIDTH) {
        vs xs[DOT_TOKENS];
        for (int t = 0; t < tokens; t++)
            xs[t] = vs_load(x + t * spans * width + i);
        PLLM_UNROLL
        for (int r = 0; r < DOT_ROWS; r++) {
            const vs ws = vs_load(w + r * width + i);
            for (int t = 0; t < tokens; t++)
                s[t][r] = vi_dot(s[t][r], ws, xs[t]);
        }
    }
    for (int t = 0; t < tokens; t++) {
        int32_t sum[DOT_ROWS];
        vi_sum4(sum, s[t][0], s[t][1], s[t][2], s[t][3]);
        for (int r = 0; r < DOT_ROWS; r++)
            dot[t * rows + r] = fmaf(scale[t * spans], (float)sum[r], dot[t * rows + r]);
    }
}

/* The same for any numbers of rows, a multiple of DOT_ROWS, and of tokens. */
static void multiply_few(const int16_t *w, ptrdiff_t rows, ptrdiff_t width, const int16_t *x, ptrdiff_t tokens,
                         const float *scale, ptrdiff_t spans, float *dot)
{
    for (ptrdiff_t r = 0; r < rows; r += DOT_ROWS)
        for (ptrdiff_t t = 0; t < tokens; t += DOT_TOKENS) {
            const int16_t *const rows_w = w + r * width, *const tokens_x = x + t * spans * width;
            if (t + 1 < tokens)
                dot_tile(2, rows_w, width, tokens_x, scale + t * spans, spans, dot + t * rows + r, rows);
            else
                dot_tile(1, rows_w, width, tokens_x, scale + t * spans, spans, dot + t * rows + r, rows);
        }
}

/* ---- many tokens: two values of each token in each lane --------------------------------------- */

/* dot (rows, tokens) += scale (tokens) * w (rows, k) x (k / 2, tokens, 2). k: a multiple of 4. */
PLLM_INLINE void micro_tile(int rows, int vectors, const int16_t *w, ptrdiff_t w_stride, const int16_t *x,
                            ptrdiff_t k, const float *scale, float *dot)
{
    vi s[MICRO_ROWS][MICRO_VECTORS];
    const int tokens = vectors * VF_WIDTH;
    micro_sums(rows, vectors, w, w_stride, 2, x, k, s);
    PLLM_UNROLL
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) {
            float *const target = dot + r * tokens + v * VF_WIDTH;
            vf_store(target, vf_fma(vf_load(scale + v * VF_WIDTH), vf_from_i(s[r][v]), vf_load(target)));
        }
}

static void micro_wide(const int16_t *w, ptrdiff_t w_stride, const int16_t *x, ptrdiff_t k, const float *scale,
                       float *dot)
{
    micro_tile(MICRO_ROWS, MICRO_VECTORS, w, w_stride, x, k, scale, dot);
}

static void micro_narrow(const int16_t *w, ptrdiff_t w_stride, const int16_t *x, ptrdiff_t k,
                         const float *scale, float *dot)
{
    micro_tile(MICRO_ROWS, MICRO_VECTORS / 2, w, w_stride, x, k, scale, dot);
}

/* dot (rows, tokens) += scale (tokens) * w (rows, width) x (width / 2, tokens, 2).
 * rows: a multiple of MICRO_ROWS.  tokens: WIDE or NARROW. */
static void multiply_panel(const int16_t *w, ptrdiff_t rows, const int16_t *x, ptrdiff_t tokens,
                           ptrdiff_t width, const float *scale, float *dot)
{
    for (ptrdiff_t r = 0; r < rows; r += MICRO_ROWS)
        if (tokens == WIDE)
            micro_wide(w + r * width, width, x, width, scale, dot + r * tokens);
        else
            micro_narrow(w + r * width, width, x, width, scale, dot + r * tokens);
}

#endif
