/* infer_panels.h - many tokens as panels: some in the lanes of a few vectors, and rows of the matrix broadcast
 * to them. Included by infer.c and infer_int.c, which multiply in float32 and in integers. */
#ifndef PLLM_INFER_PANELS_H
#define PLLM_INFER_PANELS_H

#include "infer.h"
#include "micro.h"

/* A tile is MICRO_ROWS rows times WIDE tokens, and for what is left over (or few tokens) half the tokens, times twice the
 * rows in float32, whose sums each wait for the one before. */
enum {
    NARROW = WIDE / 2, /* tokens of the last panel, when that is enough */
    TILE_ROWS = 48     /* rows decoded at a time; a multiple of 2 MICRO_ROWS */
};

/* Tokens as panels: full ones of WIDE tokens, then one of WIDE or NARROW for the rest. */
typedef struct {
    ptrdiff_t tokens; /* n */
    ptrdiff_t count;  /* panels */
    ptrdiff_t width;  /* sum of the panels' widths */
} panels;

static panels panels_for(ptrdiff_t n)
{
    const ptrdiff_t rest = n % WIDE;
    const ptrdiff_t last = rest == 0 ? 0 : rest <= NARROW ? NARROW : WIDE;
    return (panels){n, n / WIDE + (last > 0), n - rest + last};
}

static ptrdiff_t panel_width(const panels *p, ptrdiff_t i)
{
    return i + 1 < p->count ? WIDE : p->width - i * WIDE;
}

/* Tokens of a panel, without what it is filled up with. */
static ptrdiff_t panel_tokens(const panels *p, ptrdiff_t i)
{
    return smaller(p->tokens - i * WIDE, panel_width(p, i));
}

/* dot (width) = finish_product's of a row and as many tokens.  x_sum: (width).  width: whole vectors. */
static inline void finish_tokens(const pllm_matrix *w, float factor, ptrdiff_t row, ptrdiff_t width,
                                 const float *x_sum, const float *bias, float *dot)
{
    const vf scale = vf_set1(w->scale[row] * factor);
    const vf shift = vf_set1(w->shift ? w->shift[row] : 0.0f);
    const vf added = vf_set1(bias ? bias[row] : 0.0f);
    for (ptrdiff_t t = 0; t < width; t += VF_WIDTH) {
        vf here = vf_mul(scale, vf_load(dot + t));
        if (w->shift)
            here = vf_add(here, vf_mul(shift, vf_load(x_sum + t)));
        vf_store(dot + t, vf_add(here, added));
    }
}

/* The product of `rows` rows, at most TILE_ROWS, from `first` on and the tokens of the panels begin..end.
 * dot: finish_product's for each panel (tile_rows, its width); overwritten.  x_sum: (width of all panels). */
static void finish_panels(const pllm_product *o, float factor, ptrdiff_t first, ptrdiff_t rows,
                          const panels *p, ptrdiff_t begin, ptrdiff_t end, ptrdiff_t tile_rows, float *dot,
                          const float *x_sum)
{
    float of_token[TILE_ROWS];
    for (ptrdiff_t i = begin; i < end; i++) {
        const ptrdiff_t width = panel_width(p, i), tokens = panel_tokens(p, i);
        for (ptrdiff_t r = 0; r < rows; r++)
            finish_tokens(o->w, factor, first + r, width, x_sum + i * WIDE, o->bias, dot + r * width);
        for (ptrdiff_t t = 0; t < tokens; t++) {
            for (ptrdiff_t r = 0; r < rows; r++)
                of_token[r] = dot[r * width + t];
            put_output(o, i * WIDE + t, first, rows, of_token);
        }
        dot += tile_rows * width;
    }
}

#endif
