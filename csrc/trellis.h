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
enum { SIGNED_BITS = 2, TABLE_BYTES = 128 };
#else
enum { SIGNED_BITS = 4, TABLE_BYTES = 128 };
#endif

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
    int raised; /* what values of both signs are larger by for one token on AVX2: bytes without a sign */
    int paired; /* bit k: the products of four of k bits with activations add up within int16 there */
    int8_t *table, *one_token_table; /* (PLLM_TRELLIS_BITS, TABLE_BYTES) each, of bits that columns have */
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

#if defined(PLLM_ISA_AVX2)
/* The largest of the magnitudes of k bits. */
static int largest_magnitude(const pllm_trellis *code, int k)
{
    int largest = 0;
    for (int i = pllm_trellis_magnitudes(k); i < pllm_trellis_magnitudes(k + 1); i++)
        largest = code->magnitude[i] > largest ? code->magnitude[i] : largest;
    return largest;
}

/* Sets `raised` and `paired`. */
static void trellis_for_bytes(trellis *t)
{
    enum { MOST = 63 }; /* four times it times 127 is within int16 */
    int largest = 0;
    for (int k = 1; k <= SIGNED_BITS; k++)
        largest = largest_magnitude(t->code, k) > largest ? largest_magnitude(t->code, k) : largest;
    t->raised = largest <= MOST / 2 ? MOST / 2 + 1 : PLLM_TRELLIS_SMALL + 1;
    for (int k = 1; k <= PLLM_TRELLIS_BITS; k++)
        if (k <= SIGNED_BITS ? largest <= MOST / 2 : largest_magnitude(t->code, k) <= MOST)
            t->paired |= 1 << k;
}
#endif

static trellis trellis_of(const pllm_matrix *w)
{
    trellis t = {.code = w->codec->trellis, .packed = w->packed, .out = w->out_features, .in = w->in_features};
    if (!t.code)
        return t;
    for (int more = 0; more < TRELLIS_KINDS; more++)
        for (int p = 0; p < PLLM_TRELLIS_BITS; p++)
            t.start[more][p + 1] = t.start[more][p] + pllm_trellis_plane_bytes(t.code, t.in, more, p);
#if defined(PLLM_ISA_AVX2)
    trellis_for_bytes(&t);
#endif
    t.segments = pllm_trellis_segments(t.out);
    t.spans = trellis_spans(&t, NULL);
    const ptrdiff_t total = trellis_offset(&t, t.out);
    for (t.tail = t.out; t.tail > 0 && trellis_offset(&t, t.tail) + TRELLIS_SLACK > total;)
        t.tail--;
    return t;
}

/* Whether columns have k bits in some row. */
static int trellis_has_bits(const trellis *t, int k)
{
    const ptrdiff_t blocks = (t->in + PLLM_TRELLIS_BLOCK - 1) / PLLM_TRELLIS_BLOCK;
    for (ptrdiff_t b = 0; b < blocks; b++)
        if (t->code->block_bits[b] == k || (t->code->extra && t->code->block_bits[b] == k - 1))
            return 1;
    return 0;
}

