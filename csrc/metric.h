/* metric.h - exact nearest codeword under a metric that some hundred queries share and the next ones do not,
 * too few to build a tree (tree.h) for: the least t'Mt / 2 - (Mq)'t, lowest index on ties, as the scan over all.
 *
 * Codewords are sorted once, by a tree, into buckets of METRIC_BUCKET near ones. With M = R'R, a metric gives every
 * bucket the box around its R t, and a query skips the buckets whose box is farther from R q than the best so far.
 *
 * Why none is missed although floats are rounded. Write u for 2^-24, n(v) = sum sqrt(M_aa) |v_a|, T = R t and Q = R q
 * as computed, s for the float score and S for n(q) + the largest n(t). Cholesky's factor exists (metric.c looks), so
 * |M_ab| <= sqrt(M_aa M_bb), |v'Mw| <= n(v) n(w), and R'R, R rounded to floats, differs from M by at most
 * 2.1 u sqrt(M_aa M_bb). To first order in u
 *     2 s differs from t'Mt - 2 q'Mt       by (3 d + 2) u n(t)^2 + (4 d + 2) u n(q) n(t),
 *     |Q|^2 as summed from itself          by d u n(q)^2,
 *     |T|^2 - 2 Q.T from t'Mt - 2 q'Mt     by (2 d + 2.1) u n(t)^2 + (4 d + 4.2) u n(q) n(t),
 *     a box's bound exceeds |Q - T|^2      by (d + 4) u S^2 at most,
 *     2 best + reach is off                by 4 u S^2,
 * and what M may lack in symmetry, 4 u sqrt(M_aa M_bb), is 4 u S^2. All of it is below (6 d + 17) u S^2, so that with
 * reach = |Q|^2 + METRIC_SLACK(d) S^2 + tiny, a bound above 2 best + reach means s > best: strictly, ties are never cut
 * off. `tiny`, with sums of |t| up to METRIC_LARGE, exceeds what underflow can do. NaN skips nothing.
 */
#ifndef PLLM_METRIC_H
#define PLLM_METRIC_H

#include "kernel.h"

enum {
    METRIC_BUCKET = 16,   /* codewords of a bucket */
    METRIC_QUERIES = 64   /* queries of one call; a multiple of every vector */
};

#define METRIC_SLACK(d) (8.0f * (float)((d) + 4) * 0x1p-24f)
#define METRIC_TINY 1e-30f
#define METRIC_LARGE 1e12f

/* A codebook in buckets. */
typedef struct {
    int d, k, count; /* buckets, a multiple of VF_WIDTH */
    float largest[PLLM_MAX_SUBVECTOR]; /* of |t_a| */
    float *negated;  /* (count, d, METRIC_BUCKET) -t; zeros behind the last codeword */
    float *across;   /* (METRIC_BUCKET, d, count) t; behind the last codeword one of its bucket, or any */
    int32_t *number; /* (count, METRIC_BUCKET) of each; INT32_MAX behind the last */
    int32_t *where;  /* (k) its place in `number` */
} pllm_buckets;

/* What a metric makes of it. */
typedef struct {
    float *offset; /* (count, METRIC_BUCKET) t'Mt / 2; infinite behind the last */
    float *box;    /* (count / VF_WIDTH, d, 2, VF_WIDTH) least and largest R t of each */
    float *row;    /* the same of rows, VF_WIDTH buckets each; infinite behind them, up to a multiple of VF_WIDTH */
    float metric[PLLM_MAX_SUBVECTOR * PLLM_MAX_SUBVECTOR], root[PLLM_MAX_SUBVECTOR * PLLM_MAX_SUBVECTOR]; /* M, R */
    float size[PLLM_MAX_SUBVECTOR]; /* sqrt(M_aa) */
    float reach;                    /* the largest n(t), or more */
    float slack;                    /* METRIC_SLACK, or infinite where the bounds do not hold */
} pllm_metric;

/* Does it pay for `queries` queries a metric, rather than a scan? Measured. */
static inline int metric_pays(ptrdiff_t queries, int k, int d)
{
    return queries >= 128 && (d <= 5 ? k >= 2048 : d <= 8 && k >= 16384);
}

static inline int metric_buckets(int k) { return (int)round_up((k + METRIC_BUCKET - 1) / METRIC_BUCKET, 16); }
static inline int metric_rows(int k) { return (int)round_up(metric_buckets(k) / VF_WIDTH, VF_WIDTH); }

/* Number of floats of pllm_metric's arrays: offset, then box and row. */
static inline size_t metric_box_floats(int k, int d)
{
    return 2 * (size_t)d * (size_t)(metric_buckets(k) + metric_rows(k));
}
static inline size_t metric_floats(int k, int d)
{
    return (size_t)metric_buckets(k) * METRIC_BUCKET + metric_box_floats(k, d);
}

/* Number of floats of scratch that one call of search needs. */
static inline size_t metric_scratch_floats(int k, int d)
{
    return METRIC_QUERIES * (2 * (size_t)d + 2 + 2 * METRIC_BUCKET + (size_t)(metric_rows(k) + metric_buckets(k))) +
           2 * VF_WIDTH;
}

/* table: (k, d).  *result is one allocation. Returns PLLM_OK or PLLM_ENOMEM. */
int PLLM_SYM(pllm_buckets_build)(pllm_buckets **result, const float *table, int k, int d, int threads);

/* An empty one of metric_floats. */
static inline pllm_metric metric_place(const pllm_buckets *b, float *floats)
{
    float *const box = floats + (size_t)b->count * METRIC_BUCKET;
    return (pllm_metric){.offset = floats, .box = box, .row = box + 2 * (size_t)b->d * (size_t)b->count};
}

/* Gives m, which has its place, a metric (d, d), symmetric. */
void PLLM_SYM(pllm_metric_set)(pllm_metric *m, const pllm_buckets *b, const float *metric);

/* Nearest codewords of METRIC_QUERIES queries.  q: (d, METRIC_QUERIES).  guess: codewords that may be near, or NULL.
 * index: may be guess.  A query with NaN or Inf in it gets some index in 0..k-1. */
void PLLM_SYM(pllm_metric_search)(const pllm_metric *m, const pllm_buckets *b, const float *q, const int32_t *guess,
                                  int32_t *index, float *scratch);

/* y = metric x, metric (d, d), each a chain in ascending order; a lane a vector. */
PLLM_INLINE void metric_apply(const int d, const float *metric, const vf *x, vf *y)
{
    for (int a = 0; a < d; a++) {
        y[a] = vf_zero();
        for (int b = 0; b < d; b++)
            y[a] = vf_fma(vf_set1(metric[a * d + b]), x[b], y[a]);
    }
}

/* The offsets t'Mt / 2 of VF_WIDTH codewords; x (d, step) holds them, negated or not. */
PLLM_INLINE vf metric_offsets(const int d, const float *metric, const float *x, int step)
{
    vf t[PLLM_MAX_SUBVECTOR], y[PLLM_MAX_SUBVECTOR]; /* the sign is lost: what matters are products of two */
    for (int a = 0; a < d; a++)
        t[a] = vf_load(x + a * step);
    metric_apply(d, metric, t, y);
    vf sum = vf_zero();
    for (int a = 0; a < d; a++)
        sum = vf_fma(y[a], t[a], sum);
    return vf_mul(vf_set1(0.5f), sum);
}

#endif
