/* test_coded.c - rows of matrices in trellis codes and products with them, against plain loops in double. Every
 * array has exactly the size it needs, so that a sanitizer sees each byte too many. All must be the same, bit for
 * bit, on every instruction set and thread count. */
#include "check.h"

enum { MAX_BLOCKS = 16 };

typedef struct {
    int out, in, extra, own, tokens; /* own: columns have an order and factors */
    int bits[MAX_BLOCKS];            /* of each block; the last that is given again behind it */
} coded_case;

typedef struct {
    coded_case c;
    uint8_t *block_bits, *packed;
    int8_t *magnitude;
    int32_t *order;
    float *factor, *scale, *shift, *x, *bias;
    pllm_trellis trellis;
    pllm_codec codec;
    pllm_matrix matrix;
    ptrdiff_t *row_start, start[2][PLLM_TRELLIS_BITS]; /* of rows in the payload, of planes in rows */
    double *dense;                                     /* (out, in) */
} fixture;

/* Bits that a row's weights have more than those of others. */
static int more_bits(const fixture *f, int row) { return (row + 1) * f->c.extra / 4 - row * f->c.extra / 4; }

/* Bits of the weight at a place. */
static int bits_at(const fixture *f, int row, int at)
{
    const int k = f->block_bits[at / PLLM_TRELLIS_BLOCK];
    return k ? k + more_bits(f, row) : 0;
}

/* Fills f->start, for rows without and with a bit more. */
static void find_planes(fixture *f)
{
    for (int more = 0; more < 2; more++)
        for (int p = 0; p + 1 < PLLM_TRELLIS_BITS; p++) {
            int columns = 0;
            for (int at = 0; at < f->c.in; at++) {
                const int k = f->block_bits[at / PLLM_TRELLIS_BLOCK];
                columns += k && k + more > p;
            }
            f->start[more][p + 1] = f->start[more][p] + (columns + 7) / 8;
        }
}

/* Bit p of the weight at a place, from the payload. */
static int plane_bit(const fixture *f, int row, int at, int p)
{
    const ptrdiff_t start = f->row_start[row] + f->start[more_bits(f, row)][p];
    return f->packed[start + at / 8] >> at % 8 & 1;
}

static int parity(int x)
{
    int sum = 0;
    for (; x; x >>= 1)
        sum ^= x & 1;
    return sum;
}

/* The level of the weight at a place, by pllm.h's words. */
static int level_at(const fixture *f, int row, int at)
{
    static const int taps[] = PLLM_TRELLIS_TAPS;
    const int k = bits_at(f, row, at), out = f->c.out;
    if (k == 0)
        return 0;
    const int segments = out < 512 ? 1 : out / 256, segment = row / 256 < segments ? row / 256 : segments - 1;
    const int first = segment * 256, count = segment + 1 < segments ? 256 : out - first;
    int window = 0, index = 0;
    for (int i = 0; i < 9; i++) {
        int before = row - i;
        if (before < first && count < PLLM_TRELLIS_SHORT)
            continue;
        before += before < first ? count : 0;
        window |= plane_bit(f, before, at, 0) << i;
    }
    for (int i = 0; i < 3; i++)
        index |= parity(taps[i] & window) << i;
    for (int p = 1; p < k; p++)
        index |= plane_bit(f, row, at, p) << (p + 2);
    const int half = 2 << k, rest = index % half;
    const int8_t *const magnitude = f->magnitude + half - 4;
    return index >= half ? -magnitude[half - 1 - rest] : magnitude[rest];
}

/* The most that magnitude i may be. */
static int most_at(int most, int i) { return i < PLLM_TRELLIS_SMALLS && most > PLLM_TRELLIS_SMALL ? PLLM_TRELLIS_SMALL : most; }

