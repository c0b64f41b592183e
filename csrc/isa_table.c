/* isa_table.c - the table of one instruction set. Compiled once per instruction set. */
#include "kernel.h"

extern const pllm_kernels PLLM_SYM(pllm_table);

const pllm_kernels PLLM_SYM(pllm_table) = {
    .isa = PLLM_ISA_NAME,
    .lanes = VF_WIDTH,
#define PLLM_ENTRY(name) .name = PLLM_SYM(pllm_##name),
    PLLM_ALL_KERNELS(PLLM_ENTRY)
#undef PLLM_ENTRY
};
