/* micro.h - the size of a register tile: rows of one matrix, broadcast, times a panel of the other, whose lines stand
 * in the lanes of a few vectors. */
#ifndef PLLM_MICRO_H
#define PLLM_MICRO_H

#include "kernel.h"

#if defined(PLLM_ISA_AVX512)
enum { MICRO_ROWS = 12, MICRO_VECTORS = 2 };
#elif defined(PLLM_ISA_AVX2)
enum { MICRO_ROWS = 6, MICRO_VECTORS = 2 };
#elif defined(PLLM_ISA_NEON)
enum { MICRO_ROWS = 6, MICRO_VECTORS = 4 };
#else
enum { MICRO_ROWS = 2, MICRO_VECTORS = 2 };
#endif
enum { WIDE = MICRO_VECTORS * VF_WIDTH /* lines of a panel */ };

#endif
