/* vexp.h - the exponential of the vector layer. */
#ifndef PLLM_VEXP_H
#define PLLM_VEXP_H

#include "kernel.h"

/* exp(x) for -85 <= x <= 0, relative error below 2e-7: 2^n times a polynomial on [-ln2/2, ln2/2]. */
PLLM_INLINE vf exp_negative(vf x)
{
    vf n = vf_rint(vf_mul(x, vf_set1(1.44269504f)));
    vf r = vf_fnma(n, vf_set1(0.693359375f), x);
    r = vf_fma(n, vf_set1(2.12194440e-4f), r);
    vf p = vf_set1(0.0013814539415761828f);
    p = vf_fma(p, r, vf_set1(0.00836874544620514f));
    p = vf_fma(p, r, vf_set1(0.04166838899254799f));
    p = vf_fma(p, r, vf_set1(0.1666652113199234f));
    p = vf_fma(p, r, vf_set1(0.4999999403953552f));
    p = vf_fma(p, r, vf_set1(1.0f));
    p = vf_fma(p, r, vf_set1(1.0f));
    return vf_bits(vi_add(vi_bits(p), vi_sll(vi_from_f(n), 23)));
}

#endif
