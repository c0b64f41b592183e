/* module_layer.c - Python wrappers of one token's way through decoder layers. */
#include "module.h"

#include <stdlib.h>
#include <string.h>

static const char layer_name[] = "pocketllm.layer", layers_name[] = "pocketllm.layers";

/* A layer and what its pointers point into. */
typedef struct {
    pllm_layer layer;
    PyObject *matrices;                         /* tuple of capsules */
    PyArrayObject *bias[PLLM_LAYER_PARTS], *norm[4];
} held_layer;

static ptrdiff_t width_of(const pllm_layer *l) { return l->matrix[PLLM_LAYER_Q].in_features; }

static void release(held_layer *held)
{
    Py_XDECREF(held->matrices);
    for (int i = 0; i < PLLM_LAYER_PARTS; i++)
        Py_XDECREF(held->bias[i]);
    for (int i = 0; i < 4; i++)
        Py_XDECREF(held->norm[i]);
    free(held);
}

static void release_held(PyObject *capsule)
{
    held_layer *held = PyCapsule_GetPointer(capsule, layer_name);
    if (held)
        release(held);
}

/* Returns 1, or 0 with an exception set. */
static int take_matrices(held_layer *held, PyObject *biases)
{
    if (PyTuple_Size(held->matrices) != PLLM_LAYER_PARTS || PyTuple_Size(biases) != PLLM_LAYER_PARTS) {
        PyErr_Format(PyExc_ValueError, "matrices and biases: want tuples of %d", PLLM_LAYER_PARTS);
        return 0;
    }
    for (int i = 0; i < PLLM_LAYER_PARTS; i++) {
        const pllm_matrix *matrix = pllm_held_matrix(PyTuple_GetItem(held->matrices, i));
        if (!matrix)
            return 0;
        const npy_intp rows = matrix->out_features;
        if (!pllm_take_optional(&held->bias[i], PyTuple_GetItem(biases, i), "bias", NPY_FLOAT32, 1, &rows, ""))
            return 0;
        held->layer.matrix[i] = *matrix;
        held->layer.bias[i] = pllm_data(held->bias[i]);
    }
    return 1;
}

/* Returns 1, or 0 with ValueError set, unless the matrices fit each other. */
static int check_shapes(const pllm_layer *l)
{
    const pllm_matrix *const m = l->matrix;
    const ptrdiff_t width = width_of(l), inner = m[PLLM_LAYER_GATE].out_features;
    const ptrdiff_t joined = m[PLLM_LAYER_Q].out_features, shared = m[PLLM_LAYER_K].out_features;
    const int inputs = m[PLLM_LAYER_K].in_features == width && m[PLLM_LAYER_V].in_features == width &&
                       m[PLLM_LAYER_GATE].in_features == width && m[PLLM_LAYER_UP].in_features == width;
    const int outputs = m[PLLM_LAYER_O].in_features == joined && m[PLLM_LAYER_O].out_features == width &&
                        m[PLLM_LAYER_UP].out_features == inner && m[PLLM_LAYER_DOWN].in_features == inner &&
                        m[PLLM_LAYER_DOWN].out_features == width && m[PLLM_LAYER_V].out_features == shared;
    if (inputs && outputs && shared > 0 && l->head_width > 0 && l->head_width % 2 == 0 &&
        shared % l->head_width == 0 && joined % shared == 0)
        return 1;
    PyErr_SetString(PyExc_ValueError, "matrices: their shapes are not those of a decoder layer");
    return 0;
}

