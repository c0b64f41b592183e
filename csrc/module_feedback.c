/* module_feedback.c - Python wrappers of encoding with error feedback. */
#include "module.h"

PyMethodDef pllm_feedback_methods[] = {
    {NULL, NULL, 0, NULL},
};
