/* trellis_floats.h - rows of a matrix in trellis codes as float32. Included by infer.c only. */
#ifndef PLLM_TRELLIS_FLOATS_H
#define PLLM_TRELLIS_FLOATS_H

#include "trellis.h"

/* target (VB_WIDTH, 8) = the values of a step in the order of their columns: byte 8 i + j is byte i of the j-th. */
#if defined(PLLM_ISA_AVX2) || defined(PLLM_ISA_AVX512)
#if defined(PLLM_ISA_AVX2)
#define VB_ZIP(half, width, a, b) _mm256_unpack##half##_epi##width(a, b)
#define VB_LANE(a, i) _mm256_extracti128_si256(a, i)
#else
#define VB_ZIP(half, width, a, b) _mm512_unpack##half##_epi##width(a, b)
#define VB_LANE(a, i) _mm512_extracti32x4_epi32(a, i)
#endif
PLLM_INLINE void step_in_order(const vb *value, int8_t *target)
{
    PLLM_UNROLL
    for (int half = 0; half < 2; half++) { /* of each lane's sixteen eights */
        vb two[4], four[4];
        PLLM_UNROLL
        for (int i = 0; i < 4; i++)
            two[i] = half ? VB_ZIP(hi, 8, value[2 * i], value[2 * i + 1]) : VB_ZIP(lo, 8, value[2 * i], value[2 * i + 1]);
        PLLM_UNROLL
        for (int i = 0; i < 2; i++) { /* the lower eights' first fours and last fours, then the upper ones' */
            four[i] = VB_ZIP(lo, 16, two[2 * i], two[2 * i + 1]);
            four[i + 2] = VB_ZIP(hi, 16, two[2 * i], two[2 * i + 1]);
        }
        PLLM_UNROLL
        for (int i = 0; i < 4; i++) {
            const vb first = four[i / 2 * 2], last = four[i / 2 * 2 + 1];
            const vb eights = i % 2 ? VB_ZIP(hi, 32, first, last) : VB_ZIP(lo, 32, first, last);
            __m128i *const to = (__m128i *)(void *)target + 4 * half + i;
            _mm_store_si128(to, VB_LANE(eights, 0));
            _mm_store_si128(to + 8, VB_LANE(eights, 1));
#if defined(PLLM_ISA_AVX512)
            _mm_store_si128(to + 16, VB_LANE(eights, 2));
            _mm_store_si128(to + 24, VB_LANE(eights, 3));
#endif
        }
    }
}
#elif defined(PLLM_ISA_NEON)
PLLM_INLINE void step_in_order(const vb *value, int8_t *target)
{
    PLLM_UNROLL
    for (int half = 0; half < 2; half++) {
        uint16x8x4_t two;
        PLLM_UNROLL
        for (int i = 0; i < 4; i++) {
            const vb a = value[2 * i], b = value[2 * i + 1];
            two.val[i] = vreinterpretq_u16_u8(half ? vzip2q_u8(a, b) : vzip1q_u8(a, b));
        }
        vst4q_u16((uint16_t *)(void *)target + 32 * half, two);
    }
}
#else
PLLM_INLINE void step_in_order(const vb *value, int8_t *target)
{
    for (int j = 0; j < 8; j++)
        for (int i = 0; i < VB_WIDTH; i++)
            target[8 * i + j] = (int8_t)(uint8_t)(value[j] >> 8 * i);
}
#endif

/* target (columns, rounded up to VF_WIDTH) = the values of a span. */
PLLM_INLINE void trellis_floats_of(const int8_t *tables, const uint8_t *const *rows, const ptrdiff_t *start,
                                   const trellis_span *span, const int bits, float *target)
{
    for (ptrdiff_t at = 0; at < span->columns; at += TRELLIS_STEP) {
        const ptrdiff_t here = smaller(TRELLIS_STEP, span->columns - at);
        _Alignas(64) int8_t bytes[TRELLIS_STEP];
        trellis_indices index;
        vb value[8];
        trellis_load(rows, start, (span->first + at) / 8, bits, &index);
        PLLM_UNROLL
        for (int j = 0; j < 8; j++)
            value[j] = trellis_value(tables, &index, bits, j);
        step_in_order(value, bytes);
        for (ptrdiff_t i = 0; i < here; i += VF_WIDTH)
            vf_store(target + at + i, vf_load_i8(bytes + i));
    }
}

#define TRELLIS_FLOATS(B) \
    static void trellis_floats_##B(const int8_t *tables, const uint8_t *const *rows, const ptrdiff_t *start, \
                                   const trellis_span *span, float *target) \
    { \
        trellis_floats_of(tables, rows, start, span, B, target); \
    }
EACH_TRELLIS_BITS(TRELLIS_FLOATS)
#undef TRELLIS_FLOATS

typedef void trellis_floats_fn(const int8_t *tables, const uint8_t *const *rows, const ptrdiff_t *start,
                               const trellis_span *span, float *target);
#define TRELLIS_ENTRY(B) trellis_floats_##B,
static trellis_floats_fn *const trellis_floats_functions[] = {EACH_TRELLIS_BITS(TRELLIS_ENTRY)};
#undef TRELLIS_ENTRY

/* target (in, rounded up to VF_WIDTH) = the levels of a row in the order in which they are stored, without the columns'
 * factors; nothing meaningful behind them. */
static void trellis_decode_floats(const trellis *t, ptrdiff_t row, float *target)
{
    const int more = pllm_trellis_more(t->code, row);
    const uint8_t *rows[TRELLIS_GROUP_ROWS];
    ptrdiff_t end = 0;
    trellis_history(t, row, 1, rows);
    for (const trellis_span *span = t->span; span < t->span + t->spans; span++) {
        trellis_floats_functions[span->bits + more - 1](t->table, rows, t->start[more], span, target + span->first);
        end = span->first + span->columns;
    }
    memset(target + end, 0, (size_t)(t->in - end) * sizeof *target); /* columns without bits */
}

#endif
