/* infer_span.h - from packed indices to numbers: a span of a row's sub-vectors is unpacked to byte
 * offsets into the table, and the table's rows are gathered. Included by infer.c only. */
#ifndef PLLM_INFER_SPAN_H
#define PLLM_INFER_SPAN_H

#include "kernel.h"

/* Indices are unpacked eight at a time: eight of b bits are exactly b bytes. */
enum { GROUP = 8, GROUP_BYTES = 16 /* what reading one group may touch */ };

/* A codec's table and index layout, prepared for one call. */
typedef struct {
    const char *table; /* K rows of d values, float or int8 */
    int d;
    int is_int8;
    float factor; /* multiplies every table value: table_scale, or 1 */
    int bits;
    int32_t last;      /* K - 1: larger indices (damaged payloads) are read as this one */
    int32_t row_bytes; /* of a table row */
    const uint8_t *end; /* first byte behind the packed payload */
    uint8_t shuffle[2][16]; /* which bytes each 32-bit lane of a group of indices needs */
    int32_t shift[GROUP];   /* and by how much it has to be shifted down */
} span_plan;

static void plan_groups(span_plan *plan)
{
    for (int i = 0; i < GROUP; i++) {
        const int bit = i * plan->bits;
        plan->shift[i] = bit % 8;
        for (int b = 0; b < 4; b++) {
            const int byte = bit / 8 + b;
            plan->shuffle[i / 4][i % 4 * 4 + b] = (uint8_t)(b < 3 && byte < 16 ? byte : 0x80);
        }
    }
}

/* What unpacking a group takes, in registers. */
#if defined(PLLM_ISA_AVX2) || defined(PLLM_ISA_AVX512)
typedef struct {
    __m256i shuffle, shift, mask, last, row_bytes;
} group_constants;

PLLM_INLINE group_constants constants_of(const span_plan *plan)
{
    return (group_constants){
        .shuffle = _mm256_loadu_si256((const __m256i *)(const void *)plan->shuffle),
        .shift = _mm256_loadu_si256((const __m256i *)(const void *)plan->shift),
        .mask = _mm256_set1_epi32((1 << plan->bits) - 1),
        .last = _mm256_set1_epi32(plan->last),
        .row_bytes = _mm256_set1_epi32(plan->row_bytes),
    };
}

PLLM_INLINE void unpack_group(const group_constants *c, const uint8_t *source, int32_t *offset)
{
    const __m128i bytes = _mm_loadu_si128((const __m128i *)(const void *)source);
    __m256i v = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes), c->shuffle);
    v = _mm256_and_si256(_mm256_srlv_epi32(v, c->shift), c->mask);
    v = _mm256_mullo_epi32(_mm256_min_epi32(v, c->last), c->row_bytes);
    _mm256_storeu_si256((__m256i *)(void *)offset, v);
}
#elif defined(PLLM_ISA_NEON)
typedef struct {
    uint8x16_t shuffle[2];
    int32x4_t up[2], mask, last; /* up: minus the shifts down */
    int32_t row_bytes;
} group_constants;

PLLM_INLINE group_constants constants_of(const span_plan *plan)
{
    return (group_constants){
        .shuffle = {vld1q_u8(plan->shuffle[0]), vld1q_u8(plan->shuffle[1])},
        .up = {vnegq_s32(vld1q_s32(plan->shift)), vnegq_s32(vld1q_s32(plan->shift + 4))},
        .mask = vdupq_n_s32((1 << plan->bits) - 1),
        .last = vdupq_n_s32(plan->last),
        .row_bytes = plan->row_bytes,
    };
}