/* most: of magnitudes. */
static void fill_fixture(fixture *f, coded_case c, int most, int with_shift)
{
    const int blocks = (c.in + PLLM_TRELLIS_BLOCK - 1) / PLLM_TRELLIS_BLOCK;
    *f = (fixture){.c = c};
    f->block_bits = new_bytes((size_t)blocks);
    for (int b = 0, k = 0; b < blocks; b++) {
        if (b < MAX_BLOCKS && (b == 0 || c.bits[b]))
            k = c.bits[b] < 0 ? 0 : c.bits[b];
        f->block_bits[b] = (uint8_t)k;
    }
    f->magnitude = new_bytes(PLLM_TRELLIS_TABLE);
    for (int i = 0; i < PLLM_TRELLIS_TABLE; i++)
        f->magnitude[i] = (int8_t)(random_bits() % (unsigned)(1 + most_at(most, i)));
    if (c.own) {
        f->order = new_ints((size_t)c.in);
        f->factor = new_floats((size_t)c.in);
        for (int i = 0; i < c.in; i++) {
            const int other = (int)(random_bits() % (unsigned)(i + 1));
            f->order[i] = f->order[other];
            f->order[other] = i;
            f->factor[i] = 0.25f + (float)(random_bits() % 100) / 64.0f;
        }
    }
    f->trellis = (pllm_trellis){f->block_bits, c.extra, f->magnitude, f->order, f->factor};
    const size_t bytes = (size_t)pllm_trellis_offset(&f->trellis, c.in, c.out);
    f->row_start = new_bytes((size_t)c.out * sizeof *f->row_start);
    for (int r = 0; r < c.out; r++)
        f->row_start[r] = pllm_trellis_offset(&f->trellis, c.in, r);
    find_planes(f);
    f->packed = new_bytes(bytes);
    for (size_t i = 0; i < bytes; i++)
        f->packed[i] = (uint8_t)random_bits();
    f->codec = (pllm_codec){.d = 1, .k = 1, .index_bits = 1, .table_scale = 1.0f, .trellis = &f->trellis};
    f->scale = new_normals((size_t)c.out);
    f->shift = with_shift ? new_normals((size_t)c.out) : NULL;
    f->matrix = (pllm_matrix){&f->codec, f->packed, c.out, c.in, f->scale, f->shift};
    f->x = new_normals((size_t)(c.tokens * c.in));
    f->bias = new_normals((size_t)c.out);
    f->dense = new_bytes((size_t)(c.out * c.in) * sizeof(double));
    for (int r = 0; r < c.out; r++)
        for (int at = 0; at < c.in; at++) {
            const float value = (float)level_at(f, r, at) * (c.own ? f->factor[at] : 1.0f) * f->scale[r];
            f->dense[r * c.in + (c.own ? f->order[at] : at)] = (double)(with_shift ? value + f->shift[r] : value);
        }
}

static void free_fixture(fixture *f)
{
    void *const owned[] = {f->block_bits, f->packed, f->magnitude, f->order, f->factor,   f->scale,
                           f->shift,      f->x,      f->bias,      f->dense, f->row_start};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++)
        free(owned[i]);
}

static void check_rows(const pllm_kernels *k, const fixture *f)
{
    const int out = f->c.out, in = f->c.in;
    float *rows = new_floats((size_t)(out * in)), *last = new_floats((size_t)in);
    const int64_t index = out - 1;
    CHECK(k->decode_rows(&f->matrix, 0, NULL, out, rows, 2) == PLLM_OK, "decode_rows failed");
    int wrong = 0;
    for (int i = 0; i < out * in; i++)
        wrong += (double)rows[i] != f->dense[i];
    CHECK(wrong == 0, "decode_rows: %d values of %d x %d are wrong", wrong, out, in);
    k->decode_rows(&f->matrix, 0, &index, 1, last, 1);
    CHECK(same_bits(last, rows + (out - 1) * in, (size_t)in * sizeof *last), "the last row differs alone");
    free(rows), free(last);
}

/* step (in) = how far each activation of a token, in stored order and times its factor, moves when it becomes an
 * integer. */
static void rounding_of(const fixture *f, const float *x, double *step)
{
    const int in = f->c.in;
    double *size = new_bytes((size_t)in * sizeof *size);
    for (int at = 0; at < in; at++)
        size[at] = fabs((double)x[f->c.own ? f->order[at] : at] * (f->c.own ? (double)f->factor[at] : 1.0));
    rounding_steps(size, in, 1, step);
    free(size);
}

static void check_products(const pllm_kernels *k, const fixture *f, enum pllm_activations form)
{
    const int out = f->c.out, in = f->c.in, tokens = f->c.tokens;
    const size_t size = (size_t)(tokens * out) * sizeof(float);
    float *y = new_bytes(size), *other = new_bytes(size);
    CHECK(k->matmul(&f->matrix, f->x, tokens, f->bias, y, PLLM_FLOAT32, form, 1) == PLLM_OK, "matmul failed");
    double worst = 0.0;
    for (int t = 0; t < tokens; t++) {
        const float *const x = f->x + t * in;
        double *step = new_bytes((size_t)in * sizeof *step);
        memset(step, 0, (size_t)in * sizeof *step);
        if (form == PLLM_ACTIVATIONS_INTEGER)
            rounding_of(f, x, step);
        for (int r = 0; r < out; r++) {
            const double s = f->shift ? (double)f->shift[r] : 0.0;
            double sum = (double)f->bias[r], allowed = 1e-6 * fabs(sum);
            for (int at = 0; at < in; at++) {
                const int column = f->c.own ? f->order[at] : at;
                const double w = f->dense[r * in + column], xs = (double)x[column];
                sum += xs * w;
                allowed += 2e-6 * fabs(xs) * (fabs(w - s) + fabs(s)) +
                           step[at] * fabs(w - s) / (f->c.own ? (double)f->factor[at] : 1.0);
            }
            worst = fmax(worst, fabs((double)y[t * out + r] - sum) / allowed);
        }
        free(step);
    }
    CHECK(worst < 1.0, "matmul: error %g of what is allowed, %d x %d, tokens %d, form %d", worst, out, in, tokens,
          (int)form);
    k->matmul(&f->matrix, f->x, tokens, f->bias, other, PLLM_FLOAT32, form, 3);
    CHECK(same_bits(y, other, size), "matmul depends on threads, %d x %d, tokens %d", out, in, tokens);
    scalar_kernels()->matmul(&f->matrix, f->x, tokens, f->bias, other, PLLM_FLOAT32, form, 1);
    CHECK(same_bits(y, other, size), "matmul differs from scalar, %d x %d, tokens %d, form %d", out, in, tokens,
          (int)form);
    free(y), free(other);
}

