/* module_search.c - Python wrappers of search.c and pack.c. */
#include "module.h"

#include <stdlib.h>

/* Takes a codebook with its weight and bias, either of which may be None. */
static int take_codebook(PyArrayObject **codebook, PyArrayObject **weight, PyArrayObject **bias,
                         PyObject *codebook_obj, PyObject *weight_obj, PyObject *bias_obj)
{
    if (!pllm_take(codebook, codebook_obj, "codebook", NPY_FLOAT32, 2, (npy_intp[]){-1, -1}, "Kd"))
        return 0;
    npy_intp k = PyArray_DIM(*codebook, 0), d = PyArray_DIM(*codebook, 1);
    return pllm_in_range("codebook: number of codewords", k, 1, PLLM_MAX_CODEWORDS) &&
           pllm_in_range("codebook: length of a codeword", d, 1, PLLM_MAX_SUBVECTOR) &&
           pllm_take_optional(weight, weight_obj, "weight", NPY_FLOAT32, 1, &d, "") &&
           pllm_take_optional(bias, bias_obj, "bias", NPY_FLOAT32, 1, &k, "");
}

/* nearest(z, codebook, weight | None, bias | None, return_error, threads)
 * -> (index, error | None) */
static PyObject *nearest(PyObject *self, PyObject *args)
{
    PyObject *z_obj, *codebook_obj, *weight_obj, *bias_obj, *result = NULL;
    PyArrayObject *z = NULL, *codebook = NULL, *weight = NULL, *bias = NULL;
    PyArrayObject *index = NULL, *error = NULL;
    int with_error, threads, status;
    (void)self;
    if (!PyArg_ParseTuple(args, "OOOOpi:nearest", &z_obj, &codebook_obj, &weight_obj, &bias_obj,
                          &with_error, &threads))
        return NULL;

    if (!take_codebook(&codebook, &weight, &bias, codebook_obj, weight_obj, bias_obj))
        goto done;
    npy_intp k = PyArray_DIM(codebook, 0), d = PyArray_DIM(codebook, 1);
    if (!pllm_take(&z, z_obj, "z", NPY_FLOAT32, 2, (npy_intp[]){-1, d}, "n ") ||
        !pllm_in_range("threads", threads, 1, PLLM_MAX_THREADS))
        goto done;
    npy_intp n = PyArray_DIM(z, 0);
    if (!pllm_new(&index, NPY_INT32, 1, &n) || (with_error && !pllm_new(&error, NPY_FLOAT32, 1, &n)))
        goto done;

    Py_BEGIN_ALLOW_THREADS
    status = pllm_active()->nearest(pllm_data(z), n, pllm_data(codebook), (int)k, (int)d,
                                    pllm_data(weight), pllm_data(bias), pllm_data(index),
                                    pllm_data(error), threads);
    Py_END_ALLOW_THREADS
    if (pllm_succeeded(status))
        result = Py_BuildValue("(OO)", index, error ? (PyObject *)error : Py_None);
done:
    Py_XDECREF(z);
    Py_XDECREF(codebook);
    Py_XDECREF(weight);
    Py_XDECREF(bias);
    Py_XDECREF(index);
    Py_XDECREF(error);
    return result;
}

/* What a search index holds: a tree, and the kernels that built it. */
typedef struct {
    const pllm_kernels *kernels;
    pllm_tree *tree;
    int k, d;
} search_index;

static const char index_name[] = "pocketllm.search_index";

static void release_index(PyObject *capsule)
{
    search_index *held = PyCapsule_GetPointer(capsule, index_name);
    if (held)
        free(held->tree);
    free(held);
}

