/* infer_rows_avx512.h - table rows on AVX-512 with VBMI and VNNI. Included by infer_rows.h only.
 *
 * Tables of up to 256 rows lie in registers as planes: plane j holds value j of every row, and a byte
 * permutation looks up 64 indices at once. Larger ones are fetched row by row; their indices are cut out
 * of the payload 32 at once, go through memory, and are loaded from there in pairs.
 *
 * One token is multiplied byte by byte: an activation is 256 h + l with l in 0..255, so that
 *     sum x w = 256 (sum h (w + 128) - 128 sum h) + sum l w
 * takes two sums of products of an unsigned with a signed byte (vpdpbusd), four to a lane. What depends
 * on the activations alone is made once a span. All this is modulo 2^32, and the sum itself fits. */
#ifndef PLLM_INFER_ROWS_AVX512_H
#define PLLM_INFER_ROWS_AVX512_H

enum {
    CHUNK = 64,        /* bytes of a vector: values multiplied at once */
    HALF_CHUNK = 32,   /* int16 of a vector */
    OCTET_BYTES = 64,  /* what reading eight indices may touch */
    TARGET_SLACK = 64, /* values behind a decoded span that may be written */
    DOT_TOGETHER = 4,  /* rows whose sums over lanes are taken together */
    PLANE_BITS = 8,    /* the most bits of an index into planes */
    PLANE_ROWS = 8,    /* the most values of a row in them */
    PAIRED_BITS = 6    /* indices of pairs: one permutation looks them up */
};

/* Rows of d values, 2^bits of them. */
struct row_table {
    const int8_t *rows;
    int d, bits;
    int pairing; /* an index of this table is 2^pairing indices of the codec, side by side */
    int stride;  /* bytes from row to row, a power of two; 0 for planes */
    int one_by_one; /* one token: its activations are split into bytes */
    /* For cutting out indices: the bytes that each eight of a vector take, and their bits (see plan_cut).
     * For packing: where the values of fetched rows stand. */
    uint8_t take[CHUNK], shift[CHUNK], pack[CHUNK];
};

static int has_planes(const row_table *t) { return t->stride == 0; }

/* Vectors of a plane. */
static int plane_vectors(int bits) { return bits <= 6 ? 1 : 1 << (bits - 6); }

/* Indices become bytes in planes, words else. The indices of eight bytes, 8 or 4, fit these eight bytes of
 * the payload even where they start within a byte. An index that is narrower carries bits of the
 * next with it. */
static void plan_cut(row_table *t)
{
    const int size = has_planes(t) ? 1 : 2, together = 8 / size;
    for (int at = 0; at < CHUNK; at++) {
        const int first = at / 8 * together * t->bits;
        t->take[at] = (uint8_t)(first / 8 + at % 8);
        t->shift[at] = (uint8_t)(first % 8 + at % 8 / size * t->bits + at % size * 8);
        t->pack[at] = (uint8_t)(at / t->d * t->stride + at % t->d);
    }
}

/* Spans of 1, 2, 3, 4 and 8 values a row are whole chunks of indices, or nearly: d = 3 wastes an eighth. */
static row_table plan_rows(const pllm_codec *c, ptrdiff_t indices, ptrdiff_t tokens)
{
    row_table t = {.d = c->d, .bits = c->index_bits, .one_by_one = tokens == 1};
    if (t.bits > PLANE_BITS || (t.d > 4 && t.d != PLANE_ROWS))
        t.stride = t.d <= 4 ? 4 : t.d <= 8 ? 8 : 16;
    else
        while (may_pair(t.d, t.bits, t.pairing, indices) && 2 * t.bits <= PAIRED_BITS &&
               2 * t.d <= PLANE_ROWS) {
            t.d *= 2;
            t.bits *= 2;
            t.pairing++;
        }
    plan_cut(&t);
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
        return (size_t)(t->d * plane_vectors(t->bits) * CHUNK);
    return is_in_place(t, c) ? 0 : (size_t)t->stride << t->bits;
}

