/* infer_fused.h - one token: table rows go from the table into the products through registers only.
 * For codewords of 2, 4, 8 or 16 values; the sums are those of dot_rows in infer_gemm.h, bit for bit.
 * Included by infer.c only. */
#ifndef PLLM_INFER_FUSED_H
#define PLLM_INFER_FUSED_H

#include "infer_span.h"
#include "kernel.h"

enum {
    FUSED_ROWS = VF_WIDTH == 16 ? 8 : 4, /* rows in flight: enough sums to hide the latency of fma */
    FUSED_TILE = 32 /* rows that go over a stretch of x together, so that it stays in cache */
};

static int is_fusable(int d) { return d == 2 || d == 4 || d == 8 || d == 16; }

PLLM_INLINE const float *float_row(const char *table, uint64_t offset)
{
    return (const float *)(const void *)(table + offset);
}

/* Sixteen values: 16 / d table rows side by side. d is a compile-time constant. */
#if defined(PLLM_ISA_AVX2) || defined(PLLM_ISA_AVX512)
PLLM_INLINE __m128 row_of_4(const char *table, uint64_t offset)
{
    return _mm_loadu_ps(float_row(table, offset));
}

PLLM_INLINE __m128 two_rows_of_2(const char *table, const int32_t *offset)
{
    const offset_pair at = load_pair(offset);
    const double *first = (const double *)(const void *)(table + at.first);
    const double *second = (const double *)(const void *)(table + at.second);
    return _mm_castpd_ps(_mm_loadh_pd(_mm_load_sd(first), second));
}

#if defined(PLLM_ISA_AVX2)
PLLM_INLINE vf16 of_quarters(__m128 a, __m128 b, __m128 c, __m128 d)
{
    return (vf16){{_mm256_insertf128_ps(_mm256_castps128_ps256(a), b, 1),
                   _mm256_insertf128_ps(_mm256_castps128_ps256(c), d, 1)}};
}

PLLM_INLINE vf16 of_halves(__m256 a, __m256 b) { return (vf16){{a, b}}; }
#else
PLLM_INLINE vf16 of_quarters(__m128 a, __m128 b, __m128 c, __m128 d)
{
    const __m512 low = _mm512_insertf32x4(_mm512_castps128_ps512(a), b, 1);
    return (vf16){{_mm512_insertf32x4(_mm512_insertf32x4(low, c, 2), d, 3)}};
}

PLLM_INLINE vf16 of_halves(__m256 a, __m256 b)
{
    return (vf16){{_mm512_insertf32x8(_mm512_castps256_ps512(a), b, 1)}};
}
#endif

PLLM_INLINE vf16 fetch_f32(const char *table, const int32_t *offset, int d)
{
    if (d == 16)
        return vf16_load(float_row(table, (uint64_t)offset[0]));
    if (d == 2)
        return of_quarters(two_rows_of_2(table, offset), two_rows_of_2(table, offset + 2),
                           two_rows_of_2(table, offset + 4), two_rows_of_2(table, offset + 6));
    const offset_pair a = load_pair(offset);
    if (d == 8)
        return of_halves(_mm256_loadu_ps(float_row(table, a.first)),
                         _mm256_loadu_ps(float_row(table, a.second)));
    const offset_pair b = load_pair(offset + 2);
    return of_quarters(row_of_4(table, a.first), row_of_4(table, a.second),
                       row_of_4(table, b.first), row_of_4(table, b.second));
}
#else
PLLM_INLINE vf16 fetch_f32(const char *table, const int32_t *offset, int d)
{
    float values[16];
    PLLM_UNROLL
    for (int i = 0; i < 16 / d; i++)
        memcpy(values + i * d, table + offset[i], (size_t)d * sizeof(float));
    return vf16_load(values);
}
#endif

