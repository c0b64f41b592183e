/* simd_neon.h - the vector layer on AArch64 NEON. See simd.h for what each function does. */
#ifndef PLLM_SIMD_NEON_H
#define PLLM_SIMD_NEON_H

#include <arm_neon.h>

#include "simd_pack4.h"

#define VF_WIDTH 4

typedef float32x4_t vf;
typedef int32x4_t vi;
typedef uint32x4_t vm; /* each lane all zeros or all ones */

static inline vf vf_set1(float x) { return vdupq_n_f32(x); }
static inline vf vf_zero(void) { return vdupq_n_f32(0.0f); }
static inline vf vf_load(const float *p) { return vld1q_f32(p); }
static inline void vf_store(float *p, vf a) { vst1q_f32(p, a); }
static inline vi vi_set1(int32_t x) { return vdupq_n_s32(x); }
static inline vi vi_iota(void)
{
    static const int32_t lane[VF_WIDTH] = {0, 1, 2, 3};
    return vld1q_s32(lane);
}
static inline vi vi_load(const int32_t *p) { return vld1q_s32(p); }
static inline void vi_store(int32_t *p, vi a) { vst1q_s32(p, a); }
static inline vf vf_gather(const float *p, vi index)
{
    const float lane[VF_WIDTH] = {p[vgetq_lane_s32(index, 0)], p[vgetq_lane_s32(index, 1)],
                                  p[vgetq_lane_s32(index, 2)], p[vgetq_lane_s32(index, 3)]};
    return vld1q_f32(lane);
}
static inline vf vf_look_up8(const float *p, vi index)
{
    const uint8x16x2_t table = {{vreinterpretq_u8_f32(vld1q_f32(p)), vreinterpretq_u8_f32(vld1q_f32(p + 4))}};
    const int32x4_t bytes = vmlaq_s32(vdupq_n_s32(0x03020100), index, vdupq_n_s32(0x04040404));
    return vreinterpretq_f32_u8(vqtbl2q_u8(table, vreinterpretq_u8_s32(bytes)));
}
static inline vf vf_load_with(const float *p, const int bit)
{
    const vf a = vld1q_f32(p);
    return bit == 1 ? vtrn2q_f32(a, a) : vcombine_f32(vget_high_f32(a), vget_high_f32(a));
}
static inline vf vf_load_without(const float *p, const int bit)
{
    const vf a = vld1q_f32(p);
    return bit == 1 ? vtrn1q_f32(a, a) : vcombine_f32(vget_low_f32(a), vget_low_f32(a));
}
static inline vi vi_load_u16(const uint16_t *p) { return vreinterpretq_s32_u32(vmovl_u16(vld1_u16(p))); }
static inline vi vi_load_i8(const int8_t *p)
{
    uint32_t four;
    memcpy(&four, p, sizeof four);
    return vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(four)))));
}
static inline vi vi_load_u8(const uint8_t *p)
{
    uint32_t four;
    memcpy(&four, p, sizeof four);
    uint16x8_t wide = vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four)));
    return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(wide)));
}

static inline vm vf_lt(vf a, vf b) { return vcltq_f32(a, b); }
static inline vm vf_le(vf a, vf b) { return vcleq_f32(a, b); }
static inline vm vf_eq(vf a, vf b) { return vceqq_f32(a, b); }
static inline vm vi_lt(vi a, vi b) { return vcltq_s32(a, b); }
static inline vm vi_eq(vi a, vi b) { return vceqq_s32(a, b); }
static inline vm vm_and(vm a, vm b) { return vandq_u32(a, b); }
static inline vm vm_or(vm a, vm b) { return vorrq_u32(a, b); }
static inline vm vm_not(vm a) { return vmvnq_u32(a); }
static inline unsigned vm_bits(vm a)
{
    static const uint32_t bit[VF_WIDTH] = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(a, vld1q_u32(bit)));
}
static inline int vm_any(vm a) { return vmaxvq_u32(a) != 0; }
static inline vf vf_select(vm m, vf a, vf b) { return vbslq_f32(m, a, b); }
static inline vi vi_select(vm m, vi a, vi b) { return vbslq_s32(m, a, b); }