PLLM_INLINE void unpack_group(const group_constants *c, const uint8_t *source, int32_t *offset)
{
    const uint8x16_t bytes = vld1q_u8(source);
    for (int half = 0; half < 2; half++) {
        const uint32x4_t picked = vreinterpretq_u32_u8(vqtbl1q_u8(bytes, c->shuffle[half]));
        int32x4_t v = vreinterpretq_s32_u32(vshlq_u32(picked, c->up[half]));
        v = vminq_s32(vandq_s32(v, c->mask), c->last);
        vst1q_s32(offset + 4 * half, vmulq_n_s32(v, c->row_bytes));
    }
}
#else
typedef struct {
    int bits;
    int32_t mask, last, row_bytes;
} group_constants;

PLLM_INLINE group_constants constants_of(const span_plan *plan)
{
    return (group_constants){plan->bits, (1 << plan->bits) - 1, plan->last, plan->row_bytes};
}

PLLM_INLINE void unpack_group(const group_constants *c, const uint8_t *source, int32_t *offset)
{
    for (int i = 0; i < GROUP; i++) {
        const int bit = i * c->bits;
        const uint8_t *at = source + bit / 8;
        const int32_t three = at[0] | at[1] << 8 | (bit / 8 < 14 ? at[2] << 16 : 0);
        const int32_t index = three >> bit % 8 & c->mask;
        offset[i] = (index < c->last ? index : c->last) * c->row_bytes;
    }
}
#endif

/* offset[0 .. count - 1] = table offsets of the count indices that start at source. Writes up to
 * seven more, all of them offsets inside the table. */
static void unpack_offsets(const span_plan *plan, const uint8_t *source, ptrdiff_t count,
                           int32_t *offset)
{
    const group_constants constants = constants_of(plan);
    const int bits = plan->bits;
    const ptrdiff_t groups = (count + GROUP - 1) / GROUP;
    ptrdiff_t fast = groups; /* groups whose whole GROUP_BYTES are inside the payload */
    while (fast > 0 && plan->end - (source + (fast - 1) * bits) < GROUP_BYTES)
        fast--;
    for (ptrdiff_t i = 0; i < fast; i++)
        unpack_group(&constants, source + i * bits, offset + i * GROUP);
    for (ptrdiff_t i = fast; i < groups; i++) {
        uint8_t padded[GROUP_BYTES] = {0};
        memcpy(padded, source + i * bits, (size_t)(plan->end - source - i * bits));
        unpack_group(&constants, padded, offset + i * GROUP);
    }
}

/* Widen four or eight int8 to float. */
PLLM_INLINE void widen4(const int8_t *source, float *target)
{
#if defined(PLLM_ISA_AVX2) || defined(PLLM_ISA_AVX512)
    int32_t four;
    memcpy(&four, source, sizeof four);
    _mm_storeu_ps(target, _mm_cvtepi32_ps(_mm_cvtepi8_epi32(_mm_cvtsi32_si128(four))));
#elif VF_WIDTH == 4
    vf_store(target, vf_load_i8(source));
#else
    for (int i = 0; i < 4; i++)
        target[i] = (float)source[i];
#endif
}

PLLM_INLINE void widen8(const int8_t *source, float *target)
{
#if defined(PLLM_ISA_AVX2)
    vf_store(target, vf_load_i8(source));
#elif defined(PLLM_ISA_AVX512)
    const __m128i eight = _mm_loadl_epi64((const __m128i *)(const void *)source);
    _mm256_storeu_ps(target, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight)));
#else
    widen4(source, target);
    widen4(source + 4, target + 4);
#endif
}

/* Widens d int8 to float; reads and writes exactly d, awkward sizes in overlapping pieces. */
PLLM_INLINE void widen(const int8_t *source, float *target, int d)
{
    if (d >= 8) {
        widen8(source, target);
        if (d > 8)
            widen8(source + d - 8, target + d - 8);
    } else if (d >= 4) {
        widen4(source, target);
        if (d > 4)
            widen4(source + d - 4, target + d - 4);
    } else {
        for (int i = 0; i < d; i++)
            target[i] = (float)source[i];
    }
}

#define SPAN_SIZES(X) \
    X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15) X(16)

