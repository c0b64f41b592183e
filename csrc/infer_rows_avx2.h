/* infer_rows_avx2.h - fetching table rows on AVX2, for rows of 2, 4, 8 and 16 values: d and
 * the bits of an index are compile-time constants, sixteen values at a time stay in registers. The cost is the
 * number of instructions per index: about 1.5 to cut it out, 1 to 2 to fetch its row, 1 to multiply.
 * For one token other rows are filled up with zeros to these sizes. Small tables are looked up in registers instead.
 * Included by infer_rows_any.h only. */
#ifndef PLLM_INFER_ROWS_AVX2_H
#define PLLM_INFER_ROWS_AVX2_H

/* four_indices for constant bits: fewer instructions where indices are whole bytes. */
PLLM_INLINE void cut_four(const uint8_t *source, int bits, int half, uint32_t *index)
{
    uint32_t a, b;
    if (bits == 8) {
        memcpy(&a, source + 4 * half, sizeof a);
        index[0] = a & 255;
        index[1] = a >> 8 & 255;
        a >>= 16;
        PLLM_OPAQUE(a);
        index[2] = a & 255;
        index[3] = a >> 8;
    } else if (bits == 12) { /* an index is in two bytes, and either their top or their bottom */
        for (int j = 0; j < 4; j++) {
            uint16_t word;
            memcpy(&word, source + 6 * half + j / 2 * 3 + j % 2, sizeof word);
            uint32_t wide = word;
            PLLM_OPAQUE(wide);
            index[j] = j % 2 ? wide >> 4 : wide & 4095;
        }
    } else if (bits == 16) {
        memcpy(&a, source + 8 * half, sizeof a);
        memcpy(&b, source + 8 * half + 4, sizeof b);
        index[0] = a & 65535;
        index[1] = a >> 16;
        index[2] = b & 65535;
        index[3] = b >> 16;
    } else {
        four_indices(source, bits, half, index);
    }
}

PLLM_INLINE __m128i load_16(const char *p) { return _mm_loadu_si128((const __m128i *)(const void *)p); }

PLLM_INLINE __m128i load_4(const char *p)
{
    int32_t four;
    memcpy(&four, p, sizeof four);
    return _mm_cvtsi32_si128(four);
}

/* Rows side by side. Those of 2 and 4 bytes are joined by unpacking with 16 bytes from memory, of which
 * the first count: one instruction, where an insertion takes two. */
PLLM_INLINE __m128i eight_rows_of_2(const char *t, const uint32_t *k)
{
    const __m128i a = _mm_unpacklo_epi16(load_4(t + 2 * (size_t)k[0]), load_16(t + 2 * (size_t)k[1]));
    const __m128i b = _mm_unpacklo_epi16(load_4(t + 2 * (size_t)k[2]), load_16(t + 2 * (size_t)k[3]));
    const __m128i c = _mm_unpacklo_epi16(load_4(t + 2 * (size_t)k[4]), load_16(t + 2 * (size_t)k[5]));
    const __m128i d = _mm_unpacklo_epi16(load_4(t + 2 * (size_t)k[6]), load_16(t + 2 * (size_t)k[7]));
    return _mm_unpacklo_epi64(_mm_unpacklo_epi32(a, b), _mm_unpacklo_epi32(c, d));
}

PLLM_INLINE __m128i four_rows_of_4(const char *t, const uint32_t *k)
{
    const __m128i a = _mm_unpacklo_epi32(load_4(t + 4 * (size_t)k[0]), load_16(t + 4 * (size_t)k[1]));
    const __m128i b = _mm_unpacklo_epi32(load_4(t + 4 * (size_t)k[2]), load_16(t + 4 * (size_t)k[3]));
    return _mm_unpacklo_epi64(a, b);
}

PLLM_INLINE __m128i two_rows_of_8(const char *t, const uint32_t *k)
{
    const double *const first = (const double *)(const void *)(t + 8 * (size_t)k[0]);
    const double *const second = (const double *)(const void *)(t + 8 * (size_t)k[1]);
    return _mm_castpd_si128(_mm_loadh_pd(_mm_load_sd(first), second));
}

