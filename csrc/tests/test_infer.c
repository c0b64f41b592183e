/* test_infer.c - decoded rows and products against plain loops in double. Every array has exactly the
 * size it needs, so that a sanitizer sees each byte too many. Both must be the same, bit for bit, on
 * every instruction set and thread count. */
#include "check.h"

enum { DENSE = -1 }; /* norm of a case without decoder */

typedef struct {
    int out, in, d, k, bits, is_int8, norm, tokens;
} infer_case;

typedef struct {
    infer_case c;
    int count; /* sub-vectors of a row */
    pllm_codec codec;
    pllm_matrix matrix;
    uint8_t *packed;
    int32_t *index;
    int8_t *table_i8;
    float *table, *decoder, *scale, *shift, *x, *bias;
    double *dense; /* (out, in): scale * value + shift */
} fixture;

static void fill_codec(fixture *f)
{
    const infer_case c = f->c;
    const int h = 4, size = c.k * c.d;
    f->table = new_normals((size_t)size);
    f->table_i8 = new_bytes((size_t)size);
    for (int i = 0; i < size; i++)
        f->table_i8[i] = (int8_t)(random_bits() % 255 - 127);
    f->decoder = c.norm == DENSE ? NULL : new_normals((size_t)(3 * (2 * h * c.d + h + c.d)));
    f->codec = (pllm_codec){
        .d = c.d,
        .k = c.k,
        .index_bits = c.bits,
        .table_is_int8 = c.is_int8,
        .table_scale = 0.01f,
        .table = c.is_int8 ? (const void *)f->table_i8 : (const void *)f->table,
        .decoder = f->decoder,
        .hidden = h,
        .norm = c.norm,
    };
}

/* dense = the matrix by the formula; with a decoder from the kernel decode, which has its own tests. */
static void fill_dense(fixture *f, const pllm_kernels *k)
{
    const infer_case c = f->c;
    const size_t length = (size_t)(f->count * c.d);
    float *rows = new_floats((size_t)c.out * length);
    for (int i = 0; i < c.out * f->count; i++)
        for (int j = 0; j < c.d; j++) {
            const int at = f->index[i] * c.d + j;
            rows[i * c.d + j] = c.is_int8 ? (float)f->table_i8[at] * 0.01f : f->table[at];
        }
    if (f->decoder) {
        const pllm_coder coder = {c.d, f->codec.hidden, c.norm};
        float *codewords = rows;
        rows = new_floats((size_t)c.out * length);
        k->decode(&coder, codewords, c.out, (ptrdiff_t)length, f->decoder, rows, 1);
        free(codewords);
    }
    for (int r = 0; r < c.out; r++)
        for (int i = 0; i < c.in; i++)
            f->dense[r * c.in + i] = (double)rows[(size_t)r * length + (size_t)i] * (double)f->scale[r] +
                                     (f->shift ? (double)f->shift[r] : 0.0);
    free(rows);
}

static void fill_fixture(fixture *f, const pllm_kernels *k, infer_case c, int with_shift)
{
    *f = (fixture){.c = c, .count = (c.in + c.d - 1) / c.d};
    fill_codec(f);
    f->index = new_ints((size_t)(c.out * f->count));
    for (int i = 0; i < c.out * f->count; i++)
        f->index[i] = (int32_t)(random_bits() % (uint32_t)c.k);
    f->packed = new_bytes((size_t)(c.out * pllm_row_stride_bytes(f->count, c.bits)));
    k->pack(f->index, c.out, f->count, c.bits, f->packed, 1);
    f->scale = new_normals((size_t)c.out);
    f->shift = with_shift ? new_normals((size_t)c.out) : NULL;
    f->x = new_normals((size_t)(c.tokens * c.in));
    f->bias = new_normals((size_t)c.out);
    f->dense = new_bytes((size_t)(c.out * c.in) * sizeof(double));
    f->matrix = (pllm_matrix){&f->codec, f->packed, c.out, c.in, f->scale, f->shift};
    fill_dense(f, k);
}