/* search_index(codebook, weight | None, bias | None, threads) -> capsule */
static PyObject *new_index(PyObject *self, PyObject *args)
{
    PyObject *codebook_obj, *weight_obj, *bias_obj, *capsule = NULL;
    PyArrayObject *codebook = NULL, *weight = NULL, *bias = NULL;
    search_index *held = NULL;
    int threads, status;
    (void)self;
    if (!PyArg_ParseTuple(args, "OOOi:search_index", &codebook_obj, &weight_obj, &bias_obj, &threads) ||
        !take_codebook(&codebook, &weight, &bias, codebook_obj, weight_obj, bias_obj) ||
        !pllm_in_range("threads", threads, 1, PLLM_MAX_THREADS))
        goto done;
    held = malloc(sizeof *held);
    if (!held) {
        PyErr_NoMemory();
        goto done;
    }
    *held = (search_index){.kernels = pllm_active(), .k = (int)PyArray_DIM(codebook, 0),
                           .d = (int)PyArray_DIM(codebook, 1)};

    Py_BEGIN_ALLOW_THREADS
    status = held->kernels->tree_build(&held->tree, pllm_data(codebook), held->k, held->d,
                                       pllm_data(weight), pllm_data(bias), PTRDIFF_MAX, threads);
    Py_END_ALLOW_THREADS
    if (pllm_succeeded(status))
        capsule = PyCapsule_New(held, index_name, release_index);
    if (capsule)
        held = NULL; /* the capsule's now */
done:
    if (held)
        free(held->tree);
    free(held);
    Py_XDECREF(codebook);
    Py_XDECREF(weight);
    Py_XDECREF(bias);
    return capsule;
}

/* Are n guesses all in 0..k-1? If not, ValueError is set. */
static int guesses_fit(PyArrayObject *previous, npy_intp n, int k)
{
    const int32_t *guess = pllm_data(previous);
    int fit = 1;
    for (npy_intp i = 0; guess && i < n; i++)
        fit &= guess[i] >= 0 && guess[i] < k;
    if (!fit)
        PyErr_Format(PyExc_ValueError, "previous: got a value outside 0..%d, want indices of codewords",
                     k - 1);
    return fit;
}

/* search(capsule, z, previous | None, return_error, threads) -> (index, error | None) */
static PyObject *search(PyObject *self, PyObject *args)
{
    PyObject *capsule, *z_obj, *previous_obj, *result = NULL;
    PyArrayObject *z = NULL, *previous = NULL, *index = NULL, *error = NULL;
    int with_error, threads, status;
    (void)self;
    if (!PyArg_ParseTuple(args, "OOOpi:search", &capsule, &z_obj, &previous_obj, &with_error, &threads))
        return NULL;
    const search_index *held = PyCapsule_GetPointer(capsule, index_name);
    if (!held || !pllm_in_range("threads", threads, 1, PLLM_MAX_THREADS) ||
        !pllm_take(&z, z_obj, "z", NPY_FLOAT32, 2, (npy_intp[]){-1, held->d}, "n "))
        goto done;
    npy_intp n = PyArray_DIM(z, 0);
    if (!pllm_take_optional(&previous, previous_obj, "previous", NPY_INT32, 1, &n, "") ||
        !guesses_fit(previous, n, held->k) || !pllm_new(&index, NPY_INT32, 1, &n) ||
        (with_error && !pllm_new(&error, NPY_FLOAT32, 1, &n)))
        goto done;

    Py_BEGIN_ALLOW_THREADS
    status = held->kernels->tree_search(held->tree, pllm_data(z), n, pllm_data(previous),
                                        pllm_data(index), pllm_data(error), threads);
    Py_END_ALLOW_THREADS
    if (pllm_succeeded(status))
        result = Py_BuildValue("(OO)", index, error ? (PyObject *)error : Py_None);
done:
    Py_XDECREF(z);
    Py_XDECREF(previous);
    Py_XDECREF(index);
    Py_XDECREF(error);
    return result;
}

/* Takes packed, a (rows, stride) array whose stride fits `count` indices of `bits` bits. */
static int take_packed(PyArrayObject **packed, PyObject *obj, Py_ssize_t count, int bits)
{
    if (!pllm_in_range("bits", bits, 1, PLLM_MAX_BITS) ||
        !pllm_in_range("count", count, 0, PY_SSIZE_T_MAX / PLLM_MAX_BITS))
        return 0;
    const npy_intp shape[] = {-1, pllm_row_stride_bytes(count, bits)};
    return pllm_take(packed, obj, "packed", NPY_UINT8, 2, shape, "n ");
}