PLLM_INLINE __m128i row_of_16(const char *t, const uint32_t *k) { return load_16(t + 16 * (size_t)*k); }

PLLM_INLINE __m256i join(__m128i low, __m128i high)
{
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

/* Sixteen values: 16 / d rows. */
PLLM_INLINE __m256i sixteen_values(const char *t, const uint32_t *k, int d, int wide)
{
    if (wide)
        return d == 2   ? join(four_rows_of_4(t, k), four_rows_of_4(t, k + 4))
               : d == 4 ? join(two_rows_of_8(t, k), two_rows_of_8(t, k + 2))
               : d == 8 ? join(row_of_16(t, k), row_of_16(t, k + 1))
                        : _mm256_loadu_si256((const __m256i *)(const void *)(t + 32 * (size_t)*k));
    return _mm256_cvtepi8_epi16(d == 2   ? eight_rows_of_2(t, k)
                                : d == 4 ? four_rows_of_4(t, k)
                                : d == 8 ? two_rows_of_8(t, k)
                                         : row_of_16(t, k));
}

PLLM_INLINE void decode_fetched(const row_table *table, const uint8_t *source, ptrdiff_t octets,
                                int d, int bits, int16_t *target)
{
    const char *const t = table->rows;
    const int wide = d << bits <= WIDE_VALUES;
    for (ptrdiff_t i = 0; i < octets; i++, source += bits, target += OCTET * d) {
        uint32_t k[OCTET];
        cut_four(source, bits, 0, k);
        cut_four(source, bits, 1, k + 4);
        PLLM_UNROLL
        for (int v = 0; v < d / 2; v++)
            _mm256_storeu_si256((__m256i *)(void *)(target + 16 * v),
                                sixteen_values(t, k + 16 / d * v, d, wide));
    }
}

/* The products of a span of a row of the matrix with a token, in lanes; d / 2 vectors an octet, in two sums. */
PLLM_INLINE __m256i span_fetched(const row_table *table, const uint8_t *source, const int16_t *x,
                                 ptrdiff_t octets, int d, int bits)
{
    const char *const t = table->rows;
    const int wide = d << bits <= WIDE_VALUES;
    __m256i even = _mm256_setzero_si256(), odd = even;
    for (const uint8_t *const end = source + octets * bits; source < end; source += bits, x += OCTET * d) {
        uint32_t k[OCTET];
        cut_four(source, bits, 0, k);
        cut_four(source, bits, 1, k + 4);
        PLLM_UNROLL
        for (int v = 0; v < d / 2; v++) {
            const __m256i xs = _mm256_loadu_si256((const __m256i *)(const void *)(x + 16 * v));
            const __m256i product = _mm256_madd_epi16(sixteen_values(t, k + 16 / d * v, d, wide), xs);
            if (v % 2)
                odd = _mm256_add_epi32(odd, product);
            else
                even = _mm256_add_epi32(even, product);
        }
    }
    return _mm256_add_epi32(even, odd);
}

/* ---- look-ups in registers ------------------------------------------------------------------- */

/* 32 indices of at most 8 bits as bytes, in quarters: 0 and 2 in the lower half, 1 and 3 in the upper. Those of
 * 4 bits: first the even, then the odd; those of 8 bits in order. */
PLLM_INLINE __m256i indices_as_bytes(const uint8_t *source, int bits)
{
    if (bits == 8)
        return _mm256_loadu_si256((const __m256i *)(const void *)source);
    if (bits == 4) {
        const __m256i twice = _mm256_broadcastsi128_si256(load_16((const char *)source));
        const __m256i even_odd = _mm256_srlv_epi64(twice, _mm256_setr_epi64x(0, 0, 4, 4));
        return _mm256_and_si256(even_odd, _mm256_set1_epi8(15));
    }
    /* A lane of 16 bits takes the two bytes that index i is in, and multiplies it up to its top. */
#define PICK(i) (char)((i) * bits / 8), (char)((i) * bits / 8 + 1)
#define RAISE(i) (short)(1 << (16 - bits - (i) * bits % 8))
    const __m256i pick =
        _mm256_setr_epi8(PICK(0), PICK(1), PICK(2), PICK(3), PICK(4), PICK(5), PICK(6), PICK(7), PICK(8),
                         PICK(9), PICK(10), PICK(11), PICK(12), PICK(13), PICK(14), PICK(15));
    const __m256i raise =
        _mm256_setr_epi16(RAISE(0), RAISE(1), RAISE(2), RAISE(3), RAISE(4), RAISE(5), RAISE(6), RAISE(7),
                          RAISE(8), RAISE(9), RAISE(10), RAISE(11), RAISE(12), RAISE(13), RAISE(14), RAISE(15));
#undef PICK
#undef RAISE
    __m256i half[2];
    for (int h = 0; h < 2; h++) {
        const __m256i bytes = _mm256_broadcastsi128_si256(load_16((const char *)source + 2 * bits * h));
        const __m256i words = _mm256_shuffle_epi8(bytes, pick);
        half[h] = _mm256_srli_epi16(_mm256_mullo_epi16(words, raise), 16 - bits);
    }
    return _mm256_packus_epi16(half[0], half[1]);
}

/* Even bytes, then odd ones. */
PLLM_INLINE __m256i evens_and_odds(__m256i bytes)
{
    const __m256i pick = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15, 0, 2, 4, 6, 8, 10,
                                          12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    return _mm256_permute4x64_epi64(_mm256_shuffle_epi8(bytes, pick), 0xd8);
}

/* bytes[j] = value j of 32 indices, d after d at x: those of each index in order. */
PLLM_INLINE void separate_values(const int16_t *x, int d, __m256i *bytes)
{
    const __m256i pick = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 0, 4, 8, 12, 1, 5, 9,
                                          13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m256i halves = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256i part[LOOK_UP_VALUES];
    for (int i = 0; i < d; i++) {
        const __m256i *const at = (const __m256i *)(const void *)(x + LOOKED_UP * i);
        part[i] = _mm256_packs_epi16(_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1));
        part[i] = _mm256_permute4x64_epi64(part[i], 0xd8);
        if (d == 2)
            part[i] = evens_and_odds(part[i]);
        else if (d == 4) /* eight of each value */
            part[i] = _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(part[i], pick), halves);
    }
    if (d == 1)
        bytes[0] = part[0];
    else if (d == 2)
        for (int j = 0; j < 2; j++)
            bytes[j] = j ? _mm256_permute2x128_si256(part[0], part[1], 0x31)
                         : _mm256_permute2x128_si256(part[0], part[1], 0x20);
    else
        for (int odd = 0; odd < 2; odd++) {
            __m256i pair[2];
            for (int i = 0; i < 2; i++)
                pair[i] = odd ? _mm256_unpackhi_epi64(part[2 * i], part[2 * i + 1])
                              : _mm256_unpacklo_epi64(part[2 * i], part[2 * i + 1]);
            bytes[odd] = _mm256_permute2x128_si256(pair[0], pair[1], 0x20);
            bytes[odd + 2] = _mm256_permute2x128_si256(pair[0], pair[1], 0x31);
        }
}

