/* feedback.c - encoding with error feedback along the row. Compiled once per instruction set.
 *
 * Rows are independent, and lie in the lanes: a thread takes ROWS of them through a block of sub-vectors,
 * whose columns get the errors of the earlier ones of the block just before each choice, and then feeds
 * the block's errors into everything behind it, which is most of the work and a small matrix product.
 * What that reads of the feedback matrix is copied together once a block, in the order in which it is
 * met. Every target is one chain of fused multiply-adds over the errors before it in ascending order, so
 * neither the block size nor the instruction set nor the threads change a bit of it.
 */
#include "kernel.h"

#include <assert.h>
#include <omp.h>

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
    const int32_t *previous; /* (rows, count) or NULL */
    int32_t *index;
    float *target; /* (row chunks, length, ROWS): x plus the errors fed so far */
} job;

/* Sub-vectors first..last-1, `width` columns, and the feedback of their errors in panels of at most COLUMNS
 * columns, one behind the other, each (errors, columns). */
typedef struct {
    ptrdiff_t first, last;
    int width;
    float *inside;           /* (sub-vectors, d, BLOCK_COLUMNS) those of each one's columns, with the errors before it
                                while choosing, behind it while starting from a previous choice */
    float *outside;          /* (columns, width) of the columns behind the block; while starting, before it */
    pllm_codebook *codebook; /* (last - first) the table under the metric of each sub-vector */
} block;

/* Scratch of one thread. */
typedef struct {
    float *x, *error; /* (BLOCK_COLUMNS, ROWS) */
    int32_t *choice;  /* (BLOCK_COLUMNS, ROWS) */
    float *query;     /* (ROWS, d) */
    float *search;    /* pllm_search_scratch_floats(d) */
} scratch;

static int smaller_of(ptrdiff_t a, ptrdiff_t b) { return (int)(a < b ? a : b); }

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
        add_of[smaller_of(columns - c, COLUMNS)](target + c * ROWS, error, errors, panels + c * errors);
}

/* panels = rows `row`.. (count) of the feedback matrix, columns from..to-1. */
static void pack(const job *j, ptrdiff_t row, int count, ptrdiff_t from, ptrdiff_t to, float *panels)
{
    for (ptrdiff_t c = from; c < to; c += COLUMNS) {
        const int here = smaller_of(to - c, COLUMNS);
        const float *from_row = j->feedback + row * j->length + c;
        for (int m = 0; m < count; m++, panels += here, from_row += j->length) {
            if (here == COLUMNS)
                memcpy(panels, from_row, COLUMNS * sizeof *panels);
            else
                memcpy(panels, from_row, (size_t)here * sizeof *panels);
        }
    }
}

