/* feedback.c - encoding with error feedback along the row. Compiled once per instruction set.
 *
 * Rows are independent, and lie in the lanes: a thread takes ROWS of them through a block of sub-vectors,
 * whose columns get the errors of those of the block that are done just before each choice, and then feeds
 * the block's errors into everything ahead of it, which is most of the work and a small matrix product
 * (feedback_product.h). Every sum is one chain over the errors in the order of the sweep, so neither the block
 * size nor the instruction set nor the threads change a bit of it.
 *
 * A sweep in one direction sums up the errors of the sub-vectors that are done for every one ahead. The sweep
 * that comes back needs just these sums for its other side, so that it costs no more than a single one does.
 * The first after an earlier choice finds its other side by a sweep in which nothing is chosen.
 */
#include "feedback_product.h"
#include "metric.h"

#include <assert.h>
#include <omp.h>
#include <stdbool.h>

enum {
    BLOCK_COLUMNS = 128, /* columns of a block, at least one sub-vector */
    ROWS = PRODUCT_ROWS, /* rows a thread takes at a time */
    TOGETHER = 8         /* rows read side by side */
};
_Static_assert((int)ROWS == (int)METRIC_QUERIES, "the rows of a product are the queries of a search");

typedef struct {
    ptrdiff_t rows, count, length; /* sub-vectors of a row; length = count d */
    int d, k;
    const float *x, *table, *metric, *feedback;
    const pllm_buckets *buckets; /* of the table; NULL: every choice is a scan */
} job;

/* One way through all sub-vectors. */
typedef struct {
    bool back;                    /* from the last to the first */
    const int32_t *earlier;       /* (rows, count) choices, or NULL: none */
    int32_t *index;               /* (rows, count) where new choices go, or NULL: errors are those of the earlier */
    const float *other;           /* (row chunks, length, ROWS) sums of the errors ahead, or NULL: none */
    float *sum;                   /* (row chunks, length, ROWS) of those that are done */
} sweep;

/* Sub-vectors first..last-1, `width` columns, and the feedback of their errors in panels. Errors, and what belongs to a
 * sub-vector, stand in the order of the sweep. */
typedef struct {
    ptrdiff_t first, last;
    int width;
    float *inside;           /* (sub-vectors, d, BLOCK_COLUMNS) those of each one's columns, with the errors before it */
    float *outside;          /* (columns, width) of the columns ahead of the block */
    pllm_codebook *codebook; /* (last - first) the table under the metric of each sub-vector, */
    pllm_metric *metric;     /* or its buckets; the other is NULL */
} block;

/* Scratch of one thread. */
typedef struct {
    float *x, *error; /* (BLOCK_COLUMNS, ROWS) */
    int32_t *choice;  /* (BLOCK_COLUMNS, ROWS) */
    float *target;    /* (d, ROWS) */
    float *query;     /* (ROWS, d) */
    float *search;    /* of the search */
} scratch;

/* The sub-vector of the block that comes i-th. */
static ptrdiff_t place_of(const sweep *w, const block *b, ptrdiff_t i)
{
    return w->back ? b->last - 1 - i : b->first + i;
}

/* panels = what the errors of the block's first `count` sub-vectors mean for the columns from..to-1. */
static void pack(const job *j, const sweep *w, const block *b, ptrdiff_t count, ptrdiff_t from, ptrdiff_t to,
                 float *panels)
{
    for (ptrdiff_t c = from; c < to; c += PRODUCT_COLUMNS) {
        const ptrdiff_t here = smaller(to - c, PRODUCT_COLUMNS);
        for (ptrdiff_t i = 0; i < count; i++) {
            const float *const row = j->feedback + place_of(w, b, i) * j->d * j->length + c;
            panels = product_pack(panels, row, j->d, j->length, here);
        }
    }
}

/* The columns ahead of the block. */
static void ahead(const job *j, const sweep *w, const block *b, ptrdiff_t *from, ptrdiff_t *to)
{
    *from = w->back ? 0 : b->last * j->d;
    *to = w->back ? b->first * j->d : j->length;
}

/* ---- one block --------------------------------------------------------------------------------- */

/* Gives a prepared codebook the offsets of a metric: the score is t'Mt / 2 - (Mq)'t. Behind the last codeword
 * they stay infinite. */