/* arrange_bytes for constant d: for every 32 indices the multipliers of each two, and for each of their d values 32
 * bytes in the order of index_at; unless the table is symmetric, 32 magnitudes before them. */
PLLM_INLINE void arrange_values(const row_table *t, ptrdiff_t span, const quantised_span *q, int d, int16_t *target)
{
    const __m256i pick = _mm256_loadu_si256((const __m256i *)(const void *)t->multiplier_order);
    __m256i *at = (__m256i *)(void *)target;
    for (ptrdiff_t first = 0; first < span * d; first += LOOKED_UP * d) {
        __m256i bytes[LOOK_UP_VALUES];
        int64_t multipliers = 0; /* d of them */
        memcpy(&multipliers, q->multiplier + first / BLOCK, (size_t)d * sizeof(int16_t));
        _mm256_store_si256(at++, _mm256_shuffle_epi8(_mm256_set1_epi64x(multipliers), pick));
        separate_values(q->value + first, d, bytes);
        for (int j = 0; j < d; j++) {
            if (t->bits == 4)
                bytes[j] = evens_and_odds(bytes[j]);
            else if (t->bits != 8)
                bytes[j] = _mm256_permute4x64_epi64(bytes[j], 0xd8);
            if (!t->symmetric)
                _mm256_store_si256(at++, _mm256_abs_epi8(bytes[j]));
            _mm256_store_si256(at++, bytes[j]);
        }
    }
}