/* target: planes (d, 64 * vectors). Fewer than 64 rows are repeated: no bit of an index then counts
 * that is not its own. */
static void make_planes(const row_table *t, const pllm_codec *c, int8_t *target)
{
    const int length = plane_vectors(t->bits) * CHUNK;
    for (int row = 0; row < length; row++) {
        int8_t values[PLLM_MAX_SUBVECTOR];
        copy_row(c, t->pairing, row & ((1 << t->bits) - 1), values);
        for (int j = 0; j < t->d; j++)
            target[j * length + row] = values[j];
    }
}

/* Fills t->rows, in memory (row_table_bytes) or in place. */
static void make_rows(row_table *t, const pllm_codec *c, void *memory)
{
    int8_t *const target = memory;
    t->rows = target;
    if (has_planes(t))
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
    if (has_planes(t))
        return round_up(span, CHUNK) * t->d + (t->one_by_one ? HALF_CHUNK : 0);
    return t->one_by_one ? round_up(span * t->stride, 2 * CHUNK) + HALF_CHUNK : round_up(span * t->d, HALF_CHUNK);
}

/* Each 64 of the values become 64 low bytes and 64 high bytes; behind them what the products of the high
 * bytes with w + 128 are too large. */
static void split_values(int16_t *x, ptrdiff_t values)
{
    int32_t sum = 0;
    for (ptrdiff_t at = 0; at < values; at += CHUNK) {
        uint8_t bytes[2 * CHUNK];
        for (int i = 0; i < CHUNK; i++) {
            bytes[i] = (uint8_t)(x[at + i] & 255);
            bytes[CHUNK + i] = (uint8_t)(x[at + i] >> 8);
            sum += x[at + i] >> 8;
        }
        memcpy(x + at, bytes, sizeof bytes);
    }
    sum *= 256 * 128; /* at most 512 * 2^7 * 2^15 */
    memcpy(x + values, &sum, sizeof sum);
}

/* target (span, d), by planes = x (span, d). Both must have room for whole chunks of indices. */
static void order_by_planes(const int16_t *x, ptrdiff_t span, int d, int16_t *target)
{
    const __m512i lanes = _mm512_add_epi32(_mm512_mullo_epi32(vi_iota(), _mm512_set1_epi32(0x20002)),
                                           _mm512_set1_epi32(0x10000)); /* words 0, 1, 2, ... */
    for (ptrdiff_t i = 0; i < span; i += HALF_CHUNK)
        for (int j = 0; j < d; j++) {
            const __m512i from = _mm512_add_epi16(_mm512_mullo_epi16(lanes, _mm512_set1_epi16((int16_t)d)),
                                                  _mm512_set1_epi16((int16_t)j));
            const __m512i vector = _mm512_srli_epi16(from, 5);
            __m512i values = _mm512_setzero_si512();
            for (int s = 0; s < d; s++) { /* the last that is not behind it stays */
                const __mmask32 reached = _mm512_cmpge_epi16_mask(vector, _mm512_set1_epi16((int16_t)s));
                values = _mm512_mask_permutexvar_epi16(values, reached, from,
                                                       _mm512_loadu_si512(x + i * d + s * HALF_CHUNK));
            }
            _mm512_storeu_si512(target + i / CHUNK * CHUNK * d + j * CHUNK + i % CHUNK, values);
        }
}

/* target (span_width) = the activations of a span, in the order in which the products meet it: by planes of each 64
 * indices, or with rows as far apart as the table's. */