/* Two offsets with one load: loads are what limits these loops. */
typedef struct {
    uint64_t first, second;
} offset_pair;

PLLM_INLINE offset_pair load_pair(const int32_t *offset)
{
    uint64_t two;
    memcpy(&two, offset, sizeof two);
    return (offset_pair){(uint32_t)two, two >> 32};
}

/* Copies d floats; awkward sizes in overlapping pieces. Compilers split 32-byte copies in two. */
PLLM_INLINE void copy_floats(const char *source, float *target, int d)
{
#if defined(PLLM_ISA_AVX2) || defined(PLLM_ISA_AVX512)
    if (d >= 8) {
        const float *values = (const float *)(const void *)source;
        _mm256_storeu_ps(target, _mm256_loadu_ps(values));
        if (d > 8)
            _mm256_storeu_ps(target + d - 8, _mm256_loadu_ps(values + d - 8));
        return;
    }
#endif
    memcpy(target, source, (size_t)d * sizeof(float));
}

/* target (d) = the table row at this offset. */
PLLM_INLINE void copy_row(const char *table, uint64_t offset, int is_int8, int d, float *target)
{
    if (is_int8)
        widen((const int8_t *)table + offset, target, d);
    else
        copy_floats(table + offset, target, d);
}

/* target (count, d) = table rows at the given offsets. */
PLLM_INLINE void gather(const char *table, const int32_t *offset, ptrdiff_t count, int is_int8,
                        int d, float *target)
{
    ptrdiff_t i = 0;
    for (; i + 4 <= count; i += 4, target += 4 * d) {
        const offset_pair a = load_pair(offset + i), b = load_pair(offset + i + 2);
        copy_row(table, a.first, is_int8, d, target);
        copy_row(table, a.second, is_int8, d, target + d);
        copy_row(table, b.first, is_int8, d, target + 2 * d);
        copy_row(table, b.second, is_int8, d, target + 3 * d);
    }
    for (; i < count; i++, target += d)
        copy_row(table, (uint64_t)offset[i], is_int8, d, target);
}

#define SPAN_FUNCTIONS(D)                                                                          \
    static void gather_f32_##D(const char *table, const int32_t *offset, ptrdiff_t n, float *target) \
    {                                                                                              \
        gather(table, offset, n, 0, D, target);                                                    \
    }                                                                                              \
    static void gather_i8_##D(const char *table, const int32_t *offset, ptrdiff_t n, float *target)  \
    {                                                                                              \
        gather(table, offset, n, 1, D, target);                                                    \
    }
SPAN_SIZES(SPAN_FUNCTIONS)
#undef SPAN_FUNCTIONS

typedef void gather_fn(const char *table, const int32_t *offset, ptrdiff_t n, float *target);

static gather_fn *const gather_functions[2][PLLM_MAX_SUBVECTOR] = {
#define SPAN_ENTRY(D) gather_f32_##D,
    {SPAN_SIZES(SPAN_ENTRY)},
#undef SPAN_ENTRY
#define SPAN_ENTRY(D) gather_i8_##D,
    {SPAN_SIZES(SPAN_ENTRY)},
#undef SPAN_ENTRY
};

enum { OFFSETS = 128 }; /* indices unpacked at a time, a multiple of GROUP */

/* target (count, d) = the codec's values of the count sub-vectors whose indices start at source,
 * without the table's factor. */
static void decode_span(const span_plan *plan, const uint8_t *source, ptrdiff_t count,
                        float *target)
{
    gather_fn *const gather_rows = gather_functions[plan->is_int8][plan->d - 1];
    int32_t offset[OFFSETS];
    for (ptrdiff_t i = 0; i < count; i += OFFSETS) {
        const ptrdiff_t part = count - i < OFFSETS ? count - i : OFFSETS;
        unpack_offsets(plan, source + i / GROUP * plan->bits, part, offset);
        gather_rows(plan->table, offset, part, target + i * plan->d);
    }
}

#endif
