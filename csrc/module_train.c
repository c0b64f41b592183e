/* module_train.c - Python wrappers of the codec's forward, backward and training step. */
#include "module.h"

PyMethodDef pllm_train_methods[] = {
    {NULL, NULL, 0, NULL},
};
