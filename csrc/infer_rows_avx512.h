/* infer_rows_avx512.h - table rows on AVX-512 with VBMI and VNNI. Included by infer_rows.h only.
 *
 * Tables of up to 256 rows lie in registers as planes: plane j holds value j of every row, and a byte
 * permutation looks up 64 indices at once. Rows of larger ones are gathered, sixteen indices at once.
 *
 * One token is multiplied byte by byte, an unsigned with a signed one, four products to a lane (vpdpbusd). Where
 * activations are bytes x with a multiplier, planes hold w + 128, and
 *     sum x w = sum x (w + 128) - 128 sum x.
 * Otherwise an activation is 256 h + l with l in 0..255, so that
 *     sum x w = 256 (sum h (w + 128) - 128 sum h) + sum l w.
 * What depends on the activations alone is made once a span. All this is modulo 2^32, and the sum itself fits. */
#ifndef PLLM_INFER_ROWS_AVX512_H
#define PLLM_INFER_ROWS_AVX512_H

enum {
    CHUNK = 64,         /* bytes of a vector: values multiplied at once */
    HALF_CHUNK = 32,    /* int16 of a vector */
    OCTET_BYTES = 64,   /* what reading eight indices may touch */
    TARGET_SLACK = 64,  /* values behind a decoded span that may be written */
    DOT_TOGETHER = 4,   /* rows whose sums over lanes are taken together */
    PLANE_BITS = 8,     /* the most bits of an index into planes */
    PLANE_ROWS = 8,     /* the most values of a row in them */
    PAIRED_BITS = 6,    /* indices of pairs: one permutation looks them up */
    GATHERED = 16,      /* lanes whose indices are cut out together */
    SPANS_TOGETHER = 8, /* of a row, before those of the next */
    CUTS_TOGETHER = 4,  /* where rows are decoded */
    GATHERED_ROWS = 2,  /* of the matrix, multiplied side by side: loads are what limits gathers */
    AHEAD = 2048        /* bytes between what is read of the payload and what is asked for, or more */
};

/* Rows of d values, 2^bits of them. */
struct row_table {
    const int8_t *rows;
    int d, bits;
    int pairing; /* an index of this table is 2^pairing indices of the codec, side by side */
    int stride;  /* bytes from row to row, a power of two; 0 for planes */
    int one_by_one; /* each token by itself: activations are bytes, or are split into bytes */
    int bytes;      /* planes and one_by_one: its activations are bytes, and the planes hold w + 128 */
    int symmetric;  /* bytes: the d highest bits of an index are the signs of its row's values, see make_signed_planes */
    /* For cutting out indices: the bytes that each eight of a vector take, or each lane, and how far their bits are
     * to be shifted down (see plan_cut). For packing: where the values of gathered rows stand. */
    uint8_t take[CHUNK], shift[CHUNK], pack[CHUNK];
};

static int has_planes(const row_table *t) { return t->stride == 0; }

/* Whether decoded values come 64 at a time, which may stand anywhere, and none behind the last 64 of a span. */
static int is_in_chunks(const row_table *t) { return has_planes(t) || (t->d == 4 && t->stride == 4); }

/* Vectors of a plane. */
static int plane_vectors(int bits) { return bits <= 6 ? 1 : 1 << (bits - 6); }

/* Indices become bytes in planes. Eight of them fit eight bytes of the payload even where they start within a byte;
 * one that is narrower carries bits of the next with it. */
static void plan_cut(row_table *t)
{
    for (int at = 0; at < CHUNK; at++) {
        const int first = at / 8 * 8 * t->bits;
        t->take[at] = (uint8_t)(first / 8 + at % 8);
        t->shift[at] = (uint8_t)(first % 8 + at % 8 * t->bits);
    }
}

/* Else each of GATHERED lanes takes the four bytes that an index is in; each of two lanes, where rows have sixteen
 * bytes and are gathered by halves. */
static void plan_lanes(row_table *t)
{
    for (int lane = 0; lane < GATHERED; lane++) {
        const int first = (t->stride == 16 ? lane / 2 : lane) * t->bits;
        for (int byte = 0; byte < 4; byte++)
            t->take[4 * lane + byte] = (uint8_t)(first / 8 + byte);
        t->shift[4 * lane] = (uint8_t)(first % 8);
    }
    for (int at = 0; at < CHUNK; at++)
        t->pack[at] = (uint8_t)(at / t->d * t->stride + at % t->d);
}

