/* search.c - exact nearest codeword by a scan over all, or by a tree where that is quicker (tree.h).
 * Compiled once per instruction set.
 *
 * The scan: queries lie in the lanes, codewords are broadcast. A tile of CODEWORDS x VECTORS scores
 * stays in registers while the d fused multiply-adds run, so that loads never bind. Only the smallest
 * score of each block of 32 codewords is kept on the way; the winning block is scored again at the end
 * for its lowest index.
 */
#include "tree.h"

#include <assert.h>
#include <omp.h>

#if defined(PLLM_ISA_AVX512) || defined(PLLM_ISA_NEON)
enum { VECTORS = 4, CODEWORDS = 4 }; /* 16 accumulators of 32 registers */
#elif defined(PLLM_ISA_AVX2)
enum { VECTORS = 2, CODEWORDS = 4 }; /* 8 accumulators of 16 registers */
#else
enum { VECTORS = 1, CODEWORDS = 4 };
#endif

enum {
    BLOCK = PLLM_CODEBOOK_BLOCK,
    GROUP = VECTORS * VF_WIDTH,    /* queries per group: what the inner kernel works on */
    MAX_GROUP = 64,                /* the largest GROUP */
    QUERIES = PLLM_SEARCH_QUERIES, /* per pass over the codebook; a multiple of every GROUP */
    TILE_BYTES = 1 << 17           /* part of the codebook that stays in L2 while QUERIES pass */
};

/* Queries of one pass, and the best block so far of each. */
typedef struct {
    float *lanes;   /* (QUERIES / GROUP, d, GROUP) */
    float *best;    /* (QUERIES) smallest score */
    int32_t *block; /* (QUERIES) block it was found in */
} pass;

void PLLM_SYM(pllm_codebook_prepare_score)(pllm_codebook *cb, const float *codebook, int k, int d,
                                           const float *offset, float *blocks)
{
    *cb = (pllm_codebook){.d = d, .k = k, .codebook = codebook, .blocks = blocks};
    for (int i = 0; i < (k + BLOCK - 1) / BLOCK * BLOCK; i++) {
        float *to = blocks + (size_t)(i / BLOCK) * (size_t)(d + 1) * BLOCK + i % BLOCK;
        to[0] = i < k ? offset[i] : INFINITY; /* padding is never below a score that is a number */
        for (int j = 0; j < d; j++)
            to[(j + 1) * BLOCK] = i < k ? -codebook[(size_t)i * (size_t)d + (size_t)j] : 0.0f;
    }
}

void PLLM_SYM(pllm_codebook_prepare)(pllm_codebook *cb, const float *codebook, int k, int d,
                                     const float *weight, const float *bias, float *blocks)
{
    *cb = (pllm_codebook){d, k, codebook, weight, bias, blocks};
    for (int i = 0; i < (k + BLOCK - 1) / BLOCK * BLOCK; i++) {
        const float *c = codebook + (size_t)i * (size_t)d;
        float *to = blocks + (size_t)(i / BLOCK) * (size_t)(d + 1) * BLOCK + i % BLOCK;
        float twice = i < k && bias ? bias[i] : 0.0f;
        for (int j = 0; j < d; j++) {
            float weighted = i >= k ? 0.0f : weight ? weight[j] * c[j] : c[j];
            to[(j + 1) * BLOCK] = -weighted;
            if (i < k)
                twice = fmaf(weighted, c[j], twice);
        }
        to[0] = i < k ? 0.5f * twice : INFINITY;
    }
}

/* Brings n <= QUERIES queries into lanes; the last group is filled up with the last query. */
PLLM_INLINE void load_queries(pass *p, const float *z, int n, int d)
{
    const int padded = (n + GROUP - 1) / GROUP * GROUP, whole = n / GROUP * GROUP;
    for (int i = 0; i < whole; i += GROUP) /* what compilers turn into permutations */
        for (int j = 0; j < d; j++)
            for (int lane = 0; lane < GROUP; lane++)
                p->lanes[i * d + j * GROUP + lane] = z[(i + lane) * d + j];
    for (int i = whole; i < padded; i++) {
        const float *from = z + (i < n ? i : n - 1) * d;
        for (int j = 0; j < d; j++)
            p->lanes[whole * d + j * GROUP + i % GROUP] = from[j];
    }
    for (int i = 0; i < padded; i++) {
        p->best[i] = INFINITY;
        p->block[i] = 0;
    }
}