/* Shares the panels of the columns from..to-1 behind or before the block among the threads that call. */
static void pack_outside(const job *j, const block *b, ptrdiff_t from, ptrdiff_t to)
{
#pragma omp for schedule(static)
    for (ptrdiff_t c = from; c < to; c += COLUMNS)
        pack(j, b->first * j->d, b->width, c, smaller_of(to - c, COLUMNS) + c,
             b->outside + (c - from) * b->width);
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
static void prepare(const job *j, const block *b)
{
    const int d = j->d;
#pragma omp for schedule(static)
    for (ptrdiff_t l = b->first; l < b->last; l++) {
        PLLM_CONSTANT_D(set_offsets, d, &b->codebook[l - b->first], j->metric + l * d * d);
        pack(j, b->first * d, (int)(l - b->first) * d, l * d, (l + 1) * d,
             b->inside + (l - b->first) * d * BLOCK_COLUMNS);
    }
    pack_outside(j, b, b->last * d, j->length);
}

/* s->x = the columns of the block of `n` rows; zeros behind them. */
static void load_block(const job *j, const block *b, ptrdiff_t start, int n, const scratch *s)
{
    if (n < ROWS)
        memset(s->x, 0, (size_t)(b->width * ROWS) * sizeof *s->x);
    const float *from = j->x + start * j->length + b->first * j->d;
    int r = 0;
    for (; r + TOGETHER <= n; r += TOGETHER, from += TOGETHER * j->length)
        for (int c = 0; c < b->width; c++)
            for (int i = 0; i < TOGETHER; i++)
                s->x[c * ROWS + r + i] = from[i * j->length + c];
    for (; r < n; r++, from += j->length)
        for (int c = 0; c < b->width; c++)
            s->x[c * ROWS + r] = from[c];
}

/* The errors of sub-vector l of the block: x - table[choice]. */
PLLM_INLINE void set_errors(const int d, const job *j, ptrdiff_t l, const scratch *s)
{
    for (int r = 0; r < ROWS; r += VF_WIDTH) {
        const vi at = vi_mul(vi_load(s->choice + l * ROWS + r), vi_set1(d));
        for (int a = 0; a < d; a++) {
            const ptrdiff_t place = (l * d + a) * ROWS + r;
            vf_store(s->error + place, vf_sub(vf_load(s->x + place), vf_gather(j->table + a, at)));
        }
    }
}

/* The target of a sub-vector under its metric, as queries one by one. */
PLLM_INLINE void set_queries(const int d, const float *target, const float *metric, float *query)
{
    for (int r = 0; r < ROWS; r += VF_WIDTH) {
        vf x[PLLM_MAX_SUBVECTOR], y[PLLM_MAX_SUBVECTOR];
        float lanes[PLLM_MAX_SUBVECTOR][VF_WIDTH];
        for (int a = 0; a < d; a++)
            x[a] = vf_load(target + a * ROWS + r);
        apply_metric(d, metric, x, y);
        for (int a = 0; a < d; a++)
            vf_store(lanes[a], y[a]);
        for (int i = 0; i < VF_WIDTH; i++)
            for (int a = 0; a < d; a++)
                query[(r + i) * d + a] = lanes[a][i];
    }
}

/* Starts the block's targets at x, and adds what the previous choice of its sub-vectors means for those before them. */
static void start_block(const job *j, const block *b, ptrdiff_t start, const scratch *s)
{
    const int n = smaller_of(j->rows - start, ROWS), d = j->d;
    float *const target = j->target + start * j->length;
    load_block(j, b, start, n, s);
    memcpy(target + b->first * d * ROWS, s->x, (size_t)(b->width * ROWS) * sizeof *target);
    if (!j->previous)
        return;
    memset(s->choice, 0, sizeof *s->choice * BLOCK_COLUMNS * ROWS);
    for (int r = 0; r < n; r++)
        for (ptrdiff_t l = b->first; l < b->last; l++)
            s->choice[(l - b->first) * ROWS + r] = j->previous[(start + r) * j->count + l];
    for (ptrdiff_t l = 0; l < b->last - b->first; l++)
        PLLM_CONSTANT_D(set_errors, d, j, l, s);
    for (ptrdiff_t l = 0; l < b->last - b->first; l++) {
        const int later = b->width - (int)(l + 1) * d;
        add_errors(target + (b->first + l) * d * ROWS, d, s->error + (l + 1) * d * ROWS, later,
                   b->inside + l * d * BLOCK_COLUMNS);
    }
    add_errors(target, b->first * d, s->error, b->width, b->outside);
}

/* Encodes the block's sub-vectors and feeds their errors forward. */
static void encode_block(const job *j, const block *b, ptrdiff_t start, const scratch *s)
{
    const int n = smaller_of(j->rows - start, ROWS), d = j->d;
    float *const target = j->target + start * j->length;
    load_block(j, b, start, n, s);
    for (ptrdiff_t l = 0; l < b->last - b->first; l++) {
        float *const own = target + (b->first + l) * d * ROWS;
        add_errors(own, d, s->error, (int)l * d, b->inside + l * d * BLOCK_COLUMNS);
        PLLM_CONSTANT_D(set_queries, d, own, j->metric + (b->first + l) * d * d, s->query);
        PLLM_SYM(pllm_search_slice)(&b->codebook[l], s->query, ROWS, s->choice + l * ROWS, NULL, s->search);
        PLLM_CONSTANT_D(set_errors, d, j, l, s);
    }
    for (int r = 0; r < n; r++)
        for (ptrdiff_t l = b->first; l < b->last; l++)
            j->index[(start + r) * j->count + l] = s->choice[(l - b->first) * ROWS + r];
    add_errors(target + b->last * d * ROWS, j->length - b->last * d, s->error, b->width, b->outside);
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

static void set_block(block *b, const job *j, ptrdiff_t first)
{
    b->first = first;
    b->last = first + smaller_of(j->count - first, BLOCK_COLUMNS / j->d);
    b->width = (int)(b->last - b->first) * j->d;
}

/* Before any choice: targets are x, plus what the previous choice of every later sub-vector adds, in ascending order
 * of the errors. */
static void start_targets(const job *j, block *b, float *floats, int threads)
{
    const int d = j->d;
    for (ptrdiff_t first = 0; first < j->count; first = b->last) {
        set_block(b, j, first);
#pragma omp parallel num_threads(threads)
        {
            const scratch s = scratch_of(floats + (size_t)omp_get_thread_num() * scratch_floats(d), d);
            if (j->previous) {
#pragma omp for schedule(static)
                for (ptrdiff_t l = first; l < b->last; l++)
                    pack(j, (l + 1) * d, (int)(b->last - l - 1) * d, l * d, (l + 1) * d,
                         b->inside + (l - first) * d * BLOCK_COLUMNS);
                pack_outside(j, b, 0, first * d);
            }
#pragma omp for schedule(dynamic)
            for (ptrdiff_t start = 0; start < j->rows; start += ROWS)
                start_block(j, b, start, &s);
        }
    }
}

static void encode_all(const job *j, block *b, float *floats, int threads)
{
    for (ptrdiff_t first = 0; first < j->count; first = b->last) {
        set_block(b, j, first);
#pragma omp parallel num_threads(threads)
        {
            const scratch s = scratch_of(floats + (size_t)omp_get_thread_num() * scratch_floats(j->d), j->d);
            prepare(j, b);
#pragma omp for schedule(dynamic)
            for (ptrdiff_t start = 0; start < j->rows; start += ROWS)
                encode_block(j, b, start, &s);
        }
    }
}

int PLLM_SYM(pllm_encode_feedback)(const float *x, ptrdiff_t rows, ptrdiff_t count, int d,
                                   const float *table, int k, const float *metric,
                                   const float *feedback, const int32_t *previous,
                                   int32_t *index, int threads)
{
    assert(d >= 1 && d <= PLLM_MAX_SUBVECTOR && k >= 1);
    int status = PLLM_ENOMEM;
    const int block_size = BLOCK_COLUMNS / d;
    const size_t codebook_floats = pllm_codebook_floats(k, d), length = (size_t)count * (size_t)d;
    const size_t padded_rows = ((size_t)rows + ROWS - 1) / ROWS * ROWS;
    float *target = pllm_alloc_floats(padded_rows * length);
    float *blocks = pllm_alloc_floats((size_t)block_size * codebook_floats);
    float *floats = pllm_alloc_floats((size_t)threads * scratch_floats(d));
    float *panels = pllm_alloc_floats(BLOCK_COLUMNS * (BLOCK_COLUMNS + length));
    float *offset = calloc((size_t)k, sizeof *offset);
    pllm_codebook *codebook = pllm_alloc((size_t)block_size * sizeof *codebook);
    if (!target || !blocks || !floats || !panels || !offset || !codebook)
        goto done;

    job j = {.rows = rows, .count = count, .length = count * d, .d = d, .k = k, .x = x, .table = table,
             .metric = metric, .feedback = feedback, .previous = previous, .index = index, .target = target};
    block b = {.inside = panels, .outside = panels + BLOCK_COLUMNS * BLOCK_COLUMNS, .codebook = codebook};
    for (int l = 0; l < block_size; l++) /* offsets are set block by block */
        PLLM_SYM(pllm_codebook_prepare_score)(&codebook[l], table, k, d, offset, blocks + (size_t)l * codebook_floats);
    start_targets(&j, &b, floats, threads);
    encode_all(&j, &b, floats, threads);
    status = PLLM_OK;
done:
    free(codebook);
    free(offset);
    free(panels);
    free(floats);
    free(blocks);
    free(target);
    return status;
}