/* Spans of 1, 2, 3, 4 and 8 values a row are whole chunks of indices, or nearly: d = 3 wastes an eighth. */
static row_table plan_rows(const pllm_codec *c, ptrdiff_t indices, ptrdiff_t tokens, int in_tiles)
{
    row_table t = {.d = c->d, .bits = c->index_bits};
    if (t.bits > PLANE_BITS || (t.d > 4 && t.d != PLANE_ROWS))
        t.stride = t.d <= 4 ? 4 : t.d <= 8 ? 8 : 16;
    else
        while (may_pair(t.d, t.bits, t.pairing, indices) && 2 * t.bits <= PAIRED_BITS &&
               2 * t.d <= PLANE_ROWS) {
            t.d *= 2;
            t.bits *= 2;
            t.pairing++;
        }
    const int bytes = has_planes(&t) && has_byte_activations(c);
    const int symmetric = bytes && t.d == 4 && t.bits > 6 && is_symmetric(c);
    t.one_by_one = tokens <= (symmetric && !in_tiles ? 6 : bytes && !in_tiles ? 3 : 2); /* measured */
    t.bytes = t.one_by_one && bytes;
    t.symmetric = t.one_by_one && symmetric;
    if (has_planes(&t))
        plan_cut(&t);
    else
        plan_lanes(&t);
    return t;
}

/* ---- the table ------------------------------------------------------------------------------- */

/* Whether the codec's own table can be read as it is. */
static int is_in_place(const row_table *t, const pllm_codec *c)
{
    return t->d == t->stride && c->k == 1 << t->bits;
}

static size_t row_table_bytes(const row_table *t, const pllm_codec *c)
{
    if (has_planes(t))
        return (size_t)(t->d * (t->symmetric ? 1 : plane_vectors(t->bits)) * CHUNK);
    return is_in_place(t, c) ? 0 : (size_t)t->stride << t->bits;
}

PLLM_INLINE __m512i load_64(const void *p) { return _mm512_loadu_si512(p); }

/* What brings 64 bytes, d values of each of 64 / d rows, into the order of planes: first the first values. d: a power
 * of two. */
PLLM_INLINE __m512i order_of_planes(int d)
{
    uint8_t order[CHUNK];
    for (int i = 0; i < CHUNK; i++)
        order[i] = (uint8_t)(i % (CHUNK / d) * d + i / (CHUNK / d));
    return load_64(order);
}

/* The i-th 64 of the values of 64 rows, in that order, to the planes, which are `length` bytes each. */
PLLM_INLINE void put_in_planes(__m512i ordered, int i, int d, ptrdiff_t length, int8_t *planes)
{
    int8_t values[CHUNK];
    _mm512_storeu_si512(values, ordered);
    for (int j = 0; j < d; j++)
        memcpy(planes + j * length + i * (CHUNK / d), values + j * (CHUNK / d), CHUNK / (size_t)d);
}

/* target: planes (d, 64 * vectors). Fewer than 64 rows are repeated: no bit of an index then counts
 * that is not its own. */
static void make_planes(const row_table *t, const pllm_codec *c, int8_t *target)
{
    const int length = plane_vectors(t->bits) * CHUNK;
    if (t->bytes && t->pairing == 0 && c->k == length) {
        const __m512i order = order_of_planes(t->d), raise = _mm512_set1_epi8(-128);
        for (int i = 0; i < length / CHUNK * t->d; i++) {
            const __m512i values = load_64((const int8_t *)c->table + i * CHUNK);
            put_in_planes(_mm512_permutexvar_epi8(order, _mm512_xor_si512(values, raise)), i % t->d, t->d, length,
                          target + i / t->d * CHUNK);
        }
        return;
    }
    for (int row = 0; row < length; row++) {
        int8_t values[PLLM_MAX_SUBVECTOR];
        copy_row(c, t->pairing, row & ((1 << t->bits) - 1), values);
        for (int j = 0; j < t->d; j++)
            target[j * length + row] = (int8_t)(t->bytes ? values[j] ^ -128 : values[j]);
    }
}

/* Signs that six bits of an index have room for beside the bits of its row. */
PLLM_INLINE int signs_beside(int d, int bits) { return 6 - (bits - d); }

/* target: planes (d, 64), for indices with the row's bits and some of the signs, see
 * next_signed_chunk. */
static void make_signed_planes(const row_table *t, const pllm_codec *c, int8_t *target)
{
    const int row_bits = t->bits - t->d, beside = signs_beside(t->d, t->bits);
    for (int i = 0; i < CHUNK; i++) {
        int8_t values[PLLM_MAX_SUBVECTOR];
        copy_row(c, 0, i & ((1 << row_bits) - 1), values);
        for (int j = 0; j < t->d; j++) {
            const int negative = i >> (row_bits + j % beside) & 1;
            target[j * CHUNK + i] = (int8_t)((negative ? -values[j] : values[j]) ^ -128);
        }
    }
}