/* One group of queries against blocks first..last-1. */
PLLM_INLINE void scan_group(const float *x, const float *blocks, int first, int last, float *best,
                            int32_t *block, const int d)
{
    for (int b = first; b < last; b++) {
        const float *c = blocks + (size_t)b * (size_t)(d + 1) * BLOCK;
        vf low[VECTORS];
        PLLM_UNROLL
        for (int v = 0; v < VECTORS; v++)
            low[v] = vf_set1(INFINITY);
        for (int i = 0; i < BLOCK; i += CODEWORDS) {
            vf score[CODEWORDS][VECTORS];
            PLLM_UNROLL
            for (int k = 0; k < CODEWORDS; k++) {
                PLLM_UNROLL
                for (int v = 0; v < VECTORS; v++)
                    score[k][v] = vf_set1(c[i + k]);
            }
            const float *lanes = x;
            PLLM_OPAQUE(lanes); /* or the compiler keeps all of x outside the loop and spills it */
            PLLM_UNROLL
            for (int j = 0; j < d; j++) {
                vf xj[VECTORS];
                PLLM_UNROLL
                for (int v = 0; v < VECTORS; v++)
                    xj[v] = vf_load(lanes + j * GROUP + v * VF_WIDTH);
                PLLM_UNROLL
                for (int k = 0; k < CODEWORDS; k++) {
                    vf cj = vf_set1(c[(j + 1) * BLOCK + i + k]);
                    PLLM_UNROLL
                    for (int v = 0; v < VECTORS; v++)
                        score[k][v] = vf_fma(xj[v], cj, score[k][v]);
                }
            }
            PLLM_UNROLL
            for (int k = 0; k < CODEWORDS; k++) {
                PLLM_UNROLL
                for (int v = 0; v < VECTORS; v++)
                    low[v] = vf_min(score[k][v], low[v]); /* a NaN score leaves low as it is */
            }
        }
        PLLM_UNROLL
        for (int v = 0; v < VECTORS; v++) {
            vf old = vf_load(best + v * VF_WIDTH);
            vm better = vf_lt(low[v], old); /* strict: the first of equal blocks stays */
            vf_store(best + v * VF_WIDTH, vf_select(better, low[v], old));
            vi_store(block + v * VF_WIDTH,
                     vi_select(better, vi_set1(b), vi_load(block + v * VF_WIDTH)));
        }
    }
}

/* The lowest codeword of the block whose score is `best`; the block's first one if there is none. */
PLLM_INLINE int32_t find_in_block(const pllm_codebook *cb, const float *x, int32_t block, float best,
                                  const int d)
{
    const float *c = cb->blocks + (size_t)block * (size_t)(d + 1) * BLOCK;
    vf score[BLOCK / VF_WIDTH];
    uint32_t equal = 0;
    PLLM_UNROLL
    for (int i = 0; i < BLOCK / VF_WIDTH; i++)
        score[i] = vf_load(c + i * VF_WIDTH);
    PLLM_UNROLL
    for (int j = 0; j < d; j++) {
        PLLM_UNROLL
        for (int i = 0; i < BLOCK / VF_WIDTH; i++)
            score[i] = vf_fma(vf_set1(x[j]), vf_load(c + (j + 1) * BLOCK + i * VF_WIDTH), score[i]);
    }
    PLLM_UNROLL
    for (int i = 0; i < BLOCK / VF_WIDTH; i++)
        equal |= vm_bits(vf_eq(score[i], vf_set1(best))) << (i * VF_WIDTH);
    int32_t k = block * BLOCK + (equal ? __builtin_ctz(equal) : 0);
    return k < cb->k ? k : block * BLOCK;
}

