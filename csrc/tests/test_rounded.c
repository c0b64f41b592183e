/* test_rounded.c - products with rounded factors against a plain loop that follows the contract, which must give the
 * same bits on every instruction set and thread count, and against the exact products, from which rounding may move them
 * only so far. */
#include "check.h"

enum { SPAN = 256, LARGEST = 2895 };

/* A line's span as integers, and its scale. */
typedef struct {
    int64_t value[SPAN];
    float scale;
} rounded_span;

static int span_length(int k, int first) { return k - first < SPAN ? k - first : SPAN; }

static float peak_of(const float *x, int count)
{
    float peak = 0.0f;
    for (int i = 0; i < count; i++)
        if (!isfinite(x[i]))
            return NAN;
        else
            peak = fmaxf(peak, fabsf(x[i]));
    return peak;
}

static void round_by_hand(const float *x, int count, rounded_span *span)
{
    const float peak = peak_of(x, count);
    const int is_empty = !(peak >= 0x1p-114f);
    for (int i = 0; i < count; i++)
        span->value[i] = is_empty ? 0 : llrintf(x[i] * ((float)LARGEST / peak));
    span->scale = peak < 0x1p-114f ? 0.0f : peak / (float)LARGEST;
}

/* x (k) times y (k). */
static float product_by_hand(const float *x, const float *y, int k)
{
    float sum = 0.0f;
    for (int first = 0; first < k; first += SPAN) {
        const int count = span_length(k, first);
        rounded_span a, b;
        int64_t dot = 0;
        round_by_hand(x + first, count, &a);
        round_by_hand(y + first, count, &b);
        for (int i = 0; i < count; i++)
            dot += a.value[i] * b.value[i];
        sum = fmaf(a.scale * b.scale, (float)dot, sum);
    }
    return sum;
}

/* How far from the exact product of finite lines it may be. */
static double reach(const float *x, const float *y, int k)
{
    double sum = 0.0;
    for (int first = 0; first < k; first += SPAN) {
        const int count = span_length(k, first);
        const double dx = peak_of(x + first, count) / (2.0 * LARGEST), dy = peak_of(y + first, count) / (2.0 * LARGEST);
        sum += 0x1p-118; /* the scale of the product may be below what float32 has */
        for (int i = first; i < first + count; i++)
            sum += dx * fabs(y[i]) + dy * fabs(x[i]) + dx * dy + 1e-6 * fabs(x[i] * y[i]);
    }
    return sum * 1.001;
}

static double exact(const float *x, const float *y, int k)
{
    double sum = 0.0;
    for (int i = 0; i < k; i++)
        sum += (double)x[i] * y[i];
    return sum;
}

static int same_float(float a, float b) { return (isnan(a) && isnan(b)) || same_bits(&a, &b, sizeof a); }

/* Lines of every magnitude, with zeros, outliers and single large spans. */
static float *new_lines(int lines, int k)
{
    float *x = new_normals((size_t)lines * (size_t)k);
    for (int l = 0; l < lines; l++)
        for (int i = 0; i < k; i++) {
            float *const value = x + l * k + i;
            if (l % 7 == 1)
                *value *= i / SPAN == 1 ? 1e4f : 1e-20f;
            else if (l % 7 == 2)
                *value = i % 100 == 5 ? 1000.0f : *value;
            else if (l % 7 == 3)
                *value = 0.0f;
        }
    return x;
}

static void check_product(const float *x, const float *y, int k, float got, int threads)
{
    CHECK(same_float(got, product_by_hand(x, y, k)), "k %d, threads %d: %g, not %g", k, threads, got,
          product_by_hand(x, y, k));
    CHECK(fabs(got - exact(x, y, k)) <= reach(x, y, k), "k %d: %g is too far from %g", k, got, exact(x, y, k));
}

static void check_linear(const pllm_kernels *kernels, int n, int m, int k, int threads)
{
    float *x = new_lines(n, k), *w = new_lines(m, k), *out = new_floats((size_t)(n * m));
    CHECK(kernels->rounded_linear(x, n, w, m, k, out, threads) == PLLM_OK, "no memory");
    for (int i = 0; i < n; i++)
        for (int j = 0; j < m; j++)
            check_product(x + i * k, w + j * k, k, out[i * m + j], threads);
    free(x);
    free(w);
    free(out);
}

/* Each row's part up to the diagonal is added to, the rest is left alone. */
static void check_gram(const pllm_kernels *kernels, int n, int k, int first, int end, int threads)
{
    float *x = new_lines(n, k), *out = new_floats((size_t)(n * n));
    for (int i = 0; i < n * n; i++)
        out[i] = (float)(i % 5);
    CHECK(kernels->rounded_gram(x, n, k, first, end, out, threads) == PLLM_OK, "no memory");
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++) {
            float want = (float)((i * n + j) % 5);
            if (i >= first && i < end && j <= i)
                want += product_by_hand(x + i * k, x + j * k, k);
            CHECK(same_float(out[i * n + j], want), "n %d, k %d: %d, %d is %g, not %g", n, k, i, j, out[i * n + j], want);
        }
    free(x);
    free(out);
}

/* All values at their largest: a span's sum is the largest that int32 has to hold. */
static void check_largest(const pllm_kernels *kernels)
{
    enum { N = 3, K = 2 * SPAN };
    float x[N * K], out[N * N];
    for (int i = 0; i < N * K; i++)
        x[i] = i / K == 1 ? -0.5f : 0.5f;
    kernels->rounded_linear(x, N, x, N, K, out, 1);
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++)
            check_product(x + i * K, x + j * K, K, out[i * N + j], 1);
}

/* Not finite: NaN in the product's rows and columns, and nowhere else. */
static void check_not_finite(const pllm_kernels *kernels, float value)
{
    enum { N = 20, K = 300 };
    float *x = new_normals(N * K), out[N * N];
    x[7 * K + 290] = value;
    kernels->rounded_linear(x, N, x, N, K, out, 2);
    for (int i = 0; i < N * N; i++)
        CHECK(!isfinite(out[i]) == (i / N == 7 || i % N == 7), "%d: %g", i, out[i]);
    free(x);
}

void test_rounded(const pllm_kernels *k)
{
    static const int sizes[][3] = {{1, 1, 1},    {5, 3, 2},     {7, 100, 255}, {13, 49, 256}, {100, 97, 257},
                                   {49, 31, 515}, {600, 50, 40}, {577, 17, 260}, {0, 5, 7},    {5, 0, 7}};
    for (int i = 0; i < (int)(sizeof sizes / sizeof *sizes); i++)
        for (int threads = 1; threads <= 3; threads += 2)
            check_linear(k, sizes[i][0], sizes[i][1], sizes[i][2], threads);
    check_gram(k, 1, 1, 0, 1, 1);
    check_gram(k, 50, 300, 0, 50, 1);
    check_gram(k, 130, 33, 0, 130, 3);
    check_gram(k, 130, 257, 100, 127, 2);
    check_gram(k, 650, 9, 10, 650, 2);
    check_gram(k, 20, 9, 20, 20, 1);
    check_largest(k);
    check_not_finite(k, NAN);
    check_not_finite(k, INFINITY);
    check_not_finite(k, -INFINITY);
}
