/* test_layer.c - one token through a decoder layer against plain loops in double, and the same bits on every
 * instruction set and thread count. */
#include "check.h"

enum { D = 4, K = 512, BITS = 9 }; /* activations are int16, not bytes */

typedef struct {
    int width, heads, kv_heads, head, inner, length, head_norms, biases, is_int8, is_bfloat16;
} layer_case;

typedef struct {
    layer_case c;
    pllm_codec codec;
    pllm_layer layer;
    void *table;
    uint8_t *packed[PLLM_LAYER_PARTS];
    float *scale[PLLM_LAYER_PARTS], *bias[PLLM_LAYER_PARTS], *norm[4], *x, *cosine, *sine;
    double *dense[PLLM_LAYER_PARTS];
    void *keys, *values; /* (kv_heads, length, head), all but the last token's */
} fixture;

static double table_value(const fixture *f, int i)
{
    return f->c.is_int8 ? ((const int8_t *)f->table)[i] * (double)f->codec.table_scale
                        : (double)((const float *)f->table)[i];
}

static void fill_matrix(fixture *f, const pllm_kernels *k, int part, int out, int in)
{
    const int count = (in + D - 1) / D;
    int32_t *index = new_ints((size_t)(out * count));
    for (int i = 0; i < out * count; i++)
        index[i] = (int32_t)(random_bits() % K);
    f->packed[part] = new_bytes((size_t)(out * pllm_row_stride_bytes(count, BITS)));
    k->pack(index, out, count, BITS, f->packed[part], 1);
    f->scale[part] = new_floats((size_t)out);
    f->dense[part] = new_bytes((size_t)(out * in) * sizeof(double));
    for (int r = 0; r < out; r++) {
        f->scale[part][r] = (1.0f + 0.3f * random_normal()) / sqrtf((float)in);
        for (int i = 0; i < in; i++)
            f->dense[part][r * in + i] =
                (double)f->scale[part][r] * table_value(f, index[r * count + i / D] * D + i % D);
    }
    f->bias[part] = f->c.biases ? new_normals((size_t)out) : NULL;
    f->layer.matrix[part] = (pllm_matrix){&f->codec, f->packed[part], out, in, f->scale[part], NULL};
    f->layer.bias[part] = f->bias[part];
    free(index);
}

static void fill_fixture(fixture *f, const pllm_kernels *k, layer_case c)
{
    const int joined = c.heads * c.head, shared = c.kv_heads * c.head, past = shared * c.length;
    *f = (fixture){.c = c};
    f->table = c.is_int8 ? new_bytes(K * D) : (void *)new_normals(K * D);
    for (int i = 0; i < K * D && c.is_int8; i++)
        ((int8_t *)f->table)[i] = (int8_t)(random_bits() % 255 - 127);
    f->codec = (pllm_codec){.d = D, .k = K, .index_bits = BITS, .table_is_int8 = c.is_int8,
                            .table_scale = c.is_int8 ? 0.015f : 1.0f, .table = f->table};
    fill_matrix(f, k, PLLM_LAYER_Q, joined, c.width);
    fill_matrix(f, k, PLLM_LAYER_K, shared, c.width);
    fill_matrix(f, k, PLLM_LAYER_V, shared, c.width);
    fill_matrix(f, k, PLLM_LAYER_O, c.width, joined);
    fill_matrix(f, k, PLLM_LAYER_GATE, c.inner, c.width);
    fill_matrix(f, k, PLLM_LAYER_UP, c.inner, c.width);
    fill_matrix(f, k, PLLM_LAYER_DOWN, c.width, c.inner);
    for (int i = 0; i < 4; i++)
        f->norm[i] = i < 2 || c.head_norms ? new_normals((size_t)(i < 2 ? c.width : c.head)) : NULL;
    for (int i = 0; i < 2; i++) {
        f->layer.norm[i] = f->norm[i];
        f->layer.head_norm[i] = f->norm[2 + i];
    }
    f->layer.head_width = c.head;
    f->layer.epsilon = 1e-6f;
    f->layer.scale = 1.0f / sqrtf((float)c.head);
    f->x = new_normals((size_t)c.width);
    f->cosine = new_floats((size_t)c.head);
    f->sine = new_floats((size_t)c.head);
    for (int i = 0; i < c.head; i++) {
        f->cosine[i] = cosf((float)(i % (c.head / 2)));
        f->sine[i] = sinf((float)(i % (c.head / 2)));
    }
    float *floats[2] = {new_normals((size_t)past), new_normals((size_t)past)};
    void *stored[2] = {floats[0], floats[1]};
    for (int i = 0; i < 2 && c.is_bfloat16; i++) {
        stored[i] = new_bytes((size_t)past * sizeof(uint16_t));
        k->narrow(floats[i], past, stored[i]);
        free(floats[i]);
    }
    f->keys = stored[0];
    f->values = stored[1];
}