PLLM_INLINE void set_offsets(const int d, const pllm_codebook *codebook, const float *metric)
{
    for (int i = 0; i < codebook->k; i += VF_WIDTH) {
        float *const offset = codebook->blocks + (ptrdiff_t)(i / PLLM_CODEBOOK_BLOCK) * (d + 1) * PLLM_CODEBOOK_BLOCK +
                              i % PLLM_CODEBOOK_BLOCK;
        const vf all = metric_offsets(d, metric, offset + PLLM_CODEBOOK_BLOCK, PLLM_CODEBOOK_BLOCK);
        const vm inside = vi_lt(vi_add(vi_set1(i), vi_iota()), vi_set1(codebook->k));
        vf_store(offset, vf_select(inside, all, vf_set1(INFINITY)));
    }
}

/* Everything that the rows of a block share, by the threads that call. */
static void prepare(const job *j, const sweep *w, const block *b)
{
    const int d = j->d;
#pragma omp for schedule(static)
    for (ptrdiff_t i = 0; i < b->last - b->first; i++) {
        const ptrdiff_t l = place_of(w, b, i);
        if (w->index && j->buckets)
            PLLM_SYM(pllm_metric_set)(&b->metric[i], j->buckets, j->metric + l * d * d);
        else if (w->index)
            PLLM_CONSTANT_D(set_offsets, d, &b->codebook[i], j->metric + l * d * d);
        pack(j, w, b, i, l * d, (l + 1) * d, b->inside + i * d * BLOCK_COLUMNS);
    }
    ptrdiff_t from, to;
    ahead(j, w, b, &from, &to);
#pragma omp for schedule(static)
    for (ptrdiff_t c = from; c < to; c += PRODUCT_COLUMNS)
        pack(j, w, b, b->last - b->first, c, smaller(c + PRODUCT_COLUMNS, to), b->outside + (c - from) * b->width);
}

/* s->x = the columns of the block of `n` rows; zeros behind them. */
static void load_block(const job *j, const sweep *w, const block *b, ptrdiff_t start, int n, const scratch *s)
{
    if (n < ROWS)
        memset(s->x, 0, (size_t)(b->width * ROWS) * sizeof *s->x);
    const float *rows = j->x + start * j->length;
    int r = 0;
    for (; r + TOGETHER <= n; r += TOGETHER, rows += TOGETHER * j->length) {
        float *to = s->x + r;
        for (ptrdiff_t i = 0; i < b->last - b->first; i++) {
            const float *from = rows + place_of(w, b, i) * j->d;
            for (int a = 0; a < j->d; a++, to += ROWS)
                for (int k = 0; k < TOGETHER; k++)
                    to[k] = from[k * j->length + a];
        }
    }
    for (; r < n; r++, rows += j->length)
        for (int c = 0; c < b->width; c++)
            s->x[c * ROWS + r] = rows[place_of(w, b, c / j->d) * j->d + c % j->d];
}

/* s->choice = the earlier one of the block's `n` rows; entry 0 behind them. */
static void load_choices(const job *j, const sweep *w, const block *b, ptrdiff_t start, int n, const scratch *s)
{
    memset(s->choice, 0, sizeof *s->choice * BLOCK_COLUMNS * ROWS);
    for (int r = 0; r < n; r++)
        for (ptrdiff_t i = 0; i < b->last - b->first; i++)
            s->choice[i * ROWS + r] = w->earlier[(start + r) * j->count + place_of(w, b, i)];
}

static void store_choices(const job *j, const sweep *w, const block *b, ptrdiff_t start, int n, const scratch *s)
{
    for (int r = 0; r < n; r++)
        for (ptrdiff_t i = 0; i < b->last - b->first; i++)
            w->index[(start + r) * j->count + place_of(w, b, i)] = s->choice[i * ROWS + r];
}

/* The errors of the block's i-th sub-vector: x - table[choice]. */
PLLM_INLINE void set_errors(const int d, const job *j, ptrdiff_t i, const scratch *s)
{
    for (int r = 0; r < ROWS; r += VF_WIDTH) {
        const vi at = vi_mul(vi_load(s->choice + i * ROWS + r), vi_set1(d));
        for (int a = 0; a < d; a++) {
            const ptrdiff_t place = (i * d + a) * ROWS + r;
            vf_store(s->error + place, vf_sub(vf_load(s->x + place), vf_gather(j->table + a, at)));
        }
    }
}