/* Fills t->rows, in memory (row_table_bytes) or in place. */
static void make_rows(row_table *t, const pllm_codec *c, void *memory)
{
    int8_t *const target = memory;
    t->rows = target;
    if (t->symmetric)
        make_signed_planes(t, c, target);
    else if (has_planes(t))
        make_planes(t, c, target);
    else if (is_in_place(t, c))
        t->rows = c->table;
    else {
        memset(target, 0, row_table_bytes(t, c));
        for (int row = 0; row < 1 << t->bits; row++)
            copy_row(c, t->pairing, row, target + (ptrdiff_t)row * t->stride);
    }
}

/* ---- activations ----------------------------------------------------------------------------- */

/* Values of a span as laid out for the products; those of one token end with one int32. */
static ptrdiff_t span_width(const row_table *t, ptrdiff_t span)
{
    const ptrdiff_t chunks = round_up(span, CHUNK) / CHUNK, end = t->one_by_one ? HALF_CHUNK : 0;
    if (t->bytes)
        return chunks * (1 + t->d) * HALF_CHUNK + end;
    if (has_planes(t))
        return chunks * t->d * CHUNK + end;
    return t->one_by_one ? round_up(span * t->stride, 2 * CHUNK) + end : round_up(span * t->d, HALF_CHUNK);
}

/* 64 int16 as bytes. */
PLLM_INLINE __m512i narrowed(__m512i low, __m512i high)
{
    const __m512i lower = _mm512_castsi256_si512(_mm512_cvtepi16_epi8(low));
    return _mm512_inserti64x4(lower, _mm512_cvtepi16_epi8(high), 1);
}

/* target: one int32, the sum of a vector's lanes. */
static void store_excess(int16_t *target, __m512i lanes)
{
    const __m512i zero = _mm512_setzero_si512();
    int32_t sums[4];
    vi_sum4(sums, lanes, zero, zero, zero);
    memcpy(target, sums, sizeof *sums);
}

/* Each 64 of the values become 64 low bytes and 64 high bytes; behind them what the products of the high
 * bytes with w + 128 are too large. */
static void split_values(int16_t *x, ptrdiff_t values)
{
    __m512i sums = _mm512_setzero_si512();
    for (ptrdiff_t at = 0; at < values; at += CHUNK) {
        const __m512i a = load_64(x + at), b = load_64(x + at + HALF_CHUNK);
        const __m512i high = narrowed(_mm512_srai_epi16(a, 8), _mm512_srai_epi16(b, 8));
        _mm512_storeu_si512(x + at, narrowed(a, b));
        _mm512_storeu_si512(x + at + HALF_CHUNK, high);
        sums = vi_dot_bytes(sums, _mm512_set1_epi8(1), high);
    }
    store_excess(x + values, _mm512_slli_epi32(sums, 15)); /* at most 512 * 2^7 * 2^15 */
}

/* target: for each 64 indices the multipliers of the lanes, which never have values of two blocks, and d times 64
 * bytes, by planes; behind them what the products with w + 128 are too large. */
static void arrange_bytes(const row_table *t, ptrdiff_t span, const quantised_span *q, int16_t *target)
{
    const int d = t->d;
    const __m512i order = order_of_planes(d);
    __m512i excess = _mm512_setzero_si512();
    for (ptrdiff_t first = 0; first < span * d; first += CHUNK * d) {
        int8_t *const bytes = (int8_t *)(target + HALF_CHUNK);
        for (int lane = 0; lane < CHUNK / 4; lane++) {
            const int32_t multiplier = q->multiplier[smaller(first + lane * 4 * d, SPAN_VALUES - 1) / BLOCK];
            memcpy(target + 2 * lane, &multiplier, sizeof multiplier);
        }
        for (int i = 0; i < d; i++) {
            const ptrdiff_t at = first + i * CHUNK;
            __m512i here = _mm512_setzero_si512();
            if (at < SPAN_VALUES)
                here = narrowed(load_64(q->value + at), load_64(q->value + at + HALF_CHUNK));
            put_in_planes(_mm512_permutexvar_epi8(order, here), i, d, CHUNK, bytes);
        }
        __m512i products = _mm512_setzero_si512();
        for (int j = 0; j < d; j++)
            products = vi_dot_bytes(products, _mm512_set1_epi8(1), load_64(bytes + j * CHUNK));
        excess = _mm512_add_epi32(excess, _mm512_mullo_epi32(products, load_64(target)));
        target += (1 + d) * HALF_CHUNK;
    }
    store_excess(target, _mm512_slli_epi32(excess, 7)); /* at most 512 * 2^15 * 2^7 */
}