/* target = the bytes of a span and their multipliers. */
static void arrange_bytes(const row_table *t, ptrdiff_t span, const quantised_span *q, int16_t *target)
{
    if (t->d == 1)
        arrange_values(t, span, q, 1, target);
    else if (t->d == 2)
        arrange_values(t, span, q, 2, target);
    else
        arrange_values(t, span, q, 4, target);
}

/* Keeps the compiler from computing a chain in another order, which needs more registers than there are. */
#define IN_ORDER(vector) __asm__("" : "+x"(vector))

enum { LOOK_UP_VECTORS = 2 /* the most, constants below */ };

/* value[i][j] = value j of the rows of 32 indices, as bytes, for `vectors` times 32 of them, which share the
 * loads of the table. A look-up in sixteen bytes gives 0 where bit 7 of its index is set: where, by
 * subtraction, the index is below the first row of the sixteen. That leaves the sixteens up to the index's
 * own, and their exclusive or is its value (make_planes). */
PLLM_INLINE void look_up(const int8_t *planes, const __m256i *index, int vectors, int d, int bits,
                         __m256i value[][LOOK_UP_VALUES])
{
    const __m256i *sixteens = (const __m256i *)(const void *)planes;
    const int parts = bits == 8 ? sixteens_of(7) : sixteens_of(bits);
    __m256i key[LOOK_UP_VECTORS], high[LOOK_UP_VECTORS][LOOK_UP_VALUES];
    PLLM_UNROLL
    for (int i = 0; i < vectors; i++) {
        key[i] = bits == 8 ? _mm256_and_si256(index[i], _mm256_set1_epi8(127)) : index[i];
        for (int j = 0; j < d; j++)
            value[i][j] = high[i][j] = _mm256_setzero_si256();
    }
    PLLM_UNROLL
    for (int part = 0; part < parts; part++) {
        PLLM_OPAQUE(sixteens);
        PLLM_UNROLL
        for (int j = 0; j < d; j++) {
            const __m256i low_rows = _mm256_load_si256(sixteens + part * d + j);
            const __m256i high_rows = bits == 8 ? _mm256_load_si256(sixteens + (part + 8) * d + j) : low_rows;
            PLLM_UNROLL
            for (int i = 0; i < vectors; i++) {
                value[i][j] = _mm256_xor_si256(value[i][j], _mm256_shuffle_epi8(low_rows, key[i]));
                IN_ORDER(value[i][j]);
                if (bits == 8) {
                    high[i][j] = _mm256_xor_si256(high[i][j], _mm256_shuffle_epi8(high_rows, key[i]));
                    IN_ORDER(high[i][j]);
                }
            }
        }
        for (int i = 0; i < vectors && part + 1 < parts; i++) {
            key[i] = _mm256_sub_epi8(key[i], _mm256_set1_epi8(16));
            IN_ORDER(key[i]);
        }
    }
    for (int i = 0; i < vectors && bits == 8; i++)
        for (int j = 0; j < d; j++)
            value[i][j] = _mm256_blendv_epi8(value[i][j], high[i][j], index[i]);
}

/* Quarters 0 and 1 as int16, and 2 and 3: doubled bytes, shifted; a sign extension across the halves of a
 * vector takes more than twice as long. */
PLLM_INLINE __m256i lower_half(__m256i bytes)
{
    return _mm256_srai_epi16(_mm256_unpacklo_epi8(bytes, bytes), 8);
}

PLLM_INLINE __m256i upper_half(__m256i bytes)
{
    return _mm256_srai_epi16(_mm256_unpackhi_epi8(bytes, bytes), 8);
}