/* pack(index, bits, threads) -> packed */
static PyObject *pack(PyObject *self, PyObject *args)
{
    PyObject *index_obj;
    PyArrayObject *index = NULL, *packed = NULL;
    int bits, threads, status;
    (void)self;
    if (!PyArg_ParseTuple(args, "Oii:pack", &index_obj, &bits, &threads))
        return NULL;
    if (!pllm_in_range("bits", bits, 1, PLLM_MAX_BITS) ||
        !pllm_in_range("threads", threads, 1, PLLM_MAX_THREADS) ||
        !pllm_take(&index, index_obj, "index", NPY_INT32, 2, (npy_intp[]){-1, -1}, "nL"))
        goto done;
    npy_intp rows = PyArray_DIM(index, 0), count = PyArray_DIM(index, 1);
    if (!pllm_new(&packed, NPY_UINT8, 2, (npy_intp[]){rows, pllm_row_stride_bytes(count, bits)}))
        goto done;

    Py_BEGIN_ALLOW_THREADS
    status = pllm_active()->pack(pllm_data(index), rows, count, bits, pllm_data(packed), threads);
    Py_END_ALLOW_THREADS
    if (status == PLLM_ERANGE)
        PyErr_Format(PyExc_ValueError, "index: got a value outside 0..%d, want indices of %d bits",
                     (1 << bits) - 1, bits);
    if (status != PLLM_OK)
        Py_CLEAR(packed);
done:
    Py_XDECREF(index);
    return (PyObject *)packed;
}

/* unpack(packed, count, bits, threads) -> index */
static PyObject *unpack(PyObject *self, PyObject *args)
{
    PyObject *packed_obj;
    PyArrayObject *packed = NULL, *index = NULL;
    Py_ssize_t count;
    int bits, threads;
    (void)self;
    if (!PyArg_ParseTuple(args, "Onii:unpack", &packed_obj, &count, &bits, &threads))
        return NULL;
    if (!take_packed(&packed, packed_obj, count, bits) ||
        !pllm_in_range("threads", threads, 1, PLLM_MAX_THREADS))
        goto done;
    npy_intp rows = PyArray_DIM(packed, 0);
    if (!pllm_new(&index, NPY_INT32, 2, (npy_intp[]){rows, count}))
        goto done;

    Py_BEGIN_ALLOW_THREADS
    pllm_active()->unpack(pllm_data(packed), rows, count, bits, pllm_data(index), threads);
    Py_END_ALLOW_THREADS
done:
    Py_XDECREF(packed);
    return (PyObject *)index;
}

/* index_max(packed, count, bits, threads) -> int */
static PyObject *index_max(PyObject *self, PyObject *args)
{
    PyObject *packed_obj, *result = NULL;
    PyArrayObject *packed = NULL;
    Py_ssize_t count;
    int bits, threads;
    int32_t largest;
    (void)self;
    if (!PyArg_ParseTuple(args, "Onii:index_max", &packed_obj, &count, &bits, &threads))
        return NULL;
    if (!take_packed(&packed, packed_obj, count, bits) ||
        !pllm_in_range("threads", threads, 1, PLLM_MAX_THREADS))
        goto done;

    Py_BEGIN_ALLOW_THREADS
    largest = pllm_active()->index_max(pllm_data(packed), PyArray_DIM(packed, 0), count, bits,
                                       threads);
    Py_END_ALLOW_THREADS
    result = PyLong_FromLong(largest);
done:
    Py_XDECREF(packed);
    return result;
}

PyMethodDef pllm_search_methods[] = {
    {"nearest", nearest, METH_VARARGS, "Nearest codeword of each row."},
    {"search_index", new_index, METH_VARARGS, "A codebook made ready for many searches."},
    {"search", search, METH_VARARGS, "Nearest codeword of each row in a search index."},
    {"pack", pack, METH_VARARGS, "Indices to packed bytes."},
    {"unpack", unpack, METH_VARARGS, "Packed bytes to indices."},
    {"index_max", index_max, METH_VARARGS, "Largest index in packed bytes."},
    {NULL, NULL, 0, NULL},
};
