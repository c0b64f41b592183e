/* module_args.c - argument checks at the Python boundary. Contracts are in module.h. */
#include "module.h"

#include <stdio.h>

enum { TEXT_BYTES = 320 };

/* Appends "(3, 7)"; a length below zero is written as its letter. */
static void append_shape(char *text, int ndim, const npy_intp *shape, const char *letters)
{
    size_t used = strlen(text);
    for (int i = 0; i < ndim && used + 32 < TEXT_BYTES; i++) {
        const char *before = i ? ", " : "(";
        int wrote = shape[i] < 0
                        ? snprintf(text + used, TEXT_BYTES - used, "%s%c", before, letters[i])
                        : snprintf(text + used, TEXT_BYTES - used, "%s%lld", before,
                                   (long long)shape[i]);
        used += (size_t)wrote;
    }
    snprintf(text + used, TEXT_BYTES - used, ndim == 0 ? "()" : ndim == 1 ? ",)" : ")");
}

/* Sets `exception` to "<name>: got <type> <shape>, want <type> <shape>". */
static void raise_mismatch(PyObject *exception, PyObject *obj, const char *name, int type, int ndim,
                           const npy_intp *shape, const char *letters)
{
    char got[TEXT_BYTES] = " ", want[TEXT_BYTES] = " ";
    PyObject *got_type = NULL, *want_type = NULL;
    append_shape(want, ndim, shape, letters);
    want_type = (PyObject *)PyArray_DescrFromType(type);
    if (!want_type)
        goto done;
    if (PyArray_Check(obj)) {
        PyArrayObject *array = (PyArrayObject *)obj;
        got_type = Py_NewRef((PyObject *)PyArray_DESCR(array));
        append_shape(got, PyArray_NDIM(array), PyArray_DIMS(array), "");
        PyErr_Format(exception, "%s: got %S%s, want %S%s", name, got_type, got, want_type, want);
    } else {
        got_type = PyObject_GetAttrString((PyObject *)Py_TYPE(obj), "__name__");
        if (got_type)
            PyErr_Format(exception, "%s: got %S, want a NumPy array, %S%s", name, got_type,
                         want_type, want);
    }
done:
    Py_XDECREF(got_type);
    Py_XDECREF(want_type);
}

/* Is obj an array of this type and shape? If not, an exception is set. */
static int matches(PyObject *obj, const char *name, int type, int ndim, const npy_intp *shape,
                   const char *letters)
{
    PyObject *exception = NULL;
    if (!PyArray_Check(obj)) {
        exception = PyExc_TypeError;
    } else {
        PyArrayObject *array = (PyArrayObject *)obj;
        if (PyArray_TYPE(array) != type || !PyArray_ISNOTSWAPPED(array))
            exception = PyExc_TypeError;
        else if (PyArray_NDIM(array) != ndim)
            exception = PyExc_ValueError;
        for (int i = 0; i < ndim && !exception; i++)
            if (shape[i] >= 0 && PyArray_DIM(array, i) != shape[i])
                exception = PyExc_ValueError;
    }
    if (exception)
        raise_mismatch(exception, obj, name, type, ndim, shape, letters);
    return !exception;
}

int pllm_take(PyArrayObject **array, PyObject *obj, const char *name, int type, int ndim,
              const npy_intp *shape, const char *letters)
{
    *array = NULL;
    if (matches(obj, name, type, ndim, shape, letters))
        *array = (PyArrayObject *)PyArray_FromAny(obj, NULL, 0, 0, NPY_ARRAY_IN_ARRAY, NULL);
    return *array != NULL;
}

int pllm_take_optional(PyArrayObject **array, PyObject *obj, const char *name, int type, int ndim,
                       const npy_intp *shape, const char *letters)
{
    *array = NULL;
    return obj == Py_None || pllm_take(array, obj, name, type, ndim, shape, letters);
}

int pllm_take_out(PyArrayObject **array, PyObject *obj, const char *name, int type, int ndim,
                  const npy_intp *shape, const char *letters)
{
    *array = NULL;
    if (!matches(obj, name, type, ndim, shape, letters))
        return 0;
    if (!PyArray_ISCARRAY((PyArrayObject *)obj)) {
        PyErr_Format(PyExc_ValueError, "%s: got a strided or read-only array, want a writable "
                                       "C-contiguous one", name);
        return 0;
    }
    *array = (PyArrayObject *)Py_NewRef(obj);
    return 1;
}

int pllm_new(PyArrayObject **array, int type, int ndim, const npy_intp *shape)
{
    *array = (PyArrayObject *)PyArray_SimpleNew(ndim, (npy_intp *)shape, type);
    return *array != NULL;
}

int pllm_in_range(const char *name, Py_ssize_t value, Py_ssize_t low, Py_ssize_t high)
{
    if (value >= low && value <= high)
        return 1;
    PyErr_Format(PyExc_ValueError, "%s: got %zd, want %zd..%zd", name, value, low, high);
    return 0;
}

void *pllm_data(PyArrayObject *array) { return array ? PyArray_DATA(array) : NULL; }

const float *pllm_as_floats(const void *values, int is_bfloat16, ptrdiff_t n, float *buffer)
{
    if (!is_bfloat16)
        return values;
    pllm_active()->widen(values, n, buffer);
    return buffer;
}

int pllm_succeeded(int status)
{
    if (status == PLLM_OK)
        return 1;
    PyErr_NoMemory();
    return 0;
}