/* target = x + other + sum, (d, ROWS) each; other may be NULL. */
static void set_targets(int d, const float *x, const float *other, const float *sum, float *target)
{
    for (int i = 0; i < d * ROWS; i += VF_WIDTH) {
        vf t = vf_load(x + i);
        if (other)
            t = vf_add(t, vf_load(other + i));
        vf_store(target + i, vf_add(t, vf_load(sum + i)));
    }
}

/* The targets under their metric, as queries one by one. */
PLLM_INLINE void set_queries(const int d, const float *target, const float *metric, float *query)
{
    for (int r = 0; r < ROWS; r += VF_WIDTH) {
        vf t[PLLM_MAX_SUBVECTOR], y[PLLM_MAX_SUBVECTOR];
        float lanes[PLLM_MAX_SUBVECTOR][VF_WIDTH];
        for (int a = 0; a < d; a++)
            t[a] = vf_load(target + a * ROWS + r);
        metric_apply(d, metric, t, y);
        for (int a = 0; a < d; a++)
            vf_store(lanes[a], y[a]);
        for (int i = 0; i < VF_WIDTH; i++)
            for (int a = 0; a < d; a++)
                query[(r + i) * d + a] = lanes[a][i];
    }
}

/* Chooses the block's i-th sub-vector, of the targets. */
static void choose(const job *j, const sweep *w, const block *b, ptrdiff_t i, const scratch *s)
{
    int32_t *const choice = s->choice + i * ROWS;
    if (j->buckets) {
        PLLM_SYM(pllm_metric_search)(&b->metric[i], j->buckets, s->target, w->earlier ? choice : NULL, choice,
                                     s->search);
    } else {
        PLLM_CONSTANT_D(set_queries, j->d, s->target, j->metric + place_of(w, b, i) * j->d * j->d, s->query);
        PLLM_SYM(pllm_search_slice)(&b->codebook[i], s->query, ROWS, choice, NULL, s->search);
    }
}

/* Chooses the block's sub-vectors, or takes the earlier choice, and feeds their errors ahead. */
static void sweep_block(const job *j, const sweep *w, const block *b, ptrdiff_t start, const scratch *s)
{
    const int n = (int)smaller(j->rows - start, ROWS), d = j->d;
    float *const sum = w->sum + start * j->length;
    load_block(j, w, b, start, n, s);
    if (w->earlier)
        load_choices(j, w, b, start, n, s);
    for (ptrdiff_t i = 0; i < b->last - b->first; i++) {
        const ptrdiff_t own = place_of(w, b, i) * d * ROWS;
        product_add(sum + own, d, s->error, (int)i * d, b->inside + i * d * BLOCK_COLUMNS);
        if (w->index) {
            const float *const other = w->other ? w->other + start * j->length + own : NULL;
            set_targets(d, s->x + i * d * ROWS, other, sum + own, s->target);
            choose(j, w, b, i, s);
        }
        PLLM_CONSTANT_D(set_errors, d, j, i, s);
    }
    if (w->index)
        store_choices(j, w, b, start, n, s);
    ptrdiff_t from, to;
    ahead(j, w, b, &from, &to);
    product_add(sum + from * ROWS, to - from, s->error, b->width, b->outside);
}

/* ---- all of it --------------------------------------------------------------------------------- */

static size_t scratch_floats(const job *j)
{
    return (3 * BLOCK_COLUMNS + 2 * (size_t)j->d) * ROWS +
           (j->buckets ? metric_scratch_floats(j->k, j->d) : pllm_search_scratch_floats(j->d));
}

static scratch scratch_of(float *own, int d)
{
    const size_t part = BLOCK_COLUMNS * ROWS;
    float *const behind = own + 3 * part;
    return (scratch){.x = own, .error = own + part, .choice = (int32_t *)(void *)(own + 2 * part),
                     .target = behind, .query = behind + ROWS * d, .search = behind + 2 * ROWS * d};
}

/* The block that is `at` sub-vectors behind the start of the sweep. */
static void set_block(block *b, const job *j, const sweep *w, ptrdiff_t at)
{
    const ptrdiff_t count = smaller(j->count - at, BLOCK_COLUMNS / j->d);
    b->first = w->back ? j->count - at - count : at;
    b->last = b->first + count;
    b->width = (int)count * j->d;
}

