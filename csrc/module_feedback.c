/* module_feedback.c - Python wrappers of encoding with error feedback. */
#include "module.h"

/* Are all values of previous (an int32 array) within 0..k-1? If not, ValueError is set. */
static int in_table(PyArrayObject *previous, npy_intp k)
{
    const int32_t *value = pllm_data(previous);
    npy_intp size = previous ? PyArray_SIZE(previous) : 0;
    for (npy_intp i = 0; i < size; i++)
        if (!pllm_in_range("previous: an index", value[i], 0, k - 1))
            return 0;
    return 1;
}

/* encode_feedback(x, table, metric, feedback, previous | None, sweeps, threads) -> index */
static PyObject *encode_feedback(PyObject *self, PyObject *args)
{
    PyObject *x_obj, *table_obj, *metric_obj, *feedback_obj, *previous_obj;
    PyArrayObject *x = NULL, *table = NULL, *metric = NULL, *feedback = NULL;
    PyArrayObject *previous = NULL, *index = NULL;
    int sweeps, threads, status;
    (void)self;
    if (!PyArg_ParseTuple(args, "OOOOOii:encode_feedback", &x_obj, &table_obj, &metric_obj,
                          &feedback_obj, &previous_obj, &sweeps, &threads))
        return NULL;

    if (!pllm_take(&table, table_obj, "table", NPY_FLOAT32, 2, (npy_intp[]){-1, -1}, "Kd"))
        goto done;
    npy_intp k = PyArray_DIM(table, 0), d = PyArray_DIM(table, 1);
    if (!pllm_in_range("table: number of entries", k, 1, PLLM_MAX_CODEWORDS) ||
        !pllm_in_range("table: length of an entry", d, 1, PLLM_MAX_SUBVECTOR) ||
        !pllm_take(&metric, metric_obj, "metric", NPY_FLOAT32, 3, (npy_intp[]){-1, d, d}, "L  "))
        goto done;
    npy_intp count = PyArray_DIM(metric, 0), length = count * d;
    if (!pllm_take(&x, x_obj, "x", NPY_FLOAT32, 2, (npy_intp[]){-1, length}, "n ") ||
        !pllm_take(&feedback, feedback_obj, "feedback", NPY_FLOAT32, 2,
                   (npy_intp[]){length, length}, "") ||
        !pllm_in_range("threads", threads, 1, PLLM_MAX_THREADS))
        goto done;
    npy_intp rows = PyArray_DIM(x, 0);
    if (!pllm_take_optional(&previous, previous_obj, "previous", NPY_INT32, 2,
                            (npy_intp[]){rows, count}, "") ||
        !in_table(previous, k) ||
        !pllm_in_range("sweeps", sweeps, 1, previous ? INT32_MAX : 1) ||
        !pllm_new(&index, NPY_INT32, 2, (npy_intp[]){rows, count}))
        goto done;

    Py_BEGIN_ALLOW_THREADS
    status = pllm_active()->encode_feedback(pllm_data(x), rows, count, (int)d, pllm_data(table),
                                            (int)k, pllm_data(metric), pllm_data(feedback),
                                            pllm_data(previous), sweeps, pllm_data(index), threads);
    Py_END_ALLOW_THREADS
    if (!pllm_succeeded(status))
        Py_CLEAR(index);
done:
    Py_XDECREF(x);
    Py_XDECREF(table);
    Py_XDECREF(metric);
    Py_XDECREF(feedback);
    Py_XDECREF(previous);
    return (PyObject *)index;
}

PyMethodDef pllm_feedback_methods[] = {
    {"encode_feedback", encode_feedback, METH_VARARGS, "Indices chosen with error feedback."},
    {NULL, NULL, 0, NULL},
};
