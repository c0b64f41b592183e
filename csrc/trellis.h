/* trellis.h - from the planes of a matrix in trellis codes to the values they stand for: pllm.h says what these are.
 * Included by infer.c and infer_int.c only.
 *
 * A step takes a vector of each plane, eight columns a byte, and gives eight vectors of values: the j-th has those of
 * bit j of each byte. Three planes of an index are parities of the first planes of the last rows, which is an
 * exclusive or of whole vectors. Four planes then change places until a byte holds the lower bits of an index. */
#ifndef PLLM_TRELLIS_H
#define PLLM_TRELLIS_H

#include "kernel.h"
#include "simd_bytes.h"

enum {
    TRELLIS_ROWS = 1 + PLLM_TRELLIS_MEMORY, /* whose first planes a row's values depend on */
    TRELLIS_SPAN = 512,                     /* the most columns of a span, which have as many bits each */
    TRELLIS_STEP = 8 * VB_WIDTH,            /* columns of a step */
    TRELLIS_SLACK = 64,                     /* bytes behind a plane that may be read */
    TRELLIS_KINDS = 2,                      /* of rows: without and with a bit more */
    LOW_PLANES = 4                          /* bits of an index that are brought into bytes together */
};

/* Whether tables hold values of both signs, of k bits, and not magnitudes. */
#if defined(PLLM_ISA_AVX2)
enum { SIGNED_BITS = 2, TABLE_BYTES = 128, RAISED = PLLM_TRELLIS_SMALL + 1 };
#else
enum { SIGNED_BITS = 4, TABLE_BYTES = 128, RAISED = 0 };
#endif
/* RAISED: what values of both signs are larger by for a single token, so that they are bytes without a sign. */

/* Columns first..first+columns-1 in stored order, of `bits` bits in rows without one more, as `alike` spans from it on
 * have, too. */
typedef struct {
    ptrdiff_t first, columns, alike;
    int bits;
} trellis_span;

/* One call's view of the matrix. */
typedef struct {
    const pllm_trellis *code; /* NULL: not in trellis codes */
    const uint8_t *packed;
    ptrdiff_t out, in, segments;
    ptrdiff_t start[TRELLIS_KINDS][PLLM_TRELLIS_BITS + 1]; /* of each plane of a row, and its end */
    ptrdiff_t tail;       /* the first of the rows that end too near the payload's end */
    uint8_t *tail_rows;   /* those rows once more, with TRELLIS_SLACK behind them */
    const uint8_t *zeros; /* a plane of them, with as many */
    trellis_span *span;
    ptrdiff_t spans;
    int8_t *table, *one_token_table; /* (PLLM_TRELLIS_BITS, TABLE_BYTES) each; the latter see RAISED */
} trellis;

/* ---- the view ---------------------------------------------------------------------------------- */

static ptrdiff_t trellis_offset(const trellis *t, ptrdiff_t row)
{
    const ptrdiff_t few = t->start[0][PLLM_TRELLIS_BITS], more = t->start[1][PLLM_TRELLIS_BITS];
    return row * few + pllm_trellis_richer(t->code, row) * (more - few);
}

/* Fills span, or only counts. Spans end where the bits change. Columns without bits have none. */
static ptrdiff_t trellis_spans(const trellis *t, trellis_span *span)
{
    ptrdiff_t count = 0;
    for (ptrdiff_t first = 0; first < t->in;) {
        const uint8_t *const bits = t->code->block_bits + first / PLLM_TRELLIS_BLOCK;
        ptrdiff_t end = first;
        if (*bits == 0)
            break;
        for (int b = 0; end < smaller(first + TRELLIS_SPAN, t->in) && bits[b] == *bits; b++)
            end = smaller(end + PLLM_TRELLIS_BLOCK, t->in);
        if (span)
            span[count] = (trellis_span){first, end - first, 1, *bits};
        first = end;
        count++;
    }
    for (ptrdiff_t i = count - 2; span && i >= 0; i--)
        span[i].alike = span[i].bits == span[i + 1].bits ? span[i + 1].alike + 1 : 1;
    return count;
}

