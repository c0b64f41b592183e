/* test_feedback.c - encoding with error feedback against a plain loop that follows the contract's order
 * of operations: the indices must be the same on every instruction set and thread count. */
#include "check.h"

typedef struct {
    int rows, count, d, k, threads, sweeps; /* sweeps after the first choice */
    int hard;                               /* metrics of every kind, not only well-conditioned ones */
} feedback_case;

static void apply(const float *metric, int d, const float *x, float *y)
{
    for (int a = 0; a < d; a++) {
        y[a] = metric[a * d] * x[0];
        for (int b = 1; b < d; b++)
            y[a] = fmaf(metric[a * d + b], x[b], y[a]);
    }
}

/* offset (k) = t'Mt / 2 of every entry. */
static void set_offsets(const feedback_case *c, const float *table, const float *metric, float *offset)
{
    for (int i = 0; i < c->k; i++) {
        const float *t = table + i * c->d;
        float y[PLLM_MAX_SUBVECTOR];
        apply(metric, c->d, t, y);
        float twice = y[0] * t[0];
        for (int a = 1; a < c->d; a++)
            twice = fmaf(y[a], t[a], twice);
        offset[i] = 0.5f * twice;
    }
}

/* The entry of the smallest score for the target q. */
static int choose(const feedback_case *c, const float *table, const float *offset, const float *metric, const float *q)
{
    float query[PLLM_MAX_SUBVECTOR], low = INFINITY;
    int best = 0;
    apply(metric, c->d, q, query);
    for (int i = 0; i < c->k; i++) {
        float score = offset[i];
        for (int a = 0; a < c->d; a++)
            score = fmaf(query[a], -table[i * c->d + a], score);
        if (score < low)
            low = score, best = i;
    }
    return best;
}

/* sum (length) += what the errors of sub-vector l mean for the columns from..to-1. */
static void feed(const feedback_case *c, const float *x, const float *table, const float *feedback, int l, int entry,
                 int from, int to, float *sum)
{
    for (int a = 0; a < c->d; a++) {
        const int m = l * c->d + a;
        const float error = x[m] - table[entry * c->d + a];
        for (int n = from; n < to; n++)
            sum[n] = fmaf(error, feedback[m * c->count * c->d + n], sum[n]);
    }
}

/* One row, every error fed into all columns ahead as soon as it is known. sweep: 0 the first choice, then 1, 2, ...
 * sums: (2, length) over the sub-vectors before and behind. */
static void encode_row(const feedback_case *c, int sweep, const float *x, const float *table, const float *offset,
                       const float *metric, const float *feedback, float *sums, int32_t *index)
{
    const int d = c->d, length = c->count * d, back = sweep > 0 && sweep % 2 == 0;
    float *const done = sums + (back ? length : 0), *const ahead = sums + (back ? 0 : length);
    memset(done, 0, (size_t)length * sizeof *done);
    if (sweep == 1) {
        memset(ahead, 0, (size_t)length * sizeof *ahead);
        for (int l = c->count - 1; l >= 0; l--)
            feed(c, x, table, feedback, l, index[l], 0, l * d, ahead);
    }
    for (int i = 0; i < c->count; i++) {
        const int l = back ? c->count - 1 - i : i;
        float q[PLLM_MAX_SUBVECTOR];
        for (int a = 0; a < d; a++) {
            q[a] = x[l * d + a];
            if (sweep > 0)
                q[a] += ahead[l * d + a];
            q[a] += done[l * d + a];
        }
        index[l] = choose(c, table, offset + l * c->k, metric + l * d * d, q);
        feed(c, x, table, feedback, l, index[l], back ? 0 : (l + 1) * d, back ? l * d : length, done);
    }
}

/* A symmetric metric (d, d): well-conditioned, or by `kind` nearly singular, with columns that count nothing, all
 * zero, tiny, indefinite or not quite symmetric. */
static void set_metric(float *metric, int d, int kind)
{
    for (int a = 0; a < d; a++)
        for (int b = 0; b <= a; b++)
            metric[a * d + b] = metric[b * d + a] = a == b ? 2.0f + fabsf(random_normal()) : 0.5f / (float)d;
    for (int a = 0; a < d; a++)
        for (int b = 0; b < d; b++) {
            float *const value = metric + a * d + b;
            if (kind == 1)
                *value = 3.0f + (a == b ? 1e-4f : 0.0f);
            else if (kind == 2 && (a == 0 || b == 0))
                *value = 0.0f;
            else if (kind == 3)
                *value = 0.0f;
            else if (kind == 4)
                *value *= 1e-30f;
            else if (kind == 5 && a != b)
                *value = 9.0f;
            else if (kind == 6 && a < b)
                *value *= 1.001f;
        }
}