/* index, row: of 32 indices, and the bits of them that name a row of the planes. */
PLLM_INLINE void split_indices(const uint8_t *source, int d, int bits, int symmetric, __m256i *index, __m256i *row)
{
    const int base_bits = symmetric ? bits - d : bits;
    *row = *index = indices_as_bytes(source, bits);
    if (symmetric && (base_bits > 4 || bits == 8)) /* a look-up in one sixteen heeds bits 0 to 3 and 7 */
        *row = _mm256_and_si256(*index, _mm256_set1_epi8((char)(16 * sixteens_of(base_bits) - 1)));
}

/* Bytes other than zero with the sign of the last value on top, and by doubling those before it. */
PLLM_INLINE __m256i signs_of(__m256i index, int bits)
{
    const __m256i signs = _mm256_or_si256(index, _mm256_set1_epi8(1));
    return bits < 8 ? _mm256_slli_epi16(signs, 8 - bits) : signs;
}

/* A row in the order of t->order; whole 32 indices. */
PLLM_INLINE void decode_looked_up(const row_table *t, const uint8_t *source, ptrdiff_t octets, int d, int bits,
                                  int symmetric, int16_t *target)
{
    for (const uint8_t *const end = source + octets * bits; source < end;
         source += LOOKED_UP / OCTET * bits, target += LOOKED_UP * d) {
        __m256i index, row, value[1][LOOK_UP_VALUES];
        split_indices(source, d, bits, symmetric, &index, &row);
        look_up(t->planes, &row, 1, d, symmetric ? bits - d : bits, value);
        __m256i signs = signs_of(index, bits);
        PLLM_UNROLL
        for (int j = d - 1; j >= 0; j--) {
            __m256i bytes = value[0][j];
            if (symmetric) {
                bytes = _mm256_sign_epi8(bytes, signs);
                signs = _mm256_add_epi8(signs, signs);
            }
            __m256i *const at = (__m256i *)(void *)(target + LOOKED_UP * j);
            _mm256_storeu_si256(at, lower_half(bytes));
            _mm256_storeu_si256(at + 1, upper_half(bytes));
        }
    }
}

enum form { FETCHED, PLAIN, SYMMETRIC, SMALL }; /* how values are got at; SMALL: symmetric, up to SMALL_VALUE */

/* sum + the products of `vectors` times 32 rows with the bytes at x (arrange_bytes). A product of bytes is that
 * of an unsigned with a signed one: of a magnitude with what got its sign, so that pairs stay in int16, and two
 * pairs of small values, which have one multiplier. */
PLLM_INLINE __m256i add_looked_up(const row_table *t, const uint8_t *source, const int8_t *x, int vectors,
                                  int d, int bits, enum form form, __m256i sum)
{
    const __m256i *xs = (const __m256i *)(const void *)x;
    const int symmetric = form != PLAIN, x_vectors = looked_up_bytes(d, symmetric) / LOOKED_UP;
    __m256i index[LOOK_UP_VECTORS], row[LOOK_UP_VECTORS] = {_mm256_setzero_si256()};
    __m256i value[LOOK_UP_VECTORS][LOOK_UP_VALUES];
    PLLM_UNROLL
    for (int i = 0; i < vectors; i++)
        split_indices(source + LOOKED_UP / OCTET * bits * i, d, bits, symmetric, index + i, row + i);
    look_up(t->planes, row, vectors, d, symmetric ? bits - d : bits, value);
    PLLM_UNROLL
    for (int i = 0; i < vectors; i++, xs += x_vectors) {
        const __m256i multiplier = _mm256_load_si256(xs);
        __m256i signs = signs_of(index[i], bits), before = _mm256_setzero_si256();
        PLLM_UNROLL
        for (int j = d - 1; j >= 0; j--) {
            __m256i products;
            if (symmetric) {
                const __m256i signed_x = _mm256_sign_epi8(_mm256_load_si256(xs + 1 + j), signs);
                products = _mm256_maddubs_epi16(value[i][j], signed_x);
                signs = _mm256_add_epi8(signs, signs);
            } else {
                const __m256i magnitudes = _mm256_load_si256(xs + 1 + 2 * j);
                const __m256i x_signs = _mm256_load_si256(xs + 2 + 2 * j);
                products = _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(value[i][j], x_signs));
            }
            if (form == SMALL && j % 2) {
                before = products;
                continue;
            }
            products = form == SMALL ? _mm256_add_epi16(before, products) : products;
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(products, multiplier));
        }
    }
    return sum;
}

