/* infer_rows_any.h - table rows as int16, on every instruction set but AVX-512: a row of the matrix is
 * decoded eight indices at a time. Included by infer_rows.h only. */
#ifndef PLLM_INFER_ROWS_ANY_H
#define PLLM_INFER_ROWS_ANY_H

enum {
    OCTET_BYTES = 32,   /* what reading eight indices may touch */
    TABLE_SLACK = 64,   /* bytes behind the table; 16 of them may be read */
    TARGET_SLACK = 16,  /* values behind a decoded span that may be written */
    SPAN_STEP = 32,     /* spans are padded to whole vectors of every instruction set */
    SIXTEEN = 32,       /* bytes of a plane's sixteen values, each twice */
    SMALL_VALUE = 64,   /* four products of which and a byte fit int16 */
    LOOKED_UP = 32,     /* indices looked up at once */
    LOOK_UP_VALUES = 4, /* the most values of their rows */
    WIDE_VALUES = 8192, /* tables up to this size are held as int16, in half a first-level cache */
    PAIRED_BITS = 12,      /* tables of pairs of codewords may have indices of so many bits */
    PAIRED_VALUES = 16384, /* and so many values */
    DOT_TOGETHER = 4 /* rows whose sums over lanes are taken together */
};

/* Rows of d values, 2^bits of them: int16 when `wide`, else int8. */
struct row_table {
    const char *rows;     /* NULL when looked_up */
    const int8_t *planes; /* when looked_up, see make_planes */
    int d, bits, wide;
    int looked_up; /* in registers: no rows */
    int one_by_one; /* dot is used; when looked_up with activations as bytes, see arrange_bytes */
    int symmetric; /* looked_up: the d highest bits of an index are the signs of its row's values */
    int small;     /* symmetric, and no value is above SMALL_VALUE: d = 4 only, see add_looked_up */
    int stride;    /* values from row to row; zeros behind the d */
    int pairing;   /* an index of this table is 2^pairing indices of the codec, side by side */
    /* looked_up: which of the values of 32 indices comes i-th; one_by_one, which byte of their multipliers */
    uint8_t order[LOOKED_UP * LOOK_UP_VALUES], multiplier_order[LOOKED_UP];
};

/* d or the next power of two. */
PLLM_INLINE int row_size(int d) { return d <= 2 ? d : d <= 4 ? 4 : d <= 8 ? 8 : 16; }

/* Joins the table with itself as often as it pays and indices keep to max_bits, rows to max_d values and
 * the table to max_values. */
static void pair_up(row_table *t, ptrdiff_t indices, int max_bits, int max_d, int max_values)
{
    while (may_pair(t->d, t->bits, t->pairing, indices) && 2 * t->bits <= max_bits && 2 * t->d <= max_d &&
           (2 * t->d) << (2 * t->bits) <= max_values) {
        t->d *= 2;
        t->bits *= 2;
        t->pairing++;
    }
}

/* Whether registers are the fastest place to look values up in: few sixteens, few values. Pairs of five bits at
 * d = 4 are fetched faster. */
static int is_looked_up(int d, int bits, int symmetric)
{
#if defined(PLLM_ISA_AVX2)
    return d <= 2 ? bits <= 8 : d == 4 && (bits == 3 || bits == 4 || bits == 6 || (symmetric && bits <= 8));
#else
    (void)d;
    (void)bits;
    (void)symmetric;
    return 0;
#endif
}

/* The smallest value of a table, 0 at most. */
static int smallest_of(const pllm_codec *c)
{
    const int8_t *const table = c->table;
    int smallest = 0;
    for (ptrdiff_t i = 0; i < (ptrdiff_t)c->k * c->d; i++)
        smallest = table[i] < smallest ? table[i] : smallest;
    return smallest;
}

/* Which of 32 indices is at place i once they are bytes in a vector, see indices_as_bytes: in order, or
 * quarters 0, 2, 1 and 3, or those of four bits first the even and then the odd. */