/* A token's result does not depend on the tokens beside it. */
static void check_tokens_apart(const pllm_kernels *k, const fixture *f)
{
    const int out = f->c.out, tokens = f->c.tokens;
    float *together = new_floats((size_t)(tokens * out)), *alone = new_floats((size_t)out);
    k->matmul(&f->matrix, f->x, tokens, NULL, together, PLLM_FLOAT32, PLLM_ACTIVATIONS_INTEGER, 1);
    for (int t = 0; t < tokens; t++) {
        k->matmul(&f->matrix, f->x + t * f->c.in, 1, NULL, alone, PLLM_FLOAT32, PLLM_ACTIVATIONS_INTEGER, 1);
        CHECK(same_bits(alone, together + t * out, (size_t)out * sizeof *alone), "token %d of %d differs alone", t,
              tokens);
    }
    free(together), free(alone);
}

/* The largest products there are: all magnitudes at the most, all activations alike, with signs that go with the
 * weights' or at random. */
static void check_extremes(const pllm_kernels *k, int bits, int most, int tokens)
{
    for (int signs = 0; signs < 2; signs++) {
        fixture f;
        fill_fixture(&f, (coded_case){3, 1031, 0, 0, tokens, {bits}}, most, 0);
        for (int i = 0; i < PLLM_TRELLIS_TABLE; i++)
            f.magnitude[i] = (int8_t)most_at(most, i);
        for (int r = 0; r < 3; r++)
            for (int at = 0; at < 1031; at++)
                f.dense[r * 1031 + at] = (double)((float)level_at(&f, r, at) * f.scale[r]);
        for (int i = 0; i < tokens * 1031; i++)
            f.x[i] = (signs ? level_at(&f, 0, i % 1031) < 0 : (int)(random_bits() & 1)) ? -3.0f : 3.0f;
        check_products(k, &f, PLLM_ACTIVATIONS_INTEGER);
        free_fixture(&f);
    }
}

void test_coded(const pllm_kernels *k)
{
    static const int tokens[] = {0, 1, 2, 3, 5, 7, 17, 33};
    /* Up to 31 and 63, with few and with more bits, products may be added in pairs. */
    static const int most[] = {127, 31, 32, 63, 64};
    static const coded_case cases[] = {
        {1, 1, 0, 0, 0, {1}},         {5, 17, 1, 0, 0, {2}},        {15, 130, 3, 0, 0, {3}},
        {16, 127, 2, 1, 0, {3}},      {17, 200, 0, 1, 0, {4, 1}},   {40, 513, 1, 0, 0, {5}},
        {33, 300, 0, 0, 0, {6}},      {257, 20, 2, 0, 0, {1}},      {511, 9, 0, 0, 0, {2}},
        {530, 8, 3, 0, 0, {2}},       {20, 600, 0, 0, 0, {3}},      {9, 1100, 0, 1, 0, {6, 5, 4, 4, 3, 2, 1, -1}},
        {13, 700, 0, 1, 0, {3, 3, 3, 3, 1}}, {7, 300, 0, 1, 0, {-1}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (size_t t = 0; t < 3; t++) {
            coded_case c = cases[i];
            fixture f;
            c.tokens = tokens[(i + 3 * t) % (sizeof tokens / sizeof *tokens)];
            fill_fixture(&f, c, most[(i + t) % (sizeof most / sizeof *most)], i % 2 == 1);
            check_rows(k, &f);
            check_products(k, &f, PLLM_ACTIVATIONS_FLOAT32);
            check_products(k, &f, PLLM_ACTIVATIONS_INTEGER);
            check_tokens_apart(k, &f);
            free_fixture(&f);
        }
    for (int bits = 1; bits <= PLLM_TRELLIS_BITS; bits++)
        for (size_t m = 0; m < sizeof most / sizeof *most; m++) {
            check_extremes(k, bits, most[m], 1);
            check_extremes(k, bits, most[m], bits % 2 ? 5 : 17);
        }
}