static void arrange(const row_table *t, ptrdiff_t span, const quantised_span *q, int16_t *target)
{
    int16_t x[LAID_OUT];
    memset(x + SPAN_VALUES, 0, sizeof x - SPAN_VALUES * sizeof *x);
    const ptrdiff_t width = span_width(t, span), d = t->d;
    join_multipliers(q, SPAN_VALUES, x);
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

PLLM_INLINE __m512i load_64(const void *p) { return _mm512_loadu_si512(p); }

/* Sums of products with low and high bytes; several of each, because a sum waits for the one before it. */
typedef struct {
    __m512i low[4], high[4];
} byte_sums;

PLLM_INLINE byte_sums no_sums(void)
{
    const __m512i zero = _mm512_setzero_si512();
    return (byte_sums){{zero, zero, zero, zero}, {zero, zero, zero, zero}};
}

/* x: 64 low bytes and 64 high bytes of the activations that meet the 64 values. */
PLLM_INLINE void add_products(byte_sums *s, int which, __m512i values, const uint8_t *x)
{
    const __m512i raised = _mm512_xor_si512(values, _mm512_set1_epi8(-128));
    s->low[which] = vi_dot_bytes(s->low[which], load_64(x), values);
    s->high[which] = vi_dot_bytes(s->high[which], raised, load_64(x + CHUNK));
}

PLLM_INLINE __m512i sum_of_four(const __m512i *s)
{
    return _mm512_add_epi32(_mm512_add_epi32(s[0], s[1]), _mm512_add_epi32(s[2], s[3]));
}

PLLM_INLINE __m512i sum_of_bytes(const byte_sums *s)
{
    return _mm512_add_epi32(sum_of_four(s->low), _mm512_slli_epi32(sum_of_four(s->high), 8));
}

/* dot + the scale of span s times its products, those of each row in the lanes of one vector. */
PLLM_INLINE __m128 add_span(__m128 dot, const __m512i *products, const token_spans *token, ptrdiff_t s)
{
    int32_t sums[DOT_TOGETHER], excess;
    memcpy(&excess, token->x + (s + 1) * token->width - HALF_CHUNK, sizeof excess);
    vi_sum4(sums, products[0], products[1], products[2], products[3]);
    const __m128i whole = _mm_loadu_si128((const __m128i *)(const void *)sums);
    const __m128 exact = _mm_cvtepi32_ps(_mm_sub_epi32(whole, _mm_set1_epi32(excess)));
    return _mm_fmadd_ps(_mm_set1_ps(token->scale[s]), exact, dot);
}

/* The activations of span s. */
PLLM_INLINE const uint8_t *bytes_of(const token_spans *token, ptrdiff_t s)
{
    return (const uint8_t *)(const void *)(token->x + s * token->width);
}

/* Indices cut out: 64 as bytes, or 32 as words whose upper bits are to be ignored. */
PLLM_INLINE __m512i cut(const row_table *t, const uint8_t *source)
{
    const __m512i near = _mm512_permutexvar_epi8(load_64(t->take), load_64(source));
    return _mm512_multishift_epi64_epi8(load_64(t->shift), near);
}

/* ---- look-ups in planes ---------------------------------------------------------------------- */

/* 64 indices, and which have which of the bits that choose a vector of a plane. */
typedef struct {
    __m512i index;
    __mmask64 bit_7, bits_6_and_7;
} index_chunk;

PLLM_INLINE index_chunk next_chunk(const row_table *t, const uint8_t *source, int vectors)
{
    index_chunk k = {vectors == 4 ? load_64(source) : cut(t, source), 0, 0};
    if (vectors == 4) {
        const __m512i twice = _mm512_add_epi8(k.index, k.index);
        k.bit_7 = _mm512_movepi8_mask(k.index);
        k.bits_6_and_7 = _mm512_movepi8_mask(_mm512_and_si512(k.index, twice));
    }
    return k;
}

/* One value for each index. plane: `vectors` of them. */
PLLM_INLINE __m512i look_up(const __m512i *plane, const index_chunk *k, int vectors)
{
    if (vectors == 1)
        return _mm512_permutexvar_epi8(k->index, plane[0]);
    __m512i values = _mm512_permutex2var_epi8(plane[0], k->index, plane[1]);
    if (vectors == 4) {
        values = _mm512_mask_permutexvar_epi8(values, k->bit_7, k->index, plane[2]);
        values = _mm512_mask_permutexvar_epi8(values, k->bits_6_and_7, k->index, plane[3]);
    }
    return values;
}

PLLM_INLINE __m512i dot_span_of_planes(const row_table *t, const __m512i *planes, const uint8_t *source,
                                       ptrdiff_t octets, const uint8_t *x, int d, int vectors)
{
    const int together = vectors == 4 ? 2 : 4; /* sums in registers beside the planes */
    byte_sums s = no_sums();
    for (; octets > 0; octets -= 8, source += 8 * t->bits, x += 2 * d * CHUNK) {
        const index_chunk k = next_chunk(t, source, vectors);
        PLLM_UNROLL
        for (int j = 0; j < d; j++)
            add_products(&s, j % together, look_up(planes + j * vectors, &k, vectors), x + 2 * j * CHUNK);
    }
    return sum_of_bytes(&s);
}

PLLM_INLINE void dot_planes(const row_table *t, const uint8_t *rows, ptrdiff_t stride, ptrdiff_t count,
                            const token_spans *token, float *dot, int d, int vectors)
{
    __m512i planes[PLANE_ROWS * 4];
    for (int i = 0; i < d * vectors; i++)
        planes[i] = load_64(t->rows + i * CHUNK);
    for (ptrdiff_t first = 0; first < count; first += DOT_TOGETHER) {
        __m128 sums = _mm_setzero_ps();
        for (ptrdiff_t s = 0; s < token->spans; s++) {
            __m512i products[DOT_TOGETHER];
            for (int r = 0; r < DOT_TOGETHER; r++)
                products[r] = dot_span_of_planes(t, planes, row_at(rows, stride, count, first + r) +
                                                                s * token->octets * t->bits,
                                                 octets_in(token, s), bytes_of(token, s), d, vectors);
            sums = add_span(sums, products, token, s);
        }
        _mm_storeu_ps(dot + first, sums);
    }
}

PLLM_INLINE void store_widened(int16_t *target, __m512i bytes)
{
    const __m256i upper = _mm512_extracti64x4_epi64(bytes, 1);
    _mm512_storeu_si512(target, _mm512_cvtepi8_epi16(_mm512_castsi512_si256(bytes)));
    _mm512_storeu_si512(target + HALF_CHUNK, _mm512_cvtepi8_epi16(upper));
}

/* target: by planes, as the activations are. */
PLLM_INLINE void decode_planes(const row_table *t, const uint8_t *source, ptrdiff_t octets, int16_t *target,
                               int vectors)
{
    for (; octets > 0; octets -= 8, source += 8 * t->bits) {
        const index_chunk k = next_chunk(t, source, vectors);
        const int8_t *at = t->rows;
        for (int j = 0; j < t->d; j++, target += CHUNK) {
            __m512i plane[4];
            for (int i = 0; i < vectors; i++, at += CHUNK)
                plane[i] = load_64(at);
            store_widened(target, look_up(plane, &k, vectors));
        }
    }
}

/* The same as bytes. */
PLLM_INLINE void decode_planes_to_bytes(const row_table *t, const uint8_t *source, ptrdiff_t octets,
                                        int8_t *target, int vectors)
{
    for (; octets > 0; octets -= 8, source += 8 * t->bits) {
        const index_chunk k = next_chunk(t, source, vectors);
        const int8_t *at = t->rows;
        for (int j = 0; j < t->d; j++, target += CHUNK) {
            __m512i plane[4];
            for (int i = 0; i < vectors; i++, at += CHUNK)
                plane[i] = load_64(at);
            _mm512_storeu_si512(target, look_up(plane, &k, vectors));
        }
    }
}

/* ---- rows from memory ------------------------------------------------------------------------ */

typedef struct {
    uint16_t index[SPAN_VALUES + 32];
} index_buffer;

/* The indices at source as words. */
PLLM_INLINE const uint8_t *cut_span(const row_table *t, const uint8_t *source, ptrdiff_t octets,
                                    index_buffer *buffer)
{
    uint8_t *const words = (uint8_t *)buffer->index;
    const __m512i own = _mm512_set1_epi16((int16_t)((1 << t->bits) - 1));
    if (t->bits == 16)
        return source;
    for (ptrdiff_t i = 0; i < octets; i += 4, source += 4 * t->bits)
        _mm512_storeu_si512(words + 16 * i, _mm512_and_si512(cut(t, source), own));
    return words;
}

/* Lanes 1, 2 and 3 of a vector, and the middle ones of four words. Their values are hidden from the
 * compiler, which would make shuffles and vector shifts of masks it knows. */
typedef struct {
    __mmask8 lane[4];
    uint64_t word_1, word_2;
} fetch_masks;

PLLM_INLINE fetch_masks make_masks(void)
{
    fetch_masks m = {.word_1 = 0xffff0000, .word_2 = 0xffff00000000};
    PLLM_OPAQUE(m.word_1);
    PLLM_OPAQUE(m.word_2);
    PLLM_UNROLL
    for (int i = 1; i < 4; i++) {
        uint32_t bit = 1u << i;
        PLLM_OPAQUE(bit);
        m.lane[i] = (__mmask8)bit;
    }
    return m;
}

/* row[0..4) = the rows of the four words at k. */
PLLM_INLINE void find_rows(const int8_t *rows, const uint8_t *k, int stride, const fetch_masks *m,
                           const int8_t **row)
{
    const uint64_t word = pllm_load_word(k);
    row[0] = rows + (size_t)(word & 65535) * (size_t)stride;
    row[1] = rows + (size_t)_pext_u64(word, m->word_1) * (size_t)stride;
    row[2] = rows + (size_t)_pext_u64(word, m->word_2) * (size_t)stride;
    row[3] = rows + (size_t)(word >> 48) * (size_t)stride;
}

/* Four rows side by side. A row comes into its lane by a load that repeats it and a mask, which leaves
 * alone the one port for moves between lanes. */
PLLM_INLINE __m128i four_rows_of_4(const int8_t *rows, const uint8_t *k, const fetch_masks *m)
{
    const int8_t *row[4];
    __m128i joined = _mm_setzero_si128();
    find_rows(rows, k, 4, m, row);
    PLLM_UNROLL
    for (int i = 0; i < 4; i++) {
        int32_t four;
        memcpy(&four, row[i], sizeof four);
        joined = i == 0 ? _mm_cvtsi32_si128(four)
                        : _mm_mask_mov_epi32(joined, m->lane[i], _mm_set1_epi32(four));
    }
    return joined;
}

/* Two of four rows. */
PLLM_INLINE __m128i two_rows_of_8(const int8_t *const *row, const fetch_masks *m)
{
    int64_t first, second;
    memcpy(&first, row[0], sizeof first);
    memcpy(&second, row[1], sizeof second);
    return _mm_mask_mov_epi64(_mm_cvtsi64_si128(first), m->lane[1], _mm_set1_epi64x(second));
}

PLLM_INLINE __m128i load_16(const int8_t *p) { return _mm_loadu_si128((const __m128i *)(const void *)p); }

PLLM_INLINE __m512i join(__m128i a, __m128i b, __m128i c, __m128i d)
{
    const __m512i two = _mm512_inserti32x4(_mm512_castsi128_si512(a), b, 1);
    return _mm512_inserti32x4(_mm512_inserti32x4(two, c, 2), d, 3);
}

/* 64 bytes of rows, of the words at k. */
PLLM_INLINE __m512i fetch(const int8_t *rows, const uint8_t *k, int stride, const fetch_masks *m)
{
    const int8_t *row[8];
    if (stride == 4)
        return join(four_rows_of_4(rows, k, m), four_rows_of_4(rows, k + 8, m),
                    four_rows_of_4(rows, k + 16, m), four_rows_of_4(rows, k + 24, m));
    find_rows(rows, k, stride, m, row);
    if (stride == 16)
        return join(load_16(row[0]), load_16(row[1]), load_16(row[2]), load_16(row[3]));
    find_rows(rows, k + 8, 8, m, row + 4);
    return join(two_rows_of_8(row, m), two_rows_of_8(row + 2, m), two_rows_of_8(row + 4, m),
                two_rows_of_8(row + 6, m));
}

/* Vectors of rows in so many octets. */
PLLM_INLINE ptrdiff_t fetches(ptrdiff_t octets, int stride) { return (octets * stride + 7) / 8; }

PLLM_INLINE __m512i dot_span_fetched(const row_table *t, const uint8_t *source, ptrdiff_t octets,
                                     const uint8_t *x, int stride, const fetch_masks *m)
{
    index_buffer buffer;
    byte_sums s = no_sums();
    const uint8_t *k = cut_span(t, source, octets, &buffer);
    for (ptrdiff_t n = fetches(octets, stride); n > 0; n -= 2, k += 4 * CHUNK / stride, x += 4 * CHUNK) {
        add_products(&s, 0, fetch(t->rows, k, stride, m), x);
        add_products(&s, 1, fetch(t->rows, k + 2 * CHUNK / stride, stride, m), x + 2 * CHUNK);
    }
    return sum_of_bytes(&s);
}

PLLM_INLINE void dot_fetched(const row_table *t, const uint8_t *rows, ptrdiff_t stride, ptrdiff_t count,
                             const token_spans *token, float *dot, int table_stride)
{
    const fetch_masks m = make_masks();
    for (ptrdiff_t first = 0; first < count; first += DOT_TOGETHER) {
        __m128 sums = _mm_setzero_ps();
        for (ptrdiff_t s = 0; s < token->spans; s++) {
            __m512i products[DOT_TOGETHER];
            for (int r = 0; r < DOT_TOGETHER; r++)
                products[r] = dot_span_fetched(t, row_at(rows, stride, count, first + r) +
                                                      s * token->octets * t->bits,
                                               octets_in(token, s), bytes_of(token, s), table_stride, &m);
            sums = add_span(sums, products, token, s);
        }
        _mm_storeu_ps(dot + first, sums);
    }
}

/* target: row after row, without what fills them up to the table's stride. */
PLLM_INLINE void decode_fetched(const row_table *t, const uint8_t *source, ptrdiff_t octets, int16_t *target,
                                int stride)
{
    index_buffer buffer;
    const __m512i pack = load_64(t->pack);
    const fetch_masks m = make_masks();
    const uint8_t *k = cut_span(t, source, octets, &buffer);
    for (ptrdiff_t n = fetches(octets, stride); n > 0; n--, k += 2 * CHUNK / stride) {
        store_widened(target, _mm512_permutexvar_epi8(pack, fetch(t->rows, k, stride, &m)));
        target += CHUNK / stride * t->d;
    }
}

/* 64 bytes of rows, of the words at k. */
PLLM_INLINE __m512i gather(const int8_t *rows, const uint8_t *k, int stride, const fetch_masks *m)
{
#ifndef PLLM_SIMDE
    if (stride == 4)
        return _mm512_i32gather_epi32(vi_load_u16((const uint16_t *)(const void *)k), rows, 4);
    if (stride == 8)
        return _mm512_i32gather_epi64(_mm256_cvtepu16_epi32(load_16((const int8_t *)k)), rows, 8);
#endif
    return fetch(rows, k, stride, m);
}

/* The same as bytes, by gathers. */
PLLM_INLINE void decode_fetched_to_bytes(const row_table *t, const uint8_t *source, ptrdiff_t octets,
                                         int8_t *target, int stride)
{
    index_buffer buffer;
    const __m512i pack = load_64(t->pack);
    const fetch_masks m = make_masks();
    const uint8_t *k = cut_span(t, source, octets, &buffer);
    for (ptrdiff_t n = fetches(octets, stride); n > 0; n--, k += 2 * CHUNK / stride) {
        _mm512_storeu_si512(target, _mm512_permutexvar_epi8(pack, gather(t->rows, k, stride, &m)));
        target += CHUNK / stride * t->d;
    }
}

/* ---- which for which table ------------------------------------------------------------------- */

#define EACH_VECTORS(X, D) X(D, 1) X(D, 2) X(D, 4)
#define PLANE_DOT(D, VECTORS) \
    static void dot_planes_##D##_##VECTORS(const row_table *t, const uint8_t *rows, ptrdiff_t stride, \
                                     ptrdiff_t count, const token_spans *token, float *dot) \
    { \
        dot_planes(t, rows, stride, count, token, dot, D, VECTORS); \
    }
