/* peak.c - how many fused multiply-adds one core does: independent chains in registers, nothing else.
 * Compiled by common.py for the instruction set in use, with the kernels' own vector layer. */
#include "../csrc/simd.h"

#if defined(PLLM_ISA_AVX512) || defined(PLLM_ISA_NEON)
enum { CHAINS = 24 }; /* of 32 registers */
#else
enum { CHAINS = 12 }; /* of 16 registers; latency 4 or 5 and 2 a cycle need 8 to 10 */
#endif

long flops_per_round(void) { return 2L * CHAINS * VF_WIDTH; }

float fma_chain(long rounds)
{
    vf chain[CHAINS], factor = vf_set1(0.999f), term = vf_set1(0.001f);
    for (int i = 0; i < CHAINS; i++)
        chain[i] = vf_set1((float)i);
    for (long r = 0; r < rounds; r++) {
#if defined(__clang__)
#pragma clang loop unroll(full)
#else
#pragma GCC unroll 24
#endif
        for (int i = 0; i < CHAINS; i++)
            chain[i] = vf_fma(chain[i], factor, term);
    }
    float lanes[VF_WIDTH], sum = 0.0f;
    for (int i = 0; i < CHAINS; i++) {
        vf_store(lanes, chain[i]);
        for (int k = 0; k < VF_WIDTH; k++)
            sum += lanes[k];
    }
    return sum;
}
