/* test_layer.c - one token through a decoder layer against plain loops in double, and the same bits on every
 * instruction set and thread count. */
#include "check.h"

enum { D = 4, K = 512, BITS = 9 }; /* activations are int16, not bytes */
enum { ROOM = 3 };                 /* for this token and others */
enum { CODED_BITS = 3, CODED_BLOCKS = 2 };

typedef struct {
    int width, heads, kv_heads, head, inner, length, head_norms, biases, is_int8, is_bfloat16;
    int coded; /* keys and what is gated are in trellis codes */
} layer_case;

typedef struct {
    layer_case c;
    pllm_codec codec, coded;
    pllm_trellis trellis;
    uint8_t block_bits[CODED_BLOCKS];
    int8_t magnitude[PLLM_TRELLIS_TABLE];
    pllm_layer layer;
    void *table;
    uint8_t *packed[PLLM_LAYER_PARTS];
    float *scale[PLLM_LAYER_PARTS], *bias[PLLM_LAYER_PARTS], *norm[4], *x, *cosine, *sine;
    double *dense[PLLM_LAYER_PARTS];
    pllm_past past; /* of the tokens before, in a room of ROOM more */
} fixture;

static double table_value(const fixture *f, int i)
{
    return f->c.is_int8 ? ((const int8_t *)f->table)[i] * (double)f->codec.table_scale
                        : (double)((const float *)f->table)[i];
}

/* In trellis codes; what they mean test_coded.c checks. */
static void fill_coded(fixture *f, int part, int out, int in)
{
    const size_t bytes = (size_t)pllm_trellis_offset(&f->trellis, in, out);
    float *rows = new_floats((size_t)(out * in));
    f->packed[part] = new_bytes(bytes);
    for (size_t i = 0; i < bytes; i++)
        f->packed[part][i] = (uint8_t)random_bits();
    f->scale[part] = new_floats((size_t)out);
    for (int r = 0; r < out; r++)
        f->scale[part][r] = 0.02f / sqrtf((float)in);
    f->bias[part] = f->c.biases ? new_normals((size_t)out) : NULL;
    f->layer.matrix[part] = (pllm_matrix){&f->coded, f->packed[part], out, in, f->scale[part], NULL};
    f->layer.bias[part] = f->bias[part];
    scalar_kernels()->decode_rows(&f->layer.matrix[part], 0, NULL, out, rows, 1);
    f->dense[part] = new_bytes((size_t)(out * in) * sizeof(double));
    for (int i = 0; i < out * in; i++)
        f->dense[part][i] = (double)rows[i];
    free(rows);
}

static void fill_matrix(fixture *f, const pllm_kernels *k, int part, int out, int in)
{
    if (f->c.coded && (part == PLLM_LAYER_K || part == PLLM_LAYER_UP)) {
        fill_coded(f, part, out, in);
        return;
    }
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
    const int joined = c.heads * c.head, shared = c.kv_heads * c.head, past = shared * (c.length + ROOM);
    *f = (fixture){.c = c};
    f->table = c.is_int8 ? new_bytes(K * D) : (void *)new_normals(K * D);
    for (int i = 0; i < K * D && c.is_int8; i++)
        ((int8_t *)f->table)[i] = (int8_t)(random_bits() % 255 - 127);
    f->codec = (pllm_codec){.d = D, .k = K, .index_bits = BITS, .table_is_int8 = c.is_int8,
                            .table_scale = c.is_int8 ? 0.015f : 1.0f, .table = f->table};
    memset(f->block_bits, CODED_BITS, sizeof f->block_bits);
    for (int i = 0; i < PLLM_TRELLIS_TABLE; i++)
        f->magnitude[i] = (int8_t)(random_bits() % (PLLM_TRELLIS_SMALL + 1));
    f->trellis = (pllm_trellis){.block_bits = f->block_bits, .magnitude = f->magnitude};
    f->coded = (pllm_codec){.d = 1, .k = 1, .index_bits = 1, .table_scale = 1.0f, .trellis = &f->trellis};
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
    f->past = (pllm_past){stored[0], stored[1], c.length, c.length + ROOM, c.is_bfloat16};
}