static void free_fixture(fixture *f)
{
    void *const owned[] = {f->packed, f->index, f->table_i8, f->table, f->decoder,
                           f->scale,  f->shift, f->x,        f->bias,  f->dense};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++)
        free(owned[i]);
}

static void check_decode(const pllm_kernels *k, const fixture *f)
{
    const infer_case c = f->c;
    const size_t size = (size_t)(c.out * c.in);
    float *rows = new_floats(size), *other = new_floats(size);
    int64_t *order = new_bytes((size_t)c.out * sizeof(int64_t));
    double worst = 0.0;
    int status = k->decode_rows(&f->matrix, 0, NULL, c.out, rows, 1);
    CHECK(status == PLLM_OK, "decode_rows returned %d", status);
    for (size_t i = 0; i < size; i++)
        worst = fmax(worst, fabs((double)rows[i] - f->dense[i]) / (1.0 + fabs(f->dense[i])));
    CHECK(worst < 1e-6, "decode_rows: error %g, d %d k %d norm %d", worst, c.d, c.k, c.norm);

    scalar_kernels()->decode_rows(&f->matrix, 0, NULL, c.out, other, 1);
    CHECK(same_bits(rows, other, size * sizeof(float)), "decode_rows differs from scalar, d %d", c.d);

    for (int r = 0; r < c.out; r++)
        order[r] = c.out - 1 - r;
    float *last = new_floats((size_t)c.in);
    k->decode_rows(&f->matrix, c.out - 1, NULL, 1, last, 1);
    k->decode_rows(&f->matrix, 0, order, c.out, other, 2);
    for (int r = 0; r < c.out; r++)
        CHECK(same_bits(rows + r * c.in, other + (c.out - 1 - r) * c.in, (size_t)c.in * sizeof(float)),
              "row %d differs when asked for by number", r);
    CHECK(same_bits(last, other, (size_t)c.in * sizeof(float)), "last row differs alone");
    free(rows), free(other), free(order), free(last);
}

/* step (in) = how far each activation of a token moves when it becomes an integer. */
static void rounding_of(const infer_case *c, const float *x, double *step)
{
    const int bytes = c->bits <= 8 && (c->d <= 2 || c->d == 4);
    double *size = new_bytes((size_t)c->in * sizeof *size);
    for (int i = 0; i < c->in; i++)
        size[i] = fabs((double)x[i]);
    rounding_steps(size, c->in, bytes, step);
    free(size);
}

/* bfloat16 in and out: what its values give as float32, rounded. */
static void check_matmul_bfloat16(const pllm_kernels *k, const fixture *f, enum pllm_activations form)
{
    const infer_case c = f->c;
    const ptrdiff_t in = c.tokens * c.in, out = c.tokens * c.out;
    uint16_t *x = new_bytes((size_t)in * sizeof *x), *y = new_bytes((size_t)out * sizeof *y);
    uint16_t *want = new_bytes((size_t)out * sizeof *want);
    float *wide = new_floats((size_t)in), *product = new_floats((size_t)out);
    k->narrow(f->x, in, x);
    k->widen(x, in, wide);
    k->matmul(&f->matrix, wide, c.tokens, f->bias, product, PLLM_FLOAT32, form, 1);
    k->narrow(product, out, want);
    k->matmul(&f->matrix, x, c.tokens, f->bias, y, PLLM_BFLOAT16, form, 2);
    CHECK(same_bits(y, want, (size_t)out * sizeof *y), "matmul in bfloat16, d %d tokens %d form %d", c.d, c.tokens,
          (int)form);
    free(x), free(y), free(want), free(wide), free(product);
}

