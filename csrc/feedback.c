/* feedback.c - encoding with error feedback along the row. Compiled once per instruction set.
 *
 * Sub-vectors are taken in blocks of columns. Inside a block, rows are independent: a thread takes
 * ROWS of them through all sub-vectors of the block, each followed by the rank-d update of the rest of
 * the block, and ends with one update of everything behind the block, which is a small matrix product.
 * Every target is one chain of fused multiply-adds over the errors before it in ascending order, so
 * neither the block size nor the instruction set nor the threads change a bit of it.
 */
#include "kernel.h"

#include <assert.h>
#include <omp.h>

enum {
    BLOCK_COLUMNS = 128, /* columns of a block, at least one sub-vector */
    ROWS = 64,           /* rows a thread takes at a time */
    TILE_ROWS = 4        /* rows whose sums stay in registers */
};

typedef struct {
    ptrdiff_t count, length; /* sub-vectors of a row; length = count d */
    int d, k;
    const float *x, *table, *feedback;
    const int32_t *previous; /* (rows, count) or NULL */
    float *target;           /* (rows, length): x plus the errors fed so far */
    pllm_codebook *codebook; /* one a sub-vector of this block: the table under its metric */
    int32_t *index;
} job;

/* Scratch of one thread. */
typedef struct {
    float *error;  /* (ROWS, columns of the block) */
    float *query;  /* (ROWS, d) */
    float *search; /* pllm_search_scratch_floats(d) */
    int32_t *found; /* (ROWS) */
} scratch;

/* Columns [from, to) of TILE_ROWS targets: target[i] += sum_m error[i][m] feedback[m], m ascending. */
PLLM_INLINE void add_tile(float *const *target, const float *const *error, int errors,
                          const float *feedback, ptrdiff_t stride, ptrdiff_t from, ptrdiff_t to,
                          const int rows)
{
    ptrdiff_t c = from;
    for (; c + 2 * VF_WIDTH <= to; c += 2 * VF_WIDTH) {
        vf low[TILE_ROWS], high[TILE_ROWS];
        PLLM_UNROLL
        for (int i = 0; i < rows; i++) {
            low[i] = vf_load(target[i] + c);
            high[i] = vf_load(target[i] + c + VF_WIDTH);
        }
        for (int m = 0; m < errors; m++) {
            const float *row = feedback + m * stride + c;
            vf a = vf_load(row), b = vf_load(row + VF_WIDTH);
            PLLM_UNROLL
            for (int i = 0; i < rows; i++) {
                vf e = vf_set1(error[i][m]);
                low[i] = vf_fma(e, a, low[i]);
                high[i] = vf_fma(e, b, high[i]);
            }
        }
        PLLM_UNROLL
        for (int i = 0; i < rows; i++) {
            vf_store(target[i] + c, low[i]);
            vf_store(target[i] + c + VF_WIDTH, high[i]);
        }
    }
    for (; c < to; c++) {
        for (int i = 0; i < rows; i++) {
            float sum = target[i][c];
            for (int m = 0; m < errors; m++)
                sum = fmaf(error[i][m], feedback[m * stride + c], sum);
            target[i][c] = sum;
        }
    }
}

/* Feeds `errors` columns of error (n, error_stride) into the columns [from, to) of target. */
static void add_errors(const job *j, float *target, ptrdiff_t n, const float *error,
                       ptrdiff_t error_stride, int errors, const float *feedback, ptrdiff_t from,
                       ptrdiff_t to)
{
    for (ptrdiff_t r = 0; r < n; r += TILE_ROWS) {
        float *t[TILE_ROWS];
        const float *e[TILE_ROWS];
        int rows = n - r < TILE_ROWS ? (int)(n - r) : TILE_ROWS;
        for (int i = 0; i < rows; i++) {
            t[i] = target + (r + i) * j->length;
            e[i] = error + (r + i) * error_stride;
        }
        if (rows == TILE_ROWS)
            add_tile(t, e, errors, feedback, j->length, from, to, TILE_ROWS);
        else
            for (int i = 0; i < rows; i++)
                add_tile(t + i, e + i, errors, feedback, j->length, from, to, 1);
    }
}

/* y = metric x, metric symmetric (d, d), each a chain in ascending order. */
static void apply_metric(const float *metric, int d, const float *x, float *y)
{
    for (int a = 0; a < d; a++) {
        float sum = metric[a * d] * x[0];
        for (int b = 1; b < d; b++)
            sum = fmaf(metric[a * d + b], x[b], sum);
        y[a] = sum;
    }
}

/* Prepares the table for the metric of one sub-vector: the score is t'Mt / 2 - (Mq)'t. */
static void prepare(const job *j, pllm_codebook *codebook, const float *metric, float *blocks,
                    float *offset)
{
    float y[PLLM_MAX_SUBVECTOR];
    for (int i = 0; i < j->k; i++) {
        const float *t = j->table + (ptrdiff_t)i * j->d;
        apply_metric(metric, j->d, t, y);
        float sum = y[0] * t[0];
        for (int a = 1; a < j->d; a++)
            sum = fmaf(y[a], t[a], sum);
        offset[i] = 0.5f * sum;
    }
    PLLM_SYM(pllm_codebook_prepare_score)(codebook, j->table, j->k, j->d, offset, blocks);
}

/* error (n, width) = x - table[choice] of sub-vector l, which starts at column `column` of it. */
static void set_error(const job *j, ptrdiff_t start, ptrdiff_t n, ptrdiff_t l, const int32_t *choice,
                      ptrdiff_t choice_stride, float *error, ptrdiff_t width)
{
    for (ptrdiff_t r = 0; r < n; r++) {
        const float *x = j->x + (start + r) * j->length + l * j->d;
        const float *t = j->table + (ptrdiff_t)choice[r * choice_stride] * j->d;
        for (int a = 0; a < j->d; a++)
            error[r * width + a] = x[a] - t[a];
    }
}

