/* simd_avx512.h - the vector layer on AVX-512 F, BW, DQ, VL, VBMI, VNNI. See simd.h for what each function
 * does.
 * With PLLM_SIMDE the instructions are emulated by the SIMDe headers, to test where they are missing. */
#ifndef PLLM_SIMD_AVX512_H
#define PLLM_SIMD_AVX512_H

#ifdef PLLM_SIMDE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/fma.h>
#else
#include <immintrin.h>
#endif

#define VF_WIDTH 16

typedef __m512 vf;
typedef __m512i vi;
typedef __mmask16 vm;

#define VF_HALF(p) ((const __m256i *)(const void *)(p))
#define VF_QUARTER(p) ((const __m128i *)(const void *)(p))
static inline vf vf_set1(float x) { return _mm512_set1_ps(x); }
static inline vf vf_zero(void) { return _mm512_setzero_ps(); }
static inline vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void vf_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
static inline vi vi_set1(int32_t x) { return _mm512_set1_epi32(x); }
static inline vi vi_iota(void)
{
    return _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
}
static inline vi vi_load(const int32_t *p) { return _mm512_loadu_si512(p); }
static inline vf vf_look_up8(const float *p, vi index)
{
    return _mm512_permutexvar_ps(index, _mm512_castps256_ps512(_mm256_loadu_ps(p)));
}
static inline vf vf_load_with(const float *p, const int bit)
{
    return _mm512_permutexvar_ps(_mm512_or_si512(vi_iota(), _mm512_set1_epi32(bit)), vf_load(p));
}
static inline vf vf_load_without(const float *p, const int bit)
{
    return _mm512_permutexvar_ps(_mm512_andnot_si512(_mm512_set1_epi32(bit), vi_iota()), vf_load(p));
}
static inline void vi_store(int32_t *p, vi a) { _mm512_storeu_si512(p, a); }

static inline vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
static inline vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
static inline vf vf_sqrt(vf a) { return _mm512_sqrt_ps(a); }
static inline vf vf_neg(vf a) { return _mm512_xor_ps(a, _mm512_set1_ps(-0.0f)); }
static inline vf vf_abs(vf a) { return _mm512_andnot_ps(_mm512_set1_ps(-0.0f), a); }
static inline vf vf_sign(vf a) /* a & its sign bit | 1 */
{
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(a), _mm512_set1_epi32(INT32_MIN),
                                                         _mm512_castps_si512(_mm512_set1_ps(1.0f)), 0xea));
}

static inline vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
static inline vi vi_sub(vi a, vi b) { return _mm512_sub_epi32(a, b); }
static inline vi vi_mul(vi a, vi b) { return _mm512_mullo_epi32(a, b); }
static inline vi vi_min(vi a, vi b) { return _mm512_min_epi32(a, b); }
static inline vi vi_max(vi a, vi b) { return _mm512_max_epi32(a, b); }
static inline vi vi_and(vi a, vi b) { return _mm512_and_si512(a, b); }
static inline vi vi_or(vi a, vi b) { return _mm512_or_si512(a, b); }
static inline vi vi_xor(vi a, vi b) { return _mm512_xor_si512(a, b); }
static inline vi vi_srlv(vi a, vi n) { return _mm512_srlv_epi32(a, n); }
static inline vi vi_sll(vi a, int n) { return _mm512_sll_epi32(a, _mm_cvtsi32_si128(n)); }
static inline vi vi_srl(vi a, int n) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(n)); }

static inline vf vf_bits(vi a) { return _mm512_castsi512_ps(a); }
static inline vi vi_bits(vf a) { return _mm512_castps_si512(a); }