static void free_fixture(fixture *f)
{
    for (int i = 0; i < PLLM_LAYER_PARTS; i++)
        free(f->packed[i]), free(f->scale[i]), free(f->bias[i]), free(f->dense[i]);
    for (int i = 0; i < 4; i++)
        free(f->norm[i]);
    free(f->table), free(f->x), free(f->cosine), free(f->sine), free(f->keys), free(f->values);
}

/* ---- in double -------------------------------------------------------------------------------- */

static void plain_norm(const double *x, const float *weight, int n, double *out)
{
    double squares = 0.0;
    for (int i = 0; i < n; i++)
        squares += x[i] * x[i];
    for (int i = 0; i < n; i++)
        out[i] = (double)weight[i] * x[i] / sqrt(squares / n + 1e-6);
}

static void plain_product(const fixture *f, int part, const double *x, double *y)
{
    const pllm_matrix *m = &f->layer.matrix[part];
    for (int r = 0; r < m->out_features; r++) {
        y[r] = f->bias[part] ? (double)f->bias[part][r] : 0.0;
        for (int i = 0; i < m->in_features; i++)
            y[r] += f->dense[part][r * m->in_features + i] * x[i];
    }
}

static void plain_heads(const fixture *f, const float *norm, int heads, double *x)
{
    const int head = f->c.head, half = head / 2;
    for (int h = 0; h < heads; h++, x += head) {
        double before[128];
        if (norm)
            plain_norm(x, norm, head, x);
        memcpy(before, x, (size_t)head * sizeof *x);
        for (int i = 0; i < head; i++)
            x[i] = before[i] * (double)f->cosine[i] +
                   (i < half ? -before[i + half] : before[i - half]) * (double)f->sine[i];
    }
}

static double past_value(const fixture *f, const void *values, int i)
{
    if (!f->c.is_bfloat16)
        return (double)((const float *)values)[i];
    const uint32_t bits = (uint32_t)((const uint16_t *)values)[i] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return (double)value;
}

static void plain_attention(const fixture *f, const double *q, double *out)
{
    const layer_case c = f->c;
    double *score = new_bytes((size_t)c.length * sizeof *score);
    for (int h = 0; h < c.heads; h++) {
        const int start = h / (c.heads / c.kv_heads) * c.length * c.head;
        double sum = 0.0;
        for (int t = 0; t < c.length; t++) {
            score[t] = 0.0;
            for (int i = 0; i < c.head; i++)
                score[t] += q[h * c.head + i] * past_value(f, f->keys, start + t * c.head + i);
            score[t] = exp(score[t] / sqrt((double)c.head));
            sum += score[t];
        }
        for (int i = 0; i < c.head; i++) {
            out[h * c.head + i] = 0.0;
            for (int t = 0; t < c.length; t++)
                out[h * c.head + i] += score[t] / sum * past_value(f, f->values, start + t * c.head + i);
        }
    }
    free(score);
}

/* q, k, v as layer_project gives them, y as layer_finish. */
static void plain_layer(const fixture *f, double *q, double *k, double *v, double *y)
{
    const layer_case c = f->c;
    double *x = new_bytes((size_t)c.width * sizeof *x), *normed = new_bytes((size_t)c.width * sizeof *x);
    double *mixed = new_bytes((size_t)(c.heads * c.head) * sizeof *x);
    double *gate = new_bytes((size_t)c.inner * sizeof *x), *up = new_bytes((size_t)c.inner * sizeof *x);
    for (int i = 0; i < c.width; i++)
        x[i] = (double)f->x[i];
    plain_norm(x, f->norm[0], c.width, normed);
    plain_product(f, PLLM_LAYER_Q, normed, q);
    plain_product(f, PLLM_LAYER_K, normed, k);
    plain_product(f, PLLM_LAYER_V, normed, v);
    plain_heads(f, f->norm[2], c.heads, q);
    plain_heads(f, f->norm[3], c.kv_heads, k);
    plain_attention(f, q, mixed);
    plain_product(f, PLLM_LAYER_O, mixed, normed);
    for (int i = 0; i < c.width; i++)
        x[i] += normed[i];
    plain_norm(x, f->norm[1], c.width, normed);
    plain_product(f, PLLM_LAYER_GATE, normed, gate);
    plain_product(f, PLLM_LAYER_UP, normed, up);
    for (int i = 0; i < c.inner; i++)
        gate[i] *= up[i] / (1.0 + exp(-gate[i]));
    plain_product(f, PLLM_LAYER_DOWN, gate, normed);
    for (int i = 0; i < c.width; i++)
        y[i] = x[i] + normed[i];
    free(x), free(normed), free(mixed), free(gate), free(up);
}