/* Targets of rows start..start+n-1 before any choice: x, plus what the previous choice of every later
 * sub-vector adds, in ascending order of the errors. */
static void start_rows(const job *j, ptrdiff_t group_size, ptrdiff_t start, ptrdiff_t n, scratch *s)
{
    const int d = j->d;
    float *target = j->target + start * j->length;
    memcpy(target, j->x + start * j->length, (size_t)(n * j->length) * sizeof *target);
    for (ptrdiff_t first = 0; first < j->count && j->previous; first += group_size) {
        ptrdiff_t last = first + group_size < j->count ? first + group_size : j->count;
        const ptrdiff_t width = (last - first) * d;
        for (ptrdiff_t l = first; l < last; l++) {
            float *error = s->error + (l - first) * d;
            set_error(j, start, n, l, j->previous + start * j->count + l, j->count, error, width);
            add_errors(j, target, n, error, width, d, j->feedback + l * d * j->length, first * d,
                       l * d);
        }
        add_errors(j, target, n, s->error, width, (int)width, j->feedback + first * d * j->length, 0,
                   first * d);
    }
}

/* Encodes sub-vectors first..last-1 of rows start..start+n-1 and feeds their errors forward. */
static void encode_rows(const job *j, const float *metric, ptrdiff_t first, ptrdiff_t last,
                        ptrdiff_t start, ptrdiff_t n, scratch *s)
{
    const int d = j->d;
    const ptrdiff_t width = (last - first) * d, end = last * d;
    float *target = j->target + start * j->length;
    for (ptrdiff_t l = first; l < last; l++) {
        for (ptrdiff_t r = 0; r < n; r++)
            apply_metric(metric + l * d * d, d, target + r * j->length + l * d, s->query + r * d);
        PLLM_SYM(pllm_search_slice)(&j->codebook[l - first], s->query, n, s->found, NULL, s->search);
        for (ptrdiff_t r = 0; r < n; r++)
            j->index[(start + r) * j->count + l] = s->found[r];
        float *error = s->error + (l - first) * d;
        set_error(j, start, n, l, s->found, 1, error, width);
        add_errors(j, target, n, error, width, d, j->feedback + l * d * j->length, (l + 1) * d, end);
    }
    add_errors(j, target, n, s->error, width, (int)width, j->feedback + first * d * j->length, end,
               j->length);
}

static scratch scratch_of(float *own, size_t error_floats, int d)
{
    float *query = own + error_floats;
    return (scratch){.error = own, .query = query, .search = query + ROWS * (d + 1),
                     .found = (int32_t *)(void *)(query + ROWS * d)};
}

int PLLM_SYM(pllm_encode_feedback)(const float *x, ptrdiff_t rows, ptrdiff_t count, int d,
                                   const float *table, int k, const float *metric,
                                   const float *feedback, const int32_t *previous,
                                   int32_t *index, int threads)
{
    assert(d >= 1 && d <= PLLM_MAX_SUBVECTOR && k >= 1);
    int status = PLLM_ENOMEM;
    const int group_size = BLOCK_COLUMNS / d;
    const size_t codebook_floats = pllm_codebook_floats(k, d);
    const size_t error_floats = (size_t)ROWS * (size_t)(group_size * d);
    const size_t thread_floats =
        error_floats + (size_t)ROWS * (size_t)(d + 1) + pllm_search_scratch_floats(d);
    float *target = pllm_alloc_floats((size_t)(rows * count) * (size_t)d);
    float *blocks = pllm_alloc_floats((size_t)group_size * codebook_floats);
    float *offsets = pllm_alloc_floats((size_t)threads * (size_t)k);
    float *floats = pllm_alloc_floats((size_t)threads * thread_floats);
    pllm_codebook *codebook = pllm_alloc((size_t)group_size * sizeof *codebook);
    if (!target || !blocks || !offsets || !floats || !codebook)
        goto done;

    job j = {.count = count, .length = count * d, .d = d, .k = k,
             .x = x, .table = table, .feedback = feedback, .previous = previous, .target = target,
             .codebook = codebook, .index = index};
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (ptrdiff_t start = 0; start < rows; start += ROWS) {
        scratch s = scratch_of(floats + (size_t)omp_get_thread_num() * thread_floats, error_floats, d);
        start_rows(&j, group_size, start, rows - start < ROWS ? rows - start : ROWS, &s);
    }
    for (ptrdiff_t first = 0; first < count && rows; first += group_size) {
        ptrdiff_t last = first + group_size < count ? first + group_size : count;
#pragma omp parallel num_threads(threads)
        {
            scratch s = scratch_of(floats + (size_t)omp_get_thread_num() * thread_floats,
                                   error_floats, d);
#pragma omp for schedule(static)
            for (ptrdiff_t l = first; l < last; l++)
                prepare(&j, &codebook[l - first], metric + l * d * d,
                        blocks + (size_t)(l - first) * codebook_floats,
                        offsets + (size_t)omp_get_thread_num() * (size_t)k);
#pragma omp for schedule(dynamic)
            for (ptrdiff_t start = 0; start < rows; start += ROWS)
                encode_rows(&j, metric, first, last, start, rows - start < ROWS ? rows - start : ROWS,
                            &s);
        }
    }
    status = PLLM_OK;
done:
    free(codebook);
    free(floats);
    free(offsets);
    free(blocks);
    free(target);
    return status;
}
