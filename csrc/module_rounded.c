/* module_rounded.c - Python wrappers of products with rounded factors. */
#include "module.h"

/* rounded_linear(x, w, threads) -> out */
static PyObject *rounded_linear(PyObject *self, PyObject *args)
{
    PyObject *x_obj, *w_obj;
    PyArrayObject *x = NULL, *w = NULL, *out = NULL;
    int threads, status;
    (void)self;
    if (!PyArg_ParseTuple(args, "OOi:rounded_linear", &x_obj, &w_obj, &threads))
        return NULL;

    if (!pllm_take(&x, x_obj, "x", NPY_FLOAT32, 2, (npy_intp[]){-1, -1}, "nk"))
        goto done;
    npy_intp n = PyArray_DIM(x, 0), k = PyArray_DIM(x, 1);
    if (!pllm_take(&w, w_obj, "w", NPY_FLOAT32, 2, (npy_intp[]){-1, k}, "m ") ||
        !pllm_in_range("threads", threads, 1, PLLM_MAX_THREADS))
        goto done;
    npy_intp m = PyArray_DIM(w, 0);
    if (!pllm_new(&out, NPY_FLOAT32, 2, (npy_intp[]){n, m}))
        goto done;

    Py_BEGIN_ALLOW_THREADS
    status = pllm_active()->rounded_linear(pllm_data(x), n, pllm_data(w), m, k, pllm_data(out), threads);
    Py_END_ALLOW_THREADS
    if (!pllm_succeeded(status))
        Py_CLEAR(out);
done:
    Py_XDECREF(x);
    Py_XDECREF(w);
    return (PyObject *)out;
}

/* rounded_gram(x, out, first, end, threads): adds to out */
static PyObject *rounded_gram(PyObject *self, PyObject *args)
{
    PyObject *x_obj, *out_obj, *result = NULL;
    PyArrayObject *x = NULL, *out = NULL;
    Py_ssize_t first, end;
    int threads, status;
    (void)self;
    if (!PyArg_ParseTuple(args, "OOnni:rounded_gram", &x_obj, &out_obj, &first, &end, &threads))
        return NULL;

    if (!pllm_take(&x, x_obj, "x", NPY_FLOAT32, 2, (npy_intp[]){-1, -1}, "nk"))
        goto done;
    npy_intp n = PyArray_DIM(x, 0), k = PyArray_DIM(x, 1);
    if (!pllm_take_out(&out, out_obj, "out", NPY_FLOAT32, 2, (npy_intp[]){n, n}, "") ||
        !pllm_in_range("end", end, 0, n) || !pllm_in_range("first", first, 0, end) ||
        !pllm_in_range("threads", threads, 1, PLLM_MAX_THREADS))
        goto done;

    Py_BEGIN_ALLOW_THREADS
    status = pllm_active()->rounded_gram(pllm_data(x), n, k, first, end, pllm_data(out), threads);
    Py_END_ALLOW_THREADS
    if (pllm_succeeded(status))
        result = Py_NewRef(Py_None);
done:
    Py_XDECREF(x);
    Py_XDECREF(out);
    return result;
}

PyMethodDef pllm_rounded_methods[] = {
    {"rounded_linear", rounded_linear, METH_VARARGS, "x w' with both factors rounded."},
    {"rounded_gram", rounded_gram, METH_VARARGS, "Adds x x', rounded, up to the diagonal."},
    {NULL, NULL, 0, NULL},
};