/* target (span, d), by planes = x (span, d). Both must have room for whole chunks of indices. */
static void order_by_planes(const int16_t *x, ptrdiff_t span, int d, int16_t *target)
{
    const __m512i lanes = _mm512_add_epi32(_mm512_mullo_epi32(vi_iota(), _mm512_set1_epi32(0x20002)),
                                           _mm512_set1_epi32(0x10000)); /* words 0, 1, 2, ... */
    for (int j = 0; j < d; j++) {
        const __m512i from = _mm512_add_epi16(_mm512_mullo_epi16(lanes, _mm512_set1_epi16((int16_t)d)),
                                              _mm512_set1_epi16((int16_t)j));
        const __m512i vector = _mm512_srli_epi16(from, 5);
        __mmask32 reached[PLANE_ROWS];
        for (int s = 0; s < d; s++)
            reached[s] = _mm512_cmpge_epi16_mask(vector, _mm512_set1_epi16((int16_t)s));
        for (ptrdiff_t i = 0; i < span; i += HALF_CHUNK) {
            __m512i values = _mm512_setzero_si512();
            for (int s = 0; s < d; s++) /* the last that is not behind it stays */
                values = _mm512_mask_permutexvar_epi16(values, reached[s], from,
                                                       _mm512_loadu_si512(x + i * d + s * HALF_CHUNK));
            _mm512_storeu_si512(target + i / CHUNK * CHUNK * d + j * CHUNK + i % CHUNK, values);
        }
    }
}

/* target (span_width) = the activations of a span, in the order in which the products meet it: by planes of each 64
 * indices, or with rows as far apart as the table's. */
static void arrange(const row_table *t, ptrdiff_t span, const quantised_span *q, int16_t *target)
{
    int16_t x[LAID_OUT];
    const ptrdiff_t width = span_width(t, span), d = t->d;
    if (t->bytes) {
        arrange_bytes(t, span, q, target);
        return;
    }
    join_multipliers(q, SPAN_VALUES, x);
    memset(x + SPAN_VALUES, 0, sizeof x - SPAN_VALUES * sizeof *x);
    memset(target, 0, (size_t)width * sizeof *target);
    if (has_planes(t))
        order_by_planes(x, span, t->d, target);
    else if (t->one_by_one)
        for (ptrdiff_t i = 0; i < span; i++)
            memcpy(target + i * t->stride, x + i * d, (size_t)d * sizeof *x);
    else
        memcpy(target, x, (size_t)(span * d) * sizeof *x);
    if (t->one_by_one)
        split_values(target, width - HALF_CHUNK);
}

/* ---- products with one token ----------------------------------------------------------------- */

/* Sums of products with low and high bytes; two of each, because a sum waits for the one before it. */
typedef struct {
    __m512i low[2], high[2];
} byte_sums;

PLLM_INLINE byte_sums no_sums(void)
{
    const __m512i zero = _mm512_setzero_si512();
    return (byte_sums){{zero, zero}, {zero, zero}};
}

/* low, high: bytes of the activations that meet the 64 values. */
PLLM_INLINE void add_products(byte_sums *s, int which, __m512i values, __m512i low, __m512i high)
{
    const __m512i raised = _mm512_xor_si512(values, _mm512_set1_epi8(-128));
    s->low[which] = vi_dot_bytes(s->low[which], low, values);
    s->high[which] = vi_dot_bytes(s->high[which], raised, high);
}

PLLM_INLINE __m512i sum_of_bytes(const byte_sums *s)
{
    const __m512i low = _mm512_add_epi32(s->low[0], s->low[1]);
    return _mm512_add_epi32(low, _mm512_slli_epi32(_mm512_add_epi32(s->high[0], s->high[1]), 8));
}

/* Products with as many rows, in lanes, of spans side by side. */
typedef __m512i row_products[DOT_TOGETHER];

/* total + the sums of n spans' products, times the spans' scales, from span `first` on. */
PLLM_INLINE __m128 add_spans(__m128 total, const row_products *products, const token_spans *token, ptrdiff_t first,
                             ptrdiff_t n)
{
    for (ptrdiff_t s = 0; s < n; s++) {
        int32_t sums[DOT_TOGETHER], excess;
        memcpy(&excess, token->x + (first + s + 1) * token->width - HALF_CHUNK, sizeof excess);
        vi_sum4(sums, products[s][0], products[s][1], products[s][2], products[s][3]);
        const __m128i four = _mm_loadu_si128((const __m128i *)(const void *)sums);
        const __m128 exact = _mm_cvtepi32_ps(_mm_sub_epi32(four, _mm_set1_epi32(excess)));
        total = _mm_fmadd_ps(_mm_set1_ps(token->scale[first + s]), exact, total);
    }
    return total;
}