static void check_matmul(const pllm_kernels *k, const fixture *f, enum pllm_activations form)
{
    const infer_case c = f->c;
    const size_t size = (size_t)(c.tokens * c.out);
    float *y = new_floats(size), *other = new_floats(size);
    const int rounded = form == PLLM_ACTIVATIONS_INTEGER && c.is_int8;
    double worst = 0.0;
    int status = k->matmul(&f->matrix, f->x, c.tokens, f->bias, y, PLLM_FLOAT32, form, 1);
    CHECK(status == PLLM_OK, "matmul returned %d", status);
    for (int t = 0; t < c.tokens; t++) {
        double *step = new_bytes((size_t)c.in * sizeof *step);
        memset(step, 0, (size_t)c.in * sizeof *step);
        if (rounded)
            rounding_of(&c, f->x + t * c.in, step);
        for (int r = 0; r < c.out; r++) {
            double sum = (double)f->bias[r], allowed = 1e-6 * fabs(sum);
            for (int i = 0; i < c.in; i++) {
                const double x = (double)f->x[t * c.in + i], w = f->dense[r * c.in + i];
                const double s = f->shift ? (double)f->shift[r] : 0.0;
                sum += x * w;
                allowed += 1e-6 * fabs(x) * (fabs(w - s) + fabs(s)) + step[i] * fabs(w - s);
            }
            worst = fmax(worst, fabs((double)y[t * c.out + r] - sum) / allowed);
        }
        free(step);
    }
    CHECK(worst < 1.0, "matmul: error %g of what is allowed, d %d k %d in %d tokens %d form %d", worst, c.d,
          c.k, c.in, c.tokens, (int)form);
    k->matmul(&f->matrix, f->x, c.tokens, f->bias, other, PLLM_FLOAT32, form, 3);
    CHECK(same_bits(y, other, size * sizeof(float)), "matmul depends on threads, tokens %d", c.tokens);
    scalar_kernels()->matmul(&f->matrix, f->x, c.tokens, f->bias, other, PLLM_FLOAT32, form, 1);
    CHECK(same_bits(y, other, size * sizeof(float)), "matmul differs from scalar, d %d tokens %d", c.d,
          c.tokens);
    free(y), free(other);
    check_matmul_bfloat16(k, f, form);
}

/* A token's result in integers does not depend on the tokens beside it; NaN and Inf stay where they are. */
static void check_tokens_apart(const pllm_kernels *k, int d, int bits, int tokens)
{
    fixture f;
    float alone[9], *together = new_floats((size_t)(tokens * 9));
    fill_fixture(&f, k, (infer_case){9, 600, d, 1 << bits, bits, 1, DENSE, tokens}, 0);
    f.x[600 + 7] = INFINITY;
    k->matmul(&f.matrix, f.x, tokens, f.bias, together, PLLM_FLOAT32, PLLM_ACTIVATIONS_INTEGER, 1);
    for (int t = 0; t < tokens; t++) {
        const float *const here = together + t * 9;
        k->matmul(&f.matrix, f.x + t * 600, 1, f.bias, alone, PLLM_FLOAT32, PLLM_ACTIVATIONS_INTEGER, 1);
        for (int r = 0; r < 9; r++)
            CHECK(t == 1 ? isnan(alone[r]) && isnan(here[r]) : alone[r] == here[r],
                  "token %d of %d, row %d: %g alone, %g together", t, tokens, r, (double)alone[r], (double)here[r]);
    }
    free(together);
    free_fixture(&f);
}

/* The largest products there are: all activations at one magnitude, table values -128 or -127 and 127, each
 * sign alone or both mixed. */
static void check_extremes(const pllm_kernels *k, int d, int bits, int tokens)
{
    for (int i = 0; i < 10; i++) {
        const int signs = i % 5, lowest = i < 5 ? -128 : -127;
        fixture f;
        fill_fixture(&f, k, (infer_case){3, 1031, d, 1 << bits, bits, 1, DENSE, tokens}, 0);
        for (int j = 0; j < d << bits; j++)
            f.table_i8[j] = (int8_t)((signs == 4 ? random_bits() & 1 : (unsigned)signs & 1) ? 127 : lowest);
        for (int j = 0; j < tokens * 1031; j++)
            f.x[j] = (signs == 4 ? random_bits() & 1 : (unsigned)signs & 2) ? 3.0f : -3.0f;
        fill_dense(&f, k);
        check_matmul(k, &f, PLLM_ACTIVATIONS_INTEGER);
        free_fixture(&f);
    }
}