/* The products of SPAN_VALUES values of a row of the matrix with a token, in lanes: short enough to do without a
 * loop. */
PLLM_INLINE __m256i whole_span_looked_up(const row_table *t, const uint8_t *source, const int8_t *x, int d, int bits,
                                         enum form form)
{
    enum { BOTH = LOOK_UP_VECTORS * LOOKED_UP };
    const int source_step = BOTH / OCTET * bits, x_step = LOOK_UP_VECTORS * looked_up_bytes(d, form != PLAIN);
    __m256i sum = _mm256_setzero_si256();
    PLLM_UNROLL
    for (int i = 0; i < SPAN_VALUES / d / BOTH; i++)
        sum = add_looked_up(t, source + i * source_step, x + i * x_step, LOOK_UP_VECTORS, d, bits, form, sum);
    return sum;
}

/* The same of any octets. Indices behind the row meet zeros. */
PLLM_INLINE __m256i span_looked_up(const row_table *t, const uint8_t *source, const int16_t *x,
                                   ptrdiff_t octets, int d, int bits, enum form form)
{
    enum { BOTH = LOOK_UP_VECTORS * LOOKED_UP };
    const int x_bytes = looked_up_bytes(d, form != PLAIN);
    const int source_step = BOTH / OCTET * bits, x_step = LOOK_UP_VECTORS * x_bytes;
    const uint8_t *const end = source + octets * bits, *const last = end - source_step;
    const int8_t *bytes = (const int8_t *)x;
    __m256i sum = _mm256_setzero_si256();
    for (; source <= last; source += source_step, bytes += x_step)
        sum = add_looked_up(t, source, bytes, LOOK_UP_VECTORS, d, bits, form, sum);
    for (; source < end; source += LOOKED_UP / OCTET * bits, bytes += x_bytes)
        sum = add_looked_up(t, source, bytes, 1, d, bits, form, sum);
    return sum;
}

enum {
    SPANS_TOGETHER = 32, /* of a row, before those of the next: rows read in parts take half as long again */
    AHEAD = 8192         /* bytes between what is read of the payload and what is asked for: measured */
};

/* Products with as many rows, in lanes, of spans side by side. */
typedef __m256i row_products[DOT_TOGETHER];

/* total + the sums of n spans' products, times the spans' scales. */
PLLM_INLINE __m128 add_spans(__m128 total, const row_products *products, const float *scale, ptrdiff_t n)
{
    for (ptrdiff_t s = 0; s < n; s++) {
        int32_t sum[DOT_TOGETHER];
        vi_sum4(sum, products[s][0], products[s][1], products[s][2], products[s][3]);
        const __m128i four = _mm_loadu_si128((const __m128i *)(const void *)sum);
        total = _mm_fmadd_ps(_mm_set1_ps(scale[s]), _mm_cvtepi32_ps(four), total);
    }
    return total;
}

/* products (n) = those of whole spans, from span `first` of the r-th row on, which begins at source. */
PLLM_INLINE void multiply_whole(const row_table *t, const uint8_t *source, const token_spans *token,
                                ptrdiff_t first, ptrdiff_t n, int r, int d, int bits, enum form form,
                                row_products *products)
{
    const int source_step = SPAN_VALUES / OCTET / d * bits;
    const int x_step = SPAN_VALUES / d / LOOKED_UP * looked_up_bytes(d, form != PLAIN);
    const int8_t *x = (const int8_t *)(token->x + first * token->width);
    source += first * source_step;
    for (ptrdiff_t s = 0; s < n; s++, source += source_step, x += x_step) {
        ask_for_rows(source, AHEAD, source_step);
        products[s][r] = whole_span_looked_up(t, source, x, d, bits, form);
    }
}

