/* module.h - shared by the module_*.c files, the only ones that touch Python objects.
 *
 * Pattern of a wrapper: parse, take every array (checked, contiguous, owned), make the outputs,
 * release the GIL around the kernel, and leave through one `done:` that releases what is owned.
 */
#ifndef PLLM_MODULE_H
#define PLLM_MODULE_H

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#define NPY_NO_DEPRECATED_API NPY_1_23_API_VERSION
#define NPY_TARGET_VERSION NPY_1_23_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL pllm_numpy_api
#ifndef PLLM_IMPORTS_NUMPY
#define NO_IMPORT_ARRAY
#endif
#include <Python.h>
#include <numpy/arrayobject.h>

#include "pllm.h"

/* Takes an input array: *array becomes a new reference to a C-contiguous, aligned array of NumPy type
 * `type` (obj itself, or a copy when obj is strided). shape[i] < 0 accepts any length and is called
 * letters[i] in messages. Returns 1, or 0 with TypeError or ValueError set, in words like
 * `z: got float64 (3, 7), want float32 (n, 8)`, and *array NULL. */
int pllm_take(PyArrayObject **array, PyObject *obj, const char *name, int type, int ndim,
              const npy_intp *shape, const char *letters);

/* The same, but None gives *array = NULL and 1. */
int pllm_take_optional(PyArrayObject **array, PyObject *obj, const char *name, int type, int ndim,
                       const npy_intp *shape, const char *letters);

/* Takes an array that the kernel writes: never copied, so it must be C-contiguous and writable. */
int pllm_take_out(PyArrayObject **array, PyObject *obj, const char *name, int type, int ndim,
                  const npy_intp *shape, const char *letters);

/* A new uninitialised array in *array. Returns 1, or 0 with MemoryError set. */
int pllm_new(PyArrayObject **array, int type, int ndim, const npy_intp *shape);

/* Checks low <= value <= high. Returns 1, or 0 with ValueError set: `bits: got 17, want 1..16`. */
int pllm_in_range(const char *name, Py_ssize_t value, Py_ssize_t low, Py_ssize_t high);

/* Data of an array taken above; NULL for NULL. */
void *pllm_data(PyArrayObject *array);

/* n values at an address, of bfloat16 or float32, as float32: widened into buffer, or in place. */
const float *pllm_as_floats(const void *values, int is_bfloat16, ptrdiff_t n, float *buffer);

/* Turns a kernel's status into an exception. Returns 1 for PLLM_OK, else 0 with MemoryError set. */
int pllm_succeeded(int status);

/* The matrix of a capsule of hold_matrix, or NULL with an exception set. Lives as long as the capsule. */
const pllm_matrix *pllm_held_matrix(PyObject *capsule);

/* Methods of each family, defined in module_<family>.c. */
extern PyMethodDef pllm_search_methods[];
extern PyMethodDef pllm_infer_methods[];
extern PyMethodDef pllm_layer_methods[];
extern PyMethodDef pllm_train_methods[];
extern PyMethodDef pllm_feedback_methods[];
extern PyMethodDef pllm_rounded_methods[];
extern PyMethodDef pllm_trellis_methods[];

#endif