static inline vi vi_keep(vm m, vi a) { return vandq_s32(vreinterpretq_s32_u32(m), a); }
static inline float vf_lowest(vf a) { return vminvq_f32(a); }
static inline int vi_compress(int32_t *p, vi a, vm m)
{
    const unsigned bits = vm_bits(m);
    vst1q_s32(p, vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(a), vld1q_u8(pack4[bits]))));
    return __builtin_popcount(bits);
}

static inline vf vf_add(vf a, vf b) { return vaddq_f32(a, b); }
static inline vf vf_sub(vf a, vf b) { return vsubq_f32(a, b); }
static inline vf vf_mul(vf a, vf b) { return vmulq_f32(a, b); }
static inline vf vf_div(vf a, vf b) { return vdivq_f32(a, b); }
static inline vf vf_min(vf a, vf b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
static inline vf vf_max(vf a, vf b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
static inline vf vf_sqrt(vf a) { return vsqrtq_f32(a); }
static inline vf vf_neg(vf a) { return vnegq_f32(a); }
static inline vf vf_abs(vf a) { return vabsq_f32(a); }
static inline vf vf_sign(vf a) { return vbslq_f32(vdupq_n_u32(0x80000000u), a, vdupq_n_f32(1.0f)); }
static inline vf vf_rint(vf a) { return vrndnq_f32(a); }
static inline vf vf_fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
static inline vf vf_fnma(vf a, vf b, vf c) { return vfmsq_f32(c, a, b); }

static inline vi vi_add(vi a, vi b) { return vaddq_s32(a, b); }
static inline vi vi_sub(vi a, vi b) { return vsubq_s32(a, b); }
static inline vi vi_mul(vi a, vi b) { return vmulq_s32(a, b); }
static inline vi vi_min(vi a, vi b) { return vminq_s32(a, b); }
static inline vi vi_max(vi a, vi b) { return vmaxq_s32(a, b); }
static inline vi vi_and(vi a, vi b) { return vandq_s32(a, b); }
static inline vi vi_or(vi a, vi b) { return vorrq_s32(a, b); }
static inline vi vi_xor(vi a, vi b) { return veorq_s32(a, b); }
static inline vi vi_srlv(vi a, vi n)
{
    return vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a), vnegq_s32(n)));
}
static inline vi vi_sll(vi a, int n) { return vshlq_s32(a, vdupq_n_s32(n)); }
static inline vi vi_srl(vi a, int n) { return vi_srlv(a, vdupq_n_s32(n)); }
static inline vi vi_sra(vi a, int n) { return vshlq_s32(a, vdupq_n_s32(-n)); }

typedef int16x8_t vs;
static inline vs vs_load(const int16_t *p) { return vld1q_s16(p); }
static inline vi vi_dot(vi c, vs a, vs b)
{
    return vmlal_high_s16(vmlal_s16(c, vget_low_s16(a), vget_low_s16(b)), a, b);
}
typedef int16x4_t vs_pair;
#define VS_PLACE(lane, which) ((which) * VF_WIDTH + (lane))
static inline vs_pair vs_load_pair(const int16_t *p)
{
    int32_t both;
    memcpy(&both, p, sizeof both);
    return vreinterpret_s16_s32(vdup_n_s32(both));
}
static inline vi vi_dot_pair(vi c, vs a, vs_pair b)
{
    return vmlal_lane_s16(vmlal_lane_s16(c, vget_low_s16(a), b, 0), vget_high_s16(a), b, 1);
}
static inline void vi_sum4(int32_t *sums, vi a, vi b, vi c, vi d)
{
    vst1q_s32(sums, vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d)));
}
static inline void vi_store_i16(int16_t *p, vi a) { vst1_s16(p, vmovn_s32(a)); }

static inline vf vf_from_i(vi a) { return vcvtq_f32_s32(a); }
static inline vi vi_from_f(vf a) { return vcvtnq_s32_f32(a); }
static inline vf vf_bits(vi a) { return vreinterpretq_f32_s32(a); }
static inline vi vi_bits(vf a) { return vreinterpretq_s32_f32(a); }
static inline vf vf_load_i8(const int8_t *p) { return vf_from_i(vi_load_i8(p)); }

#endif