/* hold_layer(matrices, biases, norms, head_width, epsilon, scale) -> capsule */
static PyObject *hold_layer(PyObject *self, PyObject *args)
{
    static const char *const names[] = {"norm", "norm", "head_norm", "head_norm"};
    PyObject *matrices, *biases, *norms[4], *capsule = NULL;
    Py_ssize_t head_width;
    float epsilon, scale;
    (void)self;
    if (!PyArg_ParseTuple(args, "O!O!(OOOO)nff:hold_layer", &PyTuple_Type, &matrices, &PyTuple_Type, &biases,
                          &norms[0], &norms[1], &norms[2], &norms[3], &head_width, &epsilon, &scale))
        return NULL;
    held_layer *held = calloc(1, sizeof *held);
    if (!held)
        return PyErr_NoMemory();
    pllm_layer *const layer = &held->layer;
    Py_INCREF(matrices);
    held->matrices = matrices;
    layer->head_width = head_width;
    layer->epsilon = epsilon;
    layer->scale = scale;
    if (!take_matrices(held, biases) || !check_shapes(layer))
        goto done;
    const npy_intp width = width_of(layer);
    for (int i = 0; i < 4; i++) {
        const npy_intp length = i < 2 ? width : head_width;
        if (!(i < 2 ? pllm_take : pllm_take_optional)(&held->norm[i], norms[i], names[i], NPY_FLOAT32, 1,
                                                      &length, ""))
            goto done;
        *(i < 2 ? &layer->norm[i] : &layer->head_norm[i - 2]) = pllm_data(held->norm[i]);
    }
    capsule = PyCapsule_New(held, layer_name, release_held);
done:
    if (!capsule)
        release(held);
    return capsule;
}

/* Layers that a token passes one after the other, and what they are in. */
typedef struct {
    ptrdiff_t count;
    PyObject *capsules; /* tuple */
    const pllm_layer *layer[];
} held_layers;

static void release_held_layers(PyObject *capsule)
{
    held_layers *held = PyCapsule_GetPointer(capsule, layers_name);
    if (held)
        Py_DECREF(held->capsules);
    free(held);
}

/* Returns 1, or 0 with an exception set, unless all capsules are layers of one width. */
static int take_layers(held_layers *held)
{
    for (Py_ssize_t i = 0; i < held->count; i++) {
        const held_layer *one = PyCapsule_GetPointer(PyTuple_GetItem(held->capsules, i), layer_name);
        if (!one)
            return 0;
        held->layer[i] = &one->layer;
        if (width_of(held->layer[i]) != width_of(held->layer[0]) ||
            held->layer[i]->head_width != held->layer[0]->head_width) {
            PyErr_SetString(PyExc_ValueError, "layers: got different widths");
            return 0;
        }
    }
    return 1;
}

/* hold_layers(layers) -> capsule */
static PyObject *hold_layers(PyObject *self, PyObject *args)
{
    PyObject *capsules, *capsule = NULL;
    (void)self;
    if (!PyArg_ParseTuple(args, "O!:hold_layers", &PyTuple_Type, &capsules))
        return NULL;
    const Py_ssize_t count = PyTuple_Size(capsules);
    if (!pllm_in_range("layers", count, 1, PY_SSIZE_T_MAX / 64))
        return NULL;
    held_layers *held = malloc(sizeof *held + (size_t)count * sizeof *held->layer);
    if (!held)
        return PyErr_NoMemory();
    held->count = count;
    held->capsules = capsules;
    if (take_layers(held))
        capsule = PyCapsule_New(held, layers_name, release_held_layers);
    if (capsule)
        Py_INCREF(capsules);
    else
        free(held);
    return capsule;
}

/* layer_token from layer to layer, with bfloat16 as it is in memory: x, cosine, sine and y are of one type with
 * the pasts, and so is what one layer leaves to the next. */
static int take_token(const held_layers *held, const void *x, const void *cosine, const void *sine,
                      const pllm_past *past, void *y, enum pllm_activations activations, int threads)
{
    const ptrdiff_t width = width_of(held->layer[0]), head = held->layer[0]->head_width;
    const pllm_kernels *const kernels = pllm_active();
    const int is_bfloat16 = past->is_bfloat16;
    float *const memory = malloc((size_t)(2 * width + 2 * head) * sizeof *memory);
    if (!memory)
        return PLLM_ENOMEM;
    float *const made = memory + width, *const angle = made + width;
    const float *const cosines = pllm_as_floats(cosine, is_bfloat16, head, angle);
    const float *const sines = pllm_as_floats(sine, is_bfloat16, head, angle + head);
    int status = PLLM_OK;
    for (ptrdiff_t i = 0; i < held->count && status == PLLM_OK; i++) {
        float *const out = is_bfloat16 ? made : i % 2 ? memory : y;
        status = kernels->layer_token(held->layer[i], pllm_as_floats(x, is_bfloat16, width, memory), cosines,
                                      sines, &past[i], out, activations, threads);
        if (is_bfloat16 && status == PLLM_OK)
            kernels->narrow(made, width, y);
        x = is_bfloat16 ? y : out;
    }
    if (x != y)
        memcpy(y, x, (size_t)width * sizeof *memory);
    free(memory);
    return status;
}

