/* simd_avx2.h - the vector layer on AVX2 + FMA. See simd.h for what each function does. */
#ifndef PLLM_SIMD_AVX2_H
#define PLLM_SIMD_AVX2_H

#include <immintrin.h>

#include "simd_pack4.h"

#define VF_WIDTH 8

typedef __m256 vf;
typedef __m256i vi;
typedef __m256 vm; /* each lane all zeros or all ones */

#define VF_PACKED(p) ((const __m256i *)(const void *)(p))
#define VF_HALF(p) ((const __m128i *)(const void *)(p))
static inline vf vf_set1(float x) { return _mm256_set1_ps(x); }
static inline vf vf_zero(void) { return _mm256_setzero_ps(); }
static inline vf vf_load(const float *p) { return _mm256_loadu_ps(p); }
static inline void vf_store(float *p, vf a) { _mm256_storeu_ps(p, a); }
static inline vi vi_set1(int32_t x) { return _mm256_set1_epi32(x); }
static inline vi vi_iota(void) { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
static inline vi vi_load(const int32_t *p) { return _mm256_loadu_si256(VF_PACKED(p)); }
static inline void vi_store(int32_t *p, vi a) { _mm256_storeu_si256((__m256i *)(void *)p, a); }
static inline vf vf_gather(const float *p, vi i) { return _mm256_i32gather_ps(p, i, 4); }
static inline vf vf_look_up8(const float *p, vi i) { return _mm256_permutevar8x32_ps(_mm256_loadu_ps(p), i); }
static inline vf vf_load_with(const float *p, const int bit)
{
    return bit == 1   ? _mm256_movehdup_ps(vf_load(p))
           : bit == 2 ? _mm256_permute_ps(vf_load(p), 0xee)
                      : _mm256_broadcast_ps((const __m128 *)(const void *)(p + 4));
}
static inline vf vf_load_without(const float *p, const int bit)
{
    return bit == 1   ? _mm256_moveldup_ps(vf_load(p))
           : bit == 2 ? _mm256_permute_ps(vf_load(p), 0x44)
                      : _mm256_broadcast_ps((const __m128 *)(const void *)p);
}
static inline vi vi_load_i8(const int8_t *p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64(VF_HALF(p))); }
static inline vi vi_load_u8(const uint8_t *p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64(VF_HALF(p))); }
static inline vi vi_load_u16(const uint16_t *p) { return _mm256_cvtepu16_epi32(_mm_loadu_si128(VF_HALF(p))); }

static inline vf vf_add(vf a, vf b) { return _mm256_add_ps(a, b); }
static inline vf vf_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
static inline vf vf_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
static inline vf vf_div(vf a, vf b) { return _mm256_div_ps(a, b); }
static inline vf vf_min(vf a, vf b) { return _mm256_min_ps(a, b); }
static inline vf vf_max(vf a, vf b) { return _mm256_max_ps(a, b); }
static inline vf vf_sqrt(vf a) { return _mm256_sqrt_ps(a); }
static inline vf vf_neg(vf a) { return _mm256_xor_ps(a, _mm256_set1_ps(-0.0f)); }
static inline vf vf_abs(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
static inline vf vf_sign(vf a) { return _mm256_or_ps(_mm256_and_ps(_mm256_set1_ps(-0.0f), a), _mm256_set1_ps(1.0f)); }
static inline vf vf_rint(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
static inline vf vf_fnma(vf a, vf b, vf c) { return _mm256_fnmadd_ps(a, b, c); }

static inline vi vi_add(vi a, vi b) { return _mm256_add_epi32(a, b); }
static inline vi vi_sub(vi a, vi b) { return _mm256_sub_epi32(a, b); }
static inline vi vi_mul(vi a, vi b) { return _mm256_mullo_epi32(a, b); }
static inline vi vi_min(vi a, vi b) { return _mm256_min_epi32(a, b); }
static inline vi vi_max(vi a, vi b) { return _mm256_max_epi32(a, b); }
static inline vi vi_and(vi a, vi b) { return _mm256_and_si256(a, b); }
static inline vi vi_or(vi a, vi b) { return _mm256_or_si256(a, b); }
static inline vi vi_xor(vi a, vi b) { return _mm256_xor_si256(a, b); }
static inline vi vi_srlv(vi a, vi n) { return _mm256_srlv_epi32(a, n); }
static inline vi vi_sll(vi a, int n) { return _mm256_sll_epi32(a, _mm_cvtsi32_si128(n)); }
static inline vi vi_srl(vi a, int n) { return _mm256_srl_epi32(a, _mm_cvtsi32_si128(n)); }
static inline vi vi_sra(vi a, int n) { return _mm256_sra_epi32(a, _mm_cvtsi32_si128(n)); }

/* Lane i + lane i+8 of a vf16. */
static inline __m256 vf16_fold(const vf *part) { return _mm256_add_ps(part[0], part[1]); }
typedef __m256i vs;
static inline vs vs_load(const int16_t *p) { return _mm256_loadu_si256(VF_PACKED(p)); }
/* As intrinsics, gcc adds the products of several calls before it adds c, which it then keeps in memory. */
static inline vi vi_dot(vi c, vs a, vs b)
{
    vi products;
    __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(c), "=&x"(products) : "x"(a), "x"(b));
    return c;
}
static inline void vi_sum4(int32_t *sums, vi a, vi b, vi c, vi d)
{
    const __m256i pairs = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    _mm_storeu_si128((__m128i *)(void *)sums,
                     _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1)));
}
static inline void vi_store_i16(int16_t *p, vi a)
{
    const __m128i low = _mm256_castsi256_si128(a), high = _mm256_extracti128_si256(a, 1);
    _mm_storeu_si128((__m128i *)(void *)p, _mm_packs_epi32(low, high));
}