/* ---- the checks ------------------------------------------------------------------------------- */

/* Activations as int16 move by 2^-16 of the largest in a span. */
static void check_close(const char *what, const float *got, const double *want, int n, int rounded)
{
    double worst = 0.0, largest = 0.0;
    for (int i = 0; i < n; i++) {
        worst = fmax(worst, fabs((double)got[i] - want[i]));
        largest = fmax(largest, fabs(want[i]));
    }
    CHECK(worst <= (rounded ? 4e-4 : 2e-5) * largest, "%s: error %g of %g", what, worst, largest);
}

/* Outputs of both kernels: q, k, v, y one after another. */
static float *run_layer(const pllm_kernels *k, const fixture *f, int threads)
{
    const layer_case c = f->c;
    const int joined = c.heads * c.head, shared = c.kv_heads * c.head;
    const enum pllm_activations form = c.is_int8 ? PLLM_ACTIVATIONS_INTEGER : PLLM_ACTIVATIONS_FLOAT32;
    float *q = new_floats((size_t)(joined + 2 * shared + c.width));
    float *y = q + joined + 2 * shared;
    int status = k->layer_project(&f->layer, f->x, f->cosine, f->sine, q, q + joined, q + joined + shared,
                                  form, threads);
    CHECK(status == PLLM_OK, "layer_project returned %d", status);
    status = k->layer_finish(&f->layer, f->x, q, f->keys, f->values, c.length, c.is_bfloat16, y, form,
                             threads);
    CHECK(status == PLLM_OK, "layer_finish returned %d", status);
    return q;
}

static void check_layer(const pllm_kernels *k, layer_case c)
{
    fixture f;
    fill_fixture(&f, k, c);
    const int joined = c.heads * c.head, shared = c.kv_heads * c.head, all = joined + 2 * shared + c.width;
    double *want = new_bytes((size_t)all * sizeof *want);
    plain_layer(&f, want, want + joined, want + joined + shared, want + joined + 2 * shared);
    float *one = run_layer(k, &f, 1), *three = run_layer(k, &f, 3), *plain = run_layer(scalar_kernels(), &f, 1);
    check_close("queries", one, want, joined, c.is_int8);
    check_close("keys", one + joined, want + joined, shared, c.is_int8);
    check_close("values", one + joined + shared, want + joined + shared, shared, c.is_int8);
    check_close("output", one + joined + 2 * shared, want + joined + 2 * shared, c.width,
                c.is_int8);
    CHECK(same_bits(one, three, (size_t)all * sizeof *one), "layer: differs with three threads");
    CHECK(same_bits(one, plain, (size_t)all * sizeof *one), "layer: differs from scalar");
    free(want), free(one), free(three), free(plain);
    free_fixture(&f);
}

/* A token with a NaN in it gives NaN, and scores far apart neither overflow nor vanish. */
static void check_extremes(const pllm_kernels *k)
{
    fixture f;
    fill_fixture(&f, k, (layer_case){24, 2, 1, 8, 20, 5, 0, 0, 0, 0});
    for (int i = 0; i < 5 * 8; i++)
        ((float *)f.keys)[i] *= 1e4f;
    float *far = run_layer(k, &f, 1);
    int finite = 1;
    for (int i = 0; i < 2 * 8 + 2 * 8 + 24; i++)
        finite = finite && isfinite(far[i]);
    CHECK(finite, "layer: scores far apart give NaN or Inf");
    f.x[3] = NAN;
    float *bad = run_layer(k, &f, 1);
    CHECK(isnan(bad[0]) && isnan(bad[2 * 8 + 2 * 8]), "layer: NaN is lost");
    free(far), free(bad);
    free_fixture(&f);
}

void test_layer(const pllm_kernels *k)
{
    /* width, heads, key heads, head, inner, length, head norms, biases, int8, bfloat16 */
    static const layer_case cases[] = {
        {24, 2, 2, 8, 20, 1, 0, 0, 0, 0},       {36, 2, 1, 18, 52, 9, 1, 0, 1, 0},
        {40, 6, 2, 16, 33, 33, 0, 1, 1, 1},     {64, 4, 1, 64, 96, 70, 1, 1, 1, 1},
        {128, 8, 2, 32, 160, 300, 0, 0, 1, 1},  {50, 3, 3, 100, 17, 16, 0, 1, 0, 1},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        check_layer(k, cases[i]);
    check_extremes(k);
}
