/* test_training.c - the codec's kernels: gelu and an MLP against plain loops in double, gradients against
 * differences, and everything bit for bit against the scalar kernels with another thread count. */
#include "check.h"

enum { OUTPUTS = 16, LARGEST = 70000 }; /* LARGEST: work of a case under emulation */

typedef struct {
    pllm_coder coder;
    ptrdiff_t rows, length;
    int k, weighted;
} training_case;

static size_t mlp_floats(int d, int h) { return (size_t)(2 * h * d + h + d); }

static void plain_mlp(const float *x, int d, int h, const float *params, double *out)
{
    const float *w1 = params, *b1 = w1 + h * d, *w2 = b1 + h, *b2 = w2 + d * h;
    for (int j = 0; j < d; j++)
        out[j] = b2[j];
    for (int i = 0; i < h; i++) {
        double a = b1[i];
        for (int j = 0; j < d; j++)
            a += (double)w1[i * d + j] * x[j];
        a *= 0.5 * (1.0 + erf(a / sqrt(2.0)));
        for (int j = 0; j < d; j++)
            out[j] += w2[j * h + i] * a;
    }
}

static void check_mlp(const pllm_kernels *k, ptrdiff_t n, int d, int h)
{
    float *x = new_normals((size_t)(n * d)), *params = new_normals(mlp_floats(d, h));
    float *out = new_floats((size_t)(n * d));
    double want[PLLM_MAX_SUBVECTOR];
    CHECK(k->mlp(x, n, d, h, params, out, 2) == PLLM_OK, "mlp: no memory");
    for (ptrdiff_t i = 0; i < n; i++) {
        plain_mlp(x + i * d, d, h, params, want);
        for (int j = 0; j < d; j++)
            CHECK(fabs(out[i * d + j] - want[j]) < 1e-5 * (10.0 + fabs(want[j])),
                  "mlp n %td d %d h %d: %g is not %g", n, d, h, (double)out[i * d + j], want[j]);
    }
    free(x), free(params), free(out);
}

/* gelu and its slope at n values of x, through an MLP whose weights are 1 and biases 0. */
static void run_gelu(const pllm_kernels *k, const float *x, ptrdiff_t n, float *value, float *slope)
{
    const float params[4] = {1.0f, 0.0f, 1.0f, 0.0f};
    float *grad = new_floats((size_t)n), grad_params[4];
    for (ptrdiff_t i = 0; i < n; i++)
        grad[i] = 1.0f;
    CHECK(k->mlp(x, n, 1, 1, params, value, 1) == PLLM_OK, "gelu: no memory");
    CHECK(k->mlp_backward(x, n, 1, 1, params, grad, slope, grad_params, 1) == PLLM_OK,
          "gelu: no memory");
    free(grad);
}

static void check_gelu(const pllm_kernels *k)
{
    enum { N = 6007 };
    float *x = new_floats(N), *value = new_floats(N), *slope = new_floats(N);
    for (int i = 0; i < N; i++) /* dense near 0, to -32 and 32, and denormals of both signs */
        x[i] = (i % 2 ? 1.0f : -1.0f) * (i < 4000 ? 0.008f * (float)i : ldexpf(1.7f, (i - 6007) / 12));
    run_gelu(k, x, N, value, slope);
    for (int i = 0; i < N; i++) {
        const double cdf = 0.5 * erfc(-x[i] / sqrt(2.0)), at = x[i];
        const double want = cdf + at * exp(-0.5 * at * at) * 0.3989422804014327;
        CHECK(fabs(value[i] - at * cdf) <= 2e-7 * fabs(at) + 1.5e-45, "gelu(%g) is %g, not %g", at,
              (double)value[i], at * cdf);
        CHECK(fabs(slope[i] - want) <= 2e-7, "slope of gelu(%g) is %g, not %g", at, (double)slope[i],
              want);
    }
    const float far[] = {-INFINITY, -3e38f, -1e30f, -13.0f, 13.0f, 1e30f, 3e38f, INFINITY, NAN};
    run_gelu(k, far, 9, value, slope);
    for (int i = 0; i < 8; i++) {
        CHECK(i < 4 ? fabsf(value[i]) < 1e-30f : value[i] == far[i], "gelu(%g) is %g", (double)far[i],
              (double)value[i]);
        CHECK(i < 4 ? fabsf(slope[i]) < 1e-30f : slope[i] == 1.0f, "slope of gelu(%g) is %g",
              (double)far[i], (double)slope[i]);
    }
    CHECK(isnan(value[8]) && isnan(slope[8]), "gelu(NaN) is %g, slope %g", (double)value[8],
          (double)slope[8]);
    free(x), free(value), free(slope);
}

