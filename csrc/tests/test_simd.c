/* test_simd.c - the vector layer: calls simd_layer.c as compiled for the instruction set under test. */
#include "check.h"

void test_simd(const pllm_kernels *k);

void check_simd_scalar(void);
void check_simd_avx2(void) __attribute__((weak));
void check_simd_avx512(void) __attribute__((weak));
void check_simd_neon(void) __attribute__((weak));

void test_simd(const pllm_kernels *k)
{
    const struct {
        const char *isa;
        void (*check)(void);
    } layers[] = {
        {"scalar", check_simd_scalar},
        {"avx2", check_simd_avx2},
        {"avx512", check_simd_avx512},
        {"neon", check_simd_neon},
    };
    long before = check_count;
    for (int i = 0; i < 4; i++)
        if (strcmp(layers[i].isa, k->isa) == 0 && layers[i].check)
            layers[i].check();
    CHECK(check_count > before, "no check of this vector layer");
}