static int index_at(int bits, int i)
{
    return bits == 8 ? i : bits == 4 ? i % 16 * 2 + i / 16 : i / 8 % 2 * 16 + i / 16 * 8 + i % 8;
}

/* Fills t->order, or t->multiplier_order when one_by_one. */
static void plan_order(row_table *t)
{
    for (int i = 0; i < LOOKED_UP; i++)
        if (t->one_by_one)
            t->multiplier_order[i] = (uint8_t)(index_at(t->bits, i) * t->d / BLOCK * 2 + i % 2);
        else { /* widened bytes have the vector's inner quarters exchanged */
            const int place = i / 8 == 1 ? i + 8 : i / 8 == 2 ? i - 8 : i;
            for (int j = 0; j < t->d; j++)
                t->order[j * LOOKED_UP + i] = (uint8_t)(index_at(t->bits, place) * t->d + j);
        }
}

static row_table plan_rows(const pllm_codec *c, ptrdiff_t indices, ptrdiff_t tokens, int in_tiles)
{
    row_table t = {.d = c->d, .bits = c->index_bits, .symmetric = is_symmetric(c)};
    const int smallest = is_looked_up(t.d, t.bits, t.symmetric) ? smallest_of(c) : -128;
    t.looked_up = smallest > -128; /* each value has a negative */
    t.small = t.symmetric && t.d == 4 && smallest >= -SMALL_VALUE;
    if (t.looked_up && !t.symmetric)
        pair_up(&t, indices, 4, 4, PAIRED_VALUES); /* sixteen rows are one look-up, whatever their number */
    else if (!t.looked_up)
        pair_up(&t, indices, PAIRED_BITS, PLLM_MAX_SUBVECTOR, PAIRED_VALUES);
#if defined(PLLM_ISA_AVX2)
    t.one_by_one = t.looked_up ? tokens <= (t.symmetric ? 2 + t.d : 3) : tokens == 1 && t.d > 1;
#else
    (void)tokens;
#endif
    (void)in_tiles;
    t.stride = t.one_by_one ? row_size(t.d) : t.d; /* rows are fetched and multiplied in whole vectors */
    t.wide = t.stride << t.bits <= WIDE_VALUES;
    if (t.looked_up)
        plan_order(&t);
    return t;
}

/* What 32 indices of a span take as bytes, see arrange_bytes. */
PLLM_INLINE int looked_up_bytes(int d, int symmetric) { return LOOKED_UP * (1 + d * (symmetric ? 1 : 2)); }

/* Values of a span as it is laid out for the products. */
static ptrdiff_t span_width(const row_table *t, ptrdiff_t span)
{
    if (t->looked_up && t->one_by_one)
        return round_up(span, LOOKED_UP) / LOOKED_UP * looked_up_bytes(t->d, t->symmetric) /
               (ptrdiff_t)sizeof(int16_t);
    if (t->looked_up)
        return round_up(span, LOOKED_UP) * t->d;
    return round_up(span * t->stride, SPAN_STEP);
}

#if defined(PLLM_ISA_AVX2)
static void arrange_bytes(const row_table *t, ptrdiff_t span, const quantised_span *q, int16_t *target);
#endif

/* target (span_width) = the activations of a span in the order in which rows are decoded: as far apart as the
 * table's rows, or, when looked_up, the d values of each 32 indices one after another. */
