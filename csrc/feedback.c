/* feedback.c - encoding with error feedback along the row. Compiled once per instruction set.
 *
 * Rows are independent, and lie in the lanes: a thread takes ROWS of them through a block of sub-vectors,
 * whose columns get the errors of those of the block that are done just before each choice, and then feeds
 * the block's errors into everything ahead of it, which is most of the work and a small matrix product.
 * What that reads of the feedback matrix is copied together once a block, in the order in which it is
 * met. Every sum is one chain of fused multiply-adds over the errors in the order of the sweep, so
 * neither the block size nor the instruction set nor the threads change a bit of it.
 *
 * A sweep in one direction sums up the errors of the sub-vectors that are done for every one ahead. The sweep
 * that comes back needs just these sums for its other side, so that it costs no more than a single one does.
 * The first after an earlier choice finds its other side by a sweep in which nothing is chosen.
 */
#include "kernel.h"

#include <assert.h>
#include <omp.h>
#include <stdbool.h>

#if defined(PLLM_ISA_AVX512) || defined(PLLM_ISA_NEON)
enum { VECTORS = 4, VECTORS_FEW = 4 }; /* with COLUMNS 24 sums of 32 registers */
#elif defined(PLLM_ISA_AVX2)
enum { VECTORS = 2, VECTORS_FEW = 4 }; /* 12 sums of 16 registers */
#else
enum { VECTORS = 1, VECTORS_FEW = 1 };
#endif

enum {
    BLOCK_COLUMNS = 128, /* columns of a block, at least one sub-vector */
    ROWS = 64,           /* rows a thread takes at a time; a multiple of every vector */
    TOGETHER = 8,        /* rows read side by side */
    COLUMNS = 6,         /* of a panel, whose products are summed side by side with VECTORS vectors of rows */
    FEW = 2              /* columns that have VECTORS_FEW of them: with fewer, sums would wait for each other */
};

typedef struct {
    ptrdiff_t rows, count, length; /* sub-vectors of a row; length = count d */
    int d, k;
    const float *x, *table, *metric, *feedback;
} job;

/* One way through all sub-vectors. */
typedef struct {
    bool back;                    /* from the last to the first */
    const int32_t *known;         /* (rows, count) choices that errors are summed for, or NULL: choose */
    int32_t *index;               /* (rows, count) where choices go */
    const float *other;           /* (row chunks, length, ROWS) sums of the errors ahead, or NULL: none */
    float *sum;                   /* (row chunks, length, ROWS) of those that are done */
} sweep;

/* Sub-vectors first..last-1, `width` columns, and the feedback of their errors in panels of at most COLUMNS
 * columns, one behind the other, each (errors, columns). Errors, and what belongs to a sub-vector, stand in the order
 * of the sweep. */
typedef struct {
    ptrdiff_t first, last;
    int width;
    float *inside;           /* (sub-vectors, d, BLOCK_COLUMNS) those of each one's columns, with the errors before it */
    float *outside;          /* (columns, width) of the columns ahead of the block */
    pllm_codebook *codebook; /* (last - first) the table under the metric of each sub-vector */
} block;

/* Scratch of one thread. */
typedef struct {
    float *x, *error; /* (BLOCK_COLUMNS, ROWS) */
    int32_t *choice;  /* (BLOCK_COLUMNS, ROWS) */
    float *query;     /* (ROWS, d) */
    float *search;    /* pllm_search_scratch_floats(d) */
} scratch;

/* The sub-vector of the block that comes i-th. */
static ptrdiff_t place_of(const sweep *w, const block *b, ptrdiff_t i)
{
    return w->back ? b->last - 1 - i : b->first + i;
}

/* ---- products ---------------------------------------------------------------------------------- */

/* target (columns, ROWS) += sum over m of error[m] (ROWS) panel[m][column], m ascending. */
PLLM_INLINE void add_columns(float *target, const float *error, int errors, const float *panel,
                             const int columns, const int vectors)
{
    for (int r = 0; r < ROWS; r += vectors * VF_WIDTH) {
        vf sum[COLUMNS][VECTORS_FEW];
        PLLM_UNROLL
        for (int c = 0; c < columns; c++) {
            PLLM_UNROLL
            for (int v = 0; v < vectors; v++)
                sum[c][v] = vf_load(target + c * ROWS + r + v * VF_WIDTH);
        }
        for (int m = 0; m < errors; m++) {
            const float *const e = error + m * ROWS + r;
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
                vf_store(target + c * ROWS + r + v * VF_WIDTH, sum[c][v]);
        }
    }
}

typedef void add_fn(float *target, const float *error, int errors, const float *panel);

/* One copy for each number of columns. */
#define ADD_COLUMNS(N) \
    static void add_##N(float *target, const float *error, int errors, const float *panel) \
    { \
        add_columns(target, error, errors, panel, N, N <= FEW ? VECTORS_FEW : VECTORS); \
    }
ADD_COLUMNS(1) ADD_COLUMNS(2) ADD_COLUMNS(3) ADD_COLUMNS(4) ADD_COLUMNS(5) ADD_COLUMNS(6)