/* Fills the tables of k bits: values or magnitudes, again and again. */
static void make_table(const trellis *t, int k)
{
    const int8_t *const magnitude = t->code->magnitude + pllm_trellis_magnitudes(k);
    int8_t *const table = t->table + (k - 1) * TABLE_BYTES, *const raised = t->one_token_table + (k - 1) * TABLE_BYTES;
    const int half = 2 << k, size = k <= SIGNED_BITS ? 2 * half : half;
    for (int i = 0; i < size; i++) {
        table[i] = (int8_t)(i < half ? magnitude[i] : -magnitude[2 * half - 1 - i]);
        raised[i] = (int8_t)(table[i] + (k <= SIGNED_BITS ? t->raised : 0));
    }
    for (int i = size; i < TABLE_BYTES; i += size) {
        memcpy(table + i, table, (size_t)size);
        memcpy(raised + i, raised, (size_t)size);
    }
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
    for (int k = 1; k <= PLLM_TRELLIS_BITS; k++)
        if (trellis_has_bits(t, k))
            make_table(t, k);
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

/* The indices of TRELLIS_STEP columns. low: bytes of vector i have the lower four bits of the index of their plane
 * bytes' bit i, and above them those of bit i + 4.  plane: the index's, of which the others are looked at bit by bit.
 * sign: the signs of magnitudes. */
typedef struct {
    vb low[LOW_PLANES], plane[PLLM_TRELLIS_CODED + PLLM_TRELLIS_BITS], sign;
} trellis_indices;

/* Bits `step` places up in a and those below in b change places, where mask has the latter. */
PLLM_INLINE void exchange(vb *a, vb *b, const int step, uint8_t mask)
{
    const vb t = vb_and(vb_xor(vb_right(*a, step), *b), vb_set1(mask));
    *b = vb_xor(*b, t);
    *a = vb_xor(*a, vb_left(t, step));
}

/* index[j] = bits j and j + 4 of each byte of four planes, as two times four bits of bytes. */
PLLM_INLINE void join_planes(const vb *plane, vb *index)
{
    PLLM_UNROLL
    for (int i = 0; i < LOW_PLANES; i++)
        index[i] = plane[i];
    exchange(index, index + 1, 1, 0x55);
    exchange(index + 2, index + 3, 1, 0x55);
    exchange(index, index + 2, 2, 0x33);
    exchange(index + 1, index + 3, 2, 0x33);
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

/* Planes of an index of `bits` bits but for that of a sign, where magnitudes are looked up. */
PLLM_INLINE int looked_up_planes(const int bits) { return PLLM_TRELLIS_CODED + bits - 1 - (bits > SIGNED_BITS); }

/* The indices of columns of `bits` bits, a constant. rows: trellis_history's.  start: of the row's planes.  byte: of
 * the columns in their planes. */
PLLM_INLINE void trellis_load(const uint8_t *const *rows, const ptrdiff_t *start, ptrdiff_t byte, const int bits,
                              trellis_indices *index)
{
    vb *const plane = index->plane;
    const int planes = looked_up_planes(bits);
    coded_planes(rows, byte, plane);
    PLLM_UNROLL
    for (int p = 1; p < bits; p++)
        plane[PLLM_TRELLIS_CODED + p - 1] = vb_load(rows[0] + start[p] + byte);
    index->sign = plane[PLLM_TRELLIS_CODED + bits - 2];
    PLLM_UNROLL
    for (int p = 0; p < planes && bits > SIGNED_BITS; p++)
        plane[p] = vb_xor(plane[p], index->sign);
    if (planes < LOW_PLANES)
        plane[LOW_PLANES - 1] = vb_set1(0);
    join_planes(plane, index->low);
}

/* What tables have for bit j, a constant, of each byte: values, or magnitudes. */
PLLM_INLINE vb trellis_look_up(const int8_t *tables, const trellis_indices *index, const int bits, const int j)
{
    const vb both = index->low[j % LOW_PLANES];
    const vb low = vb_and(j < LOW_PLANES ? both : vb_right(both, LOW_PLANES), vb_set1(15));
    return look_up_bit(tables + (bits - 1) * TABLE_BYTES, low, index->plane, looked_up_planes(bits), j);
}

/* The values. */
PLLM_INLINE vb trellis_value(const int8_t *tables, const trellis_indices *index, const int bits, const int j)
{
    const vb found = trellis_look_up(tables, index, bits, j);
    return bits <= SIGNED_BITS ? found : vb_negate(found, PLANE_BIT(index->sign, j, 7));
}

/* One copy of a function for each number of bits. */
#define EACH_TRELLIS_BITS(X) X(1) X(2) X(3) X(4) X(5) X(6)

#endif
