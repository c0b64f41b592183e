/* simd.h - the vector layer: one set of inline functions per instruction set, chosen by
 * PLLM_ISA_AVX512, PLLM_ISA_AVX2, PLLM_ISA_NEON, or portable C when none is defined.
 *
 * Types   vf  VF_WIDTH floats        vi  VF_WIDTH int32        vm  VF_WIDTH truth values
 * Memory  vf_load vf_store vi_load vi_store (unaligned), vf_set1 vf_zero vi_set1,
 *         vi_iota = 0, 1, 2, ...;  vf_gather(base, index) = base[index[lane]];
 *         vi_load_i8 vi_load_u8 vi_load_u16: VF_WIDTH small integers, widened; vf_load_i8: to float;
 *         vf_look_up8(p, index) = p[index[lane]] of eight floats, each index 0..7;
 *         vf_load_with(p, bit) = p[lane | bit] and vf_load_without(p, bit) = p[lane & ~bit], bit a power of two below
 *         VF_WIDTH, constant
 * Float   vf_add vf_sub vf_mul vf_div vf_sqrt vf_neg vf_abs, vf_sign: 1, or -1 where the sign bit is set,
 *         vf_fma(a, b, c) = a b + c and vf_fnma(a, b, c) = c - a b, both rounded once,
 *         vf_min(a, b) = a < b ? a : b and vf_max(a, b) = a > b ? a : b (so b if either is NaN),
 *         vf_rint: nearest integer, ties to even
 * Int32   vi_add vi_sub vi_mul (all wrap) vi_min vi_max vi_and vi_or vi_xor,
 *         vi_sll vi_srl vi_sra(a, count 0..31), vi_srlv(a, counts) each lane its own, 0..31
 * Int16   vs: 2 VF_WIDTH int16, vs_load (unaligned); vi_dot(c, a, b): its lanes add up to those of c plus
 *         the dot product of a and b (which lane gets which product is left open; int32, wraps);
 *         vi_dot_pair(c, a, vs_load_pair(p)): c + a0 p[0] + a1 p[1], where each lane has its own a0 and a1, in a at
 *         VS_PLACE(lane, 0) and VS_PLACE(lane, 1);
 *         vi_sum4(sums, a, b, c, d): sums[i] = sum over the lanes of the i-th (wraps);
 *         vi_store_i16: VF_WIDTH integers within int16, narrowed
 * Convert vf_from_i exact up to 2^24; vi_from_f to nearest, ties to even, |value| < 2^31;
 *         vf_bits vi_bits reinterpret
 * Compare vf_lt vf_le vf_eq (false on NaN) vi_lt vi_eq; vm_and vm_or vm_not vm_any;
 *         vf_lowest(a): the smallest lane (no NaN in it);  vm_bits: bit i = lane i;
 *         vf_select(m, a, b), vi_select = m ? a : b, vi_keep(m, a) = m ? a : 0;
 *         vi_compress(p, a, m) writes the lanes of a where m holds to p, in order, and returns how many;
 *         the rest of the VF_WIDTH places at p gets anything
 *
 * Every operation is rounded the same way on every instruction set: a kernel that works lane by lane
 * gives the same bits everywhere. Sums over many values go through vf16 (below).
 */
#ifndef PLLM_SIMD_H
#define PLLM_SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(PLLM_ISA_AVX512)
#include "simd_avx512.h"
#elif defined(PLLM_ISA_AVX2)
#include "simd_avx2.h"
#elif defined(PLLM_ISA_NEON)
#include "simd_neon.h"
#else
#include "simd_scalar.h"
#endif

#if defined(PLLM_ISA_AVX2) || defined(PLLM_ISA_AVX512)
typedef vs vs_pair;
#define VS_PLACE(lane, which) (2 * (lane) + (which))
static inline vs_pair vs_load_pair(const int16_t *p)
{
    int32_t both;
    memcpy(&both, p, sizeof both);
    return vi_set1(both);
}
static inline vi vi_dot_pair(vi c, vs a, vs_pair b) { return vi_dot(c, a, b); }
#endif

/* Sixteen virtual lanes, the same on every instruction set: the value at position p of a long sum
 * belongs to lane p mod 16, and the lanes are added up in one fixed order. */
enum { VF16_PARTS = 16 / VF_WIDTH };

typedef struct {
    vf part[VF16_PARTS];
} vf16;

static inline vf16 vf16_set1(float x)
{
    vf16 r;
    for (int i = 0; i < VF16_PARTS; i++)
        r.part[i] = vf_set1(x);
    return r;
}

static inline vf16 vf16_zero(void) { return vf16_set1(0.0f); }

static inline vf16 vf16_load(const float *p)
{
    vf16 r;
    for (int i = 0; i < VF16_PARTS; i++)
        r.part[i] = vf_load(p + i * VF_WIDTH);
    return r;
}

/* The first `count` (0..16) values at p, then zeros. Reads nothing behind them. */
static inline vf16 vf16_load_part(const float *p, int count)
{
    float buffer[16] = {0};
    memcpy(buffer, p, (size_t)count * sizeof(float));
    return vf16_load(buffer);
}

static inline void vf16_store(float *p, vf16 a)
{
    for (int i = 0; i < VF16_PARTS; i++)
        vf_store(p + i * VF_WIDTH, a.part[i]);
}

static inline vf16 vf16_add(vf16 a, vf16 b)
{
    for (int i = 0; i < VF16_PARTS; i++)
        a.part[i] = vf_add(a.part[i], b.part[i]);
    return a;
}

static inline vf16 vf16_mul(vf16 a, vf16 b)
{
    for (int i = 0; i < VF16_PARTS; i++)
        a.part[i] = vf_mul(a.part[i], b.part[i]);
    return a;
}

static inline vf16 vf16_fma(vf16 a, vf16 b, vf16 c)
{
    for (int i = 0; i < VF16_PARTS; i++)
        c.part[i] = vf_fma(a.part[i], b.part[i], c.part[i]);
    return c;
}

/* Sum of the sixteen lanes: lane i + lane i+8, then i+4, i+2, i+1. */
static inline float vf16_sum(vf16 a)
{
    float lane[16];
    vf16_store(lane, a);
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            lane[i] += lane[i + half];
    return lane[0];
}

/* sums[i] = vf16_sum(a[i]), of eight. */
static inline void vf16_sum8(float *sums, const vf16 *a)
{
#if defined(PLLM_ISA_AVX2) || defined(PLLM_ISA_AVX512)
    __m256 v[8];
    for (int i = 0; i < 8; i++)
        v[i] = vf16_fold(a[i].part);
    for (int i = 0; i < 4; i++)
        v[i] = _mm256_add_ps(_mm256_permute2f128_ps(v[i], v[i + 4], 0x20),
                             _mm256_permute2f128_ps(v[i], v[i + 4], 0x31));
    for (int i = 0; i < 2; i++)
        v[i] = _mm256_add_ps(_mm256_shuffle_ps(v[i], v[i + 2], 0x44), _mm256_shuffle_ps(v[i], v[i + 2], 0xee));
    /* the sums of 0, 2, 1, 3, 4, 6, 5 and 7 */
    v[0] = _mm256_add_ps(_mm256_shuffle_ps(v[0], v[1], 0x88), _mm256_shuffle_ps(v[0], v[1], 0xdd));
    _mm256_storeu_ps(sums, _mm256_permute_ps(v[0], 0xd8));
#else
    for (int i = 0; i < 8; i++)
        sums[i] = vf16_sum(a[i]);
#endif
}

#endif