/* The pasts of every layer, to be freed: rooms is (keys, values, room) of each, flat. NULL with an exception set. */
static pllm_past *take_pasts(PyObject *rooms, ptrdiff_t count, int is_bfloat16, Py_ssize_t length)
{
    if (!PyTuple_Check(rooms) || PyTuple_Size(rooms) != 3 * count) {
        PyErr_Format(PyExc_ValueError, "rooms: want a tuple of %zd", (Py_ssize_t)(3 * count));
        return NULL;
    }
    pllm_past *const past = malloc((size_t)count * sizeof *past);
    if (!past)
        return (pllm_past *)PyErr_NoMemory();
    for (ptrdiff_t i = 0; i < count; i++) {
        past[i] = (pllm_past){.is_bfloat16 = is_bfloat16,
                              .keys = PyLong_AsVoidPtr(PyTuple_GetItem(rooms, 3 * i)),
                              .values = PyLong_AsVoidPtr(PyTuple_GetItem(rooms, 3 * i + 1)),
                              .length = length,
                              .room = PyLong_AsSsize_t(PyTuple_GetItem(rooms, 3 * i + 2))};
        if (PyErr_Occurred() || !pllm_in_range("room", past[i].room, length + 1, PY_SSIZE_T_MAX / 64)) {
            free(past);
            return NULL;
        }
    }
    return past;
}

/* token_at(layers, x, is_bfloat16, cosine, sine, rooms, length, y, activations, threads): addresses, trusted. */
static PyObject *token_at(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    enum { ARGUMENTS = 10 };
    (void)self;
    if (count != ARGUMENTS) {
        PyErr_Format(PyExc_TypeError, "token_at: got %zd arguments, want %d", count, ARGUMENTS);
        return NULL;
    }
    const held_layers *held = PyCapsule_GetPointer(args[0], layers_name);
    const void *x = PyLong_AsVoidPtr(args[1]);
    const int is_bfloat16 = PyLong_AsLong(args[2]) != 0;
    const void *cosine = PyLong_AsVoidPtr(args[3]), *sine = PyLong_AsVoidPtr(args[4]);
    const Py_ssize_t length = PyLong_AsSsize_t(args[6]);
    void *const y = PyLong_AsVoidPtr(args[7]);
    const long form = PyLong_AsLong(args[8]), threads = PyLong_AsLong(args[9]);
    if (!held || PyErr_Occurred() || !pllm_in_range("length", length, 0, PY_SSIZE_T_MAX / 64) ||
        !pllm_in_range("activations", form, PLLM_ACTIVATIONS_FLOAT32, PLLM_ACTIVATIONS_INTEGER) ||
        !pllm_in_range("threads", threads, 1, PLLM_MAX_THREADS))
        return NULL;
    pllm_past *const past = take_pasts(args[5], held->count, is_bfloat16, length);
    if (!past)
        return NULL;
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = take_token(held, x, cosine, sine, past, y, (enum pllm_activations)form, (int)threads);
    Py_END_ALLOW_THREADS
    free(past);
    if (!pllm_succeeded(status))
        return NULL;
    Py_RETURN_NONE;
}

PyMethodDef pllm_layer_methods[] = {
    {"hold_layer", hold_layer, METH_VARARGS, "A decoder layer for many tokens."},
    {"hold_layers", hold_layers, METH_VARARGS, "Decoder layers that tokens pass one after the other."},
    {"token_at", (PyCFunction)(void (*)(void))token_at, METH_FASTCALL,
     "What layers make of a token, by address."},
    {NULL, NULL, 0, NULL},
};
