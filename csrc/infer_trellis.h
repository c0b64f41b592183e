/* infer_trellis.h - matrices in trellis codes times activations as bytes: how these are laid out for a step, and
 * products with one token. Included by infer_int.c only, behind infer_rows.h. */
#ifndef PLLM_INFER_TRELLIS_H
#define PLLM_INFER_TRELLIS_H

#include "infer_rows.h"
#include "trellis.h"

#if defined(PLLM_ISA_AVX2)
enum {
    X_VECTORS = 1 + 8, /* of a step: multipliers and activations; before the first step of a span one more */
    ONE_BY_ONE = 3     /* the most tokens that are multiplied one by one: measured */
};
#elif defined(PLLM_ISA_AVX512)
enum { X_VECTORS = 1 + 8, ONE_BY_ONE = 3 };
#else
enum { X_VECTORS = 0, ONE_BY_ONE = 0 };
#endif

enum { /* measured on AVX2 */
    TRELLIS_AHEAD = 4096, /* bytes between what is read of a plane and what is asked for, of rows that are no longer */
    MOST_PARTED = 8192    /* bytes of rows that are taken together in parts */
};

/* Values of a span as laid out for the products, for tokens one by one or together. */
static ptrdiff_t trellis_width(int one_by_one)
{
    const ptrdiff_t steps = TRELLIS_SPAN / TRELLIS_STEP;
#if defined(PLLM_ISA_AVX512)
    if (one_by_one)
        return (steps * X_VECTORS * VB_WIDTH) / (ptrdiff_t)sizeof(int16_t) + HALF_CHUNK;
#endif
    return one_by_one ? (1 + steps * X_VECTORS) * VB_WIDTH / (ptrdiff_t)sizeof(int16_t) : TRELLIS_SPAN;
}

#if defined(PLLM_ISA_AVX512)
/* A byte of a plane is like an index of a table of eight values: what is laid out for those serves here. */
static void trellis_arrange(const trellis *t, int one_by_one, const quantised_span *q, int16_t *target)
{
    static const row_table eight = {.d = 8};
    (void)t;
    if (one_by_one) {
        arrange_bytes(&eight, VB_WIDTH, q, target);
        return;
    }
    int16_t x[SPAN_VALUES];
    join_multipliers(q, SPAN_VALUES, x);
    order_by_planes(x, VB_WIDTH, 8, target);
}
#else
#if defined(PLLM_ISA_AVX2)
/* Words of eight vectors change places within lanes: the i-th word of the j-th with the j-th of the i-th. */
PLLM_INLINE void transpose_words(__m256i *v)
{
    __m256i a[8], b[8];
    PLLM_UNROLL
    for (int i = 0; i < 4; i++) {
        a[2 * i] = _mm256_unpacklo_epi16(v[2 * i], v[2 * i + 1]);
        a[2 * i + 1] = _mm256_unpackhi_epi16(v[2 * i], v[2 * i + 1]);
    }
    PLLM_UNROLL
    for (int i = 0; i < 2; i++)
        for (int half = 0; half < 2; half++) {
            b[4 * i + 2 * half] = _mm256_unpacklo_epi32(a[4 * i + half], a[4 * i + half + 2]);
            b[4 * i + 2 * half + 1] = _mm256_unpackhi_epi32(a[4 * i + half], a[4 * i + half + 2]);
        }
    PLLM_UNROLL
    for (int i = 0; i < 4; i++) {
        v[2 * i] = _mm256_unpacklo_epi64(b[i], b[i + 4]);
        v[2 * i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 4]);
    }
}

/* bytes[j] = the j-th of each eight of a step's activations, which are bytes. */
PLLM_INLINE void separate_step(const int16_t *x, __m256i *bytes)
{
    const __m256i pairs =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15));
    PLLM_UNROLL
    for (int i = 0; i < 8; i++) { /* two eights of the first half of the step, and two of the second */
        const __m256i both = _mm256_packs_epi16(vb_load(x + 16 * i), vb_load(x + TRELLIS_STEP / 2 + 16 * i));
        bytes[i] = _mm256_shuffle_epi8(_mm256_permute4x64_epi64(both, 0xd8), pairs);
    }
    transpose_words(bytes);
}

