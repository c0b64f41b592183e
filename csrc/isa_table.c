/* isa_table.c - the table of one instruction set. Compiled once per instruction set. */
#include "kernel.h"

extern const pllm_kernels PLLM_SYM(pllm_table);

const pllm_kernels PLLM_SYM(pllm_table) = {
    .isa = PLLM_ISA_NAME,
    .lanes = VF_WIDTH,
#define PLLM_ENTRY(name) .name = PLLM_SYM(pllm_##name),
    PLLM_ALL_KERNELS(PLLM_ENTRY)
};

#if defined(PLLM_ISA_AVX512)
/* AMX: the same, but for this. */
#define pllm_matmul_avx512 pllm_matmul_amx
extern const pllm_kernels pllm_table_amx;
const pllm_kernels pllm_table_amx = {.isa = "amx", .lanes = VF_WIDTH, PLLM_ALL_KERNELS(PLLM_ENTRY)};
#endif