PLLM_INLINE void search(const pllm_codebook *cb, const float *z, ptrdiff_t n, int32_t *index,
                        float *error, pass *p, const int d)
{
    const int block_count = (cb->k + BLOCK - 1) / BLOCK;
    const int tile = TILE_BYTES / ((d + 1) * BLOCK * (int)sizeof(float));
    for (ptrdiff_t start = 0; start < n; start += QUERIES) {
        int count = (int)(n - start < QUERIES ? n - start : QUERIES);
        load_queries(p, z + start * d, count, d);
        for (int first = 0; first < block_count; first += tile) {
            int last = first + tile < block_count ? first + tile : block_count;
            for (int i = 0; i < count; i += GROUP)
                scan_group(p->lanes + (ptrdiff_t)i * d, cb->blocks, first, last, p->best + i,
                           p->block + i, d);
        }
        for (int i = 0; i < count; i++) {
            const float *x = z + (start + i) * d;
            int32_t k = find_in_block(cb, x, p->block[i], p->best[i], d);
            index[start + i] = k;
            if (error)
                error[start + i] = pllm_weighted_error(cb, x, k, d);
        }
    }
}

/* One copy of the search for each d, so that d is a constant in the inner loops. */
#define SEARCH(D) \
    static void search_##D(const pllm_codebook *cb, const float *z, ptrdiff_t n, int32_t *index, \
                           float *error, pass *p) \
    { \
        search(cb, z, n, index, error, p, D); \
    }
SEARCH(1) SEARCH(2) SEARCH(3) SEARCH(4) SEARCH(5) SEARCH(6) SEARCH(7) SEARCH(8)
SEARCH(9) SEARCH(10) SEARCH(11) SEARCH(12) SEARCH(13) SEARCH(14) SEARCH(15) SEARCH(16)

typedef void search_fn(const pllm_codebook *, const float *, ptrdiff_t, int32_t *, float *, pass *);

static search_fn *const search_of[PLLM_MAX_SUBVECTOR + 1] = {
    NULL,     search_1, search_2,  search_3,  search_4,  search_5,  search_6,  search_7, search_8,
    search_9, search_10, search_11, search_12, search_13, search_14, search_15, search_16};

void PLLM_SYM(pllm_search_slice)(const pllm_codebook *cb, const float *z, ptrdiff_t n,
                                 int32_t *index, float *error, float *scratch)
{
    assert(cb->d >= 1 && cb->d <= PLLM_MAX_SUBVECTOR && cb->k >= 1);
    pass p = {.best = scratch,
              .block = (int32_t *)(void *)(scratch + QUERIES),
              .lanes = scratch + 2 * QUERIES};
    search_of[cb->d](cb, z, n, index, error, &p);
}

/* The scan over all codewords. */
static int scan(const float *z, ptrdiff_t n, const float *codebook, int k, int d, const float *weight,
                const float *bias, int32_t *index, float *error, int threads)
{
    int status = PLLM_ENOMEM;
    const size_t scratch_floats = pllm_search_scratch_floats(d);
    float *blocks = pllm_alloc_floats(pllm_codebook_floats(k, d));
    float *scratch = pllm_alloc_floats((size_t)threads * scratch_floats);
    if (!blocks || !scratch)
        goto done;

    pllm_codebook cb;
    PLLM_SYM(pllm_codebook_prepare)(&cb, codebook, k, d, weight, bias, blocks);
    ptrdiff_t share = (n / threads / MAX_GROUP + 1) * MAX_GROUP; /* few queries: one pass a thread */
    share = share < QUERIES ? share : QUERIES;
    const ptrdiff_t passes = (n + share - 1) / share;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (passes > 1)
    for (ptrdiff_t i = 0; i < passes; i++) {
        ptrdiff_t start = i * share, count = n - start < share ? n - start : share;
        PLLM_SYM(pllm_search_slice)(&cb, z + start * d, count, index + start,
                                    error ? error + start : NULL,
                                    scratch + (size_t)omp_get_thread_num() * scratch_floats);
    }
    status = PLLM_OK;
done:
    free(scratch);
    free(blocks);
    return status;
}

int PLLM_SYM(pllm_nearest)(const float *z, ptrdiff_t n, const float *codebook, int k, int d,
                           const float *weight, const float *bias, int32_t *index, float *error,
                           int threads)
{
    if (!tree_pays(n, k, d))
        return scan(z, n, codebook, k, d, weight, bias, index, error, threads);
    pllm_tree *tree;
    int status = PLLM_SYM(pllm_tree_build)(&tree, codebook, k, d, weight, bias, n, threads);
    if (status == PLLM_OK)
        status = PLLM_SYM(pllm_tree_search)(tree, z, n, NULL, index, error, threads);
    free(tree);
    return status;
}