static void run_sweep(const job *j, const sweep *w, block *b, float *floats, int threads)
{
    const ptrdiff_t chunks = round_up(j->rows, ROWS) / ROWS;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (ptrdiff_t i = 0; i < chunks; i++)
        memset(w->sum + i * ROWS * j->length, 0, (size_t)(ROWS * j->length) * sizeof *w->sum);
    for (ptrdiff_t at = 0; at < j->count; at += b->last - b->first) {
        set_block(b, j, w, at);
#pragma omp parallel num_threads(threads)
        {
            const scratch s = scratch_of(floats + (size_t)omp_get_thread_num() * scratch_floats(j), j->d);
            prepare(j, w, b);
#pragma omp for schedule(dynamic)
            for (ptrdiff_t i = 0; i < chunks; i++)
                sweep_block(j, w, b, i * ROWS, &s);
        }
    }
}

/* sums: of two sweeps, one alone without previous. */
static void encode(const job *j, const int32_t *previous, int sweeps, int32_t *index, float *const sums[2], block *b,
                   float *floats, int threads)
{
    sweep w = {.back = true, .earlier = previous, .sum = sums[0]};
    if (previous)
        run_sweep(j, &w, b, floats, threads);
    for (int i = 0; i < sweeps; i++) {
        w = (sweep){.back = i % 2, .earlier = i ? index : previous, .index = index,
                    .other = previous ? w.sum : NULL, .sum = sums[(i + 1) % 2]};
        run_sweep(j, &w, b, floats, threads);
    }
}

/* Makes the tables of b, whose metrics are set block by block, with *floats behind them. Returns PLLM_OK or
 * PLLM_ENOMEM; what has been allocated is the caller's either way. */
static int make_tables(const job *j, block *b, float **floats)
{
    const int size = BLOCK_COLUMNS / j->d;
    const size_t each = j->buckets ? metric_floats(j->k, j->d) : pllm_codebook_floats(j->k, j->d);
    float *offset = calloc((size_t)j->k, sizeof *offset);
    *floats = pllm_alloc_floats((size_t)size * each);
    if (j->buckets)
        b->metric = pllm_alloc((size_t)size * sizeof *b->metric);
    else
        b->codebook = pllm_alloc((size_t)size * sizeof *b->codebook);
    const bool enough = offset && *floats && (b->metric || b->codebook);
    for (int l = 0; l < size && enough; l++) {
        float *const own = *floats + (size_t)l * each;
        if (j->buckets)
            b->metric[l] = metric_place(j->buckets, own);
        else
            PLLM_SYM(pllm_codebook_prepare_score)(&b->codebook[l], j->table, j->k, j->d, offset, own);
    }
    free(offset);
    return enough ? PLLM_OK : PLLM_ENOMEM;
}

int PLLM_SYM(pllm_encode_feedback)(const float *x, ptrdiff_t rows, ptrdiff_t count, int d,
                                   const float *table, int k, const float *metric,
                                   const float *feedback, const int32_t *previous, int sweeps,
                                   int32_t *index, int threads)
{
    assert(d >= 1 && d <= PLLM_MAX_SUBVECTOR && k >= 1 && sweeps >= 1 && (previous || sweeps == 1));
    pllm_buckets *buckets = NULL;
    if (metric_pays(rows, k, d) && PLLM_SYM(pllm_buckets_build)(&buckets, table, k, d, threads) != PLLM_OK)
        return PLLM_ENOMEM;
    const job j = {.rows = rows, .count = count, .length = count * d, .d = d, .k = k, .x = x, .table = table,
                   .metric = metric, .feedback = feedback, .buckets = buckets};
    const size_t length = (size_t)j.length, sum_floats = (size_t)round_up(rows, ROWS) * length;
    float *tables, *sum = pllm_alloc_floats((previous ? 2 : 1) * sum_floats);
    float *floats = pllm_alloc_floats((size_t)threads * scratch_floats(&j));
    float *panels = pllm_alloc_floats(BLOCK_COLUMNS * (BLOCK_COLUMNS + length));
    block b = {.inside = panels, .outside = panels + BLOCK_COLUMNS * BLOCK_COLUMNS};
    int status = make_tables(&j, &b, &tables);
    if (!sum || !floats || !panels)
        status = PLLM_ENOMEM;
    if (status == PLLM_OK)
        encode(&j, previous, sweeps, index, (float *const[2]){previous ? sum + sum_floats : NULL, sum}, &b, floats,
               threads);
    free(b.metric);
    free(b.codebook);
    free(tables);
    free(panels);
    free(floats);
    free(sum);
    free(buckets);
    return status;
}