EACH_VECTORS(PLANE_DOT, 1)
EACH_VECTORS(PLANE_DOT, 2)
EACH_VECTORS(PLANE_DOT, 3)
EACH_VECTORS(PLANE_DOT, 4)
EACH_VECTORS(PLANE_DOT, 8)

#define PLANE_DECODE(VECTORS) \
    static void decode_planes_##VECTORS(const row_table *t, const uint8_t *source, ptrdiff_t octets, \
                                        int16_t *target) \
    { \
        decode_planes(t, source, octets, target, VECTORS); \
    }
PLANE_DECODE(1)
PLANE_DECODE(2)
PLANE_DECODE(4)

#define FETCH_FUNCTIONS(STRIDE) \
    static void dot_fetched_##STRIDE(const row_table *t, const uint8_t *rows, ptrdiff_t stride, \
                                     ptrdiff_t count, const token_spans *token, float *dot) \
    { \
        dot_fetched(t, rows, stride, count, token, dot, STRIDE); \
    } \
    static void decode_fetched_##STRIDE(const row_table *t, const uint8_t *source, ptrdiff_t octets, \
                                        int16_t *target) \
    { \
        decode_fetched(t, source, octets, target, STRIDE); \
    }
FETCH_FUNCTIONS(4)
FETCH_FUNCTIONS(8)
FETCH_FUNCTIONS(16)