/* The same of an int8 table, widened. */
PLLM_INLINE vf16 fetch_i8(const char *table, const int32_t *offset, int d)
{
    const int8_t *const bytes = (const int8_t *)table;
    vf16 v;
#if defined(PLLM_ISA_AVX2)
    if (d == 8) {
        const offset_pair at = load_pair(offset);
        return (vf16){{vf_load_i8(bytes + at.first), vf_load_i8(bytes + at.second)}};
    }
    if (d == 4) {
        for (int p = 0; p < VF16_PARTS; p++) {
            const offset_pair at = load_pair(offset + 2 * p);
            int32_t row[2];
            memcpy(&row[0], bytes + at.first, 4);
            memcpy(&row[1], bytes + at.second, 4);
            const __m128i both = _mm_insert_epi32(_mm_cvtsi32_si128(row[0]), row[1], 1);
            v.part[p] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(both));
        }
        return v;
    }
#endif
    int8_t values[16];
    PLLM_UNROLL
    for (int i = 0; i < 16 / d; i++)
        memcpy(values + i * d, bytes + offset[i], (size_t)d);
    for (int p = 0; p < VF16_PARTS; p++)
        v.part[p] = vf_load_i8(values + p * VF_WIDTH);
    return v;
}

/* sum (FUSED_ROWS, 16) += table values of the rows * x, over `steps` times sixteen values.
 * offset: (FUSED_ROWS, OFFSETS). */
PLLM_INLINE void fused_steps(const char *table, int is_int8, int d, const int32_t *offset,
                             const float *x, ptrdiff_t steps, float *sum)
{
    vf16 s[FUSED_ROWS];
    for (int r = 0; r < FUSED_ROWS; r++)
        s[r] = vf16_load(sum + 16 * r);
    for (ptrdiff_t i = 0; i < steps; i++, x += 16, offset += 16 / d) {
        const vf16 xs = vf16_load(x);
        PLLM_UNROLL
        for (int r = 0; r < FUSED_ROWS; r++) {
            const int32_t *const at = offset + r * OFFSETS;
            s[r] = vf16_fma(is_int8 ? fetch_i8(table, at, d) : fetch_f32(table, at, d), xs, s[r]);
        }
    }
    for (int r = 0; r < FUSED_ROWS; r++)
        vf16_store(sum + 16 * r, s[r]);
}

static void fused_dispatch(const span_plan *plan, const int32_t *offset, const float *x,
                           ptrdiff_t steps, float *sum)
{
#define CASE(D)                                                    \
    case D:                                                        \
        if (plan->is_int8)                                         \
            fused_steps(plan->table, 1, D, offset, x, steps, sum); \
        else                                                       \
            fused_steps(plan->table, 0, D, offset, x, steps, sum); \
        break;
    switch (plan->d) {
        CASE(2)
        CASE(4)
        CASE(8)
        CASE(16)
    }
#undef CASE
}

/* dot[r] = table values of row r . x, for `rows` <= FUSED_TILE consecutive rows of `count` indices.
 * packed: the first of them.  x: zeros behind the columns, up to a multiple of 16. */
static void fused_tile(const span_plan *plan, const uint8_t *packed, ptrdiff_t stride_bytes, int rows,
                       ptrdiff_t count, const float *x, float *dot)
{
    int32_t offset[FUSED_ROWS * OFFSETS];
    float sum[FUSED_TILE * 16] = {0};
    for (ptrdiff_t at = 0; at < count; at += OFFSETS) {
        const ptrdiff_t part = count - at < OFFSETS ? count - at : OFFSETS;
        for (int first = 0; first < rows; first += FUSED_ROWS) {
            for (int r = 0; r < FUSED_ROWS; r++) {
                const int row = first + r < rows ? first + r : rows - 1;
                const uint8_t *source = packed + row * stride_bytes + at / GROUP * plan->bits;
                unpack_offsets(plan, source, part, offset + r * OFFSETS);
            }
            fused_dispatch(plan, offset, x + at * plan->d, (part * plan->d + 15) / 16,
                           sum + first * 16);
        }
    }
    for (int r = 0; r < rows; r++)
        dot[r] = vf16_sum(vf16_load(sum + r * 16));
}

#endif