/* The same of spans `first` to end - 1, whole or not. */
PLLM_INLINE void multiply_spans(const row_table *t, const uint8_t *source, const token_spans *token,
                                ptrdiff_t first, ptrdiff_t end, int r, int d, int bits, enum form form,
                                row_products *products)
{
    for (ptrdiff_t s = first; s < end; s++) {
        const uint8_t *const here = source + s * token->octets * bits;
        const int16_t *const x = token->x + s * token->width;
        const ptrdiff_t octets = octets_in(token, s);
        products[s - first][r] = form == FETCHED ? span_fetched(t, here, x, octets, d, bits)
                                                 : span_looked_up(t, here, x, octets, d, bits, form);
    }
}

/* dot (count rounded up to DOT_TOGETHER) = the dot products of `count` rows with a token. */
PLLM_INLINE void dot_rows(const row_table *t, const uint8_t *rows, ptrdiff_t stride, ptrdiff_t count,
                          const token_spans *token, int d, int bits, enum form form, float *dot)
{
    const int unrolled = form == SYMMETRIC || form == SMALL || (form == PLAIN && bits <= 4);
    const ptrdiff_t spans = token->spans;
    const ptrdiff_t whole = !unrolled || token->octets * d * OCTET < SPAN_VALUES
                                ? 0
                                : spans - (token->last_octets < token->octets);
    for (ptrdiff_t row = 0; row < count; row += DOT_TOGETHER) {
        __m128 total = _mm_setzero_ps();
        for (ptrdiff_t first = 0; first < spans; first += SPANS_TOGETHER) {
            const ptrdiff_t n = smaller(SPANS_TOGETHER, spans - first);
            const ptrdiff_t n_whole = smaller(n, whole > first ? whole - first : 0);
            row_products products[SPANS_TOGETHER];
            for (int r = 0; r < DOT_TOGETHER; r++) {
                const uint8_t *const source = row_at(rows, stride, count, row + r);
                if (unrolled)
                    multiply_whole(t, source, token, first, n_whole, r, d, bits, form, products);
                if (n_whole < n)
                    multiply_spans(t, source, token, first + n_whole, first + n, r, d, bits, form,
                                   products + n_whole);
            }
            total = add_spans(total, products, token->scale + first, n);
        }
        _mm_storeu_ps(dot + row, total);
    }
}

#define FROM_5_TO_8(X, D) X(D, 5) X(D, 6) X(D, 7) X(D, 8)
#define UP_TO_8(X, D) X(D, 1) X(D, 2) X(D, 3) X(D, 4) FROM_5_TO_8(X, D)
#define EACH_BITS(X, D) \
    UP_TO_8(X, D) \
    X(D, 9) X(D, 10) X(D, 11) X(D, 12) X(D, 13) X(D, 14) X(D, 15) X(D, 16)
#define FETCH_FUNCTIONS(D, B) \
    static void decode_##D##_##B(const row_table *t, const uint8_t *source, ptrdiff_t octets, \
                                 int16_t *target) \
    { \
        decode_fetched(t, source, octets, D, B, target); \
    } \
    static void dot_##D##_##B(const row_table *t, const uint8_t *rows, ptrdiff_t stride, ptrdiff_t count, \
                              const token_spans *token, float *dot) \
    { \
        dot_rows(t, rows, stride, count, token, D, B, FETCHED, dot); \
    }
EACH_BITS(FETCH_FUNCTIONS, 2)
EACH_BITS(FETCH_FUNCTIONS, 4)
EACH_BITS(FETCH_FUNCTIONS, 8)
EACH_BITS(FETCH_FUNCTIONS, 16)

#define DECODE_LOOKED_UP(D, B, S) \
    static void decode_looked_up_##D##_##B##_##S(const row_table *t, const uint8_t *source, ptrdiff_t octets, \
                                                 int16_t *target) \
    { \
        decode_looked_up(t, source, octets, D, B, S, target); \
    }
#define DOT_LOOKED_UP(D, B, FORM) \
    static void dot_looked_up_##D##_##B##_##FORM(const row_table *t, const uint8_t *rows, ptrdiff_t stride, \
                                                 ptrdiff_t count, const token_spans *token, float *dot) \
    { \
        dot_rows(t, rows, stride, count, token, D, B, FORM, dot); \
    }
