/* module.c - the extension module pocketllm._kernels: creation, and the choice of instruction set. */
#define PLLM_IMPORTS_NUMPY
#include "module.h"

#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#else
#error "pocketllm's kernels need OpenMP"
#endif

/* A new list of the names of the instruction sets that this machine runs. */
static PyObject *isa_names(void)
{
    PyObject *list = PyList_New(0);
    for (int i = 0; list && i < pllm_isa_count(); i++) {
        PyObject *name = pllm_isa_at(i) ? PyUnicode_FromString(pllm_isa_name_at(i)) : NULL;
        if (pllm_isa_at(i) && (!name || PyList_Append(list, name) < 0))
            Py_CLEAR(list);
        Py_XDECREF(name);
    }
    return list;
}

/* Selects an instruction set; 0 with `exception` set when that cannot be. */
static int select_isa(const char *wanted, const char *source, PyObject *exception)
{
    if (pllm_select(wanted) == 0)
        return 1;
    PyObject *names = isa_names();
    if (names)
        PyErr_Format(exception, "%s: got '%s', want one that this machine runs: %S", source, wanted,
                     names);
    Py_XDECREF(names);
    return 0;
}

static PyObject *isa(PyObject *self, PyObject *args)
{
    (void)self, (void)args;
    return PyUnicode_FromString(pllm_active()->isa);
}

static PyObject *available_isas(PyObject *self, PyObject *args)
{
    (void)self, (void)args;
    return isa_names();
}

static PyObject *set_isa(PyObject *self, PyObject *args)
{
    const char *name;
    (void)self;
    if (!PyArg_ParseTuple(args, "s:set_isa", &name) || !select_isa(name, "isa", PyExc_ValueError))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *default_threads(PyObject *self, PyObject *args)
{
    (void)self, (void)args;
    return PyLong_FromLong(omp_get_max_threads());
}

/* (compiler, flags, vector lanes) of this build, for show_config. */
static PyObject *build_info(PyObject *self, PyObject *args)
{
    (void)self, (void)args;
#if defined(__clang__)
    const char *compiler = "clang " __clang_version__;
#else
    const char *compiler = "gcc " __VERSION__;
#endif
    return Py_BuildValue("(si)", compiler, pllm_active()->lanes);
}

static PyMethodDef isa_methods[] = {
    {"isa", isa, METH_NOARGS, "Name of the instruction set in use."},
    {"available_isas", available_isas, METH_NOARGS, "Names of those this machine runs."},
    {"set_isa", set_isa, METH_VARARGS, "Use the named instruction set."},
    {"default_threads", default_threads, METH_NOARGS, "OpenMP's own number of threads."},
    {"build_info", build_info, METH_NOARGS, "(compiler, vector lanes in use)."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "_kernels",
    .m_doc = "C kernels of pocketllm; use pocketllm.kernels.",
    .m_size = -1,
    .m_methods = isa_methods,
};

PyMODINIT_FUNC PyInit__kernels(void)
{
    PyMethodDef *const families[] = {pllm_search_methods, pllm_infer_methods, pllm_layer_methods,
                                     pllm_train_methods, pllm_feedback_methods,
                                     pllm_trellis_methods, pllm_rounded_methods};
    const char *forced = getenv("POCKETLLM_ISA");
    PyObject *module = NULL;
    import_array();
    if (forced && *forced && !select_isa(forced, "POCKETLLM_ISA", PyExc_ImportError))
        return NULL;
    module = PyModule_Create(&definition);
    for (size_t i = 0; module && i < sizeof families / sizeof *families; i++)
        if (PyModule_AddFunctions(module, families[i]) < 0)
            Py_CLEAR(module);
    return module;
}
