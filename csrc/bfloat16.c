/* bfloat16.c - between float32 and its upper half. Compiled once per instruction set; the compiler
 * turns these loops into vectors. */
#include "kernel.h"

void PLLM_SYM(pllm_widen)(const uint16_t *x, ptrdiff_t n, float *out)
{
    for (ptrdiff_t i = 0; i < n; i++) {
        const uint32_t bits = (uint32_t)x[i] << 16;
        memcpy(out + i, &bits, sizeof bits);
    }
}

void PLLM_SYM(pllm_narrow)(const float *x, ptrdiff_t n, uint16_t *out)
{
    for (ptrdiff_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        out[i] = (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
    }
}
