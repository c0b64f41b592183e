/* pllm.h - the whole C API of pocketllm's kernels. No Python in here.
 *
 * How it fits together: every kernel body (search.c, pack.c, ...) is compiled once per instruction
 * set; isa_table.c collects the functions of one instruction set in a pllm_kernels table; cpu.c
 * finds out what the processor and the operating system can run and picks a table, once, visibly.
 *
 * To add a kernel: declare its type `pllm_<name>_fn` with its contract in the section of its
 * family below, name it in the family's list, and define `PLLM_SYM(pllm_<name>)` in the body.
 *
 * Conventions: matrices are row-major and dense; sizes are ptrdiff_t or int and never negative;
 * pointers of empty arrays may be NULL; nothing aliases unless a contract says so; `threads` >= 1 is
 * the number of OpenMP threads to use, and no result depends on it, nor on the instruction set.
 * Arguments are checked by the caller (module_*.c): kernels only assert.
 */
#ifndef PLLM_H
#define PLLM_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What kernels that can fail return. */
enum pllm_status {
    PLLM_OK = 0,
    PLLM_ENOMEM = 1 /* scratch memory could not be allocated; outputs are undefined */
};

enum { PLLM_MAX_THREADS = 1024 };

/* ---- search (search.c) ----------------------------------------------------------------------- */

enum {
    PLLM_MAX_SUBVECTOR = 16,    /* d is 1..16 */
    PLLM_MAX_CODEWORDS = 65536, /* K is 1..65536 */
    PLLM_CODEBOOK_BLOCK = 32,   /* codewords per block of a prepared codebook */
    PLLM_SEARCH_QUERIES = 512   /* queries per pass over a prepared codebook */
};

/* A codebook laid out for the search. Fill it with codebook_prepare or codebook_prepare_score; it
 * borrows every pointer, so nothing has to be released.
 * blocks: (ceil(k / 32), d + 1, 32) f32. Of one codeword: its offset, then its negated, weighted
 * coordinates. The score of codeword i for a query x is the fused chain
 *     s = offset[i];  s = fma(x[0], -w[0] c[i][0], s);  ...;  s = fma(x[d-1], -w[d-1] c[i][d-1], s)
 * in this order on every instruction set, so that equal inputs give equal bits. */
typedef struct {
    int d;
    int k;
    const float *codebook; /* (k, d) */
    const float *weight;   /* (d) or NULL = all ones */
    const float *bias;     /* (k) or NULL = all zeros */
    float *blocks;
} pllm_codebook;

/* Number of floats `blocks` must hold for k codewords of length d. */
static inline size_t pllm_codebook_floats(int k, int d)
{
    size_t blocks = ((size_t)k + PLLM_CODEBOOK_BLOCK - 1) / PLLM_CODEBOOK_BLOCK;
    return blocks * PLLM_CODEBOOK_BLOCK * ((size_t)d + 1);
}

/* Number of floats of scratch that one call of search_slice needs (each thread its own). */
static inline size_t pllm_search_scratch_floats(int d)
{
    return PLLM_SEARCH_QUERIES * ((size_t)d + 2);
}

/* Prepares cb so that the smallest score is the smallest sum_j w[j] (z[j] - c[j])^2 + bias.
 * codebook: (k, d).  weight: (d) or NULL.  bias: (k) or NULL.  blocks: pllm_codebook_floats(k, d). */
typedef void pllm_codebook_prepare_fn(pllm_codebook *cb, const float *codebook, int k, int d,
                                      const float *weight, const float *bias, float *blocks);

/* Prepares cb so that the smallest score is the smallest offset[i] - sum_j x[j] codebook[i][j]:
 * for metrics that are not diagonal (x = H z, offset[i] = c_i' H c_i / 2). search_slice must then be
 * called without `error`.  codebook: (k, d).  offset: (k). */
typedef void pllm_codebook_prepare_score_fn(pllm_codebook *cb, const float *codebook, int k, int d,
                                            const float *offset, float *blocks);

/* index[i] = codeword of the smallest score for z[i]; lowest index on ties. One thread, allocates
 * nothing: made to be called from inside a parallel loop on a slice of the queries.
 * A query for which no score is a number below +inf (NaN or Inf in it) gets some index in 0..k-1.
 * z: (n, d).  index: (n).  error: (n) or NULL, gets sum_j w (z - c)^2 + bias computed from the
 * difference, j ascending.  scratch: pllm_search_scratch_floats(d). */
typedef void pllm_search_slice_fn(const pllm_codebook *cb, const float *z, ptrdiff_t n,
                                  int32_t *index, float *error, float *scratch);

/* index[i] = nearest codeword to z[i] by weighted L2 plus bias; lowest index on ties; NaN and Inf as
 * in search_slice. Scores are float32, so two codewords whose distances differ by less than the
 * rounding of |z| |c| count as tied or may swap.
 * z: (n, d).  codebook: (k, d).  weight: (d) or NULL.  bias: (k) or NULL.  index: (n).
 * error: (n) or NULL, as in search_slice.  Returns PLLM_OK or PLLM_ENOMEM. */
typedef int pllm_nearest_fn(const float *z, ptrdiff_t n, const float *codebook, int k, int d,
                            const float *weight, const float *bias, int32_t *index, float *error,
                            int threads);

#define PLLM_SEARCH_KERNELS(X) \
    X(codebook_prepare) X(codebook_prepare_score) X(search_slice) X(nearest)

/* ---- pack (pack.c) --------------------------------------------------------------------------- */

#define PLLM_PACK_KERNELS(X)

/* ---- inference (infer.c) --------------------------------------------------------------------- */

#define PLLM_INFER_KERNELS(X)

/* ---- training (mlp.c, train.c) --------------------------------------------------------------- */

#define PLLM_TRAIN_KERNELS(X)

/* ---- feedback (feedback.c) ------------------------------------------------------------------- */

#define PLLM_FEEDBACK_KERNELS(X)

/* ---- choice of the instruction set (isa_table.c, cpu.c) -------------------------------------- */

#define PLLM_ALL_KERNELS(X) \
    PLLM_SEARCH_KERNELS(X) \
    PLLM_PACK_KERNELS(X) \
    PLLM_INFER_KERNELS(X) \
    PLLM_TRAIN_KERNELS(X) \
    PLLM_FEEDBACK_KERNELS(X)

/* All kernels of one instruction set. */
typedef struct {
    const char *isa; /* "scalar", "avx2", "avx512" or "neon" */
    int lanes;       /* floats per vector */
#define PLLM_MEMBER(name) pllm_##name##_fn *name;
    PLLM_ALL_KERNELS(PLLM_MEMBER)
#undef PLLM_MEMBER
} pllm_kernels;

/* Number of instruction sets compiled in, and the i-th of them, best last; NULL when this machine
 * cannot run it. */
int pllm_isa_count(void);
const pllm_kernels *pllm_isa_at(int i);
/* Name of the i-th instruction set, runnable or not. */
const char *pllm_isa_name_at(int i);

/* The table in use. Before pllm_select has been called: the best that this machine runs. */
const pllm_kernels *pllm_active(void);

/* Makes the named instruction set the one in use. Returns 0, or -1 (and changes nothing) when it is
 * unknown or this machine cannot run it. */
int pllm_select(const char *isa);

#ifdef __cplusplus
}
#endif
#endif