static void arrange(const row_table *t, ptrdiff_t span, const quantised_span *q, int16_t *target)
{
    const ptrdiff_t d = t->d, width = span_width(t, span);
    int16_t x[SPAN_VALUES];
#if defined(PLLM_ISA_AVX2)
    if (t->looked_up && t->one_by_one) {
        arrange_bytes(t, span, q, target);
        return;
    }
#endif
    join_multipliers(q, SPAN_VALUES, x);
    if (t->looked_up)
        for (ptrdiff_t first = 0; first < width; first += LOOKED_UP * d)
            for (int i = 0; i < LOOKED_UP * d; i++)
                target[first + i] = x[first + t->order[i]];
    else if (t->stride == d)
        memcpy(target, x, (size_t)width * sizeof *x);
    else {
        memset(target, 0, (size_t)width * sizeof *target);
        for (ptrdiff_t i = 0; i < span; i++)
            memcpy(target + i * t->stride, x + i * d, (size_t)d * sizeof *x);
    }
}

/* Bits of an index that name a row of the planes; signs are not in them. */
PLLM_INLINE int row_bits(const row_table *t) { return t->symmetric ? t->bits - t->d : t->bits; }

/* Sixteens of rows in a plane. */
PLLM_INLINE int sixteens_of(int bits) { return bits <= 4 ? 1 : 1 << (bits - 4); }

/* Whether the codec's own table can be read as it is: nothing behind it is touched then. */
static int is_in_place(const row_table *t, const pllm_codec *c)
{
    return !t->wide && t->pairing == 0 && t->stride == t->d && c->k == 1 << t->bits &&
           (t->d == 8 || t->d == 16);
}

static size_t row_table_bytes(const row_table *t, const pllm_codec *c)
{
    const size_t rows = ((size_t)t->stride << t->bits) * (t->wide ? 2 : 1) + TABLE_SLACK;
    if (t->looked_up)
        return (size_t)(sixteens_of(row_bits(t)) * t->d * SIXTEEN);
    return is_in_place(t, c) ? 0 : rows;
}

/* planes (sixteens, d, 32): value j of sixteen rows, twice, and combined by exclusive or with the sixteen
 * before it; those from row 128 on start anew. Fewer rows than sixteen are repeated. */
static void make_planes(const row_table *t, const pllm_codec *c, int8_t *planes)
{
    for (int row = 0; row < 16 * sixteens_of(row_bits(t)); row++) {
        int8_t values[PLLM_MAX_SUBVECTOR], before[PLLM_MAX_SUBVECTOR] = {0};
        copy_row(c, t->pairing, row & ((1 << row_bits(t)) - 1), values);
        if (row % 128 >= 16)
            copy_row(c, t->pairing, row - 16, before);
        for (int j = 0; j < t->d; j++) {
            int8_t *const at = planes + (row / 16 * t->d + j) * SIXTEEN + row % 16;
            at[0] = at[16] = (int8_t)(values[j] ^ before[j]);
        }
    }
}

/* target (n) = the bytes at p, as int16 or as they are. */
PLLM_INLINE void copy_values(const int8_t *p, ptrdiff_t n, int wide, char *target)
{
    if (wide)
        for (ptrdiff_t i = 0; i < n; i++)
            ((int16_t *)(void *)target)[i] = p[i];
    else
        memcpy(target, p, (size_t)n);
}

/* Fills t->rows, in memory (row_table_bytes) or in place, and t->planes. */
static void make_rows(row_table *t, const pllm_codec *c, void *memory)
{
    const int rows = 1 << t->bits;
    const ptrdiff_t size = t->wide ? 2 : 1, gap = (t->stride - t->d) * size;
    char *target = memory;
    int row = 0;
    if (t->looked_up) {
        make_planes(t, c, memory);
        t->planes = memory;
        return;
    }
    t->rows = is_in_place(t, c) ? c->table : target;
    if (t->rows == c->table)
        return;
    if (t->pairing == 0 && gap == 0) {
        row = c->k < rows ? c->k : rows;
        copy_values(c->table, (ptrdiff_t)row * c->d, t->wide, target);
        target += (ptrdiff_t)row * c->d * size;
    }
    for (; row < rows; row++, target += gap) {
        int8_t values[PLLM_MAX_SUBVECTOR];
        copy_row(c, t->pairing, row, values);
        copy_values(values, t->d, t->wide, target);
        target += t->d * size;
        memset(target, 0, (size_t)gap);
    }
    memset(target, 0, TABLE_SLACK);
}