/* The gradient of sum(out * grad) along a random direction of the parameters. */
static void check_mlp_gradient(const pllm_kernels *k, ptrdiff_t n, int d, int h)
{
    size_t size = mlp_floats(d, h);
    float *x = new_normals((size_t)(n * d)), *params = new_normals(size), *moved = new_floats(size);
    float *grad = new_normals((size_t)(n * d)), *direction = new_normals(size);
    float *grad_x = new_floats((size_t)(n * d)), *grad_params = new_floats(size);
    double value[2] = {0.0, 0.0}, out[PLLM_MAX_SUBVECTOR], slope = 0.0, scale = 1.0;
    const float step = 1e-3f;
    CHECK(k->mlp_backward(x, n, d, h, params, grad, grad_x, grad_params, 1) == PLLM_OK, "no memory");
    for (int side = 0; side < 2; side++) {
        for (size_t i = 0; i < size; i++)
            moved[i] = params[i] + (side ? step : -step) * direction[i];
        for (ptrdiff_t i = 0; i < n; i++) {
            plain_mlp(x + i * d, d, h, moved, out);
            for (int j = 0; j < d; j++)
                value[side] += out[j] * grad[i * d + j];
        }
    }
    for (size_t i = 0; i < size; i++) {
        slope += (double)grad_params[i] * direction[i];
        scale += fabs((double)grad_params[i] * direction[i]);
    }
    double difference = (value[1] - value[0]) / (2.0 * (double)step);
    CHECK(fabs(slope - difference) < 1e-3 * scale, "mlp_backward n %td d %d h %d: %g is not %g", n, d,
          h, slope, difference);
    free(x), free(params), free(moved), free(grad), free(direction), free(grad_x), free(grad_params);
}

typedef struct {
    void *data[OUTPUTS];
    size_t bytes[OUTPUTS];
    int count;
} outputs;

static void *output(outputs *o, size_t bytes)
{
    o->data[o->count] = new_bytes(bytes);
    o->bytes[o->count] = bytes;
    return o->data[o->count++];
}

/* Inputs of one case, the same for every kernel table. */
typedef struct {
    float *rows, *grad, *encoder, *decoder, *codebook, *weight;
} inputs;