/* target: in its lanes of int32 what products with raised values are too large by, negative, together; then for each
 * step its multipliers, of each pair of bytes, and the bytes. */
static void trellis_arrange_bytes(const trellis *t, const quantised_span *q, int16_t *target)
{
    __m256i excess = _mm256_setzero_si256();
    int8_t *to = (int8_t *)target + VB_WIDTH;
    for (ptrdiff_t at = 0; at < SPAN_VALUES; at += TRELLIS_STEP, to += X_VECTORS * VB_WIDTH) {
        const __m128i eight = _mm_loadu_si128((const __m128i *)(const void *)(q->multiplier + at / BLOCK));
        const __m256i multiplier = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_unpacklo_epi16(eight, eight)),
                                                           _mm_unpackhi_epi16(eight, eight), 1);
        __m256i bytes[8];
        separate_step(q->value + at, bytes);
        vb_store(to, multiplier);
        PLLM_UNROLL
        for (int j = 0; j < 8; j++) {
            const __m256i raised = _mm256_maddubs_epi16(vb_set1((uint8_t)t->raised), bytes[j]);
            excess = _mm256_sub_epi32(excess, _mm256_madd_epi16(raised, multiplier));
            vb_store(to + (1 + j) * VB_WIDTH, bytes[j]);
        }
    }
    vb_store(target, excess);
}
#endif

/* target (trellis_width) = the activations of a span in the order of a step's values. */
static void trellis_arrange(const trellis *t, int one_by_one, const quantised_span *q, int16_t *target)
{
    int16_t x[SPAN_VALUES];
#if defined(PLLM_ISA_AVX2)
    if (one_by_one) {
        trellis_arrange_bytes(t, q, target);
        return;
    }
#endif
    (void)t, (void)one_by_one;
    join_multipliers(q, SPAN_VALUES, x);
    for (ptrdiff_t at = 0; at < SPAN_VALUES; at += TRELLIS_STEP)
        for (int j = 0; j < 8; j++, target += VB_WIDTH)
            for (int i = 0; i < VB_WIDTH; i++)
                target[i] = x[at + 8 * vb_place(i) + j];
}
#endif

/* ---- several tokens ---------------------------------------------------------------------------- */

/* target (steps, 8, VB_WIDTH) = the values of a span, each vector in the order of vb_widen. */
PLLM_INLINE void trellis_words_of(const int8_t *tables, const uint8_t *const *rows, const ptrdiff_t *start,
                                  const trellis_span *span, const int bits, int16_t *target)
{
    for (ptrdiff_t i = 0; i < trellis_steps(span); i++) {
        trellis_indices index;
        trellis_load(rows, start, span->first / 8 + i * VB_WIDTH, bits, &index);
        PLLM_UNROLL
        for (int j = 0; j < 8; j++, target += VB_WIDTH)
            vb_widen(target, trellis_value(tables, &index, bits, j));
    }
}

#define TRELLIS_WORDS(B) \
    static void trellis_words_##B(const int8_t *tables, const uint8_t *const *rows, const ptrdiff_t *start, \
                                  const trellis_span *span, int16_t *target) \
    { \
        trellis_words_of(tables, rows, start, span, B, target); \
    }
EACH_TRELLIS_BITS(TRELLIS_WORDS)
#undef TRELLIS_WORDS

typedef void trellis_words_fn(const int8_t *tables, const uint8_t *const *rows, const ptrdiff_t *start,
                              const trellis_span *span, int16_t *target);
#define TRELLIS_ENTRY(B) trellis_words_##B,
static trellis_words_fn *const trellis_words_functions[] = {EACH_TRELLIS_BITS(TRELLIS_ENTRY)};
#undef TRELLIS_ENTRY