/* 64 indices as bytes, whose upper bits are to be ignored. */
PLLM_INLINE __m512i cut(const row_table *t, const uint8_t *source)
{
    const __m512i near = _mm512_permutexvar_epi8(load_64(t->take), load_64(source));
    return _mm512_multishift_epi64_epi8(load_64(t->shift), near);
}

/* ---- look-ups in planes ---------------------------------------------------------------------- */

/* 64 indices; which name a row of the second, third and fourth vector of a plane, or for symmetric tables the same
 * with the upper signs in place of the lower ones. */
typedef struct {
    __m512i index, upper;
    __mmask64 in[4];
} index_chunk;

PLLM_INLINE index_chunk next_chunk(const row_table *t, const uint8_t *source, int vectors)
{
    index_chunk k = {.index = vectors == 4 ? load_64(source) : cut(t, source)};
    if (vectors > 1) {
        const __mmask64 bit_6 = _mm512_movepi8_mask(_mm512_add_epi8(k.index, k.index));
        const __mmask64 bit_7 = vectors == 4 ? _mm512_movepi8_mask(k.index) : 0;
        k.in[1] = vectors == 4 ? bit_6 & ~bit_7 : bit_6;
        k.in[2] = bit_7 & ~bit_6;
        k.in[3] = bit_7 & bit_6;
    }
    return k;
}

PLLM_INLINE index_chunk next_signed_chunk(const row_table *t, const uint8_t *source, int d, int bits)
{
    index_chunk k = {.index = bits == 8 ? load_64(source) : cut(t, source)};
    const __m512i row = _mm512_set1_epi8((char)((1 << (bits - d)) - 1));
    const __m512i shifted = _mm512_srli_epi16(k.index, (unsigned)signs_beside(d, bits));
    k.upper = _mm512_or_si512(_mm512_and_si512(row, k.index), _mm512_andnot_si512(row, shifted));
    return k;
}

/* One value for each index. plane: `vectors` of them. A permutation out of two vectors takes as long as two out of
 * one. */
PLLM_INLINE __m512i look_up(const __m512i *plane, const index_chunk *k, int vectors)
{
    __m512i values = _mm512_permutexvar_epi8(k->index, plane[0]);
    PLLM_UNROLL
    for (int i = 1; i < vectors; i++)
        values = _mm512_mask_permutexvar_epi8(values, k->in[i], k->index, plane[i]);
    return values;
}

enum form { BYTES, SIGNED, SPLIT, GATHER }; /* planes with activations as bytes, the same of symmetric tables, planes
                                             * with split activations, rows from memory */

/* Of 64 indices. size: vectors of a plane, or the bits of an index of a symmetric table. */
PLLM_INLINE __m512i dot_chunk_of_bytes(const row_table *t, const __m512i *planes, const uint8_t *source,
                                       const uint8_t *x, enum form form, int d, int size)
{
    const index_chunk k = form == SIGNED ? next_signed_chunk(t, source, d, size) : next_chunk(t, source, size);
    __m512i sum = _mm512_setzero_si512();
    PLLM_UNROLL
    for (int j = 0; j < d; j++) {
        const __m512i index = j < signs_beside(d, size) ? k.index : k.upper;
        const __m512i values = form == SIGNED ? _mm512_permutexvar_epi8(index, planes[j])
                                              : look_up(planes + j * size, &k, size);
        sum = vi_dot_bytes(sum, values, load_64(x + (1 + j) * CHUNK));
    }
    return _mm512_mullo_epi32(sum, load_64(x));
}

PLLM_INLINE __m512i dot_span_of_bytes(const row_table *t, const __m512i *planes, const uint8_t *source,
                                      ptrdiff_t octets, const uint8_t *x, enum form form, int d, int size)
{
    const int whole = SPAN_VALUES / d / CHUNK; /* chunks */
    const ptrdiff_t step = 8 * t->bits;
    __m512i sum = _mm512_setzero_si512();
    if (octets * OCTET * d == SPAN_VALUES) {
        PLLM_UNROLL
        for (int i = 0; i < whole; i++)
            sum = _mm512_add_epi32(sum, dot_chunk_of_bytes(t, planes, source + i * step,
                                                           x + i * (1 + d) * CHUNK, form, d, size));
        return sum;
    }
    for (; octets > 0; octets -= 8, source += step, x += (1 + d) * CHUNK)
        sum = _mm512_add_epi32(sum, dot_chunk_of_bytes(t, planes, source, x, form, d, size));
    return sum;
}

