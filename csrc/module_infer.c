/* module_infer.c - Python wrappers of table decode and the fused matrix product. */
#include "module.h"

PyMethodDef pllm_infer_methods[] = {
    {NULL, NULL, 0, NULL},
};
