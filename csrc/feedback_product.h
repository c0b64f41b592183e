/* feedback_product.h - errors times a feedback matrix, added to sums: what the encoders with error feedback share.
 *
 * Rows lie in lanes, PRODUCT_ROWS of them side by side. Every sum is one chain of fused multiply-adds over the errors,
 * in their order, so that neither how columns are cut into blocks nor the instruction set changes a bit of it. What is
 * read of the matrix is copied together before, in the order in which it is met: in panels of at most
 * PRODUCT_COLUMNS columns, one behind the other, each (errors, columns).
 */
#ifndef PLLM_FEEDBACK_PRODUCT_H
#define PLLM_FEEDBACK_PRODUCT_H

#include "kernel.h"

#if defined(PLLM_ISA_AVX512) || defined(PLLM_ISA_NEON)
enum { PRODUCT_VECTORS = 4, PRODUCT_VECTORS_FEW = 4 }; /* with PRODUCT_COLUMNS 24 sums of 32 registers */
#elif defined(PLLM_ISA_AVX2)
enum { PRODUCT_VECTORS = 2, PRODUCT_VECTORS_FEW = 4 }; /* 12 sums of 16 registers */
#else
enum { PRODUCT_VECTORS = 1, PRODUCT_VECTORS_FEW = 1 };
#endif

enum {
    PRODUCT_ROWS = 64,   /* a multiple of every vector */
    PRODUCT_COLUMNS = 6, /* of a panel, whose products are summed side by side with PRODUCT_VECTORS vectors of rows */
    PRODUCT_FEW = 2      /* columns that have PRODUCT_VECTORS_FEW of them: with fewer, sums would wait for each other */
};

/* target (columns, PRODUCT_ROWS) += sum over m of error[m] (PRODUCT_ROWS) panel[m][column], m ascending. */
PLLM_INLINE void product_add_panel(float *target, const float *error, int errors, const float *panel,
                                   const int columns, const int vectors)
{
    for (int r = 0; r < PRODUCT_ROWS; r += vectors * VF_WIDTH) {
        vf sum[PRODUCT_COLUMNS][PRODUCT_VECTORS_FEW];
        PLLM_UNROLL
        for (int c = 0; c < columns; c++) {
            PLLM_UNROLL
            for (int v = 0; v < vectors; v++)
                sum[c][v] = vf_load(target + c * PRODUCT_ROWS + r + v * VF_WIDTH);
        }
        for (int m = 0; m < errors; m++) {
            const float *const e = error + m * PRODUCT_ROWS + r;
            PLLM_UNROLL
            for (int c = 0; c < columns; c++) {
                const vf factor = vf_set1(panel[m * columns + c]);
                PLLM_UNROLL
                for (int v = 0; v < vectors; v++)
                    sum[c][v] = vf_fma(vf_load(e + v * VF_WIDTH), factor, sum[c][v]);
            }
        }
        PLLM_UNROLL
        for (int c = 0; c < columns; c++) {
            PLLM_UNROLL
            for (int v = 0; v < vectors; v++)
                vf_store(target + c * PRODUCT_ROWS + r + v * VF_WIDTH, sum[c][v]);
        }
    }
}

typedef void product_fn(float *target, const float *error, int errors, const float *panel);

/* One copy for each number of columns. */
#define PRODUCT_OF(N) \
    static void product_add_##N(float *target, const float *error, int errors, const float *panel) \
    { \
        product_add_panel(target, error, errors, panel, N, \
                          N <= PRODUCT_FEW ? PRODUCT_VECTORS_FEW : PRODUCT_VECTORS); \
    }
PRODUCT_OF(1) PRODUCT_OF(2) PRODUCT_OF(3) PRODUCT_OF(4) PRODUCT_OF(5) PRODUCT_OF(6)
#undef PRODUCT_OF

/* target (columns, PRODUCT_ROWS) += the errors (errors, PRODUCT_ROWS) times their panels. */
static void product_add(float *target, ptrdiff_t columns, const float *error, int errors, const float *panels)
{
    static product_fn *const add_of[PRODUCT_COLUMNS + 1] = {NULL,          product_add_1, product_add_2, product_add_3,
                                                            product_add_4, product_add_5, product_add_6};
    for (ptrdiff_t c = 0; c < columns; c += PRODUCT_COLUMNS)
        add_of[smaller(columns - c, PRODUCT_COLUMNS)](target + c * PRODUCT_ROWS, error, errors, panels + c * errors);
}

/* Copies the first `columns` floats of `count` rows of the matrix, which are `length` apart, to panel. Returns where
 * they end. */
static inline float *product_pack(float *panel, const float *row, ptrdiff_t count, ptrdiff_t length, ptrdiff_t columns)
{
    for (; count > 0; count--, row += length, panel += columns) {
        if (columns == PRODUCT_COLUMNS) /* a copy of a constant size is no call */
            memcpy(panel, row, PRODUCT_COLUMNS * sizeof *panel);
        else
            memcpy(panel, row, (size_t)columns * sizeof *panel);
    }
    return panel;
}

#endif