static void check_case(const pllm_kernels *k, infer_case c)
{
    for (int with_shift = 0; with_shift < 2; with_shift++) {
        fixture f;
        fill_fixture(&f, k, c, with_shift);
        check_decode(k, &f);
        check_matmul(k, &f, PLLM_ACTIVATIONS_FLOAT32);
        check_matmul(k, &f, PLLM_ACTIVATIONS_INTEGER);
        free_fixture(&f);
    }
}

/* A product in integers whose rows are several spans and end within a vector. */
static void check_spans(const pllm_kernels *k, int d, int bits, int tokens)
{
    const int all = 1 << bits, codewords = all < 700 ? all - (bits > 1 && d % 2) : 700;
    fixture f;
    fill_fixture(&f, k, (infer_case){5, 1031, d, codewords, bits, 1, DENSE, tokens}, bits % 2);
    check_matmul(k, &f, PLLM_ACTIVATIONS_INTEGER);
    free_fixture(&f);
}

/* Tables whose rows have each combination of signs, up to `most`; `flaw`: all but one of their values. */
static void check_symmetric(const pllm_kernels *k, int d, int bits, int flaw, int tokens, int most)
{
    fixture f;
    fill_fixture(&f, k, (infer_case){5, 1031, d, 1 << bits, bits, 1, DENSE, tokens}, 0);
    const int base = 1 << (bits - d);
    for (int row = 0; row < 1 << bits; row++)
        for (int j = 0; j < d; j++) {
            int8_t *const value = f.table_i8 + row * d + j;
            *value = (int8_t)(row < base ? abs(*value) % (most + 1) : f.table_i8[row % base * d + j]);
            if (row / base >> j & 1)
                *value = (int8_t)-*value;
        }
    if (flaw)
        f.table_i8[random_bits() % (unsigned)(d << bits)] ^= 1;
    fill_dense(&f, k);
    check_matmul(k, &f, PLLM_ACTIVATIONS_INTEGER);
    free_fixture(&f);
}

/* d = 4 with all signs: magnitudes at the most that products of bytes may have to be added in pairs, or one above, and
 * activations of one magnitude. */
static void check_small(const pllm_kernels *k, int bits, int most)
{
    fixture f;
    fill_fixture(&f, k, (infer_case){5, 1031, 4, 1 << bits, bits, 1, DENSE, 1}, 0);
    for (int row = 0; row < 1 << bits; row++)
        for (int j = 0; j < 4; j++)
            f.table_i8[row * 4 + j] = (int8_t)(row >> (bits - 4 + j) & 1 ? -most : most);
    for (int i = 0; i < 1031; i++)
        f.x[i] = i % 7 ? 3.0f : -3.0f;
    fill_dense(&f, k);
    check_matmul(k, &f, PLLM_ACTIVATIONS_INTEGER);
    free_fixture(&f);
}