static trellis trellis_of(const pllm_matrix *w)
{
    trellis t = {.code = w->codec->trellis, .packed = w->packed, .out = w->out_features, .in = w->in_features};
    if (!t.code)
        return t;
    for (int more = 0; more < TRELLIS_KINDS; more++)
        for (int p = 0; p < PLLM_TRELLIS_BITS; p++)
            t.start[more][p + 1] = t.start[more][p] + pllm_trellis_plane_bytes(t.code, t.in, more, p);
    t.segments = pllm_trellis_segments(t.out);
    t.spans = trellis_spans(&t, NULL);
    const ptrdiff_t total = trellis_offset(&t, t.out);
    for (t.tail = t.out; t.tail > 0 && trellis_offset(&t, t.tail) + TRELLIS_SLACK > total;)
        t.tail--;
    return t;
}

/* The value or magnitude at place i of a table of k bits. */
static int8_t table_entry(const pllm_trellis *code, int k, int i)
{
    const int8_t *const magnitude = code->magnitude + pllm_trellis_magnitudes(k);
    const int half = 2 << k;
    i %= k <= SIGNED_BITS ? 2 * half : half;
    return (int8_t)(i < half ? magnitude[i] : -magnitude[2 * half - 1 - i]);
}

static size_t trellis_bytes(const trellis *t)
{
    const size_t tail = (size_t)(trellis_offset(t, t->out) - trellis_offset(t, t->tail)) + TRELLIS_SLACK;
    const size_t zeros = (size_t)t->start[0][1] + TRELLIS_SLACK;
    const size_t spans = (size_t)t->spans * sizeof(trellis_span);
    return (size_t)round_up((ptrdiff_t)(spans + 2 * PLLM_TRELLIS_BITS * TABLE_BYTES + zeros + tail), 64);
}

/* Places what the view needs in memory (trellis_bytes, aligned). */
static void trellis_place(trellis *t, char *memory)
{
    const ptrdiff_t from = trellis_offset(t, t->tail);
    const size_t tail = (size_t)(trellis_offset(t, t->out) - from), zeros = (size_t)t->start[0][1] + TRELLIS_SLACK;
    t->table = (int8_t *)memory;
    t->one_token_table = t->table + PLLM_TRELLIS_BITS * TABLE_BYTES;
    for (int i = 0; i < PLLM_TRELLIS_BITS * TABLE_BYTES; i++) {
        const int k = 1 + i / TABLE_BYTES;
        t->table[i] = table_entry(t->code, k, i % TABLE_BYTES);
        t->one_token_table[i] = (int8_t)(t->table[i] + (k <= SIGNED_BITS ? RAISED : 0));
    }
    memory += 2 * PLLM_TRELLIS_BITS * TABLE_BYTES;
    t->span = (trellis_span *)(void *)memory;
    trellis_spans(t, t->span);
    memory += (size_t)t->spans * sizeof *t->span;
    memset(memory, 0, zeros);
    t->zeros = (const uint8_t *)memory;
    memory += zeros;
    t->tail_rows = (uint8_t *)memory;
    memcpy(t->tail_rows, t->packed + from, tail);
    memset(t->tail_rows + tail, 0, TRELLIS_SLACK);
}

static const uint8_t *trellis_row(const trellis *t, ptrdiff_t row)
{
    return row < t->tail ? t->packed + trellis_offset(t, row)
                         : t->tail_rows + (trellis_offset(t, row) - trellis_offset(t, t->tail));
}

/* Segments start with multiples of TRELLIS_GROUP. */
enum { TRELLIS_GROUP = 8, TRELLIS_GROUP_ROWS = TRELLIS_GROUP + PLLM_TRELLIS_MEMORY };

/* rows[i] = the row that stands i before `row`, for all that the last `count` rows, at most TRELLIS_GROUP and of one
 * segment, depend on: those of row - j begin at rows + j. A segment's first rows follow its last ones. */
