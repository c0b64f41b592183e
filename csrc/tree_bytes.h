/* tree_bytes.h - sixteen boxes of bytes or codewords and a query, compared at once (tree_bytes.c). See simd.h for how an
 * instruction set is chosen.
 *
 * Coordinates are 0 to TREE_BYTES_LAST and stand in pairs: x0 x1 of the first box, x0 x1 of the second, ... Bounds are
 * int16, 32768 less than what they stand for; sums wrap.
 */
#ifndef PLLM_TREE_BYTES_H
#define PLLM_TREE_BYTES_H

#include "tree.h"

enum {
    BYTES_PAIRS = PLLM_MAX_SUBVECTOR / 2,
    BYTES_ROW = 2 * TREE_BYTES_FAN /* bytes of a pair of coordinates, or the bounds, of sixteen */
};

/* Bytes of a group of boxes: bounds to begin with; then for every pair the lower sides, and the upper ones. */
static inline size_t tree_bytes_group(int d) { return (size_t)(1 + (d + 1) / 2 * 2) * BYTES_ROW; }

/* Bytes of a leaf: of each codeword c its |c|^2 and what else to begin with, then for every pair -2 (c - middle). */
static inline size_t tree_bytes_leaf(int d) { return (size_t)(1 + (d + 1) / 2) * BYTES_ROW; }

#if defined(PLLM_ISA_AVX2) || defined(PLLM_ISA_AVX512)
typedef struct {
    __m256i x[BYTES_PAIRS], limit, square;
} bytes_query;

#define BYTES_LOAD(p) _mm256_load_si256((const __m256i *)(const void *)(p))

/* A query: its bytes, two in one number, x0 lowest; what bounds may be at most; |x|^2 - 2 middle (x0 + x1 + ...). */
PLLM_INLINE bytes_query bytes_load(const uint16_t *x, int16_t limit, int16_t square, const int pairs)
{
    bytes_query q = {.limit = _mm256_set1_epi16(limit), .square = _mm256_set1_epi16(square)};
    PLLM_UNROLL
    for (int p = 0; p < pairs; p++)
        q.x[p] = _mm256_set1_epi16((int16_t)x[p]);
    return q;
}

/* The boxes whose bounds, added to the squares of their distances, are within the limit: bit i for the i-th. */
PLLM_INLINE uint32_t bytes_near_boxes(const bytes_query *q, const uint8_t *group, const int pairs)
{
    __m256i bound = BYTES_LOAD(group);
    PLLM_UNROLL
    for (int p = 0; p < pairs; p++) {
        const __m256i up = _mm256_max_epu8(q->x[p], BYTES_LOAD(group + (2 * p + 1) * BYTES_ROW));
        const __m256i down = _mm256_min_epu8(q->x[p], BYTES_LOAD(group + (2 * p + 2) * BYTES_ROW));
        const __m256i gap = _mm256_sub_epi8(up, down);
        bound = _mm256_add_epi16(bound, _mm256_maddubs_epi16(gap, gap));
    }
    const __m256i far = _mm256_cmpgt_epi16(bound, q->limit);
    const __m128i halves = _mm_packs_epi16(_mm256_castsi256_si128(far), _mm256_extracti128_si256(far, 1));
    return ~(uint32_t)_mm_movemask_epi8(halves) & 0xffff;
}

/* The same for the codewords of a leaf: for the i-th bit BYTES_STEP i, and whatever in the bits up to the next. */
enum { BYTES_STEP = 2, BYTES_FIRST = 0x55555555 };
PLLM_INLINE uint32_t bytes_near_codewords(const bytes_query *q, const uint8_t *leaf, const int pairs)
{
    __m256i bound = _mm256_add_epi16(q->square, BYTES_LOAD(leaf));
    PLLM_UNROLL
    for (int p = 0; p < pairs; p++)
        bound = _mm256_add_epi16(bound, _mm256_maddubs_epi16(q->x[p], BYTES_LOAD(leaf + (p + 1) * BYTES_ROW)));
    return ~(uint32_t)_mm256_movemask_epi8(_mm256_cmpgt_epi16(bound, q->limit));
}
#undef BYTES_LOAD

#elif defined(PLLM_ISA_NEON)
typedef struct {
    uint8x16_t x[BYTES_PAIRS];
    int16x8_t limit;
    uint16x8_t square;
} bytes_query;

PLLM_INLINE bytes_query bytes_load(const uint16_t *x, int16_t limit, int16_t square, const int pairs)
{
    bytes_query q = {.limit = vdupq_n_s16(limit), .square = vdupq_n_u16((uint16_t)square)};
    PLLM_UNROLL
    for (int p = 0; p < pairs; p++)
        q.x[p] = vreinterpretq_u8_u16(vdupq_n_u16(x[p]));
    return q;
}

