/* test_feedback.c - encoding with error feedback against a plain loop that follows the contract's order
 * of operations: the indices must be the same on every instruction set and thread count. */
#include "check.h"

typedef struct {
    int rows, count, d, k, threads, again;
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

/* One row: what an earlier choice adds comes first, then every error is fed into all later columns as
 * soon as it is known. index: the choice, and the earlier one when there is one. */
static void encode_row(const feedback_case *c, int again, const float *x, const float *table,
                       const float *metric, const float *feedback, float *target, int32_t *index)
{
    int length = c->count * c->d;
    memcpy(target, x, (size_t)length * sizeof *target);
    for (int m = 0; m < length && again; m++) {
        float error = x[m] - table[index[m / c->d] * c->d + m % c->d];
        for (int n = 0; n < m / c->d * c->d; n++)
            target[n] = fmaf(error, feedback[m * length + n], target[n]);
    }
    for (int l = 0; l < c->count; l++) {
        index[l] = choose(c, table, metric + l * c->d * c->d, target + l * c->d);
        for (int a = 0; a < c->d; a++) {
            int m = l * c->d + a;
            float error = x[m] - table[index[l] * c->d + a];
            for (int n = (l + 1) * c->d; n < length; n++)
                target[n] = fmaf(error, feedback[m * length + n], target[n]);
        }
    }
}

static void check_feedback(const pllm_kernels *k, feedback_case c)
{
    int length = c.count * c.d;
    float *x = new_normals((size_t)(c.rows * length));
    float *table = new_normals((size_t)(c.k * c.d));
    float *metric = new_floats((size_t)(c.count * c.d * c.d));
    float *feedback = new_normals((size_t)length * (size_t)length);
    float *target = new_floats((size_t)length);
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

    int status = k->encode_feedback(x, c.rows, c.count, c.d, table, c.k, metric, feedback, NULL,
                                    index, c.threads);
    if (c.again)
        status |= k->encode_feedback(x, c.rows, c.count, c.d, table, c.k, metric, feedback, index,
                                     index, c.threads);
    CHECK(status == PLLM_OK, "encode_feedback returned %d", status);
    for (int r = 0; r < c.rows; r++) {
        for (int again = 0; again <= c.again; again++)
            encode_row(&c, again, x + r * length, table, metric, feedback, target, want);
        for (int l = 0; l < c.count; l++)
            CHECK(index[r * c.count + l] == want[l],
                  "rows %d count %d d %d k %d: index[%d][%d] is %d, want %d", c.rows, c.count, c.d,
                  c.k, r, l, index[r * c.count + l], want[l]);
    }
    free(x);
    free(table);
    free(metric);
    free(feedback);
    free(target);
    free(index);
    free(want);
}

void test_feedback(const pllm_kernels *k);

void test_feedback(const pllm_kernels *k)
{
    static const feedback_case cases[] = {
        {0, 3, 2, 4, 1, 1},   {1, 1, 1, 2, 1, 1},    {3, 0, 4, 8, 1, 0},  {1, 64, 4, 33, 2, 1},
        {63, 7, 4, 16, 1, 0}, {64, 33, 4, 40, 2, 1}, {65, 19, 7, 31, 3, 1}, {130, 9, 16, 50, 2, 1},
        {5, 131, 1, 9, 2, 1}, {67, 43, 3, 64, 4, 1}, {66, 77, 4, 20, 2, 1}, {129, 57, 5, 100, 3, 1},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        check_feedback(k, cases[i]);
}