PLLM_INLINE __m512i dot_span_of_planes(const row_table *t, const __m512i *planes, const uint8_t *source,
                                       ptrdiff_t octets, const uint8_t *x, int d, int vectors)
{
    byte_sums s = no_sums();
    for (; octets > 0; octets -= 8, source += 8 * t->bits, x += 2 * d * CHUNK) {
        const index_chunk k = next_chunk(t, source, vectors);
        PLLM_UNROLL
        for (int j = 0; j < d; j++)
            add_products(&s, j % 2, look_up(planes + j * vectors, &k, vectors), load_64(x + 2 * j * CHUNK),
                         load_64(x + (2 * j + 1) * CHUNK));
    }
    return sum_of_bytes(&s);
}

PLLM_INLINE void store_widened(int16_t *target, __m512i bytes)
{
    const __m256i upper = _mm512_extracti64x4_epi64(bytes, 1);
    _mm512_storeu_si512(target, _mm512_cvtepi8_epi16(_mm512_castsi512_si256(bytes)));
    _mm512_storeu_si512(target + HALF_CHUNK, _mm512_cvtepi8_epi16(upper));
}

/* target[at ..] = 64 values, as int16 when `wide`, else as bytes. */
PLLM_INLINE void put_values(void *target, ptrdiff_t at, __m512i values, int wide)
{
    if (wide)
        store_widened((int16_t *)target + at, values);
    else
        _mm512_storeu_si512((int8_t *)target + at, values);
}

/* target: by planes, as the activations are; each 64 values `apart` values from the next. */
PLLM_INLINE void decode_planes(const row_table *t, const uint8_t *source, ptrdiff_t octets, void *target,
                               ptrdiff_t apart, int vectors, int wide)
{
    for (ptrdiff_t to = 0; octets > 0; octets -= 8, source += 8 * t->bits) {
        const index_chunk k = next_chunk(t, source, vectors);
        const int8_t *at = t->rows;
        for (int j = 0; j < t->d; j++, to += apart) {
            __m512i plane[4];
            for (int i = 0; i < vectors; i++, at += CHUNK)
                plane[i] = load_64(at);
            put_values(target, to, look_up(plane, &k, vectors), wide);
        }
    }
}

/* ---- rows from memory ------------------------------------------------------------------------ */

/* The indices of GATHERED lanes; no bit of one is behind 32 bytes. */
PLLM_INLINE __m512i cut_lanes(const row_table *t, const uint8_t *source)
{
    const __m512i bytes = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(const void *)source));
    const __m512i near = _mm512_permutexvar_epi8(load_64(t->take), bytes);
    return _mm512_and_si512(_mm512_srlv_epi32(near, load_64(t->shift)), _mm512_set1_epi32((1 << t->bits) - 1));
}

/* What a cut gives: vectors of rows, and the bits of their indices. */
PLLM_INLINE int gathered_vectors(int stride) { return stride == 4 ? 1 : 2; }
PLLM_INLINE ptrdiff_t gathered_octets(int stride) { return stride == 16 ? 1 : 2; }

/* values (gathered_vectors) = rows side by side. */
PLLM_INLINE void gather(const row_table *t, const uint8_t *source, int stride, __m512i *values)
{
    __m512i index = cut_lanes(t, source);
    if (stride == 4) {
        values[0] = vi_gather4(t->rows, index);
        return;
    }
    if (stride == 16) /* two halves of each row */
        index = _mm512_add_epi32(_mm512_add_epi32(index, index), _mm512_set1_epi64(1ll << 32));
    values[0] = vi_gather8(t->rows, _mm512_castsi512_si256(index));
    values[1] = vi_gather8(t->rows, _mm512_extracti64x4_epi64(index, 1));
}

/* products (GATHERED_ROWS) of spans of as many rows of the matrix. */
PLLM_INLINE void dot_span_gathered(const row_table *t, const uint8_t *const *source, ptrdiff_t octets,
                                   const uint8_t *x, int stride, __m512i *products)
{
    const int vectors = gathered_vectors(stride);
    const ptrdiff_t step = gathered_octets(stride);
    byte_sums s[GATHERED_ROWS] = {no_sums(), no_sums()};
    for (ptrdiff_t at = 0; at < octets; at += step, x += vectors * 2 * CHUNK) {
        __m512i values[GATHERED_ROWS][2];
        PLLM_UNROLL
        for (int r = 0; r < GATHERED_ROWS; r++)
            gather(t, source[r] + at * t->bits, stride, values[r]);
        PLLM_UNROLL
        for (int i = 0; i < vectors; i++) {
            const __m512i low = load_64(x + 2 * i * CHUNK), high = load_64(x + (2 * i + 1) * CHUNK);
            PLLM_UNROLL
            for (int r = 0; r < GATHERED_ROWS; r++)
                add_products(s + r, i, values[r][i], low, high);
        }
    }
    PLLM_UNROLL
    for (int r = 0; r < GATHERED_ROWS; r++)
        products[r] = sum_of_bytes(s + r);
}