/* index[0..3] = half `half` of the eight indices at source. */
PLLM_INLINE void four_indices(const uint8_t *source, int bits, int half, uint32_t *index)
{
    const int bit = 4 * bits * half;
    const uint64_t word = pllm_load_word(source + bit / 8) >> bit % 8;
    for (int j = 0; j < 4; j++)
        index[j] = (uint32_t)(word >> j * bits) & ((1u << bits) - 1);
}

/* ---- any d: row by row ----------------------------------------------------------------------- */

/* target (n) = the n values at p; n is 1, 2, 4, 8 or 16, a constant. */
PLLM_INLINE void widen(const int8_t *p, int n, int16_t *target)
{
#if defined(PLLM_ISA_AVX2)
    if (n == 16) {
        const __m128i bytes = _mm_loadu_si128((const __m128i *)(const void *)p);
        _mm256_storeu_si256((__m256i *)(void *)target, _mm256_cvtepi8_epi16(bytes));
        return;
    }
    if (n == 8) {
        const __m128i bytes = _mm_loadl_epi64((const __m128i *)(const void *)p);
        _mm_storeu_si128((__m128i *)(void *)target, _mm_cvtepi8_epi16(bytes));
        return;
    }
#elif defined(PLLM_ISA_NEON)
    if (n >= 8) {
        for (int i = 0; i < n; i += 8)
            vst1q_s16(target + i, vmovl_s8(vld1_s8(p + i)));
        return;
    }
#endif
    for (int i = 0; i < n; i++)
        target[i] = p[i];
}

/* Rows without gaps. A few values more than d are copied: the next row overwrites them, or they lie in the
 * padding of the span. */
PLLM_INLINE void decode_plain(const row_table *t, const uint8_t *source, ptrdiff_t octets, int d,
                              int wide, int16_t *target)
{
    const int8_t *const narrow_rows = (const int8_t *)t->rows;
    const int bits = t->bits;
    for (ptrdiff_t i = 0; i < octets; i++, source += bits) {
        uint32_t index[OCTET];
        four_indices(source, bits, 0, index);
        four_indices(source, bits, 1, index + 4);
        for (int j = 0; j < OCTET; j++, target += d) {
            if (wide)
                memcpy(target, t->rows + (size_t)index[j] * 2 * (size_t)d, 2 * (size_t)row_size(d));
            else
                widen(narrow_rows + (size_t)index[j] * (size_t)d, row_size(d), target);
        }
    }
}

#define ROW_SIZES(X) \
    X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15) X(16)
#define PLAIN_FUNCTIONS(D)                                                                        \
    static void plain_wide_##D(const row_table *t, const uint8_t *source, ptrdiff_t octets,       \
                               int16_t *target)                                                   \
    {                                                                                             \
        decode_plain(t, source, octets, D, 1, target);                                            \
    }                                                                                             \
    static void plain_narrow_##D(const row_table *t, const uint8_t *source, ptrdiff_t octets,     \
                                 int16_t *target)                                                 \
    {                                                                                             \
        decode_plain(t, source, octets, D, 0, target);                                            \
    }
ROW_SIZES(PLAIN_FUNCTIONS)
#define PLAIN_ENTRY(D) {plain_narrow_##D, plain_wide_##D},
static decode_fn *const plain_functions[PLLM_MAX_SUBVECTOR][2] = {ROW_SIZES(PLAIN_ENTRY)};
#undef PLAIN_FUNCTIONS
#undef PLAIN_ENTRY

#if defined(PLLM_ISA_AVX2)
#include "infer_rows_avx2.h"
#else
/* No special form for any table: what is decoded goes through memory. */
static row_functions functions_for(const row_table *t)
{
    return (row_functions){plain_functions[t->d - 1][t->wide], NULL};
}
#endif

#endif
