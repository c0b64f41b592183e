/* simd_scalar.h - the vector layer in portable C. See simd.h for what each function does. */
#ifndef PLLM_SIMD_SCALAR_H
#define PLLM_SIMD_SCALAR_H

#define VF_WIDTH 4

typedef struct { float v[VF_WIDTH]; } vf;
typedef struct { int32_t v[VF_WIDTH]; } vi;
typedef struct { int32_t v[VF_WIDTH]; } vm; /* 0 or -1 */

#define VF_LANES for (int i = 0; i < VF_WIDTH; i++)
#define VF_OP1(name, R, A, expr) \
    static inline R name(A a) { R r; VF_LANES r.v[i] = (expr); return r; }
#define VF_OP2(name, R, A, expr) \
    static inline R name(A a, A b) { R r; VF_LANES r.v[i] = (expr); return r; }
#define VF_OP3(name, R, M, A, expr) \
    static inline R name(M a, A b, A c) { R r; VF_LANES r.v[i] = (expr); return r; }
#define VF_WRAP(a, op, b) (int32_t)((uint32_t)(a) op (uint32_t)(b))

VF_OP1(vf_set1, vf, float, a)
VF_OP1(vf_load, vf, const float *, a[i])
VF_OP1(vi_set1, vi, int32_t, a)
VF_OP1(vi_load, vi, const int32_t *, a[i])
VF_OP1(vi_load_i8, vi, const int8_t *, a[i])
VF_OP1(vi_load_u8, vi, const uint8_t *, a[i])
VF_OP1(vi_load_u16, vi, const uint16_t *, a[i])
VF_OP1(vf_load_i8, vf, const int8_t *, (float)a[i])
static inline vf vf_zero(void) { return vf_set1(0.0f); }
static inline vi vi_iota(void) { vi r; VF_LANES r.v[i] = i; return r; }
static inline void vf_store(float *p, vf a) { VF_LANES p[i] = a.v[i]; }
static inline void vi_store(int32_t *p, vi a) { VF_LANES p[i] = a.v[i]; }
static inline vf vf_gather(const float *p, vi a) { vf r; VF_LANES r.v[i] = p[a.v[i]]; return r; }
static inline vf vf_look_up8(const float *p, vi a) { return vf_gather(p, a); }
static inline vf vf_load_with(const float *p, const int bit) { vf r; VF_LANES r.v[i] = p[i | bit]; return r; }
static inline vf vf_load_without(const float *p, const int bit) { vf r; VF_LANES r.v[i] = p[i & ~bit]; return r; }

VF_OP2(vf_add, vf, vf, a.v[i] + b.v[i])
VF_OP2(vf_sub, vf, vf, a.v[i] - b.v[i])
VF_OP2(vf_mul, vf, vf, a.v[i] * b.v[i])
VF_OP2(vf_div, vf, vf, a.v[i] / b.v[i])
VF_OP2(vf_min, vf, vf, a.v[i] < b.v[i] ? a.v[i] : b.v[i])
VF_OP2(vf_max, vf, vf, a.v[i] > b.v[i] ? a.v[i] : b.v[i])
VF_OP1(vf_sqrt, vf, vf, sqrtf(a.v[i]))
VF_OP1(vf_neg, vf, vf, -a.v[i])
VF_OP1(vf_abs, vf, vf, fabsf(a.v[i]))
VF_OP1(vf_sign, vf, vf, copysignf(1.0f, a.v[i]))
VF_OP1(vf_rint, vf, vf, rintf(a.v[i]))
VF_OP3(vf_fma, vf, vf, vf, fmaf(a.v[i], b.v[i], c.v[i]))
VF_OP3(vf_fnma, vf, vf, vf, fmaf(-a.v[i], b.v[i], c.v[i]))

VF_OP2(vi_add, vi, vi, VF_WRAP(a.v[i], +, b.v[i]))
VF_OP2(vi_sub, vi, vi, VF_WRAP(a.v[i], -, b.v[i]))
VF_OP2(vi_mul, vi, vi, VF_WRAP(a.v[i], *, b.v[i]))
VF_OP2(vi_min, vi, vi, a.v[i] < b.v[i] ? a.v[i] : b.v[i])
VF_OP2(vi_max, vi, vi, a.v[i] > b.v[i] ? a.v[i] : b.v[i])
VF_OP2(vi_and, vi, vi, a.v[i] & b.v[i])
VF_OP2(vi_or, vi, vi, a.v[i] | b.v[i])
VF_OP2(vi_xor, vi, vi, a.v[i] ^ b.v[i])
VF_OP2(vi_srlv, vi, vi, VF_WRAP(a.v[i], >>, b.v[i]))
static inline vi vi_sll(vi a, int n) { VF_LANES a.v[i] = VF_WRAP(a.v[i], <<, n); return a; }
static inline vi vi_srl(vi a, int n) { VF_LANES a.v[i] = VF_WRAP(a.v[i], >>, n); return a; }
static inline vi vi_sra(vi a, int n) { VF_LANES a.v[i] >>= n; return a; }