/* Asks for the bits that are `ahead` bytes behind those of a span in each plane. */
PLLM_INLINE void trellis_ask_ahead(const uint8_t *row, const ptrdiff_t *start, const trellis_span *span, int bits,
                                   ptrdiff_t ahead)
{
    for (int p = 0; p < bits; p++)
        ask_ahead(row, start[p] + span->first / 8 + ahead, 1);
}

/* target (rows, width) = span s of the rows first..end-1 in the order of trellis_arrange; nothing meaningful behind its
 * steps. The span behind it is asked for. */
static void trellis_decode(const trellis *t, ptrdiff_t first, ptrdiff_t end, ptrdiff_t s, int16_t *target,
                           ptrdiff_t width)
{
    const trellis_span *const span = t->span + s;
    for (ptrdiff_t row = first, next; row < end; row = next) {
        const uint8_t *rows[TRELLIS_GROUP_ROWS];
        next = smaller(trellis_group(row) + TRELLIS_GROUP, end);
        trellis_history(t, next - 1, next - row, rows);
        for (ptrdiff_t r = row; r < next; r++, target += width) {
            const uint8_t *const *const here = rows + (next - 1 - r);
            const int more = pllm_trellis_more(t->code, r), bits = span->bits + more;
            trellis_ask_ahead(*here, t->start[more], span, bits, CACHE_LINE);
            trellis_words_functions[bits - 1](t->table, here, t->start[more], span, target);
        }
    }
}

#if defined(PLLM_ISA_AVX512)
/* Asks for the bits of span s of a row. */
PLLM_INLINE void trellis_ask(const trellis *t, ptrdiff_t row, ptrdiff_t s)
{
    const trellis_span *const span = t->span + s;
    const int more = pllm_trellis_more(t->code, row);
    const uint8_t *const source = trellis_row(t, row) + span->first / 8;
    for (int p = 0; p < span->bits + more; p++)
        ask_ahead(source, t->start[more][p], span->columns / 8);
}
#endif

/* ---- one token --------------------------------------------------------------------------------- */

#if defined(PLLM_ISA_AVX2)
/* sum + the products of a step, in lanes. A product of bytes is that of an unsigned with a signed one: of a raised
 * value, or of a magnitude with what got its sign. paired: those of two vectors add up within int16. */
PLLM_INLINE __m256i trellis_products(const int8_t *tables, const trellis_indices *index, const int bits,
                                     const int paired, const int8_t *x, __m256i sum)
{
    const __m256i multiplier = vb_load(x);
    __m256i signs = vb_or(index->sign, vb_set1(1)); /* of bit 7, and by doubling of those below, but for bit 0 */
    __m256i before = signs;
    PLLM_UNROLL
    for (int j = 7; j >= 0; j--) {
        const __m256i value = trellis_look_up(tables, index, bits, j);
        __m256i here = vb_load(x + (1 + j) * VB_WIDTH);
        if (bits > SIGNED_BITS)
            here = j ? _mm256_sign_epi8(here, signs) : vb_negate(here, vb_left(index->sign, 7));
        signs = _mm256_add_epi8(signs, signs);
        __m256i products = _mm256_maddubs_epi16(value, here);
        if (paired && j % 2) {
            before = products;
            continue;
        }
        products = paired ? _mm256_add_epi16(before, products) : products;
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(products, multiplier));
        PLLM_HOLD(sum); /* or all sums are kept for the end, in memory */
    }
    return sum;
}

/* The products of the `steps` steps of a span of a row with what is laid out of a token, in lanes. rows, start, byte: as
 * for trellis_load. */
