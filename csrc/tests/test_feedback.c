/* test_feedback.c - encoding with error feedback against a plain loop that follows the contract's order
 * of operations: the indices must be the same on every instruction set and thread count. */
#include "check.h"

typedef struct {
    int rows, count, d, k, threads, sweeps; /* sweeps after the first choice */
} feedback_case;

static void apply(const float *metric, int d, const float *x, float *y)
{
    for (int a = 0; a < d; a++) {
        y[a] = metric[a * d] * x[0];
        for (int b = 1; b < d; b++)
            y[a] = fmaf(metric[a * d + b], x[b], y[a]);
    }
}

/* The entry of the smallest score for the target q. */
static int choose(const feedback_case *c, const float *table, const float *metric, const float *q)
{
    float query[PLLM_MAX_SUBVECTOR], y[PLLM_MAX_SUBVECTOR], low = INFINITY;
    int best = 0;
    apply(metric, c->d, q, query);
    for (int i = 0; i < c->k; i++) {
        const float *t = table + i * c->d;
        apply(metric, c->d, t, y);
        float twice = y[0] * t[0];
        for (int a = 1; a < c->d; a++)
            twice = fmaf(y[a], t[a], twice);
        float score = 0.5f * twice;
        for (int a = 0; a < c->d; a++)
            score = fmaf(query[a], -t[a], score);
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
static void encode_row(const feedback_case *c, int sweep, const float *x, const float *table,
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
        index[l] = choose(c, table, metric + l * d * d, q);
        feed(c, x, table, feedback, l, index[l], back ? 0 : (l + 1) * d, back ? l * d : length, done);
    }
}

static void check_feedback(const pllm_kernels *k, feedback_case c)
{
    int length = c.count * c.d;
    float *x = new_normals((size_t)(c.rows * length));
    float *table = new_normals((size_t)(c.k * c.d));
    float *metric = new_floats((size_t)(c.count * c.d * c.d));
    float *feedback = new_normals((size_t)length * (size_t)length);
    float *sums = new_floats(2 * (size_t)length);
    int32_t *index = new_ints((size_t)(c.rows * c.count)), *want = new_ints((size_t)c.count);
    for (int l = 0; l < c.count; l++)
        for (int a = 0; a < c.d; a++)
            for (int b = 0; b <= a; b++) {
                float value = a == b ? 2.0f + fabsf(random_normal()) : 0.5f / (float)c.d;
                metric[(l * c.d + a) * c.d + b] = metric[(l * c.d + b) * c.d + a] = value;
            }
    for (int i = 0; i < length * length; i++)
        feedback[i] /= 1.0f + (float)length;
    for (int i = 0; i < c.k / 3; i++) /* duplicates: the lowest index must win */
        memcpy(table + (c.k - 1 - i) * c.d, table + i * c.d, (size_t)c.d * sizeof(float));

    int status = k->encode_feedback(x, c.rows, c.count, c.d, table, c.k, metric, feedback, NULL, 1,
                                    index, c.threads);
    if (c.sweeps)
        status |= k->encode_feedback(x, c.rows, c.count, c.d, table, c.k, metric, feedback, index,
                                     c.sweeps, index, c.threads);
    CHECK(status == PLLM_OK, "encode_feedback returned %d", status);
    for (int r = 0; r < c.rows; r++) {
        for (int sweep = 0; sweep <= c.sweeps; sweep++)
            encode_row(&c, sweep, x + r * length, table, metric, feedback, sums, want);
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
    free(index);
    free(want);
}

void test_feedback(const pllm_kernels *k);

void test_feedback(const pllm_kernels *k)
{
    static const feedback_case cases[] = {
        {0, 3, 2, 4, 1, 1},   {1, 1, 1, 2, 1, 1},    {3, 0, 4, 8, 1, 0},    {1, 64, 4, 33, 2, 1},
        {63, 7, 4, 16, 1, 0}, {64, 33, 4, 40, 2, 2}, {65, 19, 7, 31, 3, 1}, {130, 9, 16, 50, 2, 3},
        {5, 131, 1, 9, 2, 2}, {67, 43, 3, 64, 4, 3}, {66, 77, 4, 20, 2, 2}, {129, 57, 5, 100, 3, 1},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        check_feedback(k, cases[i]);
}