typedef struct { int16_t v[2 * VF_WIDTH]; } vs;
static inline vs vs_load(const int16_t *p) { vs r; memcpy(&r, p, sizeof r); return r; }
static inline vi vi_dot(vi c, vs a, vs b)
{
    VF_LANES c.v[i] = VF_WRAP(c.v[i], +, a.v[2 * i] * b.v[2 * i]);
    VF_LANES c.v[i] = VF_WRAP(c.v[i], +, a.v[2 * i + 1] * b.v[2 * i + 1]);
    return c;
}
typedef struct { int16_t v[2]; } vs_pair;
#define VS_PLACE(lane, which) (2 * (lane) + (which))
static inline vs_pair vs_load_pair(const int16_t *p) { return (vs_pair){{p[0], p[1]}}; }
static inline vi vi_dot_pair(vi c, vs a, vs_pair b)
{
    VF_LANES c.v[i] = VF_WRAP(c.v[i], +, a.v[2 * i] * b.v[0]);
    VF_LANES c.v[i] = VF_WRAP(c.v[i], +, a.v[2 * i + 1] * b.v[1]);
    return c;
}
static inline void vi_sum4(int32_t *sums, vi a, vi b, vi c, vi d)
{
    const vi *const from[4] = {&a, &b, &c, &d};
    for (int j = 0; j < 4; j++) {
        sums[j] = 0;
        VF_LANES sums[j] = VF_WRAP(sums[j], +, from[j]->v[i]);
    }
}
static inline void vi_store_i16(int16_t *p, vi a) { VF_LANES p[i] = (int16_t)a.v[i]; }

VF_OP1(vf_from_i, vf, vi, (float)a.v[i])
VF_OP1(vi_from_f, vi, vf, (int32_t)lrintf(a.v[i]))
static inline vf vf_bits(vi a) { vf r; memcpy(&r, &a, sizeof r); return r; }
static inline vi vi_bits(vf a) { vi r; memcpy(&r, &a, sizeof r); return r; }

VF_OP2(vf_lt, vm, vf, -(a.v[i] < b.v[i]))
VF_OP2(vf_le, vm, vf, -(a.v[i] <= b.v[i]))
VF_OP2(vf_eq, vm, vf, -(a.v[i] == b.v[i]))
VF_OP2(vi_lt, vm, vi, -(a.v[i] < b.v[i]))
VF_OP2(vi_eq, vm, vi, -(a.v[i] == b.v[i]))
VF_OP2(vm_and, vm, vm, a.v[i] & b.v[i])
VF_OP2(vm_or, vm, vm, a.v[i] | b.v[i])
VF_OP1(vm_not, vm, vm, ~a.v[i])
VF_OP3(vf_select, vf, vm, vf, a.v[i] ? b.v[i] : c.v[i])
VF_OP3(vi_select, vi, vm, vi, a.v[i] ? b.v[i] : c.v[i])
static inline vi vi_keep(vm m, vi a) { VF_LANES a.v[i] &= m.v[i]; return a; }
static inline unsigned vm_bits(vm a)
{
    unsigned r = 0;
    VF_LANES r |= (unsigned)(a.v[i] & 1) << i;
    return r;
}
static inline float vf_lowest(vf a)
{
    float low = a.v[0];
    VF_LANES low = a.v[i] < low ? a.v[i] : low;
    return low;
}
static inline int vm_any(vm a) { return vm_bits(a) != 0; }
static inline int vi_compress(int32_t *p, vi a, vm m)
{
    int n = 0;
    VF_LANES
    {
        p[n] = a.v[i];
        n -= m.v[i];
    }
    return n;
}

#undef VF_LANES
#undef VF_OP1
#undef VF_OP2
#undef VF_OP3
#undef VF_WRAP
#endif