PLLM_INLINE __m256i trellis_dot_span(const int8_t *tables, const uint8_t *const *rows, const ptrdiff_t *start,
                                     ptrdiff_t byte, ptrdiff_t steps, const int bits, const int paired,
                                     const int16_t *x)
{
    const int8_t *const bytes = (const int8_t *)x + VB_WIDTH;
    __m256i sum = bits <= SIGNED_BITS ? vb_load(x) : _mm256_setzero_si256();
    PLLM_UNROLL
    for (ptrdiff_t i = 0; i < TRELLIS_SPAN / TRELLIS_STEP; i++) {
        trellis_indices index;
        if (i && i == steps)
            break;
        trellis_load(rows, start, byte + i * VB_WIDTH, bits, &index);
        sum = trellis_products(tables, &index, bits, paired, bytes + i * X_VECTORS * VB_WIDTH, sum);
    }
    return sum;
}
#elif defined(PLLM_ISA_AVX512)
/* The same of the one step of a span; see infer_rows_avx512.h for what values are raised by. A lane's four bytes of each
 * vector are of one block. */
PLLM_INLINE __m512i trellis_dot_span(const int8_t *tables, const uint8_t *const *rows, const ptrdiff_t *start,
                                     ptrdiff_t byte, ptrdiff_t steps, const int bits, const int paired,
                                     const int16_t *x)
{
    const uint8_t *const bytes = (const uint8_t *)x;
    __m512i sum[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    trellis_indices index;
    (void)steps, (void)paired;
    trellis_load(rows, start, byte, bits, &index);
    PLLM_UNROLL
    for (int j = 0; j < 8; j++) {
        const __m512i raised = vb_xor(trellis_value(tables, &index, bits, j), vb_set1(128));
        sum[j % 2] = vi_dot_bytes(sum[j % 2], raised, vb_load(bytes + (1 + j) * VB_WIDTH));
    }
    return _mm512_mullo_epi32(_mm512_add_epi32(sum[0], sum[1]), vb_load(bytes));
}
#endif

#if defined(PLLM_ISA_AVX2) || defined(PLLM_ISA_AVX512)
/* Of DOT_TOGETHER rows those that have the same bits, or one of them. */
typedef struct {
    const int8_t *tables;
    const uint8_t *const *rows; /* trellis_history's, from the last of the DOT_TOGETHER on */
    const ptrdiff_t *start;
    ptrdiff_t ahead;       /* bytes between what is read and what is asked for */
    int first, end, count; /* which; those from `count` on are the one before it again */
} trellis_some_rows;

/* products (n) of rows with a token's spans, all of the same bits. x: of the first. */
PLLM_INLINE void trellis_dot_spans(const trellis_some_rows *some, const trellis_span *span, ptrdiff_t n,
                                   const int bits, const int paired, const int16_t *x, ptrdiff_t width,
                                   row_products *products)
{
    enum { SPAN_BYTES = TRELLIS_SPAN / 8, MOST_STEPS = (TRELLIS_SPAN + TRELLIS_STEP - 1) / TRELLIS_STEP };
    const ptrdiff_t first = span->first / 8, last_steps = trellis_steps(span + n - 1);
    for (int r = some->first; r < some->end; r++) {
        const uint8_t *const *const rows = some->rows + (some->count - 1 - smaller(r, some->count - 1));
        const uint8_t *here[TRELLIS_ROWS];
        PLLM_UNROLL
        for (int i = 0; i < TRELLIS_ROWS; i++)
            here[i] = rows[i] + first;
        for (ptrdiff_t s = 0; s < n; s++) {
            PLLM_UNROLL
            for (int p = 0; p < bits; p++)
                ask_for_rows(here[0] + s * SPAN_BYTES, some->start[p] + some->ahead, 1);
            products[s][r] = trellis_dot_span(some->tables, here, some->start, s * SPAN_BYTES,
                                              s < n - 1 ? MOST_STEPS : last_steps, bits, paired, x + s * width);
        }
    }
}

#define TRELLIS_DOT(B, PAIRED) \
    static void trellis_dot_##B##_##PAIRED(const trellis_some_rows *some, const trellis_span *span, ptrdiff_t n, \
                                           const int16_t *x, ptrdiff_t width, row_products *products) \
    { \
        trellis_dot_spans(some, span, n, B, PAIRED, x, width, products); \
    }
