/* module_search.c - Python wrappers of search.c and pack.c. */
#include "module.h"

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

    if (!pllm_take(&codebook, codebook_obj, "codebook", NPY_FLOAT32, 2, (npy_intp[]){-1, -1}, "Kd"))
        goto done;
    npy_intp k = PyArray_DIM(codebook, 0), d = PyArray_DIM(codebook, 1);
    if (!pllm_in_range("codebook: number of codewords", k, 1, PLLM_MAX_CODEWORDS) ||
        !pllm_in_range("codebook: length of a codeword", d, 1, PLLM_MAX_SUBVECTOR) ||
        !pllm_take(&z, z_obj, "z", NPY_FLOAT32, 2, (npy_intp[]){-1, d}, "n ") ||
        !pllm_take_optional(&weight, weight_obj, "weight", NPY_FLOAT32, 1, &d, "") ||
        !pllm_take_optional(&bias, bias_obj, "bias", NPY_FLOAT32, 1, &k, "") ||
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

PyMethodDef pllm_search_methods[] = {
    {"nearest", nearest, METH_VARARGS, "Nearest codeword of each row."},
    {NULL, NULL, 0, NULL},
};