/* The rows of `cuts` cuts, from target[to] on, those of each vector `length` values from the next. All are gathered
 * before any is stored: a gather waits for the stores before it. */
PLLM_INLINE void decode_cuts(const row_table *t, const uint8_t *source, int cuts, void *target, ptrdiff_t to,
                             ptrdiff_t length, int stride, int wide)
{
    const __m512i pack = load_64(t->pack);
    const int vectors = gathered_vectors(stride);
    __m512i values[2 * CUTS_TOGETHER];
    PLLM_UNROLL
    for (int i = 0; i < cuts; i++)
        gather(t, source + i * gathered_octets(stride) * t->bits, stride, values + i * vectors);
    PLLM_UNROLL
    for (int i = 0; i < cuts * vectors; i++)
        put_values(target, to + i * length, _mm512_permutexvar_epi8(pack, values[i]), wide);
}

/* target: row after row, without what fills them up to the table's stride; in chunks, each 64 values `apart` values
 * from the next. */
PLLM_INLINE void decode_gathered(const row_table *t, const uint8_t *source, ptrdiff_t octets, void *target,
                                 ptrdiff_t apart, int stride, int wide)
{
    const ptrdiff_t step = gathered_octets(stride), length = is_in_chunks(t) ? apart : CHUNK / stride * t->d;
    const ptrdiff_t cut = gathered_vectors(stride) * length;
    ptrdiff_t to = 0;
    for (; octets >= CUTS_TOGETHER * step; octets -= CUTS_TOGETHER * step, to += CUTS_TOGETHER * cut) {
        decode_cuts(t, source, CUTS_TOGETHER, target, to, length, stride, wide);
        source += CUTS_TOGETHER * step * t->bits;
    }
    for (; octets > 0; octets -= step, source += step * t->bits, to += cut)
        decode_cuts(t, source, 1, target, to, length, stride, wide);
}

/* ---- all rows -------------------------------------------------------------------------------- */

/* dot (count rounded up to DOT_TOGETHER) = the dot products of `count` rows with a token. size: the vectors of a plane,
 * the bits of an index of a symmetric table, or the stride of rows in memory. */
PLLM_INLINE void dot_rows(const row_table *t, const uint8_t *rows, ptrdiff_t stride, ptrdiff_t count,
                          const token_spans *token, float *dot, enum form form, int d, int size)
{
    __m512i planes[PLANE_ROWS * 4];
    for (int i = 0; form != GATHER && i < (form == SIGNED ? d : d * size); i++)
        planes[i] = load_64(t->rows + i * CHUNK);
    const int together = form == GATHER ? GATHERED_ROWS : 1;
    const ptrdiff_t ahead = round_up(AHEAD, form == GATHER ? together * stride : 1); /* behind the rows at hand */
    const ptrdiff_t bytes = token->octets * t->bits;
    for (ptrdiff_t row = 0; row < count; row += DOT_TOGETHER) {
        __m128 total = _mm_setzero_ps();
        for (ptrdiff_t first = 0; first < token->spans; first += SPANS_TOGETHER) {
            const ptrdiff_t end = smaller(first + SPANS_TOGETHER, token->spans);
            row_products products[SPANS_TOGETHER];
            for (int r = 0; r < DOT_TOGETHER; r += together) {
                const uint8_t *source[GATHERED_ROWS];
                for (int i = 0; i < together; i++)
                    source[i] = row_at(rows, stride, count, row + r + i) + first * bytes;
                for (ptrdiff_t s = first; s < end; s++) {
                    const uint8_t *const x = (const uint8_t *)(const void *)(token->x + s * token->width);
                    const ptrdiff_t octets = octets_in(token, s);
                    __m512i *const here = &products[s - first][r];
                    for (int i = 0; i < together; i++)
                        ask_for_rows(source[i], ahead, bytes);
                    if (form == GATHER)
                        dot_span_gathered(t, source, octets, x, size, here);
                    else if (form == SPLIT)
                        *here = dot_span_of_planes(t, planes, *source, octets, x, d, size);
                    else
                        *here = dot_span_of_bytes(t, planes, *source, octets, x, form, d, size);
                    for (int i = 0; i < together; i++)
                        source[i] += bytes;
                }
            }
            total = add_spans(total, products, token, first, end - first);
        }
        _mm_storeu_ps(dot + row, total);
    }
}