#define PLAIN_LOOK_UP(D, B) DECODE_LOOKED_UP(D, B, 0) DOT_LOOKED_UP(D, B, PLAIN)
#define SYMMETRIC_LOOK_UP(D, B) DECODE_LOOKED_UP(D, B, 1) DOT_LOOKED_UP(D, B, SYMMETRIC)
#define SMALL_LOOK_UP(D, B) DOT_LOOKED_UP(D, B, SMALL)
UP_TO_8(PLAIN_LOOK_UP, 1)
UP_TO_8(PLAIN_LOOK_UP, 2)
PLAIN_LOOK_UP(4, 2) PLAIN_LOOK_UP(4, 3) PLAIN_LOOK_UP(4, 4) PLAIN_LOOK_UP(4, 6)
FROM_5_TO_8(SYMMETRIC_LOOK_UP, 1)
FROM_5_TO_8(SYMMETRIC_LOOK_UP, 2)
FROM_5_TO_8(SYMMETRIC_LOOK_UP, 4)
FROM_5_TO_8(SMALL_LOOK_UP, 4)
#define PLAIN_ENTRY(D, B) {decode_looked_up_##D##_##B##_0, dot_looked_up_##D##_##B##_PLAIN},
#define SYMMETRIC_ENTRY(D, B) {decode_looked_up_##D##_##B##_1, dot_looked_up_##D##_##B##_SYMMETRIC},
#define SMALL_ENTRY(D, B) {decode_looked_up_##D##_##B##_1, dot_looked_up_##D##_##B##_SMALL},
#define NO_ENTRY {NULL, NULL},
#define NO_4_ENTRIES NO_ENTRY NO_ENTRY NO_ENTRY NO_ENTRY
static const row_functions look_up_functions[3][3][8] = {
    {{UP_TO_8(PLAIN_ENTRY, 1)},
     {UP_TO_8(PLAIN_ENTRY, 2)},
     {NO_ENTRY PLAIN_ENTRY(4, 2) PLAIN_ENTRY(4, 3) PLAIN_ENTRY(4, 4) NO_ENTRY PLAIN_ENTRY(4, 6)}},
    {{NO_4_ENTRIES FROM_5_TO_8(SYMMETRIC_ENTRY, 1)},
     {NO_4_ENTRIES FROM_5_TO_8(SYMMETRIC_ENTRY, 2)},
     {NO_4_ENTRIES FROM_5_TO_8(SYMMETRIC_ENTRY, 4)}},
    {{NO_ENTRY}, {NO_ENTRY}, {NO_4_ENTRIES FROM_5_TO_8(SMALL_ENTRY, 4)}}};
#undef DECODE_LOOKED_UP
#undef DOT_LOOKED_UP
#undef PLAIN_LOOK_UP
#undef SYMMETRIC_LOOK_UP
#undef SMALL_LOOK_UP
#undef PLAIN_ENTRY
#undef SYMMETRIC_ENTRY
#undef SMALL_ENTRY
#undef NO_ENTRY
#undef NO_4_ENTRIES

#define FETCH_ENTRY(D, B) {decode_##D##_##B, dot_##D##_##B},
static const row_functions fetch_functions[4][PLLM_MAX_BITS] = {{EACH_BITS(FETCH_ENTRY, 2)},
                                                                {EACH_BITS(FETCH_ENTRY, 4)},
                                                                {EACH_BITS(FETCH_ENTRY, 8)},
                                                                {EACH_BITS(FETCH_ENTRY, 16)}};
#undef FETCH_FUNCTIONS
#undef FETCH_ENTRY

/* The form for each table. */
static row_functions functions_for(const row_table *t)
{
    if (t->looked_up)
        return look_up_functions[t->symmetric + t->small][t->d / 2][t->bits - 1];
    for (int kind = 0; kind < 4; kind++)
        if (t->stride == 2 << kind)
            return fetch_functions[kind][t->bits - 1];
    return (row_functions){plain_functions[t->d - 1][t->wide], NULL};
}

#endif
