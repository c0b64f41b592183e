/* micro_int16.h - rows of int16 times panels of int16 in a register tile of int32. Included by what multiplies in
 * integers. */
#ifndef PLLM_MICRO_INT16_H
#define PLLM_MICRO_INT16_H

#include "micro.h"

enum { VS_WIDTH = 2 * VF_WIDTH };

/* Where line `line` of a panel that is (k / 2, lines, 2), laid out as vi_dot_pair wants it, has the first or second
 * value of its first pair. */
PLLM_INLINE ptrdiff_t panel_place(ptrdiff_t line, const int which)
{
    return line / VF_WIDTH * VS_WIDTH + VS_PLACE(line % VF_WIDTH, which);
}

/* Gives line `line` of a panel (k / 2, lines, 2) its values x (k). */
static void put_line(const int16_t *x, ptrdiff_t k, ptrdiff_t line, ptrdiff_t lines, int16_t *panel)
{
    int16_t *const first = panel + panel_place(line, 0), *const second = panel + panel_place(line, 1);
    for (ptrdiff_t i = 0; i < k; i += 2) {
        first[i * lines] = x[i];
        second[i * lines] = x[i + 1];
    }
}

/* s (rows, lines) += w (rows, 2) x (lines, 2)'. */
PLLM_INLINE void add_pairs(int rows, int vectors, const int16_t *w, ptrdiff_t w_stride, const int16_t *x,
                           vi s[][MICRO_VECTORS])
{
    vs xs[MICRO_VECTORS];
    for (int v = 0; v < vectors; v++)
        xs[v] = vs_load(x + v * VS_WIDTH);
    PLLM_UNROLL
    for (int r = 0; r < rows; r++) {
        const vs_pair pair = vs_load_pair(w + r * w_stride);
        for (int v = 0; v < vectors; v++)
            s[r][v] = vi_dot_pair(s[r][v], xs[v], pair);
    }
}

/* s (rows, lines) = w (rows, k) x (k / 2, lines, 2). k: a multiple of 4. Rows of w are w_stride apart, and in each the
 * pairs of values pair_stride. */
PLLM_INLINE void micro_sums(int rows, int vectors, const int16_t *w, ptrdiff_t w_stride, ptrdiff_t pair_stride,
                            const int16_t *x, ptrdiff_t k, vi s[][MICRO_VECTORS])
{
    const int pair_lines = 2 * vectors * VF_WIDTH;
    PLLM_UNROLL
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++)
            s[r][v] = vi_set1(0);
    for (ptrdiff_t i = 0; i < k; i += 4, w += 2 * pair_stride, x += 2 * pair_lines) {
        add_pairs(rows, vectors, w, w_stride, x, s);
        add_pairs(rows, vectors, w + pair_stride, w_stride, x + pair_lines, s);
    }
}

#endif