/* ---- which for which table ------------------------------------------------------------------- */

#define EACH_VECTORS(X, FORM, D) X(FORM, D, 1) X(FORM, D, 2) X(FORM, D, 4)
#define DOT_FUNCTION(FORM, D, SIZE) \
    static void dot_##FORM##_##D##_##SIZE(const row_table *t, const uint8_t *rows, ptrdiff_t stride, \
                                          ptrdiff_t count, const token_spans *token, float *dot) \
    { \
        dot_rows(t, rows, stride, count, token, dot, FORM, D, SIZE); \
    }
EACH_VECTORS(DOT_FUNCTION, BYTES, 1)
EACH_VECTORS(DOT_FUNCTION, BYTES, 2)
EACH_VECTORS(DOT_FUNCTION, SPLIT, 3)
EACH_VECTORS(DOT_FUNCTION, BYTES, 4)
EACH_VECTORS(DOT_FUNCTION, SPLIT, 8)
DOT_FUNCTION(BYTES, 8, 1)
DOT_FUNCTION(SIGNED, 4, 7)
DOT_FUNCTION(SIGNED, 4, 8)
DOT_FUNCTION(GATHER, 0, 4)
DOT_FUNCTION(GATHER, 0, 8)
DOT_FUNCTION(GATHER, 0, 16)

/* FORM: planes or gathered; SIZE: as of dot_rows. */
#define DECODE_FUNCTIONS(FORM, SIZE) \
    static void decode_##FORM##_##SIZE(const row_table *t, const uint8_t *source, ptrdiff_t octets, \
                                       int16_t *target) \
    { \
        decode_##FORM(t, source, octets, target, CHUNK, SIZE, 1); \
    } \
    static void decode_##FORM##_to_bytes_##SIZE(const row_table *t, const uint8_t *source, ptrdiff_t octets, \
                                                int8_t *target, ptrdiff_t apart) \
    { \
        decode_##FORM(t, source, octets, target, apart, SIZE, 0); \
    }
DECODE_FUNCTIONS(planes, 1)
DECODE_FUNCTIONS(planes, 2)
DECODE_FUNCTIONS(planes, 4)
DECODE_FUNCTIONS(gathered, 4)
DECODE_FUNCTIONS(gathered, 8)
DECODE_FUNCTIONS(gathered, 16)

#define PLANE_ENTRY(FORM, D, VECTORS) {decode_planes_##VECTORS, dot_##FORM##_##D##_##VECTORS},
static const row_functions plane_functions[6][3] = {{EACH_VECTORS(PLANE_ENTRY, BYTES, 1)},
                                                    {EACH_VECTORS(PLANE_ENTRY, BYTES, 2)},
                                                    {EACH_VECTORS(PLANE_ENTRY, SPLIT, 3)},
                                                    {EACH_VECTORS(PLANE_ENTRY, BYTES, 4)},
                                                    {EACH_VECTORS(PLANE_ENTRY, SPLIT, 8)},
                                                    {PLANE_ENTRY(BYTES, 8, 1)}};
#undef DOT_FUNCTION
#undef DECODE_FUNCTIONS
#undef PLANE_ENTRY

static decode_bytes_fn *bytes_decoder_for(const row_table *t)
{
    if (has_planes(t))
        return t->bits <= 6   ? decode_planes_to_bytes_1
               : t->bits == 7 ? decode_planes_to_bytes_2
                              : decode_planes_to_bytes_4;
    return t->stride == 4   ? decode_gathered_to_bytes_4
           : t->stride == 8 ? decode_gathered_to_bytes_8
                            : decode_gathered_to_bytes_16;
}

static row_functions functions_for(const row_table *t)
{
    if (t->symmetric)
        return t->bits == 7 ? (row_functions){decode_planes_2, dot_SIGNED_4_7}
                            : (row_functions){decode_planes_4, dot_SIGNED_4_8};
    if (has_planes(t))
        return plane_functions[t->d < PLANE_ROWS ? t->d - 1 : t->bytes ? 5 : 4][t->bits <= 6 ? 0 : t->bits - 6];
    return t->stride == 4   ? (row_functions){decode_gathered_4, dot_GATHER_0_4}
           : t->stride == 8 ? (row_functions){decode_gathered_8, dot_GATHER_0_8}
                            : (row_functions){decode_gathered_16, dot_GATHER_0_16};
}

#endif