#define TRELLIS_DOT_0(B) TRELLIS_DOT(B, 0)
EACH_TRELLIS_BITS(TRELLIS_DOT_0)
#undef TRELLIS_DOT_0
#if defined(PLLM_ISA_AVX2)
#define TRELLIS_DOT_1(B) TRELLIS_DOT(B, 1)
EACH_TRELLIS_BITS(TRELLIS_DOT_1)
#undef TRELLIS_DOT_1
#endif
#undef TRELLIS_DOT

typedef void trellis_dot_fn(const trellis_some_rows *some, const trellis_span *span, ptrdiff_t n, const int16_t *x,
                            ptrdiff_t width, row_products *products);
#define TRELLIS_ENTRY_0(B) trellis_dot_##B##_0,
#if defined(PLLM_ISA_AVX2)
#define TRELLIS_ENTRY_1(B) trellis_dot_##B##_1,
#else
#define TRELLIS_ENTRY_1 TRELLIS_ENTRY_0
#endif
/* By whether products add up in pairs, and bits. */
static trellis_dot_fn *const trellis_dot_functions[2][PLLM_TRELLIS_BITS] = {{EACH_TRELLIS_BITS(TRELLIS_ENTRY_0)},
                                                                            {EACH_TRELLIS_BITS(TRELLIS_ENTRY_1)}};
#undef TRELLIS_ENTRY_0
#undef TRELLIS_ENTRY_1

/* products (n) of rows with a token's spans from `first` on; more: they have a bit more. */
static void trellis_dot_some(const trellis *t, const trellis_some_rows *some, int more, ptrdiff_t first, ptrdiff_t n,
                             const token_spans *token, row_products *products)
{
    for (ptrdiff_t s = 0, alike; s < n; s += alike) {
        const trellis_span *const span = t->span + first + s;
        const int bits = span->bits + more;
        alike = smaller(span->alike, n - s);
        trellis_dot_functions[t->paired >> bits & 1][bits - 1](some, span, alike, token->x + (first + s) * token->width,
                                                               token->width, products + s);
    }
}

/* dot (count rounded up to DOT_TOGETHER) = the products of `count` rows from `row` on, a multiple of DOT_TOGETHER, with
 * the token. */
static void trellis_dot(const trellis *t, ptrdiff_t row, ptrdiff_t count, const token_spans *token, float *dot)
{
    const ptrdiff_t row_bytes = t->start[0][PLLM_TRELLIS_BITS];
    for (ptrdiff_t r = 0; r < count; r += DOT_TOGETHER) {
        const ptrdiff_t here = smaller(DOT_TOGETHER, count - r);
        const uint8_t *rows[TRELLIS_GROUP_ROWS];
        __m128 total = _mm_setzero_ps();
        trellis_history(t, row + r + here - 1, here, rows);
        for (ptrdiff_t first = 0; first < t->spans; first += SPANS_TOGETHER) {
            const ptrdiff_t n = smaller(SPANS_TOGETHER, t->spans - first);
            /* Rows of several bits are read in parts, where they are taken together in turn. */
            const ptrdiff_t parted = t->span[first].alike < n ? DOT_TOGETHER * row_bytes : 0;
            const int together = t->code->extra || parted > MOST_PARTED ? 1 : DOT_TOGETHER;
            row_products products[SPANS_TOGETHER];
            trellis_some_rows some = {.tables = t->one_token_table, .rows = rows, .count = (int)here};
            some.ahead = (row_bytes > TRELLIS_AHEAD ? 2 * row_bytes : TRELLIS_AHEAD) + (together > 1 ? parted : 0);
            for (; some.first < DOT_TOGETHER; some.first = some.end) {
                const ptrdiff_t at = row + r + smaller(some.first, here - 1);
                const int more = pllm_trellis_more(t->code, at);
                some.end = some.first + together;
                some.start = t->start[more];
                trellis_dot_some(t, &some, more, first, n, token, products);
            }
#if defined(PLLM_ISA_AVX512)
            total = add_spans(total, products, token, first, n);
#else
            total = add_spans(total, products, token->scale + first, n);
#endif
        }
        _mm_storeu_ps(dot + r, total);
    }
}
#endif

#endif