#define PLANE_ENTRY(D, VECTORS) {decode_planes_##VECTORS, dot_planes_##D##_##VECTORS},
static const row_functions plane_functions[5][3] = {{EACH_VECTORS(PLANE_ENTRY, 1)},
                                                    {EACH_VECTORS(PLANE_ENTRY, 2)},
                                                    {EACH_VECTORS(PLANE_ENTRY, 3)},
                                                    {EACH_VECTORS(PLANE_ENTRY, 4)},
                                                    {EACH_VECTORS(PLANE_ENTRY, 8)}};
#define BYTES_DECODER(FORM, WHICH) \
    static void decode_##FORM##_to_bytes_##WHICH(const row_table *t, const uint8_t *source, ptrdiff_t octets, \
                                                 int8_t *target) \
    { \
        decode_##FORM##_to_bytes(t, source, octets, target, WHICH); \
    }
BYTES_DECODER(planes, 1)
BYTES_DECODER(planes, 2)
BYTES_DECODER(planes, 4)
BYTES_DECODER(fetched, 4)
BYTES_DECODER(fetched, 8)
BYTES_DECODER(fetched, 16)
#undef BYTES_DECODER

static decode_bytes_fn *bytes_decoder_for(const row_table *t)
{
    if (has_planes(t))
        return t->bits <= 6   ? decode_planes_to_bytes_1
               : t->bits == 7 ? decode_planes_to_bytes_2
                              : decode_planes_to_bytes_4;
    return t->stride == 4   ? decode_fetched_to_bytes_4
           : t->stride == 8 ? decode_fetched_to_bytes_8
                            : decode_fetched_to_bytes_16;
}

#undef PLANE_DOT
#undef PLANE_DECODE
#undef FETCH_FUNCTIONS
#undef PLANE_ENTRY

static row_functions functions_for(const row_table *t)
{
    if (has_planes(t))
        return plane_functions[t->d == PLANE_ROWS ? 4 : t->d - 1][t->bits <= 6 ? 0 : t->bits - 6];
    return t->stride == 4   ? (row_functions){decode_fetched_4, dot_fetched_4}
           : t->stride == 8 ? (row_functions){decode_fetched_8, dot_fetched_8}
                            : (row_functions){decode_fetched_16, dot_fetched_16};
}

#endif