static outputs run_all(const pllm_kernels *k, const training_case *c, const inputs *in, int threads)
{
    const pllm_coder *coder = &c->coder;
    const size_t values = (size_t)(c->rows * c->length), size = 3 * mlp_floats(coder->d, coder->h);
    const size_t vectors = values / (size_t)coder->d, book = (size_t)(c->k * coder->d);
    const size_t f = sizeof(float);
    outputs o = {.count = 0};
    int status = k->rln(in->rows, c->rows, c->length, output(&o, values * f), threads);
    status |= k->rln_backward(in->rows, in->grad, c->rows, c->length, output(&o, values * f), threads);
    status |= k->encode(coder, in->rows, c->rows, c->length, in->encoder, output(&o, values * f),
                        threads);
    status |= k->decode(coder, in->rows, c->rows, c->length, in->decoder, output(&o, values * f),
                        threads);
    float *grad_rows = output(&o, values * f), *grad_params = output(&o, size * f);
    status |= k->encode_backward(coder, in->rows, c->rows, c->length, in->encoder, in->grad,
                                 grad_rows, grad_params, threads);
    grad_rows = output(&o, values * f), grad_params = output(&o, size * f);
    status |= k->decode_backward(coder, in->rows, c->rows, c->length, in->decoder, in->grad,
                                 grad_rows, grad_params, threads);
    if (vectors > 0) {
        pllm_step s = {.coder = *coder, .k = c->k, .rows = in->rows, .row_count = c->rows,
                       .length = c->length, .encoder = in->encoder, .codebook = in->codebook,
                       .decoder = in->decoder, .codebook_loss = 0.5f};
        s.weight = c->weighted ? in->weight : NULL;
        s.weight_row_stride = c->weighted == 2 ? c->length : 0;
        s.index = output(&o, vectors * sizeof *s.index);
        s.latents = output(&o, values * f);
        s.grad_encoder = output(&o, size * f);
        s.grad_decoder = output(&o, size * f);
        s.grad_codebook = output(&o, book * f);
        status |= k->train_step(&s, threads);
        CHECK(s.reconstruction >= 0.0 && s.commitment >= 0.0, "losses are not numbers");
        double *sum = output(&o, book * sizeof *sum), *mass = output(&o, (size_t)c->k * sizeof *mass);
        k->cluster_sums(s.latents, (ptrdiff_t)vectors, coder->d, s.index, c->k, NULL, 0, sum, mass,
                        threads);
        float *param = output(&o, size * f), *mean = calloc(size, f), *variance = calloc(size, f);
        memcpy(param, in->encoder, size * f);
        k->adam(param, s.grad_encoder, mean, variance, (ptrdiff_t)size, 1, 0.01, 0.9, 0.999, 1e-8,
                threads);
        free(mean), free(variance);
    }
    CHECK(status == PLLM_OK, "no memory");
    return o;
}

static void check_case(const pllm_kernels *k, const training_case *c)
{
    const size_t values = (size_t)(c->rows * c->length);
    const size_t size = 3 * mlp_floats(c->coder.d, c->coder.h);
    const inputs in = {new_normals(values), new_normals(values), new_normals(size),
                       new_normals(size), new_normals((size_t)(c->k * c->coder.d)),
                       new_floats(c->weighted == 2 ? values : (size_t)c->length)};
    for (size_t i = 0; i < (c->weighted == 2 ? values : (size_t)c->length); i++)
        in.weight[i] = 0.5f + (float)(i % 7);
    outputs got = run_all(k, c, &in, 3), want = run_all(scalar_kernels(), c, &in, 1);
    for (int i = 0; i < got.count; i++) {
        CHECK(same_bits(got.data[i], want.data[i], got.bytes[i]),
              "output %d differs from scalar: rows %td length %td d %d h %d norm %d", i, c->rows,
              c->length, c->coder.d, c->coder.h, c->coder.norm);
        free(got.data[i]), free(want.data[i]);
    }
    free(in.rows), free(in.grad), free(in.encoder), free(in.decoder), free(in.codebook);
    free(in.weight);
}

void test_training(const pllm_kernels *k)
{
    static const int shapes[][2] = {{1, 1}, {2, 7}, {3, 5}, {4, 16}, {8, 16}, {16, 64}};
    check_gelu(k);
    for (int s = 0; s < 6; s++) {
        const int d = shapes[s][0], h = shapes[s][1];
        check_mlp_gradient(k, 37, d, h);
        for (int i = 0; i < AWKWARD_SIZES; i += 3) {
            const int n = awkward_sizes[i];
            if (n * d * h > LARGEST)
                continue;
            check_mlp(k, n, d, h);
            for (int norm = PLLM_NORM_INPUT; norm <= PLLM_NORM_RLN; norm++)
                check_case(k, &(training_case){{d, h, norm}, 1 + i % 4, n * d, 1 + 7 * i, i % 3});
        }
    }
}