PLLM_INLINE uint32_t bytes_within(const uint16x8_t *bound, int16x8_t limit)
{
    static const uint16_t bit[8] = {1, 2, 4, 8, 16, 32, 64, 128};
    uint32_t bits = 0;
    for (int i = 0; i < 2; i++) {
        const uint16x8_t near = vcleq_s16(vreinterpretq_s16_u16(bound[i]), limit);
        bits |= (uint32_t)vaddvq_u16(vandq_u16(near, vld1q_u16(bit))) << (8 * i);
    }
    return bits;
}

PLLM_INLINE uint32_t bytes_near_boxes(const bytes_query *q, const uint8_t *group, const int pairs)
{
    uint16x8_t bound[2];
    for (int i = 0; i < 2; i++) {
        const uint8_t *at = group + 16 * i;
        bound[i] = vreinterpretq_u16_u8(vld1q_u8(at));
        PLLM_UNROLL
        for (int p = 0; p < pairs; p++) {
            const uint8x16_t up = vmaxq_u8(q->x[p], vld1q_u8(at + (2 * p + 1) * BYTES_ROW));
            const uint8x16_t gap = vsubq_u8(up, vminq_u8(q->x[p], vld1q_u8(at + (2 * p + 2) * BYTES_ROW)));
            const uint16x8_t low = vmull_u8(vget_low_u8(gap), vget_low_u8(gap));
            bound[i] = vaddq_u16(bound[i], vpaddq_u16(low, vmull_high_u8(gap, gap)));
        }
    }
    return bytes_within(bound, q->limit);
}

enum { BYTES_STEP = 1, BYTES_FIRST = 0xffff };
PLLM_INLINE uint32_t bytes_near_codewords(const bytes_query *q, const uint8_t *leaf, const int pairs)
{
    uint16x8_t bound[2];
    for (int i = 0; i < 2; i++) {
        const uint8_t *at = leaf + 16 * i;
        bound[i] = vaddq_u16(q->square, vreinterpretq_u16_u8(vld1q_u8(at)));
        PLLM_UNROLL
        for (int p = 0; p < pairs; p++) {
            const int8x16_t x = vreinterpretq_s8_u8(q->x[p]);
            const int8x16_t c = vreinterpretq_s8_u8(vld1q_u8(at + (p + 1) * BYTES_ROW));
            const int16x8_t low = vmull_s8(vget_low_s8(x), vget_low_s8(c));
            bound[i] = vaddq_u16(bound[i], vreinterpretq_u16_s16(vpaddq_s16(low, vmull_high_s8(x, c))));
        }
    }
    return bytes_within(bound, q->limit);
}

#else
typedef struct {
    const uint16_t *x;
    int limit, square;
} bytes_query;

PLLM_INLINE bytes_query bytes_load(const uint16_t *x, int16_t limit, int16_t square, const int pairs)
{
    (void)pairs;
    return (bytes_query){x, limit, square};
}

PLLM_INLINE uint32_t bytes_within(const int16_t *bound, int limit)
{
    uint32_t bits = 0;
    for (int i = 0; i < TREE_BYTES_FAN; i++)
        bits |= (uint32_t)(bound[i] <= limit) << i;
    return bits;
}

PLLM_INLINE int bytes_gap(int x, int lo, int hi) { return (x > lo ? x : lo) - (x < hi ? x : hi); }

PLLM_INLINE uint32_t bytes_near_boxes(const bytes_query *q, const uint8_t *group, const int pairs)
{
    int16_t bound[TREE_BYTES_FAN];
    memcpy(bound, group, sizeof bound);
    for (int p = 0; p < pairs; p++) {
        const uint8_t *lo = group + (2 * p + 1) * BYTES_ROW, *hi = lo + BYTES_ROW;
        const int x0 = q->x[p] & 255, x1 = q->x[p] >> 8;
        for (int i = 0; i < TREE_BYTES_FAN; i++) {
            const int gap0 = bytes_gap(x0, lo[2 * i], hi[2 * i]), gap1 = bytes_gap(x1, lo[2 * i + 1], hi[2 * i + 1]);
            bound[i] = (int16_t)(bound[i] + gap0 * gap0 + gap1 * gap1);
        }
    }
    return bytes_within(bound, q->limit);
}

enum { BYTES_STEP = 1, BYTES_FIRST = 0xffff };
PLLM_INLINE uint32_t bytes_near_codewords(const bytes_query *q, const uint8_t *leaf, const int pairs)
{
    int16_t bound[TREE_BYTES_FAN];
    memcpy(bound, leaf, sizeof bound);
    for (int i = 0; i < TREE_BYTES_FAN; i++)
        bound[i] = (int16_t)(bound[i] + q->square);
    for (int p = 0; p < pairs; p++) {
        const int8_t *c = (const int8_t *)leaf + (p + 1) * BYTES_ROW;
        const int x0 = q->x[p] & 255, x1 = q->x[p] >> 8;
        for (int i = 0; i < TREE_BYTES_FAN; i++)
            bound[i] = (int16_t)(bound[i] + x0 * c[2 * i] + x1 * c[2 * i + 1]);
    }
    return bytes_within(bound, q->limit);
}
#endif

#endif
