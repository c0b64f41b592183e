/* module_trellis.c - Python wrapper of encoding in trellis codes. */
#include "module.h"

#include <math.h>

/* Are all values of a float32 array finite and at least `low`, or above it? If not, ValueError is set. */
static int are_finite(PyArrayObject *array, const char *name, float low, int above)
{
    const float *value = pllm_data(array);
    npy_intp size = PyArray_SIZE(array);
    for (npy_intp i = 0; i < size; i++) {
        if (isfinite(value[i]) && (above ? value[i] > low : value[i] >= low))
            continue;
        PyObject *got = PyFloat_FromDouble((double)value[i]);
        if (got)
            PyErr_Format(PyExc_ValueError, "%s: got %S, want finite numbers%s", name, got,
                         low < 0.0f ? "" : above ? " above 0" : ", none negative");
        Py_XDECREF(got);
        return 0;
    }
    return 1;
}

/* Do all columns have bits of a trellis code, and room for one more if some rows have it? If not, ValueError is set. */
static int are_bits(PyArrayObject *bits, int extra)
{
    const uint8_t *value = pllm_data(bits);
    npy_intp size = PyArray_SIZE(bits);
    for (npy_intp c = 0; c < size; c++)
        if (!pllm_in_range("bits", value[c], 0, PLLM_TRELLIS_BITS - (extra > 0)))
            return 0;
    return 1;
}

/* encode_trellis(x, weight, feedback | None, bits, extra, factor, level, threads) -> symbol */
static PyObject *encode_trellis(PyObject *self, PyObject *args)
{
    PyObject *x_obj, *weight_obj, *feedback_obj, *bits_obj, *factor_obj, *level_obj;
    PyArrayObject *x = NULL, *weight = NULL, *feedback = NULL, *bits = NULL, *factor = NULL;
    PyArrayObject *level = NULL, *symbol = NULL;
    int extra, threads, status;
    (void)self;
    if (!PyArg_ParseTuple(args, "OOOOiOOi:encode_trellis", &x_obj, &weight_obj, &feedback_obj,
                          &bits_obj, &extra, &factor_obj, &level_obj, &threads))
        return NULL;

    if (!pllm_take(&x, x_obj, "x", NPY_FLOAT32, 2, (npy_intp[]){-1, -1}, "nm"))
        goto done;
    npy_intp rows = PyArray_DIM(x, 0), columns = PyArray_DIM(x, 1);
    if (!pllm_take(&weight, weight_obj, "weight", NPY_FLOAT32, 1, (npy_intp[]){rows}, "") ||
        !pllm_take_optional(&feedback, feedback_obj, "feedback", NPY_FLOAT32, 2,
                            (npy_intp[]){columns, columns}, "") ||
        !pllm_take(&bits, bits_obj, "bits", NPY_UINT8, 1, (npy_intp[]){columns}, "") ||
        !pllm_take(&factor, factor_obj, "factor", NPY_FLOAT32, 1, (npy_intp[]){columns}, "") ||
        !pllm_take(&level, level_obj, "level", NPY_FLOAT32, 1, (npy_intp[]){PLLM_TRELLIS_TABLE}, "") ||
        !pllm_in_range("extra", extra, 0, 3) || !are_bits(bits, extra) ||
        !are_finite(weight, "weight", 0.0f, 0) || !are_finite(factor, "factor", 0.0f, 1) ||
        !are_finite(level, "level", -INFINITY, 0) ||
        !pllm_in_range("threads", threads, 1, PLLM_MAX_THREADS) ||
        !pllm_new(&symbol, NPY_UINT8, 2, (npy_intp[]){rows, columns}))
        goto done;

    Py_BEGIN_ALLOW_THREADS
    status = pllm_active()->encode_trellis(pllm_data(x), rows, columns, pllm_data(weight),
                                           pllm_data(feedback), pllm_data(bits), extra, pllm_data(factor),
                                           pllm_data(level), pllm_data(symbol), threads);
    Py_END_ALLOW_THREADS
    if (!pllm_succeeded(status))
        Py_CLEAR(symbol);
done:
    Py_XDECREF(x);
    Py_XDECREF(weight);
    Py_XDECREF(feedback);
    Py_XDECREF(bits);
    Py_XDECREF(factor);
    Py_XDECREF(level);
    return (PyObject *)symbol;
}

PyMethodDef pllm_trellis_methods[] = {
    {"encode_trellis", encode_trellis, METH_VARARGS, "Symbols of trellis codes."},
    {NULL, NULL, 0, NULL},
};