static add_fn *const add_of[COLUMNS + 1] = {NULL, add_1, add_2, add_3, add_4, add_5, add_6};

/* target (columns, ROWS) += the errors times their panels. */
static void add_errors(float *target, ptrdiff_t columns, const float *error, int errors, const float *panels)
{
    for (ptrdiff_t c = 0; c < columns; c += COLUMNS)
        add_of[smaller(columns - c, COLUMNS)](target + c * ROWS, error, errors, panels + c * errors);
}

/* panels = what the errors of the block's first `count` sub-vectors mean for the columns from..to-1. */
static void pack(const job *j, const sweep *w, const block *b, ptrdiff_t count, ptrdiff_t from, ptrdiff_t to,
                 float *panels)
{
    for (ptrdiff_t c = from; c < to; c += COLUMNS) {
        const ptrdiff_t here = smaller(to - c, COLUMNS);
        for (ptrdiff_t i = 0; i < count; i++) {
            const float *row = j->feedback + place_of(w, b, i) * j->d * j->length + c;
            for (int a = 0; a < j->d; a++, panels += here, row += j->length) {
                if (here == COLUMNS) /* a copy of a constant size is no call */
                    memcpy(panels, row, COLUMNS * sizeof *panels);
                else
                    memcpy(panels, row, (size_t)here * sizeof *panels);
            }
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

/* y = metric x, metric symmetric (d, d), each a chain in ascending order; a lane a vector. */
PLLM_INLINE void apply_metric(const int d, const float *metric, const vf *x, vf *y)
{
    for (int a = 0; a < d; a++) {
        y[a] = vf_zero();
        for (int b = 0; b < d; b++)
            y[a] = vf_fma(vf_set1(metric[a * d + b]), x[b], y[a]);
    }
}

/* Gives a prepared codebook the offsets of a metric: the score is t'Mt / 2 - (Mq)'t. Behind the last codeword
 * they stay infinite. */
PLLM_INLINE void set_offsets(const int d, const pllm_codebook *codebook, const float *metric)
{
    for (int i = 0; i < codebook->k; i += VF_WIDTH) {
        float *const offset = codebook->blocks + (ptrdiff_t)(i / PLLM_CODEBOOK_BLOCK) * (d + 1) * PLLM_CODEBOOK_BLOCK +
                              i % PLLM_CODEBOOK_BLOCK;
        vf t[PLLM_MAX_SUBVECTOR], y[PLLM_MAX_SUBVECTOR]; /* both negated: what matters are products of two */
        for (int a = 0; a < d; a++)
            t[a] = vf_load(offset + (a + 1) * PLLM_CODEBOOK_BLOCK);
        apply_metric(d, metric, t, y);
        vf sum = vf_zero();
        for (int a = 0; a < d; a++)
            sum = vf_fma(y[a], t[a], sum);
        const vm inside = vi_lt(vi_add(vi_set1(i), vi_iota()), vi_set1(codebook->k));
        vf_store(offset, vf_select(inside, vf_mul(vf_set1(0.5f), sum), vf_set1(INFINITY)));
    }
}

/* Everything that the rows of a block share, by the threads that call. */
static void prepare(const job *j, const sweep *w, const block *b)
{
    const int d = j->d;
#pragma omp for schedule(static)
    for (ptrdiff_t i = 0; i < b->last - b->first; i++) {
        const ptrdiff_t l = place_of(w, b, i);
        if (!w->known)
            PLLM_CONSTANT_D(set_offsets, d, &b->codebook[i], j->metric + l * d * d);
        pack(j, w, b, i, l * d, (l + 1) * d, b->inside + i * d * BLOCK_COLUMNS);
    }
    ptrdiff_t from, to;
    ahead(j, w, b, &from, &to);
#pragma omp for schedule(static)
    for (ptrdiff_t c = from; c < to; c += COLUMNS)
        pack(j, w, b, b->last - b->first, c, smaller(c + COLUMNS, to), b->outside + (c - from) * b->width);
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

/* s->choice = what is known of the block's `n` rows; entry 0 behind them. */
static void load_choices(const job *j, const sweep *w, const block *b, ptrdiff_t start, int n, const scratch *s)
{
    memset(s->choice, 0, sizeof *s->choice * BLOCK_COLUMNS * ROWS);
    for (int r = 0; r < n; r++)
        for (ptrdiff_t i = 0; i < b->last - b->first; i++)
            s->choice[i * ROWS + r] = w->known[(start + r) * j->count + place_of(w, b, i)];
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

/* The targets x + other + sum (d, ROWS each; other may be NULL) under their metric, as queries one by one. */
PLLM_INLINE void set_queries(const int d, const float *x, const float *other, const float *sum,
                             const float *metric, float *query)
{
    for (int r = 0; r < ROWS; r += VF_WIDTH) {
        vf target[PLLM_MAX_SUBVECTOR], y[PLLM_MAX_SUBVECTOR];
        float lanes[PLLM_MAX_SUBVECTOR][VF_WIDTH];
        for (int a = 0; a < d; a++) {
            target[a] = vf_load(x + a * ROWS + r);
            if (other)
                target[a] = vf_add(target[a], vf_load(other + a * ROWS + r));
            target[a] = vf_add(target[a], vf_load(sum + a * ROWS + r));
        }
        apply_metric(d, metric, target, y);
        for (int a = 0; a < d; a++)
            vf_store(lanes[a], y[a]);
        for (int i = 0; i < VF_WIDTH; i++)
            for (int a = 0; a < d; a++)
                query[(r + i) * d + a] = lanes[a][i];
    }
}

/* Chooses the block's sub-vectors, unless the choice is known, and feeds their errors ahead. */
static void sweep_block(const job *j, const sweep *w, const block *b, ptrdiff_t start, const scratch *s)
{
    const int n = (int)smaller(j->rows - start, ROWS), d = j->d;
    float *const sum = w->sum + start * j->length;
    load_block(j, w, b, start, n, s);
    if (w->known)
        load_choices(j, w, b, start, n, s);
    for (ptrdiff_t i = 0; i < b->last - b->first; i++) {
        const ptrdiff_t l = place_of(w, b, i), own = l * d * ROWS;
        add_errors(sum + own, d, s->error, (int)i * d, b->inside + i * d * BLOCK_COLUMNS);
        if (!w->known) {
            const float *const other = w->other ? w->other + start * j->length + own : NULL;
            PLLM_CONSTANT_D(set_queries, d, s->x + i * d * ROWS, other, sum + own, j->metric + l * d * d, s->query);
            PLLM_SYM(pllm_search_slice)(&b->codebook[i], s->query, ROWS, s->choice + i * ROWS, NULL, s->search);
        }
        PLLM_CONSTANT_D(set_errors, d, j, i, s);
    }
    if (!w->known)
        store_choices(j, w, b, start, n, s);
    ptrdiff_t from, to;
    ahead(j, w, b, &from, &to);
    add_errors(sum + from * ROWS, to - from, s->error, b->width, b->outside);
}

/* ---- all of it --------------------------------------------------------------------------------- */

static size_t scratch_floats(int d)
{
    return (3 * BLOCK_COLUMNS + (size_t)d) * ROWS + pllm_search_scratch_floats(d);
}

static scratch scratch_of(float *own, int d)
{
    const size_t part = BLOCK_COLUMNS * ROWS;
    return (scratch){.x = own, .error = own + part, .choice = (int32_t *)(void *)(own + 2 * part),
                     .query = own + 3 * part, .search = own + 3 * part + ROWS * d};
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
            const scratch s = scratch_of(floats + (size_t)omp_get_thread_num() * scratch_floats(j->d), j->d);
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
    sweep w = {.back = true, .known = previous, .sum = sums[0]};
    if (previous)
        run_sweep(j, &w, b, floats, threads);
    for (int i = 0; i < sweeps; i++) {
        w = (sweep){.back = i % 2, .index = index, .other = previous ? w.sum : NULL, .sum = sums[(i + 1) % 2]};
        run_sweep(j, &w, b, floats, threads);
    }
}

int PLLM_SYM(pllm_encode_feedback)(const float *x, ptrdiff_t rows, ptrdiff_t count, int d,
                                   const float *table, int k, const float *metric,
                                   const float *feedback, const int32_t *previous, int sweeps,
                                   int32_t *index, int threads)
{
    assert(d >= 1 && d <= PLLM_MAX_SUBVECTOR && k >= 1 && sweeps >= 1 && (previous || sweeps == 1));
    int status = PLLM_ENOMEM;
    const int block_size = BLOCK_COLUMNS / d;
    const size_t codebook_floats = pllm_codebook_floats(k, d), length = (size_t)count * (size_t)d;
    const size_t sum_floats = (size_t)round_up(rows, ROWS) * length;
    float *sum = pllm_alloc_floats((previous ? 2 : 1) * sum_floats);
    float *blocks = pllm_alloc_floats((size_t)block_size * codebook_floats);
    float *floats = pllm_alloc_floats((size_t)threads * scratch_floats(d));
    float *panels = pllm_alloc_floats(BLOCK_COLUMNS * (BLOCK_COLUMNS + length));
    float *offset = calloc((size_t)k, sizeof *offset);
    pllm_codebook *codebook = pllm_alloc((size_t)block_size * sizeof *codebook);
    if (!sum || !blocks || !floats || !panels || !offset || !codebook)
        goto done;

    const job j = {.rows = rows, .count = count, .length = count * d, .d = d, .k = k, .x = x, .table = table,
                   .metric = metric, .feedback = feedback};
    block b = {.inside = panels, .outside = panels + BLOCK_COLUMNS * BLOCK_COLUMNS, .codebook = codebook};
    for (int l = 0; l < block_size; l++) /* offsets are set block by block */
        PLLM_SYM(pllm_codebook_prepare_score)(&codebook[l], table, k, d, offset, blocks + (size_t)l * codebook_floats);
    encode(&j, previous, sweeps, index, (float *const[2]){previous ? sum + sum_floats : NULL, sum}, &b, floats, threads);
    status = PLLM_OK;
done:
    free(codebook);
    free(offset);
    free(panels);
    free(floats);
    free(blocks);
    free(sum);
    return status;
}
