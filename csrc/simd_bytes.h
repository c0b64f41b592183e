/* simd_bytes.h - vectors of bytes, as far as trellis codes need them. See simd.h for how an instruction set is chosen.
 *
 * Types   vb  VB_WIDTH bytes; in portable C a word of eight
 * Memory  vb_load vb_store (unaligned), vb_set1
 * Bits    vb_xor vb_and vb_or; vb_left vb_right(a, count 0..7) of lanes wider than a byte, so that bits of a
 *         neighbour come in: to be masked
 * Values  vb_look_up(table, index, size) = table[index], size 16, 64 or 128, index below it; AVX2: size 16 only, and of
 *         an index bits 4 to 6 count nothing;
 *         vb_negate(a, signs): -a where bit 7 of signs is set;
 *         vb_select(signs, a, b): a where bit 7 of signs is set, else b; AVX2 only
 *         vb_widen(p, a): VB_WIDTH int16 at p = the bytes of a, the i-th place of which has byte vb_place(i)
 */
#ifndef PLLM_SIMD_BYTES_H
#define PLLM_SIMD_BYTES_H

#include "simd.h"

#if defined(PLLM_ISA_AVX512)
enum { VB_WIDTH = 64 };
typedef __m512i vb;
static inline vb vb_load(const void *p) { return _mm512_loadu_si512(p); }
static inline void vb_store(void *p, vb a) { _mm512_storeu_si512(p, a); }
static inline vb vb_set1(uint8_t x) { return _mm512_set1_epi8((char)x); }
static inline vb vb_xor(vb a, vb b) { return _mm512_xor_si512(a, b); }
static inline vb vb_and(vb a, vb b) { return _mm512_and_si512(a, b); }
static inline vb vb_or(vb a, vb b) { return _mm512_or_si512(a, b); }
#define vb_left(a, count) _mm512_slli_epi16(a, count)
#define vb_right(a, count) _mm512_srli_epi16(a, count)
static inline vb vb_look_up(const int8_t *table, vb index, int size)
{
    if (size <= 64) /* tables of sixteen are repeated */
        return _mm512_permutexvar_epi8(index, vb_load(table));
    return _mm512_permutex2var_epi8(vb_load(table), index, vb_load(table + 64));
}
static inline vb vb_negate(vb a, vb signs)
{
    return _mm512_mask_sub_epi8(a, _mm512_movepi8_mask(signs), _mm512_setzero_si512(), a);
}
static inline int vb_place(int i) { return i; }
static inline void vb_widen(int16_t *p, vb a)
{
    _mm512_storeu_si512(p, _mm512_cvtepi8_epi16(_mm512_castsi512_si256(a)));
    _mm512_storeu_si512(p + 32, _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(a, 1)));
}
#elif defined(PLLM_ISA_AVX2)
enum { VB_WIDTH = 32 };
typedef __m256i vb;
static inline vb vb_load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
static inline void vb_store(void *p, vb a) { _mm256_storeu_si256((__m256i *)p, a); }
static inline vb vb_set1(uint8_t x) { return _mm256_set1_epi8((char)x); }
static inline vb vb_xor(vb a, vb b) { return _mm256_xor_si256(a, b); }
static inline vb vb_and(vb a, vb b) { return _mm256_and_si256(a, b); }
static inline vb vb_or(vb a, vb b) { return _mm256_or_si256(a, b); }
#define vb_left(a, count) _mm256_slli_epi16(a, count)
#define vb_right(a, count) _mm256_srli_epi16(a, count)
static inline vb vb_look_up(const int8_t *table, vb index, int size)
{
    (void)size;
    const __m128i sixteen = _mm_loadu_si128((const __m128i *)(const void *)table);
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(sixteen), index);
}
static inline vb vb_negate(vb a, vb signs) { return _mm256_sign_epi8(a, vb_or(signs, vb_set1(1))); }
static inline vb vb_select(vb signs, vb a, vb b) { return _mm256_blendv_epi8(b, a, signs); }
/* The inner quarters change places: a sign extension across the halves of a vector takes more than twice as long as
 * doubling the bytes and shifting them. */
