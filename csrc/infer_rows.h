/* infer_rows.h - from packed indices to table rows: a codec's table is laid out once per call so that any
 * index of its bits is a row, and a span of a row of the matrix is decoded from it to int16, or for one
 * token multiplied at once. Included by infer_int.c only. */
#ifndef PLLM_INFER_ROWS_H
#define PLLM_INFER_ROWS_H

#include "infer.h"

enum {
    SPAN_VALUES = 512, /* the most columns of a span, which have one scale */
    LAID_OUT = 2 * SPAN_VALUES, /* the most values of a span as laid out for several tokens' products */
    BLOCK = 32,        /* columns with one multiplier, where activations are bytes */
    BLOCKS = SPAN_VALUES / BLOCK,
    CACHE_LINE = 64,   /* bytes */
    OCTET = 8,         /* indices; eight of b bits are exactly b bytes, and a span is whole octets */
    PAIR_REUSE = 8     /* how often each row of a table of pairs must be used, on average */
};

/* Small tables are joined with themselves: a pair of neighbouring b-bit indices is one index of 2b bits
 * into the table of all pairs, which halves the look-ups. Whether that pays for a table of `bits` bits and
 * rows of d values that was joined `pairing` times; indices: how many the matrix has. */
static int may_pair(int d, int bits, int pairing, ptrdiff_t indices)
{
    return (d & (d - 1)) == 0 && 2 * d <= PLLM_MAX_SUBVECTOR &&
           indices >> (2 * bits + pairing) >= PAIR_REUSE;
}

/* Whether activations are bytes for this codec: those that are looked up in registers somewhere, and the same
 * wherever they run. */
static int has_byte_activations(const pllm_codec *c)
{
    return c->index_bits <= 8 && (c->d <= 2 || c->d == 4);
}

/* Whether each row is the one that the lower bits of its index name, with signs: value j is negative where the
 * j-th of the d highest bits is set. Up to four bits looking up gains nothing by it. */
static int is_symmetric(const pllm_codec *c)
{
    enum { MOST = 128 }; /* magnitudes */
    const int8_t *const table = c->table;
    if (c->index_bits <= 4 || c->index_bits > 8 || c->d > c->index_bits || c->k != 1 << c->index_bits)
        return 0;
    const int size = c->d << (c->index_bits - c->d);
    if (size > MOST)
        return 0;
    for (int signs = 0; signs < 1 << c->d; signs++) {
        int8_t wanted[MOST];
        for (int j = 0; j < c->d; j++)
            for (int i = j; i < size; i += c->d)
                wanted[i] = (int8_t)(signs >> j & 1 ? -table[i] : table[i]);
        if (memcmp(table + signs * size, wanted, (size_t)size) != 0)
            return 0;
    }
    for (int i = 0; i < size; i++)
        if (table[i] < 0)
            return 0;
    return 1;
}

/* A token's spans: see view in infer_int.c. */
typedef struct {
    const int16_t *x;
    const float *scale;
    ptrdiff_t width, spans, octets, last_octets; /* octets of a span, and of the last one */
} token_spans;

PLLM_INLINE ptrdiff_t octets_in(const token_spans *token, ptrdiff_t s)
{
    return s + 1 < token->spans ? token->octets : token->last_octets;
}

/* Asks for what lies `ahead` bytes behind `bytes` bytes of the payload: the processor's own guesses end with each
 * page. Functions that do nothing else must be inlined, too: compilers leave out calls of them. */
PLLM_INLINE void ask_ahead(const uint8_t *source, ptrdiff_t ahead, ptrdiff_t bytes)
{
    for (ptrdiff_t i = 0; i < bytes; i += CACHE_LINE)
        PLLM_PREFETCH((const void *)((uintptr_t)source + (uintptr_t)(ahead + i)));
}

/* The same of rows that a single token reads. On AVX2 for the second-level cache: in the first one what is asked for so
 * early takes the place of activations. All must do alike: one matrix in this way and the next in the other, in turn, took
 * twice as long (Zen 4). */