static void free_fixture(fixture *f)
{
    for (int i = 0; i < PLLM_LAYER_PARTS; i++)
        free(f->packed[i]), free(f->scale[i]), free(f->bias[i]), free(f->dense[i]);
    for (int i = 0; i < 4; i++)
        free(f->norm[i]);
    free(f->table), free(f->x), free(f->cosine), free(f->sine), free(f->past.keys), free(f->past.values);
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

/* Value i of a token's head. */
static double past_value(const fixture *f, const void *values, int head, int token, int i)
{
    const ptrdiff_t at = (head * f->past.room + token) * f->c.head + i;
    if (!f->c.is_bfloat16)
        return (double)((const float *)values)[at];
    const uint32_t bits = (uint32_t)((const uint16_t *)values)[at] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return (double)value;
}

/* To the tokens before and the token itself, as it was kept. */
static void plain_attention(const fixture *f, const double *q, double *out)
{
    const layer_case c = f->c;
    double *score = new_bytes((size_t)(c.length + 1) * sizeof *score);
    for (int h = 0; h < c.heads; h++) {
        const int kv = h / (c.heads / c.kv_heads);
        double sum = 0.0;
        for (int t = 0; t <= c.length; t++) {
            score[t] = 0.0;
            for (int i = 0; i < c.head; i++)
                score[t] += q[h * c.head + i] * past_value(f, f->past.keys, kv, t, i);
            score[t] = exp(score[t] / sqrt((double)c.head));
            sum += score[t];
        }
        for (int i = 0; i < c.head; i++) {
            out[h * c.head + i] = 0.0;
            for (int t = 0; t <= c.length; t++)
                out[h * c.head + i] += score[t] / sum * past_value(f, f->past.values, kv, t, i);
        }
    }
    free(score);
}

/* k, v: of the token; y: the layer's output, after the kernel has kept them. */
static void plain_layer(const fixture *f, double *k, double *v, double *y)
{
    const layer_case c = f->c;
    double *q = new_bytes((size_t)(c.heads * c.head) * sizeof *q);
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
    free(q), free(x), free(normed), free(mixed), free(gate), free(up);
}

/* ---- the checks ------------------------------------------------------------------------------- */

static void check_close(const char *what, const float *got, const double *want, int n, double tolerance)
{
    double worst = 0.0, largest = 0.0;
    for (int i = 0; i < n; i++) {
        worst = fmax(worst, fabs((double)got[i] - want[i]));
        largest = fmax(largest, fabs(want[i]));
    }
    CHECK(worst <= tolerance * largest, "%s: error %g of %g", what, worst, largest);
}

static size_t past_bytes(const fixture *f)
{
    const size_t size = f->c.is_bfloat16 ? sizeof(uint16_t) : sizeof(float);
    return (size_t)(f->c.kv_heads * f->c.head) * (size_t)f->past.room * size;
}

/* What a token gives: its keys and values (kv_heads, head) as they were kept, and y, one after another. */
static float *run_layer(const pllm_kernels *k, const fixture *f, int threads)
{
    const layer_case c = f->c;
    const int shared = c.kv_heads * c.head;
    const enum pllm_activations form = c.is_int8 ? PLLM_ACTIVATIONS_INTEGER : PLLM_ACTIVATIONS_FLOAT32;
    const size_t row = (size_t)c.head * (c.is_bfloat16 ? sizeof(uint16_t) : sizeof(float));
    void *const past[2] = {f->past.keys, f->past.values};
    uint8_t *before[2];
    float *const made = new_floats((size_t)(2 * shared + c.width));
    for (int i = 0; i < 2; i++) {
        before[i] = new_bytes(past_bytes(f));
        memcpy(before[i], past[i], past_bytes(f));
    }
    const int status =
        k->layer_token(&f->layer, f->x, f->cosine, f->sine, &f->past, made + 2 * shared, form, threads);
    CHECK(status == PLLM_OK, "layer_token returned %d", status);
    for (int i = 0; i < 2; i++) {
        for (int h = 0; h < c.kv_heads; h++) {
            const size_t at = (size_t)(h * f->past.room + c.length) * row;
            for (int j = 0; j < c.head; j++)
                made[i * shared + h * c.head + j] = (float)past_value(f, past[i], h, c.length, j);
            memcpy(before[i] + at, (uint8_t *)past[i] + at, row);
        }
        CHECK(same_bits(before[i], past[i], past_bytes(f)), "layer: writes beside the token's own");
        free(before[i]);
    }
    return made;
}

/* Activations as int16 move by 2^-16 of the largest in a span, as bytes by a 254th of the largest in a block, bfloat16
 * is rounded by 2^-8 of a value. */
static void check_layer(const pllm_kernels *k, layer_case c)
{
    fixture f;
    fill_fixture(&f, k, c);
    const int shared = c.kv_heads * c.head, all = 2 * shared + c.width;
    const double tolerance = !c.is_int8 ? 2e-5 : c.coded ? 2e-2 : 4e-4, kept = tolerance + (c.is_bfloat16 ? 0x1p-8 : 0.0);
    double *want = new_bytes((size_t)all * sizeof *want);
    float *plain = run_layer(scalar_kernels(), &f, 1), *three = run_layer(k, &f, 3), *one = run_layer(k, &f, 1);
    plain_layer(&f, want, want + shared, want + 2 * shared);
    check_close("keys", one, want, shared, kept);
    check_close("values", one + shared, want + shared, shared, kept);
    check_close("output", one + 2 * shared, want + 2 * shared, c.width, tolerance);
    CHECK(same_bits(one, three, (size_t)all * sizeof *one), "layer: differs with three threads");
    CHECK(same_bits(one, plain, (size_t)all * sizeof *one), "layer: differs from scalar");
    free(want), free(one), free(three), free(plain);
    free_fixture(&f);
}

/* A token with a NaN in it gives NaN, and scores far apart neither overflow nor vanish. */
static void check_extremes(const pllm_kernels *k)
{
    enum { WIDTH = 24, HEAD = 8, LENGTH = 5 };
    fixture f;
    fill_fixture(&f, k, (layer_case){WIDTH, 2, 1, HEAD, 20, LENGTH, 0, 0, 0, 0, 0});
    for (int i = 0; i < LENGTH * HEAD; i++)
        ((float *)f.past.keys)[i] *= 1e4f;
    float *far = run_layer(k, &f, 1);
    int finite = 1;
    for (int i = 0; i < 2 * HEAD + WIDTH; i++)
        finite = finite && isfinite(far[i]);
    CHECK(finite, "layer: scores far apart give NaN or Inf");
    f.x[3] = NAN;
    float *bad = run_layer(k, &f, 1);
    CHECK(isnan(bad[0]) && isnan(bad[2 * HEAD]), "layer: NaN is lost");
    free(far), free(bad);
    free_fixture(&f);
}

void test_layer(const pllm_kernels *k)
{
    /* width, heads, key heads, head, inner, length, head norms, biases, int8, bfloat16, coded */
    static const layer_case cases[] = {
        {24, 2, 2, 8, 20, 0, 0, 0, 0, 0, 0},      {36, 2, 1, 18, 52, 9, 1, 0, 1, 0, 0},
        {40, 6, 2, 16, 33, 33, 0, 1, 1, 1, 0},    {64, 4, 1, 64, 96, 70, 1, 1, 1, 1, 0},
        {128, 8, 2, 32, 160, 300, 0, 0, 1, 1, 0}, {50, 3, 3, 100, 17, 16, 0, 1, 0, 1, 0},
        {72, 4, 2, 32, 200, 20, 0, 1, 1, 0, 1},   {250, 2, 1, 64, 300, 7, 1, 0, 0, 0, 1},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        check_layer(k, cases[i]);
    check_extremes(k);
}