static inline vf vf_from_i(vi a) { return _mm256_cvtepi32_ps(a); }
static inline vi vi_from_f(vf a) { return _mm256_cvtps_epi32(a); }
static inline vf vf_bits(vi a) { return _mm256_castsi256_ps(a); }
static inline vi vi_bits(vf a) { return _mm256_castps_si256(a); }
static inline vf vf_load_i8(const int8_t *p) { return vf_from_i(vi_load_i8(p)); }

static inline vm vf_lt(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
static inline vm vf_le(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_LE_OQ); }
static inline vm vf_eq(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
static inline vm vi_lt(vi a, vi b) { return vf_bits(_mm256_cmpgt_epi32(b, a)); }
static inline vm vi_eq(vi a, vi b) { return vf_bits(_mm256_cmpeq_epi32(a, b)); }
static inline vm vm_and(vm a, vm b) { return _mm256_and_ps(a, b); }
static inline vm vm_or(vm a, vm b) { return _mm256_or_ps(a, b); }
static inline vm vm_not(vm a) { return _mm256_xor_ps(a, vf_bits(_mm256_set1_epi32(-1))); }
static inline unsigned vm_bits(vm a) { return (unsigned)_mm256_movemask_ps(a); }
static inline int vm_any(vm a) { return _mm256_movemask_ps(a) != 0; }
static inline vf vf_select(vm m, vf a, vf b) { return _mm256_blendv_ps(b, a, m); }
static inline vi vi_select(vm m, vi a, vi b) { return vi_bits(_mm256_blendv_ps(vf_bits(b), vf_bits(a), m)); }
static inline vi vi_keep(vm m, vi a) { return _mm256_and_si256(vi_bits(m), a); }
static inline float vf_lowest(vf a)
{
    __m128 low = _mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    low = _mm_min_ps(low, _mm_movehl_ps(low, low));
    return _mm_cvtss_f32(_mm_min_ss(low, _mm_movehdup_ps(low)));
}
static inline int vi_compress(int32_t *p, vi a, vm m)
{
    const unsigned bits = vm_bits(m), low = bits & 15, high = bits >> 4;
    const int first = __builtin_popcount(low);
    const __m128i pack_low = _mm_loadu_si128(VF_HALF(pack4[low]));
    const __m128i pack_high = _mm_loadu_si128(VF_HALF(pack4[high]));
    _mm_storeu_si128((__m128i *)(void *)p,
                     _mm_shuffle_epi8(_mm256_castsi256_si128(a), pack_low));
    _mm_storeu_si128((__m128i *)(void *)(p + first),
                     _mm_shuffle_epi8(_mm256_extracti128_si256(a, 1), pack_high));
    return first + __builtin_popcount(high);
}

#undef VF_PACKED
#undef VF_HALF
#endif
