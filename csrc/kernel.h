/* kernel.h - included by every kernel body: the API, the vector layer, the functions of the
 * instruction set this file is being compiled for, and small functions that several bodies need. */
#ifndef PLLM_KERNEL_H
#define PLLM_KERNEL_H

#include <stdlib.h>

#include "pllm.h"
#include "simd.h"

#if defined(PLLM_ISA_AVX512)
#define PLLM_SYM(name) name##_avx512
#define PLLM_ISA_NAME "avx512"
#define PLLM_ISA_VECTOR
#elif defined(PLLM_ISA_AVX2)
#define PLLM_SYM(name) name##_avx2
#define PLLM_ISA_NAME "avx2"
#define PLLM_ISA_VECTOR
#elif defined(PLLM_ISA_NEON)
#define PLLM_SYM(name) name##_neon
#define PLLM_ISA_NAME "neon"
#define PLLM_ISA_VECTOR
#else
#define PLLM_SYM(name) name##_scalar
#define PLLM_ISA_NAME "scalar"
#endif

/* Bodies call each other directly, e.g. PLLM_SYM(pllm_search_slice)(...). */
#define PLLM_DECLARE(name) pllm_##name##_fn PLLM_SYM(pllm_##name);
PLLM_ALL_KERNELS(PLLM_DECLARE)
#undef PLLM_DECLARE
#if defined(PLLM_ISA_AVX512)
pllm_matmul_fn pllm_matmul_amx;
#endif

/* Full unrolling of the loop that follows; its trip count is a compile-time constant. Not in portable
 * C, where it brings nothing, nor in instrumented builds (PLLM_NO_UNROLL), where it takes minutes. */
#if defined(PLLM_NO_UNROLL) || !defined(PLLM_ISA_VECTOR)
#define PLLM_UNROLL
#elif defined(__clang__)
#define PLLM_UNROLL _Pragma("clang loop unroll(full)")
#else
#define PLLM_UNROLL _Pragma("GCC unroll 16")
#endif

/* Hides from the compiler what a pointer points to, so that loads through it stay where they are. */
#define PLLM_OPAQUE(pointer) __asm__("" : "+r"(pointer))

/* Keeps a vector in its register, so that it is not loaded again where it is used again. */
#if defined(__x86_64__) && defined(PLLM_ISA_VECTOR) && !defined(PLLM_SIMDE)
#define PLLM_HOLD(vector) __asm__("" : "+v"(vector))
#else
#define PLLM_HOLD(vector) (void)(vector)
#endif

/* Asks for memory that will be read soon. */
#define PLLM_PREFETCH(pointer) __builtin_prefetch(pointer)
/* The same, later: not into the first-level cache. */
#define PLLM_PREFETCH_FAR(pointer) __builtin_prefetch(pointer, 0, 2)

/* A function that is inlined wherever it is called, so that constant arguments are constants in it. */
#if defined(PLLM_NO_UNROLL)
#define PLLM_INLINE static inline
#else
#define PLLM_INLINE static inline __attribute__((always_inline))
#endif

/* function(d, ...), an inline one, with the common sizes of a sub-vector as constants to the compiler. */
#define PLLM_CONSTANT_D(function, d, ...) \
    ((d) == 1   ? function(1, __VA_ARGS__) \
     : (d) == 2 ? function(2, __VA_ARGS__) \
     : (d) == 4 ? function(4, __VA_ARGS__) \
     : (d) == 8 ? function(8, __VA_ARGS__) \
                : function(d, __VA_ARGS__))

static inline ptrdiff_t round_up(ptrdiff_t n, ptrdiff_t step) { return (n + step - 1) / step * step; }
static inline ptrdiff_t smaller(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }

/* 64 bits from p, first byte lowest. */
PLLM_INLINE uint64_t pllm_load_word(const uint8_t *p)
{
    uint64_t word;
    memcpy(&word, p, sizeof word);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    word = __builtin_bswap64(word);
#endif
    return word;
}

/* The error that search_slice reports for codeword k. */
PLLM_INLINE float pllm_weighted_error(const pllm_codebook *cb, const float *x, int32_t k,
                                      const int d)
{
    const float *c = cb->codebook + (size_t)k * (size_t)d;
    float sum = 0.0f;
    for (int j = 0; j < d; j++) {
        float e = x[j] - c[j];
        sum = fmaf(cb->weight ? cb->weight[j] * e : e, e, sum);
    }
    return cb->bias ? sum + cb->bias[k] : sum;
}

/* Uninitialised memory on a 64-byte boundary, or NULL. Release with free(). */
static inline void *pllm_alloc(size_t bytes)
{
    if (bytes > (size_t)PTRDIFF_MAX - 64)
        return NULL;
    return aligned_alloc(64, bytes ? (bytes + 63) / 64 * 64 : 64);
}

static inline float *pllm_alloc_floats(size_t count)
{
    return count > (size_t)PTRDIFF_MAX / sizeof(float) ? NULL : pllm_alloc(count * sizeof(float));
}

#endif