static void trellis_history(const trellis *t, ptrdiff_t row, ptrdiff_t count, const uint8_t *rows[TRELLIS_GROUP_ROWS])
{
    const ptrdiff_t segment = smaller(row / PLLM_TRELLIS_SEGMENT, t->segments - 1);
    const ptrdiff_t first = segment * PLLM_TRELLIS_SEGMENT, end = row - count - PLLM_TRELLIS_MEMORY;
    const ptrdiff_t size = segment + 1 < t->segments ? PLLM_TRELLIS_SEGMENT : t->out - first;
    if (end + 1 >= first && row < t->tail) { /* most: each lies before the other */
        const ptrdiff_t few = t->start[0][PLLM_TRELLIS_BITS], more = t->start[1][PLLM_TRELLIS_BITS];
        const uint8_t *here = trellis_row(t, row);
        for (ptrdiff_t r = row; r > end; r--) {
            *rows++ = here;
            here -= t->code->extra && pllm_trellis_more(t->code, r - 1) ? more : few;
        }
        return;
    }
    for (ptrdiff_t r = row; r > end; r--)
        if (r >= first)
            *rows++ = trellis_row(t, r);
        else
            *rows++ = size < PLLM_TRELLIS_SHORT ? t->zeros : trellis_row(t, r + size);
}

/* The first of the group of rows that a row belongs to. */
PLLM_INLINE ptrdiff_t trellis_group(ptrdiff_t row) { return row / TRELLIS_GROUP * TRELLIS_GROUP; }

/* Steps of a span. */
PLLM_INLINE ptrdiff_t trellis_steps(const trellis_span *s) { return (s->columns + TRELLIS_STEP - 1) / TRELLIS_STEP; }

/* ---- a step ------------------------------------------------------------------------------------ */

/* Eight vectors: bytes that are values, or magnitudes with a plane of their signs. */
typedef struct {
    vb value[8], sign;
} trellis_values;

/* Bits `step` places up in a and those below in b change places, where mask has the latter. */
PLLM_INLINE void exchange(vb *a, vb *b, const int step, uint8_t mask)
{
    const vb t = vb_and(vb_xor(vb_right(*a, step), *b), vb_set1(mask));
    *b = vb_xor(*b, t);
    *a = vb_xor(*a, vb_left(t, step));
}

/* index[j] = bit j of each byte of four planes, as the lower four bits of bytes. */
PLLM_INLINE void planes_to_bytes(const vb *plane, vb *index)
{
    vb c[LOW_PLANES] = {plane[0], plane[1], plane[2], plane[3]};
    const vb low = vb_set1(15);
    exchange(c, c + 1, 1, 0x55);
    exchange(c + 2, c + 3, 1, 0x55);
    exchange(c, c + 2, 2, 0x33);
    exchange(c + 1, c + 3, 2, 0x33);
    PLLM_UNROLL
    for (int j = 0; j < LOW_PLANES; j++) { /* of bits 0 and 4, 1 and 5, 2 and 6, 3 and 7 */
        index[j] = vb_and(c[j], low);
        index[j + 4] = vb_and(vb_right(c[j], 4), low);
    }
}

/* plane (PLLM_TRELLIS_CODED) = the parities of the first planes of the last rows. */
PLLM_INLINE void coded_planes(const uint8_t *const *rows, ptrdiff_t byte, vb *plane)
{
    static const int taps[PLLM_TRELLIS_CODED] = PLLM_TRELLIS_TAPS;
    vb first[TRELLIS_ROWS];
    PLLM_UNROLL
    for (int i = 0; i < TRELLIS_ROWS; i++)
        first[i] = vb_load(rows[i] + byte);
    PLLM_UNROLL
    for (int c = 0; c < PLLM_TRELLIS_CODED; c++) {
        plane[c] = vb_set1(0);
        PLLM_UNROLL
        for (int i = 0; i < TRELLIS_ROWS; i++)
            if (taps[c] >> i & 1)
                plane[c] = vb_xor(plane[c], first[i]);
    }
}

/* Bit j of each byte of a plane as bit `to` of the byte, beside others. */
#define PLANE_BIT(plane, j, to) ((to) >= (j) ? vb_left(plane, (to) - (j)) : vb_right(plane, (j) - (to)))