static void check_feedback(const pllm_kernels *k, feedback_case c)
{
    int length = c.count * c.d;
    float *x = new_normals((size_t)(c.rows * length));
    float *table = new_normals((size_t)(c.k * c.d));
    float *metric = new_floats((size_t)(c.count * c.d * c.d));
    float *feedback = new_normals((size_t)length * (size_t)length);
    float *sums = new_floats(2 * (size_t)length), *offset = new_floats((size_t)(c.count * c.k));
    int32_t *index = new_ints((size_t)(c.rows * c.count)), *want = new_ints((size_t)c.count);
    for (int l = 0; l < c.count; l++)
        set_metric(metric + l * c.d * c.d, c.d, c.hard ? l % 7 : 0);
    for (int i = 0; i < c.rows * length && c.hard; i++) /* far from all entries: scores of many round to the same */
        x[i] *= i / length % 5 == 1 ? 1e3f : i / length % 5 == 2 ? 1e6f : 1.0f;
    for (int i = 0; i < length * length; i++)
        feedback[i] /= 1.0f + (float)length;
    for (int i = 0; i < c.k / 3; i++) /* duplicates: the lowest index must win */
        memcpy(table + (c.k - 1 - i) * c.d, table + i * c.d, (size_t)c.d * sizeof(float));
    for (int l = 0; l < c.count; l++)
        set_offsets(&c, table, metric + l * c.d * c.d, offset + l * c.k);

    int status = k->encode_feedback(x, c.rows, c.count, c.d, table, c.k, metric, feedback, NULL, 1,
                                    index, c.threads);
    if (c.sweeps)
        status |= k->encode_feedback(x, c.rows, c.count, c.d, table, c.k, metric, feedback, index,
                                     c.sweeps, index, c.threads);
    CHECK(status == PLLM_OK, "encode_feedback returned %d", status);
    for (int r = 0; r < c.rows; r++) {
        for (int sweep = 0; sweep <= c.sweeps; sweep++)
            encode_row(&c, sweep, x + r * length, table, offset, metric, feedback, sums, want);
        for (int l = 0; l < c.count; l++)
            CHECK(index[r * c.count + l] == want[l],
                  "rows %d count %d d %d k %d: index[%d][%d] is %d, want %d", c.rows, c.count, c.d,
                  c.k, r, l, index[r * c.count + l], want[l]);
    }
    free(x);
    free(table);
    free(metric);
    free(feedback);
    free(sums);
    free(offset);
    free(index);
    free(want);
}

/* Targets, entries and metrics that are no numbers, or too large for a search in buckets, give indices of the table. */
static void check_strange_numbers(const pllm_kernels *k, float strange)
{
    enum { ROWS = 130, COUNT = 3, D = 4, K = 2050 };
    float *x = new_normals(ROWS * COUNT * D), *table = new_normals(K * D), *metric = new_floats(COUNT * D * D);
    float *feedback = new_normals(COUNT * D * COUNT * D);
    int32_t *index = new_ints(ROWS * COUNT);
    for (int where = 0; where < 3; where++) {
        for (int l = 0; l < COUNT; l++)
            set_metric(metric + l * D * D, D, 0);
        (where == 0 ? x : where == 1 ? table : metric)[7] = strange;
        int status = k->encode_feedback(x, ROWS, COUNT, D, table, K, metric, feedback, NULL, 1, index, 2);
        status |= k->encode_feedback(x, ROWS, COUNT, D, table, K, metric, feedback, index, 2, index, 2);
        CHECK(status == PLLM_OK, "encode_feedback returned %d", status);
        for (int i = 0; i < ROWS * COUNT; i++)
            CHECK(index[i] >= 0 && index[i] < K, "index %d of %d is %d", i, ROWS * COUNT, index[i]);
    }
    free(x);
    free(table);
    free(metric);
    free(feedback);
    free(index);
}

void test_feedback(const pllm_kernels *k);

void test_feedback(const pllm_kernels *k)
{
    static const feedback_case cases[] = {
        {0, 3, 2, 4, 1, 1, 0},    {1, 1, 1, 2, 1, 1, 0},      {3, 0, 4, 8, 1, 0, 0},     {1, 64, 4, 33, 2, 1, 0},
        {63, 7, 4, 16, 1, 0, 0},  {64, 33, 4, 40, 2, 2, 0},   {65, 19, 7, 31, 3, 1, 0},  {130, 9, 16, 50, 2, 3, 0},
        {5, 131, 1, 9, 2, 2, 0},  {67, 43, 3, 64, 4, 3, 0},   {66, 77, 4, 20, 2, 2, 0},  {129, 57, 5, 100, 3, 1, 0},
        {64, 35, 4, 40, 2, 2, 1}, {130, 8, 4, 4096, 2, 2, 1}, {131, 7, 2, 2050, 1, 1, 1}, {128, 40, 1, 2300, 2, 1, 1},
        {150, 7, 5, 2065, 3, 1, 1}, {130, 3, 3, 10007, 2, 2, 1},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        check_feedback(k, cases[i]);
    check_strange_numbers(k, NAN);
    check_strange_numbers(k, INFINITY);
    check_strange_numbers(k, -1e20f);
}