static inline vm vf_lt(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
static inline vm vf_le(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
static inline vm vf_eq(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
static inline vm vi_lt(vi a, vi b) { return _mm512_cmpgt_epi32_mask(b, a); }
static inline vm vi_eq(vi a, vi b) { return _mm512_cmpeq_epi32_mask(a, b); }
static inline vm vm_and(vm a, vm b) { return (vm)(a & b); }
static inline vm vm_or(vm a, vm b) { return (vm)(a | b); }
static inline vm vm_not(vm a) { return (vm)~a; }
static inline unsigned vm_bits(vm a) { return a; }
static inline int vm_any(vm a) { return a != 0; }
static inline vf vf_select(vm m, vf a, vf b) { return _mm512_mask_blend_ps(m, b, a); }
static inline vi vi_select(vm m, vi a, vi b) { return _mm512_mask_blend_epi32(m, b, a); }

/* Lane i + lane i+8 of a vf16. */
static inline __m256 vf16_fold(const vf *part)
{
    const __m512d whole = _mm512_castps_pd(*part);
    return _mm256_add_ps(_mm512_castps512_ps256(*part), _mm256_castpd_ps(_mm512_extractf64x4_pd(whole, 1)));
}
typedef __m512i vs;
static inline vs vs_load(const int16_t *p) { return _mm512_loadu_si512(p); }

/* c plus sums of products in each lane. As an intrinsic, gcc copies c to another register and back. */
#if defined(__clang__) || defined(PLLM_SIMDE)
#define VI_ADD_PRODUCTS(name) c = _mm512_##name##_epi32(c, a, b)
#else
#define VI_ADD_PRODUCTS(name) __asm__("vp" #name " %2, %1, %0" : "+v"(c) : "v"(a), "v"(b))
#endif
static inline vi vi_dot(vi c, vs a, vs b)
{
    VI_ADD_PRODUCTS(dpwssd);
    return c;
}
/* Of four bytes: those of a without a sign, those of b with one. */
static inline vi vi_dot_bytes(vi c, __m512i a, __m512i b)
{
    VI_ADD_PRODUCTS(dpbusd);
    return c;
}
#undef VI_ADD_PRODUCTS

/* p[index mod 2 VF_WIDTH] */
static inline vf vf_lookup2(const float *p, vi index)
{
    return _mm512_permutex2var_ps(vf_load(p), index, vf_load(p + VF_WIDTH));
}
static inline __m256i vi_fold(vi a)
{
    return _mm256_add_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
}
static inline void vi_sum4(int32_t *sums, vi a, vi b, vi c, vi d)
{
    const __m256i pairs = _mm256_hadd_epi32(_mm256_hadd_epi32(vi_fold(a), vi_fold(b)),
                                            _mm256_hadd_epi32(vi_fold(c), vi_fold(d)));
    _mm_storeu_si128((__m128i *)(void *)sums,
                     _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1)));
}
/* a (16, 16): rows become columns. */
static inline void vi_transpose(vi *a)
{
    vi fours[VF_WIDTH]; /* quarter L of [i + j]: rows i..i+3 of column 4 L + j */
    for (int i = 0; i < VF_WIDTH; i += 4) {
        const vi low = _mm512_unpacklo_epi32(a[i], a[i + 1]), high = _mm512_unpackhi_epi32(a[i], a[i + 1]);
        const vi low2 = _mm512_unpacklo_epi32(a[i + 2], a[i + 3]), high2 = _mm512_unpackhi_epi32(a[i + 2], a[i + 3]);
        fours[i] = _mm512_unpacklo_epi64(low, low2);
        fours[i + 1] = _mm512_unpackhi_epi64(low, low2);
        fours[i + 2] = _mm512_unpacklo_epi64(high, high2);
        fours[i + 3] = _mm512_unpackhi_epi64(high, high2);
    }
    for (int j = 0; j < 4; j++) {
        const vi first = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0x44);
        const vi second = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0x44);
        const vi third = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0xee);
        const vi fourth = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0xee);
        a[j] = _mm512_shuffle_i32x4(first, second, 0x88);
        a[4 + j] = _mm512_shuffle_i32x4(first, second, 0xdd);
        a[8 + j] = _mm512_shuffle_i32x4(third, fourth, 0x88);
        a[12 + j] = _mm512_shuffle_i32x4(third, fourth, 0xdd);
    }
}
static inline vi vi_keep(vm m, vi a) { return _mm512_maskz_mov_epi32(m, a); }