/* Tables that are looked up in registers, and tables that are fetched from: one row size of each form. */
static void check_forms(const pllm_kernels *k)
{
    static const int in_registers[] = {1, 2, 3, 4, 8};
    static const int fetched[][2] = {{1, 9},  {2, 9},  {3, 9},  {4, 10}, {5, 8}, {5, 11}, {6, 3},
                                     {4, 12}, {8, 12}, {7, 13}, {9, 6},  {4, 16}, {16, 9}, {13, 10}};
    /* One by one, by dot products, and in panels: narrow, wide, and some of each. */
    static const int several[] = {2, 5, 7, 12, 21};
    for (int bits = 1; bits <= 8; bits++)
        for (int i = 0; i < 5; i++) {
            check_spans(k, in_registers[i], bits, 1);
            check_spans(k, in_registers[i], bits, several[(i + 3 * bits) % 5]);
        }
    for (int i = 0; i < 14; i++) {
        check_spans(k, fetched[i][0], fetched[i][1], 1);
        check_spans(k, fetched[i][0], fetched[i][1], several[i % 5]);
    }
    for (int bits = 4; bits <= 8; bits++)
        for (int d = 1; d <= 4; d++) {
            check_symmetric(k, d, bits, (bits + d) % 4 == 0, 1, 127);
            check_symmetric(k, d, bits, 0, 1, 64);
            check_symmetric(k, d, bits, 0, several[(d + bits) % 5], bits % 2 ? 64 : 127);
        }
    for (int bits = 5; bits <= 8; bits++)
        for (int i = 0; i < 3; i++)
            check_small(k, bits, i == 2 ? 127 : 64 + i);
    for (int bits = 6; bits <= 9; bits++)
        check_extremes(k, 4, bits, 1);
    for (int bits = 4; bits <= 8; bits += 2)
        for (int d = 1; d <= 2; d++)
            check_extremes(k, d, bits, 1);
    check_extremes(k, 8, 8, 6);
    check_extremes(k, 4, 8, 7);
    check_extremes(k, 2, 6, 9);
    check_extremes(k, 3, 5, 1);
    check_extremes(k, 16, 10, 3);
}

/* Rows and tokens that fill tiles and panels or do not, and more tokens than one pass over the matrix takes. */
static void check_blocks(const pllm_kernels *k)
{
    static const int cases[][5] = {{64, 1031, 4, 8, 32},  {33, 600, 2, 6, 17}, {31, 513, 1, 3, 16},
                                   {80, 1500, 4, 12, 33}, {47, 700, 3, 9, 48}, {70, 90, 8, 13, 130},
                                   {3, 8300, 4, 8, 70},   {50, 520, 5, 11, 2}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const int *const c = cases[i];
        fixture f;
        fill_fixture(&f, k, (infer_case){c[0], c[1], c[2], 1 << c[3], c[3], 1, DENSE, c[4]}, i % 2 == 0);
        check_matmul(k, &f, PLLM_ACTIVATIONS_INTEGER);
        free_fixture(&f);
    }
}

/* Any bytes are a payload: indices behind the table are read as its last row. */
static void check_damaged(const pllm_kernels *k)
{
    fixture f;
    float row[40], y[10];
    fill_fixture(&f, k, (infer_case){5, 40, 4, 3, 8, 0, DENSE, 2}, 0);
    for (ptrdiff_t i = 0; i < 5 * pllm_row_stride_bytes(10, 8); i++)
        f.packed[i] = 255;
    k->decode_rows(&f.matrix, 4, NULL, 1, row, 1);
    for (int i = 0; i < 40; i++)
        CHECK(row[i] == f.table[2 * 4 + i % 4] * f.scale[4], "damaged payload: value %d", i);
    CHECK(k->matmul(&f.matrix, f.x, 2, NULL, y, PLLM_FLOAT32, PLLM_ACTIVATIONS_FLOAT32, 1) == PLLM_OK,
          "damaged payload: product");
    free_fixture(&f);
}

/* The bfloat16 nearest to x, the even one of two, found by trying both neighbours. */
static uint16_t nearest_bfloat16(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t below = bits & 0xffff0000, above = below + 0x10000;
    float low, high;
    memcpy(&low, &below, sizeof low);
    memcpy(&high, &above, sizeof high);
    /* Above the largest number comes 2^128, as which infinity counts here. */
    const double from_low = fabs((double)x - (double)low);
    const double to_high = fabs((isinf(high) ? copysign(0x1p128, (double)x) : (double)high) - (double)x);
    const int up = to_high < from_low || (to_high == from_low && below >> 16 & 1);
    return (uint16_t)((up ? above : below) >> 16);
}