#if defined(PLLM_ISA_AVX2)
/* Sixteen entries at a time; planes from the fifth on choose among them. */
PLLM_INLINE vb look_up_bit(const int8_t *table, vb low, const vb *plane, int planes, const int j)
{
    vb found[TABLE_BYTES / 16];
    const int sixteens = planes <= LOW_PLANES ? 1 : 1 << (planes - LOW_PLANES);
    PLLM_UNROLL
    for (int i = 0; i < sixteens; i++)
        found[i] = vb_look_up(table + 16 * i, low, 16);
    PLLM_UNROLL
    for (int p = LOW_PLANES; p < planes; p++) {
        const vb upper = PLANE_BIT(plane[p], j, 7);
        PLLM_UNROLL
        for (int i = 0; i < sixteens >> (p - LOW_PLANES + 1); i++)
            found[i] = vb_select(upper, found[2 * i + 1], found[2 * i]);
    }
    return found[0];
}
#else
PLLM_INLINE vb look_up_bit(const int8_t *table, vb low, const vb *plane, int planes, const int j)
{
    PLLM_UNROLL
    for (int p = LOW_PLANES; p < planes; p++)
        low = vb_or(low, vb_and(PLANE_BIT(plane[p], j, p), vb_set1((uint8_t)(1 << p))));
    return vb_look_up(table, low, planes <= LOW_PLANES ? 16 : planes <= 6 ? 64 : 128);
}
#endif

/* The values of TRELLIS_STEP columns of `bits` bits, a constant. rows: trellis_history's.  start: of the row's planes.
 * byte: of the columns in their planes. */
PLLM_INLINE void trellis_step(const int8_t *tables, const uint8_t *const *rows, const ptrdiff_t *start, ptrdiff_t byte,
                              const int bits, trellis_values *v)
{
    const int8_t *const table = tables + (bits - 1) * TABLE_BYTES;
    const int indices = PLLM_TRELLIS_CODED + bits - 1, planes = bits <= SIGNED_BITS ? indices : indices - 1;
    vb plane[PLLM_TRELLIS_CODED + PLLM_TRELLIS_BITS], low[8];
    coded_planes(rows, byte, plane);
    PLLM_UNROLL
    for (int p = 1; p < bits; p++)
        plane[PLLM_TRELLIS_CODED + p - 1] = vb_load(rows[0] + start[p] + byte);
    v->sign = plane[indices - 1];
    PLLM_UNROLL
    for (int p = 0; p < planes && planes < indices; p++)
        plane[p] = vb_xor(plane[p], v->sign);
    if (indices < LOW_PLANES)
        plane[LOW_PLANES - 1] = vb_set1(0);
    planes_to_bytes(plane, low);
    PLLM_UNROLL
    for (int j = 0; j < 8; j++)
        v->value[j] = look_up_bit(table, low[j], plane, planes, j);
}

/* Value j of a step. */
#define STEP_VALUE(v, bits, j) \
    ((bits) <= SIGNED_BITS ? (v)->value[j] : vb_negate((v)->value[j], PLANE_BIT((v)->sign, j, 7)))

/* target (steps, 8, VB_WIDTH) = the values of a span, each vector in the order of vb_widen. */
PLLM_INLINE void trellis_words_of(const int8_t *tables, const uint8_t *const *rows, const ptrdiff_t *start,
                                  const trellis_span *span, const int bits, int16_t *target)
{
    for (ptrdiff_t i = 0; i < trellis_steps(span); i++) {
        trellis_values v;
        trellis_step(tables, rows, start, span->first / 8 + i * VB_WIDTH, bits, &v);
        PLLM_UNROLL
        for (int j = 0; j < 8; j++, target += VB_WIDTH)
            vb_widen(target, STEP_VALUE(&v, bits, j));
    }
}

/* One copy of a function for each number of bits. */
#define EACH_TRELLIS_BITS(X) X(1) X(2) X(3) X(4) X(5) X(6)

#endif