PLLM_INLINE void ask_for_rows(const uint8_t *source, ptrdiff_t ahead, ptrdiff_t bytes)
{
#if defined(PLLM_ISA_AVX2)
    for (ptrdiff_t i = 0; i < bytes; i += CACHE_LINE)
        PLLM_PREFETCH_FAR((const void *)((uintptr_t)source + (uintptr_t)(ahead + i)));
#else
    ask_ahead(source, ahead, bytes);
#endif
}

/* The r-th of `count` rows, behind them the last. */
PLLM_INLINE const uint8_t *row_at(const uint8_t *rows, ptrdiff_t stride, ptrdiff_t count, ptrdiff_t r)
{
    return rows + smaller(r, count - 1) * stride;
}

/* Activations of a span, value[i] * multiplier[i / BLOCK] times its scale: bytes times up to
 * LARGEST_MULTIPLIER, or int16 times 1. */
typedef struct {
    int16_t value[SPAN_VALUES], multiplier[BLOCKS];
} quantised_span;

/* x (n rounded up to whole blocks) = the activations of a span as int16. */
PLLM_INLINE void join_multipliers(const quantised_span *q, ptrdiff_t n, int16_t *x)
{
    for (ptrdiff_t b = 0; b * BLOCK < n; b++)
        for (int i = 0; i < BLOCK; i++)
            x[b * BLOCK + i] = (int16_t)(q->value[b * BLOCK + i] * q->multiplier[b]);
}

typedef struct row_table row_table;

/* target = the rows of the indices at source, in the order in which `arrange` lays activations out, followed
 * by up to TARGET_SLACK values without meaning. Reads up to OCTET_BYTES from the start of each octet. */
typedef void decode_fn(const row_table *t, const uint8_t *source, ptrdiff_t octets, int16_t *target);

/* The same as bytes, with as many behind them; where the table is_in_chunks, each 64 of them `apart` bytes from the
 * next. */
typedef void decode_bytes_fn(const row_table *t, const uint8_t *source, ptrdiff_t octets, int8_t *target,
                             ptrdiff_t apart);

/* dot (count rounded up to DOT_TOGETHER) = the products of `count` rows of the matrix, `stride` bytes apart, with the
 * token. */
typedef void dot_fn(const row_table *t, const uint8_t *rows, ptrdiff_t stride, ptrdiff_t count,
                    const token_spans *token, float *dot);

/* How a table is read: into memory, and for tokens one by one straight into the products. */
typedef struct {
    decode_fn *decode;
    dot_fn *dot; /* where the table may be one_by_one */
} row_functions;

/* target (c->d << pairing) = a row of the codec's table joined with itself `pairing` times; an index behind
 * the codec's table is its last row. */
static void copy_row(const pllm_codec *c, int pairing, int row, int8_t *target)
{
    const int8_t *const table = c->table;
    for (int p = 0; p < 1 << pairing; p++, target += c->d) {
        const int index = row >> p * c->index_bits & ((1 << c->index_bits) - 1);
        memcpy(target, table + (ptrdiff_t)(index < c->k ? index : c->k - 1) * c->d, (size_t)c->d);
    }
}

/* What each of the two includes has: struct row_table, and for it
 *   plan_rows(codec, indices, tokens, in_tiles)
 *                                         which form a table takes; d, bits, pairing and one_by_one (whether
 *                                         each token is multiplied by itself, by dot) are set
 *   row_table_bytes, make_rows            the table itself, laid out
 *   span_width(table, span)               values of a span as laid out for the products
 *   arrange(table, span, q, target)       lays it out
 *   functions_for(table)                  how it is read
 *   bytes_decoder_for, is_in_chunks       how it is read into bytes; on AVX-512, for tiles
 *   DOT_TOGETHER                          rows of the matrix that dot takes at a time
 *   OCTET_BYTES                           what reading an octet may touch from its first byte on
 *   TARGET_SLACK                          values behind a decoded span that may be written */
#if defined(PLLM_ISA_AVX512)
#include "infer_rows_avx512.h"
#else
#include "infer_rows_any.h"
#endif

#endif