#ifdef PLLM_SIMDE
/* What SIMDe lacks, or does with other rounding or other NaN rules, lane by lane. */
#define VF_LANES for (int i = 0; i < VF_WIDTH; i++)
static inline vf vf_fma(vf a, vf b, vf c)
{
    float x[VF_WIDTH], y[VF_WIDTH], z[VF_WIDTH];
    vf_store(x, a), vf_store(y, b), vf_store(z, c);
    VF_LANES z[i] = fmaf(x[i], y[i], z[i]);
    return vf_load(z);
}
static inline vf vf_fnma(vf a, vf b, vf c) { return vf_fma(vf_neg(a), b, c); }
static inline vf vf_min(vf a, vf b) { return vf_select(vf_lt(a, b), a, b); }
static inline vf vf_max(vf a, vf b) { return vf_select(vf_lt(b, a), a, b); }
static inline vf vf_rint(vf a)
{
    float x[VF_WIDTH];
    vf_store(x, a);
    VF_LANES x[i] = rintf(x[i]);
    return vf_load(x);
}
static inline vf vf_from_i(vi a)
{
    int32_t x[VF_WIDTH];
    float y[VF_WIDTH];
    vi_store(x, a);
    VF_LANES y[i] = (float)x[i];
    return vf_load(y);
}
static inline vi vi_from_f(vf a)
{
    float x[VF_WIDTH];
    int32_t y[VF_WIDTH];
    vf_store(x, a);
    VF_LANES y[i] = (int32_t)lrintf(x[i]);
    return vi_load(y);
}
static inline vf vf_gather(const float *p, vi index)
{
    int32_t x[VF_WIDTH];
    float y[VF_WIDTH];
    vi_store(x, index);
    VF_LANES y[i] = p[x[i]];
    return vf_load(y);
}
/* Four, or eight, bytes of each index, that many apart. */
static inline vi vi_gather4(const int8_t *p, vi index)
{
    int32_t x[VF_WIDTH];
    vi_store(x, index);
    VF_LANES memcpy(x + i, p + 4 * (size_t)x[i], 4);
    return vi_load(x);
}
static inline vi vi_gather8(const int8_t *p, __m256i index)
{
    int32_t x[VF_WIDTH / 2];
    int64_t y[VF_WIDTH / 2];
    _mm256_storeu_si256((__m256i *)(void *)x, index);
    for (int i = 0; i < VF_WIDTH / 2; i++)
        memcpy(y + i, p + 8 * (size_t)x[i], 8);
    return _mm512_loadu_si512(y);
}
static inline vi vi_sra(vi a, int n)
{
    int32_t x[VF_WIDTH];
    vi_store(x, a);
    VF_LANES x[i] >>= n;
    return vi_load(x);
}
static inline void vi_store_i16(int16_t *p, vi a)
{
    int32_t x[VF_WIDTH];
    vi_store(x, a);
    VF_LANES p[i] = (int16_t)x[i];
}
static inline float vf_lowest(vf a)
{
    float x[VF_WIDTH];
    vf_store(x, a);
    VF_LANES x[0] = x[i] < x[0] ? x[i] : x[0];
    return x[0];
}
static inline int vi_compress(int32_t *p, vi a, vm m)
{
    int32_t x[VF_WIDTH];
    int n = 0;
    vi_store(x, a);
    VF_LANES if (m >> i & 1) p[n++] = x[i];
    return n;
}
#define VF_WIDEN(name, T) \
    static inline vi name(const T *p) \
    { \
        int32_t x[VF_WIDTH]; \
        VF_LANES x[i] = p[i]; \
        return vi_load(x); \
    }
VF_WIDEN(vi_load_i8, int8_t)
VF_WIDEN(vi_load_u8, uint8_t)
VF_WIDEN(vi_load_u16, uint16_t)
#undef VF_WIDEN
#undef VF_LANES
#else
static inline void vi_store_i16(int16_t *p, vi a)
{
    _mm256_storeu_si256((__m256i *)(void *)p, _mm512_cvtepi32_epi16(a));
}
static inline float vf_lowest(vf a) { return _mm512_reduce_min_ps(a); }
static inline int vi_compress(int32_t *p, vi a, vm m)
{
    vi_store(p, _mm512_maskz_compress_epi32(m, a));
    return __builtin_popcount(m);
}
static inline vi vi_sra(vi a, int n) { return _mm512_sra_epi32(a, _mm_cvtsi32_si128(n)); }
static inline vi vi_load_i8(const int8_t *p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128(VF_QUARTER(p))); }
static inline vi vi_load_u8(const uint8_t *p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(VF_QUARTER(p))); }
static inline vi vi_load_u16(const uint16_t *p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256(VF_HALF(p))); }
static inline vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static inline vf vf_fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); }
static inline vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
static inline vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline vf vf_rint(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT); }
static inline vf vf_from_i(vi a) { return _mm512_cvtepi32_ps(a); }
static inline vi vi_from_f(vf a) { return _mm512_cvtps_epi32(a); }
static inline vf vf_gather(const float *p, vi i) { return _mm512_i32gather_ps(i, p, 4); }
static inline vi vi_gather4(const int8_t *p, vi i) { return _mm512_i32gather_epi32(i, p, 4); }
static inline vi vi_gather8(const int8_t *p, __m256i i) { return _mm512_i32gather_epi64(i, p, 8); }
#endif
static inline vf vf_load_i8(const int8_t *p) { return vf_from_i(vi_load_i8(p)); }

#undef VF_HALF
#undef VF_QUARTER
#endif