static inline int vb_place(int i) { return i / 8 == 1 ? i + 8 : i / 8 == 2 ? i - 8 : i; }
static inline void vb_widen(int16_t *p, vb a)
{
    vb_store(p, _mm256_srai_epi16(_mm256_unpacklo_epi8(a, a), 8));
    vb_store(p + 16, _mm256_srai_epi16(_mm256_unpackhi_epi8(a, a), 8));
}
#elif defined(PLLM_ISA_NEON)
enum { VB_WIDTH = 16 };
typedef uint8x16_t vb;
static inline vb vb_load(const void *p) { return vld1q_u8(p); }
static inline void vb_store(void *p, vb a) { vst1q_u8(p, a); }
static inline vb vb_set1(uint8_t x) { return vdupq_n_u8(x); }
static inline vb vb_xor(vb a, vb b) { return veorq_u8(a, b); }
static inline vb vb_and(vb a, vb b) { return vandq_u8(a, b); }
static inline vb vb_or(vb a, vb b) { return vorrq_u8(a, b); }
static inline vb vb_left(vb a, int count) { return vshlq_u8(a, vdupq_n_s8((int8_t)count)); }
static inline vb vb_right(vb a, int count) { return vshlq_u8(a, vdupq_n_s8((int8_t)-count)); }
static inline vb vb_look_up(const int8_t *table, vb index, int size)
{
    const uint8_t *const bytes = (const uint8_t *)table;
    if (size == 16)
        return vqtbl1q_u8(vld1q_u8(bytes), index);
    const vb low = vqtbl4q_u8(vld1q_u8_x4(bytes), index); /* zero behind the 64 */
    return size == 64 ? low : vqtbx4q_u8(low, vld1q_u8_x4(bytes + 64), vsubq_u8(index, vdupq_n_u8(64)));
}
static inline vb vb_negate(vb a, vb signs)
{
    const vb negative = vreinterpretq_u8_s8(vshrq_n_s8(vreinterpretq_s8_u8(signs), 7));
    return vsubq_u8(veorq_u8(a, negative), negative);
}
static inline int vb_place(int i) { return i; }
static inline void vb_widen(int16_t *p, vb a)
{
    const int8x16_t values = vreinterpretq_s8_u8(a);
    vst1q_s16(p, vmovl_s8(vget_low_s8(values)));
    vst1q_s16(p + 8, vmovl_high_s8(values));
}
#else
enum { VB_WIDTH = 8 };
typedef uint64_t vb;
static inline vb vb_load(const void *p)
{
    vb a;
    memcpy(&a, p, sizeof a);
    return a;
}
static inline void vb_store(void *p, vb a) { memcpy(p, &a, sizeof a); }
static inline vb vb_set1(uint8_t x) { return x * 0x0101010101010101u; }
static inline vb vb_xor(vb a, vb b) { return a ^ b; }
static inline vb vb_and(vb a, vb b) { return a & b; }
static inline vb vb_or(vb a, vb b) { return a | b; }
static inline vb vb_left(vb a, int count) { return a << count; }
static inline vb vb_right(vb a, int count) { return a >> count; }
static inline vb vb_look_up(const int8_t *table, vb index, int size)
{
    uint8_t at[VB_WIDTH];
    (void)size;
    memcpy(at, &index, sizeof at);
    for (int i = 0; i < VB_WIDTH; i++)
        at[i] = (uint8_t)table[at[i]];
    return vb_load(at);
}
static inline vb vb_negate(vb a, vb signs)
{
    const vb one = signs >> 7 & vb_set1(1), negative = one * 255, top = vb_set1(128);
    const vb b = a ^ negative; /* plus one, without carries from byte to byte */
    return ((b & ~top) + one) ^ (b & top);
}
static inline int vb_place(int i) { return i; }
static inline void vb_widen(int16_t *p, vb a)
{
    int8_t bytes[VB_WIDTH];
    memcpy(bytes, &a, sizeof bytes);
    for (int i = 0; i < VB_WIDTH; i++)
        p[i] = bytes[i];
}
#endif

#endif
