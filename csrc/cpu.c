/* cpu.c - which instruction sets this machine runs, and which one is in use. */
#define _DEFAULT_SOURCE /* syscall */
#include <string.h>

#include "pllm.h"

extern const pllm_kernels pllm_table_scalar;
#if defined(__x86_64__)
extern const pllm_kernels pllm_table_avx2;
extern const pllm_kernels pllm_table_avx512;
extern const pllm_kernels pllm_table_amx;
#elif defined(__aarch64__)
extern const pllm_kernels pllm_table_neon;
#endif

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__) && !defined(PLLM_SIMDE)
#include <sys/syscall.h>
#include <unistd.h>
#endif

/* What the operating system saves on a task switch (XCR0); 0 when it does not say. */
static unsigned saved_registers(void)
{
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE))
        return 0;
    __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return a;
}

static int has_avx2(void)
{
    const unsigned ymm = 0x6; /* SSE and AVX state */
    unsigned a, b, c, d;
    if ((saved_registers() & ymm) != ymm)
        return 0;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_FMA) || !(c & bit_AVX) || !(c & bit_F16C))
        return 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & bit_AVX2);
}

/* The AVX-512 of Ice Lake, Zen 4 and later: with permutations of bytes and dot products of small integers.
 * Machines that have less of it run the AVX2 kernels. */
static int has_avx512(void)
{
#ifdef PLLM_SIMDE
    return 1; /* emulated */
#else
    const unsigned zmm = 0xe6; /* SSE, AVX, opmask, both halves of ZMM */
    const unsigned need_b = bit_BMI2 | bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    const unsigned need_c = bit_AVX512VBMI | bit_AVX512VNNI;
    unsigned a, b, c, d;
    if (!has_avx2() || (saved_registers() & zmm) != zmm)
        return 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & need_b) == need_b && (c & need_c) == need_c;
#endif
}

/* AVX-512, and tiles with products of bytes. Linux lets those use tiles who ask for it. */
static int has_amx(void)
{
#if defined(PLLM_SIMDE)
    return 1;
#elif defined(__linux__)
    const unsigned tiles = 0x60000, need_d = 1u << 24 | 1u << 25;
    const long ask_for = 0x1023, tile_data = 18;
    unsigned a, b, c, d;
    if (!has_avx512() || (saved_registers() & tiles) != tiles)
        return 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & need_d) != need_d)
        return 0;
    return syscall(SYS_arch_prctl, ask_for, tile_data) == 0;
#else
    return 0;
#endif
}
#endif

static int always(void) { return 1; }

static const struct {
    const pllm_kernels *table;
    int (*runs_here)(void);
} isas[] = {
    {&pllm_table_scalar, always},
#if defined(__x86_64__)
    {&pllm_table_avx2, has_avx2},
    {&pllm_table_avx512, has_avx512},
    {&pllm_table_amx, has_amx},
#elif defined(__aarch64__)
    {&pllm_table_neon, always},
#endif
};

static const pllm_kernels *active;

int pllm_isa_count(void) { return (int)(sizeof isas / sizeof *isas); }

const char *pllm_isa_name_at(int i) { return isas[i].table->isa; }

const pllm_kernels *pllm_isa_at(int i) { return isas[i].runs_here() ? isas[i].table : NULL; }

const pllm_kernels *pllm_active(void)
{
    for (int i = pllm_isa_count() - 1; !active; i--)
        active = pllm_isa_at(i);
    return active;
}

int pllm_select(const char *isa)
{
    for (int i = 0; i < pllm_isa_count(); i++) {
        if (strcmp(isa, pllm_isa_name_at(i)) == 0 && pllm_isa_at(i)) {
            active = pllm_isa_at(i);
            return 0;
        }
    }
    return -1;
}