static void check_bfloat16(const pllm_kernels *k)
{
    enum { ALL = 65536 };
    uint16_t *narrow = new_bytes(ALL * sizeof *narrow), *back = new_bytes(ALL * sizeof *back);
    float *wide = new_floats(ALL);
    for (int i = 0; i < ALL; i++)
        narrow[i] = (uint16_t)i;
    k->widen(narrow, ALL, wide);
    k->narrow(wide, ALL, back);
    for (int i = 0; i < ALL; i++) {
        uint32_t bits;
        memcpy(&bits, wide + i, sizeof bits);
        CHECK(bits == (uint32_t)i << 16, "widen %#x: %#x", i, bits);
        CHECK(back[i] == (isnan(wide[i]) ? 0x7fc0 : i), "narrow %#x: %#x", i, back[i]);
    }
    for (int i = 0; i < ALL; i++) {
        const uint32_t bits = random_bits() << 16 | (i % 4 ? random_bits() & 0xffff : 0x8000);
        memcpy(wide + i, &bits, sizeof bits);
    }
    k->narrow(wide, ALL, back);
    for (int i = 0; i < ALL; i++)
        CHECK(back[i] == (isnan(wide[i]) ? 0x7fc0  : nearest_bfloat16(wide[i])),
              "narrow %a: %#x", (double)wide[i], back[i]);
    free(narrow), free(back), free(wide);
}

void test_infer(const pllm_kernels *k)
{
    static const int tokens[] = {0, 1, 2, 3, 4, 5, 17, 33};
    static const int filled_up[] = {3, 5, 6, 7, 9, 11, 12, 14, 15}; /* d of rows that may get zeros behind */
    for (size_t i = 0; i < sizeof tokens / sizeof *tokens; i++) {
        check_case(k, (infer_case){13, 70, 4, 200, 8, 1, DENSE, tokens[i]});
        check_case(k, (infer_case){50, 33, 8, 100, 7, 0, DENSE, tokens[i]});
        check_case(k, (infer_case){7, 31, 4, 20, 5, 0, PLLM_NORM_RLN, tokens[i]});
    }
    for (int d = 1; d <= PLLM_MAX_SUBVECTOR; d++) {
        const int k_small = d % 2 ? 2 : 1 << (d / 2), bits = 1 + (d * 5 + 3) % 16;
        check_case(k, (infer_case){3, 40 + d, d, 1 << bits, bits, d % 3 != 0, DENSE, 1 + d % 3});
        check_case(k, (infer_case){5, 3 * d + 1, d, k_small, 16, d % 3 == 0, DENSE, 6});
    }
    check_case(k, (infer_case){1, 1, 16, 1, 1, 1, DENSE, 1});
    check_case(k, (infer_case){2, 600, 4, 4096, 12, 1, DENSE, 1});
    check_case(k, (infer_case){61, 530, 2, 64, 6, 1, DENSE, 19});
    check_case(k, (infer_case){26, 300, 1, 16, 4, 0, DENSE, 400});
    check_case(k, (infer_case){13, 70, 2, 64, 6, 1, DENSE, 530});
    check_case(k, (infer_case){9, 50, 8, 20, 5, 0, PLLM_NORM_LN, 2});
    check_case(k, (infer_case){30, 4200, 16, 50, 6, 0, PLLM_NORM_INPUT, 5});
    for (int bits = 1; bits <= PLLM_MAX_BITS; bits++)
        for (int d = 1; d <= 16; d *= 2) {
            check_case(k, (infer_case){6, 24 * d + 3, d, 1 << bits, bits, 1, DENSE, 1 + bits % 2});
            if (bits <= 6) /* enough reuse for tables of pairs */
                check_case(k, (infer_case){90, 700, d, (1 << bits) - bits % 2, bits, 1, DENSE, bits % 4});
        }
    for (int bits = 1; bits <= PLLM_MAX_BITS; bits++)
        for (int i = bits; i < bits + 9; i += 4)
            check_case(k, (infer_case){6, 700, filled_up[i % 9], (1 << bits) - bits % 2, bits, 1, DENSE, 1});
    check_forms(k);
    check_blocks(k);
    check_tokens_apart(k, 4, 8, 3);
    check_tokens_apart(k, 2, 6, 6);
    check_tokens_apart(k, 3, 5, 23);
    check_tokens_apart(k, 1, 4, 37);
    check_damaged(k);
    check_bfloat16(k);
}
